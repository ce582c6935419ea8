//! `svcpath rules walk`.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use clap::ValueEnum;
use serde_json::json;
use tracer::cluster::{Cluster, Family, Protocol};
use tracer::rules::dump::Texts;
use tracer::rules::oracle::Rules;
use tracer::rules::services;
use tracer::rules::walk::{Action, Fate, Origin, Outcome, Packet, Place, State, Visited};
use tracer::rules::{Mode, render};

use super::super::exit::{self, Usage};
use super::{Flags, ModeArg, Output, live, read_cluster};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    svcpath rules walk --live --from 10.244.0.7 --to 10.96.0.10:53/udp\n  \
    svcpath rules walk --dump /var/tmp/dump --from 192.0.2.7 --to 10.0.2.15:30080 --output json\n  \
    svcpath rules walk --cluster cluster.json --node worker-0 --mode nftables \\\n      \
    --cluster-cidr 10.244.0.0/16 --from 10.244.0.7 --to '[fd00:10:96::a]:80'")]
pub(super) struct Args {
    /// The rules that this cluster calls for: what
    /// `kubectl get services,endpointslices,nodes,servicecidrs -A -o json` printed.
    #[arg(long, value_name = "FILE", requires_all = ["node", "mode"])]
    cluster: Option<PathBuf>,
    /// The rules in this folder of dumps.
    #[arg(long, value_name = "DIR", conflicts_with = "cluster")]
    dump: Option<PathBuf>,
    /// The rules of this node, now. Needs root, changes nothing.
    #[arg(long, conflicts_with_all = ["cluster", "dump"])]
    live: bool,
    /// The node's name, with --cluster.
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// kube-proxy's mode, with --cluster.
    #[arg(long, value_enum)]
    mode: Option<ModeArg>,
    #[command(flatten)]
    flags: Flags,
    /// Who sends: ADDR, ADDR:PORT, `[ADDR6]:PORT`.
    #[arg(long, value_name = "ADDR[:PORT]")]
    from: From,
    /// To whom: ADDR:PORT/PROTO; PROTO is tcp (if left out), udp or sctp.
    #[arg(long, value_name = "ADDR:PORT/PROTO")]
    to: To,
    /// The link that the packet arrives on.
    #[arg(long = "in", value_name = "IFACE")]
    link: Option<String>,
    /// How the packet comes to the node; default: from the node itself if --from is one of its
    /// addresses and --in is not given.
    #[arg(long, value_enum)]
    path: Option<Path>,
    /// What conntrack says of the packet.
    #[arg(long, value_enum, default_value = "new")]
    state: StateArg,
    /// How to show the ways.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

/// How traffic enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Path {
    /// A pod on this node sends it.
    PodToClusterip,
    /// A process on the node sends it.
    HostToClusterip,
    /// It comes from outside to an address of the node.
    ExternalToNodeport,
    /// A pod on this node sends it to a NodePort, at an address of the node.
    PodToNodeport,
    /// A pod sends it to a Service that it is an endpoint of.
    Hairpin,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum StateArg {
    /// The first packet of a flow.
    New,
    /// A later one: its translation is in its conntrack entry.
    Established,
    /// One that belongs to no flow.
    Invalid,
}

/// `ADDR` or `ADDR:PORT`.
#[derive(Clone, Copy, Debug)]
struct From(IpAddr, Option<u16>);

impl FromStr for From {
    type Err = Usage;

    fn from_str(s: &str) -> Result<Self, Usage> {
        if let Ok(address) = s.parse() {
            return Ok(Self(address, None));
        }
        let socket: SocketAddr = s
            .parse()
            .map_err(|_| Usage(format!("'{s}' is no ADDR or ADDR:PORT")))?;
        Ok(Self(socket.ip(), Some(port(socket)?)))
    }
}

/// The port, which no packet has as 0.
fn port(socket: SocketAddr) -> Result<u16, Usage> {
    match socket.port() {
        0 => Err(Usage(format!("'{socket}' has port 0: use 1 to 65535"))),
        port => Ok(port),
    }
}

/// `ADDR:PORT/PROTO`.
#[derive(Clone, Copy, Debug)]
struct To(SocketAddr, Protocol);

impl FromStr for To {
    type Err = Usage;

