//! nftables mode: names in chains' names, the rest in maps and chains.
//!
//! Maps lead from addresses and ports to `service-`, `local-` and `external-` chains named
//! `HASH-ns/name/protocol/port`. Up to Kubernetes 1.35 every endpoint had a chain of its own; now
//! only those of a Service with session affinity have.

use std::net::{IpAddr, SocketAddr};

use super::{
    Collector, ElementChange, Foreign, Found, FoundService, FrontendKind, NftTable, Refusal, owner,
};
use crate::cluster::{Cidr, Family, Protocol, TrafficPolicy};
use crate::rules::Mode;
use crate::rules::nftables::table::{
    Chain, Element, Field, Key, KeyText, Mapped, Operand, Rule, Ruleset, Set, Statement, Table,
    Target, Value, Verdict, VerdictMap,
};

pub(super) const SERVICE: &str = "service-";
pub(super) const LOCAL: &str = "local-";
const EXTERNAL: &str = "external-";
const FIREWALL: &str = "firewall-";

pub(super) fn read(ruleset: &Ruleset, family: Family, found: &mut Found) {
    if let Some(table) = ruleset.table(family) {
        found.modes.push(Mode::Nftables.name());
        let mut collector = Collector::new(Mode::Nftables.name(), family);
        add_table(table, &mut collector);
        collector.finish(found);
        for rule in table.chains.values().flat_map(|chain| &chain.rules) {
            if let Some(pods) = pods_of(rule) {
                found.add_pod_cidr(pods);
            }
        }
    }
    found
        .nft_tables
        .extend(ruleset.hooked.iter().map(|(family, name)| NftTable {
            family: family.to_string(),
            name: name.to_string(),
        }));
    found
        .foreign
        .extend(ruleset.foreign.iter().map(|(family, name)| Foreign {
            place: format!("nft {family}"),
            name: name.to_string(),
            owner: owner(name),
            count: None,
        }));
}

/// The pod network, of a rule that has everybody else masqueraded.
fn pods_of(rule: &Rule) -> Option<Cidr> {
    let mut statements = rule.statements.iter();
    if !statements.any(|one| matches!(one, Statement::Mark(_))) {
        return None;
    }
    rule.statements
        .iter()
        .find_map(|statement| match statement {
            Statement::Match {
                fields,
                negated: true,
                operand: Operand::Addresses(addresses),
            } if matches!(fields[..], [Field::Source(_)]) => addresses.network(),
            _ => None,
        })
}

fn add_table(table: &Table, collector: &mut Collector) {
    let cluster_ips = table.sets.get("cluster-ips");
    for (key, element) in elements(table, "service-ips") {
        if let Some((chain, address, protocol, port)) = frontend(key, element) {
            let kind = if chain.starts_with(EXTERNAL) {
                FrontendKind::External
            } else {
                FrontendKind::ClusterIp
            };
            add(table, chain, kind, address, protocol, port, collector);
        }
    }
    for (key, element) in elements(table, "service-nodeports") {
        if let Some((chain, address, protocol, port)) = frontend(key, element) {
            let kind = FrontendKind::NodePort;
            add(table, chain, kind, address, protocol, port, collector);
        }
    }
    for (key, element) in elements(table, "firewall-ips") {
        let Some((chain, address, protocol, port)) = frontend(key, element) else {
            continue;
        };
        let Some(name) = service_name(chain) else {
            continue;
        };
        let service = collector.named(&name, protocol);
        service.frontend(FrontendKind::LoadBalancer, address, port);
        let own = address.map(|address| address.to_string());
        service.source_ranges = source_ranges(table.chains.get(chain), own.as_deref());
    }
    for (key, element) in elements(table, "no-endpoint-services") {
        add_refusal(key, element, cluster_ips, collector);
    }
    for (key, element) in elements(table, "no-endpoint-nodeports") {
        add_refusal(key, element, cluster_ips, collector);
    }
}

fn elements<'t>(table: &'t Table, set: &str) -> impl Iterator<Item = (&'t Key, &'t Element)> {
    table
        .sets
        .get(set)
        .into_iter()
        .flat_map(|set| &set.elements)
}

