//! Field offsets and enum names from the running kernel's BTF.
//!
//! Rust has no CO-RE relocations, so the probes get the offsets of the fields they read as
//! constants at load time; the same object then runs on any kernel that has BTF.
//! Format: Documentation/bpf/btf.rst; kinds: include/uapi/linux/btf.h.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Where the kernel shows its own BTF.
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// Why a BTF question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The kernel was built without `CONFIG_DEBUG_INFO_BTF`, or sysfs is not mounted.
    #[error(
        "cannot read {path}: {source}; svcpath needs a kernel with BTF (CONFIG_DEBUG_INFO_BTF=y)"
    )]
    Missing {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The file is no BTF or is cut short.
    #[error("BTF is damaged: {0}")]
    Damaged(&'static str),
    /// The kernel has no such structure or enum.
    #[error("this kernel's BTF has no type '{0}'")]
    NoType(String),
    /// The structure has no such field.
    #[error("this kernel's struct {structure} has no field '{field}'")]
    NoField {
        /// The structure.
        structure: String,
        /// The field's path, dots between nested structures.
        field: String,
    },
}

const MAGIC: u16 = 0xeb9f;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC: u32 = 12;
const KIND_TYPE_TAG: u32 = 18;

/// Parsed just far enough to find structures and enums by name: a kernel has some hundred thousand
/// types and a few questions are asked, so names are compared when a question comes.
#[derive(Debug)]
pub struct Btf {
    data: Vec<u8>,
    strings: usize,
    /// Byte offset of each type, by type id; entry 0 is `void`.
    types: Vec<usize>,
}

struct Type {
    kind: u32,
    vlen: usize,
    kind_flag: bool,
    size_or_id: u32,
    /// Where the kind's own data begins.
    body: usize,
}

impl Btf {
    /// The running kernel's BTF, read once.
    pub fn vmlinux() -> Result<&'static Self, BtfError> {
        static READ: OnceLock<Btf> = OnceLock::new();
        if let Some(btf) = READ.get() {
            return Ok(btf);
        }
        let btf = Self::read(Path::new(VMLINUX))?;
        Ok(READ.get_or_init(|| btf))
    }

    /// Reads a raw BTF file.
    pub fn read(path: &Path) -> Result<Self, BtfError> {
        let data = std::fs::read(path).map_err(|source| BtfError::Missing {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(data)
    }

    /// Parses raw little-endian BTF.
    pub fn parse(data: Vec<u8>) -> Result<Self, BtfError> {
        let mut btf = Self {
            data,
            strings: 0,
            types: vec![0],
        };
        if btf.u16(0)? != MAGIC {
            return Err(BtfError::Damaged("wrong magic number"));
        }
        let header = btf.u32(4)? as usize;
        let mut at = header + btf.u32(8)? as usize;
        let end = at + btf.u32(12)? as usize;
        btf.strings = header + btf.u32(16)? as usize;
        while at < end {
            let ty = btf.type_at(at)?;
            btf.types.push(at);
            at = ty.body + body_len(ty.kind, ty.vlen)?;
        }
        Ok(btf)
    }

    /// Byte offset of a field; `field` may lead through nested structures (`ns.inum`), and
    /// anonymous unions and structures are looked through.
    pub fn offset_of(&self, structure: &str, field: &str) -> Result<u32, BtfError> {
        let mut id = self
            .find(structure, &[KIND_STRUCT, KIND_UNION])?
            .ok_or_else(|| BtfError::NoType(format!("struct {structure}")))?;
        let mut bits = 0;
        for name in field.split('.') {
            let (offset, member) = self.member(id, name)?.ok_or_else(|| BtfError::NoField {
                structure: structure.to_owned(),
                field: field.to_owned(),
            })?;
            bits += offset;
            id = member;
        }
        Ok(bits / 8)
    }

    /// Names of an enum's values.
    pub fn enum_names(&self, name: &str) -> Result<BTreeMap<u32, String>, BtfError> {
        let id = self
            .find(name, &[KIND_ENUM])?
            .ok_or_else(|| BtfError::NoType(format!("enum {name}")))?;
        let ty = self.type_of(id)?;
        (0..ty.vlen)
            .map(|i| {
                let at = ty.body + i * 8;
                Ok((self.u32(at + 4)?, self.string(self.u32(at)?)?.to_owned()))
            })
            .collect()
    }

    /// The id of a typedef.
    pub fn typedef_id(&self, name: &str) -> Result<u32, BtfError> {
        self.find(name, &[KIND_TYPEDEF])?
            .ok_or_else(|| BtfError::NoType(format!("typedef {name}")))
    }

    /// The id of a structure.
    pub fn structure_id(&self, name: &str) -> Result<u32, BtfError> {
        self.find(name, &[KIND_STRUCT])?
            .ok_or_else(|| BtfError::NoType(format!("struct {name}")))
    }

    /// The id of a function, if there is one of that name.
    pub fn find_function(&self, name: &str) -> Result<Option<u32>, BtfError> {
        self.find(name, &[KIND_FUNC])
    }

    /// The first type of one of these kinds with this name.
    fn find(&self, name: &str, kinds: &[u32]) -> Result<Option<u32>, BtfError> {
        let name = name.as_bytes();
        for (id, at) in self.types.iter().enumerate().skip(1) {
            let kind = (self.u32(at + 4)? >> 24) & 0x1f;
            if !kinds.contains(&kind) {
                continue;
            }
            let begin = self.strings + self.u32(*at)? as usize;
            let found = self.data.get(begin..begin + name.len() + 1);
            if found.is_some_and(|found| found[..name.len()] == *name && found[name.len()] == 0) {
                return u32::try_from(id)
                    .map(Some)
                    .map_err(|_| BtfError::Damaged("too many types"));
            }
        }
        Ok(None)
    }

    /// Bit offset and type of a member, searched through anonymous members too.
    fn member(&self, id: u32, name: &str) -> Result<Option<(u32, u32)>, BtfError> {
        let ty = self.resolved(id)?;
        if ty.kind != KIND_STRUCT && ty.kind != KIND_UNION {
            return Ok(None);
        }
        for i in 0..ty.vlen {
            let at = ty.body + i * 12;
            let member_name = self.u32(at)?;
            let member_type = self.u32(at + 4)?;
            let mut offset = self.u32(at + 8)?;
            if ty.kind_flag {
                offset &= 0x00ff_ffff;
            }
            if member_name == 0 {
                if let Some((inner, found)) = self.member(member_type, name)? {
                    return Ok(Some((offset + inner, found)));
                }
            } else if self.string(member_name)? == name {
                return Ok(Some((offset, member_type)));
            }
        }
        Ok(None)
    }

    /// Follows typedefs, qualifiers and arrays to the type behind them.
    fn resolved(&self, mut id: u32) -> Result<Type, BtfError> {
        // A chain longer than this is a loop.
        for _ in 0..64 {
            let ty = self.type_of(id)?;
            id = match ty.kind {
                KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                    ty.size_or_id
                }
                KIND_ARRAY => self.u32(ty.body)?,
                _ => return Ok(ty),
            };
        }
        Err(BtfError::Damaged("a type refers to itself"))
    }

    fn type_of(&self, id: u32) -> Result<Type, BtfError> {
        let at = *self
            .types
            .get(id as usize)
            .ok_or(BtfError::Damaged("type id out of range"))?;
        if id == 0 {
            return Ok(Type {
                kind: 0,
                vlen: 0,
                kind_flag: false,
                size_or_id: 0,
                body: 0,
            });
        }
        self.type_at(at)
    }

    fn type_at(&self, at: usize) -> Result<Type, BtfError> {
        let info = self.u32(at + 4)?;
        Ok(Type {
            kind: (info >> 24) & 0x1f,
            vlen: (info & 0xffff) as usize,
            kind_flag: info >> 31 != 0,
            size_or_id: self.u32(at + 8)?,
            body: at + 12,
        })
    }

    fn string(&self, offset: u32) -> Result<&str, BtfError> {
        let bytes = self
            .data
            .get(self.strings + offset as usize..)
            .ok_or(BtfError::Damaged("string offset out of range"))?;
        let end = bytes
            .iter()
            .position(|b| *b == 0)
            .ok_or(BtfError::Damaged("unterminated string"))?;
        std::str::from_utf8(&bytes[..end]).map_err(|_| BtfError::Damaged("a name is not UTF-8"))
    }

    fn u32(&self, at: usize) -> Result<u32, BtfError> {
        self.data
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map(u32::from_le_bytes)
            .ok_or(BtfError::Damaged("cut short"))
    }

    fn u16(&self, at: usize) -> Result<u16, BtfError> {
        self.data
            .get(at..at + 2)
            .and_then(|b| b.try_into().ok())
            .map(u16::from_le_bytes)
            .ok_or(BtfError::Damaged("cut short"))
    }
}

/// Bytes that follow `struct btf_type`, by kind.
fn body_len(kind: u32, vlen: usize) -> Result<usize, BtfError> {
    Ok(match kind {
        1 | 14 | 17 => 4,
        2 | 7..=12 | 16 | 18 => 0,
        3 => 12,
        4 | 5 | 15 | 19 => vlen * 12,
        6 | 13 => vlen * 8,
        _ => return Err(BtfError::Damaged("unknown kind of type")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct outer { u32 first; struct { union { u32 a; u32 inner; }; }; struct named n; }` and
    /// an enum, as a compiler would write them.
    fn small() -> Vec<u8> {
        let mut strings = vec![0_u8];
        let mut name = |s: &str| {
            let at = u32::try_from(strings.len()).expect("small");
            strings.extend_from_slice(s.as_bytes());
            strings.push(0);
            at
        };
        let mut types: Vec<u32> = Vec::new();
        let (u, outer, first, a, inner, n, named, field, reason, drop) = (
            name("u32"),
            name("outer"),
            name("first"),
            name("a"),
            name("inner"),
            name("n"),
            name("named"),
            name("field"),
            name("reason"),
            name("DROP"),
        );
        types.extend([u, 1 << 24, 4, 32]); // 1
        types.extend([0, 5 << 24 | 2, 4, a, 1, 0, inner, 1, 0]); // 2: union
        types.extend([0, 4 << 24 | 1, 4, 0, 2, 0]); // 3: anonymous struct
        types.extend([named, 4 << 24 | 2, 8, a, 1, 0, field, 1, 32]); // 4
        types.extend([outer, 4 << 24 | 3, 16, first, 1, 0, 0, 3, 32, n, 5, 64]);
        // 5: a const qualifier between
        types.splice(types.len() - 12..types.len() - 12, [0, 10 << 24, 4]);
        types.extend([reason, 6 << 24 | 1, 4, drop, 7]);
        let types: Vec<u8> = types.into_iter().flat_map(u32::to_le_bytes).collect();
        let mut data = Vec::new();
        data.extend(MAGIC.to_le_bytes());
        data.extend([1, 0]);
        let type_len = u32::try_from(types.len()).expect("small");
        let string_len = u32::try_from(strings.len()).expect("small");
        for word in [24, 0, type_len, type_len, string_len] {
            data.extend(u32::to_le_bytes(word));
        }
        data.extend(types);
        data.extend(strings);
        data
    }

    #[test]
    fn finds_fields_through_anonymous_members_and_qualifiers() {
        let btf = Btf::parse(small()).expect("parses");
        assert_eq!(btf.offset_of("outer", "first").expect("there"), 0);
        assert_eq!(btf.offset_of("outer", "inner").expect("there"), 4);
        assert_eq!(btf.offset_of("outer", "n.field").expect("there"), 12);
        assert_eq!(btf.enum_names("reason").expect("there")[&7], "DROP");
        assert!(matches!(
            btf.offset_of("outer", "nothing"),
            Err(BtfError::NoField { .. })
        ));
        assert!(matches!(
            btf.offset_of("nobody", "x"),
            Err(BtfError::NoType(_))
        ));
    }

    #[test]
    fn damaged_input_is_an_error_not_a_panic() {
        let good = small();
        for len in 0..good.len() {
            let _ = Btf::parse(good[..len].to_vec());
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            if let Ok(btf) = Btf::parse(bad) {
                let _ = btf.offset_of("outer", "n.field");
                let _ = btf.enum_names("reason");
            }
        }
    }

    #[test]
    fn reads_the_running_kernel() {
        let btf = Btf::vmlinux().expect("this kernel has BTF");
        // The first member of struct sk_buff is next, at 0, on every kernel.
        assert_eq!(btf.offset_of("sk_buff", "next").expect("there"), 0);
        assert!(btf.offset_of("sk_buff", "network_header").expect("there") > 0);
        let reasons = btf.enum_names("skb_drop_reason").expect("there");
        assert!(
            reasons
                .values()
                .any(|name| name.ends_with("NETFILTER_DROP"))
        );
    }
}
