//! Services by the addresses under which packets ask for them, as the node's own rules name them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};

use tracer_ebpf::path::Target;

use crate::cluster::Family;
use crate::kernel::addresses::{Attached, Bound};
use crate::kernel::clock::monotonic_ns;
use crate::rules::Mode;
use crate::rules::services::{Found, FoundService, FrontendKind};

/// How often it is remembered that a Service's rules were altered.
const ALTERED: usize = 64;
/// How many times it is remembered that nobody knows what the rules of a mode said.
const GAPS: usize = 1000;
/// How long after somebody took an address over it is still asked whether a packet went to an endpoint of who had it
/// before, ns: that was heard later than it happened.
const LATELY: u64 = 1_000_000_000;
/// How many owners of one address before the present one are remembered.
const OWNERS: usize = 8;

/// One `ServicePort`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// `ns/name:port`, or in IPVS mode, whose rules hold no names, `10.96.0.10:53/udp` or
    /// `NodePort 30080/tcp`.
    pub name: String,
    /// The mode whose rules name it, or the first of them.
    pub mode: &'static str,
    /// Where the rules of each mode send its packets, if more than one names it; else empty.
    pub by_mode: BTreeMap<&'static str, BTreeSet<SocketAddr>>,
    /// IP protocol number.
    pub protocol: u8,
    /// Is it of IPv6? What has addresses of both is here twice.
    pub ipv6: bool,
    /// Where its packets may go, by any policy of any mode.
    pub endpoints: BTreeSet<SocketAddr>,
    /// Where its packets went before, and when the rules no longer said so (`CLOCK_MONOTONIC`, ns).
    pub former: BTreeMap<SocketAddr, u64>,
    /// Do the rules still name it?
    pub there: bool,
    /// When they came to say something else of it, the last times: after the first and before the second
    /// of each two (`CLOCK_MONOTONIC`, ns).
    pub altered: VecDeque<(u64, u64)>,
}

impl Known {
    /// Do rules of this mode name it?
    pub fn is_named_by(&self, mode: &str) -> bool {
        self.mode == mode || self.by_mode.contains_key(mode)
    }

    /// Takes in what the rules of one more mode say of it, after those of the first.
    fn add(&mut self, mode: &'static str, endpoints: BTreeSet<SocketAddr>) {
        if self.by_mode.is_empty() {
            self.by_mode.insert(self.mode, self.endpoints.clone());
        }
        self.endpoints.extend(&endpoints);
        self.by_mode.entry(mode).or_default().extend(endpoints);
    }
}

/// What a `ServicePort` is called where those of IPv4 and IPv6 stand side by side.
pub fn titled(name: &str, ipv6: bool) -> String {
    // Without a name it is called by its address.
    let said = if ipv6 && !name.contains('[') {
        " (IPv6)"
    } else {
        ""
    };
    format!("{name}{said}")
}

/// Which `ServicePorts` are watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// `ns/name` or `ns/name:port`.
    Service(String),
    /// A virtual address and port.
    Vip(SocketAddr),
    /// A port of the node.
    NodePort(u16),
}

impl Choice {
    pub(super) fn takes(&self, service: &FoundService) -> bool {
        match self {
            Self::Service(wanted) => service.name.as_ref().is_some_and(|name| {
                name == wanted
                    || name
                        .rsplit_once(':')
                        .is_some_and(|(name, _)| name == wanted)
            }),
            Self::Vip(vip) => service
                .frontends
                .iter()
                .any(|frontend| frontend.address == Some(vip.ip()) && frontend.port == vip.port()),
            Self::NodePort(port) => service
                .frontends
                .iter()
                .any(|frontend| frontend.kind == FrontendKind::NodePort && frontend.port == *port),
        }
    }
}

impl std::fmt::Display for Choice {
    /// As it is written on the command line.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Service(name) => write!(f, "--service {name}"),
            Self::Vip(vip) => write!(f, "--vip {vip}"),
            Self::NodePort(port) => write!(f, "--node-port {port}"),
        }
    }
}

