//! bpftrace as most people time the kernel's functions with it: the begin of a call in a map, by thread, and the
//! difference at its end into a histogram.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::Deserialize;
use serde_json::Value;

use super::CostError;
use crate::kernel::netns::Netns;
use crate::kernel::tool;

/// The usual script for both functions.
pub(super) const KPROBES: &str = "
kprobe:nf_hook_slow { @hook_start[tid] = nsecs; }
kretprobe:nf_hook_slow /@hook_start[tid]/ { @hook = hist(nsecs - @hook_start[tid]); delete(@hook_start[tid]); }
kprobe:ipt_do_table { @table_start[tid] = nsecs; }
kretprobe:ipt_do_table /@table_start[tid]/ { @table = hist(nsecs - @table_start[tid]); delete(@table_start[tid]); }";

/// The same with what is cheaper, for the function of vmlinux.
pub(super) const KFUNCS: &str = "
kfunc:nf_hook_slow { @hook_start[tid] = nsecs; }
kretfunc:nf_hook_slow /@hook_start[tid]/ { @hook = hist(nsecs - @hook_start[tid]); delete(@hook_start[tid]); }";

/// [`KPROBES`] with counters: begins, those that find another in their place, ends with and without a begin.
pub(super) const COUNTERS: &str = "
kprobe:nf_hook_slow {
  @hook_begun = count();
  if (@hook_start[tid] != 0) { @hook_overwritten = count(); }
  @hook_start[tid] = nsecs;
}
kretprobe:nf_hook_slow {
  if (@hook_start[tid] != 0) {
    @hook = hist(nsecs - @hook_start[tid]); @hook_timed = count(); delete(@hook_start[tid]);
  } else { @hook_unpaired = count(); }
}
kprobe:ipt_do_table {
  @table_begun = count();
  if (@table_start[tid] != 0) { @table_overwritten = count(); }
  @table_start[tid] = nsecs;
}
kretprobe:ipt_do_table {
  if (@table_start[tid] != 0) {
    @table = hist(nsecs - @table_start[tid]); @table_timed = count(); delete(@table_start[tid]);
  } else { @table_unpaired = count(); }
}";

/// The maps that [`COUNTERS`] counts in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counters {
    pub(super) begun: &'static str,
    pub(super) timed: &'static str,
    pub(super) overwritten: &'static str,
    pub(super) unpaired: &'static str,
}

/// The functions, and their maps.
pub(super) const FUNCTIONS: [(&str, Counters); 2] = [
    (
        "nf_hook_slow",
        Counters {
            begun: "@hook_begun",
            timed: "@hook_timed",
            overwritten: "@hook_overwritten",
            unpaired: "@hook_unpaired",
        },
    ),
    (
        "ipt_do_table",
        Counters {
            begun: "@table_begun",
            timed: "@table_timed",
            overwritten: "@table_overwritten",
            unpaired: "@table_unpaired",
        },
    ),
];

