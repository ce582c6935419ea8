//! Open-loop traffic: every flow is sent when the plan says, whatever became of those before it.
//!
//! Everything runs on the caller's thread. Nothing depends on anything but the seed and the
//! clock: where time is an instruction count, two runs of one plan are the same run.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::task::{JoinSet, LocalSet};
use tracer_ebpf::path::{Origin, Path, Target};

use super::established::{Established as LongFlow, EstablishedRecord};
use super::flow::{self, Conversation, Outcome, Times};
use super::latency::{Answer, Latency};
use super::schedule::{self, Chooser, Planned};
use super::source::SourcesExhausted;
use super::timer::Timer;
use super::topology::Lab;
use crate::cluster::{Cluster, Family, Protocol};
use crate::kernel::clock::monotonic_ns;
use crate::kernel::netns::Netns;

/// New flows by one path, at a steady rate, each to a Service (and, straight to a pod, an endpoint)
/// chosen uniformly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stream {
    /// How they enter the node.
    pub path: Path,
    /// Flows a second.
    pub per_second: f64,
    /// How many flows.
    pub flows: u32,
    /// When the first is due, from the start of the traffic.
    pub start_ns: u64,
}

/// Long-lived flows by every path of the plan's streams, half TCP, half UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Established {
    /// Flows of each path.
    pub per_path: u32,
    /// Time between two requests of a flow.
    pub every: Duration,
}

/// What is sent.
#[derive(Clone, Debug, PartialEq)]
pub struct TrafficPlan {
    /// Decides every choice.
    pub seed: u64,
    /// IPv4 or IPv6.
    pub family: Family,
    /// New flows.
    pub streams: Vec<Stream>,
    /// Long-lived flows.
    pub established: Option<Established>,
    /// Requests of a UDP flow after its first answer.
    pub later: u32,
    /// How long a client waits: for the whole of a TCP flow, for each answer of a UDP flow.
    pub patience: Duration,
}

impl Default for TrafficPlan {
    fn default() -> Self {
        Self {
            seed: 0,
            family: Family::V4,
            streams: Vec::new(),
            established: None,
            later: 2,
            patience: Duration::from_secs(1),
        }
    }
}

impl TrafficPlan {
    /// From the start of the traffic to the last flow, at most.
    pub fn duration_ns(&self) -> u64 {
        self.streams
            .iter()
            .filter_map(schedule::last_due_ns)
            .max()
            .unwrap_or(0)
    }
}

/// One new flow. Times are nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowRecord {
    /// How it enters the node.
    pub path: Path,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Index of the Service in the cluster.
    pub service: usize,
    /// Client's address: no other flow of the laboratory has it with this protocol.
    pub source: SocketAddr,
    /// The address it was sent to.
    pub destination: SocketAddr,
    /// When it was due.
    pub intended_ns: u64,
    /// When it was sent.
    pub sent_ns: u64,
    /// When its outcome was known.
    pub finished_ns: u64,
    /// What became of it.
    pub outcome: Outcome,
}

/// What the clients saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrafficResult {
    /// When the traffic started; nanoseconds of `CLOCK_MONOTONIC`.
    pub origin_ns: u64,
    /// When the last outcome was known.
    pub end_ns: u64,
    /// New flows, in the order in which they were due.
    pub flows: Vec<FlowRecord>,
    /// Long-lived flows.
    pub established: Vec<EstablishedRecord>,
    /// How long answers took, of flows that were delivered ([`Answer::Connect`]: of all that
    /// got so far).
    pub latency: BTreeMap<(Path, Answer), Latency>,
    /// The furthest that the sender was behind the plan.
    pub max_lateness_ns: u64,
}

