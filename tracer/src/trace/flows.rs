//! New flows, from their first packet until it is known what became of them.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;

use serde::Serialize;

use super::directory::Directory;
use super::journey::{End, Journey};
use super::verdict::{Verdict, Who};
use crate::report::units;

/// How long a flow may go without an answer, ns: a TCP client has sent its SYN again after 1 s (RFC 6298,
/// section 2) and after 3 s by then.
const PATIENCE_NS: u64 = 3_000_000_000;
/// A flow this old at a session's end that nobody answered is unanswered, ns; a younger one is undecided.
const PATIENCE_AT_END_NS: u64 = 1_000_000_000;
/// How long a drop waits for the ICMP error that may belong to it, ns.
const GRACE_NS: u64 = 100_000_000;
/// How long a decided flow is remembered, ns: an answer may come late, and packets of what conntrack does
/// not track all look like first ones.
const REMEMBERED_NS: u64 = 60_000_000_000;
/// The most flows that are remembered; beyond, the oldest is forgotten, and counted.
const MOST: usize = 1 << 18;
/// The kernel's reason for what its rules drop, without its prefix.
const NETFILTER_DROP: &str = "NETFILTER_DROP";
/// The directory knows all that the rules say.
pub const ALL_READ: u64 = u64::MAX;
/// Answers that came before their flow's first packet was told: on another CPU that can happen.
const EARLY: usize = 1024;

/// What makes a flow: protocol number, who asks, what is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// IP protocol number.
    pub protocol: u8,
    /// Who asks.
    pub source: SocketAddr,
    /// What is asked for.
    pub destination: SocketAddr,
}

/// What came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Back {
    /// An answer.
    Answer(SocketAddr),
    /// A TCP RST or an SCTP ABORT.
    Reset(Who),
    /// An ICMP error: who sent it and what it says.
    Error(Who, &'static str),
}

impl std::fmt::Display for Decided {
    /// Whose it is, from where to where, and what became of it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} {} {} → {}  {}",
            self.service, self.path, self.source, self.destination, self.verdict
        )?;
        if let Some(after_ns) = self.after_ns {
            write!(f, " after {}", units::time_u64(after_ns))?;
        }
        match &self.corrects {
            Some(before) => write!(f, " (was: {before})"),
            None => Ok(()),
        }
    }
}

/// A flow of which it is known now what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decided {
    /// When it was (`CLOCK_MONOTONIC`, ns).
    pub time_ns: u64,
    /// The Service's index in the directory.
    #[serde(skip)]
    pub index: usize,
    /// `ns/name:port`.
    pub service: String,
    /// IP protocol number.
    pub protocol: u8,
    /// Who asked.
    pub source: SocketAddr,
    /// What was asked for.
    pub destination: SocketAddr,
    /// `pod→ClusterIP`, ...
    pub path: &'static str,
    /// Where its first packet was headed at the end; `None` if unknown.
    pub headed: Option<SocketAddr>,
    /// When its first packet came to the node (`CLOCK_MONOTONIC`, ns).
    pub first_ns: u64,
    /// From its first packet to what came back, ns; absent if nothing did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after_ns: Option<u64>,
    /// Did rules of this node drop its first packet or its answer, be it with an ICMP error?
    #[serde(skip)]
    pub filtered: bool,
    /// What had been said of it before, if this corrects it: an answer came late.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrects: Option<Box<Verdict>>,
    /// What became of it.
    #[serde(flatten)]
    pub verdict: Verdict,
}

#[derive(Debug)]
struct Flow {
    index: usize,
    path: &'static str,
    first_ns: u64,
    /// When its first packet came last.
    last_ns: u64,
    end: End,
    headed: Option<SocketAddr>,
    /// Did conntrack know it before its first packet here?
    known: bool,
    /// By what its first packet is known if it is sent once more: see [`Headers::opening`].
    ///
    /// [`Headers::opening`]: crate::record::headers::Headers::opening
    opening: Option<u32>,
    back: Option<(Back, u64)>,
    /// How its answer was dropped on this node, if it was.
    lost_answer: Option<End>,
    verdict: Option<Verdict>,
}

/// What is known of a flow by now.
#[derive(Debug, PartialEq, Eq)]
enum Judged {
    Is(Verdict),
    /// An ICMP error may follow.
    InGrace,
    /// An answer may come.
    Open,
    /// The rules have to be read first.
    Unread,
}

/// A flow that waits, with the time of its first packet: another may have taken its place by then.
type Waiting = VecDeque<(u64, Key)>;

