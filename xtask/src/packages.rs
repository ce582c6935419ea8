//! The programs that svcpath's machine needs, and the packages they come in.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::Failure;
use crate::initramfs::run_quietly;

/// A Debian package and the program by which its presence is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Need {
    /// The package's name in Debian and Ubuntu.
    pub(crate) package: &'static str,
    /// A program that it brings.
    pub(crate) program: &'static str,
}

const fn need(package: &'static str, program: &'static str) -> Need {
    Need { package, program }
}

/// What running and testing take.
pub(crate) const NEEDS: [Need; 9] = [
    need("qemu-system-x86", "qemu-system-x86_64"),
    need("iptables", "iptables-restore"),
    need("ipset", "ipset"),
    need("ipvsadm", "ipvsadm"),
    need("nftables", "nft"),
    need("iproute2", "ip"),
    need("kmod", "modprobe"),
    need("xz-utils", "xz"),
    need("zstd", "zstd"),
];

/// Where a program is: in `PATH`, or where distributions keep the administrator's.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
}

fn missing<'a>(needs: &'a [Need], has: &dyn Fn(&str) -> bool) -> Vec<&'a Need> {
    needs.iter().filter(|need| !has(need.program)).collect()
}

fn install_line(missing: &[&Need]) -> String {
    format!(
        "apt-get install --no-install-recommends {}",
        join(missing, " ", |need| need.package)
    )
}

fn join(needs: &[&Need], by: &str, what: fn(&Need) -> &str) -> String {
    let names: Vec<&str> = needs.iter().map(|need| what(need)).collect();
    names.join(by)
}

/// What to do about what is missing.
#[derive(Debug, PartialEq)]
enum Plan {
    Nothing,
    Install,
    Refuse(String),
}

fn plan(missing: &[&Need], may_install: bool, apt: bool) -> Plan {
    if missing.is_empty() {
        Plan::Nothing
    } else if !apt {
        Plan::Refuse(format!(
            "svcpath needs the programs {}, and this machine has no apt-get to install them: use its own package manager",
            join(missing, ", ", |need| need.program)
        ))
    } else if may_install {
        Plan::Install
    } else {
        Plan::Refuse(format!(
            "svcpath needs {}: run `{}`, or leave out --no-install",
            join(missing, ", ", |need| need.package),
            install_line(missing)
        ))
    }
}

/// Installs what is missing of `needs`, or says what is.
pub(crate) fn prepare(needs: &[Need], may_install: bool) -> Result<()> {
    let missing = missing(needs, &|program| find_program(program).is_some());
    let apt = find_program("apt-get").is_some();
    match plan(&missing, may_install, apt) {
        Plan::Nothing => return Ok(()),
        Plan::Refuse(why) => return Err(Failure::new(1, why)),
        Plan::Install if !nix::unistd::geteuid().is_root() => {
            return Err(Failure::new(
                3,
                format!(
                    "svcpath needs {}, and only root can install: run `{}` as root",
                    join(&missing, ", ", |need| need.package),
                    install_line(&missing)
                ),
            ));
        }
        Plan::Install => {}
    }
    let count = missing.len();
    let heading = format!(
        "svcpath needs {}: installing {count} package{} (apt)",
        join(&missing, ", ", |need| need.package),
        if count == 1 { "" } else { "s" }
    );
    eprint!("{heading}");
    let start = Instant::now();
    let outcome = install(&missing);
    match &outcome {
        Ok(()) => eprintln!("{:<8}done  {:.0} s", "", start.elapsed().as_secs_f64()),
        Err(_) => eprintln!(),
    }
    outcome
}

/// Installs packages by their names.
pub(crate) fn apt_install(packages: &[&str]) -> Result<()> {
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .args(["-q", "-y", "-o", "DPkg::Lock::Timeout=120"])
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive");
        run_quietly(&mut command)
    };
    let install = [&["install", "--no-install-recommends"], packages].concat();
    // Package lists may be missing or name files that are gone: then, and only then, update.
    if apt(&install).is_err() {
        apt(&["update"]).context("cannot update the package lists; is the network there?")?;
        apt(&install).with_context(|| {
            format!(
                "cannot install packages; try `apt-get {}` yourself",
                install.join(" ")
            )
        })?;
    }
    Ok(())
}

/// Installs those of these packages that are not there, whatever programs they bring.
pub(crate) fn prepare_packages(names: &[String], may_install: bool) -> Result<()> {
    let missing: Vec<&str> = names
        .iter()
        .map(String::as_str)
        .filter(|name| files_of(name).is_err())
        .collect();
    let Some(first) = missing.first() else {
        return Ok(());
    };
    let line = format!(
        "apt-get install --no-install-recommends {}",
        missing.join(" ")
    );
    if !may_install {
        return Err(Failure::new(
            1,
            format!("{first} is not installed: run `{line}`, or leave out --no-install"),
        ));
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(Failure::new(
            3,
            format!("{first} is not installed, and only root can install: run `{line}` as root"),
        ));
    }
    eprintln!("the VM is to have {}: installing (apt)", missing.join(", "));
    apt_install(&missing)
}

