//! What a trace says, as tables and lines: at the end of a session, and read back.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::blocks::{Block, MISSING, Table, Tone};
use super::quantile::quantile;
use super::{bursts, figures, units};
use crate::record::run::{Bin, Clock, Histogram, PacketState};
use crate::rules::Mode;
use crate::trace::changes::RuleChange;
use crate::trace::journey::{place, time_on_node};
use crate::trace::outages::Outage;
use crate::trace::run::{Kept, KeptJourney, TraceRun};
use crate::trace::summary::{Health, PathSummary, ServiceSummary, Summary};
use crate::trace::verdict::Verdict;

/// Services, rule changes and journeys that are told one by one in text; a page has room for more.
const MOST: usize = 50;
/// Services and outages of which it is told one by one what went wrong: one fault can hit thousands at once.
pub const WORST: usize = 10;

/// A trace as it was read back.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// `trace.json`.
    pub run: TraceRun,
    /// The journeys beside it that ended badly, as many as a page shows; `None`: they are not beside it.
    pub wrong: Option<Vec<KeptJourney>>,
}

/// What a session says at its end.
pub fn session(summary: &Summary) -> Vec<Block> {
    let mut blocks = vec![Block::Lines(vec![
        (Tone::Plain, headline(summary)),
        (
            Tone::Quiet,
            format!(
                "{}; times are a packet's on this node, without the probes' own",
                tier(summary)
            ),
        ),
    ])];
    let alarms = alarms(summary);
    if !alarms.is_empty() {
        let lines = alarms.into_iter().map(|line| (Tone::Alarm, line));
        blocks.push(Block::Lines(lines.collect()));
    }
    if !summary.services.is_empty() {
        blocks.push(Block::Table(services(summary, MOST)));
        let more = summary.services.len().saturating_sub(MOST);
        if more > 0 {
            let line = format!("and {more} more; --output json has all");
            blocks.push(Block::Lines(vec![(Tone::Quiet, line)]));
        }
    }
    let translators = translators(summary);
    if !translators.is_empty() {
        let lines = translators.into_iter().map(|line| (Tone::Plain, line));
        blocks.push(Block::Lines(lines.collect()));
    }
    if !summary.outages.is_empty() {
        let lines = outages(summary, WORST).into_iter();
        let lines = lines.map(|line| (Tone::Plain, line));
        blocks.push(Block::Lines(lines.collect()));
    }
    let troubles = troubles(summary, WORST);
    if !troubles.is_empty() {
        blocks.push(Block::Lines(troubles));
    }
    let paths = summary.paths.iter();
    let stages = paths.filter_map(|path| stages(summary.clock, path, PacketState::New));
    blocks.extend(stages.map(Block::Table));
    let heard = format!(
        "changes heard {}; lost: {}",
        summary.listening,
        units::plural(summary.listening.lost, "record", "records")
    );
    let health = health(&summary.probes).into_iter().chain([heard]);
    let health = health.chain(unread(summary));
    blocks.push(Block::Lines(
        health.map(|line| (Tone::Quiet, line)).collect(),
    ));
    blocks
}

/// For how long it was not known what the rules said.
fn unread(summary: &Summary) -> Option<String> {
    // Whole tables are replaced there, and nothing tells of a new Service but they.
    let mut modes = summary.services.iter().map(|service| service.mode.as_str());
    let meanwhile = if modes.any(|mode| mode.starts_with("iptables")) {
        "flows to Services that were new then are not told"
    } else {
        "flows that need the new rules were decided later"
    };
    (summary.outdated_ns > 0).then(|| {
        format!(
            "rules had changed and were not yet read again for {} of {}: {meanwhile}",
            units::time_u64(summary.outdated_ns),
            units::time_u64(summary.duration_ns)
        )
    })
}

/// What a trace says that was read back.
pub fn blocks(trace: &Trace) -> Vec<Block> {
    let Trace { run, wrong } = trace;
    let quiet = |line: String| (Tone::Quiet, line);
    let mut blocks = vec![Block::Lines(origin(run).into_iter().map(quiet).collect())];
    let mut session = session(&run.summary);
    let health = session.pop();
    blocks.extend(session);
    let changes = changes(&run.summary, MOST);
    if !changes.is_empty() {
        blocks.push(Block::Lines(
            changes
                .into_iter()
                .map(|line| (Tone::Plain, line))
                .collect(),
        ));
        blocks.push(Block::Table(periods(&run.summary, MOST)));
    }
    if let Some(wrong) = wrong.as_ref().filter(|wrong| !wrong.is_empty()) {
        blocks.push(Block::Table(journeys(run, wrong, MOST)));
    }
    let mut notes = vec![kept(&run.journeys, wrong.is_some())];
    let said = run.environment.notes.iter();
    notes.extend(said.map(|note| format!("note: {note}")));
    blocks.push(Block::Lines(notes.into_iter().map(quiet).collect()));
    blocks.extend(health);
    blocks
}

