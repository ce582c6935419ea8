//! Are the rules on a node the ones that its cluster calls for?
//!
//! Each back end compares what it would install with what a dump holds and says what differs, in
//! the words of this room; this file asks all of them, because a node can also hold what another
//! mode left behind.

use std::cell::OnceCell;
use std::fmt;
use std::panic::resume_unwind;
use std::thread;

use serde::Serialize;

use super::dump::{self, Texts, Unreadable};
use super::iptables::rule::Tables;
use super::nftables::claims::Claims;
use super::nftables::table::Ruleset;
use super::{Mode, NodeView, RuleSet, Step, iptables, ipvs, nftables, render};
use crate::cluster::{Cluster, Family};

/// How a rule differs from what is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Called for, and not there.
    Missing,
    /// There, but not as called for.
    Altered,
    /// There, and of an older state of this cluster: a Service, endpoint or chain that is gone.
    Stale,
    /// There, and written by another mode that was not cleaned up.
    Leftover,
    /// There without being called for, and not explained by the above.
    Extra,
    /// No longer called for, harmless, and kube-proxy's own to remove: a real server that gets no new
    /// flows and lives until its last connection ends, a chain emptied for the next sync to delete.
    Draining,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Missing => "missing",
            Self::Altered => "altered",
            Self::Stale => "stale",
            Self::Leftover => "leftover",
            Self::Extra => "extra",
            Self::Draining => "draining",
        })
    }
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How it differs.
    pub kind: Kind,
    /// The IP family of the rules.
    pub family: Family,
    /// Where: table and chain, set, map, virtual server or link, such as `nat KUBE-SERVICES`.
    pub place: String,
    /// The rule, element or server, as the dump's tool prints it.
    pub rule: String,
    /// For [`Kind::Altered`]: what is there instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
    /// The line of the dump, from 1, where something that is there stands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
    /// `ns/name:port` of the Service concerned; `None` for what all Services share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// What a packet to the Service suffers, one sentence without a full stop.
    pub effect: String,
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The node.
    pub node: String,
    /// The mode whose rules were called for.
    pub mode: Mode,
    /// Services that have rules on the node.
    pub services: usize,
    /// Endpoints of these Services, ready or not.
    pub endpoints: usize,
    /// In iptables modes, the back end whose rules these are; `None` if the dump does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub back_end: Option<Mode>,
    /// What a reader has to know before the differences.
    pub notes: Vec<String>,
    /// The IP families that were checked: not IPv6 if neither the cluster nor the node has any of it.
    pub families: Vec<Family>,
    /// Every difference.
    pub differences: Vec<Finding>,
    /// What is on its way out: [`Kind::Draining`], which is no difference.
    pub draining: Vec<Finding>,
}

/// Why rules could not be checked.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// A dump that the mode needs is missing.
    #[error("there is no {file}, which the check of {mode} mode needs: make it with `{command}`")]
    NoDump {
        /// The file.
        file: &'static str,
        /// The mode.
        mode: &'static str,
        /// What makes the file.
        command: &'static str,
    },
    /// A dump cannot be read.
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
}

/// Compares the rules that `cluster` calls for on `node` with a node's dumps, in both families.
pub fn check(
    cluster: &Cluster,
    node: &NodeView,
    mode: Mode,
    texts: &Texts,
) -> Result<Report, CheckError> {
    let mut node = node.clone();
    let mut saves = Family::ALL.into_iter().flat_map(|f| &texts.of(f).iptables);
    node.nfacct = saves.any(|save| iptables::uses_nfacct(&save.text));
    let rules = OnceCell::new();
    // At 30,000 Services each of the two takes most of a second.
    let (found, expected) = thread::scope(|scope| {
        let found = scope.spawn(|| Found::parse(texts));
        let rules = rules.get_or_init(|| render(cluster, &node, mode));
        let expected = Expected::of(cluster, &node, rules);
        let found = found.join().unwrap_or_else(|panic| resume_unwind(panic));
        (found, expected)
    });
    let (found, expected) = (found?, expected?);
    let mut differences = Vec::new();
    let mut notes = Vec::new();
    let mut back_end = None;
    let families = families_in_use(cluster, texts);
    for (index, family) in Family::ALL.into_iter().enumerate() {
        if !families.contains(&family) {
            continue;
        }
        let tables = expected.iptables[index].as_ref();
        let tables_there = &found.iptables[index];
        let before = differences.len();
        let chosen = check_iptables(mode, family, tables, tables_there, &mut differences)?;
        let kube_proxys = chosen.and_then(|index| tables_there.get(index));
        if let Some(sign) = kube_proxys.and_then(|it| iptables::of_another_version(it, mode)) {
            iptables::do_not_judge(&mut differences[before..]);
            notes.push(format!("{family}: {}", iptables::note(sign)));
        }
        let save = chosen.and_then(|index| texts.of(family).iptables.get(index));
        back_end = back_end.or(save.and_then(dump::back_end));
        let table = expected.nft[index].as_ref();
        check_nftables(
            mode,
            family,
            table,
            found.nft[index].as_ref(),
            &mut differences,
        )?;
    }
    let wanted = expected.ipvs.as_ref();
    check_ipvs(cluster, &node, wanted, texts, &found.ipvs, &mut differences)?;
    differences.retain(|finding| families.contains(&finding.family));
    let has_rules = |service: &&crate::cluster::Service| !service.cluster_ips.is_empty();
    let services = || cluster.services.iter().filter(has_rules);
    let endpoints = services().flat_map(|s| &s.ports).map(|p| p.endpoints.len());
    let (draining, differences) = differences
        .into_iter()
        .partition(|finding| finding.kind == Kind::Draining);
    let uses_iptables = matches!(mode, Mode::IptablesLegacy | Mode::IptablesNft);
    Ok(Report {
        node: node.name,
        mode,
        back_end: back_end.filter(|_| uses_iptables),
        notes,
        families,
        services: services().count(),
        endpoints: endpoints.sum(),
        differences,
        draining,
    })
}

