//! Functions: programs before (`fentry`) and after (`fexit`) the kernel's own, where netfilter takes no
//! boundaries (before 6.4), or where its components are to be met themselves.
//!
//! A hook begins where `nf_hook_slow` begins, and ends where it returns that the packet may go on. Within it,
//! a component begins its stage where its function begins; the stage lasts until the next component begins or
//! the hook ends. So one program a component is enough, and no packet is looked at after a component that may
//! have freed it.
//!
//! **Pairing.** The kernel calls OUTPUT for packets that IPVS sends on from within INPUT, or from within
//! OUTPUT itself: such a packet is at another hook, or gone, when the outer call returns. The outer call
//! then says that the packet was taken (`NF_STOLEN`), and its return is no step. A return that lets a
//! packet go on which is at another hook is counted as unpaired. A component's function that is called
//! from elsewhere than the packet's hook (traffic control and Open vSwitch call conntrack) is no step.
//!
//! **Parts.** A hook begins before its defragmentation, which keeps the parts of a packet until the last one has
//! come, and goes on with the whole one in the last part's place. So parts are nobody, and the whole packet is
//! met when PREROUTING returns.
//!
//! **Namespaces.** Functions run for all of them; only the node's count.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::Global;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use aya_ebpf::macros::{fentry, fexit, map};
use aya_ebpf::maps::Array;
use aya_ebpf::programs::{FEntryContext, FExitContext};
use tracer_ebpf::record::{
    HOOKS, IPV4, IPV6, MOST_STAGES, NO_PRIORITY, NO_STAGE, Slot, Table, hook, met, role,
};

use crate::details::{self, TABLE_NAME};
use crate::journey::{Here, begin_whole, enter, give_up, slot_for, step, table, under_way};
use crate::kernel::{NET_INUM, NETNS, came_in_parts};

/// The first stage of each hook, a byte a hook.
#[unsafe(no_mangle)]
static FIRST_STAGES: Global<u64> = Global::new(0);
/// The stage behind each hook, which ends with the hook's return; [`NO_STAGE`]: the last one goes on.
#[unsafe(no_mangle)]
static LAST_STAGES: Global<u64> = Global::new(0);
/// The stage of the component that the program is attached to, at each hook.
#[unsafe(no_mangle)]
static STAGES: Global<u64> = Global::new(0);
/// The families that are watched: 1 for IPv4, 2 for IPv6.
#[unsafe(no_mangle)]
static FAMILIES: Global<u32> = Global::new(0);

// `struct nf_hook_state` (include/linux/netfilter.h).
#[unsafe(no_mangle)]
static STATE_HOOK: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static STATE_PF: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static STATE_NET: Global<u32> = Global::new(0);

// `struct xt_table` (include/linux/netfilter/x_tables.h).
#[unsafe(no_mangle)]
static TABLE_PRIORITY: Global<u32> = Global::new(0);

// `struct nft_pktinfo`, `struct nft_base_chain` and `struct nft_chain_type`
// (include/net/netfilter/nf_tables.h).
#[unsafe(no_mangle)]
static PKTINFO_SKB: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static PKTINFO_STATE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static BASE_CHAIN: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static BASE_PRIORITY: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static BASE_TYPE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static CHAIN_TYPE: Global<u32> = Global::new(0);

/// The lowest priority of the components of each stage, from the second stage of each hook on; behind the
/// last one, [`NO_PRIORITY`].
#[map]
static PRIORITIES: Array<[i32; MOST_STAGES]> = Array::with_max_entries(HOOKS as u32, 0);

/// What `nf_hook_slow` returns if the packet may go on (net/netfilter/core.c).
const GO_ON: i32 = 1;
/// `NFT_CHAIN_T_NAT` (`enum nft_chain_types`, include/net/netfilter/nf_tables.h).
const CHAIN_IS_NAT: u32 = 2;
/// The first four bytes of the name of `iptables`' nat table.
const NAT: u32 = u32::from_ne_bytes(*b"nat\0");

/// `nf_hook_slow(skb, state, entries, index)` begins.
#[fentry]
fn hook_begins(ctx: FEntryContext) -> i32 {
    // SAFETY: the arguments are BTF pointers, checked by the verifier.
    unsafe { hook_entry(ctx.arg(0), ctx.arg(1)) };
    0
}

