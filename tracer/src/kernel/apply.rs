//! Loading rules into a namespace, flushing, removing and counting them, with the tools that
//! operators and kube-proxy use.
//!
//! Nothing here acts outside the namespace it is given.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::IpAddr;

use super::netns::{Netns, NetnsError};
use super::nfacct::{self, NfacctError};
use super::nft::{self, NftError};
use super::sysctl::{self, SysctlError};
use super::tool::{self, ToolError};
use crate::cluster::Family;
use crate::rules::{Backend, Mode, RuleCounts, RuleSet, Step, Sysctl, iptables, ipvs, nftables};

/// Why rules could not be loaded, flushed, removed or counted.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A tool failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// nfacct failed.
    #[error(transparent)]
    Nfacct(#[from] NfacctError),
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A kernel parameter that the mode needs does not exist.
    #[error(
        "/proc/sys/{path} does not exist in namespace {namespace}, so the kernel lacks {needed_for}: \
         load the module or use a kernel that has it"
    )]
    NoSysctl {
        /// Path under `/proc/sys`.
        path: &'static str,
        /// The namespace.
        namespace: String,
        /// What for.
        needed_for: &'static str,
    },
    /// Another kernel parameter could not be set.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// An nftables table could not be counted.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The kernel's list of IPVS servers could not be read.
    #[error("cannot read /proc/net/ip_vs in namespace {namespace}: {source}")]
    Ipvs {
        /// The namespace.
        namespace: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Makes the namespace hold exactly the Service rules of `set`, in kube-proxy's order of steps.
///
/// A namespace without rules gets each step's text as it stands. Where rules of the same mode are
/// already, only what kube-proxy's sync would change is changed: applying twice is the same as
/// once. Rules of others stay.
pub fn apply(ns: &Netns, set: &RuleSet) -> Result<(), ApplyError> {
    for step in &set.steps {
        match step {
            Step::Sysctl(sysctl) => write_sysctl(ns, *sysctl)?,
            Step::Accounting(name) => nfacct::ensure(ns, name)?,
            Step::Iptables {
                family,
                backend,
                text,
            } => restore(ns, *backend, *family, text)?,
            Step::Servers { text } => {
                let current = tool::run(ns, "ipvsadm", &["-Sn"], "")?;
                let change = ipvs::update_servers(&current, text);
                if !change.is_empty() {
                    tool::run(ns, "ipvsadm", &["-R"], &change)?;
                }
            }
            Step::Addresses { addresses } => bind_addresses(ns, addresses)?,
            Step::Sets { text } => {
                let current = tool::run(ns, "ipset", &["save"], "")?;
                let change = ipvs::update_sets(&current, text);
                if !change.is_empty() {
                    tool::run(ns, "ipset", &["restore"], &change)?;
                }
            }
            Step::Nft { family, text } => {
                let current = tool::run(ns, "nft", &["list", "chains", family.nft()], "")?;
                tool::run(
                    ns,
                    "nft",
                    &["-f", "-"],
                    &nftables::update(&current, *family, text),
                )?;
            }
        }
    }
    Ok(())
}

/// Does what an operator does to flush every Service rule of the mode, in both families: chains,
/// sets, addresses and the filter table stay. Returns the command lines.
pub fn flush(ns: &Netns, mode: Mode) -> Result<Vec<String>, ApplyError> {
    let commands: Vec<(&str, Vec<&str>)> = match mode {
        Mode::IptablesLegacy | Mode::IptablesNft => {
            let backend = backend_of(mode);
            Family::ALL
                .map(|family| (backend.tool(family), vec!["-t", "nat", "-F"]))
                .into()
        }
        Mode::Ipvs => vec![("ipvsadm", vec!["-C"])],
        Mode::Nftables => Family::ALL
            .map(|family| ("nft", vec!["flush", "table", family.nft(), "kube-proxy"]))
            .into(),
    };
    let mut done = Vec::with_capacity(commands.len());
    for (tool, args) in commands {
        tool::run(ns, tool, &args, "")?;
        done.push(format!("{tool} {}", args.join(" ")));
    }
    Ok(done)
}

/// Takes the mode's rules away as `kube-proxy --cleanup` does, and leaves those of others.
///
/// Like kube-proxy it leaves kernel parameters, nfacct objects and iptables' own base chains.
pub fn remove(ns: &Netns, mode: Mode) -> Result<(), ApplyError> {
    if mode == Mode::Ipvs {
        tool::run(ns, "ipvsadm", &["-C"], "")?;
        if bound_addresses(ns)?.is_some() {
            tool::run(ns, "ip", &["link", "delete", ipvs::LINK], "")?;
        }
    }
    if let Some(backend) = mode.backend() {
        for family in Family::ALL {
            if let Some(text) = iptables::removal(&save(ns, backend, family)?) {
                load(ns, backend, family, &text)?;
            }
        }
    }
    match mode {
        Mode::Ipvs => {
            let names = tool::run(ns, "ipset", &["list", "-n"], "")?;
            let mut text = String::new();
            for name in ipvs::set_names(&names) {
                // Writing into a String cannot fail.
                let _ = writeln!(text, "destroy {name}");
            }
            if !text.is_empty() {
                tool::run(ns, "ipset", &["restore"], &text)?;
            }
        }
        Mode::Nftables => {
            for family in Family::ALL {
                if has_table(ns, family)? {
                    let ip = family.nft();
                    tool::run(ns, "nft", &["delete", "table", ip, "kube-proxy"], "")?;
                }
            }
        }
        Mode::IptablesLegacy | Mode::IptablesNft => {}
    }
    Ok(())
}

/// Counts the mode's Service rules in the kernel.
pub fn count(ns: &Netns, mode: Mode) -> Result<RuleCounts, ApplyError> {
    let mut counts = RuleCounts::default();
    if let Some(backend) = mode.backend() {
        for family in Family::ALL {
            counts.rules += iptables::count(&save(ns, backend, family)?);
        }
    }
    match mode {
        Mode::Ipvs => {
            (counts.virtual_servers, counts.real_servers) = ipvs::count_servers(&read_servers(ns)?);
            let sets = tool::run(ns, "ipset", &["save"], "")?;
            counts.elements = ipvs::count_entries(&sets);
        }
        Mode::Nftables => {
            for family in Family::ALL {
                let table = nft::count(ns, family, "kube-proxy")?;
                counts.rules += table.rules;
                counts.elements += table.elements;
            }
        }
        Mode::IptablesLegacy | Mode::IptablesNft => {}
    }
    Ok(counts)
}

/// The back end of a mode that certainly has one.
fn backend_of(mode: Mode) -> Backend {
    mode.backend().unwrap_or(Backend::Nft)
}

fn write_sysctl(ns: &Netns, sysctl: Sysctl) -> Result<(), ApplyError> {
    let Sysctl {
        path,
        value,
        needed_for,
    } = sysctl;
    match (sysctl::write(ns, path, value), needed_for) {
        (Err(error), None) if error.is_missing() => Ok(()),
        (Err(error), Some(needed_for)) if error.is_missing() => Err(ApplyError::NoSysctl {
            path,
            namespace: ns.name().to_owned(),
            needed_for,
        }),
        (written, _) => Ok(written?),
    }
}

/// The kernel's IPVS servers, as `/proc/net/ip_vs` lists them.
fn read_servers(ns: &Netns) -> Result<String, ApplyError> {
    // /proc/net would be the that of the process's first thread.
    match ns.run(|| fs::read_to_string("/proc/thread-self/net/ip_vs"))? {
        // A kernel without IPVS, or one that has not loaded it yet, has no servers.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        result => result.map_err(|source| ApplyError::Ipvs {
            namespace: ns.name().to_owned(),
            source,
        }),
    }
}

