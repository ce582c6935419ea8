//! Control, flush and switch runs: what a rule change breaks, while traffic runs.

use std::time::Duration;

use tracer_ebpf::path::Path;

use super::job::Progress;
use super::matrix::{ENDPOINTS, Job, Load};
use super::node::{DRAIN_EVERY, LEAD_NS, NodeError, TestNode, seen, sent};
use crate::kernel::apply::{self, ApplyError};
use crate::kernel::clock::monotonic_ns;
use crate::lab::traffic::{self, Established, Stream, TrafficPlan, TrafficResult};
use crate::record::evidence::Evidence;
use crate::record::flows::{self, Seen, Sent};
use crate::record::run::{Fault, FaultKind, FaultPath, Ledger, RuleChange};
use crate::rules::Mode;

/// Long-lived flows on each path.
const ESTABLISHED: u32 = 20;
/// Each of them asks this often.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// Traffic before the first change.
const BEFORE: Duration = Duration::from_secs(1);
/// From the flush to the start of putting the rules back; also how long a switch lasts.
const GAP: Duration = Duration::from_secs(2);
/// Traffic after the last change.
const AFTER: Duration = Duration::from_secs(2);
/// Width of a bin of the series.
const BIN: Duration = Duration::from_millis(50);

/// What happens to the rules; times from the start of the traffic.
#[derive(Clone, Copy)]
enum Action {
    /// Nothing.
    None,
    /// Flushed after [`BEFORE`], put back [`GAP`] later.
    Flush,
    /// Cleaned up and replaced by another mode's after [`BEFORE`]; the same back, [`GAP`] later.
    Switch(Mode),
}

/// A control run and a flush run, on one node.
pub(super) async fn flush(
    job: Job,
    load: &Load,
    progress: &Progress<'_>,
) -> Result<Vec<Fault>, NodeError> {
    let (node, took) = build(job, load, progress).await?;
    progress(0.35, "control");
    let control = one(&node, job, load, Action::None, BEFORE + AFTER).await?;
    progress(0.55, "flush");
    // Putting the rules back beside traffic takes longer than it did without.
    let duration = BEFORE + GAP + took * 2 + AFTER;
    let flush = one(&node, job, load, Action::Flush, duration).await?;
    Ok(vec![control, flush])
}

/// A switch to another mode, and back.
pub(super) async fn switch(
    job: Job,
    to: Mode,
    load: &Load,
    progress: &Progress<'_>,
) -> Result<Fault, NodeError> {
    let (node, took) = build(job, load, progress).await?;
    progress(0.25, "how long the other mode takes");
    let other = TestNode::build(job.services, ENDPOINTS)?.apply(to).await?;
    progress(0.4, "switch");
    let duration = BEFORE + GAP + (took + Duration::from_nanos(other.took_ns)) * 3 + AFTER;
    one(&node, job, load, Action::Switch(to), duration).await
}

/// A node with the job's rules; how long they took.
async fn build(
    job: Job,
    load: &Load,
    progress: &Progress<'_>,
) -> Result<(TestNode, Duration), NodeError> {
    progress(0.0, "building the node");
    let node = TestNode::build(job.services, ENDPOINTS)?;
    progress(0.05, "applying rules");
    let applied = node.apply(job.mode).await?;
    progress(0.3, "warming up");
    node.warm_up(load.seed).await?;
    Ok((node, Duration::from_nanos(applied.took_ns)))
}

