//! SCTP without the kernel's SCTP, which the build machine's lacks: packets of one chunk over raw sockets.
//! Conntrack and nat take them as they would take an association's.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tracer::kernel::netns::Netns;
use tracer_ebpf::record::{protocol, sctp};

/// The common header (RFC 9260, section 3.1).
const HEADER: usize = 12;
/// An INIT's initiate tag, by which its answer is known.
const TAG: u32 = 0x5ca1_ab1e;

/// One end of an association: an address and port whose packets a raw socket sends and gets.
#[derive(Debug)]
pub(crate) struct End {
    socket: Socket,
    address: SocketAddr,
}

impl End {
    /// One in this namespace.
    pub(crate) fn bind(ns: &Netns, address: SocketAddr, patience: Duration) -> Self {
        let number = Protocol::from(i32::from(protocol::SCTP));
        let open = || Socket::new(Domain::for_address(address), Type::RAW, Some(number));
        let socket = ns.run(open).expect("enters").expect("root");
        socket
            .bind(&SocketAddr::new(address.ip(), 0).into())
            .expect("binds");
        socket.set_read_timeout(Some(patience)).expect("is set");
        Self { socket, address }
    }

    /// Asks for an association. A rule of the sender's own may refuse it.
    pub(crate) fn init(&self, to: SocketAddr) {
        let _ = self.send(to, 0, sctp::INIT, &parameters(TAG));
    }

    /// Answers an INIT that comes to this end.
    pub(crate) fn answer(&self, how: u8) {
        let (from, kind) = self.receive();
        assert_eq!(kind, sctp::INIT);
        let body = match how {
            // A state cookie follows (RFC 9260, section 3.3.3).
            sctp::INIT_ACK => [parameters(!TAG).as_slice(), &[0, 7, 0, 8, 1, 2, 3, 4]].concat(),
            _ => Vec::new(),
        };
        self.send(from, TAG, how, &body).expect("sends");
    }

    /// The chunk type of the next packet to this end, and who sent it.
    pub(crate) fn receive(&self) -> (SocketAddr, u8) {
        loop {
            let mut buffer = [MaybeUninit::uninit(); 256];
            let (length, from) = self.socket.recv_from(&mut buffer).expect("a packet");
            // SAFETY: so many bytes were written.
            let bytes: Vec<u8> = buffer[..length]
                .iter()
                .map(|byte| unsafe { byte.assume_init() })
                .collect();
            // Raw sockets of IPv4 get its header too.
            let start = match self.address.ip() {
                IpAddr::V4(_) => usize::from(bytes[0] & 0xf) * 4,
                IpAddr::V6(_) => 0,
            };
            let port = |at: usize| u16::from_be_bytes([bytes[start + at], bytes[start + at + 1]]);
            if port(2) == self.address.port() {
                let from = from.as_socket().expect("an address").ip();
                return (SocketAddr::new(from, port(0)), bytes[start + HEADER]);
            }
        }
    }

    fn send(&self, to: SocketAddr, tag: u32, kind: u8, body: &[u8]) -> io::Result<()> {
        let length = u16::try_from(4 + body.len()).expect("short");
        let mut packet = Vec::new();
        packet.extend(self.address.port().to_be_bytes());
        packet.extend(to.port().to_be_bytes());
        packet.extend(tag.to_be_bytes());
        packet.extend([0; 4]);
        packet.extend([kind, 0]);
        packet.extend(length.to_be_bytes());
        packet.extend(body);
        let sum = crc32c(&packet);
        packet[8..12].copy_from_slice(&sum.to_le_bytes());
        let to = SocketAddr::new(to.ip(), 0).into();
        self.socket.send_to(&packet, &to).map(drop)
    }
}

/// What INIT and INIT ACK say: tag, window, streams, first number (RFC 9260, section 3.3.2).
fn parameters(tag: u32) -> [u8; 16] {
    let mut body = [0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1];
    body[..4].copy_from_slice(&tag.to_be_bytes());
    body
}

/// RFC 9260, appendix A.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut sum = u32::MAX;
    for byte in bytes {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = sum >> 1 ^ (0x82f6_3b78 & (sum & 1).wrapping_neg());
        }
    }
    !sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_sctps() {
        // The check value of CRC-32C.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
