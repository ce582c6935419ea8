//! `svcpath trace`: a live node, watched.

mod crowd;
mod faces;
mod live;
mod row;
mod text;

use std::io::IsTerminal as _;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::ValueEnum;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tracer::cluster::Cidr;
use tracer::kernel::clock::monotonic_ns;
use tracer::kernel::netns::Netns;
use tracer::probe::catalogue::Detail;
use tracer::probe::tier::Tier;
use tracer::report::write;
use tracer::trace::directory::Choice;
use tracer::trace::session::{Options, Session};
use tracer_ebpf::path::{Path, Target};

use self::faces::Faces;
use super::exit;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    sudo svcpath trace --duration 30s\n  \
    sudo svcpath trace --service shop/web --journeys\n  \
    sudo svcpath trace --service shop/web --journeys --detail functions\n  \
    sudo svcpath trace --duration 5m -o trace && svcpath report trace\n  \
    sudo svcpath trace --output pcapng | wireshark -k -i -\n  \
    sudo svcpath trace --vip 10.96.0.10:53 --output json -- dig @10.96.0.10 kubernetes.default\n  \
    sudo svcpath trace --netns /run/netns/node1 --node-port 30080\n\n\
    Services have the names that the node's own rules give them, also those that come meanwhile.\n\
    In IPVS mode rules hold no names: a Service is then its address and port.\n\n\
    Ctrl-C ends the session in order; a second one kills a command that does not end. With json and\n\
    pcapng, what the command prints goes to standard error.\n\n\
    Reads only. The exit code is that of the command after `--`, if there is one; 1 if -o could not be\n\
    written to the end.")]
pub(crate) struct Args {
    /// Only this Service; can be repeated, as --vip and --node-port can.
    #[arg(long, value_name = "NS/NAME[:PORT]", value_parser = service)]
    service: Vec<String>,
    /// Only the Service at this virtual address and port.
    #[arg(long, value_name = "ADDR:PORT", value_parser = vip)]
    vip: Vec<SocketAddr>,
    /// Only the Service at this NodePort.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    node_port: Vec<u16>,
    /// Only flows from or to this pod's address.
    #[arg(long, value_name = "ADDR")]
    pod: Vec<IpAddr>,
    /// Only flows that enter the node this way: from pod, host or external, to clusterip, nodeport or external-ip (of
    /// the Service or of its load balancer), such as pod-to-clusterip; can be repeated.
    #[arg(long, value_name = "PATH", value_parser = OnPath::from_str)]
    path: Vec<OnPath>,
    /// What tells where packets are: netfilter links between components (kernel 6.4 and later), or programs at
    /// the kernel's functions; auto: links where the kernel has them.
    #[arg(long, value_enum, default_value = "auto")]
    tier: TierChoice,
    /// How finely packets are followed: entry and exit of each hook, every component of it, or also what first
    /// packets meet there; default: stages with --journeys, else hooks, which cost less.
    #[arg(long, value_enum, value_name = "WHAT")]
    detail: Option<Depth>,
    /// Time one in N packets that are not the first of their flow: `1/64`, `64`; first packets always are,
    /// and drops and answers are told of all.
    #[arg(long, value_name = "1/N", value_parser = sample, default_value = "1/64")]
    sample: u32,
    /// Where pods live: tells pod→ClusterIP from external→ClusterIP; one network a family; default: what the
    /// rules say.
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pod_cidr: Vec<Cidr>,
    /// The node's network namespace, as a path; default: this one.
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
    /// Stop after this time: `500ms`, `30s`, `5m`; default: at Ctrl-C or the command's end.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    duration: Option<Duration>,
    /// Show every flow's first packet, and every drop, as it happens.
    #[arg(long)]
    journeys: bool,
    /// Have the kernel account for the probes' own time, which costs some 30 ns a probe more.
    #[arg(long)]
    cost: bool,
    /// What to write to standard output.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
    /// Keep the trace in this folder: trace.json, journeys.jsonl, report.html. `svcpath report` shows it.
    #[arg(short = 'o', value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Overwrite a trace that is there.
    #[arg(long, requires = "dir")]
    force: bool,
    /// Journeys that -o keeps: so many that ended well, and so many that ended badly. About 300 bytes each, without
    /// stages.
    #[arg(long, value_name = "N", default_value_t = 50_000, requires = "dir")]
    keep: u64,
    /// Made once the probes are attached: traffic after that is seen.
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// A command to run meanwhile.
    #[arg(last = true, value_name = "CMD")]
    command: Vec<std::ffi::OsString>,
}

