//! What functions tell of a packet besides where it is: tables, chains, nat, the confirmation of its entry, IPVS.
//!
//! A function that works on a packet under way leaves a note: what it is, the stage, what came of it, and the
//! address of the kernel's object that it is about. What the object is called is read when the packet is told.
//! Later packets of a flow leave no notes: they are not told.
//!
//! **Whose note.** Some functions are not told the packet. They work on the one that entered a component last on
//! their CPU; nat must work on that packet's own connection besides.

use core::ffi::c_void;

use aya_ebpf::Global;
use aya_ebpf::helpers::generated::{bpf_probe_read_kernel, bpf_probe_read_kernel_str};
use aya_ebpf::macros::{fentry, fexit, map};
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::{FEntryContext, FExitContext};
use tracer_ebpf::record::{MET, Met, Note, Notes, SLOTS, Slot, Table, Told, met, state};

use crate::journey::{table, under_way};

/// 1 if notes are wanted.
#[unsafe(no_mangle)]
static DETAILS: Global<u32> = Global::new(0);
/// 1 if the table or chain that the program is attached to is noted, as its return is: what was noted and has
/// not returned is where the packet is.
#[unsafe(no_mangle)]
static NOTED: Global<u32> = Global::new(0);
/// How IPVS sends, of the function that the program is attached to: see [`met::SEND`].
#[unsafe(no_mangle)]
static METHOD: Global<u32> = Global::new(0);

// `struct xt_table` (include/linux/netfilter/x_tables.h).
#[unsafe(no_mangle)]
pub(crate) static TABLE_NAME: Global<u32> = Global::new(0);

// `struct nft_chain` and `struct nft_table` (include/net/netfilter/nf_tables.h).
#[unsafe(no_mangle)]
static CHAIN_NAME: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static CHAIN_TABLE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static NFT_TABLE_NAME: Global<u32> = Global::new(0);

// `struct ip_vs_conn`, `ip_vs_dest`, `ip_vs_service` and `ip_vs_scheduler` (include/net/ip_vs.h).
#[unsafe(no_mangle)]
static CONN_ADDRESS: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static CONN_PORT: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static CONN_DEST: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static DEST_SERVICE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SERVICE_SCHEDULER: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SCHEDULER_NAME: Global<u32> = Global::new(0);

/// The notes of the packets in this CPU's slots.
#[map]
static NOTES: PerCpuArray<[Notes; SLOTS]> = PerCpuArray::with_max_entries(1, 0);

/// `NF_NAT_MANIP_SRC` (`enum nf_nat_manip_type`, include/uapi/linux/netfilter/nf_nat.h).
const MANIP_SOURCE: u32 = 0;
/// A verdict is the low byte of what a hook returns (`NF_VERDICT_MASK`, include/uapi/linux/netfilter.h).
const VERDICT: i32 = 0xff;
/// Nothing has come of it yet.
const OPEN: i32 = -1;

/// Are notes wanted?
#[inline(always)]
pub(crate) fn are_wanted() -> bool {
    DETAILS.load() != 0
}

/// Something was called for a packet under way.
#[inline(always)]
pub(crate) unsafe fn called(table: *mut Table, slot: *mut Slot, what: u8, object: u64) {
    unsafe {
        if NOTED.load() != 0 {
            note(table, slot, what, OPEN, object);
        }
    }
}

/// `ipt_do_table(table, skb, state)` returns.
#[fexit]
fn table_ends(ctx: FExitContext) -> i32 {
    // SAFETY: of the packet, which may be gone, only the address is used.
    unsafe { returned(ctx.arg(1), ctx.arg(0), ctx.arg(3)) };
    0
}

/// `nft_do_chain(pkt, chain)` returns.
#[fexit]
fn chain_ends(ctx: FExitContext) -> i32 {
    // SAFETY: the arguments are BTF pointers, checked by the verifier; else as above.
    unsafe { returned(crate::functions::skb_of(ctx.arg(0)), ctx.arg(1), ctx.arg(2)) };
    0
}

/// `nf_nat_setup_info(ct, range, maniptype)` returns.
#[fexit]
fn nat_ends(ctx: FExitContext) -> i32 {
    let ct: u64 = ctx.arg(0);
    let what = if ctx.arg::<u32>(2) == MANIP_SOURCE {
        met::SOURCE_NAT
    } else {
        met::DESTINATION_NAT
    };
    // SAFETY: slots are checked by the verifier.
    unsafe {
        if let Some((table, slot)) = last()
            && (*slot).ct == ct
        {
            note(table, slot, what, ctx.arg::<i32>(3) & VERDICT, 0);
        }
    }
    0
}

/// `__nf_conntrack_confirm(skb)` returns.
#[fexit]
fn confirmation_ends(ctx: FExitContext) -> i32 {
    // SAFETY: of the packet, which may be gone, only the address is used.
    unsafe {
        if let Some((table, slot)) = at(ctx.arg(0)) {
            note(table, slot, met::CONFIRM, ctx.arg::<i32>(1) & VERDICT, 0);
        }
    }
    0
}

/// `ip_vs_schedule(svc, skb, pd, ignored, iph)` returns a connection or nothing.
#[fexit]
fn scheduling_ends(ctx: FExitContext) -> i32 {
    // SAFETY: as above.
    unsafe {
        if let Some((table, slot)) = at(ctx.arg(1)) {
            let connection: u64 = ctx.arg(5);
            let found = i32::from(connection != 0);
            note(table, slot, met::SCHEDULE, found, connection);
        }
    }
    0
}

