//! A node under measurement: laboratory, servers, rules, probes, and what they saw.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use serde::Serialize;
use tracer_ebpf::path::{Path, Target};

use super::matrix::ENDPOINTS;

use crate::cluster::{Cluster, Family};
use crate::kernel::apply::{self, ApplyError};
use crate::kernel::btf::{Btf, BtfError};
use crate::kernel::clock::monotonic_ns;
use crate::kernel::netns::Netns;
use crate::kernel::nfacct;
use crate::kernel::tool::{self, ToolError};
use crate::lab::Outcome;
use crate::lab::plan;
use crate::lab::sink::{SinkError, Sinks};
use crate::lab::topology::{Lab, LabError, LabOptions};
use crate::lab::traffic::{self, FlowRecord, TrafficError, TrafficPlan};
use crate::probe::catalogue::{self, Detail};
use crate::probe::rule_changes::RuleChangeProbes;
use crate::probe::tier::{Missing, ProbeError, Probed, Probes, Tier, Times, Watch};
use crate::probe::trial;
use crate::record::evidence::Evidence;
use crate::record::flows::{Seen, Sent};
use crate::record::run::ProbeHealth;
use crate::rules::iptables;
use crate::rules::{Mode, NodeView, RuleCounts, RuleSet, render, sync};