    fn from_str(s: &str) -> Result<Self, Usage> {
        let (socket, protocol) = s.split_once('/').unwrap_or((s, "tcp"));
        let protocol = Protocol::ALL
            .into_iter()
            .find(|known| known.name().eq_ignore_ascii_case(protocol))
            .ok_or_else(|| Usage(format!("'{protocol}' is no protocol: use tcp, udp or sctp")))?;
        let socket: SocketAddr = socket.parse().map_err(|_| {
            Usage(format!(
                "'{socket}' is no ADDR:PORT (IPv6: [ADDR]:PORT), such as 10.96.0.10:53/udp"
            ))
        })?;
        port(socket)?;
        Ok(Self(socket, protocol))
    }
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if Family::of(args.from.0) != Family::of(args.to.0.ip()) {
        return Err(Usage("--from and --to are of different IP families".to_owned()).into());
    }
    let family = Family::of(args.from.0);
    let mut sources = sources(args, family)?;
    sources.local.extend(&args.flags.node_address);
    if args.path.is_some_and(Path::is_to_node) {
        sources.local.insert(args.to.0.ip());
    }
    let rules = Rules::parse(&sources.texts, family)?;
    let mut place = rules.place(sources.local, sources.virtual_ips);
    place.node_ports = sources.node_ports;
    let packet = Packet {
        origin: origin(args, |address| place.is_local(address)),
        from: args.from.0,
        from_port: args.from.1,
        to: args.to.0.ip(),
        to_port: args.to.0.port(),
        protocol: args.to.1,
        state: match args.state {
            StateArg::New => State::New,
            StateArg::Established => State::Established,
            StateArg::Invalid => State::Invalid,
        },
    };
    let layers = rules.layers();
    let outcomes = layers.oracle(&place).walk(&packet);
    let mut warnings = sources.not_walked;
    warnings.extend(elsewhere(&packet, &place, &outcomes));
    warnings.extend(cut_short(&outcomes));
    for warning in &warnings {
        exit::say(&format!("warning: {warning}"));
    }
    let text = match args.output {
        Output::Json => {
            let answer = json!({
                "from": packet.from,
                "from_port": packet.from_port,
                "to": packet.to,
                "to_port": packet.to_port,
                "protocol": packet.protocol,
                "state": packet.state,
                "arrives": packet.origin != Origin::Node,
                "outcomes": outcomes.iter().map(shown).collect::<Result<Vec<_>, _>>()?,
                "warnings": warnings,
            });
            serde_json::to_string_pretty(&answer)? + "\n"
        }
        Output::Text => show(&packet, &outcomes),
    };
    exit::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

impl Path {
    /// Is the packet for an address of the node?
    fn is_to_node(self) -> bool {
        matches!(self, Self::ExternalToNodeport | Self::PodToNodeport)
    }
}

/// What a walk starts from.
struct Sources {
    texts: Texts,
    /// The Services' addresses.
    virtual_ips: HashSet<IpAddr>,
    /// The node's own.
    local: HashSet<IpAddr>,
    node_ports: HashSet<(Protocol, u16)>,
    /// A warning for each table that is left out.
    not_walked: Vec<String>,
}

impl Sources {
    /// What a node's rules say.
    fn read(texts: Texts, family: Family) -> anyhow::Result<Self> {
        let found = services::read(&texts)?;
        let tables = found.not_walked(&texts, family);
        let not_walked = tables
            .map(|table| format!("not walked: {table}, which can drop or translate packets too"))
            .collect();
        Ok(Self {
            virtual_ips: found.virtual_ips().collect(),
            local: HashSet::new(),
            node_ports: found.node_ports(family).collect(),
            not_walked,
            texts,
        })
    }
}

/// Every `NodePort` that a cluster's Services have in a family.
fn node_ports(cluster: &Cluster, family: Family) -> HashSet<(Protocol, u16)> {
    let services = cluster.services.iter().filter(|service| {
        let mut addresses = service.cluster_ips.iter();
        addresses.any(|address| Family::of(*address) == family)
    });
    services
        .flat_map(|service| &service.ports)
        .filter_map(|port| Some((port.protocol, port.node_port?)))
        .collect()
}

/// A warning if the packet is for a `NodePort`, and for the node only as far as its addresses are
/// known.
fn elsewhere(packet: &Packet, place: &Place, outcomes: &[Outcome<'_>]) -> Option<String> {
    let (to, port) = (packet.to, packet.to_port);
    let served = |outcome: &Outcome<'_>| matches!(outcome.fate, Fate::Endpoint { .. });
    let elsewhere = place.node_ports.contains(&(packet.protocol, port))
        && !place.is_local(to)
        && !place.virtual_ips.contains(&to)
        // nftables' rules can name the node's addresses themselves.
        && !outcomes.iter().all(served);
    elsewhere.then(|| {
        format!(
            "{to} is taken as another machine's: NodePort {port} is only served on the node's own \
             addresses; if {to} is one of them, give --node-address {to}"
        )
    })
}

/// A warning if there are more ways than were followed.
fn cut_short(outcomes: &[Outcome<'_>]) -> Option<String> {
    let mut steps = outcomes.iter().flat_map(|outcome| &outcome.steps);
    steps
        .any(|visited| visited.step.action == Action::Limit)
        .then(|| "limit reached: not every way that the packet can go was followed".to_owned())
}

/// An outcome with all of its keys, whatever it is.
fn shown(outcome: &Outcome<'_>) -> serde_json::Result<serde_json::Value> {
    let mut value = serde_json::to_value(outcome)?;
    if let Some(keys) = value.as_object_mut() {
        keys.entry("endpoint").or_insert(serde_json::Value::Null);
        // As its first packet was, which the rules do not tell.
        if outcome.fate == Fate::Tracked {
            keys.insert("masqueraded".to_owned(), serde_json::Value::Null);
        }
    }
    Ok(value)
}

fn sources(args: &Args, family: Family) -> anyhow::Result<Sources> {
    if let Some(file) = &args.cluster {
        let (Some(node), Some(mode)) = (&args.node, args.mode) else {
            return Err(Usage("--cluster needs --node and --mode".to_owned()).into());
        };
        let cluster = read_cluster(file)?;
        let view = args.flags.view(&cluster, node)?;
        return Ok(Sources {
            texts: Texts::rendered(&render(&cluster, &view, Mode::from(mode))),
            virtual_ips: cluster.virtual_ips().collect(),
            local: view.addresses.iter().copied().collect(),
            node_ports: node_ports(&cluster, family),
            not_walked: Vec::new(),
        });
    }
    if let Some(folder) = &args.dump {
        return Sources::read(Texts::read(folder)?, family);
    }
    if !args.live {
        let what = "say which rules: --cluster FILE with --node and --mode, --dump DIR, or --live";
        return Err(Usage(what.to_owned()).into());
    }
    Sources::read(live()?, family)
}

fn origin(args: &Args, is_local: impl Fn(IpAddr) -> bool) -> Origin {
    let from_node = match args.path {
        Some(path) => path == Path::HostToClusterip,
        None => args.link.is_none() && is_local(args.from.0),
    };
    if from_node {
        Origin::Node
    } else {
        Origin::Link(args.link.clone())
    }
}

fn show(packet: &Packet, outcomes: &[Outcome<'_>]) -> String {
    let mut text = String::new();
    let from = match packet.from_port {
        Some(port) => SocketAddr::new(packet.from, port).to_string(),
        None => packet.from.to_string(),
    };
    let arrives = match &packet.origin {
        Origin::Node => "sent by the node".to_owned(),
        Origin::Link(None) => "arrives on a link".to_owned(),
        Origin::Link(Some(link)) => format!("arrives on {link}"),
    };
    let to = SocketAddr::new(packet.to, packet.to_port);
    // Writing into a String cannot fail, here and below.
    let _ = writeln!(text, "{from} -> {to}/{} {arrives}", packet.protocol);
    let mut before: &[Visited<'_>] = &[];
    for outcome in outcomes {
        show_steps(&mut text, before, &outcome.steps);
        before = &outcome.steps;
        let masqueraded = match outcome {
            Outcome {
                fate: Fate::Tracked,
                ..
            } => "",
            Outcome {
                masqueraded: true, ..
            } => ", masqueraded",
            _ => ", not masqueraded",
        };
        let _ = writeln!(
            text,
            "  = {:.6} %  {}{masqueraded}",
            outcome.probability * 100.0,
            fate(&outcome.fate, to)
        );
    }
    text
}

/// The steps of a way; those that it shares with the way shown before it are only counted.
fn show_steps(text: &mut String, before: &[Visited<'_>], steps: &[Visited<'_>]) {
    let same = |(a, b): &(&Visited<'_>, &Visited<'_>)| a == b;
    let first = before.iter().zip(steps).take_while(same).count();
    let tails = before[first..]
        .iter()
        .rev()
        .zip(steps[first..].iter().rev());
    let last = tails.take_while(same).count();
    // Writing into a String cannot fail, here and below.
    if first > 0 {
        let _ = writeln!(text, "  the first {first} steps as above, then");
    }
    for visited in &steps[first..steps.len() - last] {
        let step = &visited.step;
        let _ = writeln!(
            text,
            "  {:<11}  {} {} rule {} ({} passed): {}",
            visited.hook,
            step.table,
            step.chain,
            step.rule,
            step.passed,
            action(&step.action)
        );
    }
    if last > 0 {
        let _ = writeln!(text, "  and the last {last} steps as above");
    }
}

fn action(action: &Action<'_>) -> String {
    match action {
        Action::Jump(chain) => format!("jump {chain}"),
        Action::Goto(chain) => format!("goto {chain}"),
        Action::Return => "return".to_owned(),
        Action::Accept => "accept".to_owned(),
        Action::Drop => "drop".to_owned(),
        Action::Reject => "reject".to_owned(),
        Action::Mark(mark) => format!("mark {mark:#x}"),
        Action::Masquerade => "masquerade".to_owned(),
        Action::Dnat(to) => format!("dnat to {to}"),
        Action::Schedule(to) => format!("real server {to}"),
        Action::Remember => "remember the source".to_owned(),
        Action::Nothing => "nothing".to_owned(),
        Action::Unknown(what) => format!("unknown: {what}; taken as not matching"),
        Action::Limit => "limit reached; taken as not matching".to_owned(),
        Action::End => "end of the chain".to_owned(),
    }
}

fn fate(fate: &Fate, to: SocketAddr) -> String {
    match fate {
        Fate::Endpoint { endpoint } => format!("endpoint {endpoint}"),
        Fate::Node => format!("taken in by the node itself, as {to}"),
        Fate::Forwarded => format!("sent on to {to}"),
        Fate::Tracked => "as its first packet was translated".to_owned(),
        Fate::Leaked => format!("leaked: leaves the node for {to}, untranslated"),
        Fate::Dropped { hook } => format!("dropped at {hook}"),
        Fate::Rejected { hook } => format!("rejected at {hook}"),
    }
}
