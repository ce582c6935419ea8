//! Latency histograms of the clients, in the same cells as those of the probes.

use tracer_ebpf::histogram::{CELLS, bounds_of, cell_of};

/// Which answer a latency was measured to. All count from the time at which the flow was *meant*
/// to start, so a sender that fell behind cannot hide it; [`Answer::Later`] counts from the
/// sending of its own request, which follows the previous answer at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Answer {
    /// TCP: the connection stands.
    Connect,
    /// TCP: the answer has come.
    Only,
    /// UDP: the first answer of the flow.
    First,
    /// UDP: an answer on the flow after the first.
    Later,
}

impl Answer {
    /// As run.json writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Only => "answer",
            Self::First => "first-answer",
            Self::Later => "later-answer",
        }
    }
}

/// A histogram of nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Latency {
    count: u64,
    sum_ns: u64,
    cells: Vec<u64>,
}

impl Default for Latency {
    fn default() -> Self {
        Self {
            count: 0,
            sum_ns: 0,
            cells: vec![0; CELLS],
        }
    }
}

impl Latency {
    /// Adds a value.
    pub fn record(&mut self, ns: u64) {
        self.count += 1;
        self.sum_ns = self.sum_ns.saturating_add(ns);
        self.cells[cell_of(ns)] += 1;
    }

    /// Number of values.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Exact sum of the values.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// `[lowest value of the bucket, highest value, count]`, ascending, empty ones left out.
    pub fn buckets(&self) -> Vec<[u64; 3]> {
        self.cells
            .iter()
            .enumerate()
            .filter(|(_, count)| **count != 0)
            .map(|(cell, count)| {
                let (low, high) = bounds_of(cell);
                [low, high, *count]
            })
            .collect()
    }

    /// The highest value of the bucket that holds the `quantile` (0 to 1); `None` without values.
    pub fn quantile(&self, quantile: f64) -> Option<u64> {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped to the count"
        )]
        let rank = ((self.count as f64 * quantile).ceil().max(1.0) as u64).min(self.count);
        let mut seen = 0;
        self.buckets().into_iter().find_map(|[_, high, count]| {
            seen += count;
            (seen >= rank).then_some(high)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_come_from_the_right_bucket() {
        let mut latency = Latency::default();
        assert_eq!(latency.quantile(0.5), None);
        for ns in 1..=100 {
            latency.record(ns);
        }
        assert_eq!(latency.count(), 100);
        assert_eq!(latency.sum_ns(), 5050);
        assert_eq!(latency.quantile(0.5), Some(50));
        assert_eq!(latency.quantile(0.99), Some(99));
        assert_eq!(latency.quantile(1.0), Some(100));
        assert_eq!(latency.buckets()[0], [1, 1, 1]);
    }
}
