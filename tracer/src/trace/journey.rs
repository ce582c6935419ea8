//! A packet's journey to a Service, as a session tells it.

use std::net::SocketAddr;

use serde::Serialize;

/// How a new flow's first packet left the node's netfilter hooks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
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
    /// Dropped.
    Dropped {
        /// The kernel's drop reason, without its prefix: `NETFILTER_DROP`.
        reason: String,
        /// `HOOK stage`.
        stage: String,
    },
    /// The packet's headers could not be read.
    Unknown,
}

impl End {
    /// What to look at, for an end that is none of a healthy Service.
    pub const fn advice(&self) -> Option<&'static str> {
        Some(match self {
            Self::Sent | Self::Delivered => return None,
            Self::Leaked => {
                "the rules for this address are missing: compare them with the cluster (svcpath rules check --live) \
                 and see who changed them last"
            }
            Self::Untranslated => {
                "a process of the node listens on the Service's port, or the node has the address bound \
                 (kube-ipvs0): compare the rules with the cluster"
            }
            Self::Elsewhere => {
                "the endpoints changed after the rules were last read, or a rule of somebody else translates first"
            }
            Self::Dropped { .. } => {
                "see the stage: filter is a policy or a Service without endpoints, deliver a port that nobody \
                 listens on"
            }
            Self::Unknown => "fragments and packets with long extension headers are not read",
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
            Self::Dropped { reason, stage } => write!(f, "dropped at {stage} ({reason})"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
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
    /// Is it a flow's first packet?
    pub first: bool,
    /// The sum of its stages, ns: its time on this node without the probes' own.
    pub elapsed_ns: u64,
    /// How it ended.
    #[serde(flatten)]
    pub end: End,
}
