//! Exit codes, and how an error becomes one line.

use std::io::{ErrorKind, Write as _};

use nix::sys::signal::Signal;
use tracer::kernel::apply::ApplyError;
use tracer::probe::tier::ProbeError;
use tracer::report::WriteError;
use tracer::report::read::ReadError;
use tracer::scenario::assemble::AssembleError;
use tracer::scenario::cost::CostError;
use tracer::scenario::job::PartError;
use tracer::scenario::matrix::MatrixError;
use tracer::scenario::node::NodeError;
use tracer::trace::reading::ReadingError;
use tracer::trace::session::TraceError;

/// Something failed.
pub(crate) const FAILURE: u8 = 1;
/// The command line asks for something that cannot be.
pub(crate) const USAGE: u8 = 2;
/// Not root, or a capability is missing.
pub(crate) const NOT_PERMITTED: u8 = 3;
/// The kernel lacks what is needed.
pub(crate) const KERNEL_LACKS: u8 = 4;
/// A run that cannot be trusted or read.
pub(crate) const INVALID_RUN: u8 = 5;
/// Not an exit code: standard output was closed by its reader.
pub(crate) const BROKEN_PIPE: u8 = u8::MAX;

/// The exit code for an error, from the first cause that has one.
pub(crate) fn code_of(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if let Some(code) = code_of_cause(cause) {
            return code;
        }
    }
    FAILURE
}

fn code_of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(error) = cause.downcast_ref::<Stdout>() {
        return Some(if error.is_broken_pipe() {
            BROKEN_PIPE
        } else {
            FAILURE
        });
    }
    if let Some(Interrupted(signal)) = cause.downcast_ref() {
        // As shells report a program that a signal ended; signal numbers are below 128.
        return Some(128 + *signal as u8);
    }
    if cause.is::<NotPermitted>() {
        return Some(NOT_PERMITTED);
    }
    if let Some(error) = cause.downcast_ref::<WriteError>() {
        return Some(error.exit_code());
    }
    if let Some(error) = cause.downcast_ref::<ReadError>() {
        return Some(error.exit_code());
    }
    if cause.is::<MatrixError>() || cause.is::<Usage>() {
        return Some(USAGE);
    }
    if let Some(AssembleError::Clocks(_) | AssembleError::Part(PartError::Damaged { .. })) =
        cause.downcast_ref()
    {
        return Some(INVALID_RUN);
    }
    // JSON is only ever read here as (part of) a run; writing it does not fail.
    if cause.is::<serde_json::Error>() {
        return Some(INVALID_RUN);
    }
    // Errors that are passed on as they are (`transparent`) do not appear among the causes
    // themselves, so they are looked for in what carries them.
    if let Some(code) = cause.downcast_ref().and_then(code_of_node) {
        return Some(code);
    }
    if let Some(code) = cause.downcast_ref().and_then(code_of_cost) {
        return Some(code);
    }
    if let Some(code) = cause.downcast_ref().and_then(code_of_trace) {
        return Some(code);
    }
    // Last, because many errors above have one of these as their cause.
    let io = cause.downcast_ref::<std::io::Error>()?;
    (io.kind() == ErrorKind::PermissionDenied).then_some(NOT_PERMITTED)
}

fn code_of_node(error: &NodeError) -> Option<u8> {
    match error {
        NodeError::LostRecords(_) => Some(INVALID_RUN),
        NodeError::Apply(error) if matches!(error.cause(), ApplyError::NoSysctl { .. }) => {
            Some(KERNEL_LACKS)
        }
        NodeError::Lacks { .. }
        | NodeError::Btf(_)
        | NodeError::Probe(ProbeError::Btf(_) | ProbeError::Program(_)) => Some(KERNEL_LACKS),
        _ => None,
    }
}

fn code_of_cost(error: &CostError) -> Option<u8> {
    match error {
        CostError::Node(error) => code_of_node(error),
        CostError::Trace(error) => code_of_trace(error),
        CostError::NotAttached(_)
        | CostError::Probe(ProbeError::Btf(_) | ProbeError::Program(_)) => Some(KERNEL_LACKS),
        _ => None,
    }
}

fn code_of_trace(error: &TraceError) -> Option<u8> {
    match error {
        TraceError::NoSuchService { .. } => Some(USAGE),
        TraceError::Rules(ReadingError::Dump(error)) if error.is_not_permitted() => {
            Some(NOT_PERMITTED)
        }
        TraceError::Btf(_) | TraceError::Probe(ProbeError::Btf(_) | ProbeError::Program(_)) => {
            Some(KERNEL_LACKS)
        }
        _ => None,
    }
}

