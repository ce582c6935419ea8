//! A partial sync of iptables mode: the chains that all Services share in full, the chains of
//! those that changed, and the deletion of chains that nothing uses any more.

use std::collections::HashSet;

use crate::cluster::Family;
use crate::rules::NodeView;
use crate::rules::ports::Ports;
use crate::rules::sync::Changes;

use super::render::{
    ChainNames, FILTER_CHAINS, LOCALNET_CHAIN, NAT_CHAINS, Tables, push_all, push_chains,
};

/// The `iptables-restore --noflush` input that kube-proxy sends when `old` has become `new`.
///
/// Base chains' jumps and the canaries are there and not touched. In a large cluster kube-proxy
/// puts the deletion of chains off to a later sync, at most one sync period away; here it is then
/// left out.
pub(in crate::rules) fn sync(
    old: &Ports<'_>,
    new: &Ports<'_>,
    node: &NodeView,
    family: Family,
) -> String {
    let changes = Changes::between(old, new);
    let mut tables = Tables::new(new, node, family);
    let mut used: HashSet<String> = HashSet::new();
    for port in &new.list {
        let changed = changes.is_changed(port);
        tables.push_port(port, changed);
        if changed {
            ChainNames::each_chain(port, |prefix, hash| {
                used.insert(format!("{prefix}{hash}"));
            });
        }
    }
    if !new.large {
        for port in old.list.iter().filter(|port| changes.is_changed(port)) {
            ChainNames::each_chain(port, |prefix, hash| {
                let chain = format!("{prefix}{hash}");
                if !used.contains(&chain) {
                    // The declaration empties it.
                    push_chains(&mut tables.nat_chains, &[&chain]);
                    push_all(&mut tables.nat, &["-X ", &chain, "\n"]);
                }
            });
        }
    }
    tables.finish();

    let mut text = String::with_capacity(tables.nat.len() + tables.filter.len() + 4096);
    text.push_str("*filter\n");
    push_chains(&mut text, &FILTER_CHAINS);
    if node.serves_localhost(family) {
        push_chains(&mut text, &[LOCALNET_CHAIN]);
    }
    push_all(&mut text, &[&tables.filter, "COMMIT\n*nat\n"]);
    push_chains(&mut text, &NAT_CHAINS);
    push_all(&mut text, &[&tables.nat_chains, &tables.nat, "COMMIT\n"]);
    text
}
