//! What is rendered is what a real kube-proxy installed (`fixtures/kube-proxy-1.36.2`), and holds
//! together for any cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use proptest::prelude::*;

use super::*;
use crate::cluster::{Cidr, Endpoint, Protocol, Service, ServicePort};

const REAL: &str = include_str!("fixtures/kube-proxy-1.36.2/cluster.json");
const REAL_IPTABLES: &str =
    include_str!("fixtures/kube-proxy-1.36.2/iptables-legacy/iptables.save");

fn real_cluster() -> Cluster {
    let read = crate::cluster::read::read(REAL.as_bytes(), "cluster.json").expect("a cluster");
    assert_eq!(read.warnings, []);
    read.cluster
}

fn node(addresses: &[&str]) -> NodeView {
    NodeView {
        name: "worker-0".to_owned(),
        zone: Some("z1".to_owned()),
        addresses: addresses
            .iter()
            .map(|a| a.parse().expect("address"))
            .collect(),
        cluster_cidrs: cidrs(&["10.244.0.0/16", "fd00:10:244::/56"]),
        service_cidrs: cidrs(&["10.96.0.0/12", "fd00:10:96::/108"]),
        ..NodeView::default()
    }
}

fn cidrs(cidrs: &[&str]) -> Vec<Cidr> {
    cidrs.iter().map(|c| c.parse().expect("network")).collect()
}

fn iptables_text(set: &RuleSet, wanted: Family) -> &str {
    set.steps
        .iter()
        .find_map(|step| match step {
            Step::Iptables { family, text, .. } if *family == wanted => Some(text.as_str()),
            _ => None,
        })
        .expect("an iptables step")
}

fn nft_text(set: &RuleSet, wanted: Family) -> &str {
    set.steps
        .iter()
        .find_map(|step| match step {
            Step::Nft { family, text } if *family == wanted => Some(text.as_str()),
            _ => None,
        })
        .expect("an nft step")
}

fn servers_text(set: &RuleSet) -> &str {
    set.steps
        .iter()
        .find_map(|step| match step {
            Step::Servers { text } => Some(text.as_str()),
            _ => None,
        })
        .expect("a step for servers")
}

fn sets_text(set: &RuleSet) -> &str {
    set.steps
        .iter()
        .find_map(|step| match step {
            Step::Sets { text } => Some(text.as_str()),
            _ => None,
        })
        .expect("a step for sets")
}

fn bound(set: &RuleSet) -> &[IpAddr] {
    set.steps
        .iter()
        .find_map(|step| match step {
            Step::Addresses { addresses } => Some(addresses.as_slice()),
            _ => None,
        })
        .expect("a step for addresses")
}

// ---- iptables ----

/// `table CHAIN` to its rules, in order.
type Chains = BTreeMap<String, Vec<String>>;

/// A rule as kube-proxy writes it, as `iptables-save` 1.8.9 prints it: source, destination and
/// protocol come first, then matches in the order given; addresses get their length, marks lose
/// leading zeros and become `--set-xmark`, probabilities are multiples of 2^-31 with eleven digits,
/// comments are quoted, REJECT names its ICMP type.
fn as_saved(rule: &str, family: Family) -> String {
    let mut words = words(rule).into_iter();
    let (mut source, mut destination, mut protocol) = (String::new(), String::new(), String::new());
    let mut rest = String::new();
    let mut not = "";
    while let Some(word) = words.next() {
        let value = |words: &mut std::vec::IntoIter<String>| words.next().expect("a value");
        match word.as_str() {
            "!" => {
                not = "! ";
                continue;
            }
            "-s" => {
                write!(source, " {not}-s {}", long(&value(&mut words), family)).expect("String");
            }
            "-d" => {
                write!(destination, " {not}-d {}", long(&value(&mut words), family))
                    .expect("String");
            }
            "-p" => write!(protocol, " {not}-p {}", value(&mut words)).expect("String"),
            "--comment" => write!(rest, " --comment \"{}\"", value(&mut words)).expect("String"),
            "recent" => {
                let mut options = String::new();
                let name = loop {
                    match value(&mut words).as_str() {
                        "--name" => break value(&mut words),
                        option => write!(options, " {option}").expect("String"),
                    }
                };
                for word in words.by_ref() {
                    if matches!(word.as_str(), "-j" | "-m") {
                        let mask = match family {
                            Family::V4 => "255.255.255.255".to_owned(),
                            Family::V6 => ["ffff"; 8].join(":"),
                        };
                        write!(
                            rest,
                            " recent{options} --name {name} --mask {mask} --rsource {word}"
                        )
                        .expect("String");
                        break;
                    }
                    write!(options, " {word}").expect("String");
                }
            }
            "--vaddr" => {
                let address = value(&mut words);
                assert_eq!(value(&mut words), "--vproto");
                let number = match value(&mut words).as_str() {
                    "tcp" => 6,
                    "udp" => 17,
                    _ => 132,
                };
                write!(rest, " --vproto {number} --vaddr {address}").expect("String");
            }
            "--nfacct-name" => {
                write!(rest, " --nfacct-name  {}", value(&mut words)).expect("String");
            }
            "--mark" => write!(rest, " {not}--mark {}", short(&value(&mut words))).expect("String"),
            "--xor-mark" => {
                write!(rest, " --set-xmark {}/0x0", short(&value(&mut words))).expect("String");
            }
            "--or-mark" => {
                let mark = short(&value(&mut words));
                write!(rest, " --set-xmark {mark}/{mark}").expect("String");
            }
            "--probability" => {
                let p: f64 = value(&mut words).parse().expect("a probability");
                let steps = (p * f64::from(1_u32 << 31)).round();
                write!(
                    rest,
                    " --probability {:.11}",
                    steps / f64::from(1_u32 << 31)
                )
                .expect("String");
            }
            "REJECT" => {
                rest.push_str(match family {
                    Family::V4 => " REJECT --reject-with icmp-port-unreachable",
                    Family::V6 => " REJECT --reject-with icmp6-port-unreachable",
                });
            }
            _ => write!(rest, " {not}{word}").expect("String"),
        }
        not = "";
    }
    format!("{source}{destination}{protocol}{rest}")
        .trim()
        .to_owned()
}

