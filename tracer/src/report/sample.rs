//! A run as the lab would write one, for tests: every figure invented, every ledger balanced.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use tracer_ebpf::histogram::{bounds_of, cell_of};
use tracer_ebpf::path::{Origin, Path, Target};

use crate::record::run::{
    Bin, Cell, Clock, Environment, FORMAT, Fault, FaultKind, FaultPath, Histogram, Ledger, Loss,
    Measurements, Outage, PacketState, PathResult, Place, ProbeHealth, RuleChange, Run,
    StageHistogram, Verdict,
};
use crate::rules::{Mode, RuleCounts};

/// New flows a path and cell.
const FLOWS: u64 = 1000;

/// A histogram of the values in the kernel's cells.
pub(crate) fn histogram_of(values: &[u64]) -> Histogram {
    let mut cells = BTreeMap::new();
    for &value in values {
        *cells.entry(cell_of(value)).or_insert(0) += 1;
    }
    Histogram {
        count: values.len() as u64,
        sum_ns: values.iter().sum(),
        buckets: cells
            .into_iter()
            .map(|(cell, count)| {
                let (low, high) = bounds_of(cell);
                [low, high, count]
            })
            .collect(),
    }
}

/// Numbers that look random and never change.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n.max(1)
    }

    /// About `base`, now and then a good deal more.
    fn about(&mut self, base: u64) -> u64 {
        let tail = if self.below(100) == 0 { base / 3 } else { 0 };
        base + self.below(base / 20 + 2) + tail
    }
}

/// The whole comparison on the virtual clock.
pub(crate) fn run() -> Run {
    static RUN: OnceLock<Run> = OnceLock::new();
    RUN.get_or_init(made).clone()
}

fn made() -> Run {
    let mut cells = Vec::new();
    for mode in Mode::ALL {
        let sizes: &[u32] = if mode == Mode::IptablesNft {
            &[100, 1000, 2000]
        } else {
            &[100, 1000, 5000]
        };
        cells.extend(sizes.iter().map(|&services| cell(mode, services)));
    }
    let mut faults = vec![control(Mode::IptablesLegacy)];
    faults.extend(Mode::ALL.map(flush));
    faults.push(switch(Mode::IptablesLegacy, Mode::Ipvs));
    Run {
        format: FORMAT.to_owned(),
        environment: Environment {
            started: "2026-11-20T17:02:11Z".to_owned(),
            duration_s: 271.4,
            version: "0.1.0".to_owned(),
            place: Place::Vm,
            kernel: "6.12.111+deb12-cloud-amd64".to_owned(),
            host_kernel: "6.18.0".to_owned(),
            cpus: 1,
            ebpf: "sha256:5b1f… rustc 1.96.0, bpf-linker 0.13.0".to_owned(),
            tools: [("iptables", "1.8.9"), ("ipvsadm", "1.31"), ("nft", "1.0.6")]
                .map(|(name, version)| (name.to_owned(), version.to_owned()))
                .into(),
            command: ["cargo", "xtask", "run", "--quick"]
                .map(str::to_owned)
                .to_vec(),
            notes: vec![
                "host: no IPVS in kernel 6.18, so all modes were measured in the VM".to_owned(),
            ],
        },
        measurements: Measurements {
            clock: Clock::Virtual,
            tier: "hooks".to_owned(),
            seed: 42,
            cells,
            faults,
        },
    }
}

/// The same on a wall clock of a machine without IPVS: fewer modes, fewer sizes.
pub(crate) fn host_run() -> Run {
    let mut run = run();
    run.measurements.clock = Clock::Wall;
    run.measurements
        .cells
        .retain(|cell| cell.mode != Mode::Ipvs && cell.services <= 1000);
    run.measurements
        .faults
        .retain(|fault| fault.mode != Mode::Ipvs && fault.to.is_none());
    run.environment.place = Place::Host;
    run
}

