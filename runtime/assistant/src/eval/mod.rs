//! Measuring how well a model does.
//!
//! | file | what |
//! | --- | --- |
//! | [`perplexity`] | how well a model predicts a text, by llama.cpp's protocol |

pub mod perplexity;