fn words(rule: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut parts = rule.split('"');
    while let Some(plain) = parts.next() {
        words.extend(plain.split_whitespace().map(str::to_owned));
        words.extend(parts.next().map(str::to_owned));
    }
    words
}

fn long(address: &str, family: Family) -> String {
    match (address.contains('/'), family) {
        (true, _) => address.to_owned(),
        (false, Family::V4) => format!("{address}/32"),
        (false, Family::V6) => format!("{address}/128"),
    }
}

fn short(mark: &str) -> String {
    mark.replace("0x0000", "0x")
}

/// What the kernel holds after loading `text`, `-I` prepending and `-A` appending.
fn loaded(text: &str, rule_text: impl Fn(&str) -> String) -> Chains {
    let mut chains = Chains::new();
    let mut table = "";
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some(chain) = line.strip_prefix(':') {
            let chain = chain.split(' ').next().expect("a chain");
            chains.entry(format!("{table} {chain}")).or_default();
        } else if let Some((command, rest)) = line.split_once(' ')
            && let Some((chain, rule)) = rest.split_once(' ')
        {
            let rules = chains.entry(format!("{table} {chain}")).or_default();
            match command {
                "-A" => rules.push(rule_text(rule)),
                "-I" => rules.insert(0, rule_text(rule)),
                _ => panic!("unexpected line: {line}"),
            }
        }
    }
    // iptables-save declares base chains that hold no rule.
    chains.retain(|name, rules| name.contains(" KUBE-") || !rules.is_empty());
    // kube-proxy's order of Services is random; only the jump to NodePorts must stay last.
    for (name, rules) in &mut chains {
        if name.ends_with(" KUBE-SERVICES") || name.ends_with(" KUBE-NODEPORTS") {
            let last = rules
                .last()
                .filter(|rule| rule.contains("must be the last rule"))
                .cloned();
            let ipvs = rules.iter().any(|rule| rule.contains("--match-set"));
            if !ipvs {
                rules.sort();
            }
            if let Some(last) = last {
                assert!(!ipvs, "IPVS mode has no such rule");
                rules.retain(|rule| *rule != last);
                rules.push(last);
            }
        }
    }
    chains
}

fn assert_same_chains(rendered: &str, real: &str, family: Family) {
    let rendered = loaded(rendered, |rule| as_saved(rule, family));
    let real = loaded(real, str::to_owned);
    for (chain, rules) in &real {
        assert_eq!(rendered.get(chain), Some(rules), "chain {chain}");
    }
    let extra: Vec<_> = rendered
        .keys()
        .filter(|chain| !real.contains_key(*chain))
        .collect();
    assert!(
        extra.is_empty(),
        "chains that kube-proxy does not make: {extra:?}"
    );
}

