//! What the benchmarks in `benches/` work on: inputs of the sizes that real runs have.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tracer::cluster::{Cidr, Cluster, Endpoint, Protocol, Service, ServicePort};
use tracer::lab::plan;
use tracer::probe::catalogue::{self, Detail};
use tracer::record::run::{
    Bin, Cell, Clock, Environment, FORMAT, Fault, FaultKind, FaultPath, Histogram, Ledger, Loss,
    Measurements, Outage, PacketState, PathResult, Place, ProbeHealth, RuleChange, Run,
    StageHistogram, Verdict,
};
use tracer::rules::{Mode, NodeView, render};
use tracer::scenario::matrix::{JobKind, Matrix};
use tracer_ebpf::histogram::{bounds_of, cell_of};
use tracer_ebpf::path::{Origin, Path};
use tracer_ebpf::record::{
    Aligned, HEADER, IPV4, Record, STAGE_NODE, STEPS, Steps, TUPLE, TUPLE_HASH, TUPLES, kind, state,
};

/// Endpoints of every Service.
pub const ENDPOINTS: u32 = 3;
/// IP's number of TCP.
const TCP: u8 = 6;

/// The laboratory's cluster of `services` Services.
pub fn cluster(services: u32) -> Cluster {
    plan::cluster(services, ENDPOINTS, false).expect("the laboratory's plan has room for it")
}

/// A cluster of any size, larger than the laboratory's: every tenth Service has a NodePort.
pub fn cluster_of(services: u32, endpoints: u32) -> Cluster {
    let service = |index: u32| {
        let endpoints = (0..endpoints).map(|n| {
            let address = Cidr::v4(10, 128, 0, 0, 9).nth(index * endpoints + n);
            Endpoint::ready(address, 8080, &format!("node-{}", n % 100))
        });
        Service {
            namespace: format!("namespace-{}", index % 100),
            name: format!("service-{index}"),
            cluster_ips: vec![Cidr::v4(10, 96, 0, 0, 12).nth(index + 1)],
            ports: vec![ServicePort {
                name: "http".to_owned(),
                protocol: Protocol::Tcp,
                port: 80,
                node_port: u16::try_from(index / 10)
                    .ok()
                    .filter(|_| index.is_multiple_of(10))
                    .map(|port| 30_000 + port),
                endpoints: endpoints.collect(),
            }],
            ..Service::default()
        }
    };
    Cluster {
        services: (0..services).map(service).collect(),
        ..Cluster::default()
    }
}

/// What kubectl prints of that cluster, as far as kube-proxy looks at it.
pub fn cluster_json(services: u32, endpoints: u32) -> String {
    let cluster = cluster_of(services, endpoints);
    let mut items = Vec::new();
    for service in &cluster.services {
        let metadata = json!({
            "name": service.name, "namespace": service.namespace,
            "creationTimestamp": "2026-11-20T16:45:17Z",
            "uid": "3b623d50-65c5-4932-ab10-ab83da8e19ff",
        });
        let protocol = |port: &ServicePort| port.protocol.name().to_uppercase();
        let ports: Vec<Value> = service
            .ports
            .iter()
            .map(|port| {
                json!({
                    "name": port.name, "port": port.port, "protocol": protocol(port),
                    "nodePort": port.node_port, "targetPort": 8080,
                })
            })
            .collect();
        items.push(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata,
            "spec": {
                "type": "NodePort", "clusterIP": service.cluster_ips[0],
                "clusterIPs": [service.cluster_ips[0]], "ipFamilies": ["IPv4"], "ports": ports,
                "selector": {"app": service.name}, "sessionAffinity": "None",
            },
            "status": {"loadBalancer": {}},
        }));
        for port in &service.ports {
            let endpoints: Vec<Value> = port
                .endpoints
                .iter()
                .filter(|endpoint| endpoint.address.is_ipv4())
                .map(|endpoint| {
                    json!({
                        "addresses": [endpoint.address], "nodeName": endpoint.node,
                        "conditions": {"ready": true, "serving": true, "terminating": false},
                        "targetRef": {"kind": "Pod", "name": "a-pod", "namespace": "default"},
                    })
                })
                .collect();
            items.push(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "addressType": "IPv4", "endpoints": endpoints,
                "metadata": {
                    "name": format!("{}-{}", service.name, port.name),
                    "namespace": service.namespace,
                    "labels": {"kubernetes.io/service-name": service.name},
                },
                "ports": [{
                    "name": port.name, "protocol": protocol(port),
                    "port": port.endpoints.first().map(|endpoint| endpoint.port),
                }],
            }));
        }
    }
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    serde_json::to_string_pretty(&list).expect("JSON")
}

