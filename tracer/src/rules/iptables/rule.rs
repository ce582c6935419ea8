//! iptables' tables as the kernel holds them: chains of typed rules, borrowed from the text that
//! they were read from.
//!
//! Two rules are equal if the kernel would hold the same for them, however they were written;
//! where they stood is no part of that. They print as `iptables-save` does.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::hash::{Hash, Hasher};
use std::net::IpAddr;

use crate::cluster::{Cidr, Family};

/// The tables of one IP family.
#[derive(Clone, Debug)]
pub struct Tables<'a> {
    /// IP family.
    pub family: Family,
    /// The tables, in the order they were read.
    pub list: Vec<Table<'a>>,
}

impl<'a> Tables<'a> {
    /// As `iptables-save` prints them, but for the order of chains.
    pub fn saved(&self) -> String {
        let mut save = String::new();
        for table in &self.list {
            let built_in = built_in_chains(table.name);
            // Writing into a String cannot fail, here and below.
            let _ = writeln!(save, "*{}", table.name);
            for base in built_in {
                let _ = writeln!(save, ":{base} ACCEPT [0:0]");
            }
            let own = |chain: &&Chain<'_>| !built_in.contains(&chain.name);
            for chain in table.chains.iter().filter(own) {
                let _ = writeln!(save, ":{} - [0:0]", chain.name);
            }
            for chain in &table.chains {
                for rule in &chain.rules {
                    save.push_str(&rule.in_chain(chain.name));
                    save.push('\n');
                }
            }
            save.push_str("COMMIT\n");
        }
        save
    }

    /// No tables, as in a kernel that iptables has not touched.
    pub const fn none(family: Family) -> Self {
        Self {
            family,
            list: Vec::new(),
        }
    }

    /// The table of this name.
    pub fn table(&self, name: &str) -> Option<&Table<'a>> {
        self.list.iter().find(|table| table.name == name)
    }

    /// The chain of this name in the table of this name.
    pub fn chain(&self, table: &str, chain: &str) -> Option<&Chain<'a>> {
        self.table(table)?.chain(chain)
    }
}

/// One table.
#[derive(Clone, Debug)]
pub struct Table<'a> {
    /// `filter`, `nat`, `mangle`, `raw`, `security`.
    pub name: &'a str,
    /// Its chains, in the order they were read.
    pub chains: Vec<Chain<'a>>,
    pub(super) index: HashMap<&'a str, usize>,
}

impl<'a> Table<'a> {
    /// The chain of this name.
    pub fn chain(&self, name: &str) -> Option<&Chain<'a>> {
        self.chains.get(*self.index.get(name)?)
    }
}

/// The chains that a table has from the start.
pub fn built_in_chains(table: &str) -> &'static [&'static str] {
    match table {
        "filter" | "security" => &["INPUT", "FORWARD", "OUTPUT"],
        "nat" => &["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"],
        "mangle" => &["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"],
        "raw" => &["PREROUTING", "OUTPUT"],
        _ => &[],
    }
}

/// One chain.
#[derive(Clone, Debug)]
pub struct Chain<'a> {
    /// Its name.
    pub name: &'a str,
    /// What happens to a packet at the end of a built-in chain, if the text says so.
    pub policy: Option<Policy>,
    /// The line, from 1, that declares it. `None` for a built-in chain in the input of
    /// `iptables-restore`, where it need not be declared, and for a chain that only rules show,
    /// which is no whole dump.
    pub declared: Option<u32>,
    /// Its rules.
    pub rules: Vec<Rule<'a>>,
}

/// What happens to a packet at the end of a built-in chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Policy {
    /// It goes on.
    Accept,
    /// It is dropped.
    Drop,
}

/// Something that a packet must have, or with `!` must not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Not<T> {
    /// Was there a `!`?
    pub negated: bool,
    /// What is compared.
    pub value: T,
}

impl<T> Not<T> {
    /// Without `!`.
    pub const fn is(value: T) -> Self {
        Self {
            negated: false,
            value,
        }
    }

    /// Is it fulfilled, if `found` says whether the packet has the value?
    pub fn holds(&self, found: impl FnOnce(&T) -> bool) -> bool {
        found(&self.value) != self.negated
    }