/// An external address of a Service that is bound on the node: packets to it end here, on any port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Absorbed {
    /// The Service's index.
    pub index: usize,
    /// The network in which another machine may have the address.
    pub attached: Option<Attached>,
}

/// Every `ServicePort` that the rules name or named since the session began.
#[derive(Clone, Debug, Default)]
pub struct Directory {
    choices: Vec<Choice>,
    services: Vec<Known>,
    by_name: HashMap<Identity, usize>,
    /// By virtual address, or the node's, port and protocol.
    frontends: HashMap<(SocketAddr, u8), (usize, Target)>,
    /// Whose those were before that others have taken over, and until when (`CLOCK_MONOTONIC`, ns), the last ones last.
    handovers: HashMap<(SocketAddr, u8), Vec<(u64, usize)>>,
    /// External and load balancer addresses that IPVS mode serves, by the rules as they are now: the first
    /// `ServicePort` of each.
    external: HashMap<IpAddr, usize>,
    /// Those that the node has bound.
    absorbed: HashMap<IpAddr, Absorbed>,
    /// What was over by then, the rules that have been learnt say (`CLOCK_MONOTONIC`, ns).
    known_ns: u64,
    /// Of which nothing has been read since they came.
    expected: BTreeSet<usize>,
    /// By mode when its rules were changed more than once between two readings, or for a while, in the order of time:
    /// what they said then nobody knows (`CLOCK_MONOTONIC`, ns).
    gaps: HashMap<&'static str, VecDeque<(u64, u64)>>,
}

impl Directory {
    /// One that takes all `ServicePorts`, or if any are chosen, those.
    pub fn new(choices: Vec<Choice>) -> Self {
        Self {
            choices,
            ..Self::default()
        }
    }

    /// What has been learnt is what the rules said at this moment (`CLOCK_MONOTONIC`, ns), or something newer.
    pub const fn read_at(&mut self, read_ns: u64) {
        self.known_ns = read_ns;
    }

    /// Takes in what the rules say now; `local` are the node's addresses, which serve NodePorts.
    ///
    /// What is no longer named stays known: packets to it go on, and now they go wrong. The rules have said
    /// so since `changed_ns` (`CLOCK_MONOTONIC`).
    pub fn learn(&mut self, found: &Found, local: &[IpAddr], changed_ns: u64) {
        let said = |known: &Known| (known.there, known.endpoints.clone());
        let before: Vec<_> = self.services.iter().map(said).collect();
        self.external.clear();
        for service in &mut self.services {
            service.there = false;
            service.by_mode.clear();
            for endpoint in std::mem::take(&mut service.endpoints) {
                service.former.insert(endpoint, changed_ns);
            }
        }
        for service in &found.services {
            if self.is_chosen(service) {
                self.learn_one(service, local, changed_ns);
            }
        }
        for service in &mut self.services {
            let Known {
                endpoints, former, ..
            } = service;
            former.retain(|endpoint, _| !endpoints.contains(endpoint));
        }
        let around = (self.known_ns, monotonic_ns());
        for (index, known) in self.services.iter_mut().enumerate() {
            let same = |(there, endpoints): &(bool, BTreeSet<SocketAddr>)| {
                *there == known.there && *endpoints == known.endpoints
            };
            if self.expected.contains(&index) || !before.get(index).is_some_and(same) {
                known.altered.truncate(ALTERED - 1);
                known.altered.push_front(around);
            }
        }
        self.expected.clear();
    }

    /// An address is this Service's from this time on.
    fn hand_over(&mut self, frontend: (SocketAddr, u8), now: (usize, Target), at_ns: u64) {
        let before = self.frontends.insert(frontend, now);
        if let Some((owner, _)) = before.filter(|(owner, _)| *owner != now.0) {
            let owners = self.handovers.entry(frontend).or_default();
            owners.push((at_ns, owner));
            if owners.len() > OWNERS {
                owners.remove(0);
            }
        }
    }

