//! Are a node's virtual servers, ipsets and addresses the ones that its cluster calls for?
//!
//! The order of servers, sets and entries means nothing: all of them stand in hash tables.

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use super::addresses::{Addresses, Bound};
use super::servers::{Forwarding, Orphan, RealServer, ServerKey, Servers, VirtualServer};
use super::sets::{Entry, Member, Role, Set, Sets};
use super::{LINK, ParseError};
use crate::cluster::{Cluster, Family, Protocol, Service, ServicePort};
use crate::rules::check::{Finding, Kind};
use crate::rules::{Mode, NodeView, RuleSet, Step, render};

/// What the cluster calls for, besides iptables rules.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The virtual servers.
    pub servers: Servers,
    /// The ipsets.
    pub sets: Sets,
    /// The addresses of `kube-ipvs0`.
    pub addresses: Vec<IpAddr>,
}

impl Wanted {
    /// Takes it from what was rendered.
    pub fn of(rules: &RuleSet) -> Result<Self, ParseError> {
        let mut wanted = Self::default();
        for step in &rules.steps {
            match step {
                Step::Servers { text } => wanted.servers = Servers::parse(text)?,
                Step::Sets { text } => wanted.sets = Sets::parse(text)?,
                Step::Addresses { addresses } => wanted.addresses.clone_from(addresses),
                _ => {}
            }
        }
        Ok(wanted)
    }
}

/// What a node holds, besides iptables rules.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The virtual servers.
    pub servers: Servers,
    /// The ipsets.
    pub sets: Sets,
    /// The addresses of `kube-ipvs0`.
    pub addresses: Addresses,
}

/// Compares the two; nothing is found if the node holds what is wanted. The sets and firewall marks
/// of others are left alone.
///
/// If several Services want one virtual server, kube-proxy gives it to the one that it comes to
/// last, in an order that changes with every sync: any of them will do.
pub fn check(cluster: &Cluster, node: &NodeView, wanted: &Wanted, found: &Found) -> Vec<Finding> {
    let mut checker = Checker {
        node,
        names: Names::new(cluster),
        bound: found.addresses.bound.iter().map(|b| b.address).collect(),
        findings: Vec::new(),
    };
    checker.servers(&wanted.servers, &found.servers);
    checker.sets(&wanted.sets, &found.sets);
    checker.addresses(&wanted.addresses, &found.addresses);
    checker.findings
}

/// Which Services an address, port or endpoint belongs to. Filled when it is first asked.
struct Names<'a> {
    cluster: &'a Cluster,
    index: OnceCell<Index<'a>>,
}

type Port<'a> = (&'a Service, &'a ServicePort);

#[derive(Default)]
struct Index<'a> {
    sockets: HashMap<(Protocol, SocketAddr), Vec<Port<'a>>>,
    node_ports: HashMap<(Protocol, u16), Vec<Port<'a>>>,
    health_checks: HashMap<u16, &'a Service>,
    endpoints: HashMap<(Protocol, SocketAddr), Vec<Port<'a>>>,
    addresses: HashMap<IpAddr, Vec<&'a Service>>,
}

impl<'a> Names<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        Self {
            cluster,
            index: OnceCell::new(),
        }
    }

    fn index(&self) -> &Index<'a> {
        self.index.get_or_init(|| {
            let mut index = Index::default();
            for service in &self.cluster.services {
                index.add(service);
            }
            index
        })
    }

    /// The `ServicePort` that a virtual server is for.
    fn server(&self, key: ServerKey) -> Option<String> {
        let ServerKey { protocol, socket } = key;
        let index = self.index();
        let ports = index
            .sockets
            .get(&(protocol, socket))
            .or_else(|| index.node_ports.get(&(protocol, socket.port())));
        match ports {
            Some(ports) => Some(port_names(ports)),
            None => self.address(socket.ip()),
        }
    }

    /// The Services that want a virtual server.
    fn claims(&self, key: ServerKey) -> Vec<&'a Service> {
        let ServerKey { protocol, socket } = key;
        let index = self.index();
        let by_socket = index.sockets.get(&(protocol, socket));
        let by_node_port = index.node_ports.get(&(protocol, socket.port()));
        let ports = by_socket.into_iter().chain(by_node_port).flatten();
        ports.map(|(service, _)| *service).collect()
    }

    /// The Services of an address.
    fn address(&self, address: IpAddr) -> Option<String> {
        let services = self.index().addresses.get(&address)?;
        Some(join(services.iter().map(
            |service| match service.ports.as_slice() {
                [port] => service.port_name(port),
                _ => format!("{}/{}", service.namespace, service.name),
            },
        )))
    }

    /// The `ServicePort`s that an endpoint belongs to.
    fn endpoint(&self, protocol: Protocol, socket: SocketAddr) -> Option<String> {
        let ports = self.index().endpoints.get(&(protocol, socket))?;
        Some(port_names(ports))
    }

    fn node_port(&self, protocol: Protocol, port: u16) -> Option<String> {
        let ports = self.index().node_ports.get(&(protocol, port))?;
        Some(port_names(ports))
    }

    /// The `ServicePort`s that a set's entry is for.
    fn entry(&self, role: Role, entry: Entry) -> Option<String> {
        match entry {
            Entry::Port(port) => match role {
                Role::HealthCheckNodePort => {
                    let service = self.index().health_checks.get(&port)?;
                    Some(service_name(service))
                }
                Role::NodePortUdp | Role::NodePortLocalUdp => self.node_port(Protocol::Udp, port),
                _ => self.node_port(Protocol::Tcp, port),
            },
            Entry::Ip(address) => self.address(address),
            Entry::IpPort(address, protocol, port)
            | Entry::IpPortIp(address, protocol, port, _)
            | Entry::IpPortNet(address, protocol, port, _) => {
                let socket = SocketAddr::new(address, port);
                if role == Role::LoopBack {
                    self.endpoint(protocol, socket)
                } else {
                    self.server(ServerKey { protocol, socket })
                }
            }
        }
    }
}