    const fn bang(&self) -> &'static str {
        if self.negated { " !" } else { "" }
    }
}

/// One rule.
#[derive(Clone, Debug)]
pub struct Rule<'a> {
    /// The line it was read from, from 1.
    pub line: u32,
    /// Can `iptables-save` have printed its networks and probability so? Not with bits of an address
    /// outside of its network, for one: the kernel has forgotten those.
    pub as_printed: bool,
    /// `-s`; `None` for any.
    pub source: Option<Not<Cidr>>,
    /// `-d`; `None` for any.
    pub destination: Option<Not<Cidr>>,
    /// `-i`; a name that ends in `+` stands for all that begin so.
    pub in_interface: Option<Not<&'a str>>,
    /// `-o`; a name that ends in `+` stands for all that begin so.
    pub out_interface: Option<Not<&'a str>>,
    /// `-p`; `None` for any.
    pub protocol: Option<Not<IpProtocol>>,
    /// `-m`, in the order in which the kernel asks them.
    pub matches: Box<[Match<'a>]>,
    /// `-j` or `-g`.
    pub target: Target<'a>,
}

impl<'a> Rule<'a> {
    /// A rule that matches everything and does nothing.
    pub(super) fn empty(line: u32) -> Self {
        Self {
            line,
            as_printed: true,
            source: None,
            destination: None,
            in_interface: None,
            out_interface: None,
            protocol: None,
            matches: Box::default(),
            target: Target::None,
        }
    }

    /// Everything but where it stood and how it was written.
    fn parts(&self) -> impl PartialEq + Hash {
        (
            self.source,
            self.destination,
            self.in_interface,
            self.out_interface,
            self.protocol,
            &self.matches,
            &self.target,
        )
    }

    /// The first comment.
    pub fn comment(&self) -> Option<&str> {
        self.matches.iter().find_map(|part| match part {
            Match::Comment(comment) => Some(comment.as_ref()),
            _ => None,
        })
    }

    /// The chain it jumps or goes to.
    pub fn chain(&self) -> Option<&'a str> {
        match self.target {
            Target::Jump(chain) | Target::Goto(chain) => Some(chain),
            _ => None,
        }
    }

    /// As `iptables-save` prints it in `chain`.
    pub fn in_chain(&self, chain: &str) -> String {
        format!("-A {chain}{self}")
    }
}

impl PartialEq for Rule<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.destination == other.destination
            && self.source == other.source
            && self.protocol == other.protocol
            && self.target == other.target
            && self.matches == other.matches
            && self.in_interface == other.in_interface
            && self.out_interface == other.out_interface
    }
}

impl Eq for Rule<'_> {}

impl Hash for Rule<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.parts().hash(state);
    }
}

/// An IP protocol's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpProtocol(pub u8);

impl IpProtocol {
    /// TCP.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);
    /// SCTP.
    pub const SCTP: Self = Self(132);

    /// Numbers and names; of several names, the one that `iptables-save` prints comes first.
    const NAMES: [(u8, &'static str); 23] = [
        (6, "tcp"),
        (17, "udp"),
        (132, "sctp"),
        (1, "icmp"),
        (58, "ipv6-icmp"),
        (58, "icmpv6"),
        (58, "icmp6"),
        (2, "igmp"),
        (4, "ipencap"),
        (33, "dccp"),
        (41, "ipv6"),
        (47, "gre"),
        (50, "esp"),
        (51, "ah"),
        (89, "ospf"),
        (94, "ipip"),
        (103, "pim"),
        (112, "vrrp"),
        (115, "l2tp"),
        (135, "mobility-header"),
        (135, "ipv6-mh"),
        (135, "mh"),
        (136, "udplite"),
    ];

    /// Reads a name or a number.
    pub(super) fn parse(text: &str) -> Option<Self> {
        Self::NAMES
            .iter()
            .find(|(_, name)| text.eq_ignore_ascii_case(name))
            .map(|(number, _)| *number)
            .or_else(|| text.parse().ok())
            .map(Self)
    }
}

impl fmt::Display for IpProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::NAMES.iter().find(|(number, _)| *number == self.0) {
            Some((_, name)) => f.write_str(name),
            None => write!(f, "{}", self.0),
        }
    }
}

