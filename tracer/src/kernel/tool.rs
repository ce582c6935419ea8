//! Running the tools that load rules, inside a namespace.

use std::io::{self, Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Output, Stdio};

use super::netns::Netns;
use super::usage::{self, Usage};

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not installed.
    #[error("{tool} is not installed: install the package {package} (apt-get install {package})")]
    Missing {
        /// The program.
        tool: String,
        /// Debian's package of it.
        package: &'static str,
    },
    /// It could not be started or talked to.
    #[error("cannot run {command} in namespace {namespace}: {source}")]
    Start {
        /// The command line.
        command: String,
        /// The namespace.
        namespace: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It refused.
    #[error("{command} failed in namespace {namespace} ({status}): {said}{}; {remedy}", shown(input.as_deref()))]
    Failed {
        /// The command line.
        command: String,
        /// The namespace.
        namespace: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it wrote to standard error, shortened and on one line.
        said: String,
        /// The line of its input that it complained of, if it named one.
        input: Option<Box<InputLine>>,
        /// What to do.
        remedy: &'static str,
    },
    /// It printed what cannot be understood.
    #[error("cannot understand what {command} printed: {reason}")]
    Unreadable {
        /// The command line.
        command: String,
        /// Why.
        reason: String,
    },
}

impl ToolError {
    /// Did the tool lack rights?
    pub fn is_not_permitted(&self) -> bool {
        matches!(self, Self::Failed { remedy, .. } if *remedy == NOT_PERMITTED)
    }
}

/// A line of a tool's input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputLine {
    /// Its number, from 1.
    pub number: usize,
    /// The line, without its end.
    pub text: String,
}

fn shown(line: Option<&InputLine>) -> String {
    line.map(|InputLine { number, text }| format!(" (input line {number}: {text})"))
        .unwrap_or_default()
}

/// Debian's package of each tool.
fn package(tool: &str) -> &'static str {
    match tool {
        "nft" => "nftables",
        "ipset" => "ipset",
        "ipvsadm" => "ipvsadm",
        "ip" => "iproute2",
        "modprobe" => "kmod",
        "bpftrace" => "bpftrace",
        "cat" => "coreutils",
        _ => "iptables",
    }
}

const NOT_PERMITTED: &str =
    "run as root with CAP_NET_ADMIN and, which iptables' tools ask for, CAP_NET_RAW";

/// What most often helps when a tool fails with such words.
fn remedy(tool: &str, stderr: &str) -> &'static str {
    const REMEDIES: [(&str, &str); 11] = [
        ("Permission denied", NOT_PERMITTED),
        ("not permitted", NOT_PERMITTED),
        (
            "another app is currently holding the xtables lock",
            "wait until the other iptables has ended",
        ),
        (
            "nfacct",
            "the kernel lacks xt_nfacct: render without nfacct",
        ),
        (
            "Extension ipvs",
            "load the module xt_ipvs (modprobe xt_ipvs)",
        ),
        (
            "IP Virtual Server",
            "load the modules ip_vs and ip_vs_rr (modprobe ip_vs ip_vs_rr)",
        ),
        (
            "scheduler or persistence engine not found",
            "load the module ip_vs_rr (modprobe ip_vs_rr)",
        ),
        (
            // ip_vs_add_dest asks for the address's type, which needs a routing table.
            "address not unicast",
            "bring lo up and give the namespace an address first: without any, IPVS takes no \
             real servers",
        ),
        (
            "Hash is full",
            "kube-proxy's ipsets hold 65536 entries: use fewer Services or another mode",
        ),
        (
            "Unknown device type",
            "load the module dummy (modprobe dummy)",
        ),
        (
            "o such file or directory",
            "the kernel may lack the match or target (see `svcpath doctor`)",
        ),
    ];
    REMEDIES
        .iter()
        .find(|(words, _)| stderr.contains(words))
        .map_or(
            if tool.starts_with("ip6tables") {
                "does the kernel have IPv6? see `svcpath doctor`"
            } else {
                "see `svcpath doctor` for what this kernel lacks"
            },
            |(_, remedy)| *remedy,
        )
}

/// The input line that a message means: `iptables-restore: line 12 failed`, `Error occurred at
/// line: 12`, `line 12: RULE_APPEND failed`, nft's `/dev/stdin:12:1-30: Error`, `ipset`'s `Error in
/// line 12`, `ip -batch`'s `Command failed -:12`.
fn input_line(stderr: &str, input: &str) -> Option<InputLine> {
    const BEFORE: [&str; 4] = ["line ", "line: ", "/dev/stdin:", "Command failed -:"];
    let number = stderr.lines().find_map(|said| {
        BEFORE.iter().find_map(|before| {
            let (_, after) = said.split_once(before)?;
            let digits = after.split(|c: char| !c.is_ascii_digit()).next()?;
            digits.parse::<usize>().ok()
        })
    })?;
    let text = input.lines().nth(number.checked_sub(1)?)?;
    Some(InputLine {
        number,
        text: text.to_owned(),
    })
}

/// What a tool said, on one line: at most its first three lines that say something.
fn said(stderr: &str) -> String {
    let lines = stderr
        .lines()
        .map(str::trim)
        // iptables-nft-restore's name stands alone on its first line, nft underlines with carets.
        .filter(|line| !line.is_empty() && !line.ends_with("):") && !line.starts_with('^'))
        .filter(|line| !line.starts_with("Try `"));
    let said: Vec<&str> = lines.take(3).collect();
    if said.is_empty() {
        "it said nothing".to_owned()
    } else {
        said.join("; ")
    }
}

