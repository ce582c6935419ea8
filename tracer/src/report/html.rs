//! x
use crate::record::run::Run;
/// x
pub fn render(_run: &Run) -> String { "<html></html>".into() }
