//! Boundaries: netfilter programs between two kernel components of one hook.
//!
//! A boundary ends the stage of the component before it and begins the stage of the one after it. There is
//! one function for all boundaries: user space loads it once a boundary with other constants, and the
//! verifier removes what that boundary does not need.

use core::ffi::c_void;

use aya_ebpf::Global;
use tracer_ebpf::record::{IPV4, phase, role};

use crate::journey::{Here, enter, slot_of, step, table};

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

/// A boundary. Aya knows no netfilter programs, so it stands in a section that aya accepts and is
/// loaded by hand.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
extern "C" fn boundary(ctx: *const NetfilterContext) -> i32 {
    // SAFETY: the verifier checks every access; ctx is a valid bpf_nf_ctx.
    unsafe {
        pass((*ctx).skb);
    }
    NF_ACCEPT
}

/// A packet passes a boundary.
#[inline(always)]
unsafe fn pass(skb: *const u8) {
    let Some(table) = table() else {
        return;
    };
    let here = Here {
        stage: BOUNDARY.load() as u8,
        hook: HOOK.load(),
        role: ROLE.load(),
        ipv4: FAMILY.load() == u32::from(IPV4),
    };
    unsafe {
        let slot = slot_of(table, skb);
        if here.role & role::ENTRY != 0 {
            enter(table, slot, skb, here);
            return;
        }
        let ours = (*slot).skb == skb as u64;
        if !ours || (*slot).phase != phase::UNDERWAY {
            return;
        }
        if u32::from((*slot).boundary) != PREVIOUS.load() {
            (*table).stats.unpaired += 1;
            (*slot).skb = 0;
            return;
        }
        step(table, slot, skb, here);
    }
}
