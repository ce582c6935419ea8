//! The program as its users meet it: bad input, signals, and the machine afterwards. Needs root.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_svcpath");

/// Laboratories one after the other: what one test leaves is not to be found by another.
fn machine() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests make network namespaces: run them as root"
    );
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn svcpath(arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(arguments);
    command
}

/// A small job that writes to `file`.
fn job(id: &str, file: &Path) -> Command {
    let mut command = svcpath(&["bench", "job", id, "--quick", "--flows", "20", "-o"]);
    command.arg(file);
    command
}

/// What a program did.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn end(command: &mut Command) -> Ended {
    let output = command
        .stdin(Stdio::null())
        .output()
        .expect("the program starts");
    Ended {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

/// It ends with this code and one line that has these words; nothing comes before the line.
#[track_caller]
fn fails(command: &mut Command, code: i32, words: &[&str]) {
    let ended = end(command);
    assert_eq!(ended.code, Some(code), "{command:?}: {ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "one line: {ended:?}");
    assert!(ended.stderr.starts_with("svcpath: "), "{ended:?}");
    for word in words {
        assert!(
            ended.stderr.contains(word),
            "'{word}' is missing: {ended:?}"
        );
    }
}

/// The command line parser refuses it.
#[track_caller]
fn misused(arguments: &[&str], words: &[&str]) {
    let ended = end(&mut svcpath(arguments));
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stderr.starts_with("error: "), "{ended:?}");
    for word in words {
        assert!(
            ended.stderr.contains(word),
            "'{word}' is missing: {ended:?}"
        );
    }
}

#[track_caller]
fn is_empty(dir: &Path) {
    let left: Vec<PathBuf> = fs::read_dir(dir)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Runs the program as nobody, even where nobody may not walk to it: by an open file.
fn as_nobody(arguments: &[&str]) -> Ended {
    let file = File::open(PROGRAM).expect("the program");
    let fd = file.as_raw_fd();
    let mut command = Command::new(format!("/proc/self/fd/{fd}"));
    command.args(arguments).uid(65534).gid(65534);
    // SAFETY: fcntl is async-signal-safe, and `file` is open until the child has been started.
    unsafe {
        command.pre_exec(move || {
            let file = std::os::fd::BorrowedFd::borrow_raw(fd);
            fcntl(file, FcntlArg::F_SETFD(FdFlag::empty()))?;
            Ok(())
        });
    }
    let ended = end(&mut command);
    drop(file);
    ended
}

/// Takes a capability from a root program.
fn without_capability(command: &mut Command, number: libc::c_ulong) {
    // SAFETY: prctl is a plain system call.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        });
    }
}

/// Puts a small empty file system over a folder, for this program alone.
fn with_tmpfs(command: &mut Command, dir: &Path) {
    let dir = std::ffi::CString::new(dir.to_str().expect("UTF-8")).expect("no NUL");
    // SAFETY: unshare and mount are plain system calls; nothing is allocated after the fork.
    unsafe {
        command.pre_exec(move || {
            let none: Option<&str> = None;
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
            mount(
                Some("tmpfs"),
                dir.as_c_str(),
                Some("tmpfs"),
                MsFlags::empty(),
                Some("size=64k"),
            )?;
            Ok(())
        });
    }
}

/// Runs the program with a small full disk at `dir`; standard output is what is left there.
fn on_full_disk(dir: &Path, arguments: &[&str]) -> Ended {
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg(r#"dir=$1; shift; "$0" "$@"; code=$?; ls -A "$dir"; exit $code"#)
        .arg(PROGRAM)
        .arg(dir)
        .args(arguments);
    with_tmpfs(&mut command, dir);
    end(&mut command)
}

/// Only these tools can be found.
fn with_tools(command: &mut Command, tools: &[&str], dir: &Path) {
    let path = std::env::var_os("PATH").expect("PATH");
    for tool in tools {
        let real = std::env::split_paths(&path)
            .map(|dir| dir.join(tool))
            .find(|file| file.is_file())
            .unwrap_or_else(|| panic!("{tool} is not installed"));
        fs::copy(real, dir.join(tool)).expect("a copy");
    }
    command.env("PATH", dir);
    // Looked into whatever PATH says.
    with_tmpfs(command, Path::new("/usr/sbin"));
}

#[test]
fn impossible_requests_are_refused_with_usage() {
    let dir = tempfile::tempdir().expect("a folder");
    misused(
        &["bench", "plan", "--modes", "userspace"],
        &[
            "userspace",
            "iptables-legacy, iptables-nft, ipvs or nftables",
        ],
    );
    misused(&["bench", "plan", "--place", "cloud"], &["host or vm"]);
    misused(&["bench", "job", "cell-nftables-7"], &["-o"]);
    misused(&["bench", "run", "--place", "vm"], &["--place"]);
    let part = dir.path().join("part.json");
    let part = part.to_str().expect("UTF-8");
    for (id, words) in [
        ("cell-userspace-7", "svcpath bench plan"),
        ("cell-nftables-0", "use 1 to 30000"),
    ] {
        misused(&["bench", "job", id, "-o", part], &[id, words]);
    }
    for services in ["0", "1000000"] {
        fails(
            &mut svcpath(&["bench", "plan", "--services", services]),
            2,
            &[services, "use 1 to 30000"],
        );
    }
    for flows in ["0", "1000000"] {
        fails(
            &mut svcpath(&["bench", "plan", "--flows", flows]),
            2,
            &[flows, "use 1 to 10000"],
        );
    }
    is_empty(dir.path());
}

#[test]
fn a_clock_that_is_not_this_machines_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut command = job("cell-nftables-100", &dir.path().join("part.json"));
    fails(
        command.args(["--clock", "virtual"]),
        2,
        &["--clock virtual", "does not count instructions"],
    );
    is_empty(dir.path());
}

#[test]
fn fewer_services_than_asked_for_are_announced() {
    let plan = ["bench", "plan", "--modes", "iptables-nft", "--services"];
    let ended = end(svcpath(&plan).args(["5000", "--place", "vm"]));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(
        ended.stderr.contains("iptables-nft stops at 2000 Services"),
        "{ended:?}"
    );
    assert!(
        ended.stdout.contains("flush-iptables-nft-2000"),
        "{ended:?}"
    );
    let ended = end(svcpath(&plan).arg("5000"));
    assert_eq!(ended.stderr, "");
}

#[test]
fn without_root_nothing_is_tried() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("part.json");
    let file = file.to_str().expect("UTF-8");
    let run = dir.path().join("run");
    let run = run.to_str().expect("UTF-8");
    for arguments in [
        &["bench", "job", "cell-nftables-100", "--quick", "-o", file][..],
        &["bench", "run", "--quick", "-o", run],
        &["lab", "clean"],
        &["doctor"],
    ] {
        let ended = as_nobody(arguments);
        assert_eq!(ended.code, Some(3), "{arguments:?}: {ended:?}");
        assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
        assert!(ended.stderr.starts_with("svcpath: "), "{ended:?}");
        assert!(ended.stderr.contains("needs root"), "{ended:?}");
        assert!(ended.stderr.contains("sudo"), "{ended:?}");
    }
    // What only reads and computes needs no rights.
    assert_eq!(as_nobody(&["bench", "plan"]).code, Some(0));
    is_empty(dir.path());
}

