//! Requests that change rules, as they enter and leave the kernel, with who made them.
//!
//! # Minimum kernel version
//!
//! 6.1 with BTF. [`Way::Functions`] needs a kernel that allows programs at functions; elsewhere
//! [`Way::SystemCalls`] is taken.
//!
//! # Safety
//!
//! `unsafe` here is reading records that the kernel programs wrote: structures made of integers and
//! arrays of them, by the same definition on both sides.

use std::os::fd::{AsFd as _, BorrowedFd};

use aya::maps::{Array, MapData, PerCpuArray, RingBuf};
use tracer_ebpf::change::{Begin, End, Refusal, kind};

use super::program::{self, Callee, Constants, Kind, Link, Program, ProgramError, Programs};
use super::tier::{ProbeError, map_error, missing};
use crate::kernel::btf::{Btf, BtfError};
use crate::kernel::netns::Netns;

/// The compiled programs.
const OBJECT: &[u8] =
    aya::include_bytes_aligned!("../../../tracer-ebpf/prebuilt/rule_changes.bpf.o");

/// Where the probes sit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// At two functions, which little but control planes calls: free for everything else.
    Functions,
    /// At the entry and exit of every system call of the machine: some 50 ns for each system call, and
    /// some 200 ns more for each send (measured on kernel 6.18). Requests by `write`, `sendmmsg` or `io_uring` are not seen: the
    /// common tools use none of them.
    SystemCalls,
}

impl Way {
    /// Where that is, for people.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Functions => "functions (nf_setsockopt, netlink_unicast)",
            Self::SystemCalls => {
                "system calls (no probes at functions here: every system call costs a little more)"
            }
        }
    }
}

/// One record.
#[derive(Clone, Debug)]
pub enum Record {
    /// A request, as far as it was copied ([`tracer_ebpf::change::MESSAGE`]).
    Begin(Begin, Vec<u8>),
    /// The end of a thread's request.
    End(End),
    /// The kernel refused a message.
    Refusal(Refusal),
}

impl Record {
    /// Reads a record; `None` if it is none.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        match u32::from_ne_bytes(*bytes.first_chunk()?) {
            kind::BEGIN => {
                let begin: Begin = plain(bytes)?;
                let stored = usize::try_from(begin.stored).ok()?;
                let request = bytes.get(size_of::<Begin>()..)?.get(..stored)?;
                Some(Self::Begin(begin, request.to_vec()))
            }
            kind::END => plain(bytes).map(Self::End),
            kind::REFUSAL => plain(bytes).map(Self::Refusal),
            _ => None,
        }
    }
}

/// A structure that any bytes make.
trait Plain: Copy {}
impl Plain for Begin {}
impl Plain for End {}
impl Plain for Refusal {}

fn plain<T: Plain>(bytes: &[u8]) -> Option<T> {
    let bytes = bytes.get(..size_of::<T>())?;
    // SAFETY: there are enough bytes, and a T is made of integers and arrays of them.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// The attached probes; dropping them detaches everything.
pub struct RuleChangeProbes {
    programs: Programs,
    records: RingBuf<MapData>,
    _links: Vec<Link>,
    way: Way,
}

impl std::fmt::Debug for RuleChangeProbes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("RuleChangeProbes").field(&self.way).finish()
    }
}

const RECORDS: &str = "RECORDS";

impl RuleChangeProbes {
    /// Attaches to what changes a node's namespace, by the best way that this kernel allows.
    ///
    /// # Errors
    ///
    /// That of the last way that was tried.
    pub fn attach(node: &Netns) -> Result<Self, ProbeError> {
        Self::attach_by(node, Way::Functions).or_else(|_| Self::attach_by(node, Way::SystemCalls))
    }

    /// Attaches by this way.
    ///
    /// # Errors
    ///
    /// The kernel does not allow it, lacks BTF, or the process lacks `CAP_BPF` or `CAP_PERFMON`.
    pub fn attach_by(node: &Netns, way: Way) -> Result<Self, ProbeError> {
        let btf = Btf::vmlinux()?;
        let mut constants: Constants = program::numbers(offsets(btf)?).collect();
        let netns = node.number().map_err(ProbeError::Inode)?;
        constants.insert("NETNS", netns.to_ne_bytes().to_vec());
        let mut programs = Programs::new(OBJECT, &[])?;
        let kinds = match way {
            Way::Functions => at_functions(btf)?,
            Way::SystemCalls => at_system_calls(btf)?,
        };
        let loaded: Vec<Program> = kinds
            .into_iter()
            .map(|(name, kind)| programs.load(name, kind, &constants))
            .collect::<Result<_, ProgramError>>()?;
        let links = loaded.into_iter().map(|program| {
            let fd = program::attach_tracing(&program)?;
            Ok(Link::new(program, fd))
        });
        let links = links.collect::<Result<_, ProgramError>>()?;
        let records = programs.take_map(RECORDS).ok_or_else(|| missing(RECORDS))?;
        Ok(Self {
            _links: links,
            records: RingBuf::try_from(records).map_err(map_error(RECORDS))?,
            programs,
            way,
        })
    }

    /// How the probes are attached.
    pub const fn way(&self) -> Way {
        self.way
    }

    /// From here on only requests of this generic netlink family are taken for those of IPVS; before,
    /// those of every family are told.
    pub fn set_ipvs_family(&mut self, family: u16) -> Result<(), ProbeError> {
        const NAME: &str = "IPVS_FAMILY";
        let map = self.programs.map_mut(NAME).ok_or_else(|| missing(NAME))?;
        let mut map: Array<_, u32> = Array::try_from(map).map_err(map_error(NAME))?;
        map.set(0, u32::from(family), 0).map_err(map_error(NAME))
    }

