//! What the probes cost: the same packets with and without them, on a node of our own.
//!
//! A pod sends datagrams to a Service by way of the node; its endpoint's pod drops them at once. All of it,
//! the node's work included, happens within the `send` that is timed. Rounds with and without probes take
//! turns.

use std::fmt;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use serde::Serialize;
use tracer_ebpf::path::Target;

use super::node::{NodeError, TestNode};
use crate::kernel::clock::monotonic_ns;
use crate::kernel::netns::{Netns, NetnsError};
use crate::probe::catalogue::Detail;
use crate::probe::tier::{ProbeError, Probes, Tier, Watch};
use crate::record::run::Clock;
use crate::rules::Mode;

/// Why the cost could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum CostError {
    /// The node.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// A namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The probes.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// Sending.
    #[error("cannot send to {to}: {source}")]
    Send {
        /// To whom.
        to: SocketAddr,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The node could not be prepared.
    #[error("cannot prepare the node: {0}")]
    Prepare(String),
}

/// A set of probes whose cost is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProbeSet {
    /// None.
    Off,
    /// What a live node carries: entry and exit of each hook, one in [`LIVE_SAMPLE`] later packets timed.
    Live,
    /// Every stage, every packet timed.
    Every,
}

impl ProbeSet {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Off, Self::Live, Self::Every];
}

/// One in how many later packets a live trace times.
pub const LIVE_SAMPLE: u32 = 64;

/// Kinds of packets, which cost differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PacketKind {
    /// The first packet of a flow to a Service.
    First,
    /// A later one.
    Later,
    /// A packet to no Service, straight to a pod.
    Other,
}

impl PacketKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::First, Self::Later, Self::Other];
}

/// What a kind of packet costs with a set of probes.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// The probes.
    pub probes: ProbeSet,
    /// The packets.
    pub packets: PacketKind,
    /// Packets timed.
    pub count: u64,
    /// A packet's whole way, the middle one of the rounds, ns of the report's clock.
    pub packet_ns: f64,
    /// The lowest and highest round.
    pub range_ns: (f64, f64),
    /// Programs that ran for each packet, by the kernel's count.
    pub runs: f64,
    /// What the probes added to a packet, ns.
    pub added_ns: f64,
    /// The same for each run.
    pub run_ns: f64,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct CostReport {
    /// Of every time.
    pub clock: Clock,
    /// Rounds of each set and kind.
    pub rounds: u32,
    /// Each set with each kind.
    pub costs: Vec<Cost>,
}

/// A port of a pod that belongs to no Service.
const NO_SERVICE: u16 = 9;
/// The kernel frees what the set of probes before had, some 20 MB, when it has nothing else to do.
const CALM: Duration = Duration::from_millis(500);
/// Where later packets come from.
const PORT: u16 = 1024;
/// What is sent: its length tells the pods what to drop.
const PAYLOAD: [u8; 100] = [b'x'; 100];
/// Packets of a round before those that are timed.
const WARM_UP: u32 = 100;

/// Measures: `rounds` rounds of `packets` packets of each kind with each set.
pub async fn measure(rounds: u32, packets: u32) -> Result<CostReport, CostError> {
    let bench = Bench::build().await?;
    let mut times = vec![Vec::new(); ProbeSet::ALL.len() * PacketKind::ALL.len()];
    for _ in 0..rounds {
        for (set, probes) in ProbeSet::ALL.into_iter().enumerate() {
            let _attached = bench.attach(probes)?;
            tokio::time::sleep(CALM).await;
            for (kind, packet) in PacketKind::ALL.into_iter().enumerate() {
                times[set * PacketKind::ALL.len() + kind].push(bench.time(packet, packets)?);
            }
        }
    }
    let mut costs: Vec<Cost> = Vec::new();
    for (set, probes) in ProbeSet::ALL.into_iter().enumerate() {
        for (kind, packet) in PacketKind::ALL.into_iter().enumerate() {
            let times = &mut times[set * PacketKind::ALL.len() + kind];
            times.sort_by(f64::total_cmp);
            let packet_ns = times[times.len() / 2];
            let off_ns = costs.get(kind).map_or(packet_ns, |off| off.packet_ns);
            let runs = bench.runs(probes, packet, packets)?;
            let added_ns = packet_ns - off_ns;
            costs.push(Cost {
                probes,
                packets: packet,
                count: u64::from(rounds) * u64::from(packets),
                packet_ns,
                range_ns: (times[0], times[times.len() - 1]),
                runs,
                added_ns,
                run_ns: if runs > 0.0 { added_ns / runs } else { 0.0 },
            });
        }
    }
    Ok(CostReport {
        clock: Clock::of_this_machine(),
        rounds,
        costs,
    })
}

