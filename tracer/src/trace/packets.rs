//! What the probes told of a packet, in the words of Services.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use tracer_ebpf::path::{ABSORBED, Path, Target};
use tracer_ebpf::record::{
    IPV4, OUTPUT_FIRST, Record, STEPS, TUPLE_HASH, kind, protocol, sctp, state, tcp,
};

use super::directory::Directory;
use super::flows::{Back, Key};
use super::journey::{End, Journey, StageTime};
use super::met::Meeting;
use super::translator::Translator;
use super::verdict::{self, Who};
use crate::probe::catalogue::{self, Detail};
use crate::probe::tier::Heard;
use crate::record::evidence::{Freed, Reasons, address, destination_of, source_of};
use crate::record::headers::dissect;

/// What a record is about.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// The first packet of a flow to a Service, or a later one that was dropped.
    Journey {
        /// Whose.
        key: Key,
        /// The Service's index in the directory.
        index: usize,
        /// Did conntrack know the flow before this packet?
        known: bool,
        /// Does conntrack track it at all? What it takes for invalid it does not.
        tracked: bool,
        /// Is it a packet that was translated before, on its way to an endpoint on this very node?
        further: bool,
        /// What the packet opens: TCP's first sequence number, SCTP's initiate tag. A packet that is sent once
        /// more has the same.
        opening: Option<u32>,
        /// What became of the packet.
        journey: Box<Journey>,
    },
    /// Something that answers or ends a flow to a Service.
    Back {
        /// Which flow.
        key: Key,
        /// The Service's index in the directory.
        index: usize,
        /// What came back.
        back: Back,
        /// When (`CLOCK_MONOTONIC`, ns).
        time_ns: u64,
    },
    /// A packet was freed at its socket, which it had reached: that is no drop, as far as is known.
    Freed {
        /// The Service's index in the directory; `None` for a packet to an endpoint itself.
        index: Option<usize>,
        /// Is it known that it went with the queue that had taken it?
        sure: bool,
    },
    /// A packet to an endpoint itself, or about one.
    Other,
}

/// What it takes to read records.
#[derive(Debug)]
pub struct Reader {
    /// Names of drop reasons.
    pub reasons: Reasons,
    /// How finely packets are followed.
    pub detail: Detail,
    /// The node's own addresses.
    pub local: HashSet<IpAddr>,
    /// Are the rules as the directory has them, as far as is known?
    pub settled: bool,
}

/// A connection's tuples: who asked what, and who answers whom.
struct Tuples {
    source: SocketAddr,
    destination: SocketAddr,
    answers: SocketAddr,
}

fn tuples_of(record: &Record) -> Option<Tuples> {
    if record.tracked == 0 {
        return None;
    }
    let [original, reply] = [0, TUPLE_HASH].map(|at| &record.tuples.0[at..]);
    let socket = |bytes: &[u8]| {
        let port = u16::from_be_bytes([bytes[16], bytes[17]]);
        let address = address(record.family, bytes[..16].try_into().ok()?);
        Some(SocketAddr::new(address, port))
    };
    Some(Tuples {
        source: socket(original)?,
        destination: socket(&original[20..])?,
        answers: socket(reply)?,
    })
}

impl Reader {
    /// Reads a record.
    pub fn read(&self, heard: &Heard, directory: &Directory) -> Told {
        let record = &heard.record;
        let tuples = tuples_of(record);
        let key = key_of(record, tuples.as_ref());
        let headed = || Some(dissect(&record.header.0)?.addresses()?.1);
        let asked = directory.asked_at(key.destination, key.protocol, record.time, headed);
        if let Some(sure) = self.was_freed(record) {
            return Told::Freed { index: asked, sure };
        }
        let Some(index) = asked else {
            return self.absorbed(heard, key, directory).unwrap_or(Told::Other);
        };
        let back = match record.kind {
            kind::FIRST | kind::DROP => {
                return Told::Journey {
                    key,
                    index,
                    known: record.confirmed != 0,
                    tracked: record.state != state::UNTRACKED,
                    further: record.state != state::REPLY && self.is_further(record, &key)
                        || self.was_first(record),
                    opening: dissect(&record.header.0).and_then(|headers| headers.opening),
                    journey: Box::new(self.journey(heard, key, index, directory)),
                };
            }
            kind::ANSWER => tuples.map(|tuples| Back::Answer(tuples.answers)),
            kind::RESET => Some(Back::Reset(self.who_reset(record, tuples.as_ref()))),
            kind::ERROR => self.error(record, tuples.as_ref()),
            _ => None,
        };
        match back {
            Some(back) => Told::Back {
                key,
                index,
                back,
                time_ns: record.time,
            },
            None => Told::Other,
        }
    }

