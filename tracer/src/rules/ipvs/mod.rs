//! kube-proxy's IPVS mode: virtual servers, ipsets, the addresses of `kube-ipvs0`, and a constant
//! number of iptables rules.

use std::fmt;

mod addresses;
pub mod check;
mod render;
mod servers;
mod sets;
mod sync;
pub mod walk;

pub use addresses::{Addresses, Bound};
pub(super) use render::Plan;
pub use render::{LINK, count_entries, set_names, update_sets};
#[cfg(test)]
pub(super) use render::{remove_stale_servers, update_live_servers};
pub use servers::{Forwarding, Orphan, RealServer, ServerKey, Servers, VirtualServer};
pub use sets::{Entry, ForeignSet, Member, Role, Set, SetKind, Sets};
pub(super) use sync::sync;

/// The longest excerpt of a line that an error shows, in bytes.
const EXCERPT_MAX: usize = 120;

/// A line of a dump that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}: '{text}'")]
pub struct ParseError {
    /// The line, from 1.
    pub line: u32,
    /// What is wrong with it.
    pub problem: &'static str,
    /// The line itself, or its beginning.
    pub text: String,
}

impl ParseError {
    fn new(line: u32, problem: &'static str, text: &str) -> Self {
        let end = text.floor_char_boundary(EXCERPT_MAX);
        Self {
            line,
            problem,
            text: text[..end].to_owned(),
        }
    }
}

/// The lines of a dump with their numbers, from 1; blank ones are left out. The last one must end:
/// of a dump that was cut, the rest of a line can be read as another address or port.
fn numbered_lines(text: &str) -> Result<impl Iterator<Item = (u32, &str)>, ParseError> {
    if !text.is_empty() && !text.ends_with('\n') {
        let last = text.lines().last().unwrap_or_default();
        let line = u32::try_from(text.lines().count()).unwrap_or(u32::MAX);
        return Err(ParseError::new(
            line,
            "the line does not end, so the dump is cut",
            last,
        ));
    }
    Ok((1..)
        .zip(text.lines())
        .filter(|(_, line)| !line.trim_ascii().is_empty()))
}

/// Writes ` WORD` for each of `words`.
fn write_words(f: &mut fmt::Formatter<'_>, words: &[String]) -> fmt::Result {
    for word in words {
        write!(f, " {word}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    /// `real` with bytes changed, lines cut, deleted, doubled or swapped, and plain garbage.
    pub(super) fn mutated(real: &'static str) -> impl Strategy<Value = String> {
        let bytes = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8);
        let bytes = bytes.prop_map(move |changes| {
            let mut text = real.as_bytes().to_vec();
            for (at, byte) in changes {
                let at = at.index(text.len());
                text[at] = byte;
            }
            String::from_utf8_lossy(&text).into_owned()
        });
        let lines = proptest::collection::vec(any::<prop::sample::Index>(), 0..60);
        let lines = lines.prop_map(move |order| {
            let all: Vec<&str> = real.lines().collect();
            let mut text = String::new();
            for at in order {
                text.push_str(all[at.index(all.len())]);
                text.push('\n');
            }
            text
        });
        let cut = any::<prop::sample::Index>().prop_map(move |at| {
            let end = real.floor_char_boundary(at.index(real.len()));
            real[..end].to_owned()
        });
        prop_oneof![bytes, lines, cut, any::<String>()]
    }
}
