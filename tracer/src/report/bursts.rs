//! Rule changes that one program makes one after the other, as one line: kube-proxy in IPVS mode runs ipset once for
//! each entry.
//!
//! Of ipset, IPVS and addresses what is added and what is deleted both stand in the sum, and nothing is hidden by it. A
//! table of iptables or a transaction of `nf_tables` is told by itself: what is there after one of them, another may
//! have undone.

use std::fmt;

use crate::trace::changes::{Actor, AddressDelta, RuleChange, ServerDelta, SetDelta, What};

/// Changes with a longer pause between them, ns, are told one by one.
const PAUSE_NS: u64 = 1_000_000_000;

/// A rule change, or several of one program in a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Burst {
    times: u64,
    /// The time of the first, and the sum of all.
    first_ns: u64,
    sum: RuleChange,
    /// Are all of one process?
    alone: bool,
}

impl Burst {
    /// Of this change, so far.
    pub fn new(change: &RuleChange) -> Self {
        Self {
            times: 1,
            first_ns: change.time_ns,
            sum: change.clone(),
            alone: true,
        }
    }

    /// How many changes it is made of.
    pub const fn times(&self) -> u64 {
        self.times
    }

    /// When the first of them was over (`CLOCK_MONOTONIC`, ns).
    pub const fn first_ns(&self) -> u64 {
        self.first_ns
    }

    /// When the last of them was over.
    pub const fn last_ns(&self) -> u64 {
        self.sum.time_ns
    }

    /// Adds a change that is more of the same: if it is not, says so, and leaves the burst as it is.
    pub fn takes(&mut self, change: &RuleChange) -> bool {
        if !self.goes_on_with(change) || !add(&mut self.sum.what, &change.what) {
            return false;
        }
        self.times += 1;
        self.alone &= self.sum.by.pid == change.by.pid;
        self.sum.time_ns = self.sum.time_ns.max(change.time_ns);
        self.sum.begin_ns = self
            .sum
            .begin_ns
            .zip(change.begin_ns)
            .map(|(a, b)| a.min(b));
        for (reason, times) in &change.refused {
            let all = self.sum.refused.entry(reason.clone()).or_default();
            *all = all.saturating_add(*times);
        }
        self.sum.incomplete |= change.incomplete;
        true
    }

    /// Is it of the same program and for the same reason, soon after, and as successful?
    fn goes_on_with(&self, change: &RuleChange) -> bool {
        let (ours, theirs) = (&self.sum.by, &change.by);
        let who = |by: &Actor| by.name.clone().zip(by.parent.clone());
        let begun_ns = change.begin_ns.unwrap_or(change.time_ns);
        who(ours).is_some()
            && who(ours) == who(theirs)
            && ours.pod == theirs.pod
            && self.sum.is_refused() == change.is_refused()
            && begun_ns.saturating_sub(self.sum.time_ns) <= PAUSE_NS
    }

    /// `ipset (41 times, parent kube-proxy, pid 812)`, with the number of a process if all are of one.
    fn by(&self) -> Actor {
        let by = &self.sum.by;
        let name = by.name.as_deref().unwrap_or("unknown process");
        let mut words = vec![format!("{} times", super::units::count(self.times))];
        if let Some(pid) = by.pid.filter(|_| self.alone) {
            words.insert(0, format!("pid {pid}"));
        }
        words.extend(
            by.parent
                .iter()
                .map(|(pid, name)| format!("parent {name}, pid {pid}")),
        );
        words.extend(by.pod.iter().map(|pod| format!("pod {pod}")));
        Actor {
            name: Some(format!("{name} ({})", words.join(", "))),
            ..Actor::default()
        }
    }
}

impl fmt::Display for Burst {
    /// `ipset (41 times, parent kube-proxy, pid 812) changed 1 ipset in 380.0 ms: KUBE-CLUSTER-IP +41`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.times == 1 {
            return self.sum.fmt(f);
        }
        let by = self.by();
        let sum = RuleChange {
            by,
            ..self.sum.clone()
        };
        sum.fmt(f)
    }
}

