//! Is the table on a node the one that its cluster calls for?
//!
//! Everything has to be there exactly as kube-proxy writes it, but for what the values of
//! [`table`](super::table) leave out (order of elements, sets and chains; handles; counters;
//! spelling) and the elements of affinity sets, which the traffic itself adds.
//!
//! Where several Services claim one address and port, any of them may have it: see
//! [`claims`](super::claims).
//!
//! One rule depends on what a cluster's Services do not tell: `ip daddr CIDRS drop comment "Drop
//! traffic to unallocated ClusterIPs"`. If the `ServiceCIDR`s are unknown, the expected table has no
//! such rule. Then one with any networks that hold every ClusterIP of the family is called for if
//! there is a ClusterIP, and may be there if there is none.

use std::cell::OnceCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use crate::cluster::Protocol;
use crate::rules::check::{Finding, Kind};

use super::claims::{Claims, Misplaced};
use super::table::{
    Chain, Destination, Element, ElementText, Field, Key, Line, Mapped, MarkChange, Operand,
    Ranges, Rule, Set, Statement, TABLE, Table, Target, Value, Verdict, VerdictMap,
};

/// What a dump was printed as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `nft list`: all there is.
    Text,
    /// `nft -j list`, which may leave out what [`Table::as_json_shows`] does.
    Json,
}

/// What differs between the table that is called for and the one that was found.
///
/// Where several Services claim one address and port, `expected` has what one of them would write;
/// `claims` is what any would.
pub fn check(expected: &Table, claims: &Claims, found: Option<&Table>, form: Form) -> Vec<Finding> {
    let Some(found) = found else {
        return vec![no_table(expected)];
    };
    let mut checker = Checker {
        expected,
        claims,
        found,
        form,
        services: OnceCell::new(),
        referenced: OnceCell::new(),
        findings: Vec::new(),
    };
    checker.table();
    checker.sets();
    checker.misplaced();
    checker.chains();
    checker.findings
}

/// The Service that a chain or set is for: `ns/name:port`.
///
/// `service-HASH-ns/name/protocol/port`, where `endpoint-` and `affinity-` go on with
/// `__address/port`.
pub fn service_of(name: &str) -> Option<String> {
    const PREFIXES: [&str; 6] = [
        "service-",
        "local-",
        "external-",
        "firewall-",
        "endpoint-",
        "affinity-",
    ];
    let rest = PREFIXES
        .into_iter()
        .find_map(|prefix| name.strip_prefix(prefix))?;
    let (_hash, full) = rest.split_once('-')?;
    let full = full.split_once("__").map_or(full, |(service, _)| service);
    let mut parts = full.split('/');
    let (namespace, service, _protocol) = (parts.next()?, parts.next()?, parts.next()?);
    Some(match parts.next()? {
        "" => format!("{namespace}/{service}"),
        port => format!("{namespace}/{service}:{port}"),
    })
}

fn no_table(expected: &Table) -> Finding {
    let mut services: Vec<String> = expected
        .chains
        .keys()
        .filter_map(|name| service_of(name))
        .collect();
    for set in expected.sets.values() {
        let comments = set
            .elements
            .values()
            .filter_map(|element| element.comment.as_deref());
        services.extend(comments.map(str::to_owned));
    }
    services.sort_unstable();
    services.dedup();
    let table = format!("{} {TABLE}", expected.family.nft());
    Finding {
        kind: Kind::Missing,
        family: expected.family,
        rule: format!("table {table}"),
        place: table,
        found: None,
        line: None,
        service: None,
        effect: format!(
            "new flows to any of the {} ServicePorts of this family are not translated",
            services.len()
        ),
    }
}

/// What is left of nftables mode on a node of another mode.
pub fn leftover(found: &Table) -> Finding {
    let table = format!("{} {TABLE}", found.family.nft());
    Finding {
        kind: Kind::Leftover,
        family: found.family,
        rule: format!("table {table}"),
        place: table,
        found: None,
        line: found.line.known(),
        service: None,
        effect: format!(
            "nftables mode was not cleaned up: its {} rules still refuse, translate and masquerade, \
             with the Services and endpoints of the time they were written",
            found.rule_count()
        ),
    }
}

/// Which Services addresses and ports belong to.
#[derive(Default)]
struct Services {
    sockets: HashMap<(IpAddr, Protocol, u32), String>,
    addresses: HashMap<IpAddr, String>,
    endpoints: HashMap<(IpAddr, Protocol, u32), String>,
    node_ports: HashMap<(Protocol, u32), String>,
}

impl Services {
    /// Names come from the first of `tables` that has one.
    fn new(tables: [&Table; 2]) -> Self {
        let mut services = Self::default();
        for table in tables {
            for set in table.sets.values() {
                for (key, element) in &set.elements {
                    if let Some(service) = named_by(element) {
                        services.add(key, service);
                    }
                }
            }
            for (name, chain) in &table.chains {
                if let Some(service) = service_of(name) {
                    services.add_endpoints(chain, &service);
                }
            }
        }
        services
    }

    fn add(&mut self, key: &[Value], service: String) {
        match key {
            [
                Value::Address(address),
                Value::Protocol(protocol),
                Value::Number(port),
            ] => {
                let shared = self
                    .addresses
                    .entry(*address)
                    .or_insert_with(|| service.clone());
                // Of a Service with several ports, the address is that of all of them.
                if *shared != service
                    && let Some((whole, _)) = service.split_once(':')
                    && shared
                        .split_once(':')
                        .is_some_and(|(known, _)| known == whole)
                {
                    whole.clone_into(shared);
                }
                self.sockets
                    .entry((*address, *protocol, *port))
                    .or_insert(service);
            }
            [Value::Protocol(protocol), Value::Number(port)] => {
                self.node_ports.entry((*protocol, *port)).or_insert(service);
            }
            _ => {}
        }
    }

    fn add_endpoints(&mut self, chain: &Chain, service: &str) {
        for rule in &chain.rules {
            let protocol = rule.statements.iter().find_map(protocol_of);
            for statement in &rule.statements {
                let (Some(protocol), Statement::Dnat(target)) = (protocol, statement) else {
                    continue;
                };
                for destination in destinations(target) {
                    let Some(port) = destination.port else {
                        continue;
                    };
                    self.endpoints
                        .entry((destination.address, protocol, port.into()))
                        .or_insert_with(|| service.to_owned());
                }
            }
        }
    }

    /// The Service that an element's key is about.
    fn of_key(&self, key: &[Value]) -> Option<&String> {
        match key {
            [Value::Address(address)] => self.addresses.get(address),
            [
                Value::Address(address),
                Value::Protocol(protocol),
                Value::Number(port),
            ] => self
                .sockets
                .get(&(*address, *protocol, *port))
                .or_else(|| self.addresses.get(address)),
            [Value::Protocol(protocol), Value::Number(port)] => {
                self.node_ports.get(&(*protocol, *port))
            }
            [
                Value::Address(address),
                Value::Address(_),
                Value::Protocol(protocol),
                Value::Number(port),
            ] => self.endpoints.get(&(*address, *protocol, *port)),
            _ => None,
        }
    }
}

