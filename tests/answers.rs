//! The same prepared packets, traced with each tier that a kernel has; what is told of them in one form, which
//! [`crate::agreement`] compares between kernels and tiers. Nothing in it depends on time or chance: Services
//! have one endpoint, clients fixed ports, which are not told.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path as FilePath, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};
use tracer::kernel::netns::Netns;
use tracer::kernel::{self, sysctl, tool};
use tracer::lab::plan;
use tracer::probe::catalogue::{self, Detail};
use tracer::probe::tier::{Probes, Tier, Watch};
use tracer::rules::Mode;
use tracer::scenario::node::TestNode;
use tracer::trace::journey::{End, Journey};
use tracer::trace::session::{Event, Options, Session};
use tracer::trace::verdict::Verdict;
use tracer_ebpf::path::{Origin, Path, Target};
use tracer_ebpf::record::{STAGE_NODE, hook, protocol};

use crate::{truth, verdicts};

/// The directory that answers are left in; without it they are only looked at.
pub const DIRECTORY: &str = "SVCPATH_ANSWERS";
/// The form of a file of answers.
pub const FORMAT: &str = "svcpath.answers/1";

/// How long TCP clients wait: longer than an endpoint needs, and too short for a second SYN.
const CLIENTS_WAIT: Duration = Duration::from_millis(100);
/// A flow that nobody answered is unanswered at a session's end when it is older than a second.
const UNANSWERED_AFTER: Duration = Duration::from_millis(1200);

/// An answer to a question about a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Answer {
    /// What is told.
    Known(String),
    /// Nothing can be told.
    Unknown {
        /// Why.
        unknown: Unknown,
    },
}

/// Everything that a tier cannot tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unknown {
    /// What a packet meets within a component, and what of it drops the packet.
    WithinComponents,
    /// The way as another tier divides it.
    OtherDivision,
    /// A hook that the kernel does not call, as nothing is registered there.
    HookNotCalled,
    /// A component that is not there, at a hook that the kernel calls: its stage is part of the one before.
    ComponentNotThere,
    /// Either of the two, where the kernel does not list what is registered at its hooks.
    HooksNotListed,
}

impl Unknown {
    /// One word for it, as [`Serialize`] writes it too.
    pub const fn word(self) -> &'static str {
        match self {
            Self::WithinComponents => "within-components",
            Self::OtherDivision => "other-division",
            Self::HookNotCalled => "hook-not-called",
            Self::ComponentNotThere => "component-not-there",
            Self::HooksNotListed => "hooks-not-listed",
        }
    }

    /// May a tier say so?
    pub const fn is_of(self, tier: Tier) -> bool {
        match self {
            Self::WithinComponents => matches!(tier, Tier::Hooks),
            Self::OtherDivision => true,
            Self::HookNotCalled | Self::ComponentNotThere | Self::HooksNotListed => {
                matches!(tier, Tier::Functions)
            }
        }
    }

    /// Why.
    pub const fn why(self) -> &'static str {
        match self {
            Self::WithinComponents => {
                "the hooks tier sees components, not which table, chain or scheduler of IPVS a packet meets in them"
            }
            Self::OtherDivision => {
                "each tier divides a way by what it sees: a whole way is compared with that of the same tier only"
            }
            Self::HookNotCalled => {
                "the functions tier sees no hook at which nothing is registered: the kernel does not call it"
            }
            Self::ComponentNotThere => {
                "the functions tier sees no component that is not there: nothing is called, no stage begins"
            }
            Self::HooksNotListed => {
                "as the two above, on a kernel that does not list what is registered (CONFIG_NETFILTER_NETLINK_HOOK)"
            }
        }
    }
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

impl From<Unknown> for Answer {
    fn from(unknown: Unknown) -> Self {
        Self::Unknown { unknown }
    }
}

/// The answers to each question about one packet.
pub type Answers = BTreeMap<String, Answer>;

