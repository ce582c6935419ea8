//! kube-proxy's nftables mode: the tables `ip kube-proxy` and `ip6 kube-proxy`.

pub(super) use render::render;
pub use render::update;
pub(super) use sync::sync;
pub(super) use text::ours;
pub use text::{ParseError, apply, parse};

pub mod check;
pub mod claims;
pub mod json;
mod render;
mod sync;
pub mod table;
mod text;
pub mod walk;

#[cfg(test)]
mod tests;
