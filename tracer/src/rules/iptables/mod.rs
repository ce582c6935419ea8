//! kube-proxy's iptables mode, and what IPVS mode shares with it.

mod chains;
mod check;
mod effect;
mod forms;
mod parse;
mod render;
pub mod rule;
mod sync;
pub mod walk;

pub use check::{check, uses_nfacct};
pub use forms::{do_not_judge, note, of_another_version};
pub use parse::{ParseError, Problem, parse};
pub(super) use render::{
    EXT, FW, Invalid, SEP, SVC, SVL, push_all, push_chains, push_forward_rules, push_jumps,
    push_masquerade_rules, push_nat_jumps, render,
};
pub use render::{INVALID_DROPPED, LOCALHOST_NODE_PORTS, count, removal, update};
pub(super) use sync::sync;
