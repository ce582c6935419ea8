//! The figures that reports are made of, looked up in a run or derived from it.

use tracer_ebpf::path::Path;

use super::quantile::{bucket_at, quantile};
use crate::record::run::{
    Cell, Clock, Fault, FaultKind, FaultPath, Histogram, Ledger, Outage, PacketState, PathResult,
    Run, Verdict,
};
use crate::rules::Mode;

/// `new`, `established`, `reply`, `untracked`.
pub const fn state_name(state: PacketState) -> &'static str {
    match state {
        PacketState::New => "new",
        PacketState::Established => "established",
        PacketState::Reply => "reply",
        PacketState::Untracked => "untracked",
    }
}

/// `control`, `flush`, `switch`.
pub const fn kind_name(kind: FaultKind) -> &'static str {
    match kind {
        FaultKind::Control => "control",
        FaultKind::Flush => "flush",
        FaultKind::Switch => "switch",
    }
}

/// `rejected`, `dropped`, ...
pub const fn verdict_name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Rejected => "rejected",
        Verdict::Dropped => "dropped",
        Verdict::Leaked => "leaked",
        Verdict::Unanswered => "unanswered",
        Verdict::Misdelivered => "misdelivered",
        Verdict::Reset => "reset",
        Verdict::Unsent => "unsent",
    }
}

/// A path's identifier as people read it; one that this version does not know stays as it is.
pub fn path_title(id: &str) -> String {
    known(id).map_or_else(|| id.to_owned(), |path| path.title().to_owned())
}

/// The path of an identifier.
fn known(id: &str) -> Option<Path> {
    Path::ALL.into_iter().find(|path| path.id() == id)
}

/// Does traffic on this path go to no Service?
pub fn is_floor(id: &str) -> bool {
    known(id).is_some_and(|path| path == path.floor())
}

/// The path from the same origin straight to a pod.
pub fn floor_of(id: &str) -> Option<&'static str> {
    known(id).map(|path| path.floor().id())
}

/// The modes that were measured, in the order of [`Mode::ALL`].
pub fn modes(run: &Run) -> Vec<Mode> {
    Mode::ALL
        .into_iter()
        .filter(|mode| run.measurements.cells.iter().any(|cell| cell.mode == *mode))
        .collect()
}

/// Every number of Services that was measured in any mode, ascending.
pub fn sizes(run: &Run) -> Vec<u32> {
    let mut sizes: Vec<u32> = run
        .measurements
        .cells
        .iter()
        .map(|cell| cell.services)
        .collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// The cells of a mode by ascending number of Services, one a number.
pub fn cells(run: &Run, mode: Mode) -> Vec<&Cell> {
    let mut cells: Vec<&Cell> = run
        .measurements
        .cells
        .iter()
        .filter(|cell| cell.mode == mode)
        .collect();
    cells.sort_by_key(|cell| cell.services);
    cells.dedup_by_key(|cell| cell.services);
    cells
}

/// The cell of a mode at a number of Services.
pub fn cell(run: &Run, mode: Mode, services: u32) -> Option<&Cell> {
    run.measurements
        .cells
        .iter()
        .find(|cell| cell.mode == mode && cell.services == services)
}

/// The largest number of Services that every measured mode was measured at.
pub fn common_size(run: &Run) -> Option<u32> {
    let modes = modes(run);
    sizes(run)
        .into_iter()
        .rev()
        .find(|&size| modes.iter().all(|&mode| cell(run, mode, size).is_some()))
}

/// The cells in which the modes are compared: all at [`common_size`], or, when there is none,
/// each mode at its own largest.
pub fn compared(run: &Run) -> Vec<&Cell> {
    let size = common_size(run);
    modes(run)
        .into_iter()
        .filter_map(|mode| match size {
            Some(size) => cell(run, mode, size),
            None => cells(run, mode).last().copied(),
        })
        .collect()
}

/// The paths of a run by identifier, Service paths before the others, as they were measured.
pub fn paths(run: &Run) -> Vec<&str> {
    let mut ids: Vec<&str> = Vec::new();
    for path in run.measurements.cells.iter().flat_map(|cell| &cell.paths) {
        if !ids.contains(&path.path.as_str()) {
            ids.push(&path.path);
        }
    }
    ids.sort_by_key(|id| is_floor(id));
    ids
}

/// The path that headline figures are about: pod to `ClusterIP`, else the first Service path.
pub fn main_path(run: &Run) -> Option<&str> {
    let ids = paths(run);
    ids.iter()
        .copied()
        .find(|id| *id == "pod-to-clusterip")
        .or_else(|| ids.into_iter().find(|id| !is_floor(id)))
}

/// One path of a cell.
pub fn path<'a>(cell: &'a Cell, id: &str) -> Option<&'a PathResult> {
    cell.paths.iter().find(|path| path.path == id)
}

