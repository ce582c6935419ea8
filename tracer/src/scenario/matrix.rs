//! The comparison's matrix: modes × sizes, then control, flush and switch runs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::lab::plan::MAX_SERVICES;
use crate::record::run::Place;
use crate::rules::Mode;

/// Endpoints of each Service.
pub const ENDPOINTS: u32 = 3;

/// The largest iptables-nft size in a virtual machine: its restore grows quadratically.
pub const NFT_COMPAT_LIMIT: u32 = 2000;

/// The most flows of one path: a flow never reuses a source port, and the node sends two paths'
/// flows from one address.
pub const MAX_FLOWS: u32 = 10_000;

/// What to compare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// The modes.
    pub modes: Vec<Mode>,
    /// Numbers of Services.
    pub services: Vec<u32>,
    /// Seed of every random choice.
    pub seed: u64,
    /// Smaller faults.
    pub quick: bool,
    /// New flows of each path in a cell.
    pub flows_per_path: u32,
    /// Where the node lives.
    pub place: Place,
}

/// A matrix that cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum MatrixError {
    /// A size out of range.
    #[error("{0} Services: use 1 to {MAX_SERVICES}")]
    Size(u32),
    /// No flows, or more than the laboratory has source ports for.
    #[error("{0} flows on each path: use 1 to {MAX_FLOWS}")]
    Flows(u32),
    /// Nothing to do.
    #[error("no {0} given: name at least one")]
    Empty(&'static str),
    /// Not a job of this matrix.
    #[error("no job '{0}' in this matrix; `svcpath bench plan` lists them")]
    UnknownJob(String),
}

/// One thing to run: a cell or a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// What is measured.
    pub kind: JobKind,
    /// The mode at the start.
    pub mode: Mode,
    /// Number of Services.
    pub services: u32,
}

/// What a job measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// Costs of one mode at one size.
    Cell,
    /// First nothing happens and nothing may be lost; then the rules are flushed, and put back.
    Flush,
    /// Switched to another mode, and back.
    Switch(Mode),
}

/// Jobs that run one after the other in one place, each on a node of its own: a mode's cells and
/// flush, or the switch. A virtual machine boots once for each group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// A stable identifier, also the name of its part file.
    pub id: String,
    /// For people.
    pub title: String,
    /// In the order in which they run.
    pub jobs: Vec<Job>,
}

/// A group as `svcpath bench plan` prints it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedGroup {
    /// What `svcpath bench job` takes.
    pub id: String,
    /// For people.
    pub title: String,
    /// How long it takes, in units of a small job.
    pub weight: f64,
    /// The jobs in it.
    pub parts: Vec<String>,
}

impl Matrix {
    /// The whole comparison, or the quick one.
    pub fn standard(quick: bool, seed: u64, place: Place) -> Self {
        Self {
            modes: Mode::ALL.to_vec(),
            services: if quick {
                vec![100, 1000]
            } else {
                vec![100, 1000, 5000]
            },
            seed,
            quick,
            flows_per_path: if quick { 200 } else { 1000 },
            place,
        }
    }

    /// Can it be run?
    pub fn check(&self) -> Result<(), MatrixError> {
        if self.modes.is_empty() {
            return Err(MatrixError::Empty("mode"));
        }
        if self.services.is_empty() {
            return Err(MatrixError::Empty("number of Services"));
        }
        for services in &self.services {
            if *services == 0 || *services > MAX_SERVICES {
                return Err(MatrixError::Size(*services));
            }
        }
        if self.flows_per_path == 0 || self.flows_per_path > MAX_FLOWS {
            return Err(MatrixError::Flows(self.flows_per_path));
        }
        Ok(())
    }

    /// The sizes of one mode.
    pub fn sizes(&self, mode: Mode) -> Vec<u32> {
        let mut sizes: Vec<u32> = self
            .services
            .iter()
            .map(|size| {
                if mode == Mode::IptablesNft && self.place == Place::Vm {
                    (*size).min(NFT_COMPAT_LIMIT)
                } else {
                    *size
                }
            })
            .collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }

    /// Services of the fault runs.
    pub fn fault_services(&self) -> u32 {
        let smallest = self.services.iter().copied().min().unwrap_or(100);
        if self.quick {
            smallest
        } else {
            self.services
                .iter()
                .copied()
                .filter(|size| *size <= 1000)
                .max()
                .unwrap_or(smallest)
        }
    }

    /// Every group, in the order of reports.
    pub fn groups(&self) -> Vec<Group> {
        let services = self.fault_services();
        let mut groups: Vec<Group> = self
            .modes
            .iter()
            .map(|mode| {
                let job = |kind, services| Job {
                    kind,
                    mode: *mode,
                    services,
                };
                let mut jobs: Vec<Job> = self
                    .sizes(*mode)
                    .into_iter()
                    .map(|size| job(JobKind::Cell, size))
                    .collect();
                jobs.push(job(JobKind::Flush, services));
                Group {
                    id: mode.name().to_owned(),
                    title: mode.name().to_owned(),
                    jobs,
                }
            })
            .collect();
        if self.modes.contains(&Mode::IptablesLegacy) && self.modes.contains(&Mode::Ipvs) {
            let job = Job {
                kind: JobKind::Switch(Mode::Ipvs),
                mode: Mode::IptablesLegacy,
                services,
            };
            groups.push(Group {
                id: "switch".to_owned(),
                title: job.title(),
                jobs: vec![job],
            });
        }
        groups
    }

