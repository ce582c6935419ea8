//! What one transaction of nftables mode changes of what the rules say, without reading them all again: with 30,000
//! Services that takes the kernel 20 s.
//!
//! Only what kube-proxy writes is taken for understood; after anything else the rules have to be read.

use std::net::{IpAddr, SocketAddr};

use super::from_nftables::{Place, SERVICE, chain_of, of_element};
use super::{Found, FoundService, Frontend, FrontendKind, Mode};
use crate::cluster::Family;

/// The most changes that are put in one by one, each of which looks through all Services: of more, as of a first sync,
/// reading the rules takes no longer.
const MOST: usize = 1000;

/// What a transaction did to a table of kube-proxy's, where all of that is understood.
///
/// Policies, source ranges and affinity are not in it: they stay what they were when the rules were read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patch {
    /// Elements that came and went, of each map and key the last word.
    pub(crate) elements: Vec<ElementChange>,
    /// Chains of Services that were written anew or emptied.
    pub(crate) chains: Vec<ChainChange>,
}

/// An element that came into a map or went from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ElementChange {
    /// Of which family's table.
    pub(crate) family: Family,
    /// The map.
    pub(crate) set: String,
    /// Its key.
    pub(crate) place: Place,
    /// Did it come?
    pub(crate) added: bool,
    /// The chain that it leads to; `None`: it drops.
    pub(crate) chain: Option<String>,
    /// Its comment: in maps of what has no endpoints, the `ServicePort`'s name.
    pub(crate) comment: Option<String>,
    /// Did the transaction make its address a ClusterIP, where the chain does not tell?
    pub(crate) cluster_ip: bool,
}

/// A chain that was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ChainChange {
    /// Of which family's table.
    pub(crate) family: Family,
    /// Its name.
    pub(crate) name: String,
    /// What became of it.
    pub(crate) now: ChainNow,
}

/// What became of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ChainNow {
    /// It was written anew, and sends packets there.
    Written(Vec<SocketAddr>),
    /// So many of its rules went, and none came.
    Less(usize),
    /// It is gone.
    Gone,
}

impl Patch {
    /// What came with it, whatever goes meanwhile: Services with one frontend and without endpoints, and with endpoints
    /// and without frontends.
    pub fn arrivals(&self) -> impl Iterator<Item = FoundService> {
        let added = self.elements.iter().filter(|element| element.added);
        let frontends = added.filter_map(of_element);
        frontends.chain(self.chains.iter().filter_map(ChainChange::service))
    }
}

impl ChainChange {
    /// Its Service with the endpoints that it has now, if it was written anew.
    fn service(&self) -> Option<FoundService> {
        let ChainNow::Written(endpoints) = &self.now else {
            return None;
        };
        let (_, name, protocol) = chain_of(&self.name)?;
        let mode = Mode::Nftables.name();
        Some(FoundService {
            endpoints: endpoints.clone(),
            ..FoundService::bare(Some(name), mode, self.family, protocol)
        })
    }
}

impl ElementChange {
    fn is_of(&self, service: &FoundService) -> bool {
        is_nftables(service, self.family) && service.protocol == self.place.1
    }

    fn is_at(&self, frontend: &Frontend) -> bool {
        (frontend.address, frontend.port) == self.key()
    }

    const fn key(&self) -> (Option<IpAddr>, u16) {
        let (address, _, port) = self.place;
        (address, port)
    }

    /// What its map says of frontends; `None`: nothing.
    fn fate(&self) -> Option<Fate> {
        match self.set.as_str() {
            "service-ips" | "service-nodeports" => Some(Fate::Served),
            "no-endpoint-services" | "no-endpoint-nodeports" => Some(Fate::Refused),
            _ => None,
        }
    }
}

/// What becomes of packets to a frontend. Both at once if some clients are served and others are not, as by a Local
/// policy without local endpoints.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Served,
    Refused,
}

fn is_nftables(service: &FoundService, family: Family) -> bool {
    service.mode == Mode::Nftables.name() && service.family == family
}

