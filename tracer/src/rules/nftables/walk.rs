//! A packet in kube-proxy's table: its base chains as a layer of the oracle.
//!
//! As `nft_do_chain` in `net/netfilter/nf_tables_core.c` evaluates them: a statement that does not
//! match ends its rule; `goto` forgets the chain it stands in; `dnat` and `masquerade` accept, which
//! ends the base chain; `drop` and `reject` are final.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::net::{IpAddr, SocketAddr};

use crate::cluster::Family;
use crate::rules::walk::{
    Action, Branch, Component, Layer, Nature, Passage, Place, State, Step, Walk,
};

use super::table::{
    Base, Chain, ChainKind, Destination, Element, Field, Mapped, Operand, Rule, Set, Statement,
    Table, Target, Value, Verdict, VerdictMap,
};

/// How deep the kernel lets chains lead into one another: `NFT_JUMP_STACK_SIZE`.
const DEEPEST: usize = 16;

/// Keys come from a dump that its owner walks: no need of random seeds.
type Hashed<K, V> = HashMap<K, V, BuildHasherDefault<DefaultHasher>>;

/// A table ready to be walked.
#[derive(Debug)]
pub struct TableWalk<'t> {
    name: &'static str,
    bases: Vec<(&'t str, &'t Chain, Base)>,
    chains: Hashed<&'t str, &'t Chain>,
    sets: Hashed<&'t str, Lookup<'t>>,
}

/// A set to look things up in.
#[derive(Debug)]
struct Lookup<'t> {
    set: &'t Set,
    elements: Hashed<&'t [Value], &'t Element>,
}

impl<'t> TableWalk<'t> {
    /// Indexes the table, in time linear in its size.
    pub fn new(table: &'t Table) -> Self {
        let bases = if table.dormant {
            Vec::new()
        } else {
            table
                .chains
                .iter()
                .filter_map(|(name, chain)| Some((&**name, chain, chain.base?)))
                .collect()
        };
        let sets = table.sets.iter().map(|(name, set)| {
            let elements = set
                .elements
                .iter()
                .map(|(key, element)| (&**key, element))
                .collect();
            (&**name, Lookup { set, elements })
        });
        Self {
            name: match table.family {
                Family::V4 => "ip kube-proxy",
                Family::V6 => "ip6 kube-proxy",
            },
            bases,
            chains: table
                .chains
                .iter()
                .map(|(name, chain)| (&**name, chain))
                .collect(),
            sets: sets.collect(),
        }
    }
}

impl Layer for TableWalk<'_> {
    fn components(&self) -> Vec<Component> {
        let component = |(id, (_, _, base)): (usize, &(&str, &Chain, Base))| Component {
            hook: base.hook,
            priority: base.priority,
            nature: match base.kind {
                ChainKind::Nat => Nature::Nat,
                ChainKind::Filter | ChainKind::Route => Nature::Filter,
            },
            id,
        };
        self.bases.iter().enumerate().map(component).collect()
    }

    fn evaluate<'a>(
        &'a self,
        component: usize,
        branch: Branch<'a>,
        place: &'a Place,
        walk: &mut Walk<'a>,
    ) {
        let Some((name, chain, base)) = self.bases.get(component) else {
            walk.pass(branch, Passage::Accept);
            return;
        };
        let mut pass = Pass {
            table: self,
            place,
            walk,
            accepts: base.accepts,
            waiting: Vec::new(),
        };
        pass.waiting.push(Thread {
            branch,
            frames: vec![Frame::new(name, chain, 0)],
        });
        while let Some(thread) = pass.waiting.pop() {
            pass.run(thread);
        }
    }
}

/// A branch on its way through a base chain.
#[derive(Clone)]
struct Thread<'a> {
    branch: Branch<'a>,
    /// The chains it is in; it comes back to all but the last.
    frames: Vec<Frame<'a>>,
}

/// A chain under evaluation.
#[derive(Clone, Copy)]
struct Frame<'a> {
    name: &'a str,
    chain: &'a Chain,
    /// The rules before this one are done.
    next: usize,
    /// How many of them did not match since the last step.
    passed: u32,
    /// How many chains led here.
    depth: usize,
}

