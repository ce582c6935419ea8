//! From maps and ring buffers to flows, losses, outages and histograms.

pub mod evidence;
pub mod flows;
pub mod headers;
pub mod run;
pub mod times;
