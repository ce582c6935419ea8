//! Runs jobs and keeps their results as parts of a run.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::matrix::{Job, JobKind, Load};
use super::node::{self, NodeError};
use super::{cell, fault};
use crate::record::run::{Cell, Clock, Fault};

/// What a job measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
pub enum Part {
    /// A cell.
    Cell(Box<Cell>),
    /// Control, flush and switch runs, in the order in which they were made.
    Faults(Vec<Fault>),
}

/// A job's file: what was measured, and on which clock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartFile {
    /// The clock of every time in it.
    pub clock: Clock,
    /// What was measured.
    pub part: Part,
}

/// Tells how far a job is: a share from 0 to 1 and what is happening.
pub type Progress<'a> = dyn Fn(f64, &str) + 'a;

/// Runs one job in namespaces of this machine.
///
/// # Errors
///
/// Whatever stopped it; nothing is left behind either way.
pub async fn run(job: Job, load: &Load, progress: &Progress<'_>) -> Result<Part, NodeError> {
    node::require(&job.modes())?;
    Ok(match job.kind {
        JobKind::Cell => Part::Cell(Box::new(cell::run(job, load, progress).await?)),
        JobKind::Flush => Part::Faults(fault::flush(job, load, progress).await?),
        JobKind::Switch(to) => Part::Faults(vec![fault::switch(job, to, load, progress).await?]),
    })
}

/// How long to wait for a quiet machine: on one that others use, it may never be.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a machine must have been idle to be called quiet.
const IDLE: Duration = Duration::from_millis(100);

/// Waits until the CPUs are idle, or not for much longer: namespaces, links and rules of the job
/// before are taken down in the background.
pub async fn quiet() {
    let begin = tokio::time::Instant::now();
    let mut before = busy_ticks();
    while begin.elapsed() < PATIENCE {
        tokio::time::sleep(IDLE).await;
        let now = busy_ticks();
        if now == before {
            return;
        }
        before = now;
    }
}

/// Ticks in which any CPU did something (proc(5), /proc/stat: all but idle and iowait).
fn busy_ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields = stat.lines().next().unwrap_or_default().split_whitespace();
    fields
        .skip(1)
        .enumerate()
        .filter(|(i, _)| *i != 3 && *i != 4)
        .filter_map(|(_, ticks)| ticks.parse::<u64>().ok())
        .sum()
}

/// Why a part file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PartError {
    /// Reading failed.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is no part file.
    #[error("{path} is no part of a run: {source}; measure it again with `svcpath bench job`")]
    Damaged {
        /// The file.
        path: String,
        /// Where it stops making sense.
        source: serde_json::Error,
    },
}

impl PartFile {
    /// Reads a part.
    pub fn read(path: &Path) -> Result<Self, PartError> {
        let json = std::fs::read(path).map_err(|source| PartError::Io {
            path: path.display().to_string(),
            source,
        })?;
        serde_json::from_slice(&json).map_err(|source| PartError::Damaged {
            path: path.display().to_string(),
            source,
        })
    }
}
