//! Loads run.json and trace.json and says in one line what is wrong with one that cannot be trusted.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};

use super::blocks::{self, Block};
use super::trace::Trace;
use super::write::{JOURNEYS_FILE, RUN_FILE, TRACE_FILE};
use super::{html, trace as of_trace};
use crate::record::run::{
    Cell, FORMAT, Fault, FaultKind, FaultPath, Histogram, Ledger, PacketState, PathResult,
    ProbeHealth, Run,
};
use crate::trace::run::{FORMAT as TRACE_FORMAT, Kept, KeptJourney, TraceRun};
use crate::trace::summary::ServiceSummary;
use crate::trace::timeline::BINS;

/// No run is larger: the largest that can be measured takes a few MiB.
const LARGEST: u64 = 256 << 20;
/// No line of journeys.jsonl is longer: a journey with every stage takes 4 KiB.
const LONGEST_LINE: u64 = 64 << 10;
/// Journeys that ended badly and are kept to be shown.
const SHOWN: usize = 1000;

/// Why a run could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file could not be read at all.
    #[error("cannot read {}: {source}", file.display())]
    File {
        /// Which.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A folder, a device, a socket: nothing that has an end.
    #[error("{}: not a run: neither a file nor a pipe", file.display())]
    Kind {
        /// Which.
        file: PathBuf,
    },
    /// Larger than any run.
    #[error("{}: not a run: larger than {} MiB", file.display(), LARGEST >> 20)]
    Size {
        /// Which.
        file: PathBuf,
    },
    /// Not JSON.
    #[error("{}: not JSON: {what} at line {line}, column {column}; was it written to the end?", file.display())]
    Syntax {
        /// Which.
        file: PathBuf,
        /// What the parser met.
        what: String,
        /// Where, from 1.
        line: usize,
        /// Where, from 1.
        column: usize,
    },
    /// JSON of another program or version.
    #[error("{}: format is '{found}', this svcpath reads {}: use the svcpath that wrote it, or measure again", file.display(), readable(reads))]
    Format {
        /// Which.
        file: PathBuf,
        /// What it says it is.
        found: String,
        /// What could have been read here.
        reads: &'static [&'static str],
    },
    /// A folder without a run.
    #[error("{} holds neither {RUN_FILE} nor {TRACE_FILE}: is it the folder that was given to -o?", dir.display())]
    Nothing {
        /// Which.
        dir: PathBuf,
    },
    /// A trace's folder without the trace.
    #[error("{0} holds {JOURNEYS_FILE} without {TRACE_FILE}: a session goes on there, was killed, or had no room for what it found (Services, stages, rule changes), which is missing; {0}/{JOURNEYS_FILE} has its journeys, one a line", dir.display())]
    Unfinished {
        /// Which.
        dir: PathBuf,
    },
    /// JSON, but not a run: a field is missing, unknown or of another type.
    #[error("{}: not a run: {what} at line {line}, column {column}", file.display())]
    Shape {
        /// Which.
        file: PathBuf,
        /// Which field, and what is wrong with it.
        what: String,
        /// Where, from 1.
        line: usize,
        /// Where, from 1.
        column: usize,
    },
    /// A run whose figures contradict each other.
    #[error("{}: run invalid: {source}", file.display())]
    Invalid {
        /// Which.
        file: PathBuf,
        /// What contradicts what, and where.
        source: Invalid,
    },
}

impl ReadError {
    /// The program's exit code: 5 for a run that is invalid, 1 for a file that cannot be read.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::File { .. } | Self::Nothing { .. } | Self::Unfinished { .. } => 1,
            Self::Kind { .. }
            | Self::Size { .. }
            | Self::Syntax { .. }
            | Self::Format { .. }
            | Self::Shape { .. }
            | Self::Invalid { .. } => 5,
        }
    }
}

/// A contradiction inside a run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct Invalid {
    /// Which cell or fault, path and figure: `iptables-nft 1000, pod-to-clusterip, stage PREROUTING dnat new`.
    pub place: String,
    /// What contradicts what.
    pub problem: String,
}

fn readable(formats: &[&str]) -> String {
    let quoted: Vec<String> = formats.iter().map(|format| format!("'{format}'")).collect();
    super::units::list(&quoted)
}

/// A run of either kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Recorded {
    /// What `svcpath bench` measured.
    Comparison(Box<Run>),
    /// What `svcpath trace` saw.
    Trace(Box<Trace>),
}

impl Recorded {
    /// As tables and lines.
    pub fn blocks(&self) -> Vec<Block> {
        match self {
            Self::Comparison(run) => blocks::summary(run),
            Self::Trace(trace) => of_trace::blocks(trace),
        }
    }

    /// As a page.
    pub fn html(&self) -> String {
        match self {
            Self::Comparison(run) => html::render(run),
            Self::Trace(trace) => html::trace::render(trace),
        }
    }

    /// As it was recorded, indented; without the journeys beside a trace.
    pub fn json(&self) -> serde_json::Result<String> {
        let json = match self {
            Self::Comparison(run) => serde_json::to_string_pretty(run),
            Self::Trace(trace) => serde_json::to_string_pretty(&trace.run),
        };
        Ok(json? + "\n")
    }
}

