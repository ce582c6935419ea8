//! What the kernel programs and user space share: the histogram's layout, the records, the words.
//!
//! Built for the kernel (`no_std`) and for the host, where it is unit-tested.
#![cfg_attr(target_arch = "bpf", no_std)]

pub mod change;
pub mod histogram;
pub mod path;
pub mod record;
