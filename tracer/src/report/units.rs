//! How figures are written. On the virtual clock a nanosecond is a guest instruction and is
//! written so; on the wall clock it is time.

use std::fmt::Write as _;

use crate::record::run::Clock;

/// What a figure of this clock counts, in words: `instructions` or `time`.
pub const fn noun(clock: Clock) -> &'static str {
    match clock {
        Clock::Virtual => "instructions",
        Clock::Wall => "time",
    }
}

/// What stands on an axis of this clock.
pub const fn axis(clock: Clock) -> &'static str {
    match clock {
        Clock::Virtual => "guest instructions",
        Clock::Wall => "time",
    }
}

/// A cost in nanoseconds of the run's clock: `412`, `3.1k`, `0.41 G` or `412 ns`, `3.1 us`, `1.20 s`.
pub fn cost(clock: Clock, ns: f64) -> String {
    match clock {
        Clock::Virtual => instructions(ns),
        Clock::Wall => time(ns),
    }
}

/// A cost of whole nanoseconds.
pub fn cost_u64(clock: Clock, ns: u64) -> String {
    cost(clock, ns as f64)
}

/// A cost for an axis: no needless zeros.
pub fn tick(clock: Clock, ns: f64) -> String {
    let (scales, gap): (&[(f64, &str)], _) = match clock {
        Clock::Virtual => (&[(1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")], ""),
        Clock::Wall => (&[(1e9, "s"), (1e6, "ms"), (1e3, "us"), (1.0, "ns")], " "),
    };
    if ns == 0.0 {
        return "0".to_owned();
    }
    let (scale, unit) = scales
        .iter()
        .copied()
        .find(|(scale, _)| ns.abs() >= *scale)
        .unwrap_or(scales[scales.len() - 1]);
    format!("{}{gap}{unit}", trimmed(ns / scale, 2))
}

/// `ns` of real or virtual elapsed time as time, whatever the clock: what a client waited, how
/// long an outage was.
pub fn time(ns: f64) -> String {
    let size = ns.abs();
    if size < 999.5 {
        format!("{ns:.0} ns")
    } else if size < 999_950.0 {
        format!("{:.1} us", ns / 1e3)
    } else if size < 999_950_000.0 {
        format!("{:.1} ms", ns / 1e6)
    } else {
        format!("{:.2} s", ns / 1e9)
    }
}

/// Elapsed time of whole nanoseconds.
pub fn time_u64(ns: u64) -> String {
    time(ns as f64)
}

/// Guest instructions.
fn instructions(count: f64) -> String {
    let size = count.abs();
    if size < 999.5 {
        format!("{count:.0}")
    } else if size < 999_950.0 {
        format!("{:.1}k", count / 1e3)
    } else if size < 99_950_000.0 {
        format!("{:.1} M", count / 1e6)
    } else {
        format!("{:.2} G", count / 1e9)
    }
}

/// A price per Service: signed, in whole instructions or nanoseconds and tenths.
pub fn slope(clock: Clock, ns: f64) -> String {
    // -0.04 must not read as "-0.0".
    let ns = if ns.abs() < 0.05 { 0.0 } else { ns };
    match clock {
        Clock::Virtual => format!("{ns:+.1}"),
        Clock::Wall => format!("{ns:+.1} ns"),
    }
}

/// A count with thousands separated: `1,004`.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A share as a percentage: `12 %`, `0.4 %`.
pub fn percent(share: f64) -> String {
    let points = share * 100.0;
    if points != 0.0 && points.abs() < 9.95 {
        format!("{points:.1} %")
    } else {
        format!("{points:.0} %")
    }
}

/// A number with at most `digits` decimals and no trailing zeros.
pub fn trimmed(value: f64, digits: usize) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write!(out, "{value:.digits$}");
    if out.contains('.') {
        let kept = out.trim_end_matches('0').trim_end_matches('.').len();
        out.truncate(kept);
    }
    if out == "-0" { "0".to_owned() } else { out }
}

/// `one, two and three`.
pub fn list(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

/// `1 flow`, `2 flows`.
pub fn plural(n: u64, one: &str, many: &str) -> String {
    format!("{} {}", count(n), if n == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_written_as_counts() {
        let written: Vec<String> = [
            0.0, 412.0, 999.4, 999.6, 3_140.0, 36_450.0, 999_949.0, 999_951.0, 4e6, 4.1e8, 3.9e9,
        ]
        .into_iter()
        .map(|n| cost(Clock::Virtual, n))
        .collect();
        assert_eq!(
            written,
            [
                "0", "412", "999", "1.0k", "3.1k", "36.5k", "999.9k", "1.0 M", "4.0 M", "0.41 G",
                "3.90 G"
            ]
        );
    }

    #[test]
    fn wall_clock_figures_are_times() {
        let written: Vec<String> = [412.0, 3_140.0, 999_960.0, 31e6, 1.204e9]
            .into_iter()
            .map(|n| cost(Clock::Wall, n))
            .collect();
        assert_eq!(written, ["412 ns", "3.1 us", "1.0 ms", "31.0 ms", "1.20 s"]);
    }

    #[test]
    fn ticks_carry_no_needless_zeros() {
        assert_eq!(tick(Clock::Virtual, 20_000.0), "20k");
        assert_eq!(tick(Clock::Virtual, 2_500.0), "2.5k");
        assert_eq!(tick(Clock::Wall, 1_000_000.0), "1 ms");
        assert_eq!(tick(Clock::Wall, 0.0), "0");
    }

    #[test]
    fn slopes_are_signed_and_never_minus_nothing() {
        assert_eq!(slope(Clock::Virtual, -0.01), "+0.0");
        assert_eq!(slope(Clock::Virtual, 15.08), "+15.1");
        assert_eq!(slope(Clock::Wall, -2.0), "-2.0 ns");
    }

    #[test]
    fn counts_are_grouped() {
        assert_eq!(count(0), "0");
        assert_eq!(count(1_004), "1,004");
        assert_eq!(count(1_234_567), "1,234,567");
    }

    #[test]
    fn lists_read_as_prose() {
        let items = |n: usize| {
            list(
                &["a", "b", "c"][..n]
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(items(0), "");
        assert_eq!(items(1), "a");
        assert_eq!(items(2), "a and b");
        assert_eq!(items(3), "a, b and c");
    }
}
