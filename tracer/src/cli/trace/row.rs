//! Rule changes that one program makes in a row: the first is told at once, those that follow within a second together.

use tracer::report::bursts::Burst;
use tracer::trace::changes::RuleChange;

use super::crowd::WINDOW_NS;

/// Keeps those that are not told yet.
#[derive(Debug, Default)]
pub(super) struct Row {
    /// What was told last.
    told: Option<Burst>,
    /// What goes on with it, and since when that waits (`CLOCK_MONOTONIC`, ns).
    held: Option<(Burst, u64)>,
}

impl Row {
    /// What is to be told now that this change is heard of, at that time (`CLOCK_MONOTONIC`, ns).
    pub(super) fn part(&mut self, change: &RuleChange, now_ns: u64) -> Vec<Burst> {
        if let Some((held, _)) = &mut self.held {
            if held.takes(change) {
                return Vec::new();
            }
        } else if self.told.as_mut().is_some_and(|told| told.takes(change)) {
            self.held = Some((Burst::new(change), now_ns));
            return Vec::new();
        }
        let before = self.held.take().map(|(held, _)| held);
        let this = Burst::new(change);
        self.told = Some(this.clone());
        before.into_iter().chain([this]).collect()
    }

    /// What has waited for long enough at that time (`CLOCK_MONOTONIC`, ns).
    pub(super) fn over(&mut self, now_ns: u64) -> Option<Burst> {
        let over = |since_ns: u64| now_ns.saturating_sub(since_ns) >= WINDOW_NS;
        let (held, _) = self.held.take_if(|(_, since_ns)| over(*since_ns))?;
        self.told = Some(held.clone());
        Some(held)
    }
}

#[cfg(test)]
mod tests {
    use tracer::trace::changes::{Actor, SetDelta, What};

    use super::*;

    const MS: u64 = 1_000_000;

    fn change(program: &str, at_ms: u64) -> RuleChange {
        let delta = SetDelta {
            added: 1,
            ..SetDelta::default()
        };
        RuleChange {
            time_ns: at_ms * MS,
            begin_ns: Some(at_ms * MS),
            by: Actor {
                pid: u32::try_from(at_ms).ok(),
                name: Some(program.to_owned()),
                parent: Some((812, "kube-proxy".to_owned())),
                ..Actor::default()
            },
            what: What::Ipset {
                sets: [("KUBE-CLUSTER-IP".to_owned(), delta)].into(),
            },
            refused: [].into(),
            incomplete: false,
        }
    }

    /// Programs that change something at so many ms, and who is told when it is looked each 20 ms, how often.
    fn told(changes: &[(&str, u64)], until_ms: u64) -> Vec<(u64, String, u64)> {
        let mut row = Row::default();
        let mut told = Vec::new();
        for now_ms in (0..=until_ms).step_by(20) {
            let heard = changes
                .iter()
                .filter(|(_, at)| (now_ms..now_ms + 20).contains(at));
            let parts =
                heard.flat_map(|(program, at)| row.part(&change(program, *at), now_ms * MS));
            let mut parts: Vec<Burst> = parts.collect();
            parts.extend(row.over(now_ms * MS));
            told.extend(parts.iter().map(|burst| {
                let text = burst.to_string();
                let name = text.split(' ').next().unwrap_or_default();
                (now_ms, name.to_owned(), burst.times())
            }));
        }
        let rest = row.over(u64::MAX);
        told.extend(rest.map(|burst| (until_ms, "rest".to_owned(), burst.times())));
        told
    }

    fn line(at_ms: u64, name: &str, times: u64) -> (u64, String, u64) {
        (at_ms, name.to_owned(), times)
    }

    #[test]
    fn the_first_is_told_at_once_and_those_that_follow_together() {
        let many: Vec<(&str, u64)> = (0..41).map(|n| ("ipset", n * 9)).collect();
        assert_eq!(
            told(&many, 2000),
            [line(0, "ipset", 1), line(1000, "ipset", 40)]
        );
        // None is lost, whenever the session ends.
        assert_eq!(
            told(&many, 100),
            [line(0, "ipset", 1), line(100, "rest", 13)][..]
        );
    }

    #[test]
    fn what_goes_on_is_told_each_second() {
        let many: Vec<(&str, u64)> = (0..300).map(|n| ("ipset", n * 10)).collect();
        let told = told(&many, 5000);
        assert!(told.len() > 2 && told.len() < 6, "{told:?}");
        assert_eq!(told.iter().map(|(.., times)| times).sum::<u64>(), 300);
    }

    #[test]
    fn the_order_of_changes_stays() {
        let mixed = [
            ("ipset", 0),
            ("ipset", 10),
            ("ipset", 15),
            ("ip", 18),
            ("ipset", 30),
        ];
        let wanted = [
            line(0, "ipset", 1),
            line(0, "ipset", 2),
            line(0, "ip", 1),
            line(20, "ipset", 1),
        ];
        assert_eq!(told(&mixed, 2000), wanted);
    }
}
