//! The node's rules, read again after they have changed: which change makes it worth it, when, and how often.
//!
//! Reading is not free for the node: the kernel and `nft` take 20 s of a CPU to list the nftables rules of 30,000
//! Services, and iptables' tools one. So rules are read at most some tenth of the time, and none after changes that
//! tell nothing of Services. What says by itself what it changed ([`News`]) is taken in without reading.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use super::changes::{ALL_SETS, News, RuleChange, What};
use crate::cluster::Family;
use crate::kernel::clock::monotonic_ns;
use crate::kernel::dump::{self, DumpError};
use crate::kernel::netns::Netns;
use crate::rules::Mode;
use crate::rules::dump::Unreadable;
use crate::rules::services::{self, Found, FoundService};

/// How long the rules must have been left alone before they are read again, by how long reading takes,
const SETTLED: u32 = 2;
/// at least (one transaction after the other is one change of kube-proxy's)
const SOONEST: Duration = Duration::from_millis(50);
/// and at most.
const LATEST: Duration = Duration::from_millis(500);
/// How long they are waited for to be left alone, at most, in times of that.
const RESTLESS: u32 = 4;
/// For each second of reading, so many pass without,
const PAUSE: u32 = 9;
/// less what they are waited for anyway.
const FREE: Duration = LATEST.saturating_mul(RESTLESS);
/// The longest reading that a session's end is put off for.
const AT_END: Duration = Duration::from_secs(2);
/// How long after a reading that failed another one is tried, at least.
const RETRY: Duration = Duration::from_secs(5);

/// Why the rules cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadingError {
    /// They cannot be listed.
    #[error(transparent)]
    Dump(#[from] DumpError),
    /// They cannot be understood.
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
}

/// What a rule change can have changed of what is known of Services.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Touched {
    Nothing,
    /// What it changed is known, or quickly asked, as the node's addresses are, which serve NodePorts.
    Known,
    /// The rules of these modes.
    Rules(Vec<&'static str>),
}

/// By mode from when to when its rules were changed, once or more often (`CLOCK_MONOTONIC`, ns): what they said in
/// between nobody has read.
pub(super) type Gaps = BTreeMap<&'static str, (u64, u64)>;

fn widen(gaps: &mut Gaps, mode: &'static str, (begin_ns, end_ns): (u64, u64)) {
    let gap = gaps.entry(mode).or_insert((begin_ns, end_ns));
    *gap = (gap.0.min(begin_ns), gap.1.max(end_ns));
}

/// What became of reading.
#[derive(Debug)]
pub(super) enum Turn {
    /// Nothing new.
    Nothing,
    /// The rules are being read.
    Begins,
    /// There is something to learn: see [`Reading::found`].
    Read,
    /// The same, without having read: see [`Reading::learnt`].
    Patched,
    /// They could not be read, and will be tried again.
    Failed(String),
}

/// The rules, and whether they are still what was read.
#[derive(Debug)]
pub(super) struct Reading {
    ns: Netns,
    found: Found,
    /// Of reading, and of learning without it.
    pace: Pace,
    learning: Pace,
    /// When rules were changed last (`CLOCK_MONOTONIC`, ns).
    changed_ns: u64,
    /// Of what is in `found`: of the last thing that was put in, and of all.
    said: Since,
    known: Since,
    /// What has been changed since they were begun to be read, what until then since they were read before, and what
    /// until then since they were known before that.
    unread: Gaps,
    being_read: Gaps,
    gaps: Gaps,
    /// Since when they may say something else than what was read (`CLOCK_MONOTONIC`, ns), and for how long they did before.
    outdated_since_ns: Option<u64>,
    outdated_ns: u64,
    /// Of the rules that are being read.
    next: Since,
    under_way: Option<Receiver<Result<Found, ReadingError>>>,
    /// What has been heard since the rules were read, and may not be in what they said.
    news: Vec<News>,
}

/// Since when the rules have been what was read (`CLOCK_MONOTONIC`, ns).
#[derive(Clone, Copy, Debug, Default)]
struct Since {
    /// When they were changed last before that.
    changed_ns: u64,
    /// When they were begun to be read.
    read_ns: u64,
}

