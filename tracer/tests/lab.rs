//! The laboratory on a real kernel. Needs root; changes nothing outside namespaces of its own.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::task::LocalSet;
use tracer::cluster::{Cluster, Family, Protocol};
use tracer::kernel::clock::monotonic_ns;
use tracer::kernel::netns::Netns;
use tracer::kernel::sysctl;
use tracer::lab::latency::Answer;
use tracer::lab::plan;
use tracer::lab::sink::Sinks;
use tracer::lab::topology::{Lab, LabOptions};
use tracer::lab::traffic::{
    self, Established, FlowRecord, Stream, TrafficError, TrafficPlan, TrafficResult,
};
use tracer::lab::{Outcome, clean};
use tracer_ebpf::path::Path;

/// Longer than anything here takes on a machine under load.
const PATIENCE: Duration = Duration::from_secs(20);

fn build(dual_stack: bool) -> Lab {
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests make network namespaces: run them as root"
    );
    Lab::build(LabOptions {
        dual_stack,
        ..LabOptions::default()
    })
    .expect("a laboratory")
}

/// Runs a future the way the program does: one thread.
fn on_one_thread<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, future)
}

fn send(lab: &Lab, cluster: &Cluster, plan: &TrafficPlan) -> TrafficResult {
    on_one_thread(async {
        let prepared = traffic::prepare(lab, cluster, plan).await?;
        prepared.run(monotonic_ns() + 1_000_000).await
    })
    .expect("traffic")
}

fn streams(paths: &[Path], flows: u32) -> Vec<Stream> {
    paths
        .iter()
        .map(|path| Stream {
            path: *path,
            per_second: 1000.0,
            flows,
            start_ns: 0,
        })
        .collect()
}

fn assert_delivered(result: &TrafficResult, cluster: &Cluster) {
    for flow in &result.flows {
        let Outcome::Delivered { by } = flow.outcome else {
            panic!("{flow:?}");
        };
        let port = &cluster.services[flow.service].ports[0];
        assert!(
            port.endpoints
                .iter()
                .any(|e| SocketAddr::new(e.address, e.port) == by),
            "{flow:?}"
        );
        assert!(flow.intended_ns <= flow.sent_ns && flow.sent_ns <= flow.finished_ns);
    }
}

/// Feeds a ruleset to `nft -f -` on the node.
fn nft(node: &Netns, rules: &str) {
    let mut child = node
        .command("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("nft");
    child
        .stdin
        .take()
        .expect("a pipe")
        .write_all(rules.as_bytes())
        .expect("nft reads its rules");
    assert!(child.wait().expect("nft ends").success(), "{rules}");
}

/// The cluster as a small nftables ruleset, with the hooks of kube-proxy's.
fn service_rules(cluster: &Cluster, family: Family) -> String {
    use std::fmt::Write as _;
    let (ip, pods) = match family {
        Family::V4 => ("ip", plan::CLUSTER_CIDR),
        Family::V6 => ("ip6", plan::CLUSTER_CIDR6),
    };
    let mut by_ip = String::new();
    let mut by_port = String::new();
    let mut chains = String::new();
    for (index, service) in cluster.services.iter().enumerate() {
        let port = &service.ports[0];
        let protocol = port.protocol;
        let cluster_ip = service
            .cluster_ips
            .iter()
            .find(|a| Family::of(**a) == family)
            .expect("a ClusterIP");
        let endpoints: Vec<String> = port
            .endpoints
            .iter()
            .filter(|e| Family::of(e.address) == family)
            .enumerate()
            .map(|(n, e)| format!("{n} : {} . {}", e.address, e.port))
            .collect();
        let count = endpoints.len();
        let list = endpoints.join(", ");
        writeln!(
            chains,
            "chain s{index} {{ meta l4proto {protocol} dnat {ip} addr . port to numgen inc mod {count} map {{ {list} }} ; }}"
        )
        .expect("a string");
        writeln!(
            by_ip,
            "{cluster_ip} . {protocol} . {} : goto s{index},",
            port.port
        )
        .expect("a string");
        if let Some(node_port) = port.node_port {
            writeln!(by_port, "{protocol} . {node_port} : goto n{index},").expect("a string");
            writeln!(
                chains,
                "chain n{index} {{ meta mark set mark or 0x4000 ; goto s{index} ; }}"
            )
            .expect("a string");
        }
    }
    format!(
        "table {ip} lab {{
        {chains}
        chain services {{
            {ip} daddr . meta l4proto . th dport vmap {{ {by_ip} }}
            fib daddr type local meta l4proto . th dport vmap {{ {by_port} }}
        }}
        chain prerouting {{ type nat hook prerouting priority -100 ; jump services ; }}
        chain output {{ type nat hook output priority -100 ;
            {ip} saddr != {pods} meta mark set mark or 0x4000
            jump services ; }}
        chain postrouting {{ type nat hook postrouting priority 100 ;
            meta mark & 0x4000 == 0x4000 masquerade ; }}
        }}"
    )
}

