//! The oracle against the kernel: random clusters, random packets, and what really became of each.
//!
//! The node is a namespace with two links whose far ends are this process ([`Tun`]): `pods`, behind
//! which its pods are, and `out`, the rest of the world. A packet is one write; when that returns
//! the kernel has done with it, so that "nothing came out" is an observation and not a time-out.

use std::collections::HashMap;
use std::fmt;
use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::ipv4::MutableIpv4Packet;
use pnet_packet::ipv6::MutableIpv6Packet;
use pnet_packet::tcp::{MutableTcpPacket, TcpFlags};
use pnet_packet::udp::MutableUdpPacket;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use socket2::{Domain, Socket, Type};
use tracer::cluster::{Cluster, Family, Protocol, ServicePort, random};
use tracer::kernel::netns::Netns;
use tracer::kernel::tun::Tun;
use tracer::kernel::{apply, dump, nfacct, sysctl, tool};
use tracer::rules::oracle::Rules;
use tracer::rules::walk::{Fate, Origin, Outcome, Packet, State};
use tracer::rules::{Mode, NodeView, iptables, render};

/// The node's address on `out`, its first; the same as the random cluster's Node object says.
const NODE_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const NODE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
/// The node's address on `pods`.
const PODS_V4: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 1);
const PODS_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 1);

/// Every packet has a source port of its own, from here on.
const FIRST_SOURCE_PORT: u16 = 10_000;

/// What really became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Seen {
    /// It left the node.
    Sent { to: SocketAddr, masqueraded: bool },
    /// The sender was told "port unreachable".
    Refused,
    /// The node took it in: our own last rule at INPUT said "administratively prohibited".
    TakenIn,
    /// Nothing.
    Nothing,
}

/// Where a packet is put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Via {
    /// A pod on the node sends it.
    Pods,
    /// It comes from outside.
    Out,
    /// A process on the node sends it.
    Node,
}

/// The node.
pub(crate) struct Node {
    pub(crate) ns: Netns,
    pods: Tun,
    out: Tun,
    raw: HashMap<Family, Socket>,
    icmp: HashMap<Family, Socket>,
    barrier: (UdpSocket, UdpSocket),
}