#[test]
fn a_missing_capability_is_named() {
    let _machine = machine();
    let dir = tempfile::tempdir().expect("a folder");
    for (number, name) in [(12, "CAP_NET_ADMIN"), (39, "CAP_BPF")] {
        let mut command = job("cell-nftables-100", &dir.path().join("part.json"));
        without_capability(&mut command, number);
        fails(&mut command, 3, &[name]);
    }
    is_empty(dir.path());
}

#[test]
fn what_the_kernel_lacks_is_said_before_anything_is_built() {
    let _machine = machine();
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("part.json");
    let run = dir.path().join("run");
    if tracer::kernel::has_ipvs() {
        eprintln!("this kernel has IPVS: its absence is not tested");
    } else {
        let remedy = ["IPVS", "--modes", "cargo xtask run --place vm"];
        fails(&mut job("cell-ipvs-100", &file), 4, &remedy);
        fails(
            &mut job("switch-iptables-legacy-ipvs-100", &file),
            4,
            &remedy,
        );
        let mut command = svcpath(&["bench", "run", "--quick", "-o"]);
        fails(command.arg(&run), 4, &remedy);
    }
    let btf = Path::new("/sys/kernel/btf");
    let words = ["/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF=y"];
    let mut command = job("cell-nftables-100", &file);
    with_tmpfs(&mut command, btf);
    fails(&mut command, 4, &words);
    let mut command = svcpath(&["bench", "run", "--quick", "--modes", "nftables", "-o"]);
    command.arg(&run);
    with_tmpfs(&mut command, btf);
    fails(&mut command, 4, &words);
    let mut command = svcpath(&["doctor"]);
    with_tmpfs(&mut command, btf);
    let ended = end(&mut command);
    assert_eq!(ended.code, Some(4), "{ended:?}");
    assert!(
        ended.stdout.lines().any(
            |line| line.starts_with("no   BTF") && words.iter().all(|word| line.contains(word))
        ),
        "{ended:?}"
    );
    is_empty(dir.path());
}

