//! Whose rules translated a packet, where rules of more than one mode name its Service.
//!
//! The tables of nat, of iptables and of nftables alike, are called from within one hook of the kernel
//! (`nf_nat_inet_fn`, `net/netfilter/nf_nat_core.c`): no boundary lies between them, and the first that binds the
//! connection has it. So it is known where only one mode's rules name the endpoint, where IPVS sent the packet on, and
//! where it is told in which table or chain nat bound the connection ([`Detail::Functions`]); else it is unknown.
//!
//! [`Detail::Functions`]: crate::probe::catalogue::Detail::Functions

use std::net::SocketAddr;

use serde::{Serialize, Serializer};

use super::directory::Known;
use super::journey::StageTime;
use super::met::{Meeting, What};
use crate::probe::catalogue::OUTPUT_BY_IPVS;
use crate::rules::Mode;

/// Whose rules translated a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translator {
    /// Those of this mode: no others name the Service.
    Only(&'static str),
    /// Those of this mode, of several that name the Service.
    OneOf(&'static str),
    /// Of several, nobody knows.
    Unknown,
    /// Those of one mode named the Service, and have changed since: those of another may have come.
    Outdated,
}

impl Translator {
    /// The mode.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Only(mode) | Self::OneOf(mode) => mode,
            Self::Unknown | Self::Outdated => "unknown",
        }
    }

    /// Who did, of a packet that was translated to this endpoint; `None`: no rules that were read name it.
    ///
    /// `sent` tells whether it was sent on by a device, `settled` whether the rules are as they were read.
    pub(super) fn of(
        known: &Known,
        endpoint: SocketAddr,
        (sent, settled): (bool, bool),
        stages: &[StageTime],
        met: &[Meeting],
    ) -> Option<Self> {
        if known.by_mode.is_empty() {
            let named = known.endpoints.contains(&endpoint);
            let by = if settled {
                Self::Only(known.mode)
            } else {
                Self::Outdated
            };
            return named.then_some(by);
        }
        let named = known
            .by_mode
            .iter()
            .filter(|(_, endpoints)| endpoints.contains(&endpoint));
        let mut modes: Vec<&'static str> = named.map(|(mode, _)| *mode).collect();
        if modes.is_empty() {
            return None;
        }
        if let Some(mode) = seen(stages, met) {
            return Some(Self::OneOf(mode));
        }
        // What IPVS sends on passes OUTPUT once more; what it hands to a socket of the node does not.
        if sent && !stages.is_empty() {
            modes.retain(|mode| *mode != Mode::Ipvs.name());
        }
        Some(match modes.as_slice() {
            [mode] if settled => Self::OneOf(mode),
            _ => Self::Unknown,
        })
    }
}

impl Serialize for Translator {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// Whom the packet itself tells of, whatever the rules say.
fn seen(stages: &[StageTime], met: &[Meeting]) -> Option<&'static str> {
    let by_ipvs = stages.iter().any(|stage| stage.hook == OUTPUT_BY_IPVS);
    let sent = |meeting: &Meeting| matches!(meeting.what, What::SentOn { .. });
    if by_ipvs || met.iter().any(sent) {
        return Some(Mode::Ipvs.name());
    }
    let binds = |meeting: &Meeting| matches!(meeting.what, What::DestinationNat { .. });
    let bound = met.iter().position(binds)?;
    let at = &met[bound];
    // What was called last before: nat asks no table more when one has bound the connection.
    let mut before = met[..bound].iter().rev();
    let table = before.find(|meeting| (meeting.hook, meeting.stage) == (at.hook, at.stage))?;
    let mode = match &table.what {
        What::Table { name, .. } if name == "nat" => Mode::IptablesLegacy,
        What::Chain { table, .. } if table == "nat" => Mode::IptablesNft,
        What::Chain { table, .. } if table == "kube-proxy" => Mode::Nftables,
        _ => return None,
    };
    Some(mode.name())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::trace::directory::tests::{known, socket};

    const BOTH: &str = "10.244.0.2:8080";
    const LEFT: &str = "10.244.0.9:8080";

