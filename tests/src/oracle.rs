//! llama.cpp as the oracle: a safe wrapper over the parts of `llama.h` and `ggml.h` the parity tests compare with.
//!
//! Nothing here is a measure of speed; that is what `benches` is for. The wrapper is quiet (llama.cpp's log is thrown
//! away), owns what it loads, and checks sizes itself, because ggml answers a wrong argument by aborting the process.
//! Types are named by their ggml id, the number GGUF files carry, so that this file needs nothing of Kinglet.
//!
//! This is the only file of the crate with `unsafe` in it.

use std::ffi::{CStr, CString, c_char, c_void};
use std::marker::PhantomData;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use llama_cpp_sys_2 as sys;

/// Initialises the library once per process and silences it.
fn init() {
    unsafe extern "C" fn discard(_: sys::ggml_log_level, _: *const c_char, _: *mut c_void) {}
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        // SAFETY: called once, before any other function of the library; `discard` has the type it asks for and
        // outlives the process.
        unsafe {
            sys::llama_log_set(Some(discard), std::ptr::null_mut());
            sys::llama_backend_init();
            sys::ggml_cpu_init();
        }
    });
}

/// Loading a model and making a context touch state that llama.cpp does not guard.
fn construction() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The instruction sets the library was built for, in its own words.
pub fn system_info() -> String {
    init();
    let _guard = construction();
    // SAFETY: returns a NUL-terminated string owned by the library, rewritten only by the same call; we hold the lock.
    unsafe { CStr::from_ptr(sys::llama_print_system_info()) }.to_string_lossy().into_owned()
}

/// A model file loaded by llama.cpp.
pub struct Model {
    model: NonNull<sys::llama_model>,
}

// SAFETY: a loaded model is immutable; tokenizing is documented as thread-safe, and making contexts takes our lock.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

impl Model {
    /// Loads weights and vocabulary.
    pub fn load(path: impl AsRef<Path>) -> Result<Model, String> {
        Self::load_with(path.as_ref(), false)
    }

    /// Loads the vocabulary only: quick, and enough to tokenize.
    pub fn load_vocabulary(path: impl AsRef<Path>) -> Result<Model, String> {
        Self::load_with(path.as_ref(), true)
    }

    fn load_with(path: &Path, vocab_only: bool) -> Result<Model, String> {
        init();
        let name = CString::new(path.to_string_lossy().as_bytes()).map_err(|e| e.to_string())?;
        let _guard = construction();
        // SAFETY: the parameters are the library's defaults but for one flag; `name` lives until the call returns.
        let model = unsafe {
            let mut params = sys::llama_model_default_params();
            params.vocab_only = vocab_only;
            params.n_gpu_layers = 0;
            sys::llama_model_load_from_file(name.as_ptr(), params)
        };
        let model = NonNull::new(model).ok_or_else(|| format!("llama.cpp cannot load {}", path.display()))?;
        Ok(Model { model })
    }

    fn vocab(&self) -> *const sys::llama_vocab {
        // SAFETY: the model is alive as long as `self`.
        unsafe { sys::llama_model_get_vocab(self.model.as_ptr()) }
    }

    /// Number of tokens in the vocabulary, and so of logits.
    pub fn vocab_size(&self) -> usize {
        // SAFETY: the vocabulary belongs to the model, which is alive.
        unsafe { sys::llama_vocab_n_tokens(self.vocab()) as usize }
    }

    /// Token ids of `text`, which need not be valid UTF-8.
    pub fn tokenize(&self, text: &[u8], add_special: bool, parse_special: bool) -> Vec<u32> {
        let length = i32::try_from(text.len()).expect("test strings are short");
        let mut tokens = vec![0i32; text.len() + 8];
        loop {
            let room = tokens.len() as i32;
            // SAFETY: `text` and `tokens` are valid for the lengths passed; the library writes at most `room` tokens.
            let n = unsafe {
                sys::llama_tokenize(
                    self.vocab(),
                    text.as_ptr().cast(),
                    length,
                    tokens.as_mut_ptr(),
                    room,
                    add_special,
                    parse_special,
                )
            };
            if n >= 0 {
                tokens.truncate(n as usize);
                return tokens.into_iter().map(|id| id as u32).collect();
            }
            tokens.resize(n.unsigned_abs() as usize, 0);
        }
    }

