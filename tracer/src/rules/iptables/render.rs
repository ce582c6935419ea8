//! kube-proxy's iptables mode: the input of one `iptables-restore --noflush` a family.
//!
//! Both back ends (`iptables-legacy`, `iptables-nft`) load the same text. Sources:
//! `pkg/proxy/iptables/proxier.go` (`syncProxyRules`, `iptablesJumpChains`,
//! `writeServiceToEndpointRules`) and `pkg/util/iptables/monitor.go` (canaries) of Kubernetes
//! v1.36; KEP-3178 says why `KUBE-FIREWALL` is among them.

use std::collections::HashSet;
use std::fmt::{Display, Write as _};
use std::net::IpAddr;

use crate::cluster::{Family, TrafficPolicy};
use crate::rules::names::{Hash, endpoint_hash, service_hash};
use crate::rules::ports::{EndpointText, PortView, Ports};
use crate::rules::{NodePortAddresses, NodeView};

/// The nfacct object that counts packets dropped as INVALID.
pub const INVALID_DROPPED: &str = "ct_state_invalid_dropped_pkts";
/// The nfacct object that counts NodePort packets to a loopback address.
pub const LOCALHOST_NODE_PORTS: &str = "localhost_nps_accepted_pkts";

/// The canary that kube-proxy looks for to notice a flush with deletion of chains.
const CANARY: &str = ":KUBE-PROXY-CANARY - [0:0]\n";

/// kube-proxy's jump rules in the order in which it prepends them (so that the kernel shows each
/// base chain's in the reverse order): base chain, match, comment, chain.
const FILTER_JUMPS: [(&str, &str, &str, &str); 11] = [
    (
        "INPUT",
        NEW,
        "kubernetes externally-visible service portals",
        "KUBE-EXTERNAL-SERVICES",
    ),
    (
        "FORWARD",
        NEW,
        "kubernetes externally-visible service portals",
        "KUBE-EXTERNAL-SERVICES",
    ),
    (
        "INPUT",
        "",
        "kubernetes health check service ports",
        "KUBE-NODEPORTS",
    ),
    (
        "FORWARD",
        NEW,
        "kubernetes service portals",
        "KUBE-SERVICES",
    ),
    ("OUTPUT", NEW, "kubernetes service portals", "KUBE-SERVICES"),
    ("FORWARD", "", "kubernetes forwarding rules", "KUBE-FORWARD"),
    (
        "INPUT",
        NEW,
        "kubernetes load balancer firewall",
        "KUBE-PROXY-FIREWALL",
    ),
    (
        "OUTPUT",
        NEW,
        "kubernetes load balancer firewall",
        "KUBE-PROXY-FIREWALL",
    ),
    (
        "FORWARD",
        NEW,
        "kubernetes load balancer firewall",
        "KUBE-PROXY-FIREWALL",
    ),
    ("INPUT", "", "", "KUBE-FIREWALL"),
    ("OUTPUT", "", "", "KUBE-FIREWALL"),
];

/// The same for the nat table, which IPVS mode shares.
const NAT_JUMPS: [(&str, &str, &str, &str); 3] = [
    ("OUTPUT", "", "kubernetes service portals", "KUBE-SERVICES"),
    (
        "PREROUTING",
        "",
        "kubernetes service portals",
        "KUBE-SERVICES",
    ),
    (
        "POSTROUTING",
        "",
        "kubernetes postrouting rules",
        "KUBE-POSTROUTING",
    ),
];

const NEW: &str = "-m conntrack --ctstate NEW ";

pub(super) const FILTER_CHAINS: [&str; 5] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-FORWARD",
    "KUBE-NODEPORTS",
    "KUBE-PROXY-FIREWALL",
];

/// The kubelet's, which kube-proxy makes too, and fills if it serves NodePorts on loopback
/// addresses.
pub(super) const LOCALNET_CHAIN: &str = "KUBE-FIREWALL";

pub(super) const NAT_CHAINS: [&str; 4] = [
    "KUBE-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-MARK-MASQ",
];

// How the chains of one ServicePort begin.
pub(in crate::rules) const SVC: &str = "KUBE-SVC-";
pub(in crate::rules) const SVL: &str = "KUBE-SVL-";
pub(in crate::rules) const SEP: &str = "KUBE-SEP-";
pub(in crate::rules) const FW: &str = "KUBE-FW-";
pub(in crate::rules) const EXT: &str = "KUBE-EXT-";

