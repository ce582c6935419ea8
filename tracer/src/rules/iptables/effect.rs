//! What a packet suffers from a rule that is missing, altered or not called for.

use super::chains::ChainKind;
use super::rule::{Chain, Match, Rule, Target};
use crate::rules::check::Kind;

/// Of a dump that cannot be whole.
pub(super) const CUT: &str =
    "the dump does not declare this chain: it was cut or edited, and cannot be relied on";

/// Of a rule that the kernel would hold as called for, in words that `iptables-save` does not use.
pub(super) const REWRITTEN: &str =
    "none if the kernel holds it; but it never prints it so: the dump was edited";

/// Of a chain that is not there, or is empty.
pub(super) const fn missing_chain(kind: ChainKind) -> &'static str {
    match kind {
        ChainKind::Service | ChainKind::LocalService => {
            "no endpoint is chosen: new flows leave the node untranslated and hang"
        }
        ChainKind::External => {
            "new flows from outside the cluster (NodePort, external IP, load balancer) are not \
             translated and hang"
        }
        ChainKind::LoadBalancer => {
            "clients of the load balancer are dropped, whatever range they are in"
        }
        ChainKind::Endpoint => "new flows that choose this endpoint are not translated and hang",
        ChainKind::Canary => {
            "kube-proxy takes all rules as flushed at its next look, and installs them again"
        }
        ChainKind::MarkMasquerade => {
            "nothing is masqueraded: answers to clients outside the pod network pass the node by, \
             and their flows hang"
        }
        _ => "what the chain does to the packets of all Services is not done",
    }
}

/// Of the right rules in the wrong order.
pub(super) const fn out_of_order(kind: ChainKind) -> &'static str {
    match kind {
        ChainKind::Service | ChainKind::LocalService => {
            "new flows are spread unevenly over the endpoints, or miss them"
        }
        ChainKind::Services => {
            "packets to an address of the node's own are taken as NodePort traffic before the \
             Service's rule is asked"
        }
        _ => "an earlier rule decides what a later one should have",
    }
}

/// Of a rule that is called for and not there.
pub(super) fn missing(table: &str, kind: ChainKind, chain: &Chain<'_>, rule: &Rule<'_>) -> String {
    if matches!(kind, ChainKind::Service | ChainKind::LocalService)
        && is_choice(rule)
        && chain.rules.last() == Some(rule)
    {
        let endpoints = chain.rules.iter().filter(|rule| is_choice(rule)).count();
        return format!(
            "the endpoint gets no flows, and 1 of {endpoints} new flows is not translated and hangs"
        );
    }
    without(table, kind, rule).to_owned()
}

/// Is it a rule that chooses an endpoint, but not one of session affinity?
fn is_choice(rule: &Rule<'_>) -> bool {
    leads_to(rule, ChainKind::Endpoint) && !has_recent(rule)
}

fn has_recent(rule: &Rule<'_>) -> bool {
    let recent = |part: &Match<'_>| matches!(part, Match::Recent(_));
    rule.matches.iter().any(recent)
}

fn leads_to(rule: &Rule<'_>, kind: ChainKind) -> bool {
    rule.chain()
        .is_some_and(|chain| ChainKind::of("nat", chain) == kind)
}

const fn is_masquerading(target: &Target<'_>) -> bool {
    matches!(target, Target::Jump(chain) if matches!(chain.as_bytes(), b"KUBE-MARK-MASQ"))
}

