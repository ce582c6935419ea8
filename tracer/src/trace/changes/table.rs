//! What a transaction of `nf_tables` does to a table of kube-proxy's, as it is announced.
//!
//! Messages, attributes and expressions: `include/uapi/linux/netfilter/nf_tables.h`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use super::news::address_of;
use super::requests::text;
use crate::cluster::{Family, Protocol};
use crate::kernel::netlink::{Attributes, NetlinkError};
use crate::kernel::nft::{
    NFT_MSG_DELCHAIN, NFT_MSG_DELRULE, NFT_MSG_DELSET, NFT_MSG_DELSETELEM, NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE, NFT_MSG_NEWSET, NFT_MSG_NEWSETELEM, family_name,
};
use crate::rules::services::{ChainChange, ChainNow, ElementChange, Patch, Place, chain_of};

const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_LOOKUP_SET: u16 = 1;
/// The set's name, in messages about the set and about its elements.
const NFTA_SET: u16 = 2;
const NFTA_ELEMENTS: u16 = 3;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_SET_ELEM_USERDATA: u16 = 6;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CHAIN: u16 = 2;
/// The comment in an element's user data: a byte says what, a byte how long (`libnftnl/udata.h`).
const COMMENT: u8 = 0;

/// Maps of frontends; [`Patch`] knows what they mean.
const MAPS: [&str; 4] = [
    "service-ips",
    "service-nodeports",
    "no-endpoint-services",
    "no-endpoint-nodeports",
];
const CLUSTER_IPS: &str = "cluster-ips";
/// Sets that tell nothing of frontends or endpoints.
const OTHER_SETS: [&str; 3] = ["firewall-ips", "hairpin-connections", "nodeport-ips"];
const AFFINITY: &str = "affinity-";
const ENDPOINT: &str = "endpoint-";
/// What chains begin with that tell nothing of endpoints, which are in those that they lead to.
const OTHER_CHAINS: [&str; 2] = ["external-", "firewall-"];

/// A transaction on kube-proxy's tables, while it is announced.
#[derive(Debug, Default)]
pub(super) struct Transaction {
    /// Was there any such message?
    any: bool,
    /// Was there something that kube-proxy does not do when Services change?
    strange: bool,
    /// What stands in maps that belong to a rule.
    anonymous: HashMap<(Family, String), Vec<Value>>,
    chains: BTreeMap<(Family, String), Chain>,
    /// By map and key, the last word.
    elements: BTreeMap<(Family, String, Place), ElementChange>,
    /// Addresses that came into the set of ClusterIPs.
    cluster_ips: BTreeSet<IpAddr>,
}

/// What a map leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Endpoint(SocketAddr),
    Chain(String),
    Other,
}

/// What is done to a chain.
#[derive(Debug, Default)]
struct Chain {
    /// Is it made? kube-proxy makes what it writes anew even if it is there, and empties it.
    made: bool,
    /// Does it go?
    gone: bool,
    /// How many rules go.
    deleted: usize,
    /// The rules that come.
    rules: Vec<Rule>,
}

/// A rule's part in where packets go.
#[derive(Debug, Default)]
struct Rule {
    /// An address and a port that are written into it, as those of `dnat to`.
    direct: Option<SocketAddr>,
    /// Sets and maps that it looks into.
    sets: Vec<String>,
    translates: bool,
}

impl Chain {
    const fn is_as_it_was(&self) -> bool {
        !self.gone && self.deleted == 0 && self.rules.is_empty()
    }
}

impl Transaction {
    /// Takes in a message about something in this table.
    pub(super) fn take(
        &mut self,
        (family, table): &(u8, String),
        message: u8,
        attributes: &Attributes<'_>,
    ) -> Result<(), NetlinkError> {
        let family = Family::ALL
            .into_iter()
            .find(|known| known.nft() == family_name(*family));
        let Some(family) = family.filter(|_| table == "kube-proxy") else {
            return Ok(());
        };
        self.any = true;
        let name = |kind| Ok::<_, NetlinkError>(attributes.clone().find(kind)?.map(text));
        match message {
            NFT_MSG_NEWCHAIN | NFT_MSG_DELCHAIN => {
                if let Some(chain) = name(NFTA_CHAIN_NAME)? {
                    let chain = self.chains.entry((family, chain)).or_default();
                    chain.made = message == NFT_MSG_NEWCHAIN;
                    chain.gone = !chain.made;
                }
            }
            NFT_MSG_NEWRULE | NFT_MSG_DELRULE => {
                if let Some(chain) = name(NFTA_RULE_CHAIN)? {
                    let chain = self.chains.entry((family, chain)).or_default();
                    if message == NFT_MSG_NEWRULE {
                        chain.rules.push(rule(family, attributes)?);
                    } else {
                        chain.deleted += 1;
                    }
                }
            }
            NFT_MSG_NEWSET | NFT_MSG_DELSET => {
                let set = name(NFTA_SET)?.unwrap_or_default();
                self.strange |= !(is_anonymous(&set) || set.starts_with(AFFINITY));
            }
            NFT_MSG_NEWSETELEM | NFT_MSG_DELSETELEM => {
                let set = name(NFTA_SET)?.unwrap_or_default();
                self.take_elements(family, &set, message == NFT_MSG_NEWSETELEM, attributes)?;
            }
            _ => self.strange = true,
        }
        Ok(())
    }