    /// Was the packet dropped after its journey had ended at a socket?
    fn is_at_socket(&self, record: &Record) -> bool {
        let (_, stage) = catalogue::stage_name(record.stage, self.detail);
        record.kind == kind::DROP && stage == catalogue::DELIVER
    }

    /// Was it freed at its socket, and is it not known that this was a drop? If so, is it known that it was none?
    fn was_freed(&self, record: &Record) -> Option<bool> {
        if !self.is_at_socket(record) {
            return None;
        }
        match self.reasons.freed_at_socket(record) {
            Freed::WithSocket => Some(true),
            Freed::Unknown => Some(false),
            Freed::Dropped => None,
        }
    }

    /// Has the packet, which its socket did not take, been told as the first of its flow when it came there?
    fn was_first(&self, record: &Record) -> bool {
        let carried = dissect(&record.header.0).map(|headers| headers.protocol);
        let first = match record.state {
            state::NEW | state::UNTRACKED => !goes_on(record),
            _ => false,
        };
        self.is_at_socket(record) && first && carried == Some(record.protocol)
    }

    /// A first packet to a port that no Service has of an address that is bound here for one, if it ended here.
    fn absorbed(&self, heard: &Heard, key: Key, directory: &Directory) -> Option<Told> {
        let record = &heard.record;
        let absorbed = directory.absorbs(key.destination.ip())?;
        let mut journey = self.journey(heard, key, absorbed.index, directory);
        // What was handed to a socket has been told already if that does not take it. Only at INPUT is it decided
        // that a packet stays; one that was translated before was sent here by somebody else's rule.
        let (hook, stage) = catalogue::stage_name(record.stage, self.detail);
        let here = match record.kind {
            kind::FIRST => record.transmitted == 0,
            kind::DROP => hook == "INPUT" && stage != catalogue::DELIVER,
            _ => false,
        };
        let same = journey.headed == Some(key.destination);
        if !(record.path >= ABSORBED && here && same && journey.first == Some(true)) {
            return None;
        }
        let network = absorbed.attached.as_ref().map(ToString::to_string);
        journey.end = End::Absorbed { network };
        Some(Told::Journey {
            key,
            index: absorbed.index,
            known: false,
            tracked: record.state != state::UNTRACKED,
            further: false,
            // Every packet of it ends here: none opens more than another.
            opening: None,
            journey: Box::new(journey),
        })
    }

    fn journey(&self, heard: &Heard, key: Key, index: usize, directory: &Directory) -> Journey {
        let record = &heard.record;
        let met = heard.met.iter();
        let met: Vec<_> = met
            .filter_map(|met| Meeting::of(met, record.family))
            .collect();
        let headers = dissect(&record.header.0);
        let (source_after, headed) = headers.and_then(|h| h.addresses()).unzip();
        let path = Path::ALL.get(usize::from(record.path));
        let service = directory.get(index);
        let is_endpoint = |headed: &SocketAddr| directory.serves(index, *headed, record.time);
        let asked = key.destination;
        let virtual_address =
            path.is_some_and(|path| matches!(path.target, Target::ClusterIp | Target::External));
        let transmitted = record.transmitted != 0;
        let end = match (record.kind, headed) {
            (kind::DROP, _) => {
                let drop = self.reasons.drop_of(record);
                End::Dropped {
                    reason: drop.reason,
                    stage: drop.stage,
                    by: met.last().and_then(Meeting::dropper),
                }
            }
            (_, None) => End::Unknown,
            (_, Some(headed)) if is_endpoint(&headed) && transmitted => End::Sent,
            (_, Some(headed)) if is_endpoint(&headed) => End::Delivered,
            (_, Some(headed))
                if headed == asked && (!transmitted || self.local.contains(&headed.ip())) =>
            {
                End::Untranslated
            }
            (_, Some(headed)) if headed == asked && virtual_address => End::Leaked,
            (_, Some(_)) => End::Elsewhere,
        };
        let stages = stages_of(record, self.detail);
        let to_endpoint = matches!(end, End::Sent | End::Delivered);
        let translated = headed.filter(|headed| *headed != asked && to_endpoint);
        let translated_by = translated.and_then(|to| {
            Translator::of(service?, to, (transmitted, self.settled), &stages, &met)
        });
        Journey {
            // One that was not timed ends now.
            time_ns: if record.started == 0 {
                record.time
            } else {
                record.started
            },
            service: service.map_or_else(String::new, |service| service.name.clone()),
            protocol: record.protocol,
            source: key.source,
            destination: asked,
            headed,
            path: path.map_or_else(|| title_of(record.path), |path| path.title()),
            first: if self.was_first(record) {
                Some(true)
            } else {
                is_first(record, headers.map(|headers| headers.protocol))
            },
            answer: record.state == state::REPLY,
            // Only the session knows.
            told_before: false,
            elapsed_ns: (record.started != 0).then_some(record.elapsed),
            source_after,
            stages,
            translated_by,
            met,
            header: record.header.0,
            end,
        }
    }