#[test]
fn doctor_tries_every_boundary() {
    let _machine = machine();
    let ended = end(&mut svcpath(&["doctor"]));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let ended = end(&mut svcpath(&["doctor", "--output", "json"]));
    let checks: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    let hooks = checks
        .as_array()
        .expect("a list")
        .iter()
        .find(|check| check["what"] == "hooks tier")
        .expect("the tier is examined");
    assert_eq!(hooks["available"], true);
    let detail = hooks["detail"].as_str().expect("text");
    assert!(!detail.starts_with("0 netfilter"), "{detail}");
}

#[test]
fn a_missing_tool_is_named_with_its_package() {
    let _machine = machine();
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("part.json");
    for (id, tools, words) in [
        (
            "cell-nftables-100",
            &["ip"][..],
            ["nft is not installed", "apt-get install nftables"],
        ),
        (
            "cell-iptables-legacy-100",
            &["ip", "nft"],
            [
                "iptables-legacy-restore is not installed",
                "apt-get install iptables",
            ],
        ),
    ] {
        let bin = tempfile::tempdir().expect("a folder");
        let mut command = job(id, &file);
        with_tools(&mut command, tools, bin.path());
        fails(&mut command, 1, &words);
    }
    is_empty(dir.path());
}

#[test]
fn output_that_cannot_be_written_is_refused_at_once() {
    let _machine = machine();
    let dir = tempfile::tempdir().expect("a folder");
    let nowhere = dir.path().join("missing/part.json");
    fails(
        &mut job("cell-nftables-100", &nowhere),
        1,
        &["missing/part.json", "make the folder first"],
    );
    fails(
        &mut job("cell-nftables-100", dir.path()),
        1,
        &["name a file"],
    );
    is_empty(dir.path());
    fs::write(dir.path().join("file"), "").expect("written");
    let mut command = svcpath(&["bench", "run", "--quick", "--modes", "nftables", "-o"]);
    command.arg(dir.path().join("file"));
    fails(&mut command, 1, &["a file stands where a folder is needed"]);
}

#[test]
fn a_full_disk_keeps_no_part() {
    let _machine = machine();
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("part.json");
    let file = file.to_str().expect("UTF-8");
    let arguments = ["bench", "job", "cell-nftables-100", "--quick", "-o", file];
    let ended = on_full_disk(dir.path(), &[&arguments[..], &["--flows", "20"]].concat());
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let last = ended.stderr.lines().last().unwrap_or_default();
    assert!(
        last.starts_with("svcpath: ") && last.contains(file) && last.contains("No space left"),
        "{ended:?}"
    );
    assert!(last.contains("free some space"), "{last}");
    assert_eq!(ended.stdout, "", "something was left there");
}

