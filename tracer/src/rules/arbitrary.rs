//! Clusters and nodes for property tests: small, with every feature, and with conflicts.

use std::net::IpAddr;

use proptest::prelude::*;

use super::{NodePortAddresses, NodeView};
use crate::cluster::{
    Cidr, Cluster, Condition, Endpoint, Protocol, Service, ServicePort, TrafficPolicy,
};

/// The node on which about half of the endpoints run.
pub(crate) const NODE: &str = "worker-0";

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![
        3 => Just(Protocol::Tcp),
        1 => Just(Protocol::Udp),
        1 => Just(Protocol::Sctp),
    ]
}

fn policy() -> impl Strategy<Value = TrafficPolicy> {
    prop_oneof![Just(TrafficPolicy::Cluster), Just(TrafficPolicy::Local)]
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    let condition = prop_oneof![
        4 => Just(Condition::Ready),
        1 => Just(Condition::Draining),
        1 => Just(Condition::NotReady),
    ];
    let hints = |names: [&'static str; 2]| {
        proptest::collection::vec(prop::sample::select(names.to_vec()), 0..2)
            .prop_map(|names| names.into_iter().map(str::to_owned).collect::<Vec<_>>())
    };
    (
        (any::<bool>(), 1_u8..12, 8080_u16..8082),
        any::<bool>(),
        condition,
        hints(["z1", "z2"]),
        hints([NODE, "worker-1"]),
    )
        .prop_map(|((v6, last, port), local, condition, zones, nodes)| {
            let address = if v6 {
                IpAddr::from([0xfd00, 0x10, 0x244, 0, 0, 0, 0, u16::from(last)])
            } else {
                IpAddr::from([10, 244, 0, last])
            };
            let node = if local { NODE } else { "worker-1" };
            Endpoint {
                condition,
                zones,
                nodes,
                ..Endpoint::ready(address, port, node)
            }
        })
}

fn port(index: usize) -> impl Strategy<Value = ServicePort> {
    (
        protocol(),
        80_u16..83,
        prop::option::of(30_000_u16..30_006),
        proptest::collection::vec(endpoint().boxed(), 0..5),
    )
        .prop_map(move |(protocol, port, node_port, mut endpoints)| {
            endpoints.sort();
            endpoints.dedup_by_key(|endpoint| (endpoint.address, endpoint.port));
            ServicePort {
                // One unnamed port can be the only one.
                name: if index == 0 {
                    String::new()
                } else {
                    format!("p{index}")
                },
                protocol,
                port,
                node_port,
                endpoints,
            }
        })
}

/// External addresses come from so small a pool that Services quarrel over them.
fn external_ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (1_u8..5).prop_map(|last| IpAddr::from([192, 0, 2, last])),
        (1_u16..4).prop_map(|last| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last])),
    ]
}

fn ports() -> impl Strategy<Value = Vec<ServicePort>> {
    prop_oneof![
        port(0).prop_map(|port| vec![port]).boxed(),
        (port(1).boxed(), port(2).boxed())
            .prop_map(|(a, b)| vec![a, b])
            .boxed(),
    ]
}

fn service(index: u8) -> impl Strategy<Value = Service> {
    let ranges = prop::sample::subsequence(
        vec![
            Cidr::v4(10, 0, 0, 0, 8),
            Cidr::v4(172, 31, 0, 0, 16),
            Cidr::v6([0xfd00, 0, 0, 0], [0; 4], 16),
        ],
        0..=3,
    );
    (
        any::<[bool; 2]>(),
        proptest::collection::vec(external_ip(), 0..3),
        proptest::collection::vec(external_ip(), 0..3),
        ranges,
        policy(),
        policy(),
        prop::option::of(60_u32..62),
        any::<bool>(),
        ports().boxed(),
    )
        .prop_map(
            move |(
                families,
                mut external_ips,
                mut load_balancer_ips,
                source_ranges,
                internal_policy,
                external_policy,
                affinity,
                checked,
                ports,
            )| {
                let v4 = IpAddr::from([10, 96, 0, index]);
                let v6 = IpAddr::from([0xfd00, 0x10, 0x96, 0, 0, 0, 0, u16::from(index)]);
                let cluster_ips = match families {
                    [true, true] => vec![v4, v6],
                    [true, false] => vec![v4],
                    [false, _] => vec![v6],
                };
                for ips in [&mut external_ips, &mut load_balancer_ips] {
                    ips.sort_unstable();
                    ips.dedup();
                }
                Service {
                    namespace: "ns".to_owned(),
                    name: format!("svc{index}"),
                    cluster_ips,
                    external_ips,
                    load_balancer_ips,
                    source_ranges,
                    internal_policy,
                    external_policy,
                    affinity,
                    health_check_node_port: checked.then_some(32_000 + u16::from(index)),
                    ports,
                }
            },
        )
}

