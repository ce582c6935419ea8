//! IPVS servers over its generic netlink family, with no process an entry.
//!
//! The numbers of commands and attributes are those of `include/uapi/linux/ip_vs.h`.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;

use super::netlink::{ATTEMPTS, Attributes, NLM_F_ACK, NLM_F_DUMP, NetlinkError, Request, Socket};
use super::netns::{Netns, NetnsError};
use crate::cluster::Protocol;

// Generic netlink's own family, which tells the numbers of the others (genetlink.h).
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_VERSION: u8 = 2;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const IPVS_VERSION: u8 = 1;
const IPVS_CMD_NEW_SERVICE: u8 = 1;
const IPVS_CMD_SET_SERVICE: u8 = 2;
const IPVS_CMD_DEL_SERVICE: u8 = 3;
const IPVS_CMD_GET_SERVICE: u8 = 4;
const IPVS_CMD_NEW_DEST: u8 = 5;
const IPVS_CMD_SET_DEST: u8 = 6;
const IPVS_CMD_DEL_DEST: u8 = 7;
const IPVS_CMD_GET_DEST: u8 = 8;
const IPVS_CMD_ATTR_SERVICE: u16 = 1;
const IPVS_CMD_ATTR_DEST: u16 = 2;

const IPVS_SVC_ATTR_AF: u16 = 1;
const IPVS_SVC_ATTR_PROTOCOL: u16 = 2;
const IPVS_SVC_ATTR_ADDR: u16 = 3;
const IPVS_SVC_ATTR_PORT: u16 = 4;
const IPVS_SVC_ATTR_FWMARK: u16 = 5;
const IPVS_SVC_ATTR_SCHED_NAME: u16 = 6;
const IPVS_SVC_ATTR_FLAGS: u16 = 7;
const IPVS_SVC_ATTR_TIMEOUT: u16 = 8;
const IPVS_SVC_ATTR_NETMASK: u16 = 9;

const IPVS_DEST_ATTR_ADDR: u16 = 1;
const IPVS_DEST_ATTR_PORT: u16 = 2;
const IPVS_DEST_ATTR_FWD_METHOD: u16 = 3;
const IPVS_DEST_ATTR_WEIGHT: u16 = 4;
const IPVS_DEST_ATTR_U_THRESH: u16 = 5;
const IPVS_DEST_ATTR_L_THRESH: u16 = 6;
const IPVS_DEST_ATTR_ADDR_FAMILY: u16 = 11;

const IP_VS_SVC_F_PERSISTENT: u32 = 0x1;
const IP_VS_SVC_F_ONEPACKET: u32 = 0x4;
const IP_VS_SVC_F_SCHED1: u32 = 0x8;
const IP_VS_SVC_F_SCHED2: u32 = 0x10;
const IP_VS_SVC_F_SCHED3: u32 = 0x20;
/// The flags that a user sets; the kernel has more of its own (`IP_VS_SVC_F_HASHED`).
const SETTABLE: u32 = IP_VS_SVC_F_PERSISTENT
    | IP_VS_SVC_F_ONEPACKET
    | IP_VS_SVC_F_SCHED1
    | IP_VS_SVC_F_SCHED2
    | IP_VS_SVC_F_SCHED3;
/// `IP_VS_CONN_F_FWD_MASK`.
const FORWARD_MASK: u32 = 0x7;

/// Why IPVS servers could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum IpvsError {
    /// The kernel has no IPVS.
    #[error(
        "the kernel has no IPVS in namespace {namespace}: load the module ip_vs (modprobe ip_vs) \
         or use a kernel that has it"
    )]
    Lacks {
        /// The namespace.
        namespace: String,
    },
    /// A line of the wanted servers cannot be understood.
    #[error("IPVS servers, line {line}: {reason}: '{text}'")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// The line.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The kernel or its answer.
    #[error("cannot {what} the IPVS servers of namespace {namespace}: {source}")]
    Netlink {
        /// `list`, `change` or `look for`.
        what: &'static str,
        /// The namespace.
        namespace: String,
        /// What went wrong.
        source: NetlinkError,
    },
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

/// What a virtual server is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServerKey {
    /// Transport.
    pub protocol: Protocol,
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
}

