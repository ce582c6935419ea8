//! The tables and lines that the terminal, Markdown and HTML share, before anyone draws them.

use super::quantile::quantile;
use super::{figures, read, units};
use crate::record::run::{Clock, Fault, FaultKind, Histogram, Ledger, PacketState, Place, Run};

/// A table of text. The first column is left-aligned, the others right.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// What it shows, with the unit.
    pub title: String,
    /// The columns' names.
    pub header: Vec<String>,
    /// The cells.
    pub rows: Vec<Vec<String>>,
}

/// How a line is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// A finding.
    Plain,
    /// For the record.
    Quiet,
    /// Something that makes other figures doubtful.
    Alarm,
}

/// One part of a summary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Block {
    /// A table.
    Table(Table),
    /// Lines that belong together.
    Lines(Vec<(Tone, String)>),
}

/// What stands where nothing was measured.
pub const MISSING: &str = "–";

/// Everything the terminal shows of a run, in order.
pub fn summary(run: &Run) -> Vec<Block> {
    let mut blocks = vec![Block::Lines(origin(run))];
    let alarms = alarms(run);
    if !alarms.is_empty() {
        blocks.push(Block::Lines(
            alarms.into_iter().map(|line| (Tone::Alarm, line)).collect(),
        ));
    }
    if let Some(path) = figures::main_path(run) {
        blocks.push(Block::Table(first_packets(run, path)));
    }
    if !run.measurements.cells.is_empty() {
        blocks.push(Block::Table(node_and_rules(run)));
    }
    let mut findings: Vec<(Tone, String)> = no_service(run)
        .map(|line| (Tone::Plain, line))
        .into_iter()
        .collect();
    findings.extend(
        run.measurements
            .faults
            .iter()
            .map(|fault| (Tone::Plain, fault_words(fault))),
    );
    if !findings.is_empty() {
        blocks.push(Block::Lines(findings));
    }
    if !run.environment.notes.is_empty() {
        blocks.push(Block::Lines(
            run.environment
                .notes
                .iter()
                .map(|note| (Tone::Quiet, format!("note: {note}")))
                .collect(),
        ));
    }
    blocks
}

/// Where the figures come from: place, clock and probes.
fn origin(run: &Run) -> Vec<(Tone, String)> {
    let place = match run.environment.place {
        Place::Host => "host",
        Place::Vm => "vm",
    };
    let measured = &run.measurements;
    let probes = measured
        .cells
        .iter()
        .map(|cell| &cell.probes)
        .chain(measured.faults.iter().map(|fault| &fault.probes));
    let (mut links, mut tracepoints, mut lost) = (0, 0, 0);
    for health in probes {
        links = links.max(health.links);
        tracepoints = tracepoints.max(health.tracepoints);
        lost += health.ring_lost;
    }
    vec![
        (
            Tone::Quiet,
            format!(
                "place   {place} · {} · {}",
                run.environment.kernel,
                figures::clock_words(measured.clock)
            ),
        ),
        (
            Tone::Quiet,
            format!(
                "probes  {} tier · {links} netfilter links, {} · {} lost",
                measured.tier,
                units::plural(tracepoints.into(), "tracepoint", "tracepoints"),
                units::plural(lost, "record", "records"),
            ),
        ),
    ]
}

/// What makes the run's figures doubtful.
pub fn alarms(run: &Run) -> Vec<String> {
    let mut alarms = Vec::new();
    for cell in &run.measurements.cells {
        for path in &cell.paths {
            let lost = path.flows.lost_count();
            if lost > 0 {
                alarms.push(format!(
                    "{} {}, {}: {} of {} flows were lost with no fault injected ({})",
                    cell.mode,
                    cell.services,
                    figures::path_title(&path.path),
                    units::count(lost),
                    units::count(path.flows.sent),
                    losses(&path.flows)
                ));
            }
        }
    }
    for fault in run
        .measurements
        .faults
        .iter()
        .filter(|fault| fault.kind == FaultKind::Control)
    {
        let lost =
            figures::new_flows(fault).lost_count() + figures::established_flows(fault).lost_count();
        if lost > 0 {
            alarms.push(format!(
                "control {}: {} lost although nothing was done: losses in the fault runs cannot be told from these",
                fault.mode,
                units::plural(lost, "flow was", "flows were")
            ));
        }
    }
    for (place, health) in probe_places(run) {
        let missed = health.unfinished
            + health.ring_lost
            + health.slot_collisions
            + health.unpaired
            + read::unaccounted(&health);
        if missed > 0 {
            alarms.push(format!(
                "{place}: the probes missed something: {} unfinished, {} ring records lost, {} slot collisions, {} unpaired of {} journeys",
                units::count(health.unfinished),
                units::count(health.ring_lost),
                units::count(health.slot_collisions),
                units::count(health.unpaired),
                units::count(health.journeys)
            ));
        }
    }
    alarms
}

