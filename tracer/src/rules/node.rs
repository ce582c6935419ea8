//! What kube-proxy knows of the node it runs on, and its flags.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::cluster::{Cidr, Cluster, Family};

/// What kube-proxy knows of the node it runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// The node's name: endpoints on it are local.
    pub name: String,
    /// The node's zone, for topology hints.
    pub zone: Option<String>,
    /// The addresses on the node's links but for loopback ones and those of `kube-ipvs0`. IPVS
    /// mode makes a virtual server for each of them and NodePort.
    pub addresses: Vec<IpAddr>,
    /// The addresses of the Node object: the first of each family is the node's primary one. If
    /// there are none, the first of `addresses` are taken.
    pub primary: Vec<IpAddr>,
    /// `--cluster-cidr`: where pods live. Traffic to a ClusterIP from elsewhere is masqueraded.
    pub cluster_cidrs: Vec<Cidr>,
    /// The cluster's `ServiceCIDR`s, of which nftables mode drops what no Service has. If they are
    /// not known, there is no such rule.
    pub service_cidrs: Vec<Cidr>,
    /// `--masquerade-all`: every packet to a ClusterIP is masqueraded.
    pub masquerade_all: bool,
    /// `--nodeport-addresses`.
    pub node_port_addresses: NodePortAddresses,
    /// `--iptables-localhost-nodeports`: NodePorts on loopback addresses, in iptables mode.
    pub localhost_node_ports: bool,
    /// The bit of the mark that asks for masquerading: `--iptables-masquerade-bit`.
    pub masquerade_bit: u8,
    /// `--ipvs-scheduler`.
    pub scheduler: String,
    /// Can the kernel count with nfacct? If so, iptables mode counts two things with it.
    pub nfacct: bool,
    /// Is `nf_conntrack_tcp_be_liberal` set? If so, iptables mode does not drop INVALID packets.
    pub tcp_be_liberal: bool,
}

/// On which of a node's addresses NodePorts are served: `--nodeport-addresses`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// kube-proxy's default: the primary ones in nftables mode, all of them in the others.
    #[default]
    Default,
    /// The addresses in the Node object: `primary`.
    Primary,
    /// Those in these networks.
    Within(Vec<Cidr>),
}

/// The cluster has no such node.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no Node '{name}' in the cluster; its Nodes are: {known}")]
pub struct UnknownNode {
    /// The name that was asked for.
    pub name: String,
    /// The names that there are.
    pub known: String,
}

impl Default for NodeView {
    /// A node without a name or addresses, and kube-proxy's default flags.
    fn default() -> Self {
        Self {
            name: String::new(),
            zone: None,
            addresses: Vec::new(),
            primary: Vec::new(),
            cluster_cidrs: Vec::new(),
            service_cidrs: Vec::new(),
            masquerade_all: false,
            node_port_addresses: NodePortAddresses::Default,
            localhost_node_ports: true,
            masquerade_bit: Self::MASQUERADE_BIT,
            scheduler: "rr".to_owned(),
            nfacct: true,
            tcp_be_liberal: false,
        }
    }
}

impl NodeView {
    /// kube-proxy's default masquerade bit.
    pub const MASQUERADE_BIT: u8 = 14;

    /// A node of the cluster, with kube-proxy's default flags: its zone, its addresses and the
    /// cluster's `ServiceCIDR`s are known from the cluster.
    pub fn of(cluster: &Cluster, name: &str) -> Result<Self, UnknownNode> {
        let Some(node) = cluster.node(name) else {
            let known: Vec<&str> = cluster.nodes.iter().map(|n| n.name.as_str()).collect();
            return Err(UnknownNode {
                name: name.to_owned(),
                known: if known.is_empty() {
                    "none".to_owned()
                } else {
                    known.join(", ")
                },
            });
        };
        let both = [&node.addresses, &node.external_addresses];
        Ok(Self {
            name: node.name.clone(),
            zone: node.zone.clone(),
            addresses: node.addresses.clone(),
            primary: both.into_iter().flatten().copied().collect(),
            service_cidrs: cluster.service_cidrs.clone(),
            ..Self::default()
        })
    }

    /// The first `--cluster-cidr` of the family.
    pub(super) fn cluster_cidr(&self, family: Family) -> Option<Cidr> {
        self.cluster_cidrs
            .iter()
            .copied()
            .find(|cidr| family.holds(cidr.base))
    }

    /// The node's addresses of the family.
    pub(super) fn addresses_of(&self, family: Family) -> impl Iterator<Item = IpAddr> {
        self.addresses
            .iter()
            .copied()
            .filter(move |address| family.holds(*address))
    }

    /// The node's primary address of the family.
    pub(super) fn primary_of(&self, family: Family) -> Option<IpAddr> {
        let known = if self.primary.is_empty() {
            &self.addresses
        } else {
            &self.primary
        };
        known.iter().copied().find(|address| family.holds(*address))
    }

    /// What kube-proxy takes for the node's address: a loopback one if there is none
    /// (`detectNodeIPs`).
    pub(super) fn node_ip(&self, family: Family) -> IpAddr {
        self.primary_of(family).unwrap_or(match family {
            Family::V4 => Ipv4Addr::LOCALHOST.into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        })
    }

