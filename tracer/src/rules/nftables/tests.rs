//! What is rendered, what kube-proxy installed, and what a partial sync leaves are one table.

use proptest::prelude::*;

use super::check::{self, Form};
use super::claims::Claims;
use super::table::{Ruleset, Table};
use super::{apply, json, parse};
use crate::cluster::{
    Cluster, Condition, Endpoint, Family, Protocol, Service, ServicePort, TrafficPolicy,
};
use crate::rules::check::Finding;
use crate::rules::{self, Mode, NodeView, RuleSet, Step};

/// Where no two Services claim the same.
fn check(expected: &Table, found: Option<&Table>, form: Form) -> Vec<Finding> {
    check::check(expected, &Claims::default(), found, form)
}

const CLUSTER: &str = include_str!("../fixtures/kube-proxy-1.36.2/cluster.json");
const IP: &str = include_str!("../fixtures/kube-proxy-1.36.2/nftables/nft-ip.txt");
const IP6: &str = include_str!("../fixtures/kube-proxy-1.36.2/nftables/nft-ip6.txt");
const JSON: &str = include_str!("../fixtures/kube-proxy-1.36.2/nftables/nft-ip.json");

const CIDRS: [&str; 2] = ["10.96.0.0/12", "fd00:10:96::/108"];

fn real_cluster() -> Cluster {
    let read = crate::cluster::read::read(CLUSTER.as_bytes(), "cluster.json");
    read.expect("a cluster").cluster
}

fn node(service_cidrs: &[&str]) -> NodeView {
    let parse = |cidr: &&str| cidr.parse().expect("a network");
    NodeView {
        name: "worker-0".to_owned(),
        zone: Some("z1".to_owned()),
        addresses: vec!["172.31.255.2".parse().expect("an address")],
        cluster_cidrs: ["10.244.0.0/16", "fd00:10:244::/56"]
            .iter()
            .map(parse)
            .collect(),
        service_cidrs: service_cidrs.iter().map(parse).collect(),
        ..NodeView::default()
    }
}

/// Runs the scripts of a rule set on what is there.
fn load(ruleset: &mut Ruleset, set: &RuleSet) {
    for step in &set.steps {
        if let Step::Nft { text, .. } = step
            && let Err(error) = apply(ruleset, text)
        {
            panic!("{error} of\n{text}");
        }
    }
}

fn rendered(cluster: &Cluster, node: &NodeView) -> Ruleset {
    let mut ruleset = Ruleset::default();
    load(&mut ruleset, &rules::render(cluster, node, Mode::Nftables));
    ruleset
}

#[test]
fn kube_proxys_own_tables_are_clean() {
    let known = node(&CIDRS);
    for node in [known, node(&[])] {
        let expected = rendered(&real_cluster(), &node);
        let ip = expected.ip.as_ref().expect("a table");
        let ip6 = expected.ip6.as_ref().expect("a table");
        let found = parse(IP).expect("a dump");
        assert_eq!(check(ip, found.ip.as_ref(), Form::Text), []);
        let found = json::parse(JSON).expect("a dump");
        assert_eq!(check(ip, found.ip.as_ref(), Form::Json), []);
        let found = parse(IP6).expect("a dump");
        assert_eq!(check(ip6, found.ip6.as_ref(), Form::Text), []);
    }
}

// ---- any cluster ----

fn condition() -> impl Strategy<Value = Condition> {
    prop_oneof![
        4 => Just(Condition::Ready),
        1 => Just(Condition::Draining),
        1 => Just(Condition::NotReady),
    ]
}

fn policy() -> impl Strategy<Value = TrafficPolicy> {
    prop_oneof![Just(TrafficPolicy::Cluster), Just(TrafficPolicy::Local)]
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![
        Just(Protocol::Tcp),
        Just(Protocol::Udp),
        Just(Protocol::Sctp)
    ]
}

/// Services with any features; addresses and names follow from their place.
fn clusters() -> impl Strategy<Value = Cluster> {
    let endpoints = prop::collection::vec((0..20_u8, any::<bool>(), condition()), 0..5);
    let features = (
        any::<[bool; 6]>(),
        policy(),
        policy(),
        protocol(),
        1..3_u8,
        prop::option::of(1..100_000_u32),
    );
    prop::collection::vec((features, endpoints), 0..10).prop_map(|services| Cluster {
        services: (1_u8..)
            .zip(services)
            .map(|(place, (features, endpoints))| service(place, features, &endpoints))
            .collect(),
        ..Cluster::default()
    })
}

type Features = (
    [bool; 6],
    TrafficPolicy,
    TrafficPolicy,
    Protocol,
    u8,
    Option<u32>,
);