/// What one kernel told with one tier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Told {
    /// [`FORMAT`].
    pub format: String,
    /// The kernel's release.
    pub kernel: String,
    /// The tier's name.
    pub tier: String,
    /// By mode and packet.
    pub modes: BTreeMap<String, BTreeMap<String, Answers>>,
}

impl Told {
    /// How many answers there are, and how many of them are unknown.
    pub fn count(&self) -> (usize, BTreeMap<Unknown, usize>) {
        let mut unknown = BTreeMap::new();
        let packets = self.modes.values().flat_map(BTreeMap::values);
        let answers: Vec<&Answer> = packets.flat_map(BTreeMap::values).collect();
        for answer in &answers {
            if let Answer::Unknown { unknown: why } = answer {
                *unknown.entry(*why).or_default() += 1;
            }
        }
        (answers.len(), unknown)
    }

    /// The file that it is kept in.
    fn path(&self, directory: &FilePath) -> PathBuf {
        directory.join(format!("{}-{}.json", self.kernel, self.tier))
    }
}

/// Traces the same packets in each mode with each tier that this kernel has, and leaves what is told in
/// [`DIRECTORY`]. The tiers that were had.
pub fn answers_are_told(modes: &[Mode]) -> Vec<Tier> {
    let tiers: Vec<Tier> = Tier::ALL
        .into_iter()
        .filter(|tier| is_there(*tier))
        .collect();
    let usual = Tier::of_this_kernel().expect("BTF");
    assert!(tiers.contains(&usual), "no {usual} tier, but {tiers:?}");
    let mut told: Vec<Told> = tiers
        .iter()
        .map(|tier| Told {
            format: FORMAT.to_owned(),
            kernel: kernel::release(),
            tier: tier.name().to_owned(),
            modes: BTreeMap::new(),
        })
        .collect();
    for mode in modes {
        let node = verdicts::prepare(*mode);
        let lab = &node.lab;
        for netns in [lab.node(), lab.node2()]
            .into_iter()
            .chain(lab.server_pods())
        {
            // No ICMP error is left out because others were sent just before.
            sysctl::write(netns, "net/ipv4/icmp_ratemask", "0").expect("is set");
        }
        for (round, (tier, told)) in tiers.iter().zip(&mut told).enumerate() {
            let packets = trace(&node, *tier, round);
            assert_eq!(packets.len(), packets_of(&node).count(), "{mode} {tier}");
            told.modes.insert(mode.name().to_owned(), packets);
        }
    }
    let directory = std::env::var_os(DIRECTORY).map(PathBuf::from);
    for told in &told {
        let (answers, unknown) = told.count();
        println!(
            "{} {}: {answers} answers, unknown: {unknown:?}",
            told.kernel, told.tier
        );
        assert!(answers > 1000, "{answers}");
        if let Some(directory) = &directory {
            let text = serde_json::to_vec_pretty(told).expect("plain data");
            std::fs::write(told.path(directory), text).expect("is kept");
        }
    }
    tiers
}

/// Can the tier be attached here? Only its own refusal counts: that kernels answer alike is for the comparison.
fn is_there(tier: Tier) -> bool {
    let node = Netns::create("answers").expect("root");
    let watch = Watch {
        targets: vec![("10.96.0.1:80".parse().expect("one"), 6, Target::ClusterIp)],
        ..Watch::default()
    };
    match Probes::attach(Some(tier), &node, &watch) {
        Ok(_) => true,
        Err(error) => {
            println!("{} has no {tier} tier: {error}", kernel::release());
            false
        }
    }
}

/// A packet that is sent: who asks for which Service, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    path: Path,
    service: usize,
}

/// Each Service by each path.
fn packets_of(node: &TestNode) -> impl Iterator<Item = Packet> {
    let services = node.cluster.services.len();
    let to_services = |path: &Path| matches!(path.target, Target::ClusterIp | Target::NodePort);
    let paths = Path::ALL.into_iter().filter(to_services);
    paths.flat_map(move |path| (0..services).map(move |service| Packet { path, service }))
}

impl Packet {
    fn number(self, node: &TestNode) -> u8 {
        node.cluster.services[self.service].ports[0]
            .protocol
            .number()
    }