/// Flows under way. None is in more than a constant number of queues, each of which is in the order of
/// time: what a call costs depends on what happened since the last one, not on how many flows there are.
#[derive(Debug, Default)]
pub struct Flows {
    known: HashMap<Key, Flow>,
    /// Something happened to them.
    touched: Waiting,
    in_grace: Waiting,
    open: Waiting,
    unread: Waiting,
    /// What the rules said of packets before was known (`CLOCK_MONOTONIC`, ns).
    read_ns: u64,
    /// Decided, and remembered.
    decided: Waiting,
    /// Whose clients use their ports again.
    over: Vec<(Key, Flow)>,
    /// By time, and some that are gone.
    early: HashMap<Key, (Back, u64)>,
    early_order: VecDeque<Key>,
    forgotten: u64,
}

impl Flows {
    /// Flows that were forgotten undecided, because too many were under way.
    pub const fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// Takes in a first packet, with what conntrack knew of its flow before and what it opens; is the flow new,
    /// and not only its packet sent once more?
    pub fn first(
        &mut self,
        key: Key,
        index: usize,
        journey: &Journey,
        known: bool,
        opening: Option<u32>,
    ) -> bool {
        self.end_if_other(key, opening);
        if let Some(flow) = self.known.get_mut(&key) {
            // The last packet tells best where the flow stands.
            flow.last_ns = journey.time_ns;
            flow.end = journey.end.clone();
            flow.headed = journey.headed.or(flow.headed);
            flow.known |= known;
            if flow.verdict.is_none() {
                self.touched.push_back((flow.first_ns, key));
            }
            return false;
        }
        self.make_room();
        // What came back before this packet came belongs to a flow before this one.
        let back = self.early.remove(&key);
        let back = back.filter(|(_, time_ns)| *time_ns >= journey.time_ns);
        self.known.insert(
            key,
            Flow {
                index,
                path: journey.path,
                first_ns: journey.time_ns,
                last_ns: journey.time_ns,
                end: journey.end.clone(),
                headed: journey.headed,
                known,
                opening,
                back,
                lost_answer: None,
                verdict: None,
            },
        );
        self.touched.push_back((journey.time_ns, key));
        true
    }

    /// A flow is about to be counted as this Service's, which the rules that were read meanwhile say: whose it is, so that
    /// all that is told of it is told of one. Its verdict may have been told already.
    pub fn owned_by(&mut self, key: &Key, first_ns: u64, index: usize) -> usize {
        match self.known.get_mut(key) {
            Some(flow) if flow.first_ns == first_ns => {
                if flow.verdict.is_none() {
                    flow.index = index;
                }
                flow.index
            }
            _ => index,
        }
    }

    /// Would a packet be its flow's first one, sent once more, by what is remembered of the flow? `None` if
    /// nothing is: most flows are forgotten once they are answered.
    pub fn is_repeated(&self, key: &Key) -> Option<bool> {
        let flow = self.known.get(key)?;
        Some(!matches!(flow.back, Some((Back::Answer(_), _))))
    }

    /// A client that opens another connection from the same port has given up the one before.
    fn end_if_other(&mut self, key: Key, opening: Option<u32>) {
        let other = |flow: &Flow| {
            let both = flow.opening.zip(opening);
            both.is_some_and(|(one, other)| one != other)
        };
        if !self.known.get(&key).is_some_and(other) {
            return;
        }
        let Some(flow) = self.known.remove(&key) else {
            return;
        };
        if self.over.len() < MOST {
            self.over.push((key, flow));
        } else {
            self.forgotten += u64::from(flow.verdict.is_none());
        }
    }

    /// A flow's first packet went on to an endpoint on this very node: where it stands now. Is the flow known?
    pub fn further(&mut self, key: Key, journey: &Journey) -> bool {
        let Some(flow) = self.known.get_mut(&key) else {
            return false;
        };
        flow.end = journey.end.clone();
        flow.headed = journey.headed.or(flow.headed);
        self.touched.push_back((flow.first_ns, key));
        true
    }

    /// What came back was dropped on this node; is it of a flow that nothing has come back of yet?
    pub fn answer_dropped(&mut self, key: Key, end: &End) -> bool {
        let Some(flow) = self.known.get_mut(&key).filter(|flow| flow.back.is_none()) else {
            return false;
        };
        flow.lost_answer = Some(end.clone());
        self.touched.push_back((flow.first_ns, key));
        true
    }

