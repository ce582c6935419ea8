//! Outages: from the first new flow that failed to the first that succeeded after it, by Service and path,
//! and which rule changes stand at both ends.
//!
//! A change can stand at an end if it was not over when the last flow before went by, and had begun when
//! the first one after did: it may have been under way, for a large table is long in coming. Of several
//! those are named first around which the rules were found to say something else of the Service than before,
//! then those that carry its translation; but if a rule dropped or refused the flows, or they went astray, then those
//! of tables that may do that, of these first what made them larger or smaller: kube-proxy writes all its rules at
//! every sync.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::changes::{Delta, RuleChange, What, server_name};
use super::directory::{Known, titled};
use super::flows::Decided;
use super::verdict::Verdict;

/// Flows that fail one after another make an outage from here on: one in three that fails, because one of
/// three endpoints is dead, is none.
const FLOWS: u64 = 3;

/// An outage that is over, or was going on when the session ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Outage {
    /// `ns/name:port`.
    pub service: String,
    /// Was it one of its IPv6 addresses?
    #[serde(default)]
    pub ipv6: bool,
    /// `pod→ClusterIP`, ...
    pub path: String,
    /// When the first flow that failed began (`CLOCK_MONOTONIC`, ns).
    pub begin_ns: u64,
    /// When the first flow that succeeded again began; `None`: none did before the session's end.
    pub end_ns: Option<u64>,
    /// New flows that failed, all of them one after another.
    pub lost: u64,
    /// When the last of them began (`CLOCK_MONOTONIC`, ns).
    pub last_lost_ns: u64,
    /// If it was going on when the session ended, what is known of that time.
    pub open: Option<Open>,
    /// The rule change at its begin; `None`: none was heard between the last flow that succeeded and the
    /// first that failed.
    pub began_with: Option<AtEnd>,
    /// The rule change at its end; `None`: none was heard between the last flow that failed and the first
    /// that succeeded.
    pub ended_with: Option<AtEnd>,
}

/// The end of a session in which nobody found out whether an outage was over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Open {
    /// From the last flow that failed to the session's end, ns.
    pub quiet_ns: u64,
    /// New flows in that time; of none it is known what became of it.
    pub undecided: u64,
}

/// A rule change at an end of an outage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct AtEnd {
    /// What it was.
    pub change: String,
    /// Was it under way?
    pub during: bool,
    /// How long before, ns, it was over; if it was under way, how long before it began.
    pub since_ns: u64,
    /// How many other rule changes can stand there as well.
    pub others: u64,
}

impl std::fmt::Display for Outage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use crate::report::units::{plural, time_u64};
        let lost = plural(self.lost, "new flow", "new flows");
        write!(f, "{} {}: ", titled(&self.service, self.ipv6), self.path)?;
        let until_ns = self.end_ns.unwrap_or(self.last_lost_ns);
        let lasted = time_u64(until_ns.saturating_sub(self.begin_ns));
        let ended = self.end_ns.map_or("or more", |_| "ended");
        write!(f, "outage of {lasted} {ended}, {lost} lost")?;
        if let Some(open) = &self.open {
            let undecided = match open.undecided {
                0 => "no new flow".to_owned(),
                some => format!("{}, undecided,", plural(some, "new flow", "new flows")),
            };
            let quiet = time_u64(open.quiet_ns);
            write!(
                f,
                "; {undecided} since the last one failed {quiet} before the end"
            )?;
        }
        if let Some(with) = &self.began_with {
            write!(f, "; it began {with}")?;
        }
        if let Some(with) = &self.ended_with {
            write!(f, "; it ended {with}")?;
        }
        Ok(())
    }
}

impl std::fmt::Display for AtEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use crate::report::units::{plural, time_u64};
        let since = time_u64(self.since_ns);
        if self.during {
            write!(f, "during this change, {since} into it: {}", self.change)?;
        } else {
            write!(f, "{since} after {}", self.change)?;
        }
        match self.others {
            0 => Ok(()),
            others => write!(
                f,
                " (of {} in question)",
                plural(others + 1, "change", "changes")
            ),
        }
    }
}

