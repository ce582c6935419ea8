//! Everything that touches the kernel besides the probes.

pub mod btf;
pub mod netns;
