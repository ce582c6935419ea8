//! Hears everything and makes changes of it, in a thread of its own: who made a change has often ended a
//! millisecond later.

use std::collections::HashSet;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use nix::net::if_::if_indextoname;
use tracer_ebpf::change::{Begin, subsystem};

use super::actor::{Actor, Directory, pod_of, whole_name};
use super::addresses::Heard;
use super::assemble::{Assembler, high};
use super::nftables::Ledger;
use super::requests::{self, IFADDRMSG, NFGENMSG, text};
use super::{Listening, News, RuleChange};
use crate::kernel::clock::monotonic_ns;
use crate::kernel::ipset;
use crate::kernel::ipvs::{self, IpvsError};
use crate::kernel::netlink::{
    Heard as Listened, Listener, NLM_F_DUMP, NetlinkError, Request, Socket, wait,
};
use crate::kernel::netns::{Netns, NetnsError};
use crate::kernel::nft;
use crate::probe::rule_changes::{Record, RuleChangeProbes, Way};
use crate::probe::tier::ProbeError;

/// `NFNLGRP_NFTABLES` (`include/uapi/linux/netfilter/nfnetlink.h`).
const NFNLGRP_NFTABLES: u32 = 7;
/// `RTNLGRP_IPV4_IFADDR` and `RTNLGRP_IPV6_IFADDR` (`include/uapi/linux/rtnetlink.h`).
const ADDRESS_GROUPS: [u32; 2] = [5, 9];
/// Memory for announcements that wait: a transaction of 30,000 Services announces about 100 MB, which
/// is more; the change is then told without its details.
const ROOM: usize = 32 << 20;
/// How long the thread waits for something to happen, in milliseconds: the longest that stopping takes to
/// be noticed.
const PATIENCE: u16 = 20;
/// How often what the tables of `nf_tables` hold is counted while it is not known, ns.
const COUNT_EVERY: u64 = 1_000_000_000;
/// How often sets of ipset are counted at most, ns: after every change of sets, ...
const COUNT_SETS_EVERY: u64 = 20_000_000;
/// ... and if that takes long, after so many times as long: the kernel walks through all their entries.
const COUNT_SETS_PART: u64 = 20;
/// How long what is under way gets to be completed when the watcher stops, ns.
const LAST_PATIENCE: u64 = 300_000_000;

/// How long a change that is under way is waited for at most, ns: of one whose end was not heard nobody
/// knows that it is over.
const LONGEST_CHANGE: u64 = 30_000_000_000;

