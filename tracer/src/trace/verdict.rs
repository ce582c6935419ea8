//! What became of a flow to a Service.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::journey::{advice_of_drop, write_drop};

/// What became of a flow.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case", tag = "verdict")]
pub enum Verdict {
    /// An endpoint of the Service answered.
    Delivered,
    /// Somebody said with an ICMP error that it does not want it.
    Rejected {
        /// Who.
        by: Who,
        /// What the error says: `port unreachable`.
        how: String,
    },
    /// The kernel dropped its first packet.
    Dropped {
        /// The kernel's drop reason, without its prefix: `NETFILTER_DROP`.
        reason: String,
        /// `HOOK stage`.
        stage: String,
        /// The table or chain that did: see [`End::Dropped`](super::journey::End::Dropped).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
    },
    /// It was answered, and the kernel dropped the answer on this node.
    AnswerDropped {
        /// The kernel's drop reason, without its prefix: `NETFILTER_DROP`.
        reason: String,
        /// `HOOK stage`.
        stage: String,
        /// The table or chain that did: see [`End::Dropped`](super::journey::End::Dropped).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
    },
    /// It left the node with the Service's virtual address.
    Leaked,
    /// Somebody answered who is no endpoint of the Service.
    Misdelivered {
        /// Who.
        by: SocketAddr,
    },
    /// Conntrack or IPVS remembers it, and sends it to an endpoint that the rules no longer name.
    Stuck {
        /// The endpoint that was.
        endpoint: SocketAddr,
    },
    /// This node kept it, to whichever socket or refusal, because IPVS mode has its address bound on kube-ipvs0
    /// for a Service; no Service has the port, and another machine may have the address.
    Hijacked {
        /// The network in which the address lies, and the node's link to it: `192.0.2.0/24 of eth0`.
        network: String,
    },
    /// The same, of an address that lies in no network of the node's links.
    Absorbed,
    /// It was refused by a TCP RST or an SCTP ABORT.
    Reset {
        /// By whom.
        by: Who,
    },
    /// It was sent on, and nobody answered.
    Unanswered {
        /// Where it was sent, if that is no endpoint of the Service.
        stray: Option<SocketAddr>,
    },
    /// The session ended before anybody could say.
    Undecided,
    /// Its headers could not be read, or not what the rules said then.
    Unknown,
}

/// Somebody who ended a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Who {
    /// Who had begun it.
    Client,
    /// An endpoint.
    Endpoint(SocketAddr),
    /// The node itself: a rule, or its own stack.
    Node,
    /// Somebody beyond the node, by the address that it speaks from: a router, a firewall, the endpoint's own
    /// node.
    Beyond(IpAddr),
}

impl std::fmt::Display for Who {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Client => f.write_str("its client"),
            Self::Endpoint(address) => write!(f, "{address}"),
            Self::Node => f.write_str("this node"),
            Self::Beyond(address) => write!(f, "{address}, beyond this node"),
        }
    }
}

impl Verdict {
    /// Did it go as it should?
    pub const fn is_good(&self) -> bool {
        matches!(self, Self::Delivered)
    }

    /// Does it tell how its Service does? What goes to another port of the Service's address does not.
    pub const fn is_of_service(&self) -> bool {
        !matches!(self, Self::Hijacked { .. } | Self::Absorbed)
    }

    /// Is it known to have gone wrong?
    pub const fn is_bad(&self) -> bool {
        !self.is_good() && self.is_known()
    }

