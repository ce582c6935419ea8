//! A cluster compiled to rules, which every sync of the laboratory's proxier does.

use std::hint::black_box;
use std::time::Duration;

use bench::{cluster, node_view};
use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use tracer::rules::{Mode, render};

fn rendering(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("render");
    // One rendering of a large cluster takes too long to be repeated more often in later samples.
    group.sampling_mode(SamplingMode::Flat);
    let node = node_view();
    for services in [1000, 10_000] {
        let cluster = cluster(services);
        group.throughput(Throughput::Elements(services.into()));
        for mode in Mode::ALL {
            group.bench_with_input(
                BenchmarkId::new(mode.to_string(), services),
                &cluster,
                |bencher, cluster| bencher.iter(|| render(black_box(cluster), &node, mode)),
            );
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(2));
    targets = rendering
}
criterion_main!(benches);
