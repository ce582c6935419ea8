//! What the programs around the kernel's ways of changing rules write, and what they pick out.

/// Bytes of a request that are copied at most: requests that are longer are told in part. ipset's are
/// at most a page long, IPVS' some hundred bytes; of the others only the beginning counts.
pub const MESSAGE: usize = 1 << 14;
/// `TASK_COMM_LEN` (`include/linux/sched.h`).
pub const NAME: usize = 16;
/// Bytes of a process' first argument that are copied at most.
pub const ARGUMENT: usize = 64;
/// The IPVS family's number while it is not known: generic families have other ones.
pub const NO_FAMILY: u32 = 0;

/// What a record is; its first field.
pub mod kind {
    /// A request enters the kernel: [`super::Begin`], and the request's bytes behind it.
    pub const BEGIN: u32 = 1;
    /// It is done: [`super::End`].
    pub const END: u32 = 2;
    /// The kernel refused a request, or one of the messages in it: [`super::Refusal`].
    pub const REFUSAL: u32 = 3;
}

/// Whose rules a request is about.
pub mod subsystem {
    /// Nobody's that is told of, or it only asks.
    pub const NONE: u32 = 0;
    /// iptables-legacy: `struct ipt_replace` or `ip6t_replace`; `detail` is the `NFPROTO`.
    pub const LEGACY: u32 = 1;
    /// A batch of `nf_tables` messages.
    pub const NFTABLES: u32 = 2;
    /// ipset messages.
    pub const IPSET: u32 = 3;
    /// IPVS messages, or, while IPVS' number is not known, those of any generic family.
    pub const IPVS: u32 = 4;
    /// IPVS by socket option; `detail` is the option's number.
    pub const IPVS_OPTION: u32 = 5;
    /// Addresses of links.
    pub const ADDRESSES: u32 = 6;
}

/// A request as it enters the kernel.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Begin {
    /// [`kind::BEGIN`].
    pub kind: u32,
    /// See [`subsystem`].
    pub subsystem: u32,
    /// `CLOCK_MONOTONIC`, ns.
    pub time: u64,
    /// Process (upper half) and thread (lower half), in the init pid namespace.
    pub thread: u64,
    /// Its cgroup in the unified hierarchy.
    pub cgroup: u64,
    /// Its parent process.
    pub parent: u32,
    /// See [`subsystem`].
    pub detail: u32,
    /// Bytes of the whole request.
    pub length: u32,
    /// Bytes of it that follow.
    pub stored: u32,
    /// The process' name.
    pub name: [u8; NAME],
    /// The parent's name.
    pub parent_name: [u8; NAME],
    /// The process' first argument, which is how it was called: of a name of 15 bytes it has the rest.
    pub argument: [u8; ARGUMENT],
}

/// The end of the thread's request.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct End {
    /// [`kind::END`].
    pub kind: u32,
    /// The netlink port of the socket, with which the kernel's announcements name who asked; 0: none.
    pub port: u32,
    /// `CLOCK_MONOTONIC`, ns.
    pub time: u64,
    /// See [`Begin::thread`].
    pub thread: u64,
    /// What the kernel returned: negative is an errno.
    pub result: i64,
}

/// What netlink answers to a request that fails.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Refusal {
    /// [`kind::REFUSAL`].
    pub kind: u32,
    /// The port of the socket that asked.
    pub port: u32,
    /// The message's sequence number.
    pub sequence: u32,
    /// A negative errno.
    pub error: i32,
}

/// The beginning of a netlink request: `struct nlmsghdr`, and the four bytes of `struct genlmsghdr` or
/// `struct nfgenmsg`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Head {
    /// Of this message, with header.
    pub length: u32,
    /// What it asks, or of which family it is.
    pub kind: u16,
    /// `NLM_F_*`.
    pub flags: u16,
    /// Told again in the answer.
    pub sequence: u32,
    /// The sender's port.
    pub port: u32,
    /// The family's own header.
    pub own: [u8; 4],
}

/// `NETLINK_ROUTE`, `NETLINK_NETFILTER`, `NETLINK_GENERIC` (`include/uapi/linux/netlink.h`).
const ROUTE: u16 = 0;
const NETFILTER: u16 = 12;
const GENERIC: u16 = 16;
/// `NLMSG_ERROR`.
pub const NLMSG_ERROR: u16 = 2;
/// `NFNL_MSG_BATCH_BEGIN` (`include/uapi/linux/netfilter/nfnetlink.h`).
const BATCH_BEGIN: u16 = 0x10;
const SUBSYS_IPSET: u16 = 6;
const SUBSYS_NFTABLES: u8 = 10;
/// `GENL_ID_CTRL`: the family that tells of the others.
const GENL_CONTROL: u16 = 0x10;
/// `RTM_NEWADDR`, `RTM_DELADDR`, and `RTM_DELLINK`, with which a link's addresses go
/// (`include/uapi/linux/rtnetlink.h`).
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const DELETE_LINK: u16 = 17;

