//! What a session found.

use std::collections::BTreeMap;
use std::fmt;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use tracer_ebpf::record::Stats;

use super::changes::RuleChange;
use super::directory::Directory;
use super::journey::End;
use super::tally::Tally;
use super::timeline::Timeline;
use super::verdict::{Verdict, Who};
use crate::probe::tier::RunTime;
use crate::record::run::{Clock, Histogram, PacketState};
use crate::record::times::PathTimes;
use crate::report::quantile::quantile;
use crate::report::units;

/// One `ServicePort` in a summary.
#[derive(Clone, Debug, Serialize)]
pub struct ServiceSummary {
    /// `ns/name:port`.
    pub name: String,
    /// The mode whose rules serve it.
    pub mode: &'static str,
    /// IP protocol number.
    pub protocol: u8,
    /// Endpoints that the rules name.
    pub endpoints: usize,
    /// Did the rules still name it at the end?
    pub there: bool,
    /// New flows.
    pub flows: u64,
    /// First packets that were sent once more.
    pub repeated: u64,
    /// New flows by how their first packet ended.
    pub ends: Vec<Count>,
    /// New flows by what became of them; together as many as `flows`.
    pub verdicts: Vec<VerdictCount>,
    /// Packets of established flows that were dropped.
    pub later_drops: Vec<Count>,
    /// Resets of flows that had been answered, or answered otherwise.
    pub later_resets: Vec<ResetCount>,
    /// From a flow's first packet to its first answer, both on this node, ns.
    pub answered: Histogram,
    /// First packets' time on the node, ns.
    pub node: Histogram,
}

/// How often something happened.
#[derive(Clone, Debug, Serialize)]
pub struct Count {
    /// What.
    #[serde(flatten)]
    pub end: End,
    /// How often.
    pub count: u64,
}

/// How many flows ended so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VerdictCount {
    /// How.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// How many.
    pub count: u64,
}

/// How many resets came from somebody.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ResetCount {
    /// Who.
    pub by: Who,
    /// How many.
    pub count: u64,
}

fn counts(ends: &BTreeMap<End, u64>) -> Vec<Count> {
    ends.iter()
        .map(|(end, count)| Count {
            end: end.clone(),
            count: *count,
        })
        .collect()
}

/// What was timed on one path, over all Services that were traced.
#[derive(Clone, Debug, Serialize)]
pub struct PathSummary {
    /// `pod→ClusterIP`, ...
    pub path: &'static str,
    /// Each stage, in a packet's order, by packet state.
    pub stages: Vec<crate::record::run::StageHistogram>,
    /// The whole node, by packet state.
    pub node: BTreeMap<PacketState, Histogram>,
}

/// How the probes did.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Health {
    /// Journeys that began.
    pub journeys: u64,
    /// Journeys that left by a device.
    pub transmitted: u64,
    /// Journeys that ended at a local socket.
    pub delivered_locally: u64,
    /// Journeys that the kernel dropped.
    pub dropped: u64,
    /// Journeys whose end no probe saw: under way, or waiting in a queue, such as for a neighbour's
    /// address.
    pub unfinished: u64,
    /// Records that the ring buffer could not take: flows that are missing above.
    pub ring_lost: u64,
    /// Journeys given up because two packets wanted one slot.
    pub slot_collisions: u64,
    /// Probes that found a packet at another step than expected.
    pub unpaired: u64,
    /// Packets to none of these Services, which left after one look-up.
    pub other_packets: u64,
    /// Records of packets to an endpoint itself.
    pub to_endpoints: u64,
    /// What the probes cost by the kernel's account (always wall-clock ns): runs, and their time without
    /// the way in and out of each; absent if it was not asked for.
    #[serde(flatten)]
    pub cost: Option<Cost>,
}

/// What the probes cost.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cost {
    /// How often probes ran: at every boundary that any packet passed.
    pub probe_runs: u64,
    /// How long in all, ns.
    pub probe_ns: u64,
}

