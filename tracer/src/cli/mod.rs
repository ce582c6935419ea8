//! The command line: one file a subcommand, each thin.

mod bench;
mod doctor;
mod environment;
mod exit;
mod lab;
mod report;
mod rules;
mod trace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Shows where a Kubernetes Service packet goes on a node, what each step costs,
/// and what a rule change breaks.
#[derive(Debug, Parser)]
#[command(
    name = "svcpath",
    version,
    after_help = "Examples:\n  \
                  sudo svcpath doctor\n  \
                  sudo svcpath bench run --quick --modes iptables-legacy,nftables -o /tmp/run\n  \
                  svcpath report /tmp/run --output markdown\n\n\
                  Exit codes: 0 fine, 1 failure, 2 usage, 3 not permitted, 4 the kernel lacks it, \
                  5 invalid run; 130 and 143 after SIGINT and SIGTERM."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compare modes and sizes: costs of every stage, and what faults lose.
    Bench(bench::Args),
    /// Show a run or a trace as text, Markdown, HTML or JSON.
    Report(report::Args),
    /// Compile a cluster to rules; check, read and walk the rules of a node.
    Rules(rules::Args),
    /// Watch a live node: new flows by Service, what each stage costs, drops, rule changes. Reads only.
    Trace(trace::Args),
    /// Look after the laboratory's namespaces.
    Lab(lab::Args),
    /// What this kernel can do, and what is missing.
    Doctor(doctor::Args),
}

/// Runs the program and turns errors into one line and an exit code.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Bench(args) => bench::run(args),
        Command::Report(args) => report::run(args),
        Command::Rules(args) => rules::run(args),
        Command::Trace(args) => trace::run(&args),
        Command::Lab(args) => lab::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            let code = exit::code_of(&error);
            // A reader that went away (`| head`) is no failure worth a word.
            if code != exit::BROKEN_PIPE {
                exit::say(&exit::one_line(&error));
            }
            ExitCode::from(if code == exit::BROKEN_PIPE { 0 } else { code })
        }
    }
}