/// When to read again.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// The first and the last change that has not been read.
    changed: Option<(Instant, Instant)>,
    began: Instant,
    /// How long it took the last time.
    took: Duration,
    /// Not before this.
    earliest: Instant,
}

impl Reading {
    /// Reads the rules for the first time.
    pub(super) fn first(ns: &Netns) -> Result<Self, ReadingError> {
        let began = Instant::now();
        let known = Since {
            changed_ns: 0,
            read_ns: monotonic_ns(),
        };
        let found = read(ns)?;
        let mut pace = Pace::new(began);
        let learning = pace;
        pace.end(Instant::now());
        Ok(Self {
            ns: ns.clone(),
            found,
            pace,
            learning,
            changed_ns: 0,
            said: known,
            known,
            outdated_since_ns: None,
            outdated_ns: 0,
            next: known,
            unread: Gaps::new(),
            being_read: Gaps::new(),
            gaps: Gaps::new(),
            under_way: None,
            news: Vec::new(),
        })
    }

    /// What they say, as far as they have been read.
    pub(super) const fn found(&self) -> &Found {
        &self.found
    }

    /// Since which change they have said so (`CLOCK_MONOTONIC`, ns); 0: since before the session began.
    pub(super) const fn changed_ns(&self) -> u64 {
        self.said.changed_ns
    }

    /// What was over by then, they say (`CLOCK_MONOTONIC`, ns).
    pub(super) const fn read_ns(&self) -> u64 {
        self.known.read_ns
    }

    /// Up to when it is known what they said (`CLOCK_MONOTONIC`, ns): see [`Flows::decide`](super::flows::Flows::decide).
    /// Every change that began before `told_ns` has been told: one may be under way, and they say something else since.
    pub(super) const fn known_ns(&self, told_ns: u64) -> u64 {
        if self.is_outdated() {
            self.known.read_ns
        } else {
            told_ns
        }
    }

    /// Do they say something else, perhaps, than what was read?
    pub(super) const fn is_outdated(&self) -> bool {
        self.learning.changed.is_some() || self.is_unread()
    }

    /// Has something changed that only reading tells?
    const fn is_unread(&self) -> bool {
        self.pace.changed.is_some() || self.under_way.is_some()
    }

    /// Takes notice of a change.
    pub(super) fn hear(&mut self, change: &RuleChange) {
        let touched = touched(change);
        if change.is_refused() || touched == Touched::Nothing {
            return;
        }
        let time_ns = change.time_ns;
        let took = (change.begin_ns.unwrap_or(time_ns), time_ns);
        if time_ns >= self.next.read_ns {
            self.outdate(&touched, took);
            return;
        }
        // It was over when they were begun to be read: they say so already.
        self.next.changed_ns = self.next.changed_ns.max(time_ns);
        if let Touched::Rules(modes) = touched {
            for mode in modes {
                widen(&mut self.being_read, mode, took);
            }
        }
    }

    /// Takes notice of what is new of Services.
    pub(super) fn hear_news(&mut self, news: Vec<News>) {
        for news in news {
            let touched = match news.patch {
                Some(_) => Touched::Known,
                None => Touched::Rules(vec![news.mode.name()]),
            };
            self.outdate(&touched, (news.time_ns, news.time_ns));
            self.news.push(news);
        }
    }

    /// What has come, and when (`CLOCK_MONOTONIC`, ns), since the rules were begun to be read.
    pub(super) fn arrived(&self) -> impl Iterator<Item = (u64, &FoundService)> {
        self.news.iter().flat_map(|news| {
            let arrived = news.arrived.iter();
            arrived.map(|service| (news.time_ns, service))
        })
    }

    /// Something changed, from when to when (`CLOCK_MONOTONIC`, ns).
    fn outdate(&mut self, touched: &Touched, took: (u64, u64)) {
        let (_, time_ns) = took;
        self.changed_ns = self.changed_ns.max(time_ns);
        let pace = match touched {
            Touched::Nothing => return,
            Touched::Known => &mut self.learning,
            Touched::Rules(modes) => {
                for mode in modes {
                    widen(&mut self.unread, mode, took);
                }
                &mut self.pace
            }
        };
        pace.change(Instant::now());
        self.outdated_since_ns.get_or_insert(time_ns);
    }

