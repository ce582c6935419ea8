//! How figures were measured, in the words that every page uses.

use std::collections::BTreeSet;

use crate::record::run::{Clock, StageHistogram};

/// What a nanosecond of this clock is.
pub(super) const fn clock(clock: Clock) -> &'static str {
    match clock {
        Clock::Virtual => {
            "virtual: the measured node runs in an emulator that advances its clock by 1 ns for each guest instruction and jumps ahead when idle. Figures are instruction counts; the same seed gives the same figures. They know nothing of caches, branch misses or contention between CPUs."
        }
        Clock::Wall => {
            "wall: real nanoseconds of the machine named below, with everything that disturbs it."
        }
    }
}

/// How a tier measures.
pub(super) fn tier(tier: &str) -> String {
    match tier {
        "hooks" => "hooks: BPF programs linked at netfilter hooks, just before and just after the priority at which a kernel component is registered, and tracepoints where packets enter and leave. No rule is inserted and no function is traced.".to_owned(),
        other => other.to_owned(),
    }
}

/// What a tier cannot see.
pub(super) fn not_seen(tier: &str) -> &'static str {
    match tier {
        "hooks" => {
            "what happens inside a stage (which rule matched, how long one rule took), work outside netfilter hooks other than as the time between two of them, the time of the network card and of the other end, and packets of other network namespaces. A packet that is queued or handed to another component inside a stage is timed until it is next seen."
        }
        _ => "what this tier cannot see is said by svcpath doctor.",
    }
}

/// What a stage is.
pub(super) const STAGE: &str = "the time between two boundaries that a packet passes one after the other, named after the hook and the component between them: PREROUTING dnat is what runs at PREROUTING from just before to just after the priority of destination NAT. ";
/// What the whole node is.
pub(super) const NODE: &str =
    "the sum of a packet’s stages on this node. The probes’ own time is left out.";
/// What packet states are.
pub(super) const STATES: &str = "what conntrack says of the packet: no reply seen yet, or a later packet in the flow’s original direction.";
/// How exact quantiles are.
pub(super) const QUANTILES: &str = "of histograms whose buckets are at most 1.6 % wide; the middle of the bucket is shown, so a figure is off by at most 0.8 %. Means are exact.";

/// What the stages hold that these histograms are of.
pub(super) fn stages<'a>(
    seen: impl Iterator<Item = &'a StageHistogram>,
) -> Vec<(&'static str, String)> {
    let names: BTreeSet<&str> = seen
        .flat_map(|stage| [stage.stage.as_str(), stage.hook.as_str()])
        .collect();
    STAGES
        .into_iter()
        .filter(|(name, _)| names.contains(name))
        .map(|(name, contains)| (name, contains.to_owned()))
        .collect()
}

/// What lies between the boundaries of each stage of the hooks tier.
const STAGES: [(&str, &str); 19] = [
    (
        "receive",
        "from the device’s receive path to the first hook",
    ),
    ("raw", "the raw table"),
    (
        "hook",
        "all components of a hook, where only hooks are told apart",
    ),
    (
        "hook+routing",
        "all components of OUTPUT and the way to POSTROUTING, where only hooks are told apart",
    ),
    ("conntrack", "connection tracking: look-up, or a new entry"),
    ("mangle", "the mangle table"),
    (
        "pre-dnat",
        "filter chains before dnat: kube-proxy’s firewall check in nftables mode",
    ),
    (
        "dnat",
        "the nat table, for first packets of flows; at OUTPUT in ipvs mode IPVS as well, which sits directly behind it",
    ),
    (
        "routing",
        "the rest of PREROUTING, and the routing decision",
    ),
    (
        "filter",
        "the filter and security tables; at OUTPUT also the way to POSTROUTING",
    ),
    (
        "ipvs",
        "in ipvs mode IPVS, to the sending of a packet that it takes; at INPUT also nat for packets it leaves; nearly empty in other modes",
    ),
    ("output", "the way from FORWARD to POSTROUTING"),
    (
        "snat",
        "the nat table: masquerade, for first packets of flows",
    ),
    ("helper", "conntrack helpers"),
    (
        "confirm",
        "conntrack helpers, and confirmation of the entry",
    ),
    ("deliver", "the way to the socket"),
    (
        "egress",
        "confirmation of the entry, neighbour, queue and driver",
    ),
    (
        "OUTPUT-ipvs",
        "as a hook: OUTPUT as a packet passes it that IPVS sends on, from within INPUT or, for the node’s own packets, a second time",
    ),
    ("-", "as a hook: before the first hook"),
];
