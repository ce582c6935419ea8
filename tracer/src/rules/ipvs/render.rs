//! kube-proxy's IPVS mode: virtual servers, addresses to bind, ipsets, and a constant number of
//! iptables rules.
//!
//! Sources: `pkg/proxy/ipvs/proxier.go` (`syncProxyRules`, `writeIptablesRules`,
//! `createAndLinkKubeChain`) and `pkg/proxy/ipvs/ipset.go` of Kubernetes v1.36.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use super::sets::{Role, SetKind};
use crate::cluster::{Family, Protocol};
use crate::rules::iptables::{
    Invalid, push_all, push_chains, push_forward_rules, push_jumps, push_masquerade_rules,
    push_nat_jumps,
};
use crate::rules::ports::{EndpointText, PortView, Ports};
use crate::rules::{NodePortAddresses, NodeView};

/// The dummy link that every ClusterIP is bound to, so that the node takes packets to it.
pub const LINK: &str = "kube-ipvs0";

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

impl Role {
    /// The set of NodePorts of a protocol, and that of those with a Local policy.
    const fn of_node_ports(protocol: Protocol) -> (Self, Self) {
        match protocol {
            Protocol::Tcp => (Self::NodePortTcp, Self::NodePortLocalTcp),
            Protocol::Udp => (Self::NodePortUdp, Self::NodePortLocalUdp),
            Protocol::Sctp => (Self::NodePortSctp, Self::NodePortLocalSctp),
        }
    }

    /// The comment of the rules that look into the set.
    const fn comment(self) -> &'static str {
        match self {
            Self::LoopBack => {
                "Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose"
            }
            Self::ClusterIp => "Kubernetes service cluster ip + port for masquerade purpose",
            Self::ExternalIp => {
                "Kubernetes service external ip + port for masquerade and filter purpose"
            }
            Self::ExternalIpLocal => {
                "Kubernetes service external ip + port with externalTrafficPolicy=local"
            }
            Self::LoadBalancer => "Kubernetes service lb portal",
            Self::LoadBalancerLocal => {
                "Kubernetes service load balancer ip + port with externalTrafficPolicy=local"
            }
            Self::LoadBalancerFirewall => {
                "Kubernetes service load balancer ip + port for load balancer with sourceRange"
            }
            Self::LoadBalancerSourceIp => {
                "Kubernetes service load balancer ip + port + source IP for packet filter purpose"
            }
            Self::LoadBalancerSourceCidr => {
                "Kubernetes service load balancer ip + port + source cidr for packet filter purpose"
            }
            Self::NodePortTcp => "Kubernetes nodeport TCP port for masquerade purpose",
            Self::NodePortLocalTcp => {
                "Kubernetes nodeport TCP port with externalTrafficPolicy=local"
            }
            Self::NodePortUdp => "Kubernetes nodeport UDP port for masquerade purpose",
            Self::NodePortLocalUdp => {
                "Kubernetes nodeport UDP port with externalTrafficPolicy=local"
            }
            Self::NodePortSctp => {
                "Kubernetes nodeport SCTP port for masquerade purpose with type 'hash ip:port'"
            }
            Self::NodePortLocalSctp => {
                "Kubernetes nodeport SCTP port with externalTrafficPolicy=local with type 'hash \
                 ip:port'"
            }
            Self::HealthCheckNodePort => "Kubernetes health check node port",
            Self::IpvsIps => "Addresses on the ipvs interface",
        }
    }
}

/// A virtual server and the endpoints behind it.
struct Server<'p> {
    /// `-t ADDRESS:PORT`.
    key: String,
    affinity: Option<u32>,
    reals: Vec<&'p EndpointText<'p>>,
}

/// What one family needs in IPVS mode.
pub(in crate::rules) struct Plan<'p> {
    family: Family,
    node: &'p NodeView,
    servers: Vec<Server<'p>>,
    server_index: HashMap<String, usize>,
    /// By [`Role::ALL`].
    entries: Vec<Vec<String>>,
    seen: HashSet<(usize, String)>,
    /// To be bound to [`LINK`].
    addresses: Vec<IpAddr>,
    /// Load balancers' VIPs that the node itself must not use.
    closed_to_node: Vec<(IpAddr, Protocol, u16)>,
}

