//! Every boundary and the stage that begins there; every function that begins one.
//!
//! A boundary lies between the priorities of two kernel components of one hook
//! (`enum nf_ip_hook_priorities`, `include/uapi/linux/netfilter_ipv4.h`: defrag -400, raw -300,
//! conntrack -200, mangle -150, nat dst -100, filter 0, security 50, nat src 100, helper 300,
//! confirm `INT_MAX`). kube-proxy's nftables chains sit at -110, -100, 0 and 100. IPVS
//! (`ip_vs_ops`, `net/netfilter/ipvs/ip_vs_core.c`) sits at INPUT 98 and 99, OUTPUT -99 and -98,
//! FORWARD 99 and 100: directly beside nat, so there is no room for a boundary between the two.

use tracer_ebpf::record::{
    BOUNDARIES, HOOKS, MOST_STAGES, NO_PRIORITY, OUTPUT_COUNT, OUTPUT_FIRST, RESENT, STAGE_NODE,
    STAGE_RECEIVE, STAGE_RESENT, hook, method, role,
};

/// One probe between two kernel components.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// Number of the hook.
    pub hook: u32,
    /// Where in the hook it wants to be; the next higher free one is taken if it is occupied.
    pub priority: i32,
    /// It moves up while its place is taken, but stays below this: the priority of the component that must come
    /// after it.
    pub limit: i32,
    /// The stage that begins here.
    pub stage: &'static str,
    /// What the stage contains, for people.
    pub contains: &'static str,
}

const fn b(
    hook: u32,
    priority: i32,
    limit: i32,
    stage: &'static str,
    contains: &'static str,
) -> Boundary {
    Boundary {
        hook,
        priority,
        limit,
        stage,
        contains,
    }
}

// NF_IP_PRI_FIRST and NF_IP_PRI_LAST themselves are refused (nf_bpf_link.c). Kernel 6.18 has
// something at INT_MAX - 1 too, so the last boundary keeps a little distance: nothing but the
// confirmation of conntrack entries runs that late.
const FIRST: i32 = i32::MIN + 1;
// Directly behind defragmentation (-400): a packet that comes in parts is whole from here on.
const WHOLE: i32 = -399;
const LAST: i32 = i32::MAX - 20;
const END: i32 = i32::MAX - 4;

/// Every boundary, in the order of a packet through each hook; the position is its id.
pub const ALL: [Boundary; BOUNDARIES] = [
    b(hook::PREROUTING, WHOLE, -300, "raw", "the raw table"),
    b(
        hook::PREROUTING,
        -208,
        -200,
        "conntrack",
        "connection tracking: look-up or new entry",
    ),
    b(hook::PREROUTING, -199, -150, "mangle", "the mangle table"),
    b(
        hook::PREROUTING,
        -121,
        -110,
        "pre-dnat",
        "filter chains before dnat (kube-proxy's firewall check in nftables mode)",
    ),
    b(
        hook::PREROUTING,
        -105,
        -100,
        "dnat",
        "the nat table: Service to endpoint, first packet of a flow only",
    ),
    b(
        hook::PREROUTING,
        -91,
        LAST,
        "routing",
        "the rest of PREROUTING, and the routing decision",
    ),
    b(hook::INPUT, FIRST, -150, "mangle", "the mangle table"),
    b(
        hook::INPUT,
        -51,
        0,
        "filter",
        "the filter and security tables",
    ),
    b(
        hook::INPUT,
        91,
        98,
        "ipvs",
        "IPVS (to the xmit of a packet it takes), and nat at INPUT for the packets it leaves",
    ),
    b(
        hook::INPUT,
        111,
        300,
        "confirm",
        "conntrack helpers, and confirmation of the entry",
    ),
    b(hook::INPUT, LAST, END, DELIVER, "the way to the socket"),
    b(hook::FORWARD, FIRST, -150, "mangle", "the mangle table"),
    b(
        hook::FORWARD,
        -51,
        0,
        "filter",
        "the filter and security tables",
    ),
    b(
        hook::FORWARD,
        91,
        99,
        "ipvs",
        "IPVS: the source of a reply is put back",
    ),
    b(
        hook::FORWARD,
        111,
        LAST,
        "output",
        "the way from FORWARD to POSTROUTING",
    ),
    b(hook::OUTPUT, WHOLE, -300, "raw", "the raw table"),
    b(
        hook::OUTPUT,
        -208,
        -200,
        "conntrack",
        "connection tracking: look-up or new entry",
    ),
    b(hook::OUTPUT, -199, -150, "mangle", "the mangle table"),
    b(
        hook::OUTPUT,
        -121,
        -110,
        "pre-dnat",
        "filter chains before dnat (kube-proxy's firewall check in nftables mode)",
    ),
    b(
        hook::OUTPUT,
        -105,
        -100,
        "dnat",
        "the nat table; in IPVS mode also IPVS, which sits directly behind it",
    ),
    b(
        hook::OUTPUT,
        -91,
        0,
        "filter",
        "the filter and security tables, and the way to POSTROUTING",
    ),
    b(hook::POSTROUTING, FIRST, -150, "mangle", "the mangle table"),
    b(
        hook::POSTROUTING,
        91,
        100,
        "snat",
        "the nat table: masquerade, first packet of a flow only",
    ),
    b(hook::POSTROUTING, 111, 300, "helper", "conntrack helpers"),
    b(
        hook::POSTROUTING,
        LAST,
        END,
        "egress",
        "confirmation of the entry, neighbour, queue and driver",
    ),
];

