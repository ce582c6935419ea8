//! A link whose far end is this process: packets written to it arrive on the node, packets that the
//! node sends out of it are read back. Without a wire there is nothing to wait for: when a write
//! returns, the kernel has done with the packet whatever it does in softirq on this CPU.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;

use super::netns::{Netns, NetnsError};

/// `IFF_TUN | IFF_NO_PI` of `include/uapi/linux/if_tun.h`: whole IP packets, nothing before them.
const FLAGS: i16 = 0x0001 | 0x1000;

mod ioctl {
    nix::ioctl_write_int!(tunsetiff, b'T', 202);
}

/// Why a link could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The kernel refused.
    #[error("cannot make the link {name}: {source} (module tun, CAP_NET_ADMIN)")]
    Make {
        /// The link's name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// One such link; it goes with this value.
#[derive(Debug)]
pub struct Tun {
    file: File,
}

impl Tun {
    /// Makes the link in the namespace; it is down, and has no address. `name`: at most 15 bytes.
    pub fn create(ns: &Netns, name: &str) -> Result<Self, TunError> {
        let fail = |source| TunError::Make {
            name: name.to_owned(),
            source,
        };
        ns.run(|| open(name))?
            .map(|file| Self { file })
            .map_err(fail)
    }

    /// Lets an IP packet arrive on the node.
    pub fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        self.file.write_all(packet)
    }

    /// The next packet that the node sent out, if there is one.
    pub fn receive(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = vec![0; usize::from(u16::MAX)];
        match self.file.read(&mut buffer) {
            Ok(length) => {
                buffer.truncate(length);
                Ok(Some(buffer))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn open(name: &str) -> io::Result<File> {
    // struct ifreq of include/uapi/linux/if.h: the name, then a union that begins with the flags.
    let mut request = [0_u8; size_of::<libc::ifreq>()];
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[libc::IFNAMSIZ..libc::IFNAMSIZ + 2].copy_from_slice(&FLAGS.to_ne_bytes());
    let device = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
    };
    let file = device().or_else(|error| {
        if error.kind() != io::ErrorKind::NotFound {
            return Err(error);
        }
        // The device comes with its module; whether loading it helped, the second try tells.
        super::load_module("tun");
        device()
    })?;
    // SAFETY: TUNSETIFF reads a struct ifreq at the address it is given, and writes the name it
    // chose back into it; `request` has that size and lives until the call returns.
    unsafe { ioctl::tunsetiff(file.as_raw_fd(), request.as_mut_ptr() as u64) }?;
    Ok(file)
}
