//! A cluster as one proxier of kube-proxy sees it: the `ServicePort`s of one IP family, and which
//! of their endpoints this node's traffic may use.
//!
//! Sources: `pkg/proxy/serviceport.go` and `pkg/proxy/topology.go` (`CategorizeEndpoints`) of
//! Kubernetes v1.36.

use std::fmt::Write as _;
use std::net::IpAddr;

use super::NodeView;
use crate::cluster::{
    Cidr, Cluster, Condition, Endpoint, Family, Protocol, Service, ServicePort, TrafficPolicy,
};

/// More endpoints than this (over all `ServicePort`s of a family, in any condition) make
/// kube-proxy leave out the comments of endpoint rules: `largeClusterEndpointsThreshold` in
/// `pkg/proxy/iptables/proxier.go`.
const LARGE_CLUSTER_ENDPOINTS: usize = 1000;

/// The `ServicePort`s of one family.
pub(super) struct Ports<'a> {
    pub(super) list: Vec<PortView<'a>>,
    /// kube-proxy's `largeClusterMode`.
    pub(super) large: bool,
}

/// One `ServicePort` of one family.
pub(super) struct PortView<'a> {
    pub(super) service: &'a Service,
    pub(super) port: &'a ServicePort,
    /// `ns/name:port`.
    pub(super) id: String,
    pub(super) cluster_ip: String,
    /// The external IPs of the family.
    pub(super) external_ips: Vec<IpAddr>,
    /// The load balancer's VIPs of the family.
    pub(super) load_balancer_ips: Vec<IpAddr>,
    /// The load balancer's source ranges of the family; none if one of them is everything.
    pub(super) source_ranges: Vec<Cidr>,
    /// All of them, in any condition, sorted by the string `ip:port` as kube-proxy's
    /// `endpointsMapFromEndpointInfo` sorts them: `10.0.0.10:80` comes before `10.0.0.2:80`.
    pub(super) endpoints: Vec<EndpointText<'a>>,
    /// Is there an endpoint that can be used on any node?
    pub(super) has_endpoints: bool,
    cluster_count: usize,
    local_count: usize,
}

/// One endpoint, as written in rules, and who may use it.
pub(super) struct EndpointText<'a> {
    endpoint: &'a Endpoint,
    /// `ip:port`, or `[ip]:port`.
    socket: String,
    /// Does it run on this node?
    pub(super) local: bool,
    in_cluster_set: bool,
    in_local_set: bool,
}

impl EndpointText<'_> {
    /// `ip:port`, or `[ip]:port`.
    pub(super) fn socket(&self) -> &str {
        &self.socket
    }

    /// The address alone.
    pub(super) fn address(&self) -> &str {
        let address = self
            .socket
            .rsplit_once(':')
            .map_or("", |(address, _)| address);
        address.trim_start_matches('[').trim_end_matches(']')
    }

    /// The port alone.
    pub(super) fn port(&self) -> &str {
        self.socket.rsplit_once(':').map_or("", |(_, port)| port)
    }

    /// May traffic under this policy use it?
    pub(super) fn is_for(&self, policy: TrafficPolicy) -> bool {
        match policy {
            TrafficPolicy::Cluster => self.in_cluster_set,
            TrafficPolicy::Local => self.in_local_set,
        }
    }
}

impl<'a> Ports<'a> {
    /// The `ServicePort`s of `family` in the cluster's order (kube-proxy's own is the random
    /// order of a Go map), as `node` sees them.
    pub(super) fn new(cluster: &'a Cluster, node: &NodeView, family: Family) -> Self {
        let mut list = Vec::with_capacity(cluster.services.len());
        for service in &cluster.services {
            let Some(cluster_ip) = service.cluster_ips.iter().find(|ip| family.holds(**ip)) else {
                continue;
            };
            for port in &service.ports {
                list.push(PortView::new(service, port, *cluster_ip, node, family));
            }
        }
        let endpoints: usize = list.iter().map(|port| port.endpoints.len()).sum();
        Self {
            list,
            large: endpoints > LARGE_CLUSTER_ENDPOINTS,
        }
    }
}

impl<'a> PortView<'a> {
    fn new(
        service: &'a Service,
        port: &'a ServicePort,
        cluster_ip: IpAddr,
        node: &NodeView,
        family: Family,
    ) -> Self {
        let of_family = |ips: &[IpAddr]| -> Vec<IpAddr> {
            ips.iter().copied().filter(|ip| family.holds(*ip)).collect()
        };
        let mut source_ranges: Vec<Cidr> = service
            .source_ranges
            .iter()
            .filter(|range| range.family() == family)
            .map(|range| range.network())
            .collect();
        if source_ranges.iter().any(|range| range.prefix == 0) {
            source_ranges.clear();
        }
        let mut view = Self {
            service,
            port,
            id: service.port_name(port),
            cluster_ip: cluster_ip.to_string(),
            external_ips: of_family(&service.external_ips),
            load_balancer_ips: of_family(&service.load_balancer_ips),
            source_ranges,
            endpoints: endpoint_texts(port, node, family),
            has_endpoints: false,
            cluster_count: 0,
            local_count: 0,
        };
        view.categorize(node);
        view
    }