impl fmt::Display for Summary {
    /// As [`session`] says it, on a wide terminal without colour.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&super::terminal::render(&session(self), 110, false))
    }
}

/// Where and when.
fn origin(run: &TraceRun) -> Vec<String> {
    let environment = &run.environment;
    let namespace = environment.namespace.as_ref();
    vec![
        format!(
            "node    {}{} · {} · {}",
            environment.host,
            namespace
                .map(|name| format!(" (namespace {name})"))
                .unwrap_or_default(),
            environment.kernel,
            figures::clock_words(run.summary.clock)
        ),
        format!(
            "trace   {}, {} long · {} tier · {}",
            environment.started,
            units::time_u64(run.summary.duration_ns),
            run.summary.tier,
            units::plural(
                environment.links.into(),
                "netfilter link",
                "netfilter links"
            ),
        ),
    ]
}

/// `2 Services with new flows, 8 without, in 3.02 s: of 120 new flows 3 went wrong (3 leaked)`.
pub fn headline(summary: &Summary) -> String {
    let with = units::plural(summary.services.len() as u64, "Service", "Services");
    format!(
        "{with} with flows, {} without, in {}: {}",
        units::count(summary.silent as u64),
        units::time_u64(summary.duration_ns),
        outcome(summary)
    )
}

/// `of 120 new flows 3 went wrong (3 leaked)`.
pub fn outcome(summary: &Summary) -> String {
    let flows = units::plural(summary.flows(), "new flow", "new flows");
    let mut troubles: Vec<(&Verdict, u64)> = summary.troubles().into_iter().collect();
    troubles.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let all = troubles
        .iter()
        .fold(0_u64, |sum, (_, count)| sum.saturating_add(*count));
    if all == 0 {
        // Of none that came nothing good can be said.
        let well = if summary.flows() == 0 {
            ""
        } else {
            ", none went wrong"
        };
        return format!("{flows}{well}");
    }
    let said: Vec<String> = troubles
        .iter()
        .map(|(end, count)| format!("{} {end}", units::count(*count)))
        .collect();
    format!(
        "of {flows} {} went wrong ({})",
        units::count(all),
        said.join(", ")
    )
}

/// What this tier does not see.
fn tier(summary: &Summary) -> String {
    match summary.tier.as_str() {
        "hooks" => "hooks tier".to_owned(),
        other => format!("{other} tier"),
    }
}

/// What makes figures doubtful.
pub fn alarms(summary: &Summary) -> Vec<String> {
    let probes = &summary.probes;
    let mut alarms = Vec::new();
    if probes.ring_lost > 0 {
        alarms.push(format!(
            "{} of the probes found no room: as many new flows or drops are missing",
            units::plural(probes.ring_lost, "record", "records")
        ));
    }
    if probes.slot_collisions + probes.unpaired > 0 {
        alarms.push(format!(
            "{} journeys were given up, {} probes met a packet at another step than expected: stages lack them",
            units::count(probes.slot_collisions),
            units::count(probes.unpaired)
        ));
    }
    if summary.rule_changes.iter().any(|change| change.incomplete) {
        alarms.push(
            "a rule change was announced faster than it could be read: what it did is not all told"
                .to_owned(),
        );
    }
    alarms
}

/// Half and the last hundredth of a histogram: `12.1 us / 40.0 us`.
pub fn half_and_tail(clock: Clock, histogram: &Histogram) -> String {
    match (quantile(histogram, 0.5), quantile(histogram, 0.99)) {
        (Some(half), Some(tail)) => format!(
            "{} / {}",
            units::cost_u64(clock, half),
            units::cost_u64(clock, tail)
        ),
        _ => MISSING.to_owned(),
    }
}

/// New flows by Service, at most so many.
pub fn services(summary: &Summary, most: usize) -> Table {
    let row = |service: &ServiceSummary| {
        let gone = if service.there { "" } else { " (gone)" };
        vec![
            format!("{}{gone}", service.title()),
            service.mode().to_owned(),
            units::count(service.endpoints as u64),
            units::count(service.flows),
            units::count(service.wrong()),
            units::count(service.repeated),
            half_and_tail(summary.clock, &service.node),
            half_and_tail(summary.clock, &service.answered),
        ]
    };
    Table {
        title: "New flows by Service, their first packets on the whole node, and from there to the first answer (p50 / p99)"
            .to_owned(),
        header: [
            "Service",
            "mode",
            "endpoints",
            "new flows",
            "went wrong",
            "repeated",
            "whole node",
            "answered after",
        ]
        .map(str::to_owned)
        .to_vec(),
        rows: summary.services.iter().take(most).map(row).collect(),
    }
}

