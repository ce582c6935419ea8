//! The node, who sends, and what to.

use std::cell::Cell;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use tracer_ebpf::path::Target;
use tracer_ebpf::record::STAGE_NODE;

use super::bpftrace::{self, Bpftrace};
use super::{CALM, CostError, LIVE_SAMPLE, LeftOut, PacketKind, Pairing, ProbeSet, Setup};
use crate::kernel::clock::monotonic_ns;
use crate::kernel::netns::{Netns, NetnsError};
use crate::kernel::{sysctl, tool};
use crate::probe::catalogue::Detail;
use crate::probe::tier::{ProbeError, Probes, Tier, Watch};
use crate::rules::Mode;
use crate::scenario::node::TestNode;

/// A port of a pod that belongs to no Service.
const NO_SERVICE: u16 = 9;
/// Where later packets come from: the same flow in every round, for where its entry lies in conntrack's table
/// counts.
const PORT: u16 = 1024;
/// Where first packets come from: each port comes again only when conntrack has forgotten it (30 s).
const PORTS: std::ops::Range<u16> = 2000..u16::MAX;
/// What is sent: its length tells the pods what to drop.
const PAYLOAD: [u8; 100] = [b'x'; 100];
/// Packets of a round before those that are timed.
const WARM_UP: u32 = 100;
/// The laboratory's Services: odd ones are UDP.
const SERVICES: u32 = 4;
/// The Service that is asked.
const SERVICE: usize = 1;
/// The Service that has no endpoints.
const REJECTED: usize = 3;
const UDP: u8 = 17;
/// Packets to an endpoint and to nobody whose pairing is counted.
const DELIVERED: u32 = 1000;
const REJECTIONS: u32 = 200;
/// Between two packets that are rejected: `net.ipv4.icmp_msgs_per_sec`, 1000, holds for the whole machine.
const PACE: Duration = Duration::from_millis(2);

/// A node, and who sends and what to.
pub(super) struct Bench {
    node: TestNode,
    service: SocketAddr,
    rejected: SocketAddr,
    endpoint: SocketAddr,
    /// Where the next first packet comes from.
    port: Cell<u16>,
}

/// Probes at work; they go with this value.
pub(super) enum Attached {
    /// None.
    Nothing,
    /// Ours.
    Ours(Box<Probes>),
    /// bpftrace's.
    Theirs { _bpftrace: Bpftrace },
}

/// How often something happened for each packet.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counted {
    /// Runs of our programs.
    pub(super) runs: f64,
    /// Times taken.
    pub(super) stages: f64,
}

/// Packets that are ready to be sent.
struct Volley {
    sockets: Vec<UdpSocket>,
    /// Packets from each socket.
    each: u32,
    to: SocketAddr,
}

impl Volley {
    fn send(&self) -> Result<(), CostError> {
        for _ in 0..self.each {
            for socket in &self.sockets {
                socket.send_to(&PAYLOAD, self.to).map_err(failed(self.to))?;
            }
        }
        Ok(())
    }
}

fn failed(to: SocketAddr) -> impl Fn(std::io::Error) -> CostError {
    move |source| CostError::Send { to, source }
}

impl Bench {
    /// Builds the node; its pods drop what is sent to them.
    pub(super) async fn build(mode: Mode) -> Result<Self, CostError> {
        let mut node = TestNode::build(SERVICES, 1)?;
        node.cluster.services[REJECTED].ports[0].endpoints.clear();
        node.apply(mode).await?;
        let endpoint = &node.cluster.services[SERVICE].ports[0].endpoints[0];
        let bench = Self {
            service: node.vip(SERVICE),
            rejected: node.vip(REJECTED),
            endpoint: SocketAddr::new(endpoint.address, endpoint.port),
            port: Cell::new(PORTS.start),
            node,
        };
        let drop = format!(
            "add table ip cost; \
             add chain ip cost in {{ type filter hook prerouting priority -300; }}; \
             add rule ip cost in udp length {} drop",
            PAYLOAD.len() + 8
        );
        for pod in bench.node.lab.server_pods() {
            tool::run(pod, "nft", &[&drop], "")?;
        }
        Ok(bench)
    }

    fn ns(&self) -> &Netns {
        self.node.lab.node()
    }