impl<'a> Frame<'a> {
    const fn new(name: &'a str, chain: &'a Chain, depth: usize) -> Self {
        Self {
            name,
            chain,
            next: 0,
            passed: 0,
            depth,
        }
    }
}

/// What a rule does to a thread.
enum Effect<'a> {
    /// It does not match, or has nothing more to say.
    Next { matched: bool },
    /// It has this verdict.
    Verdict(&'a Verdict),
    /// The thread ends with this.
    End(Passage),
    /// The thread has become several, which wait.
    Split,
}

/// One evaluation of a base chain.
struct Pass<'w, 'a> {
    table: &'a TableWalk<'a>,
    place: &'a Place,
    walk: &'w mut Walk<'a>,
    accepts: bool,
    /// Branches to be taken further; the last is the next.
    waiting: Vec<Thread<'a>>,
}

impl<'a> Pass<'_, 'a> {
    fn run(&mut self, mut thread: Thread<'a>) {
        loop {
            let Some(frame) = thread.frames.last_mut() else {
                let passage = if self.accepts {
                    Passage::Accept
                } else {
                    Passage::Drop
                };
                self.walk.pass(thread.branch, passage);
                return;
            };
            let Some(rule) = frame.chain.rules.get(frame.next) else {
                self.step(&mut thread, Action::End);
                thread.frames.pop();
                continue;
            };
            frame.next += 1;
            match self.rule(rule, &mut thread) {
                Effect::Next { matched: true } => {}
                Effect::Next { matched: false } => {
                    if let Some(frame) = thread.frames.last_mut() {
                        frame.passed += 1;
                    }
                }
                Effect::Verdict(verdict) => {
                    if let Some(passage) = self.verdict(verdict, &mut thread) {
                        self.walk.pass(thread.branch, passage);
                        return;
                    }
                }
                Effect::End(passage) => {
                    self.walk.pass(thread.branch, passage);
                    return;
                }
                Effect::Split => return,
            }
        }
    }

    /// Records what the rule before `next` does.
    fn step(&mut self, thread: &mut Thread<'a>, action: Action<'a>) {
        let Some(frame) = thread.frames.last_mut() else {
            return;
        };
        let step = Step {
            table: self.table.name,
            chain: frame.name,
            rule: u32::try_from(frame.next).unwrap_or(u32::MAX),
            passed: std::mem::take(&mut frame.passed),
            action,
        };
        self.walk.step(&mut thread.branch, step);
    }

    /// Where evaluation goes on, or how it ends.
    fn verdict(&mut self, verdict: &'a Verdict, thread: &mut Thread<'a>) -> Option<Passage> {
        match verdict {
            Verdict::Accept => {
                self.step(thread, Action::Accept);
                return Some(Passage::Accept);
            }
            Verdict::Drop => {
                self.step(thread, Action::Drop);
                return Some(Passage::Drop);
            }
            Verdict::Continue => self.step(thread, Action::Nothing),
            Verdict::Return => {
                self.step(thread, Action::Return);
                thread.frames.pop();
            }
            Verdict::Jump(name) | Verdict::Goto(name) => {
                let depth = thread.frames.last().map_or(0, |frame| frame.depth) + 1;
                // No kernel holds a rule that leads nowhere, or too deep.
                let Some(chain) = self.table.chains.get(&**name) else {
                    self.step(thread, Action::Unknown(name));
                    return None;
                };
                if depth > DEEPEST {
                    self.step(thread, Action::Limit);
                    return None;
                }
                if matches!(verdict, Verdict::Jump(_)) {
                    self.step(thread, Action::Jump(name));
                } else {
                    self.step(thread, Action::Goto(name));
                    thread.frames.pop();
                }
                thread.frames.push(Frame::new(name, chain, depth));
            }
        }
        None
    }

    fn rule(&mut self, rule: &'a Rule, thread: &mut Thread<'a>) -> Effect<'a> {
        let mut acted = false;
        for statement in &rule.statements {
            match statement {
                Statement::Match {
                    fields,
                    negated,
                    operand,
                } => match self.matches(fields, operand, &thread.branch) {
                    Some(matches) if matches != *negated => {}
                    _ => return Effect::Next { matched: acted },
                },
                Statement::Vmap { fields, map } => {
                    if let ([Field::Random(modulus)], VerdictMap::Inline(verdicts)) =
                        (&fields[..], map)
                    {
                        let choices = verdicts.iter().filter_map(|(key, verdict)| match &**key {
                            [Value::Number(number)] => Some((*number, verdict)),
                            _ => None,
                        });
                        return self.spread(thread, *modulus, choices, |pass, thread, verdict| {
                            pass.verdict(verdict, thread)
                        });
                    }
                    return match self.look_up(fields, map, &thread.branch) {
                        Some(verdict) => Effect::Verdict(verdict),
                        None => Effect::Next { matched: acted },
                    };
                }
                Statement::Verdict(verdict) => return Effect::Verdict(verdict),
                Statement::Reject { .. } => {
                    self.step(thread, Action::Reject);
                    return Effect::End(Passage::Reject);
                }
                Statement::Mark(change) => {
                    thread.branch.mark = change.apply(thread.branch.mark);
                    let mark = thread.branch.mark;
                    self.step(thread, Action::Mark(mark));
                    acted = true;
                }
                Statement::Masquerade(_) => {
                    thread.branch.masqueraded = true;
                    self.step(thread, Action::Masquerade);
                    return Effect::End(Passage::Accept);
                }
                Statement::Dnat(Target::One(destination)) => {
                    return Effect::End(self.translate(thread, *destination));
                }
                Statement::Dnat(Target::Random {
                    modulus,
                    destinations,
                }) => {
                    let choices = destinations.iter().copied();
                    return self.spread(thread, *modulus, choices, |pass, thread, destination| {
                        Some(pass.translate(thread, destination))
                    });
                }
                Statement::Update { .. } => {
                    self.step(thread, Action::Remember);
                    acted = true;
                }
                Statement::Other(text) => {
                    self.step(thread, Action::Unknown(text));
                    return Effect::Next { matched: true };
                }
            }
        }
        if !acted {
            self.step(thread, Action::Nothing);
        }
        Effect::Next { matched: true }
    }

    fn translate(&mut self, thread: &mut Thread<'a>, destination: Destination) -> Passage {
        let branch = &mut thread.branch;
        branch.destination = destination.address;
        branch.destination_port = destination.port.unwrap_or(branch.destination_port);
        branch.translated = true;
        let to = SocketAddr::new(branch.destination, branch.destination_port);
        self.step(thread, Action::Dnat(to));
        Passage::Accept
    }

    /// Spreads a thread over the numbers below `modulus`, each as likely: `take` takes it to the
    /// choice of a number; with a number that has none it goes on after the rule.
    fn spread<C>(
        &mut self,
        thread: &mut Thread<'a>,
        modulus: u32,
        choices: impl Iterator<Item = (u32, C)>,
        mut take: impl FnMut(&mut Self, &mut Thread<'a>, C) -> Option<Passage>,
    ) -> Effect<'a> {
        let whole = thread.branch.probability;
        let first = self.waiting.len();
        let mut taken = 0_u32;
        for (_, choice) in choices.filter(|(number, _)| *number < modulus) {
            taken += 1;
            let mut chosen = thread.clone();
            chosen.branch.probability = whole / f64::from(modulus);
            match take(self, &mut chosen, choice) {
                Some(passage) => self.walk.pass(chosen.branch, passage),
                None => self.waiting.push(chosen),
            }
        }
        if taken == 0 {
            return Effect::Next { matched: false };
        }
        let rest = modulus.saturating_sub(taken);
        if rest > 0 {
            let mut left = thread.clone();
            left.branch.probability = whole * f64::from(rest) / f64::from(modulus);
            if let Some(frame) = left.frames.last_mut() {
                frame.passed += 1;
            }
            self.waiting.push(left);
        }
        // Choices are followed in their order.
        self.waiting[first..].reverse();
        Effect::Split
    }

    // ---- looking at the packet ----

    /// `None` if the packet has no such field.
    fn field(&self, field: Field, branch: &Branch<'a>) -> Option<Value> {
        let kind_of = |address: IpAddr| {
            Value::Word(
                if self.place.is_local(address) {
                    "local"
                } else if address.is_multicast() {
                    "multicast"
                } else {
                    "unicast"
                }
                .into(),
            )
        };
        Some(match field {
            Field::Source(family) => {
                Value::Address(branch.source).filter(family == branch.family())?
            }
            Field::Destination(family) => {
                Value::Address(branch.destination).filter(family == branch.family())?
            }
            Field::Protocol => Value::Protocol(branch.protocol),
            Field::Port => Value::Number(branch.destination_port.into()),
            Field::PortOf(protocol) => {
                Value::Number(branch.destination_port.into()).filter(protocol == branch.protocol)?
            }
            Field::State => Value::Word(
                match branch.state {
                    State::New => "new",
                    State::Established => "established",
                    State::Invalid => "invalid",
                }
                .into(),
            ),
            Field::Mark => Value::Number(branch.mark),
            Field::MarkAnd(mask) => Value::Number(branch.mark & mask),
            Field::SourceType => kind_of(branch.source),
            Field::DestinationType => kind_of(branch.destination),
            // The kernel takes a link that is not there for one without a name.
            Field::InputInterface => Value::Word(branch.in_link.unwrap_or_default().into()),
            // Several bits, and no bit at all: see `matches`.
            Field::Status | Field::Random(_) => return None,
        })
    }

    fn key(&self, fields: &[Field], branch: &Branch<'a>) -> Option<Vec<Value>> {
        fields
            .iter()
            .map(|field| self.field(*field, branch))
            .collect()
    }

    /// `None` if the packet has no such field, or the set is not there.
    fn matches(&self, fields: &[Field], operand: &Operand, branch: &Branch<'a>) -> Option<bool> {
        match (fields, operand) {
            ([Field::Source(family)], Operand::Addresses(ranges)) => {
                (*family == branch.family()).then(|| ranges.contains(branch.source))
            }
            ([Field::Destination(family)], Operand::Addresses(ranges)) => {
                (*family == branch.family()).then(|| ranges.contains(branch.destination))
            }
            ([Field::Status], Operand::Keys(keys)) => Some(keys.iter().any(|key| match &**key {
                [Value::Word(bit)] => match &**bit {
                    "dnat" => branch.translated,
                    "snat" => branch.masqueraded,
                    "seen-reply" | "assured" | "confirmed" => branch.state == State::Established,
                    _ => false,
                },
                _ => false,
            })),
            ([Field::InputInterface], Operand::Keys(keys)) => {
                let link = branch.in_link.unwrap_or_default();
                Some(keys.iter().any(|key| match &**key {
                    [Value::Word(name)] => match name.strip_suffix('*') {
                        Some(prefix) => link.starts_with(prefix),
                        None => link == &**name,
                    },
                    // A link whose name looks like something else.
                    [value] => value.to_string() == link,
                    _ => false,
                }))
            }
            (_, Operand::Addresses(_)) => None,
            (fields, Operand::Keys(keys)) => {
                let key = self.key(fields, branch)?;
                Some(keys.iter().any(|other| **other == *key))
            }
            (fields, Operand::Set(name)) => {
                let lookup = self.table.sets.get(&**name)?;
                let key = self.key(fields, branch)?;
                Some(lookup.holds(&key))
            }
        }
    }

    fn look_up(
        &self,
        fields: &[Field],
        map: &'a VerdictMap,
        branch: &Branch<'a>,
    ) -> Option<&'a Verdict> {
        let key = self.key(fields, branch)?;
        match map {
            VerdictMap::Inline(verdicts) => verdicts.get(&*key),
            VerdictMap::Named(name) => {
                let element = self.table.sets.get(&**name)?.elements.get(&*key)?;
                match &element.value {
                    Some(Mapped::Verdict(verdict)) => Some(verdict),
                    _ => None,
                }
            }
        }
    }
}

