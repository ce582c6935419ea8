//! The VM's image, and `cargo xtask vm`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::channel::{Job, sha256_hex};
use crate::guest::HOME;
use crate::initramfs::{self, Archive};
use crate::interrupt;
use crate::qemu::{Clock, Image, Line, Vm};
use crate::{Failure, kernel, packages, workspace};

/// Which VM, for all commands that use one.
#[derive(Clone, Debug, Args)]
pub(crate) struct VmOptions {
    /// Kernel: a series (6.12, 6.1), a release or a Debian package
    #[arg(long, value_name = "K")]
    pub(crate) kernel: Option<String>,
    /// Memory of a VM in MiB
    #[arg(long, value_name = "M", default_value_t = 3072, value_parser = clap::value_parser!(u32).range(512..=1 << 20))]
    pub(crate) memory: u32,
    /// Seconds of real time that one VM may take
    #[arg(long, value_name = "S", default_value_t = 1800, value_parser = clap::value_parser!(u64).range(1..=7 * 86_400))]
    pub(crate) time_limit: u64,
}

/// `cargo xtask vm`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask vm -- uname -a
  cargo xtask vm --kernel 6.1 -- sh -c 'modprobe ip_vs && ipvsadm -L'
  cargo xtask vm --file cluster.json -- \
    svcpath rules render --cluster cluster.json --node worker-0 --mode ipvs
  cargo xtask vm --clock wall -- svcpath doctor
  cargo xtask vm --package bpftrace -- svcpath doctor --cost --against bpftrace

The command runs as root in /root of a fresh system without network. Files named with --file are
there under their last name, programs among them also in PATH; what it leaves in /out is written
to --out-dir. svcpath is in PATH when it has been built (cargo build --release -p tracer).
Its exit code is passed on.")]
pub(crate) struct VmArgs {
    #[command(flatten)]
    vm: VmOptions,
    /// What a nanosecond is in the guest
    #[arg(long, value_enum, default_value_t = Clock::Virtual)]
    clock: Clock,
    /// Processors of the guest; more than one on the wall clock only
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// A file of this machine that the command needs (may be repeated)
    #[arg(long, value_name = "HOSTPATH")]
    file: Vec<PathBuf>,
    /// A Debian package whose programs the command needs; installed here if it is not (may be repeated)
    #[arg(long, value_name = "NAME", value_parser = packages::package_name)]
    package: Vec<String>,
    /// Where files that the command leaves in /out go
    #[arg(long, value_name = "DIR", default_value = ".")]
    out_dir: PathBuf,
    /// Say how long the guest took to come up
    #[arg(short, long)]
    verbose: bool,
    /// Say what is missing instead of installing it
    #[arg(long)]
    no_install: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Runs a command in a VM; its exit code.
pub(crate) fn main(args: &VmArgs) -> Result<u8> {
    if args.cpus > 1 && args.clock == Clock::Virtual {
        return Err(Failure::new(
            2,
            "the virtual clock counts the instructions of one processor: --cpus needs --clock wall",
        ));
    }
    packages::prepare(&packages::NEEDS, !args.no_install)?;
    packages::prepare_packages(&args.package, !args.no_install)?;
    let mut files = Vec::new();
    for path in &args.file {
        ensure!(path.is_file(), "{} is not a file", path.display());
        files.push(path.clone());
    }
    files.extend(release_binary());
    let cache = workspace::vm_cache();
    let mut image = image(args.vm.kernel.as_deref(), &files, &cache)?;
    add_packages(&mut image, &args.package, &cache)?;
    let mut vm = Vm::new(
        image,
        args.clock,
        args.vm.memory,
        Duration::from_secs(args.vm.time_limit),
        &cache,
    );
    vm.cpus = args.cpus;
    if args.clock == Clock::Wall {
        eprintln!("place   vm · {}", vm.accelerator.describe());
    }
    let job = Job {
        argv: args.command.clone(),
        env: BTreeMap::new(),
        cwd: HOME.to_owned(),
    };
    let output = vm.run(&job, &mut print_line, &AtomicBool::new(false))?;
    if args.verbose {
        eprintln!(
            "vm      ready after {:.1} s · kernel {} · clock source {}",
            output.boot.as_secs_f64(),
            output.ready.kernel,
            output.ready.clocksource
        );
    }
    for (name, content) in &output.files {
        let to = args.out_dir.join(name);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("cannot create {}", parent.display()))?;
        }
        fs::write(&to, content).with_context(|| format!("cannot write {}", to.display()))?;
    }
    Ok(u8::try_from(output.exit).unwrap_or(1))
}

