//! What the kernel programs write and user space reads, byte for byte.

use crate::histogram::Histogram;
use crate::path::Path;

/// What conntrack said of a packet, as an index.
pub mod state {
    /// First packet of a flow: no reply seen yet.
    pub const NEW: u8 = 0;
    /// Later packet in the original direction.
    pub const ESTABLISHED: u8 = 1;
    /// Packet in the reply direction.
    pub const REPLY: u8 = 2;
    /// No conntrack entry was attached.
    pub const UNTRACKED: u8 = 3;
    /// How many there are.
    pub const COUNT: usize = 4;
    /// Each of them.
    pub const ALL: [u8; COUNT] = [NEW, ESTABLISHED, REPLY, UNTRACKED];
    /// Not known yet: conntrack has not seen the packet.
    pub const UNKNOWN: u8 = 0xff;
}

/// Number of boundary probes of one family; a boundary's id is also the id of the stage that
/// begins there.
pub const BOUNDARIES: usize = 25;
/// The stage from `netif_receive_skb` to the first boundary.
pub const STAGE_RECEIVE: u8 = 25;
/// All stages of a journey together.
pub const STAGE_NODE: u8 = 26;
/// The first of OUTPUT's boundaries, and how many there are.
pub const OUTPUT_FIRST: u8 = 15;
/// See [`OUTPUT_FIRST`].
pub const OUTPUT_COUNT: u8 = 6;
/// The stages of OUTPUT once more, for packets that IPVS sends on: they come from within INPUT, or
/// from within OUTPUT itself, and then pass it twice. Found at a boundary's id plus [`RESENT`].
pub const STAGE_RESENT: u8 = 27;
/// See [`STAGE_RESENT`].
pub const RESENT: u8 = STAGE_RESENT - OUTPUT_FIRST;
/// Number of stages.
pub const STAGES: usize = STAGE_RESENT as usize + OUTPUT_COUNT as usize;

/// Number of histograms: one for each path, packet state and stage.
pub const HISTOGRAMS: usize = Path::COUNT * state::COUNT * STAGES;

/// Where the histogram of a path, state and stage lies in the map.
#[inline(always)]
#[allow(
    clippy::inline_always,
    clippy::cast_possible_truncation,
    reason = "the kernel programs must not call it; both factors are small constants"
)]
pub const fn histogram_index(path: u32, state: u32, stage: u32) -> u32 {
    (path * state::COUNT as u32 + state) * STAGES as u32 + stage
}

/// What a boundary does besides ending one stage and beginning the next.
pub mod role {
    /// First boundary of its hook: journeys may begin here.
    pub const ENTRY: u32 = 1;
    /// Last boundary of INPUT: the journey ends in a local socket.
    pub const DELIVER: u32 = 2;
    /// Last boundary of POSTROUTING: the header is final.
    pub const DEPART: u32 = 4;
}

/// Numbers of the hooks (`enum nf_inet_hooks`, `include/uapi/linux/netfilter.h`).
pub mod hook {
    /// `NF_INET_PRE_ROUTING`.
    pub const PREROUTING: u32 = 0;
    /// `NF_INET_LOCAL_IN`.
    pub const INPUT: u32 = 1;
    /// `NF_INET_FORWARD`.
    pub const FORWARD: u32 = 2;
    /// `NF_INET_LOCAL_OUT`.
    pub const OUTPUT: u32 = 3;
    /// `NF_INET_POST_ROUTING`.
    pub const POSTROUTING: u32 = 4;
}

/// `NFPROTO_IPV4` (`include/uapi/linux/netfilter.h`).
pub const IPV4: u8 = 2;
/// `NFPROTO_IPV6`.
pub const IPV6: u8 = 10;

/// An IPv4 address, port and protocol that belong to a Service or an endpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Key4 {
    /// Address, network order.
    pub address: [u8; 4],
    /// Port, network order.
    pub port: [u8; 2],
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}

/// The same for IPv6.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Key6 {
    /// Address, network order.
    pub address: [u8; 16],
    /// Port, network order.
    pub port: [u8; 2],
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}

/// Two bits a port: is it a destination port of interest, a source port of interest?
pub const PORT_BITS: usize = 65536 * 2 / 8;
/// First bit of a port in the port map: a Service, NodePort or endpoint port.
pub const PORT_IS_DESTINATION: u8 = 1;
/// Second bit: an endpoint's port, from which replies come.
pub const PORT_IS_SOURCE: u8 = 2;

/// Journeys under way on one CPU; a packet's slot follows from the skb's address.
pub const SLOTS: usize = 64;

/// Where a slot's journey is.
pub mod phase {
    /// Nobody's.
    pub const FREE: u8 = 0;
    /// Seen by `netif_receive_skb`; not known yet whether it is of interest.
    pub const RECEIVED: u8 = 1;
    /// Between two boundaries.
    pub const UNDERWAY: u8 = 2;
    /// Past the last boundary of INPUT, on its way to a socket.
    pub const DELIVERED: u8 = 3;
}

