//! The oracle: where would this packet go, and with what probability?
//!
//! Every back end evaluates its rules at one hook, as a [`Layer`]; this room strings the hooks
//! together as the kernel does: the components of a hook by priority, the nat ones for new flows
//! only and only until one of them has translated (`nf_nat_inet_fn` in `net/netfilter/nf_nat_core.c`),
//! the routing decision after PREROUTING, and the loop that IPVS makes through OUTPUT. A packet that
//! meets a random choice becomes several branches, whose probabilities add up to one.

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use crate::cluster::{Family, Protocol};

/// A netfilter hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Hook {
    /// `NF_INET_PRE_ROUTING`.
    Prerouting,
    /// `NF_INET_LOCAL_IN`.
    Input,
    /// `NF_INET_FORWARD`.
    Forward,
    /// `NF_INET_LOCAL_OUT`.
    Output,
    /// `NF_INET_POST_ROUTING`.
    Postrouting,
}

impl Hook {
    /// All of them, in the kernel's numbering.
    pub const ALL: [Self; 5] = [
        Self::Prerouting,
        Self::Input,
        Self::Forward,
        Self::Output,
        Self::Postrouting,
    ];
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Prerouting => "PREROUTING",
            Self::Input => "INPUT",
            Self::Forward => "FORWARD",
            Self::Output => "OUTPUT",
            Self::Postrouting => "POSTROUTING",
        })
    }
}

/// What conntrack says of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The first packet of a flow.
    #[default]
    New,
    /// A later packet: its translation is in its conntrack entry, and nat rules are not asked.
    Established,
    /// A packet that belongs to no flow: never translated.
    Invalid,
}

/// How a packet comes to the node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A process on the node sends it.
    Node,
    /// It arrives on a link: of a pod, or of the network. `None`: any link that no rule names.
    Link(Option<String>),
}

/// The packet that is asked about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Packet {
    /// How it comes to the node.
    pub origin: Origin,
    /// Source address.
    pub from: IpAddr,
    /// Source port; `None`: any that no rule names.
    pub from_port: Option<u16>,
    /// Destination address.
    pub to: IpAddr,
    /// Destination port.
    pub to_port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// What conntrack says of it.
    pub state: State,
}

/// What the oracle knows of the node besides its rules.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// The node's own addresses, with those of `kube-ipvs0`. Loopback ones need not be among them.
    pub local: HashSet<IpAddr>,
    /// The addresses of Services: a packet to one of them that leaves untranslated has leaked.
    pub virtual_ips: HashSet<IpAddr>,
    /// The ports that Services have on the node's own addresses.
    pub node_ports: HashSet<(Protocol, u16)>,
}

impl Place {
    /// Does the node take packets to this address in?
    pub fn is_local(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.local.contains(&address)
    }

    /// Is this a Service's address, or a `NodePort` on the node?
    fn is_service(&self, address: IpAddr, protocol: Protocol, port: u16) -> bool {
        self.virtual_ips.contains(&address)
            || (self.is_local(address) && self.node_ports.contains(&(protocol, port)))
    }
}

/// One way that the packet can go: its headers and marks as they are now.
#[derive(Clone, Debug)]
pub struct Branch<'a> {
    /// The probability of getting here, 0 to 1.
    pub probability: f64,
    /// Source address, before masquerading.
    pub source: IpAddr,
    /// Source port.
    pub source_port: Option<u16>,
    /// Destination address, after translation.
    pub destination: IpAddr,
    /// Destination port, after translation.
    pub destination_port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Conntrack state.
    pub state: State,
    /// The link it came in on, if it came in on one that is known.
    pub in_link: Option<&'a str>,
    /// Did it come in on a link at all?
    pub arrived: bool,
    /// The packet's mark.
    pub mark: u32,
    /// Has a nat rule changed the destination (`ct status dnat`)?
    pub translated: bool,
    /// The virtual server that took it, in IPVS mode: address and port.
    pub virtual_server: Option<(IpAddr, u16)>,
    /// Will its source be masqueraded?
    pub masqueraded: bool,
    destination_settled: bool,
    source_settled: bool,
    tip: Option<u32>,
}