/// Ports from the first to the last, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The lowest.
    pub first: u16,
    /// The highest.
    pub last: u16,
}

impl Ports {
    /// Is `port` one of them?
    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}:{}", self.first, self.last)
        }
    }
}

/// One match of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Match<'a> {
    /// `-m comment`, which any packet fulfils.
    Comment(Cow<'a, str>),
    /// `-m tcp`, `-m udp`, `-m sctp`, as far as they look at ports.
    Transport(Transport),
    /// `-m multiport`.
    Multiport(Box<Multiport>),
    /// `-m conntrack --ctstate`, `-m state --state`.
    Conntrack(Not<CtStates>),
    /// `-m statistic --mode random`: the probability in units of 2^-31, as the kernel holds it.
    Statistic(Not<u32>),
    /// `-m recent`.
    Recent(Box<Recent<'a>>),
    /// `-m mark`.
    Mark(Not<Mark>),
    /// `-m nfacct`, which any packet fulfils: the name of the counter.
    Nfacct(&'a str),
    /// `-m addrtype`.
    AddrType(AddrType),
    /// `-m set`.
    Set(Not<SetMatch<'a>>),
    /// `-m ipvs`.
    Ipvs(Box<IpvsMatch>),
    /// `-m physdev`, as far as it asks whether there is a bridge port.
    Physdev(Physdev),
    /// One that is not understood, and kept.
    Other(Words<'a>),
}

/// `-m tcp`, `-m udp`, `-m sctp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Transport {
    /// Which.
    pub protocol: IpProtocol,
    /// `--sport`; `None` for any.
    pub source: Option<Not<Ports>>,
    /// `--dport`; `None` for any.
    pub destination: Option<Not<Ports>>,
}

/// `-m multiport`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Multiport {
    /// Which of the packet's ports.
    pub side: PortSide,
    /// The ports, with `!` none of them.
    pub ports: Not<Vec<Ports>>,
}

/// Which of a packet's ports `-m multiport` looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PortSide {
    /// `--sports`.
    Source,
    /// `--dports`.
    Destination,
    /// `--ports`.
    Either,
}

/// A set of names, each a bit, as some matches take them separated by commas.
macro_rules! names {
    ($(#[$doc:meta])* $type:ident($bits:ty): $($name:literal = $constant:ident),+ $(,)?) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $type($bits);

        impl $type {
            const NAMES: &'static [&'static str] = &[$($name),+];
            names!(@constants $bits, 1; $($name $constant)+);

            /// Does it have one of `other`'s?
            pub const fn intersects(self, other: Self) -> bool {
                self.0 & other.0 != 0
            }

            /// Reads names separated by commas.
            pub(super) fn parse(text: &str) -> Option<Self> {
                let mut bits = 0;
                for name in text.split(',') {
                    let bit = Self::NAMES.iter().position(|known| *known == name)?;
                    bits |= 1 << bit;
                }
                Some(Self(bits))
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut comma = "";
                for (bit, name) in Self::NAMES.iter().enumerate() {
                    if self.0 & (1 << bit) != 0 {
                        write!(f, "{comma}{name}")?;
                        comma = ",";
                    }
                }
                Ok(())
            }
        }
    };
    (@constants $bits:ty, $bit:expr; $name:literal $constant:ident $($rest:tt)*) => {
        #[doc = concat!("`", $name, "`.")]
        pub const $constant: Self = Self($bit);
        names!(@constants $bits, $bit << 1; $($rest)*);
    };
    (@constants $bits:ty, $bit:expr;) => {};
}

names! {
    /// conntrack's states of a packet, in the order in which `iptables-save` prints them.
    CtStates(u8):
    "INVALID" = INVALID, "NEW" = NEW, "RELATED" = RELATED, "ESTABLISHED" = ESTABLISHED,
    "UNTRACKED" = UNTRACKED, "SNAT" = SNAT, "DNAT" = DNAT,
}

names! {
    /// The kernel's types of addresses, in the order in which `iptables-save` prints them.
    AddrTypes(u16):
    "UNSPEC" = UNSPEC, "UNICAST" = UNICAST, "LOCAL" = LOCAL, "BROADCAST" = BROADCAST,
    "ANYCAST" = ANYCAST, "MULTICAST" = MULTICAST, "BLACKHOLE" = BLACKHOLE,
    "UNREACHABLE" = UNREACHABLE, "PROHIBIT" = PROHIBIT, "THROW" = THROW, "NAT" = NAT,
    "XRESOLVE" = XRESOLVE,
}

/// A value, and which of its bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mark {
    /// The value.
    pub value: u32,
    /// The bits.
    pub mask: u32,
}