/// How a virtual server chooses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scheduling {
    /// The scheduler: `rr`, `lc`, ...
    pub scheduler: String,
    /// `IP_VS_SVC_F_*`, of those that a user sets: persistent, one packet, the scheduler's three.
    pub flags: u32,
    /// How long a client keeps its real server, in seconds; only with the persistent flag.
    pub timeout: u32,
    /// Which clients count as one: an IPv4 netmask as the kernel keeps it (in network byte order,
    /// read as a native number), or an IPv6 prefix length.
    pub netmask: u32,
}

/// One real server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Real {
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// `IP_VS_CONN_F_*`: 0 masquerading, 2 tunnelling, 3 direct routing.
    pub forward: u32,
    /// Its share; 0 takes no new connections.
    pub weight: u32,
    /// Connections above which it gets no new ones; 0 for no limit.
    pub upper: u32,
    /// Connections below which it gets new ones again.
    pub lower: u32,
}

/// One virtual server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// What it is known by.
    pub key: ServerKey,
    /// How it chooses.
    pub scheduling: Scheduling,
    /// Its real servers.
    pub reals: Vec<Real>,
}

/// One change, which the kernel makes or refuses on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// `ipvsadm -A`.
    Add(&'a Server),
    /// `ipvsadm -E`.
    Edit(&'a Server),
    /// `ipvsadm -D`.
    Delete(&'a Server),
    /// `ipvsadm -a`.
    AddReal(&'a Server, &'a Real),
    /// `ipvsadm -e`.
    EditReal(&'a Server, &'a Real),
    /// `ipvsadm -d`.
    DeleteReal(&'a Server, &'a Real),
}

impl Change<'_> {
    const fn server(&self) -> &Server {
        match self {
            Self::Add(server)
            | Self::Edit(server)
            | Self::Delete(server)
            | Self::AddReal(server, _)
            | Self::EditReal(server, _)
            | Self::DeleteReal(server, _) => server,
        }
    }

    /// What helps when the kernel refuses this with `errno`; the sources are `ip_vs_ctl.c`'s
    /// `ip_vs_add_service`, `ip_vs_edit_service`, `ip_vs_new_dest` and `ip_vs_genl_set_cmd`.
    pub fn remedy(&self, errno: i32) -> String {
        match (self, errno) {
            (Self::Add(server) | Self::Edit(server), libc::ENOENT) => {
                let scheduler = &server.scheduling.scheduler;
                format!(
                    "the kernel has no IPVS scheduler {scheduler}: load its module (modprobe \
                     ip_vs_{scheduler})"
                )
            }
            (_, libc::EAFNOSUPPORT) => {
                "the kernel's IPVS lacks this address family (CONFIG_IP_VS_IPV6)".to_owned()
            }
            (_, libc::EEXIST) => {
                "somebody else added it meanwhile: apply again, and end what else manages IPVS"
                    .to_owned()
            }
            (Self::AddReal(..) | Self::EditReal(..) | Self::DeleteReal(..), libc::ESRCH) => {
                "its virtual server is not there: see the error before".to_owned()
            }
            (_, libc::ENOENT | libc::ESRCH) => {
                "somebody else took it away meanwhile: apply again, and end what else manages IPVS"
                    .to_owned()
            }
            // ip_vs_new_dest asks for the address's type, which needs a routing table.
            (Self::AddReal(..), libc::EINVAL) => {
                "a real server's address must be unicast: bring lo up and give the namespace an \
                 address first, without any IPVS takes no real servers"
                    .to_owned()
            }
            (_, libc::EPERM | libc::EACCES) => "run as root (CAP_NET_ADMIN)".to_owned(),
            (_, libc::ENOMEM) => "free memory".to_owned(),
            _ => "see `svcpath doctor` and the kernel's log (dmesg)".to_owned(),
        }
    }

    fn request(&self, family: u16) -> Result<Request, NetlinkError> {
        let (command, real) = match self {
            Self::Add(_) => (IPVS_CMD_NEW_SERVICE, None),
            Self::Edit(_) => (IPVS_CMD_SET_SERVICE, None),
            Self::Delete(_) => (IPVS_CMD_DEL_SERVICE, None),
            Self::AddReal(_, real) => (IPVS_CMD_NEW_DEST, Some(real)),
            Self::EditReal(_, real) => (IPVS_CMD_SET_DEST, Some(real)),
            Self::DeleteReal(_, real) => (IPVS_CMD_DEL_DEST, Some(real)),
        };
        let server = self.server();
        let whole = matches!(self, Self::Add(_) | Self::Edit(_));
        let request = Request::generic(family, command, IPVS_VERSION, 0).nested(
            IPVS_CMD_ATTR_SERVICE,
            |into| {
                let into = put_key(into, server.key)?;
                if whole {
                    put_scheduling(into, &server.scheduling)
                } else {
                    Ok(into)
                }
            },
        )?;
        match real {
            None => Ok(request),
            Some(real) => request.nested(IPVS_CMD_ATTR_DEST, |into| put_real(into, real)),
        }
    }
}

/// The change as an argument list of `ipvsadm`.
impl fmt::Display for Change<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let option = match self {
            Self::Add(_) => "-A",
            Self::Edit(_) => "-E",
            Self::Delete(_) => "-D",
            Self::AddReal(..) => "-a",
            Self::EditReal(..) => "-e",
            Self::DeleteReal(..) => "-d",
        };
        write!(f, "{option} {}", self.server().key)?;
        match self {
            Self::Add(server) | Self::Edit(server) => {
                write!(f, " -s {}", server.scheduling.scheduler)
            }
            Self::AddReal(_, real) | Self::EditReal(_, real) | Self::DeleteReal(_, real) => {
                write!(
                    f,
                    " -r {}",
                    std::net::SocketAddr::new(real.address, real.port)
                )
            }
            Self::Delete(_) => Ok(()),
        }
    }
}

