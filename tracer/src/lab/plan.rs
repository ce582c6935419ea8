//! The laboratory's address plan and its clusters: constants and pure functions.
//!
//! ```text
//!  pod-client ──┐                 ┌── external     192.0.2.2, 192.0.2.128/25
//!  pod-0 ───────┤                 │ ext0           2001:db8:0:1::2, 2001:db8:0:1:8000::/65
//!  pod-1 ───────┼──── node ───────┤
//!  pod-2 ───────┤   (under test)  │ node2
//!  pod-3 ───────┘   192.0.2.1     └── node2        203.0.113.2, pods 10.244.128.0/17
//!                   203.0.113.1
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::cluster::{Cidr, Cluster, Endpoint, Family, Protocol, Service, ServicePort};

/// The node under test, as its Kubernetes name.
pub const NODE: &str = "node";
/// The other node.
pub const NODE2: &str = "node2";
/// Number of server pods on the node.
pub const SERVER_PODS: u32 = 4;

/// Every pod of the cluster.
pub const CLUSTER_CIDR: Cidr = Cidr::v4(10, 244, 0, 0, 16);
/// Every pod of the node.
pub const NODE_POD_CIDR: Cidr = Cidr::v4(10, 244, 0, 0, 17);
/// Every pod of node2.
pub const NODE2_POD_CIDR: Cidr = Cidr::v4(10, 244, 128, 0, 17);
/// node2's endpoints.
pub const NODE2_SERVERS: Cidr = Cidr::v4(10, 244, 128, 0, 18);
/// The client pod's range: it answers on, and sends from, every address of it.
pub const CLIENT_POD: Cidr = Cidr::v4(10, 244, 64, 0, 20);
/// Every ClusterIP.
pub const SERVICE_CIDR: Cidr = Cidr::v4(10, 96, 0, 0, 12);
/// The node's address, the one that NodePorts are reached by.
pub const NODE_ADDRESS: Cidr = Cidr::v4(192, 0, 2, 1, 24);
/// The external client's first address.
pub const EXTERNAL_ADDRESS: Cidr = Cidr::v4(192, 0, 2, 2, 24);
/// Further addresses of the external client (the node reaches them by way of the first).
pub const EXTERNAL_MORE: Cidr = Cidr::v4(192, 0, 2, 128, 25);
/// The node's address on the link to node2.
pub const LINK_ADDRESS: Cidr = Cidr::v4(203, 0, 113, 1, 24);
/// node2's address on that link.
pub const NODE2_ADDRESS: Cidr = Cidr::v4(203, 0, 113, 2, 24);
/// The next hop of a pod; it exists only as a permanent neighbour entry.
pub const POD_GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));

/// IPv6: every pod of the cluster.
pub const CLUSTER_CIDR6: Cidr = Cidr::v6([0xfd00, 0x10, 0x244, 0], [0, 0, 0, 0], 56);
/// IPv6: every pod of the node.
pub const NODE_POD_CIDR6: Cidr = Cidr::v6([0xfd00, 0x10, 0x244, 0], [0, 0, 0, 0], 57);
/// IPv6: every pod of node2.
pub const NODE2_POD_CIDR6: Cidr = Cidr::v6([0xfd00, 0x10, 0x244, 0x80], [0, 0, 0, 0], 57);
/// IPv6: node2's endpoints.
pub const NODE2_SERVERS6: Cidr = Cidr::v6([0xfd00, 0x10, 0x244, 0x80], [0, 0, 0, 0], 58);
/// IPv6: the client pod's range.
pub const CLIENT_POD6: Cidr = Cidr::v6([0xfd00, 0x10, 0x244, 0x40], [0, 0, 0, 0], 60);
/// IPv6: every ClusterIP.
pub const SERVICE_CIDR6: Cidr = Cidr::v6([0xfd00, 0x10, 0x96, 0], [0, 0, 0, 0], 108);
/// IPv6: the node's address.
pub const NODE_ADDRESS6: Cidr = Cidr::v6([0x2001, 0xdb8, 0, 1], [0, 0, 0, 1], 64);
/// IPv6: the external client's first address.
pub const EXTERNAL_ADDRESS6: Cidr = Cidr::v6([0x2001, 0xdb8, 0, 1], [0, 0, 0, 2], 64);
/// IPv6: further addresses of the external client.
pub const EXTERNAL_MORE6: Cidr = Cidr::v6([0x2001, 0xdb8, 0, 1], [0x8000, 0, 0, 0], 65);
/// IPv6: the node's address on the link to node2.
pub const LINK_ADDRESS6: Cidr = Cidr::v6([0x2001, 0xdb8, 0, 2], [0, 0, 0, 1], 64);
/// IPv6: node2's address on that link.
pub const NODE2_ADDRESS6: Cidr = Cidr::v6([0x2001, 0xdb8, 0, 2], [0, 0, 0, 2], 64);
/// IPv6: the next hop of a pod.
pub const POD_GATEWAY6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));

