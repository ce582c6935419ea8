//! A run as one self-contained HTML page: no script, no network, no other file.
//!
//! The answer first, then one plot a question with its table folded away, then how it was measured
//! and where.

mod method;
mod sheet;
pub mod trace;

use std::fmt::Write as _;

use self::sheet::Sheet;
use super::blocks::{self, MISSING, Table, services};
use super::plot::bars::{Bar, BarPlot};
use super::plot::dots::{DotPlot, Group, Pair};
use super::plot::lines::{Axis, LinePlot, Series};
use super::plot::{escape, linear_ticks, log_ticks, timeline};
use super::quantile::{mean, quantile};
use super::{answer, figures, units};
use crate::record::run::{
    Cell, Clock, Fault, FaultKind, Histogram, PacketState, Place, ProbeHealth, Run, StageHistogram,
};

/// The whole page.
pub fn render(run: &Run) -> String {
    let mut page = Page {
        sheet: Sheet::new("svcpath: what Services cost on a node"),
        run,
        clock: run.measurements.clock,
    };
    page.head();
    page.growth();
    page.spread();
    page.stages();
    page.whole_node();
    page.faults();
    page.rules();
    page.method();
    page.health();
    page.environment();
    page.sheet.finish()
}

struct Page<'a> {
    sheet: Sheet,
    run: &'a Run,
    clock: Clock,
}