/// The stage in which a mode turns a Service's address into an endpoint's, on a path: the dnat
/// stage of the first hook, and in ipvs mode its own stage at INPUT. For packets of the node
/// itself IPVS sits directly behind nat at OUTPUT, so the dnat stage there holds both. Traffic to
/// no Service meets the dnat stage in every mode.
pub fn translation(mode: Mode, path_id: &str) -> (&'static str, &'static str) {
    let from_host = path_id.starts_with("host-");
    match (mode, from_host) {
        (Mode::Ipvs, false) if !is_floor(path_id) => ("INPUT", "ipvs"),
        (_, true) => ("OUTPUT", "dnat"),
        (_, false) => ("PREROUTING", "dnat"),
    }
}

/// What the translating stage cost packets of a state.
pub fn translated<'a>(cell: &'a Cell, path_id: &str, state: PacketState) -> Option<&'a Histogram> {
    let (hook, stage) = translation(cell.mode, path_id);
    path(cell, path_id)?
        .stages
        .iter()
        .find(|s| s.hook == hook && s.stage == stage && s.state == state)
        .map(|s| &s.histogram)
        .filter(|histogram| histogram.count > 0)
}

/// What the whole node cost packets of a state.
pub fn node<'a>(cell: &'a Cell, path_id: &str, state: PacketState) -> Option<&'a Histogram> {
    path(cell, path_id)?
        .node
        .get(&state)
        .filter(|histogram| histogram.count > 0)
}

/// How much a median grows with each Service.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slope {
    /// Nanoseconds of the run's clock a Service.
    pub per_service: f64,
    /// Slopes smaller than this cannot be told from none: the width of the histogram's buckets,
    /// a Service.
    pub resolution: f64,
    /// The smaller number of Services.
    pub from: u32,
    /// The larger one.
    pub to: u32,
}

impl Slope {
    /// Is this no growth, as far as the histograms can tell?
    pub fn is_flat(&self) -> bool {
        self.per_service.abs() <= self.resolution
    }
}

/// The growth of a histogram's median between a mode's smallest and largest number of Services.
pub fn slope<'a>(
    run: &'a Run,
    mode: Mode,
    pick: impl Fn(&'a Cell) -> Option<&'a Histogram>,
) -> Option<Slope> {
    let measured: Vec<(u32, &Histogram)> = cells(run, mode)
        .into_iter()
        .filter_map(|cell| Some((cell.services, pick(cell)?)))
        .collect();
    let (&(from, small), &(to, large)) = (measured.first()?, measured.last()?);
    if from == to {
        return None;
    }
    let width = |h| bucket_at(h, 0.5).map(|(low, high)| (high - low + 1) as f64);
    let services = f64::from(to - from);
    Some(Slope {
        per_service: (quantile(large, 0.5)? as f64 - quantile(small, 0.5)? as f64) / services,
        resolution: f64::midpoint(width(small)?, width(large)?) / services,
        from,
        to,
    })
}

/// The flush at the largest number of Services of a mode.
pub fn flush(run: &Run, mode: Mode) -> Option<&Fault> {
    run.measurements
        .faults
        .iter()
        .filter(|fault| fault.kind == FaultKind::Flush && fault.mode == mode)
        .max_by_key(|fault| fault.services)
}

/// All paths' ledgers of new flows added up.
pub fn new_flows(fault: &Fault) -> Ledger {
    added(fault.paths.iter().map(|path| &path.new))
}

/// All paths' ledgers of established flows added up.
pub fn established_flows(fault: &Fault) -> Ledger {
    added(fault.paths.iter().map(|path| &path.established))
}

fn added<'a>(ledgers: impl Iterator<Item = &'a Ledger>) -> Ledger {
    let mut all = Ledger::default();
    for ledger in ledgers {
        all.sent += ledger.sent;
        all.delivered += ledger.delivered;
        for loss in &ledger.lost {
            match all.lost.iter_mut().find(|known| {
                (known.verdict, &known.reason, &known.stage)
                    == (loss.verdict, &loss.reason, &loss.stage)
            }) {
                Some(known) => known.count += loss.count,
                None => all.lost.push(loss.clone()),
            }
        }
    }
    all.lost
        .sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.cmp(b)));
    all
}

/// The length of an outage, and whether it was over before the traffic ended.
pub const fn outage_length(outage: &Outage, duration_ns: u64) -> (u64, bool) {
    match outage.end_ns {
        Some(end) => (end.saturating_sub(outage.start_ns), true),
        None => (duration_ns.saturating_sub(outage.start_ns), false),
    }
}

