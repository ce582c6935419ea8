//! What a child process used: processor time and memory.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ExitStatus};

use nix::errno::Errno;

/// What a process used from its start to its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time outside the kernel, in nanoseconds (the kernel counts microseconds).
    pub user_ns: u64,
    /// Processor time in the kernel, in nanoseconds.
    pub system_ns: u64,
    /// The most memory that it held at once.
    pub peak: Peak,
}

/// A peak of resident memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peak {
    /// In KiB.
    pub kib: u64,
    /// Only an upper bound: Linux counts what a process held between `fork` and `exec`, which is
    /// what its parent held, and this is not more than that.
    pub bound: bool,
}

/// The resident memory of this process, in KiB; 0 if `/proc` does not tell.
pub fn own_memory_kib() -> u64 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("VmRSS:"))?;
            line.trim().strip_suffix(" kB")?.trim().parse().ok()
        })
        .unwrap_or(0)
}

/// Waits for the child to end. `parent_kib` is what this process held when it started the child
/// ([`own_memory_kib`]).
pub fn wait(child: &Child, parent_kib: u64) -> io::Result<(ExitStatus, Usage)> {
    let pid = libc::pid_t::try_from(child.id()).map_err(io::Error::other)?;
    let mut status = 0;
    // SAFETY: rusage is plain numbers, for which zeros are a value.
    let mut used: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both pointers are to live variables of the types that wait4 fills in.
        let waited = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut used) };
        match Errno::result(waited) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => break,
        }
    }
    let kib = u64::try_from(used.ru_maxrss).unwrap_or(0);
    let usage = Usage {
        user_ns: nanos(used.ru_utime),
        system_ns: nanos(used.ru_stime),
        peak: Peak {
            kib,
            bound: kib <= parent_kib,
        },
    };
    Ok((ExitStatus::from_raw(status), usage))
}

fn nanos(time: libc::timeval) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let micros = u64::try_from(time.tv_usec).unwrap_or(0);
    seconds * 1_000_000_000 + micros * 1000
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    #[expect(clippy::zombie_processes, reason = "what is tested waits for it")]
    fn a_child_tells_what_it_used() {
        let own = own_memory_kib();
        assert!(own > 0);
        // 64 MiB that sh holds in a variable, more than a test program does.
        let child = Command::new("sh")
            .args(["-c", "x=$(head -c 67108864 /dev/zero | tr '\\0' x); exit 3"])
            .stdout(Stdio::null())
            .spawn()
            .expect("sh");
        let (status, usage) = wait(&child, own).expect("a child");
        assert_eq!(status.code(), Some(3));
        assert!(usage.peak.kib > 65_536, "{usage:?}");
        assert!(usage.user_ns + usage.system_ns > 0);
        let child = Command::new("true").spawn().expect("true");
        let (_, usage) = wait(&child, u64::MAX).expect("a child");
        assert!(usage.peak.bound);
    }
}
