//! What is worth saying before a session begins: choices that match nothing, and what they may have
//! meant; rules of more than one mode.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::directory::{Choice, name_of};
use crate::kernel::addresses::Bound;
use crate::report::units;
use crate::rules::services::{Found, FrontendKind};

/// Names in one hint, at most.
const NAMES: usize = 3;

/// A line for each choice that matches nothing, with the nearest that there is.
pub fn unmatched(choices: &[Choice], found: &Found) -> Vec<String> {
    let missed = |choice: &&Choice| !found.services.iter().any(|service| choice.takes(service));
    choices
        .iter()
        .filter(missed)
        .map(|choice| {
            let nearest = match choice {
                Choice::Service(wanted) => nearest_names(wanted, found),
                Choice::Vip(wanted) => nearest_addresses(*wanted, found),
                Choice::NodePort(wanted) => nearest_ports(*wanted, found),
            };
            let named = found.services.iter().any(|service| service.name.is_some());
            match (choice, nearest.is_empty()) {
                (Choice::Service(_), true) if !named => format!(
                    "{choice} matches nothing: the rules hold no names, as in IPVS mode; use --vip ADDR:PORT"
                ),
                (_, true) => format!("{choice} matches nothing"),
                _ => format!("{choice} matches nothing; nearest: {}", nearest.join(", ")),
            }
        })
        .collect()
}

/// A line for each address that is bound for a Service and may be another machine's.
pub fn hijacked(bound: &[Bound], found: &Found) -> Vec<String> {
    bound
        .iter()
        .filter_map(|bound| Some((bound.address, bound.attached.as_ref()?)))
        .map(|(address, attached)| {
            let names: BTreeSet<String> = found
                .services
                .iter()
                .filter(|service| service.frontends.iter().any(|f| f.address == Some(address)))
                .map(name_of)
                .collect();
            let mut names: Vec<String> = names.into_iter().take(NAMES).collect();
            if names.is_empty() {
                names.push("no Service that the rules name".to_owned());
            }
            format!(
                "{address} is bound on kube-ipvs0 (for {}) and lies in {attached}: whatever this node sends there, \
                 on any port, stays here; if that is another machine's address, it is hijacked",
                names.join(", ")
            )
        })
        .collect()
}

/// What there is to know if boundaries had to make room for others.
pub fn crowded(moved: usize, boundaries: usize) -> Option<String> {
    (moved > 0).then(|| {
        format!(
            "{moved} of {boundaries} boundaries had to make room for hooks of somebody else, such as another session \
             in this network namespace: what those cost is in this session's times, and the other way round"
        )
    })
}

/// What there is to know if the rules of more than one mode are there.
pub fn mixed(found: &Found) -> Option<String> {
    if found.modes.len() < 2 {
        return None;
    }
    let parts: Vec<String> = found
        .modes
        .iter()
        .map(|mode| {
            let names: BTreeSet<String> = found
                .services
                .iter()
                .filter(|service| service.mode == *mode)
                .map(name_of)
                .collect();
            let mut some: Vec<&str> = names.iter().take(NAMES).map(String::as_str).collect();
            if names.len() > NAMES {
                some.push("...");
            }
            let some = if some.is_empty() {
                String::new()
            } else {
                format!(" ({})", some.join(", "))
            };
            let count = units::plural(names.len() as u64, "Service", "Services");
            format!("{mode} names {count}{some}")
        })
        .collect();
    Some(format!(
        "the rules of {} modes are there: {}; if kube-proxy was switched, one is left over: stop it, \
         run kube-proxy --cleanup, and start it again",
        found.modes.len(),
        parts.join("; ")
    ))
}

/// The nearest of these by a measure, the best first; those too far away have none.
fn nearest<T: Ord + Clone>(
    candidates: BTreeSet<T>,
    measure: impl Fn(&T) -> Option<usize>,
) -> Vec<T> {
    let mut measured: Vec<(usize, T)> = candidates
        .into_iter()
        .filter_map(|candidate| Some((measure(&candidate)?, candidate)))
        .collect();
    measured.sort();
    measured.truncate(NAMES);
    measured
        .into_iter()
        .map(|(_, candidate)| candidate)
        .collect()
}

/// Namespace, name, and port if there is one.
fn parts(name: &str) -> (&str, &str, Option<&str>) {
    let (namespace, rest) = name.split_once('/').unwrap_or(("", name));
    match rest.rsplit_once(':') {
        Some((name, port)) => (namespace, name, Some(port)),
        None => (namespace, rest, None),
    }
}

