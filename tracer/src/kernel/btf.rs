//! Field offsets, enum names and functions from the BTF of the running kernel and its modules.
//!
//! Rust has no CO-RE relocations, so the probes get the offsets of the fields they read as
//! constants at load time; the same object then runs on any kernel that has BTF.
//! Format: Documentation/bpf/btf.rst; kinds: include/uapi/linux/btf.h.
//!
//! A module's BTF is *split*: its type ids and string offsets go on where vmlinux's end, and what
//! it shares with vmlinux stands only there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Where the kernel shows its own BTF.
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
/// Where the kernel shows its own BTF and that of each loaded module, by name.
const DIRECTORY: &str = "/sys/kernel/btf";

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
    /// There is no such function, or it is inlined wherever it is called.
    #[error("this kernel's BTF has no function '{0}'")]
    NoFunction(String),
}

/// A function, global or static, as its BTF describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// The id of its type, with which a program is attached to it (`attach_btf_id`).
    pub id: u32,
    /// Its parameters' names, in order: a function's parameters differ between kernels.
    pub parameters: Vec<String>,
}

impl Function {
    /// The position of a parameter, from 0.
    pub fn position(&self, parameter: &str) -> Option<usize> {
        self.parameters.iter().position(|name| name == parameter)
    }
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
const KIND_FUNC_PROTO: u32 = 13;
const KIND_TYPE_TAG: u32 = 18;

/// Parsed just far enough to find structures and enums by name: a kernel has some hundred thousand
/// types and a few questions are asked, so names are compared when a question comes.
#[derive(Debug)]
pub struct Btf {
    data: Vec<u8>,
    /// Where its strings begin, and how long they are.
    strings: usize,
    string_length: usize,
    /// Byte offset of each type, by type id counted from [`Btf::first_type`]; without a base, entry
    /// 0 is `void`.
    types: Vec<usize>,
    /// What it goes on from: vmlinux for a module.
    base: Option<&'static Btf>,
}

struct Type<'a> {
    /// Where it stands.
    btf: &'a Btf,
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

    /// A loaded module's BTF (`nf_tables`).
    pub fn module(name: &str) -> Result<Self, BtfError> {
        let path = Path::new(DIRECTORY).join(name);
        let data = std::fs::read(&path).map_err(|source| BtfError::Missing { path, source })?;
        Self::parse_over(data, Some(Self::vmlinux()?))
    }

    /// Parses raw little-endian BTF.
    pub fn parse(data: Vec<u8>) -> Result<Self, BtfError> {
        Self::parse_over(data, None)
    }

