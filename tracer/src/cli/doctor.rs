//! `svcpath doctor`: what this kernel can do.

use std::process::ExitCode;

use super::exit;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print JSON instead of text.
    #[arg(long, value_parser = ["text", "json"], default_value = "text")]
    output: String,
}

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let checks = tracer::scenario::node::examine();
    if args.output == "json" {
        println!("{}", serde_json::to_string_pretty(&checks)?);
    } else {
        for check in &checks {
            let mark = if check.available { "yes" } else { "no " };
            println!("{mark}  {:<18} {}", check.what, check.detail);
        }
    }
    Ok(
        if checks.iter().any(|check| check.needed && !check.available) {
            ExitCode::from(exit::KERNEL_LACKS)
        } else {
            ExitCode::SUCCESS
        },
    )
}