impl fmt::Display for ServerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let option = match self.protocol {
            Protocol::Tcp => "-t",
            Protocol::Udp => "-u",
            Protocol::Sctp => "--sctp-service",
        };
        let socket = std::net::SocketAddr::new(self.address, self.port);
        write!(f, "{option} {socket}")
    }
}

/// The number of IPVS' generic netlink family; `None` if the kernel has not (yet) loaded IPVS. Asking for
/// it by its name would load it, so all families are listed.
pub fn generic_family(netns: &Netns) -> Result<Option<u16>, IpvsError> {
    let request = Request::generic(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_VERSION, NLM_F_DUMP);
    let list = || {
        Socket::generic()?.dump(&request, |found: &mut Option<u16>, family| {
            if family.clone().find(CTRL_ATTR_FAMILY_NAME)? == Some(b"IPVS\0") {
                *found = family.find_u16(CTRL_ATTR_FAMILY_ID)?;
            }
            Ok(())
        })
    };
    netns.run(list)?.map_err(|source| IpvsError::Netlink {
        what: "look for",
        namespace: netns.name().to_owned(),
        source,
    })
}

/// `AF_INET` and `AF_INET6` of Linux.
const fn family_of(address: IpAddr) -> u16 {
    match address {
        IpAddr::V4(_) => 2,
        IpAddr::V6(_) => 10,
    }
}

/// `union nf_inet_addr`.
fn address_bytes(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, d] = v4.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn put_key(into: Request, key: ServerKey) -> Result<Request, NetlinkError> {
    let protocol = u16::from(key.protocol.number());
    into.bytes(IPVS_SVC_ATTR_AF, &family_of(key.address).to_ne_bytes())?
        .bytes(IPVS_SVC_ATTR_PROTOCOL, &protocol.to_ne_bytes())?
        .bytes(IPVS_SVC_ATTR_ADDR, &address_bytes(key.address))?
        .bytes(IPVS_SVC_ATTR_PORT, &key.port.to_be_bytes())
}

fn put_scheduling(into: Request, scheduling: &Scheduling) -> Result<Request, NetlinkError> {
    // struct ip_vs_flags: flags and which of them are meant.
    let mut flags = [0; 8];
    flags[..4].copy_from_slice(&scheduling.flags.to_ne_bytes());
    flags[4..].copy_from_slice(&SETTABLE.to_ne_bytes());
    into.string(IPVS_SVC_ATTR_SCHED_NAME, &scheduling.scheduler)?
        .bytes(IPVS_SVC_ATTR_FLAGS, &flags)?
        .bytes(IPVS_SVC_ATTR_TIMEOUT, &scheduling.timeout.to_ne_bytes())?
        .bytes(IPVS_SVC_ATTR_NETMASK, &scheduling.netmask.to_ne_bytes())
}

