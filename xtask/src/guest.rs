//! The guest's side: xtask as PID 1 of the VM.
//!
//! Prepares an ordinary root file system, runs the one job that came in the initramfs, sends
//! what it prints and what it leaves in `/out`, and powers off. It runs one job, so it may stay
//! single-minded: any failure of its own is sent as trouble and ends the VM.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{Pid, pipe, sync};
use sha2::{Digest, Sha256};

use crate::channel::{Job, PORT, Ready, Sender, VERSION};

/// Where the job stands in the initramfs.
pub(crate) const JOB: &str = "job.json";
/// What the job leaves here is sent to the host.
pub(crate) const OUT: &str = "/out";
/// Where the job runs unless it says otherwise.
pub(crate) const HOME: &str = "/root";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The debug console's port.
struct Port;

impl Port {
    /// Asks the kernel for access to the port; there is no `/dev/port` in Debian's kernels.
    fn open() -> Result<Self> {
        // SAFETY: ioperm changes this thread's I/O permissions only and takes no pointer.
        let answer = unsafe { libc::ioperm(PORT.into(), 1, 1) };
        Errno::result(answer).context("the kernel does not give access to the result port")?;
        Ok(Self)
    }
}

impl Write for Port {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: `open` got access to the port; `rep outsb` reads `bytes.len()` bytes from
        // `bytes` and changes no memory. The direction flag is clear by the calling convention.
        unsafe {
            std::arch::asm!(
                "rep outsb",
                in("dx") PORT,
                inout("rsi") bytes.as_ptr() => _,
                inout("rcx") bytes.len() => _,
                options(nostack, preserves_flags, readonly)
            );
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The guest's whole life. Never returns to the kernel without powering off.
pub(crate) fn main() -> ! {
    // Before anything else: without the port nobody would learn what went wrong. (Standard
    // error is the console, which the host keeps.)
    match Port::open() {
        Ok(port) => {
            let mut sender = Sender::new(port);
            let outcome = prepare().and_then(|job| {
                sender.ready(&ready())?;
                run(&job, &mut sender)
            });
            let sent = match outcome {
                Ok(code) => sender.exit(code),
                Err(error) => sender.trouble(&format!("{error:#}")),
            };
            if let Err(error) = sent {
                eprintln!("svcpath guest: {error}");
            }
        }
        Err(error) => eprintln!("svcpath guest: {error:#}"),
    }
    sync();
    let error = reboot(RebootMode::RB_POWER_OFF);
    // PID 1 ending is a kernel panic, which the host reports with the console's last lines.
    eprintln!("svcpath guest: cannot power off: {error:?}");
    std::process::exit(1)
}

fn ready() -> Ready {
    let read = |path| {
        fs::read_to_string(path)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    Ready {
        version: VERSION,
        kernel: read("/proc/sys/kernel/osrelease"),
        clocksource: read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
    }
}

/// File systems, limits, loopback; then the job.
fn prepare() -> Result<Job> {
    const MOUNTS: [(&str, &str, bool); 11] = [
        ("proc", "/proc", true),
        ("sysfs", "/sys", true),
        ("devtmpfs", "/dev", true),
        ("devpts", "/dev/pts", true),
        ("tmpfs", "/dev/shm", true),
        ("tmpfs", "/tmp", true),
        ("tmpfs", "/run", true),
        ("cgroup2", "/sys/fs/cgroup", true),
        ("bpf", "/sys/fs/bpf", true),
        // Kernels may be built without these.
        ("debugfs", "/sys/kernel/debug", false),
        ("tracefs", "/sys/kernel/tracing", false),
    ];
    for (kind, target, needed) in MOUNTS {
        // Below /sys the kernel has made the directories, and nobody else can.
        if !target.starts_with("/sys/") {
            fs::create_dir_all(target).with_context(|| format!("cannot create {target}"))?;
        }
        let mounted = mount(
            Some(kind),
            target,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        );
        match mounted {
            Err(error) if needed && error != Errno::EBUSY => {
                return Err(error).with_context(|| format!("cannot mount {kind} on {target}"));
            }
            _ => {}
        }
    }
    for directory in [OUT, HOME, "/var/lib", "/var/tmp", "/run/netns", "/run/lock"] {
        fs::create_dir_all(directory).with_context(|| format!("cannot create {directory}"))?;
    }
    if !Path::new("/var/run").exists() {
        std::os::unix::fs::symlink("/run", "/var/run").context("cannot create /var/run")?;
    }
    setrlimit(Resource::RLIMIT_NOFILE, 1 << 20, 1 << 20).context("cannot raise the file limit")?;
    setrlimit(
        Resource::RLIMIT_MEMLOCK,
        libc::RLIM_INFINITY,
        libc::RLIM_INFINITY,
    )
    .context("cannot raise the memory lock limit")?;
    // A jump of the virtual clock to the next timer looks like a lockup to the watchdog.
    fs::write("/proc/sys/kernel/watchdog", "0").ok();
    fs::write("/proc/sys/kernel/hostname", "svcpath").context("cannot set the host name")?;
    let lo = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .env("PATH", PATH)
        .status()
        .context("cannot start ip")?;
    anyhow::ensure!(
        lo.success(),
        "cannot set up the loopback interface: ip {lo}"
    );
    let text = fs::read(Path::new("/").join(JOB)).context("the initramfs holds no job")?;
    seed_random(&text)?;
    load_modules()?;
    serde_json::from_slice(&text).context("the job in the initramfs is unreadable")
}

/// Credits the kernel's random generator with enough to call itself ready, as it is on every node
/// that has been up for a second.
///
/// A generator that is not ready computes every random number anew: kube-proxy's `statistic` match
/// and masquerading then cost fifteen thousand instructions more a flow, which no user ever pays.
/// The seed is the job's hash: the same job is the same run.
fn seed_random(job: &[u8]) -> Result<()> {
    /// `struct rand_pool_info` and `RNDADDENTROPY` (include/uapi/linux/random.h).
    #[repr(C)]
    struct Pool {
        entropy_bits: libc::c_int,
        bytes: libc::c_int,
        seed: [u8; 32],
    }
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    let pool = Pool {
        entropy_bits: 256,
        bytes: 32,
        seed: Sha256::digest(job).into(),
    };
    let random = File::options()
        .write(true)
        .open("/dev/random")
        .context("cannot open /dev/random")?;
    // SAFETY: the kernel reads one Pool, which outlives the call.
    let answer = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const pool) };
    Errno::result(answer).context("cannot seed the random generator")?;
    Ok(())
}

/// Modules that every comparison needs. Loading them here takes a moment; loading each on demand
/// takes a modprobe, and would be measured as time to apply rules.
const PRELOADED: [&str; 50] = [
    "veth",
    "dummy",
    "nf_conntrack",
    "nf_nat",
    "nf_tables",
    "nft_compat",
    "nft_chain_nat",
    "nft_ct",
    "nft_fib_inet",
    "nft_masq",
    "nft_nat",
    "nft_numgen",
    "nft_reject_inet",
    "nft_reject_ipv4",
    "nft_reject_ipv6",
    "nfnetlink_acct",
    "x_tables",
    "ip_tables",
    "ip6_tables",
    "iptable_filter",
    "iptable_nat",
    "iptable_mangle",
    "ip6table_filter",
    "ip6table_nat",
    "ip6table_mangle",
    "xt_addrtype",
    "xt_comment",
    "xt_conntrack",
    "xt_mark",
    "xt_nat",
    "xt_nfacct",
    "xt_set",
    "xt_statistic",
    "xt_tcpudp",
    "xt_MASQUERADE",
    "xt_ipvs",
    "ipt_REJECT",
    "ip6t_REJECT",
    "ip_set",
    "ip_set_bitmap_port",
    "ip_set_hash_ip",
    "ip_set_hash_ipport",
    "ip_set_hash_ipportip",
    "ip_set_hash_ipportnet",
    "ip_vs",
    "ip_vs_rr",
    "nf_reject_ipv4",
    "nf_reject_ipv6",
    "nf_defrag_ipv4",
    "nf_defrag_ipv6",
];

/// Loads what is there of [`PRELOADED`]; what this kernel has built in or lacks is left to the job
/// to find out.
fn load_modules() -> Result<()> {
    let root = Path::new("/usr/lib/modules").join(ready().kernel);
    let index = fs::read_to_string(root.join("modules.dep")).context("no module index")?;
    let mut loaded = HashSet::new();
    for wanted in PRELOADED {
        let line = index.lines().find_map(|line| {
            let (path, needs) = line.split_once(':')?;
            let name = Path::new(path).file_name()?.to_str()?.split('.').next()?;
            (name == wanted).then_some((path, needs))
        });
        let Some((path, needs)) = line else { continue };
        // A module's needs stand in the order nearest first: they are loaded from the last.
        for module in needs.split_whitespace().rev().chain([path]) {
            if !loaded.insert(module) {
                continue;
            }
            let file = File::open(root.join(module))
                .with_context(|| format!("cannot open module {module}"))?;
            // The flag says that the module may differ from the signed one, so that no time goes
            // into checking signatures of files that we took from the signed package ourselves.
            let flags = ModuleInitFlags::MODULE_INIT_IGNORE_VERMAGIC;
            match finit_module(&file, c"", flags) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot load module {module}"));
                }
            }
        }
    }
    Ok(())
}

