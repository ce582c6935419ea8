//! What is new of Services, as soon as the kernel is told of it: reading all rules again takes a while.
//!
//! IPVS mode adds an entry to one of kube-proxy's sets, after it made the virtual server; nftables mode announces its
//! transactions, of which [`table`](super::table) makes patches. iptables modes replace whole tables: there is nothing
//! to be learnt without reading them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tracer_ebpf::change::{Begin, subsystem};

use super::requests::{NFGENMSG, text};
use crate::cluster::Protocol;
use crate::kernel::netlink::{Attributes, NetlinkError, messages};
use crate::rules::Mode;
use crate::rules::ipvs::{Entry, Role, SetKind};
use crate::rules::services::{self, FoundService, Patch};

/// What a change that the kernel has taken in tells of Services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// When it was heard of (`CLOCK_MONOTONIC`, ns), or where its end was seen, when that was.
    pub time_ns: u64,
    /// Of whose rules.
    pub mode: Mode,
    /// What clients can ask and endpoints can be sent from now on: a Service's name, if this mode has names, and one
    /// frontend, or endpoints.
    pub arrived: Vec<FoundService>,
    /// What else it changed; `None`: the rules have to be read to know.
    pub patch: Option<Patch>,
}

/// What a request adds to sets of kube-proxy's. What cannot be read is left to be found when the rules are read.
pub(super) fn of_request(begin: &Begin, bytes: &[u8]) -> Vec<FoundService> {
    const IPSET_CMD_ADD: i32 = 9;
    if begin.subsystem != subsystem::IPSET {
        return Vec::new();
    }
    let mut found = Vec::new();
    for message in messages(bytes).filter_map(Result::ok) {
        if message.kind & 0xff == IPSET_CMD_ADD
            && let Ok((_, attributes)) = message.parts(NFGENMSG)
        {
            // What was read before an entry that makes no sense is kept.
            let _ = add_entries(&attributes, &mut found);
        }
    }
    found
}

/// Numbers of `include/uapi/linux/netfilter/ipset/ip_set.h`.
fn add_entries(
    attributes: &Attributes<'_>,
    found: &mut Vec<FoundService>,
) -> Result<(), NetlinkError> {
    const SETNAME: u16 = 2;
    const DATA: u16 = 7;
    const ADT: u16 = 8;
    let set = attributes.clone().find(SETNAME)?.map(text);
    let Some((family, role)) = set.and_then(|set| Role::of(&set)) else {
        return Ok(());
    };
    // Entries one by one are in a list; a single one is not.
    let list = attributes.clone().find(ADT)?;
    let list = list.map_or_else(|| attributes.clone(), Attributes::nested);
    for attribute in list {
        let (kind, value) = attribute?;
        if kind == DATA
            && let Some(entry) = entry(role.kind(), &Attributes::nested(value))?
        {
            found.extend(services::of_entry(family, role, entry));
        }
    }
    Ok(())
}

/// An entry of the kinds of set that tell of frontends.
fn entry(kind: SetKind, data: &Attributes<'_>) -> Result<Option<Entry>, NetlinkError> {
    const IP: u16 = 1;
    const PORT: u16 = 4;
    const PROTO: u16 = 7;
    let port = data.clone().find(PORT)?;
    let Some(port) = port.and_then(|port| Some(u16::from_be_bytes(*port.first_chunk()?))) else {
        return Ok(None);
    };
    if kind == SetKind::Port {
        return Ok(Some(Entry::Port(port)));
    }
    let protocol = data.clone().find(PROTO)?;
    let protocol = protocol.and_then(|number| Protocol::of_number(*number.first()?));
    let address = data.clone().find(IP)?;
    let address = address.and_then(|address| Attributes::nested(address).next());
    Ok(match (kind, protocol, address.transpose()?) {
        (SetKind::IpPort, Some(protocol), Some((_, address))) => {
            address_of(address).map(|address| Entry::IpPort(address, protocol, port))
        }
        _ => None,
    })
}