    /// Something came back; is it the first that did, of a flow that is open?
    pub fn came_back(&mut self, key: Key, back: Back, time_ns: u64) -> bool {
        let Some(flow) = self.known.get_mut(&key) else {
            // The first tells most, unless it is an earlier flow's.
            let early = self.early.entry(key).or_insert((back, time_ns));
            if time_ns.saturating_sub(early.1) > GRACE_NS {
                *early = (back, time_ns);
            }
            self.early_order.push_back(key);
            if self.early_order.len() > EARLY
                && let Some(oldest) = self.early_order.pop_front()
            {
                self.early.remove(&oldest);
            }
            return false;
        };
        // Clients go on after many an error (RFC 1122, section 4.2.3.9), and may be answered yet. They reset what answers
        // for a connection before this one, from the same port, and send their SYN again (RFC 9293, section 3.5.2).
        let goes_on = matches!(
            flow.back,
            Some((Back::Error(..) | Back::Reset(Who::Client), _))
        ) && matches!(back, Back::Answer(_) | Back::Reset(_))
            && flow.back.is_none_or(|(before, _)| before != back);
        if flow.back.is_some() && !goes_on {
            return false;
        }
        flow.back = Some((back, time_ns));
        self.touched.push_back((flow.first_ns, key));
        true
    }

    /// The flows of which it is known by now what became of them. What the rules say of packets before `read_ns`
    /// (`CLOCK_MONOTONIC`) is known to the directory; of later ones it may not be. `remembers` tells whether
    /// somebody other than conntrack remembers that a flow goes to a former endpoint.
    pub fn decide(
        &mut self,
        directory: &Directory,
        read_ns: u64,
        now_ns: u64,
        mut remembers: impl FnMut(&Key, SocketAddr) -> bool,
    ) -> Vec<Decided> {
        let mut due = std::mem::take(&mut self.touched);
        if read_ns > self.read_ns {
            due.append(&mut self.unread);
        }
        // It goes back to when the rules were read once they have changed.
        self.read_ns = read_ns;
        take_older(&mut self.in_grace, now_ns, GRACE_NS, &mut due);
        take_older(&mut self.open, now_ns, PATIENCE_NS, &mut due);
        let mut decided = self.end_those_over(directory, read_ns, now_ns, &mut remembers);
        for (first_ns, key) in due {
            let looked = self.look_at(key, first_ns, directory, read_ns, now_ns, &mut remembers);
            decided.extend(looked);
        }
        let mut old = Waiting::new();
        take_older(&mut self.decided, now_ns, REMEMBERED_NS, &mut old);
        for (first_ns, key) in old {
            self.remove(key, first_ns);
        }
        decided
    }

    /// Nothing more will become of these.
    fn end_those_over(
        &mut self,
        directory: &Directory,
        read_ns: u64,
        now_ns: u64,
        mut remembers: impl FnMut(&Key, SocketAddr) -> bool,
    ) -> Vec<Decided> {
        let mut decided = Vec::new();
        for (key, mut flow) in std::mem::take(&mut self.over) {
            let verdict = match flow.judge(directory, read_ns, now_ns, 0, |to| remembers(&key, to))
            {
                Judged::Is(verdict) => verdict,
                Judged::InGrace => flow.dropped().unwrap_or(Verdict::Undecided),
                Judged::Open | Judged::Unread => {
                    self.over.push((key, flow));
                    continue;
                }
            };
            decided.extend(flow.decide(key, verdict, directory, now_ns));
        }
        decided
    }

    fn look_at(
        &mut self,
        key: Key,
        first_ns: u64,
        directory: &Directory,
        read_ns: u64,
        now_ns: u64,
        mut remembers: impl FnMut(&Key, SocketAddr) -> bool,
    ) -> Option<Decided> {
        let flow = self.known.get_mut(&key)?;
        if flow.first_ns != first_ns {
            return None;
        }
        let verdict = match flow.judge(directory, read_ns, now_ns, PATIENCE_NS, |to| {
            remembers(&key, to)
        }) {
            Judged::Is(verdict) => verdict,
            Judged::InGrace => {
                self.in_grace.push_back((first_ns, key));
                return None;
            }
            Judged::Open => {
                self.open.push_back((first_ns, key));
                return None;
            }
            Judged::Unread => {
                self.unread.push_back((first_ns, key));
                return None;
            }
        };
        let first = flow.verdict.is_none();
        let decided = flow.decide(key, verdict, directory, now_ns);
        if matches!(flow.back, Some((Back::Answer(_), _))) {
            // What was answered needs no more memory.
            self.known.remove(&key);
        } else if first {
            self.decided.push_back((first_ns, key));
        }
        decided
    }

