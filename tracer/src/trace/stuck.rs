//! Established flows that conntrack sends to endpoints which the rules no longer name.
//!
//! Nothing but conntrack's own list tells of them: their packets are no first packets. It is read in the
//! background while the rules have dropped endpoints, and an entry whose remaining time does not run down
//! has packets that keep it alive. The endpoint may still answer them: kube-proxy leaves established TCP
//! connections alone. A flow is stuck if its entry was renewed twice, and nothing came from the endpoint meanwhile.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::directory::Directory;
use super::flows::Key;
use crate::kernel::clock::monotonic_ns;
use crate::kernel::conntrack::{self, ConntrackError, Entry};
use crate::kernel::ipvs_connections::{self, Connection};
use crate::kernel::netns::Netns;
use crate::probe::tier::ProbeError;
use crate::rules::Mode;

/// How often the whole list is read while there may be something in it: of 100,000 entries that takes the kernel
/// 150 ms, and us as much again.
const EVERY: Duration = Duration::from_secs(2);
/// How often the kernel is asked for the entries of one former endpoint after the other, which takes it 28 ms each of so
/// many. A flow that sends all the time is known to have been renewed after a second and [`TICKS`].
const EVERY_OF_FEW: Duration = Duration::from_millis(1050);
/// So many are few: more would take longer than the whole list does.
const FEW: usize = 2;
/// How long what IPVS remembers is believed: no longer than an unanswered flow is waited for.
const AGE: Duration = Duration::from_secs(1);
/// The most flows that are remembered.
const MOST: usize = 100_000;
/// A request may be seen before its answer: one renewal says nothing.
const UNHEARD: u32 = 2;
/// Entries' times are told in whole seconds, rounded down: two of one that was not renewed differ by less than this from
/// the time that passed.
const ROUNDING: Duration = Duration::from_secs(1);
/// The kernel's clock for them goes by ticks of at most 10 ms.
const TICKS: Duration = Duration::from_millis(20);

/// An established flow whose packets go to an endpoint that the rules no longer name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stuck {
    /// When that was seen (`CLOCK_MONOTONIC`, ns).
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
    /// The endpoint that was.
    pub endpoint: SocketAddr,
}

impl std::fmt::Display for Stuck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} {} → {}: established, and stuck on the dead endpoint {}",
            self.service, self.source, self.destination, self.endpoint
        )
    }
}

/// Entries of conntrack's list, and between which two moments they were read.
#[derive(Debug)]
struct Look {
    begun: Instant,
    ended: Instant,
    entries: Vec<Entry>,
}

/// What was seen of an entry.
#[derive(Clone, Copy, Debug)]
struct Seen {
    begun: Instant,
    ended: Instant,
    timeout_s: u32,
    /// When its endpoint had been heard of last (`CLOCK_MONOTONIC`, ns).
    heard_ns: Option<u64>,
    /// How often it was renewed while nothing came from its endpoint.
    unheard: u32,
}

impl Seen {
    /// Did a packet set the entry's time anew between then and this look? Usually to what it was; of a TCP connection
    /// whose packets nobody acknowledges to less.
    fn is_renewed(&self, look: &Look, timeout_s: u32) -> bool {
        let at_least = look.begun.saturating_duration_since(self.ended);
        let at_most = look.ended.saturating_duration_since(self.begun);
        let [before, now] = [self.timeout_s, timeout_s].map(|s| Duration::from_secs(s.into()));
        now + at_least >= before + ROUNDING + TICKS || now + at_most + ROUNDING + TICKS <= before
    }
}

/// What IPVS remembers of former endpoints beside conntrack: a UDP flow that conntrack forgets after 30 s or two
/// minutes of silence is IPVS' for five, and a new one to conntrack when it goes on.
#[derive(Debug, Default)]
pub struct Remembered {
    connections: HashSet<Connection>,
    read: Option<Instant>,
}

impl Remembered {
    /// Does IPVS remember that this flow goes to a former endpoint? No, as well, where it cannot be read, or has more
    /// connections than are read.
    pub fn holds(&mut self, ns: &Netns, directory: &Directory, key: &Key, to: SocketAddr) -> bool {
        let service = directory.asked(key.destination, key.protocol);
        let service = service.and_then(|index| directory.get(index));
        if service.is_none_or(|service| !service.is_named_by(Mode::Ipvs.name())) {
            return false;
        }
        if self.read.is_none_or(|read| read.elapsed() >= AGE) {
            let former = directory.former();
            let of_former = |found: &Connection| former.contains(&(found.server, found.protocol));
            self.connections = ipvs_connections::list(ns, of_former).unwrap_or_default();
            self.read = Some(Instant::now());
        }
        self.connections.contains(&Connection {
            protocol: key.protocol,
            source: key.source,
            destination: key.destination,
            server: to,
        })
    }
}