impl Found {
    /// Takes in what a transaction changed. False: what the rules say now cannot be told from it, and they have to be
    /// read.
    #[must_use]
    pub fn apply(&mut self, patch: &Patch) -> bool {
        if patch.elements.len() + patch.chains.len() > MOST {
            return false;
        }
        // First what came: what moves between maps keeps what is known of it.
        let mut understood = true;
        for element in patch.elements.iter().filter(|element| element.added) {
            understood &= self.add_frontend(element);
        }
        for element in patch.elements.iter().filter(|element| !element.added) {
            self.remove_frontend(element, None);
        }
        for chain in &patch.chains {
            understood &= self.rewrite(chain);
        }
        self.services.retain(|service| {
            service.mode != Mode::Nftables.name() || !service.frontends.is_empty()
        });
        understood
    }

    fn add_frontend(&mut self, element: &ElementChange) -> bool {
        let Some(fate) = element.fate() else {
            return true;
        };
        let Some(new) = of_element(element) else {
            return false;
        };
        let Some(&(mut frontend)) = new.frontends.first() else {
            return false;
        };
        if frontend.kind == FrontendKind::External {
            frontend.kind = self.kind_of(element, fate);
        }
        self.remove_frontend(element, new.name.as_deref());
        let same = |service: &&mut FoundService| element.is_of(service) && service.name == new.name;
        let Some(service) = self.services.iter_mut().find(same) else {
            self.services.push(FoundService {
                frontends: vec![frontend],
                ..new
            });
            return true;
        };
        let at = service.frontends.iter().position(|one| element.is_at(one));
        if let Some(before) = at.map(|at| service.frontends.remove(at)) {
            frontend.refusal = frontend.refusal.or(before.refusal);
        }
        service.frontends.push(frontend);
        service.frontends.sort_unstable();
        if fate == Fate::Served {
            service.served.insert(element.key());
        }
        true
    }

    /// What an external address is, or one of which its map does not tell: what it was before.
    fn kind_of(&self, element: &ElementChange, fate: Fate) -> FrontendKind {
        let (address, _) = element.key();
        let of_family = |service: &&FoundService| is_nftables(service, element.family);
        let services = self.services.iter().filter(of_family);
        let mut known = services
            .flat_map(|service| &service.frontends)
            .filter(|frontend| frontend.address == address)
            .map(|frontend| frontend.kind);
        let vague = FrontendKind::External;
        known
            .find(|kind| match kind {
                FrontendKind::ClusterIp => fate == Fate::Refused,
                _ => *kind != vague,
            })
            .unwrap_or(vague)
    }

    /// An element is in its map no more, or is another Service's than all but this one.
    fn remove_frontend(&mut self, element: &ElementChange, but: Option<&str>) {
        let Some(fate) = element.fate() else {
            return;
        };
        let others = self.services.iter_mut().filter(|service| {
            element.is_of(service) && (but.is_none() || service.name.as_deref() != but)
        });
        for service in others {
            if fate == Fate::Served {
                service.served.remove(&element.key());
            }
            for frontend in &mut service.frontends {
                if fate == Fate::Refused && element.is_at(frontend) {
                    frontend.refusal = None;
                }
            }
            let served = &service.served;
            service.frontends.retain(|frontend| {
                !element.is_at(frontend)
                    || frontend.refusal.is_some()
                    || served.contains(&element.key())
            });
        }
    }

    fn rewrite(&mut self, chain: &ChainChange) -> bool {
        let Some((prefix, name, protocol)) = chain_of(&chain.name) else {
            return true;
        };
        let is_its = |service: &&mut FoundService| {
            is_nftables(service, chain.family)
                && service.protocol == protocol
                && service.name.as_ref() == Some(&name)
        };
        let Some(service) = self.services.iter_mut().find(is_its) else {
            // Who is gone needs no endpoints; of who comes later they would be forgotten.
            return !matches!(chain.now, ChainNow::Written(_));
        };
        let endpoints = match prefix {
            SERVICE => &mut service.endpoints,
            _ => &mut service.local_endpoints,
        };
        match &chain.now {
            ChainNow::Written(new) => endpoints.clone_from(new),
            ChainNow::Gone => endpoints.clear(),
            ChainNow::Less(rules) => {
                // One rule sends packets to all endpoints; with affinity there is one more for each.
                let all = 1 + service.affinity.map_or(0, |_| endpoints.len());
                if *rules < all && !endpoints.is_empty() && !service.served.is_empty() {
                    return false;
                }
                endpoints.clear();
            }
        }
        true
    }
}
