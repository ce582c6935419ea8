//! Random clusters in which every feature of Services occurs: for tests, fuzzing and benchmarks.
//!
//! The addresses: pods `10.244.0.0/16` and `fd00:10:244::/56` (node `worker-N` has
//! `10.244.N.0/24`), ClusterIPs `10.96.0.0/12` and `fd00:10:96::/108`, external IPs
//! `198.51.100.0/24`, load balancers `203.0.113.0/24`, nodes `192.0.2.0/24` and `2001:db8::/64`.

use std::net::{IpAddr, Ipv6Addr};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    Cidr, Cluster, Condition, Endpoint, Family, Node, Protocol, Service, ServicePort, TrafficPolicy,
};

/// The node whose rules are asked for: endpoints on it are local.
pub const NODE: &str = "worker-0";
/// `--cluster-cidr`.
pub const CLUSTER_CIDRS: [Cidr; 2] = [
    Cidr::v4(10, 244, 0, 0, 16),
    Cidr::v6([0xfd00, 0x10, 0x244, 0], [0; 4], 56),
];
/// The cluster's `ServiceCIDR`s.
pub const SERVICE_CIDRS: [Cidr; 2] = [
    Cidr::v4(10, 96, 0, 0, 12),
    Cidr::v6([0xfd00, 0x10, 0x96, 0], [0; 4], 108),
];

const NODES: u16 = 3;
const FIRST_NODE_PORT: u16 = 30_000;

/// A cluster of `services` Services (at most 2700: their NodePorts are different), the same for
/// the same seed.
pub fn cluster(seed: u64, services: u16) -> Cluster {
    let mut maker = Maker {
        rng: ChaCha8Rng::seed_from_u64(seed),
        node_port: FIRST_NODE_PORT,
    };
    Cluster {
        services: (0..services).map(|index| maker.service(index)).collect(),
        nodes: (0..NODES).map(node).collect(),
        service_cidrs: SERVICE_CIDRS.into(),
    }
}

/// Node number `index`, in zone `z0` or `z1`.
fn node(index: u16) -> Node {
    let low = u8::try_from(index + 1).unwrap_or(u8::MAX);
    Node {
        name: format!("worker-{index}"),
        addresses: vec![
            IpAddr::from([192, 0, 2, low]),
            IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, index + 1]),
        ],
        zone: Some(zone(index)),
        ..Node::default()
    }
}

fn zone(node: u16) -> String {
    format!("z{}", node % 2)
}

struct Maker {
    rng: ChaCha8Rng,
    node_port: u16,
}

impl Maker {
    /// True once in `n` times.
    fn once_in(&mut self, n: u32) -> bool {
        self.rng.random_range(0..n) == 0
    }

    fn policy(&mut self, n: u32) -> TrafficPolicy {
        if self.once_in(n) {
            TrafficPolicy::Local
        } else {
            TrafficPolicy::Cluster
        }
    }

    fn service(&mut self, index: u16) -> Service {
        let families: &[Family] = match self.rng.random_range(0..6) {
            0 => &[Family::V6],
            1 => &[Family::V4, Family::V6],
            _ => &[Family::V4],
        };
        let kind = self.rng.random_range(0..4);
        let (has_node_port, is_balancer) = (kind >= 2, kind == 3);
        let mut service = Service {
            namespace: format!("ns{}", index % 7),
            name: format!("svc-{index}"),
            cluster_ips: families.iter().map(|f| cluster_ip(index, *f)).collect(),
            internal_policy: self.policy(6),
            affinity: self.once_in(8).then(|| self.rng.random_range(1..86_400)),
            ..Service::default()
        };
        if self.once_in(7) {
            let first = u16::from(self.rng.random::<u8>());
            service.external_ips = families.iter().map(|f| external_ip(first, *f)).collect();
        }
        if is_balancer {
            let count = self.rng.random_range(1..=2);
            let low = u16::from(self.rng.random::<u8>());
            service.load_balancer_ips = (0..count)
                .flat_map(|n| {
                    families
                        .iter()
                        .map(move |f| balancer_ip((low + n) % 256, *f))
                })
                .collect();
            if self.once_in(2) {
                service.source_ranges = self.source_ranges(families);
            }
        }
        if has_node_port || !service.external_ips.is_empty() {
            service.external_policy = self.policy(3);
        }
        if is_balancer && service.external_policy == TrafficPolicy::Local {
            service.health_check_node_port = Some(self.next_node_port());
        }
        let ports = self.rng.random_range(1..=3);
        service.ports = (0..ports)
            .map(|n| self.port(index, n, ports == 1, has_node_port, families))
            .collect();
        service
    }

    fn next_node_port(&mut self) -> u16 {
        self.node_port += 1;
        self.node_port
    }

