//! Everything that touches the kernel besides the probes.

pub mod netns;
