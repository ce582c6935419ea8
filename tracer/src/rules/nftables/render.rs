//! kube-proxy's nftables mode: one transaction a family that makes the table `kube-proxy`.
//!
//! Sources: `pkg/proxy/nftables/proxier.go` (`setupNFTables`, `syncProxyRules`,
//! `writeServiceToEndpointRules`) of Kubernetes v1.36, KEP-3866. Rules are written as kube-proxy
//! writes them; `nft` prints them in another spelling (`mark or` becomes `|`).

use std::collections::HashSet;
use std::fmt::Write as _;

use crate::cluster::Family;
use crate::rules::NodeView;
use crate::rules::iptables::push_all;
use crate::rules::names::nft_service_name;
use crate::rules::ports::{PortView, Ports};

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

/// The elements of the sets and maps, each line one element: it begins with a tab and ends with
/// a comma, which is also how they are counted.
#[derive(Default)]
struct Elements {
    hairpin_connections: String,
    cluster_ips: String,
    node_port_ips: String,
    no_endpoint_services: String,
    no_endpoint_node_ports: String,
    service_ips: String,
    service_node_ports: String,
}

/// The `nft -f` script of one family: one transaction, over no table, a flushed table (whose
/// sets keep their elements) or a full one.
pub(in crate::rules) fn render(ports: &Ports<'_>, node: &NodeView, family: Family) -> String {
    let ip = family.nft();
    let table = format!("{ip} kube-proxy");
    let mark = node.mark();
    let primary = node.addresses_of(family).next();
    let count = ports.list.len();
    let mut text = String::with_capacity(1024 * count + 8192);
    // Writing into a String cannot fail, here and below.
    let _ = write!(
        text,
        "add table {table} {{ comment \"rules for kube-proxy\" ; }}\nflush table {table}\n"
    );
    for (kind, name, types, comment) in SETS {
        if name == NODE_PORT_IPS && primary.is_none() {
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
    // Without an address of its own in this family, kube-proxy takes any local one.
    let (node_port, node_port_reject) = if primary.is_some() {
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
    if let Some(cidr) = node.cluster_cidr(family) {
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

    let mut elements = Elements::default();
    elements.service_ips.reserve(96 * count);
    elements.cluster_ips.reserve(24 * count);
    if let Some(address) = primary {
        let _ = writeln!(elements.node_port_ips, "\t{address},");
    }
    let mut writer = Writer {
        chains: &mut text,
        rules: &mut rules,
        elements: &mut elements,
        table: &table,
        ip,
        mark: &mark,
        cluster_ips: HashSet::with_capacity(count),
        hairpins: HashSet::new(),
    };
    for port in &ports.list {
        writer.push(port);
    }
    text.push_str(&rules);
    for (name, list) in [
        ("cluster-ips", &elements.cluster_ips),
        (NODE_PORT_IPS, &elements.node_port_ips),
        ("no-endpoint-services", &elements.no_endpoint_services),
        ("no-endpoint-nodeports", &elements.no_endpoint_node_ports),
        ("service-ips", &elements.service_ips),
        ("service-nodeports", &elements.service_node_ports),
        ("hairpin-connections", &elements.hairpin_connections),
    ] {
        if !list.is_empty() {
            push_all(
                &mut text,
                &["add element ", &table, " ", name, " {\n", list, "}\n"],
            );
        }
    }
    text
}

/// Writes the chains, rules and elements of `ServicePort`s.
struct Writer<'a, 'p> {
    chains: &'a mut String,
    rules: &'a mut String,
    elements: &'a mut Elements,
    table: &'a str,
    ip: &'static str,
    mark: &'a str,
    /// Several `ServicePort`s share a ClusterIP, and can share an endpoint.
    cluster_ips: HashSet<&'p str>,
    hairpins: HashSet<(&'static str, &'p str)>,
}

impl<'p> Writer<'_, 'p> {
    fn push(&mut self, port: &'p PortView<'_>) {
        let protocol = port.protocol().name();
        let elements = &mut *self.elements;
        if self.cluster_ips.insert(&port.cluster_ip) {
            push_all(&mut elements.cluster_ips, &["\t", &port.cluster_ip, ",\n"]);
        }
        if port.endpoints.is_empty() {
            let _ = writeln!(
                elements.no_endpoint_services,
                "\t{} . {protocol} . {} comment \"{}\" : goto reject-chain,",
                port.cluster_ip, port.port.port, port.id
            );
            if let Some(node_port) = port.port.node_port {
                let _ = writeln!(
                    elements.no_endpoint_node_ports,
                    "\t{protocol} . {node_port} comment \"{}\" : goto reject-chain,",
                    port.id
                );
            }
            return;
        }

        let name = nft_service_name(
            &port.service.namespace,
            &port.service.name,
            port.protocol(),
            &port.port.name,
        );
        let _ = writeln!(
            elements.service_ips,
            "\t{} . {protocol} . {} : goto service-{name},",
            port.cluster_ip, port.port.port
        );
        push_all(
            self.chains,
            &["add chain ", self.table, " service-", &name, "\n"],
        );
        if let Some(node_port) = port.port.node_port {
            let _ = writeln!(
                elements.service_node_ports,
                "\t{protocol} . {node_port} : goto external-{name},"
            );
            push_all(
                self.chains,
                &["add chain ", self.table, " external-", &name, "\n"],
            );
            push_all(
                self.rules,
                &[
                    "add rule ",
                    self.table,
                    " external-",
                    &name,
                    " mark set mark or ",
                    self.mark,
                    " comment \"masquerade\"\nadd rule ",
                    self.table,
                    " external-",
                    &name,
                    " goto service-",
                    &name,
                    "\n",
                ],
            );
        }
        for endpoint in port.endpoints.iter().filter(|endpoint| endpoint.local) {
            if self.hairpins.insert((protocol, endpoint.socket())) {
                let (address, port) = (endpoint.address(), endpoint.port());
                push_all(
                    &mut elements.hairpin_connections,
                    &[
                        "\t", address, " . ", address, " . ", protocol, " . ", port, ",\n",
                    ],
                );
            }
        }
        push_all(self.rules, &["add rule ", self.table, " service-", &name]);
        let _ = write!(
            self.rules,
            " meta l4proto {protocol} dnat {} addr . port to numgen random mod {} map {{",
            self.ip,
            port.endpoints.len()
        );
        for (index, endpoint) in port.endpoints.iter().enumerate() {
            let separator = if index == 0 { " " } else { " , " };
            let _ = write!(self.rules, "{separator}{index} : ");
            push_all(self.rules, &[endpoint.address(), " . ", endpoint.port()]);
        }
        self.rules.push_str(" }\n");
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
