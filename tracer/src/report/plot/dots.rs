//! Pairs of dots: the whole node's cost of a Service path against the same origin straight to a pod.

use super::{
    Anchor, Entry, SIGN, Scale, Svg, TEXT, bold_width, fitting, legend, mode_class, text_width,
};
use crate::rules::Mode;

/// One mode's pair.
#[derive(Clone, Debug)]
pub struct Pair {
    /// Whose.
    pub mode: Mode,
    /// To the Service: median and 99th percentile.
    pub service: (f64, f64),
    /// Straight to a pod: median.
    pub floor: Option<f64>,
    /// What it says on hover.
    pub hint: String,
}

/// The pairs of one path.
#[derive(Clone, Debug)]
pub struct Group {
    /// The path.
    pub title: String,
    /// One a mode.
    pub pairs: Vec<Pair>,
}

/// A plot of pairs.
#[derive(Clone, Debug)]
pub struct DotPlot {
    /// Unique on the page.
    pub id: String,
    /// What it shows.
    pub title: String,
    /// What is seen, in words.
    pub desc: String,
    /// What the axis counts.
    pub label: String,
    /// Logarithmic?
    pub log: bool,
    /// Where it is labelled, ascending; the first and last are its ends.
    pub ticks: Vec<(f64, String)>,
    /// From top to bottom.
    pub groups: Vec<Group>,
}

const ROW: f64 = 22.0;

impl DotPlot {
    /// The plot as SVG, `width` pixels wide.
    pub fn draw(&self, width: f64) -> String {
        let mut svg = Svg::new(&self.id, width, &self.title, &self.desc);
        // The legend's signs are of no mode, so they take the text's colour.
        let entries = [
            Entry {
                text: "to the Service, p50".to_owned(),
                sign: Box::new(|svg: &mut Svg, x, y| {
                    svg.marker(Mode::IptablesLegacy, (x + SIGN / 2.0, y), false, "");
                }),
            },
            Entry {
                text: "p99".to_owned(),
                sign: Box::new(|svg: &mut Svg, x, y| {
                    svg.line("whisker m-legacy", (x + 4.0, y), (x + SIGN - 4.0, y));
                    svg.line(
                        "whisker m-legacy",
                        (x + SIGN - 4.0, y - 5.0),
                        (x + SIGN - 4.0, y + 5.0),
                    );
                }),
            },
            Entry {
                text: "straight to a pod, p50".to_owned(),
                sign: Box::new(|svg: &mut Svg, x, y| {
                    svg.marker(Mode::IptablesLegacy, (x + SIGN / 2.0, y), true, "");
                }),
            },
        ];
        svg.open("neutral");
        let mut y = legend(&mut svg, &entries) + 6.0;
        svg.close();
        let top = y;
        let names = self.groups.iter().flat_map(|group| {
            let modes = group.pairs.iter().map(|pair| text_width(pair.mode.name()));
            modes.chain([bold_width(&group.title)])
        });
        let left = names.fold(0.0, f64::max) + 14.0;
        let right = width
            - self
                .ticks
                .last()
                .map_or(12.0, |(_, text)| text_width(text) / 2.0 + 4.0);
        let ends = (
            self.ticks.first().map_or(0.0, |t| t.0),
            self.ticks.last().map_or(1.0, |t| t.0),
        );
        let x = Scale::new(self.log, ends, (left, right));
        let height: f64 = self
            .groups
            .iter()
            .map(|group| TEXT + 14.0 + ROW * group.pairs.len() as f64)
            .sum();
        let bottom = top + height + 6.0;

        let labels: Vec<(f64, String)> = self
            .ticks
            .iter()
            .map(|(value, text)| (x.at(*value), text.clone()))
            .collect();
        for ((at, text), shown) in labels.iter().zip(fitting(&labels)) {
            svg.line(
                if *at > left { "grid" } else { "axis" },
                (*at, top),
                (*at, bottom),
            );
            if shown {
                svg.text("tick", (*at, bottom + 16.0), Anchor::Middle, text);
            }
        }
        svg.text("label", (right, bottom + 36.0), Anchor::End, &self.label);

        for group in &self.groups {
            y += TEXT + 8.0;
            svg.text("label strong", (left - 10.0, y), Anchor::End, &group.title);
            y += 6.0;
            for pair in &group.pairs {
                let middle = y + ROW / 2.0;
                svg.text(
                    "label",
                    (left - 10.0, middle + 4.5),
                    Anchor::End,
                    pair.mode.name(),
                );
                let class = mode_class(Some(pair.mode));
                let (p50, p99) = (x.at(pair.service.0), x.at(pair.service.1));
                if let Some(floor) = pair.floor {
                    svg.line(
                        &format!("tie {class}"),
                        (x.at(floor), middle),
                        (p50, middle),
                    );
                }
                svg.line(&format!("whisker {class}"), (p50, middle), (p99, middle));
                svg.line(
                    &format!("whisker {class}"),
                    (p99, middle - 5.0),
                    (p99, middle + 5.0),
                );
                if let Some(floor) = pair.floor {
                    svg.marker(pair.mode, (x.at(floor), middle), true, &pair.hint);
                }
                svg.marker(pair.mode, (p50, middle), false, &pair.hint);
                y += ROW;
            }
        }
        svg.finish(bottom + 44.0)
    }
}
