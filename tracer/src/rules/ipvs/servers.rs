//! Virtual and real servers, as `ipvsadm -Sn` prints and `ipvsadm -R` reads them.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;

use crate::cluster::{Family, Protocol};

use super::{ParseError, numbered_lines, write_words};

/// The timeout of `-p` without a number, in seconds: `DEF_PERS_TIMEOUT` of ipvsadm.
const DEFAULT_PERSISTENCE: u32 = 300;

/// What a packet must be sent to so that IPVS takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServerKey {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Address and port.
    pub socket: SocketAddr,
}

impl ServerKey {
    /// The IP family.
    pub fn family(self) -> Family {
        Family::of(self.socket.ip())
    }
}

impl fmt::Display for ServerKey {
    /// As ipvsadm writes it: `-t 10.96.0.1:443`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let option = match self.protocol {
            Protocol::Tcp => "-t",
            Protocol::Udp => "-u",
            Protocol::Sctp => "--sctp-service",
        };
        write!(f, "{option} {}", self.socket)
    }
}

/// How a packet gets to a real server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Forwarding {
    /// `-m`: its destination is translated.
    Masquerade,
    /// `-g`: it is routed as it is. ipvsadm's default.
    #[default]
    Route,
    /// `-i`: it is tunnelled.
    Tunnel,
}

impl Forwarding {
    const fn option(self) -> &'static str {
        match self {
            Self::Masquerade => "-m",
            Self::Route => "-g",
            Self::Tunnel => "-i",
        }
    }
}

/// A real server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RealServer {
    /// Address and port.
    pub socket: SocketAddr,
    /// How packets get to it.
    pub forwarding: Forwarding,
    /// The share of new flows it gets; 0 is none, as while it is drained.
    pub weight: u32,
    /// No new flows from this many connections on; 0 is no limit.
    pub upper: u32,
    /// After `upper` was reached, new flows again below this many; 0 is three quarters of it.
    pub lower: u32,
    /// Options that kube-proxy never sets, as they stand.
    pub others: Vec<String>,
    /// The line it stands on, from 1.
    pub line: u32,
}

impl RealServer {
    /// The same but for the line?
    pub fn same(&self, other: &Self) -> bool {
        let Self {
            socket,
            forwarding,
            weight,
            upper,
            lower,
            others,
            line: _,
        } = self;
        (*socket, *forwarding, *weight, *upper, *lower)
            == (
                other.socket,
                other.forwarding,
                other.weight,
                other.upper,
                other.lower,
            )
            && *others == other.others
    }
}

impl fmt::Display for RealServer {
    /// As ipvsadm writes it after the virtual server: `-r 10.244.0.11:8080 -m -w 1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let option = self.forwarding.option();
        write!(f, "-r {} {option} -w {}", self.socket, self.weight)?;
        if self.upper != 0 {
            write!(f, " -x {}", self.upper)?;
        }
        if self.lower != 0 {
            write!(f, " -y {}", self.lower)?;
        }
        write_words(f, &self.others)
    }
}

/// A virtual server and its real servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtualServer {
    /// What it serves.
    pub key: ServerKey,
    /// The scheduler: `rr`, `wrr`, `lc`, `mh`, ...
    pub scheduler: String,
    /// `-b`: the scheduler's flags, such as `mh-port`.
    pub scheduler_flags: Option<String>,
    /// `-p`: a client goes to the same real server for this many seconds.
    pub persistence: Option<u32>,
    /// `-M`: how much of a client's address counts for that.
    pub netmask: Option<String>,
    /// Options that kube-proxy never sets, as they stand.
    pub others: Vec<String>,
    /// The line it stands on, from 1.
    pub line: u32,
    /// The real servers.
    pub real_servers: Vec<RealServer>,
}

impl VirtualServer {
    /// The same but for the line and the real servers?
    pub fn same(&self, other: &Self) -> bool {
        let Self {
            key,
            scheduler,
            scheduler_flags,
            persistence,
            netmask,
            others,
            line: _,
            real_servers: _,
        } = self;
        *key == other.key
            && *scheduler == other.scheduler
            && *scheduler_flags == other.scheduler_flags
            && *persistence == other.persistence
            && *netmask == other.netmask
            && *others == other.others
    }
}

impl fmt::Display for VirtualServer {
    /// As ipvsadm writes it, without the real servers: `-A -t 10.96.0.1:443 -s rr`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "-A {} -s {}", self.key, self.scheduler)?;
        if let Some(seconds) = self.persistence {
            write!(f, " -p {seconds}")?;
        }
        if let Some(netmask) = &self.netmask {
            write!(f, " -M {netmask}")?;
        }
        if let Some(flags) = &self.scheduler_flags {
            write!(f, " -b {flags}")?;
        }
        write_words(f, &self.others)
    }
}

