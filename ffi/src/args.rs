//! What C passes, made safe: strings, arrays, handles, structs that carry their size; and results on the way back.
//!
//! A NULL or misaligned pointer is an error that names the argument. What cannot be checked (that a pointer points to what
//! the header says) is the caller's promise, and stands as `# Safety` on every function here.

use std::ffi::{CStr, CString, c_char};
use std::mem;
use std::ptr;
use std::sync::Arc;

use serde::Serialize;

use crate::fence::{Failure, KINGLET_ERR_ABI, KINGLET_ERR_TOO_SMALL, KINGLET_OK, Outcome, kinglet_status};

/// Structs of later versions may be longer; longer than this is memory that was never filled in.
const LONGEST_STRUCT: usize = 4096;

/// A struct of the ABI: `struct_size` first, then fields for which zero is the default; later versions only append.
///
/// # Safety
/// The type is `repr(C)`, begins with a `u32`, and all zeros is a value of it.
pub unsafe trait Versioned: Copy {
    /// The name in the header.
    const NAME: &'static str;
}

/// All fields zero.
pub fn zeroed<T: Versioned>() -> T {
    // SAFETY: the trait says that all zeros is a value.
    unsafe { mem::zeroed() }
}

/// The size that the caller's struct says it has, checked.
///
/// # Safety
/// `from` points to a struct of the caller's.
unsafe fn size_of_callers<T: Versioned>(from: *const T) -> Outcome<usize> {
    // SAFETY: the struct begins with its size.
    let size = unsafe { from.cast::<u32>().read_unaligned() } as usize;
    let name = T::NAME;
    if size < 2 * mem::size_of::<u32>() {
        let what = format!("{name}.struct_size is {size}; set it to sizeof({name})");
        return Err(Failure::new(KINGLET_ERR_ABI, what));
    }
    if !size.is_multiple_of(mem::align_of::<T>()) {
        // It would cut a field in two, and half a pointer points anywhere.
        let what = format!("{name}.struct_size is {size}, which no version has; set it to sizeof({name})");
        return Err(Failure::new(KINGLET_ERR_ABI, what));
    }
    if size > LONGEST_STRUCT {
        let what = format!("{name}.struct_size is {size}, which no version has; fill the struct with zeros first");
        return Err(Failure::new(KINGLET_ERR_ABI, what));
    }
    Ok(size)
}

/// The caller's struct, in the version this library knows; the default for NULL.
///
/// # Safety
/// `from` is NULL or points to `struct_size` bytes.
pub unsafe fn read<T: Versioned>(from: *const T) -> Outcome<T> {
    let mut value = zeroed::<T>();
    if from.is_null() {
        return Ok(value);
    }
    // SAFETY: passed on.
    let (size, known) = (unsafe { size_of_callers(from)? }, mem::size_of::<T>());
    let bytes = from.cast::<u8>();
    for at in known..size {
        // SAFETY: within the caller's `struct_size` bytes.
        if unsafe { bytes.add(at).read() } != 0 {
            let what = format!(
                "{} sets a field at byte {at} that this library (version {}) does not know; update the library or leave it 0",
                T::NAME,
                env!("CARGO_PKG_VERSION")
            );
            return Err(Failure::new(KINGLET_ERR_ABI, what));
        }
    }
    // SAFETY: both are at least as long; any bytes of the caller's are values, since every field is a number or a pointer.
    unsafe { bytes.copy_to_nonoverlapping((&raw mut value).cast(), size.min(known)) };
    Ok(value)
}

/// Checks that the caller's struct can take a result.
///
/// # Safety
/// `to` is NULL or points to `struct_size` bytes.
pub unsafe fn check_out<T: Versioned>(to: *mut T) -> Outcome<()> {
    if to.is_null() {
        return Err(Failure::argument(format!("the {} is NULL", T::NAME)));
    }
    // SAFETY: passed on.
    unsafe { size_of_callers(to) }.map(|_| ())
}

/// Writes into the caller's struct as much as its version has; `struct_size` stays.
///
/// # Safety
/// As [`check_out`], and nobody else uses the struct meanwhile.
pub unsafe fn write<T: Versioned>(to: *mut T, value: &T) -> Outcome<()> {
    // SAFETY: passed on.
    unsafe {
        check_out(to)?;
        let size = size_of_callers(to)?.min(mem::size_of::<T>());
        let head = mem::size_of::<u32>();
        let from = ptr::from_ref(value).cast::<u8>().add(head);
        to.cast::<u8>().add(head).copy_from_nonoverlapping(from, size - head);
    }
    Ok(())
}

