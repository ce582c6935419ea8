//! One packet is one journey, and both directions are one flow: in both families, of TCP, UDP, SCTP and the
//! ICMP errors about them, in parts, in large segments, beside captures, back to where it came from.
//!
//! Everything is sent to one node while one session (or one of each tier) looks on. Then every flow must have
//! been told as it was.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType};
use socket2::{Domain, Socket, Type};
use tracer::cluster::{Cluster, Endpoint, Family, Protocol};
use tracer::kernel::link::{Batch, Mac};
use tracer::kernel::netns::Netns;
use tracer::kernel::sysctl;
use tracer::lab::topology::LabOptions;
use tracer::lab::{Outcome, plan};
use tracer::probe::tier::Tier;
use tracer::record::run::PacketState;
use tracer::rules::Mode;
use tracer::scenario::node::TestNode;
use tracer::trace::flows::{Decided, Key};
use tracer::trace::journey::Journey;
use tracer::trace::session::{Event, Session};
use tracer::trace::summary::Summary;
use tracer::trace::verdict::{Verdict, Who};
use tracer_ebpf::path::{Origin, Path, Target};
use tracer_ebpf::record::{protocol, sctp};

use crate::sctp::End as Association;
use crate::trace::{on_one_thread, options, send_to};
use crate::truth::assert_nothing_was_missed;
use crate::verdicts::run;

/// Longer than anything here takes on a machine under load.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longer than a session's end waits for an answer.
const SILENCE: Duration = Duration::from_millis(1100);
/// Where our own servers listen, of which the laboratory's know nothing.
const SERVED: u16 = 7000;
/// Nobody listens here.
const CLOSED: u16 = 9;
/// More than a link takes at once.
const LARGE: usize = 4000;

// The laboratory's Services, by who is behind them: even ones are TCP, odd ones UDP, but the first ten.
/// Behind node2: see [`BEYOND`].
const ERRORS: usize = 0;
/// SCTP.
const ASSOCIATED: usize = 6;
const ABORTED: usize = 7;
const WITHOUT_ASSOCIATION: usize = 8;
const UNASSOCIATED: usize = 9;
const WITHOUT_ENDPOINTS: [usize; 2] = [10, 11];
const NOBODY_LISTENS: [usize; 2] = [12, 13];
const SILENT: [usize; 2] = [14, 15];
const SEGMENTS: usize = 16;
const PARTS: usize = 17;
const AGAIN: [usize; 2] = [18, 19];
const HAIRPIN: usize = 21;
const OF_NODE: usize = 23;
const ANSWERS: usize = 25;
const ANSWERS_NOT: usize = 27;
/// Served by the laboratory.
const HEALTHY: [usize; 8] = [20, 22, 24, 26, 28, 29, 30, 31];
const SERVICES: u32 = 32;

/// What the node and its links are to have besides.
#[derive(Clone, Copy, Debug, Default)]
pub struct Beside {
    /// Captures in every namespace: the kernel clones what they see.
    pub captures: bool,
    /// Links of the node that take no large segments: the kernel cuts them up behind the last hook.
    pub cut: bool,
}

/// Every flow is told as it was, by each of these tiers at once.
pub fn every_flow_is_told_as_it_was(mode: Mode, tiers: &[Tier], beside: Beside) {
    let lab = Laboratory::build(mode);
    if beside.cut {
        let mut links = Batch::new(lab.node.lab.node());
        for link in ["ext0", "pod-client", "pod-0"] {
            links.line(format!("link set {link} gso_max_size 3000"));
        }
        links.apply().expect("links");
    }
    let captures = beside.captures.then(|| lab.captures());
    let sessions: Vec<_> = tiers
        .iter()
        .map(|tier| {
            let options = options(Vec::new(), *tier);
            Session::start(lab.node.lab.node(), options).expect("attaches")
        })
        .collect();
    let mut sent = Sent::default();
    healthy(&lab, &mut sent);
    faults(&lab, &mut sent);
    associations(&lab, &mut sent);
    errors(&lab, &mut sent);
    parts(&lab, &mut sent);
    segments(&lab, &mut sent);
    way_back(&lab, &mut sent);
    one_port_of_many(&lab, &mut sent);
    one_port_again(&lab, &mut sent);
    std::thread::sleep(SILENCE);
    for session in sessions {
        let told = Told::by(session);
        for expected in &sent.expected {
            expected.check(&lab, &told);
        }
        let flows = sent.expected.iter().map(|one| one.verdicts.len() as u64);
        assert_eq!(told.flows(), flows.sum::<u64>(), "{mode}: {}", told.summary);
        told.check_packets(mode);
    }
    for capture in captures.iter().flatten() {
        let captured = nix::unistd::read(capture, &mut [0; 2 * LARGE]).expect("frames");
        assert!(captured > 0);
    }
}

