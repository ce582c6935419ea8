//! `svcpath bench`: the comparison, whole or job by job.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::signal::Signal;
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};
use tracer::record::run::{Clock, Environment, FORMAT, Measurements, Place, Run};
use tracer::report;
use tracer::report::blocks::Block;
use tracer::rules::Mode;
use tracer::scenario::assemble::{assemble, join};
use tracer::scenario::job::{self, Part, PartFile};
use tracer::scenario::matrix::{Job, Load, Matrix, MatrixError};
use tracer::scenario::node;

use super::{environment, exit};

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
    #[command(after_help = "Example:\n  \
        sudo svcpath bench run --quick --modes iptables-legacy,nftables -o /tmp/run")]
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
    #[command(after_help = "Example:\n  \
        svcpath bench plan --quick --output json | jq -r '.jobs[].id'")]
    Plan {
        #[command(flatten)]
        matrix: MatrixArgs,
        /// Where the node would live.
        #[arg(long, default_value = "host")]
        place: Place,
        /// Text or JSON.
        #[arg(long, value_parser = ["text", "json"], default_value = "text")]
        output: String,
    },
    /// One job, on this machine, in namespaces of its own.
    #[command(after_help = "Example:\n  \
        sudo svcpath bench job cell-nftables-1000 --quick -o cell-nftables-1000.json")]
    Job {
        /// As `plan` names it.
        #[arg(value_name = "JOB")]
        job: Job,
        #[command(flatten)]
        load: LoadArgs,
        /// The clock that the times are to be of; refused if it is not this machine's. Virtual is
        /// that of the VM of `cargo xtask` [default: this machine's].
        #[arg(long, value_enum)]
        clock: Option<ClockArg>,
        /// Where the part goes; a file that is there is replaced.
        #[arg(short = 'o', value_name = "FILE")]
        file: PathBuf,
    },
    /// Parts to run.json, histogram logs and report.
    #[command(after_help = "Example:\n  \
        svcpath bench assemble --quick --parts parts --environment environment.json -o run")]
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
    #[command(flatten)]
    load: LoadArgs,
    /// Modes to compare [default: all four].
    #[arg(long, value_delimiter = ',', value_name = "MODE,...")]
    modes: Vec<Mode>,
    /// Numbers of Services [default: 100,1000,5000; 100,1000 with --quick].
    #[arg(long, value_delimiter = ',', value_name = "N,...")]
    services: Vec<u32>,
}

#[derive(Clone, Debug, clap::Args)]
struct LoadArgs {
    /// Less of everything.
    #[arg(long)]
    quick: bool,
    /// Seed of every random choice.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// New flows on each path of a cell [default: 1000, or 150 with --quick].
    #[arg(long, value_name = "N")]
    flows: Option<u32>,
    /// New flows a second on each path of a fault [default: 100, or 50 with --quick].
    #[arg(long, value_name = "N")]
    rate: Option<u32>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ClockArg {
    /// Real time.
    Wall,
    /// 1 ns = 1 guest instruction.
    Virtual,
}

impl From<ClockArg> for Clock {
    fn from(clock: ClockArg) -> Self {
        match clock {
            ClockArg::Wall => Self::Wall,
            ClockArg::Virtual => Self::Virtual,
        }
    }
}

impl LoadArgs {
    fn load(&self) -> Result<Load, MatrixError> {
        let mut load = Load::standard(self.quick, self.seed);
        load.flows_per_path = self.flows.unwrap_or(load.flows_per_path);
        load.fault_rate = self.rate.unwrap_or(load.fault_rate);
        load.check()?;
        Ok(load)
    }
}

impl MatrixArgs {
    fn matrix(&self, place: Place) -> Result<Matrix, MatrixError> {
        let mut matrix = Matrix::standard(self.load.quick, self.load.seed, place);
        matrix.load = self.load.load()?;
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
            ebpf: environment::ebpf_object(),
            tools,
            command: command
                .iter()
                .map(|word| report::write::printable(word))
                .collect(),
            notes,
        }
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Run { matrix, dir, force } => run_here(&matrix.matrix(Place::Host)?, &dir, force),
        Command::Plan {
            matrix,
            place,
            output,
        } => plan(&matrix.matrix(place)?, &output),
        Command::Job {
            job,
            load,
            clock,
            file,
        } => one_job(job, &load.load()?, clock.map(Clock::from), &file),
        Command::Assemble {
            matrix,
            parts,
            environment,
            dir,
            force,
        } => {
            let json = std::fs::read(&environment)
                .with_context(|| format!("cannot read {}", environment.display()))?;
            let known: Known = serde_json::from_slice(&json)
                .with_context(|| format!("{} does not describe a run", environment.display()))?;
            let matrix = matrix.matrix(known.place)?;
            finish(&matrix, assemble(&matrix, &parts)?, known, &dir, force)
        }
    }
}