    /// For how long in all, until now, they may have said something else than what was read, ns.
    pub(super) fn outdated_ns(&self, now_ns: u64) -> u64 {
        let since_ns = self.outdated_since_ns.unwrap_or(now_ns);
        self.outdated_ns
            .saturating_add(now_ns.saturating_sub(since_ns))
    }

    /// Are they now what is known of them?
    fn settle(&mut self) {
        if !self.is_outdated() {
            self.outdated_ns = self.outdated_ns(monotonic_ns());
            self.outdated_since_ns = None;
        }
    }

    /// Begins to read if it is time, and tells what came of it.
    ///
    /// Of every change that began before `told_ns` all news have been heard.
    pub(super) fn poll(&mut self, told_ns: u64) -> Turn {
        let now = Instant::now();
        match self.look() {
            Turn::Nothing if self.learning.is_due(now) => self.learn(told_ns),
            Turn::Nothing if self.under_way.is_none() && self.pace.is_due(now) => self.begin(),
            turn => turn,
        }
    }

    /// Takes in what is known without reading: of every change that began before `told_ns`.
    pub(super) fn learn(&mut self, told_ns: u64) -> Turn {
        if self.learning.changed.is_none() {
            return Turn::Nothing;
        }
        self.learning.begin(Instant::now());
        self.apply_news();
        if self.under_way.is_none() {
            // Of the others the rules will say more, once they have been read.
            self.news.retain(|news| news.patch.is_none());
        }
        self.said = Since {
            changed_ns: self.changed_ns,
            read_ns: told_ns,
        };
        if !self.is_unread() {
            self.known = self.said;
        }
        self.settle();
        Turn::Patched
    }

    /// What was to be learnt without reading has been.
    pub(super) fn learnt(&mut self) {
        self.learning.end(Instant::now());
    }

    fn apply_news(&mut self) {
        let patches = self.news.iter().filter_map(|news| news.patch.as_ref());
        let mut understood = true;
        for patch in patches {
            understood &= self.found.apply(patch);
        }
        if !understood {
            self.pace.change(Instant::now());
        }
    }

    /// The session ends: has what is being read been read? It is waited for, but not for long.
    pub(super) fn poll_at_end(&mut self) -> Turn {
        if self.pace.began.elapsed() < AT_END {
            return self.look();
        }
        self.under_way = None;
        self.pace.change(Instant::now());
        Turn::Failed(TOO_LONG.to_owned())
    }

    /// The session ends: the rules are read once more if they have changed and that is not long in coming.
    pub(super) fn begin_at_end(&mut self) -> Turn {
        if self.pace.changed.is_none() {
            Turn::Nothing
        } else if self.pace.took >= AT_END {
            Turn::Failed(TOO_LONG.to_owned())
        } else {
            self.begin()
        }
    }

    /// What was changed, and what it was in between has not been read: since the last time this was asked.
    pub(super) fn take_gaps(&mut self) -> Gaps {
        std::mem::take(&mut self.gaps)
    }

    /// Is a reading under way?
    pub(super) const fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    fn begin(&mut self) -> Turn {
        self.pace.begin(Instant::now());
        self.next = Since {
            changed_ns: self.changed_ns,
            read_ns: monotonic_ns(),
        };
        self.being_read = std::mem::take(&mut self.unread);
        let (tell, reading) = channel();
        let ns = self.ns.clone();
        std::thread::spawn(move || {
            // A session that has ended does not want to know.
            let _ = tell.send(read(&ns));
        });
        self.under_way = Some(reading);
        Turn::Begins
    }

