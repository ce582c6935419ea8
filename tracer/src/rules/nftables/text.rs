//! Text to tables: what `nft list ruleset` prints, and the scripts that `nft -f` takes.
//!
//! Both end in the same values. A statement that kube-proxy does not use becomes
//! [`Statement::Other`]; text that is no ruleset at all, or one that is cut, is an error.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::cluster::Family;

use super::table::{
    Base, Chain, ChainKind, DataType, Destination, Element, Field, Key, Line, Mapped, MarkChange,
    Masquerade, Operand, PRIORITIES, Range, Ranges, Rule, Ruleset, Set, Statement, TABLE, Table,
    Target, Text, Value, Verdict, VerdictMap, hook, parse_number, parse_protocol,
};

/// Text that is no ruleset.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {what}")]
pub struct ParseError {
    /// Line, from 1.
    pub line: u32,
    /// Column, from 1, in bytes.
    pub column: u32,
    /// What is wrong.
    pub what: String,
}

/// Reads a dump (`nft list table`, `nft list ruleset`) or a script (`nft -f`).
pub fn parse(text: &str) -> Result<Ruleset, ParseError> {
    let mut ruleset = Ruleset::default();
    apply(&mut ruleset, text)?;
    Ok(ruleset)
}

/// Runs a script on what is there. A dump is a script that adds its tables.
pub fn apply(ruleset: &mut Ruleset, script: &str) -> Result<(), ParseError> {
    Parser {
        lexer: Lexer::new(script),
        tokens: Vec::new(),
        start: Line::default(),
    }
    .ruleset(ruleset)
}

// ---- words ----

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token<'a> {
    Word(&'a str),
    Quoted(&'a str),
    Open,
    Close,
    Comma,
    Semicolon,
    Newline,
}

impl<'a> Token<'a> {
    /// A word, quoted or not.
    fn text(self) -> Option<&'a str> {
        match self {
            Self::Word(text) | Self::Quoted(text) => Some(text),
            _ => None,
        }
    }

    fn is_end(self) -> bool {
        matches!(self, Self::Newline | Self::Semicolon)
    }
}

struct Lexer<'a> {
    text: &'a str,
    at: usize,
    line: u32,
    line_start: usize,
    /// Where the last token began.
    token: usize,
    /// Its line and where that began.
    token_line: (u32, usize),
}

impl<'a> Lexer<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            text,
            at: 0,
            line: 1,
            line_start: 0,
            token: 0,
            token_line: (1, 0),
        }
    }

    fn error(&self, what: impl Into<String>) -> ParseError {
        let (line, line_start) = self.token_line;
        let column = self.token.saturating_sub(line_start) + 1;
        ParseError {
            line,
            column: u32::try_from(column).unwrap_or(u32::MAX),
            what: what.into(),
        }
    }

    fn slice(&self, from: usize, to: usize) -> &'a str {
        self.text.get(from..to).unwrap_or_default()
    }

    fn next(&mut self) -> Result<Option<Token<'a>>, ParseError> {
        let bytes = self.text.as_bytes();
        loop {
            self.token = self.at;
            self.token_line = (self.line, self.line_start);
            let Some(byte) = bytes.get(self.at) else {
                return Ok(None);
            };
            self.at += 1;
            return Ok(Some(match byte {
                b'\n' => {
                    self.line = self.line.saturating_add(1);
                    self.line_start = self.at;
                    Token::Newline
                }
                b' ' | b'\t' | b'\r' => continue,
                b'\\' if bytes.get(self.at) == Some(&b'\n') => {
                    self.at += 1;
                    self.line = self.line.saturating_add(1);
                    self.line_start = self.at;
                    continue;
                }
                b'#' => {
                    self.at = self.find(|byte| byte == b'\n');
                    continue;
                }
                b'{' => Token::Open,
                b'}' => Token::Close,
                b',' => Token::Comma,
                b';' => Token::Semicolon,
                b'"' => {
                    let start = self.at;
                    let end = self.find(|byte| matches!(byte, b'"' | b'\n'));
                    if bytes.get(end) != Some(&b'"') {
                        return Err(self.error("a text whose closing quote is missing"));
                    }
                    self.at = end + 1;
                    Token::Quoted(self.slice(start, end))
                }
                _ => {
                    self.at = self.find(|byte| {
                        matches!(
                            byte,
                            b' ' | b'\n' | b'\t' | b'\r' | b'{' | b'}' | b',' | b';' | b'"'
                        )
                    });
                    Token::Word(self.slice(self.token, self.at))
                }
            }));
        }
    }

    /// The position of the next byte of which `stop` holds, or the end.
    fn find(&self, stop: impl Fn(u8) -> bool) -> usize {
        let bytes = self.text.as_bytes();
        bytes
            .get(self.at..)
            .and_then(|rest| rest.iter().position(|byte| stop(*byte)))
            .map_or(bytes.len(), |offset| self.at + offset)
    }
}

// ---- blocks and commands ----

/// What ended a run of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// A newline, a semicolon, or the comma between elements.
    Separator,
    /// The brace that closes the block.
    Block,
    /// The end of the text.
    Text,
}

struct Parser<'a> {
    lexer: Lexer<'a>,
    /// The statement or element being read, without newlines.
    tokens: Vec<Token<'a>>,
    /// Where the first of them stands.
    start: Line,
}

type Parsed<T> = Result<T, ParseError>;

impl<'a> Parser<'a> {
    fn ruleset(&mut self, ruleset: &mut Ruleset) -> Parsed<()> {
        while let Some(token) = self.lexer.next()? {
            match token {
                Token::Newline | Token::Semicolon => {}
                Token::Word("table") => self.dumped_table(ruleset)?,
                Token::Word(
                    verb @ ("add" | "create" | "insert" | "flush" | "delete" | "destroy"),
                ) => self.command(ruleset, verb)?,
                _ => {
                    return Err(self
                        .lexer
                        .error("neither a table nor a command of an nft script"));
                }
            }
        }
        Ok(())
    }