/// The families that kube-proxy serves on the node. Where the machine has no IPv6 it serves IPv4 alone,
/// which shows in rules without any trace of IPv6; a Service with an IPv6 address wants it all the same.
fn families_in_use(cluster: &Cluster, texts: &Texts) -> Vec<Family> {
    let wanted = cluster
        .services
        .iter()
        .flat_map(|service| &service.cluster_ips)
        .any(|ip| Family::of(*ip) == Family::V6);
    let there = || {
        let dumps = texts.of(Family::V6);
        let nft = dumps.nft.iter().chain(&dumps.nft_json);
        dumps
            .iptables
            .iter()
            .any(|save| save.text.contains("KUBE-"))
            || nft.into_iter().any(|list| list.text.contains("kube-proxy"))
            || texts.sets.iter().any(|save| save.text.contains("KUBE-6-"))
    };
    if wanted || there() {
        Family::ALL.to_vec()
    } else {
        vec![Family::V4]
    }
}

/// Everything that the dumps hold, for each family of [`Family::ALL`].
struct Found<'a> {
    iptables: [Vec<Tables<'a>>; 2],
    nft: [Option<(Ruleset, nftables::check::Form)>; 2],
    ipvs: ipvs::check::Found,
}

impl<'a> Found<'a> {
    fn parse(texts: &'a Texts) -> Result<Self, Unreadable> {
        let [v4, v6] = Family::ALL;
        Ok(Self {
            iptables: [dump::saves(texts, v4)?, dump::saves(texts, v6)?],
            nft: [dump::ruleset(texts, v4)?, dump::ruleset(texts, v6)?],
            ipvs: dump::ipvs_state(texts)?,
        })
    }
}

/// What is called for, read from what was rendered, for each family of [`Family::ALL`]; `None` for
/// what the mode does not use.
struct Expected<'a> {
    iptables: [Option<Tables<'a>>; 2],
    nft: [Option<(Ruleset, Claims)>; 2],
    ipvs: Option<ipvs::check::Wanted>,
}

impl<'a> Expected<'a> {
    fn of(cluster: &Cluster, node: &NodeView, rules: &'a RuleSet) -> Result<Self, Unreadable> {
        let mut all = Self {
            iptables: [None, None],
            nft: [None, None],
            ipvs: None,
        };
        let conflicts = match rules.mode {
            Mode::Nftables => cluster.conflicts(),
            _ => Vec::new(),
        };
        let index = |family: Family| usize::from(family == Family::V6);
        for step in &rules.steps {
            match step {
                Step::Iptables { family, text, .. } => {
                    all.iptables[index(*family)] = Some(ours(iptables::parse(text, *family))?);
                }
                Step::Nft { family, text } => {
                    let ruleset = ours(nftables::parse(text))?;
                    let claims = ours(Claims::of(cluster, &conflicts, node, *family))?;
                    all.nft[index(*family)] = Some((ruleset, claims));
                }
                _ => {}
            }
        }
        if rules.mode == Mode::Ipvs {
            all.ipvs = Some(ours(ipvs::check::Wanted::of(rules))?);
        }
        Ok(all)
    }
}

/// That what was rendered cannot be read would be a fault of ours; it is said like any other.
fn ours<T, E: Into<dump::Cause>>(result: Result<T, E>) -> Result<T, Unreadable> {
    result.map_err(|cause| Unreadable {
        origin: "what was rendered".to_owned(),
        cause: cause.into(),
    })
}

