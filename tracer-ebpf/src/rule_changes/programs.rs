//! Around the two ways by which every change of rules enters the kernel: a socket option
//! (iptables-legacy, old ipvsadm) and a netlink message (`nf_tables`, ipset, IPVS, addresses).
//!
//! The same logic stands at two places, of which user space attaches one:
//! - at the functions `nf_setsockopt` and `netlink_unicast`. Netlink hands a request over within the
//!   sender's own system call, and answers a failing one from within, so an answer is seen there too;
//! - at the entry and exit of every system call, where functions cannot be probed.
//!
//! These programs are dumb: they pick out requests that change something in the node's namespace
//! ([`tracer_ebpf::change`]) and copy them, with who sent them; user space reads them. A thread has one
//! system call at a time, so a begin and its end are joined by the thread.

use core::ffi::c_void;
use core::mem::{offset_of, size_of};
use core::panic::PanicInfo;

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use aya_ebpf::helpers::generated::{
    bpf_probe_read_kernel, bpf_probe_read_user, bpf_probe_read_user_str,
};
use aya_ebpf::helpers::{
    self, bpf_get_current_pid_tgid, bpf_ktime_get_ns,
    generated::{bpf_get_current_cgroup_id, bpf_get_current_task},
};
use aya_ebpf::macros::{btf_tracepoint, fentry, fexit, map};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::programs::{BtfTracePointContext, FEntryContext, FExitContext};
use tracer_ebpf::change::{
    ARGUMENT, Begin, End, Head, MESSAGE, NAME, NLMSG_ERROR, Refusal, kind, subsystem, subsystem_of,
    subsystem_of_option,
};

// Offsets of the fields that are read, from the running kernel's BTF.
#[unsafe(no_mangle)]
static TASK_PARENT: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static TASK_LEADER: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static TASK_TGID: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static TASK_COMM: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static TASK_FILES: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static TASK_MEMORY: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static MEMORY_ARGUMENTS: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static FILES_TABLE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static TABLE_SIZE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static TABLE_FILES: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static FILE_PRIVATE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SOCKET_FILE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SOCKET_SOCK: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SOCK_FAMILY: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SOCK_PROTOCOL: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SOCK_NET: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static NETLINK_PORT: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static NET_INUM: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SKB_DATA: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SKB_LENGTH: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static REGS_DI: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static REGS_SI: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static REGS_DX: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static REGS_R10: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static REGS_R8: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static REGS_ORIG_AX: Global<u32> = Global::new(0);

/// The node's namespace.
#[unsafe(no_mangle)]
static NETNS: Global<u32> = Global::new(0);

/// IPVS' generic netlink family; set by user space as soon as the kernel has it.
#[map]
static IPVS_FAMILY: Array<u32> = Array::with_max_entries(1, 0);

/// What a thread is in the middle of.
#[repr(C)]
#[derive(Clone, Copy)]
struct Pending {
    sock: u64,
    /// While it receives: where the answer will be. Otherwise 0.
    buffer: u64,
}

/// By process and thread.
#[map]
static PENDING: HashMap<u64, Pending> = HashMap::with_max_entries(4096, 0);

/// Processes that have changed rules: the answers that they get are looked at.
#[map]
static ASKED: LruHashMap<u32, u32> = LruHashMap::with_max_entries(1024, 0);

/// A record being made.
#[repr(C)]
struct Request {
    begin: Begin,
    bytes: [u8; MESSAGE],
}

#[map]
static REQUEST: PerCpuArray<Request> = PerCpuArray::with_max_entries(1, 0);

/// What user space reads.
#[map]
static RECORDS: RingBuf = RingBuf::with_byte_size(1 << 23, 0);

/// Records for which there was no room.
#[map]
static LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

const AF_NETLINK: u16 = 16;
/// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
const IPV4: u32 = 2;
const IPV6: u32 = 10;

// System calls of x86-64 (arch/x86/entry/syscalls/syscall_64.tbl).
const SENDTO: i64 = 44;
const RECVFROM: i64 = 45;
const SENDMSG: i64 = 46;
const RECVMSG: i64 = 47;
const SETSOCKOPT: i64 = 54;
/// `SOL_IP`, `SOL_IPV6`.
const SOL_IP: u64 = 0;
const SOL_IPV6: u64 = 41;

/// Where a request's bytes are.
#[derive(Clone, Copy)]
struct Source {
    address: u64,
    length: u32,
    user: bool,
}