/// Looks for stuck flows.
#[derive(Debug, Default)]
pub struct Watch {
    seen: HashMap<Key, Seen>,
    reading: Option<Receiver<Result<Look, ConntrackError>>>,
    last: Option<Instant>,
    /// It is known that there are too many former endpoints to be asked for one by one: nobody looks again before
    /// the whole list's time.
    many: bool,
    /// Why the list cannot be read.
    failure: Option<String>,
}

impl Watch {
    /// Why stuck flows are not told of, if they are not.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// The directory is not to be believed at the moment.
    pub fn pause(&mut self) {
        self.reading = None;
        self.many = false;
    }

    /// The flows of which it is known since the last call that they are stuck. `heard` tells when a packet came
    /// from a former endpoint last.
    pub fn poll(
        &mut self,
        ns: &Netns,
        directory: &Directory,
        heard: impl Fn(SocketAddr, u8) -> Result<Option<u64>, ProbeError>,
    ) -> Result<Vec<Stuck>, ProbeError> {
        if let Some(reading) = &self.reading {
            let look = match reading.try_recv() {
                Err(TryRecvError::Empty) => return Ok(Vec::new()),
                // The thread is gone without a word: it panicked, and has said so.
                Err(TryRecvError::Disconnected) => None,
                Ok(look) => Some(look),
            };
            self.reading = None;
            self.last = Some(Instant::now());
            return match look {
                None => Ok(Vec::new()),
                Some(Ok(look)) => self.compare(&look, directory, heard),
                Some(Err(error)) => {
                    self.failure = Some(error.to_string());
                    Ok(Vec::new())
                }
            };
        }
        let waited = |every| self.last.is_none_or(|last| last.elapsed() >= every);
        let every = if self.many { EVERY } else { EVERY_OF_FEW };
        if waited(every) && self.failure.is_none() && directory.has_former() {
            let former = directory.former();
            let addresses: HashSet<IpAddr> = former.iter().map(|(to, _)| to.ip()).collect();
            let few = addresses.len() <= FEW;
            self.many = !few && !waited(EVERY);
            if !self.many {
                let addresses = if few { addresses } else { HashSet::new() };
                self.reading = Some(begin(ns, former, addresses));
            }
        }
        Ok(Vec::new())
    }

    fn compare(
        &mut self,
        look: &Look,
        directory: &Directory,
        heard: impl Fn(SocketAddr, u8) -> Result<Option<u64>, ProbeError>,
    ) -> Result<Vec<Stuck>, ProbeError> {
        let mut stuck = Vec::new();
        let mut seen = HashMap::with_capacity(look.entries.len().min(MOST));
        for entry in look.entries.iter().take(MOST) {
            let key = Key {
                protocol: entry.protocol,
                source: entry.source,
                destination: entry.destination,
            };
            let Some((index, service)) = dead(entry, directory) else {
                continue;
            };
            let before = self.seen.get(&key);
            let renewed = before.is_some_and(|before| before.is_renewed(look, entry.timeout_s));
            let heard_ns = heard(entry.answers, entry.protocol)?;
            let silent = before.filter(|before| before.heard_ns == heard_ns);
            let unheard = silent.map_or(0, |before| before.unheard + u32::from(renewed));
            if renewed && unheard == UNHEARD {
                stuck.push(Stuck {
                    time_ns: monotonic_ns(),
                    index,
                    service,
                    protocol: entry.protocol,
                    source: entry.source,
                    destination: entry.destination,
                    endpoint: entry.answers,
                });
            }
            // Kept from the first look on: what is renewed once in a minute lags behind in the end.
            let this = Seen {
                begun: look.begun,
                ended: look.ended,
                timeout_s: entry.timeout_s,
                heard_ns,
                unheard,
            };
            seen.insert(key, before.copied().filter(|_| !renewed).unwrap_or(this));
        }
        self.seen = seen;
        Ok(stuck)
    }
}

/// The Service of an entry whose packets go where its rules no longer point.
fn dead(entry: &Entry, directory: &Directory) -> Option<(usize, String)> {
    // What was never answered is a new flow, and told as one.
    if !entry.replied {
        return None;
    }
    let index = directory.asked(entry.destination, entry.protocol)?;
    let known = directory.get(index)?;
    directory
        .served(index, entry.answers)
        .then(|| (index, known.name.clone()))
}

