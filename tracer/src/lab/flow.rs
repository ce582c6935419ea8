//! One flow, from its socket to its outcome.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect, recv, setsockopt,
    socket, sockopt,
};
use tokio::io::Interest;
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::Instant;

use super::sink;
use crate::cluster::Protocol;
use crate::kernel::clock::monotonic_ns;
use crate::kernel::netns::Netns;

/// What became of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// Every request was answered by an endpoint of the Service that was asked.
    Delivered {
        /// Who gave the first answer.
        by: SocketAddr,
    },
    /// Answered by someone who is no endpoint of that Service.
    Misdelivered {
        /// Who answered.
        by: SocketAddr,
    },
    /// Refused: a RST for the SYN, or an ICMP error.
    Refused,
    /// The connection was ended by a RST, or by a FIN before the answer.
    Reset,
    /// No answer in time.
    Timeout {
        /// TCP: the connection stood. UDP: an earlier request of the flow was answered.
        connected: bool,
    },
    /// The client's own kernel did not send it.
    Unsent {
        /// The kind of error.
        kind: io::ErrorKind,
        /// Its number, which tells `EPERM` of a rule from `EACCES` of a route.
        errno: Option<i32>,
    },
}

impl Outcome {
    /// Is this what the user wanted?
    pub const fn is_delivered(&self) -> bool {
        matches!(self, Self::Delivered { .. })
    }

    /// The client could not send.
    pub(super) fn unsent(error: &io::Error) -> Self {
        Self::Unsent {
            kind: error.kind(),
            errno: error.raw_os_error(),
        }
    }

    /// What an error that came back from the network means.
    fn of_error(error: &io::Error, connected: bool) -> Self {
        match error.raw_os_error().map(Errno::from_raw) {
            // The last four are how the kernel tells of ICMP errors: REJECT's other answers.
            Some(
                Errno::ECONNREFUSED
                | Errno::EHOSTUNREACH
                | Errno::ENETUNREACH
                | Errno::EACCES
                | Errno::ENOPROTOOPT,
            ) => Self::Refused,
            Some(Errno::ECONNRESET | Errno::EPIPE) => Self::Reset,
            Some(Errno::ETIMEDOUT) => Self::Timeout { connected },
            _ => Self::unsent(error),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Delivered { by } => write!(f, "delivered by {by}"),
            Self::Misdelivered { by } => write!(f, "misdelivered: answered by {by}"),
            Self::Refused => f.write_str("refused"),
            Self::Reset => f.write_str("reset"),
            Self::Timeout { connected: true } => {
                f.write_str("no answer in time on a flow that had been set up")
            }
            Self::Timeout { connected: false } => f.write_str("no answer in time"),
            Self::Unsent {
                errno: Some(errno), ..
            } => write!(f, "not sent: {}", Errno::from_raw(*errno)),
            Self::Unsent { kind, .. } => write!(f, "not sent: {kind}"),
        }
    }
}

/// A socket of the namespace, bound to `source`.
///
/// The namespace is entered for the one system call that needs it; nothing awaits in there.
pub(super) fn socket_in(
    netns: &Netns,
    protocol: Protocol,
    source: SocketAddr,
) -> io::Result<OwnedFd> {
    let family = if source.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let kind = match protocol {
        Protocol::Udp => SockType::Datagram,
        Protocol::Tcp | Protocol::Sctp => SockType::Stream,
    };
    let fd = netns
        .run(|| {
            socket(
                family,
                kind,
                SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
                None,
            )
        })
        .map_err(io::Error::other)??;
    if protocol == Protocol::Tcp {
        setsockopt(&fd, sockopt::TcpNoDelay, &true)?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(source))?;
    Ok(fd)
}

/// Sends the first packet: TCP's SYN, or UDP's first request.
///
/// It runs in the sender itself, so that a packet leaves when it is due and not when its task
/// gets its turn.
pub(super) fn send_first(
    fd: &OwnedFd,
    protocol: Protocol,
    destination: SocketAddr,
) -> Result<(), Outcome> {
    match connect(fd.as_raw_fd(), &SockaddrStorage::from(destination)) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(Errno::ECONNREFUSED) => return Err(Outcome::Refused),
        Err(error) => return Err(Outcome::unsent(&error.into())),
    }
    if protocol == Protocol::Udp {
        nix::unistd::write(fd, &request(0)).map_err(|error| match error {
            Errno::ECONNREFUSED => Outcome::Refused,
            error => Outcome::unsent(&error.into()),
        })?;
    }
    Ok(())
}

/// Request number `n` as it goes over the wire.
pub(super) fn request(n: u64) -> Vec<u8> {
    format!("{n}\n").into_bytes()
}

