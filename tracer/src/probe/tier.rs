//! The probes at work, whatever tells where packets are: netfilter boundaries ([`super::hooks`]) or the
//! kernel's functions ([`super::functions`]), and three tracepoints. Slots, histograms and records are the
//! same.
//!
//! # Minimum kernel version
//!
//! That of the tier; BTF for both.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use aya::Pod;
use aya::maps::{Array, HashMap as BpfHashMap, Map, MapData, PerCpuArray, RingBuf};
use serde::Serialize;
use tracer_ebpf::histogram::{CELLS, bounds_of};
use tracer_ebpf::path::{Path, Target};
use tracer_ebpf::record::{
    Cells, IPV4, IPV6, Key4, Key6, Known, MET, MOST_STAGES, Met, PORT_BITS, PORT_IS_DESTINATION,
    PORT_IS_SOURCE, RDONLY_CAST, Record, Stats, Table, Told, histogram_index, state,
};

use super::catalogue::{self, Detail, Tracepoint};
pub use super::program::RunTime;
use super::program::{self, Constants, Counting, Kind, Link, ProgramError, Programs};
use super::{OBJECT, functions, hooks, log, offsets};
use crate::kernel::btf::{Btf, BtfError};
use crate::kernel::clock::monotonic_ns;
use crate::kernel::netns::{Netns, NetnsError};

/// Why the probes could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// No BTF, or a field is missing from it.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// A program.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A map.
    #[error("cannot use the probes' map {name}: {source}")]
    Map {
        /// The map's name.
        name: &'static str,
        /// What aya says.
        source: aya::maps::MapError,
    },
    /// The node's namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The namespace's number could not be read.
    #[error("cannot read the namespace's number: {0}")]
    Inode(#[source] std::io::Error),
    /// A function without which nothing can be followed differs from those that are known.
    #[error("the kernel's function {0} has other parameters than those that are known")]
    Parameters(&'static str),
    /// A component's module is not there.
    #[error("{module} is not loaded, or this kernel has no function {function}")]
    NotLoaded {
        /// The module.
        module: String,
        /// The function that was looked for.
        function: &'static str,
    },
    /// No free priority for a boundary.
    #[error(
        "every place before {stage} at {hook} is taken: too many sessions trace this network namespace; end one \
         (bpftool link list shows who holds them)"
    )]
    Crowded {
        /// The hook.
        hook: &'static str,
        /// The stage that should have begun there.
        stage: &'static str,
    },
}

/// What tells where packets are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// Netfilter links between the components of each hook: kernel 6.4 and later.
    Hooks,
    /// The kernel's functions (`fentry`, `fexit`): 5.17 and later, where lockdown allows it.
    Functions,
}

