//! What is read back is what the real dumps were made of.

use super::*;
use crate::rules::dump::FamilyTexts;

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
    service
}

#[test]
fn nftables_says_the_same_as_iptables() {
    let nftables = real_nftables();
    assert_eq!(nftables.modes, ["nftables"]);
    let iptables: Vec<_> = real_iptables().services.iter().map(as_nftables).collect();
    assert_eq!(nftables.services, iptables);
    let json = dump!("nftables/nft-ip.json");
    let texts = Texts {
        v4: FamilyTexts {
            nft_json: Some(json),
            ..FamilyTexts::default()
        },
        ..Texts::default()
    };
    let json = read(&texts).expect("a real dump");
    assert_eq!(json.services, iptables[..iptables.len() - 1]);
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