    /// Every job.
    pub fn jobs(&self) -> Vec<Job> {
        self.groups()
            .into_iter()
            .flat_map(|group| group.jobs)
            .collect()
    }

    /// The group with this id, or the job with this id as a group of its own.
    pub fn group(&self, id: &str) -> Result<Group, MatrixError> {
        if let Some(group) = self.groups().into_iter().find(|group| group.id == id) {
            return Ok(group);
        }
        let job = self.job(id)?;
        Ok(Group {
            id: job.id(),
            title: job.title(),
            jobs: vec![job],
        })
    }

    /// The job with this id.
    pub fn job(&self, id: &str) -> Result<Job, MatrixError> {
        self.jobs()
            .into_iter()
            .find(|job| job.id() == id)
            .ok_or_else(|| MatrixError::UnknownJob(id.to_owned()))
    }
}

impl Job {
    /// A stable identifier, also the name of its part file.
    pub fn id(self) -> String {
        match self.kind {
            JobKind::Cell => format!("cell-{}-{}", self.mode, self.services),
            JobKind::Flush => format!("flush-{}-{}", self.mode, self.services),
            JobKind::Switch(to) => format!("switch-{}-{to}-{}", self.mode, self.services),
        }
    }

    /// For people.
    pub fn title(self) -> String {
        match self.kind {
            JobKind::Cell => format!("{} {}", self.mode, self.services),
            JobKind::Flush => format!("flush {}", self.mode),
            JobKind::Switch(to) => format!("switch {} → {to}", self.mode),
        }
    }

    /// The modes whose rules it puts in.
    pub fn modes(self) -> Vec<Mode> {
        match self.kind {
            JobKind::Cell | JobKind::Flush => vec![self.mode],
            JobKind::Switch(to) => vec![self.mode, to],
        }
    }

    /// How long it takes, in units of a small job: rules to apply, then packets that walk them.
    pub fn weight(self) -> f64 {
        let thousands = f64::from(self.services) / 1000.0;
        let rules = match self.mode {
            Mode::IptablesLegacy => 0.25 * thousands,
            // Quadratic.
            Mode::IptablesNft => 1.5 * thousands + 1.5 * thousands * thousands,
            Mode::Ipvs | Mode::Nftables => 0.5 * thousands,
        };
        let applied = match self.kind {
            JobKind::Cell => 1.0,
            JobKind::Flush => 2.0,
            JobKind::Switch(_) => 4.0,
        };
        1.0 + rules * applied
    }
}

impl Group {
    /// How long it takes, in units of a small job.
    pub fn weight(&self) -> f64 {
        self.jobs.iter().map(|job| job.weight()).sum()
    }

    /// As `svcpath bench plan` prints it.
    pub fn planned(&self) -> PlannedGroup {
        PlannedGroup {
            id: self.id.clone(),
            title: self.title.clone(),
            weight: self.weight(),
            parts: self.jobs.iter().map(|job| job.id()).collect(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Host => "host",
            Self::Vm => "vm",
        })
    }
}

/// A place's name that is none.
#[derive(Debug, thiserror::Error)]
#[error("unknown place '{0}': use host or vm")]
pub struct UnknownPlace(String);

impl FromStr for Place {
    type Err = UnknownPlace;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "host" => Ok(Self::Host),
            "vm" => Ok(Self::Vm),
            other => Err(UnknownPlace(other.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quick_matrix_has_every_mode_at_both_sizes_and_every_fault() {
        let jobs = Matrix::standard(true, 42, Place::Vm).jobs();
        let cells = jobs.iter().filter(|j| j.kind == JobKind::Cell).count();
        assert_eq!(cells, 8);
        assert_eq!(jobs.len(), 8 + 4 + 1);
        let mut ids: Vec<String> = jobs.iter().map(|j| j.id()).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), jobs.len());
    }

    #[test]
    fn iptables_nft_stops_at_its_limit_in_the_vm_only() {
        let vm = Matrix::standard(false, 42, Place::Vm);
        assert_eq!(vm.sizes(Mode::IptablesNft), [100, 1000, 2000]);
        assert_eq!(vm.sizes(Mode::Nftables), [100, 1000, 5000]);
        let host = Matrix::standard(false, 42, Place::Host);
        assert_eq!(host.sizes(Mode::IptablesNft), [100, 1000, 5000]);
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        for services in [0, 1_000_000] {
            let matrix = Matrix {
                services: vec![services],
                ..Matrix::standard(true, 1, Place::Vm)
            };
            assert!(matrix.check().is_err());
        }
    }
}
