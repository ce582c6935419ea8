//! What a node's iptables hold against what its cluster calls for.
//!
//! kube-proxy walks its Services in the random order of a Go map. Where that shows, in the chains
//! that all Services share, only the rules of one Service are compared in their order; everywhere
//! else order is exact, because the probabilities of endpoints depend on it. Chains and rules that
//! are not kube-proxy's are no differences, nor are the kubelet's.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};

use super::chains::{ChainKind, Names, key, service_of};
use super::effect;
use super::rule::{Chain, Match, Rule, Table, Tables, built_in_chains};
use crate::cluster::Family;
use crate::rules::Mode;
use crate::rules::check::{Finding, Kind};

/// The tables that kube-proxy writes to.
const TABLES: [&str; 3] = ["mangle", "filter", "nat"];

/// Compares the tables of one family.
///
/// `expected` is what the cluster calls for, read from what was rendered for it in `mode` with
/// nfacct as [`uses_nfacct`] says; in nftables mode it is [`Tables::none`]. `found` is the node's.
pub fn check(expected: &Tables<'_>, found: &Tables<'_>, mode: Mode) -> Vec<Finding> {
    let found = &*as_in_large_clusters(expected, found);
    let mut checker = Checker {
        family: found.family,
        mode,
        expected,
        found,
        expected_names: OnceCell::new(),
        found_names: OnceCell::new(),
        findings: Vec::new(),
    };
    for name in TABLES {
        checker.table(name);
    }
    checker.findings
}

/// `found`, with the comments left out that large clusters are not called upon to have.
///
/// Above 1000 endpoints kube-proxy writes a Service's own chains without comments, but a partial sync
/// leaves those of unchanged Services as they were, comments and all, until it starts anew.
fn as_in_large_clusters<'c, 'a>(
    expected: &Tables<'a>,
    found: &'c Tables<'a>,
) -> Cow<'c, Tables<'a>> {
    let mut result = Cow::Borrowed(found);
    for (at, table) in found.list.iter().enumerate() {
        for (index, chain) in table.chains.iter().enumerate() {
            if !ChainKind::of(table.name, chain.name).is_of_one_service() {
                continue;
            }
            let wanted = expected
                .chain(table.name, chain.name)
                .map(|chain| &chain.rules);
            if let Some(rules) = wanted.and_then(|wanted| without_comments(wanted, &chain.rules)) {
                result.to_mut().list[at].chains[index].rules = rules;
            }
        }
    }
    result
}

/// The rules that are there, those without their comments that are then called for; `None` if nothing
/// changes.
fn without_comments<'a>(wanted: &[Rule<'a>], there: &[Rule<'a>]) -> Option<Vec<Rule<'a>>> {
    if wanted == there || wanted.iter().all(|rule| rule.comment().is_some()) {
        return None;
    }
    let bare = |rule: &Rule<'a>| {
        let mut bare = rule.clone();
        let matches = rule.matches.iter();
        bare.matches = matches
            .filter(|part| !matches!(part, Match::Comment(_)))
            .cloned()
            .collect();
        bare
    };
    let rules = there.iter().map(|rule| {
        let bare = bare(rule);
        if !wanted.contains(rule) && wanted.contains(&bare) {
            bare
        } else {
            rule.clone()
        }
    });
    Some(rules.collect())
}

/// Do kube-proxy's rules count with nfacct? A kernel without it has none, which is no difference.
///
/// One kernel serves both families: ask about both, and take either's yes.
pub fn uses_nfacct(save: &str) -> bool {
    let chains = ["-A KUBE-FORWARD ", "-A KUBE-NODEPORTS "];
    let mut counting = save
        .match_indices(" --nfacct-name ")
        .map(|(at, _)| save[..at].rsplit('\n').next().unwrap_or_default());
    counting.any(|line| chains.iter().any(|chain| line.contains(chain)))
}

struct Checker<'c, 'a> {
    family: Family,
    mode: Mode,
    expected: &'c Tables<'a>,
    found: &'c Tables<'a>,
    /// Whose chains are whose: made at the first difference.
    expected_names: OnceCell<Names<'c>>,
    found_names: OnceCell<Names<'c>>,
    findings: Vec<Finding>,
}

/// The differences between two chains that are left once equal rules are taken away.
struct Differences {
    /// Indices of rules that are called for.
    missing: Vec<usize>,
    /// Indices of rules that are there.
    extra: Vec<usize>,
    /// For each rule that is there, the index of the one called for that it equals.
    matched: Vec<Option<usize>>,
}

