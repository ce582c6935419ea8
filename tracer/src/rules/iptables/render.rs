//! kube-proxy's iptables mode: the input of one `iptables-restore --noflush` a family.
//!
//! Both back ends (`iptables-legacy`, `iptables-nft`) load the same text. Sources:
//! `pkg/proxy/iptables/proxier.go` (`syncProxyRules`, `iptablesJumpChains`,
//! `writeServiceToEndpointRules`) and `pkg/util/iptables/monitor.go` (canaries) of Kubernetes
//! v1.36; KEP-3178 says why `KUBE-FIREWALL` is among them.

use std::collections::HashSet;
use std::fmt::Write as _;

use crate::cluster::Family;
use crate::rules::NodeView;
use crate::rules::names::{endpoint_hash, service_hash};
use crate::rules::ports::{PortView, Ports};

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

const FILTER_CHAINS: [&str; 6] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-FORWARD",
    "KUBE-NODEPORTS",
    "KUBE-PROXY-FIREWALL",
    "KUBE-FIREWALL",
];

const NAT_CHAINS: [&str; 4] = [
    "KUBE-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-MARK-MASQ",
];

/// Chains of single Services, which kube-proxy deletes once nothing uses them.
const SERVICE_CHAIN_PREFIXES: [&str; 5] = [
    "KUBE-SVC-",
    "KUBE-SVL-",
    "KUBE-SEP-",
    "KUBE-FW-",
    "KUBE-EXT-",
];

