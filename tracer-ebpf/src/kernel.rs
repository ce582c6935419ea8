//! What the programs read of the kernel: packets, their headers, conntrack's entries.
//!
//! Rust has no CO-RE relocations; offsets and type ids are constants that user space takes from the running
//! kernel's BTF and sets when it loads a program.

use core::arch::asm;
use core::ffi::c_void;
use core::mem::{MaybeUninit, transmute};
use core::ptr;

use aya_ebpf::Global;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use tracer_ebpf::record::{Address, Aligned, HEADER, TUPLES};

#[unsafe(no_mangle)]
static SKB_NFCT: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SKB_HEAD: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SKB_NETWORK_HEADER: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SKB_DEV: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SKB_LEN: Global<u32> = Global::new(0);
/// Where defragmentation leaves the length of a packet's largest part, in the control block of IPv4 and IPv6.
#[unsafe(no_mangle)]
static SKB_PARTS4: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SKB_PARTS6: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static DEV_NET: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static DEV_MTU: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub(crate) static NET_INUM: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static CT_TUPLE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static CT_STATUS: Global<u32> = Global::new(0);

/// Number of the node's network namespace.
#[unsafe(no_mangle)]
pub(crate) static NETNS: Global<u32> = Global::new(0);

// Type ids for `bpf_rdonly_cast`; all are 0 where the kernel lacks it (before 6.2).
#[unsafe(no_mangle)]
static TYPE_IPHDR: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static TYPE_IPV6HDR: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static TYPE_TCPHDR: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static TYPE_ICMPHDR: Global<u32> = Global::new(0);

/// `NFCT_INFOMASK` (include/linux/skbuff.h).
const CTINFO_MASK: u64 = 7;
/// `IPS_CONFIRMED` (`enum ip_conntrack_status`, include/uapi/linux/netfilter/nf_conntrack_common.h).
const CT_CONFIRMED: u64 = 1 << 3;

/// The kernel function `bpf_rdonly_cast(obj, btf_id)`, which costs nothing once it is verified. The loader
/// puts the running kernel's number of it where this one stands.
const RDONLY_CAST: usize = tracer_ebpf::record::RDONLY_CAST as usize;

/// The headers that are read.
#[derive(Clone, Copy)]
pub(crate) enum Header {
    Ipv4,
    Ipv6,
    /// TCP's; the ports lie in the same place in UDP and SCTP.
    Transport,
    Icmp,
}

/// Room for a header that has to be copied.
pub(crate) type Copied = MaybeUninit<Aligned<40>>;
/// Nothing in it yet.
pub(crate) const COPY: Copied = MaybeUninit::uninit();

/// A pointer through which a header can be read: a cast of its address, or where the kernel cannot do
/// that, a copy.
///
/// # Safety
///
/// Only fields of that header may be read through it.
#[inline(always)]
pub(crate) unsafe fn header_at(address: u64, header: Header, copy: &mut Copied) -> *const u8 {
    let (id, length) = match header {
        Header::Ipv4 => (TYPE_IPHDR.load(), 20),
        Header::Ipv6 => (TYPE_IPV6HDR.load(), 40),
        Header::Transport => (TYPE_TCPHDR.load(), 20),
        Header::Icmp => (TYPE_ICMPHDR.load(), 8),
    };
    unsafe {
        if TYPE_IPHDR.load() != 0 {
            let cast: unsafe extern "C" fn(u64, u32) -> *const u8 = transmute(RDONLY_CAST);
            return cast(address, id);
        }
        // What is not there, as behind a short packet's end, reads as zeros: the helper sees to that.
        bpf_probe_read_kernel(copy.as_mut_ptr().cast(), length, address as *const c_void);
        copy.as_ptr().cast()
    }
}

/// A field of a header that [`header_at`] gave.
#[inline(always)]
pub(crate) unsafe fn field<T: Copy>(header: *const u8, offset: usize) -> T {
    unsafe { ptr::read_volatile(header.add(offset).cast::<T>()) }
}

/// Address of a packet's network header.
#[inline(always)]
pub(crate) unsafe fn network_header(skb: *const u8) -> u64 {
    unsafe {
        let head = ptr::read_volatile(skb.add(SKB_HEAD.load() as usize).cast::<u64>());
        let offset = ptr::read_volatile(skb.add(SKB_NETWORK_HEADER.load() as usize).cast::<u16>());
        head + u64::from(offset)
    }
}