impl<'a> Index<'a> {
    fn add(&mut self, service: &'a Service) {
        let addresses = service
            .cluster_ips
            .iter()
            .chain(&service.external_ips)
            .chain(&service.load_balancer_ips);
        for address in addresses {
            self.addresses.entry(*address).or_default().push(service);
            for port in &service.ports {
                let socket = SocketAddr::new(*address, port.port);
                let ports = self.sockets.entry((port.protocol, socket)).or_default();
                ports.push((service, port));
            }
        }
        if let Some(port) = service.health_check_node_port {
            self.health_checks.insert(port, service);
        }
        for port in &service.ports {
            if let Some(node_port) = port.node_port {
                let ports = self.node_ports.entry((port.protocol, node_port));
                ports.or_default().push((service, port));
            }
            for endpoint in &port.endpoints {
                let socket = SocketAddr::new(endpoint.address, endpoint.port);
                let ports = self.endpoints.entry((port.protocol, socket));
                ports.or_default().push((service, port));
            }
        }
    }
}

/// `ns/name:port`, or `ns/name` for a Service with several ports.
fn service_name(service: &Service) -> String {
    match service.ports.as_slice() {
        [port] => service.port_name(port),
        _ => format!("{}/{}", service.namespace, service.name),
    }
}

fn port_names(ports: &[Port<'_>]) -> String {
    join(ports.iter().map(|(service, port)| service.port_name(port)))
}

/// Each name once, in order.
fn join(names: impl Iterator<Item = String>) -> String {
    let mut names: Vec<String> = names.collect();
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}

struct Checker<'a> {
    node: &'a NodeView,
    names: Names<'a>,
    /// The addresses that `kube-ipvs0` has.
    bound: HashSet<IpAddr>,
    findings: Vec<Finding>,
}

/// Where servers stand, in findings.
const SERVERS: &str = "virtual servers";

