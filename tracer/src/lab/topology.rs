//! The node under test, its pods, an external client and a second node: namespaces and links.

use std::fmt::Display;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::clean;
use super::plan;
use super::source::Sources;
use crate::cluster::{Cidr, Family};
use crate::kernel::link::{Batch, LinkError, Mac};
use crate::kernel::netns::{Netns, NetnsError};
use crate::kernel::sysctl::{self, SysctlError};
use crate::kernel::tool::{self, ToolError};

/// What a laboratory is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LabOptions {
    /// IPv6 beside IPv4. Without it IPv6 is switched off in every namespace.
    pub dual_stack: bool,
    /// Conntrack entries that the node needs room for.
    pub conntrack_entries: u64,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            dual_stack: false,
            conntrack_entries: 262_144,
        }
    }
}

/// Why a laboratory could not be built.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A namespace could not be made or entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A link, address, route or neighbour was refused.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A sysctl was refused.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// The pod network's rule was refused.
    #[error(transparent)]
    Network(#[from] ToolError),
    /// What an earlier laboratory left could not be looked through.
    #[error("cannot clean up after earlier runs: {0}")]
    Clean(#[source] std::io::Error),
}

/// The laboratory. It ends, and everything in it, when it and the last clone of its [`Netns`]
/// are dropped, or with the process, however that ends.
#[derive(Debug)]
pub struct Lab {
    node: Netns,
    external: Netns,
    node2: Netns,
    client_pod: Netns,
    server_pods: Vec<Netns>,
    dual_stack: bool,
    conntrack_max: Option<u64>,
    notes: Vec<String>,
    pub(super) sources: Sources,
    _alive: Alive,
}

/// What a pod network or a firewall brings to any real node: a rule of its own that asks conntrack.
///
/// The kernel tracks connections only while some rule of the namespace needs it. Were kube-proxy's
/// the only ones, flushing them would switch conntrack off, and established flows would lose their
/// translation with it; on a node with a pod network they keep it.
const NETWORK_RULES: &str = "\
table inet lab-network {
  chain forward {
    type filter hook forward priority filter; policy accept;
    ct state established,related accept
  }
}
";

/// Laboratories of this process; the last one removes what they share.
static LIVE: AtomicUsize = AtomicUsize::new(0);

#[derive(Debug)]
struct Alive;

impl Alive {
    fn new() -> Self {
        LIVE.fetch_add(1, Ordering::SeqCst);
        Self
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        if LIVE.fetch_sub(1, Ordering::SeqCst) == 1 {
            clean::remove_own_lock();
        }
    }
}

impl Lab {
    /// Builds the laboratory in new namespaces, after removing what dead ones left.
    pub fn build(options: LabOptions) -> Result<Self, LabError> {
        let mut notes: Vec<String> = clean::clean()
            .map_err(LabError::Clean)?
            .into_iter()
            .map(|what| format!("removed what an earlier run left: {what}"))
            .collect();
        let mut lab = Self {
            node: Netns::create("node")?,
            external: Netns::create("external")?,
            node2: Netns::create("node2")?,
            client_pod: Netns::create("pod-client")?,
            server_pods: (0..plan::SERVER_PODS)
                .map(|pod| Netns::create(&format!("pod-{pod}")))
                .collect::<Result<_, _>>()?,
            dual_stack: options.dual_stack,
            conntrack_max: None,
            notes: Vec::new(),
            sources: Sources::default(),
            _alive: Alive::new(),
        };
        lab.set_sysctls()?;
        lab.set_links()?;
        tool::run(&lab.node, "nft", &["-f", "-"], NETWORK_RULES)?;
        lab.conntrack_max = conntrack_room(&lab.node, options.conntrack_entries, &mut notes)?;
        lab.notes = notes;
        Ok(lab)
    }

    /// The node under test.
    pub fn node(&self) -> &Netns {
        &self.node
    }

    /// The machine outside the cluster.
    pub fn external(&self) -> &Netns {
        &self.external
    }

    /// The other node; its pods' addresses are its own.
    pub fn node2(&self) -> &Netns {
        &self.node2
    }

