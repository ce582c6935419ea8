//! Pure: a cluster compiled to the rules that kube-proxy would install.
//!
//! [`render`] gives what kube-proxy 1.36 installs at its first sync, [`sync`] what it sends when the
//! cluster has changed. Services keep the cluster's order, where kube-proxy's is that of a Go map
//! and changes at every sync.

use std::fmt;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::cluster::{Cluster, Family};

#[cfg(test)]
pub(crate) mod arbitrary;
pub mod check;
pub mod dump;
mod files;
pub mod iptables;
pub mod ipvs;
pub mod names;
pub mod nftables;
mod node;
pub mod oracle;
mod ports;
pub mod services;
mod sync;
pub mod walk;

pub use files::RuleFile;
pub use node::{NodePortAddresses, NodeView, UnknownNode};
use ports::Ports;

/// How a node's Services are implemented.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// kube-proxy's iptables mode over `x_tables` (`iptables-legacy`).
    IptablesLegacy,
    /// kube-proxy's iptables mode over `nf_tables` (`iptables-nft`).
    IptablesNft,
    /// kube-proxy's IPVS mode.
    Ipvs,
    /// kube-proxy's nftables mode.
    Nftables,
}

impl Mode {
    /// Every mode, in the order reports show them.
    pub const ALL: [Self; 4] = [
        Self::IptablesLegacy,
        Self::IptablesNft,
        Self::Ipvs,
        Self::Nftables,
    ];

    /// The mode's name, everywhere: `iptables-legacy`, `iptables-nft`, `ipvs`, `nftables`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::IptablesLegacy => "iptables-legacy",
            Self::IptablesNft => "iptables-nft",
            Self::Ipvs => "ipvs",
            Self::Nftables => "nftables",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A mode's name that is none.
#[derive(Debug, thiserror::Error)]
#[error("unknown mode '{0}': use iptables-legacy, iptables-nft, ipvs or nftables")]
pub struct UnknownMode(String);

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.name() == s)
            .ok_or_else(|| UnknownMode(s.to_owned()))
    }
}

/// What a mode put into the kernel, counted in the kernel after applying.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RuleCounts {
    /// iptables or nftables rules.
    pub rules: u64,
    /// nftables set and map elements, or ipset entries.
    pub elements: u64,
    /// IPVS virtual servers.
    pub virtual_servers: u64,
    /// IPVS real servers, over all virtual servers.
    pub real_servers: u64,
}

impl RuleCounts {
    /// Everything together.
    pub fn total(self) -> u64 {
        self.rules + self.elements + self.virtual_servers + self.real_servers
    }
}

impl Family {
    /// nft's name of the family: `ip`, `ip6`.
    pub const fn nft(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }

    const fn nft_address(self) -> &'static str {
        match self {
            Self::V4 => "ipv4_addr",
            Self::V6 => "ipv6_addr",
        }
    }

    /// The usual length of `ip:port`.
    const fn socket_capacity(self) -> usize {
        match self {
            Self::V4 => 24,
            Self::V6 => 48,
        }
    }
}

/// Which kernel interface `iptables` talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// `x_tables`.
    Legacy,
    /// `nf_tables` with its `x_tables` compatibility.
    Nft,
}

impl Backend {
    /// The name of the tool: `iptables-legacy`, `ip6tables-nft`.
    pub const fn tool(self, family: Family) -> &'static str {
        match (self, family) {
            (Self::Legacy, Family::V4) => "iptables-legacy",
            (Self::Legacy, Family::V6) => "ip6tables-legacy",
            (Self::Nft, Family::V4) => "iptables-nft",
            (Self::Nft, Family::V6) => "ip6tables-nft",
        }
    }
}

impl Mode {
    /// The iptables back end of the mode's iptables rules.
    ///
    /// In IPVS mode it is `iptables-nft`, which is what `iptables` is on today's distributions and
    /// what kube-proxy's image chooses there.
    pub const fn backend(self) -> Option<Backend> {
        match self {
            Self::IptablesLegacy => Some(Backend::Legacy),
            Self::IptablesNft | Self::Ipvs => Some(Backend::Nft),
            Self::Nftables => None,
        }
    }
}

/// A kernel parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// Path under `/proc/sys`.
    pub path: &'static str,
    /// Value.
    pub value: &'static str,
    /// What a kernel without it lacks; `None` if the mode works without.
    pub needed_for: Option<&'static str>,
}

