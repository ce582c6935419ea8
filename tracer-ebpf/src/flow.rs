//! Whose packet is it? Addresses, ports, and what user space said of them.

use aya_ebpf::Global;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap};
use tracer_ebpf::path::{ABSORBED, Origin, Path, Target};
use tracer_ebpf::record::{
    Address, Aligned, Key4, Key6, Known, PORT_BITS, PORT_IS_DESTINATION, PORT_IS_SOURCE, hook,
    protocol, sctp, tcp,
};

use crate::kernel::{COPY, Header, field, first4, halves, header_at, network_header};

// The node under test.
#[unsafe(no_mangle)]
static POD_NET4: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static POD_MASK4: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static POD_NET6: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static POD_MASK6: Global<u64> = Global::new(0);

/// 1 if packets are met before defragmentation: the first of several parts, which has ports, is no packet then.
#[unsafe(no_mangle)]
static WHOLE: Global<u32> = Global::new(0);

/// Which ports can be of interest at all: two bits a port.
#[map]
static PORTS: Array<[u8; PORT_BITS]> = Array::with_max_entries(1, 0);

/// Addresses and ports of interest.
#[map]
static TARGETS4: HashMap<Key4, Known> = HashMap::with_max_entries(1, 0);
/// The same for IPv6.
#[map]
static TARGETS6: HashMap<Key6, Known> = HashMap::with_max_entries(1, 0);

/// The node's own addresses.
#[map]
static NODES4: HashMap<[u8; 4], u32> = HashMap::with_max_entries(64, 0);
/// The same for IPv6.
#[map]
static NODES6: HashMap<[u8; 16], u32> = HashMap::with_max_entries(64, 0);

/// Not 0 where IPVS binds addresses of Services on the node: elsewhere the verifier removes what asks for them.
#[unsafe(no_mangle)]
static MAY_ABSORB: Global<u32> = Global::new(0);

/// Not 0 while there are any in `ABSORBED4` or `ABSORBED6`: most nodes with IPVS have none.
#[map]
static ABSORBS: Array<u32> = Array::with_max_entries(1, 0);

/// External addresses of Services that are bound on the node: what goes there stays here, on any port.
#[map]
static ABSORBED4: HashMap<[u8; 4], u32> = HashMap::with_max_entries(1, 0);
/// The same for IPv6.
#[map]
static ABSORBED6: HashMap<[u8; 16], u32> = HashMap::with_max_entries(1, 0);

/// What a packet's header says of its flow. An ICMP error belongs to the flow of the packet that it
/// quotes, in the other direction.
#[derive(Clone, Copy)]
pub(crate) struct Flow {
    pub(crate) source: Address,
    pub(crate) destination: Address,
    pub(crate) sport: [u8; 2],
    pub(crate) dport: [u8; 2],
    pub(crate) protocol: u8,
    /// TCP's flags, SCTP's first chunk type, or the type of an ICMP error.
    pub(crate) flags: u8,
    /// The code of an ICMP error.
    pub(crate) code: u8,
    /// Is it an ICMP error?
    pub(crate) error: bool,
}

impl Flow {
    pub(crate) const ZERO: Self = Self {
        source: Aligned([0; 16]),
        destination: Aligned([0; 16]),
        sport: [0; 2],
        dport: [0; 2],
        protocol: 0,
        flags: 0,
        code: 0,
        error: false,
    };

    /// Does it ask for something, as far as the port tells?
    #[inline(always)]
    fn may_ask(&self, ports: Ports) -> bool {
        !self.error && ports.bits(self.dport) & PORT_IS_DESTINATION != 0
    }

    /// Does it answer? Endpoints do; so does a node that refuses what was sent to a Service.
    #[inline(always)]
    fn may_answer(&self, ports: Ports) -> bool {
        let bits = ports.bits(self.sport);
        bits & PORT_IS_SOURCE != 0 || (bits & PORT_IS_DESTINATION != 0 && self.refuses())
    }

