//! Rules loaded into the kernel with the real tools, in namespaces of our own. Needs root.

mod roundtrip;

use roundtrip::{apply_roundtrip, namespace, nft_lines, node, run};
use tracer::cluster::{Cluster, Family};
use tracer::kernel::netns::Netns;
use tracer::kernel::{apply, tool};
use tracer::lab::plan;
use tracer::rules::{Mode, RuleCounts, RuleSet, Step, render};

#[test]
fn iptables_legacy_goes_in_and_out() {
    apply_roundtrip(Mode::IptablesLegacy);
}

#[test]
fn iptables_nft_goes_in_and_out() {
    apply_roundtrip(Mode::IptablesNft);
}

#[test]
fn nftables_goes_in_and_out() {
    apply_roundtrip(Mode::Nftables);
}

fn real_cluster() -> Cluster {
    let text = include_str!("../src/rules/fixtures/kube-proxy-1.36.2/cluster.json");
    tracer::cluster::read::read(text.as_bytes(), "cluster.json")
        .expect("a cluster")
        .cluster
}

/// Chains and rules in a dump; sorted, because kube-proxy's order of Services is random.
fn saved(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text
        .lines()
        .filter(|line| line.starts_with("-A ") || line.contains(" - ["))
        .map(|line| match line.strip_prefix(':') {
            Some(chain) => chain.split(' ').next().unwrap_or_default().to_owned(),
            None => line.to_owned(),
        })
        .collect();
    lines.sort();
    lines
}

/// Once in the kernel, our rules read exactly as a real kube-proxy's (`rules/fixtures/kube-proxy-1.36.2`).
#[test]
fn the_kernel_shows_kube_proxys_iptables_rules() {
    for mode in [Mode::IptablesLegacy, Mode::IptablesNft] {
        let ns = namespace("real-iptables");
        let node = node(&ns, &["172.31.255.2"]);
        assert!(
            node.nfacct,
            "the fixtures count with nfacct, and so must this kernel"
        );
        apply::apply(&ns, &render(&real_cluster(), &node, mode)).expect("apply");
        for (family, real) in [
            (
                Family::V4,
                include_str!(
                    "../src/rules/fixtures/kube-proxy-1.36.2/iptables-legacy/iptables.save"
                ),
            ),
            (
                Family::V6,
                include_str!(
                    "../src/rules/fixtures/kube-proxy-1.36.2/iptables-legacy/ip6tables.save"
                ),
            ),
        ] {
            let tool = mode.backend().expect("iptables").tool(family);
            assert_eq!(
                saved(&run(&ns, &format!("{tool}-save"), &[])),
                saved(real),
                "{tool}"
            );
        }
    }
}

#[test]
fn the_kernel_shows_kube_proxys_nftables_rules() {
    let ns = namespace("real-nftables");
    let node = node(&ns, &["172.31.255.2"]);
    apply::apply(&ns, &render(&real_cluster(), &node, Mode::Nftables)).expect("apply");
    for (family, real) in [
        (
            "ip",
            include_str!("../src/rules/fixtures/kube-proxy-1.36.2/nftables/nft-ip.txt"),
        ),
        (
            "ip6",
            include_str!("../src/rules/fixtures/kube-proxy-1.36.2/nftables/nft-ip6.txt"),
        ),
    ] {
        let mut listed = nft_lines(&run(&ns, "nft", &["list", "table", family, "kube-proxy"]));
        let mut real = nft_lines(real);
        // The order of chains is that of Services.
        listed.sort();
        real.sort();
        assert_eq!(listed, real);
    }
}

/// Rules and elements as `nft list` shows them, in both families.
fn nft_counts(ns: &Netns) -> RuleCounts {
    let mut counts = RuleCounts::default();
    for family in Family::ALL {
        let args = ["-j", "list", "table", family.nft(), "kube-proxy"];
        let listed: serde_json::Value = serde_json::from_str(&run(ns, "nft", &args)).expect("JSON");
        for object in listed["nftables"].as_array().expect("a list") {
            counts.rules += u64::from(object.get("rule").is_some());
            for kind in ["set", "map"] {
                let elements = object[kind]["elem"].as_array();
                counts.elements += elements.map_or(0, |elements| elements.len() as u64);
            }
        }
    }
    counts
}

