//! The tracer as an instrument: what it tells against what is known of the same packets by other means.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use tracer::cluster::random;
use tracer::kernel::{apply, dump, tool};
use tracer::lab::plan;
use tracer::probe::tier::Tier;
use tracer::record::run::{Histogram, PacketState};
use tracer::rules::oracle::Rules;
use tracer::rules::walk::{Packet, State};
use tracer::rules::{Mode, render};
use tracer::scenario::node::TestNode;
use tracer::trace::flows::{Decided, Key};
use tracer::trace::journey::{End, Journey};
use tracer::trace::session::{Event, Options, Session};
use tracer::trace::summary::Summary;
use tracer::trace::verdict::Verdict;

use crate::oracle::{self, Node, Packets, Seen, expected};
use crate::trace::{on_one_thread, options, send};

/// Longer than anything here takes on a machine under load.
const PATIENCE: Duration = Duration::from_secs(20);

/// Drops what goes to the endpoints of these Services, forwarded and sent by the node itself, and counts it.
fn forbid(node: &TestNode, services: &[usize]) {
    let endpoints = services
        .iter()
        .flat_map(|service| &node.cluster.services[*service].ports[0].endpoints)
        .map(|endpoint| endpoint.address.to_string());
    let endpoints = endpoints.collect::<Vec<_>>().join(", ");
    let table = format!(
        "table ip fault {{\n counter dropped {{ }}\n \
         chain forward {{ type filter hook forward priority 10;\n \
           ip daddr {{ {endpoints} }} counter name dropped drop\n }}\n \
         chain output {{ type filter hook output priority 10;\n \
           ip daddr {{ {endpoints} }} counter name dropped drop\n }}\n}}\n"
    );
    tool::run(node.lab.node(), "nft", &["-f", "-"], &table).expect("the rules go in");
}

/// Packets that [`forbid`]'s rules dropped, by the kernel's own count.
fn dropped_by_the_kernel(node: &TestNode) -> u64 {
    dropped_in(node, "fault")
}

