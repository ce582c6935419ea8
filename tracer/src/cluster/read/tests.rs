use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const REAL: &str = include_str!("../../rules/fixtures/kube-proxy-1.36.2/cluster.json");

fn read_value(value: &Value) -> Result<Read, ReadError> {
    read(value.to_string().as_bytes(), "cluster.json")
}

/// The Service `ns/web` with one port, changed, and a slice of it, changed.
fn list_with(service: impl Fn(&mut Value), slice: impl Fn(&mut Value)) -> Value {
    let mut a_service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "web", "namespace": "ns"},
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"],
            "ipFamilies": ["IPv4"], "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000,
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080}],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}},
    });
    let mut a_slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": "web-1", "namespace": "ns", "labels": {"kubernetes.io/service-name": "web"},
        },
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["10.244.0.1"], "nodeName": "n"}],
    });
    service(&mut a_service);
    slice(&mut a_slice);
    json!({"apiVersion": "v1", "kind": "List", "items": [a_service, a_slice]})
}

fn unchanged(_: &mut Value) {}

fn only_service(read: &Read) -> &Service {
    let [service] = read.cluster.services.as_slice() else {
        panic!("one Service: {:?}", read.cluster.services);
    };
    service
}

#[test]
fn a_real_cluster_is_read() {
    let read = read(REAL.as_bytes(), "cluster.json").expect("a cluster");
    assert_eq!(read.warnings, []);
    assert_eq!(read.cluster.services.len(), 15);
    assert_eq!(read.cluster.nodes.len(), 2);
    let service = |name: &str| {
        let named = |service: &&Service| service.name == name;
        read.cluster.services.iter().find(named).expect("a Service")
    };
    assert_eq!(service("cart").affinity, Some(10_800));
    assert_eq!(
        service("gateway-local").health_check_node_port,
        Some(30_191)
    );
    assert_eq!(
        service("gateway-local").external_policy,
        TrafficPolicy::Local
    );
    assert_eq!(service("node-only").internal_policy, TrafficPolicy::Local);
    assert_eq!(
        service("gateway").source_ranges,
        [Cidr::v4(203, 0, 113, 0, 25)]
    );
    let draining = &service("draining").ports[0].endpoints;
    assert!(draining.iter().all(|e| e.condition == Condition::Draining));
    let node = read.cluster.node("worker-0").expect("a node");
    assert_eq!(node.zone.as_deref(), Some("z1"));
    assert_eq!(
        node.addresses,
        ["172.31.255.2".parse::<IpAddr>().expect("address")]
    );
}

#[test]
fn what_kube_proxy_does_not_watch_or_proxy_is_left_out() {
    let changes: [fn(&mut Value); 5] = [
        |service| service["spec"]["clusterIP"] = json!("None"),
        |service| service["spec"]["clusterIP"] = json!(""),
        |service| service["spec"]["type"] = json!("ExternalName"),
        |service| service["metadata"]["labels"] = json!({"service.kubernetes.io/headless": ""}),
        |service| {
            service["metadata"]["labels"] =
                json!({"service.kubernetes.io/service-proxy-name": "x"});
        },
    ];
    for change in changes {
        let read = read_value(&list_with(change, unchanged)).expect("a cluster");
        assert_eq!(read, Read::default());
    }
    let hidden = |slice: &mut Value| {
        slice["metadata"]["labels"]["service.kubernetes.io/headless"] = json!("");
    };
    let read = read_value(&list_with(unchanged, hidden)).expect("a cluster");
    assert_eq!(only_service(&read).ports[0].endpoints, []);
}

#[test]
fn policies_count_only_where_they_apply() {
    let internal = |service: &mut Value| {
        service["spec"]["type"] = json!("ClusterIP");
    };
    let read = read_value(&list_with(internal, unchanged)).expect("a cluster");
    assert_eq!(only_service(&read).external_policy, TrafficPolicy::Cluster);
    assert_eq!(only_service(&read).health_check_node_port, None);
    let external = |service: &mut Value| {
        service["spec"]["type"] = json!("ClusterIP");
        service["spec"]["externalIPs"] = json!(["192.0.2.3"]);
    };
    let read = read_value(&list_with(external, unchanged)).expect("a cluster");
    assert_eq!(only_service(&read).external_policy, TrafficPolicy::Local);
    let proxied = |service: &mut Value| {
        service["status"]["loadBalancer"]["ingress"] =
            json!([{"ip": "192.0.2.1", "ipMode": "Proxy"}, {"hostname": "x"}, {"ip": "192.0.2.2"}]);
    };
    let read = read_value(&list_with(proxied, unchanged)).expect("a cluster");
    let vip: IpAddr = "192.0.2.2".parse().expect("address");
    assert_eq!(only_service(&read).load_balancer_ips, [vip]);
}