    /// One word for it, as [`Serialize`] writes it too.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Rejected { .. } => "rejected",
            Self::Dropped { .. } => "dropped",
            Self::AnswerDropped { .. } => "answer-dropped",
            Self::Leaked => "leaked",
            Self::Misdelivered { .. } => "misdelivered",
            Self::Stuck { .. } => "stuck",
            Self::Hijacked { .. } => "hijacked",
            Self::Absorbed => "absorbed",
            Self::Reset { .. } => "reset",
            Self::Unanswered { .. } => "unanswered",
            Self::Undecided => "undecided",
            Self::Unknown => "unknown",
        }
    }

    /// Is it known what became of it?
    pub const fn is_known(&self) -> bool {
        !matches!(self, Self::Undecided | Self::Unknown)
    }

    /// What to look at.
    pub fn advice(&self) -> Option<&'static str> {
        Some(match self {
            Self::Delivered | Self::Undecided => return None,
            Self::Rejected { by: Who::Node, how } => refusal_of_node(how),
            Self::Rejected {
                by: Who::Beyond(_), ..
            } => "a router, a firewall or the endpoint's node refuses it: look there",
            Self::Rejected { .. } => {
                "the packet arrived, but nobody listens on that port of the endpoint, or a rule of its own rejects"
            }
            Self::Dropped { stage, .. } => advice_of_drop(stage),
            Self::AnswerDropped { .. } => {
                "the endpoint answered, and this node dropped the answer on its way back to the client: look for a \
                 policy or a rule that matches the endpoint as source (nft list ruleset, iptables-save)"
            }
            Self::Leaked => {
                "the rules for this address are missing, or do not serve this client (source ranges): compare them with \
                 the cluster (svcpath rules check --live) and see who changed them last; or a rule of somebody else \
                 keeps conntrack from tracking it (NOTRACK)"
            }
            Self::Misdelivered { .. } => {
                "a rule of somebody else translates first, or, if the Service's own address answered, none did and a \
                 socket of this node took it (a hostPort, an address on kube-ipvs0, who holds the NodePort open): \
                 compare the rules with the cluster (svcpath rules check --live)"
            }
            Self::Stuck { .. } => {
                "delete the entry (conntrack -D --orig-dst ADDRESS --reply-src ENDPOINT; what IPVS remembers, in ipvsadm \
                 -Lnc, goes with its real server: ipvsadm -d): kube-proxy deletes those of UDP, and until then every \
                 packet of this flow keeps it alive"
            }
            Self::Hijacked { .. } => {
                "every node in IPVS mode binds a Service's externalIPs and load balancer addresses on kube-ipvs0, \
                 and keeps what is sent there, on any port: if a machine of that network has the address, take it \
                 out of the Service (kubectl get services -A -o wide); if it is announced for the Service alone, \
                 nobody is robbed, and no Service has this port"
            }
            Self::Absorbed => {
                "no Service has this port; the address is bound on kube-ipvs0, so that packets end here, whoever \
                 else has it: see whose it is before believing what answered"
            }
            Self::Reset { by: Who::Client } => "the client gave up before it was answered",
            Self::Reset {
                by: Who::Endpoint(_),
            } => {
                "the packet arrived, but nobody listens on that port of the endpoint, or a rule of its own resets"
            }
            Self::Reset { .. } => {
                "the node's own stack answered: the packet was not translated, or a rule rejects"
            }
            Self::Unanswered { stray: None } => {
                "the endpoint is dead, unreachable, filtered on its side, or answers by another way; UDP may \
                 need no answer"
            }
            Self::Unanswered { stray: Some(_) } => {
                "a rule of somebody else translates first, or a packet was sent where the rules no longer point"
            }
            Self::Unknown => {
                "fragments and packets with long extension headers are not read, and not known is what rules said \
             between two readings if they were changed twice"
            }
        })
    }
}

/// Why a node sends an error of this kind by itself: kube-proxy's rules reject with `port unreachable` alone
/// (iptables' default, and nftables' `reject`).
fn refusal_of_node(how: &str) -> &'static str {
    match how {
        "host unreachable" | "address unreachable" => {
            "nobody on the node's link has the endpoint's address: its machine is gone or does not answer (ip neigh), \
             unless a rule rejects it that way"
        }
        "net unreachable" | "no route" => {
            "the node has no route to where the packet was to go (ip route get ADDRESS): to the endpoint, or to the \
             Service's own address if that was not translated"
        }
        "time exceeded" => {
            "the packet passed too many routers: look for a loop (ip route get ADDRESS)"
        }
        _ => {
            "the node's own rules refuse it: the Service has no endpoints that may serve this path, or a policy \
             rejects (svcpath rules walk shows the rule)"
        }
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Delivered => f.write_str("delivered"),
            Self::Rejected { by, how } => write!(f, "rejected by {by} ({how})"),
            Self::Dropped { reason, stage, by } => write_drop(f, reason, stage, by.as_deref()),
            Self::AnswerDropped { reason, stage, by } => {
                f.write_str("its answer ")?;
                write_drop(f, reason, stage, by.as_deref())
            }
            Self::Leaked => f.write_str("leaked"),
            Self::Misdelivered { by } => write!(f, "misdelivered: answered by {by}"),
            Self::Stuck { endpoint } => write!(f, "stuck on the dead endpoint {endpoint}"),
            Self::Hijacked { network } => {
                write!(f, "hijacked by this node (an address in {network})")
            }
            Self::Absorbed => f.write_str("absorbed by this node"),
            Self::Reset { by } => write!(f, "reset by {by}"),
            Self::Unanswered { stray: None } => f.write_str("unanswered"),
            Self::Unanswered { stray: Some(to) } => write!(f, "unanswered, sent to {to}"),
            Self::Undecided => f.write_str("undecided"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

/// What an ICMP error says (RFC 792, RFC 1812 section 5.2.7, RFC 4443).
pub fn icmp_error(ipv4: bool, kind: u8, code: u8) -> &'static str {
    match (ipv4, kind, code) {
        (true, 3, 0) => "net unreachable",
        (true, 3, 1) => "host unreachable",
        (true, 3, 2) => "protocol unreachable",
        (true, 3, 3) | (false, 1, 4) => "port unreachable",
        (true, 3, 4) | (false, 2, _) => "packet too big",
        (true, 3, 9 | 10 | 13) | (false, 1, 1) => "administratively prohibited",
        (false, 1, 0) => "no route",
        (false, 1, 3) => "address unreachable",
        (true, 11, _) | (false, 3, _) => "time exceeded",
        (true, 12, _) | (false, 4, _) => "parameter problem",
        _ => "unreachable",
    }
}

/// Does an ICMP error end its flow? One that asks for smaller packets does not.
pub const fn ends_flow(ipv4: bool, kind: u8, code: u8) -> bool {
    !matches!((ipv4, kind, code), (true, 3, 4) | (false, 2, _))
}
