//! Requests to the kernel over netlink: to netfilter's subsystems (`nfnetlink`), to routing
//! (`rtnetlink`) and to generic families, one by one or in batches.
//!
//! Layouts are those of `include/uapi/linux/netlink.h`, `genetlink.h`, `rtnetlink.h` and
//! `netfilter/nfnetlink.h`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, connect, recv,
    send, setsockopt, socket, sockopt,
};

/// Length of `nlmsghdr`.
const HEADER: usize = 16;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;
/// Messages in one `send` of a batch.
///
/// The kernel carries all of them out before `send` returns, so the answers must fit into the
/// socket's receive buffer (`net.core.rmem_default`, 208 KiB), in which each takes about 1 KiB.
const BATCH: usize = 64;
/// `NLA_TYPE_MASK`: an attribute's type without `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
const TYPE_MASK: u16 = 0x3fff;
/// The kernel fills at most 32 KiB in one go (`netlink_recvmsg`), and more only for one message
/// that needs it.
const BUFFER: usize = 1 << 18;
const NLM_F_REQUEST: u16 = 0x01;
/// Flag of a request: answer when it is done.
pub const NLM_F_ACK: u16 = 0x04;
/// Flag of a reply: what is listed changed meanwhile.
const NLM_F_DUMP_INTR: u16 = 0x10;
/// Flag of a request: list everything.
pub const NLM_F_DUMP: u16 = 0x300;
/// Flag of a request: refuse if it is there, or, of what is to go, if it is not.
pub const NLM_F_EXCL: u16 = 0x200;
/// Flags of a request: make it, and refuse if it is there.
pub const NLM_F_CREATE_EXCL: u16 = 0x600;
/// How often a dump is tried that changes of rules interrupt.
pub(super) const ATTEMPTS: u32 = 20;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel answered with an error.
    #[error("the kernel refuses: {0}")]
    Refused(#[source] io::Error),
    /// The socket failed.
    #[error("netlink socket: {0}")]
    Socket(#[from] Errno),
    /// A request is longer than netlink can say.
    #[error("a netlink attribute of {0} bytes is too long")]
    TooLong(usize),
    /// The answer is not what the protocol says.
    #[error("a garbled netlink answer: {0}")]
    Garbled(&'static str),
    /// Somebody changed rules during each attempt.
    #[error("rules changed during each of {ATTEMPTS} attempts to list them")]
    Interrupted,
}

impl NetlinkError {
    /// The errno with which the kernel refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused(error) => error.raw_os_error(),
            _ => None,
        }
    }
}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    kind: u16,
    flags: u16,
    /// Length of the fixed part of the body, in requests and answers.
    header: usize,
    /// The fixed part (`nfgenmsg`, `genlmsghdr`, `ifaddrmsg`, ...) and attributes.
    body: Vec<u8>,
}

impl Request {
    /// A request of a subsystem (`NFNL_SUBSYS_*`), with flags besides `NLM_F_REQUEST`, for an
    /// `NFPROTO_*`.
    pub fn new(subsystem: u8, message: u8, flags: u16, family: u8) -> Self {
        // NFNETLINK_V0 and resource 0.
        let kind = u16::from_be_bytes([subsystem, message]);
        Self::raw(kind, flags, &[family, 0, 0, 0])
    }

    /// A request of a generic family: its number, a command and the family's version.
    pub fn generic(family: u16, command: u8, version: u8, flags: u16) -> Self {
        Self::raw(family, flags, &[command, version, 0, 0])
    }

    /// A request with a fixed part of its own, as rtnetlink's are (`RTM_*`).
    pub fn raw(kind: u16, flags: u16, header: &[u8]) -> Self {
        Self {
            kind,
            flags: flags | NLM_F_REQUEST,
            header: header.len(),
            body: header.to_vec(),
        }
    }

