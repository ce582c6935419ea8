//! Counting the rules and elements of nftables tables, without the text that `nft list` makes of
//! them.
//!
//! The numbers of messages and attributes are those of
//! `include/uapi/linux/netfilter/nf_tables.h`.

use std::collections::{BTreeMap, BTreeSet};

use super::netlink::{Attributes, NLM_F_ACK, NLM_F_DUMP, NetlinkError, Request, Socket};
use super::netns::{Netns, NetnsError};
use crate::cluster::Family;

const NFNL_SUBSYS_NFTABLES: u8 = 10;
const NFT_MSG_GETTABLE: u8 = 1;
const NFT_MSG_GETRULE: u8 = 7;
const NFT_MSG_GETSET: u8 = 10;
const NFT_MSG_GETSETELEM: u8 = 13;
const NFT_MSG_GETGEN: u8 = 16;

// What the kernel announces; what is there comes in the same messages.
/// A chain is there, new or not.
pub const NFT_MSG_NEWCHAIN: u8 = 3;
/// A chain goes.
pub const NFT_MSG_DELCHAIN: u8 = 5;
/// A rule comes.
pub const NFT_MSG_NEWRULE: u8 = 6;
/// A rule goes.
pub const NFT_MSG_DELRULE: u8 = 8;
/// A set is there, new or not.
pub const NFT_MSG_NEWSET: u8 = 9;
/// A set goes.
pub const NFT_MSG_DELSET: u8 = 11;
/// Elements come.
pub const NFT_MSG_NEWSETELEM: u8 = 12;
/// Elements go.
pub const NFT_MSG_DELSETELEM: u8 = 14;
/// The transaction is in.
pub const NFT_MSG_NEWGEN: u8 = 15;
const NFPROTO_UNSPEC: u8 = 0;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;

const NFTA_GEN_ID: u16 = 1;
/// The table's name has this number in every message about a table or something in it.
const NFTA_TABLE: u16 = 1;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_FLAGS: u16 = 3;

/// Of a set: it belongs to a rule and has no name of its own.
const NFT_SET_ANONYMOUS: u32 = 1;
/// Of a set: its elements come and go by themselves, with time or with packets.
const NFT_SET_TIMEOUT: u32 = 0x10;
const NFT_SET_EVAL: u32 = 0x20;
/// Of an element: it is the end of the interval that the element before it starts.
const NFT_SET_ELEM_INTERVAL_END: u32 = 1;

/// Why a table could not be counted.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The kernel or its answer.
    #[error("cannot list {table} of nftables in namespace {namespace}: {source}")]
    Netlink {
        /// `table ip kube-proxy`, or all.
        table: String,
        /// The namespace.
        namespace: String,
        /// What went wrong.
        source: NetlinkError,
    },
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

/// What a table holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableCounts {
    /// Rules of all its chains.
    pub rules: u64,
    /// Elements of its named sets and maps.
    pub elements: u64,
}

/// A family (`NFPROTO_*`) and a table's name.
pub type TableKey = (u8, String);

/// A table's rules, and the elements of those of its sets and maps that only rule changes change: not
/// of anonymous ones, which belong to a rule, nor of those that packets fill or time empties.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Rules of all its chains.
    pub rules: u64,
    /// Elements by set.
    pub sets: BTreeMap<String, u64>,
}

/// Everything that `nf_tables` holds in a namespace, at a generation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// How many transactions there have been.
    pub generation: u32,
    /// What each table holds.
    pub tables: BTreeMap<TableKey, Holdings>,
}

/// How often everything is counted anew because it changed meanwhile.
const COUNTS: u32 = 5;

/// Counts everything in a namespace.
///
/// # Errors
///
/// The kernel's, or [`NetlinkError::Interrupted`]: it changed during each of several attempts.
pub fn count_all(ns: &Netns) -> Result<Ruleset, NftError> {
    let count = || {
        let mut socket = Socket::netfilter()?;
        for _ in 0..COUNTS {
            let generation = generation(&mut socket)?;
            let tables = count_tables(&mut socket)?;
            if self::generation(&mut socket)? == generation {
                return Ok(Ruleset { generation, tables });
            }
        }
        Err(NetlinkError::Interrupted)
    };
    ns.run(count)?.map_err(in_all(ns))
}

/// The tables of all families, without what they hold: `nft list tables` of nft 1.0.6 reads that as well, which of
/// 30,000 Services takes 20 s.
///
/// # Errors
///
/// The kernel's.
pub fn tables(ns: &Netns) -> Result<BTreeSet<TableKey>, NftError> {
    let list = || {
        let mut socket = Socket::netfilter()?;
        Ok(list_tables(&mut socket)?.into_keys().collect())
    };
    ns.run(list)?.map_err(in_all(ns))
}