    #[inline(always)]
    fn refuses(&self) -> bool {
        self.error
            || (self.protocol == protocol::TCP && self.flags & tcp::RST != 0)
            || (self.protocol == protocol::SCTP && self.flags == sctp::ABORT)
    }
}

/// What [`PORTS`] says, looked up once a packet.
#[derive(Clone, Copy)]
struct Ports(*mut u8);

impl Ports {
    #[inline(always)]
    fn get() -> Option<Self> {
        PORTS.get_ptr_mut(0).map(|ports| Self(ports.cast()))
    }

    /// The byte in which a port's bits are, and how far up.
    #[inline(always)]
    fn place(self, port: [u8; 2]) -> (*mut u8, u32) {
        let port = u32::from(u16::from_be_bytes(port));
        // SAFETY: the map's value has two bits for each of 65536 ports.
        let byte = unsafe { self.0.add(port as usize >> 2) };
        (byte, (port & 3) << 1)
    }

    /// The two bits of a port, and others above them.
    #[inline(always)]
    fn bits(self, port: [u8; 2]) -> u8 {
        let (byte, shift) = self.place(port);
        // SAFETY: as in `place`.
        unsafe { *byte >> shift }
    }

    /// A bit that another CPU sets in the same byte may be lost, until its next flow.
    #[inline(always)]
    fn set(self, port: [u8; 2], bit: u8) {
        let (byte, shift) = self.place(port);
        // SAFETY: as in `place`.
        unsafe { *byte |= bit << shift }
    }
}

/// A header that could not be read, or a packet that is of no interest.
pub(crate) const NOTHING: u32 = 0xff;

/// The packet's path: an index below [`Path::COUNT`]; `Path::COUNT` for what comes from an endpoint
/// (conntrack will tell whose reply it is); [`ABSORBED`] and an origin; [`NOTHING`] for the rest, after one look at
/// the ports.
#[inline(always)]
pub(crate) unsafe fn recognise(skb: *const u8, ipv4: bool, at: u32, flow: &mut Flow) -> u32 {
    unsafe {
        if !read(skb, ipv4, flow) {
            return NOTHING;
        }
        let Some(ports) = Ports::get() else {
            return NOTHING;
        };
        if flow.may_ask(ports) {
            let target = target_of(ipv4, &flow.destination, flow.dport, flow.protocol);
            if target <= Target::Pod as u32 {
                let origin = if at == hook::OUTPUT {
                    Origin::Host as u32
                } else {
                    match origin_of(ipv4, &flow.source, &flow.destination) {
                        0 => Origin::Pod as u32,
                        _ => Origin::External as u32,
                    }
                };
                return Path::index_of(origin, target);
            }
        }
        if flow.may_answer(ports)
            && let Some(known) = known(ipv4, &flow.source, flow.sport, flow.protocol)
        {
            let target = (*known).target;
            if (*known).former != 0 && !flow.error {
                (*known).heard = bpf_ktime_get_ns();
            }
            if target < Target::Pod as u32 && flow.refuses() {
                let origin = origin_of(ipv4, &flow.destination, &flow.source);
                return Path::index_of(origin, target);
            }
            // A Service's address answers only where nobody translates.
            if target <= Target::Pod as u32 {
                return Path::COUNT as u32;
            }
        }
        if MAY_ABSORB.load() != 0 && !flow.error && is_absorbed(ipv4, &flow.destination) {
            // What the node sends there comes back to it by its loopback.
            return u32::from(ABSORBED) + origin_of(ipv4, &flow.source, &flow.destination);
        }
        NOTHING
    }
}

/// Is this an address that the node took for a Service?
#[inline(always)]
unsafe fn is_absorbed(ipv4: bool, address: &Address) -> bool {
    let Some(any) = ABSORBS.get_ptr(0) else {
        return false;
    };
    unsafe {
        if any.read_volatile() == 0 {
            false
        } else if ipv4 {
            ABSORBED4.get(first4(address).to_ne_bytes()).is_some()
        } else {
            ABSORBED6.get(address.0).is_some()
        }
    }
}

