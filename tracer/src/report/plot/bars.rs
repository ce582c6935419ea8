//! Stacked bars: where one packet's time goes, stage by stage.

use super::{
    Anchor, Entry, NARROW, SIGN, Scale, Svg, TEXT, fitting, legend, linear_ticks, mode_class,
    text_width,
};
use crate::rules::Mode;

/// What a stage is there for. Stages of one kind share a shade, so that few shades do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Translating a Service's address: the checks before dnat, dnat, ipvs, snat.
    Service,
    /// Connection tracking: conntrack, helper, confirm.
    Conntrack,
    /// Tables that only look: raw, mangle, filter.
    Filter,
    /// Routing and everything else.
    Rest,
}

impl Kind {
    /// In the order of the bars.
    pub const ALL: [Self; 4] = [Self::Service, Self::Conntrack, Self::Filter, Self::Rest];

    /// The kind of a stage by its name and mode.
    pub fn of(stage: &str, mode: Option<Mode>) -> Self {
        match stage {
            // Other modes have that boundary too, but no IPVS behind it.
            "ipvs" if mode.is_some_and(|mode| mode != Mode::Ipvs) => Self::Rest,
            "pre-dnat" | "dnat" | "ipvs" | "snat" => Self::Service,
            "conntrack" | "confirm" | "helper" => Self::Conntrack,
            "raw" | "mangle" | "filter" => Self::Filter,
            _ => Self::Rest,
        }
    }

    /// What the legend says.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Service => "dnat, ipvs, snat (in colour)",
            Self::Conntrack => "conntrack, helper, confirm",
            Self::Filter => "raw, mangle, filter",
            Self::Rest => "routing, egress, the rest",
        }
    }

    const fn class(self) -> &'static str {
        match self {
            Self::Service => "k-service",
            Self::Conntrack => "k-conntrack",
            Self::Filter => "k-filter",
            Self::Rest => "k-rest",
        }
    }
}

/// One stage's part of a bar.
#[derive(Clone, Debug)]
pub struct Segment {
    /// The stage.
    pub name: String,
    /// Its share of the whole, in the axis' unit.
    pub value: f64,
    /// Its shade.
    pub kind: Kind,
    /// Its value as text.
    pub written: String,
}

/// One bar: a mode's, or a path's.
#[derive(Clone, Debug)]
pub struct Bar {
    /// In whose colour it stands; `None`: in none's.
    pub mode: Option<Mode>,
    /// What stands before it.
    pub label: String,
    /// From left to right.
    pub segments: Vec<Segment>,
    /// The sum as text.
    pub total: String,
}

impl Bar {
    /// A bar of stages and their values: those of one name together, whatever the hook. `None` if there are
    /// none.
    pub fn of_stages<'a>(
        mode: Option<Mode>,
        label: &str,
        stages: impl Iterator<Item = (&'a str, f64)>,
        written: impl Fn(f64) -> String,
    ) -> Option<Self> {
        let mut segments: Vec<Segment> = Vec::new();
        for (name, value) in stages {
            let mut known = segments.iter_mut();
            match known.find(|segment| segment.name == name) {
                Some(segment) => segment.value += value,
                None => segments.push(Segment {
                    name: name.to_owned(),
                    value,
                    kind: Kind::of(name, mode),
                    written: String::new(),
                }),
            }
        }
        if segments.is_empty() {
            return None;
        }
        for segment in &mut segments {
            segment.written = written(segment.value);
        }
        segments.sort_by_key(|segment| segment.kind);
        let total: f64 = segments.iter().map(|segment| segment.value).sum();
        Some(Self {
            mode,
            label: label.to_owned(),
            segments,
            total: written(total),
        })
    }
}

/// A plot of stacked bars.
#[derive(Clone, Debug)]
pub struct BarPlot {
    /// Unique on the page.
    pub id: String,
    /// What it shows.
    pub title: String,
    /// What is seen, in words.
    pub desc: String,
    /// What stands above the bars.
    pub heading: String,
    /// With a legend? One is enough for plots that stand together.
    pub legend: bool,
    /// What the axis counts.
    pub label: String,
    /// From top to bottom.
    pub bars: Vec<Bar>,
}

const BAR: f64 = 26.0;

