//! What a fault did to each path's new flows, over time.

use std::fmt::Write as _;

use super::{
    Anchor, Entry, NARROW, SIGN, Scale, Svg, TEXT, bold_width, fitting, legend, linear_ticks,
    mode_class, px, text_width,
};
use crate::record::run::{Bin, Fault, Outage};
use crate::report::{figures, units};
use crate::rules::Mode;

/// New flows over time, a row a path, with what became of them and what was done meanwhile.
#[derive(Clone, Debug)]
pub struct Timeline<'a> {
    /// Unique on the page.
    pub id: String,
    /// What it shows.
    pub title: String,
    /// What is seen, in words.
    pub desc: String,
    /// In whose colour what went wrong stands; `None`: in none's.
    pub mode: Option<Mode>,
    /// Length of the axis.
    pub duration_ns: u64,
    /// Width of a bin.
    pub bin_ns: u64,
    /// What `lost` counts: `lost`.
    pub lost: &'static str,
    /// What the axis counts from: `the start of the traffic`.
    pub origin: &'static str,
    /// From top to bottom.
    pub rows: Vec<Row<'a>>,
    /// In order.
    pub changes: Vec<Change>,
}

/// One path's new flows.
#[derive(Clone, Debug)]
pub struct Row<'a> {
    /// The path.
    pub title: String,
    /// New flows by bin.
    pub series: &'a [Bin],
    /// When flows failed.
    pub outages: &'a [Outage],
}

/// A rule change on the axis.
#[derive(Clone, Debug)]
pub struct Change {
    /// Its begin.
    pub start_ns: u64,
    /// Its end.
    pub end_ns: u64,
    /// What it says on hover.
    pub hint: String,
}

/// Draws a fault, `width` pixels wide. `id` must be unique on the page.
pub fn draw(id: &str, fault: &Fault, width: f64) -> String {
    Timeline {
        id: id.to_owned(),
        title: format!("{}: new flows over time", figures::fault_title(fault)),
        desc: crate::report::blocks::fault_words(fault),
        mode: Some(fault.mode),
        duration_ns: fault.duration_ns,
        bin_ns: fault.bin_ns,
        lost: "lost",
        origin: "the start of the traffic",
        rows: fault
            .paths
            .iter()
            .map(|path| Row {
                title: figures::path_title(&path.path),
                series: &path.series,
                outages: &path.outages,
            })
            .collect(),
        changes: fault
            .changes
            .iter()
            .map(|change| Change {
                start_ns: change.start_ns,
                end_ns: change.end_ns,
                hint: format!(
                    "{}: {} → {}",
                    change.what,
                    units::count(change.before),
                    units::count(change.after)
                ),
            })
            .collect(),
    }
    .draw(width)
}

