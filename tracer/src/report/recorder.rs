//! A trace's folder, written while the session lasts: journeys as they come, the rest at its end.
//!
//! A disk that is full does not end a session. What could be written stays, whole lines only, and what
//! could not is counted. Room for trace.json is taken at the begin; if that is not enough, journeys make way for it,
//! the last ones first: what all of them were is told by it.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::lock::{self, Held};
use super::reserved::{Reserved, Unwritten};
use super::trace::Trace;
use super::write::{
    HTML_FILE, JOURNEYS_FILE, Staged, TRACE_FILE, WriteError, printable, remove_left_over,
};
use super::{html, read};
use crate::trace::journey::Journey;
use crate::trace::run::{FORMAT, Kept, KeptJourney, TraceEnvironment, TraceRun};
use crate::trace::session::Event;
use crate::trace::summary::Summary;

/// Journeys that ended badly and stand on the page.
const SHOWN: usize = 1000;
/// File systems' usual block.
const BLOCK: u64 = 4 << 10;

/// A line of `journeys.jsonl`.
#[derive(Clone, Copy, Debug)]
struct Line {
    bytes: u32,
    good: bool,
}

/// A folder that is being written.
#[derive(Debug)]
pub struct Recorder {
    dir: PathBuf,
    /// `None`: it could not be made.
    journeys: Option<File>,
    /// The whole lines in it.
    lines: Vec<Line>,
    /// Their bytes.
    length: u64,
    /// `None`: it could not be made.
    summary: Option<Reserved>,
    kept: Kept,
    wrong: Vec<KeptJourney>,
}

impl Recorder {
    /// Begins in this folder, which is made if it is missing; what a trace has left there goes. Ask
    /// [`check_trace_target`](super::write::check_trace_target) before. At most `limit` journeys that
    /// ended well are kept, and as many that ended badly.
    ///
    /// # Errors
    ///
    /// Another session writes there. The second of the pair says why journeys cannot be written: the session goes on
    /// without.
    pub fn start(dir: &Path, limit: u64) -> Result<(Self, Result<(), WriteError>), WriteError> {
        let mut recorder = Self {
            dir: dir.to_owned(),
            journeys: None,
            lines: Vec::new(),
            length: 0,
            summary: None,
            kept: Kept {
                limit,
                ..Kept::default()
            },
            wrong: Vec::new(),
        };
        let file = match open(dir) {
            Ok(file) => file,
            Err(error) => {
                let error = recorder.failed(error);
                return Ok((recorder, Err(error)));
            }
        };
        // Not before it is known that all that is there is ours.
        if let Err(Held { by }) = lock::take(&file) {
            let dir = dir.to_owned();
            return Err(WriteError::InUse { dir, pid: by });
        }
        let began = recorder.begin(file);
        let began = began.map_err(|error| recorder.failed(error));
        Ok((recorder, began))
    }

