//! One cell: what one mode costs at one size.

use std::collections::BTreeMap;

use tracer_ebpf::path::Path;

use super::job::Progress;
use super::matrix::{ENDPOINTS, Job, Load};
use super::node::{DRAIN_EVERY, LEAD_NS, NodeError, TestNode, sent};
use crate::kernel::clock::monotonic_ns;
use crate::lab::latency::{Answer, Latency};
use crate::lab::traffic::{self, Stream, TrafficPlan, TrafficResult};
use crate::probe::catalogue::Detail;
use crate::record::flows::{self, Sent};
use crate::record::run::{Cell, Histogram, PathResult};
use crate::record::times;
use crate::rules::Mode;

/// New flows a second on each of the six paths: far below what one CPU can carry in any mode, so
/// that stages are timed and not queues.
const PER_SECOND: f64 = 50.0;

/// Runs the cell.
pub(super) async fn run(job: Job, load: &Load, progress: &Progress<'_>) -> Result<Cell, NodeError> {
    progress(0.0, "building the node");
    let node = TestNode::build(job.services, ENDPOINTS)?;
    progress(0.05, "applying rules");
    let applied = node.apply(job.mode).await?;
    progress(0.4, "warming up");
    node.warm_up(load.seed).await?;
    let plan = plan(load);
    if job.mode == Mode::Ipvs {
        // Only IPVS remembers a route for each endpoint of each virtual server: without this the
        // first visits would be measured, and more of them the more Services there are.
        node.rehearse(&plan).await?;
    }
    progress(0.45, "attaching probes");
    let mut watched = node.watch()?;
    progress(0.5, "traffic");
    let prepared = traffic::prepare(&node.lab, &node.cluster, &plan).await?;
    let origin = monotonic_ns() + LEAD_NS;
    let result = {
        let traffic = prepared.run(origin);
        tokio::pin!(traffic);
        loop {
            tokio::select! {
                biased;
                result = &mut traffic => break result?,
                () = tokio::time::sleep(DRAIN_EVERY) => watched.drain()?,
            }
        }
    };
    watched.settle().await?;
    progress(0.95, "reading the probes");
    let times = watched.times()?;
    let sent: Vec<Sent> = result.flows.iter().map(|flow| sent(flow, origin)).collect();
    let paths = Path::SERVICE
        .into_iter()
        .chain(Path::FLOOR)
        .map(|path| {
            let found = times::of_path(&times, path, Detail::Stages);
            PathResult {
                path: path.id().to_owned(),
                flows: flows::ledger(
                    sent.iter().filter(|flow| flow.path == path),
                    &watched.evidence,
                ),
                client: client(&result, path),
                stages: found.stages,
                node: found.node,
            }
        })
        .collect();
    Ok(Cell {
        mode: job.mode,
        services: job.services,
        endpoints_per_service: ENDPOINTS,
        rules: applied.counts,
        apply_ns: applied.took_ns,
        paths,
        probes: watched.health()?,
    })
}

fn plan(load: &Load) -> TrafficPlan {
    let paths = Path::SERVICE.into_iter().chain(Path::FLOOR);
    let period = 1e9 / PER_SECOND;
    TrafficPlan {
        streams: paths
            .enumerate()
            // Side by side, not all at once: each stream starts a sixth of a period later.
            .map(|(i, path)| Stream {
                path,
                per_second: PER_SECOND,
                flows: load.flows_per_path,
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a fraction of a period, which is a few milliseconds"
                )]
                start_ns: (period * i as f64 / 6.0) as u64,
            })
            .collect(),
        seed: load.seed,
        ..TrafficPlan::default()
    }
}

fn client(result: &TrafficResult, path: Path) -> BTreeMap<String, Histogram> {
    [Answer::Connect, Answer::Only, Answer::First, Answer::Later]
        .into_iter()
        .filter_map(|answer| {
            let latency = result.latency.get(&(path, answer))?;
            Some((answer.name().to_owned(), histogram(latency)))
        })
        .collect()
}

fn histogram(latency: &Latency) -> Histogram {
    Histogram {
        count: latency.count(),
        sum_ns: latency.sum_ns(),
        buckets: latency.buckets(),
    }
}
