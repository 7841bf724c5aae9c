// SPDX-License-Identifier: LGPL-2.1-or-later

//! The flags of snapshots and their rules, with one table for each kind of flags.
//!
//! In C, flags are a number. `ffi/` and `preload/` parse it, and everything below them takes
//! [`CreateFlags`], [`RevertFlags`] and [`DeleteFlags`], which break no rule. So flags are bare
//! numbers only in `ffi/`, in `preload/` and in `libvirt/`, because libvirt's functions take
//! numbers.
//!
//! Error codes and messages follow libvirt: first the rules of its public API, then those of its
//! driver, then those of INSTANT. Each backend says itself which flags it supports
//! ([`CreateFlags::require_supported`]).

use crate::error::{Code, Error, Result};

/// Restore or alter metadata.
pub const REDEFINE: u32 = 1 << 0;
/// With REDEFINE, make the snapshot current.
pub const CURRENT: u32 = 1 << 1;
/// Make the snapshot without recording it.
pub const NO_METADATA: u32 = 1 << 2;
/// End the guest when the snapshot is complete.
pub const HALT: u32 = 1 << 3;
/// Only disks, without memory.
pub const DISK_ONLY: u32 = 1 << 4;
/// Use overlay files that exist.
pub const REUSE_EXT: u32 = 1 << 5;
/// Freeze the guest's file systems.
pub const QUIESCE: u32 = 1 << 6;
/// All disks or none.
pub const ATOMIC: u32 = 1 << 7;
/// Keep the guest running.
pub const LIVE: u32 = 1 << 8;
/// Validate the XML against libvirt's schema.
pub const VALIDATE: u32 = 1 << 9;
/// The snapshot is of the moment of the call; the guest runs on while its memory is written.
pub const INSTANT: u32 = 1 << 10;

/// The numbers of [`RevertFlags`].
pub mod revert {
    /// The guest runs after the revert.
    pub const RUNNING: u32 = 1 << 0;
    /// The guest is paused after the revert.
    pub const PAUSED: u32 = 1 << 1;
    /// Allow risky reverts.
    pub const FORCE: u32 = 1 << 2;
    /// Make the UEFI variables from their template.
    pub const RESET_NVRAM: u32 = 1 << 3;
}

/// The numbers of [`DeleteFlags`].
pub mod delete {
    /// Also delete children.
    pub const CHILDREN: u32 = 1 << 0;
    /// Delete just metadata.
    pub const METADATA_ONLY: u32 = 1 << 1;
    /// Delete just children.
    pub const CHILDREN_ONLY: u32 = 1 << 2;
}

/// One flag: its name in C, its bit, the flags that it requires and those that it excludes.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The name in C, without the table's prefix.
    pub name: &'static str,
    /// Its bit.
    pub bit: u32,
    /// Bits that must be set with it.
    pub requires: u32,
    /// Bits that must not be set with it.
    pub excludes: u32,
}

const fn rule(name: &'static str, bit: u32, requires: u32, excludes: u32) -> Rule {
    Rule { name, bit, requires, excludes }
}

/// All flags of one kind.
#[derive(Debug)]
pub struct Table {
    /// The prefix of their names in C.
    prefix: &'static str,
    /// The operation that they belong to, for messages.
    of: &'static str,
    /// The flags.
    rules: &'static [Rule],
}

const CREATE: Table = Table {
    prefix: "VIR_DOMAIN_SNAPSHOT_CREATE_",
    of: "creation",
    rules: &[
        rule("REDEFINE", REDEFINE, 0, NO_METADATA | HALT | LIVE | INSTANT),
        rule("CURRENT", CURRENT, REDEFINE, 0),
        rule("NO_METADATA", NO_METADATA, 0, 0),
        rule("HALT", HALT, 0, 0),
        rule("DISK_ONLY", DISK_ONLY, 0, INSTANT),
        rule("REUSE_EXT", REUSE_EXT, 0, 0),
        rule("QUIESCE", QUIESCE, DISK_ONLY, 0),
        rule("ATOMIC", ATOMIC, 0, 0),
        rule("LIVE", LIVE, 0, 0),
        rule("VALIDATE", VALIDATE, 0, 0),
        rule("INSTANT", INSTANT, LIVE, 0),
    ],
};