/// A line for each set of modes whose rules name Services together: who translated their flows.
pub fn translators(summary: &Summary) -> Vec<String> {
    let mut sets: BTreeMap<&[String], (u64, BTreeMap<&str, u64>)> = BTreeMap::new();
    for service in summary.services.iter().filter(|one| !one.modes.is_empty()) {
        let (services, flows) = sets.entry(&service.modes).or_default();
        *services += 1;
        for (mode, count) in &service.translated {
            let sum = flows.entry(mode).or_default();
            *sum = sum.saturating_add(*count);
        }
    }
    let more = if summary.listening.is_at_functions() {
        " (--detail functions may tell)"
    } else {
        ""
    };
    let line = |(modes, (services, flows)): (&[String], (u64, BTreeMap<&str, u64>))| {
        let by = flows.iter().map(|(mode, count)| {
            let count = units::count(*count);
            match *mode {
                "unknown" => format!("{count} by which is unknown{more}"),
                mode => format!("{count} by {mode}"),
            }
        });
        let by: Vec<String> = by.collect();
        let by = if by.is_empty() {
            "no new flow was translated".to_owned()
        } else {
            format!("new flows were translated {}", by.join(", "))
        };
        format!(
            "{} of {} in the rules of {} at once: {by}",
            units::count(services),
            units::plural(summary.services.len() as u64, "Service is", "Services are"),
            units::list(modes),
        )
    };
    sets.into_iter().map(line).collect()
}

/// `3 leaked, 1 dropped at ...`; nothing for what went well.
pub fn bad_flows(service: &ServiceSummary) -> String {
    let bad = service.verdicts.iter().filter(|c| !c.verdict.is_good());
    listed(bad.map(|count| (&count.verdict, count.count)))
}

/// `3 dropped at ...`: packets of which nobody knows whether their flows were new.
pub fn unplaced_drops(service: &ServiceSummary) -> String {
    listed(service.unplaced_drops.iter().map(|c| (&c.end, c.count)))
}

/// `3 dropped at ...`: answers to flows that had not been answered.
pub fn answer_drops(service: &ServiceSummary) -> String {
    listed(service.answer_drops.iter().map(|c| (&c.end, c.count)))
}

/// `3 dropped at ...`; nothing for what went well.
pub fn later_drops(service: &ServiceSummary) -> String {
    listed(service.later_drops.iter().map(|c| (&c.end, c.count)))
}

fn listed<T: fmt::Display>(counts: impl Iterator<Item = (T, u64)>) -> String {
    let said: Vec<String> = counts
        .map(|(what, count)| format!("{} {what}", units::count(count)))
        .collect();
    said.join(", ")
}

/// What went wrong with one Service or several, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Trouble {
    /// New flows that did not go well, by a word.
    flows: BTreeMap<&'static str, u64>,
    /// Established flows that are stuck.
    stuck: u64,
    /// Packets of established flows that were dropped, answers, and those of which nobody knows what they were.
    drops: u64,
    /// Established flows whose conntrack entry was gone.
    picked_up: u64,
    /// Packets of established flows that conntrack does not track.
    untracked: u64,
}

impl Trouble {
    fn of(service: &ServiceSummary) -> Self {
        let sum = |counts: &mut dyn Iterator<Item = u64>| counts.fold(0, u64::saturating_add);
        let mut flows: BTreeMap<&'static str, u64> = BTreeMap::new();
        for count in service.verdicts.iter().filter(|c| !c.verdict.is_good()) {
            let flows = flows.entry(count.verdict.word()).or_default();
            *flows = flows.saturating_add(count.count);
        }
        let drops = service.later_drops.iter().chain(&service.answer_drops);
        let mut drops = drops.chain(&service.unplaced_drops).map(|one| one.count);
        Self {
            flows,
            stuck: sum(&mut service.stuck.values().copied()),
            drops: sum(&mut drops),
            picked_up: service.picked_up,
            untracked: service.untracked,
        }
    }

