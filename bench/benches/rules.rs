//! A cluster compiled to rules, which every sync of the laboratory's proxier does.

use std::hint::black_box;
use std::time::Duration;

use bench::{cluster, cluster_json, cluster_of, node_view};
use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use tracer::cluster::read::read;
use tracer::rules::{Mode, render, sync};

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

/// The largest size: 30,000 Services with 8 endpoints each.
fn large(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("render-30000x8");
    group.sampling_mode(SamplingMode::Flat);
    group.sample_size(10);
    let node = node_view();
    let cluster = cluster_of(30_000, 8);
    for mode in Mode::ALL {
        group.bench_function(mode.to_string(), |bencher| {
            bencher.iter(|| render(black_box(&cluster), &node, mode));
        });
    }
    group.finish();
}

/// One Service of 10,000 has lost an endpoint.
fn partial_sync(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sync");
    group.sampling_mode(SamplingMode::Flat);
    let node = node_view();
    let old = cluster(10_000);
    let mut new = old.clone();
    if let Some(port) = new.services.get_mut(5000).and_then(|s| s.ports.first_mut()) {
        port.endpoints.pop();
    }
    for mode in Mode::ALL {
        group.bench_function(mode.to_string(), |bencher| {
            bencher.iter(|| sync(black_box(&old), &new, &node, mode));
        });
    }
    group.finish();
}

/// What kubectl prints of 10,000 Services with 3 endpoints each.
fn reading(criterion: &mut Criterion) {
    let text = cluster_json(10_000, 3);
    let mut group = criterion.benchmark_group("read");
    group.sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("10000x3", |bencher| {
        bencher.iter(|| read(black_box(text.as_bytes()), "cluster.json").expect("a cluster"));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(2));
    targets = rendering, large, partial_sync, reading
}
criterion_main!(benches);