fn put_real(into: Request, real: &Real) -> Result<Request, NetlinkError> {
    into.bytes(
        IPVS_DEST_ATTR_ADDR_FAMILY,
        &family_of(real.address).to_ne_bytes(),
    )?
    .bytes(IPVS_DEST_ATTR_ADDR, &address_bytes(real.address))?
    .bytes(IPVS_DEST_ATTR_PORT, &real.port.to_be_bytes())?
    .bytes(IPVS_DEST_ATTR_FWD_METHOD, &real.forward.to_ne_bytes())?
    .bytes(IPVS_DEST_ATTR_WEIGHT, &real.weight.to_ne_bytes())?
    .bytes(IPVS_DEST_ATTR_U_THRESH, &real.upper.to_ne_bytes())?
    .bytes(IPVS_DEST_ATTR_L_THRESH, &real.lower.to_ne_bytes())
}

/// A connection to a namespace's IPVS.
#[derive(Debug)]
pub struct Ipvs<'a> {
    netns: &'a Netns,
    socket: Socket,
    family: u16,
}

impl<'a> Ipvs<'a> {
    /// Connects; the module is loaded if it is one.
    pub fn open(netns: &'a Netns) -> Result<Self, IpvsError> {
        let connect = || -> Result<(Socket, Option<u16>), NetlinkError> {
            let mut socket = Socket::generic()?;
            let request =
                Request::generic(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_VERSION, NLM_F_ACK)
                    .string(CTRL_ATTR_FAMILY_NAME, "IPVS")?;
            let family = socket.dump(&request, |family: &mut Option<u16>, attributes| {
                *family = attributes.find_u16(CTRL_ATTR_FAMILY_ID)?;
                Ok(())
            });
            match family {
                Err(error) if error.errno() == Some(libc::ENOENT) => Ok((socket, None)),
                family => Ok((socket, family?)),
            }
        };
        let error = |source| IpvsError::Netlink {
            what: "list",
            namespace: netns.name().to_owned(),
            source,
        };
        let mut connected = netns.run(connect)?.map_err(error)?;
        if connected.1.is_none() && super::has_ipvs() {
            connected = netns.run(connect)?.map_err(error)?;
        }
        match connected {
            (socket, Some(family)) => Ok(Self {
                netns,
                socket,
                family,
            }),
            (_, None) => Err(IpvsError::Lacks {
                namespace: netns.name().to_owned(),
            }),
        }
    }

    /// Every virtual server that is known by its address; those of a firewall mark, which
    /// kube-proxy never makes, are left out.
    pub fn servers(&mut self) -> Result<Vec<Server>, IpvsError> {
        let mut servers = self.virtual_servers()?;
        for server in &mut servers {
            let request =
                Request::generic(self.family, IPVS_CMD_GET_DEST, IPVS_VERSION, NLM_F_DUMP)
                    .nested(IPVS_CMD_ATTR_SERVICE, |into| put_key(into, server.key));
            let family = family_of(server.key.address);
            server.reals = request
                .and_then(|request| {
                    self.socket
                        .dump(&request, |reals: &mut Vec<Real>, attributes| {
                            reals.push(read_real(attributes, family)?);
                            Ok(())
                        })
                })
                .map_err(|source| self.error("list", source))?;
        }
        Ok(servers)
    }

    /// The virtual servers, without their real ones.
    ///
    /// Listed until two lists agree: a list of several messages goes on by a number that counts the
    /// servers of every namespace (`ip_vs_genl_dump_services`), so that one that ends meanwhile
    /// makes it leave out some of this one, and no flag says so.
    fn virtual_servers(&mut self) -> Result<Vec<Server>, IpvsError> {
        let request = Request::generic(self.family, IPVS_CMD_GET_SERVICE, IPVS_VERSION, NLM_F_DUMP);
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let servers = self
                .socket
                .dump(&request, |servers: &mut Vec<Server>, attributes| {
                    servers.extend(read_server(attributes)?);
                    Ok(())
                });
            let servers = servers.map_err(|source| self.error("list", source))?;
            if last.as_ref() == Some(&servers) {
                return Ok(servers);
            }
            last = Some(servers);
        }
        Err(self.error("list", NetlinkError::Interrupted))
    }

    /// Makes the changes, in order and each on its own: `refused` gets the position and error of
    /// each that the kernel refuses. Returns the bytes sent.
    pub fn change(
        &mut self,
        changes: &[Change<'_>],
        refused: impl FnMut(usize, NetlinkError),
    ) -> Result<u64, IpvsError> {
        let requests: Result<Vec<Request>, NetlinkError> = changes
            .iter()
            .map(|change| change.request(self.family))
            .collect();
        requests
            .and_then(|requests| {
                self.socket.changes(&requests, refused)?;
                Ok(requests.iter().map(|request| request.size() as u64).sum())
            })
            .map_err(|source| self.error("change", source))
    }

    fn error(&self, what: &'static str, source: NetlinkError) -> IpvsError {
        IpvsError::Netlink {
            what,
            namespace: self.netns.name().to_owned(),
            source,
        }
    }
}

