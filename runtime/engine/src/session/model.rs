//! An open model.

use std::sync::{Arc, OnceLock};
#[cfg(feature = "gpu")]
use std::sync::{Mutex, PoisonError, Weak};

#[cfg(feature = "gpu")]
use super::Device;
use crate::gguf::Gguf;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::grammar::{Grammar, GrammarSource, Vocabulary};
use crate::tape::{Spec, Weights};
use crate::text::{ChatTemplate, Tokenizer};
use crate::{Error, Result};

/// Mapped weights with everything needed to talk to them. Cloning shares.
#[derive(Clone, Debug)]
pub struct Model {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    gguf: Arc<Gguf>,
    spec: Spec,
    weights: Arc<Weights>,
    tokenizer: Tokenizer,
    /// A template that does not compile is no reason not to open the model: the error comes up when it is used.
    template: Result<Option<ChatTemplate>>,
    /// The tokens as grammars see them, from the first grammar on.
    vocabulary: OnceLock<Arc<Vocabulary>>,
    /// The GPUs that sessions and learners run on.
    #[cfg(feature = "gpu")]
    devices: Mutex<Vec<Opened>>,
}

/// A GPU, and how it was asked for.
#[cfg(feature = "gpu")]
#[derive(Debug)]
struct Opened {
    asked: Device,
    import: bool,
    device: Weak<gpu::Device>,
}

impl Model {
    /// Joins a mapped file with what its family says of it. `kinglet_models::open` does both.
    ///
    /// # Errors
    /// Missing or misshapen tensors, a tokenizer that is damaged or not supported.
    pub fn new(gguf: Arc<Gguf>, spec: Spec) -> Result<Model> {
        let weights = Arc::new(Weights::resolve(gguf.clone(), &spec)?);
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        let template = ChatTemplate::from_gguf(&gguf, &tokenizer);
        Ok(Model {
            inner: Arc::new(Inner {
                gguf,
                spec,
                weights,
                tokenizer,
                template,
                vocabulary: OnceLock::new(),
                #[cfg(feature = "gpu")]
                devices: Mutex::default(),
            }),
        })
    }

    /// The GPU for a session or a learner, none for the CPU: the one that another of this model has open and asked for in the same
    /// way, so that weights lie there once, or one that is opened now. One that was lost is opened anew. `import` is as in
    /// [`gpu::Limits`].
    ///
    /// # Errors
    /// As [`gpu::Device::open`].
    #[cfg(feature = "gpu")]
    pub(super) fn gpu(&self, wanted: &Device, import: bool) -> Result<Option<Arc<gpu::Device>>> {
        if !wanted.is_shared() {
            return wanted.open(import);
        }
        // Who asks for the same meanwhile waits for it.
        let mut devices = self.inner.devices.lock().unwrap_or_else(PoisonError::into_inner);
        devices.retain(|one| one.device.upgrade().is_some_and(|device| !device.is_lost()));
        let is_it = |one: &&Opened| one.asked.is(wanted) && one.import == import;
        let open = devices.iter().find(is_it).and_then(|one| one.device.upgrade());
        if open.is_some() {
            return Ok(open);
        }
        let device = wanted.open(import)?;
        let opened = |device| Opened { asked: wanted.clone(), import, device: Arc::downgrade(device) };
        devices.extend(device.iter().map(opened));
        Ok(device)
    }

    /// Whether both are clones of one.
    pub(super) fn is(&self, other: &Model) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// The file.
    pub fn gguf(&self) -> &Gguf {
        &self.inner.gguf
    }

    /// What the model is made of.
    pub fn spec(&self) -> &Spec {
        &self.inner.spec
    }

    /// Its weights.
    pub fn weights(&self) -> &Arc<Weights> {
        &self.inner.weights
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.inner.tokenizer
    }

    /// Its chat template; `None` for a base model that has none.
    ///
    /// # Errors
    /// [`Error::Template`] when the file's template does not compile.
    pub fn chat_template(&self) -> Result<Option<&ChatTemplate>> {
        match &self.inner.template {
            Ok(template) => Ok(template.as_ref()),
            Err(e) => Err(Error::Template(e.to_string())),
        }
    }

    /// Compiles a grammar for this model's tokens: what an answer may be, as
    /// [`GenerateOptions::grammar`](super::GenerateOptions::grammar). The first one takes some tens of milliseconds more,
    /// for the vocabulary, and keeps some megabytes.
    ///
    /// # Errors
    /// As [`Grammar::compile`], and [`Error::Unsupported`] for a model whose tokens have no text.
    pub fn grammar(&self, source: GrammarSource) -> Result<Grammar> {
        let vocabulary = match self.inner.vocabulary.get() {
            Some(vocabulary) => vocabulary,
            None => {
                let made = Arc::new(Vocabulary::new(self.tokenizer())?);
                self.inner.vocabulary.get_or_init(|| made)
            }
        };
        Grammar::compile(vocabulary, source)
    }

    /// Whether `grammar` was compiled for this model.
    pub(super) fn knows(&self, grammar: &Grammar) -> bool {
        self.inner.vocabulary.get().is_some_and(|vocabulary| grammar.is_for(vocabulary))
    }
}