    /// Has the packet been over the node before: translated to an endpoint on this very node, or sent by the node
    /// to itself?
    fn is_further(&self, record: &Record, key: &Key) -> bool {
        let came_from_us = !is_ours(record) && self.local.contains(&key.source.ip());
        destination_of(record) != key.destination || came_from_us && record.confirmed != 0
    }

    /// Who sent the RST?
    fn who_reset(&self, record: &Record, tuples: Option<&Tuples>) -> Who {
        match tuples {
            Some(tuples) if record.state == state::REPLY => {
                self.who_answers(record, tuples, source_of(record).ip())
            }
            Some(_) => Who::Client,
            // Conntrack does not track what refuses an untracked packet.
            None if is_ours(record) => Who::Node,
            None => Who::Endpoint(source_of(record)),
        }
    }

    /// Who refuses a tracked flow? What comes from the node itself comes from an endpoint if the flow was
    /// translated to one of its addresses. An untranslated one was for no endpoint.
    fn who_answers(&self, record: &Record, tuples: &Tuples, sender: IpAddr) -> Who {
        let local = self.local.contains(&tuples.answers.ip());
        let translated = tuples.answers != tuples.destination;
        match (is_ours(record), translated) {
            (true, true) if local => Who::Endpoint(tuples.answers),
            (true, _) => Who::Node,
            (false, true) => Who::Endpoint(tuples.answers),
            (false, false) => Who::Beyond(sender),
        }
    }

    fn error(&self, record: &Record, tuples: Option<&Tuples>) -> Option<Back> {
        let ipv4 = record.family == IPV4;
        if !verdict::ends_flow(ipv4, record.flags, record.code) {
            return None;
        }
        // As it came: translation makes every error come from the Service.
        let sender = dissect(&record.header.0)?.src;
        let who = match tuples {
            Some(tuples) if is_ours(record) => self.who_answers(record, tuples, sender),
            None if is_ours(record) => Who::Node,
            Some(tuples) if sender == tuples.answers.ip() => Who::Endpoint(tuples.answers),
            _ => Who::Beyond(sender),
        };
        Some(Back::Error(
            who,
            verdict::icmp_error(ipv4, record.flags, record.code),
        ))
    }
}

/// What a path is called that no histogram counts.
fn title_of(path: u8) -> &'static str {
    const TITLES: [&str; 3] = ["pod→kube-ipvs0", "host→kube-ipvs0", "external→kube-ipvs0"];
    let origin = path.checked_sub(ABSORBED).map(usize::from);
    let title = origin.and_then(|origin| TITLES.get(origin));
    title.copied().unwrap_or("unknown")
}

/// Is it the first packet of its flow? What conntrack has not seen asks for a new flow if its protocol has a packet
/// for that, which makes a new flow whatever conntrack knows. `carried` is the protocol of the packet itself, which
/// may be an ICMP error about one of the flow.
fn is_first(record: &Record, carried: Option<u8>) -> Option<bool> {
    // Conntrack makes an entry of what it finds under way (nf_conntrack_tcp_loose), which opens no flow; nor does what
    // it does not track.
    if matches!(record.state, state::NEW | state::UNTRACKED) && goes_on(record) {
        return Some(false);
    }
    let seen = !matches!(record.state, state::UNKNOWN | state::UNTRACKED);
    if record.kind == kind::FIRST || seen {
        return Some(record.kind == kind::FIRST || record.state == state::NEW);
    }
    if carried? != record.protocol {
        return Some(false);
    }
    match record.protocol {
        protocol::TCP | protocol::SCTP => Some(!goes_on(record)),
        _ => None,
    }
}

