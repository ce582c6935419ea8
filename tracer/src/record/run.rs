//! `run.json`: everything one run recorded, as plain data.
//!
//! `measurements` holds nothing that depends on when or where the run took place (beyond the
//! clock's own nature), so two runs of one seed on the virtual clock compare byte for byte;
//! everything else stands under `environment`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::rules::{Mode, RuleCounts};

use crate::kernel::clock;

/// The on-disk format that this version reads and writes.
pub const FORMAT: &str = "svcpath.run/1";

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Always [`FORMAT`].
    pub format: String,
    /// When, where and with what.
    pub environment: Environment,
    /// What was measured.
    pub measurements: Measurements,
}

/// When and where a run took place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Environment {
    /// RFC 3339, UTC.
    pub started: String,
    /// Wall-clock seconds the whole run took.
    pub duration_s: f64,
    /// svcpath's version.
    pub version: String,
    /// `host` or `vm`.
    pub place: Place,
    /// Kernel release the measured node ran on (`uname -r`).
    pub kernel: String,
    /// Kernel release of the machine that started the run.
    pub host_kernel: String,
    /// Number of CPUs of the measured node.
    pub cpus: u32,
    /// Hash of the eBPF object and who compiled it.
    pub ebpf: String,
    /// Versions of the tools used, by name: `iptables` → `1.8.9`.
    pub tools: BTreeMap<String, String>,
    /// The command line.
    pub command: Vec<String>,
    /// Anything a reader should know: what could not be measured here and why.
    pub notes: Vec<String>,
}

/// Where the node under test lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// Network namespaces of this machine.
    Host,
    /// Network namespaces in a virtual machine.
    Vm,
}

/// What a nanosecond means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// Real time.
    Wall,
    /// 1 ns = 1 guest instruction (QEMU `-icount shift=0`).
    Virtual,
}

impl Clock {
    /// The clock of this machine.
    pub fn of_this_machine() -> Self {
        if clock::is_virtual() {
            Self::Virtual
        } else {
            Self::Wall
        }
    }
}

/// Everything measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Measurements {
    /// The clock of every `_ns` in this object.
    pub clock: Clock,
    /// The probe tier: `hooks`.
    pub tier: String,
    /// Seed of every random choice.
    pub seed: u64,
    /// One cell a mode and size.
    pub cells: Vec<Cell>,
    /// Control, flush and switch runs.
    pub faults: Vec<Fault>,
}

/// One mode at one size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Cell {
    /// The mode.
    pub mode: Mode,
    /// Number of Services (one port each).
    pub services: u32,
    /// Endpoints of each Service.
    pub endpoints_per_service: u32,
    /// What went into the kernel.
    pub rules: RuleCounts,
    /// Time from starting the tools to their end, all rules in.
    pub apply_ns: u64,
    /// One entry a path, Service paths first, then the same origins straight to a pod.
    pub paths: Vec<PathResult>,
    /// Did the probes see everything?
    pub probes: ProbeHealth,
}

/// One path of a cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct PathResult {
    /// The path's identifier, as [`tracer_ebpf::path::Path::id`].
    pub path: String,
    /// New flows: what became of each.
    pub flows: Ledger,
    /// What the client saw, from the intended time of sending (corrected for coordinated
    /// omission): `connect`, `answer` for TCP; `first-answer`, `later-answer` for UDP.
    pub client: BTreeMap<String, Histogram>,
    /// Time in each stage, for each packet state.
    pub stages: Vec<StageHistogram>,
    /// Time on the whole node (sum of its stages; the probes' own time left out) by packet state.
    pub node: BTreeMap<PacketState, Histogram>,
}

/// What conntrack said of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum PacketState {
    /// First packet of a flow (no reply seen yet).
    New,
    /// Later packet in the original direction.
    Established,
    /// Packet in the reply direction.
    Reply,
    /// No conntrack entry was attached when the packet was seen.
    Untracked,
}

/// Time spent in one stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct StageHistogram {
    /// `PREROUTING`, `INPUT`, `FORWARD`, `OUTPUT`, `OUTPUT-ipvs` (what IPVS sends on), `POSTROUTING`, or
    /// `-` before the first hook.
    pub hook: String,
    /// `raw`, `conntrack`, `dnat`, `ipvs`, ...
    pub stage: String,
    /// New, established or reply.
    pub state: PacketState,
    /// Nanoseconds of the run's clock.
    pub histogram: Histogram,
}

/// A histogram of nanoseconds of the run's clock: at most 1.6 % relative error a bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Histogram {
    /// Number of values.
    pub count: u64,
    /// Exact sum of the values.
    pub sum_ns: u64,
    /// `[lowest value of the bucket, highest value, count]`, ascending, empty ones left out.
    pub buckets: Vec<[u64; 3]>,
}