/// The changes that make `wanted` of `current`: first what is missing or different, then what is
/// stale, as kube-proxy's sync does it. Servers that stay are not touched, so that their
/// connections live on.
pub fn difference<'a>(current: &'a [Server], wanted: &'a [Server]) -> Vec<Change<'a>> {
    let existing: HashMap<ServerKey, &Server> =
        current.iter().map(|server| (server.key, server)).collect();
    let mut kept = HashSet::with_capacity(wanted.len());
    let mut changes = Vec::new();
    for server in wanted {
        kept.insert(server.key);
        let Some(found) = existing.get(&server.key) else {
            changes.push(Change::Add(server));
            changes.extend(
                server
                    .reals
                    .iter()
                    .map(|real| Change::AddReal(server, real)),
            );
            continue;
        };
        if !same_scheduling(&found.scheduling, &server.scheduling) {
            changes.push(Change::Edit(server));
        }
        let known = |reals: &'a [Real]| -> HashMap<(IpAddr, u16), &'a Real> {
            reals
                .iter()
                .map(|real| ((real.address, real.port), real))
                .collect()
        };
        let (there, asked) = (known(&found.reals), known(&server.reals));
        for real in &server.reals {
            match there.get(&(real.address, real.port)) {
                None => changes.push(Change::AddReal(server, real)),
                Some(found) if *found != real => changes.push(Change::EditReal(server, real)),
                Some(_) => {}
            }
        }
        for real in &found.reals {
            if !asked.contains_key(&(real.address, real.port)) {
                changes.push(Change::DeleteReal(server, real));
            }
        }
    }
    changes.extend(
        current
            .iter()
            .filter(|server| !kept.contains(&server.key))
            .map(Change::Delete),
    );
    changes
}

/// Timeout and netmask mean something with persistence only.
fn same_scheduling(found: &Scheduling, wanted: &Scheduling) -> bool {
    let persistent = wanted.flags & IP_VS_SVC_F_PERSISTENT != 0;
    found.scheduler == wanted.scheduler
        && found.flags & SETTABLE == wanted.flags & SETTABLE
        && (!persistent || (found.timeout, found.netmask) == (wanted.timeout, wanted.netmask))
}

const WITHOUT: NetlinkError = NetlinkError::Garbled("an IPVS entry without what it must have");

fn read_server(attributes: Attributes<'_>) -> Result<Option<Server>, NetlinkError> {
    let service = Attributes::nested(attributes.find(IPVS_CMD_ATTR_SERVICE)?.ok_or(WITHOUT)?);
    let number = |kind| service.clone().find_u32(kind)?.ok_or(WITHOUT);
    if service.clone().find(IPVS_SVC_ATTR_FWMARK)?.is_some() {
        return Ok(None);
    }
    let family = service.clone().find_u16(IPVS_SVC_ATTR_AF)?.ok_or(WITHOUT)?;
    let protocol = service.clone().find_u16(IPVS_SVC_ATTR_PROTOCOL)?;
    let protocol = Protocol::ALL
        .into_iter()
        .find(|known| Some(u16::from(known.number())) == protocol)
        .ok_or(NetlinkError::Garbled(
            "an IPVS service of an unknown protocol",
        ))?;
    let scheduler = service
        .clone()
        .find(IPVS_SVC_ATTR_SCHED_NAME)?
        .and_then(|name| std::ffi::CStr::from_bytes_until_nul(name).ok())
        .ok_or(WITHOUT)?;
    let flags = service
        .clone()
        .find(IPVS_SVC_ATTR_FLAGS)?
        .and_then(|flags| flags.first_chunk().copied())
        .ok_or(WITHOUT)?;
    Ok(Some(Server {
        key: ServerKey {
            protocol,
            address: read_address(service.clone().find(IPVS_SVC_ATTR_ADDR)?, family)?,
            port: read_port(service.clone().find(IPVS_SVC_ATTR_PORT)?)?,
        },
        scheduling: Scheduling {
            scheduler: scheduler.to_string_lossy().into_owned(),
            flags: u32::from_ne_bytes(flags) & SETTABLE,
            timeout: number(IPVS_SVC_ATTR_TIMEOUT)?,
            netmask: number(IPVS_SVC_ATTR_NETMASK)?,
        },
        reals: Vec::new(),
    }))
}