/// The error and its causes, on one line, none said twice.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string().replace('\n', "; ");
        if line.contains(&text) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&text);
    }
    line
}

/// Standard output took no more.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to standard output: {0}")]
pub(crate) struct Stdout(#[source] std::io::Error);

impl Stdout {
    /// Has its reader gone away?
    pub(crate) fn is_broken_pipe(&self) -> bool {
        self.0.kind() == ErrorKind::BrokenPipe
    }
}

/// Writes to standard output; unlike `print!` without a panic when its reader has gone away.
pub(crate) fn print(text: &str) -> Result<(), Stdout> {
    print_bytes(text.as_bytes())
}

/// The same for what need not be text.
pub(crate) fn print_bytes(bytes: &[u8]) -> Result<(), Stdout> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(Stdout)
}

/// Says something on standard error. Nobody may be listening, which is no reason to stop.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "svcpath: {line}");
}

/// Says lines that are whole already.
pub(crate) fn say_lines(lines: &str) {
    let _ = std::io::stderr().write_all(lines.as_bytes());
}

/// A signal asked to stop.
#[derive(Debug, thiserror::Error)]
#[error("stopped by {0}: nothing was written, nothing is left behind")]
pub(crate) struct Interrupted(pub(crate) Signal);

/// What was asked for cannot be.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// A right that this process lacks.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct NotPermitted(String);

/// Namespaces, rules and probes need root with all its capabilities: said before anything is done.
pub(crate) fn require_root(what: &str) -> Result<(), NotPermitted> {
    if !nix::unistd::geteuid().is_root() {
        return Err(NotPermitted(format!(
            "{what} needs root (network namespaces, rules and eBPF): run it with sudo"
        )));
    }
    require_capabilities(what, &TO_BUILD)
}

/// Refuses what the process has no rights for.
fn require_capabilities(what: &str, needed: &[Capability]) -> Result<(), NotPermitted> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let missing = missing_capabilities(&status, needed);
    if missing.is_empty() {
        return Ok(());
    }
    Err(NotPermitted(format!(
        "{what} lacks {}: run it as root without dropping capabilities",
        missing.join(", ")
    )))
}

/// Refuses to trace without the rights to attach probes and to read rules. `moves`: into another network
/// namespace, or has the kernel count run time, which takes more.
pub(crate) fn require_tracing(what: &str, moves: bool) -> Result<(), NotPermitted> {
    if nix::unistd::geteuid().is_root() {
        return require_capabilities(what, if moves { &TO_BUILD } else { &TO_TRACE });
    }
    Err(NotPermitted(format!(
        "{what} needs to run as root, which iptables' own tools insist on, of whose capabilities CAP_BPF, \
         CAP_PERFMON, CAP_NET_ADMIN and, where iptables-legacy has tables, CAP_NET_RAW are enough: run it with sudo"
    )))
}

/// A capability's number (include/uapi/linux/capability.h) and name.
type Capability = (u32, &'static str);

const NET_ADMIN: Capability = (12, "CAP_NET_ADMIN");
const SYS_ADMIN: Capability = (21, "CAP_SYS_ADMIN");
const PERFMON: Capability = (38, "CAP_PERFMON");
const BPF: Capability = (39, "CAP_BPF");

/// For namespaces of our own, or another one.
const TO_BUILD: [Capability; 4] = [NET_ADMIN, SYS_ADMIN, PERFMON, BPF];
/// For probes in the namespace that we are in.
const TO_TRACE: [Capability; 3] = [NET_ADMIN, PERFMON, BPF];

/// Capabilities that are needed and not effective.
fn missing_capabilities(status: &str, needed: &[Capability]) -> Vec<&'static str> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    let Some(effective) = effective else {
        return Vec::new();
    };
    needed
        .iter()
        .filter(|(bit, _)| effective >> bit & 1 == 0)
        .map(|(_, name)| *name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        assert!(missing_capabilities("CapEff:\t000001ffffffffff\n", &TO_BUILD).is_empty());
        assert_eq!(
            missing_capabilities("CapEff:\t0000007fffffffff\n", &TO_BUILD),
            ["CAP_BPF"]
        );
        assert_eq!(
            missing_capabilities("CapEff:\t0000000000000000\n", &TO_BUILD).len(),
            4
        );
    }

    #[test]
    fn causes_are_said_once_and_on_one_line() {
        let error = anyhow::anyhow!("disk\nfull").context("cannot write x: disk; full");
        assert_eq!(one_line(&error), "cannot write x: disk; full");
    }
}
