//! What requests ask for: the bytes that processes send to the kernel to change rules.
//!
//! Layouts are those of `include/uapi/linux/netfilter_ipv4/ip_tables.h`, `netfilter/ipset/ip_set.h`,
//! `ip_vs.h`, `if_addr.h` and `rtnetlink.h`. Anybody can send anything: what makes no sense is left out,
//! and said to be missing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tracer_ebpf::change::{Begin, subsystem};

use crate::kernel::netlink::{Attributes, Message, NLM_F_EXCL, NetlinkError, messages};

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
        /// With `-exist`: it is no mistake if it is so already.
        exist: bool,
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
    pub(super) ip: IpAddr,
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

/// What is known of a batch of messages to `nf_tables` by its beginning, and tells it from others: senders number
/// their messages alike in every batch (`nft_action` of iptables), and a batch that finds all as it wants it makes no
/// transaction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Batch {
    /// The number of its first message, its begin.
    first: u32,
    /// Its messages have numbers from the first one's up to below this.
    end: u32,
    /// The number of its second message; `None`: it has none but its end.
    second: Option<u32>,
    /// The generation that it makes, if it says which one it has seen (`NFNL_BATCH_GENID`): the kernel takes it in
    /// no other.
    generation: Option<u32>,
    /// Family and name of the table that its second message is about.
    table: Option<(u8, String)>,
}

/// `NFNL_MSG_BATCH_END` and `NFNL_BATCH_GENID` (`include/uapi/linux/netfilter/nfnetlink.h`).
const BATCH_END: u16 = 0x11;
const BATCH_GENID: u16 = 1;
/// `NFNL_SUBSYS_NFTABLES`, the upper byte of a message's type.
pub(super) const NFNL_SUBSYS_NFTABLES: u8 = 10;
/// The table's name has this number in every message about something in a table.
pub(super) const NFTA_TABLE: u16 = 1;
/// Length of `nlmsghdr`, and with `struct nfgenmsg`.
const MESSAGE: usize = 16;
const ABOUT: usize = MESSAGE + NFGENMSG;
/// Length of `struct nfgenmsg`.
pub(super) const NFGENMSG: usize = 4;

impl Batch {
    /// Reads the beginning of a batch that is so long; the rest need not be there.
    pub(super) fn read(bytes: &[u8], length: u32) -> Self {
        let mut batch = Self {
            first: word(bytes, 8).unwrap_or(0),
            ..Self::default()
        };
        // No message is shorter than its header.
        batch.end = batch
            .first
            .saturating_add(length / u32::try_from(MESSAGE).unwrap_or(u32::MAX));
        let at = word(bytes, 0)
            .and_then(|length| usize::try_from(length).ok()?.checked_next_multiple_of(4));
        let Some((begin, rest)) = at.and_then(|at| bytes.split_at_checked(at)) else {
            return batch;
        };
        batch.generation = first_attribute(begin, BATCH_GENID)
            .and_then(|value| value.first_chunk().copied())
            .map(|seen| match u32::from_be_bytes(seen).wrapping_add(1) {
                // The kernel leaves 0 out (nf_tables_commit).
                0 => 1,
                next => next,
            });
        match family(rest) {
            None | Some(BATCH_END) => {}
            Some(kind) => {
                batch.second = word(rest, 8);
                if kind >> 8 == u16::from(NFNL_SUBSYS_NFTABLES) {
                    let family = rest.get(MESSAGE).copied();
                    batch.table = family.zip(first_attribute(rest, NFTA_TABLE).map(text));
                }
            }
        }
        batch
    }

    /// Is the transaction with this number of its second message (`nf_tables_gen_notify`,
    /// `net/netfilter/nf_tables_api.c`) and this generation after it of this batch, as far as those tell?
    pub(super) fn makes(&self, sequence: u32, generation: u32) -> bool {
        self.second == Some(sequence) && self.generation.is_none_or(|makes| makes == generation)
    }

    /// Family and name of the table that its second message is about, if it names one.
    pub(super) const fn table(&self) -> Option<&(u8, String)> {
        self.table.as_ref()
    }

    /// Has it a message with this number?
    pub(super) fn has(&self, sequence: u32) -> bool {
        (self.first..self.end).contains(&sequence)
    }
}

/// The value of a message's first attribute, if that is of this kind and there in full.
fn first_attribute(message: &[u8], kind: u16) -> Option<&[u8]> {
    let (found, value) = Attributes::nested(message.get(ABOUT..)?).next()?.ok()?;
    (found == kind).then_some(value)
}