impl Page<'_> {
    fn cost(&self, ns: f64) -> String {
        units::cost(self.clock, ns)
    }

    fn cost_at(&self, histogram: Option<&Histogram>, q: f64) -> String {
        histogram
            .and_then(|h| quantile(h, q))
            .map_or_else(|| MISSING.to_owned(), |ns| units::cost_u64(self.clock, ns))
    }

    /// `(instructions)` after what a table or axis shows; times carry their unit.
    fn unit(&self) -> &'static str {
        match self.clock {
            Clock::Virtual => " (instructions)",
            Clock::Wall => "",
        }
    }

    /// What stands on an axis of cost.
    fn axis(&self, what: &str) -> String {
        match self.clock {
            Clock::Virtual => format!("{what}, guest instructions"),
            Clock::Wall => format!("{what}, wall-clock time"),
        }
    }

    fn ticks(&self, values: Vec<f64>) -> Vec<(f64, String)> {
        values
            .into_iter()
            .map(|value| (value, units::tick(self.clock, value)))
            .collect()
    }

    /// The number of Services at which modes are compared, in words.
    fn at_size(&self) -> String {
        figures::common_size(self.run).map_or_else(
            || "each mode at its largest number of Services".to_owned(),
            services,
        )
    }

    fn head(&mut self) {
        let run = self.run;
        let modes: Vec<String> = figures::modes(run)
            .iter()
            .map(|mode| mode.name().to_owned())
            .collect();
        let sizes: Vec<String> = figures::sizes(run)
            .iter()
            .map(|size| units::count((*size).into()))
            .collect();
        let measured = if modes.is_empty() {
            String::new()
        } else {
            format!(
                "{} at {} Services · ",
                units::list(&modes),
                units::list(&sizes)
            )
        };
        self.sheet.origin(
            &measured,
            &[
                &run.environment.started,
                figures::clock_words(self.clock),
                &format!("kernel {}", run.environment.kernel),
            ],
        );
        self.sheet
            .answer(&answer::sentences(run), "This run holds no measurements.");
        let caution = match self.clock {
            Clock::Virtual => {
                "Costs are counts of guest instructions: exact and repeatable, but blind to caches, branch prediction and contention between CPUs. They compare modes; they are not latencies of real hardware."
            }
            Clock::Wall => {
                "Costs are wall-clock times of this machine and this run: differences smaller than those between repeated runs are no findings."
            }
        };
        self.sheet.note(caution);
        self.sheet.alarms(&blocks::alarms(run));
    }

    /// Cost against number of Services.
    fn growth(&mut self) {
        let Some(path) = figures::main_path(self.run) else {
            return;
        };
        let title = figures::path_title(path);
        self.sheet.heading(
            "growth",
            "How does the cost grow with the number of Services?",
        );
        self.sheet.subheading(&format!(
            "First packet of a flow, {title}: the translating stage"
        ));
        self.sheet.paragraph("The stage that turns the Service’s address into an endpoint’s: dnat, in ipvs mode its own stage. A straight line that rises pays for every further Service; a level one does not. Lines are medians, shades reach from p1 to p99.");
        let first = self.growth_plot(
            "growth-new",
            &title,
            "first packet, translating stage",
            true,
            &|cell| figures::translated(cell, path, PacketState::New),
        );
        self.sheet.figure(&|width| first.draw(width));
        let mut tables = vec![blocks::first_packets(self.run, path)];
        for other in figures::paths(self.run)
            .into_iter()
            .filter(|id| *id != path)
        {
            tables.push(blocks::first_packets(self.run, other));
        }
        self.sheet.folded(&tables);

        self.sheet
            .subheading(&format!("Later packets of a flow, {title}: the whole node"));
        self.sheet.paragraph("Later packets are translated from what conntrack, or IPVS, remembers of the flow. As far as that spares them the rules, the lines are level.");
        let later = self.growth_plot(
            "growth-established",
            &title,
            "later packet, whole node",
            false,
            &|cell| figures::node(cell, path, PacketState::Established),
        );
        self.sheet.figure(&|width| later.draw(width));
        let tables: Vec<Table> = figures::paths(self.run)
            .into_iter()
            .map(|id| {
                self.by_size(
                    &format!("Later packet, {}, whole node, p50", figures::path_title(id)),
                    &|cell| self.cost_at(figures::node(cell, id, PacketState::Established), 0.5),
                )
            })
            .collect();
        self.sheet.folded(&tables);
    }

    /// A table of modes by number of Services.
    fn by_size(&self, title: &str, figure: &dyn Fn(&Cell) -> String) -> Table {
        let sizes = figures::sizes(self.run);
        let mut header = vec!["mode".to_owned()];
        header.extend(sizes.iter().map(|size| services(*size)));
        let rows = figures::modes(self.run)
            .into_iter()
            .map(|mode| {
                let mut row = vec![mode.name().to_owned()];
                row.extend(sizes.iter().map(|size| {
                    figures::cell(self.run, mode, *size).map_or_else(|| MISSING.to_owned(), figure)
                }));
                row
            })
            .collect();
        Table {
            title: format!("{title}{}", self.unit()),
            header,
            rows,
        }
    }

    fn growth_plot<'a>(
        &'a self,
        id: &str,
        path: &str,
        what: &str,
        with_slope: bool,
        pick: &dyn Fn(&'a Cell) -> Option<&'a Histogram>,
    ) -> LinePlot {
        let mut highest = 0.0_f64;
        let series: Vec<Series> = figures::modes(self.run)
            .into_iter()
            .map(|mode| {
                let mut series = Series {
                    mode,
                    name: mode.name().to_owned(),
                    points: Vec::new(),
                    band: Vec::new(),
                    hints: Vec::new(),
                };
                for cell in figures::cells(self.run, mode) {
                    let Some(histogram) = pick(cell) else {
                        continue;
                    };
                    let figure = |q| quantile(histogram, q).map_or(0.0, |ns| ns as f64);
                    let n = f64::from(cell.services);
                    series.points.push((n, figure(0.5)));
                    series.band.push((n, figure(0.01), figure(0.99)));
                    series.hints.push(format!(
                        "{mode}, {}: p50 {}, p1 {}, p99 {}",
                        services(cell.services),
                        self.cost(figure(0.5)),
                        self.cost(figure(0.01)),
                        self.cost(figure(0.99))
                    ));
                    highest = highest.max(figure(0.99));
                }
                if with_slope && let Some(slope) = figures::slope(self.run, mode, pick) {
                    series.name = format!(
                        "{mode} {} a Service",
                        units::slope(self.clock, slope.per_service)
                    );
                }
                series
            })
            .collect();
        LinePlot {
            id: id.to_owned(),
            title: format!("{path}: {what} against the number of Services"),
            desc: format!(
                "One line a mode: {}.",
                units::list(
                    &series
                        .iter()
                        .flat_map(|s| s.hints.clone())
                        .collect::<Vec<_>>()
                )
            ),
            x: self.services_axis(),
            y: Axis {
                label: self.axis(what),
                log: false,
                ticks: self.ticks(linear_ticks(highest, 5)),
            },
            series,
        }
    }

    /// From none to the largest number of Services, labelled where something was measured.
    fn services_axis(&self) -> Axis {
        let mut ticks = vec![(0.0, "0".to_owned())];
        ticks.extend(
            figures::sizes(self.run)
                .into_iter()
                .map(|n| (f64::from(n), units::count(n.into()))),
        );
        Axis {
            label: "number of Services".to_owned(),
            log: false,
            ticks,
        }
    }

    /// Percentiles of the translating stage.
    fn spread(&mut self) {
        let Some(path) = figures::main_path(self.run) else {
            return;
        };
        let title = figures::path_title(path);
        self.sheet
            .heading("spread", "How much does it vary from flow to flow?");
        self.sheet.paragraph(&format!(
            "First packets, {title}, translating stage, {}. Read it from the right: at 99, one flow in a hundred pays more than this.",
            self.at_size()
        ));
        let mut lowest = f64::INFINITY;
        let mut highest = 1.0_f64;
        let series: Vec<Series> = figures::compared(self.run)
            .into_iter()
            .filter_map(|cell| {
                let histogram = figures::translated(cell, path, PacketState::New)?;
                // Beyond 1 - 1/count there is only the maximum, once more.
                let end = (histogram.count as f64).log10().min(3.0);
                let steps = 120_u32;
                let points: Vec<(f64, f64)> = (0..=steps)
                    .filter_map(|i| {
                        let nines = f64::from(i) / f64::from(steps) * 3.0;
                        (nines <= end + 1e-9).then_some(())?;
                        let q = 1.0 - 10_f64.powf(-nines);
                        Some((nines, quantile(histogram, q)? as f64))
                    })
                    .collect();
                for (_, value) in &points {
                    lowest = lowest.min(*value);
                    highest = highest.max(*value);
                }
                // Markers at the labelled percentiles only.
                let hints = points
                    .iter()
                    .map(|(nines, value)| {
                        let labelled = [(1.0, "90"), (2.0, "99"), (3.0, "99.9")]
                            .into_iter()
                            .find(|(at, _)| (at - nines).abs() < 1e-9);
                        labelled.map_or_else(String::new, |(_, p)| {
                            format!("{}: p{p} {}", cell.mode, self.cost(*value))
                        })
                    })
                    .collect();
                Some(Series {
                    mode: cell.mode,
                    name: cell.mode.name().to_owned(),
                    points,
                    band: Vec::new(),
                    hints,
                })
            })
            .collect();
        if series.is_empty() {
            return;
        }
        let nines = |p: f64| -(1.0 - p / 100.0).log10();
        let spread = LinePlot {
            id: "spread".to_owned(),
            title: format!("{title}: percentiles of the translating stage, first packets"),
            desc: format!(
                "One line a mode: {}.",
                units::list(
                    &series
                        .iter()
                        .flat_map(|s| s.hints.clone())
                        .filter(|hint| !hint.is_empty())
                        .collect::<Vec<_>>()
                )
            ),
            x: Axis {
                label: "percentile of first packets".to_owned(),
                log: false,
                ticks: [
                    (0.0, "lowest"),
                    (50.0, "50"),
                    (75.0, "75"),
                    (90.0, "90"),
                    (95.0, "95"),
                    (99.0, "99"),
                    (99.9, "99.9"),
                ]
                .map(|(p, text)| (nines(p), text.to_owned()))
                .to_vec(),
            },
            y: Axis {
                label: self.axis("first packet, translating stage"),
                log: true,
                ticks: self.ticks(log_ticks(lowest, highest)),
            },
            series,
        };
        self.sheet.figure(&|width| spread.draw(width));
        let tables: Vec<Table> = figures::paths(self.run)
            .into_iter()
            .filter_map(|id| self.percentiles(id))
            .collect();
        self.sheet.folded(&tables);
    }

    fn percentiles(&self, id: &str) -> Option<Table> {
        let rows: Vec<Vec<String>> = figures::compared(self.run)
            .into_iter()
            .filter_map(|cell| {
                let histogram = figures::translated(cell, id, PacketState::New)?;
                let mut row = vec![cell.mode.name().to_owned(), units::count(histogram.count)];
                row.push(mean(histogram).map_or_else(|| MISSING.to_owned(), |ns| self.cost(ns)));
                row.extend(
                    [0.01, 0.5, 0.9, 0.99, 0.999, 1.0].map(|q| self.cost_at(Some(histogram), q)),
                );
                Some(row)
            })
            .collect();
        (!rows.is_empty()).then(|| Table {
            title: format!(
                "First packets, {}, translating stage, {}{}",
                figures::path_title(id),
                self.at_size(),
                self.unit()
            ),
            header: [
                "mode", "packets", "mean", "p1", "p50", "p90", "p99", "p99.9", "highest",
            ]
            .map(str::to_owned)
            .to_vec(),
            rows,
        })
    }

    /// Stacked bars of stages.
    fn stages(&mut self) {
        let ids: Vec<&str> = figures::paths(self.run);
        if ids.is_empty() {
            return;
        }
        self.sheet
            .heading("stages", "Where does one packet’s time go?");
        self.sheet.paragraph(&format!(
            "Mean of each stage for {}, over all packets of the path, so that the parts add up to the mean of the whole node. What a mode does for Services comes first, in its colour.",
            self.at_size()
        ));
        let (main, folded): (Vec<&str>, Vec<&str>) =
            ids.into_iter().partition(|id| !figures::is_floor(id));
        for id in main {
            self.sheet.subheading(&figures::path_title(id));
            self.stages_of(id);
        }
        if !folded.is_empty() {
            self.sheet.out.push_str("<details><summary>The same for traffic straight to a pod, which is no Service’s</summary>");
            for id in folded {
                self.sheet.subheading(&figures::path_title(id));
                self.stages_of(id);
            }
            self.sheet.out.push_str("</details>\n");
        }
    }

    fn stages_of(&mut self, id: &str) {
        let mut tables = Vec::new();
        for (state, words) in [
            (PacketState::New, "first packet of a flow"),
            (PacketState::Established, "later packet of a flow"),
        ] {
            let bars: Vec<Bar> = figures::compared(self.run)
                .into_iter()
                .filter_map(|cell| self.bar(cell, id, state))
                .collect();
            if bars.is_empty() {
                continue;
            }
            let said: Vec<String> = bars
                .iter()
                .map(|bar| {
                    let largest = bar
                        .segments
                        .iter()
                        .max_by(|a, b| a.value.total_cmp(&b.value));
                    let largest = largest
                        .map(|s| format!(", most of it {} {}", s.name, s.written))
                        .unwrap_or_default();
                    format!("{} {}{largest}", bar.label, bar.total)
                })
                .collect();
            let drawn = BarPlot {
                id: format!("stages-{id}-{}", figures::state_name(state)),
                title: format!("{}: stages of the {words}", figures::path_title(id)),
                heading: capital(words),
                legend: tables.is_empty(),
                desc: format!("One bar a mode: {}.", units::list(&said)),
                label: self.axis(words),
                bars,
            };
            let clock = self.clock;
            self.sheet
                .figure(&|width| drawn.draw(width, &|value| units::tick(clock, value)));
            tables.push(self.stage_table(id, state, words));
        }
        self.sheet.folded(&tables);
    }

    /// A mode's bar: stages of one name together, whatever the hook.
    fn bar(&self, cell: &Cell, id: &str, state: PacketState) -> Option<Bar> {
        let path = figures::path(cell, id)?;
        let packets = figures::node(cell, id, state).map(|histogram| histogram.count);
        let of_state = |stage: &&StageHistogram| stage.state == state && stage.histogram.count > 0;
        let stages = path.stages.iter().filter(of_state).map(|stage| {
            // Some packets skip a stage: its share is of all packets.
            let all = packets.unwrap_or(stage.histogram.count);
            let value = stage.histogram.sum_ns as f64 / all as f64;
            (stage.stage.as_str(), value)
        });
        let mode = cell.mode;
        Bar::of_stages(Some(mode), mode.name(), stages, |value| self.cost(value))
    }

    fn stage_table(&self, id: &str, state: PacketState, words: &str) -> Table {
        let cells = figures::compared(self.run);
        let mut stages: Vec<(&str, &str)> = Vec::new();
        for stage in cells
            .iter()
            .filter_map(|cell| figures::path(cell, id))
            .flat_map(|path| &path.stages)
        {
            if stage.state == state && !stages.contains(&(&stage.hook, &stage.stage)) {
                stages.push((&stage.hook, &stage.stage));
            }
        }
        // Modes differ in their stages; hooks keep the order in which a packet meets them.
        let order = |hook: &str| {
            [
                "-",
                "PREROUTING",
                "OUTPUT",
                "INPUT",
                "FORWARD",
                "OUTPUT-ipvs",
                "POSTROUTING",
            ]
            .iter()
            .position(|known| *known == hook)
        };
        stages.sort_by_key(|(hook, _)| order(hook));
        let mut header = vec!["stage".to_owned()];
        header.extend(cells.iter().map(|cell| format!("{} mean / p99", cell.mode)));
        let rows = stages
            .into_iter()
            .map(|(hook, stage)| {
                let mut row = vec![format!("{hook} {stage}")];
                row.extend(cells.iter().map(|cell| {
                    let histogram = figures::path(cell, id)
                        .and_then(|path| {
                            path.stages
                                .iter()
                                .find(|s| s.hook == hook && s.stage == stage && s.state == state)
                        })
                        .map(|s| &s.histogram);
                    match histogram.and_then(|h| Some((mean(h)?, quantile(h, 0.99)?))) {
                        Some((mean, p99)) => {
                            format!("{} / {}", self.cost(mean), units::cost_u64(self.clock, p99))
                        }
                        None => MISSING.to_owned(),
                    }
                }));
                row
            })
            .collect();
        Table {
            title: format!(
                "{}, {words}, {}, of the packets that pass the stage{}",
                figures::path_title(id),
                self.at_size(),
                self.unit()
            ),
            header,
            rows,
        }
    }

    /// The whole node against the floor.
    fn whole_node(&mut self) {
        if figures::main_path(self.run).is_none() {
            return;
        }
        self.sheet.heading(
            "node",
            "What does the whole node cost, and what without a Service?",
        );
        self.sheet.paragraph(&format!(
            "Compared at {}. Hollow marks are the same origin sending straight to a pod’s address. Where the hollow mark lies to the right of the filled one, a packet that goes to no Service pays more than one that does: where rules are looked at one by one, it passes them all and matches none.",
            self.at_size()
        ));
        for (state, words) in [
            (PacketState::New, "First packet of a flow"),
            (PacketState::Established, "Later packet of a flow"),
        ] {
            let groups: Vec<Group> = figures::paths(self.run)
                .into_iter()
                .filter(|id| !figures::is_floor(id))
                .map(|id| Group {
                    title: figures::path_title(id),
                    pairs: figures::compared(self.run)
                        .into_iter()
                        .filter_map(|cell| self.pair(cell, id, state))
                        .collect(),
                })
                .filter(|group| !group.pairs.is_empty())
                .collect();
            if groups.is_empty() {
                continue;
            }
            self.sheet.subheading(words);
            let values = || {
                groups
                    .iter()
                    .flat_map(|group| &group.pairs)
                    .flat_map(|pair| {
                        [pair.service.0, pair.service.1]
                            .into_iter()
                            .chain(pair.floor)
                    })
            };
            let highest = values().fold(0.0, f64::max);
            let lowest = values().fold(f64::INFINITY, f64::min);
            // From zero where lengths can be compared; else by factors.
            let log = highest > 6.0 * lowest.max(1.0);
            let ticks = if log {
                log_ticks(lowest, highest)
            } else {
                linear_ticks(highest, 5)
            };
            let drawn = DotPlot {
                id: format!("node-{}", figures::state_name(state)),
                title: format!("{words}: whole node, to a Service and straight to a pod"),
                desc: units::list(
                    &groups
                        .iter()
                        .flat_map(|group| group.pairs.iter().map(|pair| pair.hint.clone()))
                        .collect::<Vec<_>>(),
                ),
                label: format!(
                    "{}{}",
                    self.axis("whole node"),
                    if log { ", log scale" } else { "" }
                ),
                log,
                ticks: self.ticks(ticks),
                groups,
            };
            self.sheet.figure(&|width| drawn.draw(width));
            let table = self.node_table(state, words);
            self.sheet.folded(&[table]);
        }
    }

    fn pair(&self, cell: &Cell, id: &str, state: PacketState) -> Option<Pair> {
        let histogram = figures::node(cell, id, state)?;
        let service = (
            quantile(histogram, 0.5)? as f64,
            quantile(histogram, 0.99)? as f64,
        );
        let floor = figures::floor_of(id)
            .and_then(|floor| figures::node(cell, floor, state))
            .and_then(|histogram| quantile(histogram, 0.5))
            .map(|ns| ns as f64);
        let hint = format!(
            "{}, {}: p50 {}, p99 {}{}",
            figures::path_title(id),
            cell.mode,
            self.cost(service.0),
            self.cost(service.1),
            floor
                .map(|ns| format!(", straight to a pod {}", self.cost(ns)))
                .unwrap_or_default()
        );
        Some(Pair {
            mode: cell.mode,
            service,
            floor,
            hint,
        })
    }

    fn node_table(&self, state: PacketState, words: &str) -> Table {
        let mut rows = Vec::new();
        for id in figures::paths(self.run) {
            for cell in figures::compared(self.run) {
                if let Some(histogram) = figures::node(cell, id, state) {
                    let mut row = vec![format!("{} {}", figures::path_title(id), cell.mode)];
                    row.push(
                        mean(histogram).map_or_else(|| MISSING.to_owned(), |ns| self.cost(ns)),
                    );
                    row.extend([0.5, 0.9, 0.99, 0.999].map(|q| self.cost_at(Some(histogram), q)));
                    rows.push(row);
                }
            }
        }
        Table {
            title: format!("{words}, whole node, {}{}", self.at_size(), self.unit()),
            header: ["path and mode", "mean", "p50", "p90", "p99", "p99.9"]
                .map(str::to_owned)
                .to_vec(),
            rows,
        }
    }

    /// Timelines.
    fn faults(&mut self) {
        if self.run.measurements.faults.is_empty() {
            return;
        }
        self.sheet.heading(
            "faults",
            "What do users lose when rules are flushed or switched?",
        );
        self.sheet.paragraph("New flows by the time at which they were meant to start; what was lost stands in the mode’s colour. Shaded bands are rule changes, numbered as in the list below the plot. An outage reaches from the start of the first flow that failed to the start of the next that succeeded.");
        for (i, fault) in self.run.measurements.faults.iter().enumerate() {
            self.fault(i, fault);
        }
    }

    fn fault(&mut self, i: usize, fault: &Fault) {
        let title = figures::fault_title(fault);
        self.sheet.subheading(&capital(&title));
        self.sheet.paragraph(&format!(
            "{}: {}.",
            blocks::fault_setting(fault),
            blocks::fault_outcome(fault)
        ));
        let nothing =
            fault.kind == FaultKind::Control && figures::new_flows(fault).lost_count() == 0;
        if nothing {
            self.sheet.out.push_str("<details><summary>Nothing was done and no new flow was lost: the plot of it</summary>");
        }
        self.sheet
            .figure(&|width| timeline::draw(&format!("fault-{i}"), fault, width));
        if nothing {
            self.sheet.out.push_str("</details>\n");
        }
        if !fault.changes.is_empty() {
            self.sheet.out.push_str("<ol class=\"changes\">");
            for change in &fault.changes {
                let _ = write!(
                    self.sheet.out,
                    "<li>at {}, {} long: <code>{}</code>, {} → {} rules, elements and servers</li>",
                    escape(&format!("{:.3} s", change.start_ns as f64 / 1e9)),
                    escape(&units::time_u64(
                        change.end_ns.saturating_sub(change.start_ns)
                    )),
                    escape(&change.what),
                    units::count(change.before),
                    units::count(change.after)
                );
            }
            self.sheet.out.push_str("</ol>\n");
        }
        let mut rows = Vec::new();
        for path in &fault.paths {
            for (whose, ledger) in [("new", &path.new), ("established", &path.established)] {
                let outage = match figures::outage_total(fault, path) {
                    Some((ns, ended)) if whose == "new" => format!(
                        "{}{}",
                        units::time_u64(ns),
                        if ended { "" } else { ", not over" }
                    ),
                    _ => MISSING.to_owned(),
                };
                let lost = blocks::losses(ledger);
                rows.push(vec![
                    format!("{}, {whose}", figures::path_title(&path.path)),
                    units::count(ledger.sent),
                    units::count(ledger.delivered),
                    units::count(ledger.lost_count()),
                    if lost.is_empty() {
                        MISSING.to_owned()
                    } else {
                        lost
                    },
                    outage,
                ]);
            }
        }
        let table = Table {
            title: format!(
                "{title}: flows by verdict; a flow counts as lost after {} without an answer",
                units::tick(Clock::Wall, fault.patience_ns as f64)
            ),
            header: [
                "path, flows",
                "sent",
                "delivered",
                "lost",
                "lost by verdict",
                "outage",
            ]
            .map(str::to_owned)
            .to_vec(),
            rows,
        };
        self.sheet.folded(&[table]);
    }

    /// Apply time and number of rules.
    fn rules(&mut self) {
        if self.run.measurements.cells.is_empty() {
            return;
        }
        self.sheet
            .heading("rules", "What does it take to put the rules there?");
        self.sheet.subheading("Time to apply all rules");
        let clock = self.clock;
        let apply = self.cells_plot(
            "apply",
            "time to apply all rules",
            self.axis("all rules applied"),
            &|cell| cell.apply_ns as f64,
            &|value| units::tick(clock, value),
        );
        self.sheet.figure(&|width| apply.draw(width));
        self.sheet.subheading("What is in the kernel then");
        let rules = self.cells_plot(
            "rules-count",
            "rules, elements and servers in the kernel",
            "rules, set elements, IPVS servers".to_owned(),
            &|cell| cell.rules.total() as f64,
            &|value| units::tick(Clock::Virtual, value),
        );
        self.sheet.figure(&|width| rules.draw(width));
        let apply = self.by_size("Time to apply all rules", &|cell| {
            units::cost_u64(self.clock, cell.apply_ns)
        });
        let rows = figures::modes(self.run)
            .into_iter()
            .flat_map(|mode| figures::cells(self.run, mode))
            .map(|cell| {
                let mut row = vec![format!("{} {}", cell.mode, cell.services)];
                row.extend(
                    [
                        cell.endpoints_per_service.into(),
                        cell.rules.rules,
                        cell.rules.elements,
                        cell.rules.virtual_servers,
                        cell.rules.real_servers,
                        cell.rules.total(),
                    ]
                    .map(units::count),
                );
                row
            })
            .collect();
        let counts = Table {
            title: "What each mode put into the kernel, counted there".to_owned(),
            header: [
                "mode and Services",
                "endpoints a Service",
                "rules",
                "set and map elements",
                "virtual servers",
                "real servers",
                "together",
            ]
            .map(str::to_owned)
            .to_vec(),
            rows,
        };
        self.sheet.folded(&[apply, counts]);
    }

    fn cells_plot(
        &self,
        id: &str,
        title: &str,
        label: String,
        value: &dyn Fn(&Cell) -> f64,
        tick: &dyn Fn(f64) -> String,
    ) -> LinePlot {
        let series: Vec<Series> = figures::modes(self.run)
            .into_iter()
            .map(|mode| {
                let cells = figures::cells(self.run, mode);
                Series {
                    mode,
                    name: mode.name().to_owned(),
                    points: cells
                        .iter()
                        .map(|cell| (f64::from(cell.services), value(cell)))
                        .collect(),
                    band: Vec::new(),
                    hints: cells
                        .iter()
                        .map(|cell| {
                            format!("{mode}, {}: {}", services(cell.services), tick(value(cell)))
                        })
                        .collect(),
                }
            })
            .collect();
        let highest = series
            .iter()
            .flat_map(|s| &s.points)
            .map(|point| point.1)
            .fold(0.0, f64::max);
        LinePlot {
            id: id.to_owned(),
            title: format!("{title} against the number of Services"),
            desc: format!(
                "One line a mode: {}.",
                units::list(
                    &series
                        .iter()
                        .flat_map(|s| s.hints.clone())
                        .collect::<Vec<_>>()
                )
            ),
            x: self.services_axis(),
            y: Axis {
                label,
                log: false,
                ticks: linear_ticks(highest, 5)
                    .into_iter()
                    .map(|v| (v, tick(v)))
                    .collect(),
            },
            series,
        }
    }

    fn method(&mut self) {
        let measured = &self.run.measurements;
        self.sheet.heading("method", "How it was measured");
        let seen = measured
            .cells
            .iter()
            .flat_map(|cell| &cell.paths)
            .flat_map(|path| &path.stages);
        let stages = method::stages(seen);
        self.sheet.definitions(&[
            ("clock", method::clock(measured.clock).to_owned()),
            ("probe tier", method::tier(&measured.tier)),
            ("seed", measured.seed.to_string()),
            ("stage", method::STAGE.to_owned()),
            ("whole node", method::NODE.to_owned()),
            ("new, established", method::STATES.to_owned()),
            ("median, p99", method::QUANTILES.to_owned()),
            ("per Service", "the difference of two medians, at a mode’s largest and smallest number of Services, divided by the difference in Services.".to_owned()),
            ("not seen", method::not_seen(&measured.tier).to_owned()),
        ]);
        if !stages.is_empty() {
            self.sheet.subheading("What each stage holds");
            self.sheet.definitions(&stages);
        }
    }

    fn health(&mut self) {
        let cells = self
            .run
            .measurements
            .cells
            .iter()
            .map(|cell| (format!("{} {}", cell.mode, cell.services), cell.probes));
        let faults = self
            .run
            .measurements
            .faults
            .iter()
            .map(|fault| (figures::fault_title(fault), fault.probes));
        let all: Vec<(String, ProbeHealth)> = cells.chain(faults).collect();
        if all.is_empty() {
            return;
        }
        self.sheet
            .heading("probes", "Did the probes see everything?");
        let missed = |health: &ProbeHealth| {
            health.unfinished + health.ring_lost + health.slot_collisions + health.unpaired
        };
        let total: u64 = all.iter().map(|(_, health)| missed(health)).sum();
        let journeys: u64 = all.iter().map(|(_, health)| health.journeys).sum();
        if total == 0 {
            self.sheet.paragraph(&format!(
                "Yes: {} journeys, none unfinished, no record lost, nothing unpaired.",
                units::count(journeys)
            ));
        } else {
            self.sheet.paragraph(&format!(
                "Not quite: of {} journeys, {} events were missed; the table says where.",
                units::count(journeys),
                units::count(total)
            ));
        }
        let rows = all
            .into_iter()
            .map(|(place, h)| {
                let mut row = vec![place];
                row.extend(
                    [
                        h.links.into(),
                        h.tracepoints.into(),
                        h.journeys,
                        h.transmitted,
                        h.delivered_locally,
                        h.dropped,
                        h.unfinished,
                        h.ring_lost,
                        h.slot_collisions,
                        h.unpaired,
                        h.other_packets,
                    ]
                    .map(units::count),
                );
                row
            })
            .collect();
        self.sheet.folded(&[Table {
            title: "Journeys and what became of them".to_owned(),
            header: [
                "cell or fault",
                "links",
                "tracepoints",
                "journeys",
                "sent out",
                "to a local socket",
                "dropped",
                "unfinished",
                "records lost",
                "slot collisions",
                "unpaired",
                "other packets",
            ]
            .map(str::to_owned)
            .to_vec(),
            rows,
        }]);
    }

    fn environment(&mut self) {
        let e = &self.run.environment;
        self.sheet.heading("environment", "Where it was measured");
        let place = match e.place {
            Place::Host => "network namespaces of this machine",
            Place::Vm => "network namespaces in a virtual machine",
        };
        let tools: Vec<String> = e
            .tools
            .iter()
            .map(|(name, version)| format!("{name} {version}"))
            .collect();
        let mut rows = vec![
            ("place", place.to_owned()),
            ("kernel", e.kernel.clone()),
            ("host kernel", e.host_kernel.clone()),
            ("CPUs", e.cpus.to_string()),
            ("started", e.started.clone()),
            ("took", format!("{:.0} s", e.duration_s)),
            ("svcpath", e.version.clone()),
            ("eBPF object", e.ebpf.clone()),
            ("tools", tools.join(", ")),
            ("command", e.command.join(" ")),
        ];
        rows.extend(e.notes.iter().map(|note| ("note", note.clone())));
        self.sheet.definitions(&rows);
    }
}

