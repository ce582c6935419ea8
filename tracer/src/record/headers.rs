//! The headers at the start of a captured packet, which may be cut off anywhere.

use std::net::{IpAddr, SocketAddr};

use pnet_packet::ip::{IpNextHeaderProtocol, IpNextHeaderProtocols};
use pnet_packet::ipv4::Ipv4Packet;
use pnet_packet::ipv6::Ipv6Packet;
use tracer_ebpf::record::{sctp, tcp};

/// What the headers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// 4 or 6.
    pub version: u8,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Transport protocol (IANA number), behind IPv6 extension headers.
    pub protocol: u8,
    /// Source port; `None` for protocols without ports, later fragments, or if cut off.
    pub sport: Option<u16>,
    /// Destination port, likewise.
    pub dport: Option<u16>,
    /// TCP's flags byte; `None` if it is not TCP or cut off.
    pub tcp_flags: Option<u8>,
    /// By what a packet that opens a connection and is sent once more is known: the sequence number of TCP's
    /// SYN, the initiate tag of SCTP's INIT; `None` of other packets, or if cut off.
    pub opening: Option<u32>,
}

impl Headers {
    /// Source and destination with their ports, if the packet has any.
    pub fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        Some((
            SocketAddr::new(self.src, self.sport?),
            SocketAddr::new(self.dst, self.dport?),
        ))
    }
}

/// IPv6 extension headers that may stand before the transport header, at most this many.
const MAX_EXTENSIONS: usize = 8;
/// Where TCP's sequence number and flags lie in its header.
const TCP_SEQUENCE: usize = 4;
const TCP_FLAGS: usize = 13;
/// Where SCTP's first chunk begins, and its tag if it is an INIT (RFC 9260, section 3.3.2).
const SCTP_CHUNK: usize = 12;
const SCTP_TAG: usize = 16;

/// Reads the headers of an IP packet without link header; `None` if not even the IP header is whole.
///
/// Lengths that the packet states and that a capture cuts off are not held against it.
pub fn dissect(packet: &[u8]) -> Option<Headers> {
    match packet.first()? >> 4 {
        4 => {
            let ip = Ipv4Packet::new(packet)?;
            let length = usize::from(ip.get_header_length()) * 4;
            if length < Ipv4Packet::minimum_packet_size() {
                return None;
            }
            // A later fragment starts with data where the ports would be.
            let transport = if ip.get_fragment_offset() == 0 {
                packet.get(length..).unwrap_or_default()
            } else {
                &[]
            };
            Some(with_transport(
                (4, ip.get_source().into(), ip.get_destination().into()),
                ip.get_next_level_protocol(),
                transport,
            ))
        }
        6 => {
            let ip = Ipv6Packet::new(packet)?;
            let rest = packet.get(Ipv6Packet::minimum_packet_size()..)?;
            let (protocol, transport) = behind_extensions(ip.get_next_header(), rest);
            Some(with_transport(
                (6, ip.get_source().into(), ip.get_destination().into()),
                protocol,
                transport,
            ))
        }
        _ => None,
    }
}

/// The transport protocol and what is there of its header.
fn behind_extensions(
    mut next: IpNextHeaderProtocol,
    mut rest: &[u8],
) -> (IpNextHeaderProtocol, &[u8]) {
    for _ in 0..MAX_EXTENSIONS {
        let length = match next {
            IpNextHeaderProtocols::Hopopt
            | IpNextHeaderProtocols::Ipv6Route
            | IpNextHeaderProtocols::Ipv6Opts => {
                rest.get(1).map(|length| (usize::from(*length) + 1) * 8)
            }
            IpNextHeaderProtocols::Ipv6Frag => Some(8),
            _ => return (next, rest),
        };
        let Some(length) = length else {
            return (next, &[]);
        };
        let offset = rest
            .get(2..4)
            .map(|b| u16::from_be_bytes([b[0], b[1]]) >> 3);
        let later = next == IpNextHeaderProtocols::Ipv6Frag && offset != Some(0);
        next = IpNextHeaderProtocol(rest.first().copied().unwrap_or(next.0));
        rest = rest.get(length..).unwrap_or_default();
        if later {
            return (next, &[]);
        }
    }
    (next, &[])
}