impl Health {
    pub(super) fn new(stats: Stats, to_endpoints: u64, cost: Option<RunTime>) -> Self {
        Self {
            journeys: stats.journeys,
            transmitted: stats.transmitted,
            delivered_locally: stats.delivered,
            dropped: stats.dropped,
            unfinished: stats.journeys.saturating_sub(
                stats.transmitted
                    + stats.delivered
                    + stats.dropped
                    + stats.collisions
                    + stats.unpaired,
            ),
            ring_lost: stats.ring_lost,
            slot_collisions: stats.collisions,
            unpaired: stats.unpaired,
            other_packets: stats.other,
            to_endpoints,
            cost: cost.map(|cost| Cost {
                probe_runs: cost.runs,
                probe_ns: cost.ns,
            }),
        }
    }
}

/// What a session found.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The clock of every time in it.
    pub clock: Clock,
    /// How long the probes were attached, ns.
    pub duration_ns: u64,
    /// When they were (`CLOCK_MONOTONIC`, ns): the zero of all times that are told since the begin.
    pub started_ns: u64,
    /// The probe tier.
    pub tier: &'static str,
    /// Services to which there were flows, most flows first.
    pub services: Vec<ServiceSummary>,
    /// Services that were watched without a flow.
    pub silent: usize,
    /// What was timed.
    pub paths: Vec<PathSummary>,
    /// New flows over time.
    pub timeline: Timeline,
    /// Who changed rules.
    pub rule_changes: Vec<RuleChange>,
    /// How the probes did.
    pub probes: Health,
}

impl Summary {
    pub(super) fn new(
        (started_ns, ended_ns): (u64, u64),
        directory: &Directory,
        tallies: &[Tally],
        timeline: Timeline,
        paths: BTreeMap<&'static str, PathTimes>,
        rule_changes: Vec<RuleChange>,
        probes: Health,
    ) -> Self {
        let mut services: Vec<ServiceSummary> = directory
            .services()
            .iter()
            .zip(tallies)
            .filter(|(_, tally)| tally.flows + tally.repeated > 0 || !tally.later_drops.is_empty())
            .map(|(known, tally)| ServiceSummary {
                name: known.name.clone(),
                mode: known.mode,
                protocol: known.protocol,
                endpoints: known.endpoints.len(),
                there: known.there,
                flows: tally.flows,
                repeated: tally.repeated,
                ends: counts(&tally.ends),
                verdicts: tally
                    .verdicts
                    .iter()
                    .map(|(verdict, count)| VerdictCount {
                        verdict: verdict.clone(),
                        count: *count,
                    })
                    .collect(),
                later_drops: counts(&tally.later_drops),
                later_resets: tally
                    .later_resets
                    .iter()
                    .map(|(by, count)| ResetCount {
                        by: *by,
                        count: *count,
                    })
                    .collect(),
                answered: tally.answered.histogram(),
                node: tally.node.histogram(),
            })
            .collect();
        services.sort_by(|a, b| b.flows.cmp(&a.flows).then_with(|| a.name.cmp(&b.name)));
        Self {
            clock: Clock::of_this_machine(),
            duration_ns: ended_ns.saturating_sub(started_ns),
            started_ns,
            tier: "hooks",
            silent: directory.services().len() - services.len(),
            services,
            paths: paths
                .into_iter()
                .map(|(path, times)| PathSummary {
                    path,
                    stages: times.stages,
                    node: times.node,
                })
                .collect(),
            timeline,
            rule_changes,
            probes,
        }
    }
}

