//! The guest's root file system: a cpio archive in memory.
//!
//! The kernel unpacks several archives one after the other, so a VM's initramfs is made of
//! segments: tools and modules (built once and kept), our programs, and the job. Entries are
//! sorted and carry no times or inode numbers of the host: equal inputs give equal bytes, and
//! equal bytes give an equal guest.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::interrupt;
use crate::kernel::Kernel;
use crate::packages::find_program;

/// An archive under construction: entries by their path in the guest, without the leading slash.
#[derive(Default)]
pub(crate) struct Archive {
    entries: BTreeMap<String, Entry>,
}

enum Entry {
    Directory,
    File { executable: bool, content: Vec<u8> },
    Link(String),
}

impl Archive {
    /// An archive with the directories that everything else stands in: one merged `/usr`, as
    /// in today's distributions.
    pub(crate) fn root() -> Self {
        let mut archive = Self::default();
        for directory in ["usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "dev", "etc"] {
            archive.directory(directory);
        }
        for name in ["bin", "sbin", "lib", "lib64"] {
            archive.link(name, &format!("usr/{name}"));
        }
        archive
    }

    fn directory(&mut self, path: &str) {
        let mut at = path;
        loop {
            self.entries
                .entry(at.to_owned())
                .or_insert(Entry::Directory);
            match at.rsplit_once('/') {
                Some((parent, _)) => at = parent,
                None => return,
            }
        }
    }

    fn insert(&mut self, path: &str, entry: Entry) {
        let path = guest_path(path);
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
        self.entries.insert(path, entry);
    }

    /// A file with this content.
    pub(crate) fn file(&mut self, path: &str, content: Vec<u8>, executable: bool) {
        self.insert(
            path,
            Entry::File {
                executable,
                content,
            },
        );
    }

    /// A symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.insert(path, Entry::Link(target.to_owned()));
    }

    /// A copy of a host's file (links followed).
    pub(crate) fn copy(&mut self, from: &Path, path: &str) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        let executable = fs::metadata(from)?.permissions().mode() & 0o111 != 0;
        self.file(path, content, executable);
        Ok(())
    }

    /// A copy of a host's directory with all that is in it.
    fn copy_tree(&mut self, from: &Path, path: &str) -> Result<()> {
        let listing =
            fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))?;
        for entry in listing {
            let entry = entry?;
            let path = format!("{path}/{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                self.copy_tree(&entry.path(), &path)?;
            } else {
                self.copy(&entry.path(), &path)?;
            }
        }
        Ok(())
    }

    /// The shared libraries that these programs or libraries of the host need.
    pub(crate) fn libraries(&mut self, of: &BTreeSet<PathBuf>) -> Result<()> {
        for library in shared_libraries(of)? {
            let path = library.to_string_lossy().into_owned();
            self.copy(&library, &path)?;
        }
        Ok(())
    }

    /// The archive in the kernel's format (`newc`).
    pub(crate) fn to_cpio(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, (path, entry)) in self.entries.iter().enumerate() {
            let (mode, links, content): (u32, u32, &[u8]) = match entry {
                Entry::Directory => (0o040_755, 2, &[]),
                Entry::File {
                    executable,
                    content,
                } => (if *executable { 0o100_755 } else { 0o100_644 }, 1, content),
                Entry::Link(target) => (0o120_777, 1, target.as_bytes()),
            };
            put_entry(&mut out, number + 1, mode, links, path, content);
        }
        put_entry(&mut out, 0, 0, 1, TRAILER, &[]);
        // The kernel skips zeros between archives; readers of tapes expect whole blocks.
        out.resize(out.len().next_multiple_of(512), 0);
        out
    }
}

const TRAILER: &str = "TRAILER!!!";

