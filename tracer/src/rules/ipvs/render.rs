//! kube-proxy's IPVS mode: virtual servers, addresses to bind, ipsets, and a constant number of
//! iptables rules.
//!
//! Sources: `pkg/proxy/ipvs/proxier.go` (`syncProxyRules`, `writeIptablesRules`,
//! `createAndLinkKubeChain`) and `pkg/proxy/ipvs/ipset.go` of Kubernetes v1.36.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use crate::cluster::{Family, Protocol};
use crate::rules::NodeView;
use crate::rules::iptables::{
    Invalid, push_all, push_chains, push_forward_rules, push_jumps, push_masquerade_rules,
    push_nat_jumps,
};
use crate::rules::ports::{PortView, Ports};

/// The dummy link that every ClusterIP is bound to, so that the node takes packets to it.
pub const LINK: &str = "kube-ipvs0";

/// ipset's longest name: `IPSET_MAXNAMELEN` of the kernel, less the zero.
const SET_NAME_MAX: usize = 31;

const FILTER_JUMPS: [(&str, &str, &str, &str); 6] = [
    ("FORWARD", "", "kubernetes forwarding rules", "KUBE-FORWARD"),
    (
        "INPUT",
        "",
        "kubernetes health check rules",
        "KUBE-NODE-PORT",
    ),
    (
        "INPUT",
        "",
        "kube-proxy firewall rules",
        "KUBE-PROXY-FIREWALL",
    ),
    (
        "FORWARD",
        "",
        "kube-proxy firewall rules",
        "KUBE-PROXY-FIREWALL",
    ),
    (
        "INPUT",
        "",
        "kubernetes ipvs access filter",
        "KUBE-IPVS-FILTER",
    ),
    (
        "OUTPUT",
        "",
        "kubernetes ipvs access filter",
        "KUBE-IPVS-OUT-FILTER",
    ),
];

const FILTER_CHAINS: [&str; 6] = [
    "KUBE-FORWARD",
    "KUBE-NODE-PORT",
    "KUBE-PROXY-FIREWALL",
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
];

const NAT_CHAINS: [&str; 5] = [
    "KUBE-SERVICES",
    "KUBE-POSTROUTING",
    "KUBE-NODE-PORT",
    "KUBE-LOAD-BALANCER",
    "KUBE-MARK-MASQ",
];

/// An ipset's type.
#[derive(Clone, Copy)]
enum SetType {
    HashIpPortIp,
    HashIpPort,
    HashIpPortNet,
    BitmapPort,
    HashIp,
}

/// kube-proxy makes all of them, whether anything goes in or not: name without `KUBE-`, and type.
const SETS: [(&str, SetType); 17] = [
    ("LOOP-BACK", SetType::HashIpPortIp),
    ("CLUSTER-IP", SetType::HashIpPort),
    ("EXTERNAL-IP", SetType::HashIpPort),
    ("EXTERNAL-IP-LOCAL", SetType::HashIpPort),
    ("LOAD-BALANCER", SetType::HashIpPort),
    ("LOAD-BALANCER-LOCAL", SetType::HashIpPort),
    ("LOAD-BALANCER-FW", SetType::HashIpPort),
    ("LOAD-BALANCER-SOURCE-IP", SetType::HashIpPortIp),
    ("LOAD-BALANCER-SOURCE-CIDR", SetType::HashIpPortNet),
    ("NODE-PORT-TCP", SetType::BitmapPort),
    ("NODE-PORT-LOCAL-TCP", SetType::BitmapPort),
    ("NODE-PORT-UDP", SetType::BitmapPort),
    ("NODE-PORT-LOCAL-UDP", SetType::BitmapPort),
    ("NODE-PORT-SCTP-HASH", SetType::HashIpPort),
    ("NODE-PORT-LOCAL-SCTP-HASH", SetType::HashIpPort),
    ("HEALTH-CHECK-NODE-PORT", SetType::BitmapPort),
    ("IPVS-IPS", SetType::HashIp),
];

/// The full name of an ipset: `KUBE-NAME`, `KUBE-6-NAME` in IPv6, cut to what the kernel takes.
fn set_name(family: Family, name: &str) -> String {
    let mut full = String::with_capacity(SET_NAME_MAX + 1);
    full.push_str(match family {
        Family::V4 => "KUBE-",
        Family::V6 => "KUBE-6-",
    });
    full.push_str(name);
    full.truncate(SET_NAME_MAX);
    full
}

/// The addresses to bind to [`LINK`]: every ClusterIP of the family, once.
pub(in crate::rules) fn virtual_addresses(ports: &Ports<'_>, family: Family) -> Vec<IpAddr> {
    let mut seen = HashSet::new();
    ports
        .list
        .iter()
        .filter_map(|port| {
            port.service
                .cluster_ips
                .iter()
                .find(|ip| family.holds(**ip))
        })
        .copied()
        .filter(|ip| seen.insert(*ip))
        .collect()
}

