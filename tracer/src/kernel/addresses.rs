//! A dummy link and the addresses bound to it, over rtnetlink: one `send` for many addresses.
//!
//! Layouts are those of `include/uapi/linux/rtnetlink.h`, `if_link.h` and `if_addr.h`.

use std::collections::HashSet;
use std::fmt;
use std::net::IpAddr;

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::SockaddrStorage;

use super::netlink::{
    Attributes, NLM_F_ACK, NLM_F_CREATE_EXCL, NLM_F_DUMP, NetlinkError, Request, Socket,
};
use super::netns::{Netns, NetnsError};
use crate::cluster::Cidr;
use crate::rules::ipvs;

const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// Length of `ifinfomsg`.
const IFINFOMSG: usize = 16;

/// Why the link or its addresses could not be read or made.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// The link could not be made.
    #[error(
        "cannot make the dummy link {link} in namespace {namespace}: {source}; load the module \
         dummy (modprobe dummy)"
    )]
    Link {
        /// The link.
        link: String,
        /// The namespace.
        namespace: String,
        /// What the kernel said.
        source: NetlinkError,
    },
    /// Links or addresses could not be listed or sent.
    #[error("cannot {what} in namespace {namespace}: {source}")]
    Netlink {
        /// What was tried.
        what: String,
        /// The namespace.
        namespace: String,
        /// What went wrong.
        source: NetlinkError,
    },
    /// The node's addresses could not be listed.
    #[error("cannot list the addresses of namespace {namespace}: {source}")]
    List {
        /// The namespace.
        namespace: String,
        /// What the kernel said.
        source: Errno,
    },
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

/// The addresses on which a node serves NodePorts: all but those that IPVS mode binds for Services, and
/// those that are good for one link only. Loopback ones are among them.
pub fn of_node(ns: &Netns) -> Result<Vec<IpAddr>, AddressError> {
    let list = ns.run(getifaddrs)?.map_err(|source| AddressError::List {
        namespace: ns.name().to_owned(),
        source,
    })?;
    let mut addresses: Vec<IpAddr> = list
        .filter(|interface| interface.interface_name != ipvs::LINK)
        .filter_map(|interface| ip_of(&interface.address?))
        .filter(|address| match address {
            IpAddr::V4(_) => true,
            IpAddr::V6(v6) => !v6.is_unicast_link_local(),
        })
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

/// An address that IPVS mode has bound on the node: whatever this node sends there, on any port, stays here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The address.
    pub address: IpAddr,
    /// The network of another link of the node in which it lies: there another machine may have it.
    pub attached: Option<Attached>,
}

/// A network that one of the node's links is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The network.
    pub network: Cidr,
    /// The link.
    pub link: String,
}

impl fmt::Display for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.network, self.link)
    }
}

/// The addresses of kube-ipvs0.
pub fn bound(ns: &Netns) -> Result<Vec<Bound>, AddressError> {
    let list = ns.run(getifaddrs)?.map_err(|source| AddressError::List {
        namespace: ns.name().to_owned(),
        source,
    })?;
    let mut bound = Vec::new();
    let mut networks = Vec::new();
    for interface in list {
        let Some(address) = interface.address.as_ref().and_then(ip_of) else {
            continue;
        };
        if interface.interface_name == ipvs::LINK {
            bound.push(address);
        } else if !address.is_loopback() {
            let mask = interface.netmask.as_ref().and_then(ip_of);
            networks.extend(mask.map(|mask| (network(address, mask), interface.interface_name)));
        }
    }
    Ok(among(&bound, &networks))
}

fn among(bound: &[IpAddr], networks: &[(Cidr, String)]) -> Vec<Bound> {
    let of = |address: &IpAddr| {
        // A network of one address is that address.
        let holds = |(network, _): &&(Cidr, String)| {
            let whole = if address.is_ipv4() { 32 } else { 128 };
            network.prefix < whole && network.contains(*address)
        };
        let attached = networks.iter().find(holds).map(|(network, link)| Attached {
            network: *network,
            link: link.clone(),
        });
        Bound {
            address: *address,
            attached,
        }
    };
    bound.iter().map(of).collect()
}

fn ip_of(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    v4.or_else(|| Some(IpAddr::V6(address.as_sockaddr_in6()?.ip())))
}

fn network(address: IpAddr, mask: IpAddr) -> Cidr {
    let ones = match mask {
        IpAddr::V4(mask) => mask.to_bits().count_ones(),
        IpAddr::V6(mask) => mask.to_bits().count_ones(),
    };
    Cidr {
        base: address,
        prefix: u8::try_from(ones).unwrap_or(u8::MAX),
    }
    .network()
}

/// One address to bind or to let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressChange {
    /// The address.
    pub address: IpAddr,
    /// Bind it, or let it go?
    pub bind: bool,
}