/// nft's word for a family (`NFPROTO_*`, `include/uapi/linux/netfilter.h`).
pub const fn family_name(family: u8) -> &'static str {
    match family {
        1 => "inet",
        NFPROTO_IPV4 => "ip",
        3 => "arp",
        5 => "netdev",
        7 => "bridge",
        NFPROTO_IPV6 => "ip6",
        _ => "?",
    }
}

/// What went wrong with tables of any family.
fn in_all(ns: &Netns) -> impl Fn(NetlinkError) -> NftError {
    |source| NftError::Netlink {
        table: "the tables".to_owned(),
        namespace: ns.name().to_owned(),
        source,
    }
}

fn generation(socket: &mut Socket) -> Result<u32, NetlinkError> {
    let request = Request::new(
        NFNL_SUBSYS_NFTABLES,
        NFT_MSG_GETGEN,
        NLM_F_ACK,
        NFPROTO_UNSPEC,
    );
    let found = socket.dump(&request, |found: &mut Option<u32>, attributes| {
        *found = attributes.find_be32(NFTA_GEN_ID)?;
        Ok(())
    })?;
    found.ok_or(NetlinkError::Garbled("a generation without a number"))
}

/// A request for a list of what all families have.
fn all(message: u8) -> Request {
    Request::new(NFNL_SUBSYS_NFTABLES, message, NLM_F_DUMP, NFPROTO_UNSPEC)
}

/// All tables, with nothing counted.
fn list_tables(socket: &mut Socket) -> Result<BTreeMap<TableKey, Holdings>, NetlinkError> {
    socket.dump_messages(
        &all(NFT_MSG_GETTABLE),
        |tables: &mut BTreeMap<TableKey, Holdings>, header, attributes| {
            tables.entry(table_of(header, &attributes)?).or_default();
            Ok(())
        },
    )
}

fn count_tables(socket: &mut Socket) -> Result<BTreeMap<TableKey, Holdings>, NetlinkError> {
    let mut tables = list_tables(socket)?;
    let rules = socket.dump_messages(
        &all(NFT_MSG_GETRULE),
        |rules: &mut BTreeMap<TableKey, u64>, header, attributes| {
            *rules.entry(table_of(header, &attributes)?).or_default() += 1;
            Ok(())
        },
    )?;
    let sets = socket.dump_messages(
        &all(NFT_MSG_GETSET),
        |sets: &mut Vec<(TableKey, String)>, header, attributes| {
            let table = table_of(header, &attributes)?;
            sets.extend(lasting_set(&attributes)?.map(|set| (table, set)));
            Ok(())
        },
    )?;
    for (table, rules) in rules {
        tables.entry(table).or_default().rules = rules;
    }
    for ((family, table), set) in sets {
        let request = Request::new(NFNL_SUBSYS_NFTABLES, NFT_MSG_GETSETELEM, NLM_F_DUMP, family)
            .string(NFTA_SET_ELEM_LIST_TABLE, &table)?
            .string(NFTA_SET_ELEM_LIST_SET, &set)?;
        let elements = or_nothing(socket.dump(&request, |elements: &mut u64, message| {
            *elements += count_elements(message)?;
            Ok(())
        }))?;
        let holdings = tables.entry((family, table)).or_default();
        holdings.sets.insert(set, elements);
    }
    Ok(tables)
}

/// The family and table that a message is about.
fn table_of(header: &[u8], attributes: &Attributes<'_>) -> Result<TableKey, NetlinkError> {
    let name = string(attributes, NFTA_TABLE)?;
    match (header.first(), name) {
        (Some(family), Some(name)) => Ok((*family, name)),
        _ => Err(NetlinkError::Garbled("something in no table")),
    }
}

/// The set's name, if it has one and its elements change by rule changes alone.
pub fn lasting_set(set: &Attributes<'_>) -> Result<Option<String>, NetlinkError> {
    let flags = set.clone().find_be32(NFTA_SET_FLAGS)?.unwrap_or(0);
    if flags & (NFT_SET_TIMEOUT | NFT_SET_EVAL) != 0 {
        return Ok(None);
    }
    named_set(set)
}

/// An attribute that is a string with its terminating zero.
fn string(attributes: &Attributes<'_>, kind: u16) -> Result<Option<String>, NetlinkError> {
    let value = attributes.clone().find(kind)?;
    let text = value.and_then(|bytes| std::ffi::CStr::from_bytes_until_nul(bytes).ok());
    Ok(text.map(|text| text.to_string_lossy().into_owned()))
}

/// Counts a table; one that does not exist holds nothing.
pub fn count(ns: &Netns, family: Family, table: &str) -> Result<TableCounts, NftError> {
    ns.run(Socket::netfilter)?
        .and_then(|mut socket| count_table(&mut socket, family, table))
        .map_err(|source| NftError::Netlink {
            table: format!("table {} {table}", family.nft()),
            namespace: ns.name().to_owned(),
            source,
        })
}