    fn take_elements(
        &mut self,
        family: Family,
        set: &str,
        added: bool,
        attributes: &Attributes<'_>,
    ) -> Result<(), NetlinkError> {
        let list = attributes.clone().find(NFTA_ELEMENTS)?.unwrap_or_default();
        for element in Attributes::nested(list) {
            let (_, element) = element?;
            let element = Attributes::nested(element);
            if is_anonymous(set) {
                let values = self.anonymous.entry((family, set.to_owned())).or_default();
                values.push(value(family, &element)?);
                continue;
            }
            let key = inside(&element, NFTA_SET_ELEM_KEY, NFTA_DATA_VALUE)?.unwrap_or_default();
            if MAPS.contains(&set) {
                let Some(place) = place(family, key) else {
                    self.strange = true;
                    continue;
                };
                let change = ElementChange {
                    family,
                    set: set.to_owned(),
                    place,
                    added,
                    chain: chain(&element)?,
                    comment: element.find(NFTA_SET_ELEM_USERDATA)?.and_then(comment),
                    cluster_ip: false,
                };
                self.elements
                    .insert((family, set.to_owned(), place), change);
            } else if set == CLUSTER_IPS {
                self.cluster_ips.extend(address_of(key).filter(|_| added));
            } else {
                let known = OTHER_SETS.contains(&set) || set.starts_with(AFFINITY);
                self.strange |= !known;
            }
        }
        Ok(())
    }

    /// The transaction is in. `None`: it was not about kube-proxy's tables; whether its patch is all that it did.
    pub(super) fn close(&mut self) -> Option<(Patch, bool)> {
        let all = std::mem::take(self);
        if !all.any {
            return None;
        }
        let mut understood = !all.strange;
        let mut patch = Patch::default();
        for ((family, name), chain) in &all.chains {
            if chain_of(name).is_some() {
                let change = all.rewritten(*family, name, chain);
                understood &= change.is_some();
                patch.chains.extend(change);
            } else {
                let known = OTHER_CHAINS.iter().chain([&ENDPOINT]);
                let known = known.into_iter().any(|prefix| name.starts_with(prefix));
                understood &= known || chain.is_as_it_was();
            }
        }
        for mut change in all.elements.into_values() {
            let (address, ..) = change.place;
            change.cluster_ip = address.is_some_and(|one| all.cluster_ips.contains(&one));
            patch.elements.push(change);
        }
        Some((patch, understood))
    }

    /// What became of a Service's chain; `None`: nobody knows.
    fn rewritten(&self, family: Family, name: &str, chain: &Chain) -> Option<ChainChange> {
        let now = if chain.gone {
            ChainNow::Gone
        } else if chain.rules.is_empty() {
            ChainNow::Less(chain.deleted)
        } else if chain.made {
            let rules = chain.rules.iter();
            let endpoints = rules.map(|rule| self.endpoints_of(family, rule, true));
            ChainNow::Written(endpoints.collect::<Option<Vec<_>>>()?.concat())
        } else {
            // Who adds or replaces a single rule makes no chain.
            return None;
        };
        Some(ChainChange {
            family,
            name: name.to_owned(),
            now,
        })
    }