#[test]
fn what_kube_proxy_skips_is_skipped_with_a_warning() {
    type Change = fn(&mut Value);
    let cases: [(Change, Change, &str, &str); 13] = [
        (
            |s| s["spec"]["ports"] = json!([]),
            unchanged,
            "Service ns/web",
            "spec.ports",
        ),
        (
            |s| s["spec"]["externalIPs"] = json!(["x"]),
            unchanged,
            "Service ns/web",
            "spec.externalIPs[0]",
        ),
        (
            |s| s["spec"]["loadBalancerSourceRanges"] = json!(["10.0.0.0/8", "10.0.0.0/40"]),
            unchanged,
            "Service ns/web",
            "spec.loadBalancerSourceRanges[1]",
        ),
        (
            |s| s["spec"]["healthCheckNodePort"] = json!(0),
            unchanged,
            "Service ns/web",
            "spec.healthCheckNodePort",
        ),
        (
            unchanged,
            |s| s["metadata"]["labels"] = json!({}),
            "EndpointSlice ns/web-1",
            "metadata.labels[kubernetes.io/service-name]",
        ),
        (
            unchanged,
            |s| s["addressType"] = json!("FQDN"),
            "EndpointSlice ns/web-1",
            "addressType",
        ),
        (
            unchanged,
            |s| s["addressType"] = json!("IPv6"),
            "EndpointSlice ns/web-1",
            "endpoints[0].addresses",
        ),
        (
            unchanged,
            |s| s["ports"][0]["name"] = json!(null),
            "EndpointSlice ns/web-1",
            "ports[0].name",
        ),
        (
            unchanged,
            |s| s["ports"][0]["port"] = json!(null),
            "EndpointSlice ns/web-1",
            "ports[0].port",
        ),
        (
            unchanged,
            |s| s["ports"][0]["port"] = json!(0),
            "EndpointSlice ns/web-1",
            "ports[0].port",
        ),
        (
            unchanged,
            |s| s["endpoints"][0]["addresses"] = json!([]),
            "EndpointSlice ns/web-1",
            "endpoints[0].addresses",
        ),
        (
            unchanged,
            |s| s["endpoints"][0]["addresses"] = json!(["pod-1"]),
            "EndpointSlice ns/web-1",
            "endpoints[0].addresses",
        ),
        (
            unchanged,
            |s| s["kind"] = json!("Pod"),
            "List cluster.json",
            "items",
        ),
    ];
    for (service, slice, object, field) in cases {
        let read = read_value(&list_with(service, slice)).expect("a cluster");
        let [warning] = read.warnings.as_slice() else {
            panic!("one warning of {field}: {:?}", read.warnings);
        };
        assert_eq!(format!("{} {}", warning.kind, warning.object), object);
        assert_eq!(warning.field, field);
        if object.starts_with("EndpointSlice") {
            assert_eq!(only_service(&read).ports[0].endpoints, []);
        }
    }
}

