//! A packet's journey over the node, from probe to probe.
//!
//! **Pairing.** A packet's journey is kept in one of two per-CPU slots chosen by the skb's address, and
//! owned by it: a probe that finds another owner, or its own packet at another step than expected, counts
//! that and records nothing. A hook runs on one CPU, and a journey within another (a softirq, or the ICMP
//! error that a packet causes) takes the other slot of the two; a third one takes that over, which its owner
//! then notices. A slot is given up when its packet leaves by a device, is dropped, or when the address is
//! seen again at a first probe.
//!
//! **Time.** A probe reads the clock when it begins and again when it ends, so stages do not
//! contain the probes' own work. What it read is kept in the slot; histograms are updated when the journey
//! ends, when it is known whose packet it was. Where only every n-th packet is sampled, the others keep their
//! place in the slot, so that a drop has its stage, and the clock is not read for them; first packets of
//! flows are always timed.

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray, RingBuf};
use tracer_ebpf::histogram::{CELLS, cell_of};
use tracer_ebpf::path::{ABSORBED, Path, Target};
use tracer_ebpf::record::{
    ANSWERED, Address, Aligned, Cells, HISTOGRAMS, IPV4, IPV6, RESENT, Record, SLOTS, STAGE_NODE,
    STAGE_RECEIVE, STEPS, Slot, TUPLE_HASH, Table, Told, histogram_index, hook, kind, phase,
    protocol, role, sctp, state, tcp, timed,
};

use crate::details;
use crate::flow::{Flow, NOTHING, expect_answer, origin_of, read, recognise, target_of};
use crate::kernel::{
    connection, cut_by, first4, halves, is_confirmed, low_half, read_start, read_tuples,
};

/// One in how many later packets is timed; first packets always are.
#[unsafe(no_mangle)]
static SAMPLE: Global<u32> = Global::new(1);

/// Not 0: the programs return at once, so that what the kernel takes to run them can be told apart.
#[unsafe(no_mangle)]
static EMPTY: Global<u32> = Global::new(0);

/// Journeys under way and counters: one value a CPU.
#[map]
static TABLE: PerCpuArray<Table> = PerCpuArray::with_max_entries(1, 0);

/// One histogram a path, state and stage.
#[map]
static TIMES: PerCpuArray<Cells> = PerCpuArray::with_max_entries(HISTOGRAMS as u32, 0);

/// UDP flows that were answered, by their conntrack entry: what finds another entry in its place is told
/// once more, which costs a record and nothing else.
#[map]
static ANSWERS: Array<u64> = Array::with_max_entries(ANSWERED, 0);

/// First packets, answers and drops.
#[map]
static RECORDS: RingBuf = RingBuf::with_byte_size(1 << 24, 0);

/// `IP_CT_IS_REPLY` and `IP_CT_NEW` (`enum ip_conntrack_info`,
/// include/uapi/linux/netfilter/nf_conntrack_common.h).
const CT_IS_REPLY: u64 = 3;
const CT_NEW: u64 = 2;

/// Where a probe stands.
#[derive(Clone, Copy)]
pub(crate) struct Here {
    /// The stage that begins.
    pub(crate) stage: u8,
    /// Number of the hook.
    pub(crate) hook: u32,
    /// See [`role`].
    pub(crate) role: u32,
    pub(crate) ipv4: bool,
}

/// This CPU's journeys.
#[inline(always)]
pub(crate) fn table() -> Option<*mut Table> {
    if EMPTY.load() != 0 {
        return None;
    }
    TABLE.get_ptr_mut(0)
}

/// Copies by words. What the compiler makes of an assignment between two places that it cannot tell apart is a
/// function that goes byte by byte.
#[inline(always)]
unsafe fn copy<T>(to: *mut T, from: *const T) {
    const { assert!(size_of::<T>() % 8 == 0 && align_of::<T>() == 8) };
    let (to, from) = (to.cast::<u64>(), from.cast::<u64>());
    unsafe {
        for word in 0..size_of::<T>() / 8 {
            to.add(word).write(from.add(word).read_volatile());
        }
    }
}

/// The two slots that an skb can have. Skbs lie at multiples of 256 bytes.
#[inline(always)]
unsafe fn slots_of(table: *mut Table, skb: *const u8) -> (*mut Slot, *mut Slot) {
    let index = ((low_half(skb) >> 8) as usize) & (SLOTS - 1);
    unsafe {
        let slots = (&raw mut (*table).slots).cast::<Slot>();
        (slots.add(index), slots.add(index ^ 1))
    }
}