impl Node {
    pub(crate) fn build() -> Self {
        let ns = Netns::create("oracle").expect("a namespace");
        let (pods, out) = (
            Tun::create(&ns, "pods").expect("a link"),
            Tun::create(&ns, "out").expect("a link"),
        );
        for (key, value) in [
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/conf/pods/rp_filter", "0"),
            ("net/ipv4/conf/out/rp_filter", "0"),
            ("net/ipv4/conf/all/route_localnet", "1"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/pods/send_redirects", "0"),
            ("net/ipv4/conf/out/send_redirects", "0"),
            // Every refusal is to be seen.
            ("net/ipv4/icmp_ratelimit", "0"),
            ("net/ipv4/icmp_ratemask", "0"),
            ("net/ipv6/icmp/ratelimit", "0"),
            ("net/ipv6/icmp/ratemask", "255"),
            // No neighbour discovery, no router solicitation.
            ("net/ipv6/conf/pods/addr_gen_mode", "1"),
            ("net/ipv6/conf/out/addr_gen_mode", "1"),
        ] {
            sysctl::write(&ns, key, value).expect(key);
        }
        let commands = format!(
            "link set lo up\nlink set pods up\nlink set out up\n\
             address add {NODE_V4}/32 dev out\naddress add {NODE_V6}/128 dev out nodad\n\
             address add {PODS_V4}/32 dev pods\naddress add {PODS_V6}/128 dev pods nodad\n\
             route add 10.244.0.0/24 dev pods\nroute add default dev out\n\
             -6 route add fd00:10:244::/64 dev pods\n-6 route add default dev out\n"
        );
        for line in commands.lines() {
            let args: Vec<&str> = line.split(' ').collect();
            tool::run(&ns, "ip", &args, "").expect("ip");
        }
        let observer = "table inet observer {\n chain input {\n type filter hook input priority 2147483000;\n \
                        iif lo udp dport 1 accept\n meta l4proto { icmp, ipv6-icmp } accept\n \
                        reject with icmpx admin-prohibited\n }\n }\n";
        tool::run(&ns, "nft", &["-f", "-"], observer).expect("nft");
        let sockets = ns.run(|| {
            let icmp = |family: Family| match family {
                Family::V4 => raw(Domain::IPV4, libc::IPPROTO_ICMP),
                Family::V6 => raw(Domain::IPV6, libc::IPPROTO_ICMPV6),
            };
            let sender = |family: Family| match family {
                Family::V4 => raw(Domain::IPV4, libc::IPPROTO_RAW),
                Family::V6 => raw(Domain::IPV6, libc::IPPROTO_RAW),
            };
            let listener = UdpSocket::bind("127.0.0.1:1").expect("a socket");
            listener
                .set_read_timeout(Some(Duration::from_secs(20)))
                .expect("a time-out");
            let knocker = UdpSocket::bind("127.0.0.1:2").expect("a socket");
            (
                Family::ALL.map(|f| (f, sender(f))).into(),
                Family::ALL.map(|f| (f, icmp(f))).into(),
                (listener, knocker),
            )
        });
        let (raw, icmp, barrier) = sockets.expect("the namespace is entered");
        Self {
            ns,
            pods,
            out,
            raw,
            icmp,
            barrier,
        }
    }

    /// Sends one packet and sees what becomes of it.
    pub(crate) fn send(&mut self, packet: &Packet, via: Via, id: u32) -> Seen {
        let bytes = packet_bytes(packet, id);
        match via {
            Via::Pods => self.pods.send(&bytes).expect("pods takes it"),
            Via::Out => self.out.send(&bytes).expect("out takes it"),
            Via::Node => self.send_from_node(packet, &bytes),
        }
        self.pass_barrier();
        let mut seen = Vec::new();
        while let Some(bytes) = self.pods.receive().expect("pods reads") {
            seen.extend(read(&bytes, packet, id));
        }
        while let Some(bytes) = self.out.receive().expect("out reads") {
            seen.extend(read(&bytes, packet, id));
        }
        for (family, socket) in &self.icmp {
            let mut buffer = [0_u8; 2048];
            loop {
                match recv(socket, &mut buffer) {
                    Ok(length) => seen.extend(read_local(*family, &buffer[..length])),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => panic!("ICMP socket: {error}"),
                }
            }
        }
        match seen[..] {
            [] => Seen::Nothing,
            [one] => one,
            _ => panic!("one packet became {seen:?}"),
        }
    }

    fn send_from_node(&self, packet: &Packet, bytes: &[u8]) {
        let to = SocketAddr::new(packet.to, 0);
        match self.raw[&Family::of(packet.to)].send_to(bytes, &to.into()) {
            Ok(_) => {}
            // A rule at OUTPUT that drops says so to the sender.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
            Err(error) => panic!("{packet:?}: {error}"),
        }
    }

    /// What loops over `lo` waits in a queue of this CPU; a packet sent after it comes after it.
    fn pass_barrier(&self) {
        let (listener, knocker) = &self.barrier;
        knocker.send_to(b"x", "127.0.0.1:1").expect("it knocks");
        listener.recv(&mut [0; 8]).expect("it is heard");
    }
}

fn raw(domain: Domain, protocol: i32) -> Socket {
    let socket = Socket::new(domain, Type::RAW, Some(protocol.into())).expect("a raw socket");
    socket.set_nonblocking(true).expect("non-blocking");
    socket
}

fn recv(socket: &Socket, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `buffer.len()` bytes into `buffer`, which outlives the call.
    let length = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            0,
        )
    };
    usize::try_from(length).map_err(|_| io::Error::last_os_error())
}