/// What has to be told of the flows between two ends.
#[derive(Debug)]
struct Expected {
    key: Key,
    path: &'static str,
    /// What became of them, in order.
    verdicts: Vec<Verdict>,
    /// Where they were sent.
    headed: Option<SocketAddr>,
    /// Did they seem to come from the node?
    masqueraded: Option<bool>,
    /// May first packets be sent once more? That of TCP is, whatever its client wants.
    repeated: bool,
}

impl Expected {
    fn new(key: Key, path: &'static str, verdict: Verdict) -> Self {
        let answered = verdict == Verdict::Delivered;
        Self {
            key,
            path,
            verdicts: vec![verdict],
            headed: None,
            masqueraded: None,
            repeated: key.protocol == protocol::TCP && !answered,
        }
    }

    fn check(&self, lab: &Laboratory, told: &Told) {
        let key = (self.key.protocol, self.key.source, self.key.destination);
        let context = || format!("{} {} {self:?}\n{}", lab.mode, told.tier, told.summary);
        let verdicts = told.decided.get(&key).into_iter().flatten();
        let verdicts: Vec<_> = verdicts.map(|one| one.verdict.clone()).collect();
        assert_eq!(verdicts, self.verdicts, "{}", context());
        let of_flow =
            |journey: &&Journey| (journey.protocol, journey.source, journey.destination) == key;
        let journeys: Vec<_> = told.journeys.iter().filter(of_flow).collect();
        if self.repeated {
            assert!(journeys.len() >= self.verdicts.len(), "{}", context());
        } else {
            assert_eq!(journeys.len(), self.verdicts.len(), "{}", context());
        }
        for journey in journeys {
            assert_eq!(journey.path, self.path, "{}", context());
            if self.headed.is_some() {
                assert_eq!(journey.headed, self.headed, "{}", context());
            }
            if let Some(masqueraded) = self.masqueraded {
                let from = journey.source_after.expect("known");
                let by_node = lab.is_of_node(from.ip());
                let told = (from != journey.source && by_node, from == journey.source);
                let wanted = (masqueraded, !masqueraded);
                assert_eq!(told, wanted, "{journey:#?}\n{}", context());
            }
        }
    }
}

/// What was sent, and sockets that have to stay open until all is told.
#[derive(Default)]
struct Sent {
    expected: Vec<Expected>,
    kept: Vec<Box<dyn Any>>,
}

impl Sent {
    fn expect(&mut self, expected: Expected) {
        self.expected.push(expected);
    }

    fn keep(&mut self, socket: impl Any) {
        self.kept.push(Box::new(socket));
    }
}

/// A dual-stack node, its pods and what is beyond it.
struct Laboratory {
    mode: Mode,
    node: TestNode,
    far: Netns,
}

impl Laboratory {
    fn build(mode: Mode) -> Self {
        let options = LabOptions {
            dual_stack: true,
            ..LabOptions::default()
        };
        let mut node = TestNode::build_with(SERVICES, 1, options).expect("a laboratory");
        set_services(&mut node.cluster);
        on_one_thread(node.apply(mode)).expect("rules");
        let far = route_beyond(&node);
        // IPv6 sends errors from an address only if it is a link's.
        let mut pod = Batch::new(&node.lab.server_pods()[0]);
        pod.line(format!(
            "addr add {}/128 dev eth0 nodad",
            in_pod(20, 0)[1].ip()
        ));
        pod.apply().expect("an address");
        silence(&node);
        Self { mode, node, far }
    }

    /// The pod that our own servers are in.
    fn pod(&self) -> &Netns {
        &self.node.lab.server_pods()[0]
    }

    /// One in each namespace, of all its links.
    fn captures(&self) -> Vec<OwnedFd> {
        let lab = &self.node.lab;
        let everywhere = [lab.node(), lab.external(), lab.node2(), lab.client_pod()];
        let capture = || {
            let flags = SockFlag::SOCK_CLOEXEC;
            let every = SockProtocol::EthAll;
            nix::sys::socket::socket(AddressFamily::Packet, SockType::Raw, flags, every)
        };
        let all = everywhere.into_iter().chain([self.pod()]);
        all.map(|ns| ns.run(capture).expect("enters").expect("root"))
            .collect()
    }

    /// Has the node this address? In IPVS mode it has every ClusterIP, and masquerades with one of IPv6 where
    /// the link has no address.
    fn is_of_node(&self, address: IpAddr) -> bool {
        let of_links = [plan::LINK_ADDRESS.base, plan::LINK_ADDRESS6.base];
        let mut services = self.node.cluster.services.iter();
        of_links.contains(&address)
            || plan::node_address(Family::of(address)) == address
            || services.any(|one| one.cluster_ips.contains(&address))
    }
}