impl Timeline<'_> {
    /// The plot as SVG, `width` pixels wide.
    pub fn draw(&self, width: f64) -> String {
        let mode = mode_class(self.mode);
        let mut svg = Svg::new(&self.id, width, &self.title, &self.desc);
        let mut entries = vec![
            Entry {
                text: format!(
                    "sent, a bin of {}",
                    units::tick(crate::record::run::Clock::Wall, self.bin_ns as f64)
                ),
                sign: Box::new(|svg: &mut Svg, x, y| {
                    svg.rect("sent", (x, y - 6.0), (SIGN, 12.0), "");
                }),
            },
            Entry {
                text: self.lost.to_owned(),
                sign: Box::new(move |svg: &mut Svg, x, y| {
                    svg.rect(&format!("lost {mode}"), (x, y - 6.0), (SIGN, 12.0), "");
                }),
            },
        ];
        if self.rows.iter().any(|row| !row.outages.is_empty()) {
            entries.push(Entry {
                text: "outage".to_owned(),
                sign: Box::new(|svg: &mut Svg, x, y| span(svg, x, x + SIGN, y)),
            });
        }
        if !self.changes.is_empty() {
            entries.push(Entry {
                text: "rule change".to_owned(),
                sign: Box::new(|svg: &mut Svg, x, y| {
                    svg.rect("change", (x + SIGN / 2.0 - 2.0, y - 8.0), (4.0, 16.0), "");
                }),
            });
        }
        let mut y = legend(&mut svg, &entries) + 4.0;

        let narrow = width <= NARROW;
        let most = |series: &[Bin]| series.iter().map(|bin| bin.sent).max().unwrap_or(0);
        let highest = self
            .rows
            .iter()
            .map(|row| most(row.series))
            .max()
            .unwrap_or(0);
        let left = text_width(&units::count(highest)) + 12.0;
        let right = width - 16.0;
        let seconds = self.duration_ns as f64 / 1e9;
        let x = Scale::new(false, (0.0, seconds), (left, right));

        let marks_at = y + TEXT;
        y += TEXT + 10.0;
        let top = y;
        let height = if narrow { 44.0 } else { 52.0 };
        let step = TEXT + 14.0 + height + 6.0;
        let bottom = top + step * self.rows.len() as f64;

        // What was sent lies at the back, rule changes over it through all rows, losses in front.
        for (i, row) in self.rows.iter().enumerate() {
            let base = top + step * i as f64 + TEXT + 14.0 + height;
            let scale = Scale::new(false, (0.0, highest as f64), (base, base - height));
            svg.path(
                "sent",
                &area(row.series, self.bin_ns, &x, &scale, |bin| bin.sent),
            );
        }
        for change in &self.changes {
            let (a, b) = (
                x.at(change.start_ns as f64 / 1e9),
                x.at(change.end_ns as f64 / 1e9),
            );
            svg.rect(
                "change",
                (a, top),
                ((b - a).max(2.0), bottom - top),
                &change.hint,
            );
        }
        for (at, text) in marks(&self.changes, &x) {
            svg.text("tick strong", (at, marks_at), Anchor::Middle, &text);
        }

        for row in &self.rows {
            let base = y + TEXT + 14.0 + height;
            svg.text(
                "label strong",
                (left + 2.0, y + TEXT + 2.0),
                Anchor::Start,
                &row.title,
            );
            let scale = Scale::new(false, (0.0, highest as f64), (base, base - height));
            svg.path(
                &format!("lost {mode}"),
                &area(row.series, self.bin_ns, &x, &scale, |bin| bin.lost),
            );
            svg.line("axis", (left, base), (right, base));
            svg.text("tick", (left - 6.0, base + 4.0), Anchor::End, "0");
            svg.text(
                "tick",
                (left - 6.0, base - height + 4.5),
                Anchor::End,
                &units::count(highest),
            );
            for outage in row.outages {
                let (length, ended) = figures::outage_length(outage, self.duration_ns);
                let a = x.at(outage.start_ns as f64 / 1e9);
                let b = x.at((outage.start_ns + length) as f64 / 1e9);
                span(&mut svg, a, b, y + TEXT + 7.0);
                let text = format!(
                    "{}{}",
                    units::time_u64(length),
                    if ended { "" } else { ", not over" }
                );
                // Beside the path's name if there is room, else to the right of the span.
                let name_ends = left + 2.0 + bold_width(&row.title) + 8.0;
                let middle = f64::midpoint(a, b);
                let half = text_width(&text) / 2.0;
                let at = middle.max(name_ends + half).min(right - half);
                svg.text("tick", (at, y + TEXT + 1.0), Anchor::Middle, &text);
            }
            y += step;
        }

        let ticks = linear_ticks(seconds, if narrow { 4 } else { 8 });
        let labels: Vec<(f64, String)> = ticks
            .into_iter()
            .filter(|v| *v <= seconds * 1.0001)
            .map(|v| (x.at(v), units::trimmed(v, 3)))
            .collect();
        for ((at, text), shown) in labels.iter().zip(fitting(&labels)) {
            svg.line("axis", (*at, bottom - 6.0), (*at, bottom - 1.0));
            if shown {
                svg.text("tick", (*at, bottom + 13.0), Anchor::Middle, text);
            }
        }
        svg.text(
            "label",
            (right, bottom + 32.0),
            Anchor::End,
            &format!("seconds since {}", self.origin),
        );
        svg.text(
            "label",
            (0.0, bottom + 32.0),
            Anchor::Start,
            if narrow { "" } else { "up: new flows a bin" },
        );
        svg.finish(bottom + 40.0)
    }
}