#[test]
fn damaged_runs_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("run.json");
    let report = || {
        let mut command = svcpath(&["report"]);
        command.arg(&file);
        command
    };
    fails(&mut report(), 1, &["cannot read", "run.json"]);
    let mut folder = svcpath(&["report"]);
    fails(
        folder.arg(dir.path()),
        1,
        &["neither run.json nor trace.json"],
    );
    for (text, word) in [
        ("garbage", "not JSON"),
        ("", "not JSON"),
        (r#"{"format": "svcpath.run/1", "environ"#, "not JSON"),
        (r#"{"format": "svcpath.run/999"}"#, "svcpath.run/999"),
        ("{}", "not a run"),
        ("[]", "not a run"),
    ] {
        fs::write(&file, text).expect("written");
        fails(&mut report(), 5, &["run.json", word]);
    }
    fs::write(&file, b"\xff\xfe").expect("written");
    fails(&mut report(), 5, &["run.json", "not JSON"]);
}

#[test]
fn damaged_parts_make_no_run() {
    let dir = tempfile::tempdir().expect("a folder");
    let environment = dir.path().join("environment.json");
    let into = dir.path().join("run");
    let assemble = || {
        let mut command = svcpath(&[
            "bench", "assemble", "--quick", "--modes", "nftables", "--parts",
        ]);
        command
            .arg(dir.path())
            .arg("--environment")
            .arg(&environment);
        command.arg("-o").arg(&into);
        command
    };
    fails(&mut assemble(), 1, &["environment.json"]);
    fs::write(&environment, "{").expect("written");
    fails(&mut assemble(), 5, &["environment.json"]);
    fs::write(
        &environment,
        r#"{"started": "2026-01-01T00:00:00Z", "duration_s": 1.0, "place": "host",
            "kernel": "k", "host_kernel": "k", "cpus": 1}"#,
    )
    .expect("written");
    let part = "cell-nftables-100.json";
    fails(&mut assemble(), 1, &[part]);
    fs::write(dir.path().join(part), "{").expect("written");
    fails(&mut assemble(), 5, &[part, "bench job"]);
    assert!(!into.exists());
}

/// Runs the program with a standard output whose reader has gone away.
#[track_caller]
fn is_silent_without_reader(command: &mut Command) {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let output = command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .expect("the program runs");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let _machine = machine();
    for arguments in [
        &["bench", "plan"][..],
        &["bench", "plan", "--output", "json"],
        &["doctor"],
        &["lab", "clean"],
        &["--help"],
    ] {
        is_silent_without_reader(&mut svcpath(arguments));
    }
    let full = File::options()
        .write(true)
        .open("/dev/full")
        .expect("/dev/full");
    let output = svcpath(&["bench", "plan"])
        .stdout(full)
        .output()
        .expect("the program runs");
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.starts_with("svcpath: cannot write to standard output: No space left"),
        "{stderr}"
    );
}

#[test]
fn every_help_has_an_example_and_the_first_the_exit_codes() {
    let help = |arguments: &[&str]| {
        let ended = end(&mut svcpath(&[arguments, &["--help"]].concat()));
        assert_eq!(ended.code, Some(0), "{ended:?}");
        ended.stdout
    };
    for arguments in [
        &[][..],
        &["bench"],
        &["bench", "run"],
        &["bench", "plan"],
        &["bench", "job"],
        &["bench", "assemble"],
        &["report"],
        &["lab"],
        &["lab", "clean"],
        &["doctor"],
    ] {
        let text = help(arguments);
        assert!(text.contains("Example"), "{arguments:?}: {text}");
    }
    let codes = help(&[]).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        codes.contains(
            "0 fine, 1 failure, 2 usage, 3 not permitted, 4 the kernel lacks it, 5 invalid run; \
             130 and 143 after SIGINT and SIGTERM"
        ),
        "{codes}"
    );
}

/// What a run could leave on the machine.
#[derive(Debug, PartialEq, Eq)]
struct Machine {
    namespaces: String,
    links: BTreeSet<String>,
    rules: Vec<String>,
    programs: BTreeSet<(u32, String)>,
}

