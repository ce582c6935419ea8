//! Netfilter programs and links (`BPF_PROG_TYPE_NETFILTER`, kernel 6.4 and later), which aya does
//! not know yet.
//!
//! The program stands in a section that aya accepts; aya makes the maps, and this room relocates the
//! program against them once and loads it for each set of constants: patch the constants, a
//! `.rodata` map of its own, `BPF_PROG_LOAD`, `BPF_LINK_CREATE`. A link ends with its file
//! descriptor, so nothing outlives this process.
//!
//! # Safety
//!
//! `unsafe` here is the `bpf(2)` system call alone. Each call gets a zeroed `union bpf_attr` of
//! which only the fields of that command are set, and every pointer in it (instructions, licence,
//! log, key, value) is to memory that lives until the call returns.

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use aya::maps::MapData;
use aya_obj::generated::{
    BPF_PSEUDO_MAP_VALUE, bpf_attach_type, bpf_attr, bpf_cmd, bpf_insn, bpf_prog_type,
};
use aya_obj::{EbpfSectionKind, Object};

/// Why a netfilter program could not be loaded or attached.
#[derive(Debug, thiserror::Error)]
pub enum NetfilterError {
    /// The object is not what was expected.
    #[error("the eBPF object is damaged: {0}")]
    Object(String),
    /// The kernel refused the program.
    #[error("the kernel refused the netfilter program: {source}{}", verifier_note(.log))]
    Load {
        /// What `BPF_PROG_LOAD` answered.
        source: io::Error,
        /// The verifier's last words.
        log: String,
    },
    /// A map operation failed.
    #[error("the kernel refused a map of constants: {0}")]
    Constants(#[source] io::Error),
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
}

fn verifier_note(log: &str) -> String {
    if log.is_empty() {
        return String::new();
    }
    let tail: Vec<&str> = log.lines().rev().take(3).collect();
    let tail: Vec<&str> = tail.into_iter().rev().collect();
    format!("; the verifier says: {}", tail.join(" | "))
}

/// A loaded netfilter program.
#[derive(Debug)]
pub(super) struct Program(OwnedFd);

/// An attached netfilter program; dropping it detaches.
#[derive(Debug)]
pub(super) struct Link {
    _fd: OwnedFd,
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

/// One function of the object, relocated; [`Template::load`] makes programs of it that differ in
/// their constants.
#[derive(Debug)]
pub(super) struct Template {
    object: Object,
    function: &'static str,
    code: Vec<bpf_insn>,
    license: CString,
    /// The maps of constants, and the descriptors that stand for them in `code`.
    constants: Vec<(String, MapData)>,
}

impl Template {
    /// Parses the object and relocates the function against aya's maps, given by name.
    pub(super) fn new(
        object: &[u8],
        function: &'static str,
        maps: &HashMap<String, RawFd>,
    ) -> Result<Self, NetfilterError> {
        let mut object = Object::parse(object).map_err(|e| damaged(&e))?;
        let text_sections = object
            .functions
            .keys()
            .map(|(section, _)| *section)
            .collect();
        let mut constants = Vec::new();
        let mut fds = Vec::new();
        for (name, map) in &object.maps {
            let fd = if map.section_kind() == EbpfSectionKind::Rodata {
                let stand_in = frozen(name, map)?;
                let fd = stand_in.fd().as_fd().as_raw_fd();
                constants.push((name.clone(), stand_in));
                fd
            } else {
                *maps
                    .get(name)
                    .ok_or_else(|| NetfilterError::Object(format!("map {name} was not made")))?
            };
            fds.push((name.clone(), fd, map.clone()));
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
        let code = object
            .programs
            .get(function)
            .and_then(|program| object.functions.get(&program.function_key()))
            .ok_or_else(|| NetfilterError::Object(format!("no function {function}")))?
            .instructions
            .clone();
        Ok(Self {
            license: object.license.clone(),
            object,
            function,
            code,
            constants,
        })
    }

    /// Loads the function with these constants.
    pub(super) fn load(
        &mut self,
        constants: &HashMap<&str, Vec<u8>>,
    ) -> Result<Program, NetfilterError> {
        self.object
            .patch_map_data(
                constants
                    .iter()
                    .map(|(name, bytes)| (*name, (bytes.as_slice(), true)))
                    .collect(),
            )
            .map_err(|e| damaged(&e))?;
        let mut code = self.code.clone();
        // The programs hold their maps: these descriptors may end with this function.
        let mut made = Vec::new();
        for (name, stand_in) in &self.constants {
            let map = self
                .object
                .maps
                .get(name)
                .ok_or_else(|| NetfilterError::Object(format!("no map {name}")))?;
            let map = frozen(name, map)?;
            replace_fd(
                &mut code,
                stand_in.fd().as_fd().as_raw_fd(),
                map.fd().as_fd().as_raw_fd(),
            );
            made.push(map);
        }
        program_load(self.function, &code, &self.license)
    }
}

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

fn damaged(error: &dyn std::fmt::Display) -> NetfilterError {
    NetfilterError::Object(error.to_string())
}

/// Makes a map of constants, fills it and freezes it: the verifier then knows the values.
fn frozen(name: &str, map: &aya_obj::Map) -> Result<MapData, NetfilterError> {
    let mut data = map.data().to_vec();
    let map = MapData::create(map.clone(), name, None)
        .map_err(|e| NetfilterError::Object(e.to_string()))?;
    let fd = map.fd().as_fd().as_raw_fd().unsigned_abs();
    let key = 0_u32;
    let mut attr = zeroed();
    attr.__bindgen_anon_2.map_fd = fd;
    attr.__bindgen_anon_2.key = (&raw const key) as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = data.as_mut_ptr() as u64;
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map_err(NetfilterError::Constants)?;
    let mut attr = zeroed();
    attr.__bindgen_anon_2.map_fd = fd;
    bpf(bpf_cmd::BPF_MAP_FREEZE, &mut attr).map_err(NetfilterError::Constants)?;
    Ok(map)
}

fn program_load(
    name: &str,
    code: &[bpf_insn],
    license: &CString,
) -> Result<Program, NetfilterError> {
    let mut attr = zeroed();
    // SAFETY: writing to a union's field; all fields are plain integers and arrays.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    load.prog_type = bpf_prog_type::BPF_PROG_TYPE_NETFILTER as u32;
    load.expected_attach_type = bpf_attach_type::BPF_NETFILTER as u32;
    load.insns = code.as_ptr() as u64;
    load.insn_cnt = u32::try_from(code.len())
        .map_err(|_| NetfilterError::Object("program too long".to_owned()))?;
    load.license = license.as_ptr() as u64;
    for (to, from) in load.prog_name.iter_mut().zip(name.bytes().take(15)) {
        *to = from.cast_signed();
    }
    match bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr) {
        Ok(fd) => Ok(Program(fd_of(fd))),
        Err(source) => {
            // Again, for the verifier's reasons.
            let mut log = vec![0_u8; 1 << 20];
            // SAFETY: as above.
            let load = unsafe { &mut attr.__bindgen_anon_3 };
            load.log_level = 1;
            load.log_buf = log.as_mut_ptr() as u64;
            load.log_size = 1 << 20;
            let _ = bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr);
            let end = log.iter().position(|b| *b == 0).unwrap_or(log.len());
            Err(NetfilterError::Load {
                source,
                log: String::from_utf8_lossy(&log[..end]).trim().to_owned(),
            })
        }
    }
}

/// Attaches to the network namespace that the calling thread is in.
pub(super) fn attach(program: &Program, place: Place) -> Result<Link, NetfilterError> {
    let mut attr = zeroed();
    // SAFETY: writing to a union's field; all fields are plain integers.
    unsafe {
        let link = &mut attr.link_create;
        link.__bindgen_anon_1.prog_fd = program.0.as_raw_fd().unsigned_abs();
        link.attach_type = bpf_attach_type::BPF_NETFILTER as u32;
        link.__bindgen_anon_3.netfilter.pf = u32::from(place.family);
        link.__bindgen_anon_3.netfilter.hooknum = place.hook;
        link.__bindgen_anon_3.netfilter.priority = place.priority;
    }
    match bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr) {
        Ok(fd) => Ok(Link { _fd: fd_of(fd) }),
        Err(source) => Err(NetfilterError::Attach {
            hook: place.hook,
            priority: place.priority,
            source,
        }),
    }
}

impl NetfilterError {
    /// Is another hook at exactly this priority?
    pub(super) fn is_occupied(&self) -> bool {
        matches!(self, Self::Attach { source, .. } if source.raw_os_error() == Some(libc::EBUSY))
    }
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
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
