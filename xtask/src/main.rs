//! The project's own tasks: run, test, vm, build-ebpf, bench.

mod channel;
mod guest;
mod initramfs;
mod interrupt;
mod kernel;
mod packages;
mod qemu;
mod vm;
mod workspace;

use std::fmt;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
    /// Run any command in the VM
    Vm(vm::VmArgs),
}

fn main() -> ExitCode {
    if guest::is_guest() {
        guest::main();
    }
    let outcome = interrupt::watch().and_then(|()| match Cli::parse().task {
        Task::Vm(args) => vm::main(&args),
    });
    interrupt::remove_leftovers();
    match outcome {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("error: {error:#}");
            let code = error
                .downcast_ref::<Failure>()
                .map_or(1, |failure| failure.code);
            code.into()
        }
    }
}