/// Who is behind each Service.
fn set_services(cluster: &mut Cluster) {
    let node_port = |service: usize| u16::try_from(service).ok().map(|at| 31_000 + at);
    for (at, (protocol, host)) in BEYOND.into_iter().enumerate() {
        serve_by(cluster, ERRORS + at, beyond(host));
        cluster.services[ERRORS + at].ports[0].protocol = protocol;
    }
    for service in ASSOCIATED..=UNASSOCIATED {
        cluster.services[service].ports[0].protocol = Protocol::Sctp;
    }
    // TCP and UDP share NodePorts, and these are neither alternately.
    for service in 0..=UNASSOCIATED {
        cluster.services[service].ports[0].node_port = node_port(service);
    }
    for service in WITHOUT_ENDPOINTS.into_iter().chain([WITHOUT_ASSOCIATION]) {
        cluster.services[service].ports[0].endpoints.clear();
    }
    for service in NOBODY_LISTENS {
        serve_by(cluster, service, in_pod(20, CLOSED));
    }
    for service in SILENT {
        serve_by(cluster, service, silent());
    }
    let of_node = Family::ALL.map(|family| SocketAddr::new(plan::node_address(family), SERVED));
    serve_by(cluster, OF_NODE, of_node);
    for (service, host) in [
        (ASSOCIATED, 21),
        (ABORTED, 22),
        (UNASSOCIATED, 23),
        (SEGMENTS, 24),
        (PARTS, 25),
        (AGAIN[0], 26),
        (AGAIN[1], 26),
        (HAIRPIN, 27),
        (ANSWERS, 28),
        (ANSWERS_NOT, 29),
    ] {
        serve_by(cluster, service, in_pod(host, SERVED));
    }
}

/// The only endpoint of a Service in each family from now on.
fn serve_by(cluster: &mut Cluster, service: usize, endpoints: [SocketAddr; 2]) {
    let endpoints = endpoints.map(|to| Endpoint::ready(to.ip(), to.port(), plan::NODE));
    cluster.services[service].ports[0].endpoints = endpoints.to_vec();
}

/// An address of the first server pod, with a port.
fn in_pod(host: u32, port: u16) -> [SocketAddr; 2] {
    Family::ALL.map(|family| SocketAddr::new(plan::server_pod(0, family).nth(host), port))
}

/// An endpoint of node2 from which nothing comes.
fn silent() -> [SocketAddr; 2] {
    [plan::NODE2_SERVERS, plan::NODE2_SERVERS6].map(|range| SocketAddr::new(range.nth(100), CLOSED))
}

fn silence(node: &TestNode) {
    let mut drops = "add table inet silence; \
        add chain inet silence in { type filter hook prerouting priority -300; };"
        .to_owned();
    for (family, address) in ["ip", "ip6"].iter().zip(silent()) {
        // Writing into a String cannot fail.
        let _ = write!(
            drops,
            "add rule inet silence in {family} daddr {} drop;",
            address.ip()
        );
    }
    run(node.lab.node2(), "nft", &[&drops]);
}

/// Who asks, and for what kind of address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Client {
    path: Path,
    family: Family,
}

impl Client {
    /// The paths to Services, in both families.
    fn all() -> impl Iterator<Item = Self> {
        Self::by(Path::SERVICE)
    }

    fn by<const N: usize>(paths: [Path; N]) -> impl Iterator<Item = Self> {
        Family::ALL
            .into_iter()
            .flat_map(move |family| paths.map(|path| Self { path, family }))
    }

    fn ns(self, lab: &Laboratory) -> &Netns {
        let lab = &lab.node.lab;
        match self.path.origin {
            Origin::Pod => lab.client_pod(),
            Origin::Host => lab.node(),
            Origin::External => lab.external(),
        }
    }

    fn address(self) -> IpAddr {
        match (self.path.origin, self.family) {
            (Origin::Pod, Family::V4) => plan::CLIENT_POD.nth(1),
            (Origin::Pod, Family::V6) => plan::CLIENT_POD6.nth(1),
            (Origin::Host, family) => plan::node_address(family),
            (Origin::External, Family::V4) => plan::EXTERNAL_ADDRESS.base,
            (Origin::External, Family::V6) => plan::EXTERNAL_ADDRESS6.base,
        }
    }

    /// What it asks a Service for.
    fn asks(self, lab: &Laboratory, service: usize) -> SocketAddr {
        let service = &lab.node.cluster.services[service];
        let port = &service.ports[0];
        if self.path.target == Target::NodePort {
            let node_port = port.node_port.expect("one");
            return SocketAddr::new(plan::node_address(self.family), node_port);
        }
        let mut addresses = service.cluster_ips.iter();
        let address = addresses.find(|address| Family::of(**address) == self.family);
        SocketAddr::new(*address.expect("dual stack"), port.port)
    }

    fn udp(self, lab: &Laboratory, port: u16) -> UdpSocket {
        udp(self.ns(lab), SocketAddr::new(self.address(), port))
    }

    /// The one of this client's family.
    fn of<T>(self, both: &[T; 2]) -> &T {
        &both[usize::from(self.family == Family::V6)]
    }

    fn key(self, protocol: u8, port: u16, destination: SocketAddr) -> Key {
        Key {
            protocol,
            source: SocketAddr::new(self.address(), port),
            destination,
        }
    }
}

