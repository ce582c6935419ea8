//! A rule set as files, named as the dumps of a node are, so that what was rendered can be checked
//! and walked like a dump.

use std::fmt::Write as _;
use std::net::IpAddr;

use super::{RuleSet, Step, Sysctl, ipvs};
use crate::cluster::Family;

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleFile {
    /// Its name.
    pub name: String,
    /// What it holds.
    pub text: String,
}

impl RuleSet {
    /// Each step's text under its name, and `load.sh`, which loads them in kube-proxy's order.
    pub fn files(&self) -> Vec<RuleFile> {
        let mut files = Vec::new();
        let mut script = String::from(
            "#!/bin/sh\n# Loads the rules beside this file, in kube-proxy's order.\nset -e\n\
             cd \"$(dirname \"$0\")\"\n",
        );
        for step in &self.steps {
            let file = match step {
                Step::Sysctl(Sysctl { path, value, .. }) => {
                    // Writing into a String cannot fail, here and below.
                    let _ = writeln!(script, "echo {value} > /proc/sys/{path}");
                    continue;
                }
                Step::Accounting(name) => {
                    let _ = writeln!(
                        script,
                        "nfacct get {name} > /dev/null 2>&1 || nfacct add {name}"
                    );
                    continue;
                }
                Step::Iptables {
                    family,
                    backend,
                    text,
                } => {
                    let name = match family {
                        Family::V4 => "iptables.save",
                        Family::V6 => "ip6tables.save",
                    };
                    let tool = backend.tool(*family);
                    let _ = writeln!(script, "{tool}-restore --noflush < {name}");
                    RuleFile {
                        name: name.to_owned(),
                        text: text.clone(),
                    }
                }
                Step::Servers { text } => {
                    script.push_str("ipvsadm -R < ipvsadm.save\n");
                    RuleFile {
                        name: "ipvsadm.save".to_owned(),
                        text: text.clone(),
                    }
                }
                Step::Sets { text } => {
                    script.push_str("ipset restore < ipset.save\n");
                    RuleFile {
                        name: "ipset.save".to_owned(),
                        text: text.clone(),
                    }
                }
                Step::Addresses { addresses } => {
                    script.push_str("ip -batch ip-addr.batch\n");
                    files.push(RuleFile {
                        name: "ip-addr.txt".to_owned(),
                        text: address_listing(addresses),
                    });
                    let mut text = format!("link add {} type dummy\n", ipvs::LINK);
                    for address in addresses {
                        let _ = writeln!(text, "address add {address} dev {}", ipvs::LINK);
                    }
                    RuleFile {
                        name: "ip-addr.batch".to_owned(),
                        text,
                    }
                }
                Step::Nft { family, text } => {
                    // What a partial sync deletes, it deletes in a second transaction.
                    let mut name = format!("nft-{}.txt", family.nft());
                    if files.iter().any(|file| file.name == name) {
                        name = format!("nft-{}-then.txt", family.nft());
                    }
                    let _ = writeln!(script, "nft -f {name}");
                    RuleFile {
                        name,
                        text: text.clone(),
                    }
                }
            };
            files.push(file);
        }
        files.push(RuleFile {
            name: "load.sh".to_owned(),
            text: script,
        });
        files
    }
}

/// Addresses of `kube-ipvs0` as `ip addr` shows them.
pub(super) fn address_listing(addresses: &[IpAddr]) -> String {
    let mut text = format!("1: {}: <BROADCAST,NOARP> mtu 1500\n", ipvs::LINK);
    for address in addresses {
        let (family, length) = match address {
            IpAddr::V4(_) => ("inet", 32),
            IpAddr::V6(_) => ("inet6", 128),
        };
        // Writing into a String cannot fail.
        let _ = writeln!(text, "    {family} {address}/{length} scope global");
    }
    text
}
