//! Loading and attaching programs: one parse and one relocation, then one load for each set of
//! constants.
//!
//! Netfilter programs (`BPF_PROG_TYPE_NETFILTER`, kernel 6.4 and later) are unknown to aya, and
//! aya's own loader would read all of the kernel's BTF twice for three tracepoints (a third of the
//! time that attaching takes). So the object's maps are made through aya, as aya's maps, and this
//! room relocates the functions against them once: [`Programs::load`] patches the constants into
//! `.rodata` maps of the program's own and calls `BPF_PROG_LOAD`. A link ends with its file
//! descriptor, so nothing outlives this process.
//!
//! # Safety
//!
//! `unsafe` here is the `bpf(2)` system call alone. Each call gets a zeroed `union bpf_attr` of
//! which only the fields of that command are set, and every pointer in it (instructions, licence,
//! log, key, value) is to memory that lives until the call returns.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use aya::maps::{Map, MapData};
use aya_obj::generated::{
    BPF_PSEUDO_MAP_VALUE, bpf_attach_type, bpf_attr, bpf_btf_info, bpf_cmd, bpf_insn,
    bpf_prog_info, bpf_prog_type, bpf_stats_type,
};
use aya_obj::{EbpfSectionKind, Object};

/// How programs before and after functions are called in errors.
const ENTRY: &str = "entry";
const EXIT: &str = "exit";

/// Why a program could not be loaded or attached.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The object is not what was expected.
    #[error("the eBPF object is damaged: {0}")]
    Object(String),
    /// The kernel refused the program.
    #[error("the kernel refused the {kind} program {name}: {source}{}", note(.kind, .source, .log))]
    Load {
        /// `netfilter`, `tracepoint`, `entry` or `exit`.
        kind: &'static str,
        /// Its function.
        name: String,
        /// What `BPF_PROG_LOAD` answered.
        source: io::Error,
        /// The verifier's last words.
        log: String,
    },
    /// A map operation failed.
    #[error("the kernel refused a map of constants: {0}")]
    Constants(#[source] io::Error),
    /// A map could not be made.
    #[error("the kernel refused the map {name}: {source}")]
    Map {
        /// The map's name.
        name: String,
        /// What aya says.
        source: aya::maps::MapError,
    },
    /// The kernel refused the tracepoint or function.
    #[error("cannot attach the program {name}: {source}")]
    Tracing {
        /// The program's function.
        name: String,
        /// What `BPF_RAW_TRACEPOINT_OPEN` answered.
        source: io::Error,
    },
    /// The kernel refused the link.
    #[error("cannot attach to netfilter hook {hook} at priority {priority}: {source}")]
    Attach {
        /// Number of the hook.
        hook: u32,
        /// The priority asked for.
        priority: i32,
        /// What `BPF_LINK_CREATE` answered.
        source: io::Error,
    },
    /// The type information of the kernel's own objects cannot be had.
    #[error("the kernel gives no type information of {name} to attach with: {source}")]
    Module {
        /// The module.
        name: String,
        /// What `bpf(2)` answered.
        source: io::Error,
    },
    /// The kernel does not tell what programs cost.
    #[error("the kernel does not count programs' run time: {0}")]
    Statistics(#[source] io::Error),
}

/// What else there is to say of a program that was refused.
fn note(kind: &str, source: &io::Error, log: &str) -> String {
    if log.is_empty() {
        // Refused before it was looked at.
        let at_function = matches!(kind, ENTRY | EXIT);
        return if at_function && source.raw_os_error() == Some(libc::EPERM) {
            "; a kernel that is locked down refuses programs at functions: trace with --tier hooks and no \
             --detail functions"
                .to_owned()
        } else {
            String::new()
        };
    }
    let tail: Vec<&str> = log.lines().rev().take(3).collect();
    let tail: Vec<&str> = tail.into_iter().rev().collect();
    format!("; the verifier says: {}", tail.join(" | "))
}

/// What a program is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind<'a> {
    /// `BPF_PROG_TYPE_NETFILTER`.
    Netfilter,
    /// `tp_btf`: the id of the tracepoint's `btf_trace_` type in vmlinux.
    Tracepoint(u32),
    /// `fentry`: runs before a function.
    Entry(Callee<'a>),
    /// `fexit`: runs after a function, with its arguments and its result.
    Exit(Callee<'a>),
}

/// A function to attach to: see [`crate::kernel::btf::Btf::function`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Callee<'a> {
    /// The id of its type.
    pub(super) id: u32,
    /// Its module's BTF ([`module_btf`]); `None`: it is vmlinux's.
    pub(super) module: Option<BorrowedFd<'a>>,
}

/// A loaded program.
#[derive(Debug)]
pub(super) struct Program {
    name: &'static str,
    fd: OwnedFd,
}

/// An attached program; dropping it detaches.
#[derive(Debug)]
pub(super) struct Link {
    /// `None`: it is detached, and the program only told of.
    fd: Option<OwnedFd>,
    program: Program,
}

/// How often programs ran, and for how long in all, as the kernel counts it (`bpf_prog_info`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunTime {
    /// Runs.
    pub runs: u64,
    /// Nanoseconds, without the kernel's way in and out of a program.
    pub ns: u64,
}

