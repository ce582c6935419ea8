//! What kernels and tiers tell of the same packets: a test leaves it in a directory, here and in VMs, and another
//! one (tests/kernels.rs) compares it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::interrupt::{self, Guarded};
use crate::workspace;

/// In its environment a test that tells what a kernel answers finds the directory to tell it in.
pub(crate) const ANSWERS: &str = "SVCPATH_ANSWERS";
/// The releases that have to have told, for the test that compares them.
const KERNELS: &str = "SVCPATH_KERNELS";
/// The test that tells, here and in VMs.
pub(crate) const TELLS: &str = "answers_of_this_kernel";
/// A kernel without netfilter links, which has to tell the same as those that have them.
pub(crate) const OLDER: &str = "6.1";

/// What kernels tell of the same packets.
pub(crate) struct Answers {
    directory: PathBuf,
}

impl Answers {
    /// An empty directory for them; nothing if the test that tells is not among those with `filter` in their names.
    pub(crate) fn prepare(filter: Option<&str>) -> Result<Option<Self>> {
        if !TELLS.contains(filter.unwrap_or_default()) {
            return Ok(None);
        }
        let directory = workspace::vm_cache().join(format!("answers-{}", std::process::id()));
        interrupt::remove_on_exit(&directory);
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        Ok(Some(Self { directory }))
    }

    /// For the environment of tests.
    pub(crate) fn variable(&self) -> (&'static str, &Path) {
        (ANSWERS, &self.directory)
    }

    /// What VMs told.
    pub(crate) fn take(&self, files: &BTreeMap<String, Vec<u8>>) -> Result<()> {
        for (name, content) in files {
            let to = self.directory.join(name);
            fs::write(&to, content).with_context(|| format!("cannot write {}", to.display()))?;
        }
        Ok(())
    }

    /// Is it the same on these kernels, all of which have to have told? `program` compares.
    pub(crate) fn agree(&self, program: &Path, kernels: &[String]) -> Result<bool> {
        let mut compare = Command::new(program);
        compare
            .arg("--nocapture")
            .env(ANSWERS, &self.directory)
            .env(KERNELS, kernels.join(","));
        Ok(Guarded::spawn(&mut compare, Signal::SIGTERM)?
            .wait()?
            .success())
    }

    /// Leaves them where they can be looked at, in place of those of the run before.
    pub(crate) fn keep(self) -> Result<()> {
        let to = workspace::target().join("svcpath-answers");
        interrupt::remove(&to);
        fs::rename(&self.directory, &to).with_context(|| {
            format!(
                "cannot move {} to {}",
                self.directory.display(),
                to.display()
            )
        })
    }
}

/// The release of the kernel that runs here.
pub(crate) fn kernel_here() -> Result<String> {
    let names = nix::sys::utsname::uname().context("this kernel does not tell its name")?;
    Ok(names.release().to_string_lossy().into_owned())
}