/// Reads and validates a run of either kind: its file, or the folder that it is in. With a trace, what
/// is kept of its journeys beside it.
pub fn recorded(path: impl AsRef<Path>) -> Result<Recorded, ReadError> {
    let path = path.as_ref();
    let file = if path.is_dir() {
        let mut files = [RUN_FILE, TRACE_FILE]
            .map(|name| path.join(name))
            .into_iter();
        files
            .find(|file| file.exists())
            .ok_or_else(|| nothing(path.to_owned()))?
    } else {
        path.to_owned()
    };
    let text = text(&file)?;
    let format = format(&file, &text)?;
    if format == FORMAT {
        return Ok(Recorded::Comparison(Box::new(run(&file, &text)?)));
    }
    if format != TRACE_FORMAT {
        return Err(ReadError::Format {
            file,
            found: format,
            reads: &[FORMAT, TRACE_FORMAT],
        });
    }
    let run = trace(&file, &text)?;
    let beside = file.with_file_name(JOURNEYS_FILE);
    let wrong = if beside.is_file() {
        Some(journeys(&beside, &run.journeys)?)
    } else {
        None
    };
    Ok(Recorded::Trace(Box::new(Trace { run, wrong })))
}

/// What is missing in a folder without a run.
fn nothing(dir: PathBuf) -> ReadError {
    if dir.join(JOURNEYS_FILE).is_file() {
        ReadError::Unfinished { dir }
    } else {
        ReadError::Nothing { dir }
    }
}

/// Reads and validates one comparison.
pub fn read(path: impl AsRef<Path>) -> Result<Run, ReadError> {
    let file = path.as_ref();
    parse(file, &text(file)?)
}

fn text(file: &Path) -> Result<String, ReadError> {
    let bytes = bytes(file, LARGEST)?;
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let lines = || valid.split(|byte| *byte == b'\n');
        ReadError::Syntax {
            file: file.to_owned(),
            what: "bytes that are no UTF-8".to_owned(),
            line: lines().count(),
            column: 1 + lines().next_back().map_or(0, <[u8]>::len),
        }
    })
}

/// All of a file or pipe that is no larger than it may be.
fn bytes(file: &Path, largest: u64) -> Result<Vec<u8>, ReadError> {
    let failed = |source| ReadError::File {
        file: file.to_owned(),
        source,
    };
    // Before it is opened: opening some devices does something.
    let kind = fs::metadata(file).map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_fifo() {
        return Err(ReadError::Kind {
            file: file.to_owned(),
        });
    }
    let mut bytes = Vec::new();
    let mut content = File::open(file).map_err(failed)?.take(largest + 1);
    content.read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > largest {
        return Err(ReadError::Size {
            file: file.to_owned(),
        });
    }
    Ok(bytes)
}

/// Any JSON whose strings have no control characters: strings of a run are shown on terminals,
/// which take some of them for commands.
struct Plain;