/// Runs the job, forwards its lines, sends its files; its exit code.
fn run(job: &Job, sender: &mut Sender<Port>) -> Result<i32> {
    let (program, arguments) = job.argv.split_first().context("the job names no program")?;
    let (from_out, to_out) = pipe().context("cannot create a pipe")?;
    let (from_err, to_err) = pipe().context("cannot create a pipe")?;
    let (from_reaper, to_reaper) = pipe().context("cannot create a pipe")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", HOME)
        .env("LANG", "C.UTF-8")
        .env("TERM", "dumb")
        .env("TMPDIR", "/tmp")
        .envs(&job.env)
        .current_dir(&job.cwd)
        .stdin(Stdio::null())
        .stdout(to_out)
        .stderr(to_err);
    let child = match command.spawn() {
        Ok(child) => Pid::from_raw(child.id().cast_signed()),
        Err(error) => {
            // As a shell would say it; the guest itself is fine.
            sender.stderr(format!("{program}: {error}").as_bytes())?;
            return Ok(if error.kind() == io::ErrorKind::NotFound {
                127
            } else {
                126
            });
        }
    };
    // The command holds the pipes' write ends; they must close with the job's.
    drop(command);
    let reaper = std::thread::spawn(move || reap(child, to_reaper));
    forward(sender, &from_out, &from_err, &from_reaper)?;
    let code = reaper
        .join()
        .map_err(|_| anyhow::anyhow!("the reaper panicked"))?;
    send_files(sender, Path::new(OUT), "")?;
    Ok(code)
}

