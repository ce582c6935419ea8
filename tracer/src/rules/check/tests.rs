//! Services that claim the same: kube-proxy gives it to any of them.

use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::cluster::{Cidr, Endpoint, Protocol, Service, ServicePort, TrafficPolicy};
use crate::rules::arbitrary;

const NODE: &str = "here";
const VIPS: [IpAddr; 2] = [
    IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2)),
];
/// What the elements of the first of [`VIPS`] begin with.
const VIP: &str = "192.0.2.1 . tcp . 80";

fn node() -> NodeView {
    NodeView {
        name: NODE.to_owned(),
        addresses: vec![[172, 31, 0, 1].into()],
        cluster_cidrs: vec![Cidr::v4(10, 244, 0, 0, 16)],
        service_cidrs: vec![Cidr::v4(10, 96, 0, 0, 12)],
        ..NodeView::default()
    }
}

/// The Service `ns/a`, `ns/b`, … that claims both of [`VIPS`], with an endpoint on a node.
fn service(name: char, endpoint_on: Option<&str>) -> Service {
    let last = u8::try_from(name).expect("a letter");
    let endpoint = |node| Endpoint::ready([10, 244, 0, last].into(), 8080, node);
    Service {
        namespace: "ns".to_owned(),
        name: name.to_string(),
        cluster_ips: vec![[10, 96, 0, last].into()],
        external_ips: VIPS.to_vec(),
        ports: vec![ServicePort {
            name: "http".to_owned(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
            endpoints: endpoint_on.map(endpoint).into_iter().collect(),
        }],
        ..Service::default()
    }
}

/// Of a load balancer with one of [`VIPS`], for some sources only.
fn balanced(name: char) -> Service {
    Service {
        external_ips: Vec::new(),
        load_balancer_ips: vec![VIPS[0]],
        source_ranges: vec![Cidr::v4(
            10,
            0,
            0,
            u8::try_from(name).expect("a letter"),
            32,
        )],
        ..service(name, Some(NODE))
    }
}

/// Drops flows from outside if its endpoint is not here.
fn local(service: Service) -> Service {
    Service {
        external_policy: TrafficPolicy::Local,
        ..service
    }
}

fn cluster(services: &[&Service]) -> Cluster {
    Cluster {
        services: services.iter().copied().cloned().collect(),
        ..Cluster::default()
    }
}

/// What a node holds after a sync that came to the Services in this order.
fn dump(services: &[&Service], mode: Mode) -> Texts {
    Texts::rendered(&render(&cluster(services), &node(), mode))
}

fn differences(services: &[&Service], mode: Mode, texts: &Texts) -> Vec<Finding> {
    besides_spelling(&cluster(services), &node(), mode, texts)
}

/// What differs but for the spelling: rules for `iptables-restore` are written otherwise than
/// `iptables-save` prints them, and declare no built-in chains.
fn besides_spelling(cluster: &Cluster, node: &NodeView, mode: Mode, texts: &Texts) -> Vec<Finding> {
    let report = check(cluster, node, mode, texts).expect("dumps that can be read");
    let mut differences = report.differences;
    differences.retain(|difference| {
        let declares = difference.kind == Kind::Missing && difference.rule.starts_with(':');
        let otherwise = difference.found.as_deref() == Some("the same rule, written otherwise");
        !declares && !otherwise
    });
    differences
}

/// The nftables dump after a sync in this order, with something replaced.
fn altered(services: &[&Service], from: &str, to: &str) -> Texts {
    let mut texts = dump(services, Mode::Nftables);
    let source = texts.v4.nft.as_mut().expect("a dump");
    assert!(source.text.contains(from), "{from:?} in {}", source.text);
    source.text = source.text.replace(from, to);
    texts
}

/// The only difference between a cluster of these Services, in either order, and a dump.
fn one(services: [&Service; 2], texts: &Texts) -> Finding {
    let [a, b] = services;
    let mut found = differences(&[a, b], Mode::Nftables, texts);
    assert_eq!(found.len(), 1, "{found:#?}");
    let other = differences(&[b, a], Mode::Nftables, texts);
    assert_eq!(other.len(), 1, "{other:#?}");
    found.remove(0)
}

/// Both orders are as good, in every mode.
fn assert_any_order(a: &Service, b: &Service) {
    for mode in Mode::ALL {
        for order in [[a, b], [b, a]] {
            let texts = dump(&order, mode);
            assert_eq!(differences(&[a, b], mode, &texts), [], "{mode}");
        }
    }
}

#[test]
fn an_address_of_two_services_is_either_ones() {
    let here = || Some(NODE);
    assert_any_order(&service('a', here()), &service('b', here()));
    // One that is refused, and one that is dropped unless it comes from here.
    assert_any_order(&service('a', here()), &service('b', None));
    let elsewhere = local(service('b', Some("there")));
    assert_any_order(&service('a', here()), &elsewhere);
    assert_any_order(&service('a', None), &elsewhere);
    assert_any_order(&service('a', None), &service('b', None));
    assert_any_order(&local(service('a', Some("there"))), &elsewhere);
    assert_any_order(&balanced('a'), &balanced('b'));
    assert_any_order(&balanced('a'), &service('b', here()));
    assert_any_order(&balanced('a'), &elsewhere);
    // One that has it as its ClusterIP.
    let mut owner = service('b', None);
    owner.cluster_ips = vec![VIPS[0]];
    owner.external_ips.clear();
    assert_any_order(&service('a', here()), &owner);
}

#[test]
fn a_node_port_of_two_services_is_either_ones() {
    let with_port = |mut service: Service| {
        service.external_ips.clear();
        service.ports[0].node_port = Some(30_080);
        service
    };
    let a = with_port(service('a', Some(NODE)));
    let others = [
        service('b', Some(NODE)),
        service('b', None),
        local(service('b', Some("there"))),
    ];
    for b in others.map(with_port) {
        assert_any_order(&a, &b);
    }
    let b = with_port(service('b', Some(NODE)));
    let gone = altered(
        &[&a, &b],
        "\ttcp . 30080 : goto external-",
        "\ttcp . 30081 : goto external-",
    );
    let found = differences(&[&a, &b], Mode::Nftables, &gone);
    let kinds: Vec<Kind> = found.iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, [Kind::Missing, Kind::Stale]);
}

