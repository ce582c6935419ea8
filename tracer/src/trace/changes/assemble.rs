//! Changes made of requests, refusals and announcements, in whatever order they are read.
//!
//! Times are `CLOCK_MONOTONIC`, ns; what waits for something else, waits by the clock that it is given.

use std::collections::{BTreeMap, HashMap, VecDeque};

use nix::errno::Errno;
use tracer_ebpf::change::{Begin, End, Refusal, subsystem};

use super::actor::Actor;
use super::addresses::{Addresses, Explanation, Heard, Wanted};
use super::news::{self, News};
use super::nftables::Announced;
use super::requests::{self, Address, Ask, Asked, Batch, ServerChange, SetChange};
use super::sets::{Other, Sets};
use super::{AddressDelta, RuleChange, ServerDelta, What};
use crate::kernel::nft::family_name;
use crate::rules::Mode;
use crate::rules::services::FoundService;

/// Requests of one process and kind are one change until it pauses for so long: kube-proxy writes its
/// servers and sets one by one.
const PAUSE: u64 = 50_000_000;
/// After so long a change is told even if it goes on: longer than kube-proxy's longest syncs of IPVS.
const LONGEST: u64 = 10_000_000_000;
/// How long a request and its announcement, which are read one after the other, wait for each other.
const PATIENCE: u64 = 200_000_000;
/// How long a refusal waits for its request to be told.
const MEMORY: u64 = 5_000_000_000;

/// A request under way.
#[derive(Debug)]
struct Open {
    begin: Begin,
    by: Actor,
    asked: Asked,
    batch: Batch,
    /// The Services that come with it.
    arriving: Vec<FoundService>,
    /// How many requests and refusals there were before.
    order: u64,
}

/// A transaction that has returned and may have been announced.
#[derive(Debug)]
struct Transaction {
    begin_ns: u64,
    end_ns: u64,
    thread: u32,
    port: u32,
    batch: Batch,
    order: u64,
    by: Actor,
}

impl Transaction {
    /// Is it this one's announcement? Not if that names other tables than the batch begins with, where another batch
    /// of the thread may have made it.
    fn is_announced_as(&self, announced: &Announced, by_table: bool) -> bool {
        is_of(self.thread, &self.batch, announced, by_table) && announced.read_ns >= self.begin_ns
    }
}

fn is_of(thread: u32, batch: &Batch, announced: &Announced, by_table: bool) -> bool {
    let names = |(family, table): &(u8, String)| {
        let key = format!("{} {table}", family_name(*family));
        announced.incomplete || announced.tables.is_empty() || announced.tables.contains_key(&key)
    };
    announced.thread == Some(thread)
        && batch.makes(announced.sequence, announced.generation)
        && (!by_table || batch.table().is_none_or(names))
}

/// What the kernel refused, by the message's number.
#[derive(Clone, Copy, Debug, Default)]
struct Refused {
    error: i32,
    /// When it was read.
    read_ns: u64,
    /// How often: some senders number all their messages alike.
    times: u32,
    /// How many requests and refusals there were before.
    order: u64,
}

/// Requests of one process and kind, one soon after the other.
#[derive(Debug)]
struct Group {
    process: u32,
    subsystem: u32,
    begin_ns: u64,
    end_ns: u64,
    by: Actor,
    asks: Vec<Sent>,
    more: bool,
}

impl Group {
    /// Has its process paused since?
    const fn is_quiet(&self, now: u64) -> bool {
        now.saturating_sub(self.end_ns) >= PAUSE
    }
}

/// Something asked for, in a request that has returned.
#[derive(Debug)]
struct Sent {
    id: u64,
    port: u32,
    sequence: u32,
    ask: Ask,
    /// What it returned; negative is an errno.
    result: i64,
}

/// Makes changes.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    open: HashMap<u64, Open>,
    transactions: Vec<Transaction>,
    announced: Vec<Announced>,
    groups: Vec<Group>,
    /// By port and number.
    refusals: HashMap<(u32, u32), Refused>,
    /// How many requests and refusals there were.
    order: u64,
    /// The addresses of the node's links.
    pub(super) addresses: Addresses,
    /// The sets of ipset.
    pub(super) sets: Sets,
    /// How many asks there have been.
    asks: u64,
    /// Were announcements of transactions lost lately? Until when that explains missing ones.
    lost_until: u64,
    ready: Vec<RuleChange>,
    news: Vec<News>,
}

impl Assembler {
    /// A request enters the kernel.
    pub(super) fn begin(&mut self, begin: Begin, bytes: &[u8], ipvs: Option<u16>, by: Actor) {
        self.order += 1;
        let open = Open {
            asked: requests::read(&begin, bytes, ipvs),
            batch: Batch::read(bytes, begin.length),
            arriving: news::of_request(&begin, bytes),
            order: self.order,
            begin,
            by,
        };
        self.open.insert(begin.thread, open);
    }