fn probe_places(run: &Run) -> Vec<(String, crate::record::run::ProbeHealth)> {
    let cells = run
        .measurements
        .cells
        .iter()
        .map(|cell| (format!("{} {}", cell.mode, cell.services), cell.probes));
    let faults = run
        .measurements
        .faults
        .iter()
        .map(|fault| (figures::fault_title(fault), fault.probes));
    cells.chain(faults).collect()
}

/// `1,000 Services`.
pub fn services(n: u32) -> String {
    units::plural(n.into(), "Service", "Services")
}

/// `instructions, p50 / p99` or `p50 / p99`: time carries its own unit.
fn what(clock: Clock, figures: &str) -> String {
    match clock {
        Clock::Virtual => format!("instructions, {figures}"),
        Clock::Wall => figures.to_owned(),
    }
}

/// `3.1k / 4.0k`.
fn two(clock: Clock, histogram: Option<&Histogram>) -> String {
    let figure = |q| {
        histogram
            .and_then(|h| quantile(h, q))
            .map(|ns| units::cost_u64(clock, ns))
    };
    match (figure(0.5), figure(0.99)) {
        (Some(p50), Some(p99)) => format!("{p50} / {p99}"),
        _ => MISSING.to_owned(),
    }
}

/// `3.1k`.
fn one(clock: Clock, histogram: Option<&Histogram>) -> String {
    histogram
        .and_then(|h| quantile(h, 0.5))
        .map_or_else(|| MISSING.to_owned(), |ns| units::cost_u64(clock, ns))
}

/// What the stage that translates costs a flow's first packet, by mode and number of Services.
pub fn first_packets(run: &Run, path: &str) -> Table {
    let clock = run.measurements.clock;
    let sizes = figures::sizes(run);
    let stages =
        if figures::modes(run).contains(&crate::rules::Mode::Ipvs) && !figures::is_floor(path) {
            "dnat stage (ipvs: its own stage)"
        } else {
            "dnat stage"
        };
    let mut header = vec!["mode".to_owned()];
    header.extend(sizes.iter().map(|&size| services(size)));
    header.push("p50 per Service".to_owned());
    let rows = figures::modes(run)
        .into_iter()
        .map(|mode| {
            let pick = |cell| figures::translated(cell, path, PacketState::New);
            let mut row = vec![mode.name().to_owned()];
            row.extend(
                sizes
                    .iter()
                    .map(|&size| two(clock, figures::cell(run, mode, size).and_then(pick))),
            );
            row.push(figures::slope(run, mode, pick).map_or_else(
                || MISSING.to_owned(),
                |slope| units::slope(clock, slope.per_service),
            ));
            row
        })
        .collect();
    Table {
        title: format!(
            "First packet of a flow, {}, {stages} ({})",
            figures::path_title(path),
            what(clock, "p50 / p99")
        ),
        header,
        rows,
    }
}

/// What the whole node costs, and what the rules cost to put there.
pub fn node_and_rules(run: &Run) -> Table {
    let clock = run.measurements.clock;
    let common = figures::common_size(run);
    let path = figures::main_path(run).unwrap_or_default();
    let flushed = figures::modes(run)
        .into_iter()
        .any(|mode| figures::flush(run, mode).is_some());
    let mut header = vec!["mode".to_owned()];
    if common.is_none() {
        header.push("Services".to_owned());
    }
    header.extend(["first packet", "later, p50", "apply", "rules, all kinds"].map(str::to_owned));
    if flushed {
        header.push("flush lost, new / est.".to_owned());
    }
    let rows = figures::compared(run)
        .into_iter()
        .map(|cell| {
            let mut row = vec![cell.mode.name().to_owned()];
            if common.is_none() {
                row.push(units::count(cell.services.into()));
            }
            row.push(two(clock, figures::node(cell, path, PacketState::New)));
            row.push(one(
                clock,
                figures::node(cell, path, PacketState::Established),
            ));
            row.push(units::cost_u64(clock, cell.apply_ns));
            row.push(units::count(cell.rules.total()));
            if flushed {
                row.push(figures::flush(run, cell.mode).map_or_else(
                    || MISSING.to_owned(),
                    |fault| {
                        format!(
                            "{} / {}",
                            units::count(figures::new_flows(fault).lost_count()),
                            units::count(figures::established_flows(fault).lost_count())
                        )
                    },
                ));
            }
            row
        })
        .collect();
    Table {
        title: format!(
            "Whole node, {}{} ({})",
            figures::path_title(path),
            common.map_or_else(
                || ", each mode at its largest number of Services".to_owned(),
                |size| format!(", {}", services(size))
            ),
            what(clock, "p50 / p99")
        ),
        header,
        rows,
    }
}