/// A real server whose virtual server is not there: only an edited dump has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orphan {
    /// The virtual server that is not there.
    pub key: ServerKey,
    /// The real server.
    pub real_server: RealServer,
}

/// What `ipvsadm -Sn` prints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Servers {
    /// The virtual servers, in the order of the dump.
    pub list: Vec<VirtualServer>,
    /// Real servers of none of them.
    pub orphans: Vec<Orphan>,
    /// Virtual servers by firewall mark, which kube-proxy never makes: their number.
    pub by_mark: u32,
}

impl Servers {
    /// Reads what `ipvsadm -Sn` prints.
    ///
    /// A virtual server that stands there twice is kept twice; its real servers belong to the
    /// first.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let mut servers = Self::default();
        let mut by_key: HashMap<ServerKey, usize> = HashMap::new();
        for (line, text) in numbered_lines(text)? {
            let error = |problem| ParseError::new(line, problem, text);
            let mut words = text.split_ascii_whitespace();
            match words.next() {
                Some("-A" | "--add-service") => match parse_virtual(words, line).map_err(error)? {
                    Some(server) => {
                        by_key.entry(server.key).or_insert(servers.list.len());
                        servers.list.push(server);
                    }
                    None => servers.by_mark += 1,
                },
                Some("-a" | "--add-server") => {
                    let Some(Orphan { key, real_server }) =
                        parse_real(words, line).map_err(error)?
                    else {
                        continue;
                    };
                    let server = by_key
                        .get(&key)
                        .and_then(|index| servers.list.get_mut(*index));
                    match server {
                        Some(server) => server.real_servers.push(real_server),
                        None => servers.orphans.push(Orphan { key, real_server }),
                    }
                }
                _ => return Err(error("a line begins with -A or -a")),
            }
        }
        Ok(servers)
    }
}

impl fmt::Display for Servers {
    /// The input of `ipvsadm -R`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for server in &self.list {
            writeln!(f, "{server}")?;
            for real_server in &server.real_servers {
                writeln!(f, "-a {} {real_server}", server.key)?;
            }
        }
        for Orphan { key, real_server } in &self.orphans {
            writeln!(f, "-a {key} {real_server}")?;
        }
        Ok(())
    }
}

/// The virtual server that an option names; `None` for a firewall mark, and for any other option.
enum Named {
    Key(ServerKey),
    Mark,
}

fn named<'a>(
    option: &str,
    words: &mut impl Iterator<Item = &'a str>,
) -> Result<Option<Named>, &'static str> {
    let protocol = match option {
        "-t" | "--tcp-service" => Protocol::Tcp,
        "-u" | "--udp-service" => Protocol::Udp,
        "--sctp-service" => Protocol::Sctp,
        "-f" | "--fwmark-service" => {
            number(words.next())?;
            return Ok(Some(Named::Mark));
        }
        _ => return Ok(None),
    };
    let socket = socket(words.next())?;
    Ok(Some(Named::Key(ServerKey { protocol, socket })))
}

fn socket(word: Option<&str>) -> Result<SocketAddr, &'static str> {
    word.and_then(|word| word.parse().ok())
        .ok_or("ADDRESS:PORT is missing or wrong (names need ipvsadm -Sn)")
}

fn number(word: Option<&str>) -> Result<u32, &'static str> {
    word.and_then(|word| word.parse().ok())
        .ok_or("an option's number is missing or wrong")
}

fn value(word: Option<&str>) -> Result<String, &'static str> {
    match word {
        Some(word) if !word.starts_with('-') => Ok(word.to_owned()),
        _ => Err("an option's value is missing"),
    }
}

fn parse_virtual<'a>(
    words: impl Iterator<Item = &'a str>,
    line: u32,
) -> Result<Option<VirtualServer>, &'static str> {
    let mut words = words.peekable();
    let mut key = None;
    let mut scheduler = None;
    let mut scheduler_flags = None;
    let mut persistence = None;
    let mut netmask = None;
    let mut others = Vec::new();
    while let Some(word) = words.next() {
        if let Some(server) = named(word, &mut words)? {
            key = Some(server);
            continue;
        }
        match word {
            "-s" | "--scheduler" => scheduler = Some(value(words.next())?),
            "-b" | "--sched-flags" => scheduler_flags = Some(value(words.next())?),
            "-M" | "--netmask" => netmask = Some(value(words.next())?),
            "-p" | "--persistent" => {
                let seconds = words.next_if(|word| !word.starts_with('-'));
                persistence = Some(match seconds {
                    Some(_) => number(seconds)?,
                    None => DEFAULT_PERSISTENCE,
                });
            }
            other => others.push(other.to_owned()),
        }
    }
    match key.ok_or("which virtual server is not said")? {
        Named::Mark => Ok(None),
        Named::Key(key) => Ok(Some(VirtualServer {
            key,
            scheduler: scheduler.ok_or("a virtual server needs a scheduler: -s")?,
            scheduler_flags,
            persistence,
            netmask,
            others,
            line,
            real_servers: Vec::new(),
        })),
    }
}

