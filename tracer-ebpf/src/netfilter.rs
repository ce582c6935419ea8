//! Boundaries: netfilter programs between two kernel components of one hook.
//!
//! A boundary ends the stage of the component before it and begins the stage of the one after it. There is
//! one function for the first boundary of each hook and one for all others: user space loads it once a boundary
//! with other constants, and the verifier removes what that boundary does not need.

use core::ffi::c_void;

use aya_ebpf::Global;
use tracer_ebpf::record::{IPV4, Slot, Table};

use crate::journey::{Here, enter, give_up, step, table, under_way};

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

/// `struct bpf_nf_ctx` (include/linux/netfilter/nf_bpf_link.h).
#[repr(C)]
struct NetfilterContext {
    state: *const c_void,
    skb: *const u8,
}

const NF_ACCEPT: i32 = 1;

/// The first boundary of a hook. Aya knows no netfilter programs, so this and the next stand in a section that
/// aya accepts and are loaded by hand.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
extern "C" fn entry(ctx: *const NetfilterContext) -> i32 {
    // SAFETY: the verifier checks every access; ctx is a valid bpf_nf_ctx.
    unsafe {
        let skb = (*ctx).skb;
        if let Some(table) = table() {
            enter(table, skb, HOOK.load(), here);
        }
    }
    NF_ACCEPT
}

/// Any other boundary.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
extern "C" fn boundary(ctx: *const NetfilterContext) -> i32 {
    // SAFETY: as above.
    unsafe {
        let skb = (*ctx).skb;
        if let Some(table) = table()
            && let Some(slot) = under_way(table, skb)
        {
            pass(table, slot, skb);
        }
    }
    NF_ACCEPT
}

/// A packet under way passes a boundary.
#[inline(always)]
unsafe fn pass(table: *mut Table, slot: *mut Slot, skb: *const u8) {
    unsafe {
        if u32::from((*slot).boundary) == PREVIOUS.load() {
            step(table, slot, skb, here());
        } else {
            give_up(table, slot);
        }
    }
}

/// This boundary.
#[inline(always)]
fn here() -> Here {
    Here {
        stage: BOUNDARY.load() as u8,
        hook: HOOK.load(),
        role: ROLE.load(),
        ipv4: FAMILY.load() == u32::from(IPV4),
    }
}
