//! Everything that touches the kernel besides the probes.

pub mod clock;
pub mod link;
pub mod netns;
pub mod sysctl;