fn conntrack_count(node: &Netns) -> u64 {
    sysctl::read_number(node, "net/netfilter/nf_conntrack_count").expect("conntrack")
}

/// Waits until `condition` holds; a kernel gives up a namespace a moment after its last user.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn it_is_built_and_vanishes() {
    let links = || std::fs::read_to_string("/proc/net/dev").expect("links of this namespace");
    let names = |text: &str| -> BTreeSet<String> {
        text.lines()
            .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
            .collect()
    };
    let before = names(&links());
    let lab = build(true);
    // Other programs may make links meanwhile; these names are the laboratory's.
    let outside = || -> Vec<String> {
        names(&links())
            .difference(&before)
            .filter(|name| name.starts_with("pod-") || ["ext0", "node2"].contains(&name.as_str()))
            .cloned()
            .collect()
    };
    assert!(outside().is_empty(), "nothing appears outside");
    let inodes: BTreeSet<u32> = [lab.node(), lab.external(), lab.node2(), lab.client_pod()]
        .into_iter()
        .chain(lab.server_pods())
        .map(|netns| netns.number().expect("a number"))
        .collect();
    assert_eq!(inodes.len(), 8);
    let node_links = lab
        .node()
        .run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))
        .expect("the node")
        .expect("its links");
    let expected = [
        "ext0",
        "lo",
        "node2",
        "pod-0",
        "pod-1",
        "pod-2",
        "pod-3",
        "pod-client",
    ];
    assert_eq!(
        names(&node_links),
        expected.map(ToOwned::to_owned).into_iter().collect()
    );
    // The namespaces' only references are this process's: none may be left among its files.
    let held = || -> usize {
        std::fs::read_dir("/proc/self/fd")
            .expect("open files")
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .filter(|link| {
                inodes
                    .iter()
                    .any(|inode| link.as_os_str() == format!("net:[{inode}]").as_str())
            })
            .count()
    };
    assert_eq!(held(), 8);
    drop(lab);
    // A thread of another test that is just forking may hold a copy for a moment.
    eventually("the namespaces are given up", || held() == 0);
    assert!(outside().is_empty());
}

#[test]
fn what_a_dead_process_left_is_removed() {
    // The pid of a process that has ended and been waited for.
    let mut child = std::process::Command::new("true").spawn().expect("true");
    let pid = child.id();
    child.wait().expect("it ends");
    let lock = format!("/run/svcpath-xtables-{pid}.lock");
    std::fs::write(&lock, "").expect("a lock file");
    let mut orphan = std::process::Command::new("sleep")
        .arg("1000")
        .env("XTABLES_LOCKFILE", &lock)
        .spawn()
        .expect("sleep");
    // The kernel lets who starts a program go on before the program has its environment.
    let environment = format!("/proc/{}/environ", orphan.id());
    let begin = Instant::now();
    // Another test's laboratory may end it first.
    while orphan.try_wait().expect("a child").is_none()
        && std::fs::read(&environment).expect("a child").is_empty()
    {
        assert!(begin.elapsed() < PATIENCE, "it has no environment");
        std::thread::sleep(Duration::from_millis(1));
    }
    let own = format!("/run/svcpath-xtables-{}.lock", std::process::id());
    std::fs::write(&own, "").expect("a lock file");
    // Another test's laboratory may clean up first; what counts is that it is gone.
    let removed = clean::clean().expect("clean-up");
    let status = orphan.wait().expect("the orphan has ended");
    assert!(!status.success());
    assert!(!std::path::Path::new(&lock).exists(), "{removed:?}");
    let _ = std::fs::remove_file(&own);
}

