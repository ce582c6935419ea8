//! Control, flush and switch runs: what a rule change breaks, while traffic runs.

use std::time::Duration;

use tracer_ebpf::path::Path;

use super::job::Progress;
use super::matrix::{ENDPOINTS, Job, JobKind, Matrix};
use super::node::{DRAIN_EVERY, LEAD_NS, NodeError, TestNode, seen, sent};
use crate::kernel::apply;
use crate::kernel::clock::monotonic_ns;
use crate::lab::traffic::{self, Established, Stream, TrafficPlan, TrafficResult};
use crate::record::evidence::Evidence;
use crate::record::flows::{self, Sent};
use crate::record::run::{Fault, FaultKind, FaultPath, RuleChange};
use crate::rules::Mode;

/// New flows a second on each of the three Service paths.
const PER_SECOND: f64 = 100.0;
/// Long-lived flows on each path.
const ESTABLISHED: u32 = 20;
/// Each of them asks this often.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// Traffic before the first change.
const BEFORE: Duration = Duration::from_secs(1);
/// From the flush to the start of putting the rules back.
const GAP: Duration = Duration::from_secs(2);
/// Traffic after the last change.
const AFTER: Duration = Duration::from_secs(2);
/// Width of a bin of the series.
const BIN: Duration = Duration::from_millis(50);

/// Runs the fault.
pub(super) async fn run(
    job: Job,
    matrix: &Matrix,
    progress: &Progress<'_>,
) -> Result<Fault, NodeError> {
    progress(0.0, "building the node");
    let node = TestNode::build(job.services, ENDPOINTS)?;
    progress(0.05, "applying rules");
    let took = Duration::from_nanos(node.apply(job.mode).await?.took_ns);
    let changing = match job.kind {
        JobKind::Cell | JobKind::Control => GAP,
        JobKind::Flush => GAP + took * 2,
        JobKind::Switch(to) => {
            // How long the other mode takes is found out on a node of its own.
            let other = TestNode::build(job.services, ENDPOINTS)?.apply(to).await?;
            GAP + (took + Duration::from_nanos(other.took_ns)) * 3
        }
    };
    let duration = BEFORE + changing + AFTER;
    progress(0.3, "warming up");
    node.warm_up(matrix.seed).await?;
    let mut watched = node.watch()?;
    progress(0.35, "traffic");

    let plan = plan(matrix, duration);
    let patience = plan.patience;
    let prepared = traffic::prepare(&node.lab, &node.cluster, &plan).await?;
    let origin = monotonic_ns() + LEAD_NS;
    let (result, changes) = {
        let traffic = prepared.run(origin);
        let changes = change(&node, job, origin);
        tokio::pin!(traffic, changes);
        let mut result = None;
        let mut made = None;
        while result.is_none() || made.is_none() {
            tokio::select! {
                biased;
                done = &mut changes, if made.is_none() => made = Some(done?),
                done = &mut traffic, if result.is_none() => result = Some(done?),
                () = tokio::time::sleep(DRAIN_EVERY) => watched.drain()?,
            }
        }
        match (result, made) {
            (Some(result), Some(made)) => (result, made),
            _ => unreachable!("the loop ends when both are done"),
        }
    };
    watched.settle().await?;
    let sent: Vec<Sent> = result.flows.iter().map(|flow| sent(flow, origin)).collect();
    let duration_ns = duration.as_nanos() as u64;
    let bin_ns = BIN.as_nanos() as u64;
    let paths = Path::SERVICE
        .into_iter()
        .map(|path| {
            let new: Vec<Sent> = sent.iter().filter(|f| f.path == path).cloned().collect();
            FaultPath {
                path: path.id().to_owned(),
                new: flows::ledger(&new, &watched.evidence),
                established: established(&result, path, &watched.evidence),
                outages: flows::outages(&new),
                series: flows::series(&new, duration_ns, bin_ns),
            }
        })
        .collect();
    Ok(Fault {
        kind: job.kind.fault().unwrap_or(FaultKind::Control),
        mode: job.mode,
        to: match job.kind {
            JobKind::Switch(to) => Some(to),
            _ => None,
        },
        services: job.services,
        duration_ns,
        bin_ns,
        patience_ns: patience.as_nanos() as u64,
        changes,
        paths,
        probes: watched.health()?,
    })
}