    pub(super) fn protocol(&self) -> Protocol {
        self.port.protocol
    }

    /// Is the traffic to the ClusterIP for local endpoints only?
    pub(super) fn is_internal_local(&self) -> bool {
        self.service.internal_policy == TrafficPolicy::Local
    }

    /// Is the traffic to everything else for local endpoints only?
    pub(super) fn is_external_local(&self) -> bool {
        self.service.external_policy == TrafficPolicy::Local
    }

    /// Can it be reached by anything but its ClusterIP?
    pub(super) fn is_externally_accessible(&self) -> bool {
        self.port.node_port.is_some()
            || !self.load_balancer_ips.is_empty()
            || !self.external_ips.is_empty()
    }

    /// Are there endpoints for traffic to the ClusterIP?
    pub(super) fn has_internal_endpoints(&self) -> bool {
        self.has_endpoints && !(self.is_internal_local() && self.local_count == 0)
    }

    /// Are there endpoints for the other traffic?
    pub(super) fn has_external_endpoints(&self) -> bool {
        self.has_endpoints && !(self.is_external_local() && self.local_count == 0)
    }

    /// Do source ranges restrict who may use the load balancer's VIPs?
    pub(super) fn is_firewalled(&self) -> bool {
        !self.load_balancer_ips.is_empty() && !self.source_ranges.is_empty()
    }

    /// Does one of the source ranges hold this address?
    pub(super) fn is_source(&self, address: IpAddr) -> bool {
        self.source_ranges
            .iter()
            .any(|range| range.contains(address))
    }

    /// How many endpoints traffic under the Cluster policy may use.
    pub(super) fn cluster_count(&self) -> usize {
        self.cluster_count
    }

    /// How many endpoints traffic under the Local policy may use.
    pub(super) fn local_count(&self) -> usize {
        self.local_count
    }

    /// The endpoints that traffic under the Cluster policy may use.
    pub(super) fn cluster_endpoints(&self) -> impl Iterator<Item = &EndpointText<'a>> {
        self.endpoints
            .iter()
            .filter(|endpoint| endpoint.in_cluster_set)
    }

    /// The endpoints that traffic under the Local policy may use.
    pub(super) fn local_endpoints(&self) -> impl Iterator<Item = &EndpointText<'a>> {
        self.endpoints
            .iter()
            .filter(|endpoint| endpoint.in_local_set)
    }

    /// Both.
    pub(super) fn reachable_endpoints(&self) -> impl Iterator<Item = &EndpointText<'a>> {
        self.endpoints
            .iter()
            .filter(|endpoint| endpoint.in_cluster_set || endpoint.in_local_set)
    }

    /// Would kube-proxy see no change from `other` to this?
    pub(super) fn is_same(&self, other: &Self) -> bool {
        fn endpoints<'a>(view: &PortView<'a>) -> impl Iterator<Item = &'a Endpoint> {
            view.endpoints.iter().map(|endpoint| endpoint.endpoint)
        }
        let of_service = |view: &Self| {
            let service = view.service;
            (
                service.internal_policy,
                service.external_policy,
                service.affinity,
                service.health_check_node_port,
            )
        };
        self.id == other.id
            && self.cluster_ip == other.cluster_ip
            && self.external_ips == other.external_ips
            && self.load_balancer_ips == other.load_balancer_ips
            && self.source_ranges == other.source_ranges
            && (self.port.protocol, self.port.port, self.port.node_port)
                == (other.port.protocol, other.port.port, other.port.node_port)
            && of_service(self) == of_service(other)
            && endpoints(self).eq(endpoints(other))
    }

    /// `CategorizeEndpoints`: marks the endpoints of the two sets.
    fn categorize(&mut self, node: &NodeView) {
        let uses_cluster = !self.is_internal_local() || self.is_externally_accessible();
        let uses_local = self.is_internal_local()
            || (self.is_external_local() && self.is_externally_accessible());
        if uses_cluster {
            let topology = Topology::of_hints(&self.endpoints, node);
            for endpoint in &mut self.endpoints {
                endpoint.in_cluster_set =
                    endpoint.is(Condition::Ready) && topology.allows(endpoint.endpoint);
            }
            if self.cluster_endpoints().next().is_none() {
                for endpoint in &mut self.endpoints {
                    endpoint.in_cluster_set = endpoint.is(Condition::Draining);
                }
            }
            self.cluster_count = self.cluster_endpoints().count();
            self.has_endpoints = self.cluster_count > 0;
        }
        if uses_local {
            self.has_endpoints |= self
                .endpoints
                .iter()
                .any(|endpoint| !endpoint.is(Condition::NotReady));
            for condition in [Condition::Ready, Condition::Draining] {
                for endpoint in &mut self.endpoints {
                    endpoint.in_local_set = endpoint.local && endpoint.is(condition);
                }
                self.local_count = self.local_endpoints().count();
                if self.local_count > 0 {
                    break;
                }
            }
        }
    }
}

