//! Everything that touches the kernel besides the probes.

pub mod addresses;
pub mod applied;
pub mod apply;
pub mod btf;
pub mod clock;
pub mod conntrack;
pub mod dump;
pub mod ipset;
pub mod ipvs;
pub mod ipvs_connections;
pub mod link;
pub mod netlink;
pub mod netns;
pub mod nfacct;
pub mod nft;
pub mod sysctl;
pub mod tool;
pub mod tun;
pub mod usage;

/// The running kernel's release, as `uname -r` prints it.
pub fn release() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| "unknown".to_owned(),
        |name| name.release().to_string_lossy().into_owned(),
    )
}

/// Has the running kernel IPVS? If it is a module it is loaded, as kube-proxy does at its start.
pub fn has_ipvs() -> bool {
    let there = || std::path::Path::new("/proc/net/ip_vs").exists();
    if there() {
        return true;
    }
    load_module("ip_vs");
    there()
}

/// Tries to load a module. A kernel without modules, or without this one, lacks what the module
/// brings: whoever asks looks for that afterwards.
fn load_module(name: &str) {
    let _ = std::process::Command::new(tool::program("modprobe"))
        .args(["--quiet", name])
        .status();
}