/// What an element of a map is about: an address, or any of the node's, and a port.
pub(crate) type Place = (Option<IpAddr>, Protocol, u16);

/// The Service that a new element stands for, with this frontend alone; `None` if the map holds something else.
pub(super) fn of_element(element: &ElementChange) -> Option<FoundService> {
    let (address, protocol, port) = element.place;
    let (name, outside, refusal) = match element.set.as_str() {
        "service-ips" | "service-nodeports" => {
            let chain = element.chain.as_ref()?;
            (service_name(chain)?, chain.starts_with(EXTERNAL), None)
        }
        "no-endpoint-services" | "no-endpoint-nodeports" => {
            let refusal = match element.chain {
                Some(_) => Refusal::Reject,
                None => Refusal::Drop,
            };
            let name = element.comment.clone()?;
            (name, !element.cluster_ip, Some(refusal))
        }
        _ => return None,
    };
    let kind = match address {
        None => FrontendKind::NodePort,
        Some(_) if outside => FrontendKind::External,
        Some(_) => FrontendKind::ClusterIp,
    };
    let mut service =
        FoundService::bare(Some(name), Mode::Nftables.name(), element.family, protocol);
    service.frontend(kind, address, port).refusal = refusal;
    if refusal.is_none() {
        service.served.insert((address, port));
    }
    Some(service)
}

/// What a chain with a Service's endpoints begins with, and whose it is.
pub(crate) fn chain_of(chain: &str) -> Option<(&'static str, String, Protocol)> {
    let prefix = [SERVICE, LOCAL]
        .into_iter()
        .find(|prefix| chain.starts_with(prefix))?;
    let protocol = chain.split('/').nth(2)?;
    let protocol = Protocol::ALL
        .into_iter()
        .find(|one| one.name() == protocol)?;
    Some((prefix, service_name(chain)?, protocol))
}

/// `10.96.0.1 . tcp . 443`, or `tcp . 30080`.
fn place(key: &[Value]) -> Option<(Option<IpAddr>, Protocol, u16)> {
    let (address, rest) = match key {
        [Value::Address(address), rest @ ..] => (Some(*address), rest),
        rest => (None, rest),
    };
    match rest {
        [Value::Protocol(protocol), Value::Number(port)] => {
            Some((address, *protocol, u16::try_from(*port).ok()?))
        }
        _ => None,
    }
}

/// The chain that an element leads to, and from where.
fn frontend<'t>(
    key: &[Value],
    element: &'t Element,
) -> Option<(&'t str, Option<IpAddr>, Protocol, u16)> {
    let Some(Mapped::Verdict(verdict)) = &element.value else {
        return None;
    };
    let (address, protocol, port) = place(key)?;
    Some((verdict.chain()?, address, protocol, port))
}

/// `service-HASH-ns/name/protocol/port` as `ns/name:port`.
fn service_name(chain: &str) -> Option<String> {
    let (_, base) = chain.split_once('-')?;
    let (_, full) = base.split_once('-')?;
    let mut parts = full.splitn(4, '/');
    let (namespace, name) = (parts.next()?, parts.next()?);
    parts.next()?;
    Some(match parts.next()? {
        "" => format!("{namespace}/{name}"),
        port => format!("{namespace}/{name}:{port}"),
    })
}

fn add(
    table: &Table,
    chain: &str,
    kind: FrontendKind,
    address: Option<IpAddr>,
    protocol: Protocol,
    port: u16,
    collector: &mut Collector,
) {
    let name = service_name(chain);
    let service = collector.entry(name.as_deref().unwrap_or(chain), name.as_deref(), protocol);
    service.frontend(kind, address, port);
    service.served.insert((address, port));
    let base = [SERVICE, LOCAL, EXTERNAL, FIREWALL]
        .iter()
        .find_map(|prefix| chain.strip_prefix(prefix))
        .unwrap_or(chain);
    for (prefix, local) in [(SERVICE, false), (LOCAL, true)] {
        if let Some(chain) = table.chains.get(format!("{prefix}{base}").as_str()) {
            add_endpoints(table, chain, local, service);
        }
    }
    let policy = if chain.starts_with(LOCAL) {
        TrafficPolicy::Local
    } else if chain.starts_with(EXTERNAL) {
        external_policy(table.chains.get(chain))
    } else {
        TrafficPolicy::Cluster
    };
    if kind == FrontendKind::ClusterIp {
        service.internal_policy = Some(policy);
    } else {
        service.external_policy = Some(policy);
    }
}

