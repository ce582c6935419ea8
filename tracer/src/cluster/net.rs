//! IP families and networks.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// IPv4 or IPv6. kube-proxy runs one proxier for each.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum Family {
    /// IPv4, which the comparison uses.
    #[default]
    #[serde(rename = "IPv4")]
    V4,
    /// IPv6.
    #[serde(rename = "IPv6")]
    V6,
}

impl Family {
    /// Both, in the order in which rules are applied.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Is the address of this family?
    pub fn holds(self, address: IpAddr) -> bool {
        Self::of(address) == self
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// An IP network, or an address in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Cidr {
    /// The lowest address, or the one that is meant.
    pub base: IpAddr,
    /// Number of fixed bits.
    pub prefix: u8,
}

impl Cidr {
    /// `a.b.c.d/prefix`.
    pub const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Self {
        Self {
            base: IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
            prefix,
        }
    }

    /// `high` is the upper half of the address, `low` the lower.
    pub const fn v6(high: [u16; 4], low: [u16; 4], prefix: u8) -> Self {
        Self {
            base: IpAddr::V6(Ipv6Addr::new(
                high[0], high[1], high[2], high[3], low[0], low[1], low[2], low[3],
            )),
            prefix,
        }
    }

    /// Its family.
    pub const fn family(self) -> Family {
        Family::of(self.base)
    }

    /// The address `n` above the lowest. Staying inside the range is the caller's business.
    pub fn nth(self, n: u32) -> IpAddr {
        match self.base {
            IpAddr::V4(base) => Ipv4Addr::from_bits(base.to_bits().wrapping_add(n)).into(),
            IpAddr::V6(base) => {
                Ipv6Addr::from_bits(base.to_bits().wrapping_add(u128::from(n))).into()
            }
        }
    }

    /// Does `address` lie in the range?
    pub fn contains(self, address: IpAddr) -> bool {
        match (self.base, address) {
            (IpAddr::V4(base), IpAddr::V4(address)) => {
                (base.to_bits() ^ address.to_bits())
                    .checked_shr(32 - u32::from(self.prefix))
                    .unwrap_or(0)
                    == 0
            }
            (IpAddr::V6(base), IpAddr::V6(address)) => {
                (base.to_bits() ^ address.to_bits())
                    .checked_shr(128 - u32::from(self.prefix))
                    .unwrap_or(0)
                    == 0
            }
            _ => false,
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

/// Text that is no IP network.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is no network: write ADDRESS/PREFIX, such as 10.244.0.0/16")]
pub struct NotCidr(String);

impl FromStr for Cidr {
    type Err = NotCidr;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (address, prefix) = s.split_once('/')?;
            let base: IpAddr = address.parse().ok()?;
            let prefix: u8 = prefix.parse().ok()?;
            let bits = if base.is_ipv4() { 32 } else { 128 };
            (prefix <= bits).then_some(Self { base, prefix })
        };
        parse().ok_or_else(|| NotCidr(s.to_owned()))
    }
}