impl Checker<'_> {
    fn servers(&mut self, wanted: &Servers, found: &Servers) {
        let mut there: HashMap<ServerKey, &VirtualServer> =
            HashMap::with_capacity(found.list.len());
        for server in &found.list {
            if let Some(first) = there.get(&server.key) {
                let effect = format!("stands there twice, first on line {}", first.line);
                self.server(Kind::Extra, server, None, Some(server.line), effect);
            } else {
                there.insert(server.key, server);
            }
        }
        let mut missing = HashSet::new();
        for server in &wanted.list {
            if let Some(found) = there.remove(&server.key) {
                if !is_same(server, found) && !self.is_anothers(found) {
                    self.same_server(server, found);
                }
            } else {
                missing.insert(server.key);
                let effect = "IPVS does not take its packets: the node answers them itself, with \
                              a refusal or by whatever listens on that port";
                self.server(Kind::Missing, server, None, None, effect.to_owned());
            }
        }
        for server in &found.list {
            if there.remove(&server.key).is_some() {
                self.unwanted_server(server);
            }
        }
        for Orphan { key, real_server } in &found.orphans {
            if !missing.contains(key) {
                let effect = "a real server of no virtual server: this is no dump of a kernel";
                self.real(Kind::Extra, *key, real_server, true, effect.to_owned());
            }
        }
    }

    fn server(
        &mut self,
        kind: Kind,
        server: &VirtualServer,
        found: Option<&VirtualServer>,
        line: Option<u32>,
        effect: String,
    ) {
        self.findings.push(Finding {
            kind,
            family: server.key.family(),
            place: SERVERS.to_owned(),
            rule: server.to_string(),
            found: found.map(VirtualServer::to_string),
            line,
            service: self.names.server(server.key),
            effect,
        });
    }

    fn real(
        &mut self,
        kind: Kind,
        key: ServerKey,
        real_server: &RealServer,
        found: bool,
        effect: String,
    ) {
        self.findings.push(Finding {
            kind,
            family: key.family(),
            place: format!("virtual server {}/{}", key.socket, key.protocol),
            rule: format!("-a {key} {real_server}"),
            found: None,
            line: found.then_some(real_server.line),
            service: self.names.server(key),
            effect,
        });
    }

    fn unwanted_server(&mut self, server: &VirtualServer) {
        let ServerKey { protocol, socket } = server.key;
        let address = socket.ip();
        let of_service = self.names.index().addresses.contains_key(&address);
        let (kind, effect) = if of_service {
            let effect = "the Service has no such port, and packets to it still go to pods";
            (Kind::Stale, effect.to_owned())
        } else if self.names.node_port(protocol, socket.port()).is_some() {
            let effect = format!(
                "{address} is not among the node's addresses: give it with --node-address if it \
                 is one, otherwise packets to it still go to pods"
            );
            (Kind::Extra, effect)
        } else if self.bound.contains(&address) {
            let effect = "no Service has it: packets to it still go to pods";
            (Kind::Stale, effect.to_owned())
        } else {
            let effect = "no Service has it: kube-proxy deletes it at its next sync, unless \
                          --ipvs-exclude-cidrs holds it";
            (Kind::Extra, effect.to_owned())
        };
        self.server(kind, server, None, Some(server.line), effect);
    }

    /// Is the virtual server as one of the Services that want it would have it by itself?
    fn is_anothers(&self, found: &VirtualServer) -> bool {
        let claims = self.names.claims(found.key);
        claims.len() > 1
            && claims.into_iter().any(|service| {
                let alone = Cluster {
                    services: vec![service.clone()],
                    nodes: self.names.cluster.nodes.clone(),
                    service_cidrs: Vec::new(),
                };
                Wanted::of(&render(&alone, self.node, Mode::Ipvs))
                    .is_ok_and(|wanted| wanted.servers.list.iter().any(|s| is_same(s, found)))
            })
    }

    /// The same virtual server, wanted and found.
    fn same_server(&mut self, wanted: &VirtualServer, found: &VirtualServer) {
        if !wanted.same(found) {
            let effect = altered_server(wanted, found);
            self.server(Kind::Altered, wanted, Some(found), Some(found.line), effect);
        }
        let shares = Shares::of(&found.real_servers);
        let mut there: HashMap<SocketAddr, &RealServer> = HashMap::new();
        for real_server in &found.real_servers {
            if let Some(first) = there.get(&real_server.socket) {
                let effect = format!("stands there twice, first on line {}", first.line);
                self.real(Kind::Extra, found.key, real_server, true, effect);
            } else {
                there.insert(real_server.socket, real_server);
            }
        }
        for real_server in &wanted.real_servers {
            match there.remove(&real_server.socket) {
                None => {
                    let effect = format!("the endpoint gets no new flows{}", shares.rest(None));
                    self.real(Kind::Missing, wanted.key, real_server, false, effect);
                }
                Some(found) if !real_server.same(found) => {
                    let effect = altered_real(real_server, found, &shares);
                    self.real(Kind::Altered, wanted.key, real_server, true, effect);
                    if let Some(finding) = self.findings.last_mut() {
                        finding.line = Some(found.line);
                        finding.found = Some(format!("-a {} {found}", wanted.key));
                    }
                }
                Some(_) => {}
            }
        }
        for real_server in &found.real_servers {
            if there.remove(&real_server.socket).is_some() {
                self.unwanted_real(found.key, real_server, &shares);
            }
        }
    }

    fn unwanted_real(&mut self, key: ServerKey, real_server: &RealServer, shares: &Shares) {
        if real_server.weight == 0 {
            let effect = "drains: it gets no new flows, and goes when its last connection ends";
            return self.real(Kind::Draining, key, real_server, true, effect.to_owned());
        }
        let share = shares.share(real_server);
        let service = self.names.server(key);
        let owner = self.names.endpoint(key.protocol, real_server.socket);
        let (kind, effect) = match owner {
            None => (
                Kind::Stale,
                format!("endpoint gone: {share} new flows will hang"),
            ),
            Some(owner) if Some(&owner) == service.as_ref() => (
                Kind::Stale,
                format!("{share} new flows goes to an endpoint that should get none now"),
            ),
            Some(owner) => (
                Kind::Extra,
                format!("{share} new flows goes to an endpoint of {owner}"),
            ),
        };
        self.real(kind, key, real_server, true, effect);
    }

    fn sets(&mut self, wanted: &Sets, found: &Sets) {
        let mut there: HashMap<(Family, Role), &Set> = HashMap::new();
        for set in &found.list {
            if let Some(first) = there.get(&(set.family, set.role)) {
                let effect = format!("stands there twice, first on line {}", first.line);
                self.set(Kind::Extra, set, None, Some(set.line), effect);
            } else {
                there.insert((set.family, set.role), set);
            }
        }
        let mut orphans: HashMap<(Family, Role), Vec<Member>> = HashMap::new();
        for (family, role, member) in &found.orphans {
            orphans.entry((*family, *role)).or_default().push(*member);
        }
        for set in &wanted.list {
            let place = (set.family, set.role);
            let members = if let Some(found) = there.remove(&place) {
                if set.kind != found.kind || set.options != found.options {
                    let effect =
                        "kube-proxy cannot make its set, and its entries can fail to go in";
                    self.set(
                        Kind::Altered,
                        set,
                        Some(found),
                        Some(found.line),
                        effect.to_owned(),
                    );
                }
                found.members.as_slice()
            } else {
                let effect = "the rules that ask for it cannot be loaded, and its entries are gone";
                self.set(Kind::Missing, set, None, None, effect.to_owned());
                orphans.get(&place).map_or(&[][..], Vec::as_slice)
            };
            self.members(set, members);
        }
        // kube-proxy of another version has other sets.
        for set in &found.list {
            if there.remove(&(set.family, set.role)).is_some() {
                let effect = "kube-proxy of this version has no such set: nothing asks for it";
                self.set(Kind::Stale, set, None, Some(set.line), effect.to_owned());
            }
        }
    }

    fn set(
        &mut self,
        kind: Kind,
        set: &Set,
        found: Option<&Set>,
        line: Option<u32>,
        effect: String,
    ) {
        self.findings.push(Finding {
            kind,
            family: set.family,
            place: set.name(),
            rule: set.to_string(),
            found: found.map(Set::to_string),
            line,
            service: None,
            effect,
        });
    }

    fn members(&mut self, set: &Set, found: &[Member]) {
        let mut there: HashMap<Entry, &Member> = HashMap::with_capacity(found.len());
        for member in found {
            if let Some(first) = there.get(&member.entry) {
                let effect = format!("stands there twice, first on line {}", first.line);
                self.member(Kind::Extra, set, *member, None, Some(member.line), effect);
            } else {
                there.insert(member.entry, member);
            }
        }
        for member in &set.members {
            match there.remove(&member.entry) {
                None => {
                    let effect = missing_entry(set.role).to_owned();
                    self.member(Kind::Missing, set, *member, None, None, effect);
                }
                Some(found) if found.except || found.timeout.is_some() => {
                    let effect = missing_entry(set.role);
                    let effect = match found.timeout {
                        Some(seconds) => format!("in {seconds} s {effect}"),
                        None => effect.to_owned(),
                    };
                    let line = Some(found.line);
                    self.member(Kind::Altered, set, *member, Some(*found), line, effect);
                }
                Some(_) => {}
            }
        }
        for member in found {
            if there.remove(&member.entry).is_some() {
                let effect = stale_entry(set.role).to_owned();
                self.member(Kind::Stale, set, *member, None, Some(member.line), effect);
            }
        }
    }

    fn member(
        &mut self,
        kind: Kind,
        set: &Set,
        member: Member,
        found: Option<Member>,
        line: Option<u32>,
        effect: String,
    ) {
        let name = set.name();
        self.findings.push(Finding {
            kind,
            family: set.family,
            rule: format!("add {name} {member}"),
            found: found.map(|found| format!("add {name} {found}")),
            place: name,
            line,
            service: self.names.entry(set.role, member.entry),
            effect,
        });
    }

    fn addresses(&mut self, wanted: &[IpAddr], found: &Addresses) {
        if !found.link && !wanted.is_empty() {
            self.findings.push(Finding {
                kind: Kind::Missing,
                family: Family::V4,
                place: format!("link {LINK}"),
                rule: format!("link add {LINK} type dummy"),
                found: None,
                line: None,
                service: None,
                effect: "the node takes no packets to any Service in: they leave it untranslated"
                    .to_owned(),
            });
            return;
        }
        let mut there: HashMap<IpAddr, &Bound> = HashMap::with_capacity(found.bound.len());
        for bound in &found.bound {
            // The kernel gives a link that is up a link-local address.
            if matches!(bound.address, IpAddr::V6(address) if address.is_unicast_link_local()) {
                continue;
            }
            if let Some(first) = there.get(&bound.address) {
                let effect = format!("stands there twice, first on line {}", first.line);
                self.address(Kind::Extra, bound.address, Some(bound), effect);
            } else {
                there.insert(bound.address, bound);
            }
        }
        for address in wanted {
            let Some(bound) = there.remove(address) else {
                let effect = "packets to it from pods and from outside leave the node untranslated";
                self.address(Kind::Missing, *address, None, effect.to_owned());
                continue;
            };
            let effect = match (bound.lifetime, bound.prefix) {
                (Some(seconds), _) => format!(
                    "in {seconds} s packets to it from pods and from outside leave the node \
                     untranslated"
                ),
                (None, prefix) if prefix != whole(*address) => format!(
                    "the node believes to have a link to the network {address}/{prefix}, and \
                     packets to the rest of it are lost"
                ),
                _ if bound.odd.is_some() => {
                    "kube-proxy binds it otherwise: somebody else did, or changed it, and may take it away"
                        .to_owned()
                }
                _ => continue,
            };
            self.address(Kind::Altered, *address, Some(bound), effect);
        }
        for bound in &found.bound {
            if there.remove(&bound.address).is_some() {
                let effect = "no Service has it: the node keeps packets to it instead of sending \
                              them on";
                self.address(Kind::Stale, bound.address, Some(bound), effect.to_owned());
            }
        }
    }

    fn address(&mut self, kind: Kind, address: IpAddr, bound: Option<&Bound>, effect: String) {
        let found = bound.filter(|_| kind == Kind::Altered).map(|bound| {
            let lifetime = bound.lifetime.map(|s| format!(" valid_lft {s}sec"));
            let odd = bound.odd.as_ref().map(|odd| format!(" {odd}"));
            let details = lifetime.or(odd).unwrap_or_default();
            format!("{address}/{}{details}", bound.prefix)
        });
        self.findings.push(Finding {
            kind,
            family: Family::of(address),
            place: format!("link {LINK}"),
            rule: format!("{address}/{}", whole(address)),
            found,
            line: bound.map(|bound| bound.line),
            service: self.names.address(address),
            effect,
        });
    }
}

