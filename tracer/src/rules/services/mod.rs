//! What a node's rules alone say of Services: dumps of any mode read back, without the API server.
//!
//! Rules of others (CNI plugins, docker, firewalld) are named and counted, and otherwise left
//! alone. Besides kube-proxy 1.36, the forms of older ones are read: load balancer chains
//! (`KUBE-XLB-`) and `KUBE-MARK-DROP` of iptables mode, endpoint chains of nftables mode.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use super::dump::{self, Texts, Unreadable};
use super::{Mode, nftables};
use crate::cluster::{Cidr, Family, Protocol, TrafficPolicy};

mod from_iptables;
mod from_ipvs;
mod from_nftables;
mod patch;

pub(crate) use from_ipvs::of_entry;
pub(crate) use from_nftables::{Place, chain_of};
pub use patch::Patch;
pub(crate) use patch::{ChainChange, ChainNow, ElementChange};

/// What the rules of a node say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Found {
    /// The modes whose rules are there; more than one if a switch left some behind. `iptables`
    /// where the dump does not say which back end it is of.
    pub modes: Vec<&'static str>,
    /// The pod networks: who does not come from there is masqueraded. Empty if the rules name none, as where
    /// kube-proxy knows pods by their interfaces.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pod_cidrs: Vec<Cidr>,
    /// Every `ServicePort`, by mode, family, name and protocol.
    pub services: Vec<FoundService>,
    /// Health check NodePorts whose Service the rules do not name, as in IPVS mode.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub health_check_node_ports: Vec<u16>,
    /// What is not kube-proxy's.
    pub foreign: Vec<Foreign>,
    /// The tables of nftables that are not kube-proxy's and that packets pass, as far as the dumps
    /// show them; those that are only known by name (see [`Texts::nft_tables`]) are taken for such.
    #[serde(skip)]
    pub nft_tables: Vec<NftTable>,
}

impl Found {
    /// Takes in a pod network, once.
    fn add_pod_cidr(&mut self, cidr: Cidr) {
        if !self.pod_cidrs.contains(&cidr) {
            self.pod_cidrs.push(cidr);
        }
    }

    /// Every address of a Service that the rules name.
    pub fn virtual_ips(&self) -> impl Iterator<Item = IpAddr> {
        let frontends = self.services.iter().flat_map(|service| &service.frontends);
        frontends.filter_map(|frontend| frontend.address)
    }

    /// Every `NodePort` that the rules of a family name.
    pub fn node_ports(&self, family: Family) -> impl Iterator<Item = (Protocol, u16)> {
        let services = self.services.iter();
        let services = services.filter(move |service| service.family == family);
        services.flat_map(|service| {
            let frontends = service.frontends.iter();
            let frontends = frontends.filter(|frontend| frontend.kind == FrontendKind::NodePort);
            frontends.map(|frontend| (service.protocol, frontend.port))
        })
    }

    /// The tables of nftables that packets of a family pass and [`Rules`](super::oracle::Rules)
    /// does not walk. Those of iptables-nft are walked if `iptables-save` was asked.
    pub fn not_walked(&self, texts: &Texts, family: Family) -> impl Iterator<Item = &NftTable> {
        let saved = !texts.of(family).iptables.is_empty();
        self.nft_tables.iter().filter(move |table| {
            table.is_passed_by(family) && !(saved && table.is_of_iptables(family))
        })
    }
}

/// A table of nftables.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NftTable {
    /// `ip`, `inet`, `netdev`.
    pub family: String,
    /// Its name.
    pub name: String,
}

impl NftTable {
    /// The tables that iptables-nft has in its families.
    pub(crate) const IPTABLES: [&str; 5] = ["filter", "nat", "mangle", "raw", "security"];

    fn is_passed_by(&self, family: Family) -> bool {
        let own = Family::ALL.iter().any(|known| known.nft() == self.family);
        if own {
            self.family == family.nft()
        } else {
            // ARP is another protocol.
            self.family != "arp"
        }
    }

    fn is_of_iptables(&self, family: Family) -> bool {
        self.family == family.nft() && Self::IPTABLES.contains(&self.name.as_str())
    }

    /// One line of `nft list tables`, if it is not about kube-proxy.
    fn listed(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (Some("table"), Some(family), Some(name)) = (words.next(), words.next(), words.next())
        else {
            return None;
        };
        nftables::ours(family, name).is_none().then(|| Self {
            family: family.to_owned(),
            name: name.to_owned(),
        })
    }
}

impl fmt::Display for NftTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table {} {}", self.family, self.name)
    }
}

