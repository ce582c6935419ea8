//! Loading rules into a namespace, flushing, removing and counting them, with the tools that
//! operators and kube-proxy use.
//!
//! Nothing here acts outside the namespace it is given.

use std::fmt::Write as _;
use std::time::Instant;

use super::addresses::{self, AddressError, DummyLink};
use super::applied::tables_left;
pub use super::applied::{Applied, Incomplete, Left, StepReport};
use super::ipvs::{self as ipvs_servers, Ipvs, IpvsError, Server};
use super::netlink::NetlinkError;
use super::netns::{Netns, NetnsError};
use super::nfacct::{self, NfacctError};
use super::nft::{self, NftError};
use super::sysctl::{self, SysctlError};
use super::tool::{self, ToolError};
use super::usage::Usage;
use crate::cluster::Family;
use crate::rules::{Backend, Mode, RuleCounts, RuleSet, Step, Sysctl, iptables, ipvs, nftables};

/// Why rules could not be loaded, flushed, removed or counted.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A tool failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// nfacct failed.
    #[error(transparent)]
    Nfacct(#[from] NfacctError),
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A kernel parameter that the mode needs does not exist.
    #[error(
        "/proc/sys/{path} does not exist in namespace {namespace}, so the kernel lacks {needed_for}: \
         load the module or use a kernel that has it"
    )]
    NoSysctl {
        /// Path under `/proc/sys`.
        path: &'static str,
        /// The namespace.
        namespace: String,
        /// What for.
        needed_for: &'static str,
    },
    /// Another kernel parameter could not be set.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// An nftables table could not be counted.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// Addresses could not be read or bound.
    #[error(transparent)]
    Addresses(#[from] AddressError),
    /// IPVS servers could not be read or changed.
    #[error(transparent)]
    Servers(#[from] IpvsError),
    /// The kernel refused some of many entries.
    #[error("the kernel refuses {} of {of} entries in namespace {namespace}: {}", .first.len() + *.more, refusals(.first, *.more))]
    Refused {
        /// The namespace.
        namespace: String,
        /// The first few: entry, error and remedy.
        first: Vec<String>,
        /// How many more.
        more: usize,
        /// How many were tried.
        of: usize,
    },
    /// A rule set went in only in part.
    #[error("{0}")]
    Incomplete(Box<Incomplete>),
}

impl ApplyError {
    /// The error of the step that failed.
    pub fn cause(&self) -> &Self {
        match self {
            Self::Incomplete(incomplete) => incomplete.cause.cause(),
            other => other,
        }
    }
}

fn refusals(first: &[String], more: usize) -> String {
    let mut text = first.join("; ");
    if more > 0 {
        // Writing into a String cannot fail.
        let _ = write!(text, "; and {more} more");
    }
    text
}

/// Makes the namespace hold exactly the Service rules of `set`, in kube-proxy's order of steps,
/// and says what each step cost.
///
/// A namespace without rules gets each step's text as it stands. Where rules of the same mode are
/// already, only what kube-proxy's sync would change is changed: applying twice is the same as
/// once. Rules of others stay.
///
/// # Errors
///
/// [`ApplyError::Incomplete`] says which steps are in, what of the failed one is, and what was not
/// tried. Applying again, once the cause is gone, completes it.
pub fn apply(ns: &Netns, set: &RuleSet) -> Result<Applied, ApplyError> {
    let mut applied = Applied::default();
    for (position, step) in set.steps.iter().enumerate() {
        match apply_step(ns, step) {
            Ok(report) => applied.steps.push(report),
            Err(Failed { left, cause }) => {
                let after = set.steps.iter().skip(position + 1);
                return Err(ApplyError::Incomplete(Box::new(Incomplete {
                    applied,
                    step: label(step),
                    left,
                    cause: *cause,
                    not_tried: after.map(label).collect(),
                })));
            }
        }
    }
    Ok(applied)
}

/// Why a step failed, and what of it is in.
struct Failed {
    left: Left,
    cause: Box<ApplyError>,
}

impl<E: Into<ApplyError>> From<E> for Failed {
    fn from(error: E) -> Self {
        Self {
            left: Left::Nothing,
            cause: Box::new(error.into()),
        }
    }
}

/// What a step brings up to date, in an operator's words.
fn label(step: &Step) -> String {
    match step {
        Step::Sysctl(sysctl) => sysctl.path.to_owned(),
        Step::Accounting(name) => format!("nfacct object {name}"),
        Step::Iptables {
            family, backend, ..
        } => backend.tool(*family).to_owned(),
        Step::Servers { .. } => "IPVS servers".to_owned(),
        Step::Addresses { .. } => format!("addresses of {}", ipvs::LINK),
        Step::Sets { .. } => "ipsets".to_owned(),
        Step::Nft { family, .. } => format!("nft table {} kube-proxy", family.nft()),
    }
}

/// A step's report in the making.
struct Meter {
    step: String,
    begin: Instant,
    read_ns: u64,
}

impl Meter {
    fn start(step: &Step) -> Self {
        Self {
            step: label(step),
            begin: Instant::now(),
            read_ns: 0,
        }
    }

    /// From here on the step changes the kernel.
    fn load(&mut self) {
        self.read_ns = self.lap();
    }

    fn lap(&mut self) -> u64 {
        let now = Instant::now();
        let passed = now - std::mem::replace(&mut self.begin, now);
        u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX)
    }

    /// Loaded by a tool.
    fn tool(self, tool: &str, usage: Option<Usage>, text: &str, entries: u64) -> StepReport {
        self.done(tool, usage, text.len() as u64, entries)
    }

    fn done(mut self, tool: &str, usage: Option<Usage>, bytes: u64, entries: u64) -> StepReport {
        let load_ns = self.lap();
        StepReport {
            step: self.step,
            tool: tool.to_owned(),
            read_ns: self.read_ns,
            load_ns,
            usage,
            sent_bytes: bytes,
            entries,
        }
    }
}