/// The slot that an skb has.
#[inline(always)]
pub(crate) unsafe fn slot_of(table: *mut Table, skb: *const u8) -> Option<*mut Slot> {
    unsafe {
        let (first, second) = slots_of(table, skb);
        if (*first).skb == skb as u64 {
            Some(first)
        } else if (*second).skb == skb as u64 {
            Some(second)
        } else {
            None
        }
    }
}

/// The slot that an skb has, or may have.
#[inline(always)]
pub(crate) unsafe fn slot_for(table: *mut Table, skb: *const u8) -> *mut Slot {
    unsafe {
        let (first, second) = slots_of(table, skb);
        if (*first).skb == skb as u64 {
            first
        } else if (*second).skb == skb as u64 || is_taken(first) {
            second
        } else {
            first
        }
    }
}

/// The slot of a packet that is on its way over the node.
#[inline(always)]
pub(crate) unsafe fn under_way(table: *mut Table, skb: *const u8) -> Option<*mut Slot> {
    unsafe { slot_of(table, skb).filter(|slot| (**slot).phase == phase::UNDERWAY) }
}

/// Is a packet under way in this slot?
#[inline(always)]
unsafe fn is_taken(slot: *const Slot) -> bool {
    unsafe { (*slot).skb != 0 && (*slot).phase == phase::UNDERWAY }
}

/// A packet enters a hook. At PREROUTING it is always new. At OUTPUT the only packets seen before are those
/// that IPVS sends on from within another hook; a header that agrees tells them from a new packet at a reused
/// address. At the other hooks one that is under way goes on.
///
/// `here` is asked only of packets that go on or may begin: most do neither, and constants take time to load.
#[inline(always)]
pub(crate) unsafe fn enter(
    table: *mut Table,
    skb: *const u8,
    at: u32,
    here: impl FnOnce() -> Here,
) {
    unsafe {
        let slot = if at == hook::PREROUTING || at == hook::OUTPUT {
            let slot = slot_for(table, skb);
            let ours = (*slot).skb == skb as u64;
            let seen = ours && (*slot).phase == phase::UNDERWAY;
            if !seen || at == hook::PREROUTING || !same_source(slot, skb) {
                begin(table, slot, skb, ours, here());
                return;
            }
            slot
        } else {
            let Some(slot) = under_way(table, skb) else {
                return;
            };
            slot
        };
        step(table, slot, skb, here());
    }
}

/// Does the packet come from the address and port with which the slot's journey began?
#[inline(always)]
pub(crate) unsafe fn same_source(slot: *const Slot, skb: *const u8) -> bool {
    unsafe {
        let mut flow = Flow::ZERO;
        let ipv4 = (*slot).family == IPV4;
        let same = read(skb, ipv4, &mut flow) && flow.sport == (*slot).sport;
        if ipv4 {
            same && first4(&flow.source) == first4(&(*slot).source)
        } else {
            same && halves(&flow.source) == halves(&(*slot).source)
        }
    }
}

/// The first boundary of a packet on this node: is it of interest?
#[inline(always)]
unsafe fn begin(table: *mut Table, slot: *mut Slot, skb: *const u8, ours: bool, here: Here) {
    unsafe {
        let received = ours && (*slot).phase == phase::RECEIVED && here.hook == hook::PREROUTING;
        let arrived = if received { bpf_ktime_get_ns() } else { 0 };
        let mut flow = Flow::ZERO;
        let path = recognise(skb, here.ipv4, here.hook, &mut flow);
        if path == NOTHING {
            (*table).stats.other += 1;
            if ours {
                (*slot).skb = 0;
            }
            return;
        }
        if !ours && is_taken(slot) {
            (*table).stats.collisions += 1;
        }
        (*table).stats.journeys += 1;
        (*slot).skb = skb as u64;
        (*slot).timed = timing(table, &flow);
        (*slot).started = 0;
        // One by one: the compiler would call a function that fills bytes.
        (&raw mut (*slot).elapsed).write_volatile(0);
        (&raw mut (*slot).ct).write_volatile(0);
        (*slot).steps = 0;
        (*slot).kind = 0;
        (*slot).confirmed = 0;
        (*slot).notes = 0;
        (*slot).cut = 0;
        (*slot).phase = phase::UNDERWAY;
        (*slot).boundary = here.stage;
        (*slot).began = here.stage;
        (*slot).resent = 0;
        (*slot).state = state::UNKNOWN;
        (*slot).path = path as u8;
        (*slot).family = if here.ipv4 { IPV4 } else { IPV6 };
        (*slot).protocol = flow.protocol;
        (*slot).flags = flow.flags;
        (*slot).code = flow.code;
        if flow.error {
            (*slot).kind = kind::ERROR;
            // Who sent it: translation makes it come from the Service.
            read_start(skb, &mut (*slot).header);
        }
        (*slot).sport = flow.sport;
        (*slot).dport = flow.dport;
        copy(&raw mut (*slot).source, &raw const flow.source);
        copy(&raw mut (*slot).destination, &raw const flow.destination);
        if (*slot).timed == timed::NO {
            return;
        }
        if received {
            let took = arrived - (*slot).last;
            (*slot).started = (*slot).last;
            passed(slot, STAGE_RECEIVE, took);
            (*slot).last = bpf_ktime_get_ns();
        } else {
            let now = bpf_ktime_get_ns();
            (*slot).started = now;
            (*slot).last = now;
        }
    }
}

