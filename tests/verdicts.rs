//! Faults prepared on a node of the laboratory: each flow gets the verdict that its fault deserves.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Stdio;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracer::cluster::Family;
use tracer::kernel::clock::monotonic_ns;
use tracer::kernel::conntrack;
use tracer::kernel::netns::Netns;
use tracer::lab::plan;
use tracer::probe::tier::Tier;
use tracer::rules::Mode;
use tracer::scenario::node::TestNode;
use tracer::trace::session::{Event, Options, Session};
use tracer::trace::summary::{ServiceSummary, Summary};
use tracer::trace::verdict::{Verdict, Who};

use crate::trace::{self, on_one_thread};
use crate::truth::journeys;

/// Longer than anything here takes on a machine under load.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long clients wait: longer than a session's end waits for an answer.
const CLIENTS_WAIT: Duration = Duration::from_millis(1200);
/// Nobody listens here.
const CLOSED: u16 = 9;

// The laboratory's Services, by what is wrong with them: even ones are TCP, odd ones UDP.
const HEALTHY: [usize; 2] = [0, 1];
const WITHOUT_ENDPOINTS: [usize; 2] = [2, 3];
const NOBODY_LISTENS: [usize; 2] = [4, 5];
const SILENT: [usize; 2] = [6, 7];
const FORBIDDEN: [usize; 2] = [8, 9];
const HIJACKED: [usize; 2] = [10, 11];
const SERVICES: u32 = 12;

