//! iptables mode: names in comments, the rest in chains.
//!
//! The chains of one `ServicePort` end in the same hash: `KUBE-SVC-` balances over all endpoints,
//! `KUBE-SVL-` over local ones, `KUBE-EXT-` takes traffic from outside, `KUBE-FW-` looks at source
//! ranges. Up to Kubernetes 1.23 `KUBE-XLB-` was the last two of a Local policy in one, `KUBE-FW-`
//! stood for every load balancer, and a NodePort led to `KUBE-SVC-`.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use super::{Collector, Foreign, Found, FoundService, FrontendKind, Refusal, owner};
use crate::cluster::{Cidr, Protocol, TrafficPolicy};
use crate::rules::Mode;
use crate::rules::iptables::rule::{
    Chain, IpProtocol, Match, Rule, Table, Tables, Target, built_in_chains,
};
use crate::rules::iptables::{EXT, FW, SEP, SVC, SVL};

/// kube-proxy's chains, besides those of `ServicePort`s.
const CHAINS: [&str; 15] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-MARK-MASQ",
    "KUBE-MARK-DROP",
    "KUBE-FORWARD",
    "KUBE-PROXY-FIREWALL",
    "KUBE-FIREWALL",
    "KUBE-PROXY-CANARY",
    "KUBE-NODE-PORT",
    "KUBE-LOAD-BALANCER",
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
];

/// Of old; see above.
const XLB: &str = "KUBE-XLB-";

/// How the chains of `ServicePort`s begin.
const PREFIXES: [&str; 6] = [SVC, SVL, SEP, EXT, FW, XLB];

const MARK_MASQ: &str = "KUBE-MARK-MASQ";

pub(super) fn read(tables: &Tables<'_>, mode: &'static str, found: &mut Found) {
    let nat = tables.table("nat");
    let has = |chain: &str| {
        let mut all = tables.list.iter();
        all.any(|table| table.chain(chain).is_some())
    };
    if has("KUBE-NODEPORTS") || has("KUBE-EXTERNAL-SERVICES") {
        found.modes.push(mode);
    }
    if has("KUBE-NODE-PORT") {
        found.modes.push(Mode::Ipvs.name());
    }
    let mut collector = Collector::new(mode, tables.family);
    if let Some(nat) = nat {
        for rule in rules(nat, "KUBE-SERVICES") {
            add_address(nat, rule, &mut collector);
        }
        for rule in rules(nat, "KUBE-NODEPORTS") {
            add_node_port(nat, rule, &mut collector);
        }
        for rule in nat.chains.iter().flat_map(|chain| &chain.rules) {
            if let Some(pods) = pods_of(rule) {
                found.add_pod_cidr(pods);
            }
        }
    }
    if let Some(filter) = tables.table("filter") {
        for (chain, kind) in [
            ("KUBE-SERVICES", FrontendKind::ClusterIp),
            ("KUBE-EXTERNAL-SERVICES", FrontendKind::External),
        ] {
            for rule in rules(filter, chain) {
                add_refusal(rule, kind, &mut collector);
            }
        }
        for rule in rules(filter, "KUBE-NODEPORTS") {
            if let Some((name, " health check node port")) = name_and_rest(rule)
                && let Some((protocol, port)) = destination_port(rule)
                // The check speaks TCP, whatever the Service does.
                && protocol == Protocol::Tcp
            {
                add_health_check(name, port, &mut collector);
            }
        }
    }
    collector.finish(found);
    for table in &tables.list {
        add_foreign(tables, table, found);
    }
}

/// The pod network, of a rule that has everybody else masqueraded.
fn pods_of(rule: &Rule<'_>) -> Option<Cidr> {
    let source = rule.source.as_ref()?;
    (rule.chain() == Some(MARK_MASQ) && source.negated).then_some(source.value)
}

fn rules<'t, 'a>(table: &'t Table<'a>, chain: &str) -> &'t [Rule<'a>] {
    table.chain(chain).map_or(&[], |chain| &chain.rules)
}

/// What a comment begins and goes on with: `ns/name:port` has no spaces.
fn name_and_rest<'r>(rule: &'r Rule<'_>) -> Option<(&'r str, &'r str)> {
    let comment = rule.comment()?;
    let end = comment.find(' ').unwrap_or(comment.len());
    let (name, rest) = comment.split_at(end);
    name.contains('/').then_some((name, rest))
}

fn protocol(protocol: IpProtocol) -> Option<Protocol> {
    Protocol::ALL
        .into_iter()
        .find(|known| known.number() == protocol.0)
}

