//! Are these the rules of a kube-proxy of another version?
//!
//! Versions before 1.26 do the same by other rules: what is missing in one place is done in another. So of
//! their rules is said how they differ from what is called for, and not what packets suffer.

use super::rule::{Rule, Tables};
use crate::rules::Mode;
use crate::rules::check::{Finding, Kind};

/// In the place of what packets suffer.
const NOT_JUDGED: &str = "not judged: the kube-proxy that wrote these rules may do it by others, being of another version";

/// A chain that versions before 1.24 have: a Service's traffic from outside, with policy Local.
const OUTSIDE_BEFORE_1_24: &str = "KUBE-XLB-";

/// How rules of iptables mode show that another version wrote them; `None`: they do not.
pub fn of_another_version(found: &Tables<'_>, mode: Mode) -> Option<&'static str> {
    if !matches!(mode, Mode::IptablesLegacy | Mode::IptablesNft) {
        return None;
    }
    let nat = found.table("nat")?;
    let names = |start| nat.chains.iter().any(|chain| chain.name.starts_with(start));
    let jumps = |table, chain, to| {
        let chain = found.chain(table, chain);
        let mut rules = chain.into_iter().flat_map(|chain| &chain.rules);
        rules.any(|rule: &Rule<'_>| rule.chain() == Some(to))
    };
    // Chain, rules and jumps: whoever takes one away by mistake leaves the others.
    let firewall = "KUBE-PROXY-FIREWALL";
    let has_firewall = || {
        found.chain("filter", firewall).is_some()
            || ["INPUT", "FORWARD", "OUTPUT"]
                .into_iter()
                .any(|base| jumps("filter", base, firewall))
    };
    if names(OUTSIDE_BEFORE_1_24) {
        Some("KUBE-XLB- chains, which versions before 1.24 have")
    } else if jumps("nat", "KUBE-SERVICES", "KUBE-MARK-MASQ") {
        Some("KUBE-MARK-MASQ in KUBE-SERVICES, as in versions before 1.24")
    } else if found.chain("filter", "KUBE-FORWARD").is_some() && !has_firewall() {
        Some("no KUBE-PROXY-FIREWALL, as in versions before 1.26")
    } else {
        None
    }
}

/// What a reader has to know first.
pub fn note(sign: &str) -> String {
    format!(
        "the rules are those of another version of kube-proxy than 1.36, whose rules are called for ({sign}): many \
         differences may be of form only, and what packets suffer from them is not judged; `svcpath rules walk` \
         tells where a packet goes by the rules that are there"
    )
}

/// Takes back what another version's rules may make untrue.
pub fn do_not_judge(findings: &mut [Finding]) {
    for finding in findings {
        // Where an endpoint's chain sends packets it says itself.
        let endpoint = finding.kind == Kind::Altered && finding.place.starts_with("nat KUBE-SEP-");
        if !endpoint && !finding.effect.starts_with("none") {
            NOT_JUDGED.clone_into(&mut finding.effect);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Family;
    use crate::rules::iptables::{check, parse};

    /// One Service as kube-proxy 1.36 writes it.
    const NEW: &str = "*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-EXT-67NZLRHBNDSAWJRO - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-SEP-GXKVICYM64SODBWJ - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-67NZLRHBNDSAWJRO - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A KUBE-EXT-67NZLRHBNDSAWJRO -m comment --comment \"masquerade traffic for shop/web:http external destinations\" -j KUBE-MARK-MASQ
-A KUBE-EXT-67NZLRHBNDSAWJRO -j KUBE-SVC-67NZLRHBNDSAWJRO
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-NODEPORTS -p tcp -m comment --comment \"shop/web:http\" -m tcp --dport 30080 -j KUBE-EXT-67NZLRHBNDSAWJRO
-A KUBE-SEP-GXKVICYM64SODBWJ -p tcp -m comment --comment \"shop/web:http\" -m tcp -j DNAT --to-destination 10.244.0.11:8080
-A KUBE-SERVICES -d 10.96.10.1/32 -p tcp -m comment --comment \"shop/web:http cluster IP\" -m tcp --dport 80 -j KUBE-SVC-67NZLRHBNDSAWJRO
-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-SVC-67NZLRHBNDSAWJRO ! -s 10.244.0.0/16 -d 10.96.10.1/32 -p tcp -m comment --comment \"shop/web:http cluster IP\" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-67NZLRHBNDSAWJRO -m comment --comment \"shop/web:http -> 10.244.0.11:8080\" -j KUBE-SEP-GXKVICYM64SODBWJ
COMMIT
";

    /// The same as kube-proxy 1.20 writes it.
    fn old() -> String {
        let masquerade = "-A KUBE-SERVICES ! -s 10.244.0.0/16 -d 10.96.10.1/32 -p tcp -m comment --comment \
            \"shop/web:http cluster IP\" -m tcp --dport 80 -j KUBE-MARK-MASQ\n";
        let node_port = "-A KUBE-NODEPORTS -p tcp -m comment --comment \"shop/web:http\" -m tcp --dport 30080 -j ";
        let mut old = String::new();
        for line in NEW.lines() {
            if line.contains("KUBE-PROXY-FIREWALL")
                || line.contains("A KUBE-EXT-")
                || line.starts_with(":KUBE-EXT-")
                || line.contains("-SVC-67NZLRHBNDSAWJRO ! -s")
            {
                continue;
            }
            if line.starts_with("-A KUBE-SERVICES -d") {
                old.push_str(masquerade);
            }
            if line.starts_with("-A KUBE-NODEPORTS") {
                for to in ["KUBE-MARK-MASQ", "KUBE-SVC-67NZLRHBNDSAWJRO"] {
                    old.extend([node_port, to, "\n"]);
                }
                continue;
            }
            if line.starts_with("-A KUBE-FORWARD") {
                for way in [
                    "conntrack pod source rule",
                    "conntrack pod destination rule",
                ] {
                    old.extend([&line.replace("conntrack rule", way), "\n"]);
                }
                continue;
            }
            old.push_str(&line.replace(" -> 10.244.0.11:8080", ""));
            old.push('\n');
        }
        old
    }

    fn tables(text: &str) -> Tables<'_> {
        parse(text, Family::V4).expect("a dump")
    }

    #[test]
    fn another_version_is_recognised() {
        let sign = |text: &str| of_another_version(&tables(text), Mode::IptablesLegacy);
        let old = old();
        assert_eq!(sign(NEW), None);
        assert!(sign(&old).is_some_and(|sign| sign.contains("in KUBE-SERVICES")));
        let outside = old.replace(
            ":KUBE-SERVICES - ",
            ":KUBE-XLB-67NZLRHBNDSAWJRO - [0:0]\n:KUBE-SERVICES - ",
        );
        assert!(sign(&outside).is_some_and(|sign| sign.contains("KUBE-XLB-")));
        let without = NEW.lines().filter(|line| !line.contains("FIREWALL"));
        let without: String = without.flat_map(|line| [line, "\n"]).collect();
        assert!(sign(&without).is_some_and(|sign| sign.contains("no KUBE-PROXY-FIREWALL")));
        // Somebody took the chain away, and left what refers to it.
        let broken = NEW.replace(":KUBE-PROXY-FIREWALL - [0:0]\n", "");
        assert!(parse(&broken, Family::V4).is_err() || sign(&broken).is_none());
        assert_eq!(of_another_version(&tables(&old), Mode::Ipvs), None);
    }

    #[test]
    fn what_another_version_does_by_other_rules_is_not_called_a_fault() {
        let old = old().replace("10.244.0.11:8080", "10.244.0.99:8080");
        let mut findings = check(&tables(NEW), &tables(&old), Mode::IptablesLegacy);
        do_not_judge(&mut findings);
        let judged: Vec<&str> = findings
            .iter()
            .map(|finding| finding.effect.as_str())
            .filter(|effect| *effect != NOT_JUDGED && !effect.starts_with("none"))
            .collect();
        assert_eq!(
            judged,
            ["new flows that choose this endpoint go to 10.244.0.99 port 8080 instead"]
        );
        assert!(findings.len() > 5, "{findings:#?}");
    }

    #[test]
    fn what_another_rule_sends_on_is_translated() {
        let to = |chain: &str| format!("--dport 30080 -j {chain}");
        let marked = NEW.replace(&to("KUBE-EXT-67NZLRHBNDSAWJRO"), &to("KUBE-MARK-MASQ"));
        let effect = |found: &str| {
            let findings = check(&tables(NEW), &tables(found), Mode::IptablesLegacy);
            findings[0].effect.clone()
        };
        assert_eq!(
            effect(&marked),
            "packets are only marked to be masqueraded; packets to the NodePort are not translated: the node \
             refuses them"
        );
        let marking = marked.lines().find(|line| line.contains("--dport 30080"));
        let marking = marking.expect("there");
        let sent_on = marking.replace("KUBE-MARK-MASQ", "KUBE-SVC-67NZLRHBNDSAWJRO");
        let both = marked.replace(marking, &[marking, &sent_on].join("\n"));
        assert_eq!(
            effect(&both),
            "packets are marked to be masqueraded, and go to KUBE-SVC-67NZLRHBNDSAWJRO instead"
        );
    }

    #[test]
    fn rules_that_only_mark_take_nothing_out() {
        let effect = |put: &str| {
            let at = "-A KUBE-SERVICES -d";
            let found = NEW.replacen(at, &format!("{put}\n{at}"), 1);
            let findings = check(&tables(NEW), &tables(&found), Mode::IptablesLegacy);
            let [finding] = &findings[..] else {
                panic!("{findings:#?}");
            };
            finding.effect.clone()
        };
        let to = "-A KUBE-SERVICES -d 10.96.10.9/32 -j";
        assert_eq!(
            effect(&format!("{to} KUBE-MARK-MASQ")),
            "packets that match are marked to be masqueraded; where they go is for the rules after it"
        );
        assert_eq!(
            effect(&format!("{to} RETURN")),
            "packets that match are taken out of the Service's rules"
        );
        let forward = "-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack";
        let twice = NEW.replace(
            &format!("{forward} rule\""),
            &format!(
                "{forward} rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n{forward} again\""
            ),
        );
        let findings = check(&tables(NEW), &tables(&twice), Mode::IptablesLegacy);
        assert_eq!(
            findings[0].effect,
            "none: another rule of the chain does the same"
        );
    }
}
