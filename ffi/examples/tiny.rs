//! Writes a tiny random model that can chat, for trying out the C interface: `cargo run -p kinglet-ffi --example tiny -- FILE`

use kinglet_models::tiny::{TinyConfig, write_tiny};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("the path of the file to write is missing")?;
    Ok(write_tiny(path, &TinyConfig::new("llama").with_bpe())?)
}
