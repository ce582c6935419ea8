//! ipsets, as `ipset save` prints and `ipset restore` reads them.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;

use crate::cluster::{Cidr, Family, Protocol};

use super::{ParseError, numbered_lines, write_words};

/// ipset's longest name: `IPSET_MAXNAMELEN` of the kernel, less the zero.
const NAME_MAX: usize = 31;

/// What a set of kube-proxy is for.
///
/// Source: `pkg/proxy/ipvs/ipset.go` of Kubernetes v1.36.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Endpoints on this node, reached by themselves.
    LoopBack,
    /// ClusterIPs and their ports.
    ClusterIp,
    /// External IPs and their ports.
    ExternalIp,
    /// Those with a Local external policy.
    ExternalIpLocal,
    /// Load balancer addresses and their ports.
    LoadBalancer,
    /// Those with a Local external policy.
    LoadBalancerLocal,
    /// Those with source ranges.
    LoadBalancerFirewall,
    /// Load balancer addresses that may reach themselves.
    LoadBalancerSourceIp,
    /// Load balancer addresses and the networks that may reach them.
    LoadBalancerSourceCidr,
    /// NodePorts of TCP.
    NodePortTcp,
    /// Those with a Local external policy.
    NodePortLocalTcp,
    /// NodePorts of UDP.
    NodePortUdp,
    /// Those with a Local external policy.
    NodePortLocalUdp,
    /// Node addresses and NodePorts of SCTP.
    NodePortSctp,
    /// Those with a Local external policy.
    NodePortLocalSctp,
    /// Health check NodePorts.
    HealthCheckNodePort,
    /// Every address of `kube-ipvs0`.
    IpvsIps,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 17] = [
        Self::LoopBack,
        Self::ClusterIp,
        Self::ExternalIp,
        Self::ExternalIpLocal,
        Self::LoadBalancer,
        Self::LoadBalancerLocal,
        Self::LoadBalancerFirewall,
        Self::LoadBalancerSourceIp,
        Self::LoadBalancerSourceCidr,
        Self::NodePortTcp,
        Self::NodePortLocalTcp,
        Self::NodePortUdp,
        Self::NodePortLocalUdp,
        Self::NodePortSctp,
        Self::NodePortLocalSctp,
        Self::HealthCheckNodePort,
        Self::IpvsIps,
    ];

    /// The set's name without `KUBE-`.
    const fn suffix(self) -> &'static str {
        match self {
            Self::LoopBack => "LOOP-BACK",
            Self::ClusterIp => "CLUSTER-IP",
            Self::ExternalIp => "EXTERNAL-IP",
            Self::ExternalIpLocal => "EXTERNAL-IP-LOCAL",
            Self::LoadBalancer => "LOAD-BALANCER",
            Self::LoadBalancerLocal => "LOAD-BALANCER-LOCAL",
            Self::LoadBalancerFirewall => "LOAD-BALANCER-FW",
            Self::LoadBalancerSourceIp => "LOAD-BALANCER-SOURCE-IP",
            Self::LoadBalancerSourceCidr => "LOAD-BALANCER-SOURCE-CIDR",
            Self::NodePortTcp => "NODE-PORT-TCP",
            Self::NodePortLocalTcp => "NODE-PORT-LOCAL-TCP",
            Self::NodePortUdp => "NODE-PORT-UDP",
            Self::NodePortLocalUdp => "NODE-PORT-LOCAL-UDP",
            Self::NodePortSctp => "NODE-PORT-SCTP-HASH",
            Self::NodePortLocalSctp => "NODE-PORT-LOCAL-SCTP-HASH",
            Self::HealthCheckNodePort => "HEALTH-CHECK-NODE-PORT",
            Self::IpvsIps => "IPVS-IPS",
        }
    }

    /// The type that kube-proxy makes it with.
    pub const fn kind(self) -> SetKind {
        match self {
            Self::LoopBack | Self::LoadBalancerSourceIp => SetKind::IpPortIp,
            Self::LoadBalancerSourceCidr => SetKind::IpPortNet,
            Self::ClusterIp
            | Self::ExternalIp
            | Self::ExternalIpLocal
            | Self::LoadBalancer
            | Self::LoadBalancerLocal
            | Self::LoadBalancerFirewall
            | Self::NodePortSctp
            | Self::NodePortLocalSctp => SetKind::IpPort,
            Self::NodePortTcp
            | Self::NodePortLocalTcp
            | Self::NodePortUdp
            | Self::NodePortLocalUdp
            | Self::HealthCheckNodePort => SetKind::Port,
            Self::IpvsIps => SetKind::Ip,
        }
    }

    /// The set's full name: `KUBE-CLUSTER-IP`, `KUBE-6-CLUSTER-IP` in IPv6, cut to what the kernel
    /// takes.
    pub fn set_name(self, family: Family) -> String {
        let prefix = match family {
            Family::V4 => "KUBE-",
            Family::V6 => "KUBE-6-",
        };
        let mut name = format!("{prefix}{}", self.suffix());
        name.truncate(NAME_MAX);
        name
    }

    /// What the set of this name is for; `None` if it is none of kube-proxy's.
    pub fn of(name: &str) -> Option<(Family, Self)> {
        let (family, suffix) = match name.strip_prefix("KUBE-6-") {
            Some(suffix) => (Family::V6, suffix),
            None => (Family::V4, name.strip_prefix("KUBE-")?),
        };
        let cut = |role: Self| {
            let full = role.suffix();
            let max = NAME_MAX - (name.len() - suffix.len());
            full.get(..max).unwrap_or(full)
        };
        Self::ALL
            .into_iter()
            .find(|role| cut(*role) == suffix)
            .map(|role| (family, role))
    }
}

