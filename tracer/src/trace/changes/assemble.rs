//! Changes made of requests, refusals and announcements, in whatever order they are read.
//!
//! Times are `CLOCK_MONOTONIC`, ns; what waits for something else, waits by the clock that it is given.

use std::collections::{BTreeMap, HashMap};

use nix::errno::Errno;
use tracer_ebpf::change::{Begin, End, Refusal, subsystem};

use super::actor::Actor;
use super::addresses::{Addresses, Explanation, Heard, Wanted};
use super::nftables::Announced;
use super::requests::{self, Address, Ask, Asked, ServerChange, SetChange};
use super::{AddressDelta, RuleChange, ServerDelta, SetDelta, What};

/// Requests of one process and kind are one change until it pauses for so long: kube-proxy writes its
/// servers and sets one by one.
const PAUSE: u64 = 50_000_000;
/// After so long a change is told even if it goes on.
const LONGEST: u64 = 1_000_000_000;
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
    /// See [`requests::sequence_of_batch`].
    sequence: Option<u32>,
}

/// A transaction that has returned and may have been announced.
#[derive(Debug)]
struct Transaction {
    begin_ns: u64,
    end_ns: u64,
    thread: u32,
    port: u32,
    sequence: Option<u32>,
    by: Actor,
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
    /// By port and number: the error, and when it was read.
    refusals: HashMap<(u32, u32), (i32, u64)>,
    /// The addresses of the node's links.
    pub(super) addresses: Addresses,
    /// How many asks there have been.
    asks: u64,
    /// Were announcements of transactions lost lately? Until when that explains missing ones.
    lost_until: u64,
    ready: Vec<RuleChange>,
}

impl Assembler {
    /// A request enters the kernel.
    pub(super) fn begin(&mut self, begin: Begin, bytes: &[u8], ipvs: Option<u16>, by: Actor) {
        let open = Open {
            asked: requests::read(&begin, bytes, ipvs),
            sequence: requests::sequence_of_batch(bytes),
            begin,
            by,
        };
        self.open.insert(begin.thread, open);
    }

    /// A thread's request is done.
    pub(super) fn end(&mut self, end: &End) {
        let Some(open) = self.open.remove(&end.thread) else {
            return;
        };
        match open.begin.subsystem {
            subsystem::NFTABLES => self.transactions.push(Transaction {
                begin_ns: open.begin.time,
                end_ns: end.time,
                thread: low(end.thread),
                port: end.port,
                sequence: open.sequence,
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
        let key = (refusal.port, refusal.sequence);
        self.refusals.insert(key, (refusal.error, now));
    }

    /// A transaction was announced.
    pub(super) fn announce(&mut self, announced: Announced) {
        self.announced.push(announced);
    }

    /// Announcements of transactions were lost.
    pub(super) fn lose(&mut self, now: u64) {
        self.lost_until = now + PATIENCE;
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
            || self.addresses.is_waiting()
    }

    /// What is complete by now, in the order in which it ended. Everything that came before has to have
    /// been taken in.
    pub(super) fn settle(&mut self, now: u64) -> Vec<RuleChange> {
        self.join_transactions(now);
        self.settle_groups(now);
        let heard = self.addresses.unexplained(now, PATIENCE);
        self.ready.extend(self.by_unknown(&heard));
        self.refusals
            .retain(|_, (_, read)| now.saturating_sub(*read) < MEMORY);
        let mut ready = std::mem::take(&mut self.ready);
        ready.sort_by_key(|change| change.time_ns);
        ready
    }

    fn join_transactions(&mut self, now: u64) {
        let transactions = std::mem::take(&mut self.transactions);
        for transaction in transactions {
            if let Some(at) = self.announcement_of(&transaction) {
                let announced = self.announced.remove(at);
                self.ready.push(committed(announced, Some(transaction)));
            } else if let Some(error) = self.refusal_of(transaction.port) {
                self.ready.push(not_committed(transaction, error));
            } else if now.saturating_sub(transaction.end_ns) < PATIENCE {
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

    fn announcement_of(&self, transaction: &Transaction) -> Option<usize> {
        self.announced.iter().position(|announced| {
            announced.thread == Some(transaction.thread)
                && transaction.sequence == Some(announced.sequence)
        })
    }

    /// Is this thread still in the kernel?
    fn is_open(&self, thread: Option<u32>) -> bool {
        self.open.keys().any(|open| Some(low(*open)) == thread)
    }

    /// Whatever message of a batch is refused, the batch is.
    fn refusal_of(&mut self, port: u32) -> Option<i32> {
        let key = *self.refusals.keys().find(|key| key.0 == port)?;
        let error = self.refusals.remove(&key).map(|(error, _)| error);
        self.refusals.retain(|key, _| key.0 != port);
        error
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
        for group in std::mem::take(&mut self.groups) {
            let quiet = now.saturating_sub(group.end_ns) >= PAUSE;
            if quiet {
                let told = self.tell(group);
                self.ready.extend(told);
            } else {
                self.groups.push(group);
            }
        }
    }

    /// The change that a group of requests is; `None` if it turns out to be none.
    fn tell(&mut self, group: Group) -> Option<RuleChange> {
        let mut refused = BTreeMap::new();
        let mut incomplete = group.more;
        let mut done = Vec::new();
        for sent in group.asks {
            let answer = self.refusals.get(&(sent.port, sent.sequence));
            // A socket option returns its error; netlink answers, and returns only what went wrong before.
            let error = answer
                .map(|(error, _)| *error)
                .or_else(|| i32::try_from(sent.result).ok().filter(|result| *result < 0));
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
            subsystem::IPSET => sets(&done),
            subsystem::IPVS => servers(&done),
            _ => self.links(&done),
        };
        if done.is_empty() && refused.is_empty() && !incomplete {
            return None;
        }
        // A link that went without addresses is no change of rules.
        if matches!(&what, What::Addresses { links } if links.is_empty())
            && refused.is_empty()
            && !incomplete
        {
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
            let text = format!("{}/{}", address.address, address.prefix);
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
            family,
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

fn sets(asks: &[Ask]) -> What {
    let mut sets: BTreeMap<String, SetDelta> = BTreeMap::new();
    for ask in asks {
        let Ask::Set { set, change } = ask else {
            continue;
        };
        let name = set.as_deref().unwrap_or("all sets");
        let delta = sets.entry(name.to_owned()).or_default();
        match change {
            SetChange::Create => delta.created += 1,
            SetChange::Destroy => delta.destroyed += 1,
            SetChange::Flush => delta.flushed += 1,
            SetChange::Rename => delta.renamed += 1,
            SetChange::Add(count) => delta.added += count,
            SetChange::Delete(count) => delta.deleted += count,
        }
    }
    What::Ipset { sets }
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
