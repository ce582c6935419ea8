//! What tracing takes from the rate of TCP requests: a client in a pod asks a Service as fast as it is answered,
//! while a whole session traces the node, and while none does.
//!
//! Sessions start and end round by round; each round with one is compared with the round without that belongs
//! to it, so that what else the machine does falls on both.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use rand::seq::IndexedRandom as _;
use rand::{Rng, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use tracer_ebpf::path::Target;

use super::{CALM, CostError, LIVE_SAMPLE, ProbeSet, Setup};
use crate::kernel::sysctl;
use crate::lab::plan;
use crate::probe::catalogue::Detail;
use crate::probe::tier::{ProbeError, Probes, Tier, Watch};
use crate::record::run::Clock;
use crate::rules::Mode;
use crate::scenario::node::TestNode;
use crate::trace::session::{Options, Session, TraceError};

/// How a request comes to its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Connection {
    /// By a connection of its own: connect, ask, be answered, close.
    New,
    /// By one that is there.
    Kept,
}

impl Connection {
    /// Both.
    pub const ALL: [Self; 2] = [Self::New, Self::Kept];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Kept => "kept",
        }
    }
}

/// What a session takes from the rate of requests.
#[derive(Clone, Debug, Serialize)]
pub struct RequestCost {
    /// The session's probes.
    #[serde(flatten)]
    pub setup: Setup,
    /// How requests come.
    pub connection: Connection,
    /// Pairs of rounds, one with the session and one without.
    pub pairs: u32,
    /// Requests in all of them.
    pub requests: u64,
    /// Requests a second without it, the middle one of the rounds.
    pub without_per_s: f64,
    /// And with it.
    pub with_per_s: f64,
    /// What of the rate is lost.
    pub loss: Percent,
    /// CPU time of a request without it, ns: client, server, session and what the kernel does for them.
    pub without_cpu_ns: f64,
    /// And with it.
    pub with_cpu_ns: f64,
    /// How much more CPU time that is; what others take of the machine hardly counts here.
    pub more_cpu: Percent,
}

/// What the pairs say.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Percent {
    /// The middle one of them, percent.
    pub middle: f64,
    /// Where that lies with a probability of 95 %, percent: [`RESAMPLES`] bootstrap samples of the pairs.
    pub interval: (f64, f64),
}

impl Percent {
    fn of(pairs: &[f64]) -> Self {
        Self {
            middle: middle(pairs.to_vec()),
            interval: interval(pairs),
        }
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (low, high) = self.interval;
        write!(f, "{:>5.1} % ({low:>5.1} - {high:>4.1})", self.middle)
    }
}

/// How often pairs are drawn anew.
pub const RESAMPLES: usize = 10_000;
/// Of the draws: the same measurement has the same interval.
const SEED: u64 = 0x5ec0;
/// How long each kind of request is sent in a round.
const SPAN: Duration = Duration::from_millis(400);
/// The same where every round is like the others.
const SPAN_VIRTUAL: Duration = Duration::from_millis(100);
/// How often a session looks, as `svcpath trace` does.
const EVERY: Duration = Duration::from_millis(20);
/// The Service that is asked: even ones are TCP.
const SERVICE: usize = 0;
const TCP: u8 = 6;
const REQUEST: &[u8] = b"1\n";

/// What a round counted.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    requests: u64,
    per_s: f64,
    cpu_ns: f64,
}

/// A node with a TCP Service, and a client.
struct Bench {
    node: TestNode,
    service: SocketAddr,
    span: Duration,
}

/// Measures each tier's sessions in `rounds` rounds, in each of which every one has its turn.
pub(super) async fn measure(
    rounds: u32,
    tiers: &[Tier],
    clock: Clock,
) -> Result<Vec<RequestCost>, CostError> {
    let bench = Bench::build(clock).await?;
    let of_tier = |tier: &Tier| ProbeSet::OURS.map(|set| Setup::ours(set, *tier));
    let setups: Vec<Setup> = std::iter::once(Setup::OFF)
        .chain(tiers.iter().flat_map(of_tier))
        .collect();
    let mut counted = vec![[const { Vec::new() }; 2]; setups.len()];
    for round in 0..rounds as usize {
        for turn in 0..setups.len() {
            // Each is the first, the second and the last equally often.
            let number = (round + turn) % setups.len();
            for (to, of_kind) in counted[number].iter_mut().zip(bench.round(setups[number])?) {
                to.push(of_kind);
            }
        }
    }
    let off = &counted[0];
    let mut costs = Vec::new();
    for (kind, connection) in Connection::ALL.into_iter().enumerate() {
        for (setup, on) in setups.iter().zip(&counted).skip(1) {
            costs.push(compare(*setup, connection, &off[kind], &on[kind]));
        }
    }
    Ok(costs)
}

