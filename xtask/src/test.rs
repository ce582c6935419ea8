//! `cargo xtask test`: every test, on this machine and in the VM.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use nix::sys::signal::Signal;
use serde::Deserialize;

use crate::answers::{self, Answers, OLDER, TELLS};
use crate::interrupt::Guarded;
use crate::qemu::{Clock, Line, Vm, simple_job};
use crate::run::{Place, build_svcpath, vms_at_a_time};
use crate::vm::{VmOptions, image, release_binary};
use crate::vm_tests::{self, Batch};
use crate::{Failure, ebpf, packages, workspace};

/// More VMs at a time are not worth their boots: the longest tests alone take a minute.
const MOST_VMS: usize = 4;

/// `cargo xtask test`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask test                      everything
  cargo xtask test --place vm           only the tests that need a kernel with IPVS
  cargo xtask test --place vm ipvs      of those, the ones with ipvs in their name
  cargo xtask test --kernel 6.1         the VM tests on another kernel

Tests that need no special kernel run here, in network namespaces of their own (cargo test
--workspace); those of tests/vm.rs run on the virtual clock, in as many VMs at a time as there are
CPUs (at most 4). What this kernel, the VM's and 6.1 tell of the same packets is compared at the
end; it stays in target/svcpath-answers.")]
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
    let answers = Answers::prepare(args.filter.as_deref())?;
    let mut failed = Vec::new();
    if args.place != Some(Place::Vm) && !on_host(args, answers.as_ref())? {
        failed.push("here");
    }
    if args.place != Some(Place::Host) && !in_vm(args, answers.as_ref())? {
        failed.push("in the VM");
    }
    let kept = answers.map_or(Ok(()), Answers::keep);
    ensure!(
        failed.is_empty(),
        "tests failed {}; their output is above",
        failed.join(" and ")
    );
    kept.map(|()| 0)
}

fn on_host(args: &TestArgs, answers: Option<&Answers>) -> Result<bool> {
    let mut cargo = Command::new(workspace::cargo());
    cargo
        .args(["test", "--workspace"])
        .args(args.filter.as_ref())
        .envs(answers.map(Answers::variable))
        .current_dir(workspace::root());
    Ok(Guarded::spawn(&mut cargo, Signal::SIGTERM)?
        .wait()?
        .success())
}

fn in_vm(args: &TestArgs, answers: Option<&Answers>) -> Result<bool> {
    build_svcpath()?;
    let programs = build_vm_tests()?;
    let program = |name| {
        let built: Option<&PathBuf> = programs.get(name);
        built.with_context(|| format!("cargo built no test program from tests/{name}.rs"))
    };
    let vm_tests = program("vm")?;
    let tests = vm_tests::list(vm_tests, args.filter.as_deref())?;
    if tests.is_empty() {
        // A filter may mean tests of the other place only.
        ensure!(
            args.filter.is_some(),
            "tests/vm.rs has no tests: it should have some"
        );
        return Ok(true);
    }
    if args.filter.is_none() {
        let unknown = vm_tests::unknown_of_longest(&tests);
        ensure!(
            unknown.is_empty(),
            "the table of long tests (xtask/src/vm_tests.rs) names tests that are no more: {}",
            unknown.join(", ")
        );
    }
    let mut files = vec![vm_tests.clone()];
    files.extend(release_binary());
    let vm = machine(args, args.vm.kernel.as_deref(), &files)?;
    let mut well = true;
    let older = answers.and_then(|_| {
        let older = machine(args, Some(OLDER), &files);
        let older = older.inspect_err(|error| {
            eprintln!("error: no kernel {OLDER} to compare with: {error:#}");
            well = false;
        });
        older.ok()
    });
    let release = |vm: &Vm| vm.image.kernel.release.clone();
    let older = older.filter(|older| release(older) != release(&vm));
    let batch = |vm| Batch {
        vm,
        tests: vec![TELLS.to_owned()],
    };
    let telling: Vec<Batch<'_>> = older.iter().map(batch).collect();
    let workers = vms_at_a_time(tests.len() + telling.len(), args.vm.memory).min(MOST_VMS);
    eprintln!(
        "     Running {} tests of tests/vm.rs (kernel {}), {workers} VMs at a time",
        tests.len(),
        release(&vm)
    );
    let outcome = vm_tests::run(vm_tests, &vm, &tests, telling, workers)?;
    well &= !outcome.failed;
    if let Some(answers) = answers {
        answers.take(&outcome.files)?;
        let mut kernels: Vec<String> = [Some(&vm), older.as_ref()]
            .into_iter()
            .flatten()
            .map(release)
            .collect();
        if args.place.is_none() {
            kernels.push(answers::kernel_here()?);
        }
        well &= answers.agree(program("kernels")?, &kernels)?;
    }
    Ok(clock_repeats(&vm)? && well)
}

/// A machine with this kernel and these programs.
fn machine(args: &TestArgs, kernel: Option<&str>, files: &[PathBuf]) -> Result<Vm> {
    let cache = workspace::vm_cache();
    Ok(Vm::new(
        image(kernel, files, &cache)?,
        Clock::Virtual,
        args.vm.memory,
        Duration::from_secs(args.vm.time_limit),
        &cache,
    ))
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

/// Builds tests/vm.rs and tests/kernels.rs; the programs by name.
fn build_vm_tests() -> Result<BTreeMap<String, PathBuf>> {
    let mut cargo = Command::new(workspace::cargo());
    cargo
        .args(["test", "--release", "-p", "tests", "--features", "vm"])
        .args(["--no-run"])
        .args(["--test", "vm", "--test", "kernels"])
        .arg("--message-format=json-render-diagnostics")
        .current_dir(workspace::root())
        .stdout(Stdio::piped());
    let mut child = Guarded::spawn(&mut cargo, Signal::SIGTERM)?;
    let stdout = child.child().stdout.take().context("cargo has no output")?;
    let mut programs = BTreeMap::new();
    for line in BufReader::new(stdout).lines() {
        programs.extend(executable(&line.context("cannot read cargo's output")?));
    }
    ensure!(
        child.wait()?.success(),
        "the VM tests do not build; cargo's errors are above"
    );
    Ok(programs)
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

/// The test program that a line of cargo's JSON announces, by its name.
fn executable(line: &str) -> Option<(String, PathBuf)> {
    let message: Message = serde_json::from_str(line).ok()?;
    let target = message.target?;
    let program = message.executable.filter(|_| target.kind == ["test"])?;
    Some((target.name, program))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_found_among_cargos_messages() {
        let found = r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"vm","src_path":"/x"},"executable":"/t/vm-1"}"#;
        assert_eq!(executable(found), Some(("vm".to_owned(), "/t/vm-1".into())));
        let library = r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"vm"},"executable":null}"#;
        assert_eq!(executable(library), None);
        assert_eq!(
            executable(r#"{"reason":"build-finished","success":true}"#),
            None
        );
        assert_eq!(executable("warning: text"), None);
    }
}
