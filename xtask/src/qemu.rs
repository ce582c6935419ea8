//! One virtual machine that runs one job.
//!
//! On the virtual clock a guest nanosecond is a guest instruction (`-icount shift=0`), idle time
//! is skipped (`sleep=off`), and nothing reaches the guest from outside: one CPU, no network, no
//! disk, a fixed date, a fixed seed, no interrupt from the result channel, and QEMU's two threads in
//! step (`xtask/lockstep`). Equal initramfs, equal run, to the nanosecond, however busy the host.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use crate::channel::{self, Event, Job, PORT, Ready, Receiver};
use crate::guest::{HOME, JOB};
use crate::initramfs::Archive;
use crate::interrupt::{self, Guarded};
use crate::kernel::Kernel;
use crate::lockstep;
use crate::packages::find_program;

const QEMU: &str = "qemu-system-x86_64";
/// How long a guest may take until it is ready. It takes seconds; a busy machine may need more.
const READY_LIMIT: Duration = Duration::from_mins(3);
const KVM_PROBE_LIMIT: Duration = Duration::from_secs(8);

/// What a nanosecond is in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Clock {
    /// Real time: what this machine's hardware does.
    Wall,
    /// One guest instruction: exact and repeatable.
    Virtual,
}

impl Clock {
    /// The word, as on the command line.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Wall => "wall",
            Self::Virtual => "virtual",
        }
    }
}

/// Who executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// The host's CPU.
    Kvm,
    /// QEMU's translator, in real time.
    Tcg,
    /// QEMU's translator, counting instructions.
    Icount,
}

impl Accelerator {
    /// As a report names it.
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Kvm => "wall clock, KVM",
            Self::Tcg => "wall clock, emulated CPU (no KVM here)",
            Self::Icount => "virtual clock (1 ns = 1 guest instruction)",
        }
    }
}

/// A kernel and the part of the initramfs that all jobs share.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// What boots.
    pub(crate) kernel: Kernel,
    /// The shared segments, one after the other.
    pub(crate) segments: Vec<PathBuf>,
}

