//! `svcpath rules parse`.

use std::process::ExitCode;

use tracer::rules::services;

use super::super::exit;
use super::{Output, Rules};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    svcpath rules parse --live\n  \
    svcpath rules parse --dump /var/tmp/dump --output json | jq '.services[].name'")]
pub(super) struct Args {
    #[command(flatten)]
    rules: Rules,
    /// How to show what the rules say.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let found = services::read(&args.rules.texts()?)?;
    let text = match args.output {
        Output::Json => serde_json::to_string_pretty(&found)? + "\n",
        Output::Text => found.to_string(),
    };
    exit::print(&text)?;
    Ok(ExitCode::SUCCESS)
}
