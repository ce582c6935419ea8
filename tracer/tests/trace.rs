//! `svcpath trace` as its users meet it, on a node of the laboratory: bad input, signals, files. Needs
//! root; changes nothing outside namespaces of its own.

use std::fs;
use std::io::Read as _;
use std::net::UdpSocket;
use std::os::fd::FromRawFd as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::pty::openpty;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tracer::report::{Recorded, read, trace as report_trace};
use tracer::rules::Mode;
use tracer::scenario::node::TestNode;

const PROGRAM: &str = env!("CARGO_BIN_EXE_svcpath");
/// Longer than anything here takes on a machine under load.
const PATIENCE: Duration = Duration::from_secs(30);

/// A node with the rules of 10 Services, without traffic.
fn node() -> TestNode {
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests make network namespaces: run them as root"
    );
    let node = TestNode::build(10, 3).expect("a laboratory");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    tokio::task::LocalSet::new()
        .block_on(&runtime, node.apply(Mode::Nftables))
        .expect("rules");
    node
}

fn trace(node: &TestNode, arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .arg("trace")
        .args(["--netns", &node.lab.node().path()]);
    command.args(arguments);
    command
}

#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn end(command: &mut Command) -> Ended {
    let output = command.stdin(Stdio::null()).output().expect("it starts");
    Ended {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

/// It is refused before anything is attached, which is announced.
#[track_caller]
fn refused(command: &mut Command, code: i32, words: &[&str]) {
    let ended = end(command);
    assert_eq!(ended.code, Some(code), "{ended:?}");
    assert_eq!(ended.stdout, "", "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "one line: {ended:?}");
    assert!(!ended.stderr.contains("tracing"), "{ended:?}");
    for word in words {
        assert!(
            ended.stderr.contains(word),
            "'{word}' is missing: {ended:?}"
        );
    }
}

/// `demo/svc-3` of the laboratory's third Service, whatever it is called.
fn name_of(node: &TestNode, index: usize) -> String {
    let service = &node.cluster.services[index];
    format!("{}/{}", service.namespace, service.name)
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_attached() {
    let node = node();
    let dir = tempfile::tempdir().expect("a folder");
    let there = dir.path().join("trace.json");
    fs::write(&there, "{}").expect("written");
    let folder = dir.path().to_str().expect("UTF-8");
    refused(
        &mut trace(&node, &["-o", folder]),
        2,
        &["trace.json is there already", "--force"],
    );
    fs::rename(&there, dir.path().join("run.json")).expect("renamed");
    refused(
        &mut trace(&node, &["-o", folder, "--force"]),
        2,
        &["run of another kind"],
    );
    refused(
        &mut trace(&node, &["-o", "/proc/there/is/none"]),
        1,
        &["/proc/there/is/none", "make the folder first"],
    );
    let ready = dir.path().join("none/ready");
    refused(
        &mut trace(&node, &["--ready-file", ready.to_str().expect("UTF-8")]),
        1,
        &["none/ready", "make the folder first"],
    );
    refused(
        &mut trace(&node, &["--service", "no/such"]),
        2,
        &[
            "no such Service (of 10 that they name)",
            "--service no/such",
            "svcpath rules parse",
        ],
    );
    let name = name_of(&node, 0);
    let typo = format!("{name}x");
    refused(
        &mut trace(&node, &["--service", &typo, "--node-port", "1"]),
        2,
        &[
            &format!("--service {typo} matches nothing; nearest: {name}"),
            "--node-port 1 ",
        ],
    );
    let mut elsewhere = Command::new(PROGRAM);
    elsewhere.args(["trace", "--netns", "/proc/self/ns/net"]);
    // SAFETY: unshare is a plain system call.
    unsafe {
        elsewhere.pre_exec(|| Ok(unshare(CloneFlags::CLONE_NEWNET)?));
    }
    refused(
        &mut elsewhere,
        1,
        &["no rules of kube-proxy", "--netns", "/proc/PID/ns/net"],
    );
}

#[test]
fn a_packet_stream_is_not_for_terminals() {
    let node = node();
    let terminal = openpty(None, None).expect("a terminal");
    let mut command = trace(&node, &["--output", "pcapng", "--duration", "100ms"]);
    let child = command
        .stdout(terminal.slave)
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("wireshark"), "{said}");
}

#[test]
fn a_choice_that_matches_nothing_is_said_beside_one_that_does() {
    let node = node();
    let name = name_of(&node, 1);
    let arguments = [
        "--service",
        &name,
        "--service",
        "no/such",
        "--duration",
        "100ms",
    ];
    let ended = end(&mut trace(&node, &arguments));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(
        ended.stderr.contains(&format!("tracing {name}:")),
        "{ended:?}"
    );
    assert!(
        ended.stderr.contains("--service no/such matches nothing"),
        "{ended:?}"
    );
}

#[test]
fn a_commands_own_end_is_told_on() {
    let node = node();
    for (script, limit, code) in [
        ("exit 7", &[][..], 7),
        ("kill -9 $$", &[], 137),
        ("exec sleep 60", &["--duration", "200ms"], 0),
        (
            "trap 'exit 5' TERM; while :; do sleep 0.02; done",
            &["--duration", "300ms"],
            5,
        ),
    ] {
        let mut command = trace(&node, limit);
        let begin = Instant::now();
        let ended = end(command.args(["--", "sh", "-c", script]));
        assert_eq!(ended.code, Some(code), "{script}: {ended:?}");
        assert!(ended.stdout.contains("0 Services with flows"), "{ended:?}");
        assert!(begin.elapsed() < PATIENCE);
    }
}

#[test]
fn what_programs_read_holds_nothing_of_the_command() {
    let node = node();
    let ended = end(&mut trace(
        &node,
        &["--output", "json", "--", "echo", "hello"],
    ));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stderr.contains("hello\n"), "{ended:?}");
    for line in ended.stdout.lines() {
        let json: Value = serde_json::from_str(line).expect("each line is JSON");
        assert!(json["event"].is_string(), "{line}");
    }
    assert!(ended.stdout.contains("\"event\":\"summary\""), "{ended:?}");
}

/// Asks a Service over UDP, each time from another port, until it is told to stop. Waits for the first request.
fn asking(node: &TestNode) -> (Arc<AtomicBool>, JoinHandle<()>) {
    let (service, node) = (node.vip(1), node.lab.node().clone());
    let stop = Arc::new(AtomicBool::new(false));
    let told = stop.clone();
    let (tell, asked) = channel();
    let client = std::thread::spawn(move || {
        let ask = move || {
            while !told.load(Ordering::Relaxed) {
                let socket = UdpSocket::bind("0.0.0.0:0").expect("binds");
                socket.send_to(b"1 x\n", service).expect("sends");
                let _ = tell.send(());
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        node.run(ask).expect("enters");
    });
    asked.recv().expect("it asks");
    (stop, client)
}

/// The summary and the times of journeys, of a session of so many ms.
fn limited(node: &TestNode, ms: u64) -> (Value, Vec<u64>) {
    let limit = format!("{ms}ms");
    let arguments = ["--duration", &limit, "--journeys", "--output", "json"];
    let ended = end(&mut trace(node, &arguments));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let lines = ended.stdout.lines();
    let events: Vec<Value> = lines
        .map(|line| serde_json::from_str(line).expect("each line is JSON"))
        .collect();
    let of = |event: &'static str| events.iter().filter(move |one| one["event"] == event);
    let times = of("journey").map(|one| one["time_ns"].as_u64().expect("a time"));
    let summary = of("summary").next().expect("a summary");
    (summary.clone(), times.collect())
}

/// kube-proxy in IPVS mode runs ipset for each entry: people get lines of many, programs each of them.
#[test]
fn what_a_program_changes_in_a_row_is_told_together() {
    const ENTRIES: u64 = 30;
    let node = node();
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().to_str().expect("UTF-8");
    // Long-lived, as kube-proxy is: the shell is the parent of each.
    let script = format!(
        "ipset create SOME hash:ip; for n in $(seq {ENTRIES}); do ipset add SOME 192.0.2.$n; done; ipset destroy SOME"
    );
    let path = format!("--net={}", node.lab.node().path());
    let changing = ["--", "nsenter", &path, "sh", "-c", &script];
    let ended = end(trace(&node, &["-o", out]).args(changing));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let lines: Vec<&str> = ended.stdout.lines().collect();
    let lines = lines.iter().filter(|line| line.contains("  ipset ("));
    let times = lines.clone().map(|line| {
        let times = line.split_once(" times, parent sh, pid ");
        let number = times.and_then(|(before, _)| before.rsplit('(').next());
        number.map_or(1, |number| number.parse::<u64>().expect("a number"))
    });
    // The first at once, and then one line a second.
    assert_eq!(times.sum::<u64>(), ENTRIES + 2, "{ended:?}");
    assert!(lines.count() < 10, "{ended:?}");
    let Ok(Recorded::Trace(read)) = read::recorded(dir.path()) else {
        panic!("a trace was kept");
    };
    assert_eq!(read.run.summary.rule_changes.len() as u64, ENTRIES + 2);
    let told = report_trace::changes(&read.run.summary, 50);
    let begin = "rule changes 1 to ";
    assert!(told.len() < 10 && told[0].starts_with(begin), "{told:?}");
}

/// Attaching and ending take some tenths of a second, which are no part of the time that was watched.
#[test]
fn a_session_is_as_long_as_was_asked_and_tells_of_that_time_alone() {
    const MS: u64 = 300;
    let node = node();
    let (stop, client) = asking(&node);
    let sessions: Vec<(Value, Vec<u64>)> = (0..3).map(|_| limited(&node, MS)).collect();
    stop.store(true, Ordering::Relaxed);
    client.join().expect("it asked");
    let mut longest = Vec::new();
    for (summary, times) in &sessions {
        let of = |name: &str| summary[name].as_u64().expect("a number");
        let (began, took) = (of("started_ns"), of("duration_ns"));
        assert!(!times.is_empty(), "{summary}");
        let outside = times
            .iter()
            .filter(|time| !(began..=began + took).contains(time));
        assert_eq!(outside.count(), 0, "{summary}");
        assert!(took >= MS * 1_000_000, "{took} ns");
        longest.push(took);
    }
    // Whoever else is at work may hold up one of them.
    let took = longest.iter().min().expect("three");
    assert!(*took < (MS + 60) * 1_000_000, "{longest:?}");
}

/// Starts it and waits until the probes are attached.
fn started(command: &mut Command, dir: &Path) -> Child {
    let ready = dir.join("ready");
    let child = command
        .arg("--ready-file")
        .arg(&ready)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    // A command of its own stands last.
    let child = child.spawn().expect("it starts");
    let begin = Instant::now();
    while !ready.exists() {
        assert!(begin.elapsed() < PATIENCE, "it never attached");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

fn interrupt(child: &Child) {
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
    kill(pid, Signal::SIGINT).expect("it lives");
}

#[test]
fn an_interrupted_session_ends_in_order() {
    let node = node();
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("out");
    let mut command = trace(&node, &["-o", out.to_str().expect("UTF-8")]);
    let child = started(&mut command, dir.path());
    interrupt(&child);
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stdout).contains("Services with flows"));
    assert!(matches!(read::recorded(&out), Ok(Recorded::Trace(_))));
}

/// Whatever is to be overwritten; and of a session that has ended nothing stands in the way of the next one.
#[test]
fn the_folder_of_a_session_that_still_runs_is_refused() {
    let node = node();
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("out");
    let folder = out.to_str().expect("UTF-8");
    let mut child = started(&mut trace(&node, &["-o", folder]), dir.path());
    let before = names(&out);
    // Room for what it finds.
    let reserved = format!(".trace.json.{}.tmp", child.id());
    assert_eq!(before, [reserved.as_str(), "journeys.jsonl"]);
    let pid = format!("(pid {})", child.id());
    for force in [&["--force"][..], &[]] {
        let mut command = trace(&node, &["-o", folder]);
        refused(command.args(force), 2, &["still runs", &pid, folder]);
    }
    assert_eq!(names(&out), before);
    child.kill().expect("it lives");
    child.wait().expect("it ends");
    assert_eq!(names(&out), before);
    let limit = ["-o", folder, "--force", "--duration", "100ms"];
    let ended = end(&mut trace(&node, &limit));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(names(&out), ["journeys.jsonl", "report.html", "trace.json"]);
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a folder");
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name();
    let names = entries.map(|entry| name(entry).into_string().expect("UTF-8"));
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn a_second_interrupt_kills_a_command_that_does_not_end() {
    let node = node();
    let dir = tempfile::tempdir().expect("a folder");
    let armed = dir.path().join("armed");
    let ready = dir.path().join("ready");
    let script = format!("trap '' INT TERM; echo >{}; exec sleep 60", armed.display());
    let mut command = trace(&node, &["--ready-file", ready.to_str().expect("UTF-8")]);
    command.args(["--", "sh", "-c", &script]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let begin = Instant::now();
    while !armed.exists() {
        assert!(begin.elapsed() < PATIENCE, "the command never began");
        std::thread::sleep(Duration::from_millis(5));
    }
    interrupt(&child);
    std::thread::sleep(Duration::from_millis(300));
    assert!(
        child.try_wait().expect("its state").is_none(),
        "once is a request"
    );
    interrupt(&child);
    let status = child.wait().expect("it ends");
    assert_eq!(status.code(), Some(137), "{:?}", status.signal());
    assert!(
        begin.elapsed() < Duration::from_secs(9),
        "nobody waited for the command's patience"
    );
}

#[test]
fn a_reader_that_goes_away_is_no_failure_and_costs_no_file() {
    let node = node();
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("out");
    let mut command = trace(
        &node,
        &["-o", out.to_str().expect("UTF-8"), "--duration", "300ms"],
    );
    let mut child = started(&mut command, dir.path());
    drop(child.stdout.take());
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    assert!(matches!(read::recorded(&out), Ok(Recorded::Trace(_))));
}

/// Puts an empty file system of 48 kB over a folder, for this program alone.
fn with_tmpfs(command: &mut Command, dir: &Path) {
    let dir = std::ffi::CString::new(dir.to_str().expect("UTF-8")).expect("no NUL");
    // SAFETY: unshare and mount are plain system calls; nothing is allocated after the fork.
    unsafe {
        command.pre_exec(move || {
            let none: Option<&str> = None;
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
            let size = Some("size=48k");
            let flags = MsFlags::empty();
            mount(Some("tmpfs"), dir.as_c_str(), Some("tmpfs"), flags, size)?;
            Ok(())
        });
    }
}

/// What was found is kept, and can be read; journeys are kept while there is room; what is not there is named. However
/// many flows there are meanwhile: of 48 kB, 16 kB are reserved for trace.json, and as many of journeys, which can make way
/// for it, are there before the disk is filled; neither gives back what a page takes.
#[test]
fn a_disk_that_becomes_full_takes_journeys_and_not_what_was_found() {
    const RESERVED: usize = 16 << 10;
    let node = node();
    let dir = tempfile::tempdir().expect("a folder");
    let elsewhere = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("out");
    let (stop, client) = asking(&node);
    // Journeys go on coming until it is said that one found no room.
    let script = format!(
        "until [ $(wc -c <{out}/journeys.jsonl) -ge {RESERVED} ]; do sleep 0.02; done; head -c 9000000 /dev/zero >{fill}; \
         until grep -q 'journeys.jsonl: No space' {said}; do sleep 0.02; done",
        out = out.display(),
        fill = dir.path().join("fill").display(),
        said = elsewhere.path().join("said").display(),
    );
    let all = format!(
        "{PROGRAM} trace --netns {node_path} --duration {limit}s -o {out} -- sh -c \"$SCRIPT\" 2>{elsewhere}/said; echo $?; \
         {PROGRAM} report {out}; echo $?; {PROGRAM} report {out} --output html >{elsewhere}/page; rm {out}/trace.json; \
         {PROGRAM} report {out}; echo $?; cat {elsewhere}/said >&2",
        node_path = node.lab.node().path(),
        limit = PATIENCE.as_secs(),
        out = out.display(),
        elsewhere = elsewhere.path().display(),
    );
    let mut command = Command::new("sh");
    command.args(["-c", &all]).env("SCRIPT", script);
    with_tmpfs(&mut command, dir.path());
    let ended = end(&mut command);
    stop.store(true, Ordering::Relaxed);
    client.join().expect("it asked");
    let page = fs::read(elsewhere.path().join("page")).expect("the page, made again");
    assert!(page.len() > RESERVED, "{}: it had room", page.len());
    let (session, reports) = ended.stdout.split_once("\n1\n").expect("it failed");
    assert!(session.contains("1 Service with flows"), "{ended:?}");
    let (report, without) = reports.split_once("\n0\n").expect("it can be read");
    assert!(report.contains("1 Service with flows"), "{ended:?}");
    assert!(
        report.contains("could not be written to the end (No space left"),
        "{ended:?}"
    );
    assert_eq!(without, "1\n", "{ended:?}");
    let said: Vec<&str> = ended.stderr.lines().collect();
    for words in [
        ["out/journeys.jsonl: No space left", "free some space"],
        ["out/report.html: No space left", "--output html -o FILE"],
        [
            "journeys.jsonl without trace.json",
            "has its journeys, one a line",
        ],
    ] {
        let lines = said
            .iter()
            .filter(|line| words.iter().all(|word| line.contains(word)));
        assert_eq!(lines.count(), 1, "{words:?}: {ended:?}");
    }
}

#[test]
fn on_a_terminal_the_table_is_drawn_over_itself() {
    let node = node();
    let size = nix::pty::Winsize {
        ws_row: 10,
        ws_col: 60,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let terminal = openpty(&size, None).expect("a terminal");
    let mut command = trace(&node, &["--duration", "2500ms"]);
    let mut child = command
        .stdout(terminal.slave.try_clone().expect("a terminal"))
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    drop((terminal.slave, command));
    let mut shown = Vec::new();
    // A terminal that nobody holds open any more ends in an error.
    let _ = fs::File::from(terminal.master).read_to_end(&mut shown);
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    let shown = String::from_utf8_lossy(&shown);
    assert!(shown.contains("0 records lost · no rule change"), "{shown}");
    assert!(shown.contains("\x1b[1F\x1b[J"), "{shown:?}");
}

/// Three capabilities are enough where nobody has to move to another namespace, and whichever is missing
/// is named.
#[test]
fn three_capabilities_are_enough() {
    const NEEDED: [(u8, &str); 3] = [(12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];
    const CAPABILITIES: u8 = 41; // CAP_LAST_CAP (include/uapi/linux/capability.h) + 1
    let node = node();
    let with = |kept: &[u8]| {
        // The node's own command is in its namespace before its capabilities are taken.
        let mut command = node.lab.node().command(PROGRAM);
        let kept = kept.to_vec();
        // SAFETY: prctl is a plain system call; nothing is allocated between fork and exec.
        unsafe {
            command.pre_exec(move || {
                for number in (0..CAPABILITIES).filter(|number| !kept.contains(number)) {
                    // The kernel may know fewer.
                    libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0);
                }
                Ok(())
            });
        }
        command.args(["trace", "--", "true"]);
        command
    };
    let all = NEEDED.map(|(number, _)| number);
    let ended = end(&mut with(&all));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("0 new flows"), "{ended:?}");
    for (number, name) in NEEDED {
        let others: Vec<u8> = all.into_iter().filter(|other| *other != number).collect();
        refused(&mut with(&others), 3, &[name]);
    }
}

/// The BPF programs and links that a process holds, by id.
fn held_by(pid: u32) -> Vec<(Object, u32)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("it lives");
    let infos = entries.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
    let id = |info: &str, name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse().ok()
    };
    infos
        .filter_map(|info| {
            // A link tells its program's id as well.
            let link = id(&info, "link_id:").map(|id| (Object::Link, id));
            link.or_else(|| id(&info, "prog_id:").map(|id| (Object::Program, id)))
        })
        .collect()
}

/// What the kernel knows by a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Object {
    Program,
    Link,
}

/// Is it there, whoever holds it?
fn is_there(object: Object, id: u32) -> bool {
    // `BPF_PROG_GET_FD_BY_ID` and `BPF_LINK_GET_FD_BY_ID` (enum bpf_cmd, include/uapi/linux/bpf.h); their
    // attributes begin with the id.
    let command = match object {
        Object::Program => 13,
        Object::Link => 30,
    };
    let mut attributes = [0_u32; 32];
    attributes[0] = id;
    // SAFETY: the kernel reads the attributes, as many bytes as it is told; nothing else is passed.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    if let Ok(fd @ 0..) = std::os::fd::RawFd::try_from(answer) {
        // SAFETY: the kernel made this descriptor for us a moment ago.
        drop(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) });
        return true;
    }
    let error = std::io::Error::last_os_error();
    assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "{error}");
    false
}

#[test]
fn a_killed_session_leaves_no_probe() {
    let node = node();
    let dir = tempfile::tempdir().expect("a folder");
    let mut child = started(&mut trace(&node, &[]), dir.path());
    let held = held_by(child.id());
    let count = |object| held.iter().filter(|(o, _)| *o == object).count();
    // Entry and exit of each hook, and the tracepoints.
    assert!(count(Object::Link) >= 10, "{held:?}");
    assert!(count(Object::Program) >= 10, "{held:?}");
    assert!(held.iter().all(|(object, id)| is_there(*object, *id)));
    child.kill().expect("it lives");
    child.wait().expect("it ends");
    // Links and programs go when the kernel has waited for the packets under way.
    let begin = Instant::now();
    while held.iter().any(|(object, id)| is_there(*object, *id)) {
        assert!(begin.elapsed() < PATIENCE, "a probe is left");
        std::thread::sleep(Duration::from_millis(5));
    }
}