/// Why rule changes cannot be heard.
#[derive(Debug, thiserror::Error)]
pub enum ChangesError {
    /// A socket.
    #[error("cannot listen for rule changes: {0}")]
    Netlink(#[from] NetlinkError),
    /// The probes, once they were attached.
    #[error("cannot read the probes for rule changes: {0}")]
    Probes(#[from] ProbeError),
    /// IPVS.
    #[error(transparent)]
    Ipvs(#[from] IpvsError),
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// No thread.
    #[error("cannot start a thread to listen for rule changes: {0}")]
    Thread(#[source] std::io::Error),
}

/// Hears rule changes of one namespace.
#[derive(Debug)]
pub struct Watcher {
    changes: Receiver<Result<RuleChange, ChangesError>>,
    news: Receiver<News>,
    stop: Arc<AtomicBool>,
    lost: Arc<AtomicU64>,
    told: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
    way: Result<Way, String>,
}

impl Watcher {
    /// Begins to listen. If the probes cannot be attached, announcements are listened to alone: see
    /// [`Listening`].
    pub fn start(ns: &Netns) -> Result<Self, ChangesError> {
        Self::start_with(ns, RuleChangeProbes::attach(ns))
    }

    /// Begins to listen with these probes, or without any.
    pub fn start_with(
        ns: &Netns,
        probes: Result<RuleChangeProbes, ProbeError>,
    ) -> Result<Self, ChangesError> {
        let way = match &probes {
            Ok(probes) => Ok(probes.way()),
            Err(error) => Err(error.to_string()),
        };
        let (tell, changes) = channel();
        let (bring, news) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let lost = Arc::new(AtomicU64::new(0));
        let mut ears = Ears::open(ns, probes.ok(), Arc::clone(&lost))?;
        let told = Arc::clone(&ears.told);
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("rule-changes".to_owned())
            .spawn(move || {
                if let Err(error) = ears.listen(&tell, &bring, &stopped) {
                    // Nobody listens any more: the thread ends by itself.
                    let _ = tell.send(Err(error));
                }
            })
            .map_err(ChangesError::Thread)?;
        Ok(Self {
            changes,
            news,
            stop,
            lost,
            told,
            thread: Some(thread),
            way,
        })
    }

    /// The changes since the last call, in order.
    pub fn drain(&self) -> Result<Vec<RuleChange>, ChangesError> {
        self.changes.try_iter().collect()
    }

    /// What is new of Services since the last call, in order and at once: before the changes that it came with are
    /// told.
    pub fn drain_news(&self) -> Vec<News> {
        self.news.try_iter().collect()
    }

    /// Every change that began before this time (`CLOCK_MONOTONIC`, ns) is among those that
    /// [`Watcher::drain`] brings if it is called after this.
    pub fn told_until_ns(&self, now_ns: u64) -> u64 {
        let told = self.told.load(Ordering::Acquire);
        told.max(now_ns.saturating_sub(LONGEST_CHANGE))
    }

    /// Completes what is under way, which takes some tenths of a second at most, and listens no more:
    /// [`Watcher::drain`] then has the rest.
    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }

    /// How changes are heard of.
    pub fn listening(&self) -> Listening {
        Listening {
            probes: self.way.as_ref().ok().map(|way| way.title().to_owned()),
            refused: self.way.as_ref().err().cloned(),
            lost: self.lost.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Everything that is listened to.
struct Ears {
    ns: Netns,
    transactions: Listener,
    addresses: Listener,
    probes: Option<RuleChangeProbes>,
    lost: Arc<AtomicU64>,
    /// See [`Watcher::told_until_ns`].
    told: Arc<AtomicU64>,
    directory: Directory,
    ledger: Ledger,
    assembler: Assembler,
    ipvs: Option<u16>,
    /// Generic families that were asked while IPVS was not loaded.
    families: HashSet<Option<u16>>,
    /// When what the tables of `nf_tables` hold may be counted again (`CLOCK_MONOTONIC`, ns).
    count_at: u64,
    /// When the sets of ipset may be counted again (`CLOCK_MONOTONIC`, ns).
    count_sets_at: u64,
}

impl Ears {
    fn open(
        ns: &Netns,
        mut probes: Option<RuleChangeProbes>,
        lost: Arc<AtomicU64>,
    ) -> Result<Self, ChangesError> {
        let transactions = ns.run(|| Listener::netfilter(NFNLGRP_NFTABLES, ROOM))??;
        let addresses = ns.run(|| Listener::route(&ADDRESS_GROUPS, ROOM))??;
        let ipvs = find_ipvs(ns, probes.as_mut())?;
        // Here, not in the thread: requests are told from now on.
        let mut assembler = Assembler::default();
        assembler.sets.count(ipset::count(ns).ok(), monotonic_ns());
        assembler.sets.rest();
        Ok(Self {
            ns: ns.clone(),
            transactions,
            addresses,
            probes,
            lost,
            told: Arc::default(),
            directory: Directory::of_this_machine(),
            ledger: Ledger::default(),
            assembler,
            ipvs,
            families: HashSet::new(),
            count_at: 0,
            count_sets_at: 0,
        })
    }

    fn listen(
        &mut self,
        tell: &Sender<Result<RuleChange, ChangesError>>,
        bring: &Sender<News>,
        stop: &AtomicBool,
    ) -> Result<(), ChangesError> {
        self.know_addresses()?;
        let mut deadline = None;
        loop {
            self.count();
            self.wait()?;
            let stopped = stop.load(Ordering::Relaxed);
            let begun = monotonic_ns();
            self.take_in()?;
            for news in self.assembler.news() {
                // Who does not want to know has ended, which shows below.
                let _ = bring.send(news);
            }
            let mut now = monotonic_ns();
            if stopped {
                let deadline = *deadline.get_or_insert(now + LAST_PATIENCE);
                if now >= deadline || !self.assembler.is_waiting() {
                    now = u64::MAX;
                }
            }
            self.count_sets(now)?;
            for change in self.assembler.settle(now) {
                if tell.send(Ok(change)).is_err() {
                    return Ok(());
                }
            }
            let told = self.assembler.told_until(begun);
            self.told.store(told, Ordering::Release);
            if now == u64::MAX {
                return Ok(());
            }
        }
    }

    /// Counts what the tables of `nf_tables` hold, if that is not known. Somebody may be changing rules all the
    /// time, or announcements be lost: then it is not known for a while.
    fn count(&mut self) {
        let now = monotonic_ns();
        if self.ledger.knows() || now < self.count_at {
            return;
        }
        if let Ok(held) = nft::count_all(&self.ns) {
            self.ledger.know(held);
        }
        self.count_at = now + COUNT_EVERY;
    }

    /// Counts the sets of ipset, if they were changed and that is to be told by now.
    fn count_sets(&mut self, now: u64) -> Result<(), ChangesError> {
        if !self.assembler.must_count(now) || now < self.count_sets_at {
            return Ok(());
        }
        let from = monotonic_ns();
        self.assembler.sets.count(ipset::count(&self.ns).ok(), from);
        let until = monotonic_ns();
        let rest = COUNT_SETS_PART.saturating_mul(until.saturating_sub(from));
        self.count_sets_at = until.saturating_add(rest.max(COUNT_SETS_EVERY));
        // What was asked for meanwhile may be in the count: it must be known not to be told yet.
        self.take_records()
    }

    fn know_addresses(&mut self) -> Result<(), ChangesError> {
        let request = Request::raw(libc::RTM_GETADDR, NLM_F_DUMP, &[0; IFADDRMSG]);
        let found = self.ns.run(|| {
            Socket::route()?.dump_messages(&request, |found: &mut Vec<_>, header, attributes| {
                found.extend(requests::address(libc::RTM_NEWADDR, header, &attributes)?);
                Ok(())
            })
        })??;
        for address in found {
            self.assembler.addresses.know(&address);
            self.name(address.link)?;
        }
        Ok(())
    }

    /// Learns a link's name, as long as it has one.
    fn name(&mut self, link: u32) -> Result<(), ChangesError> {
        if self.assembler.addresses.has_name(link) {
            return Ok(());
        }
        if let Ok(name) = self.ns.run(|| if_indextoname(link))? {
            let name = name.to_string_lossy().into_owned();
            self.assembler.addresses.name(link, name);
        }
        Ok(())
    }

    fn wait(&self) -> Result<(), NetlinkError> {
        let mut readable = vec![self.transactions.as_fd(), self.addresses.as_fd()];
        readable.extend(self.probes.as_ref().map(RuleChangeProbes::readable));
        wait(&readable, PATIENCE)
    }

    /// Reads everything that there is.
    fn take_in(&mut self) -> Result<(), ChangesError> {
        self.take_records()?;
        self.take_transactions()?;
        self.take_addresses()
    }

    fn take_records(&mut self) -> Result<(), ChangesError> {
        let Some(probes) = &mut self.probes else {
            return Ok(());
        };
        let records = probes.drain();
        self.lost.store(probes.lost()?, Ordering::Relaxed);
        for record in records {
            match record {
                Record::Begin(begin, bytes) => self.begin(&begin, &bytes)?,
                Record::End(end) => self.assembler.end(&end),
                Record::Refusal(refusal) => self.assembler.refuse(&refusal, monotonic_ns()),
            }
        }
        Ok(())
    }

    fn begin(&mut self, begin: &Begin, bytes: &[u8]) -> Result<(), ChangesError> {
        // A generic family that was never asked before: IPVS may have been loaded just now.
        if begin.subsystem == subsystem::IPVS
            && self.ipvs.is_none()
            && self.families.insert(requests::family(bytes))
        {
            self.ipvs = find_ipvs(&self.ns, self.probes.as_mut())?;
        }
        let pid = high(begin.thread);
        let name = text(&begin.name);
        let cgroup = self.directory.cgroup(begin.cgroup, pid, &name);
        let by = Actor {
            pid: Some(pid),
            name: Some(whole_name(name, &text(&begin.argument))),
            parent: Some((begin.parent, text(&begin.parent_name))),
            pod: cgroup.as_deref().and_then(pod_of),
            cgroup,
        };
        self.assembler.begin(*begin, bytes, self.ipvs, by);
        Ok(())
    }

    fn take_transactions(&mut self) -> Result<(), ChangesError> {
        loop {
            let (ledger, assembler) = (&mut self.ledger, &mut self.assembler);
            let heard = self.transactions.listen(NFGENMSG, |announcement| {
                if let Some(announced) = ledger.take(announcement, monotonic_ns())? {
                    assembler.announce(announced);
                }
                Ok(())
            })?;
            match heard {
                Listened::Nothing => return Ok(()),
                Listened::Something => {}
                Listened::Overrun => {
                    self.ledger.lose();
                    self.assembler.lose(monotonic_ns());
                }
            }
        }
    }

    fn take_addresses(&mut self) -> Result<(), ChangesError> {
        loop {
            let mut found = Vec::new();
            let listened = self.addresses.listen(IFADDRMSG, |announcement| {
                let header = announcement.header;
                let address =
                    requests::address(announcement.kind, header, &announcement.attributes)?;
                found.extend(address.map(|address| Heard {
                    read_ns: monotonic_ns(),
                    request: (announcement.port, announcement.sequence),
                    address,
                }));
                Ok(())
            })?;
            for heard in found {
                self.name(heard.address.link)?;
                self.assembler.hear(heard);
            }
            match listened {
                Listened::Nothing => return Ok(()),
                Listened::Something => {}
                Listened::Overrun => self.assembler.addresses.lose(),
            }
        }
    }
}

/// IPVS' generic family, if the kernel has loaded IPVS; the probes then look at no other.
fn find_ipvs(
    ns: &Netns,
    probes: Option<&mut RuleChangeProbes>,
) -> Result<Option<u16>, ChangesError> {
    let Some(probes) = probes else {
        return Ok(None);
    };
    let family = ipvs::generic_family(ns)?;
    if let Some(family) = family {
        probes.set_ipvs_family(family)?;
    }
    Ok(family)
}