/// What happens without the rule.
fn without(table: &str, kind: ChainKind, rule: &Rule<'_>) -> &'static str {
    let masquerades = is_masquerading(&rule.target);
    match (kind, &rule.target) {
        (ChainKind::Services, Target::Jump("KUBE-NODEPORTS")) => {
            "packets to NodePorts are not translated: the node takes them in, and mostly refuses"
        }
        (ChainKind::Services, _)
            if leads_to(rule, ChainKind::Service) || leads_to(rule, ChainKind::LocalService) =>
        {
            "packets to the ClusterIP leave the node untranslated, and nobody answers"
        }
        (ChainKind::Services, Target::Jump(_)) if !masquerades => {
            "packets to this address are not translated: they go where routing takes them, and \
             nobody answers"
        }
        (ChainKind::NodePorts, _) if rule.destination.is_some() => {
            "packets to the NodePort at a loopback address are not counted"
        }
        (ChainKind::NodePorts, _) => {
            "packets to the NodePort are not translated: the node refuses them"
        }
        (ChainKind::Postrouting, Target::Return) => {
            "every packet that leaves the node is masqueraded: endpoints do not see their clients' \
             addresses"
        }
        (ChainKind::Postrouting, Target::Mark(_)) => {
            "the mark stays on packets that enter a tunnel, and they are masqueraded once more"
        }
        (ChainKind::Postrouting | ChainKind::MarkMasquerade, _) => {
            "nothing is masqueraded: answers to clients outside the pod network pass the node by, \
             and their flows hang"
        }
        (ChainKind::Service | ChainKind::LocalService, _) if masquerades => {
            "clients outside the pod network keep their addresses: answers pass the node by, and \
             the flows hang"
        }
        (ChainKind::Service | ChainKind::LocalService, _) if has_recent(rule) => {
            "clients do not stay with the endpoint (session affinity)"
        }
        (ChainKind::Service | ChainKind::LocalService, _) => {
            "the endpoint gets no new flows; the others get its share"
        }
        (ChainKind::External, _) if masquerades => {
            "clients outside the cluster keep their addresses: answers from endpoints on other \
             nodes pass the node by, and the flows hang"
        }
        (ChainKind::External, _) if rule.source.is_some() || rule.in_interface.is_some() => {
            "pods that use an external address of the Service reach only endpoints on this node"
        }
        (ChainKind::External, _) if !rule.matches.is_empty() => {
            "the node's own packets to an external address of the Service reach only endpoints on \
             this node"
        }
        (ChainKind::External, _) => {
            "new flows from outside the cluster (NodePort, external IP, load balancer) are not \
             translated and hang"
        }
        (ChainKind::LoadBalancer, Target::None) => "none: the rule only carries a comment",
        (ChainKind::LoadBalancer, _) => {
            "clients in this range, which the Service allows, are dropped"
        }
        (ChainKind::Endpoint, Target::Dnat(_)) => {
            "new flows that choose this endpoint are not translated and hang"
        }
        (ChainKind::Endpoint, _) => {
            "a pod that the Service sends to itself (hairpin) gets no answer"
        }
        (ChainKind::Refusals, Target::Reject(_)) => {
            "clients hang until they time out instead of being refused at once"
        }
        (ChainKind::Refusals, _) => {
            "packets that no endpoint on this node can take go on untranslated instead of being \
             dropped"
        }
        (ChainKind::HealthChecks, _) => {
            "where INPUT drops by default, the load balancer's health checks fail and it sends \
             nothing to this node"
        }
        (ChainKind::SourceRanges, _) => {
            "clients outside the load balancer's source ranges are not dropped"
        }
        (ChainKind::Forward, Target::Drop) => {
            "packets that conntrack cannot place are forwarded untranslated, and reset their flows"
        }
        (ChainKind::Forward, _) => {
            "where FORWARD drops by default, packets of Services are dropped"
        }
        (ChainKind::Firewall, _) => {
            "neighbours on the network reach what listens on the node's loopback addresses"
        }
        (_, Target::Accept) if table == "nat" => {
            "packets to a Service's address go on to the rules after this one"
        }
        _ if masquerades => {
            "clients outside the pod network keep their addresses: answers pass the node by, and \
             the flows hang"
        }
        (ChainKind::Ipvs, Target::Drop | Target::Reject(_)) => {
            "packets that should be stopped reach the node or a load balancer's endpoints"
        }
        (ChainKind::Ipvs, _) => {
            "packets to a Service fall to the rules after this one, which refuse, drop or \
             masquerade them"
        }
        _ => "what the rule does to the packets of all Services is not done",
    }
}

/// Of a rule that is there, but not as called for.
pub(super) fn altered(
    table: &str,
    kind: ChainKind,
    chain: &Chain<'_>,
    there: &Chain<'_>,
    expected: &Rule<'_>,
    found: &Rule<'_>,
) -> String {
    if differ_in_comments(expected, found) {
        return "none: only the comment differs".to_owned();
    }
    match (&expected.target, &found.target) {
        (Target::Dnat(_), Target::Dnat(dnat)) if expected.target != found.target => {
            let port = dnat
                .port
                .map_or(String::new(), |port| format!(" port {port}"));
            match dnat.address {
                Some(address) => {
                    format!("new flows that choose this endpoint go to {address}{port} instead")
                }
                None => format!("new flows that choose this endpoint are not sent there{port}"),
            }
        }
        (Target::Jump(_), Target::Jump(other))
            if expected.target != found.target
                && ChainKind::of(table, other) != ChainKind::Foreign =>
        {
            let instead = if is_masquerading(&found.target) {
                if let Some(to) = sent_on(there, found) {
                    return format!("packets are marked to be masqueraded, and go to {to} instead");
                }
                "packets are only marked to be masqueraded".to_owned()
            } else {
                format!("packets go to {other} instead")
            };
            format!("{instead}; {}", missing(table, kind, chain, expected))
        }
        _ if is_choice(expected) && is_choice(found) => {
            "new flows are spread unevenly over the endpoints".to_owned()
        }
        _ => format!(
            "for packets that this does not match or does otherwise: {}",
            missing(table, kind, chain, expected)
        ),
    }
}

/// The chain to which another rule of this chain sends what this one matches.
fn sent_on<'a>(chain: &Chain<'a>, marking: &Rule<'_>) -> Option<&'a str> {
    let sends_on = |rule: &&Rule<'a>| {
        let target = rule.target.clone();
        !is_masquerading(&target)
            && differ_in_comments(
                rule,
                &Rule {
                    target,
                    ..marking.clone()
                },
            )
    };
    chain.rules.iter().find(sends_on)?.chain()
}

