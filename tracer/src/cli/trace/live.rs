//! The table on a terminal: the busiest Services while a session lasts.

use std::time::{Duration, Instant};

use tracer::record::run::Clock;
use tracer::report::quantile::quantile;
use tracer::report::units;
use tracer::report::write::printable;
use tracer::trace::changes::RuleChange;
use tracer::trace::directory::Known;
use tracer::trace::session::{Session, TraceError};
use tracer::trace::summary::mode_of;
use tracer::trace::tally::Tally;
use tracer::trace::verdict::Verdict;

/// How often it is drawn anew.
const REDRAW: Duration = Duration::from_secs(1);
/// What a terminal is taken for that does not tell its size: columns and rows.
const USUAL: (usize, usize) = (80, 24);

/// What the table shows.
#[derive(Clone, Debug)]
struct View {
    clock: Clock,
    /// Since the session began.
    elapsed: Duration,
    /// New flows of all Services a second.
    rate: f64,
    /// Records that the probes lost.
    lost: u64,
    /// The last rule change: how long ago, and what it was.
    change: Option<(Duration, String)>,
    /// Services with flows, the busiest first.
    rows: Vec<Row>,
}

/// One Service.
#[derive(Clone, Debug)]
struct Row {
    service: String,
    mode: String,
    /// New flows a second.
    rate: f64,
    /// First packets' median and 99th percentile on the node, ns.
    times: Option<(u64, u64)>,
    drops: u64,
    repeated: u64,
    /// New flows that went wrong by how, the most first.
    wrong: Vec<(&'static str, u64)>,
}

/// A table that is drawn over itself.
pub(super) struct Live {
    begun: Instant,
    drawn_at: Instant,
    /// How long each line is that stands on the terminal now.
    drawn: Vec<usize>,
    /// New flows of each Service when it was drawn last.
    flows: Vec<u64>,
    change: Option<(Instant, String)>,
}

impl Live {
    /// For a session that began so long ago.
    pub(super) fn new(elapsed: Duration) -> Self {
        let now = Instant::now();
        let begun = now.checked_sub(elapsed).unwrap_or(now);
        Self {
            begun,
            drawn_at: begun,
            drawn: Vec::new(),
            flows: Vec::new(),
            change: None,
        }
    }

    pub(super) fn heard(&mut self, change: &RuleChange) {
        self.change = Some((Instant::now(), printable(&change.to_string())));
    }

    /// What draws the table over the one before, if it is time.
    pub(super) fn draw(&mut self, clock: Clock, session: &Session) -> Result<String, TraceError> {
        let since = self.drawn_at.elapsed();
        if since < REDRAW {
            return Ok(String::new());
        }
        let view = self.view(clock, session, since)?;
        self.drawn_at = Instant::now();
        let (width, height) = size();
        let mut text = self.clear();
        for line in render(&view, width, height) {
            self.drawn.push(length(&line));
            text += &line;
            text.push('\n');
        }
        Ok(text)
    }

    /// What takes the table off the terminal (ECMA-48: CPL, ED). Lines that a narrower window has
    /// broken take more rows than one.
    pub(super) fn clear(&mut self) -> String {
        let (width, _) = size();
        let rows: usize = std::mem::take(&mut self.drawn)
            .into_iter()
            .map(|length| length.div_ceil(width).max(1))
            .sum();
        if rows == 0 {
            return String::new();
        }
        format!("\x1b[{rows}F\x1b[J")
    }

