//! Counting the rules and elements of an nftables table, without the text that `nft list` makes of
//! them.
//!
//! The numbers of messages and attributes are those of
//! `include/uapi/linux/netfilter/nf_tables.h`.

use super::netlink::{Attributes, NLM_F_DUMP, NetlinkError, Request, Socket};
use super::netns::{Netns, NetnsError};
use crate::cluster::Family;

const NFNL_SUBSYS_NFTABLES: u8 = 10;
const NFT_MSG_GETRULE: u8 = 7;
const NFT_MSG_GETSET: u8 = 10;
const NFT_MSG_GETSETELEM: u8 = 13;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;

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
/// Of an element: it is the end of the interval that the element before it starts.
const NFT_SET_ELEM_INTERVAL_END: u32 = 1;

/// Why a table could not be counted.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The kernel or its answer.
    #[error("cannot count table {family} {table} in namespace {namespace}: {source}")]
    Netlink {
        /// nft's name of the family.
        family: &'static str,
        /// The table.
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

/// Counts a table; one that does not exist holds nothing.
pub fn count(ns: &Netns, family: Family, table: &str) -> Result<TableCounts, NftError> {
    ns.run(Socket::netfilter)?
        .and_then(|mut socket| count_table(&mut socket, family, table))
        .map_err(|source| NftError::Netlink {
            family: family.nft(),
            table: table.to_owned(),
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

/// The elements in one `NFT_MSG_NEWSETELEM`; an interval counts once.
fn count_elements(message: Attributes<'_>) -> Result<u64, NetlinkError> {
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

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).expect("short");
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

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
