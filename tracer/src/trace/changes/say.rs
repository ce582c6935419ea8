//! Rule changes in words.

use std::fmt;

use super::{AddressDelta, Delta, Listening, RuleChange, ServerDelta, SetDelta, What};
use crate::report::units::{count, list, plural, time_u64};

/// Names of sets, servers and addresses that are told; the rest is counted.
const NAMES: usize = 3;

impl fmt::Display for RuleChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.by)?;
        let took = self.took_ns().map(|ns| format!(" in {}", time_u64(ns)));
        let took = took.unwrap_or_default();
        let failed = self.is_refused();
        if failed {
            write!(f, "could not {}", self.what.wish())?;
        } else {
            self.what.write(f, &took)?;
        }
        if !self.refused.is_empty() {
            let reasons = self.refused.iter();
            let reasons: Vec<String> = reasons
                .map(|(reason, times)| match times {
                    1 => reason.clone(),
                    times => format!("{reason}, {} times", count(*times)),
                })
                .collect();
            let but = if failed { "" } else { "; refused" };
            write!(f, "{but}: {}", list(&reasons))?;
        }
        if self.incomplete {
            f.write_str("; and what could not be seen: too much was changed at once")?;
        }
        Ok(())
    }
}

impl What {
    /// Was nothing done, if the requests were refused?
    pub(super) fn is_nothing(&self) -> bool {
        match self {
            Self::Nftables { generation, .. } => generation.is_none(),
            Self::IptablesLegacy { .. } => true,
            Self::Ipset { sets } => sets.is_empty(),
            Self::Ipvs(delta) => *delta == ServerDelta::default(),
            Self::Addresses { links } => links.is_empty(),
        }
    }

    /// What was to be done.
    fn wish(&self) -> String {
        match self {
            Self::Nftables { .. } => "commit a transaction of nf_tables".to_owned(),
            Self::IptablesLegacy {
                family,
                table,
                before,
                after,
            } => format!(
                "commit {} ({})",
                legacy_name(family, table),
                entries(*before, *after)
            ),
            Self::Ipset { .. } => "change ipsets".to_owned(),
            Self::Ipvs(_) => "change IPVS".to_owned(),
            Self::Addresses { .. } => "change addresses".to_owned(),
        }
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, took: &str) -> fmt::Result {
        match self {
            Self::Nftables { generation, tables } => {
                match generation {
                    Some(generation) => write!(f, "committed generation {generation}{took}")?,
                    None => write!(f, "committed a generation of nf_tables{took}")?,
                }
                let tables: Vec<String> = tables
                    .iter()
                    .map(|(table, delta)| format!("{table} {delta}"))
                    .collect();
                write_all(f, ": ", &tables)
            }
            Self::IptablesLegacy {
                family,
                table,
                before,
                after,
            } => {
                let (table, entries) = (legacy_name(family, table), entries(*before, *after));
                if before == after {
                    // It is always written as a whole. What the entries are is not compared.
                    write!(f, "rewrote {table}{took}: {entries}")
                } else {
                    write!(f, "committed {table}: {entries}{took}")
                }
            }
            Self::Ipset { sets } => {
                let proven = sets.values().any(SetDelta::is_proven);
                let verb = if proven {
                    "changed"
                } else {
                    "may have changed"
                };
                let number = plural(sets.len() as u64, "ipset", "ipsets");
                write!(f, "{verb} {number}{took}")?;
                let sets: Vec<String> = sets
                    .iter()
                    .map(|(set, delta)| format!("{set} {delta}"))
                    .collect();
                write_all(f, ": ", &sets)
            }
            Self::Ipvs(delta) => write!(f, "changed IPVS{took}: {delta}"),
            Self::Addresses { links } => {
                write!(f, "changed addresses{took}")?;
                let links: Vec<String> = links
                    .iter()
                    .map(|(link, delta)| format!("{link} {delta}"))
                    .collect();
                write_all(f, ": ", &links)
            }
        }
    }
}

impl fmt::Display for Listening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.probes, &self.refused) {
            (Some(probes), _) => write!(f, "at {probes}"),
            (None, refused) => {
                write!(
                    f,
                    "from the kernel's announcements alone: changes of iptables-legacy, ipset and IPVS \
                     are not seen, nor who changes addresses, nor how long others take"
                )?;
                match refused {
                    Some(refused) => write!(f, " ({refused})"),
                    None => Ok(()),
                }
            }
        }
    }
}

/// `5 → 16,005 entries`, `8 entries, as many as before`.
fn entries(before: u32, after: u32) -> String {
    let after_words = count(after.into());
    if before == after {
        return format!("{after_words} entries, as many as before");
    }
    format!("{} → {after_words} entries", count(before.into()))
}

/// `nat`, `IPv6 nat`.
fn legacy_name(family: &str, table: &str) -> String {
    if family == "IPv4" {
        table.to_owned()
    } else {
        format!("{family} {table}")
    }
}

