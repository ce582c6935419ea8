//! Lines over two axes: cost against number of Services, cost against percentile.

use std::fmt::Write as _;

use super::{Anchor, Entry, SIGN, Scale, Svg, TEXT, fitting, legend, mode_class, px, text_width};
use crate::rules::Mode;

/// One axis.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What and in which unit.
    pub label: String,
    /// Logarithmic?
    pub log: bool,
    /// Where it is labelled, ascending; the first and last are its ends.
    pub ticks: Vec<(f64, String)>,
}

/// One mode's line.
#[derive(Clone, Debug)]
pub struct Series {
    /// Colour, dash and marker.
    pub mode: Mode,
    /// What the legend says.
    pub name: String,
    /// Ascending in x.
    pub points: Vec<(f64, f64)>,
    /// Lower and upper bound at x, ascending; may be empty.
    pub band: Vec<(f64, f64, f64)>,
    /// A marker at each point, with what it says on hover.
    pub hints: Vec<String>,
}

/// A plot of lines.
#[derive(Clone, Debug)]
pub struct LinePlot {
    /// Unique on the page.
    pub id: String,
    /// What it shows.
    pub title: String,
    /// What is seen, in words.
    pub desc: String,
    /// Across.
    pub x: Axis,
    /// Up.
    pub y: Axis,
    /// In the order of the legend.
    pub series: Vec<Series>,
}

impl LinePlot {
    /// The plot as SVG, `width` pixels wide.
    pub fn draw(&self, width: f64) -> String {
        let mut svg = Svg::new(&self.id, width, &self.title, &self.desc);
        let entries: Vec<Entry<'_>> = self
            .series
            .iter()
            .map(|series| Entry {
                text: series.name.clone(),
                sign: Box::new(move |svg, x, y| {
                    svg.line(
                        &format!("line {}", mode_class(Some(series.mode))),
                        (x, y),
                        (x + SIGN, y),
                    );
                    svg.marker(series.mode, (x + SIGN / 2.0, y), false, "");
                }),
            })
            .collect();
        let mut top = legend(&mut svg, &entries);
        top += TEXT + 4.0;
        svg.text("label", (0.0, top), Anchor::Start, &self.y.label);
        top += 14.0;

        let left = self
            .y
            .ticks
            .iter()
            .map(|(_, text)| text_width(text))
            .fold(0.0, f64::max)
            + 10.0;
        let right = width
            - self
                .x
                .ticks
                .last()
                .map_or(12.0, |(_, text)| text_width(text) / 2.0 + 4.0)
                .max(12.0);
        let bottom = top + if width > super::NARROW { 270.0 } else { 220.0 };
        let scale = |axis: &Axis, range| {
            let ends = (
                axis.ticks.first().map_or(0.0, |t| t.0),
                axis.ticks.last().map_or(1.0, |t| t.0),
            );
            Scale::new(axis.log, ends, range)
        };
        let x = scale(&self.x, (left, right));
        let y = scale(&self.y, (bottom, top));

        for (value, text) in &self.y.ticks {
            let at = y.at(*value);
            svg.line(
                if at < bottom - 0.5 { "grid" } else { "axis" },
                (left, at),
                (right, at),
            );
            svg.text("tick", (left - 6.0, at + 4.5), Anchor::End, text);
        }
        let labels: Vec<(f64, String)> = self
            .x
            .ticks
            .iter()
            .map(|(value, text)| (x.at(*value), text.clone()))
            .collect();
        for ((at, text), shown) in labels.iter().zip(fitting(&labels)) {
            svg.line("axis", (*at, bottom), (*at, bottom + 5.0));
            if shown {
                svg.text("tick", (*at, bottom + 20.0), Anchor::Middle, text);
            }
        }
        svg.text("label", (right, bottom + 40.0), Anchor::End, &self.x.label);

        for series in self.series.iter().filter(|series| series.band.len() > 1) {
            let mut d = String::new();
            let there = series.band.iter().map(|(at, low, _)| (at, low));
            let back = series.band.iter().rev().map(|(at, _, high)| (at, high));
            for (i, (at, value)) in there.chain(back).enumerate() {
                let _ = write!(
                    d,
                    "{}{} {}",
                    if i == 0 { 'M' } else { 'L' },
                    px(x.at(*at)),
                    px(y.at(*value))
                );
            }
            d.push('Z');
            svg.path(&format!("band {}", mode_class(Some(series.mode))), &d);
        }
        for series in &self.series {
            let mut d = String::new();
            for (i, (at, value)) in series.points.iter().enumerate() {
                let _ = write!(
                    d,
                    "{}{} {}",
                    if i == 0 { 'M' } else { 'L' },
                    px(x.at(*at)),
                    px(y.at(*value))
                );
            }
            if series.points.len() > 1 {
                svg.path(&format!("line {}", mode_class(Some(series.mode))), &d);
            }
        }
        for series in &self.series {
            for ((at, value), hint) in series.points.iter().zip(&series.hints) {
                if !hint.is_empty() {
                    svg.marker(series.mode, (x.at(*at), y.at(*value)), false, hint);
                }
            }
        }
        svg.finish(bottom + 48.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_plot() {
        let series = |mode: Mode, points: &[(f64, f64)]| Series {
            mode,
            name: mode.name().to_owned(),
            points: points.to_vec(),
            band: points.iter().map(|(x, y)| (*x, y / 2.0, y * 2.0)).collect(),
            hints: points.iter().map(|(x, y)| format!("{x}: {y}")).collect(),
        };
        let tick = |v: f64| (v, v.to_string());
        let plot = LinePlot {
            id: "a plot".to_owned(),
            title: "Cost <against> Services".to_owned(),
            desc: "One line grows.".to_owned(),
            x: Axis {
                label: "Services".to_owned(),
                log: false,
                ticks: vec![tick(0.0), tick(100.0)],
            },
            y: Axis {
                label: "cost".to_owned(),
                log: true,
                ticks: vec![tick(1.0), tick(10.0), tick(100.0)],
            },
            series: vec![
                series(Mode::IptablesLegacy, &[(10.0, 5.0), (100.0, 50.0)]),
                series(Mode::Ipvs, &[(10.0, 5.0)]),
            ],
        };
        insta::assert_snapshot!(plot.draw(super::super::NARROW).replace("><", ">\n<"));
    }
}