/// While it lives, the kernel counts programs' runs and their time, which costs it two readings of the
/// clock a run. It ends with this process at the latest (`BPF_ENABLE_STATS`).
#[derive(Debug)]
pub(super) struct Counting {
    _fd: OwnedFd,
}

impl Counting {
    pub(super) fn start() -> Result<Self, ProgramError> {
        let mut attr = zeroed();
        attr.enable_stats.type_ = bpf_stats_type::BPF_STATS_RUN_TIME as u32;
        let fd = bpf(bpf_cmd::BPF_ENABLE_STATS, &mut attr).map_err(ProgramError::Statistics)?;
        Ok(Self { _fd: fd_of(fd) })
    }
}

impl Link {
    /// A program and the descriptor that attaching it gave.
    pub(super) fn new(program: Program, fd: OwnedFd) -> Self {
        let fd = Some(fd);
        Self { fd, program }
    }

    /// Detaches the program, of which [`Self::run_time`] goes on to tell.
    pub(super) fn detach(&mut self) {
        self.fd = None;
    }

    /// What the program did since it was loaded, as far as it was counted.
    pub(super) fn run_time(&self) -> Result<RunTime, ProgramError> {
        // SAFETY: every field of the structure is an integer or an array of integers.
        let mut info: bpf_prog_info = unsafe { std::mem::zeroed() };
        let mut attr = zeroed();
        attr.info.bpf_fd = self.program.fd.as_raw_fd().unsigned_abs();
        attr.info.info_len = u32::try_from(size_of::<bpf_prog_info>()).unwrap_or(0);
        attr.info.info = std::ptr::from_mut(&mut info) as u64;
        bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr).map_err(ProgramError::Statistics)?;
        Ok(RunTime {
            runs: info.run_cnt,
            ns: info.run_time_ns,
        })
    }
}

/// Where a link goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// `NFPROTO_IPV4` or `NFPROTO_IPV6`.
    pub(super) family: u8,
    /// Number of the hook.
    pub(super) hook: u32,
    /// Priority within the hook.
    pub(super) priority: i32,
}

/// The constants of a program, by name: native byte order.
pub(super) type Constants = HashMap<&'static str, Vec<u8>>;

