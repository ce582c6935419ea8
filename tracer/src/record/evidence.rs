//! What the kernel said of each flow: first packets that left, packets that were dropped.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tracer_ebpf::record::{IPV4, Record, kind, state};

use super::headers::dissect;
use crate::kernel::btf::{Btf, BtfError};
use crate::probe::catalogue::{self, Detail};

/// A flow as its sender knows it: protocol number and source.
pub type FlowKey = (u8, SocketAddr);

/// How a packet's way over the node ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drop {
    /// The kernel's drop reason, without its prefix: `NETFILTER_DROP`.
    pub reason: String,
    /// `HOOK stage`.
    pub stage: String,
}

/// What became of a packet that was freed at its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freed {
    /// The socket's queue had taken it, and went: nobody dropped it.
    WithSocket,
    /// That or a drop: the kernel gives no reason.
    Unknown,
    /// The kernel dropped it.
    Dropped,
}

/// What is freed with the queue that it is in (`enum skb_drop_reason`, include/net/dropreason-core.h).
const PURGE: &str = "SKB_DROP_REASON_QUEUE_PURGE";
/// What is freed without a reason.
const NOT_SPECIFIED: &str = "SKB_DROP_REASON_NOT_SPECIFIED";

/// The running kernel's names of drop reasons.
#[derive(Clone, Debug)]
pub struct Reasons {
    names: BTreeMap<u32, String>,
    detail: Detail,
}

impl Reasons {
    /// From the running kernel's BTF; `detail` is how finely packets are followed.
    pub fn of_this_kernel(detail: Detail) -> Result<Self, BtfError> {
        Ok(Self {
            names: Btf::vmlinux()?.enum_names("skb_drop_reason")?,
            detail,
        })
    }

    /// What became of a packet that was freed at its socket, after it had been delivered.
    pub fn freed_at_socket(&self, record: &Record) -> Freed {
        let name = |reason| self.names.get(&reason).map(String::as_str);
        let first = matches!(record.state, state::NEW | state::UNTRACKED);
        match name(record.reason) {
            Some(PURGE) => Freed::WithSocket,
            // Kernels before 6.6 give no reason for it, and none for some drops either.
            Some(NOT_SPECIFIED) if !first && !self.names.values().any(|name| name == PURGE) => {
                Freed::Unknown
            }
            _ => Freed::Dropped,
        }
    }

    /// How and where the packet of a [`kind::DROP`] record was dropped.
    pub fn drop_of(&self, record: &Record) -> Drop {
        let reason = self.names.get(&record.reason).map_or_else(
            || format!("reason {:#x}", record.reason),
            |name| {
                name.trim_start_matches("SKB_DROP_REASON_")
                    .trim_start_matches("SKB_")
                    .to_owned()
            },
        );
        let (hook, stage) = catalogue::stage_name(record.stage, self.detail);
        Drop {
            reason,
            stage: format!("{hook} {stage}"),
        }
    }
}

/// Everything the ring buffer told, by flow.
#[derive(Debug)]
pub struct Evidence {
    reasons: Reasons,
    left: HashMap<FlowKey, SocketAddr>,
    drops: HashMap<FlowKey, Drop>,
    /// First packets seen.
    pub first_packets: u64,
    /// Drops seen.
    pub dropped_packets: u64,
    /// Records whose captured header could not be read.
    pub unreadable: u64,
}

impl Evidence {
    /// Nothing yet; drop reasons get their names from the running kernel's BTF.
    pub fn new() -> Result<Self, BtfError> {
        Ok(Self {
            reasons: Reasons::of_this_kernel(Detail::Stages)?,
            left: HashMap::new(),
            drops: HashMap::new(),
            first_packets: 0,
            dropped_packets: 0,
            unreadable: 0,
        })
    }

    /// Takes in what the ring buffer held.
    pub fn absorb(&mut self, records: &[Record]) {
        for record in records {
            let key = (record.protocol, source_of(record));
            match record.kind {
                kind::FIRST => {
                    self.first_packets += 1;
                    if record.transmitted == 0 {
                        continue;
                    }
                    let headers = dissect(&record.header.0);
                    match headers.and_then(|h| Some(SocketAddr::new(h.dst, h.dport?))) {
                        Some(destination) => {
                            self.left.insert(key, destination);
                        }
                        None => self.unreadable += 1,
                    }
                }
                kind::DROP => {
                    self.dropped_packets += 1;
                    self.drops.insert(key, self.reasons.drop_of(record));
                }
                // Clients tell what was answered.
                kind::ANSWER | kind::RESET | kind::ERROR => {}
                _ => self.unreadable += 1,
            }
        }
    }

    /// Where the flow's first packet was headed when it left the node, if it did.
    pub fn left_for(&self, flow: &FlowKey) -> Option<SocketAddr> {
        self.left.get(flow).copied()
    }

    /// The last of the flow's packets that the kernel dropped.
    pub fn drop_for(&self, flow: &FlowKey) -> Option<&Drop> {
        self.drops.get(flow)
    }
}

/// Where the packet came from at its first boundary.
pub fn source_of(record: &Record) -> SocketAddr {
    SocketAddr::new(
        address(record.family, record.source.0),
        u16::from_be_bytes(record.sport),
    )
}

/// What the packet asked for at its first boundary.
pub fn destination_of(record: &Record) -> SocketAddr {
    SocketAddr::new(
        address(record.family, record.destination.0),
        u16::from_be_bytes(record.dport),
    )
}

/// The address in a record's sixteen bytes.
pub(crate) fn address(family: u8, bytes: [u8; 16]) -> IpAddr {
    if family == IPV4 {
        IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]))
    } else {
        IpAddr::V6(Ipv6Addr::from(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only where the kernel knows the reason does it tell what went with its socket from what was dropped.
    #[test]
    fn what_went_with_its_socket_is_told_by_the_kernels_reason() {
        let reasons = |names: &[&str]| Reasons {
            names: (0..)
                .zip(names.iter().map(|name| (*name).to_owned()))
                .collect(),
            detail: Detail::Stages,
        };
        let freed = |reasons: &Reasons, reason, state| {
            reasons.freed_at_socket(&Record {
                reason,
                state,
                ..Record::ZERO
            })
        };
        let new = reasons(&["SKB_DROP_REASON_NO_SOCKET", NOT_SPECIFIED, PURGE]);
        let told = [0, 1, 2].map(|reason| freed(&new, reason, state::ESTABLISHED));
        assert_eq!(told, [Freed::Dropped, Freed::Dropped, Freed::WithSocket]);
        let old = reasons(&["SKB_DROP_REASON_NO_SOCKET", NOT_SPECIFIED]);
        let told = [0, 1].map(|reason| freed(&old, reason, state::ESTABLISHED));
        assert_eq!(told, [Freed::Dropped, Freed::Unknown]);
        assert_eq!(freed(&old, 1, state::NEW), Freed::Dropped);
    }
}
