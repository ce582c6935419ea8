//! Network namespaces that live exactly as long as this process holds them.
//!
//! They are never given a name under `/run/netns`: the only references are this process's file
//! descriptors, so even `kill -9` leaves nothing behind (the kernel destroys a namespace, its
//! veth pairs and its rules with the last reference).

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns, unshare};

use super::tool;

/// Why a namespace could not be made or entered.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The kernel refused; without root (`CAP_SYS_ADMIN`) it always does.
    #[error("cannot create a network namespace: {0} (are you root?)")]
    Create(#[source] io::Error),
    /// `setns` failed.
    #[error("cannot enter network namespace {name}: {source}")]
    Enter {
        /// The namespace's name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A network namespace. Clones share it; it ends with the last clone.
#[derive(Clone, Debug)]
pub struct Netns {
    name: Arc<str>,
    file: Arc<File>,
}

impl Netns {
    /// Makes a new, empty namespace (only `lo`, down).
    ///
    /// `name` is for messages only.
    pub fn create(name: &str) -> Result<Self, NetnsError> {
        // unshare moves the calling thread, so a thread of its own does it and ends.
        let file = std::thread::scope(|scope| {
            scope
                .spawn(|| -> io::Result<File> {
                    unshare(CloneFlags::CLONE_NEWNET)?;
                    File::open("/proc/thread-self/ns/net")
                })
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the namespace thread panicked")))
        })
        .map_err(NetnsError::Create)?;
        Ok(Self {
            name: name.into(),
            file: Arc::new(file),
        })
    }

    /// The namespace at a path: `/proc/PID/ns/net`, or a name's file below `/run/netns`.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let name = path.display().to_string();
        let fail = |source| NetnsError::Enter {
            name: name.clone(),
            source,
        };
        let file = File::open(path).map_err(fail)?;
        Ok(Self {
            name: name.as_str().into(),
            file: Arc::new(file),
        })
    }

    /// The namespace this thread is in.
    pub fn current() -> io::Result<Self> {
        Ok(Self {
            name: "current".into(),
            file: Arc::new(File::open("/proc/thread-self/ns/net")?),
        })
    }

    /// The name given at creation.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A path that names the namespace as long as this process holds it: `/proc/<pid>/fd/<n>`.
    ///
    /// `ip link ... netns PATH` takes it, from whichever namespace `ip` itself runs in.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// The namespace's number: `net->ns.inum` in the kernel, 32 bits wide (`struct ns_common`).
    pub fn number(&self) -> io::Result<u32> {
        u32::try_from(self.file.metadata()?.ino()).map_err(io::Error::other)
    }

    /// Moves this thread into the namespace until the guard is dropped.
    pub fn enter(&self) -> Result<Entered, NetnsError> {
        let fail = |source: io::Error| NetnsError::Enter {
            name: self.name.to_string(),
            source,
        };
        let home = File::open(OWN).map_err(fail)?;
        // Whoever is there need not be allowed to move (CAP_SYS_ADMIN).
        let here = is_same(&home, &self.file).map_err(fail)?;
        if !here {
            setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|e| fail(e.into()))?;
        }
        Ok(Entered {
            home: (!here).then_some(home),
            not_send: PhantomData,
        })
    }

    /// Runs `f` in the namespace. Sockets made by `f` stay in it.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> Result<T, NetnsError> {
        let _entered = self.enter()?;
        Ok(f())
    }

    /// A command that will run in this namespace and that dies with this process.
    ///
    /// The lock of iptables-legacy is a file of its own (`XTABLES_LOCKFILE`), so that a node's
    /// own iptables never waits for the laboratory nor the laboratory for it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(tool::program(program));
        let file = Arc::clone(&self.file);
        let parent = std::process::id();
        command.env(
            "XTABLES_LOCKFILE",
            format!("/run/svcpath-xtables-{parent}.lock"),
        );
        // SAFETY: between fork and exec only async-signal-safe calls are made: prctl, getppid, open
        // (of a path that needs no memory), statx and setns are plain system calls, and `file` is kept
        // open by the closure.
        unsafe {
            command.pre_exec(move || {
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
                if nix::unistd::getppid().as_raw().unsigned_abs() != parent {
                    return Err(io::Error::other("parent is gone"));
                }
                if is_same(&File::open(OWN)?, &file)? {
                    return Ok(());
                }
                setns(
                    BorrowedFd::borrow_raw(file.as_raw_fd()),
                    CloneFlags::CLONE_NEWNET,
                )?;
                Ok(())
            });
        }
        command
    }
}

/// The namespace of the calling thread.
const OWN: &str = "/proc/thread-self/ns/net";

fn is_same(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

/// While this lives, the thread is in another namespace. It must be dropped on the same thread.
#[derive(Debug)]
#[must_use = "the thread leaves the namespace when this is dropped"]
pub struct Entered {
    /// Where it came from; `None` if it was there already.
    home: Option<File>,
    not_send: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let Some(home) = &self.home else { return };
        // Going on in the wrong namespace could change the machine: abort rather than risk it.
        if let Err(error) = setns(home.as_fd(), CloneFlags::CLONE_NEWNET) {
            eprintln!("svcpath: cannot leave a network namespace: {error}");
            std::process::abort();
        }
    }
}
