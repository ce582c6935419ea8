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

/// The most new flows a second of one path of a fault: further apart than their own packets.
pub const MAX_RATE: u32 = 1000;

/// What to compare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// The modes.
    pub modes: Vec<Mode>,
    /// Numbers of Services.
    pub services: Vec<u32>,
    /// Faults at the smallest size only.
    pub quick: bool,
    /// Where the node lives.
    pub place: Place,
    /// What every job sends.
    pub load: Load,
}

/// What jobs send. A job and its load decide a measurement; what else was asked for does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Seed of every random choice.
    pub seed: u64,
    /// New flows of each path in a cell.
    pub flows_per_path: u32,
    /// New flows a second of each path in a fault.
    pub fault_rate: u32,
}

impl Load {
    /// Of the whole comparison, or of the quick one.
    pub const fn standard(quick: bool, seed: u64) -> Self {
        let (flows_per_path, fault_rate) = if quick { (150, 50) } else { (1000, 100) };
        Self {
            seed,
            flows_per_path,
            fault_rate,
        }
    }

    /// Can it be sent?
    pub fn check(&self) -> Result<(), MatrixError> {
        if self.flows_per_path == 0 || self.flows_per_path > MAX_FLOWS {
            return Err(MatrixError::Flows(self.flows_per_path));
        }
        if self.fault_rate == 0 || self.fault_rate > MAX_RATE {
            return Err(MatrixError::Rate(self.fault_rate));
        }
        Ok(())
    }
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
    /// No flows a second, or too many.
    #[error("{0} flows a second on each path: use 1 to {MAX_RATE}")]
    Rate(u32),
    /// Nothing to do.
    #[error("no {0} given: name at least one")]
    Empty(&'static str),
    /// Not the name of a job.
    #[error("no job '{0}': `svcpath bench plan` lists them, as cell-nftables-1000")]
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

/// A job as `svcpath bench plan` prints it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedJob {
    /// A stable identifier, also the name of its part file.
    pub id: String,
    /// For people.
    pub title: String,
    /// How long it takes, in units of a small job.
    pub weight: f64,
    /// Jobs with the same word here can share a boot of the VM.
    pub boot: String,
    /// What `svcpath bench job` takes: the same for the same measurement, to the byte.
    pub arguments: Vec<String>,
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
            quick,
            place,
            load: Load::standard(quick, seed),
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
        self.load.check()
    }

    /// The sizes of one mode.
    pub fn sizes(&self, mode: Mode) -> Vec<u32> {
        let limit = self.limit(mode);
        let mut sizes: Vec<u32> = self.services.iter().map(|n| (*n).min(limit)).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }

    /// The most Services of one mode here.
    fn limit(&self, mode: Mode) -> u32 {
        if mode == Mode::IptablesNft && self.place == Place::Vm {
            NFT_COMPAT_LIMIT
        } else {
            MAX_SERVICES
        }
    }

    /// Services of one mode's fault runs.
    pub fn fault_services(&self, mode: Mode) -> u32 {
        let sizes = self.sizes(mode);
        let smallest = sizes.first().copied().unwrap_or(100);
        let largest = sizes.into_iter().rfind(|size| *size <= 1000);
        largest.filter(|_| !self.quick).unwrap_or(smallest)
    }

    /// What a reader should know: where less is measured than was asked for.
    pub fn notes(&self) -> Vec<String> {
        let asked = self.services.iter().copied().max().unwrap_or(0);
        self.modes
            .iter()
            .filter(|mode| asked > self.limit(**mode))
            .map(|mode| {
                format!(
                    "{mode} stops at {} Services in the VM, where its restore takes too long; \
                     --place host measures more",
                    self.limit(*mode)
                )
            })
            .collect()
    }

    /// Every job, in the order of reports: each mode's cells and flush, then the switch.
    pub fn jobs(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        for &mode in &self.modes {
            let job = |kind, services| Job {
                kind,
                mode,
                services,
            };
            let sizes = self.sizes(mode).into_iter();
            jobs.extend(sizes.map(|size| job(JobKind::Cell, size)));
            jobs.push(job(JobKind::Flush, self.fault_services(mode)));
        }
        if self.modes.contains(&Mode::IptablesLegacy) && self.modes.contains(&Mode::Ipvs) {
            jobs.push(Job {
                kind: JobKind::Switch(Mode::Ipvs),
                mode: Mode::IptablesLegacy,
                services: self.fault_services(Mode::IptablesLegacy),
            });
        }
        jobs
    }