/// Packets that a table's counter `dropped` counted.
fn dropped_in(node: &TestNode, table: &str) -> u64 {
    let arguments = ["list", "counter", "ip", table, "dropped"];
    let said = tool::run(node.lab.node(), "nft", &arguments, "").expect("it is listed");
    said.split_once("packets ")
        .and_then(|(_, rest)| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .expect("a counter")
}

pub(crate) fn journeys(events: Vec<Event>) -> impl Iterator<Item = Journey> {
    events.into_iter().filter_map(|event| match event {
        Event::Journey(journey) => Some(journey),
        _ => None,
    })
}

pub(crate) fn assert_nothing_was_missed(summary: &Summary) {
    let probes = summary.probes;
    assert_eq!(
        (
            probes.ring_lost,
            probes.slot_collisions,
            probes.unpaired,
            probes.unfinished
        ),
        (0, 0, 0, 0),
        "{probes:?}"
    );
}

/// Each first packet's stages sum to its time on the node, whether it arrived or was dropped; and so do
/// the histograms of each path.
pub fn stages_sum_to_the_whole(mode: Mode) {
    const FLOWS: u32 = 300;
    let node = TestNode::build(10, 3).expect("a laboratory");
    on_one_thread(node.apply(mode)).expect("rules");
    forbid(&node, &[2, 3]);
    let session =
        Session::start(node.lab.node(), options(Vec::new(), Tier::Hooks)).expect("attaches");
    send(&node, FLOWS, 11);
    let (events, summary) = session.finish().expect("ends");
    assert_nothing_was_missed(&summary);

    let mut told: BTreeMap<&str, (u32, u32)> = BTreeMap::new();
    // What was dropped on its way has stages, and no whole: it did not pass the whole node.
    let mut dropped_ns: BTreeMap<&str, u64> = BTreeMap::new();
    for journey in journeys(events).filter(|journey| journey.first == Some(true)) {
        let steps: u64 = journey.stages.iter().map(|stage| stage.took_ns).sum();
        assert_eq!(
            steps,
            journey.elapsed_ns.unwrap_or(0),
            "{mode}: {journey:?}"
        );
        assert!(journey.elapsed_ns > Some(0), "{journey:?}");
        let (went, dropped) = told.entry(journey.path).or_default();
        match &journey.end {
            End::Dropped { stage, .. } => {
                assert_ne!(stage, "INPUT deliver", "{journey:?}");
                *dropped_ns.entry(journey.path).or_default() += steps;
                *dropped += 1;
            }
            _ => *went += 1,
        }
    }
    assert_eq!(told.len(), 3, "{mode}: {told:?}");
    for path in &summary.paths {
        let name = path.path.as_str();
        let (went, dropped) = told[name];
        assert!(
            went + dropped >= FLOWS && went > 0 && dropped > 0,
            "{mode}: {told:?}"
        );
        let stages = path
            .stages
            .iter()
            .filter(|stage| stage.state == PacketState::New);
        let stages: u64 = stages.map(|stage| stage.histogram.sum_ns).sum();
        let node = &path.node[&PacketState::New];
        assert_eq!(node.count, u64::from(went), "{mode} {name}");
        assert_eq!(stages, node.sum_ns + dropped_ns[name], "{mode} {name}");
    }
}

/// Datagrams of flows that conntrack never sees answered, and of established ones, every one dropped by a
/// rule that counts: the kernel's counter, the probes' and the Service's tally are the same number.
pub fn drops_equal_the_counter_over_100_000_packets() {
    const PACKETS: u64 = 100_000;
    /// What is sent between two looks at the ring buffer, which holds some 40,000 records.
    const BATCH: u64 = 5_000;
    const ESTABLISHED: usize = 10;
    const SERVICE: usize = 1;
    let node = TestNode::build(2, 3).expect("a laboratory");
    on_one_thread(node.apply(Mode::Nftables)).expect("rules");
    let vip = node.vip(SERVICE);
    // Each port once: a flow that is sent again is no new one.
    let mut ports = plan::SOURCE_PORTS;
    let mut clients = |count: usize| -> Vec<UdpSocket> {
        let mut bind = || {
            let ports = ports.by_ref().take(count);
            ports
                .map(|port| UdpSocket::bind(("0.0.0.0", port)).expect("binds"))
                .collect()
        };
        node.lab.client_pod().run(&mut bind).expect("enters")
    };
    let mut session =
        Session::start(node.lab.node(), options(Vec::new(), Tier::Hooks)).expect("attaches");
    let established = clients(ESTABLISHED);
    for socket in &established {
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        socket.send_to(b"1\n", vip).expect("sends");
        socket.recv(&mut [0; 64]).expect("an answer");
    }
    forbid(&node, &[SERVICE]);
    let mut new = Vec::new();
    for batch in 0..PACKETS / BATCH {
        if batch % 2 == 0 {
            new = clients(50);
        }
        let senders = if batch % 2 == 0 { &new } else { &established };
        for number in 0..usize::try_from(BATCH).expect("small") {
            let socket = &senders[number % senders.len()];
            socket.send_to(b"1\n", vip).expect("sends");
        }
        session.poll().expect("polls");
    }
    let (_, summary) = session.finish().expect("ends");
    assert_nothing_was_missed(&summary);
    assert_eq!(dropped_by_the_kernel(&node), PACKETS);
    assert_eq!(summary.probes.dropped, PACKETS);
    let [service] = summary.services.as_slice() else {
        panic!("{summary}");
    };
    let dropped = |verdict: &Verdict| matches!(verdict, Verdict::Dropped { stage, .. } if stage == "FORWARD filter");
    let first = service.verdicts.iter().filter(|v| dropped(&v.verdict));
    let first: u64 = first.map(|count| count.count).sum();
    assert_eq!(first, PACKETS / BATCH / 2 * 50, "{service:#?}");
    assert_eq!(service.flows, first + ESTABLISHED as u64);
    assert_eq!(service.repeated, PACKETS / 2 - first);
    assert_eq!(service.dropped_later(), PACKETS / 2);
}

/// Packets that are dropped before conntrack sees them: what asks for a new flow is told as a flow that was dropped
/// there, of UDP it is told that nobody knows; and all together are as many as the rule counted.
pub fn drops_before_conntrack_are_told_as_what_they_are(mode: Mode) {
    const TCP: usize = 0;
    const UDP: usize = 1;
    /// Dropped further on, before: its client is known.
    const SEEN: usize = 3;
    const FLOWS: u64 = 20;
    let node = TestNode::build(4, 3).expect("a laboratory");
    on_one_thread(node.apply(mode)).expect("rules");
    forbid(&node, &[SEEN]);
    let [tcp, udp, seen] = [TCP, UDP, SEEN].map(|service| node.vip(service));
    let (host, pod) = (node.lab.node(), node.lab.client_pod());
    let bind = || UdpSocket::bind("0.0.0.0:0").expect("binds");
    let mut session = Session::start(host, options(Vec::new(), Tier::Hooks)).expect("attaches");
    let [answered, dropped] = [udp, seen].map(|vip| {
        let socket = pod.run(bind).expect("enters");
        socket.send_to(b"1\n", vip).expect("sends");
        socket
    });
    answered
        .set_read_timeout(Some(PATIENCE))
        .expect("a timeout");
    answered.recv(&mut [0; 64]).expect("an answer");
    let begin = Instant::now();
    let delivered = |event: &Event| {
        matches!(
            event,
            Event::Verdict(Decided {
                verdict: Verdict::Delivered,
                ..
            })
        )
    };
    // An answered flow is forgotten once it has been told.
    while !session.poll().expect("polls").iter().any(delivered) {
        assert!(begin.elapsed() < PATIENCE, "the answer is never told");
    }
    let connect = || TcpStream::connect_timeout(&tcp, PATIENCE).expect("connects");
    let mut established = pod.run(connect).expect("enters");
    let raw = format!(
        "table ip early {{\n counter dropped {{ }}\n \
         chain in {{ type filter hook prerouting priority -300;\n \
           ip daddr {{ {0}, {1}, {2} }} counter name dropped drop\n }}\n \
         chain out {{ type filter hook output priority -300;\n \
           ip daddr {{ {0}, {1}, {2} }} counter name dropped drop\n }}\n}}\n",
        tcp.ip(),
        udp.ip(),
        seen.ip()
    );
    tool::run(host, "nft", &["-f", "-"], &raw).expect("the rules go in");
    for netns in [pod, host] {
        let ask = || {
            for _ in 0..FLOWS {
                // Shorter than the second after which a SYN is sent again.
                let timeout = Duration::from_millis(20);
                TcpStream::connect_timeout(&tcp, timeout).expect_err("nobody answers");
                // To the node's own processes the kernel says that it dropped it.
                bind().send_to(b"1\n", udp).ok();
            }
        };
        netns.run(ask).expect("enters");
    }
    answered.send_to(b"2\n", udp).expect("sends");
    dropped.send_to(b"2\n", seen).expect("sends");
    std::io::Write::write_all(&mut established, b"2\n").expect("is queued");
    // It is sent at once, and perhaps once more until the connection is given up.
    socket2::SockRef::from(&established)
        .set_linger(Some(Duration::ZERO))
        .expect("lingers");
    drop(established);
    let (_, summary) = session.finish().expect("ends");
    assert_nothing_was_missed(&summary);

    let counted = dropped_in(&node, "early");
    assert_eq!(summary.probes.dropped, counted + 1, "{summary}");
    let told = |service: usize| {
        let name = format!("lab/svc-{service:05}:p");
        let mut services = summary.services.iter();
        services.find(|told| told.name == name).expect("is told of")
    };
    let end = |stage: &str| End::Dropped {
        reason: "NETFILTER_DROP".to_owned(),
        stage: stage.to_owned(),
        by: None,
    };
    let verdict = |stage: &str| Verdict::Dropped {
        reason: "NETFILTER_DROP".to_owned(),
        stage: stage.to_owned(),
        by: None,
    };
    let of_tcp = told(TCP);
    let verdicts: BTreeMap<_, _> = of_tcp
        .verdicts
        .iter()
        .map(|told| (told.verdict.clone(), told.count))
        .collect();
    let wanted = BTreeMap::from([
        (Verdict::Delivered, 1),
        (verdict("PREROUTING raw"), FLOWS),
        (verdict("OUTPUT raw"), FLOWS),
    ]);
    assert_eq!(verdicts, wanted, "{mode}: {summary}");
    assert_eq!((of_tcp.flows, of_tcp.repeated), (2 * FLOWS + 1, 0));
    assert!(of_tcp.unplaced_drops.is_empty(), "{of_tcp:#?}");
    let of_udp = told(UDP);
    assert_eq!((of_udp.flows, of_udp.repeated), (1, 0), "{of_udp:#?}");
    let unplaced = of_udp.unplaced_drops.iter();
    let unplaced: Vec<_> = unplaced
        .map(|told| (told.end.clone(), told.count))
        .collect();
    let wanted = [
        (end("OUTPUT raw"), FLOWS),
        (end("PREROUTING raw"), FLOWS + 1),
    ];
    assert_eq!(unplaced, wanted, "{mode}: {summary}");
    let of_seen = told(SEEN);
    assert_eq!((of_seen.flows, of_seen.repeated), (1, 1), "{of_seen:#?}");
    let later = of_tcp.dropped_later();
    // The data, and the RST of the one who gives up.
    assert!(later >= 2, "{of_tcp:#?}");
    let all = 2 * FLOWS + later + 2 * FLOWS + 1 + 1;
    assert_eq!(all, counted, "{mode}: {summary}");
    let text = summary.to_string();
    assert!(
        text.contains("of new or established flows, which is unknown, 20 dropped at OUTPUT raw"),
        "{text}"
    );
}

/// What the tracer's runs found, over all clusters.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Traced {
    /// Packets sent.
    pub packets: u32,
    /// Those to an address of a Service that the rules name: each is told.
    pub to_services: u32,
    /// Of these, those told as what became of them, which is one of the ways that the oracle foretells.
    pub right: u32,
}