/// The laboratory's node, as kube-proxy sees it.
pub fn node_view() -> NodeView {
    NodeView {
        name: plan::NODE.to_owned(),
        addresses: vec![plan::NODE_ADDRESS.base, plan::LINK_ADDRESS.base],
        cluster_cidrs: vec![plan::CLUSTER_CIDR],
        service_cidrs: vec![plan::SERVICE_CIDR],
        ..NodeView::default()
    }
}

/// The first bytes of a TCP SYN from the client pod.
pub fn packet(port: u16) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[0] = 0x45;
    header[9] = TCP;
    header[12..16].copy_from_slice(&[10, 244, 64, 1]);
    header[16..20].copy_from_slice(&[10, 244, 0, 9]);
    header[20..22].copy_from_slice(&port.to_be_bytes());
    header[22..24].copy_from_slice(&8080_u16.to_be_bytes());
    header[32] = 0x50;
    header[33] = 2;
    header
}

/// A record of `kind` for each source port: the flows of one client.
pub fn records(kind: u8, ports: impl Iterator<Item = u16>) -> Vec<Record> {
    let mut source = [0; 16];
    source[..4].copy_from_slice(&[10, 244, 64, 1]);
    let mut destination = [0; 16];
    destination[..4].copy_from_slice(&[10, 96, 0, 10]);
    ports
        .map(|port| Record {
            time: u64::from(port) * 1000,
            started: u64::from(port) * 1000 - 900,
            elapsed: 700,
            kind,
            family: IPV4,
            protocol: TCP,
            stage: 12,
            transmitted: 1,
            reason: 2,
            sport: port.to_be_bytes(),
            dport: 80_u16.to_be_bytes(),
            source: Aligned(source),
            destination: Aligned(destination),
            header: Aligned(packet(port)),
            ..Record::ZERO
        })
        .collect()
}

/// The first packet of each of a client's flows to a Service, with its stages, and an answer a little later.
pub fn asked_and_answered(ports: impl Iterator<Item = u16>) -> Vec<Record> {
    let mut records = Vec::new();
    for asked in records_of_flows(ports) {
        records.push(asked);
        records.push(Record {
            kind: kind::ANSWER,
            state: state::REPLY,
            time: asked.time + 500,
            ..asked
        });
    }
    records
}

/// As [`records`], tracked, as the probes tell them: conntrack's tuples and the stages of a forwarded packet.
fn records_of_flows(ports: impl Iterator<Item = u16>) -> impl Iterator<Item = Record> {
    // `struct nf_conntrack_tuple`: source, port, l3num, destination, port, protocol, direction.
    let tuple = |source: [u8; 4], sport: u16, destination: [u8; 4], dport: u16| {
        let mut tuple = [0; TUPLE];
        tuple[..4].copy_from_slice(&source);
        tuple[16..18].copy_from_slice(&sport.to_be_bytes());
        tuple[20..24].copy_from_slice(&destination);
        tuple[36..38].copy_from_slice(&dport.to_be_bytes());
        tuple
    };
    records(kind::FIRST, ports).into_iter().map(move |record| {
        let port = u16::from_be_bytes(record.sport);
        let (client, vip, endpoint) = ([10, 244, 64, 1], [10, 96, 0, 10], [10, 244, 0, 9]);
        let mut tuples = [0; TUPLES];
        tuples[..TUPLE].copy_from_slice(&tuple(client, port, vip, 80));
        tuples[TUPLE_HASH..].copy_from_slice(&tuple(endpoint, 8080, client, port));
        let mut stages = [0; STEPS];
        for (at, stage) in (0..6).chain(11..15).chain(21..25).enumerate() {
            stages[at] = stage;
        }
        Record {
            tracked: 1,
            tuples: Aligned(tuples),
            steps: 14,
            took: Steps([50; STEPS]),
            stages: Aligned(stages),
            ..record
        }
    })
}

