//! Pure: a cluster compiled to the rules that kube-proxy would install.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

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