/// A set's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SetKind {
    /// `hash:ip`.
    Ip,
    /// `hash:ip,port`.
    IpPort,
    /// `hash:ip,port,ip`.
    IpPortIp,
    /// `hash:ip,port,net`.
    IpPortNet,
    /// `bitmap:port`.
    Port,
}

impl SetKind {
    const ALL: [Self; 5] = [
        Self::Ip,
        Self::IpPort,
        Self::IpPortIp,
        Self::IpPortNet,
        Self::Port,
    ];

    /// ipset's name of it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ip => "hash:ip",
            Self::IpPort => "hash:ip,port",
            Self::IpPortIp => "hash:ip,port,ip",
            Self::IpPortNet => "hash:ip,port,net",
            Self::Port => "bitmap:port",
        }
    }

    fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// What stands in a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Entry {
    /// `10.96.0.1`.
    Ip(IpAddr),
    /// `10.96.0.1,tcp:443`.
    IpPort(IpAddr, Protocol, u16),
    /// `10.244.0.2,udp:53,10.244.0.2`.
    IpPortIp(IpAddr, Protocol, u16, IpAddr),
    /// `198.51.100.10,tcp:80,203.0.113.0/25`.
    IpPortNet(IpAddr, Protocol, u16, Cidr),
    /// `30080`.
    Port(u16),
}

impl Entry {
    /// Reads the entry of a set of this type.
    fn parse(kind: SetKind, text: &str) -> Option<Self> {
        let mut parts = text.split(',');
        let first = parts.next()?;
        let mut port = || {
            let (protocol, port) = parts.next()?.split_once(':')?;
            let protocol = match protocol {
                "tcp" => Protocol::Tcp,
                "udp" => Protocol::Udp,
                "sctp" => Protocol::Sctp,
                _ => return None,
            };
            Some((protocol, port.parse().ok()?))
        };
        let entry = match kind {
            SetKind::Port => Self::Port(first.parse().ok()?),
            SetKind::Ip => Self::Ip(first.parse().ok()?),
            SetKind::IpPort => {
                let (protocol, port) = port()?;
                Self::IpPort(first.parse().ok()?, protocol, port)
            }
            SetKind::IpPortIp => {
                let (protocol, port) = port()?;
                let second = parts.next()?.parse().ok()?;
                Self::IpPortIp(first.parse().ok()?, protocol, port, second)
            }
            SetKind::IpPortNet => {
                let (protocol, port) = port()?;
                let net = parse_net(parts.next()?)?;
                Self::IpPortNet(first.parse().ok()?, protocol, port, net)
            }
        };
        parts.next().is_none().then_some(entry)
    }