    /// Named by iptables-legacy, whose rules are left over, and by this mode.
    fn mixed(with: &'static str) -> Known {
        let sets = [vec![BOTH, LEFT], vec![BOTH]];
        let sets = sets.map(|set| set.into_iter().map(socket).collect());
        Known {
            by_mode: ["iptables-legacy", with].into_iter().zip(sets).collect(),
            endpoints: [BOTH, LEFT].map(socket).into(),
            ..known()
        }
    }

    fn stage(hook: &'static str) -> StageTime {
        StageTime {
            hook,
            stage: "dnat",
            begin_ns: 0,
            took_ns: 1,
        }
    }

    fn of(known: &Known, to: &str, sent: bool, stages: &[StageTime], met: &[Meeting]) -> String {
        let translator = Translator::of(known, socket(to), (sent, true), stages, met);
        translator.map_or("-".to_owned(), |found| format!("{found:?}"))
    }

    #[test]
    fn of_one_mode_it_is_known() {
        let known = known();
        let only = r#"Only("nftables")"#;
        assert_eq!(of(&known, BOTH, true, &[], &[]), only);
        assert_eq!(of(&known, "10.9.9.9:1", true, &[], &[]), "-");
    }

    #[test]
    fn of_two_it_is_known_by_the_endpoint_or_not_at_all() {
        let known = mixed("nftables");
        let way = [stage("PREROUTING")];
        assert_eq!(of(&known, BOTH, true, &way, &[]), "Unknown");
        assert_eq!(
            of(&known, LEFT, true, &way, &[]),
            r#"OneOf("iptables-legacy")"#
        );
        assert_eq!(of(&known, "10.9.9.9:1", true, &way, &[]), "-");
        // While rules change, what was read of them proves nothing.
        let changing = Translator::of(&known, socket(LEFT), (true, false), &way, &[]);
        assert_eq!(changing, Some(Translator::Unknown));
        let mut only = mixed("nftables");
        only.by_mode.clear();
        let changing = Translator::of(&only, socket(BOTH), (true, false), &way, &[]);
        assert_eq!(changing, Some(Translator::Outdated));
    }

    #[test]
    fn what_ipvs_sends_on_passes_output_again() {
        let known = mixed("ipvs");
        let by_nat = [stage("PREROUTING"), stage("FORWARD")];
        let by_ipvs = [stage("PREROUTING"), stage(OUTPUT_BY_IPVS)];
        assert_eq!(of(&known, BOTH, true, &by_ipvs, &[]), r#"OneOf("ipvs")"#);
        let legacy = r#"OneOf("iptables-legacy")"#;
        assert_eq!(of(&known, BOTH, true, &by_nat, &[]), legacy);
        // Not what goes to a socket of the node; and what was not timed tells nothing.
        assert_eq!(of(&known, BOTH, false, &by_nat, &[]), "Unknown");
        assert_eq!(of(&known, BOTH, true, &[], &[]), "Unknown");
    }

    #[test]
    fn the_table_in_which_nat_binds_has_translated() {
        let known = mixed("nftables");
        let met = |hook, what| Meeting {
            hook,
            stage: "dnat",
            what,
        };
        let (verdict, name) = (Some("accept"), || "nat".to_owned());
        let table = || {
            met(
                "OUTPUT",
                What::Table {
                    name: name(),
                    verdict,
                },
            )
        };
        let chain = || {
            let table = "kube-proxy".to_owned();
            let name = "nat-output".to_owned();
            met(
                "OUTPUT",
                What::Chain {
                    table,
                    name,
                    verdict,
                },
            )
        };
        let bound = || met("OUTPUT", What::DestinationNat { verdict });
        let told = |met: &[Meeting]| of(&known, BOTH, true, &[], met);
        assert_eq!(told(&[table(), bound()]), r#"OneOf("iptables-legacy")"#);
        let both = [table(), chain(), bound()];
        assert_eq!(told(&both), r#"OneOf("nftables")"#);
        assert_eq!(told(&both[..2]), "Unknown");
        assert_eq!(told(&both[2..]), "Unknown");
    }

    #[test]
    fn it_is_written_as_a_word() {
        let words: BTreeMap<&str, Translator> = [
            ("nftables", Translator::Only("nftables")),
            ("ipvs", Translator::OneOf("ipvs")),
            ("unknown", Translator::Unknown),
        ]
        .into();
        for (word, translator) in words {
            let written = serde_json::to_value(translator).expect("JSON");
            assert_eq!(written, word);
        }
    }
}
