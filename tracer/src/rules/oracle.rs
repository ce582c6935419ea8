//! A node's dumps, read and ready to be walked.

use std::collections::HashSet;
use std::net::IpAddr;

use super::dump::{self, Texts, Unreadable};
use super::iptables::rule::Tables;
use super::iptables::walk::Chains;
use super::ipvs::walk::{Director, SetTable};
use super::nftables::table::Table;
use super::nftables::walk::TableWalk;
use super::walk::{Layer, Oracle, Place};
use crate::cluster::Family;

/// The rules of one family.
#[derive(Debug)]
pub struct Rules<'a> {
    tables: Vec<Tables<'a>>,
    table: Option<Table>,
    director: Option<Director>,
    sets: SetTable,
    /// The addresses of `kube-ipvs0`, and those of other links as far as the dump shows them.
    local: Vec<IpAddr>,
}

impl<'a> Rules<'a> {
    /// Reads the dumps. The rules of every mode that is there count, as they do in a kernel.
    pub fn parse(texts: &'a Texts, family: Family) -> Result<Self, Unreadable> {
        let ipvs = dump::ipvs_state(texts)?;
        let ruleset = dump::ruleset(texts, family)?;
        let bound = ipvs.addresses.bound.iter().map(|bound| bound.address);
        Ok(Self {
            tables: dump::saves(texts, family)?,
            table: ruleset.and_then(|(ruleset, _)| ruleset.table(family).cloned()),
            sets: SetTable::new(&ipvs.sets),
            local: bound.chain(ipvs.addresses.others).collect(),
            director: (!ipvs.servers.list.is_empty()).then(|| Director::new(ipvs.servers)),
        })
    }

    /// The node with its own addresses, to which those are added that the dump knows of, and with
    /// the addresses of Services.
    pub fn place(&self, mut local: HashSet<IpAddr>, virtual_ips: HashSet<IpAddr>) -> Place {
        local.extend(&self.local);
        Place {
            local,
            virtual_ips,
            ..Place::default()
        }
    }

    /// Indexes the rules.
    pub fn layers(&self) -> Layers<'_> {
        let chains = self.tables.iter();
        Layers {
            chains: chains
                .map(|tables| Chains::new(tables, &self.sets))
                .collect(),
            table: self.table.as_ref().map(TableWalk::new),
            director: self.director.as_ref(),
        }
    }
}

/// Rules with their indexes.
pub struct Layers<'r> {
    chains: Vec<Chains<'r>>,
    table: Option<TableWalk<'r>>,
    director: Option<&'r Director>,
}

impl Layers<'_> {
    /// The oracle of these rules in this place.
    pub fn oracle<'a>(&'a self, place: &'a Place) -> Oracle<'a> {
        let mut layers: Vec<&'a dyn Layer> = Vec::new();
        for chains in &self.chains {
            layers.push(chains);
        }
        if let Some(table) = &self.table {
            layers.push(table);
        }
        if let Some(director) = self.director {
            layers.push(director);
        }
        Oracle::new(place, &layers)
    }
}