#[test]
fn iptables_rules_are_kube_proxys() {
    let node = node(&["172.31.255.2"]);
    for (mode, v4, v6) in [
        (
            Mode::IptablesLegacy,
            REAL_IPTABLES,
            include_str!("fixtures/kube-proxy-1.36.2/iptables-legacy/ip6tables.save"),
        ),
        (
            Mode::IptablesNft,
            include_str!("fixtures/kube-proxy-1.36.2/iptables-nft/iptables.save"),
            include_str!("fixtures/kube-proxy-1.36.2/iptables-nft/ip6tables.save"),
        ),
    ] {
        let set = render(&real_cluster(), &node, mode);
        assert_same_chains(iptables_text(&set, Family::V4), v4, Family::V4);
        assert_same_chains(iptables_text(&set, Family::V6), v6, Family::V6);
    }
}

#[test]
fn nodeports_come_in_kube_proxys_pairs() {
    let set = render(&real_cluster(), &node(&[]), Mode::IptablesLegacy);
    let rules: Vec<&str> = iptables_text(&set, Family::V4)
        .lines()
        .filter(|line| line.starts_with("-A KUBE-NODEPORTS ") && line.contains("web-np:http "))
        .collect();
    assert_eq!(
        rules,
        [
            "-A KUBE-NODEPORTS -m comment --comment shop/web-np:http -m tcp -p tcp -d 127.0.0.0/8 \
             --dport 30080 -m nfacct --nfacct-name localhost_nps_accepted_pkts \
             -j KUBE-EXT-L7VHADGQUOMCRAVS",
            "-A KUBE-NODEPORTS -m comment --comment shop/web-np:http -m tcp -p tcp --dport 30080 \
             -j KUBE-EXT-L7VHADGQUOMCRAVS",
        ]
    );
}

#[test]
fn without_nfacct_no_rule_names_it() {
    let node = NodeView {
        nfacct: false,
        ..node(&[])
    };
    let set = render(&real_cluster(), &node, Mode::IptablesNft);
    assert!(!set.script().contains("nfacct"));
}

#[test]
fn a_large_cluster_has_no_endpoint_comments() {
    let with = |endpoints: u16| {
        let cluster = cluster_of(&[(Protocol::Tcp, None, endpoints)]);
        render(&cluster, &node(&[]), Mode::IptablesLegacy)
    };
    let small = with(1000);
    let large = with(1001);
    let endpoint_comments = |set: &RuleSet| {
        iptables_text(set, Family::V4)
            .lines()
            .filter(|line| line.contains("-j KUBE-SEP-") || line.starts_with("-A KUBE-SEP-"))
            .filter(|line| line.contains("--comment"))
            .count()
    };
    assert_eq!(endpoint_comments(&small), 3000);
    assert_eq!(endpoint_comments(&large), 0);
    assert!(iptables_text(&large, Family::V4).contains("ns/svc0:p0 cluster IP"));
}

#[test]
fn loading_over_rules_changes_what_changed() {
    let cluster = real_cluster();
    let set = render(&cluster, &node(&[]), Mode::IptablesLegacy);
    let text = iptables_text(&set, Family::V4);
    let real = REAL_IPTABLES;

    assert_eq!(iptables::update("", text), text);
    assert_eq!(
        iptables::update(
            "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -j DROP\nCOMMIT\n",
            text
        ),
        text
    );

    let again = iptables::update(real, text);
    assert!(!again.contains("-I "), "every jump is there");
    assert!(!again.contains("\n-X "), "no chain is stale");

    let mut smaller = cluster.clone();
    smaller.services.retain(|service| service.name != "web-np");
    let set = render(&smaller, &node(&[]), Mode::IptablesLegacy);
    let change = iptables::update(real, iptables_text(&set, Family::V4));
    let deleted = change
        .lines()
        .filter(|line| line.starts_with("-X "))
        .count();
    assert_eq!(deleted, 2 + 2 + 4, "SVC, EXT and SEP chains of two ports");

    let flushed: String = real
        .split_inclusive('\n')
        .filter(|line| !line.starts_with("-A PREROUTING"))
        .collect();
    let change = iptables::update(&flushed, text);
    assert_eq!(
        change
            .lines()
            .filter(|line| line.starts_with("-I "))
            .count(),
        1
    );
}

