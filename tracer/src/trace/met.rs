//! What a first packet met in the kernel's functions: see [`Detail::Functions`].

use std::fmt;
use std::net::SocketAddr;

use serde::Serialize;
use tracer_ebpf::record::{Met, met, method};

use crate::probe::catalogue::{self, Detail};
use crate::record::evidence::address;

/// A function that a packet met, and the stage in which it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Meeting {
    /// `PREROUTING`, ...
    pub hook: &'static str,
    /// `raw`, `conntrack`, `dnat`, ...
    pub stage: &'static str,
    /// What it met.
    #[serde(flatten)]
    pub what: What,
}

/// What a packet met. Names are cut to what the probes have room for: 31 bytes, tables of `nf_tables` to 15.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "met")]
pub enum What {
    /// It went through a table of iptables-legacy.
    Table {
        /// `nat`, ...
        name: String,
        /// `accept`, `drop`, ...; `None` if the table did not let go of the packet.
        verdict: Option<&'static str>,
    },
    /// It went through a base chain of `nf_tables`, and all that it jumps to.
    Chain {
        /// The table's name.
        table: String,
        /// The chain's.
        name: String,
        /// As above.
        verdict: Option<&'static str>,
    },
    /// nat bound the connection's source.
    SourceNat {
        /// `accept`, or `drop` if no tuple was free.
        verdict: Option<&'static str>,
    },
    /// nat bound the connection's destination.
    DestinationNat {
        /// As above.
        verdict: Option<&'static str>,
    },
    /// The connection's entry was to go into conntrack's table.
    Confirmation {
        /// `accept`, or `drop` if it clashed with another: `insert_failed` of `conntrack -S`.
        verdict: Option<&'static str>,
    },
    /// IPVS asked its scheduler.
    Scheduled {
        /// `rr`, ...; empty if there was no real server.
        scheduler: String,
        /// The real server that was chosen.
        real_server: Option<SocketAddr>,
    },
    /// IPVS sent it on.
    SentOn {
        /// To which real server.
        real_server: SocketAddr,
        /// `nat`, `direct routing`, `tunnel`, `local`, `bypass`.
        how: &'static str,
    },
    /// IPVS gave up an old connection of the same addresses and ports (`conn_reuse_mode`).
    Expired {
        /// The real server of the old connection.
        real_server: SocketAddr,
    },
}

impl Meeting {
    /// Reads what the probes told of a packet of this family; `None` for what is unknown.
    pub fn of(told: &Met, family: u8) -> Option<Self> {
        let (hook, stage) = catalogue::stage_name(told.stage, Detail::Functions);
        let name = || text(&told.name.0);
        let verdict = verdict(told.result);
        let real_server =
            SocketAddr::new(address(family, told.owner.0), u16::from_be_bytes(told.port));
        let what = match told.what {
            met::TABLE => What::Table {
                name: name(),
                verdict,
            },
            met::CHAIN => What::Chain {
                table: text(&told.owner.0),
                name: name(),
                verdict,
            },
            met::SOURCE_NAT => What::SourceNat { verdict },
            met::DESTINATION_NAT => What::DestinationNat { verdict },
            met::CONFIRM => What::Confirmation { verdict },
            met::SCHEDULE => What::Scheduled {
                scheduler: name(),
                real_server: (told.result != 0).then_some(real_server),
            },
            met::SEND => What::SentOn {
                real_server,
                how: how(told.result)?,
            },
            met::EXPIRE => What::Expired { real_server },
            _ => return None,
        };
        Some(Self { hook, stage, what })
    }

    /// Who dropped the packet, if it met nothing else before it was dropped.
    pub fn dropper(&self) -> Option<String> {
        let dropped = |verdict: Option<&str>| verdict == Some(DROP);
        // nf_tables drops a packet before its chain returns (NF_DROP_REASON).
        let dropped_within = |verdict: Option<&str>| verdict.is_none() || dropped(verdict);
        match &self.what {
            What::Table { name, verdict } if dropped_within(*verdict) => {
                Some(format!("table {name}"))
            }
            What::Chain {
                table,
                name,
                verdict,
            } if dropped_within(*verdict) => Some(format!("chain {table} {name}")),
            What::SourceNat { verdict } | What::DestinationNat { verdict } if dropped(*verdict) => {
                Some("nat, which found no free tuple".to_owned())
            }
            What::Confirmation { verdict } if dropped(*verdict) => {
                Some("conntrack, whose entry clashed with another".to_owned())
            }
            What::Expired { .. } => Some("IPVS, which gave up an old connection first".to_owned()),
            What::Scheduled {
                real_server: None, ..
            } => Some("IPVS, which had no real server".to_owned()),
            _ => None,
        }
    }
}