/// The Service that an element itself names: by its chain, or in its comment.
fn named_by(element: &Element) -> Option<String> {
    let chain = match &element.value {
        Some(Mapped::Verdict(verdict)) => verdict.chain().and_then(service_of),
        _ => None,
    };
    chain.or_else(|| element.comment.as_deref().map(str::to_owned))
}

fn protocol_of(statement: &Statement) -> Option<Protocol> {
    match statement {
        Statement::Match {
            fields,
            negated: false,
            operand: Operand::Keys(keys),
        } if **fields == [Field::Protocol] => match keys.first().map(|key| &**key) {
            Some([Value::Protocol(protocol)]) => Some(*protocol),
            _ => None,
        },
        _ => None,
    }
}

fn destinations(target: &Target) -> impl Iterator<Item = Destination> {
    let (one, many) = match target {
        Target::One(destination) => (Some(*destination), &[][..]),
        Target::Random { destinations, .. } => (None, &destinations[..]),
    };
    one.into_iter()
        .chain(many.iter().map(|(_, destination)| *destination))
}

struct Checker<'t> {
    expected: &'t Table,
    claims: &'t Claims,
    found: &'t Table,
    form: Form,
    /// Made when the first difference asks for it.
    services: OnceCell<Services>,
    /// The chains that rules and maps of the found table lead to.
    referenced: OnceCell<HashSet<&'t str>>,
    findings: Vec<Finding>,
}

/// One difference, before it has a place.
struct Difference {
    kind: Kind,
    rule: String,
    found: Option<String>,
    line: Line,
    service: Option<String>,
    effect: String,
}

impl<'t> Checker<'t> {
    fn report(&mut self, name: &str, difference: Difference) {
        let table = format!("{} {TABLE}", self.expected.family.nft());
        self.findings.push(Finding {
            kind: difference.kind,
            family: self.expected.family,
            place: if name.is_empty() {
                table
            } else {
                format!("{table} {name}")
            },
            rule: difference.rule,
            found: difference.found,
            line: difference.line.known(),
            service: difference.service,
            effect: difference.effect,
        });
    }

    fn services(&self) -> &Services {
        self.services
            .get_or_init(|| Services::new([self.expected, self.found]))
    }

    /// May the dump leave out this comment?
    fn same_comment(&self, expected: Option<&str>, found: Option<&str>) -> bool {
        expected == found || (self.form == Form::Json && found.is_none())
    }

    // ---- the table ----

    fn table(&mut self) {
        let (expected, found) = (self.expected, self.found);
        if expected.dormant != found.dormant {
            self.report(
                "",
                Difference {
                    kind: Kind::Altered,
                    rule: format!("table {} {TABLE}", expected.family.nft()),
                    found: Some("flags dormant".to_owned()),
                    line: found.line,
                    service: None,
                    effect: "the kernel evaluates none of the table's chains: no new flow to any \
                             Service is translated"
                        .to_owned(),
                },
            );
        }
        if !self.same_comment(expected.comment.as_deref(), found.comment.as_deref()) {
            let difference = comment_altered(
                expected.comment.as_deref(),
                found.comment.as_deref(),
                found.line,
                None,
            );
            self.report("", difference);
        }
        for (other, line) in &found.others {
            self.report(
                "",
                Difference {
                    kind: Kind::Extra,
                    rule: other.to_string(),
                    found: None,
                    line: *line,
                    service: None,
                    effect: "kube-proxy did not make it: what uses it is not kube-proxy's"
                        .to_owned(),
                },
            );
        }
    }

    // ---- sets and maps ----

    fn sets(&mut self) {
        let (expected, found) = (self.expected, self.found);
        for (name, set) in &expected.sets {
            if let Some(there) = found.sets.get(name) {
                self.set(name, set, there);
            } else {
                let service = service_of(name);
                let effect = lost_set(name);
                let rule = header(set);
                self.report(
                    name,
                    Difference {
                        kind: Kind::Missing,
                        rule,
                        found: None,
                        line: Line::default(),
                        service,
                        effect,
                    },
                );
                for (key, element) in &set.elements {
                    self.missing_element(name, key, element);
                }
            }
        }
        for (name, set) in &found.sets {
            if expected.sets.contains_key(name) {
                continue;
            }
            let service = service_of(name);
            let (kind, effect) = if service.is_some() {
                (
                    Kind::Stale,
                    "it holds clients of an endpoint that is gone; no packet suffers",
                )
            } else {
                (
                    Kind::Extra,
                    "kube-proxy did not make it: what looks things up in it is not kube-proxy's",
                )
            };
            self.report(
                name,
                Difference {
                    kind,
                    rule: header(set),
                    found: None,
                    line: set.line,
                    service,
                    effect: effect.to_owned(),
                },
            );
        }
    }

    fn set(&mut self, name: &str, expected: &Set, found: &Set) {
        let mut flags = found.flags;
        if self.form == Form::Json {
            flags.dynamic |= expected.flags.dynamic;
        }
        let same = (&expected.key, &expected.value, expected.flags)
            == (&found.key, &found.value, flags)
            && (expected.timeout, expected.size) == (found.timeout, found.size)
            && expected.others == found.others;
        if !same {
            let effect = if expected.timeout == found.timeout {
                lost_set(name)
            } else {
                "clients stay with their endpoint for another time than the Service asks for"
                    .to_owned()
            };
            self.report(
                name,
                Difference {
                    kind: Kind::Altered,
                    rule: header(expected),
                    found: Some(header(found)),
                    line: found.line,
                    service: service_of(name),
                    effect,
                },
            );
        }
        if !self.same_comment(expected.comment.as_deref(), found.comment.as_deref()) {
            let difference = comment_altered(
                expected.comment.as_deref(),
                found.comment.as_deref(),
                found.line,
                service_of(name),
            );
            self.report(name, difference);
        }
        if expected.is_run_time_state() && found.is_run_time_state() {
            return;
        }
        for (key, element) in &expected.elements {
            match found.elements.get(key) {
                None => self.missing_element(name, key, element),
                Some(there) if there == element || self.claims.allow(name, key, there) => {}
                Some(there) => self.altered_element(name, key, element, there),
            }
        }
        for (key, element) in &found.elements {
            if !expected.elements.contains_key(key) {
                self.extra_element(name, key, element);
            }
        }
    }

