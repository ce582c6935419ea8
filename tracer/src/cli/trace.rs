//! `svcpath trace`: a live node, watched.

use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::ValueEnum;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tracer::cluster::Cidr;
use tracer::kernel::netns::Netns;
use tracer::record::run::Clock;
use tracer::report::units;
use tracer::trace::directory::Choice;
use tracer::trace::flows::Decided;
use tracer::trace::journey::Journey;
use tracer::trace::session::{Event, Options, Session};
use tracer::trace::tally::Tally;

use super::exit;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    sudo svcpath trace --duration 30s\n  \
    sudo svcpath trace --service shop/web --journeys\n  \
    sudo svcpath trace --vip 10.96.0.10:53 --output json -- dig @10.96.0.10 kubernetes.default\n  \
    sudo svcpath trace --netns /run/netns/node1 --node-port 30080\n\n\
    Services have the names that the node's own rules give them; the rules are read again after every\n\
    change. In IPVS mode rules hold no names: a Service is then its address and port. This tier (hooks)\n\
    does not see which rule a packet met.\n\n\
    Reads only. The exit code is that of the command after `--`, if there is one.")]
pub(crate) struct Args {
    /// Only this Service; can be repeated, as --vip and --node-port can.
    #[arg(long, value_name = "NS/NAME[:PORT]", value_parser = service)]
    service: Vec<String>,
    /// Only the Service at this virtual address and port.
    #[arg(long, value_name = "ADDR:PORT")]
    vip: Vec<SocketAddr>,
    /// Only the Service at this NodePort.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    node_port: Vec<u16>,
    /// Where pods live: tells pod→ClusterIP from external→ClusterIP; one network a family.
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
    /// Text, or one JSON object a line of which the last is the summary.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
    /// Made once the probes are attached: traffic after that is seen.
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// A command to run meanwhile.
    #[arg(last = true, value_name = "CMD")]
    command: Vec<std::ffi::OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// How often the probes' ring buffer is emptied: it holds some 20,000 records.
const EVERY: Duration = Duration::from_millis(20);
/// How often the table on a terminal is drawn anew.
const REDRAW: Duration = Duration::from_secs(1);
/// Services in the table on a terminal.
const ROWS: usize = 20;

fn service(text: &str) -> Result<String, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => Ok(text.to_owned()),
        _ => Err("a Service is NAMESPACE/NAME or NAMESPACE/NAME:PORT".to_owned()),
    }
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
    exit::require_root("svcpath trace")?;
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
        ..Options::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(trace(args, &ns, options))
}

