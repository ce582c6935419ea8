//! Histograms: the kernel's cells and the clients' latencies in the run's form.

use std::collections::BTreeMap;

use tracer_ebpf::path::Path;
use tracer_ebpf::record::{STAGE_NODE, state};

use super::run::{Histogram, PacketState, StageHistogram};
use crate::probe::catalogue::{self, Detail};
use crate::probe::tier::Times;

/// What the probes timed on one path.
#[derive(Clone, Debug, Default)]
pub struct PathTimes {
    /// Time in each stage, in a packet's order, for each packet state.
    pub stages: Vec<StageHistogram>,
    /// All stages of the node together, by packet state.
    pub node: BTreeMap<PacketState, Histogram>,
}

/// Picks one path's histograms; `detail` is how finely they were taken.
pub fn of_path(times: &[Times], path: Path, detail: Detail) -> PathTimes {
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
            let (hook, stage) = catalogue::stage_name(times.stage, detail);
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
