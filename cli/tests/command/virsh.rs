// SPDX-License-Identifier: LGPL-2.1-or-later

//! A domain of libvirt's: what the command does is what virsh sees, and it says it as virsh does.

use instantsnap_testkit::test;

use super::run::Vm;

/// Text without what the eye does not see.
fn seen(text: &str) -> String {
    let lines = text.lines().map(|line| format!("{}\n", line.trim_end()));
    lines.collect::<String>().trim_end().to_owned()
}

#[test]
fn what_the_command_does_virsh_sees_and_says_in_the_same_words() {
    let vm = Vm::start("vm1");
    let create =
        |words: &[&str]| vm.run(&[&["snapshot-create-as", "vm1"], words].concat()).succeeded();
    let said = create(&["first", "The first & only"]);
    let [instant, created] = said.lines().collect::<Vec<_>>()[..] else { panic!("{said}") };
    assert!(instant.starts_with("The guest may be changed now; it was paused "), "{said}");
    assert_eq!(created, "Domain snapshot first created");
    create(&["--name", "Second"]);
    vm.guest.wait_ticks(2);

    // The files are beside the disk, where libvirt has them too.
    let disk = vm.guest.disks()[0].file.clone();
    let directory = disk.parent().unwrap();
    assert!(directory.join("vm1.first.mem").is_file());
    assert!(disk.with_extension("first").is_file() && disk.with_extension("Second").is_file());

    vm.run(&["snapshot-revert", "vm1", "first"]).succeeded();
    vm.guest.wait_ticks(2);
    assert_eq!(create(&["third", "-q"]), "");

    let daemon = vm.guest.daemon();
    for line in [
        "snapshot-list vm1 --name",
        "snapshot-list vm1 --name --topological",
        "snapshot-list vm1 --tree",
        "snapshot-list vm1 --tree --from first",
        "snapshot-list vm1 --name --roots",
        "snapshot-list vm1 --name --leaves",
        "snapshot-list vm1 --name --no-leaves",
        "snapshot-list vm1 --name --external",
        "snapshot-list vm1 --name --internal",
        "snapshot-list vm1 --name --active --disk-only",
        "snapshot-list vm1 --name --from first",
        "snapshot-list vm1 --name --current --descendants",
        "snapshot-list --domain vm1 --name --from first --descendants",
        "snapshot-info vm1 first",
        "snapshot-info vm1 --current",
        "snapshot-info --domain vm1 --snapshotname Second",
        "snapshot-dumpxml vm1 first",
        "snapshot-dumpxml vm1 first --security-info",
        "snapshot-current vm1",
        "snapshot-current vm1 --name",
        "snapshot-parent vm1 Second",
        "snapshot-parent vm1 --current",
        "snapshot-create-as vm1 n d&x --print-xml --memspec /m,,n,snapshot=external --diskspec \
         vda,file=/x,snapshot=external,driver=qcow2 --diskspec vdb,stype=block,file=/dev/x \
         --diskspec vdc,snapshot=no",
        "snapshot-create-as --domain vm1 n d --print-xml --memspec /m vda,snapshot=external vdb",
    ] {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (ours, theirs) = (vm.run(&words).succeeded(), daemon.virsh(&words));
        assert_eq!(seen(&ours), seen(&theirs), "{line}");
    }
    // virsh, which the kit runs with -q, shows a table without its head then.
    for line in ["snapshot-list vm1", "snapshot-list vm1 --parent"] {
        let words: Vec<&str> = line.split(' ').collect();
        let ours = vm.run(&[&["-q"], words.as_slice()].concat()).succeeded();
        assert_eq!(seen(&ours), seen(&daemon.virsh(&words)), "{line}");
        let head = vm.run(&words).succeeded();
        assert!(head.starts_with(" Name     Creation Time               State"), "{head}");
        assert!(head.ends_with(&ours), "{head}");
    }
    let list = vm.run(&["--json", "snapshot-list", "vm1"]).json();
    assert_eq!(list.as_array().unwrap().len(), 3);
    let first = &list[0];
    assert_eq!((&first["name"], &first["children"]), (&"first".into(), &2.into()), "{list}");
    assert_eq!(first["description"], "The first & only");
    assert_eq!(first["memory_file"], directory.join("vm1.first.mem").to_str().unwrap());

    for (line, part) in [
        ("snapshot-info vm1 frst", "did you mean 'first'?"),
        ("snapshot-delete vm1 other", "instantsnap snapshot-list vm1 shows them"),
        ("snapshot-list vm2", "did you mean 'vm1'?"),
        ("snapshot-create-as vm1 first", "already exists"),
        ("snapshot-parent vm1 first", "has no parent"),
        ("snapshot-create-as vm1 x --diskspec vdq", "vdq"),
    ] {
        let words: Vec<&str> = line.split(' ').collect();
        let said = vm.run(&words).failed(1);
        assert!(said.contains(part), "{line}: {said}");
        assert!(!said.contains("libvirt: "), "{line}: {said}");
    }
    let said = vm.run(&["snapshot-revert", "vm1", "first", "--lazy"]).failed(2);
    assert!(said.contains("--lazy is for qmp: URIs"), "{said}");
    let said = vm.run(&["snapshot-revert", "vm1", "first", "--prepare"]).failed(2);
    assert!(said.contains("qmp: URIs"), "{said}");

    let uuid = vm.guest.virsh("domuuid", &[]);
    let said = vm.run(&["snapshot-delete", uuid.trim(), "first", "--children"]).succeeded();
    assert_eq!(said, "Domain snapshot first deleted\n");
    assert_eq!(vm.run(&["snapshot-list", "vm1", "--name"]).succeeded(), "");
    let said = vm.run(&["snapshot-current", "vm1"]).failed(1);
    assert!(said.contains("has no current snapshot"), "{said}");
    vm.guest.wait_ticks(2);

    vm.guest.virsh("destroy", &[]);
    let said = vm.run(&["snapshot-create-as", "vm1", "a"]).failed(1);
    assert!(said.contains("is shut off") && said.contains("virsh start vm1"), "{said}");
}
