//! Rules of one mode, loaded into a namespace of our own with the real tools, and taken out again.
//!
//! `apply_roundtrip` takes any mode, so that a machine whose kernel has IPVS can run it too.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use tracer::cluster::{Cluster, Endpoint, Family, Protocol, Service, ServicePort};
use tracer::kernel::netns::Netns;
use tracer::kernel::{apply, nfacct, tool};
use tracer::rules::{Mode, NodeView, RuleCounts, iptables, render};

const NODE_V4: &str = "192.0.2.1";
const NODE_V6: &str = "2001:db8::1";

/// A namespace with addresses of its own and a default route to nowhere.
pub(crate) fn namespace(name: &str) -> Netns {
    assert!(
        nix::unistd::Uid::effective().is_root(),
        "this test makes network namespaces and loads rules into them: run it as root"
    );
    let ns = Netns::create(name).expect("a namespace");
    // The far end of the veth pair drops what is not for its MAC address. A default route over lo
    // would not do: REJECT does not answer packets whose route is local.
    let setup = format!(
        "link set lo up\n\
         link add out type veth peer name far\n\
         link set far up\n\
         link set out up\n\
         address add {NODE_V4}/24 dev out\n\
         address add {NODE_V6}/64 dev out nodad\n\
         route add default via 192.0.2.254\n\
         -6 route add default via 2001:db8::fe\n\
         neigh add 192.0.2.254 lladdr 02:00:00:00:00:01 dev out\n\
         neigh add 2001:db8::fe lladdr 02:00:00:00:00:01 dev out\n"
    );
    for line in setup.lines() {
        let args: Vec<&str> = line.split(' ').collect();
        run(&ns, "ip", &args);
    }
    ns
}

pub(crate) fn run(ns: &Netns, tool: &str, args: &[&str]) -> String {
    tool::run(ns, tool, args, "").expect("a tool")
}

pub(crate) fn node(ns: &Netns, addresses: &[&str]) -> NodeView {
    let objects = [iptables::INVALID_DROPPED, iptables::LOCALHOST_NODE_PORTS];
    NodeView {
        name: "worker-0".to_owned(),
        addresses: addresses
            .iter()
            .map(|a| a.parse().expect("address"))
            .collect(),
        cluster_cidrs: ["10.244.0.0/16", "fd00:10:244::/56"]
            .map(|c| c.parse().expect("CIDR"))
            .into(),
        service_cidrs: ["10.96.0.0/12", "fd00:10:96::/108"]
            .map(|c| c.parse().expect("CIDR"))
            .into(),
        nfacct: nfacct::supported(ns, &objects).expect("nfacct"),
        ..NodeView::default()
    }
}

/// Dual-stack Services with none to three endpoints, every second with a NodePort; every third is
/// UDP. The endpoints are on this very node, so that a listener can be one.
fn cluster(services: u16) -> Cluster {
    let services = (0..services).map(|index| {
        let endpoints = (1..=index % 4).flat_map(|n| {
            let v4 = IpAddr::from([10, 244, 0, u8::try_from(n).expect("few endpoints")]);
            let v6 = IpAddr::from([0xfd00, 0x10, 0x244, 0, 0, 0, 0, n]);
            [v4, v6].map(|address| Endpoint::ready(address, 8000 + index, "worker-0"))
        });
        let [high, low] = (index + 1).to_be_bytes();
        Service {
            namespace: "shop".to_owned(),
            name: format!("svc-{index}"),
            cluster_ips: vec![
                IpAddr::from([10, 96, high, low]),
                IpAddr::from([0xfd00, 0x10, 0x96, 0, 0, 0, 0, index + 1]),
            ],
            ports: vec![ServicePort {
                name: "main".to_owned(),
                protocol: if index % 3 == 2 {
                    Protocol::Udp
                } else {
                    Protocol::Tcp
                },
                port: 80,
                node_port: (index % 2 == 1).then_some(30_000 + index),
                endpoints: endpoints.collect(),
            }],
            ..Service::default()
        }
    });
    Cluster {
        services: services.collect(),
        ..Cluster::default()
    }
}

