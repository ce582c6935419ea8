//! The `hooks` tier: netfilter boundaries around every component.
//!
//! # Minimum kernel version
//!
//! 6.4 (`BPF_PROG_TYPE_NETFILTER`), with BTF.

use tracer_ebpf::record::role;

use super::catalogue::{self, ALL};
use super::program::{self, Constants, Kind, Link, Place, Programs};
use super::tier::{Attached, Placed, ProbeError, Watch};
use crate::kernel::netns::Netns;

/// Attaches every boundary to the node's namespace.
pub(super) fn attach(
    programs: &mut Programs,
    node: &Netns,
    watch: &Watch,
    constants: &Constants,
) -> Result<Attached, ProbeError> {
    let mut attached = Attached::default();
    let _inside = node.enter()?;
    for family in watch.families() {
        let mut previous = u8::MAX;
        for id in catalogue::boundaries(watch.detail) {
            let id = u8::try_from(id).unwrap_or(u8::MAX);
            let (link, priority) = boundary(programs, (previous, id), family, constants)?;
            attached.links.push(link);
            attached.placed.push(Placed {
                boundary: id,
                family,
                priority,
            });
            previous = id;
        }
    }
    Ok(attached)
}

/// How many priorities from its wish on a boundary tries: so many sessions can trace one namespace, or fewer where
/// the next component is nearer.
const TRIES: i32 = 8;

/// Loads and attaches one boundary, moving up from its wish while the place is taken.
///
/// `previous` is the boundary that a packet passes before this one.
fn boundary(
    programs: &mut Programs,
    (previous, id): (u8, u8),
    family: u8,
    constants: &Constants,
) -> Result<(Link, i32), ProbeError> {
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
    let end = boundary.limit.min(boundary.priority.saturating_add(TRIES));
    for priority in boundary.priority..end {
        let place = Place {
            family,
            hook: boundary.hook,
            priority,
        };
        match program::attach_netfilter(&program, place) {
            Ok(fd) => return Ok((Link::new(program, fd), priority)),
            Err(error) if error.is_occupied() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(ProbeError::Crowded {
        hook: catalogue::hook_name(boundary.hook),
        stage: boundary.stage,
    })
}