impl EndpointText<'_> {
    fn is(&self, condition: Condition) -> bool {
        self.endpoint.condition == condition
    }
}

fn endpoint_texts<'a>(
    port: &'a ServicePort,
    node: &NodeView,
    family: Family,
) -> Vec<EndpointText<'a>> {
    let mut endpoints: Vec<EndpointText<'a>> = port
        .endpoints
        .iter()
        .filter(|endpoint| family.holds(endpoint.address))
        .map(|endpoint| {
            let mut socket = String::with_capacity(family.socket_capacity());
            // Writing into a String cannot fail.
            let _ = match family {
                Family::V4 => write!(socket, "{}:{}", endpoint.address, endpoint.port),
                Family::V6 => write!(socket, "[{}]:{}", endpoint.address, endpoint.port),
            };
            EndpointText {
                endpoint,
                socket,
                local: !node.name.is_empty() && endpoint.node == node.name,
                in_cluster_set: false,
                in_local_set: false,
            }
        })
        .collect();
    endpoints.sort_unstable_by(|a, b| {
        // Of an endpoint that is there twice, a local one stays.
        (a.socket.as_str(), b.local).cmp(&(b.socket.as_str(), a.local))
    });
    endpoints.dedup_by(|a, b| a.socket == b.socket);
    endpoints
}