/// The input of `ipset restore`: every set of the family and its entries.
pub(in crate::rules) fn render_sets(ports: &Ports<'_>, node: &NodeView, family: Family) -> String {
    let mut text = String::with_capacity(4096 + 300 * ports.list.len());
    for (name, set_type) in SETS {
        push_all(&mut text, &["create ", &set_name(family, name)]);
        let hash = match set_type {
            SetType::BitmapPort => {
                text.push_str(" bitmap:port range 0-65535\n");
                continue;
            }
            SetType::HashIpPortIp => "hash:ip,port,ip",
            SetType::HashIpPort => "hash:ip,port",
            SetType::HashIpPortNet => "hash:ip,port,net",
            SetType::HashIp => "hash:ip",
        };
        let family = match family {
            Family::V4 => "inet",
            Family::V6 => "inet6",
        };
        push_all(
            &mut text,
            &[
                " ",
                hash,
                " family ",
                family,
                " hashsize 1024 maxelem 65536\n",
            ],
        );
    }

    let cluster_ip = set_name(family, "CLUSTER-IP");
    let loop_back = set_name(family, "LOOP-BACK");
    let ipvs_ips = set_name(family, "IPVS-IPS");
    // Several ServicePorts can have one endpoint or one address.
    let mut loops: HashSet<(Protocol, &str)> = HashSet::new();
    let mut addresses: HashSet<&str> = HashSet::new();
    for port in &ports.list {
        let protocol = port.protocol();
        // Writing into a String cannot fail, here and below.
        let _ = writeln!(
            text,
            "add {cluster_ip} {},{protocol}:{}",
            port.cluster_ip, port.port.port
        );
        if addresses.insert(&port.cluster_ip) {
            push_all(&mut text, &["add ", &ipvs_ips, " ", &port.cluster_ip, "\n"]);
        }
        for endpoint in port.endpoints.iter().filter(|endpoint| endpoint.local) {
            if loops.insert((protocol, endpoint.socket())) {
                let address = endpoint.address();
                push_all(
                    &mut text,
                    &[
                        "add ",
                        &loop_back,
                        " ",
                        address,
                        ",",
                        protocol.name(),
                        ":",
                        endpoint.port(),
                        ",",
                        address,
                        "\n",
                    ],
                );
            }
        }
        if let Some(node_port) = port.port.node_port {
            match protocol {
                Protocol::Tcp | Protocol::Udp => {
                    let set = set_name(family, node_port_set(protocol));
                    let _ = writeln!(text, "add {set} {node_port}");
                }
                // A bitmap of ports cannot tell SCTP from UDP in old kernels, so it has addresses.
                Protocol::Sctp => {
                    let set = set_name(family, node_port_set(protocol));
                    for address in node.addresses_of(family) {
                        let _ = writeln!(text, "add {set} {address},sctp:{node_port}");
                    }
                }
            }
        }
    }
    text
}

const fn node_port_set(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "NODE-PORT-TCP",
        Protocol::Udp => "NODE-PORT-UDP",
        Protocol::Sctp => "NODE-PORT-SCTP-HASH",
    }
}

/// The input of `ipvsadm -R`: a virtual server for each ClusterIP and port, and for each address
/// of the node and NodePort.
pub(in crate::rules) fn render_servers(
    ports: &Ports<'_>,
    node: &NodeView,
    family: Family,
) -> String {
    let mut text = String::with_capacity(240 * ports.list.len());
    let mut server = String::new();
    let node_addresses: Vec<IpAddr> = node.addresses_of(family).collect();
    for port in &ports.list {
        server_key(
            &mut server,
            port.protocol(),
            &port.cluster_ip,
            port.port.port,
        );
        push_server(&mut text, &server, port);
        for address in port.port.node_port.iter().flat_map(|_| &node_addresses) {
            let node_port = port.port.node_port.unwrap_or_default();
            server_key(&mut server, port.protocol(), address, node_port);
            push_server(&mut text, &server, port);
        }
    }
    text
}

/// `-t ADDRESS:PORT`, `-u`, `--sctp-service`.
fn server_key(key: &mut String, protocol: Protocol, address: impl std::fmt::Display, port: u16) {
    key.clear();
    key.push_str(match protocol {
        Protocol::Tcp => "-t ",
        Protocol::Udp => "-u ",
        Protocol::Sctp => "--sctp-service ",
    });
    let from = key.len();
    let _ = write!(key, "{address}");
    if key[from..].contains(':') {
        key.insert(from, '[');
        key.push(']');
    }
    let _ = write!(key, ":{port}");
}