    fn parse_over(data: Vec<u8>, base: Option<&'static Self>) -> Result<Self, BtfError> {
        let mut btf = Self {
            data,
            strings: 0,
            string_length: 0,
            types: if base.is_some() { vec![] } else { vec![0] },
            base,
        };
        if btf.u16(0)? != MAGIC {
            return Err(BtfError::Damaged("wrong magic number"));
        }
        let header = btf.u32(4)? as usize;
        let mut at = header + btf.u32(8)? as usize;
        let end = at + btf.u32(12)? as usize;
        btf.strings = header + btf.u32(16)? as usize;
        btf.string_length = btf.u32(20)? as usize;
        while at < end {
            let ty = btf.type_at(at)?;
            let next = ty.body + body_len(ty.kind, ty.vlen)?;
            btf.types.push(at);
            at = next;
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
                let name = self.string(ty.btf.u32(at)?)?;
                Ok((ty.btf.u32(at + 4)?, name.to_owned()))
            })
            .collect()
    }

    /// A function of this object itself: a module's is not looked for in vmlinux, nor the other
    /// way round.
    pub fn function(&self, name: &str) -> Result<Function, BtfError> {
        let id = self
            .find_own(name, &[KIND_FUNC])?
            .ok_or_else(|| BtfError::NoFunction(name.to_owned()))?;
        let prototype = self.type_of(self.type_of(id)?.size_or_id)?;
        if prototype.kind != KIND_FUNC_PROTO {
            return Err(BtfError::Damaged("a function without a prototype"));
        }
        let parameters = (0..prototype.vlen).map(|i| {
            let name = prototype.btf.u32(prototype.body + i * 8)?;
            Ok(self.string(name)?.to_owned())
        });
        Ok(Function {
            id,
            parameters: parameters.collect::<Result<_, BtfError>>()?,
        })
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

    /// The first type of one of these kinds with this name, here or in the base.
    fn find(&self, name: &str, kinds: &[u32]) -> Result<Option<u32>, BtfError> {
        match (self.find_own(name, kinds)?, self.base) {
            (None, Some(base)) => base.find(name, kinds),
            (found, _) => Ok(found),
        }
    }

    fn find_own(&self, name: &str, kinds: &[u32]) -> Result<Option<u32>, BtfError> {
        for (id, at) in (self.first_type()..).zip(&self.types) {
            let kind = (self.u32(at + 4)? >> 24) & 0x1f;
            if id == 0 || !kinds.contains(&kind) {
                continue;
            }
            if self.bytes_of_string(self.u32(*at)?) == Some(name.as_bytes()) {
                return u32::try_from(id)
                    .map(Some)
                    .map_err(|_| BtfError::Damaged("too many types"));
            }
        }
        Ok(None)
    }

    /// The id of the first type that stands here.
    fn first_type(&self) -> usize {
        self.base
            .map_or(0, |base| base.first_type() + base.types.len())
    }

    /// The offset of the first string that stands here.
    fn first_string(&self) -> usize {
        self.base
            .map_or(0, |base| base.first_string() + base.string_length)
    }

    /// Bit offset and type of a member, searched through anonymous members too.
    fn member(&self, id: u32, name: &str) -> Result<Option<(u32, u32)>, BtfError> {
        let ty = self.resolved(id)?;
        if ty.kind != KIND_STRUCT && ty.kind != KIND_UNION {
            return Ok(None);
        }
        for i in 0..ty.vlen {
            let at = ty.body + i * 12;
            let member_name = ty.btf.u32(at)?;
            let member_type = ty.btf.u32(at + 4)?;
            let mut offset = ty.btf.u32(at + 8)?;
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
    fn resolved(&self, mut id: u32) -> Result<Type<'_>, BtfError> {
        // A chain longer than this is a loop.
        for _ in 0..64 {
            let ty = self.type_of(id)?;
            id = match ty.kind {
                KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                    ty.size_or_id
                }
                KIND_ARRAY => ty.btf.u32(ty.body)?,
                _ => return Ok(ty),
            };
        }
        Err(BtfError::Damaged("a type refers to itself"))
    }

    fn type_of(&self, id: u32) -> Result<Type<'_>, BtfError> {
        let index = match ((id as usize).checked_sub(self.first_type()), self.base) {
            (Some(index), _) => index,
            (None, Some(base)) => return base.type_of(id),
            (None, None) => return Err(BtfError::Damaged("type id out of range")),
        };
        let at = *self
            .types
            .get(index)
            .ok_or(BtfError::Damaged("type id out of range"))?;
        if id == 0 {
            return Ok(Type {
                btf: self,
                kind: 0,
                vlen: 0,
                kind_flag: false,
                size_or_id: 0,
                body: 0,
            });
        }
        self.type_at(at)
    }

    fn type_at(&self, at: usize) -> Result<Type<'_>, BtfError> {
        let info = self.u32(at + 4)?;
        Ok(Type {
            btf: self,
            kind: (info >> 24) & 0x1f,
            vlen: (info & 0xffff) as usize,
            kind_flag: info >> 31 != 0,
            size_or_id: self.u32(at + 8)?,
            body: at + 12,
        })
    }

    fn string(&self, offset: u32) -> Result<&str, BtfError> {
        let bytes = self
            .bytes_of_string(offset)
            .ok_or(BtfError::Damaged("no string where one should be"))?;
        std::str::from_utf8(bytes).map_err(|_| BtfError::Damaged("a name is not UTF-8"))
    }

    /// A string without its terminating zero.
    fn bytes_of_string(&self, offset: u32) -> Option<&[u8]> {
        let Some(own) = (offset as usize).checked_sub(self.first_string()) else {
            return self.base?.bytes_of_string(offset);
        };
        let bytes = self.data.get(self.strings + own..)?;
        bytes.split(|byte| *byte == 0).next()
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
        types.extend([reason, 6 << 24 | 1, 4, drop, 7]); // 7
        file(&types, &strings)
    }

    fn file(types: &[u32], strings: &[u8]) -> Vec<u8> {
        let types: Vec<u8> = types.iter().copied().flat_map(u32::to_le_bytes).collect();
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

    /// What a module adds to [`small`]: `int hook(struct outer *n, u32 verdict)` and `struct own { u32
    /// only; struct outer outer; }`, with the names `n` and `outer` from the base.
    fn module() -> Vec<u8> {
        let base = small();
        let length = u32::from_le_bytes(base[20..24].try_into().expect("4 bytes"));
        let strings = &base[base.len() - length as usize..];
        let shared = |name: &str| {
            let name = [b"\0", name.as_bytes(), b"\0"].concat();
            let at = strings
                .windows(name.len())
                .position(|window| window == name);
            u32::try_from(at.expect("there") + 1).expect("small")
        };
        // hook 1, verdict 6, own 14, only 18
        let own = length + 1;
        let mut types = vec![0, 13 << 24 | 2, 1, shared("n"), 6, own + 5, 1]; // 8
        types.extend([own, 12 << 24, 8]); // 9
        types.extend([
            own + 13,
            4 << 24 | 2,
            20,
            own + 17,
            1,
            0,
            shared("outer"),
            6,
            32,
        ]); // 10
        file(&types, b"\0hook\0verdict\0own\0only\0")
    }

    fn split() -> Btf {
        let base = Box::leak(Box::new(Btf::parse(small()).expect("parses")));
        Btf::parse_over(module(), Some(base)).expect("parses")
    }

    #[test]
    fn a_module_goes_on_where_vmlinux_ends() {
        let btf = split();
        let hook = btf.function("hook").expect("there");
        assert_eq!((hook.id, hook.position("verdict")), (9, Some(1)));
        assert_eq!(hook.parameters, ["n", "verdict"]);
        assert_eq!(btf.offset_of("own", "only").expect("there"), 0);
        assert_eq!(btf.offset_of("own", "outer.n.field").expect("there"), 16);
        assert_eq!(btf.offset_of("outer", "inner").expect("there"), 4);
        assert_eq!(btf.enum_names("reason").expect("there")[&7], "DROP");
        let none = btf.function("other").expect_err("not there");
        assert!(none.to_string().contains("no function 'other'"), "{none}");
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
        let base: &Btf = Box::leak(Box::new(Btf::parse(good).expect("parses")));
        let good = module();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            if let Ok(btf) = Btf::parse_over(bad, Some(base)) {
                let _ = btf.offset_of("own", "outer.n.field");
                let _ = btf.function("hook");
            }
        }
    }

    #[test]
    fn reads_the_running_kernel() {
        let btf = Btf::vmlinux().expect("this kernel has BTF");
        // The first member of struct sk_buff is next, at 0, on every kernel.
        assert_eq!(btf.offset_of("sk_buff", "next").expect("there"), 0);
        assert!(btf.offset_of("sk_buff", "network_header").expect("there") > 0);
        let unicast = btf.function("netlink_unicast").expect("there");
        assert_eq!(unicast.parameters, ["ssk", "skb", "portid", "nonblock"]);
        let reasons = btf.enum_names("skb_drop_reason").expect("there");
        assert!(
            reasons
                .values()
                .any(|name| name.ends_with("NETFILTER_DROP"))
        );
    }
}