    /// Every flow that began before this time has been decided (`CLOCK_MONOTONIC`, ns).
    pub fn known_until_ns(&mut self, now_ns: u64) -> u64 {
        let Self {
            known,
            in_grace,
            open,
            unread,
            touched,
            over,
            ..
        } = self;
        let undecided = |(first_ns, key): &(u64, Key)| {
            known
                .get(key)
                .is_some_and(|flow| flow.first_ns == *first_ns && flow.verdict.is_none())
        };
        // Each is in the order of time but the last two, which are short or hold up everything anyway.
        while open.front().is_some_and(|waiting| !undecided(waiting)) {
            open.pop_front();
        }
        let fronts = [open.front(), in_grace.front()];
        let others = unread.iter().chain(touched.iter());
        let waiting = fronts.into_iter().flatten().chain(others);
        let earliest = waiting
            .filter(|w| undecided(w))
            .map(|(first_ns, _)| *first_ns);
        let over = over.iter().filter(|(_, flow)| flow.verdict.is_none());
        let over = over.map(|(_, flow)| flow.first_ns);
        earliest.chain(over).min().unwrap_or(now_ns)
    }

    /// The session ends: of what is still open, what is old enough is unanswered. `read_ns`: as for [`Flows::decide`].
    pub fn finish(
        &mut self,
        directory: &Directory,
        read_ns: u64,
        now_ns: u64,
        mut remembers: impl FnMut(&Key, SocketAddr) -> bool,
    ) -> Vec<Decided> {
        let mut decided = self.decide(directory, read_ns, now_ns, &mut remembers);
        let open = [&mut self.in_grace, &mut self.open, &mut self.unread].map(std::mem::take);
        for (first_ns, key) in open.into_iter().flatten() {
            let Some(flow) = self.known.get_mut(&key) else {
                continue;
            };
            if flow.first_ns != first_ns || flow.verdict.is_some() {
                continue;
            }
            let verdict = match flow.judge(directory, read_ns, now_ns, PATIENCE_AT_END_NS, |to| {
                remembers(&key, to)
            }) {
                Judged::Is(verdict) => verdict,
                Judged::InGrace => flow.dropped().unwrap_or(Verdict::Undecided),
                Judged::Open | Judged::Unread => Verdict::Undecided,
            };
            decided.extend(flow.decide(key, verdict, directory, now_ns));
        }
        decided
    }

    /// Forgets a flow, unless a later one has taken its place.
    fn remove(&mut self, key: Key, first_ns: u64) -> Option<Flow> {
        let same = self.known.get(&key)?.first_ns == first_ns;
        if same { self.known.remove(&key) } else { None }
    }

    /// Sees to it that there is room for one more: what was decided longest ago goes first.
    fn make_room(&mut self) {
        if self.open.len() > 2 * MOST {
            let known = &self.known;
            // Answered since.
            self.open.retain(|(_, key)| known.contains_key(key));
        }
        while self.known.len() >= MOST {
            let queues = [
                &mut self.decided,
                &mut self.open,
                &mut self.unread,
                &mut self.in_grace,
                &mut self.touched,
            ];
            let Some((first_ns, key)) = queues.into_iter().find_map(VecDeque::pop_front) else {
                return;
            };
            if let Some(flow) = self.remove(key, first_ns) {
                self.forgotten += u64::from(flow.verdict.is_none());
            }
        }
    }
}

/// Takes out of a queue what began at least so long ago.
fn take_older(queue: &mut Waiting, now_ns: u64, age_ns: u64, into: &mut Waiting) {
    while let Some((first_ns, _)) = queue.front()
        && now_ns.saturating_sub(*first_ns) >= age_ns
    {
        into.extend(queue.pop_front());
    }
}