/// Why traffic could not be sent as planned.
#[derive(Debug, thiserror::Error)]
pub enum TrafficError {
    /// A rate, interval or patience that means nothing.
    #[error("the traffic plan is not sound: {0}")]
    Plan(&'static str),
    /// No Service of the cluster can be reached this way.
    #[error("no Service of the cluster can be reached by {} over {family}", .path.title())]
    NoTarget {
        /// The path.
        path: Path,
        /// The family.
        family: Family,
    },
    /// Not enough source ports.
    #[error(transparent)]
    Sources(#[from] SourcesExhausted),
    /// Not enough file descriptors.
    #[error(
        "this traffic may need {needed} open files and the limit is {limit} (ulimit -Hn): \
         lower the rate or the patience, or raise the limit"
    )]
    Files {
        /// Wanted at worst.
        needed: u64,
        /// The hard limit.
        limit: u64,
    },
    /// A long-lived flow was not answered before the start.
    #[error("a long-lived {protocol} flow by {} to {destination} could not be set up: {outcome}", .path.title())]
    Establish {
        /// The path.
        path: Path,
        /// TCP or UDP.
        protocol: Protocol,
        /// Where it was sent.
        destination: SocketAddr,
        /// What became of it.
        outcome: Outcome,
    },
    /// The start lies in the past.
    #[error("the traffic was to start {0} ns ago; it was not sent")]
    TooLate(u64),
    /// Timer or limits.
    #[error("cannot send traffic: {0}")]
    Io(#[from] io::Error),
    /// A bug: a flow's task ended without an outcome.
    #[error("a flow was lost by the laboratory itself: {0}")]
    Task(String),
}

/// Sockets made before their flows are due.
const SOCKETS_AHEAD: usize = 32;
/// No socket is made when the next flow is due within this time, in nanoseconds.
const SOCKET_TIME_NS: u64 = 100_000;
/// After so many sends in a row, answers are looked at even if the sender is behind.
const SEND_BURST: usize = 32;
/// Open files beside those of the flows.
const FILES_BESIDE: u64 = 64;

/// What the sender does at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// Long-lived flow number `.0` sends a request.
    Ask(usize),
    /// New flow number `.0` is sent.
    Send(usize),
}

/// Traffic that is ready to start: long-lived flows stand, sources are set aside.
pub struct Prepared<'a> {
    lab: &'a Lab,
    cluster: &'a Cluster,
    plan: &'a TrafficPlan,
    flows: Vec<(Planned, SocketAddr)>,
    established: Vec<(Rc<LongFlow>, Planned)>,
    events: Vec<(u64, Event)>,
}

/// Sends the plan; the clock's zero is at `origin_ns` of `CLOCK_MONOTONIC`.
///
/// Long-lived flows are made first, so leave them time, or use [`prepare`] and
/// [`Prepared::run`]. Needs a tokio runtime with I/O and time; other tasks of the caller's
/// [`LocalSet`] run beside it.
pub async fn run(
    lab: &Lab,
    cluster: &Cluster,
    plan: &TrafficPlan,
    origin_ns: u64,
) -> Result<TrafficResult, TrafficError> {
    prepare(lab, cluster, plan).await?.run(origin_ns).await
}

/// Sends `flows` flows by each path, at once after each other, so that routes and neighbours are
/// known and code is warm. The result counts nowhere, but shows whether the paths work.
pub async fn warm_up(
    lab: &Lab,
    cluster: &Cluster,
    family: Family,
    paths: &[Path],
    flows: u32,
    seed: u64,
) -> Result<TrafficResult, TrafficError> {
    let streams = paths.iter().map(|path| Stream {
        path: *path,
        per_second: 1000.0,
        flows,
        start_ns: 0,
    });
    let plan = TrafficPlan {
        seed,
        family,
        streams: streams.collect(),
        ..TrafficPlan::default()
    };
    let prepared = prepare(lab, cluster, &plan).await?;
    prepared.run(monotonic_ns() + 1_000_000).await
}

