//! `cargo xtask run`: prepares the machine, runs the comparison, writes the report.
//!
//! What there is to measure is svcpath's business: it is asked for its plan, runs one job of it
//! at a time wherever it is put, and joins the parts. Here is decided where and how many at once.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::channel::{Job, progress};
use crate::guest::OUT;
use crate::interrupt::{self, Guarded};
use crate::packages::{self, find_program, version_of};
use crate::progress::Progress;
use crate::qemu::{Clock, Line, Vm, simple_job};
use crate::vm::{VmOptions, image};
use crate::{Failure, workspace};

const MODES: [&str; 4] = ["iptables-legacy", "iptables-nft", "ipvs", "nftables"];
/// The most Services that svcpath takes. It refuses more itself, but it has to be built first.
const MAX_SERVICES: u32 = 30_000;
/// Bytes that the largest run's folder takes.
const RUN_BYTES: usize = 4 << 20;
/// Beside the parts: when and where.
const ENVIRONMENT: &str = "environment";
/// How many of a failed job's last lines are shown.
const LAST_LINES: usize = 20;

/// Where the node under test lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Place {
    /// Network namespaces of this machine
    Host,
    /// Network namespaces in a virtual machine
    Vm,
}

impl Place {
    fn word(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Vm => "vm",
        }
    }
}

/// `cargo xtask run`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask run --quick                        a small comparison of all modes
  cargo xtask run --modes ipvs,nftables --services 100,1000
  cargo xtask run --place vm --clock wall        real time instead of instructions
  cargo xtask run --quick --seed 7 -o /tmp/run7

The place is this machine when its kernel has all that the modes need, else a VM. In a VM the
clock is virtual unless --clock wall is given: one nanosecond is one guest instruction, and equal
runs give equal figures. Exit codes: 0 fine, 1 failure, 2 usage, 3 not root, 4 kernel lacks what
was asked for, 5 run invalid, 130/143 interrupted.")]
pub(crate) struct RunArgs {
    #[command(flatten)]
    matrix: Matrix,
    /// Where to measure; chosen by what this kernel has unless given
    #[arg(long, value_enum)]
    place: Option<Place>,
    /// What a nanosecond is; virtual needs the VM
    #[arg(long, value_enum)]
    clock: Option<Clock>,
    #[command(flatten)]
    vm: VmOptions,
    /// Say what is missing instead of installing it
    #[arg(long)]
    no_install: bool,
    /// Directory of the report [default: target/svcpath/<UTC time>]
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Write into an output directory that has something in it
    #[arg(long)]
    force: bool,
}

/// What is compared; passed to svcpath as it is.
#[derive(Clone, Debug, Default, Args)]
struct Matrix {
    /// Fewer sizes and packets
    #[arg(long)]
    quick: bool,
    /// Seed of every random choice
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Modes to compare: iptables-legacy, iptables-nft, ipvs, nftables
    #[arg(long, value_delimiter = ',', value_name = "A,B")]
    modes: Vec<String>,
    /// Numbers of Services
    #[arg(long, value_delimiter = ',', value_name = "N,N")]
    services: Vec<u32>,
}

impl Matrix {
    /// Refuses what can be seen to be wrong before svcpath is built.
    fn check(&self) -> Result<()> {
        let unknown = |mode: &&String| !MODES.contains(&mode.as_str());
        if let Some(mode) = self.modes.iter().find(unknown) {
            let known = MODES.join(", ");
            return Err(Failure::new(
                2,
                format!("unknown mode '{mode}': use some of {known}"),
            ));
        }
        let impossible = |n: &&u32| !(1..=MAX_SERVICES).contains(*n);
        if let Some(services) = self.services.iter().find(impossible) {
            return Err(Failure::new(
                2,
                format!("{services} Services: use 1 to {MAX_SERVICES}"),
            ));
        }
        Ok(())
    }

    fn flags(&self) -> Vec<String> {
        let mut flags = Vec::new();
        if self.quick {
            flags.push("--quick".to_owned());
        }
        if let Some(seed) = self.seed {
            flags.extend(["--seed".to_owned(), seed.to_string()]);
        }
        if !self.modes.is_empty() {
            flags.extend(["--modes".to_owned(), self.modes.join(",")]);
        }
        if !self.services.is_empty() {
            let numbers: Vec<String> = self.services.iter().map(u32::to_string).collect();
            flags.extend(["--services".to_owned(), numbers.join(",")]);
        }
        flags
    }
}

/// What this machine's kernel has of what a run needs.
#[derive(Clone, Debug)]
struct HostKernel {
    release: String,
    ipvs: bool,
    dummy: bool,
}

