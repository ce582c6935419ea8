//! A node, its pods, clients and peers made of network namespaces; traffic sources and sinks.

pub mod clean;
pub mod plan;
pub mod probe_packet;
pub mod sink;
pub mod source;
pub mod topology;
pub mod traffic;