/// The change as arguments of `ip`.
impl fmt::Display for AddressChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.bind { "add" } else { "delete" };
        write!(f, "address {verb} {}", self.address)
    }
}

impl AddressChange {
    /// What helps when the kernel refuses this with `errno` (`inet_rtm_newaddr`,
    /// `inet6_rtm_newaddr` and their counterparts).
    pub fn remedy(self, errno: i32) -> &'static str {
        match errno {
            libc::EACCES if self.address.is_ipv6() => {
                "IPv6 is off on the link: set net.ipv6.conf.all.disable_ipv6 to 0"
            }
            libc::EOPNOTSUPP | libc::EAFNOSUPPORT => "the kernel lacks this address family",
            libc::EEXIST => "it is on the link already: apply again",
            libc::EADDRNOTAVAIL if self.bind => "it is no address that a link can have",
            libc::EADDRNOTAVAIL => "somebody else took it away meanwhile: apply again",
            libc::EPERM => "run as root (CAP_NET_ADMIN)",
            libc::ENODEV => "somebody else deleted the link meanwhile: apply again",
            _ => "see the kernel's log (dmesg)",
        }
    }
}

/// A dummy link in a namespace.
#[derive(Debug)]
pub struct DummyLink<'a> {
    netns: &'a Netns,
    name: &'a str,
    socket: Socket,
}

impl<'a> DummyLink<'a> {
    /// The link of this name, which need not be there.
    pub fn new(netns: &'a Netns, name: &'a str) -> Result<Self, AddressError> {
        let socket = netns.run(Socket::route)?;
        let socket = socket.map_err(|source| AddressError::Netlink {
            what: "open a route socket".to_owned(),
            namespace: netns.name().to_owned(),
            source,
        })?;
        Ok(Self {
            netns,
            name,
            socket,
        })
    }

    /// Makes the link, down as kube-proxy leaves it, unless it is there.
    pub fn ensure(&mut self) -> Result<(), AddressError> {
        let request = Request::raw(
            libc::RTM_NEWLINK,
            NLM_F_CREATE_EXCL | NLM_F_ACK,
            &[0; IFINFOMSG],
        )
        .string(IFLA_IFNAME, self.name)
        .and_then(|request| {
            request.nested(IFLA_LINKINFO, |info| info.string(IFLA_INFO_KIND, "dummy"))
        });
        match request.and_then(|request| self.socket.change(&request)) {
            Err(error) if error.errno() != Some(libc::EEXIST) => Err(AddressError::Link {
                link: self.name.to_owned(),
                namespace: self.netns.name().to_owned(),
                source: error,
            }),
            _ => Ok(()),
        }
    }

    /// The addresses bound to it, but for those it gives itself (link-local); `None` if there is
    /// no such link.
    pub fn addresses(&mut self) -> Result<Option<Vec<IpAddr>>, AddressError> {
        let Some(wanted) = self.index()? else {
            return Ok(None);
        };
        let request = Request::raw(libc::RTM_GETADDR, NLM_F_DUMP, &ifaddrmsg(0, 0, 0));
        self.socket
            .dump_messages(&request, |found: &mut Vec<IpAddr>, header, attributes| {
                let (_, index) = header.split_at(header.len() - 4);
                if *index == wanted.to_ne_bytes() {
                    found.extend(read_address(&attributes)?.filter(|ip| !is_link_local(*ip)));
                }
                Ok(())
            })
            .map(Some)
            .map_err(|source| self.error("list addresses", source))
    }

    /// Binds and lets go, each on its own: `refused` gets the position and error of each that the
    /// kernel refuses. Returns the bytes sent.
    pub fn change(
        &mut self,
        changes: &[AddressChange],
        refused: impl FnMut(usize, NetlinkError),
    ) -> Result<u64, AddressError> {
        if changes.is_empty() {
            return Ok(0);
        }
        let what = "change addresses";
        let index = self.index()?.ok_or_else(|| {
            let gone = std::io::Error::from_raw_os_error(libc::ENODEV);
            self.error(what, NetlinkError::Refused(gone))
        })?;
        let requests: Result<Vec<Request>, _> = changes
            .iter()
            .map(|change| request(*change, index))
            .collect();
        requests
            .and_then(|requests| {
                self.socket.changes(&requests, refused)?;
                Ok(requests.iter().map(|request| request.size() as u64).sum())
            })
            .map_err(|source| self.error(what, source))
    }

    fn index(&self) -> Result<Option<u32>, AddressError> {
        // A link that cannot be asked for is reported by what needs it.
        Ok(self.netns.run(|| if_nametoindex(self.name))?.ok())
    }

    fn error(&self, what: &str, source: NetlinkError) -> AddressError {
        AddressError::Netlink {
            what: format!("{what} of {}", self.name),
            namespace: self.netns.name().to_owned(),
            source,
        }
    }
}