/// Brings the mode's iptables rules to `text`.
fn restore(ns: &Netns, backend: Backend, family: Family, text: &str) -> Result<(), ApplyError> {
    let current = save(ns, backend, family)?;
    load(ns, backend, family, &iptables::update(&current, text))
}

fn save(ns: &Netns, backend: Backend, family: Family) -> Result<String, ApplyError> {
    let tool = format!("{}-save", backend.tool(family));
    Ok(tool::run(ns, &tool, &[], "")?)
}

fn load(ns: &Netns, backend: Backend, family: Family, text: &str) -> Result<(), ApplyError> {
    let tool = format!("{}-restore", backend.tool(family));
    // kube-proxy's own flags, but for --counters: there are none to keep in a new node.
    tool::run(ns, &tool, &["-w", "5", "--noflush"], text)?;
    Ok(())
}

/// The addresses of the dummy link, or `None` if there is no such link.
fn bound_addresses(ns: &Netns) -> Result<Option<Vec<IpAddr>>, ApplyError> {
    // All links are listed, because a missing one would be an error like any other.
    let links = tool::run(ns, "ip", &["-o", "link", "show"], "")?;
    let exists = links
        .lines()
        .filter_map(|line| line.split(": ").nth(1))
        .any(|name| name == ipvs::LINK);
    if !exists {
        return Ok(None);
    }
    let shown = tool::run(ns, "ip", &["-o", "address", "show", "dev", ipvs::LINK], "")?;
    Ok(Some(shown.lines().filter_map(parse_address).collect()))
}

/// The address in a line of `ip -o address show`, unless it is the link's own.
fn parse_address(line: &str) -> Option<IpAddr> {
    let mut words = line.split_whitespace();
    words.find(|word| *word == "inet" || *word == "inet6")?;
    let address = words.next()?.split('/').next()?.parse().ok()?;
    let link_local = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    (!link_local).then_some(address)
}

/// Makes the dummy link hold exactly these addresses, with one `ip` process.
fn bind_addresses(ns: &Netns, addresses: &[IpAddr]) -> Result<(), ApplyError> {
    use std::collections::HashSet;

    let bound = bound_addresses(ns)?;
    let mut batch = String::new();
    // Writing into a String cannot fail, here and below.
    if bound.is_none() {
        let _ = writeln!(batch, "link add {} type dummy", ipvs::LINK);
    }
    let bound: HashSet<IpAddr> = bound.unwrap_or_default().into_iter().collect();
    let wanted: HashSet<IpAddr> = addresses.iter().copied().collect();
    for address in addresses.iter().filter(|address| !bound.contains(*address)) {
        let _ = writeln!(batch, "address add {address} dev {}", ipvs::LINK);
    }
    for address in bound.iter().filter(|address| !wanted.contains(*address)) {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        let _ = writeln!(
            batch,
            "address delete {address}/{prefix} dev {}",
            ipvs::LINK
        );
    }
    if !batch.is_empty() {
        tool::run(ns, "ip", &["-batch", "-"], &batch)?;
    }
    Ok(())
}

fn has_table(ns: &Netns, family: Family) -> Result<bool, ApplyError> {
    let tables = tool::run(ns, "nft", &["list", "tables", family.nft()], "")?;
    let table = format!("table {} kube-proxy", family.nft());
    Ok(tables.lines().any(|line| line == table))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let v4 =
            "4: kube-ipvs0    inet 10.96.0.1/32 scope global kube-ipvs0\\       valid_lft forever";
        assert_eq!(parse_address(v4), Some(IpAddr::from([10, 96, 0, 1])));
        let local = "4: kube-ipvs0    inet6 fe80::1/64 scope link \\       valid_lft forever";
        assert_eq!(parse_address(local), None);
    }
}