/// Only traffic with a Cluster policy is always masqueraded.
fn external_policy(chain: Option<&Chain>) -> TrafficPolicy {
    let mut rules = chain.into_iter().flat_map(|chain| &chain.rules);
    let masquerades = rules.any(|rule| matches!(rule.statements[..], [Statement::Mark(_)]));
    if masquerades {
        TrafficPolicy::Cluster
    } else {
        TrafficPolicy::Local
    }
}

fn add_endpoints(table: &Table, chain: &Chain, local: bool, service: &mut FoundService) {
    let mut endpoints: Vec<SocketAddr> = Vec::new();
    for statement in chain.rules.iter().flat_map(|rule| &rule.statements) {
        match statement {
            Statement::Vmap {
                map: VerdictMap::Inline(verdicts),
                ..
            } => {
                let chains = verdicts.values().filter_map(Verdict::chain);
                let chains = chains.filter_map(|chain| table.chains.get(chain));
                let rules = chains.flat_map(|chain| &chain.rules);
                for statement in rules.flat_map(|rule| &rule.statements) {
                    endpoints.extend(destinations(statement));
                }
            }
            Statement::Match {
                operand: Operand::Set(set),
                ..
            } => {
                let timeout = table.sets.get(set).and_then(|set| set.timeout);
                let timeout = timeout.and_then(|seconds| u32::try_from(seconds).ok());
                service.affinity = service.affinity.or(timeout);
            }
            statement => endpoints.extend(destinations(statement)),
        }
    }
    if local {
        service.local_endpoints = endpoints;
    } else {
        service.endpoints = endpoints;
    }
}

/// Where a `dnat` leads.
fn destinations(statement: &Statement) -> Vec<SocketAddr> {
    let Statement::Dnat(target) = statement else {
        return Vec::new();
    };
    match target {
        Target::One(one) => vec![one],
        Target::Random { destinations, .. } => {
            destinations.iter().map(|(_, one)| one).collect::<Vec<_>>()
        }
    }
    .into_iter()
    .filter_map(|one| Some(SocketAddr::new(one.address, one.port?)))
    .collect()
}

/// `ip saddr != { 203.0.113.0/25, 198.51.100.10 } drop`, without the load balancer's own address.
fn source_ranges(chain: Option<&Chain>, own: Option<&str>) -> Vec<String> {
    let statements = chain
        .into_iter()
        .flat_map(|chain| &chain.rules)
        .flat_map(|rule| &rule.statements);
    let mut ranges = Vec::new();
    for statement in statements {
        if let Statement::Match {
            fields,
            negated: true,
            operand: Operand::Addresses(allowed),
        } = statement
            && matches!(fields[..], [Field::Source(_)])
        {
            let text = allowed.to_string();
            let list = text.trim_start_matches("{ ").trim_end_matches(" }");
            ranges.extend(list.split(", ").map(str::to_owned));
        }
    }
    ranges.retain(|range| Some(range.as_str()) != own);
    ranges
}

/// An element of a map of what has no endpoints.
fn add_refusal(
    key: &[Value],
    element: &Element,
    cluster_ips: Option<&Set>,
    collector: &mut Collector,
) {
    let (Some((address, protocol, port)), Some(Mapped::Verdict(verdict))) =
        (place(key), &element.value)
    else {
        return;
    };
    let refusal = match verdict {
        Verdict::Drop => Refusal::Drop,
        _ => Refusal::Reject,
    };
    let kind = match address {
        None => FrontendKind::NodePort,
        Some(address) => {
            let key: Key = [Value::Address(address)].into();
            // Kubernetes 1.29 had no such set.
            match cluster_ips {
                Some(set) if !set.elements.contains_key(&key) => FrontendKind::External,
                _ => FrontendKind::ClusterIp,
            }
        }
    };
    let unnamed = KeyText(key).to_string();
    let name = element.comment.as_deref();
    let service = collector.entry(name.unwrap_or(&unnamed), name, protocol);
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
