//! One packet is one journey, and both directions are one flow: in both families, of TCP, UDP, SCTP and the
//! ICMP errors about them, in parts, in large segments, beside captures, back to where it came from.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType};
use socket2::{Domain, Socket, Type};
use tracer::cluster::{Endpoint, Family, Protocol};
use tracer::kernel::link::{Batch, Mac};
use tracer::kernel::netns::Netns;
use tracer::kernel::sysctl;
use tracer::lab::plan;
use tracer::lab::topology::LabOptions;
use tracer::probe::tier::Tier;
use tracer::record::run::PacketState;
use tracer::rules::Mode;
use tracer::scenario::node::TestNode;
use tracer::trace::flows::{Decided, Key};
use tracer::trace::journey::{End, Journey};
use tracer::trace::session::{Event, Session};
use tracer::trace::summary::Summary;
use tracer::trace::verdict::{Verdict, Who};
use tracer_ebpf::path::Origin;
use tracer_ebpf::record::{protocol, sctp};

use crate::sctp::End as Association;
use crate::trace::{on_one_thread, options, send_by};
use crate::truth::assert_nothing_was_missed;

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

/// A dual-stack node with these rules; the last chance to change its cluster.
fn node(mode: Mode, services: u32, change: impl FnOnce(&mut TestNode)) -> TestNode {
    let options = LabOptions {
        dual_stack: true,
        ..LabOptions::default()
    };
    let mut node = TestNode::build_with(services, 1, options).expect("a laboratory");
    change(&mut node);
    on_one_thread(node.apply(mode)).expect("rules");
    node
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Client {
    origin: Origin,
    family: Family,
}

impl Client {
    /// A pod, the node itself and a machine outside, in both families.
    fn all() -> impl Iterator<Item = Self> {
        let of = |family| {
            let origins = [Origin::Pod, Origin::Host, Origin::External];
            origins.map(|origin| Self { origin, family })
        };
        Family::ALL.into_iter().flat_map(of)
    }

    fn ns(self, node: &TestNode) -> &Netns {
        match self.origin {
            Origin::Pod => node.lab.client_pod(),
            Origin::Host => node.lab.node(),
            Origin::External => node.lab.external(),
        }
    }

    fn address(self) -> IpAddr {
        match (self.origin, self.family) {
            (Origin::Pod, Family::V4) => plan::CLIENT_POD.nth(1),
            (Origin::Pod, Family::V6) => plan::CLIENT_POD6.nth(1),
            (Origin::Host, family) => plan::node_address(family),
            (Origin::External, Family::V4) => plan::EXTERNAL_ADDRESS.base,
            (Origin::External, Family::V6) => plan::EXTERNAL_ADDRESS6.base,
        }
    }

    /// What it asks a Service for: those outside by its NodePort, the others by its ClusterIP.
    fn asks(self, node: &TestNode, service: usize) -> SocketAddr {
        if self.origin == Origin::External {
            let port = node.cluster.services[service].ports[0].node_port;
            SocketAddr::new(plan::node_address(self.family), port.expect("one"))
        } else {
            vip(node, service, self.family)
        }
    }

    fn path(self) -> &'static str {
        match self.origin {
            Origin::Pod => "pod→ClusterIP",
            Origin::Host => "host→ClusterIP",
            Origin::External => "external→NodePort",
        }
    }

    fn udp(self, node: &TestNode, port: u16) -> UdpSocket {
        udp(self.ns(node), SocketAddr::new(self.address(), port))
    }
}

/// Has the node this address? In IPVS mode it has every ClusterIP, and masquerades with one of IPv6 where the link
/// has no address.
fn is_of_node(node: &TestNode, address: IpAddr) -> bool {
    let of_links = [plan::LINK_ADDRESS.base, plan::LINK_ADDRESS6.base];
    let bound = node
        .cluster
        .services
        .iter()
        .flat_map(|one| &one.cluster_ips);
    of_links.contains(&address)
        || plan::node_address(Family::of(address)) == address
        || bound.into_iter().any(|one| *one == address)
}

fn vip(node: &TestNode, service: usize, family: Family) -> SocketAddr {
    let service = &node.cluster.services[service];
    let mut addresses = service.cluster_ips.iter();
    let address = addresses.find(|address| Family::of(**address) == family);
    SocketAddr::new(*address.expect("dual stack"), service.ports[0].port)
}

