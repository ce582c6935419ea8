//! How far a run is: a bar on a terminal, a line a finished job elsewhere.

use std::collections::BTreeMap;
use std::io::{IsTerminal, stderr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Progress over jobs of different weights, several of which may run at a time.
pub(crate) struct Progress {
    state: Mutex<State>,
    bar: ProgressBar,
    plain: bool,
    start: Instant,
}

struct State {
    /// Weight and fraction done, by job.
    jobs: BTreeMap<String, (f64, f64)>,
    finished: usize,
}

const STEPS: u64 = 1000;

impl Progress {
    /// For jobs given by their id and weight.
    pub(crate) fn new(jobs: impl Iterator<Item = (String, f64)>) -> Self {
        let plain = !stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            Some(STEPS),
            if plain {
                ProgressDrawTarget::hidden()
            } else {
                ProgressDrawTarget::stderr()
            },
        );
        if let Ok(style) = ProgressStyle::with_template("[{bar:26}]  {msg}") {
            bar.set_style(style.progress_chars("##-"));
        }
        let jobs = jobs.map(|(id, weight)| (id, (weight, 0.0))).collect();
        Self {
            state: Mutex::new(State { jobs, finished: 0 }),
            bar,
            plain,
            start: Instant::now(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A job has come this far and does `what`.
    pub(crate) fn update(&self, id: &str, fraction: f64, what: &str) {
        let done = {
            let mut state = self.state();
            if let Some((_, done)) = state.jobs.get_mut(id) {
                *done = done.max(fraction.clamp(0.0, 1.0));
            }
            state.fraction()
        };
        self.show(done, what);
    }

    /// A job has ended well.
    pub(crate) fn finish_job(&self, id: &str, title: &str) {
        self.update(id, 1.0, title);
        let mut state = self.state();
        state.finished += 1;
        if self.plain {
            eprintln!(
                "[{:>2}/{}]  {title} · {}",
                state.finished,
                state.jobs.len(),
                left(state.fraction(), self.start.elapsed())
            );
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a fraction of a thousand"
    )]
    fn show(&self, done: f64, what: &str) {
        self.bar.set_position((done * STEPS as f64) as u64);
        self.bar
            .set_message(format!("{what} · {}", left(done, self.start.elapsed())));
    }

    /// Nothing more to show.
    pub(crate) fn end(&self) {
        self.bar.finish_and_clear();
    }
}

impl State {
    fn fraction(&self) -> f64 {
        let all: f64 = self.jobs.values().map(|(weight, _)| weight).sum();
        let done: f64 = self.jobs.values().map(|(weight, done)| weight * done).sum();
        if all > 0.0 { done / all } else { 0.0 }
    }
}

/// How long it will take at the pace so far.
fn left(done: f64, elapsed: Duration) -> String {
    if done >= 1.0 {
        return format!("done in {}", span(elapsed.as_secs_f64()));
    }
    // So early the pace says nothing.
    if done < 0.02 {
        return "starting".to_owned();
    }
    let left = elapsed.as_secs_f64() * (1.0 - done) / done;
    format!("{} left", span(left))
}

fn span(seconds: f64) -> String {
    if seconds < 100.0 {
        format!("{seconds:.0} s")
    } else {
        format!("{:.0} min", seconds / 60.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heavy_jobs_count_for_more_and_fractions_never_go_back() {
        let progress = Progress::new([("a".to_owned(), 3.0), ("b".to_owned(), 1.0)].into_iter());
        progress.update("a", 0.5, "half");
        progress.update("a", 0.2, "an older line");
        assert!((progress.state().fraction() - 0.375).abs() < 1e-9);
        progress.finish_job("a", "a");
        assert!((progress.state().fraction() - 0.75).abs() < 1e-9);
    }

    #[test]
    fn time_left_follows_the_pace() {
        assert_eq!(left(0.25, Duration::from_secs(10)), "30 s left");
        assert_eq!(left(0.5, Duration::from_mins(10)), "10 min left");
        assert_eq!(left(0.0, Duration::from_secs(10)), "starting");
        assert_eq!(left(1.0, Duration::from_secs(41)), "done in 41 s");
    }
}
