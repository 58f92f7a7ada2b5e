//! Runs rows of any number of sequences through a model's tape.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::adapters::{self, AdapterReport, ScaledAdapter};
use super::backend::{Backend, Cache, Device};
use super::placement::Placement;
use super::prefix::{Origin, PrefixCache};
use super::{Estimate, Model};
use crate::cpu::{Arithmetic, KvLayout};
use crate::quant::DType;
use crate::tape::{Batch, Purpose, Segments, Timing};
use crate::{Error, Result};

/// How a session is set up. The default suits a chat on a laptop.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Positions the window may hold; 0 for the model's own. Memory is taken as it fills.
    pub context: usize,
    /// Threads; 0 for one per core.
    pub threads: usize,
    /// Element type of the KV cache: F16, F32 or Q8_0.
    pub kv_type: DType,
    /// Most tokens per run of the tape: prompts are fed in chunks of it.
    pub chunk: usize,
    /// Most rows per run whose logits are given: at least the number of sequences that are decoded together.
    pub logit_rows: usize,
    /// Where the model runs.
    pub device: Device,
    /// How many of the last layers the GPU runs, with the head, while the CPU runs those before; from all on, as many as there
    /// are. None for all of them, or as many as its memory holds where [`Device::Auto`] chose it or `gpu_memory` bounds it.
    pub gpu_layers: Option<usize>,
    /// Most bytes of the GPU's memory to take for layers, their part of the cache and what they compute in.
    pub gpu_memory: Option<u64>,
    /// Read the weights on a GPU from the pages of the mapped file, without a copy, where its driver allows that (Vulkan on Linux
    /// and Android); where not, they are copied, with a warning that says why. For GPUs that share the processor's memory: a card
    /// would fetch the weights anew for every token. Estimates try a page of the file and count the copy where it is refused
    /// ([`Estimate::imported`]). As on the CPU, a file that is truncated meanwhile ends the process. A [`Device::Open`] is as it
    /// was opened.
    pub gpu_import: bool,
    /// How the CPU computes linear maps with quantized weights: narrow is the fast way, exact the one to compare with.
    pub arithmetic: Arithmetic,
    /// Refuse to open when the peak would be above this many bytes, the mapped file included.
    pub memory_budget: Option<u64>,
    /// Where computed prompts are kept for others that begin alike; its bytes come on top of the budget.
    pub prefix_cache: Option<PrefixCache>,
}

impl Default for SessionOptions {
    fn default() -> SessionOptions {
        SessionOptions {
            context: 0,
            threads: 0,
            kv_type: DType::F16,
            chunk: 512,
            logit_rows: 1,
            device: Device::Cpu,
            gpu_layers: None,
            gpu_memory: None,
            gpu_import: false,
            arithmetic: Arithmetic::Narrow,
            memory_budget: None,
            prefix_cache: None,
        }
    }
}

/// One sequence of tokens and its keys and values. Cloning shares the cache's pages until one side writes.
#[derive(Clone, Debug)]
pub struct Sequence {
    pub(super) cache: Cache,
    pub(super) tokens: Vec<u32>,
    /// The adapters its keys and values were computed with.
    adapters: Arc<[ScaledAdapter]>,
    /// From here on, keys and values know of text that has been dropped.
    pub(super) shifted: Option<usize>,
}

impl Sequence {
    /// The tokens whose keys and values are held.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Keeps the first `len` tokens only.
    pub fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.cache.truncate(len);
        self.shifted = self.shifted.filter(|from| *from < len);
    }

    /// Length of the longest start of `tokens` whose keys and values are here: what lies behind a dropped part does not
    /// count, for it would not be what computing `tokens` gives.
    pub fn common_prefix(&self, tokens: &[u32]) -> usize {
        let held = &self.tokens[..self.shifted.unwrap_or(self.tokens.len())];
        held.iter().zip(tokens).take_while(|(a, b)| a == b).count()
    }

    /// Bytes of the cache in use.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }
}

/// Sequences with the tokens to feed to each.
struct Feeds<'a, 's, 't>(&'a mut [(&'s mut Sequence, &'t [u32])]);

impl Segments<Cache> for Feeds<'_, '_, '_> {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn rows(&self, index: usize) -> usize {
        self.0[index].1.len()
    }

    fn cache(&mut self, index: usize) -> Option<&mut Cache> {
        Some(&mut self.0[index].0.cache)
    }
}

