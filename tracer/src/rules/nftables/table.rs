//! What one table `kube-proxy` holds: sets, maps, chains and rules as values.
//!
//! Two tables are equal if the kernel does the same with them: what nft spells in several ways
//! (`mark or`, `|`; a range and the networks in it; a set of one element) is one value here, and
//! neither order, handles, counters, nor the lines of a dump are part of it. `Display` writes what
//! `nft list` prints.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::cluster::{Cidr, Family, Protocol};
use crate::rules::walk::Hook;

/// The name of kube-proxy's table in either family.
pub const TABLE: &str = "kube-proxy";

/// A name or a text in a dump.
pub type Text = Box<str>;

/// The line of a dump where a thing stands, from 1; 0 where there is none.
///
/// Any two are equal: where a thing stands is no part of what it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Line(pub u32);

impl PartialEq for Line {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Line {}

impl Line {
    /// The line, if there is one.
    pub fn known(self) -> Option<u32> {
        (self.0 != 0).then_some(self.0)
    }
}

/// Everything that `nft list ruleset` or a part of it shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// `table ip kube-proxy`.
    pub ip: Option<Table>,
    /// `table ip6 kube-proxy`.
    pub ip6: Option<Table>,
    /// Every other table: its family and name, in the order of the dump.
    pub foreign: Vec<(Text, Text)>,
    /// Those of them that packets pass: with a base chain, and not dormant.
    pub hooked: Vec<(Text, Text)>,
}

impl Ruleset {
    /// kube-proxy's table of a family.
    pub fn table(&self, family: Family) -> Option<&Table> {
        match family {
            Family::V4 => self.ip.as_ref(),
            Family::V6 => self.ip6.as_ref(),
        }
    }

    /// Where kube-proxy's table of a family goes.
    pub(super) fn slot(&mut self, family: Family) -> &mut Option<Table> {
        match family {
            Family::V4 => &mut self.ip,
            Family::V6 => &mut self.ip6,
        }
    }
}

/// A table `kube-proxy`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// `ip` or `ip6`.
    pub family: Family,
    /// Comment.
    pub comment: Option<Text>,
    /// Has it the flag `dormant`? Then the kernel evaluates none of its chains.
    pub dormant: bool,
    /// Sets and maps by name.
    pub sets: BTreeMap<Text, Set>,
    /// Chains by name.
    pub chains: BTreeMap<Text, Chain>,
    /// Objects that kube-proxy does not make (flowtables, named counters, …): kind and name.
    pub others: BTreeMap<Text, Line>,
    /// Where the table begins.
    pub line: Line,
}

impl Table {
    /// An empty table.
    pub fn new(family: Family) -> Self {
        Self {
            family,
            ..Self::default()
        }
    }

    /// The table without what `nft -j` of nft 1.0.6 leaves out of a dump: comments of the table
    /// and of chains, and the flag `dynamic` of sets.
    #[must_use]
    pub fn as_json_shows(&self) -> Self {
        let mut shown = self.clone();
        shown.comment = None;
        for chain in shown.chains.values_mut() {
            chain.comment = None;
        }
        for set in shown.sets.values_mut() {
            set.flags.dynamic = false;
        }
        shown
    }

    /// Number of rules in all chains.
    pub fn rule_count(&self) -> usize {
        self.chains.values().map(|chain| chain.rules.len()).sum()
    }

    /// Number of elements in all sets and maps.
    pub fn element_count(&self) -> usize {
        self.sets.values().map(|set| set.elements.len()).sum()
    }
}

/// A set, or a map if its elements stand for something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set {
    /// The types of the parts of a key.
    pub key: Vec<DataType>,
    /// For a map, the type of what elements stand for.
    pub value: Option<DataType>,
    /// Flags.
    pub flags: SetFlags,
    /// After how many seconds an element that nothing updates is gone.
    pub timeout: Option<u64>,
    /// The largest number of elements.
    pub size: Option<u64>,
    /// Comment.
    pub comment: Option<Text>,
    /// What kube-proxy does not use, as written: `gc-interval`, `policy`, `auto-merge`.
    pub others: Vec<Text>,
    /// The elements.
    pub elements: BTreeMap<Key, Element>,
    /// Where the set begins.
    pub line: Line,
}