/// A real server of a virtual server of this address family.
fn read_real(attributes: Attributes<'_>, family: u16) -> Result<Real, NetlinkError> {
    let real = Attributes::nested(attributes.find(IPVS_CMD_ATTR_DEST)?.ok_or(WITHOUT)?);
    let number = |kind| real.clone().find_u32(kind)?.ok_or(WITHOUT);
    // Kernels before 3.18 do not tell it.
    let family = real
        .clone()
        .find_u16(IPVS_DEST_ATTR_ADDR_FAMILY)?
        .unwrap_or(family);
    Ok(Real {
        address: read_address(real.clone().find(IPVS_DEST_ATTR_ADDR)?, family)?,
        port: read_port(real.clone().find(IPVS_DEST_ATTR_PORT)?)?,
        forward: number(IPVS_DEST_ATTR_FWD_METHOD)? & FORWARD_MASK,
        weight: number(IPVS_DEST_ATTR_WEIGHT)?,
        upper: number(IPVS_DEST_ATTR_U_THRESH)?,
        lower: number(IPVS_DEST_ATTR_L_THRESH)?,
    })
}

fn read_address(bytes: Option<&[u8]>, family: u16) -> Result<IpAddr, NetlinkError> {
    let bytes = bytes.ok_or(WITHOUT)?;
    let address = if family == family_of(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED)) {
        bytes.first_chunk::<4>().map(|v4| IpAddr::from(*v4))
    } else {
        bytes.first_chunk::<16>().map(|v6| IpAddr::from(*v6))
    };
    address.ok_or(NetlinkError::Garbled("an address of a wrong length"))
}

fn read_port(bytes: Option<&[u8]>) -> Result<u16, NetlinkError> {
    let bytes = bytes.and_then(|bytes| <[u8; 2]>::try_from(bytes).ok());
    bytes.map(u16::from_be_bytes).ok_or(WITHOUT)
}

/// The servers that a text for `ipvsadm -R` adds (`-A` and `-a` lines).
pub fn parse(text: &str) -> Result<Vec<Server>, IpvsError> {
    let mut servers: Vec<Server> = Vec::new();
    let mut positions: HashMap<ServerKey, usize> = HashMap::new();
    for (index, line) in text.lines().enumerate() {
        let bad = |reason| IpvsError::Line {
            line: index + 1,
            text: line.to_owned(),
            reason,
        };
        match parse_line(line).map_err(bad)? {
            None => {}
            Some(Line::Server(server)) => {
                if positions.insert(server.key, servers.len()).is_some() {
                    return Err(bad("this virtual server is there twice"));
                }
                servers.push(server);
            }
            Some(Line::Real(key, real)) => {
                let server = positions
                    .get(&key)
                    .and_then(|position| servers.get_mut(*position))
                    .ok_or_else(|| bad("no line before makes its virtual server"))?;
                server.reals.push(real);
            }
        }
    }
    Ok(servers)
}

enum Line {
    Server(Server),
    Real(ServerKey, Real),
}

