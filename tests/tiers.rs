//! Both tiers see the same: on one node, at the same time, of the same packets.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use tracer::kernel::netns::Netns;
use tracer::probe::catalogue::{self, Detail};
use tracer::probe::tier::{Probes, Tier, Watch};
use tracer::record::run::PacketState;
use tracer::rules::Mode;
use tracer::scenario::node::TestNode;
use tracer::trace::session::{Event, Options, Session};
use tracer::trace::summary::Summary;

use tracer_ebpf::path::Target;
use tracer_ebpf::record::{IPV4, IPV6, kind, protocol};

use crate::truth::assert_nothing_was_missed;
use crate::{trace, verdicts};

/// How long packets are sent from all sides.
const LOAD: Duration = Duration::from_secs(3);

fn sessions(node: &TestNode) -> [Session; 2] {
    Tier::ALL.map(|tier| {
        let options = Options {
            tier: Some(tier),
            ..trace::options(Vec::new(), tier)
        };
        Session::start(node.lab.node(), options).expect("attaches")
    })
}

/// Flows, first packets' ends and verdicts of each Service, and what the probes counted.
fn told(summary: &Summary) -> Vec<String> {
    let services = summary.services.iter().map(|service| {
        let verdicts: BTreeMap<String, u64> = service
            .verdicts
            .iter()
            .map(|count| (count.verdict.to_string(), count.count))
            .collect();
        format!(
            "{}: {} flows, {} repeated, {verdicts:?}, {} answered",
            service.name, service.flows, service.repeated, service.answered.count
        )
    });
    let mut told: Vec<String> = services.collect();
    told.sort();
    let probes = summary.probes;
    told.push(format!(
        "{} journeys, {} transmitted, {} delivered, {} dropped, {} other, {} to endpoints",
        probes.journeys,
        probes.transmitted,
        probes.delivered_locally,
        probes.dropped,
        probes.other_packets,
        probes.to_endpoints
    ));
    for path in &summary.paths {
        for (state, node) in &path.node {
            told.push(format!("{} {state:?}: {} packets", path.path, node.count));
        }
    }
    told
}

/// Packets by path, state, hook and stage.
fn stages(summary: &Summary) -> BTreeMap<(&str, PacketState, &str, &str), u64> {
    let of_path = summary.paths.iter().flat_map(|path| {
        path.stages.iter().map(|stage| {
            let place = (stage.hook.as_str(), stage.stage.as_str());
            (
                (path.path.as_str(), stage.state, place.0, place.1),
                stage.histogram.count,
            )
        })
    });
    of_path.collect()
}

fn finish(sessions: [Session; 2]) -> [Summary; 2] {
    sessions.map(|session| {
        let tier = session.tier();
        let (_, summary) = session.finish().expect("ends");
        let probes = summary.probes;
        assert_eq!(
            (probes.ring_lost, probes.slot_collisions, probes.unpaired),
            (0, 0, 0),
            "{tier}: {probes:?}"
        );
        summary
    })
}

/// The same journeys, flows and verdicts of healthy traffic on three paths. Stages that both know have the
/// same packets; what the functions tier does not know is a component that is not there.
pub fn tiers_agree_on_traffic(mode: Mode) {
    let node = trace::node(mode);
    let mut sessions = sessions(&node);
    trace::send(&node, 40, 5);
    let [hooks, functions] = sessions.each_mut().map(|session| {
        let events = session.poll().expect("polls");
        let journeys = events.iter().filter(|e| matches!(e, Event::Journey(_)));
        journeys.count()
    });
    assert_eq!((hooks, functions), (120, 120));
    let [hooks, functions] = finish(sessions);
    assert_eq!(told(&functions), told(&hooks), "{mode}");
    let (by_hooks, by_functions) = (stages(&hooks), stages(&functions));
    for (place, count) in &by_functions {
        assert_eq!(by_hooks.get(place), Some(count), "{mode}: {place:?}");
    }
    // What every mode has: conntrack, nat, the ways into and out of hooks.
    for (hook, stage) in [
        ("PREROUTING", "raw"),
        ("PREROUTING", "conntrack"),
        ("PREROUTING", "dnat"),
        ("PREROUTING", "routing"),
        ("OUTPUT", "conntrack"),
        ("OUTPUT", "dnat"),
        ("OUTPUT", "filter"),
        ("POSTROUTING", "snat"),
        ("POSTROUTING", "helper"),
        ("POSTROUTING", "egress"),
    ] {
        let there = by_functions.keys().any(|(_, state, h, s)| {
            // What IPVS takes at OUTPUT comes to its end once more.
            let same = *h == hook || hook == "OUTPUT" && *h == "OUTPUT-ipvs";
            same && (*state, *s) == (PacketState::New, stage)
        });
        assert!(there, "{mode}: no {hook} {stage} in {by_functions:#?}");
    }
}