fn parse_real<'a>(
    mut words: impl Iterator<Item = &'a str>,
    line: u32,
) -> Result<Option<Orphan>, &'static str> {
    let mut key = None;
    let mut address = None;
    let mut forwarding = Forwarding::default();
    let mut weight = 1;
    let mut upper = 0;
    let mut lower = 0;
    let mut others = Vec::new();
    while let Some(word) = words.next() {
        if let Some(server) = named(word, &mut words)? {
            key = Some(server);
            continue;
        }
        match word {
            "-r" | "--real-server" => address = Some(socket(words.next())?),
            "-m" | "--masquerading" => forwarding = Forwarding::Masquerade,
            "-g" | "--gatewaying" => forwarding = Forwarding::Route,
            "-i" | "--ipip" => forwarding = Forwarding::Tunnel,
            "-w" | "--weight" => weight = number(words.next())?,
            "-x" | "--u-threshold" => upper = number(words.next())?,
            "-y" | "--l-threshold" => lower = number(words.next())?,
            other => others.push(other.to_owned()),
        }
    }
    let real_server = RealServer {
        socket: address.ok_or("which real server is not said: -r")?,
        forwarding,
        weight,
        upper,
        lower,
        others,
        line,
    };
    match key.ok_or("which virtual server is not said")? {
        Named::Mark => Ok(None),
        Named::Key(key) => Ok(Some(Orphan { key, real_server })),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rules::ipvs::tests::mutated;

    const REAL: &str = include_str!("../fixtures/kube-proxy-1.36.2/ipvs/ipvsadm.save");

    #[test]
    fn a_real_dump_is_read_and_written_back() {
        let servers = Servers::parse(REAL).expect("a real dump");
        assert_eq!(servers.to_string(), REAL);
        assert_eq!(servers.list.len(), 32);
        assert!(servers.orphans.is_empty());
        let sticky = servers
            .list
            .iter()
            .find(|server| server.persistence.is_some())
            .expect("shop/cart");
        assert_eq!(sticky.key.to_string(), "-t 10.96.10.4:9000");
        assert_eq!(sticky.persistence, Some(10800));
    }

    #[test]
    fn every_option_is_kept() {
        for text in [
            "-A -u [fd00::1]:53 -s mh -p 60 -M 64 -b mh-port,mh-fallback -o\n",
            "-A -t 10.0.0.1:80 -s wlc\n-a -t 10.0.0.1:80 -r 10.0.1.1:80 -i -w 0 -x 10 -y 5 --tun-type gue\n",
        ] {
            assert_eq!(Servers::parse(text).expect("valid").to_string(), text);
        }
        let text = "--add-service --tcp-service 10.0.0.1:80 --scheduler rr --persistent\n";
        let servers = Servers::parse(text).expect("valid");
        assert_eq!(servers.to_string(), "-A -t 10.0.0.1:80 -s rr -p 300\n");
        let text = "-A -f 7 -s rr\n-a -f 7 -r 10.0.0.1:0 -g -w 1\n";
        assert_eq!(Servers::parse(text).expect("valid").by_mark, 1);
    }

    #[test]
    fn what_is_no_dump_names_its_line() {
        for (text, line, problem) in [
            (
                "-A -t 10.0.0.1:80 -s rr\n-a -t 10.0.0.1:80 -r 10.0.1.1:8",
                2,
                "cut",
            ),
            ("-A -t 10.0.0.1:80 -s rr\n-X\n", 2, "begins with"),
            ("-A -t kubernetes:https -s rr\n", 1, "ADDRESS:PORT"),
            ("-A -t 10.0.0.1:70000 -s rr\n", 1, "ADDRESS:PORT"),
            ("-A -t 10.0.0.1:80\n", 1, "scheduler"),
            ("-A -s rr\n", 1, "which virtual server"),
            ("\n-a -t 10.0.0.1:80 -m\n", 2, "which real server"),
            ("-a -t 10.0.0.1:80 -r 10.0.0.2:80 -w -1\n", 1, "number"),
        ] {
            let error = Servers::parse(text).expect_err(text);
            assert_eq!(error.line, line, "{text}");
            assert!(error.to_string().contains(problem), "{error}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in mutated(REAL)) {
            if let Ok(servers) = Servers::parse(&text) {
                let again = Servers::parse(&servers.to_string()).expect("what was written");
                prop_assert_eq!(again.list.len(), servers.list.len());
            }
        }
    }
}
