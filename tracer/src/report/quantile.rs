//! Quantiles and means of the run model's histograms, and merging them.
//!
//! A bucket stands for the middle of its bounds, here and everywhere else in reports: exact where
//! the bounds are equal (all values below 128), within 0.8 % above.

use crate::record::run::Histogram;

/// The value that stands for a bucket.
pub const fn middle(low: u64, high: u64) -> u64 {
    low + (high - low) / 2
}

/// The value at quantile `q` (0 to 1) in nanoseconds of the run's clock: the smallest value that
/// is not exceeded by at least that share of the values. `None` if there is none.
pub fn quantile(histogram: &Histogram, q: f64) -> Option<u64> {
    let (low, high) = bucket_at(histogram, q)?;
    Some(middle(low, high))
}

/// The bounds of the bucket that holds quantile `q`.
pub fn bucket_at(histogram: &Histogram, q: f64) -> Option<(u64, u64)> {
    let counts = histogram.buckets.iter().map(|bucket| u128::from(bucket[2]));
    let total: u128 = counts.sum();
    if total == 0 {
        return None;
    }
    // In millionths and integers: 0.99 of 100 values is the 99th, whatever floats make of it.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 0..=1000000"
    )]
    let millionths = (q.clamp(0.0, 1.0) * 1e6).round() as u128;
    let rank = (millionths * total).div_ceil(1_000_000).max(1);
    let mut seen = 0_u128;
    for &[low, high, count] in &histogram.buckets {
        seen += u128::from(count);
        if seen >= rank {
            return Some((low, high));
        }
    }
    None
}

/// The exact mean in nanoseconds of the run's clock.
pub fn mean(histogram: &Histogram) -> Option<f64> {
    (histogram.count > 0).then(|| histogram.sum_ns as f64 / histogram.count as f64)
}

/// All values of all the histograms together. Buckets are kept as they are: equal ones are added,
/// so merging histograms of one layout loses nothing.
pub fn merge<'a>(histograms: impl IntoIterator<Item = &'a Histogram>) -> Histogram {
    let mut merged = Histogram::default();
    for histogram in histograms {
        merged.count = merged.count.saturating_add(histogram.count);
        merged.sum_ns = merged.sum_ns.saturating_add(histogram.sum_ns);
        merged.buckets.extend_from_slice(&histogram.buckets);
    }
    merged.buckets.sort_unstable();
    merged.buckets.dedup_by(|next, kept| {
        let same = next[..2] == kept[..2];
        if same {
            kept[2] = kept[2].saturating_add(next[2]);
        }
        same
    });
    merged
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::report::sample::histogram_of;

    #[test]
    fn an_empty_histogram_has_no_figures() {
        assert_eq!(quantile(&Histogram::default(), 0.5), None);
        assert_eq!(mean(&Histogram::default()), None);
    }

    #[test]
    fn small_values_are_exact() {
        let values: Vec<u64> = (1..=100).collect();
        let histogram = histogram_of(&values);
        assert_eq!(quantile(&histogram, 0.0), Some(1));
        assert_eq!(quantile(&histogram, 0.5), Some(50));
        assert_eq!(quantile(&histogram, 0.99), Some(99));
        assert_eq!(quantile(&histogram, 1.0), Some(100));
        assert_eq!(mean(&histogram), Some(50.5));
    }

    proptest! {
        #[test]
        fn quantiles_are_within_half_a_bucket(
            mut values in prop::collection::vec(0_u64..1 << 34, 1..400),
            q in 0.0_f64..=1.0,
        ) {
            let got = quantile(&histogram_of(&values), q).expect("there are values");
            values.sort_unstable();
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "between 1 and the number of values"
            )]
            let rank = ((q * 1e6).round() / 1e6 * values.len() as f64).ceil().max(1.0) as usize;
            // Floats may put the rank one off where it falls on a whole number.
            let near = |rank: usize| {
                let value = values[rank.clamp(1, values.len()) - 1];
                got.abs_diff(value) as f64 <= value as f64 * 0.008 + 0.5
            };
            prop_assert!(near(rank) || near(rank + 1) || near(rank.saturating_sub(1)));
        }

        #[test]
        fn merging_is_recording_together(
            a in prop::collection::vec(0_u64..1 << 20, 0..200),
            b in prop::collection::vec(0_u64..1 << 20, 0..200),
        ) {
            let together: Vec<u64> = a.iter().chain(&b).copied().collect();
            prop_assert_eq!(
                merge([&histogram_of(&a), &histogram_of(&b)]),
                histogram_of(&together)
            );
        }

        #[test]
        fn quantiles_never_fall(values in prop::collection::vec(0_u64..1 << 30, 1..200)) {
            let histogram = histogram_of(&values);
            let figures: Vec<_> = (0..=100).map(|p| quantile(&histogram, f64::from(p) / 100.0)).collect();
            prop_assert!(figures.is_sorted());
        }
    }
}