    /// The pod that sends.
    pub fn client_pod(&self) -> &Netns {
        &self.client_pod
    }

    /// The pods that answer, [`plan::SERVER_PODS`] of them.
    pub fn server_pods(&self) -> &[Netns] {
        &self.server_pods
    }

    /// Has it IPv6?
    pub fn dual_stack(&self) -> bool {
        self.dual_stack
    }

    /// Entries that the node's conntrack table can hold; `None` if this kernel has none (yet).
    pub fn conntrack_max(&self) -> Option<u64> {
        self.conntrack_max
    }

    /// What a reader of the results should know.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    fn every_netns(&self) -> impl Iterator<Item = &Netns> {
        [&self.node, &self.external, &self.node2, &self.client_pod]
            .into_iter()
            .chain(&self.server_pods)
    }

    fn set_sysctls(&self) -> Result<(), LabError> {
        for netns in self.every_netns() {
            for (key, value) in EVERYWHERE {
                sysctl::write(netns, key, value)?;
            }
            // A kernel started with ipv6.disable=1 has no such keys, and needs none.
            if self.dual_stack {
                for (key, value) in IPV6 {
                    sysctl::write(netns, key, value)?;
                }
            } else {
                for key in NO_IPV6 {
                    match sysctl::write(netns, key, "1") {
                        Err(error) if error.is_missing() => {}
                        result => result?,
                    }
                }
            }
        }
        sysctl::write(&self.node, "net/ipv4/ip_forward", "1")?;
        // Forwarding resets others of the node's sysctls: they are written after it.
        for (key, value) in NODE {
            sysctl::write(&self.node, key, value)?;
        }
        if self.dual_stack {
            sysctl::write(&self.node, "net/ipv6/conf/all/forwarding", "1")?;
        }
        Ok(())
    }

    fn set_links(&self) -> Result<(), LabError> {
        let mut node = Batch::new(&self.node);
        node.line("link set lo up");
        // ext0 first: where masquerading finds no address on the way out (pods have none on the
        // node's end) it takes that of the first link, and this must be the node's own.
        let ext0 = Wire::new("ext0", 1);
        ext0.add(&mut node, &self.external);
        ext0.node_address(&mut node, plan::NODE_ADDRESS);
        ext0.neighbour(&mut node, plan::EXTERNAL_ADDRESS.base);
        node.line(format!(
            "route add default via {}",
            plan::EXTERNAL_ADDRESS.base
        ));
        node.line(format!(
            "route add {} via {}",
            plan::EXTERNAL_MORE,
            plan::EXTERNAL_ADDRESS.base
        ));
        let link = Wire::new("node2", 2);
        link.add(&mut node, &self.node2);
        link.node_address(&mut node, plan::LINK_ADDRESS);
        link.neighbour(&mut node, plan::NODE2_ADDRESS.base);
        node.line(format!(
            "route add {} via {}",
            plan::NODE2_POD_CIDR,
            plan::NODE2_ADDRESS.base
        ));
        if self.dual_stack {
            ext0.node_address(&mut node, plan::NODE_ADDRESS6);
            ext0.neighbour(&mut node, plan::EXTERNAL_ADDRESS6.base);
            node.line(format!(
                "route add default via {}",
                plan::EXTERNAL_ADDRESS6.base
            ));
            node.line(format!(
                "route add {} via {}",
                plan::EXTERNAL_MORE6,
                plan::EXTERNAL_ADDRESS6.base
            ));
            link.node_address(&mut node, plan::LINK_ADDRESS6);
            link.neighbour(&mut node, plan::NODE2_ADDRESS6.base);
            node.line(format!(
                "route add {} via {}",
                plan::NODE2_POD_CIDR6,
                plan::NODE2_ADDRESS6.base
            ));
        }
        let mut pods = vec![(
            &self.client_pod,
            Wire::new("pod-client", 3),
            plan::CLIENT_POD,
            plan::CLIENT_POD6,
        )];
        for (pod, netns) in (0..).zip(&self.server_pods) {
            pods.push((
                netns,
                Wire::new(&format!("pod-{pod}"), 4 + pod),
                plan::server_pod(pod, Family::V4),
                plan::server_pod(pod, Family::V6),
            ));
        }
        for (netns, wire, range, range6) in &pods {
            wire.add(&mut node, netns);
            wire.route_to_pod(&mut node, *range);
            if self.dual_stack {
                wire.route_to_pod(&mut node, *range6);
            }
        }
        node.apply()?;

        for (netns, wire, range, range6) in &pods {
            self.set_pod(netns, wire, *range, *range6)?;
        }
        self.set_external(&ext0)?;
        self.set_node2(&link)?;
        Ok(())
    }

    /// A pod: one address of its own, all others of its range answered as well, one way out.
    fn set_pod(
        &self,
        netns: &Netns,
        wire: &Wire,
        range: Cidr,
        range6: Cidr,
    ) -> Result<(), LabError> {
        let mut pod = Batch::new(netns);
        Wire::peer_up(&mut pod, format_args!("{}/32", range.nth(1)));
        pod.any_ip(range);
        wire.peer_neighbour(&mut pod, plan::POD_GATEWAY);
        pod.line(format!(
            "route add default via {} dev eth0 onlink",
            plan::POD_GATEWAY
        ));
        if self.dual_stack {
            pod.line(format!("addr add {}/128 dev eth0 nodad", range6.nth(1)));
            pod.any_ip(range6);
            wire.peer_neighbour(&mut pod, plan::POD_GATEWAY6);
            pod.line(format!(
                "route add default via {} dev eth0",
                plan::POD_GATEWAY6
            ));
        }
        pod.apply()?;
        Ok(())
    }

    fn set_external(&self, wire: &Wire) -> Result<(), LabError> {
        let mut external = Batch::new(&self.external);
        Wire::peer_up(&mut external, plan::EXTERNAL_ADDRESS);
        wire.peer_neighbour(&mut external, plan::NODE_ADDRESS.base);
        external.any_ip(plan::EXTERNAL_MORE);
        // Not the default route: what a broken node sends out untranslated must end here.
        for cidr in [plan::CLUSTER_CIDR, plan::SERVICE_CIDR] {
            external.line(format!("route add {cidr} via {}", plan::NODE_ADDRESS.base));
        }
        if self.dual_stack {
            external.line(format!(
                "addr add {} dev eth0 nodad",
                plan::EXTERNAL_ADDRESS6
            ));
            wire.peer_neighbour(&mut external, plan::NODE_ADDRESS6.base);
            external.any_ip(plan::EXTERNAL_MORE6);
            for cidr in [plan::CLUSTER_CIDR6, plan::SERVICE_CIDR6] {
                external.line(format!("route add {cidr} via {}", plan::NODE_ADDRESS6.base));
            }
        }
        external.apply()?;
        Ok(())
    }

    fn set_node2(&self, wire: &Wire) -> Result<(), LabError> {
        let mut node2 = Batch::new(&self.node2);
        Wire::peer_up(&mut node2, plan::NODE2_ADDRESS);
        wire.peer_neighbour(&mut node2, plan::LINK_ADDRESS.base);
        node2.any_ip(plan::NODE2_POD_CIDR);
        node2.line(format!("route add default via {}", plan::LINK_ADDRESS.base));
        if self.dual_stack {
            node2.line(format!("addr add {} dev eth0 nodad", plan::NODE2_ADDRESS6));
            wire.peer_neighbour(&mut node2, plan::LINK_ADDRESS6.base);
            node2.any_ip(plan::NODE2_POD_CIDR6);
            node2.line(format!(
                "route add default via {}",
                plan::LINK_ADDRESS6.base
            ));
        }
        node2.apply()?;
        Ok(())
    }
}