    fn and(mut self, other: &Self) -> Self {
        for (word, count) in &other.flows {
            let flows = self.flows.entry(word).or_default();
            *flows = flows.saturating_add(*count);
        }
        self.stuck = self.stuck.saturating_add(other.stuck);
        self.drops = self.drops.saturating_add(other.drops);
        self.picked_up = self.picked_up.saturating_add(other.picked_up);
        self.untracked = self.untracked.saturating_add(other.untracked);
        self
    }

    /// Flows and packets.
    fn size(&self) -> u64 {
        let others = [self.stuck, self.drops, self.picked_up, self.untracked];
        let all = self.flows.values().copied().chain(others);
        all.fold(0, u64::saturating_add)
    }
}

impl fmt::Display for Trouble {
    /// `12,345 new flows (12,000 leaked, 345 dropped), 3 established flows stuck`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        let flows = self
            .flows
            .values()
            .fold(0, |sum: u64, n| sum.saturating_add(*n));
        if flows > 0 {
            let number = units::plural(flows, "new flow", "new flows");
            let words = listed(self.flows.iter().map(|(word, count)| (*word, *count)));
            parts.push(format!("{number} ({words})"));
        }
        let others = [
            (
                self.stuck,
                "established flow stuck",
                "established flows stuck",
            ),
            (self.drops, "other packet dropped", "other packets dropped"),
            (
                self.picked_up,
                "established flow picked up by conntrack",
                "established flows picked up by conntrack",
            ),
            (
                self.untracked,
                "packet of established flows not tracked",
                "packets of established flows not tracked",
            ),
        ];
        let others = others.iter().filter(|(count, ..)| *count > 0);
        parts.extend(others.map(|(count, one, many)| units::plural(*count, one, many)));
        f.write_str(&parts.join(", "))
    }
}

/// What went wrong with a Service, a line for each kind of packet.
fn of_service(service: &ServiceSummary) -> Vec<String> {
    let mut lines = Vec::new();
    let new = bad_flows(service);
    if !new.is_empty() {
        let flows = units::count(service.flows);
        lines.push(format!("{}: of {flows} new flows {new}", service.title()));
    }
    for (endpoint, flows) in &service.stuck {
        let flows = units::plural(*flows, "established flow was", "established flows were");
        lines.push(format!(
            "{}: {flows} stuck on the former endpoint {endpoint}",
            service.title()
        ));
    }
    let later = later_drops(service);
    if !later.is_empty() {
        lines.push(format!("{}: of established flows {later}", service.title()));
    }
    lines.extend(beside_conntrack(service));
    let answers = answer_drops(service);
    if !answers.is_empty() {
        lines.push(format!(
            "{}: of answers to new flows {answers}",
            service.title()
        ));
    }
    let unplaced = unplaced_drops(service);
    if !unplaced.is_empty() {
        lines.push(format!(
            "{}: of new or established flows, which is unknown, {unplaced}",
            service.title()
        ));
    }
    lines
}

/// Established flows that conntrack had lost, or does not track.
fn beside_conntrack(service: &ServiceSummary) -> Vec<String> {
    let counts = [
        (
            service.picked_up,
            ["established flow was", "established flows were"],
            "picked up by conntrack, whose entry was gone",
        ),
        (
            service.untracked,
            [
                "packet of established flows was",
                "packets of established flows were",
            ],
            "not tracked by conntrack, and so not translated: the rules that have it track are gone, or it takes them \
             for invalid (net.netfilter.nf_conntrack_log_invalid=6 tells why)",
        ),
    ];
    let counted = counts.into_iter().filter(|(count, ..)| *count > 0);
    let said = counted.map(|(count, [one, many], what)| {
        let number = units::plural(count, one, many);
        format!("{}: {number} {what}", service.title())
    });
    said.collect()
}

/// The outages that lost most flows, at most so many, and the others in one line; all of them in their order if there
/// are no more.
pub fn outages(summary: &Summary, most: usize) -> Vec<String> {
    let mut all: Vec<&Outage> = summary.outages.iter().collect();
    if all.len() > most {
        all.sort_by_key(|outage| std::cmp::Reverse(outage.lost));
    }
    let (told, others) = all.split_at(all.len().min(most));
    let mut lines: Vec<String> = told.iter().map(ToString::to_string).collect();
    if !others.is_empty() || summary.outages_left_out > 0 {
        let lost = others.iter().map(|outage| outage.lost);
        lines.push(other_outages(
            others.len() as u64,
            lost.fold(0, u64::saturating_add),
            summary.outages_left_out,
        ));
    }
    lines
}

