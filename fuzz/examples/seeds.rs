//! Writes the seeds that are missing in `corpus/`.

use std::path::Path;

fn main() -> std::io::Result<()> {
    for (target, name, bytes) in kinglet_fuzz::seeds::all() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
        std::fs::create_dir_all(&folder)?;
        let path = folder.join(format!("seed-{name}"));
        if !path.exists() {
            std::fs::write(&path, &bytes)?;
        }
    }
    Ok(())
}
