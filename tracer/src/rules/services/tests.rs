//! What is read back is what the real dumps were made of.

use proptest::prelude::*;

use super::*;
use crate::cluster::{Cidr, Cluster, Endpoint, Service, ServicePort};
use crate::rules::dump::FamilyTexts;
use crate::rules::dump::Source;
use crate::rules::{NodeView, RuleSet, Step, render};

macro_rules! dump {
    ($file:literal) => {
        Source {
            origin: $file.to_owned(),
            text: include_str!(concat!("../fixtures/kube-proxy-1.36.2/", $file)).to_owned(),
        }
    };
}

fn iptables_texts(v4: Source, v6: Source) -> Texts {
    let family = |source| FamilyTexts {
        iptables: vec![source],
        ..FamilyTexts::default()
    };
    Texts {
        v4: family(v4),
        v6: family(v6),
        ..Texts::default()
    }
}

fn nft_texts(v4: Source, v6: Source) -> Texts {
    let family = |source| FamilyTexts {
        nft: Some(source),
        ..FamilyTexts::default()
    };
    Texts {
        v4: family(v4),
        v6: family(v6),
        ..Texts::default()
    }
}

fn real_iptables() -> Found {
    let texts = iptables_texts(
        dump!("iptables-nft/iptables.save"),
        dump!("iptables-nft/ip6tables.save"),
    );
    read(&texts).expect("a real dump")
}

fn real_nftables() -> Found {
    let texts = nft_texts(dump!("nftables/nft-ip.txt"), dump!("nftables/nft-ip6.txt"));
    read(&texts).expect("a real dump")
}

#[test]
fn rules_name_the_pod_networks() {
    let cidr = |text| Cidr::parse_sloppy(text).expect("a network");
    let wanted = [cidr("10.244.0.0/16"), cidr("fd00:10:244::/56")];
    assert_eq!(real_iptables().pod_cidrs, wanted);
    assert_eq!(real_nftables().pod_cidrs, wanted);
}

fn one_text(text: &str) -> Found {
    let source = Source {
        origin: "iptables.save".to_owned(),
        text: text.to_owned(),
    };
    let texts = Texts {
        v4: FamilyTexts {
            iptables: vec![source],
            ..FamilyTexts::default()
        },
        ..Texts::default()
    };
    read(&texts).expect("readable")
}

#[track_caller]
fn service<'f>(found: &'f Found, name: &str) -> &'f FoundService {
    let named = |service: &&FoundService| service.name.as_deref() == Some(name);
    found.services.iter().find(named).expect("the Service")
}

fn sockets(sockets: &[&str]) -> Vec<SocketAddr> {
    let parse = |socket: &&str| socket.parse().expect("a socket");
    sockets.iter().map(parse).collect()
}

fn frontend(kind: FrontendKind, address: &str, port: u16) -> Frontend {
    Frontend {
        kind,
        address: address.parse().ok(),
        port,
        refusal: None,
    }
}