#[test]
fn every_endpoint_answers_in_both_families() {
    let lab = build(true);
    let cluster = plan::cluster(30, 3, true).expect("a cluster");
    let sinks = Sinks::start(&lab, &cluster).expect("servers");
    for family in [Family::V4, Family::V6] {
        let plan = TrafficPlan {
            seed: 1,
            family,
            streams: streams(&Path::FLOOR, 500),
            ..TrafficPlan::default()
        };
        let result = send(&lab, &cluster, &plan);
        assert_eq!(result.flows.len(), 1500);
        assert_delivered(&result, &cluster);
        let by: BTreeSet<SocketAddr> = result
            .flows
            .iter()
            .filter_map(|flow| match flow.outcome {
                Outcome::Delivered { by } => Some(by),
                _ => None,
            })
            .collect();
        let all: BTreeSet<SocketAddr> = cluster
            .services
            .iter()
            .flat_map(|service| &service.ports[0].endpoints)
            .map(|e| SocketAddr::new(e.address, e.port))
            .filter(|address| Family::of(address.ip()) == family)
            .collect();
        assert_eq!(by, all);
        for path in Path::FLOOR {
            let count = |answer| result.latency[&(path, answer)].count();
            let udp = count(Answer::First);
            assert_eq!(count(Answer::Connect), count(Answer::Only));
            assert_eq!(count(Answer::Only) + udp, 500);
            assert_eq!(count(Answer::Later), 2 * udp);
        }
    }
    assert_eq!(sinks.failures(), 0);
}

#[test]
fn services_are_reached_by_every_path_and_each_flow_is_one_conntrack_entry() {
    let lab = build(true);
    let cluster = plan::cluster(30, 3, true).expect("a cluster");
    let sinks = Sinks::start(&lab, &cluster).expect("servers");
    for family in [Family::V4, Family::V6] {
        nft(lab.node(), &service_rules(&cluster, family));
        let plan = TrafficPlan {
            seed: 2,
            family,
            streams: streams(&Path::SERVICE, 200),
            ..TrafficPlan::default()
        };
        let before = conntrack_count(lab.node());
        let result = send(&lab, &cluster, &plan);
        assert_eq!(result.flows.len(), 600);
        assert_delivered(&result, &cluster);
        assert_eq!(conntrack_count(lab.node()) - before, 600);
        let sources: BTreeSet<(SocketAddr, Protocol)> = result
            .flows
            .iter()
            .map(|flow| (flow.source, flow.protocol))
            .collect();
        assert_eq!(sources.len(), 600, "no source twice");
    }
    assert_eq!(sinks.failures(), 0);
}

#[test]
fn an_answer_from_a_stranger_is_misdelivered() {
    let lab = build(false);
    let mut cluster = plan::cluster(4, 3, false).expect("a cluster");
    let _sinks = Sinks::start(&lab, &cluster).expect("servers");
    // The rules send Service 0 to an endpoint of Service 2 (both TCP), 1 to one of 3 (both UDP).
    let mut wrong = cluster.clone();
    for index in [0, 1] {
        wrong.services[index].ports[0].endpoints =
            vec![cluster.services[index + 2].ports[0].endpoints[0].clone()];
    }
    nft(lab.node(), &service_rules(&wrong, Family::V4));
    cluster.services.truncate(2);
    let plan = TrafficPlan {
        streams: streams(&Path::SERVICE[..1], 20),
        ..TrafficPlan::default()
    };
    let result = send(&lab, &cluster, &plan);
    for flow in &result.flows {
        let stranger = &wrong.services[flow.service].ports[0].endpoints[0];
        let by = SocketAddr::new(stranger.address, stranger.port);
        assert_eq!(flow.outcome, Outcome::Misdelivered { by }, "{flow:?}");
    }
}