/// Which hints restrict the ready endpoints: `topologyModeFromHints`.
enum Topology<'n> {
    /// None.
    Everywhere,
    /// `PreferSameNode`.
    Node(&'n str),
    /// `PreferSameZone`.
    Zone(&'n str),
}

impl<'n> Topology<'n> {
    /// Hints count if every ready endpoint has them and one has this node's, or this zone's.
    fn of_hints(endpoints: &[EndpointText<'_>], node: &'n NodeView) -> Self {
        let hinted = |hints: fn(&Endpoint) -> &[String], here: &str| {
            let mut ready = endpoints
                .iter()
                .filter(|endpoint| endpoint.is(Condition::Ready))
                .map(|endpoint| hints(endpoint.endpoint));
            let mut one_is_for_here = false;
            ready.all(|hints| {
                one_is_for_here |= hints.iter().any(|hint| hint == here);
                !hints.is_empty()
            }) && one_is_for_here
        };
        if hinted(|endpoint| &endpoint.nodes, &node.name) {
            return Self::Node(&node.name);
        }
        match node.zone.as_deref() {
            Some(zone) if hinted(|endpoint| &endpoint.zones, zone) => Self::Zone(zone),
            _ => Self::Everywhere,
        }
    }

    fn allows(&self, endpoint: &Endpoint) -> bool {
        let has = |hints: &[String], here: &str| hints.iter().any(|hint| hint == here);
        match self {
            Self::Everywhere => true,
            Self::Node(node) => has(&endpoint.nodes, node),
            Self::Zone(zone) => has(&endpoint.zones, zone),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: &str = "here";

    fn node() -> NodeView {
        NodeView {
            name: NODE.to_owned(),
            zone: Some("z1".to_owned()),
            ..NodeView::default()
        }
    }

    fn endpoint(last: u8, node: &str, condition: Condition) -> Endpoint {
        Endpoint {
            condition,
            ..Endpoint::ready([10, 0, 0, last].into(), 80, node)
        }
    }

    fn service(endpoints: Vec<Endpoint>) -> Service {
        Service {
            namespace: "ns".to_owned(),
            name: "web".to_owned(),
            cluster_ips: vec![[10, 96, 0, 1].into()],
            ports: vec![ServicePort {
                name: String::new(),
                protocol: Protocol::Tcp,
                port: 80,
                node_port: Some(30_080),
                endpoints,
            }],
            ..Service::default()
        }
    }

    /// The last octets of the endpoints of the cluster set and of the local set, and whether there
    /// are any.
    fn sets(service: Service) -> (Vec<u8>, Vec<u8>, bool) {
        let cluster = Cluster {
            services: vec![service],
            ..Cluster::default()
        };
        let ports = Ports::new(&cluster, &node(), Family::V4);
        let [port] = ports.list.as_slice() else {
            panic!("one port");
        };
        let last = |endpoint: &EndpointText<'_>| {
            let address = endpoint.address().rsplit('.').next();
            address.and_then(|octet| octet.parse().ok()).expect("octet")
        };
        (
            port.cluster_endpoints().map(last).collect(),
            port.local_endpoints().map(last).collect(),
            port.has_endpoints,
        )
    }

    fn with_policies(internal: TrafficPolicy, external: TrafficPolicy, s: Service) -> Service {
        Service {
            internal_policy: internal,
            external_policy: external,
            ..s
        }
    }

    #[test]
    fn endpoints_are_sorted_as_strings() {
        use Condition::{NotReady, Ready};
        let endpoints = vec![
            endpoint(2, "there", Ready),
            endpoint(10, NODE, Ready),
            endpoint(3, "there", NotReady),
            endpoint(2, NODE, Ready),
        ];
        assert_eq!(sets(service(endpoints)), (vec![10, 2], vec![], true));
    }

    #[test]
    fn draining_endpoints_serve_if_no_other_does() {
        use Condition::{Draining, NotReady, Ready};
        use TrafficPolicy::{Cluster, Local};
        let endpoints = vec![
            endpoint(1, NODE, Draining),
            endpoint(2, "there", Ready),
            endpoint(3, NODE, NotReady),
        ];
        let both = with_policies(Cluster, Local, service(endpoints.clone()));
        assert_eq!(sets(both), (vec![2], vec![1], true));
        let draining = vec![endpoint(1, "there", Draining), endpoint(3, NODE, NotReady)];
        let local = with_policies(Cluster, Local, service(draining));
        assert_eq!(sets(local), (vec![1], vec![], true));
        let none = vec![endpoint(3, NODE, NotReady)];
        let local = with_policies(Local, Local, service(none));
        assert_eq!(sets(local), (vec![], vec![], false));
    }

    #[test]
    fn only_what_policies_use_is_there() {
        use TrafficPolicy::{Cluster, Local};
        let endpoints = vec![
            endpoint(1, NODE, Condition::Ready),
            endpoint(2, "there", Condition::Ready),
        ];
        let mut internal = with_policies(Local, Cluster, service(endpoints.clone()));
        internal.ports[0].node_port = None;
        assert_eq!(sets(internal), (vec![], vec![1], true));
        let mut elsewhere = with_policies(Local, Cluster, service(endpoints[1..].to_vec()));
        elsewhere.ports[0].node_port = None;
        assert_eq!(sets(elsewhere), (vec![], vec![], true));
        let mut only_internal = with_policies(Cluster, Local, service(endpoints));
        only_internal.ports[0].node_port = None;
        assert_eq!(sets(only_internal), (vec![1, 2], vec![], true));
    }

    #[test]
    fn hints_count_if_all_ready_endpoints_have_them() {
        let hinted = |last, zones: &[&str], nodes: &[&str]| Endpoint {
            zones: zones.iter().map(ToString::to_string).collect(),
            nodes: nodes.iter().map(ToString::to_string).collect(),
            ..endpoint(last, "there", Condition::Ready)
        };
        let draining = endpoint(9, NODE, Condition::Draining);
        let cluster_set = |endpoints: Vec<Endpoint>| sets(service(endpoints)).0;
        let zones = vec![
            hinted(1, &["z1", "z2"], &[]),
            hinted(2, &["z2"], &[]),
            draining,
        ];
        assert_eq!(cluster_set(zones.clone()), [1]);
        let mut partly = zones.clone();
        partly.push(hinted(3, &[], &[]));
        assert_eq!(cluster_set(partly), [1, 2, 3]);
        assert_eq!(cluster_set(vec![hinted(2, &["z2"], &[])]), [2]);
        let nodes = vec![hinted(1, &["z1"], &["there"]), hinted(2, &["z2"], &[NODE])];
        assert_eq!(cluster_set(nodes), [2]);
        let other_node = vec![
            hinted(1, &["z1"], &["there"]),
            hinted(2, &["z2"], &["there"]),
        ];
        assert_eq!(cluster_set(other_node), [1]);
    }

    #[test]
    fn a_range_of_everything_is_none() {
        let mut service = service(Vec::new());
        service.load_balancer_ips = vec![[192, 0, 2, 1].into()];
        service.source_ranges = vec![Cidr::v4(10, 0, 0, 0, 8), Cidr::v4(1, 2, 3, 4, 0)];
        let mut cluster = Cluster {
            services: vec![service],
            ..Cluster::default()
        };
        let is_firewalled =
            |cluster: &Cluster| Ports::new(cluster, &node(), Family::V4).list[0].is_firewalled();
        assert!(!is_firewalled(&cluster));
        cluster.services[0].source_ranges.pop();
        assert!(is_firewalled(&cluster));
        cluster.services[0].source_ranges = vec![Cidr::v6([0; 4], [0; 4], 64)];
        assert!(!is_firewalled(&cluster));
    }
}
