//! kube-proxy's nftables mode: one transaction a family that makes the table `kube-proxy`.
//!
//! Sources: `pkg/proxy/nftables/proxier.go` (`setupNFTables`, `syncProxyRules`,
//! `writeServiceToEndpointRules`) of Kubernetes v1.36, KEP-3866. Rules are written as kube-proxy
//! writes them; `nft` prints them in another spelling (`mark or` becomes `|`).

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use crate::cluster::{Cidr, Family, TrafficPolicy};
use crate::rules::iptables::push_all;
use crate::rules::names::{nft_endpoint_name, nft_service_name};
use crate::rules::ports::{EndpointText, PortView, Ports};
use crate::rules::{NodePortAddresses, NodeView};

/// Base chains: name, type, hook, priority.
const BASE_CHAINS: [(&str, &str, &str, &str); 8] = [
    ("filter-prerouting-pre-dnat", "filter", "prerouting", "-110"),
    ("filter-output-pre-dnat", "filter", "output", "-110"),
    ("filter-input", "filter", "input", "0"),
    ("filter-forward", "filter", "forward", "0"),
    ("filter-output", "filter", "output", "0"),
    ("nat-prerouting", "nat", "prerouting", "-100"),
    ("nat-output", "nat", "output", "-100"),
    ("nat-postrouting", "nat", "postrouting", "100"),
];

const CHAINS: [&str; 6] = [
    "nodeport-endpoints-check",
    "service-endpoints-check",
    "firewall-check",
    "services",
    "masquerading",
    "cluster-ips-check",
];

/// The rules of base chains: chain, rule.
const BASE_RULES: [(&str, &str); 11] = [
    (
        "filter-prerouting-pre-dnat",
        "ct state new jump firewall-check",
    ),
    ("filter-output-pre-dnat", "ct state new jump firewall-check"),
    ("filter-input", "ct state new jump nodeport-endpoints-check"),
    ("filter-input", "ct state new jump service-endpoints-check"),
    (
        "filter-forward",
        "ct state new jump service-endpoints-check",
    ),
    ("filter-forward", "ct state new jump cluster-ips-check"),
    ("filter-output", "ct state new jump service-endpoints-check"),
    ("filter-output", "ct state new jump cluster-ips-check"),
    ("nat-prerouting", "jump services"),
    ("nat-output", "jump services"),
    ("nat-postrouting", "jump masquerading"),
];

/// Sets and maps: kind, name, type, comment. `ADDR` stands for the family's address type.
const SETS: [(&str, &str, &str, &str); 8] = [
    (
        "set",
        "hairpin-connections",
        "ADDR . ADDR . inet_proto . inet_service",
        "service hairpin connections",
    ),
    ("set", "cluster-ips", "ADDR", "Active ClusterIPs"),
    (
        "set",
        NODE_PORT_IPS,
        "ADDR",
        "IPs that accept NodePort traffic",
    ),
    (
        "map",
        "no-endpoint-services",
        "ADDR . inet_proto . inet_service : verdict",
        "vmap to drop or reject packets to services with no endpoints",
    ),
    (
        "map",
        "no-endpoint-nodeports",
        "inet_proto . inet_service : verdict",
        "vmap to drop or reject packets to service nodeports with no endpoints",
    ),
    (
        "map",
        "firewall-ips",
        "ADDR . inet_proto . inet_service : verdict",
        "destinations that are subject to LoadBalancerSourceRanges",
    ),
    (
        "map",
        "service-ips",
        "ADDR . inet_proto . inet_service : verdict",
        "ClusterIP, ExternalIP and LoadBalancer IP traffic",
    ),
    (
        "map",
        "service-nodeports",
        "inet_proto . inet_service : verdict",
        "NodePort traffic",
    ),
];

const NODE_PORT_IPS: &str = "nodeport-ips";