/// When what happened on a flow; nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Debug, Default)]
pub(super) struct Times {
    /// TCP: the connection stood.
    pub(super) connected: Option<u64>,
    /// The first (TCP: the only) answer.
    pub(super) answered: Option<u64>,
    /// UDP: how long each later answer took.
    pub(super) later: Vec<u64>,
}

/// Ends a TCP flow whose SYN went out at `sent_ns`.
pub(super) async fn finish_tcp(
    fd: OwnedFd,
    sent_ns: u64,
    patience: Duration,
    may_answer: impl Fn(SocketAddr) -> bool,
) -> (Outcome, Times) {
    let connected = Cell::new(None);
    let talk = async {
        let stream = TcpStream::from_std(fd.into()).map_err(|error| Outcome::unsent(&error))?;
        send_tcp(&stream, &connected)
            .await
            .map_err(|error| Outcome::of_error(&error, connected.get().is_some()))?;
        read_tcp(&stream)
            .await
            .map_err(|error| Outcome::of_error(&error, true))?
            .ok_or(Outcome::Reset)
    };
    let answered = tokio::time::timeout_at(deadline(sent_ns, patience), talk).await;
    let mut times = Times {
        connected: connected.get(),
        ..Times::default()
    };
    let outcome = match answered {
        Err(_) => Outcome::Timeout {
            connected: times.connected.is_some(),
        },
        Ok(Err(outcome)) => outcome,
        Ok(Ok((by, at))) => {
            times.answered = Some(at);
            judge(by, may_answer)
        }
    };
    (outcome, times)
}