/// `and 2,990 other outages, 12,345 new flows lost; --output json and -o have all`.
pub fn other_outages(number: u64, lost: u64, left_out: u64) -> String {
    let number = units::plural(number, "other outage", "other outages");
    let lost = units::plural(lost, "new flow", "new flows");
    let kept = match left_out {
        0 => "--output json and -o have all".to_owned(),
        more => format!(
            "{} more came later and are only counted",
            units::count(more)
        ),
    };
    format!("and {number}, {lost} lost; {kept}")
}

/// Any stuck flow, for its advice.
const STUCK: Verdict = Verdict::Stuck {
    endpoint: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
};

/// What went wrong, of at most so many Services one by one, those that lost most first, of the others in one line; and
/// what to look at.
pub fn troubles(summary: &Summary, most: usize) -> Vec<(Tone, String)> {
    let mut bad: Vec<(&ServiceSummary, Trouble)> = summary
        .services
        .iter()
        .map(|service| (service, Trouble::of(service)))
        .filter(|(_, trouble)| *trouble != Trouble::default())
        .collect();
    // Stable: of those that lost as many, who had more flows is first.
    bad.sort_by_key(|(_, trouble)| std::cmp::Reverse(trouble.size()));
    let (told, others) = bad.split_at(bad.len().min(most));
    let mut lines: Vec<(Tone, String)> = Vec::new();
    for (service, _) in told {
        let told = of_service(service).into_iter();
        lines.extend(told.map(|line| (Tone::Plain, line)));
    }
    if !others.is_empty() {
        let sum = others
            .iter()
            .fold(Trouble::default(), |sum, (_, trouble)| sum.and(trouble));
        let number = units::plural(others.len() as u64, "other Service", "other Services");
        let line = format!("and {number}, {sum}; --output json and -o have all");
        lines.push((Tone::Plain, line));
    }
    let services = summary.services.iter();
    let stuck = summary
        .services
        .iter()
        .any(|service| !service.stuck.is_empty());
    let of_flows = services.clone().flat_map(|service| &service.verdicts);
    // What is to be said of answers that were dropped is said of their flows.
    let of_drops =
        services.flat_map(|service| service.later_drops.iter().chain(&service.unplaced_drops));
    let mut advice: Vec<(&str, &str)> = of_flows
        .filter_map(|count| Some((count.verdict.word(), count.verdict.advice()?)))
        .chain(stuck.then_some((STUCK.word(), STUCK.advice().unwrap_or_default())))
        .chain(of_drops.filter_map(|count| Some((count.end.word(), count.end.advice()?))))
        .collect();
    advice.sort_unstable();
    advice.dedup();
    let advice = advice.into_iter();
    lines.extend(advice.map(|(word, advice)| (Tone::Quiet, format!("{word}: {advice}"))));
    lines
}

/// The stages of a path's packets of a state; `None` if there were none.
pub fn stages(clock: Clock, path: &PathSummary, state: PacketState) -> Option<Table> {
    let stages = path.stages.iter().filter(|stage| stage.state == state);
    let stages = stages.filter(|stage| stage.histogram.count > 0);
    let row = |name: String, histogram: &Histogram| {
        vec![
            name,
            half_and_tail(clock, histogram),
            units::count(histogram.count),
        ]
    };
    let mut rows: Vec<Vec<String>> = stages
        .map(|stage| row(format!("{} {}", stage.hook, stage.stage), &stage.histogram))
        .collect();
    if let Some(node) = path.node.get(&state) {
        rows.push(row("whole node".to_owned(), node));
    }
    let what = match state {
        PacketState::New => "first packets of flows",
        PacketState::Established => "later packets of flows",
        PacketState::Reply => "replies",
        PacketState::Untracked => "untracked packets",
    };
    (!rows.is_empty()).then(|| Table {
        title: format!("{}, {what}", path.path),
        header: ["stage", "p50 / p99", "packets"]
            .map(str::to_owned)
            .to_vec(),
        rows,
    })
}

/// How the probes did, and what they cost if that was asked.
pub fn health(probes: &Health) -> Vec<String> {
    let mut lines = vec![format!(
        "probes  {} journeys: {} left by a device, {} reached a socket, {} dropped, {} unfinished; {} other packets; lost: {} records, {} collisions, {} unpaired, {} flows forgotten",
        units::count(probes.journeys),
        units::count(probes.transmitted),
        units::count(probes.delivered_locally),
        units::count(probes.dropped),
        units::count(probes.unfinished),
        units::count(probes.other_packets),
        units::count(probes.ring_lost),
        units::count(probes.slot_collisions),
        units::count(probes.unpaired),
        units::count(probes.forgotten),
    )];
    lines.extend(at_sockets(probes));
    lines.extend((probes.without_room > 0).then(|| {
        let addresses = units::plural(probes.without_room, "address", "addresses");
        format!(
            "no room among the probes' targets for {addresses} that came during the session: flows to them are not \
             told; a new session has room for them"
        )
    }));
    lines.extend(cost(probes));
    lines
}