    fn title(self, node: &TestNode) -> String {
        let name = &node.cluster.services[self.service].name;
        format!(
            "{} {name} {}",
            self.path.title(),
            protocol_name(self.number(node))
        )
    }

    fn destination(self, node: &TestNode) -> SocketAddr {
        let port = &node.cluster.services[self.service].ports[0];
        match self.path.target {
            Target::NodePort => SocketAddr::new(
                plan::NODE_ADDRESS.base,
                port.node_port.expect("the plan gives every Service one"),
            ),
            _ => node.vip(self.service),
        }
    }

    /// Sends it from this port; its socket, so that an answer finds one.
    fn send(self, node: &TestNode, port: u16) -> Socket {
        let lab = &node.lab;
        let from = match self.path.origin {
            Origin::Pod => lab.client_pod(),
            Origin::Host => lab.node(),
            Origin::External => lab.external(),
        };
        let (to, number) = (self.destination(node), self.number(node));
        let send = move || {
            let (kind, by) = match number {
                protocol::TCP => (Type::STREAM, Protocol::TCP),
                _ => (Type::DGRAM, Protocol::UDP),
            };
            let socket = Socket::new(Domain::IPV4, kind, Some(by)).expect("opens");
            socket.set_nonblocking(true).expect("is set");
            let here = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
            socket.bind(&here.into()).expect("the port is free");
            // What becomes of it is what the probes are asked.
            if number == protocol::TCP {
                let _ = socket.connect(&to.into());
            } else {
                let _ = socket.send_to(b"1 x\n", &to.into());
            }
            socket
        };
        from.run(send).expect("enters")
    }
}

fn protocol_name(number: u8) -> &'static str {
    match number {
        protocol::TCP => "TCP",
        protocol::UDP => "UDP",
        _ => "another protocol",
    }
}

/// Sends every packet once, and waits until it can be known what became of each; by the clients' ports. Each round
/// has its own, whose connections conntrack does not know yet.
fn send(node: &TestNode, round: usize) -> Vec<(u16, Packet)> {
    let packets: Vec<Packet> = packets_of(node).collect();
    let first = usize::from(*plan::SOURCE_PORTS.start()) + round * packets.len();
    let ports = (first..).map(|port| u16::try_from(port).expect("a port"));
    let sent: Vec<(u16, Packet)> = ports.zip(packets).collect();
    let sockets = sent.iter().map(|(port, packet)| {
        let socket = packet.send(node, *port);
        (packet.number(node), socket)
    });
    let mut sockets: Vec<(u8, Socket)> = sockets.collect();
    let begin = Instant::now();
    std::thread::sleep(CLIENTS_WAIT);
    sockets.retain(|(number, _)| *number != protocol::TCP);
    std::thread::sleep(UNANSWERED_AFTER.saturating_sub(begin.elapsed()));
    sent
}

/// Sends every packet under a session with this tier: what it tells of each.
fn trace(node: &TestNode, tier: Tier, round: usize) -> BTreeMap<String, Answers> {
    let registered = registered_at(tier, node.lab.node());
    let options = Options {
        tier: Some(tier),
        detail: match tier {
            Tier::Hooks => Detail::Stages,
            Tier::Functions => Detail::Functions,
        },
        pod_cidrs: vec![plan::NODE_POD_CIDR],
        ..Options::default()
    };
    let session = Session::start(node.lab.node(), options).expect("attaches");
    let sent = send(node, round);
    let (events, summary) = session.finish().expect("ends");
    truth::assert_nothing_was_missed(&summary);
    let verdicts: HashMap<(u8, u16), Verdict> = events
        .iter()
        .filter_map(|event| match event {
            // A later one corrects it.
            Event::Verdict(one) => Some(((one.protocol, one.source.port()), one.verdict.clone())),
            _ => None,
        })
        .collect();
    let mut journeys: HashMap<(u8, u16), Vec<Journey>> = HashMap::new();
    for journey in truth::journeys(events).filter(|journey| journey.first != Some(false)) {
        let key = (journey.protocol, journey.source.port());
        journeys.entry(key).or_default().push(journey);
    }
    let sight = match registered {
        None => Sight::All,
        Some(stages) if stages.is_empty() => Sight::seen_by(journeys.values().flatten()),
        Some(stages) => Sight::Registered(stages),
    };
    sent.iter()
        .map(|(port, packet)| {
            let title = packet.title(node);
            let key = (packet.number(node), *port);
            let journeys = journeys
                .get(&key)
                .unwrap_or_else(|| panic!("{tier}: nothing is told of {title}\n{summary}"));
            let verdict = verdicts
                .get(&key)
                .unwrap_or_else(|| panic!("{tier}: no verdict on {title}\n{summary}"));
            (title, answers(tier, journeys, verdict, &sight))
        })
        .collect()
}

