//! Which process writes a file: a lock of the process on it (`fcntl_locking(2)`), which the kernel takes away when the
//! process ends, however it ends. Nothing is left of it on the disk, and the kernel tells who has it.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// Another process has the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// Its number; `None` if it is not to be seen from here (another PID namespace, another machine).
    pub(super) by: Option<u32>,
}

/// Takes the lock of a file that is open for writing. It is lost when the process closes the file, even if it has it open
/// more than once. File systems without locks give it to everybody.
pub(super) fn take(file: &File) -> Result<(), Held> {
    match fcntl(file, FcntlArg::F_SETLK(&whole())) {
        // Who had it may just have gone.
        Err(Errno::EAGAIN | Errno::EACCES) => Err(holder(file).unwrap_or(Held { by: None })),
        _ => Ok(()),
    }
}

/// Which other process has the lock of this file, if one has?
pub(super) fn holder_of(file: &Path) -> io::Result<Option<Held>> {
    // A pipe must not make us wait.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(file)?;
    Ok(holder(&file))
}

fn holder(file: &File) -> Option<Held> {
    let mut found = whole();
    fcntl(file, FcntlArg::F_GETLK(&mut found)).ok()?;
    let held = i32::from(found.l_type) != libc::F_UNLCK;
    held.then(|| Held {
        by: u32::try_from(found.l_pid).ok().filter(|pid| *pid > 0),
    })
}

/// All of a file, however long it becomes, to write to.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the kernel's numbers for these are 1 and 0"
)]
fn whole() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::ffi::CString;
    use std::os::fd::{FromRawFd as _, OwnedFd};
    use std::os::unix::process::CommandExt as _;
    use std::process::{Child, Command};

    use super::*;

    /// A process that has the lock of a file, which must not be open here, until it is killed.
    pub(crate) fn held_by_another(file: &Path) -> Child {
        let file = CString::new(file.to_str().expect("UTF-8")).expect("no NUL");
        let mut command = Command::new("sleep");
        command.arg("60");
        // SAFETY: open and fcntl are plain system calls; nothing is allocated after the fork.
        unsafe {
            command.pre_exec(move || {
                // Stays open in the program.
                let fd = libc::open(file.as_ptr(), libc::O_WRONLY);
                if fd < 0 {
                    return Err(io::Error::last_os_error());
                }
                let file = OwnedFd::from_raw_fd(fd);
                fcntl(&file, FcntlArg::F_SETLK(&whole()))?;
                std::mem::forget(file);
                Ok(())
            });
        }
        command.spawn().expect("it starts")
    }

    #[test]
    fn a_lock_is_for_others_and_ends_with_its_process() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("file");
        std::fs::write(&path, "").expect("made");
        assert_eq!(holder_of(&path).expect("read"), None);
        let mut other = held_by_another(&path);
        let held = Held {
            by: Some(other.id()),
        };
        assert_eq!(holder_of(&path).expect("read"), Some(held));
        // Not before the other: what it inherits it closes, and with that its lock would go.
        let file = File::options().write(true).open(&path).expect("open");
        assert_eq!(take(&file), Err(held));
        other.kill().expect("it lives");
        other.wait().expect("it ends");
        assert_eq!(take(&file), Ok(()));
        assert!(holder_of(&dir.path().join("none")).is_err());
    }
}