    /// Takes the folder of which this is the file of journeys.
    fn begin(&mut self, journeys: File) -> io::Result<()> {
        for stale in [TRACE_FILE, HTML_FILE] {
            match fs::remove_file(self.dir.join(stale)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            remove_left_over(&self.dir, stale)?;
        }
        if journeys.metadata()?.is_file() {
            journeys.set_len(0)?;
        }
        self.summary = Some(Reserved::start(&self.dir, TRACE_FILE)?);
        self.journeys = Some(journeys);
        Ok(())
    }

    /// Writes what journeys there are among these.
    ///
    /// # Errors
    ///
    /// The file system refused. That is said once: from then on journeys are only counted.
    pub fn keep(&mut self, events: &[Event]) -> Result<(), WriteError> {
        let mut bytes = Vec::new();
        let mut lines = Vec::new();
        for event in events {
            if let Event::Journey(journey) = event
                && self.kept.take(journey.end.is_good())
            {
                self.note(journey);
                let begin = bytes.len();
                line(&mut bytes, event, journey);
                lines.push(Line {
                    bytes: u32::try_from(bytes.len() - begin).unwrap_or(u32::MAX),
                    good: journey.end.is_good(),
                });
            }
        }
        let Some(file) = self.journeys.as_mut().filter(|_| !bytes.is_empty()) else {
            return Ok(());
        };
        let (written, outcome) = append(file, &bytes);
        let mut lines = lines.into_iter().peekable();
        let end = self.length + written;
        while let Some(line) = lines.next_if(|line| self.length + u64::from(line.bytes) <= end) {
            self.length += u64::from(line.bytes);
            self.lines.push(line);
        }
        lines.for_each(|line| self.kept.give_up(line.good));
        let Err(error) = outcome else {
            return Ok(());
        };
        // Half a line is worse than none; on a full disk shortening works.
        let _ = file.set_len(self.length);
        Err(self.failed(error))
    }

    /// Is everything written so far that should be?
    pub const fn is_whole(&self) -> bool {
        self.kept.failure.is_none()
    }

    /// Writes the rest: trace.json, then the page, which can be made of it again. Returns the page's path, and
    /// whether all journeys that should be are kept.
    ///
    /// # Errors
    ///
    /// The summary contradicts itself, or there is no room even without journeys.
    pub fn finish(
        mut self,
        mut environment: TraceEnvironment,
        summary: &Summary,
    ) -> Result<(PathBuf, bool), WriteError> {
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
            journeys: self.kept.clone(),
        };
        let mut json = serde_json::to_value(&run).map_err(encode)?;
        clean(&mut json);
        let mut run: TraceRun = serde_json::from_value(json).map_err(encode)?;
        read::validate_trace(&run)?;
        let reserved = self.reserved()?;
        loop {
            run.journeys.clone_from(&self.kept);
            let bytes = super::json::to_bytes(&run).map_err(encode)?;
            match reserved.write(&bytes) {
                Ok(()) => break,
                Err(Unwritten { missing, error }) => self.make_room(missing, error)?,
            }
        }
        reserved.publish()?;
        let whole = self.is_whole();
        let page = html::trace::render(&Trace {
            run,
            wrong: Some(self.wrong),
        });
        let mut staged = Staged::default();
        let written = staged.add(&self.dir, HTML_FILE, page.as_bytes());
        let written = written.and_then(|()| staged.publish());
        written.map_err(|error| WriteError::Page {
            dir: self.dir.clone(),
            error: Box::new(error),
        })?;
        Ok((self.dir.join(HTML_FILE), whole))
    }

    /// The file of the summary, made now if that did not succeed at the begin.
    fn reserved(&mut self) -> Result<Reserved, WriteError> {
        if let Some(reserved) = self.summary.take() {
            return Ok(reserved);
        }
        let made = fs::create_dir_all(&self.dir);
        let made = made.and_then(|()| Reserved::start(&self.dir, TRACE_FILE));
        made.map_err(|source| WriteError::File {
            file: self.dir.join(TRACE_FILE),
            source,
        })
    }

    /// Leaves out as many of the last journeys as take so many bytes.
    ///
    /// # Errors
    ///
    /// What they should make room for could not be written for another reason, or there are none.
    fn make_room(&mut self, missing: u64, error: WriteError) -> Result<(), WriteError> {
        let full = matches!(&error, WriteError::File { source, .. } if is_full(source));
        let file = self.journeys.as_ref().filter(|_| full);
        let Some(file) = file.filter(|_| !self.lines.is_empty()) else {
            return Err(error);
        };
        // A file system gives back whole blocks only.
        let wanted = self
            .length
            .saturating_sub(missing.next_multiple_of(BLOCK) + BLOCK);
        while let Some(line) = self.lines.pop_if(|_| self.length > wanted) {
            self.length = self.length.saturating_sub(line.bytes.into());
            self.kept.give_up(line.good);
        }
        if let WriteError::File { source, .. } = &error {
            let failure = || printable(&source.to_string());
            self.kept.failure.get_or_insert_with(failure);
        }
        // Some give it back only when they have written down that they do.
        let shortened = file.set_len(self.length).and_then(|()| file.sync_all());
        shortened.map_err(|_| error)
    }

    fn note(&mut self, journey: &Journey) {
        if !journey.end.is_good() && self.wrong.len() < SHOWN {
            self.wrong.push(journey.into());
        }
    }

    fn failed(&mut self, source: io::Error) -> WriteError {
        self.kept.failure = Some(printable(&source.to_string()));
        WriteError::File {
            file: self.dir.join(JOURNEYS_FILE),
            source,
        }
    }
}

