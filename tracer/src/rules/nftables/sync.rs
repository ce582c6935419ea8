//! A partial sync of nftables mode: chains of Services that changed, and elements that did.

use std::collections::HashSet;

use crate::cluster::Family;
use crate::rules::NodeView;
use crate::rules::iptables::push_all;
use crate::rules::ports::Ports;
use crate::rules::sync::Changes;

use super::render::{Elements, Names, Writer, push_elements};

/// The `nft -f` scripts, each one transaction, that kube-proxy sends when `old` has become `new`;
/// empty if there is nothing to do.
///
/// The first empties the chains that nothing uses any more, the second deletes them. kube-proxy
/// sends the second with its next sync, a second later at least: kernels before 6.2 still count a
/// deleted map element as a use of its chain for a moment.
pub(in crate::rules) fn sync(
    old: &Ports<'_>,
    new: &Ports<'_>,
    node: &NodeView,
    family: Family,
) -> [String; 2] {
    let table = format!("{} kube-proxy", family.nft());
    let changes = Changes::between(old, new);
    let mut before = Writer::new(old, node, family);
    let mut after = Writer::new(new, node, family);
    after.flush = true;
    let mut used: HashSet<String> = HashSet::new();
    for port in &new.list {
        let names = Names::of(port);
        after.push_elements(port, &names);
        if changes.is_changed(port) {
            after.push_chains(port, &names);
            let (chains, sets) = names.all(port);
            used.extend(chains);
            used.extend(sets);
        }
    }
    let (mut stale, mut delete_sets, mut delete_chains) =
        (String::new(), String::new(), String::new());
    for port in &old.list {
        let names = Names::of(port);
        before.push_elements(port, &names);
        if !changes.is_changed(port) {
            continue;
        }
        let (chains, sets) = names.all(port);
        for chain in chains.iter().filter(|chain| !used.contains(*chain)) {
            push_all(&mut stale, &["flush chain ", &table, " ", chain, "\n"]);
            push_all(
                &mut delete_chains,
                &["delete chain ", &table, " ", chain, "\n"],
            );
        }
        for set in sets.iter().filter(|set| !used.contains(*set)) {
            push_all(&mut delete_sets, &["delete set ", &table, " ", set, "\n"]);
        }
    }

    let mut text = after.sets;
    push_all(&mut text, &[&after.chains, &after.rules]);
    for ((name, old), (_, new)) in before
        .elements
        .named()
        .into_iter()
        .zip(after.elements.named())
    {
        push_differences(&mut text, &table, name, old, new);
    }
    push_all(&mut text, &[&stale, &delete_sets]);
    [text, delete_chains]
}

/// Elements that are gone or have another value are deleted, those that are new or have another
/// value are added.
fn push_differences(text: &mut String, table: &str, name: &str, old: &Elements, new: &Elements) {
    let gone = old
        .iter()
        .filter(|(key, value)| new.get(key) != Some(*value));
    push_elements(text, "delete", table, name, gone.map(|(key, _)| (key, "")));
    let added = new
        .iter()
        .filter(|(key, value)| old.get(key) != Some(*value));
    push_elements(text, "add", table, name, added);
}
