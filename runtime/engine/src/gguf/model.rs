//! [`Gguf`]: an open model file, or several that make up one model.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::map::Mapping;
use super::metadata::Metadata;
use super::reader::{self, Header};
use super::split::Split;
use super::tensor::TensorInfo;
use super::validate;
use crate::quant::DType;
use crate::{Error, Result};

/// Memory of the caller's that holds a model.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// How to open a model. The default maps the file and does not scan its weights.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// Read the file into private memory instead of mapping it: for files on a network or on a medium that may be
    /// taken out, and for files that others rewrite in place.
    pub copy: bool,
    /// Look for NaN and infinity among the block scales and dense weights; reads all of the file.
    pub validate: bool,
    /// Do not ask the system to read the weights ahead: for those who want the header only.
    pub header_only: bool,
}

/// An open model: metadata, tensor table, and the tensors' bytes in place.
///
/// Cheap to share in an [`Arc`]; the map is released when the last owner goes. While a file is mapped, it must not be
/// truncated or rewritten in place (replace it by renaming another over it, as [`Writer`](super::Writer) does), or open
/// it with [`OpenOptions::copy`]: the system ends a process that touches a mapped page which is gone.
pub struct Gguf {
    name: String,
    version: u32,
    alignment: usize,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    /// Name and bytes of each file.
    shards: Vec<(String, Mapping)>,
}

/// One file, its header read.
struct Shard {
    name: String,
    mapping: Mapping,
    header: Header,
}

impl Gguf {
    /// Opens and maps the model at `path`; of a model in several files, any one of them.
    ///
    /// # Errors
    /// [`Error::Io`] where the system refuses, [`Error::Format`] where the file is malformed, [`Error::Unsupported`]
    /// where a tensor has a type that Kinglet does not read.
    pub fn open(path: impl AsRef<Path>) -> Result<Gguf> {
        Gguf::open_with(path, &OpenOptions::default())
    }

    /// Opens the model at `path` as `options` say.
    ///
    /// # Errors
    /// As [`open`](Gguf::open); [`Error::Memory`] where a copy is asked for and does not fit.
    pub fn open_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Gguf> {
        let path = path.as_ref();
        let shard = Shard::open(path, options)?;
        let Some(split) = Split::of(&shard.header.metadata)? else {
            return Gguf::assemble(vec![shard], options);
        };
        let paths = split.paths(path, &shard.header.metadata)?;
        let mut opened = Some(shard);
        let mut shards = Vec::with_capacity(paths.len());
        for (no, path) in (0u64..).zip(&paths) {
            let shard = match opened.take_if(|_| no == split.no) {
                Some(shard) => shard,
                None => Shard::open(path, options)?,
            };
            split.check(&shard.header.metadata, no)?;
            shards.push(shard);
        }
        let model = Gguf::assemble(shards, options)?;
        split.check_tensors(&model.metadata, &model.tensors, |shard| model.file_of(shard))?;
        Ok(model)
    }

    /// Opens the model that takes `length` bytes from `offset` of an open file, such as an asset within a package.
    ///
    /// # Errors
    /// As [`open`](Gguf::open); also where the offset leaves weights unaligned (packages should store models at
    /// multiples of 8 bytes), and for one part of a model in several files.
    pub fn from_file(file: File, offset: u64, length: u64) -> Result<Gguf> {
        Gguf::from_file_with(file, offset, length, &OpenOptions::default())
    }

    /// As [`from_file`](Gguf::from_file), with options. With `copy` any offset will do.
    ///
    /// # Errors
    /// As [`from_file`](Gguf::from_file).
    pub fn from_file_with(file: File, offset: u64, length: u64, options: &OpenOptions) -> Result<Gguf> {
        let shard = Shard::read("<descriptor>".into(), &file, offset, length, options)?;
        Gguf::single(shard, options)
    }

    /// Opens the model in `bytes`, which are used in place.
    ///
    /// # Errors
    /// As [`from_file`](Gguf::from_file); the memory must be aligned to 8 bytes.
    pub fn from_memory(bytes: SharedBytes) -> Result<Gguf> {
        Gguf::from_memory_with(bytes, &OpenOptions::default())
    }

    /// As [`from_memory`](Gguf::from_memory), with options. With `copy` the memory may have any alignment.
    ///
    /// # Errors
    /// As [`from_memory`](Gguf::from_memory).
    pub fn from_memory_with(bytes: SharedBytes, options: &OpenOptions) -> Result<Gguf> {
        let name = "<memory>".to_string();
        let mapping = match options.copy {
            true if !(*bytes).as_ref().is_empty() => Mapping::copy((*bytes).as_ref(), &name)?,
            _ => Mapping::Shared(bytes),
        };
        let header = reader::read_header(mapping.bytes(), &name)?;
        Gguf::single(Shard { name, mapping, header }, options)
    }