impl HostKernel {
    /// Looks without loading or creating anything.
    fn look() -> Self {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let module = |name: &str| {
            // A dry run answers for modules on disk and for what is built in and listed there.
            Path::new("/sys/module").join(name).exists()
                || find_program("modprobe").is_some_and(|modprobe| {
                    Command::new(modprobe)
                        .args(["--dry-run", "--quiet", name])
                        .status()
                        .is_ok_and(|status| status.success())
                })
        };
        Self {
            release: release.trim().to_owned(),
            ipvs: Path::new("/proc/net/ip_vs").exists() || module("ip_vs"),
            dummy: module("dummy"),
        }
    }

    fn series(&self) -> String {
        let numbers: Vec<&str> = self.release.split(['.', '-']).take(2).collect();
        numbers.join(".")
    }

    /// Netfilter BPF links came with 6.4.
    fn has_links(&self) -> bool {
        let mut numbers = self
            .release
            .split(['.', '-'])
            .map_while(|part| part.parse::<u32>().ok());
        (numbers.next(), numbers.next()) >= (Some(6), Some(4))
    }

    /// What is missing for IPVS, which needs a dummy link for its addresses too.
    fn lacks_for_ipvs(&self) -> Option<&'static str> {
        match (self.ipvs, self.dummy) {
            (true, true) => None,
            (false, _) => Some("no IPVS"),
            (true, false) => Some("no dummy links"),
        }
    }
}

/// Where and how a run takes place.
#[derive(Clone, Debug, PartialEq)]
struct Decision {
    place: Place,
    clock: Clock,
    /// Modes to pass on; empty leaves them to svcpath.
    modes: Vec<String>,
    /// Why, for the `place` line.
    why: String,
    /// What a reader of the report should know.
    notes: Vec<String>,
}

fn decide(
    place: Option<Place>,
    clock: Option<Clock>,
    modes: &[String],
    kernel: &HostKernel,
) -> Result<Decision> {
    let ipvs = modes.is_empty() || modes.iter().any(|mode| mode == "ipvs");
    let lack = if kernel.has_links() {
        kernel.lacks_for_ipvs().filter(|_| ipvs)
    } else {
        Some("no netfilter BPF links (they came with 6.4)")
    };
    let place_chosen = match (place, clock, lack) {
        (Some(Place::Host), Some(Clock::Virtual), _) => {
            return Err(Failure::new(
                2,
                "--clock virtual counts the instructions of a VM's CPU: leave out --place host",
            ));
        }
        (Some(place), ..) => place,
        (None, Some(Clock::Virtual), _) | (None, _, Some(_)) => Place::Vm,
        (None, _, None) => Place::Host,
    };
    let mut decision = Decision {
        place: place_chosen,
        clock: clock.unwrap_or(match place_chosen {
            Place::Host => Clock::Wall,
            Place::Vm => Clock::Virtual,
        }),
        modes: modes.to_vec(),
        why: match (place, clock, lack) {
            (Some(_), ..) => "asked for".to_owned(),
            (None, Some(Clock::Virtual), _) => "the virtual clock needs it".to_owned(),
            (None, _, Some(lack)) => format!("host: {lack} in kernel {}", kernel.series()),
            (None, _, None) => "its kernel has all that is needed".to_owned(),
        },
        notes: Vec::new(),
    };
    if place_chosen == Place::Host && !kernel.has_links() {
        return Err(Failure::new(
            4,
            format!(
                "kernel {} has no netfilter BPF links (they came with 6.4), so nothing can be measured here: use --place vm",
                kernel.release
            ),
        ));
    }
    if let (Place::Host, Some(lack)) = (place_chosen, lack) {
        let all: Vec<String> = if modes.is_empty() {
            MODES.map(str::to_owned).to_vec()
        } else {
            modes.to_vec()
        };
        decision.modes = all.into_iter().filter(|mode| mode != "ipvs").collect();
        if decision.modes.is_empty() {
            return Err(Failure::new(
                4,
                format!(
                    "kernel {} cannot run mode ipvs ({lack}): use --place vm",
                    kernel.release
                ),
            ));
        }
        decision.notes.push(format!(
            "ipvs was left out: {lack} in this machine's kernel {}; --place vm measures it",
            kernel.release
        ));
    }
    Ok(decision)
}

/// What svcpath answers to `bench plan`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
struct Plan {
    jobs: Vec<PlannedJob>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct PlannedJob {
    id: String,
    title: String,
    weight: f64,
    /// Jobs with the same word here can share a boot.
    boot: String,
    /// What `svcpath bench job` takes: nothing of it depends on how this run was asked for.
    arguments: Vec<String>,
}

impl Plan {
    /// The jobs of each boot, boots with the most work first. In a boot the smallest job comes
    /// first: what the kernel takes down after a large one would run into the next.
    fn boots(&self) -> Vec<Vec<&PlannedJob>> {
        let mut boots: Vec<Vec<&PlannedJob>> = Vec::new();
        for job in &self.jobs {
            match boots.iter_mut().find(|boot| boot[0].boot == job.boot) {
                Some(boot) => boot.push(job),
                None => boots.push(vec![job]),
            }
        }
        for boot in &mut boots {
            boot.reverse();
        }
        let work = |boot: &Vec<&PlannedJob>| boot.iter().map(|job| job.weight).sum::<f64>();
        boots.sort_by(|a, b| work(b).total_cmp(&work(a)));
        boots
    }