/// What became of packets at the sockets that they had reached, if any was not read.
fn at_sockets(probes: &Health) -> Option<String> {
    let counts = [
        (probes.dropped_at_socket, "dropped there"),
        (probes.freed_with_socket, "freed with their socket"),
        (
            probes.freed_at_socket,
            "freed there, read or dropped: this kernel does not say",
        ),
    ];
    let said = counts.into_iter().filter(|(count, _)| *count > 0);
    let said: Vec<String> = said
        .map(|(count, what)| format!("{} {what}", units::count(count)))
        .collect();
    (!said.is_empty()).then(|| format!("sockets {}", said.join(", ")))
}

/// `cost    1,000 runs of probes, ...`.
pub(super) fn cost(probes: &Health) -> Option<String> {
    let cost = probes.cost.filter(|cost| cost.probe_runs > 0)?;
    Some(format!(
        "cost    {} runs of probes, {:.0} ns each ({} in all), by the kernel's own account",
        units::count(cost.probe_runs),
        cost.probe_ns as f64 / cost.probe_runs as f64,
        units::time_u64(cost.probe_ns),
    ))
}

/// When it was since the session began, as [`seconds`] writes it.
pub fn since(summary: &Summary, time_ns: u64) -> String {
    seconds(summary.since(time_ns))
}

/// `+0.040271 s`: nanoseconds since the session began.
pub fn seconds(ns: u64) -> String {
    format!("+{}.{:06} s", ns / 1_000_000_000, ns % 1_000_000_000 / 1000)
}

/// Rule changes in order, those of one program in a row in a line, at most so many lines.
pub fn changes(summary: &Summary, most: usize) -> Vec<String> {
    let mut told = 0;
    let mut lines: Vec<String> = bursts::of(&summary.rule_changes)
        .iter()
        .take(most)
        .map(|burst| {
            let first = told + 1;
            told += burst.times();
            let [from, to] = [burst.first_ns(), burst.last_ns()].map(|ns| since(summary, ns));
            if burst.times() == 1 {
                format!("rule change {first} at {to}: {burst}")
            } else {
                format!("rule changes {first} to {told} from {from} to {to}: {burst}")
            }
        })
        .collect();
    let more = summary.changes().saturating_sub(told);
    if more > 0 {
        lines.push(format!(
            "and {} more",
            units::plural(more, "rule change", "rule changes")
        ));
    }
    lines
}

/// A time in which no rule changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Period {
    /// Number of the last change before it, from 1; 0: none.
    pub after: usize,
    /// Its begin, ns since the session's.
    pub from_ns: u64,
    /// Its end.
    pub to_ns: u64,
    /// New flows in it, and of them those that went wrong.
    pub flows: Bin,
}

/// The session cut at its rule changes. Flows are known by the bin: one in the bin of a change counts
/// after it.
pub fn cut(summary: &Summary) -> Vec<Period> {
    let bin_ns = summary.timeline.bin_ns.max(1);
    let bin_of = |change: &RuleChange| summary.since(change.time_ns) / bin_ns;
    let mut periods = vec![Period {
        after: 0,
        from_ns: 0,
        to_ns: summary.duration_ns,
        flows: Bin::default(),
    }];
    for (i, change) in summary.rule_changes.iter().enumerate() {
        let from_ns = bin_of(change) * bin_ns;
        let Some(last) = periods.last_mut() else {
            continue;
        };
        // Changes of one bin cannot be told apart.
        if from_ns <= last.from_ns {
            last.after = i + 1;
            continue;
        }
        last.to_ns = from_ns;
        periods.push(Period {
            after: i + 1,
            from_ns,
            to_ns: summary.duration_ns.max(from_ns),
            flows: Bin::default(),
        });
    }
    for bins in summary.timeline.paths.values() {
        for (start, bin) in (0_u64..).zip(bins) {
            let start_ns = start.saturating_mul(bin_ns);
            let next = periods.partition_point(|period| period.from_ns <= start_ns);
            if let Some(period) = periods.get_mut(next.saturating_sub(1)) {
                period.flows.sent = period.flows.sent.saturating_add(bin.sent);
                period.flows.lost = period.flows.lost.saturating_add(bin.lost);
            }
        }
    }
    periods
}

