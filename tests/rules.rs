//! Rules in a real kernel: what is rendered goes in as written, and reads back as what a real
//! kube-proxy's rules read as.

use std::net::IpAddr;

use tracer::cluster::{Cluster, random, read};
use tracer::kernel::netns::Netns;
use tracer::kernel::{apply, dump, nfacct, tool};
use tracer::rules::check::{Report, check};
use tracer::rules::dump::{FamilyTexts, Source, Texts};
use tracer::rules::{Mode, NodeView, iptables, render};

/// A file of the fixtures: what a real kube-proxy 1.36.2 installed, and for which cluster.
macro_rules! fixture {
    ($name:literal) => {
        include_str!(concat!(
            "../tracer/src/rules/fixtures/kube-proxy-1.36.2/",
            $name
        ))
    };
}

fn source(text: &str) -> Source {
    Source {
        origin: "a fixture".to_owned(),
        text: text.to_owned(),
    }
}

fn iptables(v4: &str, v6: &str) -> Texts {
    let family = |text| FamilyTexts {
        iptables: vec![source(text)],
        ..FamilyTexts::default()
    };
    Texts {
        v4: family(v4),
        v6: family(v6),
        ..Texts::default()
    }
}

/// What a real kube-proxy's rules read as.
fn real_dump(mode: Mode) -> Texts {
    match mode {
        Mode::IptablesLegacy => iptables(
            fixture!("iptables-legacy/iptables.save"),
            fixture!("iptables-legacy/ip6tables.save"),
        ),
        Mode::IptablesNft => iptables(
            fixture!("iptables-nft/iptables.save"),
            fixture!("iptables-nft/ip6tables.save"),
        ),
        Mode::Ipvs => Texts {
            servers: Some(source(fixture!("ipvs/ipvsadm.save"))),
            sets: Some(source(fixture!("ipvs/ipset.save"))),
            addresses: Some(source(fixture!("ipvs/ip-addr.txt"))),
            ..iptables(
                fixture!("ipvs/iptables.save"),
                fixture!("ipvs/ip6tables.save"),
            )
        },
        Mode::Nftables => {
            let family = |text| FamilyTexts {
                nft: Some(source(text)),
                ..FamilyTexts::default()
            };
            Texts {
                v4: family(fixture!("nftables/nft-ip.txt")),
                v6: family(fixture!("nftables/nft-ip6.txt")),
                ..Texts::default()
            }
        }
    }
}

fn real_cluster() -> Cluster {
    let text = fixture!("cluster.json");
    let read = read::read(text.as_bytes(), "cluster.json").expect("kubectl printed it");
    assert!(read.warnings.is_empty(), "{:?}", read.warnings);
    read.cluster
}

/// The node of the fixtures, with the addresses that the machine had when each was dumped.
fn real_node(cluster: &Cluster, mode: Mode) -> NodeView {
    let mut view = NodeView::of(cluster, "worker-0").expect("it is a node");
    view.cluster_cidrs = ["10.244.0.0/16", "fd00:10:244::/56"]
        .map(|cidr| cidr.parse().expect("a network"))
        .into();
    if mode == Mode::Ipvs {
        view.addresses = vec![
            IpAddr::from([172, 31, 255, 2]),
            IpAddr::from([10, 0, 2, 15]),
        ];
    }
    view
}

/// A namespace that IPVS takes real servers in: it has an address.
fn namespace() -> Netns {
    let ns = Netns::create("rules").expect("a namespace");
    for args in ["link set lo up", "address add 192.0.2.1/32 dev lo"] {
        let args: Vec<&str> = args.split(' ').collect();
        tool::run(&ns, "ip", &args, "").expect("ip");
    }
    ns
}

fn assert_clean(report: &Report, what: &str) {
    let shown = &report.differences[..report.differences.len().min(5)];
    assert!(
        report.differences.is_empty(),
        "{what}: {} differences, such as {shown:#?}",
        report.differences.len()
    );
}

/// The rules of the fixtures' cluster are the real ones; once in a kernel they still are.
pub fn the_real_cluster_is_clean(mode: Mode) {
    let cluster = real_cluster();
    let mut view = real_node(&cluster, mode);
    let report = check(&cluster, &view, mode, &real_dump(mode)).expect("it reads");
    assert_clean(&report, "kube-proxy's own");
    assert_eq!(report.services, 15);

    let ns = namespace();
    let objects = [iptables::INVALID_DROPPED, iptables::LOCALHOST_NODE_PORTS];
    view.nfacct = nfacct::supported(&ns, &objects).expect("nfacct answers");
    view.service_cidrs = ["10.96.0.0/12", "fd00:10:96::/108"]
        .map(|cidr| cidr.parse().expect("a network"))
        .into();
    apply::apply(&ns, &render(&cluster, &view, mode)).expect("the rules go in");
    let live = dump::dump(&ns).expect("the rules come out");
    assert_clean(
        &check(&cluster, &view, mode, &live).expect("it reads"),
        "ours in the kernel",
    );
}

/// Hundreds of random Services with every feature go in as rendered, and read back the same.
pub fn random_clusters_are_clean(mode: Mode, seeds: std::ops::Range<u64>, services: u16) {
    for seed in seeds {
        let cluster = random::cluster(seed, services);
        let ns = namespace();
        let mut view = NodeView::of(&cluster, random::NODE).expect("it is a node");
        view.cluster_cidrs = random::CLUSTER_CIDRS.into();
        let objects = [iptables::INVALID_DROPPED, iptables::LOCALHOST_NODE_PORTS];
        view.nfacct = nfacct::supported(&ns, &objects).expect("nfacct answers");
        apply::apply(&ns, &render(&cluster, &view, mode)).expect("the rules go in");
        let live = dump::dump(&ns).expect("the rules come out");
        let report = check(&cluster, &view, mode, &live).expect("it reads");
        assert_clean(&report, &format!("{mode}, seed {seed}"));
    }
}