    /// A thread's request is done.
    pub(super) fn end(&mut self, end: &End) {
        let Some(mut open) = self.open.remove(&end.thread) else {
            return;
        };
        // What the kernel refuses entry by entry, it mostly has already; reading the rules will tell.
        let arrived = std::mem::take(&mut open.arriving);
        if end.result >= 0 && !arrived.is_empty() {
            self.news.push(News {
                time_ns: end.time,
                mode: Mode::Ipvs,
                arrived,
                patch: None,
            });
        }
        match open.begin.subsystem {
            subsystem::NFTABLES => self.transactions.push(Transaction {
                begin_ns: open.begin.time,
                end_ns: end.time,
                thread: low(end.thread),
                port: end.port,
                batch: open.batch,
                order: open.order,
                by: open.by,
            }),
            subsystem::LEGACY => self.ready.extend(legacy(open, end)),
            // A generic family other than IPVS' has asked for nothing.
            _ if open.asked.asks.is_empty() && !open.asked.more => {}
            _ => self.gather(open, end),
        }
    }

    /// The kernel refused something.
    pub(super) fn refuse(&mut self, refusal: &Refusal, now: u64) {
        self.order += 1;
        let key = (refusal.port, refusal.sequence);
        let known = self.refusals.entry(key).or_default();
        *known = Refused {
            error: refusal.error,
            read_ns: now,
            times: known.times + 1,
            order: self.order,
        };
    }

    /// A transaction was announced.
    pub(super) fn announce(&mut self, mut announced: Announced) {
        self.news.extend(announced.news.take());
        self.announced.push(announced);
    }

    /// What is new of Services since the last call.
    pub(super) fn news(&mut self) -> Vec<News> {
        std::mem::take(&mut self.news)
    }

    /// Announcements of transactions were lost.
    pub(super) fn lose(&mut self, now: u64) {
        self.lost_until = now + PATIENCE;
        self.news.push(News {
            time_ns: now,
            mode: Mode::Nftables,
            arrived: Vec::new(),
            patch: None,
        });
    }

    /// An address was announced.
    pub(super) fn hear(&mut self, heard: Heard) {
        if let Some((id, address)) = self.addresses.hear(heard) {
            self.also(id, address);
        }
    }

    /// Is anything waiting for something else?
    pub(super) fn is_waiting(&self) -> bool {
        !(self.transactions.is_empty()
            && self.announced.is_empty()
            && self.groups.is_empty()
            && self.open.is_empty())
            || self.addresses.waiting_since().is_some()
    }

    /// Every change that began before this time has been told, if by `now` everything was taken in.
    pub(super) fn told_until(&self, now: u64) -> u64 {
        let open = self.open.values().map(|open| open.begin.time);
        let transactions = self.transactions.iter().map(|waiting| waiting.begin_ns);
        let announced = self.announced.iter().map(|waiting| waiting.read_ns);
        let groups = self.groups.iter().map(|waiting| waiting.begin_ns);
        let waiting = open.chain(transactions).chain(announced).chain(groups);
        let waiting = waiting.chain(self.addresses.waiting_since());
        waiting.fold(now, u64::min)
    }

    /// What is complete by now, in the order in which it ended. Everything that came before has to have
    /// been taken in.
    pub(super) fn settle(&mut self, now: u64) -> Vec<RuleChange> {
        self.join_transactions(now);
        self.settle_groups(now);
        let heard = self.addresses.unexplained(now, PATIENCE);
        self.ready.extend(self.by_unknown(&heard));
        self.refusals
            .retain(|_, refused| now.saturating_sub(refused.read_ns) < MEMORY);
        let mut ready = std::mem::take(&mut self.ready);
        ready.sort_by_key(|change| change.time_ns);
        ready
    }

    fn join_transactions(&mut self, now: u64) {
        let mut transactions = VecDeque::from(std::mem::take(&mut self.transactions));
        while let Some(transaction) = transactions.pop_front() {
            let waits = now.saturating_sub(transaction.end_ns) < PATIENCE;
            if let Some(at) = self.announcement_of(&transaction, &transactions, waits) {
                let announced = self.announced.remove(at);
                self.ready.push(committed(announced, Some(transaction)));
            } else if let Some(error) = self.refusal_of(&transaction, &transactions) {
                self.ready.push(not_committed(transaction, error));
            } else if waits {
                self.transactions.push(transaction);
            } else if now < self.lost_until.saturating_add(PATIENCE) {
                self.ready.push(unheard(transaction));
            }
            // Otherwise it was empty: nothing is announced of a transaction that does nothing.
        }
        for announced in std::mem::take(&mut self.announced) {
            let waits =
                now.saturating_sub(announced.read_ns) < PATIENCE || self.is_open(announced.thread);
            if waits && now != u64::MAX {
                self.announced.push(announced);
            } else {
                self.ready.push(committed(announced, None));
            }
        }
    }

    /// A batch may begin with what is there already: what it did may be in another table, if no other batch made
    /// that, which is known when none comes any more.
    fn announcement_of(
        &self,
        transaction: &Transaction,
        later: &VecDeque<Transaction>,
        waits: bool,
    ) -> Option<usize> {
        let at = |is: &dyn Fn(&Announced) -> bool| self.announced.iter().position(is);
        at(&|announced| transaction.is_announced_as(announced, true)).or_else(|| {
            let by_another = |announced: &Announced| {
                let mut ended = self.transactions.iter().chain(later);
                let mut open = self.open.values();
                ended.any(|other| other.is_announced_as(announced, true))
                    || open
                        .any(|other| is_of(low(other.begin.thread), &other.batch, announced, true))
            };
            let else_nobodys = |announced: &Announced| {
                transaction.is_announced_as(announced, false) && !by_another(announced)
            };
            (!waits).then(|| at(&else_nobodys)).flatten()
        })
    }

