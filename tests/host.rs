//! End-to-end on this machine's kernel, in namespaces of our own: iptables and nftables modes.
//! Needs root. IPVS runs in `vm.rs`, where every kernel has it.

use tests::answers::answers_are_told;
use tests::changes::{
    every_change_is_credited, rules_are_read_again_after_a_legacy_flush,
    what_leaves_sets_as_they_were_is_no_change, who_is_gone_is_known,
};
use tests::faces::{a_flush_is_in_the_kept_trace, a_trace_is_kept_and_read_back};
use tests::identity::{Beside, every_flow_is_told_as_it_was};
use tests::oracle::walk_agrees_with_the_kernel;
use tests::rules::{random_clusters_are_clean, the_real_cluster_is_clean};
use tests::safety::{
    a_burst_of_new_flows_is_told_or_counted,
    a_namespace_that_nobody_else_holds_goes_with_its_probes,
    a_node_that_vanishes_ends_the_session_in_order, rules_flushed_over_and_over,
    tracing_changes_nothing,
};
use tests::trace::{
    a_flush_is_heard_and_what_it_breaks_is_seen, a_service_that_comes_is_known_at_once,
    every_flow_is_told_by_its_service, external_addresses_have_a_path_of_their_own,
    it_is_told_which_of_two_modes_translates, only_what_is_chosen_is_traced,
    what_changes_hands_is_told_as_it_is_or_as_unknown,
};
use tests::truth::{
    drops_before_conntrack_are_told_as_what_they_are, drops_equal_the_counter_over_100_000_packets,
    stages_sum_to_the_whole, the_traced_way_is_one_foretold,
};
use tests::verdicts::{
    a_flow_that_is_no_longer_tracked_is_told, a_flow_to_a_dead_endpoint_is_stuck,
    a_flow_whose_entry_is_deleted_goes_on, a_stranger_is_told_while_rules_change_all_the_time,
    a_stranger_that_answers_is_told, an_answer_that_this_node_drops_is_told,
    an_established_flow_to_a_dead_endpoint_is_stuck, an_external_ip_of_another_machine_is_hijacked,
    prepared_faults_are_told, what_a_socket_took_is_no_drop, what_the_node_refuses_is_counted_once,
};
use tests::{
    a_cell_accounts_for_everything, a_flush_loses_new_flows_and_a_control_run_none,
    drops_equal_the_kernels_own_counter, every_service_and_endpoint_answers,
};
use tracer::probe::catalogue::Detail;
use tracer::probe::tier::Tier;
use tracer::rules::Mode;

#[test]
fn iptables_legacy_cell() {
    a_cell_accounts_for_everything(Mode::IptablesLegacy);
}

#[test]
fn iptables_nft_cell() {
    a_cell_accounts_for_everything(Mode::IptablesNft);
}

#[test]
fn nftables_cell() {
    a_cell_accounts_for_everything(Mode::Nftables);
}

#[test]
fn iptables_legacy_flush() {
    a_flush_loses_new_flows_and_a_control_run_none(Mode::IptablesLegacy);
}

#[test]
fn iptables_nft_flush() {
    a_flush_loses_new_flows_and_a_control_run_none(Mode::IptablesNft);
}

#[test]
fn nftables_flush() {
    a_flush_loses_new_flows_and_a_control_run_none(Mode::Nftables);
}

#[test]
fn drops() {
    drops_equal_the_kernels_own_counter();
}

#[test]
fn iptables_legacy_reaches_everything() {
    every_service_and_endpoint_answers(Mode::IptablesLegacy);
}

#[test]
fn iptables_nft_reaches_everything() {
    every_service_and_endpoint_answers(Mode::IptablesNft);
}

#[test]
fn nftables_reaches_everything() {
    every_service_and_endpoint_answers(Mode::Nftables);
}

#[test]
fn iptables_legacy_walk() {
    let tally = walk_agrees_with_the_kernel(Mode::IptablesLegacy, 20, 500);
    assert_eq!((tally.packets, tally.right), (10_000, 10_000));
    assert!(tally.choices >= 20);
}

#[test]
fn iptables_nft_walk() {
    let tally = walk_agrees_with_the_kernel(Mode::IptablesNft, 20, 500);
    assert_eq!((tally.packets, tally.right), (10_000, 10_000));
    assert!(tally.choices >= 20);
}

#[test]
fn nftables_walk() {
    let tally = walk_agrees_with_the_kernel(Mode::Nftables, 20, 500);
    assert_eq!((tally.packets, tally.right), (10_000, 10_000));
    assert!(tally.choices >= 20);
}

#[test]
fn iptables_legacy_rules_are_kube_proxys() {
    the_real_cluster_is_clean(Mode::IptablesLegacy);
    random_clusters_are_clean(Mode::IptablesLegacy, 0..3, 300);
}

#[test]
fn iptables_nft_rules_are_kube_proxys() {
    the_real_cluster_is_clean(Mode::IptablesNft);
    random_clusters_are_clean(Mode::IptablesNft, 0..3, 300);
}

