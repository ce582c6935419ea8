//! `svcpath report`: a run as terminal table, Markdown, HTML or JSON.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;

use tracer::report::write;

use super::exit;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    svcpath report target/svcpath/2026-11-20T17-02-11\n  \
    svcpath report run.json --output html -o report.html\n  \
    svcpath report run.json --output json | jq .measurements.cells[0].apply_ns")]
pub(crate) struct Args {
    /// A run.json, or the folder it is in.
    run: PathBuf,
    /// What to write.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
    /// Write to this file instead of standard output.
    #[arg(short = 'o', value_name = "FILE")]
    file: Option<PathBuf>,
    /// Overwrite the file if it exists.
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    /// The table of the terminal.
    Text,
    /// The same as Markdown.
    Markdown,
    /// A page without any outside reference.
    Html,
    /// The run itself, checked.
    Json,
}

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let path = if args.run.is_dir() {
        args.run.join("run.json")
    } else {
        args.run.clone()
    };
    if let Some(file) = &args.file {
        write::check_file(file, args.force)?;
    }
    let run = tracer::report::read::read(&path)?;
    let text = match args.output {
        Output::Text => super::bench::terminal_table(
            &run,
            args.file.is_none() && std::io::stdout().is_terminal(),
        ),
        Output::Markdown => {
            tracer::report::markdown::render(&tracer::report::blocks::summary(&run))
        }
        Output::Html => tracer::report::html::render(&run),
        Output::Json => serde_json::to_string_pretty(&run)? + "\n",
    };
    let Some(file) = args.file else {
        exit::print(&text)?;
        return Ok(ExitCode::SUCCESS);
    };
    write::write_file(&file, text.as_bytes(), args.force)?;
    Ok(ExitCode::SUCCESS)
}
