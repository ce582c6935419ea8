//! What applying rules costs: `apply MODE SERVICES [ENDPOINTS]` makes a namespace, applies a
//! laboratory cluster's rules to it twice, and prints each step's time and memory. Needs root.

use std::error::Error;
use std::time::Instant;

use tracer::kernel::apply;
use tracer::kernel::netns::Netns;
use tracer::kernel::tool;
use tracer::lab::plan;
use tracer::rules::{Mode, NodeView, render};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [mode, services, endpoints @ ..] = args.as_slice() else {
        return Err("usage: apply MODE SERVICES [ENDPOINTS]".into());
    };
    let mode: Mode = mode.parse()?;
    let endpoints = endpoints.first().map_or(Ok(3), |n| n.parse())?;
    let cluster = plan::cluster(services.parse()?, endpoints, false)?;
    let node = NodeView {
        name: plan::NODE.to_owned(),
        addresses: vec![plan::NODE_ADDRESS.base],
        cluster_cidrs: vec![plan::CLUSTER_CIDR],
        service_cidrs: vec![plan::SERVICE_CIDR],
        ..NodeView::default()
    };
    let begin = Instant::now();
    let set = render(&cluster, &node, mode);
    println!("rendered in {:.1?}", begin.elapsed());

    let ns = Netns::create("apply")?;
    // Without an address and a route IPVS takes no real servers.
    for line in [
        "link set lo up",
        "link add out type veth peer name far",
        "link set out up",
        "link set far up",
        "address add 192.0.2.1/24 dev out",
        "route add default via 192.0.2.254",
    ] {
        tool::run(&ns, "ip", &line.split(' ').collect::<Vec<_>>(), "")?;
    }
    for pass in ["into an empty namespace", "again, with nothing changed"] {
        let applied = apply::apply(&ns, &set)?;
        println!("\n{mode}, {services} Services x {endpoints} endpoints, {pass}:");
        for step in &applied.steps {
            println!("  {step}");
        }
        let seconds = std::time::Duration::from_nanos(applied.total_ns()).as_secs_f64();
        let peak = applied.peak().kib / 1024;
        println!("  total {seconds:.3} s, largest tool {peak} MiB");
    }
    let (found, wanted) = (apply::count(&ns, mode)?, set.expected_counts());
    if found != wanted {
        return Err(format!("the kernel holds {found:?} instead of {wanted:?}").into());
    }
    Ok(())
}
