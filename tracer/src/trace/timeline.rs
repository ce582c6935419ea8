//! New flows over time, in memory that does not grow with it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::flows::Decided;
use super::journey::Journey;
use crate::record::run::Bin;

/// The width of a bin at first, ns.
const NARROWEST_NS: u64 = 20_000_000;
/// Bins a path, at most: when time passes the last one, each two become one of twice the width.
pub const BINS: usize = 512;

/// New flows by when they came, as bins of one width.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Timeline {
    /// A bin's width, ns.
    pub bin_ns: u64,
    /// By path (`pod→ClusterIP`): new flows, and of them those that went wrong. At most
    /// [`BINS`] each, from the session's begin; empty ones at the end are left out.
    pub paths: BTreeMap<String, Vec<Bin>>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self {
            bin_ns: NARROWEST_NS,
            paths: BTreeMap::new(),
        }
    }
}

impl Timeline {
    /// Counts a new flow of a session that began at this time (`CLOCK_MONOTONIC`, ns).
    pub fn add(&mut self, started_ns: u64, journey: &Journey) {
        if let Some(bin) = self.bin(started_ns, journey.time_ns, journey.path) {
            bin.sent += 1;
        }
    }

    /// Counts what became of one of its flows.
    pub fn decide(&mut self, started_ns: u64, decided: &Decided) {
        let was_lost = decided.corrects.as_ref().is_some_and(|was| was.is_bad());
        let is_lost = decided.verdict.is_bad();
        if let Some(bin) = self.bin(started_ns, decided.first_ns, decided.path) {
            bin.lost = (bin.lost + u64::from(is_lost)).saturating_sub(u64::from(was_lost));
        }
    }

    fn bin(&mut self, started_ns: u64, time_ns: u64, path: &str) -> Option<&mut Bin> {
        let since = time_ns.saturating_sub(started_ns);
        while since / self.bin_ns >= BINS as u64 {
            self.widen();
        }
        // Below BINS, as the loop sees to.
        let index = usize::try_from(since / self.bin_ns).unwrap_or(BINS - 1);
        if !self.paths.contains_key(path) {
            self.paths.insert(path.to_owned(), Vec::new());
        }
        let bins = self.paths.get_mut(path)?;
        if bins.len() <= index {
            bins.resize(index + 1, Bin::default());
        }
        bins.get_mut(index)
    }

    fn widen(&mut self) {
        self.bin_ns = self.bin_ns.saturating_mul(2);
        for bins in self.paths.values_mut() {
            *bins = bins
                .chunks(2)
                .map(|two| Bin {
                    sent: two.iter().map(|bin| bin.sent).sum(),
                    lost: two.iter().map(|bin| bin.lost).sum(),
                })
                .collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::journey::End;
    use crate::trace::verdict::Verdict;

    fn journey(time_ns: u64, end: End) -> Journey {
        Journey {
            time_ns,
            end,
            ..Journey::sample()
        }
    }

    fn decided(first_ns: u64) -> Decided {
        let journey = Journey::sample();
        Decided {
            time_ns: first_ns,
            index: 0,
            service: journey.service,
            protocol: journey.protocol,
            source: journey.source,
            destination: journey.destination,
            path: journey.path,
            headed: journey.headed,
            first_ns,
            after_ns: None,
            filtered: false,
            corrects: None,
            verdict: Verdict::Leaked,
        }
    }

    #[test]
    fn flows_fall_into_the_bin_of_their_time() {
        let mut timeline = Timeline::default();
        timeline.add(1_000, &journey(1_000, End::Sent));
        timeline.add(1_000, &journey(1_000 + NARROWEST_NS, End::Leaked));
        timeline.decide(1_000, &decided(1_000 + NARROWEST_NS));
        timeline.add(1_000, &journey(999 + 2 * NARROWEST_NS, End::Sent));
        // The clock is read before the probes are attached: not before the begin, but who knows.
        timeline.add(1_000, &journey(0, End::Sent));
        let bins = &timeline.paths["pod→ClusterIP"];
        assert_eq!(
            bins[..],
            [Bin { sent: 2, lost: 0 }, Bin { sent: 2, lost: 1 }]
        );
    }

    #[test]
    fn a_long_session_has_wide_bins_and_loses_no_flow() {
        let mut timeline = Timeline::default();
        let day_ns = 86_400_000_000_000;
        for i in 0..1_000 {
            timeline.add(0, &journey(i * day_ns / 1_000, End::Leaked));
            timeline.decide(0, &decided(i * day_ns / 1_000));
        }
        let bins = &timeline.paths["pod→ClusterIP"];
        assert!((BINS / 2..=BINS).contains(&bins.len()), "{}", bins.len());
        let sum = |pick: fn(&Bin) -> u64| bins.iter().map(pick).sum::<u64>();
        assert_eq!((sum(|bin| bin.sent), sum(|bin| bin.lost)), (1_000, 1_000));
        timeline.add(0, &journey(u64::MAX, End::Sent));
        assert!(timeline.paths["pod→ClusterIP"].len() <= BINS);
    }
}