fn write_all(f: &mut fmt::Formatter<'_>, begin: &str, items: &[String]) -> fmt::Result {
    let mut separator = begin;
    for item in items.iter().take(2 * NAMES) {
        write!(f, "{separator}{item}")?;
        separator = ", ";
    }
    match items.len().checked_sub(2 * NAMES) {
        None | Some(0) => Ok(()),
        Some(more) => write!(f, " and {} more", count(more as u64)),
    }
}

/// `+3 rules -2 rules`: what is not zero.
fn write_counts(f: &mut fmt::Formatter<'_>, counts: &[(&str, u64, &str)]) -> fmt::Result {
    let mut separator = "";
    for (sign, number, what) in counts {
        if *number > 0 {
            write!(f, "{separator}{sign}{}{what}", count(*number))?;
            separator = " ";
        }
    }
    Ok(())
}

impl fmt::Display for Delta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_counts(
            f,
            &[
                ("+", self.rules_added, " rules"),
                ("-", self.rules_deleted, " rules"),
                ("+", self.elements_added, " elements"),
                ("-", self.elements_deleted, " elements"),
                ("", self.others, " other"),
            ],
        )?;
        let sides = [(self.rules, "rules"), (self.elements, "elements")];
        let sides: Vec<String> = sides
            .iter()
            .filter_map(|(sides, what)| sides.map(|(before, after)| (before, after, what)))
            .filter(|(before, after, _)| before != after)
            .map(|(before, after, what)| format!("{} → {} {what}", count(before), count(after)))
            .collect();
        if sides.is_empty() {
            return Ok(());
        }
        write!(f, " ({})", sides.join(", "))
    }
}

impl SetDelta {
    /// Is it certain that something changed?
    fn is_proven(&self) -> bool {
        let unproven = self.unproven;
        *self
            != Self {
                unproven,
                ..Self::default()
            }
    }
}

impl fmt::Display for SetDelta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verbs = [
            (self.created, "created"),
            (self.destroyed, "destroyed"),
            (self.flushed, "flushed"),
            (self.renamed, "renamed"),
        ];
        let mut separator = "";
        for (number, verb) in verbs {
            if number > 0 {
                write!(f, "{separator}{verb}")?;
                separator = " ";
            }
        }
        if self.added + self.deleted > 0 {
            f.write_str(separator)?;
            separator = " ";
        }
        write_counts(f, &[("+", self.added, ""), ("-", self.deleted, "")])?;
        if self.unproven > 0 {
            let unproven = count(self.unproven);
            write!(f, "{separator}{unproven} with -exist (perhaps so before)")?;
        }
        Ok(())
    }
}

impl fmt::Display for ServerDelta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_counts(
            f,
            &[
                ("+", self.servers_added, " servers"),
                ("~", self.servers_edited, " servers"),
                ("-", self.servers_deleted, " servers"),
                ("+", self.reals_added, " real servers"),
                ("~", self.reals_edited, " real servers"),
                ("-", self.reals_deleted, " real servers"),
                ("", self.flushed, " flush of everything"),
                ("", self.others, " other"),
            ],
        )?;
        let names: Vec<&str> = self.servers.iter().map(String::as_str).collect();
        write_names(f, &names)
    }
}

impl fmt::Display for AddressDelta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.virtual_ips {
            f.write_str("(Services' addresses) ")?;
        }
        let (added, deleted) = (self.added.len() as u64, self.deleted.len() as u64);
        write_counts(f, &[("+", added, ""), ("-", deleted, "")])?;
        let names: Vec<&str> = self
            .added
            .union(&self.deleted)
            .map(String::as_str)
            .collect();
        write_names(f, &names)
    }
}

/// ` (10.96.0.1/32, 10.96.0.2/32 and 7 more)`.
fn write_names(f: &mut fmt::Formatter<'_>, names: &[&str]) -> fmt::Result {
    if names.is_empty() {
        return Ok(());
    }
    let shown = names.len().min(NAMES);
    write!(f, " ({}", names[..shown].join(", "))?;
    match names.len() - shown {
        0 => f.write_str(")"),
        more => write!(f, " and {} more)", count(more as u64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::changes::Actor;

    /// iptables-restore writes every table that its input names, changed or not.
    #[test]
    fn a_table_that_is_written_again_is_not_said_to_have_changed() {
        let change = |after, refused: &[&str]| RuleChange {
            time_ns: 2_000,
            begin_ns: Some(1_000),
            by: Actor {
                name: Some("iptables-restor".to_owned()),
                ..Actor::default()
            },
            what: What::IptablesLegacy {
                family: "IPv6".to_owned(),
                table: "mangle".to_owned(),
                before: 8,
                after,
            },
            refused: refused.iter().map(|r| ((*r).to_owned(), 1)).collect(),
            incomplete: false,
        };
        insta::assert_snapshot!(change(8, &[]), @"iptables-restor rewrote IPv6 mangle in 1.0 us: 8 entries, as many as before");
        insta::assert_snapshot!(change(9, &[]), @"iptables-restor committed IPv6 mangle: 8 → 9 entries in 1.0 us");
        insta::assert_snapshot!(change(8, &["Invalid argument"]), @"iptables-restor could not commit IPv6 mangle (8 entries, as many as before): Invalid argument");
    }
}