    /// A word without quotes: names of tables, chains and sets never have them.
    fn word(&mut self, what: &str) -> Parsed<&'a str> {
        match self.lexer.next()? {
            Some(Token::Word(word)) => Ok(word),
            _ => Err(self.lexer.error(format!("{what} is missing"))),
        }
    }

    /// The text of a comment, which is this token.
    fn comment(&self, token: Option<Token<'a>>) -> Parsed<&'a str> {
        match token.and_then(Token::text) {
            Some(text) => Ok(text),
            None => Err(self.lexer.error("the comment's text is missing")),
        }
    }

    fn open(&mut self) -> Parsed<()> {
        match self.lexer.next()? {
            Some(Token::Open) => Ok(()),
            _ => Err(self.lexer.error("'{' is missing")),
        }
    }

    fn cut(&self) -> ParseError {
        self.lexer.error("the text ends before a '}'")
    }

    /// The line of the last token.
    fn here(&self) -> Line {
        Line(self.lexer.token_line.0)
    }

    /// `table FAMILY NAME {`, or one of a family whose name is left out (`ip`).
    fn table_name(&mut self) -> Parsed<(&'a str, &'a str)> {
        let family = self.word("the table's family")?;
        match family {
            "ip" | "ip6" | "inet" | "arp" | "bridge" | "netdev" => {
                Ok((family, self.word("the table's name")?))
            }
            name => Ok(("ip", name)),
        }
    }

    fn dumped_table(&mut self, ruleset: &mut Ruleset) -> Parsed<()> {
        let line = self.here();
        let (family, name) = self.table_name()?;
        self.open()?;
        let Some(family) = ours(family, name) else {
            ruleset.foreign.push((family.into(), name.into()));
            if self.skip_table()? {
                ruleset.hooked.push((family.into(), name.into()));
            }
            return Ok(());
        };
        if ruleset.table(family).is_some() {
            return Err(self
                .lexer
                .error(format!("table {} {TABLE} a second time", family.nft())));
        }
        let mut table = Table::new(family);
        table.line = line;
        self.table_body(&mut table)?;
        *ruleset.slot(family) = Some(table);
        Ok(())
    }

    /// As [`Self::skip_block`], of the table of somebody else: do packets pass it?
    fn skip_table(&mut self) -> Parsed<bool> {
        let (mut depth, mut flags) = (1_u32, false);
        let (mut hooked, mut dormant) = (false, false);
        let mut before = [Token::Open; 2];
        while depth > 0 {
            let Some(token) = self.lexer.next()? else {
                return Err(self.cut());
            };
            match token {
                Token::Open => depth = depth.saturating_add(1),
                Token::Close => depth -= 1,
                Token::Word("flags") if depth == 1 => flags = true,
                Token::Word("dormant") if depth == 1 => dormant |= flags,
                // `type filter hook`; flowtables have a hook too, and no type.
                Token::Word("hook") if depth == 2 => hooked |= before[0] == Token::Word("type"),
                token if token.is_end() => flags = false,
                _ => {}
            }
            before = [before[1], token];
        }
        Ok(hooked && !dormant)
    }

    /// Up to the brace that closes the block which has just been opened.
    fn skip_block(&mut self) -> Parsed<()> {
        let mut depth = 1_u32;
        while depth > 0 {
            match self.lexer.next()? {
                Some(Token::Open) => depth = depth.saturating_add(1),
                Some(Token::Close) => depth -= 1,
                Some(_) => {}
                None => return Err(self.cut()),
            }
        }
        Ok(())
    }

    fn table_body(&mut self, table: &mut Table) -> Parsed<()> {
        loop {
            match self.lexer.next()? {
                None => return Err(self.cut()),
                Some(Token::Close) => return Ok(()),
                Some(Token::Newline | Token::Semicolon) => {}
                Some(Token::Word("comment")) => {
                    let token = self.lexer.next()?;
                    let comment = self.comment(token)?;
                    self.once(&mut table.comment, comment.into(), "comment")?;
                }
                Some(Token::Word("flags")) => match self.word("the flag")? {
                    "dormant" if !table.dormant => table.dormant = true,
                    _ => return Err(self.lexer.error("a flag that this table cannot have")),
                },
                Some(Token::Word("chain")) => {
                    let line = self.here();
                    let name = self.word("the chain's name")?;
                    self.open()?;
                    let mut chain = Chain {
                        line,
                        ..Chain::default()
                    };
                    self.chain_body(&mut chain)?;
                    if table.chains.insert(name.into(), chain).is_some() {
                        return Err(self.lexer.error(format!("chain {name} a second time")));
                    }
                }
                Some(Token::Word(kind @ ("set" | "map"))) => {
                    let line = self.here();
                    let name = self.word("the set's name")?;
                    self.open()?;
                    let mut set = Set {
                        line,
                        ..Set::default()
                    };
                    self.set_body(&mut set, kind)?;
                    if table.sets.insert(name.into(), set).is_some() {
                        return Err(self.lexer.error(format!("{kind} {name} a second time")));
                    }
                }
                Some(Token::Word(
                    kind @ ("flowtable" | "counter" | "quota" | "limit" | "secmark" | "synproxy"
                    | "ct" | "tunnel"),
                )) => {
                    let line = self.here();
                    let mut name = kind.to_owned();
                    loop {
                        match self.lexer.next()? {
                            Some(Token::Open) => break,
                            Some(Token::Word(word)) => {
                                name.push(' ');
                                name.push_str(word);
                            }
                            _ => return Err(self.lexer.error("'{' is missing")),
                        }
                    }
                    self.skip_block()?;
                    table.others.insert(name.into(), line);
                }
                Some(_) => return Err(self.lexer.error("nothing that a table can hold")),
            }
        }
    }

    /// Sets what a dump says only once.
    fn once<T>(&self, slot: &mut Option<T>, value: T, what: &str) -> Parsed<()> {
        if slot.replace(value).is_some() {
            return Err(self.lexer.error(format!("{what} a second time")));
        }
        Ok(())
    }

    /// Reads one statement into `tokens`; inside braces newlines mean nothing.
    fn statement(&mut self, first: Token<'a>) -> Parsed<End> {
        self.tokens.clear();
        self.run(Some(first), Token::is_end)
    }

    /// Reads one element into `tokens`, up to the comma or brace after it.
    fn element(&mut self) -> Parsed<End> {
        self.tokens.clear();
        self.run(None, |token| token == Token::Comma)
    }

    fn run(&mut self, first: Option<Token<'a>>, ends: impl Fn(Token<'a>) -> bool) -> Parsed<End> {
        let mut depth = 0_u32;
        let mut next = first;
        loop {
            let token = match next.take() {
                Some(token) => token,
                None => match self.lexer.next()? {
                    Some(token) => token,
                    None if depth > 0 => return Err(self.cut()),
                    None => return Ok(End::Text),
                },
            };
            match token {
                token if depth == 0 && ends(token) => return Ok(End::Separator),
                Token::Close if depth == 0 => return Ok(End::Block),
                Token::Close => depth -= 1,
                Token::Open => depth = depth.saturating_add(1),
                _ => {}
            }
            if token != Token::Newline {
                if self.tokens.is_empty() {
                    self.start = self.here();
                }
                self.tokens.push(token);
            }
        }
    }

    fn chain_body(&mut self, chain: &mut Chain) -> Parsed<()> {
        let mut policy = None;
        loop {
            let token = match self.lexer.next()? {
                None => return Err(self.cut()),
                Some(Token::Close) => break,
                Some(token) if token.is_end() => continue,
                Some(token) => token,
            };
            let end = self.statement(token)?;
            match &self.tokens[..] {
                [Token::Word("comment"), text] if chain.rules.is_empty() => {
                    let text = self.comment(Some(*text))?;
                    self.once(&mut chain.comment, text.into(), "comment")?;
                }
                [Token::Word("type"), ..] => {
                    let base = base(&self.tokens)
                        .ok_or_else(|| self.lexer.error("no type, hook and priority"))?;
                    self.once(&mut chain.base, base, "type")?;
                }
                [
                    Token::Word("policy"),
                    Token::Word(word @ ("accept" | "drop")),
                ] => {
                    self.once(&mut policy, *word == "accept", "policy")?;
                }
                tokens => chain.rules.push(rule(tokens, self.start)),
            }
            match end {
                End::Separator => {}
                End::Block => break,
                End::Text => return Err(self.cut()),
            }
        }
        match (&mut chain.base, policy) {
            (Some(base), policy) => base.accepts = policy.unwrap_or(true),
            (None, None) => {}
            (None, Some(_)) => return Err(self.lexer.error("a policy without a hook")),
        }
        Ok(())
    }

    fn set_body(&mut self, set: &mut Set, kind: &str) -> Parsed<()> {
        let mut flags = None;
        let mut listed = false;
        loop {
            let token = match self.lexer.next()? {
                None => return Err(self.cut()),
                Some(Token::Close) => break,
                Some(token) if token.is_end() => continue,
                Some(Token::Word("elements")) => {
                    if self.lexer.next()? != Some(Token::Word("=")) {
                        return Err(self.lexer.error("'=' is missing"));
                    }
                    if listed {
                        return Err(self.lexer.error("elements a second time"));
                    }
                    listed = true;
                    self.open()?;
                    self.elements(set, Repeats::Refused)?;
                    continue;
                }
                Some(token) => token,
            };
            let end = self.statement(token)?;
            match &self.tokens[..] {
                [Token::Word("type" | "typeof"), types @ ..] => {
                    if !set.key.is_empty() {
                        return Err(self.lexer.error("type a second time"));
                    }
                    (set.key, set.value) =
                        set_type(types).ok_or_else(|| self.lexer.error("no type"))?;
                }
                [Token::Word("flags"), words @ ..] => {
                    self.once(&mut flags, (), "flags")?;
                    for word in words {
                        match word {
                            Token::Word("dynamic") => set.flags.dynamic = true,
                            Token::Word("timeout") => set.flags.timeout = true,
                            Token::Word("interval") => set.flags.interval = true,
                            Token::Word("constant") => set.flags.constant = true,
                            Token::Comma => {}
                            _ => return Err(self.lexer.error("no flag of a set")),
                        }
                    }
                }
                [Token::Word("timeout"), Token::Word(time)] => {
                    let seconds = parse_seconds(time).ok_or_else(|| self.lexer.error("no time"))?;
                    self.once(&mut set.timeout, seconds, "timeout")?;
                }
                [Token::Word("size"), Token::Word(size)] => {
                    let size = size.parse().map_err(|_| self.lexer.error("no size"))?;
                    self.once(&mut set.size, size, "size")?;
                }
                [Token::Word("comment"), text] => {
                    let text = self.comment(Some(*text))?;
                    self.once(&mut set.comment, text.into(), "comment")?;
                }
                [Token::Word("counter"), ..] => {}
                tokens => set.others.push(spell(tokens)),
            }
            match end {
                End::Separator => {}
                End::Block => break,
                End::Text => return Err(self.cut()),
            }
        }
        if set.key.is_empty() {
            return Err(self.lexer.error("a set without a type"));
        }
        if set.value.is_some() != (kind == "map") {
            return Err(self.lexer.error(format!("no {kind} has such a type")));
        }
        Ok(())
    }

    /// The elements up to the brace that closes them.
    fn elements(&mut self, set: &mut Set, repeats: Repeats) -> Parsed<()> {
        loop {
            let end = self.element()?;
            if !self.tokens.is_empty() {
                let (key, element) = element(&self.tokens, set, self.start)
                    .ok_or_else(|| self.lexer.error("before here, no element of this set"))?;
                match set.elements.entry(key) {
                    Entry::Vacant(entry) => {
                        entry.insert(element);
                    }
                    Entry::Occupied(entry)
                        if repeats == Repeats::Ignored && *entry.get() == element => {}
                    Entry::Occupied(_) => {
                        return Err(self.lexer.error("before here, an element a second time"));
                    }
                }
            } else if end == End::Separator {
                return Err(self.lexer.error("an element is missing"));
            }
            match end {
                End::Separator => {}
                End::Block => return Ok(()),
                End::Text => return Err(self.cut()),
            }
        }
    }

    // ---- commands ----

    fn command(&mut self, ruleset: &mut Ruleset, verb: &str) -> Parsed<()> {
        let object = self.word("what the command is about")?;
        if (verb, object) == ("flush", "ruleset") {
            *ruleset = Ruleset::default();
            return Ok(());
        }
        let (family, name) = self.table_name()?;
        let Some(family) = ours(family, name) else {
            return Err(self
                .lexer
                .error(format!("a command for table {family} {name}, not {TABLE}")));
        };
        match (verb, object) {
            ("add" | "create", "table") => {
                let mut added = Table::new(family);
                added.line = self.here();
                if self.body_follows()? {
                    self.table_body(&mut added)?;
                }
                ruleset.slot(family).get_or_insert(added);
            }
            ("delete", "table") => {
                if ruleset.slot(family).take().is_none() {
                    return Err(self.no_table(family));
                }
            }
            ("destroy", "table") => {
                ruleset.slot(family).take();
            }
            _ => {
                let table = ruleset.slot(family).as_mut();
                let table = table.ok_or_else(|| self.no_table(family))?;
                self.table_command(table, verb, object)?;
            }
        }
        Ok(())
    }

    fn no_table(&self, family: Family) -> ParseError {
        self.lexer
            .error(format!("there is no table {} {TABLE}", family.nft()))
    }

    fn table_command(&mut self, table: &mut Table, verb: &str, object: &str) -> Parsed<()> {
        if (verb, object) == ("flush", "table") {
            for chain in table.chains.values_mut() {
                chain.rules.clear();
            }
            return Ok(());
        }
        let line = self.here();
        let name = self.word("the object's name")?;
        match (verb, object) {
            ("add" | "create", "chain") => {
                let mut chain = Chain {
                    line,
                    ..Chain::default()
                };
                if self.body_follows()? {
                    self.chain_body(&mut chain)?;
                }
                match table.chains.entry(name.into()) {
                    Entry::Vacant(entry) => {
                        entry.insert(chain);
                    }
                    Entry::Occupied(entry)
                        if chain.base.is_some() && entry.get().base != chain.base =>
                    {
                        return Err(self.other_definition("chain", name));
                    }
                    Entry::Occupied(_) => {}
                }
            }
            ("add" | "create", "set" | "map") => {
                self.open()?;
                let mut set = Set {
                    line,
                    ..Set::default()
                };
                self.set_body(&mut set, object)?;
                match table.sets.entry(name.into()) {
                    Entry::Vacant(entry) => {
                        entry.insert(set);
                    }
                    Entry::Occupied(mut entry) => {
                        let there = entry.get_mut();
                        if (&there.key, &there.value, there.flags)
                            != (&set.key, &set.value, set.flags)
                        {
                            return Err(self.other_definition(object, name));
                        }
                        // The one property that a kernel of today updates.
                        there.timeout = set.timeout;
                    }
                }
            }
            ("add" | "create" | "insert", "rule") => {
                let first = self.lexer.next()?;
                let first = first.ok_or_else(|| self.lexer.error("the rule is missing"))?;
                self.statement(first)?;
                if self.tokens.is_empty() {
                    return Err(self.lexer.error("the rule is missing"));
                }
                let added = rule(&self.tokens, line);
                for statement in &added.statements {
                    if let Statement::Update { set, .. } = statement
                        && let Some(set) = table.sets.get_mut(set)
                    {
                        set.size.get_or_insert(Set::DYNAMIC_SIZE);
                    }
                }
                let chain = table
                    .chains
                    .get_mut(name)
                    .ok_or_else(|| self.lexer.error(format!("there is no chain {name}")))?;
                let place = if verb == "insert" {
                    0
                } else {
                    chain.rules.len()
                };
                chain.rules.insert(place, added);
            }
            ("add" | "create" | "delete" | "destroy", "element") => {
                self.open()?;
                let set = table
                    .sets
                    .get_mut(name)
                    .ok_or_else(|| self.lexer.error(format!("there is no set {name}")))?;
                if matches!(verb, "add" | "create") {
                    return self.elements(set, Repeats::Ignored);
                }
                let mut gone = Set {
                    key: set.key.clone(),
                    value: set.value.clone(),
                    ..Set::default()
                };
                self.elements(&mut gone, Repeats::Ignored)?;
                for key in gone.elements.keys() {
                    if set.elements.remove(key).is_none() && verb == "delete" {
                        return Err(self.lexer.error(format!("an element that {name} has not")));
                    }
                }
            }
            ("flush", "chain") => match table.chains.get_mut(name) {
                Some(chain) => chain.rules.clear(),
                None => return Err(self.lexer.error(format!("there is no chain {name}"))),
            },
            ("flush", "set" | "map") => match table.sets.get_mut(name) {
                Some(set) => set.elements.clear(),
                None => return Err(self.lexer.error(format!("there is no {object} {name}"))),
            },
            ("delete" | "destroy", "chain") => {
                if table.chains.remove(name).is_none() && verb == "delete" {
                    return Err(self.lexer.error(format!("there is no chain {name}")));
                }
            }
            ("delete" | "destroy", "set" | "map") => {
                if table.sets.remove(name).is_none() && verb == "delete" {
                    return Err(self.lexer.error(format!("there is no {object} {name}")));
                }
            }
            _ => {
                return Err(self
                    .lexer
                    .error(format!("unknown command: {verb} {object}")));
            }
        }
        Ok(())
    }

    fn other_definition(&self, object: &str, name: &str) -> ParseError {
        self.lexer
            .error(format!("{object} {name} is there with another definition"))
    }

    /// Does a block follow on this line? If so, it is open now.
    fn body_follows(&mut self) -> Parsed<bool> {
        match self.lexer.next()? {
            Some(Token::Open) => Ok(true),
            None | Some(Token::Newline | Token::Semicolon) => Ok(false),
            Some(_) => Err(self.lexer.error("neither a block nor the end of the line")),
        }
    }
}

