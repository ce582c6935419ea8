//! How traffic enters a node and what it asks for.

/// Who sent the first packet of a flow, seen from the node under test.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// A pod on this node.
    Pod = 0,
    /// A process in the node's own network namespace.
    Host = 1,
    /// A machine outside the node.
    External = 2,
}

/// What kind of address the flow was sent to.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// A Service's ClusterIP and port.
    ClusterIp = 0,
    /// One of the node's addresses and a Service's NodePort.
    NodePort = 1,
    /// An address of a Service that is known outside the cluster, and the Service's port: an external IP or one of
    /// its load balancer, which nftables' rules do not tell apart.
    External = 2,
    /// A pod's own address: no Service at all, the floor of every comparison.
    Pod = 3,
}

impl Target {
    /// How many kinds there are.
    pub const COUNT: usize = 4;
}

/// Stands, with an [`Origin`] added, for the path of what goes to an address that IPVS has bound on this node for a
/// Service, and to a port that no Service has. It is none of [`Path::ALL`]: such packets are told, and no histogram
/// counts them.
pub const ABSORBED: u8 = 0x40;

/// One way into the node: origin and target together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path {
    /// Who sent the first packet.
    pub origin: Origin,
    /// What it was sent to.
    pub target: Target,
}

impl Path {
    /// How many paths there are; [`Path::index`] is below it.
    pub const COUNT: usize = 3 * Target::COUNT;

    /// Every path, in the order of [`Path::index`].
    pub const ALL: [Self; Self::COUNT] = {
        const fn p(origin: Origin, target: Target) -> Path {
            Path { origin, target }
        }
        [
            p(Origin::Pod, Target::ClusterIp),
            p(Origin::Pod, Target::NodePort),
            p(Origin::Pod, Target::External),
            p(Origin::Pod, Target::Pod),
            p(Origin::Host, Target::ClusterIp),
            p(Origin::Host, Target::NodePort),
            p(Origin::Host, Target::External),
            p(Origin::Host, Target::Pod),
            p(Origin::External, Target::ClusterIp),
            p(Origin::External, Target::NodePort),
            p(Origin::External, Target::External),
            p(Origin::External, Target::Pod),
        ]
    };

    /// The three Service paths that the comparison measures, in its order.
    pub const SERVICE: [Self; 3] = [Self::ALL[0], Self::ALL[4], Self::ALL[9]];

    /// The same origins sending straight to a pod's address, in the order of [`Path::SERVICE`].
    pub const FLOOR: [Self; 3] = [Self::ALL[3], Self::ALL[7], Self::ALL[11]];

    /// A number below [`Path::COUNT`].
    pub const fn index(self) -> usize {
        self.origin as usize * Target::COUNT + self.target as usize
    }

    /// Another number below [`Path::COUNT`], which stays what it was when paths are added: what is drawn by lot for a
    /// path is drawn by it.
    pub const fn lot(self) -> usize {
        let origin = self.origin as usize;
        match self.target {
            Target::ClusterIp => origin * 3,
            Target::NodePort => origin * 3 + 1,
            Target::Pod => origin * 3 + 2,
            Target::External => 9 + origin,
        }
    }

    /// A number below [`Path::COUNT`], as the programs in the kernel have both parts.
    #[inline(always)]
    #[allow(
        clippy::inline_always,
        clippy::cast_possible_truncation,
        reason = "the kernel programs must not call it; the count is a small constant"
    )]
    pub const fn index_of(origin: u32, target: u32) -> u32 {
        origin * Target::COUNT as u32 + target
    }

    /// The path without a Service from the same origin.
    #[must_use]
    pub const fn floor(self) -> Self {
        Self {
            origin: self.origin,
            target: Target::Pod,
        }
    }

    /// A stable identifier, as run.json writes it: `pod-to-clusterip`.
    pub const fn id(self) -> &'static str {
        match (self.origin, self.target) {
            (Origin::Pod, Target::ClusterIp) => "pod-to-clusterip",
            (Origin::Pod, Target::NodePort) => "pod-to-nodeport",
            (Origin::Pod, Target::External) => "pod-to-external-ip",
            (Origin::Pod, Target::Pod) => "pod-to-pod",
            (Origin::Host, Target::ClusterIp) => "host-to-clusterip",
            (Origin::Host, Target::NodePort) => "host-to-nodeport",
            (Origin::Host, Target::External) => "host-to-external-ip",
            (Origin::Host, Target::Pod) => "host-to-pod",
            (Origin::External, Target::ClusterIp) => "external-to-clusterip",
            (Origin::External, Target::NodePort) => "external-to-nodeport",
            (Origin::External, Target::External) => "external-to-external-ip",
            (Origin::External, Target::Pod) => "external-to-pod",
        }
    }

    /// As people read it: `pod→ClusterIP`.
    pub const fn title(self) -> &'static str {
        match (self.origin, self.target) {
            (Origin::Pod, Target::ClusterIp) => "pod→ClusterIP",
            (Origin::Pod, Target::NodePort) => "pod→NodePort",
            (Origin::Pod, Target::External) => "pod→external IP",
            (Origin::Pod, Target::Pod) => "pod→pod",
            (Origin::Host, Target::ClusterIp) => "host→ClusterIP",
            (Origin::Host, Target::NodePort) => "host→NodePort",
            (Origin::Host, Target::External) => "host→external IP",
            (Origin::Host, Target::Pod) => "host→pod",
            (Origin::External, Target::ClusterIp) => "external→ClusterIP",
            (Origin::External, Target::NodePort) => "external→NodePort",
            (Origin::External, Target::External) => "external→external IP",
            (Origin::External, Target::Pod) => "external→pod",
        }
    }
}

// Told apart by their numbers.
const _: () = assert!(ABSORBED as usize > Path::COUNT);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_and_all_agree() {
        for (i, path) in Path::ALL.iter().enumerate() {
            assert_eq!(path.index(), i);
            let same = Path::index_of(path.origin as u32, path.target as u32);
            assert_eq!(same as usize, i);
        }
    }

    #[test]
    fn every_path_has_a_lot_of_its_own() {
        let mut lots = Path::ALL.map(Path::lot);
        assert_eq!(Path::SERVICE.map(Path::lot), [0, 3, 7]);
        lots.sort_unstable();
        let all: [usize; Path::COUNT] = core::array::from_fn(|lot| lot);
        assert_eq!(lots, all);
    }
}