    /// The tiers that this kernel has, and what it says of the others.
    ///
    /// # Errors
    ///
    /// It has none.
    pub(super) fn tiers(&self) -> Result<(Vec<Tier>, Vec<LeftOut>), CostError> {
        let (mut there, mut left_out, mut first) = (Vec::new(), Vec::new(), None);
        for tier in Tier::ALL {
            match self.attach_ours(Setup::ours(ProbeSet::Every, tier)) {
                Ok(_) => there.push(tier),
                Err(error) => {
                    let why = error.to_string();
                    left_out.push(LeftOut { tier, why });
                    first.get_or_insert(error);
                }
            }
        }
        match first {
            Some(error) if there.is_empty() => Err(error.into()),
            _ => Ok((there, left_out)),
        }
    }

    /// Attaches these probes.
    pub(super) fn attach(&self, setup: Setup) -> Result<Attached, CostError> {
        Ok(match setup.probes {
            ProbeSet::Off => Attached::Nothing,
            ProbeSet::Empty | ProbeSet::Live | ProbeSet::Every => {
                Attached::Ours(Box::new(self.attach_ours(setup)?))
            }
            ProbeSet::BpftraceKprobe | ProbeSet::BpftraceKfunc => Attached::Theirs {
                _bpftrace: self.attach_theirs(setup.probes)?,
            },
        })
    }

    fn attach_theirs(&self, probes: ProbeSet) -> Result<Bpftrace, CostError> {
        let script = match probes {
            ProbeSet::BpftraceKfunc => bpftrace::KFUNCS,
            _ => bpftrace::KPROBES,
        };
        Bpftrace::start(self.ns(), script)
    }

    fn attach_ours(&self, setup: Setup) -> Result<Probes, ProbeError> {
        let (detail, sample) = match setup.probes {
            ProbeSet::Empty | ProbeSet::Live => (Detail::Hooks, LIVE_SAMPLE),
            _ => (Detail::Stages, 1),
        };
        let watch = Watch {
            targets: vec![
                (self.service, UDP, Target::ClusterIp),
                (self.rejected, UDP, Target::ClusterIp),
                (self.endpoint, UDP, Target::Pod),
            ],
            detail,
            sample,
            empty: setup.probes == ProbeSet::Empty,
            ..Watch::default()
        };
        Probes::attach(setup.tier, self.ns(), &watch)
    }

    /// Makes packets of this kind ready: whatever is not to be timed has been done.
    fn ready(&self, kind: PacketKind, packets: u32) -> Result<Volley, CostError> {
        let to = match kind {
            PacketKind::Other => SocketAddr::new(self.endpoint.ip(), NO_SERVICE),
            PacketKind::First | PacketKind::Later => self.service,
        };
        let from = self.node.lab.client_pod();
        if kind == PacketKind::First {
            return Ok(Volley {
                sockets: self.sockets(packets)?.map_err(failed(to))?,
                each: 1,
                to,
            });
        }
        let socket = from
            .run(|| UdpSocket::bind(("0.0.0.0", PORT)))?
            .map_err(failed(to))?;
        if kind == PacketKind::Later {
            establish(&socket, to).map_err(failed(to))?;
        }
        let mut volley = Volley {
            sockets: vec![socket],
            each: WARM_UP,
            to,
        };
        volley.send()?;
        volley.each = packets;
        Ok(volley)
    }

    /// Sockets of the client's pod with a port each that was not used of late.
    fn sockets(&self, count: u32) -> Result<std::io::Result<Vec<UdpSocket>>, NetnsError> {
        let next = || {
            let port = self.port.get();
            let following = port + 1;
            self.port.set(if PORTS.contains(&following) {
                following
            } else {
                PORTS.start
            });
            UdpSocket::bind(("0.0.0.0", port))
        };
        let from = self.node.lab.client_pod();
        from.run(|| (0..count).map(|_| next()).collect())
    }

    /// Time of a packet of this kind, ns.
    pub(super) fn time(&self, kind: PacketKind, packets: u32) -> Result<f64, CostError> {
        let volley = self.ready(kind, packets)?;
        if kind != PacketKind::First {
            // Whoever else wants the processor has it now.
            std::thread::sleep(CALM);
        }
        let begin = monotonic_ns();
        volley.send()?;
        Ok((monotonic_ns() - begin) as f64 / f64::from(packets))
    }

    /// How often programs run and times are taken for a packet of each kind.
    pub(super) fn count(
        &self,
        setup: Setup,
        attached: Attached,
        packets: u32,
    ) -> Result<Vec<Counted>, CostError> {
        let kinds = PacketKind::ALL.into_iter();
        match attached {
            Attached::Nothing => Ok(kinds.map(|_| Counted::default()).collect()),
            Attached::Ours(mut probes) => {
                probes.count_run_time()?;
                kinds
                    .map(|kind| self.count_ours(&probes, kind, packets))
                    .collect()
            }
            Attached::Theirs { _bpftrace: running } => {
                // It tells its counts when it ends: one run for each kind.
                drop(running);
                kinds
                    .map(|kind| self.count_theirs(setup.probes, kind, packets))
                    .collect()
            }
        }
    }