#[test]
fn iptables_names_every_service() {
    let found = real_iptables();
    assert_eq!(found.modes, ["iptables-nft"]);
    let names: Vec<&str> = found
        .services
        .iter()
        .filter_map(|service| service.name.as_deref())
        .collect();
    assert_eq!(
        names,
        [
            "default/kubernetes:https",
            "edge/ext:http",
            "edge/gateway-local:http",
            "edge/gateway:http",
            "edge/sig:s",
            "edge/unnamed",
            "kube-system/kube-dns:dns",
            "kube-system/kube-dns:dns-tcp",
            "shop/cart:grpc",
            "shop/draining:http",
            "shop/empty:http",
            "shop/node-only:http",
            "shop/web-local:http",
            "shop/web-np:http",
            "shop/web-np:https",
            "shop/web:http",
            "edge/six:http",
        ]
    );
    assert_eq!(found.foreign, []);

    let gateway = service(&found, "edge/gateway-local:http");
    assert_eq!(
        gateway.frontends,
        [
            frontend(FrontendKind::ClusterIp, "10.96.20.2", 80),
            frontend(FrontendKind::LoadBalancer, "198.51.100.11", 80),
            frontend(FrontendKind::NodePort, "", 30091),
        ]
    );
    assert_eq!(
        gateway.endpoints,
        sockets(&["10.244.0.51:8080", "10.244.1.52:8080"])
    );
    assert_eq!(gateway.local_endpoints, sockets(&["10.244.0.51:8080"]));
    assert_eq!(gateway.internal_policy, Some(TrafficPolicy::Cluster));
    assert_eq!(gateway.external_policy, Some(TrafficPolicy::Local));
    assert_eq!(gateway.health_check_node_port, Some(30191));

    let gateway = service(&found, "edge/gateway:http");
    assert_eq!(gateway.source_ranges, ["203.0.113.0/25"]);
    assert_eq!(gateway.external_policy, Some(TrafficPolicy::Cluster));
    assert_eq!(service(&found, "shop/cart:grpc").affinity, Some(10800));

    let empty = service(&found, "shop/empty:http");
    let refusals = |service: &FoundService| -> Vec<_> {
        let frontends = service.frontends.iter();
        frontends.map(|frontend| frontend.refusal).collect()
    };
    assert_eq!(refusals(empty), [Some(Refusal::Reject); 2]);
    let node_only = service(&found, "shop/node-only:http");
    assert_eq!(refusals(node_only), [Some(Refusal::Drop)]);
    assert_eq!(node_only.internal_policy, Some(TrafficPolicy::Local));
}

#[test]
fn legacy_says_the_same_as_nft() {
    let texts = iptables_texts(
        dump!("iptables-legacy/iptables.save"),
        dump!("iptables-legacy/ip6tables.save"),
    );
    let mut legacy = read(&texts).expect("a real dump");
    assert_eq!(legacy.modes, ["iptables-legacy"]);
    for service in &mut legacy.services {
        service.mode = Mode::IptablesNft.name();
    }
    assert_eq!(legacy.services, real_iptables().services);
}

/// What iptables mode tells and nftables mode does not.
fn as_nftables(service: &FoundService) -> FoundService {
    let mut service = service.clone();
    service.mode = Mode::Nftables.name();
    service.health_check_node_port = None;
    for frontend in &mut service.frontends {
        let external = frontend.kind == FrontendKind::ExternalIp
            || frontend.kind == FrontendKind::LoadBalancer && service.source_ranges.is_empty();
        if external {
            frontend.kind = FrontendKind::External;
        }
    }
    service.frontends.sort_unstable();
    service
}

#[test]
fn nftables_says_the_same_as_iptables() {
    let nftables = real_nftables();
    assert_eq!(nftables.modes, ["nftables"]);
    let iptables: Vec<_> = real_iptables().services.iter().map(as_nftables).collect();
    assert_eq!(without_maps(nftables.services), iptables);
    let json = dump!("nftables/nft-ip.json");
    let texts = Texts {
        v4: FamilyTexts {
            nft_json: Some(json),
            ..FamilyTexts::default()
        },
        ..Texts::default()
    };
    let json = read(&texts).expect("a real dump");
    assert_eq!(without_maps(json.services), iptables[..iptables.len() - 1]);
}

/// Which map has what, no other mode can say.
fn without_maps(mut services: Vec<FoundService>) -> Vec<FoundService> {
    for service in &mut services {
        for at in std::mem::take(&mut service.served) {
            let mut frontends = service.frontends.iter();
            assert!(frontends.any(|one| (one.address, one.port) == at), "{at:?}");
        }
    }
    services
}