/// Which rules does a netlink request change that begins like this? `ipvs` is IPVS' family or
/// [`NO_FAMILY`].
#[inline(always)]
#[allow(
    clippy::inline_always,
    reason = "the kernel programs must not call it with five arguments"
)]
pub const fn subsystem_of(protocol: u16, head: &Head, ipvs: u32) -> u32 {
    match protocol {
        // The resource's number, in network byte order.
        NETFILTER if head.kind == BATCH_BEGIN && matches!(head.own, [_, _, 0, SUBSYS_NFTABLES]) => {
            subsystem::NFTABLES
        }
        // CREATE, DESTROY, FLUSH, RENAME, SWAP; ADD, DEL (enum ipset_cmd, ip_set.h).
        NETFILTER
            if head.kind >> 8 == SUBSYS_IPSET && matches!(head.kind & 0xff, 2..=6 | 9..=10) =>
        {
            subsystem::IPSET
        }
        GENERIC if head.kind > GENL_CONTROL && ipvs == NO_FAMILY => subsystem::IPVS,
        // GET_SERVICE, GET_DEST, GET_DAEMON, GET_CONFIG, GET_INFO (include/uapi/linux/ip_vs.h).
        GENERIC if head.kind as u32 == ipvs && !matches!(head.own[0], 4 | 8 | 11 | 13 | 15) => {
            subsystem::IPVS
        }
        ROUTE if matches!(head.kind, NEW_ADDRESS | DELETE_ADDRESS | DELETE_LINK) => {
            subsystem::ADDRESSES
        }
        _ => subsystem::NONE,
    }
}

/// `IPT_SO_SET_REPLACE`, also `IP6T_SO_SET_REPLACE` (`include/uapi/linux/netfilter_ipv4/ip_tables.h`).
const LEGACY_REPLACE: u32 = 64;
/// `IP_VS_SO_SET_ADD` to `IP_VS_SO_SET_MAX` (`include/uapi/linux/ip_vs.h`): all set something.
const IPVS_FIRST: u32 = 64 + 1024 + 64 + 2;
const IPVS_LAST: u32 = 64 + 1024 + 64 + 15;

/// Which rules does setting a socket option change, of IPv4 or (`six`) IPv6?
#[inline(always)]
#[allow(clippy::inline_always, reason = "as above")]
pub const fn subsystem_of_option(option: u32, six: bool) -> u32 {
    match option {
        LEGACY_REPLACE => subsystem::LEGACY,
        IPVS_FIRST..=IPVS_LAST if !six => subsystem::IPVS_OPTION,
        _ => subsystem::NONE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(kind: u16, own: [u8; 4]) -> Head {
        Head {
            length: 20,
            kind,
            flags: 0,
            sequence: 0,
            port: 0,
            own,
        }
    }

    #[test]
    fn only_changes_are_picked_out() {
        let of = |protocol, kind, own| subsystem_of(protocol, &head(kind, own), 30);
        assert_eq!(of(NETFILTER, 0x10, [0, 0, 0, 10]), subsystem::NFTABLES);
        // Conntrack's batches, a list of rules, a list of sets, an entry of a set, a test of one.
        assert_eq!(of(NETFILTER, 0x10, [0, 0, 0, 1]), subsystem::NONE);
        assert_eq!(of(NETFILTER, 0x0a07, [2, 0, 0, 0]), subsystem::NONE);
        assert_eq!(of(NETFILTER, 0x0607, [2, 0, 0, 0]), subsystem::NONE);
        assert_eq!(of(NETFILTER, 0x0609, [2, 0, 0, 0]), subsystem::IPSET);
        assert_eq!(of(NETFILTER, 0x060b, [2, 0, 0, 0]), subsystem::NONE);
        // A new virtual server, a list of them; another family; families themselves.
        assert_eq!(of(GENERIC, 30, [1, 1, 0, 0]), subsystem::IPVS);
        assert_eq!(of(GENERIC, 30, [4, 1, 0, 0]), subsystem::NONE);
        assert_eq!(of(GENERIC, 31, [1, 1, 0, 0]), subsystem::NONE);
        assert_eq!(of(GENERIC, GENL_CONTROL, [3, 2, 0, 0]), subsystem::NONE);
        let unknown = subsystem_of(GENERIC, &head(31, [1, 1, 0, 0]), NO_FAMILY);
        assert_eq!(unknown, subsystem::IPVS);
        // An address; a link's end; a list of addresses; the same number elsewhere.
        assert_eq!(of(ROUTE, 20, [2, 32, 0, 0]), subsystem::ADDRESSES);
        assert_eq!(of(ROUTE, 17, [0, 0, 0, 0]), subsystem::ADDRESSES);
        assert_eq!(of(ROUTE, 22, [2, 32, 0, 0]), subsystem::NONE);
        assert_eq!(of(NETFILTER, 20, [2, 32, 0, 0]), subsystem::NONE);
    }

    #[test]
    fn only_options_that_change_rules_are_picked_out() {
        assert_eq!(subsystem_of_option(64, false), subsystem::LEGACY);
        assert_eq!(subsystem_of_option(64, true), subsystem::LEGACY);
        assert_eq!(subsystem_of_option(65, false), subsystem::NONE);
        // IP_VS_SO_SET_ADD is 1154.
        assert_eq!(subsystem_of_option(1153, false), subsystem::NONE);
        assert_eq!(subsystem_of_option(1154, false), subsystem::IPVS_OPTION);
        assert_eq!(subsystem_of_option(1167, false), subsystem::IPVS_OPTION);
        assert_eq!(subsystem_of_option(1168, false), subsystem::NONE);
        assert_eq!(subsystem_of_option(1154, true), subsystem::NONE);
    }
}