    fn count_ours(
        &self,
        probes: &Probes,
        kind: PacketKind,
        packets: u32,
    ) -> Result<Counted, CostError> {
        let look = || {
            let runs = probes.run_time()?.unwrap_or_default().runs;
            Ok::<_, ProbeError>([runs, stages(probes)?])
        };
        let volley = self.ready(kind, packets)?;
        let before = look()?;
        volley.send()?;
        let after = look()?;
        let each = |at: usize| (after[at] - before[at]) as f64 / f64::from(packets);
        Ok(Counted {
            runs: each(0),
            stages: each(1),
        })
    }

    fn count_theirs(
        &self,
        probes: ProbeSet,
        kind: PacketKind,
        packets: u32,
    ) -> Result<Counted, CostError> {
        let volley = self.ready(kind, packets)?;
        let bpftrace = self.attach_theirs(probes)?;
        volley.send()?;
        Ok(Counted {
            runs: 0.0,
            stages: bpftrace.finish()?.samples() as f64 / f64::from(packets),
        })
    }

    /// Sends what pairing is judged by.
    fn send_some_to_nobody(&self, volley: &Volley) -> Result<(), CostError> {
        let from = self.node.lab.client_pod();
        let to = self.rejected;
        let socket = from
            .run(|| UdpSocket::bind(("0.0.0.0", 0)))?
            .map_err(failed(to))?;
        volley.send()?;
        for _ in 0..REJECTIONS {
            socket.send_to(&PAYLOAD, to).map_err(failed(to))?;
            std::thread::sleep(PACE);
        }
        Ok(())
    }

    /// Every packet that is rejected is to be answered.
    fn answer_every_rejected(&self) -> Result<(), CostError> {
        sysctl::write(self.ns(), "net/ipv4/icmp_ratelimit", "0")?;
        Ok(())
    }

    /// How many times bpftrace loses.
    pub(super) fn pairing_of_bpftrace(&self) -> Result<Vec<Pairing>, CostError> {
        self.answer_every_rejected()?;
        let volley = self.ready(PacketKind::Later, DELIVERED)?;
        let bpftrace = Bpftrace::start(self.ns(), bpftrace::COUNTERS)?;
        self.send_some_to_nobody(&volley)?;
        let printed = bpftrace.finish()?;
        let pairing = |what, names: bpftrace::Counters| {
            Ok(Pairing {
                setup: Setup::of_bpftrace(ProbeSet::BpftraceKprobe),
                what,
                delivered: DELIVERED,
                rejected: REJECTIONS,
                begun: printed
                    .count(names.begun)
                    .ok_or(CostError::NotPrinted(names.begun))?,
                // What never happened is not printed.
                timed: printed.count(names.timed).unwrap_or(0),
                overwritten: printed.count(names.overwritten).unwrap_or(0),
                unpaired: printed.count(names.unpaired).unwrap_or(0),
            })
        };
        let all = bpftrace::FUNCTIONS.into_iter();
        all.map(|(what, names)| pairing(what, names)).collect()
    }

    /// How many times our probes lose.
    pub(super) fn pairing_of_ours(&self, setup: Setup) -> Result<Pairing, CostError> {
        self.answer_every_rejected()?;
        let volley = self.ready(PacketKind::Later, DELIVERED)?;
        let probes = self.attach_ours(setup)?;
        self.send_some_to_nobody(&volley)?;
        let stats = probes.stats()?;
        Ok(Pairing {
            setup,
            what: "journeys",
            delivered: DELIVERED,
            rejected: REJECTIONS,
            begun: stats.journeys,
            // All of those that are dropped, too.
            timed: stats.timed + stats.dropped,
            overwritten: stats.collisions,
            unpaired: stats.unpaired,
        })
    }
}

/// Times that were taken, without the sums of each journey.
fn stages(probes: &Probes) -> Result<u64, ProbeError> {
    let all = probes.times()?;
    let stages = all.iter().filter(|times| times.stage != STAGE_NODE);
    Ok(stages.flat_map(|times| &times.cells).map(|[.., n]| n).sum())
}

/// Lets conntrack see an answer, so that what follows is no first packet.
fn establish(socket: &UdpSocket, to: SocketAddr) -> std::io::Result<()> {
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    socket.send_to(b"1\n", to)?;
    socket.recv(&mut [0; 64])?;
    Ok(())
}
