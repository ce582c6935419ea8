//! What may stand in the maps where several `ServicePort`s claim one address and port.
//!
//! kube-proxy visits all `ServicePort`s at every sync, in the random order of a Go map, and of two
//! elements with one key it keeps the later (`ensureElem` of `pkg/proxy/nftables/proxier.go`:
//! deleted and added again; two `add element` in one transaction the kernel refuses). So an element
//! may be any claimant's. But all come from one order: what B's element replaced in one map, A's did
//! not replace in another. Claimants without endpoints write to other maps than those with, so that
//! one key may stand in several maps, for different Services.
//!
//! An element whose verdict stays is not written again and keeps its comment. So among claimants
//! with the same verdict, a comment does not tell which was the last.

use std::collections::HashMap;

use crate::cluster::{Cluster, Conflict, Family};
use crate::rules::NodeView;
use crate::rules::ports::Ports;

use super::table::{Element, Key, Table, Text, Value};
use super::{ParseError, parse, render};

/// The elements that several `ServicePort`s would write.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    slots: Vec<Slot>,
    /// Where a set's and key's slot is.
    index: HashMap<Text, HashMap<Key, usize>>,
    /// The slots of each claimant.
    of_claimants: Vec<Vec<usize>>,
}

/// A key of a map that several `ServicePort`s want.
#[derive(Clone, Debug)]
struct Slot {
    set: Text,
    key: Key,
    /// Claimants, and what each would write.
    elements: Vec<(usize, Element)>,
}

/// An element that is some claimant's, but not in one sync with the others.
#[derive(Clone, Copy, Debug)]
pub struct Misplaced<'c> {
    /// The map.
    pub set: &'c str,
    /// The key.
    pub key: &'c Key,
    /// The element of the claimant whose other elements are there.
    pub element: &'c Element,
}

impl Claims {
    /// The claims of a family, if there are `conflicts` in it.
    pub fn of(
        cluster: &Cluster,
        conflicts: &[Conflict],
        node: &NodeView,
        family: Family,
    ) -> Result<Self, ParseError> {
        let of_family = conflicts.iter().filter(|c| c.claim.family() == family);
        let mut places: Vec<(usize, usize)> = of_family
            .flat_map(|conflict| conflict.claimants.iter().map(|c| c.place()))
            .collect();
        places.sort_unstable();
        places.dedup();
        let mut all: HashMap<Text, HashMap<Key, Vec<(usize, Element)>>> = HashMap::new();
        for (claimant, place) in places.iter().enumerate() {
            let Some(table) = alone(cluster, *place, node, family)? else {
                continue;
            };
            for (name, set) in table.sets {
                // An element of a set says the same whoever wrote it.
                let verdicts = set.elements.into_iter().filter(|(_, e)| e.value.is_some());
                let keys = all.entry(name).or_default();
                for (key, element) in verdicts {
                    keys.entry(key).or_default().push((claimant, element));
                }
            }
        }
        let mut claims = Self {
            of_claimants: vec![Vec::new(); places.len()],
            ..Self::default()
        };
        for (set, keys) in all {
            for (key, elements) in keys {
                claims.add(&set, key, elements);
            }
        }
        Ok(claims)
    }

    fn add(&mut self, set: &Text, key: Key, elements: Vec<(usize, Element)>) {
        if elements.len() < 2 {
            return;
        }
        let slot = self.slots.len();
        for (claimant, _) in &elements {
            if let Some(slots) = self.of_claimants.get_mut(*claimant) {
                slots.push(slot);
            }
        }
        let keys = self.index.entry(set.clone()).or_default();
        keys.insert(key.clone(), slot);
        self.slots.push(Slot {
            set: set.clone(),
            key,
            elements,
        });
    }

    /// Is it what one of the claimants would write?
    pub fn allow(&self, set: &str, key: &[Value], element: &Element) -> bool {
        let slot = self.index.get(set).and_then(|keys| keys.get(key));
        let slot = slot.and_then(|slot| self.slots.get(*slot));
        slot.is_some_and(|slot| slot.elements.iter().any(|(_, theirs)| theirs == element))
    }

    /// The elements that no order of Services explains, besides those that are nobody's.
    pub fn misplaced(&self, found: &Table) -> Vec<Misplaced<'_>> {
        if self.slots.is_empty() {
            return Vec::new();
        }
        Order::new(self, found).misplaced()
    }
}

/// The table of one `ServicePort` as if there were no other.
fn alone(
    cluster: &Cluster,
    (service, port): (usize, usize),
    node: &NodeView,
    family: Family,
) -> Result<Option<Table>, ParseError> {
    let Some(mut service) = cluster.services.get(service).cloned() else {
        return Ok(None);
    };
    service.ports = service.ports.get(port).cloned().into_iter().collect();
    let cluster = Cluster {
        services: vec![service],
        ..Cluster::default()
    };
    let text = render(&Ports::new(&cluster, node, family), node, family);
    Ok(parse(&text)?.slot(family).take())
}

