//! Who changes rules: processes, their cgroups, and the pods behind these.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::DirEntryExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A process that changed rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Actor {
    /// Its id, in the init pid namespace; `None` if the kernel did not tell.
    pub pid: Option<u32>,
    /// Its name: the kernel's (`comm`), which ends after 15 bytes, and then the rest of what it was called
    /// with, if that was to be seen.
    pub name: Option<String>,
    /// Its parent's id and name; `None` if only an announcement was heard, and it was gone before it could
    /// be asked.
    pub parent: Option<(u32, String)>,
    /// Its cgroup; `None` if that was not to be known any more.
    pub cgroup: Option<String>,
    /// The UID of the pod that it runs in, from its cgroup's name; `None`: in no pod, or not known.
    pub pod: Option<String>,
}

impl std::fmt::Display for Actor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name.as_deref().unwrap_or("unknown process"))?;
        let Some(pid) = self.pid else { return Ok(()) };
        write!(f, " (pid {pid}, parent ")?;
        match &self.parent {
            Some((parent, name)) => write!(f, "{name}, pid {parent}")?,
            None => f.write_str("unknown")?,
        }
        if let Some(pod) = &self.pod {
            write!(f, ", pod {pod}")?;
        }
        f.write_str(")")
    }
}

/// The name of a process, of which the kernel keeps 15 bytes (`TASK_COMM_LEN`), and which its first
/// argument may have whole.
pub(super) fn whole_name(name: String, argument: &str) -> String {
    const KEPT: usize = 15;
    let called = argument.rsplit('/').next().unwrap_or_default();
    if name.len() == KEPT && called.starts_with(&name) {
        called.to_owned()
    } else {
        name
    }
}

/// Where processes and cgroups are looked up.
#[derive(Debug)]
pub(super) struct Directory {
    /// Where the unified hierarchy is mounted.
    unified: Option<PathBuf>,
    /// Is there another hierarchy too, in which processes may be while they are in the unified one's root?
    others: bool,
    /// Paths by id; a cgroup that was gone when it was looked for has none. Ids are never used again.
    known: HashMap<u64, Option<String>>,
}

impl Directory {
    pub(super) fn of_this_machine() -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        Self {
            unified: mount_of(&mounts, "cgroup2"),
            others: mount_of(&mounts, "cgroup").is_some(),
            known: HashMap::new(),
        }
    }

    /// The cgroup of a process that the kernel says is in this one of the unified hierarchy.
    pub(super) fn cgroup(&mut self, id: u64, pid: u32, name: &str) -> Option<String> {
        let unified = self.unified(id);
        if unified.as_deref().is_some_and(|path| path != "/") || (unified.is_some() && !self.others)
        {
            return unified;
        }
        // In the root, or nobody knows where: the process itself may still tell.
        let alive = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (alive.trim_end() == name).then(|| cgroup_of(pid))?
    }

    fn unified(&mut self, id: u64) -> Option<String> {
        let root = self.unified.as_ref()?;
        let path = self.known.entry(id).or_insert_with(|| find(root, id));
        path.clone()
    }
}

/// Where the first file system of this type is mounted, in what `/proc/self/mounts` says.
fn mount_of(mounts: &str, kind: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let at = words.next()?;
        (words.next()? == kind).then(|| PathBuf::from(at))
    })
}

/// The path of the cgroup with this id below the root: the id is the directory's inode number.
fn find(root: &Path, id: u64) -> Option<String> {
    use std::os::unix::fs::MetadataExt as _;
    if fs::metadata(root).ok()?.ino() == id {
        return Some("/".to_owned());
    }
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        // A cgroup may go while it is looked into.
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let path = entry.path();
            if entry.ino() == id {
                return Some(format!("/{}", path.strip_prefix(root).ok()?.display()));
            }
            open.push(path);
        }
    }
    None
}

/// Who made an announced change, as far as it can still be asked. `thread` is the id that the kernel told.
pub(super) fn ask(thread: Option<u32>, name: Option<String>) -> Actor {
    let Some(thread) = thread else {
        return Actor {
            name,
            ..Actor::default()
        };
    };
    let status = fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let parent = number(&status, "PPid").filter(|parent| *parent != 0);
    let parent = parent.and_then(|parent| {
        let name = fs::read_to_string(format!("/proc/{parent}/comm")).ok()?;
        Some((parent, name.trim_end().to_owned()))
    });
    let cgroup = cgroup_of(thread);
    Actor {
        // A process of one thread, as the tools are, has the thread's id.
        pid: Some(number(&status, "Tgid").unwrap_or(thread)),
        name,
        parent,
        pod: cgroup.as_deref().and_then(pod_of),
        cgroup,
    }
}

/// `Tgid:  12` in what `/proc/pid/status` says.
fn number(status: &str, key: &str) -> Option<u32> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().parse().ok()
}

/// A process' path in the unified hierarchy, or, if it is in that one's root, in the first in which it is
/// not.
fn cgroup_of(pid: u32) -> Option<String> {
    cgroup_in(&fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?)
}

fn cgroup_in(groups: &str) -> Option<String> {
    let paths = || {
        groups.lines().filter_map(|line| {
            let (number, rest) = line.split_once(':')?;
            Some((number == "0", rest.split_once(':')?.1))
        })
    };
    let best = paths()
        .find(|(unified, path)| *unified && *path != "/")
        .or_else(|| paths().find(|(_, path)| *path != "/"))
        .or_else(|| paths().next());
    best.map(|(_, path)| path.to_owned())
}