/// Chains of single Services, which kube-proxy deletes once nothing uses them.
const SERVICE_CHAIN_PREFIXES: [&str; 5] = [SVC, SVL, SEP, FW, EXT];

/// The beginning of the rules that end `KUBE-SERVICES`.
const NODE_PORTS_LAST: &str = "-A KUBE-SERVICES -m comment --comment \"kubernetes service \
                               nodeports; NOTE: this must be the last rule in this chain\"";

/// The `iptables-restore --noflush` input of one family: a full sync.
pub(in crate::rules) fn render(ports: &Ports<'_>, node: &NodeView, family: Family) -> String {
    let mut tables = Tables::new(ports, node, family);
    for port in &ports.list {
        tables.push_port(port, true);
    }
    tables.finish();

    let Tables {
        filter,
        nat_chains,
        nat,
        ..
    } = tables;
    let mut text = String::with_capacity(nat_chains.len() + nat.len() + filter.len() + 8192);
    text.push_str("*mangle\n");
    text.push_str(CANARY);
    text.push_str("COMMIT\n*filter\n");
    push_chains(&mut text, &FILTER_CHAINS);
    push_chains(&mut text, &[LOCALNET_CHAIN]);
    text.push_str(CANARY);
    push_jumps(&mut text, &FILTER_JUMPS);
    text.push_str(&filter);
    text.push_str("COMMIT\n*nat\n");
    push_chains(&mut text, &NAT_CHAINS);
    text.push_str(CANARY);
    push_descending(&mut text, &nat_chains);
    push_nat_jumps(&mut text);
    text.push_str(&nat);
    text.push_str("COMMIT\n");
    text
}

/// Writes declarations of chains, the last name first. kube-proxy's order is random.
///
/// iptables-nft-restore keeps the names that it meets in a sorted list, which it searches from the
/// beginning for every line (`cache_chain_list_insert`, iptables/nft-cache.c). Declared so, each name
/// comes to stand before the others at once, and later searches walk through memory in one direction:
/// 5000 Services load in 8 s instead of 26 s.
fn push_descending(text: &mut String, declarations: &str) {
    let mut lines: Vec<&str> = declarations.split_inclusive('\n').collect();
    lines.sort_unstable_by(|one, other| other.cmp(one));
    text.extend(lines);
}

/// The rules of the two tables, as they are written.
pub(super) struct Tables<'n> {
    node: &'n NodeView,
    family: Family,
    services: ServiceRules,
    /// Rules of the filter table.
    pub(super) filter: String,
    /// Declarations of Services' chains in the nat table.
    pub(super) nat_chains: String,
    /// Rules of the nat table.
    pub(super) nat: String,
}

impl<'n> Tables<'n> {
    /// What comes before the first Service.
    pub(super) fn new(ports: &Ports<'_>, node: &'n NodeView, family: Family) -> Self {
        let mut tables = Self {
            node,
            family,
            services: ServiceRules {
                nfacct: node.nfacct,
                localhost: node.serves_localhost(family),
                large: ports.large,
                masquerade_all: node.masquerade_all,
                node_ip: node.node_ip(family),
                pods: node.cluster_cidr(family).map(|cidr| cidr.to_string()),
            },
            filter: String::with_capacity(4096),
            nat_chains: String::with_capacity(200 * ports.list.len()),
            nat: String::with_capacity(1400 * ports.list.len() + 4096),
        };
        push_masquerade_rules(&mut tables.nat, node);
        if tables.services.localhost {
            tables.filter.push_str(
                "-A KUBE-FIREWALL -m comment --comment \"block incoming localnet connections\" \
                 -d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack \
                 ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP\n",
            );
        }
        tables
    }

    /// The rules of a `ServicePort` in the chains that all share, and if `own`, its own chains.
    pub(super) fn push_port(&mut self, port: &PortView<'_>, own: bool) {
        let names = ChainNames::of(port);
        self.services
            .push_shared(&mut self.filter, &mut self.nat, port, &names);
        if own {
            self.services
                .push_own(&mut self.nat_chains, &mut self.nat, port, &names);
        }
    }