    /// Has what is read in the background been read?
    fn look(&mut self) -> Turn {
        let Some(reading) = &self.under_way else {
            return Turn::Nothing;
        };
        let result = match reading.try_recv() {
            Err(TryRecvError::Empty) => return Turn::Nothing,
            Err(TryRecvError::Disconnected) => Err("the reader has ended".to_owned()),
            Ok(result) => result.map_err(|error| error.to_string()),
        };
        self.under_way = None;
        self.pace.end(Instant::now());
        match result {
            Ok(found) => {
                self.found = found;
                self.gaps = std::mem::take(&mut self.being_read);
                // What came while they were read may be missing from what was read.
                let read_ns = self.next.read_ns;
                self.news.retain(|news| news.time_ns >= read_ns);
                self.apply_news();
                let applied = self.news.iter().filter(|news| news.patch.is_some());
                let last_ns = applied.map(|news| news.time_ns).max().unwrap_or(0);
                self.known = self.next;
                self.said = Since {
                    changed_ns: self.next.changed_ns.max(last_ns),
                    ..self.next
                };
                self.settle();
                Turn::Read
            }
            Err(why) => {
                for (mode, gap) in std::mem::take(&mut self.being_read) {
                    widen(&mut self.unread, mode, gap);
                }
                self.pace.retry(Instant::now());
                Turn::Failed(why)
            }
        }
    }
}

impl Pace {
    const fn new(began: Instant) -> Self {
        Self {
            changed: None,
            began,
            took: Duration::ZERO,
            earliest: began,
        }
    }

    fn change(&mut self, now: Instant) {
        let (first, _) = self.changed.unwrap_or((now, now));
        self.changed = Some((first, now));
    }

    fn is_due(&self, now: Instant) -> bool {
        self.changed.is_some_and(|(first, last)| {
            let settled = (self.took * SETTLED).clamp(SOONEST, LATEST);
            now >= self.earliest && (now - last >= settled || now - first >= settled * RESTLESS)
        })
    }

    const fn begin(&mut self, now: Instant) {
        self.changed = None;
        self.began = now;
    }

    fn end(&mut self, now: Instant) {
        self.took = now - self.began;
        self.earliest = now + (self.took * PAUSE).saturating_sub(FREE);
    }

    fn retry(&mut self, now: Instant) {
        self.change(now);
        self.earliest = self.earliest.max(now + RETRY);
    }
}

fn read(ns: &Netns) -> Result<Found, ReadingError> {
    Ok(services::read(&dump::dump(ns)?)?)
}

/// Tables of iptables that speak of Services: the others have no part in [`services::read`].
const TABLES: [&str; 2] = ["nat", "filter"];
/// What names of kube-proxy's ipsets begin with.
const SETS: &str = "KUBE-";
const TOO_LONG: &str = "reading them takes too long to wait for at the end";

fn touched(change: &RuleChange) -> Touched {
    let [legacy, nft, ipvs, nftables] = [
        Mode::IptablesLegacy,
        Mode::IptablesNft,
        Mode::Ipvs,
        Mode::Nftables,
    ]
    .map(Mode::name);
    let rules = |any: bool, modes: &[&'static str]| {
        if any || change.incomplete {
            Touched::Rules(modes.to_vec())
        } else {
            Touched::Nothing
        }
    };
    match &change.what {
        // Of a transaction that names no table nothing is known.
        What::Nftables { tables, .. } if tables.is_empty() || change.incomplete => {
            rules(true, &[nft, nftables])
        }
        What::Nftables { tables, .. } => {
            rules(tables.keys().any(|table| is_of_iptables(table)), &[nft])
        }
        What::IptablesLegacy { table, .. } => rules(TABLES.contains(&table.as_str()), &[legacy]),
        What::Ipset { sets } => {
            let ours = |name: &String| name == ALL_SETS || name.starts_with(SETS);
            rules(sets.keys().any(ours), &[ipvs])
        }
        What::Ipvs(_) => rules(true, &[ipvs]),
        What::Addresses { links } if links.values().any(|link| link.virtual_ips) => {
            rules(true, &[ipvs])
        }
        What::Addresses { .. } if change.incomplete => rules(true, &[ipvs]),
        What::Addresses { .. } => Touched::Known,
    }
}

