//! `svcpath rules render`.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use tracer::report::write;
use tracer::rules::{Mode, RuleSet, render};

use super::super::exit;
use super::{ClusterArgs, read_cluster};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    kubectl get services,endpointslices,nodes,servicecidrs -A -o json > cluster.json\n  \
    svcpath rules render --cluster cluster.json --node worker-0 --mode nftables \\\n      \
    --cluster-cidr 10.244.0.0/16 -o rules\n  \
    svcpath rules render --cluster new.json --from old.json --node worker-0 --mode iptables\n\n\
    Files: iptables.save and ip6tables.save (iptables-restore --noflush), nft-ip.txt and \
    nft-ip6.txt (nft -f),\n\
    ipset.save (ipset restore), ipvsadm.save (ipvsadm -R), ip-addr.batch (ip -batch), and load.sh, \
    which loads them\nin kube-proxy's order. It names a program that is not installed before it changes anything; in iptables \
    mode\nit makes the counters of nfacct that the rules count with, for which it needs the package nfacct (see\n--no-nfacct).")]
pub(super) struct Args {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Write only what kube-proxy would send to go from this older state of the cluster.
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Leave out what counts with nfacct, as kube-proxy does where the kernel has none; needed as well where its
    /// program (package nfacct) is not installed.
    #[arg(long)]
    no_nfacct: bool,
    /// Folder to write to; without it, a shell script goes to standard output.
    #[arg(short = 'o', value_name = "DIR")]
    folder: Option<PathBuf>,
    /// Overwrite what is in the folder.
    #[arg(long)]
    force: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let cluster = read_cluster(&args.cluster.cluster)?;
    let mut view = args.cluster.flags.view(&cluster, &args.cluster.node)?;
    view.nfacct &= !args.no_nfacct;
    let mode = args.cluster.mode.into();
    if mode == Mode::Nftables && view.service_cidrs.is_empty() {
        exit::say(
            "warning: no ServiceCIDRs are known, so the rule for unallocated ClusterIPs is left out; \
             --service-cidr gives them, or `kubectl get servicecidrs` in the file",
        );
    }
    let set = match &args.from {
        Some(old) => {
            let old = read_cluster(old)?;
            tracer::rules::sync(&old, &cluster, &view, mode)
        }
        None => render(&cluster, &view, mode),
    };
    let Some(folder) = &args.folder else {
        exit::print(&set.script())?;
        return Ok(ExitCode::SUCCESS);
    };
    write_files(&set, folder, args.force)?;
    Ok(ExitCode::SUCCESS)
}

fn write_files(set: &RuleSet, folder: &std::path::Path, force: bool) -> anyhow::Result<()> {
    use anyhow::Context as _;
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let files = set.files();
    for file in &files {
        write::check_file(&folder.join(&file.name), force)?;
    }
    let mut written = String::new();
    for file in &files {
        write::write_file(&folder.join(&file.name), file.text.as_bytes(), force)?;
        let _ = write!(written, " {}", file.name);
    }
    exit::say(&format!("wrote to {}:{written}", folder.display()));
    Ok(())
}
