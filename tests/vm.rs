//! Tests that need a kernel with everything: run in a VM by `cargo xtask test`, one at a time.

mod ipvs;

use std::net::UdpSocket;
use std::process::Command;

use tracer::kernel::netns::Netns;
use tracer::probe::catalogue::Detail;
use tracer::probe::rule_changes::Way;
use tracer::probe::tier::{Probes, Tier, Watch};
use tracer::probe::trial;
use tracer::rules::Mode;
use tracer::scenario::cost::{self, Cost, CostError, PacketKind, ProbeSet};
use tracer_ebpf::path::Target;

/// Runs a shell command that must succeed; what it prints.
fn sh(command: &str) -> String {
    let output = Command::new("sh")
        .args(["-ec", command])
        .output()
        .expect("there is a shell");
    assert!(
        output.status.success(),
        "`{command}` failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_kernel_loads_what_each_mode_needs_on_demand() {
    sh("ipvsadm -A -t 10.96.0.1:80 -s rr && ipvsadm -a -t 10.96.0.1:80 -r 10.244.0.2:8080 -m");
    let table = sh("ipvsadm -L -n");
    assert!(table.contains("10.96.0.1:80 rr"), "{table}");
    assert!(table.contains("10.244.0.2:8080"), "{table}");
    sh("ip link add kube-ipvs0 type dummy && ip link show kube-ipvs0 | grep -q kube-ipvs0");

    sh(
        "iptables-legacy -t nat -A OUTPUT -d 10.96.0.1 -m statistic --mode random --probability 0.5 -j DNAT --to 10.244.0.2",
    );
    assert!(sh("iptables-legacy-save -t nat").contains("-d 10.96.0.1/32"));
    sh(
        "iptables-nft -t nat -A OUTPUT -d 10.96.0.2 -m comment --comment shop/web -j DNAT --to 10.244.0.2",
    );
    assert!(sh("iptables-nft-save -t nat").contains("shop/web"));

    sh("ipset create KUBE-CLUSTER-IP hash:ip,port && ipset add KUBE-CLUSTER-IP 10.96.0.1,tcp:80");
    assert!(sh("ipset list").contains("10.96.0.1,tcp:80"));

    sh(
        "nft 'add table ip kube-proxy; add map ip kube-proxy services { type ipv4_addr . inet_proto . inet_service : verdict; }'",
    );
    assert!(sh("nft list ruleset").contains("map services"));
}

/// Programs at functions of vmlinux and of modules, global and static ones, run once a call.
#[test]
fn functions_of_vmlinux_and_modules_can_be_probed() {
    let node = Netns::create("functions").expect("root");
    let inside = |command: &str| {
        let status = node
            .command("sh")
            .args(["-ec", command])
            .status()
            .expect("there is a shell");
        assert!(status.success(), "`{command}` failed");
    };
    inside(
        "ip link set lo up
        iptables-legacy -t nat -A OUTPUT -d 127.0.0.3 -j DNAT --to 127.0.0.2
        iptables-legacy -A OUTPUT -d 127.0.0.3 -j ACCEPT
        nft 'add table ip t; add chain ip t c { type filter hook output priority 7; }'
        ipvsadm -A -u 127.0.0.9:9 -s rr",
    );
    let socket = node
        .run(|| UdpSocket::bind("127.0.0.1:0").expect("binds"))
        .expect("enters");
    let functions = [
        (None, "nf_hook_slow"),
        (Some("nf_nat"), "nf_nat_inet_fn"),
        (Some("nf_tables"), "nft_do_chain"),
        (Some("ip_tables"), "ipt_do_table"),
        (Some("ip_vs"), "ip_vs_in_hook"),
    ];
    for (module, function) in functions {
        let runs = trial::function(module, function, || {
            for _ in 0..10 {
                socket.send_to(b"x", "127.0.0.2:9").expect("sends");
            }
        })
        .unwrap_or_else(|error| panic!("{function}: {error}"));
        assert!(runs.entries >= 10, "{function}: {runs:?}");
        assert_eq!(runs.entries, runs.exits, "{function}");
    }
    let missing = trial::function(Some("no_module"), "nothing", || {});
    assert!(missing.is_err());
}

#[test]
fn every_mode_accounts_for_everything() {
    for mode in Mode::ALL {
        tests::a_cell_accounts_for_everything(mode);
    }
}

#[test]
fn every_mode_reaches_everything() {
    for mode in Mode::ALL {
        tests::every_service_and_endpoint_answers(mode);
    }
}

#[test]
fn every_mode_loses_new_flows_to_a_flush() {
    for mode in Mode::ALL {
        tests::a_flush_loses_new_flows_and_a_control_run_none(mode);
    }
}

#[test]
fn drops_equal_the_kernels_own_counter() {
    tests::drops_equal_the_kernels_own_counter();
}

#[test]
fn ipvs_walk() {
    let tally = tests::oracle::walk_agrees_with_the_kernel(Mode::Ipvs, 20, 500);
    assert_eq!((tally.packets, tally.right), (10_000, 10_000));
    assert!(tally.choices >= 20);
}

#[test]
fn ipvs_rules_are_kube_proxys() {
    tests::rules::the_real_cluster_is_clean(Mode::Ipvs);
    tests::rules::random_clusters_are_clean(Mode::Ipvs, 0..2, 100);
}

#[test]
fn ipvs_verdicts() {
    tests::verdicts::prepared_faults_are_told(Mode::Ipvs, Tier::Hooks);
}

#[test]
fn ipvs_stuck_established_flow() {
    tests::verdicts::an_established_flow_to_a_dead_endpoint_is_stuck(Mode::Ipvs);
}

#[test]
fn ipvs_stuck_flow() {
    tests::verdicts::what_ipvs_alone_remembers_is_stuck();
}

#[test]
fn ipvs_under_way() {
    tests::verdicts::a_server_is_an_endpoint_before_its_change_is_over();
}

#[test]
fn ipvs_hijack() {
    tests::verdicts::an_external_ip_of_another_machine_is_hijacked(Mode::Ipvs, Tier::Hooks);
}

#[test]
fn functions_hijack() {
    tests::verdicts::an_external_ip_of_another_machine_is_hijacked(Mode::Ipvs, Tier::Functions);
}

#[test]
fn ipvs_trace() {
    tests::trace::every_flow_is_told_by_its_service(Mode::Ipvs, Tier::Hooks);
}

/// On this kernel as well.
#[test]
fn nftables_syncs() {
    tests::changes::what_a_sync_changes_is_known_without_reading(4);
}

#[test]
fn ipvs_new_service() {
    tests::trace::a_service_that_comes_is_known_at_once(Mode::Ipvs);
}

#[test]
fn functions_two_modes_at_once() {
    let told = tests::trace::it_is_told_which_of_two_modes_translates;
    for left in [Mode::IptablesLegacy, Mode::IptablesNft] {
        told(left, Mode::Nftables, Tier::Functions, Detail::Functions);
    }
    told(Mode::Ipvs, Mode::Nftables, Tier::Hooks, Detail::Stages);
}

#[test]
fn ipvs_external_addresses() {
    for tier in [Tier::Hooks, Tier::Functions] {
        tests::trace::external_addresses_have_a_path_of_their_own(Mode::Ipvs, tier);
    }
}

#[test]
fn functions_trace() {
    for mode in Mode::ALL {
        tests::trace::every_flow_is_told_by_its_service(mode, Tier::Functions);
    }
}

#[test]
fn functions_verdicts() {
    for mode in Mode::ALL {
        tests::verdicts::prepared_faults_are_told(mode, Tier::Functions);
    }
}

/// Where all modules are loaded, nothing is missing, in vmlinux and in modules.
#[test]
fn functions_of_every_component_are_attached_to() {
    sh("modprobe -a nf_conntrack nf_nat ip_vs ip_tables ip6_tables nf_tables");
    let node = Netns::create("functions").expect("root");
    let watch = Watch {
        targets: vec![
            ("10.96.0.1:80".parse().expect("one"), 6, Target::ClusterIp),
            ("[fd00::1]:80".parse().expect("one"), 6, Target::ClusterIp),
        ],
        ..Watch::default()
    };
    let probes = Probes::attach(Some(Tier::Functions), &node, &watch).expect("attaches");
    assert_eq!(probes.missing(), []);
    let probed: Vec<_> = probes.probed().iter().map(|p| p.function).collect();
    for function in [
        "nf_hook_slow",
        "nf_conntrack_in",
        "nf_nat_inet_fn",
        "ip_vs_in_hook",
        "ip_vs_out_hook",
        "ipt_do_table",
        "ip6t_do_table",
        "nft_do_chain",
    ] {
        assert!(probed.contains(&function), "{function}: {probed:?}");
    }
    assert!(probed.iter().any(|name| name.ends_with("confirm")));
}

#[test]
fn what_packets_meet() {
    for mode in Mode::ALL {
        tests::met::what_packets_meet_is_told(mode);
    }
    for mode in [Mode::IptablesLegacy, Mode::IptablesNft] {
        tests::met::a_drop_has_its_table(mode);
    }
    tests::met::a_port_used_again_is_told();
}

#[test]
fn tiers_agree_on_traffic() {
    for mode in Mode::ALL {
        tests::tiers::tiers_agree_on_traffic(mode);
    }
}

#[test]
fn tiers_agree_on_faults() {
    for mode in Mode::ALL {
        tests::tiers::tiers_agree_on_faults(mode);
    }
}

/// What kernels and tiers tell of the same packets is compared by `cargo xtask test`: see `kernels.rs`.
#[test]
fn answers_of_this_kernel() {
    let tiers = tests::answers::answers_are_told(&Mode::ALL);
    assert!(tiers.contains(&Tier::Functions), "{tiers:?}");
}

#[test]
fn functions_pair_interleaved_packets() {
    for mode in [Mode::Ipvs, Mode::Nftables] {
        tests::tiers::interleaved_packets_are_paired(mode, Tier::Functions);
    }
}

#[test]
fn changes_of_every_kind() {
    for way in [Way::Functions, Way::SystemCalls] {
        tests::changes::every_change_is_credited(Some(way));
        tests::changes::tables_of_one_process_are_told_apart(Some(way));
        tests::changes::every_change_of_ipvs_is_credited(Some(way));
    }
}

#[test]
fn changes_by_who_is_gone() {
    tests::changes::who_is_gone_is_known();
}

#[test]
fn changes_from_a_pod() {
    tests::changes::the_pod_is_known();
}

#[test]
fn ipvs_trace_is_kept() {
    tests::faces::a_trace_is_kept_and_read_back(Mode::Ipvs);
}

#[test]
fn ipvs_truth_of_sums() {
    tests::truth::stages_sum_to_the_whole(Mode::Ipvs);
}

#[test]
fn ipvs_truth_of_ways() {
    let traced = tests::truth::the_traced_way_is_one_foretold(Mode::Ipvs, 5, 2000);
    assert!(
        traced.right == traced.to_services && traced.to_services > 6000,
        "{traced:?}"
    );
}

#[test]
fn truth_of_a_slower_stage() {
    for tool in ["iptables-legacy-restore", "nft"] {
        tests::truth::a_slower_stage_shows_what_was_added(tool);
    }
}

#[test]
fn safety_of_unloaded_modules() {
    tests::safety::modules_unloaded_under_a_session(
        Mode::Ipvs,
        "ip_vs",
        &["ipvsadm -C", "iptables-nft -t nat -F"],
    );
    tests::safety::modules_unloaded_under_a_session(
        Mode::Nftables,
        "nf_tables",
        &["nft flush ruleset"],
    );
}

#[test]
fn functions_of_both_families() {
    tests::tiers::both_families_are_followed_in_one_namespace(Tier::Functions);
}

/// The usual script of bpftrace adds some 2,500 instructions for each call that it times: what ours add for a
/// stage is at most a quarter with the hooks tier, and half with the other.
#[test]
fn cost_of_each_tier() {
    const BPFTRACE_NS: f64 = 2500.0;
    let report =
        tests::trace::on_one_thread(cost::measure_packets(1, 500)).expect("it is measured");
    assert!(report.left_out.is_empty(), "{report}");
    assert_eq!(report.costs.len(), 7 * PacketKind::ALL.len(), "{report}");
    let cost = |tier, probes, packets| {
        let is = |cost: &&Cost| {
            (cost.setup.tier, cost.setup.probes, cost.packets) == (Some(tier), probes, packets)
        };
        report.costs.iter().find(is).expect("measured")
    };
    for (tier, share) in [(Tier::Hooks, 0.25), (Tier::Functions, 0.5)] {
        for packets in [PacketKind::First, PacketKind::Later] {
            let [empty, live, every] = [ProbeSet::Empty, ProbeSet::Live, ProbeSet::Every]
                .map(|set| cost(tier, set, packets).added_ns);
            assert!(0.0 < empty && empty < live && live < every, "{report}");
            let stage_ns = cost(tier, ProbeSet::Every, packets)
                .stage_ns
                .expect("every packet is timed");
            assert!(stage_ns <= share * BPFTRACE_NS, "{report}");
        }
        let other = cost(tier, ProbeSet::Every, PacketKind::Other);
        assert!(other.stage_ns.is_none() && other.added_ns > 0.0, "{report}");
    }
}

/// The VM of the tests has none.
#[test]
fn cost_against_bpftrace_needs_it() {
    let error = tests::trace::on_one_thread(cost::measure_against_bpftrace(1, 1))
        .expect_err("there is no bpftrace");
    assert!(matches!(error, CostError::NoBpftrace), "{error}");
    assert!(error.to_string().contains("--package bpftrace"), "{error}");
}

#[test]
fn functions_identity() {
    for mode in [Mode::IptablesLegacy, Mode::IptablesNft, Mode::Nftables] {
        let beside = tests::identity::Beside::default();
        tests::identity::every_flow_is_told_as_it_was(mode, &[Tier::Functions], beside);
    }
}

/// Both tiers at once; beside captures, and with links that take no large segments.
#[test]
fn identity_in_both_tiers() {
    let beside = tests::identity::Beside {
        captures: true,
        cut: true,
    };
    tests::identity::every_flow_is_told_as_it_was(Mode::Ipvs, &Tier::ALL, beside);
}