#[test]
fn what_the_tools_would_refuse_is_an_error_with_its_place() {
    type Change = fn(&mut Value);
    let cases: [(Change, Change, &str); 15] = [
        (
            |s| s["spec"]["ports"][0]["port"] = json!(0),
            unchanged,
            "cluster.json: Service ns/web: spec.ports[0].port: 0 is no port (1-65535)",
        ),
        (
            |s| s["spec"]["ports"][0]["port"] = json!(70_000),
            unchanged,
            "cluster.json: Service ns/web: spec.ports[0].port: 70000 is no port (1-65535)",
        ),
        (
            |s| s["spec"]["ports"][0]["nodePort"] = json!(-1),
            unchanged,
            "cluster.json: Service ns/web: spec.ports[0].nodePort: -1 is no port (1-65535)",
        ),
        (
            |s| s["spec"]["ports"][0]["protocol"] = json!("ICMP"),
            unchanged,
            "cluster.json: Service ns/web: spec.ports[0].protocol: \"ICMP\" is no protocol (TCP, UDP, SCTP)",
        ),
        (
            |s| s["spec"]["ports"][0]["name"] = json!("a\n-X"),
            unchanged,
            "cluster.json: Service ns/web: spec.ports[0].name: \"a\\n-X\" is no name",
        ),
        (
            |s| s["spec"]["clusterIPs"] = json!(["fd00::1"]),
            unchanged,
            "cluster.json: Service ns/web: spec.clusterIPs[0]: fd00::1 is not of the family IPv4 of spec.ipFamilies[0]",
        ),
        (
            |s| s["spec"]["clusterIPs"] = json!(["x"]),
            unchanged,
            "cluster.json: Service ns/web: spec.clusterIPs[0]: \"x\" is no address",
        ),
        (
            |s| s["spec"]["healthCheckNodePort"] = json!(70_000),
            unchanged,
            "cluster.json: Service ns/web: spec.healthCheckNodePort: 70000 is no port (1-65535)",
        ),
        (
            |s| s["status"]["loadBalancer"]["ingress"][0]["ip"] = json!("x"),
            unchanged,
            "cluster.json: Service ns/web: status.loadBalancer.ingress[0].ip: \"x\" is no address",
        ),
        (
            |s| s["metadata"]["name"] = json!("a\"b"),
            unchanged,
            "cluster.json: Service ns/a\"b: metadata.name: \"a\\\"b\" is no name",
        ),
        (
            |s| s["metadata"]["namespace"] = json!(null),
            unchanged,
            "cluster.json: Service web: metadata.namespace: is missing",
        ),
        (
            |s| s["spec"]["ports"][0]["port"] = json!("80"),
            unchanged,
            "cluster.json:1: Service ns/web: port: invalid type: string \"80\", expected i64",
        ),
        (
            |s| s["spec"]["ports"] = json!({}),
            unchanged,
            "cluster.json:1: Service ns/web: ports: invalid type: map, expected a sequence",
        ),
        (
            unchanged,
            |s| s["ports"][0]["port"] = json!(70_000),
            "cluster.json: EndpointSlice ns/web-1: ports[0].port: 70000 is no port (1-65535)",
        ),
        (
            unchanged,
            |s| s["endpoints"][0]["conditions"] = json!({"ready": 1}),
            "cluster.json:1: EndpointSlice ns/web-1: ready: invalid type: integer `1`, expected a boolean",
        ),
    ];
    for (service, slice, message) in cases {
        let error = read_value(&list_with(service, slice)).expect_err(message);
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn files_that_are_no_cluster_are_refused() {
    let cases = [
        ("", "c.json:1:0: EOF while parsing a value"),
        ("\u{7f}ELF", "c.json:1:1: no JSON object"),
        ("[]", "c.json:1:1: no JSON object"),
        (
            "{\"kind\": \"List\", \"items\": [{",
            "c.json:1:28: EOF while parsing an object",
        ),
        (
            "{\"kind\": \"List\",\n\"items\": 7}",
            "c.json:2:10: invalid type: integer `7`, expected a sequence",
        ),
        (
            "{\"items\": [{\"kind\": \"Pod\"}, {\"kind\": \"Pod\"}]}",
            "c.json holds 2 Pod and no Service",
        ),
        (
            "{\"kind\": \"PodList\", \"items\": [{}]}",
            "c.json holds 1 Pod and no Service",
        ),
        (
            "{\"kind\": \"Service\"}",
            "c.json holds one object, a Service, and no Service",
        ),
    ];
    for (text, message) in cases {
        let error = read(text.as_bytes(), "c.json").expect_err(text).to_string();
        assert!(error.starts_with(message), "{error}");
        assert!(
            error.contains("kubectl get services,endpointslices,nodes"),
            "{error}"
        );
    }
    let cut = &REAL[..REAL.len() / 2];
    let error = read(cut.as_bytes(), "c.json").expect_err("half a file");
    assert!(
        matches!(error, ReadError::Json { line, .. } if line > 100),
        "{error}"
    );
    let missing = read_file(Path::new("/nowhere/c.json")).expect_err("no file");
    assert!(
        missing
            .to_string()
            .starts_with("cannot read /nowhere/c.json: ")
    );
}

#[test]
fn lists_of_one_kind_need_no_kind_of_their_objects() {
    let mut list = list_with(unchanged, unchanged);
    list["kind"] = json!("ServiceList");
    list["items"].as_array_mut().expect("items").truncate(1);
    list["items"][0]
        .as_object_mut()
        .expect("object")
        .remove("kind");
    let read = read_value(&list).expect("a cluster");
    assert_eq!(only_service(&read).name, "web");
    let mut cidrs = json!({"kind": "ServiceCIDRList", "items": [
        {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12", "fd00::/108"]}},
    ]});
    let error = read_value(&cidrs).expect_err("no Service").to_string();
    assert!(error.contains("1 ServiceCIDR and no Service"), "{error}");
    let mut service = list["items"][0].clone();
    service["kind"] = json!("Service");
    cidrs["items"].as_array_mut().expect("items").push(service);
    let read = read_value(&cidrs).expect("a cluster");
    assert_eq!(read.cluster.service_cidrs.len(), 2);
}

#[test]
fn of_an_endpoint_in_two_slices_the_running_one_counts() {
    let mut list = list_with(unchanged, unchanged);
    let slice = list["items"][1].clone();
    for (node, terminating) in [("gone", true), ("runs", false), ("gone", true)] {
        let mut other = slice.clone();
        other["endpoints"][0]["nodeName"] = json!(node);
        other["endpoints"][0]["conditions"] =
            json!({"ready": !terminating, "terminating": terminating});
        list["items"].as_array_mut().expect("items").push(other);
    }
    list["items"].as_array_mut().expect("items").remove(1);
    let read = read_value(&list).expect("a cluster");
    let [endpoint] = only_service(&read).ports[0].endpoints.as_slice() else {
        panic!("one endpoint");
    };
    assert_eq!(
        (endpoint.node.as_str(), endpoint.condition),
        ("runs", Condition::Ready)
    );
}

#[test]
fn of_a_service_that_is_there_twice_the_last_counts() {
    let mut list = list_with(unchanged, unchanged);
    let mut again = list["items"][0].clone();
    again["spec"]["ports"][0]["port"] = json!(81);
    list["items"].as_array_mut().expect("items").push(again);
    let read = read_value(&list).expect("a cluster");
    assert_eq!(only_service(&read).ports[0].port, 81);
    assert_eq!(only_service(&read).ports[0].endpoints.len(), 1);
    assert_eq!(read.warnings.len(), 1);
}

#[test]
fn conditions_default_as_in_kube_proxy() {
    for (conditions, condition) in [
        (json!(null), Condition::Ready),
        (json!({"ready": null}), Condition::Ready),
        (
            json!({"ready": true, "terminating": true}),
            Condition::Ready,
        ),
        (json!({"ready": false}), Condition::NotReady),
        (
            json!({"ready": false, "serving": true}),
            Condition::NotReady,
        ),
        (
            json!({"ready": false, "terminating": true}),
            Condition::Draining,
        ),
        (
            json!({"ready": false, "serving": false, "terminating": true}),
            Condition::NotReady,
        ),
    ] {
        let change = |slice: &mut Value| slice["endpoints"][0]["conditions"] = conditions.clone();
        let read = read_value(&list_with(unchanged, change)).expect("a cluster");
        assert_eq!(
            only_service(&read).ports[0].endpoints[0].condition,
            condition,
            "{conditions}"
        );
    }
}

/// Every place of a JSON document, depth first.
fn places<'a>(value: &'a mut Value, wanted: usize, seen: &mut usize) -> Option<&'a mut Value> {
    if *seen == wanted {
        return Some(value);
    }
    *seen += 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| places(item, wanted, seen)),
        Value::Object(map) => map.values_mut().find_map(|item| places(item, wanted, seen)),
        _ => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    /// Any bytes changed anywhere: a cluster or an error, never a panic.
    #[test]
    fn changed_bytes_never_panic(
        changes in proptest::collection::vec((0..REAL.len(), any::<u8>()), 1..8),
        length in 0..=REAL.len(),
    ) {
        let mut text = REAL.as_bytes().to_vec();
        for (place, byte) in changes {
            text[place] = byte;
        }
        text.truncate(length.max(REAL.len() / 2));
        let _ = read(text.as_slice(), "c.json");
    }

    /// Any value put in the place of any other: a cluster or an error, never a panic.
    #[test]
    fn changed_values_never_panic(
        place in 0_usize..2500,
        value in prop_oneof![
            Just(json!(null)), Just(json!([])), Just(json!({})), Just(json!("")), Just(json!(true)),
            Just(json!([null])), Just(json!([{}])), Just(json!(-1)), Just(json!(1e300)),
            any::<u64>().prop_map(|n| json!(n)), ".*".prop_map(|s| json!(s)),
            Just(json!("::/0")), Just(json!("0.0.0.0/0")), Just(json!("Local")),
        ],
    ) {
        let mut list: Value = serde_json::from_str(REAL).expect("JSON");
        if let Some(old) = places(&mut list, place, &mut 0) {
            *old = value;
        }
        if let Err(error) = read_value(&list) {
            prop_assert!(error.to_string().contains("cluster.json"));
        }
    }
}

