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
    fn only_the_whole_word_makes_a_clock_virtual() {
        assert!(says_virtual("quiet svcpath.clock=virtual nokaslr\n"));
        assert!(!says_virtual("quiet svcpath.clock=virtually\n"));
        assert!(!says_virtual(""));
    }
}
