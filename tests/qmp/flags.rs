// SPDX-License-Identifier: LGPL-2.1-or-later

//! The flags of a snapshot: which may be combined, which are implemented, and what each does.

use common::{INSTANTLY, Opened, assert_error, assert_untouched, machine, named, through_proxy};
use instantsnap::error::Code;
use instantsnap::model::flags::CreateFlags;
use instantsnap_testkit::{Binary, test, wait_for};

const NAMES: [&str; 11] = [
    "REDEFINE",
    "CURRENT",
    "NO_METADATA",
    "HALT",
    "DISK_ONLY",
    "REUSE_EXT",
    "QUIESCE",
    "ATOMIC",
    "LIVE",
    "VALIDATE",
    "INSTANT",
];

/// libvirt's values, written down independently.
const REDEFINE: u32 = 0x1;
const CURRENT: u32 = 0x2;
const NO_METADATA: u32 = 0x4;
const HALT: u32 = 0x8;
const DISK_ONLY: u32 = 0x10;
const REUSE_EXT: u32 = 0x20;
const QUIESCE: u32 = 0x40;
const ATOMIC: u32 = 0x80;
const LIVE: u32 = 0x100;
const VALIDATE: u32 = 0x200;
const INSTANT: u32 = 0x400;

/// The table's rules in its order: `None` where the flags are allowed, else the flags that the
/// error message may name.
fn broken_rule(flags: u32) -> Option<u32> {
    let has = |flag: u32| flags & flag != 0;
    let mut named = 0;
    for other in [NO_METADATA, HALT, LIVE, INSTANT] {
        if has(REDEFINE) && has(other) {
            named |= REDEFINE | other;
        }
    }
    if has(CURRENT) && !has(REDEFINE) {
        named |= CURRENT | REDEFINE;
    }
    if has(DISK_ONLY) && has(INSTANT) {
        named |= DISK_ONLY | INSTANT;
    }
    if has(QUIESCE) && !has(DISK_ONLY) {
        named |= QUIESCE | DISK_ONLY;
    }
    if has(INSTANT) && !has(LIVE) {
        named |= INSTANT | LIVE;
    }
    (named != 0).then_some(named)
}

#[track_caller]
fn check(flags: u32) {
    match (CreateFlags::parse(flags), broken_rule(flags)) {
        (Ok(_), None) => {}
        (Err(error), Some(named)) => {
            assert_eq!(error.code, Code::InvalidArg, "{flags:#x}");
            // The message names two flags, both of the broken rule.
            let found: Vec<usize> = (0..NAMES.len())
                .filter(|bit| {
                    error.message.contains(&format!("'VIR_DOMAIN_SNAPSHOT_CREATE_{}'", NAMES[*bit]))
                })
                .collect();
            assert_eq!(found.len(), 2, "{flags:#x}: {error}");
            assert!(found.iter().all(|bit| named & 1 << bit != 0), "{flags:#x}: {error}");
        }
        (result, expected) => panic!("{flags:#x}: {result:?}, expected {expected:?}"),
    }
}

#[test]
fn every_flag_and_every_pair_of_flags_obeys_the_table() {
    check(0);
    for one in 0..NAMES.len() {
        for other in 0..NAMES.len() {
            check(1 << one | 1 << other);
        }
    }
}

#[test]
fn every_combination_of_flags_obeys_the_table() {
    (0..1 << NAMES.len()).for_each(check);
}

#[test]
fn example_combinations_of_flags_are_allowed() {
    for allowed in [
        0,
        LIVE | INSTANT,
        LIVE | INSTANT | ATOMIC,
        LIVE | INSTANT | HALT,
        LIVE | INSTANT | NO_METADATA | REUSE_EXT | VALIDATE,
        REDEFINE,
        REDEFINE | CURRENT,
        REDEFINE | DISK_ONLY,
        DISK_ONLY | QUIESCE,
        DISK_ONLY | NO_METADATA | ATOMIC | REUSE_EXT,
    ] {
        assert!(CreateFlags::parse(allowed).is_ok(), "{allowed:#x}");
    }
}