/// An outage: a bar with ends.
fn span(svg: &mut Svg, a: f64, b: f64, y: f64) {
    svg.line("outage", (a, y), (b.max(a + 1.0), y));
    svg.line("outage", (a, y - 4.0), (a, y + 4.0));
    svg.line(
        "outage",
        (b.max(a + 1.0), y - 4.0),
        (b.max(a + 1.0), y + 4.0),
    );
}

/// The numbers of the rule changes above the plot; those that would overlap stand together.
fn marks(changes: &[Change], x: &Scale) -> Vec<(f64, String)> {
    let mut groups: Vec<(f64, usize, usize)> = Vec::new();
    for (i, change) in changes.iter().enumerate() {
        let at = f64::midpoint(
            x.at(change.start_ns as f64 / 1e9),
            x.at(change.end_ns as f64 / 1e9),
        );
        match groups.last_mut() {
            Some((last, _, to)) if at - *last < 34.0 => *to = i + 1,
            _ => groups.push((at, i + 1, i + 1)),
        }
    }
    groups
        .into_iter()
        .map(|(at, from, to)| {
            (
                at,
                if from == to {
                    from.to_string()
                } else {
                    format!("{from}–{to}")
                },
            )
        })
        .collect()
}

/// The area under a series as steps; runs of equal bins are one step.
fn area(series: &[Bin], bin_ns: u64, x: &Scale, y: &Scale, pick: fn(&Bin) -> u64) -> String {
    let mut d = String::new();
    let base = y.at(0.0);
    let mut height = 0;
    for (i, bin) in series.iter().enumerate() {
        let value = pick(bin);
        if value == height {
            continue;
        }
        let at = x.at(i as f64 * bin_ns as f64 / 1e9);
        if d.is_empty() {
            let _ = write!(d, "M{} {}", px(at), px(base));
        }
        let _ = write!(d, "H{}V{}", px(at), px(y.at(value as f64)));
        height = value;
    }
    if height != 0 {
        let end = x.at(series.len() as f64 * bin_ns as f64 / 1e9);
        let _ = write!(d, "H{}V{}", px(end), px(base));
    }
    if d.is_empty() {
        // An empty path is no error, but some readers complain about an empty `d`.
        return format!("M{} {}", px(x.at(0.0)), px(base));
    }
    d.push('Z');
    d
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::run::FaultKind;
    use crate::report::sample;

    #[test]
    fn a_switch() {
        let run = sample::run();
        let fault = run
            .measurements
            .faults
            .iter()
            .find(|fault| fault.kind == FaultKind::Switch)
            .expect("in the sample");
        insta::assert_snapshot!(draw("switch", fault, NARROW).replace("><", ">\n<"));
    }

    #[test]
    fn changes_close_together_share_a_mark() {
        let run = sample::run();
        let fault = run
            .measurements
            .faults
            .iter()
            .find(|fault| fault.kind == FaultKind::Switch)
            .expect("in the sample");
        let changes: Vec<Change> = fault
            .changes
            .iter()
            .map(|change| Change {
                start_ns: change.start_ns,
                end_ns: change.end_ns,
                hint: String::new(),
            })
            .collect();
        let written = |width: f64| -> Vec<String> {
            let x = Scale::new(false, (0.0, 6.0), (0.0, width));
            marks(&changes, &x)
                .into_iter()
                .map(|(_, text)| text)
                .collect()
        };
        assert_eq!(written(300.0), ["1–2", "3–4"]);
        assert_eq!(written(3000.0), ["1", "2", "3", "4"]);
        assert_eq!(written(20.0), ["1–4"]);
    }

    #[test]
    fn an_outage_that_is_not_over_is_said_to_be() {
        let mut fault = sample::run().measurements.faults[1].clone();
        fault.paths[0].outages[0].end_ns = None;
        assert!(draw("open", &fault, NARROW).contains("4.00 s, not over"));
    }
}
