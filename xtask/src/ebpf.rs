//! `cargo xtask build-ebpf`: compiles the probes, and tells when the compiled objects are stale.
//!
//! Users get the objects with the sources and need no eBPF toolchain. The manifest beside them says
//! which sources they came from.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::channel::sha256_hex;
use crate::initramfs::run_quietly;
use crate::interrupt::Guarded;
use crate::packages::{self, find_program};
use crate::{Failure, workspace};

const LINKER_VERSION: &str = "0.13.0";
/// LLVM releases that this bpf-linker can be built with.
const LINKER_LLVMS: [u32; 3] = [21, 22, 23];
/// The programs of tracer-ebpf; each becomes an object of its name.
const OBJECTS: [&str; 2] = ["probes", "rule_changes"];
const REMEDY: &str = "run `cargo xtask build-ebpf` and commit tracer-ebpf/prebuilt";

/// `cargo xtask build-ebpf`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask build-ebpf            compile the probes into tracer-ebpf/prebuilt
  cargo xtask build-ebpf --check    only tell whether that is necessary

Takes a nightly toolchain with rust-src (rustup toolchain install nightly --component rust-src) or
any rustc with its library's sources, as Debian's rustc-web and rust-web-src; and bpf-linker.
What is missing is installed from Debian's packages and with cargo install.")]
pub(crate) struct EbpfArgs {
    /// Only compare the sources with the manifest; exit code 1 when they differ
    #[arg(long)]
    check: bool,
    /// Say what is missing instead of installing it
    #[arg(long)]
    no_install: bool,
}

/// What stands beside the objects.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    /// Of everything that the objects are made of.
    source_hash: String,
    /// The compiler's version.
    rustc: String,
    /// The linker's version.
    linker: String,
    /// Of each object itself, by its name.
    objects_sha256: BTreeMap<String, String>,
}

/// Builds or checks; 0 when all is well.
pub(crate) fn main(args: &EbpfArgs) -> Result<u8> {
    if args.check {
        check()?;
        println!("tracer-ebpf/prebuilt is up to date");
    } else {
        build(!args.no_install)?;
    }
    Ok(0)
}

fn object_path(root: &Path, name: &str) -> PathBuf {
    root.join(format!("tracer-ebpf/prebuilt/{name}.bpf.o"))
}

fn manifest_path(root: &Path) -> PathBuf {
    root.join("tracer-ebpf/prebuilt/manifest.json")
}

/// Are the compiled objects those of the sources?
pub(crate) fn check() -> Result<()> {
    check_in(&workspace::root())
}

fn check_in(root: &Path) -> Result<()> {
    let text = fs::read(manifest_path(root))
        .with_context(|| format!("there is no compiled eBPF object: {REMEDY}"))?;
    let manifest: Manifest = serde_json::from_slice(&text)
        .with_context(|| format!("tracer-ebpf/prebuilt/manifest.json is unreadable: {REMEDY}"))?;
    ensure!(
        manifest.source_hash == source_hash(root)?,
        "the compiled eBPF objects are stale: their sources have changed since; {REMEDY}"
    );
    for name in OBJECTS {
        let object = fs::read(object_path(root, name))
            .with_context(|| format!("there is no compiled eBPF object {name}: {REMEDY}"))?;
        ensure!(
            manifest.objects_sha256.get(name) == Some(&sha256_hex(&object)),
            "the compiled eBPF object {name} is not the one its manifest describes; {REMEDY}"
        );
    }
    Ok(())
}

/// A hash of the objects' sources: the crate's own and the versions of those it is linked with.
fn source_hash(root: &Path) -> Result<String> {
    let package = root.join("tracer-ebpf");
    let mut sources = Vec::new();
    rust_files(&package.join("src"), &mut sources)?;
    sources.push(package.join("Cargo.toml"));
    sources.sort();
    let mut text = String::new();
    for path in sources {
        let content = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.strip_prefix(root).unwrap_or(&path);
        writeln!(text, "{} {}", name.display(), sha256_hex(&content))?;
    }
    let lock = fs::read_to_string(root.join("Cargo.lock")).context("cannot read Cargo.lock")?;
    for (name, version) in kernel_crates(&lock) {
        writeln!(text, "{name} {version}")?;
    }
    Ok(sha256_hex(text.as_bytes()))
}

