//! A packet's way through iptables' tables at one hook.
//!
//! Rules are asked as `ipt_do_table` of the kernel's `net/ipv4/netfilter/ip_tables.c` asks them,
//! and matches as their `xt_*.c` do. Three things are taken for granted: the packet's client is in
//! no list of `-m recent` yet, so that session affinity has no say; it comes and goes through no
//! bridge's port; and a rule that needs what cannot be known (a match or target that is not
//! modelled, the link that the packet will leave on, a set that was not read) does not match, which
//! a step of [`Action::Unknown`] says. Nor does one that leads to more ways than are followed:
//! [`Action::Limit`].

use std::net::{IpAddr, SocketAddr};

use super::rule::{
    AddrTypes, Chain, CtStates, Match, Not, Policy, PortSide, Ports, Recent, RecentAction, Rule,
    SetMatch, Table, Tables, Target, built_in_chains,
};
use crate::rules::ipvs::walk::SetTable;
use crate::rules::walk::{
    Action, Branch, Component, Hook, Layer, Nature, Passage, Place, State, Step, Walk,
};

/// The tables of one family, ready to be walked.
pub struct Chains<'t> {
    sets: &'t SetTable,
    components: Vec<Base<'t>>,
}

/// A built-in chain.
struct Base<'t> {
    hook: Hook,
    priority: i32,
    table: &'t Table<'t>,
    chain: &'t Chain<'t>,
}

/// Where built-in chains are asked, by `enum nf_ip_hook_priorities`; nat has two places.
fn priority(table: &str, hook: Hook) -> Option<i32> {
    match (table, hook) {
        ("raw", _) => Some(-300),
        ("mangle", _) => Some(-150),
        ("nat", Hook::Prerouting | Hook::Output) => Some(-100),
        ("filter", _) => Some(0),
        ("security", _) => Some(50),
        ("nat", _) => Some(100),
        _ => None,
    }
}

impl<'t> Chains<'t> {
    /// `sets` is what `-m set` looks packets up in.
    pub fn new(tables: &'t Tables<'t>, sets: &'t SetTable) -> Self {
        let mut components = Vec::new();
        for table in &tables.list {
            for hook in Hook::ALL {
                let name = hook.to_string();
                let base = built_in_chains(table.name).contains(&name.as_str());
                if let (true, Some(chain), Some(priority)) =
                    (base, table.chain(&name), priority(table.name, hook))
                {
                    components.push(Base {
                        hook,
                        priority,
                        table,
                        chain,
                    });
                }
            }
        }
        Self { sets, components }
    }
}

impl Layer for Chains<'_> {
    fn components(&self) -> Vec<Component> {
        let numbered = self.components.iter().enumerate();
        numbered
            .map(|(id, base)| Component {
                hook: base.hook,
                priority: base.priority,
                nature: if base.table.name == "nat" {
                    Nature::Nat
                } else {
                    Nature::Filter
                },
                id,
            })
            .collect()
    }

    fn evaluate<'a>(
        &'a self,
        component: usize,
        branch: Branch<'a>,
        place: &'a Place,
        walk: &mut Walk<'a>,
    ) {
        let Some(base) = self.components.get(component) else {
            walk.pass(branch, Passage::Accept);
            return;
        };
        Evaluation {
            base,
            sets: self.sets,
            place,
            walk,
            waiting: vec![Traveller {
                branch,
                frames: vec![Frame::start(base.chain)],
            }],
            splits: 0,
            jumps: 0,
        }
        .run();
    }
}

/// The most random choices and jumps that are followed at one hook: rules of hostile dumps can make
/// endlessly many.
const MOST: u32 = 1 << 17;

/// The most chains that wait for the end of another, as the kernel's jump stack has a bound.
const DEEPEST: usize = 128;

/// One branch, and where it is.
struct Traveller<'a> {
    branch: Branch<'a>,
    frames: Vec<Frame<'a>>,
}

/// One chain that a branch is in.
#[derive(Clone, Copy)]
struct Frame<'a> {
    chain: &'a Chain<'a>,
    /// The rule that is asked next.
    next: usize,
    /// Rules asked in vain since the last step here.
    passed: u32,
}

