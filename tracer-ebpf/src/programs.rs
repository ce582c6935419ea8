//! The probes of the `hooks` tier.
//!
//! A *boundary* is a netfilter program between two kernel components of one hook. It ends the
//! stage of the component before it and begins the stage of the one after it. There is one
//! function for all boundaries: user space loads it once a boundary with other constants, and the
//! verifier removes what that boundary does not need.
//!
//! **Pairing.** A packet's times are kept in a per-CPU slot chosen by the skb's address and owned
//! by it: a probe that finds another owner, or its own packet at another step than expected, counts
//! that and records nothing. A hook runs on one CPU, and a journey that is interrupted by another
//! (a softirq) lands in another slot or takes the slot over, which its owner then notices. A slot
//! is given up when its packet leaves by a device, is dropped, or when the address is seen again at
//! a first probe.
//!
//! **Time.** A probe reads the clock when it begins and again when it ends, so stages do not
//! contain the probes' own work.

use core::arch::asm;
use core::ffi::c_void;
use core::mem::size_of;
use core::panic::PanicInfo;
use core::ptr;

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use aya_ebpf::helpers::{bpf_ktime_get_ns, generated::bpf_probe_read_kernel};
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, RingBuf};
use aya_ebpf::programs::BtfTracePointContext;
use aya_log_ebpf::debug;
use tracer_ebpf::histogram::{CELLS, cell_of};
use tracer_ebpf::path::{Origin, Path, Target};
use tracer_ebpf::record::{
    Cells, HEADER, HISTOGRAMS, IPV4, Key4, Key6, PORT_BITS, PORT_IS_DESTINATION, PORT_IS_SOURCE,
    RESENT, Record, SLOTS, STAGE_NODE, STAGE_RECEIVE, STAGES, Slot, Table, histogram_index, hook,
    kind, phase, role, state,
};

// What a boundary is; set when it is loaded.
#[unsafe(no_mangle)]
static BOUNDARY: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static PREVIOUS: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static ROLE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static HOOK: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static FAMILY: Global<u32> = Global::new(0);

// Offsets of the fields that are read, from the running kernel's BTF.
#[unsafe(no_mangle)]
static SKB_NFCT: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SKB_HEAD: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SKB_NETWORK_HEADER: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SKB_DEV: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static DEV_NET: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static NET_INUM: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static CT_TUPLE: Global<u32> = Global::new(0);

// The node under test.
#[unsafe(no_mangle)]
static NETNS: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static POD_NET4: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static POD_MASK4: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static POD_NET6: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static POD_MASK6: Global<u64> = Global::new(0);

/// Journeys under way and counters: one value a CPU.
#[map]
static TABLE: PerCpuArray<Table> = PerCpuArray::with_max_entries(1, 0);

/// One histogram a path, state and stage.
#[map]
static TIMES: PerCpuArray<Cells> = PerCpuArray::with_max_entries(HISTOGRAMS as u32, 0);

/// Which ports can be of interest at all: two bits a port.
#[map]
static PORTS: Array<[u8; PORT_BITS]> = Array::with_max_entries(1, 0);

/// Addresses and ports of interest; the value is a [`Target`].
#[map]
static TARGETS4: HashMap<Key4, u32> = HashMap::with_max_entries(1, 0);
/// The same for IPv6.
#[map]
static TARGETS6: HashMap<Key6, u32> = HashMap::with_max_entries(1, 0);

/// The node's own addresses.
#[map]
static NODES4: HashMap<[u8; 4], u32> = HashMap::with_max_entries(64, 0);
/// The same for IPv6.
#[map]
static NODES6: HashMap<[u8; 16], u32> = HashMap::with_max_entries(64, 0);

/// First packets and drops.
#[map]
static RECORDS: RingBuf = RingBuf::with_byte_size(1 << 22, 0);

/// `struct bpf_nf_ctx` (include/linux/netfilter/nf_bpf_link.h).
#[repr(C)]
struct NetfilterContext {
    state: *const c_void,
    skb: *const u8,
}

const NF_ACCEPT: i32 = 1;
/// `NFCT_INFOMASK` (include/linux/skbuff.h).
const CTINFO_MASK: u64 = 7;
/// `IP_CT_IS_REPLY` and `IP_CT_NEW` (`enum ip_conntrack_info`,
/// include/uapi/linux/netfilter/nf_conntrack_common.h).
const CT_IS_REPLY: u64 = 3;
const CT_NEW: u64 = 2;