/// The one destination port that a rule is for.
fn destination_port(rule: &Rule<'_>) -> Option<(Protocol, u16)> {
    rule.matches.iter().find_map(|part| match part {
        Match::Transport(transport) => {
            let ports = transport.destination.as_ref()?;
            let one = !ports.negated && ports.value.first == ports.value.last;
            one.then_some((protocol(transport.protocol)?, ports.value.first))
        }
        _ => None,
    })
}

/// The one destination address that a rule is for.
fn destination(rule: &Rule<'_>) -> Option<IpAddr> {
    let destination = rule.destination.as_ref()?;
    let whole = if destination.value.base.is_ipv4() {
        32
    } else {
        128
    };
    (!destination.negated && destination.value.prefix == whole).then_some(destination.value.base)
}

/// Does every packet fulfil the rule?
fn is_unconditional(rule: &Rule<'_>) -> bool {
    rule.source.is_none()
        && rule.destination.is_none()
        && rule.in_interface.is_none()
        && rule.out_interface.is_none()
        && rule.protocol.is_none()
        && rule
            .matches
            .iter()
            .all(|part| matches!(part, Match::Comment(_)))
}

/// What follows the prefix of a `ServicePort`'s chain.
fn hash(chain: &str) -> Option<&str> {
    PREFIXES
        .iter()
        .find_map(|prefix| chain.strip_prefix(prefix))
}

/// A rule of `KUBE-SERVICES`.
fn add_address(nat: &Table<'_>, rule: &Rule<'_>, collector: &mut Collector) {
    let (Some(address), Some((protocol, port)), Some(target)) =
        (destination(rule), destination_port(rule), rule.chain())
    else {
        return;
    };
    // Up to Kubernetes 1.21 masquerading was asked for here.
    let Some(hash) = hash(target) else { return };
    let kind = match name_and_rest(rule) {
        Some((_, " cluster IP")) => FrontendKind::ClusterIp,
        Some((_, " external IP")) => FrontendKind::ExternalIp,
        Some((_, " loadbalancer IP")) => FrontendKind::LoadBalancer,
        _ if target.starts_with(SVC) || target.starts_with(SVL) => FrontendKind::ClusterIp,
        _ if target.starts_with(FW) => FrontendKind::LoadBalancer,
        _ => FrontendKind::External,
    };
    let name = name_and_rest(rule).map(|(name, _)| name);
    let service = collector.entry(name.unwrap_or(hash), name, protocol);
    service.frontend(kind, Some(address), port);
    add_chains(nat, target, kind, service);
}

/// A rule of `KUBE-NODEPORTS`.
fn add_node_port(nat: &Table<'_>, rule: &Rule<'_>, collector: &mut Collector) {
    let (Some((protocol, port)), Some(target)) = (destination_port(rule), rule.chain()) else {
        return;
    };
    let Some(hash) = hash(target) else { return };
    let name = name_and_rest(rule).map(|(name, _)| name);
    let service = collector.entry(name.unwrap_or(hash), name, protocol);
    service.frontend(FrontendKind::NodePort, None, port);
    add_chains(nat, target, FrontendKind::NodePort, service);
}

/// What the chains of a `ServicePort` say, from the one that a frontend leads to.
fn add_chains(nat: &Table<'_>, target: &str, kind: FrontendKind, service: &mut FoundService) {
    let Some(hash) = hash(target) else { return };
    let chain = |prefix: &str| nat.chain(&format!("{prefix}{hash}"));
    for (prefix, local) in [(SVC, false), (SVL, true), (XLB, true)] {
        let Some(chain) = chain(prefix) else { continue };
        let endpoints = if local {
            &mut service.local_endpoints
        } else {
            &mut service.endpoints
        };
        if endpoints.is_empty() {
            *endpoints = endpoints_of(nat, chain);
        }
        let mut timeouts = chain.rules.iter().filter_map(affinity);
        service.affinity = service.affinity.or_else(|| timeouts.next());
    }
    let policy = if target.starts_with(SVL) || target.starts_with(XLB) {
        TrafficPolicy::Local
    } else if target.starts_with(SVC) {
        TrafficPolicy::Cluster
    } else {
        external_policy([chain(EXT), chain(FW)])
    };
    if kind == FrontendKind::ClusterIp {
        service.internal_policy = Some(policy);
    } else {
        service.external_policy = Some(policy);
    }
    if target.starts_with(FW)
        && let Some(chain) = chain(FW)
    {
        add_source_ranges(chain, service);
    }
}