    /// Elements that are each some Service's, but together no sync's.
    fn misplaced(&mut self) {
        let (claims, found) = (self.claims, self.found);
        for Misplaced { set, key, element } in claims.misplaced(found) {
            let Some(there) = found.sets.get(set).and_then(|set| set.elements.get(key)) else {
                continue;
            };
            let service = self.service_of_element(set, key, element);
            let meets = match &there.value {
                Some(Mapped::Verdict(verdict)) => verdict.to_string(),
                Some(Mapped::Other(_)) | None => String::new(),
            };
            let difference = Difference {
                kind: Kind::Altered,
                rule: ElementText(key, element).to_string(),
                found: Some(ElementText(key, there).to_string()),
                line: there.line,
                effect: format!(
                    "new flows to {} meet {meets}, though other elements give {} precedence over \
                     that Service, and kube-proxy writes all elements in one order",
                    Addressed(key),
                    service.as_deref().unwrap_or("another Service"),
                ),
                service,
            };
            self.report(set, difference);
        }
    }

    fn service_of_element(&self, set: &str, key: &[Value], element: &Element) -> Option<String> {
        service_of(set)
            .or_else(|| named_by(element))
            .or_else(|| self.services().of_key(key).cloned())
    }

    fn missing_element(&mut self, set: &str, key: &Key, element: &Element) {
        let what = Addressed(key);
        let refused = !matches!(element.value, Some(Mapped::Verdict(Verdict::Drop)));
        let says = if refused { "refused" } else { "dropped" };
        let effect = match set {
            "service-ips" => match self.cluster_ip(key) {
                Some(true) => format!(
                    "new flows to {what} are refused by \"Reject traffic to invalid ports of ClusterIPs\""
                ),
                Some(false) => format!(
                    "new flows to {what} are dropped as traffic to an unallocated ClusterIP, or leave \
                     the node untranslated"
                ),
                None => format!("new flows to {what} leave the node untranslated"),
            },
            "service-nodeports" => {
                format!(
                    "new flows to {what} are not translated: the node itself answers or refuses them"
                )
            }
            "no-endpoint-services" => match self.cluster_ip(key) {
                Some(_) => format!(
                    "new flows to {what}, which has no usable endpoint, are not {says} as such but as \
                     traffic to a port that the ClusterIP has not"
                ),
                None => format!(
                    "new flows to {what}, which has no usable endpoint, are not {says} but go on"
                ),
            },
            "no-endpoint-nodeports" => format!(
                "new flows to {what}, which has no usable endpoint, are not {says} but reach the node \
                 itself"
            ),
            "firewall-ips" => {
                format!(
                    "new flows to {what} are let in from anywhere, not from the source ranges only"
                )
            }
            "cluster-ips" => format!(
                "new flows to {what} from outside the cluster are not masqueraded, and those to \
                 invalid ports of it are not refused"
            ),
            "nodeport-ips" => format!("no NodePort is served on {what}"),
            "hairpin-connections" => format!(
                "flows of the pod {what} to itself through the Service are not masqueraded, and hang"
            ),
            _ => format!("lookups of {what} find nothing"),
        };
        let difference = Difference {
            kind: Kind::Missing,
            rule: ElementText(key, element).to_string(),
            found: None,
            line: Line::default(),
            service: self.service_of_element(set, key, element),
            effect,
        };
        self.report(set, difference);
    }

    /// Is the key's address a ClusterIP of this cluster? If so, does the found table know it?
    fn cluster_ip(&self, key: &[Value]) -> Option<bool> {
        let address: Key = [key.first()?.clone()].into();
        let holds = |table: &Table| {
            table
                .sets
                .get("cluster-ips")
                .is_some_and(|set| set.elements.contains_key(&address))
        };
        holds(self.expected).then(|| holds(self.found))
    }

    fn altered_element(&mut self, set: &str, key: &Key, expected: &Element, found: &Element) {
        let what = Addressed(key);
        let effect = if expected.value == found.value {
            "only the comment differs: packets fare the same".to_owned()
        } else {
            match &found.value {
                Some(Mapped::Verdict(Verdict::Goto(chain) | Verdict::Jump(chain))) => {
                    match service_of(chain) {
                        Some(_) if !self.found.chains.contains_key(chain) => {
                            format!("new flows to {what} go to {chain}, which is not there")
                        }
                        _ => format!("new flows to {what} go to {chain}"),
                    }
                }
                Some(Mapped::Verdict(Verdict::Drop)) => format!("new flows to {what} are dropped"),
                Some(Mapped::Verdict(verdict)) => format!("new flows to {what} meet {verdict}"),
                Some(Mapped::Other(_)) | None => format!("new flows to {what} meet no verdict"),
            }
        };
        let difference = Difference {
            kind: Kind::Altered,
            rule: ElementText(key, expected).to_string(),
            found: Some(ElementText(key, found).to_string()),
            line: found.line,
            service: self.service_of_element(set, key, expected),
            effect,
        };
        self.report(set, difference);
    }

    fn extra_element(&mut self, set: &str, key: &Key, element: &Element) {
        let what = Addressed(key);
        let verdict = match &element.value {
            Some(Mapped::Verdict(verdict)) => verdict.to_string(),
            Some(Mapped::Other(text)) => text.to_string(),
            None => String::new(),
        };
        let known = |name: &str| {
            self.expected
                .sets
                .get(name)
                .is_some_and(|set| set.elements.contains_key(key))
        };
        let mut kind = Kind::Stale;
        let effect = match set {
            "service-ips" | "service-nodeports" => format!(
                "new flows to {what}, where no Service of this cluster has endpoints, meet {verdict}"
            ),
            "no-endpoint-services" if known("service-ips") => {
                format!("new flows to {what} meet {verdict}, though there are endpoints")
            }
            "no-endpoint-nodeports" if known("service-nodeports") => {
                format!("new flows to {what} meet {verdict}, though there are endpoints")
            }
            "no-endpoint-services" | "no-endpoint-nodeports" => {
                format!("new flows to {what}, which is no Service's, meet {verdict}")
            }
            "firewall-ips" => {
                format!(
                    "new flows to {what} meet source ranges that the Service has not: {verdict}"
                )
            }
            "cluster-ips" => {
                format!("new flows to {what}, which is no Service's address, are refused")
            }
            "nodeport-ips" => {
                kind = Kind::Extra;
                format!("NodePorts are served on {what} too")
            }
            "hairpin-connections" => {
                format!(
                    "flows of {what} to itself are masqueraded, though no Service has this endpoint here"
                )
            }
            _ => {
                kind = Kind::Extra;
                format!("lookups of {what} find something")
            }
        };
        let difference = Difference {
            kind,
            rule: ElementText(key, element).to_string(),
            found: None,
            line: element.line,
            service: self.service_of_element(set, key, element),
            effect,
        };
        self.report(set, difference);
    }

    // ---- chains ----