fn plan(matrix: &Matrix, output: &str) -> anyhow::Result<ExitCode> {
    matrix.notes().iter().for_each(|note| say(note));
    let jobs = matrix.planned();
    let mut text = String::new();
    if output == "json" {
        text = serde_json::to_string_pretty(&serde_json::json!({ "jobs": jobs }))? + "\n";
    } else {
        for job in jobs {
            // Writing into a String cannot fail.
            let _ = writeln!(text, "{:<32} {:>6.1}", job.id, job.weight);
        }
    }
    exit::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn one_job(job: Job, load: &Load, wanted: Option<Clock>, file: &Path) -> anyhow::Result<ExitCode> {
    exit::require_root("svcpath bench job")?;
    let clock = Clock::of_this_machine();
    if let Some(wanted) = wanted.filter(|wanted| *wanted != clock) {
        return Err(exit::Usage(
            match wanted {
                Clock::Virtual => {
                    "--clock virtual: this machine does not count instructions; \
                               `cargo xtask run --clock virtual` starts a VM that does"
                }
                Clock::Wall => {
                    "--clock wall: this machine counts instructions; \
                            `cargo xtask run --clock wall` starts a VM that does not"
                }
            }
            .to_owned(),
        )
        .into());
    }
    report::write::check_file(file, true)?;
    let part = execute(job, load, &|share, what| {
        say(&format!("progress {share:.3} {}: {what}", job.title()));
    })?;
    let json = serde_json::to_vec(&PartFile { clock, part })?;
    report::write::write_file(file, &json, true)?;
    Ok(ExitCode::SUCCESS)
}

/// A line of progress. Nobody may be listening, which is no reason to stop or, as `eprintln!`
/// does, to panic.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Runs a job until it ends or a signal comes; either way everything it made is gone afterwards.
fn execute(job: Job, load: &Load, progress: &job::Progress<'_>) -> anyhow::Result<Part> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let local = tokio::task::LocalSet::new();
    let outcome = local.block_on(&runtime, async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut stop = async || {
            tokio::select! {
                _ = interrupt.recv() => exit::Interrupted(Signal::SIGINT),
                _ = terminate.recv() => exit::Interrupted(Signal::SIGTERM),
            }
        };
        let work = async {
            job::quiet().await;
            job::run(job, load, progress).await
        };
        let error = tokio::select! {
            biased;
            stopped = stop() => return Err(stopped.into()),
            part = work => match part {
                Ok(part) => return Ok(part),
                Err(error) => error,
            },
        };
        // Ctrl-C reaches the tools too, and the end of one may be seen before our own signal.
        match tokio::time::timeout(Duration::from_millis(100), stop()).await {
            Ok(stopped) => Err(stopped.into()),
            Err(_) => Err(anyhow::Error::from(error)),
        }
    });
    drop(local);
    // A tool may still run on a blocking thread; it is killed when this process ends.
    runtime.shutdown_timeout(Duration::from_secs(1));
    // That thread may have made the lock file anew after the laboratory had removed it.
    tracer::lab::clean::remove_own_lock();
    outcome
}