/// The rows of a run that give logits, states or, with targets, cross-entropies.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wanted<'a> {
    /// Logits of no row.
    Nothing,
    /// Logits of each sequence's last row.
    Last,
    /// Logits of all rows.
    All,
    /// Logits of chosen rows, increasing; `largest` as in [`Batch::largest`].
    Logits { outputs: &'a [u32], largest: usize },
    /// The states that the head would read, of all rows.
    States,
    /// Cross-entropies of chosen rows, increasing, with the target of each.
    Scores { outputs: &'a [u32], targets: &'a [u32] },
}

/// A model made ready to run. See the module's text.
#[derive(Debug)]
pub struct Engine {
    model: Model,
    options: SessionOptions,
    layout: KvLayout,
    backend: Backend,
    /// What it comes to need, adapters apart.
    estimate: Estimate,
    /// Why the CPU runs the model though a GPU was asked for, or looked for.
    fallback: Option<String>,
    adapters: Arc<[ScaledAdapter]>,
    /// This engine's own number, where its caches are of no use to another but its forks: on a GPU.
    owner: Option<u64>,
    /// Tokens of a run, and its outputs: kept, so that a run need not allocate.
    tokens: Vec<u32>,
    outputs: Vec<u32>,
}

impl Engine {
    /// Plans the tapes, checks the budget, allocates, starts the threads.
    ///
    /// # Errors
    /// Parameters out of range, [`Error::Memory`] with figures when over budget.
    pub fn new(model: &Model, options: &SessionOptions) -> Result<Engine> {
        let options = complete(model, options)?;
        let layout = KvLayout::new(model.spec(), options.kv_type)?;
        let (backend, Placement { estimate, fallback, .. }) = Placement::new(model, &options)?.open(model, &options)?;
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let owner = backend.owns_caches().then(|| COUNT.fetch_add(1, Ordering::Relaxed));
        Ok(Engine {
            model: model.clone(),
            options,
            layout,
            backend,
            estimate,
            fallback,
            adapters: Arc::new([]),
            owner,
            tokens: Vec::new(),
            outputs: Vec::new(),
        })
    }

    /// What [`Engine::new`] with the same arguments will come to need, with one sequence of the full context. A GPU is
    /// asked what it can; nothing stays allocated on it.
    ///
    /// # Errors
    /// Parameters out of range; a GPU that was asked for and cannot run the model.
    pub fn estimate(model: &Model, options: &SessionOptions) -> Result<Estimate> {
        Ok(Placement::new(model, &complete(model, options)?)?.estimate)
    }

    /// What it comes to need with one sequence of the full context, adapters apart.
    pub fn needs(&self) -> Estimate {
        self.estimate
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The options, with zeros replaced by what they stand for.
    pub fn options(&self) -> &SessionOptions {
        &self.options
    }

    /// What runs the model, for people: `cpu`, the GPU's name, or both with the number of layers.
    pub fn device_name(&self) -> String {
        self.backend.name()
    }

    /// The GPU that runs the model or its last layers; none on the CPU.
    #[cfg(feature = "gpu")]
    pub fn gpu(&mut self) -> Option<&std::sync::Arc<crate::gpu::Device>> {
        self.backend.gpu().map(|executor| executor.device())
    }

    /// Why the CPU runs the model though [`Device::Auto`] found a GPU.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// What decoding one token moves on a GPU, of a divided model there; none on the CPU.
    ///
    /// # Errors
    /// [`Error::Device`].
    #[cfg(feature = "gpu")]
    pub fn decode_traffic(&mut self) -> Result<Option<crate::gpu::Traffic>> {
        self.backend.gpu().map(|executor| executor.decode_traffic()).transpose()
    }

    /// An empty sequence.
    pub fn sequence(&self) -> Sequence {
        let cache = self.backend.cache(self.layout);
        Sequence { cache, tokens: Vec::new(), adapters: self.adapters.clone(), shifted: None }
    }

    /// A sequence that begins as `tokens` do, as far as the prefix cache has it ready: empty where it has nothing, or
    /// there is none.
    pub fn sequence_of(&self, tokens: &[u32]) -> Sequence {
        self.recall(tokens, 0).unwrap_or_else(|| self.sequence())
    }

    /// The start of `tokens` from the prefix cache, if it is longer than `than`.
    pub(super) fn recall(&self, tokens: &[u32], than: usize) -> Option<Sequence> {
        self.options.prefix_cache.as_ref()?.find(&self.origin(), tokens, than)
    }

    /// Keeps `sequence` in the prefix cache, if there is one.
    pub fn remember(&self, sequence: &Sequence) {
        if let Some(cache) = &self.options.prefix_cache
            && sequence.shifted.is_none()
            && adapters::same(&sequence.adapters, &self.adapters)
            && !sequence.tokens.is_empty()
        {
            cache.keep(&self.origin(), sequence);
        }
    }

    fn origin(&self) -> Origin {
        let SessionOptions { kv_type, arithmetic, .. } = self.options;
        Origin { model: self.model.clone(), kv_type, arithmetic, adapters: self.adapters.clone(), owner: self.owner }
    }

    /// Makes room in a full window: forgets `drop` tokens of `sequence` from token `keep` on, and moves those behind them
    /// to their places (llama.cpp's context shift). Their values stay as they are and their keys are turned to the new
    /// positions, so they still know of what was dropped: the text goes on smoothly, but not as if it had been computed
    /// without that part.
    ///
    /// # Errors
    /// Tokens that are not held; [`Error::Device`] on a GPU.
    pub fn shift(&mut self, sequence: &mut Sequence, keep: usize, drop: usize) -> Result<()> {
        self.backend.shift(&mut sequence.cache, self.model.spec(), keep, drop)?;
        if drop > 0 {
            sequence.tokens.drain(keep..keep + drop);
            sequence.shifted = Some(sequence.shifted.map_or(keep, |from| from.min(keep)));
        }
        Ok(())
    }

    /// Feeds each sequence its tokens, all in one run, and gives the logits after the last token of each:
    /// `[sequences, vocab]`, row by row.
    ///
    /// # Errors
    /// More tokens than a chunk or sequences than `logit_rows`, token ids outside the vocabulary, a full context,
    /// [`Error::Cancelled`] (no sequence has changed then).
    pub fn step(&mut self, feeds: &mut [(&mut Sequence, &[u32])], cancel: &AtomicBool) -> Result<&mut [f32]> {
        self.run(feeds, Wanted::Last, false, cancel)
    }

    /// As [`Engine::step`], without logits: for the parts of a prompt before its last.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn feed(&mut self, feeds: &mut [(&mut Sequence, &[u32])], cancel: &AtomicBool) -> Result<()> {
        self.run(feeds, Wanted::Nothing, false, cancel).map(|_| ())
    }