/// New flows between rule changes, at most so many.
pub fn periods(summary: &Summary, most: usize) -> Table {
    let seconds = |ns: u64| format!("+{:.3} s", ns as f64 / 1e9);
    let row = |period: &Period| {
        let after = match period.after {
            0 => "the begin".to_owned(),
            n => format!("rule change {n}"),
        };
        vec![
            after,
            seconds(period.from_ns),
            seconds(period.to_ns),
            units::count(period.flows.sent),
            units::count(period.flows.lost),
        ]
    };
    Table {
        title: format!(
            "New flows between rule changes, to within {}",
            units::tick(Clock::Wall, summary.timeline.bin_ns as f64)
        ),
        header: ["after", "from", "to", "new flows", "went wrong"]
            .map(str::to_owned)
            .to_vec(),
        rows: cut(summary).iter().take(most).map(row).collect(),
    }
}

/// Journeys one by one, at most so many.
pub fn journeys(run: &TraceRun, journeys: &[KeptJourney], most: usize) -> Table {
    let row = |journey: &KeptJourney| {
        let headed = journey.headed.filter(|to| *to != journey.destination);
        vec![
            since(&run.summary, journey.time_ns),
            journey.service.clone(),
            journey.path.clone(),
            match journey.source_after.filter(|_| journey.answer) {
                Some(from) => format!("{from} → {} for {}", journey.source, journey.destination),
                None => format!(
                    "{} → {}{}",
                    journey.source,
                    journey.destination,
                    headed.map(|to| format!(" → {to}")).unwrap_or_default()
                ),
            },
            time_on_node(run.summary.clock, journey.elapsed_ns),
            format!(
                "{}{}",
                journey.end,
                place(journey.first, journey.answer, journey.told_before)
            ),
        ]
    };
    Table {
        title: format!(
            "Journeys that ended badly, the first {} of {}",
            journeys.len().min(most),
            units::count(
                run.journeys
                    .wrong
                    .saturating_add(run.journeys.wrong_left_out)
            )
        ),
        header: ["at", "Service", "path", "from, to", "on the node", "end"]
            .map(str::to_owned)
            .to_vec(),
        rows: journeys.iter().take(most).map(row).collect(),
    }
}

/// Which journeys are kept.
pub fn kept(kept: &Kept, beside: bool) -> String {
    let failure = kept
        .failure
        .as_ref()
        .map(|failure| format!(": it could not be written to the end ({failure})"))
        .unwrap_or_default();
    let missing = if beside {
        ""
    } else {
        "; it is not beside trace.json"
    };
    format!(
        "journeys.jsonl holds {} that ended well and {} that ended badly (at most {} of each); {} and {} are left out{failure}{missing}",
        units::count(kept.good),
        units::count(kept.wrong),
        units::count(kept.limit),
        units::count(kept.good_left_out),
        units::count(kept.wrong_left_out),
    )
}