    /// Adds an attribute that holds a string, with its terminating zero.
    pub fn string(self, kind: u16, value: &str) -> Result<Self, NetlinkError> {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend(value.as_bytes());
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// Adds an attribute that holds these bytes.
    pub fn bytes(mut self, kind: u16, value: &[u8]) -> Result<Self, NetlinkError> {
        let length = HEADER_OF_ATTRIBUTE + value.len();
        let length = u16::try_from(length).map_err(|_| NetlinkError::TooLong(length))?;
        self.body.extend(length.to_ne_bytes());
        self.body.extend(kind.to_ne_bytes());
        self.body.extend(value);
        self.body.resize(self.body.len().next_multiple_of(4), 0);
        Ok(self)
    }

    /// Adds an attribute that holds the attributes that `fill` adds.
    pub fn nested(
        mut self,
        kind: u16,
        fill: impl FnOnce(Self) -> Result<Self, NetlinkError>,
    ) -> Result<Self, NetlinkError> {
        let from = self.body.len();
        self.body.extend([0; 2]);
        self.body.extend((kind | NESTED).to_ne_bytes());
        let mut filled = fill(self)?;
        let length = filled.body.len() - from;
        let length = u16::try_from(length).map_err(|_| NetlinkError::TooLong(length))?;
        filled.body[from..from + 2].copy_from_slice(&length.to_ne_bytes());
        Ok(filled)
    }

    /// The length of the message, in bytes.
    pub fn size(&self) -> usize {
        HEADER + self.body.len()
    }

    /// The fixed part and the attributes.
    #[cfg(test)]
    pub(super) fn body(&self) -> &[u8] {
        &self.body
    }

    /// Writes the message behind those in `to`.
    fn write(&self, to: &mut Vec<u8>, sequence: u32, flags: u16) -> Result<(), NetlinkError> {
        let length = self.size();
        let length = u32::try_from(length).map_err(|_| NetlinkError::TooLong(length))?;
        to.extend(length.to_ne_bytes());
        to.extend(self.kind.to_ne_bytes());
        to.extend((self.flags | flags).to_ne_bytes());
        to.extend(sequence.to_ne_bytes());
        to.extend(0_u32.to_ne_bytes()); // port: the kernel fills it in
        to.extend(&self.body);
        // A body is whole: each attribute is padded to 4 bytes, and so are fixed parts.
        to.resize(to.len().next_multiple_of(4), 0);
        Ok(())
    }

    /// The bytes to send.
    fn message(&self, sequence: u32) -> Result<Vec<u8>, NetlinkError> {
        let mut message = Vec::with_capacity(self.size());
        self.write(&mut message, sequence, 0)?;
        Ok(message)
    }
}

/// A netlink socket. It stays in the network namespace in which it was opened.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket to netfilter in this thread's network namespace.
    pub fn netfilter() -> Result<Self, NetlinkError> {
        Self::open(SockProtocol::NetlinkNetFilter)
    }

    /// Opens a socket to generic families in this thread's network namespace.
    pub fn generic() -> Result<Self, NetlinkError> {
        Self::open(SockProtocol::NetlinkGeneric)
    }

    /// Opens a socket to links, addresses and routes in this thread's network namespace.
    pub fn route() -> Result<Self, NetlinkError> {
        Self::open(SockProtocol::NetlinkRoute)
    }