fn parse_line(line: &str) -> Result<Option<Line>, &'static str> {
    let mut words = line.split_ascii_whitespace();
    let adds_real = match words.next() {
        None => return Ok(None),
        Some("-A" | "--add-service") => false,
        Some("-a" | "--add-server") => true,
        Some(_) => return Err("neither -A nor -a"),
    };
    let mut key = None;
    let mut real = None;
    let mut scheduling = Scheduling {
        // ipvsadm's default.
        scheduler: "wlc".to_owned(),
        flags: 0,
        timeout: 0,
        netmask: 0,
    };
    let mut mask = None;
    let (mut forward, mut weight, mut upper, mut lower) = (3, 1, 0, 0);
    while let Some(option) = words.next() {
        let mut value = || words.next().ok_or("an option without its value");
        match option {
            "-t" | "--tcp-service" => key = Some((Protocol::Tcp, socket(value()?)?)),
            "-u" | "--udp-service" => key = Some((Protocol::Udp, socket(value()?)?)),
            "--sctp-service" => key = Some((Protocol::Sctp, socket(value()?)?)),
            "-s" | "--scheduler" => value()?.clone_into(&mut scheduling.scheduler),
            "-p" | "--persistent" => {
                scheduling.flags |= IP_VS_SVC_F_PERSISTENT;
                scheduling.timeout = number(value()?)?;
            }
            "-M" | "--netmask" => mask = Some(value()?),
            "-o" | "--ops" => scheduling.flags |= IP_VS_SVC_F_ONEPACKET,
            "-b" | "--sched-flags" => {
                for flag in value()?.split(',') {
                    scheduling.flags |= match flag {
                        "flag-1" | "sh-fallback" | "mh-fallback" => IP_VS_SVC_F_SCHED1,
                        "flag-2" | "sh-port" | "mh-port" => IP_VS_SVC_F_SCHED2,
                        "flag-3" => IP_VS_SVC_F_SCHED3,
                        _ => return Err("an unknown flag of a scheduler"),
                    };
                }
            }
            "-r" | "--real-server" => real = Some(socket(value()?)?),
            "-m" | "--masquerading" => forward = 0,
            "-i" | "--ipip" => forward = 2,
            "-g" | "--gatewaying" => forward = 3,
            "-w" | "--weight" => weight = number(value()?)?,
            "-x" | "--u-threshold" => upper = number(value()?)?,
            "-y" | "--l-threshold" => lower = number(value()?)?,
            _ => return Err("an unknown option"),
        }
    }
    let (protocol, (address, port)) = key.ok_or("no virtual server")?;
    let key = ServerKey {
        protocol,
        address,
        port,
    };
    if !adds_real {
        scheduling.netmask = netmask(address, mask)?;
        return Ok(Some(Line::Server(Server {
            key,
            scheduling,
            reals: Vec::new(),
        })));
    }
    let (address, port) = real.ok_or("no real server")?;
    Ok(Some(Line::Real(
        key,
        Real {
            address,
            port,
            forward,
            weight,
            upper,
            lower,
        },
    )))
}

fn socket(text: &str) -> Result<(IpAddr, u16), &'static str> {
    let socket: std::net::SocketAddr = text.parse().map_err(|_| "not ADDRESS:PORT")?;
    Ok((socket.ip(), socket.port()))
}

fn number(text: &str) -> Result<u32, &'static str> {
    text.parse().map_err(|_| "not a number")
}

