//! IPVS's part in a packet's way, and the ipsets that rules ask.
//!
//! Sources: `ip_vs_ops4`, `ip_vs_in_hook`, `tcp_conn_schedule` and `ip_vs_leave` under
//! `net/netfilter/ipvs` of Linux, and `ip_set_get_ip_port` of `net/netfilter/ipset`.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use super::servers::{ServerKey, Servers, VirtualServer};
use super::sets::{Entry, SetKind, Sets};
use crate::cluster::{Cidr, Protocol};
use crate::rules::walk::{
    Action, Branch, Component, Hook, Layer, Nature, Passage, Place, State, Step, Walk,
};

/// `ip_vs_in_hook` at INPUT: `NF_IP_PRI_NAT_SRC - 1`.
const INPUT_PRIORITY: i32 = 99;
/// `ip_vs_in_hook` at OUTPUT: `NF_IP_PRI_NAT_DST + 2`.
const OUTPUT_PRIORITY: i32 = -98;

/// Where steps say they were taken.
const TABLE: &str = "ipvs";
const CHAIN: &str = "virtual servers";

/// Virtual servers that can be asked for.
#[derive(Clone, Debug)]
pub struct Director {
    servers: Servers,
    by_key: HashMap<ServerKey, usize>,
}

impl Director {
    /// Of virtual servers that stand there twice, the first counts.
    pub fn new(servers: Servers) -> Self {
        let mut by_key = HashMap::with_capacity(servers.list.len());
        for (index, server) in servers.list.iter().enumerate() {
            by_key.entry(server.key).or_insert(index);
        }
        Self { servers, by_key }
    }

    /// The virtual server of this address and port, and its position, from 1.
    fn find(&self, key: ServerKey) -> Option<(u32, &VirtualServer)> {
        let index = *self.by_key.get(&key)?;
        let position = u32::try_from(index).map_or(u32::MAX, |index| index.saturating_add(1));
        Some((position, self.servers.list.get(index)?))
    }
}

/// The real servers that get new flows, and each one's share in the long run, 0 to 1.
///
/// `rr` ignores weights but for 0. Schedulers that look at connections or at the client's address
/// spread many clients by weight; so does persistence.
fn shares(server: &VirtualServer) -> impl Iterator<Item = (SocketAddr, f64)> {
    let even = server.scheduler == "rr";
    let weight = move |weight: u32| if even { weight.min(1) } else { weight };
    let total: u64 = server
        .real_servers
        .iter()
        .map(|real_server| u64::from(weight(real_server.weight)))
        .sum();
    server
        .real_servers
        .iter()
        .map(move |real_server| (real_server.socket, weight(real_server.weight)))
        .filter(|(_, weight)| *weight > 0)
        .map(move |(socket, weight)| (socket, f64::from(weight) / total as f64))
}

/// Can the packet begin a connection? Of TCP and SCTP only a first one can; that of an established
/// flow finds the connection that its first one made, which the same shares decided.
fn can_schedule(branch: &Branch<'_>) -> bool {
    branch.state != State::Invalid || branch.protocol == Protocol::Udp
}

impl Layer for Director {
    fn components(&self) -> Vec<Component> {
        let at = |hook, priority| Component {
            hook,
            priority,
            nature: Nature::Filter,
            id: 0,
        };
        vec![
            at(Hook::Input, INPUT_PRIORITY),
            at(Hook::Output, OUTPUT_PRIORITY),
        ]
    }

