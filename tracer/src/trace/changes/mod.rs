//! Rule changes of every kind, each with the process that made it: iptables-legacy, `nf_tables`
//! (iptables-nft, nft), ipset, IPVS, and the addresses of the node's links.
//!
//! Two sources are joined. Probes ([`crate::probe::rule_changes`]) see each request enter and leave the
//! kernel and who sent it, however briefly that lives; of iptables-legacy, ipset and IPVS also what it
//! asks. The kernel's own announcements say what an `nf_tables` transaction did, and which addresses came
//! and went. Where the probes cannot be attached the announcements are told alone, and
//! [`Listening`] says what is missing.
//!
//! [`news`] and [`table`] know of Services by either, [`requests`] reads requests, [`nftables`] and [`addresses`] read announcements and keep the account, as
//! [`sets`] does of ipset, [`assemble`] makes changes of all that, [`actor`] knows cgroups and pods, [`say`] has the words.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::probe::rule_changes::Way;

pub mod actor;
mod addresses;
mod assemble;
mod news;
mod nftables;
mod requests;
mod say;
mod sets;
mod table;
mod watcher;

pub use actor::Actor;
pub use news::News;
pub(super) use requests::server_name;
pub(super) use sets::ALL_SETS;
pub use watcher::{ChangesError, Watcher};

/// Somebody changed rules, or tried to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct RuleChange {
    /// When it was over: the kernel returned from the last request (`CLOCK_MONOTONIC`, ns). If `begin_ns`
    /// is unknown, when the announcement was read, which is later.
    pub time_ns: u64,
    /// When the first request entered the kernel (`CLOCK_MONOTONIC`, ns); `None`: only the kernel's
    /// announcement was heard.
    pub begin_ns: Option<u64>,
    /// Who made it.
    pub by: Actor,
    /// What was changed.
    #[serde(flatten)]
    pub what: What,
    /// Requests that the kernel refused, by its reason. They changed nothing, but for those of ipset
    /// that hold many entries: the entries before the one that failed are in.
    pub refused: BTreeMap<String, u64>,
    /// Is this not all: was more announced or asked at once than could be held?
    pub incomplete: bool,
}

impl RuleChange {
    /// Was everything that was asked for refused, so that nothing changed?
    pub fn is_refused(&self) -> bool {
        !self.refused.is_empty() && self.what.is_nothing()
    }

    /// How long it took, ns; `None` if that is not known.
    pub fn took_ns(&self) -> Option<u64> {
        Some(self.time_ns.saturating_sub(self.begin_ns?))
    }
}

/// How rule changes are heard of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Listening {
    /// Where the probes sit; `None`: nowhere, and the kernel's announcements are all there is.
    pub probes: Option<String>,
    /// Why the probes could not be attached.
    pub refused: Option<String>,
    /// Records of theirs for which there was no room.
    pub lost: u64,
}

impl Listening {
    /// Did the kernel allow programs at functions?
    pub fn is_at_functions(&self) -> bool {
        self.probes.as_deref() == Some(Way::Functions.title())
    }
}

/// What was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "subsystem", rename_all = "kebab-case")]
pub enum What {
    /// A transaction of `nf_tables`: all of it is in, or, if it was refused, nothing.
    Nftables {
        /// The ruleset's generation after it; `None` if there was none.
        generation: Option<u32>,
        /// What it did, by table (`ip nat`).
        tables: BTreeMap<String, Delta>,
    },
    /// A table of iptables-legacy, which is always replaced as a whole.
    IptablesLegacy {
        /// `IPv4` or `IPv6`.
        family: String,
        /// `nat`, `filter`, ...
        table: String,
        /// The kernel's entries before: rules, each chain's policy, each chain's name, and the end.
        before: u32,
        /// The same after it; if it was refused, what was wanted.
        after: u32,
    },
    /// Sets of ipset, by name.
    Ipset {
        /// What was done to each.
        sets: BTreeMap<String, SetDelta>,
    },
    /// IPVS' virtual servers (Services) and real servers (endpoints).
    Ipvs(ServerDelta),
    /// Addresses of links, by the link's name.
    Addresses {
        /// What was done to each.
        links: BTreeMap<String, AddressDelta>,
    },
}

/// What a transaction did to a table of `nf_tables`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Delta {
    /// Rules added.
    pub rules_added: u64,
    /// Rules deleted.
    pub rules_deleted: u64,
    /// Rules before and after; `None`: not known.
    pub rules: Option<(u64, u64)>,
    /// Elements of named sets and maps added.
    pub elements_added: u64,
    /// Elements of named sets and maps deleted one by one: a set that goes takes its elements along.
    pub elements_deleted: u64,
    /// Elements before and after, of all the table's sets but those that packets fill; `None`: not known.
    pub elements: Option<(u64, u64)>,
    /// Other changes: tables, chains, sets, objects.
    pub others: u64,
}

/// What was done to a set: how often, or with how many entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct SetDelta {
    /// Made.
    pub created: u64,
    /// Taken away.
    pub destroyed: u64,
    /// Emptied.
    pub flushed: u64,
    /// Renamed or exchanged with another.
    pub renamed: u64,
    /// Entries added.
    pub added: u64,
    /// Entries deleted.
    pub deleted: u64,
    /// Asked for with `-exist`, and nobody can say whether it was so before: entries, and making the set.
    #[serde(default)]
    pub unproven: u64,
}

/// What was done to IPVS.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ServerDelta {
    /// Virtual servers added.
    pub servers_added: u64,
    /// Virtual servers changed.
    pub servers_edited: u64,
    /// Virtual servers deleted.
    pub servers_deleted: u64,
    /// Real servers added.
    pub reals_added: u64,
    /// Real servers changed.
    pub reals_edited: u64,
    /// Real servers deleted.
    pub reals_deleted: u64,
    /// How often everything was deleted.
    pub flushed: u64,
    /// Other changes: timeouts, daemons, counters.
    pub others: u64,
    /// The virtual servers in question: `10.96.0.1:80/TCP`, `fwmark 7`.
    pub servers: BTreeSet<String>,
}

/// What was done to a link's addresses (`10.96.0.1/32`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct AddressDelta {
    /// Is it kube-ipvs0, whose addresses are those of Services in IPVS mode?
    pub virtual_ips: bool,
    /// Added.
    pub added: BTreeSet<String>,
    /// Deleted.
    pub deleted: BTreeSet<String>,
}