    /// Reads it; longest jobs first, so that none is left alone at the end.
    fn parse(text: &[u8]) -> Result<Self> {
        let mut plan: Self =
            serde_json::from_slice(text).context("svcpath's plan is unreadable")?;
        ensure!(!plan.jobs.is_empty(), "svcpath's plan is empty");
        for (n, job) in plan.jobs.iter().enumerate() {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            ensure!(
                !job.id.is_empty() && !job.id.starts_with('.') && job.id.chars().all(plain),
                "svcpath's plan has a job whose id cannot be a file's name: `{}`",
                job.id
            );
            ensure!(
                job.weight.is_finite() && job.weight > 0.0,
                "svcpath's plan gives the job {} the weight {}",
                job.id,
                job.weight
            );
            ensure!(
                plan.jobs[..n].iter().all(|other| other.id != job.id),
                "svcpath's plan has the job {} twice",
                job.id
            );
        }
        plan.jobs.sort_by(|a, b| b.weight.total_cmp(&a.weight));
        Ok(plan)
    }
}

/// What xtask knows of the run; svcpath adds its version and the eBPF object's.
#[derive(Serialize)]
struct Environment<'a> {
    started: &'a str,
    duration_s: f64,
    place: &'a str,
    kernel: &'a str,
    host_kernel: &'a str,
    cpus: usize,
    command: Vec<String>,
    notes: &'a [String],
    tools: BTreeMap<&'a str, String>,
}

/// Everything that does not change from job to job.
struct Run<'a> {
    svcpath: &'a Path,
    /// The matrix as flags.
    flags: Vec<String>,
    decision: &'a Decision,
    parts: PathBuf,
}

/// Runs the comparison; the exit code.
pub(crate) fn main(args: &RunArgs) -> Result<u8> {
    let began = Instant::now();
    let started = SystemTime::now();
    args.matrix.check()?;
    if !nix::unistd::geteuid().is_root() {
        return Err(Failure::new(
            3,
            "`cargo xtask run` builds network namespaces and loads probes: run it as root",
        ));
    }
    let (file_time, report_time) = utc(started);
    let output = match &args.output {
        Some(output) => output.clone(),
        None => workspace::target().join("svcpath").join(&file_time),
    };
    refuse_to_overwrite(&output, args.force)?;
    try_folder(&output)?;
    packages::prepare(&packages::NEEDS, !args.no_install)?;
    let kernel = HostKernel::look();
    let decision = decide(args.place, args.clock, &args.matrix.modes, &kernel)?;
    build_svcpath()?;
    let svcpath = workspace::target().join("release/svcpath");
    let parts = workspace::vm_cache().join(format!("parts-{}", std::process::id()));
    fs::create_dir_all(&parts).with_context(|| format!("cannot create {}", parts.display()))?;
    interrupt::remove_on_exit(&parts);
    let matrix = Matrix {
        modes: decision.modes.clone(),
        ..args.matrix.clone()
    };
    let run = Run {
        svcpath: &svcpath,
        flags: matrix.flags(),
        decision: &decision,
        parts,
    };
    let plan = run.plan()?;
    let mut notes = decision.notes.clone();
    let measured = match decision.place {
        Place::Host => {
            eprintln!(
                "place   host · {} · wall clock      [{}]",
                kernel.release, decision.why
            );
            for note in &notes {
                eprintln!("        {note}");
            }
            run.on_host(&plan)?;
            (kernel.release.clone(), cpus())
        }
        Place::Vm => {
            let cache = workspace::vm_cache();
            let image = image(
                args.vm.kernel.as_deref(),
                std::slice::from_ref(&svcpath),
                &cache,
            )?;
            let vm = Vm::new(
                image,
                decision.clock,
                args.vm.memory,
                Duration::from_secs(args.vm.time_limit),
                &cache,
            );
            let release = vm.image.kernel.release.clone();
            eprintln!(
                "place   vm · {release} · {}      [{}]",
                vm.accelerator.describe(),
                decision.why
            );
            notes.push(format!("in the VM: {}", vm.accelerator.describe()));
            run.in_vms(&plan, &vm)?;
            (release, 1)
        }
    };
    let environment = Environment {
        started: &report_time,
        duration_s: began.elapsed().as_secs_f64(),
        place: decision.place.word(),
        kernel: &measured.0,
        host_kernel: &kernel.release,
        cpus: measured.1,
        command: std::iter::once("cargo xtask".to_owned())
            .chain(std::env::args().skip(1))
            .collect(),
        notes: &notes,
        tools: tools(decision.place),
    };
    run.assemble(&environment, &output, args.force)
        .map_err(|error| run.keep_parts(error, &file_time))
}

