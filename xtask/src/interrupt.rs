//! Ctrl-C and SIGTERM: whatever was started ends, whatever was written for a while goes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::{Pid, getppid};
use std::os::unix::process::CommandExt;

struct Started {
    /// By process id: the signal that ends it.
    children: BTreeMap<i32, Signal>,
    leftovers: Vec<PathBuf>,
    over: bool,
}

static STARTED: Mutex<Started> = Mutex::new(Started {
    children: BTreeMap::new(),
    leftovers: Vec::new(),
    over: false,
});

fn started() -> MutexGuard<'static, Started> {
    STARTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on SIGINT and SIGTERM end everything, with exit code 130 or 143. To be called once,
/// before any thread is started: threads inherit what is blocked here.
pub(crate) fn watch() -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().context("cannot block signals")?;
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if let Ok(signal) = signals.wait() {
                end_everything();
                std::process::exit(128 + signal as i32);
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

/// Has a signal come that ends everything?
pub(crate) fn is_over() -> bool {
    started().over
}

/// Leaves the last word to the signal thread if a signal has come: what fails now fails because
/// of it, and it decides the exit code.
pub(crate) fn yield_to_signal() {
    while is_over() {
        thread::sleep(Duration::from_secs(1));
    }
}

fn end_everything() {
    let (children, leftovers) = {
        let mut started = started();
        started.over = true;
        (
            started.children.clone(),
            std::mem::take(&mut started.leftovers),
        )
    };
    let signal_all = |children: &BTreeMap<i32, Signal>, signal: Option<Signal>| {
        for (&pid, &own) in children {
            // Gone already is as good.
            kill(Pid::from_raw(pid), signal.unwrap_or(own)).ok();
        }
    };
    signal_all(&children, None);
    // Programs tidy up after themselves (namespaces, links); give them the time.
    let patience = Instant::now() + Duration::from_secs(5);
    while !started().children.is_empty() && Instant::now() < patience {
        thread::sleep(Duration::from_millis(20));
    }
    signal_all(&started().children, Some(Signal::SIGKILL));
    for path in leftovers {
        remove(&path);
    }
}

/// Removes a file or a directory, if it can be.
pub(crate) fn remove(path: &Path) {
    // Nobody is left to tell about a file that will not go.
    if path.is_dir() {
        fs::remove_dir_all(path).ok();
    } else {
        fs::remove_file(path).ok();
    }
}

/// Removes `path` when xtask ends, however it ends short of SIGKILL.
pub(crate) fn remove_on_exit(path: &Path) {
    started().leftovers.push(path.to_owned());
}

/// Removes everything that was to be removed on exit; for the ordinary end.
pub(crate) fn remove_leftovers() {
    let leftovers = std::mem::take(&mut started().leftovers);
    for path in leftovers {
        remove(&path);
    }
}

/// Lets the child have the signals that are blocked here, as it would anywhere else.
pub(crate) fn unblock_in(command: &mut Command) {
    // SAFETY: between fork and exec only sigprocmask is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| Ok(SigSet::empty().thread_set_mask()?));
    }
}

/// A child process that does not outlive xtask.
pub(crate) struct Guarded(Child);

impl Guarded {
    /// Starts it; `end` is the signal that ends it, also when xtask is killed or its thread ends.
    pub(crate) fn spawn(command: &mut Command, end: Signal) -> Result<Self> {
        unblock_in(command);
        let parent = nix::unistd::getpid();
        // SAFETY: between fork and exec only prctl and getppid are called, and both are
        // async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                set_pdeathsig(end)?;
                // The parent may have died before the line above took effect.
                if getppid() != parent {
                    return Err(std::io::Error::other("xtask has ended"));
                }
                Ok(())
            });
        }
        // Held over the start, so that the signal thread sees every child or prevents it.
        let mut started = started();
        anyhow::ensure!(!started.over, "interrupted");
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
        started.children.insert(child.id().cast_signed(), end);
        Ok(Self(child))
    }

    /// The process, for its pipes.
    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> Result<ExitStatus> {
        let status = self.0.wait().context("cannot wait for a child process")?;
        started().children.remove(&self.0.id().cast_signed());
        Ok(status)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            self.0.kill().ok();
            self.0.wait().ok();
        }
        started().children.remove(&self.0.id().cast_signed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_child_is_gone() {
        let child = Guarded::spawn(Command::new("sleep").arg("1000"), Signal::SIGTERM)
            .expect("sleep is there");
        let pid = Pid::from_raw(child.0.id().cast_signed());
        assert!(kill(pid, None).is_ok());
        drop(child);
        assert!(kill(pid, None).is_err());
    }

    #[test]
    fn children_start_with_no_signal_blocked() {
        let block = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
        block.thread_block().expect("allowed");
        let mut command = Command::new("grep");
        command.args(["SigBlk", "/proc/self/status"]);
        let before = command.output().expect("grep is there").stdout;
        unblock_in(&mut command);
        let after = command.output().expect("grep is there").stdout;
        block.thread_unblock().expect("allowed");
        assert_eq!(
            String::from_utf8_lossy(&before),
            "SigBlk:\t0000000000004002\n",
            "blocked signals are inherited, so something must be done"
        );
        assert_eq!(
            String::from_utf8_lossy(&after),
            "SigBlk:\t0000000000000000\n"
        );
    }
}