    fn chains(&mut self) {
        let (expected, found) = (self.expected, self.found);
        for (name, chain) in &expected.chains {
            if let Some(there) = found.chains.get(name) {
                // Most chains are what they should be.
                if chain != there || &**name == CLUSTER_IPS_CHECK {
                    self.chain(name, chain, there);
                }
            } else {
                let mut rule = format!("chain {name} {{\n{chain}}}");
                if chain.rules.len() > 8 {
                    rule = format!("chain {name} with {} rules", chain.rules.len());
                }
                self.report(
                    name,
                    Difference {
                        kind: Kind::Missing,
                        rule,
                        found: None,
                        line: Line::default(),
                        service: service_of(name),
                        effect: lost_chain(name),
                    },
                );
            }
        }
        for (name, chain) in &found.chains {
            if !expected.chains.contains_key(name) {
                self.unexpected_chain(name, chain);
            }
        }
    }

    fn unexpected_chain(&mut self, name: &str, chain: &Chain) {
        let service = service_of(name);
        let reached = chain.base.is_some() || self.referenced().contains(name);
        let kind = match service {
            Some(_) if !reached && chain.rules.is_empty() => Kind::Draining,
            Some(_) => Kind::Stale,
            None => Kind::Extra,
        };
        let effect = match (reached, chain.rules.is_empty()) {
            (false, true) => {
                "kube-proxy has emptied it and will delete it with a later sync; no packet gets here"
            }
            (false, false) => "no rule or map leads here; no packet suffers",
            (true, true) => "packets that are sent here are not translated",
            (true, false) => {
                "packets that are sent here meet rules that the cluster does not call for"
            }
        };
        self.report(
            name,
            Difference {
                kind,
                rule: format!("chain {name} with {} rules", chain.rules.len()),
                found: None,
                line: chain.line,
                service,
                effect: effect.to_owned(),
            },
        );
    }

    fn referenced(&self) -> &HashSet<&'t str> {
        self.referenced.get_or_init(|| {
            let found = self.found;
            let elements = found.sets.values().flat_map(|set| set.elements.values());
            let from_maps = elements.filter_map(|element| match &element.value {
                Some(Mapped::Verdict(verdict)) => verdict.chain(),
                _ => None,
            });
            let rules = found.chains.values().flat_map(|chain| &chain.rules);
            let from_rules = rules.flat_map(|rule| &rule.statements).flat_map(chains_of);
            from_maps.chain(from_rules).collect()
        })
    }

    fn chain(&mut self, name: &str, expected: &'t Chain, found: &'t Chain) {
        let service = service_of(name);
        if expected.base != found.base {
            let text = |chain: &Chain| match &chain.base {
                Some(base) => base.to_string(),
                None => "no hook".to_owned(),
            };
            self.report(
                name,
                Difference {
                    kind: Kind::Altered,
                    rule: text(expected),
                    found: Some(text(found)),
                    line: found.line,
                    service: service.clone(),
                    effect: format!(
                        "the kernel calls the chain elsewhere or not at all: {}",
                        lost_chain(name)
                    ),
                },
            );
        }
        if !self.same_comment(expected.comment.as_deref(), found.comment.as_deref()) {
            let difference = comment_altered(
                expected.comment.as_deref(),
                found.comment.as_deref(),
                found.line,
                service.clone(),
            );
            self.report(name, difference);
        }
        let there = if name == CLUSTER_IPS_CHECK {
            self.without_unallocated(expected, found)
        } else {
            &found.rules
        };
        for difference in rules(name, &expected.rules, there) {
            self.report(
                name,
                Difference {
                    service: service.clone(),
                    ..difference
                },
            );
        }
    }

    /// The rules of the found chain that are compared one by one: all but the one that depends on
    /// the `ServiceCIDR`s, if those are unknown.
    fn without_unallocated(&mut self, expected: &'t Chain, found: &'t Chain) -> &'t [Rule] {
        if expected
            .rules
            .iter()
            .any(|rule| unallocated(rule).is_some())
        {
            return &found.rules;
        }
        let cluster_ips: Vec<IpAddr> = self
            .expected
            .sets
            .get("cluster-ips")
            .into_iter()
            .flat_map(|set| set.elements.keys())
            .filter_map(|key| match &**key {
                [Value::Address(address)] => Some(*address),
                _ => None,
            })
            .collect();
        let ip = self.expected.family.nft();
        let rule = format!("{ip} daddr {{ ServiceCIDRs }} drop comment \"{UNALLOCATED}\"");
        let last = found.rules.split_last();
        let Some((last, rest, ranges)) =
            last.and_then(|(last, rest)| Some((last, rest, unallocated(last)?)))
        else {
            if !cluster_ips.is_empty() {
                self.report(CLUSTER_IPS_CHECK, missing_unallocated(rule));
            }
            return &found.rules;
        };
        for outside in cluster_ips.into_iter().filter(|ip| !ranges.contains(*ip)) {
            let service = self.services().addresses.get(&outside).cloned();
            self.report(
                CLUSTER_IPS_CHECK,
                Difference {
                    kind: Kind::Altered,
                    rule: rule.clone(),
                    found: Some(last.to_string()),
                    line: last.line,
                    service,
                    effect: format!(
                        "{outside} lies in none of the networks: new flows to unallocated \
                         addresses of its network are not dropped but leave the node"
                    ),
                },
            );
        }
        rest
    }
}

const CLUSTER_IPS_CHECK: &str = "cluster-ips-check";
const UNALLOCATED: &str = "Drop traffic to unallocated ClusterIPs";

/// The networks of the rule that drops traffic to unallocated ClusterIPs, if this is it.
fn unallocated(rule: &Rule) -> Option<&Ranges> {
    match &rule.statements[..] {
        [
            Statement::Match {
                fields,
                negated: false,
                operand: Operand::Addresses(ranges),
            },
            Statement::Verdict(Verdict::Drop),
        ] if matches!(&fields[..], [Field::Destination(_)])
            && rule.comment.as_deref() == Some(UNALLOCATED) =>
        {
            Some(ranges)
        }
        _ => None,
    }
}

fn missing_unallocated(rule: String) -> Difference {
    Difference {
        kind: Kind::Missing,
        rule,
        found: None,
        line: Line::default(),
        service: None,
        effect:
            "new flows to addresses that no Service has leave the node instead of being dropped"
                .to_owned(),
    }
}

fn comment_altered(
    expected: Option<&str>,
    found: Option<&str>,
    line: Line,
    service: Option<String>,
) -> Difference {
    let text = |comment: Option<&str>| match comment {
        Some(comment) => format!("comment \"{comment}\""),
        None => "no comment".to_owned(),
    };
    Difference {
        kind: Kind::Altered,
        rule: text(expected),
        found: Some(text(found)),
        line,
        service,
        effect: "only the comment differs: packets fare the same".to_owned(),
    }
}

/// What a set is, without its elements, in one line.
fn header(set: &Set) -> String {
    let bare = Set {
        elements: BTreeMap::new(),
        comment: None,
        key: set.key.clone(),
        value: set.value.clone(),
        others: set.others.clone(),
        ..*set
    };
    let text = bare.to_string();
    text.lines().map(str::trim).collect::<Vec<_>>().join("; ")
}

