//! Source addresses and ports of the traffic: each is used once in a laboratory's life.
//!
//! A port that is never used again makes every new flow a new conntrack entry, and keeps sockets
//! in `TIME_WAIT` from disturbing later flows.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use tracer_ebpf::path::Origin;

use super::plan;
use crate::cluster::{Cidr, Family, Protocol};

/// Every source of an origin, family and protocol has been used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{wanted} {family} {protocol} flows from {origin} need more source ports than the {left} that \
     this laboratory has left: send fewer flows or build a new laboratory"
)]
pub struct SourcesExhausted {
    /// Who would have sent.
    pub origin: &'static str,
    /// IPv4 or IPv6.
    pub family: Family,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Flows that were asked for.
    pub wanted: u64,
    /// Sources left.
    pub left: u64,
}

/// Hands out sources.
#[derive(Debug, Default)]
pub(super) struct Sources {
    /// How many have been used.
    used: Mutex<BTreeMap<(Origin, Family, Protocol), u64>>,
}

impl Sources {
    /// The next `count` sources, or an error and none used.
    pub(super) fn take(
        &self,
        origin: Origin,
        family: Family,
        protocol: Protocol,
        count: u64,
    ) -> Result<impl Iterator<Item = SocketAddr> + use<>, SourcesExhausted> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let used = used.entry((origin, family, protocol)).or_default();
        let left = capacity(origin, family) - *used;
        if count > left {
            return Err(SourcesExhausted {
                origin: match origin {
                    Origin::Pod => "the client pod",
                    Origin::Host => "the node",
                    Origin::External => "the external client",
                },
                family,
                protocol,
                wanted: count,
                left,
            });
        }
        let first = *used;
        *used += count;
        Ok((first..first + count).map(move |n| source(origin, family, n)))
    }
}

/// Ports of one address.
const PORTS: u64 = *plan::SOURCE_PORTS.end() as u64 - *plan::SOURCE_PORTS.start() as u64 + 1;

/// The addresses behind an origin's first one, without the range's first two and last address.
const fn more_addresses(origin: Origin, family: Family) -> Option<(Cidr, u64)> {
    let range = match (origin, family) {
        // Only the node's own address is what a process on the node sends from.
        (Origin::Host, _) => return None,
        (Origin::Pod, Family::V4) => plan::CLIENT_POD,
        (Origin::Pod, Family::V6) => plan::CLIENT_POD6,
        (Origin::External, Family::V4) => plan::EXTERNAL_MORE,
        (Origin::External, Family::V6) => plan::EXTERNAL_MORE6,
    };
    let bits = match family {
        Family::V4 => 32 - range.prefix,
        // More than enough; keeps the arithmetic in 64 bits.
        Family::V6 => 12,
    };
    Some((range, (1 << bits) - 3))
}

/// Sources of an origin: addresses × ports.
fn capacity(origin: Origin, family: Family) -> u64 {
    PORTS * (1 + more_addresses(origin, family).map_or(0, |(_, count)| count))
}

/// Source number `n`: every port of the first address, then of the next.
fn source(origin: Origin, family: Family, n: u64) -> SocketAddr {
    let (address, port) = (n / PORTS, n % PORTS);
    let ip: IpAddr = match (
        address.checked_sub(1).zip(more_addresses(origin, family)),
        origin,
        family,
    ) {
        (Some((further, (range, _))), _, _) => {
            range.nth(2 + u32::try_from(further).unwrap_or(u32::MAX))
        }
        (None, Origin::Pod, Family::V4) => plan::CLIENT_POD.nth(1),
        (None, Origin::Pod, Family::V6) => plan::CLIENT_POD6.nth(1),
        (None, Origin::Host, family) => plan::node_address(family),
        (None, Origin::External, Family::V4) => plan::EXTERNAL_ADDRESS.base,
        (None, Origin::External, Family::V6) => plan::EXTERNAL_ADDRESS6.base,
    };
    let port = plan::SOURCE_PORTS.start() + u16::try_from(port).unwrap_or(u16::MAX);
    SocketAddr::new(ip, port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_source_is_handed_out_twice_and_the_end_is_an_error() {
        let sources = Sources::default();
        let take = |count| sources.take(Origin::Host, Family::V4, Protocol::Tcp, count);
        let first: Vec<SocketAddr> = take(2).expect("two").collect();
        assert_eq!(first[0].to_string(), "192.0.2.1:33000");
        assert_eq!(first[1].to_string(), "192.0.2.1:33001");
        let rest: Vec<SocketAddr> = take(PORTS - 2).expect("the rest").collect();
        assert_eq!(rest[0].to_string(), "192.0.2.1:33002");
        assert_eq!(
            rest.last().map(ToString::to_string).as_deref(),
            Some("192.0.2.1:60999")
        );
        let error = take(1).err().expect("none left");
        assert_eq!((error.wanted, error.left), (1, 0));
        // Other protocols and origins have their own.
        assert!(
            sources
                .take(Origin::Host, Family::V4, Protocol::Udp, 1)
                .is_ok()
        );
    }

    #[test]
    fn pods_and_external_clients_go_on_with_further_addresses() {
        for (origin, family, address) in [
            (Origin::Pod, Family::V4, "10.244.64.2:33000"),
            (Origin::Pod, Family::V6, "[fd00:10:244:40::2]:33000"),
            (Origin::External, Family::V4, "192.0.2.130:33000"),
            (Origin::External, Family::V6, "[2001:db8:0:1:8000::2]:33000"),
        ] {
            assert_eq!(source(origin, family, PORTS).to_string(), address);
        }
        let last = source(
            Origin::External,
            Family::V4,
            capacity(Origin::External, Family::V4) - 1,
        );
        assert_eq!(last.to_string(), "192.0.2.254:60999");
    }
}
