//! When, where and with what a run takes place, as far as a run's file tells.

use std::collections::BTreeMap;

use tracer::kernel::netns::Netns;
use tracer::kernel::tool;

/// Which eBPF object this program carries, and who compiled it.
pub(crate) fn ebpf_object() -> String {
    let manifest: serde_json::Value =
        serde_json::from_str(tracer::probe::MANIFEST).unwrap_or_default();
    let field = |pointer| manifest.pointer(pointer).and_then(|found| found.as_str());
    let field = |pointer| field(pointer).unwrap_or("unknown").to_owned();
    format!(
        "sha256 {}, {}, {}",
        field("/objects_sha256/probes"),
        field("/rustc"),
        field("/linker")
    )
}

/// Number of CPUs that this process may use.
pub(crate) fn cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1))
}

/// The machine's name.
pub(crate) fn host() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| "unknown".to_owned(),
        |name| name.nodename().to_string_lossy().into_owned(),
    )
}

/// The versions of the tools that rules are read with; those that are not installed are left out.
pub(crate) fn rule_tools(ns: &Netns) -> BTreeMap<String, String> {
    let tools = [
        ("nft", "--version"),
        ("iptables", "--version"),
        ("ipset", "--version"),
        ("ipvsadm", "--version"),
        ("ip", "-V"),
    ];
    tools
        .into_iter()
        .filter_map(|(name, flag)| {
            let said = tool::run(ns, name, &[flag], "").ok()?;
            Some((name.to_owned(), version_in(&said)?.to_owned()))
        })
        .collect()
}

/// The first word of a text that looks like a version.
fn version_in(text: &str) -> Option<&str> {
    text.split([' ', '\n', ',', '(', ')'])
        .map(|word| word.trim_start_matches("iproute2-").trim_start_matches('v'))
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'))
}

/// Now, RFC 3339 in UTC.
pub(crate) fn now_utc() -> String {
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Civil date from days since 1970-01-01 (proleptic Gregorian, era of 400 years).
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 {
        month_index + 3
    } else {
        month_index - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found() {
        assert_eq!(
            version_in("nftables v1.0.6 (Lester Gooch #5)\n"),
            Some("1.0.6")
        );
        assert_eq!(version_in("iptables v1.8.9 (nf_tables)\n"), Some("1.8.9"));
        assert_eq!(
            version_in("ip utility, iproute2-6.1.0, libbpf 1.1.2\n"),
            Some("6.1.0")
        );
        assert_eq!(version_in("no idea"), None);
    }
}
