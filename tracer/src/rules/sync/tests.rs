//! What a sync sends, loaded over the old rules, gives the rules of the new cluster. The tools are
//! played by small interpreters of their input.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use crate::cluster::{Cluster, Family};
use crate::rules::arbitrary;
use crate::rules::{Mode, NodeView, RuleSet, Step, render, sync};

/// The kernel, as far as steps change it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Kernel {
    /// Family, table and chain to its rules.
    chains: BTreeMap<(Family, String, String), Vec<String>>,
    servers: BTreeMap<String, (String, BTreeSet<String>)>,
    sets: BTreeMap<String, BTreeSet<String>>,
    addresses: BTreeSet<String>,
    nft: BTreeMap<Family, Table>,
}

/// An nftables table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Table {
    chains: BTreeMap<String, Vec<String>>,
    /// Sets and maps: what they are, and their elements.
    sets: BTreeMap<String, (String, BTreeMap<String, String>)>,
}

impl Kernel {
    fn of(set: &RuleSet) -> Self {
        let mut kernel = Self::default();
        kernel.load(set);
        kernel
    }

    fn load(&mut self, set: &RuleSet) {
        for step in &set.steps {
            match step {
                Step::Sysctl(_) | Step::Accounting(_) => {}
                Step::Iptables { family, text, .. } => self.restore(*family, text),
                Step::Servers { text } => self.ipvsadm(text),
                Step::Addresses { addresses } => {
                    self.addresses = addresses.iter().map(ToString::to_string).collect();
                }
                Step::Sets { text } => self.ipset(text),
                Step::Nft { family, text } => self.nft.entry(*family).or_default().load(text),
            }
        }
    }

    /// `iptables-restore --noflush`.
    fn restore(&mut self, family: Family, text: &str) {
        let mut table = String::new();
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                name.clone_into(&mut table);
                continue;
            }
            if line == "COMMIT" {
                self.check_jumps(family, &table);
                continue;
            }
            let chain = |name: &str| (family, table.clone(), name.to_owned());
            if let Some(declared) = line.strip_prefix(':') {
                let name = declared.split(' ').next().expect("a chain");
                self.chains.insert(chain(name), Vec::new());
            } else if let Some(name) = line.strip_prefix("-X ") {
                let gone = self.chains.remove(&chain(name)).expect("a chain");
                assert_eq!(gone, [""; 0], "{name} is emptied before it is deleted");
            } else {
                let (command, rest) = line.split_once(' ').expect("a command");
                let (name, rule) = rest.split_once(' ').expect("a chain");
                let is_base = !name.starts_with("KUBE-");
                let rules = match self.chains.get_mut(&chain(name)) {
                    Some(rules) => rules,
                    None if is_base => self.chains.entry(chain(name)).or_default(),
                    None => panic!("{name} is not declared"),
                };
                match command {
                    "-A" => rules.push(rule.to_owned()),
                    "-I" => rules.insert(0, rule.to_owned()),
                    _ => panic!("unexpected line: {line}"),
                }
            }
        }
    }

    /// No rule may lead to a chain that is not there.
    fn check_jumps(&self, family: Family, table: &str) {
        let of_table = |(f, t, _): &&(Family, String, String)| *f == family && t == table;
        for key in self.chains.keys().filter(of_table) {
            for rule in &self.chains[key] {
                let Some(target) = rule.split(" -j ").nth(1).and_then(|t| t.split(' ').next())
                else {
                    continue;
                };
                let target_key = (family, table.to_owned(), target.to_owned());
                assert!(
                    !target.starts_with("KUBE-") || self.chains.contains_key(&target_key),
                    "{} jumps to {target}, which is not there",
                    key.2
                );
            }
        }
    }

    /// `ipvsadm -R`.
    fn ipvsadm(&mut self, text: &str) {
        for line in text.lines() {
            let (command, rest) = line.split_once(' ').expect("a command");
            match command {
                "-A" | "-E" => {
                    let (key, options) = rest.split_once(" -s ").expect("a scheduler");
                    let server = (options.to_owned(), BTreeSet::new());
                    let existing = self.servers.get_mut(key);
                    assert_eq!(existing.is_some(), command == "-E", "{line}");
                    match existing {
                        Some(existing) => existing.0 = server.0,
                        None => _ = self.servers.insert(key.to_owned(), server),
                    }
                }
                "-D" => assert!(self.servers.remove(rest).is_some(), "{line}"),
                "-a" | "-d" => {
                    let (key, real) = rest.split_once(" -r ").expect("a real server");
                    let real = real.split(' ').next().expect("an address").to_owned();
                    let (_, reals) = self.servers.get_mut(key).expect("a server");
                    let done = match command {
                        "-a" => reals.insert(real),
                        _ => reals.remove(&real),
                    };
                    assert!(done, "{line}");
                }
                _ => panic!("unexpected line: {line}"),
            }
        }
    }

    /// `ipset restore`.
    fn ipset(&mut self, text: &str) {
        for line in text.lines() {
            let mut words = line.split(' ');
            let (command, set) = (
                words.next().expect("a command"),
                words.next().expect("a set"),
            );
            let entry = words.collect::<Vec<_>>().join(" ");
            match command {
                "create" => {
                    let new = self.sets.insert(set.to_owned(), BTreeSet::new()).is_none();
                    assert!(new, "{line}");
                }
                "add" => assert!(
                    self.sets.get_mut(set).expect("a set").insert(entry),
                    "{line}"
                ),
                "del" => assert!(
                    self.sets.get_mut(set).expect("a set").remove(&entry),
                    "{line}"
                ),
                _ => panic!("unexpected line: {line}"),
            }
        }
    }
}