/// Reads what a packet's header says of its flow; false for protocols that Services do not have.
#[inline(always)]
pub(crate) unsafe fn read(skb: *const u8, ipv4: bool, flow: &mut Flow) -> bool {
    unsafe {
        let at = network_header(skb);
        if ipv4 {
            read4(at, flow)
        } else {
            read6(at, flow)
        }
    }
}

#[inline(always)]
const fn has_ports(number: u8) -> bool {
    number == protocol::TCP || number == protocol::UDP || number == protocol::SCTP
}

/// ICMP errors (RFC 792): destination unreachable, time exceeded, parameter problem.
#[inline(always)]
const fn is_error4(kind: u8) -> bool {
    kind == 3 || kind == 11 || kind == 12
}

#[inline(always)]
unsafe fn read4(at: u64, flow: &mut Flow) -> bool {
    unsafe {
        let (mut outer, mut inner) = (COPY, COPY);
        let ip = header_at(at, Header::Ipv4, &mut outer);
        let next: u8 = field(ip, 9);
        let part: u16 = field(ip, 6);
        let begin = at + u64::from(field::<u8>(ip, 0) & 0xf) * 4;
        // A fragment's offset, network order: where nothing defragments, later fragments have no ports. The bit
        // before it says that others follow.
        let mask = if WHOLE.load() != 0 { 0xff3f } else { 0xff1f };
        if part & mask != 0 {
            return false;
        }
        if has_ports(next) {
            put4(&mut flow.source, field(ip, 12));
            put4(&mut flow.destination, field(ip, 16));
            return read_transport(begin, next, flow);
        }
        if next != protocol::ICMP {
            return false;
        }
        let icmp = header_at(begin, Header::Icmp, &mut inner);
        (flow.flags, flow.code) = (field(icmp, 0), field(icmp, 1));
        if !is_error4(flow.flags) {
            return false;
        }
        let quoted = header_at(begin + 8, Header::Ipv4, &mut inner);
        let next: u8 = field(quoted, 9);
        put4(&mut flow.destination, field(quoted, 12));
        put4(&mut flow.source, field(quoted, 16));
        let begin = begin + 8 + u64::from(field::<u8>(quoted, 0) & 0xf) * 4;
        has_ports(next) && read_quoted(begin, next, flow)
    }
}

/// An IPv6 packet whose transport header or ICMP error follows at once.
#[inline(always)]
unsafe fn read6(at: u64, flow: &mut Flow) -> bool {
    unsafe {
        let (mut outer, mut inner) = (COPY, COPY);
        let ip = header_at(at, Header::Ipv6, &mut outer);
        let next: u8 = field(ip, 6);
        if has_ports(next) {
            put6(&mut flow.source, field(ip, 8), field(ip, 16));
            put6(&mut flow.destination, field(ip, 24), field(ip, 32));
            return read_transport(at + 40, next, flow);
        }
        if next != protocol::ICMP6 {
            return false;
        }
        let icmp = header_at(at + 40, Header::Icmp, &mut inner);
        (flow.flags, flow.code) = (field(icmp, 0), field(icmp, 1));
        // RFC 4443, section 2.1: errors have types below 128.
        if flow.flags >= 128 {
            return false;
        }
        let quoted = header_at(at + 48, Header::Ipv6, &mut inner);
        let next: u8 = field(quoted, 6);
        put6(&mut flow.destination, field(quoted, 8), field(quoted, 16));
        put6(&mut flow.source, field(quoted, 24), field(quoted, 32));
        has_ports(next) && read_quoted(at + 88, next, flow)
    }
}

#[inline(always)]
unsafe fn read_transport(begin: u64, next: u8, flow: &mut Flow) -> bool {
    unsafe {
        let mut copy = COPY;
        let transport = header_at(begin, Header::Transport, &mut copy);
        flow.protocol = next;
        flow.sport = field(transport, 0);
        flow.dport = field(transport, 2);
        flow.flags = match next {
            protocol::TCP => field(transport, 13),
            // The common header is 12 bytes long; the first chunk's type follows.
            protocol::SCTP => field(transport, 12),
            _ => 0,
        };
        true
    }
}

