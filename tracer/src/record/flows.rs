//! What became of each flow: verdicts, ledgers, outages.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use tracer_ebpf::path::{Path, Target};

use super::evidence::Evidence;
use super::run::{Bin, Ledger, Loss, Outage, Verdict};

/// IP protocol number of TCP.
const TCP: u8 = 6;

/// A flow as its client saw it.
#[derive(Clone, Debug)]
pub struct Sent {
    /// How it entered the node.
    pub path: Path,
    /// IP protocol number.
    pub protocol: u8,
    /// The client's address and port.
    pub source: SocketAddr,
    /// What it asked for.
    pub destination: SocketAddr,
    /// When it was meant to start, ns from the start of the traffic.
    pub intended_ns: u64,
    /// What the client saw.
    pub seen: Seen,
}

/// What a client saw of its flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The right answer.
    Delivered,
    /// An answer from someone who is no endpoint of that Service.
    Misdelivered,
    /// `ECONNREFUSED`: an RST to the SYN, or an ICMP port unreachable.
    Refused,
    /// An RST after the flow was established.
    Reset,
    /// Nothing, within the client's patience.
    Silence,
    /// The client could not send: its error.
    Unsent(String),
    /// Another error that the network reported.
    Failed(String),
}

/// A verdict with its grounds; `None` for a flow that was delivered.
type Grounds = (Verdict, Option<String>, Option<String>);

/// Joins what the client saw with what the kernel said. What neither tells is not guessed: such a
/// flow is unanswered.
pub fn judge(flow: &Sent, evidence: &Evidence) -> Option<Grounds> {
    let key = (flow.protocol, flow.source);
    let drop = evidence.drop_for(&key);
    let (reason, stage) = drop.map_or((None, None), |drop| {
        (Some(drop.reason.clone()), Some(drop.stage.clone()))
    });
    let leaked = flow.destination_is_virtual() && evidence.left_for(&key) == Some(flow.destination);
    Some(match &flow.seen {
        Seen::Delivered => return None,
        Seen::Misdelivered => (Verdict::Misdelivered, None, None),
        Seen::Unsent(error) => (Verdict::Unsent, Some(error.clone()), None),
        Seen::Reset => (Verdict::Reset, reason, stage),
        Seen::Refused => {
            let by_rule = drop.is_some_and(|drop| drop.reason == "NETFILTER_DROP");
            if by_rule || flow.protocol != TCP {
                (Verdict::Rejected, reason, stage)
            } else {
                (Verdict::Reset, reason, stage)
            }
        }
        Seen::Failed(error) => (
            Verdict::Rejected,
            Some(reason.unwrap_or(error.clone())),
            stage,
        ),
        Seen::Silence if leaked => (Verdict::Leaked, None, None),
        Seen::Silence if drop.is_some() => (Verdict::Dropped, reason, stage),
        Seen::Silence => (Verdict::Unanswered, None, None),
    })
}

impl Sent {
    /// Is the destination an address that no machine has, so that leaving with it is a leak?
    fn destination_is_virtual(&self) -> bool {
        self.path.target == Target::ClusterIp
    }
}

/// Counts flows by verdict.
pub fn ledger<'a>(flows: impl IntoIterator<Item = &'a Sent>, evidence: &Evidence) -> Ledger {
    let mut ledger = Ledger::default();
    let mut lost: BTreeMap<Grounds, u64> = BTreeMap::new();
    for flow in flows {
        ledger.sent += 1;
        match judge(flow, evidence) {
            None => ledger.delivered += 1,
            Some(grounds) => *lost.entry(grounds).or_default() += 1,
        }
    }
    ledger.lost = lost
        .into_iter()
        .map(|((verdict, reason, stage), count)| Loss {
            verdict,
            reason,
            stage,
            count,
        })
        .collect();
    ledger
}

/// Every outage of one path: first failed new flow to the first good one after it.
pub fn outages(flows: &[Sent]) -> Vec<Outage> {
    let mut flows: Vec<&Sent> = flows.iter().collect();
    flows.sort_by_key(|flow| (flow.intended_ns, flow.source));
    let mut outages: Vec<Outage> = Vec::new();
    let mut open: Option<Outage> = None;
    for flow in flows {
        if flow.seen == Seen::Delivered {
            if let Some(mut outage) = open.take() {
                outage.end_ns = Some(flow.intended_ns);
                outages.push(outage);
            }
        } else {
            open.get_or_insert(Outage {
                start_ns: flow.intended_ns,
                end_ns: None,
                lost: 0,
            })
            .lost += 1;
        }
    }
    outages.extend(open);
    outages
}