#[test]
fn removal_leaves_the_rules_of_others() {
    let current = format!(
        "*raw\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n{}",
        REAL_IPTABLES.replace(
            "COMMIT",
            "-A INPUT -s 192.0.2.7/32 -j DROP\n-A INPUT -m comment --comment \"to -j KUBE-X\" -j LOG\n-A INPUT -m comment --comment \"or -j KUBE-Y\"\nCOMMIT"
        )
    );
    let text = iptables::removal(&current).expect("rules to remove");
    assert!(
        !text.contains("192.0.2.7")
            && !text.contains("LOG")
            && !text.contains("KUBE-Y")
            && !text.contains("*raw")
    );
    let removed = text.lines().filter(|line| line.starts_with("-X ")).count();
    let declared = current
        .lines()
        .filter(|line| line.starts_with(":KUBE-"))
        .count();
    assert_eq!(removed, declared);
    assert_eq!(
        text.lines().filter(|line| line.starts_with("-D ")).count(),
        14
    );
    assert_eq!(
        iptables::removal("*nat\n:INPUT ACCEPT [0:0]\nCOMMIT\n"),
        None
    );
}

#[test]
fn rules_of_others_are_not_counted() {
    let real = REAL_IPTABLES;
    let rules = real.lines().filter(|line| line.starts_with("-A ")).count() as u64;
    let foreign = real.replace("COMMIT", "-A INPUT -s 192.0.2.7/32 -j DROP\nCOMMIT");
    assert_eq!(iptables::count(&foreign), rules);
}

// ---- IPVS ----

fn sorted_lines(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}

#[test]
fn ipvs_rules_are_kube_proxys() {
    let set = render(
        &real_cluster(),
        &node(&["172.31.255.2", "10.0.2.15"]),
        Mode::Ipvs,
    );
    assert_eq!(
        sorted_lines(servers_text(&set)),
        sorted_lines(include_str!("fixtures/kube-proxy-1.36.2/ipvs/ipvsadm.save"))
    );
    let mut real: Vec<&str> = include_str!("fixtures/kube-proxy-1.36.2/ipvs/ipset.save")
        .lines()
        .filter_map(|line| line.split(" bucketsize").next())
        .collect();
    real.sort_unstable();
    assert_eq!(sorted_lines(sets_text(&set)), real);
    let real = include_str!("fixtures/kube-proxy-1.36.2/ipvs/iptables.save");
    assert_same_chains(iptables_text(&set, Family::V4), real, Family::V4);
    let real = include_str!("fixtures/kube-proxy-1.36.2/ipvs/ip6tables.save");
    assert_same_chains(iptables_text(&set, Family::V6), real, Family::V6);
    let real: BTreeSet<&str> = include_str!("fixtures/kube-proxy-1.36.2/ipvs/ip-addr.txt")
        .lines()
        .filter_map(|line| line.trim().strip_prefix("inet")?.split(' ').nth(1))
        .filter_map(|address| address.split('/').next())
        .collect();
    let bound: BTreeSet<String> = bound(&set).iter().map(ToString::to_string).collect();
    assert_eq!(
        bound.iter().map(String::as_str).collect::<BTreeSet<_>>(),
        real
    );
}

#[test]
fn sctp_node_ports_have_addresses() {
    let cluster = cluster_of(&[
        (Protocol::Sctp, Some(30_500), 1),
        (Protocol::Udp, Some(30_501), 1),
    ]);
    let set = render(&cluster, &node(&["192.0.2.1", "2001:db8::1"]), Mode::Ipvs);
    let sets = sets_text(&set);
    assert!(sets.contains("\nadd KUBE-NODE-PORT-SCTP-HASH 192.0.2.1,sctp:30500\n"));
    assert!(sets.contains("\nadd KUBE-6-NODE-PORT-SCTP-HASH 2001:db8::1,sctp:30500\n"));
    assert!(sets.contains("\nadd KUBE-NODE-PORT-UDP 30501\n"));
    assert!(servers_text(&set).contains("-A --sctp-service [2001:db8::1]:30500 -s rr\n"));
}

#[test]
fn without_cluster_cidr_ipvs_masquerades_by_service_address() {
    let node = NodeView {
        cluster_cidrs: Vec::new(),
        ..node(&[])
    };
    let set = render(&real_cluster(), &node, Mode::Ipvs);
    assert!(
        iptables_text(&set, Family::V4)
            .contains("--match-set KUBE-CLUSTER-IP src,dst -j KUBE-MARK-MASQ")
    );
}

/// Both halves of a sync's `ipvsadm -R` input.
fn update_servers(current: &str, wanted: &str) -> String {
    ipvs::update_live_servers(current, wanted) + &ipvs::remove_stale_servers(current, wanted)
}

