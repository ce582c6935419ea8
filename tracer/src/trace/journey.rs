//! A packet's journey to a Service, as a session tells it.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use tracer_ebpf::record::HEADER;

use super::met::Meeting;
use super::translator::Translator;
use crate::record::run::Clock;
use crate::report::units;

/// How a new flow's first packet left the node's netfilter hooks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case", tag = "end")]
pub enum End {
    /// Translated to an endpoint, and sent on by a device.
    Sent,
    /// Translated to an endpoint in the node's own namespace, and handed to its socket.
    Delivered,
    /// Left the node with the Service's virtual address: no rule translated it.
    Leaked,
    /// Handed to a socket of the node untranslated.
    Untranslated,
    /// Sent to an address that is no endpoint of the Service as its rules were last read.
    Elsewhere,
    /// Handed to a socket of the node, or refused by the node, because IPVS mode has the address bound here for a
    /// Service. No Service has the port.
    Absorbed {
        /// The network, and the node's link to it, in which another machine may have the address: `192.0.2.0/24 of
        /// eth0`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        network: Option<String>,
    },
    /// Dropped.
    Dropped {
        /// The kernel's drop reason, without its prefix: `NETFILTER_DROP`.
        reason: String,
        /// `HOOK stage`.
        stage: String,
        /// The table or chain that did, or what else: known only where the functions tier tells what packets
        /// meet.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
    },
    /// The packet's headers could not be read, or not what the rules said then.
    Unknown,
}

impl End {
    /// One word for it, as [`Serialize`] writes it too.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Delivered => "delivered",
            Self::Leaked => "leaked",
            Self::Untranslated => "untranslated",
            Self::Elsewhere => "elsewhere",
            Self::Absorbed { .. } => "absorbed",
            Self::Dropped { .. } => "dropped",
            Self::Unknown => "unknown",
        }
    }

    /// Is it that of a healthy Service?
    pub fn is_good(&self) -> bool {
        self.advice().is_none()
    }

    /// What to look at, for an end that is none of a healthy Service.
    pub fn advice(&self) -> Option<&'static str> {
        Some(match self {
            Self::Sent | Self::Delivered => return None,
            Self::Leaked => {
                "the rules for this address are missing, or do not serve this client (source ranges): compare them with \
                 the cluster (svcpath rules check --live) and see who changed them last"
            }
            Self::Untranslated => {
                "a process of the node listens on the Service's port, or the node has the address bound \
                 (kube-ipvs0): compare the rules with the cluster"
            }
            Self::Elsewhere => {
                "the endpoints changed after the rules were last read, or a rule of somebody else translates first"
            }
            Self::Absorbed { .. } => {
                "the address is bound on kube-ipvs0 for a Service, and with it every port; no Service has this one"
            }
            Self::Dropped { stage, .. } => advice_of_drop(stage),
            Self::Unknown => {
                "fragments and packets with long extension headers are not read, and not known is what rules said \
             between two readings if they were changed twice"
            }
        })
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sent => f.write_str("sent to its endpoint"),
            Self::Delivered => f.write_str("delivered to its endpoint"),
            Self::Leaked => f.write_str("leaked"),
            Self::Untranslated => f.write_str("untranslated to a local socket"),
            Self::Elsewhere => f.write_str("sent elsewhere"),
            Self::Absorbed { .. } => f.write_str("kept on this node, which has the address bound"),
            Self::Dropped { reason, stage, by } => write_drop(f, reason, stage, by.as_deref()),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

/// What to look at when a packet was dropped at this stage (`HOOK stage`).
pub(super) fn advice_of_drop(stage: &str) -> &'static str {
    match stage.rsplit_once(' ') {
        Some((_, "deliver")) => {
            "it reached a socket of the node that did not take it: no listener, or a full queue"
        }
        Some((_, "raw")) => {
            "a rule before conntrack drops it, in iptables' table raw or a chain of nftables at -300 or before \
             (iptables-save -t raw, nft list ruleset): none of kube-proxy's does"
        }
        Some((_, "pre-dnat")) => {
            "a filter chain before translation drops it: in nftables mode kube-proxy's check of \
             loadBalancerSourceRanges, or a policy (svcpath rules walk shows the rule)"
        }
        Some((_, "routing")) => {
            "routing drops it: a blackhole route, an address that cannot be its source, or the reverse-path \
             filter (ip route get ADDRESS; sysctl net.ipv4.conf.all.rp_filter)"
        }
        _ => {
            "filter drops are a policy, a loadBalancerSourceRange, a Local policy without a local endpoint, or a \
             refusal (no endpoints) of which the kernel did not tell the client: it sends few ICMP errors a second \
             (net.ipv4.icmp_ratelimit); svcpath rules walk shows the rule"
        }
    }
}