/// An output directory must be new or empty; found out before anything is measured.
fn refuse_to_overwrite(output: &Path, force: bool) -> Result<()> {
    let used = fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_some());
    if used && !force {
        return Err(Failure::new(
            2,
            format!(
                "{} is not empty: choose another directory (-o) or write into it with --force",
                output.display()
            ),
        ));
    }
    Ok(())
}

/// Makes the folder and a file as large as a run in it, and takes them away again: what cannot be
/// written is better known before anything is measured.
fn try_folder(folder: &Path) -> Result<()> {
    let made: Vec<&Path> = folder
        .ancestors()
        .take_while(|part| !part.as_os_str().is_empty() && !part.exists())
        .collect();
    let file = folder.join(format!(".svcpath-{}.tmp", std::process::id()));
    let outcome = fs::create_dir_all(folder).and_then(|()| {
        let mut content = fs::File::create(&file)?;
        content.write_all(&vec![0; RUN_BYTES])?;
        // Some file systems say only here that they are full.
        content.sync_all()
    });
    fs::remove_file(&file).ok();
    for part in made {
        fs::remove_dir(part).ok();
    }
    outcome.with_context(|| {
        format!(
            "cannot write into {}: choose another directory (-o)",
            folder.display()
        )
    })
}

fn cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Builds the program that will measure.
pub(crate) fn build_svcpath() -> Result<()> {
    let mut cargo = Command::new(workspace::cargo());
    cargo
        .args(["build", "--release", "-p", "tracer", "--bin", "svcpath"])
        .current_dir(workspace::root());
    let status = Guarded::spawn(&mut cargo, Signal::SIGTERM)?.wait()?;
    ensure!(
        status.success(),
        "svcpath does not build (cargo build --release -p tracer); its errors are above"
    );
    Ok(())
}

fn tools(place: Place) -> BTreeMap<&'static str, String> {
    let mut tools = BTreeMap::from([
        ("iptables", version_of("iptables", &["--version"])),
        ("ipset", version_of("ipset", &["--version"])),
        ("ipvsadm", version_of("ipvsadm", &["--version"])),
        ("nftables", version_of("nft", &["--version"])),
        ("iproute2", version_of("ip", &["-V"])),
    ]);
    if place == Place::Vm {
        tools.insert("qemu", version_of("qemu-system-x86_64", &["--version"]));
    }
    tools.retain(|_, version| !version.is_empty());
    tools
}