/// Without `-M` every client is its own.
fn netmask(address: IpAddr, mask: Option<&str>) -> Result<u32, &'static str> {
    match (address, mask) {
        (IpAddr::V4(_), None) => Ok(u32::MAX),
        (IpAddr::V6(_), None) => Ok(128),
        (IpAddr::V4(_), Some(mask)) => mask
            .parse::<std::net::Ipv4Addr>()
            .map(|mask| u32::from_ne_bytes(mask.octets()))
            .map_err(|_| "not a netmask"),
        (IpAddr::V6(_), Some(mask)) => number(mask),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "-A -t 10.96.0.1:80 -s rr\n\
                        -a -t 10.96.0.1:80 -r 10.244.0.1:8080 -m -w 1\n\
                        -a -t 10.96.0.1:80 -r 10.244.0.2:8080 -m -w 1\n\
                        -A -u [fd00::1]:53 -s rr -p 10800\n\
                        -a -u [fd00::1]:53 -r [fd00::2]:53 -m -w 1\n\
                        -A --sctp-service 10.96.0.2:5000 -s mh -b flag-1,flag-2\n";

    fn shown(changes: &[Change<'_>]) -> Vec<String> {
        changes.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn servers_are_parsed() {
        let servers = parse(TEXT).expect("servers");
        assert_eq!(servers.len(), 3);
        assert_eq!(servers[0].key.to_string(), "-t 10.96.0.1:80");
        assert_eq!(servers[0].reals.len(), 2);
        assert_eq!(servers[0].reals[0].forward, 0);
        assert_eq!(servers[0].scheduling.netmask, u32::MAX);
        assert_eq!(servers[1].key.to_string(), "-u [fd00::1]:53");
        assert_eq!(servers[1].scheduling.flags, IP_VS_SVC_F_PERSISTENT);
        assert_eq!(servers[1].scheduling.timeout, 10_800);
        assert_eq!(servers[1].scheduling.netmask, 128);
        assert_eq!(servers[2].scheduling.flags, 0x18);
        let real = parse(include_str!(
            "../rules/fixtures/kube-proxy-1.36.2/ipvs/ipvsadm.save"
        ));
        assert!(real.expect("a real dump").len() > 20);
    }

    #[test]
    fn a_bad_line_is_named() {
        for (line, reason) in [
            ("-A -t 10.96.0.1 -s rr", "ADDRESS:PORT"),
            ("-A -t 10.96.0.1:80 -s", "without its value"),
            ("-A -s rr", "no virtual server"),
            ("-a -t 10.96.0.1:80 -m", "no real server"),
            ("-a -t 10.96.0.9:80 -r 10.0.0.1:80", "no line before"),
            ("-A -t 10.96.0.1:80 -s rr", "twice"),
            ("-A -t 10.96.0.3:80 -p x", "not a number"),
            ("-A -f 1 -s rr", "unknown option"),
            ("-C", "neither"),
        ] {
            let error = parse(&format!("-A -t 10.96.0.1:80 -s rr\n\n{line}\n"))
                .expect_err(line)
                .to_string();
            assert!(error.contains(reason), "{error}");
            assert!(error.contains("line 3") && error.contains(line), "{error}");
        }
    }

    #[test]
    fn only_the_difference_is_changed() {
        let wanted = parse(TEXT).expect("servers");
        assert_eq!(shown(&difference(&[], &wanted)).len(), 6);
        assert_eq!(difference(&wanted, &wanted), []);
        let current = parse(
            "-A -t 10.96.0.9:80 -s rr\n\
             -A -t 10.96.0.1:80 -s rr -p 9\n\
             -a -t 10.96.0.1:80 -r 10.244.0.1:8080 -m -w 0\n\
             -a -t 10.96.0.1:80 -r 10.244.0.3:8080 -m -w 1\n",
        )
        .expect("servers");
        assert_eq!(
            shown(&difference(&current, &wanted[..1])),
            [
                "-E -t 10.96.0.1:80 -s rr",
                "-e -t 10.96.0.1:80 -r 10.244.0.1:8080",
                "-a -t 10.96.0.1:80 -r 10.244.0.2:8080",
                "-d -t 10.96.0.1:80 -r 10.244.0.3:8080",
                "-D -t 10.96.0.9:80",
            ]
        );
    }

    /// What is sent is what would be read, if the kernel answered with it.
    #[test]
    fn what_is_written_is_read() {
        for server in parse(TEXT).expect("servers") {
            let bytes = |change: Change<'_>| change.request(30).expect("short").body().to_vec();
            let add = bytes(Change::Add(&server));
            let read = read_server(Attributes::nested(&add[4..])).expect("whole");
            let read = read.expect("no firewall mark");
            assert_eq!(
                (read.key, &read.scheduling),
                (server.key, &server.scheduling)
            );
            for real in &server.reals {
                let add = bytes(Change::AddReal(&server, real));
                let family = family_of(server.key.address);
                let read = read_real(Attributes::nested(&add[4..]), family);
                assert_eq!(read.expect("whole"), *real);
            }
            for length in 0..add.len() - 4 {
                // Never a panic; short by padding alone is whole.
                let _ = read_server(Attributes::nested(&add[4..4 + length]));
            }
        }
    }

    #[test]
    fn remedies_name_the_module() {
        let servers = parse(TEXT).expect("servers");
        let remedy = Change::Add(&servers[2]).remedy(libc::ENOENT);
        assert!(remedy.contains("modprobe ip_vs_mh"), "{remedy}");
        let remedy = Change::Add(&servers[1]).remedy(libc::EAFNOSUPPORT);
        assert!(remedy.contains("CONFIG_IP_VS_IPV6"), "{remedy}");
    }
}
