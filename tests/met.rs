//! What first packets meet in the kernel's functions is told, and is what became of them.

use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tracer::lab::plan;
use tracer::probe::catalogue::Detail;
use tracer::probe::tier::Tier;
use tracer::rules::Mode;
use tracer::scenario::node::TestNode;
use tracer::trace::journey::{End, Journey};
use tracer::trace::met::What;
use tracer::trace::session::{Options, Session};

use crate::trace::on_one_thread;
use crate::truth;

/// Longer than anything here takes on a machine under load.
const PATIENCE: Duration = Duration::from_secs(20);

fn session(node: &TestNode) -> Session {
    let options = Options {
        tier: Some(Tier::Functions),
        detail: Detail::Functions,
        ..Options::default()
    };
    let session = Session::start(node.lab.node(), options).expect("attaches");
    let hints = session.hints();
    assert!(
        hints.iter().all(|hint| !hint.contains("no probe at")),
        "{hints:?}"
    );
    session
}

fn journeys(session: Session) -> Vec<Journey> {
    let (events, summary) = session.finish().expect("ends");
    let probes = summary.probes;
    assert_eq!(
        (probes.ring_lost, probes.slot_collisions, probes.unpaired),
        (0, 0, 0),
        "{probes:?}"
    );
    truth::journeys(events).collect()
}

/// Lines of what a packet met, without addresses.
fn lines(journey: &Journey) -> Vec<String> {
    let met = journey.met.iter();
    met.map(|met| format!("{} {}: {met}", met.hook, met.stage))
        .collect()
}

/// A pod's flow to a Service meets the mode's tables or chains in their order, and ends where they say.
pub fn what_packets_meet_is_told(mode: Mode) {
    let node = TestNode::build(2, 3).expect("a laboratory");
    on_one_thread(node.apply(mode)).expect("rules");
    let vip = node.vip(1);
    let session = session(&node);
    let bind = || UdpSocket::bind(("0.0.0.0", *plan::SOURCE_PORTS.start())).expect("binds");
    let socket = node.lab.client_pod().run(bind).expect("enters");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    for _ in 0..2 {
        socket.send_to(b"1\n", vip).expect("sends");
        socket.recv(&mut [0; 64]).expect("an answer");
    }
    let journeys = journeys(session);
    let [journey] = journeys.as_slice() else {
        panic!("{journeys:#?}");
    };
    let headed = journey.headed.expect("known");
    let lines = lines(journey);
    let wanted: Vec<String> = match mode {
        Mode::IptablesLegacy => vec![
            "PREROUTING dnat: table nat: accept".to_owned(),
            "PREROUTING dnat: nat binds the destination: accept".to_owned(),
            "FORWARD filter: table filter: accept".to_owned(),
            "POSTROUTING snat: table nat: accept".to_owned(),
            "POSTROUTING helper: entry confirmed: accept".to_owned(),
        ],
        Mode::IptablesNft => vec![
            "PREROUTING dnat: chain nat PREROUTING: accept".to_owned(),
            "PREROUTING dnat: nat binds the destination: accept".to_owned(),
            "FORWARD filter: chain filter FORWARD: accept".to_owned(),
            "POSTROUTING snat: chain nat POSTROUTING: accept".to_owned(),
            "POSTROUTING helper: entry confirmed: accept".to_owned(),
        ],
        Mode::Nftables => vec![
            "PREROUTING pre-dnat: chain kube-proxy filter-prerouting-pre-dnat: accept".to_owned(),
            "PREROUTING dnat: chain kube-proxy nat-prerouting: accept".to_owned(),
            "PREROUTING dnat: nat binds the destination: accept".to_owned(),
            "FORWARD filter: chain kube-proxy filter-forward: accept".to_owned(),
            "POSTROUTING snat: chain kube-proxy nat-postrouting: accept".to_owned(),
            "POSTROUTING helper: entry confirmed: accept".to_owned(),
        ],
        Mode::Ipvs => vec![
            format!("INPUT ipvs: IPVS rr chooses {headed}"),
            format!("INPUT ipvs: IPVS sends to {headed} (nat)"),
            "POSTROUTING helper: entry confirmed: accept".to_owned(),
        ],
    };
    let mut rest = lines.iter();
    for wanted in wanted {
        assert!(
            rest.any(|line| *line == wanted),
            "{mode}: no {wanted}, in order, in {lines:#?}"
        );
    }
}