/// A boundary. Aya knows no netfilter programs, so it stands in a section that aya accepts and is
/// loaded by hand.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
extern "C" fn boundary(ctx: *const NetfilterContext) -> i32 {
    // SAFETY: the verifier checks every access; ctx is a valid bpf_nf_ctx.
    unsafe {
        let skb = (*ctx).skb;
        pass(skb);
    }
    NF_ACCEPT
}

/// A packet passes a boundary.
#[inline(always)]
unsafe fn pass(skb: *const u8) {
    let Some(table) = TABLE.get_ptr_mut(0) else {
        return;
    };
    unsafe {
        let slot = slot_of(table, skb);
        let ours = (*slot).skb == skb as u64;
        if ROLE.load() & role::ENTRY != 0 {
            let known = ours && (*slot).phase == phase::UNDERWAY && may_go_on(slot, skb);
            if !known {
                if HOOK.load() == hook::PREROUTING || HOOK.load() == hook::OUTPUT {
                    begin(table, slot, skb, ours);
                }
                return;
            }
        } else {
            if !ours || (*slot).phase != phase::UNDERWAY {
                return;
            }
            if u32::from((*slot).boundary) != PREVIOUS.load() {
                (*table).stats.unpaired += 1;
                (*slot).skb = 0;
                return;
            }
        }
        let now = bpf_ktime_get_ns();
        step(table, slot, skb, now);
        (*slot).last = bpf_ktime_get_ns();
    }
}

/// Is this the packet that the slot knows, further on its way? At PREROUTING a packet is always
/// new. At OUTPUT the only packets seen before are those that IPVS sends on from within another
/// hook; a header that agrees tells them from a new packet at a reused address.
#[inline(always)]
unsafe fn may_go_on(slot: *mut Slot, skb: *const u8) -> bool {
    if HOOK.load() == hook::PREROUTING {
        return false;
    }
    if HOOK.load() == hook::OUTPUT {
        return unsafe { same_source(slot, skb) };
    }
    true
}

/// Does the packet come from the address and port with which the slot's journey began?
#[inline(always)]
unsafe fn same_source(slot: *const Slot, skb: *const u8) -> bool {
    unsafe {
        let mut flow = Flow::ZERO;
        if (*slot).family == IPV4 {
            read_flow4(skb, &mut flow)
                && first4(&flow.source) == first4(&(*slot).source)
                && flow.sport == (*slot).sport
        } else {
            read_flow6(skb, &mut flow)
                && halves(&flow.source) == halves(&(*slot).source)
                && flow.sport == (*slot).sport
        }
    }
}

/// The first boundary of a packet on this node: is it of interest?
#[inline(always)]
unsafe fn begin(table: *mut Table, slot: *mut Slot, skb: *const u8, ours: bool) {
    unsafe {
        let now = bpf_ktime_get_ns();
        let received = ours && (*slot).phase == phase::RECEIVED && HOOK.load() == hook::PREROUTING;
        let mut flow = Flow::ZERO;
        let path = recognise(skb, &mut flow);
        if path > Path::COUNT as u32 {
            (*table).stats.other += 1;
            if ours {
                (*slot).skb = 0;
            }
            return;
        }
        if !ours && (*slot).skb != 0 && (*slot).phase == phase::UNDERWAY {
            (*table).stats.collisions += 1;
        }
        (*table).stats.journeys += 1;
        let receive = if received { now - (*slot).last } else { 0 };
        (*slot).skb = skb as u64;
        (*slot).started = now - receive;
        (*slot).elapsed = receive;
        (*slot).receive = receive as u32;
        (*slot).received = u8::from(received);
        (*slot).raw = 0;
        (*slot).raw_stage = STAGES as u8;
        (*slot).phase = phase::UNDERWAY;
        (*slot).boundary = BOUNDARY.load() as u8;
        (*slot).resent = 0;
        (*slot).state = state::UNKNOWN;
        (*slot).path = path as u8;
        (*slot).family = FAMILY.load() as u8;
        (*slot).protocol = flow.protocol;
        (*slot).sport = flow.sport;
        (*slot).dport = flow.dport;
        (*slot).source = flow.source;
        (*slot).destination = flow.destination;
        (*slot).last = bpf_ktime_get_ns();
    }
}