/// The port of every ClusterIP.
pub const SERVICE_PORT: u16 = 80;
/// The lowest port that a pod listens on.
pub const FIRST_TARGET_PORT: u16 = 8080;
/// A pod listens on at most this many ports.
pub const TARGET_PORTS: u16 = 16;
/// The lowest NodePort.
pub const FIRST_NODE_PORT: u16 = 30_000;
/// The highest NodePort.
pub const LAST_NODE_PORT: u16 = 32_767;
/// ClusterIPs start this far above the lowest address of the Service CIDR.
pub const FIRST_CLUSTER_IP: u32 = 10;
/// A cluster has at most this many Services.
pub const MAX_SERVICES: u32 = 30_000;
/// Source ports of the traffic: above every NodePort, inside Linux's ephemeral range.
pub const SOURCE_PORTS: std::ops::RangeInclusive<u16> = 33_000..=60_999;

/// Offset 0 of a range is no host address and 1 is the pod's own; endpoints start behind them.
const FIRST_SERVER_OFFSET: u32 = 2;
/// Endpoint addresses of one server pod: a /20 without its first two and its last address.
const SERVER_POD_ADDRESSES: u32 = 4096 - 3;
/// Endpoint addresses of node2: a /18 without its first two and its last address.
const NODE2_ADDRESSES: u32 = 16_384 - 3;
/// One endpoint in this many lives on node2.
const NODE2_SHARE: u32 = 3;

/// The range that server pod `pod` (below [`SERVER_PODS`]) owns.
pub fn server_pod(pod: u32, family: Family) -> Cidr {
    match family {
        Family::V4 => Cidr {
            base: CLUSTER_CIDR.nth(pod << 12),
            prefix: 20,
        },
        Family::V6 => {
            let IpAddr::V6(base) = CLUSTER_CIDR6.base else {
                unreachable!("the IPv6 plan holds IPv6 addresses")
            };
            Cidr {
                base: Ipv6Addr::from_bits(base.to_bits() | u128::from(pod) << 68).into(),
                prefix: 60,
            }
        }
    }
}

/// The node's address that NodePorts are reached by.
pub const fn node_address(family: Family) -> IpAddr {
    match family {
        Family::V4 => NODE_ADDRESS.base,
        Family::V6 => NODE_ADDRESS6.base,
    }
}

/// The ClusterIP of Service number `index`.
pub fn cluster_ip(index: u32, family: Family) -> IpAddr {
    match family {
        Family::V4 => SERVICE_CIDR,
        Family::V6 => SERVICE_CIDR6,
    }
    .nth(FIRST_CLUSTER_IP + index)
}

/// The NodePort of Service number `index`: one TCP and one UDP Service share each number.
pub fn node_port(index: u32) -> Option<u16> {
    let port = u32::from(FIRST_NODE_PORT) + index / 2;
    u16::try_from(port)
        .ok()
        .filter(|port| *port <= LAST_NODE_PORT)
}

