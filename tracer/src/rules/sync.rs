//! What a partial sync has to look at.

use std::collections::{HashMap, HashSet};

use super::ports::{PortView, Ports};

/// The Services of one family that differ between two states of a cluster.
///
/// kube-proxy tracks changes by Service: if one port or one endpoint differs, all the Service's
/// ports are written again (`UpdatedServices` of `pkg/proxy/servicechangetracker.go` and
/// `endpointschangetracker.go`).
pub(super) struct Changes<'a> {
    changed: HashSet<(&'a str, &'a str)>,
}

impl<'a> Changes<'a> {
    pub(super) fn between(old: &'a Ports<'_>, new: &'a Ports<'_>) -> Self {
        let before = by_service(old);
        let after = by_service(new);
        let mut changed = HashSet::new();
        for (service, ports) in &after {
            let is_same = before.get(service).is_some_and(|before| {
                before.len() == ports.len()
                    && before.iter().zip(ports).all(|(old, new)| new.is_same(old))
            });
            if !is_same {
                changed.insert(*service);
            }
        }
        changed.extend(
            before
                .keys()
                .filter(|service| !after.contains_key(*service)),
        );
        Self { changed }
    }

    /// Does this `ServicePort` belong to a Service that differs?
    pub(super) fn is_changed(&self, port: &PortView<'_>) -> bool {
        let service = port.service;
        self.changed
            .contains(&(service.namespace.as_str(), service.name.as_str()))
    }
}

fn by_service<'a>(ports: &'a Ports<'_>) -> HashMap<(&'a str, &'a str), Vec<&'a PortView<'a>>> {
    let mut services: HashMap<_, Vec<_>> = HashMap::with_capacity(ports.list.len());
    for port in &ports.list {
        let service = (port.service.namespace.as_str(), port.service.name.as_str());
        services.entry(service).or_default().push(port);
    }
    services
}

#[cfg(test)]
mod tests;