    /// Is this thread still in the kernel?
    fn is_open(&self, thread: Option<u32>) -> bool {
        self.open.keys().any(|open| Some(low(*open)) == thread)
    }

    /// Whatever message of a batch is refused, the batch is: of a refusal that came after it and before the
    /// thread's next one. Other messages of the sender have other numbers.
    fn refusal_of(
        &mut self,
        transaction: &Transaction,
        later: &VecDeque<Transaction>,
    ) -> Option<i32> {
        let ended = self.transactions.iter().chain(later);
        let ended = ended.map(|other| (other.thread, other.order));
        let open = self.open.values();
        let open = open.map(|other| (low(other.begin.thread), other.order));
        let next = ended
            .chain(open)
            .filter(|(thread, order)| *thread == transaction.thread && *order > transaction.order)
            .map(|(_, order)| order)
            .min()
            .unwrap_or(u64::MAX);
        let is_its = |key: &(u32, u32), refused: &Refused| {
            key.0 == transaction.port
                && transaction.batch.has(key.1)
                && (transaction.order..next).contains(&refused.order)
        };
        let mut its = self
            .refusals
            .iter()
            .filter(|(key, refused)| is_its(key, refused));
        let error = its.next().map(|(_, refused)| refused.error)?;
        self.refusals.retain(|key, refused| !is_its(key, refused));
        Some(error)
    }

    /// Was this message refused? Some senders number all their messages alike: a refusal is of one.
    fn answer_to(&mut self, port: u32, sequence: u32) -> Option<i32> {
        let refused = self.refusals.get_mut(&(port, sequence))?;
        refused.times = refused.times.checked_sub(1)?;
        Some(refused.error)
    }

    /// Puts a request with those that its process made just before.
    fn gather(&mut self, open: Open, end: &End) {
        let process = high(end.thread);
        let kind = match open.begin.subsystem {
            subsystem::IPVS_OPTION => subsystem::IPVS,
            other => other,
        };
        let fits = |group: &Group| {
            group.process == process
                && group.subsystem == kind
                && open.begin.time.saturating_sub(group.end_ns) < PAUSE
                && open.begin.time.saturating_sub(group.begin_ns) < LONGEST
        };
        let at = self.groups.iter().rposition(fits).unwrap_or_else(|| {
            self.groups.push(Group {
                process,
                subsystem: kind,
                begin_ns: open.begin.time,
                end_ns: end.time,
                by: open.by,
                asks: Vec::new(),
                more: false,
            });
            self.groups.len() - 1
        });
        let mut more = Vec::new();
        for (sequence, ask) in open.asked.asks {
            self.asks += 1;
            let id = self.asks;
            let request = (end.port, sequence);
            more.extend(
                self.explain(id, end.time, request, &ask)
                    .map(|more| (id, more)),
            );
            if let Some(group) = self.groups.get_mut(at) {
                group.asks.push(Sent {
                    id,
                    port: end.port,
                    sequence,
                    ask,
                    result: end.result,
                });
            }
        }
        if let Some(group) = self.groups.get_mut(at) {
            group.end_ns = group.end_ns.max(end.time);
            group.more |= open.asked.more;
        }
        for (id, address) in more {
            self.also(id, address);
        }
    }

    /// What was heard of addresses that this request explains without having named it.
    fn explain(
        &mut self,
        id: u64,
        end_ns: u64,
        request: (u32, u32),
        ask: &Ask,
    ) -> impl Iterator<Item = Address> + use<> {
        let asked = match ask {
            Ask::Address(address) => Some(Wanted::Address(*address)),
            Ask::NoLink(link) => Some(Wanted::NoLink(self.addresses.index_of(link))),
            _ => None,
        };
        let more = asked.map(|asked| {
            self.addresses.explain(Explanation {
                id,
                end_ns,
                request,
                asked,
                confirmed: false,
            })
        });
        more.into_iter().flatten()
    }

    /// The request with this id changed this address too. If it has been told already, nobody did.
    fn also(&mut self, id: u64, address: Address) {
        for group in &mut self.groups {
            if let Some(sent) = group.asks.iter().find(|sent| sent.id == id) {
                let sent = Sent {
                    // Announced as it is: it needs no confirmation.
                    id: 0,
                    port: sent.port,
                    sequence: sent.sequence,
                    ask: Ask::Address(address),
                    result: sent.result,
                };
                group.asks.push(sent);
                return;
            }
        }
    }

    fn settle_groups(&mut self, now: u64) {
        let mut groups = VecDeque::from(std::mem::take(&mut self.groups));
        let mut waiting = Vec::new();
        while let Some(group) = groups.pop_front() {
            if group.is_quiet(now) && self.is_counted(&group, now) {
                let others = waiting.iter().chain(&groups);
                let told = self.tell(group, others);
                self.ready.extend(told);
            } else {
                waiting.push(group);
            }
        }
        self.groups = waiting;
        if !self.changes_sets() {
            self.sets.rest();
        }
    }

    /// Must the sets be counted before what has come to rest by now can be told?
    pub(super) fn must_count(&self, now: u64) -> bool {
        let waits = |group: &Group| {
            group.is_quiet(now)
                && group.subsystem == subsystem::IPSET
                && self.sets.counted_ns() < group.end_ns
        };
        self.groups.iter().any(waits)
    }

    fn is_counted(&self, group: &Group, now: u64) -> bool {
        group.subsystem != subsystem::IPSET
            || self.sets.counted_ns() >= group.end_ns
            || now == u64::MAX
    }