/// A [`Tier`] as it is typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TierChoice {
    /// The best that the kernel has.
    Auto,
    /// Netfilter links.
    Hooks,
    /// Programs at functions.
    Functions,
}

impl TierChoice {
    const fn tier(self) -> Option<Tier> {
        match self {
            Self::Auto => None,
            Self::Hooks => Some(Tier::Hooks),
            Self::Functions => Some(Tier::Functions),
        }
    }
}

/// A [`Detail`] as it is typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Depth {
    /// Entry and exit of each hook.
    Hooks,
    /// Every component.
    Stages,
    /// Every component, and what first packets meet in it: tables and chains with their verdicts, nat's bindings,
    /// the confirmation of entries, IPVS' scheduler and real servers. With programs at functions only.
    Functions,
}

/// A way into the node, by [`Path::id`].
#[derive(Clone, Copy, Debug)]
struct OnPath(Path);

impl FromStr for OnPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Who asks an endpoint itself asks no Service.
        let mut paths = Path::ALL
            .into_iter()
            .filter(|path| path.target != Target::Pod);
        let found = paths.clone().find(|path| path.id() == text).map(Self);
        found.ok_or_else(|| {
            let known: Vec<&str> = paths.by_ref().map(Path::id).collect();
            format!("a path is one of {}", known.join(", "))
        })
    }
}

impl Args {
    /// What tells where packets are. Only functions tell what packets meet.
    fn tier(&self) -> Option<Tier> {
        match self.detail {
            Some(Depth::Functions) => Some(Tier::Functions),
            _ => self.tier.tier(),
        }
    }

    /// How finely packets are followed.
    fn detail(&self) -> Detail {
        match self.detail {
            Some(Depth::Hooks) => Detail::Hooks,
            None if !self.journeys => Detail::Hooks,
            Some(Depth::Stages) | None => Detail::Stages,
            Some(Depth::Functions) => Detail::Functions,
        }
    }
}

fn sample(text: &str) -> Result<u32, String> {
    let number = text.strip_prefix("1/").unwrap_or(text);
    let number = number.parse().ok().filter(|number| *number > 0);
    number.ok_or_else(|| "a sample is 1/N, N from 1".to_owned())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people; on a terminal a table of the busiest Services, if there is no command.
    Text,
    /// One object a line, of which the last is the summary.
    Json,
    /// Every journey as a packet with a comment, for Wireshark; a rule change is a packet of text. The
    /// summary goes to standard error.
    Pcapng,
}

/// How often the probes' ring buffer is emptied: it holds some 20,000 records.
const EVERY: Duration = Duration::from_millis(20);
/// What takes longer than this is told.
const LONG: Duration = Duration::from_secs(2);
/// How long a command that was asked to end may take until it is killed.
const PATIENCE: Duration = Duration::from_secs(10);

fn service(text: &str) -> Result<String, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => Ok(text.to_owned()),
        _ => Err("a Service is NAMESPACE/NAME or NAMESPACE/NAME:PORT".to_owned()),
    }
}

fn vip(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| match text.parse() {
        Ok(IpAddr::V4(address)) => format!("its port is missing: {address}:PORT"),
        Ok(IpAddr::V6(address)) => bracketed(text, address),
        Err(_) => "an address and a port are 10.96.0.10:53 or [fd00::10]:53".to_owned(),
    })
}

/// How an IPv6 address and a port are written, of which the last number may be the port.
fn bracketed(text: &str, address: Ipv6Addr) -> String {
    let meant = text.rsplit_once(':').and_then(|(address, port)| {
        let address: Ipv6Addr = address.parse().ok()?;
        let port: u16 = port.parse().ok()?;
        Some(format!("[{address}]:{port}, or "))
    });
    format!(
        "before a port an IPv6 address stands in brackets: {}[{address}]:PORT",
        meant.unwrap_or_default()
    )
}

