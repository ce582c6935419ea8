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

    /// The network with this lowest and highest address, if there is one.
    pub fn from_ends(first: IpAddr, last: IpAddr) -> Option<Self> {
        let same = match (first, last) {
            (IpAddr::V4(first), IpAddr::V4(last)) => {
                (first.to_bits() ^ last.to_bits()).leading_zeros()
            }
            (IpAddr::V6(first), IpAddr::V6(last)) => {
                (first.to_bits() ^ last.to_bits()).leading_zeros()
            }
            _ => return None,
        };
        let prefix = u8::try_from(same).ok()?;
        let network = Self {
            base: first,
            prefix,
        };
        (network.network() == network && network.last() == last).then_some(network)
    }

    /// The highest address.
    pub fn last(self) -> IpAddr {
        let prefix = u32::from(self.prefix);
        match self.base {
            IpAddr::V4(base) => {
                Ipv4Addr::from_bits(base.to_bits() | u32::MAX.checked_shr(prefix).unwrap_or(0))
                    .into()
            }
            IpAddr::V6(base) => {
                Ipv6Addr::from_bits(base.to_bits() | u128::MAX.checked_shr(prefix).unwrap_or(0))
                    .into()
            }
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

    /// The network alone: the address without its host bits, which is how Go prints a network.
    #[must_use]
    pub fn network(self) -> Self {
        let base = match self.base {
            IpAddr::V4(base) => {
                let host = 32_u32.saturating_sub(self.prefix.into());
                let mask = u32::MAX.checked_shl(host).unwrap_or(0);
                Ipv4Addr::from_bits(base.to_bits() & mask).into()
            }
            IpAddr::V6(base) => {
                let host = 128_u32.saturating_sub(self.prefix.into());
                let mask = u128::MAX.checked_shl(host).unwrap_or(0);
                Ipv6Addr::from_bits(base.to_bits() & mask).into()
            }
        };
        Self {
            base,
            prefix: self.prefix,
        }
    }

    /// A network as kube-proxy reads it (`ParseCIDRSloppy` of `k8s.io/utils/net`): leading zeros
    /// are decimal, spaces around it and host bits are dropped.
    pub fn parse_sloppy(text: &str) -> Option<Self> {
        let (address, prefix) = text.trim().split_once('/')?;
        let base = parse_address(address)?;
        let is_number = !prefix.is_empty() && prefix.bytes().all(|digit| digit.is_ascii_digit());
        let prefix: u8 = prefix.parse().ok().filter(|_| is_number)?;
        let bits = if base.is_ipv4() { 32 } else { 128 };
        (prefix <= bits).then(|| Self { base, prefix }.network())
    }

    /// Does `address` lie in the range?
    pub fn contains(self, address: IpAddr) -> bool {
        match (self.base, address) {
            (IpAddr::V4(base), IpAddr::V4(address)) => {
                (base.to_bits() ^ address.to_bits())
                    .checked_shr(32_u32.saturating_sub(self.prefix.into()))
                    .unwrap_or(0)
                    == 0
            }
            (IpAddr::V6(base), IpAddr::V6(address)) => {
                (base.to_bits() ^ address.to_bits())
                    .checked_shr(128_u32.saturating_sub(self.prefix.into()))
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

/// An address as kube-proxy reads it (`ParseIPSloppy` of `k8s.io/utils/net`): leading zeros in an
/// IPv4 address are decimal, and an IPv4 address in IPv6 form (`::ffff:192.0.2.1`) is IPv4.
pub fn parse_address(text: &str) -> Option<IpAddr> {
    if text.contains(':') {
        return Some(text.parse::<Ipv6Addr>().ok()?.to_canonical());
    }
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.is_empty() || !part.bytes().all(|digit| digit.is_ascii_digit()) {
            return None;
        }
        let digits = part.trim_start_matches('0');
        *octet = if digits.is_empty() {
            0
        } else {
            digits.parse().ok()?
        };
    }
    parts.next().is_none().then(|| IpAddr::from(octets))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_kube_proxy_reads_them() {
        for (text, address) in [
            ("10.96.0.1", Some("10.96.0.1")),
            ("010.096.000.001", Some("10.96.0.1")),
            ("::ffff:192.0.2.1", Some("192.0.2.1")),
            ("FD00::0001", Some("fd00::1")),
            ("10.96.0", None),
            ("10.96.0.256", None),
            ("10.96.0.1.2", None),
            ("10.96.0.+1", None),
            ("10.96.0.1 ", None),
            ("fe80::1%eth0", None),
            ("", None),
        ] {
            assert_eq!(
                parse_address(text).map(|address| address.to_string()),
                address.map(str::to_owned),
                "{text}"
            );
        }
    }

    #[test]
    fn networks_lose_their_host_bits() {
        for (text, network) in [
            (" 203.0.113.77/25 ", Some("203.0.113.0/25")),
            ("010.0.0.1/8", Some("10.0.0.0/8")),
            ("1.2.3.4/0", Some("0.0.0.0/0")),
            ("fd00::1/56", Some("fd00::/56")),
            ("::1/128", Some("::1/128")),
            ("::1/0", Some("::/0")),
            ("10.0.0.0/33", None),
            ("10.0.0.0/+8", None),
            ("10.0.0.0", None),
        ] {
            assert_eq!(
                Cidr::parse_sloppy(text).map(|network| network.to_string()),
                network.map(str::to_owned),
                "{text}"
            );
        }
    }
}