    /// Takes in a frontend or endpoints that came at this time, after the rules were read, which will tell more when they are read
    /// again. What the probes have to recognise besides: an answer will be, whoever gives it.
    pub fn expect(
        &mut self,
        service: &FoundService,
        local: &[IpAddr],
        at_ns: u64,
    ) -> Vec<(SocketAddr, u8, Target)> {
        let known = self.by_name.get(&identity_of(service)).copied();
        if known.is_none() && !self.is_chosen(service) {
            return Vec::new();
        }
        let index = known.unwrap_or_else(|| self.index_of(service));
        let known = &mut self.services[index];
        if !known.there {
            known.mode = service.mode;
            known.there = true;
            self.expected.insert(index);
        }
        let protocol = service.protocol.number();
        let mut new = Vec::new();
        for endpoint in service.endpoints.iter().copied() {
            let known = &mut self.services[index];
            if !known.endpoints.insert(endpoint) {
                continue;
            }
            known.former.remove(&endpoint);
            if let Some(of_mode) = known.by_mode.get_mut(service.mode) {
                of_mode.insert(endpoint);
            }
            self.expected.insert(index);
            if !self.frontends.contains_key(&(endpoint, protocol)) {
                new.push((endpoint, protocol, Target::Pod));
            }
        }
        for (socket, target) in sockets(service, local) {
            let before = self.frontends.get(&(socket, protocol)).copied();
            // Of two modes whoever has it by what was read keeps it until the rules are read again.
            let is_new = before.is_none_or(|(owner, _)| {
                let owner = &self.services[owner];
                !owner.there || owner.mode == service.mode
            });
            if is_new {
                self.hand_over((socket, protocol), (index, target), at_ns);
            }
            if is_new && before.is_none_or(|(_, known)| known != target) {
                new.push((socket, protocol, target));
            }
        }
        new
    }

    fn is_chosen(&self, service: &FoundService) -> bool {
        self.choices.is_empty() || self.choices.iter().any(|choice| choice.takes(service))
    }

    /// Where this Service is, which is made if it is not known yet.
    fn index_of(&mut self, service: &FoundService) -> usize {
        let identity = identity_of(service);
        if let Some(index) = self.by_name.get(&identity) {
            return *index;
        }
        let (name, protocol, ipv6) = identity.clone();
        self.services.push(Known {
            name,
            mode: service.mode,
            by_mode: BTreeMap::new(),
            protocol,
            ipv6,
            endpoints: BTreeSet::new(),
            former: BTreeMap::new(),
            there: false,
            altered: VecDeque::new(),
        });
        let index = self.services.len() - 1;
        self.by_name.insert(identity, index);
        index
    }

    fn learn_one(&mut self, service: &FoundService, local: &[IpAddr], changed_ns: u64) {
        let protocol = service.protocol.number();
        let index = self.index_of(service);
        let known = &mut self.services[index];
        let endpoints = service.endpoints.iter().chain(&service.local_endpoints);
        let endpoints: BTreeSet<SocketAddr> = endpoints.copied().collect();
        if known.there {
            known.add(service.mode, endpoints);
        } else {
            known.mode = service.mode;
            known.endpoints = endpoints;
        }
        known.there = true;
        let kinds = [FrontendKind::ExternalIp, FrontendKind::LoadBalancer];
        let external = service.frontends.iter();
        let external = external.filter(|frontend| kinds.contains(&frontend.kind));
        if service.mode == Mode::Ipvs.name() {
            for address in external.filter_map(|frontend| frontend.address) {
                self.external.entry(address).or_insert(index);
            }
        }
        for (socket, target) in sockets(service, local) {
            let owner = self.owner_of((socket, protocol), index);
            self.hand_over((socket, protocol), (owner, target), changed_ns);
        }
    }

    /// Whose an address is that this Service has, and perhaps another one by the rules of another mode: then his who
    /// has a name, or the last. Rules of either may translate packets to it.
    fn owner_of(&mut self, frontend: (SocketAddr, u8), index: usize) -> usize {
        let Some((other, _)) = self.frontends.get(&frontend) else {
            return index;
        };
        let other = *other;
        if other == index || !self.services[other].there {
            return index;
        }
        let nameless = self.services[index].mode == Mode::Ipvs.name();
        let (owner, second) = if nameless {
            (other, index)
        } else {
            (index, other)
        };
        let Known {
            mode, endpoints, ..
        } = &self.services[second];
        // Of one mode, two Services that claim one address are no two rules that translate.
        if self.services[owner].mode == *mode {
            return index;
        }
        let (mode, endpoints) = (*mode, endpoints.clone());
        self.services[owner].add(mode, endpoints);
        owner
    }

