//! What applying a rule set did: time and memory of each step, and after a failure what is in the
//! kernel and what is not.

use std::fmt;
use std::time::Duration;

use super::apply::ApplyError;
use super::usage::{Peak, Usage};

/// The steps that were done, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// One report a step.
    pub steps: Vec<StepReport>,
}

impl Applied {
    /// Wall time of all steps, in nanoseconds.
    pub fn total_ns(&self) -> u64 {
        self.steps.iter().map(StepReport::total_ns).sum()
    }

    /// The most memory that any one tool held, in KiB; 0 if no tool ran.
    pub fn peak(&self) -> Peak {
        let peaks = self.steps.iter().filter_map(|step| step.usage);
        peaks
            .map(|usage| usage.peak)
            .max_by_key(|peak| peak.kib)
            .unwrap_or_default()
    }
}

/// One step that was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepReport {
    /// What was brought up to date: `iptables-legacy`, `IPVS servers`, ...
    pub step: String,
    /// What did it: a tool, `netlink` or `procfs`.
    pub tool: String,
    /// Wall time of reading what was there and working out the difference, in nanoseconds.
    pub read_ns: u64,
    /// Wall time of loading it, in nanoseconds.
    pub load_ns: u64,
    /// What the loading tool used; `None` where this process talked to the kernel itself.
    pub usage: Option<Usage>,
    /// Bytes given to the tool or the kernel; 0 if everything was there.
    pub sent_bytes: u64,
    /// Rules, elements, servers or addresses among them.
    pub entries: u64,
}

impl StepReport {
    /// Wall time of the step, in nanoseconds.
    pub fn total_ns(&self) -> u64 {
        self.read_ns.saturating_add(self.load_ns)
    }
}

impl fmt::Display for StepReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |ns: u64| Duration::from_nanos(ns).as_secs_f64() * 1000.0;
        write!(
            f,
            "{}: {} entries, {} bytes by {} in {:.1} ms (reading before {:.1} ms)",
            self.step,
            self.entries,
            self.sent_bytes,
            self.tool,
            ms(self.load_ns),
            ms(self.read_ns),
        )?;
        if let Some(usage) = self.usage {
            let most = if usage.peak.bound { "at most " } else { "" };
            write!(
                f,
                ", {:.1} ms of it in the tool, {:.1} ms in the kernel, {most}{} KiB",
                ms(usage.user_ns),
                ms(usage.system_ns),
                usage.peak.kib
            )?;
        }
        Ok(())
    }
}

/// What a failed step left in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nothing of it went in: the step is one transaction, or failed before it changed anything.
    Nothing,
    /// The tool did not say where it stopped.
    Unknown,
    /// `iptables-restore` commits table by table, each wholly or not at all.
    Tables {
        /// Committed before.
        in_place: Vec<String>,
        /// As it was before.
        failed: String,
        /// As they were before, and never tried.
        not_tried: Vec<String>,
    },
    /// The tool goes line by line and stops at the first that fails.
    Lines {
        /// Lines whose change is not in the kernel, read back from it.
        missing: u64,
        /// Of so many.
        of: u64,
    },
    /// Each entry went its own way, and all were tried.
    Entries {
        /// How many the kernel refused.
        refused: u64,
        /// Of so many.
        of: u64,
    },
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing of it went in"),
            Self::Unknown => f.write_str("how much of it went in is not known"),
            Self::Tables {
                in_place,
                failed,
                not_tried,
            } => {
                for table in in_place {
                    write!(f, "table {table} is in, ")?;
                }
                write!(f, "table {failed} is as it was")?;
                for table in not_tried {
                    write!(f, ", table {table} was not tried")?;
                }
                Ok(())
            }
            Self::Lines { missing, of } => write!(f, "{missing} of its {of} lines are not in"),
            Self::Entries { refused, of } => {
                write!(
                    f,
                    "{refused} of its {of} entries are not in, the others are"
                )
            }
        }
    }
}