impl Run<'_> {
    fn plan(&self) -> Result<Plan> {
        let output = Command::new(self.svcpath)
            .args(["bench", "plan"])
            .args(&self.flags)
            .args(["--place", self.decision.place.word(), "--output", "json"])
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("cannot start {}", self.svcpath.display()))?;
        if !output.status.success() {
            let code = output.status.code().unwrap_or(1);
            return Err(Failure::new(
                u8::try_from(code).unwrap_or(1),
                "svcpath has no plan for this; its reason is above",
            ));
        }
        Plan::parse(&output.stdout)
    }

    fn job_arguments(&self, job: &PlannedJob, file: &str) -> Vec<String> {
        let mut arguments = vec!["bench".to_owned(), "job".to_owned()];
        arguments.extend(job.arguments.iter().cloned());
        arguments.extend(["--clock", self.decision.clock.word(), "-o", file].map(str::to_owned));
        arguments
    }

    fn progress(plan: &Plan) -> Progress {
        Progress::new(plan.jobs.iter().map(|job| (job.id.clone(), job.weight)))
    }

    /// One job after the other: two at a time would disturb each other's figures.
    fn on_host(&self, plan: &Plan) -> Result<()> {
        let progress = Self::progress(plan);
        let outcome = plan
            .jobs
            .iter()
            .try_for_each(|job| self.host_job(job, &progress));
        progress.end();
        outcome
    }

    fn host_job(&self, job: &PlannedJob, progress: &Progress) -> Result<()> {
        let part = self.parts.join(format!("{}.json", job.id));
        let (reader, writer) = std::io::pipe().context("cannot create a pipe")?;
        let mut command = Command::new(self.svcpath);
        command
            .args(self.job_arguments(job, &part.to_string_lossy()))
            .stdin(Stdio::null())
            .stdout(writer.try_clone().context("cannot share a pipe")?)
            .stderr(writer);
        let mut child = Guarded::spawn(&mut command, Signal::SIGTERM)?;
        // The pipe must end when the job does.
        drop(command);
        let mut last = LastLines::default();
        progress.update(&job.id, 0.0, &job.title);
        for line in BufReader::new(reader).split(b'\n') {
            let line = line.context("cannot read a job's output")?;
            last.take(&line, job, progress);
        }
        let status = child.wait()?;
        ensure!(
            status.success(),
            "the job {} failed ({status}){last}",
            job.id
        );
        ensure!(
            part.is_file(),
            "the job {} ended well, but left no {}",
            job.id,
            part.display()
        );
        progress.finish_job(&job.id, &job.title);
        Ok(())
    }

    /// One VM a CPU at a time. On the virtual clock they cannot disturb each other; in real time
    /// they run one by one.
    fn in_vms(&self, plan: &Plan, vm: &Vm) -> Result<()> {
        let progress = Self::progress(plan);
        let boots = plan.boots();
        let count = boots.len();
        let queue: Mutex<VecDeque<Vec<&PlannedJob>>> = Mutex::new(boots.into());
        let failure: Mutex<Option<anyhow::Error>> = Mutex::new(None);
        let stop = AtomicBool::new(false);
        let workers = match self.decision.clock {
            Clock::Virtual => vms_at_a_time(count, vm.memory),
            Clock::Wall => 1,
        };
        thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let next = queue
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .pop_front();
                        let Some(jobs) = next else { return };
                        if let Err(error) = self.boot(&jobs, vm, &progress, &stop) {
                            stop.store(true, Ordering::Relaxed);
                            // The first failure is the one to tell: others were stopped by it.
                            failure
                                .lock()
                                .unwrap_or_else(PoisonError::into_inner)
                                .get_or_insert(error);
                        }
                    }
                });
            }
        });
        progress.end();
        failure
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .map_or(Ok(()), Err)
    }

    /// The jobs of a boot as the guest gets them: the same for the same measurements, to the byte.
    fn guest_job(&self, jobs: &[&PlannedJob]) -> Job {
        let lines = jobs.iter().map(|job| {
            let arguments = self.job_arguments(job, &format!("{OUT}/{}.json", job.id));
            format!("svcpath {}\n", arguments.join(" "))
        });
        simple_job(&["sh", "-ec", &lines.collect::<String>()])
    }

    /// Runs jobs in one boot, one after the other.
    fn boot(
        &self,
        jobs: &[&PlannedJob],
        vm: &Vm,
        progress: &Progress,
        stop: &AtomicBool,
    ) -> Result<()> {
        let in_guest = self.guest_job(jobs);
        let mut last = LastLines::default();
        let mut now = 0;
        progress.update(&jobs[now].id, 0.0, &jobs[now].title);
        let output = vm
            .run(
                &in_guest,
                &mut |line| match line {
                    Line::Progress(fraction, what) => {
                        // Each line begins with its job's title.
                        let next = jobs.get(now + 1);
                        if next.is_some_and(|next| what.starts_with(&format!("{}:", next.title))) {
                            progress.finish_job(&jobs[now].id, &jobs[now].title);
                            now += 1;
                        }
                        progress.update(&jobs[now].id, fraction, &headline(jobs[now], what));
                    }
                    Line::Stdout(bytes) | Line::Stderr(bytes) => last.keep(bytes),
                },
                stop,
            )
            .with_context(|| format!("job {}{last}", jobs[now].id))?;
        ensure!(
            output.exit == 0,
            "the job {} failed (exit code {}){last}",
            jobs[now].id,
            output.exit
        );
        for job in jobs {
            let name = format!("{}.json", job.id);
            let content = output
                .files
                .get(&name)
                .with_context(|| format!("the job {} ended well, but left no {name}", job.id))?;
            let part = self.parts.join(&name);
            fs::write(&part, content)
                .with_context(|| format!("cannot write {}", part.display()))?;
        }
        for job in &jobs[now..] {
            progress.finish_job(&job.id, &job.title);
        }
        Ok(())
    }

    /// Joins the parts in `parts`; where to is still to be said.
    fn assemble_command(&self, parts: &Path) -> Command {
        let mut command = Command::new(self.svcpath);
        command
            .args(["bench", "assemble", "--parts"])
            .arg(parts)
            .args(&self.flags)
            .arg("--environment")
            .arg(parts.join(ENVIRONMENT));
        command
    }

    /// Puts the parts of a run whose report could not be written where nobody removes them, and
    /// says so.
    fn keep_parts(&self, error: anyhow::Error, time: &str) -> anyhow::Error {
        let kept = self.parts.with_file_name(format!("unwritten-{time}"));
        if fs::rename(&self.parts, &kept).is_err() {
            return error;
        }
        let code = error.downcast_ref::<Failure>().map_or(1, Failure::code);
        let command = self.assemble_command(&kept);
        let words: Vec<String> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(quoted)
            .collect();
        Failure::new(
            code,
            format!(
                "{error:#}; what was measured is kept: `{} -o DIR` writes it",
                words.join(" ")
            ),
        )
    }

    fn assemble(&self, environment: &Environment<'_>, output: &Path, force: bool) -> Result<u8> {
        let file = self.parts.join(ENVIRONMENT);
        fs::write(&file, serde_json::to_vec_pretty(environment)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        let mut command = self.assemble_command(&self.parts);
        command.arg("-o").arg(output);
        if force {
            command.arg("--force");
        }
        let status = Guarded::spawn(&mut command, Signal::SIGTERM)?.wait()?;
        if !status.success() {
            bail!(Failure::new(
                status
                    .code()
                    .and_then(|code| u8::try_from(code).ok())
                    .unwrap_or(1),
                "svcpath could not put the report together; its reason is above",
            ));
        }
        Ok(0)
    }
}