fn rust_files(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            rust_files(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

/// The locked versions of the crates that end up in the objects.
fn kernel_crates(lock: &str) -> Vec<(&str, &str)> {
    let mut crates = Vec::new();
    for block in lock.split("[[package]]") {
        let find = |key: &str| {
            block.lines().find_map(|line| {
                line.strip_prefix(key)?
                    .strip_prefix(" = \"")?
                    .strip_suffix('"')
            })
        };
        if let (Some(name), Some(version)) = (find("name"), find("version"))
            && ["aya-ebpf", "aya-log-ebpf", "aya-log-common"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
        {
            crates.push((name, version));
        }
    }
    crates.sort_unstable();
    crates
}

/// A compiler that can build `core` for the kernel.
#[derive(Clone, Debug)]
struct Toolchain {
    /// Arguments before cargo's own: `rustup run nightly cargo`, or cargo alone.
    cargo: Vec<String>,
    /// The compiler, when it is not the one that cargo would take.
    rustc: Option<PathBuf>,
    /// May the unstable options be used only after asking for them?
    bootstrap: bool,
    /// `rustc -V`.
    version: String,
    /// The major version of its LLVM.
    llvm: u32,
    /// Where its own libraries' sources are.
    sources: PathBuf,
}

impl Toolchain {
    fn nightly() -> Option<Self> {
        find_program("rustup")?;
        let rustc = ["rustup", "run", "nightly", "rustc"].map(str::to_owned);
        let cargo = ["rustup", "run", "nightly", "cargo"].map(str::to_owned);
        Self::look(&rustc, cargo.to_vec(), None, false)
    }

    fn stable(rustc: &Path) -> Option<Self> {
        let cargo = workspace::cargo().to_string_lossy().into_owned();
        let program = rustc.to_string_lossy().into_owned();
        Self::look(&[program], vec![cargo], Some(rustc.to_owned()), true)
    }

    /// Is it there, and with sources?
    fn look(
        rustc: &[String],
        cargo: Vec<String>,
        own: Option<PathBuf>,
        bootstrap: bool,
    ) -> Option<Self> {
        let ask = |arguments: &[&str]| {
            let mut command = Command::new(&rustc[0]);
            command.args(&rustc[1..]).args(arguments);
            command.env_remove("RUSTUP_TOOLCHAIN");
            let answer = run_quietly(&mut command).ok()?;
            Some(String::from_utf8_lossy(&answer).trim().to_owned())
        };
        let sysroot = PathBuf::from(ask(&["--print", "sysroot"])?);
        let sources = sysroot.join("lib/rustlib/src/rust");
        if !sources.join("library/core/Cargo.toml").is_file() {
            return None;
        }
        let verbose = ask(&["-vV"])?;
        Some(Self {
            cargo,
            rustc: own,
            bootstrap,
            version: verbose.lines().next()?.to_owned(),
            llvm: llvm_major(&verbose)?,
            sources,
        })
    }

    /// The best there is.
    fn find() -> Option<Self> {
        Self::nightly().or_else(|| {
            ["rustc", "/usr/bin/rustc"]
                .iter()
                .find_map(|rustc| Self::stable(Path::new(rustc)))
        })
    }
}

/// `LLVM version: 22.1.2` in what `rustc -vV` says.
fn llvm_major(verbose: &str) -> Option<u32> {
    let version = verbose
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()?.parse().ok()
}

fn toolchain(may_install: bool) -> Result<Toolchain> {
    if let Some(found) = Toolchain::find() {
        return Ok(found);
    }
    let usual = "rustup toolchain install nightly --component rust-src";
    if !may_install || find_program("apt-get").is_none() {
        return Err(Failure::new(
            1,
            format!(
                "no rustc with its library's sources, which eBPF programs are built with: run `{usual}`"
            ),
        ));
    }
    eprintln!("installing a compiler for eBPF: rustc-web, rust-web-src (apt)");
    packages::apt_install(&["rustc-web", "rust-web-src"])
        .with_context(|| format!("cannot install a compiler for eBPF; the other way: `{usual}`"))?;
    Toolchain::find().with_context(|| {
        format!("the installed packages hold no usable compiler for eBPF; the other way: `{usual}`")
    })
}

/// bpf-linker's version; built when it is not there.
fn linker(toolchain: &Toolchain, may_install: bool) -> Result<String> {
    let ask = || {
        let said = run_quietly(Command::new("bpf-linker").arg("--version")).ok()?;
        Some(String::from_utf8_lossy(&said).trim().to_owned())
    };
    if let Some(version) = ask() {
        return Ok(version);
    }
    // Its LLVM must not be older than the compiler's.
    let Some(llvm) = LINKER_LLVMS
        .into_iter()
        .find(|llvm| *llvm >= toolchain.llvm)
    else {
        bail!(
            "bpf-linker {LINKER_VERSION} knows LLVM up to {}, but {} has {}: take an older compiler",
            LINKER_LLVMS[LINKER_LLVMS.len() - 1],
            toolchain.version,
            toolchain.llvm
        );
    };
    let by_hand = format!(
        "LLVM_PREFIX=/usr/lib/llvm-{llvm} cargo install bpf-linker --version {LINKER_VERSION} --no-default-features --features llvm-{llvm}"
    );
    if !may_install {
        return Err(Failure::new(
            1,
            format!("bpf-linker is not installed: run `{by_hand}`"),
        ));
    }
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    if !prefix.join("bin/llvm-config").is_file() && find_program("apt-get").is_some() {
        eprintln!("installing LLVM {llvm} for bpf-linker (apt)");
        let (llvm_dev, polly) = (format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev"));
        packages::apt_install(&[&llvm_dev, &polly, "zlib1g-dev", "libzstd-dev"])?;
    }
    let mut install = Command::new(workspace::cargo());
    install
        .args(["install", "bpf-linker", "--version", LINKER_VERSION])
        .args([
            "--no-default-features",
            "--features",
            &format!("llvm-{llvm}"),
        ])
        .env("LLVM_PREFIX", &prefix);
    let status = Guarded::spawn(&mut install, Signal::SIGTERM)?.wait()?;
    ensure!(
        status.success(),
        "bpf-linker does not install; its errors are above. By hand: `{by_hand}`"
    );
    ask().context("bpf-linker is installed, but not in PATH: add cargo's bin directory to it")
}

/// The tool that takes debugging information out.
fn objcopy(toolchain: &Toolchain) -> Result<PathBuf> {
    let own = |llvm: u32| {
        let path = PathBuf::from(format!("/usr/lib/llvm-{llvm}/bin/llvm-objcopy"));
        path.is_file().then_some(path)
    };
    (toolchain.llvm..=LINKER_LLVMS[LINKER_LLVMS.len() - 1])
        .find_map(own)
        .or_else(|| find_program("llvm-objcopy"))
        .or_else(|| find_program("rust-objcopy"))
        .with_context(|| {
            format!(
                "llvm-objcopy is not installed: run `apt-get install llvm-{}`",
                toolchain.llvm
            )
        })
}

fn build(may_install: bool) -> Result<()> {
    let root = workspace::root();
    let toolchain = toolchain(may_install)?;
    let linker = linker(&toolchain, may_install)?;
    let objcopy = objcopy(&toolchain)?;
    eprintln!("eBPF with {}, {linker}", toolchain.version);
    let target = workspace::target().join("ebpf");
    // Paths end up in the object's BTF: they must not tell where it was built, nor make two
    // builds differ.
    let home = std::env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    );
    let mut flags = vec![
        "--cfg=bpf_target_arch=\"x86_64\"".to_owned(),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        "-Cpanic=abort".to_owned(),
        format!("--remap-path-prefix={}=svcpath", root.display()),
        format!("--remap-path-prefix={}=cargo", home.display()),
        format!("--remap-path-prefix={}=rust", toolchain.sources.display()),
    ];
    // The last prefix that fits wins: crates lose their registry's name as well.
    for registry in fs::read_dir(home.join("registry/src"))
        .into_iter()
        .flatten()
    {
        flags.push(format!(
            "--remap-path-prefix={}=crates",
            registry?.path().display()
        ));
    }
    let mut command = Command::new(&toolchain.cargo[0]);
    command
        .args(&toolchain.cargo[1..])
        .args(["build", "--release", "--package", "tracer-ebpf", "--bins"])
        .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core"])
        .current_dir(&root)
        .env("CARGO_TARGET_DIR", &target)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        // The workspace unwinds; nothing in the kernel can.
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "2")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTUP_TOOLCHAIN");
    match &toolchain.rustc {
        Some(rustc) => command.env("RUSTC", rustc),
        None => command.env_remove("RUSTC").env_remove("CARGO"),
    };
    if toolchain.bootstrap {
        command.env("RUSTC_BOOTSTRAP", "1");
    }
    let status = Guarded::spawn(&mut command, Signal::SIGTERM)?.wait()?;
    ensure!(
        status.success(),
        "the probes do not build; cargo's errors are above"
    );
    let built = target.join("bpfel-unknown-none/release");
    fs::create_dir_all(root.join("tracer-ebpf/prebuilt"))
        .context("cannot create tracer-ebpf/prebuilt")?;
    let mut objects_sha256 = BTreeMap::new();
    for name in OBJECTS {
        let object = object_path(&root, name);
        let content = strip(&objcopy, &built.join(name), &object)?;
        objects_sha256.insert(name.to_owned(), sha256_hex(&content));
        eprintln!(
            "wrote {}, {:.1} kB",
            object.strip_prefix(&root).unwrap_or(&object).display(),
            content.len() as f64 / 1000.0
        );
    }
    let manifest = Manifest {
        source_hash: source_hash(&root)?,
        rustc: toolchain.version,
        linker,
        objects_sha256,
    };
    let mut text = serde_json::to_string_pretty(&manifest)?;
    text.push('\n');
    fs::write(manifest_path(&root), text).context("cannot write the manifest")
}

/// Takes debugging information out of a linked object; what is left.
fn strip(objcopy: &Path, from: &Path, to: &Path) -> Result<Vec<u8>> {
    run_quietly(Command::new(objcopy).arg("--strip-debug").arg(from).arg(to))?;
    let content = fs::read(to).context("cannot read the compiled object")?;
    ensure!(
        content.windows(4).any(|window| window == b".BTF"),
        "the compiled object has no BTF: does bpf-linker {LINKER_VERSION} or later link it?"
    );
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCK: &str = "version = 4\n\n[[package]]\nname = \"aya-ebpf\"\nversion = \"0.2.1\"\n\n\
        [[package]]\nname = \"serde\"\nversion = \"1.0.2\"\n\n\
        [[package]]\nname = \"aya-log-ebpf\"\nversion = \"0.2.0\"\ndependencies = [\n \"aya-ebpf\",\n]\n";

    fn tree(check: impl FnOnce(&Path)) {
        let name = format!(
            "xtask-ebpf-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        );
        let root = std::env::temp_dir().join(name);
        fs::create_dir_all(root.join("tracer-ebpf/src/deep")).expect("writable");
        for (path, content) in [
            ("Cargo.lock", LOCK),
            ("tracer-ebpf/Cargo.toml", "[package]"),
            ("tracer-ebpf/src/main.rs", "fn main() {}"),
            ("tracer-ebpf/src/deep/map.rs", "// a map"),
            ("tracer-ebpf/src/notes.md", "not a source"),
        ] {
            fs::write(root.join(path), content).expect("writable");
        }
        check(&root);
        fs::remove_dir_all(&root).expect("ours");
    }

    #[test]
    fn only_crates_of_the_kernel_count() {
        let expected = vec![("aya-ebpf", "0.2.1"), ("aya-log-ebpf", "0.2.0")];
        assert_eq!(kernel_crates(LOCK), expected);
    }

    #[test]
    fn the_hash_follows_the_sources_and_nothing_else() {
        tree(|root| {
            let hash = || source_hash(root).expect("readable");
            let before = hash();
            fs::write(root.join("tracer-ebpf/src/notes.md"), "changed").expect("writable");
            let serde = LOCK.replace("1.0.2", "1.0.3");
            fs::write(root.join("Cargo.lock"), serde).expect("writable");
            assert_eq!(hash(), before);
            fs::write(root.join("tracer-ebpf/src/deep/map.rs"), "// maps").expect("writable");
            let changed = hash();
            assert_ne!(changed, before);
            fs::write(root.join("Cargo.lock"), LOCK.replace("0.2.1", "0.2.2")).expect("writable");
            assert_ne!(hash(), changed);
        });
    }

    #[test]
    fn a_stale_or_foreign_object_is_refused_with_a_remedy() {
        tree(|root| {
            let refusal = || format!("{:#}", check_in(root).expect_err("refused"));
            assert!(
                refusal().contains("no compiled eBPF object"),
                "{}",
                refusal()
            );
            fs::create_dir_all(root.join("tracer-ebpf/prebuilt")).expect("writable");
            let mut objects_sha256 = BTreeMap::new();
            for name in OBJECTS {
                fs::write(object_path(root, name), name).expect("writable");
                objects_sha256.insert(name.to_owned(), sha256_hex(name.as_bytes()));
            }
            let manifest = Manifest {
                source_hash: source_hash(root).expect("readable"),
                rustc: "rustc 1.96.0".to_owned(),
                linker: "bpf-linker 0.13.0".to_owned(),
                objects_sha256,
            };
            let text = serde_json::to_vec(&manifest).expect("plain data");
            fs::write(manifest_path(root), text).expect("writable");
            check_in(root).expect("up to date");
            fs::write(object_path(root, "rule_changes"), b"another").expect("writable");
            assert!(
                refusal().contains("not the one its manifest describes"),
                "{}",
                refusal()
            );
            fs::write(root.join("tracer-ebpf/src/main.rs"), "fn main() { }").expect("writable");
            assert!(refusal().contains("stale"), "{}", refusal());
            assert!(
                refusal().contains("cargo xtask build-ebpf"),
                "{}",
                refusal()
            );
        });
    }

    #[test]
    fn the_compilers_llvm() {
        let verbose = "rustc 1.96.0\nbinary: rustc\nhost: x86_64\nLLVM version: 22.1.8\n";
        assert_eq!(llvm_major(verbose), Some(22));
        assert_eq!(llvm_major("rustc 1.96.0"), None);
    }
}