#[test]
fn unknown_flag_bits_are_refused_with_any_other_flags() {
    for bit in NAMES.len()..32 {
        for rest in [0, LIVE | INSTANT, REDEFINE | LIVE] {
            assert_error(
                CreateFlags::parse(1 << bit | rest),
                Code::InvalidArg,
                &format!("0x{:x}", 1u32 << bit),
            );
        }
    }
    assert_error(CreateFlags::parse(u32::MAX), Code::InvalidArg, "0xfffff800");
}

#[test]
fn invalid_and_unsupported_flags_are_refused_before_anything_is_touched() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 1));
        let before = opened.trace();
        let commands = proxy.commands();
        for (flags, name) in [
            (REDEFINE, "REDEFINE"),
            (REDEFINE | CURRENT, "REDEFINE"),
            (DISK_ONLY, "DISK_ONLY"),
            (DISK_ONLY | QUIESCE, "DISK_ONLY"),
            (VALIDATE, "VALIDATE"),
            (LIVE, "LIVE"),
            (LIVE | INSTANT | VALIDATE, "VALIDATE"),
        ] {
            let name = format!("'VIR_DOMAIN_SNAPSHOT_CREATE_{name}'");
            assert_error(opened.create(&named("s"), flags), Code::OperationUnsupported, &name);
        }
        for flags in [
            INSTANT,
            CURRENT,
            REDEFINE | LIVE,
            QUIESCE,
            DISK_ONLY | INSTANT | LIVE,
            1 << 11,
            1 << 31,
        ] {
            assert_error(opened.create(&named("s"), flags), Code::InvalidArg, "flag");
        }
        // Flags are checked before the XML, which would be an error too.
        assert_error(opened.create("<", INSTANT), Code::InvalidArg, "flag");
        assert_eq!(proxy.commands(), commands, "QEMU was asked");
        assert_untouched(&opened, &before);
    }
}

#[test]
fn live_is_refused_without_a_memory_image() {
    let opened = Opened::start(&machine(&Binary::all()[0], 1));
    let before = opened.trace();
    let xml = "<domainsnapshot><name>s</name><memory snapshot='no'/></domainsnapshot>";
    assert_error(opened.create(xml, INSTANTLY), Code::OperationUnsupported, "external");
    assert_error(opened.create(xml, 0), Code::OperationUnsupported, "external");
    assert_untouched(&opened, &before);
}

#[test]
fn no_metadata_leaves_no_record_and_atomic_is_accepted() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 1));
        opened.create(&named("unrecorded"), INSTANTLY | NO_METADATA).unwrap();
        assert!(opened.handle.store().unwrap().list().unwrap().is_empty());
        assert_eq!(opened.handle.store().unwrap().current().unwrap(), None);
        assert!(opened.state_dir().join("unrecorded.mem").exists());
        let names: Vec<_> = std::fs::read_dir(opened.state_dir())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        let known = [".lock", "unrecorded.mem", "unrecorded.mem.pages"];
        assert!(names.iter().all(|name| known.iter().any(|known| name == known)), "{names:?}");

        opened.create(&named("recorded"), INSTANTLY | ATOMIC).unwrap();
        // An unrecorded snapshot cannot be a parent.
        assert_eq!(opened.record("recorded").parent, None);
        opened.guest.wait_ticks(2);
        opened.restore_clone("recorded");
    }
}

#[test]
fn halt_ends_qemu_and_the_snapshot_can_be_restored() {
    for binary in Binary::any() {
        for flags in [LIVE | INSTANT | HALT, HALT] {
            let opened = Opened::start(&machine(binary, 2));
            let before = opened.guest.wait_ticks(1);
            opened.create(&named("last"), flags).unwrap();
            let ended =
                wait_for(instantsnap_testkit::DEADLINE, || (!opened.guest.alive()).then_some(()));
            assert!(ended.is_some(), "QEMU goes on");
            let after = opened.guest.serial().tick.unwrap();
            let (_clone, first) = opened.restore_clone("last");
            assert!((before..=after + 2).contains(&first), "{before} {first} {after}");
        }
    }
}