/// The chains that a statement leads to.
fn chains_of(statement: &Statement) -> impl Iterator<Item = &str> {
    let (one, many) = match statement {
        Statement::Verdict(verdict) => (verdict.chain(), None),
        Statement::Vmap {
            map: VerdictMap::Inline(verdicts),
            ..
        } => (None, Some(verdicts.values().filter_map(Verdict::chain))),
        _ => (None, None),
    };
    one.into_iter().chain(many.into_iter().flatten())
}

/// The address and port that a key is about, for people.
struct Addressed<'a>(&'a [Value]);

impl std::fmt::Display for Addressed<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            [Value::Protocol(protocol), port] => write!(f, "node port {port}/{protocol}"),
            [
                Value::Address(address),
                Value::Protocol(protocol),
                Value::Number(port),
            ]
            | [
                Value::Address(address),
                Value::Address(_),
                Value::Protocol(protocol),
                Value::Number(port),
            ] => match u16::try_from(*port) {
                Ok(port) => write!(f, "{}/{protocol}", SocketAddr::new(*address, port)),
                Err(_) => write!(f, "{address} port {port}/{protocol}"),
            },
            key => super::table::KeyText(key).fmt(f),
        }
    }
}

// ---- rules of one chain ----

/// What differs between the rules of a chain. Rules that both have, in the same order or not, are
/// paired first; what is left is altered as far as it can be paired by kind of rule.
fn rules(chain: &str, expected: &[Rule], found: &[Rule]) -> Vec<Difference> {
    let same = expected
        .iter()
        .zip(found)
        .take_while(|(a, b)| a == b)
        .count();
    let (expected, found) = (&expected[same..], &found[same..]);
    let tail = expected
        .iter()
        .rev()
        .zip(found.iter().rev())
        .take_while(|(a, b)| a == b)
        .count();
    let expected = &expected[..expected.len() - tail];
    let found = &found[..found.len() - tail];

    let mut matched = vec![false; found.len()];
    let mut lost: Vec<&Rule> = Vec::new();
    // The places in `found` of the rules that both have, in the order of `expected`.
    let mut places = Vec::new();
    let mut texts: HashMap<String, Vec<usize>> = HashMap::new();
    for (place, rule) in found.iter().enumerate().rev() {
        texts.entry(rule.to_string()).or_default().push(place);
    }
    for rule in expected {
        match texts.get_mut(&rule.to_string()).and_then(Vec::pop) {
            Some(place) => {
                if let Some(matched) = matched.get_mut(place) {
                    *matched = true;
                }
                places.push(place);
            }
            None => lost.push(rule),
        }
    }
    let mut gained: Vec<&Rule> = found
        .iter()
        .zip(&matched)
        .filter_map(|(rule, matched)| (!matched).then_some(rule))
        .collect();

    let mut differences = Vec::new();
    for rule in lost {
        let pair = gained
            .iter()
            .position(|other| shape(other) == shape(rule))
            .or_else(|| (!gained.is_empty() && expected.len() == found.len()).then_some(0));
        differences.push(match pair {
            Some(index) => altered(chain, rule, gained.remove(index)),
            None => Difference {
                kind: Kind::Missing,
                rule: rule.to_string(),
                found: None,
                line: Line::default(),
                service: None,
                effect: lost_rule(chain, rule),
            },
        });
    }
    differences.extend(gained.into_iter().map(|rule| Difference {
        kind: Kind::Extra,
        rule: rule.to_string(),
        found: None,
        line: rule.line,
        service: None,
        effect: gained_rule(rule),
    }));
    if let Some(pair) = places.windows(2).find(|pair| pair.first() > pair.last())
        && let Some(rule) = pair.last().and_then(|place| found.get(*place))
    {
        differences.push(Difference {
            kind: Kind::Altered,
            rule: rule.to_string(),
            found: Some(rule.to_string()),
            line: rule.line,
            service: None,
            effect: "the chain's rules stand in another order, and the first that matches decides"
                .to_owned(),
        });
    }
    differences
}

/// What kind of rule it is: the kinds of its statements.
fn shape(rule: &Rule) -> Vec<std::mem::Discriminant<Statement>> {
    rule.statements.iter().map(std::mem::discriminant).collect()
}

fn altered(chain: &str, expected: &Rule, found: &Rule) -> Difference {
    let effect = if expected.statements == found.statements {
        "only the comment differs: packets fare the same".to_owned()
    } else {
        match (choice(expected), choice(found)) {
            (Some(expected), Some(found)) if expected != found => {
                moved_shares(&expected.shares(), &found.shares())
            }
            _ => format!("packets meet another rule: {}", lost_rule(chain, expected)),
        }
    };
    Difference {
        kind: Kind::Altered,
        rule: expected.to_string(),
        found: Some(found.to_string()),
        line: found.line,
        service: None,
        effect,
    }
}

/// What a rule chooses an endpoint from.
#[derive(PartialEq, Eq)]
struct Choice {
    modulus: u32,
    /// Number and endpoint.
    endpoints: Vec<(u32, String)>,
}

impl Choice {
    /// The share of new flows that each endpoint gets, 0 to 1.
    fn shares(&self) -> BTreeMap<&str, f64> {
        let mut shares = BTreeMap::new();
        for (number, endpoint) in &self.endpoints {
            if *number < self.modulus {
                *shares.entry(&**endpoint).or_insert(0.0) += 1.0 / f64::from(self.modulus);
            }
        }
        shares
    }
}

/// The choice that a rule of a Service's chain makes, if it makes one.
fn choice(rule: &Rule) -> Option<Choice> {
    rule.statements
        .iter()
        .find_map(|statement| match statement {
            Statement::Dnat(Target::One(destination)) => Some(Choice {
                modulus: 1,
                endpoints: vec![(0, destination.to_string())],
            }),
            Statement::Dnat(Target::Random {
                modulus,
                destinations,
            }) => Some(Choice {
                modulus: *modulus,
                endpoints: destinations
                    .iter()
                    .map(|(number, destination)| (*number, destination.to_string()))
                    .collect(),
            }),
            Statement::Vmap {
                fields,
                map: VerdictMap::Inline(verdicts),
            } => {
                let [Field::Random(modulus)] = fields[..] else {
                    return None;
                };
                let endpoints = verdicts.iter().filter_map(|(key, verdict)| match &**key {
                    [Value::Number(number)] => Some((*number, endpoint_of(verdict.chain()?))),
                    _ => None,
                });
                Some(Choice {
                    modulus,
                    endpoints: endpoints.collect(),
                })
            }
            _ => None,
        })
}

/// The endpoint that a chain `endpoint-…__address/port` is for, or the chain.
fn endpoint_of(chain: &str) -> String {
    let endpoint = || {
        let (address, port) = chain.split_once("__")?.1.split_once('/')?;
        Some(match address.parse::<IpAddr>() {
            Ok(address) => format!("{address}:{port}"),
            // In names, dots stand for the colons of IPv6.
            Err(_) => format!("[{}]:{port}", address.replace('.', ":")),
        })
    };
    endpoint().unwrap_or_else(|| chain.to_owned())
}