fn service(place: u8, features: Features, endpoints: &[(u8, bool, Condition)]) -> Service {
    let (
        [node_port, external, balanced, ranges, six, named],
        internal_policy,
        external_policy,
        protocol,
        ports,
        affinity,
    ) = features;
    let mut cluster_ips = vec![[10, 96, 0, place].into()];
    if six {
        cluster_ips.push([0xfd00, 0x10, 0x96, 0, 0, 0, 0, u16::from(place)].into());
    }
    let endpoints: Vec<Endpoint> = endpoints
        .iter()
        .flat_map(|(pod, local, condition)| {
            let node = if *local { "worker-0" } else { "worker-1" };
            let pods = [
                [10, 244, u8::from(!local), *pod].into(),
                [
                    0xfd00,
                    0x10,
                    0x244,
                    u16::from(!local),
                    0,
                    0,
                    0,
                    u16::from(*pod),
                ]
                .into(),
            ];
            pods.map(|pod| Endpoint {
                condition: *condition,
                ..Endpoint::ready(pod, 8080, node)
            })
        })
        .collect();
    let cidrs = |cidrs: &[&str]| {
        cidrs
            .iter()
            .map(|cidr| cidr.parse().expect("a network"))
            .collect()
    };
    Service {
        namespace: "ns".to_owned(),
        name: format!("svc{place}"),
        cluster_ips,
        external_ips: if external {
            vec![[192, 0, 2, place].into()]
        } else {
            Vec::new()
        },
        load_balancer_ips: if balanced {
            vec![[198, 51, 100, place].into(), [198, 51, 101, place].into()]
        } else {
            Vec::new()
        },
        source_ranges: if ranges {
            cidrs(&["203.0.113.0/25", "203.0.113.128/25", "172.31.0.0/16"])
        } else {
            Vec::new()
        },
        internal_policy,
        external_policy,
        affinity,
        health_check_node_port: None,
        ports: (0..ports)
            .map(|port| ServicePort {
                name: if named || ports > 1 {
                    format!("p{port}")
                } else {
                    String::new()
                },
                protocol,
                port: 80 + u16::from(port),
                node_port: (node_port || balanced)
                    .then(|| 30_000 + 10 * u16::from(place) + u16::from(port)),
                endpoints: endpoints.clone(),
            })
            .collect(),
    }
}

/// Every table that lacks one thing of `table`: an element, a rule, a chain or a set.
fn without_one(table: &Table) -> Vec<(String, Table)> {
    let mut all = Vec::new();
    let mut add = |what: String, change: &dyn Fn(&mut Table)| {
        let mut less = table.clone();
        change(&mut less);
        all.push((what, less));
    };
    for (name, set) in &table.sets {
        add(name.to_string(), &|table| {
            table.sets.remove(name);
        });
        for key in set.elements.keys() {
            add(format!("{name} {key:?}"), &|table| {
                if let Some(set) = table.sets.get_mut(name) {
                    set.elements.remove(key);
                }
            });
        }
    }
    for (name, chain) in &table.chains {
        add(name.to_string(), &|table| {
            table.chains.remove(name);
        });
        for index in 0..chain.rules.len() {
            add(format!("{name} {index}"), &|table| {
                if let Some(chain) = table.chains.get_mut(name) {
                    chain.rules.remove(index);
                }
            });
        }
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// What is rendered is understood, and printed and read back.
    #[test]
    fn rendered_tables_are_read_back(cluster in clusters()) {
        let ruleset = rendered(&cluster, &node(&CIDRS));
        for family in Family::ALL {
            let table = ruleset.table(family).expect("a table");
            let printed = table.to_string();
            prop_assert!(!printed.contains("Other"));
            let again = parse(&printed).expect("a dump");
            prop_assert_eq!(again.table(family), Some(table));
            prop_assert_eq!(check(table, again.table(family), Form::Text), []);
        }
    }

    /// Whatever is missing or too much is found, and names its Service.
    #[test]
    fn one_difference_is_found(cluster in clusters()) {
        let ruleset = rendered(&cluster, &node(&CIDRS));
        for family in Family::ALL {
            let table = ruleset.table(family).expect("a table");
            for (what, less) in without_one(table) {
                let mut compared = vec![check(table, Some(&less), Form::Text)];
                // Without the rule of the ServiceCIDRs, those are unknown.
                if what != "cluster-ips-check 1" {
                    compared.push(check(&less, Some(table), Form::Text));
                }
                for found in compared {
                    prop_assert!(!found.is_empty(), "{}", what);
                    let names_one = what.contains("ns/svc") || what.starts_with("cluster-ips [");
                    prop_assert!(
                        !names_one || found.iter().any(|finding| finding.service.is_some()),
                        "{}: {:#?}", what, found
                    );
                }
            }
        }
    }

    /// A partial sync leads to what a full one makes.
    #[test]
    fn a_partial_sync_leads_to_the_new_tables(old in clusters(), new in clusters()) {
        let node = node(&CIDRS);
        let mut ruleset = rendered(&old, &node);
        load(&mut ruleset, &rules::sync(&old, &new, &node, Mode::Nftables));
        let wanted = rendered(&new, &node);
        for family in Family::ALL {
            let table = wanted.table(family).expect("a table");
            prop_assert_eq!(check(table, ruleset.table(family), Form::Text), []);
        }
    }
}