impl<'a> Branch<'a> {
    fn start(packet: &'a Packet) -> Self {
        let (arrived, in_link) = match &packet.origin {
            Origin::Node => (false, None),
            Origin::Link(link) => (true, link.as_deref()),
        };
        Self {
            probability: 1.0,
            source: packet.from,
            source_port: packet.from_port,
            destination: packet.to,
            destination_port: packet.to_port,
            protocol: packet.protocol,
            state: packet.state,
            in_link,
            arrived,
            mark: 0,
            translated: false,
            virtual_server: None,
            masqueraded: false,
            destination_settled: false,
            source_settled: false,
            tip: None,
        }
    }

    /// Splits off the share of this branch that goes another way: the returned branch has `share`
    /// (0 to 1) of its probability, it keeps the rest.
    #[must_use]
    pub fn split(&mut self, share: f64) -> Self {
        let mut other = self.clone();
        other.probability = self.probability * share;
        self.probability -= other.probability;
        other
    }

    /// The family of its addresses.
    pub fn family(&self) -> Family {
        Family::of(self.destination)
    }
}

/// What a rule that matched did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action<'a> {
    /// Went to a chain, and will come back.
    Jump(&'a str),
    /// Went to a chain, and will not come back to this one.
    Goto(&'a str),
    /// Went back to the chain that called, or to the policy.
    Return,
    /// Let it pass this component.
    Accept,
    /// Dropped it.
    Drop,
    /// Refused it, with ICMP or a TCP reset.
    Reject,
    /// Changed the mark to this.
    Mark(u32),
    /// Asked for masquerading.
    Masquerade,
    /// Rewrote the destination.
    Dnat(SocketAddr),
    /// IPVS chose a real server.
    Schedule(SocketAddr),
    /// Remembered the source address, for session affinity.
    Remember,
    /// Matched and changed nothing.
    Nothing,
    /// The rule has a match or target that this oracle does not know: taken as not matching.
    Unknown(&'a str),
    /// There are more ways than are followed: taken as not matching.
    Limit,
    /// The chain ended without a verdict.
    End,
}

/// One place that a branch passed: a rule that matched, or a chain's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Step<'a> {
    /// `nat`, `filter`, `ip kube-proxy`, `ipvs`.
    pub table: &'a str,
    /// The chain; the virtual server's address and port have none and say `virtual servers`.
    pub chain: &'a str,
    /// The rule's position in the chain, from 1; at [`Action::End`], the number of rules.
    pub rule: u32,
    /// The rules of this chain that were evaluated without matching since its last step.
    pub passed: u32,
    /// What it did.
    pub action: Action<'a>,
}

/// What becomes of a branch at a component.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// It goes on to the next component.
    Accept,
    /// It ends here, silently.
    Drop,
    /// It ends here, and the sender is told.
    Reject,
    /// IPVS took it and sends it on through OUTPUT and POSTROUTING.
    Redirect,
}

/// Which packets a component is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nature {
    /// All of them.
    Filter,
    /// Those whose destination (at PREROUTING and OUTPUT) or source (at INPUT and POSTROUTING) is
    /// still to be decided: the first ones of flows.
    Nat,
}

/// One base chain, or one hook function of IPVS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Component {
    /// Where.
    pub hook: Hook,
    /// Lower ones are asked first: `enum nf_ip_hook_priorities`.
    pub priority: i32,
    /// Which packets.
    pub nature: Nature,
    /// The layer's own name for it.
    pub id: usize,
}

/// The rules of one back end and family.
pub trait Layer {
    /// Its components at all hooks.
    fn components(&self) -> Vec<Component>;

    /// Sends a branch through one of them; every branch that comes out goes to [`Walk::pass`], each
    /// step on the way to [`Walk::step`].
    fn evaluate<'a>(
        &'a self,
        component: usize,
        branch: Branch<'a>,
        place: &'a Place,
        walk: &mut Walk<'a>,
    );
}

