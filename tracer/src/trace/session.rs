//! A session: probes on a node, its Services by name, and what became of every new flow to them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use serde::Serialize;
use tracer_ebpf::path::Target;
use tracer_ebpf::record::{Record, kind};

use super::changes::{ChangesError, RuleChange, Watcher};
use super::directory::{Choice, Directory};
use super::hints;
use super::journey::{End, Journey};
use super::summary::{Health, Summary, Tally};
use super::timeline::Timeline;
use crate::cluster::Cidr;
use crate::kernel::addresses::{self, AddressError};
use crate::kernel::btf::BtfError;
use crate::kernel::clock::monotonic_ns;
use crate::kernel::dump;
use crate::kernel::netns::{Netns, NetnsError};
use crate::kernel::tool::ToolError;
use crate::probe::hooks::{HooksTier, ProbeError, Watch};
use crate::record::evidence::{Reasons, destination_of, source_of};
use crate::record::headers::dissect;
use crate::record::times;
use crate::rules::dump::Unreadable;
use crate::rules::services::{self, Found};

/// Room for Services that come while a session lasts, as addresses and endpoints of each family.
const SPARE: u32 = 16 << 10;
/// Rule changes that a summary tells one by one; the others are counted.
const CHANGES: usize = 10_000;
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
    #[error(
        "no rules of kube-proxy are in this network namespace: name the node's with --netns (that of kube-proxy is \
         /proc/PID/ns/net), or see why kube-proxy has written none; other proxies leave no rules that can be read"
    )]
    NoServices,
    /// Nothing of what was asked for is there.
    #[error(
        "the rules name no such Service (of {services} that they name): {}; `svcpath rules parse --live` lists them",
        unmatched.join("; ")
    )]
    NoSuchService {
        /// How many the rules name.
        services: usize,
        /// Each choice, and what is nearest to it.
        unmatched: Vec<String>,
    },
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
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum Event {
    /// A packet went by.
    Journey(Journey),
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
    hints: Vec<String>,
    probes: HooksTier,
    watcher: Watcher,
    reasons: Reasons,
    directory: Directory,
    tallies: Vec<Tally>,
    timeline: Timeline,
    changes: Vec<RuleChange>,
    more_changes: u64,
    changed: Option<Instant>,
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
        directory.learn(&found, &local);
        if directory.services().is_empty() {
            return Err(TraceError::NoSuchService {
                services: found.services.len(),
                unmatched: hints::unmatched(&options.choices, &found),
            });
        }
        let mut probes = HooksTier::attach(ns, &watch(&directory, local, &options))?;
        if options.cost {
            probes.count_run_time()?;
        }
        Ok(Self {
            ns: ns.clone(),
            hints: hints::mixed(&found)
                .into_iter()
                .chain(hints::unmatched(&options.choices, &found))
                .collect(),
            options,
            probes,
            watcher,
            reasons: Reasons::of_this_kernel()?,
            tallies: vec![Tally::default(); directory.services().len()],
            directory,
            changes: Vec::new(),
            more_changes: 0,
            changed: None,
            reading: None,
            others: 0,
            timeline: Timeline::default(),
            started_ns: monotonic_ns(),
        })
    }

    /// When the probes were attached (`CLOCK_MONOTONIC`, ns).
    pub const fn started_ns(&self) -> u64 {
        self.started_ns
    }

    /// What is worth saying at the start: choices that match nothing, rules of several modes.
    pub fn hints(&self) -> &[String] {
        &self.hints
    }

    /// Number of netfilter links.
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
            if self.changes.len() < CHANGES {
                self.changes.push(change.clone());
            } else {
                self.more_changes += 1;
            }
            events.push(Event::RuleChange(change));
        }
        for record in self.probes.drain()? {
            match self.judge(&record) {
                Some((index, journey)) => {
                    if self.tallies[index].add(&journey) {
                        self.timeline.add(self.started_ns, &journey);
                    }
                    events.push(Event::Journey(journey));
                }
                None => self.others += 1,
            }
        }
        events.extend(self.learn()?);
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
            self.directory.learn(&found, &local);
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
            let (tell, reading) = channel();
            let ns = self.ns.clone();
            std::thread::spawn(move || {
                // A session that has ended does not want to know.
                let _ = tell.send(read(&ns));
            });
            self.reading = Some(reading);
        }
        Ok(None)
    }

    /// What a record says of a packet to a Service.
    fn judge(&self, record: &Record) -> Option<(usize, Journey)> {
        let destination = destination_of(record);
        let index = self.directory.asked(destination, record.protocol)?;
        let service = self.directory.get(index)?;
        let headers = dissect(&record.header);
        let (source_after, headed) = headers.and_then(|h| h.addresses()).unzip();
        let path = tracer_ebpf::path::Path::ALL.get(usize::from(record.path));
        let virtual_address = path.is_some_and(|path| path.target == Target::ClusterIp);
        let end = match (record.kind, headed) {
            (kind::DROP, _) => {
                let drop = self.reasons.drop_of(record);
                End::Dropped {
                    reason: drop.reason,
                    stage: drop.stage,
                }
            }
            (_, None) => End::Unknown,
            (_, Some(headed)) if service.endpoints.contains(&headed) => {
                if record.transmitted == 0 {
                    End::Delivered
                } else {
                    End::Sent
                }
            }
            (_, Some(headed)) if headed == destination && record.transmitted == 0 => {
                End::Untranslated
            }
            (_, Some(headed)) if headed == destination && virtual_address => End::Leaked,
            (_, Some(_)) => End::Elsewhere,
        };
        let journey = Journey {
            time_ns: record.started,
            service: service.name.clone(),
            protocol: record.protocol,
            source: source_of(record),
            destination,
            headed,
            path: path.map_or("unknown", |path| path.title()),
            first: record.kind == kind::FIRST || record.state == tracer_ebpf::record::state::NEW,
            elapsed_ns: record.elapsed,
            source_after,
            stages: Vec::new(),
            header: record.header,
            end,
        };
        Some((index, journey))
    }

    /// Ends the session: what is left in the ring is counted, the probes are detached.
    pub fn finish(mut self) -> Result<(Vec<Event>, Summary), TraceError> {
        let events = self.poll()?;
        let stats = self.probes.stats()?;
        let cost = self.probes.run_time()?;
        let found = self.probes.times()?;
        let stages: BTreeMap<_, _> = tracer_ebpf::path::Path::ALL
            .into_iter()
            .filter(|path| path.target != Target::Pod)
            .map(|path| (path.title(), times::of_path(&found, path)))
            .filter(|(_, times)| !times.node.is_empty())
            .collect();
        let summary = Summary::new(
            (self.started_ns, monotonic_ns()),
            &self.directory,
            &self.tallies,
            self.timeline,
            stages,
            (self.changes, self.more_changes),
            Health::new(stats, self.others, cost),
        );
        Ok((events, summary))
    }
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
    }
}