    /// What comes after the last Service.
    pub(super) fn finish(&mut self) {
        match self
            .node
            .node_port_ips(self.family, &NodePortAddresses::Default)
        {
            None => {
                let except = match (self.family, self.services.localhost) {
                    (Family::V6, _) => " ! -d ::1/128",
                    (Family::V4, false) => " ! -d 127.0.0.0/8",
                    (Family::V4, true) => "",
                };
                push_all(
                    &mut self.nat,
                    &[
                        NODE_PORTS_LAST,
                        " -m addrtype --dst-type LOCAL",
                        except,
                        " -j KUBE-NODEPORTS\n",
                    ],
                );
            }
            Some(ips) => {
                for ip in ips
                    .iter()
                    .filter(|ip| !ip.is_loopback() || self.services.localhost)
                {
                    let _ = writeln!(self.nat, "{NODE_PORTS_LAST} -d {ip} -j KUBE-NODEPORTS");
                }
            }
        }
        push_forward_rules(&mut self.filter, self.node, Invalid::Drop);
    }
}

/// The names of a `ServicePort`'s own chains.
pub(super) struct ChainNames {
    hash: Hash<16>,
}

impl ChainNames {
    pub(super) fn of(port: &PortView<'_>) -> Self {
        Self {
            hash: service_hash(&port.id, port.protocol()),
        }
    }

    fn hash(&self) -> &str {
        self.hash.as_str()
    }

    /// Calls `each` with the prefix and the hash of every chain that the `ServicePort` has.
    pub(super) fn each_chain(port: &PortView<'_>, mut each: impl FnMut(&'static str, &str)) {
        let names = Self::of(port);
        for (has, prefix) in [
            (has_external_chain(port), EXT),
            (has_firewall_chain(port), FW),
            (port.cluster_count() > 0, SVC),
            (port.local_count() > 0, SVL),
        ] {
            if has {
                each(prefix, names.hash());
            }
        }
        for endpoint in port.reachable_endpoints() {
            let hash = endpoint_hash(&port.id, port.protocol(), endpoint.socket());
            each(SEP, hash.as_str());
        }
    }
}

fn has_external_chain(port: &PortView<'_>) -> bool {
    port.has_endpoints && port.is_externally_accessible()
}

fn has_firewall_chain(port: &PortView<'_>) -> bool {
    port.has_endpoints && port.is_firewalled()
}

/// Declares chains; with `--noflush` that also empties them.
pub(in crate::rules) fn push_chains(text: &mut String, chains: &[&str]) {
    for chain in chains {
        push_all(text, &[":", chain, " - [0:0]\n"]);
    }
}

/// Prepends jumps to base chains.
pub(in crate::rules) fn push_jumps(text: &mut String, jumps: &[(&str, &str, &str, &str)]) {
    for (base, matches, comment, chain) in jumps {
        push_all(text, &["-I ", base, " ", matches]);
        if !comment.is_empty() {
            push_all(text, &["-m comment --comment \"", comment, "\" "]);
        }
        push_all(text, &["-j ", chain, "\n"]);
    }
}

/// The jumps of the nat table.
pub(in crate::rules) fn push_nat_jumps(text: &mut String) {
    push_jumps(text, &NAT_JUMPS);
}

/// `KUBE-POSTROUTING` and `KUBE-MARK-MASQ`.
pub(in crate::rules) fn push_masquerade_rules(nat: &mut String, node: &NodeView) {
    let mark = node.mark();
    // Writing into a String cannot fail, here and below.
    let _ = write!(
        nat,
        "-A KUBE-POSTROUTING -m mark ! --mark {mark}/{mark} -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark {mark}\n\
         -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" \
         -j MASQUERADE --random-fully\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark {mark}\n"
    );
}

/// What `KUBE-FORWARD` does with packets that conntrack calls INVALID.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::rules) enum Invalid {
    /// iptables mode drops them (kubernetes issue 74839).
    Drop,
    /// IPVS mode lets them pass.
    Pass,
}

/// `KUBE-FORWARD`.
pub(in crate::rules) fn push_forward_rules(filter: &mut String, node: &NodeView, invalid: Invalid) {
    let mark = node.mark();
    if invalid == Invalid::Drop && !node.tcp_be_liberal {
        filter.push_str("-A KUBE-FORWARD -m conntrack --ctstate INVALID");
        if node.nfacct {
            push_all(filter, &[" -m nfacct --nfacct-name ", INVALID_DROPPED]);
        }
        filter.push_str(" -j DROP\n");
    }
    let _ = write!(
        filter,
        "-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" \
         -m mark --mark {mark}/{mark} -j ACCEPT\n\
         -A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" \
         -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"
    );
}