impl BarPlot {
    /// The plot as SVG, `width` pixels wide; `tick` writes a value of the axis.
    pub fn draw(&self, width: f64, tick: &dyn Fn(f64) -> String) -> String {
        let mut svg = Svg::new(&self.id, width, &self.title, &self.desc);
        let entries: Vec<Entry<'_>> = Kind::ALL
            .into_iter()
            .filter(|kind| {
                self.bars
                    .iter()
                    .any(|bar| bar.segments.iter().any(|s| s.kind == *kind))
            })
            .map(|kind| Entry {
                text: kind.title().to_owned(),
                sign: Box::new(move |svg, x, y| {
                    if kind == Kind::Service {
                        let part = SIGN / self.bars.len() as f64;
                        for (i, bar) in self.bars.iter().enumerate() {
                            svg.rect(
                                &format!("seg {} {}", kind.class(), mode_class(bar.mode)),
                                (x + part * i as f64, y - 7.0),
                                (part, 14.0),
                                "",
                            );
                        }
                    } else {
                        svg.rect(
                            &format!("seg {}", kind.class()),
                            (x, y - 7.0),
                            (SIGN, 14.0),
                            "",
                        );
                    }
                }),
            })
            .collect();
        let mut y = if self.legend {
            legend(&mut svg, &entries) + 6.0
        } else {
            2.0
        };
        y += TEXT;
        svg.text("label strong", (0.0, y), Anchor::Start, &self.heading);
        y += 12.0;

        let narrow = width <= NARROW;
        // Narrow windows have the mode's name above its bar.
        let left = if narrow {
            0.0
        } else {
            self.bars
                .iter()
                .map(|bar| text_width(&bar.label))
                .fold(0.0, f64::max)
                + 10.0
        };
        let totals = self
            .bars
            .iter()
            .map(|bar| text_width(&bar.total))
            .fold(0.0, f64::max);
        let sum = |bar: &Bar| {
            bar.segments
                .iter()
                .map(|segment| segment.value)
                .sum::<f64>()
        };
        let longest = self.bars.iter().map(sum).fold(0.0, f64::max);
        let ticks = linear_ticks(longest, if narrow { 3 } else { 5 });
        let end = width - totals - 10.0;
        let x = Scale::new(false, (0.0, longest), (left, end));
        let row = if narrow {
            BAR + TEXT + 14.0
        } else {
            BAR + 10.0
        };
        let bottom = y + row * self.bars.len() as f64;

        let labels: Vec<(f64, String)> = ticks
            .iter()
            .filter(|v| **v <= longest)
            .map(|v| (x.at(*v), tick(*v)))
            .collect();
        for ((at, text), shown) in labels.iter().zip(fitting(&labels)) {
            // In narrow windows the modes' names stand where the line at 0 would.
            if *at > left {
                svg.line("grid", (*at, y - 4.0), (*at, bottom));
            } else if !narrow {
                svg.line("axis", (*at, y - 4.0), (*at, bottom));
            }
            if shown {
                let anchor = if *at > left + 8.0 || !narrow {
                    Anchor::Middle
                } else {
                    Anchor::Start
                };
                svg.text("tick", (*at, bottom + 16.0), anchor, text);
            }
        }
        svg.text("label", (end, bottom + 36.0), Anchor::End, &self.label);

        for bar in &self.bars {
            let top = if narrow { y + TEXT + 6.0 } else { y };
            if narrow {
                svg.text("label", (left, y + TEXT), Anchor::Start, &bar.label);
            } else {
                svg.text(
                    "label",
                    (left - 8.0, top + BAR / 2.0 + 4.5),
                    Anchor::End,
                    &bar.label,
                );
            }
            let mut from = 0.0;
            for segment in &bar.segments {
                let (a, b) = (x.at(from), x.at(from + segment.value));
                from += segment.value;
                let hint = format!("{}: {} {}", bar.label, segment.name, segment.written);
                svg.rect(
                    &format!("seg {} {}", segment.kind.class(), mode_class(bar.mode)),
                    (a, top),
                    (b - a, BAR),
                    &hint,
                );
                let long = format!("{} {}", segment.name, segment.written);
                let written = [&long, &segment.name]
                    .into_iter()
                    .find(|text| text_width(text) + 6.0 < b - a);
                if let Some(text) = written {
                    svg.text(
                        &format!("in {} {}", segment.kind.class(), mode_class(bar.mode)),
                        (f64::midpoint(a, b), top + BAR / 2.0 + 4.5),
                        Anchor::Middle,
                        text,
                    );
                }
            }
            svg.text(
                "tick strong",
                (x.at(from) + 6.0, top + BAR / 2.0 + 4.5),
                Anchor::Start,
                &bar.total,
            );
            y += row;
        }
        svg.finish(bottom + 44.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_have_their_kind() {
        assert_eq!(Kind::of("dnat", Some(Mode::Ipvs)), Kind::Service);
        assert_eq!(Kind::of("ipvs", Some(Mode::Ipvs)), Kind::Service);
        assert_eq!(Kind::of("ipvs", Some(Mode::Nftables)), Kind::Rest);
        assert_eq!(Kind::of("confirm", Some(Mode::Ipvs)), Kind::Conntrack);
        assert_eq!(Kind::of("filter", Some(Mode::Ipvs)), Kind::Filter);
        assert_eq!(Kind::of("something new", Some(Mode::Ipvs)), Kind::Rest);
    }

    #[test]
    fn a_small_plot() {
        let segment = |name: &str, value: f64| Segment {
            name: name.to_owned(),
            value,
            kind: Kind::of(name, Some(Mode::Nftables)),
            written: value.to_string(),
        };
        let plot = BarPlot {
            id: "bars".to_owned(),
            title: "Stages".to_owned(),
            desc: "One bar.".to_owned(),
            heading: "First packet".to_owned(),
            legend: true,
            label: "instructions".to_owned(),
            bars: vec![Bar {
                mode: Some(Mode::Nftables),
                label: "nftables".to_owned(),
                segments: vec![
                    segment("dnat", 300.0),
                    segment("conntrack", 600.0),
                    segment("raw", 9.0),
                ],
                total: "909".to_owned(),
            }],
        };
        insta::assert_snapshot!(plot.draw(NARROW, &|v| v.to_string()).replace("><", ">\n<"));
    }
}