    /// Takes in the addresses that the node has bound for Services, after [`Self::learn`].
    pub fn learn_bound(&mut self, bound: Vec<Bound>) {
        let external = &self.external;
        let absorbed = bound.into_iter().filter_map(|bound| {
            let index = *external.get(&bound.address)?;
            let attached = bound.attached;
            Some((bound.address, Absorbed { index, attached }))
        });
        self.absorbed = absorbed.collect();
    }

    /// Is this an external address of a Service that the node has bound?
    pub fn absorbs(&self, address: IpAddr) -> Option<&Absorbed> {
        self.absorbed.get(&address)
    }

    /// Every such address.
    pub fn absorbed(&self) -> HashSet<IpAddr> {
        self.absorbed.keys().copied().collect()
    }

    /// The `ServicePort` that packets to this address ask for, as an index.
    pub fn asked(&self, destination: SocketAddr, protocol: u8) -> Option<usize> {
        let (index, _) = self.frontends.get(&(destination, protocol))?;
        Some(*index)
    }

    /// The same, of a packet of that time that was sent on to `headed`: where somebody else has taken the address over, the
    /// one of whose endpoints that was one, and if that does not tell, whose it was then.
    pub fn asked_at(
        &self,
        destination: SocketAddr,
        protocol: u8,
        at_ns: u64,
        headed: impl Fn() -> Option<SocketAddr>,
    ) -> Option<usize> {
        let frontend = (destination, protocol);
        let &(owner, _) = self.frontends.get(&frontend)?;
        let Some(before) = self.handovers.get(&frontend) else {
            return Some(owner);
        };
        let then = before.iter().find(|(until_ns, _)| at_ns < *until_ns);
        let then = then.map_or(owner, |(_, owner)| *owner);
        let headed = headed();
        let serves = |index: &usize| headed.is_some_and(|to| self.serves(*index, to, at_ns));
        let lately = before
            .iter()
            .rev()
            .filter(|(until_ns, _)| at_ns < until_ns.saturating_add(LATELY));
        let mut owners = [then, owner]
            .into_iter()
            .chain(lately.map(|(_, owner)| *owner));
        owners.find(serves).or(Some(then))
    }

    /// Rules of this mode were changed from then to then, and not read in between (`CLOCK_MONOTONIC`, ns).
    pub fn add_gap(&mut self, mode: &'static str, from_to: (u64, u64)) {
        let gaps = self.gaps.entry(mode).or_default();
        gaps.push_back(from_to);
        if gaps.len() > GAPS {
            gaps.pop_front();
        }
    }

    /// Is it unknown what the rules said of the Service at that time, in between of what was read before and after?
    pub fn is_uncertain(&self, index: usize, at_ns: u64) -> bool {
        let Some(known) = self.get(index) else {
            return false;
        };
        let modes = known.by_mode.keys().chain([&known.mode]);
        let mut gaps = modes.filter_map(|mode| self.gaps.get(mode)).flatten();
        gaps.any(|(from, to)| (*from..=*to).contains(&at_ns))
    }

    /// Is this an endpoint of the Service, or was it one at that time?
    pub fn serves(&self, index: usize, address: SocketAddr, at_ns: u64) -> bool {
        self.get(index).is_some_and(|known| {
            let until = known.former.get(&address);
            known.endpoints.contains(&address) || until.is_some_and(|until| at_ns < *until)
        })
    }

    /// Was this an endpoint of the Service, and is it none any more?
    pub fn served(&self, index: usize, address: SocketAddr) -> bool {
        self.get(index)
            .is_some_and(|known| known.former.contains_key(&address))
    }

    /// Has any Service lost an endpoint?
    pub fn has_former(&self) -> bool {
        self.services.iter().any(|known| !known.former.is_empty())
    }