    /// The first address.
    pub const fn address(self) -> Option<IpAddr> {
        match self {
            Self::Ip(address)
            | Self::IpPort(address, ..)
            | Self::IpPortIp(address, ..)
            | Self::IpPortNet(address, ..) => Some(address),
            Self::Port(_) => None,
        }
    }
}

/// ipset leaves out the length of a whole address.
fn parse_net(text: &str) -> Option<Cidr> {
    if text.contains('/') {
        return text.parse().ok();
    }
    let base: IpAddr = text.parse().ok()?;
    let prefix = if base.is_ipv4() { 32 } else { 128 };
    Some(Cidr { base, prefix })
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => write!(f, "{address}"),
            Self::IpPort(address, protocol, port) => write!(f, "{address},{protocol}:{port}"),
            Self::IpPortIp(address, protocol, port, second) => {
                write!(f, "{address},{protocol}:{port},{second}")
            }
            Self::IpPortNet(address, protocol, port, net) => {
                write!(f, "{address},{protocol}:{port},")?;
                let whole = if net.base.is_ipv4() { 32 } else { 128 };
                if net.prefix == whole {
                    write!(f, "{}", net.base)
                } else {
                    write!(f, "{net}")
                }
            }
            Self::Port(port) => write!(f, "{port}"),
        }
    }
}

/// An entry and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The entry.
    pub entry: Entry,
    /// Matches in it do not count: `nomatch`.
    pub except: bool,
    /// It goes away after this many seconds; kube-proxy's never do.
    pub timeout: Option<u32>,
    /// The line it stands on, from 1.
    pub line: u32,
}

/// One of kube-proxy's sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// What it is for.
    pub role: Role,
    /// For which family: told by the name.
    pub family: Family,
    /// Its type.
    pub kind: SetKind,
    /// What it was made with that matters: all but `hashsize`, `bucketsize`, `initval`,
    /// `counters` and `comment`, each option with its value, sorted.
    pub options: Vec<String>,
    /// The line that makes it, from 1.
    pub line: u32,
    /// The entries, in the order of the dump.
    pub members: Vec<Member>,
}

impl Set {
    /// Its full name.
    pub fn name(&self) -> String {
        self.role.set_name(self.family)
    }
}

impl fmt::Display for Set {
    /// As ipset writes it, without the entries and with the options sorted.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "create {} {}", self.name(), self.kind.name())?;
        write_words(f, &self.options)
    }
}

/// A set that is none of kube-proxy's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignSet {
    /// Its name.
    pub name: String,
    /// Its type.
    pub kind: String,
    /// How many entries it has.
    pub entries: u64,
}

/// What `ipset save` prints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    /// kube-proxy's sets, in the order of the dump. One that stands there twice is kept twice; the
    /// entries belong to the first.
    pub list: Vec<Set>,
    /// Entries of sets of kube-proxy's that are not there: only an edited dump has them.
    pub orphans: Vec<(Family, Role, Member)>,
    /// The sets of others.
    pub foreign: Vec<ForeignSet>,
}

/// A set of the dump, by the name it has there.
enum Known {
    /// Index in [`Sets::list`].
    Ours(usize),
    /// Index in [`Sets::foreign`].
    Foreign(usize),
}

