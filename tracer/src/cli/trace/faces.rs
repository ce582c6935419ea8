//! What a session shows while it lasts, and what it leaves.

use std::io::IsTerminal as _;
use std::path::Path;
use std::time::Duration;

use tracer::kernel::clock;
use tracer::kernel::netns::Netns;
use tracer::probe::tier::Tier;
use tracer::record::run::Clock;
use tracer::report::bursts::Burst;
use tracer::report::recorder::Recorder;
use tracer::report::write::{WriteError, printable};
use tracer::report::{trace, units};
use tracer::trace::directory::Known;
use tracer::trace::pcapng::{About, Encoder};
use tracer::trace::run::TraceEnvironment;
use tracer::trace::session::{Event, Session};
use tracer::trace::summary::Summary;

use super::crowd::Crowd;
use super::live::Live;
use super::row::Row;
use super::{Args, Output, text};
use crate::cli::{bench, environment, exit};

/// Every face of one session.
pub(super) struct Faces {
    output: Output,
    journeys: bool,
    clock: Clock,
    started_ns: u64,
    live: Option<Live>,
    crowd: Crowd,
    row: Row,
    encoder: Encoder,
    recorder: Option<Recorder>,
    environment: TraceEnvironment,
    ns: Netns,
}

impl Faces {
    /// Says what is traced, and begins the files.
    pub(super) fn start(args: &Args, ns: &Netns, session: &Session) -> anyhow::Result<Self> {
        let about = description(session);
        let early = if args.duration.is_none() && args.command.is_empty() {
            ""
        } else {
            " early"
        };
        exit::say(&format!("tracing {about}; Ctrl-C ends it{early}"));
        for hint in session.hints() {
            exit::say(&printable(hint));
        }
        let clock = Clock::of_this_machine();
        let plain_table = args.output == Output::Text && !args.journeys && args.command.is_empty();
        let offset_ns = clock::realtime_offset_ns();
        let began_ns = clock::monotonic_ns().saturating_sub(session.started_ns());
        let live = || Live::new(Duration::from_nanos(began_ns));
        let faces = Self {
            output: args.output,
            journeys: args.journeys,
            clock,
            started_ns: session.started_ns(),
            live: (plain_table && std::io::stdout().is_terminal()).then(live),
            crowd: Crowd::default(),
            row: Row::default(),
            encoder: Encoder::new(clock, offset_ns),
            recorder: args
                .dir
                .as_ref()
                .map(|dir| recorder(dir, args.keep))
                .transpose()?,
            environment: TraceEnvironment {
                realtime_offset_ns: offset_ns,
                ..environment(args, session)
            },
            ns: ns.clone(),
        };
        if faces.output == Output::Pcapng {
            exit::print_bytes(&faces.encoder.begin(&faces.about(&about)))?;
        }
        Ok(faces)
    }

    /// Keeps what happened, if anything is kept.
    pub(super) fn record(&mut self, events: &[Event]) {
        if let Some(recorder) = &mut self.recorder {
            goes_on(recorder.keep(events));
        }
    }

    /// Tells what happened.
    pub(super) fn tell(&mut self, events: &[Event]) -> Result<(), exit::Stdout> {
        let now_ns = clock::monotonic_ns();
        self.tell_until(events, now_ns, now_ns)
    }

    /// The same of the last events: nothing is left to be told later.
    pub(super) fn tell_last(&mut self, events: &[Event]) -> Result<(), exit::Stdout> {
        self.tell_until(events, clock::monotonic_ns(), u64::MAX)
    }

    fn tell_until(
        &mut self,
        events: &[Event],
        now_ns: u64,
        until_ns: u64,
    ) -> Result<(), exit::Stdout> {
        let mut out = Vec::new();
        match self.output {
            Output::Text => {
                for event in self.crowd.part(events, now_ns) {
                    self.text(&mut out, event, now_ns);
                }
                if let Some(burst) = self.row.over(until_ns) {
                    out.extend(self.burst(&burst));
                }
                let at = self.since(now_ns);
                for others in self.crowd.others(until_ns) {
                    out.extend(format!("{at}  {others}\n").into_bytes());
                }
            }
            Output::Json => events.iter().for_each(|event| self.json(&mut out, event)),
            Output::Pcapng => out.extend(events.iter().flat_map(|event| self.packet(event))),
        }
        if out.is_empty() {
            return Ok(());
        }
        if let Some(live) = &mut self.live {
            let clear = live.clear();
            out.splice(0..0, clear.into_bytes());
        }
        exit::print_bytes(&out)
    }

    /// Draws the table of the busiest Services, if it is time.
    pub(super) fn draw(&mut self, session: &Session) -> anyhow::Result<()> {
        if let Some(live) = &mut self.live {
            let text = live.draw(self.clock, session)?;
            if !text.is_empty() {
                exit::print(&text)?;
            }
        }
        Ok(())
    }

    /// Tells what was found.
    pub(super) fn end(&mut self, summary: &Summary) -> anyhow::Result<()> {
        match self.output {
            Output::Text => {
                let clear = self.live.as_mut().map(Live::clear).unwrap_or_default();
                let colour = std::io::stdout().is_terminal();
                let said = bench::terminal(&trace::session(summary), colour);
                exit::print(&format!("{clear}\n{said}"))?;
            }
            Output::Json => {
                let mut line = serde_json::to_value(summary)?;
                line["event"] = "summary".into();
                exit::print(&format!("{line}\n"))?;
            }
            Output::Pcapng => {
                let probes = &summary.probes;
                let now = clock::monotonic_ns();
                exit::print_bytes(&self.encoder.end(now, probes.journeys, probes.ring_lost))?;
                let colour = std::io::stderr().is_terminal();
                let said = bench::terminal(&trace::session(summary), colour);
                exit::say_lines(&said);
            }
        }
        Ok(())
    }