/// What is told of one packet. A packet that came once more, as a client waited too long, and met the same is not
/// told again.
fn answers(tier: Tier, journeys: &[Journey], verdict: &Verdict, sight: &Sight) -> Answers {
    let mut different: Vec<Answers> = Vec::new();
    for journey in journeys {
        let answers = answers_of_journey(tier, journey, sight);
        if !different.contains(&answers) {
            different.push(answers);
        }
    }
    let mut answers: Answers = (1..)
        .zip(&different)
        .flat_map(|(number, answers)| {
            let answers = answers.iter();
            answers.map(move |(question, answer)| {
                (format!("journey {number}: {question}"), answer.clone())
            })
        })
        .collect();
    let known = [
        ("journeys", different.len().to_string()),
        ("verdict", verdict_without_dropper(verdict).to_string()),
    ];
    answers.extend(known.map(|(question, answer)| (question.to_owned(), Answer::Known(answer))));
    answers
}

fn answers_of_journey(tier: Tier, journey: &Journey, sight: &Sight) -> Answers {
    let known = [
        ("service", journey.service.clone()),
        ("protocol", protocol_name(journey.protocol).to_owned()),
        ("path", journey.path.to_owned()),
        ("destination", journey.destination.to_string()),
        ("end", end_without_dropper(&journey.end).to_string()),
        ("rewritten to", rewritten(journey)),
        ("masqueraded as", masqueraded(journey)),
    ];
    let known = known.map(|(question, answer)| (question.to_owned(), Answer::Known(answer)));
    let within = [
        ("met".to_owned(), met(tier, journey)),
        ("dropped by".to_owned(), dropper(tier, journey)),
    ];
    let ways = Tier::ALL.map(|of| {
        let way = if of == tier {
            Answer::Known(way(journey))
        } else {
            Unknown::OtherDivision.into()
        };
        (format!("way by {of}"), way)
    });
    let all = known.into_iter().chain(within).chain(ways);
    all.chain(stages(journey, sight)).collect()
}

/// Only one tier knows by what.
fn verdict_without_dropper(verdict: &Verdict) -> Verdict {
    match verdict.clone() {
        Verdict::Dropped { reason, stage, .. } => Verdict::Dropped {
            reason,
            stage,
            by: None,
        },
        other => other,
    }
}

fn end_without_dropper(end: &End) -> End {
    match end.clone() {
        End::Dropped { reason, stage, .. } => End::Dropped {
            reason,
            stage,
            by: None,
        },
        other => other,
    }
}

fn rewritten(journey: &Journey) -> String {
    match journey.headed {
        None => "unreadable".to_owned(),
        Some(headed) if headed == journey.destination => "not rewritten".to_owned(),
        Some(headed) => headed.to_string(),
    }
}

/// The new source without its port, which is anyone's guess.
fn masqueraded(journey: &Journey) -> String {
    match journey.source_after {
        None => "unreadable".to_owned(),
        Some(after) if after.ip() == journey.source.ip() => "not masqueraded".to_owned(),
        Some(after) => after.ip().to_string(),
    }
}