/// One step of installing rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Set a kernel parameter.
    Sysctl(Sysctl),
    /// Make an nfacct object.
    Accounting(&'static str),
    /// `iptables-restore --noflush`.
    Iptables {
        /// IP family.
        family: Family,
        /// Back end.
        backend: Backend,
        /// Standard input.
        text: String,
    },
    /// `ipvsadm -R`.
    Servers {
        /// Standard input.
        text: String,
    },
    /// Make [`ipvs::LINK`], unless it is there, and have it hold exactly these addresses.
    Addresses {
        /// The virtual servers' addresses.
        addresses: Vec<IpAddr>,
    },
    /// `ipset restore`.
    Sets {
        /// Standard input.
        text: String,
    },
    /// `nft -f -`.
    Nft {
        /// IP family.
        family: Family,
        /// Standard input.
        text: String,
    },
}

/// Everything kube-proxy installs, in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSet {
    /// The mode.
    pub mode: Mode,
    /// The steps; each text can be loaded as written into a kernel without rules.
    pub steps: Vec<Step>,
}

impl RuleSet {
    /// What the kernel holds once every step is done.
    pub fn expected_counts(&self) -> RuleCounts {
        fn lines(text: &str, prefix: &str) -> u64 {
            text.lines().filter(|line| line.starts_with(prefix)).count() as u64
        }
        let mut counts = RuleCounts::default();
        for step in &self.steps {
            match step {
                Step::Sysctl(_) | Step::Accounting(_) | Step::Addresses { .. } => {}
                Step::Iptables { text, .. } => counts.rules += lines(text, "-"),
                Step::Servers { text } => {
                    counts.virtual_servers += lines(text, "-A ");
                    counts.real_servers += lines(text, "-a ");
                }
                Step::Sets { text } => counts.elements += lines(text, "add "),
                Step::Nft { text, .. } => {
                    counts.rules += lines(text, "add rule ");
                    counts.elements += lines(text, "\t");
                }
            }
        }
        counts
    }

    /// Every step as the commands an operator could run, for people to read.
    pub fn script(&self) -> String {
        let mut script = files::needs(&self.steps);
        let mut heredoc = |command: &str, text: &str| {
            // Writing into a String cannot fail, here and below.
            let _ = write!(script, "{command} <<'END'\n{text}END\n");
        };
        let mut bound: &[IpAddr] = &[];
        for step in &self.steps {
            match step {
                Step::Sysctl(Sysctl { path, value, .. }) => {
                    heredoc(&format!("cat > /proc/sys/{path}"), &format!("{value}\n"));
                }
                Step::Accounting(name) => heredoc("sh", &format!("nfacct add {name}\n")),
                Step::Iptables {
                    family,
                    backend,
                    text,
                } => heredoc(
                    &format!("{}-restore --noflush", backend.tool(*family)),
                    text,
                ),
                Step::Servers { text } => heredoc("ipvsadm -R", text),
                Step::Addresses { addresses } => {
                    let link = ipvs::LINK;
                    let make = format!(
                        "ip link show {link} > /dev/null 2>&1 || ip link add {link} type dummy\n"
                    );
                    heredoc("sh", &make);
                    heredoc("ip -batch -", &files::address_batch(bound, addresses));
                    bound = addresses;
                }
                Step::Sets { text } => heredoc("ipset restore", text),
                Step::Nft { text, .. } => heredoc("nft -f -", text),
            }
        }
        script
    }
}

const FORWARDING: [Sysctl; 2] = [
    Sysctl {
        path: "net/ipv4/ip_forward",
        value: "1",
        needed_for: Some("forwarding to pods"),
    },
    Sysctl {
        path: "net/ipv6/conf/all/forwarding",
        value: "1",
        needed_for: None,
    },
];

/// iptables mode serves NodePorts on loopback addresses too.
const ROUTE_LOCALNET: Sysctl = Sysctl {
    path: "net/ipv4/conf/all/route_localnet",
    value: "1",
    needed_for: None,
};

/// `NewProxier` of `pkg/proxy/ipvs/proxier.go`. `conn_reuse_mode` is left alone from kernel 5.9 on,
/// and `arp_ignore` and `arp_announce` are only set with `--ipvs-strict-arp`.
const IPVS_SYSCTLS: [Sysctl; 3] = [
    Sysctl {
        path: "net/ipv4/vs/conntrack",
        value: "1",
        needed_for: Some("IPVS with conntrack (module ip_vs, CONFIG_IP_VS_NFCT)"),
    },
    Sysctl {
        path: "net/ipv4/vs/expire_nodest_conn",
        value: "1",
        needed_for: None,
    },
    Sysctl {
        path: "net/ipv4/vs/expire_quiescent_template",
        value: "1",
        needed_for: None,
    },
];