impl<'c, 'a> Checker<'c, 'a> {
    fn table(&mut self, name: &'static str) {
        let expected = self.expected.table(name);
        let found = self.found.table(name);
        if let Some(found) = found {
            self.built_in_chains(found);
        }
        for chain in expected.into_iter().flat_map(|table| &table.chains) {
            if built_in_chains(name).contains(&chain.name) {
                continue;
            }
            let kind = ChainKind::of(name, chain.name);
            match found.and_then(|table| table.chain(chain.name)) {
                None => self.missing_chain(name, kind, chain),
                Some(found) => self.chain(name, kind, chain, found),
            }
        }
        for base in built_in_chains(name) {
            let rules = |table: Option<&'c Table<'a>>| -> &'c [Rule<'a>] {
                table
                    .and_then(|table| table.chain(base))
                    .map_or(&[], |chain| &chain.rules)
            };
            self.jumps(name, base, rules(expected), rules(found));
        }
        for chain in found.into_iter().flat_map(|table| &table.chains) {
            if expected.is_none_or(|table| table.chain(chain.name).is_none()) {
                self.chain_not_called_for(name, chain);
            }
        }
    }

    /// `iptables-save` prints all built-in chains of a table: one that is not there was cut out.
    fn built_in_chains(&mut self, table: &Table<'_>) {
        let declared = |name: &str| {
            let chain = table.chain(name);
            chain.is_some_and(|chain| chain.declared.is_some())
        };
        for name in built_in_chains(table.name) {
            if !declared(name) {
                self.findings.push(Finding {
                    kind: Kind::Missing,
                    family: self.family,
                    place: format!("{} {name}", table.name),
                    rule: format!(":{name} ACCEPT [0:0]"),
                    found: None,
                    line: None,
                    service: None,
                    effect: effect::CUT.to_owned(),
                });
            }
        }
    }

    fn missing_chain(&mut self, table: &str, kind: ChainKind, chain: &'c Chain<'a>) {
        self.declaration(
            Kind::Missing,
            table,
            kind,
            chain,
            effect::missing_chain(kind),
        );
        if !kind.is_of_one_service() {
            for rule in &chain.rules {
                self.missing(table, kind, chain, rule);
            }
        }
    }

    /// A finding about a chain as such.
    fn declaration(
        &mut self,
        finding: Kind,
        table: &str,
        kind: ChainKind,
        chain: &'c Chain<'a>,
        effect: &str,
    ) {
        let service = self.service_of_chain(kind, chain.name);
        self.findings.push(Finding {
            kind: finding,
            family: self.family,
            place: format!("{table} {}", chain.name),
            rule: format!(":{} - [0:0]", chain.name),
            found: None,
            line: match finding {
                Kind::Missing => None,
                _ => chain.declared.or(chain.rules.first().map(|rule| rule.line)),
            },
            service,
            effect: effect.to_owned(),
        });
    }

    fn chain(
        &mut self,
        table: &str,
        kind: ChainKind,
        expected: &'c Chain<'a>,
        found: &'c Chain<'a>,
    ) {
        if found.declared.is_none() {
            self.declaration(Kind::Missing, table, kind, expected, effect::CUT);
        }
        let rewritten = || found.rules.iter().filter(|rule| !rule.as_printed);
        let called_for: HashSet<&Rule<'_>> = match rewritten().next() {
            Some(_) => expected.rules.iter().collect(),
            None => HashSet::new(),
        };
        for rule in rewritten().filter(|rule| called_for.contains(rule)) {
            let service = self.service(kind, expected.name, rule);
            self.findings.push(Finding {
                kind: Kind::Altered,
                family: self.family,
                place: format!("{table} {}", expected.name),
                rule: rule.in_chain(expected.name),
                found: Some("the same rule, written otherwise".to_owned()),
                line: Some(rule.line),
                service,
                effect: effect::REWRITTEN.to_owned(),
            });
        }
        if expected.rules == found.rules {
            return;
        }
        if found.rules.is_empty() && kind.is_of_one_service() {
            let effect = effect::missing_chain(kind);
            for rule in expected.rules.iter().take(1) {
                let service = self.service(kind, expected.name, rule);
                self.findings.push(Finding {
                    kind: Kind::Missing,
                    family: self.family,
                    place: format!("{table} {}", expected.name),
                    rule: match expected.rules.len() {
                        1 => rule.in_chain(expected.name),
                        rules => format!("{} and {} more", rule.in_chain(expected.name), rules - 1),
                    },
                    found: None,
                    line: None,
                    service,
                    effect: effect.to_owned(),
                });
            }
            return;
        }
        let mut differences = differences(&expected.rules, &found.rules);
        self.order(table, kind, expected, found, &differences.matched);
        for (missing, extra) in self.pairs(&mut differences, expected, found) {
            if let (Some(missing), Some(extra)) =
                (expected.rules.get(missing), found.rules.get(extra))
            {
                self.altered(table, kind, (expected, found), missing, extra);
            }
        }
        for rule in differences.missing {
            if let Some(rule) = expected.rules.get(rule) {
                self.missing(table, kind, expected, rule);
            }
        }
        for rule in differences.extra {
            if let Some(rule) = found.rules.get(rule)
                // The kubelet writes there too.
                && (kind != ChainKind::Firewall || expected.rules.contains(rule))
            {
                self.extra(table, kind, expected, found, rule);
            }
        }
    }

    /// Are the rules that are there, and called for, in an order that kube-proxy writes?
    fn order(
        &mut self,
        table: &str,
        kind: ChainKind,
        expected: &'c Chain<'a>,
        found: &'c Chain<'a>,
        matched: &[Option<usize>],
    ) {
        let shared = kind.is_in_random_order(expected.name, self.mode);
        // Where each Service's last rule stands; in a chain of one order, they are all of one.
        let mut reached: HashMap<&str, usize> = HashMap::new();
        let mut end: Option<&Rule<'_>> = None;
        for (rule, at) in found.rules.iter().zip(matched) {
            let Some(at) = *at else { continue };
            let key = if shared { order_key(rule) } else { Some("") };
            let before = key.and_then(|key| reached.insert(key, at));
            let wrong = if shared && rule.chain() == Some(NODE_PORTS) {
                end = end.or(Some(rule));
                false
            } else {
                end.is_some() || before.is_some_and(|before| before > at)
            };
            if wrong {
                let out_of_place = end.unwrap_or(rule);
                let service = self.service(kind, expected.name, out_of_place);
                self.findings.push(Finding {
                    kind: Kind::Altered,
                    family: self.family,
                    place: format!("{table} {}", expected.name),
                    rule: out_of_place.in_chain(expected.name),
                    found: Some("the same rule in another place of the chain".to_owned()),
                    line: Some(out_of_place.line),
                    service,
                    effect: effect::out_of_order(kind).to_owned(),
                });
                return;
            }
        }
    }

    /// Takes out of the differences what is one rule written otherwise.
    fn pairs(
        &self,
        differences: &mut Differences,
        expected: &Chain<'_>,
        found: &Chain<'_>,
    ) -> Vec<(usize, usize)> {
        let Differences { missing, extra, .. } = differences;
        let mut pairs = Vec::new();
        if missing.is_empty() || extra.is_empty() {
            return pairs;
        }
        // First within a Service, then whatever is alike, unless that would take long.
        for by_service in [true, false] {
            let group = |rule: &Rule<'_>| match service_of_rule(rule) {
                Some(service) if by_service => service.to_owned(),
                _ => String::new(),
            };
            let mut waiting: HashMap<String, Vec<usize>> = HashMap::new();
            for &index in missing.iter() {
                if let Some(rule) = expected.rules.get(index) {
                    waiting.entry(group(rule)).or_default().push(index);
                }
            }
            extra.retain(|&index| {
                let pair = found.rules.get(index).and_then(|rule| {
                    let group = waiting.get_mut(&group(rule))?;
                    let at = self.nearest(group, expected, rule)?;
                    Some(group.swap_remove(at))
                });
                if let Some(missing) = pair {
                    pairs.push((missing, index));
                }
                pair.is_none()
            });
            let left: HashSet<usize> = waiting.into_values().flatten().collect();
            missing.retain(|index| left.contains(index));
        }
        pairs
    }

    /// Which of the rules called for is this one, written otherwise?
    fn nearest(&self, group: &[usize], expected: &Chain<'_>, rule: &Rule<'_>) -> Option<usize> {
        if group.len() > LONGEST_SEARCH || self.leads_to_something_gone(rule) {
            return None;
        }
        let distances = group.iter().enumerate().filter_map(|(at, missing)| {
            let distance = distance(expected.rules.get(*missing)?, rule);
            (distance <= FARTHEST).then_some((distance, at))
        });
        distances.min().map(|(_, at)| at)
    }

    /// Does the rule jump to a chain that is there, of a Service or endpoint that is not called for?
    fn leads_to_something_gone(&self, rule: &Rule<'_>) -> bool {
        rule.chain().is_some_and(|chain| {
            ChainKind::of("nat", chain).is_of_one_service()
                && self.expected.chain("nat", chain).is_none()
                && self.found.chain("nat", chain).is_some()
        })
    }

    fn missing(&mut self, table: &str, kind: ChainKind, chain: &'c Chain<'a>, rule: &'c Rule<'a>) {
        let service = self.service(kind, chain.name, rule);
        let effect = effect::missing(table, kind, chain, rule);
        self.findings.push(Finding {
            kind: Kind::Missing,
            family: self.family,
            place: format!("{table} {}", chain.name),
            rule: rule.in_chain(chain.name),
            found: None,
            line: None,
            service,
            effect,
        });
    }

    fn altered(
        &mut self,
        table: &str,
        kind: ChainKind,
        (chain, there): (&'c Chain<'a>, &'c Chain<'a>),
        expected: &'c Rule<'a>,
        found: &'c Rule<'a>,
    ) {
        let service = self.service(kind, chain.name, expected);
        self.findings.push(Finding {
            kind: Kind::Altered,
            family: self.family,
            place: format!("{table} {}", chain.name),
            rule: expected.in_chain(chain.name),
            found: Some(found.in_chain(chain.name)),
            line: Some(found.line),
            service,
            effect: effect::altered(table, kind, chain, there, expected, found),
        });
    }

    /// A rule that is not called for, in a chain that is.
    fn extra(
        &mut self,
        table: &str,
        kind: ChainKind,
        expected: &'c Chain<'a>,
        found: &'c Chain<'a>,
        rule: &'c Rule<'a>,
    ) {
        let service = self.service(kind, found.name, rule);
        let same = found.rules.len() <= LONGEST_SEARCH
            && found
                .rules
                .iter()
                .any(|other| other.line != rule.line && effect::differ_in_comments(other, rule));
        let twice = expected.rules.contains(rule);
        let gone = self.leads_to_something_gone(rule)
            || service
                .as_deref()
                .is_some_and(|service| !self.expected_names().has(service));
        let finding = if twice {
            Kind::Extra
        } else if rule
            .chain()
            .is_some_and(|chain| self.is_of_another_mode(table, chain))
        {
            Kind::Leftover
        } else if gone {
            Kind::Stale
        } else {
            Kind::Extra
        };
        self.findings.push(Finding {
            kind: finding,
            family: self.family,
            place: format!("{table} {}", found.name),
            rule: rule.in_chain(found.name),
            found: None,
            line: Some(rule.line),
            service,
            effect: effect::extra(finding, kind, found, rule, twice, same),
        });
    }

    /// The jumps from a built-in chain to kube-proxy's: in any order, with others' rules between.
    fn jumps(
        &mut self,
        table: &str,
        base: &'static str,
        expected: &'c [Rule<'a>],
        found: &'c [Rule<'a>],
    ) {
        let mut left: Vec<&'c Rule<'a>> = expected.iter().collect();
        let mut extra: Vec<&'c Rule<'a>> = Vec::new();
        for rule in found {
            if let Some(at) = left.iter().position(|called_for| *called_for == rule) {
                left.swap_remove(at);
            } else if rule
                .chain()
                .is_some_and(|chain| match ChainKind::of(table, chain) {
                    ChainKind::Kubelet | ChainKind::Foreign => false,
                    // The kubelet's too.
                    ChainKind::Firewall => expected.iter().any(|rule| rule.chain() == Some(chain)),
                    _ => true,
                })
            {
                extra.push(rule);
            }
        }
        for rule in extra {
            let twice = expected.contains(rule);
            let same = |called_for: &&Rule<'_>| called_for.chain() == rule.chain();
            if !twice && let Some(at) = left.iter().position(same) {
                let called_for = left.swap_remove(at);
                let effect = effect::altered_jump(table, base, called_for, rule);
                self.jump(Kind::Altered, table, base, called_for, Some(rule), effect);
                continue;
            }
            let other = rule
                .chain()
                .is_some_and(|chain| self.is_of_another_mode(table, chain));
            let kind = if other { Kind::Leftover } else { Kind::Extra };
            let effect = effect::extra_jump(kind, twice);
            self.jump(kind, table, base, rule, None, effect.to_owned());
        }
        for rule in left {
            let effect = effect::missing_jump(table, base, rule);
            self.jump(Kind::Missing, table, base, rule, None, effect.to_owned());
        }
    }

    fn jump(
        &mut self,
        kind: Kind,
        table: &str,
        base: &str,
        rule: &Rule<'_>,
        found: Option<&Rule<'_>>,
        effect: String,
    ) {
        self.findings.push(Finding {
            kind,
            family: self.family,
            place: format!("{table} {base}"),
            rule: rule.in_chain(base),
            found: found.map(|found| found.in_chain(base)),
            line: match (kind, found) {
                (_, Some(found)) => Some(found.line),
                (Kind::Missing, None) => None,
                (_, None) => Some(rule.line),
            },
            service: None,
            effect,
        });
    }

    /// A chain that is there, and nothing calls for it.
    fn chain_not_called_for(&mut self, table: &str, chain: &'c Chain<'a>) {
        let kind = ChainKind::of(table, chain.name);
        let finding = match kind {
            ChainKind::Foreign | ChainKind::Kubelet | ChainKind::Firewall => return,
            _ if self.is_of_another_mode(table, chain.name) => Kind::Leftover,
            _ if kind.is_of_one_service() => Kind::Stale,
            _ => Kind::Extra,
        };
        let effect = effect::chain_not_called_for(finding, kind);
        self.declaration(finding, table, kind, chain, effect);
    }

    fn is_of_another_mode(&self, table: &str, chain: &str) -> bool {
        ChainKind::of(table, chain).is_of_another_mode(self.mode)
    }

    fn expected_names(&self) -> &Names<'c> {
        self.expected_names.get_or_init(|| Names::of(self.expected))
    }

    fn found_names(&self) -> &Names<'c> {
        self.found_names.get_or_init(|| Names::of(self.found))
    }

    fn service_of_chain(&self, kind: ChainKind, chain: &str) -> Option<String> {
        if !kind.is_of_one_service() {
            return None;
        }
        let expected = self.expected_names().service(chain);
        let service = expected.or_else(|| self.found_names().service(chain));
        service.map(str::to_owned)
    }

    /// The Service that a rule is of: its chain's, or that of the chain it jumps to, or the one
    /// that its comment names.
    fn service(&self, kind: ChainKind, chain: &str, rule: &Rule<'_>) -> Option<String> {
        let target = || {
            let chain = rule.chain()?;
            self.service_of_chain(ChainKind::of("nat", chain), chain)
        };
        self.service_of_chain(kind, chain)
            .or_else(target)
            .or_else(|| rule.comment().and_then(service_of).map(str::to_owned))
    }
}

