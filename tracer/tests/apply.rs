//! Rules loaded into the kernel with the real tools, in namespaces of our own. Needs root.

mod roundtrip;

use roundtrip::{apply_roundtrip, namespace, nft_lines, node, run};
use tracer::cluster::{Cluster, Family};
use tracer::kernel::apply::{Applied, ApplyError, Incomplete, Left};
use tracer::kernel::netns::Netns;
use tracer::kernel::{apply, tool};
use tracer::lab::plan;
use tracer::rules::{Backend, Mode, RuleCounts, RuleSet, Step, Sysctl, render};

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

/// Rules that ask IPVS itself (`-m ipvs`, of Services with several addresses) need it in the kernel.
fn loadable(text: &str) -> String {
    let ipvs = tracer::kernel::has_ipvs();
    let lines = text.split_inclusive('\n');
    lines.filter(|l| ipvs || !l.contains("-m ipvs ")).collect()
}

/// IPVS mode's ipsets and iptables rules, of which most need no IPVS in the kernel.
#[test]
fn the_kernel_shows_kube_proxys_ipvs_sets_and_rules() {
    let ns = namespace("real-ipvs-sets");
    let node = node(&ns, &["172.31.255.2", "10.0.2.15"]);
    let RuleSet { mode, steps } = render(&real_cluster(), &node, Mode::Ipvs);
    let steps: Vec<Step> = steps
        .into_iter()
        .filter(|step| matches!(step, Step::Sets { .. } | Step::Iptables { .. }))
        .map(|mut step| {
            if let Step::Iptables { text, .. } = &mut step {
                *text = loadable(text);
            }
            step
        })
        .collect();
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
                saved(&loadable(real)),
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
        error.contains("input line 2: add rule ip x y drop"),
        "{error}"
    );
}

/// Every step says what it cost and what it sent; a second time there is less to send.
#[test]
fn applying_reports_each_step() {
    let cluster = plan::cluster(100, 3, true).expect("a cluster");
    for mode in [Mode::IptablesLegacy, Mode::IptablesNft, Mode::Nftables] {
        let ns = namespace("reports");
        let set = render(&cluster, &node(&ns, &["192.0.2.1"]), mode);
        let applied = apply::apply(&ns, &set).expect("apply");
        assert_eq!(applied.steps.len(), set.steps.len());
        let counts = set.expected_counts();
        let loaded: Vec<_> = applied.steps.iter().filter(|s| s.usage.is_some()).collect();
        assert_eq!(loaded.len(), 2, "one tool a family");
        let entries: u64 = loaded.iter().map(|step| step.entries).sum();
        assert_eq!(entries, counts.rules + counts.elements, "{mode}");
        for step in loaded {
            assert!(step.load_ns > 0 && step.read_ns > 0, "{step}");
            assert!(step.sent_bytes > 10 * step.entries, "{step}");
            assert!(step.usage.expect("a tool").peak.kib > 100, "{step}");
        }
        assert!(applied.total_ns() > 0 && applied.peak().kib > 100);
        let again = apply::apply(&ns, &set).expect("apply again");
        let sent = |applied: &Applied| applied.steps.iter().map(|s| s.sent_bytes).sum::<u64>();
        assert!(sent(&again) <= sent(&applied), "{mode}");
        assert_eq!(apply::count(&ns, mode).expect("count"), counts);
    }
}

fn incomplete(ns: &Netns, mode: Mode, steps: Vec<Step>) -> Box<Incomplete> {
    match apply::apply(ns, &RuleSet { mode, steps }) {
        Err(ApplyError::Incomplete(incomplete)) => incomplete,
        other => panic!("{other:?} is not incomplete"),
    }
}

fn forwarding() -> Step {
    Step::Sysctl(Sysctl {
        path: "net/ipv4/ip_forward",
        value: "1",
        needed_for: None,
    })
}

/// A bad line in nat: filter, which was committed before, is in.
#[test]
fn a_bad_iptables_line_says_which_tables_are_in() {
    for backend in [Backend::Legacy, Backend::Nft] {
        let step = |family, bad: &str| Step::Iptables {
            family,
            backend,
            text: format!(
                "*filter\n:KUBE-A - [0:0]\n-A KUBE-A -j DROP\nCOMMIT\n\
                 *nat\n:KUBE-B - [0:0]\n:KUBE-C - [0:0]\n-A KUBE-B -j KUBE-C\n{bad}\
                 -A KUBE-C -j RETURN\nCOMMIT\n*mangle\n:KUBE-D - [0:0]\nCOMMIT\n"
            ),
        };
        // The parser refuses the first three, and the kernel the last, but for nft's own checks.
        for bad in [
            "-A KUBE-B -j NO-SUCH-TARGET\n",
            "-A KUBE-B --no-such-option\n",
            "-A KUBE-GONE -j RETURN\n",
            "-A KUBE-B -d 10.0.0.1/32 -j REJECT\n",
        ] {
            let ns = namespace("bad-iptables");
            let steps = vec![forwarding(), step(Family::V4, bad), step(Family::V6, "")];
            let failure = incomplete(&ns, Mode::IptablesLegacy, steps);
            let text = failure.to_string();
            let tables = |tables: &[&str]| tables.iter().map(|t| (*t).to_owned()).collect();
            assert_eq!(
                failure.left,
                Left::Tables {
                    in_place: tables(&["filter"]),
                    failed: "nat".to_owned(),
                    not_tried: tables(&["mangle"]),
                },
                "{text}"
            );
            assert_eq!(failure.applied.steps.len(), 1);
            assert_eq!(failure.not_tried, [backend.tool(Family::V6)]);
            let tool = backend.tool(Family::V4);
            for words in [
                &format!("{tool}-restore")[..],
                "table filter is in, table nat is as it was, table mangle was not tried",
                "in: net/ipv4/ip_forward",
                "not tried: ip6tables",
            ] {
                assert!(text.contains(words), "{words}: {text}");
            }
            // A line that only the kernel refuses is told as COMMIT's by legacy.
            let named = text.contains(bad.trim_end()) || text.contains("COMMIT");
            assert!(named, "{text}");
            // What it says is so.
            let saved = run(&ns, &format!("{tool}-save"), &[]);
            assert!(saved.contains("-A KUBE-A -j DROP"), "{saved}");
            assert!(
                !saved.contains("KUBE-B") && !saved.contains("KUBE-D"),
                "{saved}"
            );

            // Once the cause is gone, applying again completes it.
            let steps = vec![step(Family::V4, ""), step(Family::V6, "")];
            let mode = Mode::IptablesLegacy;
            apply::apply(&ns, &RuleSet { mode, steps }).expect("apply");
            let saved = run(&ns, &format!("{tool}-save"), &[]);
            assert!(saved.contains("-A KUBE-B -j KUBE-C"), "{saved}");
        }
    }
}