/// The ports of the packet that an ICMP error quotes, which went the other way.
#[inline(always)]
unsafe fn read_quoted(begin: u64, next: u8, flow: &mut Flow) -> bool {
    unsafe {
        let mut copy = COPY;
        let transport = header_at(begin, Header::Transport, &mut copy);
        flow.protocol = next;
        flow.error = true;
        flow.dport = field(transport, 0);
        flow.sport = field(transport, 2);
        true
    }
}

#[inline(always)]
unsafe fn put4(to: &mut Address, address: u32) {
    unsafe { (&raw mut *to).cast::<u32>().write(address) }
}

#[inline(always)]
unsafe fn put6(to: &mut Address, high: u64, low: u64) {
    unsafe {
        let halves = (&raw mut *to).cast::<u64>();
        halves.write(high);
        halves.add(1).write(low);
    }
}

/// What stands behind an address and port, or [`NOTHING`].
#[inline(always)]
pub(crate) unsafe fn target_of(ipv4: bool, address: &Address, port: [u8; 2], protocol: u8) -> u32 {
    known(ipv4, address, port, protocol).map_or(NOTHING, |known| unsafe { (*known).target })
}

#[inline(always)]
fn known(ipv4: bool, address: &Address, port: [u8; 2], protocol: u8) -> Option<*mut Known> {
    if ipv4 {
        TARGETS4.get_ptr_mut(key4(address, port, protocol))
    } else {
        TARGETS6.get_ptr_mut(key6(address, port, protocol))
    }
}

#[inline(always)]
fn key4(address: &Address, port: [u8; 2], protocol: u8) -> Key4 {
    Key4 {
        // SAFETY: the address has sixteen bytes.
        address: unsafe { first4(address) }.to_ne_bytes(),
        port,
        protocol,
        pad: 0,
    }
}

#[inline(always)]
fn key6(address: &Address, port: [u8; 2], protocol: u8) -> Key6 {
    Key6 {
        address: address.0,
        port,
        protocol,
        pad: 0,
    }
}

/// Who answers a new flow will be recognised, even if no rule that was read names it. Where there is no room, it
/// is not: user space sees that the map is full.
#[inline(always)]
pub(crate) unsafe fn expect_answer(ipv4: bool, from: &Address, port: [u8; 2], protocol: u8) {
    let new = Known {
        target: Target::Pod as u32,
        former: 0,
        heard: 0,
    };
    let Some(ports) = Ports::get() else {
        return;
    };
    let may_answer = ports.bits(port) & PORT_IS_SOURCE != 0;
    let known = known(ipv4, from, port, protocol).is_some();
    if known && may_answer {
        return;
    }
    if !known {
        let _ = if ipv4 {
            TARGETS4.insert(key4(from, port, protocol), new, 0)
        } else {
            TARGETS6.insert(key6(from, port, protocol), new, 0)
        };
    }
    ports.set(port, PORT_IS_SOURCE);
}

/// Who has this address, seen from the node? A packet whose source is its own destination was sent
/// by the node to an address bound on it (a ClusterIP on kube-ipvs0).
#[inline(always)]
pub(crate) unsafe fn origin_of(ipv4: bool, source: &Address, destination: &Address) -> u32 {
    unsafe {
        if ipv4 {
            let address = first4(source);
            if address & POD_MASK4.load() == POD_NET4.load() {
                return Origin::Pod as u32;
            }
            if address == first4(destination) || NODES4.get(address.to_ne_bytes()).is_some() {
                return Origin::Host as u32;
            }
        } else {
            let (high, low) = halves(source);
            if high & POD_MASK6.load() == POD_NET6.load() {
                return Origin::Pod as u32;
            }
            if (high, low) == halves(destination) || NODES6.get(source.0).is_some() {
                return Origin::Host as u32;
            }
        }
        Origin::External as u32
    }
}
