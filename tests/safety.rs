//! What tracing must not do to a node, and what a session must bear: nothing is changed, nothing stays behind,
//! nothing is lost uncounted, whatever happens meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use tracer::cluster::Protocol;
use tracer::kernel::netns::Netns;
use tracer::kernel::tun::Tun;
use tracer::kernel::{conntrack, tool};
use tracer::lab::plan;
use tracer::probe::catalogue::Detail;
use tracer::probe::tier::{Probes, Tier, Watch};
use tracer::rules::Mode;
use tracer::rules::walk::{Origin, Packet, State};
use tracer::scenario::node::TestNode;
use tracer::trace::session::{Options, Session};
use tracer_ebpf::path::Target;

use crate::oracle::packet_bytes;
use crate::trace::{as_dumped, node, on_one_thread, options, send};
use crate::truth::{assert_nothing_was_missed, wait_until};

/// A UDP Service of the laboratory: odd ones are.
const SERVICE: usize = 1;

/// Everything of a node that a tracer could change.
#[derive(Debug, PartialEq, Eq)]
struct Look {
    rules: Vec<String>,
    ruleset: String,
    settings: BTreeMap<String, String>,
    network: Vec<String>,
    /// Is the kernel counting what BPF programs cost?
    statistics: Option<String>,
}

impl Look {
    fn at(node: &TestNode) -> Self {
        let ns = node.lab.node();
        let ask = |tool: &str, arguments: &[&str]| {
            tool::run(ns, tool, arguments, "").unwrap_or_else(|error| panic!("{error}"))
        };
        let mut settings = BTreeMap::new();
        ns.run(|| read_all(Path::new("/proc/sys/net"), &mut settings))
            .expect("enters");
        assert!(settings.len() > 100, "{}", settings.len());
        Self {
            rules: as_dumped(node),
            // Without counters.
            ruleset: ask("nft", &["-s", "list", "ruleset"]),
            settings,
            network: ["link", "addr", "route", "rule"]
                .map(|what| ask("ip", &["-d", what, "show"]))
                .into(),
            statistics: fs::read_to_string("/proc/sys/kernel/bpf_stats_enabled").ok(),
        }
    }
}

/// Every readable file below a folder of `/proc/sys`, but the one that counts connections.
fn read_all(folder: &Path, found: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            read_all(&path, found);
        } else if !path.ends_with("nf_conntrack_count")
            && let Ok(value) = fs::read_to_string(&path)
        {
            found.insert(path.display().to_string(), value);
        }
    }
}

/// The connections that conntrack remembers.
fn connections(node: &TestNode) -> BTreeSet<(u8, SocketAddr, SocketAddr)> {
    let entries = conntrack::list(node.lab.node(), |_| true).expect("it is listed");
    let keys = entries
        .iter()
        .map(|entry| (entry.protocol, entry.source, entry.destination));
    keys.collect()
}

/// Rules, settings, links, addresses, routes and connections are the same after a session as before, but for
/// the connections that the traffic made.
pub fn tracing_changes_nothing(mode: Mode) {
    let node = node(mode);
    let before = Look::at(&node);
    assert!(before.rules.len() > 50);
    assert_eq!(connections(&node), BTreeSet::new());
    let session =
        Session::start(node.lab.node(), options(Vec::new(), Tier::Hooks)).expect("attaches");
    assert!(
        Look::at(&node).settings == before.settings,
        "attaching sets nothing"
    );
    let (_, summary) = session.finish().expect("ends");
    assert_eq!(summary.probes.journeys, 0);
    assert_eq!(Look::at(&node), before);
    assert_eq!(connections(&node), BTreeSet::new());

    let session =
        Session::start(node.lab.node(), options(Vec::new(), Tier::Hooks)).expect("attaches");
    let result = send(&node, 20, 5);
    session.finish().expect("ends");
    assert_eq!(Look::at(&node), before);
    let sent: BTreeSet<_> = result
        .flows
        .iter()
        .map(|flow| (flow.protocol.number(), flow.source, flow.destination))
        .collect();
    assert_eq!(sent.len(), 60);
    assert_eq!(connections(&node), sent);
}

/// A link that ends in a namespace: it goes when the namespace at its other end does.
fn has_link(ns: &Netns, link: &str) -> bool {
    let shown = ns.command("ip").args(["link", "show", link]).output();
    shown.expect("ip").status.success()
}