impl Flow {
    fn judge(
        &self,
        directory: &Directory,
        read_ns: u64,
        now_ns: u64,
        patience_ns: u64,
        mut remembers: impl FnMut(SocketAddr) -> bool,
    ) -> Judged {
        let age_ns = now_ns.saturating_sub(self.first_ns);
        let serves = |address, at_ns| directory.serves(self.index, address, at_ns);
        match self.back {
            Some((Back::Reset(by), _)) => return Judged::Is(Verdict::Reset { by }),
            Some((Back::Error(by, how), _)) => {
                return Judged::Is(Verdict::Rejected {
                    by,
                    how: how.to_owned(),
                });
            }
            Some((Back::Answer(by), _)) if serves(by, self.first_ns) => {
                return Judged::Is(Verdict::Delivered);
            }
            Some((Back::Answer(_), at_ns)) if at_ns >= read_ns => return Judged::Unread,
            Some((Back::Answer(_), _)) if directory.is_uncertain(self.index, self.first_ns) => {
                return Judged::Is(Verdict::Unknown);
            }
            Some((Back::Answer(by), _)) => return Judged::Is(Verdict::Misdelivered { by }),
            None => {}
        }
        if let Some(dropped) = self.dropped() {
            return if age_ns >= GRACE_NS {
                Judged::Is(dropped)
            } else {
                Judged::InGrace
            };
        }
        let stray = self.headed.filter(|headed| !serves(*headed, self.last_ns));
        match (&self.end, stray) {
            (End::Unknown, _) => Judged::Is(Verdict::Unknown),
            (End::Leaked, _) => Judged::Is(Verdict::Leaked),
            (End::Absorbed { network }, _) => Judged::Is(match network.clone() {
                Some(network) => Verdict::Hijacked { network },
                None => Verdict::Absorbed,
            }),
            (_, Some(_)) if self.last_ns >= read_ns => Judged::Unread,
            (_, Some(_)) if directory.is_uncertain(self.index, self.last_ns) => {
                if age_ns < patience_ns {
                    Judged::Open
                } else {
                    Judged::Is(Verdict::Unanswered { stray: None })
                }
            }
            (_, Some(endpoint)) if self.known && directory.served(self.index, endpoint) => {
                Judged::Is(Verdict::Stuck { endpoint })
            }
            _ if age_ns < patience_ns => Judged::Open,
            (_, Some(endpoint))
                if directory.served(self.index, endpoint) && remembers(endpoint) =>
            {
                Judged::Is(Verdict::Stuck { endpoint })
            }
            _ => Judged::Is(Verdict::Unanswered { stray }),
        }
    }

    /// The verdict of a flow whose answer was dropped, or else its first packet.
    fn dropped(&self) -> Option<Verdict> {
        if let Some(End::Dropped { reason, stage, by }) = &self.lost_answer {
            return Some(Verdict::AnswerDropped {
                reason: reason.clone(),
                stage: stage.clone(),
                by: by.clone(),
            });
        }
        match &self.end {
            End::Dropped { reason, stage, by } => Some(Verdict::Dropped {
                reason: reason.clone(),
                stage: stage.clone(),
                by: by.clone(),
            }),
            _ => None,
        }
    }

    /// Did rules of this node drop its first packet or its answer?
    fn is_filtered(&self) -> bool {
        [Some(&self.end), self.lost_answer.as_ref()]
            .into_iter()
            .flatten()
            .any(|end| matches!(end, End::Dropped { reason, .. } if reason == NETFILTER_DROP))
    }

