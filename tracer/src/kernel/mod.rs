//! Everything that touches the kernel besides the probes.

pub mod apply;
pub mod btf;
pub mod clock;
pub mod link;
pub mod netns;
pub mod nfacct;
pub mod sysctl;
pub mod tool;

/// The running kernel's release, as `uname -r` prints it.
pub fn release() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| "unknown".to_owned(),
        |name| name.release().to_string_lossy().into_owned(),
    )
}

/// Has the running kernel IPVS, built in or as a module?
///
/// Built in or loaded it shows itself in `/proc`; as a module it stands in the module index.
pub fn has_ipvs() -> bool {
    if std::path::Path::new("/proc/net/ip_vs").exists() {
        return true;
    }
    let index = format!("/lib/modules/{}/modules.dep", release());
    std::fs::read_to_string(index).is_ok_and(|text| text.contains("/ip_vs.ko"))
}
