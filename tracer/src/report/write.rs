//! Writes a run's folder: run.json, the histogram logs and report.html, all of it or nothing.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::lock::{self, Held};
use super::{Invalid, html, json, read};
use crate::record::run::Run;
use crate::report::hlog;

/// The file that says that a folder holds a run.
pub const RUN_FILE: &str = "run.json";
/// The file that says that a folder holds a trace.
pub const TRACE_FILE: &str = "trace.json";
/// A trace's journeys, one a line.
pub const JOURNEYS_FILE: &str = "journeys.jsonl";
/// The page.
pub const HTML_FILE: &str = "report.html";

/// A file system that does not take so much is full.
const PROBE_BYTES: usize = 16 << 10;

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// run.json.
    pub run: PathBuf,
    /// report.html.
    pub html: PathBuf,
    /// One log a cell.
    pub hlogs: Vec<PathBuf>,
}

/// Why a run could not be written. Nothing half-written stays behind.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The run contradicts itself.
    #[error("run invalid, nothing written: {0}")]
    Invalid(#[from] Invalid),
    /// The folder holds a run already, or the file is there.
    #[error("{} is there already: write somewhere else, or overwrite it with --force", .0.display())]
    Exists(PathBuf),
    /// The folder holds a run of the other kind.
    #[error("{} is there, which is a run of another kind: choose another folder", .0.display())]
    OtherKind(PathBuf),
    /// Another session writes its trace there.
    #[error("a session that still runs{} writes to {}: choose another folder, or end that session first", who(*.pid), dir.display())]
    InUse {
        /// The folder.
        dir: PathBuf,
        /// Its process; `None` if it is not to be seen from here.
        pid: Option<u32>,
    },
    /// A figure that could not be encoded.
    #[error("nothing written: {0}")]
    Encode(String),
    /// The page alone is missing, which can be made again.
    #[error("{error}; {TRACE_FILE} beside it is whole: `svcpath report {} --output html -o FILE` makes the page again", dir.display())]
    Page {
        /// The trace's folder.
        dir: PathBuf,
        /// Why it could not be written.
        error: Box<WriteError>,
    },
    /// The file system refused.
    #[error("cannot write {}: {source}: {}", file.display(), remedy(source))]
    File {
        /// Which file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl WriteError {
    /// The program's exit code.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Invalid(_) => 5,
            Self::Exists(_) | Self::OtherKind(_) | Self::InUse { .. } => 2,
            Self::Encode(_) | Self::Page { .. } | Self::File { .. } => 1,
        }
    }
}

/// Removes what a process that was killed has left of a file under a temporary name.
pub(super) fn remove_left_over(dir: &Path, name: &str) -> io::Result<()> {
    let prefix = format!(".{name}.");
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let left = entry.file_name();
        let number = left.to_str().and_then(|left| {
            let rest = left.strip_prefix(&prefix)?;
            rest.strip_suffix(".tmp")
        });
        if number.is_some_and(|number| number.parse::<u32>().is_ok()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// ` (pid 812)`.
fn who(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

/// What to do about an error of the file system.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some space or choose a folder on another disk"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "choose a folder that you may write to"
        }
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            "a file stands where a folder is needed; choose another folder"
        }
        io::ErrorKind::IsADirectory => "that is a folder; name a file",
        io::ErrorKind::NotFound => "make the folder first, or choose another",
        _ => "choose another folder",
    }
}

/// Refuses a folder that holds a run already, before hours are spent on another.
pub fn check_target(dir: &Path, force: bool) -> Result<(), WriteError> {
    check_run(dir, force, &[RUN_FILE], TRACE_FILE)
}

/// The same for a trace, before anything is attached; refuses a folder that another session writes to, whatever is to be
/// overwritten.
pub fn check_trace_target(dir: &Path, force: bool) -> Result<(), WriteError> {
    // What cannot be opened nobody writes, or is told below.
    if let Ok(Some(Held { by })) = lock::holder_of(&dir.join(JOURNEYS_FILE)) {
        let dir = dir.to_owned();
        return Err(WriteError::InUse { dir, pid: by });
    }
    check_run(dir, force, &[TRACE_FILE, JOURNEYS_FILE], RUN_FILE)
}