impl<'p> Plan<'p> {
    pub(in crate::rules) fn new(ports: &'p Ports<'p>, node: &'p NodeView, family: Family) -> Self {
        let mut plan = Self {
            family,
            node,
            servers: Vec::with_capacity(ports.list.len()),
            server_index: HashMap::with_capacity(ports.list.len()),
            entries: vec![Vec::new(); Role::ALL.len()],
            seen: HashSet::with_capacity(2 * ports.list.len()),
            addresses: Vec::new(),
            closed_to_node: Vec::new(),
        };
        let own = plan.node_port_ips();
        for port in &ports.list {
            plan.push_port(port, &own);
        }
        let bound = plan.addresses.iter().map(ToString::to_string).collect();
        plan.entries[Role::IpvsIps as usize] = bound;
        plan
    }

    /// The addresses to bind to [`LINK`], each once.
    pub(in crate::rules) fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// The addresses that serve NodePorts. Link-local ones only serve if they are asked for
    /// (`isValidForSet` of `netlink_linux.go`).
    fn node_port_ips(&self) -> Vec<IpAddr> {
        let ips = match self
            .node
            .node_port_ips(self.family, &NodePortAddresses::Default)
        {
            Some(ips) => ips,
            None => self.own_addresses().collect(),
        };
        ips.into_iter().filter(|ip| !ip.is_loopback()).collect()
    }

