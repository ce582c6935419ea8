//! What `nf_tables` announces of a transaction, and the account of what each table holds.
//!
//! Messages and attributes: `include/uapi/linux/netfilter/nf_tables.h`.

use std::collections::{BTreeMap, BTreeSet};

use super::Delta;
use super::actor::{self, Actor};
use super::news::News;
use super::requests::{NFNL_SUBSYS_NFTABLES, NFTA_TABLE, text};
use super::table::Transaction;
use crate::kernel::netlink::{Announcement, Attributes, NetlinkError};
use crate::kernel::nft::{
    Holdings, NFT_MSG_DELRULE, NFT_MSG_DELSET, NFT_MSG_DELSETELEM, NFT_MSG_NEWGEN, NFT_MSG_NEWRULE,
    NFT_MSG_NEWSET, NFT_MSG_NEWSETELEM, Ruleset, TableKey, count_elements, family_name,
    lasting_set,
};
use crate::rules::Mode;

/// A set's name, in messages about the set and about its elements.
const NFTA_SET: u16 = 2;
const NFTA_GEN_ID: u16 = 1;
const NFTA_GEN_PROC_PID: u16 = 2;
const NFTA_GEN_PROC_NAME: u16 = 3;

/// A transaction, as it was announced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Announced {
    /// When that was read (`CLOCK_MONOTONIC`, ns).
    pub(super) read_ns: u64,
    /// The ruleset's generation after it.
    pub(super) generation: u32,
    /// The number of the batch's second message.
    pub(super) sequence: u32,
    /// The thread that made it.
    pub(super) thread: Option<u32>,
    /// Who that was, as far as it could be asked.
    pub(super) by: Actor,
    /// What it did, by table.
    pub(super) tables: BTreeMap<String, Delta>,
    /// What it did to kube-proxy's tables, if it was about those or may have been.
    pub(super) news: Option<News>,
    /// Were announcements lost, so that `tables` is not all?
    pub(super) incomplete: bool,
}

/// What was announced since the last transaction ended, and what the tables held before.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    tables: BTreeMap<TableKey, Delta>,
    /// Anonymous sets that this transaction makes: their elements belong to rules.
    anonymous: BTreeSet<(TableKey, String)>,
    transaction: Transaction,
    incomplete: bool,
    /// `None`: it is not known what the tables hold.
    held: Option<Ruleset>,
    /// What they will hold after the open transaction.
    pending: BTreeMap<TableKey, Holdings>,
}

impl Ledger {
    /// From here on what the tables hold is known, until announcements are lost.
    pub(super) fn know(&mut self, held: Ruleset) {
        self.held = Some(held);
    }

    /// Is it known what the tables hold?
    pub(super) const fn knows(&self) -> bool {
        self.held.is_some()
    }

    /// Announcements were lost.
    pub(super) fn lose(&mut self) {
        self.incomplete = true;
        self.held = None;
    }

    /// Takes an announcement in; the last of a transaction completes it.
    pub(super) fn take(
        &mut self,
        announcement: &Announcement<'_>,
        now: u64,
    ) -> Result<Option<Announced>, NetlinkError> {
        let [subsystem, message] = announcement.kind.to_be_bytes();
        if subsystem != NFNL_SUBSYS_NFTABLES {
            return Ok(None);
        }
        let attributes = &announcement.attributes;
        if message == NFT_MSG_NEWGEN {
            return self.close(announcement, now).map(Some);
        }
        let Some(table) = attributes.clone().find(NFTA_TABLE)? else {
            return Ok(None);
        };
        let family = announcement.header.first().copied().unwrap_or(0);
        let key = (family, text(table));
        self.transaction.take(&key, message, attributes)?;
        let set = attributes.clone().find(NFTA_SET)?.map(text);
        let delta = self.tables.entry(key.clone()).or_default();
        match message {
            NFT_MSG_NEWRULE => delta.rules_added += 1,
            NFT_MSG_DELRULE => delta.rules_deleted += 1,
            NFT_MSG_NEWSETELEM | NFT_MSG_DELSETELEM => {
                let set = set.unwrap_or_default();
                let elements = count_elements(attributes.clone())?;
                // The elements of an anonymous set are announced after the set itself.
                if self.anonymous.contains(&(key.clone(), set.clone())) {
                    return Ok(None);
                }
                if message == NFT_MSG_NEWSETELEM {
                    delta.elements_added += elements;
                } else {
                    delta.elements_deleted += elements;
                }
                self.account(key, message, Some(set), elements, attributes)?;
                return Ok(None);
            }
            _ => delta.others += 1,
        }
        self.account(key, message, set, 0, attributes)?;
        Ok(None)
    }

