//! A cluster read, compiled to rules, checked against a dump, and walked like a packet.

use std::hint::black_box;
use std::time::Duration;

use bench::{cluster, cluster_json, cluster_of, node_view};
use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use tracer::cluster::read::read;
use tracer::cluster::{Family, Protocol};
use tracer::rules::check::check;
use tracer::rules::dump::Texts;
use tracer::rules::oracle::Rules;
use tracer::rules::walk::{Origin, Packet, State};
use tracer::rules::{Mode, iptables, render, sync};

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

/// The rules of 30,000 Services with 8 endpoints each: the whole check of a dump, which renders what
/// is called for; and of an `iptables-save` reading alone.
fn checking(criterion: &mut Criterion) {
    let node = node_view();
    let cluster = cluster_of(30_000, 8);
    let mut group = criterion.benchmark_group("check-30000x8");
    group.sampling_mode(SamplingMode::Flat);
    group.sample_size(10);
    for mode in [Mode::IptablesNft, Mode::Nftables] {
        let mut texts = Texts::rendered(&render(&cluster, &node, mode));
        for (texts, family) in [(&mut texts.v4, Family::V4), (&mut texts.v6, Family::V6)] {
            for save in &mut texts.iptables {
                // A dump is not what `iptables-restore` reads.
                save.text = iptables::parse(&save.text, family).expect("rules").saved();
            }
        }
        if let Some(save) = texts.v4.iptables.first() {
            group.throughput(Throughput::Bytes(save.text.len() as u64));
            group.bench_function("parse iptables-save", |bencher| {
                bencher.iter(|| iptables::parse(black_box(&save.text), Family::V4).expect("rules"));
            });
        }
        group.bench_function(mode.to_string(), |bencher| {
            bencher.iter(|| {
                let report = check(&cluster, &node, mode, black_box(&texts)).expect("a dump");
                assert_eq!(report.differences, []);
            });
        });
    }
    group.finish();
}

/// One packet to the Service in the middle of 30,000, with its rules read and indexed before.
fn walking(criterion: &mut Criterion) {
    let node = node_view();
    let cluster = cluster_of(30_000, 8);
    let service = &cluster.services[15_000];
    let mut group = criterion.benchmark_group("walk-30000x8");
    for mode in [Mode::IptablesNft, Mode::Ipvs, Mode::Nftables] {
        let texts = Texts::rendered(&render(&cluster, &node, mode));
        let rules = Rules::parse(&texts, Family::V4).expect("a dump");
        let layers = rules.layers();
        let local = node.addresses.iter().copied().collect();
        let place = rules.place(local, cluster.virtual_ips().collect());
        let oracle = layers.oracle(&place);
        let packet = Packet {
            origin: Origin::Link(None),
            from: [10, 244, 0, 7].into(),
            from_port: None,
            to: service.cluster_ips[0],
            to_port: 80,
            protocol: Protocol::Tcp,
            state: State::New,
        };
        assert_eq!(oracle.walk(&packet).len(), 8);
        group.bench_function(mode.to_string(), |bencher| {
            bencher.iter(|| oracle.walk(black_box(&packet)));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(2));
    targets = rendering, large, partial_sync, reading, checking, walking
}
criterion_main!(benches);