/// `nf_hook_slow(skb, state, entries, index)` returns.
#[fexit]
fn hook_ends(ctx: FExitContext) -> i32 {
    // Behind the arguments comes what is returned.
    if ctx.arg::<i32>(4) == GO_ON {
        // SAFETY: as above; a packet that may go on is still there.
        unsafe { hook_exit(ctx.arg(0), ctx.arg(1)) };
    }
    0
}

/// `nf_conntrack_in(skb, state)` begins.
#[fentry]
fn tracking_begins(ctx: FEntryContext) -> i32 {
    // SAFETY: as above.
    unsafe {
        component(ctx.arg(0), ctx.arg(1), |at| {
            Some(byte(STAGES.load(), at.hook))
        });
    }
    0
}

/// A component's `nf_hookfn`, `(priv, skb, state)`, begins.
#[fentry]
fn component_begins(ctx: FEntryContext) -> i32 {
    // SAFETY: as above.
    unsafe {
        component(ctx.arg(1), ctx.arg(2), |at| {
            Some(byte(STAGES.load(), at.hook))
        });
    }
    0
}

/// `ipt_do_table(table, skb, state)` begins. The nat table is called by nat and part of its stage.
#[fentry]
fn table_begins(ctx: FEntryContext) -> i32 {
    let table: u64 = ctx.arg(0);
    // SAFETY: as above; the table is read by a helper that checks the address.
    unsafe {
        let met = component(ctx.arg(1), ctx.arg(2), |at| {
            if read::<u32>(table + u64::from(TABLE_NAME.load())) == NAT {
                return None;
            }
            let priority = read(table + u64::from(TABLE_PRIORITY.load()));
            stage_at(at.hook, priority)
        });
        if let Some((journeys, slot)) = met {
            details::called(journeys, slot, met::TABLE, table);
        }
    }
    0
}

/// `nft_do_chain(pkt, chain)` begins. Chains of type nat are called by nat and part of its stage.
#[fentry]
fn chain_begins(ctx: FEntryContext) -> i32 {
    let pktinfo: *const u8 = ctx.arg(0);
    let chain: u64 = ctx.arg(1);
    // SAFETY: as above.
    unsafe {
        let state = ptr::read_volatile(pktinfo.add(PKTINFO_STATE.load() as usize).cast());
        let met = component(skb_of(pktinfo), state, |at| {
            let base = chain - u64::from(BASE_CHAIN.load());
            let kind: u64 = read(base + u64::from(BASE_TYPE.load()));
            if read::<u32>(kind + u64::from(CHAIN_TYPE.load())) == CHAIN_IS_NAT {
                return None;
            }
            stage_at(at.hook, read(base + u64::from(BASE_PRIORITY.load())))
        });
        if let Some((journeys, slot)) = met {
            details::called(journeys, slot, met::CHAIN, chain);
        }
    }
    0
}

/// The packet of a `struct nft_pktinfo`.
#[inline(always)]
pub(crate) unsafe fn skb_of(pktinfo: *const u8) -> *const u8 {
    unsafe { ptr::read_volatile(pktinfo.add(PKTINFO_SKB.load() as usize).cast()) }
}

/// A call of a hook of the node.
#[derive(Clone, Copy)]
struct At {
    hook: u32,
    ipv4: bool,
}

/// Which hook is called, if it is the node's and of a family that is watched.
#[inline(always)]
unsafe fn at(state: *const u8) -> Option<At> {
    unsafe {
        let family = ptr::read_volatile(state.add(STATE_PF.load() as usize));
        let bit = match family {
            IPV4 => 1,
            IPV6 => 2,
            _ => return None,
        };
        let hook = u32::from(ptr::read_volatile(state.add(STATE_HOOK.load() as usize)));
        if FAMILIES.load() & bit == 0 || hook >= HOOKS as u32 {
            return None;
        }
        let net = ptr::read_volatile(state.add(STATE_NET.load() as usize).cast::<*const u8>());
        let number = ptr::read_volatile(net.add(NET_INUM.load() as usize).cast::<u32>());
        (number == NETNS.load()).then_some(At {
            hook,
            ipv4: family == IPV4,
        })
    }
}

/// A packet enters a hook.
#[inline(always)]
unsafe fn hook_entry(skb: *const u8, state: *const u8) {
    unsafe {
        let (Some(at), Some(table)) = (at(state), table()) else {
            return;
        };
        enter(table, skb, at.hook, || Here {
            stage: byte(FIRST_STAGES.load(), at.hook),
            hook: at.hook,
            role: role::ENTRY,
            ipv4: at.ipv4,
        });
    }
}