fn duration(text: &str) -> Result<Duration, String> {
    let units = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    let (number, scale) = units
        .iter()
        .find_map(|(unit, scale)| Some((text.strip_suffix(unit)?, *scale)))
        .unwrap_or((text, 1.0));
    let seconds: f64 = number
        .parse()
        .map_err(|_| "a time is 500ms, 30s or 5m".to_owned())?;
    Duration::try_from_secs_f64(seconds * scale)
        .ok()
        .filter(|time| !time.is_zero())
        .ok_or_else(|| "a time is longer than 0 and ends some day".to_owned())
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    exit::require_tracing("svcpath trace", args.netns.is_some() || args.cost)?;
    check(args)?;
    let ns = match &args.netns {
        Some(path) => Netns::open(path)?,
        None => Netns::current()?,
    };
    let choices = args.service.iter().cloned().map(Choice::Service);
    let choices = choices.chain(args.vip.iter().copied().map(Choice::Vip));
    let choices = choices.chain(args.node_port.iter().copied().map(Choice::NodePort));
    let options = Options {
        choices: choices.collect(),
        pod_cidrs: args.pod_cidr.clone(),
        cost: args.cost,
        tier: args.tier(),
        detail: args.detail(),
        sample: args.sample,
        pods: args.pod.clone(),
        paths: args.path.iter().map(|path| path.0).collect(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(trace(args, &ns, options))
}

/// What would fail only after the probes are attached is found out before.
fn check(args: &Args) -> anyhow::Result<()> {
    if args.tier == TierChoice::Hooks && args.detail == Some(Depth::Functions) {
        let remedy = "--detail functions is told by programs at functions: leave --tier hooks out";
        return Err(exit::Usage(remedy.to_owned()).into());
    }
    if args.output == Output::Pcapng && std::io::stdout().is_terminal() {
        let remedy = "--output pcapng is not for terminals: write it to a file (> trace.pcapng) or to a \
                      reader (| wireshark -k -i -)";
        return Err(exit::Usage(remedy.to_owned()).into());
    }
    if let Some(dir) = &args.dir {
        write::check_trace_target(dir, args.force)?;
    }
    if let Some(file) = &args.ready_file {
        write::check_file(file, true)?;
    }
    Ok(())
}

async fn trace(args: &Args, ns: &Netns, options: Options) -> anyhow::Result<ExitCode> {
    // Before anything is attached: from here on a signal ends the session in order.
    let mut stops = Stops {
        interrupt: signal(SignalKind::interrupt())?,
        terminate: signal(SignalKind::terminate())?,
        hang_up: if ignores_hang_up() {
            None
        } else {
            Some(signal(SignalKind::hangup())?)
        },
    };
    let mut session = start(ns, options, &mut stops).await?;
    let mut faces = Faces::start(args, ns, &session)?;
    if let Some(path) = &args.ready_file {
        std::fs::write(path, "ready\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let command = Running::start(&args.command, args.output)?;
    let end_ns = args.duration.map(|limit| {
        let limit_ns = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        session.started_ns().saturating_add(limit_ns)
    });
    let watched = watch(&mut session, &mut faces, command, end_ns, &mut stops).await;
    // Whoever read standard output may have gone: what was recorded is still worth its file.
    let watched = match watched {
        Err(error) if !error.is::<exit::Stdout>() => return Err(error),
        watched => watched,
    };
    let (events, summary) = session.finish()?;
    faces.record(&events);
    let shown = watched.and_then(|status| {
        faces.tell_last(&events)?;
        faces.end(&summary)?;
        Ok(status)
    });
    let whole = faces.keep(&summary);
    // Being stopped is how an open-ended session ends; a command's own end is told on.
    let code = shown?.map_or(0, |status| exit_code(status, args.duration.is_some()));
    Ok(ExitCode::from(if whole { code } else { exit::FAILURE }))
}

/// Reads the rules and attaches the probes. On a large node that takes time, which is told; a signal ends it.
async fn start(ns: &Netns, options: Options, stops: &mut Stops) -> anyhow::Result<Session> {
    let (tell, mut started) = tokio::sync::oneshot::channel();
    let ns = ns.clone();
    // Ends with the program, whatever it waits for: what it has attached by then goes as well.
    std::thread::spawn(move || {
        let _ = tell.send(Session::start(&ns, options));
    });
    let mut long = std::pin::pin!(tokio::time::sleep(LONG));
    let mut told = false;
    loop {
        tokio::select! {
            session = &mut started => return Ok(session.context("the session could not begin")??),
            signal = stops.next() => return Err(exit::Interrupted(signal).into()),
            () = &mut long, if !told => {
                exit::say("reading the node's rules; nft takes 20 s for those of 30,000 Services");
                told = true;
            }
        }
    }
}

/// Tells what happens until time is up (`CLOCK_MONOTONIC`, ns), the command ends, or a signal comes.
async fn watch(
    session: &mut Session,
    faces: &mut Faces,
    mut command: Option<Running>,
    end_ns: Option<u64>,
    stops: &mut Stops,
) -> anyhow::Result<Option<ExitStatus>> {
    let mut ending: Option<Instant> = None;
    loop {
        let stopped = tokio::select! {
            signal = stops.next() => Some(signal),
            () = tokio::time::sleep(pause(end_ns.filter(|_| ending.is_none()))) => None,
        };
        // First whether it has ended, then what it did: nothing that it did is missed.
        let status = command.as_mut().map(Running::status).transpose()?.flatten();
        let events = session.poll()?;
        faces.record(&events);
        faces.tell(&events)?;
        faces.draw(session)?;
        if status.is_some() {
            return Ok(status);
        }
        let due = end_ns.is_some_and(|end_ns| monotonic_ns() >= end_ns);
        let Some(signal) = stopped.or(due.then_some(Signal::SIGTERM)) else {
            continue;
        };
        let Some(command) = &mut command else {
            return Ok(None);
        };
        match ending {
            None => {
                command.signal(signal);
                ending = Some(Instant::now());
            }
            // Asked twice, or for long enough.
            Some(since) if stopped.is_some() || since.elapsed() >= PATIENCE => {
                command.signal(Signal::SIGKILL);
            }
            Some(_) => {}
        }
    }
}

/// How long to wait before looking again: not past the end (`CLOCK_MONOTONIC`, ns).
fn pause(end_ns: Option<u64>) -> Duration {
    let left = end_ns.map(|end_ns| Duration::from_nanos(end_ns.saturating_sub(monotonic_ns())));
    left.map_or(EVERY, |left| left.min(EVERY))
}

/// What asks a session to end.
struct Stops {
    interrupt: Signals,
    terminate: Signals,
    /// The terminal is gone; `None` if whoever started us wants that ignored (nohup).
    hang_up: Option<Signals>,
}

impl Stops {
    async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.interrupt.recv() => Signal::SIGINT,
            _ = self.terminate.recv() => Signal::SIGTERM,
            () = of_some(&mut self.hang_up) => Signal::SIGHUP,
        }
    }
}

/// The signal, if it is waited for at all.
async fn of_some(signal: &mut Option<Signals>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// Is SIGHUP, the first signal, ignored (`proc_pid_status(5)`, `SigIgn`)?
fn ignores_hang_up() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 != 0)
}

/// A command's exit code as shells tell it; one that we ended ourselves, because time was up, is fine.
fn exit_code(status: ExitStatus, limited: bool) -> u8 {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => u8::try_from(code).unwrap_or(exit::FAILURE),
        (None, Some(_)) if limited => 0,
        (None, signal) => 128 + u8::try_from(signal.unwrap_or(0)).unwrap_or(0),
    }
}

