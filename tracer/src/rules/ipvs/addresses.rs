//! The addresses of `kube-ipvs0`, as `ip addr` and `ip -j addr` print them.

use std::net::IpAddr;

use serde::Deserialize;

use super::{LINK, ParseError, numbered_lines};

/// An address on a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The address.
    pub address: IpAddr,
    /// The length of its network; kube-proxy binds whole addresses, so 32 or 128.
    pub prefix: u8,
    /// For how many seconds it will stay; `None`: for ever.
    pub lifetime: Option<u32>,
    /// What `ip addr` says of it besides that kube-proxy's addresses do not have: another scope, flag,
    /// label or preferred lifetime.
    pub odd: Option<String>,
    /// The line it stands on, from 1; in JSON, its place in the list.
    pub line: u32,
}

/// What `ip addr show kube-ipvs0` prints, or `ip addr`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Is the link there?
    pub link: bool,
    /// The addresses of `kube-ipvs0`.
    pub bound: Vec<Bound>,
    /// The addresses of the other links, if they were dumped too.
    pub others: Vec<IpAddr>,
}

impl Addresses {
    /// Reads what `ip addr` or `ip -j addr` prints.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        if text.trim_start().starts_with('[') {
            Self::parse_json(text)
        } else {
            Self::parse_text(text)
        }
    }

    fn add(&mut self, ours: bool, bound: Bound) {
        if ours {
            self.bound.push(bound);
        } else {
            self.others.push(bound.address);
        }
    }

    fn parse_text(text: &str) -> Result<Self, ParseError> {
        let mut addresses = Self::default();
        // Is the link that is being read ours?
        let mut link: Option<bool> = None;
        // The address whose lifetime is to follow.
        let mut open: Option<(u32, &str, Bound)> = None;
        for (line, text) in numbered_lines(text)? {
            let error = |problem| ParseError::new(line, problem, text);
            let lifetime = text
                .trim_ascii()
                .strip_prefix("valid_lft ")
                .map(|rest| rest.split_once(' ').unwrap_or((rest, "")));
            match (open.take(), lifetime) {
                (Some((_, _, mut bound)), Some((lifetime, preferred))) => {
                    bound.lifetime = parse_lifetime(lifetime).map_err(error)?;
                    if preferred != "preferred_lft forever" && bound.lifetime.is_none() {
                        bound.odd.get_or_insert_with(|| preferred.to_owned());
                    }
                    addresses.add(link == Some(true), bound);
                    continue;
                }
                (None, Some(_)) => return Err(error("a lifetime of no address")),
                (Some((line, text, _)), None) => return Err(no_lifetime(line, text)),
                (None, None) => {}
            }
            if let Some(details) = text.strip_prefix([' ', '\t']) {
                if link.is_none() {
                    return Err(error("a detail of no link"));
                }
                open = parse_inet(details, line)
                    .map_err(error)?
                    .map(|bound| (line, text, bound));
            } else {
                let ours =
                    parse_link(text).ok_or_else(|| error("no link, as ip addr prints them"))?;
                if ours && addresses.link {
                    return Err(error("kube-ipvs0 stands there twice"));
                }
                link = Some(ours);
                addresses.link |= ours;
            }
        }
        match open {
            Some((line, text, _)) => Err(no_lifetime(line, text)),
            None => Ok(addresses),
        }
    }

    fn parse_json(text: &str) -> Result<Self, ParseError> {
        let links: Vec<JsonLink> = serde_json::from_str(text).map_err(|error| {
            let line = u32::try_from(error.line()).unwrap_or(u32::MAX);
            let text = text.lines().nth(error.line().saturating_sub(1));
            ParseError::new(line, "not what ip -j addr prints", text.unwrap_or_default())
        })?;
        let mut addresses = Self::default();
        for link in &links {
            let ours = link.ifname == LINK;
            addresses.link |= ours;
            for (line, info) in (1..).zip(&link.addr_info) {
                let Some(address) = info.local else { continue };
                let lifetime = info.valid_life_time.filter(|seconds| *seconds != u32::MAX);
                addresses.add(
                    ours,
                    Bound {
                        address,
                        prefix: info.prefixlen,
                        lifetime,
                        odd: None,
                        line,
                    },
                );
            }
        }
        Ok(addresses)
    }
}

/// One element of `ip -j addr`; old versions print empty ones for the links that were not asked
/// for.
#[derive(Deserialize)]
struct JsonLink {
    #[serde(default)]
    ifname: String,
    #[serde(default)]
    addr_info: Vec<JsonAddress>,
}

#[derive(Deserialize)]
struct JsonAddress {
    local: Option<IpAddr>,
    #[serde(default)]
    prefixlen: u8,
    valid_life_time: Option<u32>,
}

fn no_lifetime(line: u32, text: &str) -> ParseError {
    ParseError::new(
        line,
        "an address without its lifetime: the dump is cut",
        text,
    )
}

/// `4: kube-ipvs0: <BROADCAST,NOARP> mtu 1500 qdisc noop`: is it [`LINK`]?
fn parse_link(text: &str) -> Option<bool> {
    let mut parts = text.splitn(3, ": ");
    let _: u32 = parts.next()?.parse().ok()?;
    let name = parts.next()?;
    parts.next()?;
    Some(name.split('@').next() == Some(LINK))
}

