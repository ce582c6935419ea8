//! Packets made by hand: one TCP SYN or UDP datagram, whole and with right checksums.

use std::net::{IpAddr, SocketAddr};

use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::ipv4::{self, MutableIpv4Packet};
use pnet_packet::ipv6::MutableIpv6Packet;
use pnet_packet::tcp::{self, MutableTcpPacket, TcpFlags};
use pnet_packet::udp::{self, MutableUdpPacket};
use pnet_packet::{MutablePacket as _, Packet as _};

use crate::cluster::Protocol;

/// Length of an IPv4 header without options.
const IPV4_HEADER: usize = 20;
/// Length of an IPv6 header.
const IPV6_HEADER: usize = 40;
/// Length of a TCP header without options.
const TCP_HEADER: usize = 20;
/// Length of a UDP header.
const UDP_HEADER: usize = 8;
/// Hops a packet may take.
const TTL: u8 = 64;

/// Why a packet cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CraftError {
    /// One address is IPv4, the other IPv6.
    #[error("a packet cannot go from one family to the other")]
    Families,
    /// Neither TCP nor UDP.
    #[error("no packets are made for {0}")]
    Protocol(Protocol),
    /// The payload does not fit.
    #[error("a payload of {0} bytes does not fit into one packet")]
    TooLong(usize),
}

/// An IP packet without link header: a TCP SYN (with `payload`, usually empty) or a UDP datagram.
pub fn craft(
    protocol: Protocol,
    from: SocketAddr,
    to: SocketAddr,
    payload: &[u8],
) -> Result<Vec<u8>, CraftError> {
    let too_long = || CraftError::TooLong(payload.len());
    let header = match protocol {
        Protocol::Tcp => TCP_HEADER,
        Protocol::Udp => UDP_HEADER,
        Protocol::Sctp => return Err(CraftError::Protocol(protocol)),
    };
    let transport = header + payload.len();
    let number = match protocol {
        Protocol::Tcp => IpNextHeaderProtocols::Tcp,
        _ => IpNextHeaderProtocols::Udp,
    };
    match (from.ip(), to.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let length = u16::try_from(IPV4_HEADER + transport).map_err(|_| too_long())?;
            let mut bytes = vec![0; usize::from(length)];
            let mut ip = MutableIpv4Packet::new(&mut bytes).ok_or_else(too_long)?;
            ip.set_version(4);
            ip.set_header_length(5);
            ip.set_total_length(length);
            ip.set_flags(ipv4::Ipv4Flags::DontFragment);
            ip.set_ttl(TTL);
            ip.set_next_level_protocol(number);
            ip.set_source(src);
            ip.set_destination(dst);
            fill_transport(ip.payload_mut(), protocol, from, to, payload).ok_or_else(too_long)?;
            let checksum = ipv4::checksum(&ip.to_immutable());
            ip.set_checksum(checksum);
            Ok(bytes)
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let length = u16::try_from(transport).map_err(|_| too_long())?;
            let mut bytes = vec![0; IPV6_HEADER + transport];
            let mut ip = MutableIpv6Packet::new(&mut bytes).ok_or_else(too_long)?;
            ip.set_version(6);
            ip.set_payload_length(length);
            ip.set_next_header(number);
            ip.set_hop_limit(TTL);
            ip.set_source(src);
            ip.set_destination(dst);
            fill_transport(ip.payload_mut(), protocol, from, to, payload).ok_or_else(too_long)?;
            Ok(bytes)
        }
        _ => Err(CraftError::Families),
    }
}

