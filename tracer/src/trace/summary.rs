//! What a session found.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use tracer_ebpf::record::Stats;

use super::changes::{Listening, RuleChange};
use super::directory::{Directory, titled};
use super::journey::End;
use super::outages::Outage;
use super::tally::Tally;
use super::timeline::Timeline;
use super::verdict::{Verdict, Who};
use crate::probe::tier::{RunTime, Tier};
use crate::record::run::{Clock, Histogram, PacketState, StageHistogram};
use crate::record::times::PathTimes;

/// One `ServicePort` in a summary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ServiceSummary {
    /// `ns/name:port`.
    pub name: String,
    /// The mode whose rules name it, or the first of them.
    pub mode: String,
    /// All of them, if the rules of more than one mode name it; else empty.
    #[serde(default)]
    pub modes: Vec<String>,
    /// New flows that were translated to an endpoint, by the mode whose rules did it; `unknown` if rules of several
    /// modes could have.
    #[serde(default)]
    pub translated: BTreeMap<String, u64>,
    /// IP protocol number.
    pub protocol: u8,
    /// Is it of IPv6? A `ServicePort` with addresses of both is told twice.
    #[serde(default)]
    pub ipv6: bool,
    /// Endpoints that the rules name.
    pub endpoints: usize,
    /// Did the rules still name it at the end?
    pub there: bool,
    /// New flows.
    pub flows: u64,
    /// First packets that were sent once more.
    pub repeated: u64,
    /// New flows by what became of them; together as many as `flows`.
    pub verdicts: Vec<VerdictCount>,
    /// Packets of established flows that were dropped.
    pub later_drops: Vec<Count>,
    /// Packets that were dropped before conntrack saw them, of new or of established flows: nobody knows.
    #[serde(default)]
    pub unplaced_drops: Vec<Count>,
    /// Answers that were dropped of flows that had not been answered.
    #[serde(default)]
    pub answer_drops: Vec<Count>,
    /// Packets under way of which conntrack made a new entry: they go on with a flow, and open none.
    #[serde(default)]
    pub picked_up: u64,
    /// Packets of established flows that conntrack does not track, and nobody translates.
    #[serde(default)]
    pub untracked: u64,
    /// Packets that their socket's queue had taken, and that were freed with it.
    #[serde(default)]
    pub freed: u64,
    /// Packets that were freed at their socket, and of which the kernel does not say whether it dropped them.
    #[serde(default)]
    pub freed_or_dropped: u64,
    /// Resets of flows that had been answered, or answered otherwise.
    pub later_resets: Vec<ResetCount>,
    /// Established flows that went on to an endpoint that is gone, by endpoint.
    pub stuck: BTreeMap<SocketAddr, u64>,
    /// From a flow's first packet to its first answer, both on this node, ns.
    pub answered: Histogram,
    /// The time on the node of first packets that it did not drop, ns.
    pub node: Histogram,
}

impl ServiceSummary {
    /// What it is called where those of IPv4 and IPv6 stand side by side.
    pub fn title(&self) -> String {
        titled(&self.name, self.ipv6)
    }

    /// New flows that are known to have gone wrong.
    pub fn wrong(&self) -> u64 {
        let bad = self.verdicts.iter().filter(|count| count.verdict.is_bad());
        bad.map(|count| count.count).fold(0, u64::saturating_add)
    }

    /// The mode whose rules translate its flows, as far as there is one: see [`mode_of`].
    pub fn mode(&self) -> &str {
        let translated = self.translated.keys().map(String::as_str);
        mode_of(&self.mode, !self.modes.is_empty(), translated)
    }

    /// Packets of established flows that were dropped.
    pub fn dropped_later(&self) -> u64 {
        let drops = self.later_drops.iter().map(|count| count.count);
        drops.fold(0, u64::saturating_add)
    }
}

/// One word for the mode of a Service: the only one that names it; of several the one that has translated its flows;
/// else `several`, or `unknown` if of no flow it is known.
pub fn mode_of<'m>(
    only: &'m str,
    several: bool,
    mut translated: impl Iterator<Item = &'m str>,
) -> &'m str {
    match (translated.next(), translated.next()) {
        _ if !several => only,
        (Some(mode), None) => mode,
        _ => "several",
    }
}

/// How often something happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Count {
    /// What.
    #[serde(flatten)]
    pub end: End,
    /// How often.
    pub count: u64,
}

/// How many flows ended so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct VerdictCount {
    /// How.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// How many.
    pub count: u64,
}

/// How many resets came from somebody.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ResetCount {
    /// Who.
    pub by: Who,
    /// How many.
    pub count: u64,
}

fn counts(ends: &BTreeMap<End, u64>) -> Vec<Count> {
    ends.iter()
        .map(|(end, count)| Count {
            end: end.clone(),
            count: *count,
        })
        .collect()
}

