//! What the probes cost: the same packets with and without them, on a node of our own.
//!
//! A pod sends datagrams to a Service by way of the node; its endpoint's pod drops them at once. All of it,
//! the node's work included, happens within the `send` that is timed. Rounds with and without probes take
//! turns.

mod bench;
mod bpftrace;
mod requests;
mod table;

use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;

use self::bench::Bench;
pub use self::requests::{Connection, Percent, RESAMPLES, RequestCost};
use super::node::NodeError;
use crate::kernel::netns::NetnsError;
use crate::kernel::sysctl::SysctlError;
use crate::kernel::tool::ToolError;
use crate::probe::tier::{ProbeError, Tier};
use crate::record::run::Clock;
use crate::rules::Mode;
use crate::trace::session::TraceError;

/// Why the cost could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum CostError {
    /// The node.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// A namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The probes.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// A session.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// A setting of the node.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// A program.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// Sending.
    #[error("cannot send to {to}: {source}")]
    Send {
        /// To whom.
        to: SocketAddr,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// There is no bpftrace to compare with.
    #[error(
        "bpftrace is not installed: apt-get install bpftrace, or measure in a VM that has it: \
         cargo xtask vm --package bpftrace -- svcpath doctor --cost --against bpftrace"
    )]
    NoBpftrace,
    /// bpftrace could not be talked to.
    #[error("cannot run bpftrace: {0}")]
    Bpftrace(#[source] std::io::Error),
    /// bpftrace does not attach here.
    #[error(
        "bpftrace attaches no probes here ({0}): its kernel needs kprobes and no lockdown, as the one of \
         `cargo xtask vm --package bpftrace` has"
    )]
    NotAttached(String),
    /// What bpftrace counted is not among what it printed.
    #[error("bpftrace did not print {0}")]
    NotPrinted(&'static str),
}

/// A set of probes whose cost is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProbeSet {
    /// None.
    Off,
    /// The probes of [`Self::Live`] with programs that return at once: what the kernel takes to run them.
    Empty,
    /// What a live node carries: entry and exit of each hook, one in [`LIVE_SAMPLE`] later packets timed.
    Live,
    /// Every stage, every packet timed.
    Every,
    /// bpftrace: kprobe and kretprobe of `nf_hook_slow` and `ipt_do_table`.
    BpftraceKprobe,
    /// bpftrace: kfunc and kretfunc of `nf_hook_slow` alone; it reaches no modules.
    BpftraceKfunc,
}

impl ProbeSet {
    /// Those of ours, the cheapest first.
    const OURS: [Self; 3] = [Self::Empty, Self::Live, Self::Every];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Empty => "empty",
            Self::Live => "live",
            Self::Every => "every",
            Self::BpftraceKprobe => "bpftrace-kprobe",
            Self::BpftraceKfunc => "bpftrace-kfunc",
        }
    }
}

/// One in how many later packets a live trace times.
pub const LIVE_SAMPLE: u32 = 64;

/// A set of probes, of a tier if they are ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Setup {
    /// The probes.
    pub probes: ProbeSet,
    /// What tells them where packets are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tier: Option<Tier>,
}

impl Setup {
    const OFF: Self = Self {
        probes: ProbeSet::Off,
        tier: None,
    };

    const fn ours(probes: ProbeSet, tier: Tier) -> Self {
        Self {
            probes,
            tier: Some(tier),
        }
    }

    const fn of_bpftrace(probes: ProbeSet) -> Self {
        Self { probes, tier: None }
    }
}

/// Kinds of packets, which cost differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PacketKind {
    /// The first packet of a flow to a Service.
    First,
    /// A later one.
    Later,
    /// A packet to no Service, straight to a pod.
    Other,
}

impl PacketKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::First, Self::Later, Self::Other];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Later => "later",
            Self::Other => "other",
        }
    }
}

