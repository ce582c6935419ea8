//! Servers behind the endpoints: each answer names the address and port that was reached.
//!
//! A request is one line. The answer is the same line, a space, and the server's own
//! `address:port`, over TCP and UDP alike. All servers run on one thread of their own.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
    SockaddrStorage, bind, listen, recvmsg, sendmsg, setsockopt, socket, sockopt,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::oneshot;
use tokio::task::{LocalSet, spawn_local};

use super::plan;
use super::topology::Lab;
use crate::cluster::{Cluster, Family, Protocol};
use crate::kernel::netns::{Netns, NetnsError};

/// The longest request a server takes, its line end included.
pub const MAX_REQUEST: usize = 64;
/// Connections that may wait to be accepted: the most that Linux takes by default.
const BACKLOG: i32 = 4096;

/// Why the servers could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// An endpoint lies in none of the laboratory's ranges.
    #[error("endpoint {0} belongs to no pod of this laboratory")]
    NoPod(SocketAddr),
    /// An endpoint is neither TCP nor UDP.
    #[error("the laboratory has no {0} servers")]
    Protocol(Protocol),
    /// The socket could not be made.
    #[error("cannot listen on {protocol} {address} in {netns}: {source}")]
    Listen {
        /// The namespace's name.
        netns: String,
        /// TCP or UDP.
        protocol: Protocol,
        /// Where.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The servers' thread could not be started.
    #[error("cannot start the servers' thread: {0}")]
    Thread(#[source] io::Error),
}

/// The running servers; they end when this is dropped.
#[derive(Debug)]
pub struct Sinks {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    failures: Arc<AtomicU64>,
}

/// A socket that is about to be served.
enum Listening {
    Tcp(std::net::TcpListener),
    Udp(std::net::UdpSocket),
}

impl Sinks {
    /// Starts servers on every port that the cluster's endpoints use.
    ///
    /// They listen on all addresses of their pods, so whatever the rules do, a packet that reaches
    /// a pod on such a port is answered, and the answer tells where it went.
    pub fn start(lab: &Lab, cluster: &Cluster) -> Result<Self, SinkError> {
        // Sorted, so that two runs serve in the same order.
        let mut wanted: BTreeMap<(usize, Protocol, Family, u16), &Netns> = BTreeMap::new();
        for port in cluster.services.iter().flat_map(|s| &s.ports) {
            if port.protocol == Protocol::Sctp {
                return Err(SinkError::Protocol(port.protocol));
            }
            for endpoint in &port.endpoints {
                let (number, netns) = pod_of(lab, endpoint.address).ok_or(SinkError::NoPod(
                    SocketAddr::new(endpoint.address, endpoint.port),
                ))?;
                let family = Family::of(endpoint.address);
                wanted.insert((number, port.protocol, family, endpoint.port), netns);
            }
        }
        let mut listening = Vec::new();
        for ((_, protocol, family, port), netns) in wanted {
            let any: IpAddr = match family {
                Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
                Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
            };
            let address = SocketAddr::new(any, port);
            let made = netns.run(|| match protocol {
                Protocol::Udp => udp(address).map(Listening::Udp),
                Protocol::Tcp | Protocol::Sctp => tcp(address).map(Listening::Tcp),
            })?;
            listening.push(made.map_err(|source| SinkError::Listen {
                netns: netns.name().to_owned(),
                protocol,
                address,
                source,
            })?);
        }
        let failures = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(SinkError::Thread)?;
        let counter = Arc::clone(&failures);
        let thread = std::thread::Builder::new()
            .name("sinks".to_owned())
            .spawn(move || {
                LocalSet::new().block_on(&runtime, async move {
                    for socket in listening {
                        let counter = Arc::clone(&counter);
                        spawn_local(async move {
                            let result = match socket {
                                Listening::Tcp(socket) => serve_tcp(socket, &counter).await,
                                Listening::Udp(socket) => serve_udp(socket, &counter).await,
                            };
                            if let Err(error) = result {
                                counter.fetch_add(1, Ordering::Relaxed);
                                log::error!("a server of the laboratory ended: {error}");
                            }
                        });
                    }
                    // An error means that Sinks is gone, which is the same signal.
                    let _ = stopped.await;
                });
            })
            .map_err(SinkError::Thread)?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
            failures,
        })
    }

    /// Requests and connections that could not be answered for a reason on the servers' side.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }
}

impl Drop for Sinks {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the servers' thread panicked");
        }
    }
}

/// An answer: the request it belongs to and who gave it.
pub fn parse_answer(line: &[u8]) -> Option<(u64, SocketAddr)> {
    let line = std::str::from_utf8(line).ok()?;
    let (request, by) = line.strip_suffix('\n')?.split_once(' ')?;
    Some((request.parse().ok()?, by.parse().ok()?))
}

/// The namespace that answers on `address`, and a number to sort by.
fn pod_of(lab: &Lab, address: IpAddr) -> Option<(usize, &Netns)> {
    if plan::NODE2_POD_CIDR.contains(address) || plan::NODE2_POD_CIDR6.contains(address) {
        return Some((lab.server_pods().len(), lab.node2()));
    }
    (0..)
        .zip(lab.server_pods())
        .find(|(pod, _)| plan::server_pod(*pod, Family::of(address)).contains(address))
        .map(|(pod, netns)| (pod as usize, netns))
}