    /// The addresses on the node's other links.
    fn own_addresses(&self) -> impl Iterator<Item = IpAddr> {
        let is_link_local = |ip: &IpAddr| match ip {
            IpAddr::V4(_) => false,
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        self.node
            .addresses_of(self.family)
            .filter(move |ip| !ip.is_loopback() && !is_link_local(ip))
    }

    fn push_port(&mut self, port: &'p PortView<'p>, own: &[IpAddr]) {
        let protocol = port.protocol();
        let number = port.port.port;
        for endpoint in port.endpoints.iter().filter(|endpoint| endpoint.local) {
            let address = endpoint.address();
            let entry = format!("{address},{protocol}:{},{address}", endpoint.port());
            self.add(Role::LoopBack, entry);
        }

        self.add(
            Role::ClusterIp,
            format!("{},{protocol}:{number}", port.cluster_ip),
        );
        if let Some(ip) = port
            .service
            .cluster_ips
            .iter()
            .find(|ip| self.family.holds(**ip))
        {
            self.bind(*ip);
            self.serve(port, *ip, number, port.is_internal_local());
        }

        for ip in &port.external_ips {
            let set = if port.is_external_local() {
                Role::ExternalIpLocal
            } else {
                Role::ExternalIp
            };
            self.add(set, format!("{ip},{protocol}:{number}"));
            self.serve_external(port, *ip);
        }
        for ip in &port.load_balancer_ips {
            self.push_load_balancer(port, *ip);
            self.serve_external(port, *ip);
        }

        if let Some(node_port) = port.port.node_port {
            if own.is_empty() {
                // kube-proxy goes on with the next ServicePort, so that the health check's port
                // is left out too.
                return;
            }
            self.push_node_port(port, node_port, own);
        }
        if let Some(check) = port.service.health_check_node_port {
            self.add(Role::HealthCheckNodePort, check.to_string());
        }
    }

    fn push_load_balancer(&mut self, port: &PortView<'_>, ip: IpAddr) {
        let (protocol, number) = (port.protocol(), port.port.port);
        let entry = format!("{ip},{protocol}:{number}");
        self.add(Role::LoadBalancer, entry.clone());
        if port.is_external_local() {
            self.add(Role::LoadBalancerLocal, entry.clone());
        }
        if !port.is_firewalled() {
            return;
        }
        for range in &port.source_ranges {
            self.add(Role::LoadBalancerSourceCidr, format!("{entry},{range}"));
        }
        if port.is_source(self.node.node_ip(self.family)) {
            self.add(Role::LoadBalancerSourceIp, format!("{entry},{ip}"));
        } else {
            self.closed_to_node.push((ip, protocol, number));
        }
        self.add(Role::LoadBalancerFirewall, entry);
    }

    fn push_node_port(&mut self, port: &'p PortView<'p>, node_port: u16, own: &[IpAddr]) {
        let (set, local_set) = Role::of_node_ports(port.protocol());
        let entries: Vec<String> = match port.protocol() {
            Protocol::Tcp | Protocol::Udp => vec![node_port.to_string()],
            // ipset's bitmap of ports does not know SCTP.
            Protocol::Sctp => own
                .iter()
                .map(|ip| format!("{ip},sctp:{node_port}"))
                .collect(),
        };
        for entry in entries {
            if port.is_external_local() {
                self.add(local_set, entry.clone());
            }
            self.add(set, entry);
        }
        for ip in own {
            self.serve(port, *ip, node_port, port.is_external_local());
        }
    }

    fn add(&mut self, set: Role, entry: String) {
        if self.seen.insert((set as usize, entry.clone())) {
            self.entries[set as usize].push(entry);
        }
    }

    fn is_empty(&self, set: Role) -> bool {
        self.entries[set as usize].is_empty()
    }

    fn bind(&mut self, ip: IpAddr) {
        // The virtual addresses are among the seen entries of the set of them.
        if self.seen.insert((Role::IpvsIps as usize, ip.to_string())) {
            self.addresses.push(ip);
        }
    }

    /// An external address is bound only if none of the node's other links has it.
    fn serve_external(&mut self, port: &'p PortView<'p>, ip: IpAddr) {
        if self.own_addresses().all(|own| own != ip) {
            self.bind(ip);
        }
        self.serve(port, ip, port.port.port, port.is_external_local());
    }

    /// A virtual server. Without a local endpoint the Local policy falls back to all of them
    /// (kubernetes pull request 97081). If two `ServicePort`s want the same one, it is the later's:
    /// kube-proxy finds it there and replaces its real servers.
    fn serve(&mut self, port: &'p PortView<'p>, ip: IpAddr, number: u16, local_only: bool) {
        let reals = if local_only && port.local_count() > 0 {
            port.local_endpoints().collect()
        } else {
            port.cluster_endpoints().collect()
        };
        let server = Server {
            key: server_key(port.protocol(), ip, number),
            affinity: port.service.affinity,
            reals,
        };
        if let Some(index) = self.server_index.get(&server.key) {
            self.servers[*index] = server;
        } else {
            let index = self.servers.len();
            self.server_index.insert(server.key.clone(), index);
            self.servers.push(server);
        }
    }

    /// The input of `ipvsadm -R`.
    pub(in crate::rules) fn servers_text(&self) -> String {
        let mut text = String::with_capacity(240 * self.servers.len());
        for server in &self.servers {
            let scheduler = &self.node.scheduler;
            push_all(&mut text, &["-A ", &server.key, " -s ", scheduler]);
            if let Some(seconds) = server.affinity {
                // Writing into a String cannot fail, here and below.
                let _ = write!(text, " -p {seconds}");
            }
            // kube-proxy has this scheduler look at source ports (`FlagSourceHash`).
            if scheduler == "mh" {
                text.push_str(" -b mh-port");
            }
            text.push('\n');
            for real in &server.reals {
                push_all(
                    &mut text,
                    &["-a ", &server.key, " -r ", real.socket(), " -m -w 1\n"],
                );
            }
        }
        text
    }

    /// The input of `ipset restore`: every set of the family and its entries.
    pub(in crate::rules) fn sets_text(&self) -> String {
        let mut text = String::with_capacity(4096 + 32 * self.seen.len());
        for set in Role::ALL {
            let kind = set.kind();
            push_all(
                &mut text,
                &["create ", &set.set_name(self.family), " ", kind.name()],
            );
            if kind == SetKind::Port {
                text.push_str(" range 0-65535\n");
                continue;
            }
            let family = match self.family {
                Family::V4 => "inet",
                Family::V6 => "inet6",
            };
            let parameters = " hashsize 1024 maxelem 65536\n";
            push_all(&mut text, &[" family ", family, parameters]);
        }
        for set in Role::ALL {
            let name = set.set_name(self.family);
            for entry in &self.entries[set as usize] {
                push_all(&mut text, &["add ", &name, " ", entry, "\n"]);
            }
        }
        text
    }

    /// The `iptables-restore --noflush` input: the same few rules for any number of Services.
    /// Base chains' jumps come with a first sync only.
    pub(in crate::rules) fn iptables_text(&self, with_jumps: bool) -> String {
        let mut text = String::with_capacity(8192);
        text.push_str("*filter\n");
        push_chains(&mut text, &FILTER_CHAINS);
        if with_jumps {
            push_jumps(&mut text, &FILTER_JUMPS);
        }
        self.push_filter_rules(&mut text);
        text.push_str("COMMIT\n*nat\n");
        push_chains(&mut text, &NAT_CHAINS);
        if with_jumps {
            push_nat_jumps(&mut text);
        }
        self.push_nat_rules(&mut text);
        push_masquerade_rules(&mut text, self.node);
        text.push_str("COMMIT\n");
        text
    }

    /// A rule that looks into a set, with its comment, if anything is in it.
    fn push_set_rule(
        &self,
        text: &mut String,
        chain: &str,
        set: Role,
        direction: &str,
        rest: &str,
    ) {
        if !self.is_empty(set) {
            let name = set.set_name(self.family);
            let comment = set.comment();
            push_all(text, &["-A ", chain, " -m comment --comment \"", comment]);
            push_all(text, &["\" -m set --match-set ", &name, " ", direction]);
            push_all(text, &[rest, "\n"]);
        }
    }

    fn push_filter_rules(&self, text: &mut String) {
        let ranges = "KUBE-SOURCE-RANGES-FIREWALL";
        self.push_set_rule(
            text,
            "KUBE-PROXY-FIREWALL",
            Role::LoadBalancerFirewall,
            "dst,dst",
            " -j KUBE-SOURCE-RANGES-FIREWALL",
        );
        for set in [Role::LoadBalancerSourceCidr, Role::LoadBalancerSourceIp] {
            self.push_set_rule(text, ranges, set, "dst,dst,src", " -j RETURN");
        }
        push_all(text, &["-A ", ranges, " -j DROP\n"]);
        for (ip, protocol, port) in &self.closed_to_node {
            let _ = writeln!(
                text,
                "-A KUBE-IPVS-OUT-FILTER -s {ip} -m ipvs --vaddr {ip} --vproto {protocol} \
                 --vport {port} -j DROP"
            );
        }
        push_forward_rules(text, self.node, Invalid::Pass);
        let name = |set: Role| set.set_name(self.family);
        let _ = writeln!(
            text,
            "-A KUBE-NODE-PORT -m comment --comment \"{}\" -m set --match-set {} dst -j ACCEPT",
            Role::HealthCheckNodePort.comment(),
            name(Role::HealthCheckNodePort)
        );
        // A node's own services must not be reachable on a Service's address.
        for (set, direction) in [
            (Role::LoadBalancer, "dst,dst"),
            (Role::ClusterIp, "dst,dst"),
            (Role::ExternalIp, "dst,dst"),
            (Role::ExternalIpLocal, "dst,dst"),
            (Role::HealthCheckNodePort, "dst"),
        ] {
            let _ = writeln!(
                text,
                "-A KUBE-IPVS-FILTER -m set --match-set {} {direction} -j RETURN",
                name(set)
            );
        }
        let _ = writeln!(
            text,
            "-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW -m set --match-set {} dst -j REJECT",
            name(Role::IpvsIps)
        );
    }

    fn push_nat_rules(&self, text: &mut String) {
        let loopback = match self.family {
            Family::V4 => "127.0.0.0/8",
            Family::V6 => "::1/128",
        };
        push_all(text, &["-A KUBE-SERVICES -s ", loopback, " -j RETURN\n"]);
        let services = "KUBE-SERVICES";
        for (chain, set, direction, rest) in [
            (
                "KUBE-POSTROUTING",
                Role::LoopBack,
                "dst,dst,src",
                " -j MASQUERADE",
            ),
            (
                services,
                Role::LoadBalancer,
                "dst,dst",
                " -j KUBE-LOAD-BALANCER",
            ),
            (
                "KUBE-LOAD-BALANCER",
                Role::LoadBalancerLocal,
                "dst,dst",
                " -j RETURN",
            ),
        ] {
            self.push_set_rule(text, chain, set, direction, rest);
        }
        for protocol in Protocol::ALL {
            let (set, local_set) = Role::of_node_ports(protocol);
            let chain = format!("KUBE-NODE-PORT -p {protocol}");
            let direction = match protocol {
                Protocol::Tcp | Protocol::Udp => "dst",
                Protocol::Sctp => "dst,dst",
            };
            self.push_set_rule(text, &chain, local_set, direction, " -j RETURN");
            self.push_set_rule(text, &chain, set, direction, " -j KUBE-MARK-MASQ");
        }
        // Without the pods' addresses only a Service's own address as source tells a hairpin.
        let (direction, from) = match self.node.cluster_cidr(self.family) {
            _ if self.node.masquerade_all => ("dst,dst", String::new()),
            Some(cidr) => ("dst,dst", format!(" ! -s {cidr}")),
            None => ("src,dst", String::new()),
        };
        let masquerade = format!("{from} -j KUBE-MARK-MASQ");
        self.push_set_rule(text, services, Role::ClusterIp, direction, &masquerade);
        let external = Role::ExternalIp;
        self.push_set_rule(text, services, external, "dst,dst", " -j KUBE-MARK-MASQ");
        for set in [Role::ExternalIp, Role::ExternalIpLocal] {
            for which in [
                " -m physdev ! --physdev-is-in -m addrtype ! --src-type LOCAL -j ACCEPT",
                " -m addrtype --dst-type LOCAL -j ACCEPT",
            ] {
                self.push_set_rule(text, services, set, "dst,dst", which);
            }
        }
        text.push_str("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT\n");
        text.push_str("-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ\n");
        for set in [Role::ClusterIp, Role::LoadBalancer] {
            if !self.is_empty(set) {
                let _ = writeln!(
                    text,
                    "-A KUBE-SERVICES -m set --match-set {} dst,dst -j ACCEPT",
                    set.set_name(self.family)
                );
            }
        }
    }
}

/// `-t ADDRESS:PORT`, `-u`, `--sctp-service`.
fn server_key(protocol: Protocol, ip: IpAddr, port: u16) -> String {
    let option = match protocol {
        Protocol::Tcp => "-t",
        Protocol::Udp => "-u",
        Protocol::Sctp => "--sctp-service",
    };
    format!("{option} {}", SocketAddr::new(ip, port))
}

/// The first half of the `ipvsadm -R` input that makes `wanted` of `current` (what `ipvsadm -Sn`
/// prints): what is missing or different of those that are wanted. Servers that stay are not
/// touched, so that their connections live on.
///
/// A real server that is gone is deleted. kube-proxy does the same if it has no connections, and
/// otherwise gives it the weight 0 and deletes it once they are gone, which text cannot tell.
pub(in crate::rules) fn update_live_servers(current: &str, wanted: &str) -> String {
    let current = Servers::parse(current);
    let wanted = Servers::parse(wanted);
    let mut text = String::new();
    for key in &wanted.order {
        let Some(server) = wanted.by_key.get(key) else {
            continue;
        };
        let existing = current.by_key.get(key);
        match existing {
            None => push_all(&mut text, &["-A ", key, server.options, "\n"]),
            Some(existing) if existing.options != server.options => {
                push_all(&mut text, &["-E ", key, server.options, "\n"]);
            }
            Some(_) => {}
        }
        for real in &server.reals {
            if !existing.is_some_and(|existing| existing.reals.contains(real)) {
                push_all(&mut text, &["-a ", key, " -r ", real, " -m -w 1\n"]);
            }
        }
        for real in existing.into_iter().flat_map(|existing| &existing.reals) {
            if !server.reals.contains(real) {
                push_all(&mut text, &["-d ", key, " -r ", real, "\n"]);
            }
        }
    }
    text
}

/// The second half: what is stale, which kube-proxy deletes last.
pub(in crate::rules) fn remove_stale_servers(current: &str, wanted: &str) -> String {
    let current = Servers::parse(current);
    let wanted = Servers::parse(wanted);
    let mut text = String::new();
    for key in &current.order {
        if !wanted.by_key.contains_key(key) {
            push_all(&mut text, &["-D ", key, "\n"]);
        }
    }
    text
}

/// What `ipvsadm -Sn` prints.
#[derive(Default)]
struct Servers<'a> {
    /// `-t ADDRESS:PORT`, as they came.
    order: Vec<&'a str>,
    by_key: HashMap<&'a str, ListedServer<'a>>,
}

#[derive(Default)]
struct ListedServer<'a> {
    /// ` -s rr -p 10800`.
    options: &'a str,
    reals: BTreeSet<&'a str>,
}

impl<'a> Servers<'a> {
    fn parse(text: &'a str) -> Self {
        let mut servers = Self::default();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("-A ") {
                let (key, options) = rest.split_at(rest.find(" -s ").unwrap_or(rest.len()));
                servers.entry(key).options = options;
            } else if let Some((key, real)) = line
                .strip_prefix("-a ")
                .and_then(|rest| rest.split_once(" -r "))
            {
                let real = real.split(' ').next().unwrap_or_default();
                servers.entry(key).reals.insert(real);
            }
        }
        servers
    }

    fn entry(&mut self, key: &'a str) -> &mut ListedServer<'a> {
        let order = &mut self.order;
        self.by_key.entry(key).or_insert_with(|| {
            order.push(key);
            ListedServer::default()
        })
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
