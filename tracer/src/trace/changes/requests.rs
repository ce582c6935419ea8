//! What requests ask for: the bytes that processes send to the kernel to change rules.
//!
//! Layouts are those of `include/uapi/linux/netfilter_ipv4/ip_tables.h`, `netfilter/ipset/ip_set.h`,
//! `ip_vs.h`, `if_addr.h` and `rtnetlink.h`. Anybody can send anything: what makes no sense is left out,
//! and said to be missing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tracer_ebpf::change::{Begin, subsystem};

use crate::kernel::netlink::{Attributes, Message, NetlinkError, messages};

/// One thing that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// Another table in the place of one of iptables-legacy.
    Legacy {
        family: &'static str,
        table: String,
        before: u32,
        after: u32,
    },
    /// Something to a set of ipset; without a name: to all of them.
    Set {
        set: Option<String>,
        change: SetChange,
    },
    /// Something to IPVS, and to which virtual server.
    Server {
        server: Option<String>,
        change: ServerChange,
    },
    /// An address of the link with this index.
    Address(Address),
    /// A link is to go, with its addresses.
    NoLink(LinkName),
}

/// See [`super::SetDelta`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SetChange {
    Create,
    Destroy,
    Flush,
    Rename,
    Add(u64),
    Delete(u64),
}

/// See [`super::ServerDelta`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ServerChange {
    Add,
    Edit,
    Delete,
    AddReal,
    EditReal,
    DeleteReal,
    Flush,
    Other,
}

/// An address that comes or goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Address {
    pub(super) link: u32,
    pub(super) address: IpAddr,
    pub(super) prefix: u8,
    pub(super) added: bool,
}

/// How a request names a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum LinkName {
    Index(u32),
    Name(String),
}

/// A request, read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Asked {
    /// What is asked for, each with the number of its message.
    pub(super) asks: Vec<(u32, Ask)>,
    /// Is there more that could not be read, or was not copied?
    pub(super) more: bool,
}

/// Reads a request. `ipvs` is IPVS' family, if that is known.
pub(super) fn read(begin: &Begin, bytes: &[u8], ipvs: Option<u16>) -> Asked {
    let one = |ask: Option<Ask>| Asked {
        more: ask.is_none(),
        asks: ask.into_iter().map(|ask| (0, ask)).collect(),
    };
    match begin.subsystem {
        subsystem::LEGACY => one(legacy(begin.detail, bytes)),
        subsystem::IPVS_OPTION => one(ipvs_option(begin.detail, bytes)),
        // What a transaction does is announced.
        subsystem::NFTABLES => Asked::default(),
        _ => Asked {
            more: begin.stored < begin.length,
            ..Asked::default()
        }
        .with_messages(bytes, |message| match begin.subsystem {
            subsystem::IPSET => ipset(message).map(Some),
            subsystem::IPVS => match ipvs {
                Some(family) if message.kind == i32::from(family) => ipvs_message(message),
                _ => Ok(None),
            },
            subsystem::ADDRESSES => link(message),
            _ => Ok(None),
        }),
    }
}

impl Asked {
    fn with_messages(
        mut self,
        bytes: &[u8],
        read: impl Fn(&Message<'_>) -> Result<Option<Ask>, NetlinkError>,
    ) -> Self {
        for message in messages(bytes) {
            let read = message.and_then(|message| Ok((message.sequence, read(&message)?)));
            match read {
                Ok((sequence, Some(ask))) => self.asks.push((sequence, ask)),
                Ok((_, None)) => {}
                Err(_) => self.more = true,
            }
        }
        self
    }
}

/// The number of the second message of a batch: the kernel's announcement of the transaction has it
/// (`nf_tables_gen_notify`, `net/netfilter/nf_tables_api.c`), the first message being the batch's begin.
pub(super) fn sequence_of_batch(bytes: &[u8]) -> Option<u32> {
    let length = usize::try_from(word(bytes, 0)?).ok()?;
    word(bytes, length.checked_next_multiple_of(4)?.checked_add(8)?)
}

/// Four bytes as a number in this machine's order.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*word))
}