    /// Is anybody changing sets, or is that still to be told?
    fn changes_sets(&self) -> bool {
        let mut open = self.open.values();
        let mut groups = self.groups.iter();
        open.any(|open| open.begin.subsystem == subsystem::IPSET)
            || groups.any(|group| group.subsystem == subsystem::IPSET)
    }

    /// The change that a group of requests is; `None` if it turns out to be none.
    fn tell<'a>(
        &mut self,
        group: Group,
        others: impl Iterator<Item = &'a Group>,
    ) -> Option<RuleChange> {
        let mut refused = BTreeMap::new();
        let mut incomplete = group.more;
        let mut done = Vec::new();
        for sent in group.asks {
            let answer = self.answer_to(sent.port, sent.sequence);
            // A socket option returns its error; netlink answers, and returns only what went wrong before.
            let error =
                answer.or_else(|| i32::try_from(sent.result).ok().filter(|result| *result < 0));
            if let Some(error) = error {
                *refused.entry(reason(error)).or_default() += 1;
                incomplete |= holds_many(&sent.ask);
            } else if !matches!(sent.ask, Ask::Address(_))
                || sent.id == 0
                || self.addresses.is_confirmed(sent.id)
            {
                done.push(sent.ask);
            }
        }
        let what = match group.subsystem {
            subsystem::IPSET => self.what_sets(&done, others),
            subsystem::IPVS => servers(&done),
            _ => self.links(&done),
        };
        // A link that went without addresses is no change of rules, nor is a set that was as it was to be.
        if what.is_nothing() && refused.is_empty() && !incomplete {
            return None;
        }
        Some(RuleChange {
            time_ns: group.end_ns,
            begin_ns: Some(group.begin_ns),
            by: group.by,
            what,
            refused,
            incomplete,
        })
    }

    /// What was done to sets; `groups` are told at other times.
    fn what_sets<'a>(&mut self, done: &[Ask], groups: impl Iterator<Item = &'a Group>) -> What {
        let counted_ns = self.sets.counted_ns();
        let mut others = Vec::new();
        for group in groups.filter(|group| group.begin_ns <= counted_ns) {
            for sent in &group.asks {
                let refused = self.refusals.contains_key(&(sent.port, sent.sequence));
                if !refused || holds_many(&sent.ask) {
                    others.push(Other {
                        ask: &sent.ask,
                        is_certain: !refused && group.end_ns <= counted_ns,
                    });
                }
            }
        }
        let under_way = self.open.values();
        let under_way = under_way.filter(|open| open.begin.time <= counted_ns);
        let under_way = under_way.flat_map(|open| &open.asked.asks);
        others.extend(under_way.map(|(_, ask)| Other {
            ask,
            is_certain: false,
        }));
        let done: Vec<&Ask> = done.iter().collect();
        What::Ipset {
            sets: self.sets.tell(&done, &others),
        }
    }

    fn links(&self, asks: &[Ask]) -> What {
        let addresses = asks.iter().filter_map(|ask| match ask {
            Ask::Address(address) => Some(address),
            _ => None,
        });
        self.links_of(addresses)
    }

    fn links_of<'a>(&self, addresses: impl Iterator<Item = &'a Address>) -> What {
        let mut links: BTreeMap<String, AddressDelta> = BTreeMap::new();
        for address in addresses {
            let name = self.addresses.name_of(address.link);
            let virtual_ips = Addresses::is_virtual(&name);
            let delta = links.entry(name).or_default();
            delta.virtual_ips = virtual_ips;
            let text = format!("{}/{}", address.ip, address.prefix);
            if address.added {
                delta.added.insert(text);
            } else {
                delta.deleted.insert(text);
            }
        }
        What::Addresses { links }
    }

    /// Addresses that changed without a request that was seen.
    fn by_unknown(&self, heard: &[Heard]) -> Option<RuleChange> {
        let last = heard.last()?;
        Some(RuleChange {
            time_ns: last.read_ns,
            begin_ns: None,
            by: Actor::default(),
            what: self.links_of(heard.iter().map(|heard| &heard.address)),
            refused: BTreeMap::new(),
            incomplete: false,
        })
    }
}

/// Process and thread, as `bpf_get_current_pid_tgid` packs them.
pub(super) const fn high(thread: u64) -> u32 {
    (thread >> 32) as u32
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "the lower half is what is wanted"
)]
const fn low(thread: u64) -> u32 {
    thread as u32
}

fn legacy(open: Open, end: &End) -> Option<RuleChange> {
    let (_, ask) = open.asked.asks.into_iter().next()?;
    let Ask::Legacy {
        family,
        table,
        before,
        after,
    } = ask
    else {
        return None;
    };
    let error = i32::try_from(end.result).ok().filter(|result| *result < 0);
    Some(RuleChange {
        time_ns: end.time,
        begin_ns: Some(open.begin.time),
        by: open.by,
        what: What::IptablesLegacy {
            family: family.to_owned(),
            table,
            before,
            after,
        },
        refused: error.into_iter().map(|error| (reason(error), 1)).collect(),
        incomplete: false,
    })
}

fn committed(announced: Announced, transaction: Option<Transaction>) -> RuleChange {
    let (begin_ns, time_ns, by) = match transaction {
        Some(seen) => (Some(seen.begin_ns), seen.end_ns, seen.by),
        None => (None, announced.read_ns, announced.by),
    };
    RuleChange {
        time_ns,
        begin_ns,
        by,
        what: What::Nftables {
            generation: Some(announced.generation),
            tables: announced.tables,
        },
        refused: BTreeMap::new(),
        incomplete: announced.incomplete,
    }
}