    fn evaluate<'a>(
        &'a self,
        _: usize,
        mut branch: Branch<'a>,
        place: &'a Place,
        walk: &mut Walk<'a>,
    ) {
        let step = |rule, action| Step {
            table: TABLE,
            chain: CHAIN,
            rule,
            passed: 0,
            action,
        };
        // `ipvs_property`: it was here before.
        if branch.virtual_server.is_some() || !can_schedule(&branch) {
            walk.pass(branch, Passage::Accept);
            return;
        }
        let key = ServerKey {
            protocol: branch.protocol,
            socket: SocketAddr::new(branch.destination, branch.destination_port),
        };
        let Some((rule, server)) = self.find(key) else {
            let last = u32::try_from(self.servers.list.len()).unwrap_or(u32::MAX);
            walk.step(&mut branch, step(last, Action::End));
            walk.pass(branch, Passage::Accept);
            return;
        };
        branch.virtual_server = Some((branch.destination, branch.destination_port));
        let mut any = false;
        for (socket, share) in shares(server) {
            any = true;
            let mut chosen = branch.clone();
            chosen.probability *= share;
            chosen.destination = socket.ip();
            chosen.destination_port = socket.port();
            walk.step(&mut chosen, step(rule, Action::Schedule(socket)));
            // To the node's own address it goes on where it is (`ip_vs_nat_send_or_cont`).
            let passage = if place.is_local(socket.ip()) {
                Passage::Accept
            } else {
                Passage::Redirect
            };
            walk.pass(chosen, passage);
        }
        if !any {
            walk.step(&mut branch, step(rule, Action::Reject));
            walk.pass(branch, Passage::Reject);
        }
    }
}

/// ipsets that can be asked for.
#[derive(Clone, Debug, Default)]
pub struct SetTable(HashMap<String, Lookup>);

#[derive(Clone, Debug)]
struct Lookup {
    kind: SetKind,
    entries: HashSet<Entry>,
    /// The networks of a `hash:ip,port,net`.
    networks: HashMap<(IpAddr, Protocol, u16), Vec<(Cidr, Inclusion)>>,
}

/// What a network of a set says of the addresses in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inclusion {
    In,
    /// `nomatch`.
    Out,
}

impl SetTable {
    /// Of sets that stand there twice, the first counts.
    pub fn new(sets: &Sets) -> Self {
        let mut table = HashMap::with_capacity(sets.list.len());
        for set in &sets.list {
            let mut lookup = Lookup {
                kind: set.kind,
                entries: HashSet::with_capacity(set.members.len()),
                networks: HashMap::new(),
            };
            for member in &set.members {
                if let Entry::IpPortNet(address, protocol, port, network) = member.entry {
                    let inclusion = if member.except {
                        Inclusion::Out
                    } else {
                        Inclusion::In
                    };
                    let networks = lookup.networks.entry((address, protocol, port));
                    networks.or_default().push((network, inclusion));
                } else {
                    lookup.entries.insert(member.entry);
                }
            }
            table.entry(set.name()).or_insert(lookup);
        }
        Self(table)
    }

    /// Is the packet in the set of this name? For each dimension of the set, `are_sources` says
    /// whether the packet's source (`src`) is looked at or its destination (`dst`). `None` if the
    /// set is not known.
    pub fn contains(
        &self,
        name: &str,
        are_sources: impl Iterator<Item = bool>,
        branch: &Branch<'_>,
    ) -> Option<bool> {
        let lookup = self.0.get(name)?;
        // A set with more dimensions than sides were given for looks at the destination.
        let mut sides = are_sources.chain(std::iter::repeat(false));
        let mut side = || sides.next().unwrap_or(false);
        let inside = lookup.contains([side(), side(), side()], branch);
        Some(inside.unwrap_or(false))
    }
}