/// The file of journeys, with what it holds.
fn open(dir: &Path) -> io::Result<File> {
    fs::create_dir_all(dir)?;
    let file = dir.join(JOURNEYS_FILE);
    let mut options = File::options();
    options.write(true).create(true).truncate(false).open(file)
}

/// Writes all of it: how many bytes of it are written, and if these are not all, why.
fn append(file: &mut File, bytes: &[u8]) -> (u64, io::Result<()>) {
    let mut written = 0;
    while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
        match file.write(rest) {
            Ok(0) => return (written as u64, Err(io::ErrorKind::WriteZero.into())),
            Ok(more) => written += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (written as u64, Err(error)),
        }
    }
    (written as u64, Ok(()))
}

fn is_full(error: &io::Error) -> bool {
    let kinds = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
    kinds.contains(&error.kind())
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
        let (mut recorder, began) = Recorder::start(&into, 2).expect("nobody else writes");
        began.expect("begins");
        let events = [End::Sent, End::Leaked, End::Sent, End::Sent].map(event);
        recorder.keep(&events).expect("written");
        assert!(recorder.is_whole());
        let summary = sample::trace().run.summary;
        let (page, whole) = recorder.finish(environment(), &summary).expect("written");
        assert!(whole && page.ends_with("a/b/report.html"));
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
        let (_, began) = Recorder::start(&into, 2).expect("nobody else writes");
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
        let (mut recorder, began) = Recorder::start(dir.path(), 10).expect("nobody else writes");
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

    /// In a file system of its own, which is seen by nobody else, as large as that: `size=128k`.
    fn on_a_disk_of(size: &'static str, check: impl FnOnce(&Path) + Send + 'static) {
        use nix::mount::{MsFlags, mount};
        let checked = std::thread::spawn(move || {
            let dir = tempfile::tempdir().expect("a folder");
            let none: Option<&str> = None;
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("root");
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private");
            let (kind, flags) = (Some("tmpfs"), MsFlags::empty());
            mount(kind, dir.path(), kind, flags, Some(size)).expect("mounted");
            check(dir.path());
            nix::mount::umount(dir.path()).expect("unmounted");
        });
        checked.join().expect("the thread's assertions hold");
    }

    /// Fills the disk with journeys that ended well and badly by turns: how many were kept.
    fn fill(recorder: &mut Recorder) -> u64 {
        let both = [End::Sent, End::Leaked].map(event);
        while recorder.keep(&both).is_ok() {}
        recorder.kept.lines()
    }

    #[test]
    fn journeys_that_fill_the_disk_leave_room_for_what_was_found() {
        on_a_disk_of("size=64k", |dir| {
            let (mut recorder, began) = Recorder::start(dir, 10_000).expect("nobody else writes");
            began.expect("begins");
            let written = fill(&mut recorder);
            assert!(written > 50, "{written}");
            let summary = sample::trace().run.summary;
            let error = recorder.finish(environment(), &summary);
            let error = error.expect_err("no room for the page").to_string();
            assert!(error.contains("trace.json beside it is whole"), "{error}");
            let read::Recorded::Trace(read) = read::recorded(dir).expect("valid") else {
                panic!("a trace was written");
            };
            assert_eq!(read.run.summary, summary);
            assert_eq!(read.run.journeys.lines(), written);
        });
    }

    #[test]
    fn of_many_journeys_at_once_those_are_kept_for_which_there_is_room() {
        on_a_disk_of("size=64k", |dir| {
            let (mut recorder, began) = Recorder::start(dir, 10_000).expect("nobody else writes");
            began.expect("begins");
            let both = [End::Sent, End::Leaked].map(event);
            let many: Vec<Event> = both.iter().cycle().take(400).cloned().collect();
            recorder.keep(&many).expect_err("there is no room for all");
            let text = fs::read_to_string(dir.join(JOURNEYS_FILE)).expect("UTF-8");
            let whole = text.lines().map(serde_json::from_str::<KeptJourney>);
            let whole = whole.flatten().count() as u64;
            let kept = &recorder.kept;
            assert!(
                whole > 50 && text.lines().count() as u64 == whole,
                "{kept:?}"
            );
            assert_eq!(kept.lines(), whole);
            assert_eq!(kept.lines() + kept.good_left_out + kept.wrong_left_out, 400);
            assert!(kept.good.abs_diff(kept.wrong) <= 1, "{kept:?}");
            assert_eq!(recorder.length, text.len() as u64);
        });
    }

    #[test]
    fn the_last_journeys_make_way_for_a_summary_that_is_larger() {
        on_a_disk_of("size=256k", |dir| {
            let mut summary = sample::trace().run.summary;
            let one = summary.rule_changes[0].clone();
            summary.rule_changes = vec![one; 300];
            let (mut recorder, began) = Recorder::start(dir, 10_000).expect("nobody else writes");
            began.expect("begins");
            let written = fill(&mut recorder);
            recorder
                .finish(environment(), &summary)
                .expect_err("no room for the page");
            let read::Recorded::Trace(read) = read::recorded(dir).expect("valid") else {
                panic!("a trace was written");
            };
            assert_eq!(read.run.summary, summary);
            let kept = read.run.journeys;
            assert!(0 < kept.lines() && kept.lines() < written, "{kept:?}");
            // Of two kinds, one after the other, whichever was last.
            assert!(kept.good.abs_diff(kept.wrong) <= 1, "{kept:?}");
            let all = kept.lines() + kept.good_left_out + kept.wrong_left_out;
            // Of the last two there may have been room for one.
            assert_eq!(all, (written + 1).next_multiple_of(2), "{kept:?}");
        });
    }

    #[test]
    fn a_disk_without_any_room_is_told_with_the_file() {
        on_a_disk_of("size=64k", |dir| {
            let mut summary = sample::trace().run.summary;
            let one = summary.rule_changes[0].clone();
            summary.rule_changes = vec![one; 300];
            let (mut recorder, began) = Recorder::start(dir, 10_000).expect("nobody else writes");
            began.expect("begins");
            fill(&mut recorder);
            let error = recorder.finish(environment(), &summary);
            let error = error.expect_err("no room").to_string();
            assert!(
                error.contains("trace.json: No space left") && error.contains("free some space"),
                "{error}"
            );
            let left = fs::read_dir(dir).expect("a folder");
            assert_eq!(left.count(), 1, "journeys.jsonl");
        });
    }

    #[test]
    fn what_a_killed_session_has_left_goes() {
        let dir = tempfile::tempdir().expect("a folder");
        let left = [".trace.json.7.tmp", ".report.html.7.tmp"].map(|name| dir.path().join(name));
        let other = dir.path().join(".trace.json.old.tmp");
        for file in left.iter().chain([&other]) {
            fs::write(file, "").expect("written");
        }
        let (recorder, began) = Recorder::start(dir.path(), 10).expect("nobody else writes");
        began.expect("begins");
        assert!(left.iter().all(|left| !left.exists()) && other.exists());
        drop(recorder);
        let names = fs::read_dir(dir.path()).expect("a folder");
        assert_eq!(names.count(), 2, "journeys.jsonl, and what is not ours");
    }

    #[test]
    fn what_another_process_writes_is_left_alone() {
        let dir = tempfile::tempdir().expect("a folder");
        let files = [TRACE_FILE, HTML_FILE, JOURNEYS_FILE].map(|name| dir.path().join(name));
        for file in &files {
            fs::write(file, "theirs").expect("written");
        }
        let mut other = lock::tests::held_by_another(&files[2]);
        for refused in [
            check_trace_target(dir.path(), true),
            check_trace_target(dir.path(), false),
            // Who began at the same time finds out here.
            Recorder::start(dir.path(), 10).map(drop),
        ] {
            let error = refused.expect_err("it is written to");
            assert_eq!(error.exit_code(), 2);
            let error = error.to_string();
            assert!(error.contains(&format!("(pid {})", other.id())), "{error}");
        }
        for file in &files {
            assert_eq!(fs::read(file).expect("it is there"), b"theirs");
        }
        other.kill().expect("it lives");
        other.wait().expect("it ends");
        let (_recorder, began) = Recorder::start(dir.path(), 10).expect("nobody writes");
        began.expect("begins");
        assert_eq!(fs::read(&files[2]).expect("it is there"), b"");
    }

    #[test]
    fn names_that_would_command_a_terminal_are_made_harmless() {
        let dir = tempfile::tempdir().expect("a folder");
        let (mut recorder, began) = Recorder::start(dir.path(), 10).expect("nobody else writes");
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
