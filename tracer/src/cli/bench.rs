//! `svcpath bench`: the comparison, whole or job by job.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};
use tracer::record::run::{Clock, Environment, FORMAT, Place, Run};
use tracer::report;
use tracer::rules::Mode;
use tracer::scenario::assemble::assemble;
use tracer::scenario::job::{self, Part, PartFile};
use tracer::scenario::matrix::{Group, Matrix};

use super::exit;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    svcpath bench run --quick --modes iptables-legacy,nftables -o /tmp/run\n  \
    svcpath bench plan --quick --output json\n  \
    svcpath bench job cell-nftables-1000 --quick -o part.json\n\n\
    `cargo xtask run` does all of this in the right place and writes the report.")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Every job in turn on this machine, then the report.
    Run {
        #[command(flatten)]
        matrix: MatrixArgs,
        /// Where run.json, the histograms and the report go.
        #[arg(short = 'o', value_name = "DIR")]
        dir: PathBuf,
        /// Overwrite a run that is there.
        #[arg(long)]
        force: bool,
    },
    /// The jobs of the comparison.
    Plan {
        #[command(flatten)]
        matrix: MatrixArgs,
        /// Text or JSON.
        #[arg(long, value_parser = ["text", "json"], default_value = "text")]
        output: String,
    },
    /// One job or group of jobs, on this machine, in namespaces of their own.
    Job {
        /// As `plan` names it.
        id: String,
        #[command(flatten)]
        matrix: MatrixArgs,
        /// The clock this machine has: virtual only in a VM that counts instructions.
        #[arg(long, value_enum, default_value = "wall")]
        clock: ClockArg,
        /// Where the part goes.
        #[arg(short = 'o', value_name = "FILE")]
        file: PathBuf,
    },
    /// Parts to run.json, histogram logs and report.
    Assemble {
        #[command(flatten)]
        matrix: MatrixArgs,
        /// Where the part files are.
        #[arg(long, value_name = "DIR")]
        parts: PathBuf,
        /// What is known of when and where (JSON).
        #[arg(long, value_name = "FILE")]
        environment: PathBuf,
        /// Where run.json, the histograms and the report go.
        #[arg(short = 'o', value_name = "DIR")]
        dir: PathBuf,
        /// Overwrite a run that is there.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Clone, Debug, clap::Args)]
struct MatrixArgs {
    /// Fewer flows, and only 100 and 1000 Services.
    #[arg(long)]
    quick: bool,
    /// Seed of every random choice.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Modes to compare [default: all four].
    #[arg(long, value_delimiter = ',', value_name = "MODE,...")]
    modes: Vec<Mode>,
    /// Numbers of Services [default: 100,1000,5000].
    #[arg(long, value_delimiter = ',', value_name = "N,...")]
    services: Vec<u32>,
    /// New flows on each path of a cell [default: 1000, or 200 with --quick].
    #[arg(long, value_name = "N")]
    flows: Option<u32>,
    /// Where the node lives.
    #[arg(long, default_value = "host")]
    place: Place,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ClockArg {
    /// Real time.
    Wall,
    /// 1 ns = 1 guest instruction.
    Virtual,
}

impl MatrixArgs {
    fn matrix(&self) -> anyhow::Result<Matrix> {
        let mut matrix = Matrix::standard(self.quick, self.seed, self.place);
        if !self.modes.is_empty() {
            matrix.modes.clone_from(&self.modes);
            matrix.modes.sort();
            matrix.modes.dedup();
        }
        if !self.services.is_empty() {
            matrix.services.clone_from(&self.services);
            matrix.services.sort_unstable();
            matrix.services.dedup();
        }
        if let Some(flows) = self.flows {
            matrix.flows_per_path = flows;
        }
        matrix.check()?;
        Ok(matrix)
    }
}

/// What the caller knows of when and where; the rest is added here.
#[derive(Debug, Deserialize)]
struct Known {
    started: String,
    duration_s: f64,
    place: Place,
    kernel: String,
    host_kernel: String,
    cpus: u32,
    #[serde(default)]
    tools: BTreeMap<String, String>,
    #[serde(default)]
    command: Vec<String>,
    #[serde(default)]
    notes: Vec<String>,
}

impl Known {
    fn complete(self) -> Environment {
        let Self {
            started,
            duration_s,
            place,
            kernel,
            host_kernel,
            cpus,
            tools,
            command,
            notes,
        } = self;
        Environment {
            started,
            duration_s,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            place,
            kernel,
            host_kernel,
            cpus,
            ebpf: ebpf_object(),
            tools,
            command,
            notes,
        }
    }
}

/// Which eBPF object this program carries, and who compiled it.
fn ebpf_object() -> String {
    let manifest: serde_json::Value =
        serde_json::from_str(tracer::probe::MANIFEST).unwrap_or_default();
    let field = |name: &str| manifest[name].as_str().unwrap_or("unknown").to_owned();
    format!(
        "sha256 {}, {}, {}",
        field("object_sha256"),
        field("rustc"),
        field("linker")
    )
}

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Run { matrix, dir, force } => run_here(&matrix.matrix()?, &dir, force),
        Command::Plan { matrix, output } => plan(&matrix.matrix()?, &output),
        Command::Job {
            id,
            matrix,
            clock,
            file,
        } => {
            let matrix = matrix.matrix()?;
            one_group(&matrix.group(&id)?, &matrix, clock, &file)
        }
        Command::Assemble {
            matrix,
            parts,
            environment,
            dir,
            force,
        } => {
            let matrix = matrix.matrix()?;
            let json = std::fs::read(&environment)
                .with_context(|| format!("cannot read {}", environment.display()))?;
            let known: Known = serde_json::from_slice(&json)
                .with_context(|| format!("{} does not describe a run", environment.display()))?;
            finish(&matrix, &parts, known, &dir, force)
        }
    }
}