fn of_transaction(transaction: Transaction) -> RuleChange {
    RuleChange {
        time_ns: transaction.end_ns,
        begin_ns: Some(transaction.begin_ns),
        by: transaction.by,
        what: What::Nftables {
            generation: None,
            tables: BTreeMap::new(),
        },
        refused: BTreeMap::new(),
        incomplete: false,
    }
}

fn not_committed(transaction: Transaction, error: i32) -> RuleChange {
    RuleChange {
        refused: [(reason(error), 1)].into(),
        ..of_transaction(transaction)
    }
}

/// A transaction whose announcement was lost with others.
fn unheard(transaction: Transaction) -> RuleChange {
    RuleChange {
        incomplete: true,
        ..of_transaction(transaction)
    }
}

/// What a negative errno says. ipset has numbers of its own above 4096 (`enum ipset_errno`,
/// `include/uapi/linux/netfilter/ipset/ip_set.h`).
fn reason(error: i32) -> String {
    const IPSET: i32 = 4096;
    match error.wrapping_neg() {
        4103 => "ipset: the entry is there already, or is not".to_owned(),
        own if own > IPSET => format!("ipset error {own}"),
        errno => Errno::from_raw(errno).desc().to_owned(),
    }
}

/// Several entries in one message: those before the one that failed are in.
const fn holds_many(ask: &Ask) -> bool {
    matches!(
        ask,
        Ask::Set {
            change: SetChange::Add(2..) | SetChange::Delete(2..),
            ..
        }
    )
}

fn servers(asks: &[Ask]) -> What {
    let mut delta = ServerDelta::default();
    for ask in asks {
        let Ask::Server { server, change } = ask else {
            continue;
        };
        delta.servers.extend(server.clone());
        *match change {
            ServerChange::Add => &mut delta.servers_added,
            ServerChange::Edit => &mut delta.servers_edited,
            ServerChange::Delete => &mut delta.servers_deleted,
            ServerChange::AddReal => &mut delta.reals_added,
            ServerChange::EditReal => &mut delta.reals_edited,
            ServerChange::DeleteReal => &mut delta.reals_deleted,
            ServerChange::Flush => &mut delta.flushed,
            ServerChange::Other => &mut delta.others,
        } += 1;
    }
    What::Ipvs(delta)
}

#[cfg(test)]
mod tests {
    use tracer_ebpf::change::kind;

    use super::*;

    const MS: u64 = 1_000_000;
    const KUBE_PROXY: u64 = process(812, 812);

    const fn process(process: u64, thread: u64) -> u64 {
        (process << 32) + thread
    }

    fn begin(subsystem: u32, thread: u64, time: u64) -> Begin {
        Begin {
            kind: kind::BEGIN,
            subsystem,
            time,
            thread,
            cgroup: 1,
            parent: 1,
            detail: 2,
            length: 0,
            stored: 0,
            name: [0; 16],
            parent_name: [0; 16],
            argument: [0; 64],
        }
    }

    fn end(thread: u64, time: u64, port: u32, result: i64) -> End {
        End {
            kind: kind::END,
            port,
            time,
            thread,
            result,
        }
    }

    fn by(thread: u64) -> Actor {
        Actor {
            pid: Some(high(thread)),
            name: Some("kube-proxy".to_owned()),
            parent: Some((1, "init".to_owned())),
            ..Actor::default()
        }
    }

