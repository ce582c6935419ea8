//! What a trace leaves: its folder, its report, its packets.

use std::fs;
use std::path::{Path as File, PathBuf};
use std::time::{Duration, Instant};

use tracer::kernel::clock;
use tracer::probe::tier::Tier;
use tracer::record::headers::dissect;
use tracer::record::run::Clock;
use tracer::report::recorder::Recorder;
use tracer::report::trace::{Trace, cut};
use tracer::report::{Recorded, html, markdown, read, terminal};
use tracer::rules::Mode;
use tracer::trace::journey::{End, Journey};
use tracer::trace::pcapng::{About, Encoder};
use tracer::trace::run::{KeptJourney, TraceEnvironment};
use tracer::trace::session::{Event, Session};
use tracer::trace::summary::Summary;

use crate::trace::{flush, node, options, send};

/// A folder of this process's own, gone afterwards.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("svcpath-{name}-{}", std::process::id()));
        // What an earlier process of this number may have left.
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn read_back(dir: &File) -> Trace {
    match read::recorded(dir).expect("it can be read back") {
        Recorded::Trace(trace) => *trace,
        Recorded::Comparison(_) => panic!("a trace was kept"),
    }
}

fn environment() -> TraceEnvironment {
    TraceEnvironment {
        started: "2026-11-20T17:02:11Z".to_owned(),
        kernel: tracer::kernel::release(),
        ..TraceEnvironment::default()
    }
}

fn journeys(events: &[Event]) -> Vec<&Journey> {
    let journeys = events.iter().filter_map(|event| match event {
        Event::Journey(journey) => Some(journey),
        _ => None,
    });
    journeys.collect()
}

/// Every form of a report shows every Service.
fn is_shown(trace: &Trace, summary: &Summary) {
    let recorded = Recorded::Trace(Box::new(trace.clone()));
    for text in [
        terminal::render(&recorded.blocks(), 200, false),
        html::trace::render(trace),
        recorded.json().expect("JSON"),
    ] {
        for service in &summary.services {
            assert!(text.contains(&service.name), "{} in {text}", service.name);
        }
    }
    let text = markdown::render(&recorded.blocks());
    assert!(text.contains("whole node"), "{text}");
}

/// What is kept is what was found; what there is no room for is counted; packets are those that went
/// by.
pub fn a_trace_is_kept_and_read_back(mode: Mode) {
    const LIMIT: u64 = 30;
    let node = node(mode);
    let dir = Folder::new(mode.name());
    let mut session =
        Session::start(node.lab.node(), options(Vec::new(), Tier::Hooks)).expect("attaches");
    let (mut recorder, began) = Recorder::start(&dir.0, LIMIT).expect("nobody else writes");
    began.expect("the folder can be written");
    let result = send(&node, 40, 1);
    let sent = result.flows.len();
    let mut events = session.poll().expect("polls");
    recorder.keep(&events).expect("written");
    let (rest, summary) = session.finish().expect("ends");
    recorder.keep(&rest).expect("written");
    events.extend(rest);
    recorder.finish(environment(), &summary).expect("written");

    let trace = read_back(&dir.0);
    assert_eq!(trace.run.summary, summary);
    let kept = &trace.run.journeys;
    assert_eq!(
        (kept.good, kept.good_left_out),
        (LIMIT, sent as u64 - LIMIT)
    );
    assert_eq!((kept.wrong, kept.wrong_left_out), (0, 0));
    let bins = summary.timeline.paths.values().flatten();
    let told: u64 = bins.map(|bin| bin.sent).sum();
    assert_eq!(told, sent as u64, "each new flow is in the timeline once");
    is_shown(&trace, &summary);

    let journeys = journeys(&events);
    assert_eq!(journeys.len(), sent);
    let masqueraded =
        |journey: &&&Journey| journey.source_after.is_some_and(|s| s != journey.source);
    let by_path = |path: &'static str| journeys.iter().filter(move |j| j.path == path);
    let from_pods = by_path("pod→ClusterIP");
    assert_eq!(from_pods.clone().filter(masqueraded).count(), 0);
    let from_outside = by_path("external→NodePort");
    assert_eq!(from_outside.clone().count(), 40);
    assert_eq!(from_outside.filter(masqueraded).count(), 40);
    are_the_packets(&journeys);
}

