//! The rules of a live node, read with the tools that operators read them with.
//!
//! Only back ends that are in use are asked: their tools would load the modules of the others.

use std::path::Path;

use super::netns::Netns;
use super::tool::{self, ToolError};
use crate::cluster::Family;
use crate::rules::Backend;
use crate::rules::dump::{FamilyTexts, Source, Texts};

/// Everything that the namespace holds now. Changes nothing.
pub fn dump(ns: &Netns) -> Result<Texts, ToolError> {
    let tables = ask(ns, "nft", &["list", "tables"])?;
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
    texts
        .iptables
        .push(ask(ns, &save_tool(Backend::Nft, family), &[])?);
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
