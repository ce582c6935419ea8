//! The programs that run in the kernel: netfilter boundaries and three tracepoints.
//!
//! For the host this is an empty program, so that the workspace builds anywhere.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod programs;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
