//! What requests to ipset did.
//!
//! With `-exist` the kernel also says yes to what changes nothing, and kube-proxy makes all its sets anew
//! like this at every sync. So the sets' numbers of entries before and after tell: they bound how many of
//! the entries that were asked for came, and how many went. What lies between the bounds is said to be
//! unproven, as is what was asked of a set that was renamed or exchanged meanwhile. An entry that was there
//! and got another timeout or comment counts as unchanged.

use std::collections::BTreeMap;

use super::SetDelta;
use super::requests::{Ask, SetChange};

/// What stands for a set's name if somebody did something to all of them.
pub(in crate::trace) const ALL_SETS: &str = "all sets";

/// Numbers of entries, by set.
pub(super) type Counts = BTreeMap<String, u32>;

/// What is known of the sets of a namespace.
#[derive(Debug, Default)]
pub(super) struct Sets {
    /// As the changes that were told left them, by name; `None`: not known.
    before: Option<BTreeMap<String, Held>>,
    /// As they were counted last; `None`: they could not be.
    now: Option<Counts>,
    /// When that was (`CLOCK_MONOTONIC`, ns).
    counted_ns: u64,
    /// Has nothing rested since?
    fresh: bool,
}

/// What a set holds.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    /// Entries, for certain.
    entries: i64,
    /// What may have come, and may have gone, besides: at most so much.
    loose: Moves,
}

/// Entries that come and entries that go.
#[derive(Clone, Copy, Debug, Default)]
struct Moves {
    added: i64,
    deleted: i64,
}

/// Somebody else's request, which is told at another time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Other<'a> {
    pub(super) ask: &'a Ask,
    /// Was it carried out before the sets were counted? Otherwise it may have been.
    pub(super) is_certain: bool,
}

/// What is asked of a set, and what is known of it meanwhile.
#[derive(Debug, Default)]
struct Account {
    delta: SetDelta,
    /// Is it there? `None`: not known.
    there: Option<bool>,
    /// What it holds without those entries that are asked for with `-exist`; `None`: not known.
    held: Option<Held>,
    /// Entries that are asked for with `-exist`.
    asked: Moves,
    /// By how many entries others changed it for certain, before it was counted.
    others: i64,
    /// Entries that came and went by others who may have done it, besides.
    perhaps: Moves,
    /// Is what was counted another set, or the same after it was emptied?
    is_another: bool,
}

impl Sets {
    /// What was counted, from this time on (`CLOCK_MONOTONIC`, ns).
    pub(super) fn count(&mut self, counts: Option<Counts>, from_ns: u64) {
        self.now = counts;
        self.counted_ns = from_ns;
        self.fresh = true;
    }

    /// When they were counted last (`CLOCK_MONOTONIC`, ns).
    pub(super) const fn counted_ns(&self) -> u64 {
        self.counted_ns
    }

    /// Everything that was asked for has been told: what was counted is what the next request finds.
    pub(super) fn rest(&mut self) {
        if !std::mem::take(&mut self.fresh) {
            return;
        }
        let held = |(name, count): (&String, &u32)| {
            let entries = i64::from(*count);
            let loose = Moves::default();
            (name.clone(), Held { entries, loose })
        };
        self.before = self.now.as_ref().map(|now| now.iter().map(held).collect());
    }