/// Puts claimants in an order that explains what is found, from the last to the first. The last
/// one's elements stand in all of its slots; without it and its slots the same goes for the last
/// but one.
struct Order<'c> {
    claims: &'c Claims,
    /// For each slot that is not explained yet, the claimants that may have been its last; empty if
    /// there is nothing to explain.
    winners: Vec<Vec<usize>>,
    /// For each claimant, of how many slots that are not explained yet another was the last.
    blocked: Vec<usize>,
    /// Claimants that are not blocked.
    ready: Vec<usize>,
    misplaced: Vec<Misplaced<'c>>,
}

impl<'c> Order<'c> {
    fn new(claims: &'c Claims, found: &Table) -> Self {
        let mut order = Self {
            claims,
            winners: claims.slots.iter().map(|s| winners(s, found)).collect(),
            blocked: vec![0; claims.of_claimants.len()],
            ready: Vec::new(),
            misplaced: Vec::new(),
        };
        for (claimant, slots) in claims.of_claimants.iter().enumerate() {
            let blocking = slots.iter().filter(|slot| order.blocks(**slot, claimant));
            let blocking = blocking.count();
            if blocking == 0 {
                order.ready.push(claimant);
            }
            if let Some(blocked) = order.blocked.get_mut(claimant) {
                *blocked = blocking;
            }
        }
        order
    }

    fn misplaced(mut self) -> Vec<Misplaced<'c>> {
        loop {
            while let Some(claimant) = self.ready.pop() {
                for slot in self.slots(claimant) {
                    self.close(*slot);
                }
            }
            let Some((claimant, slot)) = self.circle() else {
                return self.misplaced;
            };
            let claims = self.claims;
            if let Some(slot) = claims.slots.get(slot)
                && let Some((_, element)) = slot.elements.iter().find(|(c, _)| *c == claimant)
            {
                self.misplaced.push(Misplaced {
                    set: &slot.set,
                    key: &slot.key,
                    element,
                });
            }
            self.close(slot);
        }
    }

    fn slots(&self, claimant: usize) -> &'c [usize] {
        self.claims.of_claimants.get(claimant).map_or(&[], |s| s)
    }

    fn winners(&self, slot: usize) -> &[usize] {
        self.winners.get(slot).map_or(&[], |winners| winners)
    }

    /// Does this slot say that another came after the claimant?
    fn blocks(&self, slot: usize, claimant: usize) -> bool {
        let winners = self.winners(slot);
        !winners.is_empty() && !winners.contains(&claimant)
    }

    /// The slot is explained.
    fn close(&mut self, slot: usize) {
        let winners = self.winners.get_mut(slot).map(std::mem::take);
        let winners = winners.unwrap_or_default();
        let claims = self.claims;
        let Some(slot) = claims.slots.get(slot).filter(|_| !winners.is_empty()) else {
            return;
        };
        let losers = slot.elements.iter().map(|(claimant, _)| *claimant);
        for loser in losers.filter(|claimant| !winners.contains(claimant)) {
            if let Some(blocked) = self.blocked.get_mut(loser) {
                *blocked -= 1;
                if *blocked == 0 {
                    self.ready.push(loser);
                }
            }
        }
    }

    /// A claimant that should have come after another in one slot and before it in others, if
    /// there is a slot that is not explained yet; and the slot that says before.
    fn circle(&self) -> Option<(usize, usize)> {
        // The flows themselves decide whose the address is, and the other maps are to follow.
        let open = (0..self.winners.len()).filter(|slot| !self.winners(*slot).is_empty());
        let first = open.min_by_key(|slot| {
            let set = self.claims.slots.get(*slot).map(|slot| &*slot.set);
            !matches!(set, Some("service-ips" | "service-nodeports"))
        })?;
        let mut claimant = *self.winners(first).first()?;
        let mut passed = vec![false; self.blocked.len()];
        // Whoever is left is blocked, by a slot whose winner is left too.
        loop {
            let blocks = |slot: &&usize| self.blocks(**slot, claimant);
            let slot = *self.slots(claimant).iter().find(blocks)?;
            let passed = passed.get_mut(claimant)?;
            if std::mem::replace(passed, true) {
                return Some((claimant, slot));
            }
            claimant = *self.winners(slot).first()?;
        }
    }
}

/// Those of a slot's claimants whose verdict is there.
fn winners(slot: &Slot, found: &Table) -> Vec<usize> {
    let there = found.sets.get(&slot.set);
    let Some(there) = there.and_then(|set| set.elements.get(&slot.key)) else {
        return Vec::new();
    };
    let same = slot.elements.iter().filter(|(_, e)| e.value == there.value);
    same.map(|(claimant, _)| *claimant).collect()
}
