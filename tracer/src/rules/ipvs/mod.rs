//! kube-proxy's IPVS mode: virtual servers, ipsets, the addresses of `kube-ipvs0`, and a constant
//! number of iptables rules.

mod render;
mod sync;

pub(super) use render::Plan;
pub use render::{LINK, count_entries, count_servers, set_names, update_servers, update_sets};
pub(super) use sync::sync;
