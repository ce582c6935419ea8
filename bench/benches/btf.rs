//! The running kernel's type information, which every start of the tracer reads.

use std::hint::black_box;
use std::path::Path;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tracer::kernel::btf::Btf;

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

fn reading(criterion: &mut Criterion) {
    let path = Path::new(VMLINUX);
    let Ok(data) = std::fs::read(path) else {
        eprintln!("{VMLINUX} cannot be read: its benchmarks are left out");
        return;
    };
    let mut group = criterion.benchmark_group("btf");
    group.throughput(Throughput::Bytes(data.len() as u64));
    group.bench_function("read", |b| b.iter(|| Btf::read(black_box(path))));
    group.finish();
    // Of these, bytes a second would say nothing.
    let mut group = criterion.benchmark_group("btf");
    let btf = Btf::read(path).expect("readable");
    btf.offset_of("sk_buff", "data").expect("every kernel's");
    group.bench_function("offset_of", |b| {
        b.iter(|| btf.offset_of(black_box("sk_buff"), black_box("data")));
    });
    group.bench_function("enum_names", |b| {
        b.iter(|| btf.enum_names(black_box("skb_drop_reason")));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(2));
    targets = reading
}
criterion_main!(benches);