/// Where, why and by whom a packet was dropped.
pub(super) fn write_drop(
    f: &mut std::fmt::Formatter<'_>,
    reason: &str,
    stage: &str,
    by: Option<&str>,
) -> std::fmt::Result {
    write!(f, "dropped at {stage}")?;
    if let Some(by) = by {
        write!(f, " by {by}")?;
    }
    write!(f, " ({reason})")
}

/// The first packet of a flow to a Service, or a later one that was dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Journey {
    /// When it came to the node (`CLOCK_MONOTONIC`, ns).
    pub time_ns: u64,
    /// `ns/name:port`.
    pub service: String,
    /// IP protocol number.
    pub protocol: u8,
    /// Who asks.
    pub source: SocketAddr,
    /// What was asked for.
    pub destination: SocketAddr,
    /// Where it was headed at the end; `None` if unknown.
    pub headed: Option<SocketAddr>,
    /// `pod→ClusterIP`, ...
    pub path: &'static str,
    /// Is it a flow's first packet? `None`: it was dropped before conntrack saw it, and its protocol does not
    /// say.
    pub first: Option<bool>,
    /// Is it an answer, on its way back?
    pub answer: bool,
    /// Is it a first packet that was told before, when it came to a socket or to an endpoint on this very node, and did
    /// not end there?
    #[serde(skip_serializing_if = "is_false")]
    pub told_before: bool,
    /// The sum of the stages that it passed, ns: its time on this node without the probes' own, up to the stage that
    /// dropped it; `None` if it was not timed.
    pub elapsed_ns: Option<u64>,
    /// Who it came from at the end: another source if it was masqueraded; `None` if unknown.
    pub source_after: Option<SocketAddr>,
    /// The stages that it passed, in order; empty if they were not recorded one by one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<StageTime>,
    /// Whose rules translated it; `None`: it was not translated to an endpoint that they name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub translated_by: Option<Translator>,
    /// What it met on its way; empty unless the functions tier was asked for it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub met: Vec<Meeting>,
    /// The packet's first bytes at the end of its journey, from the IP header on; zeros behind its end.
    #[serde(skip)]
    pub header: [u8; HEADER],
    /// How it ended.
    #[serde(flatten)]
    pub end: End,
}

impl std::fmt::Display for Journey {
    /// Whose it is, by which path it came, and from where to where it went.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} ", self.service, self.path)?;
        if let (true, Some(from)) = (self.answer, self.source_after) {
            return write!(f, "{from} → {} for {}", self.source, self.destination);
        }
        write!(f, "{} → {}", self.source, self.destination)?;
        match self.headed.filter(|headed| *headed != self.destination) {
            Some(headed) => write!(f, " → {headed}"),
            None => Ok(()),
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
const fn is_false(flag: &bool) -> bool {
    !*flag
}

/// What is said behind the end of a packet that is no flow's first one, of which nobody knows, or which was told before:
/// see [`Journey::first`]. A reply may be the first as well.
pub const fn place(first: Option<bool>, answer: bool, told_before: bool) -> &'static str {
    match first {
        _ if answer => ", a reply",
        Some(true) if told_before => ", a packet told before",
        Some(true) => "",
        Some(false) => ", established",
        None => ", new or established",
    }
}

/// Where a packet's time was spent: how long it lay in the stage that dropped it is not known.
pub const fn spent(end: &End) -> &'static str {
    match end {
        End::Dropped { .. } => "on the way to where it was dropped",
        _ => "on this node",
    }
}

/// What is said of a time on the node: see [`Journey::elapsed_ns`].
pub fn time_on_node(clock: Clock, elapsed_ns: Option<u64>) -> String {
    elapsed_ns.map_or_else(
        || "not timed".to_owned(),
        |elapsed_ns| units::cost_u64(clock, elapsed_ns),
    )
}

/// One stage of one journey.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StageTime {
    /// `PREROUTING`, ...; `-` before the first hook.
    pub hook: &'static str,
    /// `raw`, `conntrack`, `dnat`, ...
    pub stage: &'static str,
    /// When it began, ns since the journey's begin.
    pub begin_ns: u64,
    /// How long it took, ns, without the probes' own time.
    pub took_ns: u64,
}

#[cfg(test)]
impl Journey {
    /// A pod's flow to a Service, for tests to change.
    pub(crate) fn sample() -> Self {
        let socket = |text: &str| text.parse().expect("an address");
        Self {
            time_ns: 0,
            service: "shop/web:http".to_owned(),
            protocol: 6,
            source: socket("10.244.0.7:51544"),
            destination: socket("10.96.10.1:80"),
            headed: Some(socket("10.244.0.12:8080")),
            path: "pod→ClusterIP",
            first: Some(true),
            answer: false,
            told_before: false,
            elapsed_ns: Some(32_000),
            source_after: Some(socket("10.244.0.7:51544")),
            stages: Vec::new(),
            translated_by: Some(Translator::Only("nftables")),
            met: Vec::new(),
            header: [0; HEADER],
            end: End::Sent,
        }
    }
}