fn udp(ns: &Netns, address: SocketAddr) -> UdpSocket {
    let bind = || UdpSocket::bind(address).expect("binds");
    let socket = ns.run(bind).expect("enters");
    socket.set_read_timeout(Some(PATIENCE)).expect("is set");
    socket
}

/// Packets from one end to the other and back.
fn exchange(client: &UdpSocket, to: SocketAddr, server: &UdpSocket, payload: &[u8]) {
    let mut buffer = vec![0; 2 * LARGE];
    client.send_to(payload, to).expect("sends");
    let (length, from) = server.recv_from(&mut buffer).expect("is asked");
    assert_eq!(length, payload.len());
    server.send_to(payload, from).expect("answers");
    let (length, by) = client.recv_from(&mut buffer).expect("an answer");
    assert_eq!((length, by), (payload.len(), to));
}

/// Sends a first packet to a Service, with this payload if it is UDP, and with a socket that was changed before;
/// what has to be kept open.
fn ask(
    lab: &Laboratory,
    client: Client,
    service: usize,
    payload: &[u8],
    change: impl FnOnce(&Socket),
) -> (Key, Socket) {
    let to = client.asks(lab, service);
    let of = lab.node.cluster.services[service].ports[0].protocol;
    let kind = match of {
        Protocol::Tcp => Type::STREAM,
        _ => Type::DGRAM,
    };
    let open = || Socket::new(Domain::for_address(to), kind, None);
    let socket = client.ns(lab).run(open).expect("enters").expect("opens");
    let from = SocketAddr::new(client.address(), 0);
    socket.bind(&from.into()).expect("binds");
    socket.set_nonblocking(true).expect("is set");
    change(&socket);
    // What becomes of it is what the probes are asked.
    let _ = socket.connect(&to.into());
    if of == Protocol::Udp {
        let _ = socket.send(payload);
    }
    let source = socket.local_addr().expect("bound");
    let key = Key {
        protocol: of.number(),
        source: source.as_socket().expect("an address"),
        destination: to,
    };
    (key, socket)
}

/// What a session told.
struct Told {
    tier: Tier,
    journeys: Vec<Journey>,
    decided: BTreeMap<(u8, SocketAddr, SocketAddr), Vec<Decided>>,
    summary: Summary,
}

impl Told {
    fn by(session: Session) -> Self {
        let tier = session.tier();
        let (events, summary) = session.finish().expect("ends");
        let mut told = Self {
            tier,
            journeys: Vec::new(),
            decided: BTreeMap::new(),
            summary,
        };
        for event in events {
            match event {
                Event::Journey(journey) if journey.first != Some(false) => {
                    told.journeys.push(journey);
                }
                Event::Verdict(decided) => {
                    let key = (decided.protocol, decided.source, decided.destination);
                    told.decided.entry(key).or_default().push(decided);
                }
                _ => {}
            }
        }
        assert_nothing_was_missed(&told.summary);
        told
    }

    fn flows(&self) -> u64 {
        self.summary.services.iter().map(|one| one.flows).sum()
    }

    /// Packets of a path whose times were taken, by what conntrack said of them.
    fn packets(&self, path: Path, state: PacketState) -> u64 {
        let mut paths = self.summary.paths.iter();
        let path = paths.find(|one| one.path == path.title());
        let node = path.and_then(|path| path.node.get(&state));
        node.map_or(0, |times| times.count)
    }

    /// As many packets in parts as were sent, and fewer large segments than links' packets would be.
    fn check_packets(&self, mode: Mode) {
        let context = format!("{mode} {}: {}", self.tier, self.summary);
        // Of both families, there and back.
        let flows = 2 * u64::from(FLOWS);
        for path in ONLY_PARTS {
            let packets = [
                PacketState::New,
                PacketState::Established,
                PacketState::Reply,
            ]
            .map(|state| self.packets(path, state));
            let wanted = [flows, flows * (DATAGRAMS - 1), flows * DATAGRAMS];
            assert_eq!(packets, wanted, "{context}");
        }
        let there = self.packets(Path::SERVICE[2], PacketState::Established);
        let back = self.packets(Path::SERVICE[2], PacketState::Reply);
        // Packets that only acknowledge are among them: one for two of a link's packets at least.
        let cut = (4 * BYTES / 1500) as u64;
        let cut = cut + cut / 4;
        assert!(
            there + back < cut,
            "{there} there, {back} back, not fewer than {cut}: {context}"
        );
    }
}

/// By every path, answered by the laboratory's servers.
fn healthy(lab: &Laboratory, sent: &mut Sent) {
    let services = HEALTHY.map(|service| lab.node.cluster.services[service].clone());
    let cluster = Cluster {
        services: services.to_vec(),
        ..lab.node.cluster.clone()
    };
    for family in Family::ALL {
        let result = send_to(&lab.node, &cluster, family, 10, 1);
        for flow in result.flows {
            let Outcome::Delivered { by } = flow.outcome else {
                panic!("{} {}", lab.mode, flow.outcome);
            };
            let key = Key {
                protocol: flow.protocol.number(),
                source: flow.source,
                destination: flow.destination,
            };
            sent.expect(Expected {
                headed: Some(by),
                masqueraded: match flow.path.origin {
                    Origin::Pod => Some(false),
                    // Masqueraded too, often with the same address and port.
                    Origin::Host => None,
                    Origin::External => Some(true),
                },
                ..Expected::new(key, flow.path.title(), Verdict::Delivered)
            });
        }
    }
}