/// Is it a table (`ip nat`) that iptables-nft writes for kube-proxy? What becomes of kube-proxy's own is [`News`].
fn is_of_iptables(table: &str) -> bool {
    let mut of_families = Family::ALL
        .into_iter()
        .filter_map(|family| table.strip_prefix(family.nft())?.strip_prefix(' '));
    of_families.any(|name| TABLES.contains(&name))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::rules::dump::{Source, Texts};
    use crate::rules::services::{ChainChange, ChainNow, Patch};
    use crate::trace::changes::{Actor, AddressDelta, Delta, SetDelta};
    use crate::trace::directory::tests::found;

    fn change(what: What) -> RuleChange {
        RuleChange {
            time_ns: 1,
            begin_ns: None,
            by: Actor::default(),
            what,
            refused: BTreeMap::new(),
            incomplete: false,
        }
    }

    impl Reading {
        /// One that has just read this.
        fn of(found: Found, now: Instant) -> Self {
            Self {
                ns: Netns::current().expect("a namespace"),
                found,
                pace: Pace::new(now),
                learning: Pace::new(now),
                changed_ns: 0,
                said: Since::default(),
                known: Since::default(),
                outdated_since_ns: None,
                outdated_ns: 0,
                next: Since::default(),
                unread: Gaps::new(),
                being_read: Gaps::new(),
                gaps: Gaps::new(),
                under_way: None,
                news: Vec::new(),
            }
        }
    }

    #[test]
    fn only_what_speaks_of_services_has_the_rules_read_again() {
        let nftables = |tables: &[&str]| What::Nftables {
            generation: Some(1),
            tables: tables
                .iter()
                .map(|table| ((*table).to_owned(), Delta::default()))
                .collect(),
        };
        let legacy = |table: &str| What::IptablesLegacy {
            family: "IPv4".to_owned(),
            table: table.to_owned(),
            before: 5,
            after: 6,
        };
        let set = |name: &str| What::Ipset {
            sets: [(name.to_owned(), SetDelta::default())].into(),
        };
        let link = |virtual_ips| What::Addresses {
            links: [(
                "a link".to_owned(),
                AddressDelta {
                    virtual_ips,
                    ..AddressDelta::default()
                },
            )]
            .into(),
        };
        let rules = |modes: &[&'static str]| Touched::Rules(modes.to_vec());
        let [of_legacy, of_nft, of_ipvs] = [["iptables-legacy"], ["iptables-nft"], ["ipvs"]];
        for (what, expected) in [
            (nftables(&["ip kube-proxy"]), Touched::Nothing),
            (nftables(&["inet policy", "ip6 nat"]), rules(&of_nft)),
            (
                nftables(&["inet kube-proxy", "ip mangle"]),
                Touched::Nothing,
            ),
            (nftables(&[]), rules(&["iptables-nft", "nftables"])),
            (legacy("nat"), rules(&of_legacy)),
            (legacy("filter"), rules(&of_legacy)),
            (legacy("mangle"), Touched::Nothing),
            (set("KUBE-CLUSTER-IP"), rules(&of_ipvs)),
            (set(ALL_SETS), rules(&of_ipvs)),
            (set("cali40all-ipam-pools"), Touched::Nothing),
            (link(true), rules(&of_ipvs)),
            (link(false), Touched::Known),
        ] {
            let mut change = change(what);
            assert_eq!(touched(&change), expected, "{:?}", change.what);
            change.incomplete = true;
            assert!(matches!(touched(&change), Touched::Rules(_)));
        }
    }

    /// Who reads rules again and again may fail once: the session goes on.
    #[test]
    fn a_reading_that_fails_is_tried_again_but_not_at_the_end() {
        let (tell, under_way) = channel();
        let now = Instant::now();
        let mut reading = Reading {
            changed_ns: 7,
            outdated_since_ns: Some(5),
            outdated_ns: 2,
            under_way: Some(under_way),
            ..Reading::of(Found::default(), now)
        };
        assert!(matches!(reading.poll(9), Turn::Nothing) && reading.is_outdated());
        let unreadable = services::read(&Texts {
            servers: Some(Source {
                origin: "ipvsadm -Sn".to_owned(),
                text: "what is this".to_owned(),
            }),
            ..Texts::default()
        })
        .expect_err("nobody understands it");
        tell.send(Err(unreadable.into())).expect("is heard");
        assert!(matches!(reading.poll(9), Turn::Failed(_)));
        assert!(reading.is_outdated() && !reading.is_under_way());
        assert_eq!((reading.known_ns(9), reading.changed_ns()), (0, 0));
        assert_eq!(reading.outdated_ns(9), 6);
        assert!(reading.pace.earliest >= now + RETRY);
        reading.pace.took = AT_END;
        assert!(matches!(reading.begin_at_end(), Turn::Failed(_)));
        assert!(!reading.is_under_way());
        // New addresses are learnt of without reading.
        reading.pace.changed = None;
        reading.outdate(&Touched::Known, (8, 8));
        reading.pace.took = Duration::ZERO;
        assert!(matches!(reading.learn(9), Turn::Patched));
        assert!(matches!(reading.begin_at_end(), Turn::Nothing));
        assert_eq!((reading.known_ns(9), reading.changed_ns()), (9, 8));
        let outdated_ns = reading.outdated_ns(0);
        assert!(outdated_ns > 2 && outdated_ns == reading.outdated_ns(u64::MAX));
        assert!(!reading.is_outdated());
    }

    fn news(time_ns: u64, patch: Option<Patch>) -> News {
        News {
            time_ns,
            mode: Mode::Nftables,
            arrived: vec![found().services.remove(0)],
            patch,
        }
    }

    /// A Service's chain is written anew, and it has no other endpoint than this.
    fn patch(endpoint: &str) -> Patch {
        Patch {
            chains: vec![ChainChange {
                family: Family::V4,
                name: "service-XXXXXXXX-shop/web/tcp/http".to_owned(),
                now: ChainNow::Written(vec![endpoint.parse().expect("an address")]),
            }],
            ..Patch::default()
        }
    }

    fn endpoint(reading: &Reading) -> String {
        let web = reading.found().services.iter();
        let web = web.filter(|service| service.name.as_deref() == Some("shop/web:http"));
        web.map(|service| service.endpoints[0].to_string())
            .collect()
    }

    #[test]
    fn what_says_what_it_changed_is_learnt_without_reading() {
        let now = Instant::now();
        let mut reading = Reading::of(found(), now);
        assert!(!reading.is_outdated());
        reading.hear_news(vec![news(5, Some(patch("10.244.0.8:1")))]);
        assert!(reading.is_outdated() && !reading.is_unread());
        assert_eq!((reading.known_ns(9), reading.arrived().count()), (0, 1));
        assert!(
            matches!(reading.poll(9), Turn::Nothing),
            "it waits a little"
        );
        assert!(matches!(reading.learn(9), Turn::Patched));
        assert_eq!(endpoint(&reading), "10.244.0.8:1");
        assert_eq!((reading.known_ns(12), reading.changed_ns()), (12, 5));
        assert_eq!((reading.read_ns(), reading.arrived().count()), (9, 0));
        // Something else has changed as well: what is known is learnt, and the rest is still unknown.
        reading.hear_news(vec![news(13, None), news(14, Some(patch("10.244.0.9:1")))]);
        assert!(matches!(reading.learn(15), Turn::Patched));
        assert_eq!(endpoint(&reading), "10.244.0.9:1");
        assert!(reading.is_outdated());
        assert_eq!((reading.known_ns(16), reading.changed_ns()), (9, 14));
        assert_eq!(reading.arrived().count(), 1);
        // A patch that was heard while they were read is put upon what was read.
        let (tell, under_way) = channel();
        reading.under_way = Some(under_way);
        reading.pace.changed = None;
        reading.next = Since {
            changed_ns: 14,
            read_ns: 20,
        };
        reading.hear_news(vec![news(19, None), news(21, Some(patch("10.244.0.7:1")))]);
        assert!(matches!(reading.learn(22), Turn::Patched));
        assert_eq!(endpoint(&reading), "10.244.0.7:1");
        tell.send(Ok(found())).expect("is heard");
        assert!(matches!(reading.poll(23), Turn::Read));
        assert_eq!(endpoint(&reading), "10.244.0.7:1");
        assert_eq!((reading.changed_ns(), reading.read_ns()), (21, 20));
        assert_eq!(reading.arrived().count(), 1);
    }

    #[test]
    fn what_was_over_when_rules_were_read_is_no_news() {
        let mut reading = Reading::of(found(), Instant::now());
        reading.next.read_ns = 4;
        let change = |time_ns| RuleChange {
            time_ns,
            ..change(What::Nftables {
                generation: None,
                tables: BTreeMap::new(),
            })
        };
        reading.hear(&change(3));
        assert!(!reading.is_outdated());
        reading.hear(&change(4));
        assert!(reading.is_outdated());
    }

    /// What was changed twice between two readings, nobody knows what it was in between.
    #[test]
    fn what_was_not_read_in_between_is_a_gap() {
        let legacy = |begin_ns, time_ns| RuleChange {
            begin_ns: Some(begin_ns),
            time_ns,
            ..change(What::IptablesLegacy {
                family: "IPv4".to_owned(),
                table: "nat".to_owned(),
                before: 5,
                after: 5,
            })
        };
        let mut reading = Reading::of(found(), Instant::now());
        reading.hear(&legacy(3, 4));
        reading.hear(&legacy(8, 9));
        let read = |reading: &mut Reading, result: Result<Found, ReadingError>| {
            let (tell, under_way) = channel();
            reading.being_read = std::mem::take(&mut reading.unread);
            reading.next.read_ns = 20;
            reading.under_way = Some(under_way);
            // Told late: it was over when they were begun to be read.
            reading.hear(&legacy(10, 12));
            tell.send(result).expect("is heard");
            reading.look()
        };
        let no_text = services::read(&Texts {
            servers: Some(Source {
                origin: "ipvsadm -Sn".to_owned(),
                text: "what is this".to_owned(),
            }),
            ..Texts::default()
        });
        let failed = read(&mut reading, no_text.map_err(Into::into));
        assert!(matches!(failed, Turn::Failed(_)) && reading.take_gaps().is_empty());
        assert!(matches!(read(&mut reading, Ok(found())), Turn::Read));
        let gaps: Vec<_> = reading.take_gaps().into_iter().collect();
        assert_eq!(gaps, [("iptables-legacy", (3, 12))]);
        assert!(reading.take_gaps().is_empty());
    }

    #[test]
    fn rules_are_read_when_they_are_left_alone_but_not_all_the_time() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut pace = Pace::new(start);
        // It took a second: nothing for seven.
        pace.end(at(1000));
        assert!(!pace.is_due(at(20_000)));
        pace.change(at(1100));
        assert!(!pace.is_due(at(7999)));
        assert!(pace.is_due(at(8000)));
        pace.begin(at(8000));
        pace.end(at(9000));
        pace.change(at(20_000));
        pace.change(at(20_100));
        assert!(!pace.is_due(at(20_599)));
        assert!(pace.is_due(at(20_600)));
        // Somebody changes them all the time.
        for ms in (20_000..=22_000).step_by(100) {
            pace.change(at(ms));
        }
        // What takes little is read soon.
        for (took, settled) in [(10, 50), (100, 200)] {
            let mut pace = pace;
            pace.begin(at(22_000));
            pace.end(at(22_000 + took));
            pace.change(at(23_000));
            assert!(!pace.is_due(at(22_999 + settled)));
            assert!(pace.is_due(at(23_000 + settled)));
            for ms in (23_000..=23_000 + 4 * settled).step_by(10) {
                pace.change(at(ms));
            }
            assert!(!pace.is_due(at(22_999 + 4 * settled)));
            assert!(pace.is_due(at(23_000 + 4 * settled)));
        }
        pace.begin(at(22_000));
        pace.end(at(22_010));
        pace.retry(at(22_010));
        assert!(!pace.is_due(at(27_009)));
        assert!(pace.is_due(at(27_010)));
    }
}