/// Where the tool is: in `PATH`, or where administrators' programs are, which `su` leaves out.
fn locate(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(tool))
        .find(|file| file.is_file())
}

/// What to start for a tool: its name, if it is nowhere, for the error that says so.
pub(crate) fn program(tool: &str) -> PathBuf {
    locate(tool).unwrap_or_else(|| tool.into())
}

/// Is the tool where [`run`] looks for it?
pub fn find(tool: &str) -> Result<(), ToolError> {
    if locate(tool).is_some() {
        return Ok(());
    }
    Err(ToolError::Missing {
        tool: tool.to_owned(),
        package: package(tool),
    })
}

/// Runs `tool` in the namespace with `input` on its standard input; returns what it printed.
pub fn run(ns: &Netns, tool: &str, args: &[&str], input: &str) -> Result<String, ToolError> {
    run_measured(ns, tool, args, input).map(|(printed, _)| printed)
}

/// As [`run`], and says what the tool used.
///
/// Input is written and messages are read by threads of their own while output is read, so that
/// neither side waits for the other whatever the sizes.
pub fn run_measured(
    ns: &Netns,
    tool: &str,
    args: &[&str],
    input: &str,
) -> Result<(String, Usage), ToolError> {
    let command_line = || {
        let mut line = tool.to_owned();
        for arg in args {
            line.push(' ');
            line.push_str(arg);
        }
        line
    };
    let start = |source: io::Error| {
        if source.kind() == io::ErrorKind::NotFound {
            ToolError::Missing {
                tool: tool.to_owned(),
                package: package(tool),
            }
        } else {
            ToolError::Start {
                command: command_line(),
                namespace: ns.name().to_owned(),
                source,
            }
        }
    };
    let (output, usage) = exchange(ns, tool, args, input).map_err(start)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(ToolError::Failed {
            command: command_line(),
            namespace: ns.name().to_owned(),
            status: output.status,
            input: input_line(&stderr, input).map(Box::new),
            remedy: remedy(tool, &stderr),
            said: said(&stderr),
        });
    }
    let printed = String::from_utf8(output.stdout).map_err(|error| ToolError::Unreadable {
        command: command_line(),
        reason: error.to_string(),
    })?;
    Ok((printed, usage))
}

fn exchange(ns: &Netns, tool: &str, args: &[&str], input: &str) -> io::Result<(Output, Usage)> {
    let parent_kib = usage::own_memory_kib();
    let mut child = ns
        .command(tool)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdin = child.stdin.take();
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let read = std::thread::scope(|scope| {
        scope.spawn(move || {
            if let Some(mut stdin) = stdin {
                // A tool that stops reading has failed and will say why itself.
                let _ = stdin.write_all(input.as_bytes());
            }
        });
        let errors = scope.spawn(|| err.map_or(Ok(0), |mut err| err.read_to_end(&mut stderr)));
        let read = out.map_or(Ok(0), |mut out| out.read_to_end(&mut stdout));
        let errors = errors
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("a thread that reads panicked")));
        read.and(errors)
    });
    // Whatever became of the pipes, the child must not stay a zombie.
    let (status, usage) = usage::wait(&child, parent_kib)?;
    read?;
    let output = Output {
        status,
        stdout,
        stderr,
    };
    Ok((output, usage))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_complained_of_is_found() {
        let input = "*nat\n-A X\nCOMMIT\n";
        for (stderr, number, text) in [
            ("iptables-restore: line 2 failed", 2, "-A X"),
            (
                "iptables-restore v1.8.9 (legacy): unknown option \"--x\"\n\
                 Error occurred at line: 2\nTry `iptables-restore -h'",
                2,
                "-A X",
            ),
            (
                "iptables-nft-restore v1.8.9 (nf_tables): \n\
                 line 2: RULE_APPEND failed (No such file or directory): rule in chain X",
                2,
                "-A X",
            ),
            ("/dev/stdin:3:1-6: Error: syntax error", 3, "COMMIT"),
            ("ipset v7.17: Error in line 1: Syntax", 1, "*nat"),
            ("Error: Unknown device type.\nCommand failed -:1", 1, "*nat"),
        ] {
            let text = text.to_owned();
            assert_eq!(
                input_line(stderr, input),
                Some(InputLine { number, text }),
                "{stderr}"
            );
        }
        assert_eq!(input_line("line 99 failed", input), None);
        assert_eq!(input_line("line 0 failed", input), None);
        assert_eq!(input_line("line by line", input), None);
    }

    #[test]
    fn what_a_tool_says_is_one_line() {
        let nft = "iptables-nft-restore v1.8.9 (nf_tables): \nline 2: RULE_APPEND failed\n";
        assert_eq!(said(nft), "line 2: RULE_APPEND failed");
        assert_eq!(
            said("Error: x\nadd rule\n^^^^\nb\nc"),
            "Error: x; add rule; b"
        );
        assert_eq!(said("\n"), "it said nothing");
    }

    #[test]
    fn remedies_name_what_to_do() {
        assert!(remedy("ip", "Error: Unknown device type.").contains("dummy"));
        assert!(remedy("ipset", "Hash is full, cannot add more").contains("65536"));
        assert!(remedy("nft", "strange").contains("doctor"));
    }
}