fn apply_step(ns: &Netns, step: &Step) -> Result<StepReport, Failed> {
    let mut meter = Meter::start(step);
    match step {
        Step::Sysctl(sysctl) => {
            let written = write_sysctl(ns, *sysctl)?;
            let bytes = if written { sysctl.value.len() } else { 0 };
            Ok(meter.done("procfs", None, bytes as u64, u64::from(written)))
        }
        Step::Accounting(name) => {
            nfacct::ensure(ns, name)?;
            Ok(meter.done("netlink", None, name.len() as u64, 1))
        }
        Step::Iptables {
            family,
            backend,
            text,
        } => {
            let mut update = iptables::update(&save(ns, *backend, *family)?, text);
            if *backend == Backend::Legacy {
                update = chains_last_name_first(&update);
            }
            meter.load();
            let usage = load(ns, *backend, *family, &update).map_err(|error| Failed {
                left: match &error {
                    ToolError::Failed {
                        input: Some(line), ..
                    } => tables_left(&update, line.number),
                    ToolError::Missing { .. } | ToolError::Start { .. } => Left::Nothing,
                    ToolError::Failed { .. } | ToolError::Unreadable { .. } => Left::Unknown,
                },
                cause: Box::new(error.into()),
            })?;
            let tool = format!("{}-restore", backend.tool(*family));
            let rules = count_lines(&update, |line| line.starts_with('-'));
            Ok(meter.tool(&tool, Some(usage), &update, rules))
        }
        Step::Servers { text } => {
            let wanted = ipvs_servers::parse(text)?;
            let mut kernel = Ipvs::open(ns)?;
            let current = kernel.servers()?;
            let changes = ipvs_servers::difference(&current, &wanted);
            meter.load();
            let mut refused = Refusals::new(changes.len());
            let bytes = kernel
                .change(&changes, |position, error| {
                    refused.take(&error, || match changes.get(position) {
                        Some(change) => {
                            let remedy = change.remedy(error.errno().unwrap_or(0));
                            (change.to_string(), remedy)
                        }
                        None => (String::new(), String::new()),
                    });
                })
                .map_err(unknown)?;
            refused.none(ns)?;
            Ok(meter.done("netlink", None, bytes, changes.len() as u64))
        }
        Step::Addresses { addresses } => {
            let mut link = DummyLink::new(ns, ipvs::LINK)?;
            let bound = if let Some(bound) = link.addresses()? {
                bound
            } else {
                link.ensure()?;
                Vec::new()
            };
            let changes = addresses::difference(&bound, addresses);
            meter.load();
            let mut refused = Refusals::new(changes.len());
            let bytes = link
                .change(&changes, |position, error| {
                    refused.take(&error, || match changes.get(position) {
                        Some(change) => (
                            change.to_string(),
                            change.remedy(error.errno().unwrap_or(0)).to_owned(),
                        ),
                        None => (String::new(), String::new()),
                    });
                })
                .map_err(unknown)?;
            refused.none(ns)?;
            Ok(meter.done("netlink", None, bytes, changes.len() as u64))
        }
        Step::Sets { text } => {
            let current = tool::run(ns, "ipset", &["save"], "")?;
            let change = ipvs::update_sets(&current, text);
            meter.load();
            let usage = if change.is_empty() {
                None
            } else {
                let restored = tool::run_measured(ns, "ipset", &["restore"], &change);
                let (_, usage) = restored.map_err(|error| Failed {
                    left: sets_left(ns, text, &change),
                    cause: Box::new(error.into()),
                })?;
                Some(usage)
            };
            let entries = count_lines(&change, |line| !line.starts_with("create "));
            Ok(meter.tool("ipset", usage, &change, entries))
        }
        Step::Nft { family, text } => {
            let current = tool::run(ns, "nft", &["list", "chains", family.nft()], "")?;
            let update = nftables::update(&current, *family, text);
            meter.load();
            // A failed transaction changes nothing.
            let (_, usage) = tool::run_measured(ns, "nft", &["-f", "-"], &update)?;
            let entries = count_lines(&update, |line| {
                line.starts_with("add rule ") || line.starts_with('\t')
            });
            Ok(meter.tool("nft", Some(usage), &update, entries))
        }
    }
}