/// A packet that came in parts is met first behind a hook that may have translated it: what it was before, its
/// connection tells.
#[inline(always)]
pub(crate) unsafe fn begin_whole(table: *mut Table, slot: *mut Slot, skb: *const u8, here: Here) {
    unsafe {
        let ours = (*slot).skb == skb as u64;
        begin(table, slot, skb, ours, here);
        if (*slot).skb != skb as u64 {
            return;
        }
        learn_state(slot, skb);
        let forwards = (*slot).state == state::NEW || (*slot).state == state::ESTABLISHED;
        if !forwards || !read_tuples((*slot).ct, &mut (*slot).tuples) {
            return;
        }
        let path = path_of_flow(slot);
        if path >= Path::COUNT as u8 {
            return;
        }
        (*slot).path = path;
        let tuple = (&raw const (*slot).tuples).cast::<u8>();
        let (source, destination) = (address_at(tuple), address_at(tuple.add(20)));
        copy(&raw mut (*slot).source, &raw const source);
        copy(&raw mut (*slot).destination, &raw const destination);
        (*slot).sport = [*tuple.add(16), *tuple.add(17)];
        (*slot).dport = [*tuple.add(36), *tuple.add(37)];
    }
}

/// Is this packet to be timed?
#[inline(always)]
unsafe fn timing(table: *mut Table, flow: &Flow) -> u8 {
    unsafe {
        if (*table).skip == 0 {
            (*table).skip = u64::from(SAMPLE.load()) - 1;
            return timed::YES;
        }
        (*table).skip -= 1;
    }
    match flow.protocol {
        _ if flow.error => timed::NO,
        protocol::TCP if flow.flags & (tcp::SYN | tcp::ACK) != tcp::SYN => timed::NO,
        protocol::SCTP if flow.flags != sctp::INIT => timed::NO,
        _ => timed::IF_NEW,
    }
}

/// A packet under way passes a boundary: its stage ends.
#[inline(always)]
pub(crate) unsafe fn step(table: *mut Table, slot: *mut Slot, skb: *const u8, here: Here) {
    unsafe {
        let stage = stage_of(slot);
        if (*slot).timed != timed::NO {
            let took = bpf_ktime_get_ns() - (*slot).last;
            passed(slot, stage, took);
        }
        if (*slot).state == state::UNKNOWN {
            learn_state(slot, skb);
        }
        (*slot).boundary = here.stage;
        if here.hook != hook::OUTPUT {
            (*slot).resent = 0;
        } else if here.role & role::ENTRY != 0 {
            // Whoever is under way when it enters OUTPUT was sent there by IPVS.
            (*slot).resent = RESENT;
        }
        if here.role & (role::DEPART | role::DELIVER) != 0 {
            settle(slot);
            (*slot).kind = kind_at_end(slot);
            if (*slot).kind != 0 && (*slot).kind != kind::ERROR {
                read_start(skb, &mut (*slot).header);
            }
            know_connection(slot);
        }
        if here.role & role::DEPART != 0 {
            may_be_cut(table, slot, skb, here);
        }
        if here.role & role::DELIVER != 0 {
            (*table).stats.delivered += 1;
            finish(table, slot, false);
            (*slot).phase = phase::DELIVERED;
        } else if (*slot).timed != timed::NO {
            (*slot).last = bpf_ktime_get_ns();
        }
    }
}