impl<'de> Deserialize<'de> for Plain {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for Plain {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without control characters in its strings")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self, E> {
        if text.contains(char::is_control) {
            return Err(E::custom("a string has control characters"));
        }
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self, A::Error> {
        while items.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self, A::Error> {
        while entries.next_entry::<Self, Self>()?.is_some() {}
        Ok(self)
    }
}

/// Only what tells one format from another.
#[derive(Deserialize)]
struct Head {
    format: String,
}

fn parse(file: &Path, text: &str) -> Result<Run, ReadError> {
    let found = format(file, text)?;
    if found != FORMAT {
        return Err(ReadError::Format {
            file: file.to_owned(),
            found,
            reads: &[FORMAT],
        });
    }
    run(file, text)
}

/// What it says it is.
fn format(file: &Path, text: &str) -> Result<String, ReadError> {
    // Before anything of it is shown, be it in an error.
    model::<Plain>(file, text)?;
    // Then the format: fields of another version are no mistakes of that version.
    model::<Head>(file, text).map(|head| head.format)
}

fn model<T: DeserializeOwned>(file: &Path, text: &str) -> Result<T, ReadError> {
    serde_json::from_str(text).map_err(|error| json_error(file, &error))
}

fn run(file: &Path, text: &str) -> Result<Run, ReadError> {
    let run: Run = model(file, text)?;
    validate(&run).map_err(|source| ReadError::Invalid {
        file: file.to_owned(),
        source,
    })?;
    Ok(run)
}

fn trace(file: &Path, text: &str) -> Result<TraceRun, ReadError> {
    let run: TraceRun = model(file, text)?;
    validate_trace(&run).map_err(|source| ReadError::Invalid {
        file: file.to_owned(),
        source,
    })?;
    Ok(run)
}

/// Reads the journeys that are kept beside a trace; returns those that ended badly, the first of them.
fn journeys(file: &Path, kept: &Kept) -> Result<Vec<KeptJourney>, ReadError> {
    let failed = |source| ReadError::File {
        file: file.to_owned(),
        source,
    };
    let disagrees = |found: u64| ReadError::Invalid {
        file: file.to_owned(),
        source: invalid(
            JOURNEYS_FILE,
            format!(
                "holds {found} journeys, {TRACE_FILE} says {}: the two are not of one trace, or it was cut off",
                kept.lines()
            ),
        ),
    };
    let mut content = BufReader::new(File::open(file).map_err(failed)?);
    let mut wrong = Vec::new();
    let (mut number, mut line) = (0_u64, Vec::new());
    loop {
        line.clear();
        let room = &mut content.by_ref().take(LONGEST_LINE);
        if room.read_until(b'\n', &mut line).map_err(failed)? == 0 {
            break;
        }
        if number == kept.lines() {
            // What could not be written to its end may end in half a line.
            if kept.failure.is_some() {
                break;
            }
            return Err(disagrees(number + 1));
        }
        number += 1;
        let journey = journey(&line).map_err(|what| ReadError::Shape {
            file: file.to_owned(),
            what,
            line: usize::try_from(number).unwrap_or(usize::MAX),
            column: 1,
        })?;
        if !journey.end.is_good() && wrong.len() < SHOWN {
            wrong.push(journey);
        }
    }
    if number < kept.lines() {
        return Err(disagrees(number));
    }
    Ok(wrong)
}

/// One line of journeys.jsonl, or what is wrong with it.
fn journey(line: &[u8]) -> Result<KeptJourney, String> {
    if line.last() != Some(&b'\n') {
        return Err("a line is cut off or too long".to_owned());
    }
    serde_json::from_slice::<Plain>(line).map_err(|error| error.to_string())?;
    serde_json::from_slice(line).map_err(|error| error.to_string())
}

fn json_error(file: &Path, error: &serde_json::Error) -> ReadError {
    let (line, column) = (error.line(), error.column());
    let text = error.to_string();
    let place = format!(" at line {line} column {column}");
    let what = text.strip_suffix(&place).unwrap_or(&text).to_owned();
    let file = file.to_owned();
    if error.is_data() {
        ReadError::Shape {
            file,
            what,
            line,
            column,
        }
    } else {
        ReadError::Syntax {
            file,
            what,
            line,
            column,
        }
    }
}

/// Does the run agree with itself? Called on what was read and before anything is written.
pub fn validate(run: &Run) -> Result<(), Invalid> {
    if run.format != FORMAT {
        return Err(invalid(
            "format",
            format!("is '{}', not '{FORMAT}'", run.format),
        ));
    }
    let measured = &run.measurements;
    if measured.cells.is_empty() && measured.faults.is_empty() {
        return Err(invalid("measurements", "nothing was measured"));
    }
    let mut cells = BTreeSet::new();
    for each in &measured.cells {
        let place = format!("{} {}", each.mode, each.services);
        if !cells.insert((each.mode, each.services, each.endpoints_per_service)) {
            return Err(invalid(
                &place,
                "there is more than one cell of this mode and size",
            ));
        }
        cell(&place, each)?;
    }
    for each in &measured.faults {
        let place = format!(
            "{} {} {}",
            super::figures::kind_name(each.kind),
            each.mode,
            each.services
        );
        fault(&place, each)?;
    }
    Ok(())
}

/// Does the trace agree with itself? Called on what was read and before anything is written.
pub fn validate_trace(run: &TraceRun) -> Result<(), Invalid> {
    if run.format != TRACE_FORMAT {
        return Err(invalid(
            "format",
            format!("is '{}', not '{TRACE_FORMAT}'", run.format),
        ));
    }
    let summary = &run.summary;
    summary.services.iter().try_for_each(service)?;
    for path in &summary.paths {
        for stage in &path.stages {
            let state = super::figures::state_name(stage.state);
            let place = format!(
                "{}, stage {} {} {state}",
                path.path, stage.hook, stage.stage
            );
            histogram(&place, &stage.histogram)?;
        }
        for (state, h) in &path.node {
            let state = super::figures::state_name(*state);
            histogram(&format!("{}, node {state}", path.path), h)?;
        }
    }
    if summary.timeline.bin_ns == 0 {
        return Err(invalid("timeline", "bin_ns is 0"));
    }
    for (path, bins) in &summary.timeline.paths {
        let place = format!("timeline of {path}");
        if bins.len() > BINS {
            return Err(invalid(&place, format!("has more than {BINS} bins")));
        }
        if let Some(bin) = bins.iter().find(|bin| bin.lost > bin.sent) {
            return Err(invalid(
                &place,
                format!("{} of {} new flows went wrong", bin.lost, bin.sent),
            ));
        }
    }
    let mut times = summary.rule_changes.iter().map(|change| change.time_ns);
    if !times.by_ref().is_sorted() {
        return Err(invalid("rule changes", "are not in the order of time"));
    }
    let kept = &run.journeys;
    if kept.good.max(kept.wrong) > kept.limit {
        return Err(invalid("journeys", "more are kept than may be"));
    }
    Ok(())
}

fn service(service: &ServiceSummary) -> Result<(), Invalid> {
    histogram(&format!("{}, node", service.name), &service.node)?;
    histogram(&format!("{}, answered", service.name), &service.answered)?;
    let ends = sum(service.verdicts.iter().map(|count| count.count));
    if ends > u128::from(service.flows) {
        return Err(invalid(
            &service.name,
            format!("{ends} new flows ended, of {} that began", service.flows),
        ));
    }
    Ok(())
}

fn cell(place: &str, cell: &Cell) -> Result<(), Invalid> {
    if cell.services == 0 || cell.endpoints_per_service == 0 {
        return Err(invalid(place, "no Services, or Services without endpoints"));
    }
    probes(place, &cell.probes)?;
    names(place, cell.paths.iter().map(|path| path.path.as_str()))?;
    cell.paths
        .iter()
        .try_for_each(|path| path_result(&format!("{place}, {}", path.path), path, &cell.probes))
}

/// There is at least one path, and each has a name of its own.
fn names<'a>(place: &str, paths: impl Iterator<Item = &'a str>) -> Result<(), Invalid> {
    let mut known = BTreeSet::new();
    for path in paths {
        if path.is_empty() {
            return Err(invalid(place, "a path has no name"));
        }
        if !known.insert(path) {
            return Err(invalid(
                &format!("{place}, {path}"),
                "this path is there twice",
            ));
        }
    }
    if known.is_empty() {
        return Err(invalid(place, "there are no paths"));
    }
    Ok(())
}

fn path_result(place: &str, path: &PathResult, probes: &ProbeHealth) -> Result<(), Invalid> {
    ledger(place, &path.flows)?;
    for (name, h) in &path.client {
        histogram(&format!("{place}, client {name}"), h)?;
    }
    let mut stages = BTreeSet::new();
    for stage in &path.stages {
        let state = super::figures::state_name(stage.state);
        let place = format!("{place}, stage {} {} {state}", stage.hook, stage.stage);
        if !stages.insert((&stage.hook, &stage.stage, stage.state)) {
            return Err(invalid(&place, "this stage is there twice"));
        }
        histogram(&place, &stage.histogram)?;
        if stage.histogram.count > probes.journeys {
            return Err(invalid(
                &place,
                format!(
                    "its histogram holds {} packets, the probes saw {}",
                    stage.histogram.count, probes.journeys
                ),
            ));
        }
    }
    for (state, h) in &path.node {
        let state = super::figures::state_name(*state);
        histogram(&format!("{place}, node {state}"), h)?;
    }
    // Each flow that was delivered had a first packet, whose time is known unless the probes say
    // that they missed some.
    let first = path.node.get(&PacketState::New).map_or(0, |h| h.count);
    let missed = [probes.unfinished, probes.slot_collisions, probes.unpaired];
    let explained = missed.into_iter().fold(first, u64::saturating_add);
    if path.flows.delivered > explained {
        return Err(invalid(
            place,
            format!(
                "{} flows were delivered, and the node's histogram holds {first} first packets",
                path.flows.delivered
            ),
        ));
    }
    Ok(())
}

fn fault(place: &str, fault: &Fault) -> Result<(), Invalid> {
    if fault.services == 0 {
        return Err(invalid(place, "no Services"));
    }
    if (fault.kind == FaultKind::Switch) != fault.to.is_some() {
        return Err(invalid(
            place,
            "a switch has a mode after it, and nothing else has",
        ));
    }
    if fault.bin_ns == 0 {
        return Err(invalid(place, "bin_ns is 0"));
    }
    if let Some(change) = fault
        .changes
        .iter()
        .find(|change| change.end_ns < change.start_ns)
    {
        return Err(invalid(
            place,
            format!("the rule change '{}' ends before it starts", change.what),
        ));
    }
    probes(place, &fault.probes)?;
    names(place, fault.paths.iter().map(|path| path.path.as_str()))?;
    fault
        .paths
        .iter()
        .try_for_each(|path| fault_path(&format!("{place}, {}", path.path), path))
}

fn fault_path(place: &str, path: &FaultPath) -> Result<(), Invalid> {
    ledger(&format!("{place}, new flows"), &path.new)?;
    ledger(&format!("{place}, established flows"), &path.established)?;
    if let Some(outage) = path
        .outages
        .iter()
        .find(|outage| outage.end_ns.is_some_and(|end| end < outage.start_ns))
    {
        return Err(invalid(
            place,
            format!("the outage at {} ns ends before it starts", outage.start_ns),
        ));
    }
    let all_lost = path.new.lost_count();
    let in_outages = sum(path.outages.iter().map(|outage| outage.lost));
    if in_outages > u128::from(all_lost) {
        return Err(invalid(
            place,
            format!("{in_outages} new flows lost in outages, {all_lost} in all"),
        ));
    }
    if !path.series.is_empty() {
        let sent = sum(path.series.iter().map(|bin| bin.sent));
        let lost = sum(path.series.iter().map(|bin| bin.lost));
        if (sent, lost) != (path.new.sent.into(), all_lost.into()) {
            return Err(invalid(
                place,
                format!(
                    "the series holds {sent} new flows, {lost} lost; the ledger {}, {all_lost} lost",
                    path.new.sent
                ),
            ));
        }
    }
    Ok(())
}

/// A sum that cannot overflow.
fn sum(counts: impl Iterator<Item = u64>) -> u128 {
    counts.map(u128::from).sum()
}

fn invalid(place: &str, problem: impl Into<String>) -> Invalid {
    Invalid {
        place: place.to_owned(),
        problem: problem.into(),
    }
}

fn ledger(place: &str, ledger: &Ledger) -> Result<(), Invalid> {
    if ledger.lost.iter().any(|loss| loss.count == 0) {
        return Err(invalid(place, "a verdict that no flow had"));
    }
    if ledger.is_balanced() {
        return Ok(());
    }
    Err(invalid(
        place,
        format!(
            "ledger not balanced: {} sent, but {} delivered + {} lost",
            ledger.sent,
            ledger.delivered,
            ledger.lost_count()
        ),
    ))
}

fn histogram(place: &str, histogram: &Histogram) -> Result<(), Invalid> {
    let mut next = 0_u64;
    let mut first = true;
    let (mut count, mut lowest) = (0_u128, 0_u128);
    for &[low, high, n] in &histogram.buckets {
        if low > high || n == 0 {
            return Err(invalid(
                place,
                format!("histogram bucket [{low}, {high}, {n}] is upside down or empty"),
            ));
        }
        if !first && low < next {
            return Err(invalid(
                place,
                format!(
                    "histogram bucket [{low}, {high}, {n}] is out of order or overlaps the one before"
                ),
            ));
        }
        first = false;
        next = high.saturating_add(1);
        count += u128::from(n);
        lowest += u128::from(low) * u128::from(n);
    }
    if count != u128::from(histogram.count) {
        return Err(invalid(
            place,
            format!(
                "histogram's buckets hold {count} values, its count is {}",
                histogram.count
            ),
        ));
    }
    if u128::from(histogram.sum_ns) < lowest {
        return Err(invalid(
            place,
            format!(
                "histogram's sum {} is less than its buckets' lowest values add up to ({lowest})",
                histogram.sum_ns
            ),
        ));
    }
    Ok(())
}

/// Every journey that began must have an end or be counted as given up, and no record be lost.
fn probes(place: &str, probes: &ProbeHealth) -> Result<(), Invalid> {
    if probes.ring_lost > 0 {
        return Err(invalid(
            place,
            format!(
                "{} of the probes' records are lost: what became of flows is not known",
                probes.ring_lost
            ),
        ));
    }
    let missing = unaccounted(probes);
    if missing == 0 {
        return Ok(());
    }
    Err(invalid(
        place,
        format!(
            "uncounted loss: {missing} of {} journeys have no end and are not counted as unfinished",
            probes.journeys
        ),
    ))
}

/// Journeys that began and are in no other count.
pub const fn unaccounted(probes: &ProbeHealth) -> u64 {
    let ended = probes
        .transmitted
        .saturating_add(probes.delivered_locally)
        .saturating_add(probes.dropped)
        .saturating_add(probes.unfinished)
        .saturating_add(probes.slot_collisions);
    probes.journeys.saturating_sub(ended)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::record::run::{Loss, Outage, Verdict};
    use crate::report::{json, sample};

    fn text() -> String {
        String::from_utf8(json::to_bytes(&sample::run()).expect("serialize")).expect("UTF-8")
    }

    fn refused(text: &str) -> (u8, String) {
        let error = parse(Path::new("some/run.json"), text).expect_err("must be refused");
        let message = error.to_string();
        assert!(
            message.starts_with("some/run.json: "),
            "names the file: {message}"
        );
        assert!(!message.contains('\n'), "one line: {message}");
        (error.exit_code(), message)
    }

    fn contradiction(breaking: impl FnOnce(&mut Run)) -> String {
        let mut run = sample::run();
        breaking(&mut run);
        let message = validate(&run).expect_err("must be refused").to_string();
        let (code, whole) =
            refused(&String::from_utf8(json::to_bytes(&run).expect("serialize")).expect("UTF-8"));
        assert_eq!(code, 5);
        assert_eq!(whole, format!("some/run.json: run invalid: {message}"));
        message
    }

    #[test]
    fn the_sample_is_valid() {
        assert_eq!(
            parse(Path::new("run.json"), &text()).expect("valid"),
            sample::run()
        );
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read("/nonexistent/run.json").expect_err("not there");
        assert_eq!(error.exit_code(), 1);
        insta::assert_snapshot!(error, @"cannot read /nonexistent/run.json: No such file or directory (os error 2)");
    }

    #[test]
    fn not_json() {
        insta::assert_snapshot!(refused("{\"format\": oops}").1, @"some/run.json: not JSON: expected value at line 1, column 12; was it written to the end?");
        let half = &text()[..2000];
        let (code, message) = refused(half);
        assert_eq!(code, 5);
        assert!(message.contains("not JSON: EOF while parsing"), "{message}");
    }

    #[test]
    fn another_version() {
        let (code, message) = refused(&text().replacen(FORMAT, "svcpath.run/2", 1));
        assert_eq!(code, 5);
        insta::assert_snapshot!(message, @"some/run.json: format is 'svcpath.run/2', this svcpath reads 'svcpath.run/1': use the svcpath that wrote it, or measure again");
        // A later version may have fields that this one does not know.
        let (_, message) = refused("{\"format\": \"svcpath.run/9\", \"new\": 1}");
        assert!(message.contains("svcpath.run/9"), "{message}");
    }

    #[test]
    fn an_unknown_field() {
        let (code, message) = refused(&text().replacen("\"seed\"", "\"sede\"", 1));
        assert_eq!(code, 5);
        assert!(
            message.starts_with("some/run.json: not a run: unknown field `sede`"),
            "{message}"
        );
        let (_, message) = refused("[]");
        assert!(message.contains("not a run"), "{message}");
    }

    #[test]
    fn an_unbalanced_ledger() {
        insta::assert_snapshot!(contradiction(|run| run.measurements.cells[0].paths[0].flows.sent += 1),
            @"iptables-legacy 100, pod-to-clusterip: ledger not balanced: 1001 sent, but 1000 delivered + 0 lost");
        let message =
            contradiction(|run| run.measurements.faults[1].paths[0].established.delivered += 7);
        assert!(
            message.contains("established flows: ledger not balanced"),
            "{message}"
        );
    }

    #[test]
    fn histograms_that_do_not_add_up() {
        let stage = |run: &mut Run, breaking: fn(&mut Histogram)| {
            breaking(&mut run.measurements.cells[0].paths[0].stages[0].histogram);
        };
        let message = contradiction(|run| stage(run, |h| h.count += 1));
        assert!(
            message.starts_with("iptables-legacy 100, pod-to-clusterip, stage "),
            "{message}"
        );
        assert!(message.contains("values, its count is"), "{message}");
        let message = contradiction(|run| stage(run, |h| h.buckets.reverse()));
        assert!(message.contains("out of order"), "{message}");
        let message = contradiction(|run| stage(run, |h| h.buckets[0].swap(0, 1)));
        assert!(
            message.contains("upside down") || message.contains("overlaps"),
            "{message}"
        );
        let message = contradiction(|run| stage(run, |h| h.sum_ns = 0));
        assert!(message.contains("sum 0 is less"), "{message}");
    }

    #[test]
    fn twice_the_same() {
        let message = contradiction(|run| {
            let cell = run.measurements.cells[0].clone();
            run.measurements.cells.push(cell);
        });
        assert_eq!(
            message,
            "iptables-legacy 100: there is more than one cell of this mode and size"
        );
        let message = contradiction(|run| {
            let path = run.measurements.cells[0].paths[0].clone();
            run.measurements.cells[0].paths.push(path);
        });
        assert!(message.ends_with("this path is there twice"), "{message}");
        let message = contradiction(|run| {
            let stage = run.measurements.cells[0].paths[0].stages[0].clone();
            run.measurements.cells[0].paths[0].stages.push(stage);
        });
        assert!(message.ends_with("this stage is there twice"), "{message}");
    }

    #[test]
    fn faults_that_cannot_be() {
        let fault = |run: &Run, kind| {
            run.measurements
                .faults
                .iter()
                .position(|f| f.kind == kind)
                .expect("in the sample")
        };
        let message = contradiction(|run| {
            let i = fault(run, FaultKind::Switch);
            run.measurements.faults[i].to = None;
        });
        assert!(
            message.contains("a switch has a mode after it"),
            "{message}"
        );
        let message = contradiction(|run| run.measurements.faults[0].bin_ns = 0);
        assert!(message.contains("bin_ns is 0"), "{message}");
        let message = contradiction(|run| {
            let i = fault(run, FaultKind::Flush);
            run.measurements.faults[i].changes[0].end_ns = 0;
        });
        assert!(message.contains("ends before it starts"), "{message}");
        let message = contradiction(|run| {
            run.measurements.faults[0].paths[0].outages.push(Outage {
                start_ns: 9,
                end_ns: Some(3),
                lost: 0,
            });
        });
        assert!(
            message.contains("the outage at 9 ns ends before it starts"),
            "{message}"
        );
        let message = contradiction(|run| run.measurements.faults[0].paths[0].series[0].sent += 1);
        assert!(message.contains("the series holds"), "{message}");
    }

    #[test]
    fn uncounted_loss() {
        let message = contradiction(|run| run.measurements.cells[0].probes.journeys += 3);
        assert!(
            message.starts_with("iptables-legacy 100: uncounted loss: 3 of "),
            "{message}"
        );
    }

    #[test]
    fn runs_that_mean_nothing() {
        type Breaking = fn(&mut Run);
        let cases: [(Breaking, &str); 11] = [
            (
                |run| {
                    run.measurements.cells.clear();
                    run.measurements.faults.clear();
                },
                "measurements: nothing was measured",
            ),
            (
                |run| run.measurements.cells[0].services = 0,
                "iptables-legacy 0: no Services",
            ),
            (
                |run| run.measurements.cells[0].endpoints_per_service = 0,
                "without endpoints",
            ),
            (|run| run.measurements.faults[0].services = 0, "no Services"),
            (
                |run| run.measurements.cells[0].paths.clear(),
                "there are no paths",
            ),
            (
                |run| run.measurements.faults[0].paths.clear(),
                "there are no paths",
            ),
            (
                |run| run.measurements.cells[0].paths[0].path.clear(),
                "a path has no name",
            ),
            (
                |run| run.measurements.cells[0].probes.ring_lost = 5,
                "5 of the probes' records are lost",
            ),
            (
                |run| {
                    let path = &mut run.measurements.cells[0].paths[0];
                    path.node.remove(&PacketState::New);
                },
                "1000 flows were delivered, and the node's histogram holds 0 first packets",
            ),
            (
                |run| {
                    let cell = &mut run.measurements.cells[0];
                    cell.probes = ProbeHealth::default();
                },
                "packets, the probes saw 0",
            ),
            (
                |run| {
                    let path = &mut run.measurements.faults[0].paths[0];
                    path.new.lost.push(Loss {
                        verdict: Verdict::Leaked,
                        reason: None,
                        stage: None,
                        count: 0,
                    });
                },
                "a verdict that no flow had",
            ),
        ];
        for (breaking, words) in cases {
            let message = contradiction(breaking);
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn outages_lose_no_more_than_all() {
        let message = contradiction(|run| {
            run.measurements.faults[0].paths[0].outages.push(Outage {
                start_ns: 3,
                end_ns: None,
                lost: u64::MAX,
            });
        });
        assert!(
            message.contains("new flows lost in outages, 0 in all"),
            "{message}"
        );
    }

    #[test]
    fn sums_that_overflow_are_contradictions() {
        let message = contradiction(|run| {
            let flows = &mut run.measurements.cells[0].paths[0].flows;
            flows.delivered = u64::MAX;
        });
        assert!(message.contains("not balanced"), "{message}");
        let message = contradiction(|run| {
            for path in &mut run.measurements.faults[0].paths {
                path.series[0].sent = u64::MAX;
                path.series[1].sent = u64::MAX;
            }
        });
        assert!(message.contains("the series holds"), "{message}");
    }

    fn trace_text() -> String {
        serde_json::to_string(&sample::trace().run).expect("serialize")
    }

    fn trace_contradiction(breaking: impl FnOnce(&mut TraceRun)) -> String {
        let mut run = sample::trace().run;
        breaking(&mut run);
        let text = serde_json::to_string(&run).expect("serialize");
        let error = trace(Path::new("some/trace.json"), &text).expect_err("must be refused");
        assert_eq!(error.exit_code(), 5);
        let message = error.to_string();
        assert!(
            message.starts_with("some/trace.json: run invalid: ") && !message.contains('\n'),
            "{message}"
        );
        message
    }

    #[test]
    fn the_sample_trace_is_read_as_it_was_written() {
        let read = trace(Path::new("trace.json"), &trace_text()).expect("valid");
        assert_eq!(read, sample::trace().run);
    }

    #[test]
    fn traces_that_contradict_themselves() {
        type Breaking = fn(&mut TraceRun);
        let cases: [(Breaking, &str); 7] = [
            (
                |run| run.summary.services[0].flows = 1,
                "new flows ended, of 1 that began",
            ),
            (
                |run| run.summary.services[0].node.count += 1,
                "values, its count is",
            ),
            (
                |run| run.summary.paths[0].stages[0].histogram.sum_ns = 0,
                "stage",
            ),
            (|run| run.summary.timeline.bin_ns = 0, "bin_ns is 0"),
            (
                |run| {
                    let bins = run.summary.timeline.paths.values_mut().next();
                    bins.expect("a path")[0].lost = u64::MAX;
                },
                "new flows went wrong",
            ),
            (|run| run.summary.rule_changes.reverse(), "order of time"),
            (|run| run.journeys.limit = 0, "more are kept than may be"),
        ];
        for (breaking, words) in cases {
            let message = trace_contradiction(breaking);
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn either_kind_is_found_in_its_folder() {
        let dir = tempfile::tempdir().expect("a folder");
        let error = recorded(dir.path()).expect_err("empty");
        assert_eq!(error.exit_code(), 1);
        assert!(
            error
                .to_string()
                .contains("neither run.json nor trace.json"),
            "{error}"
        );

        fs::write(dir.path().join(JOURNEYS_FILE), "").expect("written");
        let error = recorded(dir.path()).expect_err("a session was killed");
        assert_eq!(error.exit_code(), 1);
        let said = error.to_string();
        assert!(said.contains("without trace.json"), "{said}");
        assert!(said.contains("has its journeys"), "{said}");
        fs::remove_file(dir.path().join(JOURNEYS_FILE)).expect("removed");

        let file = dir.path().join(TRACE_FILE);
        fs::write(&file, trace_text()).expect("written");
        let Recorded::Trace(read) = recorded(dir.path()).expect("valid") else {
            panic!("a trace was written");
        };
        assert_eq!((&read.run, &read.wrong), (&sample::trace().run, &None));

        fs::write(
            &file,
            trace_text().replacen(TRACE_FORMAT, "svcpath.trace/9", 1),
        )
        .expect("written");
        let error = recorded(&file).expect_err("another version").to_string();
        assert!(
            error.contains(
                "'svcpath.trace/9', this svcpath reads 'svcpath.run/1' and 'svcpath.trace/1'"
            ),
            "{error}"
        );
        fs::write(&file, text()).expect("written");
        let read = recorded(&file).expect("the name does not matter");
        assert_eq!(read, Recorded::Comparison(Box::new(sample::run())));
    }

    /// What reading journeys says of these bytes, of which so many lines should be good.
    fn beside(bytes: &[u8], good: u64, failure: Option<&str>) -> Result<usize, String> {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join(JOURNEYS_FILE);
        fs::write(&file, bytes).expect("written");
        let kept = Kept {
            limit: 10,
            good,
            failure: failure.map(str::to_owned),
            ..Kept::default()
        };
        journeys(&file, &kept)
            .map(|wrong| wrong.len())
            .map_err(|error| {
                assert_eq!(error.exit_code(), 5);
                error.to_string()
            })
    }

    #[test]
    fn damaged_journeys_are_told_with_their_line() {
        let line =
            serde_json::to_string(&crate::trace::journey::Journey::sample()).expect("JSON") + "\n";
        let leaked = line.replace("sent", "leaked");
        let two = format!("{line}{leaked}");
        assert_eq!(beside(two.as_bytes(), 2, None), Ok(1));
        assert_eq!(beside(b"", 0, None), Ok(0));
        let refused = |bytes: &[u8], good, failure| {
            beside(bytes, good, failure).expect_err("must be refused")
        };
        let cut = &two.as_bytes()[..two.len() - 9];
        assert!(refused(cut, 2, None).contains("a line is cut off or too long at line 2"));
        assert!(refused(two.as_bytes(), 1, None).contains("holds 2 journeys, trace.json says 1"));
        assert!(refused(two.as_bytes(), 3, None).contains("holds 2 journeys, trace.json says 3"));
        assert_eq!(beside(cut, 1, Some("disk full")), Ok(0));
        assert!(refused(cut, 2, Some("disk full")).contains("line 2"));
        let odd = two.replace("leaked", "evaporated");
        assert!(refused(odd.as_bytes(), 2, None).contains("evaporated"));
        let command = two.replace("shop/web", "\\u001b[2J");
        let message = refused(command.as_bytes(), 2, None);
        assert!(
            message.contains("control characters") && !message.contains('\u{1b}'),
            "{message}"
        );
        assert!(refused(&[0xff, b'\n'], 1, None).contains("line 1"));
        let endless = vec![b' '; 2 * usize::try_from(LONGEST_LINE).expect("small")];
        assert!(refused(&endless, 1, None).contains("too long"));
    }

    proptest! {
        #[test]
        fn no_damage_makes_reading_panic(
            place in 0_usize..8192,
            length in 0_usize..64,
            bytes in proptest::collection::vec(any::<u8>(), 0..16),
        ) {
            let mut damaged = trace_text().into_bytes();
            let place = place * damaged.len() / 8192;
            let end = damaged.len().min(place + length);
            damaged.splice(place..end, bytes);
            if let Ok(text) = String::from_utf8(damaged)
                && format(Path::new("trace.json"), &text).is_ok()
                && let Ok(run) = trace(Path::new("trace.json"), &text)
            {
                // What was not noticed must still be shown.
                let trace = Trace { run, wrong: None };
                let shown = Recorded::Trace(Box::new(trace));
                prop_assert!(!shown.blocks().is_empty());
                prop_assert!(shown.html().ends_with("</html>\n"));
            }
        }
    }

    #[test]
    fn strings_that_would_command_a_terminal() {
        for (from, to) in [
            ("\"pod-to-clusterip\"", r#""\u001b[2Jpod""#),
            ("\"hooks\"", "\"hooks\u{9b}2J\""),
            (FORMAT, r"\u0007"),
            ("\"seed\"", r#""\u001bseed""#),
            ("\"notes\"", "\"note\u{7f}s\""),
        ] {
            let (code, message) = refused(&text().replacen(from, to, 1));
            assert_eq!(code, 5);
            assert!(
                message.contains("a string has control characters"),
                "{message}"
            );
            assert!(!message.contains(char::is_control), "{message:?}");
        }
    }

    #[test]
    fn only_what_has_an_end_is_read() {
        for (file, words) in [
            ("/dev/zero", "neither a file nor a pipe"),
            ("/tmp", "neither a file nor a pipe"),
        ] {
            let error = bytes(Path::new(file), 10).expect_err("refused");
            assert_eq!(error.exit_code(), 5);
            assert!(error.to_string().contains(words), "{error}");
        }
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("run.json");
        fs::write(&file, "0123456789").expect("written");
        assert_eq!(bytes(&file, 10).expect("it fits").len(), 10);
        let error = bytes(&file, 9).expect_err("too large");
        assert_eq!(error.exit_code(), 5);
        assert!(error.to_string().contains("larger than"), "{error}");
    }

    #[test]
    fn the_schemas_are_current() {
        is_current(&schemars::schema_for!(Run), "run.schema.json");
        is_current(&schemars::schema_for!(TraceRun), "trace.schema.json");
    }

    fn is_current(schema: &schemars::Schema, name: &str) {
        let generated = serde_json::to_string_pretty(schema).expect("serialize") + "\n";
        let file = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("schema")
            .join(name);
        if std::env::var_os("SVCPATH_UPDATE_SCHEMA").is_some() {
            fs::write(&file, &generated).expect("write the schema");
        }
        let kept = fs::read_to_string(&file).expect("the schema is kept in the repository");
        assert!(
            kept == generated,
            "tracer/schema/{name} is stale: run the tests once with SVCPATH_UPDATE_SCHEMA=1"
        );
    }
}