impl<'a> Frame<'a> {
    const fn start(chain: &'a Chain<'a>) -> Self {
        Self {
            chain,
            next: 0,
            passed: 0,
        }
    }
}

/// The answer of one match, or of all of a rule.
enum Answer<'a> {
    No,
    Yes,
    /// By chance, with this probability.
    Perhaps(f64),
    /// It depends on something that is not known.
    Unknown(&'a str),
}

impl Answer<'_> {
    const fn from(matches: bool) -> Self {
        if matches { Self::Yes } else { Self::No }
    }

    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::No, _) | (_, Self::No) => Self::No,
            (Self::Unknown(what), _) | (_, Self::Unknown(what)) => Self::Unknown(what),
            (Self::Perhaps(one), Self::Perhaps(other)) => Self::Perhaps(one * other),
            (Self::Perhaps(one), Self::Yes) | (Self::Yes, Self::Perhaps(one)) => Self::Perhaps(one),
            (Self::Yes, Self::Yes) => Self::Yes,
        }
    }
}

/// One packet at one built-in chain.
struct Evaluation<'e, 'a> {
    base: &'a Base<'a>,
    sets: &'a SetTable,
    place: &'a Place,
    walk: &'e mut Walk<'a>,
    /// Branches that are not at their end.
    waiting: Vec<Traveller<'a>>,
    splits: u32,
    jumps: u32,
}

/// Targets that change nothing that matters here, and let the packet go on to the next rule.
const GOES_ON: [&str; 15] = [
    "AUDIT",
    "CHECKSUM",
    "CLASSIFY",
    "DSCP",
    "ECN",
    "HL",
    "LOG",
    "NFLOG",
    "RATEEST",
    "TCPMSS",
    "TCPOPTSTRIP",
    "TEE",
    "TOS",
    "TRACE",
    "TTL",
];

