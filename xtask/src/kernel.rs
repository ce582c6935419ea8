//! The guest's kernel: found, fetched and unpacked through the distribution's own packages.
//!
//! Once unpacked it is used again, so that figures taken today and tomorrow come from the same
//! kernel; another one is fetched when another is asked for.

use std::cmp::Reverse;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::initramfs::run_quietly;
use crate::packages::find_program;

/// What is used unless `--kernel` says otherwise: it has netfilter BPF links.
pub(crate) const DEFAULT_SERIES: &str = "6.12";

/// An unpacked kernel.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Kernel {
    /// `uname -r` once it runs.
    pub(crate) release: String,
    /// The bootable image.
    pub(crate) image: PathBuf,
    /// Its modules, with `modules.dep`.
    pub(crate) modules: PathBuf,
}

/// What `--kernel` asks for.
#[derive(Clone, Debug, PartialEq)]
enum Wish {
    /// The newest of a series: `6.12`.
    Series(String),
    /// Exactly this release.
    Release(String),
}

impl Wish {
    fn parse(text: &str) -> Self {
        let text = package_release(text).unwrap_or(text);
        let series =
            text.split('.').count() == 2 && text.split('.').all(|part| part.parse::<u32>().is_ok());
        if series {
            Self::Series(text.to_owned())
        } else {
            Self::Release(text.to_owned())
        }
    }

    fn is(&self, release: &str) -> bool {
        match self {
            Self::Series(series) => release.starts_with(&format!("{series}.")),
            Self::Release(wanted) => release == wanted,
        }
    }
}

/// The kernel release that a package of a kernel image carries, or nothing for a meta package,
/// debug symbols and the like.
fn package_release(package: &str) -> Option<&str> {
    let release = package
        .strip_prefix("linux-image-unsigned-")
        .or_else(|| package.strip_prefix("linux-image-"))?;
    let flavoured = release.ends_with("-cloud-amd64")
        || release.ends_with("-amd64")
        || release.ends_with("-generic");
    // 6.12-cloud-amd64 and cloud-amd64 are meta packages; a real one has three numbers.
    (flavoured
        && release
            .split(['.', '-', '+'])
            .take(3)
            .all(|part| part.parse::<u32>().is_ok()))
    .then_some(release)
}

/// Sorts 6.12.9 before 6.12.117.
fn version_key(release: &str) -> Vec<u64> {
    release
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

/// The newest fitting package. Cloud kernels are small and have everything that is needed here,
/// so they win over others of the series.
fn choose<'a>(wish: &Wish, packages: impl Iterator<Item = &'a str>) -> Option<(&'a str, &'a str)> {
    packages
        .filter_map(|package| Some((package, package_release(package)?)))
        .filter(|(_, release)| wish.is(release))
        .max_by_key(|(package, release)| {
            (
                release.ends_with("-cloud-amd64"),
                version_key(release),
                // Debian's signed image before its unsigned twin.
                Reverse(package.len()),
            )
        })
}

/// Finds the kernel below `cache`, or fetches it. `say` gets a line when that takes a while.
pub(crate) fn prepare(wish: Option<&str>, cache: &Path, say: &dyn Fn(&str)) -> Result<Kernel> {
    let asked = wish.unwrap_or(DEFAULT_SERIES);
    let wish_parsed = Wish::parse(asked);
    let directory = cache.join("kernels");
    if let Some(kernel) = unpacked(&wish_parsed, &directory)? {
        return Ok(kernel);
    }
    if find_program("apt-get").is_none() {
        bail!(
            "no kernel {asked} for the VM: kernels are fetched with apt-get, which this machine does not have; \
             unpack one with boot/vmlinuz-RELEASE and lib/modules/RELEASE as {}/RELEASE",
            directory.display()
        );
    }
    let mut names = package_names()?;
    if choose(&wish_parsed, names.lines()).is_none() {
        run_quietly(Command::new("apt-get").args(["update", "-q"]))
            .context("no such kernel in the package lists, and they cannot be updated")?;
        names = package_names()?;
    }
    let chosen = choose(&wish_parsed, names.lines());
    // Ubuntu has one kernel series a release: any 6.x there will do unless one was asked for.
    let chosen = chosen.or_else(|| {
        (wish.is_none())
            .then(|| {
                names
                    .lines()
                    .filter_map(|package| Some((package, package_release(package)?)))
                    .filter(|(_, release)| {
                        release.starts_with("6.") && release.ends_with("-generic")
                    })
                    .max_by_key(|(_, release)| version_key(release))
            })
            .flatten()
    });
    let Some((package, release)) = chosen else {
        bail!(
            "no kernel package fits `{asked}`: `apt-cache search --names-only '^linux-image-6'` lists what there is; \
             name a series (--kernel 6.12), a release or a package"
        );
    };
    let exactly = Wish::Release(release.to_owned());
    if let Some(kernel) = unpacked(&exactly, &directory)? {
        return Ok(kernel);
    }
    say(&format!("fetching the VM's kernel: {package}"));
    fetch(package, release, &directory)?;
    unpacked(&exactly, &directory)?
        .with_context(|| format!("the package {package} holds no bootable kernel {release}"))
}

