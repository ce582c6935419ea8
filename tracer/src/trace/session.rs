//! A session: probes on a node, its Services by name, and what became of every new flow to them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use serde::Serialize;
use tracer_ebpf::path::Target;
use tracer_ebpf::record::Record;

use super::changes::{ChangesError, RuleChange, Watcher};
use super::directory::{Choice, Directory};
use super::flows::{Back, Decided, Flows};
use super::journey::Journey;
use super::packets::{Reader, Told};
use super::summary::{Health, Summary};
use super::tally::Tally;
use super::timeline::Timeline;
use crate::cluster::Cidr;
use crate::kernel::addresses::{self, AddressError};
use crate::kernel::btf::BtfError;
use crate::kernel::clock::monotonic_ns;
use crate::kernel::dump;
use crate::kernel::netns::{Netns, NetnsError};
use crate::kernel::tool::ToolError;
use crate::probe::catalogue::Detail;
use crate::probe::tier::{ProbeError, Probes, Tier, Watch};
use crate::record::evidence::Reasons;
use crate::record::times;
use crate::rules::dump::Unreadable;
use crate::rules::services::{self, Found};

/// Room for Services that come while a session lasts, as addresses and endpoints of each family.
const SPARE: u32 = 16 << 10;
/// How long the rules must have been left alone before they are read again.
const SETTLED: Duration = Duration::from_millis(500);

/// Why a node cannot be traced.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The node's addresses.
    #[error(transparent)]
    Addresses(#[from] AddressError),
    /// Its rules cannot be listed.
    #[error(transparent)]
    Dump(#[from] ToolError),
    /// Its rules cannot be read.
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    /// There is nothing to trace.
    #[error("no rules of kube-proxy are here: is this the node's network namespace (--netns)?")]
    NoServices,
    /// Nothing of what was asked for is there.
    #[error(
        "the rules name no such Service (of {0} that they name): `svcpath rules parse --live` lists them"
    )]
    NoSuchService(usize),
    /// The probes.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The kernel's type information.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// The listener for rule changes.
    #[error(transparent)]
    Changes(#[from] ChangesError),
}

/// What to trace.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Only these; empty: all Services.
    pub choices: Vec<Choice>,
    /// Where pods live: who comes from there comes from a pod, everybody else but the node itself from
    /// outside. At most one network a family.
    pub pod_cidrs: Vec<Cidr>,
    /// Have the kernel count what the probes cost, which costs a little more.
    pub cost: bool,
    /// What tells where packets are; `None`: what this kernel has.
    pub tier: Option<Tier>,
    /// How finely packets are followed.
    pub detail: Detail,
    /// One in how many packets is timed that are not the first of a flow; 0 and 1: all.
    pub sample: u32,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum Event {
    /// A packet went by.
    Journey(Journey),
    /// It is known what became of a flow.
    Verdict(Decided),
    /// Somebody changed rules.
    RuleChange(RuleChange),
    /// The rules were read again.
    Services {
        /// When (`CLOCK_MONOTONIC`, ns).
        time_ns: u64,
        /// How many `ServicePorts` they name now.
        there: usize,
        /// How many they named before and name no more.
        gone: usize,
    },
}

impl Event {
    /// When it happened (`CLOCK_MONOTONIC`, ns).
    pub const fn time_ns(&self) -> u64 {
        match self {
            Self::Journey(journey) => journey.time_ns,
            Self::Verdict(decided) => decided.time_ns,
            Self::RuleChange(change) => change.time_ns,
            Self::Services { time_ns, .. } => *time_ns,
        }
    }
}

/// Probes at work.
#[derive(Debug)]
pub struct Session {
    ns: Netns,
    options: Options,
    probes: Probes,
    watcher: Watcher,
    reader: Reader,
    flows: Flows,
    directory: Directory,
    tallies: Vec<Tally>,
    timeline: Timeline,
    changes: Vec<RuleChange>,
    changed: Option<Instant>,
    /// When rules were changed last (`CLOCK_MONOTONIC`, ns).
    changed_ns: u64,
    reading: Option<Receiver<Result<Found, TraceError>>>,
    /// Records about packets to no Service: to an endpoint itself, or answers.
    others: u64,
    started_ns: u64,
}