    /// What was an endpoint of some Service, and is none of it any more: address and protocol number.
    pub fn former(&self) -> HashSet<(SocketAddr, u8)> {
        let former = self.services.iter().flat_map(|known| {
            let former = known.former.keys();
            former.map(|endpoint| (*endpoint, known.protocol))
        });
        former.collect()
    }

    /// What is known under an index.
    pub fn get(&self, index: usize) -> Option<&Known> {
        self.services.get(index)
    }

    /// Everything that is known, by index.
    pub fn services(&self) -> &[Known] {
        &self.services
    }

    /// What the probes have to recognise: frontends, and endpoints, from which answers come.
    pub fn targets(&self) -> Vec<(SocketAddr, u8, Target)> {
        let mut targets: HashMap<(SocketAddr, u8), Target> = HashMap::new();
        for service in &self.services {
            // Who was an endpoint answers old flows, and may be one again.
            for endpoint in service.endpoints.iter().chain(service.former.keys()) {
                targets.insert((*endpoint, service.protocol), Target::Pod);
            }
        }
        // Whoever is both, as a host-network endpoint on a NodePort can be, is asked as a Service.
        for (key, (_, target)) in &self.frontends {
            targets.insert(*key, *target);
        }
        targets
            .into_iter()
            .map(|((socket, protocol), target)| (socket, protocol, target))
            .collect()
    }
}

/// What tells a `ServicePort` from the others: its name, its protocol's number, and whether it is the IPv6 one.
type Identity = (String, u8, bool);

fn identity_of(service: &FoundService) -> Identity {
    let ipv6 = service.family == Family::V6;
    (name_of(service), service.protocol.number(), ipv6)
}

/// What clients of a Service send to; `local` are the node's addresses, which serve NodePorts.
fn sockets(service: &FoundService, local: &[IpAddr]) -> impl Iterator<Item = (SocketAddr, Target)> {
    let ipv6 = service.family == Family::V6;
    let of_node = local
        .iter()
        .filter(move |address| address.is_ipv6() == ipv6);
    service.frontends.iter().flat_map(move |frontend| {
        let own = frontend.address.into_iter();
        let none = frontend.address.is_none();
        let of_node = of_node.clone().copied().filter(move |_| none);
        let target = if none {
            Target::NodePort
        } else {
            target_of(frontend.kind)
        };
        let socket = move |address| (SocketAddr::new(address, frontend.port), target);
        own.chain(of_node).map(socket)
    })
}

const fn target_of(kind: FrontendKind) -> Target {
    match kind {
        FrontendKind::ClusterIp => Target::ClusterIp,
        FrontendKind::NodePort => Target::NodePort,
        FrontendKind::ExternalIp | FrontendKind::LoadBalancer | FrontendKind::External => {
            Target::External
        }
    }
}