/// A cluster of up to six Services.
pub(crate) fn cluster() -> impl Strategy<Value = Cluster> {
    // Boxed, or else the values of all of them stand on the stack at once.
    let maybe = |index| prop::option::weighted(0.7, service(index)).boxed();
    (maybe(1), maybe(2), maybe(3), maybe(4), maybe(5), maybe(6)).prop_map(|(a, b, c, d, e, f)| {
        Cluster {
            services: [a, b, c, d, e, f].into_iter().flatten().collect(),
            ..Cluster::default()
        }
    })
}

/// Two states of a cluster: most Services are the same in both.
pub(crate) fn change() -> impl Strategy<Value = (Cluster, Cluster)> {
    (cluster().boxed(), cluster().boxed(), any::<[bool; 6]>()).prop_map(|(old, other, replaced)| {
        let mut new = old.clone();
        for service in other.services {
            let place = new.services.iter().position(|s| s.name == service.name);
            let index = service.name.bytes().last().map_or(0, |digit| digit - b'1');
            if !replaced[usize::from(index) % 6] {
                continue;
            }
            match place {
                // Sometimes only the endpoints change, sometimes all of it, or it goes.
                Some(place) if index % 3 == 0 => {
                    let ports = new.services[place].ports.iter_mut().zip(service.ports);
                    for (port, other) in ports {
                        port.endpoints = other.endpoints;
                    }
                }
                Some(place) if index % 3 == 1 => new.services[place] = service,
                Some(place) => {
                    new.services.remove(place);
                }
                None => new.services.push(service),
            }
        }
        (old, new)
    })
}

/// The node [`NODE`] with any flags.
pub(crate) fn node() -> impl Strategy<Value = NodeView> {
    let flag = prop_oneof![
        2 => Just(NodePortAddresses::Default),
        1 => Just(NodePortAddresses::Primary),
        1 => Just(NodePortAddresses::Within(vec![Cidr::v4(10, 0, 0, 0, 8)])),
        1 => Just(NodePortAddresses::Within(vec![Cidr::v4(127, 0, 0, 0, 8)])),
    ];
    (flag, any::<[bool; 6]>()).prop_map(|(node_port_addresses, flags)| {
        let [addresses, pods, all, localhost, nfacct, liberal] = flags;
        let some = |has: bool, texts: &[&str]| -> Vec<IpAddr> {
            let texts = texts.iter().filter(|_| has);
            texts.map(|text| text.parse().expect("address")).collect()
        };
        NodeView {
            name: NODE.to_owned(),
            zone: Some("z1".to_owned()),
            // 192.0.2.1 is an external IP too.
            addresses: some(
                addresses,
                &["172.31.0.1", "10.0.0.1", "192.0.2.1", "2001:db8::9"],
            ),
            cluster_cidrs: if pods {
                vec![
                    Cidr::v4(10, 244, 0, 0, 16),
                    Cidr::v6([0xfd00, 0x10, 0x244, 0], [0; 4], 56),
                ]
            } else {
                Vec::new()
            },
            service_cidrs: vec![Cidr::v4(10, 96, 0, 0, 12)],
            masquerade_all: all && !pods,
            localhost_node_ports: localhost,
            nfacct,
            tcp_be_liberal: liberal,
            node_port_addresses,
            ..NodeView::default()
        }
    })
}