/// Numbers that look random and never change, so that every benchmark repeats the same work.
pub struct Dice(u64);

impl Dice {
    /// The sequence that `seed` starts.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    /// Like a latency: about `base`, now and then a good deal more.
    pub fn about(&mut self, base: u64) -> u64 {
        let tail = if self.below(100) == 0 { base } else { 0 };
        base + self.below(base / 20 + 2) + tail
    }
}

fn histogram(values: &[u64]) -> Histogram {
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

/// The whole comparison as `cargo xtask run` records it: every mode, size, path, stage and packet
/// state, and every fault. The figures are invented.
pub fn run() -> Run {
    let matrix = Matrix::standard(false, 1, Place::Vm);
    let mut cells = Vec::new();
    let mut faults = Vec::new();
    for job in matrix.jobs() {
        match job.kind {
            JobKind::Cell => cells.push(cell(&matrix, job.mode, job.services)),
            JobKind::Flush => {
                faults.push(fault(FaultKind::Control, job.mode, None, job.services));
                faults.push(fault(FaultKind::Flush, job.mode, None, job.services));
            }
            JobKind::Switch(to) => {
                faults.push(fault(FaultKind::Switch, job.mode, Some(to), job.services));
            }
        }
    }
    Run {
        format: FORMAT.to_owned(),
        environment: Environment {
            started: "2026-11-20T17:02:11Z".to_owned(),
            duration_s: 900.0,
            version: "0.1.0".to_owned(),
            place: Place::Vm,
            kernel: "6.12.0".to_owned(),
            host_kernel: "6.12.0".to_owned(),
            cpus: 1,
            ebpf: "sha256:0000".to_owned(),
            tools: [("iptables".to_owned(), "1.8.9".to_owned())].into(),
            command: vec!["cargo".to_owned(), "xtask".to_owned(), "run".to_owned()],
            notes: Vec::new(),
        },
        measurements: Measurements {
            clock: Clock::Virtual,
            tier: "hooks".to_owned(),
            seed: matrix.load.seed,
            cells,
            faults,
        },
    }
}

fn cell(matrix: &Matrix, mode: Mode, services: u32) -> Cell {
    let mut dice = Dice::new(u64::from(services));
    Cell {
        mode,
        services,
        endpoints_per_service: ENDPOINTS,
        rules: render(&cluster(services), &node_view(), mode).expected_counts(),
        apply_ns: u64::from(services) * 400_000,
        paths: Path::SERVICE
            .into_iter()
            .chain(Path::FLOOR)
            .map(|path| path_result(matrix.load.flows_per_path, path, &mut dice))
            .collect(),
        probes: health(),
    }
}

fn health() -> ProbeHealth {
    ProbeHealth {
        links: 31,
        tracepoints: 3,
        journeys: 36_000,
        transmitted: 36_000,
        ..ProbeHealth::default()
    }
}

/// The stages of a path's packets: hook and name.
fn stages(path: Path) -> Vec<(&'static str, &'static str)> {
    let hooks: &[&str] = if path.origin == Origin::Host {
        &["OUTPUT", "POSTROUTING"]
    } else {
        &["-", "PREROUTING", "FORWARD", "POSTROUTING"]
    };
    catalogue::stages()
        .filter(|stage| *stage != STAGE_NODE)
        .map(|stage| catalogue::stage_name(stage, Detail::Stages))
        .filter(|(hook, _)| hooks.contains(hook))
        .collect()
}

fn path_result(flows: u32, path: Path, dice: &mut Dice) -> PathResult {
    let mut by_stage = Vec::new();
    let mut node = BTreeMap::new();
    for (state, packets) in [
        (PacketState::New, flows),
        (PacketState::Established, 2 * flows),
        (PacketState::Reply, 3 * flows),
    ] {
        let mut whole = vec![0; packets as usize];
        for (hook, stage) in stages(path) {
            let base = 40 + dice.below(2000);
            let values: Vec<u64> = whole.iter().map(|_| dice.about(base)).collect();
            for (sum, value) in whole.iter_mut().zip(&values) {
                *sum += value;
            }
            by_stage.push(StageHistogram {
                hook: hook.to_owned(),
                stage: stage.to_owned(),
                state,
                histogram: histogram(&values),
            });
        }
        node.insert(state, histogram(&whole));
    }
    let mut waited = || {
        let values: Vec<u64> = (0..flows).map(|_| dice.about(30_000)).collect();
        histogram(&values)
    };
    PathResult {
        path: path.id().to_owned(),
        flows: Ledger {
            sent: flows.into(),
            delivered: flows.into(),
            lost: Vec::new(),
        },
        client: ["connect", "answer", "first-answer", "later-answer"]
            .map(|what| (what.to_owned(), waited()))
            .into(),
        stages: by_stage,
        node,
    }
}

const MS: u64 = 1_000_000;
/// Bins of a fault's series, the width of one, and the new flows in it.
const BINS: usize = 60;
const BIN_NS: u64 = 100 * MS;
const FLOWS_A_BIN: u64 = 10;
/// The bins in which a fault loses every flow.
const OUTAGE: std::ops::Range<usize> = 20..40;

fn fault(kind: FaultKind, mode: Mode, to: Option<Mode>, services: u32) -> Fault {
    let rules = u64::from(services) * 9;
    let change = |start: u64, what: &str, before, after| RuleChange {
        start_ns: start * MS,
        end_ns: (start + 8) * MS,
        what: what.to_owned(),
        before,
        after,
    };
    Fault {
        kind,
        mode,
        to,
        services,
        duration_ns: BINS as u64 * BIN_NS,
        bin_ns: BIN_NS,
        patience_ns: 1000 * MS,
        changes: if kind == FaultKind::Control {
            Vec::new()
        } else {
            vec![
                change(1990, "flush", rules, 12),
                change(3990, "all Service rules put back", 12, rules),
            ]
        },
        paths: Path::SERVICE
            .into_iter()
            .map(|path| fault_path(path, kind != FaultKind::Control))
            .collect(),
        probes: health(),
    }
}

fn fault_path(path: Path, hurts: bool) -> FaultPath {
    let series: Vec<Bin> = (0..BINS)
        .map(|bin| Bin {
            sent: FLOWS_A_BIN,
            lost: if hurts && OUTAGE.contains(&bin) {
                FLOWS_A_BIN
            } else {
                0
            },
        })
        .collect();
    let sent = series.iter().map(|bin| bin.sent).sum();
    let lost: u64 = series.iter().map(|bin| bin.lost).sum();
    let (losses, outages) = if hurts {
        let loss = Loss {
            verdict: Verdict::Leaked,
            reason: None,
            stage: Some("POSTROUTING egress".to_owned()),
            count: lost,
        };
        let outage = Outage {
            start_ns: OUTAGE.start as u64 * BIN_NS,
            end_ns: Some(OUTAGE.end as u64 * BIN_NS),
            lost,
        };
        (vec![loss], vec![outage])
    } else {
        (Vec::new(), Vec::new())
    };
    FaultPath {
        path: path.id().to_owned(),
        new: Ledger {
            sent,
            delivered: sent - lost,
            lost: losses,
        },
        established: Ledger {
            sent: 50,
            delivered: 50,
            lost: Vec::new(),
        },
        outages,
        series,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_benchmarked_run_is_one_that_could_have_been_recorded() {
        let run = run();
        tracer::report::read::validate(&run).expect("a valid run");
        assert!(run.measurements.faults.iter().any(|f| f.to.is_some()));
    }
}
