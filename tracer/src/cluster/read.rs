//! A cluster from what `kubectl get services,endpointslices,nodes,servicecidrs -A -o json` prints.
//!
//! What kube-proxy skips is skipped here, with a [`Warning`] where kube-proxy logs one, and where
//! two Services claim one address and port, of which it logs nothing; what it would pass on, and
//! the kernel's tools would refuse, is a [`ReadError`]. Sources: `pkg/proxy/` of Kubernetes v1.36
//! (`endpointslicecache.go`, `endpointschangetracker.go`, `serviceport.go`,
//! `servicechangetracker.go`, `util/utils.go`) and the label selector of its informers
//! (`cmd/kube-proxy/app/server.go`).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::path::Path;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    Cidr, Claim, Cluster, Condition, Conflict, Endpoint, Family, Node, Protocol, Service,
    ServicePort, TrafficPolicy, parse_address,
};

/// How much is looked at before the rest is held, which may be a gigabyte of anything, bytes.
const HEAD: u64 = 4096;
/// What to run to get a file that can be read.
const COMMAND: &str = "kubectl get services,endpointslices,nodes,servicecidrs -A -o json";
/// The label that ties an `EndpointSlice` to its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// kube-proxy does not watch objects with one of these labels, whatever its value.
const NOT_WATCHED: [&str; 2] = [
    "service.kubernetes.io/headless",
    "service.kubernetes.io/service-proxy-name",
];
const ZONE: &str = "topology.kubernetes.io/zone";
/// The API server's default of `sessionAffinityConfig.clientIP.timeoutSeconds`.
const AFFINITY_SECONDS: i64 = 10_800;
/// How many claimants of one address a warning names.
const MOST_NAMES: usize = 3;

/// A cluster, and what was left out of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Read {
    /// The cluster.
    pub cluster: Cluster,
    /// What was skipped, in the order of the file, and what several Services claim.
    pub warnings: Vec<Warning>,
}

/// Something that was skipped, as kube-proxy skips it, or that it leaves to chance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// `Service`, `EndpointSlice`, `Node`, `ServiceCIDR` or `List`.
    pub kind: &'static str,
    /// `ns/name`, or the file for a List.
    pub object: String,
    /// Such as `spec.externalIPs[0]`.
    pub field: String,
    /// What is wrong with it.
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {}: {}: {}",
            self.kind, self.object, self.field, self.message
        )
    }
}

/// Why there is no cluster.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be read.
    #[error("cannot read {file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is no JSON, or it ends too early.
    #[error("{file}:{line}:{column}: {reason}; write the file with '{COMMAND}'")]
    Json {
        /// The file.
        file: String,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong.
        reason: String,
    },
    /// The file holds no Services.
    #[error("{file} holds {found} and no Service; write it with '{COMMAND}'")]
    NoServices {
        /// The file.
        file: String,
        /// The kinds that it holds.
        found: String,
    },
    /// An object that no API server would have let in.
    #[error("{file}: {object}: {field}: {reason}")]
    Field {
        /// The file.
        file: String,
        /// Kind and `ns/name`.
        object: String,
        /// Such as `spec.ports[0].port`.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Reads the cluster in a file.
pub fn read_file(path: &Path) -> Result<Read, ReadError> {
    let name = path.display().to_string();
    let file = File::open(path).map_err(|source| ReadError::Io {
        file: name.clone(),
        source,
    })?;
    read(file, &name)
}

/// Reads a cluster; `name` stands for the file in messages.
pub fn read(reader: impl io::Read, name: &str) -> Result<Read, ReadError> {
    let text = text_of(reader, name)?;
    let list: List<'_> = serde_json::from_slice(&text).map_err(|e| json_error(name, &e))?;
    Reader {
        file: name,
        text: &text,
        result: Read::default(),
    }
    .read(&list)
}

/// The whole text, or an early error if it cannot be a JSON object.
fn text_of(mut reader: impl io::Read, name: &str) -> Result<Vec<u8>, ReadError> {
    let io_error = |source| ReadError::Io {
        file: name.to_owned(),
        source,
    };
    let mut text = Vec::new();
    let head = reader.by_ref().take(HEAD);
    { head }.read_to_end(&mut text).map_err(io_error)?;
    let begins = text.iter().find(|byte| !byte.is_ascii_whitespace());
    if begins.is_some_and(|byte| *byte != b'{') {
        return Err(ReadError::Json {
            file: name.to_owned(),
            line: 1,
            column: 1,
            reason: "no JSON object".to_owned(),
        });
    }
    reader.read_to_end(&mut text).map_err(io_error)?;
    Ok(text)
}

fn json_error(file: &str, error: &serde_json::Error) -> ReadError {
    ReadError::Json {
        file: file.to_owned(),
        line: error.line(),
        column: error.column(),
        reason: reason_of(error),
    }
}

/// serde's message without the position, which it appends.
fn reason_of(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let end = text.rfind(" at line ").unwrap_or(text.len());
    text[..end].to_owned()
}

#[derive(Deserialize)]
struct List<'a> {
    #[serde(default)]
    kind: Option<String>,
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

/// What every object has.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Head {
    kind: Option<String>,
    metadata: Option<Metadata>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    labels: Option<HashMap<String, String>>,
}

