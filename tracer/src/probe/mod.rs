//! The probes: which there are, how they are loaded and attached, what they counted.
//!
//! This room knows maps and programs, and nothing of Kubernetes: to it a Service is an address,
//! a port and a protocol.

pub mod catalogue;
mod functions;
mod hooks;
pub mod log;
mod offsets;
pub mod program;
pub mod rule_changes;
pub mod tier;
pub mod trial;

/// The compiled programs, as committed beside their manifest.
pub const OBJECT: &[u8] = aya::include_bytes_aligned!("../../../tracer-ebpf/prebuilt/probes.bpf.o");

/// The manifest of [`OBJECT`] and the other objects: the hash of their sources and who compiled them.
pub const MANIFEST: &str = include_str!("../../../tracer-ebpf/prebuilt/manifest.json");