/// The outages of a path added up, and whether all were over before the traffic ended. `None` if
/// there was none.
pub fn outage_total(fault: &Fault, path: &FaultPath) -> Option<(u64, bool)> {
    path.outages
        .iter()
        .map(|outage| outage_length(outage, fault.duration_ns))
        .reduce(|(a, ended), (b, also)| (a + b, ended && also))
}

/// Time from the start of a flush to the end of the last rule change.
pub fn rules_back_after(fault: &Fault) -> Option<u64> {
    match fault.changes.as_slice() {
        [first, .., last] => last.end_ns.checked_sub(first.start_ns),
        _ => None,
    }
}

/// What a fault is called: `flush iptables-legacy`, `switch iptables-legacy → ipvs`.
pub fn fault_title(fault: &Fault) -> String {
    let kind = kind_name(fault.kind);
    match fault.to {
        Some(to) => format!("{kind} {} → {to}", fault.mode),
        None => format!("{kind} {}", fault.mode),
    }
}

/// What the clock is, in words.
pub const fn clock_words(clock: Clock) -> &'static str {
    match clock {
        Clock::Virtual => "virtual clock (1 ns = 1 guest instruction)",
        Clock::Wall => "wall clock",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn modes_are_compared_at_a_size_that_all_have() {
        let mut run = sample::run();
        assert_eq!(sizes(&run), [100, 1000, 2000, 5000]);
        assert_eq!(common_size(&run), Some(1000));
        run.measurements.cells.retain(|cell| match cell.mode {
            Mode::IptablesNft => cell.services == 2000,
            _ => cell.services != 2000,
        });
        assert_eq!(common_size(&run), None);
        let compared: Vec<_> = compared(&run)
            .iter()
            .map(|cell| (cell.mode.name(), cell.services))
            .collect();
        assert_eq!(
            compared,
            [
                ("iptables-legacy", 5000),
                ("iptables-nft", 2000),
                ("ipvs", 5000),
                ("nftables", 5000)
            ]
        );
    }

    #[test]
    fn every_mode_has_its_translating_stage() {
        assert_eq!(
            translation(Mode::IptablesNft, "external-to-nodeport"),
            ("PREROUTING", "dnat")
        );
        assert_eq!(
            translation(Mode::Nftables, "host-to-clusterip"),
            ("OUTPUT", "dnat")
        );
        assert_eq!(
            translation(Mode::Ipvs, "pod-to-clusterip"),
            ("INPUT", "ipvs")
        );
        assert_eq!(
            translation(Mode::Ipvs, "host-to-clusterip"),
            ("OUTPUT", "dnat")
        );
        assert_eq!(
            translation(Mode::Ipvs, "pod-to-pod"),
            ("PREROUTING", "dnat")
        );
        let run = sample::run();
        for cell in &run.measurements.cells {
            for id in paths(&run) {
                assert!(
                    translated(cell, id, PacketState::New).is_some(),
                    "{} {id}",
                    cell.mode
                );
            }
        }
    }

    #[test]
    fn slopes_are_what_the_sample_was_made_with() {
        let run = sample::run();
        let pick = |mode, id: &'static str| {
            slope(&run, mode, |cell| translated(cell, id, PacketState::New)).expect("measured")
        };
        // Traffic to no Service walks all rules: 15 and 61 instructions each, and the sample's
        // noise adds 0 to 5 %.
        assert!((15.0..15.75).contains(&pick(Mode::IptablesLegacy, "pod-to-pod").per_service));
        assert!((61.0..64.1).contains(&pick(Mode::IptablesNft, "pod-to-pod").per_service));
        assert!(pick(Mode::Ipvs, "pod-to-clusterip").is_flat());
        assert!(pick(Mode::Nftables, "pod-to-clusterip").is_flat());
        assert!(!pick(Mode::IptablesLegacy, "pod-to-clusterip").is_flat());
    }

    #[test]
    fn one_size_has_no_slope() {
        let mut run = sample::run();
        run.measurements.cells.retain(|cell| cell.services == 1000);
        assert_eq!(
            slope(&run, Mode::Ipvs, |cell| node(
                cell,
                "pod-to-clusterip",
                PacketState::New
            )),
            None
        );
    }

    #[test]
    fn an_outage_without_end_lasts_to_the_end() {
        let outage = Outage {
            start_ns: 10,
            end_ns: None,
            lost: 1,
        };
        assert_eq!(outage_length(&outage, 100), (90, false));
    }
}