/// The packet as bytes: a TCP SYN (INVALID to conntrack: RST of no flow), a UDP datagram, an SCTP
/// INIT. `id` is in the payload, the sequence number or the verification tag.
pub(crate) fn packet_bytes(packet: &Packet, id: u32) -> Vec<u8> {
    let from_port = packet.from_port.expect("packets have a source port");
    let mut transport = match packet.protocol {
        Protocol::Tcp => vec![0; 20],
        Protocol::Udp => vec![0; 12],
        Protocol::Sctp => vec![0; 32],
    };
    transport[0..2].copy_from_slice(&from_port.to_be_bytes());
    transport[2..4].copy_from_slice(&packet.to_port.to_be_bytes());
    match packet.protocol {
        Protocol::Tcp => {
            let mut tcp = MutableTcpPacket::new(&mut transport).expect("room");
            tcp.set_sequence(id);
            tcp.set_data_offset(5);
            tcp.set_window(1000);
            tcp.set_flags(if packet.state == State::Invalid {
                TcpFlags::RST
            } else {
                TcpFlags::SYN
            });
            let tcp = tcp.to_immutable();
            let sum = match (packet.from, packet.to) {
                (IpAddr::V4(from), IpAddr::V4(to)) => {
                    pnet_packet::tcp::ipv4_checksum(&tcp, &from, &to)
                }
                (IpAddr::V6(from), IpAddr::V6(to)) => {
                    pnet_packet::tcp::ipv6_checksum(&tcp, &from, &to)
                }
                _ => panic!("mixed families"),
            };
            transport[16..18].copy_from_slice(&sum.to_be_bytes());
        }
        Protocol::Udp => {
            transport[8..12].copy_from_slice(&id.to_be_bytes());
            let mut udp = MutableUdpPacket::new(&mut transport).expect("room");
            udp.set_length(12);
            let udp = udp.to_immutable();
            let sum = match (packet.from, packet.to) {
                (IpAddr::V4(from), IpAddr::V4(to)) => {
                    pnet_packet::udp::ipv4_checksum(&udp, &from, &to)
                }
                (IpAddr::V6(from), IpAddr::V6(to)) => {
                    pnet_packet::udp::ipv6_checksum(&udp, &from, &to)
                }
                _ => panic!("mixed families"),
            };
            transport[6..8].copy_from_slice(&sum.to_be_bytes());
        }
        Protocol::Sctp => {
            // RFC 9260, section 3.3.2: an INIT chunk, with verification tag 0 in the header.
            transport[12] = 1;
            transport[14..16].copy_from_slice(&20_u16.to_be_bytes());
            transport[16..20].copy_from_slice(&id.to_be_bytes());
            transport[20..24].copy_from_slice(&65_535_u32.to_be_bytes());
            transport[24..28].copy_from_slice(&[0, 1, 0, 1]);
            transport[28..32].copy_from_slice(&1_u32.to_be_bytes());
            let sum = crc32c(&transport);
            transport[8..12].copy_from_slice(&sum.to_le_bytes());
        }
    }
    let next = match packet.protocol {
        Protocol::Tcp => IpNextHeaderProtocols::Tcp,
        Protocol::Udp => IpNextHeaderProtocols::Udp,
        Protocol::Sctp => IpNextHeaderProtocols::Sctp,
    };
    let length = u16::try_from(transport.len()).expect("short");
    match (packet.from, packet.to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut bytes = vec![0; 20 + transport.len()];
            bytes[20..].copy_from_slice(&transport);
            let mut ip = MutableIpv4Packet::new(&mut bytes).expect("room");
            ip.set_version(4);
            ip.set_header_length(5);
            ip.set_total_length(20 + length);
            ip.set_ttl(64);
            ip.set_next_level_protocol(next);
            ip.set_source(from);
            ip.set_destination(to);
            let sum = pnet_packet::ipv4::checksum(&ip.to_immutable());
            ip.set_checksum(sum);
            bytes
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut bytes = vec![0; 40 + transport.len()];
            bytes[40..].copy_from_slice(&transport);
            let mut ip = MutableIpv6Packet::new(&mut bytes).expect("room");
            ip.set_version(6);
            ip.set_payload_length(length);
            ip.set_hop_limit(64);
            ip.set_next_header(next);
            ip.set_source(from);
            ip.set_destination(to);
            bytes
        }
        _ => panic!("mixed families"),
    }
}