/// Sends random packets into random clusters, as [`oracle::walk_agrees_with_the_kernel`] does, while a
/// session traces the node: what it tells of each is what became of it, and one of the ways foretold.
pub fn the_traced_way_is_one_foretold(mode: Mode, clusters: u64, packets: u32) -> Traced {
    oracle::stay_on_one_cpu();
    let mut traced = Traced::default();
    for seed in 0..clusters {
        trace_one_cluster(mode, seed, packets, &mut traced);
    }
    println!("{mode}: {traced:?}");
    traced
}

/// A packet that was sent, what became of it, and what the oracle had said.
struct Sent {
    packet: Packet,
    seen: Seen,
    foretold: Vec<Seen>,
    ways: String,
}

fn trace_one_cluster(mode: Mode, seed: u64, count: u32, traced: &mut Traced) {
    let cluster = random::cluster(seed, 25);
    let mut node = Node::build();
    let view = oracle::view(&cluster, &node.ns);
    apply::apply(&node.ns, &render(&cluster, &view, mode)).expect("the rules go in");
    let texts = dump::dump(&node.ns).expect("the rules come out");
    let options = Options {
        pod_cidrs: random::CLUSTER_CIDRS.into(),
        ..Options::default()
    };
    let mut session = Session::start(&node.ns, options).expect("attaches");
    let mut sent: HashMap<Key, Sent> = HashMap::new();
    for (family, share) in oracle::shares(count) {
        let rules = Rules::parse(&texts, family).expect("they are understood");
        let local = view.addresses.iter().copied().collect();
        let place = rules.place(local, cluster.virtual_ips().collect());
        let layers = rules.layers();
        let oracle = layers.oracle(&place);
        let mut packets = Packets::new(&cluster, family, seed);
        for id in 0..share {
            let (packet, via) = packets.next();
            let outcomes = oracle.walk(&packet);
            let seen = node.send(&packet, via, id);
            traced.packets += 1;
            let key = key_of(&packet);
            let asked = session.directory().asked(key.destination, key.protocol);
            // What conntrack calls invalid is no flow.
            if asked.is_none() || packet.state == State::Invalid {
                continue;
            }
            let ways = oracle::lines(&outcomes);
            let foretold = outcomes
                .iter()
                .map(|outcome| expected(outcome, &packet, |a| place.is_local(a)));
            let foretold = foretold.collect();
            sent.insert(
                key,
                Sent {
                    packet,
                    seen,
                    foretold,
                    ways,
                },
            );
        }
    }
    let mut events = session.poll().expect("polls");
    let (last, summary) = session.finish().expect("ends");
    events.extend(last);
    let probes = summary.probes;
    assert_eq!(
        (
            probes.ring_lost,
            probes.slot_collisions,
            probes.unpaired,
            probes.unfinished
        ),
        (0, 0, 0, 0),
        "{probes:?}"
    );
    traced.to_services += u32::try_from(sent.len()).expect("few");
    let (right, wrong) = compare(&sent, &observed(&events));
    traced.right += right;
    assert_eq!(
        right as usize,
        sent.len(),
        "{mode}, cluster {seed}: {wrong}"
    );
}