pub(super) fn name_of(service: &FoundService) -> String {
    if let Some(name) = &service.name {
        return name.clone();
    }
    let first = service.frontends.first();
    let protocol = service.protocol;
    match first.map(|frontend| (frontend.address, frontend.port)) {
        Some((Some(address), port)) => format!("{}/{protocol}", SocketAddr::new(address, port)),
        Some((None, port)) => format!("NodePort {port}/{protocol}"),
        None => "unknown".to_owned(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cluster::Protocol;
    use crate::rules::services::Frontend;

    fn service(name: &str, vip: &str, node_port: Option<u16>, endpoint: &str) -> FoundService {
        let vip: SocketAddr = vip.parse().expect("an address");
        let mut frontends = vec![Frontend {
            kind: FrontendKind::ClusterIp,
            address: Some(vip.ip()),
            port: vip.port(),
            refusal: None,
        }];
        frontends.extend(node_port.map(|port| Frontend {
            kind: FrontendKind::NodePort,
            address: None,
            port,
            refusal: None,
        }));
        let (name, protocol) = (Some(name.to_owned()), Protocol::Tcp);
        FoundService {
            frontends,
            endpoints: vec![endpoint.parse().expect("an address")],
            ..FoundService::bare(name, "nftables", Family::V4, protocol)
        }
    }

    pub(in crate::trace) fn socket(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    /// Of `shop/web:http`, as [`found`] has it.
    pub(in crate::trace) fn known() -> Known {
        let mut directory = Directory::new(Vec::new());
        directory.learn(&found(), &[], 0);
        directory.services()[0].clone()
    }

    pub(in crate::trace) fn found() -> Found {
        Found {
            services: vec![
                service(
                    "shop/web:http",
                    "10.96.0.1:80",
                    Some(30080),
                    "10.244.0.2:8080",
                ),
                service("shop/web:admin", "10.96.0.1:81", None, "10.244.0.2:8081"),
                service("shop/webb:http", "10.96.0.2:80", None, "10.244.0.3:8080"),
            ],
            ..Found::default()
        }
    }

    #[test]
    fn services_are_known_by_their_addresses() {
        let mut directory = Directory::new(Vec::new());
        directory.learn(&found(), &["192.0.2.1".parse().expect("an address")], 0);
        let name = |to: &str| {
            let index = directory.asked(socket(to), 6)?;
            Some(directory.get(index)?.name.as_str())
        };
        assert_eq!(name("10.96.0.1:80"), Some("shop/web:http"));
        assert_eq!(name("192.0.2.1:30080"), Some("shop/web:http"));
        assert_eq!(name("10.96.0.1:82"), None);
        assert_eq!(directory.asked(socket("10.96.0.1:80"), 17), None);
        assert_eq!(directory.targets().len(), 3 + 1 + 3);
    }

    /// What IPVS mode binds for a Service that is known from outside, as the rules say it at the moment.
    #[test]
    fn only_external_addresses_that_are_bound_are_absorbed() {
        let mut ipvs = found();
        for service in &mut ipvs.services {
            service.mode = "ipvs";
        }
        let external = |at: usize, kind, address: &str, found: &mut Found| {
            let frontend = Frontend {
                kind,
                address: Some(address.parse().expect("an address")),
                ..found.services[at].frontends[0]
            };
            found.services[at].frontends.push(frontend);
        };
        let mut nftables = found();
        for found in [&mut ipvs, &mut nftables] {
            external(1, FrontendKind::ExternalIp, "192.0.2.7", found);
            external(2, FrontendKind::ExternalIp, "192.0.2.7", found);
            external(2, FrontendKind::LoadBalancer, "198.51.100.9", found);
        }
        let bound = || {
            let attached = Attached {
                network: "192.0.2.0/24".parse().expect("a network"),
                link: "eth0".to_owned(),
            };
            let bound = |address: &str, attached| Bound {
                address: address.parse().expect("an address"),
                attached,
            };
            vec![
                bound("10.96.0.1", None),
                bound("192.0.2.7", Some(attached)),
                bound("198.51.100.9", None),
            ]
        };
        let absorbs = |directory: &Directory, address: &str| {
            let absorbed = directory.absorbs(address.parse().expect("an address"))?;
            Some((absorbed.index, absorbed.attached.is_some()))
        };
        let mut directory = Directory::new(Vec::new());
        directory.learn(&ipvs, &[], 0);
        directory.learn_bound(bound());
        assert_eq!(absorbs(&directory, "10.96.0.1"), None);
        assert_eq!(absorbs(&directory, "192.0.2.7"), Some((1, true)));
        assert_eq!(absorbs(&directory, "198.51.100.9"), Some((2, false)));
        // In another mode nothing that is bound is the rules' doing; and what goes is forgotten.
        directory.learn(&nftables, &[], 1);
        directory.learn_bound(bound());
        assert!(directory.absorbed().is_empty());
        directory.learn(&ipvs, &[], 2);
        directory.learn_bound(Vec::new());
        assert!(directory.absorbed().is_empty());
    }

    /// Rules of one mode that are left over beside those of another.
    #[test]
    fn rules_of_two_modes_name_one_service() {
        let with = |mode: &'static str, endpoint: &str| {
            let mut found = found();
            found.services.truncate(1);
            found.services[0].mode = mode;
            found.services[0].endpoints = vec![socket(endpoint)];
            found.services
        };
        let mut both = Found {
            services: with("iptables-legacy", "10.244.0.9:8080"),
            ..Found::default()
        };
        both.services.extend(with("nftables", "10.244.0.2:8080"));
        let mut of_ipvs = with("ipvs", "10.244.0.8:8080").remove(0);
        of_ipvs.name = None;
        both.services.push(of_ipvs);
        let mut directory = Directory::new(Vec::new());
        // Twice: what is read again is as it was.
        for _ in 0..2 {
            directory.learn(&both, &["192.0.2.1".parse().expect("an address")], 0);
            let index = directory.asked(socket("10.96.0.1:80"), 6).expect("known");
            let by_port = directory.asked(socket("192.0.2.1:30080"), 6);
            assert_eq!(by_port, Some(index));
            let known = directory.get(index).expect("known");
            assert_eq!(known.name, "shop/web:http");
            let modes: Vec<_> = known.by_mode.iter().collect();
            let one = |endpoint: &str| BTreeSet::from([socket(endpoint)]);
            let wanted = [
                ("iptables-legacy", one("10.244.0.9:8080")),
                ("ipvs", one("10.244.0.8:8080")),
                ("nftables", one("10.244.0.2:8080")),
            ];
            let wanted: Vec<_> = wanted.iter().map(|(mode, set)| (mode, set)).collect();
            assert_eq!(modes, wanted);
            assert_eq!(known.endpoints.len(), 3);
            assert!(known.is_named_by("ipvs") && !known.is_named_by("iptables-nft"));
        }
        // One goes: what it said alone is no more.
        both.services.truncate(1);
        directory.learn(&both, &[], 5);
        let known = directory.get(0).expect("known");
        assert!(known.by_mode.is_empty() && known.mode == "iptables-legacy");
        assert_eq!(known.endpoints, [socket("10.244.0.9:8080")].into());
        assert!(directory.served(0, socket("10.244.0.2:8080")));
    }

    #[test]
    fn what_is_gone_stays_known() {
        let mut directory = Directory::new(Vec::new());
        directory.learn(&found(), &[], 0);
        directory.learn(&Found::default(), &[], 0);
        let index = directory.asked(socket("10.96.0.2:80"), 6).expect("known");
        assert!(!directory.get(index).expect("known").there);
        directory.learn(&found(), &[], 0);
        assert!(directory.get(index).expect("known").there);
        assert_eq!(directory.services().len(), 3);
    }

    /// A Service comes, is asked, and is read of later.
    #[test]
    fn what_comes_is_known_by_its_frontend() {
        let mut all = found();
        let last = all.services.pop().expect("three");
        let node: IpAddr = "192.0.2.1".parse().expect("an address");
        let mut directory = Directory::new(Vec::new());
        directory.learn(&all, &[node], 0);
        let arriving = |frontend: Frontend| FoundService {
            frontends: vec![frontend],
            endpoints: Vec::new(),
            ..last.clone()
        };
        let frontend = last.frontends[0];
        let vip = SocketAddr::new(frontend.address.expect("a virtual IP"), frontend.port);
        let protocol = last.protocol.number();
        assert_eq!(
            directory.expect(&arriving(frontend), &[node], 40),
            [(vip, protocol, Target::ClusterIp)]
        );
        let index = directory.asked(vip, protocol).expect("known");
        let known = directory.get(index).expect("known");
        assert!(known.there && known.endpoints.is_empty() && known.altered.is_empty());
        // Nothing new; then a port of the node.
        assert!(
            directory
                .expect(&arriving(frontend), &[node], 40)
                .is_empty()
        );
        let port = Frontend {
            kind: FrontendKind::NodePort,
            address: None,
            port: 30099,
            refusal: None,
        };
        let by_node = SocketAddr::new(node, 30099);
        assert_eq!(
            directory.expect(&arriving(port), &[node], 40),
            [(by_node, protocol, Target::NodePort)]
        );
        assert_eq!(directory.asked(by_node, protocol), Some(index));
        // Endpoints, of which one goes again before the rules are read: it was one.
        let endpoint = |last: u8| SocketAddr::from(([10, 244, 9, last], 8080));
        for one in [1, 2] {
            let endpoints = FoundService {
                frontends: Vec::new(),
                endpoints: vec![endpoint(one)],
                ..last.clone()
            };
            assert_eq!(
                directory.expect(&endpoints, &[node], 40),
                [(endpoint(one), protocol, Target::Pod)]
            );
        }
        let mut then = found();
        then.services[2].endpoints = vec![endpoint(2)];
        directory.learn(&then, &[node], 50);
        let known = directory.get(index).expect("known");
        assert!(known.there && known.altered.len() == 1);
        assert!(
            directory.serves(index, endpoint(1), 49) && !directory.serves(index, endpoint(1), 50)
        );
        assert!(directory.serves(index, endpoint(2), 60));
        // Somebody else of this mode takes its address over; of another, not yet.
        let mut other = arriving(frontend);
        other.name = Some("shop/other:http".to_owned());
        let arriving_other = other.clone();
        let with = |mode| FoundService {
            mode,
            ..arriving_other.clone()
        };
        assert!(directory.expect(&with("ipvs"), &[node], 60).is_empty());
        assert_eq!(directory.asked(vip, protocol), Some(index));
        assert!(directory.expect(&other, &[node], 60).is_empty());
        let other = directory.asked(vip, protocol).expect("known");
        assert_ne!(other, index);
        // Whose a packet is, its endpoint tells, or else its time.
        let to =
            |at_ns, to: Option<u8>| directory.asked_at(vip, protocol, at_ns, || to.map(endpoint));
        assert_eq!((to(59, None), to(60, None)), (Some(index), Some(other)));
        assert_eq!(
            (to(59, Some(7)), to(61, Some(2))),
            (Some(index), Some(index))
        );
        assert_eq!(to(60 + LATELY, Some(2)), Some(other));
        let mut one = Directory::new(vec![Choice::Service("shop/web".to_owned())]);
        one.learn(&all, &[node], 0);
        assert!(one.expect(&arriving_other, &[node], 60).is_empty());
    }

    #[test]
    fn in_a_gap_nobody_knows_what_the_rules_said() {
        let mut directory = Directory::new(Vec::new());
        directory.learn(&found(), &[], 0);
        directory.add_gap("ipvs", (1, 100));
        directory.add_gap("nftables", (5, 7));
        for (at_ns, uncertain) in [(4, false), (5, true), (7, true), (8, false)] {
            assert_eq!(directory.is_uncertain(0, at_ns), uncertain, "{at_ns}");
        }
        assert!(!directory.is_uncertain(9, 6));
    }

    #[test]
    fn it_is_known_around_when_rules_were_altered() {
        let mut directory = Directory::new(Vec::new());
        directory.learn(&found(), &[], 0);
        let after = |directory: &Directory| -> Vec<u64> {
            let known = directory.get(0).expect("known");
            known
                .altered
                .iter()
                .map(|(after_ns, _)| *after_ns)
                .collect()
        };
        // The same; then it is gone; then others are back, and then it is.
        directory.learn(&found(), &[], 7);
        directory.read_at(5);
        assert_eq!(after(&directory), [0]);
        directory.learn(&Found::default(), &[], 9);
        directory.read_at(9);
        assert_eq!(after(&directory), [5, 0]);
        let mut others = found();
        others.services.remove(0);
        directory.learn(&others, &[], 12);
        directory.read_at(12);
        assert_eq!(after(&directory), [5, 0]);
        directory.learn(&found(), &[], 13);
        assert_eq!(after(&directory), [12, 5, 0]);
    }

    #[test]
    fn what_is_chosen_is_watched() {
        let count = |choice| {
            let mut directory = Directory::new(vec![choice]);
            directory.learn(&found(), &[], 0);
            directory.services().len()
        };
        assert_eq!(count(Choice::Service("shop/web".to_owned())), 2);
        assert_eq!(count(Choice::Service("shop/web:http".to_owned())), 1);
        assert_eq!(count(Choice::Service("shop/we".to_owned())), 0);
        assert_eq!(count(Choice::Vip(socket("10.96.0.2:80"))), 1);
        assert_eq!(count(Choice::NodePort(30080)), 1);
        assert_eq!(count(Choice::NodePort(30081)), 0);
    }
}
