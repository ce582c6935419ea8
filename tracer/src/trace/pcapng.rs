//! Journeys as a pcapng stream (draft-ietf-opsawg-pcapng), which Wireshark, tshark and tcpdump read.
//!
//! One interface, whose packets begin with their IP header. A journey is a packet: its first bytes at
//! the *end* of the journey, the time at which it came, and a comment that says where it came from,
//! what it asked for and what became of it. What else happens, such as a rule change, stands in the list at
//! its own time as a packet that is a line of text, which it has as its comment too.

use super::journey::{Journey, place, spent, time_on_node};
use crate::record::run::Clock;

/// `LINKTYPE_RAW` (tcpdump.org/linktypes.html): packets begin with an IPv4 or IPv6 header.
const LINKTYPE_RAW: u16 = 101;

// Block types (section 4 of the draft).
const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const INTERFACE_STATISTICS: u32 = 5;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;

// Options (sections 3.5, 4.1, 4.2 and 4.6).
const OPT_END: u16 = 0;
const OPT_COMMENT: u16 = 1;
const SHB_HARDWARE: u16 = 2;
const SHB_OS: u16 = 3;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_DESCRIPTION: u16 = 3;
const IF_TSRESOL: u16 = 9;
const ISB_IFRECV: u16 = 4;
const ISB_IFDROP: u16 = 5;

/// Bytes of a packet that are recorded at most: of journeys 64, and of remarks [`MAX_REMARK`].
const SNAPLEN: u32 = 4096;

/// What a remark begins with: its first letter is 0x73, and no IP version is 7.
const REMARK: &str = "svcpath: ";
/// Bytes of a remark that are recorded at most; its comment has more.
const MAX_REMARK: usize = 4096;

/// Ten to the power of minus this is the unit of every time: nanoseconds.
const NANOSECONDS: u8 = 9;

/// Where and with what journeys were recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// The machine's architecture.
    pub hardware: String,
    /// Kernel and release.
    pub os: String,
    /// The program and its version.
    pub program: String,
    /// What was traced: host, namespace, Services.
    pub description: String,
}

/// Turns journeys into blocks. What it makes must be written in the order of making.
#[derive(Clone, Copy, Debug)]
pub struct Encoder {
    clock: Clock,
    offset_ns: i64,
}

impl Encoder {
    /// `offset_ns` is what makes `CLOCK_REALTIME` of `CLOCK_MONOTONIC`:
    /// [`realtime_offset_ns`](crate::kernel::clock::realtime_offset_ns).
    pub const fn new(clock: Clock, offset_ns: i64) -> Self {
        Self { clock, offset_ns }
    }

    /// What a stream begins with: a section and its one interface.
    pub fn begin(self, about: &About) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend(BYTE_ORDER_MAGIC.to_le_bytes());
        body.extend(1_u16.to_le_bytes());
        body.extend(0_u16.to_le_bytes());
        // The section's length is not known: it is a stream.
        body.extend(u64::MAX.to_le_bytes());
        option(&mut body, SHB_HARDWARE, about.hardware.as_bytes());
        option(&mut body, SHB_OS, about.os.as_bytes());
        option(&mut body, SHB_USERAPPL, about.program.as_bytes());
        end_options(&mut body);
        let mut out = block(SECTION_HEADER, &body);