fn quoted(word: &std::ffi::OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,=:".contains(c);
    if word.chars().all(plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn headline(job: &PlannedJob, what: &str) -> String {
    if what.is_empty() {
        job.title.clone()
    } else {
        what.to_owned()
    }
}

/// The end of what a job printed, for when it fails.
#[derive(Default)]
struct LastLines(VecDeque<String>);

impl LastLines {
    fn keep(&mut self, line: &[u8]) {
        if self.0.len() == LAST_LINES {
            self.0.pop_front();
        }
        self.0.push_back(String::from_utf8_lossy(line).into_owned());
    }

    fn take(&mut self, line: &[u8], job: &PlannedJob, bar: &Progress) {
        match progress(&String::from_utf8_lossy(line)) {
            Some((fraction, what)) => bar.update(&job.id, fraction, &headline(job, what)),
            None => self.keep(line),
        }
    }
}

impl std::fmt::Display for LastLines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return f.write_str("; it printed nothing");
        }
        f.write_str("; its last lines:")?;
        self.0.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

/// How many VMs with so much memory (MiB) may run side by side on this machine, for so many jobs.
pub(crate) fn vms_at_a_time(jobs: usize, memory: u32) -> usize {
    workers(cpus(), jobs, available_memory(), memory)
}

/// How many VMs at a time.
fn workers(cpus: usize, jobs: usize, available_mib: u64, memory_mib: u32) -> usize {
    // QEMU and its translations take some memory themselves.
    let fit = available_mib / (u64::from(memory_mib) + 400);
    cpus.min(jobs)
        .min(usize::try_from(fit).unwrap_or(usize::MAX))
        .max(1)
}

/// MiB that programs could take without swapping.
fn available_memory() -> u64 {
    fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("MemAvailable:"))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        })
        .map_or(u64::MAX, |kib| kib / 1024)
}