/// Changes in their order, those of one program in a row together.
pub fn of(changes: &[RuleChange]) -> Vec<Burst> {
    let mut bursts: Vec<Burst> = Vec::new();
    for change in changes {
        if !bursts.last_mut().is_some_and(|last| last.takes(change)) {
            bursts.push(Burst::new(change));
        }
    }
    bursts
}

/// Adds what was changed to what was changed before: can it be told as a sum?
fn add(sum: &mut What, more: &What) -> bool {
    match (sum, more) {
        (What::Ipset { sets: sum }, What::Ipset { sets: more }) => {
            for (set, more) in more {
                add_entries(sum.entry(set.clone()).or_default(), more);
            }
        }
        (What::Ipvs(sum), What::Ipvs(more)) => add_servers(sum, more),
        (What::Addresses { links: sum }, What::Addresses { links: more }) => {
            for (link, more) in more {
                add_addresses(sum.entry(link.clone()).or_default(), more);
            }
        }
        _ => return false,
    }
    true
}

fn add_entries(sum: &mut SetDelta, more: &SetDelta) {
    add_each([
        (&mut sum.created, more.created),
        (&mut sum.destroyed, more.destroyed),
        (&mut sum.flushed, more.flushed),
        (&mut sum.renamed, more.renamed),
        (&mut sum.added, more.added),
        (&mut sum.deleted, more.deleted),
        (&mut sum.unproven, more.unproven),
    ]);
}

fn add_servers(sum: &mut ServerDelta, more: &ServerDelta) {
    add_each([
        (&mut sum.servers_added, more.servers_added),
        (&mut sum.servers_edited, more.servers_edited),
        (&mut sum.servers_deleted, more.servers_deleted),
        (&mut sum.reals_added, more.reals_added),
        (&mut sum.reals_edited, more.reals_edited),
        (&mut sum.reals_deleted, more.reals_deleted),
        (&mut sum.flushed, more.flushed),
        (&mut sum.others, more.others),
    ]);
    sum.servers.extend(more.servers.iter().cloned());
}

fn add_addresses(sum: &mut AddressDelta, more: &AddressDelta) {
    sum.virtual_ips |= more.virtual_ips;
    sum.added.extend(more.added.iter().cloned());
    sum.deleted.extend(more.deleted.iter().cloned());
}