/// Waits for the connection and sends the request. A write on a socket that still connects
/// answers `EAGAIN`, on one that was refused the reason: no other question need be asked.
async fn send_tcp(stream: &TcpStream, connected: &Cell<Option<u64>>) -> io::Result<()> {
    loop {
        stream.writable().await?;
        let now = monotonic_ns();
        match stream.try_write(&request(0)) {
            Ok(_) => {
                connected.set(Some(now));
                return Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// The answer; `None` if the server ended the connection without one.
async fn read_tcp(stream: &TcpStream) -> io::Result<Option<(SocketAddr, u64)>> {
    let mut buffer = [0; 2 * sink::MAX_REQUEST];
    let mut filled = 0;
    loop {
        stream.readable().await?;
        match stream.try_read(&mut buffer[filled..]) {
            Ok(0) => return Ok(None),
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        let now = monotonic_ns();
        if buffer[..filled].contains(&b'\n') {
            // Something else than a server of ours answers: as good as no answer.
            return Ok(sink::parse_answer(&buffer[..filled]).map(|(_, by)| (by, now)));
        }
    }
}

/// Ends a UDP flow whose first request went out at `sent_ns`: its answer, then `later` further
/// requests, each with patience of its own.
pub(super) async fn finish_udp(
    fd: OwnedFd,
    sent_ns: u64,
    patience: Duration,
    later: u32,
    may_answer: impl Fn(SocketAddr) -> bool,
) -> (Outcome, Times) {
    let mut times = Times::default();
    let socket = match UdpSocket::from_std(fd.into()) {
        Ok(socket) => socket,
        Err(error) => return (Outcome::unsent(&error), times),
    };
    let mut sent = sent_ns;
    let mut first = None;
    for n in 0..=u64::from(later) {
        if n > 0 {
            sent = monotonic_ns();
            if let Err(error) = socket.try_send(&request(n)) {
                return (Outcome::of_error(&error, true), times);
            }
        }
        let answer = tokio::time::timeout_at(deadline(sent, patience), read_udp(&socket, n)).await;
        let (by, at) = match answer {
            Err(_) => return (Outcome::Timeout { connected: n > 0 }, times),
            Ok(Err(error)) => return (Outcome::of_error(&error, n > 0), times),
            Ok(Ok(answer)) => answer,
        };
        if n == 0 {
            times.answered = Some(at);
        } else {
            times.later.push(at - sent);
        }
        let outcome = judge(by, &may_answer);
        if !outcome.is_delivered() {
            return (outcome, times);
        }
        first = first.or(Some(outcome));
    }
    // Request 0 always exists, so there is a first answer.
    (
        first.unwrap_or(Outcome::Timeout { connected: false }),
        times,
    )
}

/// The answer to request `n`; others are passed over.
async fn read_udp(socket: &UdpSocket, n: u64) -> io::Result<(SocketAddr, u64)> {
    let mut buffer = [0; 2 * sink::MAX_REQUEST];
    loop {
        let read = receive_udp(socket, &mut buffer).await?;
        let now = monotonic_ns();
        match sink::parse_answer(&buffer[..read]) {
            Some((request, by)) if request == n => return Ok((by, now)),
            _ => {}
        }
    }
}

/// The next datagram or ICMP error. An error alone does not make a UDP socket readable, so it is
/// waited for by name; tokio's own receive would sleep through it.
async fn receive_udp(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<usize> {
    socket
        .async_io(Interest::READABLE | Interest::ERROR, || {
            Ok(recv(socket.as_raw_fd(), buffer, MsgFlags::empty())?)
        })
        .await
}

fn judge(by: SocketAddr, may_answer: impl Fn(SocketAddr) -> bool) -> Outcome {
    if may_answer(by) {
        Outcome::Delivered { by }
    } else {
        Outcome::Misdelivered { by }
    }
}

/// `patience` after `sent_ns`, on tokio's clock.
fn deadline(sent_ns: u64, patience: Duration) -> Instant {
    let passed = Duration::from_nanos(monotonic_ns().saturating_sub(sent_ns));
    Instant::now() + patience.saturating_sub(passed)
}

/// A flow of an established connection, to be driven from outside.
#[derive(Debug)]
pub(super) enum Conversation {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Conversation {
    /// Opens a flow and waits for its first answer; the outcome if it is not delivered.
    pub(super) async fn open(
        fd: OwnedFd,
        protocol: Protocol,
        destination: SocketAddr,
        patience: Duration,
        may_answer: impl Fn(SocketAddr) -> bool,
    ) -> Result<Self, Outcome> {
        let sent = monotonic_ns();
        send_first(&fd, protocol, destination)?;
        let unsent = |error: io::Error| Outcome::unsent(&error);
        let connected = Cell::new(None);
        let talk = async {
            if protocol == Protocol::Udp {
                let socket = UdpSocket::from_std(fd.into()).map_err(unsent)?;
                let (by, _) = read_udp(&socket, 0)
                    .await
                    .map_err(|error| Outcome::of_error(&error, false))?;
                return Ok((Self::Udp(socket), by));
            }
            let stream = TcpStream::from_std(fd.into()).map_err(unsent)?;
            send_tcp(&stream, &connected)
                .await
                .map_err(|error| Outcome::of_error(&error, false))?;
            let (by, _) = read_tcp(&stream)
                .await
                .map_err(|error| Outcome::of_error(&error, true))?
                .ok_or(Outcome::Reset)?;
            Ok((Self::Tcp(stream), by))
        };
        let (conversation, by) = tokio::time::timeout_at(deadline(sent, patience), talk)
            .await
            .map_err(|_| Outcome::Timeout {
                connected: connected.get().is_some(),
            })??;
        match judge(by, may_answer) {
            Outcome::Delivered { .. } => Ok(conversation),
            other => Err(other),
        }
    }

    /// Sends request `n` now, or not at all.
    pub(super) fn send(&self, n: u64) -> Result<(), Outcome> {
        let sent = match self {
            Self::Tcp(stream) => stream.try_write(&request(n)),
            Self::Udp(socket) => socket.try_send(&request(n)),
        };
        sent.map(|_| ())
            .map_err(|error| Outcome::of_error(&error, true))
    }

    /// Waits for answers and hands each to `answered`; ends when nothing can come any more.
    pub(super) async fn receive(
        &self,
        mut answered: impl FnMut(u64, SocketAddr, u64),
        mut failed: impl FnMut(Outcome, u64),
    ) {
        let mut buffer = [0; 1024];
        let mut filled = 0;
        loop {
            let read = match self {
                Self::Tcp(stream) => match stream.readable().await {
                    Ok(()) => stream.try_read(&mut buffer[filled..]),
                    Err(error) => Err(error),
                },
                Self::Udp(socket) => receive_udp(socket, &mut buffer[filled..]).await,
            };
            let now = monotonic_ns();
            match (read, self) {
                (Err(error), _) if error.kind() == io::ErrorKind::WouldBlock => continue,
                // UDP goes on after an ICMP error, TCP is over.
                (Err(error), Self::Udp(_)) => {
                    failed(Outcome::of_error(&error, true), now);
                    continue;
                }
                (Err(error), Self::Tcp(_)) => {
                    return failed(Outcome::of_error(&error, true), now);
                }
                (Ok(0), Self::Tcp(_)) => return failed(Outcome::Reset, now),
                (Ok(read), _) => filled += read,
            }
            while let Some(end) = buffer[..filled].iter().position(|byte| *byte == b'\n') {
                if let Some((request, by)) = sink::parse_answer(&buffer[..=end]) {
                    answered(request, by, now);
                }
                buffer.copy_within(end + 1..filled, 0);
                filled -= end + 1;
            }
            // Datagrams are whole, and no line of ours is that long.
            if filled == buffer.len() || matches!(self, Self::Udp(_)) {
                filled = 0;
            }
        }
    }
}
