//! From maps and ring buffers to flows, losses, outages and histograms.

pub mod headers;
pub mod run;
