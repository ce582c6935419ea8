//! Outages: from the first new flow that failed to the first that succeeded after it, by Service and path,
//! and which rule changes stand at both ends.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};

use serde::{Deserialize, Serialize};

use super::changes::RuleChange;
use super::flows::Decided;

/// Flows that fail one after another make an outage from here on: one in three that fails, because one of
/// three endpoints is dead, is none.
const FLOWS: u64 = 3;

/// An outage that is over, or was going on when the session ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Outage {
    /// `ns/name:port`.
    pub service: String,
    /// `pod→ClusterIP`, ...
    pub path: String,
    /// When the first flow that failed began (`CLOCK_MONOTONIC`, ns).
    pub begin_ns: u64,
    /// When the first flow that succeeded again began; `None`: none did before the session's end.
    pub end_ns: Option<u64>,
    /// New flows that failed, all of them one after another.
    pub lost: u64,
    /// The last rule change before it began: how long before, ns, and what it was.
    pub began_after: Option<(u64, String)>,
    /// The last rule change during it: how long before its end, ns, and what it was.
    pub ended_after: Option<(u64, String)>,
}

impl std::fmt::Display for Outage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use crate::report::units::{plural, time_u64};
        let lost = plural(self.lost, "new flow", "new flows");
        write!(f, "{} {}: ", self.service, self.path)?;
        match self.end_ns {
            Some(end_ns) => {
                let lasted = time_u64(end_ns.saturating_sub(self.begin_ns));
                write!(f, "outage of {lasted} ended, {lost} lost")?;
            }
            None => write!(f, "outage goes on, {lost} lost so far")?,
        }
        if let Some((ns, change)) = &self.began_after {
            write!(f, "; it began {} after {change}", time_u64(*ns))?;
        }
        if let Some((ns, change)) = &self.ended_after {
            write!(f, "; it ended {} after {change}", time_u64(*ns))?;
        }
        Ok(())
    }
}

/// Flows that were decided, waiting for those that began before them.
#[derive(Debug, Default)]
pub struct Outages {
    /// By the time of their first packets, the earliest on top: time, Service and path, and did it fail?
    decided: BinaryHeap<Reverse<(u64, usize, &'static str, bool)>>,
    going_on: HashMap<(usize, &'static str), Going>,
}

#[derive(Clone, Copy, Debug)]
struct Going {
    begin_ns: u64,
    lost: u64,
}

impl Outages {
    /// Takes in a flow of which it is known what became of it; corrections come too late.
    pub fn add(&mut self, decided: &Decided) {
        if decided.verdict.is_known() && decided.corrects.is_none() {
            self.decided.push(Reverse((
                decided.first_ns,
                decided.index,
                decided.path,
                decided.verdict.is_bad(),
            )));
        }
    }

    /// The outages that are over. Every flow that began before `known_ns` has been taken in.
    pub fn over(
        &mut self,
        known_ns: u64,
        changes: &[RuleChange],
        name: impl Fn(usize) -> String,
    ) -> Vec<Outage> {
        let mut over = Vec::new();
        while let Some(Reverse((first_ns, index, path, failed))) = self.decided.peek().copied()
            && first_ns < known_ns
        {
            self.decided.pop();
            let key = (index, path);
            if failed {
                let new = Going {
                    begin_ns: first_ns,
                    lost: 0,
                };
                self.going_on.entry(key).or_insert(new).lost += 1;
            } else if let Some(going) = self.going_on.remove(&key)
                && going.lost >= FLOWS
            {
                over.push(outage(name(index), path, going, Some(first_ns), changes));
            }
        }
        over
    }

    /// Those that go on at the session's end.
    pub fn finish(
        mut self,
        changes: &[RuleChange],
        name: impl Fn(usize) -> String,
    ) -> (Vec<Outage>, Vec<Outage>) {
        let over = self.over(u64::MAX, changes, &name);
        let going_on: BTreeMap<_, _> = self.going_on.into_iter().collect();
        let going_on = going_on
            .into_iter()
            .filter(|(_, going)| going.lost >= FLOWS)
            .map(|((index, path), going)| outage(name(index), path, going, None, changes));
        (over, going_on.collect())
    }
}

fn outage(
    service: String,
    path: &str,
    going: Going,
    end_ns: Option<u64>,
    changes: &[RuleChange],
) -> Outage {
    let last = |from_ns: u64, to_ns: u64| {
        let within = |change: &&RuleChange| {
            !change.is_refused() && change.time_ns >= from_ns && change.time_ns <= to_ns
        };
        let change = changes.iter().rev().find(within)?;
        Some((to_ns - change.time_ns, change.to_string()))
    };
    Outage {
        service,
        path: path.to_owned(),
        begin_ns: going.begin_ns,
        end_ns,
        lost: going.lost,
        began_after: last(0, going.begin_ns),
        ended_after: end_ns.and_then(|end_ns| last(going.begin_ns + 1, end_ns)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::verdict::Verdict;

    fn flow(first_ns: u64, verdict: Verdict) -> Decided {
        Decided {
            time_ns: first_ns + 5,
            index: 0,
            service: String::new(),
            protocol: 6,
            source: "10.244.0.7:1".parse().expect("an address"),
            destination: "10.96.0.1:80".parse().expect("an address"),
            path: "pod→ClusterIP",
            headed: None,
            first_ns,
            after_ns: None,
            corrects: None,
            verdict,
        }
    }

    fn changes() -> Vec<RuleChange> {
        let mut changes = crate::report::sample::trace().run.summary.rule_changes;
        changes[0].time_ns = 15;
        changes[1].time_ns = 47;
        changes
    }

    #[test]
    fn an_outage_ends_with_the_first_good_flow_though_bad_ones_are_told_later() {
        let mut outages = Outages::default();
        for good in [0, 10, 50, 60] {
            outages.add(&flow(good, Verdict::Delivered));
        }
        let name = |_| "shop/web:http".to_owned();
        // Flows from 20 on are not decided yet.
        assert!(outages.over(20, &changes(), name).is_empty());
        for bad in [20, 30, 40] {
            outages.add(&flow(bad, Verdict::Unanswered { stray: None }));
        }
        let over = outages.over(100, &changes(), name);
        let [outage] = over.as_slice() else {
            panic!("{over:?}");
        };
        assert_eq!(
            (outage.begin_ns, outage.end_ns, outage.lost),
            (20, Some(50), 3)
        );
        assert_eq!(outage.began_after.as_ref().map(|c| c.0), Some(5));
        assert_eq!(outage.ended_after.as_ref().map(|c| c.0), Some(3));
        let said = outage.to_string();
        assert!(
            said.starts_with(
                "shop/web:http pod→ClusterIP: outage of 30 ns ended, 3 new flows lost"
            ),
            "{said}"
        );
        assert!(
            said.contains("; it ended 3 ns after nft (pid 812, parent kube-proxy"),
            "{said}"
        );
    }

    #[test]
    fn single_failures_are_no_outage_and_one_may_go_on() {
        let mut outages = Outages::default();
        for first_ns in 0..30 {
            let verdict = if first_ns % 3 == 0 {
                Verdict::Leaked
            } else {
                Verdict::Delivered
            };
            outages.add(&flow(first_ns, verdict));
        }
        for first_ns in 30..40 {
            outages.add(&flow(first_ns, Verdict::Leaked));
        }
        let (over, going_on) = outages.finish(&[], |_| String::new());
        assert_eq!(over, []);
        assert_eq!(going_on.len(), 1);
        assert_eq!((going_on[0].end_ns, going_on[0].lost), (None, 10));
    }
}
