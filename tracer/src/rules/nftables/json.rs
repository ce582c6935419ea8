//! `nft -j list ruleset` to the same tables as its text.
//!
//! nft 1.0.6 leaves out comments of tables and chains and the flag `dynamic`; see
//! [`Table::as_json_shows`].

use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer as _, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Value as Json};

use crate::cluster::Family;

use super::table::{
    Base, Chain, ChainKind, DataType, Destination, Element, Field, Key, Mapped, MarkChange,
    Masquerade, Operand, Range, Ranges, Rule, Ruleset, Set, Statement, Table, Target, Text, Value,
    Verdict, VerdictMap, hook, parse_protocol,
};
use super::text::{named_type, ours, reject_with};

/// JSON that is no ruleset.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// No JSON, or not to its end.
    #[error(transparent)]
    Syntax(#[from] serde_json::Error),
    /// JSON that nft does not write.
    #[error("{path}: {what}")]
    Content {
        /// Where, such as `nftables[12].rule.chain`.
        path: String,
        /// What is wrong.
        what: String,
    },
}

/// Reads `nft -j list table` or `nft -j list ruleset`.
pub fn parse(text: &str) -> Result<Ruleset, JsonError> {
    let mut builder = Builder::default();
    let mut deserializer = serde_json::Deserializer::from_str(text);
    // One object at a time: a whole ruleset of JSON values takes many times its text.
    let read = deserializer
        .deserialize_map(&mut builder)
        .and_then(|()| deserializer.end());
    match (read, builder.error) {
        (_, Some(error)) => Err(error),
        (Err(error), None) => Err(error.into()),
        (Ok(()), None) => Ok(builder.ruleset),
    }
}

#[derive(Default)]
struct Builder {
    ruleset: Ruleset,
    /// Tables of others whose chains the kernel does not ask.
    dormant: Vec<(Text, Text)>,
    /// Why reading was given up.
    error: Option<JsonError>,
}

impl<'de> Visitor<'de> for &mut Builder {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with the list 'nftables'")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = false;
        while let Some(key) = map.next_key::<String>()? {
            if key == "nftables" && !seen {
                seen = true;
                map.next_value_seed(Objects(self))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        if seen {
            Ok(())
        } else {
            Err(A::Error::missing_field("nftables"))
        }
    }
}

/// The list of objects.
struct Objects<'b>(&'b mut Builder);

impl<'de> DeserializeSeed<'de> for Objects<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Objects<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut index = 0_usize;
        while let Some(object) = list.next_element::<Map<String, Json>>()? {
            for (kind, body) in &object {
                if let Err(Fault { at, what }) = add(self.0, kind, body) {
                    let path = format!("nftables[{index}].{kind}{at}");
                    let error = A::Error::custom(format!("{path}: {what}"));
                    self.0.error = Some(JsonError::Content { path, what });
                    return Err(error);
                }
            }
            index += 1;
        }
        Ok(())
    }
}

/// What is wrong with an object, and where in it.
struct Fault {
    /// Such as `.chain`; empty for the object itself.
    at: String,
    what: String,
}

fn fault<T>(at: &str, what: impl Into<String>) -> Result<T, Fault> {
    Err(Fault {
        at: at.to_owned(),
        what: what.into(),
    })
}

fn text_of<'j>(body: &'j Json, key: &str) -> Result<&'j str, Fault> {
    match body.get(key) {
        Some(Json::String(text)) => Ok(text),
        Some(_) => fault(&format!(".{key}"), "no text"),
        None => fault(&format!(".{key}"), "missing"),
    }
}

fn comment_of(body: &Json) -> Option<Text> {
    Some(body.get("comment")?.as_str()?.into())
}