fn check_run(dir: &Path, force: bool, own: &[&str], other: &str) -> Result<(), WriteError> {
    let there = |name: &&str| dir.join(name).symlink_metadata().is_ok();
    if there(&other) {
        return Err(WriteError::OtherKind(dir.join(other)));
    }
    if !force && let Some(name) = own.iter().find(|name| there(name)) {
        return Err(WriteError::Exists(dir.join(name)));
    }
    check_folder(dir)
}

/// Text as it may stand in a file of ours and on a terminal, which takes some control characters for
/// commands: a process can give itself any name.
pub fn printable(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

/// Refuses a file that [`write_file`] would not write, before anything is spent on its contents.
pub fn check_file(file: &Path, force: bool) -> Result<(), WriteError> {
    let failed = |errno| {
        Err(WriteError::File {
            file: file.to_owned(),
            source: io::Error::from_raw_os_error(errno),
        })
    };
    match fs::metadata(file) {
        Ok(found) if found.is_dir() => return failed(libc::EISDIR),
        Ok(found) if found.is_file() && !force => {
            return Err(WriteError::Exists(file.to_owned()));
        }
        // A device or a pipe is written to as it is.
        Ok(found) if !found.is_file() => return Ok(()),
        _ => {}
    }
    if !folder_of(file).exists() {
        return failed(libc::ENOENT);
    }
    check_folder(folder_of(file))
}

/// Makes the folder and a file in it, and takes both away again: rights alone do not tell whether
/// that can be done.
fn check_folder(dir: &Path) -> Result<(), WriteError> {
    let made: Vec<&Path> = dir
        .ancestors()
        .take_while(|part| !part.as_os_str().is_empty() && !part.exists())
        .collect();
    let file = dir.join(format!(".svcpath.{}.tmp", std::process::id()));
    let outcome = fs::create_dir_all(dir).and_then(|()| {
        let mut content = File::create(&file)?;
        content.write_all(&[0; PROBE_BYTES])?;
        content.sync_all()
    });
    // What could not be made need not be removed.
    let _ = fs::remove_file(&file);
    for part in made {
        let _ = fs::remove_dir(part);
    }
    outcome.map_err(|source| WriteError::File {
        file: dir.to_owned(),
        source,
    })
}

fn folder_of(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Writes one file, all of it or nothing; a device or a pipe is written to as it is.
pub fn write_file(file: &Path, bytes: &[u8], force: bool) -> Result<(), WriteError> {
    check_file(file, force)?;
    let failed = |source| WriteError::File {
        file: file.to_owned(),
        source,
    };
    if fs::metadata(file).is_ok_and(|found| !found.is_file()) {
        let mut device = File::options().write(true).open(file).map_err(failed)?;
        return device.write_all(bytes).map_err(failed);
    }
    // Through a link to what it names, which is what would be overwritten otherwise.
    let target = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let Some(name) = target.file_name().and_then(|name| name.to_str()) else {
        return Err(failed(io::ErrorKind::InvalidFilename.into()));
    };
    let mut staged = Staged(Vec::new());
    staged.add(folder_of(&target), name, bytes)?;
    staged.publish()
}

/// Writes run.json, the `.hlog` files and report.html into `dir`, which is made if it is missing.
///
/// Everything goes to temporary names first and is renamed when all of it is on disk, run.json
/// last, so a folder with a run.json is complete. With `force` a run that is there is replaced.
pub fn write_all(run: &Run, dir: &Path, force: bool) -> Result<Written, WriteError> {
    read::validate(run)?;
    check_target(dir, force)?;
    let run_file = dir.join(RUN_FILE);
    // Everything is made before anything is written: what cannot be encoded costs no disk.
    let logs = hlog::logs(run).map_err(|error| WriteError::Encode(error.to_string()))?;
    let names: BTreeSet<String> = logs.iter().map(|(name, _)| name.clone()).collect();
    let mut files = logs;
    files.push((HTML_FILE.to_owned(), html::render(run).into_bytes()));
    let bytes = json::to_bytes(run).map_err(|error| WriteError::Encode(error.to_string()))?;
    files.push((RUN_FILE.to_owned(), bytes));

    fs::create_dir_all(dir).map_err(|source| WriteError::File {
        file: dir.to_owned(),
        source,
    })?;
    let mut staged = Staged(Vec::new());
    for (name, bytes) in &files {
        staged.add(dir, name, bytes)?;
    }
    staged.publish()?;
    if force {
        remove_stale_logs(dir, &names)?;
    }
    Ok(Written {
        run: run_file,
        html: dir.join(HTML_FILE),
        hlogs: names_in_order(&files, dir),
    })
}

fn names_in_order(files: &[(String, Vec<u8>)], dir: &Path) -> Vec<PathBuf> {
    files
        .iter()
        .filter(|(name, _)| is_log(name))
        .map(|(name, _)| dir.join(name))
        .collect()
}

fn is_log(name: &str) -> bool {
    name.starts_with("cell-") && Path::new(name).extension().is_some_and(|ext| ext == "hlog")
}

/// Logs of a run that was replaced would be read as logs of this one.
fn remove_stale_logs(dir: &Path, ours: &BTreeSet<String>) -> Result<(), WriteError> {
    let failed = |file: &Path| {
        let file = file.to_owned();
        move |source| WriteError::File { file, source }
    };
    for entry in fs::read_dir(dir).map_err(failed(dir))? {
        let entry = entry.map_err(failed(dir))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if is_log(name) && !ours.contains(name) {
            fs::remove_file(entry.path()).map_err(failed(&entry.path()))?;
        }
    }
    Ok(())
}

/// Files under temporary names; those not published are removed when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Staged(Vec<(PathBuf, PathBuf)>);

impl Staged {
    pub(super) fn add(&mut self, dir: &Path, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        let (temporary, target) = self.name(dir, name);
        let write = || -> io::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(bytes)?;
            // A full disk may show only here.
            file.sync_all()
        };
        write().map_err(|source| WriteError::File {
            file: target,
            source,
        })
    }

    /// The temporary name of a file that somebody else writes, and its own.
    pub(super) fn name(&mut self, dir: &Path, name: &str) -> (PathBuf, PathBuf) {
        let target = dir.join(name);
        let temporary = dir.join(format!(".{name}.{}.tmp", std::process::id()));
        self.0.push((temporary.clone(), target.clone()));
        (temporary, target)
    }

    pub(super) fn publish(&mut self) -> Result<(), WriteError> {
        while !self.0.is_empty() {
            let (temporary, target) = &self.0[0];
            fs::rename(temporary, target).map_err(|source| WriteError::File {
                file: target.clone(),
                source,
            })?;
            self.0.remove(0);
        }
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        for (temporary, _) in &self.0 {
            // Nothing more can be done about one that cannot be removed.
            let _ = fs::remove_file(temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .expect("a folder")
            .map(|entry| {
                entry
                    .expect("an entry")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        names.sort();
        names
    }

    #[test]
    fn everything_is_written_and_read_back() {
        let dir = tempfile::tempdir().expect("a folder");
        let into = dir.path().join("a/b");
        let written = write_all(&sample::run(), &into, false).expect("written");
        assert_eq!(read::read(&written.run).expect("valid"), sample::run());
        assert_eq!(written.hlogs.len(), sample::run().measurements.cells.len());
        let mut expected: Vec<String> = written
            .hlogs
            .iter()
            .chain([&written.run, &written.html])
            .map(|path| {
                path.file_name()
                    .expect("a name")
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        expected.sort();
        assert_eq!(names(&into), expected, "and nothing else stays");
    }

    #[test]
    fn a_run_is_not_overwritten_unless_told() {
        let dir = tempfile::tempdir().expect("a folder");
        write_all(&sample::run(), dir.path(), false).expect("written");
        let error = write_all(&sample::run(), dir.path(), false).expect_err("is there");
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().ends_with(
            "run.json is there already: write somewhere else, or overwrite it with --force"
        ));
        let mut smaller = sample::run();
        smaller.measurements.cells.truncate(1);
        write_all(&smaller, dir.path(), true).expect("replaced");
        assert_eq!(
            names(dir.path()),
            ["cell-iptables-legacy-100.hlog", "report.html", "run.json"]
        );
    }

    #[test]
    fn a_target_that_cannot_be_made_is_refused_at_once() {
        let dir = tempfile::tempdir().expect("a folder");
        check_target(&dir.path().join("a/b"), false).expect("can be made");
        assert!(names(dir.path()).is_empty(), "and nothing stays");
        fs::write(dir.path().join("file"), "").expect("written");
        for not in [
            PathBuf::from("/proc/foo"),
            dir.path().join("file"),
            dir.path().join("file/x"),
        ] {
            let error = check_target(&not, false).expect_err("cannot be made");
            assert_eq!(error.exit_code(), 1);
            assert_eq!(error.to_string().lines().count(), 1);
        }
        assert!(check_file(Path::new("/proc/foo"), false).is_err());
        check_file(Path::new("/dev/null"), false).expect("a device");
    }

    #[test]
    fn an_invalid_run_is_not_written() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut run = sample::run();
        run.measurements.cells[0].paths[0].flows.sent += 1;
        let error = write_all(&run, &dir.path().join("new"), false).expect_err("invalid");
        assert_eq!(error.exit_code(), 5);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn nothing_half_written_stays() {
        let dir = tempfile::tempdir().expect("a folder");
        // A folder in the place of a file: the rename fails after others were written.
        fs::create_dir_all(dir.path().join("report.html/x")).expect("a folder");
        let error = write_all(&sample::run(), dir.path(), false).expect_err("in the way");
        assert!(error.to_string().starts_with(&format!(
            "cannot write {}",
            dir.path().join("report.html").display()
        )));
        let left = names(dir.path());
        assert!(
            left.iter()
                .all(|name| !name.contains(".tmp") && name != RUN_FILE),
            "{left:?}"
        );
    }

    #[test]
    fn a_disk_that_fills_up_keeps_nothing() {
        use nix::mount::{MsFlags, mount};
        // A thread of its own: its mounts are seen by nobody else and end with it.
        let outcome = std::thread::spawn(|| {
            let dir = tempfile::tempdir().expect("a folder");
            let none: Option<&str> = None;
            let mounted = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
                .and_then(|()| mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))
                .and_then(|()| {
                    mount(
                        Some("tmpfs"),
                        dir.path(),
                        Some("tmpfs"),
                        MsFlags::empty(),
                        Some("size=128k"),
                    )
                });
            if mounted.is_err() {
                eprintln!("not permitted to mount: not tested");
                return;
            }
            let error = write_all(&sample::run(), dir.path(), false).expect_err("far too small");
            let message = error.to_string();
            assert!(message.contains("No space left on device"), "{message}");
            assert!(
                message.ends_with("free some space or choose a folder on another disk"),
                "{message}"
            );
            assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));
            nix::mount::umount(dir.path()).expect("unmounted");
        });
        outcome.join().expect("the thread's assertions hold");
    }

    #[test]
    fn a_full_disk_is_one_line_with_a_remedy() {
        let error = WriteError::File {
            file: "out/run.json".into(),
            source: io::Error::from_raw_os_error(28),
        };
        insta::assert_snapshot!(error, @"cannot write out/run.json: No space left on device (os error 28): free some space or choose a folder on another disk");
    }
}