/// The command that runs meanwhile; killed if this is dropped.
struct Running(Child);

impl Running {
    fn start(words: &[std::ffi::OsString], output: Output) -> anyhow::Result<Option<Self>> {
        let Some((program, arguments)) = words.split_first() else {
            return Ok(None);
        };
        let mut command = Command::new(program);
        command.args(arguments);
        if output != Output::Text {
            // What programs read must not hold what the command prints.
            let stderr = std::io::stderr().as_fd().try_clone_to_owned()?;
            command.stdout(Stdio::from(stderr));
        }
        let child = command.spawn();
        let child = child.with_context(|| format!("cannot run {}", program.display()))?;
        Ok(Some(Self(child)))
    }

    fn status(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.0.try_wait()?)
    }

    fn signal(&mut self, signal: Signal) {
        if let Ok(pid) = i32::try_from(self.0.id()) {
            // It may have ended just now.
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), signal);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Already waited for, or about to be: either way nothing is left.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("2"), Ok(Duration::from_secs(2)));
        for bad in ["", "s", "-1s", "0", "soon", "NaN", "inf", "1e300h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_address_has_a_port() {
        for good in ["10.96.0.10:53", "[fd00::10]:53"] {
            assert_eq!(vip(good).map(|vip| vip.to_string()), Ok(good.to_owned()));
        }
        for (bad, meant) in [
            ("fd00::1:80", "brackets: [fd00::1]:80, or [fd00::1:80]:PORT"),
            ("fd00::1", "brackets: [fd00::1]:PORT"),
            ("fd00::1:cafe", "brackets: [fd00::1:cafe]:PORT"),
            ("::", "brackets: [::]:PORT"),
            ("10.96.0.10", "missing: 10.96.0.10:PORT"),
            ("10.96.0.10:99999", "10.96.0.10:53 or [fd00::10]:53"),
            ("[fd00::1]", "10.96.0.10:53 or [fd00::10]:53"),
            ("shop/web", "10.96.0.10:53 or [fd00::10]:53"),
        ] {
            let error = vip(bad).expect_err(bad);
            assert!(error.ends_with(meant), "{bad}: {error}");
        }
    }

    #[test]
    fn a_service_has_a_namespace() {
        assert!(service("shop/web").is_ok() && service("shop/web:http").is_ok());
        for bad in ["web", "/web", "shop/", ""] {
            assert!(service(bad).is_err(), "{bad}");
        }
    }
}