fn key_of(packet: &Packet) -> Key {
    Key {
        protocol: packet.protocol.number(),
        source: SocketAddr::new(packet.from, packet.from_port.expect("it has one")),
        destination: SocketAddr::new(packet.to, packet.to_port),
    }
}

/// What the session told of each flow: its last journey and its verdict.
fn observed(events: &[Event]) -> HashMap<Key, (Option<&Journey>, Option<&Decided>)> {
    let mut observed: HashMap<Key, (Option<&Journey>, Option<&Decided>)> = HashMap::new();
    for event in events {
        match event {
            Event::Journey(journey) => {
                let key = Key {
                    protocol: journey.protocol,
                    source: journey.source,
                    destination: journey.destination,
                };
                observed.entry(key).or_default().0 = Some(journey);
            }
            Event::Verdict(decided) => {
                let key = Key {
                    protocol: decided.protocol,
                    source: decided.source,
                    destination: decided.destination,
                };
                observed.entry(key).or_default().1 = Some(decided);
            }
            _ => {}
        }
    }
    observed
}

/// How many are told as the kernel made them go and as the oracle foretold; and the others, in words.
fn compare(
    sent: &HashMap<Key, Sent>,
    observed: &HashMap<Key, (Option<&Journey>, Option<&Decided>)>,
) -> (u32, String) {
    let mut wrong = String::new();
    let mut right = 0;
    for (key, sent) in sent {
        let told = match observed.get(key) {
            Some((Some(journey), Some(decided))) => in_words(journey, decided),
            other => Err(format!("{other:?}")),
        };
        if told == Ok(sent.seen) && sent.foretold.contains(&sent.seen) {
            right += 1;
        } else {
            writeln!(
                wrong,
                "{:?} became {:?}; told: {told:?}; the oracle says\n{}",
                sent.packet, sent.seen, sent.ways
            )
            .expect("String");
        }
    }
    (right, wrong)
}