/// Are they one rule but for comments?
pub(super) fn differ_in_comments(expected: &Rule<'_>, found: &Rule<'_>) -> bool {
    fn bare<'a>(rule: &Rule<'a>) -> Rule<'a> {
        let mut rule = rule.clone();
        let parts = rule.matches.iter();
        let parts = parts.filter(|part| !matches!(part, Match::Comment(_)));
        rule.matches = parts.cloned().collect();
        rule
    }
    bare(expected) == bare(found)
}

/// Of a rule that is not called for.
pub(super) fn extra(
    finding: Kind,
    kind: ChainKind,
    chain: &Chain<'_>,
    rule: &Rule<'_>,
    twice: bool,
    same: bool,
) -> String {
    let choice = matches!(kind, ChainKind::Service | ChainKind::LocalService) && is_choice(rule);
    match finding {
        Kind::Stale if choice => {
            let endpoints = chain.rules.iter().filter(|rule| is_choice(rule)).count();
            format!("1 of {endpoints} new flows goes to an endpoint that is gone, and hangs")
        }
        _ if twice && choice => "this endpoint gets more than its share of new flows".to_owned(),
        _ if twice => "the rule stands twice: each packet that comes by pays for both".to_owned(),
        Kind::Extra if same => "none: another rule of the chain does the same".to_owned(),
        Kind::Stale if kind == ChainKind::Refusals => {
            "packets are refused or dropped for a Service that is gone or has endpoints".to_owned()
        }
        Kind::Stale => {
            "packets are treated as those of a Service, endpoint or address that is gone".to_owned()
        }
        Kind::Leftover => "packets are taken to the rules of a mode that is gone".to_owned(),
        _ if is_masquerading(&rule.target) => {
            "packets that match are marked to be masqueraded; where they go is for the rules after it"
                .to_owned()
        }
        _ => match rule.target {
            Target::Drop | Target::Reject(_) => {
                "packets that match are stopped before the Service's rules".to_owned()
            }
            Target::None => "none: the rule only counts".to_owned(),
            Target::Mark(_) => "packets that match are marked".to_owned(),
            // It may be anything: a log, a trace, another's way out.
            Target::Other(_) => "what the rule says is done to packets that match".to_owned(),
            _ => "packets that match are taken out of the Service's rules".to_owned(),
        },
    }
}

/// Of a jump from a built-in chain that is not there.
pub(super) fn missing_jump(table: &str, base: &str, rule: &Rule<'_>) -> &'static str {
    let target = rule.chain().unwrap_or_default();
    match (table, base, ChainKind::of(table, target)) {
        ("nat", "PREROUTING", _) => {
            "packets of pods and from the network to any Service are not translated: they leave \
             the node as they are, and nobody answers"
        }
        ("nat", "OUTPUT", _) => {
            "the node's own packets to any Service are not translated: they leave the node as they \
             are, and nobody answers"
        }
        ("nat", _, _) => {
            "nothing is masqueraded: answers to clients outside the pod network pass the node by, \
             and their flows hang"
        }
        (_, _, ChainKind::Refusals) => {
            "clients of Services without endpoints hang until they time out instead of being \
             refused at once"
        }
        (_, _, ChainKind::HealthChecks) => {
            "where INPUT drops by default, load balancers' health checks fail and they send \
             nothing to this node"
        }
        (_, _, ChainKind::Forward) => {
            "where FORWARD drops by default, packets of Services are dropped; invalid ones are \
             forwarded, and reset their flows"
        }
        (_, _, ChainKind::SourceRanges) => "load balancers' source ranges are not enforced",
        (_, _, ChainKind::Firewall) => {
            "neighbours on the network reach what listens on the node's loopback addresses"
        }
        (_, _, ChainKind::Ipvs) => {
            "packets to a Service's address and another port reach what listens on the node"
        }
        _ => "what the chain does to the packets of all Services is not done",
    }
}

/// Of a jump from a built-in chain that is there, but not as called for.
pub(super) fn altered_jump(
    table: &str,
    base: &str,
    expected: &Rule<'_>,
    found: &Rule<'_>,
) -> String {
    if differ_in_comments(expected, found) {
        return "none: only the comment differs".to_owned();
    }
    format!(
        "for packets that this does not match or does otherwise: {}",
        missing_jump(table, base, expected)
    )
}

/// Of a jump from a built-in chain that is not called for.
pub(super) const fn extra_jump(finding: Kind, twice: bool) -> &'static str {
    match finding {
        _ if twice => "the jump stands twice: each packet that comes by pays for both",
        Kind::Leftover => "packets are taken to the rules of a mode that is gone",
        _ => "packets are taken to kube-proxy's rules where it would not",
    }
}

/// Of a chain that is not called for.
pub(super) const fn chain_not_called_for(finding: Kind, kind: ChainKind) -> &'static str {
    match (finding, kind) {
        (Kind::Leftover, ChainKind::Canary) => "none: kube-proxy of another mode left it behind",
        (Kind::Leftover, _) => {
            "a mode that is gone left it behind; packets that still get there are treated by rules \
             that nobody keeps up"
        }
        (_, ChainKind::Endpoint) => "the endpoint is gone; new flows that get here hang",
        _ => "the Service is gone, or has no use for it; packets that get here are misled",
    }
}
