//! Parts to a run, in the matrix's order whatever the order in which they were measured.

use std::path::Path;

use super::job::{Part, PartError, PartFile};
use super::matrix::Matrix;
use crate::record::run::{Clock, Measurements};

/// Why parts make no run.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// A part is missing or damaged.
    #[error(transparent)]
    Part(#[from] PartError),
    /// The parts were measured on different clocks.
    #[error("part {0} was measured on another clock than the parts before it: they make no run")]
    Clocks(String),
}

/// Joins the parts `DIR/<job id>.json` of a matrix.
pub fn assemble(matrix: &Matrix, parts: &Path) -> Result<Measurements, AssembleError> {
    let files: Result<Vec<PartFile>, PartError> = matrix
        .jobs()
        .into_iter()
        .map(|job| PartFile::read(&parts.join(format!("{}.json", job.id()))))
        .collect();
    join(matrix, files?)
}

/// Joins the parts of a matrix's jobs, in the jobs' order.
pub fn join(matrix: &Matrix, files: Vec<PartFile>) -> Result<Measurements, AssembleError> {
    let mut clock = None;
    let mut cells = Vec::new();
    let mut faults = Vec::new();
    for (job, file) in matrix.jobs().into_iter().zip(files) {
        if *clock.get_or_insert(file.clock) != file.clock {
            return Err(AssembleError::Clocks(job.id()));
        }
        match file.part {
            Part::Cell(cell) => cells.push(*cell),
            Part::Faults(more) => faults.extend(more),
        }
    }
    Ok(Measurements {
        clock: clock.unwrap_or(Clock::Wall),
        tier: "hooks".to_owned(),
        seed: matrix.load.seed,
        cells,
        faults,
    })
}