    /// The bytes token `id` stands for; control tokens are empty unless `special`.
    pub fn piece(&self, id: u32, special: bool) -> Vec<u8> {
        assert!((id as usize) < self.vocab_size(), "token {id} is not in the vocabulary");
        let mut bytes = vec![0u8; 64];
        loop {
            // SAFETY: `bytes` is valid for its length, and the id was checked.
            let n = unsafe {
                let (to, room) = (bytes.as_mut_ptr().cast(), bytes.len() as i32);
                sys::llama_token_to_piece(self.vocab(), id as i32, to, room, 0, special)
            };
            if n >= 0 {
                bytes.truncate(n as usize);
                return bytes;
            }
            bytes.resize(n.unsigned_abs() as usize, 0);
        }
    }

    /// Whether generation stops at token `id`.
    pub fn is_end_of_generation(&self, id: u32) -> bool {
        assert!((id as usize) < self.vocab_size(), "token {id} is not in the vocabulary");
        // SAFETY: the id was checked, the vocabulary is alive.
        unsafe { sys::llama_vocab_is_eog(self.vocab(), id as i32) }
    }

    /// Loads the LoRA adapter in the GGUF file at `path`; it is freed with the model.
    pub fn adapter(&self, path: impl AsRef<Path>) -> Result<Adapter<'_>, String> {
        let path = path.as_ref();
        let name = CString::new(path.to_string_lossy().as_bytes()).map_err(|e| e.to_string())?;
        let _guard = construction();
        // SAFETY: the model is alive, `name` lives until the call returns; the lock keeps changes of the model's list of
        // adapters apart.
        let adapter = unsafe { sys::llama_adapter_lora_init(self.model.as_ptr(), name.as_ptr()) };
        let adapter = NonNull::new(adapter).ok_or_else(|| format!("llama.cpp cannot load {}", path.display()))?;
        Ok(Adapter { adapter, model: PhantomData })
    }

    /// A context for `options.context` tokens.
    pub fn context(&self, options: ContextOptions) -> Result<Context<'_>, String> {
        let _guard = construction();
        // SAFETY: the parameters are the library's defaults but for plain numbers; the lock keeps constructions apart.
        let context = unsafe {
            let mut params = sys::llama_context_default_params();
            params.n_ctx = options.context;
            params.n_batch = options.context;
            params.n_ubatch = options.context.min(512);
            params.n_threads = options.threads;
            params.n_threads_batch = options.threads;
            params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_DISABLED;
            params.no_perf = true;
            let cache = if options.f16_cache { sys::GGML_TYPE_F16 } else { sys::GGML_TYPE_F32 };
            params.type_k = cache;
            params.type_v = cache;
            sys::llama_init_from_model(self.model.as_ptr(), params)
        };
        let context = NonNull::new(context).ok_or("llama.cpp cannot make a context")?;
        Ok(Context { context, options, vocab: self.vocab_size(), used: 0, model: PhantomData })
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: contexts borrow the model, so none is left.
        unsafe { sys::llama_model_free(self.model.as_ptr()) }
    }
}

/// A LoRA adapter of a model.
pub struct Adapter<'a> {
    adapter: NonNull<sys::llama_adapter_lora>,
    model: PhantomData<&'a Model>,
}

/// How a context computes.
#[derive(Clone, Copy, Debug)]
pub struct ContextOptions {
    /// Tokens the cache holds.
    pub context: u32,
    /// Threads.
    pub threads: i32,
    /// Keys and values in 16 bits, llama.cpp's default; else in 32, which takes one rounding out of a comparison.
    pub f16_cache: bool,
}

impl Default for ContextOptions {
    fn default() -> Self {
        ContextOptions { context: 512, threads: 2, f16_cache: true }
    }
}