impl Metadata {
    fn label(&self, name: &str) -> Option<&str> {
        Some(self.labels.as_ref()?.get(name)?.as_str())
    }

    fn is_watched(&self) -> bool {
        NOT_WATCHED.iter().all(|label| self.label(label).is_none())
    }
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawService {
    spec: Option<RawServiceSpec>,
    status: Option<RawServiceStatus>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawServiceSpec {
    r#type: Option<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    ip_families: Option<Vec<String>>,
    #[serde(rename = "externalIPs")]
    external_ips: Option<Vec<String>>,
    load_balancer_source_ranges: Option<Vec<String>>,
    internal_traffic_policy: Option<String>,
    external_traffic_policy: Option<String>,
    session_affinity: Option<String>,
    session_affinity_config: Option<RawAffinity>,
    health_check_node_port: Option<i64>,
    ports: Option<Vec<RawServicePort>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawAffinity {
    #[serde(rename = "clientIP")]
    client_ip: Option<RawClientIp>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawClientIp {
    timeout_seconds: Option<i64>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawServicePort {
    name: Option<String>,
    protocol: Option<String>,
    port: Option<i64>,
    node_port: Option<i64>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawServiceStatus {
    load_balancer: Option<RawLoadBalancer>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawLoadBalancer {
    ingress: Option<Vec<RawIngress>>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawIngress {
    ip: Option<String>,
    ip_mode: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawSlice {
    address_type: Option<String>,
    endpoints: Option<Vec<RawEndpoint>>,
    ports: Option<Vec<RawEndpointPort>>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawEndpoint {
    addresses: Option<Vec<String>>,
    conditions: Option<RawConditions>,
    node_name: Option<String>,
    hints: Option<RawHints>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawConditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawHints {
    for_zones: Option<Vec<RawHint>>,
    for_nodes: Option<Vec<RawHint>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawHint {
    name: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawEndpointPort {
    name: Option<String>,
    protocol: Option<String>,
    port: Option<i64>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawNode {
    spec: Option<RawNodeSpec>,
    status: Option<RawNodeStatus>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawNodeSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawNodeStatus {
    addresses: Option<Vec<RawNodeAddress>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawNodeAddress {
    address: Option<String>,
    r#type: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawServiceCidr {
    spec: Option<RawServiceCidrSpec>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawServiceCidrSpec {
    cidrs: Option<Vec<String>>,
}

/// One object of the list, not yet looked into.
struct Object<'a> {
    kind: &'static str,
    metadata: Metadata,
    raw: &'a RawValue,
}

impl Object<'_> {
    fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or_default()
    }

    /// `ns/name`, or the name alone.
    fn path(&self) -> String {
        match self.namespace() {
            "" => self.name().to_owned(),
            namespace => format!("{namespace}/{}", self.name()),
        }
    }
}

/// The kinds that are read.
const KINDS: [&str; 4] = ["Service", "EndpointSlice", "Node", "ServiceCIDR"];

struct Reader<'a> {
    file: &'a str,
    text: &'a [u8],
    result: Read,
}

/// What slices say of the endpoints of a `ServicePort`, and whether each is terminating.
type Endpoints = Vec<(Endpoint, bool)>;

impl<'a> Reader<'a> {
    fn read(mut self, list: &List<'a>) -> Result<Read, ReadError> {
        let kind = list.kind.as_deref().unwrap_or_default();
        let Some(items) = &list.items else {
            return Err(ReadError::NoServices {
                file: self.file.to_owned(),
                found: match kind {
                    "" => "no list of objects".to_owned(),
                    kind => format!("one object, a {kind},"),
                },
            });
        };
        let objects = self.objects(items, kind.strip_suffix("List").unwrap_or_default())?;

        for object in objects.iter().filter(|o| o.kind != "EndpointSlice") {
            match object.kind {
                "Service" => self.service(object)?,
                "Node" => self.node(object)?,
                _ => self.service_cidr(object)?,
            }
        }
        self.keep_last_of_each_service();
        self.conflicts();
        self.slices(&objects)?;
        Ok(self.result)
    }

    /// The objects of the kinds that matter; an error if there is none.
    fn objects(&self, items: &[&'a RawValue], default: &str) -> Result<Vec<Object<'a>>, ReadError> {
        let mut others: BTreeMap<String, usize> = BTreeMap::new();
        let mut objects = Vec::with_capacity(items.len());
        for (index, raw) in items.iter().copied().enumerate() {
            let head: Head = self.parse(raw, || format!("items[{index}]"))?;
            let kind = head.kind.as_deref().unwrap_or(default);
            match KINDS.iter().find(|known| **known == kind) {
                Some(kind) => objects.push(Object {
                    kind,
                    metadata: head.metadata.unwrap_or_default(),
                    raw,
                }),
                None => *others.entry(kind.to_owned()).or_default() += 1,
            }
        }
        for object in &objects {
            if object.kind == "Service" {
                return Ok(objects);
            }
            *others.entry(object.kind.to_owned()).or_default() += 1;
        }
        // Every cluster has one, so an empty list is no cluster's either; but it claims nothing else.
        if !others.is_empty() {
            let found: Vec<String> = others
                .iter()
                .take(5)
                .map(|(kind, count)| match kind.as_str() {
                    "" => format!("{count} objects without a kind"),
                    kind => format!("{count} {kind}"),
                })
                .collect();
            return Err(ReadError::NoServices {
                file: self.file.to_owned(),
                found: found.join(", "),
            });
        }
        Ok(objects)
    }

    /// Reads one object, and says where in the file it is wrong if it is.
    fn parse<T: Deserialize<'a>>(
        &self,
        raw: &'a RawValue,
        object: impl Fn() -> String,
    ) -> Result<T, ReadError> {
        serde_json::from_str(raw.get()).map_err(|error| {
            // serde counts from the beginning of the object.
            let start = raw.get().as_ptr().addr() - self.text.as_ptr().addr();
            let before = self.text.get(..start).unwrap_or_default();
            let lines_before = before.split(|byte| *byte == b'\n').count() - 1;
            let line = lines_before + error.line();
            ReadError::Field {
                file: format!("{}:{line}", self.file),
                object: object(),
                field: field_at(raw.get(), error.line(), error.column()),
                reason: reason_of(&error),
            }
        })
    }

    fn wrong(&self, object: &Object<'_>, field: impl Into<String>, reason: String) -> ReadError {
        ReadError::Field {
            file: self.file.to_owned(),
            object: format!("{} {}", object.kind, object.path()),
            field: field.into(),
            reason,
        }
    }

    fn warn(&mut self, object: &Object<'_>, field: impl Into<String>, message: impl Into<String>) {
        self.result.warnings.push(Warning {
            kind: object.kind,
            object: object.path(),
            field: field.into(),
            message: message.into(),
        });
    }

    /// Names become part of rules, so that what no API server lets in must not get any further.
    fn check_name(
        &self,
        object: &Object<'_>,
        field: &str,
        name: &str,
        may_be_empty: bool,
    ) -> Result<(), ReadError> {
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
        if name.is_empty() && !may_be_empty {
            return Err(self.wrong(object, field, "is missing".to_owned()));
        }
        if name.len() > 253 || !name.bytes().all(is_name) {
            return Err(self.wrong(object, field, format!("{name:?} is no name")));
        }
        Ok(())
    }

    fn port(
        &self,
        object: &Object<'_>,
        field: impl Fn() -> String,
        port: i64,
    ) -> Result<u16, ReadError> {
        u16::try_from(port)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| self.wrong(object, field(), format!("{port} is no port (1-65535)")))
    }

    fn protocol(
        &self,
        object: &Object<'_>,
        field: impl Fn() -> String,
        protocol: Option<&str>,
    ) -> Result<Protocol, ReadError> {
        match protocol {
            // The API server's default.
            None | Some("TCP") => Ok(Protocol::Tcp),
            Some("UDP") => Ok(Protocol::Udp),
            Some("SCTP") => Ok(Protocol::Sctp),
            Some(other) => Err(self.wrong(
                object,
                field(),
                format!("{other:?} is no protocol (TCP, UDP, SCTP)"),
            )),
        }
    }

    fn service(&mut self, object: &Object<'a>) -> Result<(), ReadError> {
        self.check_name(object, "metadata.name", object.name(), false)?;
        self.check_name(object, "metadata.namespace", object.namespace(), false)?;
        let raw: RawService = self.parse(object.raw, || format!("Service {}", object.path()))?;
        let spec = raw.spec.unwrap_or_default();
        let kind = spec.r#type.as_deref().unwrap_or("ClusterIP");
        let cluster_ip = spec.cluster_ip.as_deref().unwrap_or_default();
        if !object.metadata.is_watched()
            || matches!(cluster_ip, "" | "None")
            || kind == "ExternalName"
        {
            return Ok(());
        }

        self.check_words(object, &spec)?;
        let cluster_ips = self.cluster_ips(object, &spec)?;
        let external_ips = self.addresses(object, "spec.externalIPs", spec.external_ips.as_deref());
        let is_accessible = matches!(kind, "LoadBalancer" | "NodePort")
            || (kind == "ClusterIP"
                && spec
                    .external_ips
                    .as_ref()
                    .is_some_and(|ips| !ips.is_empty()));
        let external_policy = match spec.external_traffic_policy.as_deref() {
            Some("Local") if is_accessible => TrafficPolicy::Local,
            _ => TrafficPolicy::Cluster,
        };
        let internal_policy = match spec.internal_traffic_policy.as_deref() {
            Some("Local") => TrafficPolicy::Local,
            _ => TrafficPolicy::Cluster,
        };
        let mut service = Service {
            namespace: object.namespace().to_owned(),
            name: object.name().to_owned(),
            cluster_ips,
            external_ips,
            load_balancer_ips: self.load_balancer_ips(object, raw.status)?,
            source_ranges: self.networks(
                object,
                "spec.loadBalancerSourceRanges",
                spec.load_balancer_source_ranges.as_deref(),
            ),
            internal_policy,
            external_policy,
            affinity: self.affinity(object, &spec)?,
            health_check_node_port: None,
            ports: self.service_ports(object, spec.ports.unwrap_or_default())?,
        };
        if kind == "LoadBalancer" && external_policy == TrafficPolicy::Local {
            service.health_check_node_port = match spec.health_check_node_port.unwrap_or(0) {
                0 => {
                    self.warn(object, "spec.healthCheckNodePort", "is missing");
                    None
                }
                port => Some(self.port(object, || "spec.healthCheckNodePort".to_owned(), port)?),
            };
        }
        self.result.cluster.services.push(service);
        Ok(())
    }

    /// Are the words ones that the API server knows? Taken for defaults, others would go unnoticed.
    fn check_words(&self, object: &Object<'_>, spec: &RawServiceSpec) -> Result<(), ReadError> {
        let policies: &[&str] = &["", "Cluster", "Local"];
        let types: &[&str] = &["ClusterIP", "NodePort", "LoadBalancer"];
        for (field, word, known) in [
            ("spec.type", &spec.r#type, types),
            (
                "spec.externalTrafficPolicy",
                &spec.external_traffic_policy,
                policies,
            ),
            (
                "spec.internalTrafficPolicy",
                &spec.internal_traffic_policy,
                policies,
            ),
            (
                "spec.sessionAffinity",
                &spec.session_affinity,
                &["", "None", "ClientIP"],
            ),
        ] {
            if let Some(word) = word
                && !known.contains(&word.as_str())
            {
                let known: Vec<&str> = known.iter().copied().filter(|w| !w.is_empty()).collect();
                let reason = format!("{word:?} is none of {}", known.join(", "));
                return Err(self.wrong(object, field, reason));
            }
        }
        Ok(())
    }

    /// `GetClusterIPByFamily`: by `ipFamilies`, or `clusterIP` alone if there are none.
    fn cluster_ips(
        &self,
        object: &Object<'_>,
        spec: &RawServiceSpec,
    ) -> Result<Vec<IpAddr>, ReadError> {
        let address = |field: String, text: &str| {
            parse_address(text)
                .ok_or_else(|| self.wrong(object, field, format!("{text:?} is no address")))
        };
        let families = spec.ip_families.as_deref().unwrap_or_default();
        if families.is_empty() {
            let text = spec.cluster_ip.as_deref().unwrap_or_default();
            return Ok(vec![address("spec.clusterIP".to_owned(), text)?]);
        }
        let texts = spec.cluster_ips.as_deref().unwrap_or_default();
        let mut ips: Vec<IpAddr> = Vec::with_capacity(texts.len());
        for (index, (text, family)) in texts.iter().zip(families).enumerate() {
            let field = format!("spec.clusterIPs[{index}]");
            let ip = address(field.clone(), text)?;
            if Family::of(ip).to_string() != *family {
                return Err(self.wrong(
                    object,
                    field,
                    format!("{text} is not of the family {family} of spec.ipFamilies[{index}]"),
                ));
            }
            if ips.iter().all(|other| Family::of(*other) != Family::of(ip)) {
                ips.push(ip);
            }
        }
        Ok(ips)
    }

    /// The valid ones of a list of addresses.
    fn addresses(
        &mut self,
        object: &Object<'_>,
        field: &str,
        texts: Option<&[String]>,
    ) -> Vec<IpAddr> {
        let mut addresses = Vec::new();
        for (index, text) in texts.unwrap_or_default().iter().enumerate() {
            match parse_address(text) {
                Some(address) => addresses.push(address),
                None => self.warn(
                    object,
                    format!("{field}[{index}]"),
                    format!("{text:?} is no address: left out"),
                ),
            }
        }
        addresses
    }

    /// The valid ones of a list of networks.
    fn networks(
        &mut self,
        object: &Object<'_>,
        field: &str,
        texts: Option<&[String]>,
    ) -> Vec<Cidr> {
        let mut networks = Vec::new();
        for (index, text) in texts.unwrap_or_default().iter().enumerate() {
            match Cidr::parse_sloppy(text) {
                Some(network) => networks.push(network),
                None => self.warn(
                    object,
                    format!("{field}[{index}]"),
                    format!("{text:?} is no network: left out"),
                ),
            }
        }
        networks
    }

    fn load_balancer_ips(
        &self,
        object: &Object<'_>,
        status: Option<RawServiceStatus>,
    ) -> Result<Vec<IpAddr>, ReadError> {
        let ingress = status
            .and_then(|status| status.load_balancer?.ingress)
            .unwrap_or_default();
        let mut ips = Vec::new();
        for (index, ingress) in ingress.iter().enumerate() {
            let text = ingress.ip.as_deref().unwrap_or_default();
            let is_vip = ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP");
            if text.is_empty() || !is_vip {
                continue;
            }
            ips.push(parse_address(text).ok_or_else(|| {
                self.wrong(
                    object,
                    format!("status.loadBalancer.ingress[{index}].ip"),
                    format!("{text:?} is no address"),
                )
            })?);
        }
        Ok(ips)
    }

    fn affinity(
        &self,
        object: &Object<'_>,
        spec: &RawServiceSpec,
    ) -> Result<Option<u32>, ReadError> {
        if spec.session_affinity.as_deref() != Some("ClientIP") {
            return Ok(None);
        }
        let seconds = spec
            .session_affinity_config
            .as_ref()
            .and_then(|config| config.client_ip.as_ref()?.timeout_seconds)
            .unwrap_or(AFFINITY_SECONDS);
        match u32::try_from(seconds) {
            Ok(seconds) if seconds > 0 => Ok(Some(seconds)),
            _ => Err(self.wrong(
                object,
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                format!("{seconds} is no timeout in seconds"),
            )),
        }
    }

    fn service_ports(
        &mut self,
        object: &Object<'_>,
        raw: Vec<RawServicePort>,
    ) -> Result<Vec<ServicePort>, ReadError> {
        if raw.is_empty() {
            self.warn(object, "spec.ports", "has no ports: nothing is done for it");
        }
        let mut ports: Vec<ServicePort> = Vec::with_capacity(raw.len());
        for (index, raw) in raw.into_iter().enumerate() {
            let field = |name: &str| format!("spec.ports[{index}].{name}");
            let name = raw.name.unwrap_or_default();
            self.check_name(object, &field("name"), &name, true)?;
            let port = ServicePort {
                name,
                protocol: self.protocol(object, || field("protocol"), raw.protocol.as_deref())?,
                port: self.port(object, || field("port"), raw.port.unwrap_or(0))?,
                node_port: match raw.node_port {
                    None | Some(0) => None,
                    Some(port) => Some(self.port(object, || field("nodePort"), port)?),
                },
                endpoints: Vec::new(),
            };
            // The key of kube-proxy's ServicePortMap.
            let same =
                |other: &ServicePort| (&other.name, other.protocol) == (&port.name, port.protocol);
            match ports.iter().position(same) {
                Some(position) => {
                    self.warn(object, field("name"), "is there twice: the last one counts");
                    ports[position] = port;
                }
                None => ports.push(port),
            }
        }
        Ok(ports)
    }

    /// A Service that is there twice, as after two lists were joined, counts as it was last.
    fn keep_last_of_each_service(&mut self) {
        let services = &mut self.result.cluster.services;
        let mut last: HashMap<(String, String), usize> = HashMap::with_capacity(services.len());
        for (index, service) in services.iter().enumerate() {
            last.insert((service.namespace.clone(), service.name.clone()), index);
        }
        if last.len() == services.len() {
            return;
        }
        let mut index = 0;
        let warnings = &mut self.result.warnings;
        services.retain(|service| {
            let key = (service.namespace.clone(), service.name.clone());
            let keep = last.get(&key) == Some(&index);
            if !keep {
                warnings.push(Warning {
                    kind: "Service",
                    object: format!("{}/{}", service.namespace, service.name),
                    field: "metadata.name".to_owned(),
                    message: "is there twice: the last one counts".to_owned(),
                });
            }
            index += 1;
            keep
        });
    }

    /// kube-proxy says nothing of what several `ServicePort`s claim, but no Service can rely on it.
    fn conflicts(&mut self) {
        let Read { cluster, warnings } = &mut self.result;
        let conflicts = cluster.conflicts();
        // A NodePort of two dual-stack Services is one conflict in each family.
        let mut said: HashSet<(usize, String)> = HashSet::new();
        for conflict in conflicts {
            let warning = conflict_warning(cluster, &conflict);
            let last = conflict.claimants.last().map_or(0, |last| last.service);
            if let Some(warning) = warning
                && said.insert((last, warning.message.clone()))
            {
                warnings.push(warning);
            }
        }
    }

    fn node(&mut self, object: &Object<'a>) -> Result<(), ReadError> {
        self.check_name(object, "metadata.name", object.name(), false)?;
        let raw: RawNode = self.parse(object.raw, || format!("Node {}", object.path()))?;
        let mut node = Node {
            name: object.name().to_owned(),
            zone: object.metadata.label(ZONE).map(str::to_owned),
            ..Node::default()
        };
        let addresses = raw.status.and_then(|status| status.addresses);
        for (index, raw) in addresses.unwrap_or_default().into_iter().enumerate() {
            let list = match raw.r#type.as_deref() {
                Some("InternalIP") => &mut node.addresses,
                Some("ExternalIP") => &mut node.external_addresses,
                _ => continue,
            };
            let text = raw.address.unwrap_or_default();
            match parse_address(&text) {
                Some(address) => list.push(address),
                None => self.warn(
                    object,
                    format!("status.addresses[{index}].address"),
                    format!("{text:?} is no address: left out"),
                ),
            }
        }
        let spec = raw.spec.unwrap_or_default();
        let pod_cidrs = spec
            .pod_cidrs
            .unwrap_or_else(|| spec.pod_cidr.into_iter().collect());
        node.pod_cidrs = self.networks(object, "spec.podCIDRs", Some(&pod_cidrs));
        self.result.cluster.nodes.push(node);
        Ok(())
    }

    fn service_cidr(&mut self, object: &Object<'a>) -> Result<(), ReadError> {
        let raw: RawServiceCidr =
            self.parse(object.raw, || format!("ServiceCIDR {}", object.path()))?;
        let cidrs = raw.spec.and_then(|spec| spec.cidrs);
        let networks = self.networks(object, "spec.cidrs", cidrs.as_deref());
        self.result.cluster.service_cidrs.extend(networks);
        Ok(())
    }

    fn slices(&mut self, objects: &[Object<'a>]) -> Result<(), ReadError> {
        let services: HashMap<(String, String), usize> = self
            .result
            .cluster
            .services
            .iter()
            .enumerate()
            .map(|(index, s)| ((s.namespace.clone(), s.name.clone()), index))
            .collect();
        let mut endpoints: Vec<Vec<Endpoints>> = self
            .result
            .cluster
            .services
            .iter()
            .map(|service| vec![Vec::new(); service.ports.len()])
            .collect();
        let mut has_slices = false;
        for object in objects.iter().filter(|o| o.kind == "EndpointSlice") {
            has_slices = true;
            if !object.metadata.is_watched() {
                continue;
            }
            let service = match object.metadata.label(SERVICE_NAME) {
                None | Some("") => {
                    let field = format!("metadata.labels[{SERVICE_NAME}]");
                    self.warn(object, field, "is missing: the slice is left out");
                    continue;
                }
                Some(service) => (object.namespace().to_owned(), service.to_owned()),
            };
            if let Some(service) = services.get(&service).copied()
                && let Some(endpoints) = endpoints.get_mut(service)
            {
                self.slice(object, service, endpoints)?;
            }
        }
        let cluster = &mut self.result.cluster;
        if !has_slices && !cluster.services.is_empty() {
            self.result.warnings.push(Warning {
                kind: "List",
                object: self.file.to_owned(),
                field: "items".to_owned(),
                message: format!(
                    "no EndpointSlice: no Service has endpoints; '{COMMAND}' gives them"
                ),
            });
        }
        let ports = cluster.services.iter_mut().flat_map(|s| &mut s.ports);
        for (port, endpoints) in ports.zip(endpoints.into_iter().flatten()) {
            port.endpoints = without_duplicates(endpoints);
        }
        Ok(())
    }

    fn slice(
        &mut self,
        object: &Object<'a>,
        service: usize,
        endpoints: &mut [Endpoints],
    ) -> Result<(), ReadError> {
        let raw: RawSlice =
            self.parse(object.raw, || format!("EndpointSlice {}", object.path()))?;
        let family = match raw.address_type.as_deref() {
            Some("IPv4") => Family::V4,
            Some("IPv6") => Family::V6,
            other => {
                self.warn(
                    object,
                    "addressType",
                    format!(
                        "{:?} is not IPv4 or IPv6: the slice is left out",
                        other.unwrap_or_default()
                    ),
                );
                return Ok(());
            }
        };
        let hosts = self.endpoints(object, family, raw.endpoints.unwrap_or_default());
        for (index, port) in raw.ports.unwrap_or_default().into_iter().enumerate() {
            let field = |name: &str| format!("ports[{index}].{name}");
            let Some(name) = port.name else {
                self.warn(object, field("name"), "is missing: the port is left out");
                continue;
            };
            let number = port.port.unwrap_or(0);
            if number == 0 {
                self.warn(
                    object,
                    field("port"),
                    "is missing or 0: the port is left out",
                );
                continue;
            }
            let number = self.port(object, || field("port"), number)?;
            let protocol = self.protocol(object, || field("protocol"), port.protocol.as_deref())?;
            let place = self
                .result
                .cluster
                .services
                .get(service)
                .and_then(|service| {
                    let same = |port: &ServicePort| port.name == name && port.protocol == protocol;
                    service.ports.iter().position(same)
                });
            if let Some(list) = place.and_then(|place| endpoints.get_mut(place)) {
                list.extend(hosts.iter().map(|(host, terminating)| {
                    let endpoint = Endpoint {
                        port: number,
                        ..host.clone()
                    };
                    (endpoint, *terminating)
                }));
            }
        }
        Ok(())
    }

    /// The endpoints of a slice without their ports.
    fn endpoints(
        &mut self,
        object: &Object<'_>,
        family: Family,
        raw: Vec<RawEndpoint>,
    ) -> Endpoints {
        let mut endpoints = Vec::with_capacity(raw.len());
        for (index, raw) in raw.into_iter().enumerate() {
            let field = || format!("endpoints[{index}].addresses");
            let addresses = raw.addresses.unwrap_or_default();
            let Some(text) = addresses.first() else {
                self.warn(object, field(), "is empty: the endpoint is left out");
                continue;
            };
            let Some(address) = parse_address(text) else {
                let message = format!("{text:?} is no address: the endpoint is left out");
                self.warn(object, field(), message);
                continue;
            };
            if !family.holds(address) {
                let message = format!("{address} is not {family}: the endpoint is left out");
                self.warn(object, field(), message);
                continue;
            }
            let conditions = raw.conditions.unwrap_or_default();
            let terminating = conditions.terminating.unwrap_or(false);
            let condition = if conditions.ready.unwrap_or(true) {
                Condition::Ready
            } else if terminating && conditions.serving.unwrap_or(true) {
                Condition::Draining
            } else {
                Condition::NotReady
            };
            let hints = raw.hints.unwrap_or_default();
            let names = |hints: Option<Vec<RawHint>>| {
                let hints = hints.unwrap_or_default();
                hints.into_iter().filter_map(|hint| hint.name).collect()
            };
            let endpoint = Endpoint {
                address,
                port: 0,
                node: raw.node_name.unwrap_or_default(),
                condition,
                zones: names(hints.for_zones),
                nodes: names(hints.for_nodes),
            };
            endpoints.push((endpoint, terminating));
        }
        endpoints
    }
}

/// Of the last claimant, what the others claim too.
fn conflict_warning(cluster: &Cluster, conflict: &Conflict) -> Option<Warning> {
    let (last, others) = conflict.claimants.split_last()?;
    let (service, port) = cluster.claimant(*last)?;
    let mut names: Vec<String> = others
        .iter()
        .take(MOST_NAMES)
        .filter_map(|other| cluster.claimant(*other))
        .map(|(service, port)| service.port_name(port))
        .collect();
    if others.len() > MOST_NAMES {
        names.push(format!("{} others", others.len() - MOST_NAMES));
    }
    Some(Warning {
        kind: "Service",
        object: format!("{}/{}", service.namespace, service.name),
        field: match conflict.claim {
            Claim::Socket(..) => last.field.to_owned(),
            Claim::NodePort(..) => format!("spec.ports[{}].nodePort", last.port),
        },
        message: format!(
            "{} of {} is claimed by {} too: kube-proxy gives it to one of them at random; in \
             iptables mode the rules of all are there, and the first, at random, counts",
            conflict.claim,
            service.port_name(port),
            names.join(", ")
        ),
    })
}

/// One endpoint for each address and port. Of several, the last that is not terminating counts
/// (`addEndpoints` of `endpointslicecache.go`, where the order of slices is random).
fn without_duplicates(mut endpoints: Endpoints) -> Vec<Endpoint> {
    endpoints.sort_by_key(|(endpoint, _)| (endpoint.address, endpoint.port));
    let mut kept: Vec<Endpoint> = Vec::with_capacity(endpoints.len());
    for (endpoint, terminating) in endpoints {
        match kept.last_mut() {
            Some(last) if (last.address, last.port) == (endpoint.address, endpoint.port) => {
                if !terminating {
                    *last = endpoint;
                }
            }
            _ => kept.push(endpoint),
        }
    }
    kept
}

/// The key that stands before a position, from 1, of an object's text.
fn field_at(text: &str, line: usize, column: usize) -> String {
    let line_start: usize = text
        .split_inclusive('\n')
        .take(line.saturating_sub(1))
        .map(str::len)
        .sum();
    let end = text.floor_char_boundary(line_start.saturating_add(column));
    let mut before = &text[..end];
    while let Some((rest, _)) = before.rsplit_once("\":") {
        if let Some((_, key)) = rest.rsplit_once('"') {
            return key.to_owned();
        }
        before = rest;
    }
    "the object".to_owned()
}

#[cfg(test)]
mod tests;