fn new_socket(address: SocketAddr, kind: SockType) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let fd = socket(
        family,
        kind,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        // IPv4 has sockets of its own.
        setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    }
    Ok(fd)
}

fn tcp(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let fd = new_socket(address, SockType::Stream)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok(fd.into())
}

fn udp(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let fd = new_socket(address, SockType::Datagram)?;
    if address.is_ipv4() {
        setsockopt(&fd, sockopt::Ipv4PacketInfo, &true)?;
    } else {
        setsockopt(&fd, sockopt::Ipv6RecvPacketInfo, &true)?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(fd.into())
}

/// `request` (a whole line) answered by `by`.
fn answer(request: &[u8], by: SocketAddr) -> Vec<u8> {
    let text = request.strip_suffix(b"\n").unwrap_or(request);
    let mut answer = text.to_vec();
    answer.extend_from_slice(format!(" {by}\n").as_bytes());
    answer
}

async fn serve_tcp(socket: std::net::TcpListener, failures: &Arc<AtomicU64>) -> io::Result<()> {
    let listener = TcpListener::from_std(socket)?;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let failures = Arc::clone(failures);
                spawn_local(async move {
                    if serve_connection(stream).await.is_err() {
                        failures.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(_) => {
                failures.fetch_add(1, Ordering::Relaxed);
                // Out of descriptors: until one is free accept would fail at once, forever.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

/// Answers requests until the client closes: the client closes first, so the pods' side never
/// collects `TIME_WAIT`.
async fn serve_connection(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let by = stream.local_addr()?;
    let mut buffer = [0; MAX_REQUEST];
    let mut filled = 0;
    loop {
        let read = match stream.read(&mut buffer[filled..]).await {
            // The client gave up, which is its own business.
            Ok(0) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            read => read?,
        };
        filled += read;
        while let Some(end) = buffer[..filled].iter().position(|byte| *byte == b'\n') {
            stream.write_all(&answer(&buffer[..=end], by)).await?;
            buffer.copy_within(end + 1..filled, 0);
            filled -= end + 1;
        }
        if filled == buffer.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a request longer than a server takes",
            ));
        }
    }
}

async fn serve_udp(socket: std::net::UdpSocket, failures: &AtomicU64) -> io::Result<()> {
    let port = socket.local_addr()?.port();
    let socket = UdpSocket::from_std(socket)?;
    let mut buffer = [0; MAX_REQUEST];
    loop {
        let received = socket
            .async_io(Interest::READABLE, || receive(&socket, &mut buffer))
            .await;
        let sent = received.and_then(|received| {
            let by = SocketAddr::new(received.to, port);
            send(
                &socket,
                &answer(&buffer[..received.length], by),
                received.to,
                received.from,
            )
        });
        if sent.is_err() {
            failures.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// One datagram.
struct Received {
    length: usize,
    from: SocketAddr,
    /// The address it was sent to, after translation.
    to: IpAddr,
}

fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = cmsg_space!(libc::in_pktinfo, libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::empty(),
    )?;
    let from = message.address.as_ref().and_then(socket_addr);
    let to = message.cmsgs()?.find_map(|message| match message {
        // ipi_addr: the destination in the header (in network order).
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(IpAddr::V4(Ipv4Addr::from_bits(
            u32::from_be(info.ipi_addr.s_addr),
        ))),
        ControlMessageOwned::Ipv6PacketInfo(info) => {
            Some(IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr)))
        }
        _ => None,
    });
    let (Some(from), Some(to)) = (from, to) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a datagram without its addresses",
        ));
    };
    Ok(Received {
        length: message.bytes,
        from,
        to,
    })
}

/// Answers from the address that was asked: without it the kernel would choose the pod's own.
fn send(socket: &UdpSocket, answer: &[u8], from: IpAddr, to: SocketAddr) -> io::Result<()> {
    let parts = [IoSlice::new(answer)];
    let to = SockaddrStorage::from(to);
    let fd = socket.as_raw_fd();
    match from {
        IpAddr::V4(from) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr {
                    s_addr: from.to_bits().to_be(),
                },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            let control = [ControlMessage::Ipv4PacketInfo(&info)];
            sendmsg(fd, &parts, &control, MsgFlags::empty(), Some(&to))?;
        }
        IpAddr::V6(from) => {
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: from.octets(),
                },
                ipi6_ifindex: 0,
            };
            let control = [ControlMessage::Ipv6PacketInfo(&info)];
            sendmsg(fd, &parts, &control, MsgFlags::empty(), Some(&to))?;
        }
    }
    Ok(())
}

fn socket_addr(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddrV4::from(*v4).into());
    }
    address
        .as_sockaddr_in6()
        .map(|v6| SocketAddrV6::from(*v6).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_names_request_and_server() {
        let by: SocketAddr = "[fd00::1]:8080".parse().expect("an address");
        let line = answer(b"17\n", by);
        assert_eq!(line, b"17 [fd00::1]:8080\n");
        assert_eq!(parse_answer(&line), Some((17, by)));
        assert_eq!(parse_answer(b"17 [fd00::1]:8080"), None);
        assert_eq!(parse_answer(b"\xff \n"), None);
        assert_eq!(parse_answer(b""), None);
    }
}
