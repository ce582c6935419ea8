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
/// Stands for no stage.
pub const NO_STAGE: u8 = 0xff;
/// Number of hooks.
pub const HOOKS: usize = 5;
/// More stages than any hook has.
pub const MOST_STAGES: usize = 8;
/// Stands for the priority of no stage.
pub const NO_PRIORITY: i32 = i32::MAX;
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

/// What is known of an address, port and protocol of interest.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// What stands there: a [`Target`](crate::path::Target).
    pub target: u32,
    /// 1 if it was an endpoint, and is none any more: it is remembered when it was heard of.
    pub former: u32,
    /// When a packet came from it last (`CLOCK_MONOTONIC`, ns), if it is a former endpoint; 0 if none did.
    pub heard: u64,
}

/// Two bits a port: is it a destination port of interest, a source port of interest?
pub const PORT_BITS: usize = 65536 * 2 / 8;
/// First bit of a port in the port map: a Service, NodePort or endpoint port.
pub const PORT_IS_DESTINATION: u8 = 1;
/// Second bit: an endpoint's port, from which replies come.
pub const PORT_IS_SOURCE: u8 = 2;

/// Journeys under way on one CPU; a packet's slot follows from the skb's address.
pub const SLOTS: usize = 64;
/// Steps of one journey that are remembered: more than the longest path has boundaries (IPVS sends on
/// from INPUT: 1 + 6 + 4 + 6 + 4).
pub const STEPS: usize = 24;
/// Functions met by one packet that are remembered: more than there are on the longest path.
pub const MET: usize = 24;
/// Bytes of a packet that a record carries: what an `ICMPv6` error quotes, up to the ports.
pub const HEADER: usize = 96;
/// `struct nf_conntrack_tuple` (`include/net/netfilter/nf_conntrack_tuple.h`): source address (16 bytes),
/// port (2), l3num (2), destination address (16), port (2), protocol (1), direction (1).
pub const TUPLE: usize = 40;
/// `struct nf_conntrack_tuple_hash`: what lies between two tuples of a connection is a list's node.
pub const TUPLE_HASH: usize = TUPLE + 16;
/// Both tuples of a connection as they lie in `struct nf_conn`: the original's, a list's node, the reply's.
pub const TUPLES: usize = TUPLE_HASH + TUPLE;

/// Answered UDP flows that are remembered: what is forgotten is told again.
pub const ANSWERED: u32 = 1 << 15;
/// Stands in the programs for the number of the kernel function `bpf_rdonly_cast`, until they are loaded.
pub const RDONLY_CAST: u32 = 0x7fff_0001;

/// Bytes at a multiple of eight: the kernel programs copy them by words instead of one by one.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aligned<const N: usize>(pub [u8; N]);

/// An IPv6 address, or an IPv4 address in the first four bytes.
pub type Address = Aligned<16>;

/// Times of the stages passed.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steps(pub [u32; STEPS]);

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
    /// When the journey began (`CLOCK_MONOTONIC`, ns); 0 if it is not timed.
    pub started: u64,
    /// When the last probe let the packet go on.
    pub last: u64,
    /// Sum of the stages so far, ns.
    pub elapsed: u64,
    /// Address of the packet's conntrack entry; 0 before conntrack has seen it.
    pub ct: u64,
    /// See [`phase`].
    pub phase: u8,
    /// The last boundary passed: the stage the packet is in.
    pub boundary: u8,
    /// See [`state`].
    pub state: u8,
    /// Index of the path; `Path::COUNT` for a reply whose flow is not known yet; [`ABSORBED`](crate::path::ABSORBED)
    /// and an origin.
    pub path: u8,
    /// [`IPV4`] or [`IPV6`].
    pub family: u8,
    /// IP protocol number; of an ICMP error, that of the packet which it is about.
    pub protocol: u8,
    /// See [`Record::flags`].
    pub flags: u8,
    /// See [`Record::code`].
    pub code: u8,
    /// Source port at the first boundary, network order.
    pub sport: [u8; 2],
    /// Destination port at the first boundary, network order.
    pub dport: [u8; 2],
    /// [`RESENT`] while the packet passes OUTPUT because IPVS sends it on, otherwise 0.
    pub resent: u8,
    /// See [`timed`].
    pub timed: u8,
    /// How many of `took` and `stages` are set.
    pub steps: u8,
    /// See [`kind`]; set when the packet has passed its last boundary, 0 if it is not told.
    pub kind: u8,
    /// See [`Record::confirmed`].
    pub confirmed: u8,
    /// See [`Record::began`].
    pub began: u8,
    /// How many [`Note`]s there are.
    pub notes: u8,
    /// 1 if the packet has passed the last hook and may be cut up: see [`Table::cut`].
    pub cut: u8,
    /// Zero.
    pub pad: [u8; 4],
    /// Source address at the first boundary; IPv4 in the first four bytes.
    pub source: Address,
    /// Destination address at the first boundary.
    pub destination: Address,
    /// Time in each stage passed, ns.
    pub took: Steps,
    /// The stages passed, in order.
    pub stages: Aligned<STEPS>,
    /// The connection's tuples when the packet left the last hook (told packets only).
    pub tuples: Aligned<TUPLES>,
    /// The packet's first bytes when it left the last hook (told packets only), of an ICMP error when it came.
    pub header: Aligned<HEADER>,
}

