//! What is sent when, and to whom: pure, and the same for the same seed.

use std::net::{IpAddr, SocketAddr};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tracer_ebpf::path::{Path, Target};

use super::plan;
use super::traffic::Stream;
use crate::cluster::{Cluster, Family, Protocol, Service, ServicePort};

/// A flow that will be sent. Its source is not known yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Planned {
    pub(super) path: Path,
    pub(super) protocol: Protocol,
    /// Index of the Service, and of its port.
    pub(super) service: usize,
    pub(super) port: usize,
    pub(super) destination: SocketAddr,
    /// From the start of the traffic.
    pub(super) at_ns: u64,
}

/// Chooses destinations uniformly.
pub(super) struct Chooser<'a> {
    cluster: &'a Cluster,
    family: Family,
    rng: ChaCha8Rng,
    path: Path,
    /// (Service, port) that this path can be sent to.
    candidates: Vec<(usize, usize)>,
}

impl<'a> Chooser<'a> {
    /// `number` tells choosers of one seed apart: adding a stream changes no other stream.
    pub(super) fn new(
        cluster: &'a Cluster,
        family: Family,
        path: Path,
        only: Option<Protocol>,
        seed: u64,
        number: u64,
    ) -> Self {
        let mut candidates = Vec::new();
        for (service, s) in cluster.services.iter().enumerate() {
            for (port, p) in s.ports.iter().enumerate() {
                let reachable = match path.target {
                    Target::ClusterIp => s.cluster_ips.iter().any(|ip| Family::of(*ip) == family),
                    Target::NodePort => p.node_port.is_some(),
                    Target::External => external(s, family).next().is_some(),
                    Target::Pod => endpoints(p, family).next().is_some(),
                };
                if reachable
                    && p.protocol != Protocol::Sctp
                    && only.is_none_or(|only| only == p.protocol)
                {
                    candidates.push((service, port));
                }
            }
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(number);
        Self {
            cluster,
            family,
            rng,
            path,
            candidates,
        }
    }

    /// A flow at `at_ns`; `None` if no Service can be reached by this path.
    pub(super) fn choose(&mut self, at_ns: u64) -> Option<Planned> {
        if self.candidates.is_empty() {
            return None;
        }
        let (service, port) = self.candidates[self.rng.random_range(0..self.candidates.len())];
        let s = &self.cluster.services[service];
        let p = &s.ports[port];
        let destination = match self.path.target {
            Target::ClusterIp => {
                let family = self.family;
                let ip = s.cluster_ips.iter().find(|ip| Family::of(**ip) == family)?;
                SocketAddr::new(*ip, p.port)
            }
            Target::NodePort => SocketAddr::new(plan::node_address(self.family), p.node_port?),
            Target::External => {
                let count = external(s, self.family).count();
                let chosen = self.rng.random_range(0..count);
                SocketAddr::new(external(s, self.family).nth(chosen)?, p.port)
            }
            Target::Pod => {
                let count = endpoints(p, self.family).count();
                endpoints(p, self.family).nth(self.rng.random_range(0..count))?
            }
        };
        Some(Planned {
            path: self.path,
            protocol: p.protocol,
            service,
            port,
            destination,
            at_ns,
        })
    }
}

/// The addresses of one family that a Service has outside the cluster.
fn external(service: &Service, family: Family) -> impl Iterator<Item = IpAddr> + '_ {
    let all = service
        .external_ips
        .iter()
        .chain(&service.load_balancer_ips);
    all.copied().filter(move |ip| Family::of(*ip) == family)
}

/// The endpoints of one family.
pub(super) fn endpoints(
    port: &ServicePort,
    family: Family,
) -> impl Iterator<Item = SocketAddr> + '_ {
    port.endpoints
        .iter()
        .filter(move |e| Family::of(e.address) == family)
        .map(|e| SocketAddr::new(e.address, e.port))
}