impl Set {
    /// The size that nft gives to a set without one when a rule updates it.
    pub const DYNAMIC_SIZE: u64 = 65535;

    /// Does the traffic itself add elements? Then they are no part of what kube-proxy configured.
    pub fn is_run_time_state(&self) -> bool {
        self.flags.dynamic || self.flags.timeout
    }
}

/// A set's flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetFlags {
    /// `dynamic`: rules add elements.
    pub dynamic: bool,
    /// `timeout`: elements go away by themselves.
    pub timeout: bool,
    /// `interval`: elements are ranges.
    pub interval: bool,
    /// `constant`.
    pub constant: bool,
}

/// The type of a key's part or of a map's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataType {
    /// `ipv4_addr` or `ipv6_addr`.
    Address(Family),
    /// `inet_proto`.
    Protocol,
    /// `inet_service`.
    Port,
    /// `verdict`.
    Verdict,
    /// Any other, as written.
    Other(Text),
}

/// The key of an element: the parts of a concatenation.
pub type Key = Box<[Value]>;

/// One element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Element {
    /// In a map, what it stands for.
    pub value: Option<Mapped>,
    /// Comment.
    pub comment: Option<Text>,
    /// Where it stands.
    pub line: Line,
}

/// What an element of a map stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mapped {
    /// A verdict.
    Verdict(Verdict),
    /// Anything else, as written.
    Other(Text),
}

/// A constant.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Value {
    /// An address.
    Address(IpAddr),
    /// A transport protocol.
    Protocol(Protocol),
    /// A number: a port, a mark.
    Number(u32),
    /// Anything else, as written without quotes: `new`, `local`, `br0`, `10.0.0.0-10.0.0.9`.
    Word(Text),
}

impl Value {
    /// The value that a word stands for.
    pub fn parse(word: &str) -> Self {
        match word.as_bytes().first() {
            Some(b'0'..=b'9') => {
                if let Some(number) = parse_number(word) {
                    return Self::Number(number);
                }
                if let Ok(address) = word.parse() {
                    return Self::Address(address);
                }
            }
            Some(b':' | b'a'..=b'f' | b'A'..=b'F') => {
                if let Ok(address) = word.parse::<Ipv6Addr>() {
                    return Self::Address(address.into());
                }
            }
            _ => {
                if let Some(protocol) = parse_protocol(word) {
                    return Self::Protocol(protocol);
                }
            }
        }
        Self::Word(word.into())
    }

    /// The value of a part of type `Protocol`, which may be written as a number.
    #[must_use]
    pub fn as_protocol(self) -> Self {
        match self {
            Self::Number(number) => Protocol::ALL
                .into_iter()
                .find(|protocol| u32::from(protocol.number()) == number)
                .map_or(Self::Number(number), Self::Protocol),
            other => other,
        }
    }
}

/// A decimal or hexadecimal number.
pub(super) fn parse_number(word: &str) -> Option<u32> {
    // The standard library also takes a sign.
    let (digits, radix) = match word.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (word, 10),
    };
    if digits.starts_with('+') {
        return None;
    }
    u32::from_str_radix(digits, radix).ok()
}

/// `tcp`, `udp` or `sctp`.
pub(super) fn parse_protocol(word: &str) -> Option<Protocol> {
    match word {
        "tcp" => Some(Protocol::Tcp),
        "udp" => Some(Protocol::Udp),
        "sctp" => Some(Protocol::Sctp),
        _ => None,
    }
}

/// A chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// For a base chain, where the kernel calls it.
    pub base: Option<Base>,
    /// Comment.
    pub comment: Option<Text>,
    /// The rules in their order.
    pub rules: Vec<Rule>,
    /// Where the chain begins.
    pub line: Line,
}

/// What makes a chain a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Type.
    pub kind: ChainKind,
    /// Hook.
    pub hook: Hook,
    /// Priority: the lower, the earlier.
    pub priority: i32,
    /// Does what no rule decides go on? `policy drop` if not.
    pub accepts: bool,
}

