//! The flags of a snapshot and their rules, as one table.
//!
//! Codes and wording follow libvirt: the rules of its public API, then its driver's, then those of
//! INSTANT. What a way in has not built is its own affair ([`Flags::require_built`]).

use crate::error::{Code, Error, Result};

/// Restore or alter metadata.
pub const REDEFINE: u32 = 1 << 0;
/// With REDEFINE, make the snapshot current.
pub const CURRENT: u32 = 1 << 1;
/// Make the snapshot without recording it.
pub const NO_METADATA: u32 = 1 << 2;
/// End the guest when the snapshot is complete.
pub const HALT: u32 = 1 << 3;
/// Disks without memory.
pub const DISK_ONLY: u32 = 1 << 4;
/// Use overlay files that exist.
pub const REUSE_EXT: u32 = 1 << 5;
/// Freeze the guest's file systems.
pub const QUIESCE: u32 = 1 << 6;
/// All disks or none.
pub const ATOMIC: u32 = 1 << 7;
/// While the guest runs.
pub const LIVE: u32 = 1 << 8;
/// Validate the XML against libvirt's schema.
pub const VALIDATE: u32 = 1 << 9;
/// The snapshot is of the moment of the call; the guest runs on while its memory is written.
pub const INSTANT: u32 = 1 << 10;

/// One flag: its name in C, its bit, what it needs and what it excludes.
#[derive(Debug)]
pub struct Rule {
    /// The name in C, less `VIR_DOMAIN_SNAPSHOT_CREATE_`.
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

/// Every flag with its rules.
pub const TABLE: [Rule; 11] = [
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
];

/// How a snapshot is to be brought back.
pub mod revert {
    use super::{Result, invalid};

    /// Run after revert.
    pub const RUNNING: u32 = 1 << 0;
    /// Paused after revert.
    pub const PAUSED: u32 = 1 << 1;
    /// Allow risky reverts.
    pub const FORCE: u32 = 1 << 2;
    /// UEFI variables from their template.
    pub const RESET_NVRAM: u32 = 1 << 3;

    /// An error where they break a rule.
    pub fn check(bits: u32) -> Result<()> {
        let unknown = bits & !(RUNNING | PAUSED | FORCE | RESET_NVRAM);
        if unknown != 0 {
            return invalid(format!(
                "unsupported flags (0x{unknown:x}): not a snapshot revert flag"
            ));
        }
        if bits & RUNNING != 0 && bits & PAUSED != 0 {
            return invalid(
                "flags 'VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING' and \
                 'VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED' are mutually exclusive",
            );
        }
        Ok(())
    }
}

/// How a snapshot is to be deleted.
pub mod delete {
    use super::{Result, invalid};

    /// Also delete children.
    pub const CHILDREN: u32 = 1 << 0;
    /// Delete just metadata.
    pub const METADATA_ONLY: u32 = 1 << 1;
    /// Delete just children.
    pub const CHILDREN_ONLY: u32 = 1 << 2;

    /// An error where they break a rule.
    pub fn check(bits: u32) -> Result<()> {
        let unknown = bits & !(CHILDREN | METADATA_ONLY | CHILDREN_ONLY);
        if unknown != 0 {
            return invalid(format!(
                "unsupported flags (0x{unknown:x}): not a snapshot deletion flag"
            ));
        }
        if bits & CHILDREN != 0 && bits & CHILDREN_ONLY != 0 {
            return invalid(
                "flags 'VIR_DOMAIN_SNAPSHOT_DELETE_CHILDREN' and \
                 'VIR_DOMAIN_SNAPSHOT_DELETE_CHILDREN_ONLY' are mutually exclusive",
            );
        }
        Ok(())
    }
}

fn invalid<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::new(Code::InvalidArg, message))
}

/// A set of flags that breaks no rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags(u32);

impl Flags {
    /// Checks every rule of the table.
    pub fn check(bits: u32) -> Result<Flags> {
        let unknown = TABLE.iter().fold(bits, |left, rule| left & !rule.bit);
        if unknown != 0 {
            return invalid(format!(
                "unsupported flags (0x{unknown:x}): not a snapshot creation flag"
            ));
        }
        for rule in TABLE.iter().filter(|rule| bits & rule.bit != 0) {
            if let Some(other) = first(bits & rule.excludes) {
                return invalid(format!(
                    "flags '{}' and '{}' are mutually exclusive",
                    full(rule),
                    full(other)
                ));
            }
            if let Some(other) = first(rule.requires & !bits) {
                return invalid(format!(
                    "flag '{}' is required by flag '{}'",
                    full(other),
                    full(rule)
                ));
            }
        }
        Ok(Flags(bits))
    }

    /// Refuses flags that a way in has not built. LIVE without INSTANT is one of its own: it asks
    /// for a snapshot whose moment is the end of a migration.
    pub fn require_built(self, built: u32) -> Result<()> {
        let missing = match first(self.0 & !built) {
            Some(rule) => full(rule),
            None if self.has(LIVE) && !self.has(INSTANT) => {
                format!("{}' without '{}", full(named(LIVE)), full(named(INSTANT)))
            }
            None => return Ok(()),
        };
        Err(Error::new(
            Code::OperationUnsupported,
            format!("flag '{missing}' is not supported for this guest yet"),
        ))
    }

    /// Whether this bit is set.
    pub fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }
}

fn first(bits: u32) -> Option<&'static Rule> {
    TABLE.iter().find(|rule| bits & rule.bit != 0)
}

fn named(bit: u32) -> &'static Rule {
    first(bit).expect("a flag of the table")
}

fn full(rule: &Rule) -> String {
    format!("VIR_DOMAIN_SNAPSHOT_CREATE_{}", rule.name)
}