/// CRC-32C of an SCTP packet whose checksum is zero: RFC 9260, appendix A.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let carry = crc & 1;
            crc >>= 1;
            if carry == 1 {
                crc ^= 0x82f6_3b78;
            }
        }
    }
    !crc
}

/// An IP packet's protocol, addresses and what they carry.
fn ip_parts(bytes: &[u8]) -> (u8, IpAddr, IpAddr, &[u8]) {
    if bytes[0] >> 4 == 4 {
        let header = usize::from(bytes[0] & 15) * 4;
        let address = |at: usize| {
            let bytes: [u8; 4] = bytes[at..at + 4].try_into().expect("four");
            IpAddr::from(bytes)
        };
        (bytes[9], address(12), address(16), &bytes[header..])
    } else {
        let address = |at: usize| {
            let bytes: [u8; 16] = bytes[at..at + 16].try_into().expect("sixteen");
            IpAddr::from(bytes)
        };
        (bytes[6], address(8), address(24), &bytes[40..])
    }
}

/// What a packet that came out of a link means; nothing for the kernel's own chatter.
fn read(bytes: &[u8], sent: &Packet, id: u32) -> Option<Seen> {
    let (protocol, from, to, rest) = ip_parts(bytes);
    // Multicast listener reports begin with a hop-by-hop header (RFC 3810).
    if protocol == 0 {
        return None;
    }
    if protocol == 1 || protocol == 58 {
        return read_icmp(protocol == 58, rest);
    }
    assert_eq!(
        protocol,
        sent.protocol.number(),
        "an unknown packet came out"
    );
    let at = match sent.protocol {
        Protocol::Tcp => 4,
        Protocol::Udp => 8,
        Protocol::Sctp => 16,
    };
    let tag = u32::from_be_bytes(rest[at..at + 4].try_into().expect("four"));
    assert_eq!(tag, id, "another packet came out: {from} to {to}");
    let port = u16::from_be_bytes([rest[2], rest[3]]);
    Some(Seen::Sent {
        to: SocketAddr::new(to, port),
        masqueraded: from != sent.from,
    })
}

/// What an ICMP socket on the node read: with the IP header in IPv4, without it in IPv6.
fn read_local(family: Family, bytes: &[u8]) -> Option<Seen> {
    match family {
        Family::V4 => read_icmp(false, ip_parts(bytes).3),
        Family::V6 => read_icmp(true, bytes),
    }
}

/// RFC 792, RFC 1812 and RFC 4443: destination unreachable.
fn read_icmp(v6: bool, icmp: &[u8]) -> Option<Seen> {
    match (v6, icmp[0], icmp[1]) {
        (false, 3, 3) | (true, 1, 4) => Some(Seen::Refused),
        (false, 3, 13) | (true, 1, 1) => Some(Seen::TakenIn),
        (false, 3, code) | (true, 1, code) => panic!("unreachable, code {code}"),
        _ => None,
    }
}

/// The node's address on the link towards `to`.
fn link_address(to: IpAddr) -> IpAddr {
    match to {
        IpAddr::V4(to) if to.octets()[..3] == PODS_V4.octets()[..3] => PODS_V4.into(),
        IpAddr::V4(_) => NODE_V4.into(),
        IpAddr::V6(to) if to.segments()[..4] == PODS_V6.segments()[..4] => PODS_V6.into(),
        IpAddr::V6(_) => NODE_V6.into(),
    }
}

/// A prediction in the words of what can be seen.
pub(crate) fn expected(
    outcome: &Outcome<'_>,
    packet: &Packet,
    local: impl Fn(IpAddr) -> bool,
) -> Seen {
    // Masquerading gives a packet the address of the link it leaves by, which it can have already.
    let sent = |to: SocketAddr| Seen::Sent {
        to,
        masqueraded: outcome.masqueraded && packet.from != link_address(to.ip()),
    };
    match outcome.fate {
        Fate::Endpoint { endpoint } if local(endpoint.ip()) => Seen::TakenIn,
        Fate::Endpoint { endpoint } => sent(endpoint),
        // No packet of these is of a flow that was translated before.
        Fate::Forwarded | Fate::Leaked | Fate::Tracked => {
            sent(SocketAddr::new(packet.to, packet.to_port))
        }
        Fate::Node => Seen::TakenIn,
        Fate::Dropped { .. } => Seen::Nothing,
        Fate::Rejected { .. } => Seen::Refused,
    }
}