/// The `ServicePort`s of both families.
type Families<'a> = [(Family, Ports<'a>); 2];

fn families<'a>(cluster: &'a Cluster, node: &NodeView) -> Families<'a> {
    Family::ALL.map(|family| (family, Ports::new(cluster, node, family)))
}

fn plans<'a>(families: &'a Families<'a>, node: &'a NodeView) -> [ipvs::Plan<'a>; 2] {
    [0, 1].map(|index| {
        let (family, ports) = &families[index];
        ipvs::Plan::new(ports, node, *family)
    })
}

/// Compiles a cluster to what kube-proxy installs on `node` in `mode`, for both IP families.
///
/// Forwarding is switched on in every mode: kube-proxy does so itself only in IPVS mode, a node's
/// other software in the others.
pub fn render(cluster: &Cluster, node: &NodeView, mode: Mode) -> RuleSet {
    let mut steps: Vec<Step> = FORWARDING.map(Step::Sysctl).into();
    let families = families(cluster, node);
    match mode {
        Mode::IptablesLegacy | Mode::IptablesNft => {
            if node.serves_localhost(Family::V4) {
                steps.push(Step::Sysctl(ROUTE_LOCALNET));
            }
            if node.nfacct {
                steps.push(Step::Accounting(iptables::INVALID_DROPPED));
                steps.push(Step::Accounting(iptables::LOCALHOST_NODE_PORTS));
            }
            for (family, ports) in &families {
                steps.push(Step::Iptables {
                    family: *family,
                    backend: iptables_backend(mode),
                    text: iptables::render(ports, node, *family),
                });
            }
        }
        Mode::Ipvs => {
            steps.extend(IPVS_SYSCTLS.map(Step::Sysctl));
            let plans = plans(&families, node);
            steps.push(Step::Servers {
                text: plans.iter().map(ipvs::Plan::servers_text).collect(),
            });
            let addresses = plans.iter().flat_map(ipvs::Plan::addresses);
            steps.push(Step::Addresses {
                addresses: addresses.copied().collect(),
            });
            steps.push(Step::Sets {
                text: plans.iter().map(ipvs::Plan::sets_text).collect(),
            });
            for (plan, family) in plans.iter().zip(Family::ALL) {
                steps.push(Step::Iptables {
                    family,
                    backend: iptables_backend(mode),
                    text: plan.iptables_text(true),
                });
            }
        }
        Mode::Nftables => {
            for (family, ports) in &families {
                steps.push(Step::Nft {
                    family: *family,
                    text: nftables::render(ports, node, *family),
                });
            }
        }
    }
    RuleSet { mode, steps }
}

/// What kube-proxy on `node` sends when the cluster has changed from `old` to `new`: its partial
/// sync. The steps' texts are to be loaded over what [`render`] makes of `old`.
///
/// In iptables mode the chains that all Services share are sent in full at every sync; in IPVS mode
/// there is nothing but differences, and the constant iptables rules; in nftables mode a step can
/// follow that deletes chains.
pub fn sync(old: &Cluster, new: &Cluster, node: &NodeView, mode: Mode) -> RuleSet {
    let before = families(old, node);
    let after = families(new, node);
    let steps = match mode {
        Mode::IptablesLegacy | Mode::IptablesNft => before
            .iter()
            .zip(&after)
            .map(|((family, before), (_, after))| Step::Iptables {
                family: *family,
                backend: iptables_backend(mode),
                text: iptables::sync(before, after, node, *family),
            })
            .collect(),
        Mode::Ipvs => ipvs::sync(&plans(&before, node), &plans(&after, node)),
        Mode::Nftables => {
            let mut steps = Vec::new();
            for ((family, before), (_, after)) in before.iter().zip(&after) {
                let texts = nftables::sync(before, after, node, *family);
                steps.extend(
                    texts
                        .into_iter()
                        .filter(|text| !text.is_empty())
                        .map(|text| Step::Nft {
                            family: *family,
                            text,
                        }),
                );
            }
            steps
        }
    };
    RuleSet { mode, steps }
}

/// The back end of a mode's iptables rules.
fn iptables_backend(mode: Mode) -> Backend {
    mode.backend().unwrap_or(Backend::Nft)
}

#[cfg(test)]
mod tests;
