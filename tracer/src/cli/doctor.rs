//! `svcpath doctor`: what this kernel can do.

use std::fmt::Write as _;
use std::process::ExitCode;

use tracer::record::run::Clock;
use tracer::scenario::cost;

use super::exit;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    sudo svcpath doctor\n  \
    sudo svcpath doctor --output json | jq '.[] | select(.available | not)'\n  \
    sudo svcpath doctor --cost\n  \
    sudo svcpath doctor --cost --against bpftrace\n\n\
    Exit code 4 if something is missing without which nothing can be measured.")]
pub(crate) struct Args {
    /// Text or JSON.
    #[arg(long, value_parser = ["text", "json"], default_value = "text")]
    output: String,
    /// Measure what the probes of each tier cost here, on a node of our own in namespaces: packets and TCP
    /// requests with and without, some three minutes.
    #[arg(long)]
    cost: bool,
    /// Measure them against this tool instead, which has to be installed; in iptables-legacy mode.
    #[arg(long, value_name = "TOOL", requires = "cost", value_parser = ["bpftrace"])]
    against: Option<String>,
    /// Rounds of it with each set of probes; default: 15, and 1 on the virtual clock, where all are alike.
    #[arg(long, value_name = "N", requires = "cost", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
}

/// Rounds of each set of probes, and packets of each kind in a round.
const ROUNDS: u32 = 15;
const PACKETS: u32 = 2000;
/// On the virtual clock every round is the same.
const ROUNDS_VIRTUAL: u32 = 1;

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    exit::require_root("svcpath doctor")?;
    if args.cost {
        return cost(args);
    }
    let checks = tracer::scenario::node::examine();
    let mut text = String::new();
    if args.output == "json" {
        text = serde_json::to_string_pretty(&checks)? + "\n";
    } else {
        for check in &checks {
            // Writing into a String cannot fail.
            let _ = writeln!(text, "{check}");
        }
    }
    exit::print(&text)?;
    Ok(
        if checks.iter().any(|check| check.needed && !check.available) {
            ExitCode::from(exit::KERNEL_LACKS)
        } else {
            ExitCode::SUCCESS
        },
    )
}

/// What the probes cost here.
fn cost(args: &Args) -> anyhow::Result<ExitCode> {
    let usual = match Clock::of_this_machine() {
        Clock::Wall => ROUNDS,
        Clock::Virtual => ROUNDS_VIRTUAL,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let rounds = args.rounds.unwrap_or(usual);
    let report = match args.against {
        Some(_) => runtime.block_on(cost::measure_against_bpftrace(rounds, PACKETS))?,
        None => runtime.block_on(cost::measure(rounds, PACKETS))?,
    };
    let text = if args.output == "json" {
        serde_json::to_string_pretty(&report)? + "\n"
    } else {
        report.to_string()
    };
    exit::print(&text)?;
    Ok(ExitCode::SUCCESS)
}
