//! A sync of IPVS mode: the differences of virtual servers, addresses and ipsets. kube-proxy
//! makes one request for each, over netlink or one `ipset` process; here they stand together.

use std::collections::HashSet;
use std::net::IpAddr;

use crate::cluster::Family;
use crate::rules::{Backend, Step};

use super::Plan;
use super::render::{remove_stale_servers, update_live_servers, update_sets};

/// The steps that kube-proxy takes when `old` has become `new`, both families together: virtual
/// servers that are new or different and the addresses to be bound, ipsets, the constant iptables
/// rules, and only then what is stale.
pub(in crate::rules) fn sync(old: &[Plan<'_>], new: &[Plan<'_>]) -> Vec<Step> {
    let servers = |plans: &[Plan<'_>]| -> String { plans.iter().map(Plan::servers_text).collect() };
    let sets = |plans: &[Plan<'_>]| -> String { plans.iter().map(Plan::sets_text).collect() };
    let addresses = |plans: &[Plan<'_>]| -> Vec<IpAddr> {
        plans.iter().flat_map(Plan::addresses).copied().collect()
    };
    let (servers_before, servers) = (servers(old), servers(new));
    let (bound, wanted) = (addresses(old), addresses(new));
    let is_bound: HashSet<&IpAddr> = bound.iter().collect();
    let is_wanted: HashSet<&IpAddr> = wanted.iter().collect();
    let stale = bound.iter().any(|address| !is_wanted.contains(address));
    let missing: Vec<IpAddr> = wanted
        .iter()
        .filter(|address| !is_bound.contains(address))
        .copied()
        .collect();

    let mut steps = vec![Step::Servers {
        text: update_live_servers(&servers_before, &servers),
    }];
    // Also if only some go, so that the later step tells which.
    if stale || !missing.is_empty() {
        let mut addresses = bound.clone();
        addresses.extend(missing);
        steps.push(Step::Addresses { addresses });
    }
    steps.push(Step::Sets {
        text: update_sets(&sets(old), &sets(new)),
    });
    for (plan, family) in new.iter().zip(Family::ALL) {
        steps.push(Step::Iptables {
            family,
            backend: Backend::Nft,
            text: plan.iptables_text(false),
        });
    }
    if stale {
        steps.push(Step::Addresses { addresses: wanted });
    }
    steps.push(Step::Servers {
        text: remove_stale_servers(&servers_before, &servers),
    });
    steps.retain(
        |step| !matches!(step, Step::Servers { text } | Step::Sets { text } if text.is_empty()),
    );
    steps
}
