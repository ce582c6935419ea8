//! IPVS servers and addresses over netlink, against what `ipvsadm` and `ip` show.

use std::fmt::Write as _;

use tracer::kernel::apply::{self, Applied, ApplyError, Incomplete, Left};
use tracer::kernel::netns::Netns;
use tracer::kernel::tool;
use tracer::rules::{Mode, RuleSet, Step};

/// What a real kube-proxy left: IPv4, IPv6, TCP, UDP, SCTP, persistence.
const REAL: &str = include_str!("../tracer/src/rules/fixtures/kube-proxy-1.36.2/ipvs/ipvsadm.save");

fn run(ns: &Netns, tool: &str, args: &str, input: &str) -> String {
    let args: Vec<&str> = args.split_whitespace().collect();
    tool::run(ns, tool, &args, input).expect("a tool")
}

/// A namespace with an address of its own: without any IPVS takes no real servers.
fn namespace(name: &str) -> Netns {
    let ns = Netns::create(name).expect("a namespace");
    run(&ns, "ip", "link set lo up", "");
    run(&ns, "ip", "address add 192.0.2.1/24 dev lo", "");
    ns
}

fn apply(ns: &Netns, steps: Vec<Step>) -> Result<Applied, ApplyError> {
    let mode = Mode::Ipvs;
    apply::apply(ns, &RuleSet { mode, steps })
}

fn servers(text: &str) -> Vec<Step> {
    let text = text.to_owned();
    vec![Step::Servers { text }]
}

fn incomplete(result: Result<Applied, ApplyError>) -> Box<Incomplete> {
    match result {
        Err(ApplyError::Incomplete(incomplete)) => incomplete,
        other => panic!("{other:?} is not incomplete"),
    }
}

/// The kernel lists servers by hash, so lines are sorted.
fn shown(ns: &Netns) -> Vec<String> {
    sorted(&run(ns, "ipvsadm", "-Sn", ""))
}

fn sorted(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text.lines().map(|line| line.trim().to_owned()).collect();
    lines.sort();
    lines
}

#[test]
fn ipvs_servers_over_netlink_are_what_ipvsadm_shows() {
    let ns = namespace("ipvs-real");
    let applied = apply(&ns, servers(REAL)).expect("apply");
    assert_eq!(shown(&ns), sorted(REAL));
    let step = &applied.steps[0];
    assert_eq!(step.entries, REAL.lines().count() as u64);
    assert!(step.sent_bytes > 50 * step.entries);

    let applied = apply(&ns, servers(REAL)).expect("apply again");
    assert_eq!(applied.steps[0].entries, 0, "nothing to change");
    assert_eq!(shown(&ns), sorted(REAL));
}

/// Everything that `ipvsadm -R` takes means the same over netlink.
#[test]
fn ipvs_servers_over_netlink_are_those_of_ipvsadm_restore() {
    let text = "-A -t 10.96.0.1:80 -s mh -b flag-1,flag-2\n\
                -a -t 10.96.0.1:80 -r 10.244.0.1:8080 -m -w 3\n\
                -a -t 10.96.0.1:80 -r 10.244.0.2:8080 -m -w 0 -x 100 -y 50\n\
                -A -t 10.96.0.2:80 -s rr -p 10800 -M 255.255.255.0\n\
                -a -t 10.96.0.2:80 -r 10.244.0.3:80 -g -w 1\n\
                -A -u 10.96.0.3:53 -s wlc -o\n\
                -A -t [fd00::1]:80 -s sh -p 60 -M 64\n\
                -a -t [fd00::1]:80 -r [fd00:244::1]:8080 -m -w 1\n\
                -A --sctp-service [fd00::1]:80 -s lc\n\
                -a --sctp-service [fd00::1]:80 -r [fd00:244::1]:8080 -m -w 65535\n";
    let ours = namespace("ipvs-netlink");
    apply(&ours, servers(text)).expect("apply");
    let theirs = namespace("ipvs-restore");
    run(&theirs, "ipvsadm", "-R", text);
    assert_eq!(shown(&ours), shown(&theirs));
    assert_eq!(shown(&ours).len(), text.lines().count());

    // What ipvsadm made is read as what netlink made.
    let applied = apply(&theirs, servers(text)).expect("apply");
    assert_eq!(applied.steps[0].entries, 0, "nothing to change");
}