impl Tier {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Hooks, Self::Functions];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hooks => "hooks",
            Self::Functions => "functions",
        }
    }

    /// The tier to use here: `hooks` if the kernel has netfilter links. Every kernel that has them
    /// describes them.
    ///
    /// # Errors
    ///
    /// The kernel has no BTF, or it cannot be read.
    pub fn of_this_kernel() -> Result<Self, BtfError> {
        match Btf::vmlinux()?.offset_of("bpf_nf_link", "link") {
            Ok(_) => Ok(Self::Hooks),
            Err(BtfError::NoType(_) | BtfError::NoField { .. }) => Ok(Self::Functions),
            Err(error) => Err(error),
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What to watch: addresses, ports and protocols, never names.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    /// Where flows go to: address, IP protocol number, and what stands there.
    pub targets: Vec<(SocketAddr, u8, Target)>,
    /// Which of `targets` were endpoints, and are none any more: when they were heard of is remembered, see
    /// [`Probes::heard`].
    pub former: HashSet<(SocketAddr, u8)>,
    /// The node's own addresses.
    pub node_addresses: Vec<IpAddr>,
    /// The addresses of this node's pods, at most one prefix a family.
    pub pod_cidrs: Vec<(IpAddr, u8)>,
    /// For how many more targets of each family there has to be room: see [`Probes::watch_also`].
    pub spare: u32,
    /// External addresses of Services that are bound on the node; `None` where that cannot be, and packets pay
    /// nothing for it, as without IPVS. [`Probes::watch_also`] can change them, and not whether there can be any.
    pub absorbed: Option<HashSet<IpAddr>>,
    /// How finely packets are followed.
    pub detail: Detail,
    /// One in how many packets is timed that are not the first of a flow; 0 and 1: all.
    pub sample: u32,
    /// Attach programs that return at once: what the kernel takes to run them, and nothing is watched.
    pub empty: bool,
}

impl Watch {
    /// The families in which there is anything to watch: a boundary costs every packet of its
    /// family a little.
    pub(super) fn families(&self) -> impl Iterator<Item = u8> {
        let any = |v4: bool| {
            self.targets
                .iter()
                .any(|(address, _, _)| address.is_ipv4() == v4)
        };
        [(IPV4, any(true)), (IPV6, any(false))]
            .into_iter()
            .filter_map(|(family, wanted)| wanted.then_some(family))
    }
}

/// Where a boundary was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The boundary's id.
    pub boundary: u8,
    /// [`IPV4`] or [`IPV6`].
    pub family: u8,
    /// The priority it got.
    pub priority: i32,
}

/// A function that a program is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probed {
    /// The kernel's module; `None`: it is vmlinux's.
    pub module: Option<&'static str>,
    /// Its name.
    pub function: &'static str,
}

/// A component or teller whose functions could not be attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Its name in the catalogue.
    pub name: &'static str,
    /// What is lost without it.
    pub without: &'static str,
    /// Why not.
    pub why: String,
}

/// What a tier attached.
#[derive(Debug, Default)]
pub(super) struct Attached {
    /// Where packets' journeys begin: attached last, and detached first.
    pub(super) beginnings: Vec<Link>,
    /// When everything else was attached (`CLOCK_MONOTONIC`, ns): no journey began before.
    pub(super) whole_ns: u64,
    pub(super) links: Vec<Link>,
    pub(super) placed: Vec<Placed>,
    pub(super) probed: Vec<Probed>,
    pub(super) missing: Vec<Missing>,
}

impl Attached {
    /// Every netfilter link, or program at a function.
    fn all(&self) -> impl Iterator<Item = &Link> {
        self.beginnings.iter().chain(&self.links)
    }

    /// Writes down what could not be attached, and what is lost without it.
    pub(super) fn miss(
        &mut self,
        found: Result<(), ProbeError>,
        name: &'static str,
        without: &'static str,
    ) {
        if let Err(error) = found {
            self.missing.push(Missing {
                name,
                without,
                why: error.to_string(),
            });
        }
    }
}

/// One histogram that is not empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Times {
    /// How the flow entered.
    pub path: Path,
    /// See [`tracer_ebpf::record::state`].
    pub state: u8,
    /// The stage's id.
    pub stage: u8,
    /// Exact sum, ns.
    pub sum: u64,
    /// `[lowest, highest, count]` of each cell that is not empty.
    pub cells: Vec<[u64; 3]>,
}

/// The attached probes; dropping them detaches everything.
pub struct Probes {
    tier: Tier,
    programs: Programs,
    /// Mapped once: to map its 16 MB, twice over, at every look was most of what a session took on one CPU.
    records: RingBuf<MapData>,
    messages: Option<log::Reader>,
    tracepoints: Vec<Link>,
    attached: Attached,
    counting: Option<Counting>,
    detail: Detail,
    told: ToldTargets,
    /// To attach to one more family when the first target of it comes; `None`: no more, or never.
    later: Option<Later>,
}

/// What it takes to attach the hooks tier to one more family.
#[derive(Debug)]
struct Later {
    node: Netns,
    constants: Constants,
}

/// An address and port, and a protocol's number.
type Place = (SocketAddr, u8);