/// The node goes while a session lasts: the session ends in order with what it saw, and when it has ended
/// the namespace is no more.
pub fn a_node_that_vanishes_ends_the_session_in_order() {
    const FLOWS: u32 = 20;
    let node = node(Mode::Nftables);
    let beyond = node.lab.external().clone();
    let mut session =
        Session::start(node.lab.node(), options(Vec::new(), Tier::Hooks)).expect("attaches");
    send(&node, FLOWS, 6);
    drop(node);
    session.poll().expect("polls");
    assert!(has_link(&beyond, "eth0"), "the session holds the namespace");
    let (_, summary) = session.finish().expect("ends");
    assert_eq!(summary.flows(), u64::from(3 * FLOWS));
    wait_until("the namespace goes", || !has_link(&beyond, "eth0"));
}

/// Nobody but the probes is left in a namespace: their links hold it (`bpf_nf_link_attach`,
/// `net/netfilter/nf_bpf_link.c`), so that it cannot be torn down under them, what they told is still there to
/// read, and the namespace goes with them.
pub fn a_namespace_that_nobody_else_holds_goes_with_its_probes() {
    let (node, beyond) = (
        Netns::create("node").expect("root"),
        Netns::create("beyond").expect("root"),
    );
    let path = beyond.path();
    let commands = [
        "link set lo up".to_owned(),
        format!("link add eth0 type veth peer name eth0 netns {path}"),
    ];
    for command in commands {
        let arguments: Vec<&str> = command.split(' ').collect();
        tool::run(&node, "ip", &arguments, "").expect("ip");
    }
    let target: SocketAddr = "127.0.0.1:80".parse().expect("an address");
    let watch = Watch {
        targets: vec![(target, Protocol::Udp.number(), Target::Pod)],
        ..Watch::default()
    };
    let mut probes = Probes::attach(Some(Tier::Hooks), &node, &watch).expect("attaches");
    let socket = node.run(|| UdpSocket::bind("127.0.0.1:0").expect("binds"));
    socket
        .expect("enters")
        .send_to(b"x", target)
        .expect("sends");
    let before = probes.stats().expect("reads");
    // The datagram and the error that refuses it, each out by lo and in again.
    assert_eq!((before.journeys, before.transmitted), (4, 2), "{before:?}");
    assert!(has_link(&beyond, "eth0"));
    drop(node);
    assert_eq!(probes.stats().expect("reads").journeys, 4);
    assert!(!probes.drain().expect("drains").is_empty());
    assert!(!probes.times().expect("reads").is_empty());
    drop(probes);
    wait_until("the namespace goes", || !has_link(&beyond, "eth0"));
}

/// Rules go and come back a hundred times under traffic: every flow is told, every packet's end is known.
pub fn rules_flushed_over_and_over(mode: Mode) {
    const TIMES: u32 = 100;
    /// Ports that flows are sent from, one each.
    const PORTS: std::ops::Range<u16> = 20_000..60_000;
    let node = node(mode);
    let (vip, ns) = (node.vip(SERVICE), node.lab.node());
    let (save, flush, restore): (&[&str], &[&str], &[&str]) = match mode {
        Mode::IptablesLegacy => (
            &["iptables-legacy-save", "-t", "nat"],
            &["iptables-legacy", "-t", "nat", "-F"],
            &["iptables-legacy-restore"],
        ),
        _ => (
            &["nft", "list", "table", "ip", "kube-proxy"],
            &["nft", "flush", "table", "ip", "kube-proxy"],
            &["nft", "-f", "-"],
        ),
    };
    let run = |command: &[&str], input: &str| {
        tool::run(ns, command[0], &command[1..], input).unwrap_or_else(|error| panic!("{error}"))
    };
    let saved = run(save, "");
    let saved = match mode {
        Mode::IptablesLegacy => saved,
        _ => format!("delete table ip kube-proxy\n{saved}"),
    };
    let mut session = Session::start(ns, options(Vec::new(), Tier::Hooks)).expect("attaches");
    let done = AtomicBool::new(false);
    let mut sent = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..TIMES {
                run(flush, "");
                run(restore, &saved);
            }
            done.store(true, Ordering::Relaxed);
        });
        let mut ports = PORTS;
        while !done.load(Ordering::Relaxed) {
            for port in ports.by_ref().take(20) {
                let bind = || UdpSocket::bind(("0.0.0.0", port)).expect("binds");
                let socket = node.lab.client_pod().run(bind).expect("enters");
                socket.send_to(b"1\n", vip).expect("sends");
                sent += 1;
            }
            session.poll().expect("polls");
            std::thread::sleep(Duration::from_millis(3));
        }
    });
    let (_, summary) = session.finish().expect("ends");
    let probes = summary.probes;
    let given_up = probes.slot_collisions + probes.unpaired;
    assert_eq!((probes.ring_lost, probes.unfinished), (0, 0), "{probes:?}");
    assert_eq!(
        probes.journeys,
        probes.transmitted + probes.delivered_locally + probes.dropped + given_up,
        "{probes:?}"
    );
    let [service] = summary.services.as_slice() else {
        panic!("{summary}");
    };
    assert_eq!(service.repeated, 0, "{summary}");
    assert!(
        service.flows <= sent && service.flows + given_up >= sent && given_up * 100 <= sent,
        "{sent} sent: {summary}"
    );
    assert!(service.wrong() > 0 && service.wrong() < sent, "{summary}");
    assert!(
        summary.changes() >= u64::from(TIMES),
        "{}",
        summary.changes()
    );
}

