//! Sysctls of one network namespace.
//!
//! `/proc/sys/net` shows the namespace of the thread that looks, so nothing is mounted for it.

use std::io;

use super::netns::{Netns, NetnsError};

/// Why a sysctl could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// It could not be read.
    #[error("cannot read /proc/sys/{key} in network namespace {netns}: {source}")]
    Read {
        /// The namespace's name.
        netns: String,
        /// Below `/proc/sys`, with slashes.
        key: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It could not be written.
    #[error("cannot set /proc/sys/{key} to {value} in network namespace {netns}: {source}")]
    Write {
        /// The namespace's name.
        netns: String,
        /// Below `/proc/sys`, with slashes.
        key: String,
        /// The value.
        value: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It holds something else than a number.
    #[error("sysctl {key} in network namespace {netns} holds '{value}', not a number")]
    NotANumber {
        /// The namespace's name.
        netns: String,
        /// Below `/proc/sys`, with slashes.
        key: String,
        /// What it holds.
        value: String,
    },
}

impl SysctlError {
    /// Does the kernel not know it?
    pub fn is_missing(&self) -> bool {
        match self {
            Self::Read { source, .. } | Self::Write { source, .. } => {
                source.kind() == io::ErrorKind::NotFound
            }
            Self::Netns(_) | Self::NotANumber { .. } => false,
        }
    }
}

/// Writes `value` to `/proc/sys/<key>`; `key` starts with `net/`, everything else is global.
pub fn write(netns: &Netns, key: &str, value: &str) -> Result<(), SysctlError> {
    // What is not below net/ belongs to the whole machine, which is never changed.
    let result = if key.starts_with("net/") {
        netns.run(|| std::fs::write(format!("/proc/sys/{key}"), value))?
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a sysctl of a network namespace",
        ))
    };
    result.map_err(|source| SysctlError::Write {
        netns: netns.name().to_owned(),
        key: key.to_owned(),
        value: value.to_owned(),
        source,
    })
}

/// Reads the number in `/proc/sys/<key>`.
pub fn read_number(netns: &Netns, key: &str) -> Result<u64, SysctlError> {
    let value = netns
        .run(|| std::fs::read_to_string(format!("/proc/sys/{key}")))?
        .map_err(|source| SysctlError::Read {
            netns: netns.name().to_owned(),
            key: key.to_owned(),
            source,
        })?;
    value.trim().parse().map_err(|_| SysctlError::NotANumber {
        netns: netns.name().to_owned(),
        key: key.to_owned(),
        value: value.trim().to_owned(),
    })
}
