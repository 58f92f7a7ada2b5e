//! Disks that are full: a small file system of its own for one test, mounted in memory.
//!
//! Mounting takes root. Where it is refused, the program is run with a limit to the size of its files instead: writing then
//! fails too, at the same places, with another message.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::data::Scratch;
use crate::process::{Output, program, run};

/// A place where little can be written.
pub struct Disk {
    folder: PathBuf,
    /// `None` where nothing could be mounted: then most bytes of a file, none after [`Disk::make_room`].
    limit: Option<Option<u64>>,
}

impl Disk {
    /// A file system of `bytes` (a multiple of a page of 4096) at `name` in `scratch`, or what takes its place.
    pub fn new(scratch: &Scratch, name: &str, bytes: u64) -> Disk {
        let folder = scratch.path(name);
        std::fs::create_dir_all(&folder).expect("a folder");
        let mounted = mount(&folder, &format!("size={bytes}"));
        if !mounted {
            eprintln!("mounting is refused: files are limited to {bytes} bytes instead of the disk");
        }
        Disk { folder, limit: (!mounted).then_some(Some(bytes)) }
    }

    /// Whether it is a file system, which can be filled.
    pub fn is_mounted(&self) -> bool {
        self.limit.is_none()
    }

    /// Takes all room that is left, until [`Disk::clear`].
    pub fn fill(&self) {
        let ballast = self.path("ballast");
        let mut file = std::fs::File::create(&ballast).expect("a name costs nothing");
        while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    }

    /// Gives back what [`Disk::fill`] has taken, at once: a process that another test has just started may still have the file
    /// open, so that removing it is not enough.
    pub fn clear(&self) {
        let ballast = self.path("ballast");
        std::fs::File::create(&ballast).expect("the ballast is ours");
        std::fs::remove_file(ballast).expect("the ballast is ours");
    }

    /// A path on it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Whether a message says that nothing more can be written here.
    pub fn names_the_reason(&self, message: &str) -> bool {
        message.contains(if self.limit.is_none() { "No space left on device" } else { "File too large" })
    }

    /// Runs `kinglet`, which may write no more than fits.
    pub fn kinglet(&self, arguments: &[&str]) -> Output {
        match self.limit {
            Some(Some(bytes)) => {
                let mut limited = Command::new("env");
                limited.args(["--ignore-signal=XFSZ", "prlimit", &format!("--fsize={bytes}")]);
                run(limited.arg(program()).args(arguments))
            }
            _ => run(Command::new(program()).args(arguments)),
        }
    }

    /// Makes room for all that may come.
    pub fn make_room(&mut self) {
        match &mut self.limit {
            Some(limit) => *limit = None,
            None => assert!(mount(&self.folder, "remount,size=64m"), "the file system grows"),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.limit.is_none() {
            let _ = Command::new("umount").arg(&self.folder).status();
        }
    }
}

fn mount(folder: &Path, options: &str) -> bool {
    let output = Command::new("mount").args(["-t", "tmpfs", "-o", options, "kinglet-test"]).arg(folder).output();
    output.is_ok_and(|output| output.status.success())
}