/// A cluster that the laboratory cannot hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// None at all, or more than the Service CIDR and the reports are made for.
    #[error("{0} Services: a laboratory cluster has 1 to {MAX_SERVICES}")]
    Services(u32),
    /// The pods' addresses and ports do not suffice.
    #[error(
        "{services} Services of {endpoints} endpoints need more addresses than the laboratory's pods have; \
         use fewer endpoints"
    )]
    Endpoints {
        /// Services asked for.
        services: u32,
        /// Endpoints of each.
        endpoints: u32,
    },
}

/// A cluster of `services` Services `lab/svc-00000`, ... with `endpoints` endpoints each.
///
/// Even ones are TCP, odd ones UDP. Of three endpoints, two live on the node and one on node2.
/// With `dual_stack`, every ClusterIP and endpoint exists in both families.
pub fn cluster(services: u32, endpoints: u32, dual_stack: bool) -> Result<Cluster, PlanError> {
    if services == 0 || services > MAX_SERVICES {
        return Err(PlanError::Services(services));
    }
    let too_many = || PlanError::Endpoints {
        services,
        endpoints,
    };
    services.checked_mul(endpoints).ok_or_else(too_many)?;
    let families: &[Family] = if dual_stack {
        &[Family::V4, Family::V6]
    } else {
        &[Family::V4]
    };
    let mut made = Vec::new();
    for index in 0..services {
        let mut port = ServicePort {
            name: "p".to_owned(),
            protocol: if index % 2 == 0 {
                Protocol::Tcp
            } else {
                Protocol::Udp
            },
            port: SERVICE_PORT,
            node_port: node_port(index),
            endpoints: Vec::new(),
        };
        for family in families {
            for e in 0..endpoints {
                let endpoint = endpoint(index * endpoints + e, *family).ok_or_else(too_many)?;
                port.endpoints.push(endpoint);
            }
        }
        made.push(Service {
            namespace: "lab".to_owned(),
            name: format!("svc-{index:05}"),
            cluster_ips: families.iter().map(|f| cluster_ip(index, *f)).collect(),
            ports: vec![port],
            ..Service::default()
        });
    }
    Ok(Cluster {
        services: made,
        ..Cluster::default()
    })
}

