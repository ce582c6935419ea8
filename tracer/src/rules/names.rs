//! The names that kube-proxy gives to chains: a hash of what the chain is for.
//!
//! Sources: `pkg/proxy/iptables/proxier.go` (`portProtoHash`, `servicePortEndpointChainName`) and
//! `pkg/proxy/nftables/proxier.go` (`hashAndTruncate`) of Kubernetes v1.36.

use std::fmt::Write as _;

use data_encoding::BASE32;
use sha2::{Digest, Sha256};

use crate::cluster::Protocol;

/// The longest base name of an nftables chain; longer ones end in `...`.
const NFT_NAME_MAX: usize = 240;

/// The first characters of a base32 SHA-256, on the stack: at 10,000 Services there are tens of
/// thousands of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Hash<const CHARS: usize>([u8; CHARS]);

impl<const CHARS: usize> Hash<CHARS> {
    /// Hashes the concatenation of `parts`.
    fn new(parts: &[&str]) -> Self {
        // Eight characters hold five bytes, so that only whole groups are encoded.
        const { assert!(CHARS.is_multiple_of(8) && CHARS <= 48) };
        let mut sha = Sha256::new();
        for part in parts {
            sha.update(part.as_bytes());
        }
        let mut text = [0; CHARS];
        BASE32.encode_mut(&sha.finalize()[..CHARS / 8 * 5], &mut text);
        Self(text)
    }

    /// The characters.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// What follows `KUBE-SVC-` and `KUBE-EXT-`: the hash of `ns/name:port` and the protocol.
pub fn service_hash(port_name: &str, protocol: Protocol) -> Hash<16> {
    Hash::new(&[port_name, protocol.name()])
}

/// What follows `KUBE-SEP-`: the hash of `ns/name:port`, the protocol and the endpoint's
/// `ip:port` (`[ip]:port` in IPv6).
pub fn endpoint_hash(port_name: &str, protocol: Protocol, endpoint: &str) -> Hash<16> {
    Hash::new(&[port_name, protocol.name(), endpoint])
}

/// What follows `service-` and `external-` in nftables mode: `HASH-ns/name/protocol/port`.
pub fn nft_service_name(namespace: &str, name: &str, protocol: Protocol, port: &str) -> String {
    let mut full = String::with_capacity(
        9 + namespace.len() + name.len() + protocol.name().len() + 3 + port.len(),
    );
    // Writing into a String cannot fail.
    let _ = write!(full, "{namespace}/{name}/{protocol}/{port}");
    hash_and_truncate(&full)
}

/// What follows `endpoint-` and `affinity-` in nftables mode:
/// `HASH-ns/name/protocol/port__ADDRESS/ENDPOINTPORT`, the address with dots for colons.
pub fn nft_endpoint_name(
    namespace: &str,
    name: &str,
    protocol: Protocol,
    port: &str,
    address: &str,
    endpoint_port: &str,
) -> String {
    let address = address.replace(':', ".");
    hash_and_truncate(&format!(
        "{namespace}/{name}/{protocol}/{port}__{address}/{endpoint_port}"
    ))
}

fn hash_and_truncate(full: &str) -> String {
    let hash: Hash<8> = Hash::new(&[full]);
    let mut name = String::with_capacity(9 + full.len());
    name.push_str(hash.as_str());
    name.push('-');
    name.push_str(full);
    if name.len() > NFT_NAME_MAX {
        // Kubernetes names are ASCII; anything else is cut at a character.
        name.truncate(name.floor_char_boundary(NFT_NAME_MAX - 3));
        name.push_str("...");
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    // The first two are in Kubernetes' own tests, the others in the dumps under `fixtures/`.
    #[test]
    fn chain_names_are_kube_proxys() {
        let tcp = Protocol::Tcp;
        assert_eq!(
            service_hash("ns1/svc1:p80", tcp).as_str(),
            "XPGD46QRK7WJZT7O"
        );
        assert_eq!(
            endpoint_hash("ns1/svc1:p80", tcp, "10.180.0.1:80").as_str(),
            "SXIVWICOYRO3J4NJ"
        );
        assert_eq!(
            service_hash("edge/unnamed", tcp).as_str(),
            "LBHFFBPWYWV3YL36"
        );
        assert_eq!(
            endpoint_hash("edge/six:http", tcp, "[fd00:10:244::11]:8080").as_str(),
            "P3V326WWHVRLTRNN"
        );
        assert_eq!(
            service_hash("edge/sig:s", Protocol::Sctp).as_str(),
            "BEHJHRH4DK5OV72R"
        );
    }

    #[test]
    fn nftables_names_are_kube_proxys() {
        assert_eq!(
            nft_service_name("ns1", "svc1", Protocol::Tcp, "p80"),
            "ULMVA6XW-ns1/svc1/tcp/p80"
        );
        assert_eq!(
            nft_service_name("edge", "unnamed", Protocol::Tcp, ""),
            "XPKXJLSX-edge/unnamed/tcp/"
        );
        assert_eq!(
            nft_service_name("kube-system", "kube-dns", Protocol::Udp, "dns"),
            "FY5PMXPG-kube-system/kube-dns/udp/dns"
        );
        let endpoint =
            |address| nft_endpoint_name("ns1", "svc1", Protocol::Tcp, "p80", address, "80");
        assert_eq!(
            endpoint("10.180.0.1"),
            "5OJB2KTY-ns1/svc1/tcp/p80__10.180.0.1/80"
        );
        assert!(endpoint("fd00::1").ends_with("-ns1/svc1/tcp/p80__fd00..1/80"));
    }

    #[test]
    fn long_nftables_names_are_cut() {
        let name = nft_service_name(&"n".repeat(200), &"s".repeat(63), Protocol::Tcp, "port");
        assert_eq!(name.len(), NFT_NAME_MAX);
        assert!(name.ends_with("ss..."));
    }
}