/// The chain that packets to the node's own addresses are sent to, after all Services' rules.
const NODE_PORTS: &str = "KUBE-NODEPORTS";

/// Above this many rules to choose from, a rule that differs is not paired with one called for.
const LONGEST_SEARCH: usize = 256;

/// Two rules that differ in more than this many parts are two rules.
const FARTHEST: usize = 3;

/// What two rules do not have in common.
fn distance(a: &Rule<'_>, b: &Rule<'_>) -> usize {
    let not_in = |of: &Rule<'_>, other: &Rule<'_>| {
        let parts = of.matches.iter();
        parts.filter(|part| !other.matches.contains(part)).count()
    };
    usize::from(a.source != b.source)
        + usize::from(a.destination != b.destination)
        + usize::from(a.protocol != b.protocol)
        + usize::from(a.in_interface != b.in_interface)
        + usize::from(a.out_interface != b.out_interface)
        + usize::from(a.target != b.target)
        + not_in(a, b).max(not_in(b, a))
}

fn service_of_rule<'r>(rule: &'r Rule<'_>) -> Option<&'r str> {
    rule.comment().and_then(service_of)
}

/// What rules of one Service have in common in a shared chain: the hash in the name of the chain
/// that they jump to, or the Service in the comment.
fn order_key<'r>(rule: &'r Rule<'_>) -> Option<&'r str> {
    rule.chain().and_then(key).or_else(|| service_of_rule(rule))
}

