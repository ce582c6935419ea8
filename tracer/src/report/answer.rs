//! The answer in three sentences, from the figures and from nothing else.

use super::blocks::services;
use super::quantile::quantile;
use super::{figures, units};
use crate::record::run::{Cell, Clock, Fault, FaultKind, PacketState, Run};
use crate::rules::Mode;

/// At most three sentences: what first packets pay, what later packets pay, what faults cost.
/// A sentence for which nothing was measured is left out.
pub fn sentences(run: &Run) -> Vec<String> {
    [
        first_packets(run),
        later_packets(run),
        faults(run).or_else(|| apply(run)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn unit(clock: Clock) -> &'static str {
    match clock {
        Clock::Virtual => " instructions",
        Clock::Wall => "",
    }
}

fn at_size(run: &Run) -> String {
    figures::common_size(run).map_or_else(
        || "At each mode's largest number of Services".to_owned(),
        |size| format!("At {}", services(size)),
    )
}

fn first_packets(run: &Run) -> Option<String> {
    let clock = run.measurements.clock;
    let path = figures::main_path(run)?;
    let pick = |cell| figures::translated(cell, path, PacketState::New);
    let mut costs: Vec<String> = Vec::new();
    for cell in figures::compared(run) {
        if let Some(p50) = pick(cell).and_then(|histogram| quantile(histogram, 0.5)) {
            // The unit once, with the first figure.
            let unit = if costs.is_empty() { unit(clock) } else { "" };
            costs.push(format!(
                "{}{unit} in {}",
                units::cost_u64(clock, p50),
                cell.mode
            ));
        }
    }
    if costs.is_empty() {
        return None;
    }
    let slopes: Vec<(Mode, figures::Slope)> = figures::modes(run)
        .into_iter()
        .filter_map(|mode| Some((mode, figures::slope(run, mode, pick)?)))
        .collect();
    let growing: Vec<String> = slopes
        .iter()
        .filter(|(_, slope)| !slope.is_flat())
        .map(|(mode, slope)| {
            let price = units::slope(clock, slope.per_service);
            format!("{} in {mode}", price.strip_prefix('+').unwrap_or(&price))
        })
        .collect();
    let flat: Vec<String> = slopes
        .iter()
        .filter(|(_, slope)| slope.is_flat())
        .map(|(mode, _)| mode.name().to_owned())
        .collect();
    let growth = match (growing.as_slice(), flat.as_slice()) {
        ([], []) => String::new(),
        ([], _) => format!(
            "; the number of Services adds nothing that the histograms can tell apart in {}",
            units::list(&flat)
        ),
        (_, []) => format!("; each further Service adds {}", units::list(&growing)),
        (_, _) => format!(
            "; each further Service adds {}, and nothing that the histograms can tell apart in {}",
            units::list(&growing),
            units::list(&flat)
        ),
    };
    Some(format!(
        "{}, the stage that translates a flow’s first packet ({}) takes a median of {}{growth}.",
        at_size(run),
        figures::path_title(path),
        units::list(&costs),
    ))
}

fn later_packets(run: &Run) -> Option<String> {
    let clock = run.measurements.clock;
    let path = figures::main_path(run)?;
    let p50 = |cell: &Cell| quantile(figures::node(cell, path, PacketState::Established)?, 0.5);
    // Modes whose figures read the same stand together.
    let mut groups: Vec<(String, Vec<String>)> = Vec::new();
    for cell in figures::compared(run) {
        let Some(ns) = p50(cell) else { continue };
        let written = units::cost_u64(clock, ns);
        let name = cell.mode.name().to_owned();
        match groups.iter_mut().find(|(known, _)| *known == written) {
            Some((_, modes)) => modes.push(name),
            None => groups.push((written, vec![name])),
        }
    }
    if groups.is_empty() {
        return None;
    }
    let costs: Vec<String> = groups
        .iter()
        .enumerate()
        .map(|(i, (written, modes))| {
            let unit = if i == 0 { unit(clock) } else { "" };
            format!("{written}{unit} in {}", units::list(modes))
        })
        .collect();
    let costs = costs.join("; ");
    // How far apart a mode's medians at different numbers of Services lie, at most.
    let moves = figures::modes(run)
        .into_iter()
        .filter_map(|mode| {
            let medians: Vec<u64> = figures::cells(run, mode)
                .into_iter()
                .filter_map(p50)
                .collect();
            let (low, high) = (*medians.iter().min()?, *medians.iter().max()?);
            (medians.len() > 1).then(|| (high - low) as f64 / low.max(1) as f64)
        })
        .reduce(f64::max);
    let moves = moves
        .map(|share| {
            // The middle of a bucket is within 0.8 % of its values.
            if share < 0.016 {
                "; it is the same within the histograms’ resolution at every number of Services measured".to_owned()
            } else {
                format!("; between the numbers of Services measured it differs by at most {}", units::percent(share))
            }
        })
        .unwrap_or_default();
    Some(format!(
        "On the whole node a later packet of a flow takes a median of {costs}{moves}."
    ))
}

fn faults(run: &Run) -> Option<String> {
    let of = |kind| {
        run.measurements
            .faults
            .iter()
            .filter(move |fault| fault.kind == kind)
    };
    let mut parts = Vec::new();
    let lost: Vec<(u64, u64)> = of(FaultKind::Flush)
        .map(|fault| {
            (
                figures::new_flows(fault).lost_count(),
                figures::established_flows(fault).lost_count(),
            )
        })
        .collect();
    let range = |values: &dyn Fn(&(u64, u64)) -> u64| -> String {
        let low = lost.iter().map(values).min().unwrap_or(0);
        let high = lost.iter().map(values).max().unwrap_or(0);
        if low == high {
            units::count(low)
        } else {
            format!("{} to {}", units::count(low), units::count(high))
        }
    };
    if !lost.is_empty() {
        let sent: Vec<u64> = of(FaultKind::Flush)
            .map(|fault| figures::new_flows(fault).sent)
            .collect();
        let of_sent = match (sent.iter().min(), sent.iter().max()) {
            (Some(low), Some(high)) if low == high => format!(" of {}", units::count(*low)),
            _ => String::new(),
        };
        let longest = longest_outage(of(FaultKind::Flush));
        parts.push(format!(
            "flushing the Service rules lost {}{of_sent} new and {} established flows{}{longest}",
            range(&|lost| lost.0),
            range(&|lost| lost.1),
            match lost.as_slice() {
                [] | [_] => "",
                [first, rest @ ..] if rest.iter().all(|other| other == first) =>
                    ", whatever the mode",
                _ => ", depending on the mode",
            },
        ));
    }
    let switches: Vec<String> = of(FaultKind::Switch)
        .map(|fault| {
            format!(
                "switching {} → {} lost {} new and {} established{}",
                fault.mode,
                fault.to.map_or("", Mode::name),
                units::count(figures::new_flows(fault).lost_count()),
                units::count(figures::established_flows(fault).lost_count()),
                longest_outage(std::iter::once(fault))
            )
        })
        .collect();
    // More than two would be no sentence any more; the section has them all.
    if switches.len() <= 2 {
        parts.extend(switches);
    } else {
        let new: u64 = of(FaultKind::Switch)
            .map(|fault| figures::new_flows(fault).lost_count())
            .max()
            .unwrap_or(0);
        parts.push(format!(
            "the worst of {} mode switches lost {} new flows{}",
            switches.len(),
            units::count(new),
            longest_outage(of(FaultKind::Switch))
        ));
    }
    if parts.is_empty() {
        return None;
    }
    let mut sentence = parts.join("; ");
    if let Some(first) = sentence.get(..1) {
        sentence = first.to_uppercase() + &sentence[1..];
    }
    Some(format!("{sentence}."))
}

fn longest_outage<'a>(faults: impl Iterator<Item = &'a Fault>) -> String {
    let mut longest = 0;
    let mut paths: Vec<&str> = Vec::new();
    for fault in faults {
        for path in &fault.paths {
            for outage in &path.outages {
                let (length, _) = figures::outage_length(outage, fault.duration_ns);
                if length > longest {
                    longest = length;
                    paths.clear();
                }
                if length == longest && !paths.contains(&path.path.as_str()) {
                    paths.push(&path.path);
                }
            }
        }
    }
    match paths.as_slice() {
        [] => String::new(),
        [path] => format!(
            " (longest outage {}, {})",
            units::time_u64(longest),
            figures::path_title(path)
        ),
        _ => format!(" (longest outage {})", units::time_u64(longest)),
    }
}

/// In place of the third sentence when no fault was run.
fn apply(run: &Run) -> Option<String> {
    let clock = run.measurements.clock;
    let costs: Vec<String> = figures::compared(run)
        .into_iter()
        .map(|cell| format!("{} in {}", units::cost_u64(clock, cell.apply_ns), cell.mode))
        .collect();
    (!costs.is_empty()).then(|| {
        format!(
            "{}, putting all rules into the kernel took {}{}.",
            at_size(run),
            units::list(&costs),
            match clock {
                Clock::Virtual => " (in instructions)",
                Clock::Wall => "",
            }
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn the_whole_comparison() {
        insta::assert_snapshot!(sentences(&sample::run()).join("\n"));
    }

    #[test]
    fn one_mode_at_one_size_without_faults() {
        let mut run = sample::host_run();
        run.measurements.cells.truncate(1);
        run.measurements.faults.clear();
        insta::assert_snapshot!(sentences(&run).join("\n"));
    }

    #[test]
    fn nothing_measured_says_nothing() {
        let mut run = sample::run();
        run.measurements.cells.clear();
        run.measurements.faults.clear();
        assert!(sentences(&run).is_empty());
    }
}