    /// Writes the verdict down; `None` if the same was said before.
    fn decide(
        &mut self,
        key: Key,
        verdict: Verdict,
        directory: &Directory,
        now_ns: u64,
    ) -> Option<Decided> {
        if self.verdict.as_ref() == Some(&verdict) {
            return None;
        }
        let corrects = self.verdict.replace(verdict.clone());
        let name = directory.get(self.index).map(|known| known.name.clone());
        Some(Decided {
            time_ns: self.back.map_or(now_ns, |(_, time_ns)| time_ns),
            index: self.index,
            service: name.unwrap_or_default(),
            protocol: key.protocol,
            source: key.source,
            destination: key.destination,
            path: self.path,
            headed: self.headed,
            filtered: self.is_filtered(),
            first_ns: self.first_ns,
            after_ns: self
                .back
                .map(|(_, time_ns)| time_ns.saturating_sub(self.first_ns)),
            corrects: corrects.map(Box::new),
            verdict,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::services::Found;
    use crate::trace::directory::tests::found;

    const ENDPOINT: &str = "10.244.0.2:8080";

    fn socket(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    fn key(port: u16) -> Key {
        Key {
            protocol: 6,
            source: SocketAddr::new(socket("10.244.0.7:1").ip(), port),
            destination: socket("10.96.0.1:80"),
        }
    }

    fn journey(time_ns: u64, headed: &str, end: End) -> Journey {
        Journey {
            time_ns,
            headed: Some(socket(headed)),
            end,
            ..Journey::sample()
        }
    }

    fn directory() -> Directory {
        let mut directory = Directory::new(Vec::new());
        directory.learn(&found(), &[], 0);
        directory
    }

    fn nobody(_: &Key, _: SocketAddr) -> bool {
        false
    }

    fn verdicts(decided: &[Decided]) -> Vec<&Verdict> {
        decided.iter().map(|decided| &decided.verdict).collect()
    }

    #[test]
    fn an_answer_of_an_endpoint_delivers() {
        let (mut flows, directory) = (Flows::default(), directory());
        assert!(flows.first(key(1), 0, &journey(10, ENDPOINT, End::Sent), false, None));
        assert!(!flows.first(key(1), 0, &journey(20, ENDPOINT, End::Sent), false, None));
        assert!(flows.decide(&directory, ALL_READ, 30, nobody).is_empty());
        flows.came_back(key(1), Back::Answer(socket(ENDPOINT)), 40);
        let decided = flows.decide(&directory, ALL_READ, 50, nobody);
        assert_eq!(verdicts(&decided), [&Verdict::Delivered]);
        assert_eq!(decided[0].after_ns, Some(30));
        assert!(flows.known.is_empty());
        // An answer that is told before its first packet is not lost.
        flows.came_back(key(2), Back::Answer(socket(ENDPOINT)), 60);
        assert_eq!(flows.is_repeated(&key(2)), None);
        flows.first(key(2), 0, &journey(55, ENDPOINT, End::Sent), false, None);
        // It was answered: what comes now is a later one.
        assert_eq!(flows.is_repeated(&key(2)), Some(false));
        assert_eq!(
            verdicts(&flows.decide(&directory, ALL_READ, 70, nobody)),
            [&Verdict::Delivered]
        );
    }

    #[test]
    fn silence_is_unanswered_once_patience_ends_and_corrected_by_a_late_answer() {
        let (mut flows, directory) = (Flows::default(), directory());
        flows.first(key(1), 0, &journey(0, ENDPOINT, End::Sent), false, None);
        assert_eq!(flows.is_repeated(&key(1)), Some(true));
        assert!(
            flows
                .decide(&directory, ALL_READ, PATIENCE_NS - 1, nobody)
                .is_empty()
        );
        let silent = Verdict::Unanswered { stray: None };
        let decided = flows.decide(&directory, ALL_READ, PATIENCE_NS, nobody);
        assert_eq!(verdicts(&decided), [&silent]);
        flows.came_back(key(1), Back::Answer(socket(ENDPOINT)), PATIENCE_NS + 1);
        let decided = flows.decide(&directory, ALL_READ, PATIENCE_NS + 2, nobody);
        assert_eq!(verdicts(&decided), [&Verdict::Delivered]);
        assert_eq!(decided[0].corrects.as_deref(), Some(&silent));
        // At the end, what is too young stays undecided.
        flows.first(key(2), 0, &journey(0, ENDPOINT, End::Sent), false, None);
        flows.first(
            key(3),
            0,
            &journey(PATIENCE_AT_END_NS, ENDPOINT, End::Sent),
            false,
            None,
        );
        let decided = flows.finish(&directory, ALL_READ, PATIENCE_AT_END_NS, nobody);
        assert_eq!(verdicts(&decided), [&silent, &Verdict::Undecided]);
    }

    #[test]
    fn a_stranger_is_judged_when_the_rules_have_been_read() {
        let (mut flows, mut directory) = (Flows::default(), directory());
        let stranger = "10.244.0.99:8080";
        flows.first(
            key(1),
            0,
            &journey(10, stranger, End::Elsewhere),
            false,
            None,
        );
        flows.came_back(key(1), Back::Answer(socket(stranger)), 20);
        assert!(flows.decide(&directory, 0, 30, nobody).is_empty());
        let decided = flows.decide(&directory, ALL_READ, 40, nobody);
        let by = socket(stranger);
        assert_eq!(verdicts(&decided), [&Verdict::Misdelivered { by }]);
        // Rules that change all the time are read in between, and tell of what came before.
        for port in [11, 12] {
            let at_ns = 100 * u64::from(port);
            let journey = journey(at_ns, stranger, End::Elsewhere);
            flows.first(key(port), 0, &journey, false, None);
            flows.came_back(key(port), Back::Answer(socket(stranger)), at_ns + 1);
        }
        assert!(flows.decide(&directory, 1_100, 1_300, nobody).is_empty());
        let decided = flows.decide(&directory, 1_200, 1_300, nobody);
        assert_eq!(decided.len(), 1);
        assert_eq!(decided[0].source, key(11).source);
        assert_eq!(flows.decide(&directory, 1_300, 1_300, nobody).len(), 1);
        // An endpoint that went after the flow began was one; later it is none.
        directory.learn(&Found::default(), &[], 100);
        for (port, time_ns, wanted) in [
            (2, 99, Verdict::Delivered),
            (
                3,
                101,
                Verdict::Misdelivered {
                    by: socket(ENDPOINT),
                },
            ),
        ] {
            flows.first(
                key(port),
                0,
                &journey(time_ns, ENDPOINT, End::Elsewhere),
                false,
                None,
            );
            flows.came_back(key(port), Back::Answer(socket(ENDPOINT)), 200);
            assert_eq!(
                verdicts(&flows.decide(&directory, ALL_READ, 210, nobody)),
                [&wanted]
            );
        }
    }

    #[test]
    fn what_conntrack_remembers_of_a_dead_endpoint_is_stuck() {
        let (mut flows, mut directory) = (Flows::default(), directory());
        directory.learn(&Found::default(), &[], 100);
        flows.first(
            key(1),
            0,
            &journey(200, ENDPOINT, End::Elsewhere),
            true,
            None,
        );
        let endpoint = socket(ENDPOINT);
        assert_eq!(
            verdicts(&flows.decide(&directory, ALL_READ, 210, nobody)),
            [&Verdict::Stuck { endpoint }]
        );
        // Not remembered: a rule of somebody else sent it there.
        flows.first(
            key(2),
            0,
            &journey(200, ENDPOINT, End::Elsewhere),
            false,
            None,
        );
        let stray = Some(endpoint);
        assert_eq!(
            verdicts(&flows.decide(&directory, ALL_READ, 200 + PATIENCE_NS, nobody)),
            [&Verdict::Unanswered { stray }]
        );
    }

    /// Asked only when it has not been answered, and of former endpoints.
    #[test]
    fn what_somebody_else_remembers_of_a_dead_endpoint_is_stuck() {
        let (mut flows, mut directory) = (Flows::default(), directory());
        let endpoint = socket(ENDPOINT);
        let remembers = |asked: &Key, to: SocketAddr| {
            assert_eq!(to, endpoint);
            *asked == key(1)
        };
        directory.learn(&Found::default(), &[], 100);
        for port in [1, 2] {
            flows.first(
                key(port),
                0,
                &journey(200, ENDPOINT, End::Elsewhere),
                false,
                None,
            );
        }
        let stranger = "10.244.0.99:8080";
        flows.first(
            key(3),
            0,
            &journey(200, stranger, End::Elsewhere),
            false,
            None,
        );
        assert!(
            flows
                .decide(&directory, ALL_READ, 210, remembers)
                .is_empty()
        );
        let decided = flows.decide(&directory, ALL_READ, 200 + PATIENCE_NS, remembers);
        let unanswered = |stray| Verdict::Unanswered { stray: Some(stray) };
        assert_eq!(
            verdicts(&decided),
            [
                &Verdict::Stuck { endpoint },
                &unanswered(endpoint),
                &unanswered(socket(stranger))
            ]
        );
    }

    #[test]
    fn what_the_node_keeps_is_hijacked_if_somebody_else_may_have_the_address() {
        let (mut flows, directory) = (Flows::default(), directory());
        let network = "192.0.2.0/24 of eth0".to_owned();
        for (port, network) in [(1, Some(network.clone())), (2, None)] {
            let end = End::Absorbed { network };
            flows.first(key(port), 0, &journey(0, "192.0.2.7:22", end), false, None);
        }
        assert_eq!(
            verdicts(&flows.decide(&directory, ALL_READ, 1, nobody)),
            [&Verdict::Hijacked { network }, &Verdict::Absorbed]
        );
    }

    #[test]
    fn a_drop_waits_for_the_error_that_explains_it() {
        let (mut flows, directory) = (Flows::default(), directory());
        let end = End::Dropped {
            reason: "NETFILTER_DROP".to_owned(),
            stage: "FORWARD filter".to_owned(),
            by: None,
        };
        for port in [1, 2] {
            flows.first(
                key(port),
                0,
                &journey(0, ENDPOINT, end.clone()),
                false,
                None,
            );
        }
        assert!(flows.decide(&directory, ALL_READ, 1, nobody).is_empty());
        let by = Who::Node;
        flows.came_back(key(2), Back::Error(by, "port unreachable"), 2);
        let how = "port unreachable";
        assert_eq!(
            verdicts(&flows.decide(&directory, ALL_READ, 3, nobody)),
            [&Verdict::Rejected {
                by,
                how: how.to_owned()
            }]
        );
        let decided = flows.decide(&directory, ALL_READ, GRACE_NS, nobody);
        assert!(matches!(decided[0].verdict, Verdict::Dropped { .. }));
        assert_eq!(decided.len(), 1);
    }

    #[test]
    fn an_answer_that_is_dropped_here_is_told_until_another_comes() {
        let (mut flows, directory) = (Flows::default(), directory());
        let end = End::Dropped {
            reason: "NETFILTER_DROP".to_owned(),
            stage: "FORWARD filter".to_owned(),
            by: None,
        };
        assert!(!flows.answer_dropped(key(1), &end), "of no flow");
        flows.first(key(1), 0, &journey(0, ENDPOINT, End::Sent), false, None);
        assert!(flows.answer_dropped(key(1), &end));
        assert!(flows.decide(&directory, ALL_READ, 1, nobody).is_empty());
        let decided = flows.decide(&directory, ALL_READ, GRACE_NS, nobody);
        assert_eq!(decided[0].verdict.word(), "answer-dropped");
        flows.came_back(key(1), Back::Answer(socket(ENDPOINT)), GRACE_NS + 1);
        let decided = flows.decide(&directory, ALL_READ, GRACE_NS + 2, nobody);
        assert_eq!(verdicts(&decided), [&Verdict::Delivered]);
        assert!(decided[0].corrects.is_some());
        assert!(!flows.answer_dropped(key(1), &end), "a later one");
    }

    #[test]
    fn an_answer_after_an_error_delivers() {
        let (mut flows, directory) = (Flows::default(), directory());
        flows.first(key(1), 0, &journey(0, ENDPOINT, End::Sent), false, Some(1));
        let by = Who::Beyond(socket(ENDPOINT).ip());
        assert!(flows.came_back(key(1), Back::Error(by, "host unreachable"), 1));
        let decided = flows.decide(&directory, ALL_READ, 2, nobody);
        assert_eq!(decided[0].verdict.word(), "rejected");
        // Its SYN once more.
        flows.first(key(1), 0, &journey(3, ENDPOINT, End::Sent), true, Some(1));
        assert!(!flows.came_back(key(1), Back::Error(by, "host unreachable"), 4));
        assert!(flows.came_back(key(1), Back::Answer(socket(ENDPOINT)), 5));
        let decided = flows.decide(&directory, ALL_READ, 6, nobody);
        assert_eq!(verdicts(&decided), [&Verdict::Delivered]);
        assert!(decided[0].corrects.is_some());
        // The server answered for a connection before; the client resets that, and sends its SYN again.
        flows.first(key(2), 0, &journey(10, ENDPOINT, End::Sent), true, Some(2));
        assert!(flows.came_back(key(2), Back::Reset(Who::Client), 11));
        let decided = flows.decide(&directory, ALL_READ, 12, nobody);
        assert_eq!(decided[0].verdict.word(), "reset");
        assert!(!flows.came_back(key(2), Back::Reset(Who::Client), 13));
        assert!(flows.came_back(key(2), Back::Answer(socket(ENDPOINT)), 14));
        let decided = flows.decide(&directory, ALL_READ, 15, nobody);
        assert_eq!(verdicts(&decided), [&Verdict::Delivered]);
    }

    #[test]
    fn a_port_that_is_used_again_is_another_flow() {
        let (mut flows, directory) = (Flows::default(), directory());
        let first = |flows: &mut Flows, time_ns, opening| {
            let journey = journey(time_ns, ENDPOINT, End::Sent);
            flows.first(key(1), 0, &journey, false, Some(opening))
        };
        assert!(first(&mut flows, 0, 7));
        assert!(!first(&mut flows, 1, 7), "sent once more");
        // Nobody had answered.
        assert!(first(&mut flows, 2, 8));
        let by = Who::Endpoint(socket(ENDPOINT));
        flows.came_back(key(1), Back::Reset(by), 3);
        assert!(first(&mut flows, 4, 9));
        assert_eq!(flows.known_until_ns(5), 0);
        flows.came_back(key(1), Back::Answer(socket(ENDPOINT)), 5);
        let decided = flows.decide(&directory, ALL_READ, 6, nobody);
        let wanted = [
            &Verdict::Unanswered { stray: None },
            &Verdict::Reset { by },
            &Verdict::Delivered,
        ];
        assert_eq!(verdicts(&decided), wanted);
        assert!(flows.known.is_empty());
        assert_eq!(flows.known_until_ns(7), 7);
    }

    #[test]
    fn memory_is_bounded_and_what_is_forgotten_is_counted() {
        let (mut flows, directory) = (Flows::default(), directory());
        let most = MOST as u64;
        for number in 0..most + 1000 {
            let mut key = key(0);
            key.source = SocketAddr::from((
                std::net::Ipv4Addr::from(u32::try_from(number).expect("small")),
                1,
            ));
            flows.first(key, 0, &journey(number, ENDPOINT, End::Sent), false, None);
            if number % 1000 == 0 {
                flows.decide(&directory, ALL_READ, number, nobody);
            }
        }
        assert_eq!(flows.known.len(), MOST);
        assert_eq!(flows.forgotten(), 1000);
    }
}
