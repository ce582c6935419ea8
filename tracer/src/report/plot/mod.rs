//! The plots of the HTML report as inline SVG, drawn from plain numbers.
//!
//! A plot is drawn twice, for wide and for narrow windows, so that text is never scaled. Colours
//! are CSS classes of the page (one a mode), so a plot follows the page from light to dark.

pub mod bars;
pub mod dots;
pub mod lines;
pub mod timeline;

use std::fmt::Write as _;

use super::units;
use crate::rules::Mode;

/// Widths of the two drawings in CSS pixels.
pub const WIDE: f64 = 820.0;
/// See [`WIDE`].
pub const NARROW: f64 = 350.0;

/// Height of text and about how wide one of its characters is.
pub(super) const TEXT: f64 = 13.0;
const CHARACTER: f64 = 6.7;

/// Text as it may stand in HTML and SVG, in content and in attributes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Control characters have no place in XML, not even escaped.
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// About how wide a text is.
pub(super) fn text_width(text: &str) -> f64 {
    text.chars().count() as f64 * CHARACTER
}

/// About how wide a text in bold is.
pub(super) fn bold_width(text: &str) -> f64 {
    text_width(text) * 1.2
}

/// A coordinate: a tenth of a pixel is enough, and short.
fn px(value: f64) -> String {
    units::trimmed(value, 1)
}

/// Where a text is anchored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// An SVG under construction.
pub(super) struct Svg {
    pub(super) width: f64,
    id: String,
    title: String,
    desc: String,
    body: String,
}

impl Svg {
    /// `id` must be unique on the page, `title` and `desc` say what is seen for those who cannot.
    pub(super) fn new(id: &str, width: f64, title: &str, desc: &str) -> Self {
        // Identifiers are made from names of a run's file: only what an identifier may hold stays.
        let id = id.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        Self {
            width,
            id: format!("{id}-{}", if width > NARROW { "w" } else { "n" }),
            title: title.to_owned(),
            desc: desc.to_owned(),
            body: String::new(),
        }
    }

    pub(super) fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let _ = write!(
            self.body,
            "<path class=\"{class}\" d=\"M{} {}L{} {}\"/>",
            px(from.0),
            px(from.1),
            px(to.0),
            px(to.1)
        );
    }

    pub(super) fn path(&mut self, class: &str, d: &str) {
        let _ = write!(self.body, "<path class=\"{class}\" d=\"{d}\"/>");
    }

    pub(super) fn rect(&mut self, class: &str, at: (f64, f64), size: (f64, f64), hint: &str) {
        let shape = format!(
            "<rect class=\"{class}\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"",
            px(at.0),
            px(at.1),
            px(size.0.max(0.0)),
            px(size.1.max(0.0))
        );
        if hint.is_empty() {
            let _ = write!(self.body, "{shape}/>");
        } else {
            let _ = write!(self.body, "{shape}><title>{}</title></rect>", escape(hint));
        }
    }

    pub(super) fn text(&mut self, class: &str, at: (f64, f64), anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let _ = write!(
            self.body,
            "<text class=\"{class}\" x=\"{}\" y=\"{}\"{anchor}>{}</text>",
            px(at.0),
            px(at.1),
            escape(text)
        );
    }

    /// A mode's marker: each has its own shape, so that colour is never needed to tell them apart.
    pub(super) fn marker(&mut self, mode: Mode, at: (f64, f64), hollow: bool, hint: &str) {
        let (x, y) = at;
        let shape = match mode {
            Mode::IptablesLegacy => format!("<circle cx=\"{}\" cy=\"{}\" r=\"4.5\"", px(x), px(y)),
            Mode::IptablesNft => format!("<path d=\"M{} {}h8v8h-8z\"", px(x - 4.0), px(y - 4.0)),
            Mode::Ipvs => format!("<path d=\"M{} {}l5.2 9h-10.4z\"", px(x), px(y - 5.6)),
            Mode::Nftables => format!(
                "<path d=\"M{} {}l5.5 5.5l-5.5 5.5l-5.5 -5.5z\"",
                px(x),
                px(y - 5.5)
            ),
        };
        let class = format!(
            "{} {}",
            if hollow { "hollow" } else { "dot" },
            mode_class(Some(mode))
        );
        let hint = if hint.is_empty() {
            String::new()
        } else {
            format!("<title>{}</title>", escape(hint))
        };
        let tag = if shape.starts_with("<circle") {
            "circle"
        } else {
            "path"
        };
        let _ = write!(self.body, "{shape} class=\"{class}\">{hint}</{tag}>");
    }

    /// Opens a group of a class.
    pub(super) fn open(&mut self, class: &str) {
        let _ = write!(self.body, "<g class=\"{class}\">");
    }

    /// Closes the group.
    pub(super) fn close(&mut self) {
        self.body.push_str("</g>");
    }

    /// The finished element, `height` pixels high.
    pub(super) fn finish(self, height: f64) -> String {
        let Self {
            width,
            id,
            title,
            desc,
            body,
        } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" aria-labelledby=\"{id}-t {id}-d\" viewBox=\"0 0 {w} {h}\" width=\"{w}\" height=\"{h}\"><title id=\"{id}-t\">{}</title><desc id=\"{id}-d\">{}</desc>{body}</svg>",
            escape(&title),
            escape(&desc),
            w = px(width),
            h = px(height),
        )
    }
}

