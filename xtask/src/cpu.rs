//! One CPU for one virtual machine on the virtual clock.
//!
//! QEMU's two threads hand the virtual clock to each other whenever the guest is idle. With both free
//! to run on two CPUs of a machine under load, some runs came out a few instructions different in
//! a few places. On one CPU the threads take turns, and far fewer differ; with several other programs
//! to a CPU some still do. (Real-time scheduling is no way out: the guest then stands still, and so
//! does the machine.)

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// How many virtual machines each CPU has.
static TAKEN: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

/// While it lives, the thread that made it, and whatever it starts, runs on one CPU.
pub(crate) struct Pinned {
    cpu: usize,
    before: CpuSet,
}

/// Moves this thread to the CPU with the fewest virtual machines; `None` where that is not allowed.
pub(crate) fn pin() -> Option<Pinned> {
    let this_thread = Pid::from_raw(0);
    let before = sched_getaffinity(this_thread).ok()?;
    let allowed: Vec<usize> = (0..CpuSet::count())
        .filter(|cpu| before.is_set(*cpu).unwrap_or(false))
        .collect();
    let cpu = take(&allowed)?;
    let pinned = Pinned { cpu, before };
    let mut one = CpuSet::new();
    one.set(cpu).ok()?;
    sched_setaffinity(this_thread, &one).ok()?;
    Some(pinned)
}

fn take(allowed: &[usize]) -> Option<usize> {
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    let cpu = *allowed
        .iter()
        .min_by_key(|cpu| taken.get(cpu).copied().unwrap_or(0))?;
    *taken.entry(cpu).or_default() += 1;
    Some(cpu)
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(machines) = taken.get_mut(&self.cpu) {
            *machines = machines.saturating_sub(1);
        }
        // It was this thread's own mask a moment ago.
        let _ = sched_setaffinity(Pid::from_raw(0), &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_is_on_one_cpu_and_gets_the_others_back() {
        let mask = || sched_getaffinity(Pid::from_raw(0)).expect("a mask");
        let count = |mask: &CpuSet| {
            (0..CpuSet::count())
                .filter(|cpu| mask.is_set(*cpu).unwrap_or(false))
                .count()
        };
        let before = count(&mask());
        let pinned = pin().expect("allowed");
        assert_eq!(count(&mask()), 1);
        drop(pinned);
        assert_eq!(count(&mask()), before);
    }

    #[test]
    fn machines_spread_over_the_cpus() {
        // Numbers that no machine has, so that other tests' machines do not count.
        let cpus = [9001, 9002];
        let taken = [take(&cpus), take(&cpus)];
        assert!(taken.contains(&Some(9001)) && taken.contains(&Some(9002)));
        assert_eq!(take(&[]), None);
    }
}
