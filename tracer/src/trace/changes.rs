//! Rule changes as the kernel announces them: every transaction of `nf_tables`, which is how iptables-nft
//! and nft write rules, with the process that made it.
//!
//! Of iptables-legacy, ipset and IPVS the kernel announces nothing; this tier does not see them change.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};

use crate::kernel::clock::monotonic_ns;
use crate::kernel::netlink::{Attributes, Heard, Listener, NetlinkError};
use crate::kernel::netns::{Netns, NetnsError};

/// `NFNLGRP_NFTABLES` (`include/uapi/linux/netfilter/nfnetlink.h`).
const NFNLGRP_NFTABLES: u32 = 7;
/// `NFNL_SUBSYS_NFTABLES`, the upper byte of a message's type.
const NFNL_SUBSYS_NFTABLES: u8 = 10;
/// Length of `struct nfgenmsg`.
const NFGENMSG: usize = 4;
/// Memory for announcements that wait: a transaction of 30,000 Services announces about 100 MB, which
/// is more; the change is then told without its details.
const ROOM: usize = 32 << 20;
/// How long one look for announcements waits, in milliseconds: the longest that stopping takes.
const PATIENCE: u16 = 50;

// Messages (`enum nf_tables_msg_types`) and attributes (include/uapi/linux/netfilter/nf_tables.h).
const NFT_MSG_NEWRULE: u8 = 6;
const NFT_MSG_DELRULE: u8 = 8;
const NFT_MSG_NEWSETELEM: u8 = 12;
const NFT_MSG_DELSETELEM: u8 = 14;
const NFT_MSG_NEWGEN: u8 = 15;
/// The table's name has this number in every message about something in a table.
const NFTA_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_GEN_ID: u16 = 1;
const NFTA_GEN_PROC_PID: u16 = 2;
const NFTA_GEN_PROC_NAME: u16 = 3;

/// One transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct RuleChange {
    /// When its announcement was read, which is after its commit (`CLOCK_MONOTONIC`, ns).
    pub time_ns: u64,
    /// The ruleset's generation after it.
    pub generation: u32,
    /// Who made it.
    pub by: Actor,
    /// What it did, by table (`ip nat`).
    pub tables: BTreeMap<String, Delta>,
    /// Were announcements lost, so that `tables` is not all?
    pub incomplete: bool,
}

/// What a transaction did to a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Delta {
    /// Rules added.
    pub rules_added: u64,
    /// Rules deleted.
    pub rules_deleted: u64,
    /// Elements of sets and maps added.
    pub elements_added: u64,
    /// Elements of sets and maps deleted.
    pub elements_deleted: u64,
    /// Other changes: tables, chains, sets, objects.
    pub others: u64,
}

/// A process that changed rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Actor {
    /// Its id, in the init pid namespace of the reader; `None` if the kernel did not tell.
    pub pid: Option<u32>,
    /// Its name (`comm`, at most 15 bytes), from the kernel.
    pub name: Option<String>,
    /// Its parent's id and name; `None` if it was gone before it could be asked.
    pub parent: Option<(u32, String)>,
    /// Its cgroup; `None` if it was gone before it could be asked.
    pub cgroup: Option<String>,
}

impl std::fmt::Display for Actor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name.as_deref().unwrap_or("unknown process"))?;
        match (self.pid, &self.parent) {
            (Some(pid), Some((parent, name))) => {
                write!(f, " (pid {pid}, parent {name}, pid {parent})")
            }
            (Some(pid), None) => write!(f, " (pid {pid}, parent unknown)"),
            (None, _) => Ok(()),
        }
    }
}

impl std::fmt::Display for RuleChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} committed generation {}:", self.by, self.generation)?;
        let mut separator = " ";
        for (table, delta) in &self.tables {
            write!(f, "{separator}{table} {delta}")?;
            separator = ", ";
        }
        if self.incomplete {
            write!(
                f,
                "{separator}and what was lost: too much was announced at once"
            )?;
        }
        Ok(())
    }
}