impl Machine {
    fn look() -> Self {
        Self {
            namespaces: said_by("ip", &["netns", "list"]),
            links: said_by("ip", &["-o", "link"])
                .lines()
                .filter_map(|line| line.split(": ").nth(1).map(str::to_owned))
                .collect(),
            rules: vec![
                rules(&said_by("iptables-legacy-save", &[])),
                rules(&said_by("iptables-nft-save", &[])),
                said_by("nft", &["--stateless", "list", "ruleset"]),
            ],
            programs: aya::programs::loaded_programs()
                .filter_map(Result::ok)
                .map(|program| {
                    (
                        program.id(),
                        String::from_utf8_lossy(program.name()).into_owned(),
                    )
                })
                .collect(),
        }
    }

    /// Is everything as it was? Programs of others may have ended meanwhile.
    fn is_as(&self, before: &Self) -> bool {
        self.namespaces == before.namespaces
            && self.links == before.links
            && self.rules == before.rules
            && self.programs.is_subset(&before.programs)
    }
}

fn said_by(tool: &str, arguments: &[&str]) -> String {
    let ended = end(Command::new(tool).args(arguments));
    assert_eq!(ended.code, Some(0), "{tool}: {ended:?}");
    ended.stdout
}

/// Saved rules without comments, which have the date, and without counters.
fn rules(saved: &str) -> String {
    saved
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split(" [").next().unwrap_or(line))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Processes that a laboratory of process `pid` has started and that still live.
fn tools_of(pid: u32) -> Vec<String> {
    let mark = format!("XTABLES_LOCKFILE=/run/svcpath-xtables-{pid}.lock");
    fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let environment = fs::read(path.join("environ")).ok()?;
            environment
                .split(|byte| *byte == 0)
                .any(|variable| variable == mark.as_bytes())
                .then(|| fs::read_to_string(path.join("comm")).unwrap_or_default())
        })
        .collect()
}