/// A time as a file's name and in RFC 3339, both UTC.
fn utc(time: SystemTime) -> (String, String) {
    let seconds = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Howard Hinnant's civil_from_days, for days since 1970: years start in March, so that the
    // leap day is the last of its year.
    let shifted = days + 719_468;
    let era_day = shifted % 146_097;
    let year_of_era = (era_day - era_day / 1460 + era_day / 36_524 - era_day / 146_096) / 365;
    let year_day = era_day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * year_day + 2) / 153;
    let day = year_day - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = year_of_era + shifted / 146_097 * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    (
        format!("{year:04}-{month:02}-{day:02}T{hour:02}-{minute:02}-{second:02}"),
        format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn kernel(release: &str, ipvs: bool) -> HostKernel {
        HostKernel {
            release: release.to_owned(),
            ipvs,
            dummy: ipvs,
        }
    }

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn the_place_follows_from_the_kernel() {
        let full = decide(None, None, &[], &kernel("6.12.1", true)).expect("fine");
        assert_eq!((full.place, full.clock), (Place::Host, Clock::Wall));
        let lacking = decide(None, None, &[], &kernel("6.18.44-x", false)).expect("fine");
        assert_eq!((lacking.place, lacking.clock), (Place::Vm, Clock::Virtual));
        assert_eq!(lacking.why, "host: no IPVS in kernel 6.18");
        let without = decide(None, None, &words(&["nftables"]), &kernel("6.18.44", false));
        assert_eq!(without.expect("fine").place, Place::Host);
        let old = decide(None, None, &words(&["nftables"]), &kernel("6.1.0-56", true));
        assert_eq!(old.expect("fine").place, Place::Vm);
        let exact = decide(None, Some(Clock::Virtual), &[], &kernel("6.12.1", true));
        assert_eq!(exact.expect("fine").place, Place::Vm);
    }

    #[test]
    fn a_forced_host_measures_what_it_can_and_says_what_it_cannot() {
        let forced = decide(Some(Place::Host), None, &[], &kernel("6.18.1", false)).expect("fine");
        assert_eq!(
            forced.modes,
            ["iptables-legacy", "iptables-nft", "nftables"]
        );
        assert!(
            forced.notes[0].contains("ipvs was left out: no IPVS"),
            "{:?}",
            forced.notes
        );
        let code = |outcome: Result<Decision>| {
            let error = outcome.expect_err("refused");
            error.downcast_ref::<Failure>().map(|failure| failure.code)
        };
        let only_ipvs = words(&["ipvs"]);
        assert_eq!(
            code(decide(
                Some(Place::Host),
                None,
                &only_ipvs,
                &kernel("6.18.1", false)
            )),
            Some(4)
        );
        assert_eq!(
            code(decide(Some(Place::Host), None, &[], &kernel("6.1.0", true))),
            Some(4)
        );
        let both = decide(
            Some(Place::Host),
            Some(Clock::Virtual),
            &[],
            &kernel("6.12.1", true),
        );
        assert_eq!(code(both), Some(2));
    }

    #[test]
    fn plans_are_sorted_and_checked() {
        let text = br#"{"jobs":[{"id":"a","title":"A","weight":1,"boot":"b","arguments":["a"]},{"id":"cell-ipvs-1000","title":"ipvs 1000","weight":1.7,"boot":"b","arguments":["b"]}]}"#;
        let plan = Plan::parse(text).expect("good");
        assert_eq!(plan.jobs[0].id, "cell-ipvs-1000");
        for bad in [
            r#"{"jobs":[]}"#,
            r#"{"jobs":[{"id":"../x","title":"","weight":1,"boot":"b","arguments":[]}]}"#,
            r#"{"jobs":[{"id":"x","title":"","weight":0,"boot":"b","arguments":[]}]}"#,
            r#"{"jobs":[{"id":"x","title":"","weight":1,"boot":"b","arguments":[]},{"id":"x","title":"","weight":1,"boot":"b","arguments":[]}]}"#,
            "not json",
        ] {
            assert!(Plan::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_matrix_is_passed_on() {
        let matrix = Matrix {
            quick: true,
            seed: Some(7),
            modes: words(&["ipvs", "nftables"]),
            services: vec![100, 1000],
        };
        assert_eq!(
            matrix.flags().join(" "),
            "--quick --seed 7 --modes ipvs,nftables --services 100,1000"
        );
        assert!(Matrix::default().flags().is_empty());
    }

    #[test]
    fn what_cannot_be_run_is_refused_in_one_line() {
        let refused = |matrix: Matrix| {
            let error = matrix.check().expect_err("refused");
            let code = error.downcast_ref::<Failure>().map(Failure::code);
            assert_eq!(code, Some(2));
            let text = error.to_string();
            assert_eq!(text.lines().count(), 1);
            text
        };
        let modes = |words: Vec<String>| Matrix {
            modes: words,
            ..Matrix::default()
        };
        let services = |services| Matrix {
            services,
            ..Matrix::default()
        };
        assert_eq!(
            refused(modes(words(&["ipvs", "userspace"]))),
            "unknown mode 'userspace': use some of iptables-legacy, iptables-nft, ipvs, nftables"
        );
        for n in [0, 1_000_000] {
            assert!(refused(services(vec![100, n])).contains("use 1 to 30000"));
        }
        assert!(modes(MODES.map(str::to_owned).to_vec()).check().is_ok());
        assert!(services(vec![1, MAX_SERVICES]).check().is_ok());
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_known_at_once() {
        let name = format!("xtask-folder-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        let deep = directory.join("a/b");
        try_folder(&deep).expect("writable");
        assert!(!directory.exists(), "nothing stays");
        fs::create_dir_all(&deep).expect("writable");
        try_folder(&deep).expect("writable");
        assert_eq!(fs::read_dir(&deep).expect("still there").count(), 0);
        fs::write(deep.join("file"), "").expect("writable");
        for not in [deep.join("file"), deep.join("file/x"), "/proc/foo".into()] {
            let error = format!("{:#}", try_folder(&not).expect_err("refused"));
            assert!(error.contains("choose another directory"), "{error}");
        }
        fs::remove_dir_all(&directory).expect("ours");
    }

    #[test]
    fn a_guests_job_does_not_tell_how_the_run_was_asked_for() {
        let job = PlannedJob {
            id: "cell-nftables-100".to_owned(),
            title: "nftables 100".to_owned(),
            weight: 1.0,
            boot: "nftables".to_owned(),
            arguments: words(&["cell-nftables-100", "--seed", "00000000000000000042"]),
        };
        with_stand_in("", |run, _| {
            let typed = Run {
                flags: words(&["--quick", "--seed", "42", "--modes", "nftables"]),
                parts: run.parts.clone(),
                ..*run
            };
            assert_eq!(run.guest_job(&[&job]), typed.guest_job(&[&job]));
            assert_eq!(
                run.guest_job(&[&job]).argv[2],
                "svcpath bench job cell-nftables-100 --seed 00000000000000000042 \
                 --clock wall -o /out/cell-nftables-100.json\n"
            );
        });
    }

    #[test]
    fn what_was_measured_outlives_a_report_that_cannot_be_written() {
        with_stand_in("exit 1", |run, directory| {
            fs::write(run.parts.join("one.json"), "part").expect("writable");
            let error = run.keep_parts(Failure::new(5, "no report"), "now");
            assert_eq!(error.downcast_ref::<Failure>().map(Failure::code), Some(5));
            let kept = directory.join("unwritten-now");
            assert!(kept.join("one.json").is_file());
            let text = error.to_string();
            let command = format!(
                "bench assemble --parts '{0}' --quick --environment '{0}/environment' -o DIR` \
                 writes it",
                kept.display()
            );
            assert!(text.starts_with("no report; what was measured is kept: `"));
            assert!(text.ends_with(&command), "{text}");
        });
    }

    #[test]
    fn as_many_vms_as_cpus_jobs_and_memory_allow() {
        assert_eq!(workers(2, 12, 16_000, 3072), 2);
        assert_eq!(workers(8, 3, 64_000, 3072), 3);
        assert_eq!(workers(8, 12, 8_000, 3072), 2);
        assert_eq!(workers(2, 12, 1_000, 3072), 1);
    }

    #[test]
    fn dates() {
        let at = |seconds| utc(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0).1, "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_400).1, "2000-02-29T00:00:00Z");
        assert_eq!(at(1_795_194_131).0, "2026-11-20T17-02-11");
        assert_eq!(at(4_107_542_399).1, "2100-02-28T23:59:59Z");
    }

    /// A stand-in for svcpath, and a run on the host with it.
    fn with_stand_in(script: &str, check: impl FnOnce(&Run<'_>, &Path)) {
        let name = format!(
            "xtask-run-{}-{:?}",
            std::process::id(),
            thread::current().id()
        );
        let directory = std::env::temp_dir().join(name);
        let parts = directory.join("parts");
        fs::create_dir_all(&parts).expect("writable");
        let svcpath = directory.join("svcpath");
        fs::write(&svcpath, format!("#!/bin/sh\n{script}\n")).expect("writable");
        fs::set_permissions(&svcpath, fs::Permissions::from_mode(0o755)).expect("ours");
        let decision = Decision {
            place: Place::Host,
            clock: Clock::Wall,
            modes: Vec::new(),
            why: String::new(),
            notes: Vec::new(),
        };
        let run = Run {
            svcpath: &svcpath,
            flags: words(&["--quick"]),
            decision: &decision,
            parts,
        };
        check(&run, &directory);
        fs::remove_dir_all(&directory).expect("ours");
    }

    #[test]
    fn a_run_on_the_host_from_plan_to_report() {
        let script = r#"
case "$2" in
plan) [ "$*" = "bench plan --quick --place host --output json" ] || exit 2
      echo '{"jobs":[{"id":"one","title":"One","weight":1,"boot":"b","arguments":["one","--seed","7"]},
                    {"id":"two","title":"Two","weight":2,"boot":"b","arguments":["two","--seed","7"]}]}' ;;
job)  [ "$4 $5 $6 $7 $8" = "--seed 7 --clock wall -o" ] || exit 2
      echo "progress 0.5 half" >&2; echo "part of $3" > "$9" ;;
assemble) mkdir -p "$9" && cat "$4/one.json" "$4/two.json" "$7" > "$9/run.json" ;;
esac"#;
        with_stand_in(script, |run, directory| {
            let plan = run.plan().expect("a plan");
            assert_eq!(plan.jobs.len(), 2);
            run.on_host(&plan).expect("both jobs");
            let environment = Environment {
                started: "2026-11-20T17:02:11Z",
                duration_s: 1.0,
                place: "host",
                kernel: "6.12",
                host_kernel: "6.12",
                cpus: 2,
                command: Vec::new(),
                notes: &[],
                tools: BTreeMap::new(),
            };
            let output = directory.join("report");
            assert_eq!(
                run.assemble(&environment, &output, false).expect("joined"),
                0
            );
            let text = fs::read_to_string(output.join("run.json")).expect("written");
            assert!(text.starts_with("part of one\npart of two\n{"), "{text}");
            assert!(text.contains("\"host_kernel\": \"6.12\""), "{text}");
        });
    }

    #[test]
    fn a_failed_job_shows_its_last_lines() {
        let script = "seq 30 >&2; echo progress 0.1 x >&2; exit 5";
        with_stand_in(script, |run, _| {
            let job = PlannedJob {
                id: "cell".to_owned(),
                title: "Cell".to_owned(),
                weight: 1.0,
                boot: "boot".to_owned(),
                arguments: words(&["cell"]),
            };
            let error = run.on_host(&Plan { jobs: vec![job] }).expect_err("exit 5");
            let text = error.to_string();
            assert!(text.contains("cell failed (exit status: 5)"), "{text}");
            assert!(
                text.contains("\n  11\n") && text.ends_with("\n  30"),
                "{text}"
            );
            assert!(!text.contains("\n  10\n"), "{text}");
        });
    }
}
