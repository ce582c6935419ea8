//! Fuzz targets for everything that reads what comes from outside: no input makes a parser panic.
//!
//! `cargo test` runs each for a while; `cargo bolero test -p tests NAME` (cargo-bolero) lets a
//! coverage-guided fuzzer run it for as long as one likes.

use tracer::cluster::{Family, read};
use tracer::rules::{iptables, ipvs, nftables};

/// Runs of each target under `cargo test`.
const RUNS: usize = 2000;

macro_rules! fixture {
    ($name:literal) => {
        include_str!(concat!(
            "../tracer/src/rules/fixtures/kube-proxy-1.36.2/",
            $name
        ))
    };
}

/// Changes to a real text: at a place (out of 65536 equal parts) so many bytes make way for these.
type Edits = Vec<(u16, u8, Vec<u8>)>;

fn edited(real: &str, edits: &Edits) -> Vec<u8> {
    let mut text = real.as_bytes().to_vec();
    for (place, length, bytes) in edits.iter().take(8) {
        let start = text.len() * usize::from(*place) / 65_536;
        let end = text.len().min(start + usize::from(*length));
        text.splice(start..end, bytes.iter().copied());
    }
    text
}

/// Feeds a parser of bytes with raw input, and with an edited real text.
fn fuzz(real: &'static str, parse: impl Fn(&[u8]) + std::panic::RefUnwindSafe) {
    bolero::check!()
        .with_type::<(bool, Edits, Vec<u8>)>()
        .with_iterations(RUNS)
        .for_each(|(raw, edits, bytes)| {
            if *raw {
                parse(bytes);
            } else {
                parse(&edited(real, edits));
            }
        });
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn cluster_json() {
    fuzz(fixture!("cluster.json"), |bytes| {
        let _ = read::read(bytes, "input");
    });
}

#[test]
fn iptables_save() {
    fuzz(fixture!("iptables-nft/iptables.save"), |bytes| {
        let text = text(bytes);
        if let Ok(tables) = iptables::parse(&text, Family::V4) {
            let nothing = iptables::rule::Tables::none(Family::V4);
            let mode = tracer::rules::Mode::IptablesNft;
            let _ = iptables::check(&nothing, &tables, mode);
        }
    });
}

#[test]
fn nft_list() {
    fuzz(fixture!("nftables/nft-ip.txt"), |bytes| {
        let _ = nftables::parse(&text(bytes));
    });
}

#[test]
fn nft_json() {
    fuzz(fixture!("nftables/nft-ip.json"), |bytes| {
        let _ = nftables::json::parse(&text(bytes));
    });
}

#[test]
fn ipvsadm_save() {
    fuzz(fixture!("ipvs/ipvsadm.save"), |bytes| {
        let _ = ipvs::Servers::parse(&text(bytes));
    });
}

#[test]
fn ipset_save() {
    fuzz(fixture!("ipvs/ipset.save"), |bytes| {
        let _ = ipvs::Sets::parse(&text(bytes));
    });
}

#[test]
fn ip_addr() {
    fuzz(fixture!("ipvs/ip-addr.txt"), |bytes| {
        let _ = ipvs::Addresses::parse(&text(bytes));
    });
}