impl fmt::Display for CostReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "pod→ClusterIP over a node of our own, {} clock, {} rounds; the whole way of a packet, send to drop",
            match self.clock {
                Clock::Wall => "wall",
                Clock::Virtual => "virtual (instructions)",
            },
            self.rounds
        )?;
        writeln!(
            f,
            "{:<10} {:<8} {:>10} {:>23} {:>9} {:>10} {:>9}",
            "probes", "packet", "ns", "lowest - highest", "added", "runs", "per run"
        )?;
        for cost in &self.costs {
            writeln!(
                f,
                "{:<10} {:<8} {:>10.0} {:>11.0} - {:>9.0} {:>9.0} {:>10.2} {:>9.0}",
                format!("{:?}", cost.probes).to_lowercase(),
                format!("{:?}", cost.packets).to_lowercase(),
                cost.packet_ns,
                cost.range_ns.0,
                cost.range_ns.1,
                cost.added_ns,
                cost.runs,
                cost.run_ns
            )?;
        }
        Ok(())
    }
}

/// A node, and who sends and what to.
struct Bench {
    node: TestNode,
    service: SocketAddr,
    endpoint: SocketAddr,
}

/// The Service that is asked: odd ones are UDP.
const SERVICE: usize = 1;
const UDP: u8 = 17;

impl Bench {
    async fn build() -> Result<Self, CostError> {
        let node = TestNode::build(2, 1)?;
        node.apply(Mode::Nftables).await?;
        let service = &node.cluster.services[SERVICE];
        let port = &service.ports[0];
        let endpoint = &port.endpoints[0];
        let bench = Self {
            service: SocketAddr::new(service.cluster_ips[0], port.port),
            endpoint: SocketAddr::new(endpoint.address, endpoint.port),
            node,
        };
        for pod in bench.node.lab.server_pods() {
            let rules = format!(
                "add table ip cost; \
                 add chain ip cost in {{ type filter hook prerouting priority -300; }}; \
                 add rule ip cost in udp length {} drop",
                PAYLOAD.len() + 8
            );
            let output = pod.command("nft").arg(rules).output();
            let output = output.map_err(|error| CostError::Prepare(error.to_string()))?;
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                return Err(CostError::Prepare(said));
            }
        }
        Ok(bench)
    }

    fn attach(&self, probes: ProbeSet) -> Result<Option<Probes>, CostError> {
        let (detail, sample) = match probes {
            ProbeSet::Off => return Ok(None),
            ProbeSet::Live => (Detail::Hooks, LIVE_SAMPLE),
            ProbeSet::Every => (Detail::Stages, 1),
        };
        let watch = Watch {
            targets: vec![
                (self.service, UDP, Target::ClusterIp),
                (self.endpoint, UDP, Target::Pod),
            ],
            detail,
            sample,
            ..Watch::default()
        };
        Ok(Some(Probes::attach(
            Some(Tier::Hooks),
            self.node.lab.node(),
            &watch,
        )?))
    }

    /// Time of a packet of this kind, ns.
    fn time(&self, kind: PacketKind, packets: u32) -> Result<f64, CostError> {
        let to = match kind {
            PacketKind::Other => SocketAddr::new(self.endpoint.ip(), NO_SERVICE),
            PacketKind::First | PacketKind::Later => self.service,
        };
        let from = self.node.lab.client_pod();
        let fail = |source| CostError::Send { to, source };
        match kind {
            PacketKind::First => {
                let sockets = sockets(from, packets)?.map_err(fail)?;
                let begin = monotonic_ns();
                for socket in &sockets {
                    socket.send_to(&PAYLOAD, to).map_err(fail)?;
                }
                Ok((monotonic_ns() - begin) as f64 / f64::from(packets))
            }
            PacketKind::Later | PacketKind::Other => {
                // The same flow in every round: where its entry lies in conntrack's table counts.
                let socket = from
                    .run(|| UdpSocket::bind(("0.0.0.0", PORT)))?
                    .map_err(fail)?;
                if kind == PacketKind::Later {
                    establish(&socket, to).map_err(fail)?;
                }
                for _ in 0..WARM_UP {
                    socket.send_to(&PAYLOAD, to).map_err(fail)?;
                }
                // Whoever else wants the processor has it now.
                std::thread::sleep(CALM);
                let begin = monotonic_ns();
                for _ in 0..packets {
                    socket.send_to(&PAYLOAD, to).map_err(fail)?;
                }
                Ok((monotonic_ns() - begin) as f64 / f64::from(packets))
            }
        }
    }

    /// How often programs run for a packet, by the kernel's count.
    fn runs(&self, probes: ProbeSet, kind: PacketKind, packets: u32) -> Result<f64, CostError> {
        let Some(mut tier) = self.attach(probes)? else {
            return Ok(0.0);
        };
        tier.count_run_time()?;
        self.time(kind, packets)?;
        let runs = tier.run_time()?.unwrap_or_default().runs;
        let all = match kind {
            PacketKind::First => packets,
            PacketKind::Later | PacketKind::Other => packets + WARM_UP,
        };
        Ok(runs as f64 / f64::from(all))
    }
}

/// Sockets with a port each.
fn sockets(ns: &Netns, count: u32) -> Result<std::io::Result<Vec<UdpSocket>>, NetnsError> {
    ns.run(|| (0..count).map(|_| UdpSocket::bind("0.0.0.0:0")).collect())
}

/// Lets conntrack see an answer, so that what follows is no first packet.
fn establish(socket: &UdpSocket, to: SocketAddr) -> std::io::Result<()> {
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    socket.send_to(b"1\n", to)?;
    socket.recv(&mut [0; 64])?;
    Ok(())
}