/// OUTPUT as packets pass it that IPVS sends on. The kernel calls the hook for them from within
/// INPUT, or a second time from within OUTPUT (`__ip_vs_nat_xmit`, `NF_HOOK(LOCAL_OUT)` in
/// `net/netfilter/ipvs/ip_vs_xmit.c`).
pub const OUTPUT_BY_IPVS: &str = "OUTPUT-ipvs";

/// How finely a packet's way over the node is divided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Detail {
    /// Entry and exit of each hook: what a live node carries all day.
    Hooks,
    /// Every component.
    #[default]
    Stages,
    /// Every component, and what first packets meet in it: see [`TELLERS`]. The functions tier alone.
    Functions,
}

/// The ids of the boundaries of a hook, or of its first and last, in a packet's order. OUTPUT has no exit:
/// POSTROUTING follows.
pub fn boundaries(detail: Detail) -> impl Iterator<Item = usize> {
    let wanted = move |id: &usize| {
        detail >= Detail::Stages || is_first(*id) || (is_last(*id) && ALL[*id].hook != hook::OUTPUT)
    };
    (0..ALL.len()).filter(wanted)
}

fn is_first(id: usize) -> bool {
    id == 0 || ALL[id - 1].hook != ALL[id].hook
}

fn is_last(id: usize) -> bool {
    id + 1 == ALL.len() || ALL[id + 1].hook != ALL[id].hook
}

/// The stage of INPUT behind its last component.
pub const DELIVER: &str = "deliver";

/// A stage as reports name it: hook and component.
pub fn stage_name(stage: u8, detail: Detail) -> (&'static str, &'static str) {
    let (hook, name) = fine_name(stage);
    let first = stage == STAGE_RESENT || (usize::from(stage) < ALL.len() && is_first(stage.into()));
    if detail == Detail::Hooks && first {
        return (
            hook,
            if hook.starts_with("OUTPUT") {
                WHOLE_OUTPUT
            } else {
                WHOLE_HOOK
            },
        );
    }
    (hook, name)
}

/// What one stage is called that holds all components of a hook.
const WHOLE_HOOK: &str = "hook";
/// The same for OUTPUT, where the way to POSTROUTING is part of it.
const WHOLE_OUTPUT: &str = "hook+routing";

fn fine_name(stage: u8) -> (&'static str, &'static str) {
    match stage {
        STAGE_RECEIVE => ("-", "receive"),
        STAGE_NODE => ("-", "node"),
        STAGE_RESENT.. => ALL
            .get(usize::from(stage - RESENT))
            .map_or(("-", "unknown"), |boundary| {
                (OUTPUT_BY_IPVS, boundary.stage)
            }),
        _ => ALL
            .get(usize::from(stage))
            .map_or(("-", "unknown"), |boundary| {
                (hook_name(boundary.hook), boundary.stage)
            }),
    }
}

/// Every stage's id, in a packet's order.
pub fn stages() -> impl Iterator<Item = u8> {
    const POSTROUTING: u8 = OUTPUT_FIRST + OUTPUT_COUNT;
    std::iter::once(STAGE_RECEIVE)
        .chain(0..POSTROUTING)
        .chain(STAGE_RESENT..STAGE_RESENT + OUTPUT_COUNT)
        .chain(POSTROUTING..STAGE_RECEIVE)
        .chain(std::iter::once(STAGE_NODE))
}

