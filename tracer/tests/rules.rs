//! `svcpath rules` as its users meet it. Needs no root: everything is read from files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

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
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
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