/// A packet leaves a hook and goes on.
#[inline(always)]
unsafe fn hook_exit(skb: *const u8, state: *const u8) {
    unsafe {
        let Some((table, slot, at)) = at_hook(skb, state) else {
            return whole_entry(skb, state);
        };
        let stage = byte(LAST_STAGES.load(), at.hook);
        if !is_at((*slot).boundary, at.hook) {
            give_up(table, slot);
        } else if stage != NO_STAGE {
            let role = match at.hook {
                hook::INPUT => role::DELIVER,
                hook::POSTROUTING => role::DEPART,
                _ => 0,
            };
            if role != 0 || stage != (*slot).boundary {
                go(table, slot, skb, at, stage, role);
            }
        }
    }
}

/// A packet that came in parts is whole when PREROUTING returns: its journey begins there.
#[inline(always)]
unsafe fn whole_entry(skb: *const u8, state: *const u8) {
    unsafe {
        let ipv4 = ptr::read_volatile(state.add(STATE_PF.load() as usize)) == IPV4;
        let hook = ptr::read_volatile(state.add(STATE_HOOK.load() as usize));
        if u32::from(hook) != hook::PREROUTING || !came_in_parts(skb, ipv4) {
            return;
        }
        let (Some(at), Some(table)) = (at(state), table()) else {
            return;
        };
        let here = Here {
            stage: byte(LAST_STAGES.load(), at.hook),
            hook: at.hook,
            role: role::ENTRY,
            ipv4: at.ipv4,
        };
        if here.stage != NO_STAGE {
            begin_whole(table, slot_for(table, skb), skb, here);
        }
    }
}

/// A packet enters a component of a hook: its slot, if it goes on.
#[inline(always)]
unsafe fn component(
    skb: *const u8,
    state: *const u8,
    stage_of: impl FnOnce(At) -> Option<u8>,
) -> Option<(*mut Table, *mut Slot)> {
    unsafe {
        let (table, slot, at) = at_hook(skb, state)?;
        if !is_at((*slot).boundary, at.hook) {
            return None;
        }
        match stage_of(at) {
            Some(stage) if stage == (*slot).boundary || stage == NO_STAGE => {}
            Some(stage) if stage > (*slot).boundary => go(table, slot, skb, at, stage, 0),
            Some(_) => {
                give_up(table, slot);
                return None;
            }
            None => {}
        }
        if details::are_wanted() {
            (*table).last = skb as u64;
        }
        Some((table, slot))
    }
}

/// The slot of a packet that is on its way over the node, and the hook that it is at.
#[inline(always)]
unsafe fn at_hook(skb: *const u8, state: *const u8) -> Option<(*mut Table, *mut Slot, At)> {
    unsafe {
        let table = table()?;
        let slot = under_way(table, skb)?;
        Some((table, slot, at(state)?))
    }
}

#[inline(always)]
unsafe fn go(table: *mut Table, slot: *mut Slot, skb: *const u8, at: At, stage: u8, role: u32) {
    let here = Here {
        stage,
        hook: at.hook,
        role,
        ipv4: at.ipv4,
    };
    unsafe { step(table, slot, skb, here) }
}

/// Is this stage one of the hook's?
#[inline(always)]
fn is_at(stage: u8, hook: u32) -> bool {
    let first = byte(FIRST_STAGES.load(), hook);
    let next = byte(FIRST_STAGES.load(), hook + 1);
    stage >= first && stage < next
}

/// The stage of a component with this priority.
#[inline(always)]
fn stage_at(hook: u32, priority: i32) -> Option<u8> {
    let priorities = PRIORITIES.get_ptr(hook)?.cast::<i32>();
    let mut stage = byte(FIRST_STAGES.load(), hook);
    for at in 0..MOST_STAGES {
        // SAFETY: at is below the number of entries.
        let lowest = unsafe { *priorities.add(at) };
        stage += u8::from(lowest <= priority && lowest != NO_PRIORITY);
    }
    Some(stage)
}

/// A byte of eight.
#[inline(always)]
const fn byte(bytes: u64, at: u32) -> u8 {
    (bytes >> (at * 8)) as u8
}

/// A value somewhere in the kernel; 0 if it is not there.
#[inline(always)]
unsafe fn read<T: Default>(from: u64) -> T {
    let mut value = T::default();
    unsafe {
        bpf_probe_read_kernel(
            (&raw mut value).cast(),
            size_of::<T>() as u32,
            from as *const c_void,
        );
    }
    value
}