    fn open(protocol: SockProtocol) -> Result<Self, NetlinkError> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )?;
        // A connected socket takes nothing from anybody but the kernel.
        connect(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self {
            fd,
            sequence: 0,
            buffer: vec![0; BUFFER],
        })
    }

    /// Sends a request that changes something and waits until the kernel has done it.
    pub fn change(&mut self, request: &Request) -> Result<(), NetlinkError> {
        self.send(request)?;
        let received = self.receive()?;
        for message in messages(&self.buffer[..received]) {
            let message = message?;
            if message.sequence == self.sequence && message.kind == libc::NLMSG_ERROR {
                return message.result();
            }
        }
        Err(NetlinkError::Garbled("no acknowledgement"))
    }

    /// Sends many requests, [`BATCH`] at a time. The kernel carries out each, whatever becomes of
    /// the others: `refused` gets the position and error of each that it refuses, in order.
    ///
    /// # Errors
    ///
    /// The socket's own; the requests before may have been carried out.
    pub fn changes(
        &mut self,
        requests: &[Request],
        mut refused: impl FnMut(usize, NetlinkError),
    ) -> Result<(), NetlinkError> {
        let mut bytes = Vec::new();
        for (number, batch) in requests.chunks(BATCH).enumerate() {
            let first = self.sequence.wrapping_add(1);
            bytes.clear();
            for (position, request) in batch.iter().enumerate() {
                self.sequence = self.sequence.wrapping_add(1);
                // Errors are always answered; that the last one is answered tells the end.
                let last = position + 1 == batch.len();
                request.write(&mut bytes, self.sequence, if last { NLM_F_ACK } else { 0 })?;
            }
            send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
            let mut done = false;
            while !done {
                let received = self.receive()?;
                for message in messages(&self.buffer[..received]) {
                    let message = message?;
                    let position = message.sequence.wrapping_sub(first) as usize;
                    if message.kind != libc::NLMSG_ERROR || position >= batch.len() {
                        continue;
                    }
                    match message.result() {
                        Ok(()) => {}
                        Err(error @ NetlinkError::Refused(_)) => {
                            refused(number * BATCH + position, error);
                        }
                        Err(error) => return Err(error),
                    }
                    done |= position + 1 == batch.len();
                }
            }
        }
        Ok(())
    }

    /// Asks for a list and folds the attributes of each of its messages into `T`.
    ///
    /// A list during which rules changed is asked for again, from `T`'s default on.
    pub fn dump<T: Default>(
        &mut self,
        request: &Request,
        mut each: impl FnMut(&mut T, Attributes<'_>) -> Result<(), NetlinkError>,
    ) -> Result<T, NetlinkError> {
        self.dump_messages(request, |sum, _, attributes| each(sum, attributes))
    }

    /// As [`Socket::dump`], with the fixed part of each message (as long as the request's) too.
    pub fn dump_messages<T: Default>(
        &mut self,
        request: &Request,
        mut each: impl FnMut(&mut T, &[u8], Attributes<'_>) -> Result<(), NetlinkError>,
    ) -> Result<T, NetlinkError> {
        for _ in 0..ATTEMPTS {
            let mut sum = T::default();
            match self.dump_once(request, |header, attributes| {
                each(&mut sum, header, attributes)
            }) {
                Ok(true) => return Ok(sum),
                Ok(false) => {}
                // The kernel says this of a set that it rebuilt during the dump.
                Err(error) if matches!(error.errno(), Some(libc::EINTR | libc::EAGAIN)) => {}
                Err(error) => return Err(error),
            }
        }
        Err(NetlinkError::Interrupted)
    }

    /// Is the list consistent?
    fn dump_once(
        &mut self,
        request: &Request,
        mut each: impl FnMut(&[u8], Attributes<'_>) -> Result<(), NetlinkError>,
    ) -> Result<bool, NetlinkError> {
        self.send(request)?;
        // The end of a list must be read even if something is wrong with it: the kernel starts no
        // other one on this socket before.
        let mut consistent = true;
        let mut result = Ok(());
        loop {
            let received = self.receive()?;
            for message in messages(&self.buffer[..received]) {
                let message = message?;
                if message.sequence != self.sequence {
                    continue;
                }
                consistent &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    libc::NLMSG_NOOP => {}
                    libc::NLMSG_ERROR => return message.result().map(|()| consistent),
                    libc::NLMSG_DONE => {
                        message.result()?;
                        return result.map(|()| consistent);
                    }
                    libc::NLMSG_OVERRUN => return Err(NetlinkError::Garbled("data were lost")),
                    _ => {
                        if result.is_ok() {
                            result = message
                                .parts(request.header)
                                .and_then(|(header, attributes)| each(header, attributes));
                        }
                    }
                }
            }
        }
    }

    fn send(&mut self, request: &Request) -> Result<(), NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let message = request.message(self.sequence)?;
        send(self.fd.as_raw_fd(), &message, MsgFlags::empty())?;
        Ok(())
    }

    /// Fills the buffer and says how far.
    fn receive(&mut self) -> Result<usize, NetlinkError> {
        let received = loop {
            // With MSG_TRUNC the kernel tells the true length, even of what did not fit.
            match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_TRUNC) {
                Err(Errno::EINTR) => {}
                received => break received?,
            }
        };
        match received {
            0 => Err(NetlinkError::Garbled("nothing")),
            received if received > self.buffer.len() => {
                Err(NetlinkError::Garbled("it is longer than the buffer"))
            }
            received => Ok(received),
        }
    }
}

