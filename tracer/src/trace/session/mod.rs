//! A session: probes on a node, its Services by name, and what became of every new flow to them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Serialize;
use tracer_ebpf::path::{Origin, Path, Target};

use crate::cluster::{Cidr, Family};
use crate::kernel::addresses::{self, AddressError};
use crate::kernel::btf::BtfError;
use crate::kernel::clock::monotonic_ns;
use crate::kernel::netns::{Netns, NetnsError};
use crate::probe::catalogue::Detail;
use crate::probe::tier::{Heard, ProbeError, Probes, Tier, Watch};
use crate::record::evidence::Reasons;
use crate::record::times;
use crate::rules::Mode;
use crate::trace::changes::{ChangesError, Listening, RuleChange, Watcher};
use crate::trace::directory::{Choice, Directory};
use crate::trace::flows::{ALL_READ, Back, Decided, Flows, Key};
use crate::trace::hints;
use crate::trace::journey::{End, Journey};
use crate::trace::outages::{Outage, Outages};
use crate::trace::packets::{Reader, Told};
use crate::trace::reading::{Reading, ReadingError};
use crate::trace::stuck::{self, Stuck};
use crate::trace::summary::{FreedAtSockets, Health, Rest, Summary};
use crate::trace::tally::Tally;
use crate::trace::timeline::Timeline;

mod learning;

/// Room for Services that come while a session lasts, as addresses and endpoints of each family.
const SPARE: u32 = 16 << 10;
/// Rule changes that a summary tells one by one; the others are counted.
const CHANGES: usize = 10_000;
/// Outages that a summary holds at most.
const OUTAGES: usize = 10_000;
/// Packets at most that wait for the rules to be read.
const HELD: usize = 10_000;