fn compare(setup: Setup, connection: Connection, off: &[Counted], on: &[Counted]) -> RequestCost {
    let pairs = |more: fn(&Counted, &Counted) -> f64| {
        let pairs = off.iter().zip(on).map(|(off, on)| more(off, on) * 100.0);
        Percent::of(&pairs.collect::<Vec<_>>())
    };
    let of =
        |rounds: &[Counted], what: fn(&Counted) -> f64| middle(rounds.iter().map(what).collect());
    RequestCost {
        setup,
        connection,
        pairs: u32::try_from(off.len().min(on.len())).unwrap_or(u32::MAX),
        requests: off.iter().chain(on).map(|round| round.requests).sum(),
        without_per_s: of(off, |round| round.per_s),
        with_per_s: of(on, |round| round.per_s),
        loss: pairs(|off, on| 1.0 - on.per_s / off.per_s),
        without_cpu_ns: of(off, |round| round.cpu_ns),
        with_cpu_ns: of(on, |round| round.cpu_ns),
        more_cpu: pairs(|off, on| on.cpu_ns / off.cpu_ns - 1.0),
    }
}

/// The middle one, or the mean of the two in the middle; 0 of none.
fn middle(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let half = numbers.len() / 2;
    match (numbers.get(half), numbers.len() % 2) {
        (None, _) => 0.0,
        (Some(upper), 0) => f64::midpoint(numbers[half - 1], *upper),
        (Some(middle), _) => *middle,
    }
}

/// Between which bounds the middle one lies in 95 of 100 samples drawn from these.
fn interval(numbers: &[f64]) -> (f64, f64) {
    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let mut middles: Vec<f64> = (0..RESAMPLES)
        .map(|_| middle(drawn(numbers, &mut random)))
        .collect();
    middles.sort_by(f64::total_cmp);
    (
        middles[RESAMPLES / 40],
        middles[RESAMPLES - 1 - RESAMPLES / 40],
    )
}

/// As many as there are, each of them any.
fn drawn(numbers: &[f64], random: &mut impl Rng) -> Vec<f64> {
    let any = (0..numbers.len()).filter_map(|_| numbers.choose(random));
    any.copied().collect()
}

impl Bench {
    async fn build(clock: Clock) -> Result<Self, CostError> {
        let node = TestNode::build(2, 1)?;
        node.apply(Mode::Nftables).await?;
        // A client's port is free again when its connection has ended for a second, so that ports last.
        let client = node.lab.client_pod();
        sysctl::write(client, "net/ipv4/tcp_tw_reuse", "1")?;
        sysctl::write(client, "net/ipv4/ip_local_port_range", "1024 65535")?;
        let remembered = "net/netfilter/nf_conntrack_tcp_timeout_time_wait";
        sysctl::write(node.lab.node(), remembered, "1")?;
        Ok(Self {
            service: node.vip(SERVICE),
            node,
            span: match clock {
                Clock::Wall => SPAN,
                Clock::Virtual => SPAN_VIRTUAL,
            },
        })
    }

