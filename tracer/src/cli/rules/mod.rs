//! `svcpath rules`: a cluster compiled to rules, rules checked, read back and walked.

mod check;
mod parse;
mod render;
mod walk;

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Subcommand, ValueEnum};

use tracer::cluster::{Cidr, Cluster, read};
use tracer::rules::{Mode, NodePortAddresses, NodeView};

use super::exit::Usage;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compile a cluster to the rules that kube-proxy 1.36 would install on a node.
    Render(render::Args),
    /// Are the rules on this node the ones that the cluster calls for? Exit code 1 if not.
    Check(check::Args),
    /// What the rules alone say: Services, endpoints, policies; and whose rules the others are.
    Parse(parse::Args),
    /// Where would this packet go, rule by rule, and with what probability?
    Walk(walk::Args),
}

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Render(args) => render::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Parse(args) => parse::run(&args),
        Command::Walk(args) => walk::run(&args),
    }
}

/// How to show what was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// kube-proxy's `--mode`, and optionally the back end of iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ModeArg {
    /// iptables, whichever back end.
    Iptables,
    /// iptables over `x_tables`.
    IptablesLegacy,
    /// iptables over `nf_tables`.
    IptablesNft,
    /// IPVS.
    Ipvs,
    /// nftables.
    Nftables,
}

impl From<ModeArg> for Mode {
    /// Both back ends of iptables take the same text; the one that most nodes use stands for both.
    fn from(mode: ModeArg) -> Self {
        match mode {
            ModeArg::Iptables | ModeArg::IptablesNft => Self::IptablesNft,
            ModeArg::IptablesLegacy => Self::IptablesLegacy,
            ModeArg::Ipvs => Self::Ipvs,
            ModeArg::Nftables => Self::Nftables,
        }
    }
}

/// The cluster, the node and kube-proxy's flags.
#[derive(Debug, clap::Args)]
struct ClusterArgs {
    /// What `kubectl get services,endpointslices,nodes,servicecidrs -A -o json` printed (`-`: standard input).
    #[arg(long, value_name = "FILE")]
    cluster: PathBuf,
    /// The node's name.
    #[arg(long, value_name = "NAME")]
    node: String,
    /// kube-proxy's mode.
    #[arg(long, value_enum)]
    mode: ModeArg,
    #[command(flatten)]
    flags: Flags,
}

/// kube-proxy's flags, as far as rules depend on them; the same defaults.
#[derive(Debug, clap::Args)]
struct Flags {
    /// Where pods live; one network a family.
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    cluster_cidr: Vec<Cidr>,
    /// The networks of the cluster's `ServiceCIDRs`, if the file does not hold these objects.
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    service_cidr: Vec<Cidr>,
    /// Masquerade everything that goes to a ClusterIP.
    #[arg(long)]
    masquerade_all: bool,
    /// The addresses that serve NodePorts: networks, or `primary`.
    #[arg(
        long,
        visible_alias = "nodeport-addresses",
        value_name = "CIDR|primary",
        value_delimiter = ','
    )]
    node_port_addresses: Vec<String>,
    /// An address of the machine, besides loopback ones; default: those of the Node object.
    #[arg(long, value_name = "ADDR", value_delimiter = ',')]
    node_address: Vec<IpAddr>,
    /// Serve NodePorts on loopback addresses too, in iptables mode.
    #[arg(
        long,
        visible_alias = "iptables-localhost-nodeports",
        value_name = "BOOL",
        default_value_t = true,
        action = clap::ArgAction::Set
    )]
    localhost_node_ports: bool,
    /// The bit of the packet mark that asks for masquerading, 0 to 31.
    #[arg(
        long,
        visible_alias = "iptables-masquerade-bit",
        value_name = "BIT",
        default_value_t = NodeView::MASQUERADE_BIT,
        value_parser = clap::value_parser!(u8).range(0..32)
    )]
    masquerade_bit: u8,
    /// The scheduler of virtual servers.
    #[arg(
        long,
        visible_alias = "scheduler",
        value_name = "NAME",
        default_value = "rr"
    )]
    ipvs_scheduler: String,
    /// The node runs with `nf_conntrack_tcp_be_liberal`, so that iptables mode drops no INVALID
    /// packets.
    #[arg(long)]
    tcp_be_liberal: bool,
}

/// The cluster that the file holds; what kube-proxy would skip is said on standard error.
fn read_cluster(path: &std::path::Path) -> anyhow::Result<Cluster> {
    let read = if path.as_os_str() == "-" {
        read::read(std::io::stdin().lock(), "standard input")?
    } else {
        read::read_file(path)?
    };
    for warning in &read.warnings {
        super::exit::say(&format!("warning: {warning}"));
    }
    Ok(read.cluster)
}

impl Flags {
    /// The node as kube-proxy with these flags sees it.
    fn view(&self, cluster: &Cluster, node: &str) -> anyhow::Result<NodeView> {
        let mut view = NodeView::of(cluster, node)?;
        if !self.node_address.is_empty() {
            view.addresses.clone_from(&self.node_address);
        }
        if !self.service_cidr.is_empty() {
            view.service_cidrs.clone_from(&self.service_cidr);
        }
        view.cluster_cidrs.clone_from(&self.cluster_cidr);
        view.masquerade_all = self.masquerade_all;
        view.node_port_addresses = node_port_addresses(&self.node_port_addresses)?;
        view.localhost_node_ports = self.localhost_node_ports;
        view.masquerade_bit = self.masquerade_bit;
        view.scheduler.clone_from(&self.ipvs_scheduler);
        view.tcp_be_liberal = self.tcp_be_liberal;
        Ok(view)
    }
}

fn node_port_addresses(words: &[String]) -> anyhow::Result<NodePortAddresses> {
    match words {
        [] => Ok(NodePortAddresses::Default),
        [word] if word == "primary" => Ok(NodePortAddresses::Primary),
        words => {
            let networks: Result<Vec<Cidr>, _> = words.iter().map(|word| word.parse()).collect();
            Ok(NodePortAddresses::Within(networks.map_err(|error| {
                Usage(format!(
                    "--node-port-addresses: {error}, or `primary` alone"
                ))
            })?))
        }
    }
}

/// Where dumps come from.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Rules {
    /// A folder with iptables.save and ip6tables.save, nft-ip.txt (or .json) and nft-ip6.txt, or
    /// ipvsadm.save, ipset.save and ip-addr.txt.
    #[arg(long, value_name = "DIR")]
    dump: Option<PathBuf>,
    /// The rules of this node, now. Needs root, changes nothing.
    #[arg(long)]
    live: bool,
}

impl Rules {
    fn texts(&self) -> anyhow::Result<tracer::rules::dump::Texts> {
        match &self.dump {
            Some(folder) => Ok(tracer::rules::dump::Texts::read(folder)?),
            None => live(),
        }
    }
}

fn live() -> anyhow::Result<tracer::rules::dump::Texts> {
    super::exit::require_root("reading a node's rules")?;
    let ns = tracer::kernel::netns::Netns::current()?;
    Ok(tracer::kernel::dump::dump(&ns)?)
}