    /// Where a rule sends packets: itself, or the chains of endpoints that its map leads to.
    fn endpoints_of(&self, family: Family, rule: &Rule, follow: bool) -> Option<Vec<SocketAddr>> {
        let mut endpoints = Vec::new();
        if rule.translates {
            endpoints.extend(rule.direct);
        }
        for set in &rule.sets {
            if !is_anonymous(set) {
                continue;
            }
            for value in self.anonymous.get(&(family, set.clone()))? {
                match value {
                    Value::Endpoint(endpoint) if rule.translates => endpoints.push(*endpoint),
                    Value::Chain(chain) if follow && chain.starts_with(ENDPOINT) => {
                        let chain = self.chains.get(&(family, chain.clone()))?;
                        if !chain.made || chain.rules.is_empty() {
                            return None;
                        }
                        for rule in &chain.rules {
                            endpoints.extend(self.endpoints_of(family, rule, false)?);
                        }
                    }
                    _ => return None,
                }
            }
        }
        if rule.translates && endpoints.is_empty() {
            return None;
        }
        Some(endpoints)
    }
}

/// The kernel numbers the sets that belong to rules.
fn is_anonymous(set: &str) -> bool {
    set.starts_with("__set") || set.starts_with("__map")
}

fn rule(family: Family, attributes: &Attributes<'_>) -> Result<Rule, NetlinkError> {
    let list = attributes.clone().find(NFTA_RULE_EXPRESSIONS)?;
    let (mut address, mut port) = (None, None);
    let mut rule = Rule::default();
    for expression in Attributes::nested(list.unwrap_or_default()) {
        let (_, expression) = expression?;
        let expression = Attributes::nested(expression);
        let name = expression.clone().find(NFTA_EXPR_NAME)?.map(text);
        let data = expression.find(NFTA_EXPR_DATA)?.unwrap_or_default();
        let data = Attributes::nested(data);
        match name.as_deref() {
            Some("immediate") => {
                let value = inside(&data, NFTA_IMMEDIATE_DATA, NFTA_DATA_VALUE)?;
                match value {
                    Some(&[high, low]) => port = Some(u16::from_be_bytes([high, low])),
                    Some(value) => address = address_of(value).or(address),
                    None => {}
                }
            }
            Some("lookup") => rule.sets.extend(data.find(NFTA_LOOKUP_SET)?.map(text)),
            Some("nat") => rule.translates = true,
            _ => {}
        }
    }
    let address = address.filter(|address| Family::of(*address) == family);
    rule.direct = address
        .zip(port)
        .map(|(address, port)| SocketAddr::new(address, port));
    Ok(rule)
}

/// What an element of a map leads to: `10.244.0.2 . 8080`, each part at a multiple of four bytes, or a chain.
fn value(family: Family, element: &Attributes<'_>) -> Result<Value, NetlinkError> {
    if let Some(chain) = chain(element)? {
        return Ok(Value::Chain(chain));
    }
    let value = inside(element, NFTA_SET_ELEM_DATA, NFTA_DATA_VALUE)?.unwrap_or_default();
    let split = value.split_at_checked(length_of(family));
    let endpoint = split.and_then(|(address, rest)| match *rest {
        [high, low, _, _] => Some(SocketAddr::new(
            address_of(address)?,
            u16::from_be_bytes([high, low]),
        )),
        _ => None,
    });
    Ok(endpoint.map_or(Value::Other, Value::Endpoint))
}

const fn length_of(family: Family) -> usize {
    match family {
        Family::V4 => 4,
        Family::V6 => 16,
    }
}

