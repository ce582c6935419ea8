//! The connections that conntrack remembers, listed over ctnetlink; nothing is changed.

use std::net::{IpAddr, SocketAddr};

use super::netlink::{Attributes, NLM_F_DUMP, NetlinkError, Request, Socket};
use super::netns::{Netns, NetnsError};

// include/uapi/linux/netfilter/nfnetlink.h and nfnetlink_conntrack.h.
const NFNL_SUBSYS_CTNETLINK: u8 = 1;
const IPCTNL_MSG_CT_GET: u8 = 1;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_TIMEOUT: u16 = 7;
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// `CTA_FILTER_F_CTA_IP_SRC` (`net/netfilter/nf_conntrack_netlink.c`).
const FILTER_SOURCE: u32 = 1 << 0;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
/// `IPS_SEEN_REPLY` (`include/uapi/linux/netfilter/nf_conntrack_common.h`).
const IPS_SEEN_REPLY: u32 = 1 << 1;

/// Why the connections cannot be listed.
#[derive(Debug, thiserror::Error)]
pub enum ConntrackError {
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The kernel does not tell.
    #[error("cannot list the connections that conntrack remembers: {0}")]
    Netlink(#[from] NetlinkError),
}

/// One connection of a protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// IP protocol number.
    pub protocol: u8,
    /// Who asked.
    pub source: SocketAddr,
    /// What was asked for.
    pub destination: SocketAddr,
    /// Who answers: where the connection's packets are sent.
    pub answers: SocketAddr,
    /// Has it been answered?
    pub replied: bool,
    /// In how many seconds it will be forgotten, if no packet comes.
    pub timeout_s: u32,
}

/// Lists the connections of a namespace that `wanted` picks.
pub fn list(ns: &Netns, wanted: impl FnMut(&Entry) -> bool) -> Result<Vec<Entry>, ConntrackError> {
    // Of both families.
    ask(ns, &request(0), wanted)
}

/// The same of connections whose packets are sent to this address, which the kernel picks (from 5.8 on): of 100,000
/// others that takes it a fifth of the time.
pub fn list_answered_by(
    ns: &Netns,
    address: IpAddr,
    mut wanted: impl FnMut(&Entry) -> bool,
) -> Result<Vec<Entry>, ConntrackError> {
    // Kernels that know no filter tell of all.
    let wanted = |entry: &Entry| entry.answers.ip() == address && wanted(entry);
    ask(ns, &answered_by(address)?, wanted)
}

fn request(family: u8) -> Request {
    Request::new(NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET, NLM_F_DUMP, family)
}

fn answered_by(address: IpAddr) -> Result<Request, NetlinkError> {
    let (family, kind, bytes) = match address {
        IpAddr::V4(ip) => (libc::AF_INET, CTA_IP_V4_SRC, ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::AF_INET6, CTA_IP_V6_SRC, ip.octets().to_vec()),
    };
    request(u8::try_from(family).unwrap_or(0))
        .nested(CTA_TUPLE_REPLY, |tuple| {
            tuple.nested(CTA_TUPLE_IP, |ip| ip.bytes(kind, &bytes))
        })?
        .nested(CTA_FILTER, |filter| {
            filter
                .bytes(CTA_FILTER_ORIG_FLAGS, &0_u32.to_ne_bytes())?
                .bytes(CTA_FILTER_REPLY_FLAGS, &FILTER_SOURCE.to_ne_bytes())
        })
}

fn ask(
    ns: &Netns,
    request: &Request,
    mut wanted: impl FnMut(&Entry) -> bool,
) -> Result<Vec<Entry>, ConntrackError> {
    let listed = ns.run(|| {
        Socket::netfilter()?.dump(request, |entries: &mut Vec<Entry>, attributes| {
            entries.extend(entry(&attributes)?.filter(|entry| wanted(entry)));
            Ok(())
        })
    })?;
    Ok(listed?)
}