/// Instructions of one rule that is looked at and does not match.
const fn price(mode: Mode) -> u64 {
    match mode {
        Mode::IptablesLegacy => 15,
        Mode::IptablesNft => 61,
        Mode::Ipvs | Mode::Nftables => 0,
    }
}

fn cell(mode: Mode, services: u32) -> Cell {
    let n = u64::from(services);
    let rules = match mode {
        Mode::IptablesLegacy | Mode::IptablesNft => RuleCounts {
            rules: 24 + 9 * n,
            ..RuleCounts::default()
        },
        Mode::Ipvs => RuleCounts {
            rules: 28,
            elements: 5 * n,
            virtual_servers: 2 * n,
            real_servers: 6 * n,
        },
        Mode::Nftables => RuleCounts {
            rules: 38 + 5 * n,
            elements: 2 * n,
            ..RuleCounts::default()
        },
    };
    let apply_ns = match mode {
        Mode::IptablesLegacy => 90_000_000 + 320_000 * n,
        Mode::IptablesNft => 110_000_000 + 1_900_000 * n + 1900 * n * n,
        Mode::Ipvs => 180_000_000 + 440_000 * n,
        Mode::Nftables => 80_000_000 + 290_000 * n,
    };
    let paths: Vec<PathResult> = Path::SERVICE
        .into_iter()
        .chain(Path::FLOOR)
        .map(|path| path_result(mode, n, path))
        .collect();
    let journeys = paths.len() as u64 * FLOWS * 6;
    Cell {
        mode,
        services,
        endpoints_per_service: 3,
        rules,
        apply_ns,
        paths,
        probes: ProbeHealth {
            links: 31,
            tracepoints: 3,
            journeys,
            transmitted: journeys - 40,
            delivered_locally: 38,
            dropped: 2,
            other_packets: 96,
            ..ProbeHealth::default()
        },
    }
}

/// The stages of a packet and about what each costs.
fn stages(
    mode: Mode,
    services: u64,
    path: Path,
    state: PacketState,
    dice: &mut Dice,
) -> Vec<(&'static str, &'static str, u64)> {
    let new = state == PacketState::New;
    let to_pod = path.target == Target::Pod;
    let ipvs = mode == Mode::Ipvs && !to_pod;
    let first = if path.origin == Origin::Host && state != PacketState::Reply {
        "OUTPUT"
    } else {
        "PREROUTING"
    };
    let scanned = if to_pod {
        services
    } else {
        dice.below(services)
    };
    let dnat = if new {
        (if to_pod { 1900 } else { 2850 }) + price(mode) * scanned
    } else {
        170
    };
    let mut stages = Vec::new();
    if first == "PREROUTING" {
        stages.push(("-", "receive", dice.about(520)));
    }
    stages.push((first, "raw", dice.about(90)));
    stages.push((first, "conntrack", dice.about(if new { 1900 } else { 760 })));
    stages.push((first, "mangle", dice.about(110)));
    stages.push((
        first,
        "pre-dnat",
        dice.about(if mode == Mode::Nftables && new {
            260
        } else {
            40
        }),
    ));
    let taken = dice.about(if new { 2700 } else { 830 });
    stages.push(match (mode, first) {
        // At OUTPUT nat and IPVS are one stage.
        (Mode::Ipvs, "OUTPUT") if ipvs => (first, "dnat", taken + if new { 900 } else { 170 }),
        (Mode::Ipvs, _) if new => (first, "dnat", dice.about(900)),
        _ => (first, "dnat", dice.about(dnat)),
    });
    if first == "PREROUTING" {
        stages.push((first, "routing", dice.about(640)));
        if ipvs {
            stages.push(("INPUT", "mangle", dice.about(100)));
            stages.push(("INPUT", "filter", dice.about(420)));
            stages.push(("INPUT", "ipvs", taken));
        } else {
            stages.push(("FORWARD", "mangle", dice.about(100)));
            stages.push(("FORWARD", "filter", dice.about(if new { 480 } else { 310 })));
            stages.push(("FORWARD", "ipvs", dice.about(35)));
            stages.push(("FORWARD", "output", dice.about(120)));
        }
    } else {
        stages.push((first, "filter", dice.about(690)));
    }
    stages.push(("POSTROUTING", "mangle", dice.about(100)));
    stages.push((
        "POSTROUTING",
        "snat",
        dice.about(if new { 690 } else { 120 }),
    ));
    stages.push(("POSTROUTING", "helper", dice.about(45)));
    stages.push((
        "POSTROUTING",
        "egress",
        dice.about(if new { 1640 } else { 960 }),
    ));
    stages
}