/// What the rules of every `ServicePort` have in common.
struct ServiceRules {
    nfacct: bool,
    /// Are NodePorts served on loopback addresses?
    localhost: bool,
    large: bool,
    masquerade_all: bool,
    node_ip: IpAddr,
    /// The network of the pods, if the node knows it.
    pods: Option<String>,
}

/// What a packet that no endpoint can take meets, and the comment that says so.
fn refusal(port: &PortView<'_>) -> (&'static str, &'static str) {
    if port.has_endpoints {
        ("DROP", " has no local endpoints\"")
    } else {
        ("REJECT", " has no endpoints\"")
    }
}

impl ServiceRules {
    /// The rules in chains that belong to no single `ServicePort`.
    fn push_shared(
        &self,
        filter: &mut String,
        nat: &mut String,
        port: &PortView<'_>,
        names: &ChainNames,
    ) {
        let id = port.id.as_str();
        let (refuse, why) = refusal(port);
        let to = |text: &mut String, chain: &str, what: [&str; 2], ip: &dyn Display| {
            push_all(
                text,
                &["-A ", chain, " -m comment --comment \"", what[0], what[1]],
            );
            push_destination(text, port, ip);
            text.push_str(" -j ");
        };

        if port.has_internal_endpoints() {
            to(
                nat,
                "KUBE-SERVICES",
                [id, " cluster IP\""],
                &port.cluster_ip,
            );
            let prefix = if port.is_internal_local() { SVL } else { SVC };
            push_all(nat, &[prefix, names.hash(), "\n"]);
        } else {
            to(filter, "KUBE-SERVICES", [id, why], &port.cluster_ip);
            push_all(filter, &[refuse, "\n"]);
        }

        for ip in &port.external_ips {
            if port.has_endpoints {
                to(nat, "KUBE-SERVICES", [id, " external IP\""], ip);
                push_all(nat, &[EXT, names.hash(), "\n"]);
            }
            if !port.has_external_endpoints() {
                to(filter, "KUBE-EXTERNAL-SERVICES", [id, why], ip);
                push_all(filter, &[refuse, "\n"]);
            }
        }

        let firewall = has_firewall_chain(port);
        for ip in &port.load_balancer_ips {
            if port.has_endpoints {
                to(nat, "KUBE-SERVICES", [id, " loadbalancer IP\""], ip);
                push_all(nat, &[if firewall { FW } else { EXT }, names.hash(), "\n"]);
            }
            if firewall {
                push_all(
                    filter,
                    &[
                        "-A KUBE-PROXY-FIREWALL -m comment --comment \"",
                        id,
                        " traffic not accepted by ",
                        FW,
                        names.hash(),
                        "\"",
                    ],
                );
                push_destination(filter, port, ip);
                filter.push_str(" -j DROP\n");
            }
        }
        if !port.has_external_endpoints() {
            for ip in &port.load_balancer_ips {
                to(filter, "KUBE-EXTERNAL-SERVICES", [id, why], ip);
                push_all(filter, &[refuse, "\n"]);
            }
        }

        if let Some(node_port) = port.port.node_port {
            self.push_node_port(filter, nat, port, names, node_port);
        }
        if let Some(check) = port.service.health_check_node_port {
            let _ = writeln!(
                filter,
                "-A KUBE-NODEPORTS -m comment --comment \"{id} health check node port\" \
                 -m tcp -p tcp --dport {check} -j ACCEPT"
            );
        }
    }

    fn push_node_port(
        &self,
        filter: &mut String,
        nat: &mut String,
        port: &PortView<'_>,
        names: &ChainNames,
        node_port: u16,
    ) {
        let protocol = port.protocol().name();
        let id = &port.id;
        let hash = names.hash();
        if port.has_endpoints {
            let rule =
                format!("-A KUBE-NODEPORTS -m comment --comment {id} -m {protocol} -p {protocol}");
            if self.localhost && self.nfacct {
                let _ = writeln!(
                    nat,
                    "{rule} -d 127.0.0.0/8 --dport {node_port} \
                     -m nfacct --nfacct-name {LOCALHOST_NODE_PORTS} -j {EXT}{hash}"
                );
            }
            let _ = writeln!(nat, "{rule} --dport {node_port} -j {EXT}{hash}");
        }
        if !port.has_external_endpoints() {
            let (refuse, why) = refusal(port);
            let _ = writeln!(
                filter,
                "-A KUBE-EXTERNAL-SERVICES -m comment --comment \"{id}{why} -m addrtype \
                 --dst-type LOCAL -m {protocol} -p {protocol} --dport {node_port} -j {refuse}"
            );
        }
    }

