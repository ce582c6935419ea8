//! Whose chain is it? Kube-proxy's chains by name, and the Services behind the hashes.

use std::collections::{HashMap, HashSet};

use super::rule::Tables;
use crate::rules::Mode;

/// What a chain is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ChainKind {
    /// nat `KUBE-SERVICES`: from a Service's address to its chain.
    Services,
    /// nat `KUBE-NODEPORTS`: from a NodePort to its Service's chain.
    NodePorts,
    /// nat `KUBE-POSTROUTING`.
    Postrouting,
    /// nat `KUBE-MARK-MASQ`.
    MarkMasquerade,
    /// filter `KUBE-SERVICES`, `KUBE-EXTERNAL-SERVICES`: refusals.
    Refusals,
    /// filter `KUBE-NODEPORTS`: health checks.
    HealthChecks,
    /// filter `KUBE-PROXY-FIREWALL` and its like in IPVS mode: source ranges.
    SourceRanges,
    /// filter `KUBE-FORWARD`.
    Forward,
    /// filter `KUBE-FIREWALL`, which the kubelet also writes to.
    Firewall,
    /// `KUBE-SVC-`: the choice of an endpoint.
    Service,
    /// `KUBE-SVL-`: the choice of an endpoint on this node.
    LocalService,
    /// `KUBE-EXT-` and `KUBE-XLB-`: traffic from outside.
    External,
    /// `KUBE-FW-`: a load balancer's source ranges.
    LoadBalancer,
    /// `KUBE-SEP-`: one endpoint.
    Endpoint,
    /// `KUBE-PROXY-CANARY`.
    Canary,
    /// Chains that only IPVS mode has.
    Ipvs,
    /// The kubelet's own.
    Kubelet,
    /// Anybody else's.
    Foreign,
}

impl ChainKind {
    /// By the names of the table and chain.
    pub(super) fn of(table: &str, chain: &str) -> Self {
        let Some(name) = chain.strip_prefix("KUBE-") else {
            return Self::Foreign;
        };
        let nat = table == "nat";
        match name {
            "SERVICES" if nat => Self::Services,
            "NODEPORTS" if nat => Self::NodePorts,
            "POSTROUTING" => Self::Postrouting,
            "MARK-MASQ" => Self::MarkMasquerade,
            "SERVICES" | "EXTERNAL-SERVICES" => Self::Refusals,
            "NODEPORTS" => Self::HealthChecks,
            "PROXY-FIREWALL" => Self::SourceRanges,
            "FORWARD" => Self::Forward,
            "FIREWALL" => Self::Firewall,
            "PROXY-CANARY" => Self::Canary,
            "NODE-PORT"
            | "LOAD-BALANCER"
            | "SOURCE-RANGES-FIREWALL"
            | "IPVS-FILTER"
            | "IPVS-OUT-FILTER" => Self::Ipvs,
            "KUBELET-CANARY" | "IPTABLES-HINT" | "MARK-DROP" => Self::Kubelet,
            _ => match name.split_once('-') {
                Some(("SVC", _)) => Self::Service,
                Some(("SVL", _)) => Self::LocalService,
                Some(("EXT" | "XLB", _)) => Self::External,
                Some(("FW", _)) => Self::LoadBalancer,
                Some(("SEP", _)) => Self::Endpoint,
                _ => Self::Foreign,
            },
        }
    }

    /// Is it a chain of one Service or endpoint?
    pub(super) const fn is_of_one_service(self) -> bool {
        matches!(
            self,
            Self::Service
                | Self::LocalService
                | Self::External
                | Self::LoadBalancer
                | Self::Endpoint
        )
    }

    /// Does kube-proxy write the Services' rules in this chain in random order?
    pub(super) fn is_in_random_order(self, chain: &str, mode: Mode) -> bool {
        match self {
            Self::Services
            | Self::NodePorts
            | Self::Refusals
            | Self::HealthChecks
            | Self::SourceRanges => mode != Mode::Ipvs,
            Self::Ipvs => chain == "KUBE-IPVS-OUT-FILTER",
            _ => false,
        }
    }

    /// Is it a chain that kube-proxy writes in other modes than this?
    pub(super) const fn is_of_another_mode(self, mode: Mode) -> bool {
        match self {
            Self::Foreign | Self::Kubelet | Self::Firewall => false,
            Self::Ipvs => !matches!(mode, Mode::Ipvs),
            Self::NodePorts | Self::Refusals | Self::HealthChecks | Self::Canary => {
                !matches!(mode, Mode::IptablesLegacy | Mode::IptablesNft)
            }
            kind if kind.is_of_one_service() => {
                !matches!(mode, Mode::IptablesLegacy | Mode::IptablesNft)
            }
            _ => matches!(mode, Mode::Nftables),
        }
    }
}

/// The Service `ns/name:port` that a comment of kube-proxy's names.
pub(super) fn service_of(comment: &str) -> Option<&str> {
    comment.split(' ').find(|word| {
        let allowed = |byte: u8| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.')
        };
        word.split_once('/').is_some_and(|(namespace, rest)| {
            let (name, port) = rest.split_once(':').unwrap_or((rest, ""));
            !namespace.is_empty()
                && !name.is_empty()
                && [namespace, name, port]
                    .iter()
                    .all(|part| part.bytes().all(allowed))
        })
    })
}

/// The Services behind the hashes in chains' names, as the rules tell: by their comments, which
/// the rules of the shared chains have always, and by who jumps to whom.
pub(super) struct Names<'t> {
    by_key: HashMap<&'t str, &'t str>,
    services: HashSet<&'t str>,
}

impl<'t> Names<'t> {
    pub(super) fn of(tables: &'t Tables<'_>) -> Self {
        let mut names = Self {
            by_key: HashMap::new(),
            services: HashSet::new(),
        };
        let chains = || tables.list.iter().flat_map(|table| &table.chains);
        for chain in chains().filter(|chain| chain.name.starts_with("KUBE-")) {
            for rule in &chain.rules {
                let Some(service) = rule.comment().and_then(service_of) else {
                    continue;
                };
                names.services.insert(service);
                for chain in [Some(chain.name), rule.chain()].into_iter().flatten() {
                    if let Some(key) = key(chain) {
                        names.by_key.entry(key).or_insert(service);
                    }
                }
            }
        }
        // Of large clusters, the rules of endpoints have no comments.
        for chain in chains() {
            let Some(service) = key(chain.name).and_then(|key| names.by_key.get(key).copied())
            else {
                continue;
            };
            for target in chain.rules.iter().filter_map(super::rule::Rule::chain) {
                if ChainKind::of("nat", target) == ChainKind::Endpoint {
                    names.by_key.entry(target).or_insert(service);
                }
            }
        }
        names
    }

    /// The Service that a chain is of.
    pub(super) fn service(&self, chain: &str) -> Option<&'t str> {
        self.by_key.get(key(chain)?).copied()
    }

    /// Do the rules name this Service?
    pub(super) fn has(&self, service: &str) -> bool {
        self.services.contains(service)
    }
}

/// What the chains of one Service have in common in their names; an endpoint's is its own.
pub(super) fn key(chain: &str) -> Option<&str> {
    match ChainKind::of("nat", chain) {
        ChainKind::Endpoint => Some(chain),
        kind if kind.is_of_one_service() => chain.splitn(3, '-').nth(2),
        _ => None,
    }
}