fn udp(ns: &Netns, address: SocketAddr) -> UdpSocket {
    let bind = || UdpSocket::bind(address).expect("binds");
    let socket = ns.run(bind).expect("enters");
    socket.set_read_timeout(Some(PATIENCE)).expect("is set");
    socket
}

/// The only endpoint of a Service in each family from now on.
fn serve_by(node: &mut TestNode, service: usize, endpoints: [SocketAddr; 2]) {
    let endpoints = endpoints.map(|to| Endpoint::ready(to.ip(), to.port(), plan::NODE));
    node.cluster.services[service].ports[0].endpoints = endpoints.to_vec();
}

/// An address of the first server pod, with a port.
fn in_pod(host: u32, port: u16) -> [SocketAddr; 2] {
    Family::ALL.map(|family| SocketAddr::new(plan::server_pod(0, family).nth(host), port))
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

/// What a session told.
struct Told {
    tier: Tier,
    journeys: Vec<Journey>,
    decided: BTreeMap<(u8, SocketAddr, SocketAddr), Vec<Decided>>,
    summary: Summary,
}

impl Told {
    /// The journey of a flow's first packet.
    fn journey(&self, key: Key) -> &Journey {
        let of_flow = |journey: &&Journey| {
            (journey.protocol, journey.source, journey.destination)
                == (key.protocol, key.source, key.destination)
        };
        let found = self.journeys.iter().find(of_flow);
        found.unwrap_or_else(|| panic!("{} {key:?}\n{}", self.tier, self.summary))
    }

    /// The only verdict of a flow.
    fn verdict(&self, key: Key) -> &Verdict {
        let found = self
            .decided
            .get(&(key.protocol, key.source, key.destination));
        let Some([only]) = found.map(Vec::as_slice) else {
            panic!("{} {key:?}: {found:#?}\n{}", self.tier, self.summary);
        };
        &only.verdict
    }

    fn flows(&self) -> u64 {
        self.summary.services.iter().map(|one| one.flows).sum()
    }

    /// Packets of a path whose times were taken, by what conntrack said of them.
    fn packets(&self, path: &str, state: PacketState) -> u64 {
        let mut paths = self.summary.paths.iter();
        let path = paths.find(|one| one.path == path);
        let node = path.and_then(|path| path.node.get(&state));
        node.map_or(0, |times| times.count)
    }
}

/// Follows a node's packets with each of these tiers at once while something is sent.
fn traced<T>(node: &TestNode, tiers: &[Tier], send: impl FnOnce() -> T) -> (Vec<Told>, T) {
    let sessions: Vec<_> = tiers
        .iter()
        .map(|tier| {
            let options = options(Vec::new(), *tier);
            Session::start(node.lab.node(), options).expect("attaches")
        })
        .collect();
    let sent = send();
    let told = sessions.into_iter().map(|session| {
        let tier = session.tier();
        let (events, summary) = session.finish().expect("ends");
        let mut told = Told {
            tier,
            journeys: Vec::new(),
            decided: BTreeMap::new(),
            summary,
        };
        for event in events {
            match event {
                Event::Journey(journey) if journey.first => told.journeys.push(journey),
                Event::Verdict(decided) => {
                    let key = (decided.protocol, decided.source, decided.destination);
                    told.decided.entry(key).or_default().push(decided);
                }
                _ => {}
            }
        }
        assert_nothing_was_missed(&told.summary);
        told
    });
    (told.collect(), sent)
}

/// Flows of both families by each path: each is told once, with its path, the endpoint that answered it and
/// who it seemed to come from.
pub fn both_families_by_every_path(mode: Mode, tiers: &[Tier]) {
    every_flow_is_one_journey(mode, tiers, &node(mode, 8, |_| {}));
}

fn every_flow_is_one_journey(mode: Mode, tiers: &[Tier], node: &TestNode) {
    const FLOWS: u32 = 20;
    let (told, sent) = traced(node, tiers, || {
        Family::ALL.map(|family| send_by(node, family, FLOWS, 1))
    });
    for told in told {
        let flows: Vec<_> = sent.iter().flat_map(|sent| &sent.flows).collect();
        assert_eq!((told.flows(), told.journeys.len()), (120, 120));
        for flow in flows {
            let key = Key {
                protocol: flow.protocol.number(),
                source: flow.source,
                destination: flow.destination,
            };
            let journey = told.journey(key);
            let tracer::lab::Outcome::Delivered { by } = flow.outcome else {
                panic!("{mode} {}: {journey:#?}", flow.outcome);
            };
            assert_eq!(journey.path, flow.path.title(), "{mode}: {journey:#?}");
            assert_eq!(journey.headed, Some(by), "{mode}: {journey:#?}");
            assert_eq!(journey.end, End::Sent);
            let from = journey.source_after.expect("known");
            match flow.path.origin {
                Origin::Pod => assert_eq!(from, flow.source, "{mode}: {journey:#?}"),
                _ => assert!(is_of_node(&node, from.ip()), "{mode}: {journey:#?}"),
            }
            assert_eq!(*told.verdict(key), Verdict::Delivered, "{mode}");
        }
    }
}

/// Faults, asked for by each path in both families.
pub fn faults_of_both_families(mode: Mode, tiers: &[Tier]) {
    const EMPTY: [usize; 2] = [0, 1];
    const CLOSED_ONES: [usize; 2] = [2, 3];
    const SILENT: [usize; 2] = [4, 5];
    let closed = in_pod(9, CLOSED);
    let silent = [plan::NODE2_SERVERS, plan::NODE2_SERVERS6]
        .map(|range| SocketAddr::new(range.nth(100), CLOSED));
    let node = node(mode, 6, |node| {
        for service in EMPTY {
            node.cluster.services[service].ports[0].endpoints.clear();
        }
        for service in CLOSED_ONES {
            serve_by(node, service, closed);
        }
        for service in SILENT {
            serve_by(node, service, silent);
        }
    });
    // IPv6 sends errors from an address only if it is a link's.
    let mut pod = Batch::new(&node.lab.server_pods()[0]);
    pod.line(format!("addr add {}/128 dev eth0 nodad", closed[1].ip()));
    pod.apply().expect("an address");
    let mut drops = "add table inet fault; \
        add chain inet fault in { type filter hook prerouting priority -300; };"
        .to_owned();
    for (family, address) in ["ip", "ip6"].iter().zip(silent) {
        // Writing into a String cannot fail.
        let _ = write!(
            drops,
            "add rule inet fault in {family} daddr {} drop;",
            address.ip()
        );
    }
    run(node.lab.node2(), "nft", &[&drops]);
    let (told, flows) = traced(&node, tiers, || {
        let mut flows = Vec::new();
        for client in Client::all() {
            for service in 0..6 {
                flows.push((client, service, ask_once(&node, client, service)));
            }
        }
        std::thread::sleep(SILENCE);
        flows
    });
    for told in told {
        for (client, service, (key, _)) in &flows {
            let by = closed[usize::from(client.family == Family::V6)];
            let how = "port unreachable".to_owned();
            let wanted = match service {
                0 | 1 => Verdict::Rejected { by: Who::Node, how },
                2 => Verdict::Reset {
                    by: Who::Endpoint(by),
                },
                3 => Verdict::Rejected {
                    by: Who::Endpoint(by),
                    how,
                },
                _ => Verdict::Unanswered { stray: None },
            };
            assert_eq!(
                *told.verdict(*key),
                wanted,
                "{mode} {} {client:?} {key:?}",
                told.tier
            );
            assert_eq!(told.journey(*key).path, client.path());
        }
    }
}

/// Sends a first packet to a Service of the laboratory, of which even ones are TCP; what has to be kept open.
fn ask_once(node: &TestNode, client: Client, service: usize) -> (Key, Socket) {
    ask_with(node, client, service, b"1\n", |_| {})
}

/// The same with this payload if it is UDP, and with a socket that was changed before.
fn ask_with(
    node: &TestNode,
    client: Client,
    service: usize,
    payload: &[u8],
    change: impl FnOnce(&Socket),
) -> (Key, Socket) {
    let to = client.asks(node, service);
    let of = node.cluster.services[service].ports[0].protocol;
    let kind = match of {
        Protocol::Tcp => Type::STREAM,
        _ => Type::DGRAM,
    };
    let open = || Socket::new(Domain::for_address(to), kind, None);
    let socket = client.ns(node).run(open).expect("enters").expect("opens");
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

fn run(ns: &Netns, tool: &str, arguments: &[&str]) {
    let output = ns.command(tool).args(arguments).output().expect("runs");
    assert!(
        output.status.success(),
        "{tool} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// SCTP Services: an association that is answered, one that is aborted, one without endpoints and one that
/// nobody answers.
pub fn associations_are_told(mode: Mode, tiers: &[Tier]) {
    const ANSWERED: usize = 0;
    const ABORTED: usize = 1;
    const EMPTY: usize = 2;
    const SILENT: usize = 3;
    let [answered, aborted, silent] = [11, 12, 13].map(|host| in_pod(host, SERVED));
    let node = node(mode, 4, |node| {
        for service in &mut node.cluster.services {
            // TCP and UDP share NodePorts.
            service.ports[0].protocol = Protocol::Sctp;
        }
        let ports = [30_001, 30_002, 30_003, 30_004];
        for (service, port) in node.cluster.services.iter_mut().zip(ports) {
            service.ports[0].node_port = Some(port);
        }
        serve_by(node, ANSWERED, answered);
        serve_by(node, ABORTED, aborted);
        serve_by(node, SILENT, silent);
        node.cluster.services[EMPTY].ports[0].endpoints.clear();
    });
    let pod = &node.lab.server_pods()[0];
    let [answering, aborting, _silent] = [answered, aborted, silent]
        .map(|endpoints| endpoints.map(|endpoint| Association::bind(pod, endpoint, PATIENCE)));
    let (told, flows) = traced(&node, tiers, || {
        let mut flows = Vec::new();
        for (at, client) in (0..).zip(Client::all()) {
            let family = usize::from(client.family == Family::V6);
            for service in 0..4 {
                let address = SocketAddr::new(client.address(), 40_000 + at * 10 + service);
                let end = Association::bind(client.ns(&node), address, PATIENCE);
                let service = usize::from(service);
                let to = client.asks(&node, service);
                end.init(to);
                let ends = match service {
                    ANSWERED => Some((&answering[family], sctp::INIT_ACK)),
                    ABORTED => Some((&aborting[family], sctp::ABORT)),
                    _ => None,
                };
                if let Some((server, how)) = ends {
                    server.answer(how);
                    assert_eq!(end.receive(), (to, how), "{mode} {client:?}");
                }
                let key = Key {
                    protocol: protocol::SCTP,
                    source: address,
                    destination: to,
                };
                flows.push((client, service, key, end));
            }
        }
        std::thread::sleep(SILENCE);
        flows
    });
    for told in told {
        assert_eq!(told.flows(), 24);
        for (client, service, key, _) in &flows {
            let by = Who::Endpoint(aborted[usize::from(client.family == Family::V6)]);
            let wanted = match *service {
                ANSWERED => Verdict::Delivered,
                ABORTED => Verdict::Reset { by },
                EMPTY => Verdict::Rejected {
                    by: Who::Node,
                    how: "port unreachable".to_owned(),
                },
                _ => Verdict::Unanswered { stray: None },
            };
            assert_eq!(
                *told.verdict(*key),
                wanted,
                "{mode} {} {client:?}",
                told.tier
            );
            assert_eq!(told.journey(*key).path, client.path());
        }
    }
}

/// Datagrams that are larger than links take, to the endpoint and back: conntrack puts them together, and each
/// is one journey.
pub fn datagrams_in_parts_are_one_journey(mode: Mode, tiers: &[Tier]) {
    let (node, server) = served_node(mode);
    let told = |clients: &[Client], port| {
        let (told, keys) = traced(&node, tiers, || {
            large_exchanges(&node, &server, clients, port)
        });
        for told in &told {
            assert_large_exchanges(mode, told, clients, &keys);
        }
    };
    let clients = who_sends_parts(mode);
    told(&clients, FIRST_PORT);
    // On a link that takes less than the clients', parts of IPv4 are other packets; IPv6 leaves that to clients.
    for (ns, link) in [
        (node.lab.node(), "pod-0"),
        (&node.lab.server_pods()[0], "eth0"),
    ] {
        let mut links = Batch::new(ns);
        links.line(format!("link set {link} mtu 1300"));
        links.apply().expect("links");
    }
    let ipv4 = clients
        .into_iter()
        .filter(|client| client.family == Family::V4);
    told(&ipv4.collect::<Vec<_>>(), FIRST_PORT + FLOWS);
}

/// Who can send what is larger than links take. In IPVS mode ClusterIPs are the node's own, and to itself the node
/// sends large packets whole, which IPVS then cannot send on.
fn who_sends_parts(mode: Mode) -> Vec<Client> {
    Client::all()
        .filter(|client| client.origin != Origin::Host || mode != Mode::Ipvs)
        .collect()
}

/// A node whose UDP Service 1 our own server is behind, in each family.
fn served_node(mode: Mode) -> (TestNode, [UdpSocket; 2]) {
    let served = in_pod(11, SERVED);
    let node = node(mode, 2, |node| serve_by(node, 1, served));
    let server = served.map(|address| udp(&node.lab.server_pods()[0], address));
    (node, server)
}

/// Datagrams of one flow.
const DATAGRAMS: u64 = 3;
/// Flows of a client, and the first one's port.
const FLOWS: u16 = 5;
const FIRST_PORT: u16 = 41_000;

fn large_exchanges(
    node: &TestNode,
    server: &[UdpSocket; 2],
    clients: &[Client],
    port: u16,
) -> Vec<(Client, Key)> {
    let mut keys = Vec::new();
    for client in clients {
        let to = client.asks(node, 1);
        let server = &server[usize::from(client.family == Family::V6)];
        for port in port..port + FLOWS {
            let socket = client.udp(node, port);
            for datagram in 0..DATAGRAMS {
                // One of them is smaller than a link's most, and in parts all the same for its length.
                exchange(
                    &socket,
                    to,
                    server,
                    &vec![7; LARGE - 1000 * datagram as usize],
                );
            }
            let key = Key {
                protocol: protocol::UDP,
                source: SocketAddr::new(client.address(), port),
                destination: to,
            };
            keys.push((*client, key));
        }
    }
    keys
}

fn assert_large_exchanges(mode: Mode, told: &Told, clients: &[Client], keys: &[(Client, Key)]) {
    let name = format!("{mode} {}", told.tier);
    assert_eq!(told.flows(), keys.len() as u64, "{name}: {}", told.summary);
    for (client, key) in keys {
        let journey = told.journey(*key);
        assert_eq!(journey.path, client.path(), "{name}");
        assert_eq!(journey.end, End::Sent, "{name}: {journey:#?}");
        assert_eq!(*told.verdict(*key), Verdict::Delivered, "{name}");
    }
    for client in clients {
        let alike = clients.iter().filter(|one| one.origin == client.origin);
        let flows = alike.count() as u64 * u64::from(FLOWS);
        let packets = [
            PacketState::New,
            PacketState::Established,
            PacketState::Reply,
        ]
        .map(|state| told.packets(client.path(), state));
        let wanted = [flows, flows * (DATAGRAMS - 1), flows * DATAGRAMS];
        assert_eq!(packets, wanted, "{name} {client:?}: {}", told.summary);
    }
}

/// Captures on both sides of every link change nothing: the kernel clones what they see, and puts what was in
/// parts together from clones.
pub fn captures_are_no_journeys(mode: Mode, tiers: &[Tier]) {
    let small = node(mode, 8, |_| {});
    captured(&small, || every_flow_is_one_journey(mode, tiers, &small));
    let (node, server) = served_node(mode);
    let clients = who_sends_parts(mode);
    captured(&node, || {
        let send = || large_exchanges(&node, &server, &clients, FIRST_PORT);
        let (told, keys) = traced(&node, tiers, send);
        for told in &told {
            assert_large_exchanges(mode, told, &clients, &keys);
        }
    });
}

/// Captures in each of the laboratory's namespaces meanwhile.
fn captured(node: &TestNode, meanwhile: impl FnOnce()) {
    let lab = &node.lab;
    let everywhere = [lab.node(), lab.external(), lab.node2(), lab.client_pod()];
    let captures: Vec<_> = everywhere
        .into_iter()
        .chain(lab.server_pods())
        .map(|ns| {
            let capture = || {
                nix::sys::socket::socket(
                    AddressFamily::Packet,
                    SockType::Raw,
                    SockFlag::SOCK_CLOEXEC,
                    SockProtocol::EthAll,
                )
            };
            ns.run(capture).expect("enters").expect("root")
        })
        .collect();
    meanwhile();
    let mut frame = [0; 2 * LARGE];
    for capture in &captures[..4] {
        let captured = nix::unistd::read(capture, &mut frame).expect("frames");
        assert!(captured > 0);
    }
}

/// Megabytes over TCP in large segments, there and back: one flow each. With `cut`, the node's links take no
/// large segments, and the kernel cuts them up behind the last hook.
pub fn large_segments_are_one_flow(mode: Mode, tiers: &[Tier], cut: bool) {
    const BYTES: usize = 2 << 20;
    let served = in_pod(11, SERVED);
    let node = node(mode, 1, |node| serve_by(node, 0, served));
    if cut {
        let mut links = Batch::new(node.lab.node());
        for link in ["ext0", "pod-client", "pod-0"] {
            links.line(format!("link set {link} gso_max_size 3000"));
        }
        links.apply().expect("links");
    }
    let clients: Vec<_> = Client::all().collect();
    let servers = served.map(|address| {
        let listen = || TcpListener::bind(address).expect("binds");
        let listener = node.lab.server_pods()[0].run(listen).expect("enters");
        take_and_return(listener, clients.len() / 2, BYTES)
    });
    let (told, keys) = traced(&node, tiers, || {
        let sent = clients.iter().map(|client| {
            let to = client.asks(&node, 0);
            let connect = || TcpStream::connect(to).expect("connects");
            let mut stream = client.ns(&node).run(connect).expect("enters");
            stream.set_read_timeout(Some(PATIENCE)).expect("is set");
            stream.write_all(&vec![7; BYTES]).expect("sends");
            stream.read_exact(&mut vec![0; BYTES]).expect("returned");
            let source = stream.local_addr().expect("bound");
            let key = Key {
                protocol: protocol::TCP,
                source,
                destination: to,
            };
            (*client, key)
        });
        let keys: Vec<_> = sent.collect();
        for server in servers {
            server.join().expect("serves");
        }
        keys
    });
    for told in told {
        let name = format!("{mode} {}", told.tier);
        assert_eq!((told.flows(), told.journeys.len()), (6, 6), "{name}");
        for (client, key) in &keys {
            assert_eq!(told.journey(*key).path, client.path(), "{name}");
            assert_eq!(*told.verdict(*key), Verdict::Delivered, "{name}");
        }
        // Fewer than a link's packets would be.
        let packets: u64 = told.summary.probes.journeys;
        assert!(packets < (12 * BYTES / 1500) as u64, "{name}: {packets}");
    }
}

/// Takes so many bytes of so many connections and sends them back.
fn take_and_return(listener: TcpListener, connections: usize, bytes: usize) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; bytes];
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
pub fn the_way_back_is_one_journey(mode: Mode, tiers: &[Tier]) {
    const HAIRPIN: usize = 1;
    const OF_NODE: usize = 3;
    let own = in_pod(11, SERVED);
    let of_node = Family::ALL.map(|family| SocketAddr::new(plan::node_address(family), SERVED));
    let node = node(mode, 4, |node| {
        serve_by(node, HAIRPIN, own);
        serve_by(node, OF_NODE, of_node);
    });
    let pod = &node.lab.server_pods()[0];
    let own_servers = own.map(|address| udp(pod, address));
    let node_servers = of_node.map(|address| udp(node.lab.node(), address));
    let (told, keys) = traced(&node, tiers, || {
        let mut keys = Vec::new();
        let mut ask = |client: &UdpSocket, to, server, wanted| {
            exchange(client, to, server, b"1\n");
            let source = client.local_addr().expect("bound");
            let key = Key {
                protocol: protocol::UDP,
                source,
                destination: to,
            };
            keys.push((key, wanted));
        };
        for (family, (own, server)) in Family::ALL.into_iter().zip(own.iter().zip(&own_servers)) {
            let client = udp(pod, SocketAddr::new(own.ip(), 42_000));
            let to = vip(&node, HAIRPIN, family);
            ask(&client, to, server, ("pod→ClusterIP", *own, true));
        }
        for client in Client::all() {
            let family = usize::from(client.family == Family::V6);
            let to = client.asks(&node, OF_NODE);
            let socket = client.udp(&node, 42_001);
            let wanted = (client.path(), of_node[family], false);
            ask(&socket, to, &node_servers[family], wanted);
        }
        keys
    });
    for told in told {
        let name = format!("{mode} {}", told.tier);
        assert_eq!((told.flows(), told.journeys.len()), (8, 8), "{name}");
        for (key, (path, endpoint, hairpin)) in &keys {
            let journey = told.journey(*key);
            assert_eq!(journey.path, *path, "{name}: {journey:#?}");
            assert_eq!(journey.headed, Some(*endpoint), "{name}: {journey:#?}");
            assert_eq!(
                *told.verdict(*key),
                Verdict::Delivered,
                "{name}: {journey:#?}"
            );
            if *hairpin {
                let from = journey.source_after.expect("known").ip();
                assert!(is_of_node(&node, from), "{name}: {journey:#?}");
            }
        }
    }
}

/// Clients with one source port ask two Services, of which one answers: every answer is its own flow's.
pub fn answers_are_their_own_flows(mode: Mode, tiers: &[Tier]) {
    const PORT: u16 = 43_000;
    const ANSWERS: usize = 1;
    const SILENT: usize = 3;
    let [answers, silent] = [11, 12].map(|host| in_pod(host, SERVED));
    let node = node(mode, 4, |node| {
        serve_by(node, ANSWERS, answers);
        serve_by(node, SILENT, silent);
    });
    let pod = &node.lab.server_pods()[0];
    let [answering, _silent] = [answers, silent].map(|s| s.map(|address| udp(pod, address)));
    let (told, keys) = traced(&node, tiers, || {
        let mut keys = Vec::new();
        let mut sockets = Vec::new();
        for client in Client::all() {
            let socket = client.udp(&node, PORT);
            let [to, to_silent] = [ANSWERS, SILENT].map(|service| client.asks(&node, service));
            socket.send_to(b"1\n", to_silent).expect("sends");
            let server = &answering[usize::from(client.family == Family::V6)];
            exchange(&socket, to, server, b"1\n");
            for (destination, answered) in [(to, true), (to_silent, false)] {
                let key = Key {
                    protocol: protocol::UDP,
                    source: SocketAddr::new(client.address(), PORT),
                    destination,
                };
                keys.push((client, key, answered));
            }
            sockets.push(socket);
        }
        std::thread::sleep(SILENCE);
        keys
    });
    for told in told {
        let name = format!("{mode} {}", told.tier);
        assert_eq!((told.flows(), told.journeys.len()), (12, 12), "{name}");
        for (client, key, answered) in &keys {
            let wanted = if *answered {
                Verdict::Delivered
            } else {
                Verdict::Unanswered { stray: None }
            };
            assert_eq!(*told.verdict(*key), wanted, "{name} {key:?}");
            assert_eq!(told.journey(*key).path, client.path(), "{name}");
        }
    }
}

/// A port that is used again is another flow: after a reset, after a connection that went well. A flow of UDP
/// that was refused and goes on until it is answered is one flow.
pub fn a_port_used_again_is_another_flow(mode: Mode, tiers: &[Tier]) {
    const TCP: usize = 0;
    const UDP: usize = 1;
    const PORT: u16 = 44_000;
    let served = in_pod(11, SERVED);
    let node = node(mode, 2, |node| {
        serve_by(node, TCP, served);
        serve_by(node, UDP, served);
    });
    let pod = &node.lab.server_pods()[0];
    let (told, keys) = traced(&node, tiers, || {
        let mut keys = Vec::new();
        for client in Client::all() {
            let address = served[usize::from(client.family == Family::V6)];
            let source = SocketAddr::new(client.address(), PORT);
            let connect = |to| connect_from(client.ns(&node), source, to);
            let to = client.asks(&node, TCP);
            assert!(connect(to).is_err(), "nobody listens");
            let listen = || TcpListener::bind(address).expect("binds");
            let listener = pod.run(listen).expect("enters");
            for _ in 0..2 {
                connect(to).expect("connects");
                drop(listener.accept().expect("accepts"));
            }
            let key = |protocol, destination| Key {
                protocol,
                source,
                destination,
            };
            keys.push((client, key(protocol::TCP, to)));
            let to = client.asks(&node, UDP);
            let socket = client.udp(&node, PORT);
            socket.connect(to).expect("connects");
            socket.send(b"1\n").expect("sends");
            socket.recv(&mut [0; 8]).expect_err("nobody listens");
            let server = udp(pod, address);
            socket.send(b"2\n").expect("sends");
            let (_, from) = server.recv_from(&mut [0; 8]).expect("is asked");
            server.send_to(b"2\n", from).expect("answers");
            socket.recv(&mut [0; 8]).expect("an answer");
            keys.push((client, key(protocol::UDP, to)));
        }
        keys
    });
    for told in told {
        for (client, key) in &keys {
            let name = format!("{mode} {} {client:?} {key:?}", told.tier);
            let decided = &told.decided[&(key.protocol, key.source, key.destination)];
            let verdicts: Vec<_> = decided
                .iter()
                .map(|one| {
                    (
                        one.verdict.word(),
                        one.corrects.as_ref().map(|was| was.word()),
                    )
                })
                .collect();
            let wanted: &[_] = if key.protocol == protocol::TCP {
                &[("reset", None), ("delivered", None), ("delivered", None)]
            } else {
                // What was decided before the answer is not said if both were heard of at once.
                &[("delivered", None)]
            };
            assert_eq!(verdicts, wanted, "{name}: {decided:#?}");
        }
        assert_eq!(told.flows(), 6 * 4, "{}", told.summary);
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

// Hosts behind node2, by what becomes of packets to them.
const UNREACHABLE: u32 = 1;
const PROHIBITED: u32 = 2;
const EXPIRED: u32 = 3;
const REFUSED: u32 = 4;
/// Its link takes less than a packet of [`TOO_LONG`] bytes.
const NARROW: u32 = 5;
/// A flow to it whose small packet is answered.
const ANSWERED: u32 = 6;
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

/// Errors from a router beyond the node belong to the flow that they are about, through nat and masquerade, in
/// both families, and say who sent them. One that asks for smaller packets fails no flow.
pub fn errors_belong_to_their_flows(mode: Mode, tiers: &[Tier]) {
    let node = node(mode, 6, |node| {
        for (service, (protocol, host)) in BEYOND.into_iter().enumerate() {
            serve_by(node, service, beyond(host));
            let port = &mut node.cluster.services[service].ports[0];
            port.protocol = protocol;
            port.node_port = u16::try_from(service)
                .ok()
                .map(|at| plan::FIRST_NODE_PORT + at);
        }
    });
    let far = route_beyond(&node);
    let servers = beyond(NARROW).map(|address| udp(&far, address));
    let (told, flows) = traced(&node, tiers, || {
        let mut flows = Vec::new();
        for client in Client::all() {
            for (service, (_, host)) in BEYOND.into_iter().enumerate() {
                // From a client to the node, from there to the router, and no further. IPVS counts the node too.
                let on_node = client.origin == Origin::Host && mode != Mode::Ipvs;
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
                let (key, socket) = ask_with(&node, client, service, &payload, change);
                flows.push((client, host, key, socket));
            }
            // The same, and a small one behind it.
            let narrow = BEYOND.len() - 1;
            let (key, socket) = ask_with(&node, client, narrow, &[7; TOO_LONG], never_in_parts);
            socket.set_nonblocking(false).expect("is set");
            socket.set_read_timeout(Some(PATIENCE)).expect("is set");
            let asker = UdpSocket::from(socket.try_clone().expect("a copy"));
            let server = &servers[usize::from(client.family == Family::V6)];
            small_exchange(&asker, server);
            flows.push((client, ANSWERED, key, socket));
        }
        std::thread::sleep(SILENCE);
        flows
    });
    for told in told {
        for (client, host, key, _) in &flows {
            let ipv4 = client.family == Family::V4;
            let router = if ipv4 {
                plan::NODE2_ADDRESS
            } else {
                plan::NODE2_ADDRESS6
            };
            let rejected = |how: &str| Verdict::Rejected {
                by: Who::Beyond(router.base),
                how: how.to_owned(),
            };
            let wanted = match *host {
                UNREACHABLE if ipv4 => rejected("host unreachable"),
                UNREACHABLE => rejected("no route"),
                PROHIBITED => rejected("administratively prohibited"),
                EXPIRED => rejected("time exceeded"),
                REFUSED => rejected("port unreachable"),
                NARROW => Verdict::Unanswered { stray: None },
                _ => Verdict::Delivered,
            };
            let name = format!("{mode} {} {client:?} {host}", told.tier);
            assert_eq!(*told.verdict(*key), wanted, "{name}: {}", told.summary);
            assert_eq!(told.journey(*key).path, client.path(), "{name}");
        }
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
            size_of_val(&value) as libc::socklen_t,
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