/// The same `iptables-restore` input with each block of chain declarations in falling order.
///
/// libiptc keeps chains sorted by name, whatever order they come in, and finds the place of one
/// that is before all others at once: with 30,000 Services that saves a tenth to a half of its time.
fn chains_last_name_first(text: &str) -> String {
    fn flush(chains: &mut Vec<&str>, sorted: &mut String) {
        chains.sort_unstable_by(|a, b| b.cmp(a));
        sorted.extend(chains.drain(..));
    }
    let mut sorted = String::with_capacity(text.len());
    let mut chains = Vec::new();
    for line in text.split_inclusive('\n') {
        if line.starts_with(':') && line.ends_with('\n') {
            chains.push(line);
        } else {
            flush(&mut chains, &mut sorted);
            sorted.push_str(line);
        }
    }
    flush(&mut chains, &mut sorted);
    sorted
}

fn count_lines(text: &str, counts: impl Fn(&str) -> bool) -> u64 {
    text.lines().filter(|line| counts(line)).count() as u64
}

/// A socket that failed in the middle of a batch does not say where.
fn unknown(error: impl Into<ApplyError>) -> Failed {
    Failed {
        left: Left::Unknown,
        cause: Box::new(error.into()),
    }
}

/// What a failed `ipset restore` left, read back from the kernel: lines are handed to it in bundles,
/// so that the one it complains of does not tell.
fn sets_left(ns: &Netns, text: &str, change: &str) -> Left {
    match tool::run(ns, "ipset", &["save"], "") {
        Ok(now) => Left::Lines {
            missing: count_lines(&ipvs::update_sets(&now, text), |_| true),
            of: count_lines(change, |_| true),
        },
        Err(_) => Left::Unknown,
    }
}

/// Entries that the kernel refused, of which the first few are named.
struct Refusals {
    first: Vec<String>,
    more: usize,
    of: usize,
}

impl Refusals {
    const NAMED: usize = 3;

    fn new(of: usize) -> Self {
        Self {
            first: Vec::new(),
            more: 0,
            of,
        }
    }

    /// `entry` gives the entry and the remedy.
    fn take(&mut self, error: &NetlinkError, entry: impl FnOnce() -> (String, String)) {
        if self.first.len() < Self::NAMED {
            let (entry, remedy) = entry();
            self.first.push(format!("'{entry}': {error}; {remedy}"));
        } else {
            self.more += 1;
        }
    }