/// Checks the plan, chooses every destination, sets sources aside and makes long-lived flows.
pub async fn prepare<'a>(
    lab: &'a Lab,
    cluster: &'a Cluster,
    plan: &'a TrafficPlan,
) -> Result<Prepared<'a>, TrafficError> {
    check(plan)?;
    let flows = planned(cluster, plan)?;
    prepare_flows(lab, cluster, plan, flows).await
}

/// The flows of the plan's streams.
fn planned(cluster: &Cluster, plan: &TrafficPlan) -> Result<Vec<Planned>, TrafficError> {
    schedule::flows(cluster, plan.family, &plan.streams, plan.seed).map_err(|path| {
        TrafficError::NoTarget {
            path,
            family: plan.family,
        }
    })
}

/// Visits every Service address that the plan will ask, `visits` times each, so that the node has
/// met all that it will be measured with: IPVS looks up the route to an endpoint when it first
/// sends there, which on a node in use was long ago. The result counts nowhere.
pub async fn rehearse(
    lab: &Lab,
    cluster: &Cluster,
    plan: &TrafficPlan,
    visits: u32,
    per_second: f64,
) -> Result<TrafficResult, TrafficError> {
    let mut met = BTreeSet::new();
    let addresses: Vec<Planned> = planned(cluster, plan)?
        .into_iter()
        .filter(|flow| flow.path.target != Target::Pod)
        .filter(|flow| met.insert((flow.protocol, flow.destination)))
        .collect();
    let rehearsal = TrafficPlan {
        established: None,
        later: 0,
        streams: vec![Stream {
            path: Path::SERVICE[0],
            per_second,
            flows: 1,
            start_ns: 0,
        }],
        ..plan.clone()
    };
    check(&rehearsal)?;
    let times = std::iter::repeat_n(addresses, visits as usize).flatten();
    let flows = (0..)
        .zip(times)
        .map(|(n, flow)| Planned {
            at_ns: schedule::due_ns(&rehearsal.streams[0], n, 0.0),
            ..flow
        })
        .collect();
    let prepared = prepare_flows(lab, cluster, &rehearsal, flows).await?;
    prepared.run(monotonic_ns() + 1_000_000).await
}

async fn prepare_flows<'a>(
    lab: &'a Lab,
    cluster: &'a Cluster,
    plan: &'a TrafficPlan,
    flows: Vec<Planned>,
) -> Result<Prepared<'a>, TrafficError> {
    let long = plan_established(cluster, plan)?;
    let files = files_needed(plan, &flows, long.len());
    raise_file_limit(files)?;
    // Both at once: either every flow has a source or nothing is sent.
    let mut all: Vec<Planned> = long;
    let long_count = all.len();
    all.extend(flows);
    let mut flows = with_sources(lab, plan.family, all)?;
    let rest = flows.split_off(long_count);

    let mut established = Vec::new();
    for (planned, source) in flows {
        let record = EstablishedRecord {
            path: planned.path,
            protocol: planned.protocol,
            service: planned.service,
            source,
            destination: planned.destination,
            requests: 0,
            answered: 0,
            lost: None,
        };
        let may_answer = judge_of(cluster, &planned);
        let fd = flow::socket_in(netns_of(lab, planned.path), planned.protocol, source)?;
        let conversation = Conversation::open(
            fd,
            planned.protocol,
            planned.destination,
            plan.patience,
            may_answer,
        )
        .await
        .map_err(|outcome| TrafficError::Establish {
            path: planned.path,
            protocol: planned.protocol,
            destination: planned.destination,
            outcome,
        })?;
        established.push((LongFlow::new(record, conversation), planned));
    }
    let events = events(plan, &rest, established.len());
    Ok(Prepared {
        lab,
        cluster,
        plan,
        flows: rest,
        established,
        events,
    })
}