/// A packet under way passes a boundary: its stage ends.
#[inline(always)]
unsafe fn step(table: *mut Table, slot: *mut Slot, skb: *const u8, now: u64) {
    unsafe {
        let stage = stage_of(slot);
        let took = now - (*slot).last;
        (*slot).elapsed += took;
        if (*slot).state == state::UNKNOWN {
            learn_state(slot, skb);
        }
        if (*slot).state == state::UNKNOWN {
            // Before conntrack: keep the time until it is known whose it is.
            (*slot).raw = ((*slot).raw as u64 + took) as u32;
            if (*slot).raw_stage == STAGES as u8 {
                (*slot).raw_stage = stage;
            }
        } else {
            count(slot, stage, took);
        }
        (*slot).boundary = BOUNDARY.load() as u8;
        if HOOK.load() != hook::OUTPUT {
            (*slot).resent = 0;
        } else if ROLE.load() & role::ENTRY != 0 {
            // Whoever is under way when it enters OUTPUT was sent there by IPVS.
            (*slot).resent = RESENT;
        }
        if ROLE.load() & role::DELIVER != 0 {
            settle(slot);
            count(slot, STAGE_NODE, (*slot).elapsed);
            (*table).stats.delivered += 1;
            if is_told(slot) {
                read_header(skb, &mut (*slot).header);
                send(table, slot, kind::FIRST, 0, 0, false);
            }
            (*slot).phase = phase::DELIVERED;
        }
        // Unknown by now is untracked at the end.
        if ROLE.load() & role::DEPART != 0
            && ((*slot).state == state::NEW || (*slot).state == state::UNKNOWN)
        {
            read_header(skb, &mut (*slot).header);
        }
    }
}

/// The stage that the packet is in.
#[inline(always)]
unsafe fn stage_of(slot: *const Slot) -> u8 {
    unsafe { (*slot).boundary + (*slot).resent }
}

/// Does the end of this packet's journey go through the ring buffer? First packets of flows do; and
/// packets to a Service that conntrack does not track, which nobody translates.
#[inline(always)]
unsafe fn is_told(slot: *const Slot) -> bool {
    unsafe {
        let path = (*slot).path;
        let to_service = path < Path::COUNT as u8 && path % 3 != Target::Pod as u8;
        (*slot).state == state::NEW || ((*slot).state == state::UNTRACKED && to_service)
    }
}

/// The journey is over: a packet that conntrack has not claimed by now is untracked, and what was
/// kept back for its state is counted.
#[inline(always)]
unsafe fn settle(slot: *mut Slot) {
    unsafe {
        if (*slot).state == state::UNKNOWN {
            (*slot).state = state::UNTRACKED;
            count_kept(slot);
        }
    }
}

/// Asks conntrack, once it has seen the packet.
#[inline(always)]
unsafe fn learn_state(slot: *mut Slot, skb: *const u8) {
    unsafe {
        let nfct = ptr::read_volatile(skb.add(SKB_NFCT.load() as usize).cast::<u64>());
        let ct = nfct & !CTINFO_MASK;
        if ct == 0 {
            return;
        }
        let info = nfct & CTINFO_MASK;
        (*slot).state = if info >= CT_IS_REPLY {
            state::REPLY
        } else if info == CT_NEW {
            state::NEW
        } else {
            state::ESTABLISHED
        };
        if (*slot).state == state::REPLY || (*slot).path as usize >= Path::COUNT {
            (*slot).path = path_of_flow(slot, ct);
        }
        count_kept(slot);
    }
}

/// Counts the times of the stages before conntrack.
#[inline(always)]
unsafe fn count_kept(slot: *mut Slot) {
    unsafe {
        if (*slot).received != 0 {
            count(slot, STAGE_RECEIVE, u64::from((*slot).receive));
        }
        if (*slot).raw_stage != STAGES as u8 {
            count(slot, (*slot).raw_stage, u64::from((*slot).raw));
        }
    }
}

/// The path of a reply: conntrack's original tuple says who asked for what.
#[inline(always)]
unsafe fn path_of_flow(slot: *const Slot, ct: u64) -> u8 {
    unsafe {
        // struct nf_conntrack_tuple (include/net/netfilter/nf_conntrack_tuple.h): source address
        // (16 bytes), port (2), l3num (2), destination address (16), port (2), protocol (1).
        let mut tuple = [0_u8; 40];
        if bpf_probe_read_kernel(
            tuple.as_mut_ptr().cast(),
            tuple.len() as u32,
            (ct + CT_TUPLE.load() as u64) as *const c_void,
        ) != 0
        {
            return Path::COUNT as u8;
        }
        let source: [u8; 16] = ptr::read_unaligned(tuple.as_ptr().cast());
        let destination: [u8; 16] = ptr::read_unaligned(tuple.as_ptr().add(20).cast());
        let port: [u8; 2] = [tuple[36], tuple[37]];
        let target = target_of((*slot).family == IPV4, &destination, port, (*slot).protocol);
        if target > Target::Pod as u32 {
            return Path::COUNT as u8;
        }
        let origin = origin_of((*slot).family == IPV4, &source, &destination);
        (origin * 3 + target) as u8
    }
}