impl Session {
    /// Reads the rules and attaches the probes.
    pub fn start(ns: &Netns, options: Options) -> Result<Self, TraceError> {
        // Listening begins before reading: no change falls between the two.
        let watcher = Watcher::start(ns)?;
        let found = read(ns)?;
        if found.services.is_empty() {
            return Err(TraceError::NoServices);
        }
        let mut directory = Directory::new(options.choices.clone());
        let local = addresses::of_node(ns)?;
        directory.learn(&found, &local, 0);
        if directory.services().is_empty() {
            return Err(TraceError::NoSuchService(found.services.len()));
        }
        let mut probes = Probes::attach(
            options.tier,
            ns,
            &watch(&directory, local.clone(), &options),
        )?;
        if options.cost {
            probes.count_run_time()?;
        }
        let started_ns = monotonic_ns();
        Ok(Self {
            ns: ns.clone(),
            reader: Reader {
                reasons: Reasons::of_this_kernel(options.detail)?,
                detail: options.detail,
                local: local.iter().copied().collect(),
            },
            flows: Flows::default(),
            options,
            probes,
            watcher,
            tallies: vec![Tally::default(); directory.services().len()],
            directory,
            changes: Vec::new(),
            changed: None,
            changed_ns: started_ns,
            reading: None,
            others: 0,
            timeline: Timeline::new(started_ns),
            started_ns,
        })
    }

    /// When the probes were attached (`CLOCK_MONOTONIC`, ns).
    pub const fn started_ns(&self) -> u64 {
        self.started_ns
    }

    /// What tells where packets are.
    pub const fn tier(&self) -> Tier {
        self.probes.tier()
    }

    /// Number of netfilter links, or of programs at functions.
    pub fn links(&self) -> usize {
        self.probes.links()
    }

    /// The Services.
    pub const fn directory(&self) -> &Directory {
        &self.directory
    }

    /// What was counted of each Service, in the directory's order.
    pub fn tallies(&self) -> &[Tally] {
        &self.tallies
    }

    /// Records that the ring buffer could not take so far: flows that are missing.
    pub fn lost(&self) -> Result<u64, TraceError> {
        Ok(self.probes.stats()?.ring_lost)
    }

    /// Takes in what happened since the last call, in the order of time.
    pub fn poll(&mut self) -> Result<Vec<Event>, TraceError> {
        let mut events = Vec::new();
        for change in self.watcher.drain()? {
            self.changed = Some(Instant::now());
            self.changed_ns = change.time_ns;
            self.changes.push(change.clone());
            events.push(Event::RuleChange(change));
        }
        for record in self.probes.drain()? {
            self.hear(&record, &mut events);
        }
        events.extend(self.learn()?);
        let reading = self.changed.is_some() || self.reading.is_some();
        let decided = self.flows.decide(&self.directory, reading, monotonic_ns());
        self.count(decided, &mut events);
        events.sort_by_key(Event::time_ns);
        Ok(events)
    }

    /// Has what was asked to be read again, in the background, been read?
    fn learn(&mut self) -> Result<Option<Event>, TraceError> {
        if let Some(reading) = &self.reading {
            let found = match reading.try_recv() {
                Err(TryRecvError::Empty) => return Ok(None),
                // The thread is gone without a word: it panicked, and has said so.
                Err(TryRecvError::Disconnected) => None,
                Ok(found) => Some(found?),
            };
            self.reading = None;
            let Some(found) = found else { return Ok(None) };
            let local = addresses::of_node(&self.ns)?;
            self.directory.learn(&found, &local, self.changed_ns);
            self.reader.local = local.iter().copied().collect();
            self.tallies
                .resize(self.directory.services().len(), Tally::default());
            let watch = watch(&self.directory, local, &self.options);
            self.probes.watch_also(&watch)?;
            let there = |there| {
                let services = self.directory.services().iter();
                services.filter(|service| service.there == there).count()
            };
            return Ok(Some(Event::Services {
                time_ns: monotonic_ns(),
                there: there(true),
                gone: there(false),
            }));
        }
        if self.changed.is_some_and(|at| at.elapsed() >= SETTLED) {
            self.changed = None;
            self.reading = Some(begin_to_read(&self.ns));
        }
        Ok(None)
    }