impl Sets {
    /// Reads what `ipset save` prints.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let mut sets = Self::default();
        let mut by_name: HashMap<&str, Known> = HashMap::new();
        for (line, text) in numbered_lines(text)? {
            let error = |problem| ParseError::new(line, problem, text);
            let mut words = text.splitn(3, ' ');
            let (Some(verb), Some(name), Some(rest)) = (words.next(), words.next(), words.next())
            else {
                return Err(error("a line is 'create SET TYPE' or 'add SET ENTRY'"));
            };
            match verb {
                "create" => {
                    let known = if let Some((family, role)) = Role::of(name) {
                        let set = parse_set(family, role, rest, line).map_err(error)?;
                        sets.list.push(set);
                        Known::Ours(sets.list.len() - 1)
                    } else {
                        sets.foreign.push(ForeignSet {
                            name: name.to_owned(),
                            kind: rest.split(' ').next().unwrap_or_default().to_owned(),
                            entries: 0,
                        });
                        Known::Foreign(sets.foreign.len() - 1)
                    };
                    by_name.entry(name).or_insert(known);
                }
                "add" => match by_name.get(name) {
                    Some(Known::Ours(index)) => {
                        if let Some(set) = sets.list.get_mut(*index) {
                            set.members
                                .push(parse_member(set.kind, rest, line).map_err(error)?);
                        }
                    }
                    Some(Known::Foreign(index)) => {
                        if let Some(set) = sets.foreign.get_mut(*index) {
                            set.entries += 1;
                        }
                    }
                    None => {
                        let (family, role) =
                            Role::of(name).ok_or_else(|| error("an entry of no set"))?;
                        let member = SetKind::ALL
                            .into_iter()
                            .find_map(|kind| parse_member(kind, rest, line).ok())
                            .ok_or_else(|| error("an entry that is none"))?;
                        sets.orphans.push((family, role, member));
                    }
                },
                _ => return Err(error("a line begins with create or add")),
            }
        }
        Ok(sets)
    }

    /// The set with this purpose.
    pub fn get(&self, family: Family, role: Role) -> Option<&Set> {
        self.list
            .iter()
            .find(|set| set.family == family && set.role == role)
    }
}

impl fmt::Display for Sets {
    /// The input of `ipset restore` for kube-proxy's sets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for set in &self.list {
            writeln!(f, "{set}")?;
            for member in &set.members {
                writeln!(f, "add {} {member}", set.name())?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.entry)?;
        if let Some(timeout) = self.timeout {
            write!(f, " timeout {timeout}")?;
        }
        if self.except {
            f.write_str(" nomatch")?;
        }
        Ok(())
    }
}

fn parse_set(family: Family, role: Role, rest: &str, line: u32) -> Result<Set, &'static str> {
    let mut words = rest.split_ascii_whitespace();
    let kind = words
        .next()
        .and_then(SetKind::of)
        .ok_or("a set of kube-proxy's has another type")?;
    let mut options = Vec::new();
    while let Some(option) = words.next() {
        let takes_value = !matches!(
            option,
            "counters" | "comment" | "skbinfo" | "forceadd" | "-exist"
        );
        let value = if takes_value {
            Some(words.next().ok_or("a set's option has no value")?)
        } else {
            None
        };
        match option {
            "hashsize" | "bucketsize" | "initval" | "counters" | "comment" | "-exist" => {}
            // Both are the default and printed or not by version.
            "maxelem" if value == Some("65536") => {}
            _ => options.push(match value {
                Some(value) => format!("{option} {value}"),
                None => option.to_owned(),
            }),
        }
    }
    options.sort_unstable();
    Ok(Set {
        role,
        family,
        kind,
        options,
        line,
        members: Vec::new(),
    })
}

