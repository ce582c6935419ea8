//! `svcpath report`: a run or a trace as text, Markdown, HTML or JSON.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::ValueEnum;

use tracer::report::{Recorded, markdown, read, write};

use super::exit;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    svcpath report target/svcpath/2026-11-20T17-02-11\n  \
    svcpath report run.json --output html -o report.html\n  \
    svcpath report before/ after/\n  \
    svcpath report run.json --output json | jq .measurements.cells[0].apply_ns\n  \
    svcpath report trace.json --output json | jq .summary.services[].name")]
pub(crate) struct Args {
    /// A run.json or trace.json, or the folder it is in. Several are shown one after the other, as text
    /// or Markdown.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
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
    /// The tables of the terminal.
    Text,
    /// The same as Markdown.
    Markdown,
    /// A page without any outside reference.
    Html,
    /// The run itself, checked.
    Json,
}

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.runs.len() > 1 && matches!(args.output, Output::Html | Output::Json) {
        let only = "--output html and json take one run at a time; text and markdown take several";
        return Err(exit::Usage(only.to_owned()).into());
    }
    if let Some(file) = &args.file {
        write::check_file(file, args.force)?;
    }
    let colour = args.file.is_none() && std::io::stdout().is_terminal();
    let mut text = String::new();
    for path in &args.runs {
        let run = read::recorded(path)?;
        if args.runs.len() > 1 {
            let gap = if text.is_empty() { "" } else { "\n" };
            text += gap;
            text += &title(path, args.output);
        }
        text += &shown(&run, args.output, colour)?;
    }
    let Some(file) = args.file else {
        exit::print(&text)?;
        return Ok(ExitCode::SUCCESS);
    };
    write::write_file(&file, text.as_bytes(), args.force)?;
    Ok(ExitCode::SUCCESS)
}

/// What stands above one of several runs.
fn title(path: &Path, output: Output) -> String {
    match output {
        Output::Markdown => format!("## {}\n\n", path.display()),
        _ => format!("== {} ==\n", path.display()),
    }
}

fn shown(run: &Recorded, output: Output, colour: bool) -> anyhow::Result<String> {
    Ok(match output {
        Output::Text => super::bench::terminal(&run.blocks(), colour),
        Output::Markdown => markdown::render(&run.blocks()),
        Output::Html => run.html(),
        Output::Json => run.json()?,
    })
}