impl fmt::Display for Meeting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ended = |verdict: Option<&'static str>| verdict.unwrap_or("it did not return");
        match &self.what {
            What::Table { name, verdict } => write!(f, "table {name}: {}", ended(*verdict)),
            What::Chain {
                table,
                name,
                verdict,
            } => write!(f, "chain {table} {name}: {}", ended(*verdict)),
            What::SourceNat { verdict } => write!(f, "nat binds the source: {}", ended(*verdict)),
            What::DestinationNat { verdict } => {
                write!(f, "nat binds the destination: {}", ended(*verdict))
            }
            What::Confirmation {
                verdict: Some(DROP),
            } => f.write_str("entry not confirmed: it clashes with another (insert_failed)"),
            What::Confirmation { verdict } => write!(f, "entry confirmed: {}", ended(*verdict)),
            What::Scheduled {
                scheduler,
                real_server: Some(real_server),
            } => write!(f, "IPVS {scheduler} chooses {real_server}"),
            What::Scheduled { .. } => f.write_str("IPVS has no real server for it"),
            What::SentOn { real_server, how } => write!(f, "IPVS sends to {real_server} ({how})"),
            What::Expired { real_server } => write!(
                f,
                "IPVS gives up the old connection of this port to {real_server}"
            ),
        }
    }
}

const DROP: &str = "drop";

/// Verdicts by number (include/uapi/linux/netfilter.h).
fn verdict(result: i32) -> Option<&'static str> {
    Some(match result {
        0 => DROP,
        1 => "accept",
        2 => "stolen",
        3 => "queue",
        4 => "repeat",
        5 => "stop",
        _ => return None,
    })
}

const fn how(number: i32) -> Option<&'static str> {
    Some(match number {
        method::NAT => "nat",
        method::ROUTE => "direct routing",
        method::TUNNEL => "tunnel",
        method::LOCAL => "local",
        method::BYPASS => "bypass",
        _ => return None,
    })
}

/// A text that ends in zero.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}

#[cfg(test)]
mod tests {
    use tracer_ebpf::record::{Aligned, IPV4};

    use super::*;

    fn met(what: u8, result: i32) -> Met {
        let mut owner = [0; 16];
        owner[..4].copy_from_slice(&[10, 244, 0, 12]);
        let mut name = [0; 32];
        name[..2].copy_from_slice(b"rr");
        Met {
            what,
            stage: 4,
            port: 8080_u16.to_be_bytes(),
            result,
            owner: Aligned(owner),
            name: Aligned(name),
        }
    }

    fn told(what: u8, result: i32) -> String {
        Meeting::of(&met(what, result), IPV4)
            .map_or_else(|| "nothing".to_owned(), |m| m.to_string())
    }

    #[test]
    fn what_was_met_is_a_line() {
        let lines = [
            told(met::TABLE, 1),
            told(met::TABLE, -1),
            told(met::DESTINATION_NAT, 1),
            told(met::CONFIRM, 0),
            told(met::SCHEDULE, 1),
            told(met::SCHEDULE, 0),
            told(met::SEND, method::NAT),
            told(met::EXPIRE, -1),
        ];
        insta::assert_snapshot!(lines.join("\n"), @r"
        table rr: accept
        table rr: it did not return
        nat binds the destination: accept
        entry not confirmed: it clashes with another (insert_failed)
        IPVS rr chooses 10.244.0.12:8080
        IPVS has no real server for it
        IPVS sends to 10.244.0.12:8080 (nat)
        IPVS gives up the old connection of this port to 10.244.0.12:8080
        ");
        assert_eq!(told(met::SEND, 77), "nothing");
        assert_eq!(told(0, 0), "nothing");
    }

    #[test]
    fn a_drop_has_its_dropper() {
        let dropper = |what, result| {
            Meeting::of(&met(what, result), IPV4)
                .expect("known")
                .dropper()
        };
        assert_eq!(dropper(met::TABLE, 0).as_deref(), Some("table rr"));
        assert_eq!(dropper(met::TABLE, 1), None);
        assert!(dropper(met::CONFIRM, 0).is_some());
    }

    #[test]
    fn a_name_without_an_end_is_cut() {
        assert_eq!(text(b"abc"), "abc");
        assert_eq!(text(b"\0bc"), "");
        assert_eq!(text(b"a\xff\0"), "a\u{fffd}");
    }
}
