//! A trace as one self-contained HTML page, made of the same parts as that of a comparison.

use std::fmt::Write as _;

use super::method;
use super::sheet::Sheet;
use crate::record::run::{Histogram, PacketState, StageHistogram};
use crate::report::blocks::Table;
use crate::report::plot::bars::{Bar, BarPlot};
use crate::report::plot::escape;
use crate::report::plot::timeline::{Change, Row, Timeline};
use crate::report::quantile::{merge, quantile};
use crate::report::trace::{self, Trace};
use crate::report::{figures, units};
use crate::rules::Mode;
use crate::trace::run::TraceRun;
use crate::trace::summary::{PathSummary, Summary};

/// Rows of a table of Services, changes or journeys.
const MOST: usize = 1000;

/// The whole page.
pub fn render(trace: &Trace) -> String {
    let mut page = Page {
        sheet: Sheet::new("svcpath: where Service packets went on a node"),
        trace,
        run: &trace.run,
        summary: &trace.run.summary,
        mode: trace::mode(&trace.run.summary),
    };
    page.head();
    page.services();
    page.stages();
    page.timeline();
    page.journeys();
    page.health();
    page.method();
    page.environment();
    page.sheet.finish()
}

struct Page<'a> {
    sheet: Sheet,
    trace: &'a Trace,
    run: &'a TraceRun,
    summary: &'a Summary,
    mode: Option<Mode>,
}