    /// The addresses that serve NodePorts, loopback ones among them; `None`: every local address.
    /// `default` is what the mode makes of no flag.
    pub(super) fn node_port_ips(
        &self,
        family: Family,
        default: &NodePortAddresses,
    ) -> Option<Vec<IpAddr>> {
        let cidrs = self.node_port_cidrs(family, default)?;
        let loopback = match family {
            Family::V4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Family::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        let mut ips: Vec<IpAddr> = Vec::new();
        let primary = self.primary_of(family);
        for address in self.addresses_of(family).chain(primary).chain([loopback]) {
            let is_inside = cidrs.iter().any(|cidr| cidr.contains(address));
            if is_inside && !ips.contains(&address) {
                ips.push(address);
            }
        }
        Some(ips)
    }

    /// The networks of the family, or `None` for all of it: without one of the family, as with
    /// one that is everything, every address serves (`NewNodePortAddresses`).
    fn node_port_cidrs(&self, family: Family, default: &NodePortAddresses) -> Option<Vec<Cidr>> {
        let wanted = match &self.node_port_addresses {
            NodePortAddresses::Default => default,
            chosen => chosen,
        };
        let cidrs: Vec<Cidr> = match wanted {
            NodePortAddresses::Default => Vec::new(),
            NodePortAddresses::Primary => self
                .primary_of(family)
                .filter(|address| !address.is_loopback())
                .map(|base| Cidr {
                    base,
                    prefix: if base.is_ipv4() { 32 } else { 128 },
                })
                .into_iter()
                .collect(),
            NodePortAddresses::Within(cidrs) => cidrs
                .iter()
                .copied()
                .filter(|cidr| cidr.family() == family)
                .collect(),
        };
        let is_all = cidrs.is_empty() || cidrs.iter().any(|cidr| cidr.prefix == 0);
        (!is_all).then_some(cidrs)
    }

    /// Does iptables mode serve NodePorts on loopback addresses? Only IPv4 ones can be.
    pub(super) fn serves_localhost(&self, family: Family) -> bool {
        let start = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0));
        family == Family::V4
            && self.localhost_node_ports
            && self
                .node_port_cidrs(family, &NodePortAddresses::Default)
                .is_none_or(|cidrs| {
                    cidrs
                        .iter()
                        .any(|cidr| cidr.base.is_loopback() || cidr.contains(start))
                })
    }

    /// Go's `%#08x` of the mark.
    pub(super) fn mark(&self) -> String {
        format!("{:#010x}", 1_u32 << (u32::from(self.masquerade_bit) % 32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Node;

    fn addresses(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|a| a.parse().expect("address")).collect()
    }

    #[test]
    fn a_node_is_known_from_its_cluster() {
        let cluster = Cluster {
            nodes: vec![Node {
                name: "n".to_owned(),
                addresses: addresses(&["192.0.2.1", "192.0.2.2"]),
                external_addresses: addresses(&["198.51.100.1", "2001:db8::1"]),
                zone: Some("z".to_owned()),
                pod_cidrs: Vec::new(),
            }],
            ..Cluster::default()
        };
        let node = NodeView::of(&cluster, "n").expect("a node");
        assert_eq!(node.addresses, addresses(&["192.0.2.1", "192.0.2.2"]));
        assert_eq!(node.node_ip(Family::V4), addresses(&["192.0.2.1"])[0]);
        assert_eq!(node.node_ip(Family::V6), addresses(&["2001:db8::1"])[0]);
        let unknown = NodeView::of(&cluster, "m").expect_err("no such node");
        assert!(unknown.to_string().ends_with("its Nodes are: n"));
        assert_eq!(
            NodeView::default().node_ip(Family::V6),
            addresses(&["::1"])[0]
        );
    }

    #[test]
    fn node_port_addresses_are_kube_proxys() {
        use NodePortAddresses::{Default, Primary, Within};
        let mut node = NodeView {
            addresses: addresses(&["192.0.2.1", "10.0.0.1", "10.0.0.2"]),
            ..NodeView::default()
        };
        let (v4, v6) = (Family::V4, Family::V6);
        assert_eq!(node.node_port_ips(v4, &Default), None);
        assert!(node.serves_localhost(v4) && !node.serves_localhost(v6));
        let primary = node.node_port_ips(v4, &Primary);
        assert_eq!(primary, Some(addresses(&["192.0.2.1"])));
        assert_eq!(node.node_port_ips(v6, &Primary), None);
        node.node_port_addresses = Within(vec![Cidr::v4(10, 0, 0, 0, 8)]);
        let within = node.node_port_ips(v4, &Primary);
        assert_eq!(within, Some(addresses(&["10.0.0.1", "10.0.0.2"])));
        assert_eq!(node.node_port_ips(v6, &Primary), None);
        assert!(!node.serves_localhost(v4));
        node.node_port_addresses = Within(vec![Cidr::v4(127, 0, 0, 0, 8)]);
        assert!(node.serves_localhost(v4));
        let within = node.node_port_ips(v4, &Default);
        assert_eq!(within, Some(addresses(&["127.0.0.1"])));
        node.node_port_addresses = Within(vec![Cidr::v4(10, 0, 0, 0, 8), Cidr::v4(0, 0, 0, 0, 0)]);
        assert_eq!(node.node_port_ips(v4, &Default), None);
    }
}