/// When flow number `n` of a stream is due, `late` intervals late, from the start of the traffic.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "both factors are positive and checked; 2^53 ns is 104 days"
)]
pub(super) fn due_ns(stream: &Stream, n: u32, late: f64) -> u64 {
    stream.start_ns + ((f64::from(n) + late) * 1e9 / stream.per_second) as u64
}

/// The part of a stream's interval by which its flows are sent late, each by a random share of it.
///
/// Evenly spaced flows keep their phase to whatever else is periodic: a tick of the kernel that
/// meets the first packet of one flow would meet that of every flow. A quarter of the intervals
/// used here is more than a tick of 250 Hz; order and rate stay, and flows of streams that start at
/// a third or a sixth of the interval stay apart.
const DITHER: f64 = 0.25;

/// How late the flows of a stream are, in intervals.
fn dither(rng: &mut ChaCha8Rng) -> f64 {
    rng.random_range(0.0..DITHER)
}

/// When the last flow of a stream is due at the latest; `None` if there is none.
pub(super) fn last_due_ns(stream: &Stream) -> Option<u64> {
    Some(due_ns(stream, stream.flows.checked_sub(1)?, DITHER))
}

/// Sets the random numbers of the dither apart from those of destinations.
const DITHER_STREAMS: u64 = 2 << 32;
/// Sets the random numbers of UDP flows apart from those of TCP flows.
const UDP_STREAMS: u64 = 1 << 32;

/// Does flow number `n` go to a UDP Service? Every third does, if there are both kinds.
///
/// Costs differ between the protocols. With shares left to chance, or equal ones, a median would lie
/// between the two and jump from one to the other; with these it lies among the TCP flows.
const fn is_udp(n: u32, tcp: usize, udp: usize) -> bool {
    tcp == 0 || (udp > 0 && n % 3 == 2)
}

/// All flows of the streams, in the order of sending; the path that cannot be sent, if one cannot.
pub(super) fn flows(
    cluster: &Cluster,
    family: Family,
    streams: &[Stream],
    seed: u64,
) -> Result<Vec<Planned>, Path> {
    let mut all = Vec::new();
    for (number, stream) in (0..).zip(streams) {
        let chooser = |protocol, number| {
            Chooser::new(cluster, family, stream.path, Some(protocol), seed, number)
        };
        let mut tcp = chooser(Protocol::Tcp, number);
        let mut udp = chooser(Protocol::Udp, number + UDP_STREAMS);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(number + DITHER_STREAMS);
        for n in 0..stream.flows {
            let chosen = if is_udp(n, tcp.candidates.len(), udp.candidates.len()) {
                &mut udp
            } else {
                &mut tcp
            };
            let at_ns = due_ns(stream, n, dither(&mut rng));
            all.push(chosen.choose(at_ns).ok_or(stream.path)?);
        }
    }
    // Stable: flows due at one moment keep the order of their streams.
    all.sort_by_key(|flow| flow.at_ns);
    Ok(all)
}