/// A base chain's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainKind {
    /// `filter`.
    Filter,
    /// `nat`: sees the first packet of a flow only.
    Nat,
    /// `route`.
    Route,
}

impl ChainKind {
    /// Every type.
    pub const ALL: [Self; 3] = [Self::Filter, Self::Nat, Self::Route];

    /// nft's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
            Self::Route => "route",
        }
    }
}

/// The hooks and nft's names for them.
pub(super) const HOOKS: [(&str, Hook); 5] = [
    ("prerouting", Hook::Prerouting),
    ("input", Hook::Input),
    ("forward", Hook::Forward),
    ("output", Hook::Output),
    ("postrouting", Hook::Postrouting),
];

/// The hook of this name.
pub(super) fn hook(name: &str) -> Option<Hook> {
    HOOKS
        .into_iter()
        .find_map(|(known, hook)| (known == name).then_some(hook))
}

/// The priorities that have names in the IP families.
pub(super) const PRIORITIES: [(&str, i32); 6] = [
    ("raw", -300),
    ("mangle", -150),
    ("dstnat", -100),
    ("filter", 0),
    ("security", 50),
    ("srcnat", 100),
];

/// A rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Statements in their order; counters are left out.
    pub statements: Vec<Statement>,
    /// Comment.
    pub comment: Option<Text>,
    /// Where it stands.
    pub line: Line,
}

/// A statement of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Statement {
    /// The rule goes on only if this holds.
    Match {
        /// What is looked at.
        fields: Vec<Field>,
        /// `!=`?
        negated: bool,
        /// What it is compared with.
        operand: Operand,
    },
    /// The verdict that a map has for the packet; without one the rule ends here.
    Vmap {
        /// What is looked up.
        fields: Vec<Field>,
        /// Where.
        map: VerdictMap,
    },
    /// A verdict.
    Verdict(Verdict),
    /// `reject`; `with` is what is sent, if not ICMP port unreachable.
    Reject {
        /// As written, such as `tcp reset`.
        with: Option<Text>,
    },
    /// Changes the packet's mark.
    Mark(MarkChange),
    /// `masquerade`.
    Masquerade(Masquerade),
    /// `dnat`.
    Dnat(Target),
    /// `update @set { fields }`.
    Update {
        /// The set.
        set: Text,
        /// The key.
        fields: Vec<Field>,
    },
    /// Anything else up to the end of the rule, as written.
    Other(Text),
}

/// What a match or a map looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// `ip saddr`, `ip6 saddr`.
    Source(Family),
    /// `ip daddr`, `ip6 daddr`.
    Destination(Family),
    /// `meta l4proto`.
    Protocol,
    /// `th dport`.
    Port,
    /// `tcp dport`: the port, of this protocol only.
    PortOf(Protocol),
    /// `ct state`.
    State,
    /// `ct status`.
    Status,
    /// `meta mark`.
    Mark,
    /// `meta mark & 0x…`.
    MarkAnd(u32),
    /// `fib saddr type`.
    SourceType,
    /// `fib daddr type`.
    DestinationType,
    /// `iifname`.
    InputInterface,
    /// `numgen random mod N`: 0 to N-1, each as likely.
    Random(u32),
}

/// What a match compares with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operand {
    /// Addresses in any of these ranges.
    Addresses(Ranges),
    /// Any of these, sorted, each once.
    Keys(Vec<Key>),
    /// Any element of a set.
    Set(Text),
}

impl Operand {
    /// Any of `keys`.
    pub fn keys(mut keys: Vec<Key>) -> Self {
        keys.sort_unstable();
        keys.dedup();
        Self::Keys(keys)
    }
}

/// A map of verdicts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VerdictMap {
    /// A map of the table.
    Named(Text),
    /// One that is part of the rule.
    Inline(BTreeMap<Key, Verdict>),
}

/// Where evaluation goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// `accept`: ends this base chain.
    Accept,
    /// `drop`.
    Drop,
    /// `return`.
    Return,
    /// `continue`.
    Continue,
    /// `jump`: this chain, and back.
    Jump(Text),
    /// `goto`: this chain instead of the rest.
    Goto(Text),
}