/// What becomes of new flows when `found` stands for `expected`.
fn moved_shares(expected: &BTreeMap<&str, f64>, found: &BTreeMap<&str, f64>) -> String {
    const NONE: f64 = 1e-9;
    let mut effect = String::new();
    let mut say = |text: String| {
        if !effect.is_empty() {
            effect.push_str(", and ");
        }
        effect.push_str(&text);
    };
    let lost: Vec<&str> = expected
        .keys()
        .copied()
        .filter(|key| !found.contains_key(key))
        .collect();
    if let Some(first) = lost.first() {
        let mut names = (*first).to_owned();
        for other in lost.iter().skip(1).take(2) {
            let _ = write!(names, ", {other}");
        }
        if lost.len() > 3 {
            names.push_str(", …");
        }
        say(format!(
            "{} of {} endpoints get no new flows ({names})",
            lost.len(),
            expected.len()
        ));
    }
    let mut foreign = found
        .iter()
        .filter(|(key, _)| !expected.contains_key(**key));
    if let Some((first, _)) = foreign.clone().next() {
        let share: f64 = foreign.by_ref().map(|(_, share)| share).sum();
        say(format!(
            "{:.1} % of new flows go to {first}, which is no endpoint",
            100.0 * share
        ));
    }
    let nowhere = 1.0 - found.values().sum::<f64>();
    if nowhere > NONE {
        say(format!(
            "{:.1} % of new flows are not translated",
            100.0 * nowhere
        ));
    }
    if effect.is_empty() {
        let even = expected.iter().all(|(key, share)| {
            found
                .get(key)
                .is_some_and(|other| (share - other).abs() < NONE)
        });
        effect.push_str(if even {
            "the endpoints stand in another order: packets fare the same"
        } else {
            "new flows are spread over the endpoints unevenly"
        });
    }
    effect
}

// ---- what is lost ----

fn lost_set(name: &str) -> String {
    match name {
        "service-ips" => "no new flow to any Service is translated",
        "service-nodeports" | "nodeport-ips" => "no new flow to any NodePort is translated",
        "firewall-ips" => "no load balancer's source ranges are enforced",
        "no-endpoint-services" | "no-endpoint-nodeports" => {
            "new flows to Services without endpoints are not refused"
        }
        "cluster-ips" => {
            "traffic from outside the cluster is not masqueraded, and invalid ports of ClusterIPs do not refuse"
        }
        "hairpin-connections" => "flows of pods to themselves through a Service hang",
        name if name.starts_with("affinity-") => "clients do not stay with this endpoint",
        _ => "lookups in it fail",
    }
    .to_owned()
}

fn lost_chain(name: &str) -> String {
    let prefix = if service_of(name).is_some() {
        name.split('-').next().unwrap_or_default()
    } else {
        name
    };
    match prefix {
        "service" | "local" => "new flows to the Service reach no endpoint",
        "external" => "new flows to the Service from outside the cluster reach no endpoint",
        "firewall" => "the Service's source ranges are not enforced",
        "endpoint" => "new flows of the Service do not reach this endpoint",
        "filter-prerouting-pre-dnat" | "filter-output-pre-dnat" | "firewall-check" => {
            "load balancers' source ranges are not enforced"
        }
        "filter-input" | "nodeport-endpoints-check" => {
            "new flows to NodePorts without endpoints are not refused"
        }
        "service-endpoints-check" => "new flows to Services without endpoints are not refused",
        "filter-forward" | "filter-output" => {
            "new flows to Services without endpoints and to unused ClusterIPs are not refused"
        }
        "nat-prerouting" => "no new flow that comes to the node is translated",
        "nat-output" => "no new flow of the node itself is translated",
        "services" => "no new flow to any Service is translated as it should be",
        "nat-postrouting" | "masquerading" => {
            "flows that need it are not masqueraded: their answers do not come back here"
        }
        CLUSTER_IPS_CHECK => {
            "new flows to invalid ports of ClusterIPs, or to addresses without a Service, are not refused"
        }
        "reject-chain" => "new flows to Services without endpoints time out instead of being refused",
        _ => "packets that are sent here meet nothing",
    }
    .to_owned()
}

fn lost_rule(chain: &str, rule: &Rule) -> String {
    if service_of(chain).is_none() {
        return lost_chain(chain);
    }
    for statement in &rule.statements {
        return match statement {
            Statement::Mark(MarkChange::Or(_)) => {
                "traffic from outside keeps its source address: answers of endpoints on other nodes do \
                 not come back through this one"
            }
            Statement::Update { .. } => "clients are not remembered, and change endpoints",
            Statement::Match {
                operand: Operand::Set(set),
                ..
            } if set.starts_with("affinity-") => {
                "clients that this endpoint served go to any endpoint"
            }
            Statement::Verdict(Verdict::Goto(to)) if to.starts_with("service-") && rule.comment.is_some() => {
                "traffic of this node or its pods to the Service is treated as coming from outside"
            }
            _ => continue,
        }
        .to_owned();
    }
    lost_chain(chain)
}

