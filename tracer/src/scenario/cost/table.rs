//! The report as text.

use std::fmt;

use super::{Cost, CostReport, Pairing, RESAMPLES, Setup};
use crate::record::run::Clock;

impl fmt::Display for Setup {
    /// `off`, `live hooks`, `bpftrace-kprobe`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.tier {
            Some(tier) => f.pad(&format!("{} {tier}", self.probes.name())),
            None => f.pad(self.probes.name()),
        }
    }
}

/// A number, or a dash where there is none.
fn or_dash(number: Option<f64>, digits: usize) -> String {
    number.map_or_else(|| "-".to_owned(), |number| format!("{number:.digits$}"))
}

impl CostReport {
    fn title(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clock = self.clock();
        let count = self.costs.first().map_or(0, |cost| cost.count);
        writeln!(
            f,
            "pod→ClusterIP over a node of our own in {} mode, {clock} clock, {} rounds, {count} packets a line; \
             the whole way of a packet, send to drop",
            self.mode, self.rounds
        )?;
        match &self.bpftrace {
            Some(version) => writeln!(f, "against {version}"),
            None => Ok(()),
        }
    }

    fn requests(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(first) = self.requests.first() else {
            return Ok(());
        };
        writeln!(
            f,
            "\nTCP requests of a pod's one client, one after the other, {} clock: the middle one of {} pairs of rounds \
             with a session and without (and its 95 % interval; bootstrap, {RESAMPLES} samples)",
            self.clock(),
            first.pairs
        )?;
        writeln!(
            f,
            "{:<16} {:<10} {:>9} {:>9} {:>8} {:>22} {:>13} {:>22}",
            "probes",
            "connection",
            "requests",
            "without/s",
            "with/s",
            "loss",
            "CPU us each",
            "more CPU"
        )?;
        for cost in &self.requests {
            writeln!(
                f,
                "{:<16} {:<10} {:>9} {:>9.0} {:>8.0} {:>22} {:>5.1} - {:>5.1} {:>22}",
                cost.setup.to_string(),
                cost.connection.name(),
                cost.requests,
                cost.without_per_s,
                cost.with_per_s,
                cost.loss.to_string(),
                cost.without_cpu_ns / 1000.0,
                cost.with_cpu_ns / 1000.0,
                cost.more_cpu.to_string()
            )?;
        }
        Ok(())
    }

    const fn clock(&self) -> &'static str {
        match self.clock {
            Clock::Wall => "wall",
            Clock::Virtual => "virtual (instructions)",
        }
    }

    fn line(&self, f: &mut fmt::Formatter<'_>, cost: &Cost) -> fmt::Result {
        write!(
            f,
            "{:<16} {:<7} {:>7.0} {:>8.0} - {:>6.0} {:>7.0} {:>6.2} {:>7} {:>6.2} {:>7}",
            cost.setup.to_string(),
            cost.packets.name(),
            cost.packet_ns,
            cost.range_ns.0,
            cost.range_ns.1,
            cost.added_ns,
            cost.runs,
            or_dash(cost.run_ns, 0),
            cost.stages,
            or_dash(cost.stage_ns, 0),
        )?;
        match &self.bpftrace {
            Some(_) => writeln!(
                f,
                " {:>9} {:>8}",
                or_dash(cost.of_kprobe, 2),
                or_dash(cost.of_kfunc, 2)
            ),
            None => writeln!(f),
        }
    }
}

impl fmt::Display for CostReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.title(f)?;
        write!(
            f,
            "{:<16} {:<7} {:>7} {:>17} {:>7} {:>6} {:>7} {:>6} {:>7}",
            "probes",
            "packet",
            "ns",
            "lowest - highest",
            "added",
            "runs",
            "per run",
            "stages",
            "a stage"
        )?;
        let against = self.bpftrace.is_some();
        writeln!(f, "{}", if against { " of kprobe of kfunc" } else { "" })?;
        for cost in &self.costs {
            self.line(f, cost)?;
        }
        for left_out in &self.left_out {
            writeln!(f, "{} tier: not measured, {}", left_out.tier, left_out.why)?;
        }
        self.requests(f)?;
        pairing(f, &self.pairing)
    }
}

fn pairing(f: &mut fmt::Formatter<'_>, pairing: &[Pairing]) -> fmt::Result {
    let Some(first) = pairing.first() else {
        return Ok(());
    };
    writeln!(
        f,
        "\n{} packets to an endpoint and {} that are rejected: whose times were taken",
        first.delivered, first.rejected
    )?;
    writeln!(
        f,
        "{:<16} {:<13} {:>7} {:>7} {:>11} {:>9}",
        "probes", "what", "begun", "timed", "overwritten", "unpaired"
    )?;
    for pairing in pairing {
        writeln!(
            f,
            "{:<16} {:<13} {:>7} {:>7} {:>11} {:>9}",
            pairing.setup.to_string(),
            pairing.what,
            pairing.begun,
            pairing.timed,
            pairing.overwritten,
            pairing.unpaired
        )?;
    }
    Ok(())
}