/// The tables of kube-proxy's back end against what is called for; those of the other back end, and
/// in nftables mode of both, against nothing. Answers which of `found` is kube-proxy's.
fn check_iptables(
    mode: Mode,
    family: Family,
    expected: Option<&Tables<'_>>,
    found: &[Tables<'_>],
    differences: &mut Vec<Finding>,
) -> Result<Option<usize>, CheckError> {
    let mut chosen = None;
    if let Some(expected) = expected {
        let (index, tables) = found
            .iter()
            .enumerate()
            .max_by_key(|(index, tables)| (chain_count(tables), usize::MAX - index))
            .ok_or_else(|| no_save(mode, family))?;
        differences.extend(iptables::check(expected, tables, mode));
        chosen = Some(index);
    }
    for (index, tables) in found.iter().enumerate() {
        if chosen != Some(index) {
            let nothing = Tables::none(family);
            differences.extend(iptables::check(&nothing, tables, Mode::Nftables));
        }
    }
    Ok(chosen)
}

/// How many chains named as kube-proxy names them there are.
fn chain_count(tables: &Tables<'_>) -> usize {
    let chains = tables.list.iter().flat_map(|table| &table.chains);
    chains
        .filter(|chain| chain.name.starts_with("KUBE-"))
        .count()
}

fn no_save(mode: Mode, family: Family) -> CheckError {
    let (file, command) = match family {
        Family::V4 => ("iptables.save", "iptables-save"),
        Family::V6 => ("ip6tables.save", "ip6tables-save"),
    };
    CheckError::NoDump {
        file,
        mode: mode.name(),
        command,
    }
}

fn check_nftables(
    mode: Mode,
    family: Family,
    expected: Option<&(Ruleset, Claims)>,
    found: Option<&(Ruleset, nftables::check::Form)>,
    differences: &mut Vec<Finding>,
) -> Result<(), CheckError> {
    let table = found.and_then(|(ruleset, _)| ruleset.table(family));
    if let Some((expected, claims)) = expected {
        let Some((_, form)) = found else {
            let (file, command) = match family {
                Family::V4 => ("nft-ip.txt", "nft list table ip kube-proxy"),
                Family::V6 => ("nft-ip6.txt", "nft list table ip6 kube-proxy"),
            };
            return Err(CheckError::NoDump {
                file,
                mode: mode.name(),
                command,
            });
        };
        if let Some(expected) = expected.table(family) {
            differences.extend(nftables::check::check(expected, claims, table, *form));
        }
    } else if let Some(table) = table {
        differences.push(nftables::check::leftover(table));
    }
    Ok(())
}

fn check_ipvs(
    cluster: &Cluster,
    node: &NodeView,
    wanted: Option<&ipvs::check::Wanted>,
    texts: &Texts,
    found: &ipvs::check::Found,
    differences: &mut Vec<Finding>,
) -> Result<(), CheckError> {
    if let Some(wanted) = wanted {
        for (source, file, command) in [
            (&texts.servers, "ipvsadm.save", "ipvsadm -Sn"),
            (&texts.sets, "ipset.save", "ipset save"),
            (&texts.addresses, "ip-addr.txt", "ip addr show kube-ipvs0"),
        ] {
            if source.is_none() {
                return Err(CheckError::NoDump {
                    file,
                    mode: Mode::Ipvs.name(),
                    command,
                });
            }
        }
        differences.extend(ipvs::check::check(cluster, node, wanted, found));
        return Ok(());
    }
    differences.extend(ipvs_leftovers(found));
    Ok(())
}

/// What IPVS mode left on a node of another mode: one difference for each kind of thing.
fn ipvs_leftovers(found: &ipvs::check::Found) -> Vec<Finding> {
    let leftover = |place: &str, rule: String, effect: &str| Finding {
        kind: Kind::Leftover,
        family: Family::V4,
        place: place.to_owned(),
        rule,
        found: None,
        line: None,
        service: None,
        effect: effect.to_owned(),
    };
    let mut findings = Vec::new();
    let bound = found.addresses.bound.len();
    if found.addresses.link {
        findings.push(leftover(
            ipvs::LINK,
            format!("{bound} addresses"),
            "IPVS mode was not cleaned up: the node takes packets to these addresses in instead of \
             forwarding them, where no rule translates them first",
        ));
    }
    let servers = found.servers.list.len();
    if servers > 0 && found.addresses.link {
        findings.push(leftover(
            "virtual servers",
            format!("{servers} virtual servers"),
            "IPVS mode was not cleaned up: packets that no rule translates go to the endpoints of \
             the time it ended",
        ));
    }
    let sets = found.sets.list.len();
    if sets > 0 {
        findings.push(leftover(
            "ipset",
            format!("{sets} sets of kube-proxy"),
            "IPVS mode was not cleaned up: unused, but rules that refer to them stand in the way of \
             a cleanup",
        ));
    }
    findings
}

#[cfg(test)]
mod tests;
