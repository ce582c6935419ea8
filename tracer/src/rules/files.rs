//! A rule set as files, named as the dumps of a node are, so that what was rendered can be walked
//! and read back like a dump. (`rules check` wants what `iptables-save` prints.)

use std::collections::HashSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use super::{RuleSet, Step, Sysctl, ipvs};
use crate::cluster::Family;

/// What a script says where kube-proxy's counters cannot be made, without which `iptables-restore` refuses the rules
/// that count.
const NO_NFACCT: &str = "{ echo 'the kernel makes no counters of nfacct, with which the rules count: render with --no-nfacct' >&2; exit 1; }";

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleFile {
    /// Its name. The second step of a kind, as a partial sync can have, is told apart:
    /// `nft-ip-then.txt`.
    pub name: String,
    /// What it holds.
    pub text: String,
}

/// `name`, or with `-then` if a file has it already.
fn free_name(files: &[RuleFile], name: &str) -> String {
    if files.iter().all(|file| file.name != name) {
        return name.to_owned();
    }
    let (stem, extension) = name.split_once('.').unwrap_or((name, ""));
    format!("{stem}-then.{extension}")
}

/// The input of `ip -batch` that binds addresses, and unbinds those of an earlier step that are
/// not among them.
pub(super) fn address_batch(bound: &[IpAddr], addresses: &[IpAddr]) -> String {
    let wanted: HashSet<&IpAddr> = addresses.iter().collect();
    let known: HashSet<&IpAddr> = bound.iter().collect();
    let mut text = String::new();
    for address in addresses.iter().filter(|address| !known.contains(address)) {
        // Writing into a String cannot fail, here and below.
        let _ = writeln!(text, "address replace {address} dev {}", ipvs::LINK);
    }
    for address in bound.iter().filter(|address| !wanted.contains(address)) {
        let _ = writeln!(text, "address del {address} dev {}", ipvs::LINK);
    }
    text
}

impl Step {
    /// The program that does it, and what to do where that is not installed; `None`: the shell does.
    fn needs(&self) -> Option<(String, &'static str)> {
        Some(match self {
            Self::Sysctl(_) => return None,
            Self::Accounting(_) => (
                "nfacct".to_owned(),
                "the rules count with it: install the package nfacct, or render with --no-nfacct",
            ),
            Self::Iptables {
                family, backend, ..
            } => (
                format!("{}-restore", backend.tool(*family)),
                "install the package iptables",
            ),
            Self::Servers { .. } => ("ipvsadm".to_owned(), "install the package ipvsadm"),
            Self::Sets { .. } => ("ipset".to_owned(), "install the package ipset"),
            Self::Addresses { .. } => ("ip".to_owned(), "install the package iproute2"),
            Self::Nft { .. } => ("nft".to_owned(), "install the package nftables"),
        })
    }
}

/// The begin of a script that does these steps: it ends if a program is missing, before anything is changed.
pub(super) fn needs(steps: &[Step]) -> String {
    let mut text = String::new();
    let mut known = HashSet::new();
    for (program, remedy) in steps.iter().filter_map(Step::needs) {
        if !known.insert(program.clone()) {
            continue;
        }
        // Writing into a String cannot fail.
        let _ = writeln!(
            text,
            "command -v {program} > /dev/null || {{ echo 'nothing is loaded: {program} is not installed; {remedy}' >&2; \
             exit 1; }}"
        );
    }
    text
}

impl RuleSet {
    /// Each step's text under its name, and `load.sh`, which loads them in kube-proxy's order.
    pub fn files(&self) -> Vec<RuleFile> {
        let mut files: Vec<RuleFile> = Vec::new();
        let mut script = String::from(
            "#!/bin/sh\n# Loads the rules beside this file, in kube-proxy's order.\nset -e\n\
             cd \"$(dirname \"$0\")\"\n",
        );
        script.push_str(&needs(&self.steps));
        let mut bound: Option<&[IpAddr]> = None;
        for step in &self.steps {
            let file = match step {
                Step::Sysctl(Sysctl { path, value, .. }) => {
                    // Writing into a String cannot fail, here and below.
                    if path.starts_with("net/ipv4/vs/") {
                        script.push_str("modprobe -q ip_vs || true\n");
                    }
                    let _ = writeln!(script, "echo {value} > /proc/sys/{path}");
                    continue;
                }
                Step::Accounting(name) => {
                    let _ = writeln!(
                        script,
                        "nfacct get {name} > /dev/null 2>&1 || nfacct add {name} || {NO_NFACCT}"
                    );
                    continue;
                }
                Step::Iptables {
                    family,
                    backend,
                    text,
                } => {
                    let name = free_name(
                        &files,
                        match family {
                            Family::V4 => "iptables.save",
                            Family::V6 => "ip6tables.save",
                        },
                    );
                    let tool = backend.tool(*family);
                    let _ = writeln!(script, "{tool}-restore --noflush < {name}");
                    RuleFile {
                        name,
                        text: text.clone(),
                    }
                }
                Step::Servers { text } => {
                    let name = free_name(&files, "ipvsadm.save");
                    let _ = writeln!(script, "ipvsadm -R < {name}");
                    RuleFile {
                        name,
                        text: text.clone(),
                    }
                }
                Step::Sets { text } => {
                    let name = free_name(&files, "ipset.save");
                    let _ = writeln!(script, "ipset restore < {name}");
                    RuleFile {
                        name,
                        text: text.clone(),
                    }
                }
                Step::Addresses { addresses } => {
                    let name = free_name(&files, "ip-addr.batch");
                    let link = ipvs::LINK;
                    let _ = writeln!(
                        script,
                        "ip link show {link} > /dev/null 2>&1 || ip link add {link} type dummy\n\
                         ip -batch {name}"
                    );
                    let text = address_batch(bound.unwrap_or_default(), addresses);
                    bound = Some(addresses);
                    RuleFile { name, text }
                }
                Step::Nft { family, text } => {
                    let name = free_name(
                        &files,
                        match family {
                            Family::V4 => "nft-ip.txt",
                            Family::V6 => "nft-ip6.txt",
                        },
                    );
                    let _ = writeln!(script, "nft -f {name}");
                    RuleFile {
                        name,
                        text: text.clone(),
                    }
                }
            };
            files.push(file);
        }
        if let Some(bound) = bound {
            files.push(RuleFile {
                name: "ip-addr.txt".to_owned(),
                text: address_listing(bound),
            });
        }
        files.push(RuleFile {
            name: "load.sh".to_owned(),
            text: script,
        });
        files
    }
}

