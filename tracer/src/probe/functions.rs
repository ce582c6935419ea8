//! The `functions` tier: programs at the functions of hooks and their components.
//!
//! # Minimum kernel version
//!
//! 5.17 (the reason of `kfree_skb`, and modules' functions), with BTF. A kernel that is locked down refuses
//! such programs.
//!
//! # What it does not see
//!
//! A hook at which nothing is registered: the kernel does not call its components' function. So without any
//! rule and without connection tracking nothing at all. Of packets that come in parts, what happens before they
//! are whole and at PREROUTING: they are met when that returns; where nothing puts them together, not at all.

use std::os::fd::{AsFd as _, OwnedFd};

use tracer_ebpf::record::NO_STAGE;

use super::catalogue::{
    self, COMPONENTS, Component, Detail, HOOK, HOOK_PARAMETERS, Shape, TELLERS, Teller, Tells,
};
use super::offsets;
use super::program::{self, Callee, Constants, Kind, Link, Programs};
use super::tier::{Attached, ProbeError, Probed, Watch};
use crate::kernel::btf::{Btf, BtfError, Function};
use crate::kernel::clock::monotonic_ns;

/// Attaches to every function that is there. Without that of the hooks nothing can be followed; of components,
/// those that are not there are told.
pub(super) fn attach(
    programs: &mut Programs,
    watch: &Watch,
    constants: &Constants,
) -> Result<Attached, ProbeError> {
    let mut constants = constants.clone();
    constants.extend(of_stages(watch));
    constants.extend(program::numbers(offsets::of_hooks(Btf::vmlinux()?)?));
    constants.insert("WHOLE", 1_u32.to_ne_bytes().to_vec());
    let mut attached = Attached::default();
    // Before the components: a call is noted only where its return is.
    if watch.detail >= Detail::Functions {
        for teller in &TELLERS {
            let found = attach_teller(programs, teller, &constants, &mut attached);
            attached.miss(found, teller.name, teller.without);
        }
    }
    if watch.detail >= Detail::Stages {
        for component in &COMPONENTS {
            let found = attach_component(programs, component, &constants, &mut attached);
            attached.miss(found, component.name, component.without);
        }
    }
    // Last: a packet that is met by a component first would be unknown.
    attach_hook(programs, &constants, &mut attached)?;
    Ok(attached)
}

/// The whole hook: its call and its return.
fn attach_hook(
    programs: &mut Programs,
    constants: &Constants,
    attached: &mut Attached,
) -> Result<(), ProbeError> {
    let function = Btf::vmlinux()?.function(HOOK)?;
    // What a function returns is found behind its parameters.
    if function.parameters != HOOK_PARAMETERS {
        return Err(ProbeError::Parameters(HOOK));
    }
    let callee = Callee {
        id: function.id,
        module: None,
    };
    // A packet's journey begins at either.
    let begins = programs.load("hook_begins", Kind::Entry(callee), constants)?;
    let ends = programs.load("hook_ends", Kind::Exit(callee), constants)?;
    attached.whole_ns = monotonic_ns();
    for program in [begins, ends] {
        let fd = program::attach_tracing(&program)?;
        attached.beginnings.push(Link::new(program, fd));
    }
    attached.probed.push(Probed {
        module: None,
        function: HOOK,
    });
    Ok(())
}

/// Those of a component's functions that are there.
///
/// # Errors
///
/// None is there, or the kernel refused one.
fn attach_component(
    programs: &mut Programs,
    component: &'static Component,
    constants: &Constants,
    attached: &mut Attached,
) -> Result<(), ProbeError> {
    let mut constants = constants.clone();
    constants.insert("STAGES", of_component(component).to_ne_bytes().to_vec());
    let program = program_of(component.shape);
    let known = |found: &[String]| {
        let parameters = component.shape.parameters();
        found.len() >= parameters.len() && found[..parameters.len()] == *parameters
    };
    for_each(component.functions, known, |object, callee, probed| {
        constants.extend(program::numbers(offsets::of_shape(
            object.btf(),
            component.shape,
        )?));
        let returns = u32::from(attached.probed.contains(&probed));
        constants.insert("NOTED", returns.to_ne_bytes().to_vec());
        let link = link(programs, program, Kind::Entry(callee), &constants)?;
        attached.links.push(link);
        if !attached.probed.contains(&probed) {
            attached.probed.push(probed);
        }
        Ok(())
    })
}