/// The same virtual server with the same real servers?
fn is_same(a: &VirtualServer, b: &VirtualServer) -> bool {
    fn sorted(server: &VirtualServer) -> Vec<&RealServer> {
        let mut real_servers: Vec<&RealServer> = server.real_servers.iter().collect();
        real_servers.sort_unstable_by_key(|real_server| real_server.socket);
        real_servers
    }
    a.same(b)
        && a.real_servers.len() == b.real_servers.len()
        && sorted(a).iter().zip(sorted(b)).all(|(a, b)| a.same(b))
}

/// The prefix length of a single address.
const fn whole(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// How new flows are shared among the real servers that are there.
struct Shares {
    /// Real servers with a weight above 0.
    servers: usize,
    weights: u64,
    even: bool,
}

impl Shares {
    fn of(real_servers: &[RealServer]) -> Self {
        let mut weights = real_servers
            .iter()
            .map(|real_server| real_server.weight)
            .filter(|weight| *weight > 0);
        let first = weights.clone().next();
        Self {
            servers: weights.clone().count(),
            weights: weights.clone().map(u64::from).sum(),
            even: weights.all(|weight| Some(weight) == first),
        }
    }

    /// `1 of 3`.
    fn share(&self, real_server: &RealServer) -> String {
        if self.even {
            format!("1 of {}", self.servers)
        } else {
            format!("{} of {}", real_server.weight, self.weights)
        }
    }

    /// What becomes of the flows that a real server does not get; `left_out` is not counted.
    fn rest(&self, left_out: Option<&RealServer>) -> String {
        let left_out = left_out.is_some_and(|real_server| real_server.weight > 0);
        match self.servers - usize::from(left_out) {
            0 => ", and with none left all are refused (ICMP port unreachable)".to_owned(),
            1 => "; the other one gets them all".to_owned(),
            n => format!("; the other {n} get them all"),
        }
    }
}

fn altered_server(wanted: &VirtualServer, found: &VirtualServer) -> String {
    match (wanted.persistence, found.persistence) {
        (Some(_), None) => {
            "a client's flows go to any endpoint instead of staying with one".to_owned()
        }
        (None, Some(seconds)) => format!(
            "a client's flows stay with one endpoint for {seconds} s, without session affinity"
        ),
        (Some(wanted), Some(found)) if wanted != found => {
            format!("a client stays with its endpoint for {found} s instead of {wanted} s")
        }
        _ if wanted.scheduler != found.scheduler => format!(
            "new flows are spread by {} instead of {}",
            found.scheduler, wanted.scheduler
        ),
        _ => "it has options that kube-proxy does not set".to_owned(),
    }
}

fn altered_real(wanted: &RealServer, found: &RealServer, shares: &Shares) -> String {
    if found.forwarding != wanted.forwarding {
        return match found.forwarding {
            Forwarding::Tunnel => {
                "its packets are tunnelled to the endpoint, which does not unpack \
                                   them"
                    .to_owned()
            }
            _ => "its packets reach the endpoint with the Service's address, and are not answered"
                .to_owned(),
        };
    }
    if found.weight == 0 {
        return format!("the endpoint gets no new flows{}", shares.rest(Some(found)));
    }
    if found.weight != wanted.weight {
        return format!(
            "the endpoint counts as {} of {} in schedulers that weigh",
            found.weight, shares.weights
        );
    }
    "it has limits or options that kube-proxy does not set".to_owned()
}

/// What a packet suffers if an entry is not there.
const fn missing_entry(role: Role) -> &'static str {
    match role {
        Role::LoopBack => "the endpoint gets no answer when it is sent its own packets",
        Role::ClusterIp => {
            "new flows from pods and from outside are rejected (KUBE-IPVS-FILTER), and the node's \
             own are not masqueraded"
        }
        Role::ExternalIp | Role::ExternalIpLocal | Role::LoadBalancer => {
            "new flows to it are rejected (KUBE-IPVS-FILTER)"
        }
        Role::LoadBalancerLocal
        | Role::NodePortLocalTcp
        | Role::NodePortLocalUdp
        | Role::NodePortLocalSctp => {
            "packets are masqueraded: endpoints see the node's address instead of the client's"
        }
        Role::LoadBalancerFirewall => "its source ranges mean nothing: everyone gets in",
        Role::LoadBalancerSourceIp | Role::LoadBalancerSourceCidr => {
            "clients of this source range are dropped"
        }
        Role::NodePortTcp | Role::NodePortUdp | Role::NodePortSctp => {
            "packets to the NodePort are not masqueraded: answers of endpoints on other nodes miss \
             this node and are lost"
        }
        Role::HealthCheckNodePort => {
            "the load balancer's health checks can be dropped by the node's other filter rules"
        }
        Role::IpvsIps => {
            "packets to ports that the Service does not have reach the node's own programs"
        }
    }
}