/// Numbers as constants: offsets of fields, ids of types.
pub(super) fn numbers(
    values: Vec<(&'static str, u32)>,
) -> impl Iterator<Item = (&'static str, Vec<u8>)> {
    let values = values.into_iter();
    values.map(|(name, value)| (name, value.to_ne_bytes().to_vec()))
}

/// The object's maps, made, and its functions, relocated.
#[derive(Debug)]
pub(super) struct Programs {
    object: Object,
    maps: BTreeMap<String, Map>,
    /// The maps of constants, and the descriptors that stand for them in the functions.
    stand_ins: Vec<(String, MapData)>,
}

impl Programs {
    /// Parses the object, makes its maps and relocates its functions; `rooms` sets the maximum
    /// number of entries of some maps.
    pub(super) fn new(object: &[u8], rooms: &[(&str, u32)]) -> Result<Self, ProgramError> {
        let mut object = Object::parse(object).map_err(|e| damaged(&e))?;
        let text_sections = object
            .functions
            .keys()
            .map(|(section, _)| *section)
            .collect();
        let mut maps = BTreeMap::new();
        let mut stand_ins = Vec::new();
        let mut fds = Vec::new();
        for (name, map) in &object.maps {
            let mut map = map.clone();
            let data = if map.section_kind() == EbpfSectionKind::Rodata {
                let data = frozen(name, &map)?;
                let fd = data.fd().as_fd().as_raw_fd();
                stand_ins.push((name.clone(), data));
                fd
            } else {
                if let Some((_, room)) = rooms.iter().find(|(room, _)| room == name) {
                    map.set_max_entries(*room);
                }
                let made = MapData::create(map.clone(), name, None)
                    .and_then(|data| {
                        let fd = data.fd().as_fd().as_raw_fd();
                        Ok((fd, Map::from_map_data(data)?))
                    })
                    .map_err(|source| ProgramError::Map {
                        name: name.clone(),
                        source,
                    })?;
                maps.insert(name.clone(), made.1);
                made.0
            };
            fds.push((name.clone(), data, map));
        }
        object
            .relocate_maps(
                fds.iter().map(|(name, fd, map)| (name.as_str(), *fd, map)),
                &text_sections,
            )
            .map_err(|e| damaged(&e))?;
        object
            .relocate_calls(&text_sections)
            .map_err(|e| damaged(&e))?;
        Ok(Self {
            object,
            maps,
            stand_ins,
        })
    }

    /// Puts a function of the kernel where programs call `stand_in`; without one they must not get there.
    pub(super) fn resolve(&mut self, stand_in: u32, function: Option<u32>) {
        let Some(id) = function else { return };
        for function in self.object.functions.values_mut() {
            for instruction in &mut function.instructions {
                if instruction.code == CALL
                    && instruction.src_reg() == 0
                    && instruction.imm.cast_unsigned() == stand_in
                {
                    instruction.set_src_reg(BPF_PSEUDO_KFUNC_CALL);
                    instruction.imm = id.cast_signed();
                }
            }
        }
    }

    /// One of the object's maps.
    pub(super) fn map(&self, name: &str) -> Option<&Map> {
        self.maps.get(name)
    }

    /// One of the object's maps, to write to.
    pub(super) fn map_mut(&mut self, name: &str) -> Option<&mut Map> {
        self.maps.get_mut(name)
    }

    /// One of the object's maps, to keep: no function may be loaded after that.
    pub(super) fn take_map(&mut self, name: &str) -> Option<Map> {
        self.maps.remove(name)
    }

    /// Loads a function with these constants.
    pub(super) fn load(
        &mut self,
        function: &'static str,
        kind: Kind<'_>,
        constants: &Constants,
    ) -> Result<Program, ProgramError> {
        self.object
            .patch_map_data(
                constants
                    .iter()
                    .map(|(name, bytes)| (*name, (bytes.as_slice(), true)))
                    .collect(),
            )
            .map_err(|e| damaged(&e))?;
        let mut code = self
            .object
            .programs
            .get(function)
            .and_then(|program| self.object.functions.get(&program.function_key()))
            .ok_or_else(|| ProgramError::Object(format!("no function {function}")))?
            .instructions
            .clone();
        // The program holds its maps: these descriptors may end with this function.
        let mut made = Vec::new();
        for (name, stand_in) in &self.stand_ins {
            let map = self
                .object
                .maps
                .get(name)
                .ok_or_else(|| ProgramError::Object(format!("no map {name}")))?;
            let map = frozen(name, map)?;
            replace_fd(
                &mut code,
                stand_in.fd().as_fd().as_raw_fd(),
                map.fd().as_fd().as_raw_fd(),
            );
            made.push(map);
        }
        program_load(function, kind, &code, &self.object.license)
    }
}

/// `BPF_JMP | BPF_CALL` (include/uapi/linux/bpf.h).
const CALL: u8 = 0x85;
/// `BPF_PSEUDO_KFUNC_CALL`: the number is that of a kernel function in its BTF.
const BPF_PSEUDO_KFUNC_CALL: u8 = 2;

/// Exchanges the map behind every address of a map's value.
fn replace_fd(code: &mut [bpf_insn], from: RawFd, to: RawFd) {
    const LOAD_64: u8 = 0x18; // BPF_LD | BPF_IMM | BPF_DW
    for instruction in code {
        if instruction.code == LOAD_64
            && u32::from(instruction.src_reg()) == BPF_PSEUDO_MAP_VALUE
            && instruction.imm == from
        {
            instruction.imm = to;
        }
    }
}

/// A program that does nothing, to see whether its kind can be loaded here and when it runs.
pub(super) fn nothing(name: &'static str, kind: Kind<'_>) -> Result<Program, ProgramError> {
    const MOVE_64: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K: register 0 becomes imm, 0
    const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT
    let code = [MOVE_64, EXIT].map(|code| bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(0, 0),
        off: 0,
        imm: 0,
    });
    program_load(name, kind, &code, c"GPL")
}