/// The same of functions that tell more.
fn attach_teller(
    programs: &mut Programs,
    teller: &'static Teller,
    constants: &Constants,
    attached: &mut Attached,
) -> Result<(), ProbeError> {
    let mut constants = constants.clone();
    if let Tells::Sending(method) = teller.tells {
        constants.insert("METHOD", method.to_ne_bytes().to_vec());
    }
    // What a function returns is found behind its parameters.
    let known = |found: &[String]| *found == *teller.parameters;
    for_each(teller.functions, known, |object, callee, probed| {
        let (program, kind) = match teller.tells {
            Tells::Table => ("table_ends", Kind::Exit(callee)),
            Tells::Chain => {
                constants.extend(program::numbers(offsets::of_shape(
                    object.btf(),
                    Shape::Chain,
                )?));
                ("chain_ends", Kind::Exit(callee))
            }
            Tells::Nat => ("nat_ends", Kind::Exit(callee)),
            Tells::Confirmation => ("confirmation_ends", Kind::Exit(callee)),
            Tells::Scheduling => ("scheduling_ends", Kind::Exit(callee)),
            Tells::Sending(_) => ("sending_begins", Kind::Entry(callee)),
            Tells::Expiry => ("expiry_begins", Kind::Entry(callee)),
        };
        let link = link(programs, program, kind, &constants)?;
        attached.links.push(link);
        attached.probed.push(probed);
        Ok(())
    })
}

/// Attaches to each of these functions that is there and has known parameters.
///
/// # Errors
///
/// None is there: why the first is not, which is the one that a kernel of today has.
fn for_each(
    functions: &'static [(&'static str, &'static str)],
    known: impl Fn(&[String]) -> bool,
    mut attach: impl FnMut(&Object, Callee<'_>, Probed) -> Result<(), ProbeError>,
) -> Result<(), ProbeError> {
    let mut why = None;
    let mut found = false;
    for (module, name) in functions.iter().copied() {
        let (object, function) = match find(module, name) {
            Ok((_, function)) if !known(&function.parameters) => {
                why.get_or_insert(ProbeError::Parameters(name));
                continue;
            }
            Ok(found) => found,
            Err(error) => {
                why.get_or_insert(error);
                continue;
            }
        };
        let callee = Callee {
            id: function.id,
            module: object.fd(),
        };
        let probed = Probed {
            module: object.fd().map(|_| module),
            function: name,
        };
        attach(&object, callee, probed)?;
        found = true;
    }
    match why {
        Some(error) if !found => Err(error),
        _ => Ok(()),
    }
}

/// The program that knows functions of this shape.
const fn program_of(shape: Shape) -> &'static str {
    match shape {
        Shape::Tracking => "tracking_begins",
        Shape::Hook => "component_begins",
        Shape::Table => "table_begins",
        Shape::Chain => "chain_begins",
    }
}

fn link(
    programs: &mut Programs,
    name: &'static str,
    kind: Kind<'_>,
    constants: &Constants,
) -> Result<Link, ProbeError> {
    let program = programs.load(name, kind, constants)?;
    let fd = program::attach_tracing(&program)?;
    Ok(Link::new(program, fd))
}

/// Where a function lies.
enum Object {
    Kernel(&'static Btf),
    Module(Box<Btf>, OwnedFd),
}

impl Object {
    fn btf(&self) -> &Btf {
        match self {
            Self::Kernel(btf) => btf,
            Self::Module(btf, _) => btf,
        }
    }

    fn fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        match self {
            Self::Kernel(_) => None,
            Self::Module(_, fd) => Some(fd.as_fd()),
        }
    }
}

/// Finds a function in its module, or in a kernel that has the module built in.
fn find(module: &str, name: &'static str) -> Result<(Object, Function), ProbeError> {
    let object = match Btf::module(module) {
        Ok(btf) => Object::Module(Box::new(btf), program::module_btf(module)?),
        Err(BtfError::Missing { .. }) => Object::Kernel(Btf::vmlinux()?),
        Err(error) => return Err(error.into()),
    };
    let function = match (object.btf().function(name), &object) {
        (Err(BtfError::NoFunction(_)), Object::Kernel(_)) => {
            return Err(ProbeError::NotLoaded {
                module: module.to_owned(),
                function: name,
            });
        }
        (found, _) => found?,
    };
    Ok((object, function))
}

/// What the programs have to know of stages.
fn of_stages(watch: &Watch) -> [(&'static str, Vec<u8>); 3] {
    let first = bytes(catalogue::first_stages());
    let last = bytes(catalogue::last_stages(watch.detail).map(|stage| stage.unwrap_or(NO_STAGE)));
    // IPv4 and IPv6: of a family without a Service one may come.
    let families = 3_u32;
    [
        ("FIRST_STAGES", first.to_ne_bytes().to_vec()),
        ("LAST_STAGES", last.to_ne_bytes().to_vec()),
        ("FAMILIES", families.to_ne_bytes().to_vec()),
    ]
}

/// A component's stage at each hook.
fn of_component(component: &Component) -> u64 {
    let mut stages = [NO_STAGE; 8];
    for (hook, stage) in component.stages() {
        stages[hook as usize] = u8::try_from(stage).unwrap_or(NO_STAGE);
    }
    u64::from_le_bytes(stages)
}

/// Packs one byte a hook, the first lowest.
fn bytes(values: impl Iterator<Item = u8>) -> u64 {
    let mut packed = [NO_STAGE; 8];
    for (to, from) in packed.iter_mut().zip(values) {
        *to = from;
    }
    u64::from_le_bytes(packed)
}
