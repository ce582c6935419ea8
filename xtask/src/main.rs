//! The project's own tasks: run, test, vm, build-ebpf, bench.

mod answers;
mod channel;
mod ebpf;
mod guest;
mod initramfs;
mod interrupt;
mod kernel;
mod lockstep;
mod packages;
mod progress;
mod qemu;
mod run;
mod test;
mod vm;
mod vm_tests;
mod workspace;

use std::fmt;
use std::process::{Command, ExitCode};

use anyhow::{Result, ensure};
use clap::{Args, Parser, Subcommand};
use nix::sys::signal::Signal;

use interrupt::Guarded;

/// An error with an exit code of its own (1 failure, 2 usage, 3 not permitted, 4 kernel lacks it).
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    /// An error that ends xtask with `code`.
    #[expect(
        clippy::new_ret_no_self,
        reason = "failures only ever travel as errors"
    )]
    pub(crate) fn new(code: u8, message: impl Into<String>) -> anyhow::Error {
        Self {
            code,
            message: message.into(),
        }
        .into()
    }

    /// The exit code.
    pub(crate) fn code(&self) -> u8 {
        self.code
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "The project's own tasks"
)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// The main job: prepare the machine, run the comparison, write the report
    Run(run::RunArgs),
    /// Every test, on this machine and in the VM
    Test(test::TestArgs),
    /// Compile the eBPF programs, or check that the compiled object is up to date
    BuildEbpf(ebpf::EbpfArgs),
    /// Criterion benchmarks of svcpath's own hot paths
    Bench(BenchArgs),
    /// Run any command in the VM
    Vm(vm::VmArgs),
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  cargo xtask bench
  cargo xtask bench -- render --baseline main")]
struct BenchArgs {
    /// Passed on to criterion
    #[arg(last = true)]
    arguments: Vec<String>,
}

fn bench(args: &BenchArgs) -> Result<u8> {
    let mut cargo = Command::new(workspace::cargo());
    cargo
        .args(["bench", "-p", "bench"])
        .current_dir(workspace::root());
    if !args.arguments.is_empty() {
        cargo.arg("--").args(&args.arguments);
    }
    let status = Guarded::spawn(&mut cargo, Signal::SIGTERM)?.wait()?;
    ensure!(
        status.success(),
        "benchmarks failed; cargo's output is above"
    );
    Ok(0)
}

fn main() -> ExitCode {
    if guest::is_guest() {
        guest::main();
    }
    let outcome = interrupt::watch().and_then(|()| match Cli::parse().task {
        Task::Run(args) => run::main(&args),
        Task::Test(args) => test::main(&args),
        Task::BuildEbpf(args) => ebpf::main(&args),
        Task::Bench(args) => bench(&args),
        Task::Vm(args) => vm::main(&args),
    });
    interrupt::yield_to_signal();
    interrupt::remove_leftovers();
    match outcome {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("error: {error:#}");
            let code = error.downcast_ref::<Failure>().map_or(1, Failure::code);
            code.into()
        }
    }
}
