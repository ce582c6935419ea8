//! The constants that the programs get at load time.

use super::catalogue::Shape;
use crate::kernel::btf::{Btf, BtfError};

/// Offsets of the kernel's fields that the programs read, by the name of the program's constant.
pub(super) fn offsets(btf: &Btf) -> Result<Vec<(&'static str, u32)>, BtfError> {
    let control = btf.offset_of("sk_buff", "cb")?;
    let parts4 = control + btf.offset_of("inet_skb_parm", "frag_max_size")?;
    let parts6 = match btf.offset_of("inet6_skb_parm", "frag_max_size") {
        Ok(offset) => control + offset,
        // A kernel without IPv6, or with it as a module that is not loaded, has no such packets.
        Err(BtfError::NoType(_)) => parts4,
        Err(error) => return Err(error),
    };
    Ok(vec![
        ("SKB_NFCT", btf.offset_of("sk_buff", "_nfct")?),
        ("SKB_HEAD", btf.offset_of("sk_buff", "head")?),
        (
            "SKB_NETWORK_HEADER",
            btf.offset_of("sk_buff", "network_header")?,
        ),
        ("SKB_DEV", btf.offset_of("sk_buff", "dev")?),
        ("SKB_LEN", btf.offset_of("sk_buff", "len")?),
        ("SKB_PARTS4", parts4),
        ("SKB_PARTS6", parts6),
        ("DEV_MTU", btf.offset_of("net_device", "mtu")?),
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

/// Fields by which what functions are called for is named: constant, module, structure, field.
const NAMES: [(&str, &str, &str, &str); 10] = [
    ("TABLE_NAME", "x_tables", "xt_table", "name"),
    ("CHAIN_NAME", "nf_tables", "nft_chain", "name"),
    ("CHAIN_TABLE", "nf_tables", "nft_chain", "table"),
    ("NFT_TABLE_NAME", "nf_tables", "nft_table", "name"),
    ("CONN_ADDRESS", "ip_vs", "ip_vs_conn", "daddr"),
    ("CONN_PORT", "ip_vs", "ip_vs_conn", "dport"),
    ("CONN_DEST", "ip_vs", "ip_vs_conn", "dest"),
    ("DEST_SERVICE", "ip_vs", "ip_vs_dest", "svc"),
    ("SERVICE_SCHEDULER", "ip_vs", "ip_vs_service", "scheduler"),
    ("SCHEDULER_NAME", "ip_vs", "ip_vs_scheduler", "name"),
];

/// Their offsets. Of a module that is not there nothing is ever met.
pub(super) fn of_names() -> Result<Vec<(&'static str, u32)>, BtfError> {
    let mut found = Vec::with_capacity(NAMES.len());
    for (constant, module, structure, field) in NAMES {
        let offset = match Btf::module(module) {
            Ok(btf) => btf.offset_of(structure, field)?,
            Err(BtfError::Missing { .. }) => match Btf::vmlinux()?.offset_of(structure, field) {
                Ok(offset) => offset,
                Err(BtfError::NoType(_)) => continue,
                Err(error) => return Err(error),
            },
            Err(error) => return Err(error),
        };
        found.push((constant, offset));
    }
    Ok(found)
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