/// Everything of the mode in the namespace that is not empty by itself: rules, chains other than
/// iptables' own base chains (which nobody can delete), sets, servers, addresses, in a fixed order
/// where the kernel has none.
fn dump(ns: &Netns, mode: Mode) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    if let Some(backend) = mode.backend() {
        for family in Family::ALL {
            let saved = run(ns, &format!("{}-save", backend.tool(family)), &[]);
            let mut table = "";
            for line in saved.lines() {
                if line.starts_with('*') {
                    table = line;
                } else if line.starts_with("-A ") || line.contains(" - [") {
                    lines.push(format!("{family:?} {table} {line}"));
                }
            }
        }
    }
    if mode == Mode::Nftables {
        lines.extend(nft_lines(&run(ns, "nft", &["list", "ruleset"])));
    }
    if mode == Mode::Ipvs {
        let mut unordered: Vec<String> = Vec::new();
        for (tool, args) in [
            ("ipset", &["save"][..]),
            ("ipvsadm", &["-Sn"]),
            ("ip", &["-o", "address", "show"]),
        ] {
            let text = run(ns, tool, args);
            // A new set has a new random initval, a new link a new index.
            unordered.extend(text.lines().map(|line| {
                let line = line.split(" bucketsize ").next().unwrap_or_default();
                line.trim_start_matches(|c: char| c.is_ascii_digit())
                    .to_owned()
            }));
        }
        unordered.sort();
        lines.extend(unordered);
    }
    lines
}

/// What nft lists, with the elements of sets (which have no order) one a line and sorted in their
/// place.
pub(crate) fn nft_lines(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut elements: Option<Vec<String>> = None;
    for line in text.lines() {
        let mut rest = line.trim();
        if let Some(list) = rest.strip_prefix("elements = {") {
            elements = Some(Vec::new());
            rest = list;
        }
        let Some(list) = &mut elements else {
            if !rest.is_empty() {
                lines.push(rest.to_owned());
            }
            continue;
        };
        let parts = rest.trim_end_matches('}').split(',').map(str::trim);
        list.extend(parts.filter(|part| !part.is_empty()).map(str::to_owned));
        if rest.ends_with('}')
            && let Some(mut list) = elements.take()
        {
            list.sort();
            lines.extend(list);
        }
    }
    lines
}

/// Rules of somebody else.
fn add_foreign_rules(ns: &Netns, mode: Mode) {
    if let Some(backend) = mode.backend() {
        for (family, address) in Family::ALL.into_iter().zip(["192.0.2.7", "2001:db8::7"]) {
            let tool = backend.tool(family);
            run(ns, tool, &["-N", "SOMEBODY"]);
            run(ns, tool, &["-A", "SOMEBODY", "-s", address, "-j", "DROP"]);
            run(
                ns,
                tool,
                &[
                    "-A",
                    "FORWARD",
                    "-m",
                    "comment",
                    "--comment",
                    "not -j KUBE-X",
                    "-j",
                    "SOMEBODY",
                ],
            );
        }
    }
    if mode == Mode::Ipvs {
        run(ns, "ipset", &["create", "SOMEBODY", "hash:ip"]);
        run(ns, "ipset", &["add", "SOMEBODY", "192.0.2.7"]);
    }
    if mode == Mode::Nftables {
        let script = "table ip somebody {\n\
                      set gone { type ipv4_addr; elements = { 192.0.2.7 } }\n\
                      chain input { type filter hook input priority 0; ip saddr @gone drop; }\n\
                      }\n";
        tool::run(ns, "nft", &["-f", "-"], script).expect("nft");
    }
}

/// Loads, counts, uses, loads again, flushes, shrinks and removes.
pub(crate) fn apply_roundtrip(mode: Mode) {
    let ns = namespace(&format!("roundtrip-{mode}"));
    let node = node(&ns, &[NODE_V4, NODE_V6]);
    let cluster = cluster(50);
    listen(&ns, &cluster);
    add_foreign_rules(&ns, mode);
    let before = dump(&ns, mode);
    assert_eq!(
        count(&ns, mode),
        RuleCounts::default(),
        "rules of others are not counted"
    );

    let set = render(&cluster, &node, mode);
    let expected = set.expected_counts();
    apply::apply(&ns, &set).expect("apply");
    assert_eq!(count(&ns, mode), expected);
    let full = dump(&ns, mode);
    assert_reachable(&ns, &cluster);

    for _ in 0..2 {
        apply::apply(&ns, &set).expect("apply over itself");
        assert_eq!(dump(&ns, mode), full, "loading twice is loading once");
    }

    let commands = apply::flush(&ns, mode).expect("flush");
    assert!(!commands.is_empty());
    let flushed = count(&ns, mode);
    match mode {
        Mode::IptablesLegacy | Mode::IptablesNft => {
            assert!(
                !dump(&ns, mode).iter().any(|line| line.contains("*nat -A")),
                "no nat rule is left"
            );
            assert!(flushed.rules < expected.rules);
        }
        Mode::Ipvs => assert_eq!((flushed.virtual_servers, flushed.real_servers), (0, 0)),
        Mode::Nftables => {
            assert_eq!(flushed.rules, 0);
            assert_eq!(
                flushed.elements, expected.elements,
                "nft flush table leaves elements"
            );
        }
    }
    assert_unreachable(&ns, &cluster);
    apply::apply(&ns, &set).expect("apply over flushed rules");
    assert_eq!(dump(&ns, mode), full);
    assert_reachable(&ns, &cluster);

    let mut smaller = cluster.clone();
    smaller.services.drain(10..30);
    let smaller = render(&smaller, &node, mode);
    apply::apply(&ns, &smaller).expect("apply fewer Services");
    assert_eq!(count(&ns, mode), smaller.expected_counts());

    apply::remove(&ns, mode).expect("remove");
    assert_eq!(count(&ns, mode), RuleCounts::default());
    assert_eq!(dump(&ns, mode), before, "the namespace is as it was");
    apply::remove(&ns, mode).expect("removing nothing");
    apply::apply(&ns, &set).expect("apply after removal");
    assert_eq!(count(&ns, mode), expected);
}