    /// The `ServicePort`'s own chains.
    fn push_own(
        &self,
        chains: &mut String,
        nat: &mut String,
        port: &PortView<'_>,
        names: &ChainNames,
    ) {
        let hash = names.hash();
        if port.has_internal_endpoints() && (self.masquerade_all || self.pods.is_some()) {
            let prefix = if port.is_internal_local() { SVL } else { SVC };
            push_all(
                nat,
                &[
                    "-A ",
                    prefix,
                    hash,
                    " -m comment --comment \"",
                    &port.id,
                    " cluster IP\"",
                ],
            );
            push_destination(nat, port, &port.cluster_ip);
            if let Some(pods) = self.pods.as_ref().filter(|_| !self.masquerade_all) {
                push_all(nat, &[" ! -s ", pods]);
            }
            nat.push_str(" -j KUBE-MARK-MASQ\n");
        }
        if has_external_chain(port) {
            push_all(chains, &[":", EXT, hash, " - [0:0]\n"]);
            self.push_external(nat, port, hash);
        }
        if has_firewall_chain(port) {
            push_all(chains, &[":", FW, hash, " - [0:0]\n"]);
            self.push_firewall(nat, port, hash);
        }
        self.push_endpoints(chains, nat, port, hash);
    }

    /// The chain of all traffic that is not to the ClusterIP.
    fn push_external(&self, nat: &mut String, port: &PortView<'_>, hash: &str) {
        let mut rule = |before: &str, after: [&str; 3]| {
            push_all(nat, &["-A ", EXT, hash, " -m comment --comment \"", before]);
            push_all(nat, &[" for ", &port.id, " external destinations\""]);
            push_all(nat, &after);
            nat.push('\n');
        };
        if port.is_external_local() {
            if let Some(pods) = &self.pods {
                let jump = format!(" -s {pods} -j {SVC}");
                rule("pod traffic", [&jump, hash, ""]);
            }
            let local = " -m addrtype --src-type LOCAL -j ";
            rule("masquerade LOCAL traffic", [local, "KUBE-MARK-MASQ", ""]);
            rule("route LOCAL traffic", [local, SVC, hash]);
        } else {
            rule("masquerade traffic", [" -j KUBE-MARK-MASQ", "", ""]);
        }
        if port.has_external_endpoints() {
            let prefix = if port.is_external_local() { SVL } else { SVC };
            push_all(nat, &["-A ", EXT, hash, " -j ", prefix, hash, "\n"]);
        }
    }

    /// The chain of the load balancer's source ranges.
    fn push_firewall(&self, nat: &mut String, port: &PortView<'_>, hash: &str) {
        let mut accept = |source: &dyn Display| {
            let _ = writeln!(
                nat,
                "-A {FW}{hash} -m comment --comment \"{} loadbalancer IP\" -s {source} \
                 -j {EXT}{hash}",
                port.id
            );
        };
        for range in &port.source_ranges {
            accept(range);
        }
        // A packet from the node to a VIP that is on the node has the VIP as its source.
        if port.is_source(self.node_ip) {
            for ip in &port.load_balancer_ips {
                accept(ip);
            }
        }
        let _ = writeln!(
            nat,
            "-A {FW}{hash} -m comment --comment \"other traffic to {} will be dropped by \
             KUBE-PROXY-FIREWALL\"",
            port.id
        );
    }