/// A rule set that went in only in part.
#[derive(Debug)]
pub struct Incomplete {
    /// The steps that are in.
    pub applied: Applied,
    /// The step that failed.
    pub step: String,
    /// What of it is in.
    pub left: Left,
    /// Why.
    pub cause: ApplyError,
    /// The steps after it.
    pub not_tried: Vec<String>,
}

impl fmt::Display for Incomplete {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            applied,
            step,
            left,
            cause,
            not_tried,
        } = self;
        write!(f, "the rules are in only in part: {step}: {cause}; {left}")?;
        let done: Vec<&str> = applied.steps.iter().map(|step| &*step.step).collect();
        write!(f, "; in: {}", list(&done))?;
        let not_tried: Vec<&str> = not_tried.iter().map(String::as_str).collect();
        write!(f, "; not tried: {}", list(&not_tried))
    }
}

fn list(steps: &[&str]) -> String {
    if steps.is_empty() {
        "nothing".to_owned()
    } else {
        steps.join(", ")
    }
}

/// What an `iptables-restore` that failed at this line (from 1) of `text` left.
pub(super) fn tables_left(text: &str, line: usize) -> Left {
    let mut in_place = Vec::new();
    let mut not_tried = Vec::new();
    let mut failed = None;
    let mut table = None;
    for (number, content) in (1..).zip(text.lines()) {
        if let Some(name) = content.strip_prefix('*') {
            table = Some(name.to_owned());
        }
        if number == line {
            failed.clone_from(&table);
        }
        let past = number >= line;
        if content == "COMMIT"
            && let Some(name) = table.take()
        {
            if !past {
                in_place.push(name);
            } else if failed.as_ref() != Some(&name) {
                not_tried.push(name);
            }
        }
    }
    // A line outside every table, such as one behind the last COMMIT, fails no table.
    match failed {
        Some(failed) => Left::Tables {
            in_place,
            failed,
            not_tried,
        },
        None => Left::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "*filter\n-A A\nCOMMIT\n*nat\n-A B\nCOMMIT\n*mangle\nCOMMIT\n";

    #[test]
    fn tables_before_the_line_are_in() {
        let left = |line| tables_left(TEXT, line).to_string();
        let all = "table filter is as it was, table nat was not tried, table mangle was not tried";
        for line in 1..=3 {
            assert_eq!(left(line), all, "{line}");
        }
        for line in 4..=6 {
            assert_eq!(
                left(line),
                "table filter is in, table nat is as it was, table mangle was not tried",
                "{line}"
            );
        }
        assert_eq!(
            left(8),
            "table filter is in, table nat is in, table mangle is as it was"
        );
        assert_eq!(tables_left(TEXT, 9), Left::Unknown);
        assert_eq!(tables_left("", 1), Left::Unknown);
    }

    #[test]
    fn a_report_reads_well() {
        let report = StepReport {
            step: "iptables-legacy".to_owned(),
            tool: "iptables-legacy-restore".to_owned(),
            read_ns: 1_500_000,
            load_ns: 20_000_000,
            usage: Some(Usage {
                user_ns: 12_000_000,
                system_ns: 7_000_000,
                peak: Peak {
                    kib: 4096,
                    bound: true,
                },
            }),
            sent_bytes: 100,
            entries: 3,
        };
        assert_eq!(
            report.to_string(),
            "iptables-legacy: 3 entries, 100 bytes by iptables-legacy-restore in 20.0 ms (reading \
             before 1.5 ms), 12.0 ms of it in the tool, 7.0 ms in the kernel, at most 4096 KiB"
        );
        let applied = Applied {
            steps: vec![report],
        };
        assert_eq!(applied.total_ns(), 21_500_000);
        assert_eq!(applied.peak().kib, 4096);
        assert_eq!(Applied::default().peak(), Peak::default());
    }
}