fn gained_rule(rule: &Rule) -> String {
    let decides = rule
        .statements
        .iter()
        .find_map(|statement| match statement {
            Statement::Verdict(Verdict::Drop) => Some("are dropped".to_owned()),
            Statement::Verdict(Verdict::Goto(chain) | Verdict::Jump(chain)) => {
                Some(format!("are sent to {chain}"))
            }
            Statement::Verdict(verdict) => {
                Some(format!("meet {verdict} before the rules after it"))
            }
            Statement::Reject { .. } => Some("are refused".to_owned()),
            Statement::Dnat(target) => destinations(target)
                .next()
                .map(|destination| format!("are sent to {destination}")),
            Statement::Masquerade(_) => Some("are masqueraded".to_owned()),
            _ => None,
        });
    match decides {
        Some(decides) => format!("packets that match it {decides}"),
        None => "packets that match it meet something that kube-proxy did not write".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{json, parse};
    use super::*;

    /// Where no two Services claim the same.
    fn check(expected: &Table, found: Option<&Table>, form: Form) -> Vec<Finding> {
        super::check(expected, &Claims::default(), found, form)
    }

    const IP: &str = include_str!("../fixtures/kube-proxy-1.36.2/nftables/nft-ip.txt");
    const IP6: &str = include_str!("../fixtures/kube-proxy-1.36.2/nftables/nft-ip6.txt");
    const JSON: &str = include_str!("../fixtures/kube-proxy-1.36.2/nftables/nft-ip.json");

    fn table(text: &str) -> Table {
        let ruleset = parse(text).expect("a ruleset");
        ruleset.ip.or(ruleset.ip6).expect("kube-proxy's table")
    }

    /// What is found in `text`, or why it is no dump.
    fn findings(expected: &Table, text: &str) -> Result<Vec<Finding>, String> {
        let ruleset = parse(text).map_err(|error| error.to_string())?;
        Ok(check(expected, ruleset.table(expected.family), Form::Text))
    }

    /// The only finding.
    fn one(expected: &Table, text: &str) -> Finding {
        let mut found = findings(expected, text).expect("a dump");
        assert_eq!(found.len(), 1, "{found:#?}");
        found.remove(0)
    }

    #[test]
    fn a_dump_is_what_it_is() {
        for text in [IP, IP6] {
            let expected = table(text);
            assert_eq!(findings(&expected, text), Ok(Vec::new()));
        }
        let json = json::parse(JSON).expect("JSON");
        assert_eq!(check(&table(IP), json.ip.as_ref(), Form::Json), []);
        assert_ne!(check(&table(IP), json.ip.as_ref(), Form::Text), []);
    }

    #[test]
    fn no_table_is_one_finding() {
        let finding = one(&table(IP), "table inet other {\n}\n");
        assert_eq!(finding.kind, Kind::Missing);
        assert_eq!(finding.rule, "table ip kube-proxy");
        assert_eq!(
            finding.effect,
            "new flows to any of the 16 ServicePorts of this family are not translated"
        );
    }

    #[test]
    fn names_of_services() {
        let name = |chain| service_of(chain).unwrap_or_default();
        assert_eq!(name("service-ULMVA6XW-ns1/svc1/tcp/p80"), "ns1/svc1:p80");
        assert_eq!(name("local-XPKXJLSX-edge/unnamed/tcp/"), "edge/unnamed");
        assert_eq!(
            name("endpoint-DURU7V52-shop/cart/tcp/grpc__10.244.0.21/9000"),
            "shop/cart:grpc"
        );
        assert_eq!(service_of("services"), None);
        assert_eq!(service_of("service-endpoints-check"), None);
    }

    /// The Services that a line is about: those whose names stand in it or in the chain or set
    /// around it, or whose addresses do.
    fn concerned(expected: &Table, around: &str, line: &str) -> Vec<String> {
        let names = |text: &str| -> Vec<String> {
            text.split([' ', '@', '"', ','])
                .filter_map(|word| {
                    service_of(word).or_else(|| {
                        let named = word.contains('/') && word.contains(':');
                        let network = word.parse::<crate::cluster::Cidr>().is_ok();
                        (named && !network).then(|| word.to_owned())
                    })
                })
                .collect()
        };
        let mut services = names(around);
        services.extend(names(line));
        if services.is_empty() && (around.contains("cluster-ips {") || around.contains("hairpin")) {
            let known = Services::new([expected, expected]);
            let words: Vec<&str> = line
                .split([' ', '\t', ','])
                .filter(|word| !word.is_empty())
                .collect();
            for word in words {
                if let Ok(address) = word.parse::<IpAddr>() {
                    services.extend(known.addresses.get(&address).cloned());
                    let of_pod = known
                        .endpoints
                        .iter()
                        .find(|((pod, ..), _)| *pod == address);
                    services.extend(of_pod.map(|(_, service)| service.clone()));
                }
            }
        }
        services
    }

    /// Does one of the findings name one of the Services, where a line is about any?
    fn assert_found(expected: &Table, found: &[Finding], around: &str, line: &str, what: &str) {
        assert!(
            !found.is_empty(),
            "{what} {line:?} in {around:?}: nothing found"
        );
        let services = concerned(expected, around, line);
        let whole = |service: &str| service.split(':').next().unwrap_or_default().to_owned();
        let wanted: Vec<String> = services.iter().map(|service| whole(service)).collect();
        assert!(
            wanted.is_empty()
                || found.iter().any(|finding| finding
                    .service
                    .as_deref()
                    .is_some_and(|service| wanted.contains(&whole(service)))),
            "{what} {line:?} in {around:?}: none of {wanted:?} in {found:#?}"
        );
        for finding in found {
            assert!(
                !finding.effect.is_empty() && !finding.effect.ends_with('.'),
                "{finding:?}"
            );
        }
    }

    /// The chain or set that each line stands in.
    fn lines_with_places(text: &str) -> Vec<(&str, &str)> {
        let mut around = "";
        text.lines()
            .map(|line| {
                if line.starts_with('\t') && !line.starts_with("\t\t") {
                    around = line;
                }
                (around, line)
            })
            .collect()
    }

    #[test]
    fn any_line_that_is_gone_or_doubled_is_found() {
        let mut checked = 0;
        for text in [IP, IP6] {
            let expected = table(text);
            let lines = lines_with_places(text);
            for (index, (around, line)) in lines.iter().enumerate() {
                if line.trim().is_empty() {
                    continue;
                }
                for (what, times) in [("without", 0), ("twice", 2)] {
                    let mut changed = String::new();
                    for (other, (_, text)) in lines.iter().enumerate() {
                        for _ in 0..if other == index { times } else { 1 } {
                            changed.push_str(text);
                            changed.push('\n');
                        }
                    }
                    // An error names the line; what is no dump is not compared.
                    if let Ok(found) = findings(&expected, &changed) {
                        checked += 1;
                        assert_found(&expected, &found, around, line, what);
                    }
                }
            }
        }
        assert!(checked > 150, "{checked}");
    }

    #[test]
    fn any_line_that_is_altered_is_found() {
        let mut checked = 0;
        for text in [IP, IP6] {
            let expected = table(text);
            let lines = lines_with_places(text);
            for (index, (around, line)) in lines.iter().enumerate() {
                // Each digit and each word, one after the other.
                let digits = line.char_indices().filter(|(_, c)| c.is_ascii_digit());
                let words = line.char_indices().filter(|(at, c)| {
                    c.is_ascii_lowercase() && !line[..*at].ends_with(|c: char| c.is_alphanumeric())
                });
                for (at, c) in digits.chain(words) {
                    let other = if c.is_ascii_digit() {
                        if c == '7' { '8' } else { '7' }
                    } else if c == 'z' {
                        'y'
                    } else {
                        'z'
                    };
                    let altered = format!("{}{other}{}", &line[..at], &line[at + 1..]);
                    let changed: Vec<&str> = lines
                        .iter()
                        .enumerate()
                        .map(|(other, (_, text))| if other == index { &altered } else { *text })
                        .collect();
                    let changed = changed.join("\n");
                    if let Ok(found) = findings(&expected, &changed) {
                        // A network's host bits and leading zeros of a mark say nothing.
                        if parse(&changed) == parse(text) {
                            continue;
                        }
                        checked += 1;
                        assert_found(&expected, &found, around, line, &altered);
                    }
                }
            }
        }
        assert!(checked > 1000, "{checked}");
    }

    #[test]
    fn an_endpoint_that_is_gone() {
        let gone = IP.replace(
            "numgen random mod 3 map { 0 : 10.244.0.11 . 8080, 1 : 10.244.0.12 . 8080, 2 : 10.244.1.13 . 8080 }",
            "numgen random mod 2 map { 0 : 10.244.0.11 . 8080, 1 : 10.244.1.13 . 8080 }",
        );
        let finding = one(&table(IP), &gone);
        assert_eq!(finding.kind, Kind::Altered);
        assert_eq!(
            finding.place,
            "ip kube-proxy service-KHN6ECMT-shop/web/tcp/http"
        );
        assert_eq!(finding.service.as_deref(), Some("shop/web:http"));
        assert_eq!(
            finding.effect,
            "1 of 3 endpoints get no new flows (10.244.0.12:8080)"
        );
        let gap = IP.replace("numgen random mod 3 map", "numgen random mod 4 map");
        assert_eq!(
            one(&table(IP), &gap).effect,
            "25.0 % of new flows are not translated"
        );
        let foreign = IP.replace("1 : 10.244.0.12 . 8080, 2", "1 : 10.9.9.9 . 8080, 2");
        assert_eq!(
            one(&table(IP), &foreign).effect,
            "1 of 3 endpoints get no new flows (10.244.0.12:8080), and 33.3 % of new flows go to \
             10.9.9.9:8080, which is no endpoint"
        );
    }

    #[test]
    fn an_endpoint_with_affinity_that_is_gone() {
        let gone = IP.replace(
            "numgen random mod 2 vmap { 0 : goto endpoint-DURU7V52-shop/cart/tcp/grpc__10.244.0.21/9000, 1",
            "numgen random mod 2 vmap { 1",
        );
        let finding = one(&table(IP), &gone);
        assert_eq!(finding.service.as_deref(), Some("shop/cart:grpc"));
        assert_eq!(
            finding.effect,
            "1 of 2 endpoints get no new flows (10.244.0.21:9000), and 50.0 % of new flows are not \
             translated"
        );
        assert_eq!(
            endpoint_of("endpoint-AAAAAAAA-a/b/tcp/c__fd00.10..1/80"),
            "[fd00:10::1]:80"
        );
    }

    #[test]
    fn any_object_that_is_gone_from_json_is_found() {
        let expected = table(IP);
        let whole: serde_json::Value = serde_json::from_str(JSON).expect("JSON");
        let objects = whole["nftables"].as_array().expect("a list");
        for (index, object) in objects.iter().enumerate().skip(1) {
            let mut rest = objects.clone();
            rest.remove(index);
            let text = serde_json::json!({ "nftables": rest }).to_string();
            if let Ok(ruleset) = json::parse(&text) {
                let found = check(&expected, ruleset.ip.as_ref(), Form::Json);
                assert_found(&expected, &found, &object.to_string(), "", "JSON without");
            }
        }
    }

    #[test]
    fn a_table_of_another_mode_is_left_over() {
        let finding = leftover(&table(IP6));
        assert_eq!(finding.kind, Kind::Leftover);
        assert_eq!(finding.rule, "table ip6 kube-proxy");
        assert_eq!(finding.line, Some(1));
    }

    #[test]
    fn an_element_that_is_gone() {
        let line = "10.96.10.1 . tcp . 80 : goto service-KHN6ECMT-shop/web/tcp/http,";
        assert!(IP.contains(line));
        let finding = one(&table(IP), &IP.replace(line, ""));
        assert_eq!(finding.kind, Kind::Missing);
        assert_eq!(finding.service.as_deref(), Some("shop/web:http"));
        assert_eq!(
            finding.effect,
            "new flows to 10.96.10.1:80/tcp are refused by \"Reject traffic to invalid ports of ClusterIPs\""
        );
    }

    #[test]
    fn what_is_left_of_a_deleted_service() {
        let all = table(IP);
        let mut expected = all.clone();
        expected
            .chains
            .retain(|name, _| !name.contains("shop/draining"));
        for set in expected.sets.values_mut() {
            set.elements.retain(|key, element| {
                !ElementText(key, element)
                    .to_string()
                    .contains("shop/draining")
                    && !ElementText(key, element)
                        .to_string()
                        .starts_with("10.96.10.7")
            });
        }
        // As kube-proxy leaves it until its next sync.
        let mut emptied = expected.clone();
        emptied.chains.insert(
            "service-LILVGSEM-shop/draining/tcp/http".into(),
            Chain::default(),
        );
        let found = check(&expected, Some(&emptied), Form::Text);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].kind, Kind::Draining);
        assert_eq!(found[0].service.as_deref(), Some("shop/draining:http"));
        assert!(found[0].effect.contains("no packet gets here"));
        // All of it.
        let found = check(&expected, Some(&all), Form::Text);
        assert_eq!(found.len(), 3, "{found:#?}");
        for finding in found {
            assert_eq!(finding.kind, Kind::Stale);
            assert_eq!(finding.service.as_deref(), Some("shop/draining:http"));
        }
    }

    #[test]
    fn clients_of_affinity_sets_are_no_difference() {
        let busy = IP.replace(
            "\t\ttimeout 3h\n",
            "\t\ttimeout 3h\n\t\telements = { 10.244.0.9 timeout 3h expires 2h }\n",
        );
        assert_ne!(busy, IP);
        assert_eq!(findings(&table(IP), &busy), Ok(Vec::new()));
    }

    #[test]
    fn unknown_service_cidrs() {
        let rule =
            "\t\tip daddr 10.96.0.0/12 drop comment \"Drop traffic to unallocated ClusterIPs\"\n";
        let without = IP.replace(rule, "");
        assert_ne!(without, IP);
        let expected = table(&without);
        assert_eq!(findings(&expected, IP), Ok(Vec::new()));
        let two = IP.replace(
            "ip daddr 10.96.0.0/12 drop",
            "ip daddr { 10.96.0.0/16, 10.100.0.0/16 } drop",
        );
        assert_eq!(findings(&expected, &two), Ok(Vec::new()));
        assert_eq!(one(&expected, &without).kind, Kind::Missing);
        let narrow = IP.replace("ip daddr 10.96.0.0/12 drop", "ip daddr 10.96.20.0/24 drop");
        let found = findings(&expected, &narrow).expect("a dump");
        assert_eq!(found.len(), 9);
        assert!(found.iter().all(|finding| finding.service.is_some()));
        let twice = IP.replace(rule, &rule.repeat(2));
        assert_eq!(one(&expected, &twice).kind, Kind::Extra);

        let without6 = IP6.replace(
            "\t\tip6 daddr fd00:10:96::/108 drop comment \"Drop traffic to unallocated ClusterIPs\"\n",
            "",
        );
        let mut none = table(&without6);
        for set in none.sets.values_mut() {
            set.elements.clear();
        }
        let mut there = table(IP6);
        for set in there.sets.values_mut() {
            set.elements.clear();
        }
        assert_eq!(check(&none, Some(&there), Form::Text), []);
        assert_eq!(check(&none, Some(&none), Form::Text), []);
    }
}