/// New flows by the bin in which they were meant to start.
pub fn series(flows: &[Sent], duration_ns: u64, bin_ns: u64) -> Vec<Bin> {
    let bins = duration_ns.div_ceil(bin_ns.max(1));
    let mut series = vec![Bin::default(); usize::try_from(bins).unwrap_or(0)];
    for flow in flows {
        let at = usize::try_from(flow.intended_ns / bin_ns.max(1)).unwrap_or(usize::MAX);
        if let Some(bin) = series.get_mut(at) {
            bin.sent += 1;
            bin.lost += u64::from(flow.seen != Seen::Delivered);
        }
    }
    series
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracer_ebpf::record::{Aligned, HEADER, IPV4, Record, kind};

    fn flow(intended_ns: u64, seen: Seen) -> Sent {
        Sent {
            path: Path::SERVICE[0],
            protocol: TCP,
            source: "10.244.64.1:33000".parse().expect("address"),
            destination: "10.96.0.10:80".parse().expect("address"),
            intended_ns,
            seen,
        }
    }

    fn record(kind: u8, destination: [u8; 4], transmitted: u8) -> Record {
        let mut header = [0_u8; HEADER];
        header[0] = 0x45;
        header[9] = TCP;
        header[12..16].copy_from_slice(&[10, 244, 64, 1]);
        header[16..20].copy_from_slice(&destination);
        header[20..22].copy_from_slice(&33000_u16.to_be_bytes());
        header[22..24].copy_from_slice(&80_u16.to_be_bytes());
        header[32] = 0x50;
        let mut source = [0; 16];
        source[..4].copy_from_slice(&[10, 244, 64, 1]);
        Record {
            kind,
            family: IPV4,
            protocol: TCP,
            stage: 7,
            transmitted,
            reason: u32::MAX,
            sport: 33000_u16.to_be_bytes(),
            dport: 80_u16.to_be_bytes(),
            source: Aligned(source),
            header: Aligned(header),
            ..Record::ZERO
        }
    }

    #[test]
    fn silence_is_leaked_dropped_or_unanswered_as_the_kernel_says() {
        let silent = flow(0, Seen::Silence);
        let mut evidence = Evidence::new().expect("BTF");
        assert_eq!(
            judge(&silent, &evidence).map(|g| g.0),
            Some(Verdict::Unanswered)
        );
        // Translated and gone: still nobody knows where it ended.
        evidence.absorb(&[record(kind::FIRST, [10, 244, 0, 9], 1)]);
        assert_eq!(
            judge(&silent, &evidence).map(|g| g.0),
            Some(Verdict::Unanswered)
        );
        evidence.absorb(&[record(kind::FIRST, [10, 96, 0, 10], 1)]);
        assert_eq!(
            judge(&silent, &evidence).map(|g| g.0),
            Some(Verdict::Leaked)
        );

        let mut evidence = Evidence::new().expect("BTF");
        evidence.absorb(&[record(kind::DROP, [10, 96, 0, 10], 0)]);
        let (verdict, reason, stage) = judge(&silent, &evidence).expect("lost");
        assert_eq!(verdict, Verdict::Dropped);
        assert_eq!(reason.as_deref(), Some("reason 0xffffffff"));
        let (name, component) = catalogue_name(7);
        assert_eq!(stage, Some(format!("{name} {component}")));
    }

    use crate::probe::catalogue::Detail;

    fn catalogue_name(stage: u8) -> (&'static str, &'static str) {
        crate::probe::catalogue::stage_name(stage, Detail::Stages)
    }

    #[test]
    fn ledgers_balance_and_outages_end_with_the_next_good_flow() {
        let flows: Vec<Sent> = [
            Seen::Delivered,
            Seen::Silence,
            Seen::Refused,
            Seen::Delivered,
            Seen::Reset,
        ]
        .into_iter()
        .enumerate()
        .map(|(i, seen)| flow(i as u64 * 10, seen))
        .collect();
        let evidence = Evidence::new().expect("BTF");
        let ledger = ledger(&flows, &evidence);
        assert!(ledger.is_balanced());
        assert_eq!((ledger.sent, ledger.delivered), (5, 2));
        let outages = outages(&flows);
        assert_eq!(
            outages,
            vec![
                Outage {
                    start_ns: 10,
                    end_ns: Some(30),
                    lost: 2
                },
                Outage {
                    start_ns: 40,
                    end_ns: None,
                    lost: 1
                },
            ]
        );
        let series = series(&flows, 50, 20);
        assert_eq!(series.iter().map(|b| b.sent).sum::<u64>(), 5);
        assert_eq!(series.iter().map(|b| b.lost).sum::<u64>(), 3);
    }
}
