//! A rule set as files, named as the dumps of a node are, so that what was rendered can be checked
//! and walked like a dump.

use std::fmt::Write as _;

use super::{RuleSet, Step, Sysctl, ipvs};
use crate::cluster::Family;

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleFile {
    /// Its name.
    pub name: &'static str,
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
                        name,
                        text: text.clone(),
                    }
                }
                Step::Servers { text } => {
                    script.push_str("ipvsadm -R < ipvsadm.save\n");
                    RuleFile {
                        name: "ipvsadm.save",
                        text: text.clone(),
                    }
                }
                Step::Sets { text } => {
                    script.push_str("ipset restore < ipset.save\n");
                    RuleFile {
                        name: "ipset.save",
                        text: text.clone(),
                    }
                }
                Step::Addresses { addresses } => {
                    script.push_str("ip -batch ip-addr.batch\n");
                    let mut text = format!("link add {} type dummy\n", ipvs::LINK);
                    for address in addresses {
                        let _ = writeln!(text, "address add {address} dev {}", ipvs::LINK);
                    }
                    RuleFile {
                        name: "ip-addr.batch",
                        text,
                    }
                }
                Step::Nft { family, text } => {
                    let name = match family {
                        Family::V4 => "nft-ip.txt",
                        Family::V6 => "nft-ip6.txt",
                    };
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
            name: "load.sh",
            text: script,
        });
        files
    }
}
