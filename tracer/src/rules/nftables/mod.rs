//! kube-proxy's nftables mode: the tables `ip kube-proxy` and `ip6 kube-proxy`.

pub(super) use render::render;
pub use render::update;
pub(super) use sync::sync;

mod render;
mod sync;
