//! `svcpath rules` as its users meet it. Needs no root: everything is read from files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_svcpath");
const CIDRS: &str = "10.244.0.0/16,fd00:10:244::/56";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/rules/fixtures/kube-proxy-1.36.2")
}

fn rules(arguments: &[&str]) -> Output {
    Command::new(PROGRAM)
        .arg("rules")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("the program starts")
}

fn check(mode: &str, cluster: &Path, dump: &Path) -> Output {
    let (cluster, dump) = (cluster.to_string_lossy(), dump.to_string_lossy());
    rules(&[
        "check",
        "--cluster",
        &cluster,
        "--node",
        "worker-0",
        "--mode",
        mode,
        "--cluster-cidr",
        CIDRS,
        "--node-address",
        "172.31.255.2,10.0.2.15",
        "--dump",
        &dump,
    ])
}

fn said(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8(text).expect("UTF-8")
}

/// Fails with this exit code and one line that has these words.
fn fails(output: &Output, code: i32, words: &[&str]) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(!error.contains("panicked"), "{error}");
    for word in words {
        assert!(error.contains(word), "no '{word}' in: {error}");
    }
}

/// The folder of dumps of a mode, with one file changed.
fn changed(mode: &str, file: &str, change: impl FnOnce(String) -> String) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for entry in fs::read_dir(fixtures().join(mode)).expect("fixtures") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("it copies");
    }
    let path = folder.path().join(file);
    let text = fs::read_to_string(&path).expect("a dump");
    fs::write(&path, change(text)).expect("it is written");
    folder
}

#[test]
fn real_dumps_are_clean() {
    let cluster = fixtures().join("cluster.json");
    for mode in ["iptables-legacy", "iptables-nft", "nftables", "ipvs"] {
        let output = check(mode, &cluster, &fixtures().join(mode));
        assert_eq!(output.status.code(), Some(0), "{mode}: {}", said(&output));
        assert!(said(&output).contains("no difference (15 Services"));
    }
}

#[test]
fn a_changed_dump_names_the_service() {
    let cluster = fixtures().join("cluster.json");
    let without_web = |text: String| {
        let lines = text.lines().filter(|line| !line.contains("10.96.10.1"));
        lines.fold(String::new(), |all, line| all + line + "\n")
    };
    for (mode, file) in [
        ("iptables-nft", "iptables.save"),
        ("nftables", "nft-ip.txt"),
        ("ipvs", "ipvsadm.save"),
    ] {
        let folder = match mode {
            // There an element shares its line with others.
            "nftables" => changed(mode, file, |text| {
                text.replace("10.96.10.1 . tcp", "10.96.10.9 . tcp")
            }),
            _ => changed(mode, file, without_web),
        };
        let output = check(mode, &cluster, folder.path());
        assert_eq!(output.status.code(), Some(1), "{mode}: {}", said(&output));
        assert!(
            said(&output).contains("shop/web:http"),
            "{mode}: {}",
            said(&output)
        );
        assert!(
            said(&output).contains("missing"),
            "{mode}: {}",
            said(&output)
        );
    }
}

#[test]
fn what_was_rendered_can_be_walked_and_read_back() {
    let cluster = fixtures().join("cluster.json");
    for mode in ["iptables", "nftables", "ipvs"] {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("rules");
        let output = rules(&[
            "render",
            "--cluster",
            &cluster.to_string_lossy(),
            "--node",
            "worker-0",
            "--mode",
            mode,
            "--cluster-cidr",
            CIDRS,
            "--service-cidr",
            "10.96.0.0/12,fd00:10:96::/108",
            "--node-address",
            "172.31.255.2,10.0.2.15",
            "-o",
            &dir.to_string_lossy(),
        ]);
        assert!(output.status.success(), "{}", said(&output));
        // What iptables-restore takes is not what iptables-save prints: that can be walked only.
        if mode == "nftables" {
            let output = check(mode, &cluster, &dir);
            assert_eq!(output.status.code(), Some(0), "{mode}: {}", said(&output));
        }
        let output = rules(&[
            "walk",
            "--dump",
            &dir.to_string_lossy(),
            "--from",
            "10.244.0.7",
            "--to",
            "10.96.10.1:80/tcp",
        ]);
        assert!(output.status.success(), "{}", said(&output));
        for endpoint in ["10.244.0.11:8080", "10.244.0.12:8080", "10.244.1.13:8080"] {
            let line = format!("= 33.333333 %  endpoint {endpoint}, not masqueraded");
            assert!(said(&output).contains(&line), "{mode}: {}", said(&output));
        }
        let output = rules(&[
            "parse",
            "--dump",
            &dir.to_string_lossy(),
            "--output",
            "json",
        ]);
        let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert!(found["services"].as_array().expect("a list").len() >= 17);
    }
}