/// Endpoint number `k` of a cluster: every third on node2, the others on the server pods in turn;
/// a new address each as far as they go, then the next port.
fn endpoint(k: u32, family: Family) -> Option<Endpoint> {
    let (range, n, addresses, node) = if k % NODE2_SHARE == NODE2_SHARE - 1 {
        let range = match family {
            Family::V4 => NODE2_SERVERS,
            Family::V6 => NODE2_SERVERS6,
        };
        (range, k / NODE2_SHARE, NODE2_ADDRESSES, NODE2)
    } else {
        let local = k - k / NODE2_SHARE;
        let range = server_pod(local % SERVER_PODS, family);
        (range, local / SERVER_PODS, SERVER_POD_ADDRESSES, NODE)
    };
    let port = u16::try_from(n / addresses)
        .ok()
        .filter(|port| *port < TARGET_PORTS)?;
    Some(Endpoint::ready(
        range.nth(FIRST_SERVER_OFFSET + n % addresses),
        FIRST_TARGET_PORT + port,
        node,
    ))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Ports that are in use on the machine do not matter: every socket is in a namespace of ours.
    /// Within those a flow's source port must be no NodePort, or replies would be taken for requests.
    #[test]
    fn node_ports_and_source_ports_never_clash() {
        let node_ports = FIRST_NODE_PORT..=LAST_NODE_PORT;
        assert!(!SOURCE_PORTS.clone().any(|port| node_ports.contains(&port)));
        let largest = cluster(MAX_SERVICES, 1, false).expect("the largest cluster");
        let mut seen = std::collections::BTreeSet::new();
        for port in largest.services.iter().flat_map(|service| &service.ports) {
            if let Some(node_port) = port.node_port {
                assert!(node_ports.contains(&node_port), "{node_port}");
                assert!(
                    seen.insert((node_port, port.protocol.number())),
                    "{node_port} is given twice"
                );
            }
        }
        assert!(!seen.is_empty());
    }

    #[test]
    fn a_small_cluster_is_what_the_plan_says() {
        let cluster = cluster(3, 3, true).expect("a small cluster");
        let service = &cluster.services[0];
        assert_eq!(service.port_name(&service.ports[0]), "lab/svc-00000:p");
        assert_eq!(service.cluster_ips[0].to_string(), "10.96.0.10");
        assert_eq!(service.cluster_ips[1].to_string(), "fd00:10:96::a");
        assert_eq!(service.ports[0].protocol, Protocol::Tcp);
        assert_eq!(cluster.services[1].ports[0].protocol, Protocol::Udp);
        assert_eq!(service.ports[0].node_port, Some(30_000));
        assert_eq!(cluster.services[1].ports[0].node_port, Some(30_000));
        assert_eq!(cluster.services[2].ports[0].node_port, Some(30_001));
        let text: Vec<String> = service.ports[0]
            .endpoints
            .iter()
            .map(|e| format!("{} {} {}", e.address, e.port, e.node))
            .collect();
        assert_eq!(
            text,
            [
                "10.244.0.2 8080 node",
                "10.244.16.2 8080 node",
                "10.244.128.2 8080 node2",
                "fd00:10:244::2 8080 node",
                "fd00:10:244:10::2 8080 node",
                "fd00:10:244:80::2 8080 node2",
            ]
        );
    }

    #[test]
    fn the_largest_cluster_has_no_endpoint_twice_and_all_lie_in_their_ranges() {
        let cluster = cluster(MAX_SERVICES, 3, true).expect("the largest cluster");
        let mut seen = BTreeSet::new();
        let mut ips = BTreeSet::new();
        for service in &cluster.services {
            for ip in &service.cluster_ips {
                assert!(SERVICE_CIDR.contains(*ip) || SERVICE_CIDR6.contains(*ip));
                assert!(ips.insert(*ip));
            }
            for e in &service.ports[0].endpoints {
                assert!(seen.insert((e.address, e.port)), "{e:?} twice");
                let family = Family::of(e.address);
                let inside = if e.node == NODE2 {
                    NODE2_SERVERS.contains(e.address) || NODE2_SERVERS6.contains(e.address)
                } else {
                    (0..SERVER_PODS).any(|pod| server_pod(pod, family).contains(e.address))
                };
                assert!(inside, "{e:?}");
            }
        }
        assert_eq!(seen.len(), 2 * 3 * MAX_SERVICES as usize);
        assert_eq!(cluster.services[5535].ports[0].node_port, Some(32_767));
        assert_eq!(cluster.services[5536].ports[0].node_port, None);
    }

    #[test]
    fn ranges_nest_and_do_not_overlap() {
        for (cluster, node, node2, servers, client, family) in [
            (
                CLUSTER_CIDR,
                NODE_POD_CIDR,
                NODE2_POD_CIDR,
                NODE2_SERVERS,
                CLIENT_POD,
                Family::V4,
            ),
            (
                CLUSTER_CIDR6,
                NODE_POD_CIDR6,
                NODE2_POD_CIDR6,
                NODE2_SERVERS6,
                CLIENT_POD6,
                Family::V6,
            ),
        ] {
            for inner in [node, node2, servers, client] {
                assert!(cluster.contains(inner.base));
            }
            assert!(!node.contains(node2.base));
            assert!(node2.contains(servers.base));
            assert!(node.contains(client.base));
            for pod in 0..SERVER_PODS {
                let range = server_pod(pod, family);
                assert!(node.contains(range.base));
                assert!(!client.contains(range.base));
            }
        }
        assert_eq!(
            server_pod(3, Family::V4),
            Cidr {
                base: Ipv4Addr::new(10, 244, 48, 0).into(),
                prefix: 20
            }
        );
    }

    #[test]
    fn impossible_clusters_are_refused() {
        assert_eq!(cluster(0, 3, false), Err(PlanError::Services(0)));
        assert_eq!(cluster(30_001, 3, false), Err(PlanError::Services(30_001)));
        assert!(matches!(
            cluster(30_000, 1000, false),
            Err(PlanError::Endpoints { .. })
        ));
        assert!(matches!(
            cluster(30_000, u32::MAX, false),
            Err(PlanError::Endpoints { .. })
        ));
    }
}
