//! What is counted of one Service while a session lasts.

use std::collections::BTreeMap;

use std::net::SocketAddr;

use tracer_ebpf::histogram::{CELLS, bounds_of, cell_of};

use super::flows::Decided;
use super::journey::{End, Journey};
use super::verdict::{Verdict, Who};
use crate::record::run::Histogram;

/// What became of one Service's packets.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// New flows.
    pub flows: u64,
    /// Of them those that were translated to an endpoint, by the mode whose rules did it, or `unknown`.
    pub translated: BTreeMap<&'static str, u64>,
    /// First packets that were sent once more: nobody had answered the one before. While nothing tracks
    /// connections, later packets of UDP as well.
    pub repeated: u64,
    /// New flows by what became of them, as far as that is known.
    pub verdicts: BTreeMap<Verdict, u64>,
    /// Packets of established flows that were dropped, by reason and stage.
    pub later_drops: BTreeMap<End, u64>,
    /// Packets that were dropped before conntrack saw them, and of which nobody knows whether their flows were
    /// new, by reason and stage.
    pub unplaced_drops: BTreeMap<End, u64>,
    /// Answers that were dropped of flows that had not been answered, by reason and stage.
    pub answer_drops: BTreeMap<End, u64>,
    /// Packets under way of which conntrack made a new entry: they go on with a flow, and open none.
    pub picked_up: u64,
    /// Packets of established flows that conntrack does not track: its rules are gone, or it takes them for invalid.
    pub untracked: u64,
    /// Packets that their socket's queue had taken, and that were freed with it.
    pub freed: u64,
    /// Packets that were freed at their socket, and of which the kernel does not say whether it dropped them.
    pub freed_or_dropped: u64,
    /// Resets that decided nothing: of flows that had been answered, or reset before.
    pub later_resets: BTreeMap<Who, u64>,
    /// Established flows that go on to an endpoint that is gone, by endpoint.
    pub stuck: BTreeMap<SocketAddr, u64>,
    /// First packets' time on the node.
    pub node: Times,
    /// From first packets to their first answers.
    pub answered: Times,
}

impl Tally {
    /// Is there anything to tell?
    pub fn has_anything(&self) -> bool {
        let freed = self.freed + self.freed_or_dropped;
        self.flows + self.repeated + self.drops() + self.picked_up + self.untracked + freed > 0
            || !self.stuck.is_empty()
    }

    /// Counts a new flow.
    pub fn add(&mut self, journey: &Journey) {
        self.flows += 1;
        if let Some(by) = journey.translated_by {
            *self.translated.entry(by.name()).or_default() += 1;
        }
        // What the node keeps for itself or drops says nothing of the way to endpoints.
        if let (false, Some(elapsed_ns)) = (
            matches!(journey.end, End::Absorbed { .. } | End::Dropped { .. }),
            journey.elapsed_ns,
        ) {
            self.node.add(elapsed_ns);
        }
    }

    /// Counts a later packet that was dropped.
    pub fn add_later(&mut self, journey: &Journey) {
        *self.later_drops.entry(journey.end.clone()).or_default() += 1;
    }

    /// Counts a packet that was dropped, of a new flow or of an established one.
    pub fn add_unplaced(&mut self, journey: &Journey) {
        *self.unplaced_drops.entry(journey.end.clone()).or_default() += 1;
    }

    /// Counts an answer that was dropped.
    pub fn add_answer(&mut self, journey: &Journey) {
        *self.answer_drops.entry(journey.end.clone()).or_default() += 1;
    }

    /// Counts what became of a flow.
    pub fn decide(&mut self, decided: &Decided) {
        if let Some(before) = &decided.corrects
            && let Some(count) = self.verdicts.get_mut(before)
        {
            *count -= 1;
            if *count == 0 {
                self.verdicts.remove(before);
            }
        }
        *self.verdicts.entry(decided.verdict.clone()).or_default() += 1;
        if let (Verdict::Delivered, Some(after_ns)) = (&decided.verdict, decided.after_ns) {
            self.answered.add(after_ns);
        }
    }

    /// New flows that went where they should, as far as is known.
    pub fn good(&self) -> u64 {
        self.verdicts.get(&Verdict::Delivered).copied().unwrap_or(0)
    }

    /// New flows that went wrong, as far as is known.
    pub fn bad(&self) -> u64 {
        let bad = self.verdicts.iter().filter(|(verdict, _)| verdict.is_bad());
        bad.map(|(_, count)| count).sum()
    }

    /// Packets that the kernel dropped: first ones that decided their flow, later ones, and those of which nobody
    /// knows what they were.
    pub fn drops(&self) -> u64 {
        let first = self.verdicts.iter();
        let first = first.filter(|(verdict, _)| matches!(verdict, Verdict::Dropped { .. }));
        let first: u64 = first.map(|(_, count)| count).sum();
        let others = self
            .later_drops
            .values()
            .chain(self.unplaced_drops.values())
            .chain(self.answer_drops.values());
        first + others.sum::<u64>()
    }
}

/// A histogram that grows with what is in it.
#[derive(Clone, Debug, Default)]
pub struct Times {
    cells: BTreeMap<usize, u64>,
    sum_ns: u64,
}

impl Times {
    /// Counts a time, ns.
    pub fn add(&mut self, ns: u64) {
        *self.cells.entry(cell_of(ns).min(CELLS - 1)).or_default() += 1;
        self.sum_ns += ns;
    }

    /// As reports show it.
    pub fn histogram(&self) -> Histogram {
        Histogram {
            count: self.cells.values().sum(),
            sum_ns: self.sum_ns,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_timed_is_no_time() {
        let mut tally = Tally::default();
        for elapsed_ns in [Some(32_000), None] {
            tally.add(&Journey {
                elapsed_ns,
                ..Journey::sample()
            });
        }
        assert_eq!(tally.flows, 2);
        let node = tally.node.histogram();
        assert_eq!((node.count, node.sum_ns), (1, 32_000));
    }
}
