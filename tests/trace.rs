//! A node of the laboratory, traced as a live one would be.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use tokio::task::LocalSet;
use tracer::cluster::{Cluster, Family};
use tracer::kernel::clock::monotonic_ns;
use tracer::kernel::netns::Netns;
use tracer::kernel::{dump, tool};
use tracer::lab::traffic::{self, Stream, TrafficPlan, TrafficResult};
use tracer::lab::{Outcome, plan};
use tracer::probe::catalogue::Detail;
use tracer::probe::tier::Tier;
use tracer::rules::dump::Texts;
use tracer::rules::{Mode, Step};
use tracer::scenario::node::TestNode;
use tracer::trace::changes::What;
use tracer::trace::directory::Choice;
use tracer::trace::session::{Event, Options, Session};
use tracer::trace::verdict::Verdict;
use tracer_ebpf::path::{Path, Target};

use crate::verdicts::run;

/// Longer than anything here takes on a machine under load.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a future to its end.
pub fn on_one_thread<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, future)
}

pub(crate) fn node(mode: Mode) -> TestNode {
    let node = TestNode::build(10, 3).expect("a laboratory");
    on_one_thread(node.apply(mode)).expect("rules");
    node
}

pub(crate) fn send(node: &TestNode, flows: u32, seed: u64) -> TrafficResult {
    send_to(node, &node.cluster, Family::V4, flows, seed)
}

/// Flows of a family by the three paths to these Services.
pub(crate) fn send_to(
    node: &TestNode,
    cluster: &Cluster,
    family: Family,
    flows: u32,
    seed: u64,
) -> TrafficResult {
    send_by(node, cluster, family, flows, seed, Path::SERVICE)
}

/// The same by any paths.
fn send_by(
    node: &TestNode,
    cluster: &Cluster,
    family: Family,
    flows: u32,
    seed: u64,
    paths: impl IntoIterator<Item = Path>,
) -> TrafficResult {
    let streams = paths.into_iter().map(|path| Stream {
        path,
        per_second: 500.0,
        flows,
        start_ns: 0,
    });
    let plan = TrafficPlan {
        streams: streams.collect(),
        seed,
        family,
        patience: Duration::from_millis(500),
        ..TrafficPlan::default()
    };
    let result = on_one_thread(async {
        let prepared = traffic::prepare(&node.lab, cluster, &plan).await?;
        prepared.run(monotonic_ns() + 1_000_000).await
    });
    until_closed(node);
    result.expect("traffic")
}