/// The kernel keeps the servers of all namespaces in one table by address, those of one beside those of another.
#[test]
fn ipvs_servers_are_counted_beside_those_of_other_namespaces() {
    let text: String = (1..=60)
        .flat_map(|n| {
            [
                format!("-A -t 10.96.0.{}:80 -s rr\n", 4 * n),
                format!("-a -t 10.96.0.{}:80 -r 10.244.0.1:8080 -m -w 1\n", 4 * n),
            ]
        })
        .collect();
    let namespaces: Vec<Netns> = (0..4)
        .map(|n| namespace(&format!("ipvs-count-{n}")))
        .collect();
    for ns in &namespaces {
        apply(ns, servers(&text)).expect("apply");
    }
    for ns in &namespaces {
        let counts = apply::count(ns, Mode::Ipvs).expect("counts");
        assert_eq!((counts.virtual_servers, counts.real_servers), (60, 60));
    }
}

#[test]
fn ipvs_servers_are_changed_and_deleted() {
    let before = "-A -t 10.96.0.1:80 -s rr\n\
                  -a -t 10.96.0.1:80 -r 10.244.0.1:8080 -m -w 1\n\
                  -a -t 10.96.0.1:80 -r 10.244.0.2:8080 -m -w 1\n\
                  -A -u [fd00::1]:53 -s rr\n\
                  -a -u [fd00::1]:53 -r [fd00:244::1]:53 -m -w 1\n\
                  -A --sctp-service 10.96.0.2:5000 -s rr -p 10800\n\
                  -A -t 10.96.0.3:80 -s rr\n";
    let after = "-A -t 10.96.0.1:80 -s lc -p 300\n\
                 -a -t 10.96.0.1:80 -r 10.244.0.1:8080 -m -w 0\n\
                 -a -t 10.96.0.1:80 -r 10.244.0.3:8080 -m -w 1\n\
                 -A --sctp-service 10.96.0.2:5000 -s rr\n\
                 -a --sctp-service 10.96.0.2:5000 -r 10.244.0.1:5000 -m -w 1\n\
                 -A -t 10.96.0.3:80 -s rr\n";
    let ns = namespace("ipvs-change");
    // Whoever made it: kube-proxy's sync leaves nothing beside its own, but for firewall marks.
    run(&ns, "ipvsadm", "-A -f 7 -s rr", "");
    run(&ns, "ipvsadm", "-A -t 10.96.0.99:80 -s rr", "");
    apply(&ns, servers(before)).expect("apply");
    let with_mark = |text: &str| sorted(&format!("{text}-A -f 7 -s rr\n"));
    assert_eq!(shown(&ns), with_mark(before));
    let applied = apply(&ns, servers(after)).expect("apply");
    // Edited: two servers and a real one; added: two; deleted: a real one and a server.
    assert_eq!(applied.steps[0].entries, 7);
    assert_eq!(shown(&ns), with_mark(after));
    apply(&ns, servers("")).expect("apply");
    assert_eq!(shown(&ns), with_mark(""));
}

/// More than fit into one batch.
#[test]
fn thousands_of_ipvs_servers_go_in() {
    let mut text = String::new();
    for n in 0..1000 {
        let key = format!("-t 10.96.{}.{}:80", n / 250, n % 250 + 1);
        writeln!(text, "-A {key} -s rr").expect("String");
        for real in 1..=3 {
            let port = 8000 + n;
            writeln!(text, "-a {key} -r 10.244.{real}.1:{port} -m -w 1").expect("String");
        }
    }
    let ns = namespace("ipvs-thousands");
    let applied = apply(&ns, servers(&text)).expect("apply");
    assert_eq!(applied.steps[0].entries, 4000);
    assert_eq!(shown(&ns), sorted(&text));
}