        body.clear();
        body.extend(LINKTYPE_RAW.to_le_bytes());
        body.extend(0_u16.to_le_bytes());
        body.extend(SNAPLEN.to_le_bytes());
        option(&mut body, IF_NAME, b"svcpath");
        option(&mut body, IF_DESCRIPTION, about.description.as_bytes());
        option(&mut body, IF_TSRESOL, &[NANOSECONDS]);
        end_options(&mut body);
        out.extend(block(INTERFACE_DESCRIPTION, &body));
        out
    }

    /// A journey as a packet.
    pub fn journey(self, journey: &Journey) -> Vec<u8> {
        let length = packet_length(&journey.header);
        let captured = journey.header.len().min(length as usize);
        let later = place(journey.first, journey.answer, journey.told_before);
        let comment = format!(
            "{journey}: {}{later}, {} {}",
            journey.end,
            time_on_node(self.clock, journey.elapsed_ns),
            spent(&journey.end)
        );
        self.packet(
            journey.time_ns,
            (&journey.header[..captured], length),
            &comment,
        )
    }

    /// Something that happened at a time (`CLOCK_MONOTONIC`, ns), as a packet that is text.
    pub fn remark(self, time_ns: u64, text: &str) -> Vec<u8> {
        // Readers tell IPv4 and IPv6 by the first four bits: no text may begin with 4 or 6 in them.
        let text = format!("{REMARK}{text}");
        let bytes = &text.as_bytes()[..text.floor_char_boundary(MAX_REMARK)];
        let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
        self.packet(time_ns, (bytes, length), &text)
    }

    /// What a stream ends with, at a time: journeys that were seen, and records that were lost.
    pub fn end(self, time_ns: u64, seen: u64, lost: u64) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend(0_u32.to_le_bytes());
        self.time(&mut body, time_ns);
        option(&mut body, ISB_IFRECV, &seen.to_le_bytes());
        option(&mut body, ISB_IFDROP, &lost.to_le_bytes());
        end_options(&mut body);
        block(INTERFACE_STATISTICS, &body)
    }

    fn packet(self, time_ns: u64, (bytes, length): (&[u8], u32), comment: &str) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend(0_u32.to_le_bytes());
        self.time(&mut body, time_ns);
        body.extend(u32::try_from(bytes.len()).unwrap_or(0).to_le_bytes());
        body.extend(length.to_le_bytes());
        body.extend(bytes);
        pad(&mut body);
        let whole = comment.floor_char_boundary(usize::from(u16::MAX));
        option(&mut body, OPT_COMMENT, &comment.as_bytes()[..whole]);
        end_options(&mut body);
        block(ENHANCED_PACKET, &body)
    }

    /// A time since 1970, its upper half first.
    fn time(self, out: &mut Vec<u8>, monotonic_ns: u64) {
        let ns = monotonic_ns.saturating_add_signed(self.offset_ns);
        out.extend(((ns >> 32) as u32).to_le_bytes());
        out.extend(((ns & 0xffff_ffff) as u32).to_le_bytes());
    }
}

/// The length that an IP header states; that of no header at all is 0.
fn packet_length(header: &[u8]) -> u32 {
    let two = |at: usize| match header.get(at..at + 2) {
        Some(&[high, low]) => u32::from(u16::from_be_bytes([high, low])),
        _ => 0,
    };
    match header.first().map(|first| first >> 4) {
        Some(4) => two(2),
        // The 40 bytes of the header itself are not counted in it.
        Some(6) => two(4) + 40,
        _ => 0,
    }
}

/// A block: its type, its length before and after, and its body, whose length is a multiple of four.
fn block(kind: u32, body: &[u8]) -> Vec<u8> {
    // Options have 16-bit lengths and there are few: it always fits.
    let length = u32::try_from(body.len() + 12).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(body.len() + 12);
    out.extend(kind.to_le_bytes());
    out.extend(length.to_le_bytes());
    out.extend(body);
    out.extend(length.to_le_bytes());
    out
}

fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    // The length has 16 bits: what is longer is cut. Comments are cut before, at a character.
    let length = u16::try_from(value.len()).unwrap_or(u16::MAX);
    let value = &value[..usize::from(length)];
    out.extend(code.to_le_bytes());
    out.extend(length.to_le_bytes());
    out.extend(value);
    pad(out);
}

