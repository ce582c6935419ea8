//! Are the rules on a node the ones that its cluster calls for?
//!
//! Each back end compares what it would install with what a dump holds and says what differs, in
//! the words of this room.

use std::fmt;

use serde::Serialize;

use crate::cluster::Family;

/// How a rule differs from what is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Called for, and not there.
    Missing,
    /// There, but not as called for.
    Altered,
    /// There, and of an older state of this cluster: a Service, endpoint or chain that is gone.
    Stale,
    /// There, and written by another mode that was not cleaned up.
    Leftover,
    /// There without being called for, and not explained by the above.
    Extra,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Missing => "missing",
            Self::Altered => "altered",
            Self::Stale => "stale",
            Self::Leftover => "leftover",
            Self::Extra => "extra",
        })
    }
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How it differs.
    pub kind: Kind,
    /// The IP family of the rules.
    pub family: Family,
    /// Where: table and chain, set, map, virtual server or link, such as `nat KUBE-SERVICES`.
    pub place: String,
    /// The rule, element or server, as the dump's tool prints it.
    pub rule: String,
    /// For [`Kind::Altered`]: what is there instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
    /// The line of the dump, from 1, where something that is there stands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
    /// `ns/name:port` of the Service concerned; `None` for what all Services share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// What a packet to the Service suffers, one sentence without a full stop.
    pub effect: String,
}
