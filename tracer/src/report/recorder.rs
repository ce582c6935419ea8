//! A trace's folder, written while the session lasts: journeys as they come, the rest at its end.
//!
//! A disk that is full does not end a session. What could be written stays, whole lines only, and what
//! could not is counted.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::trace::Trace;
use super::write::{HTML_FILE, JOURNEYS_FILE, Staged, TRACE_FILE, WriteError, printable};
use super::{html, read};
use crate::trace::journey::Journey;
use crate::trace::run::{FORMAT, Kept, KeptJourney, TraceEnvironment, TraceRun};
use crate::trace::session::Event;
use crate::trace::summary::Summary;

/// Journeys that went wrong and stand on the page.
const SHOWN: usize = 1000;

/// A folder that is being written.
#[derive(Debug)]
pub struct Recorder {
    dir: PathBuf,
    /// `None` once it failed.
    journeys: Option<File>,
    /// Bytes of whole lines in it.
    length: u64,
    kept: Kept,
    wrong: Vec<KeptJourney>,
}

impl Recorder {
    /// Begins in this folder, which is made if it is missing; what a trace has left there goes. Ask
    /// [`check_trace_target`](super::write::check_trace_target) before. At most `limit` journeys that
    /// went well are kept, and as many that went wrong.
    ///
    /// # Errors
    ///
    /// The second of the pair says why journeys cannot be written: the session goes on without.
    pub fn start(dir: &Path, limit: u64) -> (Self, Result<(), WriteError>) {
        let mut recorder = Self {
            dir: dir.to_owned(),
            journeys: None,
            length: 0,
            kept: Kept {
                limit,
                ..Kept::default()
            },
            wrong: Vec::new(),
        };
        let opened = fs::create_dir_all(dir).and_then(|()| {
            for stale in [TRACE_FILE, HTML_FILE] {
                match fs::remove_file(dir.join(stale)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            File::create(dir.join(JOURNEYS_FILE))
        });
        let outcome = match opened {
            Ok(file) => {
                recorder.journeys = Some(file);
                Ok(())
            }
            Err(error) => Err(recorder.failed(error)),
        };
        (recorder, outcome)
    }

    /// Writes what journeys there are among these.
    ///
    /// # Errors
    ///
    /// The file system refused. That is said once: from then on journeys are only counted.
    pub fn keep(&mut self, events: &[Event]) -> Result<(), WriteError> {
        let before = self.kept.clone();
        let mut lines = Vec::new();
        for event in events {
            if let Event::Journey(journey) = event
                && self.kept.take(journey.end.is_good())
            {
                self.note(journey);
                line(&mut lines, event, journey);
            }
        }
        let Some(file) = self.journeys.as_mut().filter(|_| !lines.is_empty()) else {
            return Ok(());
        };
        match file.write_all(&lines) {
            Ok(()) => {
                self.length += lines.len() as u64;
                Ok(())
            }
            Err(error) => {
                // Half a line is worse than none; on a full disk shortening works.
                let _ = file.set_len(self.length);
                let (good, wrong) = (self.kept.good - before.good, self.kept.wrong - before.wrong);
                self.kept.good = before.good;
                self.kept.wrong = before.wrong;
                self.kept.good_left_out += good;
                self.kept.wrong_left_out += wrong;
                Err(self.failed(error))
            }
        }
    }

    /// Is everything written so far that should be?
    pub const fn is_whole(&self) -> bool {
        self.kept.failure.is_none()
    }

    /// Writes the rest: trace.json, then the page, which can be made of it again. Returns the page's path.
    pub fn finish(
        self,
        mut environment: TraceEnvironment,
        summary: &Summary,
    ) -> Result<PathBuf, WriteError> {
        environment.command = environment
            .command
            .iter()
            .map(|word| printable(word))
            .collect();
        let encode = |error: serde_json::Error| WriteError::Encode(error.to_string());
        let run = TraceRun {
            format: FORMAT.to_owned(),
            environment,
            summary: summary.clone(),
            journeys: self.kept,
        };
        let mut json = serde_json::to_value(&run).map_err(encode)?;
        clean(&mut json);
        let run: TraceRun = serde_json::from_value(json).map_err(encode)?;
        read::validate_trace(&run)?;
        let bytes = super::json::to_bytes(&run).map_err(encode)?;
        let page = html::trace::render(&Trace {
            run,
            wrong: Some(self.wrong),
        });
        for (name, bytes) in [(TRACE_FILE, &bytes[..]), (HTML_FILE, page.as_bytes())] {
            let mut staged = Staged::default();
            staged.add(&self.dir, name, bytes)?;
            staged.publish()?;
        }
        Ok(self.dir.join(HTML_FILE))
    }

    fn note(&mut self, journey: &Journey) {
        if !journey.end.is_good() && self.wrong.len() < SHOWN {
            self.wrong.push(journey.into());
        }
    }

    fn failed(&mut self, source: io::Error) -> WriteError {
        self.journeys = None;
        self.kept.failure = Some(printable(&source.to_string()));
        WriteError::File {
            file: self.dir.join(JOURNEYS_FILE),
            source,
        }
    }
}

/// A journey's line; one that cannot be encoded, which cannot be, is an empty object.
fn line(out: &mut Vec<u8>, event: &Event, journey: &Journey) {
    let clean;
    let event = if journey.service.contains(char::is_control) {
        clean = Event::Journey(Journey {
            service: printable(&journey.service),
            ..journey.clone()
        });
        &clean
    } else {
        event
    };
    // Into memory, and with text for keys: neither way of failing is there.
    let _ = serde_json::to_writer(&mut *out, event);
    out.push(b'\n');
}

/// Makes every string printable.
fn clean(json: &mut Value) {
    match json {
        Value::String(text) if text.contains(char::is_control) => *text = printable(text),
        Value::Array(items) => items.iter_mut().for_each(clean),
        Value::Object(entries) => {
            if entries.keys().any(|key| key.contains(char::is_control)) {
                let old = std::mem::take(entries);
                entries.extend(old.into_iter().map(|(key, value)| (printable(&key), value)));
            }
            entries.values_mut().for_each(clean);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;
    use crate::report::write::check_trace_target;
    use crate::trace::changes::{Delta, What};
    use crate::trace::journey::End;

    fn event(end: End) -> Event {
        Event::Journey(Journey {
            end,
            ..Journey::sample()
        })
    }

    fn environment() -> TraceEnvironment {
        sample::trace().run.environment
    }

    #[test]
    fn what_is_recorded_is_what_is_read() {
        let dir = tempfile::tempdir().expect("a folder");
        let into = dir.path().join("a/b");
        check_trace_target(&into, false).expect("it can be written");
        let (mut recorder, began) = Recorder::start(&into, 2);
        began.expect("begins");
        let events = [End::Sent, End::Leaked, End::Sent, End::Sent].map(event);
        recorder.keep(&events).expect("written");
        assert!(recorder.is_whole());
        let summary = sample::trace().run.summary;
        let page = recorder.finish(environment(), &summary).expect("written");
        assert!(page.ends_with("a/b/report.html"));
        let read::Recorded::Trace(read) = read::recorded(&into).expect("valid") else {
            panic!("a trace was written");
        };
        assert_eq!(read.run.summary, summary);
        let kept = &read.run.journeys;
        assert_eq!((kept.good, kept.wrong), (2, 1));
        assert_eq!((kept.good_left_out, kept.wrong_left_out), (1, 0));
        assert_eq!(read.wrong.as_ref().map(Vec::len), Some(1));
        assert_eq!(
            fs::read_to_string(&page).expect("the page"),
            html::trace::render(&read),
            "the page is the same when it is made again"
        );

        let error = check_trace_target(&into, false).expect_err("there is one");
        assert_eq!(error.exit_code(), 2);
        assert!(
            error.to_string().contains("trace.json is there already"),
            "{error}"
        );
        check_trace_target(&into, true).expect("may be overwritten");
        let (_, began) = Recorder::start(&into, 2);
        began.expect("begins");
        assert!(!into.join(TRACE_FILE).exists() && !page.exists());
        let error = check_trace_target(&into, false).expect_err("a session was killed here");
        assert!(
            error
                .to_string()
                .contains("journeys.jsonl is there already"),
            "{error}"
        );
    }

    #[test]
    fn the_two_kinds_of_run_keep_apart() {
        let dir = tempfile::tempdir().expect("a folder");
        super::super::write::write_all(&sample::run(), dir.path(), false).expect("written");
        let error = check_trace_target(dir.path(), true).expect_err("a comparison is there");
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("run of another kind"), "{error}");
    }

    #[test]
    fn a_device_that_is_full_ends_nothing() {
        let dir = tempfile::tempdir().expect("a folder");
        let full = dir.path().join(JOURNEYS_FILE);
        std::os::unix::fs::symlink("/dev/full", full).expect("a link");
        let (mut recorder, began) = Recorder::start(dir.path(), 10);
        began.expect("opening it works");
        let error = recorder.keep(&[event(End::Sent)]).expect_err("it is full");
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("No space left"), "{error}");
        recorder
            .keep(&[event(End::Leaked)])
            .expect("said only once");
        assert!(!recorder.is_whole());
        let summary = sample::trace().run.summary;
        recorder
            .finish(environment(), &summary)
            .expect("there is room for the rest");
        fs::remove_file(dir.path().join(JOURNEYS_FILE)).expect("removed");
        let read::Recorded::Trace(read) = read::recorded(dir.path()).expect("valid") else {
            panic!("a trace was written");
        };
        let kept = read.run.journeys;
        assert_eq!((kept.good, kept.wrong), (0, 0));
        assert_eq!((kept.good_left_out, kept.wrong_left_out), (1, 1));
        assert!(kept.failure.expect("said").contains("No space left"));
    }

    #[test]
    fn names_that_would_command_a_terminal_are_made_harmless() {
        let dir = tempfile::tempdir().expect("a folder");
        let (mut recorder, began) = Recorder::start(dir.path(), 10);
        began.expect("begins");
        let evil = "\u{1b}[2Jweb\u{9b}";
        let journey = Journey {
            service: evil.to_owned(),
            end: End::Leaked,
            ..Journey::sample()
        };
        recorder.keep(&[Event::Journey(journey)]).expect("written");
        let mut summary = sample::trace().run.summary;
        evil.clone_into(&mut summary.services[0].name);
        let change = &mut summary.rule_changes[0];
        change.by.name = Some(evil.to_owned());
        change.what = What::Nftables {
            generation: None,
            tables: [(evil.to_owned(), Delta::default())].into(),
        };
        recorder.finish(environment(), &summary).expect("written");
        let read = read::recorded(dir.path()).expect("no control characters are left");
        let shown = crate::report::terminal::render(&read.blocks(), 110, false);
        assert!(shown.contains("\u{fffd}[2Jweb\u{fffd}"), "{shown}");
    }
}