/// The hook's name, as the kernel and iptables call it.
pub fn hook_name(number: u32) -> &'static str {
    match number {
        hook::PREROUTING => "PREROUTING",
        hook::INPUT => "INPUT",
        hook::FORWARD => "FORWARD",
        hook::OUTPUT => "OUTPUT",
        hook::POSTROUTING => "POSTROUTING",
        _ => "-",
    }
}

/// What the boundary with this id does besides ending and beginning stages.
pub fn role_of(id: usize) -> u32 {
    let mut role = 0;
    if is_first(id) {
        role |= role::ENTRY;
    }
    if is_last(id) && ALL[id].hook == hook::INPUT {
        role |= role::DELIVER;
    }
    if is_last(id) && ALL[id].hook == hook::POSTROUTING {
        role |= role::DEPART;
    }
    role
}

/// The stage of a kernel component at this hook and priority.
pub fn stage_at(hook: u32, priority: i32) -> usize {
    let of_hook = |id: &usize| ALL[*id].hook == hook;
    let below = |id: &usize| is_first(*id) || ALL[*id].priority <= priority;
    (0..ALL.len())
        .filter(of_hook)
        .take_while(below)
        .last()
        .unwrap_or(0)
}

/// The first stage of each hook, and behind the last hook the number of stages.
pub fn first_stages() -> impl Iterator<Item = u8> {
    ids().filter(|id| usize::from(*id) == ALL.len() || is_first((*id).into()))
}

/// The stage that begins where each hook ends, if there is one: see [`boundaries`].
pub fn last_stages(detail: Detail) -> impl Iterator<Item = Option<u8>> {
    ids()
        .filter(|id| usize::from(*id) < ALL.len() && is_last((*id).into()))
        .map(move |id| {
            let begins = boundaries(detail).any(|boundary| boundary == usize::from(id));
            begins.then_some(id)
        })
}

/// The priority from which on a component belongs to each stage of a hook but the first; [`NO_PRIORITY`]
/// where there are no more.
pub fn priorities() -> impl Iterator<Item = [i32; MOST_STAGES]> {
    (0..).take(HOOKS).map(|hook| {
        let mut priorities = [NO_PRIORITY; MOST_STAGES];
        let later = ALL.iter().filter(|boundary| boundary.hook == hook).skip(1);
        for (to, boundary) in priorities.iter_mut().zip(later) {
            *to = boundary.priority;
        }
        priorities
    })
}

/// Every boundary's id, and the one behind them.
fn ids() -> impl Iterator<Item = u8> {
    (0..=u8::MAX).take(ALL.len() + 1)
}

/// A tracepoint that both tiers need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracepoint {
    /// The kernel's name for it.
    pub name: &'static str,
    /// The oldest kernel that tells all that is asked.
    pub since: &'static str,
    /// What is lost without it.
    pub without: &'static str,
}

/// Every tracepoint.
pub const TRACEPOINTS: [Tracepoint; 3] = [
    Tracepoint {
        name: "net_dev_xmit",
        since: "5.5",
        without: "nothing says when a packet left",
    },
    Tracepoint {
        name: "kfree_skb",
        since: "5.17",
        without: "nothing says that a packet was dropped, and why",
    },
    Tracepoint {
        name: "netif_receive_skb",
        since: "5.5",
        without: "stages begin at the first hook, not where the packet was received",
    },
];

/// The tracepoints that go with a detail: when a packet was received is not asked between hooks only.
pub fn tracepoints(detail: Detail) -> impl Iterator<Item = &'static Tracepoint> {
    TRACEPOINTS.iter().filter(move |tracepoint| {
        detail >= Detail::Stages || tracepoint.name != "netif_receive_skb"
    })
}

/// The function that calls the components of a hook (net/netfilter/core.c). Where nothing is registered at a
/// hook, the kernel does not call it (`nf_hook`, include/linux/netfilter.h): such a hook is not seen.
pub const HOOK: &str = "nf_hook_slow";
/// Its parameters.
pub const HOOK_PARAMETERS: [&str; 4] = ["skb", "state", "e", "s"];

