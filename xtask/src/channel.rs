//! What guest and host say to each other: frames on a one-way byte stream.
//!
//! The stream is the port of an ISA debug console. A byte written there is in the host's hands
//! before the guest's next instruction, without an interrupt, a queue or a wait, so the speed
//! of the host cannot be seen by the guest and the virtual clock stays exact. The other
//! direction does not exist: what the guest must know travels in its initramfs.
//!
//! A frame is `magic (2) | kind (1) | length (4, LE) | payload | crc32 of kind, length and
//! payload (4, LE)`. A file is one header frame, then frames of deflated bytes; the header
//! carries the plain length and SHA-256.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use anyhow::{Context, Result, bail, ensure};
use flate2::{Compression, Crc, read::DeflateDecoder, write::DeflateEncoder};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The I/O port of the debug console.
pub(crate) const PORT: u16 = 0xe9;
/// Changes whenever frames or payloads change.
pub(crate) const VERSION: u32 = 1;

const MAGIC: [u8; 2] = [0xa5, b'S'];
/// No frame is longer; a longer length is a broken stream, not a long frame.
const LONGEST: usize = 1 << 20;
const CHUNK: usize = 64 << 10;

/// What the guest is to do: `/job.json` in its initramfs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Job {
    /// Program and arguments; the program is looked up in the guest's `PATH`.
    pub(crate) argv: Vec<String>,
    /// Added to the guest's environment.
    pub(crate) env: BTreeMap<String, String>,
    /// Where it runs.
    pub(crate) cwd: String,
}

/// The first frame: the guest is up and about to start the job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ready {
    /// [`VERSION`] of the guest's side.
    pub(crate) version: u32,
    /// `uname -r`.
    pub(crate) kernel: String,
    /// The kernel's current clock source.
    pub(crate) clocksource: String,
}

/// One finished file of `/out`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    /// Path below `/out`.
    name: String,
    length: u64,
    packed: u64,
    sha256: String,
}

/// What a frame means to the host.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event {
    /// The guest is up.
    Ready(Ready),
    /// A line of the job's standard output, without its newline.
    Stdout(Vec<u8>),
    /// A line of the job's standard error, without its newline.
    Stderr(Vec<u8>),
    /// A complete and checked file.
    File(String, Vec<u8>),
    /// The guest itself could not do what it was asked to.
    Trouble(String),
    /// The job has ended and everything has been sent.
    Exit(i32),
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Ready = 1,
    Stdout = 2,
    Stderr = 3,
    Header = 4,
    Bytes = 5,
    Trouble = 6,
    Exit = 7,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::Ready,
            Self::Stdout,
            Self::Stderr,
            Self::Header,
            Self::Bytes,
            Self::Trouble,
            Self::Exit,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

/// The guest's end.
pub(crate) struct Sender<W> {
    out: W,
}

impl<W: Write> Sender<W> {
    /// Frames go to `out`.
    pub(crate) fn new(out: W) -> Self {
        Self { out }
    }

    fn frame(&mut self, kind: Kind, payload: &[u8]) -> io::Result<()> {
        let length = u32::try_from(payload.len())
            .ok()
            .filter(|length| *length as usize <= LONGEST)
            .ok_or_else(|| io::Error::other("frame too long"))?;
        let mut frame = Vec::with_capacity(payload.len() + 11);
        frame.extend(MAGIC);
        frame.push(kind as u8);
        frame.extend(length.to_le_bytes());
        frame.extend(payload);
        let crc = crc(&frame[2..]);
        frame.extend(crc.to_le_bytes());
        self.out.write_all(&frame)
    }

    /// The guest is up.
    pub(crate) fn ready(&mut self, ready: &Ready) -> io::Result<()> {
        self.frame(Kind::Ready, &serde_json::to_vec(ready)?)
    }

    /// A line of standard output; what exceeds a frame follows in further ones.
    pub(crate) fn stdout(&mut self, line: &[u8]) -> io::Result<()> {
        self.line(Kind::Stdout, line)
    }

    /// A line of standard error.
    pub(crate) fn stderr(&mut self, line: &[u8]) -> io::Result<()> {
        self.line(Kind::Stderr, line)
    }

    fn line(&mut self, kind: Kind, line: &[u8]) -> io::Result<()> {
        if line.is_empty() {
            return self.frame(kind, line);
        }
        line.chunks(LONGEST)
            .try_for_each(|part| self.frame(kind, part))
    }