/// Flows that were decided, waiting for those that began before them.
#[derive(Debug, Default)]
pub struct Outages {
    /// The earliest on top.
    decided: BinaryHeap<Reverse<Flow>>,
    going_on: HashMap<(usize, &'static str), Going>,
    /// When the last flow began that succeeded (`CLOCK_MONOTONIC`, ns), by Service and path.
    good: HashMap<(usize, &'static str), u64>,
}

/// A flow that was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Flow {
    first_ns: u64,
    index: usize,
    path: &'static str,
    fate: Fate,
    destination: SocketAddr,
    protocol: u8,
}

/// What became of a flow, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    Good,
    /// This node's rules dropped or refused it, or its answer.
    Filtered,
    /// It went to somebody who is no endpoint.
    Strayed,
    Failed,
    /// It will not be known.
    Unknown,
}

impl Fate {
    const fn of(decided: &Decided) -> Self {
        match &decided.verdict {
            verdict if verdict.is_good() => Self::Good,
            verdict if !verdict.is_known() => Self::Unknown,
            _ if decided.filtered => Self::Filtered,
            Verdict::Misdelivered { .. } | Verdict::Unanswered { stray: Some(_) } => Self::Strayed,
            _ => Self::Failed,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Going {
    first: Flow,
    /// The last flow before that succeeded (`CLOCK_MONOTONIC`, ns); 0: there was none.
    good_ns: u64,
    last: Flow,
    lost: u64,
    /// Flows since then of which it is not known what became of them.
    undecided: u64,
}

impl Outages {
    /// Takes in a flow that was decided; corrections come too late.
    pub fn add(&mut self, decided: &Decided) {
        if decided.corrects.is_none() {
            self.decided.push(Reverse(Flow {
                first_ns: decided.first_ns,
                index: decided.index,
                path: decided.path,
                fate: Fate::of(decided),
                destination: decided.destination,
                protocol: decided.protocol,
            }));
        }
    }

    /// The outages that are over. Every flow that began before `known_ns` has been taken in, and every rule
    /// change that began before.
    pub fn over<'k>(
        &mut self,
        known_ns: u64,
        changes: &[RuleChange],
        known: impl Fn(usize) -> Option<&'k Known>,
    ) -> Vec<Outage> {
        let mut over = Vec::new();
        while let Some(Reverse(flow)) = self.decided.peek().copied()
            && flow.first_ns < known_ns
        {
            self.decided.pop();
            let key = (flow.index, flow.path);
            match flow.fate {
                Fate::Good => {}
                Fate::Unknown => {
                    if let Some(going) = self.going_on.get_mut(&key) {
                        going.undecided += 1;
                    }
                    continue;
                }
                Fate::Filtered | Fate::Strayed | Fate::Failed => {
                    let good_ns = self.good.get(&key).copied().unwrap_or(0);
                    let going = self.going_on.entry(key).or_insert(Going {
                        first: flow,
                        good_ns,
                        last: flow,
                        lost: 0,
                        undecided: 0,
                    });
                    going.last = flow;
                    going.lost += 1;
                    going.undecided = 0;
                    continue;
                }
            }
            self.good.insert(key, flow.first_ns);
            if let Some(going) = self.going_on.remove(&key)
                && going.lost >= FLOWS
                && let Some(known) = known(flow.index)
            {
                over.push(outage(known, going, End::Good(flow.first_ns), changes));
            }
        }
        over
    }

    /// Those that are over, and those of which nobody knows at the session's end (`CLOCK_MONOTONIC`, ns).
    pub fn finish<'k>(
        mut self,
        ended_ns: u64,
        changes: &[RuleChange],
        known: impl Fn(usize) -> Option<&'k Known>,
    ) -> (Vec<Outage>, Vec<Outage>) {
        let over = self.over(u64::MAX, changes, &known);
        let going_on: BTreeMap<_, _> = self.going_on.into_iter().collect();
        let going_on = going_on
            .into_iter()
            .filter(|(_, going)| going.lost >= FLOWS)
            .filter_map(|((index, _), going)| {
                Some(outage(
                    known(index)?,
                    going,
                    End::Session(ended_ns),
                    changes,
                ))
            });
        (over, going_on.collect())
    }
}

/// Where an outage ends, or at least what is known of it (`CLOCK_MONOTONIC`, ns).
#[derive(Clone, Copy, Debug)]
enum End {
    Good(u64),
    Session(u64),
}

fn outage(known: &Known, going: Going, end: End, changes: &[RuleChange]) -> Outage {
    let (end_ns, open) = match end {
        End::Good(ns) => (Some(ns), None),
        End::Session(ns) => (
            None,
            Some(Open {
                quiet_ns: ns.saturating_sub(going.last.first_ns),
                undecided: going.undecided,
            }),
        ),
    };
    let begin = Asked {
        known,
        flow: going.first,
    };
    let end = Asked {
        known,
        flow: going.last,
    };
    let (begin_ns, last_lost_ns) = (going.first.first_ns, going.last.first_ns);
    Outage {
        service: known.name.clone(),
        ipv6: known.ipv6,
        path: going.first.path.to_owned(),
        begin_ns,
        end_ns,
        lost: going.lost,
        last_lost_ns,
        open,
        began_with: begin.between(going.good_ns, begin_ns, changes),
        ended_with: end_ns.and_then(|end_ns| end.between(last_lost_ns, end_ns, changes)),
    }
}

/// A flow at an end of an outage, and what it asked for.
#[derive(Clone, Copy, Debug)]
struct Asked<'k> {
    known: &'k Known,
    flow: Flow,
}