/// No endpoints, nobody who listens, nobody who answers.
fn faults(lab: &Laboratory, sent: &mut Sent) {
    for client in Client::all() {
        let by = Who::Endpoint(*client.of(&in_pod(20, CLOSED)));
        let how = || "port unreachable".to_owned();
        let refused = Verdict::Rejected {
            by: Who::Node,
            how: how(),
        };
        let silent = Verdict::Unanswered { stray: None };
        for (services, verdicts) in [
            (WITHOUT_ENDPOINTS, [refused.clone(), refused]),
            (
                NOBODY_LISTENS,
                [Verdict::Reset { by }, Verdict::Rejected { by, how: how() }],
            ),
            (SILENT, [silent.clone(), silent]),
        ] {
            for (service, verdict) in services.into_iter().zip(verdicts) {
                let (key, socket) = ask(lab, client, service, b"1\n", |_| {});
                sent.expect(Expected::new(key, client.path.title(), verdict));
                sent.keep(socket);
            }
        }
    }
}

/// SCTP: an association that is answered, one that is aborted, one without endpoints, one that nobody answers.
fn associations(lab: &Laboratory, sent: &mut Sent) {
    let ends = |host| in_pod(host, SERVED).map(|end| Association::bind(lab.pod(), end, PATIENCE));
    let [associated, aborting, silent] = [21, 22, 23].map(ends);
    for (at, client) in (0..).zip(Client::all()) {
        for (which, service) in (0..).zip(ASSOCIATED..=UNASSOCIATED) {
            let port = 40_000 + at * 10 + which;
            let address = SocketAddr::new(client.address(), port);
            let end = Association::bind(client.ns(lab), address, PATIENCE);
            let to = client.asks(lab, service);
            end.init(to);
            let answers = match service {
                ASSOCIATED => Some((client.of(&associated), sctp::INIT_ACK)),
                ABORTED => Some((client.of(&aborting), sctp::ABORT)),
                _ => None,
            };
            if let Some((server, how)) = answers {
                server.answer(how);
                assert_eq!(end.receive(), (to, how), "{} {client:?}", lab.mode);
            }
            let verdict = match service {
                ASSOCIATED => Verdict::Delivered,
                ABORTED => Verdict::Reset {
                    by: Who::Endpoint(*client.of(&in_pod(22, SERVED))),
                },
                WITHOUT_ASSOCIATION => Verdict::Rejected {
                    by: Who::Node,
                    how: "port unreachable".to_owned(),
                },
                _ => Verdict::Unanswered { stray: None },
            };
            let key = client.key(protocol::SCTP, port, to);
            sent.expect(Expected::new(key, client.path.title(), verdict));
            sent.keep(end);
        }
    }
    sent.keep(silent);
}

// Hosts behind node2, by what becomes of packets to them.
const UNREACHABLE: u32 = 1;
const PROHIBITED: u32 = 2;
const EXPIRED: u32 = 3;
const REFUSED: u32 = 4;
/// Its link takes less than a packet of [`TOO_LONG`] bytes.
const NARROW: u32 = 5;
/// Payload of a packet that the node's links take, and the narrow one does not.
const TOO_LONG: usize = 1400;
/// Who is behind each Service. A router sends at most 50 errors at once (`icmp_msgs_burst`).
const BEYOND: [(Protocol, u32); 6] = [
    (Protocol::Tcp, UNREACHABLE),
    (Protocol::Udp, UNREACHABLE),
    (Protocol::Udp, PROHIBITED),
    (Protocol::Udp, EXPIRED),
    (Protocol::Udp, REFUSED),
    (Protocol::Udp, NARROW),
];

/// Addresses behind node2, which is a router for them.
fn beyond(host: u32) -> [SocketAddr; 2] {
    let v4 = IpAddr::from([198, 51, 100, u8::try_from(host).expect("small")]);
    let v6 = Ipv6Addr::new(
        0x2001,
        0xdb8,
        0,
        9,
        0,
        0,
        0,
        u16::try_from(host).expect("small"),
    );
    [v4, v6.into()].map(|address| SocketAddr::new(address, SERVED))
}