    /// One round: each kind of request, while such a session traces the node.
    fn round(&self, setup: Setup) -> Result<[Counted; 2], CostError> {
        if setup.probes == ProbeSet::Empty {
            let _attached = self.attach_empty(setup.tier)?;
            return self.requests();
        }
        let Some(mut session) = self.session(setup)? else {
            return self.requests();
        };
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let tracing = scope.spawn(|| -> Result<(), TraceError> {
                while !done.load(Ordering::Relaxed) {
                    std::thread::sleep(EVERY);
                    session.poll()?;
                }
                session.finish().map(drop)
            });
            let counted = self.requests();
            done.store(true, Ordering::Relaxed);
            tracing
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            counted
        })
    }

    /// What a live session attaches, with programs that return at once; nobody listens.
    fn attach_empty(&self, tier: Option<Tier>) -> Result<Probes, ProbeError> {
        let watch = Watch {
            targets: vec![(self.service, TCP, Target::ClusterIp)],
            detail: Detail::Hooks,
            sample: LIVE_SAMPLE,
            empty: true,
            ..Watch::default()
        };
        Probes::attach(tier, self.node.lab.node(), &watch)
    }

    fn session(&self, setup: Setup) -> Result<Option<Session>, CostError> {
        let (detail, sample) = match setup.probes {
            ProbeSet::Live => (Detail::Hooks, LIVE_SAMPLE),
            ProbeSet::Every => (Detail::Stages, 1),
            _ => return Ok(None),
        };
        let options = Options {
            tier: setup.tier,
            pod_cidrs: vec![plan::NODE_POD_CIDR],
            detail,
            sample,
            ..Options::default()
        };
        Ok(Some(Session::start(self.node.lab.node(), options)?))
    }

    fn requests(&self) -> Result<[Counted; 2], CostError> {
        std::thread::sleep(CALM);
        let (client, to) = (self.node.lab.client_pod(), self.service);
        let fail = |source| CostError::Send { to, source };
        let new = || request(&mut TcpStream::connect(to)?);
        let new = client.run(|| self.asked(new))?.map_err(fail)?;
        let stream = client.run(|| TcpStream::connect(to))?;
        let mut stream = stream.map_err(fail)?;
        let kept = self.asked(|| request(&mut stream)).map_err(fail)?;
        Ok([new, kept])
    }

    /// Asks for a span of time, one request after the other.
    fn asked(&self, mut ask: impl FnMut() -> io::Result<()>) -> io::Result<Counted> {
        let mut requests = 0;
        let (begin, cpu) = (Instant::now(), process_time()?);
        while begin.elapsed() < self.span {
            ask()?;
            requests += 1;
        }
        let (took, cpu) = (begin.elapsed(), process_time()?.saturating_sub(cpu));
        Ok(Counted {
            requests,
            per_s: requests as f64 / took.as_secs_f64(),
            cpu_ns: cpu.as_secs_f64() * 1e9 / requests as f64,
        })
    }
}

/// CPU time that this process has taken.
fn process_time() -> io::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into())
}

/// One request and its answer, which is a line.
fn request(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(REQUEST)?;
    let mut answer = [0; 64];
    let mut length = 0;
    while !answer[..length].ends_with(b"\n") {
        let read = stream.read(&mut answer[length..])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        length += read;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(rates: &[f64]) -> Vec<Counted> {
        let of_rate = |per_s: &f64| Counted {
            requests: 10,
            per_s: *per_s,
            cpu_ns: 1e9 / per_s,
        };
        rates.iter().map(of_rate).collect()
    }

    #[test]
    fn pairs_are_compared_and_not_rounds() {
        // The machine becomes ever slower, and every pair says the same.
        let off = rounds(&[4000.0, 2000.0, 1000.0, 500.0]);
        let on = rounds(&[3600.0, 1800.0, 900.0, 450.0]);
        let setup = Setup::ours(ProbeSet::Live, Tier::Hooks);
        let cost = compare(setup, Connection::New, &off, &on);
        for (percent, is) in [(cost.loss, 10.0), (cost.more_cpu, 100.0 / 9.0)] {
            let near = |number: f64| (number - is).abs() < 1e-9;
            let (low, high) = percent.interval;
            assert!(near(percent.middle) && near(low) && near(high), "{cost:?}");
        }
        assert_eq!((cost.pairs, cost.requests), (4, 80));
        assert!((cost.without_per_s - 1500.0).abs() < 1e-9, "{cost:?}");
    }

    #[test]
    fn an_interval_holds_the_middle_and_not_an_outlier() {
        let losses: Vec<f64> = (0..20).map(f64::from).chain([900.0]).collect();
        let (low, high) = interval(&losses);
        assert!(low < 10.0 && 10.0 < high, "{low} {high}");
        assert!(low > 2.0 && high < 18.0, "{low} {high}");
        assert!((middle(losses) - 10.0).abs() < 1e-9);
        assert_eq!(interval(&[3.0]), (3.0, 3.0));
    }
}