/// Makes packets to everything in a cluster, and to things beside it.
pub(crate) struct Packets<'a> {
    rng: ChaCha8Rng,
    ports: Vec<(usize, &'a ServicePort)>,
    cluster: &'a Cluster,
    family: Family,
    next_port: u16,
}

impl<'a> Packets<'a> {
    pub(crate) fn new(cluster: &'a Cluster, family: Family, seed: u64) -> Self {
        let ports = cluster
            .services
            .iter()
            .enumerate()
            .filter(|(_, s)| s.cluster_ips.iter().any(|ip| family.holds(*ip)))
            .flat_map(|(index, s)| s.ports.iter().map(move |p| (index, p)))
            .collect();
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            ports,
            cluster,
            family,
            next_port: FIRST_SOURCE_PORT,
        }
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.rng.random_range(0..from.len())])
    }

    fn node_addresses(&self) -> [IpAddr; 2] {
        match self.family {
            Family::V4 => [NODE_V4.into(), PODS_V4.into()],
            Family::V6 => [NODE_V6.into(), PODS_V6.into()],
        }
    }

    fn source(&mut self, port: &ServicePort) -> (Via, IpAddr) {
        let low = self.rng.random_range(201..250);
        let zone = self.rng.random_range(0..6_u8);
        match self.rng.random_range(0..10) {
            0..=2 => (Via::Pods, random::pod(0, low, self.family)),
            3 | 4 => (Via::Node, self.node_addresses()[0]),
            5 => {
                let own: Vec<IpAddr> = port
                    .endpoints
                    .iter()
                    .filter(|e| e.node == random::NODE && self.family.holds(e.address))
                    .map(|e| e.address)
                    .collect();
                let hairpin = self.pick(&own);
                (
                    Via::Pods,
                    hairpin.unwrap_or(random::pod(0, low, self.family)),
                )
            }
            6 => (Via::Out, random::pod(1, low, self.family)),
            _ => (
                Via::Out,
                match self.family {
                    Family::V4 => IpAddr::from([198, 18, zone, low]),
                    Family::V6 => {
                        let zone = u16::from(zone);
                        IpAddr::from([0x2001, 0xdb8, 0x18, zone, 0, 0, 0, u16::from(low)])
                    }
                },
            ),
        }
    }

    fn destination(&mut self, service: usize, port: &ServicePort) -> (IpAddr, u16) {
        let family = self.family;
        let service = &self.cluster.services[service];
        let of_family = |list: &[IpAddr]| -> Vec<IpAddr> {
            list.iter().copied().filter(|a| family.holds(*a)).collect()
        };
        let cluster_ip = of_family(&service.cluster_ips)[0];
        let node = self.node_addresses();
        let chosen = match self.rng.random_range(0..12) {
            0 | 1 => self
                .pick(&of_family(&service.external_ips))
                .map(|ip| (ip, port.port)),
            2 | 3 => self
                .pick(&of_family(&service.load_balancer_ips))
                .map(|ip| (ip, port.port)),
            4..=6 => {
                let address = self.pick(&node).expect("two");
                port.node_port.map(|number| (address, number))
            }
            7 => {
                // A port that no Service has, of an address that one has.
                Some((cluster_ip, 9))
            }
            8 => Some(match family {
                Family::V4 => (IpAddr::from([10, 100, 0, 1]), 80),
                Family::V6 => (IpAddr::from([0xfd00, 0x10, 0x96, 0, 0, 0, 1, 1]), 80),
            }),
            9 => service
                .health_check_node_port
                .map(|number| (node[0], number)),
            10 => {
                let endpoints = port.endpoints.iter();
                let sockets: Vec<(IpAddr, u16)> = endpoints
                    .filter(|e| family.holds(e.address))
                    .map(|e| (e.address, e.port))
                    .collect();
                self.pick(&sockets)
            }
            _ => None,
        };
        chosen.unwrap_or((cluster_ip, port.port))
    }

    pub(crate) fn next(&mut self) -> (Packet, Via) {
        let index = self.rng.random_range(0..self.ports.len());
        let (service, port) = self.ports[index];
        let (via, from) = self.source(port);
        let (to, to_port) = self.destination(service, port);
        let protocol = if self.rng.random_range(0..20) == 0 {
            Protocol::Udp
        } else {
            port.protocol
        };
        let invalid = protocol == Protocol::Tcp && self.rng.random_range(0..25) == 0;
        self.next_port += 1;
        let packet = Packet {
            origin: match via {
                Via::Node => Origin::Node,
                Via::Pods => Origin::Link(Some("pods".to_owned())),
                Via::Out => Origin::Link(Some("out".to_owned())),
            },
            from,
            from_port: Some(self.next_port),
            to,
            to_port,
            protocol,
            state: if invalid { State::Invalid } else { State::New },
        };
        (packet, via)
    }
}