/// Reads the entries of former endpoints in the background: of those at these addresses, or if there are none, all.
fn begin(
    ns: &Netns,
    former: HashSet<(SocketAddr, u8)>,
    addresses: HashSet<IpAddr>,
) -> Receiver<Result<Look, ConntrackError>> {
    let (tell, reading) = channel();
    let ns = ns.clone();
    std::thread::spawn(move || {
        let begun = Instant::now();
        let wanted = |entry: &Entry| former.contains(&(entry.answers, entry.protocol));
        let entries = if addresses.is_empty() {
            conntrack::list(&ns, wanted)
        } else {
            let lists = addresses.into_iter();
            let lists = lists.map(|address| conntrack::list_answered_by(&ns, address, wanted));
            lists
                .collect::<Result<Vec<_>, _>>()
                .map(|lists| lists.concat())
        };
        let look = entries.map(|entries| Look {
            begun,
            ended: Instant::now(),
            entries,
        });
        // A session that has ended does not want to know.
        let _ = tell.send(look);
    });
    reading
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::services::Found;
    use crate::trace::directory::tests::found;

    #[test]
    fn what_is_renewed_is_stuck_and_what_runs_down_is_not() {
        let mut directory = Directory::new(Vec::new());
        directory.learn(&found(), &[], 0);
        directory.learn(&Found::default(), &[], 1);
        let entry = |port: u16, timeout_s| Entry {
            protocol: 6,
            source: SocketAddr::from(([10, 244, 0, 7], port)),
            destination: "10.96.0.1:80".parse().expect("an address"),
            answers: "10.244.0.2:8080".parse().expect("an address"),
            replied: true,
            timeout_s,
        };
        let unanswered = Entry {
            replied: false,
            ..entry(3, 100)
        };
        let mut watch = Watch::default();
        let begin = Instant::now();
        let mut look = |after_s, heard_ns: Option<u64>, entries: &[Entry]| {
            let at = begin + Duration::from_secs(after_s);
            let look = Look {
                begun: at,
                ended: at,
                entries: entries.to_vec(),
            };
            let heard = |_, _| Ok(heard_ns);
            let stuck = watch.compare(&look, &directory, heard);
            stuck
                .expect("nothing fails here")
                .iter()
                .map(|stuck| stuck.source.port())
                .collect::<Vec<_>>()
        };
        let none = [0_u16; 0];
        assert_eq!(
            look(0, None, &[entry(1, 100), entry(2, 100), unanswered]),
            none
        );
        // Once may be a request whose answer is under way.
        assert_eq!(
            look(3, None, &[entry(1, 97), entry(2, 99), unanswered]),
            none
        );
        assert_eq!(
            look(6, None, &[entry(1, 94), entry(2, 99), unanswered]),
            [2]
        );
        // Told once; and the endpoint is there after all.
        assert_eq!(look(9, None, &[entry(1, 91), entry(2, 99)]), none);
        assert_eq!(look(12, Some(1), &[entry(1, 99), entry(2, 99)]), none);
        assert_eq!(look(15, Some(2), &[entry(1, 99)]), none);
        // Renewed rarely.
        assert_eq!(look(18, Some(2), &[entry(1, 96)]), none);
        assert_eq!(look(21, Some(2), &[entry(1, 99)]), none);
        assert_eq!(look(24, Some(2), &[entry(1, 96)]), none);
        assert_eq!(look(27, Some(2), &[entry(1, 99)]), [1]);
    }

    /// Of an entry with so many seconds left, and so many ms later with so many: was it renewed?
    fn renewed(before_s: u32, took_ms: u64, passed_ms: u64, after_s: u32) -> bool {
        let begun = Instant::now();
        let took = Duration::from_millis(took_ms);
        let seen = Seen {
            begun,
            ended: begun + took,
            timeout_s: before_s,
            heard_ns: None,
            unheard: 0,
        };
        let again = begun + took + Duration::from_millis(passed_ms);
        let look = Look {
            begun: again,
            ended: again + took,
            entries: Vec::new(),
        };
        seen.is_renewed(&look, after_s)
    }

    #[test]
    fn a_second_is_enough_to_know_what_is_renewed() {
        let every = u64::try_from(EVERY_OF_FEW.as_millis()).expect("short");
        assert!(renewed(119, 0, every, 119), "it sends all the time");
        // Just before and just after a whole second.
        assert!(!renewed(119, 0, every, 118));
        assert!(!renewed(119, 0, 1000, 119), "it may be a tick");
        assert!(!renewed(119, 0, every, 117));
        // While a list is read that takes long, time passes that proves nothing.
        assert!(!renewed(119, 900, 1000, 117));
        assert!(!renewed(119, 900, 1000, 116));
        // Five days without packets; and then one that nobody acknowledges (nf_conntrack_tcp_timeout_unacknowledged).
        assert!(!renewed(432_000, 10, 2000, 431_998));
        assert!(renewed(432_000, 10, 2000, 299));
    }
}
