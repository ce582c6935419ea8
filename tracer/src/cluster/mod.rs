//! Services, their endpoints and the nodes, as plain data.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

mod conflicts;
mod net;
pub mod random;
pub mod read;

pub use conflicts::{Claim, Claimant, Conflict};
pub use net::{Cidr, Family, NotCidr, parse_address};

/// A transport protocol that a Service can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// The one with this number in the IP header.
    pub fn of_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.number() == number)
    }

    /// Lower-case name, as kube-proxy writes it in rules.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }

    /// The number in the IP header (IANA protocol numbers).
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One address and port that serves a `ServicePort`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Endpoint {
    /// The pod's address.
    pub address: IpAddr,
    /// The port the pod listens on.
    pub port: u16,
    /// The node that runs the pod; empty if unknown.
    pub node: String,
    /// What may be sent to it.
    pub condition: Condition,
    /// The zones that should use it (`hints.forZones`); empty: no hint.
    pub zones: Vec<String>,
    /// The nodes that should use it (`hints.forNodes`); empty: no hint.
    pub nodes: Vec<String>,
}

impl Endpoint {
    /// A ready endpoint without topology hints.
    pub fn ready(address: IpAddr, port: u16, node: &str) -> Self {
        Self {
            address,
            port,
            node: node.to_owned(),
            condition: Condition::Ready,
            zones: Vec::new(),
            nodes: Vec::new(),
        }
    }
}

/// An endpoint's conditions, as far as kube-proxy tells them apart (KEP-1669, KEP-1672).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// `ready`: takes new flows.
    #[default]
    Ready,
    /// `serving` and `terminating`, not `ready`: takes new flows only if no endpoint is ready.
    Draining,
    /// Takes none.
    NotReady,
}

/// One port of a Service and the endpoints behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// The port's name; empty for an unnamed port.
    pub name: String,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The port of the ClusterIP.
    pub port: u16,
    /// The port on every node, if the Service has one.
    pub node_port: Option<u16>,
    /// Endpoints of both families, in any condition.
    pub endpoints: Vec<Endpoint>,
}

/// Which endpoints a class of traffic may use.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum TrafficPolicy {
    /// All of them.
    #[default]
    Cluster,
    /// Those on the node that the traffic reaches.
    Local,
}

/// One Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// ClusterIPs, at most one of each family. A Service without one (headless, `ExternalName`) is
    /// nothing to kube-proxy.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// The addresses of `status.loadBalancer.ingress` whose `ipMode` is VIP.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`.
    pub source_ranges: Vec<Cidr>,
    /// `spec.internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// Session affinity by client address, and its timeout in seconds.
    pub affinity: Option<u32>,
    /// `spec.healthCheckNodePort`, of a load balancer with a Local external policy.
    pub health_check_node_port: Option<u16>,
    /// Ports.
    pub ports: Vec<ServicePort>,
}

impl Service {
    /// `ns/name:port`, or `ns/name` for an unnamed port: kube-proxy's `ServicePortName`.
    pub fn port_name(&self, port: &ServicePort) -> String {
        if port.name.is_empty() {
            format!("{}/{}", self.namespace, self.name)
        } else {
            format!("{}/{}:{}", self.namespace, self.name, port.name)
        }
    }
}

/// One node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Name.
    pub name: String,
    /// `status.addresses` of type `InternalIP`.
    pub addresses: Vec<IpAddr>,
    /// `status.addresses` of type `ExternalIP`, which are not always on one of the node's links.
    pub external_addresses: Vec<IpAddr>,
    /// The label `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<Cidr>,
}

/// All Services of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// The Services, in the order they were read or made.
    pub services: Vec<Service>,
    /// The nodes.
    pub nodes: Vec<Node>,
    /// The networks of the `ServiceCIDR` objects, if they were among what was read.
    pub service_cidrs: Vec<Cidr>,
}

impl Cluster {
    /// The node of this name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// Every address that a Service has: ClusterIPs, external and load balancer IPs.
    pub fn virtual_ips(&self) -> impl Iterator<Item = IpAddr> {
        self.services.iter().flat_map(|service| {
            let lists = [
                &service.cluster_ips,
                &service.external_ips,
                &service.load_balancer_ips,
            ];
            lists.into_iter().flatten().copied()
        })
    }
}