/// Adds one object of the list.
fn add(builder: &mut Builder, kind: &str, body: &Json) -> Result<(), Fault> {
    if kind == "metainfo" {
        return Ok(());
    }
    let family = text_of(body, "family")?;
    let name = text_of(body, if kind == "table" { "name" } else { "table" })?;
    let Some(ours) = ours(family, name) else {
        add_foreign(builder, kind, (family.into(), name.into()), body);
        return Ok(());
    };
    let slot = builder.ruleset.slot(ours);
    if kind == "table" {
        let mut table = Table::new(ours);
        table.comment = comment_of(body);
        table.dormant = is_dormant(body);
        return match slot.replace(table) {
            None => Ok(()),
            Some(_) => fault("", "a table a second time"),
        };
    }
    let Some(table) = slot else {
        return fault(".table", "not listed before this");
    };
    match kind {
        "chain" => add_chain(table, body),
        "set" | "map" => add_set(table, body),
        "rule" => add_rule(table, body),
        "element" => {
            let name = text_of(body, "name")?;
            match table.sets.get_mut(name) {
                Some(set) => add_elements(set, body),
                None => fault(".name", format!("there is no set {name}")),
            }
        }
        other => {
            let name = body.get("name").and_then(Json::as_str).unwrap_or_default();
            table.others.insert(
                format!("{other} {name}").into(),
                super::table::Line::default(),
            );
            Ok(())
        }
    }
}

/// Adds an object of somebody else's table.
fn add_foreign(builder: &mut Builder, kind: &str, table: (Text, Text), body: &Json) {
    if kind == "table" {
        if is_dormant(body) {
            builder.dormant.push(table.clone());
        }
        builder.ruleset.foreign.push(table);
    } else if kind == "chain" && body.get("hook").is_some() {
        let hooked = &mut builder.ruleset.hooked;
        if !builder.dormant.contains(&table) && !hooked.contains(&table) {
            hooked.push(table);
        }
    }
}

fn is_dormant(table: &Json) -> bool {
    words(table.get("flags")).any(|flag| flag == "dormant")
}

/// A text, or the texts of a list.
fn words(json: Option<&Json>) -> impl Iterator<Item = &str> {
    let items = match json {
        Some(Json::Array(items)) => &items[..],
        Some(item) => std::slice::from_ref(item),
        None => &[],
    };
    items.iter().filter_map(Json::as_str)
}

fn add_chain(table: &mut Table, body: &Json) -> Result<(), Fault> {
    let name = text_of(body, "name")?;
    let base = if body.get("hook").is_some() {
        let kind = text_of(body, "type")?;
        let hook = text_of(body, "hook")?;
        let kind = ChainKind::ALL
            .into_iter()
            .find(|known| known.name() == kind);
        let hook = self::hook(hook);
        let priority = body.get("prio").and_then(Json::as_i64);
        let priority = priority.and_then(|priority| i32::try_from(priority).ok());
        let accepts = match body.get("policy").and_then(Json::as_str) {
            None | Some("accept") => Some(true),
            Some("drop") => Some(false),
            Some(_) => None,
        };
        match (kind, hook, priority, accepts) {
            (Some(kind), Some(hook), Some(priority), Some(accepts)) => Some(Base {
                kind,
                hook,
                priority,
                accepts,
            }),
            _ => return fault("", "no type, hook, prio and policy"),
        }
    } else {
        None
    };
    let chain = Chain {
        base,
        comment: comment_of(body),
        ..Chain::default()
    };
    match table.chains.insert(name.into(), chain) {
        None => Ok(()),
        Some(_) => fault(".name", format!("chain {name} a second time")),
    }
}

fn add_set(table: &mut Table, body: &Json) -> Result<(), Fault> {
    let name = text_of(body, "name")?;
    let key: Vec<DataType> = match body.get("type") {
        Some(json @ (Json::String(_) | Json::Array(_))) => {
            words(Some(json)).map(named_type).collect()
        }
        Some(other) => vec![DataType::Other(other.to_string().into())],
        None => Vec::new(),
    };
    if key.is_empty() {
        return fault(".type", "missing");
    }
    let mut set = Set {
        key,
        value: body.get("map").map(|value| match value {
            Json::String(name) => named_type(name),
            other => DataType::Other(other.to_string().into()),
        }),
        timeout: body.get("timeout").and_then(Json::as_u64),
        size: body.get("size").and_then(Json::as_u64),
        comment: comment_of(body),
        ..Set::default()
    };
    for flag in words(body.get("flags")) {
        match flag {
            "dynamic" => set.flags.dynamic = true,
            "timeout" => set.flags.timeout = true,
            "interval" => set.flags.interval = true,
            "constant" => set.flags.constant = true,
            other => return fault(".flags", format!("no flag of a set: {other}")),
        }
    }
    for unused in ["gc-interval", "policy", "auto-merge"] {
        if let Some(value) = body.get(unused) {
            set.others.push(format!("{unused} {}", bare(value)).into());
        }
    }
    add_elements(&mut set, body)?;
    match table.sets.insert(name.into(), set) {
        None => Ok(()),
        Some(_) => fault(".name", format!("set {name} a second time")),
    }
}