/// What was timed on one path, over all Services that were traced.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct PathSummary {
    /// `pod→ClusterIP`, ...
    pub path: String,
    /// Each stage, in a packet's order, by packet state.
    pub stages: Vec<StageHistogram>,
    /// The whole node, by packet state.
    pub node: BTreeMap<PacketState, Histogram>,
}

/// How the probes did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Health {
    /// Journeys that began.
    pub journeys: u64,
    /// Journeys that left by a device.
    pub transmitted: u64,
    /// Journeys that ended at a local socket.
    pub delivered_locally: u64,
    /// Journeys that the kernel dropped.
    pub dropped: u64,
    /// Packets that were dropped at the socket that they had reached.
    #[serde(default)]
    pub dropped_at_socket: u64,
    /// Packets that their socket's queue had taken, and that were freed with it.
    #[serde(default)]
    pub freed_with_socket: u64,
    /// Packets that were freed at their socket, and of which the kernel does not say whether it dropped them.
    #[serde(default)]
    pub freed_at_socket: u64,
    /// Journeys whose end no probe saw: under way, or waiting in a queue, such as for a neighbour's
    /// address.
    pub unfinished: u64,
    /// Records that the ring buffer could not take: flows that are missing above.
    pub ring_lost: u64,
    /// Journeys given up because two packets wanted one slot.
    pub slot_collisions: u64,
    /// Probes that found a packet at another step than expected.
    pub unpaired: u64,
    /// Packets to none of these Services, which left after one look-up.
    pub other_packets: u64,
    /// Records of packets to an endpoint itself.
    pub to_endpoints: u64,
    /// Journeys that were timed; of the others only how they ended is known.
    pub timed: u64,
    /// Flows that were forgotten before it was known what became of them: too many at once.
    pub forgotten: u64,
    /// Addresses of Services and endpoints, come after the session began, for which the probes had no room: packets to
    /// them are other packets.
    #[serde(default)]
    pub without_room: u64,
    /// What the probes cost by the kernel's account (always wall-clock ns): runs, and their time without
    /// the way in and out of each; absent if it was not asked for.
    #[serde(flatten)]
    pub cost: Option<Cost>,
}

/// What the probes cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Cost {
    /// How often probes ran: at every boundary that any packet passed.
    pub probe_runs: u64,
    /// How long in all, ns.
    pub probe_ns: u64,
}

/// Packets that were freed at their sockets, of Services and to endpoints, as records told.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FreedAtSockets {
    /// With the queue that had taken them.
    pub(super) with_socket: u64,
    /// So, or dropped.
    pub(super) unknown: u64,
}

impl Health {
    pub(super) fn new(
        stats: Stats,
        to_endpoints: u64,
        freed: FreedAtSockets,
        forgotten: u64,
        without_room: usize,
        cost: Option<RunTime>,
    ) -> Self {
        Self {
            journeys: stats.journeys,
            transmitted: stats.transmitted,
            delivered_locally: stats.delivered,
            dropped: stats.dropped,
            dropped_at_socket: stats
                .dropped_at_socket
                .saturating_sub(freed.with_socket + freed.unknown),
            freed_with_socket: freed.with_socket,
            freed_at_socket: freed.unknown,
            unfinished: stats.journeys.saturating_sub(
                stats.transmitted
                    + stats.delivered
                    + stats.dropped
                    + stats.collisions
                    + stats.unpaired,
            ),
            ring_lost: stats.ring_lost,
            slot_collisions: stats.collisions,
            unpaired: stats.unpaired,
            other_packets: stats.other,
            to_endpoints,
            timed: stats.timed,
            forgotten,
            without_room: without_room as u64,
            cost: cost.map(|cost| Cost {
                probe_runs: cost.runs,
                probe_ns: cost.ns,
            }),
        }
    }
}

/// What a session found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Summary {
    /// The clock of every time in it.
    pub clock: Clock,
    /// How long packets were watched, ns: from when all probes were attached to when they were stopped.
    pub duration_ns: u64,
    /// When that began (`CLOCK_MONOTONIC`, ns): the zero of all times that are told since the begin.
    pub started_ns: u64,
    /// The probe tier.
    pub tier: String,
    /// Services to which there were flows, most flows first.
    pub services: Vec<ServiceSummary>,
    /// Services that were watched without a flow.
    pub silent: usize,
    /// What was timed.
    pub paths: Vec<PathSummary>,
    /// New flows over time.
    pub timeline: Timeline,
    /// Who changed rules.
    pub rule_changes: Vec<RuleChange>,
    /// Later rule changes, of which only the number is kept.
    pub rule_changes_left_out: u64,
    /// For how long in all the rules had changed and were not read again, ns: what was sent to Services that had come
    /// in that time is not told.
    #[serde(default)]
    pub outdated_ns: u64,
    /// How they were heard of.
    pub listening: Listening,
    /// Outages, in the order in which they ended: the first 10,000.
    pub outages: Vec<Outage>,
    /// Later ones, of which only the number is kept.
    #[serde(default)]
    pub outages_left_out: u64,
    /// How the probes did.
    pub probes: Health,
}