/// What a kind of packet costs with a set of probes.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// The probes.
    #[serde(flatten)]
    pub setup: Setup,
    /// The packets.
    pub packets: PacketKind,
    /// Packets timed.
    pub count: u64,
    /// A packet's whole way, the middle one of the rounds, ns of the report's clock.
    pub packet_ns: f64,
    /// The lowest and highest round.
    pub range_ns: (f64, f64),
    /// What the probes added to a packet, ns.
    pub added_ns: f64,
    /// Programs of ours that ran for each packet, by the kernel's count.
    pub runs: f64,
    /// What was added for each run, ns; absent without runs of ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_ns: Option<f64>,
    /// Times taken for each packet: stages, or for bpftrace calls of functions.
    pub stages: f64,
    /// What was added for each of them, ns; absent if less than one was taken for each packet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage_ns: Option<f64>,
    /// The same as a share of what [`ProbeSet::BpftraceKprobe`] adds for each of its own, for such packets; absent
    /// without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_kprobe: Option<f64>,
    /// The same of [`ProbeSet::BpftraceKfunc`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_kfunc: Option<f64>,
}

/// A tier that this kernel has not.
#[derive(Clone, Debug, Serialize)]
pub struct LeftOut {
    /// Which.
    pub tier: Tier,
    /// What the kernel said.
    pub why: String,
}