#[test]
fn a_closed_port_refuses() {
    let lab = build(false);
    // No servers at all. Few flows: the kernel limits ICMP errors to each destination.
    let cluster = plan::cluster(2, 1, false).expect("a cluster");
    let plan = TrafficPlan {
        streams: streams(&Path::FLOOR, 3),
        ..TrafficPlan::default()
    };
    let result = send(&lab, &cluster, &plan);
    assert_eq!(result.flows.len(), 9);
    let protocols: BTreeSet<Protocol> = result.flows.iter().map(|flow| flow.protocol).collect();
    assert_eq!(protocols.len(), 2);
    for flow in &result.flows {
        assert_eq!(flow.outcome, Outcome::Refused, "{flow:?}");
    }
}

#[test]
fn a_black_hole_is_a_timeout_and_a_dropped_send_of_the_node_is_its_own_error() {
    let lab = build(false);
    let cluster = plan::cluster(2, 1, false).expect("a cluster");
    let _sinks = Sinks::start(&lab, &cluster).expect("servers");
    nft(
        lab.node(),
        "table ip hole {
            chain forward { type filter hook forward priority 0 ; drop ; }
            chain output { type filter hook output priority 0 ; drop ; }
        }",
    );
    let plan = TrafficPlan {
        streams: streams(&Path::FLOOR, 10),
        patience: Duration::from_millis(100),
        ..TrafficPlan::default()
    };
    let result = send(&lab, &cluster, &plan);
    for flow in &result.flows {
        let expected = if flow.path == Path::FLOOR[1] && flow.protocol == Protocol::Udp {
            Outcome::Unsent {
                kind: std::io::ErrorKind::PermissionDenied,
                errno: Some(libc_eperm()),
            }
        } else {
            Outcome::Timeout { connected: false }
        };
        assert_eq!(flow.outcome, expected, "{flow:?}");
        if expected == (Outcome::Timeout { connected: false }) {
            assert!(flow.finished_ns - flow.sent_ns >= 100_000_000);
        }
    }
}

fn libc_eperm() -> i32 {
    nix::errno::Errno::EPERM as i32
}

#[test]
fn long_lived_flows_survive_a_flush_of_nat_rules() {
    let lab = build(false);
    let cluster = plan::cluster(10, 3, false).expect("a cluster");
    let _sinks = Sinks::start(&lab, &cluster).expect("servers");
    nft(lab.node(), &service_rules(&cluster, Family::V4));
    // Every real node has some rule that asks for conntrack's state. Without one, the flush below
    // takes the last user of conntrack away, the kernel stops tracking in this namespace, and
    // established flows lose their translation with everything else.
    nft(
        lab.node(),
        "table ip other { chain forward { type filter hook forward priority 0 ;
            ct state established accept ; } ; }",
    );
    let plan = TrafficPlan {
        streams: streams(&Path::SERVICE, 500),
        established: Some(Established {
            per_path: 6,
            every: Duration::from_millis(50),
        }),
        patience: Duration::from_millis(200),
        ..TrafficPlan::default()
    };
    let node = lab.node().clone();
    let (result, flushed_ns) = on_one_thread(async {
        let prepared = traffic::prepare(&lab, &cluster, &plan).await?;
        let origin_ns = monotonic_ns() + 1_000_000;
        let flush = async {
            tokio::time::sleep(Duration::from_millis(250)).await;
            tokio::task::spawn_blocking(move || {
                nft(&node, "flush table ip lab");
                monotonic_ns()
            })
            .await
            .expect("the flush")
        };
        let (result, flushed_ns) = tokio::join!(biased; prepared.run(origin_ns), flush);
        Ok::<_, TrafficError>((result?, flushed_ns))
    })
    .expect("traffic");
    assert_eq!(result.established.len(), 18);
    for long in &result.established {
        assert_eq!(long.lost, None, "{long:?}");
        assert!(long.requests >= 9, "{long:?}");
        assert_eq!(long.requests, long.answered, "{long:?}");
    }
    // New flows fail from the flush on, and none before it began.
    let (before, after): (Vec<&FlowRecord>, Vec<&FlowRecord>) = result
        .flows
        .iter()
        .partition(|flow| flow.finished_ns < result.origin_ns + 240_000_000);
    assert!(before.iter().all(|flow| flow.outcome.is_delivered()));
    let late: Vec<_> = after
        .iter()
        .filter(|flow| flow.sent_ns > flushed_ns)
        .collect();
    assert!(!late.is_empty());
    assert!(late.iter().all(|flow| !flow.outcome.is_delivered()));
}