/// The line of the element of [`VIP`] in the map of Services.
fn element(services: &[&Service]) -> String {
    let texts = dump(services, Mode::Nftables);
    let text = texts.v4.nft.expect("a dump").text;
    let begin = format!("\t{VIP} : goto external-");
    let line = text.lines().find(|line| line.starts_with(&begin));
    line.expect("an element").to_owned()
}

#[test]
fn an_address_of_two_services_is_no_thirds() {
    let (a, b) = (service('a', Some(NODE)), service('b', Some(NODE)));
    let line = element(&[&a, &b]);
    let (_, chain) = line.split_once("goto ").expect("a verdict");
    let third = line.replace(chain, "external-AAAAAAAA-ns/c/tcp/http,");
    let finding = one([&a, &b], &altered(&[&a, &b], &line, &third));
    assert_eq!(finding.kind, Kind::Altered);
    assert_eq!(
        finding.effect,
        "new flows to 192.0.2.1:80/tcp go to external-AAAAAAAA-ns/c/tcp/http, which is not there"
    );
    // A chain of one of them that is not the one for this address.
    let internal = line.replace("external-", "service-");
    let finding = one([&a, &b], &altered(&[&a, &b], &line, &internal));
    assert_eq!(finding.kind, Kind::Altered);
    let gone = one([&a, &b], &altered(&[&a, &b], &line, ""));
    assert_eq!(gone.kind, Kind::Missing);
    assert_eq!(gone.place, "ip kube-proxy service-ips");
}

#[test]
fn an_address_without_a_claimants_element_is_found() {
    // Flows go to a, and the element that refuses them for b is there too.
    let (a, b) = (service('a', Some(NODE)), service('b', None));
    let line = format!("\t{VIP} comment \"ns/b:http\" : goto reject-chain,");
    let gone = one([&a, &b], &altered(&[&a, &b], &line, ""));
    assert_eq!(gone.kind, Kind::Missing);
    assert_eq!(gone.place, "ip kube-proxy no-endpoint-services");
    let dropped = line.replace("goto reject-chain", "drop");
    let finding = one([&a, &b], &altered(&[&a, &b], &line, &dropped));
    assert_eq!(finding.kind, Kind::Altered);
    // An element whose verdict stays keeps the comment of the first Service, while the later one
    // gets the address.
    let elsewhere = |name| local(service(name, Some("there")));
    let (a, b) = (elsewhere('a'), elsewhere('b'));
    let texts = altered(
        &[&a, &b],
        &format!("\t{VIP} comment \"ns/b:http\" : drop,"),
        &format!("\t{VIP} comment \"ns/a:http\" : drop,"),
    );
    assert_eq!(differences(&[&a, &b], Mode::Nftables, &texts), []);
    // With two that refuse, either name may stand there, but no third one's.
    let (a, b) = (service('a', None), service('b', None));
    for name in ["a", "b", "c"] {
        let named = line.replace("ns/b", &format!("ns/{name}"));
        let texts = altered(&[&a, &b], &line, &named);
        let found = differences(&[&a, &b], Mode::Nftables, &texts);
        assert_eq!(found.is_empty(), name != "c", "{found:#?}");
    }
}

#[test]
fn one_order_explains_all_elements() {
    // One of the addresses is a's, the other one b's.
    let (a, b) = (service('a', Some(NODE)), service('b', Some(NODE)));
    let finding = one(
        [&a, &b],
        &altered(&[&a, &b], &element(&[&a, &b]), &element(&[&b, &a])),
    );
    assert_eq!(finding.kind, Kind::Altered);
    assert!(finding.effect.contains("precedence"), "{finding:#?}");
    // The endpoints are a's, the source ranges b's.
    let (a, b) = (balanced('a'), balanced('b'));
    let texts = altered(&[&a, &b], &element(&[&a, &b]), &element(&[&b, &a]));
    let finding = one([&a, &b], &texts);
    assert_eq!(finding.place, "ip kube-proxy firewall-ips");
    assert_eq!(finding.service.as_deref(), Some("ns/a:http"));
    let found = finding.found.expect("an element");
    assert!(found.contains("ns/b/tcp/http"), "{found}");
    // Of three, where the order of two says nothing of the third.
    let c = service('c', Some(NODE));
    let order = [&b, &a, &c];
    let texts = dump(&order, Mode::Nftables);
    assert_eq!(differences(&[&c, &b, &a], Mode::Nftables, &texts), []);
}