    /// Keeps the account of what the open transaction leaves.
    fn account(
        &mut self,
        key: TableKey,
        message: u8,
        set: Option<String>,
        elements: u64,
        attributes: &Attributes<'_>,
    ) -> Result<(), NetlinkError> {
        let before = self.held.as_ref().and_then(|held| held.tables.get(&key));
        let holdings = self
            .pending
            .entry(key.clone())
            .or_insert_with(|| before.cloned().unwrap_or_default());
        let set = set.unwrap_or_default();
        match message {
            NFT_MSG_NEWRULE => holdings.rules += 1,
            NFT_MSG_DELRULE => holdings.rules = holdings.rules.saturating_sub(1),
            NFT_MSG_NEWSET => match lasting_set(attributes)? {
                // A set that was there already is announced again when it is changed.
                Some(set) => drop(holdings.sets.entry(set).or_default()),
                None => drop(self.anonymous.insert((key, set))),
            },
            NFT_MSG_DELSET => drop(holdings.sets.remove(&set)),
            NFT_MSG_NEWSETELEM => {
                if let Some(held) = holdings.sets.get_mut(&set) {
                    *held += elements;
                }
            }
            NFT_MSG_DELSETELEM => {
                if let Some(held) = holdings.sets.get_mut(&set) {
                    *held = held.saturating_sub(elements);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn close(
        &mut self,
        announcement: &Announcement<'_>,
        now: u64,
    ) -> Result<Announced, NetlinkError> {
        let attributes = &announcement.attributes;
        let generation = attributes.clone().find_be32(NFTA_GEN_ID)?.unwrap_or(0);
        let thread = attributes.clone().find_be32(NFTA_GEN_PROC_PID)?;
        let name = attributes.clone().find(NFTA_GEN_PROC_NAME)?.map(text);
        let mut tables = std::mem::take(&mut self.tables);
        self.settle(generation, &mut tables);
        let incomplete = std::mem::take(&mut self.incomplete);
        let news = self.transaction.close();
        let news = match news {
            Some((patch, understood)) => Some(News {
                time_ns: now,
                mode: Mode::Nftables,
                arrived: patch.arrivals().collect(),
                patch: (understood && !incomplete).then_some(patch),
            }),
            None => incomplete.then(|| News {
                time_ns: now,
                mode: Mode::Nftables,
                arrived: Vec::new(),
                patch: None,
            }),
        };
        self.anonymous.clear();
        Ok(Announced {
            read_ns: now,
            generation,
            sequence: announcement.sequence,
            thread,
            by: actor::ask(thread, name),
            tables: tables
                .into_iter()
                .map(|((family, table), delta)| (format!("{} {table}", family_name(family)), delta))
                .collect(),
            news,
            incomplete,
        })
    }

    /// Says what the tables held before and hold now. Transactions that were in when the tables were counted are not
    /// counted twice; one that does not follow on the last means that some were missed.
    fn settle(&mut self, generation: u32, tables: &mut BTreeMap<TableKey, Delta>) {
        let pending = std::mem::take(&mut self.pending);
        let Some(held) = &mut self.held else { return };
        match generation.wrapping_sub(held.generation).cast_signed() {
            ..=0 => {}
            1 => {
                held.generation = generation;
                for (key, after) in pending {
                    let before = held.tables.get(&key).cloned().unwrap_or_default();
                    if let Some(delta) = tables.get_mut(&key) {
                        delta.rules = Some((before.rules, after.rules));
                        delta.elements = Some((elements(&before), elements(&after)));
                    }
                    held.tables.insert(key, after);
                }
            }
            _ => self.held = None,
        }
    }
}

fn elements(holdings: &Holdings) -> u64 {
    holdings.sets.values().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::attribute;

    const NFTA_SET_FLAGS: u16 = 3;
    const NFTA_ELEMENTS: u16 = 3;

    fn take(ledger: &mut Ledger, message: u8, bytes: &[u8]) -> Option<Announced> {
        let announcement = Announcement {
            kind: u16::from_be_bytes([NFNL_SUBSYS_NFTABLES, message]),
            sequence: 9,
            port: 0,
            header: &[2, 0, 0, 0],
            attributes: Attributes::nested(bytes),
        };
        ledger.take(&announcement, 5).expect("well formed")
    }

    fn set(name: &[u8], flags: u32) -> Vec<u8> {
        [
            attribute(NFTA_TABLE, b"kube-proxy\0"),
            attribute(NFTA_SET, name),
            attribute(NFTA_SET_FLAGS, &flags.to_be_bytes()),
        ]
        .concat()
    }

    fn entries(name: &[u8], count: usize) -> Vec<u8> {
        let list: Vec<u8> = (0..count).flat_map(|_| attribute(1, &[])).collect();
        [
            attribute(NFTA_TABLE, b"kube-proxy\0"),
            attribute(NFTA_SET, name),
            attribute(NFTA_ELEMENTS, &list),
        ]
        .concat()
    }

    fn end(generation: u32) -> Vec<u8> {
        [
            attribute(NFTA_GEN_ID, &generation.to_be_bytes()),
            attribute(NFTA_GEN_PROC_PID, &std::process::id().to_be_bytes()),
            attribute(NFTA_GEN_PROC_NAME, b"nft\0"),
        ]
        .concat()
    }

    #[test]
    fn a_transaction_is_what_was_announced_before_its_generation() {
        let mut ledger = Ledger::default();
        let table = attribute(NFTA_TABLE, b"nat\0");
        for message in [NFT_MSG_NEWRULE, NFT_MSG_NEWRULE, NFT_MSG_DELRULE, 3] {
            assert_eq!(take(&mut ledger, message, &table), None);
        }
        take(&mut ledger, NFT_MSG_DELSETELEM, &entries(b"ips\0", 2));
        let change = take(&mut ledger, NFT_MSG_NEWGEN, &end(7)).expect("complete");
        assert_eq!(
            (change.generation, change.sequence, change.read_ns),
            (7, 9, 5)
        );
        assert_eq!(change.by.name.as_deref(), Some("nft"));
        assert!(change.by.parent.is_some() && change.by.cgroup.is_some());
        let nat = change.tables["ip nat"];
        assert_eq!((nat.rules_added, nat.rules_deleted, nat.others), (2, 1, 1));
        assert_eq!(nat.rules, None, "nobody counted");
        assert_eq!(change.tables["ip kube-proxy"].elements_deleted, 2);
        let empty = take(&mut ledger, NFT_MSG_NEWGEN, &[]).expect("complete");
        assert!(empty.tables.is_empty());
    }

    #[test]
    fn the_account_is_kept_by_what_is_announced() {
        let mut ledger = Ledger::default();
        let key = (2, "kube-proxy".to_owned());
        let held = Holdings {
            rules: 10,
            sets: [("ips".to_owned(), 3)].into(),
        };
        ledger.know(Ruleset {
            generation: 5,
            tables: [(key, held)].into(),
        });
        let table = attribute(NFTA_TABLE, b"kube-proxy\0");
        let mut commit = |messages: &[(u8, &[u8])], generation| {
            for (message, bytes) in messages {
                assert_eq!(take(&mut ledger, *message, bytes), None);
            }
            let change = take(&mut ledger, NFT_MSG_NEWGEN, &end(generation)).expect("complete");
            let delta = change.tables["ip kube-proxy"];
            (delta.rules, delta.elements)
        };
        // What was in when it was counted is not counted twice.
        assert_eq!(commit(&[(NFT_MSG_NEWRULE, &table)], 5), (None, None));
        let known = |rules, elements| (Some(rules), Some(elements));
        assert_eq!(
            commit(
                &[
                    (NFT_MSG_NEWRULE, &table),
                    (NFT_MSG_NEWSETELEM, &entries(b"ips\0", 4)),
                    // An anonymous map, one that packets fill, and one more with a name.
                    (NFT_MSG_NEWSET, &set(b"__map0\0", 1)),
                    (NFT_MSG_NEWSETELEM, &entries(b"__map0\0", 50)),
                    (NFT_MSG_NEWSET, &set(b"affinity\0", 0x10)),
                    (NFT_MSG_NEWSET, &set(b"ports\0", 0)),
                    (NFT_MSG_NEWSETELEM, &entries(b"ports\0", 2)),
                ],
                6
            ),
            known((10, 11), (3, 9))
        );
        // A set that goes takes its elements along.
        let gone = [
            (NFT_MSG_DELSET, &set(b"ips\0", 0)[..]),
            (NFT_MSG_DELRULE, &table),
        ];
        assert_eq!(commit(&gone, 7), known((11, 10), (9, 2)));
        // A transaction that was not heard of: from here on nobody knows.
        assert_eq!(commit(&[(NFT_MSG_NEWRULE, &table)], 9), (None, None));
        assert!(!ledger.knows());
    }

    #[test]
    fn what_was_lost_is_not_known() {
        let mut ledger = Ledger::default();
        ledger.know(Ruleset::default());
        ledger.lose();
        take(
            &mut ledger,
            NFT_MSG_NEWRULE,
            &attribute(NFTA_TABLE, b"nat\0"),
        );
        let change = take(&mut ledger, NFT_MSG_NEWGEN, &end(1)).expect("complete");
        assert!(change.incomplete && change.tables["ip nat"].rules.is_none());
    }

    #[test]
    fn other_subsystems_are_not_rules() {
        let mut ledger = Ledger::default();
        let bytes = attribute(NFTA_TABLE, b"nat\0");
        let announcement = Announcement {
            kind: 0x0106,
            sequence: 0,
            port: 0,
            header: &[2, 0, 0, 0],
            attributes: Attributes::nested(&bytes),
        };
        assert_eq!(ledger.take(&announcement, 0).expect("well formed"), None);
        assert!(ledger.tables.is_empty());
    }
}
