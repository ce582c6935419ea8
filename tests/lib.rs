//! End-to-end checks that any kernel must pass, in whatever place they run: `host.rs` calls them on
//! this machine, `vm.rs` in a virtual machine with every mode.

pub mod agreement;
pub mod answers;
pub mod changes;
pub mod faces;
pub mod identity;
pub mod met;
pub mod oracle;
pub mod rules;
pub mod safety;
mod sctp;
pub mod tiers;
pub mod trace;
pub mod truth;
pub mod verdicts;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use tracer::cluster::Family;
use tracer::kernel::tool;
use tracer::lab::traffic::{self, Stream, TrafficPlan};
use tracer::record::run::{Cell, Fault, FaultKind, PacketState, Verdict};
use tracer::rules::Mode;
use tracer::scenario::job::{self, Part};
use tracer::scenario::matrix::{Job, JobKind, Load};
use tracer::scenario::node::{TestNode, sent};
use tracer_ebpf::path::{Origin, Path, Target};

/// Runs a future as `svcpath` does: one thread, one runtime.
pub fn on_one_thread<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, future)
}

fn run(job: Job, flows_per_path: u32) -> Part {
    let load = Load {
        flows_per_path,
        ..Load::standard(true, 7)
    };
    on_one_thread(job::run(job, &load, &|_, _| {}))
        .unwrap_or_else(|error| panic!("{}: {error}", job.id()))
}

/// A small cell of the comparison.
pub fn cell(mode: Mode, services: u32, flows: u32) -> Cell {
    let kind = JobKind::Cell;
    let job = Job {
        kind,
        mode,
        services,
    };
    match run(job, flows) {
        Part::Cell(cell) => *cell,
        Part::Faults(_) => panic!("a cell was asked for"),
    }
}

/// Every flow delivered, every first packet seen once at every stage, nothing missed, and the
/// stages of each packet state sum to the time on the node.
pub fn a_cell_accounts_for_everything(mode: Mode) {
    const FLOWS: u32 = 60;
    let cell = cell(mode, 30, FLOWS);
    assert!(cell.apply_ns > 0);
    assert!(cell.rules.total() > 30, "{:?}", cell.rules);
    let probes = cell.probes;
    assert_eq!(
        (
            probes.ring_lost,
            probes.unpaired,
            probes.unfinished,
            probes.dropped
        ),
        (0, 0, 0, 0),
        "{probes:?}"
    );
    assert_eq!(cell.paths.len(), 6);
    for path in &cell.paths {
        let name = format!("{mode} {}", path.path);
        assert!(path.flows.is_balanced(), "{name}: {:?}", path.flows);
        assert_eq!(path.flows.sent, u64::from(FLOWS), "{name}");
        assert_eq!(
            path.flows.delivered, path.flows.sent,
            "{name}: {:?}",
            path.flows
        );
        for state in [
            PacketState::New,
            PacketState::Established,
            PacketState::Reply,
        ] {
            let node = path
                .node
                .get(&state)
                .unwrap_or_else(|| panic!("{name}: no {state:?}"));
            let stages: Vec<_> = path.stages.iter().filter(|s| s.state == state).collect();
            let sum: u64 = stages.iter().map(|s| s.histogram.sum_ns).sum();
            assert_eq!(
                sum, node.sum_ns,
                "{name}: stages of {state:?} sum to the whole"
            );
        }
        assert_eq!(
            path.node[&PacketState::New].count,
            u64::from(FLOWS),
            "{name}"
        );
        assert!(!path.client.is_empty(), "{name}");
    }
}

/// Nothing is lost while nothing happens; a flush loses new flows on every path and says how; flows
/// that stood before survive (in IPVS mode they do not: its table is what was flushed).
pub fn a_flush_loses_new_flows_and_a_control_run_none(mode: Mode) {
    let kind = JobKind::Flush;
    let services = 30;
    let job = Job {
        kind,
        mode,
        services,
    };
    let Part::Faults(faults) = run(job, 60) else {
        panic!("faults were asked for");
    };
    let find = |kind| -> &Fault { faults.iter().find(|f| f.kind == kind).expect("it was run") };
    for path in &find(FaultKind::Control).paths {
        assert_eq!(
            path.new.delivered, path.new.sent,
            "{mode} control: {path:?}"
        );
        assert_eq!(
            path.established.delivered, path.established.sent,
            "{mode}: {path:?}"
        );
        assert!(path.outages.is_empty());
    }
    let flush = find(FaultKind::Flush);
    assert_eq!(flush.changes.len(), 2, "{:?}", flush.changes);
    assert!(flush.changes[0].after < flush.changes[0].before);
    assert_eq!(flush.changes[1].after, flush.changes[0].before);
    for path in &flush.paths {
        assert!(path.new.is_balanced() && path.established.is_balanced());
        assert!(
            path.new.lost_count() > 0,
            "{mode} {}: {:?}",
            path.path,
            path.new
        );
        assert!(
            path.new.delivered > 0,
            "{mode} {}: {:?}",
            path.path,
            path.new
        );
        assert!(!path.outages.is_empty());
        let outage = path.outages[0];
        assert!(outage.start_ns >= flush.changes[0].start_ns, "{outage:?}");
        assert!(outage.end_ns.is_some(), "{mode} {}: it ends", path.path);
        if mode != Mode::Ipvs {
            assert_eq!(
                path.established.delivered, path.established.sent,
                "{mode} {}: {:?}",
                path.path, path.established
            );
            let leaks = path.path.ends_with("clusterip");
            let leaked = path.new.lost.iter().any(|l| l.verdict == Verdict::Leaked);
            assert_eq!(leaked, leaks, "{mode} {}: {:?}", path.path, path.new);
        }
    }
}