#[test]
fn bad_input_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let real = fs::read_to_string(fixtures().join("cluster.json")).expect("a cluster");
    let dump = fixtures().join("iptables-nft");
    let file = folder.path().join("cluster.json");
    for (text, words) in [
        (real[..real.len() / 2].to_owned(), &["cluster.json"][..]),
        ("[1, 2]".to_owned(), &["cluster.json"]),
        (
            r#"{"kind":"List","items":[{"kind":"Pod","metadata":{"name":"a"}}]}"#.to_owned(),
            &["cluster.json", "kubectl get"],
        ),
        (
            real.replacen("\"port\": 80", "\"port\": 70000", 1),
            &["port", "70000"],
        ),
        (real.replacen("\"port\": 80", "\"port\": 0", 1), &["port"]),
        (String::new(), &["cluster.json"]),
        ("\0".repeat(5000), &["cluster.json"]),
    ] {
        fs::write(&file, &text).expect("it is written");
        fails(&check("iptables", &file, &dump), 1, words);
    }
    let cluster = fixtures().join("cluster.json");
    let cut = changed("iptables-nft", "iptables.save", |text| {
        text[..9000].to_owned()
    });
    fails(
        &check("iptables", &cluster, cut.path()),
        1,
        &["iptables.save"],
    );
    let binary = changed("nftables", "nft-ip.txt", |_| "\0\u{1}".to_owned());
    fails(
        &check("nftables", &cluster, binary.path()),
        1,
        &["nft-ip.txt is no text"],
    );
    fails(
        &check("nftables", &cluster, &dump),
        1,
        &["nft-ip.txt", "nft list table"],
    );
    fails(
        &check("iptables", &cluster, folder.path()),
        1,
        &["holds no dump"],
    );
    fails(
        &check("iptables", &folder.path().join("none.json"), &dump),
        1,
        &["none.json"],
    );
    fails(
        &rules(&["walk", "--from", "10.0.0.1", "--to", "10.0.0.2:1"]),
        2,
        &["--dump"],
    );
    let walk = |from: &str, to: &str| rules(&["walk", "--dump", "x", "--from", from, "--to", to]);
    fails(&walk("10.0.0.1", "10.0.0.2:70000"), 2, &["10.0.0.2:70000"]);
    fails(&walk("10.0.0.1", "[fd00::1]:80"), 2, &["families"]);
    fails(&walk("10.0.0.1", "10.0.0.2:80/icmp"), 2, &["icmp"]);
    fails(
        &walk("10.0.0.1", "10.0.0.2:0"),
        2,
        &["10.0.0.2:0", "port 0"],
    );
    fails(
        &walk("10.0.0.1:0", "10.0.0.2:1"),
        2,
        &["10.0.0.1:0", "port 0"],
    );
    fails(&walk("fd00::1", "[fd00::2]:0/udp"), 2, &["port 0"]);
}

#[test]
fn a_dump_with_rules_of_others_is_read() {
    let folder = changed("iptables-nft", "iptables.save", |text| {
        text.replace(
            "-A INPUT -j KUBE-FIREWALL\n",
            "-A INPUT -j KUBE-FIREWALL\n-A INPUT -m unheard --of 1 -j OTHER --thing\n",
        )
    });
    let output = check("iptables", &fixtures().join("cluster.json"), folder.path());
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
}

/// A walk through this dump.
fn walk(dump: &Path, arguments: &[&str]) -> Output {
    let dump = dump.to_string_lossy();
    let all = [&["walk", "--dump", &dump][..], arguments].concat();
    let output = rules(&all);
    assert!(output.status.success(), "{}", said(&output));
    output
}