fn damaged(error: &dyn std::fmt::Display) -> ProgramError {
    ProgramError::Object(error.to_string())
}

/// Makes a map of constants, fills it and freezes it: the verifier then knows the values.
fn frozen(name: &str, map: &aya_obj::Map) -> Result<MapData, ProgramError> {
    let mut data = map.data().to_vec();
    let map = MapData::create(map.clone(), name, None)
        .map_err(|e| ProgramError::Object(e.to_string()))?;
    let fd = map.fd().as_fd().as_raw_fd().unsigned_abs();
    let key = 0_u32;
    let mut attr = zeroed();
    attr.__bindgen_anon_2.map_fd = fd;
    attr.__bindgen_anon_2.key = (&raw const key) as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = data.as_mut_ptr() as u64;
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map_err(ProgramError::Constants)?;
    let mut attr = zeroed();
    attr.__bindgen_anon_2.map_fd = fd;
    bpf(bpf_cmd::BPF_MAP_FREEZE, &mut attr).map_err(ProgramError::Constants)?;
    Ok(map)
}

fn program_load(
    name: &'static str,
    kind: Kind<'_>,
    code: &[bpf_insn],
    license: &CStr,
) -> Result<Program, ProgramError> {
    let vmlinux = |id| Callee { id, module: None };
    let (attach_type, callee, word) = match kind {
        Kind::Netfilter => (bpf_attach_type::BPF_NETFILTER, vmlinux(0), "netfilter"),
        Kind::Tracepoint(id) => (bpf_attach_type::BPF_TRACE_RAW_TP, vmlinux(id), "tracepoint"),
        Kind::Entry(callee) => (bpf_attach_type::BPF_TRACE_FENTRY, callee, ENTRY),
        Kind::Exit(callee) => (bpf_attach_type::BPF_TRACE_FEXIT, callee, EXIT),
    };
    let program_type = match kind {
        Kind::Netfilter => bpf_prog_type::BPF_PROG_TYPE_NETFILTER,
        _ => bpf_prog_type::BPF_PROG_TYPE_TRACING,
    };
    let mut attr = zeroed();
    // SAFETY: writing to a union's field; all fields are plain integers and arrays.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    load.prog_type = program_type as u32;
    load.expected_attach_type = attach_type as u32;
    load.attach_btf_id = callee.id;
    if let Some(module) = callee.module {
        load.__bindgen_anon_1.attach_btf_obj_fd = module.as_raw_fd().unsigned_abs();
    }
    load.insns = code.as_ptr() as u64;
    load.insn_cnt = u32::try_from(code.len())
        .map_err(|_| ProgramError::Object("program too long".to_owned()))?;
    load.license = license.as_ptr() as u64;
    for (to, from) in load.prog_name.iter_mut().zip(name.bytes().take(15)) {
        *to = from.cast_signed();
    }
    match bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr) {
        Ok(fd) => Ok(Program {
            name,
            fd: fd_of(fd),
        }),
        Err(source) => {
            // Again, for the verifier's reasons.
            let mut log = vec![0_u8; 1 << 20];
            // SAFETY: as above.
            let load = unsafe { &mut attr.__bindgen_anon_3 };
            load.log_level = 1;
            load.log_buf = log.as_mut_ptr() as u64;
            load.log_size = 1 << 20;
            if let Ok(fd) = bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr) {
                // It went in after all: the first refusal was a passing one.
                return Ok(Program {
                    name,
                    fd: fd_of(fd),
                });
            }
            let end = log.iter().position(|b| *b == 0).unwrap_or(log.len());
            Err(ProgramError::Load {
                kind: word,
                name: name.to_owned(),
                source,
                log: String::from_utf8_lossy(&log[..end]).trim().to_owned(),
            })
        }
    }
}