#[test]
fn ipvs_says_what_it_can() {
    let mut texts = iptables_texts(dump!("ipvs/iptables.save"), dump!("ipvs/ip6tables.save"));
    texts.servers = Some(dump!("ipvs/ipvsadm.save"));
    texts.sets = Some(dump!("ipvs/ipset.save"));
    let found = read(&texts).expect("a real dump");
    assert_eq!(found.modes, ["ipvs"]);
    assert_eq!(found.health_check_node_ports, [30191]);
    assert_eq!(found.foreign, []);
    let with = |kind| {
        let frontends = found.services.iter().flat_map(|service| &service.frontends);
        let of_kind = frontends.filter(|frontend| frontend.kind == kind);
        of_kind
            .map(|frontend| match frontend.address {
                Some(address) => SocketAddr::new(address, frontend.port).to_string(),
                None => frontend.port.to_string(),
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(
        with(FrontendKind::NodePort),
        ["30080", "30081", "30082", "30090", "30091", "30443"]
    );
    assert_eq!(with(FrontendKind::ExternalIp), ["192.0.2.9:6666"]);
    assert_eq!(
        with(FrontendKind::LoadBalancer),
        ["198.51.100.10:80", "198.51.100.11:80"]
    );
    assert_eq!(with(FrontendKind::ClusterIp).len(), 17);
    assert_eq!(with(FrontendKind::External), [""; 0]);
    let at = |port: u16| {
        let has = |service: &&FoundService| {
            let mut frontends = service.frontends.iter();
            frontends.any(|frontend| frontend.port == port)
        };
        found.services.iter().find(has).expect("a frontend")
    };
    assert_eq!(at(30091).external_policy, Some(TrafficPolicy::Local));
    assert_eq!(at(30091).endpoints, sockets(&["10.244.0.51:8080"]));
    assert_eq!(at(30080).external_policy, Some(TrafficPolicy::Cluster));
    assert_eq!(at(30082).frontends[0].refusal, Some(Refusal::Reject));
    assert_eq!(at(9000).affinity, Some(10800));
}

/// The forms of Kubernetes 1.23 and before.
#[test]
fn load_balancer_chains_of_old_versions_are_read() {
    let found = one_text(
        "*filter\n\
         :KUBE-SERVICES - [0:0]\n\
         :KUBE-EXTERNAL-SERVICES - [0:0]\n\
         COMMIT\n\
         *nat\n\
         :KUBE-MARK-MASQ - [0:0]\n\
         :KUBE-MARK-DROP - [0:0]\n\
         :KUBE-NODEPORTS - [0:0]\n\
         -A KUBE-FW-AAAAAAAAAAAAAAAA -m comment --comment \"ns/lb:http loadbalancer IP\" -s 192.0.2.0/24 -j KUBE-XLB-AAAAAAAAAAAAAAAA\n\
         -A KUBE-FW-AAAAAAAAAAAAAAAA -m comment --comment \"ns/lb:http loadbalancer IP\" -j KUBE-MARK-DROP\n\
         -A KUBE-NODEPORTS -p tcp -m comment --comment \"ns/lb:http\" -m tcp --dport 30001 -j KUBE-XLB-AAAAAAAAAAAAAAAA\n\
         -A KUBE-NODEPORTS -p tcp -m comment --comment \"ns/np:http\" -m tcp --dport 30002 -j KUBE-MARK-MASQ\n\
         -A KUBE-NODEPORTS -p tcp -m comment --comment \"ns/np:http\" -m tcp --dport 30002 -j KUBE-SVC-BBBBBBBBBBBBBBBB\n\
         -A KUBE-SEP-1AAAAAAAAAAAAAAA -p tcp -m comment --comment \"ns/lb:http\" -m tcp -j DNAT --to-destination 10.0.0.1:80\n\
         -A KUBE-SEP-2AAAAAAAAAAAAAAA -p tcp -m comment --comment \"ns/lb:http\" -m tcp -j DNAT --to-destination 10.0.0.2:80\n\
         -A KUBE-SERVICES ! -s 10.244.0.0/16 -d 10.96.0.5/32 -p tcp -m comment --comment \"ns/lb:http cluster IP\" -m tcp --dport 80 -j KUBE-MARK-MASQ\n\
         -A KUBE-SERVICES -d 10.96.0.5/32 -p tcp -m comment --comment \"ns/lb:http cluster IP\" -m tcp --dport 80 -j KUBE-SVC-AAAAAAAAAAAAAAAA\n\
         -A KUBE-SERVICES -d 198.51.100.1/32 -p tcp -m comment --comment \"ns/lb:http loadbalancer IP\" -m tcp --dport 80 -j KUBE-FW-AAAAAAAAAAAAAAAA\n\
         -A KUBE-SVC-AAAAAAAAAAAAAAAA -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-1AAAAAAAAAAAAAAA\n\
         -A KUBE-SVC-AAAAAAAAAAAAAAAA -j KUBE-SEP-2AAAAAAAAAAAAAAA\n\
         -A KUBE-SVC-BBBBBBBBBBBBBBBB -j KUBE-SEP-2AAAAAAAAAAAAAAA\n\
         -A KUBE-XLB-AAAAAAAAAAAAAAAA -s 10.244.0.0/16 -m comment --comment \"Redirect pods trying to reach external loadbalancer VIP to clusterIP\" -j KUBE-SVC-AAAAAAAAAAAAAAAA\n\
         -A KUBE-XLB-AAAAAAAAAAAAAAAA -m comment --comment \"masquerade LOCAL traffic for ns/lb:http LB IP\" -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ\n\
         -A KUBE-XLB-AAAAAAAAAAAAAAAA -m comment --comment \"Balancing rule 0 for ns/lb:http\" -j KUBE-SEP-1AAAAAAAAAAAAAAA\n\
         COMMIT\n",
    );
    assert_eq!(found.modes, ["iptables"]);
    assert_eq!(found.foreign, []);
    let service = service(&found, "ns/lb:http");
    assert_eq!(
        service.frontends,
        [
            frontend(FrontendKind::ClusterIp, "10.96.0.5", 80),
            frontend(FrontendKind::LoadBalancer, "198.51.100.1", 80),
            frontend(FrontendKind::NodePort, "", 30001),
        ]
    );
    assert_eq!(service.endpoints, sockets(&["10.0.0.1:80", "10.0.0.2:80"]));
    assert_eq!(service.local_endpoints, sockets(&["10.0.0.1:80"]));
    assert_eq!(service.internal_policy, Some(TrafficPolicy::Cluster));
    assert_eq!(service.external_policy, Some(TrafficPolicy::Local));
    assert_eq!(service.source_ranges, ["192.0.2.0/24"]);
    let node_port = super::tests::service(&found, "ns/np:http");
    assert_eq!(node_port.external_policy, Some(TrafficPolicy::Cluster));
    assert_eq!(node_port.endpoints, sockets(&["10.0.0.2:80"]));
}

/// Up to 1.35 each endpoint had a chain, with affinity or without.
#[test]
fn endpoint_chains_of_old_versions_are_read() {
    let text = "table ip kube-proxy {\n\
        \tmap service-ips {\n\
        \t\ttype ipv4_addr . inet_proto . inet_service : verdict\n\
        \t\telements = { 10.96.0.5 . tcp . 80 : goto service-ULMVA6XW-ns1/svc1/tcp/p80 }\n\
        \t}\n\n\
        \tchain endpoint-5OJB2KTY-ns1/svc1/tcp/p80__10.180.0.1/80 {\n\
        \t\tip saddr 10.180.0.1 meta mark set meta mark | 0x00004000\n\
        \t\tmeta l4proto tcp dnat to 10.180.0.1:80\n\
        \t}\n\n\
        \tchain service-ULMVA6XW-ns1/svc1/tcp/p80 {\n\
        \t\tip daddr 10.96.0.5 tcp dport 80 ip saddr != 10.0.0.0/8 meta mark set meta mark | 0x00004000\n\
        \t\tnumgen random mod 1 vmap { 0 : goto endpoint-5OJB2KTY-ns1/svc1/tcp/p80__10.180.0.1/80 }\n\
        \t}\n\
        }\n\
        table inet firewalld {\n\
        \tchain filter_INPUT {\n\
        \t}\n\
        }\n";
    let source = |text: &str| Source {
        origin: "nft".to_owned(),
        text: text.to_owned(),
    };
    let mut texts = nft_texts(source(text), source(""));
    texts.v6.nft = None;
    let found = read(&texts).expect("readable");
    let service = service(&found, "ns1/svc1:p80");
    assert_eq!(service.endpoints, sockets(&["10.180.0.1:80"]));
    assert_eq!(
        service.frontends,
        [frontend(FrontendKind::ClusterIp, "10.96.0.5", 80)]
    );
    let [foreign] = found.foreign.as_slice() else {
        panic!("{:?}", found.foreign);
    };
    assert_eq!(foreign.name, "firewalld");
    assert_eq!(foreign.owner, Some("firewalld"));
}

#[test]
fn rules_of_others_are_named_and_counted() {
    let found = one_text(
        "*nat\n\
         :PREROUTING ACCEPT [0:0]\n\
         :POSTROUTING ACCEPT [0:0]\n\
         :DOCKER - [0:0]\n\
         :KUBE-SERVICES - [0:0]\n\
         :KUBE-NODEPORTS - [0:0]\n\
         :cali-PREROUTING - [0:0]\n\
         :mine - [0:0]\n\
         -A PREROUTING -m comment --comment \"cali:6gwbT8clXdHdC1b1\" -j cali-PREROUTING\n\
         -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
         -A DOCKER -i docker0 -j RETURN\n\
         -A DOCKER -m something --strange 4 -j NFLOG --nflog-group 3\n\
         COMMIT\n",
    );
    let foreign: Vec<_> = found
        .foreign
        .iter()
        .map(|foreign| (foreign.name.as_str(), foreign.owner, foreign.count))
        .collect();
    assert_eq!(
        foreign,
        [
            ("DOCKER", Some("docker"), Some(2)),
            ("PREROUTING", Some("Calico"), Some(2)),
            ("cali-PREROUTING", Some("Calico"), Some(0)),
            ("mine", None, Some(0)),
        ]
    );
}

#[test]
fn a_dump_that_is_none_is_named() {
    let mut texts = iptables_texts(dump!("ipvs/iptables.save"), dump!("ipvs/ip6tables.save"));
    texts.servers = Some(Source {
        origin: "dump/ipvsadm.save".to_owned(),
        text: "-A -t 10.96.0.1:4".to_owned(),
    });
    let error = read(&texts).expect_err("cut").to_string();
    assert!(error.starts_with("dump/ipvsadm.save: line 1"), "{error}");
    assert_eq!(read(&Texts::default()).expect("nothing"), Found::default());
}

#[test]
fn what_was_found_is_shown() {
    let text = real_iptables().to_string();
    assert!(
        text.contains(
            "edge/gateway-local:http tcp IPv4 iptables-nft\n  \
             ClusterIP     10.96.20.2:80\n  \
             load balancer 198.51.100.11:80\n  \
             NodePort      30091\n  \
             external policy Local\n  \
             health check  30191\n  \
             endpoints     10.244.0.51:8080\n                \
             10.244.1.52:8080\n  \
             local         10.244.0.51:8080\n"
        ),
        "{text}"
    );
    assert!(
        text.contains("10.96.10.5:80 rejected: no endpoints\n"),
        "{text}"
    );
}

/// What a Service of a generated cluster has.
#[derive(Clone, Debug)]
struct Features {
    protocol: Protocol,
    /// On which node each endpoint is: this one or another.
    endpoints: Vec<bool>,
    node_port: bool,
    external_ip: bool,
    load_balancer: bool,
    source_range: bool,
    internal_local: bool,
    external_local: bool,
    affinity: bool,
}

const HERE: &str = "worker-0";

fn any_features() -> impl Strategy<Value = Vec<Features>> {
    let protocol = prop_oneof![
        Just(Protocol::Tcp),
        Just(Protocol::Udp),
        Just(Protocol::Sctp)
    ];
    let endpoints = proptest::collection::vec(any::<bool>(), 0..5);
    let features = (protocol, endpoints, any::<[bool; 7]>());
    let features = features.prop_map(|(protocol, endpoints, bits)| Features {
        protocol,
        endpoints,
        node_port: bits[0],
        external_ip: bits[1],
        load_balancer: bits[2],
        source_range: bits[3],
        internal_local: bits[4],
        external_local: bits[5],
        affinity: bits[6],
    });
    proptest::collection::vec(features, 0..8)
}

fn policy(local: bool) -> TrafficPolicy {
    if local {
        TrafficPolicy::Local
    } else {
        TrafficPolicy::Cluster
    }
}

fn service_of(index: u8, features: &Features) -> Service {
    let v6 = |net: u16, last: u16| IpAddr::from([0xfd00, net, 0, 0, 0, 0, index.into(), last]);
    let both = |wanted: bool, net: u8| {
        let addresses = [IpAddr::from([net, 0, 2, index]), v6(net.into(), 1)];
        addresses.into_iter().filter(|_| wanted).collect::<Vec<_>>()
    };
    let accessible = features.node_port || features.external_ip || features.load_balancer;
    let endpoints = (1_u8..).zip(&features.endpoints).flat_map(|(last, here)| {
        let node = if *here { HERE } else { "elsewhere" };
        [IpAddr::from([10, 244, index, last]), v6(0x244, last.into())]
            .map(|address| Endpoint::ready(address, 8080, node))
    });
    Service {
        namespace: "ns".to_owned(),
        name: format!("s{index}"),
        cluster_ips: both(true, 10),
        external_ips: both(features.external_ip, 192),
        load_balancer_ips: both(features.load_balancer, 198),
        source_ranges: if features.load_balancer && features.source_range {
            vec![
                Cidr::v4(203, 0, 113, 0, 25),
                Cidr::v6([0x2001, 0xdb8, 0, 1], [0; 4], 64),
            ]
        } else {
            Vec::new()
        },
        internal_policy: policy(features.internal_local),
        external_policy: policy(features.external_local && accessible),
        affinity: features.affinity.then_some(600),
        health_check_node_port: (features.load_balancer && features.external_local)
            .then_some(31_000 + u16::from(index)),
        ports: vec![ServicePort {
            name: "p".to_owned(),
            protocol: features.protocol,
            port: 80,
            node_port: features.node_port.then_some(30_000 + u16::from(index)),
            endpoints: endpoints.collect(),
        }],
    }
}

/// Up to seven Services with any features, one port each, and endpoints on [`HERE`] and elsewhere.
pub(in crate::rules) fn any_cluster() -> impl Strategy<Value = Cluster> {
    any_features().prop_map(|features| Cluster {
        services: (1_u8..)
            .zip(&features)
            .map(|(index, features)| service_of(index, features))
            .collect(),
        ..Cluster::default()
    })
}

/// The node that the clusters of [`any_cluster`] are seen from.
pub(in crate::rules) fn a_node() -> NodeView {
    NodeView {
        name: HERE.to_owned(),
        addresses: vec![
            [172, 31, 255, 2].into(),
            [0xfd00, 1, 0, 0, 0, 0, 0, 2].into(),
        ],
        cluster_cidrs: vec![Cidr::v4(10, 244, 0, 0, 16)],
        ..NodeView::default()
    }
}

/// What the rules of a Service say, if they say all.
fn told(service: &Service, family: Family) -> FoundService {
    let port = &service.ports[0];
    let mut all: Vec<SocketAddr> = Vec::new();
    let mut local = Vec::new();
    for endpoint in &port.endpoints {
        if family.holds(endpoint.address) {
            let socket = SocketAddr::new(endpoint.address, endpoint.port);
            all.push(socket);
            if endpoint.node == HERE {
                local.push(socket);
            }
        }
    }
    let internal_local = service.internal_policy == TrafficPolicy::Local;
    let external_local = service.external_policy == TrafficPolicy::Local;
    let refusal = |is_local: bool| match (all.is_empty(), is_local && local.is_empty()) {
        (true, _) => Some(Refusal::Reject),
        (false, true) => Some(Refusal::Drop),
        (false, false) => None,
    };
    let mut frontends = Vec::new();
    for (kind, addresses) in [
        (FrontendKind::ClusterIp, &service.cluster_ips),
        (FrontendKind::ExternalIp, &service.external_ips),
        (FrontendKind::LoadBalancer, &service.load_balancer_ips),
    ] {
        let is_local = match kind {
            FrontendKind::ClusterIp => internal_local,
            _ => external_local,
        };
        let addresses = addresses.iter().filter(|address| family.holds(**address));
        frontends.extend(addresses.map(|address| Frontend {
            kind,
            address: Some(*address),
            port: port.port,
            refusal: refusal(is_local),
        }));
    }
    frontends.extend(port.node_port.map(|port| Frontend {
        kind: FrontendKind::NodePort,
        address: None,
        port,
        refusal: refusal(external_local),
    }));
    let accessible = frontends.len() > 1;
    let uses_cluster = !internal_local || accessible;
    let uses_local = internal_local || (external_local && accessible);
    let has_endpoints = !all.is_empty();
    let ranges = service.source_ranges.iter();
    let ranges = ranges.filter(|range| range.family() == family);
    let mut told = FoundService {
        name: Some(service.port_name(port)),
        mode: Mode::IptablesNft.name(),
        family,
        protocol: port.protocol,
        frontends,
        endpoints: if uses_cluster { all } else { Vec::new() },
        served: BTreeSet::new(),
        local_endpoints: if uses_local { local } else { Vec::new() },
        internal_policy: has_endpoints.then_some(service.internal_policy),
        external_policy: (has_endpoints && accessible).then_some(service.external_policy),
        affinity: None,
        source_ranges: ranges.map(Cidr::to_string).collect(),
        health_check_node_port: service.health_check_node_port,
    };
    // Affinity is in the balancing chains, so that without endpoints there is none.
    if !told.endpoints.is_empty() || !told.local_endpoints.is_empty() {
        told.affinity = service.affinity;
    }
    told
}

/// What has no endpoints has only a rule that refuses, which does not say what it was.
fn as_iptables(service: &FoundService) -> FoundService {
    let mut service = service.clone();
    if service.internal_policy.is_none() {
        service.source_ranges.clear();
    }
    for frontend in &mut service.frontends {
        let external = matches!(
            frontend.kind,
            FrontendKind::ExternalIp | FrontendKind::LoadBalancer
        );
        if external && frontend.refusal == Some(Refusal::Reject) {
            frontend.kind = FrontendKind::External;
        }
    }
    service.frontends.sort_unstable();
    service
}

/// In IPVS mode each frontend stands for itself, and never drops.
fn told_by_ipvs(service: &FoundService, affinity: Option<u32>) -> Vec<FoundService> {
    let of_frontend = |frontend: &Frontend| {
        let internal = frontend.kind == FrontendKind::ClusterIp;
        let policy = if internal {
            service.internal_policy
        } else {
            service.external_policy
        };
        let local = policy == Some(TrafficPolicy::Local) && !service.local_endpoints.is_empty();
        let endpoints = if local {
            service.local_endpoints.clone()
        } else {
            service.endpoints.clone()
        };
        let refusal = endpoints.is_empty().then_some(Refusal::Reject);
        FoundService {
            name: None,
            mode: Mode::Ipvs.name(),
            frontends: vec![Frontend {
                refusal,
                ..*frontend
            }],
            endpoints,
            local_endpoints: Vec::new(),
            internal_policy: None,
            affinity,
            source_ranges: Vec::new(),
            health_check_node_port: None,
            ..service.clone()
        }
    };
    service.frontends.iter().map(of_frontend).collect()
}

fn rendered(rules: &RuleSet) -> Texts {
    let mut texts = Texts::default();
    for step in &rules.steps {
        let source = |text: &String| Source {
            origin: "rendered with iptables-nft".to_owned(),
            text: text.clone(),
        };
        match step {
            Step::Iptables { family, text, .. } => {
                let texts = match family {
                    Family::V4 => &mut texts.v4,
                    Family::V6 => &mut texts.v6,
                };
                texts.iptables.push(source(text));
            }
            Step::Nft { family, text } => match family {
                Family::V4 => texts.v4.nft = Some(source(text)),
                Family::V6 => texts.v6.nft = Some(source(text)),
            },
            Step::Servers { text } => texts.servers = Some(source(text)),
            Step::Sets { text } => texts.sets = Some(source(text)),
            Step::Sysctl(_) | Step::Accounting(_) | Step::Addresses { .. } => {}
        }
    }
    texts
}

proptest! {
    /// What was rendered is read back, as far as the rules of the mode tell it.
    #[test]
    fn what_is_rendered_is_read_back(cluster in any_cluster()) {
        let node = a_node();
        let found = |mode| {
            read(&rendered(&render(&cluster, &node, mode))).expect("what was rendered")
        };
        let told: Vec<_> = Family::ALL
            .into_iter()
            .flat_map(|family| cluster.services.iter().map(move |service| told(service, family)))
            .collect();
        let iptables: Vec<_> = told.iter().map(as_iptables).collect();
        prop_assert_eq!(found(Mode::IptablesNft).services, iptables);
        let nftables: Vec<_> = told.iter().map(as_nftables).collect();
        prop_assert_eq!(without_maps(found(Mode::Nftables).services), nftables);

        let affinity = |told: &FoundService| {
            let mut services = cluster.services.iter();
            let named = |service: &&Service| Some(service.port_name(&service.ports[0])) == told.name;
            services.find(named).and_then(|service| service.affinity)
        };
        let key = |service: &FoundService| (service.family, service.frontends.clone());
        let mut ipvs: Vec<_> = told
            .iter()
            .flat_map(|service| told_by_ipvs(service, affinity(service)))
            .collect();
        ipvs.sort_by_key(key);
        let mut servers = found(Mode::Ipvs).services;
        servers.sort_by_key(key);
        for server in &mut servers {
            // What the sets say more is checked against the real dump.
            server.source_ranges.clear();
            if server.frontends[0].refusal.is_some() {
                server.external_policy = None;
            }
        }
        for server in &mut ipvs {
            if server.frontends[0].kind == FrontendKind::ClusterIp
                || server.frontends[0].refusal.is_some()
            {
                server.external_policy = None;
            }
        }
        prop_assert_eq!(servers, ipvs);
    }

    #[test]
    fn nothing_makes_it_panic(
        family in 0_usize..3,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
    ) {
        let mut texts = nft_texts(dump!("nftables/nft-ip.txt"), dump!("nftables/nft-ip6.txt"));
        texts.v4.iptables.push(dump!("iptables-nft/iptables.save"));
        texts.servers = Some(dump!("ipvs/ipvsadm.save"));
        texts.sets = Some(dump!("ipvs/ipset.save"));
        let source = match family {
            0 => texts.v4.iptables.first_mut(),
            1 => texts.v4.nft.as_mut(),
            _ => texts.sets.as_mut(),
        };
        let source = source.expect("a dump");
        let mut bytes = source.text.clone().into_bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        source.text = String::from_utf8_lossy(&bytes).into_owned();
        if let Ok(found) = read(&texts) {
            prop_assert!(!found.to_string().is_empty());
        }
    }
}

#[test]
fn tables_that_are_only_known_by_name_are_not_walked() {
    let source = |origin: &str, text: &str| Source {
        origin: origin.to_owned(),
        text: text.to_owned(),
    };
    let list = "table ip kube-proxy\ntable ip nat\ntable ip mine\ntable ip6 six\n\
                table inet firewalld\ntable inet kube-proxy\ntable arp a\ntable netdev n\n";
    let mut texts = Texts {
        nft_tables: Some(source("nft list tables", list)),
        ..Texts::default()
    };
    let names = |texts: &Texts, family| -> Vec<String> {
        let found = read(texts).expect("names");
        let tables = found.not_walked(texts, family);
        tables.map(ToString::to_string).collect()
    };
    let inet = ["table inet firewalld", "table inet kube-proxy"];
    let netdev = "table netdev n";
    let v4 = [inet[0], inet[1], "table ip mine", "table ip nat", netdev];
    assert_eq!(names(&texts, Family::V4), v4);
    texts.v4.iptables.push(source("iptables-nft-save", ""));
    let v4 = [inet[0], inet[1], "table ip mine", netdev];
    assert_eq!(names(&texts, Family::V4), v4);
    let v6 = [inet[0], inet[1], "table ip6 six", netdev];
    assert_eq!(names(&texts, Family::V6), v6);
}