/// A connection; `None` if its protocol has no ports.
fn entry(attributes: &Attributes<'_>) -> Result<Option<Entry>, NetlinkError> {
    let tuple = |kind| match attributes.clone().find(kind)? {
        Some(value) => tuple(value),
        None => Ok(None),
    };
    let (Some(original), Some(reply)) = (tuple(CTA_TUPLE_ORIG)?, tuple(CTA_TUPLE_REPLY)?) else {
        return Ok(None);
    };
    let status = attributes.clone().find_be32(CTA_STATUS)?.unwrap_or(0);
    Ok(Some(Entry {
        protocol: original.0,
        source: original.1,
        destination: original.2,
        answers: reply.1,
        replied: status & IPS_SEEN_REPLY != 0,
        timeout_s: attributes.clone().find_be32(CTA_TIMEOUT)?.unwrap_or(0),
    }))
}

/// Protocol, source and destination.
fn tuple(value: &[u8]) -> Result<Option<(u8, SocketAddr, SocketAddr)>, NetlinkError> {
    let parts = Attributes::nested(value);
    let (Some(ip), Some(proto)) = (
        parts.clone().find(CTA_TUPLE_IP)?,
        parts.find(CTA_TUPLE_PROTO)?,
    ) else {
        return Ok(None);
    };
    let address = |v4, v6| {
        let ip = Attributes::nested(ip);
        let found = match ip.clone().find(v4)? {
            Some(found) => Some(found),
            None => ip.find(v6)?,
        };
        Ok::<_, NetlinkError>(found.and_then(to_address))
    };
    let port = |kind| {
        let port = Attributes::nested(proto).find(kind)?;
        let port = port.and_then(|port| port.try_into().ok());
        Ok::<_, NetlinkError>(port.map(u16::from_be_bytes))
    };
    let number = Attributes::nested(proto).find(CTA_PROTO_NUM)?;
    let source = address(CTA_IP_V4_SRC, CTA_IP_V6_SRC)?.zip(port(CTA_PROTO_SRC_PORT)?);
    let destination = address(CTA_IP_V4_DST, CTA_IP_V6_DST)?.zip(port(CTA_PROTO_DST_PORT)?);
    let number = number.and_then(|number| number.first().copied());
    Ok(match (number, source, destination) {
        (Some(number), Some(source), Some(destination)) => {
            Some((number, source.into(), destination.into()))
        }
        _ => None,
    })
}

fn to_address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(bytes));
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::attribute;

    fn of_tuple(kind: u16, from: ([u8; 4], u16), to: ([u8; 4], u16)) -> Vec<u8> {
        let ip = [
            attribute(CTA_IP_V4_SRC, &from.0),
            attribute(CTA_IP_V4_DST, &to.0),
        ]
        .concat();
        let proto = [
            attribute(CTA_PROTO_NUM, &[17]),
            attribute(CTA_PROTO_SRC_PORT, &from.1.to_be_bytes()),
            attribute(CTA_PROTO_DST_PORT, &to.1.to_be_bytes()),
        ]
        .concat();
        let parts = [
            attribute(CTA_TUPLE_IP, &ip),
            attribute(CTA_TUPLE_PROTO, &proto),
        ]
        .concat();
        attribute(kind, &parts)
    }

    fn message() -> Vec<u8> {
        let (pod, vip, endpoint) = ([10, 244, 0, 7], [10, 96, 0, 10], [10, 244, 1, 2]);
        [
            of_tuple(CTA_TUPLE_ORIG, (pod, 5000), (vip, 53)),
            of_tuple(CTA_TUPLE_REPLY, (endpoint, 5353), (pod, 5000)),
            attribute(CTA_STATUS, &(IPS_SEEN_REPLY | 8).to_be_bytes()),
            attribute(CTA_TIMEOUT, &119_u32.to_be_bytes()),
        ]
        .concat()
    }

    #[test]
    fn an_entry_says_who_asked_whom_and_who_answers() {
        let bytes = message();
        let entry = entry(&Attributes::nested(&bytes))
            .expect("well formed")
            .expect("ports");
        let socket = |text: &str| text.parse::<SocketAddr>().expect("an address");
        assert_eq!(
            entry,
            Entry {
                protocol: 17,
                source: socket("10.244.0.7:5000"),
                destination: socket("10.96.0.10:53"),
                answers: socket("10.244.1.2:5353"),
                replied: true,
                timeout_s: 119,
            }
        );
    }

    #[test]
    fn damaged_entries_are_errors_or_nothing() {
        let bytes = message();
        for length in 0..bytes.len() {
            let _ = entry(&Attributes::nested(&bytes[..length]));
        }
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0xff;
            let _ = entry(&Attributes::nested(&bad));
        }
    }
}
