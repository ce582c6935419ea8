//! Established flows that conntrack sends to endpoints which the rules no longer name.
//!
//! Nothing but conntrack's own list tells of them: their packets are no first packets. It is read in the
//! background while the rules have dropped endpoints, and an entry whose remaining time does not run down
//! has packets that keep it alive. The endpoint may still answer them: kube-proxy leaves established TCP
//! connections alone. A flow is stuck if its entry was renewed twice, and nothing came from the endpoint meanwhile.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
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

/// How often the list is read while there may be something in it.
const EVERY: Duration = Duration::from_secs(2);
/// How long what IPVS remembers is believed: no longer than an unanswered flow is waited for.
const AGE: Duration = Duration::from_secs(1);
/// The most flows that are remembered.
const MOST: usize = 100_000;
/// A request may be seen before its answer: one renewal says nothing.
const UNHEARD: u32 = 2;
/// Entries' times are told in whole seconds: one that lags behind the clock by more than this was renewed.
const ROUNDING_S: u64 = 1;

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

/// What was seen of an entry.
#[derive(Clone, Copy, Debug)]
struct Seen {
    at: Instant,
    timeout_s: u32,
    /// When its endpoint had been heard of last (`CLOCK_MONOTONIC`, ns).
    heard_ns: Option<u64>,
    /// How often it was renewed while nothing came from its endpoint.
    unheard: u32,
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
        if service.is_none_or(|service| service.mode != Mode::Ipvs.name()) {
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
    reading: Option<Receiver<Result<Vec<Entry>, ConntrackError>>>,
    last: Option<Instant>,
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
            let entries = match reading.try_recv() {
                Err(TryRecvError::Empty) => return Ok(Vec::new()),
                Err(TryRecvError::Disconnected) => Ok(Vec::new()),
                Ok(entries) => entries,
            };
            self.reading = None;
            self.last = Some(Instant::now());
            return match entries {
                Ok(entries) => self.compare(&entries, directory, Instant::now(), heard),
                Err(error) => {
                    self.failure = Some(error.to_string());
                    Ok(Vec::new())
                }
            };
        }
        let due = self.last.is_none_or(|last| last.elapsed() >= EVERY);
        if due && self.failure.is_none() && directory.has_former() {
            self.reading = Some(begin(ns, directory));
        }
        Ok(Vec::new())
    }

    fn compare(
        &mut self,
        entries: &[Entry],
        directory: &Directory,
        now: Instant,
        heard: impl Fn(SocketAddr, u8) -> Result<Option<u64>, ProbeError>,
    ) -> Result<Vec<Stuck>, ProbeError> {
        let mut stuck = Vec::new();
        let mut seen = HashMap::with_capacity(entries.len().min(MOST));
        for entry in entries.iter().take(MOST) {
            let key = Key {
                protocol: entry.protocol,
                source: entry.source,
                destination: entry.destination,
            };
            let Some((index, service)) = dead(entry, directory) else {
                continue;
            };
            let before = self.seen.get(&key);
            let renewed = before.is_some_and(|before| {
                let passed_s = now.duration_since(before.at).as_secs();
                let left_s = u64::from(before.timeout_s).saturating_sub(passed_s);
                u64::from(entry.timeout_s) > left_s + ROUNDING_S
            });
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
                at: now,
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

/// Reads the list in the background.
fn begin(ns: &Netns, directory: &Directory) -> Receiver<Result<Vec<Entry>, ConntrackError>> {
    let (tell, reading) = channel();
    let former = directory.former();
    let ns = ns.clone();
    std::thread::spawn(move || {
        let entries = conntrack::list(&ns, |entry| {
            former.contains(&(entry.answers, entry.protocol))
        });
        // A session that has ended does not want to know.
        let _ = tell.send(entries);
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
            let now = begin + Duration::from_secs(after_s);
            let heard = |_, _| Ok(heard_ns);
            let stuck = watch.compare(entries, &directory, now, heard);
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
}
