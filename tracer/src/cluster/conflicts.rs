//! Addresses and ports that more than one `ServicePort` claims.
//!
//! The API server gives out `ClusterIP`s and `NodePort`s once, but any Service may name any external
//! IP, and a load balancer may give one IP to several. kube-proxy does not notice: it visits
//! `ServicePort`s in the random order of a Go map.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use super::{Cluster, Family, Protocol, Service, ServicePort};

/// What only one `ServicePort` can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Claim {
    /// A ClusterIP, external IP or load balancer IP with a port.
    Socket(Protocol, SocketAddr),
    /// A NodePort, in the rules of one IP family.
    NodePort(Family, Protocol, u16),
}

impl Claim {
    /// The IP family whose rules it is in.
    pub fn family(self) -> Family {
        match self {
            Self::Socket(_, socket) => Family::of(socket.ip()),
            Self::NodePort(family, ..) => family,
        }
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(protocol, socket) => write!(f, "{socket}/{protocol}"),
            Self::NodePort(_, protocol, port) => write!(f, "{port}/{protocol}"),
        }
    }
}

/// Who claims something, and where it says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claimant {
    /// The Service's place in the cluster.
    pub service: usize,
    /// The port's place in the Service.
    pub port: usize,
    /// The field of the Service: `spec.externalIPs`.
    pub field: &'static str,
}

impl Claimant {
    /// The place of the `ServicePort`.
    pub const fn place(self) -> (usize, usize) {
        (self.service, self.port)
    }
}

/// Something that more than one `ServicePort` claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// What they claim.
    pub claim: Claim,
    /// They, at least two, in the cluster's order.
    pub claimants: Vec<Claimant>,
}

impl Cluster {
    /// Everything that more than one `ServicePort` claims, in the order of the first second claims.
    pub fn conflicts(&self) -> Vec<Conflict> {
        // The first claimant, and the place of the conflict if there is one.
        let mut first: HashMap<Claim, (Claimant, Option<usize>)> =
            HashMap::with_capacity(2 * self.services.len());
        let mut conflicts: Vec<Conflict> = Vec::new();
        for (claim, claimant) in self.claims() {
            let mut known = match first.entry(claim) {
                Entry::Vacant(free) => {
                    free.insert((claimant, None));
                    continue;
                }
                Entry::Occupied(known) => known,
            };
            let (first, conflict) = known.get_mut();
            match conflict.and_then(|place| conflicts.get_mut(place)) {
                // The claims of a port come one after the other, and the same one may come twice:
                // an external IP can be the load balancer's too.
                Some(conflict) => {
                    let last = conflict.claimants.last().map(|last| last.place());
                    if last != Some(claimant.place()) {
                        conflict.claimants.push(claimant);
                    }
                }
                None if first.place() != claimant.place() => {
                    *conflict = Some(conflicts.len());
                    conflicts.push(Conflict {
                        claim,
                        claimants: vec![*first, claimant],
                    });
                }
                None => {}
            }
        }
        conflicts
    }

    /// The `ServicePort` of a claim.
    pub fn claimant(&self, claimant: Claimant) -> Option<(&Service, &ServicePort)> {
        let service = self.services.get(claimant.service)?;
        Some((service, service.ports.get(claimant.port)?))
    }

    fn claims(&self) -> impl Iterator<Item = (Claim, Claimant)> {
        let services = self.services.iter().enumerate();
        services.flat_map(|(place, service)| {
            let ports = service.ports.iter().enumerate();
            ports.flat_map(move |(index, port)| {
                let claims = claims_of(service, port);
                claims.map(move |(claim, field)| {
                    let claimant = Claimant {
                        service: place,
                        port: index,
                        field,
                    };
                    (claim, claimant)
                })
            })
        })
    }
}