impl Prepared<'_> {
    /// Starts the clock at `origin_ns` of `CLOCK_MONOTONIC` and sends everything; ends when every
    /// outcome is known: at most [`TrafficPlan::duration_ns`] and, for each request of a flow, its
    /// patience later.
    pub async fn run(self, origin_ns: u64) -> Result<TrafficResult, TrafficError> {
        let now = monotonic_ns();
        if now > origin_ns {
            return Err(TrafficError::TooLate(now - origin_ns));
        }
        LocalSet::new().run_until(self.send_all(origin_ns)).await
    }

    async fn send_all(self, origin_ns: u64) -> Result<TrafficResult, TrafficError> {
        let timer = Timer::new()?;
        let collector = Rc::new(Collector::new(self.flows.len()));
        let mut listeners = JoinSet::new();
        for (long, _) in &self.established {
            listeners.spawn_local(Rc::clone(long).receive());
        }
        let mut tasks = JoinSet::new();
        let mut sockets = Sockets::new(self.lab, &self.flows);
        let mut max_lateness_ns = 0;
        let mut burst = 0;
        let mut events = self.events.iter().peekable();
        while let Some((at_ns, event)) = events.peek() {
            let due_ns = origin_ns + at_ns;
            let now = monotonic_ns();
            if now < due_ns {
                if due_ns - now > SOCKET_TIME_NS && sockets.make_one() {
                    continue;
                }
                timer.until(due_ns).await?;
                burst = 0;
                continue;
            }
            events.next();
            max_lateness_ns = max_lateness_ns.max(now - due_ns);
            match event {
                Event::Ask(number) => self.established[*number].0.send(due_ns),
                Event::Send(number) => {
                    let fd = sockets.take();
                    self.send_flow(*number, fd, due_ns, &collector, &mut tasks);
                }
            }
            burst += 1;
            if burst == SEND_BURST {
                burst = 0;
                tokio::task::yield_now().await;
            }
            while let Some(ended) = tasks.try_join_next() {
                ended.map_err(|error| TrafficError::Task(error.to_string()))?;
            }
        }
        while let Some(ended) = tasks.join_next().await {
            ended.map_err(|error| TrafficError::Task(error.to_string()))?;
        }
        if !self.established.is_empty() {
            let last = self.events.last().map_or(0, |(at_ns, _)| *at_ns);
            timer
                .until(origin_ns + last + nanoseconds(self.plan.patience))
                .await?;
        }
        listeners.shutdown().await;
        let end_ns = monotonic_ns();
        let established = self
            .established
            .iter()
            .map(|(long, planned)| long.finish(self.plan.patience, judge_of(self.cluster, planned)))
            .collect();
        let collector = Rc::into_inner(collector)
            .ok_or_else(|| TrafficError::Task("a task outlived the traffic".to_owned()))?;
        let flows: Option<Vec<FlowRecord>> = collector.records.into_inner().into_iter().collect();
        Ok(TrafficResult {
            origin_ns,
            end_ns,
            flows: flows.ok_or_else(|| TrafficError::Task("no outcome".to_owned()))?,
            established,
            latency: collector.latency.into_inner(),
            max_lateness_ns,
        })
    }

    /// Sends a new flow's first packet and leaves the rest to a task.
    fn send_flow(
        &self,
        number: usize,
        fd: io::Result<OwnedFd>,
        intended_ns: u64,
        collector: &Rc<Collector>,
        tasks: &mut JoinSet<()>,
    ) {
        let (planned, source) = &self.flows[number];
        let mut record = FlowRecord {
            path: planned.path,
            protocol: planned.protocol,
            service: planned.service,
            source: *source,
            destination: planned.destination,
            intended_ns,
            sent_ns: monotonic_ns(),
            finished_ns: 0,
            outcome: Outcome::Timeout { connected: false },
        };
        let sent = fd.map_err(|error| Outcome::unsent(&error)).and_then(|fd| {
            flow::send_first(&fd, planned.protocol, planned.destination)?;
            Ok(fd)
        });
        let fd = match sent {
            Ok(fd) => fd,
            Err(outcome) => {
                record.outcome = outcome;
                record.finished_ns = monotonic_ns();
                return collector.add(number, record, &Times::default());
            }
        };
        let may_answer = judge_of(self.cluster, planned);
        let (patience, later) = (self.plan.patience, self.plan.later);
        let collector = Rc::clone(collector);
        tasks.spawn_local(async move {
            let (outcome, times) = match record.protocol {
                Protocol::Udp => {
                    flow::finish_udp(fd, record.sent_ns, patience, later, may_answer).await
                }
                Protocol::Tcp | Protocol::Sctp => {
                    flow::finish_tcp(fd, record.sent_ns, patience, may_answer).await
                }
            };
            record.outcome = outcome;
            record.finished_ns = monotonic_ns();
            collector.add(number, record, &times);
        });
    }
}

