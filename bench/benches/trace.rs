//! What a session does with each record of the ring buffer: read, its flow found, counted, judged, told.

use std::collections::HashSet;
use std::hint::black_box;
use std::net::SocketAddr;
use std::time::Duration;

use bench::asked_and_answered;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tracer::cluster::{Family, Protocol};
use tracer::probe::catalogue::Detail;
use tracer::probe::tier::Heard;
use tracer::record::evidence::Reasons;
use tracer::rules::services::{Found, FoundService, Frontend, FrontendKind};
use tracer::trace::directory::Directory;
use tracer::trace::flows::{ALL_READ, Flows};
use tracer::trace::packets::{Reader, Told};
use tracer::trace::session::Event;
use tracer::trace::tally::Tally;
use tracer_ebpf::record::Record;

/// Source ports of a client's flows: what comes between two looks at the ring buffer.
const PORTS: std::ops::Range<u16> = 33_000..43_000;

/// The Service that [`asked_and_answered`] asks for, and nine hundred others.
fn directory() -> Directory {
    let service = |number: u16| {
        let [high, low] = number.to_be_bytes();
        let vip = SocketAddr::from(([10, 96, high, low], 80));
        let name = Some(format!("lab/svc-{number:05}:p"));
        FoundService {
            frontends: vec![Frontend {
                kind: FrontendKind::ClusterIp,
                address: Some(vip.ip()),
                port: vip.port(),
                refusal: None,
            }],
            endpoints: (9..12)
                .map(|host| SocketAddr::from(([10, 244, 0, host], 8080)))
                .collect(),
            ..FoundService::bare(name, "nftables", Family::V4, Protocol::Tcp)
        }
    };
    let found = Found {
        services: (0..1000).map(service).collect(),
        ..Found::default()
    };
    let mut directory = Directory::new(Vec::new());
    directory.learn(&found, &[], 0);
    directory
}

/// What lives as long as a session.
struct Collector {
    reader: Reader,
    directory: Directory,
    flows: Flows,
    tallies: Vec<Tally>,
}

impl Collector {
    fn new() -> Self {
        let directory = directory();
        let detail = Detail::Stages;
        Self {
            reader: Reader {
                reasons: Reasons::of_this_kernel(detail).expect("the kernel has BTF"),
                detail,
                local: HashSet::new(),
                settled: true,
            },
            flows: Flows::default(),
            tallies: vec![Tally::default(); directory.services().len()],
            directory,
        }
    }

    /// As a session does between two looks at the ring buffer.
    fn take_in(&mut self, records: &[Record]) -> Vec<Event> {
        let mut events = Vec::with_capacity(records.len());
        for record in records {
            let heard = Heard {
                record: *record,
                met: Vec::new(),
            };
            match self.reader.read(&heard, &self.directory) {
                Told::Journey {
                    key,
                    index,
                    known,
                    opening,
                    journey,
                    ..
                } => {
                    if self.flows.first(key, index, &journey, known, opening) {
                        self.tallies[index].add(&journey);
                    }
                    events.push(Event::Journey(*journey));
                }
                Told::Back {
                    key, back, time_ns, ..
                } => {
                    self.flows.came_back(key, back, time_ns);
                }
                Told::Freed { .. } | Told::Other => {}
            }
        }
        let now_ns = records.last().map_or(0, |record| record.time);
        // Nothing goes to a former endpoint here.
        let nobody = |_: &_, _| false;
        for decided in self.flows.decide(&self.directory, ALL_READ, now_ns, nobody) {
            self.tallies[decided.index].decide(&decided);
            events.push(Event::Verdict(decided));
        }
        events
    }
}

fn collecting(criterion: &mut Criterion) {
    let records = asked_and_answered(PORTS);
    let mut collector = Collector::new();
    // A journey and a verdict for each two records.
    assert_eq!(collector.take_in(&records).len(), records.len());
    let good: u64 = collector.tallies.iter().map(Tally::good).sum();
    assert_eq!(good, PORTS.len() as u64);
    let mut group = criterion.benchmark_group("collect");
    group.throughput(Throughput::Elements(records.len() as u64));
    group.bench_function(
        BenchmarkId::new("asked-and-answered", PORTS.len()),
        |bencher| {
            bencher.iter(|| collector.take_in(black_box(&records)));
        },
    );
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3));
    targets = collecting
}
criterion_main!(benches);