/// `-m recent`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Recent<'a> {
    /// The list.
    pub name: &'a str,
    /// What is done, with `!` if the match is to fail where it would succeed.
    pub action: Not<RecentAction>,
    /// `--seconds`: 0 for none.
    pub seconds: u32,
    /// `--hitcount`: 0 for none.
    pub hit_count: u32,
    /// `--reap`: older entries are deleted.
    pub reap: bool,
    /// `--rttl`: the TTL must be the same.
    pub ttl: bool,
    /// `--mask` of the address.
    pub mask: IpAddr,
    /// `--rdest` rather than `--rsource`.
    pub destination: bool,
}

/// What `-m recent` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecentAction {
    /// Remembers the address.
    Set,
    /// Is it remembered?
    Check,
    /// Is it remembered? If so, it was seen now.
    Update,
    /// Is it remembered? If so, forgets it.
    Remove,
}

impl RecentAction {
    const fn name(self) -> &'static str {
        match self {
            Self::Set => "set",
            Self::Check => "rcheck",
            Self::Update => "update",
            Self::Remove => "remove",
        }
    }
}

/// `-m addrtype`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AddrType {
    /// `--src-type`.
    pub source: Option<Not<AddrTypes>>,
    /// `--dst-type`.
    pub destination: Option<Not<AddrTypes>>,
}

/// `-m set --match-set`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SetMatch<'a> {
    /// The set.
    pub name: &'a str,
    /// Which of the packet's sides gives each dimension.
    pub sides: Sides,
}

/// `src` and `dst`, up to six.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Sides {
    count: u8,
    sources: u8,
}

impl Sides {
    /// The most dimensions that a set can have (`IPSET_DIM_MAX`).
    const MAX: u8 = 6;

    /// Reads `src` and `dst`, separated by commas.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut sides = Self::default();
        for side in text.split(',') {
            if sides.count == Self::MAX {
                return None;
            }
            sides.sources |= match side {
                "src" => 1 << sides.count,
                "dst" => 0,
                _ => return None,
            };
            sides.count += 1;
        }
        Some(sides)
    }

    /// For each dimension, whether the packet's source gives it.
    pub fn are_sources(self) -> impl Iterator<Item = bool> {
        (0..self.count).map(move |side| self.sources & (1 << side) != 0)
    }
}

impl fmt::Display for Sides {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, source) in self.are_sources().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}", if source { "src" } else { "dst" })?;
        }
        Ok(())
    }
}

/// `-m ipvs`: the virtual server that the packet's IPVS connection is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct IpvsMatch {
    /// `--vproto`.
    pub protocol: Option<Not<IpProtocol>>,
    /// `--vaddr`.
    pub address: Option<Not<Cidr>>,
    /// `--vport`.
    pub port: Option<Not<u16>>,
}

/// `-m physdev`: whether the packet came in or goes out through a bridge's port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Physdev {
    /// `--physdev-is-in`, or with `!` that it is not.
    pub is_in: Option<bool>,
    /// `--physdev-is-out`, or with `!` that it is not.
    pub is_out: Option<bool>,
    /// `--physdev-is-bridged`, or with `!` that it is not.
    pub is_bridged: Option<bool>,
}

/// The words of a match or target that is not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Words<'a> {
    /// Its name; empty for an option of iptables itself.
    pub name: &'a str,
    /// Its options as they were written.
    pub options: &'a str,
}

