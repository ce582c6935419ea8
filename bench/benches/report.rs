//! A recorded run written out.

use std::hint::black_box;
use std::time::Duration;

use bench::run;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tracer::report::{blocks, html, json, markdown};

fn writing(criterion: &mut Criterion) {
    let run = run();
    let bytes = |text: usize| Throughput::Bytes(text as u64);
    let mut group = criterion.benchmark_group("report");
    group.throughput(bytes(html::render(&run).len()));
    group.bench_function("html", |b| b.iter(|| html::render(black_box(&run))));
    group.throughput(bytes(markdown::render(&blocks::summary(&run)).len()));
    group.bench_function("markdown", |b| {
        b.iter(|| markdown::render(&blocks::summary(black_box(&run))));
    });
    group.throughput(bytes(json::to_bytes(&run).expect("serializes").len()));
    group.bench_function("json", |b| b.iter(|| json::to_bytes(black_box(&run))));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(2));
    targets = writing
}
criterion_main!(benches);
