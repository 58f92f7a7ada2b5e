//! Text to tokens and back.

use std::ffi::{c_char, c_void};

use kinglet_engine::text::EncodeOptions;

use crate::args;
use crate::fence::{Failure, KINGLET_ERR_UNSUPPORTED, Outcome, fence, kinglet_error, kinglet_status};
use crate::model::kinglet_model;

/// Put the tokens around the text that the model asks for (BOS, EOS).
pub const KINGLET_TOKENIZE_SPECIAL: u32 = 1;
/// Read the text of control tokens as these tokens: for text of the program's, not of people.
pub const KINGLET_TOKENIZE_CONTROL: u32 = 2;
/// Write the text of control tokens, which otherwise have none.
pub const KINGLET_DETOKENIZE_CONTROL: u32 = 1;

fn check_flags(flags: u32, known: u32) -> Outcome<()> {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Failure::new(KINGLET_ERR_UNSUPPORTED, format!("the flags {unknown:#x} are not known"))),
    }
}

/// The tokens of `length` bytes of text.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_tokenize(
    model: *const kinglet_model,
    text: *const c_char,
    length: usize,
    flags: u32,
    out: *mut i32,
    capacity: usize,
    count: *mut usize,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let tokenizer = args::handle(model, "model")?.model.tokenizer();
            let text = args::array(text.cast::<u8>(), length, "text")?;
            check_flags(flags, KINGLET_TOKENIZE_SPECIAL | KINGLET_TOKENIZE_CONTROL)?;
            let options = EncodeOptions {
                add_special: flags & KINGLET_TOKENIZE_SPECIAL != 0,
                parse_special: flags & KINGLET_TOKENIZE_CONTROL != 0,
            };
            args::give_array(&args::ids(&tokenizer.encode_bytes(text, options)), out, capacity, count)
        })
    }
}

/// The text of tokens: whole UTF-8, with U+FFFD for what is none. No NUL is added.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_detokenize(
    model: *const kinglet_model,
    tokens: *const i32,
    n_tokens: usize,
    flags: u32,
    out: *mut c_char,
    capacity: usize,
    length: *mut usize,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let tokenizer = args::handle(model, "model")?.model.tokenizer();
            let tokens = args::tokens(args::array(tokens, n_tokens, "tokens")?)?;
            check_flags(flags, KINGLET_DETOKENIZE_CONTROL)?;
            if let Some(id) = tokens.iter().find(|id| tokenizer.token_bytes(**id, false).is_none()) {
                return Err(unknown_token(*id, tokenizer.vocab_size()));
            }
            let bytes = tokenizer.decode(&tokens, flags & KINGLET_DETOKENIZE_CONTROL != 0);
            args::give_array(String::from_utf8_lossy(&bytes).as_bytes(), out.cast(), capacity, length)
        })
    }
}

/// The bytes that one token stands for, which need not be whole UTF-8.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_token_bytes(
    model: *const kinglet_model,
    token: i32,
    flags: u32,
    out: *mut c_void,
    capacity: usize,
    length: *mut usize,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let tokenizer = args::handle(model, "model")?.model.tokenizer();
            check_flags(flags, KINGLET_DETOKENIZE_CONTROL)?;
            let id = u32::try_from(token).unwrap_or(u32::MAX);
            let bytes = tokenizer
                .token_bytes(id, flags & KINGLET_DETOKENIZE_CONTROL != 0)
                .ok_or_else(|| unknown_token(token, tokenizer.vocab_size()))?;
            args::give_array(bytes, out.cast(), capacity, length)
        })
    }
}

fn unknown_token(id: impl std::fmt::Display, vocab: usize) -> Failure {
    Failure::argument(format!("there is no token {id}; the vocabulary has the tokens 0 to {}", vocab.saturating_sub(1)))
}