impl Source {
    #[inline(always)]
    unsafe fn read(self, to: *mut c_void, length: u32) -> bool {
        let from = self.address as *const c_void;
        let failed = unsafe {
            if self.user {
                bpf_probe_read_user(to, length, from)
            } else {
                bpf_probe_read_kernel(to, length, from)
            }
        };
        failed == 0
    }

    #[inline(always)]
    unsafe fn head(self) -> Option<Head> {
        let mut head = Head {
            length: 0,
            kind: 0,
            flags: 0,
            sequence: 0,
            port: 0,
            own: [0; 4],
        };
        if self.length < size_of::<Head>() as u32 {
            return None;
        }
        let read = unsafe { self.read((&raw mut head).cast(), size_of::<Head>() as u32) };
        read.then_some(head)
    }
}

/// A field of the kernel's, zero if it cannot be read.
#[inline(always)]
unsafe fn field<T: Copy + Default>(structure: u64, offset: u32) -> T {
    let address = (structure + u64::from(offset)) as *const T;
    unsafe { helpers::bpf_probe_read_kernel(address) }.unwrap_or_default()
}

/// Is it a socket of the node's namespace?
#[inline(always)]
unsafe fn is_ours(sock: u64) -> bool {
    unsafe {
        let net: u64 = field(sock, SOCK_NET.load());
        field::<u32>(net, NET_INUM.load()) == NETNS.load()
    }
}

/// A netlink request is about to be handed to the kernel.
#[inline(always)]
unsafe fn asks(sock: u64, source: Source) {
    unsafe {
        let Some(head) = source.head() else { return };
        let protocol: u16 = field(sock, SOCK_PROTOCOL.load());
        let ipvs = IPVS_FAMILY.get(0).copied().unwrap_or(0);
        let subsystem = subsystem_of(protocol, &head, ipvs);
        if subsystem != subsystem::NONE && is_ours(sock) {
            begin(sock, subsystem, 0, source);
        }
    }
}

/// A socket option is about to be set.
#[inline(always)]
unsafe fn sets(sock: u64, option: u32, family: u32, source: Source) {
    let subsystem = subsystem_of_option(option, family == IPV6);
    let detail = if subsystem == subsystem::LEGACY {
        family
    } else {
        option
    };
    unsafe {
        if subsystem != subsystem::NONE && is_ours(sock) {
            begin(sock, subsystem, detail, source);
        }
    }
}

#[inline(always)]
unsafe fn begin(sock: u64, subsystem: u32, detail: u32, source: Source) {
    let thread = bpf_get_current_pid_tgid();
    let pending = Pending { sock, buffer: 0 };
    unsafe {
        let Some(request) = REQUEST.get_ptr_mut(0) else {
            return;
        };
        if PENDING.insert(&thread, &pending, 0).is_err() {
            lose();
            return;
        }
        // If this fails, an answer is not seen: the change is told, its failure not.
        let _ = ASKED.insert(&((thread >> 32) as u32), &1, 0);
        let task = bpf_get_current_task();
        let leader: u64 = field(task, TASK_LEADER.load());
        let parent: u64 = field(task, TASK_PARENT.load());
        // A thread other than the first may have started this process.
        let parent_leader: u64 = field(parent, TASK_LEADER.load());
        let begin = &raw mut (*request).begin;
        (*begin).kind = kind::BEGIN;
        (*begin).subsystem = subsystem;
        (*begin).thread = thread;
        (*begin).cgroup = bpf_get_current_cgroup_id();
        (*begin).parent = field(parent, TASK_TGID.load());
        (*begin).detail = detail;
        (*begin).length = source.length;
        (*begin).name = field::<[u8; NAME]>(leader, TASK_COMM.load());
        (*begin).parent_name = field::<[u8; NAME]>(parent_leader, TASK_COMM.load());
        let memory: u64 = field(task, TASK_MEMORY.load());
        let arguments: u64 = field(memory, MEMORY_ARGUMENTS.load());
        (*begin).argument[0] = 0;
        // It may be swapped out: then there is none.
        let _ = bpf_probe_read_user_str(
            (&raw mut (*begin).argument).cast(),
            ARGUMENT as u32,
            arguments as *const c_void,
        );
        let mut stored = source.length;
        // Of a legacy table and of nf_tables' batches only the beginning counts.
        if stored > 128 && (subsystem == subsystem::LEGACY || subsystem == subsystem::NFTABLES) {
            stored = 128;
        }
        if stored > MESSAGE as u32 {
            stored = MESSAGE as u32;
        }
        if !source.read((&raw mut (*request).bytes).cast(), stored) {
            stored = 0;
        }
        (*begin).stored = stored;
        (*begin).time = bpf_ktime_get_ns();
        let record = request.cast::<u8>();
        let length = offset_of!(Request, bytes) + stored as usize;
        let record = core::slice::from_raw_parts(record, length);
        // Who reads must not be woken yet: that would be part of what the request takes.
        if RECORDS
            .output::<[u8]>(record, u64::from(BPF_RB_NO_WAKEUP))
            .is_err()
        {
            let _ = PENDING.remove(&thread);
            lose();
        }
    }
}