/// May an element be added twice?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Repeats {
    /// A dump has each once.
    Refused,
    /// A script may add what is there.
    Ignored,
}

/// The family of a table, if it is one of kube-proxy's.
pub(in crate::rules) fn ours(family: &str, name: &str) -> Option<Family> {
    if name != TABLE {
        return None;
    }
    Family::ALL.into_iter().find(|ours| ours.nft() == family)
}

/// Tokens as one text.
fn spell(tokens: &[Token<'_>]) -> Text {
    let mut text = String::new();
    for token in tokens {
        if !text.is_empty() && *token != Token::Comma {
            text.push(' ');
        }
        match token {
            Token::Word(word) => text.push_str(word),
            Token::Quoted(quoted) => {
                text.push('"');
                text.push_str(quoted);
                text.push('"');
            }
            Token::Open => text.push('{'),
            Token::Close => text.push('}'),
            Token::Comma => text.push(','),
            Token::Semicolon => text.push(';'),
            Token::Newline => {}
        }
    }
    text.into()
}

/// `3h`, `2h59m30s`, `10800s`, `500ms`: whole seconds.
fn parse_seconds(time: &str) -> Option<u64> {
    let mut milliseconds = 0_u64;
    let mut rest = time;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at_checked(digits)?;
        let letters = after.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, after) = after.split_at_checked(letters)?;
        let unit = match unit {
            "d" => 86_400_000,
            "h" => 3_600_000,
            "m" => 60_000,
            "s" | "" => 1000,
            "ms" => 1,
            _ => return None,
        };
        let part = number.parse::<u64>().ok()?.checked_mul(unit)?;
        milliseconds = milliseconds.checked_add(part)?;
        rest = after;
    }
    (!time.is_empty()).then_some(milliseconds / 1000)
}