/// Every job in turn in namespaces of this machine.
fn run_here(matrix: &Matrix, dir: &Path, force: bool) -> anyhow::Result<ExitCode> {
    exit::require_root("svcpath bench run")?;
    report::write::check_target(dir, force)?;
    let started = Instant::now();
    let started_at = environment::now_utc();
    let jobs = matrix.jobs();
    // What the last job lacks should not be found out after hours.
    node::require(&matrix.modes)?;
    let bar = progress_bar(jobs.iter().map(|job| job.weight()).sum());
    let mut parts = Vec::with_capacity(jobs.len());
    let mut done = 0.0;
    for job in jobs {
        let (title, weight) = (job.title(), job.weight());
        let made = execute(job, &matrix.load, &|share, what| {
            bar.set_position(bar_units(done + share * weight));
            bar.set_message(format!("{title}: {what}"));
        });
        let part = match made {
            Ok(part) => part,
            Err(error) => {
                bar.finish_and_clear();
                return Err(if error.is::<exit::Interrupted>() {
                    error
                } else {
                    error.context(title)
                });
            }
        };
        parts.push(PartFile {
            clock: Clock::of_this_machine(),
            part,
        });
        done += weight;
        if bar.is_hidden() {
            let seconds = started.elapsed().as_secs_f64();
            say(&format!("{title} done, {seconds:.0} s so far"));
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
        cpus: environment::cpus(),
        tools: BTreeMap::new(),
        command: std::env::args().collect(),
        notes: Vec::new(),
    };
    finish(matrix, join(matrix, parts)?, known, dir, force)
}

fn finish(
    matrix: &Matrix,
    measurements: Measurements,
    mut known: Known,
    dir: &Path,
    force: bool,
) -> anyhow::Result<ExitCode> {
    known.notes.extend(matrix.notes());
    let run = Run {
        format: FORMAT.to_owned(),
        environment: known.complete(),
        measurements,
    };
    report::write::write_all(&run, dir, force)?;
    let table = terminal(
        &report::blocks::summary(&run),
        std::io::stdout().is_terminal(),
    );
    let page = dir.join(report::write::HTML_FILE);
    exit::print(&format!("{table}report  {}\n", page.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Tables and lines, as wide as the terminal.
pub(crate) fn terminal(blocks: &[Block], colour: bool) -> String {
    let said = std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok());
    let shown = || terminal_size::terminal_size_of(std::io::stdout()).map(|(width, _)| width.0);
    let columns = said.or_else(shown).filter(|columns| *columns > 0);
    report::terminal::render(blocks, columns.unwrap_or(110), colour)
}

/// The bar counts in whole numbers.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "weights are small and positive"
)]
fn bar_units(weight: f64) -> u64 {
    (weight * 1000.0) as u64
}

fn progress_bar(weight: f64) -> ProgressBar {
    let bar = ProgressBar::new(bar_units(weight));
    let style = ProgressStyle::with_template("[{bar:26}]  {msg} · {eta} left")
        .map(|style| style.progress_chars("#>-"));
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar
}

#[cfg(test)]
mod tests {
    use clap::{FromArgMatches as _, Parser as _};
    use tracer::scenario::matrix::JobKind;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        matrix: MatrixArgs,
    }

    fn planned(line: &str) -> Vec<Vec<String>> {
        let line = Line::try_parse_from(line.split_whitespace()).expect("parses");
        let matrix = line.matrix.matrix(Place::Vm).expect("can be run");
        let jobs = matrix.planned().into_iter();
        jobs.map(|job| job.arguments).collect()
    }

    #[test]
    fn jobs_are_the_same_however_they_were_asked_for() {
        let plain = planned("bench --quick --modes nftables,ipvs --services 100,1000");
        assert_eq!(plain.len(), 6);
        for other in [
            "bench --quick --modes nftables,ipvs --services 100,1000 --seed 42",
            "bench --seed=042 --services=1000,100,100 --modes=ipvs --modes nftables --quick",
            "bench --quick --modes nftables,ipvs --services 100,1000 --flows 150 --rate 50",
        ] {
            assert_eq!(planned(other), plain, "{other}");
        }
        assert_ne!(
            planned("bench --quick --modes nftables,ipvs --services 100,1000 --seed 43"),
            plain
        );
    }

    #[test]
    fn a_job_takes_what_the_plan_says() {
        for arguments in planned("bench --seed 7 --flows 33 --rate 9 --services 100") {
            let line = ["svcpath", "job", "-o", "part.json"].map(str::to_owned);
            let line = line.into_iter().chain(arguments);
            let Command::Job { job, load, .. } = Command::from_arg_matches(
                &Command::augment_subcommands(clap::Command::new("svcpath")).get_matches_from(line),
            )
            .expect("parses") else {
                panic!("a job was asked for");
            };
            let load = load.load().expect("can be sent");
            assert_eq!(load.seed, 7);
            match job.kind {
                JobKind::Cell => assert_eq!(load.flows_per_path, 33),
                JobKind::Flush | JobKind::Switch(_) => assert_eq!(load.fault_rate, 9),
            }
        }
    }
}