/// How a component's function is told what to work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `(skb, state)`.
    Tracking,
    /// `nf_hookfn`: `(priv, skb, state)`; it stands at fixed priorities.
    Hook,
    /// The same of `struct xt_table`, which knows its priority. Before 5.16, `(skb, state, table)`.
    Table,
    /// `(pkt, priv)`: `struct nft_pktinfo`, and a chain which knows its priority.
    Chain,
}

impl Shape {
    /// The names of the first parameters.
    pub const fn parameters(self) -> &'static [&'static str] {
        match self {
            Self::Tracking => &["skb", "state"],
            Self::Hook | Self::Table => &["priv", "skb", "state"],
            Self::Chain => &["pkt", "priv"],
        }
    }
}

/// A kernel component whose functions begin a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Component {
    /// What it is.
    pub name: &'static str,
    /// Its functions: module and name. Those that are there are attached to.
    pub functions: &'static [(&'static str, &'static str)],
    /// How they are called.
    pub shape: Shape,
    /// Hooks and priorities of what has fixed ones.
    pub at: &'static [(u32, i32)],
    /// The oldest kernel whose functions are known.
    pub since: &'static str,
    /// What is lost without it.
    pub without: &'static str,
}

impl Component {
    /// The stage that it begins at each hook where it has a fixed place.
    pub fn stages(&self) -> impl Iterator<Item = (u32, usize)> {
        self.at
            .iter()
            .map(|(hook, priority)| (*hook, stage_at(*hook, *priority)))
    }
}

/// What goes through a table of iptables-legacy.
const IPTABLES: [(&str, &str); 2] = [
    ("ip_tables", "ipt_do_table"),
    ("ip6_tables", "ip6t_do_table"),
];
/// What goes through a chain of `nf_tables`.
const NFTABLES: [(&str, &str); 1] = [("nf_tables", "nft_do_chain")];

/// Every component that can be met by its functions. Each stage lasts until the next component begins or the
/// hook ends: what is not met counts to the stage before it.
pub const COMPONENTS: [Component; 6] = [
    Component {
        name: "conntrack",
        functions: &[("nf_conntrack", "nf_conntrack_in")],
        shape: Shape::Tracking,
        at: &[(hook::PREROUTING, -200), (hook::OUTPUT, -200)],
        since: "5.1",
        without: "connection tracking counts as part of the stage before it (raw)",
    },
    Component {
        name: "nat",
        functions: &[("nf_nat", "nf_nat_inet_fn")],
        shape: Shape::Hook,
        at: &[
            (hook::PREROUTING, -100),
            (hook::INPUT, 100),
            (hook::OUTPUT, -100),
            (hook::POSTROUTING, 100),
        ],
        since: "5.1",
        without: "dnat and snat count as part of the stage before them",
    },
    Component {
        name: "IPVS",
        functions: &[("ip_vs", "ip_vs_in_hook"), ("ip_vs", "ip_vs_out_hook")],
        shape: Shape::Hook,
        at: &[(hook::INPUT, 98), (hook::FORWARD, 99), (hook::OUTPUT, -99)],
        since: "5.14",
        without: "IPVS counts as part of the stage before it (filter)",
    },
    Component {
        name: "confirmation",
        functions: &[
            // From 6.2 on; before, it is another function of that name which is called by the others.
            ("nf_conntrack", "nf_confirm"),
            ("nf_conntrack", "ipv4_confirm"),
            ("nf_conntrack", "ipv6_confirm"),
        ],
        shape: Shape::Hook,
        // It stands at INT_MAX; as a stage it belongs to the helpers, and ends with the hook.
        at: &[(hook::INPUT, 300), (hook::POSTROUTING, 300)],
        since: "5.1",
        without: "confirmation of entries counts as part of the stage before it (ipvs, snat)",
    },
    Component {
        name: "iptables",
        functions: &IPTABLES,
        shape: Shape::Table,
        at: &[],
        since: "5.16",
        without: "the tables of iptables-legacy count as part of the stages before them",
    },
    Component {
        name: "nftables",
        functions: &NFTABLES,
        shape: Shape::Chain,
        at: &[],
        since: "5.4",
        without: "the chains of nftables count as part of the stages before them",
    },
];

/// What a function tells of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tells {
    /// The verdict of a table of iptables-legacy.
    Table,
    /// The verdict of a base chain.
    Chain,
    /// That nat bound a connection's source or destination.
    Nat,
    /// Whether the connection's entry went into conntrack's table.
    Confirmation,
    /// The real server that IPVS' scheduler chose.
    Scheduling,
    /// The real server that IPVS sends to, and how: see [`method`].
    Sending(i32),
    /// That IPVS gave up an old connection.
    Expiry,
}