/// What the runs found, over all clusters.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Packets sent.
    pub packets: u32,
    /// Those that went where the oracle said they could.
    pub right: u32,
    /// Packets that reached an endpoint.
    pub delivered: u32,
    /// Packets that were refused, dropped, taken in or sent on untranslated.
    pub refused: u32,
    /// Dropped.
    pub dropped: u32,
    /// Choices whose frequencies were compared with their probabilities.
    pub choices: u32,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} packets as predicted ({} left the node, {} refused, {} dropped); frequencies \
             of {} choices agree",
            self.right, self.packets, self.delivered, self.refused, self.dropped, self.choices
        )
    }
}

/// Sends `packets` random packets into each of `clusters` random clusters in `mode`, and compares
/// what becomes of each with the oracle's answer.
pub fn walk_agrees_with_the_kernel(mode: Mode, clusters: u64, packets: u32) -> Tally {
    stay_on_one_cpu();
    let mut tally = Tally::default();
    for seed in 0..clusters {
        one_cluster(mode, seed, packets, &mut tally);
    }
    println!("{mode}: {tally}");
    tally
}

/// A CPU's queue of packets is worked off in order; another one's is another.
pub(crate) fn stay_on_one_cpu() {
    let mut set = nix::sched::CpuSet::new();
    let allowed =
        nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).expect("an affinity");
    let cpu = (0..nix::sched::CpuSet::count())
        .find(|cpu| allowed.is_set(*cpu).unwrap_or(false))
        .expect("a CPU");
    set.set(cpu).expect("it is one");
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).expect("it is ours");
}

pub(crate) fn view(cluster: &Cluster, ns: &Netns) -> NodeView {
    let mut view = NodeView::of(cluster, random::NODE).expect("worker-0 is one of the nodes");
    view.addresses = vec![
        NODE_V4.into(),
        NODE_V6.into(),
        PODS_V4.into(),
        PODS_V6.into(),
    ];
    view.cluster_cidrs = random::CLUSTER_CIDRS.into();
    let objects = [iptables::INVALID_DROPPED, iptables::LOCALHOST_NODE_PORTS];
    view.nfacct = nfacct::supported(ns, &objects).expect("nfacct answers");
    view
}

/// How many packets of each family: two thirds of the Services are IPv4's.
pub(crate) fn shares(count: u32) -> [(Family, u32); 2] {
    [(Family::V4, count - count / 4), (Family::V6, count / 4)]
}