/// One `ServicePort` of one family, as far as the rules tell. In IPVS mode, which groups nothing,
/// one address and port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FoundService {
    /// `ns/name:port`; `None` where the rules name nothing.
    pub name: Option<String>,
    /// The mode.
    pub mode: &'static str,
    /// The IP family.
    pub family: Family,
    /// Transport protocol.
    pub protocol: Protocol,
    /// What clients send to.
    pub frontends: Vec<Frontend>,
    /// In nftables mode those frontends that lead to endpoints, for some clients at least: address, or any of the node's,
    /// and port.
    #[serde(skip)]
    pub served: BTreeSet<(Option<IpAddr>, u16)>,
    /// The endpoints of traffic that may go to any node, in the order of the rules.
    pub endpoints: Vec<SocketAddr>,
    /// The endpoints of traffic with a Local policy, if there is any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub local_endpoints: Vec<SocketAddr>,
    /// The policy of traffic to the ClusterIP; `None` if the rules do not tell.
    pub internal_policy: Option<TrafficPolicy>,
    /// The policy of traffic from outside; `None` if there is none or the rules do not tell.
    pub external_policy: Option<TrafficPolicy>,
    /// The timeout of session affinity in seconds.
    pub affinity: Option<u32>,
    /// The networks that load balancer traffic may come from; empty: all. As the rules have them.
    pub source_ranges: Vec<String>,
    /// Health check `NodePort`.
    pub health_check_node_port: Option<u16>,
}

/// What clients send to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Frontend {
    /// What it is.
    pub kind: FrontendKind,
    /// The address; `None` for the node's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// The port.
    pub port: u16,
    /// What becomes of packets to it if it is not served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Refusal>,
}

/// What a frontend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrontendKind {
    /// A `ClusterIP`.
    ClusterIp,
    /// An external IP.
    ExternalIp,
    /// A load balancer's address.
    LoadBalancer,
    /// One of the two: the rules do not tell which.
    External,
    /// A port of the node.
    NodePort,
}

impl fmt::Display for FrontendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::ClusterIp => "ClusterIP",
            Self::ExternalIp => "external IP",
            Self::LoadBalancer => "load balancer",
            Self::External => "external",
            Self::NodePort => "NodePort",
        })
    }
}

/// What becomes of packets to something that is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Refusal {
    /// They are refused: there are no endpoints.
    Reject,
    /// They are dropped: there are none that a Local policy may use.
    Drop,
}

/// Rules, sets or servers that are not kube-proxy's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Foreign {
    /// Where: `IPv4 iptables nat`, `nft`, `ipset`, `IPVS`.
    pub place: String,
    /// The chain, table or set.
    pub name: String,
    /// Whose it is, where the name tells.
    pub owner: Option<&'static str>,
    /// How many rules or entries; `None` if they were not read.
    pub count: Option<u64>,
}

/// Reads all dumps of a node.
pub fn read(texts: &Texts) -> Result<Found, Unreadable> {
    let mut found = Found::default();
    for family in Family::ALL {
        for (source, tables) in texts
            .of(family)
            .iptables
            .iter()
            .zip(dump::saves(texts, family)?)
        {
            from_iptables::read(
                &tables,
                dump::back_end(source).map_or("iptables", Mode::name),
                &mut found,
            );
        }
        if let Some((ruleset, _)) = dump::ruleset(texts, family)? {
            from_nftables::read(&ruleset, family, &mut found);
        }
    }
    let ipvs = dump::ipvs_state(texts)?;
    from_ipvs::read(&ipvs.servers, &ipvs.sets, &mut found);
    found.modes.sort_unstable();
    found.modes.dedup();
    found.foreign.sort_unstable();
    found.foreign.dedup();
    let listed = texts.nft_tables.iter().flat_map(|list| list.text.lines());
    found.nft_tables.extend(listed.filter_map(NftTable::listed));
    found.nft_tables.sort_unstable();
    found.nft_tables.dedup();
    Ok(found)
}

/// `ServicePort`s while they are read from one dump.
struct Collector {
    mode: &'static str,
    family: Family,
    /// By name, or where there is none by what stands for it.
    services: BTreeMap<(String, Protocol), FoundService>,
}

impl Collector {
    const fn new(mode: &'static str, family: Family) -> Self {
        Self {
            mode,
            family,
            services: BTreeMap::new(),
        }
    }

    /// The `ServicePort` of this name.
    fn named(&mut self, name: &str, protocol: Protocol) -> &mut FoundService {
        self.entry(name, Some(name), protocol)
    }

    fn entry(&mut self, key: &str, name: Option<&str>, protocol: Protocol) -> &mut FoundService {
        self.services
            .entry((key.to_owned(), protocol))
            .or_insert_with(|| {
                FoundService::bare(name.map(str::to_owned), self.mode, self.family, protocol)
            })
    }

    fn finish(self, found: &mut Found) {
        found
            .services
            .extend(self.services.into_values().map(|mut service| {
                service.frontends.sort_unstable();
                service.source_ranges.sort_unstable();
                service
            }));
    }
}

impl FoundService {
    /// One of which nothing more is known yet.
    pub const fn bare(
        name: Option<String>,
        mode: &'static str,
        family: Family,
        protocol: Protocol,
    ) -> Self {
        Self {
            name,
            mode,
            family,
            protocol,
            frontends: Vec::new(),
            served: BTreeSet::new(),
            endpoints: Vec::new(),
            local_endpoints: Vec::new(),
            internal_policy: None,
            external_policy: None,
            affinity: None,
            source_ranges: Vec::new(),
            health_check_node_port: None,
        }
    }

