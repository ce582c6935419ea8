//! A live node, watched: whose packets pass, where they go, what each stage costs, who changes the
//! rules. Reads and attaches probes; changes nothing.
//!
//! [`changes`] hears of rule changes, [`reading`] reads the rules, again after them, [`directory`] knows
//! Services by their addresses, [`session`] joins these with what the probes tell of each [`journey`], [`flows`]
//! finds out what became of each ([`verdict`]), and [`summary`] is what a session found.

pub mod changes;
pub mod directory;
pub mod flows;
pub mod hints;
pub mod journey;
pub mod met;
pub mod outages;
pub mod packets;
pub mod pcapng;
pub mod reading;
pub mod run;
pub mod session;
pub mod stuck;
pub mod summary;
pub mod tally;
pub mod timeline;
pub mod translator;
pub mod verdict;
