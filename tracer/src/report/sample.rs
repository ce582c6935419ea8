//! A run as the lab would write one, for tests: every figure invented, every ledger balanced.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use tracer_ebpf::histogram::{bounds_of, cell_of};
use tracer_ebpf::path::{Origin, Path, Target};

use crate::probe::rule_changes::Way;
use crate::record::run::{
    Bin, Cell, Clock, Environment, FORMAT, Fault, FaultKind, FaultPath, Histogram, Ledger, Loss,
    Measurements, Outage, PacketState, PathResult, Place, ProbeHealth, RuleChange, Run,
    StageHistogram, Verdict,
};
use crate::report::trace::Trace;
use crate::rules::{Mode, RuleCounts};
use crate::trace::changes;
use crate::trace::journey::{End, Journey};
use crate::trace::run::{Kept, KeptJourney, TraceEnvironment, TraceRun};
use crate::trace::summary::{
    Cost, Count, Health, PathSummary, ServiceSummary, Summary, VerdictCount,
};
use crate::trace::timeline::Timeline;
use crate::trace::verdict::Verdict as Fate;

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
    let mut dice = Dice(services ^ (path.lot() as u64) << 32 ^ (mode as u64) << 40);
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

/// A trace of a node whose rules are flushed and put back.
pub(crate) fn trace() -> Trace {
    let started_ns = 5_000_000_000;
    let change = |after_ns: u64, generation, rules_added, rules_deleted| changes::RuleChange {
        time_ns: started_ns + after_ns,
        begin_ns: Some(started_ns + after_ns - 4_000_000),
        by: changes::Actor {
            pid: Some(812),
            name: Some("nft".to_owned()),
            parent: Some((790, "kube-proxy".to_owned())),
            cgroup: Some("/kubepods".to_owned()),
            pod: None,
        },
        what: changes::What::Nftables {
            generation: Some(generation),
            tables: BTreeMap::from([(
                "ip kube-proxy".to_owned(),
                changes::Delta {
                    rules_added,
                    rules_deleted,
                    ..changes::Delta::default()
                },
            )]),
        },
        refused: BTreeMap::new(),
        incomplete: false,
    };
    let count = |verdict, count| VerdictCount { verdict, count };
    let dropped = Fate::Dropped {
        reason: "NO_SOCKET".to_owned(),
        stage: "INPUT deliver".to_owned(),
        by: None,
    };
    let mut dice = Dice(11);
    let mut times = |base, n| {
        let values: Vec<u64> = (0..n).map(|_| dice.about(base)).collect();
        histogram_of(&values)
    };
    let later = End::Dropped {
        reason: "NO_SOCKET".to_owned(),
        stage: "INPUT deliver".to_owned(),
        by: None,
    };
    let service = |name: &str, verdicts: Vec<VerdictCount>, later_drops, node| ServiceSummary {
        name: name.to_owned(),
        mode: "nftables".to_owned(),
        modes: Vec::new(),
        translated: BTreeMap::new(),
        protocol: 6,
        ipv6: false,
        endpoints: 3,
        there: true,
        flows: verdicts.iter().map(|count| count.count).sum(),
        repeated: 4,
        verdicts,
        later_drops,
        later_resets: Vec::new(),
        unplaced_drops: Vec::new(),
        answer_drops: Vec::new(),
        picked_up: 0,
        untracked: 0,
        freed: 0,
        freed_or_dropped: 0,
        stuck: BTreeMap::new(),
        answered: Histogram::default(),
        node,
    };
    let services = vec![
        service(
            "shop/web:http",
            vec![count(Fate::Delivered, 270), count(Fate::Leaked, 30)],
            vec![Count {
                end: later,
                count: 2,
            }],
            times(32_000, 300),
        ),
        service(
            "shop/cart:grpc",
            vec![count(Fate::Delivered, 90), count(dropped, 10)],
            Vec::new(),
            times(41_000, 100),
        ),
    ];
    let path = |path: Path, packets, times: &mut dyn FnMut(u64, u64) -> Histogram| {
        let mut stages = Vec::new();
        let mut node = BTreeMap::new();
        for (state, part) in [(PacketState::New, 1), (PacketState::Established, 3)] {
            let mut whole = Histogram::default();
            for (hook, stage, base) in [
                ("PREROUTING", "conntrack", 1_900),
                ("PREROUTING", "dnat", 24_600 / (part * part)),
                ("PREROUTING", "routing", 800),
                ("POSTROUTING", "snat", 600),
            ] {
                let histogram = times(base, packets * part);
                whole.sum_ns += histogram.sum_ns;
                stages.push(StageHistogram {
                    hook: hook.to_owned(),
                    stage: stage.to_owned(),
                    state,
                    histogram,
                });
            }
            let sum = times(whole.sum_ns / (packets * part), packets * part);
            node.insert(state, sum);
        }
        PathSummary {
            path: path.title().to_owned(),
            stages,
            node,
        }
    };
    let paths = vec![
        path(Path::SERVICE[2], 100, &mut times),
        path(Path::SERVICE[0], 300, &mut times),
    ];
    // One bin in five of 1 s holds the time between the flush and the repair.
    let bins = |sent: u64, lost: u64| -> Vec<Bin> {
        let lost_in = |i| if i == 2 { lost } else { 0 };
        (0..5)
            .map(|i| Bin {
                sent,
                lost: lost_in(i),
            })
            .collect()
    };
    let timeline = Timeline {
        bin_ns: 1_000_000_000,
        paths: BTreeMap::from([
            (Path::SERVICE[2].title().to_owned(), bins(20, 10)),
            (Path::SERVICE[0].title().to_owned(), bins(60, 30)),
        ]),
    };
    let wrong = |time_ns, end| {
        let journey = Journey {
            time_ns: started_ns + time_ns,
            end,
            headed: None,
            ..Journey::sample()
        };
        KeptJourney::from(&journey)
    };
    Trace {
        run: TraceRun {
            format: crate::trace::run::FORMAT.to_owned(),
            environment: TraceEnvironment {
                started: "2026-11-20T17:02:11Z".to_owned(),
                version: "0.1.0".to_owned(),
                realtime_offset_ns: 1_795_000_000_000_000_000,
                host: "worker-0".to_owned(),
                namespace: Some("/run/netns/node1".to_owned()),
                kernel: "6.12.117+deb12-cloud-amd64".to_owned(),
                cpus: 4,
                ebpf: "sha256 0123456789abcdef, rustc 1.96, bpf-linker 0.13".to_owned(),
                links: 25,
                tools: BTreeMap::from([("nft".to_owned(), "1.0.6".to_owned())]),
                command: ["svcpath", "trace", "-o", "run"]
                    .map(str::to_owned)
                    .to_vec(),
                notes: vec!["rules of two modes are there: ipvs (3 Services) as well".to_owned()],
            },
            summary: Summary {
                clock: Clock::Wall,
                duration_ns: 5_000_000_000,
                started_ns,
                tier: "hooks".to_owned(),
                services,
                silent: 7,
                paths,
                timeline,
                listening: changes::Listening {
                    probes: Some(Way::Functions.title().to_owned()),
                    refused: None,
                    lost: 0,
                },
                outages: Vec::new(),
                outages_left_out: 0,
                rule_changes: vec![
                    change(2_100_000_000, 8, 0, 51),
                    change(3_000_000_001, 9, 51, 0),
                ],
                rule_changes_left_out: 0,
                outdated_ns: 0,
                probes: Health {
                    journeys: 1602,
                    transmitted: 1590,
                    dropped: 12,
                    other_packets: 4711,
                    cost: Some(Cost {
                        probe_runs: 30_000,
                        probe_ns: 3_300_000,
                    }),
                    ..Health::default()
                },
            },
            journeys: Kept {
                limit: 300,
                good: 300,
                wrong: 2,
                good_left_out: 60,
                wrong_left_out: 40,
                failure: None,
            },
        },
        wrong: Some(vec![
            wrong(2_200_000_000, End::Leaked),
            wrong(2_300_000_000, End::Leaked),
        ]),
    }
}
