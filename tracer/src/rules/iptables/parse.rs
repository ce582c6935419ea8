//! What `iptables-save` prints and `iptables-restore` takes, read into [`Tables`].
//!
//! Nothing is copied but what was written with escapes: a dump of 30,000 Services is a million
//! lines. A match or target that is not known is kept as it stands.

use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;

use super::rule::{
    AddrType, AddrTypes, Chain, CtStates, Dnat, IpProtocol, IpvsMatch, Mark, Match, Multiport, Not,
    PROBABILITY_ONE, Physdev, Policy, PortSide, Ports, Recent, RecentAction, Rule, SetMatch, Sides,
    Table, Tables, Target, Transport, Words, built_in_chains, full_length,
};
use crate::cluster::{Cidr, Family};

/// Text that is no dump.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct ParseError {
    /// The line, from 1.
    pub line: u32,
    /// What is wrong with it.
    pub problem: Problem,
}

/// Why a text is no dump.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A line that `iptables-save` does not print.
    #[error("'{0}' is no line of iptables-save")]
    NotALine(String),
    /// A chain or rule before the first table or after its end.
    #[error("a chain or rule outside of a table: a line such as '*nat' is missing before it")]
    NoTable,
    /// A table that begins before the one before it ended.
    #[error("table {0} was not ended by COMMIT")]
    NotEnded(String),
    /// The text ends inside a table.
    #[error("the dump was cut: table {0} is not ended by COMMIT")]
    Cut(String),
    /// A policy of a chain that can have none, or another policy than ACCEPT and DROP.
    #[error("chain {chain} cannot have the policy '{policy}'")]
    Policy {
        /// The chain.
        chain: String,
        /// The policy.
        policy: String,
    },
    /// An option without its value.
    #[error("nothing follows {0}")]
    NoValue(String),
    /// A quotation mark that nothing closes.
    #[error("a quotation mark is not closed")]
    OpenQuote,
    /// A word that belongs to nothing.
    #[error("'{0}' belongs to no option, match or target")]
    Word(String),
    /// A value that is none.
    #[error("{option} {value}: no {wanted}")]
    Value {
        /// The option.
        option: String,
        /// Its value.
        value: String,
        /// What it should be.
        wanted: &'static str,
    },
}

impl Problem {
    fn value(option: &str, value: &str, wanted: &'static str) -> Self {
        Self::Value {
            option: option.to_owned(),
            value: shortened(value),
            wanted,
        }
    }
}

/// Of a line that may be anything, enough to know it by.
fn shortened(text: &str) -> String {
    const LONGEST: usize = 80;
    let mut short: String = text.chars().take(LONGEST).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// Reads what `iptables-save` or `ip6tables-save` printed, or what `iptables-restore` would read.
///
/// # Errors
///
/// If the text is no such thing, or was cut in the middle of a table. Matches and targets that
/// are not known are no error.
pub fn parse(text: &str, family: Family) -> Result<Tables<'_>, ParseError> {
    let mut tables = Tables::none(family);
    let mut open: Option<TableReader<'_>> = None;
    let mut number = 0;
    for line in text.split('\n') {
        number += 1;
        let line = line.trim_ascii_end();
        read_line(line, number, family, &mut tables, &mut open).map_err(|problem| ParseError {
            line: number,
            problem,
        })?;
    }
    match open {
        None => Ok(tables),
        Some(reader) => Err(ParseError {
            line: number,
            problem: Problem::Cut(reader.name.to_owned()),
        }),
    }
}

fn read_line<'a>(
    line: &'a str,
    number: u32,
    family: Family,
    tables: &mut Tables<'a>,
    open: &mut Option<TableReader<'a>>,
) -> Result<(), Problem> {
    match line.as_bytes() {
        [b'-' | b'[', ..] => open
            .as_mut()
            .ok_or(Problem::NoTable)?
            .command(line, number, family),
        [b':', ..] => open
            .as_mut()
            .ok_or(Problem::NoTable)?
            .declare(line.get(1..).unwrap_or_default(), number),
        [b'*', ..] => {
            if let Some(reader) = open {
                return Err(Problem::NotEnded(reader.name.to_owned()));
            }
            let name = line.get(1..).unwrap_or_default();
            // The same table again goes on where it ended.
            let known = tables.list.iter().position(|table| table.name == name);
            *open = Some(match known {
                Some(index) => TableReader::again(tables.list.swap_remove(index)),
                None => TableReader::new(name),
            });
            Ok(())
        }
        b"COMMIT" => {
            let reader = open.take().ok_or(Problem::NoTable)?;
            tables.list.push(reader.finish());
            Ok(())
        }
        [] | [b'#', ..] => Ok(()),
        _ => Err(Problem::NotALine(shortened(line))),
    }
}

/// A table while it is read.
struct TableReader<'a> {
    name: &'a str,
    chains: Vec<ChainReader<'a>>,
    index: HashMap<&'a str, usize>,
    /// The chain of the last rule: in a dump the next is mostly of the same.
    last: usize,
    /// The matches of the rule that is read, kept for its capacity.
    matches: Vec<Match<'a>>,
}

/// A chain while it is read.
struct ChainReader<'a> {
    chain: Chain<'a>,
    /// Rules put before the others, the last one first in the end.
    prepended: Vec<Rule<'a>>,
    deleted: bool,
}

impl<'a> TableReader<'a> {
    fn new(name: &'a str) -> Self {
        Self {
            name,
            chains: Vec::new(),
            index: HashMap::new(),
            last: usize::MAX,
            matches: Vec::new(),
        }
    }

    fn again(table: Table<'a>) -> Self {
        let chains = table.chains.into_iter().map(|chain| ChainReader {
            chain,
            prepended: Vec::new(),
            deleted: false,
        });
        Self {
            chains: chains.collect(),
            index: table.index,
            ..Self::new(table.name)
        }
    }

