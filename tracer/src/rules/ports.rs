//! A cluster as one proxier of kube-proxy sees it: the `ServicePort`s of one IP family.

use std::fmt::Write as _;

use crate::cluster::{Cluster, Family, Protocol, Service, ServicePort};

/// More endpoints than this (over all `ServicePort`s of a family) make kube-proxy leave out the
/// comments of endpoint rules: `largeClusterEndpointsThreshold` in
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
    /// Sorted by the string `ip:port`, as kube-proxy's
    /// `EndpointSliceCache.endpointInfoByServicePort` sorts them: `10.0.0.10:80` comes before
    /// `10.0.0.2:80`.
    pub(super) endpoints: Vec<EndpointText>,
}

impl PortView<'_> {
    pub(super) fn protocol(&self) -> Protocol {
        self.port.protocol
    }
}

/// One endpoint, as written in rules.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EndpointText {
    /// `ip:port`, or `[ip]:port`.
    socket: String,
    /// Does it run on this node?
    pub(super) local: bool,
}

impl EndpointText {
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
}

impl<'a> Ports<'a> {
    /// The `ServicePort`s of `family` in the cluster's order (kube-proxy's own is the random
    /// order of a Go map), with the endpoints that `node` calls local marked.
    pub(super) fn new(cluster: &'a Cluster, node: &str, family: Family) -> Self {
        let mut list = Vec::with_capacity(cluster.services.len());
        let mut endpoint_count = 0;
        for service in &cluster.services {
            let Some(cluster_ip) = service.cluster_ips.iter().find(|ip| family.holds(**ip)) else {
                continue;
            };
            let cluster_ip = cluster_ip.to_string();
            for port in &service.ports {
                let mut endpoints: Vec<EndpointText> = port
                    .endpoints
                    .iter()
                    .filter(|endpoint| family.holds(endpoint.address))
                    .map(|endpoint| {
                        let mut socket = String::with_capacity(family.socket_capacity());
                        // Writing into a String cannot fail.
                        let _ = match family {
                            Family::V4 => {
                                write!(socket, "{}:{}", endpoint.address, endpoint.port)
                            }
                            Family::V6 => {
                                write!(socket, "[{}]:{}", endpoint.address, endpoint.port)
                            }
                        };
                        EndpointText {
                            socket,
                            local: endpoint.node == node,
                        }
                    })
                    .collect();
                endpoints.sort_unstable();
                endpoints.dedup_by(|a, b| a.socket == b.socket);
                endpoint_count += endpoints.len();
                list.push(PortView {
                    service,
                    port,
                    id: service.port_name(port),
                    cluster_ip: cluster_ip.clone(),
                    endpoints,
                });
            }
        }
        Self {
            list,
            large: endpoint_count > LARGE_CLUSTER_ENDPOINTS,
        }
    }
}