fn plan(matrix: &Matrix, output: &str) -> anyhow::Result<ExitCode> {
    let groups: Vec<_> = matrix.groups().iter().map(Group::planned).collect();
    let mut out = std::io::stdout().lock();
    if output == "json" {
        writeln!(
            out,
            "{}",
            serde_json::to_string_pretty(&serde_json::json!({ "jobs": groups }))?
        )?;
    } else {
        for group in groups {
            writeln!(
                out,
                "{:<18} {:>6.1}  {}",
                group.id,
                group.weight,
                group.parts.join(" ")
            )?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn one_group(
    group: &Group,
    matrix: &Matrix,
    clock: ClockArg,
    file: &Path,
) -> anyhow::Result<ExitCode> {
    exit::require_root("svcpath bench job")?;
    let clock = match clock {
        ClockArg::Wall => Clock::Wall,
        ClockArg::Virtual => Clock::Virtual,
    };
    let outcome = execute(group, matrix, &|share, what| {
        eprintln!("progress {share:.3} {what}");
    })?;
    match outcome {
        Outcome::Done(parts) => {
            PartFile { clock, parts }.write(file)?;
            Ok(ExitCode::SUCCESS)
        }
        Outcome::Interrupted(code) => Ok(ExitCode::from(code)),
    }
}

enum Outcome {
    Done(Vec<Part>),
    /// By a signal, with its exit code.
    Interrupted(u8),
}

/// Runs a group until it ends or a signal comes; either way everything it made is gone afterwards.
fn execute(
    group: &Group,
    matrix: &Matrix,
    progress: &job::Progress<'_>,
) -> anyhow::Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let local = tokio::task::LocalSet::new();
    let outcome = local.block_on(&runtime, async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            biased;
            _ = interrupt.recv() => Ok(Outcome::Interrupted(130)),
            _ = terminate.recv() => Ok(Outcome::Interrupted(143)),
            parts = job::run_group(group, matrix, progress) => {
                anyhow::Ok(Outcome::Done(parts?))
            }
        }
    });
    drop(local);
    // A tool may still run on a blocking thread; it dies with its namespace's last user.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

/// Every job in turn in namespaces of this machine.
fn run_here(matrix: &Matrix, dir: &Path, force: bool) -> anyhow::Result<ExitCode> {
    exit::require_root("svcpath bench run")?;
    report::write::check_target(dir, force)?;
    let started = Instant::now();
    let started_at = now_utc();
    let parts = tempdir(dir)?;
    let groups = matrix.groups();
    let bar = progress_bar(groups.iter().map(Group::weight).sum());
    let mut done = 0.0;
    for group in &groups {
        let weight = group.weight();
        let outcome = execute(group, matrix, &|share, what| {
            bar.set_position(((done + share * weight) * 1000.0) as u64);
            bar.set_message(what.to_owned());
        });
        match outcome {
            Ok(Outcome::Done(made)) => PartFile {
                clock: Clock::Wall,
                parts: made,
            }
            .write(&parts.path.join(format!("{}.json", group.id)))?,
            Ok(Outcome::Interrupted(code)) => return Ok(ExitCode::from(code)),
            Err(error) => {
                bar.abandon();
                return Err(error);
            }
        }
        done += weight;
        if bar.is_hidden() {
            eprintln!(
                "{} done, {:.0} s so far",
                group.title,
                started.elapsed().as_secs_f64()
            );
        }
    }
    bar.finish_and_clear();
    let kernel = tracer::kernel::release();
    let known = Known {
        started: started_at,
        duration_s: started.elapsed().as_secs_f64(),
        place: Place::Host,
        kernel: kernel.clone(),
        host_kernel: kernel,
        cpus: std::thread::available_parallelism()
            .map_or(1, |n| u32::try_from(n.get()).unwrap_or(1)),
        tools: BTreeMap::new(),
        command: std::env::args().collect(),
        notes: Vec::new(),
    };
    finish(matrix, &parts.path, known, dir, force)
}

fn finish(
    matrix: &Matrix,
    parts: &Path,
    known: Known,
    dir: &Path,
    force: bool,
) -> anyhow::Result<ExitCode> {
    let run = Run {
        format: FORMAT.to_owned(),
        environment: known.complete(),
        measurements: assemble(matrix, parts)?,
    };
    report::write::write_all(&run, dir, force)?;
    let mut out = std::io::stdout().lock();
    let colour = out.is_terminal();
    write!(out, "{}", terminal_table(&run, colour))?;
    writeln!(out, "report  {}", dir.join("report.html").display())?;
    Ok(ExitCode::SUCCESS)
}

/// The table, as wide as the terminal.
pub(crate) fn terminal_table(run: &Run, colour: bool) -> String {
    let columns = std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok());
    report::terminal::render(run, columns.unwrap_or(110), colour)
}

fn progress_bar(weight: f64) -> ProgressBar {
    let bar = ProgressBar::new((weight * 1000.0) as u64);
    let style = ProgressStyle::with_template("[{bar:26}]  {msg} · {eta} left")
        .map(|style| style.progress_chars("#>-"));
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar
}

/// Now, RFC 3339 in UTC.
fn now_utc() -> String {
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Civil date from days since 1970-01-01 (proleptic Gregorian, era of 400 years).
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 {
        month_index + 3
    } else {
        month_index - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

/// A folder that is removed when it is dropped.
struct TempDir {
    path: PathBuf,
}

fn tempdir(beside: &Path) -> anyhow::Result<TempDir> {
    let mut name = beside.as_os_str().to_owned();
    name.push(format!(".parts-{}", std::process::id()));
    let path = PathBuf::from(name);
    std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(TempDir { path })
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