/// Waits until the machine is as before. The kernel takes namespaces down in its own time.
#[track_caller]
fn becomes(before: &Machine, pid: u32, lock_may_stay: bool) {
    let lock = PathBuf::from(format!("/run/svcpath-xtables-{pid}.lock"));
    let begin = Instant::now();
    loop {
        let now = Machine::look();
        let tools = tools_of(pid);
        let lock_stays = lock.exists() && !lock_may_stay;
        if now.is_as(before) && tools.is_empty() && !lock_stays {
            return;
        }
        assert!(
            begin.elapsed() < Duration::from_secs(10),
            "left behind: tools {tools:?}, lock file {lock_stays}\nbefore {before:#?}\nnow {now:#?}"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// How a program ended that was sent a signal.
#[derive(Debug)]
struct Stopped {
    pid: u32,
    status: std::process::ExitStatus,
    stderr: String,
    /// From the signal to the end.
    took: Duration,
}

/// Sends a signal when the program says `word`; to all its processes, as a terminal does, or to
/// itself alone.
fn stop(command: &mut Command, word: &str, signal: Option<Signal>, group: bool) -> Stopped {
    let mut child = command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let pid = child.id();
    let target = Pid::from_raw(i32::try_from(pid).expect("a pid"));
    let mut lines = BufReader::new(child.stderr.take().expect("a pipe"));
    let mut stderr = String::new();
    while !stderr.contains(word) {
        let read = lines.read_line(&mut stderr).expect("a line");
        assert!(read > 0, "'{word}' was never said: {stderr}");
    }
    if let Some(signal) = signal {
        let sent = if group {
            killpg(target, signal)
        } else {
            kill(target, signal)
        };
        sent.expect("the program lives");
    }
    let begin = Instant::now();
    lines.read_to_string(&mut stderr).expect("UTF-8");
    let status = child.wait().expect("it ends");
    Stopped {
        pid,
        status,
        stderr,
        took: begin.elapsed(),
    }
}

#[test]
fn the_machine_is_as_before_whatever_the_end() {
    let _machine = machine();
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("part.json");
    // Whatever the first look-ups load stays loaded.
    let _ = Machine::look();
    let before = Machine::look();

    let ended = stop(&mut job("cell-nftables-100", &file), "progress", None, true);
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    becomes(&before, ended.pid, false);
    let part: Value =
        serde_json::from_slice(&fs::read(&file).expect("the part")).expect("the part is JSON");
    assert_eq!(part["part"]["cell"]["services"], 100);
    fs::remove_file(&file).expect("removed");

    // Long enough that the signal comes in the middle.
    let traffic = || {
        let mut command = svcpath(&["bench", "job", "cell-iptables-legacy-100", "--quick", "-o"]);
        command.arg(&file).args(["--flows", "500"]);
        command
    };
    let rules = || job("cell-iptables-nft-2000", &file);
    for (mut command, word, signal, group) in [
        (traffic(), "attaching probes", Signal::SIGINT, false),
        (traffic(), "traffic", Signal::SIGINT, true),
        (traffic(), "traffic", Signal::SIGTERM, false),
        (traffic(), "building the node", Signal::SIGTERM, false),
        (rules(), "applying rules", Signal::SIGINT, false),
        (rules(), "applying rules", Signal::SIGINT, true),
    ] {
        let ended = stop(&mut command, word, Some(signal), group);
        let code = 128 + signal as i32;
        assert_eq!(ended.status.code(), Some(code), "{word}: {ended:?}");
        assert!(ended.took < Duration::from_secs(3), "{word}: {ended:?}");
        let last = ended.stderr.lines().last().unwrap_or_default();
        assert!(
            last.starts_with(&format!("svcpath: stopped by {signal}")),
            "{word}: {ended:?}"
        );
        assert!(!ended.stderr.contains("reading the probes"), "{ended:?}");
        becomes(&before, ended.pid, false);
        is_empty(dir.path());
    }

    for (mut command, word) in [(traffic(), "traffic"), (rules(), "applying rules")] {
        let ended = stop(&mut command, word, Some(Signal::SIGKILL), false);
        assert_eq!(ended.status.signal(), Some(9), "{ended:?}");
        // Only the lock file may stay, for the next start to remove.
        becomes(&before, ended.pid, true);
        is_empty(dir.path());
        let cleaned = end(&mut svcpath(&["lab", "clean"]));
        assert_eq!(cleaned.code, Some(0), "{cleaned:?}");
        assert!(
            cleaned
                .stdout
                .lines()
                .all(|line| line == "nothing to remove" || line.starts_with("removed ")),
            "{cleaned:?}"
        );
        assert!(!cleaned.stdout.is_empty());
        becomes(&before, ended.pid, false);
    }
}

#[test]
fn a_run_is_written_read_and_not_overwritten() {
    let _machine = machine();
    let outer = tempfile::tempdir().expect("a folder");
    let dir = outer.path().join("new/run");
    let bench = || {
        let mut command = svcpath(&["bench", "run", "--quick", "--modes", "nftables"]);
        command.args(["--services", "20", "--flows", "20", "-o"]);
        command.arg(&dir);
        command
    };

    let stopped = stop_early(&mut bench());
    assert_eq!(stopped.code(), Some(130), "{stopped:?}");
    is_empty(outer.path());

    let ended = end(&mut bench());
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(
        ended.stdout.contains(&format!(
            "report  {}",
            dir.join("report.html").to_str().expect("UTF-8")
        )),
        "{ended:?}"
    );
    let run_file = dir.join("run.json");
    let run = tracer::report::read::read(&run_file).expect("a valid run");
    assert_eq!(run.measurements.cells.len(), 1);
    assert_eq!(run.measurements.cells[0].services, 20);
    assert_eq!(run.measurements.faults.len(), 2);
    let names: BTreeSet<String> = fs::read_dir(&dir)
        .expect("the folder")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    assert_eq!(
        names,
        ["cell-nftables-20.hlog", "report.html", "run.json"]
            .map(str::to_owned)
            .into()
    );
    let beside = fs::read_dir(dir.parent().expect("a parent"))
        .expect("the folder")
        .count();
    assert_eq!(beside, 1, "something stayed beside the run");

    let begin = Instant::now();
    fails(&mut bench(), 2, &["run.json is there already", "--force"]);
    assert!(begin.elapsed() < Duration::from_secs(2), "refused too late");

    reports(&dir, outer.path());

    let mut wrong: Value =
        serde_json::from_slice(&fs::read(&run_file).expect("read")).expect("JSON");
    let sent = &mut wrong["measurements"]["cells"][0]["paths"][0]["flows"]["sent"];
    *sent = (sent.as_u64().expect("a number") + 1).into();
    let unbalanced = outer.path().join("unbalanced.json");
    fs::write(&unbalanced, wrong.to_string()).expect("written");
    let mut command = svcpath(&["report"]);
    fails(command.arg(&unbalanced), 5, &["unbalanced.json", "invalid"]);
    let whole = fs::read(&run_file).expect("read");
    let truncated = outer.path().join("truncated.json");
    fs::write(&truncated, &whole[..whole.len() / 2]).expect("written");
    let mut command = svcpath(&["report"]);
    fails(command.arg(&truncated), 5, &["truncated.json", "not JSON"]);
}

/// Interrupts a run as soon as its laboratory has programs loaded or a second has passed.
fn stop_early(command: &mut Command) -> std::process::ExitStatus {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts");
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
    let begin = Instant::now();
    // A namespace file among its open files: the laboratory is being built.
    let files = format!("/proc/{pid}/fd");
    let builds = || {
        fs::read_dir(&files).is_ok_and(|entries| {
            entries.filter_map(Result::ok).any(|entry| {
                fs::read_link(entry.path())
                    .is_ok_and(|target| target.to_string_lossy().starts_with("net:["))
            })
        })
    };
    while !builds() {
        assert!(begin.elapsed() < Duration::from_secs(10), "it never began");
        std::thread::sleep(Duration::from_millis(5));
    }
    kill(pid, Signal::SIGINT).expect("the program lives");
    child.wait().expect("it ends")
}

/// The run in every form, to standard output and to files.
fn reports(dir: &Path, scratch: &Path) {
    for (form, begins) in [
        ("text", ""),
        ("markdown", ""),
        ("html", "<!DOCTYPE html>"),
        ("json", "{"),
    ] {
        let report = || {
            let mut command = svcpath(&["report", "--output", form]);
            command.arg(dir);
            command
        };
        let shown = end(&mut report());
        assert_eq!(shown.code, Some(0), "{shown:?}");
        assert!(
            shown
                .stdout
                .to_ascii_lowercase()
                .starts_with(&begins.to_ascii_lowercase()),
            "{form}"
        );
        assert!(shown.stdout.contains("nftables"), "{form}");
        is_silent_without_reader(&mut report());
        let file = scratch.join(form);
        let mut command = report();
        let written = end(command.arg("-o").arg(&file));
        assert_eq!(written.code, Some(0), "{written:?}");
        assert_eq!(fs::read_to_string(&file).expect("the report"), shown.stdout);
        let mut command = report();
        let words = ["is there already", "--force"];
        fails(command.arg("-o").arg(&file), 2, &words);
        let mut command = report();
        let forced = end(command.arg("-o").arg(&file).arg("--force"));
        assert_eq!(forced.code, Some(0), "{forced:?}");
    }
    let full = tempfile::tempdir().expect("a folder");
    let file = full.path().join("report.html");
    let (dir, file) = (dir.to_str().expect("UTF-8"), file.to_str().expect("UTF-8"));
    let ended = on_full_disk(
        full.path(),
        &["report", dir, "--output", "html", "-o", file],
    );
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
    assert!(ended.stderr.contains("No space left"), "{ended:?}");
    assert_eq!(ended.stdout, "", "something was left there");
}

#[test]
fn the_plan_is_json() {
    let ended = end(&mut svcpath(&[
        "bench", "plan", "--quick", "--output", "json",
    ]));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let plan: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    let jobs = plan["jobs"].as_array().expect("a list");
    assert_eq!(
        jobs.len(),
        13,
        "two cells and a flush a mode, and the switch"
    );
    assert!(jobs.iter().all(|job| job["id"].is_string()));
}
