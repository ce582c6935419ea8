//! A node, its pods, clients and peers made of network namespaces; traffic sources and sinks.

pub mod clean;
mod established;
mod flow;
pub mod latency;
pub mod plan;
pub mod probe_packet;
mod schedule;
pub mod sink;
mod source;
mod timer;
pub mod topology;
pub mod traffic;

pub use established::{EstablishedRecord, LostRequest};
pub use flow::Outcome;
pub use source::SourcesExhausted;