/// The class that carries a mode's colour and dash; that of several modes together has none.
pub(super) const fn mode_class(mode: Option<Mode>) -> &'static str {
    match mode {
        Some(Mode::IptablesLegacy) => "m-legacy",
        Some(Mode::IptablesNft) => "m-nft",
        Some(Mode::Ipvs) => "m-ipvs",
        Some(Mode::Nftables) => "m-nftables",
        None => "m-none",
    }
}

/// Draws a legend's sign from its left end, at its middle height.
pub(super) type Sign<'a> = Box<dyn Fn(&mut Svg, f64, f64) + 'a>;

/// One entry of a legend: how wide its sign is, what it says.
pub(super) struct Entry<'a> {
    pub(super) text: String,
    pub(super) sign: Sign<'a>,
}

/// Width of a legend's sign.
pub(super) const SIGN: f64 = 30.0;

/// Draws a legend from the top; returns its height. What does not fit one row stands in columns,
/// as even as possible.
pub(super) fn legend(svg: &mut Svg, entries: &[Entry<'_>]) -> f64 {
    let widths: Vec<f64> = entries
        .iter()
        .map(|entry| SIGN + 6.0 + text_width(&entry.text) + 18.0)
        .collect();
    let one_row = widths.iter().sum::<f64>() - 18.0 <= svg.width;
    let column = widths.iter().copied().fold(1.0, f64::max);
    let mut rows = 1;
    if !one_row {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a small positive number of columns"
        )]
        let fit = (((svg.width + 18.0) / column).floor() as usize).max(1);
        rows = entries.len().div_ceil(fit);
    }
    let columns = entries.len().div_ceil(rows).max(1);
    let mut x = 0.0;
    let mut y = 12.0;
    for (i, (entry, width)) in entries.iter().zip(&widths).enumerate() {
        if i > 0 && i % columns == 0 {
            x = 0.0;
            y += 20.0;
        }
        (entry.sign)(svg, x, y);
        svg.text(
            "label",
            (x + SIGN + 6.0, y + 4.5),
            Anchor::Start,
            &entry.text,
        );
        x += if one_row { *width } else { column };
    }
    y + 12.0
}

/// How values become pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Scale {
    log: bool,
    from: f64,
    to: f64,
    start: f64,
    end: f64,
}

impl Scale {
    pub(super) fn new(log: bool, domain: (f64, f64), range: (f64, f64)) -> Self {
        let (from, mut to) = domain;
        // A domain without extent would divide by zero.
        if to <= from {
            to = if log { from * 10.0 } else { from + 1.0 };
        }
        Self {
            log,
            from,
            to,
            start: range.0,
            end: range.1,
        }
    }

