//! A run as the terminal shows it.

use comfy_table::{CellAlignment, ContentArrangement, Table as Grid, presets};

use super::blocks::{Block, Table, Tone};
use super::write::printable;

const BOLD: &str = "\u{1b}[1m";
const DIM: &str = "\u{1b}[2m";
const RED: &str = "\u{1b}[31m";
const PLAIN: &str = "\u{1b}[0m";

/// A run's tables and findings, at most `width` columns wide where a table's own columns allow
/// it, with colour only if `colour`. Ends in a newline.
pub fn render(blocks: &[Block], width: u16, colour: bool) -> String {
    let width = usize::from(width.max(40));
    let mut out = String::new();
    for (i, block) in blocks.iter().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        match block {
            Block::Table(table) => grid(&mut out, table, width, colour),
            Block::Lines(lines) => {
                for (tone, line) in lines {
                    let line = printable(line);
                    let (paint, text) = match tone {
                        Tone::Plain => ("", line),
                        Tone::Quiet => (DIM, line),
                        Tone::Alarm => (RED, format!("warning: {line}")),
                    };
                    for (n, part) in wrapped(&text, width).iter().enumerate() {
                        let indent = if n == 0 { "" } else { "  " };
                        painted(&mut out, &format!("{indent}{part}"), paint, colour);
                    }
                }
            }
        }
    }
    out
}

fn painted(out: &mut String, line: &str, paint: &str, colour: bool) {
    if colour && !paint.is_empty() {
        out.push_str(paint);
        out.push_str(line);
        out.push_str(PLAIN);
    } else {
        out.push_str(line);
    }
    out.push('\n');
}

fn grid(out: &mut String, table: &Table, width: usize, colour: bool) {
    for line in wrapped(&table.title, width) {
        painted(out, &line, BOLD, colour);
    }
    let mut grid = Grid::new();
    grid.load_style(presets::NOTHING);
    // Columns of figures are never broken: a narrow terminal scrolls, a wrapped figure misleads.
    grid.set_content_arrangement(ContentArrangement::Disabled);
    grid.force_no_tty();
    grid.set_header(&table.header);
    grid.add_rows(&table.rows);
    for (i, column) in grid.column_iter_mut().enumerate() {
        column.set_padding((if i == 0 { 2 } else { 1 }, 1));
        if i > 0 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for line in grid.lines() {
        out.push_str(printable(&line).trim_end());
        out.push('\n');
    }
}

/// The words of a line; a unit stays with its figure.
fn words(text: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for word in text.split(' ') {
        let bare = word.trim_end_matches([',', ';', ')', ':', '.']);
        match words.last_mut() {
            Some(figure)
                if ["ns", "us", "ms", "s", "M", "G", "%"].contains(&bare)
                    && figure.ends_with(|c: char| c.is_ascii_digit()) =>
            {
                figure.push(' ');
                figure.push_str(word);
            }
            _ => words.push(word.to_owned()),
        }
    }
    words
}

/// Breaks a line at blanks so that each part fits; continued parts are indented by two.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in words(text) {
        let length = word.chars().count();
        let room = width - if lines.len() > 1 { 2 } else { 0 };
        if used > 0 && used + 1 + length > room {
            lines.push(String::new());
            used = 0;
        }
        let line = lines.last_mut().expect("there is always a line");
        if used > 0 {
            line.push(' ');
            used += 1;
        }
        line.push_str(&word);
        used += length;
        // Blanks that only align (place   vm) stay.
        if word.is_empty() && used == 0 {
            line.push(' ');
            used = 1;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::run::{Loss, Run, Verdict};
    use crate::report::blocks::summary;
    use crate::report::sample;

    fn rendered(run: &Run, width: u16, colour: bool) -> String {
        render(&summary(run), width, colour)
    }

    #[test]
    fn the_whole_comparison() {
        insta::assert_snapshot!(rendered(&sample::run(), 110, false));
    }

    #[test]
    fn a_host_without_ipvs() {
        insta::assert_snapshot!(rendered(&sample::host_run(), 80, false));
    }

    #[test]
    fn sizes_that_no_two_modes_share() {
        let mut run = sample::run();
        run.measurements.cells.retain(|cell| {
            (cell.mode == crate::rules::Mode::IptablesNft) == (cell.services == 2000)
        });
        insta::assert_snapshot!(rendered(&run, 110, false));
    }

    #[test]
    fn nothing_measured() {
        let mut run = sample::run();
        run.measurements.cells.clear();
        run.measurements.faults.clear();
        insta::assert_snapshot!(rendered(&run, 80, false));
    }

    #[test]
    fn doubts_are_shown_first() {
        let mut run = sample::run();
        run.measurements.cells.truncate(1);
        run.measurements.faults.clear();
        let cell = &mut run.measurements.cells[0];
        cell.paths[0].flows.delivered -= 2;
        cell.paths[0].flows.lost.push(Loss {
            verdict: Verdict::Reset,
            reason: None,
            stage: None,
            count: 2,
        });
        cell.probes.ring_lost = 5;
        let text = rendered(&run, 200, true);
        assert!(text.contains("\u{1b}[31mwarning: iptables-legacy 100, pod→ClusterIP: 2 of 1,000 flows were lost with no fault injected (2 reset)\u{1b}[0m\n"), "{text}");
        assert!(text.contains("5 ring records lost"), "{text}");
        assert!(
            !rendered(&run, 200, false).contains('\u{1b}'),
            "no colour unless asked for"
        );
    }

    #[test]
    fn lines_are_broken_at_blanks() {
        assert_eq!(wrapped("one two three", 8), ["one two", "three"]);
        assert_eq!(wrapped("unbreakable", 4), ["unbreakable"]);
        assert_eq!(wrapped("a   b", 9), ["a   b"]);
        assert_eq!(
            wrapped("outage 2.01 s, no more", 14),
            ["outage 2.01 s,", "no more"]
        );
    }
}