/// What a session has besides Services and their tallies when it ends.
#[derive(Debug)]
pub(super) struct Rest {
    pub(super) tier: Tier,
    pub(super) started_ns: u64,
    pub(super) ended_ns: u64,
    pub(super) timeline: Timeline,
    pub(super) paths: BTreeMap<&'static str, PathTimes>,
    pub(super) rule_changes: Vec<RuleChange>,
    pub(super) rule_changes_left_out: u64,
    pub(super) outdated_ns: u64,
    pub(super) listening: Listening,
    pub(super) outages: Vec<Outage>,
    pub(super) outages_left_out: u64,
    pub(super) probes: Health,
}

impl Summary {
    pub(super) fn new(directory: &Directory, tallies: &[Tally], rest: Rest) -> Self {
        let mut services: Vec<ServiceSummary> = directory
            .services()
            .iter()
            .zip(tallies)
            .filter(|(_, tally)| tally.has_anything())
            .map(|(known, tally)| ServiceSummary {
                name: known.name.clone(),
                mode: known.mode.to_owned(),
                modes: known.by_mode.keys().copied().map(str::to_owned).collect(),
                translated: tally
                    .translated
                    .iter()
                    .map(|(mode, flows)| ((*mode).to_owned(), *flows))
                    .collect(),
                protocol: known.protocol,
                ipv6: known.ipv6,
                endpoints: known.endpoints.len(),
                there: known.there,
                flows: tally.flows,
                repeated: tally.repeated,
                verdicts: tally
                    .verdicts
                    .iter()
                    .map(|(verdict, count)| VerdictCount {
                        verdict: verdict.clone(),
                        count: *count,
                    })
                    .collect(),
                later_drops: counts(&tally.later_drops),
                unplaced_drops: counts(&tally.unplaced_drops),
                answer_drops: counts(&tally.answer_drops),
                picked_up: tally.picked_up,
                untracked: tally.untracked,
                freed: tally.freed,
                freed_or_dropped: tally.freed_or_dropped,
                later_resets: tally
                    .later_resets
                    .iter()
                    .map(|(by, count)| ResetCount {
                        by: *by,
                        count: *count,
                    })
                    .collect(),
                stuck: tally.stuck.clone(),
                answered: tally.answered.histogram(),
                node: tally.node.histogram(),
            })
            .collect();
        services.sort_by(|a, b| b.flows.cmp(&a.flows).then_with(|| a.name.cmp(&b.name)));
        Self {
            clock: Clock::of_this_machine(),
            duration_ns: rest.ended_ns.saturating_sub(rest.started_ns),
            started_ns: rest.started_ns,
            tier: rest.tier.name().to_owned(),
            silent: directory.services().len() - services.len(),
            services,
            paths: rest
                .paths
                .into_iter()
                .map(|(path, times)| PathSummary {
                    path: path.to_owned(),
                    stages: times.stages,
                    node: times.node,
                })
                .collect(),
            timeline: rest.timeline,
            rule_changes: rest.rule_changes,
            rule_changes_left_out: rest.rule_changes_left_out,
            outdated_ns: rest.outdated_ns,
            listening: rest.listening,
            outages: rest.outages,
            outages_left_out: rest.outages_left_out,
            probes: rest.probes,
        }
    }

    /// Time since the session began, ns, of a time on its clock.
    pub const fn since(&self, time_ns: u64) -> u64 {
        time_ns.saturating_sub(self.started_ns)
    }

    /// Rule changes, those that were left out among them.
    pub fn changes(&self) -> u64 {
        self.rule_changes_left_out
            .saturating_add(self.rule_changes.len() as u64)
    }

    /// New flows of all Services.
    pub fn flows(&self) -> u64 {
        let flows = self.services.iter().map(|service| service.flows);
        flows.fold(0, u64::saturating_add)
    }

    /// New flows of all Services that went wrong, by how.
    pub fn troubles(&self) -> BTreeMap<&Verdict, u64> {
        let mut troubles: BTreeMap<&Verdict, u64> = BTreeMap::new();
        for count in self.services.iter().flat_map(|service| &service.verdicts) {
            if count.verdict.is_bad() {
                let sum = troubles.entry(&count.verdict).or_default();
                *sum = sum.saturating_add(count.count);
            }
        }
        troubles
    }
}