    /// What these requests did: none was refused, and all were over when the sets were counted.
    pub(super) fn tell(
        &mut self,
        asks: &[&Ask],
        others: &[Other<'_>],
    ) -> BTreeMap<String, SetDelta> {
        let mut accounts: BTreeMap<&str, Account> = BTreeMap::new();
        let mut mixed = false;
        for ask in asks {
            let Ask::Set { set, change, exist } = ask else {
                continue;
            };
            // Which set has which name from here on is not worth finding out.
            mixed |= set.is_none() || *change == SetChange::Rename;
            let name = set.as_deref().unwrap_or(ALL_SETS);
            let account = accounts.entry(name);
            let account = account.or_insert_with(|| self.account_of(name));
            account.ask(*change, *exist);
        }
        for other in others {
            let Ask::Set { set, change, exist } = other.ask else {
                continue;
            };
            match set.as_deref().filter(|_| *change != SetChange::Rename) {
                Some(name) => {
                    if let Some(account) = accounts.get_mut(name) {
                        account.also(*change, *exist, other.is_certain);
                    }
                }
                None => accounts.values_mut().for_each(|it| it.is_another = true),
            }
        }
        if mixed {
            self.before = None;
        }
        let mut told = BTreeMap::new();
        for (name, mut account) in accounts {
            account.is_another |= mixed;
            account.settle(self.now.as_ref().and_then(|now| now.get(name).copied()));
            self.leave(name, &account);
            if account.delta != SetDelta::default() {
                told.insert(name.to_owned(), account.delta);
            }
        }
        told
    }

    fn account_of(&self, name: &str) -> Account {
        let before = self.before.as_ref();
        Account {
            there: before.map(|before| before.contains_key(name)),
            held: before.and_then(|before| before.get(name).copied()),
            ..Account::default()
        }
    }

    /// The set as these requests left it.
    fn leave(&mut self, name: &str, account: &Account) {
        let Some(before) = &mut self.before else {
            return;
        };
        match (account.there, account.held) {
            (Some(false), _) => {
                before.remove(name);
            }
            (_, Some(held)) => {
                before.insert(name.to_owned(), held);
            }
            (_, None) => {}
        }
    }
}

impl Account {
    fn ask(&mut self, change: SetChange, exist: bool) {
        match change {
            SetChange::Create => match self.there {
                Some(true) if exist => {}
                None if exist => self.delta.unproven += 1,
                _ => {
                    self.delta.created += 1;
                    self.becomes(Some(true), Some(Held::default()));
                }
            },
            // Newer kernels say yes to this too.
            SetChange::Destroy if exist && self.there == Some(false) => {}
            SetChange::Destroy => {
                self.delta.destroyed += 1;
                self.becomes(Some(false), None);
            }
            SetChange::Flush => {
                self.delta.flushed += 1;
                self.becomes(self.there, Some(Held::default()));
            }
            SetChange::Rename => {
                self.delta.renamed += 1;
                self.becomes(None, None);
            }
            SetChange::Add(count) if exist => self.asked.add(count),
            SetChange::Delete(count) if exist => self.asked.delete(count),
            SetChange::Add(count) => {
                self.delta.added += count;
                self.grow(entries(count));
            }
            SetChange::Delete(count) => {
                self.delta.deleted += count;
                self.grow(-entries(count));
            }
        }
    }

    fn grow(&mut self, by: i64) {
        if let Some(held) = &mut self.held {
            held.entries = held.entries.saturating_add(by);
        }
    }

    /// What somebody else asked of the set.
    fn also(&mut self, change: SetChange, exist: bool, is_certain: bool) {
        let proven = is_certain && !exist;
        match change {
            SetChange::Add(count) if proven => self.others += entries(count),
            SetChange::Delete(count) if proven => self.others -= entries(count),
            SetChange::Add(count) => self.perhaps.add(count),
            SetChange::Delete(count) => self.perhaps.delete(count),
            SetChange::Create if exist && self.there == Some(true) => {}
            _ => self.is_another = true,
        }
    }

    /// The set is another from here on: what was asked of the one before cannot be counted any more.
    fn becomes(&mut self, there: Option<bool>, held: Option<Held>) {
        self.give_up();
        (self.there, self.held) = (there, held);
    }

    fn give_up(&mut self) {
        let asked = std::mem::take(&mut self.asked);
        self.delta.unproven += asked.added.unsigned_abs() + asked.deleted.unsigned_abs();
    }

    /// Finds out what the requests with `-exist` did, from the number of entries now.
    fn settle(&mut self, now: Option<u32>) {
        let now = now.filter(|_| !self.is_another);
        let (Some(held), Some(now)) = (&mut self.held, now) else {
            self.give_up();
            return;
        };
        let asked = self.asked;
        let loose = Moves {
            added: held.loose.added + self.perhaps.added,
            deleted: held.loose.deleted + self.perhaps.deleted,
        };
        let grew = i64::from(now) - held.entries - self.others;
        // What came and what went makes up the difference, whoever's it was: no less and no more than this
        // is these requests'. A difference that no request explains is none of theirs.
        let least = Moves {
            added: (grew - loose.added).clamp(0, asked.added),
            deleted: (-grew - loose.deleted).clamp(0, asked.deleted),
        };
        let most = Moves {
            added: (grew + asked.deleted + loose.deleted).clamp(0, asked.added),
            deleted: (-grew + asked.added + loose.added).clamp(0, asked.deleted),
        };
        held.entries += least.added - least.deleted;
        held.loose.added += most.added - least.added;
        held.loose.deleted += most.deleted - least.deleted;
        self.delta.added += least.added.unsigned_abs();
        self.delta.deleted += least.deleted.unsigned_abs();
        let between = (most.added - least.added) + (most.deleted - least.deleted);
        self.delta.unproven += between.unsigned_abs();
    }
}

impl Moves {
    fn add(&mut self, count: u64) {
        self.added = self.added.saturating_add(entries(count));
    }