/// `struct ipt_replace`, and `ip6t_replace`, which begins like it: the table's name, its entries, and
/// the number of counters, which is that of the entries before.
fn legacy(family: u32, bytes: &[u8]) -> Option<Ask> {
    const NAME: usize = 32; // XT_TABLE_MAXNAMELEN
    const ENTRIES: usize = 36;
    const COUNTERS: usize = 84;
    Some(Ask::Legacy {
        family: match family {
            2 => "IPv4",
            10 => "IPv6",
            _ => return None,
        },
        table: text(bytes.get(..NAME)?),
        before: word(bytes, COUNTERS)?,
        after: word(bytes, ENTRIES)?,
    })
}

/// A string, up to its terminating zero if it has one.
pub(super) fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&value[..end.unwrap_or(value.len())]).into_owned()
}

fn ipset(message: &Message<'_>) -> Result<Ask, NetlinkError> {
    const NFGENMSG: usize = 4;
    const SETNAME: u16 = 2;
    const ADT: u16 = 8;
    let (_, attributes) = message.parts(NFGENMSG)?;
    // Entries one by one are in a list; a single one is not.
    let entries = || {
        let list = attributes.clone().find(ADT)?;
        list.map_or(Ok(1), count)
    };
    // enum ipset_cmd
    let change = match message.kind & 0xff {
        2 => SetChange::Create,
        3 => SetChange::Destroy,
        4 => SetChange::Flush,
        5 | 6 => SetChange::Rename,
        9 => SetChange::Add(entries()?),
        10 => SetChange::Delete(entries()?),
        _ => return Err(NetlinkError::Garbled("no change of a set")),
    };
    let set = attributes.find(SETNAME)?.map(text);
    Ok(Ask::Set { set, change })
}

fn count(list: &[u8]) -> Result<u64, NetlinkError> {
    Attributes::nested(list).try_fold(0, |count, entry| {
        entry?;
        Ok(count + 1)
    })
}

fn ipvs_message(message: &Message<'_>) -> Result<Option<Ask>, NetlinkError> {
    const GENLMSGHDR: usize = 4;
    const SERVICE: u16 = 1;
    let (header, attributes) = message.parts(GENLMSGHDR)?;
    // IPVS_CMD_*
    let change = match header.first() {
        Some(1) => ServerChange::Add,
        Some(2) => ServerChange::Edit,
        Some(3) => ServerChange::Delete,
        Some(5) => ServerChange::AddReal,
        Some(6) => ServerChange::EditReal,
        Some(7) => ServerChange::DeleteReal,
        Some(9 | 10 | 12 | 16) => ServerChange::Other,
        Some(17) => ServerChange::Flush,
        _ => return Ok(None),
    };
    let server = attributes.find(SERVICE)?.map(server).transpose()?.flatten();
    Ok(Some(Ask::Server { server, change }))
}

/// A virtual server (`IPVS_SVC_ATTR_*`).
fn server(attributes: &[u8]) -> Result<Option<String>, NetlinkError> {
    let get = |kind| Attributes::nested(attributes).find(kind);
    if let Some(mark) = Attributes::nested(attributes).find_u32(5)?
        && mark != 0
    {
        return Ok(Some(format!("fwmark {mark}")));
    }
    let family = Attributes::nested(attributes).find_u16(1)?;
    let protocol = Attributes::nested(attributes).find_u16(2)?;
    let (address, port) = (get(3)?, get(4)?);
    Ok((|| {
        let address = match family? {
            2 => IpAddr::from(*address?.first_chunk::<4>()?),
            10 => IpAddr::from(*address?.first_chunk::<16>()?),
            _ => return None,
        };
        let port = u16::from_be_bytes(*port?.first_chunk()?);
        Some(server_name(address, port, protocol?))
    })())
}