/// `type filter hook input priority filter`.
fn base(tokens: &[Token<'_>]) -> Option<Base> {
    let [
        Token::Word("type"),
        Token::Word(kind),
        Token::Word("hook"),
        Token::Word(hook),
        Token::Word("priority"),
        priority @ ..,
    ] = tokens
    else {
        return None;
    };
    let named = |name: &str| {
        PRIORITIES
            .into_iter()
            .find_map(|(known, priority)| (known == name).then_some(priority))
    };
    let priority = match priority {
        [Token::Word(word)] => named(word).or_else(|| word.parse().ok())?,
        [
            Token::Word(name),
            Token::Word(sign @ ("-" | "+")),
            Token::Word(offset),
        ] => {
            let offset: i32 = offset.parse().ok()?;
            let offset = if *sign == "-" {
                offset.checked_neg()?
            } else {
                offset
            };
            named(name)?.checked_add(offset)?
        }
        _ => return None,
    };
    Some(Base {
        kind: ChainKind::ALL
            .into_iter()
            .find(|known| known.name() == *kind)?,
        hook: self::hook(hook)?,
        priority,
        accepts: true,
    })
}

/// `ipv4_addr . inet_proto : verdict`.
fn set_type(tokens: &[Token<'_>]) -> Option<(Vec<DataType>, Option<DataType>)> {
    let mut halves = tokens.split(|token| *token == Token::Word(":"));
    let key = halves
        .next()?
        .split(|token| *token == Token::Word("."))
        .map(data_type)
        .collect::<Option<Vec<_>>>()?;
    let value = match halves.next() {
        Some(value) => Some(data_type(value)?),
        None => None,
    };
    halves.next().is_none().then_some((key, value))
}

fn data_type(tokens: &[Token<'_>]) -> Option<DataType> {
    match tokens {
        [] => None,
        [Token::Word(name)] => Some(named_type(name)),
        tokens => Some(DataType::Other(spell(tokens))),
    }
}

/// The type of this name.
pub(super) fn named_type(name: &str) -> DataType {
    match name {
        "ipv4_addr" => DataType::Address(Family::V4),
        "ipv6_addr" => DataType::Address(Family::V6),
        "inet_proto" => DataType::Protocol,
        "inet_service" => DataType::Port,
        "verdict" => DataType::Verdict,
        other => DataType::Other(other.into()),
    }
}

/// One element of `set`.
fn element(tokens: &[Token<'_>], set: &Set, line: Line) -> Option<(Key, Element)> {
    let mut words = Words { tokens };
    let key = words.key(set.key.len(), |part| match set.key.get(part) {
        Some(DataType::Protocol) => Part::Protocol,
        Some(DataType::Other(_)) => Part::Name,
        _ => Part::Plain,
    })?;
    let mut element = Element {
        line,
        ..Element::default()
    };
    while let Some(token) = words.next() {
        match token {
            Token::Word("timeout" | "expires") => {
                parse_seconds(words.word()?)?;
            }
            Token::Word("comment") => {
                if element.comment.replace(words.text()?.into()).is_some() {
                    return None;
                }
            }
            Token::Word("counter") => words.skip_counter(),
            // When it last matched, which is state.
            Token::Word("last") => {
                words.take(Token::Word("used"));
                words.word()?;
            }
            Token::Word(":") => {
                let rest = std::mem::take(&mut words.tokens);
                let mut value = Words { tokens: rest };
                element.value = Some(match value.verdict() {
                    Some(verdict) if value.tokens.is_empty() => Mapped::Verdict(verdict),
                    _ if rest.is_empty() => return None,
                    _ => Mapped::Other(spell(rest)),
                });
            }
            _ => return None,
        }
    }
    Some((key, element))
}

// ---- rules ----

/// A rule of these tokens. What is not understood is kept as it is.
fn rule(tokens: &[Token<'_>], line: Line) -> Rule {
    let (tokens, comment) = match tokens {
        [
            body @ ..,
            Token::Word("comment"),
            Token::Quoted(comment) | Token::Word(comment),
        ] => (body, Some((*comment).into())),
        body => (body, None),
    };
    let mut words = Words { tokens };
    let mut statements = Vec::new();
    while !words.tokens.is_empty() {
        let rest = words.tokens;
        if words.take(Token::Word("counter")) {
            words.skip_counter();
        } else if let Some(statement) = words.statement() {
            statements.push(statement);
        } else {
            statements.push(Statement::Other(spell(rest)));
            break;
        }
    }
    Rule {
        statements,
        comment,
        line,
    }
}

/// Can this word, which is not in quotes, be a constant? Words that nft has for itself cannot, wherever they stand.
fn is_constant(word: &str) -> bool {
    let begins = word.starts_with(|first: char| first.is_ascii_alphanumeric() || first == ':');
    begins && !matches!(word, ":" | "vmap" | "set" | "and" | "or" | "xor" | "offset")
}

/// How a part of a key may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// A protocol, by name or number.
    Protocol,
    /// A name that nft prints in quotes: an interface, or of a type that is not kube-proxy's.
    Name,
    /// Never in quotes.
    Plain,
}

/// The rest of a rule.
struct Words<'t, 'a> {
    tokens: &'t [Token<'a>],
}

impl<'a> Words<'_, 'a> {
    fn next(&mut self) -> Option<Token<'a>> {
        let (first, rest) = self.tokens.split_first()?;
        self.tokens = rest;
        Some(*first)
    }

    fn peek(&self) -> Option<Token<'a>> {
        self.tokens.first().copied()
    }

    fn take(&mut self, token: Token<'_>) -> bool {
        match self.tokens.split_first() {
            Some((first, rest)) if *first == token => {
                self.tokens = rest;
                true
            }
            _ => false,
        }
    }

    fn take_word(&mut self, word: &str) -> bool {
        self.take(Token::Word(word))
    }

    /// Takes all of `words` or none.
    fn take_words(&mut self, words: &[&str]) -> bool {
        let Some((head, rest)) = self.tokens.split_at_checked(words.len()) else {
            return false;
        };
        let equal = head
            .iter()
            .zip(words)
            .all(|(token, word)| *token == Token::Word(word));
        if equal {
            self.tokens = rest;
        }
        equal
    }

    fn word(&mut self) -> Option<&'a str> {
        match self.next()? {
            Token::Word(word) => Some(word),
            _ => None,
        }
    }

    fn text(&mut self) -> Option<&'a str> {
        self.next()?.text()
    }

    fn number(&mut self) -> Option<u32> {
        parse_number(self.word()?)
    }

    /// What follows `counter`, if anything.
    fn skip_counter(&mut self) {
        for what in ["packets", "bytes"] {
            if self.take_word(what) {
                self.next();
            }
        }
    }

    /// The parts of a key, with dots between: exactly `parts`, written as `part` allows.
    fn key(&mut self, parts: usize, part: impl Fn(usize) -> Part) -> Option<Key> {
        let mut key = Vec::with_capacity(parts);
        loop {
            let kind = part(key.len());
            let text = match self.next()? {
                Token::Word(word) if is_constant(word) => word,
                Token::Quoted(text) if kind == Part::Name => text,
                _ => return None,
            };
            let value = Value::parse(text);
            key.push(match kind {
                Part::Protocol => value.as_protocol(),
                Part::Name | Part::Plain => value,
            });
            if !self.take_word(".") {
                return (key.len() == parts).then(|| key.into());
            }
        }
    }

    fn key_of(&mut self, fields: &[Field]) -> Option<Key> {
        self.key(fields.len(), |part| match fields.get(part) {
            Some(Field::Protocol) => Part::Protocol,
            Some(Field::InputInterface) => Part::Name,
            _ => Part::Plain,
        })
    }

    fn verdict(&mut self) -> Option<Verdict> {
        Some(match self.word()? {
            "accept" => Verdict::Accept,
            "drop" => Verdict::Drop,
            "return" => Verdict::Return,
            "continue" => Verdict::Continue,
            "jump" => Verdict::Jump(self.word()?.into()),
            "goto" => Verdict::Goto(self.word()?.into()),
            _ => return None,
        })
    }

    fn statement(&mut self) -> Option<Statement> {
        match self.peek()? {
            Token::Word("accept" | "drop" | "return" | "continue" | "jump" | "goto") => {
                self.verdict().map(Statement::Verdict)
            }
            Token::Word("reject") => {
                self.next();
                self.reject()
            }
            Token::Word("masquerade") => {
                self.next();
                self.masquerade().map(Statement::Masquerade)
            }
            Token::Word("dnat") => {
                self.next();
                self.dnat().map(Statement::Dnat)
            }
            Token::Word("update") => {
                self.next();
                let set = self.set_name()?;
                if !self.take(Token::Open) {
                    return None;
                }
                let fields = self.fields()?;
                self.take(Token::Close)
                    .then_some(Statement::Update { set, fields })
            }
            _ => {
                let fields = self.fields()?;
                if fields == [Field::Mark] && self.take_word("set") {
                    return self.mark().map(Statement::Mark);
                }
                if self.take_word("vmap") {
                    let map = self.verdict_map(&fields)?;
                    return Some(Statement::Vmap { fields, map });
                }
                self.comparison(fields)
            }
        }
    }

    /// `@name`, or `@ name`.
    fn set_name(&mut self) -> Option<Text> {
        let word = self.word()?;
        let name = word.strip_prefix('@')?;
        if name.is_empty() {
            return Some(self.word()?.into());
        }
        Some(name.into())
    }

    fn reject(&mut self) -> Option<Statement> {
        if !self.take_word("with") {
            return Some(Statement::Reject { with: None });
        }
        let kind = self.word()?;
        self.take_word("type");
        let code = self.word()?;
        Some(Statement::Reject {
            with: reject_with(kind, code),
        })
    }

    fn masquerade(&mut self) -> Option<Masquerade> {
        let mut masquerade = Masquerade::default();
        let mut flag = |words: &mut Self| {
            if words.take_word("random") {
                masquerade.random = true;
            } else if words.take_word("fully-random") {
                masquerade.fully_random = true;
            } else if words.take_word("persistent") {
                masquerade.persistent = true;
            } else {
                return false;
            }
            true
        };
        let mut flagged = flag(self);
        while flagged && self.take(Token::Comma) {
            flagged = flag(self);
            if !flagged {
                return None;
            }
        }
        // Anything else would be part of this statement.
        (self.peek() != Some(Token::Word("to"))).then_some(masquerade)
    }

    fn dnat(&mut self) -> Option<Target> {
        let _ = self.take_word("ip") || self.take_word("ip6");
        self.take_words(&["addr", ".", "port"]);
        if !self.take_word("to") {
            return None;
        }
        let target = if self.take_words(&["numgen", "random", "mod"]) {
            let modulus = self.number()?;
            self.take_words(&["offset", "0"]);
            if !self.take_word("map") {
                return None;
            }
            let mut destinations = Vec::new();
            self.set_of(|words| {
                let number = words.number()?;
                if !words.take_word(":") {
                    return None;
                }
                let address = words.word()?.parse().ok()?;
                let port = if words.take_word(".") {
                    Some(words.word()?.parse().ok()?)
                } else {
                    None
                };
                destinations.push((number, Destination { address, port }));
                Some(())
            })?;
            destinations.sort_unstable();
            Target::Random {
                modulus,
                destinations,
            }
        } else {
            let first = self.word()?;
            if self.take_word(".") {
                Target::One(Destination {
                    address: first.parse().ok()?,
                    port: Some(self.word()?.parse().ok()?),
                })
            } else {
                Target::One(Destination::parse(first)?)
            }
        };
        // Flags that kube-proxy does not use.
        let flagged = matches!(
            self.peek(),
            Some(Token::Word("random" | "fully-random" | "persistent"))
        );
        (!flagged).then_some(target)
    }

    fn mark(&mut self) -> Option<MarkChange> {
        if !self.take_words(&["meta", "mark"]) && !self.take_word("mark") {
            return self.number().map(MarkChange::Set);
        }
        let change = match self.word()? {
            "or" | "|" => MarkChange::Or,
            "xor" | "^" => MarkChange::Xor,
            "and" | "&" => MarkChange::And,
            _ => return None,
        };
        self.number().map(change)
    }

    fn fields(&mut self) -> Option<Vec<Field>> {
        let mut fields = Vec::with_capacity(4);
        loop {
            fields.push(self.field()?);
            if !self.take_word(".") {
                return Some(fields);
            }
        }
    }

    fn field(&mut self) -> Option<Field> {
        let mark = |words: &mut Self| {
            if words.take_word("and") || words.take_word("&") {
                words.number().map(Field::MarkAnd)
            } else {
                Some(Field::Mark)
            }
        };
        match self.word()? {
            family @ ("ip" | "ip6") => {
                let family = if family == "ip" {
                    Family::V4
                } else {
                    Family::V6
                };
                match self.word()? {
                    "saddr" => Some(Field::Source(family)),
                    "daddr" => Some(Field::Destination(family)),
                    _ => None,
                }
            }
            "meta" => match self.word()? {
                "l4proto" => Some(Field::Protocol),
                "mark" => mark(self),
                "iifname" => Some(Field::InputInterface),
                _ => None,
            },
            "mark" => mark(self),
            "iifname" => Some(Field::InputInterface),
            "ct" => match self.word()? {
                "state" => Some(Field::State),
                "status" => Some(Field::Status),
                _ => None,
            },
            "th" => self.take_word("dport").then_some(Field::Port),
            "fib" => {
                let field = match self.word()? {
                    "saddr" => Field::SourceType,
                    "daddr" => Field::DestinationType,
                    _ => return None,
                };
                self.take_word("type").then_some(field)
            }
            "numgen" => {
                if !self.take_words(&["random", "mod"]) {
                    return None;
                }
                let modulus = self.number()?;
                self.take_words(&["offset", "0"]);
                Some(Field::Random(modulus))
            }
            word => {
                let protocol = parse_protocol(word)?;
                self.take_word("dport").then_some(Field::PortOf(protocol))
            }
        }
    }

    /// `{ item, item }`, not empty; each call of `item` reads one. A comma may follow the last.
    fn set_of(&mut self, mut item: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        if !self.take(Token::Open) {
            return None;
        }
        loop {
            item(self)?;
            let comma = self.take(Token::Comma);
            if self.take(Token::Close) {
                return Some(());
            }
            if !comma {
                return None;
            }
        }
    }

    fn verdict_map(&mut self, fields: &[Field]) -> Option<VerdictMap> {
        if let Some(Token::Word(_)) = self.peek() {
            return self.set_name().map(VerdictMap::Named);
        }
        let mut verdicts = BTreeMap::new();
        self.set_of(|words| {
            let key = words.key_of(fields)?;
            if !words.take_word(":") {
                return None;
            }
            let verdict = words.verdict()?;
            // A key has one verdict.
            verdicts.insert(key, verdict).is_none().then_some(())
        })?;
        Some(VerdictMap::Inline(verdicts))
    }

    fn comparison(&mut self, fields: Vec<Field>) -> Option<Statement> {
        let negated = self.take_word("!=");
        if !negated {
            self.take_word("==");
        }
        let operand = match self.peek()? {
            Token::Word(word) if word.starts_with('@') => Operand::Set(self.set_name()?),
            _ if matches!(&fields[..], [Field::Source(_) | Field::Destination(_)]) => {
                Operand::Addresses(self.addresses()?)
            }
            Token::Open => {
                let mut keys = Vec::new();
                self.set_of(|words| {
                    keys.push(words.key_of(&fields)?);
                    Some(())
                })?;
                Operand::keys(keys)
            }
            _ => {
                let mut keys = vec![self.key_of(&fields)?];
                while self.take(Token::Comma) {
                    keys.push(self.key_of(&fields)?);
                }
                Operand::keys(keys)
            }
        };
        Some(Statement::Match {
            fields,
            negated,
            operand,
        })
    }

    fn addresses(&mut self) -> Option<Ranges> {
        let mut ranges = Vec::new();
        if self.peek() == Some(Token::Open) {
            self.set_of(|words| {
                ranges.push(Range::parse(words.word()?)?);
                Some(())
            })?;
        } else {
            ranges.push(Range::parse(self.word()?)?);
        }
        Some(Ranges::new(ranges))
    }
}