/// The caller's text.
///
/// # Safety
/// `text` is NULL or a NUL-terminated string that lives as long as the result is used.
pub unsafe fn text<'a>(text: *const c_char, name: &str) -> Outcome<&'a str> {
    if text.is_null() {
        return Err(Failure::argument(format!("{name} is NULL")));
    }
    // SAFETY: not NULL, and the caller's promise otherwise.
    let bytes = unsafe { CStr::from_ptr(text) };
    bytes.to_str().map_err(|e| Failure::argument(format!("{name} is not UTF-8: {e}")))
}

/// As [`text()`], with `None` for NULL.
///
/// # Safety
/// As [`text()`].
pub unsafe fn optional_text<'a>(pointer: *const c_char, name: &str) -> Outcome<Option<&'a str>> {
    // SAFETY: passed on.
    if pointer.is_null() { Ok(None) } else { unsafe { text(pointer, name) }.map(Some) }
}

/// The caller's array; any pointer will do for none.
///
/// # Safety
/// `from` points to `len` elements that live, unchanged, as long as the result is used.
pub unsafe fn array<'a, T: Copy>(from: *const T, len: usize, name: &str) -> Outcome<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    if from.is_null() || !from.is_aligned() {
        return Err(Failure::argument(format!("{name} is NULL or misaligned, but {len} elements were announced")));
    }
    if len > isize::MAX as usize / mem::size_of::<T>().max(1) {
        return Err(Failure::argument(format!("{name} is said to have {len} elements, which no memory holds")));
    }
    // SAFETY: not NULL, aligned, of a possible size; the caller's promise otherwise.
    Ok(unsafe { std::slice::from_raw_parts(from, len) })
}

/// The object behind a handle.
///
/// # Safety
/// `handle` is NULL or a handle that is not freed before the result's last use.
pub unsafe fn handle<'a, T>(handle: *const T, name: &str) -> Outcome<&'a T> {
    if handle.is_null() || !handle.is_aligned() {
        return Err(Failure::argument(format!("the {name} is NULL or no handle")));
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { &*handle })
}

/// Another owner of the object behind a handle.
///
/// # Safety
/// As [`handle`]; the handle came from [`give`].
pub unsafe fn share<T>(pointer: *const T, name: &str) -> Outcome<Arc<T>> {
    // SAFETY: checked by `handle`; `give` made it of an `Arc`.
    unsafe {
        handle(pointer, name)?;
        Arc::increment_strong_count(pointer);
        Ok(Arc::from_raw(pointer))
    }
}

/// Gives up one owner of the object behind a handle; NULL is fine.
///
/// # Safety
/// `pointer` is NULL or came from [`give`], and the caller does not use it again.
pub unsafe fn release<T>(pointer: *const T) {
    if !pointer.is_null() {
        // SAFETY: the caller's promise.
        drop(unsafe { Arc::from_raw(pointer) });
    }
}

/// The place for a result, which is NULL until there is one.
///
/// # Safety
/// `out` is NULL or points to a pointer of the caller's.
pub unsafe fn place<T>(out: *mut *mut T, name: &str) -> Outcome<()> {
    if out.is_null() || !out.is_aligned() {
        return Err(Failure::argument(format!("the place for the {name} is NULL")));
    }
    // SAFETY: not NULL, aligned, and the caller's promise otherwise.
    unsafe { out.write(ptr::null_mut()) };
    Ok(())
}

/// Hands an object to the caller.
///
/// # Safety
/// `out` was checked by [`place`].
pub unsafe fn give<T>(out: *mut *mut T, object: T) -> kinglet_status {
    // SAFETY: passed on.
    unsafe { give_shared(out, Arc::new(object)) }
}

/// As [`give`], an object that others may hold too.
///
/// # Safety
/// As [`give`].
pub unsafe fn give_shared<T>(out: *mut *mut T, object: Arc<T>) -> kinglet_status {
    // SAFETY: checked by `place`.
    unsafe { out.write(Arc::into_raw(object).cast_mut()) };
    KINGLET_OK
}

/// Hands a text to the caller, who frees it with `kinglet_string_free`.
///
/// # Safety
/// `out` was checked by [`place`].
pub unsafe fn give_text(out: *mut *mut c_char, text: &str) -> Outcome {
    let text = CString::new(text.replace('\0', "\u{FFFD}")).unwrap_or_default();
    // SAFETY: checked by `place`.
    unsafe { out.write(text.into_raw()) };
    Ok(KINGLET_OK)
}

/// Hands JSON to the caller.
///
/// # Safety
/// `out` was checked by [`place`].
pub unsafe fn give_json(out: *mut *mut c_char, value: &impl Serialize) -> Outcome {
    // SAFETY: passed on.
    unsafe { give_text(out, &serde_json::to_string(value)?) }
}

