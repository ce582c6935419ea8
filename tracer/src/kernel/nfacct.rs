//! nfacct objects: named counters that iptables rules can add to (`-m nfacct`).
//!
//! kube-proxy makes two of them over netlink before its first sync (`pkg/proxy/util/nfacct`).
//! A rule that names an object that does not exist cannot be loaded.

use super::netlink::{NLM_F_ACK, NetlinkError, Request, Socket};
use super::netns::{Netns, NetnsError};

// include/uapi/linux/netfilter/nfnetlink.h and nfnetlink_acct.h
const NFNL_SUBSYS_ACCT: u8 = 7;
const NFNL_MSG_ACCT_NEW: u8 = 0;
const NFACCT_NAME: u16 = 1;
/// `NFACCT_NAME_MAX` is 32, with the terminating zero.
const NAME_LENGTHS: std::ops::Range<usize> = 1..32;

/// `NLM_F_CREATE` and `NLM_F_ACK`.
const NEW: u16 = 0x400 | NLM_F_ACK;

/// Why an object could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NfacctError {
    /// The kernel has no nfacct.
    #[error(
        "cannot make nfacct object {name}: {source} (CONFIG_NETFILTER_NETLINK_ACCT is \
         missing or its module cannot be loaded; render without nfacct)"
    )]
    Unsupported {
        /// The object.
        name: String,
        /// What the kernel said.
        source: NetlinkError,
    },
    /// Anything else.
    #[error("cannot make nfacct object {name}: {source}")]
    Failed {
        /// The object.
        name: String,
        /// What the kernel said.
        source: NetlinkError,
    },
    /// The kernel has room for shorter names only.
    #[error("nfacct object '{name}': a name has 1 to 31 bytes, none of them 0")]
    Name {
        /// The object.
        name: String,
    },
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

/// Makes the object in the namespace, unless it is there.
pub fn ensure(ns: &Netns, name: &str) -> Result<(), NfacctError> {
    if !NAME_LENGTHS.contains(&name.len()) || name.contains('\0') {
        return Err(NfacctError::Name {
            name: name.to_owned(),
        });
    }
    let Err(source) = ns.run(|| request(name))? else {
        return Ok(());
    };
    let name = name.to_owned();
    match source.errno() {
        // Without NLM_F_EXCL an object that is there answers EBUSY (nfnl_acct_new).
        Some(libc::EEXIST | libc::EBUSY) => Ok(()),
        // nfnetlink_rcv_msg answers EINVAL for a subsystem that nobody registered.
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT) => {
            Err(NfacctError::Unsupported { name, source })
        }
        _ => Err(NfacctError::Failed { name, source }),
    }
}

/// Can rules of this namespace count with nfacct? Makes `names` if so.
pub fn supported(ns: &Netns, names: &[&str]) -> Result<bool, NfacctError> {
    for name in names {
        match ensure(ns, name) {
            Ok(()) => {}
            Err(NfacctError::Unsupported { .. }) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// `NFNL_MSG_ACCT_NEW` with a name.
fn request(name: &str) -> Result<(), NetlinkError> {
    let request = Request::new(NFNL_SUBSYS_ACCT, NFNL_MSG_ACCT_NEW, NEW, 0);
    Socket::netfilter()?.change(&request.string(NFACCT_NAME, name)?)
}