/// What `reject` sends, if it is not what it sends by itself: ICMP port unreachable.
pub(super) fn reject_with(kind: &str, code: &str) -> Option<Text> {
    let default = matches!(kind, "icmp" | "icmpv6" | "icmpx") && code == "port-unreachable";
    (!default).then(|| format!("{kind} {code}").into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IP: &str = include_str!("../fixtures/kube-proxy-1.36.2/nftables/nft-ip.txt");
    const IP6: &str = include_str!("../fixtures/kube-proxy-1.36.2/nftables/nft-ip6.txt");

    fn table(text: &str) -> Table {
        let ruleset = parse(text).expect("a ruleset");
        ruleset.ip.or(ruleset.ip6).expect("kube-proxy's table")
    }

    #[test]
    fn a_real_dump_is_understood() {
        for text in [IP, IP6] {
            let table = table(text);
            for (name, chain) in &table.chains {
                for rule in &chain.rules {
                    assert!(
                        !rule
                            .statements
                            .iter()
                            .any(|statement| matches!(statement, Statement::Other(_))),
                        "{name}: {rule}"
                    );
                }
            }
        }
        let table = table(IP);
        assert_eq!(table.sets.len(), 10);
        assert_eq!(table.element_count(), 11 + 14 + 1 + 2 + 1 + 1 + 17 + 5);
        assert_eq!(table.chains.len(), IP.matches("\tchain ").count());
    }

    /// What is printed for a rule is the line of the dump.
    #[test]
    fn rules_are_printed_as_nft_prints_them() {
        for text in [IP, IP6] {
            let lines: Vec<&str> = text.lines().collect();
            for chain in table(text).chains.values() {
                for rule in &chain.rules {
                    let line = lines[rule.line.0 as usize - 1];
                    assert_eq!(rule.to_string(), line.trim());
                }
            }
        }
    }

    #[test]
    fn what_is_printed_is_read_back() {
        for text in [IP, IP6] {
            let table = table(text);
            assert_eq!(self::table(&table.to_string()), table);
        }
    }

    /// One rule in a table of its own.
    fn one_rule(rule: &str) -> Rule {
        let table = table(&format!(
            "table ip kube-proxy {{\nchain c {{\n{rule}\n}}\n}}"
        ));
        table.chains["c"].rules[0].clone()
    }

    #[test]
    fn spellings_of_one_rule() {
        for (script, dump) in [
            (
                "ip daddr @cluster-ips ip saddr != 10.244.0.0/16 mark set mark or 0x4000 comment \"m\"",
                "ip daddr @cluster-ips ip saddr != 10.244.0.0/16 meta mark set meta mark | 0x00004000 comment \"m\"",
            ),
            (
                "mark and 0x4000 != 0 mark set mark xor 0x4000 masquerade fully-random",
                "meta mark & 0x00004000 != 0x00000000 meta mark set meta mark ^ 0x00004000 masquerade fully-random",
            ),
            (
                "meta l4proto tcp dnat ip addr . port to numgen random mod 2 map { 0 : 10.0.0.1 . 80 , 1 : 10.0.0.2 . 80 }",
                "meta l4proto tcp dnat ip to numgen random mod 2 map { 0 : 10.0.0.1 . 80, 1 : 10.0.0.2 . 80 }",
            ),
            (
                "meta l4proto 6 dnat to 10.0.0.1:80",
                "meta l4proto tcp dnat to 10.0.0.1:80",
            ),
            (
                "ip daddr { 10.96.0.0/12 } drop",
                "ip daddr 10.96.0.0/12 drop",
            ),
            (
                "ip saddr != {10.0.0.0/25,10.0.0.128/25,10.1.0.0/16} drop",
                "ip saddr != { 10.0.0.0/24, 10.1.0.0/16 } drop",
            ),
            (
                "ip daddr {10.0.0.0/8,11.0.0.0/8} drop",
                "ip daddr 10.0.0.0/7 drop",
            ),
            (
                "ip saddr { 10.0.0.1, 10.0.0.2, 10.0.0.3, 10.0.5.0/24 } drop",
                "ip saddr { 10.0.0.1-10.0.0.3, 10.0.5.0/24 } drop",
            ),
            ("iifname br0 accept", "iifname \"br0\" accept"),
            ("reject with icmp type port-unreachable", "reject"),
            (
                "counter packets 5 bytes 6 ct state { new, established } accept",
                "ct state established,new accept",
            ),
            (
                "numgen random mod 2 offset 0 vmap { 1 : goto b, 0 : goto a }",
                "numgen random mod 2 vmap { 0 : goto a, 1 : goto b }",
            ),
            (
                "ip saddr 10.0.0.1 jump mark-for-masquerade # handle 7",
                "ip saddr 10.0.0.1 jump mark-for-masquerade",
            ),
            (
                "ip daddr 10.0.0.1 tcp dport 80 return",
                "ip daddr 10.0.0.1 tcp dport 80 return",
            ),
            ("mark set 5 continue", "meta mark set 0x00000005 continue"),
            (
                "meta mark set mark and 0xffffbfff",
                "meta mark set meta mark & 0xffffbfff",
            ),
            ("update @ s { ip saddr }", "update @s { ip saddr }"),
        ] {
            let (script, dump_rule) = (one_rule(script), one_rule(dump));
            assert_eq!(script, dump_rule, "{dump}");
            assert_eq!(script.to_string(), dump);
            assert!(!dump.contains("Other"));
            assert!(
                !script
                    .statements
                    .iter()
                    .any(|s| matches!(s, Statement::Other(_))),
                "{dump}"
            );
        }
    }

    #[test]
    fn statements_kube_proxy_does_not_use() {
        for (rule, understood) in [
            ("ip daddr 10.0.0.1 log prefix \"a b\" flags all accept", 1),
            ("meta nfproto ipv4 accept", 0),
            ("ip saddr . tcp sport { 10.0.0.1 . 5 } drop", 0),
            ("masquerade to :1024-65535", 0),
            ("meta l4proto tcp dnat to 10.0.0.1:80 persistent", 1),
            ("ip daddr >= 10.0.0.1 drop", 0),
            ("numgen inc mod 2 vmap { 0 : drop, 1 : accept }", 0),
        ] {
            let parsed = one_rule(rule);
            assert_eq!(parsed.statements.len(), understood + 1, "{rule}");
            let Some(Statement::Other(_)) = parsed.statements.last() else {
                panic!("{rule} is understood: {parsed:?}");
            };
            assert_eq!(parsed.to_string(), rule);
        }
    }

    /// Where nft takes a text in quotes it is a name; anywhere else it is not understood, and no more are words
    /// that have a meaning of their own.
    #[test]
    fn texts_in_quotes_and_words_that_are_none() {
        for (rule, understood) in [
            ("iifname \"a b\" drop", true),
            ("iifname vmap { \"br0\" : accept, \"vmap\" : drop }", true),
            ("iifname . ip saddr \"vmap\" . 10.0.0.1 drop", true),
            (
                "ip saddr . ip daddr . meta l4proto \"Reject it\" drop",
                false,
            ),
            ("ct state \"vmap\" drop", false),
            ("jump \"x y\"", false),
            // Words that are none.
            ("ct state n, @ policy accept", false),
            ("masquerade fully-random,,", false),
            ("ct state { } accept", false),
            ("ip saddr { } accept", false),
            ("masquerade random,persistent", true),
            ("ct state z, vmap accept", false),
            ("iifname vmap drop", false),
            // As many constants as fields, which nft asks for.
            ("ip saddr . th dport 10.0.0.1 drop", false),
            ("ip saddr . th dport { 10.0.0.1 . 80 . 81 } drop", false),
        ] {
            let parsed = one_rule(rule);
            assert_eq!(
                !matches!(parsed.statements.last(), Some(Statement::Other(_))),
                understood,
                "{rule}: {parsed:?}"
            );
            assert_eq!(parsed.to_string(), rule);
            assert_eq!(one_rule(&parsed.to_string()), parsed);
        }
        let names = "table ip kube-proxy {\n\tset s {\n\t\ttype ifname\n\t\telements = { \"a b\",\n\t\t\t     \"#\",\n\t\t\t     eth0 }\n\t}\n\n}\n";
        let there = table(names);
        assert_eq!(table(&there.to_string()), there);
        assert_eq!(there.sets["s"].elements.len(), 3);
        for refused in [
            "table ip kube-proxy {\n\tchain \"a b\" {\n\t}\n}",
            "table ip kube-proxy {\n\tset \"s\" { type ipv4_addr; }\n}",
            "table ip kube-proxy {\n\tset s { type ipv4_addr; elements = { \"10.0.0.1\" } }\n}",
            "table ip kube-proxy {\n\tset s { type ipv4_addr . inet_service; elements = { 10.0.0.1 } }\n}",
            "table ip kube-proxy {\n\tset s { type ipv4_addr; comment , }\n}",
            "table ip kube-proxy {\n\tcounter \"c\" {\n\t}\n}",
        ] {
            parse(refused).expect_err(refused);
        }
    }

    #[test]
    fn chains_of_newer_and_older_nft() {
        let priority = |text: &str| {
            let base = table(&format!(
                "table ip kube-proxy {{ chain c {{ type filter hook output priority {text}; policy drop; }} }}"
            ))
            .chains["c"]
                .base
                .expect("a base chain");
            assert!(!base.accepts);
            base.priority
        };
        assert_eq!(priority("dstnat - 10"), -110);
        assert_eq!(priority("-110"), -110);
        assert_eq!(priority("srcnat + 5"), 105);
        assert_eq!(priority("filter"), 0);
    }

    #[test]
    fn elements_with_state() {
        let set = |lines: &str| {
            table(&format!(
                "table ip kube-proxy {{\nset s {{\n{lines}\n}}\n}}"
            ))
            .sets["s"]
                .clone()
        };
        let there = set(
            "type ipv4_addr\nsize 65535\t# count 2\nflags dynamic,timeout\ntimeout 3h\n\
             elements = { 10.0.0.1 timeout 3h expires 2h59m58s900ms counter packets 1 bytes 2,\n\
             10.0.0.2 expires 5s comment \"x\" }",
        );
        assert_eq!(there.timeout, Some(10800));
        assert_eq!(there.elements.len(), 2);
        assert_eq!(
            Set {
                elements: BTreeMap::new(),
                ..there.clone()
            },
            set("type ipv4_addr ; size 65535 ; flags dynamic,timeout ; timeout 10800s ;")
        );
        let script = "add table ip kube-proxy\n\
             add set ip kube-proxy s { type ipv4_addr ; flags dynamic,timeout ; timeout 10800s ; }\n\
             add chain ip kube-proxy c\nadd rule ip kube-proxy c update @s { ip saddr }";
        assert_eq!(there.size, table(script).sets["s"].size);
    }

    #[test]
    fn foreign_tables_are_kept_apart() {
        let ruleset = parse(&format!(
            "# Warning: table ip nat is managed by iptables-nft, do not touch!\n\
             table ip nat {{\n\tchain X {{\n\t\txt match \"comment\" counter packets 0 bytes 0 jump Y\n\t}}\n}}\n\
             table inet kube-proxy {{\n}}\n{IP}{IP6}table netdev filter {{ # handle 9\n}}\n"
        ))
        .expect("a ruleset");
        let names: Vec<String> = ruleset
            .foreign
            .iter()
            .map(|(family, name)| format!("{family} {name}"))
            .collect();
        assert_eq!(names, ["ip nat", "inet kube-proxy", "netdev filter"]);
        assert!(ruleset.hooked.is_empty());
        assert_eq!(ruleset.ip, parse(IP).expect("a ruleset").ip);
        assert_eq!(ruleset.ip6, parse(IP6).expect("a ruleset").ip6);
    }

    #[test]
    fn foreign_tables_that_packets_pass_are_told() {
        let ruleset = parse(
            "table inet a {\n\tchain c {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n}\n\
             table inet b {\n\tflags dormant\n\tchain c {\n\t\ttype nat hook output priority -100;\n\t}\n}\n\
             table inet c {\n\tset s {\n\t\ttype ipv4_addr\n\t}\n\tflowtable f {\n\t\thook ingress priority 0\n\t}\n\
             \tchain hook {\n\t\tcomment \"type filter hook\"\n\t\tdrop\n\t}\n}\n\
             table ip d { chain c { type nat hook prerouting priority 0; } }\n",
        )
        .expect("a ruleset");
        let hooked = [("inet".into(), "a".into()), ("ip".into(), "d".into())];
        assert_eq!(*ruleset.hooked, hooked);
        assert_eq!(ruleset.foreign.len(), 4);
    }

    #[test]
    fn scripts() {
        let mut ruleset = parse(
            "add table ip kube-proxy { comment \"rules\" ; }\n\
             add set ip kube-proxy s { type ipv4_addr ; comment \"c\" ; }\n\
             add map ip kube-proxy m { type inet_proto . inet_service : verdict ; }\n\
             add chain ip kube-proxy a { type filter hook input priority 0 ; }\n\
             add chain ip kube-proxy b\n\
             add rule ip kube-proxy a ct state new jump b\n\
             insert rule ip kube-proxy a drop\n\
             add element ip kube-proxy s {\n\t10.0.0.1,\n\t10.0.0.2,\n}\n\
             add element ip kube-proxy m { tcp . 80 comment \"x/y\" : goto b }\n",
        )
        .expect("a script");
        let dump = "table ip kube-proxy {\n\tcomment \"rules\"\n\
             \tset s {\n\t\ttype ipv4_addr\n\t\tcomment \"c\"\n\t\telements = { 10.0.0.1, 10.0.0.2 }\n\t}\n\
             \tmap m {\n\t\ttype inet_proto . inet_service : verdict\n\t\telements = { tcp . 80 comment \"x/y\" : goto b }\n\t}\n\
             \tchain a {\n\t\ttype filter hook input priority filter; policy accept;\n\t\tdrop\n\t\tct state new jump b\n\t}\n\
             \tchain b {\n\t}\n}\n";
        assert_eq!(ruleset, parse(dump).expect("a dump"));
        apply(
            &mut ruleset,
            "flush chain ip kube-proxy a\ndelete element ip kube-proxy s { 10.0.0.2 }\n\
             delete element ip kube-proxy m { tcp . 80 }\ndelete chain ip kube-proxy b\n",
        )
        .expect("a script");
        let table = ruleset.ip.as_ref().expect("the table");
        assert_eq!(
            (
                table.rule_count(),
                table.element_count(),
                table.chains.len()
            ),
            (0, 1, 1)
        );
        apply(&mut ruleset, "delete table ip kube-proxy").expect("a script");
        assert_eq!(ruleset, Ruleset::default());
    }

    #[test]
    fn errors_say_where() {
        let error = |text: &str| parse(text).expect_err("an error").to_string();
        assert_eq!(
            error("hello"),
            "line 1, column 1: neither a table nor a command of an nft script"
        );
        assert_eq!(
            error("table ip kube-proxy {\n\tchain c {\n"),
            "line 3, column 1: the text ends before a '}'"
        );
        assert_eq!(
            error("table ip kube-proxy {\n\tfoo\n}"),
            "line 2, column 2: nothing that a table can hold"
        );
        assert_eq!(
            error("table ip kube-proxy {\n\tchain c {\n\t\tdrop comment \"x\n\t}\n}"),
            "line 3, column 16: a text whose closing quote is missing"
        );
        assert_eq!(
            error("table ip nat {\nchain x {\n}"),
            "line 3, column 2: the text ends before a '}'"
        );
        assert_eq!(
            error("add rule ip kube-proxy a drop"),
            "line 1, column 13: there is no table ip kube-proxy"
        );
        assert_eq!(
            error("flush table ip nat"),
            "line 1, column 16: a command for table ip nat, not kube-proxy"
        );
    }

    #[test]
    fn a_cut_dump_is_an_error() {
        let end = IP.trim_end().len();
        for at in 1..end {
            assert!(parse(&IP[..at]).is_err(), "cut at byte {at}");
        }
    }

    proptest! {
        #[test]
        fn garbage_is_no_panic(text in "\\PC*") {
            let _ = parse(&text);
        }

        #[test]
        fn words_in_any_order_are_no_panic(words in prop::collection::vec(prop::sample::select(WORDS), 0..60)) {
            let text = words.join(" ");
            let _ = parse(&text);
            let _ = parse(&format!("table ip kube-proxy {{ chain c {{ {text} }} }}"));
            let _ = parse(&format!("table ip kube-proxy {{ set s {{ {text} }} }}"));
            let _ = parse(&format!("add table ip kube-proxy\nadd {text}"));
        }

        /// A dump changed somewhere is an error, or is printed and read back as what it was.
        #[test]
        fn mutations(at in 0..IP.len(), len in 0..200_usize, put in "[{}\",;:.@#0-9a-z \\n]{0,8}") {
            let text = format!("{}{put}{}", &IP[..at], &IP[(at + len).min(IP.len())..]);
            if let Ok(Ruleset { ip: Some(table), .. }) = parse(&text) {
                let printed = table.to_string();
                let again = parse(&printed);
                prop_assert_eq!(again.map(|ruleset| ruleset.ip), Ok(Some(table)), "{}", printed);
            }
        }
    }

    const WORDS: &[&str] = &[
        "table",
        "ip",
        "ip6",
        "kube-proxy",
        "{",
        "}",
        "\n",
        ";",
        ",",
        ".",
        ":",
        "chain",
        "set",
        "map",
        "add",
        "flush",
        "delete",
        "element",
        "elements",
        "=",
        "rule",
        "type",
        "filter",
        "hook",
        "input",
        "priority",
        "policy",
        "accept",
        "drop",
        "goto",
        "jump",
        "x",
        "ip",
        "saddr",
        "daddr",
        "th",
        "dport",
        "tcp",
        "meta",
        "l4proto",
        "mark",
        "vmap",
        "@x",
        "numgen",
        "random",
        "mod",
        "2",
        "0",
        "dnat",
        "to",
        "10.0.0.1",
        "10.0.0.0/8",
        "[fd00::1]:80",
        "ct",
        "state",
        "new",
        "comment",
        "\"c\"",
        "ipv4_addr",
        "inet_proto",
        "verdict",
        "flags",
        "dynamic",
        "timeout",
        "3h",
        "fib",
        "local",
        "!=",
        "and",
        "0x4000",
        "reject",
        "with",
        "masquerade",
        "update",
        "counter",
        "typeof",
    ];
}