/// How near a rule change is to flows that failed, from what is farthest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Nearness {
    /// Sets, addresses, marks: they decide about Services by way of other rules, if at all.
    Aside,
    /// Other tables that drop or translate.
    Other,
    /// It may have changed where packets to the Service go.
    Translation,
    /// The flows were dropped or refused, or went astray, and it may have changed what does so.
    Doer,
    /// The same, and there are more or fewer rules than before.
    DoerResized,
    /// It may have changed where packets to the Service go, and around it the rules were found to say something else
    /// of the Service.
    Altering,
}

impl Asked<'_> {
    /// The change that stands between two flows, which began at these times (`CLOCK_MONOTONIC`, ns).
    fn between(&self, from_ns: u64, to_ns: u64, changes: &[RuleChange]) -> Option<AtEnd> {
        let candidates = || {
            changes.iter().filter(|change| {
                !change.is_refused()
                    && change.time_ns > from_ns
                    && begin_of(change) <= to_ns
                    && self.may_concern(&change.what)
            })
        };
        let change = candidates().max_by_key(|change| (self.nearness(change), begin_of(change)))?;
        let during = change.time_ns > to_ns;
        let since = if during {
            begin_of(change)
        } else {
            change.time_ns
        };
        Some(AtEnd {
            change: change.to_string(),
            during,
            since_ns: to_ns - since,
            others: candidates().count().saturating_sub(1) as u64,
        })
    }

    /// Rules of the other IP version say nothing of a flow.
    fn may_concern(&self, what: &What) -> bool {
        let ipv6 = self.flow.destination.is_ipv6();
        match what {
            What::IptablesLegacy { family, .. } => (family == "IPv6") == ipv6,
            What::Nftables { tables, .. } => {
                let other = if ipv6 { "ip " } else { "ip6 " };
                tables.is_empty() || !tables.keys().all(|table| table.starts_with(other))
            }
            What::Ipvs(delta) => {
                let all = delta.flushed > 0 || delta.servers.is_empty();
                all || delta.servers.iter().any(|server| {
                    let server = before_slash(server).parse::<SocketAddr>();
                    server.map_or(true, |server| server.is_ipv6() == ipv6)
                })
            }
            What::Addresses { links } => links.values().any(|link| {
                link.added.iter().chain(&link.deleted).any(|address| {
                    let address = before_slash(address).parse::<IpAddr>();
                    address.map_or(true, |address| address.is_ipv6() == ipv6)
                })
            }),
            What::Ipset { .. } => true,
        }
    }

    fn nearness(&self, change: &RuleChange) -> Nearness {
        let alters = |&(after_ns, by_ns): &(u64, u64)| {
            change.time_ns > after_ns && begin_of(change) <= by_ns
        };
        let carried = self.is_carried_by(&change.what);
        if carried && self.known.altered.iter().any(alters) {
            return Nearness::Altering;
        }
        match (self.flow.fate, carried) {
            (Fate::Filtered, false) if may_filter(&change.what) => doer(&change.what),
            (Fate::Strayed, _) if may_translate(&change.what) => doer(&change.what),
            (_, true) => Nearness::Translation,
            (_, false) => aside_or_other(&change.what),
        }
    }

    /// Is it of those rules that translate packets to the Service?
    fn is_carried_by(&self, what: &What) -> bool {
        let ipv6 = self.flow.destination.is_ipv6();
        match what {
            What::IptablesLegacy { family, table, .. } => {
                self.known.is_named_by("iptables-legacy")
                    && table == "nat"
                    && (family == "IPv6") == ipv6
            }
            What::Nftables { tables, .. } => {
                let family = if ipv6 { "ip6" } else { "ip" };
                let carriers = [("iptables-nft", "nat"), ("nftables", "kube-proxy")];
                let mut carriers = carriers
                    .into_iter()
                    .filter(|(mode, _)| self.known.is_named_by(mode));
                // Without a table its announcement was lost: it may have been this.
                carriers.any(|(_, table)| {
                    tables.is_empty() || tables.contains_key(&format!("{family} {table}"))
                })
            }
            What::Ipvs(delta) => {
                let (to, protocol) = (self.flow.destination, u16::from(self.flow.protocol));
                let server = server_name(to.ip(), to.port(), protocol);
                self.known.is_named_by("ipvs")
                    && (delta.flushed > 0 || delta.servers.contains(&server))
            }
            What::Addresses { links } => {
                let prefix = if ipv6 { 128 } else { 32 };
                let address = format!("{}/{prefix}", self.flow.destination.ip());
                let mut links = links.values().filter(|link| link.virtual_ips);
                self.known.is_named_by("ipvs")
                    && links.any(|link| {
                        link.added.contains(&address) || link.deleted.contains(&address)
                    })
            }
            What::Ipset { .. } => false,
        }
    }
}