    fn finish(self) -> Table<'a> {
        let any_deleted = self.chains.iter().any(|reader| reader.deleted);
        let chains: Vec<Chain<'a>> = self
            .chains
            .into_iter()
            .filter(|reader| !reader.deleted)
            .map(|mut reader| {
                if !reader.prepended.is_empty() {
                    reader.prepended.reverse();
                    reader.prepended.append(&mut reader.chain.rules);
                    reader.chain.rules = reader.prepended;
                }
                reader.chain
            })
            .collect();
        let index = if any_deleted {
            let numbered = chains.iter().enumerate();
            numbered.map(|(at, chain)| (chain.name, at)).collect()
        } else {
            self.index
        };
        Table {
            name: self.name,
            chains,
            index,
        }
    }

    /// The chain of this name, made if there is none.
    fn chain(&mut self, name: &'a str) -> Option<&mut ChainReader<'a>> {
        if self
            .chains
            .get(self.last)
            .is_none_or(|reader| reader.chain.name != name)
        {
            self.last = match self.index.entry(name) {
                Entry::Occupied(entry) => *entry.get(),
                Entry::Vacant(entry) => {
                    self.chains.push(ChainReader {
                        chain: Chain {
                            name,
                            policy: None,
                            declared: None,
                            rules: Vec::new(),
                        },
                        prepended: Vec::new(),
                        deleted: false,
                    });
                    *entry.insert(self.chains.len() - 1)
                }
            };
        }
        let reader = self.chains.get_mut(self.last)?;
        reader.deleted = false;
        Some(reader)
    }

    /// `CHAIN POLICY [packets:bytes]`; a chain of the user's has the policy `-` and is emptied.
    fn declare(&mut self, line: &'a str, number: u32) -> Result<(), Problem> {
        let mut words = line.split_ascii_whitespace();
        let name = words.next().unwrap_or_default();
        let policy = words.next().unwrap_or_default();
        let counters = words.next().is_none_or(|word| {
            let counters = word
                .strip_prefix('[')
                .and_then(|rest| rest.strip_suffix(']'));
            counters.is_some_and(|counters| {
                counters.split(':').count() == 2
                    && counters
                        .split(':')
                        .all(|count| count.parse::<u64>().is_ok())
            })
        });
        if name.is_empty() || !counters || words.next().is_some() {
            return Err(Problem::NotALine(shortened(line)));
        }
        let built_in = built_in_chains(self.name);
        // Of a table that is not known, nor are the built-in chains.
        let may_be_built_in = built_in.is_empty() || built_in.contains(&name);
        let policy = match policy {
            "ACCEPT" if may_be_built_in => Some(Policy::Accept),
            "DROP" if may_be_built_in => Some(Policy::Drop),
            "-" => None,
            _ => {
                return Err(Problem::Policy {
                    chain: shortened(name),
                    policy: shortened(policy),
                });
            }
        };
        if let Some(reader) = self.chain(name) {
            reader.chain.declared = Some(number);
            reader.chain.policy = policy;
            if policy.is_none() {
                reader.chain.rules.clear();
                reader.prepended.clear();
            }
        }
        Ok(())
    }

    /// `-A CHAIN rule`, `-I CHAIN rule`, `-X CHAIN`, with or without counters before it.
    fn command(&mut self, line: &'a str, number: u32, family: Family) -> Result<(), Problem> {
        let not_a_line = || Problem::NotALine(shortened(line));
        let command = match line.strip_prefix('[') {
            Some(counted) => counted.split_once("] ").ok_or_else(not_a_line)?.1,
            None => line,
        };
        let (verb, rest) = command.split_once(' ').ok_or_else(not_a_line)?;
        let rest = rest.trim_ascii_start();
        let (chain, rule) = rest.split_once(' ').unwrap_or((rest, ""));
        match verb {
            "-A" | "-I" => {
                let rule = match RuleReader::new(rule, number, family, &mut self.matches).read() {
                    Err(_) if rule.contains(UNSUPPORTED_REVISION) => not_understood(rule, number),
                    read => read?,
                };
                if let Some(reader) = self.chain(chain) {
                    if verb == "-A" {
                        if reader.chain.rules.is_empty() {
                            // Most chains are an endpoint's, of two rules; there are a quarter of a
                            // million of them at 30,000 Services.
                            reader.chain.rules.reserve_exact(2);
                        }
                        reader.chain.rules.push(rule);
                    } else {
                        reader.prepended.push(rule);
                    }
                }
                Ok(())
            }
            "-X" => {
                if let Some(reader) = self
                    .index
                    .get(chain)
                    .and_then(|at| self.chains.get_mut(*at))
                {
                    reader.chain.rules.clear();
                    reader.prepended.clear();
                    reader.deleted = true;
                }
                Ok(())
            }
            _ => Err(not_a_line()),
        }
    }
}

/// What `iptables-save` prints instead of the options of an extension whose revision in the kernel
/// is newer than the one that it knows.
const UNSUPPORTED_REVISION: &str = "[unsupported revision]";

/// A rule of which not even the words can be told apart.
fn not_understood(options: &str, number: u32) -> Rule<'_> {
    let mut rule = Rule::empty(number);
    let other = Match::Other(Words { name: "", options });
    rule.matches = [other].into_iter().collect();
    rule
}

/// One word of a line.
struct Word<'a> {
    text: Cow<'a, str>,
    /// Quoted words are never options.
    quoted: bool,
    start: usize,
    end: usize,
}

impl<'a> Word<'a> {
    /// As it was written, which may be with quotes: names have none.
    fn borrowed(self, line: &'a str) -> &'a str {
        match self.text {
            Cow::Borrowed(text) if !self.quoted => text,
            _ => line.get(self.start..self.end).unwrap_or_default(),
        }
    }
}

/// The words of a line, divided as `iptables-restore` does.
struct Line<'a> {
    text: &'a str,
    at: usize,
    /// Did it end inside quotation marks?
    open: bool,
}

impl<'a> Line<'a> {
    fn next(&mut self) -> Option<Word<'a>> {
        let bytes = self.text.as_bytes();
        while matches!(bytes.get(self.at), Some(b' ' | b'\t')) {
            self.at += 1;
        }
        let start = self.at;
        let mut quote = false;
        loop {
            match bytes.get(self.at) {
                None | Some(b' ' | b'\t') => break,
                Some(b'"') => {
                    quote = true;
                    break;
                }
                Some(_) => self.at += 1,
            }
        }
        if quote {
            return Some(self.quoted(start));
        }
        let text = self.text.get(start..self.at).unwrap_or_default();
        (self.at > start).then_some(Word {
            text: Cow::Borrowed(text),
            quoted: false,
            start,
            end: self.at,
        })
    }

    /// A word that has quotes.
    fn quoted(&mut self, start: usize) -> Word<'a> {
        let rest = self.text.get(start..).unwrap_or_default();
        // Nearly always it is one pair of quotes around text without escapes.
        if let Some(inner) = rest.strip_prefix('"')
            && let Some(length) = inner.find(['"', '\\'])
            && matches!(
                inner.as_bytes().get(length..),
                Some([b'"'] | [b'"', b' ' | b'\t', ..])
            )
        {
            self.at = start + length + 2;
            return Word {
                text: Cow::Borrowed(inner.get(..length).unwrap_or_default()),
                quoted: true,
                start,
                end: self.at,
            };
        }
        let mut text = String::new();
        let (mut inside, mut escaped) = (false, false);
        let mut length = rest.len();
        for (at, character) in rest.char_indices() {
            match character {
                _ if escaped => {
                    text.push(character);
                    escaped = false;
                }
                '\\' if inside => escaped = true,
                '"' => inside = !inside,
                ' ' | '\t' if !inside => {
                    length = at;
                    break;
                }
                _ => text.push(character),
            }
        }
        self.at = start + length;
        self.open |= inside;
        Word {
            text: Cow::Owned(text),
            quoted: true,
            start,
            end: self.at,
        }
    }
}

/// What the options that follow belong to.
#[derive(Clone, Copy)]
enum Extension {
    None,
    /// The last match, whose words begin here.
    Match(usize),
    /// The target, whose words begin here.
    Target(usize),
}