/// A packet is not where its last probe says: nothing more is said of it.
#[inline(always)]
pub(crate) unsafe fn give_up(table: *mut Table, slot: *mut Slot) {
    unsafe {
        (*table).stats.unpaired += 1;
        (*slot).skb = 0;
    }
}

/// The packet has passed the last hook: is it what will leave?
#[inline(always)]
unsafe fn may_be_cut(table: *mut Table, slot: *mut Slot, skb: *const u8, here: Here) {
    unsafe {
        let device = cut_by(skb, here.ipv4);
        if device != 0 {
            (*slot).cut = 1;
            (*table).cut = skb as u64;
            (*table).cut_by = device;
        }
    }
}

/// A packet that nobody follows left by a device: if that is where one is being cut up, the kernel has made it
/// of that one, on this CPU and at once.
#[inline(always)]
pub(crate) unsafe fn depart_in_parts(table: *mut Table, device: *const u8) {
    unsafe {
        let cut = (*table).cut;
        if cut == 0 || (*table).cut_by != device as u64 {
            return;
        }
        (*table).cut = 0;
        if let Some(slot) = under_way(table, cut as *const u8)
            && (*slot).cut != 0
        {
            depart(table, slot);
        }
    }
}

/// The packet left by a device.
#[inline(always)]
pub(crate) unsafe fn depart(table: *mut Table, slot: *mut Slot) {
    unsafe {
        if (*slot).timed != timed::NO {
            let took = bpf_ktime_get_ns() - (*slot).last;
            passed(slot, stage_of(slot), took);
        }
        settle(slot);
        (*table).stats.transmitted += 1;
        finish(table, slot, true);
        (*slot).skb = 0;
    }
}

/// The kernel dropped the packet.
#[inline(always)]
pub(crate) unsafe fn drop(
    table: *mut Table,
    slot: *mut Slot,
    skb: *const u8,
    reason: u32,
    location: u64,
) {
    unsafe {
        let delivered = (*slot).phase == phase::DELIVERED;
        // After delivery the slot may have outlived its packet: believe the header.
        if (*slot).phase == phase::UNDERWAY || (delivered && same_source(slot, skb)) {
            (*slot).kind = kind::DROP;
            if delivered {
                (*table).stats.dropped_at_socket += 1;
                // The packet has let go of its entry.
                (*slot).ct = 0;
            } else {
                (*table).stats.dropped += 1;
                if (*slot).state == state::UNKNOWN {
                    learn_state(slot, skb);
                }
                know_connection(slot);
                if (*slot).timed != timed::NO {
                    count_steps(slot);
                }
            }
            read_start(skb, &mut (*slot).header);
            send(table, slot, reason, location, false);
        }
        (*slot).skb = 0;
    }
}

/// The end of a journey that was not dropped: what was timed is counted, what is to be told is told.
#[inline(always)]
unsafe fn finish(table: *mut Table, slot: *mut Slot, transmitted: bool) {
    unsafe {
        if (*slot).timed != timed::NO {
            (*table).stats.timed += 1;
            count_steps(slot);
            if let Some(first) = histograms_of(slot) {
                count(first + u32::from(STAGE_NODE), (*slot).elapsed);
            }
        }
        // Who answers in place of another machine is no endpoint.
        if (*slot).kind == kind::FIRST && (*slot).ct != 0 && (*slot).path < Path::COUNT as u8 {
            let reply = (&raw const (*slot).tuples).cast::<u8>().add(TUPLE_HASH);
            let port = [*reply.add(16), *reply.add(17)];
            let from = address_at(reply);
            expect_answer((*slot).family == IPV4, &from, port, (*slot).protocol);
        }
        if (*slot).kind != 0 {
            send(table, slot, 0, 0, transmitted);
        }
    }
}

/// The stage that the packet is in.
#[inline(always)]
unsafe fn stage_of(slot: *const Slot) -> u8 {
    unsafe { (*slot).boundary + (*slot).resent }
}

/// A stage was passed.
#[inline(always)]
unsafe fn passed(slot: *mut Slot, stage: u8, took: u64) {
    unsafe {
        (*slot).elapsed += took;
        let at = (*slot).steps as usize;
        if at < STEPS {
            let took = if took > u64::from(u32::MAX) {
                u32::MAX
            } else {
                took as u32
            };
            *(&raw mut (*slot).took).cast::<u32>().add(at) = took;
            *(&raw mut (*slot).stages).cast::<u8>().add(at) = stage;
            (*slot).steps = at as u8 + 1;
        }
    }
}