/// What the programs have been told, so that of many targets only what is new has to be.
#[derive(Debug, Default)]
struct ToldTargets {
    /// What is there, and whether it is a former endpoint.
    known: HashMap<Place, (Target, bool)>,
    /// For which there was no room.
    without_room: HashSet<Place>,
}

/// A packet that the ring buffer told of.
#[derive(Clone, Debug)]
pub struct Heard {
    /// The packet.
    pub record: Record,
    /// What it met: see [`Detail::Functions`].
    pub met: Vec<Met>,
}

impl fmt::Debug for Probes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Probes")
            .field("tier", &self.tier)
            .field("detail", &self.detail)
            .field("attached", &self.attached)
            .finish_non_exhaustive()
    }
}

/// A plain value of one of the probes' maps.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Plain<T: Copy>(T);

// SAFETY: every T used below is repr(C), made of integers and arrays of integers, without padding
// that is read, and shared with the kernel programs by the same definition.
unsafe impl<T: Copy + 'static> Pod for Plain<T> {}

impl Probes {
    /// Loads the programs and attaches them for a node's network namespace; `None`: with the tier that this
    /// kernel has.
    ///
    /// # Errors
    ///
    /// The kernel lacks BTF or what the tier needs, or the process lacks `CAP_BPF`, `CAP_PERFMON` or
    /// `CAP_NET_ADMIN`.
    pub fn attach(tier: Option<Tier>, node: &Netns, watch: &Watch) -> Result<Self, ProbeError> {
        let tier = tier.map_or_else(Tier::of_this_kernel, Ok)?;
        let btf = Btf::vmlinux()?;
        let mut constants = constants(btf, node, watch)?;
        if tells_more(tier, watch.detail) {
            constants.insert("DETAILS", 1_u32.to_ne_bytes().to_vec());
            constants.extend(program::numbers(offsets::of_names()?));
        }
        let room = u32::try_from(watch.targets.len().max(1))
            .unwrap_or(u32::MAX)
            .saturating_add(watch.spare);
        let absorbed = watch.absorbed.as_ref().map_or(1, |absorbed| {
            let there = u32::try_from(absorbed.len()).unwrap_or(u32::MAX);
            there.saturating_add(watch.spare).max(1)
        });
        let rooms = [
            ("TARGETS4", room),
            ("TARGETS6", room),
            ("ABSORBED4", absorbed),
            ("ABSORBED6", absorbed),
        ];
        let mut programs = Programs::new(OBJECT, &rooms)?;
        programs.resolve(RDONLY_CAST, offsets::rdonly_cast(btf)?);
        let mut told = ToldTargets::default();
        fill(&mut programs, watch, &mut told)?;
        let tracepoints = catalogue::tracepoints(watch.detail)
            .map(|Tracepoint { name, .. }| {
                let id = btf.typedef_id(&format!("btf_trace_{name}"))?;
                let program = programs.load(name, Kind::Tracepoint(id), &constants)?;
                let fd = program::attach_tracing(&program)?;
                Ok(Link::new(program, fd))
            })
            .collect::<Result<Vec<_>, ProbeError>>()?;
        let attached = match tier {
            Tier::Hooks => hooks::attach(&mut programs, node, watch, &constants)?,
            Tier::Functions => {
                fill_priorities(&mut programs)?;
                functions::attach(&mut programs, watch, &constants)?
            }
        };
        let records = programs
            .take_map("RECORDS")
            .ok_or_else(|| missing("RECORDS"))?;
        Ok(Self {
            tier,
            programs,
            records: RingBuf::try_from(records).map_err(map_error("RECORDS"))?,
            messages: log::reader("kfree_skb"),
            tracepoints,
            attached,
            counting: None,
            detail: watch.detail,
            told,
            later: (tier == Tier::Hooks).then(|| Later {
                node: node.clone(),
                constants,
            }),
        })
    }

