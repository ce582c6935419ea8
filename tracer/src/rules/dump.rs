//! What a node's rules are, as text: a folder of dumps, or what the tools print now.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use super::files::address_listing;
use super::iptables::rule::Tables;
use super::nftables::table::Ruleset;
use super::{RuleSet, Step, iptables, ipvs, nftables};
use crate::cluster::Family;

/// The files of a dump folder, and the command that makes each.
const FILES: [(&str, &str); 8] = [
    ("iptables.save", "iptables-save"),
    ("ip6tables.save", "ip6tables-save"),
    ("nft-ip.txt", "nft list table ip kube-proxy"),
    ("nft-ip.json", "nft -j list table ip kube-proxy"),
    ("nft-ip6.txt", "nft list table ip6 kube-proxy"),
    ("nft-ip6.json", "nft -j list table ip6 kube-proxy"),
    ("ipvsadm.save", "ipvsadm -Sn"),
    ("ipset.save", "ipset save"),
];

/// The addresses of `kube-ipvs0`: its file in a dump folder.
const ADDRESSES: &str = "ip-addr.txt";

/// How much of a file is looked at to see that it is text, bytes.
const HEAD: usize = 64 << 10;

/// Some text, and where it is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// A file, or a command line.
    pub origin: String,
    /// What it holds, or printed.
    pub text: String,
}

/// The dumps of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FamilyTexts {
    /// `iptables-save`; on a live node, of both back ends.
    pub iptables: Vec<Source>,
    /// `nft list table` or `nft list ruleset`.
    pub nft: Option<Source>,
    /// The same with `nft -j`.
    pub nft_json: Option<Source>,
}

/// All dumps of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Texts {
    /// IPv4.
    pub v4: FamilyTexts,
    /// IPv6.
    pub v6: FamilyTexts,
    /// `ipvsadm -Sn`.
    pub servers: Option<Source>,
    /// `ipset save`.
    pub sets: Option<Source>,
    /// `ip addr show kube-ipvs0`.
    pub addresses: Option<Source>,
    /// `nft list tables`, of a live node: the names of the tables that are there besides those of
    /// which [`FamilyTexts`] holds the rules.
    pub nft_tables: Option<Source>,
}

/// Why a dump folder could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// A file or the folder could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is no text.
    #[error("{path} is no text: make it again with `{command}`")]
    Binary {
        /// The file.
        path: PathBuf,
        /// What makes such a file.
        command: &'static str,
    },
    /// None of the files is there.
    #[error(
        "{0} holds no dump: it needs iptables.save and ip6tables.save (iptables-save, \
         ip6tables-save), nft-ip.txt and nft-ip6.txt (nft list table ip kube-proxy), or \
         ipvsadm.save, ipset.save and ip-addr.txt (ipvsadm -Sn, ipset save, ip addr show \
         kube-ipvs0)"
    )]
    Empty(PathBuf),
}

/// A dump that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{origin}: {cause}")]
pub struct Unreadable {
    /// The file or command.
    pub origin: String,
    /// What is wrong with it.
    pub cause: Cause,
}