/// Does the packet go on with a connection, by its own word?
const fn goes_on(record: &Record) -> bool {
    match record.protocol {
        protocol::TCP => record.flags & (tcp::SYN | tcp::ACK | tcp::RST) != tcp::SYN,
        protocol::SCTP => record.flags != sctp::INIT,
        _ => false,
    }
}

/// Did the node itself send the packet?
const fn is_ours(record: &Record) -> bool {
    record.began >= OUTPUT_FIRST
}

/// The flow of a packet, as its client knows it.
fn key_of(record: &Record, tuples: Option<&Tuples>) -> Key {
    let (source, destination) = match (record.kind, tuples) {
        (_, Some(tuples)) => (tuples.source, tuples.destination),
        // What refuses an untracked packet comes from what was asked for.
        (kind::RESET | kind::ERROR, None) => (destination_of(record), source_of(record)),
        (_, None) => (source_of(record), destination_of(record)),
    };
    Key {
        protocol: record.protocol,
        source,
        destination,
    }
}

fn stages_of(record: &Record, detail: Detail) -> Vec<StageTime> {
    let steps = usize::from(record.steps).min(STEPS);
    let mut begin_ns = 0;
    record.stages.0[..steps]
        .iter()
        .zip(&record.took.0[..steps])
        .map(|(stage, took)| {
            let (hook, stage) = catalogue::stage_name(*stage, detail);
            let took_ns = u64::from(*took);
            let time = StageTime {
                hook,
                stage,
                begin_ns,
                took_ns,
            };
            begin_ns += took_ns;
            time
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of what conntrack has not seen, only the packet itself says what it is.
    #[test]
    fn what_asks_for_a_flow_is_a_first_packet() {
        let dropped = |protocol, flags, carried| {
            let record = Record {
                kind: kind::DROP,
                state: state::UNKNOWN,
                protocol,
                flags,
                ..Record::ZERO
            };
            is_first(&record, carried)
        };
        let tcp = |flags| dropped(protocol::TCP, flags, Some(protocol::TCP));
        // ECN asks for itself in a SYN (RFC 3168, section 6.1.1).
        for flags in [tcp::SYN, tcp::SYN | 0xc0] {
            assert_eq!(tcp(flags), Some(true));
        }
        for flags in [tcp::SYN | tcp::ACK, tcp::ACK, tcp::RST, 0] {
            assert_eq!(tcp(flags), Some(false));
        }
        let sctp = |chunk| dropped(protocol::SCTP, chunk, Some(protocol::SCTP));
        assert_eq!(sctp(sctp::INIT), Some(true));
        assert_eq!(sctp(0), Some(false));
        assert_eq!(dropped(protocol::UDP, 0, Some(protocol::UDP)), None);
        // An ICMP error of type 3, destination unreachable, is no SYN with FIN.
        assert_eq!(dropped(protocol::TCP, 3, Some(protocol::ICMP)), Some(false));
        // Whose headers cannot be read.
        assert_eq!(dropped(protocol::TCP, tcp::SYN, None), None);
        // Conntrack takes for new what it finds under way, or does not track it.
        for (flags, first) in [(tcp::SYN, true), (tcp::ACK, false)] {
            for (kind, state) in [
                (kind::FIRST, state::NEW),
                (kind::DROP, state::NEW),
                (kind::FIRST, state::UNTRACKED),
            ] {
                let record = Record {
                    kind,
                    state,
                    protocol: protocol::TCP,
                    flags,
                    ..Record::ZERO
                };
                assert_eq!(is_first(&record, None), Some(first), "{state} {kind}");
            }
        }
        // Behind the last hook it is known that nothing tracks it; that says no more of its flow.
        for (protocol, flags, first) in [
            (protocol::TCP, tcp::SYN, Some(true)),
            (protocol::TCP, tcp::ACK, Some(false)),
            (protocol::UDP, 0, None),
        ] {
            let record = Record {
                kind: kind::DROP,
                state: state::UNTRACKED,
                protocol,
                flags,
                ..Record::ZERO
            };
            assert_eq!(is_first(&record, Some(protocol)), first);
        }
        for (seen, first) in [(state::NEW, true), (state::ESTABLISHED, false)] {
            let record = Record {
                kind: kind::DROP,
                state: seen,
                ..Record::ZERO
            };
            assert_eq!(is_first(&record, None), Some(first));
        }
    }
}