fn server_name(address: IpAddr, port: u16, protocol: u16) -> String {
    let address = std::net::SocketAddr::new(address, port);
    match protocol {
        6 => format!("{address}/TCP"),
        17 => format!("{address}/UDP"),
        132 => format!("{address}/SCTP"),
        other => format!("{address}/{other}"),
    }
}

/// `struct ip_vs_service_user`, for IPv4 only: protocol, address and port in network order, mark.
fn ipvs_option(option: u32, bytes: &[u8]) -> Option<Ask> {
    const BASE: u32 = 64 + 1024 + 64; // IP_VS_BASE_CTL
    let change = match option.checked_sub(BASE)? {
        2 => ServerChange::Add,
        3 => ServerChange::Edit,
        4 => ServerChange::Delete,
        5 => ServerChange::Flush,
        7 => ServerChange::AddReal,
        8 => ServerChange::DeleteReal,
        9 => ServerChange::EditReal,
        _ => ServerChange::Other,
    };
    let names_server = !matches!(change, ServerChange::Flush | ServerChange::Other);
    let server = if names_server {
        let protocol = u16::from_ne_bytes(*bytes.first_chunk()?);
        let address = IpAddr::from(*bytes.get(4..)?.first_chunk::<4>()?);
        let port = u16::from_be_bytes(*bytes.get(8..)?.first_chunk()?);
        Some(match word(bytes, 12)? {
            0 => server_name(address, port, protocol),
            mark => format!("fwmark {mark}"),
        })
    } else {
        None
    };
    Some(Ask::Server { server, change })
}

/// Length of `struct ifaddrmsg`.
pub(super) const IFADDRMSG: usize = 8;

/// A message about links, which may also be an announcement.
fn link(message: &Message<'_>) -> Result<Option<Ask>, NetlinkError> {
    const IFINFOMSG: usize = 16;
    const IFLA_IFNAME: u16 = 3;
    match u16::try_from(message.kind) {
        Ok(kind @ (libc::RTM_NEWADDR | libc::RTM_DELADDR)) => {
            let (header, attributes) = message.parts(IFADDRMSG)?;
            Ok(address(kind, header, &attributes)?.map(Ask::Address))
        }
        Ok(libc::RTM_DELLINK) => {
            let (header, attributes) = message.parts(IFINFOMSG)?;
            let name = attributes.find(IFLA_IFNAME)?.map(text);
            Ok(match (word(header, 4), name) {
                (Some(index), _) if index != 0 => Some(Ask::NoLink(LinkName::Index(index))),
                (_, name) => name.map(|name| Ask::NoLink(LinkName::Name(name))),
            })
        }
        _ => Ok(None),
    }
}

/// The address that `RTM_NEWADDR` or `RTM_DELADDR` is about: `struct ifaddrmsg`, and the node's own end
/// (`IFA_LOCAL`) or, where there is only one, `IFA_ADDRESS`.
pub(super) fn address(
    kind: u16,
    header: &[u8],
    attributes: &Attributes<'_>,
) -> Result<Option<Address>, NetlinkError> {
    const IFA_ADDRESS: u16 = 1;
    const IFA_LOCAL: u16 = 2;
    let (Some([family, prefix, ..]), Some(link)) = (header.first_chunk::<4>(), word(header, 4))
    else {
        return Err(NetlinkError::Garbled("an address without its header"));
    };
    let bytes = match attributes.clone().find(IFA_LOCAL)? {
        Some(local) => Some(local),
        None => attributes.clone().find(IFA_ADDRESS)?,
    };
    let address = match i32::from(*family) {
        libc::AF_INET => bytes
            .and_then(|b| b.first_chunk::<4>())
            .map(|b| IpAddr::V4(Ipv4Addr::from(*b))),
        libc::AF_INET6 => bytes
            .and_then(|b| b.first_chunk::<16>())
            .map(|b| IpAddr::V6(Ipv6Addr::from(*b))),
        _ => None,
    };
    Ok(address.map(|address| Address {
        link,
        address,
        prefix: *prefix,
        added: kind == libc::RTM_NEWADDR,
    }))
}