    /// What tells where packets are.
    pub const fn tier(&self) -> Tier {
        self.tier
    }

    /// How finely packets are followed.
    pub const fn detail(&self) -> Detail {
        self.detail
    }

    /// Since when packets are watched (`CLOCK_MONOTONIC`, ns): all that follows them was attached by then, and what
    /// was under way before is not seen.
    pub const fn watching_since_ns(&self) -> u64 {
        self.attached.whole_ns
    }

    /// Begins no more journeys: those under way are followed to their ends, and what was counted stays. When the
    /// last could begin (`CLOCK_MONOTONIC`, ns).
    pub fn stop(&mut self) -> u64 {
        self.later = None;
        self.attached.beginnings.iter_mut().for_each(Link::detach);
        monotonic_ns()
    }

    /// Number of tracepoints.
    pub fn tracepoints(&self) -> usize {
        self.tracepoints.len()
    }

    /// Watches these targets, which include those that are watched already.
    ///
    /// # Errors
    ///
    /// The kernel takes them not; that there is no room for them is none: see [`Probes::without_room`].
    pub fn watch_also(&mut self, watch: &Watch) -> Result<(), ProbeError> {
        fill(&mut self.programs, watch, &mut self.told)?;
        self.attach_families(&watch.targets)
    }

    /// Has the probes recognise these too: address, protocol number and what is there.
    ///
    /// # Errors
    ///
    /// As of [`Probes::watch_also`].
    pub fn watch_targets(
        &mut self,
        targets: &[(SocketAddr, u8, Target)],
    ) -> Result<(), ProbeError> {
        let (programs, none) = (&mut self.programs, HashSet::new());
        fill_targets(programs, targets, &none, &mut self.told)?;
        self.attach_families(targets)
    }

    /// Attaches the hooks tier to families whose first target has come by now.
    fn attach_families(&mut self, targets: &[(SocketAddr, u8, Target)]) -> Result<(), ProbeError> {
        let Some(later) = &self.later else {
            return Ok(());
        };
        let placed = &self.attached.placed;
        let is_new = |(address, _, _): &&(SocketAddr, u8, Target)| {
            let family = if address.is_ipv4() { IPV4 } else { IPV6 };
            !placed.iter().any(|placed| placed.family == family)
        };
        let watch = Watch {
            targets: targets.iter().filter(is_new).copied().collect(),
            detail: self.detail,
            ..Watch::default()
        };
        if watch.targets.is_empty() {
            return Ok(());
        }
        let more = hooks::attach(&mut self.programs, &later.node, &watch, &later.constants)?;
        self.attached.links.extend(more.links);
        self.attached.beginnings.extend(more.beginnings);
        self.attached.placed.extend(more.placed);
        Ok(())
    }

    /// For how many targets there was no room: those that came late, where very many did. Their packets are other
    /// packets.
    pub fn without_room(&self) -> usize {
        self.told.without_room.len()
    }

    /// When a packet came from a former endpoint last (`CLOCK_MONOTONIC`, ns); `None` if none did since it is one.
    ///
    /// # Errors
    ///
    /// The kernel does not tell.
    pub fn heard(&self, endpoint: SocketAddr, protocol: u8) -> Result<Option<u64>, ProbeError> {
        let known = match key_of(endpoint, protocol) {
            Key::V4(key) => look_up(&self.programs, "TARGETS4", key)?,
            Key::V6(key) => look_up(&self.programs, "TARGETS6", key)?,
        };
        Ok(known.map(|known| known.heard).filter(|heard| *heard > 0))
    }

    /// Lets the kernel count what the probes cost from here on, which costs a little more.
    pub fn count_run_time(&mut self) -> Result<(), ProbeError> {
        self.counting = Some(Counting::start()?);
        Ok(())
    }