/// A packet that a rule drops is dropped by its table or chain.
pub fn a_drop_has_its_table(mode: Mode) {
    let node = TestNode::build(2, 1).expect("a laboratory");
    on_one_thread(node.apply(mode)).expect("rules");
    let endpoint = node.cluster.services[1].ports[0].endpoints[0]
        .address
        .to_string();
    let (tool, rule, by) = match mode {
        Mode::IptablesLegacy => (
            "iptables-legacy",
            vec!["-I", "FORWARD", "-d", &endpoint, "-j", "DROP"],
            "table filter",
        ),
        _ => (
            "iptables-nft",
            vec!["-I", "FORWARD", "-d", &endpoint, "-j", "DROP"],
            "chain filter FORWARD",
        ),
    };
    let status = node
        .lab
        .node()
        .command(tool)
        .args(rule)
        .status()
        .expect("runs");
    assert!(status.success());
    let session = session(&node);
    let send = || {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("binds");
        socket.send_to(b"1\n", node.vip(1)).expect("sends");
    };
    node.lab.client_pod().run(send).expect("enters");
    let journeys = journeys(session);
    let [journey] = journeys.as_slice() else {
        panic!("{journeys:#?}");
    };
    assert_eq!(
        journey.end,
        End::Dropped {
            reason: "NETFILTER_DROP".to_owned(),
            stage: "FORWARD filter".to_owned(),
            by: Some(by.to_owned()),
        },
        "{:#?}",
        lines(journey)
    );
}

/// A port that is used again while IPVS remembers its old connection, which with `conn_reuse_mode` 1 is given up
/// (kubernetes #81775).
pub fn a_port_used_again_is_told() {
    let node = TestNode::build(1, 1).expect("a laboratory");
    on_one_thread(node.apply(Mode::Ipvs)).expect("rules");
    let sysctl = node
        .lab
        .node()
        .command("sysctl")
        .args(["-qw", "net.ipv4.vs.conn_reuse_mode=1"])
        .status();
    assert!(sysctl.expect("runs").success());
    let vip = node.vip(0);
    let connect = || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).expect("opens");
        socket.set_reuse_address(true).expect("is set");
        let port = *plan::SOURCE_PORTS.start();
        socket
            .bind(&SocketAddr::from(([0, 0, 0, 0], port)).into())
            .expect("binds");
        socket
            .connect_timeout(&vip.into(), PATIENCE)
            .expect("connects");
        // What is closed with an RST is closed at once, on both sides.
        socket.set_linger(Some(Duration::ZERO)).expect("is set");
        drop(TcpStream::from(socket));
    };
    node.lab.client_pod().run(connect).expect("enters");
    let session = session(&node);
    node.lab.client_pod().run(connect).expect("enters");
    let journeys = journeys(session);
    let [journey] = journeys.as_slice() else {
        panic!("{journeys:#?}");
    };
    let headed = journey.headed.expect("known");
    let by_ipvs = journey.met.iter().filter_map(|met| match met.what {
        What::Expired { real_server } => Some(("gives up", Some(real_server))),
        What::Scheduled { real_server, .. } => Some(("chooses", real_server)),
        What::SentOn { real_server, .. } => Some(("sends to", Some(real_server))),
        _ => None,
    });
    let to = Some(headed);
    // There is one real server.
    let wanted = [("gives up", to), ("chooses", to), ("sends to", to)];
    assert_eq!(by_ipvs.collect::<Vec<_>>(), wanted);
    assert_eq!(journey.end, End::Sent);
}