#[test]
fn other_families_and_addresses_are_exact() {
    // A conflict elsewhere excuses nothing here.
    let (a, b) = (service('a', Some(NODE)), service('b', Some(NODE)));
    let chain = "goto service-";
    let line = |services: &[&Service]| {
        let texts = dump(services, Mode::Nftables);
        let text = texts.v4.nft.expect("a dump").text;
        let mut lines = text
            .lines()
            .filter(|line| line.contains(" : goto service-"));
        lines.next().expect("an element").to_owned()
    };
    let (of_a, of_b) = (line(&[&a, &b]), line(&[&b, &a]));
    let verdict = |line: &str| line.split_once(chain).expect("a verdict").1.to_owned();
    let swapped = of_a.replace(&verdict(&of_a), &verdict(&of_b));
    let finding = one([&a, &b], &altered(&[&a, &b], &of_a, &swapped));
    assert_eq!(finding.kind, Kind::Altered);
    assert_eq!(finding.service.as_deref(), Some("ns/a:http"));
}

/// The cluster with its Services in another order.
fn any_order() -> impl Strategy<Value = (Cluster, Cluster)> {
    (arbitrary::cluster(), 0_usize..6, any::<bool>()).prop_map(|(cluster, turn, reverse)| {
        let mut other = cluster.clone();
        let turn = turn.min(other.services.len());
        other.services.rotate_left(turn);
        if reverse {
            other.services.reverse();
        }
        (cluster, other)
    })
}

fn any_node() -> impl Strategy<Value = NodeView> {
    arbitrary::node().prop_map(|mut node| {
        let cidr = Cidr::v6([0xfd00, 0x10, 0x96, 0], [0; 4], 108);
        node.service_cidrs.push(cidr);
        node
    })
}

/// Ports and NodePorts are different within a Service, as the API server wants them.
fn with_own_ports(mut cluster: Cluster) -> Cluster {
    for service in &mut cluster.services {
        for (port, more) in service.ports.iter_mut().zip((0..).step_by(10)) {
            port.port += more;
            port.node_port = port.node_port.map(|node_port| node_port + more);
        }
    }
    cluster
}

proptest! {
    #[test]
    fn no_order_is_a_difference((cluster, other) in any_order(), node in any_node()) {
        let (cluster, other) = (with_own_ports(cluster), with_own_ports(other));
        for mode in Mode::ALL {
            let texts = Texts::rendered(&render(&other, &node, mode));
            let found = besides_spelling(&cluster, &node, mode, &texts);
            prop_assert_eq!(found, [], "{}", mode);
        }
    }

    #[test]
    fn no_order_of_ports_is_a_difference_in_nftables(
        (cluster, mut other) in any_order(),
        node in any_node(),
    ) {
        for service in &mut other.services {
            service.ports.reverse();
        }
        let texts = Texts::rendered(&render(&other, &node, Mode::Nftables));
        let found = besides_spelling(&cluster, &node, Mode::Nftables, &texts);
        prop_assert_eq!(found, []);
    }
}

fn one_service(ips: &[&str]) -> Cluster {
    let port = ServicePort {
        name: "http".to_owned(),
        protocol: Protocol::Tcp,
        port: 80,
        node_port: None,
        endpoints: Vec::new(),
    };
    Cluster {
        services: vec![Service {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            cluster_ips: ips
                .iter()
                .map(|ip| ip.parse().expect("an address"))
                .collect(),
            ports: vec![port],
            ..Service::default()
        }],
        ..Cluster::default()
    }
}

#[test]
fn a_machine_without_ipv6_is_checked_for_ipv4_alone() {
    let node = NodeView {
        service_cidrs: ["10.96.0.0/16", "fd00::/112"]
            .map(|cidr| cidr.parse().expect("a network"))
            .to_vec(),
        ..NodeView::default()
    };
    let mode = Mode::Nftables;
    let cluster4 = one_service(&["10.96.0.1"]);
    let mut texts = Texts::rendered(&render(&cluster4, &node, mode));
    let report = check(&cluster4, &node, mode, &texts).expect("a dump");
    assert_eq!(report.families, Family::ALL);
    texts.v6.nft = None;
    let report = check(&cluster4, &node, mode, &texts).expect("a dump");
    assert_eq!(
        (report.families, report.differences),
        (vec![Family::V4], vec![])
    );
    // Where a Service wants it, rules of IPv6 have to be there.
    let both = one_service(&["10.96.0.1", "fd00::1"]);
    let error = check(&both, &node, mode, &texts).expect_err("no dump");
    assert!(error.to_string().contains("nft-ip6.txt"), "{error}");
}
