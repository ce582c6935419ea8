//! The tests of tests/vm.rs, spread over VMs that run side by side.
//!
//! Each VM runs a batch of tests one after the other. The first batches are large and the last ones small, the
//! longest tests come first, and who is free takes the next batch: so all VMs end at about the same time without
//! a boot for each test, on however many CPUs and however wrong the table of long tests has become.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::answers::ANSWERS;
use crate::channel::Job;
use crate::guest::{HOME, OUT};
use crate::interrupt;
use crate::qemu::{Line, Vm};
use crate::vm::print_line;

/// Tests that take long, and about how long, in seconds of an idle CPU (emulated, kernel 6.12): they are begun first.
/// A run tells how long each test took.
const LONGEST: [(&str, u32); 15] = [
    ("ipvs_walk", 105),
    ("every_mode_loses_new_flows_to_a_flush", 45),
    ("ipvs_truth_of_ways", 45),
    ("cost_of_each_tier", 35),
    ("truth_of_a_slower_stage", 35),
    ("answers_of_this_kernel", 30),
    ("tiers_agree_on_faults", 30),
    ("tiers_agree_on_traffic", 30),
    ("what_packets_meet", 30),
    ("functions_pair_interleaved_packets", 20),
    ("functions_trace", 15),
    ("functions_verdicts", 15),
    ("functions_identity", 13),
    ("every_mode_accounts_for_everything", 12),
    ("safety_of_unloaded_modules", 12),
];
/// What any other test counts as, seconds.
const OTHERS: u32 = 3;
/// A batch is not made smaller than this, seconds: a boot takes about 4.
const SMALLEST: u32 = 20;

/// Tests for one boot.
#[derive(Clone, Debug)]
pub(crate) struct Batch<'a> {
    /// Where they run.
    pub(crate) vm: &'a Vm,
    /// Their names.
    pub(crate) tests: Vec<String>,
}

/// What came of all batches.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Does something say that not all is well? It has been printed.
    pub(crate) failed: bool,
    /// What libtest counted in all of them.
    tally: Tally,
    /// What tests left in `/out`.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// Kernel and name of each test that has a result.
    told: Vec<(String, String)>,
}

/// The names of the tests that this program has, those with `filter` in their names if there is one.
pub(crate) fn list(program: &Path, filter: Option<&str>) -> Result<Vec<String>> {
    let output = Command::new(program)
        .args(["--list", "--format", "terse"])
        .args(filter)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    ensure!(
        output.status.success(),
        "{} does not list its tests",
        program.display()
    );
    Ok(listed(&String::from_utf8_lossy(&output.stdout)))
}

/// `NAME: test` a line.
fn listed(listing: &str) -> Vec<String> {
    let names = listing
        .lines()
        .filter_map(|line| line.strip_suffix(": test"));
    names.map(str::to_owned).collect()
}

/// Tests of the table that are no more: a table that nobody corrects is of no use.
pub(crate) fn unknown_of_longest(tests: &[String]) -> Vec<&'static str> {
    let names = LONGEST.iter().map(|(name, _)| *name);
    names
        .filter(|name| !tests.iter().any(|test| test == name))
        .collect()
}

/// Runs the program's tests in `vm`, and batches for other VMs beside them, on `workers` VMs at a time.
///
/// A batch that fails does not stop the others.
pub(crate) fn run(
    program: &Path,
    vm: &Vm,
    tests: &[String],
    others: Vec<Batch<'_>>,
    workers: usize,
) -> Result<Outcome> {
    let program = program.file_name().context("a program has no name")?;
    let program = &program.to_string_lossy();
    let wanted: Vec<(String, String)> = others
        .iter()
        .map(|batch| (batch.vm, &batch.tests))
        .chain([(vm, &tests.to_vec())])
        .flat_map(|(vm, tests)| {
            let kernel = &vm.image.kernel.release;
            tests.iter().map(move |test| (kernel.clone(), test.clone()))
        })
        .collect();
    let queue = Mutex::new(Queue {
        vm,
        tests: longest_first(tests),
        others: others.into(),
        workers,
    });
    let outcome = Mutex::new(Outcome::default());
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(batch) = next(&queue) {
                    run_batch(program, &batch, &outcome);
                }
            });
        }
    });
    let mut outcome = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
    let Tally { ran, failed } = outcome.tally;
    eprintln!("       Ended all in VMs: {ran} tests ran, {failed} failed");
    for trouble in mismatches(&wanted, &outcome.told) {
        eprintln!("error: {trouble}");
        outcome.failed = true;
    }
    Ok(outcome)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tests that no VM has taken yet.
struct Queue<'a> {
    vm: &'a Vm,
    /// With their weights, heaviest first.
    tests: VecDeque<(String, u32)>,
    others: VecDeque<Batch<'a>>,
    workers: usize,
}

