//! The clock of everything that is measured.

use nix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC` in nanoseconds: the clock that `bpf_ktime_get_ns` reads as well.
///
/// # Panics
///
/// Never on Linux, where this clock cannot fail.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("Linux always has CLOCK_MONOTONIC");
    now.tv_sec().unsigned_abs() * 1_000_000_000 + now.tv_nsec().unsigned_abs()
}

/// What must be added to [`monotonic_ns`] to get the time since 1970 (`CLOCK_REALTIME`), in nanoseconds, as
/// of now: the time of day can be set at any time.
///
/// # Panics
///
/// Never on Linux, where these clocks cannot fail.
pub fn realtime_offset_ns() -> i64 {
    let before = monotonic_ns();
    let now = clock_gettime(ClockId::CLOCK_REALTIME).expect("Linux always has CLOCK_REALTIME");
    let after = monotonic_ns();
    let since_1970 = now.tv_sec() * 1_000_000_000 + now.tv_nsec();
    // The middle of the two is off by at most half of what lies between them.
    since_1970.saturating_sub_unsigned(u64::midpoint(before, after))
}

/// The word on the kernel's command line with which `cargo xtask` boots a VM whose clock counts
/// instructions. The kernel itself ignores words with a dot that belong to no module.
const VIRTUAL: &str = "svcpath.clock=virtual";

/// Is a nanosecond of this machine a guest instruction?
pub fn is_virtual() -> bool {
    says_virtual(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default())
}

fn says_virtual(command_line: &str) -> bool {
    command_line.split_whitespace().any(|word| word == VIRTUAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_day_is_that_of_others() {
        let here = monotonic_ns().saturating_add_signed(realtime_offset_ns());
        let since_1970 = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .expect("later than 1970");
        let apart = since_1970.as_nanos().abs_diff(u128::from(here));
        assert!(apart < 1_000_000_000, "{apart} ns apart");
    }

    #[test]
    fn only_the_whole_word_makes_a_clock_virtual() {
        assert!(says_virtual("quiet svcpath.clock=virtual nokaslr\n"));
        assert!(!says_virtual("quiet svcpath.clock=virtually\n"));
        assert!(!says_virtual(""));
    }
}