/// Only traffic with a Cluster policy is always masqueraded.
fn external_policy(chains: [Option<&Chain<'_>>; 2]) -> TrafficPolicy {
    let masquerades = |chain: &Chain<'_>| {
        let mut rules = chain.rules.iter();
        rules.any(|rule| rule.chain() == Some(MARK_MASQ) && is_unconditional(rule))
    };
    if chains.into_iter().flatten().any(masquerades) {
        TrafficPolicy::Cluster
    } else {
        TrafficPolicy::Local
    }
}

/// Where a balancing chain's rules lead, in their order.
fn endpoints_of(nat: &Table<'_>, chain: &Chain<'_>) -> Vec<SocketAddr> {
    let mut endpoints = Vec::new();
    // With affinity each stands there twice.
    let mut seen = HashSet::new();
    let targets = chain.rules.iter().filter_map(Rule::chain);
    for target in targets.filter(|target| target.starts_with(SEP)) {
        let endpoint = rules(nat, target)
            .iter()
            .find_map(|rule| match rule.target {
                Target::Dnat(dnat) => Some(SocketAddr::new(dnat.address?, dnat.port?)),
                _ => None,
            });
        endpoints.extend(endpoint.filter(|endpoint| seen.insert(*endpoint)));
    }
    endpoints
}

fn affinity(rule: &Rule<'_>) -> Option<u32> {
    rule.matches.iter().find_map(|part| match part {
        Match::Recent(recent) if recent.seconds > 0 => Some(recent.seconds),
        _ => None,
    })
}

fn add_source_ranges(chain: &Chain<'_>, service: &mut FoundService) {
    for rule in &chain.rules {
        let Some(source) = rule.source.filter(|source| !source.negated) else {
            continue;
        };
        // A load balancer's own address may reach itself.
        let own = service.frontends.iter().any(|frontend| {
            frontend.address == Some(source.value.base)
                && frontend.kind == FrontendKind::LoadBalancer
        });
        let range = source.value.to_string();
        if !own && !service.source_ranges.contains(&range) {
            service.source_ranges.push(range);
        }
    }
}

/// A rule for something without endpoints.
fn add_refusal(rule: &Rule<'_>, kind: FrontendKind, collector: &mut Collector) {
    let (Some((name, _)), Some((protocol, port))) = (name_and_rest(rule), destination_port(rule))
    else {
        return;
    };
    let refusal = match rule.target {
        Target::Reject(_) => Refusal::Reject,
        Target::Drop => Refusal::Drop,
        _ => return,
    };
    let address = destination(rule);
    let kind = if address.is_some() {
        kind
    } else {
        FrontendKind::NodePort
    };
    let service = collector.named(name, protocol);
    let frontend = service.frontend(kind, address, port);
    frontend.refusal = Some(refusal);
    if refusal == Refusal::Drop {
        if frontend.kind == FrontendKind::ClusterIp {
            service.internal_policy = Some(TrafficPolicy::Local);
        } else {
            service.external_policy = Some(TrafficPolicy::Local);
        }
    }
}

/// The health check is of the whole Service, and its rule is named for one of its ports.
fn add_health_check(name: &str, port: u16, collector: &mut Collector) {
    let mut any = false;
    for protocol in Protocol::ALL {
        if let Some(service) = collector.services.get_mut(&(name.to_owned(), protocol)) {
            service.health_check_node_port = Some(port);
            any = true;
        }
    }
    if !any {
        let service = collector.named(name, Protocol::Tcp);
        service.health_check_node_port = Some(port);
    }
}

fn is_ours(chain: &str) -> bool {
    CHAINS.contains(&chain) || hash(chain).is_some()
}

/// Chains of others, and rules of others in built-in chains.
fn add_foreign(tables: &Tables<'_>, table: &Table<'_>, found: &mut Found) {
    for chain in &table.chains {
        if is_ours(chain.name) {
            continue;
        }
        let built_in = built_in_chains(table.name).contains(&chain.name);
        let theirs = |rule: &&Rule<'_>| !built_in || !rule.chain().is_some_and(is_ours);
        let rules = chain.rules.iter().filter(theirs);
        let count = rules.clone().count() as u64;
        if built_in && count == 0 {
            continue;
        }
        // Of a built-in chain's rules, the first that leads somewhere known tells.
        let mut targets = rules.filter_map(Rule::chain);
        found.foreign.push(Foreign {
            place: format!("{} iptables {}", tables.family, table.name),
            name: chain.name.to_owned(),
            owner: owner(chain.name).or_else(|| targets.find_map(owner)),
            count: Some(count),
        });
    }
}