/// Hears what the kernel announces. It stays in the network namespace in which it was opened.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

/// What came of listening for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nothing.
    Nothing,
    /// One or more announcements.
    Something,
    /// More than the socket could hold: some announcements are lost.
    Overrun,
}

/// What the kernel announced.
#[derive(Clone, Debug)]
pub struct Announcement<'a> {
    /// The message's type.
    pub kind: u16,
    /// The number of the request that made it so, if that is told.
    pub sequence: u32,
    /// The port of the socket that asked for it, or 0.
    pub port: u32,
    /// The fixed part.
    pub header: &'a [u8],
    /// What stands behind it.
    pub attributes: Attributes<'a>,
}

impl Listener {
    /// Joins a group (`NFNLGRP_*`, `include/uapi/linux/netfilter/nfnetlink.h`) in this thread's
    /// network namespace. `room` is the memory in bytes for what nobody has listened to yet.
    pub fn netfilter(group: u32, room: usize) -> Result<Self, NetlinkError> {
        Self::join(SockProtocol::NetlinkNetFilter, &[group], room)
    }

    /// Joins groups of links, addresses and routes (`RTNLGRP_*`, `include/uapi/linux/rtnetlink.h`).
    pub fn route(groups: &[u32], room: usize) -> Result<Self, NetlinkError> {
        Self::join(SockProtocol::NetlinkRoute, groups, room)
    }

    fn join(protocol: SockProtocol, groups: &[u32], room: usize) -> Result<Self, NetlinkError> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            protocol,
        )?;
        // Past net.core.rmem_max if this process may, otherwise up to it.
        if setsockopt(&fd, sockopt::RcvBufForce, &room).is_err() {
            setsockopt(&fd, sockopt::RcvBuf, &room)?;
        }
        let groups = groups.iter().fold(0, |all, group| {
            all | 1_u32.checked_shl(group.wrapping_sub(1)).unwrap_or(0)
        });
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        Ok(Self {
            fd,
            buffer: vec![0; BUFFER],
        })
    }

    /// Hands over what has been announced, as far as one look brings it, without waiting; the fixed
    /// part of each announcement is `header` bytes long.
    pub fn listen(
        &mut self,
        header: usize,
        mut each: impl FnMut(&Announcement<'_>) -> Result<(), NetlinkError>,
    ) -> Result<Heard, NetlinkError> {
        match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(Heard::Nothing),
            Err(Errno::ENOBUFS) => Ok(Heard::Overrun),
            Err(error) => Err(error.into()),
            Ok(received) => {
                for message in messages(&self.buffer[..received]) {
                    let message = message?;
                    let (header, attributes) = message.parts(header)?;
                    each(&Announcement {
                        kind: u16::try_from(message.kind).unwrap_or(u16::MAX),
                        sequence: message.sequence,
                        port: message.port,
                        header,
                        attributes,
                    })?;
                }
                Ok(Heard::Something)
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Waits until one of these is readable, at most `patience` milliseconds.
pub fn wait(readable: &[BorrowedFd<'_>], patience: u16) -> Result<(), NetlinkError> {
    let mut wait: Vec<PollFd<'_>> = readable
        .iter()
        .map(|fd| PollFd::new(*fd, PollFlags::POLLIN))
        .collect();
    match poll(&mut wait, PollTimeout::from(patience)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// One message, of an answer or a request.
#[derive(Debug)]
pub struct Message<'a> {
    /// Its type.
    pub kind: i32,
    /// `NLM_F_*`.
    pub flags: u16,
    /// The number that an answer has of its request.
    pub sequence: u32,
    port: u32,
    payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// What `NLMSG_ERROR` and `NLMSG_DONE` say: a negative errno, or 0.
    fn result(&self) -> Result<(), NetlinkError> {
        match self.payload.first_chunk() {
            None => Err(NetlinkError::Garbled("a result without a number")),
            Some(code) => match i32::from_ne_bytes(*code) {
                0 => Ok(()),
                code @ i32::MIN..0 => Err(NetlinkError::Refused(io::Error::from_raw_os_error(
                    code.wrapping_neg(),
                ))),
                _ => Err(NetlinkError::Garbled("a positive errno")),
            },
        }
    }

    /// The fixed part, of this length, and the attributes behind it.
    pub fn parts(&self, header: usize) -> Result<(&'a [u8], Attributes<'a>), NetlinkError> {
        self.payload
            .split_at_checked(header)
            .map(|(header, attributes)| (header, Attributes(attributes)))
            .ok_or(NetlinkError::Garbled("a message without its fixed part"))
    }
}

/// The messages of what one `recv` gave, or one `send` takes.
pub fn messages(mut rest: &[u8]) -> impl Iterator<Item = Result<Message<'_>, NetlinkError>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let read = |rest: &[u8]| {
            let length = u32::from_ne_bytes(*rest.first_chunk()?);
            let length = usize::try_from(length).ok()?;
            (length >= HEADER && length <= rest.len()).then_some(length)
        };
        let Some(length) = read(rest) else {
            rest = &[];
            return Some(Err(NetlinkError::Garbled("a message of a wrong length")));
        };
        let message = &rest[..length];
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok(Message {
            kind: i32::from(u16::from_ne_bytes([message[4], message[5]])),
            flags: u16::from_ne_bytes([message[6], message[7]]),
            sequence: u32::from_ne_bytes([message[8], message[9], message[10], message[11]]),
            port: u32::from_ne_bytes([message[12], message[13], message[14], message[15]]),
            payload: &message[HEADER..],
        }))
    })
}