/// Who may answer a flow to `destination`.
pub(super) fn answerers(
    port: &ServicePort,
    path: Path,
    destination: SocketAddr,
) -> Vec<SocketAddr> {
    match path.target {
        Target::Pod => vec![destination],
        Target::ClusterIp | Target::NodePort | Target::External => {
            endpoints(port, Family::of(destination.ip())).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn stream(path: Path, flows: u32) -> Stream {
        Stream {
            path,
            per_second: 1000.0,
            flows,
            start_ns: 5,
        }
    }

    #[test]
    fn the_seed_decides_everything() {
        let cluster = plan::cluster(50, 3, true).expect("a cluster");
        let streams = [stream(Path::SERVICE[0], 100), stream(Path::FLOOR[2], 100)];
        let one = flows(&cluster, Family::V4, &streams, 1).expect("flows");
        assert_eq!(
            one,
            flows(&cluster, Family::V4, &streams, 1).expect("flows")
        );
        assert_ne!(
            one,
            flows(&cluster, Family::V4, &streams, 2).expect("flows")
        );
        assert_eq!(one.len(), 200);
        assert!(one.is_sorted_by_key(|flow| flow.at_ns));
        // A further stream leaves the first as it was.
        let alone = flows(&cluster, Family::V4, &streams[..1], 1).expect("flows");
        let first: Vec<&Planned> = one
            .iter()
            .filter(|flow| flow.path == Path::SERVICE[0])
            .collect();
        assert_eq!(first, alone.iter().collect::<Vec<_>>());
    }

    #[test]
    fn flows_keep_their_rate_and_order_but_no_phase() {
        const INTERVAL: u64 = 20_000_000;
        const TICK: u64 = 4_000_000;
        let cluster = plan::cluster(20, 3, false).expect("a cluster");
        let stream = Stream {
            per_second: 50.0,
            ..stream(Path::SERVICE[0], 2000)
        };
        let all = flows(&cluster, Family::V4, &[stream], 7).expect("flows");
        let mut phases = [0_u32; 8];
        for (n, flow) in (0_u64..).zip(&all) {
            let late = flow.at_ns - 5 - n * INTERVAL;
            assert!(late < INTERVAL / 4, "flow {n} is {late} ns late");
            let eighth = flow.at_ns % TICK * 8 / TICK;
            phases[usize::try_from(eighth).expect("below 8")] += 1;
        }
        assert!(phases.iter().all(|n| *n > 100), "{phases:?}");
        assert!(all[1999].at_ns <= last_due_ns(&stream).expect("there are flows"));
    }

    #[test]
    fn services_of_a_protocol_are_chosen_uniformly() {
        let cluster = plan::cluster(20, 3, false).expect("a cluster");
        let all = flows(&cluster, Family::V4, &[stream(Path::FLOOR[0], 20_000)], 7).expect("flows");
        let mut counts = vec![0_u32; 20];
        for flow in &all {
            counts[flow.service] += 1;
        }
        // Of each TCP Service 1333 expected, of each UDP Service 667; a standard deviation of 35.
        for (service, n) in counts.iter().enumerate() {
            let expected = if service % 2 == 0 { 1333 } else { 667 };
            assert!(n.abs_diff(expected) < 150, "{counts:?}");
        }
        let reached: BTreeSet<SocketAddr> = all.iter().map(|flow| flow.destination).collect();
        assert_eq!(reached.len(), 60);
    }

    #[test]
    fn every_third_flow_is_udp_if_there_are_both_kinds() {
        let cluster = plan::cluster(21, 3, false).expect("a cluster");
        let all = flows(&cluster, Family::V4, &[stream(Path::FLOOR[0], 420)], 7).expect("flows");
        let udp = |flows: &[Planned]| flows.iter().filter(|f| f.protocol == Protocol::Udp).count();
        assert_eq!(udp(&all), 140);
        assert_eq!(udp(&all[..42]), 14);
        let one = plan::cluster(1, 3, false).expect("a cluster");
        let all = flows(&one, Family::V4, &[stream(Path::FLOOR[0], 9)], 7).expect("flows");
        assert_eq!(udp(&all), 0);
    }

    #[test]
    fn a_service_without_node_port_is_never_chosen_for_one() {
        let mut cluster = plan::cluster(4, 1, false).expect("a cluster");
        cluster.services[0].ports[0].node_port = None;
        cluster.services[3].ports[0].node_port = None;
        let all = flows(&cluster, Family::V4, &[stream(Path::SERVICE[2], 500)], 7).expect("flows");
        let services: BTreeSet<usize> = all.iter().map(|flow| flow.service).collect();
        assert_eq!(services, BTreeSet::from([1, 2]));
        for service in &mut cluster.services {
            service.ports[0].node_port = None;
        }
        assert_eq!(
            flows(&cluster, Family::V4, &[stream(Path::SERVICE[2], 1)], 7),
            Err(Path::SERVICE[2])
        );
        assert_eq!(
            flows(&cluster, Family::V6, &[stream(Path::SERVICE[0], 1)], 7),
            Err(Path::SERVICE[0])
        );
    }
}
