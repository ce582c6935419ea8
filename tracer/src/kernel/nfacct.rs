//! nfacct objects: named counters that iptables rules can add to (`-m nfacct`).
//!
//! kube-proxy makes two of them over netlink before its first sync (`pkg/proxy/util/nfacct`).
//! A rule that names an object that does not exist cannot be loaded.

use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto,
    socket,
};

use super::netns::{Netns, NetnsError};

// include/uapi/linux/netfilter/nfnetlink.h and nfnetlink_acct.h
const NFNL_SUBSYS_ACCT: u16 = 7;
const NFNL_MSG_ACCT_NEW: u16 = 0;
const NFACCT_NAME: u16 = 1;
/// With the terminating zero.
const NFACCT_NAME_MAX: usize = 32;

/// `nlmsghdr` and `nfgenmsg`.
const HEADER: usize = 16 + 4;

/// Why an object could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NfacctError {
    /// The kernel has no nfacct.
    #[error(
        "the kernel refuses nfacct object {name}: {source} (CONFIG_NETFILTER_NETLINK_ACCT is \
         missing or its module cannot be loaded; render without nfacct)"
    )]
    Unsupported {
        /// The object.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot make nfacct object {name}: {source}")]
    Failed {
        /// The object.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

/// Makes the object in the namespace, unless it is there.
pub fn ensure(ns: &Netns, name: &str) -> Result<(), NfacctError> {
    let failed = |source| NfacctError::Failed {
        name: name.to_owned(),
        source,
    };
    let code = ns.run(|| request(name))?.map_err(failed)?;
    match code {
        // Without NLM_F_EXCL an object that is there answers EBUSY (nfnl_acct_new).
        0 | libc::EEXIST | libc::EBUSY => Ok(()),
        // nfnetlink_rcv_msg answers EINVAL for a subsystem that nobody registered.
        libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT => Err(NfacctError::Unsupported {
            name: name.to_owned(),
            source: io::Error::from_raw_os_error(code),
        }),
        _ => Err(failed(io::Error::from_raw_os_error(code))),
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

/// Sends one request and returns the kernel's errno.
fn request(name: &str) -> io::Result<i32> {
    let message = new_object(name)?;
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    sendto(
        socket.as_raw_fd(),
        &message,
        &NetlinkAddr::new(0, 0),
        MsgFlags::empty(),
    )?;
    let mut answer = [0; 4096];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    errno(&answer[..length]).ok_or_else(|| io::Error::other("no netlink acknowledgement"))
}

/// `NFNL_MSG_ACCT_NEW` with a name.
fn new_object(name: &str) -> io::Result<Vec<u8>> {
    if name.is_empty() || name.len() >= NFACCT_NAME_MAX || name.contains('\0') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a name has 1 to 31 bytes",
        ));
    }
    let attribute = 4 + name.len() + 1;
    let total = HEADER + attribute.next_multiple_of(4);
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_CREATE | libc::NLM_F_ACK;
    let flags = u16::try_from(flags).map_err(io::Error::other)?;
    let mut message = Vec::with_capacity(total);
    let length = |n: usize| u32::try_from(n).map_err(io::Error::other);
    message.extend(length(total)?.to_ne_bytes());
    message.extend(((NFNL_SUBSYS_ACCT << 8) | NFNL_MSG_ACCT_NEW).to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(1_u32.to_ne_bytes()); // sequence number
    message.extend(0_u32.to_ne_bytes()); // port: the kernel fills it in
    message.extend([0, 0, 0, 0]); // nfgenmsg: AF_UNSPEC, NFNETLINK_V0, resource 0
    message.extend(
        u16::try_from(attribute)
            .map_err(io::Error::other)?
            .to_ne_bytes(),
    );
    message.extend(NFACCT_NAME.to_ne_bytes());
    message.extend(name.as_bytes());
    message.resize(total, 0);
    Ok(message)
}

/// The errno of an `NLMSG_ERROR` message: 0 is an acknowledgement.
fn errno(message: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
    let code = i32::from_ne_bytes(message.get(16..20)?.try_into().ok()?);
    (i32::from(kind) == libc::NLMSG_ERROR).then_some(-code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_is_what_the_kernel_parses() {
        let message = new_object("ab").expect("a valid name");
        assert_eq!(message.len(), 28);
        assert_eq!(message[0..4], 28_u32.to_ne_bytes());
        assert_eq!(message[4..6], 0x0700_u16.to_ne_bytes());
        assert_eq!(message[20..22], 7_u16.to_ne_bytes());
        assert_eq!(&message[24..28], b"ab\0\0");
        assert!(new_object("").is_err());
        assert!(new_object(&"x".repeat(32)).is_err());
    }

    #[test]
    fn answers_are_read() {
        let mut answer = [0; 36];
        answer[4..6].copy_from_slice(&2_u16.to_ne_bytes());
        assert_eq!(errno(&answer), Some(0));
        answer[16..20].copy_from_slice(&(-16_i32).to_ne_bytes());
        assert_eq!(errno(&answer), Some(16));
        assert_eq!(errno(&answer[..10]), None);
    }
}