/// The elements of one set or map. A key has one value: of two `ServicePort`s that want it,
/// kube-proxy writes both in turn, so that it is the later's.
#[derive(Default)]
pub(super) struct Elements {
    /// Key and what follows it: nothing in a set, ` : verdict` in a map, with a comment before.
    list: Vec<(String, String)>,
    index: HashMap<String, usize>,
}

impl Elements {
    fn put(&mut self, key: String, value: String) {
        if let Some(index) = self.index.get(&key) {
            self.list[*index].1 = value;
        } else {
            self.index.insert(key.clone(), self.list.len());
            self.list.push((key, value));
        }
    }

    /// What follows the key, if it is there.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        let (_, value) = self.list.get(*self.index.get(key)?)?;
        Some(value)
    }

    /// Keys and what follows them.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.list
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
    }
}

/// The elements of all sets and maps.
#[derive(Default)]
pub(super) struct AllElements {
    hairpin_connections: Elements,
    cluster_ips: Elements,
    node_port_ips: Elements,
    no_endpoint_services: Elements,
    no_endpoint_node_ports: Elements,
    firewall_ips: Elements,
    service_ips: Elements,
    service_node_ports: Elements,
}

impl AllElements {
    /// With the names of the sets and maps.
    pub(super) fn named(&self) -> [(&'static str, &Elements); 8] {
        [
            ("cluster-ips", &self.cluster_ips),
            (NODE_PORT_IPS, &self.node_port_ips),
            ("no-endpoint-services", &self.no_endpoint_services),
            ("no-endpoint-nodeports", &self.no_endpoint_node_ports),
            ("firewall-ips", &self.firewall_ips),
            ("service-ips", &self.service_ips),
            ("service-nodeports", &self.service_node_ports),
            ("hairpin-connections", &self.hairpin_connections),
        ]
    }
}

/// One command for many elements, each a line that begins with a tab, which is how they are
/// counted.
pub(super) fn push_elements<'e>(
    text: &mut String,
    command: &str,
    table: &str,
    name: &str,
    elements: impl Iterator<Item = (&'e str, &'e str)>,
) {
    let mut elements = elements.peekable();
    if elements.peek().is_some() {
        push_all(text, &[command, " element ", table, " ", name, " {\n"]);
        for (key, value) in elements {
            push_all(text, &["\t", key, value, ",\n"]);
        }
        text.push_str("}\n");
    }
}