/// A line that the job printed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Line<'a> {
    /// On standard output.
    Stdout(&'a [u8]),
    /// On standard error.
    Stderr(&'a [u8]),
    /// `progress FRACTION WHAT` on standard error.
    Progress(f64, &'a str),
}

/// What a job left behind.
#[derive(Clone, Debug)]
pub(crate) struct JobOutput {
    /// Its exit code; 128 + N after signal N.
    pub(crate) exit: i32,
    /// The files of `/out` by their path below it.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// What the guest said of itself.
    pub(crate) ready: Ready,
    /// Wall time from power-on to ready.
    pub(crate) boot: Duration,
}

/// How to run virtual machines; one description may run many at a time, from several threads.
#[derive(Clone, Debug)]
pub(crate) struct Vm {
    /// Kernel and file system.
    pub(crate) image: Image,
    /// Who executes instructions.
    pub(crate) accelerator: Accelerator,
    /// MiB of memory.
    pub(crate) memory: u32,
    /// Processors; the virtual clock counts the instructions of one.
    pub(crate) cpus: u32,
    /// Wall time until the job must have ended.
    pub(crate) time_limit: Duration,
    /// Wall time until the guest must be ready.
    pub(crate) ready_limit: Duration,
    /// Directory for what a VM needs while it runs, and for the console of one that failed.
    pub(crate) scratch: PathBuf,
}

/// What makes the guest's kernel exact, word by word:
/// - no random addresses, no randomness but that of the seed;
/// - the TSC is the clock, at exactly 1 GHz: the kernel would measure it against other timers
///   and come out 1 ppm off or not, depending on when it looks (`init_tsc_clocksource` does that,
///   so the clock source stays `tsc-early`, which differs in name only);
/// - timer interrupts come from the HPET: calibrating the APIC's timer is a busy wait that takes
///   the translator over 3 s a boot;
/// - ciphers are not tested at boot, and the jitter generator does not try itself out;
/// - the last word is for svcpath, which takes no clock for virtual without it.
const EXACT: &str = " nokaslr norandmaps random.trust_cpu=off random.trust_bootloader=on \
    clocksource=tsc tsc=reliable tsc_early_khz=1000000 initcall_blacklist=init_tsc_clocksource,jent_mod_init \
    nolapic_timer cryptomgr.notests svcpath.clock=virtual";

/// Distinguishes the VMs of this process.
static NUMBER: AtomicU64 = AtomicU64::new(0);

impl Vm {
    /// A machine for this clock. Finding out whether KVM works may take a few seconds, once.
    pub(crate) fn new(
        image: Image,
        clock: Clock,
        memory: u32,
        time_limit: Duration,
        cache: &Path,
    ) -> Self {
        let mut vm = Self {
            image,
            accelerator: Accelerator::Icount,
            memory,
            cpus: 1,
            time_limit,
            ready_limit: READY_LIMIT,
            scratch: cache.join("vms"),
        };
        if clock == Clock::Wall {
            vm.accelerator = if vm.kvm_works() {
                Accelerator::Kvm
            } else {
                Accelerator::Tcg
            };
        }
        vm
    }

    /// Does a short boot with KVM get to its end? `/dev/kvm` alone does not tell: inside some
    /// clouds it exists, and guests hang in the firmware.
    fn kvm_works(&self) -> bool {
        static ANSWER: OnceLock<bool> = OnceLock::new();
        *ANSWER.get_or_init(|| {
            if File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .is_err()
            {
                return false;
            }
            let probe = Self {
                accelerator: Accelerator::Kvm,
                memory: 1024,
                time_limit: KVM_PROBE_LIMIT,
                ready_limit: KVM_PROBE_LIMIT,
                ..self.clone()
            };
            let job = simple_job(&["true"]);
            let outcome = probe.boot(&job, &mut |_| {}, &AtomicBool::new(false));
            // A guest that was stopped in its firmware has nothing on its console to keep.
            outcome.0.is_ok_and(|output| output.exit == 0)
        })
    }

    /// Boots, runs the job, powers off. Lines are handed over as they come. Setting `stop` ends
    /// the VM early, which is an error.
    pub(crate) fn run(
        &self,
        job: &Job,
        lines: &mut dyn FnMut(Line<'_>),
        stop: &AtomicBool,
    ) -> Result<JobOutput> {
        let (outcome, console) = self.boot(job, lines, stop);
        outcome.with_context(|| match console.filter(|path| keep(path)) {
            Some(path) => format!("the VM failed (its console: {})", path.display()),
            None => "the VM failed".to_owned(),
        })
    }

    /// One boot; the console's path when there is something on it worth keeping.
    fn boot(
        &self,
        job: &Job,
        lines: &mut dyn FnMut(Line<'_>),
        stop: &AtomicBool,
    ) -> (Result<JobOutput>, Option<PathBuf>) {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{number}", std::process::id());
        let directory = self.scratch.join(&name);
        let console = directory.join("console.log");
        let outcome = fs::create_dir_all(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))
            .and_then(|()| {
                interrupt::remove_on_exit(&directory);
                self.boot_in(&directory, &console, job, lines, stop)
            });
        let stopped = interrupt::is_over() || stop.load(Ordering::Relaxed);
        let kept = (outcome.is_err() && !stopped).then(|| {
            let to = self.scratch.join(format!("console-{name}.log"));
            fs::rename(&console, &to).ok().map(|()| to)
        });
        fs::remove_dir_all(&directory).ok();
        (outcome, kept.flatten())
    }

    fn boot_in(
        &self,
        directory: &Path,
        console: &Path,
        job: &Job,
        lines: &mut dyn FnMut(Line<'_>),
        stop: &AtomicBool,
    ) -> Result<JobOutput> {
        let initrd = directory.join("initrd");
        self.write_initrd(&initrd, job)?;
        let program = find_program(QEMU).with_context(|| {
            format!("{QEMU} is not installed: run `apt-get install --no-install-recommends qemu-system-x86`")
        })?;
        let complaints = directory.join("qemu.log");
        let mut command = Command::new(program);
        command
            .args(self.arguments(&initrd, console))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&complaints).context("cannot create a log file")?)
            // Ctrl-C is xtask's to handle, which then ends the VM.
            .process_group(0);
        if self.accelerator == Accelerator::Icount {
            command.env("LD_PRELOAD", lockstep::library()?);
        }
        let start = Instant::now();
        let mut qemu = Guarded::spawn(&mut command, Signal::SIGKILL)?;
        let mut talk = Conversation {
            lines,
            receiver: Receiver::default(),
            ready: None,
            files: BTreeMap::new(),
            exit: None,
        };
        let stream = qemu.child().stdout.take().context("QEMU has no output")?;
        self.listen(stream, start, &mut talk, stop, console)?;
        let status = qemu.wait()?;
        if let (Some(exit), Some((ready, boot))) = (talk.exit, talk.ready) {
            ensure!(
                self.accelerator != Accelerator::Icount || ready.clocksource.starts_with("tsc"),
                "the guest's clock is {}, which is too coarse for the virtual clock: use another --kernel",
                ready.clocksource
            );
            return Ok(JobOutput {
                exit,
                files: talk.files,
                ready,
                boot,
            });
        }
        let console_text = read_lossy(console);
        if let Some(words) = panic_words(&console_text) {
            bail!(
                "the guest's kernel panicked: {words}; the last lines on its console:\n{}",
                last_lines(&console_text, 30)
            );
        }
        let complaints = read_lossy(&complaints);
        let complaint = last_lines(&complaints, 1);
        if !status.success() {
            bail!(
                "QEMU ended with {status}: {}; is there enough memory ({} MiB asked for)? --memory sets less",
                if complaint.is_empty() {
                    "it said nothing"
                } else {
                    complaint.as_str()
                },
                self.memory
            );
        }
        bail!(
            "the VM powered off before its job had ended; try again, and report it if it stays so"
        )
    }

    fn write_initrd(&self, path: &Path, job: &Job) -> Result<()> {
        let mut file =
            File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        for segment in &self.image.segments {
            let mut segment_file = File::open(segment)
                .with_context(|| format!("cannot open {}", segment.display()))?;
            std::io::copy(&mut segment_file, &mut file)
                .with_context(|| format!("cannot write {}: is the disk full?", path.display()))?;
        }
        let mut archive = Archive::default();
        archive.file(JOB, job_file(job)?, false);
        file.write_all(&archive.to_cpio())
            .with_context(|| format!("cannot write {}: is the disk full?", path.display()))
    }

    fn arguments(&self, initrd: &Path, console: &Path) -> Vec<String> {
        let clock: &[&str] = match self.accelerator {
            Accelerator::Kvm => &["-accel", "kvm", "-cpu", "host"],
            Accelerator::Tcg => &["-accel", "tcg", "-cpu", "max"],
            Accelerator::Icount => &[
                "-accel",
                "tcg",
                "-icount",
                "shift=0,sleep=off",
                // What the thread that executes the guest is known by: xtask/lockstep.
                "-name",
                "guest,debug-threads=on",
                "-rtc",
                "base=2026-01-01T00:00:00,clock=vm",
                "-seed",
                "42",
                "-cpu",
                "max,-rdrand,-rdseed",
            ],
        };
        let mut append = "console=ttyS0 quiet panic=-1 oops=panic".to_owned();
        if self.accelerator == Accelerator::Icount {
            append += EXACT;
        }
        let comma = |path: &Path| path.to_string_lossy().replace(',', ",,");
        let mut arguments: Vec<String> = clock.iter().map(|word| (*word).to_owned()).collect();
        arguments.extend(
            [
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
                "-smp",
                &self.cpus.to_string(),
                "-m",
                &self.memory.to_string(),
                "-kernel",
                &self.image.kernel.image.to_string_lossy(),
                "-initrd",
                &initrd.to_string_lossy(),
                "-append",
                &append,
                "-chardev",
                &format!("file,id=console,path={}", comma(console)),
                "-serial",
                "chardev:console",
                "-chardev",
                "file,id=result,path=/dev/stdout",
                "-device",
                &format!("isa-debugcon,iobase={PORT:#x},chardev=result"),
            ]
            .map(str::to_owned),
        );
        arguments
    }

    /// Takes everything that comes through the channel until it closes or a limit is reached.
    fn listen(
        &self,
        mut stream: impl Read + AsFd,
        start: Instant,
        talk: &mut Conversation<'_>,
        stop: &AtomicBool,
        console: &Path,
    ) -> Result<()> {
        let mut buffer = vec![0; 256 << 10];
        loop {
            ensure!(!stop.load(Ordering::Relaxed), "stopped");
            if talk.ready.is_none() && start.elapsed() > self.ready_limit {
                bail!(
                    "the guest did not come up within {} s; the last lines on its console:\n{}",
                    self.ready_limit.as_secs(),
                    last_lines(&read_lossy(console), 30)
                );
            }
            if start.elapsed() > self.time_limit {
                bail!(
                    "the job did not end within {} s: --time-limit allows more",
                    self.time_limit.as_secs()
                );
            }
            let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(200_u8)) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
                other => other.context("cannot wait for the VM")?,
            };
            let n = stream
                .read(&mut buffer)
                .context("cannot read from the VM")?;
            if n == 0 {
                return Ok(());
            }
            talk.take(&buffer[..n], start)?;
        }
    }
}

