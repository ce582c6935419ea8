//! The ends of a journey, where devices and the kernel's memory are.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use aya_log_ebpf::debug;
use tracer_ebpf::record::phase;

use crate::journey::{depart, depart_in_parts, drop, slot_for, slot_of, table, under_way};
use crate::kernel::{NETNS, netns_of};

/// A packet enters this node: remember when.
#[btf_tracepoint(function = "netif_receive_skb")]
fn netif_receive_skb(ctx: BtfTracePointContext) -> i32 {
    let skb: *const u8 = ctx.arg(0);
    // SAFETY: skb and what it leads to are BTF pointers, checked by the verifier.
    unsafe {
        if netns_of(skb) != NETNS.load() {
            return 0;
        }
        let Some(table) = table() else {
            return 0;
        };
        let slot = slot_for(table, skb);
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
    let Some(table) = table() else {
        return 0;
    };
    // SAFETY: slots are checked by the verifier.
    unsafe {
        if let Some(slot) = under_way(table, skb) {
            depart(table, slot);
        } else {
            depart_in_parts(table, ctx.arg(2));
        }
    }
    0
}

/// The kernel drops a packet.
#[btf_tracepoint(function = "kfree_skb")]
fn kfree_skb(ctx: BtfTracePointContext) -> i32 {
    let skb: *const u8 = ctx.arg(0);
    let location: u64 = ctx.arg(1);
    let reason: u32 = ctx.arg(2);
    let Some(table) = table() else {
        return 0;
    };
    // SAFETY: skb is a BTF pointer; slots are checked by the verifier.
    unsafe {
        if let Some(slot) = slot_of(table, skb) {
            debug!(&ctx, "dropped at {} reason {}", (*slot).boundary, reason);
            drop(table, slot, skb, reason, location);
        }
    }
    0
}