/// The thread's request is done, if it made one.
#[inline(always)]
unsafe fn end(result: i64) {
    let thread = bpf_get_current_pid_tgid();
    unsafe {
        let Some(pending) = PENDING.get(&thread).copied() else {
            return;
        };
        let _ = PENDING.remove(&thread);
        if pending.buffer != 0 {
            received(pending, result);
            return;
        }
        let family: u16 = field(pending.sock, SOCK_FAMILY.load());
        let port = if family == AF_NETLINK {
            field(pending.sock, NETLINK_PORT.load())
        } else {
            0
        };
        let Some(mut entry) = RECORDS.reserve::<End>(0) else {
            lose();
            return;
        };
        entry.write(End {
            kind: kind::END,
            port,
            time: bpf_ktime_get_ns(),
            thread,
            result,
        });
        entry.submit(u64::from(BPF_RB_FORCE_WAKEUP));
    }
}

/// The kernel's answer: told if it is a refusal.
#[inline(always)]
unsafe fn answers(port: u32, source: Source) {
    unsafe {
        let Some(head) = source.head() else { return };
        // The number behind the header is the errno.
        let error = i32::from_ne_bytes(head.own);
        if head.kind != NLMSG_ERROR || error >= 0 {
            return;
        }
        let Some(mut entry) = RECORDS.reserve::<Refusal>(0) else {
            lose();
            return;
        };
        entry.write(Refusal {
            kind: kind::REFUSAL,
            port,
            sequence: head.sequence,
            error,
        });
        entry.submit(u64::from(BPF_RB_NO_WAKEUP));
    }
}

#[inline(always)]
unsafe fn received(pending: Pending, result: i64) {
    if result <= 0 {
        return;
    }
    unsafe {
        let port = field(pending.sock, NETLINK_PORT.load());
        let source = Source {
            address: pending.buffer,
            length: result as u32,
            user: true,
        };
        answers(port, source);
    }
}

#[inline(always)]
fn lose() {
    if let Some(lost) = LOST.get_ptr_mut(0) {
        // SAFETY: this CPU's own value.
        unsafe { *lost += 1 };
    }
}

// At the functions.

#[fentry(function = "nf_setsockopt")]
fn setsockopt_entry(ctx: FEntryContext) -> i32 {
    let sock: u64 = ctx.arg(0);
    let family: u8 = ctx.arg(1);
    let option: u32 = ctx.arg(2);
    // sockptr_t takes two places: the address, and whether it is the kernel's own.
    let source = Source {
        address: ctx.arg(3),
        length: ctx.arg(5),
        user: true,
    };
    // SAFETY: everything is read with helpers that check addresses.
    unsafe { sets(sock, option, u32::from(family), source) };
    0
}

#[fexit(function = "nf_setsockopt")]
fn setsockopt_exit(ctx: FExitContext) -> i32 {
    let result: i32 = ctx.ret().unwrap_or_default();
    // SAFETY: as above.
    unsafe { end(i64::from(result)) };
    0
}

/// Requests go to port 0, the kernel; answers to the port that asked, from within the request.
#[fentry(function = "netlink_unicast")]
fn unicast_entry(ctx: FEntryContext) -> i32 {
    let sock: u64 = ctx.arg(0);
    let skb: u64 = ctx.arg(1);
    let port: u32 = ctx.arg(2);
    // SAFETY: as above.
    unsafe {
        let source = Source {
            address: field(skb, SKB_DATA.load()),
            length: field(skb, SKB_LENGTH.load()),
            user: false,
        };
        if port == 0 {
            asks(sock, source);
        } else if PENDING.get(&bpf_get_current_pid_tgid()).is_some() {
            answers(port, source);
        }
    }
    0
}

#[fexit(function = "netlink_unicast")]
fn unicast_exit(ctx: FExitContext) -> i32 {
    let port: u32 = ctx.arg(2);
    let result: i32 = ctx.ret().unwrap_or_default();
    if port == 0 {
        // SAFETY: as above.
        unsafe { end(i64::from(result)) };
    }
    0
}