fn push_server(text: &mut String, server: &str, port: &PortView<'_>) {
    push_all(text, &["-A ", server, " -s rr\n"]);
    for endpoint in &port.endpoints {
        push_all(
            text,
            &["-a ", server, " -r ", endpoint.socket(), " -m -w 1\n"],
        );
    }
}

/// The `iptables-restore --noflush` input of one family: the same few rules for any number of
/// Services.
pub(in crate::rules) fn render_iptables(
    ports: &Ports<'_>,
    node: &NodeView,
    family: Family,
) -> String {
    let has_node_port = |protocol: Protocol| {
        ports
            .list
            .iter()
            .any(|port| port.protocol() == protocol && port.port.node_port.is_some())
    };
    let has_local_endpoint = ports
        .list
        .iter()
        .any(|port| port.endpoints.iter().any(|endpoint| endpoint.local));
    let cluster_ip = set_name(family, "CLUSTER-IP");
    let mut text = String::with_capacity(8192);

    text.push_str("*filter\n");
    push_chains(&mut text, &FILTER_CHAINS);
    push_jumps(&mut text, &FILTER_JUMPS);
    text.push_str("-A KUBE-SOURCE-RANGES-FIREWALL -j DROP\n");
    push_forward_rules(&mut text, node, Invalid::Pass);
    let health = set_name(family, "HEALTH-CHECK-NODE-PORT");
    let _ = writeln!(
        text,
        "-A KUBE-NODE-PORT -m comment --comment \"Kubernetes health check node port\" \
         -m set --match-set {health} dst -j ACCEPT"
    );
    // A node's own services must not be reachable on a Service's address.
    for (set, direction) in [
        ("LOAD-BALANCER", "dst,dst"),
        ("CLUSTER-IP", "dst,dst"),
        ("EXTERNAL-IP", "dst,dst"),
        ("EXTERNAL-IP-LOCAL", "dst,dst"),
        ("HEALTH-CHECK-NODE-PORT", "dst"),
    ] {
        let set = set_name(family, set);
        let _ = writeln!(
            text,
            "-A KUBE-IPVS-FILTER -m set --match-set {set} {direction} -j RETURN"
        );
    }
    let _ = writeln!(
        text,
        "-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW -m set --match-set {} dst -j REJECT",
        set_name(family, "IPVS-IPS")
    );
    text.push_str("COMMIT\n*nat\n");

    push_chains(&mut text, &NAT_CHAINS);
    push_nat_jumps(&mut text);
    let loopback = match family {
        Family::V4 => "127.0.0.0/8",
        Family::V6 => "::1/128",
    };
    let _ = writeln!(text, "-A KUBE-SERVICES -s {loopback} -j RETURN");
    if has_local_endpoint {
        let _ = writeln!(
            text,
            "-A KUBE-POSTROUTING -m comment --comment \"Kubernetes endpoints dst ip:port, source \
             ip for solving hairpin purpose\" -m set --match-set {} dst,dst,src -j MASQUERADE",
            set_name(family, "LOOP-BACK")
        );
    }
    for (protocol, port_name, suffix, direction) in [
        (Protocol::Tcp, "TCP", "", "dst"),
        (Protocol::Udp, "UDP", "", "dst"),
        (
            Protocol::Sctp,
            "SCTP",
            " with type 'hash ip:port'",
            "dst,dst",
        ),
    ] {
        if has_node_port(protocol) {
            let _ = writeln!(
                text,
                "-A KUBE-NODE-PORT -p {protocol} -m comment --comment \"Kubernetes nodeport \
                 {port_name} port for masquerade purpose{suffix}\" -m set --match-set {} \
                 {direction} -j KUBE-MARK-MASQ",
                set_name(family, node_port_set(protocol))
            );
        }
    }
    if !ports.list.is_empty() {
        // Without the pods' addresses only a Service's own address as source tells a hairpin.
        let (direction, not_from_pods) = match node.cluster_cidr(family) {
            Some(cidr) => ("dst,dst", format!(" ! -s {cidr}")),
            None => ("src,dst", String::new()),
        };
        let _ = writeln!(
            text,
            "-A KUBE-SERVICES -m comment --comment \"Kubernetes service cluster ip + port for \
             masquerade purpose\" -m set --match-set {cluster_ip} {direction}{not_from_pods} \
             -j KUBE-MARK-MASQ"
        );
    }
    text.push_str("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT\n");
    text.push_str("-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ\n");
    if !ports.list.is_empty() {
        let _ = writeln!(
            text,
            "-A KUBE-SERVICES -m set --match-set {cluster_ip} dst,dst -j ACCEPT"
        );
    }
    push_masquerade_rules(&mut text, node);
    text.push_str("COMMIT\n");
    text
}