/// What was told of a flow in the words of what can be seen from outside; otherwise all that was told.
fn in_words(journey: &Journey, decided: &Decided) -> Result<Seen, String> {
    match &decided.verdict {
        Verdict::Rejected { how, .. } if how == "port unreachable" => Ok(Seen::Refused),
        // The observer's rule, the last at INPUT.
        Verdict::Rejected { how, .. } if how == "administratively prohibited" => Ok(Seen::TakenIn),
        Verdict::Dropped { .. } => Ok(Seen::Nothing),
        // No answer ever comes.
        Verdict::Unanswered { .. } | Verdict::Undecided | Verdict::Leaked => {
            match (journey.headed, journey.source_after) {
                (Some(to), Some(from)) => Ok(Seen::Sent {
                    to,
                    masqueraded: from.ip() != journey.source.ip(),
                }),
                _ => Err(format!("{journey:?} {decided:?}")),
            }
        }
        _ => Err(format!("{journey:?} {decided:?}")),
    }
}

/// What one session timed of forwarded flows, in guest instructions.
struct Timed {
    /// The middle one of first packets' journeys, by stage: exact.
    exact: BTreeMap<String, u64>,
    /// Of first packets, by stage.
    new: BTreeMap<String, Told>,
    /// Of later packets, by stage.
    later: BTreeMap<String, Told>,
}