/// Where tasks put what they saw.
struct Collector {
    records: RefCell<Vec<Option<FlowRecord>>>,
    latency: RefCell<BTreeMap<(Path, Answer), Latency>>,
}

impl Collector {
    fn new(flows: usize) -> Self {
        Self {
            records: RefCell::new(vec![None; flows]),
            latency: RefCell::default(),
        }
    }

    fn add(&self, number: usize, record: FlowRecord, times: &Times) {
        let mut latency = self.latency.borrow_mut();
        let mut add = |answer, ns| {
            latency.entry((record.path, answer)).or_default().record(ns);
        };
        if let Some(at) = times.connected {
            add(Answer::Connect, at.saturating_sub(record.intended_ns));
        }
        if record.outcome.is_delivered() {
            if let Some(at) = times.answered {
                let answer = match record.protocol {
                    Protocol::Udp => Answer::First,
                    Protocol::Tcp | Protocol::Sctp => Answer::Only,
                };
                add(answer, at.saturating_sub(record.intended_ns));
            }
            for ns in &times.later {
                add(Answer::Later, *ns);
            }
        }
        self.records.borrow_mut()[number] = Some(record);
    }
}

/// Sockets of the next flows, made while there is time.
struct Sockets<'a> {
    lab: &'a Lab,
    to_make: std::slice::Iter<'a, (Planned, SocketAddr)>,
    made: VecDeque<io::Result<OwnedFd>>,
}

impl<'a> Sockets<'a> {
    fn new(lab: &'a Lab, flows: &'a [(Planned, SocketAddr)]) -> Self {
        Self {
            lab,
            to_make: flows.iter(),
            made: VecDeque::new(),
        }
    }

    /// Makes one socket ahead; `false` if enough are there.
    fn make_one(&mut self) -> bool {
        if self.made.len() >= SOCKETS_AHEAD {
            return false;
        }
        let Some((planned, source)) = self.to_make.next() else {
            return false;
        };
        let netns = netns_of(self.lab, planned.path);
        self.made
            .push_back(flow::socket_in(netns, planned.protocol, *source));
        true
    }

    /// The next flow's socket.
    fn take(&mut self) -> io::Result<OwnedFd> {
        if self.made.is_empty() {
            self.make_one();
        }
        self.made
            .pop_front()
            .unwrap_or_else(|| Err(io::Error::other("more flows than planned")))
    }
}

fn netns_of(lab: &Lab, path: Path) -> &Netns {
    match path.origin {
        Origin::Pod => lab.client_pod(),
        Origin::Host => lab.node(),
        Origin::External => lab.external(),
    }
}