/// Fills the transport header, the payload and the checksum over both and the addresses.
fn fill_transport(
    bytes: &mut [u8],
    protocol: Protocol,
    from: SocketAddr,
    to: SocketAddr,
    payload: &[u8],
) -> Option<()> {
    if protocol == Protocol::Tcp {
        let mut tcp = MutableTcpPacket::new(bytes)?;
        tcp.set_source(from.port());
        tcp.set_destination(to.port());
        tcp.set_data_offset(5);
        tcp.set_flags(TcpFlags::SYN);
        tcp.set_window(u16::MAX);
        tcp.set_payload(payload);
        let checksum = match (from.ip(), to.ip()) {
            (IpAddr::V4(s), IpAddr::V4(d)) => tcp::ipv4_checksum(&tcp.to_immutable(), &s, &d),
            (IpAddr::V6(s), IpAddr::V6(d)) => tcp::ipv6_checksum(&tcp.to_immutable(), &s, &d),
            _ => return None,
        };
        tcp.set_checksum(checksum);
    } else {
        let length = u16::try_from(bytes.len()).ok()?;
        let mut udp = MutableUdpPacket::new(bytes)?;
        udp.set_source(from.port());
        udp.set_destination(to.port());
        udp.set_length(length);
        udp.set_payload(payload);
        let checksum = match (from.ip(), to.ip()) {
            (IpAddr::V4(s), IpAddr::V4(d)) => udp::ipv4_checksum(&udp.to_immutable(), &s, &d),
            (IpAddr::V6(s), IpAddr::V6(d)) => udp::ipv6_checksum(&udp.to_immutable(), &s, &d),
            _ => return None,
        };
        // Zero on the wire means "none", which IPv6 does not allow; all ones is the same sum.
        udp.set_checksum(if checksum == 0 { u16::MAX } else { checksum });
        debug_assert_eq!(udp.packet().len(), usize::from(length));
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;
    use crate::record::headers::dissect;

    fn protocol() -> impl Strategy<Value = Protocol> {
        prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp)]
    }

    fn ends() -> impl Strategy<Value = (SocketAddr, SocketAddr)> {
        let ports = (any::<u16>(), any::<u16>());
        let v4 = (any::<u32>(), any::<u32>(), ports).prop_map(|(s, d, (sp, dp))| {
            (
                SocketAddr::new(Ipv4Addr::from_bits(s).into(), sp),
                SocketAddr::new(Ipv4Addr::from_bits(d).into(), dp),
            )
        });
        let v6 = (any::<u128>(), any::<u128>(), ports).prop_map(|(s, d, (sp, dp))| {
            (
                SocketAddr::new(Ipv6Addr::from_bits(s).into(), sp),
                SocketAddr::new(Ipv6Addr::from_bits(d).into(), dp),
            )
        });
        prop_oneof![v4, v6]
    }

    proptest! {
        #[test]
        fn what_is_crafted_is_dissected(
            protocol in protocol(),
            (from, to) in ends(),
            payload in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let packet = craft(protocol, from, to, &payload).expect("a small packet");
            let headers = dissect(&packet).expect("its headers");
            prop_assert_eq!(headers.addresses(), Some((from, to)));
            prop_assert_eq!(headers.protocol, protocol.number());
            let flags = (protocol == Protocol::Tcp).then_some(TcpFlags::SYN);
            prop_assert_eq!(headers.tcp_flags, flags);
            // The probes keep the first 64 bytes: that is enough for all of it.
            let kept = &packet[..packet.len().min(64)];
            prop_assert_eq!(dissect(kept), Some(headers));
        }

        #[test]
        fn a_truncated_packet_says_less_and_never_something_else(
            protocol in protocol(),
            (from, to) in ends(),
            length in 0_usize..64,
        ) {
            let packet = craft(protocol, from, to, b"payload").expect("a small packet");
            let whole = dissect(&packet).expect("its headers");
            if let Some(cut) = dissect(&packet[..packet.len().min(length)]) {
                prop_assert_eq!((cut.src, cut.dst, cut.protocol), (whole.src, whole.dst, whole.protocol));
                prop_assert!(cut.sport.is_none() || cut.sport == whole.sport);
                prop_assert!(cut.dport.is_none() || cut.dport == whole.dport);
                prop_assert!(cut.tcp_flags.is_none() || cut.tcp_flags == whole.tcp_flags);
            }
        }
    }

    #[test]
    fn what_cannot_be_sent_is_refused() {
        let v4: SocketAddr = "10.0.0.1:1".parse().expect("an address");
        let v6: SocketAddr = "[::1]:1".parse().expect("an address");
        assert_eq!(craft(Protocol::Udp, v4, v6, b""), Err(CraftError::Families));
        assert_eq!(
            craft(Protocol::Sctp, v4, v4, b""),
            Err(CraftError::Protocol(Protocol::Sctp))
        );
        let long = vec![0; 65_536];
        assert_eq!(
            craft(Protocol::Udp, v4, v4, &long),
            Err(CraftError::TooLong(65_536))
        );
    }
}