/// Sysctls of every namespace. `conf/default` is written before there are links.
const EVERYWHERE: [(&str, &str); 6] = [
    // New namespaces inherit the machine's own settings, which may filter return paths.
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/send_redirects", "0"),
    // No flow inherits round-trip times from an earlier one: modes must start alike.
    ("net/ipv4/tcp_no_metrics_save", "1"),
    ("net/core/somaxconn", "4096"),
];

/// Sysctls of the node alone.
const NODE: [(&str, &str); 2] = [
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/all/send_redirects", "0"),
];

/// Sysctls of every namespace that has IPv6: no packet on the wires but those of the traffic.
const IPV6: [(&str, &str); 11] = [
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/dad_transmits", "0"),
    ("net/ipv6/conf/default/router_solicitations", "0"),
    ("net/ipv6/conf/all/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    // 1: no link-local address.
    ("net/ipv6/conf/default/addr_gen_mode", "1"),
    ("net/ipv6/conf/default/autoconf", "0"),
    // Unlike IPv4, IPv6 binds to an AnyIP address only with this.
    ("net/ipv6/ip_nonlocal_bind", "1"),
];

/// What switches IPv6 off.
const NO_IPV6: [&str; 2] = [
    "net/ipv6/conf/all/disable_ipv6",
    "net/ipv6/conf/default/disable_ipv6",
];

/// A veth pair from the node (`name`) to another namespace (`eth0`).
struct Wire {
    name: String,
    node_mac: Mac,
    peer_mac: Mac,
}

impl Wire {
    /// Wire number `number`, which makes the hardware addresses: 02 is "locally administered".
    fn new(name: &str, number: u32) -> Self {
        let [_, _, high, low] = number.to_be_bytes();
        Self {
            name: name.to_owned(),
            node_mac: Mac([2, 0, 0, 0, high, low]),
            peer_mac: Mac([2, 0, 0, 1, high, low]),
        }
    }

    fn add(&self, node: &mut Batch<'_>, peer: &Netns) {
        node.veth((&self.name, self.node_mac), peer, ("eth0", self.peer_mac))
            .line(format!("link set {} up", self.name));
    }

    fn node_address(&self, node: &mut Batch<'_>, address: Cidr) {
        let nodad = match address.family() {
            Family::V4 => "",
            Family::V6 => " nodad",
        };
        node.line(format!("addr add {address} dev {}{nodad}", self.name));
    }

    /// A permanent neighbour of the node: no ARP or neighbour discovery ever runs on the wire.
    fn neighbour(&self, node: &mut Batch<'_>, address: IpAddr) {
        node.line(format!(
            "neigh add {address} lladdr {} dev {} nud permanent",
            self.peer_mac, self.name
        ));
    }

    /// The node's route to a pod's whole range, by way of the pod's own address.
    fn route_to_pod(&self, node: &mut Batch<'_>, range: Cidr) {
        let own = range.nth(1);
        self.neighbour(node, own);
        node.line(format!(
            "route add {range} via {own} dev {} onlink",
            self.name
        ));
    }

    fn peer_up(peer: &mut Batch<'_>, address: impl Display) {
        peer.line("link set lo up")
            .line("link set eth0 up")
            .line(format!("addr add {address} dev eth0"));
    }

    fn peer_neighbour(&self, peer: &mut Batch<'_>, address: IpAddr) {
        peer.line(format!(
            "neigh add {address} lladdr {} dev eth0 nud permanent",
            self.node_mac
        ));
    }
}

/// Size of the conntrack table, with a note if it is smaller than wanted.
///
/// It is only read: the limit belongs to the whole machine, even where an old kernel lets a
/// namespace write it.
fn conntrack_room(
    node: &Netns,
    wanted: u64,
    notes: &mut Vec<String>,
) -> Result<Option<u64>, LabError> {
    match sysctl::read_number(node, "net/netfilter/nf_conntrack_max") {
        Ok(have) => {
            if have < wanted {
                notes.push(format!(
                    "the conntrack table holds {have} entries and {wanted} are wanted: flows may be \
                     lost for that reason alone; net.netfilter.nf_conntrack_max is the whole \
                     machine's and never changed here"
                ));
            }
            Ok(Some(have))
        }
        // The module is not loaded yet: its default applies when rules load it.
        Err(error) if error.is_missing() => {
            notes.push(
                "this kernel has no conntrack (yet): the size of its table is not known".to_owned(),
            );
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}