fn put_entry(out: &mut Vec<u8>, inode: usize, mode: u32, links: u32, path: &str, content: &[u8]) {
    // inode, mode, uid, gid, links, mtime, size, device numbers (4), name length, checksum.
    let fields = [
        inode,
        mode as usize,
        0,
        0,
        links as usize,
        0,
        content.len(),
        0,
        0,
        0,
        0,
        path.len() + 1,
        0,
    ];
    out.extend(b"070701");
    for field in fields {
        out.extend(format!("{field:08x}").as_bytes());
    }
    out.extend(path.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend(content);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// Where a host's path stands in the guest: no leading slash, everything below `/usr`.
fn guest_path(path: &str) -> String {
    let path = path.trim_start_matches('/');
    let first = path.split('/').next().unwrap_or_default();
    if first != path && ["bin", "sbin", "lib", "lib64"].contains(&first) {
        format!("usr/{path}")
    } else {
        path.to_owned()
    }
}

/// The closure of shared libraries, as the dynamic linker itself finds them.
fn shared_libraries(of: &BTreeSet<PathBuf>) -> Result<BTreeSet<PathBuf>> {
    if of.is_empty() {
        return Ok(BTreeSet::new());
    }
    let output = Command::new("ldd")
        .args(of)
        .env("LC_ALL", "C")
        .output()
        .context(
            "cannot start ldd, which tells the libraries that a program needs (Debian: libc-bin)",
        )?;
    // ldd exits with 1 when one of the files is a script or statically linked: that is fine.
    parse_ldd(&String::from_utf8_lossy(&output.stdout))
}

fn parse_ldd(text: &str) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for line in text.lines().filter(|line| line.starts_with('\t')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match *words.as_slice() {
            [name, "=>", "not", "found", ..] => {
                bail!("the library {name} is needed in the VM, but this machine does not have it")
            }
            [_, "=>", path, ..] if path.starts_with('/') => found.insert(PathBuf::from(path)),
            [path, address] if path.starts_with('/') && address.starts_with('(') => {
                found.insert(PathBuf::from(path))
            }
            // The kernel's own linux-vdso, or "statically linked".
            _ => continue,
        };
    }
    Ok(found)
}

/// Programs without which svcpath cannot work.
const TOOLS: [&str; 9] = [
    "xtables-legacy-multi",
    "xtables-nft-multi",
    "ip",
    "ipset",
    "ipvsadm",
    "nft",
    "kmod",
    "sh",
    "sleep",
];

/// Programs that make the guest a place to look around in.
const COMFORTS: [&str; 52] = [
    "bash",
    "bpftool",
    "cat",
    "chmod",
    "conntrack",
    "cp",
    "cut",
    "date",
    "dd",
    "df",
    "dmesg",
    "echo",
    "env",
    "false",
    "find",
    "free",
    "grep",
    "head",
    "kill",
    "ln",
    "ls",
    "mkdir",
    "mount",
    "mv",
    "nfacct",
    "nproc",
    "nsenter",
    "od",
    "ps",
    "pwd",
    "readlink",
    "rm",
    "sed",
    "seq",
    "sha256sum",
    "sort",
    "ss",
    "stat",
    "strace",
    "sysctl",
    "tail",
    "tc",
    "tee",
    "timeout",
    "touch",
    "tr",
    "true",
    "umount",
    "uname",
    "uniq",
    "unshare",
    "wc",
];

/// Kernel modules that a node, its rules and our laboratory can ask for.
const MODULES: [&str; 44] = [
    "veth",
    "dummy",
    "bridge",
    "br_netfilter",
    "tun",
    "macvlan",
    "ipvlan",
    "vxlan",
    "tap",
    "nf_conntrack*",
    "nf_nat*",
    "nf_tables*",
    "nft_*",
    "nf_reject*",
    "nf_defrag*",
    "nf_log*",
    "nf_tproxy*",
    "nf_socket*",
    "nf_dup*",
    "nf_flow_table*",
    "nf_synproxy*",
    "x_tables",
    "ip_tables",
    "ip6_tables",
    "iptable_*",
    "ip6table_*",
    "xt_*",
    "ipt_*",
    "ip6t_*",
    "ip_set*",
    "ip_vs*",
    "nfnetlink*",
    "sch_netem",
    "sch_ingress",
    "sch_fq*",
    "cls_*",
    "act_*",
    "af_packet*",
    "sctp*",
    "crc32c*",
    "libcrc32c",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
];

/// The segment that changes only with the machine's packages and the kernel: tools, libraries,
/// configuration and modules. `scratch` is emptied and used.
pub(crate) fn base(kernel: &Kernel, scratch: &Path) -> Result<Archive> {
    let mut archive = Archive::root();
    let mut linked = BTreeSet::new();
    for name in TOOLS.iter().chain(&COMFORTS) {
        let Some(path) = find_program(name) else {
            ensure!(
                !TOOLS.contains(name),
                "{name} is not installed, and the VM needs it: run `cargo xtask run` as root once, it installs what is missing"
            );
            continue;
        };
        let path = fs::canonicalize(&path)
            .with_context(|| format!("cannot resolve {}", path.display()))?;
        let sbin = path.parent().is_some_and(|parent| parent.ends_with("sbin"));
        let place = format!("usr/{}/{name}", if sbin { "sbin" } else { "bin" });
        archive.copy(&path, &place)?;
        linked.insert(path);
    }
    link_tools(&mut archive);
    for directory in [
        "/usr/lib/x86_64-linux-gnu/xtables",
        "/usr/lib64/xtables",
        "/usr/lib/xtables",
    ] {
        let directory = Path::new(directory);
        if directory.is_dir() {
            archive.copy_tree(directory, &directory.to_string_lossy())?;
            for entry in fs::read_dir(directory)? {
                let path = entry?.path();
                if path.extension() == Some(OsStr::new("so")) {
                    linked.insert(path);
                }
            }
        }
    }
    archive.libraries(&linked)?;
    configuration(&mut archive)?;
    modules(&mut archive, kernel, scratch)?;
    Ok(archive)
}

/// The many names of the tools that look at theirs.
fn link_tools(archive: &mut Archive) {
    for family in ["iptables", "ip6tables"] {
        for action in ["", "-save", "-restore"] {
            for (flavour, program) in [
                ("-legacy", "xtables-legacy-multi"),
                ("-nft", "xtables-nft-multi"),
                // What Debian's alternatives choose.
                ("", "xtables-nft-multi"),
            ] {
                archive.link(&format!("usr/sbin/{family}{flavour}{action}"), program);
            }
        }
    }
    for name in ["modprobe", "insmod", "rmmod", "lsmod", "modinfo", "depmod"] {
        archive.link(&format!("usr/sbin/{name}"), "../bin/kmod");
    }
}

fn configuration(archive: &mut Archive) -> Result<()> {
    for directory in ["/etc/iproute2", "/usr/share/iproute2"] {
        if Path::new(directory).is_dir() {
            archive.copy_tree(Path::new(directory), directory)?;
        }
    }
    // ipset and iptables look protocols and services up by name.
    let lists = [
        (
            "/etc/protocols",
            "icmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\nipv6-icmp 58 IPv6-ICMP\nsctp 132 SCTP\n",
        ),
        (
            "/etc/services",
            "domain 53/tcp\ndomain 53/udp\nhttp 80/tcp\nhttps 443/tcp\n",
        ),
        ("/etc/ethertypes", "IPv4 0800\nARP 0806\nIPv6 86DD\n"),
    ];
    for (path, least) in lists {
        if Path::new(path).is_file() {
            archive.copy(Path::new(path), path)?;
        } else {
            archive.file(path, least.as_bytes().to_vec(), false);
        }
    }
    let written = [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        ),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
        ("etc/hosts", "127.0.0.1 localhost svcpath\n::1 localhost\n"),
        (
            "etc/nsswitch.conf",
            "passwd: files\ngroup: files\nhosts: files\nprotocols: files\nservices: files\n",
        ),
    ];
    for (path, content) in written {
        archive.file(path, content.as_bytes().to_vec(), false);
    }
    Ok(())
}

