//! The connections that IPVS itself remembers, read from `/proc/net/ip_vs_conn`; nothing is changed.
//!
//! # Cost
//!
//! The kernel finds its place anew at each page that is read (`ip_vs_conn_seq_start`,
//! `net/netfilter/ipvs/ip_vs_conn.c`), so that a whole table of n connections costs n² steps. Only its beginning is
//! read: [`MOST`] bytes. What is added or removed meanwhile can hide others, so that a connection that was found is
//! there, and one that was not may be.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::netns::{Netns, NetnsError};

/// How much is read at most: some 13,000 connections.
pub const MOST: u64 = 1 << 20;

/// Why the connections cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionsError {
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The file.
    #[error("cannot read the connections of IPVS in namespace {namespace}: {source}")]
    Read {
        /// The namespace.
        namespace: String,
        /// What went wrong.
        source: std::io::Error,
    },
}

/// One connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Connection {
    /// IP protocol number.
    pub protocol: u8,
    /// Who asked.
    pub source: SocketAddr,
    /// What was asked for.
    pub destination: SocketAddr,
    /// The real server.
    pub server: SocketAddr,
}

/// The connections of a namespace that `wanted` picks, of those at the beginning of the table.
pub fn list(
    ns: &Netns,
    wanted: impl Fn(&Connection) -> bool,
) -> Result<HashSet<Connection>, ConnectionsError> {
    let read = || {
        // The file is the namespace's of the thread that opens it.
        let file = File::open("/proc/thread-self/net/ip_vs_conn")?;
        let mut found = HashSet::new();
        for line in BufReader::new(file.take(MOST)).lines() {
            found.extend(connection(&line?).filter(&wanted));
        }
        Ok(found)
    };
    ns.run(read)?.map_err(|source| ConnectionsError::Read {
        namespace: ns.name().to_owned(),
        source,
    })
}

/// A line of the file; `None` for its head, and for protocols without ports.
fn connection(line: &str) -> Option<Connection> {
    let mut words = line.split_ascii_whitespace();
    let protocol = match words.next()? {
        "TCP" => 6,
        "UDP" => 17,
        "SCTP" => 132,
        _ => return None,
    };
    let mut socket = || {
        let address = address(words.next()?)?;
        let port = u16::from_str_radix(words.next()?, 16).ok()?;
        Some(SocketAddr::new(address, port))
    };
    let connection = Connection {
        protocol,
        source: socket()?,
        destination: socket()?,
        server: socket()?,
    };
    // The last line that is read may be cut, as in its last port.
    words.next().map(|_state| connection)
}

/// `0A60000B`, or eight groups of four digits between colons.
fn address(word: &str) -> Option<IpAddr> {
    if word.contains(':') {
        return word.parse::<Ipv6Addr>().ok().map(IpAddr::V6);
    }
    let bits = u32::from_str_radix(word, 16).ok()?;
    (word.len() == 8).then(|| Ipv4Addr::from(bits).into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(line: &str) -> Option<String> {
        let found = connection(line)?;
        Some(format!(
            "{} {} {} {}",
            found.protocol, found.source, found.destination, found.server
        ))
    }

    /// Lines as kernel 6.12 prints them.
    #[test]
    fn lines_are_read() {
        let head =
            "Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData";
        assert_eq!(read(head), None);
        let v4 = "UDP 0A60000B B0D2 0A60000B 0050 0AF41002 1F90 UDP             294";
        insta::assert_snapshot!(read(v4).expect("one"), @"17 10.96.0.11:45266 10.96.0.11:80 10.244.16.2:8080");
        let v6 = "TCP fd00:0010:0244:0040:0000:0000:0000:0007 D4D2 fd00:0010:0096:0000:0000:0000:0000:000a 0050 \
                  fd00:0010:0244:0000:0000:0000:0000:0002 1F90 ESTABLISHED     899";
        insta::assert_snapshot!(read(v6).expect("one"), @"6 [fd00:10:244:40::7]:54482 [fd00:10:96::a]:80 [fd00:10:244::2]:8080");
        for damaged in ["UDP", "UDP 0A60000B", "TCP 0A6 1 0A60000B 2 0A60000B 3", ""] {
            assert_eq!(read(damaged), None, "{damaged}");
        }
        let state = v4.find("UDP   ").expect("the state");
        for length in 0..=state {
            assert_eq!(read(&v4[..length]), None);
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(line in "[A-Z]{0,4}[ 0-9A-F:]{0,60}", text in "\\PC*") {
            let _ = (connection(&line), connection(&text));
        }
    }
}