    /// What all probes together cost since [`Probes::count_run_time`]; `None` if that was not asked.
    pub fn run_time(&self) -> Result<Option<RunTime>, ProbeError> {
        if self.counting.is_none() {
            return Ok(None);
        }
        let mut sum = RunTime::default();
        for link in self.tracepoints.iter().chain(self.attached.all()) {
            let RunTime { runs, ns } = link.run_time()?;
            sum.runs += runs;
            sum.ns += ns;
        }
        Ok(Some(sum))
    }

    /// Number of netfilter links, or of programs at functions.
    pub fn links(&self) -> usize {
        self.attached.all().count()
    }

    /// How many boundaries had to make room for somebody else's hooks: the hooks tier.
    pub fn moved(&self) -> usize {
        let placed = self.attached.placed.iter();
        let moved = |placed: &&Placed| {
            catalogue::ALL
                .get(usize::from(placed.boundary))
                .is_some_and(|wish| wish.priority != placed.priority)
        };
        placed.filter(moved).count()
    }

    /// Where each boundary is: the hooks tier.
    pub fn placed(&self) -> &[Placed] {
        &self.attached.placed
    }

    /// The functions that programs are attached to: the functions tier.
    pub fn probed(&self) -> &[Probed] {
        &self.attached.probed
    }

    /// The components that are not seen, though the tier could: the functions tier.
    pub fn missing(&self) -> &[Missing] {
        &self.attached.missing
    }

    /// What the probes counted, over all CPUs.
    pub fn stats(&self) -> Result<Stats, ProbeError> {
        let table: PerCpuArray<_, Plain<Table>> = self.map("TABLE")?;
        let values = table.get(&0, 0).map_err(map_error("TABLE"))?;
        Ok(values.iter().fold(Stats::default(), |sum, cpu| {
            let Stats {
                journeys,
                transmitted,
                delivered,
                dropped,
                dropped_at_socket,
                ring_lost,
                collisions,
                unpaired,
                other,
                timed,
            } = cpu.0.stats;
            Stats {
                journeys: sum.journeys + journeys,
                transmitted: sum.transmitted + transmitted,
                delivered: sum.delivered + delivered,
                dropped: sum.dropped + dropped,
                dropped_at_socket: sum.dropped_at_socket + dropped_at_socket,
                ring_lost: sum.ring_lost + ring_lost,
                collisions: sum.collisions + collisions,
                unpaired: sum.unpaired + unpaired,
                other: sum.other + other,
                timed: sum.timed + timed,
            }
        }))
    }

    /// Every histogram that is not empty, CPUs merged, in a stable order.
    pub fn times(&self) -> Result<Vec<Times>, ProbeError> {
        let map: PerCpuArray<_, Plain<Cells>> = self.map("TIMES")?;
        let mut all = Vec::new();
        // A path's index is its position in ALL.
        for (number, path) in (0..).zip(Path::ALL) {
            for state in state::ALL {
                for stage in catalogue::stages() {
                    let index = histogram_index(number, state.into(), stage.into());
                    let cpus = map.get(&index, 0).map_err(map_error("TIMES"))?;
                    let mut sum = 0;
                    let mut cells = vec![0_u64; CELLS];
                    for cpu in cpus.iter() {
                        sum += cpu.0.sum;
                        for (to, from) in cells.iter_mut().zip(cpu.0.cells) {
                            *to += from;
                        }
                    }
                    let cells: Vec<[u64; 3]> = cells
                        .iter()
                        .enumerate()
                        .filter(|(_, count)| **count > 0)
                        .map(|(cell, count)| {
                            let (low, high) = bounds_of(cell);
                            [low, high, *count]
                        })
                        .collect();
                    if !cells.is_empty() {
                        all.push(Times {
                            path,
                            state,
                            stage,
                            sum,
                            cells,
                        });
                    }
                }
            }
        }
        Ok(all)
    }

    /// Takes everything out of the ring buffer.
    pub fn drain(&mut self) -> Result<Vec<Record>, ProbeError> {
        Ok(self.hear()?.into_iter().map(|heard| heard.record).collect())
    }

