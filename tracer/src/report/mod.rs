//! What a run says, for people and for programs.
//!
//! Reads only what was recorded: a comparison ([`crate::record::run`], `run.json`) or a trace
//! ([`crate::trace::run`], `trace.json`). Both become the same blocks, which the terminal and Markdown
//! show, and pages made of the same parts. Nothing is measured or guessed here: a figure that a run
//! lacks is shown as missing.

pub mod answer;
pub mod blocks;
pub mod bursts;
pub mod figures;
pub mod hlog;
pub mod html;
pub mod json;
mod lock;
pub mod markdown;
pub mod plot;
pub mod quantile;
pub mod read;
pub mod recorder;
mod reserved;
#[cfg(test)]
pub(crate) mod sample;
pub mod terminal;
pub mod trace;
pub mod units;
pub mod write;

pub use read::{Invalid, ReadError, Recorded, read, validate};
pub use write::{WriteError, Written, write_all};

/// The JSON schema of `run.json`.
pub const SCHEMA: &str = include_str!("../../schema/run.schema.json");
/// The JSON schema of `trace.json`.
pub const TRACE_SCHEMA: &str = include_str!("../../schema/trace.schema.json");