    /// The frontend at this address and port, made if there is none. Of two kinds that it was said
    /// to be, the one that tells more counts.
    fn frontend(
        &mut self,
        kind: FrontendKind,
        address: Option<IpAddr>,
        port: u16,
    ) -> &mut Frontend {
        let same = |frontend: &Frontend| frontend.address == address && frontend.port == port;
        let index = self.frontends.iter().position(same).unwrap_or_else(|| {
            self.frontends.push(Frontend {
                kind,
                address,
                port,
                refusal: None,
            });
            self.frontends.len() - 1
        });
        let frontend = &mut self.frontends[index];
        if frontend.kind == FrontendKind::External {
            frontend.kind = kind;
        }
        frontend
    }
}

/// Whose rules begin like this.
const OWNERS: [(&str, &str); 27] = [
    ("DOCKER", "docker"),
    ("docker", "docker"),
    ("cali", "Calico"),
    ("FLANNEL", "flannel"),
    ("flannel", "flannel"),
    ("CNI-", "CNI plugins"),
    ("cni_", "CNI plugins"),
    ("CILIUM_", "Cilium"),
    ("OLD_CILIUM_", "Cilium"),
    ("WEAVE", "Weave Net"),
    ("weave", "Weave Net"),
    ("KUBE-ROUTER", "kube-router"),
    ("kube-router", "kube-router"),
    ("KUBE-POD-FW-", "kube-router"),
    ("KUBE-NWPLCY-", "kube-router"),
    ("KUBE-SRC-", "kube-router"),
    ("KUBE-DST-", "kube-router"),
    ("KUBE-KUBELET-CANARY", "kubelet"),
    ("KUBE-IPTABLES-HINT", "kubelet"),
    ("ISTIO_", "Istio"),
    ("LIBVIRT_", "libvirt"),
    ("NETAVARK", "Podman"),
    ("netavark", "Podman"),
    ("f2b-", "fail2ban"),
    ("ufw", "ufw"),
    ("firewalld", "firewalld"),
    ("ts-", "Tailscale"),
];

/// How firewalld's chains begin, and end in its iptables back end's direct rules.
const FIREWALLD: [&str; 5] = ["IN_", "FWDI_", "FWDO_", "FWD_", "INPUT_ZONES"];

/// Whose a chain, table or set of this name is.
fn owner(name: &str) -> Option<&'static str> {
    if name.ends_with("_direct") || name.ends_with("_ZONES") {
        return Some("firewalld");
    }
    let firewalld = FIREWALLD.iter().any(|prefix| name.starts_with(prefix));
    let known = OWNERS.iter().find(|(prefix, _)| name.starts_with(prefix));
    known
        .map(|(_, owner)| *owner)
        .or(firewalld.then_some("firewalld"))
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.modes.as_slice() {
            [] => writeln!(f, "no rules of kube-proxy")?,
            [mode] => writeln!(f, "rules of mode {mode}")?,
            modes => writeln!(f, "rules of several modes: {}", modes.join(", "))?,
        }
        for service in &self.services {
            write!(f, "{service}")?;
        }
        for port in &self.health_check_node_ports {
            writeln!(f, "health check NodePort {port}")?;
        }
        for foreign in &self.foreign {
            write!(f, "not kube-proxy's: {} {}", foreign.place, foreign.name)?;
            if let Some(count) = foreign.count {
                write!(f, " ({count})")?;
            }
            match foreign.owner {
                Some(owner) => writeln!(f, ", {owner}")?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for FoundService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.as_deref().unwrap_or("unnamed");
        writeln!(f, "{name} {} {} {}", self.protocol, self.family, self.mode)?;
        for frontend in &self.frontends {
            write!(f, "  {:<13} ", frontend.kind)?;
            match frontend.address {
                Some(address) => write!(f, "{}", SocketAddr::new(address, frontend.port))?,
                None => write!(f, "{}", frontend.port)?,
            }
            writeln!(
                f,
                "{}",
                match frontend.refusal {
                    None => "",
                    Some(Refusal::Reject) => " rejected: no endpoints",
                    Some(Refusal::Drop) => " dropped: no local endpoints",
                }
            )?;
        }
        for (policy, of) in [
            (self.internal_policy, "internal"),
            (self.external_policy, "external"),
        ] {
            if policy == Some(TrafficPolicy::Local) {
                writeln!(f, "  {of} policy Local")?;
            }
        }
        if let Some(seconds) = self.affinity {
            writeln!(f, "  affinity      {seconds} s")?;
        }
        if !self.source_ranges.is_empty() {
            writeln!(f, "  only from     {}", self.source_ranges.join(", "))?;
        }
        if let Some(port) = self.health_check_node_port {
            writeln!(f, "  health check  {port}")?;
        }
        for (endpoints, what) in [
            (&self.endpoints, "endpoints"),
            (&self.local_endpoints, "local"),
        ] {
            for (index, endpoint) in endpoints.iter().enumerate() {
                let what = if index == 0 { what } else { "" };
                writeln!(f, "  {what:<13} {endpoint}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests;