fn aside_or_other(what: &What) -> Nearness {
    let aside = match what {
        What::IptablesLegacy { table, .. } => table == "mangle",
        What::Nftables { tables, .. } => {
            !tables.is_empty() && tables.keys().all(|table| table.ends_with(" mangle"))
        }
        What::Ipvs(_) => false,
        What::Addresses { .. } | What::Ipset { .. } => true,
    };
    if aside {
        Nearness::Aside
    } else {
        Nearness::Other
    }
}

/// May these rules drop and refuse? iptables' table nat does neither, nor does IPVS by rules.
fn may_filter(what: &What) -> bool {
    match what {
        What::IptablesLegacy { table, .. } => !["nat", "mangle"].contains(&table.as_str()),
        What::Nftables { tables, .. } => any_but(tables, &[" mangle"]),
        What::Ipvs(_) | What::Addresses { .. } | What::Ipset { .. } => false,
    }
}

/// May these rules translate? nftables' tables have names of any kind, but those of iptables-nft.
fn may_translate(what: &What) -> bool {
    match what {
        What::IptablesLegacy { table, .. } => table == "nat",
        What::Nftables { tables, .. } => {
            any_but(tables, &[" filter", " mangle", " raw", " security"])
        }
        What::Ipvs(_) | What::Addresses { .. } | What::Ipset { .. } => false,
    }
}

/// Is there a table whose name ends otherwise, or has the announcement been lost?
fn any_but(tables: &BTreeMap<String, Delta>, ends: &[&str]) -> bool {
    let is_other = |table: &String| !ends.iter().any(|end| table.ends_with(end));
    tables.is_empty() || tables.keys().any(is_other)
}

/// Of what may have done it, what has more or fewer rules than before is nearer.
fn doer(what: &What) -> Nearness {
    let resized = match what {
        What::IptablesLegacy { before, after, .. } => before != after,
        What::Nftables { tables, .. } => tables
            .values()
            .any(|delta| delta.rules_added != delta.rules_deleted),
        What::Ipvs(_) | What::Addresses { .. } | What::Ipset { .. } => false,
    };
    if resized {
        Nearness::DoerResized
    } else {
        Nearness::Doer
    }
}

/// When it began; if only its announcement was heard, when that was read (`CLOCK_MONOTONIC`, ns).
fn begin_of(change: &RuleChange) -> u64 {
    change.begin_ns.unwrap_or(change.time_ns)
}