    /// Takes in what the probes told.
    fn hear(&mut self, record: &Record, events: &mut Vec<Event>) {
        match self.reader.read(record, &self.directory) {
            Told::Journey {
                key,
                index,
                known,
                journey,
            } => {
                if !journey.first {
                    self.tallies[index].add_later(&journey);
                } else if self.flows.first(key, index, &journey, known) {
                    self.tallies[index].add(&journey);
                    self.timeline.add(&journey);
                } else {
                    self.tallies[index].repeated += 1;
                }
                events.push(Event::Journey(*journey));
            }
            Told::Back {
                key,
                index,
                back,
                time_ns,
            } => {
                let first = self.flows.came_back(key, back, time_ns);
                if let Back::Reset(by) = back
                    && !first
                {
                    *self.tallies[index].later_resets.entry(by).or_default() += 1;
                }
            }
            Told::Other => self.others += 1,
        }
    }

    /// Counts what became of flows.
    fn count(&mut self, decided: Vec<Decided>, events: &mut Vec<Event>) {
        for decided in decided {
            self.tallies[decided.index].decide(&decided);
            events.push(Event::Verdict(decided));
        }
    }

    /// Ends the session: what is left in the ring is counted, the probes are detached.
    pub fn finish(mut self) -> Result<(Vec<Event>, Summary), TraceError> {
        let mut events = self.poll()?;
        // Rules that changed a moment ago are read before the last flows are judged by them.
        if self.changed.take().is_some() && self.reading.is_none() {
            self.reading = Some(begin_to_read(&self.ns));
        }
        while self.reading.is_some() {
            events.extend(self.learn()?);
            std::thread::sleep(Duration::from_millis(1));
        }
        let decided = self.flows.finish(&self.directory, monotonic_ns());
        self.count(decided, &mut events);
        let stats = self.probes.stats()?;
        let cost = self.probes.run_time()?;
        let found = self.probes.times()?;
        let stages: BTreeMap<_, _> = tracer_ebpf::path::Path::ALL
            .into_iter()
            .filter(|path| path.target != Target::Pod)
            .map(|path| {
                (
                    path.title(),
                    times::of_path(&found, path, self.options.detail),
                )
            })
            .filter(|(_, times)| !times.node.is_empty())
            .collect();
        let mut summary = Summary::new(
            (self.started_ns, monotonic_ns()),
            &self.directory,
            &self.tallies,
            self.timeline,
            stages,
            self.changes,
            Health::new(stats, self.others, cost),
        );
        summary.tier = self.probes.tier().name();
        Ok((events, summary))
    }
}

/// Reads the rules in the background.
fn begin_to_read(ns: &Netns) -> Receiver<Result<Found, TraceError>> {
    let (tell, reading) = channel();
    let ns = ns.clone();
    std::thread::spawn(move || {
        // A session that has ended does not want to know.
        let _ = tell.send(read(&ns));
    });
    reading
}

fn read(ns: &Netns) -> Result<Found, TraceError> {
    Ok(services::read(&dump::dump(ns)?)?)
}

fn watch(directory: &Directory, local: Vec<IpAddr>, options: &Options) -> Watch {
    Watch {
        targets: directory.targets(),
        node_addresses: local,
        pod_cidrs: options
            .pod_cidrs
            .iter()
            .map(|cidr| (cidr.base, cidr.prefix))
            .collect(),
        spare: SPARE,
        detail: options.detail,
        sample: options.sample,
    }
}