const REVERT: Table = Table {
    prefix: "VIR_DOMAIN_SNAPSHOT_REVERT_",
    of: "revert",
    rules: &[
        rule("RUNNING", revert::RUNNING, 0, revert::PAUSED),
        rule("PAUSED", revert::PAUSED, 0, 0),
        rule("FORCE", revert::FORCE, 0, 0),
        rule("RESET_NVRAM", revert::RESET_NVRAM, 0, 0),
    ],
};

const DELETE: Table = Table {
    prefix: "VIR_DOMAIN_SNAPSHOT_DELETE_",
    of: "deletion",
    rules: &[
        rule("CHILDREN", delete::CHILDREN, 0, delete::CHILDREN_ONLY),
        rule("METADATA_ONLY", delete::METADATA_ONLY, 0, 0),
        rule("CHILDREN_ONLY", delete::CHILDREN_ONLY, 0, 0),
    ],
};

/// A rule that the flags break.
#[derive(Clone, Copy)]
enum Broken {
    Unknown(u32),
    Excludes(Rule, Rule),
    Requires(Rule, Rule),
}

impl Table {
    /// The flag's name in C.
    pub fn name(&self, rule: &Rule) -> String {
        format!("{}{}", self.prefix, rule.name)
    }

    /// The number, if it breaks no rule.
    fn check(&self, bits: u32) -> Result<u32> {
        let message = match self.broken(bits) {
            None => return Ok(bits),
            Some(Broken::Unknown(bits)) => {
                format!("unsupported flags (0x{bits:x}): not a snapshot {} flag", self.of)
            }
            Some(Broken::Excludes(rule, other)) => {
                let (one, other) = (self.name(&rule), self.name(&other));
                format!("flags '{one}' and '{other}' are mutually exclusive")
            }
            Some(Broken::Requires(rule, other)) => {
                let (one, other) = (self.name(&rule), self.name(&other));
                format!("flag '{other}' is required by flag '{one}'")
            }
        };
        Err(Error::new(Code::InvalidArg, message))
    }

    const fn broken(&self, bits: u32) -> Option<Broken> {
        let (mut unknown, mut n) = (bits, 0);
        while n < self.rules.len() {
            unknown &= !self.rules[n].bit;
            n += 1;
        }
        if unknown != 0 {
            return Some(Broken::Unknown(unknown));
        }
        n = 0;
        while n < self.rules.len() {
            let rule = self.rules[n];
            if bits & rule.bit != 0 {
                if let Some(other) = self.first(bits & rule.excludes) {
                    return Some(Broken::Excludes(rule, other));
                }
                if let Some(other) = self.first(rule.requires & !bits) {
                    return Some(Broken::Requires(rule, other));
                }
            }
            n += 1;
        }
        None
    }

    /// The first flag of the table whose bit is set.
    const fn first(&self, bits: u32) -> Option<Rule> {
        let mut n = 0;
        while n < self.rules.len() {
            if bits & self.rules[n].bit != 0 {
                return Some(self.rules[n]);
            }
            n += 1;
        }
        None
    }
}

/// The flags of a creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateFlags(u32);

impl CreateFlags {
    /// Checks a number by the rules.
    pub fn parse(bits: u32) -> Result<CreateFlags> {
        CREATE.check(bits).map(CreateFlags)
    }

    /// Flags that the program itself names. In a constant, the compiler checks them.
    pub const fn constant(bits: u32) -> CreateFlags {
        assert!(CREATE.broken(bits).is_none(), "the flags break a rule");
        CreateFlags(bits)
    }

