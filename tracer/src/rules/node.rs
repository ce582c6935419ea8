//! What kube-proxy knows of the node it runs on, and its flags.

use std::net::IpAddr;

use crate::cluster::{Cidr, Family};

/// What kube-proxy knows of the node it runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// The node's name: endpoints on it are local.
    pub name: String,
    /// The node's zone, for topology hints.
    pub zone: Option<String>,
    /// The node's own addresses but for loopback ones. IPVS mode makes a virtual server for each
    /// of them and NodePort; nftables mode takes NodePort traffic to the first of each family (the
    /// node's primary addresses), iptables mode to any local address.
    pub addresses: Vec<IpAddr>,
    /// `--cluster-cidr`: where pods live. Traffic to a ClusterIP from elsewhere is masqueraded.
    pub cluster_cidrs: Vec<Cidr>,
    /// The cluster's `ServiceCIDR`s, of which nftables mode drops what no Service has.
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

impl Default for NodeView {
    /// A node without a name or addresses, and kube-proxy's default flags.
    fn default() -> Self {
        Self {
            name: String::new(),
            zone: None,
            addresses: Vec::new(),
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

    /// Go's `%#08x` of the mark.
    pub(super) fn mark(&self) -> String {
        format!("{:#010x}", 1_u32 << (u32::from(self.masquerade_bit) % 32))
    }
}
