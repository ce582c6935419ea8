//! `svcpath lab`.

use std::process::ExitCode;

use clap::Subcommand;

use super::exit;

const EXAMPLES: &str = "Example:\n  sudo svcpath lab clean";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Remove what a killed run left behind. Every run does this when it starts.
    ///
    /// Namespaces, links, rules and probes end with the process that made them, even after
    /// `kill -9`: the laboratory's namespaces have no name and live by file descriptors alone. What
    /// can stay are small files and, for a moment, a tool that was running.
    #[command(after_help = EXAMPLES)]
    Clean,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Clean => {
            exit::require_root("svcpath lab clean")?;
            let removed = tracer::lab::clean::clean()?;
            if removed.is_empty() {
                exit::print("nothing to remove\n")?;
            }
            for what in removed {
                exit::print(&format!("removed {what}\n"))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