impl Verdict {
    /// The chain it leads to.
    pub fn chain(&self) -> Option<&str> {
        match self {
            Self::Jump(chain) | Self::Goto(chain) => Some(chain),
            Self::Accept | Self::Drop | Self::Return | Self::Continue => None,
        }
    }
}

/// A change of the packet's mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MarkChange {
    /// To this.
    Set(u32),
    /// These bits set.
    Or(u32),
    /// These bits flipped.
    Xor(u32),
    /// All other bits cleared.
    And(u32),
}

impl MarkChange {
    /// The mark after it.
    pub const fn apply(self, mark: u32) -> u32 {
        match self {
            Self::Set(value) => value,
            Self::Or(bits) => mark | bits,
            Self::Xor(bits) => mark ^ bits,
            Self::And(bits) => mark & bits,
        }
    }
}

/// How `masquerade` chooses source ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Masquerade {
    /// `random`.
    pub random: bool,
    /// `fully-random`.
    pub fully_random: bool,
    /// `persistent`.
    pub persistent: bool,
}

/// What a destination is changed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Always this.
    One(Destination),
    /// A random number from 0 to `modulus - 1` chooses; one that is not in the list chooses
    /// nothing, and the rule ends there.
    Random {
        /// The number of numbers.
        modulus: u32,
        /// Number and destination, sorted by number.
        destinations: Vec<(u32, Destination)>,
    },
}

/// An address, and a port unless it stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Destination {
    /// Address.
    pub address: IpAddr,
    /// Port.
    pub port: Option<u16>,
}

impl Destination {
    /// `10.0.0.1:80`, `[fd00::1]:80`, or an address alone.
    pub fn parse(word: &str) -> Option<Self> {
        let (address, port) = if let Some(rest) = word.strip_prefix('[') {
            let (address, rest) = rest.split_once(']')?;
            (IpAddr::V6(address.parse().ok()?), rest.strip_prefix(':'))
        } else if let Some((address, port)) = word.split_once(':')
            && let Ok(address) = address.parse::<Ipv4Addr>()
        {
            (address.into(), Some(port))
        } else {
            (word.parse().ok()?, None)
        };
        let port = match port {
            Some(port) => Some(port.parse().ok()?),
            None => None,
        };
        Some(Self { address, port })
    }
}

/// The addresses from `first` to `last`, both included and of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    first: IpAddr,
    last: IpAddr,
}

impl Range {
    /// `None` if the ends are of two families or in the wrong order.
    pub fn new(first: IpAddr, last: IpAddr) -> Option<Self> {
        (Family::of(first) == Family::of(last) && first <= last).then_some(Self { first, last })
    }

    /// The addresses of a network.
    pub fn of(cidr: Cidr) -> Self {
        Self {
            first: cidr.network().base,
            last: cidr.last(),
        }
    }

    /// An address, a network, or `FIRST-LAST`.
    pub fn parse(word: &str) -> Option<Self> {
        if let Ok(address) = word.parse::<IpAddr>() {
            return Self::new(address, address);
        }
        if let Ok(cidr) = word.parse::<Cidr>() {
            return Some(Self::of(cidr));
        }
        let (first, last) = word.split_once('-')?;
        Self::new(first.parse().ok()?, last.parse().ok()?)
    }

    /// Does `address` lie in it?
    pub fn contains(self, address: IpAddr) -> bool {
        Family::of(address) == Family::of(self.first)
            && self.first <= address
            && address <= self.last
    }

    /// Does `next`, which begins no earlier, overlap this range or follow right after it?
    fn touches(self, next: Self) -> bool {
        match (self.last, next.first) {
            (IpAddr::V4(last), IpAddr::V4(first)) => {
                first.to_bits() <= last.to_bits().saturating_add(1)
            }
            (IpAddr::V6(last), IpAddr::V6(first)) => {
                first.to_bits() <= last.to_bits().saturating_add(1)
            }
            _ => false,
        }
    }

