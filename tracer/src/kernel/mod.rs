//! Everything that touches the kernel besides the probes.

pub mod apply;
pub mod netns;
pub mod nfacct;
pub mod tool;
