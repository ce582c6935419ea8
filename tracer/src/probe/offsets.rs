//! The constants that the programs get at load time.

use super::catalogue::Shape;
use crate::kernel::btf::{Btf, BtfError};

/// Offsets of the kernel's fields that the programs read, by the name of the program's constant.
pub(super) fn offsets(btf: &Btf) -> Result<Vec<(&'static str, u32)>, BtfError> {
    Ok(vec![
        ("SKB_NFCT", btf.offset_of("sk_buff", "_nfct")?),
        ("SKB_HEAD", btf.offset_of("sk_buff", "head")?),
        (
            "SKB_NETWORK_HEADER",
            btf.offset_of("sk_buff", "network_header")?,
        ),
        ("SKB_DEV", btf.offset_of("sk_buff", "dev")?),
        ("DEV_NET", btf.offset_of("net_device", "nd_net.net")?),
        ("NET_INUM", btf.offset_of("net", "ns.inum")?),
        // The original direction's tuple; the reply's follows it.
        (
            "CT_TUPLE",
            btf.offset_of("nf_conn", "tuplehash")?
                + btf.offset_of("nf_conntrack_tuple_hash", "tuple")?,
        ),
        ("CT_STATUS", btf.offset_of("nf_conn", "status")?),
        ("TYPE_IPHDR", header(btf, "iphdr")?),
        ("TYPE_IPV6HDR", header(btf, "ipv6hdr")?),
        ("TYPE_TCPHDR", header(btf, "tcphdr")?),
        ("TYPE_ICMPHDR", header(btf, "icmphdr")?),
    ])
}

/// The same of `struct nf_hook_state`, for programs at functions.
pub(super) fn of_hooks(btf: &Btf) -> Result<Vec<(&'static str, u32)>, BtfError> {
    let of = |field| btf.offset_of("nf_hook_state", field);
    Ok(vec![
        ("STATE_HOOK", of("hook")?),
        ("STATE_PF", of("pf")?),
        ("STATE_NET", of("net")?),
    ])
}

/// The same of tables or chains, which the type information of their module describes.
pub(super) fn of_shape(btf: &Btf, shape: Shape) -> Result<Vec<(&'static str, u32)>, BtfError> {
    Ok(match shape {
        Shape::Tracking | Shape::Hook => vec![],
        Shape::Table => vec![
            ("TABLE_NAME", btf.offset_of("xt_table", "name")?),
            ("TABLE_PRIORITY", btf.offset_of("xt_table", "priority")?),
        ],
        Shape::Chain => vec![
            ("PKTINFO_SKB", btf.offset_of("nft_pktinfo", "skb")?),
            ("PKTINFO_STATE", btf.offset_of("nft_pktinfo", "state")?),
            ("BASE_CHAIN", btf.offset_of("nft_base_chain", "chain")?),
            (
                "BASE_PRIORITY",
                btf.offset_of("nft_base_chain", "ops.priority")?,
            ),
            ("BASE_TYPE", btf.offset_of("nft_base_chain", "type")?),
            ("CHAIN_TYPE", btf.offset_of("nft_chain_type", "type")?),
        ],
    })
}

/// The kernel's number of the function that casts an address to a type; `None` before 6.2.
pub(super) fn rdonly_cast(btf: &Btf) -> Result<Option<u32>, BtfError> {
    match btf.function("bpf_rdonly_cast") {
        Ok(function) => Ok(Some(function.id)),
        Err(BtfError::NoFunction(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The type that an address can be cast to; 0 where it cannot.
fn header(btf: &Btf, name: &str) -> Result<u32, BtfError> {
    match rdonly_cast(btf)? {
        Some(_) => btf.structure_id(name),
        None => Ok(0),
    }
}