    /// The length of the prefix, if the range is a network.
    fn prefix(self) -> Option<u32> {
        // A network's ends differ in all the bits after the prefix and in no other.
        let (differing, base, bits) = match (self.first, self.last) {
            (IpAddr::V4(first), IpAddr::V4(last)) => (
                u128::from(first.to_bits() ^ last.to_bits()),
                u128::from(first.to_bits()),
                32,
            ),
            (IpAddr::V6(first), IpAddr::V6(last)) => {
                (first.to_bits() ^ last.to_bits(), first.to_bits(), 128)
            }
            _ => return None,
        };
        let is_network = differing & differing.wrapping_add(1) == 0 && base & differing == 0;
        is_network.then(|| bits - differing.count_ones())
    }
}

/// Ranges in order, none of which touches another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(Vec<Range>);

impl Ranges {
    /// The addresses in any of `ranges`, as nft merges them.
    pub fn new(mut ranges: Vec<Range>) -> Self {
        ranges.sort_unstable();
        ranges.dedup_by(|next, range| {
            let touches = range.touches(*next);
            if touches {
                range.last = range.last.max(next.last);
            }
            touches
        });
        Self(ranges)
    }

    /// The network that they are; `None` if they are none.
    pub fn network(&self) -> Option<Cidr> {
        let [range] = self.0[..] else { return None };
        Cidr::from_ends(range.first, range.last)
    }

    /// Does `address` lie in one of them?
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.iter().any(|range| range.contains(address))
    }
}

// ---- as nft prints ----

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Address(family) => family.nft_address(),
            Self::Protocol => "inet_proto",
            Self::Port => "inet_service",
            Self::Verdict => "verdict",
            Self::Other(name) => name,
        })
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Protocol(protocol) => protocol.fmt(f),
            Self::Number(number) => number.fmt(f),
            Self::Word(word) if needs_quotes(word) => write!(f, "\"{word}\""),
            Self::Word(word) => f.write_str(word),
        }
    }
}

/// Would this word be read as something else without quotes? nft takes any text in quotes as a
/// name, even what no link can be called.
fn needs_quotes(word: &str) -> bool {
    matches!(word, "" | "." | ":" | "=")
        || word.starts_with('#')
        || word.contains([' ', '\t', '\r', '{', '}', ',', ';'])
}

/// Writes `items` with `separator` between them.
fn join<T: fmt::Display>(
    f: &mut fmt::Formatter<'_>,
    items: impl IntoIterator<Item = T>,
    separator: &str,
) -> fmt::Result {
    for (index, item) in items.into_iter().enumerate() {
        if index > 0 {
            f.write_str(separator)?;
        }
        item.fmt(f)?;
    }
    Ok(())
}

/// A key as nft prints it: its parts with dots between.
#[derive(Clone, Copy, Debug)]
pub struct KeyText<'a>(pub &'a [Value]);

impl fmt::Display for KeyText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        join(f, self.0, " . ")
    }
}

/// An element as nft prints it.
#[derive(Clone, Copy, Debug)]
pub struct ElementText<'a>(pub &'a [Value], pub &'a Element);

impl fmt::Display for ElementText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(key, element) = self;
        KeyText(key).fmt(f)?;
        if let Some(comment) = &element.comment {
            write!(f, " comment \"{comment}\"")?;
        }
        match &element.value {
            None => Ok(()),
            Some(Mapped::Verdict(verdict)) => write!(f, " : {verdict}"),
            Some(Mapped::Other(text)) => write!(f, " : {text}"),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Return => f.write_str("return"),
            Self::Continue => f.write_str("continue"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(family) => write!(f, "{} saddr", family.nft()),
            Self::Destination(family) => write!(f, "{} daddr", family.nft()),
            Self::Protocol => f.write_str("meta l4proto"),
            Self::Port => f.write_str("th dport"),
            Self::PortOf(protocol) => write!(f, "{protocol} dport"),
            Self::State => f.write_str("ct state"),
            Self::Status => f.write_str("ct status"),
            Self::Mark => f.write_str("meta mark"),
            Self::MarkAnd(mask) => write!(f, "meta mark & {mask:#010x}"),
            Self::SourceType => f.write_str("fib saddr type"),
            Self::DestinationType => f.write_str("fib daddr type"),
            Self::InputInterface => f.write_str("iifname"),
            Self::Random(modulus) => write!(f, "numgen random mod {modulus}"),
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            self.first.fmt(f)
        } else if let Some(prefix) = self.prefix() {
            write!(f, "{}/{prefix}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// `item` alone, or `{ item, item }`.
fn one_or_set<T: fmt::Display>(f: &mut fmt::Formatter<'_>, items: &[T]) -> fmt::Result {
    if let [item] = items {
        item.fmt(f)
    } else {
        f.write_str("{ ")?;
        join(f, items, ", ")?;
        f.write_str(" }")
    }
}

impl fmt::Display for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        one_or_set(f, &self.0)
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.address, self.port) {
            (address, None) => address.fmt(f),
            (IpAddr::V4(address), Some(port)) => write!(f, "{address}:{port}"),
            (IpAddr::V6(address), Some(port)) => write!(f, "[{address}]:{port}"),
        }
    }
}