/// The `iptables-restore --noflush` input of one family.
pub(in crate::rules) fn render(ports: &Ports<'_>, node: &NodeView, family: Family) -> String {
    let mut nat_chains = String::with_capacity(200 * ports.list.len());
    let mut nat = String::with_capacity(1400 * ports.list.len() + 4096);
    let mut filter = String::with_capacity(4096);

    push_masquerade_rules(&mut nat, node);
    if family == Family::V4 {
        filter.push_str(
            "-A KUBE-FIREWALL -m comment --comment \"block incoming localnet connections\" \
             -d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT \
             -j DROP\n",
        );
    }
    let service_rules = ServiceRules {
        family,
        nfacct: node.nfacct,
        large: ports.large,
        not_from_pods: node
            .cluster_cidr(family)
            .map(|cidr| format!(" ! -s {cidr}")),
    };
    for port in &ports.list {
        if port.endpoints.is_empty() {
            push_rejects(&mut filter, port);
        } else {
            service_rules.push(&mut nat_chains, &mut nat, port);
        }
    }
    nat.push_str(
        "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be \
         the last rule in this chain\" -m addrtype --dst-type LOCAL",
    );
    if family == Family::V6 {
        nat.push_str(" ! -d ::1/128");
    }
    nat.push_str(" -j KUBE-NODEPORTS\n");
    push_forward_rules(&mut filter, node, Invalid::Drop);

    let mut text = String::with_capacity(nat_chains.len() + nat.len() + filter.len() + 8192);
    text.push_str("*mangle\n");
    text.push_str(CANARY);
    text.push_str("COMMIT\n*filter\n");
    push_chains(&mut text, &FILTER_CHAINS);
    text.push_str(CANARY);
    push_jumps(&mut text, &FILTER_JUMPS);
    text.push_str(&filter);
    text.push_str("COMMIT\n*nat\n");
    push_chains(&mut text, &NAT_CHAINS);
    text.push_str(CANARY);
    text.push_str(&nat_chains);
    push_nat_jumps(&mut text);
    text.push_str(&nat);
    text.push_str("COMMIT\n");
    text
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
    if invalid == Invalid::Drop {
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

/// A `ServicePort` without endpoints answers with ICMP.
fn push_rejects(filter: &mut String, port: &PortView<'_>) {
    let protocol = port.protocol().name();
    let _ = writeln!(
        filter,
        "-A KUBE-SERVICES -m comment --comment \"{} has no endpoints\" -m {protocol} -p {protocol} \
         -d {} --dport {} -j REJECT",
        port.id, port.cluster_ip, port.port.port
    );
    if let Some(node_port) = port.port.node_port {
        let _ = writeln!(
            filter,
            "-A KUBE-EXTERNAL-SERVICES -m comment --comment \"{} has no endpoints\" \
             -m addrtype --dst-type LOCAL -m {protocol} -p {protocol} --dport {node_port} -j REJECT",
            port.id
        );
    }
}

/// What the rules of every `ServicePort` with endpoints have in common.
struct ServiceRules {
    family: Family,
    nfacct: bool,
    large: bool,
    /// ` ! -s CIDR`, if the node knows its pods' addresses.
    not_from_pods: Option<String>,
}

impl ServiceRules {
    fn push(&self, chains: &mut String, nat: &mut String, port: &PortView<'_>) {
        let protocol = port.protocol().name();
        let id = port.id.as_str();
        let hash = service_hash(id, port.protocol());
        let hash = hash.as_str();
        let destination = format!(
            "-m {protocol} -p {protocol} -d {} --dport {}",
            port.cluster_ip, port.port.port
        );
        let cluster_ip_match = [
            "-m comment --comment \"",
            id,
            " cluster IP\" ",
            &destination,
        ];

        push_all(chains, &[":KUBE-SVC-", hash, " - [0:0]\n"]);
        nat.push_str("-A KUBE-SERVICES ");
        push_all(nat, &cluster_ip_match);
        push_all(nat, &[" -j KUBE-SVC-", hash, "\n"]);
        if let Some(node_port) = port.port.node_port {
            push_all(chains, &[":KUBE-EXT-", hash, " - [0:0]\n"]);
            self.push_node_port(nat, port, hash, node_port);
        }
        if let Some(not_from_pods) = &self.not_from_pods {
            push_all(nat, &["-A KUBE-SVC-", hash, " "]);
            push_all(nat, &cluster_ip_match);
            push_all(nat, &[not_from_pods, " -j KUBE-MARK-MASQ\n"]);
        }
        if port.port.node_port.is_some() {
            push_all(
                nat,
                &[
                    "-A KUBE-EXT-",
                    hash,
                    " -m comment --comment \"masquerade traffic for ",
                    id,
                    " external destinations\" -j KUBE-MARK-MASQ\n-A KUBE-EXT-",
                    hash,
                    " -j KUBE-SVC-",
                    hash,
                    "\n",
                ],
            );
        }
        self.push_endpoints(chains, nat, port, hash);
    }

    fn push_node_port(&self, nat: &mut String, port: &PortView<'_>, hash: &str, node_port: u16) {
        let protocol = port.protocol().name();
        let id = &port.id;
        if self.family == Family::V4 && self.nfacct {
            let _ = writeln!(
                nat,
                "-A KUBE-NODEPORTS -m comment --comment {id} -m {protocol} -p {protocol} \
                 -d 127.0.0.0/8 --dport {node_port} \
                 -m nfacct --nfacct-name {LOCALHOST_NODE_PORTS} -j KUBE-EXT-{hash}"
            );
        }
        let _ = writeln!(
            nat,
            "-A KUBE-NODEPORTS -m comment --comment {id} -m {protocol} -p {protocol} \
             --dport {node_port} -j KUBE-EXT-{hash}"
        );
    }

    /// The choice of an endpoint, and the endpoints' own chains.
    fn push_endpoints(
        &self,
        chains: &mut String,
        nat: &mut String,
        port: &PortView<'_>,
        hash: &str,
    ) {
        let protocol = port.protocol().name();
        let id = port.id.as_str();
        // Each name is hashed once: the rules of the endpoints' own chains are written beside
        // and appended after the choice, which is kube-proxy's order.
        let mut own = String::with_capacity(300 * port.endpoints.len());
        for (index, endpoint) in port.endpoints.iter().enumerate() {
            let chain = endpoint_hash(id, port.protocol(), endpoint.socket());
            let chain = chain.as_str();
            push_all(chains, &[":KUBE-SEP-", chain, " - [0:0]\n"]);
            push_all(nat, &["-A KUBE-SVC-", hash]);
            if !self.large {
                push_all(
                    nat,
                    &[
                        " -m comment --comment \"",
                        id,
                        " -> ",
                        endpoint.socket(),
                        "\"",
                    ],
                );
            }
            let left = port.endpoints.len() - index;
            if left > 1 {
                nat.push_str(" -m statistic --mode random --probability ");
                push_probability(nat, left);
            }
            push_all(nat, &[" -j KUBE-SEP-", chain, "\n"]);

            // A pod that reaches itself through its Service must see another source address.
            push_all(&mut own, &["-A KUBE-SEP-", chain]);
            self.push_endpoint_comment(&mut own, id);
            push_all(
                &mut own,
                &[
                    " -s ",
                    endpoint.address(),
                    " -j KUBE-MARK-MASQ\n-A KUBE-SEP-",
                    chain,
                ],
            );
            self.push_endpoint_comment(&mut own, id);
            push_all(
                &mut own,
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
        nat.push_str(&own);
    }

    fn push_endpoint_comment(&self, rules: &mut String, id: &str) {
        if !self.large {
            push_all(rules, &[" -m comment --comment ", id]);
        }
    }
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
    let mut tables = Tables::default();
    for line in current.lines() {
        tables.read(line);
    }
    if tables.is_empty() {
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
            if tables.jumps.contains(&(table, jump)) {
                continue;
            }
        } else if plain == "COMMIT" {
            let stale: Vec<&str> = tables
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
    let mut tables = Tables::default();
    for line in current.lines() {
        tables.read(line);
    }
    if tables.is_empty() {
        return None;
    }
    let mut text = String::new();
    for table in ["nat", "filter", "mangle"] {
        let chains: Vec<&str> = tables
            .chains
            .iter()
            .filter(|(of, _)| *of == table)
            .map(|(_, chain)| *chain)
            .collect();
        let mut jumps = tables
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
struct Tables<'a> {
    table: &'a str,
    /// Table and chain.
    chains: Vec<(&'a str, &'a str)>,
    /// Table and rule of a base chain, without `-A`.
    jumps: HashSet<(&'a str, &'a str)>,
    jumps_in_order: Vec<(&'a str, &'a str)>,
}

impl<'a> Tables<'a> {
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