    fn none(self, ns: &Netns) -> Result<(), Failed> {
        if self.first.is_empty() {
            return Ok(());
        }
        let refused = self.first.len() + self.more;
        Err(Failed {
            left: Left::Entries {
                refused: refused as u64,
                of: self.of as u64,
            },
            cause: Box::new(ApplyError::Refused {
                namespace: ns.name().to_owned(),
                first: self.first,
                more: self.more,
                of: self.of,
            }),
        })
    }
}

/// Does what an operator does to flush every Service rule of the mode, in both families: chains,
/// sets, addresses and the filter table stay. Returns the command lines.
pub fn flush(ns: &Netns, mode: Mode) -> Result<Vec<String>, ApplyError> {
    let commands: Vec<(&str, Vec<&str>)> = match mode {
        Mode::IptablesLegacy | Mode::IptablesNft => {
            let backend = backend_of(mode);
            Family::ALL
                .map(|family| (backend.tool(family), vec!["-t", "nat", "-F"]))
                .into()
        }
        Mode::Ipvs => vec![("ipvsadm", vec!["-C"])],
        Mode::Nftables => Family::ALL
            .map(|family| ("nft", vec!["flush", "table", family.nft(), "kube-proxy"]))
            .into(),
    };
    let mut done = Vec::with_capacity(commands.len());
    for (tool, args) in commands {
        tool::run(ns, tool, &args, "")?;
        done.push(format!("{tool} {}", args.join(" ")));
    }
    Ok(done)
}

/// Takes the mode's rules away as `kube-proxy --cleanup` does, and leaves those of others.
///
/// Like kube-proxy it leaves kernel parameters, nfacct objects and iptables' own base chains.
pub fn remove(ns: &Netns, mode: Mode) -> Result<(), ApplyError> {
    if mode == Mode::Ipvs {
        tool::run(ns, "ipvsadm", &["-C"], "")?;
        if DummyLink::new(ns, ipvs::LINK)?.addresses()?.is_some() {
            tool::run(ns, "ip", &["link", "delete", ipvs::LINK], "")?;
        }
    }
    if let Some(backend) = mode.backend() {
        for family in Family::ALL {
            if let Some(text) = iptables::removal(&save(ns, backend, family)?) {
                load(ns, backend, family, &text)?;
            }
        }
    }
    match mode {
        Mode::Ipvs => {
            let names = tool::run(ns, "ipset", &["list", "-n"], "")?;
            let mut text = String::new();
            for name in ipvs::set_names(&names) {
                // Writing into a String cannot fail.
                let _ = writeln!(text, "destroy {name}");
            }
            if !text.is_empty() {
                tool::run(ns, "ipset", &["restore"], &text)?;
            }
        }
        Mode::Nftables => {
            for family in Family::ALL {
                if has_table(ns, family)? {
                    let ip = family.nft();
                    tool::run(ns, "nft", &["delete", "table", ip, "kube-proxy"], "")?;
                }
            }
        }
        Mode::IptablesLegacy | Mode::IptablesNft => {}
    }
    Ok(())
}

/// Counts the mode's Service rules in the kernel.
pub fn count(ns: &Netns, mode: Mode) -> Result<RuleCounts, ApplyError> {
    let mut counts = RuleCounts::default();
    if let Some(backend) = mode.backend() {
        for family in Family::ALL {
            counts.rules += iptables::count(&save(ns, backend, family)?);
        }
    }
    match mode {
        Mode::Ipvs => {
            let servers = read_servers(ns)?;
            counts.virtual_servers = servers.len() as u64;
            counts.real_servers = servers.iter().map(|server| server.reals.len() as u64).sum();
            let sets = tool::run(ns, "ipset", &["save"], "")?;
            counts.elements = ipvs::count_entries(&sets);
        }
        Mode::Nftables => {
            for family in Family::ALL {
                let table = nft::count(ns, family, "kube-proxy")?;
                counts.rules += table.rules;
                counts.elements += table.elements;
            }
        }
        Mode::IptablesLegacy | Mode::IptablesNft => {}
    }
    Ok(counts)
}

/// The back end of a mode that certainly has one.
fn backend_of(mode: Mode) -> Backend {
    mode.backend().unwrap_or(Backend::Nft)
}