/// Who has this address, seen from the node? A packet whose source is its own destination was sent
/// by the node to an address bound on it (a ClusterIP on kube-ipvs0).
#[inline(always)]
unsafe fn origin_of(ipv4: bool, source: &[u8; 16], destination: &[u8; 16]) -> u32 {
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
            if (high, low) == halves(destination) || NODES6.get(source).is_some() {
                return Origin::Host as u32;
            }
        }
        Origin::External as u32
    }
}

/// What a packet's header says of its flow.
struct Flow {
    source: [u8; 16],
    destination: [u8; 16],
    sport: [u8; 2],
    dport: [u8; 2],
    protocol: u8,
}

impl Flow {
    const ZERO: Self = Self {
        source: [0; 16],
        destination: [0; 16],
        sport: [0; 2],
        dport: [0; 2],
        protocol: 0,
    };
}

/// A header that could not be read, or a packet that is of no interest.
const NOTHING: u32 = 0xff;

/// The packet's path: an index below [`Path::COUNT`]; `Path::COUNT` for what comes from an endpoint
/// (conntrack will tell whose reply it is); [`NOTHING`] for the rest, after one look at the ports.
#[inline(always)]
unsafe fn recognise(skb: *const u8, flow: &mut Flow) -> u32 {
    unsafe {
        let ipv4 = FAMILY.load() == IPV4 as u32;
        let readable = if ipv4 {
            read_flow4(skb, flow)
        } else {
            read_flow6(skb, flow)
        };
        if !readable {
            return NOTHING;
        }
        let Some(ports) = PORTS.get_ptr(0) else {
            return NOTHING;
        };
        let dport = u16::from_be_bytes(flow.dport) as usize;
        let sport = u16::from_be_bytes(flow.sport) as usize;
        let ports = ports.cast::<u8>();
        let asks = *ports.add(dport >> 2) >> ((dport & 3) << 1) & PORT_IS_DESTINATION;
        let answers = *ports.add(sport >> 2) >> ((sport & 3) << 1) & PORT_IS_SOURCE;
        if asks != 0 {
            let target = target_of(ipv4, &flow.destination, flow.dport, flow.protocol);
            if target <= Target::Pod as u32 {
                let origin = if HOOK.load() == hook::OUTPUT {
                    Origin::Host as u32
                } else {
                    match origin_of(ipv4, &flow.source, &flow.destination) {
                        0 => Origin::Pod as u32,
                        _ => Origin::External as u32,
                    }
                };
                return origin * 3 + target;
            }
        }
        if answers != 0
            && target_of(ipv4, &flow.source, flow.sport, flow.protocol) == Target::Pod as u32
        {
            return Path::COUNT as u32;
        }
        NOTHING
    }
}

/// What stands behind an address and port, or [`NOTHING`].
#[inline(always)]
unsafe fn target_of(ipv4: bool, address: &[u8; 16], port: [u8; 2], protocol: u8) -> u32 {
    unsafe {
        let found = if ipv4 {
            TARGETS4.get(Key4 {
                address: first4(address).to_ne_bytes(),
                port,
                protocol,
                pad: 0,
            })
        } else {
            TARGETS6.get(Key6 {
                address: *address,
                port,
                protocol,
                pad: 0,
            })
        };
        found.copied().unwrap_or(NOTHING)
    }
}

#[inline(always)]
unsafe fn network_header(skb: *const u8) -> u64 {
    unsafe {
        let head = ptr::read_volatile(skb.add(SKB_HEAD.load() as usize).cast::<u64>());
        let offset = ptr::read_volatile(skb.add(SKB_NETWORK_HEADER.load() as usize).cast::<u16>());
        head + u64::from(offset)
    }
}

#[inline(always)]
unsafe fn read_header(skb: *const u8, header: &mut [u8; HEADER]) {
    unsafe {
        let from = network_header(skb) as *const c_void;
        bpf_probe_read_kernel(header.as_mut_ptr().cast(), HEADER as u32, from);
    }
}

