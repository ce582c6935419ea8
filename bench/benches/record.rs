//! What happens to each record of the ring buffer and to each measured time.

use std::hint::black_box;
use std::time::Duration;

use bench::{Dice, packet, records};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tracer::record::evidence::Evidence;
use tracer::record::headers::dissect;
use tracer_ebpf::histogram::cell_of;
use tracer_ebpf::record::{HEADER, kind};

/// Records a batch.
const BATCH: usize = 1000;
/// Source ports of a client's flows: as many flows as a long run has.
const PORTS: std::ops::Range<u16> = 33_000..60_000;

fn absorbing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("absorb");
    group.throughput(Throughput::Elements(BATCH as u64));
    for (name, kind) in [("first-packets", kind::FIRST), ("drops", kind::DROP)] {
        let records = records(kind, PORTS);
        // The table is as large as a run makes it, and each batch meets another part of it.
        let mut batches = records.chunks_exact(BATCH).cycle();
        let mut evidence = Evidence::new().expect("the kernel has BTF");
        evidence.absorb(&records);
        group.bench_function(BenchmarkId::new(name, BATCH), |bencher| {
            bencher.iter(|| evidence.absorb(black_box(batches.next().unwrap_or_default())));
        });
    }
    group.finish();
}

fn dissecting(criterion: &mut Criterion) {
    let four = packet(33_000);
    // IPv6 with one extension header before TCP's.
    let mut six = [0_u8; HEADER];
    six[0] = 0x60;
    six[6] = 0;
    six[8] = 0xfd;
    six[24] = 0xfd;
    six[40] = 6;
    six[48..50].copy_from_slice(&33_000_u16.to_be_bytes());
    six[50..52].copy_from_slice(&80_u16.to_be_bytes());
    for packet in [&four, &six] {
        let headers = dissect(packet).expect("whole headers");
        assert_eq!(headers.sport, Some(33_000));
    }
    let mut group = criterion.benchmark_group("dissect");
    group.bench_function("ipv4-tcp", |b| b.iter(|| dissect(black_box(&four))));
    group.bench_function("ipv6-extension-tcp", |b| {
        b.iter(|| dissect(black_box(&six)));
    });
    group.finish();
}

fn counting(criterion: &mut Criterion) {
    let mut dice = Dice::new(1);
    // From nanoseconds to seconds, every magnitude alike.
    let values: Vec<u64> = (0..BATCH)
        .map(|_| {
            let magnitude = 1 << dice.below(34);
            magnitude + dice.below(magnitude)
        })
        .collect();
    let mut group = criterion.benchmark_group("histogram");
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function(BenchmarkId::new("cell_of", BATCH), |bencher| {
        bencher.iter(|| {
            black_box(&values)
                .iter()
                .map(|value| cell_of(*value))
                .fold(0_usize, usize::wrapping_add)
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(2));
    targets = absorbing, dissecting, counting
}
criterion_main!(benches);