/// Length of `nlattr`.
const HEADER_OF_ATTRIBUTE: usize = 4;

/// Attributes one after the other; each is its type and its value.
#[derive(Clone, Debug)]
pub struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// The attributes inside an attribute.
    pub fn nested(value: &'a [u8]) -> Self {
        Self(value)
    }

    /// The value of the first attribute of this type.
    pub fn find(self, wanted: u16) -> Result<Option<&'a [u8]>, NetlinkError> {
        for attribute in self {
            let (kind, value) = attribute?;
            if kind == wanted {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    /// The number, in this machine's byte order, of the first attribute of this type.
    pub fn find_u32(self, wanted: u16) -> Result<Option<u32>, NetlinkError> {
        let value = self.find(wanted)?.map(<[u8; 4]>::try_from).transpose();
        let value = value.map_err(|_| NetlinkError::Garbled("a number that has not 4 bytes"))?;
        Ok(value.map(u32::from_ne_bytes))
    }

    /// As [`Attributes::find_u32`], of 2 bytes.
    pub fn find_u16(self, wanted: u16) -> Result<Option<u16>, NetlinkError> {
        let value = self.find(wanted)?.map(<[u8; 2]>::try_from).transpose();
        let value = value.map_err(|_| NetlinkError::Garbled("a number that has not 2 bytes"))?;
        Ok(value.map(u16::from_ne_bytes))
    }

    /// The number, in network byte order, of the first attribute of this type.
    pub fn find_be32(self, wanted: u16) -> Result<Option<u32>, NetlinkError> {
        match self.find(wanted)? {
            None => Ok(None),
            Some(value) => match <[u8; 4]>::try_from(value) {
                Ok(value) => Ok(Some(u32::from_be_bytes(value))),
                Err(_) => Err(NetlinkError::Garbled("a number that has not 4 bytes")),
            },
        }
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), NetlinkError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let header = self.0.first_chunk().map(|&[a, b, c, d]| {
            (
                usize::from(u16::from_ne_bytes([a, b])),
                u16::from_ne_bytes([c, d]),
            )
        });
        match header {
            Some((length, kind)) if length >= HEADER_OF_ATTRIBUTE && length <= self.0.len() => {
                let value = &self.0[HEADER_OF_ATTRIBUTE..length];
                self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
                Some(Ok((kind & TYPE_MASK, value)))
            }
            _ => {
                self.0 = &[];
                Some(Err(NetlinkError::Garbled("an attribute of a wrong length")))
            }
        }
    }
}