/// Makes node2 a router with networks behind it; who answers there at the narrow link's end.
fn route_beyond(node: &TestNode) -> Netns {
    let far = Netns::create("beyond").expect("root");
    let mut batch = Batch::new(node.lab.node());
    batch.line(format!(
        "route add 198.51.100.0/24 via {}",
        plan::NODE2_ADDRESS.base
    ));
    batch.line(format!(
        "route add 2001:db8:0:9::/64 via {}",
        plan::NODE2_ADDRESS6.base
    ));
    batch.apply().expect("routes");
    let node2 = node.lab.node2();
    for (key, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        // Every error is sent.
        ("net/ipv4/icmp_ratelimit", "0"),
        ("net/ipv6/icmp/ratelimit", "0"),
    ] {
        sysctl::write(node2, key, value).expect("is set");
    }
    let narrow = beyond(NARROW).map(|address| address.ip());
    let mut batch = Batch::new(node2);
    let [near_mac, far_mac] = [1, 2].map(|end| Mac([2, 0, 0, 2, 0, end]));
    batch.veth(("far", near_mac), &far, ("eth0", far_mac));
    batch.line("link set far up mtu 1300");
    for host in UNREACHABLE..=NARROW {
        for address in beyond(host).map(|address| address.ip()) {
            batch.line(format!("route add {address} dev far"));
            batch.line(format!(
                "neigh add {address} lladdr {far_mac} dev far nud permanent"
            ));
        }
    }
    batch.apply().expect("routes");
    let mut refuse = "add table inet fault; \
        add chain inet fault forward { type filter hook forward priority 0; };"
        .to_owned();
    for (host, with) in [
        (
            UNREACHABLE,
            ["icmp type host-unreachable", "icmpv6 type no-route"],
        ),
        (
            PROHIBITED,
            ["icmp type admin-prohibited", "icmpv6 type admin-prohibited"],
        ),
        (
            REFUSED,
            ["icmp type port-unreachable", "icmpv6 type port-unreachable"],
        ),
    ] {
        for ((family, with), address) in ["ip", "ip6"].iter().zip(with).zip(beyond(host)) {
            // Writing into a String cannot fail.
            let _ = write!(
                refuse,
                "add rule inet fault forward {family} daddr {} reject with {with};",
                address.ip()
            );
        }
    }
    run(node2, "nft", &[&refuse]);
    for key in ["all", "default"] {
        let dad = format!("net/ipv6/conf/{key}/accept_dad");
        sysctl::write(&far, &dad, "0").expect("is set");
    }
    let mut batch = Batch::new(&far);
    batch.line("link set eth0 up");
    batch.line(format!("addr add {}/24 dev eth0", narrow[0]));
    batch.line(format!("addr add {}/64 dev eth0 nodad", narrow[1]));
    batch.line("link set lo up");
    let router = [
        IpAddr::from([198, 51, 100, 254]),
        "2001:db8:0:9::fe".parse().expect("one"),
    ];
    for router in router {
        batch.line(format!(
            "neigh add {router} lladdr {near_mac} dev eth0 nud permanent"
        ));
        batch.line(format!("route add default via {router} dev eth0"));
    }
    batch.apply().expect("links");
    far
}

/// Errors from a router beyond the node belong to the flow that they are about, through nat and masquerade, and
/// say who sent them. One that asks for smaller packets fails no flow.
fn errors(lab: &Laboratory, sent: &mut Sent) {
    let servers = beyond(NARROW).map(|address| udp(&lab.far, address));
    for client in Client::all() {
        let router = client.of(&[plan::NODE2_ADDRESS.base, plan::NODE2_ADDRESS6.base]);
        for (at, (_, host)) in BEYOND.into_iter().enumerate() {
            // From a client to the node, from there to the router, and no further. IPVS counts the node too.
            let on_node = client.path.origin == Origin::Host && lab.mode != Mode::Ipvs;
            let hops = if on_node { 1 } else { 2 };
            let change = |socket: &Socket| {
                never_in_parts(socket);
                if host == EXPIRED {
                    let set = match client.family {
                        Family::V4 => socket.set_ttl_v4(hops),
                        Family::V6 => socket.set_unicast_hops_v6(hops),
                    };
                    set.expect("is set");
                }
            };
            let payload = vec![7; if host == NARROW { TOO_LONG } else { 1 }];
            let (key, socket) = ask(lab, client, ERRORS + at, &payload, change);
            let how = match (host, client.family) {
                (UNREACHABLE, Family::V4) => Some("host unreachable"),
                (UNREACHABLE, Family::V6) => Some("no route"),
                (PROHIBITED, _) => Some("administratively prohibited"),
                (EXPIRED, _) => Some("time exceeded"),
                (REFUSED, _) => Some("port unreachable"),
                _ => None,
            };
            let verdict = how.map_or(Verdict::Unanswered { stray: None }, |how| {
                Verdict::Rejected {
                    by: Who::Beyond(*router),
                    how: how.to_owned(),
                }
            });
            sent.expect(Expected {
                headed: Some(*client.of(&beyond(host))),
                ..Expected::new(key, client.path.title(), verdict)
            });
            sent.keep(socket);
        }
        // The same, and a small one behind it.
        let narrow = ERRORS + BEYOND.len() - 1;
        let (key, socket) = ask(lab, client, narrow, &[7; TOO_LONG], never_in_parts);
        socket.set_nonblocking(false).expect("is set");
        socket.set_read_timeout(Some(PATIENCE)).expect("is set");
        small_exchange(&UdpSocket::from(socket), client.of(&servers));
        sent.expect(Expected {
            repeated: true,
            ..Expected::new(key, client.path.title(), Verdict::Delivered)
        });
    }
}