    /// Records for which there was no room, until now.
    pub fn lost(&self) -> Result<u64, ProbeError> {
        const NAME: &str = "LOST";
        let map = self.programs.map(NAME).ok_or_else(|| missing(NAME))?;
        let map: PerCpuArray<_, u64> = PerCpuArray::try_from(map).map_err(map_error(NAME))?;
        let cpus = map.get(&0, 0).map_err(map_error(NAME))?;
        Ok(cpus.iter().sum())
    }

    /// Becomes readable when a request is done.
    pub fn readable(&self) -> BorrowedFd<'_> {
        self.records.as_fd()
    }

    /// Takes every record that has come, in order.
    pub fn drain(&mut self) -> Vec<Record> {
        let mut records = Vec::new();
        while let Some(bytes) = self.records.next() {
            records.extend(Record::read(&bytes));
        }
        records
    }
}

type Attached = Vec<(&'static str, Kind<'static>)>;

/// Exits come first: a request that is seen to begin is then seen to end.
fn at_functions(btf: &Btf) -> Result<Attached, ProbeError> {
    let callee = |name, parameters: &[&str]| {
        let function = btf.function(name)?;
        if function.parameters != parameters {
            return Err(BtfError::NoFunction(format!(
                "{name}({})",
                parameters.join(", ")
            )));
        }
        Ok(Callee {
            id: function.id,
            module: None,
        })
    };
    let option = callee("nf_setsockopt", &["sk", "pf", "val", "opt", "len"])?;
    let unicast = callee("netlink_unicast", &["ssk", "skb", "portid", "nonblock"])?;
    Ok(vec![
        ("setsockopt_exit", Kind::Exit(option)),
        ("unicast_exit", Kind::Exit(unicast)),
        ("setsockopt_entry", Kind::Entry(option)),
        ("unicast_entry", Kind::Entry(unicast)),
    ])
}

fn at_system_calls(btf: &Btf) -> Result<Attached, ProbeError> {
    let tracepoint = |name| Ok::<_, BtfError>(Kind::Tracepoint(btf.typedef_id(name)?));
    Ok(vec![
        ("sys_exit", tracepoint("btf_trace_sys_exit")?),
        ("sys_enter", tracepoint("btf_trace_sys_enter")?),
    ])
}

/// Offsets of the kernel's fields that the programs read, by the name of the program's constant.
fn offsets(btf: &Btf) -> Result<Vec<(&'static str, u32)>, BtfError> {
    [
        ("TASK_PARENT", "task_struct", "real_parent"),
        ("TASK_LEADER", "task_struct", "group_leader"),
        ("TASK_TGID", "task_struct", "tgid"),
        ("TASK_COMM", "task_struct", "comm"),
        ("TASK_FILES", "task_struct", "files"),
        ("TASK_MEMORY", "task_struct", "mm"),
        ("MEMORY_ARGUMENTS", "mm_struct", "arg_start"),
        ("FILES_TABLE", "files_struct", "fdt"),
        ("TABLE_SIZE", "fdtable", "max_fds"),
        ("TABLE_FILES", "fdtable", "fd"),
        ("FILE_PRIVATE", "file", "private_data"),
        ("SOCKET_FILE", "socket", "file"),
        ("SOCKET_SOCK", "socket", "sk"),
        ("SOCK_FAMILY", "sock", "__sk_common.skc_family"),
        ("SOCK_PROTOCOL", "sock", "sk_protocol"),
        ("SOCK_NET", "sock", "__sk_common.skc_net.net"),
        ("NETLINK_PORT", "netlink_sock", "portid"),
        ("NET_INUM", "net", "ns.inum"),
        ("SKB_DATA", "sk_buff", "data"),
        ("SKB_LENGTH", "sk_buff", "len"),
        ("REGS_DI", "pt_regs", "di"),
        ("REGS_SI", "pt_regs", "si"),
        ("REGS_DX", "pt_regs", "dx"),
        ("REGS_R10", "pt_regs", "r10"),
        ("REGS_R8", "pt_regs", "r8"),
        ("REGS_ORIG_AX", "pt_regs", "orig_ax"),
    ]
    .into_iter()
    .map(|(name, structure, field)| Ok((name, btf.offset_of(structure, field)?)))
    .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn records_are_read_back() {
        let mut begin = words(&[kind::BEGIN, 3]);
        for number in [7_u64, 8, 9] {
            begin.extend(number.to_ne_bytes());
        }
        begin.extend(words(&[1, 0, 5, 3]));
        begin.extend([b'a'; 96]);
        assert_eq!(begin.len(), size_of::<Begin>());
        begin.extend(b"abc.");
        let Some(Record::Begin(head, request)) = Record::read(&begin) else {
            panic!("a begin");
        };
        assert_eq!((head.time, head.thread, head.length), (7, 8, 5));
        assert_eq!(request, b"abc");
        let refusal = words(&[kind::REFUSAL, 5, 6, (-17_i32).cast_unsigned()]);
        let Some(Record::Refusal(refusal)) = Record::read(&refusal) else {
            panic!("a refusal");
        };
        assert_eq!((refusal.port, refusal.error), (5, -17));
        assert!(Record::read(&begin[..begin.len() - 2]).is_none());
        assert!(Record::read(&words(&[9, 9])).is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_record_or_none(kind in 0_u32..5, rest in proptest::collection::vec(any::<u8>(), 0..200)) {
            let bytes = [&kind.to_ne_bytes()[..], &rest].concat();
            let _ = Record::read(&bytes);
        }
    }
}