/// The text with its first letter large.
fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(chars).collect()
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::PathBuf;

    use super::*;
    use crate::report::sample;

    /// Every element closed in order, every id there once, nothing from elsewhere.
    fn check(page: &str) {
        let body = page.split_once("</style>").expect("a style").1;
        let mut open: Vec<&str> = vec!["html", "head"];
        let mut rest = body;
        while let Some(start) = rest.find('<') {
            let end = rest[start..].find('>').expect("a closed tag") + start;
            let tag = &rest[start + 1..end];
            rest = &rest[end + 1..];
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(
                    open.pop(),
                    Some(name),
                    "closed out of order near {:?}",
                    &rest[..rest.len().min(80)]
                );
            } else if !tag.ends_with('/') {
                open.push(tag.split([' ', '\n']).next().expect("a name"));
            }
            assert_eq!(
                tag.matches('"').count() % 2,
                0,
                "an attribute without end: {tag}"
            );
        }
        assert!(open.is_empty(), "never closed: {open:?}");
        let mut ids = BTreeSet::new();
        for id in body
            .split(" id=\"")
            .skip(1)
            .filter_map(|part| part.split('"').next())
        {
            assert!(ids.insert(id), "id {id} is there twice");
        }
        for outside in [
            "http://", "https://", "src=", "url(", "@import", "<script", "<link",
        ] {
            let found = page.replace("http://www.w3.org/2000/svg", "");
            assert!(
                !found.contains(outside),
                "the page must hold everything itself: {outside}"
            );
        }
        for broken in ["NaN", "inf\"", "\"inf", "-inf"] {
            assert!(!body.contains(broken), "a coordinate is {broken}");
        }
    }

    /// For looking at: the folder that the environment names, else the target folder.
    fn folder() -> PathBuf {
        std::env::var_os("SVCPATH_SAMPLE_DIR").map_or_else(
            || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/tmp/sample-report"),
            PathBuf::from,
        )
    }

    #[test]
    fn the_sample_page_is_well_formed() {
        for (name, run) in [
            ("vm.html", sample::run()),
            ("host.html", sample::host_run()),
        ] {
            let page = render(&run);
            check(&page);
            fs::create_dir_all(folder()).expect("a folder");
            fs::write(folder().join(name), page).expect("written");
        }
    }

    #[test]
    fn the_page_of_a_trace_is_well_formed() {
        let mut trace = sample::trace();
        let page = trace::render(&trace);
        check(&page);
        for words in ["shop/web:http", "stages-new", "id=\"time-w", "generation 9"] {
            assert!(page.contains(words), "{words}");
        }
        fs::create_dir_all(folder()).expect("a folder");
        fs::write(folder().join("trace.html"), page).expect("written");
        let summary = &mut trace.run.summary;
        summary.services[0].mode = "ipvs".to_owned();
        summary.timeline.paths.clear();
        check(&trace::render(&trace));
        let summary = &mut trace.run.summary;
        summary.services.clear();
        summary.paths.clear();
        summary.rule_changes.clear();
        trace.wrong = None;
        let page = trace::render(&trace);
        check(&page);
        assert!(page.contains("No new flow to a Service was seen."));
    }

    #[test]
    fn text_of_a_trace_is_never_markup() {
        let mut trace = sample::trace();
        let evil = "\"><script>alert('x')</script>".to_owned();
        trace.run.environment.host.clone_from(&evil);
        trace.run.environment.command = vec![evil.clone()];
        let summary = &mut trace.run.summary;
        summary.tier.clone_from(&evil);
        for service in &mut summary.services {
            service.name.clone_from(&evil);
            service.mode.clone_from(&evil);
        }
        for path in &mut summary.paths {
            path.path.push_str(&evil);
            for stage in &mut path.stages {
                stage.hook.clone_from(&evil);
            }
        }
        for change in &mut summary.rule_changes {
            change.by.name = Some(evil.clone());
        }
        let bins = summary.timeline.paths.pop_first().expect("a path").1;
        summary.timeline.paths.insert(evil.clone(), bins);
        for journey in trace.wrong.iter_mut().flatten() {
            journey.service.clone_from(&evil);
            journey.path.clone_from(&evil);
        }
        assert!(!trace::render(&trace).contains("<script"));
    }

    #[test]
    fn runs_that_lack_things_still_make_a_page() {
        let mut run = sample::run();
        run.measurements.faults.clear();
        run.measurements.cells.retain(|cell| cell.services == 1000);
        check(&render(&run));
        for cell in &mut run.measurements.cells {
            cell.paths.retain(|path| path.path == "host-to-clusterip");
            cell.paths[0].node.clear();
        }
        check(&render(&run));
        for cell in &mut run.measurements.cells {
            cell.paths.clear();
        }
        check(&render(&run));
        run.measurements.cells.clear();
        let page = render(&run);
        check(&page);
        assert!(page.contains("This run holds no measurements."));
    }

    #[test]
    fn text_of_a_run_is_never_markup() {
        let mut run = sample::run();
        let evil = "\"><script>alert('x')</script>";
        run.environment.notes = vec![evil.to_owned()];
        run.environment.kernel = evil.to_owned();
        run.environment.command = vec![evil.to_owned()];
        evil.clone_into(&mut run.measurements.tier);
        for cell in &mut run.measurements.cells {
            for path in &mut cell.paths {
                path.path = format!("{evil}{}", path.path);
                for stage in &mut path.stages {
                    evil.clone_into(&mut stage.hook);
                    stage.stage = format!("{}{evil}", stage.stage);
                }
            }
        }
        for fault in &mut run.measurements.faults {
            for change in &mut fault.changes {
                evil.clone_into(&mut change.what);
            }
            for path in &mut fault.paths {
                evil.clone_into(&mut path.path);
                for loss in &mut path.new.lost {
                    loss.reason = Some(evil.to_owned());
                }
            }
        }
        let page = render(&run);
        assert!(!page.contains("<script"));
    }

    #[test]
    fn the_page_is_the_same_every_time() {
        assert_eq!(render(&sample::run()), render(&sample::run()));
    }
}