/// Functions that tell more of a first packet than where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Teller {
    /// What they are about.
    pub name: &'static str,
    /// Module and name. Those that are there are attached to.
    pub functions: &'static [(&'static str, &'static str)],
    /// The names of all their parameters.
    pub parameters: &'static [&'static str],
    /// What they tell.
    pub tells: Tells,
    /// The oldest kernel whose functions are known.
    pub since: &'static str,
    /// What is lost without them.
    pub without: &'static str,
}

const fn sending(
    name: &'static str,
    functions: &'static [(&'static str, &'static str)],
    method: i32,
) -> Teller {
    Teller {
        name,
        functions,
        parameters: &["skb", "cp", "pp", "ipvsh"],
        tells: Tells::Sending(method),
        since: "3.19",
        without: "packets that IPVS sends this way do not tell the real server",
    }
}

/// Every function that tells more.
pub const TELLERS: [Teller; 11] = [
    Teller {
        name: "verdicts of iptables",
        functions: &IPTABLES,
        parameters: Shape::Table.parameters(),
        tells: Tells::Table,
        since: "5.16",
        without: "tables are not told, nor which one dropped a packet",
    },
    Teller {
        name: "verdicts of nftables",
        functions: &NFTABLES,
        parameters: Shape::Chain.parameters(),
        tells: Tells::Chain,
        since: "5.4",
        without: "chains are not told, nor which one dropped a packet",
    },
    Teller {
        name: "nat's bindings",
        functions: &[("nf_nat", "nf_nat_setup_info")],
        parameters: &["ct", "range", "maniptype"],
        tells: Tells::Nat,
        since: "4.18",
        without: "whether nat found a free tuple is not told",
    },
    Teller {
        name: "conntrack's confirmation",
        functions: &[("nf_conntrack", "__nf_conntrack_confirm")],
        parameters: &["skb"],
        tells: Tells::Confirmation,
        since: "2.6",
        without: "an entry that clashes with another (insert_failed) is not told",
    },
    Teller {
        name: "IPVS' scheduler",
        functions: &[("ip_vs", "ip_vs_schedule")],
        parameters: &["svc", "skb", "pd", "ignored", "iph"],
        tells: Tells::Scheduling,
        since: "3.10",
        without: "scheduler and real server of new connections are not told",
    },
    sending(
        "IPVS' masquerading",
        &[("ip_vs", "ip_vs_nat_xmit"), ("ip_vs", "ip_vs_nat_xmit_v6")],
        method::NAT,
    ),
    sending(
        "IPVS' direct routing",
        &[("ip_vs", "ip_vs_dr_xmit"), ("ip_vs", "ip_vs_dr_xmit_v6")],
        method::ROUTE,
    ),
    sending(
        "IPVS' tunnels",
        &[
            ("ip_vs", "ip_vs_tunnel_xmit"),
            ("ip_vs", "ip_vs_tunnel_xmit_v6"),
        ],
        method::TUNNEL,
    ),
    sending(
        "IPVS to the node",
        &[("ip_vs", "ip_vs_null_xmit")],
        method::LOCAL,
    ),
    sending(
        "IPVS' bypass",
        &[
            ("ip_vs", "ip_vs_bypass_xmit"),
            ("ip_vs", "ip_vs_bypass_xmit_v6"),
        ],
        method::BYPASS,
    ),
    Teller {
        name: "IPVS' reuse of connections",
        functions: &[("ip_vs", "ip_vs_conn_expire_now")],
        parameters: &["cp"],
        tells: Tells::Expiry,
        since: "4.1",
        without: "that IPVS gives up an old connection of the same port is not told",
    },
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tracer_ebpf::record::STAGES;

    use super::*;

    #[test]
    fn priorities_ascend_and_leave_room() {
        for pair in ALL.windows(2) {
            if pair[0].hook == pair[1].hook {
                assert!(pair[0].limit <= pair[1].priority, "{pair:?}");
            }
        }
        for boundary in ALL {
            assert!(boundary.priority <= boundary.limit);
        }
    }

    #[test]
    fn stages_come_in_a_packets_order_once_each() {
        let names: Vec<_> = stages()
            .map(|stage| stage_name(stage, Detail::Stages))
            .collect();
        assert_eq!(names.len(), STAGES);
        assert_eq!(names[0], ("-", "receive"));
        assert_eq!(names[names.len() - 1], ("-", "node"));
        let of = |hook| names.iter().filter(move |name| name.0 == hook);
        let output: Vec<_> = of("OUTPUT").map(|name| name.1).collect();
        let by_ipvs: Vec<_> = of(OUTPUT_BY_IPVS).map(|name| name.1).collect();
        assert_eq!(output, by_ipvs);
        assert_eq!(output.len(), usize::from(OUTPUT_COUNT));
        let unique: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(unique.len(), STAGES);
    }

    #[test]
    fn hooks_have_entries_and_exits() {
        let ids: Vec<_> = boundaries(Detail::Hooks).collect();
        assert_eq!(ids, [0, 5, 6, 10, 11, 14, 15, 21, 24]);
        assert_eq!(boundaries(Detail::Stages).count(), BOUNDARIES);
        let name = |stage| stage_name(stage, Detail::Hooks);
        assert_eq!(name(0), ("PREROUTING", "hook"));
        assert_eq!(name(5), ("PREROUTING", "routing"));
        assert_eq!(name(15), ("OUTPUT", "hook+routing"));
        assert_eq!(name(STAGE_RESENT), (OUTPUT_BY_IPVS, "hook+routing"));
    }

    #[test]
    fn every_hook_has_one_entry() {
        for hook in 0..5 {
            let entries = (0..ALL.len())
                .filter(|id| ALL[*id].hook == hook && role_of(*id) & role::ENTRY != 0)
                .count();
            assert_eq!(entries, 1);
        }
    }

    /// Hooks' entries and exits, the components' fixed places and the priorities of tables and chains give
    /// every stage, and none of them two that have nothing to do with each other.
    #[test]
    fn functions_give_every_stage() {
        let mut given: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
        let mut give = |stage: usize, by| given.entry(stage).or_default().push(by);
        let first: Vec<_> = first_stages().collect();
        assert_eq!(first, [0, 6, 11, 15, 21, 25]);
        for stage in &first[..HOOKS] {
            give((*stage).into(), "entry");
        }
        for stage in last_stages(Detail::Stages) {
            give(stage.expect("every hook has one").into(), "exit");
        }
        for component in &COMPONENTS {
            for (hook, stage) in component.stages() {
                assert_eq!(ALL[stage].hook, hook, "{}", component.name);
                give(stage, component.name);
            }
        }
        // Where tables and chains stand (`enum nf_ip_hook_priorities`, and kube-proxy's filter before dnat).
        for (hook, priority) in [
            (hook::PREROUTING, -150),
            (hook::PREROUTING, -110),
            (hook::INPUT, 0),
            (hook::FORWARD, 50),
            (hook::OUTPUT, -150),
            (hook::OUTPUT, -110),
        ] {
            give(stage_at(hook, priority), "table");
        }
        assert_eq!(given.len(), BOUNDARIES, "{given:?}");
        for (stage, by) in given {
            // IPVS sits directly beside nat.
            let one = by.len() == 1 || by == ["nat", "IPVS"];
            assert!(one, "{:?}: {by:?}", ALL[stage]);
        }
    }

    #[test]
    fn components_find_their_stages() {
        let named = |hook, priority| ALL[stage_at(hook, priority)].stage;
        assert_eq!(named(hook::PREROUTING, -450), "raw");
        assert_eq!(named(hook::PREROUTING, -300), "raw");
        assert_eq!(named(hook::PREROUTING, -110), "pre-dnat");
        assert_eq!(named(hook::PREROUTING, 0), "routing");
        assert_eq!(named(hook::FORWARD, 50), "filter");
        assert_eq!(named(hook::OUTPUT, -98), "dnat");
        assert_eq!(named(hook::POSTROUTING, -150), "mangle");
        assert_eq!(named(hook::POSTROUTING, i32::MAX), "egress");
    }

    #[test]
    fn hooks_end_in_their_last_stages() {
        let last = |detail| last_stages(detail).collect::<Vec<_>>();
        let all = [5, 10, 14, 20, 24].map(Some);
        assert_eq!(last(Detail::Stages), all);
        assert_eq!(
            last(Detail::Hooks),
            [Some(5), Some(10), Some(14), None, Some(24)]
        );
    }
}