/// `ip_vs_nat_xmit(skb, cp, pp, ipvsh)`, or another way to send, begins.
#[fentry]
fn sending_begins(ctx: FEntryContext) -> i32 {
    // SAFETY: as above.
    unsafe {
        if let Some((table, slot)) = at(ctx.arg(0)) {
            note(table, slot, met::SEND, METHOD.load() as i32, ctx.arg(1));
        }
    }
    0
}

/// `ip_vs_conn_expire_now(cp)` begins.
#[fentry]
fn expiry_begins(ctx: FEntryContext) -> i32 {
    // SAFETY: as above.
    unsafe {
        if let Some((table, slot)) = last() {
            note(table, slot, met::EXPIRE, OPEN, ctx.arg(0));
        }
    }
    0
}

/// The slot of a packet.
#[inline(always)]
unsafe fn at(skb: *const u8) -> Option<(*mut Table, *mut Slot)> {
    let table = table()?;
    unsafe { under_way(table, skb).map(|slot| (table, slot)) }
}

/// That of the packet which entered a component last.
#[inline(always)]
unsafe fn last() -> Option<(*mut Table, *mut Slot)> {
    let last = unsafe { (*table()?).last };
    if last == 0 {
        return None;
    }
    unsafe { at(last as *const u8) }
}

/// What was called for the packet has returned.
#[inline(always)]
unsafe fn returned(skb: *const u8, object: u64, verdict: i32) {
    unsafe {
        let Some((table, slot)) = at(skb) else { return };
        let Some(notes) = notes_of(table, slot) else {
            return;
        };
        let count = (*slot).notes as usize;
        let mut at = 0;
        while at < MET {
            if at >= count {
                return;
            }
            let note = notes.add(at);
            if (*note).object == object && (*note).result == OPEN {
                (*note).result = verdict & VERDICT;
                return;
            }
            at += 1;
        }
    }
}

/// Leaves a note, if the packet may be told.
#[inline(always)]
unsafe fn note(table: *mut Table, slot: *mut Slot, what: u8, result: i32, object: u64) {
    unsafe {
        if (*slot).state == state::ESTABLISHED || (*slot).state == state::REPLY {
            return;
        }
        let count = (*slot).notes as usize;
        let Some(notes) = notes_of(table, slot) else {
            return;
        };
        if count >= MET {
            return;
        }
        let note = notes.add(count);
        (*note).what = what;
        (*note).stage = (*slot).boundary + (*slot).resent;
        (*note).result = result;
        (*note).object = object;
        (*slot).notes = count as u8 + 1;
    }
}

/// The notes of a slot's packet.
#[inline(always)]
unsafe fn notes_of(table: *mut Table, slot: *mut Slot) -> Option<*mut Note> {
    let all = NOTES.get_ptr_mut(0)?.cast::<Notes>();
    // The slots are the table's first field.
    let index = (slot as u64 - table as u64) / size_of::<Slot>() as u64;
    Some(unsafe { all.add(index as usize & (SLOTS - 1)).cast() })
}

/// Tells what was noted of a packet.
#[inline(always)]
pub(crate) unsafe fn tell(table: *mut Table, slot: *mut Slot, told: *mut Told) {
    unsafe {
        let count = (*slot).notes as usize;
        (*told).count = 0;
        let Some(notes) = notes_of(table, slot) else {
            return;
        };
        let to = (&raw mut (*told).met).cast::<Met>();
        let mut at = 0;
        while at < MET {
            if at >= count {
                break;
            }
            describe(notes.add(at), to.add(at));
            at += 1;
        }
        (*told).count = at as u64;
    }
}

/// A note, with the names of what it is about.
#[inline(always)]
unsafe fn describe(note: *const Note, met: *mut Met) {
    unsafe {
        let (what, object) = ((*note).what, (*note).object);
        (*met).what = what;
        (*met).stage = (*note).stage;
        (*met).port = [0; 2];
        (*met).result = (*note).result;
        (*met).owner.0.as_mut_ptr().cast::<u64>().write(0);
        (*met).owner.0.as_mut_ptr().cast::<u64>().add(1).write(0);
        (*met).name.0.as_mut_ptr().write(0);
        let name = &raw mut (*met).name.0;
        let owner = &raw mut (*met).owner.0;
        if object == 0 {
            return;
        }
        match what {
            met::TABLE => text(name, object + u64::from(TABLE_NAME.load())),
            met::CHAIN => {
                text(name, pointer(object, &CHAIN_NAME));
                text(
                    owner,
                    pointer(pointer(object, &CHAIN_TABLE), &NFT_TABLE_NAME),
                );
            }
            _ => {
                let from = object + u64::from(CONN_ADDRESS.load());
                bpf_probe_read_kernel(owner.cast(), 16, from as *const c_void);
                let from = object + u64::from(CONN_PORT.load());
                bpf_probe_read_kernel((&raw mut (*met).port).cast(), 2, from as *const c_void);
                if what == met::SCHEDULE {
                    let service = pointer(pointer(object, &CONN_DEST), &DEST_SERVICE);
                    let scheduler = pointer(service, &SERVICE_SCHEDULER);
                    text(name, pointer(scheduler, &SCHEDULER_NAME));
                }
            }
        }
    }
}

/// A pointer that a structure holds; 0 if it cannot be read.
#[inline(always)]
unsafe fn pointer(object: u64, offset: &Global<u32>) -> u64 {
    let mut value = 0_u64;
    let from = (object + u64::from(offset.load())) as *const c_void;
    unsafe { bpf_probe_read_kernel((&raw mut value).cast(), 8, from) };
    value
}

/// A text that ends in zero, cut to what there is room for; nothing if it cannot be read.
#[inline(always)]
unsafe fn text<const N: usize>(to: *mut [u8; N], from: u64) {
    unsafe { bpf_probe_read_kernel_str(to.cast(), N as u32, from as *const c_void) };
}