impl Table {
    /// `nft -f`.
    fn load(&mut self, text: &str) {
        let mut elements: Option<(bool, String)> = None;
        for line in text.lines() {
            if let Some((add, set)) = &elements {
                let Some(element) = line.strip_prefix('\t').and_then(|l| l.strip_suffix(','))
                else {
                    assert_eq!(line, "}");
                    elements = None;
                    continue;
                };
                let end = element.find(" comment ").or(element.find(" : "));
                let (key, value) = element.split_at(end.unwrap_or(element.len()));
                let (_, list) = self.sets.get_mut(set).expect("a set");
                if *add {
                    let old = list.insert(key.to_owned(), value.to_owned());
                    assert!(old.is_none_or(|old| old == value), "{key} is there twice");
                } else {
                    assert!(list.remove(key).is_some(), "{key} is not there");
                }
                continue;
            }
            let mut words = line.splitn(6, ' ');
            let mut word = || words.next().unwrap_or_default();
            let (command, kind, _, _) = (word(), word(), word(), word());
            let (name, rest) = (word(), word());
            match (command, kind) {
                ("add" | "flush", "table") => {
                    if command == "flush" {
                        self.chains.values_mut().for_each(Vec::clear);
                    }
                }
                ("add", "set" | "map") => {
                    let set = self.sets.entry(name.to_owned()).or_default();
                    rest.clone_into(&mut set.0);
                }
                ("flush", "set" | "map") => {
                    self.sets.get_mut(name).expect("a set").1.clear();
                }
                ("delete", "set") => assert!(self.sets.remove(name).is_some(), "{line}"),
                ("add", "chain") => _ = self.chains.entry(name.to_owned()).or_default(),
                ("flush", "chain") => self.chains.get_mut(name).expect("a chain").clear(),
                ("delete", "chain") => {
                    let gone = self.chains.remove(name).expect("a chain");
                    assert_eq!(gone, [""; 0], "{name} is emptied before it is deleted");
                }
                ("add", "rule") => {
                    let rules = self.chains.get_mut(name).expect("a chain");
                    rules.push(rest.to_owned());
                }
                ("add" | "delete", "element") => {
                    elements = Some((command == "add", name.to_owned()));
                }
                _ => panic!("unexpected line: {line}"),
            }
        }
        self.check_references();
    }

    /// Nothing may lead to a chain or set that is not there.
    fn check_references(&self) {
        let rules = self.chains.values().flatten();
        let verdicts = self
            .sets
            .values()
            .flat_map(|(_, elements)| elements.values());
        for text in rules.chain(verdicts) {
            let mut words = text.split([' ', ',']);
            while let Some(word) = words.next() {
                match word {
                    "goto" | "jump" => {
                        let chain = words.next().expect("a chain");
                        assert!(self.chains.contains_key(chain), "{chain} in {text}");
                    }
                    _ => {
                        if let Some(set) = word.strip_prefix('@') {
                            assert!(self.sets.contains_key(set), "{set} in {text}");
                        }
                    }
                }
            }
        }
    }
}

fn check(old: &Cluster, new: &Cluster, node: &NodeView) -> Result<(), TestCaseError> {
    for mode in [Mode::IptablesNft, Mode::Ipvs, Mode::Nftables] {
        let mut kernel = Kernel::of(&render(old, node, mode));
        kernel.load(&sync(old, new, node, mode));
        let wanted = Kernel::of(&render(new, node, mode));
        prop_assert_eq!(kernel, wanted, "{}", mode);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_sync_leads_to_the_new_rules((old, new) in arbitrary::change(), node in arbitrary::node()) {
        check(&old, &new, &node)?;
    }

    #[test]
    fn without_a_change_little_is_sent(cluster in arbitrary::cluster(), node in arbitrary::node()) {
        for mode in Mode::ALL {
            let set = sync(&cluster, &cluster, &node, mode);
            for step in &set.steps {
                let Step::Iptables { text, .. } = step else {
                    prop_assert!(false, "{:?}", step);
                    continue;
                };
                prop_assert!(!text.contains("-I ") && !text.contains("-X ") && !text.contains("KUBE-SEP-"));
            }
        }
    }
}

#[test]
fn a_large_cluster_keeps_chains_for_later() {
    let service = |name: &str, count: u16| crate::cluster::Service {
        namespace: "ns".to_owned(),
        name: name.to_owned(),
        cluster_ips: vec![[10, 96, 0, 1].into()],
        ports: vec![crate::cluster::ServicePort {
            name: String::new(),
            protocol: crate::cluster::Protocol::Tcp,
            port: 80,
            node_port: None,
            endpoints: (0..count)
                .map(|n| {
                    let [high, low] = n.to_be_bytes();
                    crate::cluster::Endpoint::ready([10, 244, high, low].into(), 80, "n")
                })
                .collect(),
        }],
        ..crate::cluster::Service::default()
    };
    let node = NodeView::default();
    for (count, deletes) in [(1000, true), (1001, false)] {
        let old = Cluster {
            services: vec![service("stays", count), service("goes", 2)],
            ..Cluster::default()
        };
        let mut new = old.clone();
        new.services.pop();
        let set = sync(&old, &new, &node, Mode::IptablesLegacy);
        let script = set.script();
        assert_eq!(script.contains("\n-X KUBE-SVC-"), deletes, "{count}");
        assert!(!script.contains(":KUBE-SEP-") || deletes);
    }
}
