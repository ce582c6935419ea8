//! What a run says, for people and for programs.
//!
//! Reads only the run model ([`crate::record::run`]): `run.json` in, and out of it the terminal's
//! tables, Markdown, a self-contained HTML page and `HdrHistogram` logs. Nothing is measured or
//! guessed here: a figure that a run lacks is shown as missing.

pub mod answer;
pub mod blocks;
pub mod figures;
pub mod hlog;
pub mod html;
pub mod json;
pub mod markdown;
pub mod plot;
pub mod quantile;
pub mod read;
#[cfg(test)]
pub(crate) mod sample;
pub mod terminal;
pub mod units;
pub mod write;

pub use read::{Invalid, ReadError, read, validate};
pub use write::{WriteError, Written, write_all};

/// The JSON schema of `run.json`.
pub const SCHEMA: &str = include_str!("../../schema/run.schema.json");
