//! llama.cpp as a contender, through the crate `llama-cpp-2`.
//!
//! Settings that are worth a choice (threads, flash attention) are fields; the benchmark tries them and takes the best
//! for each shape. The rest is llama.cpp's default: mapped file, 16-bit cache, micro-batches of 512, weights repacked
//! at load where it has a repacked kernel.

use std::ffi::CStr;
use std::num::NonZeroU32;
use std::path::Path;

use anyhow::Context;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;

use crate::contender::Contender;

/// The library, initialised and silent, with one model.
pub struct Peer {
    backend: LlamaBackend,
    model: LlamaModel,
}

/// What may be chosen per run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Threads for both prefill and decode.
    pub threads: usize,
    /// Flash attention on or off.
    pub flash_attention: bool,
}

impl Settings {
    /// `2 threads, flash attention off`.
    pub fn label(self) -> String {
        let plural = if self.threads == 1 { "thread" } else { "threads" };
        format!("{} {plural}, flash attention {}", self.threads, if self.flash_attention { "on" } else { "off" })
    }
}

/// Denies this process, its threads and its children the matrix unit (AMX), so that two engines are compared on AVX-512: whoever asks
/// Linux for the unit, as both do, hears that it is not permitted. To be called before there are threads.
///
/// # Errors
/// Where the system takes no filter for system calls.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub fn without_matrix_unit() -> std::io::Result<()> {
    const ARCH_REQ_XCOMP_PERM: u32 = 0x1023;
    let load = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    let equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let give = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    // Of `struct seccomp_data`: the call's number at byte 0, its first argument at byte 16.
    let mut filter = [
        step(load, 0, 0, 0),
        step(equal, libc::SYS_arch_prctl as u32, 0, 3),
        step(load, 16, 0, 0),
        step(equal, ARCH_REQ_XCOMP_PERM, 0, 1),
        step(give, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32, 0, 0),
        step(give, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which lives until then.
    let set = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) == 0
    };
    if set { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// There is none to deny.
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub fn without_matrix_unit() -> std::io::Result<()> {
    Ok(())
}

impl Peer {
    /// Maps the model at `path`. One per process: llama.cpp has global state.
    pub fn open(path: &Path) -> anyhow::Result<Peer> {
        let mut backend = LlamaBackend::init()?;
        backend.void_logs();
        let model = LlamaModel::load_from_file(&backend, path, &LlamaModelParams::default())
            .with_context(|| format!("llama.cpp cannot load {}", path.display()))?;
        Ok(Peer { backend, model })
    }

    /// A context for `context` tokens.
    pub fn contender(&self, settings: Settings, context: usize) -> anyhow::Result<PeerContender<'_>> {
        let threads = i32::try_from(settings.threads)?;
        let params = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(u32::try_from(context)?))
            .with_n_batch(u32::try_from(context)?)
            .with_n_threads(threads)
            .with_n_threads_batch(threads)
            .with_flash_attention_policy(i32::from(settings.flash_attention));
        let context = self.model.new_context(&self.backend, params)?;
        Ok(PeerContender { context, settings, vocabulary: self.model.n_vocab() as usize })
    }

    /// The instruction sets this build of llama.cpp was compiled for, as it reports them.
    pub fn features() -> String {
        // SAFETY: returns a pointer to a static, NUL-terminated string; called from one thread.
        let text = unsafe { CStr::from_ptr(llama_cpp_sys_2::llama_print_system_info()) };
        text.to_string_lossy().trim().trim_end_matches('|').trim().to_owned()
    }

    /// Instruction sets the CPU has and this build of llama.cpp leaves unused: not empty means an unfair comparison.
    pub fn missing_features() -> Vec<&'static str> {
        let built = Self::features();
        let has = |name: &str| built.contains(&format!("{name} = 1"));
        let mut missing = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let cpu = [
                ("AVX2", std::is_x86_feature_detected!("avx2")),
                ("FMA", std::is_x86_feature_detected!("fma")),
                ("F16C", std::is_x86_feature_detected!("f16c")),
                ("AVX512", std::is_x86_feature_detected!("avx512f")),
                ("AVX512_VNNI", std::is_x86_feature_detected!("avx512vnni")),
                ("AVX512_BF16", std::is_x86_feature_detected!("avx512bf16")),
                ("AVX_VNNI", std::is_x86_feature_detected!("avxvnni")),
            ];
            missing.extend(cpu.into_iter().filter(|(name, present)| *present && !has(name)).map(|(name, _)| name));
        }
        #[cfg(target_arch = "aarch64")]
        {
            let cpu = [
                ("DOTPROD", std::arch::is_aarch64_feature_detected!("dotprod")),
                ("MATMUL_INT8", std::arch::is_aarch64_feature_detected!("i8mm")),
            ];
            missing.extend(cpu.into_iter().filter(|(name, present)| *present && !has(name)).map(|(name, _)| name));
        }
        missing
    }
}

/// One context of the peer.
pub struct PeerContender<'a> {
    context: LlamaContext<'a>,
    settings: Settings,
    vocabulary: usize,
}

impl Contender for PeerContender<'_> {
    fn name(&self) -> String {
        format!("llama.cpp ({})", self.settings.label())
    }

    fn reset(&mut self) -> anyhow::Result<()> {
        self.context.clear_kv_cache();
        Ok(())
    }

    fn feed(&mut self, tokens: &[u32]) -> anyhow::Result<()> {
        let tokens: Vec<LlamaToken> = tokens.iter().map(|&id| LlamaToken(id as i32)).collect();
        self.context.decode(&mut LlamaBatch::get_one(&tokens)?)?;
        self.context.synchronize();
        Ok(())
    }

    fn vocabulary(&self) -> usize {
        self.vocabulary
    }
}
