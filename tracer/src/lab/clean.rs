//! Finds and removes what a killed laboratory can leave behind.
//!
//! Namespaces, links and rules go with the process that holds them, and its commands are killed
//! with it. What can stay: the lock file of iptables-legacy, and, should a command have started a
//! process of its own, that process.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Where the lock files lie; [`crate::kernel::netns::Netns::command`] names them.
const LOCK_DIRECTORY: &str = "/run";
/// The lock file's name is this, the pid of the process that runs the laboratory, and `.lock`.
const LOCK_PREFIX: &str = "svcpath-xtables-";

/// Removes what dead laboratories left; says what was removed, one line a thing.
pub fn clean() -> io::Result<Vec<String>> {
    let mut removed = orphans()?;
    for entry in fs::read_dir(LOCK_DIRECTORY)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(lock_owner) else {
            continue;
        };
        if is_alive(pid) {
            continue;
        }
        if remove_lock(&entry.path())? {
            removed.push(format!(
                "{LOCK_DIRECTORY}/{} of process {pid}, which is gone",
                name.to_string_lossy()
            ));
        }
    }
    removed.sort();
    Ok(removed)
}

/// Removes this process's own lock file.
pub fn remove_own_lock() {
    let own = format!("{LOCK_DIRECTORY}/{LOCK_PREFIX}{}.lock", std::process::id());
    // Most laboratories never made one; and the next start would find it anyway.
    let _ = fs::remove_file(own);
}

/// The pid in a lock file's name.
fn lock_owner(name: &str) -> Option<u32> {
    name.strip_prefix(LOCK_PREFIX)?
        .strip_suffix(".lock")?
        .parse()
        .ok()
}

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Removes a lock file that nobody holds; whoever holds it belongs to a live laboratory elsewhere
/// (another pid namespace that shares `/run`).
fn remove_lock(path: &Path) -> io::Result<bool> {
    let file = match File::open(path) {
        Ok(file) => file,
        // Another laboratory that starts just now was faster.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let Ok(_held) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
        return Ok(false);
    };
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Ends processes whose environment says that a laboratory started them and which outlived it.
fn orphans() -> io::Result<Vec<String>> {
    let marker = format!("XTABLES_LOCKFILE={LOCK_DIRECTORY}/");
    let own_pids = fs::read_link("/proc/self/ns/pid")?;
    let mut removed = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        // A process may end while it is looked at; then there is nothing left to do for it.
        let Ok(environment) = fs::read(entry.path().join("environ")) else {
            continue;
        };
        // In another pid namespace the owner's number means another process.
        if fs::read_link(entry.path().join("ns/pid")).ok().as_ref() != Some(&own_pids) {
            continue;
        }
        let owner = environment
            .split(|byte| *byte == 0)
            .filter_map(|variable| std::str::from_utf8(variable).ok())
            .find_map(|variable| lock_owner(variable.strip_prefix(&marker)?));
        let Some(owner) = owner.filter(|owner| !is_alive(*owner)) else {
            continue;
        };
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok() {
            removed.push(format!(
                "process {pid} ({}) of process {owner}, which is gone",
                name.trim()
            ));
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_lock_files_have_an_owner() {
        assert_eq!(lock_owner("svcpath-xtables-4711.lock"), Some(4711));
        assert_eq!(lock_owner("svcpath-xtables-.lock"), None);
        assert_eq!(lock_owner("xtables.lock"), None);
        assert_eq!(lock_owner("svcpath-xtables-1.lock.bak"), None);
    }
}