    /// The number, for libvirt.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Refuses flags that a backend does not support. LIVE without INSTANT is refused too: it asks
    /// for a snapshot of the end of a migration.
    pub fn require_supported(self, supported: CreateFlags) -> Result<()> {
        let name = |bit| CREATE.first(bit).map(|rule| CREATE.name(&rule));
        let missing = match name(self.0 & !supported.0) {
            Some(name) => name,
            None if self.is_live() && !self.is_instant() => {
                let [live, instant] = [LIVE, INSTANT].map(|bit| name(bit).unwrap_or_default());
                format!("{live}' without '{instant}")
            }
            None => return Ok(()),
        };
        Err(Error::new(
            Code::OperationUnsupported,
            format!("flag '{missing}' is not supported for this guest yet"),
        ))
    }

    /// The flags for a guest that does not run.
    pub fn without_instant(self) -> CreateFlags {
        CreateFlags(self.0 & !(INSTANT | LIVE))
    }

    /// Whether the snapshot is of the moment of the call.
    pub fn is_instant(self) -> bool {
        self.has(INSTANT)
    }

    /// Whether the guest keeps running.
    pub fn is_live(self) -> bool {
        self.has(LIVE)
    }

    /// Whether the snapshot is recorded.
    pub fn keeps_metadata(self) -> bool {
        !self.has(NO_METADATA)
    }

    /// Whether the guest is ended when the snapshot is complete.
    pub fn halts(self) -> bool {
        self.has(HALT)
    }

    /// Whether existing overlay files are used.
    pub fn reuses_overlays(self) -> bool {
        self.has(REUSE_EXT)
    }

    /// Whether the XML is validated against libvirt's schema.
    pub fn validates(self) -> bool {
        self.has(VALIDATE)
    }

    fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }
}

/// Whether flags that are not parsed yet ask for a LIVE snapshot with memory without INSTANT. Such
/// a snapshot can be upgraded.
pub const fn is_only_live(bits: u32) -> bool {
    bits & (LIVE | INSTANT | DISK_ONLY | REDEFINE) == LIVE
}

/// The flags of a revert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RevertFlags(u32);

impl RevertFlags {
    /// Checks a number by the rules.
    pub fn parse(bits: u32) -> Result<RevertFlags> {
        REVERT.check(bits).map(RevertFlags)
    }

    /// The number, for libvirt.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether the guest runs after the revert; `None`: as it did at the instant.
    pub fn runs(self) -> Option<bool> {
        match self.0 & (revert::RUNNING | revert::PAUSED) {
            0 => None,
            bits => Some(bits == revert::RUNNING),
        }
    }

    /// Whether risky reverts are allowed.
    pub fn is_forced(self) -> bool {
        self.0 & revert::FORCE != 0
    }

    /// Whether the UEFI variables are made from their template.
    pub fn resets_nvram(self) -> bool {
        self.0 & revert::RESET_NVRAM != 0
    }
}

/// The flags of a delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeleteFlags(u32);

impl DeleteFlags {
    /// Only this snapshot, with its files.
    pub const NONE: DeleteFlags = DeleteFlags(0);
    /// Only its metadata.
    pub const METADATA_ONLY: DeleteFlags = DeleteFlags(delete::METADATA_ONLY);
    /// Only its children, with their files.
    pub const CHILDREN_ONLY: DeleteFlags = DeleteFlags(delete::CHILDREN_ONLY);

    /// Checks a number by the rules.
    pub fn parse(bits: u32) -> Result<DeleteFlags> {
        DELETE.check(bits).map(DeleteFlags)
    }

    /// The number, for libvirt.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether only metadata is deleted, perhaps that of children too.
    pub fn is_metadata_only(self) -> bool {
        self.0 & delete::METADATA_ONLY != 0
    }

    /// Whether the snapshot itself stays.
    pub fn is_children_only(self) -> bool {
        self.0 & delete::CHILDREN_ONLY != 0
    }
}