/// The same verdicts of prepared faults.
pub fn tiers_agree_on_faults(mode: Mode) {
    let node = verdicts::prepare(mode);
    let sessions = sessions(&node);
    let sockets = verdicts::ask(&node);
    assert_eq!(sockets.len(), 6);
    let [hooks, functions] = finish(sessions);
    assert_eq!(told(&functions), told(&hooks), "{mode}");
}

/// Sessions in one namespace tell the same; a later one says that somebody was there before. There is room for
/// several, and one for which there is none says so.
pub fn sessions_side_by_side_tell_the_same(mode: Mode) {
    const SESSIONS: usize = 4;
    let node = trace::node(mode);
    let start = || Session::start(node.lab.node(), trace::options(Vec::new(), Tier::Hooks));
    let mut sessions: Vec<Session> = (0..SESSIONS).map(|_| start().expect("attaches")).collect();
    for (number, session) in sessions.iter().enumerate() {
        let crowded = session
            .hints()
            .iter()
            .any(|hint| hint.contains("make room"));
        assert_eq!(crowded, number > 0, "{number}: {:?}", session.hints());
    }
    trace::send(&node, 40, 5);
    let mut summaries = Vec::new();
    for session in sessions.drain(..) {
        let (_, summary) = session.finish().expect("ends");
        assert_nothing_was_missed(&summary);
        summaries.push(told(&summary));
    }
    for other in &summaries[1..] {
        assert_eq!(*other, summaries[0], "{mode}");
    }
    let mut held = Vec::new();
    let error = loop {
        match start() {
            Ok(session) => held.push(session),
            Err(error) => break error.to_string(),
        }
        assert!(held.len() < 20, "there is no end of places");
    };
    assert!(held.len() >= SESSIONS, "{} sessions: {error}", held.len());
    assert!(error.contains("too many sessions"), "{error}");
}

/// First packets of both families are told, with conntrack's stage; what passes in another namespace, at the
/// same addresses, is not.
pub fn both_families_are_followed_in_one_namespace(tier: Tier) {
    const FLOWS: usize = 20;
    let [node, other] = ["node", "other"].map(tracked_loopback);
    let watch = Watch {
        targets: ["127.0.0.1:80", "[::1]:80"]
            .map(|target| {
                (
                    target.parse().expect("an address"),
                    protocol::UDP,
                    Target::Pod,
                )
            })
            .to_vec(),
        node_addresses: ["127.0.0.1", "::1"]
            .map(|address| address.parse().expect("an address"))
            .to_vec(),
        ..Watch::default()
    };
    let mut probes = Probes::attach(Some(tier), &node, &watch).expect("attaches");
    for netns in [&node, &other] {
        let send = || {
            for _ in 0..FLOWS {
                for (from, to) in [("127.0.0.1:0", "127.0.0.1:80"), ("[::1]:0", "[::1]:80")] {
                    let socket = UdpSocket::bind(from).expect("binds");
                    socket.send_to(b"x", to).expect("sends");
                }
            }
        };
        netns.run(send).expect("enters");
    }
    let records = probes.drain().expect("drains");
    for family in [IPV4, IPV6] {
        let first = records
            .iter()
            .filter(|record| (record.family, record.kind) == (family, kind::FIRST));
        // Out by lo, and in again.
        assert_eq!(first.count(), 2 * FLOWS, "{tier} {family}");
    }
    for record in records.iter().filter(|record| record.kind == kind::FIRST) {
        let steps = &record.stages.0[..usize::from(record.steps)];
        let conntrack = ("OUTPUT", "conntrack");
        let met = steps
            .iter()
            .any(|stage| catalogue::stage_name(*stage, Detail::Stages) == conntrack);
        assert_eq!(met, record.transmitted == 1, "{tier}: {record:?}");
    }
    let stats = probes.stats().expect("reads");
    assert_eq!((stats.unpaired, stats.collisions), (0, 0), "{stats:?}");
}