impl<'a> Evaluation<'_, 'a> {
    fn run(mut self) {
        while let Some(traveller) = self.waiting.pop() {
            self.travel(traveller);
        }
    }

    /// Follows one branch to its end; what splits off on the way waits.
    fn travel(&mut self, mut traveller: Traveller<'a>) {
        loop {
            let depth = traveller.frames.len();
            let Some(frame) = traveller.frames.last_mut() else {
                let passage = match self.base.chain.policy {
                    Some(Policy::Drop) => Passage::Drop,
                    Some(Policy::Accept) | None => Passage::Accept,
                };
                self.walk.pass(traveller.branch, passage);
                return;
            };
            let Some(rule) = frame.chain.rules.get(frame.next) else {
                self.step(&mut traveller, Action::End);
                traveller.frames.pop();
                continue;
            };
            frame.next += 1;
            let answer = self.asks(rule, &traveller.branch);
            if matches!(answer, Answer::No) {
                frame.passed += 1;
                continue;
            }
            if let Some(why) = self.obstacle(rule, &answer, depth) {
                self.step(&mut traveller, why);
                continue;
            }
            if let Answer::Perhaps(share) = answer {
                self.splits += 1;
                let chosen = traveller.branch.split(share);
                let frames = traveller.frames.clone();
                if let Some(frame) = traveller.frames.last_mut() {
                    frame.passed += 1;
                }
                self.waiting.push(traveller);
                traveller = Traveller {
                    branch: chosen,
                    frames,
                };
            }
            match self.act(rule, traveller) {
                Some(further) => traveller = further,
                None => return,
            }
        }
    }

    /// Does what a rule that matches says; `None` if the branch is at its end.
    fn act(&mut self, rule: &'a Rule<'a>, mut traveller: Traveller<'a>) -> Option<Traveller<'a>> {
        let remembers = |part: &Match<'_>| matches!(part, Match::Recent(recent) if recent.action.value == RecentAction::Set);
        if rule.matches.iter().any(remembers) {
            self.step(&mut traveller, Action::Remember);
        }
        let (action, passage) = match &rule.target {
            Target::None | Target::Other(_) => (Action::Nothing, None),
            Target::Accept => (Action::Accept, Some(Passage::Accept)),
            Target::Drop => (Action::Drop, Some(Passage::Drop)),
            Target::Reject(_) => (Action::Reject, Some(Passage::Reject)),
            Target::Return => {
                self.step(&mut traveller, Action::Return);
                traveller.frames.pop();
                return Some(traveller);
            }
            Target::Jump(name) => {
                self.jumps += 1;
                self.step(&mut traveller, Action::Jump(name));
                let chain = self.base.table.chain(name)?;
                traveller.frames.push(Frame::start(chain));
                return Some(traveller);
            }
            Target::Goto(name) => {
                self.jumps += 1;
                self.step(&mut traveller, Action::Goto(name));
                let chain = self.base.table.chain(name)?;
                traveller.frames.pop();
                traveller.frames.push(Frame::start(chain));
                return Some(traveller);
            }
            Target::Mark(mark) => {
                let branch = &mut traveller.branch;
                branch.mark = (branch.mark & !mark.mask) ^ mark.value;
                (Action::Mark(branch.mark), None)
            }
            Target::Masquerade { .. } => {
                traveller.branch.masqueraded = true;
                (Action::Masquerade, Some(Passage::Accept))
            }
            Target::Dnat(dnat) => {
                let branch = &mut traveller.branch;
                branch.destination = dnat.address.unwrap_or(branch.destination);
                branch.destination_port = dnat.port.unwrap_or(branch.destination_port);
                branch.translated = true;
                let to = SocketAddr::new(branch.destination, branch.destination_port);
                (Action::Dnat(to), Some(Passage::Accept))
            }
        };
        self.step(&mut traveller, action);
        match passage {
            Some(passage) => {
                self.walk.pass(traveller.branch, passage);
                None
            }
            None => Some(traveller),
        }
    }

    /// Records a step at the rule before the next one.
    fn step(&mut self, traveller: &mut Traveller<'a>, action: Action<'a>) {
        let Some(frame) = traveller.frames.last_mut() else {
            return;
        };
        let step = Step {
            table: self.base.table.name,
            chain: frame.chain.name,
            // A dump has fewer lines than this.
            rule: u32::try_from(frame.next).unwrap_or(u32::MAX),
            passed: std::mem::take(&mut frame.passed),
            action,
        };
        self.walk.step(&mut traveller.branch, step);
    }

    /// Why a rule that may match cannot be followed, if so.
    fn obstacle(&self, rule: &Rule<'a>, answer: &Answer<'a>, depth: usize) -> Option<Action<'a>> {
        match (&rule.target, answer) {
            (Target::Other(words), _) if !GOES_ON.contains(&words.name) => {
                Some(Action::Unknown(words.name))
            }
            (Target::Jump(name) | Target::Goto(name), _)
                if self.base.table.chain(name).is_none() =>
            {
                Some(Action::Unknown(name))
            }
            (_, Answer::Unknown(what)) => Some(Action::Unknown(what)),
            (Target::Jump(_) | Target::Goto(_), _) if depth >= DEEPEST || self.jumps >= MOST => {
                Some(Action::Limit)
            }
            (_, Answer::Perhaps(_)) if self.splits >= MOST => Some(Action::Limit),
            _ => None,
        }
    }

    /// Does the packet match the rule?
    fn asks(&self, rule: &'a Rule<'a>, branch: &Branch<'a>) -> Answer<'a> {
        let is = |wanted: Option<Not<crate::cluster::Cidr>>, address: IpAddr| {
            wanted.is_none_or(|network| network.holds(|network| network.contains(address)))
        };
        if !is(rule.destination, branch.destination) || !is(rule.source, branch.source) {
            return Answer::No;
        }
        let protocol = rule.protocol.as_ref();
        if !protocol.is_none_or(|protocol| protocol.holds(|it| it.0 == branch.protocol.number())) {
            return Answer::No;
        }
        let mut answer = self.asks_links(rule, branch);
        for part in &rule.matches {
            if matches!(answer, Answer::No) {
                break;
            }
            answer = answer.and(self.asks_match(part, branch));
        }
        answer
    }

    fn asks_links(&self, rule: &'a Rule<'a>, branch: &Branch<'a>) -> Answer<'a> {
        let mut answer = Answer::Yes;
        if let Some(wanted) = &rule.in_interface {
            let known = match self.base.hook {
                Hook::Output | Hook::Postrouting => None,
                Hook::Prerouting | Hook::Input | Hook::Forward => branch.in_link,
            };
            // A link that no rule names, or none: both are different from any name.
            let matches = wanted.holds(|name| known.is_some_and(|link| is_link(link, name)));
            answer = Answer::from(matches);
        }
        if let Some(wanted) = &rule.out_interface {
            answer = answer.and(match self.base.hook {
                Hook::Prerouting | Hook::Input => Answer::from(wanted.negated),
                Hook::Forward | Hook::Output | Hook::Postrouting => Answer::Unknown(wanted.value),
            });
        }
        answer
    }

    fn asks_match(&self, part: &'a Match<'a>, branch: &Branch<'a>) -> Answer<'a> {
        let source = |ports: &Ports| is_port(*ports, branch.source_port);
        let destination = |ports: &Ports| ports.contains(branch.destination_port);
        Answer::from(match part {
            Match::Comment(_) | Match::Nfacct(_) => true,
            Match::Transport(transport) => {
                transport.protocol.0 == branch.protocol.number()
                    && transport.source.as_ref().is_none_or(|it| it.holds(source))
                    && transport
                        .destination
                        .as_ref()
                        .is_none_or(|it| it.holds(destination))
            }
            Match::Multiport(multiport) => multiport.ports.holds(|list| {
                list.iter().any(|ports| match multiport.side {
                    PortSide::Source => source(ports),
                    PortSide::Destination => destination(ports),
                    PortSide::Either => source(ports) || destination(ports),
                })
            }),
            Match::Conntrack(states) => states.holds(|states| states_of(branch, *states)),
            Match::Statistic(probability) => {
                let share = f64::from(probability.value) / super::rule::PROBABILITY_ONE;
                let share = if probability.negated {
                    1.0 - share
                } else {
                    share
                };
                if share > 0.0 && share < 1.0 {
                    return Answer::Perhaps(share);
                }
                share >= 1.0
            }
            Match::Recent(recent) => is_recent(recent),
            Match::Mark(mark) => mark.holds(|mark| branch.mark & mark.mask == mark.value),
            Match::AddrType(types) => {
                let is = |wanted: Option<Not<AddrTypes>>, address| {
                    wanted.is_none_or(|it| it.holds(|it| it.intersects(self.type_of(address))))
                };
                is(types.source, branch.source) && is(types.destination, branch.destination)
            }
            Match::Set(set) => {
                let SetMatch { name, sides } = set.value;
                match self.sets.contains(name, sides.are_sources(), branch) {
                    Some(inside) => inside != set.negated,
                    None => return Answer::Unknown(name),
                }
            }
            Match::Ipvs(ipvs) => branch.virtual_server.is_some_and(|(address, port)| {
                let protocol = branch.protocol.number();
                ipvs.protocol
                    .is_none_or(|it| it.holds(|it| it.0 == protocol))
                    && ipvs
                        .address
                        .is_none_or(|it| it.holds(|it| it.contains(address)))
                    && ipvs.port.is_none_or(|it| it.holds(|it| *it == port))
            }),
            Match::Physdev(physdev) => [physdev.is_in, physdev.is_out, physdev.is_bridged]
                .iter()
                .all(|wanted| *wanted != Some(true)),
            Match::Other(words) => {
                return Answer::Unknown(if words.name.is_empty() {
                    words.options
                } else {
                    words.name
                });
            }
        })
    }

    /// As `inet_addr_type` tells, as far as the node's own addresses do.
    fn type_of(&self, address: IpAddr) -> AddrTypes {
        match address {
            _ if self.place.is_local(address) => AddrTypes::LOCAL,
            _ if address.is_multicast() => AddrTypes::MULTICAST,
            IpAddr::V4(address) if address.is_broadcast() => AddrTypes::BROADCAST,
            _ => AddrTypes::UNICAST,
        }
    }
}

/// Is `link` of this name, or does it begin as a name that ends in `+`?
fn is_link(link: &str, name: &str) -> bool {
    match name.strip_suffix('+') {
        Some(start) => link.starts_with(start),
        None => link == name,
    }
}

/// Is it one of these ports? One that is not known is none that a rule names.
const fn is_port(ports: Ports, port: Option<u16>) -> bool {
    match port {
        Some(port) => ports.contains(port),
        None => ports.first == 0 && ports.last == u16::MAX,
    }
}

/// As `conntrack_mt` looks at a packet's state and at its flow's translations.
const fn states_of(branch: &Branch<'_>, states: CtStates) -> bool {
    let state = match branch.state {
        State::New => CtStates::NEW,
        State::Established => CtStates::ESTABLISHED,
        State::Invalid => CtStates::INVALID,
    };
    states.intersects(state)
        || (branch.translated && states.intersects(CtStates::DNAT))
        || (branch.masqueraded && states.intersects(CtStates::SNAT))
}

/// Nobody is in a list yet; whoever is put in it matches.
const fn is_recent(recent: &Recent<'_>) -> bool {
    matches!(recent.action.value, RecentAction::Set) != recent.action.negated
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::cluster::{Family, Protocol};
    use crate::rules::iptables::parse;
    use crate::rules::ipvs::Sets;
    use crate::rules::walk::{Fate, Oracle, Origin, Outcome, Packet};

    const IPTABLES: &str = include_str!("../fixtures/kube-proxy-1.36.2/iptables-nft/iptables.save");
    const IPVS: &str = include_str!("../fixtures/kube-proxy-1.36.2/ipvs/iptables.save");
    const SETS: &str = include_str!("../fixtures/kube-proxy-1.36.2/ipvs/ipset.save");

    fn place() -> Place {
        let addresses = |list: &[[u8; 4]]| list.iter().map(|ip| IpAddr::from(*ip)).collect();
        Place {
            local: addresses(&[[172, 31, 255, 2]]),
            virtual_ips: addresses(&[[10, 96, 10, 1]]),
            ..Place::default()
        }
    }

    fn packet(from: [u8; 4], to: [u8; 4], port: u16) -> Packet {
        Packet {
            origin: Origin::Link(None),
            from: from.into(),
            from_port: None,
            to: to.into(),
            to_port: port,
            protocol: Protocol::Tcp,
            state: State::New,
        }
    }

    /// What becomes of a packet: each fate's probability, and whether it is masqueraded.
    fn fates(text: &str, sets: &str, packet: &Packet) -> BTreeMap<String, (f64, bool)> {
        let tables = parse(text, Family::V4).expect("a dump");
        let sets = SetTable::new(&Sets::parse(sets).expect("a dump"));
        let chains = Chains::new(&tables, &sets);
        let place = place();
        let mut fates = BTreeMap::new();
        for outcome in Oracle::new(&place, &[&chains]).walk(packet) {
            let fate = match outcome.fate {
                Fate::Endpoint { endpoint } => endpoint.to_string(),
                fate => format!("{fate:?}"),
            };
            let sum = fates.entry(fate).or_insert((0.0, outcome.masqueraded));
            sum.0 += outcome.probability;
            assert_eq!(sum.1, outcome.masqueraded);
        }
        fates
    }

    #[track_caller]
    fn assert_fates(packet: &Packet, wanted: &[(&str, f64, bool)]) {
        let fates = fates(IPTABLES, "", packet);
        assert_eq!(fates.len(), wanted.len(), "{fates:?}");
        for (fate, probability, masqueraded) in wanted {
            let (found, masquerade) = fates[*fate];
            assert!((found - probability).abs() < 1e-8, "{fates:?}");
            assert_eq!(masquerade, *masqueraded, "{fate}");
        }
    }

    const POD: [u8; 4] = [10, 244, 0, 7];
    const OUTSIDE: [u8; 4] = [203, 0, 113, 200];
    const NODE: [u8; 4] = [172, 31, 255, 2];

    #[test]
    fn a_cluster_ip_leads_to_each_endpoint_alike() {
        let third = 1.0 / 3.0;
        let endpoints = ["10.244.0.11:8080", "10.244.0.12:8080", "10.244.1.13:8080"];
        for (from, masqueraded) in [(POD, false), (OUTSIDE, true)] {
            let wanted = endpoints.map(|endpoint| (endpoint, third, masqueraded));
            assert_fates(&packet(from, [10, 96, 10, 1], 80), &wanted);
        }
        // A pod that is sent to itself.
        let itself = packet([10, 244, 0, 11], [10, 96, 10, 1], 80);
        let wanted: Vec<_> = endpoints
            .iter()
            .map(|e| (*e, third, *e == endpoints[0]))
            .collect();
        assert_fates(&itself, &wanted);
        // Session affinity does not know the client yet.
        assert_fates(
            &packet(POD, [10, 96, 10, 4], 9000),
            &[
                ("10.244.0.21:9000", 0.5, false),
                ("10.244.1.22:9000", 0.5, false),
            ],
        );
    }

    #[test]
    fn policies_of_external_traffic_are_kept() {
        let all = |masqueraded| {
            [
                ("10.244.0.11:8080", 0.5, masqueraded),
                ("10.244.1.13:8080", 0.5, masqueraded),
            ]
        };
        assert_fates(&packet(OUTSIDE, NODE, 30080), &all(true));
        let local = [("10.244.0.12:8080", 1.0, false)];
        assert_fates(&packet(OUTSIDE, NODE, 30081), &local);
        // The node's own packets go to every endpoint.
        let mut own = packet(NODE, NODE, 30081);
        own.origin = Origin::Node;
        let wanted = [
            ("10.244.0.12:8080", 0.5, true),
            ("10.244.1.13:8080", 0.5, true),
        ];
        assert_fates(&own, &wanted);
    }

    #[test]
    fn what_nothing_serves_is_refused_or_dropped() {
        let refused = [("Rejected { hook: Forward }", 1.0, false)];
        assert_fates(&packet(POD, [10, 96, 10, 5], 80), &refused);
        let refused = [("Rejected { hook: Input }", 1.0, false)];
        assert_fates(&packet(OUTSIDE, NODE, 30082), &refused);
        let dropped = [("Dropped { hook: Forward }", 1.0, false)];
        assert_fates(&packet(POD, [10, 96, 10, 6], 80), &dropped);
        // Outside of a load balancer's source ranges.
        assert_fates(&packet(OUTSIDE, [198, 51, 100, 10], 80), &dropped);
        assert_fates(
            &packet([203, 0, 113, 5], [198, 51, 100, 10], 80),
            &[
                ("10.244.0.51:8080", 0.5, true),
                ("10.244.1.52:8080", 0.5, true),
            ],
        );
        assert_fates(&packet(POD, [10, 96, 10, 1], 81), &[("Leaked", 1.0, false)]);
        let mut invalid = packet(POD, [10, 96, 10, 1], 80);
        invalid.state = State::Invalid;
        assert_fates(&invalid, &dropped);
    }

    fn outcomes<R>(text: &str, packet: &Packet, read: impl FnOnce(&[Outcome<'_>]) -> R) -> R {
        let tables = parse(text, Family::V4).expect("a dump");
        let sets = SetTable::default();
        let chains = Chains::new(&tables, &sets);
        let place = Place::default();
        let oracle = Oracle::new(&place, &[&chains]);
        read(&oracle.walk(packet))
    }

    #[test]
    fn every_step_and_the_rules_before_it_are_told() {
        let packet = packet(POD, [10, 96, 10, 1], 80);
        outcomes(IPTABLES, &packet, |outcomes| {
            let steps: Vec<_> = outcomes[1]
                .steps
                .iter()
                .map(|visited| visited.step)
                .collect();
            let nat: Vec<_> = steps
                .iter()
                .filter(|step| step.table == "nat" && step.chain.starts_with("KUBE-S"))
                .map(|step| (step.chain, step.rule, step.passed))
                .collect();
            assert_eq!(
                nat,
                [
                    ("KUBE-SERVICES", 11, 10),
                    ("KUBE-SVC-67NZLRHBNDSAWJRO", 3, 2),
                    ("KUBE-SEP-GGIGR6VVAOCSQD2H", 2, 1),
                ]
            );
            assert!(steps.iter().any(|step| step.action == Action::End));
        });
    }

    #[test]
    fn chains_return_and_go_as_in_the_kernel() {
        let text = "*filter\n:FORWARD DROP [0:0]\n:A - [0:0]\n:B - [0:0]\n:C - [0:0]\n\
                    -A FORWARD -j A\n-A FORWARD -m mark --mark 0x7 -j ACCEPT\n\
                    -A A -g B\n-A A -j MARK --set-mark 0x100\n\
                    -A B -j MARK --set-mark 0x3\n-A B -j C\n-A B -j MARK --or-mark 0x4\n\
                    -A C -i eth+ -j DROP\n-A C -j RETURN\n-A C -j DROP\nCOMMIT\n";
        let mut packet = packet(POD, OUTSIDE, 80);
        let fate = |packet: &Packet| {
            outcomes(text, packet, |outcomes| {
                assert_eq!(outcomes.len(), 1);
                outcomes[0].fate
            })
        };
        assert_eq!(fate(&packet), Fate::Forwarded);
        let dropped = Fate::Dropped {
            hook: Hook::Forward,
        };
        packet.origin = Origin::Link(Some("eth0".into()));
        assert_eq!(fate(&packet), dropped);
        packet.origin = Origin::Link(Some("veth0".into()));
        assert_eq!(fate(&packet), Fate::Forwarded);
    }

    #[test]
    fn what_cannot_be_known_is_said_and_does_not_match() {
        let text = "*filter\n:FORWARD ACCEPT [0:0]\n:A - [0:0]\n\
                    -A FORWARD -m foo --bar -j DROP\n-A FORWARD -j NFQUEUE --queue-num 1\n\
                    -A FORWARD -o eth0 -j DROP\n-A FORWARD -m set --match-set S dst -j DROP\n\
                    -A FORWARD -j LOG\n-A FORWARD -p udp -m foo -j DROP\nCOMMIT\n";
        outcomes(text, &packet(POD, OUTSIDE, 80), |outcomes| {
            assert_eq!(outcomes.len(), 1);
            assert_eq!(outcomes[0].fate, Fate::Forwarded);
            let actions: Vec<_> = outcomes[0].steps.iter().map(|it| it.step.action).collect();
            assert_eq!(
                actions,
                [
                    Action::Unknown("foo"),
                    Action::Unknown("NFQUEUE"),
                    Action::Unknown("eth0"),
                    Action::Unknown("S"),
                    Action::Nothing,
                    Action::End,
                ]
            );
        });
    }

    #[test]
    fn rules_without_end_are_left() {
        for text in [
            "*filter\n:FORWARD ACCEPT [0:0]\n:A - [0:0]\n-A FORWARD -j A\n-A A -j A\nCOMMIT\n",
            "*filter\n:FORWARD ACCEPT [0:0]\n:A - [0:0]\n-A FORWARD -j A\n-A A -g A\nCOMMIT\n",
        ] {
            outcomes(text, &packet(POD, OUTSIDE, 80), |outcomes| {
                assert_eq!(outcomes.len(), 1);
                let mut steps = outcomes[0].steps.iter();
                assert!(steps.any(|it| it.step.action == Action::Limit));
            });
        }
        let mut text = "*filter\n:FORWARD ACCEPT [0:0]\n".to_owned();
        for _ in 0..40 {
            text.push_str(
                "-A FORWARD -m statistic --mode random --probability 0.5 -j MARK --set-mark 1\n",
            );
        }
        text.push_str("COMMIT\n");
        outcomes(&text, &packet(POD, OUTSIDE, 80), |outcomes| {
            let sum: f64 = outcomes.iter().map(|outcome| outcome.probability).sum();
            assert!((sum - 1.0).abs() < 1e-9);
            let mut steps = outcomes.iter().flat_map(|outcome| &outcome.steps);
            assert!(steps.any(|it| it.step.action == Action::Limit));
        });
    }

    #[test]
    fn sets_are_looked_up() {
        // Masqueraded, for it does not come from a pod; what sends it on is IPVS, which is not here.
        let packet = packet(OUTSIDE, [10, 96, 10, 1], 80);
        assert_eq!(fates(IPVS, SETS, &packet)["Leaked"], (1.0, true));
        let pod = self::packet(POD, [10, 96, 10, 1], 80);
        assert_eq!(fates(IPVS, SETS, &pod)["Leaked"], (1.0, false));
    }
}