/// Packets of this socket are sent whole, whatever was heard of links on their way.
fn never_in_parts(socket: &Socket) {
    // Of include/uapi/linux/in.h and in6.h.
    let (level, option) = if socket.domain().expect("has one") == Domain::IPV4 {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER)
    };
    let value = libc::IP_PMTUDISC_PROBE;
    // SAFETY: the option is an int, and lives until the call returns.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(&value).cast(),
            u32::try_from(size_of_val(&value)).expect("small"),
        )
    };
    assert_eq!(set, 0);
}

/// A small datagram there and back on a connected socket that is told of errors about a large one meanwhile.
fn small_exchange(client: &UdpSocket, server: &UdpSocket) {
    let begin = Instant::now();
    while client.send(b"1\n").is_err() {
        assert!(begin.elapsed() < PATIENCE, "never sent");
    }
    let mut buffer = [0; 2 * LARGE];
    let (_, from) = server.recv_from(&mut buffer).expect("is asked");
    server.send_to(b"1\n", from).expect("answers");
    while client.recv(&mut buffer).is_err() {
        assert!(begin.elapsed() < PATIENCE, "never answered");
    }
}

/// Datagrams of one flow in parts.
const DATAGRAMS: u64 = 3;
/// Flows of a client, and the first one's port.
const FLOWS: u16 = 5;
const FIRST_PORT: u16 = 41_000;
/// Paths by which nothing else goes here.
const ONLY_PARTS: [Path; 2] = [
    Path {
        origin: Origin::Pod,
        target: Target::NodePort,
    },
    Path {
        origin: Origin::External,
        target: Target::ClusterIp,
    },
];

/// Datagrams that are larger than links take, there and back: conntrack puts them together, and each is one
/// journey. On a link that takes less than the one they came by, parts of IPv4 are other packets on the way out;
/// in IPv6 that is left to clients.
fn parts(lab: &Laboratory, sent: &mut Sent) {
    let servers = in_pod(25, SERVED).map(|address| udp(lab.pod(), address));
    for family in [Family::V6, Family::V4] {
        let of_family = |client: &Client| client.family == family;
        if family == Family::V4 {
            for (ns, link) in [(lab.node.lab.node(), "pod-0"), (lab.pod(), "eth0")] {
                let mut links = Batch::new(ns);
                links.line(format!("link set {link} mtu 1300"));
                links.apply().expect("links");
            }
        }
        for client in Client::by(ONLY_PARTS).filter(of_family) {
            let to = client.asks(lab, PARTS);
            for port in FIRST_PORT..FIRST_PORT + FLOWS {
                let socket = client.udp(lab, port);
                for length in [LARGE, LARGE - 1000, LARGE - 2000] {
                    exchange(&socket, to, client.of(&servers), &vec![7; length]);
                }
                let key = client.key(protocol::UDP, port, to);
                sent.expect(Expected {
                    headed: Some(*client.of(&in_pod(25, SERVED))),
                    ..Expected::new(key, client.path.title(), Verdict::Delivered)
                });
            }
        }
    }
    for (ns, link) in [(lab.node.lab.node(), "pod-0"), (lab.pod(), "eth0")] {
        let mut links = Batch::new(ns);
        links.line(format!("link set {link} mtu 1500"));
        links.apply().expect("links");
    }
}

/// What goes through a connection each way.
const BYTES: usize = 512 << 10;

/// Much over TCP, in large segments, there and back: one flow each.
fn segments(lab: &Laboratory, sent: &mut Sent) {
    let clients: Vec<_> = Client::all().collect();
    let servers = in_pod(24, SERVED).map(|address| {
        let listen = || TcpListener::bind(address).expect("binds");
        let listener = lab.pod().run(listen).expect("enters");
        take_and_return(listener, clients.len() / 2)
    });
    for client in clients {
        let to = client.asks(lab, SEGMENTS);
        let connect = || TcpStream::connect(to).expect("connects");
        let mut stream = client.ns(lab).run(connect).expect("enters");
        stream.set_read_timeout(Some(PATIENCE)).expect("is set");
        stream.write_all(&vec![7; BYTES]).expect("sends");
        stream.read_exact(&mut vec![0; BYTES]).expect("returned");
        let key = Key {
            protocol: protocol::TCP,
            source: stream.local_addr().expect("bound"),
            destination: to,
        };
        sent.expect(Expected::new(key, client.path.title(), Verdict::Delivered));
    }
    for server in servers {
        server.join().expect("serves");
    }
}

/// Takes what is sent over so many connections, and sends it back.
fn take_and_return(listener: TcpListener, connections: usize) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; BYTES];
        for _ in 0..connections {
            let (mut stream, _) = listener.accept().expect("accepts");
            stream.set_read_timeout(Some(PATIENCE)).expect("is set");
            stream.read_exact(&mut buffer).expect("is sent");
            stream.write_all(&buffer).expect("returns");
        }
    })
}