/// A rule while it is read.
struct RuleReader<'a, 'v> {
    line: Line<'a>,
    family: Family,
    rule: Rule<'a>,
    matches: &'v mut Vec<Match<'a>>,
    extension: Extension,
}

/// Was an option of an extension understood?
type Understood = Result<bool, Problem>;

impl<'a, 'v> RuleReader<'a, 'v> {
    fn new(text: &'a str, number: u32, family: Family, matches: &'v mut Vec<Match<'a>>) -> Self {
        matches.clear();
        Self {
            line: Line {
                text,
                at: 0,
                open: false,
            },
            family,
            rule: Rule::empty(number),
            matches,
            extension: Extension::None,
        }
    }

    fn read(mut self) -> Result<Rule<'a>, Problem> {
        let mut bang: Option<usize> = None;
        while let Some(word) = self.line.next() {
            if !word.quoted && word.text == "!" {
                bang = Some(word.start);
                continue;
            }
            let negated = bang.is_some();
            let start = bang.take().unwrap_or(word.start);
            if word.quoted || !word.text.starts_with('-') {
                self.argument(&word)?;
                continue;
            }
            let option = word.borrowed(self.line.text);
            if !self.own_option(option, negated, start)? {
                self.extension_option(option, negated, start)?;
            }
        }
        if self.line.open {
            return Err(Problem::OpenQuote);
        }
        if bang.is_some() {
            return Err(Problem::NoValue("!".to_owned()));
        }
        let without_a_set =
            |part: &Match<'_>| matches!(part, Match::Set(set) if set.value.name.is_empty());
        if self.matches.iter().any(without_a_set) {
            return Err(Problem::NoValue("-m set".to_owned()));
        }
        self.rule.matches = self.matches.drain(..).collect();
        Ok(self.rule)
    }

    fn value(&mut self, option: &str) -> Result<Word<'a>, Problem> {
        let missing = || Problem::NoValue(option.to_owned());
        self.line.next().ok_or_else(missing)
    }

    /// The value of an option, as it was written.
    fn text(&mut self, option: &str) -> Result<&'a str, Problem> {
        Ok(self.value(option)?.borrowed(self.line.text))
    }

    /// Options of iptables itself.
    fn own_option(&mut self, option: &str, negated: bool, start: usize) -> Understood {
        match option {
            "-m" | "--match" => self.begin_match(option)?,
            "-j" | "--jump" => self.begin_target(option)?,
            "-p" | "--protocol" | "--proto" => {
                let text = self.text(option)?;
                match IpProtocol::parse(text) {
                    _ if text == "all" => self.rule.protocol = None,
                    Some(IpProtocol(0)) => self.rule.protocol = None,
                    Some(value) => self.rule.protocol = Some(Not { negated, value }),
                    None => self.keep(start),
                }
            }
            "-d" | "--destination" | "--dst" => {
                self.rule.destination = self.network(option, negated, start)?;
            }
            "-s" | "--source" | "--src" => {
                self.rule.source = self.network(option, negated, start)?;
            }
            "-i" | "--in-interface" => self.rule.in_interface = self.interface(option, negated)?,
            "-o" | "--out-interface" => {
                self.rule.out_interface = self.interface(option, negated)?;
            }
            "-g" | "--goto" => {
                self.rule.target = Target::Goto(self.text(option)?);
                self.extension = Extension::None;
            }
            "-c" | "--set-counters" => {
                self.text(option)?;
                self.text(option)?;
            }
            "-f" | "--fragment" => self.keep(start),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Keeps an option of iptables itself that the model has no place for.
    fn keep(&mut self, start: usize) {
        let options = self.since(start);
        self.matches.push(Match::Other(Words { name: "", options }));
        self.extension = Extension::None;
    }

    fn since(&self, start: usize) -> &'a str {
        self.line.text.get(start..self.line.at).unwrap_or_default()
    }

    fn network(
        &mut self,
        option: &str,
        negated: bool,
        start: usize,
    ) -> Result<Option<Not<Cidr>>, Problem> {
        let text = self.text(option)?;
        match read_network(text, self.family) {
            Some(Network::Cidr { value, as_printed }) => {
                self.rule.as_printed &= as_printed;
                // Any address: the kernel holds the same without it.
                Ok((value.prefix > 0 || negated).then_some(Not { negated, value }))
            }
            Some(Network::WithHoles) => {
                self.keep(start);
                Ok(None)
            }
            None => Err(Problem::value(
                option,
                text,
                match self.family {
                    Family::V4 => "IPv4 address or network",
                    Family::V6 => "IPv6 address or network",
                },
            )),
        }
    }

    fn interface(&mut self, option: &str, negated: bool) -> Result<Option<Not<&'a str>>, Problem> {
        let value = self.text(option)?;
        Ok((value != "+" || negated).then_some(Not { negated, value }))
    }

    /// A word that follows no option that takes it.
    fn argument(&mut self, word: &Word<'a>) -> Result<(), Problem> {
        if self.extend() {
            return Ok(());
        }
        let rest = self.line.text.get(word.start..).unwrap_or_default();
        if rest.starts_with(UNSUPPORTED_REVISION) && self.give_up() {
            return Ok(());
        }
        Err(Problem::Word(shortened(&word.text)))
    }

    /// Keeps the extension that is read as one that is not understood, if there is one.
    fn give_up(&mut self) -> bool {
        match self.extension {
            Extension::Match(start) => {
                let other = Match::Other(words(self.since(start)));
                if let Some(last) = self.matches.last_mut() {
                    *last = other;
                }
            }
            Extension::Target(start) => self.rule.target = Target::Other(words(self.since(start))),
            Extension::None => return false,
        }
        true
    }

    /// If the extension that is read is not understood, its words go on to here.
    fn extend(&mut self) -> bool {
        let (words, start) = match self.extension {
            Extension::Match(start) => match self.matches.last_mut() {
                Some(Match::Other(words)) => (words, start),
                _ => return false,
            },
            Extension::Target(start) => match &mut self.rule.target {
                Target::Other(words) => (words, start),
                _ => return false,
            },
            Extension::None => return false,
        };
        let text = self.line.text.get(start..self.line.at).unwrap_or_default();
        words.options = text
            .get(words.name.len()..)
            .unwrap_or_default()
            .trim_ascii();
        true
    }

    fn extension_option(
        &mut self,
        option: &str,
        negated: bool,
        start: usize,
    ) -> Result<(), Problem> {
        let understood = match self.extension {
            Extension::Target(_) => self.target_option(option)?,
            Extension::Match(_) => self.match_option(option, negated)?,
            Extension::None => false,
        } || self.port_option(option, negated)?;
        if understood || self.extend() {
            return Ok(());
        }
        // An option that is not understood makes the whole extension one that is not.
        if !self.give_up() {
            self.keep(start);
            self.extension = Extension::Match(start);
        }
        Ok(())
    }

    fn begin_match(&mut self, option: &str) -> Result<(), Problem> {
        let name = self.value(option)?;
        let start = name.start;
        let name = name.borrowed(self.line.text);
        let begun = match name {
            "comment" => Match::Comment(Cow::Borrowed("")),
            "tcp" | "udp" | "sctp" => Match::Transport(Transport {
                protocol: IpProtocol::parse(name).unwrap_or(IpProtocol::TCP),
                source: None,
                destination: None,
            }),
            "multiport" => Match::Multiport(Box::new(Multiport {
                side: PortSide::Either,
                ports: Not::is(Vec::new()),
            })),
            "conntrack" | "state" => Match::Conntrack(Not::is(CtStates::default())),
            "statistic" => Match::Statistic(Not::is(0)),
            "recent" => Match::Recent(Box::new(self.default_recent())),
            "mark" => Match::Mark(Not::is(Mark { value: 0, mask: 0 })),
            "nfacct" => Match::Nfacct(""),
            "addrtype" => Match::AddrType(AddrType::default()),
            "set" => Match::Set(Not::is(SetMatch {
                name: "",
                sides: Sides::default(),
            })),
            "ipvs" => Match::Ipvs(Box::default()),
            "physdev" => Match::Physdev(Physdev::default()),
            name => Match::Other(Words { name, options: "" }),
        };
        self.matches.push(begun);
        self.extension = Extension::Match(start);
        Ok(())
    }

    fn default_recent(&self) -> Recent<'a> {
        Recent {
            name: "DEFAULT",
            action: Not::is(RecentAction::Check),
            seconds: 0,
            hit_count: 0,
            reap: false,
            ttl: false,
            mask: match self.family {
                Family::V4 => IpAddr::from([u8::MAX; 4]),
                Family::V6 => IpAddr::from([u8::MAX; 16]),
            },
            destination: false,
        }
    }

    fn begin_target(&mut self, option: &str) -> Result<(), Problem> {
        let name = self.value(option)?;
        let start = name.start;
        let name = name.borrowed(self.line.text);
        self.rule.target = match name {
            "ACCEPT" => Target::Accept,
            "DROP" => Target::Drop,
            "RETURN" => Target::Return,
            "REJECT" => Target::Reject(match self.family {
                Family::V4 => "icmp-port-unreachable",
                Family::V6 => "icmp6-port-unreachable",
            }),
            "MARK" => Target::Mark(Mark { value: 0, mask: 0 }),
            "MASQUERADE" => Target::Masquerade {
                random_fully: false,
            },
            "DNAT" => Target::Dnat(NO_DESTINATION),
            name if OTHER_TARGETS.contains(&name) => Target::Other(Words { name, options: "" }),
            name => Target::Jump(name),
        };
        self.extension = Extension::Target(start);
        Ok(())
    }

    /// An option of the target.
    fn target_option(&mut self, option: &str) -> Understood {
        match (&self.rule.target, option) {
            (Target::Reject(_), "--reject-with") => {
                let with = match self.text(option)? {
                    "port-unreach" if self.family == Family::V4 => "icmp-port-unreachable",
                    "port-unreach" => "icmp6-port-unreachable",
                    with => with,
                };
                self.rule.target = Target::Reject(with);
            }
            (
                Target::Mark(_),
                "--set-xmark" | "--set-mark" | "--or-mark" | "--and-mark" | "--xor-mark",
            ) => {
                let text = self.text(option)?;
                let mark = read_mark(text);
                let Mark { value, mask } =
                    mark.ok_or_else(|| Problem::value(option, text, "mark"))?;
                self.rule.target = Target::Mark(match option {
                    "--set-xmark" => Mark { value, mask },
                    "--set-mark" => Mark {
                        value,
                        mask: value | mask,
                    },
                    "--or-mark" => Mark { value, mask: value },
                    "--and-mark" => Mark {
                        value: 0,
                        mask: !value,
                    },
                    _ => Mark { value, mask: 0 },
                });
            }
            (Target::Masquerade { .. }, "--random-fully") => {
                self.rule.target = Target::Masquerade { random_fully: true };
            }
            (&Target::Dnat(dnat), "--random") => {
                self.rule.target = Target::Dnat(Dnat {
                    random: true,
                    ..dnat
                });
            }
            (&Target::Dnat(dnat), "--persistent") => {
                self.rule.target = Target::Dnat(Dnat {
                    persistent: true,
                    ..dnat
                });
            }
            (&Target::Dnat(dnat), "--to-destination") => {
                return self.read_destination(option, dnat);
            }
            (Target::Other(words), "--to-destination") if is_misread(words) => {
                self.rule.as_printed = false;
                return self.read_destination(option, NO_DESTINATION);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// `ADDRESS`, `ADDRESS:PORT`, `:PORT`; ranges are not understood. Of several, the last one with
    /// an address counts: old binaries print `:0` before or after the one that the kernel holds.
    fn read_destination(&mut self, option: &str, dnat: Dnat) -> Understood {
        let text = self.text(option)?;
        if text.contains('-') {
            return Ok(self.give_up());
        }
        let (address, port) = read_socket(text, self.family)
            .ok_or_else(|| Problem::value(option, text, "address and port"))?;
        let again = dnat.address.is_some() || dnat.port.is_some();
        self.rule.as_printed &= !again;
        if address.is_none() && dnat.address.is_some() {
            return Ok(true);
        }
        if address.is_none() && port == Some(0) {
            return Ok(self.give_up());
        }
        // What follows another destination is said of that one.
        let flags = if again { NO_DESTINATION } else { dnat };
        self.rule.target = Target::Dnat(Dnat {
            address,
            port,
            ..flags
        });
        Ok(true)
    }

    /// `--sport` and `--dport`, of the match that looks at ports wherever it stands, or of the
    /// protocol's if there is none.
    fn port_option(&mut self, option: &str, negated: bool) -> Understood {
        let source = match option {
            "--dport" | "--destination-port" => false,
            "--sport" | "--source-port" => true,
            _ => return Ok(false),
        };
        let known = |part: &Match<'_>| matches!(part, Match::Transport(_));
        if !self.matches.iter().any(known) {
            let Some(Not {
                negated: false,
                value: protocol @ (IpProtocol::TCP | IpProtocol::UDP | IpProtocol::SCTP),
            }) = self.rule.protocol
            else {
                return Ok(false);
            };
            self.matches.push(Match::Transport(Transport {
                protocol,
                source: None,
                destination: None,
            }));
            self.extension = Extension::None;
        }
        let text = self.text(option)?;
        let value = read_ports(text).ok_or_else(|| Problem::value(option, text, "port"))?;
        let ports = Some(Not { negated, value });
        for part in self.matches.iter_mut().rev() {
            if let Match::Transport(transport) = part {
                if source {
                    transport.source = ports;
                } else {
                    transport.destination = ports;
                }
                break;
            }
        }
        Ok(true)
    }

    /// An option of the last match.
    fn match_option(&mut self, option: &str, negated: bool) -> Understood {
        // Taken out, so that values can be read while it is filled; put back in any case.
        let Some(mut last) = self.matches.pop() else {
            return Ok(false);
        };
        let understood = self.fill(&mut last, option, negated);
        self.matches.push(last);
        understood
    }

    fn fill(&mut self, last: &mut Match<'a>, option: &str, negated: bool) -> Understood {
        match (last, option) {
            (Match::Comment(comment), "--comment") => *comment = self.value(option)?.text,
            (Match::Conntrack(states), "--ctstate" | "--state") => {
                let text = self.text(option)?;
                let value = CtStates::parse(text);
                let value = value.ok_or_else(|| Problem::value(option, text, "conntrack state"))?;
                *states = Not { negated, value };
            }
            (Match::Statistic(_), "--mode") => {
                let mode = self.text(option)?;
                return Ok(mode == "random");
            }
            (Match::Statistic(probability), "--probability") => {
                let text = self.text(option)?;
                let value = read_probability(text);
                let (value, as_printed) =
                    value.ok_or_else(|| Problem::value(option, text, "probability"))?;
                self.rule.as_printed &= as_printed;
                *probability = Not { negated, value };
            }
            (Match::Recent(recent), option) => return self.fill_recent(recent, option, negated),
            (Match::Mark(mark), "--mark") => {
                let text = self.text(option)?;
                let value = read_mark(text).ok_or_else(|| Problem::value(option, text, "mark"))?;
                *mark = Not { negated, value };
            }
            (Match::Nfacct(name), "--nfacct-name") => *name = self.text(option)?,
            (Match::AddrType(types), "--src-type" | "--dst-type") => {
                let text = self.text(option)?;
                let value = AddrTypes::parse(text);
                let value = value.ok_or_else(|| Problem::value(option, text, "address type"))?;
                if option == "--src-type" {
                    types.source = Some(Not { negated, value });
                } else {
                    types.destination = Some(Not { negated, value });
                }
            }
            (Match::Set(set), "--match-set") => {
                let name = self.text(option)?;
                let text = self.text(option)?;
                let sides = Sides::parse(text);
                let sides =
                    sides.ok_or_else(|| Problem::value(option, text, "list of src, dst"))?;
                *set = Not {
                    negated,
                    value: SetMatch { name, sides },
                };
            }
            (Match::Ipvs(ipvs), option) => return self.fill_ipvs(ipvs, option, negated),
            (Match::Physdev(physdev), option) => match option {
                "--physdev-is-in" => physdev.is_in = Some(!negated),
                "--physdev-is-out" => physdev.is_out = Some(!negated),
                "--physdev-is-bridged" => physdev.is_bridged = Some(!negated),
                _ => return Ok(false),
            },
            (Match::Multiport(multiport), option) => {
                let side = match option {
                    "--sports" | "--source-ports" => PortSide::Source,
                    "--dports" | "--destination-ports" => PortSide::Destination,
                    "--ports" => PortSide::Either,
                    _ => return Ok(false),
                };
                let text = self.text(option)?;
                let value: Option<Vec<Ports>> = text.split(',').map(read_ports).collect();
                let value = value.ok_or_else(|| Problem::value(option, text, "list of ports"))?;
                multiport.side = side;
                multiport.ports = Not { negated, value };
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn fill_recent(&mut self, recent: &mut Recent<'a>, option: &str, negated: bool) -> Understood {
        let action = match option {
            "--set" => Some(RecentAction::Set),
            "--rcheck" => Some(RecentAction::Check),
            "--update" => Some(RecentAction::Update),
            "--remove" => Some(RecentAction::Remove),
            _ => None,
        };
        if let Some(value) = action {
            recent.action = Not { negated, value };
            return Ok(true);
        }
        match option {
            "--name" => recent.name = self.text(option)?,
            "--seconds" => recent.seconds = self.number(option, "number of seconds")?,
            "--hitcount" => recent.hit_count = self.number(option, "number of hits")?,
            "--reap" => recent.reap = true,
            "--rttl" => recent.ttl = true,
            "--rsource" => recent.destination = false,
            "--rdest" => recent.destination = true,
            "--mask" => {
                let text = self.text(option)?;
                let mask = read_address(text, self.family);
                recent.mask = mask.ok_or_else(|| Problem::value(option, text, "mask"))?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn fill_ipvs(&mut self, ipvs: &mut IpvsMatch, option: &str, negated: bool) -> Understood {
        match option {
            "--vproto" => {
                let text = self.text(option)?;
                let value = IpProtocol::parse(text);
                let value = value.ok_or_else(|| Problem::value(option, text, "protocol"))?;
                ipvs.protocol = Some(Not { negated, value });
            }
            "--vaddr" => {
                let text = self.text(option)?;
                let Some(Network::Cidr { value, .. }) = read_network(text, self.family) else {
                    return Err(Problem::value(option, text, "address"));
                };
                ipvs.address = Some(Not { negated, value });
            }
            "--vport" => {
                let value = self.number(option, "port")?;
                ipvs.port = Some(Not { negated, value });
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn number<T: std::str::FromStr>(
        &mut self,
        option: &str,
        wanted: &'static str,
    ) -> Result<T, Problem> {
        let text = self.text(option)?;
        text.parse()
            .map_err(|_| Problem::value(option, text, wanted))
    }
}

/// Targets of the kernel that are kept as they stand; any other name is a chain's.
const OTHER_TARGETS: [&str; 36] = [
    "AUDIT",
    "CHECKSUM",
    "CLASSIFY",
    "CLUSTERIP",
    "CONNMARK",
    "CONNSECMARK",
    "CT",
    "DNPT",
    "DSCP",
    "ECN",
    "HL",
    "HMARK",
    "IDLETIMER",
    "LED",
    "LOG",
    "NETMAP",
    "NFLOG",
    "NFQUEUE",
    "NOTRACK",
    "QUEUE",
    "RATEEST",
    "REDIRECT",
    "SAME",
    "SECMARK",
    "SET",
    "SNAT",
    "SNPT",
    "SYNPROXY",
    "TARPIT",
    "TCPMSS",
    "TCPOPTSTRIP",
    "TEE",
    "TOS",
    "TPROXY",
    "TRACE",
    "TTL",
];

/// `DNAT` before its options.
const NO_DESTINATION: Dnat = Dnat {
    address: None,
    port: None,
    random: false,
    persistent: false,
};

/// Is this what an old binary prints of a destination that it misreads?
fn is_misread(target: &Words<'_>) -> bool {
    let mut words = target.options.split_ascii_whitespace();
    target.name == "DNAT" && words.next() == Some("--to-destination") && words.next() == Some(":0")
}

/// What `--to-destination` takes: an address, a port with a colon before it, or both.
fn read_socket(text: &str, family: Family) -> Option<(Option<IpAddr>, Option<u16>)> {
    let port_of = |text: &str| text.strip_prefix(':')?.parse::<u16>().ok();
    if let Some(port) = port_of(text) {
        return Some((None, Some(port)));
    }
    let (address, port) = match family {
        Family::V4 => text.split_at(text.find(':').unwrap_or(text.len())),
        Family::V6 => match text.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => (text, ""),
        },
    };
    let port = match port {
        "" => None,
        port => Some(port_of(port)?),
    };
    Some((Some(read_address(address, family)?), port))
}

/// The name of an extension and the options after it.
fn words(text: &str) -> Words<'_> {
    let (name, options) = text.split_once([' ', '\t']).unwrap_or((text, ""));
    Words {
        name,
        options: options.trim_ascii(),
    }
}

fn read_address(text: &str, family: Family) -> Option<IpAddr> {
    match family {
        Family::V4 => text.parse().ok().map(IpAddr::V4),
        Family::V6 => text.parse().ok().map(IpAddr::V6),
    }
}

/// What `-s` and `-d` take.
enum Network {
    Cidr {
        value: Cidr,
        as_printed: bool,
    },
    /// A mask that the kernel can hold but a length cannot say.
    WithHoles,
}

/// An address, or a network with its length or mask. The bits outside of it are cleared, as
/// iptables does.
fn read_network(text: &str, family: Family) -> Option<Network> {
    let (address, mask) = match text.split_once('/') {
        Some((address, mask)) => (address, Some(mask)),
        None => (text, None),
    };
    let address = read_address(address, family)?;
    let full = full_length(family);
    let prefix = match mask {
        None => full,
        Some(mask) => match mask.parse::<u8>() {
            Ok(length) if length <= full => length,
            Ok(_) => return None,
            Err(_) => match length_of_mask(read_address(mask, family)?) {
                Some(length) => length,
                None => return Some(Network::WithHoles),
            },
        },
    };
    let base = match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(u32::from(full - prefix)).unwrap_or(0);
            std::net::Ipv4Addr::from_bits(address.to_bits() & mask).into()
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(u32::from(full - prefix)).unwrap_or(0);
            std::net::Ipv6Addr::from_bits(address.to_bits() & mask).into()
        }
    };
    Some(Network::Cidr {
        value: Cidr { base, prefix },
        as_printed: base == address && mask.is_some(),
    })
}

fn length_of_mask(mask: IpAddr) -> Option<u8> {
    // Shifted up, so that both families end at the same bit.
    let (bits, full) = match mask {
        IpAddr::V4(mask) => (u128::from(mask.to_bits()) << 96, 32),
        IpAddr::V6(mask) => (mask.to_bits(), 128),
    };
    let length = bits.leading_ones();
    (bits.count_ones() == length && length <= full).then(|| u8::try_from(length).unwrap_or(u8::MAX))
}

/// `80`, `80:90`, `:90`, `80:`.
fn read_ports(text: &str) -> Option<Ports> {
    let Some((first, last)) = text.split_once(':') else {
        let port = text.parse().ok()?;
        return Some(Ports {
            first: port,
            last: port,
        });
    };
    let or = |text: &str, default| match text {
        "" => Some(default),
        text => text.parse().ok(),
    };
    Some(Ports {
        first: or(first, 0)?,
        last: or(last, u16::MAX)?,
    })
}

/// `VALUE` or `VALUE/MASK`; without a mask every bit counts.
fn read_mark(text: &str) -> Option<Mark> {
    let (value, mask) = match text.split_once('/') {
        Some((value, mask)) => (value, read_u32(mask)?),
        None => (text, u32::MAX),
    };
    Some(Mark {
        value: read_u32(value)?,
        mask,
    })
}

/// Hexadecimal with `0x`, octal with `0`, else decimal.
fn read_u32(text: &str) -> Option<u32> {
    let lower = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    match lower {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None if text.len() > 1 && text.starts_with('0') => u32::from_str_radix(text, 8).ok(),
        None => text.parse().ok(),
    }
}

/// In units of 2^-31, rounded as iptables does, and whether `iptables-save` can have printed it.
fn read_probability(text: &str) -> Option<(u32, bool)> {
    /// `iptables-save` prints eleven decimals.
    const PRINTED: usize = "0.00000000000".len();
    const HALF_A_DECIMAL: f64 = 0.5e-11;
    let probability: f64 = text.parse().ok()?;
    if !(0.0..=1.0).contains(&probability) {
        return None;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and 2^31"
    )]
    let rounded = (probability * PROBABILITY_ONE).round() as u32;
    let error = (f64::from(rounded) / PROBABILITY_ONE - probability).abs();
    // The halves of decimals are no floats: a hundredth more covers that.
    let as_printed = text.len() == PRINTED && error < HALF_A_DECIMAL * 1.01;
    Some((rounded, as_printed))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DUMPS: [(Family, &str); 6] = [
        (
            Family::V4,
            include_str!("../fixtures/kube-proxy-1.36.2/iptables-nft/iptables.save"),
        ),
        (
            Family::V6,
            include_str!("../fixtures/kube-proxy-1.36.2/iptables-nft/ip6tables.save"),
        ),
        (
            Family::V4,
            include_str!("../fixtures/kube-proxy-1.36.2/iptables-legacy/iptables.save"),
        ),
        (
            Family::V6,
            include_str!("../fixtures/kube-proxy-1.36.2/iptables-legacy/ip6tables.save"),
        ),
        (
            Family::V4,
            include_str!("../fixtures/kube-proxy-1.36.2/ipvs/iptables.save"),
        ),
        (
            Family::V6,
            include_str!("../fixtures/kube-proxy-1.36.2/ipvs/ip6tables.save"),
        ),
    ];

    /// The one rule of a table.
    fn rule(line: &str, family: Family) -> Result<String, Problem> {
        let text = format!("*filter\n:X - [0:0]\n-A X {line}\nCOMMIT\n");
        match parse(&text, family) {
            Ok(tables) => {
                let rules = &tables.chain("filter", "X").expect("a chain").rules;
                assert_eq!(rules.len(), 1);
                assert_eq!(rules[0].line, 3);
                Ok(rules[0].to_string())
            }
            Err(error) => {
                assert_eq!(error.line, 3);
                Err(error.problem)
            }
        }
    }

    fn v4(line: &str) -> String {
        rule(line, Family::V4).expect("one")
    }

    #[test]
    fn real_dumps_print_as_they_were() {
        for (family, dump) in DUMPS {
            let tables = parse(dump, family).expect("a dump");
            let printed = tables.list.iter().flat_map(|table| {
                table.chains.iter().flat_map(|chain| {
                    chain
                        .rules
                        .iter()
                        .map(|rule| (rule.line, rule.in_chain(chain.name)))
                })
            });
            let mut printed: Vec<(u32, String)> = printed.collect();
            printed.sort_unstable();
            let lines = (1..).zip(dump.lines());
            let rules = lines.filter(|(_, line)| line.starts_with("-A"));
            let rules: Vec<(u32, String)> = rules.map(|(at, line)| (at, line.into())).collect();
            assert_eq!(printed, rules);
            for (at, line) in (1..).zip(dump.lines()) {
                if let Some(declared) = line.strip_prefix(':') {
                    let name = declared.split(' ').next().expect("one");
                    let chains = tables.list.iter().filter_map(|table| table.chain(name));
                    assert!(
                        chains.into_iter().any(|chain| chain.declared == Some(at)
                            && chain.policy.is_some() == declared.contains("ACCEPT")),
                        "{line}"
                    );
                }
            }
        }
    }

    #[test]
    fn nothing_in_real_dumps_is_unknown() {
        for (family, dump) in DUMPS {
            for table in parse(dump, family).expect("a dump").list {
                for rule in table.chains.iter().flat_map(|chain| &chain.rules) {
                    let known = |part: &Match<'_>| !matches!(part, Match::Other(_));
                    assert!(rule.matches.iter().all(known), "{rule}");
                    assert!(!matches!(rule.target, Target::Other(_)), "{rule}");
                    assert!(rule.as_printed, "{rule}");
                }
            }
        }
    }

    #[test]
    fn kube_proxys_way_of_writing_is_the_same_rule() {
        for (written, saved) in [
            (
                "-m comment --comment \"a/b:c cluster IP\" -m tcp -p tcp -d 10.96.0.1 --dport 80 -j KUBE-SVC-A",
                "-d 10.96.0.1/32 -p tcp -m comment --comment \"a/b:c cluster IP\" -m tcp --dport 80 -j KUBE-SVC-A",
            ),
            (
                "-m comment --comment a/b -m udp -p udp -d 127.0.0.0/8 --dport 30000 -m nfacct --nfacct-name n -j E",
                "-d 127.0.0.0/8 -p udp -m comment --comment \"a/b\" -m udp --dport 30000 -m nfacct --nfacct-name  n -j E",
            ),
            (
                "-j MARK --or-mark 0x00004000",
                "-j MARK --set-xmark 0x4000/0x4000",
            ),
            (
                "-j MARK --xor-mark 0x00004000",
                "-j MARK --set-xmark 0x4000/0x0",
            ),
            (
                "-j MARK --and-mark 0xff",
                "-j MARK --set-xmark 0x0/0xffffff00",
            ),
            ("-j MARK --set-mark 0x1/0x2", "-j MARK --set-xmark 0x1/0x3"),
            ("-j MARK --set-mark 1", "-j MARK --set-xmark 0x1/0xffffffff"),
            ("-m mark --mark 16384", "-m mark --mark 0x4000"),
            (
                "-m statistic --mode random --probability 0.3333333333",
                "-m statistic --mode random --probability 0.33333333349",
            ),
            (
                "-m statistic --mode random --probability 0.1428571429",
                "-m statistic --mode random --probability 0.14285714272",
            ),
            ("-j REJECT", "-j REJECT --reject-with icmp-port-unreachable"),
            (
                "-m recent --name K --rcheck --seconds 10800 --reap -j K",
                "-m recent --rcheck --seconds 10800 --reap --name K --mask 255.255.255.255 --rsource -j K",
            ),
            (
                "-m recent --name K --set -m tcp -p tcp -j DNAT --to-destination 10.0.0.1:80",
                "-p tcp -m recent --set --name K --mask 255.255.255.255 --rsource -m tcp -j DNAT --to-destination 10.0.0.1:80",
            ),
            (
                "-m conntrack ! --ctstate DNAT,ESTABLISHED,RELATED",
                "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT",
            ),
            (
                "-m ipvs --vaddr 10.0.0.1 --vproto tcp --vport 80",
                "-m ipvs --vproto 6 --vaddr 10.0.0.1 --vport 80",
            ),
            ("-s 10.1.2.3/255.255.0.0", "-s 10.1.0.0/16"),
            ("-s 0.0.0.0/0 -p all -i +", ""),
            ("-p 6 --dport 1:9", "-p tcp -m tcp --dport 1:9"),
            (
                "-j DNAT --to-destination :80 --random",
                "-j DNAT --to-destination :80 --random",
            ),
            ("-g X", "-g X"),
            (
                "-m physdev ! --physdev-is-in -m set ! --match-set S dst,dst,src",
                "-m physdev ! --physdev-is-in -m set ! --match-set S dst,dst,src",
            ),
            (
                "-m multiport ! --dports 1,2:3 -j MASQUERADE --random-fully",
                "-m multiport ! --dports 1,2:3 -j MASQUERADE --random-fully",
            ),
        ] {
            assert_eq!(v4(written).trim_start(), saved);
            assert_eq!(v4(saved).trim_start(), saved);
        }
        assert_eq!(
            rule("-j REJECT", Family::V6).expect("one"),
            " -j REJECT --reject-with icmp6-port-unreachable"
        );
        assert_eq!(
            rule(
                "-s fd00::1 -j DNAT --to-destination [fd00::2]:80",
                Family::V6
            )
            .expect("one"),
            " -s fd00::1/128 -j DNAT --to-destination [fd00::2]:80"
        );
    }

    #[test]
    fn what_is_not_known_is_kept() {
        for line in [
            "-m foo --bar 1 ! --baz \"x -j y\" -j LOG --log-prefix \"-A X -m \" --log-level 4",
            "-m limit --limit 5/min --limit-burst 10 -j KUBE-X",
            "-p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
            "-m statistic --mode nth --every 2 --packet 0 -j X",
            "-m statistic --mode nth",
            "-j DNAT --to-destination 10.0.0.1-10.0.0.9",
            "-j DNAT --to-destination 10.0.0.1 --foo",
            "-m conntrack --ctstate NEW --ctproto 6 -j X",
            "! -f -j X",
            "-s 10.0.0.0/255.0.255.0 -j X",
            "-p foo -j X",
            "-j MASQUERADE --to-ports 1-2",
            "-j DNAT --to-destination :0 --persistent",
        ] {
            let printed = v4(line);
            assert_eq!(printed.trim_start(), line);
        }
    }

    #[test]
    fn a_revision_that_the_binary_did_not_know_is_kept() {
        for line in [
            "-j DNAT [unsupported revision]",
            "-p tcp -m tcp -j DNAT [unsupported revision]",
            "-m conntrack [unsupported revision] -j X",
            "-m foo --bar [unsupported revision] -m comment --comment \"x y\" -j X",
            "-j MARK --set-xmark x [unsupported revision]",
            "-s 10.0.0.300 [unsupported revision]",
        ] {
            let printed = v4(line);
            assert_eq!(printed.trim_start(), line);
        }
        let text =
            "*nat\n-A X -s 10.0.0.1/32 -m conntrack [unsupported revision] -j DROP\nCOMMIT\n";
        let tables = parse(text, Family::V4).expect("a dump");
        let rule = &tables.chain("nat", "X").expect("a chain").rules[0];
        assert!(rule.source.is_some());
        assert_eq!(rule.target, Target::Drop);
        assert_eq!(
            rule.matches[..],
            [Match::Other(Words {
                name: "conntrack",
                options: "[unsupported revision]"
            })]
        );
        for line in ["[unsupported revision", "-j X [other revision]"] {
            assert!(rule_of(line).is_err(), "{line}");
        }
    }

    fn rule_of(line: &str) -> Result<String, Problem> {
        rule(line, Family::V4)
    }

    #[test]
    fn of_several_destinations_the_last_with_an_address_counts() {
        let to = "-j DNAT --to-destination 10.0.0.5:80";
        for line in [
            "-j DNAT --to-destination :0 --persistent --to-destination :0 --persistent \
             --to-destination 10.0.0.5:80",
            "-j DNAT --to-destination 10.0.0.5:80 --to-destination :0",
            "-j DNAT --to-destination :81 --random --to-destination 10.0.0.5:80",
            "-j DNAT --to-destination 10.0.0.4:80 --to-destination 10.0.0.5:80",
        ] {
            assert_eq!(v4(line).trim_start(), to, "{line}");
        }
        let v6 = |line: &str| rule(line, Family::V6).expect("one");
        for (line, saved) in [
            (
                "-j DNAT --to-destination :0 --persistent --to-destination [fd00::2]:80",
                "-j DNAT --to-destination [fd00::2]:80",
            ),
            (
                "-j DNAT --to-destination :0 --persistent",
                "-j DNAT --to-destination :0 --persistent",
            ),
            (
                "-j DNAT --to-destination :80",
                "-j DNAT --to-destination :80",
            ),
            (
                "-j DNAT --to-destination ::1",
                "-j DNAT --to-destination ::1",
            ),
        ] {
            assert_eq!(v6(line).trim_start(), saved);
        }
    }

    #[test]
    fn comments_are_unquoted() {
        let text = "*nat\n:X - [0:0]\n-A X -m comment --comment \"a \\\"b\\\\ \\'c\"\nCOMMIT\n";
        let tables = parse(text, Family::V4).expect("a dump");
        let rule = &tables.chain("nat", "X").expect("a chain").rules[0];
        assert_eq!(rule.comment(), Some("a \"b\\ 'c"));
        assert_eq!(
            rule.to_string(),
            " -m comment --comment \"a \\\"b\\\\ \\'c\""
        );
    }

    #[test]
    fn values_that_are_none_are_errors() {
        for line in [
            "-p tcp -m tcp --dport 70000",
            "-p tcp -m tcp --dport http",
            "-s 10.0.0.300",
            "-s 10.0.0.0/33",
            "-d fd00::1",
            "-s",
            "!",
            "-m statistic --mode random --probability 1.5",
            "-m statistic --mode random --probability NaN",
            "-m mark --mark x",
            "-m conntrack --ctstate NEV",
            "-m addrtype --dst-type LOCALE",
            "-m set --match-set X dst,dts",
            "-m set -j ACCEPT",
            "-j DNAT --to-destination 10.0.0.1:99999",
            "-j DNAT --to-destination :",
            "rubbish",
            "-m recent --set --name \"A --rsource",
            "-m comment --comment \"no end",
        ] {
            assert!(rule(line, Family::V4).is_err(), "{line}");
        }
    }

    #[test]
    fn restores_commands_are_done() {
        let text = "*nat\n:A - [0:0]\n:B - [0:0]\n-A A -j B\n-I A -j ACCEPT\n[1:2] -I A -j DROP\n\
                    -I OUTPUT -j A\n:B - [0:0]\n-X B\nCOMMIT\n*nat\n-A A -j RETURN\nCOMMIT\n";
        let tables = parse(text, Family::V4).expect("a dump");
        let nat = tables.table("nat").expect("one");
        let rules = |chain: &str| -> Vec<String> {
            let chain = nat.chain(chain).expect("a chain");
            chain.rules.iter().map(Rule::to_string).collect()
        };
        assert_eq!(
            rules("A"),
            [" -j DROP", " -j ACCEPT", " -j B", " -j RETURN"]
        );
        assert_eq!(rules("OUTPUT"), [" -j A"]);
        assert!(nat.chain("B").is_none());
        assert_eq!(nat.chain("A").expect("a chain").declared, Some(2));
        assert_eq!(nat.chain("OUTPUT").expect("a chain").declared, None);
    }

    #[test]
    fn text_that_is_no_dump_is_an_error() {
        let problem = |text: &str| parse(text, Family::V4).expect_err("no dump");
        assert_eq!(problem("-A X -j Y\n").problem, Problem::NoTable);
        assert_eq!(problem(":X - [0:0]\n").problem, Problem::NoTable);
        assert_eq!(
            problem("*nat\n*filter\n").problem,
            Problem::NotEnded("nat".into())
        );
        assert_eq!(
            problem("*nat\n:X - [0:0]\n").problem,
            Problem::Cut("nat".into())
        );
        assert_eq!(problem("\u{0}\u{1}\n").line, 1);
        for line in [
            ":KUBE-X ACCEPT [0:0]",
            ":INPUT REJECT [0:0]",
            ":X - [0:0",
            ":",
            ":X",
            "-A",
            "-Z X",
            "[1:2",
        ] {
            assert_eq!(
                problem(&format!("*filter\n{line}\nCOMMIT\n")).line,
                2,
                "{line}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC*", line in "[-!:*\"\\\\ a-z0-9.,/]*") {
            let _ = parse(&text, Family::V4);
            let _ = rule(&line.replace('\n', " "), Family::V6);
        }

        #[test]
        fn damaged_dumps_are_read_or_refused(
            dump in 0..DUMPS.len(),
            at in any::<prop::sample::Index>(),
            length in 0..30_usize,
            put in "[-!:*\"\\\\ a-zA-Z0-9.,/\n]{0,8}",
        ) {
            let (family, dump) = DUMPS[dump];
            let start = at.index(dump.len());
            let end = (start + length).min(dump.len());
            let damaged = format!("{}{put}{}", &dump[..start], &dump[end..]);
            let _ = parse(&damaged, family);
        }

        #[test]
        fn what_is_printed_is_read_back(
            dump in 0..DUMPS.len(),
            at in any::<prop::sample::Index>(),
            put in "[-!\"\\\\ a-zA-Z0-9.,/]{0,8}",
        ) {
            let (family, dump) = DUMPS[dump];
            let start = at.index(dump.len());
            let damaged = format!("{}{put}{}", &dump[..start], &dump[start..]);
            if let Ok(tables) = parse(&damaged, family) {
                for table in &tables.list {
                    for chain in table.chains.iter().filter(|chain| !chain.name.contains('"')) {
                        for rule in &chain.rules {
                            let text = format!("*t\n{}\nCOMMIT\n", rule.in_chain(chain.name));
                            let again = parse(&text, family);
                            let again = again.map_err(|error| TestCaseError::fail(format!("{rule}: {error}")))?;
                            prop_assert_eq!(&again.list[0].chains[0].rules[0], rule);
                        }
                    }
                }
            }
        }
    }
}