#[inline(always)]
const fn has_ports(protocol: u8) -> bool {
    protocol == 6 || protocol == 17 || protocol == 132
}

/// Addresses and ports of an IPv4 packet; false for fragments and protocols without ports.
#[inline(always)]
unsafe fn read_flow4(skb: *const u8, flow: &mut Flow) -> bool {
    unsafe {
        let at = network_header(skb);
        let mut ip = [0_u8; 24];
        if bpf_probe_read_kernel(ip.as_mut_ptr().cast(), 24, at as *const c_void) != 0 {
            return false;
        }
        if ip[6] & 0x1f != 0 || ip[7] != 0 || !has_ports(ip[9]) {
            return false;
        }
        flow.protocol = ip[9];
        let words = ip.as_ptr().cast::<u32>();
        flow.source
            .as_mut_ptr()
            .cast::<u32>()
            .write_unaligned(words.add(3).read_unaligned());
        flow.destination
            .as_mut_ptr()
            .cast::<u32>()
            .write_unaligned(words.add(4).read_unaligned());
        let mut ports = words.add(5).read_unaligned();
        let length = u64::from(ip[0] & 0xf) * 4;
        if length != 20
            && bpf_probe_read_kernel((&raw mut ports).cast(), 4, (at + length) as *const c_void)
                != 0
        {
            return false;
        }
        let ports = ports.to_ne_bytes();
        flow.sport = [ports[0], ports[1]];
        flow.dport = [ports[2], ports[3]];
        true
    }
}

/// Addresses and ports of an IPv6 packet whose transport header follows at once.
#[inline(always)]
unsafe fn read_flow6(skb: *const u8, flow: &mut Flow) -> bool {
    unsafe {
        let mut ip = [0_u8; 44];
        if bpf_probe_read_kernel(
            ip.as_mut_ptr().cast(),
            44,
            network_header(skb) as *const c_void,
        ) != 0
        {
            return false;
        }
        if !has_ports(ip[6]) {
            return false;
        }
        flow.protocol = ip[6];
        flow.source = ip.as_ptr().add(8).cast::<[u8; 16]>().read_unaligned();
        flow.destination = ip.as_ptr().add(24).cast::<[u8; 16]>().read_unaligned();
        flow.sport = [ip[40], ip[41]];
        flow.dport = [ip[42], ip[43]];
        true
    }
}

#[inline(always)]
unsafe fn first4(address: &[u8; 16]) -> u32 {
    unsafe { address.as_ptr().cast::<u32>().read_unaligned() }
}

#[inline(always)]
unsafe fn halves(address: &[u8; 16]) -> (u64, u64) {
    unsafe {
        let halves = address.as_ptr().cast::<u64>();
        (halves.read_unaligned(), halves.add(1).read_unaligned())
    }
}

/// One value into one histogram.
#[inline(always)]
unsafe fn count(slot: *const Slot, stage: u8, value: u64) {
    unsafe {
        let path = (*slot).path as usize;
        let state = (*slot).state as usize;
        if path >= Path::COUNT || state >= state::COUNT || stage as usize >= STAGES {
            return;
        }
        let index = histogram_index(path as u32, state as u32, u32::from(stage));
        if let Some(histogram) = TIMES.get_ptr_mut(index) {
            (*histogram).sum += value;
            let cell = cell_of(value);
            if cell < CELLS {
                *(&raw mut (*histogram).cells).cast::<u64>().add(cell) += 1;
            }
        }
    }
}

/// Writes a record, or counts that there was no room.
#[inline(always)]
unsafe fn send(
    table: *mut Table,
    slot: *const Slot,
    kind: u8,
    reason: u32,
    location: u64,
    transmitted: bool,
) {
    unsafe {
        let Some(mut entry) = RECORDS.reserve::<Record>(0) else {
            (*table).stats.ring_lost += 1;
            return;
        };
        let record = entry.as_mut_ptr();
        (*record).time = bpf_ktime_get_ns();
        (*record).started = (*slot).started;
        (*record).elapsed = (*slot).elapsed;
        (*record).location = location;
        (*record).kind = kind;
        (*record).family = (*slot).family;
        (*record).protocol = (*slot).protocol;
        (*record).path = (*slot).path;
        (*record).state = (*slot).state;
        (*record).stage = stage_of(slot);
        (*record).transmitted = u8::from(transmitted);
        (*record).pad = 0;
        (*record).reason = reason;
        (*record).sport = (*slot).sport;
        (*record).dport = (*slot).dport;
        (*record).source = (*slot).source;
        (*record).destination = (*slot).destination;
        (*record).header = (*slot).header;
        entry.submit(u64::from(BPF_RB_NO_WAKEUP));
    }
}

