//! End-to-end on this machine's kernel, in namespaces of our own: iptables and nftables modes.
//! Needs root. IPVS runs in `vm.rs`, where every kernel has it.

use tests::oracle::walk_agrees_with_the_kernel;
use tests::rules::{random_clusters_are_clean, the_real_cluster_is_clean};
use tests::trace::{
    a_flush_is_heard_and_what_it_breaks_is_seen, every_flow_is_told_by_its_service,
    only_what_is_chosen_is_traced,
};
use tests::verdicts::{a_flow_to_a_dead_endpoint_is_stuck, prepared_faults_are_told};
use tests::{
    a_cell_accounts_for_everything, a_flush_loses_new_flows_and_a_control_run_none,
    drops_equal_the_kernels_own_counter, every_service_and_endpoint_answers,
};
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
fn nftables_trace() {
    every_flow_is_told_by_its_service(Mode::Nftables, Tier::Hooks);
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
fn nftables_stuck_flow() {
    a_flow_to_a_dead_endpoint_is_stuck(Mode::Nftables);
}

#[test]
fn nftables_trace_of_one_service() {
    only_what_is_chosen_is_traced();
}

#[test]
fn hooks_of_both_families() {
    tests::tiers::both_families_are_followed_in_one_namespace(Tier::Hooks);
}