fn add_elements(set: &mut Set, body: &Json) -> Result<(), Fault> {
    let elements = match body.get("elem") {
        None => return Ok(()),
        Some(Json::Array(elements)) => elements,
        Some(_) => return fault(".elem", "no list"),
    };
    for (index, json) in elements.iter().enumerate() {
        let (item, value) = match (set.value.is_some(), json) {
            (false, item) => (item, None),
            (true, Json::Array(pair)) => match &pair[..] {
                [item, value] => (
                    item,
                    Some(match verdict(value) {
                        Some(verdict) => Mapped::Verdict(verdict),
                        None => Mapped::Other(bare(value).into()),
                    }),
                ),
                _ => return fault(&format!(".elem[{index}]"), "no pair"),
            },
            (true, _) => return fault(&format!(".elem[{index}]"), "no pair"),
        };
        let (key, comment) = match item.get("elem") {
            Some(element) => (element.get("val"), comment_of(element)),
            None => (Some(item), None),
        };
        let is_protocol = |part: usize| set.key.get(part) == Some(&DataType::Protocol);
        let Some(key) = key.and_then(|key| self::key(key, is_protocol)) else {
            return fault(&format!(".elem[{index}]"), "no element of this set");
        };
        let element = Element {
            value,
            comment,
            ..Element::default()
        };
        if set.elements.insert(key, element).is_some() {
            return fault(&format!(".elem[{index}]"), "an element a second time");
        }
    }
    Ok(())
}

fn add_rule(table: &mut Table, body: &Json) -> Result<(), Fault> {
    let name = text_of(body, "chain")?;
    let Some(chain) = table.chains.get_mut(name) else {
        return fault(".chain", format!("there is no chain {name}"));
    };
    let Some(expressions) = body.get("expr").and_then(Json::as_array) else {
        return fault(".expr", "no list");
    };
    let mut statements = Vec::with_capacity(expressions.len());
    for (index, expression) in expressions.iter().enumerate() {
        if expression.get("counter").is_some() {
            continue;
        }
        if let Some(statement) = statement(expression) {
            statements.push(statement);
        } else {
            let rest: Vec<String> = expressions[index..].iter().map(Json::to_string).collect();
            statements.push(Statement::Other(rest.join(" ").into()));
            break;
        }
    }
    chain.rules.push(Rule {
        statements,
        comment: comment_of(body),
        ..Rule::default()
    });
    Ok(())
}

// ---- expressions ----