impl Lookup {
    /// `None` if that depends on a port that is not known; `sources` says for each dimension
    /// whether the packet's source is looked at.
    fn contains(&self, sources: [bool; 3], branch: &Branch<'_>) -> Option<bool> {
        let [first, second, third] = sources;
        let address = |source| {
            if source {
                branch.source
            } else {
                branch.destination
            }
        };
        let port = |source| {
            if source {
                branch.source_port
            } else {
                Some(branch.destination_port)
            }
        };
        let protocol = branch.protocol;
        Some(match self.kind {
            SetKind::Ip => self.entries.contains(&Entry::Ip(address(first))),
            SetKind::IpPort => {
                let entry = Entry::IpPort(address(first), protocol, port(second)?);
                self.entries.contains(&entry)
            }
            SetKind::IpPortIp => {
                let port = port(second)?;
                let entry = Entry::IpPortIp(address(first), protocol, port, address(third));
                self.entries.contains(&entry)
            }
            SetKind::IpPortNet => {
                let key = (address(first), protocol, port(second)?);
                let networks = self.networks.get(&key).into_iter().flatten();
                let address = address(third);
                // The smallest network decides.
                networks
                    .filter(|(network, _)| network.contains(address))
                    .max_by_key(|(network, _)| network.prefix)
                    .is_some_and(|(_, inclusion)| *inclusion == Inclusion::In)
            }
            // A bitmap of ports knows those of TCP and UDP alone.
            SetKind::Port => {
                protocol != Protocol::Sctp && self.entries.contains(&Entry::Port(port(first)?))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Family;
    use crate::rules::iptables;
    use crate::rules::ipvs::Addresses;
    use crate::rules::walk::{Fate, Oracle, Origin, Outcome, Packet};

    const SERVERS: &str = include_str!("../fixtures/kube-proxy-1.36.2/ipvs/ipvsadm.save");
    const SETS: &str = include_str!("../fixtures/kube-proxy-1.36.2/ipvs/ipset.save");

    fn packet(to: &str, protocol: Protocol, origin: Origin) -> Packet {
        let to: SocketAddr = to.parse().expect("a socket");
        Packet {
            origin,
            from: "10.244.0.11".parse().expect("an address"),
            from_port: None,
            to: to.ip(),
            to_port: to.port(),
            protocol,
            state: State::New,
        }
    }

    fn place() -> Place {
        let servers = Servers::parse(SERVERS).expect("a real dump");
        let addresses = servers.list.iter().map(|server| server.key.socket.ip());
        Place {
            local: addresses.collect(),
            ..Place::default()
        }
    }

    fn fates(text: &str, packet: &Packet) -> Vec<(f64, Fate)> {
        let director = Director::new(Servers::parse(text).expect("valid"));
        let place = place();
        let outcomes = Oracle::new(&place, &[&director]).walk(packet);
        let fate = |outcome: &Outcome<'_>| (outcome.probability, outcome.fate);
        outcomes.iter().map(fate).collect()
    }

    fn endpoint(socket: &str) -> Fate {
        Fate::Endpoint {
            endpoint: socket.parse().expect("a socket"),
        }
    }

    #[test]
    fn real_servers_share_new_flows() {
        let third = 1.0 / 3.0;
        for origin in [Origin::Node, Origin::Link(None)] {
            let packet = packet("10.96.10.1:80", Protocol::Tcp, origin);
            assert_eq!(
                fates(SERVERS, &packet),
                [
                    (third, endpoint("10.244.0.11:8080")),
                    (third, endpoint("10.244.0.12:8080")),
                    (third, endpoint("10.244.1.13:8080")),
                ]
            );
        }
    }

    #[test]
    fn what_no_virtual_server_has_is_left_alone() {
        for (to, protocol) in [
            ("10.96.10.1:81", Protocol::Tcp),
            ("10.96.10.1:80", Protocol::Udp),
        ] {
            let packet = packet(to, protocol, Origin::Link(None));
            assert_eq!(fates(SERVERS, &packet), [(1.0, Fate::Node)]);
        }
        // A connection begins with a SYN.
        let mut packet = packet("10.96.10.1:80", Protocol::Tcp, Origin::Link(None));
        packet.state = State::Invalid;
        assert_eq!(fates(SERVERS, &packet), [(1.0, Fate::Node)]);
    }

    #[test]
    fn without_real_servers_packets_are_refused() {
        for (text, hook, origin) in [
            (SERVERS.to_owned(), Hook::Input, Origin::Link(None)),
            (SERVERS.to_owned(), Hook::Output, Origin::Node),
            (
                "-A -t 10.96.10.5:80 -s rr\n-a -t 10.96.10.5:80 -r 10.0.0.1:1 -m -w 0\n".to_owned(),
                Hook::Input,
                Origin::Link(None),
            ),
        ] {
            let packet = packet("10.96.10.5:80", Protocol::Tcp, origin);
            assert_eq!(fates(&text, &packet), [(1.0, Fate::Rejected { hook })]);
        }
    }

    #[test]
    fn weights_count_in_schedulers_that_weigh() {
        let text = |scheduler: &str| {
            format!(
                "-A -t 10.96.10.1:80 -s {scheduler}\n\
                 -a -t 10.96.10.1:80 -r 10.0.0.1:1 -m -w 3\n\
                 -a -t 10.96.10.1:80 -r 10.0.0.2:1 -m -w 1\n\
                 -a -t 10.96.10.1:80 -r 10.0.0.3:1 -m -w 0\n"
            )
        };
        let packet = packet("10.96.10.1:80", Protocol::Tcp, Origin::Link(None));
        let [one, two] = ["10.0.0.1:1", "10.0.0.2:1"].map(endpoint);
        assert_eq!(fates(&text("rr"), &packet), [(0.5, one), (0.5, two)]);
        assert_eq!(fates(&text("wrr"), &packet), [(0.75, one), (0.25, two)]);
    }

    /// A layer that asks one set about every packet at INPUT, and drops those in it.
    struct Asks<'s> {
        sets: &'s SetTable,
        name: &'s str,
        sides: &'s [bool],
    }

    impl Layer for Asks<'_> {
        fn components(&self) -> Vec<Component> {
            vec![Component {
                hook: Hook::Input,
                priority: 0,
                nature: Nature::Filter,
                id: 0,
            }]
        }

        fn evaluate<'a>(&'a self, _: usize, branch: Branch<'a>, _: &Place, walk: &mut Walk<'a>) {
            let inside = self
                .sets
                .contains(self.name, self.sides.iter().copied(), &branch);
            let passage = match inside {
                Some(true) => Passage::Drop,
                Some(false) => Passage::Accept,
                None => Passage::Reject,
            };
            walk.pass(branch, passage);
        }
    }

    #[test]
    fn sets_are_asked_about_either_side() {
        let sets = SetTable::new(&Sets::parse(SETS).expect("a real dump"));
        let place = place();
        let ask = |name, sides: &[bool], packet: &Packet| {
            let layer = Asks {
                sets: &sets,
                name,
                sides,
            };
            match Oracle::new(&place, &[&layer]).walk(packet)[0].fate {
                Fate::Dropped { .. } => Some(true),
                Fate::Rejected { .. } => None,
                _ => Some(false),
            }
        };
        let (tcp, udp, sctp) = (Protocol::Tcp, Protocol::Udp, Protocol::Sctp);
        let web = packet("10.96.10.1:80", tcp, Origin::Link(None));
        assert_eq!(ask("KUBE-CLUSTER-IP", &[false, false], &web), Some(true));
        assert_eq!(ask("KUBE-CLUSTER-IP", &[true, false], &web), Some(false));
        assert_eq!(ask("KUBE-IPVS-IPS", &[false], &web), Some(true));
        assert_eq!(ask("KUBE-NOTHING", &[false], &web), None);
        let dns = packet("10.96.10.1:80", udp, Origin::Link(None));
        assert_eq!(ask("KUBE-CLUSTER-IP", &[false, false], &dns), Some(false));
        for (protocol, inside) in [(tcp, true), (udp, true), (sctp, false)] {
            let node_port = packet("172.31.255.2:30080", protocol, Origin::Link(None));
            assert_eq!(
                ask("KUBE-NODE-PORT-TCP", &[false], &node_port),
                Some(inside)
            );
        }
        let sides = [false, false, true];
        for (from, inside) in [("203.0.113.9", true), ("203.0.113.129", false)] {
            let mut gateway = packet("198.51.100.10:80", tcp, Origin::Link(None));
            gateway.from = from.parse().expect("an address");
            let answer = ask("KUBE-LOAD-BALANCER-SOURCE-CIDR", &sides, &gateway);
            assert_eq!(answer, Some(inside));
        }
    }

    /// Endpoints with their probabilities and whether packets to them are masqueraded, or the
    /// other end, of a packet that comes to the node of the real dumps.
    fn journey(from: &str, to: &str, origin: Origin) -> Vec<(f64, Fate, bool)> {
        let tables = include_str!("../fixtures/kube-proxy-1.36.2/ipvs/iptables.save");
        let tables = iptables::parse(tables, Family::V4).expect("a real dump");
        let addresses = include_str!("../fixtures/kube-proxy-1.36.2/ipvs/ip-addr.txt");
        let addresses = Addresses::parse(addresses).expect("a real dump");
        let sets = SetTable::new(&Sets::parse(SETS).expect("a real dump"));
        let chains = iptables::walk::Chains::new(&tables, &sets);
        let director = Director::new(Servers::parse(SERVERS).expect("a real dump"));
        let mut place = Place::default();
        let bound = addresses.bound.iter().map(|bound| bound.address);
        place.local.extend(bound);
        place
            .local
            .extend([IpAddr::from([172, 31, 255, 2]), [10, 0, 2, 15].into()]);
        let mut packet = packet(to, Protocol::Tcp, origin);
        packet.from = from.parse().expect("an address");
        let outcomes = Oracle::new(&place, &[&chains, &director]).walk(&packet);
        let end = |outcome: &Outcome<'_>| (outcome.probability, outcome.fate, outcome.masqueraded);
        outcomes.iter().map(end).collect()
    }

    #[test]
    fn a_packet_passes_all_of_a_real_node() {
        let link = Origin::Link(None);
        let input = Hook::Input;
        let third = 1.0 / 3.0;
        let [one, two, three] =
            ["10.244.0.11:8080", "10.244.0.12:8080", "10.244.1.13:8080"].map(endpoint);
        // A pod that reaches itself is masqueraded.
        assert_eq!(
            journey("10.244.0.11", "10.96.10.1:80", link.clone()),
            [
                (third, one, true),
                (third, two, false),
                (third, three, false)
            ]
        );
        for (from, origin) in [
            ("192.168.9.9", link.clone()),
            ("172.31.255.2", Origin::Node),
        ] {
            assert_eq!(
                journey(from, "10.96.10.1:80", origin),
                [(third, one, true), (third, two, true), (third, three, true)]
            );
        }
        for (from, to, ends) in [
            // Source ranges.
            (
                "203.0.113.5",
                "198.51.100.10:80",
                vec![
                    (0.5, endpoint("10.244.0.51:8080"), true),
                    (0.5, endpoint("10.244.1.52:8080"), true),
                ],
            ),
            (
                "203.0.113.200",
                "198.51.100.10:80",
                vec![(1.0, Fate::Dropped { hook: input }, false)],
            ),
            // Policies of NodePorts.
            ("192.168.9.9", "172.31.255.2:30081", vec![(1.0, two, false)]),
            (
                "192.168.9.9",
                "10.0.2.15:30080",
                vec![(0.5, one, true), (0.5, three, true)],
            ),
            // No real servers; a port that the Service does not have.
            (
                "10.244.0.11",
                "10.96.10.5:80",
                vec![(1.0, Fate::Rejected { hook: input }, false)],
            ),
            (
                "10.244.0.11",
                "10.96.10.1:81",
                vec![(1.0, Fate::Rejected { hook: input }, false)],
            ),
        ] {
            assert_eq!(journey(from, to, link.clone()), ends, "{from} to {to}");
        }
    }
}