    /// The same, with what packets met.
    pub fn hear(&mut self) -> Result<Vec<Heard>, ProbeError> {
        if let Some(messages) = &mut self.messages {
            messages.flush();
        }
        let tells_more = tells_more(self.tier, self.detail);
        let mut all = Vec::new();
        while let Some(bytes) = self.records.next() {
            if tells_more && bytes.len() >= size_of::<Told>() {
                // SAFETY: as below; of met, only what was written is looked at.
                let told = unsafe { bytes.as_ptr().cast::<Told>().read_unaligned() };
                let count = usize::try_from(told.count).unwrap_or(MET).min(MET);
                all.push(Heard {
                    record: told.record,
                    met: told.met[..count].to_vec(),
                });
            } else if bytes.len() >= size_of::<Record>() {
                // SAFETY: Record is repr(C), made of integers and arrays of them, and the bytes
                // were written as one by the kernel program.
                let record = unsafe { bytes.as_ptr().cast::<Record>().read_unaligned() };
                let met = Vec::new();
                all.push(Heard { record, met });
            }
        }
        Ok(all)
    }

    fn map<'a, T>(&'a self, name: &'static str) -> Result<T, ProbeError>
    where
        T: TryFrom<&'a Map, Error = aya::maps::MapError>,
    {
        let map = self.programs.map(name).ok_or_else(|| missing(name))?;
        T::try_from(map).map_err(map_error(name))
    }
}

/// Do records tell what packets met?
fn tells_more(tier: Tier, detail: Detail) -> bool {
    tier == Tier::Functions && detail >= Detail::Functions
}

pub(super) fn missing(name: &'static str) -> ProbeError {
    ProbeError::Map {
        name,
        source: aya::maps::MapError::InvalidName {
            name: name.to_owned(),
        },
    }
}

pub(super) fn map_error(name: &'static str) -> impl Fn(aya::maps::MapError) -> ProbeError {
    move |source| ProbeError::Map { name, source }
}

/// What every program has to know.
fn constants(btf: &Btf, node: &Netns, watch: &Watch) -> Result<Constants, ProbeError> {
    let mut constants: Constants = program::numbers(offsets::offsets(btf)?).collect();
    constants.insert("SAMPLE", watch.sample.max(1).to_ne_bytes().to_vec());
    constants.insert("EMPTY", u32::from(watch.empty).to_ne_bytes().to_vec());
    let may_absorb = u32::from(watch.absorbed.is_some());
    constants.insert("MAY_ABSORB", may_absorb.to_ne_bytes().to_vec());
    let netns = node.number().map_err(ProbeError::Inode)?;
    constants.insert("NETNS", netns.to_ne_bytes().to_vec());
    constants.extend(pod_constants(&watch.pod_cidrs));
    constants.insert(aya_log::LEVEL, vec![log::level()]);
    Ok(constants)
}

fn pod_constants(cidrs: &[(IpAddr, u8)]) -> Vec<(&'static str, Vec<u8>)> {
    let mut constants = vec![
        // No prefix: an address masked with all ones is never the broadcast address.
        ("POD_NET4", u32::MAX.to_be_bytes().to_vec()),
        ("POD_MASK4", u32::MAX.to_be_bytes().to_vec()),
        ("POD_NET6", u64::MAX.to_be_bytes().to_vec()),
        ("POD_MASK6", u64::MAX.to_be_bytes().to_vec()),
    ];
    for (address, prefix) in cidrs {
        match address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(*prefix)).unwrap_or(0);
                constants[0].1 = (u32::from(*address) & mask).to_be_bytes().to_vec();
                constants[1].1 = mask.to_be_bytes().to_vec();
            }
            IpAddr::V6(address) => {
                // The program compares the first half: pod prefixes are at most 64 bits long.
                let high = (u128::from(*address) >> 64) as u64;
                let mask = u64::MAX
                    .checked_shl(64 - u32::from(*prefix).min(64))
                    .unwrap_or(0);
                constants[2].1 = (high & mask).to_be_bytes().to_vec();
                constants[3].1 = mask.to_be_bytes().to_vec();
            }
        }
    }
    constants
}