/// What a histogram tells.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Told {
    /// Exact, and with the interrupts that fell into it.
    mean: f64,
    /// The cell, at most 1.6 % wide, of the middle one: the p50 of reports. Two runs of unchanged rules agree
    /// in it. Their exact medians need not: beyond netfilter a packet takes 1801 or 1803 instructions by the
    /// random port that masquerade gave it, each as often as the other.
    middle: [u64; 2],
}

impl Told {
    fn of(histogram: &Histogram) -> Self {
        let mut passed = 0;
        let middle = histogram.buckets.iter().find(|[_, _, count]| {
            passed += count;
            2 * passed > histogram.count
        });
        let [low, high, _] = *middle.expect("it is not empty");
        Self {
            mean: histogram.sum_ns as f64 / histogram.count as f64,
            middle: [low, high],
        }
    }
}

/// Flows of a pod to a UDP Service, each with a few more packets after its first, each from a port of its own.
fn time(node: &TestNode, ports: &mut impl Iterator<Item = u16>) -> Timed {
    const FLOWS: usize = 200;
    const LATER: usize = 5;
    let vip = node.vip(1);
    let mut ask = |flows: usize| {
        for port in ports.by_ref().take(flows) {
            let bound = || UdpSocket::bind(("0.0.0.0", port)).expect("binds");
            let socket = node.lab.client_pod().run(bound).expect("enters");
            socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            for _ in 0..=LATER {
                socket.send_to(b"1\n", vip).expect("sends");
                socket.recv(&mut [0; 64]).expect("an answer");
            }
        }
    };
    ask(20);
    let session = Session::start(
        node.lab.node(),
        Options {
            cost: false,
            ..options(Vec::new(), Tier::Hooks)
        },
    );
    let session = session.expect("attaches");
    ask(FLOWS);
    let (events, summary) = session.finish().expect("ends");
    assert_nothing_was_missed(&summary);
    let mut steps: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for journey in journeys(events) {
        for stage in journey.stages {
            let name = format!("{} {}", stage.hook, stage.stage);
            steps.entry(name).or_default().push(stage.took_ns);
        }
    }
    let middle = |mut times: Vec<u64>| {
        assert_eq!(times.len(), FLOWS);
        times.sort_unstable();
        times[FLOWS / 2]
    };
    let [path] = summary.paths.as_slice() else {
        panic!("{summary}");
    };
    let told = |state: PacketState, count: usize| {
        let stages = path.stages.iter().filter(move |stage| stage.state == state);
        let stages = stages.map(move |stage| {
            assert_eq!(stage.histogram.count, count as u64);
            let name = format!("{} {}", stage.hook, stage.stage);
            (name, Told::of(&stage.histogram))
        });
        stages.collect()
    };
    Timed {
        exact: steps
            .into_iter()
            .map(|(n, times)| (n, middle(times)))
            .collect(),
        new: told(PacketState::New, FLOWS),
        later: told(PacketState::Established, FLOWS * LATER),
    }
}