    /// The choice of an endpoint under each policy, and the endpoints' own chains.
    fn push_endpoints(
        &self,
        chains: &mut String,
        nat: &mut String,
        port: &PortView<'_>,
        hash: &str,
    ) {
        // Each name is hashed once.
        let reachable: Vec<(&EndpointText<'_>, Hash<16>)> = port
            .reachable_endpoints()
            .map(|endpoint| {
                let name = endpoint_hash(&port.id, port.protocol(), endpoint.socket());
                (endpoint, name)
            })
            .collect();
        if port.cluster_count() > 0 {
            push_all(chains, &[":", SVC, hash, " - [0:0]\n"]);
            let chosen = || {
                reachable
                    .iter()
                    .filter(|(e, _)| e.is_for(TrafficPolicy::Cluster))
            };
            self.push_choice(nat, port, [SVC, hash], port.cluster_count(), chosen);
        }
        if port.local_count() > 0 {
            push_all(chains, &[":", SVL, hash, " - [0:0]\n"]);
            let chosen = || {
                reachable
                    .iter()
                    .filter(|(e, _)| e.is_for(TrafficPolicy::Local))
            };
            self.push_choice(nat, port, [SVL, hash], port.local_count(), chosen);
        }
        for (endpoint, name) in &reachable {
            push_all(chains, &[":", SEP, name.as_str(), " - [0:0]\n"]);
            self.push_endpoint(nat, port, endpoint, name.as_str());
        }
    }

    fn push_choice<'e, I>(
        &self,
        nat: &mut String,
        port: &PortView<'_>,
        chain: [&str; 2],
        count: usize,
        chosen: impl Fn() -> I,
    ) where
        I: Iterator<Item = &'e (&'e EndpointText<'e>, Hash<16>)>,
    {
        let begin = |nat: &mut String, endpoint: &EndpointText<'_>| {
            push_all(nat, &["-A ", chain[0], chain[1]]);
            if !self.large {
                let socket = endpoint.socket();
                push_all(
                    nat,
                    &[" -m comment --comment \"", &port.id, " -> ", socket, "\""],
                );
            }
        };
        if let Some(seconds) = port.service.affinity {
            for (endpoint, name) in chosen() {
                begin(nat, endpoint);
                let name = name.as_str();
                let _ = writeln!(
                    nat,
                    " -m recent --name {SEP}{name} --rcheck --seconds {seconds} --reap -j {SEP}{name}"
                );
            }
        }
        for (index, (endpoint, name)) in chosen().enumerate() {
            begin(nat, endpoint);
            let left = count - index;
            if left > 1 {
                nat.push_str(" -m statistic --mode random --probability ");
                push_probability(nat, left);
            }
            push_all(nat, &[" -j ", SEP, name.as_str(), "\n"]);
        }
    }

    fn push_endpoint(
        &self,
        nat: &mut String,
        port: &PortView<'_>,
        endpoint: &EndpointText<'_>,
        name: &str,
    ) {
        let protocol = port.protocol().name();
        let begin = |nat: &mut String| {
            push_all(nat, &["-A ", SEP, name]);
            if !self.large {
                push_all(nat, &[" -m comment --comment ", &port.id]);
            }
        };
        // A pod that reaches itself through its Service must see another source address.
        begin(nat);
        push_all(nat, &[" -s ", endpoint.address(), " -j KUBE-MARK-MASQ\n"]);
        begin(nat);
        if port.service.affinity.is_some() {
            push_all(nat, &[" -m recent --name ", SEP, name, " --set"]);
        }
        push_all(
            nat,
            &[
                " -m ",
                protocol,
                " -p ",
                protocol,
                " -j DNAT --to-destination ",
                endpoint.socket(),
                "\n",
            ],
        );
    }
}

/// ` -m PROTOCOL -p PROTOCOL -d IP --dport PORT`, the port being the Service's.
fn push_destination(text: &mut String, port: &PortView<'_>, ip: &dyn Display) {
    let protocol = port.protocol().name();
    let _ = write!(
        text,
        " -m {protocol} -p {protocol} -d {ip} --dport {}",
        port.port.port
    );
}

/// 1/`left` with ten digits: `computeProbability` of kube-proxy.
fn push_probability(text: &mut String, left: usize) {
    let _ = write!(text, "{:.10}", 1.0 / left as f64);
}

pub(in crate::rules) fn push_all(text: &mut String, parts: &[&str]) {
    for part in parts {
        text.push_str(part);
    }
}

