//! IPVS mode: virtual servers, which have no names, and the sets that say what they are.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use super::{Collector, Foreign, Found, FoundService, FrontendKind, Refusal, owner};
use crate::cluster::{Family, Protocol, TrafficPolicy};
use crate::rules::Mode;
use crate::rules::ipvs::{Entry, Role, ServerKey, Servers, Sets, VirtualServer};

pub(super) fn read(servers: &Servers, sets: &Sets, found: &mut Found) {
    if !servers.list.is_empty() || !sets.list.is_empty() {
        found.modes.push(Mode::Ipvs.name());
    }
    let roles = Roles::new(sets);
    for family in Family::ALL {
        let mut collector = Collector::new(Mode::Ipvs.name(), family);
        for server in &servers.list {
            if server.key.family() == family {
                add(server, &roles, &mut collector);
            }
        }
        collector.finish(found);
    }
    found.health_check_node_ports.extend(&roles.health_checks);
    if servers.by_mark > 0 {
        found.foreign.push(Foreign {
            place: "IPVS".to_owned(),
            name: "virtual servers by firewall mark".to_owned(),
            owner: None,
            count: Some(servers.by_mark.into()),
        });
    }
    found.foreign.extend(sets.foreign.iter().map(|set| Foreign {
        place: "ipset".to_owned(),
        name: set.name.clone(),
        owner: owner(&set.name),
        count: Some(set.entries),
    }));
}

/// Address, protocol and port of a virtual server or set entry.
type Place = (IpAddr, Protocol, u16);

/// What the sets say of addresses and ports.
#[derive(Default)]
struct Roles {
    kinds: HashMap<Place, FrontendKind>,
    /// Those with a Local external policy.
    local: BTreeSet<Place>,
    node_ports: BTreeSet<(Family, Protocol, u16)>,
    local_node_ports: BTreeSet<(Family, Protocol, u16)>,
    source_ranges: HashMap<Place, Vec<String>>,
    health_checks: BTreeSet<u16>,
}

impl Roles {
    fn new(sets: &Sets) -> Self {
        let mut roles = Self::default();
        for set in &sets.list {
            for member in &set.members {
                roles.add(set.family, set.role, member.entry);
            }
        }
        roles
    }

    fn add(&mut self, family: Family, role: Role, entry: Entry) {
        match (role, entry) {
            (_, Entry::IpPort(address, protocol, port)) => {
                let place = (address, protocol, port);
                let kind = match role {
                    Role::ClusterIp => FrontendKind::ClusterIp,
                    Role::ExternalIp | Role::ExternalIpLocal => FrontendKind::ExternalIp,
                    Role::LoadBalancer | Role::LoadBalancerLocal | Role::LoadBalancerFirewall => {
                        FrontendKind::LoadBalancer
                    }
                    Role::NodePortSctp => {
                        self.node_ports.insert((family, protocol, port));
                        return;
                    }
                    Role::NodePortLocalSctp => {
                        self.local_node_ports.insert((family, protocol, port));
                        return;
                    }
                    _ => return,
                };
                self.kinds.insert(place, kind);
                if matches!(role, Role::ExternalIpLocal | Role::LoadBalancerLocal) {
                    self.local.insert(place);
                }
            }
            (Role::LoadBalancerSourceCidr, Entry::IpPortNet(address, protocol, port, network)) => {
                let ranges = self.source_ranges.entry((address, protocol, port));
                ranges.or_default().push(network.to_string());
            }
            (Role::HealthCheckNodePort, Entry::Port(port)) => {
                self.health_checks.insert(port);
            }
            (_, Entry::Port(port)) => {
                let protocol = match role {
                    Role::NodePortUdp | Role::NodePortLocalUdp => Protocol::Udp,
                    _ => Protocol::Tcp,
                };
                let ports = match role {
                    Role::NodePortLocalTcp | Role::NodePortLocalUdp => &mut self.local_node_ports,
                    _ => &mut self.node_ports,
                };
                ports.insert((family, protocol, port));
            }
            _ => {}
        }
    }
}

/// The Service that an entry of a set of kube-proxy's stands for, with this frontend alone; `None` for sets that
/// hold something else. Its virtual server is there before: kube-proxy makes that first.
pub(crate) fn of_entry(family: Family, role: Role, entry: Entry) -> Option<FoundService> {
    let mut roles = Roles::default();
    roles.add(family, role, entry);
    let places = roles.kinds.into_iter();
    let places =
        places.map(|((address, protocol, port), kind)| (kind, Some(address), protocol, port));
    let ports = roles.node_ports.into_iter().chain(roles.local_node_ports);
    let ports = ports.map(|(_, protocol, port)| (FrontendKind::NodePort, None, protocol, port));
    let (kind, address, protocol, port) = places.chain(ports).next()?;
    let mut service = FoundService::bare(None, Mode::Ipvs.name(), family, protocol);
    service.frontend(kind, address, port);
    Some(service)
}

fn add(server: &VirtualServer, roles: &Roles, collector: &mut Collector) {
    let ServerKey { protocol, socket } = server.key;
    let (address, port) = (socket.ip(), socket.port());
    let place = (address, protocol, port);
    let node_port = (server.key.family(), protocol, port);
    let kind = match roles.kinds.get(&place) {
        Some(kind) => *kind,
        None if roles.node_ports.contains(&node_port) => FrontendKind::NodePort,
        None => FrontendKind::External,
    };
    let is_node_port = kind == FrontendKind::NodePort;
    // A NodePort has a virtual server on each address of the node.
    let key = if is_node_port {
        format!("{port:05}")
    } else {
        socket.to_string()
    };
    let service = collector.entry(&key, None, protocol);
    let address = (!is_node_port).then_some(address);
    let frontend = service.frontend(kind, address, port);
    if server.real_servers.iter().all(|real| real.weight == 0) {
        frontend.refusal = Some(Refusal::Reject);
    }
    // A NodePort has the same ones on each address; one without weight drains.
    if service.endpoints.is_empty() {
        let serving = server.real_servers.iter().filter(|real| real.weight > 0);
        service.endpoints = serving.map(|real| real.socket).collect();
    }
    service.affinity = server.persistence;
    if kind != FrontendKind::ClusterIp {
        let local = if is_node_port {
            roles.local_node_ports.contains(&node_port)
        } else {
            roles.local.contains(&place)
        };
        service.external_policy = Some(if local {
            TrafficPolicy::Local
        } else {
            TrafficPolicy::Cluster
        });
    }
    if let Some(ranges) = roles.source_ranges.get(&place) {
        service.source_ranges.clone_from(ranges);
    }
}