fn package_names() -> Result<String> {
    let listing = run_quietly(Command::new("apt-cache").args(["pkgnames", "linux-image-"]))
        .context("cannot list kernel packages")?;
    Ok(String::from_utf8_lossy(&listing).into_owned())
}

/// Downloads and unpacks. The directory appears under its name only when it is complete.
fn fetch(package: &str, release: &str, directory: &Path) -> Result<()> {
    let partial = directory.join(format!(".partial-{}", std::process::id()));
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    crate::interrupt::remove_on_exit(&partial);
    let mut packages = vec![package.to_owned()];
    if release.ends_with("-generic") {
        packages.push(format!("linux-modules-{release}"));
    }
    for package in &packages {
        // apt's own unprivileged user could not write here; it checks what it gets either way.
        run_quietly(
            Command::new("apt-get")
                .args(["-q", "-o", "APT::Sandbox::User=root", "download", package])
                .current_dir(&partial),
        )
        .with_context(|| {
            format!("cannot download {package}; is the network there? `apt-get update` may help")
        })?;
    }
    for entry in fs::read_dir(&partial)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run_quietly(Command::new("dpkg-deb").arg("-x").arg(&path).arg(&partial))?;
            fs::remove_file(&path)?;
        }
    }
    // Newer packages hold usr/lib/modules only.
    if !partial.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", partial.join("lib"))?;
    }
    run_quietly(
        Command::new(find_program("depmod").context("depmod is not installed (Debian: kmod)")?)
            .arg("-b")
            .arg(&partial)
            .arg(release),
    )?;
    uncompress(
        &partial.join(format!("boot/vmlinuz-{release}")),
        &partial.join(format!("boot/vmlinux-{release}")),
    )?;
    let done = directory.join(release);
    if !done.exists() {
        fs::rename(&partial, &done).with_context(|| format!("cannot create {}", done.display()))?;
    }
    Ok(())
}

/// Takes the kernel out of its self-extracting image: QEMU starts it directly (PVH), where the
/// translator would spend more than a second a boot on the extracting.
///
/// An image in a form that is not known stays as it is; it boots too.
fn uncompress(image: &Path, plain: &Path) -> Result<()> {
    let bytes = fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    let Some(payload) = payload(&bytes) else {
        return Ok(());
    };
    let tool = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "xz",
        [0x1f, 0x8b, ..] => "gzip",
        _ => return Ok(()),
    };
    let Some(tool) = find_program(tool) else {
        return Ok(());
    };
    let packed = plain.with_extension("packed");
    fs::write(&packed, payload)?;
    let unpacked = Command::new(tool)
        .arg("-dc")
        .stdin(fs::File::open(&packed)?)
        .output()
        .context("cannot unpack the kernel's image")?;
    fs::remove_file(&packed)?;
    // Only an ELF file can be started directly.
    if unpacked.status.success() && unpacked.stdout.starts_with(b"\x7fELF") {
        fs::write(plain, unpacked.stdout)
            .with_context(|| format!("cannot write {}", plain.display()))?;
    }
    Ok(())
}

/// The compressed kernel in a bzImage (Documentation/arch/x86/boot.rst: `setup_sects`,
/// `payload_offset`, `payload_length`; its last four bytes are the uncompressed size).
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    if image.get(0x202..0x206)? != b"HdrS" || image.get(0x1fe..0x200)? != [0x55, 0xaa] {
        return None;
    }
    let setup_sectors = match image.get(0x1f1)? {
        0 => 4,
        n => usize::from(*n),
    };
    let begin = (setup_sectors + 1) * 512 + word(0x248)?;
    image.get(begin..begin + word(0x24c)?.checked_sub(4)?)
}

