//! Services that come, as soon as the kernel is told of them: reading all rules again takes a while.
//!
//! IPVS mode adds an entry to one of kube-proxy's sets, after it made the virtual server; nftables mode adds an
//! element to a map, in the transaction that makes the chain. iptables modes replace whole tables: there is nothing to
//! be learnt without reading them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tracer_ebpf::change::{Begin, subsystem};

use super::requests::{NFGENMSG, text};
use crate::cluster::{Family, Protocol};
use crate::kernel::netlink::{Attributes, NetlinkError, messages};
use crate::kernel::nft::family_name;
use crate::rules::ipvs::{Entry, Role, SetKind};
use crate::rules::services::{self, FoundService, NewElement};

/// A Service, or one more of its frontends, that clients can ask from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// When the kernel had taken it in (`CLOCK_MONOTONIC`, ns).
    pub time_ns: u64,
    /// What is known of it: a name, if this mode has names, and one frontend; no endpoints.
    pub service: FoundService,
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

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(v4).into());
    }
    let v6 = <[u8; 16]>::try_from(bytes).ok()?;
    Some(Ipv6Addr::from(v6).into())
}

/// What a transaction of `nf_tables` adds to kube-proxy's maps, while it is announced.
#[derive(Debug, Default)]
pub(super) struct Elements {
    found: Vec<Found>,
    /// Addresses that came into the set of ClusterIPs: in maps of what has no endpoints, nothing else tells.
    cluster_ips: BTreeSet<IpAddr>,
}

/// An element of a map.
#[derive(Debug)]
struct Found {
    family: Family,
    set: String,
    place: (Option<IpAddr>, Protocol, u16),
    chain: Option<String>,
    comment: Option<String>,
}

/// `NFT_MSG_NEWSETELEM`'s list of elements, and of an element: `enum nft_set_elem_attributes`.
const ELEMENTS: u16 = 3;
const KEY: u16 = 1;
const DATA: u16 = 2;
const USERDATA: u16 = 6;
/// `enum nft_data_attributes`, and of a verdict its chain.
const VALUE: u16 = 1;
const VERDICT: u16 = 2;
const CHAIN: u16 = 2;
/// The comment in an element's user data: a byte says what, a byte how long (`libnftnl/udata.h`).
const COMMENT: u8 = 0;

impl Elements {
    /// Takes in elements that come into this set.
    pub(super) fn add(
        &mut self,
        table: &(u8, String),
        set: &str,
        attributes: &Attributes<'_>,
    ) -> Result<(), NetlinkError> {
        let (family, name) = table;
        let family = Family::ALL
            .into_iter()
            .find(|known| known.nft() == family_name(*family));
        let Some(family) = family.filter(|_| name == "kube-proxy") else {
            return Ok(());
        };
        let with_places = set.starts_with("service-") || set.starts_with("no-endpoint-");
        if !with_places && set != "cluster-ips" {
            return Ok(());
        }
        let list = attributes.clone().find(ELEMENTS)?.unwrap_or_default();
        for element in Attributes::nested(list) {
            let (_, element) = element?;
            let element = Attributes::nested(element);
            let Some(key) = inside(&element, KEY, VALUE)? else {
                continue;
            };
            if !with_places {
                self.cluster_ips.extend(address_of(key));
            } else if let Some(place) = place(family, key) {
                let verdict = inside(&element, DATA, VERDICT)?.map(Attributes::nested);
                let chain = verdict.map(|verdict| verdict.find(CHAIN)).transpose()?;
                self.found.push(Found {
                    family,
                    set: set.to_owned(),
                    place,
                    chain: chain.flatten().map(text),
                    comment: element.find(USERDATA)?.and_then(comment),
                });
            }
        }
        Ok(())
    }

    /// The transaction is in: the Services that came with it.
    pub(super) fn take(&mut self) -> Vec<FoundService> {
        let cluster_ips = std::mem::take(&mut self.cluster_ips);
        let found = std::mem::take(&mut self.found).into_iter();
        let services = found.filter_map(|found| {
            let (address, ..) = found.place;
            services::of_element(
                found.family,
                &NewElement {
                    set: &found.set,
                    place: found.place,
                    chain: found.chain.as_deref(),
                    comment: found.comment.as_deref(),
                    cluster_ip: address.is_some_and(|address| cluster_ips.contains(&address)),
                },
            )
        });
        services.collect()
    }
}

/// The value of an attribute inside another.
fn inside<'a>(
    attributes: &Attributes<'a>,
    outer: u16,
    inner: u16,
) -> Result<Option<&'a [u8]>, NetlinkError> {
    let outer = attributes.clone().find(outer)?;
    outer.map_or(Ok(None), |outer| Attributes::nested(outer).find(inner))
}

/// A concatenation's key: `10.96.0.1 . tcp . 443` or `tcp . 30080`, each part at a multiple of four bytes.
fn place(family: Family, key: &[u8]) -> Option<(Option<IpAddr>, Protocol, u16)> {
    let (address, rest) = if key.len() == 8 {
        (None, key)
    } else {
        let (address, rest) = key.split_at_checked(match family {
            Family::V4 => 4,
            Family::V6 => 16,
        })?;
        (Some(address_of(address)?), rest)
    };
    match *rest {
        [protocol, _, _, _, high, low, _, _] => {
            let protocol = Protocol::of_number(protocol)?;
            Some((address, protocol, u16::from_be_bytes([high, low])))
        }
        _ => None,
    }
}

