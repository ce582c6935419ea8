//! Running the tools that load rules, inside a namespace.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::{Output, Stdio};

use super::netns::Netns;

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
    #[error("{command} failed in namespace {namespace} ({status}): {said}{input}; {remedy}")]
    Failed {
        /// The command line.
        command: String,
        /// The namespace.
        namespace: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The first line it wrote to standard error.
        said: String,
        /// The line of its input that it complained of, if it named one.
        input: String,
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

/// Debian's package of each tool.
fn package(tool: &str) -> &'static str {
    match tool {
        "nft" => "nftables",
        "ipset" => "ipset",
        "ipvsadm" => "ipvsadm",
        "ip" => "iproute2",
        "modprobe" => "kmod",
        _ => "iptables",
    }
}

/// What most often helps when a tool fails with such words.
fn remedy(tool: &str, stderr: &str) -> &'static str {
    const REMEDIES: [(&str, &str); 10] = [
        ("Permission denied", "run as root (CAP_NET_ADMIN)"),
        ("not permitted", "run as root (CAP_NET_ADMIN)"),
        (
            "another app is currently holding the xtables lock",
            "wait until the other iptables has ended",
        ),
        (
            "nfacct",
            "the kernel lacks xt_nfacct: render without nfacct",
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

/// The input line that a message means: `iptables-restore: line 12 failed`, nft's
/// `/dev/stdin:12:1-30: Error`, `ip -batch`'s `Command failed -:12`.
fn input_line<'a>(stderr: &str, input: &'a str) -> Option<&'a str> {
    let after = stderr
        .split_once("line ")
        .or_else(|| stderr.split_once("/dev/stdin:"))
        .or_else(|| stderr.split_once("Command failed -:"))
        .map(|(_, after)| after)?;
    let digits = after
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(after.len());
    let number: usize = after[..digits].parse().ok()?;
    input.lines().nth(number.checked_sub(1)?)
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
pub(super) fn program(tool: &str) -> PathBuf {
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
///
/// Input is written by a thread of its own while output is read, so that neither side waits for
/// the other whatever the sizes.
pub fn run(ns: &Netns, tool: &str, args: &[&str], input: &str) -> Result<String, ToolError> {
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
    let output = exchange(ns, tool, args, input).map_err(start)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let said = stderr
            .lines()
            .find(|line| !line.trim().is_empty())
            .unwrap_or("it said nothing")
            .trim()
            .to_owned();
        return Err(ToolError::Failed {
            command: command_line(),
            namespace: ns.name().to_owned(),
            status: output.status,
            input: input_line(&stderr, input)
                .map(|line| format!(" (input line: {line})"))
                .unwrap_or_default(),
            remedy: remedy(tool, &stderr),
            said,
        });
    }
    String::from_utf8(output.stdout).map_err(|error| ToolError::Unreadable {
        command: command_line(),
        reason: error.to_string(),
    })
}

fn exchange(ns: &Netns, tool: &str, args: &[&str], input: &str) -> io::Result<Output> {
    let mut child = ns
        .command(tool)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdin = child.stdin.take();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if let Some(mut stdin) = stdin {
                // A tool that stops reading has failed and will say why itself.
                let _ = stdin.write_all(input.as_bytes());
            }
        });
        child.wait_with_output()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_complained_of_is_found() {
        let input = "*nat\n-A X\nCOMMIT\n";
        assert_eq!(
            input_line("iptables-restore: line 2 failed", input),
            Some("-A X")
        );
        assert_eq!(
            input_line("Error occurred at line: 2\nTry", input),
            None,
            "only `line N` names a line"
        );
        assert_eq!(
            input_line("/dev/stdin:3:1-6: Error: syntax error", input),
            Some("COMMIT")
        );
        assert_eq!(
            input_line("ipset v7.17: Error in line 1: Syntax", input),
            Some("*nat")
        );
        assert_eq!(
            input_line("Error: Unknown device type.\nCommand failed -:1", input),
            Some("*nat")
        );
        assert_eq!(input_line("line 99 failed", input), None);
    }

    #[test]
    fn remedies_name_what_to_do() {
        assert!(remedy("ip", "Error: Unknown device type.").contains("dummy"));
        assert!(remedy("ipset", "Hash is full, cannot add more").contains("65536"));
        assert!(remedy("nft", "strange").contains("doctor"));
    }
}