/// Whether a journey's times are taken.
pub mod timed {
    /// Only where the packet is gets remembered.
    pub const NO: u8 = 0;
    /// If it turns out to be the first packet of a flow.
    pub const IF_NEW: u8 = 1;
    /// Yes.
    pub const YES: u8 = 2;
}

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
    /// Journeys whose times were taken.
    pub timed: u64,
}

/// One CPU's journeys and counters: a single map value, so a probe needs a single look-up.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Table {
    /// Journeys under way.
    pub slots: [Slot; SLOTS],
    /// Counters.
    pub stats: Stats,
    /// Packets to pass until the next one is sampled.
    pub skip: u64,
    /// The skb that entered a component last, where notes are wanted.
    pub last: u64,
    /// The skb that passed the last hook and may be cut up, if it is longer than its device takes: its journey
    /// ends when it leaves, or the first packet that is made of it.
    pub cut: u64,
    /// The address of that device.
    pub cut_by: u64,
}

/// What a packet met in the kernel's functions.
pub mod met {
    /// A table of iptables-legacy was gone through; the result is its verdict, or -1 if it did not return.
    pub const TABLE: u8 = 1;
    /// The same of a base chain of `nf_tables`, and of all that it jumps to.
    pub const CHAIN: u8 = 2;
    /// The connection's source was bound: the result is the verdict.
    pub const SOURCE_NAT: u8 = 3;
    /// The same of its destination.
    pub const DESTINATION_NAT: u8 = 4;
    /// The connection's entry went into conntrack's table: the result is the verdict.
    pub const CONFIRM: u8 = 5;
    /// IPVS asked a scheduler: the result is 1 if there was a real server.
    pub const SCHEDULE: u8 = 6;
    /// IPVS sends to a real server: the result is one of [`super::method`].
    pub const SEND: u8 = 7;
    /// IPVS gave up an old connection of the same addresses and ports.
    pub const EXPIRE: u8 = 8;
}

/// How IPVS sends to a real server.
pub mod method {
    /// With translated addresses.
    pub const NAT: i32 = 1;
    /// By its hardware address: direct routing.
    pub const ROUTE: i32 = 2;
    /// In a tunnel.
    pub const TUNNEL: i32 = 3;
    /// To the node itself.
    pub const LOCAL: i32 = 4;
    /// Past the real servers, to the destination itself.
    pub const BYPASS: i32 = 5;
}

/// A function that a packet met.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Note {
    /// See [`met`].
    pub what: u8,
    /// The stage.
    pub stage: u8,
    /// Zero.
    pub pad: [u8; 2],
    /// What came of it: see [`met`].
    pub result: i32,
    /// Address of what it is about: a table, a chain, a connection of IPVS; 0 for nothing.
    pub object: u64,
}

/// What one packet met.
pub type Notes = [Note; MET];

/// A function that a packet met, as it is told.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Met {
    /// See [`met`].
    pub what: u8,
    /// The stage.
    pub stage: u8,
    /// IPVS: the real server's port, network order.
    pub port: [u8; 2],
    /// What came of it: see [`met`].
    pub result: i32,
    /// IPVS: the real server's address, IPv4 in the first four bytes. Of a chain, the table's name, which ends
    /// in zero or is cut.
    pub owner: Aligned<16>,
    /// The name of the table, chain or scheduler; it ends in zero or is cut.
    pub name: Aligned<32>,
}

/// What goes through the ring buffer where notes are wanted.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Told {
    /// The packet.
    pub record: Record,
    /// How many of `met` are set.
    pub count: u64,
    /// What it met, in order.
    pub met: [Met; MET],
}