fn path_result(mode: Mode, services: u64, path: Path) -> PathResult {
    let mut dice = Dice(services ^ (path.index() as u64) << 32 ^ (mode as u64) << 40);
    let mut by_stage: Vec<(&str, &str, PacketState, Vec<u64>)> = Vec::new();
    let mut node: BTreeMap<PacketState, Vec<u64>> = BTreeMap::new();
    for (state, packets) in [
        (PacketState::New, FLOWS),
        (PacketState::Established, 2 * FLOWS),
        (PacketState::Reply, 3 * FLOWS),
    ] {
        for _ in 0..packets {
            let mut whole = 0;
            for (hook, stage, cost) in stages(mode, services, path, state, &mut dice) {
                whole += cost;
                match by_stage
                    .iter_mut()
                    .find(|known| (known.0, known.1, known.2) == (hook, stage, state))
                {
                    Some(known) => known.3.push(cost),
                    None => by_stage.push((hook, stage, state, vec![cost])),
                }
            }
            node.entry(state).or_default().push(whole);
        }
    }
    let waited: Vec<u64> = node[&PacketState::New]
        .iter()
        .map(|ns| ns * 2 + 9000)
        .collect();
    PathResult {
        path: path.id().to_owned(),
        flows: Ledger {
            sent: FLOWS,
            delivered: FLOWS,
            lost: Vec::new(),
        },
        client: [("connect".to_owned(), histogram_of(&waited))].into(),
        stages: by_stage
            .into_iter()
            .map(|(hook, stage, state, values)| StageHistogram {
                hook: hook.to_owned(),
                stage: stage.to_owned(),
                state,
                histogram: histogram_of(&values),
            })
            .collect(),
        node: node
            .into_iter()
            .map(|(state, values)| (state, histogram_of(&values)))
            .collect(),
    }
}

const MS: u64 = 1_000_000;
/// Bins of a fault's series and their width.
const BINS: usize = 60;
const BIN: u64 = 100 * MS;
/// New flows a bin.
const RATE: u64 = 10;

fn fault(kind: FaultKind, mode: Mode) -> Fault {
    Fault {
        kind,
        mode,
        to: None,
        services: 1000,
        duration_ns: BINS as u64 * BIN,
        bin_ns: BIN,
        patience_ns: 1000 * MS,
        changes: Vec::new(),
        paths: Path::SERVICE
            .into_iter()
            .map(|path| fault_path(path, &[], &[], 0))
            .collect(),
        probes: ProbeHealth {
            links: 31,
            tracepoints: 3,
            journeys: 5400,
            transmitted: 5400,
            ..ProbeHealth::default()
        },
    }
}