fn walk_json(dump: &Path, arguments: &[&str]) -> Value {
    let output = walk(dump, &[arguments, &["--output", "json"]].concat());
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn a_node_port_at_an_address_that_is_not_known_is_warned_of() {
    let to_node = ["--from", "192.0.2.7", "--to", "10.0.2.15:30080"];
    let warning = "10.0.2.15 is taken as another machine's";
    for mode in ["iptables-legacy", "iptables-nft", "ipvs"] {
        let dump = fixtures().join(mode);
        let output = walk(&dump, &to_node);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains(warning), "{mode}: {error}");
        assert!(error.contains("NodePort 30080"), "{mode}: {error}");
        assert!(
            error.contains("--node-address 10.0.2.15"),
            "{mode}: {error}"
        );
        let answer = walk_json(&dump, &to_node);
        assert_eq!(answer["warnings"].as_array().map(Vec::len), Some(1));
        assert_eq!(answer["outcomes"][0]["verdict"], "forwarded");
        assert_eq!(answer["outcomes"][0]["endpoint"], Value::Null);
        assert!(answer["outcomes"][0].get("endpoint").is_some());
        for known in [
            ["--node-address", "10.0.2.15"],
            ["--path", "external-to-nodeport"],
            ["--path", "pod-to-nodeport"],
        ] {
            let answer = walk_json(&dump, &[&to_node[..], &known[..]].concat());
            assert_eq!(answer["warnings"], json!([]), "{mode} {known:?}");
            assert_eq!(answer["outcomes"][0]["endpoint"], "10.244.0.11:8080");
        }
        // A Service's address, another port and another protocol.
        for to in ["10.96.10.1:80", "10.0.2.15:39999", "10.0.2.15:30080/udp"] {
            let answer = walk_json(&dump, &["--from", "192.0.2.7", "--to", to]);
            assert_eq!(answer["warnings"], json!([]), "{mode} {to}");
        }
    }
    // These rules name the addresses that NodePorts are served on.
    let served = ["--from", "192.0.2.7", "--to", "172.31.255.2:30080"];
    let answer = walk_json(&fixtures().join("nftables"), &served);
    assert_eq!(answer["warnings"], json!([]));
    assert_eq!(answer["outcomes"][0]["verdict"], "endpoint");
}

#[test]
fn tables_that_are_not_walked_are_named() {
    let tables = "table inet firewalld {\n\tchain f {\n\t\ttype filter hook forward priority filter + 10; \
                  policy drop;\n\t}\n}\ntable inet idle {\n\tchain f {\n\t\tdrop\n\t}\n}\n\
                  table ip nat {\n\tchain PREROUTING {\n\t\ttype nat hook prerouting priority dstnat; \
                  policy accept;\n\t}\n}\ntable ip6 six {\n\tchain f {\n\t\ttype filter hook \
                  forward priority 0; policy drop;\n\t}\n}\n";
    let folder = changed("nftables", "nft-ip.txt", |text| text + tables);
    // What iptables-save was asked for is walked.
    fs::write(folder.path().join("iptables.save"), "*nat\nCOMMIT\n").expect("it is written");
    let firewalld = "not walked: table inet firewalld, which can drop or translate packets too";
    let v4 = ["--from", "192.0.2.7", "--to", "10.96.10.1:80"];
    let error = walk(folder.path(), &v4).stderr;
    let error = String::from_utf8_lossy(&error);
    assert_eq!(error, format!("svcpath: warning: {firewalld}\n"));
    let answer = walk_json(folder.path(), &v4);
    assert_eq!(answer["warnings"], json!([firewalld]));
    let v6 = ["--from", "fd00::7", "--to", "[fd00:10:96::1001]:80"];
    let answer = walk_json(folder.path(), &v6);
    assert_eq!(
        answer["warnings"],
        json!([
            firewalld,
            "not walked: table ip6 six, which can drop or translate packets too"
        ])
    );
    fs::remove_file(folder.path().join("iptables.save")).expect("it was there");
    let answer = walk_json(folder.path(), &v4);
    assert_eq!(answer["warnings"].as_array().map(Vec::len), Some(2));
}