impl Lookup<'_> {
    fn holds(&self, key: &[Value]) -> bool {
        if self.elements.contains_key(key) {
            return true;
        }
        // Elements of an interval set are ranges.
        let [Value::Address(address)] = key else {
            return false;
        };
        self.set.flags.interval
            && self.elements.keys().any(|key| match key {
                [Value::Word(word)] => {
                    super::table::Range::parse(word).is_some_and(|range| range.contains(*address))
                }
                _ => false,
            })
    }
}

impl Value {
    /// The value, if `holds`.
    fn filter(self, holds: bool) -> Option<Self> {
        holds.then_some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;
    use crate::cluster::Protocol;
    use crate::rules::walk::{Fate, Hook, Oracle, Origin, Outcome, Packet};

    const IP: &str = include_str!("../fixtures/kube-proxy-1.36.2/nftables/nft-ip.txt");
    const IP6: &str = include_str!("../fixtures/kube-proxy-1.36.2/nftables/nft-ip6.txt");
    const POD: &str = "10.244.0.200";
    const OUTSIDE: &str = "203.0.113.200";
    const NODE: &str = "172.31.255.2";

    fn place() -> Place {
        let addresses = |set: &str| {
            let table = parse(IP).expect("a dump").ip.expect("the table");
            table.sets[set]
                .elements
                .keys()
                .filter_map(|key| match &key[0] {
                    Value::Address(address) => Some(*address),
                    _ => None,
                })
                .collect()
        };
        Place {
            local: [NODE.parse().expect("an address")].into(),
            virtual_ips: addresses("service-ips"),
            ..Place::default()
        }
    }

    fn packet(from: &str, to: &str) -> Packet {
        let to: SocketAddr = to.parse().expect("an address and port");
        Packet {
            origin: if from == NODE {
                Origin::Node
            } else {
                Origin::Link(None)
            },
            from: from.parse().expect("an address"),
            from_port: None,
            to: to.ip(),
            to_port: to.port(),
            protocol: Protocol::Tcp,
            state: State::New,
        }
    }

    /// The outcomes as text: fate, share, whether masqueraded.
    fn walk_in(text: &str, packet: &Packet) -> Vec<String> {
        let ruleset = parse(text).expect("a dump");
        let place = place();
        let tables: Vec<TableWalk<'_>> = Family::ALL
            .into_iter()
            .filter_map(|family| ruleset.table(family))
            .map(TableWalk::new)
            .collect();
        let layers: Vec<&dyn Layer> = tables.iter().map(|table| table as &dyn Layer).collect();
        let oracle = Oracle::new(&place, &layers);
        let outcomes = oracle.walk(packet);
        let sum: f64 = outcomes.iter().map(|outcome| outcome.probability).sum();
        assert!((sum - 1.0).abs() < 1e-9, "{outcomes:?}");
        outcomes.iter().map(say).collect()
    }

    fn say(outcome: &Outcome<'_>) -> String {
        let fate = match outcome.fate {
            Fate::Endpoint { endpoint } => endpoint.to_string(),
            Fate::Node => "node".to_owned(),
            Fate::Forwarded => "forwarded".to_owned(),
            Fate::Leaked => "leaked".to_owned(),
            Fate::Tracked => "tracked".to_owned(),
            Fate::Dropped { hook } => format!("dropped {hook}"),
            Fate::Rejected { hook } => format!("rejected {hook}"),
        };
        let masqueraded = if outcome.masqueraded {
            " masqueraded"
        } else {
            ""
        };
        format!("{fate} {:.4}{masqueraded}", outcome.probability)
    }

    fn walk(from: &str, to: &str) -> Vec<String> {
        walk_in(IP, &packet(from, to))
    }

    #[test]
    fn to_a_cluster_ip() {
        let even = [
            "10.244.0.11:8080 0.3333",
            "10.244.0.12:8080 0.3333",
            "10.244.1.13:8080 0.3333",
        ];
        assert_eq!(walk(POD, "10.96.10.1:80"), even);
        let masqueraded = even.map(|text| format!("{text} masqueraded"));
        assert_eq!(walk(OUTSIDE, "10.96.10.1:80"), masqueraded);
        assert_eq!(walk(NODE, "10.96.10.1:80"), masqueraded);
        // The pod itself is masqueraded where it meets itself.
        assert_eq!(
            walk("10.244.0.12", "10.96.10.1:80"),
            [
                even[0].to_owned(),
                format!("{} masqueraded", even[1]),
                even[2].to_owned()
            ]
        );
    }

    #[test]
    fn to_what_has_no_endpoint() {
        assert_eq!(walk(POD, "10.96.10.5:80"), ["rejected FORWARD 1.0000"]);
        assert_eq!(walk(NODE, "10.96.10.5:80"), ["rejected OUTPUT 1.0000"]);
        assert_eq!(walk(POD, "10.96.10.6:80"), ["dropped FORWARD 1.0000"]);
        assert_eq!(
            walk(OUTSIDE, "172.31.255.2:30082"),
            ["rejected INPUT 1.0000"]
        );
        // No such port, no such address.
        assert_eq!(walk(POD, "10.96.10.1:81"), ["rejected FORWARD 1.0000"]);
        assert_eq!(walk(NODE, "10.96.99.1:80"), ["dropped OUTPUT 1.0000"]);
    }

    #[test]
    fn to_what_is_no_service() {
        assert_eq!(walk(POD, "10.244.1.13:8080"), ["forwarded 1.0000"]);
        assert_eq!(walk(POD, "172.31.255.2:22"), ["node 1.0000"]);
        assert_eq!(walk(NODE, "192.0.2.9:6667"), ["leaked 1.0000"]);
    }

    #[test]
    fn from_outside() {
        assert_eq!(
            walk(OUTSIDE, "172.31.255.2:30080"),
            [
                "10.244.0.11:8080 0.5000 masqueraded",
                "10.244.1.13:8080 0.5000 masqueraded"
            ]
        );
        // externalTrafficPolicy: Local.
        assert_eq!(
            walk(OUTSIDE, "172.31.255.2:30081"),
            ["10.244.0.12:8080 1.0000"]
        );
        assert_eq!(
            walk(POD, "172.31.255.2:30081"),
            ["10.244.0.12:8080 0.5000", "10.244.1.13:8080 0.5000"]
        );
        assert_eq!(
            walk(NODE, "172.31.255.2:30081"),
            [
                "10.244.0.12:8080 0.5000 masqueraded",
                "10.244.1.13:8080 0.5000 masqueraded"
            ]
        );
        // Source ranges.
        assert_eq!(walk("203.0.113.127", "198.51.100.10:80").len(), 2);
        assert_eq!(
            walk("203.0.113.128", "198.51.100.10:80"),
            ["dropped PREROUTING 1.0000"]
        );
        assert_eq!(walk(NODE, "198.51.100.10:80"), ["dropped OUTPUT 1.0000"]);
    }

    #[test]
    fn with_affinity() {
        let both = ["10.244.0.21:9000 0.5000", "10.244.1.22:9000 0.5000"];
        assert_eq!(walk(POD, "10.96.10.4:9000"), both);
        let set =
            "\tset affinity-WQHWMCPE-shop/cart/tcp/grpc__10.244.1.22/9000 {\n\t\ttype ipv4_addr\n";
        let known = IP.replace(
            set,
            &format!("{set}\t\telements = {{ {POD} expires 2h }}\n"),
        );
        assert_ne!(known, IP);
        assert_eq!(
            walk_in(&known, &packet(POD, "10.96.10.4:9000")),
            ["10.244.1.22:9000 1.0000"]
        );
    }

    #[test]
    fn later_packets_and_strays() {
        for state in [State::Established, State::Invalid] {
            let packet = Packet {
                state,
                ..packet(POD, "10.96.10.1:80")
            };
            let fate = if state == State::Established {
                "tracked 1.0000"
            } else {
                "leaked 1.0000"
            };
            assert_eq!(walk_in(IP, &packet), [fate]);
        }
    }

    #[test]
    fn ipv6() {
        let from = |from: &str, to: &str| walk_in(IP6, &packet(from, to));
        assert_eq!(
            from("fd00:10:244::99", "[fd00:10:96::1001]:80"),
            [
                "[fd00:10:244:1::12]:8080 0.5000",
                "[fd00:10:244::11]:8080 0.5000"
            ]
        );
        assert_eq!(
            from("fd00:10:244::11", "[fd00:10:96::1001]:80"),
            [
                "[fd00:10:244:1::12]:8080 0.5000",
                "[fd00:10:244::11]:8080 0.5000 masqueraded"
            ]
        );
    }

    /// The form of kube-proxy before per-Service maps.
    #[test]
    fn chains_for_each_endpoint() {
        let old = "table ip kube-proxy {
            chain nat-prerouting {
                type nat hook prerouting priority dstnat; policy accept;
                jump services
            }
            chain nat-postrouting {
                type nat hook postrouting priority srcnat; policy accept;
                jump masquerading
            }
            chain services { ip daddr 10.96.10.1 tcp dport 80 goto service-AAAAAAAA-a/b/tcp/p }
            chain mark-for-masquerade { meta mark set meta mark | 0x00004000 }
            chain masquerading {
                meta mark & 0x00004000 == 0x00000000 return
                meta mark set meta mark ^ 0x00004000
                masquerade fully-random
            }
            chain service-AAAAAAAA-a/b/tcp/p {
                ip saddr != 10.244.0.0/16 jump mark-for-masquerade
                numgen random mod 3 vmap { 0 : goto endpoint-1, 1 : goto endpoint-2 }
            }
            chain endpoint-1 {
                ip saddr 10.244.0.1 jump mark-for-masquerade
                meta l4proto tcp dnat to 10.244.0.1:8080
            }
            chain endpoint-2 {
                ip saddr 10.244.0.2 jump mark-for-masquerade
                meta l4proto tcp dnat to 10.244.0.2
            }
        }";
        assert_eq!(
            walk_in(old, &packet("10.244.0.1", "10.96.10.1:80")),
            [
                "10.244.0.1:8080 0.3333 masqueraded",
                "10.244.0.2:80 0.3333",
                // The map has no verdict for 2.
                "leaked 0.3333",
            ]
        );
        let outside = walk_in(old, &packet(OUTSIDE, "10.96.10.1:80"));
        assert!(
            outside.iter().all(|text| text.ends_with("masqueraded")),
            "{outside:?}"
        );
    }

