//! Can programs be attached to tracepoints and functions here, and do they run? Some kernels refuse them though they
//! have tracepoints: the answer is to try.

use super::program::{self, Callee, Counting, Kind, Link};
use super::tier::ProbeError;
use crate::kernel::btf::Btf;

/// How often empty programs at a function ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    /// Before it (`fentry`).
    pub entries: u64,
    /// After it (`fexit`).
    pub exits: u64,
}

/// Attaches an empty program to a tracepoint, for a moment.
///
/// # Errors
///
/// There is no such tracepoint, or the kernel does not allow such programs (`EPERM`).
pub fn tracepoint(name: &str) -> Result<(), ProbeError> {
    let id = Btf::vmlinux()?.typedef_id(&format!("btf_trace_{name}"))?;
    let program = program::nothing("trial", Kind::Tracepoint(id))?;
    program::attach_tracing(&program)?;
    Ok(())
}

/// Attaches empty programs to a function of vmlinux or of a loaded module, does `during`, and tells
/// how often they ran meanwhile: whoever else calls the function is counted too.
///
/// # Errors
///
/// There is no such function or module, or the kernel does not allow such programs (`EPERM`).
pub fn function(
    module: Option<&str>,
    function: &str,
    during: impl FnOnce(),
) -> Result<Runs, ProbeError> {
    let (found, object) = match module {
        None => (Btf::vmlinux()?.function(function)?, None),
        Some(name) => (
            Btf::module(name)?.function(function)?,
            Some(program::module_btf(name)?),
        ),
    };
    let callee = Callee {
        id: found.id,
        module: object.as_ref().map(std::os::fd::AsFd::as_fd),
    };
    let attach = |name, kind| {
        let program = program::nothing(name, kind)?;
        let fd = program::attach_tracing(&program)?;
        Ok::<_, ProbeError>(Link::new(program, fd))
    };
    let _counting = Counting::start()?;
    let entry = attach("entry_trial", Kind::Entry(callee))?;
    let exit = attach("exit_trial", Kind::Exit(callee))?;
    during();
    Ok(Runs {
        entries: entry.run_time()?.runs,
        exits: exit.run_time()?.runs,
    })
}