impl Page<'_> {
    fn cost(&self, ns: f64) -> String {
        units::cost(self.summary.clock, ns)
    }

    fn head(&mut self) {
        let environment = &self.run.environment;
        let what = format!("{} · ", environment.host);
        self.sheet.origin(
            &what,
            &[
                &environment.started,
                &format!("{} long", units::time_u64(self.summary.duration_ns)),
                figures::clock_words(self.summary.clock),
                &format!("kernel {}", environment.kernel),
            ],
        );
        self.sheet.answer(
            &sentences(self.summary),
            "No new flow to a Service was seen.",
        );
        self.sheet.alarms(&trace::alarms(self.summary));
    }

    fn services(&mut self) {
        if self.summary.services.is_empty() {
            return;
        }
        self.sheet.heading(
            "services",
            "Which Services had new flows, and how did they end?",
        );
        self.sheet.paragraph("A flow counts when its first packet has passed the node. Repeated are first packets that were sent once more because nobody had answered. What went wrong is told below the table, with what to look at.");
        self.sheet.table(&trace::services(self.summary, MOST));
        for (_, line) in trace::troubles(self.summary, MOST) {
            self.sheet.paragraph(&line);
        }
    }

    /// Stacked bars of stages, a bar a path.
    fn stages(&mut self) {
        if self.summary.paths.is_empty() {
            return;
        }
        self.sheet
            .heading("stages", "Where does one packet’s time go?");
        self.sheet.paragraph("Mean of each stage over all packets of the path, so that the parts add up to the mean of the whole node. What the rules do for Services comes first.");
        let mut legend = true;
        for (state, words) in [
            (PacketState::New, "First packet of a flow"),
            (PacketState::Established, "Later packet of a flow"),
            (PacketState::Reply, "Reply"),
        ] {
            let paths = self.summary.paths.iter();
            let bars: Vec<Bar> = paths.filter_map(|path| self.bar(path, state)).collect();
            if bars.is_empty() {
                continue;
            }
            let said: Vec<String> = bars
                .iter()
                .map(|bar| format!("{} {}", bar.label, bar.total))
                .collect();
            let drawn = BarPlot {
                id: format!("stages-{}", figures::state_name(state)),
                title: format!("{words}: time in each stage"),
                desc: format!("One bar a path: {}.", units::list(&said)),
                heading: words.to_owned(),
                legend,
                label: units::axis(self.summary.clock).to_owned(),
                bars,
            };
            legend = false;
            let clock = self.summary.clock;
            self.sheet
                .figure(&|width| drawn.draw(width, &|value| units::tick(clock, value)));
            let paths = self.summary.paths.iter();
            let tables: Vec<Table> = paths
                .filter_map(|path| trace::stages(clock, path, state))
                .collect();
            self.sheet.folded(&tables);
        }
    }

    /// A path's bar: stages of one name together, whatever the hook.
    fn bar(&self, path: &PathSummary, state: PacketState) -> Option<Bar> {
        let of_state = |stage: &&StageHistogram| stage.state == state && stage.histogram.count > 0;
        let packets = path.node.get(&state).map(|node| node.count);
        let stages = path.stages.iter().filter(of_state).map(|stage| {
            // Some packets skip a stage: its share is of all packets.
            let all = packets.unwrap_or(stage.histogram.count).max(1);
            let value = stage.histogram.sum_ns as f64 / all as f64;
            (stage.stage.as_str(), value)
        });
        Bar::of_stages(self.mode, &path.path, stages, |value| self.cost(value))
    }

    /// New flows and what went wrong against rule changes.
    fn timeline(&mut self) {
        let series = &self.summary.timeline;
        if series.paths.is_empty() && self.summary.rule_changes.is_empty() {
            return;
        }
        self.sheet.heading("time", "What happened when?");
        self.sheet.paragraph("New flows by the time at which their first packet came; those that went wrong stand out. Rule changes are numbered as in the list below the plot; they are marked when they were heard of, which is just after they took effect.");
        let drawn = Timeline {
            id: "time".to_owned(),
            title: "New flows over time".to_owned(),
            desc: format!(
                "{}; {}.",
                trace::outcome(self.summary),
                units::plural(self.summary.changes(), "rule change", "rule changes")
            ),
            mode: self.mode,
            duration_ns: self.summary.duration_ns,
            bin_ns: series.bin_ns,
            lost: "went wrong",
            origin: "the start of the trace",
            rows: series
                .paths
                .iter()
                .map(|(path, bins)| Row {
                    title: path.clone(),
                    series: bins,
                    outages: &[],
                })
                .collect(),
            changes: self
                .summary
                .rule_changes
                .iter()
                .take(MOST)
                .map(|change| Change {
                    start_ns: self.summary.since(change.time_ns),
                    end_ns: self.summary.since(change.time_ns),
                    hint: change.to_string(),
                })
                .collect(),
        };
        self.sheet.figure(&|width| drawn.draw(width));
        if self.summary.rule_changes.is_empty() {
            return;
        }
        let shown = self.summary.rule_changes.len().min(MOST) as u64;
        let more = self.summary.changes().saturating_sub(shown);
        self.sheet.out.push_str("<ol class=\"changes\">");
        for change in self.summary.rule_changes.iter().take(MOST) {
            let _ = write!(
                self.sheet.out,
                "<li>at {}: {}</li>",
                escape(&trace::since(self.summary, change.time_ns)),
                escape(&change.to_string())
            );
        }
        self.sheet.out.push_str("</ol>\n");
        if more > 0 {
            let more = units::plural(more, "later one is", "later ones are");
            self.sheet.paragraph(&format!("{more} not listed."));
        }
        self.sheet.folded(&[trace::periods(self.summary, MOST)]);
    }

    fn journeys(&mut self) {
        let Some(wrong) = self.trace.wrong.as_ref().filter(|wrong| !wrong.is_empty()) else {
            return;
        };
        self.sheet
            .heading("journeys", "Which journeys ended badly, and how?");
        self.sheet.table(&trace::journeys(self.run, wrong, MOST));
    }

    fn health(&mut self) {
        let probes = &self.summary.probes;
        self.sheet.heading(
            "probes",
            "Did the probes see everything, and what did they cost?",
        );
        let missed = probes
            .ring_lost
            .saturating_add(probes.slot_collisions)
            .saturating_add(probes.unpaired);
        let journeys = units::count(probes.journeys);
        self.sheet.paragraph(&if missed == 0 {
            format!(
                "Yes: {journeys} journeys, no record lost, nothing unpaired; {} under way or waiting when last seen.",
                units::count(probes.unfinished)
            )
        } else {
            format!(
                "Not quite: of {journeys} journeys, {} events were missed.",
                units::count(missed)
            )
        });
        let cost = trace::cost(probes).unwrap_or_else(|| {
            "What the probes cost was not asked for: svcpath trace --cost has the kernel account for it.".to_owned()
        });
        self.sheet.paragraph(&cost);
        let rows = [
            ("journeys", probes.journeys),
            ("left by a device", probes.transmitted),
            ("reached a socket", probes.delivered_locally),
            ("dropped", probes.dropped),
            (
                "dropped at the socket they reached",
                probes.dropped_at_socket,
            ),
            ("freed with their socket", probes.freed_with_socket),
            (
                "freed at their socket, read or dropped: unknown",
                probes.freed_at_socket,
            ),
            ("unfinished", probes.unfinished),
            ("records lost", probes.ring_lost),
            ("slot collisions", probes.slot_collisions),
            ("unpaired", probes.unpaired),
            ("other packets", probes.other_packets),
            (
                "records of packets to an endpoint itself",
                probes.to_endpoints,
            ),
        ];
        self.sheet.folded(&[Table {
            title: "Journeys and what became of them".to_owned(),
            header: ["what", "how often"].map(str::to_owned).to_vec(),
            rows: rows
                .map(|(what, count)| vec![what.to_owned(), units::count(count)])
                .to_vec(),
        }]);
    }

    fn method(&mut self) {
        self.sheet.heading("method", "How it was measured");
        self.sheet.definitions(&[
            ("clock", method::clock(self.summary.clock).to_owned()),
            ("probe tier", method::tier(&self.summary.tier)),
            ("Services", "as the node’s own rules name them, read at the begin and again after every change.".to_owned()),
            ("stage", method::STAGE.to_owned()),
            ("whole node", method::NODE.to_owned()),
            ("new, established", method::STATES.to_owned()),
            ("median, p99", method::QUANTILES.to_owned()),
            ("not seen", method::not_seen(&self.summary.tier).to_owned()),
        ]);
        let seen = self.summary.paths.iter().flat_map(|path| &path.stages);
        let stages = method::stages(seen);
        if !stages.is_empty() {
            self.sheet.subheading("What each stage holds");
            self.sheet.definitions(&stages);
        }
    }

    fn environment(&mut self) {
        let e = &self.run.environment;
        self.sheet.heading("environment", "Where it was measured");
        let tools: Vec<String> = e
            .tools
            .iter()
            .map(|(name, version)| format!("{name} {version}"))
            .collect();
        let mut rows = vec![
            ("node", e.host.clone()),
            (
                "namespace",
                e.namespace
                    .clone()
                    .unwrap_or_else(|| "that of the command".to_owned()),
            ),
            ("kernel", e.kernel.clone()),
            ("CPUs", e.cpus.to_string()),
            ("started", e.started.clone()),
            ("took", units::time_u64(self.summary.duration_ns)),
            ("svcpath", e.version.clone()),
            ("eBPF object", e.ebpf.clone()),
            ("netfilter links", e.links.to_string()),
            ("tools", tools.join(", ")),
            ("command", e.command.join(" ")),
            (
                "journeys",
                trace::kept(&self.run.journeys, self.trace.wrong.is_some()),
            ),
        ];
        rows.extend(e.notes.iter().map(|note| ("note", note.clone())));
        self.sheet.definitions(&rows);
    }
}

