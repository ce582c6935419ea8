//! `cargo xtask test`: every test, on this machine and in the VM.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use nix::sys::signal::Signal;
use serde::Deserialize;

use crate::channel::Job;
use crate::guest::HOME;
use crate::interrupt::Guarded;
use crate::qemu::{Clock, Line, Vm, simple_job};
use crate::run::{Place, build_svcpath};
use crate::vm::{VmOptions, image, print_line, release_binary};
use crate::{Failure, ebpf, packages, workspace};

/// `cargo xtask test`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask test                      everything
  cargo xtask test --place vm           only the tests that need a kernel with IPVS
  cargo xtask test --place vm ipvs      of those, the ones with ipvs in their name
  cargo xtask test --kernel 6.1         the VM tests on another kernel

Tests that need no special kernel run here, in network namespaces of their own (cargo test
--workspace); those of tests/vm.rs run in a VM on the virtual clock.")]
pub(crate) struct TestArgs {
    /// Run only the tests of one place
    #[arg(long, value_enum)]
    place: Option<Place>,
    #[command(flatten)]
    vm: VmOptions,
    /// Say what is missing instead of installing it
    #[arg(long)]
    no_install: bool,
    /// Run only tests whose names contain this
    filter: Option<String>,
}

/// Runs the tests; 0 when all passed.
pub(crate) fn main(args: &TestArgs) -> Result<u8> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Failure::new(
            3,
            "`cargo xtask test` builds network namespaces and loads probes: run it as root",
        ));
    }
    packages::prepare(&packages::NEEDS, !args.no_install)?;
    ebpf::check()?;
    let mut failed = Vec::new();
    if args.place != Some(Place::Vm) && !on_host(args)? {
        failed.push("here");
    }
    if args.place != Some(Place::Host) && !in_vm(args)? {
        failed.push("in the VM");
    }
    ensure!(
        failed.is_empty(),
        "tests failed {}; their output is above",
        failed.join(" and ")
    );
    Ok(0)
}

fn on_host(args: &TestArgs) -> Result<bool> {
    let mut cargo = Command::new(workspace::cargo());
    cargo
        .args(["test", "--workspace"])
        .args(args.filter.as_ref())
        .current_dir(workspace::root());
    Ok(Guarded::spawn(&mut cargo, Signal::SIGTERM)?
        .wait()?
        .success())
}

fn in_vm(args: &TestArgs) -> Result<bool> {
    build_svcpath()?;
    let binary = build_vm_tests()?;
    let name = binary
        .file_name()
        .context("cargo names no test program")?
        .to_string_lossy()
        .into_owned();
    let mut files = vec![binary];
    files.extend(release_binary());
    let cache = workspace::vm_cache();
    let image = image(args.vm.kernel.as_deref(), &files, &cache)?;
    eprintln!(
        "     Running tests/vm.rs in the VM (kernel {})",
        image.kernel.release
    );
    let vm = Vm::new(
        image,
        Clock::Virtual,
        args.vm.memory,
        Duration::from_secs(args.vm.time_limit),
        &cache,
    );
    let mut argv = vec![name, "--test-threads=1".to_owned()];
    argv.extend(args.filter.clone());
    let job = Job {
        argv,
        env: [
            ("RUST_BACKTRACE".to_owned(), "1".to_owned()),
            ("SVCPATH".to_owned(), "/usr/local/bin/svcpath".to_owned()),
        ]
        .into(),
        cwd: HOME.to_owned(),
    };
    let mut tally = Tally::default();
    let output = vm.run(
        &job,
        &mut |line| {
            if let Line::Stdout(bytes) = line {
                tally.take(&String::from_utf8_lossy(bytes));
            }
            print_line(line);
        },
        &AtomicBool::new(false),
    )?;
    // A filter may mean tests of the other place only.
    ensure!(
        tally.ran > 0 || args.filter.is_some(),
        "no test ran in the VM: tests/vm.rs should have some"
    );
    Ok(output.exit == 0 && tally.failed == 0 && clock_repeats(&vm)?)
}

/// Do two boots at the same time print the same nanoseconds and the same random bytes? On this
/// every figure taken on the virtual clock rests.
fn clock_repeats(vm: &Vm) -> Result<bool> {
    const SCRIPT: &str = "for i in $(seq 200); do date +%s.%N; done; \
        iptables-legacy -t nat -A OUTPUT -j ACCEPT; date +%s.%N; sleep 30; date +%s.%N; \
        od -An -tx1 -N64 /dev/urandom";
    let boot = || -> Result<Vec<Vec<u8>>> {
        let mut lines = Vec::new();
        let job = simple_job(&["sh", "-ec", SCRIPT]);
        let output = vm.run(
            &job,
            &mut |line| {
                if let Line::Stdout(bytes) = line {
                    lines.push(bytes.to_vec());
                }
            },
            &AtomicBool::new(false),
        )?;
        ensure!(output.exit == 0, "the clock's script fails in the VM");
        Ok(lines)
    };
    let (one, other) = std::thread::scope(|scope| {
        let one = scope.spawn(boot);
        let other = boot();
        (one.join(), other)
    });
    let one = one.map_err(|_| anyhow::anyhow!("a VM's thread panicked"))??;
    let other = other?;
    let differing = one.iter().zip(&other).filter(|(a, b)| a != b).count();
    let same = one == other && one.len() >= 206;
    println!(
        "two boots on the virtual clock ... {}",
        if same {
            "ok, equal to the nanosecond".to_owned()
        } else {
            format!("FAILED, {differing} of {} lines differ", one.len())
        }
    );
    Ok(same)
}

/// Builds tests/vm.rs; the program.
fn build_vm_tests() -> Result<PathBuf> {
    let mut cargo = Command::new(workspace::cargo());
    cargo
        .args([
            "test",
            "-p",
            "tests",
            "--features",
            "vm",
            "--test",
            "vm",
            "--no-run",
        ])
        .arg("--message-format=json-render-diagnostics")
        .current_dir(workspace::root())
        .stdout(Stdio::piped());
    let mut child = Guarded::spawn(&mut cargo, Signal::SIGTERM)?;
    let stdout = child.child().stdout.take().context("cargo has no output")?;
    let mut program = None;
    for line in BufReader::new(stdout).lines() {
        program = executable(&line.context("cannot read cargo's output")?).or(program);
    }
    ensure!(
        child.wait()?.success(),
        "the VM tests do not build; cargo's errors are above"
    );
    program.context("cargo built no test program from tests/vm.rs")
}

#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// The test program that a line of cargo's JSON announces.
fn executable(line: &str) -> Option<PathBuf> {
    let message: Message = serde_json::from_str(line).ok()?;
    let target = message.target?;
    (target.name == "vm" && target.kind == ["test"])
        .then_some(message.executable)
        .flatten()
}

/// What libtest says it did.
#[derive(Debug, Default, PartialEq)]
struct Tally {
    ran: u64,
    failed: u64,
}

impl Tally {
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
    fn the_program_is_found_among_cargos_messages() {
        let found = r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"vm","src_path":"/x"},"executable":"/t/vm-1"}"#;
        assert_eq!(executable(found), Some("/t/vm-1".into()));
        let library = r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"vm"},"executable":null}"#;
        assert_eq!(executable(library), None);
        assert_eq!(
            executable(r#"{"reason":"build-finished","success":true}"#),
            None
        );
        assert_eq!(executable("warning: text"), None);
    }
}