#[test]
fn servers_that_stay_are_not_touched() {
    let set = render(
        &real_cluster(),
        &node(&["172.31.255.2", "10.0.2.15"]),
        Mode::Ipvs,
    );
    let wanted = servers_text(&set);
    assert_eq!(update_servers("", wanted), wanted);
    let real = include_str!("fixtures/kube-proxy-1.36.2/ipvs/ipvsadm.save");
    assert_eq!(update_servers(real, wanted), "");
    let counts = set.expected_counts();
    assert_eq!((counts.virtual_servers, counts.real_servers), (32, 49));

    let current = "-A -t 10.96.10.1:80 -s rr\n\
                   -a -t 10.96.10.1:80 -r 10.244.9.9:8080 -m -w 1\n\
                   -A -u 192.0.2.1:53 -s rr\n";
    let wanted = "-A -t 10.96.10.1:80 -s rr\n\
                  -a -t 10.96.10.1:80 -r 10.244.0.11:8080 -m -w 1\n";
    assert_eq!(
        update_servers(current, wanted),
        "-a -t 10.96.10.1:80 -r 10.244.0.11:8080 -m -w 1\n\
         -d -t 10.96.10.1:80 -r 10.244.9.9:8080\n\
         -D -u 192.0.2.1:53\n"
    );
}

#[test]
fn set_entries_that_stay_are_not_touched() {
    let set = render(&real_cluster(), &node(&["172.31.255.2"]), Mode::Ipvs);
    let wanted = sets_text(&set);
    assert_eq!(ipvs::update_sets("", wanted), wanted);
    let current = format!(
        "create FOREIGN hash:ip family inet\nadd FOREIGN 192.0.2.1\n{}add KUBE-NODE-PORT-TCP 31999\n",
        wanted.replace(
            "maxelem 65536\n",
            "maxelem 65536 bucketsize 12 initval 0x1\n"
        )
    );
    assert_eq!(
        ipvs::update_sets(&current, wanted),
        "del KUBE-NODE-PORT-TCP 31999\n"
    );
    assert_eq!(
        ipvs::count_entries(&current),
        ipvs::count_entries(wanted) + 1
    );
    assert_eq!(ipvs::set_names("FOREIGN\nKUBE-CLUSTER-IP\n").count(), 1);
}

// ---- nftables ----

/// Rules by chain, elements by set, declarations by name.
#[derive(Debug, Default, PartialEq, Eq)]
struct Table {
    rules: BTreeMap<String, Vec<String>>,
    elements: BTreeMap<String, BTreeSet<String>>,
    heads: BTreeMap<String, BTreeSet<String>>,
}

/// What `nft list table` prints, read.
fn listed(text: &str) -> Table {
    let mut table = Table::default();
    let mut name = String::new();
    let mut is_chain = false;
    let mut elements: Option<String> = None;
    for line in text.lines().map(str::trim) {
        if let Some(list) = &mut elements {
            list.push_str(line);
        } else if let Some(rest) = line.strip_prefix("elements = {") {
            elements = Some(rest.to_owned());
        } else if let Some((kind, rest)) = line.split_once(' ')
            && matches!(kind, "chain" | "set" | "map")
            && let Some(named) = rest.strip_suffix(" {")
        {
            named.clone_into(&mut name);
            is_chain = kind == "chain";
            table.heads.entry(format!("{kind} {name}")).or_default();
            if is_chain {
                table.rules.entry(name.clone()).or_default();
            }
        } else if line == "size 65535" {
            // The default of a set that rules add to.
        } else if line == "timeout 3h" {
            let name = format!("set or map {name}:");
            table
                .heads
                .entry(name)
                .or_default()
                .insert("timeout 10800s".to_owned());
        } else if ["type ", "comment ", "flags "]
            .iter()
            .any(|head| line.starts_with(head))
        {
            let kind = if is_chain { "chain" } else { "set or map" };
            let head = line
                .replace("dstnat - 10", "-110")
                .replace("priority dstnat", "priority -100");
            let head = head
                .replace("srcnat", "100")
                .replace("priority filter", "priority 0");
            // The table's own comment stands before any name.
            table
                .heads
                .entry(format!("{kind} {name}:"))
                .or_default()
                .insert(head);
        } else if !line.is_empty() && line != "}" && !line.starts_with("table ") {
            table
                .rules
                .entry(name.clone())
                .or_default()
                .push(line.to_owned());
        }
        if let Some(list) = elements.take_if(|list| list.ends_with('}')) {
            let list = list
                .trim_end_matches('}')
                .split(',')
                .map(|e| e.trim().to_owned());
            table.elements.entry(name.clone()).or_default().extend(list);
        }
    }
    table
}