/// A pod that reaches itself through its own Service, seemingly sent by the node; and an endpoint in the node's
/// own namespace, for all clients.
fn way_back(lab: &Laboratory, sent: &mut Sent) {
    let own = in_pod(27, SERVED);
    for client in Client::by([Path::SERVICE[0]]) {
        let own = *client.of(&own);
        let source = SocketAddr::new(own.ip(), 42_000);
        let to = client.asks(lab, HAIRPIN);
        let server = udp(lab.pod(), own);
        exchange(&udp(lab.pod(), source), to, &server, b"1\n");
        let key = Key {
            protocol: protocol::UDP,
            source,
            destination: to,
        };
        sent.expect(Expected {
            headed: Some(own),
            masqueraded: Some(true),
            ..Expected::new(key, client.path.title(), Verdict::Delivered)
        });
    }
    for client in Client::all() {
        let endpoint = SocketAddr::new(plan::node_address(client.family), SERVED);
        let to = client.asks(lab, OF_NODE);
        let server = udp(lab.node.lab.node(), endpoint);
        exchange(&client.udp(lab, 42_001), to, &server, b"1\n");
        let key = client.key(protocol::UDP, 42_001, to);
        sent.expect(Expected {
            headed: Some(endpoint),
            ..Expected::new(key, client.path.title(), Verdict::Delivered)
        });
    }
}

/// Clients with one source port ask two Services, of which one answers: every answer is its own flow's.
fn one_port_of_many(lab: &Laboratory, sent: &mut Sent) {
    const PORT: u16 = 43_000;
    let answering = in_pod(28, SERVED).map(|address| udp(lab.pod(), address));
    let silent = in_pod(29, SERVED).map(|address| udp(lab.pod(), address));
    for client in Client::all() {
        let socket = client.udp(lab, PORT);
        let [to, to_silent] = [ANSWERS, ANSWERS_NOT].map(|service| client.asks(lab, service));
        socket.send_to(b"1\n", to_silent).expect("sends");
        exchange(&socket, to, client.of(&answering), b"1\n");
        let unanswered = Verdict::Unanswered { stray: None };
        for (destination, verdict) in [(to, Verdict::Delivered), (to_silent, unanswered)] {
            let key = client.key(protocol::UDP, PORT, destination);
            sent.expect(Expected::new(key, client.path.title(), verdict));
        }
        sent.keep(socket);
    }
    sent.keep(silent);
}

/// A port that is used again is another flow: after a reset, after a connection that went well. A flow of UDP
/// that is refused and goes on until it is answered is one flow.
fn one_port_again(lab: &Laboratory, sent: &mut Sent) {
    const PORT: u16 = 44_000;
    let [tcp, of_udp] = AGAIN;
    for client in Client::all() {
        let endpoint = *client.of(&in_pod(26, SERVED));
        let to = client.asks(lab, tcp);
        let source = SocketAddr::new(client.address(), PORT);
        let connect = || connect_from(client.ns(lab), source, to);
        assert!(connect().is_err(), "nobody listens");
        let listen = || TcpListener::bind(endpoint).expect("binds");
        let listener = lab.pod().run(listen).expect("enters");
        for _ in 0..2 {
            connect().expect("connects");
            drop(listener.accept().expect("accepts"));
        }
        let by = Who::Endpoint(endpoint);
        let key = client.key(protocol::TCP, PORT, to);
        sent.expect(Expected {
            verdicts: vec![
                Verdict::Reset { by },
                Verdict::Delivered,
                Verdict::Delivered,
            ],
            repeated: false,
            ..Expected::new(key, client.path.title(), Verdict::Delivered)
        });

        let to = client.asks(lab, of_udp);
        let socket = client.udp(lab, PORT);
        socket.connect(to).expect("connects");
        socket.send(b"1\n").expect("sends");
        socket.recv(&mut [0; 8]).expect_err("nobody listens");
        let server = udp(lab.pod(), endpoint);
        socket.send(b"2\n").expect("sends");
        let (_, from) = server.recv_from(&mut [0; 8]).expect("is asked");
        server.send_to(b"2\n", from).expect("answers");
        socket.recv(&mut [0; 8]).expect("an answer");
        sent.expect(Expected {
            repeated: true,
            ..Expected::new(
                client.key(protocol::UDP, PORT, to),
                client.path.title(),
                Verdict::Delivered,
            )
        });
    }
}

/// A connection from this port; it is closed with an RST, so that nothing remembers the port.
fn connect_from(ns: &Netns, source: SocketAddr, to: SocketAddr) -> std::io::Result<()> {
    let open = || Socket::new(Domain::for_address(to), Type::STREAM, None);
    let socket = ns.run(open).expect("enters").expect("opens");
    socket.set_reuse_address(true).expect("is set");
    socket.set_linger(Some(Duration::ZERO)).expect("is set");
    socket.bind(&source.into()).expect("binds");
    socket.connect_timeout(&to.into(), PATIENCE)
}