    pub(super) fn at(&self, value: f64) -> f64 {
        let share = if self.log {
            (value.max(self.from) / self.from).log10() / (self.to / self.from).log10()
        } else {
            (value - self.from) / (self.to - self.from)
        };
        self.start + share.clamp(0.0, 1.0) * (self.end - self.start)
    }
}

/// Round values that cut 0..=`max` into about `parts`; the last is at least `max`.
pub(super) fn linear_ticks(max: f64, parts: u32) -> Vec<f64> {
    if max <= 0.0 || !max.is_finite() {
        return vec![0.0, 1.0];
    }
    let rough = max / f64::from(parts.max(1));
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0]
        .into_iter()
        .map(|m| m * power)
        .find(|step| *step >= rough * 0.999)
        .unwrap_or(power * 10.0);
    let mut ticks = vec![0.0];
    let mut i = 0.0;
    while ticks[ticks.len() - 1] < max * 0.999 {
        i += 1.0;
        ticks.push(i * step);
    }
    ticks
}

/// Round values around `min`..=`max` for a logarithmic axis: 1, 2, 5 a decade, or the decades
/// alone when there are many.
pub(super) fn log_ticks(min: f64, max: f64) -> Vec<f64> {
    let min = min.max(1.0);
    let max = max.max(min * 1.01);
    let decades = (max / min).log10();
    let steps: &[f64] = if decades > 3.0 {
        &[1.0]
    } else {
        &[1.0, 2.0, 5.0]
    };
    let mut all = Vec::new();
    let mut power = 10_f64.powf(min.log10().floor());
    while power <= max * 10.0 {
        all.extend(steps.iter().map(|step| step * power));
        power *= 10.0;
    }
    let first = all.iter().rposition(|tick| *tick <= min).unwrap_or(0);
    let last = all
        .iter()
        .position(|tick| *tick >= max)
        .unwrap_or(all.len() - 1);
    all[first..=last].to_vec()
}

/// The labels that fit beside each other, the last first: it says where the axis ends.
pub(super) fn fitting(labels: &[(f64, String)]) -> Vec<bool> {
    let mut shown = vec![false; labels.len()];
    let mut taken: Vec<(f64, f64)> = Vec::new();
    let order =
        std::iter::once(labels.len().saturating_sub(1)).chain(0..labels.len().saturating_sub(1));
    for i in order {
        let Some((x, text)) = labels.get(i) else {
            continue;
        };
        let half = text_width(text) / 2.0 + 4.0;
        if taken
            .iter()
            .all(|(from, to)| x + half < *from || x - half > *to)
        {
            taken.push((x - half, x + half));
            shown[i] = true;
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        assert_eq!(escape("a<b>&\"'\u{0}"), "a&lt;b&gt;&amp;&quot;&#39; ");
    }

    #[test]
    fn ticks_are_round_and_cover() {
        assert_eq!(
            linear_ticks(127_500.0, 5),
            [0.0, 50_000.0, 100_000.0, 150_000.0]
        );
        assert_eq!(linear_ticks(4.0, 4), [0.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(linear_ticks(0.0, 4), [0.0, 1.0]);
        assert_eq!(log_ticks(2_700.0, 66_000.0), [2e3, 5e3, 1e4, 2e4, 5e4, 1e5]);
        assert_eq!(
            log_ticks(3.0, 2e6),
            [1.0, 10.0, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7]
        );
    }

    #[test]
    fn labels_that_would_overlap_are_left_out() {
        let labels: Vec<(f64, String)> = [
            (0.0, "100"),
            (8.0, "200"),
            (100.0, "1,000"),
            (110.0, "2,000"),
        ]
        .map(|(x, s)| (x, s.to_owned()))
        .to_vec();
        assert_eq!(fitting(&labels), [true, false, false, true]);
        assert!(fitting(&[]).is_empty());
    }

    #[test]
    fn scales_without_extent_do_not_divide_by_zero() {
        let scale = Scale::new(false, (5.0, 5.0), (0.0, 100.0));
        assert!(scale.at(5.0).is_finite());
        let scale = Scale::new(true, (1.0, 1000.0), (0.0, 300.0));
        assert!((scale.at(10.0) - 100.0).abs() < 1e-9);
    }
}