/// The `nft -f` script of one family: one transaction, over no table, a flushed table (whose
/// sets keep their elements) or a full one.
pub(in crate::rules) fn render(ports: &Ports<'_>, node: &NodeView, family: Family) -> String {
    let ip = family.nft();
    let table = format!("{ip} kube-proxy");
    let mark = node.mark();
    let node_port_ips = node.node_port_ips(family, &NodePortAddresses::Primary);
    let count = ports.list.len();
    let mut text = String::with_capacity(1024 * count + 8192);
    // Writing into a String cannot fail, here and below.
    let _ = write!(
        text,
        "add table {table} {{ comment \"rules for kube-proxy\" ; }}\nflush table {table}\n"
    );
    for (kind, name, types, comment) in SETS {
        if name == NODE_PORT_IPS && node_port_ips.is_none() {
            continue;
        }
        let types = types.replace("ADDR", family.nft_address());
        let _ = write!(
            text,
            "add {kind} {table} {name} {{ type {types} ; comment \"{comment}\" ; }}\n\
             flush {kind} {table} {name}\n"
        );
    }
    for (name, kind, hook, priority) in BASE_CHAINS {
        let _ = writeln!(
            text,
            "add chain {table} {name} {{ type {kind} hook {hook} priority {priority} ; }}"
        );
    }
    for name in CHAINS {
        let _ = writeln!(text, "add chain {table} {name}");
    }
    let _ = writeln!(
        text,
        "add chain {table} reject-chain {{ comment \"helper for @no-endpoint-services / \
         @no-endpoint-nodeports\" ; }}"
    );

    let mut rules = String::with_capacity(512 * count + 4096);
    let mut rule = |chain: &str, rule: &str| {
        push_all(
            &mut rules,
            &["add rule ", &table, " ", chain, " ", rule, "\n"],
        );
    };
    for (chain, text) in BASE_RULES {
        rule(chain, text);
    }
    let loopback = match family {
        Family::V4 => "127.0.0.0/8",
        Family::V6 => "::1",
    };
    let (node_port, node_port_reject) = if node_port_ips.is_some() {
        let to_node = format!("{ip} daddr @{NODE_PORT_IPS}");
        (to_node.clone(), to_node)
    } else {
        (
            format!("fib daddr type local {ip} daddr != {loopback}"),
            format!("{ip} daddr != {loopback}"),
        )
    };
    rule(
        "nodeport-endpoints-check",
        &format!("{node_port_reject} meta l4proto . th dport vmap @no-endpoint-nodeports"),
    );
    rule(
        "service-endpoints-check",
        &format!("{ip} daddr . meta l4proto . th dport vmap @no-endpoint-services"),
    );
    rule(
        "firewall-check",
        &format!("{ip} daddr . meta l4proto . th dport vmap @firewall-ips"),
    );
    if node.masquerade_all {
        rule(
            "services",
            &format!(
                "{ip} daddr @cluster-ips mark set mark or {mark} comment \
                 \"masquerade all clusterIP traffic\""
            ),
        );
    } else if let Some(cidr) = node.cluster_cidr(family) {
        rule(
            "services",
            &format!(
                "{ip} daddr @cluster-ips {ip} saddr != {cidr} mark set mark or {mark} comment \
                 \"masquerade clusterIP traffic from outside cluster\""
            ),
        );
    }
    rule(
        "services",
        &format!("{ip} daddr . meta l4proto . th dport vmap @service-ips"),
    );
    rule(
        "services",
        &format!("{node_port} meta l4proto . th dport vmap @service-nodeports"),
    );
    rule(
        "masquerading",
        &format!("mark and {mark} != 0 mark set mark xor {mark} masquerade fully-random"),
    );
    rule(
        "masquerading",
        &format!(
            "ct status dnat {ip} saddr . {ip} daddr . meta l4proto . th dport \
             @hairpin-connections masquerade fully-random"
        ),
    );
    rule(
        "cluster-ips-check",
        &format!(
            "{ip} daddr @cluster-ips reject comment \"Reject traffic to invalid ports of ClusterIPs\""
        ),
    );
    let service_cidrs: Vec<String> = node
        .service_cidrs
        .iter()
        .filter(|cidr| family.holds(cidr.base))
        .map(ToString::to_string)
        .collect();
    if !service_cidrs.is_empty() {
        rule(
            "cluster-ips-check",
            &format!(
                "{ip} daddr {{ {} }} drop comment \"Drop traffic to unallocated ClusterIPs\"",
                service_cidrs.join(",")
            ),
        );
    }
    rule("reject-chain", "reject");

    let mut writer = Writer::new(ports, node, family);
    for port in &ports.list {
        let names = Names::of(port);
        writer.push_elements(port, &names);
        writer.push_chains(port, &names);
    }
    text.push_str(&writer.sets);
    text.push_str(&writer.chains);
    text.push_str(&rules);
    text.push_str(&writer.rules);
    for (name, elements) in writer.elements.named() {
        push_elements(&mut text, "add", &table, name, elements.iter());
    }
    text
}

/// Writes the sets, chains, rules and elements of `ServicePort`s.
pub(super) struct Writer {
    /// `ip kube-proxy`.
    table: String,
    family: Family,
    mark: String,
    /// The network of the pods, if the node knows it.
    pods: Option<String>,
    node_ip: IpAddr,
    /// Chains are emptied when they are declared: in a partial sync.
    pub(super) flush: bool,
    /// Declarations of affinity sets.
    pub(super) sets: String,
    /// Declarations of chains.
    pub(super) chains: String,
    /// Rules.
    pub(super) rules: String,
    /// Elements.
    pub(super) elements: AllElements,
}