pub(super) fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(v4).into());
    }
    let v6 = <[u8; 16]>::try_from(bytes).ok()?;
    Some(Ipv6Addr::from(v6).into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::requests::tests::{begin, message};
    use super::*;
    use crate::cluster::Family;
    use crate::kernel::netlink::attribute;
    use crate::rules::services::FrontendKind::{self, ClusterIp, LoadBalancer, NodePort};

    type Said = (Option<String>, FrontendKind, String, Protocol, Family);

    /// Each Service's name, and what its one frontend is.
    fn said(services: &[FoundService]) -> Vec<Said> {
        let said = services.iter().map(|service| {
            assert!(service.endpoints.is_empty() && service.local_endpoints.is_empty());
            let [frontend] = service.frontends[..] else {
                panic!("one frontend: {service:?}");
            };
            let address = frontend.address.map_or_else(String::new, |a| a.to_string());
            let place = format!("{address} {}", frontend.port);
            let name = service.name.clone();
            (name, frontend.kind, place, service.protocol, service.family)
        });
        said.collect()
    }

    /// `ipset add` (`IPSET_CMD_ADD` of `NFNL_SUBSYS_IPSET`) to this set.
    fn added(set: &str, rest: &[u8]) -> Vec<u8> {
        let mut body = vec![2, 0, 0, 0];
        body.extend(attribute(1, &[6]));
        body.extend(attribute(2, format!("{set}\0").as_bytes()));
        body.extend(rest);
        message(6 << 8 | 9, 1, &body)
    }

    fn data(address: Option<&str>, port: u16, protocol: Option<u8>) -> Vec<u8> {
        let mut inner = Vec::new();
        if let Some(address) = address {
            let address = match address.parse().expect("an address") {
                IpAddr::V4(ip) => attribute(1, &ip.octets()),
                IpAddr::V6(ip) => attribute(2, &ip.octets()),
            };
            inner.extend(attribute(1 | 0x8000, &address));
        }
        inner.extend(attribute(4 | 0x4000, &port.to_be_bytes()));
        inner.extend(protocol.map_or_else(Vec::new, |number| attribute(7, &[number])));
        attribute(7 | 0x8000, &inner)
    }

    #[test]
    fn entries_of_sets_are_new_services() {
        let list = |entries: &[Vec<u8>]| attribute(8 | 0x8000, &entries.concat());
        let mut bytes = added("KUBE-CLUSTER-IP", &data(Some("10.96.0.9"), 53, Some(17)));
        bytes.extend(added(
            "KUBE-6-LOAD-BALANCER",
            &list(&[
                data(Some("2001:db8::9"), 80, Some(6)),
                data(Some("2001:db8::9"), 81, Some(132)),
            ]),
        ));
        bytes.extend(added("KUBE-NODE-PORT-LOCAL-UDP", &data(None, 30053, None)));
        bytes.extend(added(
            "KUBE-EXTERNAL-IP",
            &data(Some("192.0.2.7"), 80, Some(1)),
        ));
        // Neither sets of others nor those that hold something else.
        bytes.extend(added("mine", &data(Some("10.96.0.8"), 53, Some(17))));
        bytes.extend(added(
            "KUBE-LOOP-BACK",
            &data(Some("10.244.0.8"), 53, Some(17)),
        ));
        bytes.extend(added(
            "KUBE-HEALTH-CHECK-NODE-PORT",
            &data(None, 32000, None),
        ));
        let found = of_request(&begin(subsystem::IPSET, 0, &bytes), &bytes);
        let v6 = |port: u16| format!("2001:db8::9 {port}");
        assert_eq!(
            said(&found),
            [
                (
                    None,
                    ClusterIp,
                    "10.96.0.9 53".to_owned(),
                    Protocol::Udp,
                    Family::V4
                ),
                (None, LoadBalancer, v6(80), Protocol::Tcp, Family::V6),
                (None, LoadBalancer, v6(81), Protocol::Sctp, Family::V6),
                (
                    None,
                    NodePort,
                    " 30053".to_owned(),
                    Protocol::Udp,
                    Family::V4
                ),
            ]
        );
        assert!(found.iter().all(|service| service.mode == "ipvs"));
        let elsewhere = begin(subsystem::IPVS, 0, &bytes);
        assert!(of_request(&elsewhere, &bytes).is_empty());
    }

    proptest! {
        /// Anybody can send anything.
        #[test]
        fn no_bytes_are_too_strange(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            of_request(&begin(subsystem::IPSET, 0, &bytes), &bytes);
            let strange = added("KUBE-CLUSTER-IP", &bytes);
            of_request(&begin(subsystem::IPSET, 0, &strange), &strange);
        }
    }
}