fn comment(mut userdata: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = userdata {
        let (value, rest) = rest.split_at_checked(usize::from(*length))?;
        if *kind == COMMENT {
            return Some(text(value));
        }
        userdata = rest;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::requests::tests::{begin, message};
    use super::*;
    use crate::kernel::netlink::attribute;
    use crate::rules::services::FrontendKind::{self, ClusterIp, External, LoadBalancer, NodePort};

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

    fn element(key: &[u8], chain: Option<&str>, userdata: &[u8]) -> Vec<u8> {
        let mut inner = attribute(KEY, &attribute(VALUE, key));
        if let Some(chain) = chain {
            let goto = attribute(1, &(-4_i32).to_be_bytes());
            let chain = attribute(CHAIN, format!("{chain}\0").as_bytes());
            let verdict = attribute(VERDICT, &[goto, chain].concat());
            inner.extend(attribute(DATA, &verdict));
        }
        if !userdata.is_empty() {
            inner.extend(attribute(USERDATA, userdata));
        }
        attribute(1, &inner)
    }

    #[test]
    fn elements_of_maps_are_new_services() {
        let mut elements = Elements::default();
        let mut add = |table: (u8, &str), set: &str, list: &[Vec<u8>]| {
            let list = attribute(ELEMENTS, &list.concat());
            let table = (table.0, table.1.to_owned());
            let attributes = Attributes::nested(&list);
            elements.add(&table, set, &attributes).expect("well formed");
        };
        let (v4, v6) = ((2, "kube-proxy"), (10, "kube-proxy"));
        let web = "service-XXWEBXXX-shop/web/tcp/http";
        let place = |address: &[u8], protocol, port: u16| {
            let [high, low] = port.to_be_bytes();
            [address, &[protocol, 0, 0, 0, high, low, 0, 0]].concat()
        };
        let one = place(&[10, 96, 0, 9], 6, 80);
        let outside = place(&[192, 0, 2, 7], 6, 80);
        let external = "external-XXWEBXXX-shop/web/tcp/http";
        let list = [
            element(&one, Some(web), &[]),
            element(&outside, Some(external), &[]),
            element(&place(&[], 6, 30080), Some(external), &[]),
        ];
        add(v4, "service-ips", &list[..2]);
        add(v4, "service-nodeports", &list[2..]);
        let mut of_v6 = [0; 16];
        of_v6[15] = 9;
        let dns = "local-XXDNSXXX-shop/dns/udp/";
        add(
            v6,
            "service-ips",
            &[element(&place(&of_v6, 17, 53), Some(dns), &[])],
        );
        // Something else first, then the comment.
        let comment = b"\x02\x01x\x00\x10shop/empty:http\0";
        for last in [5, 6] {
            let key = place(&[10, 96, 0, last], 6, 80);
            add(v4, "no-endpoint-services", &[element(&key, None, comment)]);
        }
        add(v4, "cluster-ips", &[element(&[10, 96, 0, 5], None, &[])]);
        // Tables and maps of others.
        add((2, "mine"), "service-ips", &list[..1]);
        add((1, "kube-proxy"), "service-ips", &list[..1]);
        add(v4, "firewall-ips", &list[..1]);
        let web = |kind, place: &str| {
            let name = Some("shop/web:http".to_owned());
            (name, kind, place.to_owned(), Protocol::Tcp, Family::V4)
        };
        let empty = |kind, place: &str| {
            let name = Some("shop/empty:http".to_owned());
            (name, kind, place.to_owned(), Protocol::Tcp, Family::V4)
        };
        let dns = (
            Some("shop/dns".to_owned()),
            ClusterIp,
            "::9 53".to_owned(),
            Protocol::Udp,
            Family::V6,
        );
        let found = elements.take();
        assert_eq!(
            said(&found),
            [
                web(ClusterIp, "10.96.0.9 80"),
                web(External, "192.0.2.7 80"),
                web(NodePort, " 30080"),
                dns,
                empty(ClusterIp, "10.96.0.5 80"),
                empty(External, "10.96.0.6 80"),
            ]
        );
        assert!(found.iter().all(|service| service.mode == "nftables"));
        assert!(elements.take().is_empty());
    }

    proptest! {
        /// Anybody can send anything.
        #[test]
        fn no_bytes_are_too_strange(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            of_request(&begin(subsystem::IPSET, 0, &bytes), &bytes);
            let strange = added("KUBE-CLUSTER-IP", &bytes);
            of_request(&begin(subsystem::IPSET, 0, &strange), &strange);
            let mut elements = Elements::default();
            let table = (2, "kube-proxy".to_owned());
            let _ = elements.add(&table, "service-ips", &Attributes::nested(&bytes));
            let list = attribute(ELEMENTS, &attribute(1, &bytes));
            let _ = elements.add(&table, "service-ips", &Attributes::nested(&list));
            elements.take();
        }
    }
}
