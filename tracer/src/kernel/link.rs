//! Links, addresses, routes and neighbours: lines for `ip -batch`, run inside a namespace.

use std::fmt;
use std::io::{self, Write as _};
use std::process::Stdio;

use super::netns::Netns;

/// Why links could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// `ip` could not be started.
    #[error("cannot run ip (iproute2) in network namespace {netns}: {source}")]
    Start {
        /// The namespace's name.
        netns: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// `ip` refused a line; the lines before it were carried out.
    #[error("ip {line}: {message} (network namespace {netns})")]
    Refused {
        /// The namespace's name.
        netns: String,
        /// The line that failed, or all of them if `ip` named none.
        line: String,
        /// What `ip` said.
        message: String,
    },
}

/// A hardware address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, byte) in self.0.iter().enumerate() {
            let colon = if position == 0 { "" } else { ":" };
            write!(f, "{colon}{byte:02x}")?;
        }
        Ok(())
    }
}

/// Commands for `ip -batch`, carried out in order in one namespace.
#[derive(Debug)]
pub struct Batch<'a> {
    netns: &'a Netns,
    lines: Vec<String>,
}

impl<'a> Batch<'a> {
    /// An empty batch for `netns`.
    pub fn new(netns: &'a Netns) -> Self {
        Self {
            netns,
            lines: Vec::new(),
        }
    }

    /// Adds one line: the arguments of one `ip` command.
    pub fn line(&mut self, line: impl Into<String>) -> &mut Self {
        self.lines.push(line.into());
        self
    }

    /// Adds a veth pair: `name` here, `peer` in the namespace `peer_netns`.
    ///
    /// Both ends get fixed hardware addresses, so that neighbours can be written down instead of
    /// asked for.
    pub fn veth(
        &mut self,
        (name, mac): (&str, Mac),
        peer_netns: &Netns,
        (peer, peer_mac): (&str, Mac),
    ) -> &mut Self {
        let path = peer_netns.path();
        self.line(format!(
            "link add {name} address {mac} type veth peer name {peer} address {peer_mac} netns {path}"
        ))
    }

    /// Adds an AnyIP route: the namespace answers on every address of `cidr`.
    pub fn any_ip(&mut self, cidr: impl fmt::Display) -> &mut Self {
        self.line(format!("route add local {cidr} dev lo"))
    }

    /// Runs the batch; it stops at the first line that fails.
    pub fn apply(&self) -> Result<(), LinkError> {
        let netns = self.netns.name();
        let start = |source| LinkError::Start {
            netns: netns.to_owned(),
            source,
        };
        let mut child = self
            .netns
            .command("ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(start)?;
        if let Some(mut stdin) = child.stdin.take() {
            // ip ends early when a line fails; its own message says more than a broken pipe.
            match stdin.write_all((self.lines.join("\n") + "\n").as_bytes()) {
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                    return Err(start(error));
                }
                _ => {}
            }
        }
        let output = child.wait_with_output().map_err(start)?;
        if output.status.success() {
            return Ok(());
        }
        let message = String::from_utf8_lossy(&output.stderr);
        Err(refused(netns, &self.lines, &message))
    }
}

/// Names the failing line: `ip` ends with `Command failed -:<line number>`.
fn refused(netns: &str, lines: &[String], message: &str) -> LinkError {
    let number = message
        .lines()
        .find_map(|line| line.strip_prefix("Command failed -:"))
        .and_then(|number| number.trim().parse::<usize>().ok());
    let line = number
        .and_then(|number| lines.get(number.checked_sub(1)?))
        .cloned()
        .unwrap_or_else(|| lines.join("; "));
    let said: Vec<&str> = message
        .lines()
        .filter(|line| !line.starts_with("Command failed"))
        .collect();
    LinkError::Refused {
        netns: netns.to_owned(),
        line,
        message: said.join("; "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_its_line() {
        let lines = ["link set lo up".to_owned(), "link set nope up".to_owned()];
        let error = refused(
            "node",
            &lines,
            "Cannot find device \"nope\"\nCommand failed -:2\n",
        );
        assert_eq!(
            error.to_string(),
            "ip link set nope up: Cannot find device \"nope\" (network namespace node)"
        );
    }

    #[test]
    fn a_hardware_address_reads_as_usual() {
        assert_eq!(Mac([2, 0, 0, 0, 10, 255]).to_string(), "02:00:00:00:0a:ff");
    }
}