#[test]
fn nftables_rules_are_kube_proxys() {
    the_real_cluster_is_clean(Mode::Nftables);
    random_clusters_are_clean(Mode::Nftables, 0..3, 300);
}

#[test]
fn iptables_legacy_trace() {
    every_flow_is_told_by_its_service(Mode::IptablesLegacy, Tier::Hooks);
}

#[test]
fn iptables_nft_trace() {
    every_flow_is_told_by_its_service(Mode::IptablesNft, Tier::Hooks);
}

#[test]
fn two_modes_at_once() {
    for left in [Mode::IptablesLegacy, Mode::IptablesNft] {
        let (tier, detail) = (Tier::Hooks, Detail::Stages);
        it_is_told_which_of_two_modes_translates(left, Mode::Nftables, tier, detail);
    }
}

#[test]
fn external_addresses() {
    for mode in [Mode::IptablesLegacy, Mode::IptablesNft, Mode::Nftables] {
        external_addresses_have_a_path_of_their_own(mode, Tier::Hooks);
    }
}

#[test]
fn nftables_trace() {
    every_flow_is_told_by_its_service(Mode::Nftables, Tier::Hooks);
}

#[test]
fn nftables_sessions_side_by_side() {
    tests::tiers::sessions_side_by_side_tell_the_same(Mode::Nftables);
}

#[test]
fn nftables_trace_of_a_flush() {
    a_flush_is_heard_and_what_it_breaks_is_seen();
}

#[test]
fn iptables_legacy_verdicts() {
    prepared_faults_are_told(Mode::IptablesLegacy, Tier::Hooks);
}

#[test]
fn iptables_nft_verdicts() {
    prepared_faults_are_told(Mode::IptablesNft, Tier::Hooks);
}

#[test]
fn nftables_verdicts() {
    prepared_faults_are_told(Mode::Nftables, Tier::Hooks);
}

#[test]
fn iptables_nft_stuck_flow() {
    a_flow_to_a_dead_endpoint_is_stuck(Mode::IptablesNft);
}

#[test]
fn nftables_stranger_answers() {
    a_stranger_that_answers_is_told(Mode::Nftables);
}

#[test]
fn who_answers_is_told_while_rules_change_all_the_time() {
    a_stranger_is_told_while_rules_change_all_the_time();
}

#[test]
fn iptables_legacy_hijacks_nothing() {
    an_external_ip_of_another_machine_is_hijacked(Mode::IptablesLegacy, Tier::Hooks);
}

#[test]
fn iptables_nft_hijacks_nothing() {
    an_external_ip_of_another_machine_is_hijacked(Mode::IptablesNft, Tier::Hooks);
}

#[test]
fn nftables_hijacks_nothing() {
    an_external_ip_of_another_machine_is_hijacked(Mode::Nftables, Tier::Hooks);
}

#[test]
fn nftables_stuck_established_flow() {
    an_established_flow_to_a_dead_endpoint_is_stuck(Mode::Nftables);
}

#[test]
fn iptables_legacy_stuck_flow() {
    a_flow_to_a_dead_endpoint_is_stuck(Mode::IptablesLegacy);
}

#[test]
fn nftables_stuck_flow() {
    a_flow_to_a_dead_endpoint_is_stuck(Mode::Nftables);
}

#[test]
fn nftables_trace_of_a_new_service() {
    a_service_that_comes_is_known_at_once(Mode::Nftables);
}

#[test]
fn nftables_trace_of_what_changes_hands() {
    what_changes_hands_is_told_as_it_is_or_as_unknown(Mode::Nftables);
}

#[test]
fn iptables_legacy_trace_of_what_changes_hands() {
    what_changes_hands_is_told_as_it_is_or_as_unknown(Mode::IptablesLegacy);
}

#[test]
fn nftables_trace_of_one_service() {
    only_what_is_chosen_is_traced();
}

#[test]
fn changes_of_every_kind() {
    every_change_is_credited(None);
}

#[test]
fn changes_of_tables_by_one_process() {
    tests::changes::tables_of_one_process_are_told_apart(None);
}

#[test]
fn changes_of_nftables_syncs() {
    tests::changes::what_a_sync_changes_is_known_without_reading(16);
}

#[test]
fn changes_of_sets_with_exist() {
    what_leaves_sets_as_they_were_is_no_change();
}

#[test]
fn changes_by_who_is_gone() {
    who_is_gone_is_known();
}

#[test]
fn iptables_legacy_trace_of_a_flush() {
    rules_are_read_again_after_a_legacy_flush();
}

#[test]
fn rule_changes_are_in_the_order_of_time() {
    tests::changes::changes_are_in_the_order_of_time();
}

#[test]
fn iptables_nft_trace_is_kept() {
    a_trace_is_kept_and_read_back(Mode::IptablesNft);
}

#[test]
fn nftables_trace_is_kept() {
    a_trace_is_kept_and_read_back(Mode::Nftables);
}

#[test]
fn nftables_trace_of_a_flush_is_kept() {
    a_flush_is_in_the_kept_trace();
}