    #[test]
    fn every_step_is_told() {
        let ruleset = parse(IP).expect("a dump");
        let table = ruleset.ip.as_ref().map(TableWalk::new).expect("the table");
        let place = place();
        let oracle = Oracle::new(&place, &[&table]);
        let packet = packet(OUTSIDE, "172.31.255.2:30080");
        let outcomes = oracle.walk(&packet);
        let steps: Vec<String> = outcomes[0]
            .steps
            .iter()
            .map(|visited| {
                let step = visited.step;
                format!(
                    "{} {} {} +{} {:?}",
                    visited.hook, step.chain, step.rule, step.passed, step.action
                )
            })
            .collect();
        insta::assert_snapshot!(steps.join("\n"));
    }

    #[test]
    fn chains_that_lead_in_circles_end() {
        let circle = "table ip kube-proxy {
            chain a { type nat hook prerouting priority 0; policy drop; jump b; jump b; }
            chain b { goto c; }
            chain c { goto b; }
        }";
        assert_eq!(
            walk_in(circle, &packet(POD, "10.96.10.1:80")),
            ["dropped PREROUTING 1.0000"]
        );
    }

    #[test]
    fn hooks() {
        let ruleset = parse(IP).expect("a dump");
        let table = ruleset.ip.as_ref().map(TableWalk::new).expect("the table");
        let components = table.components();
        assert_eq!(components.len(), 8);
        let nat = components
            .iter()
            .filter(|component| component.nature == Nature::Nat);
        assert_eq!(nat.count(), 3);
        assert!(
            components
                .iter()
                .any(|component| component.hook == Hook::Output && component.priority == -110)
        );
    }
}