/// The chains and sets that a `ServicePort` has to itself.
pub(super) struct Names {
    /// What follows the prefix of the chains.
    base: String,
    /// What follows `endpoint-` and `affinity-`, by endpoint that can be reached; only with
    /// session affinity.
    endpoints: Vec<String>,
}

impl Names {
    pub(super) fn of(port: &PortView<'_>) -> Self {
        let service = port.service;
        let endpoint_name = |endpoint: &EndpointText<'_>| {
            nft_endpoint_name(
                &service.namespace,
                &service.name,
                port.protocol(),
                &port.port.name,
                endpoint.address(),
                endpoint.port(),
            )
        };
        let endpoints = match service.affinity {
            Some(_) => port.reachable_endpoints().map(endpoint_name).collect(),
            None => Vec::new(),
        };
        Self {
            base: nft_service_name(
                &service.namespace,
                &service.name,
                port.protocol(),
                &port.port.name,
            ),
            endpoints,
        }
    }

    /// The prefixes of the chains, but for those of endpoints.
    fn prefixes(port: &PortView<'_>) -> impl Iterator<Item = &'static str> {
        [
            (port.cluster_count() > 0, "service-"),
            (port.local_count() > 0, "local-"),
            (
                port.has_endpoints && port.is_externally_accessible(),
                "external-",
            ),
            // Not only with endpoints, as in iptables mode.
            (port.is_firewalled(), "firewall-"),
        ]
        .into_iter()
        .filter_map(|(has, prefix)| has.then_some(prefix))
    }

    /// The full names of the chains, and of the affinity sets.
    pub(super) fn all(&self, port: &PortView<'_>) -> (Vec<String>, Vec<String>) {
        let mut chains: Vec<String> = Self::prefixes(port)
            .map(|prefix| format!("{prefix}{}", self.base))
            .collect();
        chains.extend(self.endpoints.iter().map(|name| format!("endpoint-{name}")));
        let sets = self.endpoints.iter().map(|name| format!("affinity-{name}"));
        (chains, sets.collect())
    }
}

impl Writer {
    pub(super) fn new(ports: &Ports<'_>, node: &NodeView, family: Family) -> Self {
        let count = ports.list.len();
        let mut elements = AllElements::default();
        if let Some(ips) = node.node_port_ips(family, &NodePortAddresses::Primary) {
            for ip in ips.iter().filter(|ip| !ip.is_loopback()) {
                elements.node_port_ips.put(ip.to_string(), String::new());
            }
        }
        Self {
            table: format!("{} kube-proxy", family.nft()),
            family,
            mark: node.mark(),
            pods: node.cluster_cidr(family).map(|cidr| cidr.to_string()),
            node_ip: node.node_ip(family),
            flush: false,
            sets: String::new(),
            chains: String::with_capacity(96 * count),
            rules: String::with_capacity(384 * count),
            elements,
        }
    }

    /// The elements of a `ServicePort`.
    pub(super) fn push_elements(&mut self, port: &PortView<'_>, names: &Names) {
        let protocol = port.protocol();
        let number = port.port.port;
        let name = names.base.as_str();
        let internal = if port.is_internal_local() {
            "local"
        } else {
            "service"
        };
        // Without any endpoint packets are rejected, without a local one they are dropped.
        let refused = if port.has_endpoints {
            format!(" comment \"{}\" : drop", port.id)
        } else {
            format!(" comment \"{}\" : goto reject-chain", port.id)
        };
        let external = format!(" : goto external-{name}");
        let elements = &mut self.elements;

        elements
            .cluster_ips
            .put(port.cluster_ip.clone(), String::new());
        let key = format!("{} . {protocol} . {number}", port.cluster_ip);
        if port.has_internal_endpoints() {
            elements
                .service_ips
                .put(key, format!(" : goto {internal}-{name}"));
        } else {
            elements.no_endpoint_services.put(key, refused.clone());
        }
        for ip in port.external_ips.iter().chain(&port.load_balancer_ips) {
            let key = format!("{ip} . {protocol} . {number}");
            if port.has_endpoints {
                elements.service_ips.put(key.clone(), external.clone());
            }
            if !port.has_external_endpoints() {
                elements.no_endpoint_services.put(key, refused.clone());
            }
        }
        if port.is_firewalled() {
            for ip in &port.load_balancer_ips {
                let key = format!("{ip} . {protocol} . {number}");
                let value = format!(" : goto firewall-{name}");
                elements.firewall_ips.put(key, value);
            }
        }
        if let Some(node_port) = port.port.node_port {
            let key = format!("{protocol} . {node_port}");
            if port.has_endpoints {
                elements.service_node_ports.put(key.clone(), external);
            }
            if !port.has_external_endpoints() {
                elements.no_endpoint_node_ports.put(key, refused);
            }
        }
        for endpoint in port.reachable_endpoints().filter(|e| e.local) {
            let (address, port) = (endpoint.address(), endpoint.port());
            let key = format!("{address} . {address} . {protocol} . {port}");
            elements.hairpin_connections.put(key, String::new());
        }
    }