fn count_table(
    socket: &mut Socket,
    family: Family,
    table: &str,
) -> Result<TableCounts, NetlinkError> {
    let request = list(NFT_MSG_GETRULE, family).string(NFTA_RULE_TABLE, table)?;
    let rules = or_nothing(socket.dump(&request, |rules: &mut u64, _| {
        *rules += 1;
        Ok(())
    }))?;

    let request = list(NFT_MSG_GETSET, family).string(NFTA_SET_TABLE, table)?;
    let sets = or_nothing(socket.dump(&request, |sets: &mut Vec<String>, set| {
        sets.extend(named_set(&set)?);
        Ok(())
    }))?;

    let mut elements = 0;
    for set in sets {
        let request = list(NFT_MSG_GETSETELEM, family)
            .string(NFTA_SET_ELEM_LIST_TABLE, table)?
            .string(NFTA_SET_ELEM_LIST_SET, &set)?;
        elements += or_nothing(socket.dump(&request, |elements: &mut u64, message| {
            *elements += count_elements(message)?;
            Ok(())
        }))?;
    }
    Ok(TableCounts { rules, elements })
}

/// A request for a list.
fn list(message: u8, family: Family) -> Request {
    let family = match family {
        Family::V4 => NFPROTO_IPV4,
        Family::V6 => NFPROTO_IPV6,
    };
    Request::new(NFNL_SUBSYS_NFTABLES, message, NLM_F_DUMP, family)
}

/// Nothing, if the table or set is not (or no longer) there.
fn or_nothing<T: Default>(result: Result<T, NetlinkError>) -> Result<T, NetlinkError> {
    match result {
        Err(error) if error.errno() == Some(libc::ENOENT) => Ok(T::default()),
        result => result,
    }
}

/// The name of the set or map, unless it is anonymous.
fn named_set(set: &Attributes<'_>) -> Result<Option<String>, NetlinkError> {
    // Without the attribute the set has no flags.
    let flags = set.clone().find_be32(NFTA_SET_FLAGS)?.unwrap_or(0);
    if flags & NFT_SET_ANONYMOUS != 0 {
        return Ok(None);
    }
    let name = set
        .clone()
        .find(NFTA_SET_NAME)?
        .and_then(|name| std::ffi::CStr::from_bytes_with_nul(name).ok())
        .and_then(|name| name.to_str().ok())
        .ok_or(NetlinkError::Garbled("a set without a name"))?;
    Ok(Some(name.to_owned()))
}

/// The elements in one `NFT_MSG_NEWSETELEM` or `NFT_MSG_DELSETELEM`; an interval counts once.
pub fn count_elements(message: Attributes<'_>) -> Result<u64, NetlinkError> {
    let mut count = 0;
    // An empty set has an empty list, or none.
    let elements = message.find(NFTA_SET_ELEM_LIST_ELEMENTS)?.unwrap_or(&[]);
    for element in Attributes::nested(elements) {
        let (kind, element) = element?;
        if kind != NFTA_LIST_ELEM {
            return Err(NetlinkError::Garbled("a list that holds no elements"));
        }
        let flags = Attributes::nested(element).find_be32(NFTA_SET_ELEM_FLAGS)?;
        count += u64::from(flags.unwrap_or(0) & NFT_SET_ELEM_INTERVAL_END == 0);
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::attribute;

    #[test]
    fn named_sets_are_told_from_anonymous_ones() {
        let name = attribute(NFTA_SET_NAME, b"cluster-ips\0");
        let read = |bytes: &[u8]| named_set(&Attributes::nested(bytes));
        assert_eq!(read(&name).expect("a set").as_deref(), Some("cluster-ips"));
        let flags = attribute(NFTA_SET_FLAGS, &[0, 0, 0, 3]);
        assert_eq!(read(&[name, flags].concat()).expect("a set"), None);
        assert!(read(&attribute(NFTA_SET_NAME, b"no zero")).is_err());
        assert!(read(&[]).is_err());
    }

    #[test]
    fn an_interval_is_one_element() {
        let start = attribute(NFTA_LIST_ELEM, &attribute(1, &[10, 0, 0, 0]));
        let end = attribute(
            NFTA_LIST_ELEM,
            &attribute(NFTA_SET_ELEM_FLAGS, &[0, 0, 0, 1]),
        );
        let message = attribute(
            NFTA_SET_ELEM_LIST_ELEMENTS,
            &[start.clone(), end, start].concat(),
        );
        let read = |bytes: &[u8]| count_elements(Attributes::nested(bytes));
        assert_eq!(read(&message).expect("elements"), 2);
        assert_eq!(read(&[]).expect("no elements"), 0);
        assert!(read(&message[..message.len() - 4]).is_err());
        let other = attribute(NFTA_SET_ELEM_LIST_ELEMENTS, &attribute(7, &[]));
        assert!(read(&other).is_err());
    }
}