async fn trace(args: &Args, ns: &Netns, options: Options) -> anyhow::Result<ExitCode> {
    // Before anything is attached: from here on a signal ends the session in order.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut session = Session::start(ns, options)?;
    if let Some(path) = &args.ready_file {
        std::fs::write(path, "ready\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let mut screen = Screen::new(args, &session);
    let mut command = Running::start(&args.command)?;
    let begin = Instant::now();
    let mut stopped = None;
    let mut status = None;
    while stopped.is_none() && status.is_none() {
        tokio::select! {
            _ = interrupt.recv() => stopped = Some(Signal::SIGINT),
            _ = terminate.recv() => stopped = Some(Signal::SIGTERM),
            () = tokio::time::sleep(EVERY) => {}
        }
        status = command.as_mut().map(Running::status).transpose()?.flatten();
        let events = session.poll()?;
        screen.show(&events)?;
        screen.draw(&session)?;
        if args.duration.is_some_and(|limit| begin.elapsed() >= limit) {
            break;
        }
    }
    if let Some(mut command) = command
        && status.is_none()
    {
        status = Some(command.end(stopped.unwrap_or(Signal::SIGTERM))?);
    }
    let (events, summary) = session.finish()?;
    screen.show(&events)?;
    match args.output {
        Output::Text => exit::print(&summary.to_string())?,
        Output::Json => {
            let mut line = serde_json::to_value(&summary)?;
            line["event"] = "summary".into();
            exit::print(&format!("{line}\n"))?;
        }
    }
    // Being stopped is how an open-ended session ends; a command's own end is told on.
    let code = status.map_or(0, |status| exit_code(status, args.duration.is_some()));
    Ok(ExitCode::from(code))
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
    fn start(words: &[std::ffi::OsString]) -> anyhow::Result<Option<Self>> {
        let Some((program, arguments)) = words.split_first() else {
            return Ok(None);
        };
        let child = Command::new(program).args(arguments).spawn();
        let child = child.with_context(|| format!("cannot run {}", program.display()))?;
        Ok(Some(Self(child)))
    }

    fn status(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.0.try_wait()?)
    }

    /// Asks it to end and waits until it has.
    fn end(&mut self, signal: Signal) -> anyhow::Result<ExitStatus> {
        if let Ok(pid) = i32::try_from(self.0.id()) {
            // It may have ended just now.
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), signal);
        }
        Ok(self.0.wait()?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Already waited for, or about to be: either way nothing is left.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is shown while the session lasts.
struct Screen {
    output: Output,
    journeys: bool,
    table: bool,
    started_ns: u64,
    clock: Clock,
    /// Lines of the table that are on the terminal now.
    drawn: usize,
    last: Instant,
    /// New flows of each Service when the table was drawn last.
    flows: Vec<u64>,
}

impl Screen {
    fn new(args: &Args, session: &Session) -> Self {
        let services = session.directory().services();
        if args.output == Output::Text {
            exit::say(&format!(
                "tracing {} in {} mode with {} netfilter links; {}",
                match services {
                    [one] => one.name.clone(),
                    many => format!("{} Services", many.len()),
                },
                modes(services),
                session.links(),
                if args.duration.is_none() && args.command.is_empty() {
                    "Ctrl-C ends it"
                } else {
                    "Ctrl-C ends it early"
                }
            ));
            exit::say(&format!("rule changes are heard {}", session.listening()));
        }
        Self {
            output: args.output,
            journeys: args.journeys,
            table: args.output == Output::Text && !args.journeys && std::io::stdout().is_terminal(),
            started_ns: session.started_ns(),
            clock: Clock::of_this_machine(),
            drawn: 0,
            last: Instant::now(),
            flows: Vec::new(),
        }
    }

    fn show(&mut self, events: &[Event]) -> anyhow::Result<()> {
        let mut text = String::new();
        for event in events {
            if matches!(event, Event::Journey(_) | Event::Verdict(_)) && !self.journeys {
                continue;
            }
            match self.output {
                Output::Json => text.push_str(&serde_json::to_string(event)?),
                Output::Text => self.line(&mut text, event),
            }
            text.push('\n');
        }
        if !text.is_empty() {
            self.clear(&mut text);
            exit::print(&text)?;
        }
        Ok(())
    }

    fn line(&self, text: &mut String, event: &Event) {
        // Writing into a String cannot fail, here and below.
        let _ = match event {
            Event::Journey(journey) => self.journey(text, journey),
            Event::Verdict(decided) => self.verdict(text, decided),
            Event::RuleChange(change) => write!(text, "{}  {change}", self.since(change.time_ns)),
            Event::Services {
                time_ns,
                there,
                gone,
            } => write!(
                text,
                "{}  rules read: {there} Services, {gone} that were there are gone",
                self.since(*time_ns)
            ),
        };
    }

    fn journey(&self, text: &mut String, journey: &Journey) -> std::fmt::Result {
        write!(
            text,
            "{}  {} {} {} → {}",
            self.since(journey.time_ns),
            journey.service,
            journey.path,
            journey.source,
            journey.destination
        )?;
        if let Some(headed) = journey
            .headed
            .filter(|headed| *headed != journey.destination)
        {
            write!(text, " → {headed}")?;
        }
        let cost = units::cost_u64(self.clock, journey.elapsed_ns);
        let later = if journey.first { "" } else { ", established" };
        write!(text, "  {cost}  {}{later}", journey.end)
    }

    /// What became of a flow: `shop/web:http 10.244.0.7:51544 → 10.96.0.1:80  delivered after 412 us`.
    fn verdict(&self, text: &mut String, decided: &Decided) -> std::fmt::Result {
        write!(
            text,
            "{}  {} {} → {}  {}",
            self.since(decided.time_ns),
            decided.service,
            decided.source,
            decided.destination,
            decided.verdict
        )?;
        if let Some(after_ns) = decided.after_ns {
            write!(text, " after {}", units::cost_u64(self.clock, after_ns))?;
        }
        match &decided.corrects {
            Some(before) => write!(text, " (was: {before})"),
            None => Ok(()),
        }
    }

    /// Seconds since the session began.
    fn since(&self, time_ns: u64) -> String {
        let ns = time_ns.saturating_sub(self.started_ns);
        format!("+{}.{:06} s", ns / 1_000_000_000, ns % 1_000_000_000 / 1000)
    }

    /// Draws the table of the busiest Services, over the one before.
    fn draw(&mut self, session: &Session) -> anyhow::Result<()> {
        let elapsed = self.last.elapsed();
        if !self.table || elapsed < REDRAW {
            return Ok(());
        }
        let tallies = session.tallies();
        self.flows.resize(tallies.len(), 0);
        let mut busiest: Vec<(usize, &Tally)> = tallies.iter().enumerate().collect();
        busiest.retain(|(_, tally)| tally.flows > 0);
        busiest.sort_by_key(|(index, tally)| (std::cmp::Reverse(tally.flows), *index));
        let mut rows = format!(
            "{:<44} {:>12} {:>12} {:>12} {:>12}\n",
            "Service", "new flows/s", "new flows", "went wrong", "repeated"
        );
        for (index, tally) in busiest.iter().take(ROWS) {
            let name = session
                .directory()
                .get(*index)
                .map_or("", |known| &known.name);
            let before = self.flows.get(*index).copied().unwrap_or(0);
            let rate = (tally.flows - before) as f64 / elapsed.as_secs_f64();
            let wrong = tally.bad();
            let _ = writeln!(
                rows,
                "{name:<44} {rate:>12.1} {:>12} {wrong:>12} {:>12}",
                tally.flows, tally.repeated
            );
        }
        if busiest.len() > ROWS {
            let _ = writeln!(rows, "and {} more", busiest.len() - ROWS);
        }
        for (before, tally) in self.flows.iter_mut().zip(tallies) {
            *before = tally.flows;
        }
        self.last = Instant::now();
        let mut text = rows;
        let lines = text.lines().count();
        self.clear(&mut text);
        self.drawn = lines;
        exit::print(&text)?;
        Ok(())
    }

    /// Puts before `text` what takes the table off the terminal (ECMA-48: CPL, ED).
    fn clear(&mut self, text: &mut String) {
        if self.drawn > 0 {
            text.insert_str(0, &format!("\x1b[{}F\x1b[J", self.drawn));
            self.drawn = 0;
        }
    }
}

fn modes(services: &[tracer::trace::directory::Known]) -> String {
    let mut modes: Vec<&str> = services.iter().map(|service| service.mode).collect();
    modes.sort_unstable();
    modes.dedup();
    modes.join(" and ")
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
    fn a_service_has_a_namespace() {
        assert!(service("shop/web").is_ok() && service("shop/web:http").is_ok());
        for bad in ["web", "/web", "shop/", ""] {
            assert!(service(bad).is_err(), "{bad}");
        }
    }
}