    fn rule(&mut self, chain: [&str; 2], rule: &[&str]) {
        let table = &self.table;
        push_all(
            &mut self.rules,
            &["add rule ", table, " ", chain[0], chain[1], " "],
        );
        push_all(&mut self.rules, rule);
        self.rules.push('\n');
    }

    fn declare(&mut self, prefix: &str, name: &str) {
        let table = &self.table;
        push_all(
            &mut self.chains,
            &["add chain ", table, " ", prefix, name, "\n"],
        );
        if self.flush {
            push_all(
                &mut self.chains,
                &["flush chain ", table, " ", prefix, name, "\n"],
            );
        }
    }

    /// The chains of a `ServicePort`, and its affinity sets.
    pub(super) fn push_chains(&mut self, port: &PortView<'_>, names: &Names) {
        for prefix in Names::prefixes(port) {
            self.declare(prefix, &names.base);
        }
        if port.has_endpoints && port.is_externally_accessible() {
            self.push_external(port, &names.base);
        }
        if port.is_firewalled() {
            self.push_firewall(port, &names.base);
        }
        if let Some(seconds) = port.service.affinity {
            self.push_endpoint_chains(port, names, seconds);
        }
        if port.cluster_count() > 0 {
            let chain = ["service-", names.base.as_str()];
            self.push_choice(port, names, chain, TrafficPolicy::Cluster);
        }
        if port.local_count() > 0 {
            let chain = ["local-", names.base.as_str()];
            self.push_choice(port, names, chain, TrafficPolicy::Local);
        }
    }

    /// The chain of all traffic that is not to the ClusterIP.
    fn push_external(&mut self, port: &PortView<'_>, name: &str) {
        let chain = ["external-", name];
        let mark = self.mark.clone();
        if port.is_external_local() {
            if let Some(pods) = self.pods.clone() {
                let ip = self.family.nft();
                let comment = " comment \"short-circuit pod traffic\"";
                let rule = [ip, " saddr ", &pods, " goto service-", name, comment];
                self.rule(chain, &rule);
            }
            let local = "fib saddr type local ";
            let comment = " comment \"masquerade local traffic\"";
            self.rule(chain, &[local, "mark set mark or ", &mark, comment]);
            let comment = " comment \"short-circuit local traffic\"";
            self.rule(chain, &[local, "goto service-", name, comment]);
        } else {
            let comment = " comment \"masquerade\"";
            self.rule(chain, &["mark set mark or ", &mark, comment]);
        }
        if port.has_external_endpoints() {
            let prefix = if port.is_external_local() {
                "local-"
            } else {
                "service-"
            };
            self.rule(chain, &["goto ", prefix, name]);
        }
    }

