//! All integration tests, one binary: it links once, and a test is found by its module.
//!
//! | module | what it holds | needs |
//! | --- | --- | --- |
//! | `layers` | imports, `unsafe`, file sizes | nothing |
//! | `docs` | commands and links in the documents | nothing |
//! | `cli` | what the program prints and how it fails | smollm2 |
//! | `full_disk` | disks without room: errors, what stays whole, going on | root, to mount one |
//! | `full_training` | a model from nothing, and trained models and adapters as files | nothing |
//! | `gguf_real` | headers of the real models | the three models |
//! | `quant_parity` | block formats against ggml | `oracle` |
//! | `tokenizer_parity` | token ids against llama.cpp | `oracle`, the three models |
//! | `logits_parity` | logits and greedy text against llama.cpp | `oracle`, the three models |
//! | `tiny_parity` | logits of random models of every architecture and type against llama.cpp | `oracle` |
//! | `adapter_parity` | logits of models with adapters against llama.cpp | `oracle` |
//! | `gradients` | gradients of tiny models against a decoder in double precision | nothing |
//! | `learning` | gradients of adapters against torch | smollm2 |
//! | `peft_gradients` | gradients of LoRA and DoRA against PEFT | nothing |
//! | `peft_loads` | logits of PEFT with adapters that we write | nothing; `KINGLET_PEFT=python3` asks PEFT anew |
//! | `training` | the training loop: learning, interruptions, preferences, refusals | nothing |
//! | `training_memory` | planned memory of trainings against what they take | smollm2; the others with `KINGLET_HEAVY=1` |
//! | `perplexity` | perplexity of the handbook | smollm2; the others with `KINGLET_HEAVY=1` |

#[cfg(feature = "oracle")]
mod adapter_parity;
mod cli;
mod docs;
mod full_disk;
mod full_training;
mod gguf_real;
mod gpu;
mod gpu_divided;
mod gpu_division;
mod gpu_import;
mod gpu_kv;
mod gpu_largest;
mod gpu_life;
mod gpu_training;
mod gradients;
mod layers;
mod learning;
#[cfg(feature = "oracle")]
mod logits_parity;
mod peft_gradients;
mod peft_loads;
mod perplexity;
#[cfg(feature = "oracle")]
mod quant_parity;
#[cfg(feature = "oracle")]
mod tiny_parity;
#[cfg(feature = "oracle")]
mod tokenizer_parity;
mod training;
#[cfg(target_os = "linux")]
mod training_memory;