/// A script of ours, in the spelling of `nft list table` 1.0.6.
fn scripted(text: &str, family: Family) -> Table {
    let mut table = Table::default();
    let prefix = format!(" {} kube-proxy ", family.nft());
    let mut set = String::new();
    for line in text.lines() {
        if let Some(element) = line.strip_prefix('\t') {
            let element = element.trim_end_matches(',').to_owned();
            table
                .elements
                .entry(set.clone())
                .or_default()
                .insert(element);
            continue;
        }
        let Some((command, rest)) = line.split_once(&prefix) else {
            continue;
        };
        let (name, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        if command == "add table" {
            continue;
        }
        match command {
            "add element" => name.clone_into(&mut set),
            "add rule" => {
                let rule = rest
                    .replace("mark set mark or", "meta mark set meta mark |")
                    .replace(
                        "mark and 0x00004000 != 0",
                        "meta mark & 0x00004000 != 0x00000000",
                    )
                    .replace("mark set mark xor", "meta mark set meta mark ^")
                    .replace(" addr . port to ", " to ")
                    .replace(" , ", ", ");
                // A set of one is no set.
                let rule = match rule.split_once("addr { ").or(rule.split_once("addr != { ")) {
                    Some((before, after)) if !after.contains(", ") => {
                        let not = if rule.contains("!= { ") { "!= " } else { "" };
                        format!("{before}addr {not}{}", after.replacen(" } ", " ", 1))
                    }
                    _ => rule,
                };
                table.rules.entry(name.to_owned()).or_default().push(rule);
            }
            "add chain" | "add set" | "add map" => {
                let kind = command.trim_start_matches("add ");
                table.heads.entry(format!("{kind} {name}")).or_default();
                if kind == "chain" {
                    table.rules.entry(name.to_owned()).or_default();
                }
                let kind = if kind == "chain" {
                    "chain"
                } else {
                    "set or map"
                };
                for part in rest.trim_matches(['{', '}', ' ']).split(" ;") {
                    let part = part.trim();
                    if part.starts_with("type ") && kind == "chain" {
                        let head = format!("{part}; policy accept;");
                        table
                            .heads
                            .entry(format!("{kind} {name}:"))
                            .or_default()
                            .insert(head);
                    } else if !part.is_empty() {
                        let head = part.to_owned();
                        table
                            .heads
                            .entry(format!("{kind} {name}:"))
                            .or_default()
                            .insert(head);
                    }
                }
            }
            _ => assert!(command.starts_with("flush"), "unexpected line: {line}"),
        }
    }
    table
}

#[test]
fn nftables_rules_are_kube_proxys() {
    let set = render(&real_cluster(), &node(&["172.31.255.2"]), Mode::Nftables);
    for (family, real) in [
        (
            Family::V4,
            include_str!("fixtures/kube-proxy-1.36.2/nftables/nft-ip.txt"),
        ),
        (
            Family::V6,
            include_str!("fixtures/kube-proxy-1.36.2/nftables/nft-ip6.txt"),
        ),
    ] {
        let text = nft_text(&set, family);
        let mut real = listed(real);
        let comment = real
            .heads
            .remove("set or map :")
            .expect("the table's comment");
        assert!(text.contains(comment.first().expect("one comment")));
        let rendered = scripted(text, family);
        assert_eq!(rendered.rules, real.rules);
        assert_eq!(rendered.elements, real.elements);
        assert_eq!(rendered.heads, real.heads);
    }
}

#[test]
fn a_table_with_stale_chains_is_replaced() {
    let set = render(&real_cluster(), &node(&["172.31.255.2"]), Mode::Nftables);
    let text = nft_text(&set, Family::V4);
    assert_eq!(nftables::update("", Family::V4, text), text);
    let real = include_str!("fixtures/kube-proxy-1.36.2/nftables/nft-ip.txt");
    assert_eq!(nftables::update(real, Family::V4, text), text);
    let foreign = "table ip mine {\n\tchain stale {\n\t}\n}\n";
    assert_eq!(nftables::update(foreign, Family::V4, text), text);
    let stale = "table ip kube-proxy {\n\tchain service-X-ns/gone/tcp/p {\n\t}\n}\n";
    let change = nftables::update(stale, Family::V4, text);
    assert!(change.starts_with("add table ip kube-proxy\ndelete table ip kube-proxy\n"));
    assert!(change.ends_with(text));
}

// ---- any cluster ----

/// A dual-stack cluster of one-port Services: protocol, NodePort, endpoints of each family. Half
/// of the endpoints are on `worker-0`.
fn cluster_of(services: &[(Protocol, Option<u16>, u16)]) -> Cluster {
    let services = services
        .iter()
        .enumerate()
        .map(|(index, (protocol, node_port, count))| {
            let index = u16::try_from(index).expect("few Services");
            let endpoints = (0..*count).flat_map(|n| {
                let [high, low] = n.to_be_bytes();
                let node = format!("worker-{}", n % 2);
                let v4 = IpAddr::from([10, 244, high, low]);
                let v6 = IpAddr::from([0xfd00, 0x10, 0x244, 0, 0, 0, 0, n]);
                [v4, v6].map(|address| Endpoint::ready(address, 8000 + index, &node))
            });
            let [high, low] = index.to_be_bytes();
            Service {
                namespace: "ns".to_owned(),
                name: format!("svc{index}"),
                cluster_ips: vec![
                    IpAddr::from([10, 96, high, low]),
                    IpAddr::from([0xfd00, 0x10, 0x96, 0, 0, 0, 0, index]),
                ],
                ports: vec![ServicePort {
                    name: format!("p{index}"),
                    protocol: *protocol,
                    port: 80,
                    node_port: *node_port,
                    endpoints: endpoints.collect(),
                }],
                ..Service::default()
            }
        });
    Cluster {
        services: services.collect(),
        ..Cluster::default()
    }
}

fn any_services() -> impl Strategy<Value = Vec<(Protocol, Option<u16>, u16)>> {
    let protocol = prop_oneof![
        Just(Protocol::Tcp),
        Just(Protocol::Udp),
        Just(Protocol::Sctp)
    ];
    let service = (protocol, any::<bool>(), 0_u16..12);
    proptest::collection::vec(service, 0..12).prop_map(|services| {
        services
            .into_iter()
            .zip(30_000_u16..)
            .map(|((protocol, has_node_port, endpoints), node_port)| {
                (protocol, has_node_port.then_some(node_port), endpoints)
            })
            .collect()
    })
}

/// `--option VALUE` in a rule.
fn option<'a>(rule: &'a str, option: &str) -> Option<&'a str> {
    let (_, rest) = rule.split_once(&format!(" {option} "))?;
    rest.split(' ').next()
}