/// What has been seen so far: the steps of all branches, and the branches that leave a component.
#[derive(Debug)]
pub struct Walk<'a> {
    hook: Hook,
    /// Each step with the one before it on its branch.
    steps: Vec<(Option<u32>, Hook, Step<'a>)>,
    passed: Vec<(Branch<'a>, Passage)>,
}

impl<'a> Walk<'a> {
    fn new() -> Self {
        Self {
            hook: Hook::Prerouting,
            steps: Vec::with_capacity(64),
            passed: Vec::with_capacity(16),
        }
    }

    /// Records a step of a branch.
    pub fn step(&mut self, branch: &mut Branch<'a>, step: Step<'a>) {
        // A walk of four thousand million steps does not end before the reader does.
        let index = u32::try_from(self.steps.len()).unwrap_or(u32::MAX);
        self.steps.push((branch.tip, self.hook, step));
        branch.tip = Some(index);
    }

    /// Lets a branch leave the component.
    pub fn pass(&mut self, branch: Branch<'a>, passage: Passage) {
        self.passed.push((branch, passage));
    }

    fn steps_of(&self, branch: &Branch<'a>) -> Vec<Visited<'a>> {
        let mut steps = Vec::new();
        let mut tip = branch.tip;
        while let Some((before, hook, step)) =
            tip.and_then(|index| self.steps.get(usize::try_from(index).unwrap_or(usize::MAX)))
        {
            steps.push(Visited {
                hook: *hook,
                step: *step,
            });
            tip = *before;
        }
        steps.reverse();
        steps
    }
}

/// A step and the hook it was taken at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Visited<'a> {
    /// The hook.
    pub hook: Hook,
    /// The step.
    #[serde(flatten)]
    pub step: Step<'a>,
}

/// How a branch ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase", tag = "verdict")]
pub enum Fate {
    /// Sent to an endpoint that a rule or virtual server chose.
    Endpoint {
        /// Its address and port.
        endpoint: SocketAddr,
    },
    /// Taken in by the node itself, untranslated.
    Node,
    /// Sent on to the address that it was for, which is no Service's.
    Forwarded,
    /// Sent on with a Service's address untranslated.
    Leaked,
    /// Goes where the first packet of its flow went: its conntrack entry knows, the rules do not.
    Tracked,
    /// Dropped.
    Dropped {
        /// Where.
        hook: Hook,
    },
    /// Refused.
    Rejected {
        /// Where.
        hook: Hook,
    },
}

/// One way that the packet can go, to its end.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome<'a> {
    /// Its probability, 0 to 1.
    pub probability: f64,
    /// How it ends.
    #[serde(flatten)]
    pub fate: Fate,
    /// Is its source masqueraded?
    pub masqueraded: bool,
    /// Where it passed, in order.
    pub steps: Vec<Visited<'a>>,
}