/// Half and the last hundredth of a histogram, as a person reads them.
fn half_and_tail(clock: Clock, histogram: &Histogram) -> String {
    match (quantile(histogram, 0.5), quantile(histogram, 0.99)) {
        (Some(half), Some(tail)) => format!(
            "{} / {}",
            units::cost_u64(clock, half),
            units::cost_u64(clock, tail)
        ),
        _ => "-".to_owned(),
    }
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.force_no_tty();
    table.set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn write_rows(f: &mut fmt::Formatter<'_>, rows: &Table) -> fmt::Result {
    for line in rows.lines() {
        writeln!(f, " {}", line.trim_end())?;
    }
    Ok(())
}

/// `3 leaked, 1 dropped at ...`; nothing for what went well.
fn troubles<T: fmt::Display>(counts: impl Iterator<Item = (T, u64)>) -> String {
    let bad: Vec<String> = counts.map(|(what, n)| format!("{n} {what}")).collect();
    bad.join(", ")
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n{} with flows, {} without, in {} ({} tier: answers are not seen; times are a packet's on this node, without the probes' own)",
            units::plural(self.services.len() as u64, "Service", "Services"),
            self.silent,
            units::time_u64(self.duration_ns),
            self.tier,
        )?;
        let mut rows = table(&[
            "Service",
            "mode",
            "endpoints",
            "new flows",
            "repeated",
            "p50 / p99",
        ]);
        for service in &self.services {
            let gone = if service.there { "" } else { " (gone)" };
            rows.add_row([
                format!("{}{gone}", service.name),
                service.mode.to_owned(),
                service.endpoints.to_string(),
                units::count(service.flows),
                units::count(service.repeated),
                half_and_tail(self.clock, &service.node),
            ]);
        }
        if !self.services.is_empty() {
            write_rows(f, &rows)?;
        }
        self.write_troubles(f)?;
        for path in &self.paths {
            let new = |stage: &&crate::record::run::StageHistogram| stage.state == PacketState::New;
            let mut rows = table(&[path.path, "new, p50 / p99", "packets"]);
            for stage in path.stages.iter().filter(new) {
                rows.add_row([
                    format!("{} {}", stage.hook, stage.stage),
                    half_and_tail(self.clock, &stage.histogram),
                    units::count(stage.histogram.count),
                ]);
            }
            if let Some(node) = path.node.get(&PacketState::New) {
                rows.add_row([
                    "whole node".to_owned(),
                    half_and_tail(self.clock, node),
                    units::count(node.count),
                ]);
            }
            writeln!(f)?;
            write_rows(f, &rows)?;
        }
        let probes = &self.probes;
        writeln!(
            f,
            "\nprobes  {} journeys: {} left by a device, {} reached a socket, {} dropped, {} unfinished; {} other packets; lost: {} records, {} collisions, {} unpaired",
            units::count(probes.journeys),
            units::count(probes.transmitted),
            units::count(probes.delivered_locally),
            units::count(probes.dropped),
            units::count(probes.unfinished),
            units::count(probes.other_packets),
            probes.ring_lost,
            probes.slot_collisions,
            probes.unpaired,
        )?;
        if let Some(cost) = probes.cost
            && cost.probe_runs > 0
        {
            writeln!(
                f,
                "cost    {} runs of probes, {:.0} ns each ({} in all), by the kernel's own account",
                units::count(cost.probe_runs),
                cost.probe_ns as f64 / cost.probe_runs as f64,
                units::time_u64(cost.probe_ns),
            )?;
        }
        Ok(())
    }
}

impl Summary {
    fn write_troubles(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for service in &self.services {
            let bad = service.verdicts.iter().filter(|c| !c.verdict.is_good());
            let new = troubles(bad.map(|c| (&c.verdict, c.count)));
            if !new.is_empty() {
                writeln!(f, "{}: of {} new flows {new}", service.name, service.flows)?;
            }
            let later = troubles(service.later_drops.iter().map(|c| (&c.end, c.count)));
            if !later.is_empty() {
                writeln!(f, "{}: of established flows {later}", service.name)?;
            }
            let verdicts = service.verdicts.iter();
            let mut advice: Vec<&str> = verdicts.filter_map(|c| c.verdict.advice()).collect();
            let drops = service.later_drops.iter();
            advice.extend(drops.filter_map(|count| count.end.advice()));
            advice.dedup();
            for advice in advice {
                writeln!(f, "  {advice}")?;
            }
        }
        Ok(())
    }
}