    /// The chain of the load balancer's source ranges.
    fn push_firewall(&mut self, port: &PortView<'_>, name: &str) {
        let mut sources: Vec<String> = port.source_ranges.iter().map(Cidr::to_string).collect();
        // A packet from the node to a VIP that is on the node has the VIP as its source.
        if port.is_source(self.node_ip) {
            sources.extend(port.load_balancer_ips.iter().map(IpAddr::to_string));
        }
        let ip = self.family.nft();
        let sources = sources.join(" , ");
        let rule = [ip, " saddr != { ", &sources, " } drop"];
        self.rule(["firewall-", name], &rule);
    }

    /// With session affinity every endpoint has a chain, which remembers the client.
    fn push_endpoint_chains(&mut self, port: &PortView<'_>, names: &Names, seconds: u32) {
        let protocol = port.protocol().name();
        let ip = self.family.nft();
        for (endpoint, name) in port.reachable_endpoints().zip(&names.endpoints) {
            let _ = writeln!(
                self.sets,
                "add set {} affinity-{name} {{ type {} ; flags dynamic,timeout ; \
                 timeout {seconds}s ; }}",
                self.table,
                self.family.nft_address()
            );
            self.declare("endpoint-", name);
            let chain = ["endpoint-", name.as_str()];
            self.rule(chain, &["update @affinity-", name, " { ", ip, " saddr }"]);
            let to = ["meta l4proto ", protocol, " dnat to ", endpoint.socket()];
            self.rule(chain, &to);
        }
    }

    /// The choice among the endpoints that a policy may use.
    fn push_choice(
        &mut self,
        port: &PortView<'_>,
        names: &Names,
        chain: [&str; 2],
        policy: TrafficPolicy,
    ) {
        let ip = self.family.nft();
        if port.service.affinity.is_some() {
            let chosen: Vec<&String> = port
                .reachable_endpoints()
                .zip(&names.endpoints)
                .filter(|(endpoint, _)| endpoint.is_for(policy))
                .map(|(_, name)| name)
                .collect();
            for name in &chosen {
                let known = [ip, " saddr @affinity-", name, " goto endpoint-", name];
                self.rule(chain, &known);
            }
            let mut choice = format!("numgen random mod {} vmap {{", chosen.len());
            for (index, name) in chosen.iter().enumerate() {
                let separator = if index == 0 { " " } else { " , " };
                let _ = write!(choice, "{separator}{index} : goto endpoint-{name}");
            }
            self.rule(chain, &[&choice, " }"]);
            return;
        }
        let count = port.endpoints.iter().filter(|e| e.is_for(policy)).count();
        let table = &self.table;
        let rules = &mut self.rules;
        push_all(rules, &["add rule ", table, " ", chain[0], chain[1]]);
        let protocol = port.protocol().name();
        let _ = write!(
            rules,
            " meta l4proto {protocol} dnat {ip} addr . port to numgen random mod {count} map {{"
        );
        for (index, endpoint) in port
            .endpoints
            .iter()
            .filter(|e| e.is_for(policy))
            .enumerate()
        {
            let separator = if index == 0 { " " } else { " , " };
            let _ = write!(rules, "{separator}{index} : ");
            push_all(rules, &[endpoint.address(), " . ", endpoint.port()]);
        }
        rules.push_str(" }\n");
    }
}

/// Adapts rendered `text` to a kernel that already holds a `kube-proxy` table: if that table has
/// chains of Services that are gone, it is replaced as a whole, in the same transaction.
///
/// `current` is what `nft list chains FAMILY` prints.
pub fn update(current: &str, family: Family, text: &str) -> String {
    let ip = family.nft();
    let heading = format!("table {ip} kube-proxy {{");
    let prefix = format!("add chain {ip} kube-proxy ");
    let wanted: HashSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix(&prefix)?.split(' ').next())
        .collect();
    let stale = current
        .lines()
        .skip_while(|line| *line != heading)
        .skip(1)
        .take_while(|line| *line != "}")
        .filter_map(|line| line.strip_prefix("\tchain ")?.strip_suffix(" {"))
        .any(|chain| !wanted.contains(chain));
    if stale {
        format!("add table {ip} kube-proxy\ndelete table {ip} kube-proxy\n{text}")
    } else {
        text.to_owned()
    }
}