fn end_options(out: &mut Vec<u8>) {
    option(out, OPT_END, &[]);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use pcap_parser::traits::PcapReaderIterator as _;
    use pcap_parser::{Block, OptionCode, PcapBlockOwned, PcapError, PcapNGReader};
    use proptest::prelude::*;
    use tracer_ebpf::record::HEADER;

    use super::*;
    use crate::trace::journey::End;

    /// A TCP SYN of 60 bytes from 10.244.0.7:51544 to 10.244.0.12:8080, as far as it is recorded.
    fn syn() -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..24].copy_from_slice(&[
            0x45, 0, 0, 60, 0, 0, 0x40, 0, 63, 6, 0, 0, 10, 244, 0, 7, 10, 244, 0, 12, // IPv4
            0xc9, 0x58, 0x1f, 0x90, // ports
        ]);
        bytes
    }

    /// What a reader that is none of ours finds: `(time, captured bytes, original length, comments)` of
    /// each packet, and the last statistics block's counts.
    type Read = (Vec<(u64, Vec<u8>, u32, Vec<String>)>, Option<(u64, u64)>);

    fn read(stream: &[u8]) -> Read {
        let mut reader = PcapNGReader::new(1 << 18, stream).expect("a section");
        let (mut packets, mut counts) = (Vec::new(), None);
        loop {
            let offset = match reader.next() {
                Ok((offset, PcapBlockOwned::NG(block))) => {
                    match block {
                        Block::SectionHeader(section) => {
                            assert_eq!((section.major_version, section.minor_version), (1, 0));
                        }
                        Block::InterfaceDescription(interface) => {
                            assert_eq!(interface.linktype.0, 101);
                            assert_eq!(interface.if_tsresol, 9);
                        }
                        Block::EnhancedPacket(packet) => packets.push((
                            u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low),
                            packet.data[..packet.caplen as usize].to_vec(),
                            packet.origlen,
                            packet
                                .options
                                .iter()
                                .filter(|option| option.code == OptionCode::Comment)
                                .map(|option| {
                                    let value = &option.value[..usize::from(option.len)];
                                    String::from_utf8(value.to_vec()).expect("UTF-8")
                                })
                                .collect(),
                        )),
                        Block::InterfaceStatistics(statistics) => {
                            let count = |code: u16| {
                                let mut all = statistics.options.iter();
                                let option = all.find(|option| option.code.0 == code);
                                let value = option.expect("it is there").value[..8].try_into();
                                u64::from_le_bytes(value.expect("eight bytes"))
                            };
                            counts = Some((count(ISB_IFRECV), count(ISB_IFDROP)));
                        }
                        other => panic!("{other:?} was never written"),
                    }
                    offset
                }
                Ok(_) => panic!("a block that is not of pcapng"),
                Err(PcapError::Eof) => return (packets, counts),
                Err(PcapError::Incomplete(_)) => {
                    reader.refill().expect("there is more");
                    continue;
                }
                Err(error) => panic!("{error}"),
            };
            reader.consume(offset);
        }
    }

    fn encoder() -> Encoder {
        Encoder::new(Clock::Wall, 1_700_000_000_000_000_000)
    }

    fn about() -> About {
        About {
            hardware: "x86_64".to_owned(),
            os: "Linux 6.18".to_owned(),
            program: "svcpath 0.1.0".to_owned(),
            description: "node-1: 12 Services".to_owned(),
        }
    }

    #[test]
    fn another_reader_finds_what_was_written() {
        let journey = Journey {
            time_ns: 5_000_000_001,
            header: syn(),
            ..Journey::sample()
        };
        let headless = Journey {
            end: End::Unknown,
            first: Some(false),
            ..Journey::sample()
        };
        let stream = [
            encoder().begin(&about()),
            encoder().journey(&journey),
            encoder().remark(6, "nft changed rules →"),
            encoder().journey(&headless),
            encoder().end(7, 2, 1),
        ]
        .concat();
        let (packets, counts) = read(&stream);
        assert_eq!(counts, Some((2, 1)));
        let [first, remark, last] = &packets[..] else {
            panic!("{packets:#?}");
        };
        assert_eq!(first.0, 1_700_000_005_000_000_001);
        assert_eq!((&first.1[..], first.2), (&syn()[..60], 60));
        assert_eq!(
            first.3,
            [
                "shop/web:http pod→ClusterIP 10.244.0.7:51544 → 10.96.10.1:80 → 10.244.0.12:8080: sent to its endpoint, 32.0 us on this node"
            ]
        );
        assert_eq!(
            *remark,
            (
                1_700_000_000_000_000_006,
                "svcpath: nft changed rules →".into(),
                30,
                vec!["svcpath: nft changed rules →".to_owned()]
            )
        );
        assert_eq!((last.1.len(), last.2), (0, 0));
        assert!(last.3[0].contains("unknown, established"), "{last:?}");
    }

    #[test]
    fn the_length_is_the_packets_own() {
        let mut long = syn();
        long[2..4].copy_from_slice(&1500_u16.to_be_bytes());
        assert_eq!(packet_length(&long), 1500);
        let mut ipv6 = [0; HEADER];
        ipv6[0] = 0x60;
        ipv6[5] = 20;
        assert_eq!(packet_length(&ipv6), 60);
        assert_eq!(packet_length(&[]), 0);
        assert_eq!(packet_length(&[0x45, 0, 5]), 0);
    }

    #[test]
    fn what_is_too_long_is_cut_at_a_character() {
        let text = "→".repeat(40_000);
        let stream = [encoder().begin(&about()), encoder().remark(0, &text)].concat();
        let (_, bytes, length, mut comments) = read(&stream).0.remove(0);
        assert_eq!(comments.remove(0).chars().count(), 9 + (65_535 - 9) / 3);
        assert_eq!(
            (bytes.len(), length),
            (9 + (4_096 - 9) / 3 * 3, 9 + 3 * 40_000)
        );
    }

    proptest! {
        #[test]
        fn any_journey_can_be_read_back(
            header in proptest::array::uniform32(any::<u8>()),
            time_ns in any::<u64>(),
            service in "\\PC{0,40}",
        ) {
            let mut journey = Journey { time_ns, service, ..Journey::sample() };
            journey.header[..32].copy_from_slice(&header);
            let stream = [encoder().begin(&about()), encoder().journey(&journey)].concat();
            let (packets, _) = read(&stream);
            prop_assert_eq!(packets.len(), 1);
            prop_assert!(packets[0].1.len() <= HEADER);
            prop_assert!(packets[0].3[0].starts_with(&journey.service));
        }
    }
}