/// The files of an installed package, without its documentation.
pub(crate) fn files_of(package: &str) -> Result<Vec<PathBuf>> {
    let listing = run_quietly(Command::new("dpkg-query").args(["--listfiles", package]))
        .with_context(|| format!("the package {package} is not installed"))?;
    Ok(String::from_utf8_lossy(&listing)
        .lines()
        .filter(|path| !path.starts_with("/usr/share/"))
        .map(PathBuf::from)
        .filter(|path| path.is_file())
        .collect())
}

/// Is it a package's name by Debian's rules (Policy 5.6.7), and so none of apt's options?
pub(crate) fn package_name(text: &str) -> std::result::Result<String, String> {
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if text.starts_with(alphanumeric) && text.chars().all(|c| alphanumeric(c) || "+-.".contains(c))
    {
        Ok(text.to_owned())
    } else {
        Err("a package's name consists of a-z, 0-9, +, - and .".to_owned())
    }
}

fn install(missing: &[&Need]) -> Result<()> {
    let names: Vec<&str> = missing.iter().map(|need| need.package).collect();
    apt_install(&names)?;
    let still = self::missing(&NEEDS, &|program| find_program(program).is_some());
    let still: Vec<&Need> = still
        .into_iter()
        .filter(|need| missing.contains(need))
        .collect();
    anyhow::ensure!(
        still.is_empty(),
        "the packages are installed, but {} cannot be found in PATH or /usr/sbin",
        join(&still, ", ", |need| need.program)
    );
    Ok(())
}

/// What a tool says of its own version; empty when it is not there.
pub(crate) fn version_of(program: &str, arguments: &[&str]) -> String {
    find_program(program)
        .and_then(|path| Command::new(path).args(arguments).output().ok())
        .map(|output| {
            let said = [output.stdout, output.stderr].concat();
            version_in(&String::from_utf8_lossy(&said)).to_owned()
        })
        .unwrap_or_default()
}

/// The first word of a text that looks like a version.
fn version_in(text: &str) -> &str {
    text.split(|c: char| c.is_whitespace() || c == ',' || c == '(' || c == ')')
        .map(|word| word.strip_prefix('v').unwrap_or(word))
        .map(|word| word.strip_prefix("iproute2-").unwrap_or(word))
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_is_installed() {
        let has = |program: &str| program != "ipset" && program != "xz";
        let missing = missing(&NEEDS, &has);
        assert_eq!(
            install_line(&missing),
            "apt-get install --no-install-recommends ipset xz-utils"
        );
        assert_eq!(plan(&missing, true, true), Plan::Install);
        assert_eq!(plan(&[], false, false), Plan::Nothing);
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        let missing = missing(&NEEDS, &|program| program != "qemu-system-x86_64");
        let Plan::Refuse(why) = plan(&missing, false, true) else {
            panic!("--no-install installs nothing");
        };
        assert!(
            why.contains("apt-get install --no-install-recommends qemu-system-x86"),
            "{why}"
        );
        let Plan::Refuse(why) = plan(&missing, true, false) else {
            panic!("nothing to install with");
        };
        assert!(why.contains("qemu-system-x86_64"), "{why}");
    }

    #[test]
    fn names_of_packages_are_no_options() {
        assert_eq!(package_name("bpftrace"), Ok("bpftrace".to_owned()));
        assert_eq!(package_name("libstdc++6"), Ok("libstdc++6".to_owned()));
        for text in ["", "-y", "--reinstall", "a b", "Bash", "a=1"] {
            assert!(package_name(text).is_err(), "{text}");
        }
    }

    #[test]
    fn files_of_a_package() {
        let files = files_of("coreutils").expect("every Debian has it");
        assert!(files.iter().any(|path| path.ends_with("bin/cat")));
        let documented = |path: &PathBuf| path.starts_with("/usr/share");
        assert!(!files.iter().any(documented), "{files:?}");
        assert!(files_of("no-such-package").is_err());
    }

    #[test]
    fn versions_of_tools() {
        assert_eq!(version_in("iptables v1.8.9 (nf_tables)"), "1.8.9");
        assert_eq!(version_in("ipset v7.17, protocol version: 7"), "7.17");
        assert_eq!(
            version_in("ip utility, iproute2-6.1.0, libbpf 1.1.2"),
            "6.1.0"
        );
        assert_eq!(
            version_in("ipvsadm v1.31 2019/12/24 (compiled with popt)"),
            "1.31"
        );
        assert_eq!(
            version_in("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)"),
            "7.2.22"
        );
        assert_eq!(version_in("no version"), "");
    }
}
