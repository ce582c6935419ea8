//! The layout of run.json and trace.json: indented, keys in the model's order, a histogram's buckets on one line.
//!
//! A run holds tens of thousands of buckets; with each on five lines nobody could read the rest.

use std::io;

use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// A run as the bytes of its file, ending in a newline. The same run gives the same bytes.
pub fn to_bytes(run: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut out = Vec::new();
    run.serialize(&mut Serializer::with_formatter(&mut out, Layout::default()))?;
    out.push(b'\n');
    Ok(out)
}

/// Pretty, but for arrays that follow a key in [`ON_ONE_LINE`].
#[derive(Default)]
struct Layout {
    pretty: PrettyFormatter<'static>,
    in_key: bool,
    flat_next: bool,
    /// How many arrays deep inside one that is kept on its line.
    flat: usize,
}

/// Keys whose arrays stay on one line.
const ON_ONE_LINE: [&str; 1] = ["buckets"];

impl Formatter for Layout {
    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.in_key = true;
        self.flat_next = false;
        self.pretty.begin_object_key(w, first)
    }

    fn end_object_key<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.in_key = false;
        self.pretty.end_object_key(w)
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        s: &str,
    ) -> io::Result<()> {
        if self.in_key {
            self.flat_next = ON_ONE_LINE.contains(&s);
        }
        w.write_all(s.as_bytes())
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.pretty.begin_object_value(w)
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.pretty.end_object_value(w)
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.pretty.begin_object(w)
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.pretty.end_object(w)
    }

    fn begin_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        if self.flat > 0 || self.flat_next {
            self.flat += 1;
            return w.write_all(b"[");
        }
        self.pretty.begin_array(w)
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        if self.flat > 0 {
            self.flat -= 1;
            self.flat_next = false;
            return w.write_all(b"]");
        }
        self.pretty.end_array(w)
    }

    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if self.flat > 0 {
            return if first { Ok(()) } else { w.write_all(b", ") };
        }
        self.pretty.begin_array_value(w, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        if self.flat > 0 {
            return Ok(());
        }
        self.pretty.end_array_value(w)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::run::Run;
    use crate::report::sample;

    #[test]
    fn what_is_written_is_what_is_read() {
        let run = sample::run();
        let bytes = to_bytes(&run).expect("serialize");
        let back: Run = serde_json::from_slice(&bytes).expect("parse");
        assert_eq!(back, run);
        assert_eq!(to_bytes(&back).expect("serialize"), bytes);
    }

    #[test]
    fn buckets_stay_on_one_line() {
        let bytes = to_bytes(&sample::run()).expect("serialize");
        let text = String::from_utf8(bytes).expect("UTF-8");
        let line = text
            .lines()
            .find(|line| line.contains("\"buckets\""))
            .expect("buckets");
        assert!(line.trim_end().ends_with("]]"), "{line}");
        assert!(
            text.contains("\n    \"clock\": \"virtual\",\n"),
            "the rest is indented"
        );
    }
}