/// A key of these fields: as [`KeyText`], with names of interfaces in quotes.
fn key_text(fields: &[Field], key: &[Value]) -> String {
    let parts: Vec<String> = key
        .iter()
        .enumerate()
        .map(|(part, value)| match (fields.get(part), value) {
            (Some(Field::InputInterface), Value::Word(name)) => format!("\"{name}\""),
            (Some(Field::InputInterface), value) => format!("\"{value}\""),
            (_, value) => value.to_string(),
        })
        .collect();
    parts.join(" . ")
}

/// The constants of a match, in the notation of the field.
fn write_keys(f: &mut fmt::Formatter<'_>, fields: &[Field], keys: &[Key]) -> fmt::Result {
    let texts: Vec<String> = keys
        .iter()
        .map(|key| match (fields, &**key) {
            ([Field::Mark | Field::MarkAnd(_)], [Value::Number(number)]) => {
                format!("{number:#010x}")
            }
            _ => key_text(fields, key),
        })
        .collect();
    match fields {
        // Bits, of which nft prints a list.
        [Field::State | Field::Status] => join(f, texts, ","),
        _ => one_or_set(f, &texts),
    }
}

impl fmt::Display for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Match {
                fields,
                negated,
                operand,
            } => {
                join(f, fields, " . ")?;
                let masked = matches!(&fields[..], [Field::MarkAnd(_)]);
                f.write_str(match (negated, masked) {
                    (true, _) => " != ",
                    (false, true) => " == ",
                    (false, false) => " ",
                })?;
                match operand {
                    Operand::Addresses(ranges) => ranges.fmt(f),
                    Operand::Keys(keys) => write_keys(f, fields, keys),
                    Operand::Set(set) => write!(f, "@{set}"),
                }
            }
            Self::Vmap { fields, map } => {
                join(f, fields, " . ")?;
                match map {
                    VerdictMap::Named(name) => write!(f, " vmap @{name}"),
                    VerdictMap::Inline(verdicts) => {
                        f.write_str(" vmap { ")?;
                        let entries = verdicts
                            .iter()
                            .map(|(key, verdict)| format!("{} : {verdict}", key_text(fields, key)));
                        join(f, entries, ", ")?;
                        f.write_str(" }")
                    }
                }
            }
            Self::Verdict(verdict) => verdict.fmt(f),
            Self::Reject { with: None } => f.write_str("reject"),
            Self::Reject { with: Some(with) } => write!(f, "reject with {with}"),
            Self::Mark(change) => {
                f.write_str("meta mark set ")?;
                match change {
                    MarkChange::Set(value) => write!(f, "{value:#010x}"),
                    MarkChange::Or(bits) => write!(f, "meta mark | {bits:#010x}"),
                    MarkChange::Xor(bits) => write!(f, "meta mark ^ {bits:#010x}"),
                    MarkChange::And(bits) => write!(f, "meta mark & {bits:#010x}"),
                }
            }
            Self::Masquerade(masquerade) => {
                f.write_str("masquerade")?;
                let flags = [
                    (masquerade.random, "random"),
                    (masquerade.fully_random, "fully-random"),
                    (masquerade.persistent, "persistent"),
                ];
                let set: Vec<&str> = flags
                    .into_iter()
                    .filter_map(|(set, name)| set.then_some(name))
                    .collect();
                if !set.is_empty() {
                    f.write_str(" ")?;
                    join(f, set, ",")?;
                }
                Ok(())
            }
            Self::Dnat(Target::One(destination)) => write!(f, "dnat to {destination}"),
            Self::Dnat(Target::Random {
                modulus,
                destinations,
            }) => {
                let family = destinations.first().map_or(Family::V4, |(_, destination)| {
                    Family::of(destination.address)
                });
                write!(
                    f,
                    "dnat {} to numgen random mod {modulus} map {{ ",
                    family.nft()
                )?;
                let entries =
                    destinations
                        .iter()
                        .map(|(number, destination)| match destination.port {
                            Some(port) => format!("{number} : {} . {port}", destination.address),
                            None => format!("{number} : {}", destination.address),
                        });
                join(f, entries, ", ")?;
                f.write_str(" }")
            }
            Self::Update { set, fields } => {
                write!(f, "update @{set} {{ ")?;
                join(f, fields, " . ")?;
                f.write_str(" }")
            }
            Self::Other(text) => f.write_str(text),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        join(f, &self.statements, " ")?;
        match &self.comment {
            Some(comment) if self.statements.is_empty() => write!(f, "comment \"{comment}\""),
            Some(comment) => write!(f, " comment \"{comment}\""),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hook = HOOKS
            .into_iter()
            .find_map(|(name, hook)| (hook == self.hook).then_some(name))
            .unwrap_or_default();
        write!(
            f,
            "type {} hook {hook} priority {}; policy {};",
            self.kind.name(),
            self.priority,
            if self.accepts { "accept" } else { "drop" }
        )
    }
}