/// What bpftrace says of its version.
///
/// # Errors
///
/// There is none.
pub(super) fn version() -> Result<String, CostError> {
    tool::find("bpftrace").map_err(|_| CostError::NoBpftrace)?;
    let output = Command::new(tool::program("bpftrace"))
        .arg("--version")
        .output()
        .map_err(CostError::Bpftrace)?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// What it echoes once everything is attached.
const READY: &str = "attached";

/// A running bpftrace. Its command, `cat`, is started once everything is attached, tells us so, and ends it.
pub(super) struct Bpftrace {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Bpftrace {
    /// Starts it; returns when its probes are attached.
    pub(super) fn start(ns: &Netns, script: &str) -> Result<Self, CostError> {
        let mut child = ns
            .command("bpftrace")
            .args(["-f", "json", "-c"])
            .arg(tool::program("cat"))
            .args(["-e", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(CostError::Bpftrace)?;
        let stdin = child.stdin.take();
        let Some(stdout) = child.stdout.take() else {
            return Err(CostError::NotPrinted("anything"));
        };
        let mut running = Self {
            child,
            stdin,
            stdout: BufReader::new(stdout),
        };
        if let Some(stdin) = &mut running.stdin {
            // If it has ended already, what it printed tells why.
            let _ = writeln!(stdin, "{READY}");
        }
        running.wait_until_attached()?;
        Ok(running)
    }

    fn wait_until_attached(&mut self) -> Result<(), CostError> {
        let mut line = String::new();
        while line.trim() != READY {
            line.clear();
            let read = self.stdout.read_line(&mut line);
            if read.map_err(CostError::Bpftrace)? == 0 {
                return Err(CostError::NotAttached(self.complaint()));
            }
        }
        Ok(())
    }

    /// What it said before it ended by itself.
    fn complaint(&mut self) -> String {
        let mut said = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            // Whatever can be read is better than nothing.
            let _ = stderr.read_to_string(&mut said);
        }
        let lines = said.lines().map(str::trim);
        let lines: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
        if lines.is_empty() {
            return "it said nothing".to_owned();
        }
        lines[..lines.len().min(3)].join("; ")
    }

    /// Ends it; what it printed.
    pub(super) fn finish(mut self) -> Result<Printed, CostError> {
        drop(self.stdin.take());
        let mut text = String::new();
        let read = self.stdout.read_to_string(&mut text);
        read.map_err(CostError::Bpftrace)?;
        Ok(Printed::parse(&text))
    }
}

impl Drop for Bpftrace {
    fn drop(&mut self) {
        // It has ended, or is not wanted any more: either way nothing is left.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One line of `-f json`.
#[derive(Deserialize)]
struct Line {
    data: Option<BTreeMap<String, Value>>,
}

/// One bar of a histogram.
#[derive(Deserialize)]
struct Bar {
    count: u64,
}

/// The maps that bpftrace printed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Printed {
    counts: BTreeMap<String, u64>,
    samples: u64,
}

impl Printed {
    fn parse(text: &str) -> Self {
        let mut printed = Self::default();
        // Lines of its command and of others are no maps.
        let lines = text.lines();
        let maps = lines.filter_map(|line| serde_json::from_str::<Line>(line).ok()?.data);
        for (name, value) in maps.flatten() {
            if let Some(count) = value.as_u64() {
                printed.counts.insert(name, count);
            } else if let Ok(bars) = serde_json::from_value::<Vec<Bar>>(value) {
                printed.samples += bars.iter().map(|bar| bar.count).sum::<u64>();
            }
        }
        printed
    }

    /// A counter, if it counted anything.
    pub(super) fn count(&self, name: &str) -> Option<u64> {
        self.counts.get(name).copied()
    }

    /// What is in all histograms.
    pub(super) const fn samples(&self) -> u64 {
        self.samples
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_bpftrace_prints() {
        let text = r#"{"type": "attached_probes", "data": {"probes": 4}}
attached

{"type": "map", "data": {"@hook_begun": 1200}}
{"type": "hist", "data": {"@hook": [{"min": 512, "max": 1023, "count": 18}, {"min": 1024, "max": 2047, "count": 2}]}}
{"type": "hist", "data": {"@table": [{"min": 1024, "max": 2047, "count": 12}]}}
{"type": "map", "data": {"@hook_start": {"231": 17}}}
"#;
        let printed = Printed::parse(text);
        assert_eq!(printed.samples(), 32);
        assert_eq!(printed.count("@hook_begun"), Some(1200));
        assert_eq!(printed.count("@hook_start"), None);
        assert_eq!(printed.count("@hook_unpaired"), None);
    }

    #[test]
    fn every_counter_is_in_the_script() {
        for (function, names) in FUNCTIONS {
            assert!(COUNTERS.contains(&format!("kprobe:{function} ")));
            for name in [names.begun, names.timed, names.overwritten, names.unpaired] {
                assert!(COUNTERS.contains(&format!("{name} = count()")), "{name}");
            }
        }
    }
}