#[test]
fn a_later_packet_goes_where_the_first_went() {
    for mode in ["iptables-legacy", "iptables-nft", "nftables"] {
        let dump = fixtures().join(mode);
        for to in ["10.96.10.1:80", "172.31.255.2:30080"] {
            let later = [
                "--from",
                "10.244.0.7",
                "--to",
                to,
                "--state",
                "established",
                "--node-address",
                "172.31.255.2",
            ];
            let text = said(&walk(&dump, &later));
            let line = "  = 100.000000 %  as its first packet was translated\n";
            assert!(text.contains(line), "{mode}: {text}");
            let answer = walk_json(&dump, &later);
            let outcome = &answer["outcomes"][0];
            assert_eq!(outcome["verdict"], "tracked");
            assert_eq!(outcome["masqueraded"], Value::Null);
        }
    }
    // What a filter refuses does not get there.
    let folder = changed("iptables-nft", "iptables.save", |text| {
        text.replacen(
            "-A FORWARD ",
            "-A FORWARD -s 10.244.0.7/32 -j REJECT\n-A FORWARD ",
            1,
        )
    });
    let later = [
        "--from",
        "10.244.0.7",
        "--to",
        "10.96.10.1:80",
        "--state",
        "established",
    ];
    let answer = walk_json(folder.path(), &later);
    assert_eq!(answer["outcomes"][0]["verdict"], "rejected");
}

#[test]
fn a_rule_that_is_not_understood_is_kept() {
    let to = "--to-destination 10.244.0.11:8080";
    let old = format!("--to-destination :0 --persistent --to-destination :0 --persistent {to}");
    let folder = changed("iptables-legacy", "iptables.save", |text| {
        text.replace(to, &old).replacen(
            "-A KUBE-SERVICES ",
            "-A KUBE-SERVICES -m conntrack [unsupported revision] -j DNAT [unsupported revision]\n-A KUBE-SERVICES ",
            1,
        )
    });
    let six = folder.path().join("ip6tables.save");
    let text = fs::read_to_string(&six).expect("a dump");
    let text = text.replace(
        "--to-destination [",
        "--to-destination :0 --persistent --to-destination [",
    );
    fs::write(&six, text).expect("it is written");
    let parsed = |folder: &Path| {
        let output = rules(&[
            "parse",
            "--dump",
            &folder.to_string_lossy(),
            "--output",
            "json",
        ]);
        assert!(output.status.success(), "{}", said(&output));
        let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        found["services"].clone()
    };
    assert_eq!(
        parsed(folder.path()),
        parsed(&fixtures().join("iptables-legacy"))
    );
    let to_service = ["--from", "10.244.0.7", "--to", "10.96.10.1:80"];
    let text = said(&walk(folder.path(), &to_service));
    assert!(
        text.contains("unknown: DNAT; taken as not matching"),
        "{text}"
    );
    assert!(text.contains("endpoint 10.244.0.11:8080"), "{text}");
    let output = check("iptables", &fixtures().join("cluster.json"), folder.path());
    // The rule of nobody in kube-proxy's chain is a difference, and no reason to give up.
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("differences"), "{}", said(&output));
}

#[test]
fn more_ways_than_are_followed_are_a_limit() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut text = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j C0\n".to_owned();
    for depth in 0..20 {
        let next = depth + 1;
        let by_chance = "-m statistic --mode random --probability 0.5";
        for line in [
            format!("-A C{depth} {by_chance} -j C{next}\n"),
            format!("-A C{depth} -j C{next}\n"),
        ] {
            text.push_str(&line);
        }
    }
    text += "-A C20 -p tcp -j DNAT --to-destination 10.0.0.3:1\nCOMMIT\n";
    fs::write(folder.path().join("iptables.save"), text).expect("it is written");
    let output = walk(folder.path(), &["--from", "10.0.0.1", "--to", "10.0.0.2:1"]);
    let text = said(&output);
    assert!(text.contains("limit reached; taken as not matching\n"));
    assert!(text.contains("warning: limit reached"));
    assert!(!text.contains("unknown"));
}