    /// Feeds the sequences and gives what is wanted, row by row; `alone` as in [`Batch::alone`].
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub(super) fn run(
        &mut self,
        feeds: &mut [(&mut Sequence, &[u32])],
        wanted: Wanted<'_>,
        alone: bool,
        cancel: &AtomicBool,
    ) -> Result<&mut [f32]> {
        self.outputs.clear();
        self.tokens.clear();
        for (sequence, feed) in feeds.iter() {
            let used = sequence.tokens.len();
            if used + feed.len() > self.options.context {
                return Err(Error::ContextFull { window: self.options.context, used, asked: feed.len() });
            }
            if used > 0 && !adapters::same(&sequence.adapters, &self.adapters) {
                return Err(Error::argument(
                    "the sequence holds keys and values of other adapters; set those again or truncate it to 0",
                ));
            }
            self.tokens.extend_from_slice(feed);
            if matches!(wanted, Wanted::Last) {
                self.outputs.push((self.tokens.len() as u32).saturating_sub(1));
            }
        }
        let largest = if let Wanted::Logits { largest, .. } = wanted { largest } else { 0 };
        let (purpose, targets) = match wanted {
            Wanted::Scores { outputs, targets } => {
                self.outputs.extend_from_slice(outputs);
                (Purpose::Score, targets)
            }
            Wanted::Logits { outputs, .. } => {
                self.outputs.extend_from_slice(outputs);
                (Purpose::Generate, [].as_slice())
            }
            Wanted::All => {
                self.outputs.extend(0..self.tokens.len() as u32);
                (Purpose::Generate, [].as_slice())
            }
            Wanted::States => {
                self.outputs.extend(0..self.tokens.len() as u32);
                (Purpose::Embed, [].as_slice())
            }
            Wanted::Nothing | Wanted::Last => (Purpose::Generate, [].as_slice()),
        };
        let (tokens, outputs) = (&self.tokens, &self.outputs);
        let batch =
            Batch { tokens, input: &[], segments: &mut Feeds(feeds), outputs, largest, targets, alone, learning: None };
        self.backend.run(purpose, batch, cancel)?;
        for (sequence, feed) in feeds {
            if sequence.tokens.is_empty() {
                sequence.adapters = self.adapters.clone();
            }
            sequence.tokens.extend_from_slice(feed);
        }
        Ok(self.backend.result())
    }

    /// Gives back the memory that only a run needs, logits with it; the next run takes it anew. Gives its bytes.
    ///
    /// # Errors
    /// None but [`Error::Memory`], for a handful of bytes; [`Error::Device`] on a GPU.
    pub fn trim(&mut self) -> Result<usize> {
        self.backend.trim()
    }