/// Rules at FORWARD that no packet matches.
fn add_rules(node: &TestNode, tool: &str, count: u32) {
    // A network for documentation (RFC 5737) from which nobody sends.
    const NOBODY: &str = "198.51.100.77";
    let rules = |rule: &str| rule.repeat(usize::try_from(count).expect("small"));
    let (arguments, text) = match tool {
        "nft" => (
            &["-f", "-"],
            format!(
                "table ip added {{ chain c {{ type filter hook forward priority 5;\n{}}}\n}}\n",
                rules(&format!("ip saddr {NOBODY} drop\n"))
            ),
        ),
        _ => (
            &["--noflush", "--wait"],
            // In front of the others, some of which accept.
            format!(
                "*filter\n{}COMMIT\n",
                rules(&format!("-I FORWARD -s {NOBODY} -j DROP\n"))
            ),
        ),
    };
    tool::run(node.lab.node(), tool, arguments, &text).expect("the rules go in");
}

/// The stage that is made slower.
const SLOWER: &str = "FORWARD filter";

/// Are two figures the same to one in a hundred?
fn same(a: f64, b: f64) -> bool {
    (a - b).abs() <= a.max(b) / 100.0
}

/// Never-matching rules added to one stage make it slower by the same for each rule, and no other stage;
/// two runs with nothing changed between them differ in nothing. On the virtual clock.
pub fn a_slower_stage_shows_what_was_added(tool: &str) {
    assert!(
        tracer::kernel::clock::is_virtual(),
        "instructions are counted"
    );
    let node = TestNode::build(4, 1).expect("a laboratory");
    on_one_thread(node.apply(Mode::IptablesLegacy)).expect("rules");
    let mut ports = plan::SOURCE_PORTS;
    let (once, again) = (time(&node, &mut ports), time(&node, &mut ports));
    let runs = [100, 100, 200].map(|added| {
        add_rules(&node, tool, added);
        time(&node, &mut ports)
    });
    let [one, two, four] = &runs;
    for (name, first) in &once.exact {
        let all = [&once, &again, one, two, four];
        let exact = all.map(|run| run.exact[name]);
        let new = all.map(|run| run.new[name]);
        let later = all.map(|run| run.later[name]);
        println!("{tool} {name}: {exact:?}\n  first {new:?}\n  later {later:?}");
        // Conntrack's chains, into which first packets bring their entries, are not of one length: an instruction
        // or two more or less may be in another cell of the histogram.
        let [first_a, first_b, ..] = exact.map(|ns| ns as f64);
        assert!(
            new[0].middle == new[1].middle || same(first_a, first_b),
            "{name}: nothing was changed"
        );
        assert_eq!(
            later[0].middle, later[1].middle,
            "{name}: nothing was changed"
        );
        let [_, _, exact @ ..] = exact;
        let [_, _, added @ ..] = later;
        if name == SLOWER {
            let new = a_rule_costs(tool, "first packets", exact.map(|ns| ns as f64));
            let later = a_rule_costs(tool, "later packets", added.map(|later| later.mean));
            assert!(same(new, later), "a packet's state does not matter to them");
        } else {
            let unchanged = |ns: u64| same(ns as f64, *first as f64);
            assert!(
                exact.into_iter().all(unchanged),
                "{name}: {first} {exact:?}"
            );
            assert_eq!(added.map(|a| a.middle), [later[0].middle; 3], "{name}");
        }
    }
}

/// What each rule added, if it is the same from 100 to 200 as from 200 to 400 rules.
fn a_rule_costs(tool: &str, what: &str, [one, two, four]: [f64; 3]) -> f64 {
    let (first, second) = ((two - one) / 100.0, (four - two) / 200.0);
    println!("{tool}, {what}: {first:.2} and {second:.2} instructions a rule");
    assert!(
        first > 1.0 && same(first, second),
        "{what}: {first} and {second}"
    );
    first
}

/// Waits until something is so.
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