/// What a packet suffers if an entry is there that should not be.
const fn stale_entry(role: Role) -> &'static str {
    match role {
        Role::LoopBack => "no local endpoint: packets of this address to itself are masqueraded",
        Role::ClusterIp | Role::ExternalIp | Role::ExternalIpLocal | Role::LoadBalancer => {
            "no Service has it: packets to it reach the node's own programs instead of being \
             rejected"
        }
        Role::LoadBalancerLocal
        | Role::NodePortLocalTcp
        | Role::NodePortLocalUdp
        | Role::NodePortLocalSctp => {
            "packets are not masqueraded: answers of endpoints on other nodes miss this node and \
             are lost"
        }
        Role::LoadBalancerFirewall => "packets to it from outside its source ranges are dropped",
        Role::LoadBalancerSourceIp | Role::LoadBalancerSourceCidr => {
            "no source range has it: clients get in that should not"
        }
        Role::NodePortTcp | Role::NodePortUdp | Role::NodePortSctp => {
            "no NodePort: packets to this port of the node are masqueraded"
        }
        Role::HealthCheckNodePort => {
            "no health check: packets to this port pass the node's other filter rules"
        }
        Role::IpvsIps => "new flows to it are rejected, though no Service has it",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cluster::Endpoint;
    use crate::rules::services::tests::{a_node, any_cluster};

    const CLUSTER: &str = include_str!("../fixtures/kube-proxy-1.36.2/cluster.json");
    const SERVERS: &str = include_str!("../fixtures/kube-proxy-1.36.2/ipvs/ipvsadm.save");
    const SETS: &str = include_str!("../fixtures/kube-proxy-1.36.2/ipvs/ipset.save");
    const ADDRESSES: &str = include_str!("../fixtures/kube-proxy-1.36.2/ipvs/ip-addr.txt");

    fn cluster() -> Cluster {
        let read = crate::cluster::read::read(CLUSTER.as_bytes(), "cluster.json");
        read.expect("a cluster").cluster
    }

    fn node() -> NodeView {
        NodeView {
            name: "worker-0".to_owned(),
            zone: Some("z1".to_owned()),
            addresses: vec![[172, 31, 255, 2].into(), [10, 0, 2, 15].into()],
            cluster_cidrs: vec!["10.244.0.0/16".parse().expect("a network")],
            ..NodeView::default()
        }
    }

    fn wanted(cluster: &Cluster) -> Wanted {
        Wanted::of(&render(cluster, &node(), Mode::Ipvs)).expect("what was rendered")
    }

    fn found(servers: &str, sets: &str, addresses: &str) -> Result<Found, ParseError> {
        Ok(Found {
            servers: Servers::parse(servers)?,
            sets: Sets::parse(sets)?,
            addresses: Addresses::parse(addresses)?,
        })
    }

    fn findings(servers: &str, sets: &str, addresses: &str) -> Vec<Finding> {
        let found = found(servers, sets, addresses).expect("readable");
        let cluster = cluster();
        check(&cluster, &node(), &wanted(&cluster), &found)
    }

    fn servers(from: &str, to: &str) -> Vec<Finding> {
        let servers = SERVERS.replace(from, to);
        assert_ne!(servers, SERVERS);
        findings(&servers, SETS, ADDRESSES)
    }

    fn sets(from: &str, to: &str) -> Vec<Finding> {
        let sets = SETS.replace(from, to);
        assert_ne!(sets, SETS);
        findings(SERVERS, &sets, ADDRESSES)
    }

    fn addresses(from: &str, to: &str) -> Vec<Finding> {
        let addresses = ADDRESSES.replace(from, to);
        assert_ne!(addresses, ADDRESSES);
        findings(SERVERS, SETS, &addresses)
    }

    #[track_caller]
    fn one(findings: &[Finding], kind: Kind, service: Option<&str>, effect: &str) {
        let [finding] = findings else {
            panic!("one finding, not {findings:#?}");
        };
        assert_eq!(finding.kind, kind, "{finding:#?}");
        assert_eq!(finding.service.as_deref(), service, "{finding:#?}");
        assert!(finding.effect.contains(effect), "{finding:#?}");
    }

    #[test]
    fn a_real_dump_is_clean_in_any_order() {
        assert_eq!(findings(SERVERS, SETS, ADDRESSES), []);
        let reversed = |text: &str, first: &str| {
            let (mut heads, tails): (Vec<_>, Vec<_>) =
                text.lines().partition(|line| line.starts_with(first));
            heads.reverse();
            let lines = heads.into_iter().chain(tails.into_iter().rev());
            lines.flat_map(|line| [line, "\n"]).collect::<String>()
        };
        let servers = reversed(SERVERS, "-A");
        let sets = reversed(SETS, "create");
        assert_eq!(findings(&servers, &sets, ADDRESSES), []);
    }

    #[test]
    fn servers_that_differ_say_what_happens() {
        let web = Some("shop/web:http");
        let gone = servers(" -r 10.244.1.13:8080", " -r 10.244.9.9:8080");
        assert!(gone.len() > 2);
        one(
            &servers("-A -t 10.96.10.1:80 -s rr\n", ""),
            Kind::Missing,
            web,
            "does not take its packets",
        );
        one(
            &servers("-a -t 10.96.10.1:80 -r 10.244.0.12:8080 -m -w 1\n", ""),
            Kind::Missing,
            web,
            "the other 2 get them all",
        );
        one(
            &servers("-a -t 10.96.0.1:443 -r 172.31.255.1:6443 -m -w 1\n", ""),
            Kind::Missing,
            Some("default/kubernetes:https"),
            "all are refused",
        );
        let more = "-a -t 10.96.10.1:80 -r 10.244.9.9:8080 -m -w 1\n-A -t 10.96.10.2:80 -s rr\n";
        one(
            &servers("-A -t 10.96.10.2:80 -s rr\n", more),
            Kind::Stale,
            web,
            "1 of 4 new flows will hang",
        );
        one(
            &servers("-A -t 10.96.10.2:80 -s rr\n", &more.replace("-w 1", "-w 0")),
            Kind::Draining,
            web,
            "drains",
        );
        one(
            &servers(
                "-A -t 10.96.10.2:80 -s rr\n",
                &more.replace("10.244.9.9:8080", "10.244.0.2:53"),
            ),
            Kind::Extra,
            web,
            "an endpoint of kube-system/kube-dns:dns-tcp",
        );
        one(
            &servers(
                "-a -t 10.96.0.1:443 -r 172.31.255.1:6443 -m -w 1",
                "-a -t 10.96.0.1:443 -r 172.31.255.1:6443 -m -w 0",
            ),
            Kind::Altered,
            Some("default/kubernetes:https"),
            "all are refused",
        );
        one(
            &servers("-s rr -p 10800", "-s rr"),
            Kind::Altered,
            Some("shop/cart:grpc"),
            "staying with one",
        );
        one(
            &servers("-A -t 10.96.10.1:80 -s rr", "-A -t 10.96.10.1:80 -s lc"),
            Kind::Altered,
            web,
            "by lc instead of rr",
        );
        for (server, kind, service, effect) in [
            ("10.96.10.1:81", Kind::Stale, web, "no such port"),
            ("10.96.99.1:80", Kind::Extra, None, "exclude-cidrs"),
            (
                "192.168.7.7:30080",
                Kind::Extra,
                Some("shop/web-np:http"),
                "--node-address",
            ),
        ] {
            let text = format!("{SERVERS}-A -t {server} -s rr\n");
            one(&findings(&text, SETS, ADDRESSES), kind, service, effect);
        }
    }

    /// What a node holds that has what is wanted.
    fn held(wanted: &Wanted) -> Found {
        let Wanted {
            mut servers,
            mut sets,
            addresses,
        } = wanted.clone();
        servers.list.reverse();
        sets.list.reverse();
        let bound = addresses.into_iter().map(|address| Bound {
            address,
            prefix: whole(address),
            lifetime: None,
            odd: None,
            line: 1,
        });
        let addresses = Addresses {
            link: true,
            bound: bound.collect(),
            others: Vec::new(),
        };
        Found {
            servers,
            sets,
            addresses,
        }
    }

    #[test]
    fn of_services_that_want_the_same_any_may_have_it() {
        let claimant = |name: &str, last: u8| {
            let endpoint = Endpoint::ready([10, 244, 1, last].into(), 8080, "worker-1");
            Service {
                namespace: "ns".to_owned(),
                name: name.to_owned(),
                cluster_ips: vec![[10, 96, 9, last].into()],
                external_ips: vec![[192, 0, 2, 77].into()],
                ports: vec![ServicePort {
                    name: String::new(),
                    protocol: Protocol::Tcp,
                    port: 80,
                    node_port: None,
                    endpoints: vec![endpoint],
                }],
                ..Service::default()
            }
        };
        let mut cluster = Cluster {
            services: vec![claimant("a", 1), claimant("b", 2)],
            ..Cluster::default()
        };
        let mut found = held(&wanted(&cluster));
        cluster.services.reverse();
        let findings = check(&cluster, &node(), &wanted(&cluster), &found);
        assert_eq!(findings, []);
        let shared =
            |server: &&mut VirtualServer| server.key.socket.ip() == IpAddr::from([192, 0, 2, 77]);
        let server = found.servers.list.iter_mut().find(shared);
        server.expect("the shared one").real_servers[0]
            .socket
            .set_port(8081);
        let findings = check(&cluster, &node(), &wanted(&cluster), &found);
        assert_eq!(findings.len(), 2);
        for finding in &findings {
            assert_eq!(finding.service.as_deref(), Some("ns/a, ns/b"));
        }
    }

    #[test]
    fn sets_that_differ_say_what_happens() {
        let web = Some("shop/web:http");
        one(
            &sets("add KUBE-CLUSTER-IP 10.96.10.1,tcp:80\n", ""),
            Kind::Missing,
            web,
            "KUBE-IPVS-FILTER",
        );
        one(
            &sets("tcp:80,203.0.113.0/25", "tcp:80,203.0.113.0/25 nomatch"),
            Kind::Altered,
            Some("edge/gateway:http"),
            "dropped",
        );
        one(
            &sets("add KUBE-HEALTH-CHECK-NODE-PORT 30191\n", ""),
            Kind::Missing,
            Some("edge/gateway-local:http"),
            "health checks",
        );
        one(
            &sets(
                "create KUBE-NODE-PORT-UDP bitmap:port range 0-65535\n",
                "create KUBE-NODE-PORT-UDP bitmap:port range 0-65534\n",
            ),
            Kind::Altered,
            None,
            "kube-proxy cannot make its set",
        );
        one(
            &sets(
                "add KUBE-6-IPVS-IPS fd00:10:96::1001\n",
                "add KUBE-6-IPVS-IPS fd00:10:96::1001\nadd KUBE-6-IPVS-IPS fd00:10:96::1002\n",
            ),
            Kind::Stale,
            None,
            "no Service",
        );
    }

    #[test]
    fn addresses_that_differ_say_what_happens() {
        let lifetime = "       valid_lft forever preferred_lft forever\n";
        let line = "    inet 10.96.0.1/32 scope global kube-ipvs0\n";
        let kubernetes = Some("default/kubernetes:https");
        one(
            &addresses(&format!("{line}{lifetime}"), ""),
            Kind::Missing,
            kubernetes,
            "untranslated",
        );
        one(
            &addresses("10.96.0.1/32", "10.96.0.1/24"),
            Kind::Altered,
            kubernetes,
            "network",
        );
        one(
            &addresses(
                &format!("{line}{lifetime}"),
                &format!("{line}       valid_lft 60sec preferred_lft 60sec\n"),
            ),
            Kind::Altered,
            kubernetes,
            "in 60 s",
        );
        for (from, to) in [
            ("10.96.0.1/32 scope global", "10.96.0.1/32 scope link"),
            (
                "10.96.0.1/32 scope global kube-ipvs0",
                "10.96.0.1/32 scope global eth0",
            ),
            (
                "10.96.0.1/32 scope global",
                "10.96.0.1/32 scope global deprecated",
            ),
        ] {
            one(
                &addresses(from, to),
                Kind::Altered,
                kubernetes,
                "binds it otherwise",
            );
        }
        one(
            &addresses(
                line,
                &format!("{line}{lifetime}{}", line.replace("0.1/", "9.9/")),
            ),
            Kind::Stale,
            None,
            "instead of sending",
        );
        let gone = findings(SERVERS, SETS, "");
        one(&gone, Kind::Missing, None, "any Service");
    }

    /// Every line taken out, doubled and with each of its digits changed.
    #[test]
    fn every_change_of_every_line_is_found() {
        let cluster = cluster();
        let (node, wanted) = (node(), wanted(&cluster));
        let mut changes = 0;
        for (file, text) in [SERVERS, SETS, ADDRESSES].into_iter().enumerate() {
            let lines: Vec<&str> = text.lines().collect();
            for (at, line) in lines.iter().enumerate() {
                let telling = telling_part(line);
                if telling.is_empty() {
                    continue;
                }
                let digits = telling.char_indices().filter_map(|(i, digit)| {
                    let other = (digit.to_digit(10)? + 1) % 10;
                    Some(format!("{}{other}{}", &line[..i], &line[i + 1..]))
                });
                let shown = [String::new(), format!("{line}\n{line}")];
                for new in shown.into_iter().chain(digits) {
                    changes += 1;
                    let mut lines = lines.clone();
                    lines[at] = &new;
                    let mut texts = [SERVERS, SETS, ADDRESSES].map(str::to_owned);
                    texts[file] = lines.join("\n") + "\n";
                    let Ok(found) = found(&texts[0], &texts[1], &texts[2]) else {
                        continue;
                    };
                    let findings = check(&cluster, &node, &wanted, &found);
                    assert_ne!(findings, [], "{line} -> {new}");
                    let shared = line.starts_with("create");
                    let named = findings.iter().any(|finding| finding.service.is_some());
                    assert!(named || shared, "{line} -> {new}: {findings:#?}");
                }
            }
        }
        assert!(changes > 2000, "{changes}");
    }

    /// The part of a line whose digits mean something: not those of interfaces, MAC addresses and
    /// hash tables.
    fn telling_part(line: &str) -> &str {
        if line.contains("link/ether") || line.contains("kube-ipvs0: ") {
            return "";
        }
        let end = line.find(" hashsize ").or_else(|| line.find(" scope "));
        end.map_or(line, |end| &line[..end])
    }

    proptest! {
        /// Of any cluster, what was rendered is clean, and anything taken out of it is missed.
        #[test]
        fn anything_that_is_missing_is_found(
            cluster in any_cluster(),
            at in any::<prop::sample::Index>(),
        ) {
            let node = a_node();
            let rules = render(&cluster, &node, Mode::Ipvs);
            let wanted = Wanted::of(&rules).expect("what was rendered");
            let whole = held(&wanted);
            prop_assert_eq!(check(&cluster, &node, &wanted, &whole), []);

            let mut cut: Vec<Found> = Vec::new();
            let mut without = |cut_out: &dyn Fn(&mut Found)| {
                let mut found = whole.clone();
                cut_out(&mut found);
                cut.push(found);
            };
            let mut taken = Vec::new();
            if !wanted.servers.list.is_empty() {
                let at = at.index(wanted.servers.list.len());
                taken.push(Kind::Missing);
                without(&|found| { found.servers.list.remove(at); });
                if !whole.servers.list[at].real_servers.is_empty() {
                    taken.push(Kind::Missing);
                    without(&|found| { found.servers.list[at].real_servers.pop(); });
                }
                taken.push(Kind::Altered);
                without(&|found| "lc".clone_into(&mut found.servers.list[at].scheduler));
            }
            if !wanted.addresses.is_empty() {
                let at = at.index(wanted.addresses.len());
                taken.push(Kind::Missing);
                without(&|found| { found.addresses.bound.remove(at); });
            }
            for (index, set) in whole.sets.list.iter().enumerate() {
                if !set.members.is_empty() {
                    let at = at.index(set.members.len());
                    taken.push(Kind::Missing);
                    without(&|found| { found.sets.list[index].members.remove(at); });
                }
            }
            for (found, kind) in cut.iter().zip(taken) {
                let findings = check(&cluster, &node, &wanted, found);
                prop_assert_eq!(findings.len(), 1);
                prop_assert_eq!(findings[0].kind, kind);
                prop_assert!(findings[0].service.is_some(), "{:?}", findings[0]);
            }
        }
    }
}