/// `inet 10.96.0.1/32 scope global kube-ipvs0`; `None` for another detail of a link.
fn parse_inet(text: &str, line: u32) -> Result<Option<Bound>, &'static str> {
    let mut words = text.split_ascii_whitespace();
    if !matches!(words.next(), Some("inet" | "inet6")) {
        return Ok(None);
    }
    let network = words.next().and_then(parse_network);
    let (address, prefix) = network.ok_or("ADDRESS/PREFIX is missing or wrong")?;
    let rest: Vec<&str> = words.collect();
    // An IPv4 address has its link's name for a label.
    let usual = matches!(
        rest.as_slice(),
        ["scope", "global"] | ["scope", "global", LINK]
    );
    Ok(Some(Bound {
        address,
        prefix,
        lifetime: None,
        odd: (!usual).then(|| rest.join(" ")),
        line,
    }))
}

/// `10.96.0.1/32`; a peer's address stands without a length.
fn parse_network(word: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = word
        .split_once('/')
        .map_or((word, None), |(address, prefix)| (address, Some(prefix)));
    let address: IpAddr = address.parse().ok()?;
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let prefix = match prefix {
        Some(prefix) => prefix.parse().ok()?,
        None => bits,
    };
    (prefix <= bits).then_some((address, prefix))
}

/// `forever`, `86400sec`.
fn parse_lifetime(word: &str) -> Result<Option<u32>, &'static str> {
    if word == "forever" {
        return Ok(None);
    }
    word.strip_suffix("sec")
        .and_then(|seconds| seconds.parse().ok())
        .map(Some)
        .ok_or("a lifetime is forever or a number of seconds")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rules::ipvs::tests::mutated;

    const REAL: &str = include_str!("../fixtures/kube-proxy-1.36.2/ipvs/ip-addr.txt");

    #[test]
    fn a_real_dump_is_read() {
        let addresses = Addresses::parse(REAL).expect("a real dump");
        assert!(addresses.link && addresses.others.is_empty());
        assert_eq!(addresses.bound.len(), 18);
        assert_eq!(
            addresses.bound.last(),
            Some(&Bound {
                address: "fd00:10:96::1001".parse().expect("an address"),
                prefix: 128,
                lifetime: None,
                odd: None,
                line: 37,
            })
        );
    }

    #[test]
    fn other_links_are_told_apart() {
        let text = "1: lo: <LOOPBACK,UP,LOWER_UP> mtu 65536 qdisc noqueue state UNKNOWN\n    \
                    link/loopback 00:00:00:00:00:00 brd 00:00:00:00:00:00\n    \
                    inet 127.0.0.1/8 scope host lo\n       \
                    valid_lft forever preferred_lft forever\n\
                    2: eth0@if7: <BROADCAST,UP> mtu 1500 qdisc noqueue state UP\n    \
                    altname enp0s2\n    \
                    inet 10.0.2.15/24 brd 10.0.2.255 scope global dynamic eth0\n       \
                    valid_lft 86000sec preferred_lft 86000sec\n";
        let addresses = Addresses::parse(text).expect("valid");
        assert!(!addresses.link && addresses.bound.is_empty());
        assert_eq!(addresses.others.len(), 2);
    }

    #[test]
    fn json_says_the_same() {
        let text = r#"[{},{"ifindex":4,"ifname":"kube-ipvs0","flags":["NOARP"],"addr_info":[
            {"family":"inet","local":"10.96.0.1","prefixlen":32,"scope":"global",
             "valid_life_time":4294967295},
            {"family":"inet6","local":"fd00::1","prefixlen":128,"valid_life_time":60}]}]"#;
        let addresses = Addresses::parse(text).expect("valid");
        assert!(addresses.link);
        let lifetimes: Vec<_> = addresses.bound.iter().map(|bound| bound.lifetime).collect();
        assert_eq!(lifetimes, [None, Some(60)]);
        let error = Addresses::parse("[\n{\"ifname\": 3}]").expect_err("no name");
        assert_eq!(error.line, 2);
    }

    #[test]
    fn what_is_no_dump_names_its_line() {
        let head = "4: kube-ipvs0: <NOARP> mtu 1500 qdisc noop\n";
        for (tail, line, problem) in [
            ("    inet 10.96.0.1/32 scope glo", 2, "cut"),
            (
                "    inet 10.96.0.1/32 scope global kube-ipvs0\n",
                2,
                "lifetime",
            ),
            ("    inet 10.96.0.1/33 scope global\n", 2, "PREFIX"),
            ("    inet\n", 2, "PREFIX"),
            (
                "       valid_lft forever preferred_lft forever\n",
                2,
                "no address",
            ),
            (head, 2, "twice"),
            ("garbage\n", 2, "no link"),
        ] {
            let error = Addresses::parse(&format!("{head}{tail}")).expect_err(tail);
            assert_eq!(error.line, line, "{tail}");
            assert!(error.to_string().contains(problem), "{error}");
        }
        assert!(Addresses::parse("    inet 10.96.0.1/32\n").is_err());
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in mutated(REAL)) {
            let _ = Addresses::parse(&text);
        }
    }
}
