//! Services, their endpoints and the nodes, as plain data.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

mod net;

pub use net::{Cidr, Family, NotCidr};

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
    /// The node that runs the pod.
    pub node: String,
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
    /// Ready endpoints of both families.
    pub endpoints: Vec<Endpoint>,
}

/// One Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// ClusterIPs, at most one of each family.
    pub cluster_ips: Vec<IpAddr>,
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

/// All Services of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// The Services, in the order they were read or made.
    pub services: Vec<Service>,
}
