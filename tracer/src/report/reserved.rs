//! A file whose place on the disk is taken before its contents are known: a disk that fills up meanwhile cannot take it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};

use super::write::{Staged, WriteError};

/// How much is reserved, if there is so much: a trace of some hundred Services.
const MOST: i64 = 4 << 20;
/// Less is worth nothing.
const LEAST: i64 = 4 << 10;

/// A file under a temporary name; it is removed if this is dropped before it is published.
#[derive(Debug)]
pub(super) struct Reserved {
    staged: Staged,
    file: File,
    target: PathBuf,
}

/// Why the contents are not on the disk.
#[derive(Debug)]
pub(super) struct Unwritten {
    /// How many bytes found no room.
    pub(super) missing: u64,
    /// What the file system said.
    pub(super) error: WriteError,
}

impl Reserved {
    /// Makes the file and reserves what there is room for, at most half of what is free. Where the file system
    /// reserves nothing, there is a file all the same.
    pub(super) fn start(dir: &Path, name: &str) -> io::Result<Self> {
        let mut staged = Staged::default();
        let (temporary, target) = staged.name(dir, name);
        let file = File::create(temporary)?;
        let mut room = MOST;
        // Twice as much must be there, of which half is let go: others need room as well.
        while room >= LEAST && fallocate(&file, FallocateFlags::empty(), 0, 2 * room).is_err() {
            room /= 2;
        }
        let kept = u64::try_from(room).unwrap_or(0);
        file.set_len(if room >= LEAST { kept } else { 0 })?;
        Ok(Self {
            staged,
            file,
            target,
        })
    }

    /// Writes all of the contents; may be tried again, with others.
    pub(super) fn write(&self, bytes: &[u8]) -> Result<(), Unwritten> {
        let mut written = 0;
        let outcome = loop {
            let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) else {
                break self.end_at(bytes.len());
            };
            match self.file.write_at(rest, written as u64) {
                Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
                Ok(more) => written += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        outcome.map_err(|source| Unwritten {
            missing: (bytes.len() - written) as u64,
            error: WriteError::File {
                file: self.target.clone(),
                source,
            },
        })
    }

    /// Gives back what was reserved and is not needed. A full disk may show only here.
    fn end_at(&self, length: usize) -> io::Result<()> {
        self.file.set_len(length as u64)?;
        self.file.sync_all()
    }

    /// Gives it its name.
    pub(super) fn publish(mut self) -> Result<(), WriteError> {
        self.staged.publish()
    }
}