/// Kinds of [`Record`].
pub mod kind {
    /// The first packet of a flow, or one to a Service that is not tracked, reached the end of its journey.
    pub const FIRST: u8 = 1;
    /// A packet was dropped.
    pub const DROP: u8 = 2;
    /// An answer to a first packet reached the end of its journey: SYN-ACK, INIT-ACK, the first packets back
    /// of a UDP flow.
    pub const ANSWER: u8 = 3;
    /// A TCP RST or an SCTP ABORT reached the end of its journey, in either direction.
    pub const RESET: u8 = 4;
    /// An ICMP error about a packet of a flow reached the end of its journey. `source`, `destination` and
    /// the ports are those of the packet that it quotes, turned round.
    pub const ERROR: u8 = 5;
}

/// TCP's flags byte (RFC 9293, section 3.1).
pub mod tcp {
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;
}

/// SCTP's chunk types (RFC 9260, section 3.2).
pub mod sctp {
    /// Initiation.
    pub const INIT: u8 = 1;
    /// Its acknowledgement.
    pub const INIT_ACK: u8 = 2;
    /// Abort.
    pub const ABORT: u8 = 6;
}

/// Numbers of protocols (IANA).
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMP6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// What goes through the ring buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// When it was written (`CLOCK_MONOTONIC`, ns).
    pub time: u64,
    /// When the journey began; 0 if it was not timed.
    pub started: u64,
    /// Sum of the journey's stages, ns.
    pub elapsed: u64,
    /// Where the kernel dropped it (an instruction's address), or 0.
    pub location: u64,
    /// See [`kind`].
    pub kind: u8,
    /// [`IPV4`] or [`IPV6`].
    pub family: u8,
    /// IP protocol number; of an ICMP error, that of the packet which it is about.
    pub protocol: u8,
    /// Index of the path, or [`ABSORBED`](crate::path::ABSORBED) and an origin.
    pub path: u8,
    /// See [`state`].
    pub state: u8,
    /// The stage in which the journey ended.
    pub stage: u8,
    /// 1 if the packet left by a device, 0 if it reached a socket or was dropped.
    pub transmitted: u8,
    /// TCP's flags byte, SCTP's first chunk type, or for an ICMP error its type.
    pub flags: u8,
    /// `enum skb_drop_reason`, for a drop.
    pub reason: u32,
    /// Source port at the first boundary, network order.
    pub sport: [u8; 2],
    /// Destination port at the first boundary, network order.
    pub dport: [u8; 2],
    /// Source address at the first boundary; IPv4 in the first four bytes.
    pub source: Address,
    /// Destination address at the first boundary.
    pub destination: Address,
    /// An ICMP error's code.
    pub code: u8,
    /// How many of `took` and `stages` are set.
    pub steps: u8,
    /// 1 if `tuples` is set.
    pub tracked: u8,
    /// 1 if the connection's entry was there before the packet: it is not the first of its flow, and goes
    /// where the first one went.
    pub confirmed: u8,
    /// The stage in which the journey began: the first of PREROUTING, or of OUTPUT for what the node itself
    /// sent.
    pub began: u8,
    /// Zero.
    pub pad: [u8; 3],
    /// Time in each stage passed, ns (at most 4.3 s).
    pub took: Steps,
    /// The stages passed, in order.
    pub stages: Aligned<STEPS>,
    /// The connection's tuples at the journey's end: see [`TUPLES`].
    pub tuples: Aligned<TUPLES>,
    /// The packet's first bytes at the journey's end, of an ICMP error at its begin.
    pub header: Aligned<HEADER>,
}

impl Record {
    /// All zero.
    pub const ZERO: Self = Self {
        time: 0,
        started: 0,
        elapsed: 0,
        location: 0,
        kind: 0,
        family: 0,
        protocol: 0,
        path: 0,
        state: 0,
        stage: 0,
        transmitted: 0,
        flags: 0,
        reason: 0,
        sport: [0; 2],
        dport: [0; 2],
        source: Aligned([0; 16]),
        destination: Aligned([0; 16]),
        code: 0,
        steps: 0,
        tracked: 0,
        confirmed: 0,
        began: 0,
        pad: [0; 3],
        took: Steps([0; STEPS]),
        stages: Aligned([0; STEPS]),
        tuples: Aligned([0; TUPLES]),
        header: Aligned([0; HEADER]),
    };
}

/// The per-CPU histogram map's value.
pub type Cells = Histogram;

// The kernel refuses a per-CPU value above PCPU_MIN_UNIT_SIZE (include/linux/percpu.h).
const _: () = assert!(core::mem::size_of::<Table>() <= 32 << 10);
const _: () = assert!(core::mem::size_of::<Cells>() <= 32 << 10);
const _: () = assert!(core::mem::size_of::<[Notes; SLOTS]>() <= 32 << 10);
const _: () = assert!(Path::COUNT < 0xff && STAGES < 0xff);
const _: () = assert!(core::mem::size_of::<Key4>() == 8 && core::mem::size_of::<Key6>() == 20);