fn add_each<const N: usize>(counts: [(&mut u64, u64); N]) {
    for (sum, more) in counts {
        *sum = sum.saturating_add(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// `ipset` run by kube-proxy, which adds an entry to a set from so many ms on.
    fn ipset(pid: u32, at_ms: u64, set: &str) -> RuleChange {
        let delta = SetDelta {
            added: 1,
            ..SetDelta::default()
        };
        RuleChange {
            time_ns: (at_ms + 1) * MS,
            begin_ns: Some(at_ms * MS),
            by: Actor {
                pid: Some(pid),
                name: Some("ipset".to_owned()),
                parent: Some((812, "kube-proxy".to_owned())),
                ..Actor::default()
            },
            what: What::Ipset {
                sets: [(set.to_owned(), delta)].into(),
            },
            refused: [].into(),
            incomplete: false,
        }
    }

    fn told(changes: &[RuleChange]) -> Vec<String> {
        of(changes).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_program_that_is_run_again_and_again_is_a_line() {
        let mut changes: Vec<RuleChange> = (0..40)
            .map(|n| ipset(900 + n, u64::from(n) * 9, "KUBE-CLUSTER-IP"))
            .collect();
        changes.push(ipset(940, 400, "KUBE-LOAD-BALANCER"));
        let bursts = of(&changes);
        assert_eq!(bursts.len(), 1);
        assert_eq!(bursts[0].times(), 41);
        assert_eq!((bursts[0].first_ns(), bursts[0].last_ns()), (MS, 401 * MS));
        insta::assert_snapshot!(bursts[0], @"ipset (41 times, parent kube-proxy, pid 812) changed 2 ipsets in 401.0 ms: KUBE-CLUSTER-IP +40, KUBE-LOAD-BALANCER +1");
        // One is told as it always was.
        assert_eq!(told(&changes[..1]), [changes[0].to_string()]);
    }

    #[test]
    fn what_is_another_thing_is_told_by_itself() {
        let first = ipset(900, 0, "KUBE-CLUSTER-IP");
        let differing = |change: &dyn Fn(&mut RuleChange)| {
            let mut other = ipset(901, 5, "KUBE-CLUSTER-IP");
            change(&mut other);
            told(&[first.clone(), other]).len()
        };
        assert_eq!(differing(&|_| {}), 1);
        assert_eq!(differing(&|other| other.by.name = Some("sh".to_owned())), 2);
        assert_eq!(
            differing(&|other| other.by.parent = Some((7, "sh".to_owned()))),
            2
        );
        assert_eq!(differing(&|other| other.by.pod = Some("a".to_owned())), 2);
        assert_eq!(
            differing(&|other| other.what = What::Ipvs(ServerDelta::default())),
            2
        );
        assert_eq!(
            differing(&|other| {
                other.what = What::Ipset { sets: [].into() };
                other.refused = [("File exists".to_owned(), 1)].into();
            }),
            2
        );
        assert_eq!(differing(&|other| other.begin_ns = Some(MS + PAUSE_NS)), 1);
        assert_eq!(
            differing(&|other| other.begin_ns = Some(MS + PAUSE_NS + 1)),
            2
        );
        // Of whom nobody knows who they were nobody knows that they are the same.
        let unknown = |pid| {
            let mut change = ipset(pid, 0, "KUBE-CLUSTER-IP");
            change.by.parent = None;
            change
        };
        assert_eq!(told(&[unknown(1), unknown(1)]).len(), 2);
    }

    #[test]
    fn what_one_undoes_of_the_other_is_not_hidden() {
        let legacy = |before, after| RuleChange {
            what: What::IptablesLegacy {
                family: "IPv4".to_owned(),
                table: "nat".to_owned(),
                before,
                after,
            },
            ..ipset(900, 0, "")
        };
        assert_eq!(told(&[legacy(51, 5), legacy(5, 51)]).len(), 2);
        let mut flushed = ipset(901, 2, "KUBE-CLUSTER-IP");
        flushed.what = What::Ipset {
            sets: [(
                "KUBE-CLUSTER-IP".to_owned(),
                SetDelta {
                    deleted: 7,
                    ..SetDelta::default()
                },
            )]
            .into(),
        };
        let both = told(&[ipset(900, 0, "KUBE-CLUSTER-IP"), flushed]);
        insta::assert_snapshot!(both.join("\n"), @"ipset (2 times, parent kube-proxy, pid 812) changed 1 ipset in 3.0 ms: KUBE-CLUSTER-IP +1 -7");
    }

    #[test]
    fn one_process_keeps_its_number() {
        let server = |at_ms, server: &str| RuleChange {
            by: Actor {
                pid: Some(812),
                name: Some("kube-proxy".to_owned()),
                parent: Some((7, "containerd-shim".to_owned())),
                pod: Some("6f1c".to_owned()),
                ..Actor::default()
            },
            what: What::Ipvs(ServerDelta {
                servers_added: 1,
                reals_added: 2,
                servers: [server.to_owned()].into(),
                ..ServerDelta::default()
            }),
            ..ipset(0, at_ms, "")
        };
        let both = told(&[
            server(0, "10.96.0.1:80/TCP"),
            server(100, "10.96.0.2:80/TCP"),
        ]);
        insta::assert_snapshot!(both.join("\n"), @"kube-proxy (pid 812, 2 times, parent containerd-shim, pid 7, pod 6f1c) changed IPVS in 101.0 ms: +2 servers +4 real servers (10.96.0.1:80/TCP, 10.96.0.2:80/TCP)");
    }

    #[test]
    fn refusals_of_a_row_are_counted() {
        let refused = |pid| RuleChange {
            what: What::Ipset { sets: [].into() },
            refused: [("File exists".to_owned(), 1)].into(),
            ..ipset(pid, 0, "")
        };
        let all = told(&[refused(1), refused(2), refused(3)]);
        insta::assert_snapshot!(all.join("\n"), @"ipset (3 times, parent kube-proxy, pid 812) could not change ipsets: File exists, 3 times");
    }
}