/// Why a node cannot be traced.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The node's addresses.
    #[error(transparent)]
    Addresses(#[from] AddressError),
    /// Its rules cannot be read.
    #[error(transparent)]
    Rules(#[from] ReadingError),
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
    /// outside. At most one network a family; of a family without one, what the rules say.
    pub pod_cidrs: Vec<Cidr>,
    /// Have the kernel count what the probes cost, which costs a little more.
    pub cost: bool,
    /// What tells where packets are; `None`: what this kernel has.
    pub tier: Option<Tier>,
    /// How finely packets are followed.
    pub detail: Detail,
    /// One in how many packets is timed that are not the first of a flow; 0 and 1: all.
    pub sample: u32,
    /// Only flows from or to these addresses; empty: all.
    pub pods: Vec<IpAddr>,
    /// Only flows by these paths; empty: all.
    pub paths: Vec<Path>,
}

impl Options {
    /// Is this journey's flow one that was asked for?
    fn wants(&self, journey: &Journey) -> bool {
        let ends = [
            Some(journey.source),
            journey.headed,
            Some(journey.destination),
        ];
        let mut ends = ends.into_iter().flatten();
        (self.pods.is_empty() || ends.any(|end| self.pods.contains(&end.ip())))
            && (self.paths.is_empty() || self.paths.iter().any(|path| path.title() == journey.path))
    }

    /// Are flows of pods asked for, and is it not known where pods live?
    fn no_pods(&self) -> Option<String> {
        let asked = self.paths.iter().any(|path| path.origin == Origin::Pod);
        let hint = "the rules do not say where pods live: all their flows count as external, and none as a pod's; \
                    name their network with --pod-cidr";
        (asked && self.pod_cidrs.is_empty()).then(|| hint.to_owned())
    }

    /// Are all flows of the chosen Services asked for?
    fn want_all(&self) -> bool {
        self.pods.is_empty() && self.paths.is_empty()
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum Event {
    /// A packet went by.
    Journey(Journey),
    /// It is known what became of a flow.
    Verdict(Decided),
    /// An established flow goes on to an endpoint that is gone.
    Stuck(Stuck),
    /// A Service's outage is over, or goes on when the session ends.
    Outage(Outage),
    /// Somebody changed rules.
    RuleChange(RuleChange),
    /// It is known anew what the rules say.
    Services {
        /// When (`CLOCK_MONOTONIC`, ns).
        time_ns: u64,
        /// How many `ServicePorts` they name now.
        there: usize,
        /// How many they named before and name no more.
        gone: usize,
    },
    /// The rules have changed and cannot be read, and will be tried again.
    Unread {
        /// When (`CLOCK_MONOTONIC`, ns).
        time_ns: u64,
        /// Why.
        why: String,
    },
}

impl Event {
    /// When it happened (`CLOCK_MONOTONIC`, ns).
    pub const fn time_ns(&self) -> u64 {
        match self {
            Self::Journey(journey) => journey.time_ns,
            Self::Verdict(decided) => decided.time_ns,
            Self::Stuck(stuck) => stuck.time_ns,
            Self::Outage(outage) => match outage.end_ns {
                Some(end_ns) => end_ns,
                None => outage.last_lost_ns,
            },
            Self::RuleChange(change) => change.time_ns,
            Self::Services { time_ns, .. } | Self::Unread { time_ns, .. } => *time_ns,
        }
    }
}

/// Which packet of its flow is it?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// The first.
    First,
    /// The first, sent once more.
    Repeated,
    /// The first, further on its way over the node.
    Further,
    /// A later one.
    Later,
    /// A later one that conntrack takes for a new flow's.
    PickedUp,
    /// A later one that conntrack does not track.
    Untracked,
    /// An answer to the first that was dropped.
    Answer,
    /// The first or a later one: nobody knows.
    Unplaced,
}

/// Probes at work.
#[derive(Debug)]
pub struct Session {
    ns: Netns,
    options: Options,
    hints: Vec<String>,
    /// Can the probes be told of addresses that the node has bound?
    may_absorb: bool,
    probes: Probes,
    watcher: Watcher,
    reader: Reader,
    flows: Flows,
    /// Packets that went to no known endpoint, while the rules are read again.
    held: Vec<(Turn, Heard)>,
    stuck: stuck::Watch,
    remembered: stuck::Remembered,
    outages: Outages,
    ended_outages: Vec<Outage>,
    more_outages: u64,
    directory: Directory,
    tallies: Vec<Tally>,
    timeline: Timeline,
    changes: Vec<RuleChange>,
    more_changes: u64,
    reading: Reading,
    /// What the rules say of packets before is known: no change that began before is unread (`CLOCK_MONOTONIC`, ns).
    sure_ns: u64,
    /// Records about packets to no Service: to an endpoint itself, or answers.
    others: u64,
    freed: FreedAtSockets,
    started_ns: u64,
    /// When the probes were stopped; `None`: they watch.
    ended_ns: Option<u64>,
}

impl Session {
    /// Reads the rules and attaches the probes.
    pub fn start(ns: &Netns, options: Options) -> Result<Self, TraceError> {
        // Listening begins before reading: no change falls between the two.
        let watcher = Watcher::start(ns)?;
        let reading = Reading::first(ns)?;
        let found = reading.found();
        if found.services.is_empty() {
            return Err(TraceError::NoServices);
        }
        let mut directory = Directory::new(options.choices.clone());
        let local = addresses::of_node(ns)?;
        directory.learn(found, &local, 0);
        let bound = addresses::bound(ns)?;
        directory.learn_bound(bound.clone());
        // Where IPVS mode is not, packets pay nothing for what it may bind.
        let may_absorb = found.modes.contains(&Mode::Ipvs.name());
        if directory.services().is_empty() {
            return Err(TraceError::NoSuchService {
                services: found.services.len(),
                unmatched: hints::unmatched(&options.choices, found),
            });
        }
        let options = Options {
            pod_cidrs: pod_cidrs(&options.pod_cidrs, &found.pod_cidrs),
            ..options
        };
        let mut probes = Probes::attach(
            options.tier,
            ns,
            &watch(&directory, local.clone(), &options, may_absorb),
        )?;
        let started_ns = probes.watching_since_ns();
        let missing: Vec<String> = probes
            .missing()
            .iter()
            .map(|missing| {
                let (name, without) = (missing.name, missing.without);
                format!("no probe at {name} ({}): {without}", missing.why)
            })
            .collect();
        if options.cost {
            probes.count_run_time()?;
        }
        Ok(Self {
            ns: ns.clone(),
            reader: Reader {
                reasons: Reasons::of_this_kernel(options.detail)?,
                detail: options.detail,
                local: local.iter().copied().collect(),
                settled: true,
            },
            flows: Flows::default(),
            held: Vec::new(),
            stuck: stuck::Watch::default(),
            remembered: stuck::Remembered::default(),
            outages: Outages::default(),
            ended_outages: Vec::new(),
            more_outages: 0,
            hints: hints::mixed(found)
                .into_iter()
                .chain(hints::unmatched(&options.choices, found))
                .chain(hints::hijacked(&bound, found))
                .chain(hints::crowded(probes.moved(), probes.links()))
                .chain(missing)
                .chain(options.no_pods())
                .collect(),
            options,
            may_absorb,
            probes,
            watcher,
            tallies: vec![Tally::default(); directory.services().len()],
            directory,
            changes: Vec::new(),
            more_changes: 0,
            reading,
            sure_ns: started_ns,
            others: 0,
            freed: FreedAtSockets::default(),
            timeline: Timeline::default(),
            started_ns,
            ended_ns: None,
        })
    }

    /// When the probes were attached (`CLOCK_MONOTONIC`, ns): no packet is told of that came before.
    pub const fn started_ns(&self) -> u64 {
        self.started_ns
    }

    /// Until when what happened is known, once it has been taken in (`CLOCK_MONOTONIC`, ns): nobody can be judged for
    /// what he did after the probes were stopped.
    fn now_ns(&self) -> u64 {
        self.ended_ns.unwrap_or_else(monotonic_ns)
    }

    /// What is worth saying at the start: choices that match nothing, rules of several modes.
    pub fn hints(&self) -> &[String] {
        &self.hints
    }

    /// What tells where packets are.
    pub const fn tier(&self) -> Tier {
        self.probes.tier()
    }

    /// Number of netfilter links, or of programs at functions.
    pub fn links(&self) -> usize {
        self.probes.links()
    }

    /// How rule changes are heard of.
    pub fn listening(&self) -> Listening {
        self.watcher.listening()
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
        let told_ns = self.watcher.told_until_ns(monotonic_ns());
        self.hear_news()?;
        for change in self.watcher.drain()? {
            self.reading.hear(&change);
            if self.changes.len() < CHANGES {
                self.changes.push(change.clone());
            } else {
                self.more_changes += 1;
            }
            events.push(Event::RuleChange(change));
        }
        self.sure_ns = self.reading.known_ns(told_ns);
        let heard = self.probes.hear()?;
        // Most become an event, and events are large to move.
        events.reserve(heard.len());
        self.reader.settled = !self.reading.is_outdated();
        for heard in heard {
            self.hear(&heard, &mut events);
        }
        let turn = self.reading.poll(told_ns);
        self.learn(turn, &mut events)?;
        self.sure_ns = self.reading.known_ns(told_ns);
        self.tell_held(&mut events);
        let outdated = self.reading.is_outdated();
        let now_ns = self.now_ns();
        let remembers = |key: &Key, to| self.remembered.holds(&self.ns, &self.directory, key, to);
        let decided = self
            .flows
            .decide(&self.directory, self.sure_ns, now_ns, remembers);
        self.count(decided, &mut events);
        let probes = &self.probes;
        let heard = |endpoint, protocol| probes.heard(endpoint, protocol);
        // By rules that were read before they changed, an endpoint is not dead.
        let stuck = if outdated {
            self.stuck.pause();
            Vec::new()
        } else {
            self.stuck.poll(&self.ns, &self.directory, heard)?
        };
        for stuck in stuck {
            *self.tallies[stuck.index]
                .stuck
                .entry(stuck.endpoint)
                .or_default() += 1;
            events.push(Event::Stuck(stuck));
        }
        let known_ns = self.flows.known_until_ns(now_ns).min(told_ns);
        let known = |index| self.directory.get(index);
        let over = self.outages.over(known_ns, &self.changes, known);
        self.end_outages(over, &mut events);
        events.sort_by_key(Event::time_ns);
        Ok(events)
    }

    /// Takes in what the probes told.
    fn hear(&mut self, heard: &Heard, events: &mut Vec<Event>) {
        match self.reader.read(heard, &self.directory) {
            Told::Journey {
                key,
                index,
                known,
                tracked,
                further,
                opening,
                mut journey,
            } => {
                if !self.options.wants(&journey) {
                    self.others += 1;
                    return;
                }
                journey.first = journey.first.or_else(|| self.flows.is_repeated(&key));
                let dropped = matches!(journey.end, End::Dropped { .. });
                let turn = if journey.answer && self.flows.answer_dropped(key, &journey.end) {
                    Turn::Answer
                } else if journey.first == Some(false) && dropped {
                    Turn::Later
                } else if journey.first == Some(false) {
                    // Until conntrack has seen a reply, those behind it look the same.
                    if known {
                        return;
                    }
                    if tracked {
                        Turn::PickedUp
                    } else {
                        Turn::Untracked
                    }
                } else if journey.first.is_none() {
                    Turn::Unplaced
                } else if further {
                    journey.told_before = self.flows.further(key, &journey);
                    if !dropped {
                        return;
                    }
                    Turn::Further
                } else if self.flows.first(key, index, &journey, known, opening) {
                    Turn::First
                } else {
                    Turn::Repeated
                };
                // The rules that are about to be read may say that it went to an endpoint.
                let open = journey.end == End::Elsewhere && heard.record.time >= self.sure_ns;
                if open && self.held.len() < HELD {
                    self.held.push((turn, heard.clone()));
                } else {
                    self.tell(turn, index, *journey, events);
                }
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
                    && self.options.want_all()
                {
                    *self.tallies[index].later_resets.entry(by).or_default() += 1;
                }
            }
            Told::Freed { index, sure } => self.free(index, sure),
            Told::Other => self.others += 1,
        }
    }

    /// Counts a packet that was freed at its socket, with the socket for sure or perhaps.
    fn free(&mut self, index: Option<usize>, sure: bool) {
        let index = index.filter(|_| self.options.want_all());
        let tally = index.map(|index| &mut self.tallies[index]);
        let (all, of_service) = if sure {
            (
                &mut self.freed.with_socket,
                tally.map(|tally| &mut tally.freed),
            )
        } else {
            let of_service = tally.map(|tally| &mut tally.freed_or_dropped);
            (&mut self.freed.unknown, of_service)
        };
        *all += 1;
        if let Some(count) = of_service {
            *count += 1;
        }
    }

    /// Counts a packet, and tells of it.
    fn tell(&mut self, turn: Turn, index: usize, journey: Journey, events: &mut Vec<Event>) {
        match turn {
            Turn::First => {
                self.tallies[index].add(&journey);
                self.timeline.add(self.started_ns, &journey);
            }
            Turn::Repeated => self.tallies[index].repeated += 1,
            // Its flow is counted with what became of it.
            Turn::Further => {}
            Turn::Later => self.tallies[index].add_later(&journey),
            Turn::PickedUp => self.tallies[index].picked_up += 1,
            Turn::Untracked => self.tallies[index].untracked += 1,
            Turn::Answer => self.tallies[index].add_answer(&journey),
            Turn::Unplaced => self.tallies[index].add_unplaced(&journey),
        }
        events.push(Event::Journey(journey));
    }

    /// Tells of the packets that waited for the rules, and wait no more.
    fn tell_held(&mut self, events: &mut Vec<Event>) {
        let sure_ns = self.sure_ns;
        let known = self
            .held
            .extract_if(.., |(_, heard)| heard.record.time < sure_ns);
        let known: Vec<_> = known.collect();
        for (turn, heard) in known {
            if let Told::Journey {
                key,
                index,
                mut journey,
                ..
            } = self.reader.read(&heard, &self.directory)
            {
                let owner = match turn {
                    Turn::First => self.flows.owned_by(&key, journey.time_ns, index),
                    _ => index,
                };
                if let Some(known) = self.directory.get(owner).filter(|_| owner != index) {
                    journey.service.clone_from(&known.name);
                }
                if journey.end == End::Elsewhere
                    && self.directory.is_uncertain(owner, heard.record.time)
                {
                    journey.end = End::Unknown;
                }
                self.tell(turn, owner, *journey, events);
            }
        }
    }

    fn end_outages(&mut self, outages: Vec<Outage>, events: &mut Vec<Event>) {
        let room = OUTAGES.saturating_sub(self.ended_outages.len());
        self.more_outages += outages.len().saturating_sub(room) as u64;
        self.ended_outages
            .extend(outages.iter().take(room).cloned());
        events.extend(outages.into_iter().map(Event::Outage));
    }

    /// Counts what became of flows.
    fn count(&mut self, decided: Vec<Decided>, events: &mut Vec<Event>) {
        for decided in decided {
            self.tallies[decided.index].decide(&decided);
            self.timeline.decide(self.started_ns, &decided);
            if decided.verdict.is_of_service() {
                self.outages.add(&decided);
            }
            events.push(Event::Verdict(decided));
        }
    }

    /// Ends the session: the probes are stopped, and what is left in the ring is counted.
    pub fn finish(mut self) -> Result<(Vec<Event>, Summary), TraceError> {
        let ended_ns = self.probes.stop();
        self.ended_ns = Some(ended_ns);
        self.watcher.stop();
        let mut events = self.poll()?;
        self.learn_at_end(&mut events)?;
        let read_ns = self.reading.known_ns(ALL_READ);
        // Nobody waits for what will not be read.
        self.sure_ns = ALL_READ;
        self.tell_held(&mut events);
        let remembers = |key: &Key, to| self.remembered.holds(&self.ns, &self.directory, key, to);
        let decided = self
            .flows
            .finish(&self.directory, read_ns, ended_ns, remembers);
        self.count(decided, &mut events);
        let outages = std::mem::take(&mut self.outages);
        let known = |index| self.directory.get(index);
        // What takes long to be told of, as ipset's, was told after what came later.
        self.changes.sort_by_key(|change| change.time_ns);
        let (over, going_on) = outages.finish(ended_ns, &self.changes, known);
        self.end_outages(over, &mut events);
        self.end_outages(going_on, &mut events);
        let stats = self.probes.stats()?;
        let cost = self.probes.run_time()?;
        let found = self.probes.times()?;
        let stages: BTreeMap<_, _> = Path::ALL
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
        let rest = Rest {
            tier: self.probes.tier(),
            started_ns: self.started_ns,
            ended_ns,
            timeline: self.timeline,
            paths: stages,
            rule_changes: self.changes,
            rule_changes_left_out: self.more_changes,
            outdated_ns: self.reading.outdated_ns(ended_ns),
            listening: self.watcher.listening(),
            outages: self.ended_outages,
            outages_left_out: self.more_outages,
            probes: Health::new(
                stats,
                self.others,
                self.freed,
                self.flows.forgotten(),
                self.probes.without_room(),
                cost,
            ),
        };
        let summary = Summary::new(&self.directory, &self.tallies, rest);
        events.sort_by_key(Event::time_ns);
        Ok((events, summary))
    }
}

/// Where pods live: what was asked for, and of other families what the rules say.
fn pod_cidrs(asked: &[Cidr], found: &[Cidr]) -> Vec<Cidr> {
    let of = |family| {
        let mut all = asked.iter().chain(found).copied();
        all.find(|cidr: &Cidr| cidr.family() == family)
    };
    Family::ALL.into_iter().filter_map(of).collect()
}

fn watch(directory: &Directory, local: Vec<IpAddr>, options: &Options, may_absorb: bool) -> Watch {
    Watch {
        targets: directory.targets(),
        former: directory.former(),
        node_addresses: local,
        pod_cidrs: options
            .pod_cidrs
            .iter()
            .map(|cidr| (cidr.base, cidr.prefix))
            .collect(),
        spare: SPARE,
        absorbed: may_absorb.then(|| directory.absorbed()),
        detail: options.detail,
        sample: options.sample,
        empty: false,
    }
}