    /// Gives the memory of a GPU back, as [`Session::park`](super::Session::park) does.
    ///
    /// # Errors
    /// As [`Session::park`](super::Session::park).
    pub fn park(&mut self) -> Result<u64> {
        self.backend.park()
    }

    /// Hands over the keys and values of a sequence as [`KvCache::contents`](crate::cpu::KvCache::contents) gives them.
    pub(super) fn contents(&self, sequence: &Sequence, write: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.backend.contents(&sequence.cache, write)
    }

    /// Fills the keys and values of all tokens of a sequence, as [`KvCache::fill`](crate::cpu::KvCache::fill) does.
    pub(super) fn fill(&mut self, sequence: &mut Sequence, read: impl FnMut(&mut [u8]) -> Result<()>) -> Result<()> {
        self.backend.fill(&mut sequence.cache, sequence.tokens.len(), read)
    }

    /// A second engine for sequences of this one, which on a GPU shares the weights with it. No adapters are in force in it.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`].
    pub(super) fn fork(&self) -> Result<Engine> {
        Ok(Engine {
            model: self.model.clone(),
            options: self.options.clone(),
            layout: self.layout,
            backend: self.backend.fork()?,
            estimate: self.estimate,
            fallback: self.fallback.clone(),
            adapters: Arc::new([]),
            owner: self.owner,
            tokens: Vec::new(),
            outputs: Vec::new(),
        })
    }

    /// The layout of the sequences' caches.
    pub(super) fn layout(&self) -> KvLayout {
        self.layout
    }

    /// A row of the logits of the last run, the sampler's to change.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`] where a GPU has them still.
    pub(super) fn logits_row(&mut self, row: usize) -> Result<&mut [f32]> {
        let vocab = self.model.spec().vocab;
        Ok(&mut self.backend.logits()?[row * vocab..][..vocab])
    }

    /// The largest logits of a row of the last run, if it gave those alone and all is well with them: most first, of equals
    /// the lower token first.
    pub(super) fn largest(&self, row: usize) -> Option<&[(u32, f32)]> {
        // What is no number comes first.
        self.backend.largest(row).filter(|row| row.first().is_some_and(|(_, logit)| logit.is_finite()))
    }

    /// Puts `adapters`, each times its factor, in force from the next run on, in place of those before; none for the base
    /// model. Their corrections add up. Sequences that hold tokens belong to the set they were fed under and can go on
    /// when it is set again.
    ///
    /// # Errors
    /// An adapter that does not match the model ([`Adapter::matches`](crate::adapter::Adapter::matches)), a factor that
    /// is no number, [`Error::Memory`] when the memory budget does not hold it. The set before stays in force then.
    pub fn set_adapters(&mut self, adapters: &[ScaledAdapter]) -> Result<AdapterReport> {
        let (tensors, corrections) = adapters::corrections(&self.model, adapters)?;
        let (estimate, budget) = (self.estimate, self.options.memory_budget);
        let check = |bytes: usize| Estimate { adapters: bytes as u64, ..estimate }.check(budget);
        let bytes = self.backend.set_corrections(corrections, check)?;
        self.adapters = adapters.into();
        Ok(AdapterReport { tensors, bytes })
    }

    /// The adapters in force.
    pub fn adapters(&self) -> &[ScaledAdapter] {
        &self.adapters
    }

    /// Time spent by kind of op since the last call; empty unless [`Engine::set_timing`] turned it on.
    pub fn take_timings(&mut self) -> Vec<Timing> {
        self.backend.take_timings()
    }

    /// Turns the op timing table on or off.
    pub fn set_timing(&mut self, on: bool) {
        self.backend.set_timing(on);
    }
}

fn complete(model: &Model, options: &SessionOptions) -> Result<SessionOptions> {
    let mut options = options.clone();
    if options.context == 0 {
        options.context = model.spec().context;
    }
    if options.threads == 0 {
        options.threads = crate::system::cores();
    }
    let range = |name: &str, value: usize, max: usize| match value {
        v if (1..=max).contains(&v) => Ok(()),
        v => Err(Error::argument(format!("{name} must be between 1 and {max}, not {v}"))),
    };
    if options.arithmetic == Arithmetic::Wide {
        return Err(Error::argument("16-bit arithmetic is for learning; a session takes narrow or exact"));
    }
    range("context", options.context, 1 << 24)?;
    range("chunk", options.chunk, 1 << 14)?;
    range("logit_rows", options.logit_rows, 1 << 14)?;
    range("threads", options.threads, crate::cpu::Pool::MAX_THREADS)?;
    options.chunk = options.chunk.min(options.context);
    options.logit_rows = options.logit_rows.min(options.chunk);
    Ok(options)
}