/// Adapts rendered `text` to a kernel that already holds rules, as kube-proxy's sync does:
/// jumps that are there are not prepended again, chains of Services that are gone are deleted.
///
/// `current` is what `iptables-save` prints.
pub fn update(current: &str, text: &str) -> String {
    let mut saved = Saved::default();
    for line in current.lines() {
        saved.read(line);
    }
    if saved.is_empty() {
        return text.to_owned();
    }
    let mut wanted: HashSet<(&str, &str)> = HashSet::new();
    let mut table = "";
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some(chain) = declared_chain(line) {
            wanted.insert((table, chain));
        }
    }
    let mut updated = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let plain = line.trim_end();
        if let Some(name) = plain.strip_prefix('*') {
            table = name;
        } else if let Some(jump) = plain.strip_prefix("-I ") {
            if saved.jumps.contains(&(table, jump)) {
                continue;
            }
        } else if plain == "COMMIT" {
            let stale: Vec<&str> = saved
                .chains
                .iter()
                .filter(|(of, chain)| {
                    *of == table
                        && SERVICE_CHAIN_PREFIXES
                            .iter()
                            .any(|prefix| chain.starts_with(prefix))
                        && !wanted.contains(&(*of, *chain))
                })
                .map(|(_, chain)| *chain)
                .collect();
            // Emptied before the first is deleted: they refer to each other.
            push_chains(&mut updated, &stale);
            for chain in stale {
                push_all(&mut updated, &["-X ", chain, "\n"]);
            }
        }
        updated.push_str(line);
    }
    updated
}

/// The `iptables-restore --noflush` input that takes every rule and chain of kube-proxy away and
/// leaves the others, or `None` if there is none.
///
/// This is `CleanupLeftovers` of kube-proxy, and also takes `KUBE-FIREWALL` away, which
/// kube-proxy leaves to the kubelet. `current` is what `iptables-save` prints.
pub fn removal(current: &str) -> Option<String> {
    let mut saved = Saved::default();
    for line in current.lines() {
        saved.read(line);
    }
    if saved.is_empty() {
        return None;
    }
    let mut text = String::new();
    for table in ["nat", "filter", "mangle"] {
        let chains: Vec<&str> = saved
            .chains
            .iter()
            .filter(|(of, _)| *of == table)
            .map(|(_, chain)| *chain)
            .collect();
        let mut jumps = saved
            .jumps_in_order
            .iter()
            .filter(|(of, _)| *of == table)
            .peekable();
        if chains.is_empty() && jumps.peek().is_none() {
            continue;
        }
        push_all(&mut text, &["*", table, "\n"]);
        push_chains(&mut text, &chains);
        for (_, jump) in jumps {
            push_all(&mut text, &["-D ", jump, "\n"]);
        }
        for chain in chains {
            push_all(&mut text, &["-X ", chain, "\n"]);
        }
        text.push_str("COMMIT\n");
    }
    Some(text)
}

/// The number of kube-proxy's rules in what `iptables-save` prints: those in its chains and the
/// jumps to them.
pub fn count(current: &str) -> u64 {
    let rules = current.lines().filter(|line| {
        line.strip_prefix("-A ")
            .is_some_and(|rule| rule.starts_with("KUBE-") || is_jump(rule))
    });
    rules.count() as u64
}

/// What `iptables-save` printed, as far as it is kube-proxy's.
#[derive(Default)]
struct Saved<'a> {
    table: &'a str,
    /// Table and chain.
    chains: Vec<(&'a str, &'a str)>,
    /// Table and rule of a base chain, without `-A`.
    jumps: HashSet<(&'a str, &'a str)>,
    jumps_in_order: Vec<(&'a str, &'a str)>,
}

impl<'a> Saved<'a> {
    fn read(&mut self, line: &'a str) {
        if let Some(table) = line.strip_prefix('*') {
            self.table = table;
        } else if let Some(chain) = declared_chain(line) {
            self.chains.push((self.table, chain));
        } else if let Some(rule) = line.strip_prefix("-A ")
            && is_jump(rule)
        {
            self.jumps.insert((self.table, rule));
            self.jumps_in_order.push((self.table, rule));
        }
    }

    fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.jumps_in_order.is_empty()
    }
}

/// The chain of kube-proxy's that a `:CHAIN - [0:0]` line declares.
fn declared_chain(line: &str) -> Option<&str> {
    let chain = line.strip_prefix(':')?.split(' ').next()?;
    chain.starts_with("KUBE-").then_some(chain)
}

/// Is it a rule of another's chain that jumps to kube-proxy's?
fn is_jump(rule: &str) -> bool {
    // A quote after the last ` -j ` means that it stands in a comment.
    !rule.starts_with("KUBE-")
        && rule
            .rsplit_once(" -j ")
            .is_some_and(|(_, target)| target.starts_with("KUBE-") && !target.contains('"'))
}
