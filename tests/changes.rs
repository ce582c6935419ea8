//! Who changed rules: tools run by a process whose name is known, in a namespace of our own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tracer::cluster::{Cluster, Family, Protocol, random};
use tracer::kernel::clock::monotonic_ns;
use tracer::kernel::netns::Netns;
use tracer::kernel::{apply, dump, tool};
use tracer::probe::rule_changes::{Record, RuleChangeProbes, Way};
use tracer::rules::services::{self, Found, FoundService, FrontendKind};
use tracer::rules::{Mode, NodeView, Step, render, sync};
use tracer::trace::changes::{RuleChange, SetDelta, Watcher, What};
use tracer::trace::session::{Event, Options, Session};

/// Longer than anything here takes on a machine under load.
const PATIENCE: Duration = Duration::from_secs(20);
/// What the parent of the tools is called.
const PARENT: &str = "kube-proxy";

/// A folder of this test's own, which goes with it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("svcpath-changes-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).expect("writable");
        let shell = ["/bin/sh", "/usr/bin/sh"]
            .into_iter()
            .find(|sh| Path::new(sh).exists());
        symlink(shell.expect("a shell"), folder.join(PARENT)).expect("writable");
        Self(folder)
    }

    fn file(&self, name: &str, content: &str) -> String {
        let path = self.0.join(name);
        fs::write(&path, content).expect("writable");
        path.display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A command that ran: its process and its parent's, and when.
#[derive(Clone, Copy, Debug)]
struct Made {
    pid: u32,
    parent: u32,
    begin_ns: u64,
    end_ns: u64,
}

/// Runs a command in a namespace, by a shell that is called as kube-proxy is; both have ended.
fn make(ns: &Netns, folder: &Folder, command: &str) -> Made {
    let begin_ns = monotonic_ns();
    let shell = folder.0.join(PARENT).display().to_string();
    let child = ns
        .command(&shell)
        .args(["-c", &format!("{command} 2>/dev/null & echo $!; wait $!")])
        .stdout(Stdio::piped())
        .spawn()
        .expect("a shell");
    let parent = child.id();
    let output = child.wait_with_output().expect("it ends");
    let pid = String::from_utf8_lossy(&output.stdout);
    Made {
        pid: pid.trim().parse().expect("a process"),
        parent,
        begin_ns,
        end_ns: monotonic_ns(),
    }
}

/// What a command prints.
fn ask(ns: &Netns, program: &str, arguments: &[&str]) -> String {
    let output = ns.command(program).args(arguments).output().expect("runs");
    assert!(output.status.success(), "{program}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The kernel's entries of a table as `iptables-legacy-save` shows it: rules; a policy each chain that the
/// kernel has itself, a head and an end each other one; and the table's end.
fn entries(saved: &str) -> u32 {
    let lines = || saved.lines();
    let rules = lines().filter(|line| line.starts_with("-A")).count();
    let (own, others): (Vec<&str>, Vec<&str>) = lines()
        .filter(|line| line.starts_with(':'))
        .partition(|line| !line.contains(" - ["));
    u32::try_from(rules + own.len() + 2 * others.len() + 1).expect("few")
}

/// Everything that was heard until now.
fn heard(mut watcher: Watcher) -> Vec<RuleChange> {
    watcher.stop();
    assert_eq!(watcher.listening().lost, 0);
    watcher.drain().expect("hears")
}

/// What is heard of everything until now, which takes as long as a busy machine takes.
fn heard_so_far(watcher: &Watcher) -> Vec<RuleChange> {
    let now = monotonic_ns();
    let deadline = Instant::now() + PATIENCE;
    while watcher.told_until_ns(now) < now {
        assert!(Instant::now() < deadline, "no end of it is heard");
        std::thread::sleep(Duration::from_millis(10));
    }
    watcher.drain().expect("hears")
}

/// Did this command make this change?
fn assert_credited(change: &RuleChange, made: Made, name: &str) {
    let by = &change.by;
    assert_eq!(by.name.as_deref(), Some(name), "{change}");
    assert_eq!(by.pid, Some(made.pid), "{change}");
    assert_eq!(
        by.parent,
        Some((made.parent, PARENT.to_owned())),
        "{change}"
    );
    let begin = change.begin_ns.expect("seen");
    assert!(
        made.begin_ns <= begin && begin < change.time_ns && change.time_ns <= made.end_ns,
        "{change}: {} to {}, in {made:?}",
        begin,
        change.time_ns
    );
}

fn watch(ns: &Netns, way: Option<Way>) -> Watcher {
    let probes = match way {
        None => RuleChangeProbes::attach(ns),
        Some(way) => RuleChangeProbes::attach_by(ns, way),
    };
    Watcher::start_with(ns, Ok(probes.expect("attaches"))).expect("hears")
}

const NAT: &str = "*nat\n:KUBE-SERVICES - [0:0]\n-A OUTPUT -j KUBE-SERVICES\n-A KUBE-SERVICES -d \
    10.96.0.1/32 -j RETURN\n-A KUBE-SERVICES -d 10.96.0.2/32 -j RETURN\nCOMMIT\n";

/// iptables-legacy, iptables-nft, nft, ipset and addresses: each change is told once, with who made it,
/// when and what; what fails is told as failed, and what others do elsewhere is not told.
pub fn every_change_is_credited(way: Option<Way>) {
    let folder = Folder::new();
    let ns = Netns::create("changes").expect("root");
    let elsewhere = Netns::create("elsewhere").expect("root");
    ask(&ns, "ip", &["link", "set", "lo", "up"]);
    let nat = folder.file("nat", NAT);
    let table = folder.file(
        "nft",
        "table ip kube-proxy {\n set ips { type ipv4_addr; elements = { 10.96.0.1, 10.96.0.2, \
         10.96.0.3 }; }\n chain c { ip daddr { 10.0.0.1, 10.0.0.2 } accept; accept; }\n}\n",
    );
    let adds: Vec<String> = (0..300)
        .map(|i| format!("add ips 10.0.{}.{}\n", i / 250, i % 250))
        .collect();
    let sets = folder.file("ipset", &format!("create ips hash:ip\n{}", adds.concat()));
    let legacy_restore = format!("iptables-legacy-restore <{nat}");
    let nft_restore = format!("iptables-nft-restore <{nat}");

    let watcher = watch(&ns, way);
    let legacy = make(&ns, &folder, &legacy_restore);
    let legacy_entries = entries(&ask(&ns, "iptables-legacy-save", &["-t", "nat"]));
    let nft = make(&ns, &folder, &nft_restore);
    let nft_saved = ask(&ns, "iptables-nft-save", &["-t", "nat"]);
    let nft_rules = nft_saved
        .lines()
        .filter(|line| line.starts_with("-A"))
        .count() as u64;
    let own = make(&ns, &folder, &format!("nft -f {table}"));
    let refused = make(&ns, &folder, "nft delete table ip no-such");
    for command in [
        &legacy_restore,
        &nft_restore,
        &format!("ipset restore <{sets}"),
    ] {
        make(&elsewhere, &folder, command);
    }
    make(&elsewhere, &folder, "ip addr add 10.9.9.9/32 dev lo");
    let ipset = make(&ns, &folder, &format!("ipset restore <{sets}"));
    let added = make(&ns, &folder, "ip addr add 10.9.9.9/32 dev lo");
    let again = make(&ns, &folder, "ip addr add 10.9.9.9/32 dev lo");
    let six = make(&ns, &folder, "ip addr add fd00::9/64 dev lo");
    let flushed = make(&ns, &folder, "iptables-legacy -t nat -F KUBE-SERVICES");
    let mut changes = heard(watcher);
    changes.sort_by_key(|change| change.time_ns);
    let said: Vec<String> = changes.iter().map(ToString::to_string).collect();
    let [
        replaced,
        translated,
        loaded,
        failed,
        filled,
        bound,
        doubled,
        bound6,
        emptied,
    ] = &changes[..]
    else {
        panic!("{said:#?}");
    };

    assert_credited(replaced, legacy, "iptables-legacy-restore");
    let legacy_table = |before, after| What::IptablesLegacy {
        family: "IPv4".to_owned(),
        table: "nat".to_owned(),
        before,
        after,
    };
    // A new table of nat has four chains' policies and its end.
    assert_eq!(replaced.what, legacy_table(5, legacy_entries));
    assert_eq!(legacy_entries, 10);

    assert_credited(translated, nft, "iptables-nft-restore");
    let tables = |change: &RuleChange| match &change.what {
        What::Nftables { tables, .. } => tables.clone(),
        _ => panic!("{change}"),
    };
    assert_eq!(
        tables(translated)["ip nat"].rules,
        Some((0, nft_rules)),
        "{translated}"
    );
    assert_eq!(tables(translated)["ip nat"].rules_added, 3);

    assert_credited(loaded, own, "nft");
    let delta = tables(loaded)["ip kube-proxy"];
    assert_eq!(
        (delta.rules, delta.elements),
        (Some((0, 2)), Some((0, 3))),
        "{loaded}"
    );
    assert!(!loaded.incomplete);

    assert_credited(failed, refused, "nft");
    assert!(failed.is_refused() && tables(failed).is_empty(), "{failed}");

    assert_credited(filled, ipset, "ipset");
    let What::Ipset { sets } = &filled.what else {
        panic!("{filled}");
    };
    let expected = SetDelta {
        created: 1,
        added: 300,
        ..SetDelta::default()
    };
    assert_eq!((sets.len(), sets["ips"]), (1, expected), "{filled}");

    let added_to = |change: &RuleChange, link: &str| match &change.what {
        What::Addresses { links } => links[link].added.iter().cloned().collect::<Vec<_>>(),
        _ => panic!("{change}"),
    };
    assert_credited(bound, added, "ip");
    assert_eq!(added_to(bound, "lo"), ["10.9.9.9/32"]);
    assert_credited(doubled, again, "ip");
    assert!(doubled.is_refused(), "{doubled}");
    assert_credited(bound6, six, "ip");
    assert_eq!(added_to(bound6, "lo"), ["fd00::9/64"]);

    assert_credited(emptied, flushed, "iptables-legacy");
    assert_eq!(emptied.what, legacy_table(10, 8));
}

/// Requests with `-exist` that change nothing are not told, as kube-proxy's at every sync; those that do
/// are, with what they changed.
pub fn what_leaves_sets_as_they_were_is_no_change() {
    let folder = Folder::new();
    let ns = Netns::create("changes").expect("root");
    ask(&ns, "ipset", &["create", "S", "hash:ip"]);
    ask(&ns, "ipset", &["add", "S", "10.0.0.1"]);
    let watcher = watch(&ns, None);
    let idle = folder.file("idle", "create S hash:ip\nadd S 10.0.0.1\n");
    let busy = folder.file(
        "busy",
        "create S hash:ip\ncreate T hash:ip\nadd S 10.0.0.1\nadd S 10.0.0.2\nadd S 10.0.0.3\n",
    );
    for command in [
        "ipset create S hash:ip -exist",
        "ipset add S 10.0.0.1 -exist",
        &format!("ipset restore -exist <{idle}"),
    ] {
        make(&ns, &folder, command);
    }
    // Who did what is certain if it has been counted in between.
    let mut changes = heard_so_far(&watcher);
    let restored = make(&ns, &folder, &format!("ipset restore -exist <{busy}"));
    changes.extend(heard_so_far(&watcher));
    let deleted = make(&ns, &folder, "ipset del S 10.0.0.2 -exist");
    changes.extend(heard_so_far(&watcher));
    make(&ns, &folder, "ipset del S 10.0.0.2 -exist");
    changes.extend(heard(watcher));
    let said: Vec<String> = changes.iter().map(ToString::to_string).collect();
    let [more, fewer] = &changes[..] else {
        panic!("{said:#?}");
    };
    assert_credited(more, restored, "ipset");
    assert_credited(fewer, deleted, "ipset");
    let delta = |created, added, deleted| SetDelta {
        created,
        added,
        deleted,
        ..SetDelta::default()
    };
    let sets = |sets: &[(&str, SetDelta)]| What::Ipset {
        sets: sets
            .iter()
            .map(|(name, delta)| ((*name).to_owned(), *delta))
            .collect(),
    };
    let both = [("S", delta(0, 2, 0)), ("T", delta(1, 0, 0))];
    assert_eq!(more.what, sets(&both), "{said:#?}");
    assert_eq!(fewer.what, sets(&[("S", delta(0, 0, 1))]), "{said:#?}");
}

/// One process commits table after table, with messages that have the same numbers in each, asks for chains that
/// are not there meanwhile, and has nothing to change in the first one.
pub fn tables_of_one_process_are_told_apart(way: Option<Way>) {
    let folder = Folder::new();
    let ns = Netns::create("tables").expect("root");
    let rules: Vec<String> = (0..50)
        .map(|n| format!("-A KUBE-TEST -d 10.96.0.{n}/32 -j RETURN\n"))
        .collect();
    let rules = rules.concat();
    let table = |name: &str, rules: &str| format!("*{name}\n:KUBE-TEST - [0:0]\n{rules}COMMIT\n");
    let file = folder.file(
        "rules",
        &[
            table("mangle", ""),
            table("filter", &rules),
            table("nat", &rules),
        ]
        .concat(),
    );
    let restore = format!("iptables-nft-restore --noflush <{file}");
    make(&ns, &folder, &restore);
    let watcher = watch(&ns, way);
    let made = make(&ns, &folder, &restore);
    let told = heard(watcher);
    let tables: Vec<Vec<&str>> = told
        .iter()
        .map(|change| match &change.what {
            What::Nftables { tables, .. } => tables.keys().map(String::as_str).collect(),
            _ => panic!("{change}"),
        })
        .collect();
    assert_eq!(tables, [["ip filter"], ["ip nat"]], "{told:#?}");
    for change in &told {
        assert_credited(change, made, "iptables-nft-restore");
        assert!(change.refused.is_empty(), "{change}");
    }
    assert!(
        told[0].time_ns < told[1].begin_ns.expect("seen"),
        "{told:#?}"
    );
}

/// IPVS' servers, and the addresses on kube-ipvs0: one by one by netlink, and all together with the link.
pub fn every_change_of_ipvs_is_credited(way: Option<Way>) {
    let folder = Folder::new();
    let ns = Netns::create("changes").expect("root");
    let elsewhere = Netns::create("elsewhere").expect("root");
    let servers: Vec<String> = (1..=40)
        .map(|i| {
            format!("-A -t 10.96.0.{i}:80 -s rr\n-a -t 10.96.0.{i}:80 -r 10.0.0.{i}:80 -m -w 1\n")
        })
        .collect();
    let servers = folder.file("ipvs", &servers.concat());
    let restore = format!("ipvsadm -R <{servers}");
    let addresses: Vec<String> = (1..=40)
        .map(|i| format!("address add 10.96.0.{i}/32 dev kube-ipvs0\n"))
        .collect();
    let batch = folder.file("addresses", &addresses.concat());

    // While lo is down there are no local routes, without which IPVS refuses every real server.
    ask(&ns, "ip", &["link", "set", "lo", "up"]);
    let watcher = watch(&ns, way);
    let first = make(&ns, &folder, &restore);
    make(&elsewhere, &folder, &restore);
    let again = make(&ns, &folder, "ipvsadm -A -t 10.96.0.1:80 -s rr");
    make(&ns, &folder, "ip link add kube-ipvs0 type dummy");
    let bound = make(&ns, &folder, &format!("ip -batch {batch}"));
    let gone = make(&ns, &folder, "ip link del kube-ipvs0");
    let flushed = make(&ns, &folder, "ipvsadm -C");
    let mut changes = heard(watcher);
    changes.sort_by_key(|change| change.time_ns);
    let said: Vec<String> = changes.iter().map(ToString::to_string).collect();
    let [filled, refused, added, deleted, emptied] = &changes[..] else {
        panic!("{said:#?}");
    };
    assert_credited(filled, first, "ipvsadm");
    let delta = |change: &RuleChange| match &change.what {
        What::Ipvs(delta) => delta.clone(),
        _ => panic!("{change}"),
    };
    let servers = delta(filled);
    assert_eq!(
        (servers.servers_added, servers.reals_added),
        (40, 40),
        "{filled}"
    );
    assert_eq!(servers.servers.len(), 40);
    assert!(servers.servers.contains("10.96.0.7:80/TCP"), "{filled}");
    assert_credited(refused, again, "ipvsadm");
    assert!(refused.is_refused(), "{refused}");
    let link = |change: &RuleChange| match &change.what {
        What::Addresses { links } => links["kube-ipvs0"].clone(),
        _ => panic!("{change}"),
    };
    assert_credited(added, bound, "ip");
    let bound = link(added);
    assert!(bound.virtual_ips && bound.deleted.is_empty(), "{added}");
    assert_eq!(bound.added.len(), 40, "{added}");
    assert_credited(deleted, gone, "ip");
    assert_eq!(link(deleted).deleted, bound.added, "{deleted}");
    assert_credited(emptied, flushed, "ipvsadm");
    assert_eq!(delta(emptied).flushed, 1, "{emptied}");
}

/// Who made a change is known though the process and its parent are gone before anybody looks.
pub fn who_is_gone_is_known() {
    let folder = Folder::new();
    let ns = Netns::create("changes").expect("root");
    let mut probes = RuleChangeProbes::attach(&ns).expect("attaches");
    let made = make(&ns, &folder, "iptables-legacy -A INPUT -j ACCEPT");
    assert!(!Path::new(&format!("/proc/{}", made.parent)).exists());
    let begin = probes.drain().into_iter().find_map(|record| match record {
        Record::Begin(begin, _) => Some(begin),
        _ => None,
    });
    let begin = begin.expect("a request");
    assert_eq!(
        (begin.thread >> 32, begin.parent),
        (made.pid.into(), made.parent)
    );
    assert!(begin.parent_name.starts_with(b"kube-proxy\0"));
}

/// The pod of a process is known by the cgroup that it is in. Makes cgroups: only for a machine of its own.
pub fn the_pod_is_known() {
    const UID: &str = "2f6b1d0c-9e2a-4d9e-8a55-0123456789ab";
    let folder = Folder::new();
    let ns = Netns::create("changes").expect("root");
    let root = folder.0.join("cgroup");
    fs::create_dir_all(&root).expect("writable");
    let root = root.display();
    ask(&ns, "mount", &["-t", "cgroup2", "none", &root.to_string()]);
    let pod = format!("kubepods.slice/kubepods-pod{}.slice", UID.replace('-', "_"));
    fs::create_dir_all(format!("{root}/{pod}/cri-1.scope")).expect("writable");
    let watcher = watch(&ns, None);
    let script = format!(
        "echo $$ >{root}/{pod}/cri-1.scope/cgroup.procs; iptables-legacy -A INPUT -j ACCEPT; true"
    );
    ask(&ns, "sh", &["-ec", &script]);
    let changes = heard(watcher);
    ask(&ns, "umount", &[&root.to_string()]);
    let by = &changes[0].by;
    assert_eq!(by.cgroup, Some(format!("/{pod}/cri-1.scope")));
    assert_eq!(by.pod.as_deref(), Some(UID));
    let said = changes[0].to_string();
    assert!(
        said.contains(&format!(", pod {UID}) committed filter: 4 → 5 entries")),
        "{said}"
    );
}

/// Of what the kernel announces to nobody the rules are read again too.
pub fn rules_are_read_again_after_a_legacy_flush() {
    let node = crate::trace::node(Mode::IptablesLegacy);
    let mut session = Session::start(node.lab.node(), Options::default()).expect("attaches");
    let flushed = node
        .lab
        .node()
        .command("iptables-legacy")
        .args(["-t", "nat", "-F"])
        .status()
        .expect("runs");
    assert!(flushed.success());
    let begin = Instant::now();
    let (mut told, mut gone) = (None, 0);
    while gone == 0 {
        assert!(
            begin.elapsed() < PATIENCE,
            "the rules were never read again"
        );
        for event in session.poll().expect("polls") {
            match event {
                Event::RuleChange(change) => told = Some(change),
                Event::Services { gone: now, .. } => gone = now,
                _ => {}
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let change = told.expect("told");
    let What::IptablesLegacy { before, after, .. } = change.what else {
        panic!("{change}");
    };
    assert!(after < before, "{before} {after}");
    let (_, summary) = session.finish().expect("ends");
    assert_eq!(summary.rule_changes.len(), 1);
    assert!(summary.listening.probes.is_some() && summary.listening.lost == 0);
}

/// What ipset did is told once its process has paused: after what came later. A trace has both in the order of time.
pub fn changes_are_in_the_order_of_time() {
    let node = crate::trace::node(Mode::IptablesLegacy);
    let ns = node.lab.node();
    let mut session = Session::start(ns, Options::default()).expect("attaches");
    ask(ns, "ipset", &["create", "S", "hash:ip"]);
    ask(
        ns,
        "iptables-legacy",
        &["-A", "FORWARD", "-s", "192.0.2.99"],
    );
    let begin = Instant::now();
    let mut told = 0;
    while told < 2 {
        assert!(begin.elapsed() < PATIENCE, "only {told} were told");
        let events = session.poll().expect("polls").into_iter();
        told += events
            .filter(|event| matches!(event, Event::RuleChange(_)))
            .count();
        std::thread::sleep(Duration::from_millis(1));
    }
    let (_, summary) = session.finish().expect("ends");
    let [ipset, iptables] = &summary.rule_changes[..] else {
        panic!("{summary}");
    };
    assert!(ipset.time_ns < iptables.time_ns, "{summary}");
    assert!(matches!(ipset.what, What::Ipset { .. }), "{summary}");
}

/// What a trace knows of a Service: what is asked (and whether it is refused), what is served, and its endpoints.
type Said = (
    BTreeSet<(bool, Option<IpAddr>, u16, bool)>,
    BTreeSet<(Option<IpAddr>, u16)>,
    BTreeSet<SocketAddr>,
    BTreeSet<SocketAddr>,
);

fn said(found: &Found) -> BTreeMap<(String, Protocol, Family), Said> {
    let one = |service: &FoundService| {
        let frontends = service.frontends.iter().map(|frontend| {
            let inside = frontend.kind == FrontendKind::ClusterIp;
            let refused = frontend.refusal.is_some();
            (inside, frontend.address, frontend.port, refused)
        });
        // Who serves nobody has endpoints or not: nobody goes there.
        let served = !service.served.is_empty();
        let endpoints = |list: &[SocketAddr]| list.iter().copied().filter(|_| served).collect();
        let (all, local) = (&service.endpoints, &service.local_endpoints);
        let frontends = frontends.collect();
        (
            frontends,
            service.served.clone(),
            endpoints(all),
            endpoints(local),
        )
    };
    let name = |service: &FoundService| service.name.clone().expect("nftables mode has names");
    let services = found.services.iter();
    services
        .map(|service| {
            let key = (name(service), service.protocol, service.family);
            (key, one(service))
        })
        .collect()
}

/// Another cluster made of this one: some Services are others', some are gone, some have no endpoints.
fn altered(cluster: &Cluster, step: u64) -> Cluster {
    let others = random::cluster(
        100 + step,
        u16::try_from(cluster.services.len()).expect("few"),
    );
    let mut altered = cluster.clone();
    altered.services.clear();
    for (index, (one, other)) in (0..).zip(cluster.services.iter().zip(others.services)) {
        let mut service = match (index * 7 + step * 5) % 8 {
            0 | 1 => other,
            2 => continue,
            _ => one.clone(),
        };
        if (index + step) % 8 == 3 {
            for port in &mut service.ports {
                port.endpoints.clear();
            }
        }
        altered.services.push(service);
    }
    altered
}

/// After each of many syncs of nftables mode what is known by their announcements is what reading all rules tells.
pub fn what_a_sync_changes_is_known_without_reading(syncs: u64) {
    let mode = Mode::Nftables;
    let ns = Netns::create("syncs").expect("root");
    ask(&ns, "ip", &["link", "set", "lo", "up"]);
    let first = random::cluster(7, 40);
    let mut view = NodeView::of(&first, random::NODE).expect("worker-0 is one of the nodes");
    view.cluster_cidrs = random::CLUSTER_CIDRS.into();
    apply::apply(&ns, &render(&first, &view, mode)).expect("rules");
    let read = || services::read(&dump::dump(&ns).expect("a dump")).expect("is understood");
    let watcher = watch(&ns, None);
    let mut found = read();
    let (mut before, mut changed) = (first.clone(), 0);
    let patch = |found: &mut Found, changed: &mut u64| {
        let (done, begin) = (monotonic_ns(), Instant::now());
        while watcher.told_until_ns(monotonic_ns()) <= done {
            assert!(begin.elapsed() < PATIENCE, "it is never told");
            std::thread::sleep(Duration::from_millis(1));
        }
        for news in watcher.drain_news() {
            let Some(patch) = &news.patch else {
                return false;
            };
            *changed += 1;
            if !found.apply(patch) {
                return false;
            }
        }
        true
    };
    for step in 0..syncs {
        let after = altered(&first, step);
        for step in sync(&before, &after, &view, mode).steps {
            if let Step::Nft { text, .. } = step {
                tool::run(&ns, "nft", &["-f", "-"], &text).expect("a sync");
            }
        }
        assert!(
            patch(&mut found, &mut changed),
            "sync {step} is not understood"
        );
        let (patched, read) = (said(&found), said(&read()));
        for (service, wanted) in &read {
            assert_eq!(
                patched.get(service),
                Some(wanted),
                "sync {step}: {service:?}"
            );
        }
        assert_eq!(patched.len(), read.len(), "sync {step}");
        before = after;
    }
    assert!(changed >= 2 * syncs, "{changed} transactions");
    // What kube-proxy does not do is not understood: one more rule in a Service's chain.
    let chain = ask(&ns, "nft", &["list", "chains", "ip"]);
    let chain = chain
        .lines()
        .filter_map(|line| line.trim().strip_prefix("chain ")?.strip_suffix(" {"))
        .find(|chain| chain.starts_with("service-"));
    let rule = format!("add rule ip kube-proxy {} accept", chain.expect("a chain"));
    ask(&ns, "nft", &[&rule]);
    assert!(!patch(&mut found, &mut changed));
}