/// A cache and the buffers to compute with.
pub struct Context<'a> {
    context: NonNull<sys::llama_context>,
    options: ContextOptions,
    vocab: usize,
    used: usize,
    model: PhantomData<&'a Model>,
}

impl<'a> Context<'a> {
    /// Applies `adapters`, each times its factor, in place of those before.
    pub fn set_adapters(&mut self, adapters: &[(&Adapter<'a>, f32)]) -> Result<(), String> {
        let mut pointers: Vec<_> = adapters.iter().map(|(a, _)| a.adapter.as_ptr()).collect();
        let mut scales: Vec<f32> = adapters.iter().map(|(_, scale)| *scale).collect();
        // SAFETY: both arrays have as many entries as is said; the adapters belong to the context's model by their
        // lifetime and are freed with it.
        let status = unsafe {
            let (pointers, scales) = (pointers.as_mut_ptr(), scales.as_mut_ptr());
            sys::llama_set_adapters_lora(self.context.as_ptr(), pointers, adapters.len(), scales)
        };
        if status == 0 { Ok(()) } else { Err(format!("llama_set_adapters_lora returned {status}")) }
    }

    /// Empties the cache.
    pub fn clear(&mut self) {
        self.used = 0;
        // SAFETY: the context is alive; its memory belongs to it.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.context.as_ptr()), true) }
    }

    /// Logits after every one of `tokens`, from an empty cache: `tokens.len()` rows of `vocab_size` values.
    pub fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, String> {
        self.clear();
        self.decode(tokens, true)
    }

    /// Feeds `tokens` after what the cache holds; logits after the last one.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<Vec<f32>, String> {
        self.decode(tokens, false)
    }

    fn decode(&mut self, tokens: &[u32], all: bool) -> Result<Vec<f32>, String> {
        if tokens.is_empty() || self.used + tokens.len() > self.options.context as usize {
            return Err(format!("{} tokens do not fit after {}", tokens.len(), self.used));
        }
        if let Some(id) = tokens.iter().find(|id| **id as usize >= self.vocab) {
            return Err(format!("token {id} is not in the vocabulary"));
        }
        let n = tokens.len();
        let rows = if all { n } else { 1 };
        // SAFETY: the batch is made for `n` tokens of one sequence, so each of its arrays has `n` entries and each
        // entry of `seq_id` one; all are written before use. Logits are read before the next call, `rows` rows of
        // `vocab` values, which is what the library stores when that many tokens ask for output.
        let result = unsafe {
            let mut batch = sys::llama_batch_init(n as i32, 0, 1);
            for (i, &id) in tokens.iter().enumerate() {
                *batch.token.add(i) = id as i32;
                *batch.pos.add(i) = (self.used + i) as i32;
                *batch.n_seq_id.add(i) = 1;
                **batch.seq_id.add(i) = 0;
                *batch.logits.add(i) = i8::from(all || i + 1 == n);
            }
            batch.n_tokens = n as i32;
            let status = sys::llama_decode(self.context.as_ptr(), batch);
            let logits = sys::llama_get_logits(self.context.as_ptr());
            sys::llama_batch_free(batch);
            if status == 0 && !logits.is_null() {
                Ok(std::slice::from_raw_parts(logits, rows * self.vocab).to_vec())
            } else {
                Err(format!("llama_decode returned {status}"))
            }
        };
        self.used += n;
        result
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `llama_init_from_model`, freed once.
        unsafe { sys::llama_free(self.context.as_ptr()) }
    }
}

/// What ggml knows about one tensor type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TypeInfo {
    /// Values in a block.
    pub block_len: usize,
    /// Bytes in a block.
    pub block_bytes: usize,
}

fn traits(id: u32) -> &'static sys::ggml_type_traits {
    init();
    assert!(id < sys::GGML_TYPE_COUNT, "ggml has no type {id}");
    // SAFETY: the id is in range, and the table is static.
    unsafe { &*sys::ggml_get_type_traits(id as sys::ggml_type) }
}

/// Block size of type `id`.
pub fn type_info(id: u32) -> TypeInfo {
    let traits = traits(id);
    TypeInfo { block_len: traits.blck_size as usize, block_bytes: traits.type_size }
}

