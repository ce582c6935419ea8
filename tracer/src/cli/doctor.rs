//! `svcpath doctor`: what this kernel can do.

use std::fmt::Write as _;
use std::process::ExitCode;

use super::exit;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    sudo svcpath doctor\n  \
    sudo svcpath doctor --output json | jq '.[] | select(.available | not)'\n\n\
    Exit code 4 if something is missing without which nothing can be measured.")]
pub(crate) struct Args {
    /// Text or JSON.
    #[arg(long, value_parser = ["text", "json"], default_value = "text")]
    output: String,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    exit::require_root("svcpath doctor")?;
    let checks = tracer::scenario::node::examine();
    let mut text = String::new();
    if args.output == "json" {
        text = serde_json::to_string_pretty(&checks)? + "\n";
    } else {
        for check in &checks {
            let mark = if check.available { "yes" } else { "no " };
            // Writing into a String cannot fail.
            let _ = writeln!(text, "{mark}  {:<18} {}", check.what, check.detail);
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
