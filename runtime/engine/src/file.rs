//! Files that appear whole or not at all: written beside their target, forced to disk, and renamed over it.
//!
//! After a crash there is the old file or the new one, never half of either; whoever has the old one mapped or open keeps
//! it, but on Windows, which refuses to replace a file that is mapped. Everything that writes a file of its own goes
//! through here.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// A file under way; take it with [`NewFile::finish`]. Dropped before, it leaves nothing behind.
#[derive(Debug)]
pub struct NewFile {
    // The field order matters: the file is closed before the temporary name is removed (Windows needs that).
    file: BufWriter<File>,
    temporary: Temporary,
    target: PathBuf,
}

/// A temporary name that goes away unless its file was renamed.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
    exists: bool,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if self.exists
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            log::warn!("{}: cannot remove the temporary file: {e}", self.path.display());
        }
    }
}

impl NewFile {
    /// Begins a file that is to be `target`, under a name of its own in the same folder: the rename must stay within one
    /// file system.
    ///
    /// # Errors
    /// [`Error::Argument`] for a path that names no file, [`Error::Io`].
    pub fn create(target: impl AsRef<Path>) -> Result<NewFile> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let target = target.as_ref();
        let Some(name) = target.file_name() else {
            return Err(Error::argument(format!("{} names no file to write to", target.display())));
        };
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let mut temporary = std::ffi::OsString::from(".");
        temporary.push(name);
        temporary.push(format!(".{}-{count}.tmp", std::process::id()));
        let path = target.with_file_name(temporary);
        let file = File::options().write(true).create_new(true).open(&path).map_err(Error::io(&path))?;
        Ok(NewFile {
            file: BufWriter::with_capacity(1 << 20, file),
            temporary: Temporary { path, exists: true },
            target: target.into(),
        })
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(&self.temporary.path))
    }

    /// Forces the file to disk and puts it in the target's place.
    ///
    /// # Errors
    /// [`Error::Io`]; the target is then as it was.
    pub fn finish(mut self) -> Result<()> {
        let path = &self.temporary.path;
        self.file.flush().and_then(|()| self.file.get_ref().sync_all()).map_err(Error::io(path))?;
        std::fs::rename(path, &self.target).map_err(Error::io(&self.target))?;
        self.temporary.exists = false;
        sync_folder(&self.target);
        Ok(())
    }
}

/// Puts a file with these bytes in the place of `target`.
///
/// # Errors
/// As [`NewFile::create`] and [`NewFile::finish`]; the target is then as it was.
pub fn replace(target: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let mut file = NewFile::create(target)?;
    file.write(bytes)?;
    file.finish()
}

/// Makes the rename itself last. Not every file system can; the file's bytes are on the disk either way.
fn sync_folder(target: &Path) {
    #[cfg(unix)]
    {
        let folder = target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if let Err(e) = File::open(folder).and_then(|f| f.sync_all()) {
            log::debug!("{}: cannot sync the folder: {e}", folder.display());
        }
    }
    #[cfg(not(unix))]
    let _ = target;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let folder = std::env::temp_dir().join(format!("kinglet-file-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("a.json");
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        let mut unfinished = NewFile::create(&path).unwrap();
        unfinished.write(b"three").unwrap();
        drop(unfinished);
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert!(replace(folder.join("none/a"), b"x").is_err());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing is left beside it");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