/// A list of `ns/web` and of `ns/web2`, changed, with an external IP of both.
fn list_of_two(other: impl Fn(&mut Value)) -> Value {
    let mut list = list_with(
        |s| s["spec"]["externalIPs"] = json!(["192.0.2.7"]),
        unchanged,
    );
    let mut second = list["items"][0].clone();
    second["metadata"]["name"] = json!("web2");
    second["spec"]["clusterIP"] = json!("10.96.0.8");
    second["spec"]["clusterIPs"] = json!(["10.96.0.8"]);
    second["spec"]["ports"][0]["nodePort"] = json!(30081);
    second["status"] = json!({});
    other(&mut second);
    list["items"].as_array_mut().expect("items").push(second);
    list
}

#[test]
fn what_two_services_claim_is_said() {
    const HOW: &str = "is claimed by ns/web:http too: kube-proxy gives it to one of them at random; \
                       in iptables mode the rules of all are there, and the first, at random, counts";
    let warnings = |other: &dyn Fn(&mut Value)| -> Vec<String> {
        let read = read_value(&list_of_two(other)).expect("a cluster");
        read.warnings.iter().map(ToString::to_string).collect()
    };
    let of = |what: &str| format!("Service ns/web2: {what} of ns/web2:http {HOW}");
    let external = of("spec.externalIPs: 192.0.2.7:80/tcp");
    assert_eq!(warnings(&|_| {}), std::slice::from_ref(&external));
    let balanced = |s: &mut Value| {
        s["spec"]["externalIPs"] = json!([]);
        s["status"] = json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}});
    };
    assert_eq!(
        warnings(&balanced),
        [of("status.loadBalancer.ingress: 192.0.2.1:80/tcp")]
    );
    let node_port = |s: &mut Value| {
        s["spec"]["externalIPs"] = json!(null);
        s["spec"]["ports"][0]["nodePort"] = json!(30080);
    };
    assert_eq!(
        warnings(&node_port),
        [of("spec.ports[0].nodePort: 30080/tcp")]
    );
    let cluster_ip = |s: &mut Value| {
        s["spec"]["clusterIP"] = json!("10.96.0.7");
        s["spec"]["clusterIPs"] = json!(["10.96.0.7"]);
    };
    assert_eq!(
        warnings(&cluster_ip),
        [of("spec.clusterIPs: 10.96.0.7:80/tcp"), external]
    );
}