/// The generic family that a request goes to: its first message's type.
pub(super) fn family(bytes: &[u8]) -> Option<u16> {
    let kind = bytes.get(4..)?.first_chunk()?;
    Some(u16::from_ne_bytes(*kind))
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
    let exist = message.flags & NLM_F_EXCL == 0;
    Ok(Ask::Set { set, change, exist })
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

/// What [`super::ServerDelta::servers`] calls a virtual server.
pub(crate) fn server_name(address: IpAddr, port: u16, protocol: u16) -> String {
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
    Ok(address.map(|ip| Address {
        link,
        ip,
        prefix: *prefix,
        added: kind == libc::RTM_NEWADDR,
    }))
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernel::netlink::attribute;

    pub(in super::super) fn message(kind: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + body.len()).expect("short");
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        // NLM_F_REQUEST, NLM_F_ACK and NLM_F_EXCL
        bytes.extend([5, 2]);
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        bytes
    }

    pub(in super::super) fn begin(subsystem: u32, detail: u32, bytes: &[u8]) -> Begin {
        let length = u32::try_from(bytes.len()).expect("short");
        Begin {
            kind: 1,
            subsystem,
            time: 0,
            thread: 0,
            cgroup: 0,
            parent: 0,
            detail,
            length,
            stored: length,
            name: [0; 16],
            parent_name: [0; 16],
            argument: [0; 64],
        }
    }

    fn asked(subsystem: u32, detail: u32, bytes: &[u8]) -> Asked {
        read(&begin(subsystem, detail, bytes), bytes, Some(30))
    }

    /// `struct ipt_replace` of iptables-restore (1.8.9) for a nat table of 6 entries in the place of 5.
    fn replace() -> Vec<u8> {
        let mut bytes = b"nat".to_vec();
        bytes.resize(32, 0);
        for number in [0x1b_u32, 6, 1000] {
            bytes.extend(number.to_ne_bytes());
        }
        bytes.resize(84, 0);
        bytes.extend(5_u32.to_ne_bytes());
        bytes.resize(128, 0);
        bytes
    }

    #[test]
    fn a_legacy_table_is_read() {
        let table = |family| Ask::Legacy {
            family,
            table: "nat".to_owned(),
            before: 5,
            after: 6,
        };
        let v4 = asked(subsystem::LEGACY, 2, &replace());
        assert_eq!(v4.asks, [(0, table("IPv4"))]);
        let v6 = asked(subsystem::LEGACY, 10, &replace());
        assert_eq!(v6.asks, [(0, table("IPv6"))]);
        let cut = asked(subsystem::LEGACY, 2, &replace()[..86]);
        assert!(cut.asks.is_empty() && cut.more);
    }

    #[test]
    fn entries_of_a_set_are_counted() {
        let name = [attribute(1, &[7]), attribute(2, b"KUBE-CLUSTER-IP\0")].concat();
        let entry = attribute(7, &attribute(1, &[1, 2, 3, 4]));
        let list = attribute(8, &[entry.clone(), entry.clone(), entry.clone()].concat());
        let body = |rest: &[u8]| [&[2, 0, 0, 0], &name[..], rest].concat();
        let bytes = [
            message(0x0602, 7, &body(&[])),
            message(0x0609, 8, &body(&list)),
            message(0x060a, 9, &body(&entry)),
            message(0x0604, 10, &[2, 0, 0, 0]),
        ]
        .concat();
        let ask = |change| Ask::Set {
            set: Some("KUBE-CLUSTER-IP".to_owned()),
            change,
            exist: false,
        };
        let all = Ask::Set {
            set: None,
            change: SetChange::Flush,
            exist: false,
        };
        let read = asked(subsystem::IPSET, 0, &bytes);
        assert!(!read.more);
        assert_eq!(
            read.asks,
            [
                (7, ask(SetChange::Create)),
                (8, ask(SetChange::Add(3))),
                (9, ask(SetChange::Delete(1))),
                (10, all)
            ]
        );
        let cut = asked(subsystem::IPSET, 0, &bytes[..bytes.len() - 2]);
        assert!(cut.more && cut.asks.len() == 3);
    }

    #[test]
    fn virtual_servers_are_named() {
        let service = |address: &[u8], family: u16, mark: u32| {
            let attributes = [
                attribute(1, &family.to_ne_bytes()),
                attribute(2, &6_u16.to_ne_bytes()),
                attribute(3, address),
                attribute(4, &80_u16.to_be_bytes()),
                attribute(5, &mark.to_ne_bytes()),
            ];
            attribute(1, &attributes.concat())
        };
        let v4 = [10, 96, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let v6 = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        let body = |command: u8, rest: &[u8]| [&[command, 1, 0, 0], rest].concat();
        let bytes = [
            message(30, 1, &body(1, &service(&v4, 2, 0))),
            message(30, 2, &body(7, &service(&v6, 10, 0))),
            message(30, 3, &body(2, &service(&v4, 2, 9))),
            message(30, 4, &body(17, &[])),
            message(30, 5, &body(4, &[])),
            message(31, 6, &body(1, &service(&v4, 2, 0))),
        ]
        .concat();
        let read = asked(subsystem::IPVS, 0, &bytes);
        let server = |name: Option<&str>, change| Ask::Server {
            server: name.map(str::to_owned),
            change,
        };
        assert_eq!(
            read.asks,
            [
                (1, server(Some("10.96.0.1:80/TCP"), ServerChange::Add)),
                (
                    2,
                    server(Some("[fd00::1]:80/TCP"), ServerChange::DeleteReal)
                ),
                (3, server(Some("fwmark 9"), ServerChange::Edit)),
                (4, server(None, ServerChange::Flush)),
            ]
        );
        // Before IPVS is loaded no message can be one of its.
        let none = super::read(&begin(subsystem::IPVS, 0, &bytes), &bytes, None);
        assert_eq!(none, Asked::default());
    }

    #[test]
    fn servers_set_by_option_are_read() {
        let mut bytes = vec![17, 0, 0, 0, 10, 96, 0, 10, 0, 53, 0, 0];
        bytes.resize(128, 0);
        let server = |name: Option<&str>, change| Ask::Server {
            server: name.map(str::to_owned),
            change,
        };
        let read = |option| asked(subsystem::IPVS_OPTION, option, &bytes).asks;
        let named = server(Some("10.96.0.10:53/UDP"), ServerChange::AddReal);
        assert_eq!(read(1159), [(0, named)]);
        assert_eq!(read(1157), [(0, server(None, ServerChange::Flush))]);
        assert!(asked(subsystem::IPVS_OPTION, 1154, &bytes[..7]).more);
    }

    #[test]
    fn addresses_are_read() {
        let header = |family: u8, prefix: u8, link: u32| {
            [&[family, prefix, 0, 0][..], &link.to_ne_bytes()].concat()
        };
        let peer = [attribute(1, &[10, 0, 0, 2]), attribute(2, &[10, 0, 0, 1])].concat();
        let v6 = attribute(1, &[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        let link = [&[0, 0, 0, 0][..], &7_u32.to_ne_bytes(), &[0; 8]].concat();
        let by_name = [vec![0; 16], attribute(3, b"kube-ipvs0\0")].concat();
        let bytes = [
            message(20, 1, &[header(2, 32, 4), peer].concat()),
            message(21, 2, &[header(10, 128, 5), v6].concat()),
            message(17, 3, &link),
            message(17, 4, &by_name),
        ]
        .concat();
        let address = |text: &str, prefix, link, added| {
            Ask::Address(Address {
                link,
                ip: text.parse().expect("an address"),
                prefix,
                added,
            })
        };
        assert_eq!(
            asked(subsystem::ADDRESSES, 0, &bytes).asks,
            [
                (1, address("10.0.0.1", 32, 4, true)),
                (2, address("fd00::1", 128, 5, false)),
                (3, Ask::NoLink(LinkName::Index(7))),
                (4, Ask::NoLink(LinkName::Name("kube-ipvs0".to_owned()))),
            ]
        );
    }

    #[test]
    fn a_batch_is_known_by_its_beginning() {
        let begin = message(0x10, 40, &[0, 0, 0, 10]);
        let bytes = [&begin[..], &message(0x0a06, 41, &[2, 0, 0, 0])].concat();
        let batch = Batch::read(&bytes, 64);
        assert!(batch.makes(41, 7) && !batch.makes(40, 7), "{batch:?}");
        assert_eq!(
            (batch.has(39), batch.has(40), batch.has(44)),
            (false, true, false)
        );
        assert_eq!((family(&bytes), family(&bytes[..5])), (Some(0x10), None));
        assert_eq!(batch.table(), None);
        for short in [&bytes[..30], &[0xff; 4], &[]] {
            let batch = Batch::read(short, 0);
            assert_eq!((batch.second, batch.table()), (None, None));
        }
        // An empty one makes nothing.
        let empty = [&begin[..], &message(0x11, 41, &[0, 0, 0, 10])].concat();
        assert!(!Batch::read(&empty, 40).makes(41, 7));
        // That of iptables-nft-restore, cut off: the generation that it has seen, the table that it is about.
        let begin = message(0x10, 1, &[0, 0, 0, 10, 8, 0, 1, 0, 0, 0, 0, 4]);
        let rule = message(0x0a08, 2, &[2, 0, 0, 0, 8, 0, 1, 0, b'n', b'a', b't', 0, 9]);
        let bytes = [begin, rule].concat();
        let batch = Batch::read(&bytes[..bytes.len() - 1], 500);
        assert_eq!(batch.table(), Some(&(2, "nat".to_owned())));
        assert!(batch.makes(2, 5) && !batch.makes(2, 6), "{batch:?}");
    }

    #[test]
    fn a_request_that_was_not_copied_whole_has_more() {
        let bytes = message(0x0604, 1, &[2, 0, 0, 0]);
        let mut begin = begin(subsystem::IPSET, 0, &bytes);
        begin.length += 1;
        assert!(read(&begin, &bytes, None).more);
    }

    proptest! {
        /// Damaged requests of every kind are read, or said to be unreadable.
        #[test]
        fn no_bytes_break_it(
            subsystem in 0_u32..8,
            detail in prop_oneof![Just(2_u32), Just(10), 1150_u32..1170, any::<u32>()],
            kind in prop_oneof![0x0600_u16..0x0610, 15_u16..32],
            body in proptest::collection::vec(any::<u8>(), 0..100),
            damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        ) {
            let mut bytes = [message(kind, 1, &body), replace()].concat();
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let _ = asked(subsystem, detail, &bytes);
            let _ = Batch::read(&bytes, detail);
        }
    }
}
