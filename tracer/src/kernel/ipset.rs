//! Counting the entries of sets of ipset, without the text that `ipset list` makes of them.
//!
//! The numbers of commands and attributes are those of
//! `include/uapi/linux/netfilter/ipset/ip_set.h`.

use std::collections::BTreeMap;
use std::path::Path;

use super::netlink::{Attributes, NLM_F_DUMP, NetlinkError, Request, Socket};
use super::netns::{Netns, NetnsError};

const NFNL_SUBSYS_IPSET: u8 = 6;
const IPSET_CMD_LIST: u8 = 7;
/// The oldest protocol that kernels of this program's time take (`IPSET_PROTOCOL_MIN`).
const IPSET_PROTOCOL: u8 = 6;
const IPSET_ATTR_PROTOCOL: u16 = 1;
const IPSET_ATTR_SETNAME: u16 = 2;
const IPSET_ATTR_FLAGS: u16 = 6;
const IPSET_ATTR_DATA: u16 = 7;
const IPSET_ATTR_ELEMENTS: u16 = 24;
/// What is asked for is the sets alone, not their entries.
const IPSET_FLAG_LIST_HEADER: u32 = 1 << 2;
/// Is there once ipset is, as a module or built in.
const LOADED: &str = "/sys/module/ip_set";

/// Why sets could not be counted.
#[derive(Debug, thiserror::Error)]
pub enum IpsetError {
    /// The kernel or its answer.
    #[error("cannot count the entries of ipsets: {0}")]
    Netlink(#[from] NetlinkError),
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

/// The number of entries of each set, by name. Where ipset is not loaded there are no sets, and asking
/// would load it.
pub fn count(ns: &Netns) -> Result<BTreeMap<String, u32>, IpsetError> {
    if !Path::new(LOADED).exists() {
        return Ok(BTreeMap::new());
    }
    Ok(ns.run(count_here)??)
}

fn count_here() -> Result<BTreeMap<String, u32>, NetlinkError> {
    let request = Request::new(NFNL_SUBSYS_IPSET, IPSET_CMD_LIST, NLM_F_DUMP, 0)
        .bytes(IPSET_ATTR_PROTOCOL, &[IPSET_PROTOCOL])?
        .bytes(IPSET_ATTR_FLAGS, &IPSET_FLAG_LIST_HEADER.to_be_bytes())?;
    Socket::netfilter()?.dump(&request, |counts: &mut BTreeMap<_, _>, set| {
        counts.extend(read(&set)?);
        Ok(())
    })
}

/// A set's name and number of entries. One without a number is left out: nobody knows of it.
fn read(set: &Attributes<'_>) -> Result<Option<(String, u32)>, NetlinkError> {
    let name = set.clone().find(IPSET_ATTR_SETNAME)?;
    let data = set.clone().find(IPSET_ATTR_DATA)?;
    let (Some(name), Some(data)) = (name, data) else {
        return Ok(None);
    };
    let elements = Attributes::nested(data).find_be32(IPSET_ATTR_ELEMENTS)?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = String::from_utf8_lossy(name).into_owned();
    Ok(elements.map(|elements| (name, elements)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::attribute;

    #[test]
    fn a_set_is_read() {
        const NET_BYTEORDER: u16 = 0x4000;
        let elements = attribute(
            IPSET_ATTR_ELEMENTS | NET_BYTEORDER,
            &30_000_u32.to_be_bytes(),
        );
        let name = attribute(IPSET_ATTR_SETNAME, b"KUBE-CLUSTER-IP\0");
        let set = [name.clone(), attribute(IPSET_ATTR_DATA, &elements)].concat();
        let read = |bytes: &[u8]| read(&Attributes::nested(bytes));
        assert_eq!(
            read(&set).expect("whole"),
            Some(("KUBE-CLUSTER-IP".to_owned(), 30_000))
        );
        let without = [name, attribute(IPSET_ATTR_DATA, &[])].concat();
        assert_eq!(read(&without).expect("whole"), None);
        assert!(read(&set[..set.len() - 1]).is_err());
    }
}