/// Passes a guest's line on as if it had been printed here.
pub(crate) fn print_line(line: Line<'_>) {
    let write = |mut out: Box<dyn Write>, bytes: &[u8]| {
        // A reader that went away is no reason to stop the guest.
        out.write_all(bytes)
            .and_then(|()| out.write_all(b"\n"))
            .ok();
    };
    match line {
        Line::Stdout(bytes) => write(Box::new(std::io::stdout().lock()), bytes),
        Line::Stderr(bytes) => write(Box::new(std::io::stderr().lock()), bytes),
        Line::Progress(fraction, what) => {
            eprintln!("progress {fraction} {what}");
        }
    }
}

/// The svcpath program, if it has been built.
pub(crate) fn release_binary() -> Option<PathBuf> {
    let path = workspace::target().join("release/svcpath");
    path.is_file().then_some(path)
}

/// The kernel, the segment of tools (built when something it is made of has changed), and the
/// segment of our own programs and these files.
pub(crate) fn image(kernel_wish: Option<&str>, files: &[PathBuf], cache: &Path) -> Result<Image> {
    if std::env::consts::ARCH != "x86_64" {
        return Err(Failure::new(
            4,
            format!(
                "the VM runs this machine's own programs and is made for x86_64, not {}: use --place host",
                std::env::consts::ARCH
            ),
        ));
    }
    fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
    remove_orphans(cache);
    let kernel = kernel::prepare(kernel_wish, cache, &|line| eprintln!("{line}"))?;
    let own = std::env::current_exe().context("cannot find xtask's own program")?;
    let base = cache.join(format!("base-{}.cpio", base_key(&kernel.release, &own)?));
    if !base.is_file() {
        let archive = initramfs::base(
            &kernel,
            &cache.join(format!("modules-{}", std::process::id())),
        )
        .context("cannot put the VM's file system together")?;
        write_whole(&base, &archive.to_cpio())?;
        forget_older(cache, &base)?;
    }
    let programs = cache.join(format!("programs-{}.cpio", std::process::id()));
    interrupt::remove_on_exit(&programs);
    fs::write(&programs, programs_segment(&own, files)?.to_cpio())
        .with_context(|| format!("cannot write {}", programs.display()))?;
    Ok(Image {
        kernel,
        segments: vec![base, programs],
    })
}

/// Adds a segment of the programs of these packages and their libraries. Only who asks for it pays: unpacking
/// some hundred megabytes is a good part of a boot.
pub(crate) fn add_packages(image: &mut Image, names: &[String], cache: &Path) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let mut archive = Archive::default();
    let mut linked = BTreeSet::new();
    for name in names {
        for path in packages::files_of(name)? {
            archive.copy(&path, &path.to_string_lossy())?;
            linked.insert(path);
        }
    }
    archive.libraries(&linked)?;
    let segment = cache.join(format!("packages-{}.cpio", std::process::id()));
    interrupt::remove_on_exit(&segment);
    fs::write(&segment, archive.to_cpio())
        .with_context(|| format!("cannot write {}", segment.display()))?;
    image.segments.push(segment);
    Ok(())
}

/// What the first segment is made of, as far as it can change: xtask itself, the kernel, and the
/// packages of this machine.
fn base_key(release: &str, own: &Path) -> Result<String> {
    let mut text = release.to_owned();
    for path in [
        own,
        Path::new("/var/lib/dpkg/status"),
        Path::new("/usr/sbin"),
    ] {
        if let Ok(metadata) = fs::metadata(path) {
            let changed = metadata
                .modified()?
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default();
            write!(
                text,
                " {} {} {}",
                path.display(),
                metadata.size(),
                changed.as_nanos()
            )?;
        }
    }
    Ok(sha256_hex(text.as_bytes())[..16].to_owned())
}