/// Traffic for `duration`, and the action beside it.
async fn one(
    node: &TestNode,
    job: Job,
    load: &Load,
    action: Action,
    duration: Duration,
) -> Result<Fault, NodeError> {
    let mut watched = node.watch()?;
    let plan = plan(load, duration);
    let prepared = traffic::prepare(&node.lab, &node.cluster, &plan).await?;
    let origin = monotonic_ns() + LEAD_NS;
    let (result, changes) = {
        let both =
            async { tokio::join!(prepared.run(origin), change(node, job.mode, action, origin)) };
        tokio::pin!(both);
        loop {
            tokio::select! {
                biased;
                (result, changes) = &mut both => break (result?, changes?),
                () = tokio::time::sleep(DRAIN_EVERY) => watched.drain()?,
            }
        }
    };
    watched.settle().await?;
    let sent: Vec<Sent> = result.flows.iter().map(|flow| sent(flow, origin)).collect();
    let (duration_ns, bin_ns) = (nanos(duration), nanos(BIN));
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
    let (kind, to) = match action {
        Action::None => (FaultKind::Control, None),
        Action::Flush => (FaultKind::Flush, None),
        Action::Switch(to) => (FaultKind::Switch, Some(to)),
    };
    Ok(Fault {
        kind,
        mode: job.mode,
        to,
        services: job.services,
        duration_ns,
        bin_ns,
        patience_ns: nanos(plan.patience),
        changes,
        paths,
        probes: watched.health()?,
    })
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "seconds times a small rate"
)]
fn plan(load: &Load, duration: Duration) -> TrafficPlan {
    let per_second = f64::from(load.fault_rate);
    let flows = (duration.as_secs_f64() * per_second) as u32;
    let period = 1e9 / per_second;
    TrafficPlan {
        streams: Path::SERVICE
            .into_iter()
            .enumerate()
            // Side by side, not all at once.
            .map(|(i, path)| Stream {
                path,
                per_second,
                flows,
                start_ns: (period * i as f64 / Path::SERVICE.len() as f64) as u64,
            })
            .collect(),
        established: Some(Established {
            per_path: ESTABLISHED,
            every: ASK_EVERY,
        }),
        seed: load.seed,
        ..TrafficPlan::default()
    }
}

/// Flows that stood before the fault; one that missed an answer counts as lost.
fn established(result: &TrafficResult, path: Path, evidence: &Evidence) -> Ledger {
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
                .map_or(Seen::Delivered, |lost| seen(&lost.outcome)),
        })
        .collect();
    flows::ledger(&flows, evidence)
}

/// What happens to the rules, and when.
async fn change(
    node: &TestNode,
    mode: Mode,
    action: Action,
    origin: u64,
) -> Result<Vec<RuleChange>, NodeError> {
    let changer = Changer { node, origin };
    let mut changes = Vec::new();
    match action {
        Action::None => {}
        Action::Flush => {
            changer.until(BEFORE).await;
            changes.push(changer.flush(mode).await?);
            changer.until(BEFORE + GAP).await;
            changes.push(changer.sync(mode).await?);
        }
        Action::Switch(to) => {
            changer.until(BEFORE).await;
            changes.push(changer.clean_up(mode).await?);
            changes.push(changer.sync(to).await?);
            tokio::time::sleep(GAP).await;
            changes.push(changer.clean_up(to).await?);
            changes.push(changer.sync(mode).await?);
        }
    }
    Ok(changes)
}

/// Changes a node's rules beside the traffic, and says when and from how many to how many.
struct Changer<'a> {
    node: &'a TestNode,
    origin: u64,
}

impl Changer<'_> {
    async fn until(&self, after: Duration) {
        let due = self.origin + nanos(after);
        tokio::time::sleep(Duration::from_nanos(due.saturating_sub(monotonic_ns()))).await;
    }

    /// What an operator's flush does.
    async fn flush(&self, mode: Mode) -> Result<RuleChange, NodeError> {
        let netns = self.node.lab.node().clone();
        self.timed(mode, move || Ok(apply::flush(&netns, mode)?.join("; ")))
            .await
    }

    /// What kube-proxy's next full sync does.
    async fn sync(&self, mode: Mode) -> Result<RuleChange, NodeError> {
        let netns = self.node.lab.node().clone();
        let rules = self.node.rules(mode);
        self.timed(mode, move || {
            apply::apply(&netns, &rules)?;
            Ok(format!("full sync of {mode}"))
        })
        .await
    }

    /// What `kube-proxy --cleanup` does.
    async fn clean_up(&self, mode: Mode) -> Result<RuleChange, NodeError> {
        let netns = self.node.lab.node().clone();
        self.timed(mode, move || {
            apply::remove(&netns, mode)?;
            Ok(format!("clean-up of {mode}"))
        })
        .await
    }

    async fn timed(
        &self,
        mode: Mode,
        work: impl FnOnce() -> Result<String, ApplyError> + Send + 'static,
    ) -> Result<RuleChange, NodeError> {
        let netns = self.node.lab.node().clone();
        let origin = self.origin;
        Ok(tokio::task::spawn_blocking(move || {
            let before = apply::count(&netns, mode)?.total();
            let start_ns = monotonic_ns().saturating_sub(origin);
            let what = work()?;
            let end_ns = monotonic_ns().saturating_sub(origin);
            let after = apply::count(&netns, mode)?.total();
            Ok::<_, ApplyError>(RuleChange {
                start_ns,
                end_ns,
                what,
                before,
                after,
            })
        })
        .await??)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