/// An attribute as the kernel would write it, for tests to be read.
#[cfg(test)]
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("short");
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_what_the_kernel_parses() {
        let request = Request::new(7, 0, NLM_F_ACK, 2)
            .string(1, "ab")
            .expect("short");
        let message = request.message(5).expect("short");
        assert_eq!(message.len(), 28);
        assert_eq!(message[0..4], 28_u32.to_ne_bytes());
        assert_eq!(message[4..6], 0x0700_u16.to_ne_bytes());
        assert_eq!(message[6..8], 5_u16.to_ne_bytes());
        assert_eq!(message[8..12], 5_u32.to_ne_bytes());
        assert_eq!(message[16..20], [2, 0, 0, 0]);
        assert_eq!(message[20..22], 7_u16.to_ne_bytes());
        assert_eq!(&message[24..28], b"ab\0\0");
        assert!(request.string(1, &"x".repeat(1 << 16)).is_err());
    }

    /// A message as the kernel sends it.
    fn message(kind: i32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER + payload.len()).expect("short");
        let kind = u16::try_from(kind).expect("a kind");
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn results_are_read() {
        let result = |payload: &[u8]| {
            let bytes = message(libc::NLMSG_ERROR, payload);
            let read = messages(&bytes).next().expect("one").expect("whole");
            read.result()
        };
        assert!(result(&0_i32.to_ne_bytes()).is_ok());
        let refused = result(&(-16_i32).to_ne_bytes()).expect_err("EBUSY");
        assert_eq!(refused.errno(), Some(16));
        assert!(matches!(result(&[0, 0]), Err(NetlinkError::Garbled(_))));
        assert!(matches!(
            result(&2_i32.to_ne_bytes()),
            Err(NetlinkError::Garbled(_))
        ));
    }

    #[test]
    fn short_and_garbled_messages_are_errors() {
        let mut bytes = message(libc::NLMSG_NOOP, &[1, 2, 3, 4]);
        bytes.extend(message(libc::NLMSG_DONE, &[0; 4]));
        assert_eq!(messages(&bytes).flatten().count(), 2);
        let last = |bytes: &[u8]| messages(bytes).last().expect("one").is_err();
        assert!(last(&bytes[..bytes.len() - 1]), "cut off in the payload");
        assert!(last(&bytes[..22]), "cut off in a header");
        assert!(last(&[0; 16]), "a length of 0 must not go on forever");
    }

    #[test]
    fn attributes_are_read() {
        // A string of 2 bytes with its padding, and a nested number in network byte order.
        let bytes: Vec<u8> = [
            &6_u16.to_ne_bytes()[..],
            &1_u16.to_ne_bytes(),
            b"ab\0\0",
            &8_u16.to_ne_bytes(),
            &0x8002_u16.to_ne_bytes(),
            &[0, 0, 1, 2],
        ]
        .concat();
        let attributes = Attributes::nested(&bytes);
        assert_eq!(attributes.clone().find(1).expect("whole"), Some(&b"ab"[..]));
        assert_eq!(attributes.clone().find_be32(2).expect("whole"), Some(258));
        assert_eq!(attributes.clone().find(3).expect("whole"), None);
        assert!(attributes.find_be32(1).is_err(), "not a number");
        for length in [1, 3, 5, 13, 15] {
            assert!(
                Attributes::nested(&bytes[..length]).any(|a| a.is_err()),
                "cut off at {length}"
            );
        }
        assert_eq!(Attributes::nested(&[0; 8]).count(), 1, "a length of 0");
    }
}