/// Copies `values` into the caller's array of `capacity` elements and writes their number to `count`, which may be NULL.
///
/// # Errors
/// [`KINGLET_ERR_TOO_SMALL`] where they do not fit; the number is written then too, and no element.
///
/// # Safety
/// `out` points to `capacity` elements (or is NULL for none), `count` to a number.
pub unsafe fn give_array<T: Copy>(values: &[T], out: *mut T, capacity: usize, count: *mut usize) -> Outcome {
    if !count.is_null() {
        // SAFETY: not NULL, and the caller's promise otherwise.
        unsafe { count.write(values.len()) };
    }
    if values.len() > capacity {
        let what = format!("the array holds {capacity} elements, but there are {}", values.len());
        return Err(Failure::new(KINGLET_ERR_TOO_SMALL, what));
    }
    if out.is_null() && !values.is_empty() {
        return Err(Failure::argument("the array is NULL, but it is said to hold elements"));
    }
    if !values.is_empty() {
        // SAFETY: not NULL, long enough; the caller's promise otherwise.
        unsafe { out.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
    }
    Ok(KINGLET_OK)
}

/// A number of things that the caller says, 0 or more.
pub fn count(name: &str, value: i32) -> Outcome<usize> {
    usize::try_from(value).map_err(|_| Failure::argument(format!("{name} is {value}; it must be 0 or more")))
}

/// What the caller turns on with 1 and leaves off with 0.
pub fn switch(name: &str, value: i32) -> Outcome<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Failure::argument(format!("{name} is {value}; it must be 0 or 1"))),
    }
}

/// Token ids as the engine has them.
pub fn tokens(ids: &[i32]) -> Outcome<Vec<u32>> {
    let token = |id: &i32| u32::try_from(*id).map_err(|_| Failure::argument(format!("{id} is no token id")));
    ids.iter().map(token).collect()
}

/// Token ids as C has them.
pub fn ids(tokens: &[u32]) -> Vec<i32> {
    // A vocabulary has fewer than 2³¹ tokens.
    tokens.iter().map(|t| *t as i32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Old {
        struct_size: u32,
        flags: u32,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct New {
        struct_size: u32,
        flags: u32,
        seed: u64,
    }

    // SAFETY: `repr(C)`, a `u32` first, numbers only.
    unsafe impl Versioned for Old {
        const NAME: &'static str = "old";
    }
    // SAFETY: as above.
    unsafe impl Versioned for New {
        const NAME: &'static str = "new";
    }

    #[test]
    fn older_structs_read_with_defaults_and_newer_ones_if_their_tail_is_zero() {
        let old = Old { struct_size: 8, flags: 5 };
        // SAFETY: the struct says its size.
        let read_old = unsafe { read::<New>((&raw const old).cast()) };
        assert_eq!(read_old.unwrap(), New { struct_size: 8, flags: 5, seed: 0 });
        let mut new = New { struct_size: 16, flags: 3, seed: 0 };
        // SAFETY: the struct says its size.
        assert_eq!(unsafe { read::<Old>((&raw const new).cast()) }.unwrap().flags, 3);
        new.seed = 1 << 40;
        // SAFETY: the struct says its size.
        let failure = unsafe { read::<Old>((&raw const new).cast()) }.unwrap_err();
        assert_eq!(failure.code, KINGLET_ERR_ABI);
        assert!(failure.message.contains("byte 13"), "{}", failure.message);
        // SAFETY: NULL is the default.
        assert_eq!(unsafe { read::<New>(ptr::null()) }.unwrap().flags, 0);
    }

    #[test]
    fn a_result_is_cut_to_the_callers_version_and_sizes_must_be_set() {
        let value = New { struct_size: 0, flags: 9, seed: 7 };
        let mut all = New { struct_size: 8, flags: 0, seed: 1 };
        // SAFETY: the struct has at least the size it says.
        unsafe { write(&mut all, &value) }.unwrap();
        assert_eq!(all, New { struct_size: 8, flags: 9, seed: 1 });
        for size in [0, 4, 9, 12, 1 << 20] {
            let mut bad = New { struct_size: size, flags: 0, seed: 0 };
            // SAFETY: refused before anything behind the size is touched.
            assert_eq!(unsafe { write(&mut bad, &value) }.unwrap_err().code, KINGLET_ERR_ABI);
            // SAFETY: as above.
            assert_eq!(unsafe { read(&bad) }.unwrap_err().code, KINGLET_ERR_ABI);
        }
    }

    #[test]
    fn too_small_an_array_learns_how_long_it_must_be() {
        let (mut out, mut count) = ([0u8; 2], 0);
        // SAFETY: the array is as long as it says.
        let failure = unsafe { give_array(&[1, 2, 3], out.as_mut_ptr(), 2, &mut count) }.unwrap_err();
        assert_eq!((failure.code, count, out), (KINGLET_ERR_TOO_SMALL, 3, [0, 0]));
        // SAFETY: as above.
        unsafe { give_array(&[1, 2], out.as_mut_ptr(), 2, &mut count) }.unwrap();
        assert_eq!((count, out), (2, [1, 2]));
    }
}