/// `10.96.0.1` of `10.96.0.1/32`, `10.96.0.1:80` of `10.96.0.1:80/TCP`.
fn before_slash(name: &str) -> &str {
    name.rsplit_once('/').map_or(name, |(before, _)| before)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::changes::{Actor, SetDelta};
    use crate::trace::verdict::Who;

    fn flow(first_ns: u64, verdict: Verdict) -> Decided {
        Decided {
            time_ns: first_ns + 5,
            index: 0,
            service: String::new(),
            protocol: 6,
            source: "10.244.0.7:1".parse().expect("an address"),
            destination: "10.96.0.1:80".parse().expect("an address"),
            path: "pod→ClusterIP",
            headed: None,
            first_ns,
            after_ns: None,
            filtered: false,
            corrects: None,
            verdict,
        }
    }

    fn known(mode: &'static str, altered: &[(u64, u64)]) -> Known {
        Known {
            name: "shop/web:http".to_owned(),
            mode,
            by_mode: BTreeMap::new(),
            protocol: 6,
            ipv6: false,
            endpoints: std::collections::BTreeSet::new(),
            former: BTreeMap::new(),
            there: true,
            altered: altered.iter().copied().collect(),
        }
    }

    fn change(begin_ns: u64, time_ns: u64, what: What) -> RuleChange {
        RuleChange {
            time_ns,
            begin_ns: Some(begin_ns),
            by: Actor::default(),
            what,
            refused: BTreeMap::new(),
            incomplete: false,
        }
    }

    fn legacy(table: &str) -> What {
        What::IptablesLegacy {
            family: "IPv4".to_owned(),
            table: table.to_owned(),
            before: 5,
            after: 6,
        }
    }

    fn nft(table: &str) -> What {
        What::Nftables {
            generation: Some(7),
            tables: [(table.to_owned(), Delta::default())].into(),
        }
    }

    fn set() -> What {
        What::Ipset {
            sets: [("S".to_owned(), SetDelta::default())].into(),
        }
    }

    /// What stands between a good flow at 10 and failed ones from 100 on, and between the last of these at
    /// 300 and good ones from 400 on.
    fn at_ends(known: &Known, changes: &[RuleChange]) -> (Option<AtEnd>, Option<AtEnd>) {
        at_ends_of((&Verdict::Leaked, false), known, changes)
    }

    /// The same, of flows that went wrong in this way, and whether rules dropped them.
    fn at_ends_of(
        (verdict, filtered): (&Verdict, bool),
        known: &Known,
        changes: &[RuleChange],
    ) -> (Option<AtEnd>, Option<AtEnd>) {
        let mut outages = Outages::default();
        for good in [10, 400] {
            outages.add(&flow(good, Verdict::Delivered));
        }
        for bad in [100, 200, 300] {
            outages.add(&Decided {
                filtered,
                ..flow(bad, verdict.clone())
            });
        }
        let mut over = outages.over(1_000, changes, |_| Some(known));
        let outage = over.pop().expect("an outage");
        (outage.began_with, outage.ended_with)
    }

    fn changes() -> Vec<RuleChange> {
        let mut changes = crate::report::sample::trace().run.summary.rule_changes;
        for (change, time_ns) in changes.iter_mut().zip([15, 47]) {
            change.time_ns = time_ns;
            change.begin_ns = Some(time_ns - 1);
        }
        changes
    }

    #[test]
    fn an_outage_ends_with_the_first_good_flow_though_bad_ones_are_told_later() {
        let mut outages = Outages::default();
        for good in [0, 10, 50, 60] {
            outages.add(&flow(good, Verdict::Delivered));
        }
        let known = known("nftables", &[]);
        let known = |_| Some(&known);
        // Flows from 20 on are not decided yet.
        assert!(outages.over(20, &changes(), known).is_empty());
        for bad in [20, 30, 40] {
            outages.add(&flow(bad, Verdict::Unanswered { stray: None }));
        }
        let over = outages.over(100, &changes(), known);
        let [outage] = over.as_slice() else {
            panic!("{over:?}");
        };
        assert_eq!(
            (outage.begin_ns, outage.end_ns, outage.lost),
            (20, Some(50), 3)
        );
        assert_eq!(outage.began_with.as_ref().map(|c| c.since_ns), Some(5));
        assert_eq!(outage.ended_with.as_ref().map(|c| c.since_ns), Some(3));
        let said = outage.to_string();
        assert!(
            said.starts_with(
                "shop/web:http pod→ClusterIP: outage of 30 ns ended, 3 new flows lost"
            ),
            "{said}"
        );
        assert!(
            said.contains("; it ended 3 ns after nft (pid 812, parent kube-proxy"),
            "{said}"
        );
    }

    #[test]
    fn a_change_that_is_under_way_is_named() {
        let known = known("iptables-legacy", &[]);
        let changes = [
            change(20, 30, legacy("mangle")),
            change(90, 190, legacy("nat")),
            change(390, 500, legacy("nat")),
        ];
        let (began, ended) = at_ends(&known, &changes);
        let (began, ended) = (began.expect("one"), ended.expect("one"));
        assert_eq!((began.during, began.since_ns, began.others), (true, 10, 1));
        assert_eq!((ended.during, ended.since_ns, ended.others), (true, 10, 0));
        assert_eq!(
            began.to_string(),
            "during this change, 10 ns into it: unknown process committed nat: 5 → 6 entries in 100 ns (of 2 \
             changes in question)"
        );
    }

    #[test]
    fn only_what_lies_between_the_flows_is_named() {
        let known = known("iptables-legacy", &[]);
        // Over before the last good flow, begun after the first bad one, over before the last bad one, and
        // begun after the first good one.
        let changes = [
            change(1, 9, legacy("nat")),
            change(101, 120, legacy("nat")),
            change(210, 299, legacy("nat")),
            change(401, 410, legacy("nat")),
        ];
        assert_eq!(at_ends(&known, &changes), (None, None));
    }

    #[test]
    fn what_carries_the_translation_is_named_before_what_came_later() {
        let name = |mode, altered: &[(u64, u64)], changes: &[RuleChange]| {
            let (began, _) = at_ends(&known(mode, altered), changes);
            began.expect("one").since_ns
        };
        let others = [
            change(60, 61, nft("ip filter")),
            change(70, 71, legacy("mangle")),
            change(80, 81, set()),
        ];
        let with = |what| {
            let mut changes = others.to_vec();
            changes.insert(0, change(50, 51, what));
            changes
        };
        assert_eq!(name("iptables-legacy", &[], &with(legacy("nat"))), 49);
        assert_eq!(name("iptables-nft", &[], &with(nft("ip nat"))), 49);
        assert_eq!(name("nftables", &[], &with(nft("ip kube-proxy"))), 49);
        // Another mode's rules, and those of the other family, are no nearer than a filter.
        assert_eq!(name("nftables", &[], &with(nft("ip6 kube-proxy"))), 39);
        assert_eq!(name("ipvs", &[], &with(legacy("nat"))), 39);
        // Where there is nothing else, what lies aside.
        assert_eq!(name("nftables", &[], &others[1..]), 19);
        // The rules say something else of the Service since the first of two.
        let two = [change(40, 41, legacy("nat")), change(50, 51, legacy("nat"))];
        assert_eq!(name("iptables-legacy", &[], &two), 49);
        assert_eq!(name("iptables-legacy", &[(0, 41)], &two), 59);
    }

    #[test]
    fn of_flows_that_rules_drop_or_refuse_a_filter_is_named() {
        let rejected = Verdict::Rejected {
            by: Who::Node,
            how: "port unreachable".to_owned(),
        };
        let dropped = Verdict::Dropped {
            reason: "NETFILTER_DROP".to_owned(),
            stage: "FORWARD hook".to_owned(),
            by: None,
        };
        let name =
            |lost: (&Verdict, bool), mode, altered: &[(u64, u64)], changes: &[RuleChange]| {
                let (began, ended) = at_ends_of(lost, &known(mode, altered), changes);
                assert_eq!(ended, None);
                began.expect("one").since_ns
            };
        let resized = |begin_ns, size| {
            let mut change = change(begin_ns, begin_ns + 1, legacy("filter"));
            if let What::IptablesLegacy { before, after, .. } = &mut change.what {
                (*before, *after) = size;
            }
            change
        };
        // Somebody's rule; then kube-proxy writes all that it wrote before.
        let changes = [
            resized(50, (42, 43)),
            resized(60, (43, 43)),
            change(70, 71, legacy("nat")),
        ];
        for verdict in [&dropped, &rejected] {
            let lost = (verdict, true);
            assert_eq!(name(lost, "iptables-legacy", &[], &changes), 49);
            assert_eq!(name(lost, "iptables-legacy", &[], &changes[1..]), 39);
            assert_eq!(name(lost, "iptables-legacy", &[], &changes[2..]), 29);
            // What is another mode's table nat does not drop.
            assert_eq!(name(lost, "ipvs", &[], &changes[1..]), 39);
            // The Service has no endpoints any more since the last one.
            assert_eq!(name(lost, "iptables-legacy", &[(65, 80)], &changes), 29);
            let firewall = [
                change(50, 51, nft("inet firewall")),
                change(60, 61, nft("ip kube-proxy")),
            ];
            assert_eq!(name(lost, "nftables", &[], &firewall), 49);
        }
        // What the node's own stack refuses, no rule has dropped.
        let by_stack = (&rejected, false);
        assert_eq!(name(by_stack, "iptables-legacy", &[], &changes), 29);
        // Who answers is no endpoint: somebody's rule translates first.
        let strayed = Verdict::Misdelivered {
            by: "10.244.0.9:8081".parse().expect("an address"),
        };
        let strayed = (&strayed, false);
        assert_eq!(name(strayed, "iptables-legacy", &[], &changes), 29);
        let mut thief = [
            change(50, 51, nft("ip thief")),
            change(60, 61, nft("ip kube-proxy")),
            change(70, 71, nft("ip filter")),
        ];
        assert_eq!(name(strayed, "nftables", &[], &thief), 39);
        let added = Delta {
            rules_added: 1,
            ..Delta::default()
        };
        thief[0].what = What::Nftables {
            generation: Some(7),
            tables: [("ip thief".to_owned(), added)].into(),
        };
        assert_eq!(name(strayed, "nftables", &[], &thief), 49);
    }

    #[test]
    fn a_change_of_ipvs_is_near_if_it_names_the_service() {
        use crate::trace::changes::{AddressDelta, ServerDelta};
        let servers = |server: &str| {
            What::Ipvs(ServerDelta {
                servers_deleted: 1,
                servers: [server.to_owned()].into(),
                ..ServerDelta::default()
            })
        };
        let bound = What::Addresses {
            links: [(
                "kube-ipvs0".to_owned(),
                AddressDelta {
                    virtual_ips: true,
                    deleted: ["10.96.0.1/32".to_owned()].into(),
                    ..AddressDelta::default()
                },
            )]
            .into(),
        };
        let known = known("ipvs", &[]);
        for near in [servers("10.96.0.1:80/TCP"), bound, servers("fwmark 1")] {
            let changes = [
                change(50, 51, near),
                change(60, 61, servers("[fd00:96::1]:80/TCP")),
            ];
            let (began, _) = at_ends(&known, &changes);
            let began = began.expect("one");
            assert_eq!((began.since_ns, began.others), (49, 0));
        }
        let two = [
            change(50, 51, servers("10.96.0.1:80/TCP")),
            change(60, 61, servers("10.96.0.2:80/TCP")),
        ];
        let (began, _) = at_ends(&known, &two);
        let began = began.expect("one");
        assert_eq!((began.since_ns, began.others), (49, 1));
    }

    #[test]
    fn single_failures_are_no_outage_and_one_may_go_on() {
        let mut outages = Outages::default();
        for first_ns in 0..30 {
            let verdict = if first_ns % 3 == 0 {
                Verdict::Leaked
            } else {
                Verdict::Delivered
            };
            outages.add(&flow(first_ns, verdict));
        }
        for first_ns in 30..40 {
            outages.add(&flow(first_ns, Verdict::Leaked));
        }
        let known = known("nftables", &[]);
        let (over, going_on) = outages.finish(50, &[], |_| Some(&known));
        assert_eq!(over, []);
        assert_eq!(going_on.len(), 1);
        assert_eq!((going_on[0].end_ns, going_on[0].lost), (None, 10));
    }

    #[test]
    fn that_nobody_asked_again_is_no_proof() {
        let known = known("nftables", &[]);
        let said = |undecided: &[u64]| {
            let mut outages = Outages::default();
            for bad in [100, 200, 300] {
                outages.add(&flow(bad, Verdict::Leaked));
            }
            for first_ns in undecided {
                outages.add(&flow(*first_ns, Verdict::Undecided));
            }
            let (_, going_on) = outages.finish(15_000_000_300, &[], |_| Some(&known));
            going_on[0].to_string()
        };
        let begin = "shop/web:http pod→ClusterIP: outage of 200 ns or more, 3 new flows lost; ";
        let end = "since the last one failed 15.00 s before the end";
        assert_eq!(said(&[]), format!("{begin}no new flow {end}"));
        assert_eq!(said(&[250]), format!("{begin}no new flow {end}"));
        assert_eq!(
            said(&[400, 500]),
            format!("{begin}2 new flows, undecided, {end}")
        );
    }
}