/// The slot of an skb. Skbs lie at multiples of 256 bytes.
#[inline(always)]
unsafe fn slot_of(table: *mut Table, skb: *const u8) -> *mut Slot {
    let index = ((low_half(skb) >> 8) as usize) & (SLOTS - 1);
    unsafe { (&raw mut (*table).slots).cast::<Slot>().add(index) }
}

/// The low half of an address. The verifier lets no other arithmetic turn a pointer into a number,
/// and the compiler would shift the pointer itself if it were written in Rust.
#[inline(always)]
fn low_half(address: *const u8) -> u32 {
    let half: u64;
    // SAFETY: one register-to-register move.
    unsafe {
        asm!("w2 = w1", out("r2") half, in("r1") address, options(pure, nomem, nostack));
    }
    half as u32
}

/// A packet enters this node: remember when.
#[btf_tracepoint(function = "netif_receive_skb")]
fn netif_receive_skb(ctx: BtfTracePointContext) -> i32 {
    let skb: *const u8 = ctx.arg(0);
    // SAFETY: skb and what it leads to are BTF pointers, checked by the verifier.
    unsafe {
        let dev = ptr::read_volatile(skb.add(SKB_DEV.load() as usize).cast::<*const u8>());
        let net = ptr::read_volatile(dev.add(DEV_NET.load() as usize).cast::<*const u8>());
        let inum = ptr::read_volatile(net.add(NET_INUM.load() as usize).cast::<u32>());
        if inum != NETNS.load() {
            return 0;
        }
        let Some(table) = TABLE.get_ptr_mut(0) else {
            return 0;
        };
        let slot = slot_of(table, skb);
        if (*slot).phase == phase::UNDERWAY && (*slot).skb != skb as u64 && (*slot).skb != 0 {
            // Somebody else is on the way: better no receive stage than a broken journey.
            return 0;
        }
        (*slot).skb = skb as u64;
        (*slot).phase = phase::RECEIVED;
        (*slot).last = bpf_ktime_get_ns();
    }
    0
}

/// A packet left by a device. The skb may be gone: only its address is used.
#[btf_tracepoint(function = "net_dev_xmit")]
fn net_dev_xmit(ctx: BtfTracePointContext) -> i32 {
    let skb: *const u8 = ctx.arg(0);
    let Some(table) = TABLE.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: slots are checked by the verifier.
    unsafe {
        let slot = slot_of(table, skb);
        if (*slot).skb != skb as u64 || (*slot).phase != phase::UNDERWAY {
            return 0;
        }
        let took = bpf_ktime_get_ns() - (*slot).last;
        (*slot).elapsed += took;
        settle(slot);
        count(slot, stage_of(slot), took);
        count(slot, STAGE_NODE, (*slot).elapsed);
        (*table).stats.transmitted += 1;
        if is_told(slot) {
            send(table, slot, kind::FIRST, 0, 0, true);
        }
        (*slot).skb = 0;
    }
    0
}

/// The kernel drops a packet.
#[btf_tracepoint(function = "kfree_skb")]
fn kfree_skb(ctx: BtfTracePointContext) -> i32 {
    let skb: *const u8 = ctx.arg(0);
    let location: u64 = ctx.arg(1);
    let reason: u32 = ctx.arg(2);
    let Some(table) = TABLE.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: skb is a BTF pointer; slots are checked by the verifier.
    unsafe {
        let slot = slot_of(table, skb);
        if (*slot).skb != skb as u64 {
            return 0;
        }
        let delivered = (*slot).phase == phase::DELIVERED;
        // After delivery the slot may have outlived its packet: believe the header.
        if (*slot).phase == phase::UNDERWAY || (delivered && same_source(slot, skb)) {
            if delivered {
                (*table).stats.dropped_at_socket += 1;
            } else {
                (*table).stats.dropped += 1;
            }
            read_header(skb, &mut (*slot).header);
            send(table, slot, kind::DROP, reason, location, false);
            debug!(
                &ctx,
                "dropped in stage {} reason {}",
                stage_of(slot),
                reason
            );
        }
        (*slot).skb = 0;
    }
    0
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

const _: () = assert!(size_of::<Key4>() == 8 && size_of::<Key6>() == 20);
