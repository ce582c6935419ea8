//! `HdrHistogram` interval logs, one file a cell, for the tools that read them.
//!
//! One tagged line a histogram: `path/state/HOOK/stage`, `path/state/node` and
//! `path/client/name`. A tag may hold neither blanks nor commas, hence the stroke between hook and
//! stage. Interval and start are zero: a log of one run says nothing of the wall clock, so the
//! same run gives the same bytes. Each bucket is recorded at the middle of its bounds
//! ([`super::quantile::middle`]) with three significant digits, so no two buckets fall together
//! and other tools read the same percentiles as svcpath's report.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram as Hdr;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};

use super::{figures, quantile};
use crate::record::run::{Cell, Clock, Histogram, Run};

/// Significant digits of the written histograms: finer than any bucket of a run.
const DIGITS: u8 = 3;

/// A histogram that could not be encoded.
#[derive(Debug, thiserror::Error)]
#[error("cannot encode the histogram {tag}: {what}")]
pub struct EncodeError {
    tag: String,
    what: String,
}

/// Every log of a run: file name and contents, in the order of the cells.
pub fn logs(run: &Run) -> Result<Vec<(String, Vec<u8>)>, EncodeError> {
    let cells = &run.measurements.cells;
    let mut same_size = BTreeMap::new();
    for cell in cells {
        *same_size.entry((cell.mode, cell.services)).or_insert(0) += 1;
    }
    cells
        .iter()
        .map(|cell| {
            // The number of endpoints stands in the name only where it tells two cells apart.
            let name = if same_size[&(cell.mode, cell.services)] == 1 {
                format!("cell-{}-{}.hlog", cell.mode, cell.services)
            } else {
                format!(
                    "cell-{}-{}-{}.hlog",
                    cell.mode, cell.services, cell.endpoints_per_service
                )
            };
            Ok((name, log(run.measurements.clock, cell)?))
        })
        .collect()
}

/// The log of one cell.
pub fn log(clock: Clock, cell: &Cell) -> Result<Vec<u8>, EncodeError> {
    let unit = match clock {
        Clock::Wall => "nanoseconds",
        Clock::Virtual => "guest instructions",
    };
    let mut out = Vec::new();
    let mut serializer = V2DeflateSerializer::new();
    let mut writer = IntervalLogWriterBuilder::new()
        .add_comment(&format!(
            "svcpath: {}, {} Services; values are {unit}",
            cell.mode, cell.services
        ))
        .begin_log_with(&mut out, &mut serializer)
        .map_err(|error| EncodeError {
            tag: "of the header".to_owned(),
            what: error.to_string(),
        })?;
    for (tag, histogram) in tagged(cell) {
        let failed = |what: String| EncodeError {
            tag: tag.clone(),
            what,
        };
        let hdr = encode(histogram).map_err(failed)?;
        let tag_of_line = Tag::new(&tag).ok_or_else(|| EncodeError {
            tag: tag.clone(),
            what: "its tag holds a character that a log cannot".to_owned(),
        })?;
        writer
            .write_histogram(&hdr, Duration::ZERO, Duration::ZERO, Some(tag_of_line))
            .map_err(|error| EncodeError {
                tag: tag.clone(),
                what: error.to_string(),
            })?;
    }
    drop(writer);
    Ok(out)
}

/// Every histogram of a cell with its tag.
fn tagged(cell: &Cell) -> Vec<(String, &Histogram)> {
    let mut all = Vec::new();
    for path in &cell.paths {
        for stage in &path.stages {
            let state = figures::state_name(stage.state);
            all.push((
                tag(&[&path.path, state, &stage.hook, &stage.stage]),
                &stage.histogram,
            ));
        }
        for (state, histogram) in &path.node {
            all.push((
                tag(&[&path.path, figures::state_name(*state), "node"]),
                histogram,
            ));
        }
        for (name, histogram) in &path.client {
            all.push((tag(&[&path.path, "client", name]), histogram));
        }
    }
    all
}

fn tag(parts: &[&str]) -> String {
    parts.join("/").replace([' ', ',', '\r', '\n'], "_")
}

fn encode(histogram: &Histogram) -> Result<Hdr<u64>, String> {
    let highest = histogram
        .buckets
        .last()
        .map_or(2, |bucket| bucket[1].max(2));
    let mut hdr = Hdr::new_with_bounds(1, highest, DIGITS).map_err(|error| error.to_string())?;
    for &[low, high, count] in &histogram.buckets {
        hdr.record_n(quantile::middle(low, high), count)
            .map_err(|error| error.to_string())?;
    }
    Ok(hdr)
}

#[cfg(test)]
mod tests {
    use data_encoding::BASE64;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    use super::*;
    use crate::report::sample;

    #[test]
    fn a_log_read_back_holds_every_count() {
        let run = sample::run();
        for cell in &run.measurements.cells {
            let bytes = log(Clock::Virtual, cell).expect("encode");
            let mut expected = tagged(cell).into_iter();
            for entry in IntervalLogIterator::new(&bytes) {
                let LogEntry::Interval(line) = entry.expect("a well-formed log") else {
                    continue;
                };
                let (tag, histogram) = expected.next().expect("no line too many");
                assert_eq!(line.tag().map(|t| t.as_str().to_owned()), Some(tag.clone()));
                assert_eq!(line.start_timestamp(), Duration::ZERO);
                let raw = BASE64
                    .decode(line.encoded_histogram().as_bytes())
                    .expect("base64");
                let hdr: Hdr<u64> = Deserializer::new()
                    .deserialize(&mut raw.as_slice())
                    .expect("a histogram");
                let mut counts = vec![0; histogram.buckets.len()];
                for value in hdr.iter_recorded() {
                    let at = value.value_iterated_to();
                    let bucket = histogram
                        .buckets
                        .iter()
                        .position(|[low, high, _]| {
                            (*low..=*high).contains(&hdr.lowest_equivalent(at))
                                || (*low..=*high).contains(&at)
                        })
                        .unwrap_or_else(|| panic!("{tag}: {at} is in no bucket"));
                    counts[bucket] += value.count_since_last_iteration();
                }
                let kept: Vec<u64> = histogram.buckets.iter().map(|bucket| bucket[2]).collect();
                assert_eq!(counts, kept, "{tag}");
            }
            assert!(expected.next().is_none(), "no line too few");
        }
    }

    #[test]
    fn a_log_is_the_same_every_time() {
        let run = sample::run();
        assert_eq!(logs(&run).expect("encode"), logs(&run).expect("encode"));
    }

    #[test]
    fn the_whole_range_fits() {
        let histogram = sample::histogram_of(&[0, 1, 127, 128, 1 << 33, (1 << 34) - 1]);
        assert_eq!(encode(&histogram).expect("fits").len(), 6);
        assert_eq!(encode(&Histogram::default()).expect("fits").len(), 0);
    }

    #[test]
    fn names_tell_cells_apart() {
        let mut run = sample::run();
        let mut other = run.measurements.cells[0].clone();
        other.endpoints_per_service = 50;
        run.measurements.cells.push(other);
        let names: Vec<String> = logs(&run)
            .expect("encode")
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(names[0], "cell-iptables-legacy-100-3.hlog");
        assert_eq!(names[1], "cell-iptables-legacy-1000.hlog");
        assert_eq!(names[names.len() - 1], "cell-iptables-legacy-100-50.hlog");
    }
}