    /// A whole file.
    pub(crate) fn file(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        // Packed here because the port takes one byte at a time.
        let mut packer = DeflateEncoder::new(Vec::new(), Compression::fast());
        packer.write_all(content)?;
        let packed = packer.finish()?;
        let header = Header {
            name: name.to_owned(),
            length: content.len() as u64,
            packed: packed.len() as u64,
            sha256: sha256_hex(content),
        };
        self.frame(Kind::Header, &serde_json::to_vec(&header)?)?;
        packed
            .chunks(CHUNK)
            .try_for_each(|part| self.frame(Kind::Bytes, part))
    }

    /// The guest cannot go on.
    pub(crate) fn trouble(&mut self, what: &str) -> io::Result<()> {
        self.frame(Kind::Trouble, what.as_bytes())
    }

    /// Everything has been sent.
    pub(crate) fn exit(&mut self, code: i32) -> io::Result<()> {
        self.frame(Kind::Exit, &code.to_le_bytes())
    }
}

/// The host's end: takes bytes as they come, gives events as they are complete.
#[derive(Default)]
pub(crate) struct Receiver {
    buffer: Vec<u8>,
    file: Option<(Header, Vec<u8>)>,
}

impl Receiver {
    /// Takes the next bytes of the stream and hands every event that they complete to `each`.
    pub(crate) fn feed(
        &mut self,
        bytes: &[u8],
        each: &mut dyn FnMut(Event) -> Result<()>,
    ) -> Result<()> {
        self.buffer.extend(bytes);
        let mut at = 0;
        while let Some((kind, payload, next)) = next_frame(&self.buffer, at)? {
            let payload = self.buffer[payload].to_vec();
            at = next;
            if let Some(event) = self.event(kind, payload)? {
                each(event)?;
            }
        }
        self.buffer.drain(..at);
        Ok(())
    }

    fn event(&mut self, kind: Kind, payload: Vec<u8>) -> Result<Option<Event>> {
        ensure!(
            self.file.is_none() || kind == Kind::Bytes,
            "the guest's stream is broken: a file ends early"
        );
        Ok(Some(match kind {
            Kind::Ready => Event::Ready(
                serde_json::from_slice(&payload)
                    .context("the guest's ready frame is unreadable")?,
            ),
            Kind::Stdout => Event::Stdout(payload),
            Kind::Stderr => Event::Stderr(payload),
            Kind::Trouble => Event::Trouble(String::from_utf8_lossy(&payload).into_owned()),
            Kind::Exit => Event::Exit(i32::from_le_bytes(
                payload
                    .try_into()
                    .ok()
                    .context("the guest's exit frame is unreadable")?,
            )),
            Kind::Header => {
                let header: Header = serde_json::from_slice(&payload)
                    .context("the guest's file header is unreadable")?;
                self.file = Some((header, Vec::new()));
                return self.finish_file();
            }
            Kind::Bytes => {
                let Some((_, packed)) = &mut self.file else {
                    bail!("the guest's stream is broken: bytes of no file");
                };
                packed.extend(payload);
                return self.finish_file();
            }
        }))
    }

    fn finish_file(&mut self) -> Result<Option<Event>> {
        let Some((header, packed)) = self
            .file
            .take_if(|(header, packed)| packed.len() as u64 >= header.packed)
        else {
            return Ok(None);
        };
        let mut content = Vec::new();
        DeflateDecoder::new(packed.as_slice())
            .take(header.length + 1)
            .read_to_end(&mut content)
            .with_context(|| format!("{} arrived damaged from the guest", header.name))?;
        ensure!(
            content.len() as u64 == header.length && sha256_hex(&content) == header.sha256,
            "{} arrived damaged from the guest: length or checksum differ",
            header.name
        );
        Ok(Some(Event::File(header.name, content)))
    }
}

type Frame = (Kind, std::ops::Range<usize>, usize);