/// Addresses of `kube-ipvs0` as `ip addr` shows them.
pub(super) fn address_listing(addresses: &[IpAddr]) -> String {
    let mut text = format!("1: {}: <BROADCAST,NOARP> mtu 1500\n", ipvs::LINK);
    for address in addresses {
        let (family, length) = match address {
            IpAddr::V4(_) => ("inet", 32),
            IpAddr::V6(_) => ("inet6", 128),
        };
        // Writing into a String cannot fail.
        let _ = writeln!(
            text,
            "    {family} {address}/{length} scope global {}\n       valid_lft forever preferred_lft forever",
            ipvs::LINK
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::Mode;

    /// Whatever is missing is named before the first change, with what to do.
    #[test]
    fn a_script_asks_for_its_programs_first() {
        let dir = tempfile::tempdir().expect("a folder");
        let made = dir.path().join("made");
        let sysctl = Step::Sysctl(Sysctl {
            path: "net/ipv4/ip_forward",
            value: "1",
            needed_for: None,
        });
        let counter = Step::Accounting("ct_state_invalid_dropped_pkts");
        let set = RuleSet {
            mode: Mode::IptablesLegacy,
            steps: vec![sysctl, counter.clone(), counter],
        };
        let run = |programs: &[&str], script: &str| {
            let path = dir.path().join("bin");
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir(&path).expect("made");
            for program in programs {
                let file = path.join(program);
                std::fs::write(&file, "#!/bin/sh\n").expect("written");
                let rights = std::os::unix::fs::PermissionsExt::from_mode(0o755);
                std::fs::set_permissions(&file, rights).expect("set");
            }
            // What it would change is a file here.
            let script = script.replace(
                "/proc/sys/net/ipv4/ip_forward",
                made.to_str().expect("UTF-8"),
            );
            let script = script
                .replace("cat >", "/bin/cat >")
                .replace("sh <<", "/bin/sh <<");
            let mut command = std::process::Command::new("/bin/sh");
            command.args(["-c", &script]).env("PATH", &path);
            let output = command.output().expect("runs");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            (
                output.status.code(),
                said,
                std::fs::remove_file(&made).is_ok(),
            )
        };
        let files = set.files();
        let load = files.iter().find(|file| file.name == "load.sh");
        let load = load
            .expect("is there")
            .text
            .replace("cd \"$(dirname \"$0\")\"\n", "");
        for script in [load, set.script()] {
            let (code, said, changed) = run(&[], &script);
            assert_eq!((code, changed), (Some(1), false), "{said}");
            assert_eq!(
                said,
                "nothing is loaded: nfacct is not installed; the rules count with it: install the package nfacct, or \
                 render with --no-nfacct\n"
            );
            let (code, said, changed) = run(&["nfacct"], &script);
            assert_eq!((code, changed), (Some(0), true), "{said}");
        }
        assert_eq!(needs(&[]), "");
    }

    #[test]
    fn steps_of_one_kind_have_files_of_their_own() {
        let nft = |text: &str| Step::Nft {
            family: Family::V4,
            text: text.to_owned(),
        };
        let bind = |last: &[u8]| Step::Addresses {
            addresses: last.iter().map(|last| [10, 96, 0, *last].into()).collect(),
        };
        let set = RuleSet {
            mode: Mode::Nftables,
            steps: vec![nft("a"), bind(&[1, 2]), nft("b"), bind(&[2])],
        };
        let files = set.files();
        let named = |name: &str| {
            let file = files.iter().find(|file| file.name == name);
            file.map(|file| file.text.as_str()).expect(name)
        };
        assert_eq!(named("nft-ip.txt"), "a");
        assert_eq!(named("nft-ip-then.txt"), "b");
        let two =
            "address replace 10.96.0.1 dev kube-ipvs0\naddress replace 10.96.0.2 dev kube-ipvs0\n";
        assert_eq!(named("ip-addr.batch"), two);
        assert_eq!(
            named("ip-addr-then.batch"),
            "address del 10.96.0.1 dev kube-ipvs0\n"
        );
        let bound = "    inet 10.96.0.2/32 scope global kube-ipvs0\n       \
                     valid_lft forever preferred_lft forever\n";
        assert!(named("ip-addr.txt").ends_with(bound));
        assert!(!named("ip-addr.txt").contains("10.96.0.1/"));
        assert!(named("load.sh").contains("\nnft -f nft-ip-then.txt\n"));
    }
}