/// What the end of this packet's journey is told as; 0: not at all.
#[inline(always)]
unsafe fn kind_at_end(slot: *mut Slot) -> u8 {
    unsafe {
        let flags = (*slot).flags;
        if (*slot).kind == kind::ERROR {
            return kind::ERROR;
        }
        if (*slot).protocol == protocol::TCP && flags & tcp::RST != 0
            || (*slot).protocol == protocol::SCTP && flags == sctp::ABORT
        {
            return kind::RESET;
        }
        match (*slot).state {
            state::NEW => {
                if (*slot).protocol == protocol::UDP {
                    forget_answer((*slot).ct);
                }
                kind::FIRST
            }
            // Nobody translates what conntrack does not track.
            state::UNTRACKED if to_service(slot) => kind::FIRST,
            state::REPLY => {
                let answers = match (*slot).protocol {
                    protocol::TCP => flags & tcp::SYN != 0,
                    protocol::SCTP => flags == sctp::INIT_ACK,
                    _ => is_first_answer((*slot).ct),
                };
                if answers { kind::ANSWER } else { 0 }
            }
            _ => 0,
        }
    }
}

/// Was it sent to a Service, or to one's address?
#[inline(always)]
unsafe fn to_service(slot: *const Slot) -> bool {
    let path = unsafe { (*slot).path };
    path < Path::COUNT as u8 && path % Target::COUNT as u8 != Target::Pod as u8 || path >= ABSORBED
}

/// Where a connection's answer is remembered. Entries lie at multiples of 64 bytes.
#[inline(always)]
fn answer_of(ct: u64) -> Option<*mut u64> {
    // Fibonacci hashing: Knuth, The Art of Computer Programming, volume 3, section 6.4.
    let hash = (ct >> 6).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ANSWERS.get_ptr_mut((hash >> 40) as u32 % ANSWERED)
}

#[inline(always)]
fn is_first_answer(ct: u64) -> bool {
    let Some(answered) = answer_of(ct) else {
        return true;
    };
    // SAFETY: the map's value is one number; two CPUs that write it at once tell an answer twice.
    unsafe {
        let first = *answered != ct;
        *answered = ct;
        first
    }
}

/// A new connection at the address of an old one.
#[inline(always)]
fn forget_answer(ct: u64) {
    if let Some(answered) = answer_of(ct) {
        // SAFETY: as above.
        unsafe {
            if *answered == ct {
                *answered = 0;
            }
        }
    }
}

/// The journey is over: a packet that conntrack has not claimed by now is untracked.
#[inline(always)]
unsafe fn settle(slot: *mut Slot) {
    unsafe {
        if (*slot).state == state::UNKNOWN {
            (*slot).state = state::UNTRACKED;
        }
    }
}

/// Asks conntrack, once it has seen the packet.
#[inline(always)]
unsafe fn learn_state(slot: *mut Slot, skb: *const u8) {
    unsafe {
        let (ct, info) = connection(skb);
        if ct == 0 {
            return;
        }
        (*slot).ct = ct;
        (*slot).state = if info >= CT_IS_REPLY {
            state::REPLY
        } else if info == CT_NEW {
            (*slot).confirmed = u8::from(is_confirmed(ct));
            state::NEW
        } else {
            state::ESTABLISHED
        };
        if (*slot).timed == timed::IF_NEW && (*slot).state != state::NEW {
            (*slot).timed = timed::NO;
        }
    }
}

/// Reads what will be told or counted of the packet's connection, while the packet holds it.
#[inline(always)]
unsafe fn know_connection(slot: *mut Slot) {
    unsafe {
        let backwards = (*slot).state == state::REPLY || (*slot).path == Path::COUNT as u8;
        let told = (*slot).kind != 0;
        if (*slot).ct == 0 || !(told || backwards && (*slot).timed != timed::NO) {
            return;
        }
        if !read_tuples((*slot).ct, &mut (*slot).tuples) {
            (*slot).ct = 0;
        } else if backwards {
            (*slot).path = path_of_flow(slot);
        }
    }
}

/// The path of a reply: conntrack's original tuple says who asked for what.
#[inline(always)]
unsafe fn path_of_flow(slot: *mut Slot) -> u8 {
    unsafe {
        let tuple = (&raw const (*slot).tuples).cast::<u8>();
        let source = address_at(tuple);
        let destination = address_at(tuple.add(20));
        let port: [u8; 2] = [*tuple.add(36), *tuple.add(37)];
        let ipv4 = (*slot).family == IPV4;
        let target = target_of(ipv4, &destination, port, (*slot).protocol);
        if target > Target::Pod as u32 {
            return Path::COUNT as u8;
        }
        Path::index_of(origin_of(ipv4, &source, &destination), target) as u8
    }
}