/// Why a job could not be done.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The cluster does not fit the laboratory.
    #[error(transparent)]
    Plan(#[from] plan::PlanError),
    /// The laboratory.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// The servers.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// The rules.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// nfacct.
    #[error(transparent)]
    Accounting(#[from] nfacct::NfacctError),
    /// The probes.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The kernel's BTF.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// The traffic.
    #[error(transparent)]
    Traffic(#[from] TrafficError),
    /// A background task ended badly.
    #[error("changing the rules failed: {0}")]
    Task(#[from] tokio::task::JoinError),
    /// Fewer rules in the kernel than were applied.
    #[error("{mode}: the kernel holds {found:?} after applying {wanted:?}")]
    Incomplete {
        /// The mode.
        mode: Mode,
        /// What was applied.
        wanted: RuleCounts,
        /// What is there.
        found: RuleCounts,
    },
    /// Records were lost and with them the answer.
    #[error("{0} records were lost: the run cannot be trusted")]
    LostRecords(u64),
    /// The kernel cannot do the mode.
    #[error("kernel {kernel} has no {what}: {remedy}")]
    Lacks {
        /// Release.
        kernel: String,
        /// What is missing.
        what: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// A program that loads rules is not installed.
    #[error(transparent)]
    Tool(#[from] ToolError),
}

/// A node with rules and servers, ready to be measured.
#[derive(Debug)]
pub struct TestNode {
    /// The laboratory.
    pub lab: Lab,
    /// The cluster whose Services it serves.
    pub cluster: Cluster,
    view: NodeView,
    _sinks: Sinks,
}

/// Rules that were put in.
#[derive(Clone, Copy, Debug)]
pub struct Applied {
    /// What the kernel holds now.
    pub counts: RuleCounts,
    /// How long the tools took, ns.
    pub took_ns: u64,
}

impl TestNode {
    /// The ClusterIP and port of a Service, by its place in the cluster.
    pub fn vip(&self, service: usize) -> SocketAddr {
        let service = &self.cluster.services[service];
        SocketAddr::new(service.cluster_ips[0], service.ports[0].port)
    }

    /// Builds the laboratory and starts a server behind every endpoint.
    pub fn build(services: u32, endpoints: u32) -> Result<Self, NodeError> {
        Self::build_with(services, endpoints, LabOptions::default())
    }

    /// The same, with IPv6 beside IPv4 if the laboratory is to have it.
    pub fn build_with(
        services: u32,
        endpoints: u32,
        options: LabOptions,
    ) -> Result<Self, NodeError> {
        let dual_stack = options.dual_stack;
        let cluster = plan::cluster(services, endpoints, dual_stack)?;
        let lab = Lab::build(options)?;
        let sinks = Sinks::start(&lab, &cluster)?;
        let nfacct = nfacct::supported(
            lab.node(),
            &[iptables::INVALID_DROPPED, iptables::LOCALHOST_NODE_PORTS],
        )?;
        let mut view = NodeView {
            name: plan::NODE.to_owned(),
            addresses: vec![plan::node_address(Family::V4), plan::LINK_ADDRESS.base],
            cluster_cidrs: vec![plan::CLUSTER_CIDR],
            service_cidrs: vec![plan::SERVICE_CIDR],
            nfacct,
            ..NodeView::default()
        };
        if dual_stack {
            view.addresses
                .extend([plan::node_address(Family::V6), plan::LINK_ADDRESS6.base]);
            view.cluster_cidrs.push(plan::CLUSTER_CIDR6);
            view.service_cidrs.push(plan::SERVICE_CIDR6);
        }
        Ok(Self {
            lab,
            cluster,
            view,
            _sinks: sinks,
        })
    }

    /// The rules of a mode.
    pub fn rules(&self, mode: Mode) -> RuleSet {
        render(&self.cluster, &self.view, mode)
    }

    /// What kube-proxy sends when the cluster was this one before.
    pub fn sync(&self, before: &Cluster, mode: Mode) -> RuleSet {
        sync(before, &self.cluster, &self.view, mode)
    }

    /// Puts a mode's rules in and checks that all went in.
    ///
    /// The tools run beside the caller's tasks, which can be given up meanwhile.
    pub async fn apply(&self, mode: Mode) -> Result<Applied, NodeError> {
        require_mode(mode)?;
        let (netns, rules) = (self.lab.node().clone(), self.rules(mode));
        let (wanted, found, took_ns) = tokio::task::spawn_blocking(move || {
            let begin = monotonic_ns();
            apply::apply(&netns, &rules)?;
            let took_ns = monotonic_ns() - begin;
            let found = apply::count(&netns, mode)?;
            Ok::<_, ApplyError>((rules.expected_counts(), found, took_ns))
        })
        .await??;
        if wanted != found {
            return Err(NodeError::Incomplete {
                mode,
                wanted,
                found,
            });
        }
        Ok(Applied {
            counts: found,
            took_ns,
        })
    }

    /// Visits everything that the plan will ask, once for each endpoint.
    pub async fn rehearse(&self, plan: &TrafficPlan) -> Result<(), NodeError> {
        traffic::rehearse(
            &self.lab,
            &self.cluster,
            plan,
            ENDPOINTS,
            REHEARSAL_PER_SECOND,
        )
        .await?;
        Ok(())
    }

    /// Sends a few flows by every path, so that routes are cached and code is warm.
    pub async fn warm_up(&self, seed: u64) -> Result<(), NodeError> {
        let paths: Vec<Path> = Path::SERVICE.into_iter().chain(Path::FLOOR).collect();
        traffic::warm_up(
            &self.lab,
            &self.cluster,
            Family::V4,
            &paths,
            WARM_UP_FLOWS,
            // Not the flows that will be measured.
            !seed,
        )
        .await?;
        Ok(())
    }

    /// Attaches the probes to the node.
    pub fn watch(&self) -> Result<Watched, NodeError> {
        self.watch_with(Tier::Hooks)
    }

    /// The same with this tier.
    pub fn watch_with(&self, tier: Tier) -> Result<Watched, NodeError> {
        let watch = self.watch_list();
        Ok(Watched {
            probes: Probes::attach(Some(tier), self.lab.node(), &watch)?,
            evidence: Evidence::new()?,
        })
    }

    /// Every address and port that stands for a Service or an endpoint.
    fn watch_list(&self) -> Watch {
        let mut targets = Vec::new();
        for port in self
            .cluster
            .services
            .iter()
            .flat_map(|service| service.ports.iter().map(move |port| (service, port)))
        {
            let (service, port) = port;
            let protocol = port.protocol.number();
            for ip in &service.cluster_ips {
                targets.push((SocketAddr::new(*ip, port.port), protocol, Target::ClusterIp));
            }
            if let Some(node_port) = port.node_port {
                for address in &self.view.addresses {
                    targets.push((
                        SocketAddr::new(*address, node_port),
                        protocol,
                        Target::NodePort,
                    ));
                }
            }
            for endpoint in &port.endpoints {
                targets.push((
                    SocketAddr::new(endpoint.address, endpoint.port),
                    protocol,
                    Target::Pod,
                ));
            }
        }
        Watch {
            targets,
            node_addresses: self.view.addresses.clone(),
            // A family without targets is not watched.
            pod_cidrs: [plan::NODE_POD_CIDR, plan::NODE_POD_CIDR6]
                .map(|cidr| (cidr.base, cidr.prefix))
                .to_vec(),
            ..Watch::default()
        }
    }
}

/// The probes of a node and what they have told so far.
#[derive(Debug)]
pub struct Watched {
    probes: Probes,
    /// What the kernel said of each flow.
    pub evidence: Evidence,
}

/// Flows by each path before anything is measured.
const WARM_UP_FLOWS: u32 = 20;

/// Flows a second of a rehearsal.
const REHEARSAL_PER_SECOND: f64 = 400.0;

/// From deciding on a start of the traffic to the start, ns.
pub const LEAD_NS: u64 = 10_000_000;

/// How often the ring buffer is emptied while traffic runs.
pub const DRAIN_EVERY: Duration = Duration::from_millis(50);

impl Watched {
    /// Empties the ring buffer.
    pub fn drain(&mut self) -> Result<(), NodeError> {
        let records = self.probes.drain()?;
        self.evidence.absorb(&records);
        Ok(())
    }

    /// Waits until packets under way have arrived: no new journey for a few looks in a row.
    pub async fn settle(&mut self) -> Result<(), NodeError> {
        let mut quiet = 0;
        let mut last = self.probes.stats()?.journeys;
        // Bounded: conntrack or TCP timers could in principle keep a node busy for ever.
        for _ in 0..200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let now = self.probes.stats()?.journeys;
            quiet = if now == last { quiet + 1 } else { 0 };
            last = now;
            if quiet == 5 {
                break;
            }
        }
        self.drain()
    }

    /// Every histogram.
    pub fn times(&self) -> Result<Vec<Times>, NodeError> {
        Ok(self.probes.times()?)
    }

    /// Did the probes see everything?
    ///
    /// # Errors
    ///
    /// Records that the ring buffer could not take: counted, but then flows cannot be judged.
    pub fn health(&self) -> Result<ProbeHealth, NodeError> {
        let stats = self.probes.stats()?;
        if stats.ring_lost > 0 {
            return Err(NodeError::LostRecords(stats.ring_lost));
        }
        Ok(ProbeHealth {
            links: u32::try_from(self.probes.links()).unwrap_or(u32::MAX),
            tracepoints: u32::try_from(self.probes.tracepoints()).unwrap_or(u32::MAX),
            journeys: stats.journeys,
            transmitted: stats.transmitted,
            delivered_locally: stats.delivered,
            dropped: stats.dropped,
            unfinished: stats
                .journeys
                .saturating_sub(stats.transmitted + stats.delivered + stats.dropped),
            ring_lost: stats.ring_lost,
            slot_collisions: stats.collisions,
            unpaired: stats.unpaired,
            other_packets: stats.other,
        })
    }
}

/// A flow of the laboratory in the recorder's words; times from `origin_ns`.
pub fn sent(flow: &FlowRecord, origin_ns: u64) -> Sent {
    Sent {
        path: flow.path,
        protocol: flow.protocol.number(),
        source: flow.source,
        destination: flow.destination,
        intended_ns: flow.intended_ns.saturating_sub(origin_ns),
        seen: seen(&flow.outcome),
    }
}

/// What a client saw.
pub fn seen(outcome: &Outcome) -> Seen {
    match outcome {
        Outcome::Delivered { .. } => Seen::Delivered,
        Outcome::Misdelivered { .. } => Seen::Misdelivered,
        Outcome::Refused => Seen::Refused,
        Outcome::Reset => Seen::Reset,
        Outcome::Timeout { .. } => Seen::Silence,
        Outcome::Unsent { .. } => Seen::Unsent(outcome.to_string()),
    }
}

/// One line of `svcpath doctor`.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was looked for.
    pub what: String,
    /// Is it there?
    pub available: bool,
    /// Does nothing work without it?
    pub needed: bool,
    /// What it is for, or how to get it.
    pub detail: String,
    /// What is lost without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub without: Option<&'static str>,
}

impl Check {
    /// What a trial said.
    fn new<E: fmt::Display>(
        what: impl Into<String>,
        needed: bool,
        without: Option<&'static str>,
        trial: Result<String, E>,
    ) -> Self {
        Self {
            what: what.into(),
            available: trial.is_ok(),
            needed,
            detail: trial.unwrap_or_else(|error| error.to_string()),
            without,
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.available { "yes" } else { "no " };
        write!(f, "{mark}  {:<28} {}", self.what, self.detail)?;
        match self.without {
            Some(without) if !self.available => write!(f, "; without it {without}"),
            _ => Ok(()),
        }
    }
}

/// What this kernel can do, found out by trying in a namespace of our own.
pub fn examine() -> Vec<Check> {
    let btf = Btf::vmlinux().map(|_| "field offsets".to_owned());
    let mut checks = vec![Check::new("BTF", true, None, btf)];
    checks.extend(examine_tracepoints());
    checks.extend(examine_tiers());
    checks.push(check_of_changes());
    for tool in LAB_TOOLS {
        let found = tool::find(tool).map(|()| "builds the laboratory".to_owned());
        checks.push(Check::new(tool, true, None, found));
    }
    for mode in Mode::ALL {
        let found = require_mode(mode).map(|()| format!("with {}", tools_of(mode).join(", ")));
        checks.push(Check::new(mode.name(), false, None, found));
    }
    checks
}

fn examine_tracepoints() -> impl Iterator<Item = Check> {
    catalogue::TRACEPOINTS.iter().map(|tracepoint| {
        let found = trial::tracepoint(tracepoint.name).map(|()| "attaches".to_owned());
        let what = format!("tracepoint {}", tracepoint.name);
        Check::new(what, true, Some(tracepoint.without), found)
    })
}

/// Attaches each tier to a namespace of our own. One of them is enough to trace; the laboratory measures with
/// the first.
fn examine_tiers() -> Vec<Check> {
    // One target a family: probes are attached only for families that have something to watch.
    let watch = Watch {
        targets: [
            IpAddr::from(Ipv4Addr::LOCALHOST),
            IpAddr::from(Ipv6Addr::LOCALHOST),
        ]
        .map(|address| (SocketAddr::new(address, 80), 6, Target::ClusterIp))
        .into(),
        detail: Detail::Functions,
        ..Watch::default()
    };
    let attach = |tier| {
        let node = Netns::create("doctor").map_err(ProbeError::from)?;
        Probes::attach(Some(tier), &node, &watch)
    };
    let (hooks, functions) = (attach(Tier::Hooks), attach(Tier::Functions));
    let components = functions.as_ref().map_or_else(|_| vec![], components_of);
    let none = hooks.is_err() && functions.is_err();
    let hooks = hooks.map(|probes| {
        let links = probes.links() / watch.targets.len();
        format!("{links} netfilter links a family attach")
    });
    let functions = functions
        .map(|probes| format!("{} programs at functions attach", probes.links()))
        .map_err(|error| error.to_string());
    let mut checks = vec![
        Check::new("hooks tier", none, Some(WITHOUT_HOOKS), hooks),
        Check::new("functions tier", none, Some(WITHOUT_FUNCTIONS), functions),
    ];
    checks.extend(components);
    checks
}

/// What each tier is for.
const WITHOUT_HOOKS: &str = "bench and fault do not work, and trace uses the functions tier (it needs kernel 6.4, \
    CONFIG_NETFILTER_BPF_LINK)";
const WITHOUT_FUNCTIONS: &str = "trace needs the hooks tier, which counts the confirmation of entries as egress (it needs kernel 5.17)";

/// What the functions tier meets here, and what it does not.
fn components_of(probes: &Probes) -> Vec<Check> {
    let check = |name, functions, since, without| {
        let missing = |missing: &&Missing| missing.name == name;
        let found = match probes.missing().iter().find(missing) {
            Some(missing) => Err(format!("{} (known from {since} on)", missing.why)),
            None => Ok(functions_of(probes, functions)),
        };
        let what = format!("functions: {name}");
        Check::new(what, false, Some(without), found)
    };
    let components = catalogue::COMPONENTS.iter();
    let components = components.map(|one| check(one.name, one.functions, one.since, one.without));
    let tellers = catalogue::TELLERS.iter();
    let tellers = tellers.map(|one| check(one.name, one.functions, one.since, one.without));
    components.chain(tellers).collect()
}

/// `ipt_do_table (ip_tables)`, as attached.
fn functions_of(probes: &Probes, functions: &[(&str, &str)]) -> String {
    let of_component = |probed: &&Probed| {
        let mut functions = functions.iter();
        functions.any(|(_, name)| *name == probed.function)
    };
    let found = probes.probed().iter().filter(of_component);
    let named = found.map(|probed| match probed.module {
        Some(module) => format!("{} ({module})", probed.function),
        None => probed.function.to_owned(),
    });
    named.collect::<Vec<_>>().join(", ")
}

/// How `svcpath trace` hears of rule changes here.
fn check_of_changes() -> Check {
    let probes = Netns::create("doctor")
        .map_err(|error| error.to_string())
        .and_then(|node| RuleChangeProbes::attach(&node).map_err(|error| error.to_string()));
    let heard = probes.map(|probes| format!("heard at {}", probes.way().title()));
    Check::new("rule changes", false, Some(WITHOUT_CHANGES), heard)
}

/// What is lost without probes on requests.
const WITHOUT_CHANGES: &str =
    "only what the kernel announces is heard: transactions of nf_tables and addresses";

/// What the laboratory itself is built with.
const LAB_TOOLS: [&str; 2] = ["ip", "nft"];

/// The programs that put a mode's rules in; those of IPv6 come in the same packages.
const fn tools_of(mode: Mode) -> &'static [&'static str] {
    match mode {
        Mode::IptablesLegacy => &["iptables-legacy-restore"],
        Mode::IptablesNft => &["iptables-nft-restore"],
        Mode::Ipvs => &["ipvsadm", "ipset", "iptables-nft-restore"],
        Mode::Nftables => &["nft"],
    }
}

/// Can these modes be measured here? Everything that can be known before anything is built.
pub fn require(modes: &[Mode]) -> Result<(), NodeError> {
    if Tier::of_this_kernel()? != Tier::Hooks {
        return Err(NodeError::Lacks {
            kernel: crate::kernel::release(),
            what: "netfilter BPF links",
            remedy: "use one from 6.4 on with CONFIG_NETFILTER_BPF_LINK=y, or measure in a VM \
                     (`cargo xtask run --place vm`)",
        });
    }
    for tool in LAB_TOOLS {
        tool::find(tool)?;
    }
    modes.iter().try_for_each(|mode| require_mode(*mode))
}

/// Can the mode's rules be put in? IPVS needs `ip_vs`, `ip_set` and dummy links.
fn require_mode(mode: Mode) -> Result<(), NodeError> {
    if mode == Mode::Ipvs && !crate::kernel::has_ipvs() {
        return Err(NodeError::Lacks {
            kernel: crate::kernel::release(),
            what: "IPVS",
            remedy: "choose other modes with --modes, or measure in a VM \
                     (`cargo xtask run --place vm`)",
        });
    }
    for tool in tools_of(mode) {
        tool::find(tool)?;
    }
    Ok(())
}