/// Waits for every child, as PID 1 must, until the job itself has ended; its exit code.
fn reap(child: Pid, done: OwnedFd) -> i32 {
    let code = loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => break code,
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                break ExitStatus::from_raw(signal as i32)
                    .signal()
                    .map_or(1, |signal| 128 + signal);
            }
            Err(Errno::ECHILD) => break 1,
            _ => {}
        }
    };
    drop(done);
    code
}

/// Forwards lines until the reaper's pipe closes, then what is still in the pipes. Processes
/// that outlive the job and keep its pipes open are not waited for.
fn forward(
    sender: &mut Sender<Port>,
    out: &OwnedFd,
    err: &OwnedFd,
    reaper: &OwnedFd,
) -> Result<()> {
    let mut streams = [Lines::new(out)?, Lines::new(err)?];
    loop {
        let mut fds = Vec::with_capacity(3);
        fds.push(PollFd::new(reaper.as_fd(), PollFlags::POLLIN));
        let open: Vec<usize> = (0..2).filter(|&i| !streams[i].ended).collect();
        for &i in &open {
            fds.push(PollFd::new(streams[i].fd, PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other.context("cannot wait for the job's output")?,
        };
        let over = fds[0].any().unwrap_or(false);
        for i in open {
            let lines = streams[i].take(over)?;
            for line in lines {
                if i == 0 {
                    sender.stdout(&line)?;
                } else {
                    sender.stderr(&line)?;
                }
            }
        }
        if over {
            return Ok(());
        }
    }
}

/// A pipe read line by line without waiting.
struct Lines<'a> {
    fd: BorrowedFd<'a>,
    partial: Vec<u8>,
    ended: bool,
}

impl<'a> Lines<'a> {
    fn new(fd: &'a OwnedFd) -> Result<Self> {
        fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("cannot prepare a pipe")?;
        Ok(Self {
            fd: fd.as_fd(),
            partial: Vec::new(),
            ended: false,
        })
    }

    /// The complete lines that are there; with `last`, an incomplete one too.
    fn take(&mut self, last: bool) -> Result<Vec<Vec<u8>>> {
        let mut buffer = vec![0; 64 << 10];
        let mut lines = Vec::new();
        loop {
            match nix::unistd::read(self.fd, &mut buffer) {
                Ok(0) => self.ended = true,
                Ok(n) => {
                    for &byte in &buffer[..n] {
                        if byte == b'\n' {
                            lines.push(std::mem::take(&mut self.partial));
                        } else {
                            self.partial.push(byte);
                        }
                    }
                    continue;
                }
                Err(Errno::EAGAIN) => {}
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    return Err(error).with_context(|| {
                        format!("cannot read the job's output (fd {})", self.fd.as_raw_fd())
                    });
                }
            }
            if (last || self.ended) && !self.partial.is_empty() {
                lines.push(std::mem::take(&mut self.partial));
            }
            return Ok(lines);
        }
    }
}

/// Sends every file below `directory`, in the order of their names.
fn send_files(sender: &mut Sender<Port>, directory: &Path, prefix: &str) -> Result<()> {
    let mut entries = fs::read_dir(directory)
        .and_then(Iterator::collect::<io::Result<Vec<_>>>)
        .with_context(|| format!("cannot list {}", directory.display()))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            send_files(sender, &path, &format!("{name}/"))?;
        } else {
            let mut content = Vec::new();
            File::open(&path)
                .and_then(|mut file| file.read_to_end(&mut content))
                .with_context(|| format!("cannot read {}", path.display()))?;
            sender.file(&name, &content)?;
        }
    }
    Ok(())
}

/// Is this process the guest's PID 1? A container's PID 1 has no job in its root.
pub(crate) fn is_guest() -> bool {
    std::process::id() == 1 && Path::new("/").join(JOB).exists()
}