/// Runs a tool that must succeed.
pub(crate) fn run(ns: &Netns, tool: &str, arguments: &[&str]) {
    let output = ns.command(tool).args(arguments).output().expect("runs");
    assert!(
        output.status.success(),
        "{tool} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn endpoint_of(node: &TestNode, service: usize) -> SocketAddr {
    let endpoint = &node.cluster.services[service].ports[0].endpoints[0];
    SocketAddr::new(endpoint.address, endpoint.port)
}

/// A node whose Services have these faults.
pub(crate) fn prepare(mode: Mode) -> TestNode {
    let mut node = TestNode::build(SERVICES, 1).expect("a laboratory");
    let ports = |service: usize, node: &mut TestNode, change: &dyn Fn(&mut IpAddr, &mut u16)| {
        for endpoint in &mut node.cluster.services[service].ports[0].endpoints {
            change(&mut endpoint.address, &mut endpoint.port);
        }
    };
    for service in WITHOUT_ENDPOINTS {
        node.cluster.services[service].ports[0].endpoints.clear();
    }
    for service in NOBODY_LISTENS {
        ports(service, &mut node, &|_, port| *port = CLOSED);
    }
    let node2 = plan::NODE2_SERVERS.nth(100);
    for service in SILENT {
        ports(service, &mut node, &|address, _| *address = node2);
    }
    on_one_thread(node.apply(mode)).expect("rules");
    let silence = format!(
        "add table ip fault; add chain ip fault in {{ type filter hook prerouting priority -300; }}; \
         add rule ip fault in ip daddr {node2} drop"
    );
    run(node.lab.node2(), "nft", &[&silence]);
    let mut fault = "add table ip fault; \
         add chain ip fault out { type filter hook output priority 10; }; \
         add chain ip fault steal { type nat hook output priority -112; };"
        .to_owned();
    for service in FORBIDDEN {
        let endpoint = endpoint_of(&node, service);
        // Writing into a String cannot fail, here and below.
        let _ = write!(
            fault,
            "add rule ip fault out ip daddr {} drop;",
            endpoint.ip()
        );
    }
    for (service, healthy) in HIJACKED.into_iter().zip(HEALTHY) {
        let thief = endpoint_of(&node, healthy);
        let vip = node.vip(service).ip();
        let _ = write!(
            fault,
            "add rule ip fault steal ip daddr {vip} {} dport 80 dnat to {thief};",
            ["tcp", "udp"][service % 2]
        );
    }
    run(node.lab.node(), "nft", &[&fault]);
    node
}

/// Asks each Service once, from the node itself.
pub(crate) fn ask(node: &TestNode) -> Vec<UdpSocket> {
    let begin = Instant::now();
    let mut sockets = Vec::new();
    for service in (0..node.cluster.services.len()).rev() {
        let vip = node.vip(service);
        let client = move || {
            if service % 2 == 0 {
                // What becomes of it is what the probes are asked.
                let _ = TcpStream::connect_timeout(&vip, Duration::from_millis(100));
                None
            } else {
                let socket = UdpSocket::bind("0.0.0.0:0").expect("binds");
                socket.send_to(b"1 x\n", vip).ok();
                Some(socket)
            }
        };
        sockets.extend(node.lab.node().run(client).expect("enters"));
    }
    std::thread::sleep(CLIENTS_WAIT.saturating_sub(begin.elapsed()));
    sockets
}

/// One flow to each Service: the verdicts are those of the faults, and nothing is left undecided.
pub fn prepared_faults_are_told(mode: Mode, tier: Tier) {
    let node = prepare(mode);
    let options = Options {
        tier: Some(tier),
        ..Options::default()
    };
    let session = Session::start(node.lab.node(), options).expect("attaches");
    let sockets = ask(&node);
    assert_eq!(sockets.len(), 6);
    let (_, summary) = session.finish().expect("ends");
    assert_eq!(summary.probes.slot_collisions, 0, "{summary}");
    let told: BTreeMap<&str, Vec<&Verdict>> = summary
        .services
        .iter()
        .map(|service| {
            let verdicts = service.verdicts.iter().map(|count| &count.verdict);
            (service.name.as_str(), verdicts.collect())
        })
        .collect();
    for (service, wanted) in wanted(&node) {
        let name = match mode {
            Mode::Ipvs => format!("{}/{}", node.vip(service), ["tcp", "udp"][service % 2]),
            _ => format!("lab/svc-{service:05}:p"),
        };
        let found = told.get(name.as_str());
        assert!(
            found.is_some_and(
                |found| matches!(found.as_slice(), [only] if wanted.iter().any(|w| w == *only))
            ),
            "{name}: {found:?} is not one of {wanted:?}\n{summary}"
        );
    }
}

/// What each Service's flow has to be told as.
fn wanted(node: &TestNode) -> Vec<(usize, Vec<Verdict>)> {
    let by = Who::Node;
    let how = "port unreachable".to_owned();
    let rejected = Verdict::Rejected {
        by,
        how: how.clone(),
    };
    let dropped = |stage: &str| Verdict::Dropped {
        reason: "NETFILTER_DROP".to_owned(),
        stage: stage.to_owned(),
        by: None,
    };
    let [tcp, udp] = NOBODY_LISTENS.map(|service| Who::Endpoint(endpoint_of(node, service)));
    let mut wanted = vec![
        (NOBODY_LISTENS[0], vec![Verdict::Reset { by: tcp }]),
        (NOBODY_LISTENS[1], vec![Verdict::Rejected { by: udp, how }]),
    ];
    wanted.extend(HEALTHY.map(|service| (service, vec![Verdict::Delivered])));
    wanted.extend(WITHOUT_ENDPOINTS.map(|service| (service, vec![rejected.clone()])));
    let unanswered = Verdict::Unanswered { stray: None };
    wanted.extend(SILENT.map(|service| (service, vec![unanswered.clone()])));
    // What IPVS sends on passes OUTPUT a second time.
    let forbidden = vec![dropped("OUTPUT filter"), dropped("OUTPUT-ipvs filter")];
    wanted.extend(FORBIDDEN.map(|service| (service, forbidden.clone())));
    for (service, healthy) in HIJACKED.into_iter().zip(HEALTHY) {
        let by = endpoint_of(node, healthy);
        wanted.push((service, vec![Verdict::Misdelivered { by }]));
    }
    wanted
}

/// Sends from one port until something is told that is wanted.
fn sends_until<T>(
    socket: &UdpSocket,
    to: SocketAddr,
    session: &mut Session,
    wanted: impl Fn(Event) -> Option<T>,
) -> T {
    let begin = Instant::now();
    loop {
        assert!(begin.elapsed() < PATIENCE, "never told");
        socket.send_to(b"1\n", to).expect("sends");
        std::thread::sleep(Duration::from_millis(20));
        let events = session.poll().expect("polls");
        if let Some(found) = events.into_iter().find_map(&wanted) {
            return found;
        }
    }
}

/// An endpoint stops answering, without a word.
fn silence(node: &TestNode, endpoint: SocketAddr) {
    let rule = format!(
        "add table ip fault; add chain ip fault in {{ type filter hook input priority 0; }}; \
         add rule ip fault in ip daddr {} udp dport {} drop",
        endpoint.ip(),
        endpoint.port()
    );
    for pod in node.lab.server_pods() {
        run(pod, "nft", &[&rule]);
    }
}

/// Takes an endpoint out as kube-proxy does in IPVS mode: it gets no new connections.
fn drain(node: &TestNode, vip: SocketAddr, endpoint: SocketAddr) {
    let (vip, endpoint) = (vip.to_string(), endpoint.to_string());
    let arguments = ["-e", "-u", &vip, "-r", &endpoint, "-m", "-w", "0"];
    run(node.lab.node(), "ipvsadm", &arguments);
}

/// Two established flows whose endpoints are taken out of the rules, and whose clients go on sending: one
/// endpoint is dead, the other answers still. Only the first flow is stuck.
pub fn an_established_flow_to_a_dead_endpoint_is_stuck(mode: Mode) {
    const SERVICES_OF: [usize; 2] = [1, 3];
    let mut node = TestNode::build(SERVICES, 1).expect("a laboratory");
    on_one_thread(node.apply(mode)).expect("rules");
    let vips = SERVICES_OF.map(|service| node.vip(service));
    let [dead, alive] = SERVICES_OF.map(|service| endpoint_of(&node, service));
    assert_ne!(dead, alive);
    let mut session = Session::start(node.lab.node(), Options::default()).expect("attaches");
    let [to_dead, to_alive] = vips.map(|vip| {
        let bind = || UdpSocket::bind("0.0.0.0:0").expect("binds");
        let socket = node.lab.node().run(bind).expect("enters");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        socket.send_to(b"1\n", vip).expect("sends");
        socket.recv(&mut [0; 64]).expect("an answer");
        socket
    });
    silence(&node, dead);
    if mode == Mode::Ipvs {
        // kube-proxy lets go of a server only when its connections have ended.
        for (vip, endpoint) in vips.iter().zip([dead, alive]) {
            drain(&node, *vip, endpoint);
        }
    } else {
        for service in SERVICES_OF {
            node.cluster.services[service].ports[0].endpoints[0].address =
                plan::server_pod(0, Family::V4).nth(200);
        }
        on_one_thread(node.apply(mode)).expect("rules");
    }
    let stuck = sends_until(&to_dead, vips[0], &mut session, |event| {
        to_alive.send_to(b"1\n", vips[1]).expect("sends");
        to_alive.recv(&mut [0; 64]).expect("an answer");
        match event {
            Event::Stuck(stuck) => Some(stuck),
            _ => None,
        }
    });
    assert_eq!((stuck.destination, stuck.endpoint), (vips[0], dead));
    let (_, summary) = session.finish().expect("ends");
    let text = summary.to_string();
    assert!(text.contains("1 established flow was stuck"), "{text}");
}

/// A port of the other machine that is no Service's.
const SSH: u16 = 2222;

/// Gives the first Service these addresses, and waits until the session has read the rules.
fn publish(
    node: &mut TestNode,
    mode: Mode,
    session: &mut Session,
    external: &[IpAddr],
    balanced: &[IpAddr],
) -> Vec<Event> {
    let service = &mut node.cluster.services[0];
    service.external_ips = external.to_vec();
    service.load_balancer_ips = balanced.to_vec();
    on_one_thread(node.apply(mode)).expect("rules");
    let wanted = |address: &IpAddr, session: &Session| {
        let directory = session.directory();
        if mode == Mode::Ipvs {
            directory.absorbs(*address).is_some()
        } else {
            directory
                .asked(SocketAddr::new(*address, plan::SERVICE_PORT), 6)
                .is_some()
        }
    };
    let begin = Instant::now();
    let mut events = Vec::new();
    loop {
        assert!(begin.elapsed() < PATIENCE, "the rules are never read");
        events.extend(session.poll().expect("polls"));
        let there = external
            .iter()
            .chain(balanced)
            .all(|address| wanted(address, session));
        let read = events
            .iter()
            .any(|event| matches!(event, Event::Services { .. }));
        let gone = !external.is_empty() || session.directory().absorbed().is_empty();
        if there && read && gone {
            return events;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Who answers a new connection to an address: the first byte that it is sent, if it is accepted.
fn who_answers(ns: &Netns, to: SocketAddr) -> Option<u8> {
    let ask = move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut said = [0];
        std::io::Read::read_exact(&mut stream, &mut said).ok()?;
        Some(said[0])
    };
    ns.run(ask).expect("enters")
}

/// Somebody who accepts connections, and says who it is, until it is dropped: a socket that stays would keep its
/// namespace, and with it the modules that rules there use.
struct Greeter {
    listener: Arc<TcpListener>,
    thread: Option<JoinHandle<()>>,
}

impl Greeter {
    fn listen(ns: &Netns, name: u8) -> Self {
        let listener = ns.run(|| TcpListener::bind(("0.0.0.0", SSH)).expect("binds"));
        let listener = Arc::new(listener.expect("enters"));
        let accepting = Arc::clone(&listener);
        let thread = std::thread::spawn(move || {
            while let Ok((mut stream, _)) = accepting.accept() {
                // Whoever has gone does not want to know.
                let _ = std::io::Write::write_all(&mut stream, &[name]);
            }
        });
        Self {
            listener,
            thread: Some(thread),
        }
    }
}

impl Drop for Greeter {
    fn drop(&mut self) {
        // Whoever accepts is told that nobody will come.
        let ended = socket2::SockRef::from(&*self.listener).shutdown(Shutdown::Both);
        if let (Ok(()), Some(thread)) = (ended, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

/// A Service whose external IP is another machine's address. In IPVS mode everything that is sent there ends on
/// this node, from pods, from the node itself and from outside, whether the rules refuse it or a server of the
/// node answers in the other one's place; in the other modes nothing does but the Service's own port.
pub fn an_external_ip_of_another_machine_is_hijacked(mode: Mode, tier: Tier) {
    const OTHER: u8 = b'o';
    const NODE: u8 = b'n';
    let mut node = TestNode::build(2, 3).expect("a laboratory");
    on_one_thread(node.apply(mode)).expect("rules");
    let other = plan::EXTERNAL_ADDRESS.base;
    // In no network of the node's.
    let balanced: IpAddr = "198.51.100.9".parse().expect("an address");
    let ssh = SocketAddr::new(other, SSH);
    let (node2, by) = (plan::NODE2_ADDRESS.base, plan::NODE_ADDRESS.base);
    let back = format!("route add {node2} via {by}");
    run(
        node.lab.external(),
        "ip",
        &back.split(' ').collect::<Vec<_>>(),
    );
    let _other = Greeter::listen(node.lab.external(), OTHER);
    let _ours = Greeter::listen(node.lab.node(), NODE);
    let options = trace::options(Vec::new(), tier);
    let mut session = Session::start(node.lab.node(), options).expect("attaches");
    // Nothing is bound yet.
    assert_eq!(who_answers(node.lab.node(), ssh), Some(OTHER));
    let mut events = publish(&mut node, mode, &mut session, &[other], &[balanced]);
    let ipvs = mode == Mode::Ipvs;
    let reached = |answers: Option<u8>| if ipvs { answers } else { Some(OTHER) };
    for ns in [node.lab.client_pod(), node.lab.node(), node.lab.node2()] {
        assert_eq!(who_answers(ns, ssh), reached(None), "{mode}");
    }
    let udp = || {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("binds");
        socket.send_to(b"1\n", (other, SSH)).expect("sends");
        if ipvs {
            socket.send_to(b"1\n", (balanced, SSH)).expect("sends");
        }
    };
    node.lab.client_pod().run(udp).expect("enters");
    let vip = SocketAddr::new(other, plan::SERVICE_PORT);
    let connect = move || TcpStream::connect_timeout(&vip, PATIENCE).expect("the Service answers");
    drop(node.lab.client_pod().run(connect).expect("enters"));
    if ipvs {
        // As before kube-proxy 1.26 rejected there: who logs in on the other machine logs in here.
        run(node.lab.node(), "iptables-nft", &["-F", "KUBE-IPVS-FILTER"]);
        assert_eq!(who_answers(node.lab.client_pod(), ssh), Some(NODE));
        assert_eq!(who_answers(node.lab.node(), ssh), Some(NODE));
    }
    events.extend(publish(&mut node, mode, &mut session, &[], &[]));
    assert_eq!(who_answers(node.lab.node(), ssh), Some(OTHER));
    let (last, summary) = session.finish().expect("ends");
    events.extend(last);

    let mut kept: BTreeMap<(&str, &Verdict), u32> = BTreeMap::new();
    for event in &events {
        if let Event::Verdict(decided) = event
            && !decided.verdict.is_of_service()
        {
            assert!(decided.service.ends_with(":80/tcp"), "{decided}");
            assert_eq!(decided.destination.port(), SSH);
            *kept.entry((decided.path, &decided.verdict)).or_default() += 1;
        }
    }
    let network = "192.0.2.0/24 of ext0".to_owned();
    let hijacked = Verdict::Hijacked { network };
    let wanted = BTreeMap::from([
        (("external→kube-ipvs0", &hijacked), 1),
        (("host→kube-ipvs0", &hijacked), 2),
        (("pod→kube-ipvs0", &hijacked), 3),
        (("pod→kube-ipvs0", &Verdict::Absorbed), 1),
    ]);
    let wanted = if ipvs { wanted } else { BTreeMap::new() };
    assert_eq!(kept, wanted, "{mode}: {summary}");
    let services = summary
        .services
        .iter()
        .flat_map(|service| &service.verdicts);
    let delivered = services.filter(|told| told.verdict == Verdict::Delivered);
    assert_eq!(
        delivered.map(|told| told.count).sum::<u64>(),
        1,
        "{summary}"
    );
    assert_eq!(summary.outages, [], "{summary}");
    let probes = summary.probes;
    assert_eq!((probes.ring_lost, probes.unpaired), (0, 0), "{probes:?}");
    let text = summary.to_string();
    let said = "192.0.2.2:80/tcp: of 7 new flows 6 hijacked by this node (an address in 192.0.2.0/24 of ext0)";
    assert_eq!(text.contains(said), ipvs, "{text}");
}

/// A UDP flow that conntrack has forgotten and IPVS has not: it goes to the endpoint that was drained meanwhile,
/// until that is no server of IPVS any more.
pub fn what_ipvs_alone_remembers_is_stuck() {
    const SERVICE: usize = 1;
    let node = TestNode::build(SERVICES, 1).expect("a laboratory");
    on_one_thread(node.apply(Mode::Ipvs)).expect("rules");
    let (vip, dead, alive) = (
        node.vip(SERVICE),
        endpoint_of(&node, SERVICE),
        endpoint_of(&node, 3),
    );
    let ns = node.lab.node();
    let mut session = Session::start(ns, Options::default()).expect("attaches");
    let bind = || UdpSocket::bind("0.0.0.0:0").expect("binds");
    let socket = ns.run(bind).expect("enters");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let forgetful = ["udp_timeout", "udp_timeout_stream"];
    for timeout in forgetful.map(|name| format!("net.netfilter.nf_conntrack_{name}=1")) {
        run(ns, "sysctl", &["-qw", &timeout]);
    }
    socket.send_to(b"1\n", vip).expect("sends");
    socket.recv(&mut [0; 64]).expect("an answer");
    silence(&node, dead);
    let [front, gone, other] = [vip, dead, alive].map(|socket| socket.to_string());
    run(ns, "ipvsadm", &["-a", "-u", &front, "-r", &other, "-m"]);
    drain(&node, vip, dead);
    let begin = Instant::now();
    loop {
        assert!(begin.elapsed() < PATIENCE, "never forgotten, or never read");
        session.poll().expect("polls");
        let directory = session.directory();
        let index = directory.asked(vip, 17).expect("a Service");
        let entries = conntrack::list(ns, |entry| entry.destination == vip).expect("lists");
        if entries.is_empty() && directory.served(index, dead) {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let begin_ns = monotonic_ns();
    socket.send_to(b"2\n", vip).expect("sends");
    let mut told = |wanted: Verdict| {
        let begin = Instant::now();
        loop {
            assert!(begin.elapsed() < PATIENCE, "never told");
            for event in session.poll().expect("polls") {
                if let Event::Verdict(decided) = event
                    && decided.first_ns > begin_ns
                {
                    assert_eq!(decided.verdict, wanted, "{decided}");
                    return;
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    told(Verdict::Stuck { endpoint: dead });
    // expire_nodest_conn, which kube-proxy sets, lets the next packet go elsewhere.
    run(ns, "ipvsadm", &["-d", "-u", &front, "-r", &gone]);
    socket.send_to(b"3\n", vip).expect("sends");
    socket.recv(&mut [0; 64]).expect("an answer");
    told(Verdict::Delivered);
}

/// A long change of IPVS is told when it is over; meanwhile it has endpoints already that no rules named when they were
/// read last, and who answers is one.
pub fn a_server_is_an_endpoint_before_its_change_is_over() {
    const SERVICE: usize = 1;
    /// As long as kube-proxy writes some hundred Services.
    const LONG: Duration = Duration::from_millis(500);
    let node = TestNode::build(SERVICES, 1).expect("a laboratory");
    on_one_thread(node.apply(Mode::Ipvs)).expect("rules");
    let (vip, before, after) = (
        node.vip(SERVICE),
        endpoint_of(&node, SERVICE),
        endpoint_of(&node, 3),
    );
    let (other, its_own) = (node.vip(3), endpoint_of(&node, 3));
    let ns = node.lab.node();
    let mut session = Session::start(ns, Options::default()).expect("attaches");
    let mut restore = ns
        .command("ipvsadm")
        .arg("-R")
        .stdin(Stdio::piped())
        .spawn()
        .expect("runs");
    let mut lines = restore.stdin.take().expect("is piped");
    let instead = format!("-a -u {vip} -r {after} -m\n-e -u {vip} -r {before} -m -w 0\n");
    lines.write_all(instead.as_bytes()).expect("is read");
    let mut sockets = Vec::new();
    let mut decided = Vec::new();
    let mut poll = |session: &mut Session| {
        let events = session.poll().expect("polls").into_iter();
        let verdicts = events.filter_map(|event| match event {
            Event::Verdict(decided) => Some(decided),
            _ => None,
        });
        decided.extend(verdicts);
        decided.len()
    };
    let begin = Instant::now();
    for weight in (1..=2).cycle() {
        let line = format!("-e -u {other} -r {its_own} -m -w {weight}\n");
        lines.write_all(line.as_bytes()).expect("is read");
        let bind = || UdpSocket::bind("0.0.0.0:0").expect("binds");
        let socket = ns.run(bind).expect("enters");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        socket.send_to(b"1\n", vip).expect("sends");
        socket.recv(&mut [0; 64]).expect("an answer");
        sockets.push(socket);
        poll(&mut session);
        if begin.elapsed() >= LONG {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(lines);
    assert!(restore.wait().expect("ends").success());
    let begin = Instant::now();
    while poll(&mut session) < sockets.len() {
        assert!(begin.elapsed() < PATIENCE, "some were never told");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(decided.iter().any(|one| one.headed == Some(after)));
    for one in decided {
        assert_eq!(one.verdict, Verdict::Delivered, "{one}");
    }
}

/// Somebody answers who is no endpoint: a rule of somebody else translates to it first.
pub fn a_stranger_that_answers_is_told(mode: Mode) {
    let stranger = Stranger::on_a_node(mode);
    let session = Session::start(stranger.node.lab.node(), Options::default()).expect("attaches");
    stranger.answers_once();
    let (_, summary) = session.finish().expect("ends");
    let [service] = summary.services.as_slice() else {
        panic!("{summary}");
    };
    let by = stranger.address;
    let told: Vec<_> = service.verdicts.iter().map(|one| &one.verdict).collect();
    assert_eq!(told, [&Verdict::Misdelivered { by }], "{summary}");
}

/// The same, while somebody changes rules, of another mode, so often that they are never at rest.
pub fn a_stranger_is_told_while_rules_change_all_the_time() {
    let stranger = Stranger::on_a_node(Mode::Nftables);
    let ns = stranger.node.lab.node();
    let mut session = Session::start(ns, Options::default()).expect("attaches");
    let mut changed = 0_u32;
    let mut change = |session: &mut Session| {
        changed += 1;
        let comment = changed.to_string();
        let words = [
            "-t",
            "nat",
            "-A",
            "PREROUTING",
            "-m",
            "comment",
            "--comment",
        ];
        run(ns, "iptables-nft", &[&words[..], &[&comment]].concat());
        session.poll().expect("polls")
    };
    let is_change = |event: &Event| matches!(event, Event::RuleChange(_));
    let begin = Instant::now();
    while !change(&mut session).iter().any(is_change) {
        assert!(
            begin.elapsed() < PATIENCE,
            "the changes were never heard of"
        );
    }
    stranger.answers_once();
    let verdict = loop {
        assert!(begin.elapsed() < PATIENCE, "nothing was told in all that");
        let told = change(&mut session)
            .into_iter()
            .find_map(|event| match event {
                Event::Verdict(decided) => Some(decided.verdict),
                _ => None,
            });
        if let Some(verdict) = told {
            break verdict;
        }
    };
    let by = stranger.address;
    assert_eq!(verdict, Verdict::Misdelivered { by });
}

/// A node on which what is sent to a Service goes to somebody who is no endpoint.
struct Stranger {
    node: TestNode,
    socket: UdpSocket,
    address: SocketAddr,
    vip: SocketAddr,
}

impl Stranger {
    fn on_a_node(mode: Mode) -> Self {
        const SERVICE: usize = HEALTHY[1];
        const PORT: u16 = 7777;
        let node = TestNode::build(SERVICES, 1).expect("a laboratory");
        on_one_thread(node.apply(mode)).expect("rules");
        let vip = node.vip(SERVICE);
        let address = SocketAddr::new(endpoint_of(&node, SERVICE).ip(), PORT);
        let bind = || UdpSocket::bind(address).ok();
        let mut pods = node.lab.server_pods().iter();
        let socket = pods.find_map(|pod| pod.run(bind).expect("enters"));
        let socket = socket.expect("one of them has the address");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let steal = format!(
            "add table ip fault; add chain ip fault steal {{ type nat hook output priority -112; }}; \
             add rule ip fault steal ip daddr {} udp dport {} dnat to {address}",
            vip.ip(),
            vip.port()
        );
        run(node.lab.node(), "nft", &[&steal]);
        Self {
            node,
            socket,
            address,
            vip,
        }
    }

    /// A client on the node asks the Service, and has an answer.
    fn answers_once(&self) {
        let bind = || UdpSocket::bind("0.0.0.0:0").expect("binds");
        let client = self.node.lab.node().run(bind).expect("enters");
        client.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        client.send_to(b"1\n", self.vip).expect("sends");
        let (_, asker) = self.socket.recv_from(&mut [0; 64]).expect("is asked");
        self.socket.send_to(b"2\n", asker).expect("answers");
        client.recv(&mut [0; 64]).expect("an answer");
    }
}

/// A client that goes on sending from one port to an endpoint that is gone: conntrack remembers it.
pub fn a_flow_to_a_dead_endpoint_is_stuck(mode: Mode) {
    const SERVICE: usize = SILENT[1];
    let mut node = prepare(mode);
    let mut session = Session::start(node.lab.node(), Options::default()).expect("attaches");
    let vip = node.vip(SERVICE);
    let dead = endpoint_of(&node, SERVICE);
    let socket = node
        .lab
        .node()
        .run(|| UdpSocket::bind("0.0.0.0:0").expect("binds"))
        .expect("enters");
    socket.send_to(b"1 x\n", vip).expect("sends");
    node.cluster.services[SERVICE].ports[0].endpoints[0].address =
        plan::server_pod(0, Family::V4).nth(200);
    on_one_thread(node.apply(mode)).expect("rules");
    let stuck = sends_until(&socket, vip, &mut session, |event| match event {
        Event::Verdict(decided) => {
            matches!(decided.verdict, Verdict::Stuck { .. }).then_some(decided)
        }
        _ => None,
    });
    assert_eq!(stuck.verdict, Verdict::Stuck { endpoint: dead });
    assert_eq!(stuck.destination, vip);
    let (_, summary) = session.finish().expect("ends");
    let text = summary.to_string();
    assert!(text.contains("stuck on the dead endpoint"), "{text}");
}

/// A port on which only these tests' own servers listen.
const OWN: u16 = 7777;

/// A node whose first Service has this one endpoint, at [`OWN`]; where nobody has the address, it stays the
/// laboratory's. Returns the endpoint and who listens there.
fn with_own_server(mode: Mode, address: Option<IpAddr>) -> (TestNode, SocketAddr, TcpListener) {
    let mut node = TestNode::build(2, 1).expect("a laboratory");
    let endpoint = &mut node.cluster.services[0].ports[0].endpoints[0];
    endpoint.port = OWN;
    endpoint.address = address.unwrap_or(endpoint.address);
    let endpoint = endpoint_of(&node, 0);
    let bind = || TcpListener::bind(endpoint).ok();
    let mut listener = None;
    for ns in node.lab.server_pods().iter().chain([node.lab.node()]) {
        listener = listener.or_else(|| ns.run(bind).expect("enters"));
    }
    on_one_thread(node.apply(mode)).expect("rules");
    (
        node,
        endpoint,
        listener.expect("one of them has the address"),
    )
}

/// Polls until something is so.
fn polls_until(
    session: &mut Session,
    mut so: impl FnMut(&Session, &[Event]) -> bool,
) -> Vec<Event> {
    let begin = Instant::now();
    let mut events = Vec::new();
    loop {
        events.extend(session.poll().expect("polls"));
        if so(session, &events) {
            return events;
        }
        assert!(begin.elapsed() < PATIENCE, "never so: {events:#?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The only Service that is told of, and its verdicts.
fn only_service(summary: &Summary) -> (&ServiceSummary, Vec<(&Verdict, u64)>) {
    let [service] = summary.services.as_slice() else {
        panic!("{summary}");
    };
    let verdicts = service.verdicts.iter();
    let verdicts = verdicts.map(|one| (&one.verdict, one.count));
    (service, verdicts.collect())
}

/// A server on the node that closes first: the client's FIN is freed with the socket that had taken it.
pub fn what_a_socket_took_is_no_drop(mode: Mode) {
    const REQUESTS: u64 = 5;
    let (node, _, listener) = with_own_server(mode, Some(plan::NODE_ADDRESS.base));
    let vip = node.vip(0);
    let mut session = Session::start(node.lab.node(), Options::default()).expect("attaches");
    let server = std::thread::spawn(move || {
        for (_, stream) in (0..REQUESTS).zip(listener.incoming()) {
            std::io::Write::write_all(&mut stream.expect("accepts"), b"1").expect("answers");
        }
    });
    let ask = move || {
        let mut stream = TcpStream::connect_timeout(&vip, PATIENCE).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut all = Vec::new();
        std::io::Read::read_to_end(&mut stream, &mut all).expect("reads");
        all
    };
    for _ in 0..REQUESTS {
        assert_eq!(node.lab.client_pod().run(ask).expect("enters"), b"1");
    }
    server.join().expect("serves");
    let index = session.directory().asked(vip, 6).expect("a Service");
    polls_until(&mut session, |session, _| {
        session.tallies()[index].freed == REQUESTS
    });
    let (_, summary) = session.finish().expect("ends");
    let (service, told) = only_service(&summary);
    assert_eq!(told, [(&Verdict::Delivered, REQUESTS)], "{summary}");
    assert_eq!(service.later_drops, [], "{summary}");
    let probes = summary.probes;
    assert_eq!((probes.dropped, probes.dropped_at_socket), (0, 0));
    let text = summary.to_string();
    assert!(text.contains("5 freed with their socket"), "{text}");
}

/// A connection that works, and whose entry somebody deletes: conntrack makes another of its next packet.
pub fn a_flow_whose_entry_is_deleted_goes_on(mode: Mode) {
    let (node, _, listener) = with_own_server(mode, None);
    let vip = node.vip(0);
    let ns = node.lab.node();
    let mut session = Session::start(ns, Options::default()).expect("attaches");
    let connect = move || TcpStream::connect_timeout(&vip, PATIENCE).expect("connects");
    let client = node.lab.client_pod().run(connect).expect("enters");
    let (server, _) = listener.accept().expect("accepts");
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    }
    let exchange = || {
        let mut byte = [0];
        for (from, to) in [(&client, &server), (&server, &client)] {
            let (mut from, mut to) = (from, to);
            std::io::Write::write_all(&mut from, b"1").expect("sends");
            std::io::Read::read_exact(&mut to, &mut byte).expect("receives");
        }
    };
    exchange();
    run(
        ns,
        "conntrack",
        &["-D", "-p", "tcp", "--orig-dst", &vip.ip().to_string()],
    );
    exchange();
    exchange();
    socket2::SockRef::from(&client)
        .set_linger(Some(Duration::ZERO))
        .expect("lingers");
    drop(client);
    let index = session.directory().asked(vip, 6).expect("a Service");
    polls_until(&mut session, |session, _| {
        session.tallies()[index]
            .later_resets
            .contains_key(&Who::Client)
    });
    let (_, summary) = session.finish().expect("ends");
    let (service, told) = only_service(&summary);
    assert_eq!(told, [(&Verdict::Delivered, 1)], "{summary}");
    assert_eq!(
        (service.flows, service.repeated, service.picked_up),
        (1, 0, 1),
        "{summary}"
    );
    let text = summary.to_string();
    let said = "1 established flow was picked up by conntrack, whose entry was gone";
    assert!(text.contains(said), "{text}");
}

/// A connection that works until a rule keeps conntrack from tracking it: its packets go on untranslated, and are no
/// new flow's.
pub fn a_flow_that_is_no_longer_tracked_is_told(mode: Mode) {
    let (node, _, listener) = with_own_server(mode, None);
    let vip = node.vip(0);
    let ns = node.lab.node();
    let mut session = Session::start(ns, Options::default()).expect("attaches");
    let connect = move || TcpStream::connect_timeout(&vip, PATIENCE).expect("connects");
    let mut client = node.lab.client_pod().run(connect).expect("enters");
    let (mut server, _) = listener.accept().expect("accepts");
    server.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    std::io::Write::write_all(&mut client, b"1").expect("sends");
    std::io::Read::read_exact(&mut server, &mut [0]).expect("receives");
    let rule = format!(
        "add table ip fault; add chain ip fault first {{ type filter hook prerouting priority -300; }}; \
         add rule ip fault first ip daddr {} notrack",
        vip.ip()
    );
    run(ns, "nft", &[&rule]);
    std::io::Write::write_all(&mut client, b"2").expect("sends");
    let index = session.directory().asked(vip, 6).expect("a Service");
    polls_until(&mut session, |session, _| {
        session.tallies()[index].untracked > 0
    });
    let (_, summary) = session.finish().expect("ends");
    let (service, told) = only_service(&summary);
    assert_eq!(told, [(&Verdict::Delivered, 1)], "{summary}");
    let counts = (service.flows, service.repeated, service.picked_up);
    assert_eq!(counts, (1, 0, 0), "{summary}");
    let text = summary.to_string();
    assert!(
        text.contains("not tracked by conntrack, and so not translated"),
        "{text}"
    );
}

/// A rule of this node drops what the endpoint answers, and then no more.
pub fn an_answer_that_this_node_drops_is_told(mode: Mode) {
    let (node, endpoint, listener) = with_own_server(mode, None);
    let vip = node.vip(0);
    let ns = node.lab.node();
    let rule = format!(
        "add table ip fault; add chain ip fault back {{ type filter hook forward priority 10; }}; \
         add rule ip fault back ip saddr {} tcp sport {OWN} drop",
        endpoint.ip()
    );
    run(ns, "nft", &[&rule]);
    let mut session = Session::start(ns, Options::default()).expect("attaches");
    let pod = node.lab.client_pod().clone();
    let client = std::thread::spawn(move || {
        pod.run(move || TcpStream::connect_timeout(&vip, PATIENCE).expect("connects"))
            .expect("enters")
    });
    let decided = |events: &[Event]| {
        let mut decided = events.iter().filter_map(|event| match event {
            Event::Verdict(decided) => Some(decided.clone()),
            _ => None,
        });
        decided.next_back()
    };
    let events = polls_until(&mut session, |_, events| decided(events).is_some());
    let lost = Verdict::AnswerDropped {
        reason: "NETFILTER_DROP".to_owned(),
        stage: "FORWARD filter".to_owned(),
        by: None,
    };
    let told = decided(&events).expect("is told");
    assert_eq!(told.verdict, lost);
    let client_address = told.source;
    let drawn = format!("{endpoint} → {client_address} for {vip}");
    let replies: Vec<String> = journeys(events)
        .filter(|journey| journey.answer)
        .map(|journey| journey.to_string())
        .collect();
    assert!(!replies.is_empty());
    assert!(
        replies.iter().all(|line| line.ends_with(&drawn)),
        "{replies:?}"
    );
    run(ns, "nft", &["delete table ip fault"]);
    drop(client.join().expect("connects"));
    drop(listener);
    let events = polls_until(&mut session, |_, events| decided(events).is_some());
    let told = decided(&events).expect("is told");
    assert_eq!(told.verdict, Verdict::Delivered);
    assert_eq!(told.corrects.as_deref(), Some(&lost));
    let (_, summary) = session.finish().expect("ends");
    let (service, _) = only_service(&summary);
    let answers: u64 = service.answer_drops.iter().map(|count| count.count).sum();
    assert_eq!(answers, summary.probes.dropped, "{summary}");
    assert_eq!(
        (service.flows, service.dropped_later()),
        (1, 0),
        "{summary}"
    );
}

/// Without rules the node itself refuses what is sent to a NodePort: a packet that reaches its stack and finds no
/// socket is one packet of one flow.
pub fn what_the_node_refuses_is_counted_once(mode: Mode) {
    const FLOWS: u64 = 5;
    let node = TestNode::build(2, 1).expect("a laboratory");
    on_one_thread(node.apply(mode)).expect("rules");
    let port = plan::node_port(0).expect("a port");
    let to = SocketAddr::new(plan::NODE_ADDRESS.base, port);
    let ns = node.lab.node();
    let session = Session::start(ns, Options::default()).expect("attaches");
    match mode {
        // Every rule, so that nothing asks conntrack any more.
        Mode::Nftables => run(ns, "nft", &["flush ruleset"]),
        Mode::IptablesNft => run(ns, "iptables-nft", &["-t", "nat", "-F"]),
        _ => run(ns, "iptables-legacy", &["-t", "nat", "-F"]),
    }
    let connect = move || {
        for _ in 0..FLOWS {
            let refused = TcpStream::connect_timeout(&to, PATIENCE).expect_err("is refused");
            assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        }
    };
    node.lab.external().run(connect).expect("enters");
    let (_, summary) = session.finish().expect("ends");
    let (service, told) = only_service(&summary);
    let by = Who::Node;
    assert_eq!(told, [(&Verdict::Reset { by }, FLOWS)], "{mode}: {summary}");
    let counts = (service.flows, service.repeated, service.dropped_later());
    assert_eq!(counts, (FLOWS, 0, 0), "{mode}: {summary}");
    assert_eq!(summary.probes.dropped_at_socket, FLOWS, "{mode}: {summary}");
}
