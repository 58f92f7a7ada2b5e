//! The metadata table: keys to typed values, in the file's order.
//!
//! Getters come in pairs. `u32(key)` fails where the key is missing, `opt_u32(key)` gives `None`; both fail where the
//! value has another type, with a message that names the file and the key. Converters disagree on integer widths, so
//! integers convert between widths and signs as long as the value is kept.

use std::collections::HashMap;

use super::value::{Array, Value};
use crate::{Error, Result};

/// Keys and values of a model file, in the file's order.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    file: String,
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

/// The pair of getters for one type.
macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident, $opt:ident: $type:ty, $wanted:literal, |$v:ident| $convert:expr;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Errors
            /// [`Error::Format`] where the key is missing or has another type.
            pub fn $name(&self, key: &str) -> Result<$type> {
                self.$opt(key)?.ok_or_else(|| self.missing(key, $wanted))
            }

            $(#[$doc])*
            /// `None` where the key is missing.
            ///
            /// # Errors
            /// [`Error::Format`] where the value has another type.
            pub fn $opt(&self, key: &str) -> Result<Option<$type>> {
                match self.get(key) {
                    None => Ok(None),
                    Some($v) => match $convert {
                        Some(converted) => Ok(Some(converted)),
                        None => Err(self.mistyped(key, $v, $wanted)),
                    },
                }
            }
        )*
    };
}

impl Metadata {
    /// An empty table; `file` is the name used in messages.
    pub fn new(file: impl Into<String>) -> Metadata {
        Metadata { file: file.into(), ..Metadata::default() }
    }

    /// Puts `value` under `key`: in place where the key is there already, else at the end.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        let value = value.into();
        match self.index.get(key).and_then(|&i| self.entries.get_mut(i)) {
            Some(entry) => entry.1 = value,
            None => {
                self.index.insert(key.into(), self.entries.len());
                self.entries.push((key.into(), value));
            }
        }
    }

    /// Takes `key` out, keeping the order of the others.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let at = self.index.remove(key)?;
        let (_, value) = self.entries.remove(at);
        self.index.values_mut().filter(|i| **i > at).for_each(|i| *i = i.saturating_sub(1));
        Some(value)
    }

    /// The value under `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).and_then(|&i| self.entries.get(i)).map(|(_, v)| v)
    }

    /// Whether `key` is there.
    pub fn contains(&self, key: &str) -> bool {
        self.index.contains_key(key)
    }

    /// Keys and values in the file's order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The name of the file, for messages.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// An [`Error::Format`] at `key`: for readers of the metadata that find a value out of its range.
    pub fn error(&self, key: &str, what: impl Into<String>) -> Error {
        Error::Format { file: self.file.clone(), at: format!("key {key}"), what: what.into() }
    }

    getters! {
        /// The text under `key`.
        str, opt_str: &str, "a string", |v| v.as_str();
        /// The integer under `key`, whatever its width, as `u32`.
        u32, opt_u32: u32, "an integer from 0 to 4294967295", |v| v.as_int().and_then(|i| i.try_into().ok());
        /// The integer under `key`, whatever its width, as `u64`.
        u64, opt_u64: u64, "an integer that is not negative", |v| v.as_int().and_then(|i| i.try_into().ok());
        /// The integer under `key`, whatever its width, as `i32`.
        i32, opt_i32: i32, "an integer of 32 bits", |v| v.as_int().and_then(|i| i.try_into().ok());
        /// The float under `key`, rounded to `f32`.
        f32, opt_f32: f32, "a float", |v| v.as_f32();
        /// The boolean under `key`.
        bool, opt_bool: bool, "a boolean", |v| if let Value::Bool(b) = v { Some(*b) } else { None };
        /// The array of strings under `key`.
        strings, opt_strings: &[String], "an array of strings",
            |v| if let Value::Array(Array::String(s)) = v { Some(s.as_slice()) } else { None };
        /// The array of floats under `key`, rounded to `f32`.
        f32s, opt_f32s: Vec<f32>, "an array of floats", |v| v.as_array().and_then(Array::to_f32s);
        /// The array of integers under `key`, whatever their width, as `i32`.
        i32s, opt_i32s: Vec<i32>, "an array of integers of 32 bits", |v| v.as_array().and_then(Array::to_ints);
        /// The array of integers under `key`, whatever their width, as `u32`.
        u32s, opt_u32s: Vec<u32>, "an array of integers from 0 to 4294967295",
            |v| v.as_array().and_then(Array::to_ints);
        /// The array of booleans under `key`.
        bools, opt_bools: Vec<bool>, "an array of booleans",
            |v| if let Value::Array(Array::Bool(b)) = v { Some(b.clone()) } else { None };
    }

    fn missing(&self, key: &str, wanted: &str) -> Error {
        self.error(key, format!("is missing, {wanted} is needed; convert the model again with a current converter"))
    }

    fn mistyped(&self, key: &str, value: &Value, wanted: &str) -> Error {
        self.error(key, format!("is {}, but {wanted} is needed; convert the model again", value.describe()))
    }
}