/// Is it written? One that the mode works without may be missing.
fn write_sysctl(ns: &Netns, sysctl: Sysctl) -> Result<bool, ApplyError> {
    let Sysctl {
        path,
        value,
        needed_for,
    } = sysctl;
    match (sysctl::write(ns, path, value), needed_for) {
        (Err(error), None) if error.is_missing() => Ok(false),
        (Err(error), Some(needed_for)) if error.is_missing() => Err(ApplyError::NoSysctl {
            path,
            namespace: ns.name().to_owned(),
            needed_for,
        }),
        (written, _) => Ok(written.map(|()| true)?),
    }
}

/// The kernel's IPVS servers; none of a kernel without IPVS, or one that has not loaded it yet.
///
/// Not from `/proc/net/ip_vs`: a read that goes on where the last one ended counts the servers of
/// every namespace to find the place (`ip_vs_info_seq_next`) but only its own to return to it
/// (`ip_vs_info_array`), and leaves servers out while other namespaces have some.
fn read_servers(ns: &Netns) -> Result<Vec<Server>, ApplyError> {
    match ipvs_servers::generic_family(ns)? {
        None => Ok(Vec::new()),
        Some(_) => Ok(Ipvs::open(ns)?.servers()?),
    }
}

fn save(ns: &Netns, backend: Backend, family: Family) -> Result<String, ApplyError> {
    let tool = format!("{}-save", backend.tool(family));
    Ok(tool::run(ns, &tool, &[], "")?)
}

fn load(ns: &Netns, backend: Backend, family: Family, text: &str) -> Result<Usage, ToolError> {
    let tool = format!("{}-restore", backend.tool(family));
    // kube-proxy's own flags, but for --counters: there are none to keep in a new node.
    let (_, usage) = tool::run_measured(ns, &tool, &["-w", "5", "--noflush"], text)?;
    Ok(usage)
}

fn has_table(ns: &Netns, family: Family) -> Result<bool, ApplyError> {
    let tables = tool::run(ns, "nft", &["list", "tables", family.nft()], "")?;
    let table = format!("table {} kube-proxy", family.nft());
    Ok(tables.lines().any(|line| line == table))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn only_declarations_change_places() {
        let text = "*filter\n:A - [0:0]\n:C - [0:0]\n-A A -j C\nCOMMIT\n*nat\n:A - [0:0]\n\
                    :B - [0:0]\n:C - [0:0]\n-A C -j B\n:D - [0:0]\n:E - [0:0]\n-X D\nCOMMIT\n";
        let sorted = "*filter\n:C - [0:0]\n:A - [0:0]\n-A A -j C\nCOMMIT\n*nat\n:C - [0:0]\n\
                      :B - [0:0]\n:A - [0:0]\n-A C -j B\n:E - [0:0]\n:D - [0:0]\n-X D\nCOMMIT\n";
        assert_eq!(chains_last_name_first(text), sorted);
        for cut in [":A - [0:0]\n:B - [0:0]\n", ":A - [0:0]\n:B", "", "-A X"] {
            assert_eq!(chains_last_name_first(cut).len(), cut.len());
        }
        assert_eq!(
            chains_last_name_first(":A\n:B"),
            ":A\n:B",
            "no line is joined"
        );
    }

    #[test]
    fn the_first_few_refusals_are_named() {
        let mut refusals = Refusals::new(9);
        let error = || NetlinkError::Refused(io::Error::from_raw_os_error(libc::EEXIST));
        for n in 0..5 {
            refusals.take(&error(), || {
                (format!("entry {n}"), "apply again".to_owned())
            });
        }
        let ns = Netns::current().expect("a namespace");
        let Err(Failed { left, cause }) = refusals.none(&ns) else {
            panic!("five were refused");
        };
        assert_eq!(left, Left::Entries { refused: 5, of: 9 });
        let text = cause.to_string();
        assert!(
            text.starts_with("the kernel refuses 5 of 9 entries"),
            "{text}"
        );
        assert!(
            text.contains("'entry 2': the kernel refuses: File exists"),
            "{text}"
        );
        assert!(
            !text.contains("entry 3") && text.ends_with("and 2 more"),
            "{text}"
        );
        assert!(Refusals::new(9).none(&ns).is_ok());
    }
}