/// The chosen modules and all they depend on, unpacked, with fresh indexes, so that the kernel
/// can load them on demand.
fn modules(archive: &mut Archive, kernel: &Kernel, scratch: &Path) -> Result<()> {
    let dependencies = fs::read_to_string(kernel.modules.join("modules.dep"))
        .context("cannot read the kernel's modules.dep")?;
    let chosen = module_closure(&dependencies, &MODULES);
    ensure!(
        chosen.iter().any(|path| module_name(path) == "nf_tables"),
        "the kernel {} has no nf_tables module: choose another with --kernel",
        kernel.release
    );
    if scratch.exists() {
        fs::remove_dir_all(scratch)
            .with_context(|| format!("cannot empty {}", scratch.display()))?;
    }
    let stage = scratch.join("lib/modules").join(&kernel.release);
    let mut packed: BTreeMap<&str, Vec<PathBuf>> = BTreeMap::new();
    for path in &chosen {
        let to = stage.join(path);
        fs::create_dir_all(to.parent().context("a module at the root")?)?;
        fs::copy(kernel.modules.join(path), &to)
            .with_context(|| format!("cannot copy the module {path}"))?;
        match to.extension().and_then(OsStr::to_str) {
            Some("xz") => packed.entry("xz").or_default().push(to),
            Some("zst") => packed.entry("zstd").or_default().push(to),
            Some("gz") => packed.entry("gzip").or_default().push(to),
            _ => {}
        }
    }
    for (program, files) in packed {
        let mut command = Command::new(program);
        command.arg("-dq").args(&files);
        if program == "zstd" {
            command.arg("--rm");
        }
        run_quietly(&mut command)
            .with_context(|| format!("cannot unpack kernel modules: is {program} installed?"))?;
    }
    for name in [
        "modules.order",
        "modules.builtin",
        "modules.builtin.modinfo",
    ] {
        if kernel.modules.join(name).exists() {
            fs::copy(kernel.modules.join(name), stage.join(name))?;
        }
    }
    run_quietly(
        Command::new(find_program("depmod").context("depmod is not installed (Debian: kmod)")?)
            .arg("-b")
            .arg(scratch)
            .arg(&kernel.release),
    )?;
    archive.copy_tree(&stage, &format!("usr/lib/modules/{}", kernel.release))?;
    fs::remove_dir_all(scratch).with_context(|| format!("cannot remove {}", scratch.display()))
}