/// Attaches a program to the tracepoint or function it was loaded for.
pub(super) fn attach_tracing(program: &Program) -> Result<OwnedFd, ProgramError> {
    let mut attr = zeroed();
    // A null name means what the program was loaded for.
    attr.raw_tracepoint.prog_fd = program.fd.as_raw_fd().unsigned_abs();
    match bpf(bpf_cmd::BPF_RAW_TRACEPOINT_OPEN, &mut attr) {
        Ok(fd) => Ok(fd_of(fd)),
        Err(source) => Err(ProgramError::Tracing {
            name: program.name.to_owned(),
            source,
        }),
    }
}

/// Attaches a netfilter program to the network namespace that the calling thread is in.
pub(super) fn attach_netfilter(program: &Program, place: Place) -> Result<OwnedFd, ProgramError> {
    let mut attr = zeroed();
    // SAFETY: writing to a union's field; all fields are plain integers.
    unsafe {
        let link = &mut attr.link_create;
        link.__bindgen_anon_1.prog_fd = program.fd.as_raw_fd().unsigned_abs();
        link.attach_type = bpf_attach_type::BPF_NETFILTER as u32;
        link.__bindgen_anon_3.netfilter.pf = u32::from(place.family);
        link.__bindgen_anon_3.netfilter.hooknum = place.hook;
        link.__bindgen_anon_3.netfilter.priority = place.priority;
    }
    match bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr) {
        Ok(fd) => Ok(fd_of(fd)),
        Err(source) => Err(ProgramError::Attach {
            hook: place.hook,
            priority: place.priority,
            source,
        }),
    }
}

/// The type information of a loaded module, as the kernel keeps it: programs for the module's
/// functions are loaded with it.
pub(super) fn module_btf(name: &str) -> Result<OwnedFd, ProgramError> {
    let fail = |source| ProgramError::Module {
        name: name.to_owned(),
        source,
    };
    let mut id = 0;
    loop {
        // Beyond the last id: ENOENT.
        id = next_btf(id).map_err(fail)?;
        match open_btf(id) {
            Ok(fd) if is_named(&fd, name).map_err(fail)? => return Ok(fd),
            Ok(_) => {}
            // It went since it was listed.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(fail(error)),
        }
    }
}

fn next_btf(id: u32) -> io::Result<u32> {
    let mut attr = zeroed();
    attr.__bindgen_anon_6.__bindgen_anon_1.start_id = id;
    bpf(bpf_cmd::BPF_BTF_GET_NEXT_ID, &mut attr)?;
    // SAFETY: the kernel has filled in this field, a plain integer.
    Ok(unsafe { attr.__bindgen_anon_6.next_id })
}

fn open_btf(id: u32) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.__bindgen_anon_6.__bindgen_anon_1.btf_id = id;
    bpf(bpf_cmd::BPF_BTF_GET_FD_BY_ID, &mut attr).map(fd_of)
}

/// Is it the kernel's, and of this name?
fn is_named(btf: &OwnedFd, name: &str) -> io::Result<bool> {
    // MODULE_NAME_LEN of include/linux/module.h is 56.
    let mut found = [0_u8; 64];
    let mut info = bpf_btf_info {
        btf: 0,
        btf_size: 0,
        id: 0,
        name: found.as_mut_ptr() as u64,
        name_len: 64,
        kernel_btf: 0,
    };
    let mut attr = zeroed();
    attr.info.bpf_fd = btf.as_raw_fd().unsigned_abs();
    attr.info.info_len = u32::try_from(size_of::<bpf_btf_info>()).unwrap_or(0);
    attr.info.info = std::ptr::from_mut(&mut info) as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    let found = CStr::from_bytes_until_nul(&found).unwrap_or_default();
    Ok(info.kernel_btf != 0 && found.to_bytes() == name.as_bytes())
}

impl ProgramError {
    /// Is another hook at exactly this priority?
    pub(super) fn is_occupied(&self) -> bool {
        matches!(self, Self::Attach { source, .. } if source.raw_os_error() == Some(libc::EBUSY))
    }
}

fn zeroed() -> bpf_attr {
    // SAFETY: every field of the union is an integer or an array of integers.
    unsafe { std::mem::zeroed() }
}

fn fd_of(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<RawFd> {
    // SAFETY: attr is a whole, initialised union; see the room's invariant for what it points to.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_long,
            std::ptr::from_mut(attr),
            size_of::<bpf_attr>(),
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(answer).map_err(io::Error::other)
}
