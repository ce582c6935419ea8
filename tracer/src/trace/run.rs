//! `trace.json`: what a session recorded and where, as plain data. Beside it `journeys.jsonl` holds
//! journeys, one a line, as `svcpath trace --journeys --output json` prints them.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::journey::{End, Journey};
use super::summary::Summary;

/// The on-disk format that this version reads and writes.
pub const FORMAT: &str = "svcpath.trace/1";

/// One trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TraceRun {
    /// Always [`FORMAT`].
    pub format: String,
    /// When, where and with what.
    pub environment: TraceEnvironment,
    /// What was found.
    pub summary: Summary,
    /// Which journeys are kept beside it.
    pub journeys: Kept,
}

/// When, where and with what a trace was taken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TraceEnvironment {
    /// RFC 3339, UTC.
    pub started: String,
    /// What must be added to any `time_ns` to get nanoseconds since 1970, as of the begin.
    pub realtime_offset_ns: i64,
    /// svcpath's version.
    pub version: String,
    /// The machine's name.
    pub host: String,
    /// The traced network namespace as it was named; `None`: that of the command itself.
    pub namespace: Option<String>,
    /// Kernel release (`uname -r`).
    pub kernel: String,
    /// Number of CPUs.
    pub cpus: u32,
    /// Hash of the eBPF object and who compiled it.
    pub ebpf: String,
    /// Netfilter links attached.
    pub links: u32,
    /// Versions of the tools that the rules were read with, by name.
    pub tools: BTreeMap<String, String>,
    /// The command line.
    pub command: Vec<String>,
    /// Anything a reader should know.
    pub notes: Vec<String>,
}

/// Which journeys were kept: those that ended well up to a limit, and those that ended badly up to the
/// same limit, so that neither crowds out the other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// How many of each at most.
    pub limit: u64,
    /// Kept of those that ended well.
    pub good: u64,
    /// Kept of those that ended badly.
    pub wrong: u64,
    /// Left out of those that ended well.
    pub good_left_out: u64,
    /// Left out of those that ended badly.
    pub wrong_left_out: u64,
    /// Why journeys were not written from some time on; `None`: they were.
    pub failure: Option<String>,
}

impl Kept {
    /// Is there room for one more of this kind? Counts it, as kept or as left out.
    pub fn take(&mut self, good: bool) -> bool {
        let limit = self.failure.as_ref().map_or(self.limit, |_| 0);
        let (kept, left_out) = self.of(good);
        let room = *kept < limit;
        *(if room { kept } else { left_out }) += 1;
        room
    }

    /// One that was kept is left out after all.
    pub fn give_up(&mut self, good: bool) {
        let (kept, left_out) = self.of(good);
        *kept = kept.saturating_sub(1);
        *left_out += 1;
    }

    /// Those of a kind that are kept, and those that are left out.
    const fn of(&mut self, good: bool) -> (&mut u64, &mut u64) {
        if good {
            (&mut self.good, &mut self.good_left_out)
        } else {
            (&mut self.wrong, &mut self.wrong_left_out)
        }
    }

    /// Lines of `journeys.jsonl`.
    pub const fn lines(&self) -> u64 {
        self.good.saturating_add(self.wrong)
    }
}

/// One line of `journeys.jsonl`, as far as reports need it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct KeptJourney {
    /// When it came to the node (`CLOCK_MONOTONIC`, ns).
    pub time_ns: u64,
    /// `ns/name:port`.
    pub service: String,
    /// `pod→ClusterIP`, ...
    pub path: String,
    /// Who asks.
    pub source: SocketAddr,
    /// What was asked for.
    pub destination: SocketAddr,
    /// Where it was headed at the end.
    pub headed: Option<SocketAddr>,
    /// Is it an answer, on its way back?
    #[serde(default)]
    pub answer: bool,
    /// Is it a first packet that has a line before, of when it came to a socket or an endpoint?
    #[serde(default)]
    pub told_before: bool,
    /// Who it came from at the end; `None` if unknown.
    #[serde(default)]
    pub source_after: Option<SocketAddr>,
    /// Is it a flow's first packet? `None`: nobody knows.
    pub first: Option<bool>,
    /// Its time on this node, ns; `None` if it was not timed.
    pub elapsed_ns: Option<u64>,
    /// How it ended.
    #[serde(flatten)]
    pub end: End,
}

impl From<&Journey> for KeptJourney {
    fn from(journey: &Journey) -> Self {
        Self {
            time_ns: journey.time_ns,
            service: journey.service.clone(),
            path: journey.path.to_owned(),
            source: journey.source,
            destination: journey.destination,
            headed: journey.headed,
            answer: journey.answer,
            told_before: journey.told_before,
            source_after: journey.source_after,
            first: journey.first,
            elapsed_ns: journey.elapsed_ns,
            end: journey.end.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::session::Event;

    #[test]
    fn neither_kind_crowds_out_the_other() {
        let mut kept = Kept {
            limit: 2,
            ..Kept::default()
        };
        let taken = [true, true, true, false, true].map(|good| kept.take(good));
        assert_eq!(taken, [true, true, false, true, false]);
        assert_eq!((kept.good, kept.wrong, kept.lines()), (2, 1, 3));
        assert_eq!((kept.good_left_out, kept.wrong_left_out), (2, 0));
        kept.failure = Some("full".to_owned());
        assert!(!kept.take(false));
        assert_eq!((kept.wrong, kept.wrong_left_out), (1, 1));
    }

    #[test]
    fn a_journey_is_read_as_it_was_told() {
        let journey = Journey {
            told_before: true,
            end: End::Dropped {
                reason: "NO_SOCKET".to_owned(),
                stage: "INPUT deliver".to_owned(),
                by: None,
            },
            ..Journey::sample()
        };
        let line = serde_json::to_string(&Event::Journey(journey.clone())).expect("JSON");
        let read: KeptJourney = serde_json::from_str(&line).expect("a journey");
        assert_eq!(read, KeptJourney::from(&journey));
    }
}