/// A path whose users lose `per_bin` of the flows of each bin in the outage.
fn fault_path(
    path: Path,
    lost_bins: &[(usize, u64)],
    verdicts: &[(Verdict, Option<&str>, Option<&str>)],
    established_lost: u64,
) -> FaultPath {
    let mut series = vec![
        Bin {
            sent: RATE,
            lost: 0
        };
        BINS
    ];
    for &(bin, lost) in lost_bins {
        series[bin].lost = lost;
    }
    let lost: u64 = series.iter().map(|bin| bin.lost).sum();
    let mut losses = Vec::new();
    let mut left = lost;
    for (i, (verdict, reason, stage)) in verdicts.iter().enumerate() {
        let count = if i + 1 == verdicts.len() {
            left
        } else {
            left * 9 / 10
        };
        left -= count;
        if count > 0 {
            losses.push(Loss {
                verdict: *verdict,
                reason: reason.map(str::to_owned),
                stage: stage.map(str::to_owned),
                count,
            });
        }
    }
    let outages = match (lost_bins.first(), lost_bins.last()) {
        (Some((first, _)), Some((last, _))) => vec![Outage {
            start_ns: *first as u64 * BIN + 3 * MS,
            end_ns: Some((*last as u64 + 1) * BIN + 13 * MS),
            lost,
        }],
        _ => Vec::new(),
    };
    let sent = BINS as u64 * RATE;
    FaultPath {
        path: path.id().to_owned(),
        new: Ledger {
            sent,
            delivered: sent - lost,
            lost: losses,
        },
        established: Ledger {
            sent: 50,
            delivered: 50 - established_lost,
            lost: if established_lost == 0 {
                Vec::new()
            } else {
                vec![Loss {
                    verdict: Verdict::Unanswered,
                    reason: None,
                    stage: None,
                    count: established_lost,
                }]
            },
        },
        outages,
        series,
    }
}

fn control(mode: Mode) -> Fault {
    fault(FaultKind::Control, mode)
}

fn flush(mode: Mode) -> Fault {
    let lost: Vec<(usize, u64)> = (20..40)
        .map(|bin| (bin, if bin == 20 { 7 } else { RATE }))
        .collect();
    let verdicts = [
        (Verdict::Leaked, None, Some("POSTROUTING egress")),
        (
            Verdict::Dropped,
            Some("NETFILTER_DROP"),
            Some("FORWARD filter"),
        ),
    ];
    let (tool, rules) = match mode {
        Mode::IptablesLegacy => ("iptables-legacy -t nat -F", 9024),
        Mode::IptablesNft => ("iptables-nft -t nat -F", 9024),
        Mode::Ipvs => ("ipvsadm -C", 13_028),
        Mode::Nftables => ("nft flush ruleset", 7038),
    };
    let mut fault = fault(FaultKind::Flush, mode);
    fault.changes = vec![
        RuleChange {
            start_ns: 2030 * MS,
            end_ns: 2038 * MS,
            what: tool.to_owned(),
            before: rules,
            after: 12,
        },
        RuleChange {
            start_ns: 3600 * MS,
            end_ns: 4020 * MS,
            what: "all Service rules put back".to_owned(),
            before: 12,
            after: rules,
        },
    ];
    fault.paths = Path::SERVICE
        .into_iter()
        .map(|path| {
            fault_path(
                path,
                &lost,
                &verdicts,
                if mode == Mode::Ipvs { 21 } else { 0 },
            )
        })
        .collect();
    fault
}

fn switch(from: Mode, to: Mode) -> Fault {
    let mut fault = fault(FaultKind::Switch, from);
    fault.to = Some(to);
    fault.changes = vec![
        RuleChange {
            start_ns: 1500 * MS,
            end_ns: 1920 * MS,
            what: format!("{to}: ipset restore, ipvsadm --restore"),
            before: 9024,
            after: 22_024,
        },
        RuleChange {
            start_ns: 1921 * MS,
            end_ns: 1940 * MS,
            what: format!("{from}: KUBE chains removed"),
            before: 22_024,
            after: 13_028,
        },
        RuleChange {
            start_ns: 4100 * MS,
            end_ns: 4420 * MS,
            what: format!("{from}: iptables-restore"),
            before: 13_028,
            after: 22_024,
        },
        RuleChange {
            start_ns: 4421 * MS,
            end_ns: 4460 * MS,
            what: format!("{to}: virtual servers removed"),
            before: 22_024,
            after: 9024,
        },
    ];
    let verdicts = [
        (Verdict::Unanswered, None, None),
        (Verdict::Leaked, None, Some("POSTROUTING egress")),
    ];
    fault.paths[1] = fault_path(Path::SERVICE[1], &[(19, 7), (20, 5)], &verdicts, 0);
    fault
}
