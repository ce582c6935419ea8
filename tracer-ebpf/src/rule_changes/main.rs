//! The programs that hear of rule changes.
//!
//! For the host this is an empty program, so that the workspace builds anywhere.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod programs;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