fn row_bytes(id: u32, width: usize) -> usize {
    let info = type_info(id);
    assert_eq!(width % info.block_len, 0, "a row is a whole number of blocks");
    width / info.block_len * info.block_bytes
}

/// `values` (rows of `width`) as ggml quantizes them to type `id`, without an importance matrix.
pub fn quantize(id: u32, values: &[f32], width: usize) -> Vec<u8> {
    let rows = values.len() / width;
    assert_eq!(rows * width, values.len(), "whole rows");
    let mut bytes = vec![0u8; row_bytes(id, width) * rows];
    // SAFETY: `bytes` has exactly the room of `rows` rows, `values` holds `rows * width` values; the type exists
    // (`row_bytes` looked it up) and needs no importance matrix.
    unsafe {
        let id = id as sys::ggml_type;
        assert!(!sys::ggml_quantize_requires_imatrix(id), "type {id} needs an importance matrix");
        let (from, to) = (values.as_ptr(), bytes.as_mut_ptr().cast());
        let written = sys::ggml_quantize_chunk(id, from, to, 0, rows as i64, width as i64, std::ptr::null());
        assert_eq!(written, bytes.len());
    }
    bytes
}

/// The values of `bytes`, whole blocks of type `id`, as ggml reads them; `None` for a type it has no reader for.
pub fn dequantize(id: u32, bytes: &[u8]) -> Option<Vec<f32>> {
    let info = type_info(id);
    assert_eq!(bytes.len() % info.block_bytes, 0, "whole blocks");
    let mut values = vec![0f32; bytes.len() / info.block_bytes * info.block_len];
    let to_float = traits(id).to_float?;
    // ggml reads 16-bit fields through aligned pointers.
    let aligned = Aligned::new(bytes);
    // SAFETY: `aligned` holds the blocks and `values` has room for exactly their values.
    unsafe { to_float(aligned.as_ptr(), values.as_mut_ptr(), values.len() as i64) };
    Some(values)
}

/// The dot product of one row of type `id` with `x`, as ggml's CPU backend computes it: `x` is first quantized to the
/// type the kernel wants. `None` for a type without a kernel.
pub fn dot(id: u32, row: &[u8], x: &[f32]) -> Option<f32> {
    assert_eq!(row_bytes(id, x.len()), row.len(), "the row and x have the same width");
    // SAFETY: `row_bytes` checked the id; the table is static.
    let cpu = unsafe { &*sys::ggml_get_type_traits_cpu(id as sys::ggml_type) };
    let vec_dot = cpu.vec_dot?;
    let activation = cpu.vec_dot_type;
    let x_bytes = if activation == sys::GGML_TYPE_F32 {
        x.iter().flat_map(|v| v.to_ne_bytes()).collect()
    } else {
        let mut bytes = vec![0u8; row_bytes(activation as u32, x.len())];
        // SAFETY: as above.
        let from_float = unsafe { &*sys::ggml_get_type_traits_cpu(activation) }.from_float?;
        // SAFETY: `bytes` has the room of one row of `x.len()` values.
        unsafe { from_float(x.as_ptr(), bytes.as_mut_ptr().cast(), x.len() as i64) };
        bytes
    };
    let (row, x_row) = (Aligned::new(row), Aligned::new(&x_bytes));
    let mut result = 0f32;
    // SAFETY: both rows hold `x.len()` values of the types the kernel reads; strides are unused for one row.
    unsafe { vec_dot(x.len() as i32, &mut result, 0, row.as_ptr(), 0, x_row.as_ptr(), 0, 1) };
    Some(result)
}

/// Bytes at an address that is a multiple of 8.
struct Aligned(Vec<u64>);

impl Aligned {
    fn new(bytes: &[u8]) -> Aligned {
        let mut words = Vec::with_capacity(bytes.len().div_ceil(8));
        for chunk in bytes.chunks(8) {
            let mut word = [0u8; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            words.push(u64::from_ne_bytes(word));
        }
        Aligned(words)
    }

    fn as_ptr(&self) -> *const c_void {
        self.0.as_ptr().cast()
    }
}