    /// Every job as `svcpath bench plan` prints it.
    pub fn planned(&self) -> Vec<PlannedJob> {
        let planned = |job: Job| PlannedJob {
            id: job.id(),
            title: job.title(),
            weight: job.weight(),
            boot: job.boot(),
            arguments: job.arguments(&self.load),
        };
        self.jobs().into_iter().map(planned).collect()
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

    /// Jobs with the same word can share a boot of the VM, one after the other.
    fn boot(self) -> String {
        match self.kind {
            JobKind::Cell | JobKind::Flush => self.mode.to_string(),
            JobKind::Switch(_) => self.id(),
        }
    }

    /// What `svcpath bench job` takes for it: all that it depends on, and nothing else, in one
    /// form. On the virtual clock a run is the same only if its command line is.
    pub fn arguments(self, load: &Load) -> Vec<String> {
        let (flag, number) = match self.kind {
            JobKind::Cell => ("--flows", load.flows_per_path),
            JobKind::Flush | JobKind::Switch(_) => ("--rate", load.fault_rate),
        };
        // Of one width, so that another seed is not another layout of the process.
        vec![
            self.id(),
            "--seed".to_owned(),
            format!("{:020}", load.seed),
            flag.to_owned(),
            format!("{number:05}"),
        ]
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

impl FromStr for Job {
    type Err = MatrixError;

    fn from_str(id: &str) -> Result<Self, Self::Err> {
        let unknown = || MatrixError::UnknownJob(id.to_owned());
        let (_, services) = id.rsplit_once('-').ok_or_else(unknown)?;
        let services: u32 = services.parse().map_err(|_| unknown())?;
        if services == 0 || services > MAX_SERVICES {
            return Err(MatrixError::Size(services));
        }
        let switches = |mode| {
            let others = Mode::ALL.into_iter().filter(move |to| *to != mode);
            others.map(JobKind::Switch)
        };
        Mode::ALL
            .into_iter()
            .flat_map(|mode| {
                [JobKind::Cell, JobKind::Flush]
                    .into_iter()
                    .chain(switches(mode))
                    .map(move |kind| Self {
                        kind,
                        mode,
                        services,
                    })
            })
            .find(|job| job.id() == id)
            .ok_or_else(unknown)
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
        for job in &jobs {
            assert_eq!(job.id().parse::<Job>().expect("its own name"), *job);
        }
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
        assert_eq!(vm.notes().len(), 1);
        let host = Matrix::standard(false, 42, Place::Host);
        assert_eq!(host.sizes(Mode::IptablesNft), [100, 1000, 5000]);
        assert!(host.notes().is_empty());
        assert!(Matrix::standard(true, 42, Place::Vm).notes().is_empty());
        // Its faults too.
        let large = Matrix {
            services: vec![5000],
            ..vm
        };
        assert_eq!(large.fault_services(Mode::IptablesNft), 2000);
        assert_eq!(large.fault_services(Mode::Ipvs), 5000);
    }

    #[test]
    fn a_job_says_what_it_needs_in_one_form() {
        let load = Load::standard(true, 42);
        let cell: Job = "cell-iptables-nft-1000".parse().expect("a job");
        assert_eq!(
            cell.arguments(&load).join(" "),
            "cell-iptables-nft-1000 --seed 00000000000000000042 --flows 00150"
        );
        let other = Load {
            seed: u64::MAX,
            ..load
        };
        assert_eq!(
            cell.arguments(&other).concat().len(),
            cell.arguments(&load).concat().len()
        );
        let switch: Job = "switch-iptables-legacy-ipvs-100".parse().expect("a job");
        assert_eq!(
            switch.arguments(&load).join(" "),
            "switch-iptables-legacy-ipvs-100 --seed 00000000000000000042 --rate 00050"
        );
    }

    #[test]
    fn what_else_is_asked_for_changes_no_job() {
        let arguments = |matrix: &Matrix| {
            let planned = matrix.planned();
            let job = planned.into_iter().find(|j| j.id == "cell-nftables-100");
            job.expect("planned").arguments
        };
        let all = Matrix::standard(true, 42, Place::Vm);
        let one = Matrix {
            modes: vec![Mode::Nftables],
            services: vec![100],
            ..all.clone()
        };
        assert_eq!(arguments(&all), arguments(&one));
    }

    #[test]
    fn names_of_no_job() {
        for name in [
            "",
            "cell",
            "cell-nftables",
            "cell-nftables-",
            "cell-nftables-01",
            "cell-nftables-0",
            "cell-nftables-1000000",
            "cell-iptables-100",
            "switch-ipvs-ipvs-100",
            "nftables",
        ] {
            assert!(name.parse::<Job>().is_err(), "{name}");
        }
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