fn one_cluster(mode: Mode, seed: u64, count: u32, tally: &mut Tally) {
    let cluster = random::cluster(seed, 25);
    let mut node = Node::build();
    let view = view(&cluster, &node.ns);
    apply::apply(&node.ns, &render(&cluster, &view, mode)).expect("the rules go in");
    let texts = dump::dump(&node.ns).expect("the rules come out");
    for (family, share) in shares(count) {
        let rules = Rules::parse(&texts, family).expect("they are understood");
        let local = view.addresses.iter().copied().collect();
        let place = rules.place(local, cluster.virtual_ips().collect());
        let layers = rules.layers();
        let oracle = layers.oracle(&place);
        let mut packets = Packets::new(&cluster, family, seed);
        let mut choice: Option<(Packet, Via)> = None;
        for id in 0..share {
            let (packet, via) = packets.next();
            let outcomes = oracle.walk(&packet);
            let total: f64 = outcomes.iter().map(|o| o.probability).sum();
            assert!((total - 1.0).abs() < 1e-9, "{packet:?}: {total}");
            let seen = node.send(&packet, via, id);
            tally.packets += 1;
            match seen {
                Seen::Sent { .. } => tally.delivered += 1,
                Seen::Refused => tally.refused += 1,
                Seen::Nothing => tally.dropped += 1,
                Seen::TakenIn => {}
            }
            let foretold = outcomes
                .iter()
                .any(|outcome| expected(outcome, &packet, |a| place.is_local(a)) == seen);
            assert!(
                foretold,
                "{mode}, cluster {seed}: {packet:?} became {seen:?}, but the oracle says\n{}",
                lines(&outcomes)
            );
            tally.right += 1;
            if choice.is_none() && outcomes.len() > 2 && !has_affinity(&cluster, &packet) {
                choice = Some((packet, via));
            }
        }
        if let Some((packet, via)) = choice {
            let outcomes = oracle.walk(&packet);
            frequencies_agree(mode, &mut node, &packet, via, &outcomes);
            tally.choices += 1;
        }
    }
}

/// The oracle's answer, a line a step.
pub(crate) fn lines(outcomes: &[Outcome<'_>]) -> String {
    let mut text = String::new();
    for outcome in outcomes {
        for visited in &outcome.steps {
            let step = &visited.step;
            let (hook, action) = (visited.hook, step.action);
            writeln!(
                text,
                "  {hook} {} {} {}: {action:?}",
                step.table, step.chain, step.rule
            )
            .expect("String");
        }
        let (share, fate) = (outcome.probability, outcome.fate);
        writeln!(
            text,
            "= {share:.4} {fate:?}, masqueraded: {}",
            outcome.masqueraded
        )
        .expect("String");
    }
    text
}

fn has_affinity(cluster: &Cluster, packet: &Packet) -> bool {
    cluster
        .services
        .iter()
        .filter(|s| {
            let ips = [&s.cluster_ips, &s.external_ips, &s.load_balancer_ips];
            ips.into_iter().flatten().any(|ip| *ip == packet.to)
                || s.ports.iter().any(|p| p.node_port == Some(packet.to_port))
        })
        .any(|s| s.affinity.is_some())
}

/// Sends the packet again and again from new source ports; Pearson's chi-squared of the endpoints.
fn frequencies_agree(
    mode: Mode,
    node: &mut Node,
    packet: &Packet,
    via: Via,
    outcomes: &[Outcome<'_>],
) {
    const TIMES: u16 = 1200;
    let mut counts: HashMap<Seen, u32> = HashMap::new();
    for n in 0..TIMES {
        let packet = Packet {
            from_port: Some(30_000 + n),
            ..packet.clone()
        };
        let seen = node.send(&packet, via, u32::from(n));
        *counts.entry(seen).or_default() += 1;
    }
    let mut probabilities: HashMap<Seen, f64> = HashMap::new();
    for outcome in outcomes {
        let seen = expected(outcome, packet, |a| a.is_loopback());
        *probabilities.entry(seen).or_default() += outcome.probability;
    }
    let mut chi_squared = 0.0;
    for (seen, probability) in &probabilities {
        let wanted = probability * f64::from(TIMES);
        let got = f64::from(counts.remove(seen).unwrap_or(0));
        if wanted > 0.0 {
            chi_squared += (got - wanted).powi(2) / wanted;
        }
    }
    assert!(counts.is_empty(), "{mode}: {packet:?}: {counts:?}");
    // At most 6 endpoints: chance alone gets above 60 with 5 degrees of freedom once in 10^11.
    assert!(
        chi_squared < 60.0,
        "{mode}: {packet:?}: chi-squared {chi_squared}"
    );
}