/// What a rule does with a packet that matches.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target<'a> {
    /// Nothing: the rule only counts.
    None,
    /// The packet leaves the table.
    Accept,
    /// The packet is dropped.
    Drop,
    /// Back to the calling chain.
    Return,
    /// To a chain, and back here after it.
    Jump(&'a str),
    /// To a chain, and back to where this one would have returned to.
    Goto(&'a str),
    /// `REJECT`: the kind of answer, `icmp-port-unreachable` or `icmp6-port-unreachable` if not
    /// told otherwise.
    Reject(&'a str),
    /// `MARK`: the bits of the mask are cleared, then those of the value flipped.
    Mark(Mark),
    /// `MASQUERADE`.
    Masquerade {
        /// `--random-fully`.
        random_fully: bool,
    },
    /// `DNAT` to one address, port or both.
    Dnat(Dnat),
    /// One that is not understood, and kept.
    Other(Words<'a>),
}

/// `DNAT --to-destination`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dnat {
    /// The new address; `None` keeps it.
    pub address: Option<IpAddr>,
    /// The new port; `None` keeps it.
    pub port: Option<u16>,
    /// `--random`.
    pub random: bool,
    /// `--persistent`.
    pub persistent: bool,
}

impl fmt::Display for Rule<'_> {
    /// With a leading space, so that `-A CHAIN` can stand before it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(source) = &self.source {
            write!(f, "{} -s {}", source.bang(), source.value)?;
        }
        if let Some(destination) = &self.destination {
            write!(f, "{} -d {}", destination.bang(), destination.value)?;
        }
        if let Some(interface) = &self.in_interface {
            write!(f, "{} -i {}", interface.bang(), interface.value)?;
        }
        if let Some(interface) = &self.out_interface {
            write!(f, "{} -o {}", interface.bang(), interface.value)?;
        }
        if let Some(protocol) = &self.protocol {
            write!(f, "{} -p {}", protocol.bang(), protocol.value)?;
        }
        for part in &self.matches {
            part.fmt(f)?;
        }
        self.target.fmt(f)
    }
}

impl fmt::Display for Match<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Comment(comment) => {
                f.write_str(" -m comment --comment ")?;
                write_string(f, comment)
            }
            Self::Transport(transport) => transport.fmt(f),
            Self::Multiport(multiport) => multiport.fmt(f),
            Self::Conntrack(states) => {
                write!(
                    f,
                    " -m conntrack{} --ctstate {}",
                    states.bang(),
                    states.value
                )
            }
            Self::Statistic(probability) => write!(
                f,
                " -m statistic --mode random{} --probability {:.11}",
                probability.bang(),
                f64::from(probability.value) / PROBABILITY_ONE
            ),
            Self::Recent(recent) => recent.fmt(f),
            Self::Mark(mark) => {
                write!(f, " -m mark{} --mark {:#x}", mark.bang(), mark.value.value)?;
                if mark.value.mask != u32::MAX {
                    write!(f, "/{:#x}", mark.value.mask)?;
                }
                Ok(())
            }
            // Two spaces: so it is printed, and so a dump shows it.
            Self::Nfacct(name) => write!(f, " -m nfacct --nfacct-name  {name}"),
            Self::AddrType(types) => {
                f.write_str(" -m addrtype")?;
                if let Some(source) = &types.source {
                    write!(f, "{} --src-type {}", source.bang(), source.value)?;
                }
                if let Some(destination) = &types.destination {
                    write!(f, "{} --dst-type {}", destination.bang(), destination.value)?;
                }
                Ok(())
            }
            Self::Set(set) => write!(
                f,
                " -m set{} --match-set {} {}",
                set.bang(),
                set.value.name,
                set.value.sides
            ),
            Self::Ipvs(ipvs) => ipvs.fmt(f),
            Self::Physdev(physdev) => physdev.fmt(f),
            Self::Other(words) if words.name.is_empty() => write!(f, " {}", words.options),
            Self::Other(words) => write!(f, " -m {words}"),
        }
    }
}

/// The kernel's probability of 1.
pub(super) const PROBABILITY_ONE: f64 = 2_147_483_648.0;

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, " -m {}", self.protocol)?;
        if let Some(ports) = &self.source {
            write!(f, "{} --sport {}", ports.bang(), ports.value)?;
        }
        if let Some(ports) = &self.destination {
            write!(f, "{} --dport {}", ports.bang(), ports.value)?;
        }
        Ok(())
    }
}