/// The `ipvsadm -R` input that makes `wanted` of `current` (what `ipvsadm -Sn` prints): first
/// what is missing, then what is stale, as kube-proxy's sync does it. Servers that stay are not
/// touched, so that their connections live on.
pub fn update_servers(current: &str, wanted: &str) -> String {
    let current = Servers::parse(current);
    let wanted = Servers::parse(wanted);
    let mut text = String::new();
    for server in &wanted.order {
        let reals = &wanted.reals[server];
        let existing = current.reals.get(server);
        if existing.is_none() {
            push_all(&mut text, &["-A ", server, " -s rr\n"]);
        }
        for real in reals {
            if !existing.is_some_and(|existing| existing.contains(real)) {
                push_all(&mut text, &["-a ", server, " -r ", real, " -m -w 1\n"]);
            }
        }
        for real in existing.into_iter().flatten() {
            if !reals.contains(real) {
                push_all(&mut text, &["-d ", server, " -r ", real, "\n"]);
            }
        }
    }
    for server in &current.order {
        if !wanted.reals.contains_key(server) {
            push_all(&mut text, &["-D ", server, "\n"]);
        }
    }
    text
}

/// The numbers of virtual and of real servers in `/proc/net/ip_vs` (`ip_vs_info_seq_show`).
pub fn count_servers(listed: &str) -> (u64, u64) {
    let (mut servers, mut reals) = (0, 0);
    for line in listed.lines() {
        match line.split_whitespace().next() {
            Some("TCP" | "UDP" | "SCTP" | "FWM") => servers += 1,
            Some("->") if !line.contains("RemoteAddress") => reals += 1,
            // The heading.
            _ => {}
        }
    }
    (servers, reals)
}

/// What `ipvsadm -Sn` prints.
struct Servers<'a> {
    /// `-t ADDRESS:PORT`, as they came.
    order: Vec<&'a str>,
    /// Real servers by virtual server.
    reals: BTreeMap<&'a str, BTreeSet<&'a str>>,
}

impl<'a> Servers<'a> {
    fn parse(text: &'a str) -> Self {
        let mut servers = Self {
            order: Vec::new(),
            reals: BTreeMap::new(),
        };
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("-A ") {
                let server = rest.split_once(" -s ").map_or(rest, |(server, _)| server);
                if servers.reals.insert(server, BTreeSet::new()).is_none() {
                    servers.order.push(server);
                }
            } else if let Some((server, real)) = line
                .strip_prefix("-a ")
                .and_then(|rest| rest.split_once(" -r "))
            {
                let real = real.split(' ').next().unwrap_or_default();
                servers.reals.entry(server).or_default().insert(real);
            }
        }
        servers
    }
}

/// The `ipset restore` input that makes `wanted` of `current` (what `ipset save` prints).
pub fn update_sets(current: &str, wanted: &str) -> String {
    let created = |text| -> HashSet<&str> {
        lines_after(text, "create ")
            .filter_map(|line| line.split(' ').next())
            .collect()
    };
    let existing = created(current);
    let wanted_sets = created(wanted);
    let current_entries: HashSet<&str> = lines_after(current, "add ").collect();
    let mut text = String::with_capacity(wanted.len());
    let mut wanted_entries = HashSet::new();
    for line in wanted.lines() {
        let keep = if let Some(rest) = line.strip_prefix("create ") {
            rest.split(' ')
                .next()
                .is_none_or(|name| !existing.contains(name))
        } else if let Some(entry) = line.strip_prefix("add ") {
            wanted_entries.insert(entry);
            !current_entries.contains(entry)
        } else {
            true
        };
        if keep {
            push_all(&mut text, &[line, "\n"]);
        }
    }
    for entry in lines_after(current, "add ") {
        let ours = entry
            .split(' ')
            .next()
            .is_some_and(|set| wanted_sets.contains(set));
        if ours && !wanted_entries.contains(entry) {
            push_all(&mut text, &["del ", entry, "\n"]);
        }
    }
    text
}

fn lines_after<'a>(text: &'a str, prefix: &'static str) -> impl Iterator<Item = &'a str> {
    text.lines()
        .filter_map(move |line| line.strip_prefix(prefix))
}

/// The number of entries of kube-proxy's ipsets in what `ipset save` prints.
pub fn count_entries(current: &str) -> u64 {
    let entries = current.lines().filter(|line| line.starts_with("add KUBE-"));
    entries.count() as u64
}

/// The names of kube-proxy's ipsets in what `ipset save` or `ipset list -n` prints.
pub fn set_names(current: &str) -> impl Iterator<Item = &str> {
    current
        .lines()
        .filter(|name| name.starts_with("KUBE-") && !name.contains(' '))
}
