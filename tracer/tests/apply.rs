//! Rules loaded into the kernel with the real tools, in namespaces of our own. Needs root.

mod roundtrip;

use roundtrip::{apply_roundtrip, namespace, nft_lines, node, run};
use tracer::cluster::Cluster;
use tracer::kernel::apply;
use tracer::rules::{Family, Mode, RuleSet, Step, render};

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
    serde_json::from_str(include_str!("../src/rules/fixtures/cluster.json")).expect("cluster.json")
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

/// Once in the kernel, our rules read exactly as a real kube-proxy's (`rules/fixtures/README.md`).
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
                Family::Ipv4,
                include_str!("../src/rules/fixtures/iptables.save"),
            ),
            (
                Family::Ipv6,
                include_str!("../src/rules/fixtures/ip6tables.save"),
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
        ("ip", include_str!("../src/rules/fixtures/nft-ip.txt")),
        ("ip6", include_str!("../src/rules/fixtures/nft-ip6.txt")),
    ] {
        let mut listed = nft_lines(&run(&ns, "nft", &["list", "table", family, "kube-proxy"]));
        let mut real = nft_lines(real);
        // The order of chains is that of Services.
        listed.sort();
        real.sort();
        assert_eq!(listed, real);
    }
}

/// IPVS mode's ipsets and iptables rules, which need no IPVS in the kernel.
#[test]
fn the_kernel_shows_kube_proxys_ipvs_sets_and_rules() {
    let ns = namespace("real-ipvs-sets");
    let node = node(&ns, &["172.31.255.2", "10.0.2.15"]);
    let RuleSet { mode, steps } = render(&real_cluster(), &node, Mode::Ipvs);
    let steps: Vec<Step> = steps
        .into_iter()
        .filter(|step| matches!(step, Step::Sets { .. } | Step::Iptables { .. }))
        .collect();
    let set = RuleSet { mode, steps };
    for _ in 0..2 {
        apply::apply(&ns, &set).expect("apply");
        for (family, real) in [
            (
                Family::Ipv4,
                include_str!("../src/rules/fixtures/ipvs-iptables.save"),
            ),
            (
                Family::Ipv6,
                include_str!("../src/rules/fixtures/ipvs-ip6tables.save"),
            ),
        ] {
            let tool = mode.backend().expect("iptables").tool(family);
            assert_eq!(
                saved(&run(&ns, &format!("{tool}-save"), &[])),
                saved(real),
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
        let real = include_str!("../src/rules/fixtures/ipset.save");
        assert_eq!(sets(&run(&ns, "ipset", &["save"])), sets(real));
    }
}

/// A kernel without IPVS says what it lacks.
#[test]
fn a_missing_tool_or_kernel_part_is_named() {
    let ns = namespace("errors");
    let error =
        tracer::kernel::tool::run(&ns, "ipvsadm-not-there", &[], "").expect_err("no such tool");
    assert!(error.to_string().contains("apt-get install"), "{error}");
    let error = tracer::kernel::tool::run(
        &ns,
        "iptables-legacy-restore",
        &[],
        "*nat\n-A NOWHERE -j DROP\nCOMMIT\n",
    )
    .expect_err("no such chain");
    let error = error.to_string();
    assert!(error.contains("iptables-legacy-restore failed"), "{error}");
    let error = tracer::kernel::tool::run(
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