    /// A netlink message with this number.
    fn message(kind: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + body.len()).expect("short");
        [
            &length.to_ne_bytes()[..],
            &kind.to_ne_bytes(),
            // NLM_F_REQUEST, NLM_F_ACK and NLM_F_EXCL
            &[5, 2],
            &sequence.to_ne_bytes(),
            &[0; 4],
            body,
        ]
        .concat()
    }

    /// `ipset add`, to the set `a`.
    fn add(sequence: u32) -> Vec<u8> {
        message(0x0609, sequence, &[2, 0, 0, 0, 6, 0, 2, 0, b'a', 0, 0, 0])
    }

    fn batch(sequence: u32) -> Vec<u8> {
        [
            message(0x10, 0, &[0, 0, 0, 10]),
            message(0x0a06, sequence, &[2, 0, 0, 0]),
        ]
        .concat()
    }

    fn request(assembler: &mut Assembler, begin: Begin, bytes: &[u8], end: &End) {
        let begin = Begin {
            length: u32::try_from(bytes.len()).expect("short"),
            stored: u32::try_from(bytes.len()).expect("short"),
            ..begin
        };
        assembler.begin(begin, bytes, Some(30), by(begin.thread));
        assembler.end(end);
    }

    /// One that knows no sets, however often it were to count them.
    fn counted() -> Assembler {
        let mut assembler = Assembler::default();
        assembler.sets.count(None, u64::MAX);
        assembler
    }

    fn announced(thread: u32, sequence: u32, generation: u32, read_ns: u64) -> Announced {
        Announced {
            read_ns,
            generation,
            sequence,
            thread: Some(thread),
            by: Actor::default(),
            tables: BTreeMap::new(),
            news: None,
            incomplete: false,
        }
    }

    #[test]
    fn many_requests_of_one_process_are_one_change_until_it_pauses() {
        let mut assembler = counted();
        for i in 0..900 {
            let at = u64::from(i) * MS;
            let begin = begin(subsystem::IPSET, KUBE_PROXY, at);
            request(
                &mut assembler,
                begin,
                &add(i),
                &end(KUBE_PROXY, at + MS / 2, 5, 40),
            );
        }
        // Somebody else meanwhile.
        let other = process(9, 10);
        let its = begin(subsystem::IPSET, other, 7 * MS);
        request(&mut assembler, its, &add(1), &end(other, 8 * MS, 6, 40));
        let first = assembler.settle(899 * MS + PAUSE);
        assert_eq!(first.len(), 1, "{first:#?}");
        assert_eq!(
            (first[0].begin_ns, first[0].time_ns),
            (Some(7 * MS), 8 * MS)
        );
        let rest = assembler.settle(900 * MS + PAUSE);
        let [change] = &rest[..] else {
            panic!("{rest:#?}");
        };
        assert_eq!(
            (change.begin_ns, change.time_ns),
            (Some(0), 899 * MS + MS / 2)
        );
        let What::Ipset { sets } = &change.what else {
            panic!("{change}");
        };
        assert_eq!(sets["a"].added, 900);
        assert_eq!(
            change.to_string(),
            "kube-proxy (pid 812, parent init, pid 1) changed 1 ipset in 899.5 ms: a +900"
        );
        assert!(!assembler.is_waiting());
    }

    #[test]
    fn a_pause_and_a_long_time_end_a_change() {
        let mut assembler = counted();
        let mut ask = |at: u64| {
            let begin = begin(subsystem::IPSET, KUBE_PROXY, at);
            request(&mut assembler, begin, &add(1), &end(KUBE_PROXY, at, 5, 40));
        };
        ask(0);
        ask(PAUSE);
        // From here on without a pause, for longer than one change is.
        for i in 0..LONGEST / (20 * MS) + 10 {
            ask(10 * LONGEST + i * 20 * MS);
        }
        assert_eq!(assembler.settle(u64::MAX).len(), 4);
    }

    #[test]
    fn refusals_are_not_changes() {
        let mut assembler = counted();
        let begin_at = |at| begin(subsystem::IPSET, KUBE_PROXY, at);
        request(
            &mut assembler,
            begin_at(0),
            &add(1),
            &end(KUBE_PROXY, 1, 5, 40),
        );
        let refusal = |sequence, error| Refusal {
            kind: kind::REFUSAL,
            port: 5,
            sequence,
            error,
        };
        assembler.refuse(&refusal(1, -4103), 2);
        request(
            &mut assembler,
            begin_at(3),
            &add(2),
            &end(KUBE_PROXY, 4, 5, 40),
        );
        let changes = assembler.settle(u64::MAX);
        let said = changes[0].to_string();
        assert!(
            said.ends_with("a +1; refused: ipset: the entry is there already, or is not"),
            "{said}"
        );
        assert!(!changes[0].is_refused());

        request(
            &mut assembler,
            begin_at(5),
            &add(3),
            &end(KUBE_PROXY, 6, 5, 40),
        );
        assembler.refuse(&refusal(3, -1), 7);
        let changes = assembler.settle(u64::MAX);
        assert!(changes[0].is_refused());
        let said = changes[0].to_string();
        assert!(
            said.ends_with("could not change ipsets: Operation not permitted"),
            "{said}"
        );
    }

    #[test]
    fn a_legacy_table_is_told_at_once() {
        let mut assembler = Assembler::default();
        let mut bytes = b"nat".to_vec();
        bytes.resize(36, 0);
        bytes.extend(4113_u32.to_ne_bytes());
        bytes.resize(84, 0);
        bytes.extend(12_u32.to_ne_bytes());
        let begin = begin(subsystem::LEGACY, KUBE_PROXY, 1000);
        request(
            &mut assembler,
            begin,
            &bytes,
            &end(KUBE_PROXY, 4_101_000, 0, 0),
        );
        let changes = assembler.settle(4_101_000);
        assert_eq!(
            changes[0].to_string(),
            "kube-proxy (pid 812, parent init, pid 1) committed nat: 12 → 4,113 entries in 4.1 ms"
        );
        let refused = end(KUBE_PROXY, 4_101_000, 0, -22);
        request(&mut assembler, begin, &bytes, &refused);
        let changes = assembler.settle(0);
        assert_eq!(
            changes[0].to_string(),
            "kube-proxy (pid 812, parent init, pid 1) could not commit nat (12 → 4,113 entries): Invalid argument"
        );
    }

    #[test]
    fn transactions_and_their_announcements_find_each_other_in_any_order() {
        let mut assembler = Assembler::default();
        let begin_at = |at| begin(subsystem::NFTABLES, KUBE_PROXY, at);
        // Refused; announced before it returned; announced after it returned.
        request(
            &mut assembler,
            begin_at(1),
            &batch(1),
            &end(KUBE_PROXY, 2, 5, 1),
        );
        let refusal = Refusal {
            kind: kind::REFUSAL,
            port: 5,
            sequence: 1,
            error: -2,
        };
        assembler.refuse(&refusal, 2);
        let refused = assembler.settle(3);
        assert_eq!(refused.len(), 1);
        assert!(refused[0].is_refused());

        assembler.announce(announced(812, 2, 7, 4));
        assert!(assembler.settle(4).is_empty());
        request(
            &mut assembler,
            begin_at(3),
            &batch(2),
            &end(KUBE_PROXY, 5, 5, 1),
        );
        request(
            &mut assembler,
            begin_at(6),
            &batch(3),
            &end(KUBE_PROXY, 8, 5, 1),
        );
        let told = assembler.settle(9);
        assert_eq!(told.len(), 1);
        assert_eq!((told[0].begin_ns, told[0].time_ns), (Some(3), 5));
        assembler.announce(announced(812, 3, 8, 10));
        let told = assembler.settle(11);
        assert_eq!(told.len(), 1);
        assert_eq!((told[0].begin_ns, told[0].time_ns), (Some(6), 8));
        assert_eq!(told[0].by.name.as_deref(), Some("kube-proxy"));
        assert!(!assembler.is_waiting());
    }

    /// A batch of iptables-nft about a table, which has seen this generation.
    fn batch_about(table: [u8; 4], seen: u8) -> Vec<u8> {
        let about = [&[2, 0, 0, 0, 8, 0, 1, 0][..], &table].concat();
        [
            message(0x10, 1, &[0, 0, 0, 10, 8, 0, 1, 0, 0, 0, 0, seen]),
            message(0x0a08, 2, &about),
        ]
        .concat()
    }

    fn announced_of(table: &str, generation: u32, read_ns: u64) -> Announced {
        Announced {
            tables: [(format!("ip {table}"), super::super::Delta::default())].into(),
            ..announced(812, 2, generation, read_ns)
        }
    }

    /// iptables-nft-restore numbers the messages of every table alike, and asks for chains that are not there.
    #[test]
    fn tables_of_one_process_are_told_apart() {
        let refusal = |sequence| Refusal {
            kind: kind::REFUSAL,
            port: 5,
            sequence,
            error: -2,
        };
        let mut assembler = Assembler::default();
        assembler.refuse(&refusal(0), 1);
        let mut at = 10;
        for (table, seen) in [(*b"raw\0", 4), (*b"flt\0", 4), (*b"nat\0", 5)] {
            let begin = begin(subsystem::NFTABLES, KUBE_PROXY, at);
            let end = end(KUBE_PROXY, at + 5, 5, 1);
            request(&mut assembler, begin, &batch_about(table, seen), &end);
            assembler.refuse(&refusal(0), at + 6);
            at += 10;
        }
        // What raw asked for was so already.
        assembler.announce(announced_of("flt", 5, 50));
        assembler.announce(announced_of("nat", 6, 50));
        let told = assembler.settle(60);
        let spans: Vec<_> = told
            .iter()
            .map(|change| (change.begin_ns, change.time_ns, change.is_refused()))
            .collect();
        assert_eq!(spans, [(Some(20), 25, false), (Some(30), 35, false)]);
        assert!(assembler.settle(MS + PATIENCE).is_empty());
        assert!(!assembler.is_waiting());
        // The second of two is refused, by its own number.
        for at in [10, 20] {
            let begin = begin(subsystem::NFTABLES, KUBE_PROXY, 2 * PATIENCE + at);
            let end = end(KUBE_PROXY, 2 * PATIENCE + at + 5, 5, 1);
            request(&mut assembler, begin, &batch_about(*b"nat\0", 6), &end);
        }
        assembler.refuse(&refusal(2), 2 * PATIENCE + 26);
        let told = assembler.settle(3 * PATIENCE + MS);
        assert_eq!(told.len(), 1, "{told:#?}");
        assert_eq!(told[0].begin_ns, Some(2 * PATIENCE + 20));
        assert!(told[0].is_refused());
    }

    /// A batch may begin with what is there already.
    #[test]
    fn a_batch_may_do_something_to_another_table_than_its_first() {
        let mut assembler = Assembler::default();
        let begin = begin(subsystem::NFTABLES, KUBE_PROXY, 10);
        let end = end(KUBE_PROXY, 15, 5, 1);
        request(&mut assembler, begin, &batch_about(*b"raw\0", 4), &end);
        assembler.announce(announced_of("nat", 5, 15));
        assert!(assembler.settle(20).is_empty());
        let told = assembler.settle(15 + PATIENCE);
        assert_eq!(told.len(), 1, "{told:#?}");
        assert_eq!((told[0].begin_ns, told[0].time_ns), (Some(10), 15));
    }

    #[test]
    fn a_transaction_without_the_other_half_is_told_when_it_did_something() {
        let mut assembler = Assembler::default();
        // Nobody saw the request.
        assembler.announce(announced(7, 1, 3, MS));
        assert!(assembler.settle(2 * MS).is_empty());
        let told = assembler.settle(MS + PATIENCE);
        assert_eq!((told[0].begin_ns, told[0].time_ns), (None, MS));
        // A batch that holds nothing is not announced, unless announcements were lost.
        let begin = begin(subsystem::NFTABLES, KUBE_PROXY, 0);
        request(&mut assembler, begin, &batch(1), &end(KUBE_PROXY, 1, 5, 1));
        assert!(assembler.settle(u64::MAX).is_empty());
        assembler.lose(MS);
        request(&mut assembler, begin, &batch(1), &end(KUBE_PROXY, 1, 5, 1));
        let told = assembler.settle(MS + PATIENCE);
        assert!(told[0].incomplete, "{told:#?}");
    }

    fn address(last: u8, added: bool) -> (Vec<u8>, Address) {
        let kind = if added { 20 } else { 21 };
        let body = [2, 32, 0, 0, 3, 0, 0, 0, 8, 0, 2, 0, 10, 96, 0, last];
        let address = Address {
            link: 3,
            ip: std::net::IpAddr::from([10, 96, 0, last]),
            prefix: 32,
            added,
        };
        (message(kind, u32::from(last), &body), address)
    }

    fn heard(address: Address, request: (u32, u32)) -> Heard {
        Heard {
            read_ns: 10,
            request,
            address,
        }
    }

    #[test]
    fn addresses_are_credited_to_whose_request_it_was() {
        let mut assembler = Assembler::default();
        assembler.addresses.name(3, "kube-ipvs0".to_owned());
        let ask = |assembler: &mut Assembler, bytes: &[u8]| {
            let begin = begin(subsystem::ADDRESSES, KUBE_PROXY, 5);
            request(assembler, begin, bytes, &end(KUBE_PROXY, 6, 5, 40));
        };
        // Announced after the request was read, and before; the latter once more, as IPv6 does.
        let (bytes, one) = address(1, true);
        ask(&mut assembler, &bytes);
        assembler.hear(heard(one, (5, 1)));
        let (bytes, two) = address(2, true);
        assembler.hear(heard(two, (0, 0)));
        ask(&mut assembler, &bytes);
        assembler.hear(heard(two, (0, 0)));
        // Asked for, but it was there before.
        ask(&mut assembler, &address(2, true).0);
        let told = assembler.settle(MS + PAUSE);
        assert_eq!(
            told[0].to_string(),
            "kube-proxy (pid 812, parent init, pid 1) changed addresses in 1 ns: kube-ipvs0 (Services' \
             addresses) +2 (10.96.0.1/32, 10.96.0.2/32)"
        );
        assert_eq!(told.len(), 1);

        // The link goes, and takes the addresses along.
        let no_link = message(17, 9, &[0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assembler.hear(heard(address(1, false).1, (0, 0)));
        ask(&mut assembler, &no_link);
        assembler.hear(heard(address(2, false).1, (0, 0)));
        let told = assembler.settle(u64::MAX);
        let What::Addresses { links } = &told[0].what else {
            panic!("{told:#?}");
        };
        assert_eq!((told.len(), links["kube-ipvs0"].deleted.len()), (1, 2));

        // Nobody asked.
        assembler.hear(heard(address(4, true).1, (0, 0)));
        assert!(assembler.settle(20).is_empty() && assembler.is_waiting());
        let told = assembler.settle(10 + PATIENCE);
        assert_eq!(
            told[0].to_string(),
            "unknown process changed addresses: kube-ipvs0 (Services' addresses) +1 (10.96.0.4/32)"
        );
    }

    #[test]
    fn requests_that_changed_nothing_are_no_changes() {
        let mut assembler = Assembler::default();
        // An address that is there, a link without addresses, another generic family.
        let (bytes, there) = address(1, true);
        assembler.addresses.know(&there);
        for (kind, bytes) in [
            (subsystem::ADDRESSES, bytes),
            (
                subsystem::ADDRESSES,
                message(17, 9, &[0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            ),
            (subsystem::IPVS, message(31, 9, &[1, 1, 0, 0])),
        ] {
            let begin = begin(kind, KUBE_PROXY, 5);
            request(&mut assembler, begin, &bytes, &end(KUBE_PROXY, 6, 5, 40));
            let told = assembler.settle(u64::MAX);
            assert!(told.is_empty(), "{told:#?}");
        }
    }

    #[test]
    fn sets_are_counted_before_a_change_of_them_is_told() {
        let count = |entries| Some([("a".to_owned(), entries)].into());
        let mut assembler = Assembler::default();
        assembler.sets.count(count(1), 0);
        assembler.sets.rest();
        let mut add = add(1);
        add[7] = 0; // -exist
        let ask = |assembler: &mut Assembler, at| {
            let begin = begin(subsystem::IPSET, KUBE_PROXY, at);
            request(assembler, begin, &add, &end(KUBE_PROXY, at + 1, 5, 40));
        };
        ask(&mut assembler, MS);
        assert!(!assembler.must_count(2 * MS));
        assert_eq!(assembler.told_until(2 * MS), MS);
        assert!(assembler.must_count(MS + 1 + PAUSE));
        assert!(assembler.settle(MS + 1 + PAUSE).is_empty() && assembler.is_waiting());
        // It was there: nothing changed.
        assembler.sets.count(count(1), 2 * MS);
        assert!(assembler.settle(MS + 1 + PAUSE).is_empty());
        assert!(!assembler.is_waiting() && !assembler.must_count(u64::MAX));
        assert_eq!(assembler.told_until(2 * MS), 2 * MS);

        ask(&mut assembler, 3 * MS);
        assembler.sets.count(count(2), 4 * MS);
        let told = assembler.settle(u64::MAX);
        assert!(told[0].to_string().ends_with(": a +1"), "{told:#?}");
        // Nobody can count them any more.
        ask(&mut assembler, 5 * MS);
        assembler.sets.count(None, 6 * MS);
        let told = assembler.settle(u64::MAX);
        assert_eq!(
            told[0].to_string(),
            "kube-proxy (pid 812, parent init, pid 1) may have changed 1 ipset in 1 ns: a 1 with -exist \
             (perhaps so before)"
        );
    }
}
