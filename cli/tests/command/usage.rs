// SPDX-License-Identifier: LGPL-2.1-or-later

//! Wrong use is refused before anything is done, and the message says what to type instead.

use std::fs;

use instantsnap_testkit::test;

use super::run::instantsnap;
use super::terminal::Terminal;

#[test]
fn wrong_use_says_what_to_type_instead() {
    for (line, part) in [
        ("list vm1", "type 'instantsnap snapshot-list DOMAIN'"),
        ("create vm1 a", "type 'instantsnap snapshot-create-as DOMAIN NAME'"),
        ("delete vm1 a", "type 'instantsnap snapshot-delete DOMAIN SNAPSHOT'"),
        ("verify a.mem", "type 'instantsnap image verify FILE'"),
        ("domblklist vm1", "virsh has the commands for domains: virsh domblklist"),
        ("snapshot-lst vm1", "a similar subcommand exists: 'snapshot-list'"),
        ("snapshot-list vm1 --tre", "a similar argument exists: '--tree'"),
        ("snapshot-list", "DOMAIN is missing"),
        ("snapshot-list vm1 extra", "unexpected argument 'extra'"),
        ("snapshot-list --domain vm1 extra", "unexpected argument 'extra'"),
        ("snapshot-list vm1 --tree --name", "'--tree' cannot be used with '--name'"),
        ("snapshot-list vm1 --roots --from a", "'--roots' cannot be used with '--from"),
        ("snapshot-info vm1", "SNAPSHOT is missing: name it, or say --current"),
        ("snapshot-info vm1 a --current", "either 'a' or --current"),
        ("snapshot-info --snapshotname a", "DOMAIN is missing"),
        ("snapshot-revert vm1 a --running --paused", "'--running' cannot be used with '--paused'"),
        ("snapshot-revert vm1 a --directory /tmp", "--prepare"),
        ("snapshot-delete vm1 a --children --children-only", "cannot be used with"),
        ("snapshot-create-as vm1 a --disk-only --instant", "cannot be used with '--instant'"),
        ("snapshot-create-as vm1 a --instant --no-instant", "cannot be used with"),
        ("snapshot-create-as vm1 a --quiesce", "--disk-only"),
        ("snapshot-create-as vm1 a --memspec a.mem", "is not an absolute path: write '/"),
        ("snapshot-create-as vm1 a --memspec /a,snapshot=here", "snapshot=external|internal|no"),
        ("snapshot-create-as vm1 a --diskspec vda,/a", "none of snapshot=TYPE"),
        ("snapshot-create-as vm1 a text vda,/a", "unexpected argument 'vda,/a'"),
        ("snapshot-create-as vm1 a --image-format zip", "write raw, sparse or zstd"),
        ("snapshot-create-as vm1 a --disk-only --memspec /a", "drop --memspec"),
        ("snapshot-create vm1 --current", "--redefine"),
        ("-c /run/qmp.sock snapshot-list vm1", "that is a path: write qmp:///PATH/TO/SOCKET"),
        ("-c qmp:///run/qmp.sock snapshot-list vm1", "state=DIR"),
        ("image convert a.mem", "--output-format"),
    ] {
        let words: Vec<&str> = line.split(' ').collect();
        let said = instantsnap(&words).failed(2);
        assert!(said.contains(part), "{line}: {said}");
        assert!(said.contains("--help"), "{line}: {said}");
    }
    let said = instantsnap(&["--json", "daemon", "status"]).failed(2);
    assert!(said.contains("daemon has no --json"), "{said}");
}

#[test]
fn xml_that_makes_no_sense_is_named_with_its_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("snapshot.xml");
    let create = |xml: &str, more: &[&str]| {
        fs::write(&file, xml).unwrap();
        let words = ["-c", "test:///default", "snapshot-create", "test", file.to_str().unwrap()];
        instantsnap(&[&words, more].concat())
    };
    let without_memory = "<domainsnapshot><memory snapshot='no'/></domainsnapshot>";
    let said = create(without_memory, &["--instant"]).failed(2);
    assert!(said.contains("drop one of the two"), "{said}");
    let said = create("<domainsnapshot>", &[]).failed(1);
    assert!(said.contains("snapshot.xml': "), "{said}");
    let said = create("<domainsnapshot><memory snapshot='external'/></domainsnapshot>", &[]);
    let said = said.failed(2);
    assert!(said.contains("<memory> names no file"), "{said}");
    fs::remove_file(&file).unwrap();
    let said = instantsnap(&["snapshot-create", "test", file.to_str().unwrap()]).failed(1);
    assert!(said.contains("cannot read") && said.contains("snapshot.xml"), "{said}");
}

#[test]
fn failures_without_a_guest_are_told_from_wrong_use() {
    let nowhere = "qmp:///nowhere/qmp.sock?state=/nowhere";
    for (words, part) in [
        (vec!["-c", nowhere, "snapshot-list", "vm"], "/nowhere"),
        (
            vec!["-c", "qmp:///x?state=/tmp&domain=/nowhere.xml", "snapshot-list", "vm"],
            "/nowhere.xml",
        ),
        (vec!["-c", "qmp:///x?state=/tmp", "snapshot-info", "vm", "a"], "it has none"),
        (vec!["-c", "qmp:///x?state=/tmp", "snapshot-create-as", "vm", "a/b"], "can't contain '/'"),
        (vec!["-c", "test:///default", "snapshot-list", "tst"], "did you mean 'test'?"),
        (vec!["-c", "test:///default", "snapshot-create-as", "test", "a"], "QEMU"),
        (vec!["-c", "qemu+unix:///session?socket=/nowhere", "snapshot-list", "vm"], "/nowhere"),
        (vec!["image", "info", "/nowhere.mem"], "/nowhere.mem"),
        (vec!["image", "verify", "/etc/passwd", "/nowhere.mem"], "/etc/passwd"),
    ] {
        let said = instantsnap(&words).failed(1);
        assert!(said.starts_with("instantsnap: ") && said.contains(part), "{words:?}: {said}");
        // libvirt does not report its errors beside us.
        assert!(!said.contains("libvirt: "), "{words:?}: {said}");
        let json = instantsnap(&[&["--json"], words.as_slice()].concat()).failed(1);
        let last = json.lines().last().unwrap();
        let json: serde_json::Value = serde_json::from_str(last).unwrap();
        assert!(json["error"]["code"].as_i64().unwrap() > 0, "{json}");
        assert!(said.contains(json["error"]["message"].as_str().unwrap()), "{json}");
    }
}

#[test]
fn help_has_colours_in_a_terminal_unless_the_user_wants_none() {
    let help = |variables: &[(&str, &str)]| {
        let terminal = Terminal::run(super::run::PROGRAM.as_ref(), &["--help"], |command| {
            command.envs(variables.iter().copied());
        });
        let (status, text) = terminal.end();
        assert_eq!(status, Some(0), "{text}");
        text
    };
    assert!(help(&[]).contains("\x1b["));
    assert!(!help(&[("NO_COLOR", "1")]).contains('\x1b'));
    assert!(!instantsnap(&["--help"]).succeeded().contains('\x1b'));
}