    fn view(
        &mut self,
        clock: Clock,
        session: &Session,
        since: Duration,
    ) -> Result<View, TraceError> {
        let seconds = since.as_secs_f64();
        let tallies = session.tallies();
        self.flows.resize(tallies.len(), 0);
        let mut busiest: Vec<(usize, &Tally)> = tallies.iter().enumerate().collect();
        busiest.retain(|(_, tally)| tally.flows > 0 || tally.drops() > 0);
        busiest.sort_by_key(|(index, tally)| (std::cmp::Reverse(tally.flows), *index));
        let rate = |index: usize, tally: &Tally| {
            let before = self.flows.get(index).copied().unwrap_or(0);
            tally.flows.saturating_sub(before) as f64 / seconds
        };
        let rows = busiest
            .iter()
            .map(|(index, tally)| {
                let known = session.directory().get(*index);
                let times = tally.node.histogram();
                Row {
                    service: printable(known.map_or("", |known| &known.name)),
                    mode: known.map_or("", |known| mode(known, tally)).to_owned(),
                    rate: rate(*index, tally),
                    times: quantile(&times, 0.5).zip(quantile(&times, 0.99)),
                    drops: tally.drops(),
                    repeated: tally.repeated,
                    wrong: wrong(tally),
                }
            })
            .collect();
        let all = tallies.iter().enumerate();
        let view = View {
            clock,
            elapsed: self.begun.elapsed(),
            rate: all.map(|(index, tally)| rate(index, tally)).sum(),
            lost: session.lost()?,
            change: self
                .change
                .as_ref()
                .map(|(at, change)| (at.elapsed(), change.clone())),
            rows,
        };
        for (before, tally) in self.flows.iter_mut().zip(tallies) {
            *before = tally.flows;
        }
        Ok(view)
    }
}

/// The mode that translates a Service's flows, as far as there is one.
fn mode<'s>(known: &'s Known, tally: &'s Tally) -> &'s str {
    let translated = tally.translated.keys().copied();
    mode_of(known.mode, !known.by_mode.is_empty(), translated)
}

/// New flows that went wrong, by one word, the most first.
fn wrong(tally: &Tally) -> Vec<(&'static str, u64)> {
    let mut wrong: Vec<(&'static str, u64)> = Vec::new();
    let bad = |(verdict, _): &(&Verdict, &u64)| verdict.is_bad();
    for (end, count) in tally.verdicts.iter().filter(bad) {
        match wrong.iter_mut().find(|(word, _)| *word == end.word()) {
            Some((_, sum)) => *sum += count,
            None => wrong.push((end.word(), *count)),
        }
    }
    wrong.sort_by_key(|(word, count)| (std::cmp::Reverse(*count), *word));
    wrong
}

/// Columns and rows of the terminal.
fn size() -> (usize, usize) {
    terminal_size::terminal_size_of(std::io::stdout()).map_or(USUAL, |(width, height)| {
        // Some terminals say 0 for what they do not know.
        let known = |n: u16, usual: usize| if n == 0 { usual } else { usize::from(n) };
        (known(width.0, USUAL.0), known(height.0, USUAL.1))
    })
}

/// Characters of a line, of which each takes one column.
fn length(line: &str) -> usize {
    line.chars().count()
}

/// A text that is not longer than this.
fn cut(text: &str, most: usize) -> String {
    if length(text) <= most {
        return text.to_owned();
    }
    let kept: String = text.chars().take(most.saturating_sub(1)).collect();
    if most == 0 { kept } else { kept + "…" }
}

/// A column beside the Service's name and what went wrong.
struct Column {
    title: &'static str,
    width: usize,
    cell: fn(&Row, Clock) -> String,
}

/// From left to right.
const COLUMNS: [Column; 6] = [
    Column {
        title: "mode",
        width: 17,
        cell: |row, _| row.mode.clone(),
    },
    Column {
        title: "new flows/s",
        width: 12,
        cell: |row, _| format!("{:.1}", row.rate),
    },
    Column {
        title: "p50",
        width: 10,
        cell: |row, clock| time(clock, row.times.map(|times| times.0)),
    },
    Column {
        title: "p99",
        width: 10,
        cell: |row, clock| time(clock, row.times.map(|times| times.1)),
    },
    Column {
        title: "drops",
        width: 8,
        cell: |row, _| units::count(row.drops),
    },
    Column {
        title: "repeated",
        width: 10,
        cell: |row, _| units::count(row.repeated),
    },
];

/// In which order columns go when there is no room for all.
const FIRST_TO_GO: [usize; 6] = [0, 5, 4, 2, 3, 1];

/// What a Service's name gets at least and at most, and what went wrong at least.
const NAME: (usize, usize) = (12, 44);
const WRONG: usize = 13;

fn time(clock: Clock, ns: Option<u64>) -> String {
    ns.map_or_else(|| "–".to_owned(), |ns| units::cost_u64(clock, ns))
}

/// The table as lines, none longer than the terminal is wide, and one fewer than it is high.
fn render(view: &View, width: usize, height: usize) -> Vec<String> {
    // A character in the last column makes some terminals go to the next line.
    let width = width.saturating_sub(1);
    let mut lines = vec![cut(&head(view), width)];
    // The table's header, at least one row, and the line below, on which the cursor stands.
    let room = height.saturating_sub(3);
    if view.rows.is_empty() || room == 0 {
        return lines;
    }
    let shown = if view.rows.len() > room {
        room - 1
    } else {
        room
    };
    let rows = &view.rows[..view.rows.len().min(shown)];
    let longest = rows.iter().map(|row| length(&row.service)).max();
    // Two fifths of the width leave room for figures.
    let most = (width * 2 / 5).clamp(NAME.0, NAME.1);
    let name = longest.unwrap_or(0).clamp(NAME.0, most);
    let mut columns = [true; COLUMNS.len()];
    let taken = |columns: &[bool]| -> usize {
        let kept = COLUMNS.iter().zip(columns).filter(|(_, kept)| **kept);
        name + WRONG + kept.map(|(column, _)| column.width).sum::<usize>()
    };
    for goes in FIRST_TO_GO {
        if taken(&columns) > width {
            columns[goes] = false;
        }
    }
    let kept = || {
        COLUMNS
            .iter()
            .zip(columns)
            .filter_map(|(c, kept)| kept.then_some(c))
    };
    let joined = |service: &str, cell: &dyn Fn(&Column) -> String, wrong: &str| {
        let cells: Vec<String> = kept()
            .map(|column| format!("{:>1$}", cell(column), column.width))
            .collect();
        let line = format!("{:<name$}{}  {wrong}", cut(service, name), cells.concat());
        cut(line.trim_end(), width)
    };
    let titles = |column: &Column| column.title.to_owned();
    lines.push(joined("Service", &titles, "went wrong"));
    for row in rows {
        let wrong: Vec<String> = row
            .wrong
            .iter()
            .map(|(word, count)| format!("{} {word}", units::count(*count)))
            .collect();
        let cells = |column: &Column| (column.cell)(row, view.clock);
        lines.push(joined(&row.service, &cells, &wrong.join(", ")));
    }
    if view.rows.len() > rows.len() {
        let more = format!("and {} more", view.rows.len() - rows.len());
        lines.push(cut(&more, width));
    }
    lines
}

/// `12 s · 530.0 new flows/s · 0 records lost · rules changed 4 s ago by ...`.
fn head(view: &View) -> String {
    let change = view.change.as_ref().map_or_else(
        || "no rule change".to_owned(),
        |(ago, what)| format!("rules changed {} s ago: {what}", ago.as_secs()),
    );
    format!(
        "{} s · {:.1} new flows/s · {} lost · {change}",
        view.elapsed.as_secs(),
        view.rate,
        units::plural(view.lost, "record", "records"),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn view() -> View {
        let row = |service: &str, rate, wrong: &[(&'static str, u64)]| Row {
            service: service.to_owned(),
            mode: "iptables-legacy".to_owned(),
            rate,
            times: Some((24_600, 41_000)),
            drops: 3,
            repeated: 12,
            wrong: wrong.to_vec(),
        };
        let mut quiet = row("kube-system/kube-dns:dns-tcp", 0.0, &[]);
        quiet.times = None;
        View {
            clock: Clock::Wall,
            elapsed: Duration::from_millis(12_345),
            rate: 532.1,
            lost: 0,
            change: Some((
                Duration::from_secs(4),
                "nft (pid 14849, parent sh, pid 14845) committed generation 3: ip kube-proxy -24 rules".to_owned(),
            )),
            rows: vec![
                row("shop/web:http", 530.0, &[("leaked", 1_204), ("dropped", 3)]),
                row("shop/a-service-with-a-name-that-is-longer-than-most:https", 2.1, &[]),
                quiet,
            ],
        }
    }

    fn drawn(width: usize, height: usize) -> String {
        render(&view(), width, height).join("\n")
    }

    #[test]
    fn a_wide_terminal() {
        insta::assert_snapshot!(drawn(140, 24));
    }

    #[test]
    fn a_usual_terminal() {
        insta::assert_snapshot!(drawn(80, 24));
    }

    #[test]
    fn a_small_terminal() {
        insta::assert_snapshot!(drawn(40, 5));
    }

    #[test]
    fn nothing_yet() {
        let mut view = view();
        view.rows.clear();
        view.change = None;
        let said = ["12 s · 532.1 new flows/s · 0 records lost · no rule change"];
        assert_eq!(render(&view, 80, 24), said);
    }

    proptest! {
        #[test]
        fn it_fits_any_terminal(width in 1_usize..200, height in 1_usize..60) {
            let lines = render(&view(), width, height);
            prop_assert!(lines.iter().all(|line| length(line) < width.max(1)), "{lines:#?}");
            prop_assert!(lines.len() < height.max(2), "{lines:#?}");
        }
    }

    #[test]
    fn what_a_narrower_window_has_broken_is_taken_off_as_well() {
        let mut live = Live::new(Duration::ZERO);
        assert_eq!(live.clear(), "");
        // Under a test there is no terminal: it is taken for one of 80 columns.
        live.drawn = vec![80, 0, 81, 200];
        assert_eq!(live.clear(), format!("\x1b[{}F\x1b[J", 1 + 1 + 2 + 3));
        assert_eq!(live.clear(), "", "it is gone");
    }
}
