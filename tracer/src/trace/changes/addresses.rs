//! The addresses of the node's links: what the kernel announces, and whose request that was.
//!
//! Announcements do not say who asked: those of IPv6 have no number of the request at all, and an address
//! is announced again when the kernel has found it free (duplicate address detection). So the account of
//! the addresses that are there tells what is a change, and the request that asked for it whose it is.

use std::collections::{HashMap, HashSet};

use super::requests::{Address, LinkName};
use crate::rules::ipvs;

/// For how long a request explains announcements, ns: kernels announce within the request, but the two
/// are read one after the other.
const MEMORY: u64 = 5_000_000_000;

/// A change that was announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Heard {
    /// When it was read (`CLOCK_MONOTONIC`, ns).
    pub(super) read_ns: u64,
    /// The port and number of the request; 0 if they are not told.
    pub(super) request: (u32, u32),
    /// What changed.
    pub(super) address: Address,
}

/// A request, as far as it explains announcements.
#[derive(Clone, Debug)]
pub(super) struct Explanation {
    /// Which request: position in the order of all.
    pub(super) id: u64,
    /// When it was over (`CLOCK_MONOTONIC`, ns).
    pub(super) end_ns: u64,
    /// Its port and number.
    pub(super) request: (u32, u32),
    /// What it asked for.
    pub(super) asked: Wanted,
    /// Has the kernel announced that?
    pub(super) confirmed: bool,
}

/// See [`Explanation`].
#[derive(Clone, Debug)]
pub(super) enum Wanted {
    /// An address to come or go.
    Address(Address),
    /// A link to go, with all its addresses.
    NoLink(Option<u32>),
}

impl Explanation {
    fn explains(&self, heard: &Heard) -> bool {
        let same_request = heard.request != (0, 0) && heard.request == self.request;
        same_request
            || match &self.asked {
                Wanted::Address(address) => !self.confirmed && *address == heard.address,
                Wanted::NoLink(link) => *link == Some(heard.address.link) && !heard.address.added,
            }
    }

    /// Did it ask for exactly this?
    fn names(&self, heard: &Heard) -> bool {
        matches!(self.asked, Wanted::Address(address) if address == heard.address)
    }
}

/// What is known of the node's addresses.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    there: HashSet<(u32, std::net::IpAddr, u8)>,
    names: HashMap<u32, String>,
    heard: Vec<Heard>,
    explanations: Vec<Explanation>,
    /// Were announcements lost?
    deaf: bool,
}

impl Addresses {
    /// An address that is there from the beginning.
    pub(super) fn know(&mut self, address: &Address) {
        self.there.insert(key(address));
    }

    /// What a link is called.
    pub(super) fn name(&mut self, link: u32, name: String) {
        self.names.insert(link, name);
    }

    /// Is the link's name known?
    pub(super) fn has_name(&self, link: u32) -> bool {
        self.names.contains_key(&link)
    }

    /// The link's name, or its number if it was never known.
    pub(super) fn name_of(&self, link: u32) -> String {
        let name = self.names.get(&link).cloned();
        name.unwrap_or_else(|| format!("link {link}"))
    }

    /// Are the link's addresses those of Services?
    pub(super) fn is_virtual(name: &str) -> bool {
        name == ipvs::LINK
    }

    /// The index of a link that a request names.
    pub(super) fn index_of(&self, link: &LinkName) -> Option<u32> {
        match link {
            LinkName::Index(index) => Some(*index),
            LinkName::Name(wanted) => {
                let found = self.names.iter().find(|(_, name)| *name == wanted);
                found.map(|(index, _)| *index)
            }
        }
    }

    /// An announcement. If it is a change that a request explains without having named it (a link that
    /// went with its addresses), that request.
    pub(super) fn hear(&mut self, heard: Heard) -> Option<(u64, Address)> {
        let address = &heard.address;
        let is_change = if address.added {
            self.there.insert(key(address))
        } else {
            self.there.remove(&key(address))
        };
        if !is_change {
            return None;
        }
        let mut explanations = self.explanations.iter_mut();
        match explanations.find(|explanation| explanation.explains(&heard)) {
            Some(found) if found.names(&heard) => {
                found.confirmed = true;
                None
            }
            Some(found) => Some((found.id, heard.address)),
            None => {
                self.heard.push(heard);
                None
            }
        }
    }

    /// A request that was not refused. What it explains of what was heard before without having named
    /// it is returned.
    pub(super) fn explain(&mut self, mut explanation: Explanation) -> Vec<Address> {
        let mut more = Vec::new();
        self.heard.retain(|heard| {
            if !explanation.explains(heard) {
                return true;
            }
            if explanation.names(heard) {
                explanation.confirmed = true;
            } else {
                more.push(heard.address);
            }
            false
        });
        self.explanations.push(explanation);
        more
    }

    /// Has the kernel announced what this request asked for? Without a listener that heard everything,
    /// it is taken to be so.
    pub(super) fn is_confirmed(&self, id: u64) -> bool {
        let mut explanations = self.explanations.iter();
        self.deaf || explanations.any(|explanation| explanation.id == id && explanation.confirmed)
    }

    /// Announcements were lost: from here on nobody knows which addresses are there.
    pub(super) fn lose(&mut self) {
        self.deaf = true;
    }

    /// What nobody asked for, as far as is known, once it has come to rest: its oldest is from before
    /// `patience_ns` ago.
    pub(super) fn unexplained(&mut self, now: u64, patience_ns: u64) -> Vec<Heard> {
        self.explanations
            .retain(|explanation| now.saturating_sub(explanation.end_ns) < MEMORY);
        let first = self.heard.first().map(|heard| heard.read_ns);
        if first.is_none_or(|first| now.saturating_sub(first) < patience_ns) {
            return Vec::new();
        }
        std::mem::take(&mut self.heard)
    }

    /// Since when something heard has been waiting to be explained (`CLOCK_MONOTONIC`, ns).
    pub(super) fn waiting_since(&self) -> Option<u64> {
        self.heard.first().map(|heard| heard.read_ns)
    }
}

fn key(address: &Address) -> (u32, std::net::IpAddr, u8) {
    (address.link, address.ip, address.prefix)
}