/// From which priority on a table or chain belongs to which stage.
fn fill_priorities(programs: &mut Programs) -> Result<(), ProbeError> {
    let mut map: Array<_, Plain<[i32; MOST_STAGES]>> = map_mut(programs, "PRIORITIES")?;
    for (at, hook) in (0..).zip(catalogue::priorities()) {
        map.set(at, Plain(hook), 0)
            .map_err(map_error("PRIORITIES"))?;
    }
    Ok(())
}

fn fill_targets(
    programs: &mut Programs,
    targets: &[(SocketAddr, u8, Target)],
    former: &HashSet<Place>,
    told: &mut ToldTargets,
) -> Result<(), ProbeError> {
    let mut targets: Vec<_> = targets.iter().collect();
    targets.retain(|(address, protocol, target)| {
        let key = (*address, *protocol);
        let now = (*target, former.contains(&key));
        told.known.insert(key, now) != Some(now)
    });
    if targets.is_empty() {
        return Ok(());
    }
    let mut map: Array<_, Plain<[u8; PORT_BITS]>> = map_mut(programs, "PORTS")?;
    // What the probes themselves found to answer goes on.
    let mut ports = map.get(&0, 0).map_err(map_error("PORTS"))?.0;
    for (address, _, target) in &targets {
        let port = usize::from(address.port());
        ports[port / 4] |= PORT_IS_DESTINATION << (port % 4 * 2);
        if *target == Target::Pod {
            ports[port / 4] |= PORT_IS_SOURCE << (port % 4 * 2);
        }
    }
    map.set(0, Plain(ports), 0).map_err(map_error("PORTS"))?;

    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for (address, protocol, target) in &targets {
        let known = Known {
            target: *target as u32,
            former: u32::from(former.contains(&(*address, *protocol))),
            heard: 0,
        };
        let place = (*address, *protocol);
        match key_of(*address, *protocol) {
            Key::V4(key) => v4.push((place, key, known)),
            Key::V6(key) => v6.push((place, key, known)),
        }
    }
    know_all(programs, "TARGETS4", v4, told)?;
    know_all(programs, "TARGETS6", v6, told)
}

fn fill(programs: &mut Programs, watch: &Watch, told: &mut ToldTargets) -> Result<(), ProbeError> {
    fill_targets(programs, &watch.targets, &watch.former, told)?;
    if let Some(absorbed) = &watch.absorbed {
        absorb(programs, absorbed)?;
    }
    let nodes = || watch.node_addresses.iter();
    insert_all(
        programs,
        "NODES4",
        nodes().filter_map(|address| match address {
            IpAddr::V4(ip) => Some((ip.octets(), 1)),
            IpAddr::V6(_) => None,
        }),
    )?;
    insert_all(
        programs,
        "NODES6",
        nodes().filter_map(|address| match address {
            IpAddr::V6(ip) => Some((ip.octets(), 1)),
            IpAddr::V4(_) => None,
        }),
    )
}

/// A key of one of the two families' maps.
enum Key {
    V4(Key4),
    V6(Key6),
}

fn key_of(socket: SocketAddr, protocol: u8) -> Key {
    let port = socket.port().to_be_bytes();
    match socket.ip() {
        IpAddr::V4(ip) => Key::V4(Key4 {
            address: ip.octets(),
            port,
            protocol,
            pad: 0,
        }),
        IpAddr::V6(ip) => Key::V6(Key6 {
            address: ip.octets(),
            port,
            protocol,
            pad: 0,
        }),
    }
}