/// nft's transaction is all or nothing: IPv4 is in, of IPv6 nothing.
#[test]
fn a_bad_nft_line_leaves_the_family_as_it_was() {
    let cluster = plan::cluster(20, 3, true).expect("a cluster");
    let bad_lines = [
        "add rule ip6 kube-proxy no-such-chain drop\n",
        "add rule ip6 kube-proxy services no such words\n",
    ];
    for bad in bad_lines {
        let ns = namespace("bad-nft");
        let mut set = render(&cluster, &node(&ns, &["192.0.2.1"]), Mode::Nftables);
        let v4 = set.clone();
        for step in &mut set.steps {
            if let Step::Nft {
                family: Family::V6,
                text,
            } = step
            {
                let middle = text.match_indices("\nadd rule").nth(9).expect("rules").0 + 1;
                text.insert_str(middle, bad);
            }
        }
        let failure = incomplete(&ns, Mode::Nftables, set.steps);
        let text = failure.to_string();
        assert_eq!(failure.left, Left::Nothing, "{text}");
        for words in [
            "nft table ip6 kube-proxy",
            bad.trim_end(),
            "nothing of it went in",
            "nft table ip kube-proxy",
            "not tried: nothing",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
        let tables = run(&ns, "nft", &["list", "tables"]);
        assert_eq!(tables.trim(), "table ip kube-proxy");
        apply::apply(&ns, &v4).expect("apply");
        let count = apply::count(&ns, Mode::Nftables).expect("count");
        assert_eq!(count, v4.expected_counts());
    }
}

/// ipset stops at the line; what is in the kernel is read back, not guessed.
#[test]
fn a_bad_ipset_line_says_how_much_is_missing() {
    let good = |from: u32, to: u32| -> String {
        (from..to).fold(String::new(), |text, n| {
            text + &format!("add KUBE-A 10.0.{}.{},tcp:80\n", n / 256, n % 256)
        })
    };
    // The parser refuses the first, the kernel the second (it is there twice).
    for bad in ["add KUBE-A nonsense\n", "add KUBE-A 10.0.0.1,tcp:80\n"] {
        let ns = namespace("bad-ipset");
        let with = |bad: &str| Step::Sets {
            text: format!(
                "create KUBE-A hash:ip,port family inet hashsize 1024 maxelem 65536\n{}{bad}{}",
                good(0, 3000),
                good(3000, 5000)
            ),
        };
        let steps = vec![with(bad), forwarding()];
        let failure = incomplete(&ns, Mode::Ipvs, steps);
        let there = run(&ns, "ipset", &["save"]).lines().count() as u64;
        let Left::Lines { missing, of } = failure.left else {
            panic!("{failure}");
        };
        assert_eq!(of, 5002);
        // The entry that is there twice is in once.
        let doubled = u64::from(!bad.contains("nonsense"));
        assert_eq!(missing, of - there - doubled, "{failure}");
        assert!(missing >= 2000, "{failure}");
        let message = failure.to_string();
        for words in [
            "ipset restore",
            &format!("input line 3002: {}", bad.trim_end()),
            &format!("{missing} of its 5002 lines are not in"),
            "not tried: net/ipv4/ip_forward",
        ] {
            assert!(message.contains(words), "{words}: {message}");
        }
        let steps = vec![with("")];
        let mode = Mode::Ipvs;
        apply::apply(&ns, &RuleSet { mode, steps }).expect("apply");
        assert_eq!(run(&ns, "ipset", &["save"]).lines().count(), 5001);
    }
}

/// Where the kernel has no IPVS the report says so and what to load; where it has, tests/ipvs.rs
/// has the rest.
#[test]
fn a_kernel_without_ipvs_or_dummy_links_is_named() {
    let ns = namespace("no-ipvs");
    let servers = Step::Servers {
        text: "-A -t 10.96.0.1:80 -s rr\n".to_owned(),
    };
    let addresses = Step::Addresses {
        addresses: vec![[10, 96, 0, 1].into()],
    };
    for (step, remedy) in [(servers, "modprobe ip_vs"), (addresses, "modprobe dummy")] {
        let set = RuleSet {
            mode: Mode::Ipvs,
            steps: vec![step],
        };
        match apply::apply(&ns, &set) {
            Ok(applied) => assert_eq!(applied.steps[0].entries, 1),
            Err(ApplyError::Incomplete(failure)) => {
                assert_eq!(failure.left, Left::Nothing);
                assert!(failure.to_string().contains(remedy), "{failure}");
            }
            Err(error) => panic!("{error}"),
        }
    }
}