fn parse_member(kind: SetKind, rest: &str, line: u32) -> Result<Member, &'static str> {
    let (entry, options) = rest.split_once(' ').unwrap_or((rest, ""));
    let entry = Entry::parse(kind, entry).ok_or("an entry is not of its set's type")?;
    // A comment is the last option, quoted, and may hold anything.
    let options = options.split(" comment \"").next().unwrap_or_default();
    let options = if options.starts_with("comment \"") {
        ""
    } else {
        options
    };
    let mut timeout = None;
    let mut except = false;
    let mut words = options.split_ascii_whitespace();
    while let Some(option) = words.next() {
        match option {
            "nomatch" => except = true,
            "timeout" => {
                let seconds = words.next().and_then(|seconds| seconds.parse().ok());
                timeout = Some(seconds.ok_or("a timeout is a number of seconds")?);
            }
            "packets" | "bytes" => {
                words.next().ok_or("a counter has no value")?;
            }
            _ => return Err("an entry has an unknown option"),
        }
    }
    Ok(Member {
        entry,
        except,
        timeout,
        line,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rules::ipvs::tests::mutated;

    const REAL: &str = include_str!("../fixtures/kube-proxy-1.36.2/ipvs/ipset.save");

    #[test]
    fn a_real_dump_is_read_and_written_back() {
        let sets = Sets::parse(REAL).expect("a real dump");
        assert_eq!(sets.list.len(), 34);
        assert!(sets.orphans.is_empty() && sets.foreign.is_empty());
        let mut lines = REAL
            .lines()
            .map(|line| line.split(" hashsize ").next().unwrap_or_default());
        for (written, real) in sets.to_string().lines().zip(&mut lines) {
            assert_eq!(written, real);
        }
        assert_eq!(lines.next(), None);
        for role in Role::ALL {
            for family in Family::ALL {
                assert_eq!(sets.get(family, role).map(|set| set.role), Some(role));
            }
        }
    }

    #[test]
    fn other_versions_and_options_are_read() {
        let old = "create KUBE-CLUSTER-IP hash:ip,port family inet hashsize 1024 maxelem 65536\n";
        let new = "create KUBE-CLUSTER-IP hash:ip,port family inet hashsize 4096 maxelem 65536 \
                   counters comment bucketsize 12 initval 0x1\n\
                   add KUBE-CLUSTER-IP 10.96.0.1,tcp:443 packets 1 bytes 60 comment \"a timeout b\"\n\
                   add KUBE-CLUSTER-IP 10.96.0.2,tcp:443 timeout 30 nomatch comment \"x\"\n\
                   add KUBE-CLUSTER-IP 10.96.0.3,tcp:443 comment \"y\"\n";
        let old = Sets::parse(old).expect("old");
        let new = Sets::parse(new).expect("new");
        assert_eq!(old.list[0].options, new.list[0].options);
        let members: Vec<String> = new.list[0].members.iter().map(Member::to_string).collect();
        assert_eq!(
            members,
            [
                "10.96.0.1,tcp:443",
                "10.96.0.2,tcp:443 timeout 30 nomatch",
                "10.96.0.3,tcp:443"
            ]
        );
    }

    #[test]
    fn sets_of_others_are_kept_apart() {
        let text = "create cali40all-ipam-pools hash:net family inet hashsize 1024 maxelem 1048576\n\
                    add cali40all-ipam-pools 10.244.0.0/16\n\
                    create KUBE-SRC-ABC hash:ip family inet hashsize 1024 maxelem 65536 timeout 0\n\
                    create docker-x list:set size 8\n";
        let sets = Sets::parse(text).expect("valid");
        assert!(sets.list.is_empty());
        let foreign: Vec<_> = sets
            .foreign
            .iter()
            .map(|set| (set.name.as_str(), set.entries))
            .collect();
        assert_eq!(
            foreign,
            [
                ("cali40all-ipam-pools", 1),
                ("KUBE-SRC-ABC", 0),
                ("docker-x", 0)
            ]
        );
    }

    #[test]
    fn what_is_no_dump_names_its_line() {
        let head = "create KUBE-CLUSTER-IP hash:ip,port family inet\n";
        for (tail, problem) in [
            ("add KUBE-CLUSTER-IP 10.96.0.1,tcp:44", "cut"),
            ("add KUBE-CLUSTER-IP 10.96.0.1\n", "type"),
            ("add KUBE-CLUSTER-IP 10.96.0.1,tcp:70000\n", "type"),
            ("add KUBE-CLUSTER-IP 10.96.0.1,tcp:80,10.0.0.1\n", "type"),
            ("add KUBE-CLUSTER-IP 10.96.0.1,icmp:80\n", "type"),
            ("add KUBE-CLUSTER-IP 10.96.0.1,tcp:80 what\n", "option"),
            (
                "add KUBE-CLUSTER-IP 10.96.0.1,tcp:80 timeout x\n",
                "timeout",
            ),
            ("add nothing 10.96.0.1,tcp:80\n", "no set"),
            (
                "create KUBE-IPVS-IPS hash:net family inet\n",
                "another type",
            ),
            ("create KUBE-IPVS-IPS hash:ip family\n", "no value"),
            ("add\n", "a line is"),
            ("del KUBE-CLUSTER-IP 10.96.0.1,tcp:80\n", "begins with"),
        ] {
            let error = Sets::parse(&format!("{head}{tail}")).expect_err(tail);
            assert_eq!(error.line, 2, "{tail}");
            assert!(error.to_string().contains(problem), "{error}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in mutated(REAL)) {
            if let Ok(sets) = Sets::parse(&text) {
                let again = Sets::parse(&sets.to_string()).expect("what was written");
                prop_assert_eq!(again.list.len(), sets.list.len());
            }
        }
    }
}
