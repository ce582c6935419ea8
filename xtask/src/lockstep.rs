//! The library that keeps QEMU's two threads in step (`xtask/lockstep`), built when it is needed.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use crate::interrupt::Guarded;
use crate::workspace;

/// Builds it, once; answers where it is.
pub(crate) fn library() -> Result<PathBuf> {
    static BUILT: Mutex<bool> = Mutex::new(false);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if !*built {
        let mut cargo = Command::new(workspace::cargo());
        cargo
            .args(["build", "--quiet", "--release", "-p", "lockstep"])
            .current_dir(workspace::root());
        let status = Guarded::spawn(&mut cargo, Signal::SIGTERM)?.wait()?;
        ensure!(
            status.success(),
            "lockstep does not build (cargo build --release -p lockstep); its errors are above"
        );
        *built = true;
    }
    Ok(workspace::target().join("release").join("liblockstep.so"))
}