/// What a `ServicePort` claims, in the families in which its Service has a ClusterIP: in the
/// others, it is nothing to kube-proxy.
fn claims_of<'a>(
    service: &'a Service,
    port: &'a ServicePort,
) -> impl Iterator<Item = (Claim, &'static str)> + 'a {
    let protocol = port.protocol;
    let families = Family::ALL.into_iter().filter_map(move |family| {
        let cluster_ip = service.cluster_ips.iter().find(|ip| family.holds(**ip))?;
        Some((family, *cluster_ip))
    });
    families.flat_map(move |(family, cluster_ip)| {
        let socket = move |(ip, field): (IpAddr, _)| {
            let socket = SocketAddr::new(ip, port.port);
            (Claim::Socket(protocol, socket), field)
        };
        let external = service.external_ips.iter();
        let external = external.map(|ip| (*ip, "spec.externalIPs"));
        let balanced = service.load_balancer_ips.iter();
        let balanced = balanced.map(|ip| (*ip, "status.loadBalancer.ingress"));
        let node_port = port.node_port.map(|port| {
            let claim = Claim::NodePort(family, protocol, port);
            (claim, "spec.ports")
        });
        std::iter::once((cluster_ip, "spec.clusterIPs"))
            .chain(
                external
                    .chain(balanced)
                    .filter(move |(ip, _)| family.holds(*ip)),
            )
            .map(socket)
            .chain(node_port)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, last: u8) -> Service {
        Service {
            namespace: "ns".to_owned(),
            name: name.to_owned(),
            cluster_ips: vec![[10, 96, 0, last].into()],
            ports: vec![ServicePort {
                name: "http".to_owned(),
                protocol: Protocol::Tcp,
                port: 80,
                node_port: None,
                endpoints: Vec::new(),
            }],
            ..Service::default()
        }
    }

    /// What is claimed, and by which Services.
    fn found(services: Vec<Service>) -> Vec<(String, Vec<usize>)> {
        let cluster = Cluster {
            services,
            ..Cluster::default()
        };
        let conflicts = cluster.conflicts().into_iter();
        conflicts
            .map(|conflict| {
                let services = conflict.claimants.iter().map(|c| c.service);
                (conflict.claim.to_string(), services.collect())
            })
            .collect()
    }

    #[test]
    fn an_address_of_two_services() {
        let vip = IpAddr::from([192, 0, 2, 1]);
        let mut a = service("a", 1);
        a.external_ips = vec![vip];
        // Twice its own is no conflict.
        a.load_balancer_ips = vec![vip];
        assert_eq!(found(vec![a.clone(), service("b", 2)]), []);
        let mut b = service("b", 2);
        b.load_balancer_ips = vec![vip];
        b.external_ips = vec![vip];
        let mut c = service("c", 3);
        c.cluster_ips = vec![vip];
        let all = vec![a.clone(), b.clone(), c];
        assert_eq!(found(all), [("192.0.2.1:80/tcp".to_owned(), vec![0, 1, 2])]);
        b.ports[0].protocol = Protocol::Udp;
        assert_eq!(found(vec![a.clone(), b.clone()]), []);
        b.ports[0].protocol = Protocol::Tcp;
        b.ports[0].port = 81;
        assert_eq!(found(vec![a, b]), []);
    }

    #[test]
    fn a_node_port_of_two_services() {
        let (mut a, mut b) = (service("a", 1), service("b", 2));
        a.ports[0].node_port = Some(30_080);
        b.ports[0].node_port = Some(30_080);
        let both = found(vec![a.clone(), b.clone()]);
        assert_eq!(both, [("30080/tcp".to_owned(), vec![0, 1])]);
        // The rules of each family know only one of them.
        b.cluster_ips = vec![IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 2])];
        assert_eq!(found(vec![a, b]), []);
    }

    #[test]
    fn a_service_without_a_cluster_ip_claims_nothing() {
        let vip = IpAddr::from([192, 0, 2, 1]);
        let (mut a, mut b) = (service("a", 1), service("b", 2));
        a.external_ips = vec![vip];
        b.external_ips = vec![vip];
        b.cluster_ips.clear();
        assert_eq!(found(vec![a.clone(), b.clone()]), []);
        b.cluster_ips = vec![IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 2])];
        assert_eq!(found(vec![a, b]), []);
    }
}