fn count(ns: &Netns, mode: Mode) -> RuleCounts {
    apply::count(ns, mode).expect("count")
}

/// Every TCP Service: its ClusterIPs and NodePort, and whether it has endpoints.
fn doors(cluster: &Cluster) -> impl Iterator<Item = (SocketAddr, &ServicePort)> {
    cluster
        .services
        .iter()
        .filter(|service| service.ports[0].protocol == Protocol::Tcp)
        .flat_map(|service| {
            let port = &service.ports[0];
            let node_port = port.node_port.into_iter().flat_map(|node_port| {
                [NODE_V4, NODE_V6]
                    .map(|ip| SocketAddr::new(ip.parse().expect("address"), node_port))
            });
            service
                .cluster_ips
                .iter()
                .map(|ip| SocketAddr::new(*ip, port.port))
                .chain(node_port)
                .map(move |door| (door, port))
        })
}

/// Makes every endpoint of a TCP Service answer with its own address, as long as the process
/// lives.
fn listen(ns: &Netns, cluster: &Cluster) {
    let endpoints: Vec<SocketAddr> = cluster
        .services
        .iter()
        .filter(|service| service.ports[0].protocol == Protocol::Tcp)
        .flat_map(|service| &service.ports[0].endpoints)
        .map(|endpoint| SocketAddr::new(endpoint.address, endpoint.port))
        .collect();
    let addresses: BTreeSet<IpAddr> = endpoints.iter().map(SocketAddr::ip).collect();
    for address in addresses {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        let address = format!("{address}/{prefix}");
        run(
            ns,
            "ip",
            &["address", "add", &address, "dev", "lo", "nodad"],
        );
    }
    for endpoint in endpoints {
        let listener = ns
            .run(|| TcpListener::bind(endpoint))
            .expect("the namespace");
        let listener = listener.expect("a listener");
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                // The client that went away will tell.
                let _ = stream.write_all(endpoint.to_string().as_bytes());
            }
        });
    }
}

/// Connects to every TCP Service: the answer tells the endpoint.
fn assert_reachable(ns: &Netns, cluster: &Cluster) {
    let mut refused_in_ipv6 = false;
    for (door, port) in doors(cluster) {
        // The kernel tells the client of an IPv6 reject only at its second SYN, a second later, so
        // one such door has to do.
        if port.endpoints.is_empty()
            && door.is_ipv6()
            && std::mem::replace(&mut refused_in_ipv6, true)
        {
            continue;
        }
        let wanted: Vec<SocketAddr> = port
            .endpoints
            .iter()
            .map(|endpoint| SocketAddr::new(endpoint.address, endpoint.port))
            .filter(|endpoint| endpoint.is_ipv4() == door.is_ipv4())
            .collect();
        match connect(ns, door) {
            Ok(mut stream) => {
                let mut answer = String::new();
                stream.read_to_string(&mut answer).expect("an answer");
                let endpoint: SocketAddr = answer.parse().expect("an endpoint");
                assert!(wanted.contains(&endpoint), "{door} answered by {endpoint}");
            }
            Err(error) => {
                assert!(wanted.is_empty(), "{door}: {error}");
                assert_eq!(
                    error.kind(),
                    ErrorKind::ConnectionRefused,
                    "{door}: {error}"
                );
            }
        }
    }
}

/// No ClusterIP answers.
fn assert_unreachable(ns: &Netns, cluster: &Cluster) {
    let (door, _) = doors(cluster)
        .find(|(_, port)| !port.endpoints.is_empty())
        .expect("a Service with endpoints");
    let result = ns.run(|| TcpStream::connect_timeout(&door, Duration::from_millis(200)));
    assert!(
        result.expect("the namespace").is_err(),
        "{door} answers without rules"
    );
}

fn connect(ns: &Netns, to: SocketAddr) -> std::io::Result<TcpStream> {
    ns.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5)))
        .expect("the namespace")
}