/// Copies a packet's first bytes.
#[inline(always)]
pub(crate) unsafe fn read_start(skb: *const u8, header: &mut Aligned<HEADER>) {
    unsafe {
        let from = network_header(skb) as *const c_void;
        bpf_probe_read_kernel((&raw mut header.0).cast(), HEADER as u32, from);
    }
}

/// A packet's conntrack entry (its address, 0 for none) and `enum ip_conntrack_info`.
#[inline(always)]
pub(crate) unsafe fn connection(skb: *const u8) -> (u64, u64) {
    let nfct = unsafe { ptr::read_volatile(skb.add(SKB_NFCT.load() as usize).cast::<u64>()) };
    (nfct & !CTINFO_MASK, nfct & CTINFO_MASK)
}

/// Was the conntrack entry made by an earlier packet?
#[inline(always)]
pub(crate) unsafe fn is_confirmed(ct: u64) -> bool {
    let mut status = 0_u64;
    let from = (ct + u64::from(CT_STATUS.load())) as *const c_void;
    unsafe { bpf_probe_read_kernel((&raw mut status).cast(), 8, from) };
    status & CT_CONFIRMED != 0
}

/// Copies both tuples of a conntrack entry.
#[inline(always)]
pub(crate) unsafe fn read_tuples(ct: u64, tuples: &mut Aligned<TUPLES>) -> bool {
    let from = (ct + u64::from(CT_TUPLE.load())) as *const c_void;
    unsafe { bpf_probe_read_kernel((&raw mut tuples.0).cast(), TUPLES as u32, from) == 0 }
}

/// Did the packet come in parts, which have been put together?
#[inline(always)]
pub(crate) unsafe fn came_in_parts(skb: *const u8, ipv4: bool) -> bool {
    let largest = if ipv4 {
        SKB_PARTS4.load()
    } else {
        SKB_PARTS6.load()
    };
    unsafe { ptr::read_volatile(skb.add(largest as usize).cast::<u16>()) != 0 }
}

/// The address of the device that a packet leaves by, if it may not leave as it is: longer than the device
/// takes at once, or in parts as it came. What leaves then may be other packets, made of it. Otherwise 0.
#[inline(always)]
pub(crate) unsafe fn cut_by(skb: *const u8, ipv4: bool) -> u64 {
    unsafe {
        let dev = ptr::read_volatile(skb.add(SKB_DEV.load() as usize).cast::<*const u8>());
        let most = ptr::read_volatile(dev.add(DEV_MTU.load() as usize).cast::<u32>());
        let length = ptr::read_volatile(skb.add(SKB_LEN.load() as usize).cast::<u32>());
        if length > most || came_in_parts(skb, ipv4) {
            dev as u64
        } else {
            0
        }
    }
}

/// Number of the network namespace of a packet's device.
#[inline(always)]
pub(crate) unsafe fn netns_of(skb: *const u8) -> u32 {
    unsafe {
        let dev = ptr::read_volatile(skb.add(SKB_DEV.load() as usize).cast::<*const u8>());
        let net = ptr::read_volatile(dev.add(DEV_NET.load() as usize).cast::<*const u8>());
        ptr::read_volatile(net.add(NET_INUM.load() as usize).cast::<u32>())
    }
}

/// The low half of an address. The verifier lets no other arithmetic turn a pointer into a number,
/// and the compiler would shift the pointer itself if it were written in Rust.
#[inline(always)]
pub(crate) fn low_half(address: *const u8) -> u32 {
    let half: u64;
    // SAFETY: one register-to-register move.
    unsafe {
        asm!("w2 = w1", out("r2") half, in("r1") address, options(pure, nomem, nostack));
    }
    half as u32
}

/// The first four bytes of an address: addresses lie at multiples of eight.
#[inline(always)]
pub(crate) unsafe fn first4(address: &Address) -> u32 {
    unsafe { (&raw const *address).cast::<u32>().read() }
}

/// Both halves of an IPv6 address.
#[inline(always)]
pub(crate) unsafe fn halves(address: &Address) -> (u64, u64) {
    unsafe {
        let halves = (&raw const *address).cast::<u64>();
        (halves.read(), halves.add(1).read())
    }
}