/// What became of flows: `sent` = `delivered` + every loss.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Ledger {
    /// Flows started.
    pub sent: u64,
    /// Flows answered by an endpoint of the Service that was asked.
    pub delivered: u64,
    /// The others, by verdict.
    pub lost: Vec<Loss>,
}

impl Ledger {
    /// Number of flows lost.
    pub fn lost_count(&self) -> u64 {
        let counts = self.lost.iter().map(|loss| loss.count);
        counts.fold(0, u64::saturating_add)
    }

    /// Is every flow accounted for?
    pub fn is_balanced(&self) -> bool {
        self.delivered.checked_add(self.lost_count()) == Some(self.sent)
    }
}

/// A verdict other than delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// A rule answered with ICMP unreachable or RST.
    Rejected,
    /// The kernel dropped it on the node.
    Dropped,
    /// It left the node with the Service's address untranslated.
    Leaked,
    /// No answer, and no sign of where it ended.
    Unanswered,
    /// Answered by someone who is no endpoint of that Service.
    Misdelivered,
    /// Ended by a TCP RST.
    Reset,
    /// The client could not even send (its error is the reason).
    Unsent,
}

/// Flows lost in one way.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Loss {
    /// How.
    pub verdict: Verdict,
    /// The kernel's drop reason or the client's error, if known.
    pub reason: Option<String>,
    /// `HOOK stage` where the last packet ended, if known.
    pub stage: Option<String>,
    /// How many flows.
    pub count: u64,
}

/// What the probes missed. A run with uncounted loss is invalid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ProbeHealth {
    /// Netfilter links attached.
    pub links: u32,
    /// Tracepoints attached.
    pub tracepoints: u32,
    /// Journeys that began at an entry probe.
    pub journeys: u64,
    /// Journeys that left by a device.
    pub transmitted: u64,
    /// Journeys that ended at a local socket.
    pub delivered_locally: u64,
    /// Journeys that the kernel dropped.
    pub dropped: u64,
    /// Journeys whose end no probe saw.
    pub unfinished: u64,
    /// Records that the ring buffer could not take.
    pub ring_lost: u64,
    /// Journeys given up because two packets wanted one slot.
    pub slot_collisions: u64,
    /// Probes that found the packet at another step than expected.
    pub unpaired: u64,
    /// Netfilter packets that belonged to no Service and left after one look-up.
    pub other_packets: u64,
}

/// A control, flush or switch run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// What was done.
    pub kind: FaultKind,
    /// The mode before.
    pub mode: Mode,
    /// The mode after, for a switch.
    pub to: Option<Mode>,
    /// Number of Services.
    pub services: u32,
    /// Length of the traffic.
    pub duration_ns: u64,
    /// Width of one bin of every series.
    pub bin_ns: u64,
    /// How long a client waits for an answer before the flow or request counts as lost.
    pub patience_ns: u64,
    /// What was done to the rules, in order; times from the start of the traffic.
    pub changes: Vec<RuleChange>,
    /// What each path's users saw.
    pub paths: Vec<FaultPath>,
    /// Did the probes see everything?
    pub probes: ProbeHealth,
}

/// Kinds of fault runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum FaultKind {
    /// Nothing is done: nothing may be lost.
    Control,
    /// All Service rules are flushed and put back later.
    Flush,
    /// The node is switched to another mode and back.
    Switch,
}

/// One change of the node's rules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RuleChange {
    /// Start, from the start of the traffic.
    pub start_ns: u64,
    /// End.
    pub end_ns: u64,
    /// What was done, with the tool: `iptables-legacy -t nat -F`.
    pub what: String,
    /// Rules, elements and servers before.
    pub before: u64,
    /// And after.
    pub after: u64,
}

/// What one path's users saw during a fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct FaultPath {
    /// The path's identifier.
    pub path: String,
    /// Flows started during the run.
    pub new: Ledger,
    /// Flows established before the fault: `sent` is their number.
    pub established: Ledger,
    /// Every outage: first failed new flow to first good new flow after it.
    pub outages: Vec<Outage>,
    /// New flows by the bin in which they were meant to start.
    pub series: Vec<Bin>,
}

/// From the first failed new flow to the first good new flow after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Outage {
    /// When the first flow that failed was started, from the start of the traffic.
    pub start_ns: u64,
    /// When the next flow that succeeded was started; `None`: not before the end.
    pub end_ns: Option<u64>,
    /// New flows lost in it.
    pub lost: u64,
}

/// New flows of one time bin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Bin {
    /// Flows started.
    pub sent: u64,
    /// Of them lost.
    pub lost: u64,
}