/// The address in a tuple: at a multiple of four.
#[inline(always)]
unsafe fn address_at(from: *const u8) -> Address {
    let mut address = Aligned([0; 16]);
    let to = (&raw mut address).cast::<u32>();
    unsafe {
        for at in 0..4 {
            to.add(at).write(from.cast::<u32>().add(at).read());
        }
    }
    address
}

/// The times of the stages passed, into their histograms.
#[inline(always)]
unsafe fn count_steps(slot: *const Slot) {
    unsafe {
        let Some(first) = histograms_of(slot) else {
            return;
        };
        let steps = (*slot).steps as usize;
        let mut at = 0;
        while at < STEPS {
            if at >= steps {
                break;
            }
            let took = *(&raw const (*slot).took).cast::<u32>().add(at);
            let stage = *(&raw const (*slot).stages).cast::<u8>().add(at);
            count(first + u32::from(stage), u64::from(took));
            at += 1;
        }
    }
}

/// Where the histograms of the packet's path and state begin.
#[inline(always)]
unsafe fn histograms_of(slot: *const Slot) -> Option<u32> {
    let (path, state) = unsafe { ((*slot).path as usize, (*slot).state as usize) };
    if path >= Path::COUNT || state >= state::COUNT {
        return None;
    }
    Some(histogram_index(path as u32, state as u32, 0))
}

/// One value into one histogram.
#[inline(always)]
unsafe fn count(index: u32, value: u64) {
    if let Some(histogram) = TIMES.get_ptr_mut(index) {
        unsafe {
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
unsafe fn send(table: *mut Table, slot: *mut Slot, reason: u32, location: u64, transmitted: bool) {
    unsafe {
        if details::are_wanted() {
            let Some(mut entry) = RECORDS.reserve::<Told>(0) else {
                (*table).stats.ring_lost += 1;
                return;
            };
            let told = entry.as_mut_ptr();
            write(&raw mut (*told).record, slot, reason, location, transmitted);
            details::tell(table, slot, told);
            entry.submit(u64::from(BPF_RB_NO_WAKEUP));
        } else {
            let Some(mut entry) = RECORDS.reserve::<Record>(0) else {
                (*table).stats.ring_lost += 1;
                return;
            };
            write(entry.as_mut_ptr(), slot, reason, location, transmitted);
            entry.submit(u64::from(BPF_RB_NO_WAKEUP));
        }
    }
}

#[inline(always)]
unsafe fn write(
    record: *mut Record,
    slot: *const Slot,
    reason: u32,
    location: u64,
    transmitted: bool,
) {
    unsafe {
        (*record).time = bpf_ktime_get_ns();
        (*record).started = (*slot).started;
        (*record).elapsed = (*slot).elapsed;
        (*record).location = location;
        (*record).kind = (*slot).kind;
        (*record).family = (*slot).family;
        (*record).protocol = (*slot).protocol;
        (*record).path = (*slot).path;
        (*record).state = (*slot).state;
        (*record).stage = stage_of(slot);
        (*record).transmitted = u8::from(transmitted);
        (*record).flags = (*slot).flags;
        (*record).reason = reason;
        (*record).sport = (*slot).sport;
        (*record).dport = (*slot).dport;
        copy(&raw mut (*record).source, &raw const (*slot).source);
        copy(
            &raw mut (*record).destination,
            &raw const (*slot).destination,
        );
        (*record).code = (*slot).code;
        (*record).steps = (*slot).steps;
        (*record).tracked = u8::from((*slot).ct != 0);
        (*record).confirmed = (*slot).confirmed;
        (*record).began = (*slot).began;
        for pad in 0..3 {
            (&raw mut (*record).pad)
                .cast::<u8>()
                .add(pad)
                .write_volatile(0);
        }
        copy(&raw mut (*record).took, &raw const (*slot).took);
        copy(&raw mut (*record).stages, &raw const (*slot).stages);
        copy(&raw mut (*record).tuples, &raw const (*slot).tuples);
        copy(&raw mut (*record).header, &raw const (*slot).header);
    }
}

const _: () = assert!(NOTHING > ABSORBED as u32 + 2);
