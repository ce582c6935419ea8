//! The hooks tier on this machine's kernel, in a namespace of its own. Needs root.

use std::io::Read as _;
use std::net::{TcpListener, TcpStream, UdpSocket};

use tracer::kernel::netns::Netns;
use tracer::probe::tier::{Probes, Tier, Watch};
use tracer_ebpf::path::{Origin, Path, Target};
use tracer_ebpf::record::{Record, STAGE_NODE, kind, protocol, state};

fn node_with_loopback() -> Netns {
    let node = Netns::create("node").expect("root");
    let ok = node
        .command("ip")
        .args(["link", "set", "lo", "up"])
        .status()
        .expect("ip runs");
    assert!(ok.success());
    node
}

/// Enables connection tracking, as any nat table does.
fn track(node: &Netns) {
    let ok = node
        .command("nft")
        .arg("add table inet t; add chain inet t c { type filter hook output priority 0; }; add rule inet t c ct state new counter; add chain inet t p { type filter hook prerouting priority 0; }; add rule inet t p ct state new counter")
        .status()
        .expect("nft runs");
    assert!(ok.success());
}

#[test]
fn every_flow_to_a_watched_port_is_counted_once_at_every_stage() {
    const FLOWS: u64 = 50;
    let node = node_with_loopback();
    track(&node);
    let (server, udp) = node
        .run(|| {
            (
                TcpListener::bind("127.0.0.1:0").expect("binds"),
                UdpSocket::bind("127.0.0.1:0").expect("binds"),
            )
        })
        .expect("enters");
    let tcp_address = server.local_addr().expect("bound");
    let udp_address = udp.local_addr().expect("bound");
    let watch = Watch {
        targets: vec![
            (tcp_address, 6, Target::Pod),
            (udp_address, 17, Target::Pod),
        ],
        node_addresses: vec!["127.0.0.1".parse().expect("address")],
        ..Watch::default()
    };
    let mut probes = Probes::attach(Some(Tier::Hooks), &node, &watch).expect("attaches");
    for _ in 0..FLOWS {
        let mut client = node
            .run(|| TcpStream::connect(tcp_address).expect("connects"))
            .expect("enters");
        let (accepted, _) = server.accept().expect("accepts");
        drop(accepted);
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).expect("reads");
        node.run(|| {
            let client = UdpSocket::bind("127.0.0.1:0").expect("binds");
            client.send_to(b"hello", udp_address).expect("sends");
        })
        .expect("enters");
        let mut buffer = [0; 16];
        udp.recv(&mut buffer).expect("receives");
    }
    let stats = probes.stats().expect("reads");
    assert_eq!(stats.unpaired, 0, "{stats:?}");
    assert_eq!(stats.ring_lost, 0, "{stats:?}");
    assert_eq!(stats.collisions, 0, "{stats:?}");
    assert_eq!(
        stats.journeys,
        stats.transmitted + stats.delivered + stats.dropped,
        "{stats:?}"
    );

    let times = probes.times().expect("reads");
    // On the loopback every first packet makes two journeys: out by lo, and in again.
    let path = Path {
        origin: Origin::Host,
        target: Target::Pod,
    };
    let count = |stage, wanted| -> u64 {
        times
            .iter()
            .filter(|t| t.path == path && t.stage == stage && t.state == wanted)
            .flat_map(|t| &t.cells)
            .map(|cell| cell[2])
            .sum()
    };
    assert_eq!(count(STAGE_NODE, state::NEW), 2 * FLOWS, "{times:#?}");
    let records = probes.drain().expect("drains");
    let told = |kind, protocol| {
        let of_kind = |r: &&Record| (r.kind, r.protocol) == (kind, protocol);
        records.iter().filter(of_kind).count() as u64
    };
    for protocol in [protocol::TCP, protocol::UDP] {
        assert_eq!(told(kind::FIRST, protocol), 2 * FLOWS);
    }
    // Every SYN was answered, and the answer made two journeys as well; nobody answered a datagram.
    assert_eq!(told(kind::ANSWER, protocol::TCP), 2 * FLOWS);
    assert_eq!(told(kind::ANSWER, protocol::UDP), 0);
    for record in &records {
        // A packet that a socket dropped has let go of its connection.
        assert_eq!(record.tracked == 1, record.kind != kind::DROP, "{record:?}");
        let steps: u64 = record.took.0[..usize::from(record.steps)]
            .iter()
            .map(|took| u64::from(*took))
            .sum();
        assert_eq!(steps, record.elapsed, "stages sum to the whole");
    }
}

/// Where more targets come than there is room for, those that find none are counted, and the others are watched.
#[test]
fn what_finds_no_room_is_counted_and_ends_nothing() {
    const MANY: u16 = 200;
    let node = node_with_loopback();
    track(&node);
    let server = UdpSocket::bind("127.0.0.1:0").expect("binds");
    let watched = server.local_addr().expect("bound");
    let target = |port: u16| (([10, 96, 0, 1], port).into(), 17, Target::ClusterIp);
    let mut watch = Watch {
        targets: vec![(watched, 17, Target::Pod)],
        node_addresses: vec!["127.0.0.1".parse().expect("address")],
        spare: 1,
        ..Watch::default()
    };
    let mut probes = Probes::attach(Some(Tier::Hooks), &node, &watch).expect("attaches");
    assert_eq!(probes.without_room(), 0);
    let late: Vec<_> = (1..=MANY).map(target).collect();
    probes.watch_targets(&late).expect("goes on");
    let without = probes.without_room();
    assert!(without > 0 && without < usize::from(MANY), "{without}");
    // Told again they find none again, and are counted once.
    watch.targets.extend(late);
    probes.watch_also(&watch).expect("goes on");
    assert_eq!(probes.without_room(), without);
    node.run(|| {
        let client = UdpSocket::bind("127.0.0.1:0").expect("binds");
        client.send_to(b"hello", watched).expect("sends");
    })
    .expect("enters");
    assert!(probes.stats().expect("reads").journeys > 0);
}