/// Entries go their own way: the report names what was refused, and why.
#[test]
fn refused_ipvs_servers_are_named() {
    let mut good = String::new();
    for n in 1..=200 {
        writeln!(good, "-A -t 10.96.1.{n}:80 -s rr").expect("String");
    }
    let bad = "-A -t 10.96.0.1:80 -s nope\n\
               -a -t 10.96.0.1:80 -r 10.244.0.1:80 -m -w 1\n\
               -A -t 10.96.0.2:80 -s rr\n\
               -a -t 10.96.0.2:80 -r 224.0.0.1:80 -m -w 1\n\
               -a -t 10.96.0.2:80 -r 224.0.0.2:80 -m -w 1\n";
    let tail = "-A -t 10.96.2.1:80 -s rr\n";
    let ns = namespace("ipvs-refused");
    let mut steps = servers(&format!("{good}{bad}{tail}"));
    steps.push(Step::Addresses {
        addresses: Vec::new(),
    });
    let failure = incomplete(apply(&ns, steps));
    assert_eq!(
        failure.left,
        Left::Entries {
            refused: 4,
            of: 206
        }
    );
    assert_eq!(failure.not_tried, ["addresses of kube-ipvs0"]);
    let text = failure.to_string();
    for words in [
        "-A -t 10.96.0.1:80 -s nope",
        "modprobe ip_vs_nope",
        "-a -t 10.96.0.1:80 -r 10.244.0.1:80",
        "its virtual server is not there",
        "-r 224.0.0.1:80",
        "and 1 more",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let there = format!("{good}-A -t 10.96.0.2:80 -s rr\n{tail}");
    assert_eq!(shown(&ns), sorted(&there), "all others are in");

    let failure = incomplete(apply(&ns, servers(&format!("{good}-A -t nowhere -s rr\n"))));
    assert_eq!(failure.left, Left::Nothing);
    let text = failure.to_string();
    assert!(
        text.contains("line 201") && text.contains("nowhere"),
        "{text}"
    );
    assert_eq!(shown(&ns), sorted(&there), "nothing was touched");
}

fn bound(ns: &Netns) -> Vec<String> {
    let listed = run(ns, "ip", "-o address show dev kube-ipvs0", "");
    let mut addresses: Vec<String> = listed
        .lines()
        .filter_map(|line| line.split_whitespace().nth(3))
        .map(str::to_owned)
        .collect();
    addresses.sort();
    addresses
}

#[test]
fn addresses_are_bound_in_batches() {
    let ns = namespace("ipvs-addresses");
    let wanted = |from: u8, to: u8| -> Vec<Step> {
        let addresses = (from..=to).flat_map(|n| {
            [
                [10, 96, 0, n].into(),
                [0xfd00, 0x96, 0, 0, 0, 0, 0, u16::from(n)].into(),
            ]
        });
        let addresses = addresses.collect();
        vec![Step::Addresses { addresses }]
    };
    let expected = |from: u8, to: u8| -> Vec<String> {
        let mut all: Vec<String> = (from..=to)
            .flat_map(|n| [format!("10.96.0.{n}/32"), format!("fd00:96::{n:x}/128")])
            .collect();
        all.sort();
        all
    };
    let applied = apply(&ns, wanted(1, 200)).expect("apply");
    assert_eq!(applied.steps[0].entries, 400);
    assert_eq!(bound(&ns), expected(1, 200));
    let link = run(&ns, "ip", "-o link show dev kube-ipvs0", "");
    assert!(link.contains("NOARP") && !link.contains(",UP"), "{link}");

    let applied = apply(&ns, wanted(101, 250)).expect("apply");
    assert_eq!(applied.steps[0].entries, 300);
    assert_eq!(bound(&ns), expected(101, 250));
    let applied = apply(&ns, wanted(101, 250)).expect("apply");
    assert_eq!(applied.steps[0].entries, 0);

    let mut steps = wanted(101, 251);
    let Some(Step::Addresses { addresses }) = steps.first_mut() else {
        panic!("one step");
    };
    addresses.insert(3, [0xff02, 0, 0, 0, 0, 0, 0, 1].into());
    let failure = incomplete(apply(&ns, steps));
    assert_eq!(failure.left, Left::Entries { refused: 1, of: 3 });
    assert!(
        failure.to_string().contains("address add ff02::1"),
        "{failure}"
    );
    assert_eq!(bound(&ns), expected(101, 251), "the others are in");
}