/// Of how many begins the ends were found, while packets are rejected on their way: the error that answers such
/// a packet is sent from within the rule that rejects it.
#[derive(Clone, Debug, Serialize)]
pub struct Pairing {
    /// Whose.
    #[serde(flatten)]
    pub setup: Setup,
    /// What is timed: a function, or a packet's journey.
    pub what: &'static str,
    /// Packets that were sent to a Service with endpoints.
    pub delivered: u32,
    /// Packets that were sent to a Service without, and rejected.
    pub rejected: u32,
    /// Begins.
    pub begun: u64,
    /// Those whose time was taken.
    pub timed: u64,
    /// Begins that took the place of another, which had not ended.
    pub overwritten: u64,
    /// Ends whose begin was not found.
    pub unpaired: u64,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct CostReport {
    /// Of every time.
    pub clock: Clock,
    /// How the node's Services are implemented.
    pub mode: Mode,
    /// Rounds of each set and kind.
    pub rounds: u32,
    /// What bpftrace says of its version, if it was compared with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bpftrace: Option<String>,
    /// Each set with each kind.
    pub costs: Vec<Cost>,
    /// Tiers of which nothing could be measured.
    pub left_out: Vec<LeftOut>,
    /// What sessions take from the rate of TCP requests.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub requests: Vec<RequestCost>,
    /// How many times were lost, in the comparison with bpftrace.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pairing: Vec<Pairing>,
}

/// The kernel frees what the set of probes before had, some 20 MB, when it has nothing else to do.
const CALM: Duration = Duration::from_millis(500);

/// Measures our probes: what they add to packets, and what sessions take from the rate of TCP requests.
pub async fn measure(rounds: u32, packets: u32) -> Result<CostReport, CostError> {
    let mut report = measure_packets(rounds, packets).await?;
    let tiers: Vec<Tier> = Tier::ALL
        .into_iter()
        .filter(|tier| {
            report
                .left_out
                .iter()
                .all(|left_out| left_out.tier != *tier)
        })
        .collect();
    report.requests = requests::measure(rounds, &tiers, report.clock).await?;
    Ok(report)
}

/// What our probes add to packets: `rounds` rounds of `packets` packets of each kind with each set.
pub async fn measure_packets(rounds: u32, packets: u32) -> Result<CostReport, CostError> {
    let bench = Bench::build(Mode::Nftables).await?;
    let (tiers, left_out) = bench.tiers()?;
    let of_tier = |tier| ProbeSet::OURS.map(|set| Setup::ours(set, tier));
    let setups: Vec<Setup> = std::iter::once(Setup::OFF)
        .chain(tiers.into_iter().flat_map(of_tier))
        .collect();
    Ok(CostReport {
        clock: Clock::of_this_machine(),
        mode: Mode::Nftables,
        rounds,
        bpftrace: None,
        costs: compare(&bench, &setups, rounds, packets).await?,
        left_out,
        requests: Vec::new(),
        pairing: Vec::new(),
    })
}

/// Measures our probes against bpftrace's, which time the same functions as the usual scripts do.
pub async fn measure_against_bpftrace(rounds: u32, packets: u32) -> Result<CostReport, CostError> {
    const MODE: Mode = Mode::IptablesLegacy;
    let version = bpftrace::version()?;
    let bench = Bench::build(MODE).await?;
    let (tiers, left_out) = bench.tiers()?;
    let theirs = [ProbeSet::BpftraceKprobe, ProbeSet::BpftraceKfunc].map(Setup::of_bpftrace);
    let ours = tiers
        .into_iter()
        .map(|tier| Setup::ours(ProbeSet::Every, tier));
    let ours: Vec<Setup> = ours.collect();
    let setups = [&[Setup::OFF][..], &theirs, &ours].concat();
    let mut costs = compare(&bench, &setups, rounds, packets).await?;
    relate(&mut costs);
    let mut pairing = bench.pairing_of_bpftrace()?;
    for setup in ours {
        pairing.push(bench.pairing_of_ours(setup)?);
    }
    Ok(CostReport {
        clock: Clock::of_this_machine(),
        mode: MODE,
        rounds,
        bpftrace: Some(version),
        costs,
        left_out,
        requests: Vec::new(),
        pairing,
    })
}

/// Measures these setups, of which the first has no probes.
async fn compare(
    bench: &Bench,
    setups: &[Setup],
    rounds: u32,
    packets: u32,
) -> Result<Vec<Cost>, CostError> {
    let kinds = PacketKind::ALL.len();
    let mut times = vec![Vec::new(); setups.len() * kinds];
    let mut counts = Vec::with_capacity(setups.len());
    for round in 1..=rounds {
        for (number, setup) in setups.iter().enumerate() {
            let attached = bench.attach(*setup)?;
            tokio::time::sleep(CALM).await;
            for (kind, packet) in PacketKind::ALL.into_iter().enumerate() {
                times[number * kinds + kind].push(bench.time(packet, packets)?);
            }
            // Counting costs a little: when all has been timed.
            if round == rounds {
                counts.push(bench.count(*setup, attached, packets)?);
            }
        }
    }
    let mut costs: Vec<Cost> = Vec::new();
    for (number, (setup, counted)) in setups.iter().zip(counts).enumerate() {
        for (kind, (packet, counted)) in PacketKind::ALL.into_iter().zip(counted).enumerate() {
            let times = &mut times[number * kinds + kind];
            times.sort_by(f64::total_cmp);
            let packet_ns = times[times.len() / 2];
            let off_ns = costs.get(kind).map_or(packet_ns, |off| off.packet_ns);
            let added_ns = packet_ns - off_ns;
            let each = |number: f64| (number >= 1.0).then(|| added_ns / number);
            costs.push(Cost {
                setup: *setup,
                packets: packet,
                count: u64::from(rounds) * u64::from(packets),
                packet_ns,
                range_ns: (times[0], times[times.len() - 1]),
                added_ns,
                runs: counted.runs,
                run_ns: each(counted.runs),
                stages: counted.stages,
                stage_ns: each(counted.stages),
                of_kprobe: None,
                of_kfunc: None,
            });
        }
    }
    Ok(costs)
}

/// What each stage costs as a share of what bpftrace adds for one.
fn relate(costs: &mut [Cost]) {
    let of = |costs: &[Cost], probes, packets| {
        let mut costs = costs.iter();
        let found = costs.find(|cost| cost.setup.probes == probes && cost.packets == packets);
        found.and_then(|cost| cost.stage_ns)
    };
    for number in 0..costs.len() {
        let Cost {
            packets, stage_ns, ..
        } = costs[number];
        let share = |probes| Some(stage_ns? / of(costs, probes, packets)?);
        let (kprobe, kfunc) = (
            share(ProbeSet::BpftraceKprobe),
            share(ProbeSet::BpftraceKfunc),
        );
        (costs[number].of_kprobe, costs[number].of_kfunc) = (kprobe, kfunc);
    }
}