impl std::fmt::Display for Delta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut separator = "";
        for (sign, number, what) in [
            ('+', self.rules_added, "rules"),
            ('-', self.rules_deleted, "rules"),
            ('+', self.elements_added, "elements"),
            ('-', self.elements_deleted, "elements"),
        ] {
            if number > 0 {
                write!(f, "{separator}{sign}{number} {what}")?;
                separator = " ";
            }
        }
        if self.others > 0 {
            write!(f, "{separator}{} other", self.others)?;
        }
        Ok(())
    }
}

/// Why rule changes cannot be heard.
#[derive(Debug, thiserror::Error)]
pub enum ChangesError {
    /// The socket.
    #[error("cannot listen for rule changes: {0}")]
    Netlink(#[from] NetlinkError),
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// No thread.
    #[error("cannot start a thread to listen for rule changes: {0}")]
    Thread(#[source] std::io::Error),
}

/// Hears rule changes of one namespace, in a thread of its own: who made one has often ended a
/// millisecond later.
#[derive(Debug)]
pub struct Watcher {
    changes: Receiver<Result<RuleChange, NetlinkError>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Begins to listen.
    pub fn start(ns: &Netns) -> Result<Self, ChangesError> {
        let mut listener = ns.run(|| Listener::join(NFNLGRP_NFTABLES, ROOM))??;
        let (tell, changes) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("rule-changes".to_owned())
            .spawn(move || {
                let mut open = Transaction::default();
                while !stopped.load(Ordering::Relaxed) {
                    let heard = listener.listen(PATIENCE, NFGENMSG, |kind, header, attributes| {
                        if let Some(change) = open.take(kind, header, attributes)? {
                            // Nobody listens any more: the loop ends by itself.
                            let _ = tell.send(Ok(change));
                        }
                        Ok(())
                    });
                    match heard {
                        Ok(Heard::Overrun) => open.incomplete = true,
                        Ok(_) => {}
                        Err(error) => {
                            let _ = tell.send(Err(error));
                            return;
                        }
                    }
                }
            })
            .map_err(ChangesError::Thread)?;
        Ok(Self {
            changes,
            stop,
            thread: Some(thread),
        })
    }

    /// The changes since the last call, in order.
    pub fn drain(&self) -> Result<Vec<RuleChange>, ChangesError> {
        let changes: Result<Vec<_>, _> = self.changes.try_iter().collect();
        Ok(changes?)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

/// What was announced since the last transaction ended.
#[derive(Debug, Default)]
struct Transaction {
    tables: BTreeMap<String, Delta>,
    incomplete: bool,
}

impl Transaction {
    /// Takes an announcement in; the last of a transaction completes it.
    fn take(
        &mut self,
        kind: u16,
        header: &[u8],
        attributes: Attributes<'_>,
    ) -> Result<Option<RuleChange>, NetlinkError> {
        let [subsystem, message] = kind.to_be_bytes();
        if subsystem != NFNL_SUBSYS_NFTABLES {
            return Ok(None);
        }
        if message == NFT_MSG_NEWGEN {
            let tables = std::mem::take(&mut self.tables);
            return Ok(Some(RuleChange {
                time_ns: monotonic_ns(),
                generation: attributes.clone().find_be32(NFTA_GEN_ID)?.unwrap_or(0),
                by: actor(attributes)?,
                tables,
                incomplete: std::mem::take(&mut self.incomplete),
            }));
        }
        let Some(table) = attributes.clone().find(NFTA_TABLE)? else {
            return Ok(None);
        };
        let family = match header.first() {
            Some(1) => "inet",
            Some(2) => "ip",
            Some(3) => "arp",
            Some(5) => "netdev",
            Some(7) => "bridge",
            Some(10) => "ip6",
            _ => "?",
        };
        let delta = self
            .tables
            .entry(format!("{family} {}", text(table)))
            .or_default();
        match message {
            NFT_MSG_NEWRULE => delta.rules_added += 1,
            NFT_MSG_DELRULE => delta.rules_deleted += 1,
            NFT_MSG_NEWSETELEM => delta.elements_added += elements(attributes)?,
            NFT_MSG_DELSETELEM => delta.elements_deleted += elements(attributes)?,
            _ => delta.others += 1,
        }
        Ok(None)
    }
}

fn elements(attributes: Attributes<'_>) -> Result<u64, NetlinkError> {
    let list = attributes.find(NFTA_SET_ELEM_LIST_ELEMENTS)?;
    Attributes::nested(list.unwrap_or_default()).try_fold(0, |count, element| {
        element?;
        Ok(count + 1)
    })
}

/// A string with its terminating zero.
fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&value[..end.unwrap_or(value.len())]).into_owned()
}

fn actor(attributes: Attributes<'_>) -> Result<Actor, NetlinkError> {
    let pid = attributes.clone().find_be32(NFTA_GEN_PROC_PID)?;
    let name = attributes.find(NFTA_GEN_PROC_NAME)?.map(text);
    let parent = pid.and_then(parent_of).and_then(|parent| {
        let name = fs::read_to_string(format!("/proc/{parent}/comm")).ok()?;
        Some((parent, name.trim_end().to_owned()))
    });
    let cgroup = pid.and_then(cgroup_of);
    Ok(Actor {
        pid,
        name,
        parent,
        cgroup,
    })
}

/// The parent's id: the fourth field of proc(5), /proc/pid/stat, behind a name that can hold anything.
fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// The path in the unified hierarchy, or else the first.
fn cgroup_of(pid: u32) -> Option<String> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let mut paths = groups.lines().filter_map(|line| {
        let (number, rest) = line.split_once(':')?;
        Some((number == "0", rest.split_once(':')?.1))
    });
    let first = paths.next()?;
    let unified = std::iter::once(first).chain(paths).find(|path| path.0);
    Some(unified.unwrap_or(first).1.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let length = u16::try_from(4 + value.len()).expect("short");
        bytes.extend(length.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn kind(message: u8) -> u16 {
        u16::from_be_bytes([NFNL_SUBSYS_NFTABLES, message])
    }

    #[test]
    fn a_transaction_is_what_was_announced_before_its_generation() {
        let mut open = Transaction::default();
        let mut take = |message: u8, bytes: &[u8]| {
            open.take(kind(message), &[2, 0, 0, 0], Attributes::nested(bytes))
                .expect("well formed")
        };
        let table = attribute(NFTA_TABLE, b"nat\0");
        assert_eq!(take(NFT_MSG_NEWRULE, &table), None);
        assert_eq!(take(NFT_MSG_NEWRULE, &table), None);
        assert_eq!(take(NFT_MSG_DELRULE, &table), None);
        assert_eq!(take(3, &table), None);
        let mut elements = attribute(NFTA_TABLE, b"kube-proxy\0");
        let two = [attribute(1, &[]), attribute(1, &[])].concat();
        elements.extend(attribute(NFTA_SET_ELEM_LIST_ELEMENTS, &two));
        assert_eq!(take(NFT_MSG_DELSETELEM, &elements), None);
        let mut end = attribute(NFTA_GEN_ID, &7_u32.to_be_bytes());
        end.extend(attribute(
            NFTA_GEN_PROC_PID,
            &std::process::id().to_be_bytes(),
        ));
        end.extend(attribute(NFTA_GEN_PROC_NAME, b"nft\0"));
        let change = take(NFT_MSG_NEWGEN, &end).expect("complete");
        assert_eq!(change.generation, 7);
        assert_eq!(change.by.name.as_deref(), Some("nft"));
        assert!(change.by.parent.is_some() && change.by.cgroup.is_some());
        let said = change.to_string();
        let end =
            " committed generation 7: ip kube-proxy -2 elements, ip nat +2 rules -1 rules 1 other";
        assert!(said.ends_with(end), "{said}");
        assert_eq!(take(NFT_MSG_NEWGEN, &[]).expect("complete").tables.len(), 0);
    }

    #[test]
    fn other_subsystems_are_not_rules() {
        let mut open = Transaction::default();
        let bytes = attribute(NFTA_TABLE, b"nat\0");
        let taken = open.take(0x0106, &[2, 0, 0, 0], Attributes::nested(&bytes));
        assert_eq!(taken.expect("well formed"), None);
        assert!(open.tables.is_empty());
    }
}