    /// Completes the files. Is there nothing that could not be written?
    pub(super) fn keep(&mut self, summary: &Summary) -> bool {
        let Some(recorder) = self.recorder.take() else {
            return true;
        };
        self.environment.tools = environment::rule_tools(&self.ns);
        match recorder.finish(std::mem::take(&mut self.environment), summary) {
            Ok((page, whole)) => {
                exit::say(&format!("report  {}", page.display()));
                if !whole {
                    exit::say(
                        "journeys.jsonl is not whole: the report says how many are left out, and why",
                    );
                }
                whole
            }
            Err(error) => {
                exit::say(&error.to_string());
                false
            }
        }
    }

    fn text(&mut self, out: &mut Vec<u8>, event: &Event, now_ns: u64) {
        let line = match event {
            Event::Journey(journey) if self.journeys => {
                text::journey(self.clock, &self.since(journey.time_ns), journey)
            }
            Event::Journey(_) => return,
            Event::Verdict(_) if !self.journeys => return,
            Event::RuleChange(change) => {
                if let Some(live) = &mut self.live {
                    live.heard(change);
                }
                let told = self.row.part(change, now_ns);
                out.extend(told.iter().flat_map(|burst| self.burst(burst)));
                return;
            }
            other => format!("{}  {}\n", self.since(other.time_ns()), words(other)),
        };
        out.extend(line.into_bytes());
    }

    /// A line for rule changes.
    fn burst(&self, burst: &Burst) -> Vec<u8> {
        let words = printable(&burst.to_string());
        format!("{}  {words}\n", self.since(burst.last_ns())).into_bytes()
    }

    fn json(&self, out: &mut Vec<u8>, event: &Event) {
        if matches!(event, Event::Journey(_) | Event::Verdict(_)) && !self.journeys {
            return;
        }
        // Into memory, and with text for keys: neither way of failing is there.
        let _ = serde_json::to_writer(&mut *out, event);
        out.push(b'\n');
    }

    fn packet(&self, event: &Event) -> Vec<u8> {
        match event {
            Event::Journey(journey) => self.encoder.journey(journey),
            // The journey is there.
            Event::Verdict(decided) if decided.verdict.is_good() => Vec::new(),
            other => self.encoder.remark(other.time_ns(), &words(other)),
        }
    }

    fn about(&self, description: &str) -> About {
        About {
            hardware: std::env::consts::ARCH.to_owned(),
            os: format!("Linux {}", self.environment.kernel),
            program: format!("svcpath {}", self.environment.version),
            description: format!("{}: {description}", self.environment.host),
        }
    }

    /// `+0.040271 s`: since the session began.
    fn since(&self, time_ns: u64) -> String {
        trace::seconds(time_ns.saturating_sub(self.started_ns))
    }
}

/// Begins the files, as far as they can be written.
fn recorder(dir: &Path, limit: u64) -> Result<Recorder, WriteError> {
    let (recorder, began) = Recorder::start(dir, limit)?;
    goes_on(began);
    Ok(recorder)
}

/// Says why journeys are not kept from here on: the recorder tells that once.
fn goes_on(outcome: Result<(), WriteError>) {
    if let Err(error) = outcome {
        exit::say(&format!("{error}; the session goes on without"));
    }
}

/// What happened, in words; journeys have their own.
fn words(event: &Event) -> String {
    match event {
        Event::Journey(journey) => printable(&journey.to_string()),
        Event::Verdict(decided) => printable(&decided.to_string()),
        Event::Stuck(stuck) => printable(&stuck.to_string()),
        Event::Outage(outage) => printable(&outage.to_string()),
        Event::RuleChange(change) => printable(&change.to_string()),
        Event::Services { there, gone, .. } => {
            let there = units::plural(*there as u64, "Service", "Services");
            match gone {
                0 => format!("the rules now name {there}"),
                gone => format!("the rules now name {there}; gone since the session began: {gone}"),
            }
        }
        Event::Unread { why, .. } => format!("the changed rules are not read: {}", printable(why)),
    }
}

/// `12 Services in nftables mode with 25 netfilter links`.
fn description(session: &Session) -> String {
    let services = session.directory().services();
    format!(
        "{} in {} mode with {} {}",
        match services {
            [one] => printable(&one.name),
            many => units::plural(many.len() as u64, "Service", "Services"),
        },
        modes(services),
        session.links(),
        match session.tier() {
            Tier::Hooks => "netfilter links",
            Tier::Functions => "programs at functions",
        }
    )
}

fn modes(services: &[Known]) -> String {
    let mut modes: Vec<&str> = services
        .iter()
        .flat_map(|service| {
            [service.mode]
                .into_iter()
                .chain(service.by_mode.keys().copied())
        })
        .collect();
    modes.sort_unstable();
    modes.dedup();
    modes.join(" and ")
}

/// All but the tools' versions, which are asked at the end.
fn environment(args: &Args, session: &Session) -> TraceEnvironment {
    TraceEnvironment {
        started: environment::now_utc(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        host: environment::host(),
        namespace: args.netns.as_ref().map(|path| path.display().to_string()),
        kernel: tracer::kernel::release(),
        cpus: environment::cpus(),
        ebpf: environment::ebpf_object(),
        links: u32::try_from(session.links()).unwrap_or(u32::MAX),
        command: std::env::args_os()
            .map(|word| word.to_string_lossy().into_owned())
            .collect(),
        notes: session.hints().to_vec(),
        ..TraceEnvironment::default()
    }
}