fn met(tier: Tier, journey: &Journey) -> Answer {
    if tier == Tier::Hooks {
        return Unknown::WithinComponents.into();
    }
    let lines = journey.met.iter();
    let lines = lines.map(|met| format!("{} {}: {met}", met.hook, met.stage));
    Answer::Known(lines.collect::<Vec<_>>().join("; "))
}

fn dropper(tier: Tier, journey: &Journey) -> Answer {
    match &journey.end {
        End::Dropped { .. } if tier == Tier::Hooks => Unknown::WithinComponents.into(),
        End::Dropped { by: Some(by), .. } => Answer::Known(by.clone()),
        End::Dropped { by: None, .. } => Answer::Known("no table or chain".to_owned()),
        _ => Answer::Known("not dropped".to_owned()),
    }
}

/// The stages that were passed, in order.
fn way(journey: &Journey) -> String {
    let stages = journey.stages.iter();
    let names: Vec<String> = stages
        .map(|one| format!("{} {}", one.hook, one.stage))
        .collect();
    names.join(", ")
}

/// Was each stage that there is passed?
fn stages(journey: &Journey, sight: &Sight) -> impl Iterator<Item = (String, Answer)> {
    let named = |stage| catalogue::stage_name(stage, Detail::Stages);
    let all = catalogue::stages().filter(|stage| *stage != STAGE_NODE);
    all.map(named).map(move |(hook, stage)| {
        let mut passed = journey.stages.iter();
        let answer = if passed.any(|one| (one.hook, one.stage) == (hook, stage)) {
            Answer::Known("passed".to_owned())
        } else if let Some(why) = sight.hides(hook, stage) {
            why.into()
        } else {
            Answer::Known("not passed".to_owned())
        };
        (format!("{hook} {stage}"), answer)
    })
}

/// Hooks and stages.
type Stages = BTreeSet<(&'static str, &'static str)>;

/// Which stages can be seen.
#[derive(Debug)]
enum Sight {
    /// All: probes stand at every boundary.
    All,
    /// Those of what the kernel calls at its hooks, as it lists it.
    Registered(Stages),
    /// Those that some packet was seen to pass, which proves that the component is there: the kernel lists none.
    Seen(Stages),
}

impl Sight {
    fn seen_by<'a>(journeys: impl Iterator<Item = &'a Journey>) -> Self {
        let stages = journeys.flat_map(|journey| &journey.stages);
        Self::Seen(stages.map(|one| (outer(one.hook), one.stage)).collect())
    }

    /// Why a stage may have been passed unseen.
    fn hides(&self, hook: &str, stage: &str) -> Option<Unknown> {
        let (stages, no_hook, no_component) = match self {
            Self::All => return None,
            Self::Registered(stages) => {
                (stages, Unknown::HookNotCalled, Unknown::ComponentNotThere)
            }
            Self::Seen(stages) => (stages, Unknown::HooksNotListed, Unknown::HooksNotListed),
        };
        let hook = outer(hook);
        let mut hooks = HOOKS.iter();
        if !hooks.any(|(_, number)| catalogue::hook_name(*number) == hook) {
            // Where it is received, all packets are seen.
            return None;
        }
        if !stages.iter().any(|(at, _)| *at == hook) {
            return Some(no_hook);
        }
        let seen = is_edge(hook, stage) || stages.contains(&(hook, stage));
        (!seen).then_some(no_component)
    }
}

/// IPVS calls a hook once more; what is registered there is the same.
fn outer(hook: &str) -> &str {
    hook.trim_end_matches("-ipvs")
}

/// What the kernel calls at its hooks, as it lists it; nothing if it does not (`CONFIG_NETFILTER_NETLINK_HOOK`), as
/// a node with rules has something there. To be asked before probes are attached, which are registered too. `None`
/// if it does not matter to the tier.
fn registered_at(tier: Tier, netns: &Netns) -> Option<Stages> {
    let list = || tool::run(netns, "nft", &["list", "hooks", "ip"], "").expect("nft runs");
    (tier == Tier::Functions).then(|| registered(&list()))
}