/// A text without quotes, or the JSON.
fn bare(json: &Json) -> String {
    match json {
        Json::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn number(json: &Json) -> Option<u32> {
    json.as_u64().and_then(|number| u32::try_from(number).ok())
}

/// The name and body of an object with one member.
fn only(json: &Json) -> Option<(&str, &Json)> {
    let object = json.as_object()?;
    let (name, body) = object.iter().next()?;
    (object.len() == 1).then_some((name, body))
}

fn value(json: &Json) -> Option<Value> {
    match json {
        Json::String(text) => Some(Value::parse(text)),
        Json::Number(_) => number(json).map(Value::Number),
        _ => match only(json)? {
            ("prefix" | "range", _) => Some(Value::Word(range_text(json)?.into())),
            _ => None,
        },
    }
}

/// A network or range as nft's text has it.
fn range_text(json: &Json) -> Option<String> {
    match only(json)? {
        ("prefix", prefix) => Some(format!(
            "{}/{}",
            prefix.get("addr")?.as_str()?,
            prefix.get("len")?.as_u64()?
        )),
        ("range", Json::Array(ends)) => match &ends[..] {
            [first, last] => Some(format!("{}-{}", bare(first), bare(last))),
            _ => None,
        },
        _ => None,
    }
}

fn key(json: &Json, is_protocol: impl Fn(usize) -> bool) -> Option<Key> {
    let parts = match json.get("concat") {
        Some(Json::Array(parts)) => &parts[..],
        Some(_) => return None,
        None => std::slice::from_ref(json),
    };
    parts
        .iter()
        .enumerate()
        .map(|(part, json)| {
            let value = value(json)?;
            Some(if is_protocol(part) {
                value.as_protocol()
            } else {
                value
            })
        })
        .collect()
}

fn key_of(json: &Json, fields: &[Field]) -> Option<Key> {
    key(json, |part| fields.get(part) == Some(&Field::Protocol))
}

fn range(json: &Json) -> Option<Range> {
    match json {
        Json::String(text) => Range::parse(text),
        other => Range::parse(&range_text(other)?),
    }
}

fn verdict(json: &Json) -> Option<Verdict> {
    let (name, body) = only(json)?;
    let target = || Some(body.get("target")?.as_str()?.into());
    Some(match name {
        "accept" => Verdict::Accept,
        "drop" => Verdict::Drop,
        "return" => Verdict::Return,
        "continue" => Verdict::Continue,
        "jump" => Verdict::Jump(target()?),
        "goto" => Verdict::Goto(target()?),
        _ => return None,
    })
}

fn field(json: &Json) -> Option<Field> {
    let (name, body) = only(json)?;
    let text = |key: &str| body.get(key).and_then(Json::as_str);
    match name {
        "payload" => match (text("protocol")?, text("field")?) {
            ("ip", "saddr") => Some(Field::Source(Family::V4)),
            ("ip6", "saddr") => Some(Field::Source(Family::V6)),
            ("ip", "daddr") => Some(Field::Destination(Family::V4)),
            ("ip6", "daddr") => Some(Field::Destination(Family::V6)),
            ("th", "dport") => Some(Field::Port),
            (protocol, "dport") => parse_protocol(protocol).map(Field::PortOf),
            _ => None,
        },
        "meta" => match text("key")? {
            "l4proto" => Some(Field::Protocol),
            "mark" => Some(Field::Mark),
            "iifname" => Some(Field::InputInterface),
            _ => None,
        },
        "ct" if body.get("dir").is_none() => match text("key")? {
            "state" => Some(Field::State),
            "status" => Some(Field::Status),
            _ => None,
        },
        "fib" if text("result") == Some("type") => {
            let mut flags = words(body.get("flags"));
            let field = match flags.next()? {
                "saddr" => Field::SourceType,
                "daddr" => Field::DestinationType,
                _ => return None,
            };
            flags.next().is_none().then_some(field)
        }
        "&" => match &body.as_array()?[..] {
            [mark, mask] if field(mark)? == Field::Mark => number(mask).map(Field::MarkAnd),
            _ => None,
        },
        "numgen" if text("mode") == Some("random") => {
            let offset = body.get("offset").and_then(Json::as_u64).unwrap_or(0);
            let modulus = number(body.get("mod")?)?;
            (offset == 0).then_some(Field::Random(modulus))
        }
        _ => None,
    }
}

fn fields(json: &Json) -> Option<Vec<Field>> {
    match json.get("concat") {
        Some(parts) => parts.as_array()?.iter().map(field).collect(),
        None => Some(vec![field(json)?]),
    }
}

/// The items of an anonymous set, or the one item.
fn items(json: &Json) -> &[Json] {
    match json.get("set").unwrap_or(json) {
        Json::Array(items) => items,
        item => std::slice::from_ref(item),
    }
}

fn statement(json: &Json) -> Option<Statement> {
    if let Some(verdict) = verdict(json) {
        return Some(Statement::Verdict(verdict));
    }
    let (name, body) = only(json)?;
    match name {
        "match" => comparison(body),
        "vmap" => {
            let fields = fields(body.get("key")?)?;
            let map = match body.get("data")? {
                Json::String(name) => VerdictMap::Named(name.strip_prefix('@')?.into()),
                data => VerdictMap::Inline(
                    items(data)
                        .iter()
                        .map(|pair| match &pair.as_array()?[..] {
                            [key, value] => Some((key_of(key, &fields)?, verdict(value)?)),
                            _ => None,
                        })
                        .collect::<Option<_>>()?,
                ),
            };
            Some(Statement::Vmap { fields, map })
        }
        "reject" => Some(Statement::Reject {
            with: match (body.get("type"), body.get("expr")) {
                (Some(kind), Some(code)) => reject_with(kind.as_str()?, code.as_str()?),
                (Some(kind), None) => Some(kind.as_str()?.into()),
                (None, _) => None,
            },
        }),
        "mangle" => {
            if field(body.get("key")?)? != Field::Mark {
                return None;
            }
            mark(body.get("value")?).map(Statement::Mark)
        }
        "masquerade" => masquerade(body).map(Statement::Masquerade),
        "dnat" => dnat(body).map(Statement::Dnat),
        "set" => {
            let (Some("update"), None) = (body.get("op")?.as_str(), body.get("stmt")) else {
                return None;
            };
            Some(Statement::Update {
                set: body.get("set")?.as_str()?.strip_prefix('@')?.into(),
                fields: fields(body.get("elem")?)?,
            })
        }
        _ => None,
    }
}

fn comparison(body: &Json) -> Option<Statement> {
    let negated = match body.get("op")?.as_str()? {
        "==" | "in" => false,
        "!=" => true,
        _ => return None,
    };
    let fields = fields(body.get("left")?)?;
    let right = body.get("right")?;
    let operand = match right.as_str().and_then(|text| text.strip_prefix('@')) {
        Some(name) => Operand::Set(name.into()),
        None if matches!(&fields[..], [Field::Source(_) | Field::Destination(_)]) => {
            let ranges = items(right).iter().map(range).collect::<Option<_>>()?;
            Operand::Addresses(Ranges::new(ranges))
        }
        None => {
            let keys = items(right).iter().map(|item| key_of(item, &fields));
            Operand::keys(keys.collect::<Option<_>>()?)
        }
    };
    Some(Statement::Match {
        fields,
        negated,
        operand,
    })
}

fn mark(json: &Json) -> Option<MarkChange> {
    if let Some(value) = number(json) {
        return Some(MarkChange::Set(value));
    }
    let (operator, operands) = only(json)?;
    let [left, right] = &operands.as_array()?[..] else {
        return None;
    };
    if field(left)? != Field::Mark {
        return None;
    }
    let bits = number(right)?;
    Some(match operator {
        "|" => MarkChange::Or(bits),
        "^" => MarkChange::Xor(bits),
        "&" => MarkChange::And(bits),
        _ => return None,
    })
}

fn masquerade(body: &Json) -> Option<Masquerade> {
    if body.get("port").is_some() {
        return None;
    }
    let mut masquerade = Masquerade::default();
    for flag in words(body.get("flags")) {
        match flag {
            "random" => masquerade.random = true,
            "fully-random" => masquerade.fully_random = true,
            "persistent" => masquerade.persistent = true,
            _ => return None,
        }
    }
    Some(masquerade)
}

fn dnat(body: &Json) -> Option<Target> {
    if body.get("flags").is_some() {
        return None;
    }
    let address = body.get("addr")?;
    let port = match body.get("port") {
        Some(port) => Some(u16::try_from(port.as_u64()?).ok()?),
        None => None,
    };
    let Some(map) = address.get("map") else {
        let found = destination(address)?;
        return Some(Target::One(Destination {
            port: port.or(found.port),
            ..found
        }));
    };
    let Field::Random(modulus) = field(map.get("key")?)? else {
        return None;
    };
    let mut destinations = items(map.get("data")?)
        .iter()
        .map(|pair| match &pair.as_array()?[..] {
            [index, found] => Some((number(index)?, destination(found)?)),
            _ => None,
        })
        .collect::<Option<Vec<_>>>()?;
    destinations.sort_unstable();
    Some(Target::Random {
        modulus,
        destinations,
    })
}

/// An address, or one with its port.
fn destination(json: &Json) -> Option<Destination> {
    let (address, port) = match json.get("concat") {
        Some(parts) => match &parts.as_array()?[..] {
            [address, port] => (address, Some(u16::try_from(port.as_u64()?).ok()?)),
            _ => return None,
        },
        None => (json, None),
    };
    Some(Destination {
        address: address.as_str()?.parse().ok()?,
        port,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::text;
    use super::*;

    const JSON: &str = include_str!("../fixtures/kube-proxy-1.36.2/nftables/nft-ip.json");
    const TEXT: &str = include_str!("../fixtures/kube-proxy-1.36.2/nftables/nft-ip.txt");

    #[test]
    fn both_forms_of_a_dump_are_the_same_table() {
        let json = parse(JSON).expect("JSON").ip.expect("kube-proxy's table");
        let text = text::parse(TEXT)
            .expect("text")
            .ip
            .expect("kube-proxy's table");
        assert_eq!(json, text.as_json_shows());
    }

    #[test]
    fn statements_kube_proxy_does_not_use() {
        let json = r#"{"nftables": [
            {"metainfo": {"version": "1.0.6"}},
            {"table": {"family": "inet", "name": "firewalld"}},
            {"chain": {"family": "inet", "table": "firewalld", "name": "x"}},
            {"table": {"family": "ip", "name": "kube-proxy"}},
            {"chain": {"family": "ip", "table": "kube-proxy", "name": "c"}},
            {"rule": {"family": "ip", "table": "kube-proxy", "chain": "c", "expr": [
                {"counter": {"packets": 1, "bytes": 2}},
                {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "new"]}},
                {"match": {"op": "!=", "left": {"payload": {"protocol": "ip", "field": "saddr"}},
                           "right": {"set": [{"range": ["10.0.0.1", "10.0.0.3"]}, {"prefix": {"addr": "10.0.5.0", "len": 24}}]}}},
                {"log": {"prefix": "x"}},
                {"accept": null}]}},
            {"flowtable": {"family": "ip", "table": "kube-proxy", "name": "f"}}]}"#;
        let ruleset = parse(json).expect("JSON");
        assert_eq!(*ruleset.foreign, [("inet".into(), "firewalld".into())]);
        let table = ruleset.ip.expect("kube-proxy's table");
        assert_eq!(
            table.chains["c"].rules[0].to_string(),
            "ct state established,new ip saddr != { 10.0.0.1-10.0.0.3, 10.0.5.0/24 } \
             {\"log\":{\"prefix\":\"x\"}} {\"accept\":null}"
        );
        assert!(table.others.contains_key("flowtable f"));
    }

    #[test]
    fn foreign_tables_that_packets_pass_are_told() {
        let json = r#"{"nftables": [
            {"table": {"family": "inet", "name": "a"}},
            {"chain": {"family": "inet", "table": "a", "name": "x"}},
            {"chain": {"family": "inet", "table": "a", "name": "y", "type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}},
            {"chain": {"family": "inet", "table": "a", "name": "z", "type": "filter", "hook": "input", "prio": 0, "policy": "drop"}},
            {"table": {"family": "inet", "name": "b", "flags": "dormant"}},
            {"chain": {"family": "inet", "table": "b", "name": "y", "type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}},
            {"table": {"family": "ip", "name": "c"}},
            {"flowtable": {"family": "ip", "table": "c", "name": "f", "hook": "ingress", "prio": 0}}]}"#;
        let ruleset = parse(json).expect("JSON");
        assert_eq!(*ruleset.hooked, [("inet".into(), "a".into())]);
        assert_eq!(ruleset.foreign.len(), 3);
    }

    #[test]
    fn errors_say_where() {
        let error = |json: &str| parse(json).expect_err("an error").to_string();
        assert_eq!(
            error(
                r#"{"nftables": [{"metainfo": {}}, {"chain": {"family": "ip", "table": "kube-proxy"}}]}"#
            ),
            "nftables[1].chain.table: not listed before this"
        );
        assert_eq!(
            error(
                r#"{"nftables": [{"table": {"family": "ip", "name": "kube-proxy"}},
                {"set": {"family": "ip", "table": "kube-proxy", "name": "s", "type": "ipv4_addr", "elem": [1, null]}}]}"#
            ),
            "nftables[1].set.elem[1]: no element of this set"
        );
        assert!(error("[]").contains("an object with the list 'nftables'"));
        assert!(error("{}").contains("nftables"));
        assert!(error(&JSON[..JSON.len() / 2]).contains("EOF"));
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(at in 0..JSON.len(), len in 0..400_usize, put in "[\\[\\]{}\",:0-9a-z@. ]{0,8}") {
            if let (Some(head), Some(tail)) = (JSON.get(..at), JSON.get((at + len).min(JSON.len())..)) {
                let _ = parse(&format!("{head}{put}{tail}"));
            }
        }
    }
}