proptest! {
    /// From its Service's rule every endpoint can be reached, each with the same probability.
    #[test]
    fn iptables_reaches_every_endpoint_evenly(services in any_services()) {
        let cluster = cluster_of(&services);
        let set = render(&cluster, &node(&["192.0.2.1", "2001:db8::1"]), Mode::IptablesNft);
        for family in Family::ALL {
            let chains = loaded(iptables_text(&set, family), str::to_owned);
            for service in &cluster.services {
                let id = service.port_name(&service.ports[0]);
                let mut wanted: BTreeSet<String> = BTreeSet::new();
                for endpoint in &service.ports[0].endpoints {
                    if family.holds(endpoint.address) {
                        wanted.insert(std::net::SocketAddr::new(endpoint.address, endpoint.port).to_string());
                    }
                }
                let entry = format!("\"{id} cluster IP\"");
                let entry = chains["nat KUBE-SERVICES"].iter().find(|rule| rule.contains(&entry));
                prop_assert_eq!(entry.is_some(), !wanted.is_empty());
                let Some(chain) = entry.and_then(|rule| option(rule, "-j")) else {
                    let refused = format!("\"{id} has no endpoints\"");
                    let refused = chains["filter KUBE-SERVICES"].iter().any(|rule| rule.contains(&refused));
                    prop_assert!(refused);
                    continue;
                };
                let mut left = 1.0;
                let share = 1.0 / wanted.len() as f64;
                for rule in &chains[&format!("nat {chain}")] {
                    let target = option(rule, "-j").expect("a target");
                    if target == "KUBE-MARK-MASQ" {
                        continue;
                    }
                    let p = option(rule, "--probability").map_or(1.0, |p| p.parse().expect("a number"));
                    prop_assert!((left * p - share).abs() < 1e-9, "{}", rule);
                    left *= 1.0 - p;
                    let endpoint = &chains[&format!("nat {target}")];
                    prop_assert_eq!(endpoint.len(), 2);
                    let to = option(&endpoint[1], "--to-destination").expect("an endpoint");
                    prop_assert!(wanted.remove(to), "{} twice or unknown", to);
                }
                prop_assert!(wanted.is_empty(), "unreachable: {:?}", wanted);
                prop_assert!(left.abs() < 1e-9);
            }
        }
    }

    /// The numbers of rules are those of kube-proxy's own test of them
    /// (`number_generated_rules_test.go`: filter 4, nat 5 + services (2 + 3 endpoints)) and of the
    /// jumps, NodePorts and rejects on top.
    #[test]
    fn iptables_counts_follow_kube_proxys_formula(services in any_services()) {
        let set = render(&cluster_of(&services), &node(&[]), Mode::IptablesLegacy);
        let jumps = 14;
        // KUBE-FIREWALL has its rule, and NodePorts their localhost rule, in IPv4 only.
        let mut expected = 2 * (jumps + 3 + 5) + 1;
        for (_, node_port, endpoints) in services {
            let endpoints = u64::from(endpoints);
            let node_ports = u64::from(node_port.is_some());
            expected += if endpoints == 0 {
                2 * (1 + node_ports)
            } else {
                2 * (2 + 3 * endpoints + 3 * node_ports) + node_ports
            };
        }
        prop_assert_eq!(set.expected_counts().rules, expected);
    }

    /// Every Service has its map elements, its choice among all endpoints, and its hairpins.
    #[test]
    fn nftables_reaches_every_endpoint(services in any_services()) {
        let cluster = cluster_of(&services);
        let set = render(&cluster, &node(&["192.0.2.1", "2001:db8::1"]), Mode::Nftables);
        let mut elements = 0;
        let mut rules = 0;
        for family in Family::ALL {
            let table = scripted(nft_text(&set, family), family);
            elements += table.elements.values().map(BTreeSet::len).sum::<usize>();
            rules += table.rules.values().map(Vec::len).sum::<usize>();
            for (service, (protocol, node_port, _)) in cluster.services.iter().zip(&services) {
                let port = &service.ports[0];
                let name = names::nft_service_name("ns", &service.name, *protocol, &port.name);
                let wanted: BTreeSet<String> = port
                    .endpoints
                    .iter()
                    .filter(|endpoint| family.holds(endpoint.address))
                    .map(|endpoint| format!("{} . {}", endpoint.address, endpoint.port))
                    .collect();
                let Some(rules) = table.rules.get(&format!("service-{name}")) else {
                    prop_assert!(wanted.is_empty());
                    continue;
                };
                let (choice, map) = rules[0].split_once(" map { ").expect("a map");
                let modulus = format!("mod {}", wanted.len());
                prop_assert!(choice.ends_with(&modulus), "{}", choice);
                let mut found = BTreeSet::new();
                for (index, pair) in map.trim_end_matches(" }").split(", ").enumerate() {
                    let (key, endpoint) = pair.split_once(" : ").expect("a pair");
                    prop_assert_eq!(key, index.to_string());
                    found.insert(endpoint.to_owned());
                }
                prop_assert_eq!(found, wanted);
                let entry = format!(" . {protocol} . 80 : goto service-{name}");
                let entries = table.elements["service-ips"].iter().filter(|e| e.ends_with(&entry)).count();
                prop_assert_eq!(entries, 1);
                if let Some(node_port) = node_port {
                    let element = format!("{protocol} . {node_port} : goto external-{name}");
                    prop_assert!(table.elements["service-nodeports"].contains(&element));
                    prop_assert_eq!(&table.rules[&format!("external-{name}")][1], &format!("goto service-{name}"));
                }
            }
        }
        let counts = set.expected_counts();
        prop_assert_eq!(counts.rules, rules as u64);
        prop_assert_eq!(counts.elements, elements as u64);
    }

    /// One virtual server a ClusterIP port, one a node address and NodePort, and all endpoints
    /// behind each.
    #[test]
    fn ipvs_serves_every_endpoint(services in any_services()) {
        let cluster = cluster_of(&services);
        let node = node(&["192.0.2.1", "192.0.2.2", "2001:db8::1"]);
        let set = render(&cluster, &node, Mode::Ipvs);
        let (mut servers, mut reals) = (0, 0);
        for (_, node_port, endpoints) in &services {
            let v4 = 1 + 2 * u64::from(node_port.is_some());
            let v6 = 1 + u64::from(node_port.is_some());
            servers += v4 + v6;
            reals += (v4 + v6) * u64::from(*endpoints);
        }
        let counts = set.expected_counts();
        prop_assert_eq!((counts.virtual_servers, counts.real_servers), (servers, reals));
        prop_assert_eq!(counts.elements, ipvs::count_entries(sets_text(&set)));
        let entries: Vec<&str> = sets_text(&set).lines().filter(|l| l.starts_with("add ")).collect();
        let distinct: BTreeSet<&str> = entries.iter().copied().collect();
        prop_assert_eq!(entries.len(), distinct.len(), "ipset refuses an entry twice");
        prop_assert_eq!(update_servers(servers_text(&set), servers_text(&set)), "");
    }
}

#[test]
fn networks_are_parsed() {
    assert_eq!(
        "fd00::/56".parse::<Cidr>().expect("network").to_string(),
        "fd00::/56"
    );
    for wrong in ["10.0.0.0", "10.0.0.0/33", "x/8", "::/129"] {
        assert!(wrong.parse::<Cidr>().is_err(), "{wrong}");
    }
}
