//! The rules of a live node, read with the tools that operators read them with.
//!
//! Only back ends that are in use are asked: their tools would load the modules of the others.

use std::fmt::Write as _;
use std::path::Path;

use super::netns::Netns;
use super::nft::{self, NftError};
use super::tool::{self, ToolError};
use crate::cluster::Family;
use crate::rules::Backend;
use crate::rules::dump::{FamilyTexts, Source, Texts};
use crate::rules::services::NftTable;

/// Why a node's rules cannot be listed.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// One of the tools.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The kernel's list of nftables tables.
    #[error("{source}{}", if is_refused(source) { "; run as root (CAP_NET_ADMIN)" } else { "" })]
    Nft {
        /// What went wrong.
        #[from]
        source: NftError,
    },
}

impl DumpError {
    /// Were rights lacking?
    pub fn is_not_permitted(&self) -> bool {
        match self {
            Self::Tool(error) => error.is_not_permitted(),
            Self::Nft { source } => is_refused(source),
        }
    }
}

fn is_refused(error: &NftError) -> bool {
    matches!(error, NftError::Netlink { source, .. } if source.errno() == Some(libc::EPERM))
}

/// Everything that the namespace holds now. Changes nothing.
///
/// # Errors
///
/// A tool is missing or fails, or the kernel does not list its tables.
pub fn dump(ns: &Netns) -> Result<Texts, DumpError> {
    let tables = list_tables(ns)?;
    let [v4, v6] = Family::ALL.map(|family| dump_family(ns, family, &tables));
    let mut texts = Texts {
        v4: v4?,
        v6: v6?,
        nft_tables: Some(tables),
        ..Texts::default()
    };
    if in_use(ns, "/proc/net/ip_vs") {
        texts.servers = Some(ask(ns, "ipvsadm", &["-Sn"])?);
        texts.sets = Some(ask(ns, "ipset", &["save"])?);
    }
    texts.addresses = Some(ask(ns, "ip", &["addr", "show"])?);
    Ok(texts)
}

fn dump_family(ns: &Netns, family: Family, tables: &Source) -> Result<FamilyTexts, ToolError> {
    let names = match family {
        Family::V4 => "/proc/net/ip_tables_names",
        Family::V6 => "/proc/net/ip6_tables_names",
    };
    let mut texts = FamilyTexts::default();
    if in_use(ns, names) {
        texts
            .iptables
            .push(ask(ns, &save_tool(Backend::Legacy, family), &[])?);
    }
    // Where nobody has used iptables-nft, its package may be missing.
    if has_tables_of_iptables(tables, family) {
        texts
            .iptables
            .push(ask(ns, &save_tool(Backend::Nft, family), &[])?);
    }
    let table = format!("table {} kube-proxy", family.nft());
    texts.nft = Some(if tables.text.lines().any(|line| line == table) {
        ask(ns, "nft", &["list", "table", family.nft(), "kube-proxy"])?
    } else {
        Source {
            origin: tables.origin.clone(),
            text: String::new(),
        }
    });
    Ok(texts)
}

/// What `nft list tables` prints.
fn list_tables(ns: &Netns) -> Result<Source, NftError> {
    let mut text = String::new();
    for (family, table) in nft::tables(ns)? {
        let _ = writeln!(text, "table {} {table}", nft::family_name(family));
    }
    Ok(Source {
        origin: "the kernel's list of nftables tables".to_owned(),
        text,
    })
}

/// Are there tables that iptables-nft makes?
fn has_tables_of_iptables(tables: &Source, family: Family) -> bool {
    let ours = NftTable::IPTABLES.map(|name| format!("table {} {name}", family.nft()));
    tables
        .text
        .lines()
        .any(|line| ours.iter().any(|our| our == line))
}

fn save_tool(backend: Backend, family: Family) -> String {
    format!("{}-save", backend.tool(family))
}

/// Does this file of the namespace's `/proc/net` exist and say something?
fn in_use(ns: &Netns, path: &str) -> bool {
    ns.run(|| {
        let own = path.replacen("/proc/net", "/proc/thread-self/net", 1);
        std::fs::read(Path::new(&own)).is_ok_and(|bytes| !bytes.is_empty())
    })
    .unwrap_or(false)
}

fn ask(ns: &Netns, program: &str, args: &[&str]) -> Result<Source, ToolError> {
    let text = tool::run(ns, program, args, "")?;
    let mut origin = program.to_owned();
    for arg in args {
        origin.push(' ');
        origin.push_str(arg);
    }
    Ok(Source { origin, text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_iptables_are_known_by_family_and_name() {
        let tables = |text: &str| Source {
            origin: String::new(),
            text: text.to_owned(),
        };
        let has =
            |text: &str| Family::ALL.map(|family| has_tables_of_iptables(&tables(text), family));
        assert_eq!(has("table ip nat\n"), [true, false]);
        assert_eq!(
            has("table ip kube-proxy\ntable ip6 filter\n"),
            [false, true]
        );
        assert_eq!(
            has("table inet filter\ntable ip nat-of-mine\n"),
            [false, false]
        );
    }
}