/// The rules of a node, ready to be asked.
pub struct Oracle<'a> {
    place: &'a Place,
    /// For each hook of [`Hook::ALL`], the components by priority.
    hooks: [Vec<(&'a dyn Layer, Component)>; 5],
}

impl<'a> Oracle<'a> {
    /// Layers of one family; of components with one priority, those of earlier layers come first.
    pub fn new(place: &'a Place, layers: &[&'a dyn Layer]) -> Self {
        let mut hooks: [Vec<(&'a dyn Layer, Component)>; 5] = Default::default();
        for layer in layers {
            for component in layer.components() {
                hooks[component.hook as usize].push((*layer, component));
            }
        }
        for components in &mut hooks {
            components.sort_by_key(|(_, component)| component.priority);
        }
        Self { place, hooks }
    }

    /// Every way that the packet can go, in the order in which the choices are made.
    pub fn walk(&self, packet: &'a Packet) -> Vec<Outcome<'a>> {
        let mut journey = Journey {
            oracle: self,
            walk: Walk::new(),
            outcomes: Vec::new(),
        };
        let start = Branch::start(packet);
        match packet.origin {
            Origin::Node => journey.send(start),
            Origin::Link(_) => journey.arrive(start),
        }
        journey.outcomes
    }
}

/// One walk under way.
struct Journey<'o, 'a> {
    oracle: &'o Oracle<'a>,
    walk: Walk<'a>,
    outcomes: Vec<Outcome<'a>>,
}

impl<'a> Journey<'_, 'a> {
    /// From a link: PREROUTING, then INPUT or FORWARD.
    fn arrive(&mut self, branch: Branch<'a>) {
        for branch in self.at(Hook::Prerouting, branch) {
            if self.oracle.place.is_local(branch.destination) {
                self.take_in(branch);
            } else {
                for branch in self.at(Hook::Forward, branch) {
                    self.leave(branch);
                }
            }
        }
    }

    /// INPUT, and the end of the journey unless IPVS sends it on.
    fn take_in(&mut self, branch: Branch<'a>) {
        for branch in self.at(Hook::Input, branch) {
            let fate = self.chosen(&branch).unwrap_or(Fate::Node);
            self.end(&branch, fate);
        }
    }

    /// How a branch ends that was translated, or was when its flow began.
    fn chosen(&self, branch: &Branch<'a>) -> Option<Fate> {
        if branch.translated || branch.virtual_server.is_some() {
            return Some(Fate::Endpoint {
                endpoint: SocketAddr::new(branch.destination, branch.destination_port),
            });
        }
        let (protocol, port) = (branch.protocol, branch.destination_port);
        let tracked = branch.state == State::Established
            && self
                .oracle
                .place
                .is_service(branch.destination, protocol, port);
        tracked.then_some(Fate::Tracked)
    }

    /// From a process on the node.
    fn send(&mut self, branch: Branch<'a>) {
        for branch in self.at(Hook::Output, branch) {
            self.leave(branch);
        }
    }

    /// POSTROUTING, and out; to an address of the node's own, back in over loopback, where conntrack
    /// knows the packet already.
    fn leave(&mut self, branch: Branch<'a>) {
        for mut branch in self.at(Hook::Postrouting, branch) {
            if self.oracle.place.is_local(branch.destination) {
                branch.destination_settled = true;
                branch.source_settled = true;
                for branch in self.at(Hook::Prerouting, branch) {
                    self.take_in(branch);
                }
                continue;
            }
            let is_virtual = self.oracle.place.virtual_ips.contains(&branch.destination);
            let untranslated = if is_virtual {
                Fate::Leaked
            } else {
                Fate::Forwarded
            };
            let fate = self.chosen(&branch).unwrap_or(untranslated);
            self.end(&branch, fate);
        }
    }

    /// All components of a hook; returns the branches that pass, ends those that do not.
    fn at(&mut self, hook: Hook, branch: Branch<'a>) -> Vec<Branch<'a>> {
        let at_source = matches!(hook, Hook::Input | Hook::Postrouting);
        let oracle = self.oracle;
        let mut branches = vec![branch];
        for (layer, component) in &oracle.hooks[hook as usize] {
            let waiting = std::mem::take(&mut branches);
            for branch in waiting {
                let settled = if at_source {
                    branch.source_settled || branch.masqueraded
                } else {
                    branch.destination_settled || branch.translated
                };
                let asked = component.nature == Nature::Filter
                    || (branch.state == State::New && hook != Hook::Forward && !settled);
                if !asked {
                    branches.push(branch);
                    continue;
                }
                self.walk.hook = hook;
                layer.evaluate(component.id, branch, oracle.place, &mut self.walk);
                for (branch, passage) in std::mem::take(&mut self.walk.passed) {
                    match passage {
                        Passage::Accept => branches.push(branch),
                        Passage::Drop => self.end(&branch, Fate::Dropped { hook }),
                        Passage::Reject => self.end(&branch, Fate::Rejected { hook }),
                        Passage::Redirect => self.redirect(branch),
                    }
                }
            }
        }
        for branch in &mut branches {
            if at_source {
                branch.source_settled = true;
            } else {
                branch.destination_settled |= hook != Hook::Forward;
            }
        }
        branches
    }

    /// IPVS sends a packet out as if the node had made it (`ip_vs_nat_send_or_cont` in
    /// `net/netfilter/ipvs/ip_vs_xmit.c`), once.
    fn redirect(&mut self, mut branch: Branch<'a>) {
        branch.destination_settled = true;
        self.send(branch);
    }

    fn end(&mut self, branch: &Branch<'a>, fate: Fate) {
        self.outcomes.push(Outcome {
            probability: branch.probability,
            fate,
            masqueraded: branch.masqueraded,
            steps: self.walk.steps_of(branch),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIP: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 1));
    const POD: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 244, 0, 5));

    /// A nat component that sends half of what goes to [`VIP`] to [`POD`], a filter that drops the
    /// mark 1, and one at POSTROUTING that masquerades the mark 2.
    struct Toy;

    impl Layer for Toy {
        fn components(&self) -> Vec<Component> {
            let nat = |hook, id| Component {
                hook,
                priority: 100,
                nature: Nature::Nat,
                id,
            };
            vec![
                nat(Hook::Prerouting, 0),
                nat(Hook::Output, 0),
                Component {
                    hook: Hook::Forward,
                    priority: 0,
                    nature: Nature::Filter,
                    id: 1,
                },
            ]
        }

        fn evaluate<'a>(
            &'a self,
            component: usize,
            mut branch: Branch<'a>,
            _: &'a Place,
            walk: &mut Walk<'a>,
        ) {
            let step = |action| Step {
                table: "toy",
                chain: "chain",
                rule: 1,
                passed: 0,
                action,
            };
            if component == 1 {
                let passage = if branch.translated {
                    Passage::Accept
                } else {
                    Passage::Drop
                };
                walk.pass(branch, passage);
                return;
            }
            if branch.destination == VIP {
                let mut chosen = branch.split(0.5);
                chosen.destination = POD;
                chosen.destination_port = 8080;
                chosen.translated = true;
                walk.step(&mut chosen, step(Action::Dnat(SocketAddr::new(POD, 8080))));
                walk.pass(chosen, Passage::Accept);
            }
            walk.step(&mut branch, step(Action::End));
            walk.pass(branch, Passage::Accept);
        }
    }

    fn packet(origin: Origin, state: State) -> Packet {
        Packet {
            origin,
            from: IpAddr::from([10, 244, 0, 9]),
            from_port: None,
            to: VIP,
            to_port: 80,
            protocol: Protocol::Tcp,
            state,
        }
    }

    fn place() -> Place {
        Place {
            virtual_ips: [VIP].into(),
            ..Place::default()
        }
    }

    #[test]
    fn a_choice_splits_the_packet() {
        let place = place();
        let oracle = Oracle::new(&place, &[&Toy]);
        let packet = packet(Origin::Node, State::New);
        let outcomes = oracle.walk(&packet);
        let endpoint = SocketAddr::new(POD, 8080);
        assert_eq!(outcomes.len(), 2);
        assert_eq!(outcomes[0].fate, Fate::Endpoint { endpoint });
        assert!((outcomes[0].probability - 0.5).abs() < f64::EPSILON);
        assert_eq!(outcomes[0].steps[0].step.action, Action::Dnat(endpoint));
        assert_eq!(outcomes[1].fate, Fate::Leaked);
        assert_eq!(outcomes[1].steps.len(), 1);
    }

    #[test]
    fn nat_rules_are_asked_about_new_flows_only() {
        let place = place();
        let oracle = Oracle::new(&place, &[&Toy]);
        for state in [State::Established, State::Invalid] {
            let packet = packet(Origin::Link(None), state);
            let outcomes = oracle.walk(&packet);
            let hook = Hook::Forward;
            assert_eq!(outcomes.len(), 1);
            assert_eq!(outcomes[0].fate, Fate::Dropped { hook });
            assert!(outcomes[0].steps.is_empty());
        }
    }

    #[test]
    fn a_later_packet_goes_where_the_first_went() {
        let node = IpAddr::from([192, 0, 2, 1]);
        let mut place = place();
        place.local.insert(node);
        place.node_ports.insert((Protocol::Tcp, 30080));
        let oracle = Oracle::new(&place, &[]);
        for origin in [Origin::Node, Origin::Link(None)] {
            for (to, to_port, state, fate) in [
                (VIP, 80, State::Established, Fate::Tracked),
                (VIP, 80, State::Invalid, Fate::Leaked),
                (node, 30080, State::Established, Fate::Tracked),
                (node, 30080, State::New, Fate::Node),
                (node, 30081, State::Established, Fate::Node),
                (POD, 30080, State::Established, Fate::Forwarded),
            ] {
                let packet = Packet {
                    to,
                    to_port,
                    ..packet(origin.clone(), state)
                };
                let outcomes = oracle.walk(&packet);
                assert_eq!(outcomes.len(), 1);
                assert_eq!(outcomes[0].fate, fate, "{packet:?}");
            }
        }
    }

    #[test]
    fn what_one_layer_translated_another_is_not_asked_about() {
        let place = place();
        let oracle = Oracle::new(&place, &[&Toy, &Toy]);
        let packet = packet(Origin::Node, State::New);
        let outcomes = oracle.walk(&packet);
        let shares: Vec<f64> = outcomes.iter().map(|o| o.probability).collect();
        assert_eq!(shares, [0.5, 0.25, 0.25]);
        assert_eq!(outcomes[2].fate, Fate::Leaked);
    }

    #[test]
    fn a_packet_to_the_node_is_taken_in() {
        let mut place = place();
        place.local.insert(VIP);
        let oracle = Oracle::new(&place, &[]);
        for origin in [Origin::Node, Origin::Link(None)] {
            let packet = packet(origin, State::New);
            let outcomes = oracle.walk(&packet);
            assert_eq!(outcomes.len(), 1);
            assert_eq!(outcomes[0].fate, Fate::Node);
        }
    }
}