    fn source_ranges(&mut self, families: &[Family]) -> Vec<Cidr> {
        let mut ranges = Vec::new();
        for family in families {
            for _ in 0..self.rng.random_range(1..=2) {
                let low = self.rng.random_range(0..4_u8);
                ranges.push(match family {
                    Family::V4 => Cidr::v4(198, 18, low, 0, 24),
                    Family::V6 => Cidr::v6([0x2001, 0xdb8, 0x18, u16::from(low)], [0; 4], 64),
                });
            }
        }
        // The node's own address in a range asks for rules of its own.
        if self.once_in(3) {
            ranges.push(Cidr::v4(192, 0, 2, 0, 24));
        }
        ranges.sort_unstable();
        ranges.dedup();
        ranges
    }

    fn port(
        &mut self,
        service: u16,
        number: u16,
        alone: bool,
        has_node_port: bool,
        families: &[Family],
    ) -> ServicePort {
        let protocol = match self.rng.random_range(0..8) {
            0 => Protocol::Sctp,
            1 | 2 => Protocol::Udp,
            _ => Protocol::Tcp,
        };
        let name = if alone && self.once_in(2) {
            String::new()
        } else {
            format!("p{number}")
        };
        let count = if self.once_in(8) {
            0
        } else {
            self.rng.random_range(1..=6_u16)
        };
        let hinted = self.once_in(6);
        let target = 8000 + number;
        let endpoints = (0..count)
            .flat_map(|_| self.endpoint(service, target, hinted, families))
            .collect();
        ServicePort {
            name,
            protocol,
            port: 80 + number,
            node_port: has_node_port.then(|| self.next_node_port()),
            endpoints,
        }
    }

    /// One pod, with an address in each family.
    fn endpoint(
        &mut self,
        service: u16,
        port: u16,
        hinted: bool,
        families: &[Family],
    ) -> Vec<Endpoint> {
        let node = self.rng.random_range(0..NODES);
        let condition = match self.rng.random_range(0..10) {
            0 => Condition::Draining,
            1 => Condition::NotReady,
            _ => Condition::Ready,
        };
        // Pods are shared by Services: few addresses, many users.
        let low = self.rng.random_range(2..=200_u8);
        let zones = if hinted {
            vec![zone(self.rng.random_range(0..NODES))]
        } else {
            Vec::new()
        };
        let nodes = if hinted && service.is_multiple_of(2) {
            vec![format!("worker-{node}")]
        } else {
            Vec::new()
        };
        families
            .iter()
            .map(|family| Endpoint {
                address: pod(node, low, *family),
                port,
                node: format!("worker-{node}"),
                condition,
                zones: zones.clone(),
                nodes: nodes.clone(),
            })
            .collect()
    }
}

fn cluster_ip(index: u16, family: Family) -> IpAddr {
    let [high, low] = (index + 10).to_be_bytes();
    match family {
        Family::V4 => IpAddr::from([10, 96, high, low]),
        Family::V6 => IpAddr::from([0xfd00, 0x10, 0x96, 0, 0, 0, 0, index + 10]),
    }
}

fn external_ip(low: u16, family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([198, 51, 100, low.to_be_bytes()[1]]),
        Family::V6 => Ipv6Addr::from([0x2001, 0xdb8, 0x51, 0, 0, 0, 0, low]).into(),
    }
}

fn balancer_ip(low: u16, family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([203, 0, 113, low.to_be_bytes()[1]]),
        Family::V6 => Ipv6Addr::from([0x2001, 0xdb8, 0x113, 0, 0, 0, 0, low]).into(),
    }
}

/// The address of a pod on a node.
pub fn pod(node: u16, low: u8, family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([10, 244, node.to_be_bytes()[1], low]),
        Family::V6 => IpAddr::from([0xfd00, 0x10, 0x244, node, 0, 0, 0, u16::from(low)]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_occurs_and_a_seed_is_a_cluster() {
        let made = cluster(1, 300);
        assert_eq!(made, cluster(1, 300));
        assert_ne!(made, cluster(2, 300));
        let any = |test: &dyn Fn(&Service) -> bool| made.services.iter().any(test);
        assert!(any(&|s| s.internal_policy == TrafficPolicy::Local));
        assert!(any(&|s| s.external_policy == TrafficPolicy::Local));
        assert!(any(&|s| s.affinity.is_some()));
        assert!(any(&|s| !s.source_ranges.is_empty()));
        assert!(any(&|s| s.load_balancer_ips.len() > 2));
        assert!(any(&|s| s.health_check_node_port.is_some()));
        assert!(any(&|s| s.ports.iter().any(|p| p.endpoints.is_empty())));
        assert!(any(&|s| s.ports.iter().any(|p| p.name.is_empty())));
        assert!(any(&|s| s
            .ports
            .iter()
            .any(|p| p.protocol == Protocol::Sctp)));
        let endpoints = || {
            made.services
                .iter()
                .flat_map(|s| &s.ports)
                .flat_map(|p| &p.endpoints)
        };
        assert!(endpoints().any(|e| e.condition == Condition::Draining));
        assert!(endpoints().any(|e| !e.zones.is_empty() && !e.nodes.is_empty()));
    }
}
