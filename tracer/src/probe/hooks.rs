//! The `hooks` tier: netfilter boundaries around every component.
//!
//! # Minimum kernel version
//!
//! 6.4 (`BPF_PROG_TYPE_NETFILTER`), with BTF.

use tracer_ebpf::record::{hook, role};

use super::catalogue::{self, ALL};
use super::program::{self, Constants, Kind, Link, Place, Program, Programs};
use super::tier::{Attached, Placed, ProbeError, Watch};
use crate::kernel::clock::monotonic_ns;
use crate::kernel::netns::Netns;

/// Attaches every boundary to the node's namespace. All programs are loaded first, which takes the most time by far,
/// and those at which packets begin are attached last: what they see finds every other boundary.
pub(super) fn attach(
    programs: &mut Programs,
    node: &Netns,
    watch: &Watch,
    constants: &Constants,
) -> Result<Attached, ProbeError> {
    let mut loaded = Vec::new();
    for family in watch.families() {
        let mut previous = u8::MAX;
        for id in catalogue::boundaries(watch.detail) {
            let id = u8::try_from(id).unwrap_or(u8::MAX);
            loaded.push(load(programs, (previous, id), family, constants)?);
            previous = id;
        }
    }
    let (first, others): (Vec<_>, Vec<_>) =
        loaded.into_iter().partition(|boundary| begins(boundary.id));
    let mut attached = Attached::default();
    let _inside = node.enter()?;
    for boundary in others {
        let (link, placed) = boundary.attach()?;
        attached.links.push(link);
        attached.placed.push(placed);
    }
    attached.whole_ns = monotonic_ns();
    for boundary in first {
        let (link, placed) = boundary.attach()?;
        attached.beginnings.push(link);
        attached.placed.push(placed);
    }
    // In the order of a packet, as the catalogue has them.
    attached
        .placed
        .sort_by_key(|placed| (placed.family, placed.boundary));
    Ok(attached)
}

/// Does a packet's journey begin at this boundary?
fn begins(id: u8) -> bool {
    let hook = ALL[usize::from(id)].hook;
    let entry = catalogue::role_of(id.into()) & role::ENTRY != 0;
    entry && (hook == hook::PREROUTING || hook == hook::OUTPUT)
}

/// How many priorities from its wish on a boundary tries: so many sessions can trace one namespace, or fewer where
/// the next component is nearer.
const TRIES: i32 = 8;

/// A boundary's program, not attached yet.
struct Loaded {
    program: Program,
    id: u8,
    family: u8,
}

/// Loads one boundary; `previous` is the one that a packet passes before it.
fn load(
    programs: &mut Programs,
    (previous, id): (u8, u8),
    family: u8,
    constants: &Constants,
) -> Result<Loaded, ProbeError> {
    let boundary = &ALL[usize::from(id)];
    let mut constants = constants.clone();
    let mut set = |name, value: u32| constants.insert(name, value.to_ne_bytes().to_vec());
    set("BOUNDARY", id.into());
    set("PREVIOUS", previous.into());
    let role = catalogue::role_of(id.into());
    set("ROLE", role);
    set("HOOK", boundary.hook);
    set("FAMILY", family.into());
    let name = if role & role::ENTRY == 0 {
        "boundary"
    } else {
        "entry"
    };
    let program = programs.load(name, Kind::Netfilter, &constants)?;
    Ok(Loaded {
        program,
        id,
        family,
    })
}

impl Loaded {
    /// Attaches it, moving up from its wish while the place is taken.
    fn attach(self) -> Result<(Link, Placed), ProbeError> {
        let Self {
            program,
            id,
            family,
        } = self;
        let boundary = &ALL[usize::from(id)];
        let end = boundary.limit.min(boundary.priority.saturating_add(TRIES));
        for priority in boundary.priority..end {
            let place = Place {
                family,
                hook: boundary.hook,
                priority,
            };
            match program::attach_netfilter(&program, place) {
                Ok(fd) => {
                    let placed = Placed {
                        boundary: id,
                        family,
                        priority,
                    };
                    return Ok((Link::new(program, fd), placed));
                }
                Err(error) if error.is_occupied() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(ProbeError::Crowded {
            hook: catalogue::hook_name(boundary.hook),
            stage: boundary.stage,
        })
    }
}