/// Keeps only a console with something on it.
fn keep(console: &Path) -> bool {
    let worth = fs::metadata(console).is_ok_and(|metadata| metadata.len() > 0);
    if !worth {
        fs::remove_file(console).ok();
    }
    worth
}

/// A job without anything special.
pub(crate) fn simple_job(argv: &[&str]) -> Job {
    Job {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        env: BTreeMap::new(),
        cwd: HOME.to_owned(),
    }
}

/// The job as a file of whole pages: a longer command does not move everything behind it in the
/// guest's memory.
fn job_file(job: &Job) -> Result<Vec<u8>> {
    const PAGE: usize = 4096;
    let mut text = serde_json::to_vec(job)?;
    text.resize(text.len().next_multiple_of(PAGE), b' ');
    Ok(text)
}

/// What has been heard from one guest.
struct Conversation<'a> {
    lines: &'a mut dyn FnMut(Line<'_>),
    receiver: Receiver,
    ready: Option<(Ready, Duration)>,
    files: BTreeMap<String, Vec<u8>>,
    exit: Option<i32>,
}

impl Conversation<'_> {
    fn take(&mut self, bytes: &[u8], start: Instant) -> Result<()> {
        let Self {
            lines,
            receiver,
            ready,
            files,
            exit,
        } = self;
        receiver.feed(bytes, &mut |event| {
            match event {
                Event::Ready(hello) => {
                    ensure!(
                        hello.version == channel::VERSION,
                        "the guest speaks version {} of the protocol, the host {}: remove target/svcpath-vm and try again",
                        hello.version,
                        channel::VERSION
                    );
                    *ready = Some((hello, start.elapsed()));
                }
                Event::Stdout(line) => lines(Line::Stdout(&line)),
                Event::Stderr(line) => {
                    let text = String::from_utf8_lossy(&line);
                    match channel::progress(&text) {
                        Some((fraction, what)) => lines(Line::Progress(fraction, what)),
                        None => lines(Line::Stderr(&line)),
                    }
                }
                Event::File(name, content) => {
                    files.insert(name, content);
                }
                Event::Trouble(what) => bail!("in the guest: {what}"),
                Event::Exit(code) => *exit = Some(code),
            }
            Ok(())
        })
    }
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// What the kernel said when it panicked.
fn panic_words(console: &str) -> Option<&str> {
    console.lines().find_map(|line| {
        let (_, words) = line.split_once("Kernel panic - not syncing: ")?;
        Some(words.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_found_on_the_console() {
        let console = "[    0.9] Loading\r\n[    1.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100\r\n[    1.1] ---[ end Kernel panic\r\n";
        assert_eq!(
            panic_words(console),
            Some("Attempted to kill init! exitcode=0x00000100")
        );
        assert_eq!(panic_words("all is well"), None);
        assert_eq!(last_lines("a\n\nb\nc\n", 2), "b\nc");
    }

    #[test]
    fn a_job_is_as_long_as_any_other() {
        let short = job_file(&simple_job(&["true"])).expect("JSON");
        let long = simple_job(&["svcpath", "bench", "job", "cell-iptables-legacy-5000"]);
        let file = job_file(&long).expect("JSON");
        assert_eq!(file.len(), short.len());
        assert_eq!(serde_json::from_slice::<Job>(&file).expect("JSON"), long);
    }

    #[test]
    fn the_virtual_clock_lets_nothing_in() {
        let mut vm = Vm {
            image: Image {
                kernel: Kernel {
                    release: "6.12".to_owned(),
                    image: "/k/vmlinuz".into(),
                    modules: "/k/modules".into(),
                },
                segments: Vec::new(),
            },
            accelerator: Accelerator::Icount,
            memory: 3072,
            cpus: 1,
            time_limit: Duration::from_secs(1),
            ready_limit: Duration::from_secs(1),
            scratch: "/nowhere".into(),
        };
        let arguments = vm.arguments(Path::new("/i"), Path::new("/c,c")).join(" ");
        for needed in [
            "-icount shift=0,sleep=off",
            "clock=vm",
            "-smp 1",
            "-nodefaults",
            "-seed 42",
            "-cpu max,-rdrand,-rdseed",
            "norandmaps",
            "svcpath.clock=virtual",
            "path=/c,,c",
        ] {
            assert!(arguments.contains(needed), "{needed} in {arguments}");
        }
        vm.accelerator = Accelerator::Kvm;
        let arguments = vm.arguments(Path::new("/i"), Path::new("/c")).join(" ");
        assert!(!arguments.contains("svcpath.clock"), "{arguments}");
    }
}