/// Runs a helper; its own words appear only when it fails.
pub(crate) fn run_quietly(command: &mut Command) -> Result<Vec<u8>> {
    let program = command.get_program().to_string_lossy().into_owned();
    interrupt::unblock_in(command);
    let output = command
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rev().find(|line| !line.trim().is_empty());
        bail!(
            "{program} failed ({}): {}",
            output.status,
            last.unwrap_or("it said nothing")
        );
    }
    Ok(output.stdout)
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// The modules whose names match a pattern (`*` at its end only), and what they depend on.
fn module_closure<'a>(dependencies: &'a str, patterns: &[&str]) -> BTreeSet<&'a str> {
    // modules.dep lists the whole closure of each module on its line.
    let matches = |name: &str| {
        patterns
            .iter()
            .any(|pattern| match pattern.strip_suffix('*') {
                Some(prefix) => name.starts_with(prefix),
                None => name == *pattern,
            })
    };
    dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(module, _)| matches(&module_name(module)))
        .flat_map(|(module, needs)| std::iter::once(module).chain(needs.split_whitespace()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive back: path, mode, content.
    fn read_back(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        let mut offset = 0;
        loop {
            assert_eq!(&bytes[..6], b"070701", "at {offset}");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).expect("ascii");
                usize::from_str_radix(text, 16).expect("hexadecimal")
            };
            let (mode, mtime, size, name_length) = (field(1), field(5), field(6), field(11));
            assert_eq!(mtime, 0, "no times in the archive");
            let name = String::from_utf8(bytes[110..110 + name_length - 1].to_vec()).expect("text");
            assert_eq!(bytes[110 + name_length - 1], 0);
            let start = (110 + name_length).next_multiple_of(4);
            let content = bytes[start..start + size].to_vec();
            let next = (start + size).next_multiple_of(4);
            offset += next;
            bytes = &bytes[next..];
            if name == TRAILER {
                assert!(bytes.iter().all(|byte| *byte == 0));
                return entries;
            }
            entries.push((name, u32::try_from(mode).expect("small"), content));
        }
    }

    #[test]
    fn an_archive_reads_back_with_parents_before_children() {
        let mut archive = Archive::root();
        archive.file("/lib/x86_64-linux-gnu/libc.so.6", vec![1, 2, 3], false);
        archive.file("init", b"#!/bin/sh\n".to_vec(), true);
        archive.link("usr/sbin/iptables", "xtables-nft-multi");
        let bytes = archive.to_cpio();
        assert_eq!(bytes.len() % 512, 0);
        let entries = read_back(&bytes);
        let place = |name: &str| {
            entries
                .iter()
                .position(|(path, ..)| path == name)
                .expect(name)
        };
        assert!(place("usr") < place("usr/lib"));
        assert!(place("usr/lib") < place("usr/lib/x86_64-linux-gnu"));
        let library = place("usr/lib/x86_64-linux-gnu/libc.so.6");
        assert_eq!(entries[library].1, 0o100_644);
        assert_eq!(entries[library].2, [1, 2, 3]);
        assert_eq!(entries[place("init")].1, 0o100_755);
        assert_eq!(
            entries[place("lib")],
            ("lib".to_owned(), 0o120_777, b"usr/lib".to_vec())
        );
        assert_eq!(entries[place("usr/sbin/iptables")].2, b"xtables-nft-multi");
        assert_eq!(entries[place("dev")].1, 0o040_755);
    }

    #[test]
    fn equal_contents_give_equal_bytes_in_any_order() {
        let (mut one, mut other) = (Archive::default(), Archive::default());
        one.file("a/b", vec![7; 5], true);
        one.link("c", "a");
        other.link("c", "a");
        other.file("a/b", vec![7; 5], true);
        assert_eq!(one.to_cpio(), other.to_cpio());
        other.file("a/b", vec![8; 5], true);
        assert_ne!(one.to_cpio(), other.to_cpio());
    }

    #[test]
    fn ldd_output() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\
            \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n\tstatically linked\n/usr/bin/x:\n";
        let found = parse_ldd(text).expect("complete");
        let expected = [
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(found, expected.map(PathBuf::from).into());
        let error = parse_ldd("\tlibgone.so.1 => not found\n").expect_err("missing");
        assert!(error.to_string().contains("libgone.so.1"), "{error}");
    }

    #[test]
    fn this_programs_own_libraries_are_found() {
        let own = std::env::current_exe().expect("known");
        let found = shared_libraries(&BTreeSet::from([own])).expect("ldd is there");
        assert!(
            found
                .iter()
                .any(|path| path.to_string_lossy().contains("libc.so")),
            "{found:?}"
        );
        assert!(found.iter().all(|path| path.is_absolute()));
    }

    #[test]
    fn modules_come_with_what_they_need() {
        let dependencies = "kernel/net/ip_vs_rr.ko.xz: kernel/net/ip_vs.ko.xz kernel/lib/libcrc32c.ko.xz\n\
            kernel/net/ip_vs.ko.xz: kernel/lib/libcrc32c.ko.xz\n\
            kernel/lib/libcrc32c.ko.xz:\n\
            kernel/net/xt-odd.ko:\nkernel/drivers/floppy.ko:\n";
        let chosen = module_closure(dependencies, &["ip_vs_rr", "xt_*"]);
        let expected = BTreeSet::from([
            "kernel/lib/libcrc32c.ko.xz",
            "kernel/net/ip_vs.ko.xz",
            "kernel/net/ip_vs_rr.ko.xz",
            "kernel/net/xt-odd.ko",
        ]);
        assert_eq!(chosen, expected);
    }
}