/// What the probes know of a target; `None` if they do not know it.
fn look_up<K: Copy + 'static>(
    programs: &Programs,
    name: &'static str,
    key: K,
) -> Result<Option<Known>, ProbeError> {
    let map = programs.map(name).ok_or_else(|| missing(name))?;
    let map: BpfHashMap<_, Plain<K>, Plain<Known>> =
        BpfHashMap::try_from(map).map_err(map_error(name))?;
    match map.get(&Plain(key), 0) {
        Ok(known) => Ok(Some(known.0)),
        Err(aya::maps::MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(map_error(name)(error)),
    }
}

/// Tells the probes of targets. When a former endpoint was heard is theirs to say, and not overwritten.
fn know_all<K: Copy + 'static>(
    programs: &mut Programs,
    name: &'static str,
    targets: Vec<(Place, K, Known)>,
    told: &mut ToldTargets,
) -> Result<(), ProbeError> {
    let mut map: BpfHashMap<_, Plain<K>, Plain<Known>> = map_mut(programs, name)?;
    for (place, key, known) in targets {
        if known.former != 0
            && let Ok(before) = map.get(&Plain(key), 0)
            && before.0.former != 0
        {
            continue;
        }
        match map.insert(Plain(key), Plain(known), 0) {
            Ok(()) => drop(told.without_room.remove(&place)),
            Err(error) if is_full(&error) => {
                told.known.remove(&place);
                told.without_room.insert(place);
            }
            Err(error) => return Err(map_error(name)(error)),
        }
    }
    Ok(())
}

/// Is there no room for one more in a map?
fn is_full(error: &aya::maps::MapError) -> bool {
    match error {
        aya::maps::MapError::SyscallError(error) => {
            error.io_error.raw_os_error() == Some(libc::E2BIG)
        }
        _ => false,
    }
}

/// Tells the probes which addresses are absorbed, and no others.
fn absorb(programs: &mut Programs, absorbed: &HashSet<IpAddr>) -> Result<(), ProbeError> {
    let (mut v4, mut v6) = (HashSet::new(), HashSet::new());
    for address in absorbed {
        match address {
            IpAddr::V4(ip) => v4.insert(ip.octets()),
            IpAddr::V6(ip) => v6.insert(ip.octets()),
        };
    }
    replace_all(programs, "ABSORBED4", &v4)?;
    replace_all(programs, "ABSORBED6", &v6)?;
    let mut any: Array<_, u32> = map_mut(programs, "ABSORBS")?;
    any.set(0, u32::from(!absorbed.is_empty()), 0)
        .map_err(map_error("ABSORBS"))
}

/// Makes a hash map hold these keys and no others.
fn replace_all<K: Copy + Eq + std::hash::Hash + 'static>(
    programs: &mut Programs,
    name: &'static str,
    wanted: &HashSet<K>,
) -> Result<(), ProbeError> {
    let mut map: BpfHashMap<_, Plain<K>, u32> = map_mut(programs, name)?;
    let there: Result<Vec<_>, _> = map.keys().collect();
    for key in there.map_err(map_error(name))? {
        if !wanted.contains(&key.0) {
            map.remove(&key).map_err(map_error(name))?;
        }
    }
    for key in wanted {
        map.insert(Plain(*key), 1, 0).map_err(map_error(name))?;
    }
    Ok(())
}

/// Puts every entry into one of the hash maps, which is looked up once.
fn insert_all<K: Copy + 'static>(
    programs: &mut Programs,
    name: &'static str,
    entries: impl Iterator<Item = (K, u32)>,
) -> Result<(), ProbeError> {
    let mut map: BpfHashMap<_, Plain<K>, u32> = map_mut(programs, name)?;
    for (key, value) in entries {
        map.insert(Plain(key), value, 0).map_err(map_error(name))?;
    }
    Ok(())
}

fn map_mut<'a, T>(programs: &'a mut Programs, name: &'static str) -> Result<T, ProbeError>
where
    T: TryFrom<&'a mut Map, Error = aya::maps::MapError>,
{
    let map = programs.map_mut(name).ok_or_else(|| missing(name))?;
    T::try_from(map).map_err(map_error(name))
}