/// What must change so that a link with the addresses `bound` has exactly `wanted`: first what is
/// missing, in `wanted`'s order, then what is too much.
pub fn difference(bound: &[IpAddr], wanted: &[IpAddr]) -> Vec<AddressChange> {
    let there: HashSet<&IpAddr> = bound.iter().collect();
    let mut asked = HashSet::with_capacity(wanted.len());
    let mut changes = Vec::new();
    for address in wanted {
        if asked.insert(address) && !there.contains(address) {
            changes.push(AddressChange {
                address: *address,
                bind: true,
            });
        }
    }
    changes.extend(
        bound
            .iter()
            .filter(|address| !asked.contains(address))
            .map(|address| AddressChange {
                address: *address,
                bind: false,
            }),
    );
    changes
}

fn request(change: AddressChange, index: u32) -> Result<Request, NetlinkError> {
    let (family, prefix, bytes) = match change.address {
        IpAddr::V4(v4) => (libc::AF_INET, 32, v4.octets().to_vec()),
        IpAddr::V6(v6) => (libc::AF_INET6, 128, v6.octets().to_vec()),
    };
    // Address families are below 256.
    let header = ifaddrmsg(u8::try_from(family).unwrap_or(0), prefix, index);
    let (kind, flags) = if change.bind {
        (libc::RTM_NEWADDR, NLM_F_CREATE_EXCL)
    } else {
        (libc::RTM_DELADDR, 0)
    };
    Request::raw(kind, flags, &header)
        .bytes(IFA_LOCAL, &bytes)?
        .bytes(IFA_ADDRESS, &bytes)
}

/// `ifaddrmsg`: family, prefix length, flags, scope (both 0: global), index.
fn ifaddrmsg(family: u8, prefix: u8, index: u32) -> [u8; 8] {
    let [a, b, c, d] = index.to_ne_bytes();
    [family, prefix, 0, 0, a, b, c, d]
}

/// `IFA_LOCAL`, which IPv6 leaves out where it equals `IFA_ADDRESS`.
fn read_address(attributes: &Attributes<'_>) -> Result<Option<IpAddr>, NetlinkError> {
    let bytes = match attributes.clone().find(IFA_LOCAL)? {
        None => attributes.clone().find(IFA_ADDRESS)?,
        local => local,
    };
    let Some(bytes) = bytes else { return Ok(None) };
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(Some(v4.into()));
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(v6) => Ok(Some(v6.into())),
        Err(_) => Err(NetlinkError::Garbled("an address of a wrong length")),
    }
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn what_lies_in_a_links_network_may_be_another_machines() {
        let net = |text: &str, link: &str| {
            let (base, prefix) = text.split_once('/').expect("a network");
            let prefix = prefix.parse().expect("a number");
            let base = ip(base);
            (Cidr { base, prefix }, link.to_owned())
        };
        let networks = [net("192.0.2.0/24", "eth0"), net("10.244.0.1/32", "cali1")];
        let bound = [
            ip("10.96.0.1"),
            ip("192.0.2.7"),
            ip("10.244.0.1"),
            ip("fd00::1"),
        ];
        let found = among(&bound, &networks);
        let attached = |bound: &Bound| Some((bound.address, bound.attached.as_ref()?.to_string()));
        let attached: Vec<_> = found.iter().filter_map(attached).collect();
        assert_eq!(
            attached,
            [(ip("192.0.2.7"), "192.0.2.0/24 of eth0".to_owned())]
        );
        assert_eq!(found.len(), bound.len());
        let (address, mask) = (ip("192.0.2.1"), ip("255.255.255.0"));
        assert_eq!(network(address, mask), networks[0].0);
    }

    #[test]
    fn only_the_difference_is_changed() {
        let bound = [ip("10.96.0.1"), ip("10.96.0.2")];
        let wanted = [ip("fd00::1"), ip("10.96.0.2"), ip("fd00::1")];
        assert_eq!(
            difference(&bound, &wanted),
            [
                AddressChange {
                    address: ip("fd00::1"),
                    bind: true
                },
                AddressChange {
                    address: ip("10.96.0.1"),
                    bind: false
                },
            ]
        );
        assert_eq!(difference(&bound, &bound), []);
    }

    #[test]
    fn addresses_are_read() {
        let read = |bytes: &[u8]| read_address(&Attributes::nested(bytes));
        let v4 = [8, 0, 2, 0, 10, 96, 0, 1];
        assert_eq!(read(&v4).expect("whole"), Some(ip("10.96.0.1")));
        let mut v6 = vec![20, 0, 1, 0];
        v6.extend([0xfd; 16]);
        assert!(matches!(read(&v6), Ok(Some(IpAddr::V6(_)))));
        assert_eq!(read(&[]).expect("none"), None);
        assert!(read(&[5, 0, 2, 0, 1, 0, 0, 0]).is_err());
        assert!(is_link_local(ip("fe80::1")));
    }
}