impl fmt::Display for Multiport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let option = match self.side {
            PortSide::Source => "sports",
            PortSide::Destination => "dports",
            PortSide::Either => "ports",
        };
        write!(f, " -m multiport{} --{option} ", self.ports.bang())?;
        for (index, ports) in self.ports.value.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{ports}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Recent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            " -m recent{} --{}",
            self.action.bang(),
            self.action.value.name()
        )?;
        if self.seconds > 0 {
            write!(f, " --seconds {}", self.seconds)?;
        }
        if self.reap {
            f.write_str(" --reap")?;
        }
        if self.hit_count > 0 {
            write!(f, " --hitcount {}", self.hit_count)?;
        }
        if self.ttl {
            f.write_str(" --rttl")?;
        }
        let side = if self.destination {
            "--rdest"
        } else {
            "--rsource"
        };
        write!(f, " --name {} --mask {} {side}", self.name, self.mask)
    }
}

impl fmt::Display for IpvsMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(" -m ipvs")?;
        if let Some(protocol) = &self.protocol {
            write!(f, "{} --vproto {}", protocol.bang(), protocol.value.0)?;
        }
        if let Some(address) = &self.address {
            write!(f, "{} --vaddr {}", address.bang(), address.value.base)?;
            if address.value.prefix != full_length(address.value.family()) {
                write!(f, "/{}", address.value.prefix)?;
            }
        }
        if let Some(port) = &self.port {
            write!(f, "{} --vport {}", port.bang(), port.value)?;
        }
        Ok(())
    }
}

/// The length of a network that is one address.
pub(super) const fn full_length(family: Family) -> u8 {
    match family {
        Family::V4 => 32,
        Family::V6 => 128,
    }
}

impl fmt::Display for Physdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(" -m physdev")?;
        for (wanted, option) in [
            (self.is_in, "--physdev-is-in"),
            (self.is_out, "--physdev-is-out"),
            (self.is_bridged, "--physdev-is-bridged"),
        ] {
            match wanted {
                Some(true) => write!(f, " {option}")?,
                Some(false) => write!(f, " ! {option}")?,
                None => {}
            }
        }
        Ok(())
    }
}

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        if !self.options.is_empty() {
            write!(f, " {}", self.options)?;
        }
        Ok(())
    }
}

impl fmt::Display for Target<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::Accept => f.write_str(" -j ACCEPT"),
            Self::Drop => f.write_str(" -j DROP"),
            Self::Return => f.write_str(" -j RETURN"),
            Self::Jump(chain) => write!(f, " -j {chain}"),
            Self::Goto(chain) => write!(f, " -g {chain}"),
            Self::Reject(with) => write!(f, " -j REJECT --reject-with {with}"),
            Self::Mark(mark) => {
                write!(f, " -j MARK --set-xmark {:#x}/{:#x}", mark.value, mark.mask)
            }
            Self::Masquerade { random_fully } => {
                f.write_str(" -j MASQUERADE")?;
                if *random_fully {
                    f.write_str(" --random-fully")?;
                }
                Ok(())
            }
            Self::Dnat(dnat) => dnat.fmt(f),
            Self::Other(words) => write!(f, " -j {words}"),
        }
    }
}

impl fmt::Display for Dnat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(" -j DNAT --to-destination ")?;
        match (self.address, self.port) {
            (Some(IpAddr::V6(address)), Some(_)) => write!(f, "[{address}]")?,
            (Some(address), _) => write!(f, "{address}")?,
            (None, _) => {}
        }
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        if self.random {
            f.write_str(" --random")?;
        }
        if self.persistent {
            f.write_str(" --persistent")?;
        }
        Ok(())
    }
}

/// As `xtables_save_string` of libxtables quotes.
fn write_string(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if !text.is_empty() && text.bytes().all(plain) {
        return f.write_str(text);
    }
    f.write_str("\"")?;
    for character in text.chars() {
        if matches!(character, '"' | '\\' | '\'') {
            f.write_str("\\")?;
        }
        write!(f, "{character}")?;
    }
    f.write_str("\"")
}