fn longest_first(tests: &[String]) -> VecDeque<(String, u32)> {
    let weight = |name: &String| {
        let known = LONGEST.iter().find(|(long, _)| long == name);
        known.map_or(OTHERS, |(_, seconds)| *seconds)
    };
    let mut weighed: Vec<_> = tests
        .iter()
        .map(|name| (name.clone(), weight(name)))
        .collect();
    weighed.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    weighed.into()
}

/// What a VM that is free runs next.
fn next<'a>(queue: &Mutex<Queue<'a>>) -> Option<Batch<'a>> {
    let mut queue = locked(queue);
    if interrupt::is_over() {
        return None;
    }
    if let Some(other) = queue.others.pop_front() {
        return Some(other);
    }
    let workers = queue.workers;
    let tests = take_share(&mut queue.tests, workers);
    let vm = queue.vm;
    (!tests.is_empty()).then_some(Batch { vm, tests })
}

/// Two thirds of one VM's share of what is left: the rest evens out what the weights do not know.
fn take_share(tests: &mut VecDeque<(String, u32)>, workers: usize) -> Vec<String> {
    let left: u32 = tests.iter().map(|(_, weight)| weight).sum();
    let workers = u32::try_from(workers).unwrap_or(u32::MAX).max(1);
    let share = (left / workers * 2 / 3).max(SMALLEST);
    let mut taken = Vec::new();
    let mut weight = 0;
    while let Some((name, seconds)) =
        tests.pop_front_if(|(_, seconds)| weight == 0 || weight + *seconds <= share)
    {
        weight += seconds;
        taken.push(name);
    }
    taken
}

/// Boots, tells how long each test took, and prints what they said when all have ended: lines of two VMs are not
/// mixed.
fn run_batch(program: &str, batch: &Batch<'_>, outcome: &Mutex<Outcome>) {
    let kernel = &batch.vm.image.kernel.release;
    let what = match batch.tests.len() {
        1 => format!("one test in a VM (kernel {kernel})"),
        count => format!("{count} tests in a VM (kernel {kernel})"),
    };
    eprintln!("     Running {what}: {}", batch.tests.join(", "));
    let begin = Instant::now();
    let mut lines = Vec::new();
    let mut said = Said::default();
    let ended = batch.vm.run(
        &job(program, &batch.tests),
        &mut |line| {
            if let Line::Stdout(bytes) = line {
                said.take(begin.elapsed(), &String::from_utf8_lossy(bytes));
            }
            lines.push(Kept::of(line));
        },
        &AtomicBool::new(false),
    );
    let mut outcome = locked(outcome);
    eprintln!(
        "       Ended {what} after {:.0} s",
        begin.elapsed().as_secs_f64()
    );
    for line in &lines {
        line.print();
    }
    let told = said.told.into_iter();
    outcome.told.extend(told.map(|test| (kernel.clone(), test)));
    outcome.tally.add(said.tally);
    match ended {
        Ok(output) => {
            outcome.failed |= output.exit != 0 || said.tally.failed > 0;
            outcome.files.extend(output.files);
        }
        Err(error) => {
            eprintln!("error: {what}: {error:#}");
            outcome.failed = true;
        }
    }
    // Nobody is left to tell that nobody reads.
    std::io::stdout().flush().ok();
}

fn job(program: &str, tests: &[String]) -> Job {
    let mut argv = [program, "--test-threads=1", "--exact"]
        .map(str::to_owned)
        .to_vec();
    argv.extend_from_slice(tests);
    let env = [
        ("RUST_BACKTRACE", "1"),
        ("SVCPATH", "/usr/local/bin/svcpath"),
        (ANSWERS, OUT),
    ];
    Job {
        argv,
        env: env
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        cwd: HOME.to_owned(),
    }
}

/// A line of a guest, until its batch has ended.
enum Kept {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    Progress(f64, String),
}

impl Kept {
    fn of(line: Line<'_>) -> Self {
        match line {
            Line::Stdout(bytes) => Self::Stdout(bytes.to_owned()),
            Line::Stderr(bytes) => Self::Stderr(bytes.to_owned()),
            Line::Progress(fraction, what) => Self::Progress(fraction, what.to_owned()),
        }
    }

    fn print(&self) {
        print_line(match self {
            Self::Stdout(bytes) => Line::Stdout(bytes),
            Self::Stderr(bytes) => Line::Stderr(bytes),
            Self::Progress(fraction, what) => Line::Progress(*fraction, what),
        });
    }
}

/// What libtest says in one VM.
#[derive(Debug, Default)]
struct Said {
    /// Tests that have a result, in the order in which they ran.
    told: Vec<String>,
    tally: Tally,
    /// When the test before ended, since power-on.
    last: Duration,
    /// It has come to what the tests that failed have printed.
    over: bool,
}