#[test]
fn long_lived_flows_tell_when_they_were_lost_and_came_back() {
    let lab = build(false);
    let cluster = plan::cluster(4, 3, false).expect("a cluster");
    let _sinks = Sinks::start(&lab, &cluster).expect("servers");
    let plan = TrafficPlan {
        streams: vec![Stream {
            path: Path::FLOOR[0],
            per_second: 10.0,
            flows: 16,
            start_ns: 0,
        }],
        established: Some(Established {
            per_path: 4,
            every: Duration::from_millis(50),
        }),
        patience: Duration::from_millis(100),
        ..TrafficPlan::default()
    };
    let node = lab.node().clone();
    let result = on_one_thread(async {
        let prepared = traffic::prepare(&lab, &cluster, &plan).await?;
        let origin_ns = monotonic_ns() + 1_000_000;
        let drop_for_a_while = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            tokio::task::spawn_blocking(move || {
                nft(
                    &node,
                    "table ip hole { chain forward { type filter hook forward priority 0 ; drop ; } ; }",
                );
                std::thread::sleep(Duration::from_millis(300));
                nft(&node, "delete table ip hole");
            })
            .await
            .expect("the rules");
        };
        tokio::join!(biased; prepared.run(origin_ns), drop_for_a_while).0
    })
    .expect("traffic");
    for long in &result.established {
        let lost = long.lost.unwrap_or_else(|| panic!("{long:?}"));
        assert_eq!(lost.outcome, Outcome::Timeout { connected: true });
        let at = lost.at_ns - result.origin_ns;
        assert!((200_000_000..500_000_000).contains(&at), "{long:?}");
        assert!(
            lost.again_ns.is_some_and(|again| again > lost.at_ns),
            "{long:?}"
        );
        assert!(long.answered < long.requests);
    }
}

#[test]
fn more_than_the_laboratory_can_send_is_refused_before_anything_is_sent() {
    let lab = build(false);
    let cluster = plan::cluster(1, 1, false).expect("a cluster");
    let plan = TrafficPlan {
        streams: vec![Stream {
            path: Path::FLOOR[1],
            per_second: 10.0,
            flows: 28_001,
            start_ns: 0,
        }],
        ..TrafficPlan::default()
    };
    let error = on_one_thread(traffic::prepare(&lab, &cluster, &plan)).err();
    assert!(matches!(error, Some(TrafficError::Sources(_))), "{error:?}");
    let plan = TrafficPlan {
        streams: vec![Stream {
            path: Path::FLOOR[0],
            per_second: 1e9,
            flows: 4_000_000,
            start_ns: 0,
        }],
        ..TrafficPlan::default()
    };
    let error = on_one_thread(traffic::prepare(&lab, &cluster, &plan)).err();
    assert!(
        matches!(error, Some(TrafficError::Files { .. })),
        "{error:?}"
    );
}

#[test]
fn a_warm_up_counts_nowhere_and_says_whether_the_paths_work() {
    let lab = build(false);
    let cluster = plan::cluster(4, 3, false).expect("a cluster");
    let _sinks = Sinks::start(&lab, &cluster).expect("servers");
    let result = on_one_thread(traffic::warm_up(
        &lab,
        &cluster,
        Family::V4,
        &Path::FLOOR,
        5,
        9,
    ))
    .expect("a warm-up");
    assert_eq!(result.flows.len(), 15);
    assert_delivered(&result, &cluster);
}