/// Names as the choice has them: with a port if it has one.
fn nearest_names(wanted: &str, found: &Found) -> Vec<String> {
    let (namespace, name, port) = parts(wanted);
    let names = found
        .services
        .iter()
        .filter_map(|service| service.name.as_deref());
    let candidates = names
        .map(|full| match (port, full.rsplit_once(':')) {
            (None, Some((bare, _))) => bare.to_owned(),
            _ => full.to_owned(),
        })
        .collect();
    nearest(candidates, |candidate| {
        let (its_namespace, its_name, _) = parts(candidate);
        // Right but for the port, or for the namespace.
        if its_name == name {
            return Some(usize::from(its_namespace != namespace));
        }
        let distance = strsim::osa_distance(wanted, candidate);
        (distance <= 2.max(wanted.chars().count() / 3)).then_some(1 + distance)
    })
}

/// Other ports of the same address first, then addresses that look alike.
fn nearest_addresses(wanted: SocketAddr, found: &Found) -> Vec<String> {
    let frontends = found.services.iter().flat_map(|service| &service.frontends);
    let candidates = frontends
        .filter_map(|frontend| Some(SocketAddr::new(frontend.address?, frontend.port)))
        .collect();
    let text = wanted.to_string();
    nearest(candidates, |candidate| {
        if candidate.ip() == wanted.ip() {
            return Some(0);
        }
        let distance = strsim::osa_distance(&text, &candidate.to_string());
        (distance <= 3).then_some(distance)
    })
    .iter()
    .map(ToString::to_string)
    .collect()
}

/// Ports that look alike, then those whose numbers are near.
fn nearest_ports(wanted: u16, found: &Found) -> Vec<String> {
    let frontends = found.services.iter().flat_map(|service| &service.frontends);
    let candidates = frontends
        .filter(|frontend| frontend.kind == FrontendKind::NodePort)
        .map(|frontend| frontend.port)
        .collect();
    let text = wanted.to_string();
    nearest(candidates, |candidate: &u16| {
        let distance = strsim::osa_distance(&text, &candidate.to_string());
        Some(distance * 0x1_0000 + usize::from(candidate.abs_diff(wanted)))
    })
    .iter()
    .map(ToString::to_string)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::directory::tests::{found, socket};

    fn said(choice: Choice) -> String {
        unmatched(&[choice], &found()).join("|")
    }

    fn service(name: &str) -> String {
        said(Choice::Service(name.to_owned()))
    }

    #[test]
    fn what_matches_is_not_spoken_of() {
        assert_eq!(service("shop/web"), "");
        assert_eq!(service("shop/web:http"), "");
        assert_eq!(said(Choice::Vip(socket("10.96.0.1:81"))), "");
        assert_eq!(said(Choice::NodePort(30080)), "");
    }

    #[test]
    fn the_nearest_names_are_told() {
        insta::assert_snapshot!(service("shop/wbe"), @"--service shop/wbe matches nothing; nearest: shop/web, shop/webb");
        insta::assert_snapshot!(service("shop/web:htp"), @"--service shop/web:htp matches nothing; nearest: shop/web:admin, shop/web:http, shop/webb:http");
        insta::assert_snapshot!(service("default/web"), @"--service default/web matches nothing; nearest: shop/web");
        insta::assert_snapshot!(service("default/web:http"), @"--service default/web:http matches nothing; nearest: shop/web:admin, shop/web:http");
        insta::assert_snapshot!(service("kube-system/dns"), @"--service kube-system/dns matches nothing");
    }

    #[test]
    fn the_nearest_addresses_and_ports_are_told() {
        insta::assert_snapshot!(said(Choice::Vip(socket("10.96.0.1:8080"))), @"--vip 10.96.0.1:8080 matches nothing; nearest: 10.96.0.1:80, 10.96.0.1:81, 10.96.0.2:80");
        insta::assert_snapshot!(said(Choice::Vip(socket("192.168.7.7:443"))), @"--vip 192.168.7.7:443 matches nothing");
        insta::assert_snapshot!(said(Choice::NodePort(30008)), @"--node-port 30008 matches nothing; nearest: 30080");
    }

    #[test]
    fn rules_without_names_are_said_to_have_none() {
        let mut found = found();
        for service in &mut found.services {
            service.name = None;
        }
        let said = unmatched(&[Choice::Service("shop/web".to_owned())], &found).join("");
        assert!(said.contains("use --vip ADDR:PORT"), "{said}");
    }

    #[test]
    fn two_modes_are_told_with_their_services() {
        let mut found = found();
        found.modes = vec!["nftables"];
        assert_eq!(mixed(&found), None);
        found.modes = vec!["ipvs", "nftables"];
        let mut left = found.services[0].clone();
        left.mode = "ipvs";
        left.name = None;
        found.services.push(left);
        insta::assert_snapshot!(mixed(&found).expect("two"), @"the rules of 2 modes are there: ipvs names 1 Service (10.96.0.1:80/tcp); nftables names 3 Services (shop/web:admin, shop/web:http, shop/webb:http); if kube-proxy was switched, one is left over: stop it, run kube-proxy --cleanup, and start it again");
    }
}