/// Each journey is a packet of the stream, with the time of its journey and the addresses that it had
/// at its end.
fn are_the_packets(journeys: &[&Journey]) {
    let offset = clock::realtime_offset_ns();
    let encoder = Encoder::new(Clock::Wall, offset);
    let about = About {
        hardware: String::new(),
        os: String::new(),
        program: "test".to_owned(),
        description: String::new(),
    };
    let mut stream = encoder.begin(&about);
    for journey in journeys {
        stream.extend(encoder.journey(journey));
    }
    let packets = packets(&stream);
    assert_eq!(packets.len(), journeys.len());
    for ((time_ns, bytes), journey) in packets.iter().zip(journeys) {
        assert_eq!(*time_ns, journey.time_ns.saturating_add_signed(offset));
        let headers = dissect(bytes).expect("an IP packet");
        let (source, destination) = headers.addresses().expect("with ports");
        assert_eq!(Some(source), journey.source_after);
        assert_eq!(Some(destination), journey.headed);
        assert_eq!(headers.protocol, journey.protocol);
    }
}

/// Time and bytes of each enhanced packet block.
fn packets(mut stream: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut packets = Vec::new();
    while let Some((head, _)) = stream.split_at_checked(12) {
        let number = |at: usize| {
            let bytes = stream[at..at + 4].try_into().expect("four bytes");
            u32::from_le_bytes(bytes)
        };
        let length = number(4) as usize;
        assert_eq!(number(length - 4) as usize, length, "{head:?}");
        if number(0) == 6 {
            let time_ns = u64::from(number(12)) << 32 | u64::from(number(16));
            let captured = number(20) as usize;
            packets.push((time_ns, stream[28..28 + captured].to_vec()));
        }
        stream = &stream[length..];
    }
    assert!(stream.is_empty());
    packets
}

/// Who flushed and what it broke stand in the kept trace, in this order.
pub fn a_flush_is_in_the_kept_trace() {
    let node = node(Mode::Nftables);
    let dir = Folder::new("flush");
    let mut session =
        Session::start(node.lab.node(), options(Vec::new(), Tier::Hooks)).expect("attaches");
    let (mut recorder, began) = Recorder::start(&dir.0, 1000).expect("nobody else writes");
    began.expect("the folder can be written");
    send(&node, 10, 1);
    // Flows and the flush are told apart by the timeline's bins.
    std::thread::sleep(Duration::from_millis(100));
    flush(&node);
    let begin = Instant::now();
    let mut heard = false;
    while !heard {
        assert!(begin.elapsed() < Duration::from_secs(20), "never heard of");
        let events = session.poll().expect("polls");
        heard = events
            .iter()
            .any(|event| matches!(event, Event::RuleChange(_)));
        recorder.keep(&events).expect("written");
        std::thread::sleep(Duration::from_millis(5));
    }
    send(&node, 10, 2);
    let (rest, summary) = session.finish().expect("ends");
    recorder.keep(&rest).expect("written");
    recorder.finish(environment(), &summary).expect("written");

    let trace = read_back(&dir.0);
    let periods = cut(&trace.run.summary);
    let [before, after] = &periods[..] else {
        panic!("one change cuts in two: {periods:#?}");
    };
    assert_eq!((before.flows.sent, before.flows.lost), (30, 0));
    assert_eq!(after.flows.sent, 30);
    assert!(after.flows.lost >= 20, "{after:?}");
    let wrong = trace.wrong.as_ref().expect("journeys are beside it");
    // What no socket took is told when it was handed over, and once more as the same packet.
    let (again, once): (Vec<_>, Vec<_>) = wrong.iter().partition(|journey| journey.told_before);
    assert!(once.len() as u64 >= after.flows.lost, "{wrong:#?}");
    assert!(!again.is_empty(), "{wrong:#?}");
    for journey in again {
        let is_same = |other: &&KeptJourney| {
            (other.source, other.destination) == (journey.source, journey.destination)
                && other.end == End::Untranslated
        };
        assert!(once.iter().any(is_same), "{journey:?}");
    }
    let not_taken =
        |end: &End| matches!(end, End::Dropped { stage, .. } if stage == "INPUT deliver");
    assert!(
        !once.iter().any(|journey| not_taken(&journey.end)),
        "{once:#?}"
    );
    is_shown(&trace, &summary);
    let text = terminal::render(&Recorded::Trace(Box::new(trace)).blocks(), 200, false);
    for words in [
        "rule change 1 at +",
        "nft (pid ",
        "Journeys that ended badly",
        "leaked",
    ] {
        assert!(text.contains(words), "'{words}' in {text}");
    }
}