/// The newest kernel that fits and is already there.
fn unpacked(wish: &Wish, directory: &Path) -> Result<Option<Kernel>> {
    if !directory.is_dir() {
        return Ok(None);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let release = entry?.file_name().to_string_lossy().into_owned();
        let root = directory.join(&release);
        let plain = root.join(format!("boot/vmlinux-{release}"));
        let kernel = Kernel {
            image: if plain.is_file() {
                plain
            } else {
                root.join(format!("boot/vmlinuz-{release}"))
            },
            modules: root.join("lib/modules").join(&release),
            release,
        };
        if wish.is(&kernel.release)
            && kernel.image.is_file()
            && kernel.modules.join("modules.dep").is_file()
        {
            found.push(kernel);
        }
    }
    Ok(found
        .into_iter()
        .max_by_key(|kernel| version_key(&kernel.release)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKAGES: &str = "linux-image-6.1.0-9-cloud-amd64\nlinux-image-6.1.0-56-cloud-amd64\n\
        linux-image-6.12-cloud-amd64\nlinux-image-6.12.99+deb12-cloud-amd64\n\
        linux-image-6.12.117+deb12-cloud-amd64-unsigned\nlinux-image-6.12.117+deb12-cloud-amd64-dbg\n\
        linux-image-6.12.117+deb12-cloud-amd64\nlinux-image-6.12.118+deb12-amd64\n\
        linux-image-cloud-amd64\nlinux-image-6.1.0-60-rt-amd64-dbg\nlinux-image-unsigned-6.8.0-31-generic";

    fn chosen(wish: &str) -> Option<&'static str> {
        choose(&Wish::parse(wish), PACKAGES.lines()).map(|(package, _)| package)
    }

    #[test]
    fn the_newest_real_cloud_kernel_of_a_series() {
        assert_eq!(
            chosen("6.12"),
            Some("linux-image-6.12.117+deb12-cloud-amd64")
        );
        assert_eq!(chosen("6.1"), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(chosen("6.13"), None);
    }

    #[test]
    fn an_exact_package_or_release() {
        let exact = "linux-image-6.12.99+deb12-cloud-amd64";
        assert_eq!(chosen(exact), Some(exact));
        assert_eq!(chosen("6.12.99+deb12-cloud-amd64"), Some(exact));
        assert_eq!(
            chosen("6.8.0-31-generic"),
            Some("linux-image-unsigned-6.8.0-31-generic")
        );
        assert_eq!(chosen("6.12.98+deb12-cloud-amd64"), None);
    }

    #[test]
    fn meta_packages_and_symbols_are_no_kernels() {
        for package in [
            "linux-image-6.12-cloud-amd64",
            "linux-image-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64-dbg",
            "linux-headers-6.12.117+deb12-cloud-amd64",
        ] {
            assert_eq!(package_release(package), None, "{package}");
        }
    }

    #[test]
    fn versions_sort_by_number() {
        assert!(version_key("6.12.9-cloud") < version_key("6.12.117-cloud"));
        assert!(version_key("6.1.0-9-cloud") < version_key("6.1.0-56-cloud"));
    }

    #[test]
    fn the_payload_is_where_the_boot_protocol_says() {
        let mut image = vec![0_u8; 4096];
        image[0x1f1] = 3;
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&12_u32.to_le_bytes());
        image[2064..2072].copy_from_slice(b"payload!");
        assert_eq!(payload(&image), Some(&b"payload!"[..]));
        assert_eq!(payload(&image[..1000]), None);
        image[0x1fe] = 0;
        assert_eq!(payload(&image), None);
    }

    #[test]
    fn an_unpacked_kernel_is_found_again_only_when_complete() {
        let directory = std::env::temp_dir().join(format!("xtask-kernel-{}", std::process::id()));
        let release = "6.12.5+deb12-cloud-amd64";
        let wish = Wish::parse("6.12");
        let modules = directory.join(release).join("lib/modules").join(release);
        fs::create_dir_all(&modules).expect("writable");
        fs::create_dir_all(directory.join(release).join("boot")).expect("writable");
        fs::write(modules.join("modules.dep"), "").expect("writable");
        assert_eq!(unpacked(&wish, &directory).expect("readable"), None);
        let image = directory
            .join(release)
            .join(format!("boot/vmlinuz-{release}"));
        fs::write(&image, "").expect("writable");
        let found = unpacked(&wish, &directory)
            .expect("readable")
            .expect("complete");
        assert_eq!(found.image, image);
        let plain = image.with_file_name(format!("vmlinux-{release}"));
        fs::write(&plain, "").expect("writable");
        let found = unpacked(&wish, &directory).expect("readable");
        assert_eq!(found.map(|kernel| kernel.image), Some(plain));
        assert_eq!(
            unpacked(&Wish::parse("6.1"), &directory).expect("readable"),
            None
        );
        fs::remove_dir_all(&directory).expect("ours");
    }
}