fn with_transport(
    (version, src, dst): (u8, IpAddr, IpAddr),
    protocol: IpNextHeaderProtocol,
    transport: &[u8],
) -> Headers {
    let has_ports = matches!(
        protocol,
        IpNextHeaderProtocols::Tcp
            | IpNextHeaderProtocols::Udp
            | IpNextHeaderProtocols::UdpLite
            | IpNextHeaderProtocols::Sctp
    );
    let port = |at: usize| {
        let bytes = transport.get(at..at + 2).filter(|_| has_ports)?;
        Some(u16::from_be_bytes([bytes[0], bytes[1]]))
    };
    let byte_of = |wanted, at: usize| transport.get(at).copied().filter(|_| protocol == wanted);
    let tcp_flags = byte_of(IpNextHeaderProtocols::Tcp, TCP_FLAGS);
    let chunk = byte_of(IpNextHeaderProtocols::Sctp, SCTP_CHUNK);
    let opening = match (tcp_flags, chunk) {
        (Some(flags), _) if flags & (tcp::SYN | tcp::ACK) == tcp::SYN => Some(TCP_SEQUENCE),
        (_, Some(sctp::INIT)) => Some(SCTP_TAG),
        _ => None,
    };
    let number = |at: usize| {
        let bytes = transport.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_be_bytes(bytes))
    };
    Headers {
        version,
        src,
        dst,
        protocol: protocol.0,
        sport: port(0),
        dport: port(2),
        tcp_flags,
        opening: opening.and_then(number),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A TCP SYN from 10.244.64.1:33000 to 10.96.0.10:80.
    const SYN: [u8; 40] = [
        0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 244, 64, 1, 10, 96, 0, 10, // IPv4
        0x80, 0xe8, 0, 80, 1, 2, 3, 4, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0, // TCP
    ];

    #[test]
    fn a_packet_is_read_as_far_as_it_goes() {
        let whole = dissect(&SYN).expect("a whole packet");
        assert_eq!(
            whole
                .addresses()
                .map(|(s, d)| (s.to_string(), d.to_string())),
            Some(("10.244.64.1:33000".to_owned(), "10.96.0.10:80".to_owned()))
        );
        assert_eq!((whole.protocol, whole.tcp_flags), (6, Some(2)));
        assert_eq!(whole.opening, Some(0x0102_0304));
        // Of a SYN-ACK nothing is asked.
        let mut answer = SYN;
        answer[33] |= tcp::ACK;
        assert_eq!(dissect(&answer).expect("a whole packet").opening, None);
        let cut = dissect(&SYN[..24]).expect("ports are there");
        assert_eq!((cut.dport, cut.tcp_flags), (Some(80), None));
        let cut = dissect(&SYN[..23]).expect("the address is there");
        assert_eq!((cut.sport, cut.dport), (Some(33_000), None));
        assert_eq!(dissect(&SYN[..19]), None);
        assert_eq!(dissect(&[]), None);
    }

    #[test]
    fn a_later_fragment_has_no_ports() {
        let mut fragment = SYN;
        fragment[6] = 0;
        fragment[7] = 10;
        let headers = dissect(&fragment).expect("an IP header");
        assert_eq!((headers.protocol, headers.sport), (6, None));
    }

    #[test]
    fn ipv6_extensions_are_passed_over() {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, 0, 64];
        packet.extend([0xfd; 32]);
        // Hop-by-hop options of 16 bytes, a first fragment, then UDP.
        packet.extend([44, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        packet.extend([17, 0, 0, 1, 0, 0, 0, 9]);
        packet.extend([0, 53, 0, 54, 0, 8, 0, 0]);
        let headers = dissect(&packet).expect("headers");
        assert_eq!(
            (headers.protocol, headers.sport, headers.dport),
            (17, Some(53), Some(54))
        );
    }

    #[test]
    fn an_association_is_known_by_its_tag() {
        let mut packet = SYN;
        packet[9] = 132;
        packet[32..40].copy_from_slice(&[sctp::INIT, 0, 0, 20, 9, 8, 7, 6]);
        let headers = dissect(&packet).expect("a whole packet");
        assert_eq!(
            (headers.opening, headers.tcp_flags),
            (Some(0x0908_0706), None)
        );
        packet[32] = sctp::INIT_ACK;
        assert_eq!(dissect(&packet).expect("a whole packet").opening, None);
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..96)) {
            let _ = dissect(&bytes);
        }

        #[test]
        fn no_ip_header_makes_it_panic(
            version in prop_oneof![Just(0x45_u8), Just(0x4f), Just(0x40), Just(0x60)],
            mut bytes in proptest::collection::vec(any::<u8>(), 1..96),
        ) {
            bytes[0] = version;
            let _ = dissect(&bytes);
        }
    }
}