impl Said {
    fn take(&mut self, after: Duration, line: &str) {
        self.tally.take(line);
        self.over |= line == "failures:";
        // "test NAME ... ok", or what a program has printed that the test ran, and "ok" on a later line.
        let test = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... "));
        if let (false, Some((name, _))) = (self.over, test) {
            let took = after.saturating_sub(self.last).as_secs_f64();
            eprintln!("       Ended {name} after {took:.0} s");
            self.told.push(name.to_owned());
        }
        if !self.over {
            // Before the first test, "running N tests".
            self.last = after;
        }
    }
}

/// Each test has to have run once where it was to run; what has not been so.
fn mismatches(wanted: &[(String, String)], told: &[(String, String)]) -> Vec<String> {
    let mut counts: BTreeMap<&(String, String), (u32, u32)> = BTreeMap::new();
    for test in wanted {
        counts.entry(test).or_default().0 += 1;
    }
    for test in told {
        counts.entry(test).or_default().1 += 1;
    }
    let differing = counts
        .into_iter()
        .filter(|(_, (wanted, ran))| wanted != ran);
    differing
        .map(|((kernel, test), (wanted, ran))| {
            format!("{test} on kernel {kernel}: {ran} results, where {wanted} should be")
        })
        .collect()
}

/// What libtest says it did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    /// Tests that ran.
    ran: u64,
    /// Those of them that failed.
    failed: u64,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.ran += other.ran;
        self.failed += other.failed;
    }

    fn take(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else {
            return;
        };
        // "ok. 3 passed; 0 failed; 1 ignored; ..."
        let count = |what: &str| {
            result
                .split(['.', ';'])
                .find_map(|part| part.trim().strip_suffix(what)?.trim().parse::<u64>().ok())
                .unwrap_or(0)
        };
        self.failed += count("failed");
        self.ran += count("passed") + count("failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_over_all_lines() {
        let mut tally = Tally::default();
        tally.take("running 4 tests");
        tally.take("test a ... ok");
        tally.take("test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s");
        tally.take("test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 9 filtered out; finished in 0.1s");
        assert_eq!(tally, Tally { ran: 3, failed: 1 });
    }

    #[test]
    fn tests_are_listed_without_benchmarks() {
        assert_eq!(listed("a: test\nb::c: test\nd: benchmark\n"), ["a", "b::c"]);
    }

    #[test]
    fn tests_are_told_before_what_those_that_failed_printed() {
        let mut said = Said::default();
        for line in [
            "running 3 tests",
            "test a ... ok",
            "test b ... a program's own line",
            "ok",
            "test c ... FAILED",
            "failures:",
            "---- c stdout ----",
            "test a ... printed by c",
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out",
        ] {
            said.take(Duration::ZERO, line);
        }
        assert_eq!(said.told, ["a", "b", "c"]);
        assert_eq!(said.tally, Tally { ran: 3, failed: 1 });
    }

    #[test]
    fn every_test_is_in_one_batch_and_the_last_batches_are_small() {
        let names: Vec<String> = (0..60).map(|number| format!("test{number:02}")).collect();
        for workers in 1..=4 {
            let mut queue = longest_first(&names);
            let mut batches = Vec::new();
            while !queue.is_empty() {
                batches.push(take_share(&mut queue, workers));
            }
            let mut all: Vec<String> = batches.iter().flatten().cloned().collect();
            all.sort();
            assert_eq!(all, names);
            assert!(batches.len() > workers, "{batches:?}");
            let sizes: Vec<usize> = batches.iter().map(Vec::len).collect();
            assert!(sizes.is_sorted_by(|a, b| a >= b), "{sizes:?}");
            assert!(sizes.last().is_some_and(|size| *size <= 7), "{sizes:?}");
        }
    }

    #[test]
    fn a_long_test_is_begun_first() {
        let mut queue = VecDeque::from([("long".to_owned(), 300), ("a".to_owned(), 5)]);
        assert_eq!(take_share(&mut queue, 2), ["long"]);
        assert_eq!(take_share(&mut queue, 2), ["a"]);
    }

    #[test]
    fn tests_that_are_missing_or_doubled_are_named() {
        let on = |test: &str| ("6.12".to_owned(), test.to_owned());
        let wanted = [on("a"), on("b"), on("c")];
        assert!(mismatches(&wanted, &[on("c"), on("a"), on("b")]).is_empty());
        let found = mismatches(&wanted, &[on("a"), on("b"), on("b"), on("d")]);
        let named: Vec<_> = found.iter().map(|line| &line[..1]).collect();
        assert_eq!(named, ["b", "c", "d"]);
        let elsewhere = [("6.1".to_owned(), "a".to_owned()), on("b"), on("c")];
        assert_eq!(mismatches(&wanted, &elsewhere).len(), 2);
    }
}