/// One packet's journey over the node, while it lasts.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Slot {
    /// Address of the skb: the slot's owner.
    pub skb: u64,
    /// When the journey began (`CLOCK_MONOTONIC`, ns).
    pub started: u64,
    /// When the last probe let the packet go on.
    pub last: u64,
    /// Sum of the stages so far, ns.
    pub elapsed: u64,
    /// Time in the receive stage, until conntrack tells the state.
    pub receive: u32,
    /// Time in the stage before conntrack, until conntrack tells the state.
    pub raw: u32,
    /// See [`phase`].
    pub phase: u8,
    /// The last boundary passed: the stage the packet is in.
    pub boundary: u8,
    /// The stage whose time is in `raw`; `STAGES` if there is none.
    pub raw_stage: u8,
    /// See [`state`].
    pub state: u8,
    /// Index of the path; `Path::COUNT` for a reply whose flow is not known yet.
    pub path: u8,
    /// [`IPV4`] or [`IPV6`].
    pub family: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// 1 if `receive` holds a time.
    pub received: u8,
    /// Source port at the first boundary, network order.
    pub sport: [u8; 2],
    /// Destination port at the first boundary, network order.
    pub dport: [u8; 2],
    /// [`RESENT`] while the packet passes OUTPUT because IPVS sends it on, otherwise 0.
    pub resent: u8,
    /// Zero.
    pub pad: [u8; 3],
    /// Source address at the first boundary; IPv4 in the first four bytes.
    pub source: [u8; 16],
    /// Destination address at the first boundary.
    pub destination: [u8; 16],
    /// The packet's first bytes when it left the last hook (first packets only).
    pub header: [u8; HEADER],
}

/// Bytes of a packet that a record carries: an IPv6 header and the ports, with room to spare.
pub const HEADER: usize = 64;

/// What the probes counted, on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Journeys begun.
    pub journeys: u64,
    /// Journeys that left by a device.
    pub transmitted: u64,
    /// Journeys that reached a local socket.
    pub delivered: u64,
    /// Journeys dropped by the kernel before their end.
    pub dropped: u64,
    /// Packets dropped at a local socket, after their journey's end.
    pub dropped_at_socket: u64,
    /// Ring-buffer records that found no room.
    pub ring_lost: u64,
    /// Journeys given up because another packet needed their slot.
    pub collisions: u64,
    /// Packets met at another step than expected.
    pub unpaired: u64,
    /// Packets at an entry boundary that are of no interest.
    pub other: u64,
}

/// One CPU's journeys and counters: a single map value, so a probe needs a single look-up.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Table {
    /// Journeys under way.
    pub slots: [Slot; SLOTS],
    /// Counters.
    pub stats: Stats,
}

/// Kinds of [`Record`].
pub mod kind {
    /// The first packet of a flow, or one to a Service that is not tracked, reached the end of its journey.
    pub const FIRST: u8 = 1;
    /// A packet was dropped.
    pub const DROP: u8 = 2;
}

/// What goes through the ring buffer.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Record {
    /// When it was written (`CLOCK_MONOTONIC`, ns).
    pub time: u64,
    /// When the journey began.
    pub started: u64,
    /// Sum of the journey's stages, ns.
    pub elapsed: u64,
    /// Where the kernel dropped it (an instruction's address), or 0.
    pub location: u64,
    /// See [`kind`].
    pub kind: u8,
    /// [`IPV4`] or [`IPV6`].
    pub family: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// Index of the path.
    pub path: u8,
    /// See [`state`].
    pub state: u8,
    /// The stage in which the journey ended.
    pub stage: u8,
    /// 1 if the packet left by a device, 0 if it reached a socket or was dropped.
    pub transmitted: u8,
    /// Zero.
    pub pad: u8,
    /// `enum skb_drop_reason`, for a drop.
    pub reason: u32,
    /// Source port at the first boundary, network order.
    pub sport: [u8; 2],
    /// Destination port at the first boundary, network order.
    pub dport: [u8; 2],
    /// Source address at the first boundary; IPv4 in the first four bytes.
    pub source: [u8; 16],
    /// Destination address at the first boundary.
    pub destination: [u8; 16],
    /// The packet's first bytes at the journey's end.
    pub header: [u8; HEADER],
}

/// The per-CPU histogram map's value.
pub type Cells = Histogram;

// The kernel refuses a per-CPU value above PCPU_MIN_UNIT_SIZE (include/linux/percpu.h).
const _: () = assert!(core::mem::size_of::<Table>() <= 32 << 10);
const _: () = assert!(core::mem::size_of::<Cells>() <= 32 << 10);
const _: () = assert!(Path::COUNT < 0xff && STAGES < 0xff);