/// What a reader who reads no further should know.
fn sentences(summary: &Summary) -> Vec<String> {
    if summary.flows() == 0 {
        return Vec::new();
    }
    let mut sentences = vec![format!("{}.", trace::headline(summary))];
    let nodes = summary
        .paths
        .iter()
        .filter_map(|path| path.node.get(&PacketState::New));
    let all: Histogram = merge(nodes);
    if let (Some(half), Some(tail)) = (quantile(&all, 0.5), quantile(&all, 0.99)) {
        let most =
            most_of_it(summary).map(|stage| format!(" Most of it, on average, went into {stage}."));
        sentences.push(format!(
            "A flow’s first packet took {} on this node, one in a hundred more than {} ({}).{}",
            units::cost_u64(summary.clock, half),
            units::cost_u64(summary.clock, tail),
            units::noun(summary.clock),
            most.unwrap_or_default()
        ));
    }
    let changes = summary.changes();
    if changes > 0 {
        sentences.push(format!(
            "Rules were changed {} meanwhile.",
            units::plural(changes, "time", "times")
        ));
    }
    sentences
}

/// The stage in which first packets spent most time, over all paths.
fn most_of_it(summary: &Summary) -> Option<String> {
    let stages = summary.paths.iter().flat_map(|path| &path.stages);
    let mut sums = std::collections::BTreeMap::<String, u64>::new();
    for stage in stages.filter(|stage| stage.state == PacketState::New) {
        let sum = sums
            .entry(format!("{} {}", stage.hook, stage.stage))
            .or_default();
        *sum = sum.saturating_add(stage.histogram.sum_ns);
    }
    let (name, _) = sums.into_iter().max_by_key(|(_, sum)| *sum)?;
    Some(name)
}