/// The UID of the pod whose cgroup this is, or is inside of, as the kubelet names them:
/// `/kubepods/burstable/pod<uid>/...` (cgroupfs) or
/// `/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid with _>.slice/...` (systemd).
pub(super) fn pod_of(cgroup: &str) -> Option<String> {
    let mut parts = cgroup.split('/');
    parts.by_ref().find(|part| is_root_of_pods(part))?;
    // The part that was found may itself be a pod's: `kubelet-kubepods-pod<uid>.slice`.
    cgroup.split('/').find_map(|part| {
        let part = part.strip_suffix(".slice").unwrap_or(part);
        let uid = match part.rsplit_once("-pod") {
            Some((_, uid)) => uid,
            None => part.strip_prefix("pod")?,
        };
        let uid = uid.replace('_', "-");
        is_uid(&uid).then_some(uid)
    })
}

fn is_root_of_pods(part: &str) -> bool {
    part.trim_end_matches(".slice")
        .split('-')
        .any(|word| word == "kubepods")
}

/// An UUID, or the bare hash that static pods have instead.
fn is_uid(text: &str) -> bool {
    let digits = text.bytes().filter(u8::is_ascii_hexdigit).count();
    let dashes = text.bytes().filter(|byte| *byte == b'-').count();
    digits == 32 && digits + dashes == text.len() && (dashes == 0 || dashes == 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "2f6b1d0c-9e2a-4d9e-8a55-0123456789ab";

    #[test]
    fn pods_are_known_by_their_cgroups() {
        let of = |cgroup: &str| pod_of(cgroup);
        let underscored = UID.replace('-', "_");
        for cgroup in [
            format!("/kubepods/burstable/pod{UID}/0123"),
            format!("/kubepods/pod{UID}"),
            format!(
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{underscored}.slice/cri-containerd-77.scope"
            ),
            format!(
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{underscored}.slice"
            ),
        ] {
            assert_eq!(of(&cgroup).as_deref(), Some(UID), "{cgroup}");
        }
        let hash = "9b2dd62b2b9a2f8fbba9eb0ddcab8ba8";
        let fixed = format!("/kubepods.slice/kubepods-pod{hash}.slice/crio-1.scope");
        assert_eq!(of(&fixed).as_deref(), Some(hash));
        for cgroup in [
            "/",
            "/system.slice/kubelet.service",
            "/kubepods.slice/kubepods-burstable.slice",
            "/kubepods/burstable/podcast",
            &format!("/user.slice/pod{UID}"),
        ] {
            assert_eq!(of(cgroup), None, "{cgroup}");
        }
    }

    #[test]
    fn a_process_is_in_the_hierarchy_in_which_it_is_not_in_the_root() {
        let of = |groups| cgroup_in(groups);
        assert_eq!(of("0::/a\n").as_deref(), Some("/a"));
        assert_eq!(of("2:cpu:/b\n1:pids:/c\n0::/a\n").as_deref(), Some("/a"));
        assert_eq!(of("2:cpu:/\n1:pids:/c\n0::/\n").as_deref(), Some("/c"));
        assert_eq!(of("0::/\n").as_deref(), Some("/"));
        assert_eq!(of(""), None);
    }

    #[test]
    fn directories_are_found_by_their_number() {
        use std::os::unix::fs::MetadataExt as _;
        let root = tempfile::tempdir().expect("writable");
        let deep = root.path().join("a/b/c");
        fs::create_dir_all(&deep).expect("writable");
        let number = |path: &Path| fs::metadata(path).expect("there").ino();
        let found = |path: &Path| find(root.path(), number(path));
        assert_eq!(found(&deep).as_deref(), Some("/a/b/c"));
        assert_eq!(found(root.path()).as_deref(), Some("/"));
        assert_eq!(find(root.path(), u64::MAX), None);
    }

    #[test]
    fn long_names_are_completed_by_what_a_process_was_called_with() {
        let of = |name: &str, argument| whole_name(name.to_owned(), argument);
        let path = "/usr/sbin/iptables-legacy-restore";
        assert_eq!(of("iptables-legacy", path), "iptables-legacy-restore");
        assert_eq!(of("iptables-legacy", "/bin/other"), "iptables-legacy");
        assert_eq!(of("iptables-legacy", ""), "iptables-legacy");
        assert_eq!(of("nft", "nft-of-mine"), "nft");
    }

    #[test]
    fn this_process_can_be_asked() {
        let own = std::process::id();
        let actor = ask(Some(own), Some("me".to_owned()));
        assert_eq!(actor.pid, Some(own));
        assert!(actor.parent.is_some() && actor.cgroup.is_some());
        // Beyond the highest id (PID_MAX_LIMIT, include/linux/threads.h).
        let gone = ask(Some(u32::MAX), Some("gone".to_owned()));
        assert_eq!(gone.to_string(), "gone (pid 4294967295, parent unknown)");
        assert_eq!(ask(None, None).to_string(), "unknown process");
    }

    #[test]
    fn mounts_are_found_by_their_type() {
        let mounts = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let unified = mount_of(mounts, "cgroup2");
        assert_eq!(
            unified.as_deref(),
            Some(Path::new("/sys/fs/cgroup/unified"))
        );
        assert_eq!(mount_of(mounts, "cgroup"), None);
    }
}