    fn delete(&mut self, count: u64) {
        self.deleted = self.deleted.saturating_add(entries(count));
    }
}

/// A number of entries to reckon with; no request holds as many as are too many.
fn entries(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(of: &[(&str, u32)]) -> Counts {
        let of = of.iter();
        of.map(|(name, count)| ((*name).to_owned(), *count))
            .collect()
    }

    fn ask(name: &str, change: SetChange, exist: bool) -> Ask {
        Ask::Set {
            set: Some(name.to_owned()),
            change,
            exist,
        }
    }

    fn sets(before: &[(&str, u32)], now: &[(&str, u32)]) -> Sets {
        let mut sets = Sets::default();
        sets.count(Some(counts(before)), 0);
        sets.rest();
        sets.count(Some(counts(now)), 1);
        sets
    }

    /// What these requests did to sets that held so much before, and hold so much now.
    fn told(
        before: &[(&str, u32)],
        now: &[(&str, u32)],
        asks: &[Ask],
    ) -> BTreeMap<String, SetDelta> {
        let asks: Vec<&Ask> = asks.iter().collect();
        sets(before, now).tell(&asks, &[])
    }

    #[test]
    fn what_was_so_before_is_no_change() {
        let asks = [
            ask("S", SetChange::Create, true),
            ask("S", SetChange::Add(3), true),
            ask("T", SetChange::Delete(1), true),
            ask("U", SetChange::Destroy, true),
        ];
        let sets = [("S", 3), ("T", 0)];
        assert_eq!(told(&sets, &sets, &asks), BTreeMap::new());
    }

    #[test]
    fn entries_that_came_and_went_are_told() {
        let asks = [
            ask("S", SetChange::Create, true),
            ask("S", SetChange::Add(3), true),
            // kube-proxy deletes without -exist, which is proof.
            ask("T", SetChange::Delete(2), false),
            ask("T", SetChange::Add(4), true),
            ask("U", SetChange::Delete(4), true),
        ];
        let told = told(
            &[("T", 5), ("U", 9)],
            &[("S", 3), ("T", 6), ("U", 8)],
            &asks,
        );
        let delta = |created, added, deleted| SetDelta {
            created,
            added,
            deleted,
            ..SetDelta::default()
        };
        assert_eq!(told["S"], delta(1, 3, 0));
        assert_eq!(told["T"], delta(0, 3, 2));
        assert_eq!(told["U"], delta(0, 0, 1));
    }

    #[test]
    fn what_cannot_be_known_is_unproven() {
        let unproven = |delta: SetDelta| (delta.unproven, delta.added, delta.deleted);
        // One came and another went, or neither.
        let both = [
            ask("S", SetChange::Add(2), true),
            ask("S", SetChange::Delete(1), true),
        ];
        let of = |now| unproven(told(&[("S", 5)], &[("S", now)], &both)["S"]);
        assert_eq!(of(5), (2, 0, 0));
        assert_eq!(of(6), (2, 1, 0));
        assert_eq!(of(7), (0, 2, 0));
        assert_eq!(of(4), (0, 0, 1));
        // Exchanged with another, and never counted.
        let exchanged = [
            ask("S", SetChange::Flush, false),
            ask("S", SetChange::Add(2), true),
            ask("S", SetChange::Rename, false),
        ];
        let told = told(&[("S", 5)], &[("S", 5)], &exchanged);
        assert_eq!(unproven(told["S"]), (2, 0, 0));
        let told = Sets::default().tell(&[&both[0], &both[1]], &[]);
        assert_eq!(unproven(told["S"]), (3, 0, 0));
    }

    #[test]
    fn what_one_of_several_did_is_told_as_far_as_it_is_certain() {
        let add = |count| ask("S", SetChange::Add(count), true);
        let delete = ask("S", SetChange::Delete(1), false);
        let certain = |ask| Other {
            ask,
            is_certain: true,
        };
        let (two, one) = (add(2), add(1));
        // All of them did what they asked for: 5 + 2 + 1 - 1.
        let mut all = sets(&[("S", 5)], &[("S", 7)]);
        let told = all.tell(&[&two], &[certain(&one), certain(&delete)]);
        assert_eq!((told["S"].added, told["S"].unproven), (2, 0));
        let told = all.tell(&[&one], &[certain(&delete)]);
        assert_eq!((told["S"].added, told["S"].unproven), (1, 0));
        assert_eq!(all.tell(&[&delete], &[])["S"].deleted, 1);
        // One of three came, by whomever.
        let mut some = sets(&[("S", 5)], &[("S", 6)]);
        let told = some.tell(&[&two], &[certain(&one)]);
        assert_eq!((told["S"].added, told["S"].unproven), (0, 1));
        let told = some.tell(&[&one], &[]);
        assert_eq!((told["S"].added, told["S"].unproven), (0, 1));
        // None did.
        let mut none = sets(&[("S", 5)], &[("S", 5)]);
        assert_eq!(none.tell(&[&two], &[certain(&one)]), BTreeMap::new());
        // What may not have been counted yet proves nothing.
        let late = Other {
            ask: &delete,
            is_certain: false,
        };
        let told = sets(&[("S", 5)], &[("S", 5)]).tell(&[&one], &[late]);
        assert_eq!((told["S"].added, told["S"].unproven), (0, 1));
    }
}