fn differences(expected: &[Rule<'_>], found: &[Rule<'_>]) -> Differences {
    let mut called_for: HashMap<&Rule<'_>, Vec<usize>> = HashMap::with_capacity(expected.len());
    for (index, rule) in expected.iter().enumerate().rev() {
        called_for.entry(rule).or_default().push(index);
    }
    let mut extra = Vec::new();
    let mut matched = Vec::with_capacity(found.len());
    for (index, rule) in found.iter().enumerate() {
        let equal = called_for.get_mut(rule).and_then(Vec::pop);
        if equal.is_none() {
            extra.push(index);
        }
        matched.push(equal);
    }
    let mut missing: Vec<usize> = called_for.into_values().flatten().collect();
    missing.sort_unstable();
    Differences {
        missing,
        extra,
        matched,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::cluster::{Cluster, Endpoint, Protocol, Service, ServicePort};
    use crate::rules::iptables::parse;
    use crate::rules::names::service_hash;
    use crate::rules::{NodeView, Step, render};

    const NFT: Mode = Mode::IptablesNft;
    const DUMPS: [(Family, Mode, &str); 6] = [
        (
            Family::V4,
            Mode::IptablesNft,
            include_str!("../fixtures/kube-proxy-1.36.2/iptables-nft/iptables.save"),
        ),
        (
            Family::V6,
            Mode::IptablesNft,
            include_str!("../fixtures/kube-proxy-1.36.2/iptables-nft/ip6tables.save"),
        ),
        (
            Family::V4,
            Mode::IptablesLegacy,
            include_str!("../fixtures/kube-proxy-1.36.2/iptables-legacy/iptables.save"),
        ),
        (
            Family::V6,
            Mode::IptablesLegacy,
            include_str!("../fixtures/kube-proxy-1.36.2/iptables-legacy/ip6tables.save"),
        ),
        (
            Family::V4,
            Mode::Ipvs,
            include_str!("../fixtures/kube-proxy-1.36.2/ipvs/iptables.save"),
        ),
        (
            Family::V6,
            Mode::Ipvs,
            include_str!("../fixtures/kube-proxy-1.36.2/ipvs/ip6tables.save"),
        ),
    ];
    const V4: &str = DUMPS[0].2;

    fn compare(expected: &str, found: &str, family: Family, mode: Mode) -> Vec<Finding> {
        let expected = parse(expected, family).expect("a dump");
        check(&expected, &parse(found, family).expect("a dump"), mode)
    }

    /// Line `index` of a dump replaced by others.
    fn with_line(dump: &str, index: usize, put: &[&str]) -> String {
        let mut lines: Vec<&str> = dump.lines().collect();
        lines.splice(index..=index, put.iter().copied());
        lines.join("\n") + "\n"
    }

    /// By the words of comments and the hashes in chains' names alone.
    struct Concerned<'d>(HashMap<String, &'d str>, HashSet<&'d str>);

    impl<'d> Concerned<'d> {
        fn of(dump: &'d str) -> Self {
            let words = dump.split([' ', '"', '\n']);
            let services: HashSet<&str> = words
                .filter(|word| service_of(word).is_some() && word.starts_with(char::is_alphabetic))
                .collect();
            let mut hashes = HashMap::new();
            for service in &services {
                for protocol in Protocol::ALL {
                    let hash = service_hash(service, protocol);
                    hashes.insert(hash.as_str().to_owned(), *service);
                }
            }
            Self(hashes, services)
        }

        fn by(&self, line: &str) -> Option<&'d str> {
            let mut words = line.split([' ', '"', ':', '-']);
            let by_hash = words.find_map(|word| self.0.get(word).copied());
            let mut words = line.split([' ', '"']);
            by_hash.or_else(|| words.find_map(|word| self.1.get(word).copied()))
        }
    }

    #[track_caller]
    fn assert_noticed(
        expected: &Tables<'_>,
        found: &str,
        mode: Mode,
        service: Option<&str>,
        what: &str,
    ) {
        // A text that is refused is noticed too.
        let Ok(tables) = parse(found, expected.family) else {
            assert!(!what.starts_with('-') && !what.starts_with(':'), "{what}");
            return;
        };
        let findings = check(expected, &tables, mode);
        assert!(!findings.is_empty(), "{what}");
        assert!(findings.iter().all(|finding| !finding.effect.is_empty()));
        if let Some(service) = service {
            let named = |finding: &Finding| finding.service.as_deref() == Some(service);
            assert!(findings.iter().any(named), "{what}: {findings:#?}");
        }
    }

    #[test]
    fn a_dump_is_what_it_is() {
        for (family, mode, dump) in DUMPS {
            assert_eq!(compare(dump, dump, family, mode), []);
        }
        // Both back ends hold the same rules, with Services in another order.
        assert_eq!(compare(DUMPS[0].2, DUMPS[2].2, Family::V4, NFT), []);
        assert_eq!(compare(DUMPS[3].2, DUMPS[1].2, Family::V6, NFT), []);
    }

    #[test]
    fn any_line_that_is_deleted_or_doubled_is_noticed() {
        for (family, mode, dump) in DUMPS {
            let expected = parse(dump, family).expect("a dump");
            let concerned = Concerned::of(dump);
            for (index, line) in dump.lines().enumerate() {
                if line.starts_with('#') {
                    continue;
                }
                let service = concerned.by(line);
                assert_noticed(&expected, &with_line(dump, index, &[]), mode, service, line);
                if line.starts_with('-') {
                    let twice = with_line(dump, index, &[line, line]);
                    assert_noticed(&expected, &twice, mode, service, line);
                }
            }
        }
    }

    /// One digit of each number changed, and one left out; each match left out; other targets.
    fn alterations(line: &str) -> Vec<String> {
        let mut altered = Vec::new();
        let numbers = line.split_inclusive(|character: char| !character.is_ascii_digit());
        let mut at = 0;
        for number in numbers {
            let digits = number.trim_end_matches(|character: char| !character.is_ascii_digit());
            // One that moves with the line, so that each place has its turn.
            if !digits.is_empty() {
                let at = at + line.len() % digits.len();
                let digit = if line.as_bytes()[at] == b'1' {
                    "2"
                } else {
                    "1"
                };
                for digit in [digit, ""] {
                    altered.push(format!("{}{digit}{}", &line[..at], &line[at + 1..]));
                }
            }
            at += number.len();
        }
        let starts: Vec<usize> = line.match_indices(" -m ").map(|(at, _)| at).collect();
        for start in starts {
            let rest = &line[start + 1..];
            let end = rest.find(" -m ").or_else(|| rest.find(" -j "));
            let end = end.map_or(line.len(), |end| start + 1 + end);
            altered.push(format!("{}{}", &line[..start], &line[end..]));
        }
        if let Some((rule, _)) = line.rsplit_once(" -j ") {
            altered.push(format!("{rule} -j QUEUE"));
            altered.push(format!("{rule} -j KUBE-MARK-DROP"));
            altered.push(rule.to_owned());
        }
        altered
    }

    #[test]
    fn any_rule_that_is_altered_is_noticed() {
        // Both back ends print the same lines.
        let dumps = DUMPS
            .iter()
            .filter(|(_, mode, _)| *mode != Mode::IptablesLegacy);
        for &(family, mode, dump) in dumps {
            let expected = parse(dump, family).expect("a dump");
            let concerned = Concerned::of(dump);
            for (index, line) in dump.lines().enumerate() {
                if !line.starts_with('-') {
                    continue;
                }
                let service = concerned.by(line);
                for altered in alterations(line) {
                    let found = with_line(dump, index, &[&altered]);
                    // The mask of a mark can be written in many ways.
                    let same = altered.replace("0x4000/0 ", "0x4000/0x0 ");
                    if parse(&found, family).is_ok() && same != line {
                        assert_noticed(&expected, &found, mode, service, &altered);
                    }
                }
            }
        }
    }

    /// The one finding for a change of a line of [`V4`].
    fn one(find: &str, put: &str) -> Finding {
        let index = V4
            .lines()
            .position(|line| line.contains(find))
            .expect("such a line");
        let line = V4.lines().nth(index).expect("one");
        let changed = line.replace(find, put);
        let put: &[&str] = if put.is_empty() { &[] } else { &[&changed] };
        let mut findings = compare(V4, &with_line(V4, index, put), Family::V4, NFT);
        assert_eq!(findings.len(), 1, "{findings:#?}");
        findings.remove(0)
    }

    #[test]
    fn findings_say_what_a_packet_suffers() {
        let missing = one(
            "\"shop/web-np:https cluster IP\" -m tcp --dport 443 -j KUBE-SVC",
            "",
        );
        assert_eq!(missing.kind, Kind::Missing);
        assert_eq!(missing.place, "nat KUBE-SERVICES");
        assert_eq!(missing.service.as_deref(), Some("shop/web-np:https"));
        assert!(missing.effect.contains("untranslated"));
        assert_eq!(missing.line, None);

        let last = one("-j KUBE-SEP-EIXAW3UET5NOOHSP", "");
        assert_eq!(last.service.as_deref(), Some("shop/web:http"));
        assert!(last.effect.contains("1 of 3 new flows"));

        let altered = one("10.244.1.13:8443", "10.244.1.99:8443");
        assert_eq!(altered.kind, Kind::Altered);
        assert_eq!(altered.place, "nat KUBE-SEP-LV26G7K4DD6JBWEQ");
        assert!(altered.found.expect("one").ends_with("10.244.1.99:8443"));
        assert!(altered.effect.contains("10.244.1.99 port 8443"));

        let uneven = one("0.33333333349", "0.50000000000");
        assert_eq!(uneven.kind, Kind::Altered);
        assert!(uneven.effect.contains("unevenly"));

        let shared = one("-A POSTROUTING -m comment", "");
        assert_eq!(shared.service, None);
        assert!(shared.effect.contains("masqueraded"));

        let comment = one(
            "masquerade traffic for edge/ext:http",
            "masquerade traffic for edge/axt:http",
        );
        assert_eq!(comment.service.as_deref(), Some("edge/ext:http"));
        assert!(comment.effect.contains("only the comment"));
    }

    #[test]
    fn an_endpoint_that_is_gone_is_stale() {
        let sep = "KUBE-SEP-AAAAAAAAAAAAAAAA";
        let found = V4
            .replace(":KUBE-SERVICES - [0:0]\n:KUBE-SVC", &format!(":{sep} - [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC"))
            .replace(
                "-A KUBE-SVL-HDZW",
                &format!("-A {sep} -p tcp -m tcp -j DNAT --to-destination 10.244.0.99:8080\n\
                          -A KUBE-SVL-HDZWCINOTGBA7EM2 -m statistic --mode random --probability 0.5 -j {sep}\n\
                          -A KUBE-SVL-HDZW"),
            );
        let findings = compare(V4, &found, Family::V4, NFT);
        let kinds: Vec<(Kind, &str)> = findings
            .iter()
            .map(|f| (f.kind, f.place.as_str()))
            .collect();
        assert_eq!(
            kinds,
            [
                (Kind::Stale, "nat KUBE-SVL-HDZWCINOTGBA7EM2"),
                (Kind::Stale, "nat KUBE-SEP-AAAAAAAAAAAAAAAA"),
            ]
        );
        for finding in findings {
            assert_eq!(finding.service.as_deref(), Some("shop/web-local:http"));
            assert!(finding.line.is_some());
        }
    }

    #[test]
    fn another_modes_chains_are_leftovers() {
        let ipvs = DUMPS[4].2;
        for (expected, found, mode) in [(V4, ipvs, NFT), (ipvs, V4, Mode::Ipvs)] {
            let findings = compare(expected, found, Family::V4, mode);
            let leftover = |finding: &&Finding| finding.kind == Kind::Leftover;
            assert!(findings.iter().filter(leftover).count() > 5);
            assert!(findings.iter().any(|finding| finding.kind == Kind::Missing));
        }
        let found = parse(V4, Family::V4).expect("a dump");
        let findings = check(&Tables::none(Family::V4), &found, Mode::Nftables);
        assert!(
            findings
                .iter()
                .all(|finding| finding.kind == Kind::Leftover)
        );
        assert!(
            findings
                .iter()
                .any(|finding| finding.place == "nat PREROUTING")
        );
        assert!(
            findings
                .iter()
                .any(|finding| finding.service.as_deref() == Some("shop/web:http"))
        );
    }

    #[test]
    fn others_rules_are_no_differences() {
        let found = V4
            .replace(
                ":KUBE-MARK-MASQ - [0:0]",
                ":DOCKER - [0:0]\n:KUBE-HOSTPORTS - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n:CNI-1 - [0:0]\n:KUBE-MARK-MASQ - [0:0]",
            )
            .replace(
                "-A OUTPUT -m comment --comment \"kubernetes service portals\"",
                "-A OUTPUT -m foo --bar -j DOCKER\n-A CNI-1 -j KUBE-MARK-MASQ\n-A OUTPUT -m comment --comment \"kubernetes service portals\"",
            )
            .replace(
                "-A KUBE-FIREWALL !",
                "-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP\n-A KUBE-FIREWALL !",
            )
            .replace(":FORWARD ACCEPT", ":FORWARD DROP");
        assert_eq!(compare(V4, &found, Family::V4, NFT), []);
    }

    #[test]
    fn a_services_rules_are_compared_in_their_order() {
        let lines: Vec<&str> = V4.lines().collect();
        let swapped = |find: &str| {
            let at = lines
                .iter()
                .position(|line| line.contains(find))
                .expect("such a line");
            let mut lines = lines.clone();
            lines.swap(at, at + 1);
            compare(V4, &(lines.join("\n") + "\n"), Family::V4, NFT)
        };
        // Of one Service.
        for find in [
            "-A KUBE-NODEPORTS -d 127.0.0.0/8 -p tcp -m comment --comment \"edge/gateway:http\"",
            "-A KUBE-SVC-67NZLRHBNDSAWJRO -m comment",
            "\"kube-system/kube-dns:dns cluster IP\" -m udp --dport 53 -j KUBE-SVC",
        ] {
            let findings = swapped(find);
            assert_eq!(findings.len(), 1, "{find}");
            assert_eq!(findings[0].kind, Kind::Altered);
            assert!(
                findings[0]
                    .found
                    .as_deref()
                    .expect("one")
                    .contains("another place")
            );
        }
        // Of two.
        assert_eq!(
            swapped("\"shop/cart:grpc cluster IP\" -m tcp --dport 9000 -j KUBE-SVC"),
            []
        );
    }

    #[test]
    fn a_flush_is_all_missing() {
        let flushed: String = V4
            .lines()
            .filter(|line| !line.starts_with('-'))
            .flat_map(|line| [line, "\n"])
            .collect();
        let findings = compare(V4, &flushed, Family::V4, NFT);
        assert!(findings.iter().all(|finding| finding.kind == Kind::Missing));
        let services: HashSet<&str> = findings
            .iter()
            .filter_map(|f| f.service.as_deref())
            .collect();
        assert_eq!(services, Concerned::of(V4).1);
        let empty = check(
            &parse(V4, Family::V4).expect("a dump"),
            &Tables::none(Family::V4),
            NFT,
        );
        assert!(empty.iter().all(|finding| finding.kind == Kind::Missing));
    }

    /// Services with eight endpoints each.
    fn cluster(services: u32) -> Cluster {
        let address = |net: u8, n: u32| {
            let [_, a, b, c] = n.to_be_bytes();
            std::net::IpAddr::from([net, 64 + a, b, c])
        };
        let service = |n: u32| Service {
            namespace: "default".to_owned(),
            name: format!("service-{n}"),
            cluster_ips: vec![address(11, n)],
            ports: vec![ServicePort {
                name: "http".to_owned(),
                protocol: Protocol::Tcp,
                port: 80,
                node_port: None,
                endpoints: (0..8)
                    .map(|endpoint| Endpoint::ready(address(10, n * 8 + endpoint), 8080, "other"))
                    .collect(),
            }],
            ..Service::default()
        };
        Cluster {
            services: (0..services).map(service).collect(),
            ..Cluster::default()
        }
    }

    /// The input of `iptables-restore` for a cluster.
    fn rendered(cluster: &Cluster, node: &NodeView, mode: Mode, family: Family) -> String {
        let steps = render(cluster, node, mode).steps;
        let texts = steps.into_iter().filter_map(|step| match step {
            Step::Iptables {
                family: of, text, ..
            } if of == family => Some(text),
            _ => None,
        });
        texts.collect()
    }

    #[test]
    fn real_dumps_are_what_their_cluster_calls_for() {
        let json = include_str!("../fixtures/kube-proxy-1.36.2/cluster.json");
        let cluster =
            crate::cluster::read::read(json.as_bytes(), "cluster.json").expect("a cluster");
        let addresses: [[u8; 4]; 2] = [[172, 31, 255, 2], [10, 0, 2, 15]];
        let node = NodeView {
            name: "worker-0".to_owned(),
            addresses: addresses.map(std::net::IpAddr::from).into(),
            cluster_cidrs: ["10.244.0.0/16", "fd00:10:244::/56"]
                .map(|cidr| cidr.parse().expect("a dump"))
                .into(),
            ..NodeView::default()
        };
        for (family, mode, dump) in DUMPS {
            let found = parse(dump, family).expect("a dump");
            let text = rendered(&cluster.cluster, &node, mode, family);
            let expected = parse(&text, family).expect("a dump");
            assert_eq!(check(&expected, &found, mode), [], "{mode} {family}");
            assert_eq!(uses_nfacct(dump), mode != Mode::Ipvs);
        }
    }

    #[test]
    fn services_of_a_large_cluster_are_named_without_comments() {
        let text = rendered(&cluster(130), &NodeView::default(), NFT, Family::V4);
        let expected = parse(&text, Family::V4).expect("a dump");
        let save = expected.saved();
        assert_eq!(
            check(&expected, &parse(&save, Family::V4).expect("a dump"), NFT),
            []
        );
        let id = "default/service-7:http";
        let hash = service_hash(id, Protocol::Tcp);
        let service = expected.chain("nat", &format!("KUBE-SVC-{}", hash.as_str()));
        let endpoints = service.expect("one").rules.iter().filter_map(Rule::chain);
        let names: Vec<&str> = endpoints.chain([hash.as_str()]).collect();
        let mut lines = 0;
        for (index, line) in save.lines().enumerate() {
            if names.iter().any(|name| line.contains(name)) {
                lines += 1;
                assert_noticed(
                    &expected,
                    &with_line(&save, index, &[]),
                    NFT,
                    Some(id),
                    line,
                );
            }
        }
        // The Service's chain and rule, and for each endpoint a chain and three rules.
        assert_eq!(lines, 2 + 8 * 4);
    }

    #[test]
    fn a_cluster_that_became_large_keeps_comments_until_they_are_written_anew() {
        let render = |services| rendered(&cluster(services), &NodeView::default(), NFT, Family::V4);
        let (large, small) = (render(130), render(120));
        let expected = parse(&large, Family::V4).expect("a dump");
        let before = parse(&small, Family::V4).expect("a dump").saved();
        let mut mixed = expected.clone();
        let with_comments = parse(&before, Family::V4).expect("a dump");
        for table in &mut mixed.list {
            for chain in &mut table.chains {
                if ChainKind::of(table.name, chain.name).is_of_one_service()
                    && let Some(before) = with_comments.chain(table.name, chain.name)
                {
                    chain.rules.clone_from(&before.rules);
                }
            }
        }
        let save = mixed.saved();
        assert!(save.matches("--comment").count() > expected.saved().matches("--comment").count());
        let found = parse(&save, Family::V4).expect("a dump");
        assert_eq!(check(&expected, &found, NFT), []);
        // The other way round they are called for.
        let small = parse(&small, Family::V4).expect("a dump");
        let bare = parse(&large, Family::V4).expect("a dump").saved();
        let bare = parse(&bare, Family::V4).expect("a dump");
        assert!(!check(&small, &bare, NFT).is_empty());
    }

    #[test]
    fn nfacct_is_seen() {
        let without = V4.replace(
            "-m nfacct --nfacct-name  ct_state_invalid_dropped_pkts ",
            "",
        );
        assert!(uses_nfacct(&without));
        let six = DUMPS[1].2;
        assert!(uses_nfacct(six));
        let without = six.replace(
            "-m nfacct --nfacct-name  ct_state_invalid_dropped_pkts ",
            "",
        );
        assert!(!uses_nfacct(&without));
    }
}
