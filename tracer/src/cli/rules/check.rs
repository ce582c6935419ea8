//! `svcpath rules check`.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Instant;

use tracer::cluster::Family;
use tracer::kernel::netns::Netns;
use tracer::rules::check::{Finding, Report, check};
use tracer::rules::{Mode, NodeView};

use super::super::exit;
use super::{ClusterArgs, ModeArg, Output, Rules, read_cluster};

/// The rules differ from what the cluster calls for.
const DIFFERS: u8 = 1;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    svcpath rules check --live --cluster cluster.json --node worker-0 --mode iptables \\\n      \
    --cluster-cidr 10.244.0.0/16\n  \
    svcpath rules check --dump /var/tmp/dump --cluster cluster.json --node worker-0 --mode ipvs \\\n      \
    --node-address 10.0.2.15 --output json\n\n\
    What kube-proxy itself will remove in time (a draining real server, an emptied chain) is shown \
    as such and is\nno difference. Exit codes: 0 the rules are the ones called for, 1 they differ or the \
    check failed, 2 usage,\n3 not permitted.")]
pub(super) struct Args {
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    rules: Rules,
    /// How to show the differences.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
    /// Show at most this many differences as text (0: all); all are counted.
    #[arg(long, value_name = "N", default_value_t = 200)]
    limit: usize,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let cluster = read_cluster(&args.cluster.cluster)?;
    let mut view = args.cluster.flags.view(&cluster, &args.cluster.node)?;
    let texts = args.rules.texts()?;
    if args.rules.live && args.cluster.flags.node_address.is_empty() {
        add_own_addresses(&mut view)?;
    }
    let report = check(&cluster, &view, args.cluster.mode.into(), &texts)?;
    warn_of_other_back_end(args.cluster.mode, &report);
    let text = match args.output {
        Output::Json => serde_json::to_string_pretty(&report)? + "\n",
        Output::Text => show(&report, started.elapsed().as_secs_f64(), args.limit),
    };
    let verdict = if report.differences.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(DIFFERS)
    };
    match exit::print(&text) {
        // Who has read enough (`| head`) still has to be told by the exit code.
        Err(error) if error.is_broken_pipe() => Ok(verdict),
        printed => Ok(printed.map(|()| verdict)?),
    }
}

/// Adds the machine's addresses to those of the Node object, which names one or two of them.
fn add_own_addresses(view: &mut NodeView) -> anyhow::Result<()> {
    let own = tracer::kernel::addresses::of_node(&Netns::current()?)?;
    for address in own {
        if !address.is_loopback() && !view.addresses.contains(&address) {
            view.addresses.push(address);
        }
    }
    Ok(())
}

/// The two back ends of iptables are different systems: rules of one are not those of the other.
fn warn_of_other_back_end(asked: ModeArg, report: &Report) {
    let wanted = match asked {
        ModeArg::IptablesLegacy => Mode::IptablesLegacy,
        ModeArg::IptablesNft => Mode::IptablesNft,
        _ => return,
    };
    if let Some(found) = report.back_end
        && found != wanted
    {
        exit::say(&format!("warning: the rules are {found}'s, not {wanted}'s"));
    }
}

fn show(report: &Report, seconds: f64, limit: usize) -> String {
    let mut text = String::new();
    let count = report.differences.len();
    let differences = match count {
        0 => "no difference".to_owned(),
        1 => "1 difference".to_owned(),
        _ => format!("{count} differences"),
    };
    // Writing into a String cannot fail, here and below.
    for note in &report.notes {
        let _ = writeln!(text, "note: {note}");
    }
    let _ = writeln!(
        text,
        "{differences} ({} Services, {} endpoints{}{} checked in {seconds:.1} s)",
        report.services,
        report.endpoints,
        match report.families.as_slice() {
            [Family::V4] => " of IPv4 alone",
            _ => "",
        },
        report
            .back_end
            .map_or_else(String::new, |mode| format!(" in {mode}")),
    );
    let shown = if limit == 0 { count } else { limit.min(count) };
    for finding in report.differences.iter().take(shown) {
        show_finding(&mut text, finding);
    }
    for finding in report.draining.iter().take(shown.max(limit)) {
        show_finding(&mut text, finding);
    }
    if shown < count {
        let _ = writeln!(text, "  and {} more: --limit 0 shows all", count - shown);
    }
    text
}

/// Three or four lines: where, what, what is there instead, and what it does to whom.
fn show_finding(text: &mut String, finding: &Finding) {
    let line = finding.line.map(|line| format!(", line {line}"));
    // Writing into a String cannot fail, here and below.
    let _ = writeln!(
        text,
        "  {:<8}  {} {}{}\n            {}",
        finding.kind,
        finding.family,
        finding.place,
        line.unwrap_or_default(),
        finding.rule
    );
    if let Some(found) = &finding.found {
        let _ = writeln!(text, "       is:  {found}");
    }
    let service = finding.service.as_deref().unwrap_or("all Services");
    let _ = writeln!(text, "            {service}: {}", finding.effect);
}