/// Tells whether an answer comes from where it may come from. It holds a copy of what it knows
/// (endpoints are few), so a task can own it.
fn judge_of(cluster: &Cluster, planned: &Planned) -> impl Fn(SocketAddr) -> bool + use<> {
    let port = &cluster.services[planned.service].ports[planned.port];
    let answerers = schedule::answerers(port, planned.path, planned.destination);
    move |by| answerers.contains(&by)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn check(plan: &TrafficPlan) -> Result<(), TrafficError> {
    for stream in &plan.streams {
        if !stream.per_second.is_finite() || stream.per_second <= 0.0 {
            return Err(TrafficError::Plan("a stream's rate must be above zero"));
        }
    }
    if plan.patience.is_zero() {
        return Err(TrafficError::Plan("patience must be above zero"));
    }
    if plan.established.is_some_and(|e| e.every.is_zero()) {
        return Err(TrafficError::Plan(
            "the time between requests must be above zero",
        ));
    }
    Ok(())
}

/// Long-lived flows: even ones TCP, odd ones UDP (all alike if the cluster has only one kind).
fn plan_established(cluster: &Cluster, plan: &TrafficPlan) -> Result<Vec<Planned>, TrafficError> {
    let Some(established) = plan.established else {
        return Ok(Vec::new());
    };
    let mut paths: Vec<Path> = plan.streams.iter().map(|stream| stream.path).collect();
    paths.sort_unstable();
    paths.dedup();
    let mut flows = Vec::new();
    for path in paths {
        let chooser = |only, number| {
            // Numbers of their own, far from those of the streams.
            let number = u64::MAX - 4 * path.lot() as u64 - number;
            Chooser::new(cluster, plan.family, path, only, plan.seed, number)
        };
        let mut tcp = chooser(Some(Protocol::Tcp), 0);
        let mut udp = chooser(Some(Protocol::Udp), 1);
        for n in 0..established.per_path {
            let planned = if n % 2 == 0 {
                tcp.choose(0).or_else(|| udp.choose(0))
            } else {
                udp.choose(0).or_else(|| tcp.choose(0))
            };
            flows.push(planned.ok_or(TrafficError::NoTarget {
                path,
                family: plan.family,
            })?);
        }
    }
    Ok(flows)
}

/// Gives every flow its source.
fn with_sources(
    lab: &Lab,
    family: Family,
    flows: Vec<Planned>,
) -> Result<Vec<(Planned, SocketAddr)>, SourcesExhausted> {
    let mut wanted: BTreeMap<(Origin, Protocol), u64> = BTreeMap::new();
    for flow in &flows {
        *wanted.entry((flow.path.origin, flow.protocol)).or_default() += 1;
    }
    let mut sources = BTreeMap::new();
    for ((origin, protocol), count) in &wanted {
        let taken = lab.sources.take(*origin, family, *protocol, *count)?;
        sources.insert((*origin, *protocol), taken);
    }
    Ok(flows
        .into_iter()
        .filter_map(|flow| {
            // Exactly as many were taken as there are flows.
            let source = sources
                .get_mut(&(flow.path.origin, flow.protocol))?
                .next()?;
            Some((flow, source))
        })
        .collect())
}

/// Everything the sender does, in order. Long-lived flows take turns within their interval.
fn events(
    plan: &TrafficPlan,
    flows: &[(Planned, SocketAddr)],
    established: usize,
) -> Vec<(u64, Event)> {
    let mut events: Vec<(u64, Event)> = flows
        .iter()
        .enumerate()
        .map(|(number, (planned, _))| (planned.at_ns, Event::Send(number)))
        .collect();
    if let Some(every) = plan.established.map(|e| nanoseconds(e.every)) {
        let end = plan.duration_ns();
        for number in 0..established {
            let offset = u128::from(every) * number as u128 / established as u128;
            let mut at_ns = u64::try_from(offset).unwrap_or(u64::MAX);
            while at_ns <= end {
                events.push((at_ns, Event::Ask(number)));
                at_ns = at_ns.saturating_add(every);
            }
        }
    }
    events.sort_unstable();
    events
}

/// Open files at worst: every flow lives as long as its patience lets it. The server's end of a
/// TCP flow is in this process as well; all UDP flows share their servers' sockets.
fn files_needed(plan: &TrafficPlan, flows: &[Planned], established: usize) -> u64 {
    let patience = nanoseconds(plan.patience);
    let mut changes: Vec<(u64, i64)> = Vec::with_capacity(2 * flows.len());
    for flow in flows {
        let (files, life) = match flow.protocol {
            Protocol::Udp => (1, patience.saturating_mul(u64::from(plan.later) + 1)),
            Protocol::Tcp | Protocol::Sctp => (2, patience),
        };
        changes.push((flow.at_ns, files));
        changes.push((flow.at_ns.saturating_add(life), -files));
    }
    // At one moment the closing ones come first.
    changes.sort_unstable();
    let mut open = 0;
    let mut most = 0;
    for (_, files) in changes {
        open += files;
        most = most.max(open);
    }
    most.unsigned_abs() + 2 * established as u64 + SOCKETS_AHEAD as u64 + FILES_BESIDE
}

/// Raises the limit of open files to the hard limit and checks that it suffices.
fn raise_file_limit(files: u64) -> Result<(), TrafficError> {
    let open = std::fs::read_dir("/proc/self/fd")?.count() as u64;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(io::Error::from)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(io::Error::from)?;
    }
    let needed = files + open;
    if needed > hard {
        return Err(TrafficError::Files {
            needed,
            limit: hard,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::plan as addresses;

    fn plan() -> TrafficPlan {
        TrafficPlan {
            streams: vec![Stream {
                path: Path::SERVICE[0],
                per_second: 100.0,
                flows: 101,
                start_ns: 0,
            }],
            established: Some(Established {
                per_path: 4,
                every: Duration::from_millis(400),
            }),
            ..TrafficPlan::default()
        }
    }

    #[test]
    fn long_lived_flows_take_turns_until_the_last_new_flow() {
        let cluster = addresses::cluster(10, 3, false).expect("a cluster");
        let plan = plan();
        assert_eq!(plan.duration_ns(), 1_002_500_000, "the last may be late");
        let long = plan_established(&cluster, &plan).expect("long-lived flows");
        let protocols: Vec<Protocol> = long.iter().map(|flow| flow.protocol).collect();
        assert_eq!(
            protocols,
            [Protocol::Tcp, Protocol::Udp, Protocol::Tcp, Protocol::Udp]
        );
        let asks: Vec<u64> = events(&plan, &[], 4)
            .into_iter()
            .map(|(at, _)| at / 1_000_000)
            .collect();
        assert_eq!(asks, [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]);
    }

    #[test]
    fn the_worst_case_of_open_files_is_what_fits_into_a_patience() {
        let cluster = addresses::cluster(10, 3, false).expect("a cluster");
        let mut plan = plan();
        plan.patience = Duration::from_millis(100);
        plan.later = 0;
        let flows = schedule::flows(&cluster, plan.family, &plan.streams, 0).expect("flows");
        // Gone after 100 ms; TCP ones have both ends.
        let beside = 2 * 4 + SOCKETS_AHEAD as u64 + FILES_BESIDE;
        let worst = files_needed(&plan, &flows, 4) - beside;
        let files = |flow: &Planned| 1 + u64::from(flow.protocol == Protocol::Tcp);
        let expected = flows.iter().enumerate().map(|(i, last)| {
            let open = flows[..=i].iter().rev();
            let open = open.take_while(|flow| flow.at_ns + 100_000_000 > last.at_ns);
            open.map(files).sum()
        });
        let expected = expected.max();
        assert_eq!(Some(worst), expected);
    }

    #[test]
    fn a_plan_that_means_nothing_is_refused() {
        let mut bad = plan();
        bad.streams[0].per_second = 0.0;
        assert!(matches!(check(&bad), Err(TrafficError::Plan(_))));
        bad.streams[0].per_second = f64::NAN;
        assert!(matches!(check(&bad), Err(TrafficError::Plan(_))));
        let mut bad = plan();
        bad.patience = Duration::ZERO;
        assert!(matches!(check(&bad), Err(TrafficError::Plan(_))));
    }
}