/// What the rules cost traffic that goes to no Service.
fn no_service(run: &Run) -> Option<String> {
    let clock = run.measurements.clock;
    let id = "pod-to-pod";
    let pick = |cell| figures::translated(cell, id, PacketState::New);
    let prices: Vec<String> = figures::compared(run)
        .into_iter()
        .filter_map(|cell| {
            let p50 = units::cost_u64(clock, quantile(pick(cell)?, 0.5)?);
            let slope = figures::slope(run, cell.mode, pick)
                .map(|slope| format!(" ({} a Service)", units::slope(clock, slope.per_service)))
                .unwrap_or_default();
            Some(format!("{} {p50}{slope}", cell.mode))
        })
        .collect();
    if prices.is_empty() {
        return None;
    }
    let size = figures::common_size(run)
        .map(|size| format!(" at {}", services(size)))
        .unwrap_or_default();
    Some(format!(
        "No Service ({}): first packet, dnat stage, p50{size}: {}",
        figures::path_title(id),
        units::list(&prices)
    ))
}

/// `389 leaked, 3 dropped at FORWARD filter (NETFILTER_DROP)`.
pub fn losses(ledger: &Ledger) -> String {
    let losses: Vec<String> = ledger
        .lost
        .iter()
        .map(|loss| {
            let stage = loss
                .stage
                .as_ref()
                .map(|stage| format!(" at {stage}"))
                .unwrap_or_default();
            let reason = loss
                .reason
                .as_ref()
                .map(|reason| format!(" ({reason})"))
                .unwrap_or_default();
            format!(
                "{} {}{stage}{reason}",
                units::count(loss.count),
                figures::verdict_name(loss.verdict)
            )
        })
        .collect();
    losses.join(", ")
}

/// A fault in one sentence.
pub fn fault_words(fault: &Fault) -> String {
    format!(
        "{} ({}): {}",
        figures::fault_title(fault),
        fault_setting(fault),
        fault_outcome(fault)
    )
}

/// `1,000 Services, rules back after 1.99 s`.
pub fn fault_setting(fault: &Fault) -> String {
    let back = match (fault.kind, figures::rules_back_after(fault)) {
        (FaultKind::Flush, Some(ns)) => format!(", rules back after {}", units::time_u64(ns)),
        _ => String::new(),
    };
    format!("{}{back}", services(fault.services))
}

/// What was lost, how, and for how long.
pub fn fault_outcome(fault: &Fault) -> String {
    let new = figures::new_flows(fault);
    let established = figures::established_flows(fault);
    let lost = if new.lost_count() == 0 {
        format!("none of {} new flows lost", units::count(new.sent))
    } else {
        format!(
            "{} of {} new flows lost ({})",
            units::count(new.lost_count()),
            units::count(new.sent),
            losses(&new)
        )
    };
    let kept = if established.sent == 0 {
        String::new()
    } else if established.lost_count() == 0 {
        format!(", none of {} established", units::count(established.sent))
    } else {
        format!(
            ", {} of {} established ({})",
            units::count(established.lost_count()),
            units::count(established.sent),
            losses(&established)
        )
    };
    format!("{lost}{kept}{}", outage_words(fault))
}

/// `; outage 31.0 ms on host→ClusterIP, none elsewhere`.
pub fn outage_words(fault: &Fault) -> String {
    let mut hit: Vec<(String, String)> = Vec::new();
    for path in &fault.paths {
        if let Some((ns, ended)) = figures::outage_total(fault, path) {
            let mut length = units::time_u64(ns);
            if path.outages.len() > 1 {
                length = format!("{length} in {} parts", path.outages.len());
            }
            if !ended {
                length += ", not over at the end";
            }
            hit.push((figures::path_title(&path.path), length));
        }
    }
    let Some((_, first)) = hit.first() else {
        return "; no outage".to_owned();
    };
    let first = first.clone();
    if hit.len() == fault.paths.len()
        && hit.len() > 1
        && hit.iter().all(|(_, length)| *length == first)
    {
        return format!("; outage {first} on every path");
    }
    let words: Vec<String> = hit
        .iter()
        .map(|(path, length)| format!("{length} on {path}"))
        .collect();
    let elsewhere = if hit.len() < fault.paths.len() {
        ", none elsewhere"
    } else {
        ""
    };
    format!("; outage {}{elsewhere}", words.join(", "))
}