/// What is wrong with a dump.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// Of `iptables-save`.
    #[error(transparent)]
    Iptables(#[from] iptables::ParseError),
    /// Of `nft list`.
    #[error(transparent)]
    Nft(#[from] nftables::ParseError),
    /// Of `nft -j list`.
    #[error(transparent)]
    NftJson(#[from] nftables::json::JsonError),
    /// Of `ipvsadm -Sn`, `ipset save` or `ip addr`.
    #[error(transparent)]
    Ipvs(#[from] ipvs::ParseError),
}

/// Says which dump it is that cannot be read.
pub(super) fn at<T, E: Into<Cause>>(
    source: &Source,
    result: Result<T, E>,
) -> Result<T, Unreadable> {
    result.map_err(|cause| Unreadable {
        origin: source.origin.clone(),
        cause: cause.into(),
    })
}

/// The tables of every `iptables-save` of a family.
pub(super) fn saves(texts: &Texts, family: Family) -> Result<Vec<Tables<'_>>, Unreadable> {
    let saves = texts.of(family).iptables.iter();
    saves
        .map(|save| at(save, iptables::parse(&save.text, family)))
        .collect()
}

/// What `nft list` showed of a family, and as what.
pub(super) fn ruleset(
    texts: &Texts,
    family: Family,
) -> Result<Option<(Ruleset, nftables::check::Form)>, Unreadable> {
    let dumps = texts.of(family);
    Ok(match (&dumps.nft, &dumps.nft_json) {
        (Some(source), _) => Some((
            at(source, nftables::parse(&source.text))?,
            nftables::check::Form::Text,
        )),
        (None, Some(source)) => Some((
            at(source, nftables::json::parse(&source.text))?,
            nftables::check::Form::Json,
        )),
        (None, None) => None,
    })
}

/// Virtual servers, ipsets and addresses; empty ones where there is no dump.
pub(super) fn ipvs_state(texts: &Texts) -> Result<ipvs::check::Found, Unreadable> {
    fn parsed<T: Default>(
        source: Option<&Source>,
        parse: impl FnOnce(&str) -> Result<T, ipvs::ParseError>,
    ) -> Result<T, Unreadable> {
        source.map_or_else(
            || Ok(T::default()),
            |source| at(source, parse(&source.text)),
        )
    }
    Ok(ipvs::check::Found {
        servers: parsed(texts.servers.as_ref(), ipvs::Servers::parse)?,
        sets: parsed(texts.sets.as_ref(), ipvs::Sets::parse)?,
        addresses: parsed(texts.addresses.as_ref(), ipvs::Addresses::parse)?,
    })
}

impl Texts {
    /// Reads the files that are there.
    pub fn read(folder: &Path) -> Result<Self, DumpError> {
        if !folder.is_dir() {
            // Says which of "does not exist", "is a file" and "not permitted" it is.
            let source = std::fs::read_dir(folder)
                .err()
                .unwrap_or_else(|| io::Error::other("not a folder"));
            return Err(DumpError::Read {
                path: folder.to_owned(),
                source,
            });
        }
        let mut read = FILES.map(|(name, command)| read_text(&folder.join(name), command));
        let mut take = |index: usize| std::mem::replace(&mut read[index], Ok(None));
        let texts = Self {
            v4: FamilyTexts {
                iptables: take(0)?.into_iter().collect(),
                nft: take(2)?,
                nft_json: take(3)?,
            },
            v6: FamilyTexts {
                iptables: take(1)?.into_iter().collect(),
                nft: take(4)?,
                nft_json: take(5)?,
            },
            servers: take(6)?,
            sets: take(7)?,
            addresses: read_text(&folder.join(ADDRESSES), "ip addr show kube-ipvs0")?,
            nft_tables: None,
        };
        if texts == Self::default() {
            return Err(DumpError::Empty(folder.to_owned()));
        }
        Ok(texts)
    }

    /// What was rendered, as if it had been dumped.
    pub fn rendered(rules: &RuleSet) -> Self {
        let source = |text: &str| Source {
            origin: "what was rendered".to_owned(),
            text: text.to_owned(),
        };
        let mut texts = Self::default();
        for step in &rules.steps {
            match step {
                Step::Sysctl(_) | Step::Accounting(_) => {}
                Step::Iptables { family, text, .. } => {
                    texts.of_mut(*family).iptables.push(source(text));
                }
                Step::Nft { family, text } => texts.of_mut(*family).nft = Some(source(text)),
                Step::Servers { text } => texts.servers = Some(source(text)),
                Step::Sets { text } => texts.sets = Some(source(text)),
                Step::Addresses { addresses } => {
                    texts.addresses = Some(source(&address_listing(addresses)));
                }
            }
        }
        texts
    }

    const fn of_mut(&mut self, family: Family) -> &mut FamilyTexts {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    /// The dumps of a family.
    pub const fn of(&self, family: Family) -> &FamilyTexts {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }
}

/// A text file, if it is there.
fn read_text(path: &Path, command: &'static str) -> Result<Option<Source>, DumpError> {
    let fail = |source| DumpError::Read {
        path: path.to_owned(),
        source,
    };
    let binary = || DumpError::Binary {
        path: path.to_owned(),
        command,
    };
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error)),
    };
    let mut bytes = Vec::new();
    // Gigabytes of something else are not read to the end only to be refused.
    file.by_ref()
        .take(HEAD as u64)
        .read_to_end(&mut bytes)
        .map_err(fail)?;
    if bytes.contains(&0) {
        return Err(binary());
    }
    file.read_to_end(&mut bytes).map_err(fail)?;
    let text = String::from_utf8(bytes).map_err(|_| binary())?;
    Ok(Some(Source {
        origin: path.display().to_string(),
        text,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_that_are_there_are_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path();
        assert!(matches!(Texts::read(path), Err(DumpError::Empty(_))));
        std::fs::write(path.join("ip6tables.save"), "*nat\nCOMMIT\n").expect("write");
        std::fs::write(path.join("ipset.save"), "").expect("write");
        let texts = Texts::read(path).expect("a dump");
        assert!(texts.v4.iptables.is_empty());
        assert_eq!(texts.v6.iptables[0].text, "*nat\nCOMMIT\n");
        assert_eq!(texts.sets.expect("sets").text, "");
        std::fs::write(path.join("iptables.save"), b"\x7fELF\0").expect("write");
        let error = Texts::read(path).expect_err("binary").to_string();
        assert!(error.contains("iptables.save is no text"), "{error}");
        let error = Texts::read(&path.join("none")).expect_err("no folder");
        assert!(error.to_string().contains("none"), "{error}");
    }
}