/// Resident memory of this process, bytes.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.expect("a number") << 10
}

/// New flows to a Service whose endpoint is silent, ready to be sent.
struct Burst {
    node: TestNode,
    link: Tun,
    packets: Vec<Vec<u8>>,
}

impl Burst {
    /// As many flows, each from an address and port of its own.
    fn new(flows: u32) -> Self {
        const PORTS_EACH: u32 = 10_000;
        /// Of the pods' network, and nobody's.
        const SOURCES: Ipv4Addr = Ipv4Addr::new(10, 244, 112, 0);
        let mut node = TestNode::build(2, 1).expect("a laboratory");
        let silent = plan::NODE2_SERVERS.nth(100);
        node.cluster.services[SERVICE].ports[0].endpoints[0].address = silent;
        on_one_thread(node.apply(Mode::Nftables)).expect("rules");
        let silence = format!(
            "add table ip fault; add chain ip fault in {{ type filter hook prerouting priority -300; }}; \
             add rule ip fault in ip daddr {silent} drop"
        );
        tool::run(node.lab.node2(), "nft", &[&silence], "").expect("nft");
        let link = Tun::create(node.lab.node(), "burst").expect("a link");
        tool::run(node.lab.node(), "ip", &["link", "set", "burst", "up"], "").expect("ip");
        let vip = node.vip(SERVICE);
        let packet = |number: u32| {
            let from = u32::from(SOURCES) + 1 + number / PORTS_EACH;
            let packet = Packet {
                origin: Origin::Link(Some("burst".to_owned())),
                from: IpAddr::V4(from.into()),
                from_port: u16::try_from(10_000 + number % PORTS_EACH).ok(),
                to: vip.ip(),
                to_port: vip.port(),
                protocol: Protocol::Udp,
                state: State::New,
            };
            packet_bytes(&packet, number)
        };
        Self {
            packets: (0..flows).map(packet).collect(),
            node,
            link,
        }
    }

    /// Sends all of it as fast as one CPU can, and does `meanwhile` over and over.
    fn send(&mut self, mut meanwhile: impl FnMut()) -> Duration {
        let (link, packets) = (&mut self.link, &self.packets);
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let begin = Instant::now();
                for packet in packets {
                    link.send(packet).expect("the node takes it");
                }
                begin.elapsed()
            });
            while !sender.is_finished() {
                meanwhile();
            }
            sender.join().expect("sends")
        })
    }
}

/// How often `svcpath trace` looks.
const EVERY: Duration = Duration::from_millis(20);