// At the system calls.

#[btf_tracepoint(function = "sys_enter")]
fn sys_enter(ctx: BtfTracePointContext) -> i32 {
    let number: i64 = ctx.arg(1);
    if !is_looked_at(number) {
        return 0;
    }
    let regs: u64 = ctx.arg(0);
    // SAFETY: as above.
    unsafe { enters(regs, number) };
    0
}

#[btf_tracepoint(function = "sys_exit")]
fn sys_exit(ctx: BtfTracePointContext) -> i32 {
    let regs: u64 = ctx.arg(0);
    let result: i64 = ctx.arg(1);
    // SAFETY: as above.
    unsafe {
        if is_looked_at(field(regs, REGS_ORIG_AX.load())) {
            end(result);
        }
    }
    0
}

#[inline(always)]
fn is_looked_at(number: i64) -> bool {
    matches!(number, SENDTO | RECVFROM | SENDMSG | RECVMSG | SETSOCKOPT)
}

#[inline(always)]
unsafe fn enters(regs: u64, number: i64) {
    unsafe {
        let receives = number == RECVFROM || number == RECVMSG;
        // Who never asked for a change gets no answer of interest.
        if receives
            && ASKED
                .get(&((bpf_get_current_pid_tgid() >> 32) as u32))
                .is_none()
        {
            return;
        }
        let level: u64 = field(regs, REGS_SI.load());
        let option: u64 = field(regs, REGS_DX.load());
        if number == SETSOCKOPT
            && (subsystem_of_option(option as u32, level == SOL_IPV6) == subsystem::NONE
                || (level != SOL_IP && level != SOL_IPV6))
        {
            return;
        }
        let Some(sock) = sock_of(field(regs, REGS_DI.load())) else {
            return;
        };
        if number == SETSOCKOPT {
            let source = Source {
                address: field(regs, REGS_R10.load()),
                length: field(regs, REGS_R8.load()),
                user: true,
            };
            let family = if level == SOL_IP { IPV4 } else { IPV6 };
            sets(sock, option as u32, family, source);
            return;
        }
        if field::<u16>(sock, SOCK_FAMILY.load()) != AF_NETLINK {
            return;
        }
        let source = if number == SENDTO || number == RECVFROM {
            Source {
                address: level,
                length: option as u32,
                user: true,
            }
        } else {
            first_part(level)
        };
        if receives {
            receive(sock, source.address);
        } else {
            asks(sock, source);
        }
    }
}

/// Somebody who asked for a change is about to receive: the answer is looked at when it is there.
#[inline(always)]
unsafe fn receive(sock: u64, buffer: u64) {
    if buffer == 0 {
        return;
    }
    let pending = Pending { sock, buffer };
    unsafe {
        if is_ours(sock) {
            let thread = bpf_get_current_pid_tgid();
            // If this fails, a refusal is not heard: the change is told as if it had gone well.
            if PENDING.insert(&thread, &pending, 0).is_err() {
                lose();
            }
        }
    }
}

/// The first part of `struct user_msghdr`: 8 bytes of name, 8 of its length, the address of the parts.
#[inline(always)]
unsafe fn first_part(message: u64) -> Source {
    unsafe {
        let parts = user(message + 16);
        Source {
            address: user(parts),
            length: user(parts + 8) as u32,
            user: true,
        }
    }
}

#[inline(always)]
unsafe fn user(address: u64) -> u64 {
    unsafe { helpers::bpf_probe_read_user(address as *const u64) }.unwrap_or_default()
}

/// The `struct sock` behind one of this task's descriptors; `None` if that is no socket.
#[inline(always)]
unsafe fn sock_of(descriptor: u64) -> Option<u64> {
    unsafe {
        let files: u64 = field(bpf_get_current_task(), TASK_FILES.load());
        let table: u64 = field(files, FILES_TABLE.load());
        let descriptor = u64::from(descriptor as u32);
        if descriptor >= u64::from(field::<u32>(table, TABLE_SIZE.load())) {
            return None;
        }
        let list: u64 = field(table, TABLE_FILES.load());
        let file: u64 = field(list + 8 * descriptor, 0);
        let socket: u64 = field(file, FILE_PRIVATE.load());
        // Only a socket points back at its file from there.
        let back: u64 = field(socket, SOCKET_FILE.load());
        if file == 0 || back != file {
            return None;
        }
        Some(field(socket, SOCKET_SOCK.load()))
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

const _: () = assert!(size_of::<Head>() == 20);