/// The frame that starts at `at`, if it is all there: its kind, its payload, where the next one starts.
fn next_frame(buffer: &[u8], at: usize) -> Result<Option<Frame>> {
    let rest = &buffer[at..];
    if rest.len() < 7 {
        return Ok(None);
    }
    let length = u32::from_le_bytes([rest[3], rest[4], rest[5], rest[6]]) as usize;
    let kind = Kind::from_byte(rest[2]);
    let (Some(kind), true, true) = (kind, rest[..2] == MAGIC, length <= LONGEST) else {
        bail!("the guest's stream is broken: no frame where one should start");
    };
    let end = 7 + length;
    let Some(sum) = rest.get(end..end + 4) else {
        return Ok(None);
    };
    ensure!(
        sum == crc(&rest[2..end]).to_le_bytes(),
        "the guest's stream is broken: a frame's checksum differs"
    );
    Ok(Some((kind, at + 7..at + end, at + end + 4)))
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// SHA-256 in lower-case hexadecimal.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(&Sha256::digest(bytes))
}

/// A job's `progress 0.42 what is happening`: the fraction and the words.
pub(crate) fn progress(line: &str) -> Option<(f64, &str)> {
    let rest = line.strip_prefix("progress ")?;
    let (fraction, what) = rest.split_once(' ').unwrap_or((rest, ""));
    let fraction: f64 = fraction.parse().ok()?;
    (0.0..=1.0).contains(&fraction).then_some((fraction, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(stream: &[u8], step: usize) -> Result<Vec<Event>> {
        let mut receiver = Receiver::default();
        let mut events = Vec::new();
        for part in stream.chunks(step) {
            receiver.feed(part, &mut |event| {
                events.push(event);
                Ok(())
            })?;
        }
        Ok(events)
    }

    fn conversation() -> (Vec<u8>, Vec<Event>) {
        let ready = Ready {
            version: VERSION,
            kernel: "6.12.1".to_owned(),
            clocksource: "tsc".to_owned(),
        };
        // Long and hard to pack, so that it spans several frames.
        let noise: Vec<u8> = (0..200_000_u32)
            .flat_map(|n| {
                n.wrapping_mul(2_654_435_761)
                    .rotate_left(n % 32)
                    .to_le_bytes()
            })
            .collect();
        let mut sender = Sender::new(Vec::new());
        sender.ready(&ready).expect("in memory");
        sender.stdout(b"one").expect("in memory");
        sender.stderr(b"").expect("in memory");
        sender.file("a/b.json", &noise).expect("in memory");
        sender.file("empty", b"").expect("in memory");
        sender.exit(-3).expect("in memory");
        let events = vec![
            Event::Ready(ready),
            Event::Stdout(b"one".to_vec()),
            Event::Stderr(Vec::new()),
            Event::File("a/b.json".to_owned(), noise),
            Event::File("empty".to_owned(), Vec::new()),
            Event::Exit(-3),
        ];
        (sender.out, events)
    }

    #[test]
    fn whatever_is_sent_arrives_however_it_is_cut() {
        let (stream, expected) = conversation();
        assert!(stream.len() > 5 * CHUNK, "several frames a file");
        for step in [1, 7, 4096, stream.len()] {
            assert_eq!(events(&stream, step).expect("intact"), expected, "{step}");
        }
    }

    #[test]
    fn a_changed_bit_is_noticed_wherever_it_is() {
        let (stream, expected) = conversation();
        for at in [0, 2, 4, 20, stream.len() / 2, stream.len() - 1] {
            let mut broken = stream.clone();
            broken[at] ^= 0x10;
            // A damaged length may leave the host waiting for more: then the exit never comes.
            let got = events(&broken, 4096).ok();
            assert_ne!(got.as_deref(), Some(expected.as_slice()), "{at}");
        }
    }

    #[test]
    fn a_file_cut_short_is_an_error() {
        let mut sender = Sender::new(Vec::new());
        sender.file("cut", b"some bytes").expect("in memory");
        let header = next_frame(&sender.out, 0)
            .expect("intact")
            .expect("whole")
            .2;
        let mut stream = sender.out[..header].to_vec();
        let mut exit = Sender::new(Vec::new());
        exit.exit(0).expect("in memory");
        stream.extend(exit.out);
        let error = events(&stream, 64).expect_err("a file without its bytes");
        assert!(error.to_string().contains("ends early"), "{error}");
    }

    #[test]
    fn progress_lines() {
        assert_eq!(
            progress("progress 0.42 applying rules"),
            Some((0.42, "applying rules"))
        );
        assert_eq!(progress("progress 1"), Some((1.0, "")));
        assert_eq!(progress("progress 1.5 too far"), None);
        assert_eq!(progress("progress of sorts"), None);
        assert_eq!(progress("no progress 0.1 x"), None);
    }
}