/// Drops that the probes count are the drops that the kernel counts, and each lost flow is told
/// where it ended.
pub fn drops_equal_the_kernels_own_counter() {
    const FLOWS: u32 = 100;
    let path = Path {
        origin: Origin::External,
        target: Target::Pod,
    };
    on_one_thread(async {
        let node = TestNode::build(10, 3).expect("a node");
        let netns = node.lab.node();
        tool::run(
            netns,
            "nft",
            &["-f", "-"],
            "table ip test {\n counter dropped { }\n chain c {\n type filter hook forward priority 10;\n \
             iifname ext0 ct state new counter name dropped drop\n }\n }\n",
        )
        .expect("the rule goes in");
        let mut watched = node.watch().expect("probes attach");
        let plan = TrafficPlan {
            streams: vec![Stream {
                path,
                per_second: 200.0,
                flows: FLOWS,
                start_ns: 0,
            }],
            patience: std::time::Duration::from_millis(300),
            ..TrafficPlan::default()
        };
        let prepared = traffic::prepare(&node.lab, &node.cluster, &plan)
            .await
            .expect("prepares");
        let origin = tracer::kernel::clock::monotonic_ns() + 10_000_000;
        let result = prepared.run(origin).await.expect("sends");
        watched.settle().await.expect("settles");
        let counter = tool::run(
            netns,
            "nft",
            &["list", "counter", "ip", "test", "dropped"],
            "",
        )
        .expect("lists");
        let packets: u64 = counter
            .split_once("packets ")
            .and_then(|(_, rest)| rest.split_whitespace().next())
            .and_then(|n| n.parse().ok())
            .expect("a counter");
        let health = watched.health().expect("nothing was lost");
        assert_eq!(health.dropped, packets);
        assert_eq!(packets, u64::from(FLOWS));
        for flow in &result.flows {
            let (verdict, reason, stage) =
                tracer::record::flows::judge(&sent(flow, origin), &watched.evidence).expect("lost");
            assert_eq!(verdict, Verdict::Dropped);
            assert_eq!(reason.as_deref(), Some("NETFILTER_DROP"));
            assert_eq!(stage.as_deref(), Some("FORWARD filter"));
        }
    });
}

/// Every Service is reachable by every path, and every endpoint answers.
pub fn every_service_and_endpoint_answers(mode: Mode) {
    const SERVICES: u32 = 12;
    on_one_thread(async {
        let node = TestNode::build(SERVICES, 3).expect("a node");
        node.apply(mode)
            .await
            .unwrap_or_else(|e| panic!("{mode}: {e}"));
        let plan = TrafficPlan {
            streams: Path::SERVICE
                .into_iter()
                .enumerate()
                .map(|(i, path)| Stream {
                    path,
                    per_second: 400.0,
                    flows: 400,
                    start_ns: i as u64 * 800_000,
                })
                .collect(),
            seed: 3,
            family: Family::V4,
            ..TrafficPlan::default()
        };
        let prepared = traffic::prepare(&node.lab, &node.cluster, &plan)
            .await
            .expect("prepares");
        let origin = tracer::kernel::clock::monotonic_ns() + 10_000_000;
        let result = prepared.run(origin).await.expect("sends");
        let mut answered: BTreeMap<(usize, SocketAddr), u32> = BTreeMap::new();
        let mut reached: BTreeMap<(Path4, usize), u32> = BTreeMap::new();
        for flow in &result.flows {
            match flow.outcome {
                tracer::lab::Outcome::Delivered { by } => {
                    *answered.entry((flow.service, by)).or_default() += 1;
                    *reached
                        .entry((flow.path.index(), flow.service))
                        .or_default() += 1;
                }
                other => panic!("{mode} {}: {other}", flow.path.title()),
            }
        }
        assert_eq!(
            answered.len(),
            SERVICES as usize * 3,
            "{mode}: every endpoint answers"
        );
        assert_eq!(
            reached.len(),
            SERVICES as usize * 3,
            "{mode}: every Service by every path"
        );
    });
}

/// A path's index, to sort by.
type Path4 = usize;
