//! Histograms: the kernel's cells and the clients' latencies in the run's form.

use std::collections::BTreeMap;

use tracer_ebpf::histogram::{bounds_of, cell_of};
use tracer_ebpf::path::Path;
use tracer_ebpf::record::{STAGE_NODE, state};

use super::run::{Histogram, PacketState, StageHistogram};
use crate::probe::catalogue;
use crate::probe::hooks::Times;

/// Values of one kind, gathered in user space into the kernel's own cells.
#[derive(Clone, Debug, Default)]
pub struct Recorder {
    sum: u64,
    cells: BTreeMap<usize, u64>,
}

impl Recorder {
    /// Records one value, in nanoseconds.
    pub fn record(&mut self, ns: u64) {
        self.sum += ns;
        *self.cells.entry(cell_of(ns)).or_default() += 1;
    }

    /// What was recorded.
    pub fn histogram(&self) -> Histogram {
        Histogram {
            count: self.cells.values().sum(),
            sum_ns: self.sum,
            buckets: self
                .cells
                .iter()
                .map(|(cell, count)| {
                    let (low, high) = bounds_of(*cell);
                    [low, high, *count]
                })
                .collect(),
        }
    }
}

/// What the probes timed on one path.
#[derive(Clone, Debug, Default)]
pub struct PathTimes {
    /// Time in each stage, in a packet's order, for each packet state.
    pub stages: Vec<StageHistogram>,
    /// All stages of the node together, by packet state.
    pub node: BTreeMap<PacketState, Histogram>,
}

/// Picks one path's histograms.
pub fn of_path(times: &[Times], path: Path) -> PathTimes {
    let mut found = PathTimes::default();
    for times in times.iter().filter(|times| times.path == path) {
        let state = packet_state(times.state);
        let histogram = Histogram {
            count: times.cells.iter().map(|cell| cell[2]).sum(),
            sum_ns: times.sum,
            buckets: times.cells.clone(),
        };
        if times.stage == STAGE_NODE {
            found.node.insert(state, histogram);
        } else {
            let (hook, stage) = catalogue::stage_name(times.stage);
            found.stages.push(StageHistogram {
                hook: hook.to_owned(),
                stage: stage.to_owned(),
                state,
                histogram,
            });
        }
    }
    found
}

/// The word for a state's number.
pub fn packet_state(number: u8) -> PacketState {
    match number {
        state::NEW => PacketState::New,
        state::ESTABLISHED => PacketState::Established,
        state::REPLY => PacketState::Reply,
        _ => PacketState::Untracked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorder_keeps_count_sum_and_order() {
        let mut recorder = Recorder::default();
        for ns in [5, 1_000_000, 5, 200] {
            recorder.record(ns);
        }
        let histogram = recorder.histogram();
        assert_eq!(histogram.count, 4);
        assert_eq!(histogram.sum_ns, 1_000_210);
        assert_eq!(histogram.buckets[0], [5, 5, 2]);
        assert!(histogram.buckets.is_sorted());
        assert!(histogram.buckets.iter().all(|[low, high, _]| low <= high));
    }
}