/// The kernel's own lists, which come in many messages, tell what `nft list` tells; also of sets
/// that kube-proxy does not make.
#[test]
fn nftables_are_counted_as_nft_lists_them() {
    let ns = namespace("count-nftables");
    let count = || apply::count(&ns, Mode::Nftables).expect("count");
    assert_eq!(count(), RuleCounts::default(), "no table");
    let cluster = plan::cluster(300, 3, true).expect("a cluster");
    let set = render(&cluster, &node(&ns, &["192.0.2.1"]), Mode::Nftables);
    apply::apply(&ns, &set).expect("apply");
    let kube_proxy = count();
    assert_eq!(kube_proxy, nft_counts(&ns));
    assert_eq!(kube_proxy, set.expected_counts());

    let script = "add set ip kube-proxy nets { type ipv4_addr; flags interval; }\n\
                  add element ip kube-proxy nets { 10.0.0.0/8, 192.0.2.1-192.0.2.9, 192.0.2.20 }\n\
                  add set ip6 kube-proxy pairs { type ipv6_addr . inet_service; flags interval; }\n\
                  add element ip6 kube-proxy pairs { fd00::/64 . 1-9, fd00:1::1 . 80 }\n\
                  add map ip kube-proxy verdicts { type ipv4_addr : verdict; }\n\
                  add element ip kube-proxy verdicts { 192.0.2.1 : drop, * : accept }\n\
                  add set ip kube-proxy empty { type ipv4_addr; }\n\
                  add chain ip kube-proxy more\n\
                  add rule ip kube-proxy more tcp dport { 80, 443, 1000-2000 } accept\n\
                  add table ip somebody\n\
                  add set ip somebody gone { type ipv4_addr; elements = { 192.0.2.7 }; }\n\
                  add chain ip somebody input\n\
                  add rule ip somebody input ip saddr @gone drop\n";
    tool::run(&ns, "nft", &["-f", "-"], script).expect("nft");
    let more = count();
    assert_eq!(more, nft_counts(&ns));
    assert_eq!(more.rules, kube_proxy.rules + 1);
    assert_eq!(more.elements, kube_proxy.elements + 3 + 2 + 2);
}

/// IPVS mode's ipsets and iptables rules, which need no IPVS in the kernel.
#[test]
fn the_kernel_shows_kube_proxys_ipvs_sets_and_rules() {
    let ns = namespace("real-ipvs-sets");
    let node = node(&ns, &["172.31.255.2", "10.0.2.15"]);
    let RuleSet { mode, mut steps } = render(&real_cluster(), &node, Mode::Ipvs);
    steps.retain(|step| matches!(step, Step::Sets { .. } | Step::Iptables { .. }));
    let without_ipvs = |text: &str| -> String {
        let lines = text.split_inclusive('\n');
        lines.filter(|line| !line.contains("-m ipvs")).collect()
    };
    for step in &mut steps {
        if let Step::Iptables { text, .. } = step {
            *text = without_ipvs(text);
        }
    }
    let set = RuleSet { mode, steps };
    for _ in 0..2 {
        apply::apply(&ns, &set).expect("apply");
        for (family, real) in [
            (
                Family::V4,
                include_str!("../src/rules/fixtures/kube-proxy-1.36.2/ipvs/iptables.save"),
            ),
            (
                Family::V6,
                include_str!("../src/rules/fixtures/kube-proxy-1.36.2/ipvs/ip6tables.save"),
            ),
        ] {
            let tool = mode.backend().expect("iptables").tool(family);
            assert_eq!(
                saved(&run(&ns, &format!("{tool}-save"), &[])),
                saved(&without_ipvs(real)),
                "{tool}"
            );
        }
        let sets = |text: &str| {
            let lines = text
                .lines()
                .map(|line| line.split(" bucketsize ").next().unwrap_or_default());
            let mut lines: Vec<String> = lines.map(str::to_owned).collect();
            lines.sort();
            lines
        };
        let real = include_str!("../src/rules/fixtures/kube-proxy-1.36.2/ipvs/ipset.save");
        assert_eq!(sets(&run(&ns, "ipset", &["save"])), sets(real));
    }
}

/// A kernel without IPVS says what it lacks.
#[test]
fn a_missing_tool_or_kernel_part_is_named() {
    let ns = namespace("errors");
    let error = tool::run(&ns, "ipvsadm-not-there", &[], "").expect_err("no such tool");
    assert!(error.to_string().contains("apt-get install"), "{error}");
    let error = tool::run(
        &ns,
        "iptables-legacy-restore",
        &[],
        "*nat\n-A NOWHERE -j DROP\nCOMMIT\n",
    )
    .expect_err("no such chain");
    let error = error.to_string();
    assert!(error.contains("iptables-legacy-restore failed"), "{error}");
    let error = tool::run(
        &ns,
        "nft",
        &["-f", "-"],
        "add table ip x\nadd rule ip x y drop\n",
    )
    .expect_err("no such chain");
    let error = error.to_string();
    assert!(
        error.contains("input line: add rule ip x y drop"),
        "{error}"
    );
}