#[test]
fn what_kube_proxy_skips_claims_nothing() {
    let skipped: [fn(&mut Value); 6] = [
        |s| s["spec"]["clusterIP"] = json!("None"),
        |s| s["spec"]["type"] = json!("ExternalName"),
        |s| {
            s["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": "other"});
        },
        |s| s["metadata"]["labels"] = json!({"service.kubernetes.io/headless": ""}),
        // Not the same.
        |s| s["spec"]["ports"][0]["protocol"] = json!("UDP"),
        |s| s["spec"]["ports"][0]["port"] = json!(81),
    ];
    for change in skipped {
        let read = read_value(&list_of_two(change)).expect("a cluster");
        assert_eq!(read.warnings, []);
    }
}

#[test]
fn a_conflict_of_many_services_is_one_warning() {
    let mut list = list_of_two(unchanged);
    for index in 3..8 {
        let mut other = list["items"][2].clone();
        other["metadata"]["name"] = json!(format!("web{index}"));
        other["spec"]["clusterIP"] = json!(format!("10.96.1.{index}"));
        other["spec"]["clusterIPs"] = json!([format!("10.96.1.{index}")]);
        other["spec"]["ports"][0]["nodePort"] = json!(30100 + index);
        list["items"].as_array_mut().expect("items").push(other);
    }
    let read = read_value(&list).expect("a cluster");
    let [warning] = read.warnings.as_slice() else {
        panic!("one warning: {:?}", read.warnings);
    };
    assert_eq!(warning.object, "ns/web7");
    let names = "ns/web:http, ns/web2:http, ns/web3:http, 3 others too";
    assert!(warning.message.contains(names), "{warning}");
}

#[test]
fn words_that_the_api_server_does_not_know_are_refused() {
    for (field, word) in [
        ("type", "nodeport"),
        ("externalTrafficPolicy", "Foo"),
        ("internalTrafficPolicy", "local"),
        ("sessionAffinity", "Cookie"),
    ] {
        let list = list_with(|service| service["spec"][field] = json!(word), unchanged);
        let error = read_value(&list).expect_err(word).to_string();
        assert!(
            error.contains(&format!("spec.{field}: {word:?} is none of")),
            "{error}"
        );
    }
}