/// A namespace with a loopback whose connections are tracked.
fn tracked_loopback(name: &str) -> Netns {
    let netns = Netns::create(name).expect("root");
    let script = "ip link set lo up; \
        nft 'add table inet t; \
             add chain inet t out { type filter hook output priority 0; }; \
             add rule inet t out ct state new counter'";
    let status = netns.command("sh").args(["-ec", script]).status();
    assert!(status.expect("there is a shell").success());
    netns
}

/// Packets from all sides at once: IPVS calls OUTPUT from within INPUT and OUTPUT, softirqs come on top of
/// senders, senders move between CPUs. No packet is taken for another.
pub fn interleaved_packets_are_paired(mode: Mode, tier: Tier) {
    let node = trace::node(mode);
    let mut session =
        Session::start(node.lab.node(), trace::options(Vec::new(), tier)).expect("attaches");
    let targets = udp_services(&node);
    let stop = AtomicBool::new(false);
    let sent: u64 = std::thread::scope(|scope| {
        let from = |ns: &'static str, netns: &Netns, seed| {
            let (netns, targets, stop) = (netns.clone(), targets.clone(), &stop);
            scope.spawn(move || {
                let send = || send_until(stop, &targets, seed);
                netns
                    .run(send)
                    .unwrap_or_else(|error| panic!("{ns}: {error}"))
            })
        };
        let lab = &node.lab;
        let senders = [
            from("node", lab.node(), 0),
            from("node", lab.node(), 1),
            from("pod", lab.client_pod(), 2),
            from("pod", lab.client_pod(), 3),
        ];
        let begin = Instant::now();
        while begin.elapsed() < LOAD {
            session.poll().expect("polls");
            std::thread::sleep(Duration::from_millis(10));
        }
        stop.store(true, Ordering::Relaxed);
        senders
            .into_iter()
            .map(|sender| sender.join().expect("sends"))
            .sum()
    });
    std::thread::sleep(Duration::from_millis(200));
    let (_, summary) = session.finish().expect("ends");
    let probes = summary.probes;
    println!("{mode} {tier}: {sent} sent, {probes:?}");
    assert_eq!((probes.ring_lost, probes.unpaired), (0, 0), "{probes:?}");
    assert!(
        sent > 100 && probes.journeys >= sent,
        "{sent} sent, {probes:?}"
    );
    // What was given up is known; a sender that moves to another CPU within the kernel leaves its journey.
    assert!(
        probes.unfinished <= probes.slot_collisions + sent / 100,
        "{probes:?}"
    );
}

/// The node's UDP Services.
fn udp_services(node: &TestNode) -> Vec<SocketAddr> {
    let ports = node.cluster.services.iter().filter_map(|service| {
        let port = &service.ports[0];
        (port.protocol.number() == 17).then(|| SocketAddr::new(service.cluster_ips[0], port.port))
    });
    ports.collect()
}

/// Sends from a few sockets, new ones now and then, going round the CPUs; how many were sent.
fn send_until(stop: &AtomicBool, targets: &[SocketAddr], seed: usize) -> u64 {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let begin = Instant::now();
    let mut sent = 0;
    for round in seed.. {
        if stop.load(Ordering::Relaxed) || begin.elapsed() > 10 * LOAD {
            break;
        }
        let mut here = CpuSet::new();
        here.set(round % cpus).expect("a CPU");
        sched_setaffinity(Pid::from_raw(0), &here).expect("moves");
        let socket = UdpSocket::bind("0.0.0.0:0").expect("binds");
        for at in 0..16 {
            let to = targets[(round + at) % targets.len()];
            sent += u64::from(socket.send_to(b"1 x\n", to).is_ok());
        }
        // So that the session can read what it is told.
        std::thread::sleep(Duration::from_millis(5));
    }
    sent
}
