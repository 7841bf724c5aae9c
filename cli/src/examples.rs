// SPDX-License-Identifier: LGPL-2.1-or-later

//! The examples in the help texts and in the man page. tests/examples.rs runs every one of them.

/// An example of a command: what it does, and the command line.
pub struct Example {
    /// The command that it is of: `image info`.
    pub command: &'static str,
    /// What it does.
    pub what: &'static str,
    /// The command line.
    pub line: &'static str,
}

const fn example(command: &'static str, what: &'static str, line: &'static str) -> Example {
    Example { command, what, line }
}

/// All examples, in an order in which each finds what it needs.
pub const ALL: &[Example] = &[
    example("doctor", "Before the first snapshot of a domain", "instantsnap doctor vm1"),
    example(
        "snapshot-create-as",
        "An instant snapshot of a running domain, its files beside its disks",
        "instantsnap snapshot-create-as vm1 before-upgrade",
    ),
    example(
        "snapshot-create-as",
        "Memory and the disk's overlay in other places",
        "instantsnap snapshot-create-as vm1 nightly 'Before the backup' --memspec \
         /backup/vm1.mem --diskspec vda,file=/backup/vm1.qcow2",
    ),
    example(
        "snapshot-create-as",
        "The XML that would be used",
        "instantsnap snapshot-create-as vm1 later --print-xml",
    ),
    example(
        "snapshot-create-as",
        "A QEMU without libvirt, by its QMP socket",
        "instantsnap -c 'qmp:///run/vm2/qmp.sock?state=/var/lib/vm2' snapshot-create-as vm2 \
         before-upgrade",
    ),
    example(
        "snapshot-create",
        "A name and all places by default",
        "instantsnap snapshot-create vm1",
    ),
    example(
        "snapshot-create",
        "As a file says, with each event for a program to read",
        "instantsnap --json snapshot-create vm1 snapshot.xml",
    ),
    example("snapshot-list", "All snapshots", "instantsnap snapshot-list vm1"),
    example("snapshot-list", "How they descend", "instantsnap snapshot-list vm1 --tree"),
    example("snapshot-list", "Names for a script", "instantsnap snapshot-list vm1 --name --leaves"),
    example("snapshot-info", "A summary", "instantsnap snapshot-info vm1 before-upgrade"),
    example(
        "snapshot-info",
        "The current snapshot's, for a program",
        "instantsnap --json snapshot-info vm1 --current",
    ),
    example("snapshot-dumpxml", "All of it", "instantsnap snapshot-dumpxml vm1 before-upgrade"),
    example("snapshot-current", "Its name", "instantsnap snapshot-current vm1 --name"),
    example("snapshot-parent", "Its name", "instantsnap snapshot-parent vm1 nightly"),
    example(
        "image info",
        "What it is of, and how much memory has content",
        "instantsnap image info /backup/vm1.mem",
    ),
    example("image verify", "Before it is needed", "instantsnap image verify /backup/vm1.mem"),
    example(
        "image convert",
        "Pages of zeros take no space on disk",
        "instantsnap image convert -O sparse /backup/vm1.mem",
    ),
    example(
        "image convert",
        "As every libvirt reads it",
        "instantsnap image convert -O raw /backup/vm1.mem",
    ),
    example(
        "snapshot-delete",
        "One snapshot",
        "instantsnap snapshot-delete vm1 nightly --children",
    ),
    example(
        "snapshot-delete",
        "Only what is known of it; its files stay",
        "instantsnap -c 'qmp:///run/vm2/qmp.sock?state=/var/lib/vm2' snapshot-delete vm2 \
         before-upgrade --metadata",
    ),
    example(
        "snapshot-revert",
        "A domain of libvirt's",
        "instantsnap snapshot-revert vm1 before-upgrade",
    ),
    example(
        "recover",
        "After a crash of the host, before QEMU is started again",
        "instantsnap -c 'qmp:///run/vm2/qmp.sock?state=/var/lib/vm2' recover vm2 --offline",
    ),
];

/// The examples of a command, as its help shows them.
pub fn of(command: &str) -> String {
    let shown = ALL
        .iter()
        .filter(|example| example.command == command)
        .map(|example| format!("\n  {}:\n    {}", example.what, example.line));
    format!("Examples:{}", shown.collect::<String>())
}