/// Waits until the last packet of every connection has arrived: nobody has one that is open or being closed.
fn until_closed(node: &TestNode) {
    const LISTEN: &str = "0A";
    const TIME_WAIT: &str = "06";
    let lab = &node.lab;
    let others = [lab.node(), lab.external(), lab.client_pod()];
    let is_over = |list: &str| {
        let lines = list.lines().skip(1);
        let mut states = lines.filter_map(|line| line.split_ascii_whitespace().nth(3));
        states.all(|state| state == LISTEN || state == TIME_WAIT)
    };
    let begin = Instant::now();
    for ns in others.into_iter().chain(lab.server_pods()) {
        loop {
            let lists = ns.run(|| {
                ["tcp", "tcp6"].map(|name| {
                    let list = std::fs::read_to_string(format!("/proc/thread-self/net/{name}"));
                    list.expect("the kernel lists its sockets")
                })
            });
            if lists.expect("enters").iter().all(|list| is_over(list)) {
                break;
            }
            assert!(begin.elapsed() < PATIENCE, "a connection never closes");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

pub(crate) fn options(choices: Vec<Choice>, tier: Tier) -> Options {
    Options {
        tier: Some(tier),
        choices,
        pod_cidrs: vec![plan::NODE_POD_CIDR, plan::NODE_POD_CIDR6],
        cost: true,
        ..Options::default()
    }
}

/// Flows by the Service that they were sent to: its name, or in IPVS mode, whose rules hold none, the
/// address and port.
fn sent(node: &TestNode, result: &TrafficResult, mode: Mode) -> BTreeMap<String, u64> {
    let mut sent = BTreeMap::new();
    for flow in &result.flows {
        let service = &node.cluster.services[flow.service];
        let port = &service.ports[0];
        let name = match mode {
            Mode::Ipvs if flow.path.target == Target::NodePort => {
                format!("NodePort {}/{}", flow.destination.port(), flow.protocol)
            }
            Mode::Ipvs => format!("{}/{}", flow.destination, flow.protocol),
            _ => format!("{}/{}:{}", service.namespace, service.name, port.name),
        };
        *sent.entry(name).or_default() += 1;
    }
    sent
}

/// Every rule, set, server and address of the node, without counters and dates.
pub(crate) fn as_dumped(node: &TestNode) -> Vec<String> {
    let texts = dump::dump(node.lab.node()).expect("a dump");
    let Texts {
        v4,
        v6,
        servers,
        sets,
        addresses,
        ..
    } = texts;
    let of_families = [v4, v6].into_iter().flat_map(|family| {
        let nft = family.nft.into_iter().chain(family.nft_json);
        family.iptables.into_iter().chain(nft)
    });
    of_families
        .chain(servers)
        .chain(sets)
        .chain(addresses)
        .flat_map(|source| {
            let lines = source.text.lines().filter(|line| !line.starts_with('#'));
            let bare = lines.map(|line| line.split(" [").next().unwrap_or_default().to_owned());
            bare.collect::<Vec<_>>()
        })
        .collect()
}

/// Flows of three paths: each is told once, under its Service's name, with a good end; the node's rules
/// are as before.
pub fn every_flow_is_told_by_its_service(mode: Mode, tier: Tier) {
    let node = node(mode);
    let before = as_dumped(&node);
    let mut session = Session::start(node.lab.node(), options(Vec::new(), tier)).expect("attaches");
    assert_eq!(session.tier(), tier);
    let result = send(&node, 40, 1);
    assert!(
        result
            .flows
            .iter()
            .all(|flow| matches!(flow.outcome, Outcome::Delivered { .. }))
    );
    let events = session.poll().expect("polls");
    let journeys = events
        .iter()
        .filter(|event| matches!(event, Event::Journey(_)));
    assert_eq!(journeys.count(), 120);
    let (_, summary) = session.finish().expect("ends");
    assert_eq!(summary.tier, tier.name());
    let told: BTreeMap<String, u64> = summary
        .services
        .iter()
        .map(|service| (service.name.clone(), service.flows))
        .collect();
    assert_eq!(told, sent(&node, &result, mode));
    for service in &summary.services {
        assert_eq!(service.repeated, 0, "{service:#?}");
        let [only] = service.verdicts.as_slice() else {
            panic!("{service:#?}");
        };
        assert_eq!(
            (&only.verdict, only.count),
            (&Verdict::Delivered, service.flows)
        );
        assert_eq!(service.answered.count, service.flows);
        assert_eq!(service.mode, mode.name());
    }
    let paths: Vec<&str> = summary
        .paths
        .iter()
        .map(|path| path.path.as_str())
        .collect();
    assert_eq!(
        paths,
        ["external→NodePort", "host→ClusterIP", "pod→ClusterIP"]
    );
    let probes = summary.probes;
    assert_eq!(
        (probes.ring_lost, probes.slot_collisions, probes.unpaired),
        (0, 0, 0)
    );
    let cost = probes.cost.expect("asked for");
    assert!(
        cost.probe_runs > probes.journeys && cost.probe_ns > cost.probe_runs,
        "{probes:?}"
    );
    assert!(summary.rule_changes.is_empty(), "{summary:#?}");
    assert!(before.len() > 50);
    assert!(as_dumped(&node) == before, "tracing only reads");
}

/// What is sent to an external IP or a load balancer's address is told as such, in every mode alike, and can be asked
/// for alone.
pub fn external_addresses_have_a_path_of_their_own(mode: Mode, tier: Tier) {
    const FLOWS: u32 = 10;
    let network = "203.0.113.0/24";
    let address = |last| IpAddr::from([203, 0, 113, last]);
    let mut node = TestNode::build(2, 3).expect("a laboratory");
    node.cluster.services[0].external_ips = vec![address(5)];
    node.cluster.services[1].load_balancer_ips = vec![address(9)];
    on_one_thread(node.apply(mode)).expect("rules");
    let by = plan::NODE_ADDRESS.base.to_string();
    let route = ["route", "add", network, "via", &by];
    run(node.lab.external(), "ip", &route);

    let external = |path: &Path| path.target == Target::External;
    let all: Vec<Path> = Path::ALL.into_iter().filter(external).collect();
    let one = Options {
        paths: vec![all[2]],
        ..options(Vec::new(), tier)
    };
    let everything = Session::start(node.lab.node(), options(Vec::new(), tier)).expect("attaches");
    let chosen = Session::start(node.lab.node(), one).expect("attaches");
    let paths = all.iter().copied().chain([Path::SERVICE[0]]);
    let result = send_by(&node, &node.cluster, Family::V4, FLOWS, 4, paths);
    let answered = |outcome: &Outcome| matches!(outcome, Outcome::Delivered { .. });
    assert!(result.flows.iter().all(|flow| answered(&flow.outcome)));

    let told = |session: Session| {
        let (events, summary) = session.finish().expect("ends");
        let mut told: BTreeMap<&str, u32> = BTreeMap::new();
        for event in &events {
            if let Event::Verdict(decided) = event {
                assert_eq!(decided.verdict, Verdict::Delivered, "{decided}");
                *told.entry(decided.path).or_default() += 1;
            }
        }
        let timed: Vec<String> = summary.paths.into_iter().map(|path| path.path).collect();
        (told, timed)
    };
    let titles = [
        "external→external IP",
        "host→external IP",
        "pod→ClusterIP",
        "pod→external IP",
    ];
    let (all, timed) = told(everything);
    assert_eq!(all, titles.map(|title| (title, FLOWS)).into(), "{mode}");
    assert_eq!(timed, titles, "{mode}");
    let (one, _) = told(chosen);
    assert_eq!(one, [(titles[0], FLOWS)].into(), "{mode}");
}

/// Of two modes whose rules are there at once it is told who translated each flow, as the endpoints say that only one
/// of them names; of the others if the packet itself tells, and else not.
pub fn it_is_told_which_of_two_modes_translates(
    left: Mode,
    mode: Mode,
    tier: Tier,
    detail: Detail,
) {
    const FLOWS: u32 = 20;
    let mut node = TestNode::build(2, 2).expect("a laboratory");
    let cluster = node.cluster.clone();
    // Of the first Service each has one endpoint, of the second both.
    let mut endpoint = |at: usize| {
        let all = cluster.services[0].ports[0].endpoints[at].clone();
        node.cluster.services[0].ports[0].endpoints = vec![all.clone()];
        SocketAddr::new(all.address, all.port)
    };
    let of_left = endpoint(0);
    on_one_thread(node.apply(left)).expect("rules");
    let mut endpoint = |at: usize| {
        let all = cluster.services[0].ports[0].endpoints[at].clone();
        node.cluster.services[0].ports[0].endpoints = vec![all];
    };
    endpoint(1);
    on_one_thread(node.apply(mode)).expect("rules");
    let options = Options {
        detail,
        ..options(Vec::new(), tier)
    };
    let session = Session::start(node.lab.node(), options).expect("attaches");
    let hints = session.hints().join("\n");
    assert!(hints.contains("the rules of 2 modes are there"), "{hints}");
    let by = [Path::SERVICE[0]];
    let result = send_by(&node, &cluster, Family::V4, FLOWS, 5, by);
    let (_, summary) = session.finish().expect("ends");

    let mut wanted: [BTreeMap<String, u64>; 2] = Default::default();
    let mut first = None;
    for flow in &result.flows {
        let Outcome::Delivered { by } = flow.outcome else {
            panic!("{flow:?}");
        };
        if flow.service == 0 {
            let who = if by == of_left { left } else { mode };
            first = Some(who);
            *wanted[0].entry(who.name().to_owned()).or_default() += 1;
        }
    }
    // The same one has those of which both say the same.
    let first = first.expect("some flow to the first Service");
    let of_nat = left != Mode::Ipvs && mode != Mode::Ipvs;
    let who = if of_nat && detail < Detail::Functions {
        "unknown"
    } else {
        first.name()
    };
    let second = result.flows.iter().filter(|flow| flow.service == 1);
    wanted[1].insert(who.to_owned(), second.count() as u64);
    assert_eq!(wanted[0].len(), 1, "{wanted:?}");
    for (service, wanted) in node.cluster.services.iter().zip(wanted) {
        let name = format!("{}/{}", service.namespace, service.name);
        let told = summary.services.iter();
        let told = told.filter(|told| told.name.starts_with(&name));
        let [told] = told.collect::<Vec<_>>()[..] else {
            panic!("{summary:#?}");
        };
        assert_eq!(told.translated, wanted, "{left} {mode}: {told:#?}");
        let mut modes = [left.name(), mode.name()];
        modes.sort_unstable();
        assert_eq!(told.modes, modes);
    }
    let text = summary.to_string();
    let line = "2 of 2 Services are in the rules of";
    assert!(text.contains(line), "{text}");
}

/// Empties kube-proxy's chains, by a process called nft.
pub(crate) fn flush(node: &TestNode) {
    let flushed = node
        .lab
        .node()
        .command("nft")
        .args(["flush", "table", "ip", "kube-proxy"])
        .status()
        .expect("nft runs");
    assert!(flushed.success());
}

/// Who flushes is named, and what it breaks is leaked.
pub fn a_flush_is_heard_and_what_it_breaks_is_seen() {
    let node = node(Mode::Nftables);
    let mut session =
        Session::start(node.lab.node(), options(Vec::new(), Tier::Hooks)).expect("attaches");
    flush(&node);
    let begin = Instant::now();
    let change = loop {
        assert!(begin.elapsed() < PATIENCE, "the change was never heard of");
        let events = session.poll().expect("polls");
        let mut changes = events.into_iter().filter_map(|event| match event {
            Event::RuleChange(change) => Some(change),
            _ => None,
        });
        if let Some(change) = changes.next() {
            break change;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(change.by.name.as_deref(), Some("nft"));
    assert!(change.by.pid.is_some());
    let What::Nftables { tables, .. } = &change.what else {
        panic!("{change}");
    };
    let delta = tables["ip kube-proxy"];
    assert!(delta.rules_deleted > 10, "{change}");
    assert_eq!(delta.rules, Some((delta.rules_deleted, 0)), "{change}");
    assert!(change.took_ns().is_some_and(|ns| ns > 0), "{change}");
    assert!(!change.incomplete);

    let result = send(&node, 10, 2);
    let (_, summary) = session.finish().expect("ends");
    let told: u64 = summary.services.iter().map(|service| service.flows).sum();
    let leaked: u64 = summary
        .services
        .iter()
        .flat_map(|service| &service.verdicts)
        .filter(|count| count.verdict == Verdict::Leaked)
        .map(|count| count.count)
        .sum();
    // What goes to a NodePort finds no socket, and what the host and pods send leaves as it is.
    assert_eq!(told, result.flows.len() as u64, "{summary:#?}");
    assert_eq!(leaked, 20, "{summary:#?}");
    let text = summary.to_string();
    assert!(
        text.contains("leaked") && text.contains("svcpath rules check"),
        "{text}"
    );
}

/// Who comes is known before the rules are read again, and asked at once: every flow is told by name.
pub fn a_service_that_comes_is_known_at_once(mode: Mode) {
    const NEW: usize = 2;
    let mut node = TestNode::build(3, 2).expect("a laboratory");
    let new = node.cluster.services.pop().expect("three Services");
    on_one_thread(node.apply(mode)).expect("rules");
    let ns = node.lab.node();
    let mut session = Session::start(ns, options(Vec::new(), Tier::Hooks)).expect("attaches");
    node.cluster.services.push(new);
    let vip = node.vip(NEW);
    if mode == Mode::Ipvs {
        let (address, vip) = (vip.ip().to_string(), vip.to_string());
        run(ns, "ip", &["addr", "add", &address, "dev", "kube-ipvs0"]);
        run(ns, "ipvsadm", &["-A", "-t", &vip, "-s", "rr"]);
        for endpoint in &node.cluster.services[NEW].ports[0].endpoints {
            let real = SocketAddr::new(endpoint.address, endpoint.port).to_string();
            run(ns, "ipvsadm", &["-a", "-t", &vip, "-r", &real, "-m"]);
        }
        let entry = format!("{address},tcp:80");
        run(ns, "ipset", &["add", "KUBE-CLUSTER-IP", &entry, "-exist"]);
    } else {
        on_one_thread(node.apply(mode)).expect("rules");
    }
    let begin = Instant::now();
    while session.directory().asked(vip, 6).is_none() {
        assert!(begin.elapsed() < PATIENCE, "it was never heard of");
        let events = session.poll().expect("polls");
        let read = events
            .iter()
            .any(|event| matches!(event, Event::Services { .. }));
        assert!(!read, "the rules were read before");
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut alone = node.cluster.clone();
    alone.services.drain(..NEW);
    let paths = Path::SERVICE.into_iter();
    let paths = paths.filter(|path| path.target == Target::ClusterIp);
    let result = send_by(&node, &alone, Family::V4, 10, 6, paths);
    let (_, summary) = session.finish().expect("ends");
    let told = summary.services.iter().filter(|service| service.flows > 0);
    let [told] = told.collect::<Vec<_>>()[..] else {
        panic!("{summary:#?}");
    };
    assert_eq!(told.flows, result.flows.len() as u64, "{summary:#?}");
    let [verdict] = &told.verdicts[..] else {
        panic!("{told:#?}");
    };
    assert_eq!(
        (&verdict.verdict, verdict.count),
        (&Verdict::Delivered, told.flows)
    );
    assert_eq!((told.mode.as_str(), told.endpoints), (mode.name(), 2));
    let paths: Vec<&str> = summary.paths.iter().map(|path| &*path.path).collect();
    assert_eq!(paths, ["host→ClusterIP", "pod→ClusterIP"]);
}

/// Loads a step of a sync as kube-proxy does.
fn load(ns: &Netns, step: &Step) {
    match step {
        Step::Nft { text, .. } => tool::run(ns, "nft", &["-f", "-"], text),
        Step::Iptables {
            family,
            backend,
            text,
        } => {
            let restore = format!("{}-restore", backend.tool(*family));
            tool::run(ns, &restore, &["--noflush", "--counters"], text)
        }
        step => panic!("no such step is a sync's here: {step:?}"),
    }
    .expect("it is loaded");
}

/// An address that another Service takes over, and endpoints that come and go faster than rules are read: nothing
/// false is said of the flows meanwhile, and what is counted holds together.
pub fn what_changes_hands_is_told_as_it_is_or_as_unknown(mode: Mode) {
    const ROUNDS: usize = 12;
    let mut node = TestNode::build(2, 2).expect("a laboratory");
    let both = node.cluster.clone();
    let path = Path::SERVICE
        .into_iter()
        .find(|path| path.title() == "host→ClusterIP");
    let path = path.expect("there is such a path");
    on_one_thread(node.apply(mode)).expect("rules");
    let mut session =
        Session::start(node.lab.node(), options(Vec::new(), Tier::Hooks)).expect("attaches");
    let mut flows = 0;
    let mut events = Vec::new();
    for round in 0..ROUNDS {
        // The TCP Service has the one or the other endpoint, and by turns another name.
        let mut service = both.services[0].clone();
        if round % 4 >= 2 {
            "another".clone_into(&mut service.name);
        }
        let endpoint = service.ports[0].endpoints[round % 2].clone();
        service.ports[0].endpoints = vec![endpoint];
        let before = std::mem::replace(&mut node.cluster.services, vec![service]);
        let before = Cluster {
            services: before,
            ..node.cluster.clone()
        };
        for step in node.sync(&before, mode).steps {
            load(node.lab.node(), &step);
        }
        let result = send_by(&node, &node.cluster, Family::V4, 2, round as u64, [path]);
        let answered = |outcome: &Outcome| matches!(outcome, Outcome::Delivered { .. });
        assert!(result.flows.iter().all(|flow| answered(&flow.outcome)));
        flows += result.flows.len() as u64;
        if round % 3 == 0 {
            events.extend(session.poll().expect("polls"));
        }
    }
    let (last, summary) = session.finish().expect("ends");
    events.extend(last);
    let told: u64 = summary.services.iter().map(|service| service.flows).sum();
    for event in &events {
        if let Event::Verdict(decided) = event {
            let known = [Verdict::Delivered, Verdict::Unknown].contains(&decided.verdict);
            assert!(known, "{mode}: {decided}");
        }
    }
    for service in &summary.services {
        let ended: u64 = service.verdicts.iter().map(|one| one.count).sum();
        assert_eq!(ended, service.flows, "{mode}: {service:#?}");
    }
    // In nftables mode everything is announced.
    if mode == Mode::Nftables {
        let delivered = summary
            .services
            .iter()
            .flat_map(|service| &service.verdicts);
        let delivered = delivered.filter(|one| one.verdict == Verdict::Delivered);
        let delivered: u64 = delivered.map(|one| one.count).sum();
        assert_eq!((told, delivered), (flows, flows), "{summary}");
    }
}

/// Services that were not asked for are not told of.
pub fn only_what_is_chosen_is_traced() {
    let mode = Mode::Nftables;
    let node = node(mode);
    let first = &node.cluster.services[0];
    let name = format!("{}/{}", first.namespace, first.name);
    let session = Session::start(
        node.lab.node(),
        options(vec![Choice::Service(name.clone())], Tier::Hooks),
    )
    .expect("attaches");
    let result = send(&node, 40, 3);
    let (_, summary) = session.finish().expect("ends");
    let wanted: BTreeMap<String, u64> = sent(&node, &result, mode)
        .into_iter()
        .filter(|(service, _)| service.starts_with(&format!("{name}:")))
        .collect();
    let told: BTreeMap<String, u64> = summary
        .services
        .iter()
        .map(|service| (service.name.clone(), service.flows))
        .collect();
    assert_eq!(told, wanted);

    let nothing = options(vec![Choice::Service("no/such".to_owned())], Tier::Hooks);
    let error = Session::start(node.lab.node(), nothing).expect_err("no such Service");
    assert!(
        error.to_string().contains("no such Service (of 10"),
        "{error}"
    );
}