/// Hook and stage of what `nft list hooks` names.
fn registered(listing: &str) -> Stages {
    let mut stages = BTreeSet::new();
    let mut at = None;
    for line in listing.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("hook"), Some(name)) => at = hook_number(name),
            (Some(priority), Some(_)) => {
                if let (Some(hook), Ok(priority)) = (at, priority.parse()) {
                    stages.insert(stage_of(hook, priority));
                }
            }
            _ => {}
        }
    }
    stages
}

/// The hooks of the IP families, as nft calls them.
const HOOKS: [(&str, u32); 5] = [
    ("prerouting", hook::PREROUTING),
    ("input", hook::INPUT),
    ("forward", hook::FORWARD),
    ("output", hook::OUTPUT),
    ("postrouting", hook::POSTROUTING),
];

fn hook_number(name: &str) -> Option<u32> {
    let mut hooks = HOOKS.iter();
    hooks
        .find(|(known, _)| *known == name)
        .map(|(_, number)| *number)
}

/// The stage that a component at this priority belongs to; confirmation, which is the last of all, to the helpers.
fn stage_of(hook: u32, priority: i32) -> (&'static str, &'static str) {
    const HELPERS: i32 = 300;
    let stage = catalogue::stage_at(hook, priority.min(HELPERS));
    let boundary = catalogue::ALL[stage];
    (catalogue::hook_name(hook), boundary.stage)
}

/// Is it the first or last stage of its hook? These begin with the hook and with its end.
fn is_edge(hook: &str, stage: &str) -> bool {
    let mut of_hook = catalogue::ALL
        .iter()
        .filter(|boundary| catalogue::hook_name(boundary.hook) == hook)
        .map(|boundary| boundary.stage);
    let (first, last) = (of_hook.next(), of_hook.next_back());
    first == Some(stage) || last == Some(stage)
}

/// Everything that was left in the directory, by file name.
pub fn left_in(directory: &FilePath) -> Vec<Told> {
    let entries = std::fs::read_dir(directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.expect("is listed").path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "json")
        })
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| {
            let text = std::fs::read(path).expect("readable");
            let told: Told = serde_json::from_slice(&text)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert_eq!(told.format, FORMAT, "{}", path.display());
            told
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = "\
family ip {
	hook prerouting {
		-0000000200 ipv4_conntrack_in [nf_conntrack]
		-0000000100 nf_nat_ipv4_pre_routing [nf_nat]
	}
	hook postrouting {
		+0000000100 nf_nat_ipv4_out [nf_nat]
		+2147483647 nf_confirm [nf_conntrack]
	}
}
";

    #[test]
    fn what_is_registered_can_be_seen() {
        let sight = Sight::Registered(registered(LISTING));
        let hides = |hook, stage| sight.hides(hook, stage);
        for (hook, stage) in [
            ("PREROUTING", "raw"),
            ("PREROUTING", "conntrack"),
            ("PREROUTING", "dnat"),
            ("PREROUTING", "routing"),
            ("POSTROUTING", "snat"),
            ("POSTROUTING", "helper"),
            ("POSTROUTING", "egress"),
            ("-", "receive"),
        ] {
            assert_eq!(hides(hook, stage), None, "{hook} {stage}");
        }
        let not_there = Some(Unknown::ComponentNotThere);
        assert_eq!(hides("PREROUTING", "pre-dnat"), not_there);
        for hook in ["OUTPUT", "OUTPUT-ipvs", "FORWARD"] {
            assert_eq!(hides(hook, "mangle"), Some(Unknown::HookNotCalled));
        }
        assert_eq!(Sight::All.hides("OUTPUT", "mangle"), None);
        let seen = Sight::Seen([("OUTPUT", "dnat")].into());
        let not_listed = Some(Unknown::HooksNotListed);
        for (hook, stage, why) in [
            ("OUTPUT", "dnat", None),
            ("OUTPUT-ipvs", "filter", None),
            ("OUTPUT", "mangle", not_listed),
            ("INPUT", "deliver", not_listed),
        ] {
            assert_eq!(seen.hides(hook, stage), why, "{hook} {stage}");
        }
    }
}