#[test]
fn iptables_legacy_truth_of_sums() {
    stages_sum_to_the_whole(Mode::IptablesLegacy);
}

#[test]
fn iptables_nft_truth_of_sums() {
    stages_sum_to_the_whole(Mode::IptablesNft);
}

#[test]
fn nftables_truth_of_sums() {
    stages_sum_to_the_whole(Mode::Nftables);
}

#[test]
fn truth_of_drops() {
    drops_equal_the_counter_over_100_000_packets();
}

#[test]
fn iptables_legacy_truth_of_early_drops() {
    drops_before_conntrack_are_told_as_what_they_are(Mode::IptablesLegacy);
}

#[test]
fn iptables_nft_truth_of_early_drops() {
    drops_before_conntrack_are_told_as_what_they_are(Mode::IptablesNft);
}

#[test]
fn nftables_truth_of_early_drops() {
    drops_before_conntrack_are_told_as_what_they_are(Mode::Nftables);
}

#[test]
fn iptables_legacy_truth_of_ways() {
    let traced = the_traced_way_is_one_foretold(Mode::IptablesLegacy, 10, 1000);
    assert!(
        traced.right == traced.to_services && traced.to_services > 6000,
        "{traced:?}"
    );
}

#[test]
fn iptables_nft_truth_of_ways() {
    let traced = the_traced_way_is_one_foretold(Mode::IptablesNft, 10, 1000);
    assert!(
        traced.right == traced.to_services && traced.to_services > 6000,
        "{traced:?}"
    );
}

#[test]
fn nftables_truth_of_ways() {
    let traced = the_traced_way_is_one_foretold(Mode::Nftables, 20, 500);
    assert!(
        traced.right == traced.to_services && traced.to_services > 6000,
        "{traced:?}"
    );
}

#[test]
fn iptables_legacy_safety_of_what_is_there() {
    tracing_changes_nothing(Mode::IptablesLegacy);
}

#[test]
fn nftables_safety_of_what_is_there() {
    tracing_changes_nothing(Mode::Nftables);
}

#[test]
fn safety_when_the_node_vanishes() {
    a_node_that_vanishes_ends_the_session_in_order();
    a_namespace_that_nobody_else_holds_goes_with_its_probes();
}

#[test]
fn iptables_legacy_safety_of_flushes() {
    rules_flushed_over_and_over(Mode::IptablesLegacy);
}

#[test]
fn nftables_safety_of_flushes() {
    rules_flushed_over_and_over(Mode::Nftables);
}

#[test]
fn safety_of_a_burst() {
    a_burst_of_new_flows_is_told_or_counted(false);
    a_burst_of_new_flows_is_told_or_counted(true);
}

/// `cargo test --release -p tests --test host rates -- --ignored --nocapture`
#[test]
#[ignore = "measures this machine, which tells only of a release build on an idle one"]
fn rates_of_new_flows() {
    tests::safety::rates_of_new_flows();
}

#[test]
fn hooks_of_both_families() {
    tests::tiers::both_families_are_followed_in_one_namespace(Tier::Hooks);
}

/// What kernels and tiers tell of the same packets is compared by `cargo xtask test`: see `kernels.rs`.
#[test]
fn answers_of_this_kernel() {
    answers_are_told(&[Mode::IptablesLegacy, Mode::IptablesNft, Mode::Nftables]);
}

#[test]
fn iptables_legacy_identity() {
    let beside = Beside {
        cut: true,
        ..Beside::default()
    };
    every_flow_is_told_as_it_was(Mode::IptablesLegacy, &[Tier::Hooks], beside);
}

#[test]
fn iptables_nft_identity() {
    let beside = Beside {
        captures: true,
        ..Beside::default()
    };
    every_flow_is_told_as_it_was(Mode::IptablesNft, &[Tier::Hooks], beside);
}

#[test]
fn nftables_identity() {
    every_flow_is_told_as_it_was(Mode::Nftables, &[Tier::Hooks], Beside::default());
}

#[test]
fn nftables_what_a_socket_took() {
    what_a_socket_took_is_no_drop(Mode::Nftables);
}

#[test]
fn nftables_entry_deleted() {
    a_flow_whose_entry_is_deleted_goes_on(Mode::Nftables);
}

#[test]
fn nftables_no_longer_tracked() {
    a_flow_that_is_no_longer_tracked_is_told(Mode::Nftables);
}

#[test]
fn iptables_legacy_no_longer_tracked() {
    a_flow_that_is_no_longer_tracked_is_told(Mode::IptablesLegacy);
}

#[test]
fn iptables_legacy_answer_dropped() {
    an_answer_that_this_node_drops_is_told(Mode::IptablesLegacy);
}

#[test]
fn nftables_refused_by_the_node() {
    what_the_node_refuses_is_counted_once(Mode::Nftables);
}

#[test]
fn iptables_legacy_refused_by_the_node() {
    what_the_node_refuses_is_counted_once(Mode::IptablesLegacy);
}