/// A file that is there completely or not at all.
fn write_whole(path: &Path, content: &[u8]) -> Result<()> {
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    interrupt::remove_on_exit(&partial);
    fs::write(&partial, content)
        .and_then(|()| fs::rename(&partial, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Removes first segments that no run of the last hours has built; they are large.
fn forget_older(cache: &Path, current: &Path) -> Result<()> {
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        let segment = entry.file_name().to_string_lossy().starts_with("base-");
        let old = entry
            .metadata()
            .and_then(|metadata| metadata.modified())
            .ok()
            .and_then(|changed| changed.elapsed().ok())
            .is_some_and(|age| age > Duration::from_hours(6));
        if segment && old && entry.path() != current {
            fs::remove_file(entry.path()).ok();
        }
    }
    Ok(())
}

/// Removes what an xtask that was killed outright could not remove itself.
fn remove_orphans(cache: &Path) {
    let entries = [cache.to_owned(), cache.join("vms")]
        .into_iter()
        .flat_map(|directory| fs::read_dir(directory).into_iter().flatten().flatten());
    for entry in entries {
        let orphan = owner(&entry.file_name().to_string_lossy())
            .is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists());
        if orphan {
            interrupt::remove(&entry.path());
        }
    }
}

/// The process that a temporary file's name says it belongs to.
fn owner(name: &str) -> Option<u32> {
    let own = [
        "programs-",
        "packages-",
        "parts-",
        "answers-",
        "modules-",
        "stripped-",
    ]
    .iter()
    .find_map(|prefix| name.strip_prefix(prefix))
    .map(|rest| rest.trim_end_matches(".cpio"))
    // A running VM's directory: PID-NUMBER.
    .or_else(|| name.split_once('-').map(|(pid, _)| pid))?;
    own.parse().ok()
}

/// xtask as `/init`, and the given files in the guest's home, programs also in its `PATH`.
fn programs_segment(own: &Path, files: &[PathBuf]) -> Result<Archive> {
    let mut archive = Archive::default();
    archive.file("init", program(own)?, true);
    let mut linked = BTreeSet::from([own.to_owned()]);
    for path in files {
        let name = path
            .file_name()
            .with_context(|| format!("{} has no name", path.display()))?
            .to_string_lossy();
        let metadata =
            fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
        if metadata.mode() & 0o111 == 0 {
            archive.copy(path, &format!("{HOME}/{name}"))?;
        } else {
            archive.file(&format!("usr/local/bin/{name}"), program(path)?, true);
            archive.link(&format!("{HOME}/{name}"), &format!("/usr/local/bin/{name}"));
            linked.insert(path.clone());
        }
    }
    archive.libraries(&linked)?;
    Ok(archive)
}

/// A program's content, without its debugging information where `strip` is there: unpacking
/// that is a good part of a boot, and a guest has no debugger.
fn program(path: &Path) -> Result<Vec<u8>> {
    let stripped = workspace::vm_cache().join(format!("stripped-{}", std::process::id()));
    let done = Command::new("strip")
        .args(["--strip-debug", "-o"])
        .arg(&stripped)
        .arg(path)
        .output()
        .is_ok_and(|output| output.status.success());
    let from = if done { &stripped } else { path };
    let content = fs::read(from).with_context(|| format!("cannot read {}", path.display()));
    fs::remove_file(&stripped).ok();
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_files_name_their_owner() {
        assert_eq!(owner("programs-31.cpio"), Some(31));
        assert_eq!(owner("packages-31.cpio"), Some(31));
        assert_eq!(owner("parts-31"), Some(31));
        assert_eq!(owner("answers-31"), Some(31));
        assert_eq!(owner("31-0"), Some(31));
        assert_eq!(owner("base-0306a89ae880d06b.cpio"), None);
        assert_eq!(owner("console-31-0.log"), None);
        assert_eq!(owner("kernels"), None);
    }
}