fn plan(matrix: &Matrix, duration: Duration) -> TrafficPlan {
    let flows = (duration.as_secs_f64() * PER_SECOND) as u32;
    let period = 1e9 / PER_SECOND;
    TrafficPlan {
        streams: Path::SERVICE
            .into_iter()
            .enumerate()
            .map(|(i, path)| Stream {
                path,
                per_second: PER_SECOND,
                flows,
                start_ns: (period * i as f64 / 3.0) as u64,
            })
            .collect(),
        established: Some(Established {
            per_path: ESTABLISHED,
            every: ASK_EVERY,
        }),
        seed: matrix.seed,
        ..TrafficPlan::default()
    }
}

/// Flows that stood before the fault; one that missed an answer counts as lost.
fn established(
    result: &TrafficResult,
    path: Path,
    evidence: &Evidence,
) -> crate::record::run::Ledger {
    let flows: Vec<Sent> = result
        .established
        .iter()
        .filter(|flow| flow.path == path)
        .map(|flow| Sent {
            path: flow.path,
            protocol: flow.protocol.number(),
            source: flow.source,
            destination: flow.destination,
            intended_ns: 0,
            seen: flow
                .lost
                .as_ref()
                .map_or(crate::record::flows::Seen::Delivered, |lost| {
                    seen(&lost.outcome)
                }),
        })
        .collect();
    flows::ledger(&flows, evidence)
}

/// What happens to the rules, and when.
async fn change(node: &TestNode, job: Job, origin: u64) -> Result<Vec<RuleChange>, NodeError> {
    let mut changes = Vec::new();
    match job.kind {
        JobKind::Cell | JobKind::Control => {}
        JobKind::Flush => {
            until(origin, BEFORE).await;
            changes.push(flush(node, job.mode, origin).await?);
            until(origin, BEFORE + GAP).await;
            changes.push(put_in(node, job.mode, origin).await?);
        }
        JobKind::Switch(to) => {
            until(origin, BEFORE).await;
            changes.push(remove(node, job.mode, origin).await?);
            changes.push(put_in(node, to, origin).await?);
            let back = monotonic_ns() - origin + GAP.as_nanos() as u64;
            until(origin, Duration::from_nanos(back)).await;
            changes.push(remove(node, to, origin).await?);
            changes.push(put_in(node, job.mode, origin).await?);
        }
    }
    Ok(changes)
}

async fn until(origin: u64, after: Duration) {
    let due = origin + after.as_nanos() as u64;
    let now = monotonic_ns();
    tokio::time::sleep(Duration::from_nanos(due.saturating_sub(now))).await;
}

/// Runs a change beside the traffic and times it; the kernel is counted before and after.
async fn timed<T: Send + 'static>(
    node: &TestNode,
    mode: Mode,
    origin: u64,
    work: impl FnOnce() -> Result<T, apply::ApplyError> + Send + 'static,
    name: impl FnOnce(T) -> String,
) -> Result<RuleChange, NodeError> {
    let netns = node.lab.node().clone();
    let (before, start, done, end, after) = tokio::task::spawn_blocking(move || {
        let before = apply::count(&netns, mode)?.total();
        let start = monotonic_ns();
        let done = work()?;
        let end = monotonic_ns();
        let after = apply::count(&netns, mode)?.total();
        Ok::<_, apply::ApplyError>((before, start, done, end, after))
    })
    .await??;
    Ok(RuleChange {
        start_ns: start.saturating_sub(origin),
        end_ns: end.saturating_sub(origin),
        what: name(done),
        before,
        after,
    })
}

async fn flush(node: &TestNode, mode: Mode, origin: u64) -> Result<RuleChange, NodeError> {
    let netns = node.lab.node().clone();
    timed(
        node,
        mode,
        origin,
        move || apply::flush(&netns, mode),
        |commands| commands.join("; "),
    )
    .await
}

async fn put_in(node: &TestNode, mode: Mode, origin: u64) -> Result<RuleChange, NodeError> {
    let netns = node.lab.node().clone();
    let rules = node.rules(mode);
    timed(
        node,
        mode,
        origin,
        move || apply::apply(&netns, &rules),
        |()| format!("full sync of {mode}"),
    )
    .await
}

async fn remove(node: &TestNode, mode: Mode, origin: u64) -> Result<RuleChange, NodeError> {
    let netns = node.lab.node().clone();
    timed(
        node,
        mode,
        origin,
        move || apply::remove(&netns, mode),
        |()| format!("clean-up of {mode}"),
    )
    .await
}