/// New flows as fast as one CPU can send them, to a Service whose endpoint is silent: told and lost are
/// together all, and what they take of memory has an end. A session that is `deaf` meanwhile, which is more than
/// the ring buffer can bear, counts what it lost.
pub fn a_burst_of_new_flows_is_told_or_counted(deaf: bool) {
    const FLOWS: u32 = 100_000;
    const MOST_MEMORY: u64 = 256 << 20;
    let mut burst = Burst::new(FLOWS);
    let mut session =
        Session::start(burst.node.lab.node(), options(Vec::new(), Tier::Hooks)).expect("attaches");
    let before = resident();
    let took = burst.send(|| {
        std::thread::sleep(EVERY);
        if !deaf {
            session.poll().expect("polls");
        }
    });
    let (_, summary) = session.finish().expect("ends");
    let grown = resident().saturating_sub(before);
    println!(
        "{FLOWS} new flows in {took:?}: {} told, {} lost; {} MiB more",
        summary.flows(),
        summary.probes.ring_lost,
        grown >> 20
    );
    let probes = summary.probes;
    assert_eq!(probes.journeys, u64::from(FLOWS), "{probes:?}");
    assert_eq!(probes.transmitted, u64::from(FLOWS), "{probes:?}");
    assert_eq!(summary.flows() + probes.ring_lost, u64::from(FLOWS));
    // What one that listens loses depends on who else wants the processors.
    assert!(!deaf || probes.ring_lost > 0, "{probes:?}");
    assert!(summary.flows() > u64::from(FLOWS) / 4, "{probes:?}");
    assert!(grown < MOST_MEMORY, "{grown}");
}

/// CPU time of this thread.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("Linux");
    Duration::from(time)
}

/// How many new flows a second one CPU can send without probes, and how many while a session traces them; what
/// the session then takes of another CPU, and what it loses. Measured, not judged.
pub fn rates_of_new_flows() {
    const FLOWS: u32 = 200_000;
    for (name, detail, sample) in [
        ("no session", None, 1),
        ("svcpath trace", Some(Detail::Hooks), 64),
        ("--detail stages --sample 1", Some(Detail::Stages), 1),
    ] {
        // Conntrack knows none of them.
        let mut burst = Burst::new(FLOWS);
        let mut session = detail.map(|detail| {
            let options = Options {
                cost: false,
                detail,
                sample,
                ..options(Vec::new(), Tier::Hooks)
            };
            Session::start(burst.node.lab.node(), options).expect("attaches")
        });
        let (mut busy, mut longest) = (Duration::ZERO, Duration::ZERO);
        let took = burst.send(|| {
            std::thread::sleep(EVERY);
            let before = thread_time();
            if let Some(session) = &mut session {
                session.poll().expect("polls");
            }
            let look = thread_time().saturating_sub(before);
            (busy, longest) = (busy + look, longest.max(look));
        });
        print!(
            "{name}: {FLOWS} new flows in {took:.2?}, {:.0} a second",
            f64::from(FLOWS) / took.as_secs_f64()
        );
        if let Some(session) = session {
            let (_, summary) = session.finish().expect("ends");
            print!(
                "; {} told, {} lost, {} forgotten; looks took {:.1} % of a CPU, the longest {longest:.1?}",
                summary.flows(),
                summary.probes.ring_lost,
                summary.probes.forgotten,
                busy.as_secs_f64() / took.as_secs_f64() * 100.0
            );
        }
        println!();
    }
}

/// Modules that are loaded, and by how many they are used.
fn modules() -> BTreeMap<String, u32> {
    let listed = fs::read_to_string("/proc/modules").expect("a kernel with modules");
    let module = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.nth(1)?.parse().ok()?))
    };
    listed.lines().filter_map(module).collect()
}

/// The modules of a mode are unloaded under a session that traces it.
pub fn modules_unloaded_under_a_session(mode: Mode, module: &str, flush: &[&str]) {
    let node = node(mode);
    let mut session =
        Session::start(node.lab.node(), options(Vec::new(), Tier::Hooks)).expect("attaches");
    send(&node, 10, 8);
    session.poll().expect("polls");
    assert!(modules().contains_key(module));
    for command in flush {
        let arguments: Vec<&str> = command.split(' ').collect();
        tool::run(node.lab.node(), arguments[0], &arguments[1..], "").expect("it is flushed");
    }
    // Those that use it go first.
    wait_until("the module goes", || {
        for (name, users) in modules() {
            let ours = ["nft_", "nf_tables", "ip_vs", "xt_"]
                .iter()
                .any(|p| name.starts_with(p));
            if ours && users == 0 {
                // One that has found a new user meanwhile is tried again.
                let _ = Command::new("rmmod").arg(&name).output();
            }
        }
        !modules().contains_key(module)
    });
    send(&node, 10, 9);
    session.poll().expect("polls");
    let (_, summary) = session.finish().expect("ends");
    assert_nothing_was_missed(&summary);
    assert_eq!(summary.flows(), 60, "{summary}");
}