impl fmt::Display for SetFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flags = [
            (self.constant, "constant"),
            (self.interval, "interval"),
            (self.dynamic, "dynamic"),
            (self.timeout, "timeout"),
        ];
        let set = flags
            .into_iter()
            .filter_map(|(set, name)| set.then_some(name));
        join(f, set, ",")
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\t\ttype ")?;
        join(f, &self.key, " . ")?;
        if let Some(value) = &self.value {
            write!(f, " : {value}")?;
        }
        f.write_str("\n")?;
        if let Some(size) = self.size {
            writeln!(f, "\t\tsize {size}")?;
        }
        if self.flags != SetFlags::default() {
            writeln!(f, "\t\tflags {}", self.flags)?;
        }
        if let Some(timeout) = self.timeout {
            writeln!(f, "\t\ttimeout {timeout}s")?;
        }
        for other in &self.others {
            writeln!(f, "\t\t{other}")?;
        }
        if let Some(comment) = &self.comment {
            writeln!(f, "\t\tcomment \"{comment}\"")?;
        }
        if !self.elements.is_empty() {
            f.write_str("\t\telements = { ")?;
            let elements = self
                .elements
                .iter()
                .map(|(key, element)| ElementText(key, element));
            join(f, elements, ",\n\t\t\t     ")?;
            f.write_str(" }\n")?;
        }
        Ok(())
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(comment) = &self.comment {
            writeln!(f, "\t\tcomment \"{comment}\"")?;
        }
        if let Some(base) = &self.base {
            writeln!(f, "\t\t{base}")?;
        }
        for rule in &self.rules {
            writeln!(f, "\t\t{rule}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table {} {TABLE} {{", self.family.nft())?;
        if let Some(comment) = &self.comment {
            writeln!(f, "\tcomment \"{comment}\"")?;
        }
        if self.dormant {
            writeln!(f, "\tflags dormant")?;
        }
        for (name, set) in &self.sets {
            let kind = if set.value.is_some() { "map" } else { "set" };
            write!(f, "\t{kind} {name} {{\n{set}\t}}\n\n")?;
        }
        for other in self.others.keys() {
            writeln!(f, "\t{other} {{\n\t}}\n")?;
        }
        for (name, chain) in &self.chains {
            write!(f, "\tchain {name} {{\n{chain}\t}}\n\n")?;
        }
        writeln!(f, "}}")
    }
}