/// The chain that an element's verdict leads to.
fn chain(element: &Attributes<'_>) -> Result<Option<String>, NetlinkError> {
    let verdict = inside(element, NFTA_SET_ELEM_DATA, NFTA_DATA_VERDICT)?.unwrap_or_default();
    let chain = Attributes::nested(verdict).find(NFTA_VERDICT_CHAIN)?;
    Ok(chain.map(text))
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
fn place(family: Family, key: &[u8]) -> Option<Place> {
    let (address, rest) = if key.len() == 8 {
        (None, key)
    } else {
        let (address, rest) = key.split_at_checked(length_of(family))?;
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

    use super::*;
    use crate::kernel::netlink::attribute;
    use crate::rules::services::FrontendKind::{self, ClusterIp, External, NodePort};

    const V4: u8 = 2;
    const V6: u8 = 10;
    const NFTA_TABLE: u16 = 1;
    const NFTA_SET_ID: u16 = 4;

    fn name(kind: u16, name: &str) -> Vec<u8> {
        attribute(kind, format!("{name}\0").as_bytes())
    }

    fn element(key: &[u8], data: &[u8], userdata: &[u8]) -> Vec<u8> {
        let mut inner = attribute(NFTA_SET_ELEM_KEY, &attribute(NFTA_DATA_VALUE, key));
        if !data.is_empty() {
            inner.extend(attribute(NFTA_SET_ELEM_DATA, data));
        }
        if !userdata.is_empty() {
            inner.extend(attribute(NFTA_SET_ELEM_USERDATA, userdata));
        }
        attribute(1, &inner)
    }

    fn goto(chain: &str) -> Vec<u8> {
        let code = attribute(1, &(-4_i32).to_be_bytes());
        let verdict = [code, name(NFTA_VERDICT_CHAIN, chain)].concat();
        attribute(NFTA_DATA_VERDICT, &verdict)
    }

    fn endpoint(address: &[u8], port: u16) -> Vec<u8> {
        let value = [address, &port.to_be_bytes(), &[0, 0]].concat();
        attribute(NFTA_DATA_VALUE, &value)
    }

    fn place_of(address: &[u8], protocol: u8, port: u16) -> Vec<u8> {
        let [high, low] = port.to_be_bytes();
        [address, &[protocol, 0, 0, 0, high, low, 0, 0]].concat()
    }

    fn expression(kind: &str, data: &[u8]) -> Vec<u8> {
        let inner = [name(NFTA_EXPR_NAME, kind), attribute(NFTA_EXPR_DATA, data)].concat();
        attribute(1, &inner)
    }

    fn immediate(value: &[u8]) -> Vec<u8> {
        let data = attribute(NFTA_DATA_VALUE, value);
        expression("immediate", &attribute(NFTA_IMMEDIATE_DATA, &data))
    }

    /// Messages about IPv4's table, or IPv6's, in one transaction.
    #[derive(Default)]
    struct Messages(Transaction);

    impl Messages {
        fn say(&mut self, family: u8, table: &str, message: u8, rest: &[Vec<u8>]) {
            let bytes = [name(NFTA_TABLE, table), rest.concat()].concat();
            let attributes = Attributes::nested(&bytes);
            let table = (family, table.to_owned());
            self.0
                .take(&table, message, &attributes)
                .expect("well formed");
        }

        fn elements(&mut self, family: u8, message: u8, set: &str, list: &[Vec<u8>]) {
            let list = attribute(NFTA_ELEMENTS, &list.concat());
            self.say(family, "kube-proxy", message, &[name(NFTA_SET, set), list]);
        }

        fn chain(&mut self, family: u8, message: u8, chain: &str) {
            self.say(
                family,
                "kube-proxy",
                message,
                &[name(NFTA_CHAIN_NAME, chain)],
            );
        }

        fn rule(&mut self, family: u8, chain: &str, expressions: &[Vec<u8>]) {
            let list = attribute(NFTA_RULE_EXPRESSIONS, &expressions.concat());
            let rest = [name(NFTA_RULE_CHAIN, chain), list];
            self.say(family, "kube-proxy", NFT_MSG_NEWRULE, &rest);
        }

        fn close(mut self) -> (Patch, bool) {
            self.0.close().expect("it is about kube-proxy")
        }
    }

    type Said = (Option<String>, FrontendKind, String, Protocol, Family);

    /// Each Service's name, and what its one frontend is.
    fn said(patch: &Patch) -> Vec<Said> {
        let said = patch.arrivals().map(|service| {
            let [frontend] = service.frontends[..] else {
                panic!("one frontend: {service:?}");
            };
            let address = frontend.address.map_or_else(String::new, |a| a.to_string());
            let place = format!("{address} {}", frontend.port);
            (
                service.name,
                frontend.kind,
                place,
                service.protocol,
                service.family,
            )
        });
        said.collect()
    }

    #[test]
    fn elements_of_maps_are_frontends() {
        let mut messages = Messages::default();
        let outside = goto("external-XXWEBXXX-shop/web/tcp/http");
        let list = [
            element(
                &place_of(&[10, 96, 0, 9], 6, 80),
                &goto("service-XXWEBXXX-shop/web/tcp/http"),
                &[],
            ),
            element(&place_of(&[192, 0, 2, 7], 6, 80), &outside, &[]),
        ];
        let node_port = element(&place_of(&[], 6, 30080), &outside, &[]);
        messages.elements(V4, NFT_MSG_NEWSETELEM, "service-ips", &list);
        messages.elements(V4, NFT_MSG_NEWSETELEM, "service-nodeports", &[node_port]);
        let mut of_v6 = [0; 16];
        of_v6[15] = 9;
        let dns = goto("local-XXDNSXXX-shop/dns/udp/");
        let dns = element(&place_of(&of_v6, 17, 53), &dns, &[]);
        messages.elements(V6, NFT_MSG_NEWSETELEM, "service-ips", &[dns]);
        // Something else first, then the comment.
        let comment = b"\x02\x01x\x00\x10shop/empty:http\0";
        for last in [5, 6] {
            let key = place_of(&[10, 96, 0, last], 6, 80);
            let element = element(&key, &goto("reject-chain"), comment);
            messages.elements(V4, NFT_MSG_NEWSETELEM, "no-endpoint-services", &[element]);
        }
        let cluster_ip = element(&[10, 96, 0, 5], &[], &[]);
        messages.elements(V4, NFT_MSG_NEWSETELEM, "cluster-ips", &[cluster_ip]);
        // What goes, comes again, and goes.
        for message in [NFT_MSG_DELSETELEM, NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM] {
            let gone = element(&place_of(&[10, 96, 0, 8], 6, 80), &outside, &[]);
            messages.elements(V4, message, "service-ips", &[gone]);
        }
        messages.elements(V4, NFT_MSG_NEWSETELEM, "firewall-ips", &list[..1]);
        let (patch, understood) = messages.close();
        let web = |kind, place: &str| {
            let name = Some("shop/web:http".to_owned());
            (name, kind, place.to_owned(), Protocol::Tcp, Family::V4)
        };
        let empty = |kind, place: &str| {
            let name = Some("shop/empty:http".to_owned());
            (name, kind, place.to_owned(), Protocol::Tcp, Family::V4)
        };
        let dns = Some("shop/dns".to_owned());
        let mut all = said(&patch);
        all.sort();
        let mut wanted = [
            web(ClusterIp, "10.96.0.9 80"),
            web(External, "192.0.2.7 80"),
            web(NodePort, " 30080"),
            (
                dns,
                ClusterIp,
                "::9 53".to_owned(),
                Protocol::Udp,
                Family::V6,
            ),
            empty(ClusterIp, "10.96.0.5 80"),
            empty(External, "10.96.0.6 80"),
        ];
        wanted.sort();
        assert_eq!(all, wanted);
        let gone = patch.elements.iter().filter(|element| !element.added);
        assert_eq!((gone.count(), understood), (1, true));
        // Of others' tables nothing is said; nor of others' families.
        let mut others = Messages::default();
        others.say(V4, "mine", NFT_MSG_DELRULE, &[]);
        others.say(1, "kube-proxy", NFT_MSG_DELRULE, &[]);
        assert_eq!(others.0.close(), None);
    }

    const WEB: &str = "service-XXWEBXXX-shop/web/tcp/http";

    /// A chain with a rule of 1.36: `dnat ip to numgen random mod 2 map { ... }`.
    fn written(messages: &mut Messages, family: u8, addresses: [&[u8]; 2]) {
        messages.chain(family, NFT_MSG_NEWCHAIN, WEB);
        let map = name(NFTA_LOOKUP_SET, "__map7");
        messages.say(
            family,
            "kube-proxy",
            NFT_MSG_NEWSET,
            &[name(NFTA_SET, "__map7")],
        );
        let list = addresses.map(|address| element(&[0; 4], &endpoint(address, 8080), &[]));
        messages.elements(family, NFT_MSG_NEWSETELEM, "__map7", &list);
        let rule = [
            expression("cmp", &[]),
            expression("numgen", &[]),
            expression("lookup", &[map, attribute(NFTA_SET_ID, &[0; 4])].concat()),
            expression("nat", &[]),
        ];
        messages.rule(family, WEB, &rule);
    }

    fn now(messages: Messages) -> (Option<ChainNow>, bool) {
        let (patch, understood) = messages.close();
        let mut chains = patch.chains.into_iter().filter(|chain| chain.name == WEB);
        (chains.next().map(|chain| chain.now), understood)
    }

    fn to(endpoints: &[&str]) -> ChainNow {
        let endpoints = endpoints.iter();
        ChainNow::Written(
            endpoints
                .map(|one| one.parse().expect("a socket"))
                .collect(),
        )
    }

    #[test]
    fn chains_that_are_written_anew_say_where_they_lead() {
        let (mut v4, mut v6) = (Messages::default(), Messages::default());
        written(&mut v4, V4, [&[10, 244, 0, 2], &[10, 244, 1, 3]]);
        let both = to(&["10.244.0.2:8080", "10.244.1.3:8080"]);
        assert_eq!(now(v4), (Some(both), true));
        let address = |last| {
            let mut address = [0; 16];
            address[15] = last;
            address
        };
        written(&mut v6, V6, [&address(2), &address(3)]);
        assert_eq!(now(v6), (Some(to(&["[::2]:8080", "[::3]:8080"])), true));

        // With affinity each endpoint has a chain: as far as they are written as well.
        let affine = |others: bool| {
            let mut messages = Messages::default();
            let of_endpoint = "endpoint-XXENDXXX-shop/web/tcp/http__10.244.0.2/8080";
            messages.chain(V4, NFT_MSG_NEWCHAIN, WEB);
            if others {
                messages.chain(V4, NFT_MSG_NEWCHAIN, of_endpoint);
            }
            let rule = [
                expression("dynset", &[]),
                immediate(&[10, 244, 0, 2]),
                immediate(&8080_u16.to_be_bytes()),
                expression("nat", &[]),
            ];
            messages.rule(V4, of_endpoint, &rule);
            let affinity = name(
                NFTA_LOOKUP_SET,
                "affinity-XXENDXXX-shop/web/tcp/http__10.244.0.2/8080",
            );
            messages.rule(V4, WEB, &[expression("lookup", &affinity)]);
            let list = [element(&[0; 4], &goto(of_endpoint), &[])];
            messages.elements(V4, NFT_MSG_NEWSETELEM, "__map9", &list);
            let map = name(NFTA_LOOKUP_SET, "__map9");
            messages.rule(V4, WEB, &[expression("lookup", &map)]);
            messages
        };
        assert_eq!(now(affine(true)), (Some(to(&["10.244.0.2:8080"])), true));
        assert_eq!(now(affine(false)), (None, false));
    }

    #[test]
    fn what_kube_proxy_does_not_do_is_not_understood() {
        let with = |say: &dyn Fn(&mut Messages)| {
            let mut messages = Messages::default();
            say(&mut messages);
            now(messages)
        };
        let rule = |message| {
            move |messages: &mut Messages| {
                messages.say(V4, "kube-proxy", message, &[name(NFTA_RULE_CHAIN, WEB)]);
            }
        };
        let set = |set: &'static str| {
            move |messages: &mut Messages| {
                messages.say(V4, "kube-proxy", NFT_MSG_NEWSET, &[name(NFTA_SET, set)]);
            }
        };
        let chain = |message, chain: &'static str| {
            move |messages: &mut Messages| messages.chain(V4, message, chain)
        };
        // A rule more, a table, a set of who knows whom.
        assert_eq!(with(&rule(NFT_MSG_NEWRULE)), (None, false));
        assert_eq!(
            with(&|messages| messages.say(V4, "kube-proxy", 2, &[])),
            (None, false)
        );
        assert_eq!(with(&set("mine")), (None, false));
        let list = [element(&[10, 96, 0, 1], &[], &[])];
        let add =
            |messages: &mut Messages| messages.elements(V4, NFT_MSG_NEWSETELEM, "mine", &list);
        assert_eq!(with(&add), (None, false));
        assert_eq!(with(&chain(NFT_MSG_DELCHAIN, "services")), (None, false));
        // This is what it does.
        assert_eq!(
            with(&rule(NFT_MSG_DELRULE)),
            (Some(ChainNow::Less(1)), true)
        );
        assert_eq!(
            with(&chain(NFT_MSG_DELCHAIN, WEB)),
            (Some(ChainNow::Gone), true)
        );
        assert_eq!(with(&chain(NFT_MSG_NEWCHAIN, "services")), (None, true));
        assert_eq!(with(&set("__map8")), (None, true));
    }

    proptest! {
        /// Anybody can make tables with this name.
        #[test]
        fn no_bytes_are_too_strange(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            message in 0_u8..20,
            set in 0..3_usize,
        ) {
            let set = ["service-ips", "__map1", "cluster-ips"][set];
            let mut transaction = Transaction::default();
            let table = (V4, "kube-proxy".to_owned());
            let list = attribute(NFTA_ELEMENTS, &attribute(1, &bytes));
            let listed = [name(NFTA_SET, set), list].concat();
            let rules = attribute(NFTA_RULE_EXPRESSIONS, &attribute(1, &bytes));
            let rules = [name(NFTA_RULE_CHAIN, WEB), rules].concat();
            for bytes in [&bytes, &listed, &rules] {
                let _ = transaction.take(&table, message, &Attributes::nested(bytes));
            }
            let closed = transaction.close();
            let mut found = crate::rules::services::Found::default();
            let _ = closed.map(|(patch, _)| found.apply(&patch));
        }
    }
}