/// The mode of all Services that had flows, if it is one.
pub fn mode(summary: &Summary) -> Option<Mode> {
    let mut modes = summary.services.iter().map(|service| &service.mode);
    let first = modes.next()?;
    if modes.any(|mode| mode != first) {
        return None;
    }
    Mode::ALL.into_iter().find(|mode| mode.name() == first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::rule_changes::Way;
    use crate::report::sample;
    use crate::report::{markdown, terminal};

    #[test]
    fn a_flush_in_the_middle() {
        insta::assert_snapshot!(terminal::render(&blocks(&sample::trace()), 110, false));
    }

    #[test]
    fn the_end_of_a_session() {
        insta::assert_snapshot!(sample::trace().run.summary);
    }

    #[test]
    fn as_markdown() {
        insta::assert_snapshot!(markdown::render(&blocks(&sample::trace())));
    }

    #[test]
    fn nothing_happened() {
        let mut trace = sample::trace();
        let summary = &mut trace.run.summary;
        summary.services.clear();
        summary.paths.clear();
        summary.rule_changes.clear();
        summary.timeline.paths.clear();
        trace.wrong = None;
        let text = terminal::render(&blocks(&trace), 110, false);
        assert!(text.contains("0 Services with flows"), "{text}");
        assert!(text.contains("0 new flows"), "{text}");
        assert!(!text.contains("none went wrong"), "{text}");
        assert!(text.contains("it is not beside trace.json"), "{text}");
        assert_eq!(mode(&trace.run.summary), None);
    }

    #[test]
    fn every_flow_lies_in_one_period() {
        let summary = sample::trace().run.summary;
        let periods = cut(&summary);
        assert_eq!(periods.len(), 3);
        let timeline = summary.timeline.paths.values().flatten();
        let sent: u64 = timeline.map(|bin| bin.sent).sum();
        let told: u64 = periods.iter().map(|period| period.flows.sent).sum();
        assert_eq!(told, sent);
        let lost: Vec<u64> = periods.iter().map(|period| period.flows.lost).collect();
        assert!(lost[0] == 0 && lost[1] > 0 && lost[2] == 0, "{lost:?}");
        for two in periods.windows(2) {
            assert_eq!(two[0].to_ns, two[1].from_ns);
        }
    }

    #[test]
    fn one_fault_of_many_services_is_a_few_lines() {
        let mut summary = sample::trace().run.summary;
        let one = summary.services[0].clone();
        let outage = Outage {
            service: String::new(),
            ipv6: false,
            path: "pod→ClusterIP".to_owned(),
            begin_ns: 1,
            end_ns: Some(2),
            lost: 0,
            last_lost_ns: 1,
            open: None,
            began_with: None,
            ended_with: None,
        };
        let numbered = |n: u64| ServiceSummary {
            name: format!("shop/web-{n}:http"),
            verdicts: one
                .verdicts
                .iter()
                .cloned()
                .map(|mut count| {
                    count.count = 10 + n;
                    count
                })
                .collect(),
            ..one.clone()
        };
        summary.services = (0..3000).map(numbered).collect();
        summary.outages = (0..3000)
            .map(|n| Outage {
                service: format!("shop/web-{n}:http"),
                lost: 10 + n,
                ..outage.clone()
            })
            .collect();
        let lines = troubles(&summary, WORST);
        // Two lines each: what is wrong, and of later packets.
        let told = lines.iter().filter(|(tone, _)| *tone == Tone::Plain);
        let told: Vec<&str> = told.map(|(_, line)| line.as_str()).collect();
        assert_eq!(told.len(), 2 * WORST + 1, "{told:#?}");
        assert!(told[0].starts_with("shop/web-2999:http: "), "{told:#?}");
        insta::assert_snapshot!(told[told.len() - 1], @"and 2,990 other Services, 4,498,455 new flows (4,498,455 leaked), 5,980 other packets dropped; --output json and -o have all");
        let told = outages(&summary, WORST);
        assert_eq!(told.len(), WORST + 1);
        assert!(told[0].starts_with("shop/web-2999:http "), "{told:#?}");
        insta::assert_snapshot!(told[WORST], @"and 2,990 other outages, 4,498,455 new flows lost; --output json and -o have all");
        summary.outages_left_out = 7;
        insta::assert_snapshot!(outages(&summary, WORST)[WORST], @"and 2,990 other outages, 4,498,455 new flows lost; 7 more came later and are only counted");
        assert!(summary.to_string().lines().count() < 200);
        // Few are told in their order.
        summary.outages.truncate(2);
        summary.outages_left_out = 0;
        let told = outages(&summary, WORST);
        assert!(told.len() == 2 && told[0].starts_with("shop/web-0:http "));
    }

    #[test]
    fn who_translated_is_told_where_several_modes_could() {
        let mut summary = sample::trace().run.summary;
        assert_eq!(translators(&summary), [""; 0]);
        let modes = ["iptables-legacy", "nftables"].map(str::to_owned);
        let counts = [
            [("iptables-legacy", 270), ("unknown", 0)],
            [("iptables-legacy", 60), ("unknown", 30)],
        ];
        for (service, counts) in summary.services.iter_mut().zip(counts) {
            service.modes = modes.to_vec();
            let counted = counts.into_iter().filter(|(_, count)| *count > 0);
            let counted = counted.map(|(mode, count)| (mode.to_owned(), count));
            service.translated = counted.collect();
        }
        insta::assert_snapshot!(translators(&summary).join("\n"), @"2 of 2 Services are in the rules of iptables-legacy and nftables at once: new flows were translated 330 by iptables-legacy, 30 by which is unknown (--detail functions may tell)");
        // Where the kernel refuses programs at functions nobody is sent there.
        summary.listening.probes = Some(Way::SystemCalls.title().to_owned());
        let told = translators(&summary).join("\n");
        assert!(told.ends_with("30 by which is unknown"), "{told}");
        assert_eq!(summary.services[0].mode(), "iptables-legacy");
        assert_eq!(summary.services[1].mode(), "several");
    }

    #[test]
    fn lost_records_are_said_first() {
        let mut summary = sample::trace().run.summary;
        summary.probes.ring_lost = 7;
        summary.probes.unpaired = 1;
        let text = summary.to_string();
        let warning = "warning: 7 records of the probes found no room";
        assert!(text.contains(warning), "{text}");
        assert!(text.find("warning") < text.find("Service   "), "{text}");
    }
}