    /// The path, or `<descriptor>` or `<memory>`: for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The multiple to which tensors are aligned in the file, in bytes.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// Number of files.
    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    /// The metadata; of a model in several files, the first one's.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors, in the order of the files.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).and_then(|&i| self.tensors.get(i))
    }

    /// The bytes of a tensor of this model, in the map: exactly [`TensorInfo::len_bytes`] of them. Of a tensor of some
    /// other model there may be none here: then the slice is empty.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        self.shards
            .get(tensor.shard)
            .and_then(|(_, s)| s.bytes().get(tensor.start..tensor.start.checked_add(tensor.bytes)?))
            .unwrap_or_default()
    }

    /// Of the files those whose bytes lie in pages of the system's, mapped or copied: whole pages are there, for as long as the
    /// model is.
    #[cfg(feature = "gpu")]
    pub(crate) fn pages(&self) -> impl Iterator<Item = &[u8]> {
        self.shards.iter().filter_map(|(_, mapping)| mapping.pages())
    }

    /// Bytes of all files together.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().fold(0, |sum, (_, s)| sum.saturating_add(s.bytes().len() as u64))
    }

    /// How many of the files' bytes are mapped in large pages by now, which are read up to a third faster; `None` where the
    /// system does not tell (it is Linux that does, since 6.7) or the model is no file's.
    pub fn large_page_bytes(&self) -> Option<u64> {
        self.shards.iter().try_fold(0u64, |sum, (_, s)| sum.checked_add(s.large_pages()? as u64))
    }

    /// Scans the weights for NaN and infinity, as [`OpenOptions::validate`] does on opening.
    ///
    /// # Errors
    /// [`Error::Format`] naming the first such tensor and block.
    pub fn validate(&self) -> Result<()> {
        self.tensors.iter().try_for_each(|t| validate::check(self.file_of(t.shard), t, self.data(t)))
    }

    fn file_of(&self, shard: usize) -> &str {
        self.shards.get(shard).map_or(&self.name, |(name, _)| name)
    }

    /// A model that must be whole in one piece.
    fn single(shard: Shard, options: &OpenOptions) -> Result<Gguf> {
        match Split::of(&shard.header.metadata)? {
            None => Gguf::assemble(vec![shard], options),
            Some(split) => Err(shard.header.metadata.error(
                "split.count",
                format!(
                    "this is part {} of a model in {} files; open such a model by its path, or merge its files into one first",
                    split.no.saturating_add(1),
                    split.count
                ),
            )),
        }
    }

    /// One model from its files.
    fn assemble(shards: Vec<Shard>, options: &OpenOptions) -> Result<Gguf> {
        let mut model: Option<Gguf> = None;
        for (no, Shard { name, mapping, header }) in shards.into_iter().enumerate() {
            let Header { version, alignment, metadata, mut tensors } = header;
            for t in &mut tensors {
                t.shard = no;
                check_address(&name, t, mapping.bytes())?;
            }
            let model = model.get_or_insert_with(|| Gguf {
                name: name.clone(),
                version,
                alignment,
                metadata,
                tensors: Vec::new(),
                index: HashMap::new(),
                shards: Vec::new(),
            });
            model.tensors.append(&mut tensors);
            model.shards.push((name, mapping));
        }
        let mut model = model.ok_or_else(|| Error::argument("a model consists of at least one file"))?;
        model.index = model.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        if options.validate {
            model.validate()?;
        }
        Ok(model)
    }
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf")
            .field("name", &self.name)
            .field("version", &self.version)
            .field("keys", &self.metadata.len())
            .field("tensors", &self.tensors.len())
            .field("shards", &self.shards.len())
            .finish_non_exhaustive()
    }
}

impl Shard {
    fn open(path: &Path, options: &OpenOptions) -> Result<Shard> {
        // Asked before opening: to open a pipe is to wait for somebody to write to it.
        let meta = std::fs::metadata(path).map_err(Error::io(path))?;
        let name = path.display().to_string();
        if !meta.is_file() {
            let what = "is not a regular file; give the path of a .gguf file".into();
            return Err(Error::Format { file: name, at: "path".into(), what });
        }
        let file = File::open(path).map_err(Error::io(path))?;
        Shard::read(name, &file, 0, meta.len(), options)
    }

    fn read(name: String, file: &File, offset: u64, length: u64, options: &OpenOptions) -> Result<Shard> {
        let mapping = match options.copy {
            true => Mapping::read(file, &name, offset, length)?,
            false => Mapping::map(file, &name, offset, length, !options.header_only)?,
        };
        let header = reader::read_header(mapping.bytes(), &name)?;
        Ok(Shard { name, mapping, header })
    }
}

/// Kernels read `f32` and larger elements in place, which needs an address of their alignment. A map of a whole file
/// always has it; a range of a file or memory of the caller's may not.
fn check_address(file: &str, tensor: &TensorInfo, bytes: &[u8]) -> Result<()> {
    let needed = match tensor.dtype {
        DType::F64 | DType::I64 => 8usize,
        _ => 4,
    };
    let address = (bytes.as_ptr() as usize).wrapping_add(tensor.start);
    match address.checked_rem(needed) {
        Some(0) => Ok(()),
        _ => Err(Error::Format {
            file: file.into(),
            at: format!("tensor {}", tensor.name),
            what:
                "does not lie at an aligned address, because the model does not; store it at a multiple of 8 bytes or \
                   open it with `copy`"
                    .into(),
        }),
    }
}
