// SPDX-License-Identifier: LGPL-2.1-or-later

//! libvirt's metadata of an instant snapshot: it exists at once, names the right parent, and is
//! complete and true.

use std::path::Path;

use common::backend::by_client_only;
use common::virt::{self, Clones, OpenedDomain};
use common::{At, INSTANTLY};
use instantsnap::engine::Phase;
use instantsnap::error::Code;
use instantsnap::image::Image;
use instantsnap::model::flags::NO_METADATA;
use instantsnap_testkit::{Accel, Binary, Format, Guest, Machine, kvm_runs, test, where_kvm_works};

fn machine(binary: &'static Binary) -> Machine {
    Machine::new(binary).disk(Format::Qcow2).disk(Format::Raw)
}

fn current(guest: &Guest) -> String {
    guest.virsh("snapshot-current", &["--name"]).trim().to_owned()
}

fn parent(guest: &Guest, name: &str) -> Option<String> {
    let parent = guest.daemon().try_virsh(&["snapshot-parent", guest.name(), name]);
    parent.ok().map(|name| name.trim().to_owned())
}

/// `snapshot-list --tree`, with one word on each line.
fn tree(guest: &Guest) -> String {
    guest.virsh("snapshot-list", &["--tree"]).trim().to_owned()
}

fn names(guest: &Guest) -> Vec<String> {
    let names = guest.virsh("snapshot-list", &["--name", "--topological"]);
    names.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

/// Takes a stock disk snapshot, as another client does.
fn stock(guest: &Guest, name: &str) {
    guest.virsh("snapshot-create-as", &[name, "--disk-only"]);
}

/// The text between the first occurrences of two others.
fn between<'a>(text: &'a str, before: &str, after: &str) -> &'a str {
    let (_, rest) = text.split_once(before).unwrap_or_else(|| panic!("no {before} in {text}"));
    rest.split_once(after).unwrap_or_else(|| panic!("no {after} in {text}")).0
}

/// The target and the file of each disk in a piece of XML.
fn sources(xml: &str) -> Vec<(String, String)> {
    let disks = xml.split("<disk ").skip(1).map(|disk| disk.split("</disk>").next().unwrap());
    let top = |disk: &str| disk.split("<backingStore").next().unwrap().to_owned();
    disks
        .map(|disk| {
            (
                between(disk, "<target dev='", "'").to_owned(),
                between(&top(disk), "<source file='", "'").to_owned(),
            )
        })
        .collect()
}

#[test]
fn snapshot_is_current_with_its_parent_at_the_instant() {
    by_client_only();
    let daemon = virt::session();
    let clones = Clones::of(&daemon);
    for binary in Binary::under_libvirt() {
        let opened = OpenedDomain::start(&machine(binary), &daemon);
        let guest = &opened.guest;
        let mut seen = None;
        let mut observer = At(|phase| {
            if phase == Phase::Drain {
                let image = std::fs::read(opened.memory_file("first")).unwrap();
                seen = Some((
                    current(guest),
                    names(guest),
                    parent(guest, "first"),
                    image[..16].to_vec(),
                ));
            }
        });
        opened.snapshot_observed("first", &mut observer).unwrap();
        let (name, list, above, magic) = seen.expect("no drain");
        assert_eq!((name.as_str(), list, above), ("first", vec!["first".to_owned()], None));
        assert_eq!(magic, b"LibvirtQemudPart");
        assert_eq!(current(guest), "first");

        // Another client takes a snapshot after the library's.
        let mut observer = At(|phase| {
            if phase == Phase::Drain {
                stock(guest, "other");
                assert_eq!(parent(guest, "other").as_deref(), Some("second"));
            }
        });
        opened.snapshot_observed("second", &mut observer).unwrap();
        assert_eq!(current(guest), "other");
        // The same within the pause, when the disks are already on the library's overlays and
        // libvirt does not know of the snapshot yet.
        let mut observer = At(|phase| {
            if phase == Phase::Arm {
                stock(guest, "within");
                assert_eq!(parent(guest, "within").as_deref(), Some("other"));
            }
        });
        opened.snapshot_observed("third", &mut observer).unwrap();
        assert_eq!(current(guest), "within");
        opened.snapshot("fourth").unwrap();
        assert_eq!(current(guest), "fourth");
        let expected = ["first", "second", "other", "third", "within", "fourth"];
        assert_eq!(names(guest), expected);
        for (child, above) in expected[1..].iter().zip(expected) {
            assert_eq!(parent(guest, child).as_deref(), Some(above), "{child}");
        }
        let drawn: String = tree(guest)
            .split_whitespace()
            .filter(|word| !["|", "+-"].contains(word))
            .collect::<Vec<_>>()
            .join(" ");
        assert_eq!(drawn, expected.join(" "), "{}", tree(guest));

        // When a parent is deleted, its own parent becomes the children's parent.
        guest.virsh("snapshot-delete", &["other", "--metadata"]);
        assert_eq!(parent(guest, "third").as_deref(), Some("second"));
        guest.wait_ticks(3);
        for name in ["second", "third"] {
            clones.check(guest, &opened.memory_file(name));
        }
        // libvirt reads all metadata again when it starts.
        daemon.kill();
        daemon.start_again();
        assert_eq!(current(guest), "fourth");
        assert_eq!(names(guest), ["first", "second", "third", "within", "fourth"]);
    }
}

#[test]
fn snapshot_of_another_client_between_plan_and_switch_fails_ours() {
    by_client_only();
    let daemon = virt::session();
    for phase in [Phase::Prepare, Phase::Switch] {
        let opened = OpenedDomain::start(&machine(&Binary::all()[0]), &daemon);
        let mut between = None;
        let mut observer = At(|now| {
            if now == phase {
                stock(&opened.guest, "early");
                between = Some(sources(&opened.guest.virsh("dumpxml", &[])));
            }
        });
        // The memory image would belong to the previous images, while the disks are on the other
        // client's overlays.
        let error =
            opened.snapshot_observed("ours", &mut observer).expect_err("the images are others");
        assert_eq!(error.code, Code::OperationFailed, "{error}");
        assert!(error.message.contains("changed the images of disk"), "{error}");
        assert_eq!(names(&opened.guest), ["early"]);
        assert_eq!(current(&opened.guest), "early");
        assert_eq!(Some(sources(&opened.guest.virsh("dumpxml", &[]))), between);
        assert_eq!(Some(sources(&opened.guest.virsh("dumpxml", &["--inactive"]))), between);
        let files = common::files_below(opened.guest.directory());
        let ours = files.iter().filter(|file| file.to_str().unwrap().contains("ours"));
        assert_eq!(ours.count(), 0, "{files:?}");
        opened.guest.wait_ticks(common::ALL_SECTORS);
    }
}

#[test]
fn virsh_reports_the_snapshots_metadata() {
    for daemon in virt::daemons() {
        let opened = OpenedDomain::start(&machine(&Binary::all()[0]), &daemon);
        let guest = &opened.guest;
        let image = |n: usize| guest.disks()[n].file.display().to_string();
        let overlay =
            |n: usize, name: &str| guest.disks()[n].file.with_extension(name).display().to_string();
        let both = |file: &dyn Fn(usize) -> String| {
            vec![("vda".to_owned(), file(0)), ("vdb".to_owned(), file(1))]
        };
        let now = || {
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
        };
        let description = "before <the> \"upgrade\" & such\nsnö";
        let escaped = "before &lt;the&gt; \"upgrade\" &amp; such\nsnö";
        let since = now();
        for name in ["one", "two"] {
            opened
                .create(
                    &opened.xml(name, &format!("<description>{escaped}</description>")),
                    INSTANTLY,
                )
                .unwrap();
            for flags in [&[][..], &["--inactive"]] {
                assert_eq!(
                    sources(&guest.virsh("dumpxml", flags)),
                    both(&|n| overlay(n, name)),
                    "{flags:?}"
                );
            }
        }
        let until = now();

        let xml = guest.virsh("snapshot-dumpxml", &["two", "--security-info"]);
        assert_eq!(between(&xml, "<name>", "</name>"), "two");
        let said = between(&xml, "<description>", "</description>");
        assert_eq!(
            said.replace("&quot;", "\"")
                .replace("&lt;", "<")
                .replace("&gt;", ">")
                .replace("&amp;", "&"),
            description
        );
        assert_eq!(between(&xml, "<state>", "</state>"), "running");
        assert_eq!(between(between(&xml, "<parent>", "</parent>"), "<name>", "</name>"), "one");
        let created: u64 = between(&xml, "<creationTime>", "</creationTime>").parse().unwrap();
        assert!((since..=until).contains(&created), "{created} is not in {since}..={until}");
        let memory =
            format!("<memory snapshot='external' file='{}'/>", opened.memory_file("two").display());
        assert!(xml.contains(&memory), "{xml}");
        let disks = between(&xml, "<disks>", "</disks>");
        for (n, target) in ["vda", "vdb"].into_iter().enumerate() {
            let disk = between(
                disks,
                &format!("<disk name='{target}' snapshot='external' type='file'>"),
                "</disk>",
            );
            assert!(disk.contains("<driver type='qcow2'/>"), "{disk}");
            assert!(disk.contains(&format!("<source file='{}'/>", overlay(n, "two"))), "{disk}");
        }
        // The images of the snapshot are those that the guest was on.
        let active = between(&xml, "<domain type=", "</domain>");
        assert_eq!(sources(active), both(&|n| overlay(n, "one")));
        assert_eq!(
            sources(between(&xml, "<inactiveDomain type=", "</inactiveDomain>")),
            both(&|n| overlay(n, "one"))
        );
        let first = guest.virsh("snapshot-dumpxml", &["one"]);
        assert_eq!(sources(between(&first, "<domain type=", "</domain>")), both(&image));
        // The memory image has the same XML.
        let stored = Image::open(&opened.memory_file("two")).unwrap();
        assert_eq!(sources(&stored.domain_xml), both(&|n| overlay(n, "one")));

        assert_eq!(guest.virsh("snapshot-current", &["--name"]).trim(), "two");
        assert_eq!(between(&guest.virsh("snapshot-current", &[]), "<name>", "</name>"), "two");
        assert_eq!(guest.virsh("snapshot-parent", &["two"]).trim(), "one");
        let info = guest.virsh("snapshot-info", &["one"]);
        let said = |what: &str| between(&info, &format!("{what}:"), "\n").trim().to_owned();
        let expected = [
            ("Domain", guest.name()),
            ("Current", "no"),
            ("State", "running"),
            ("Location", "external"),
            ("Parent", "-"),
            ("Children", "1"),
            ("Descendants", "1"),
            ("Metadata", "yes"),
        ];
        for (what, value) in expected {
            assert_eq!(said(what), value, "{what}");
        }
        let external = guest.virsh("snapshot-list", &["--external", "--active", "--name"]);
        assert_eq!(external.split_whitespace().collect::<Vec<_>>(), ["one", "two"]);
    }
}

#[test]
fn no_metadata_snapshot_is_not_recorded() {
    let daemon = virt::session();
    let clones = Clones::of(&daemon);
    let opened = OpenedDomain::start(&machine(&Binary::all()[0]), &daemon);
    opened.create(&opened.xml("s", ""), INSTANTLY | NO_METADATA).unwrap();
    assert!(names(&opened.guest).is_empty());
    // The caller still gets a snapshot object.
    assert_eq!(opened.taken().unwrap().name(), "s");
    opened.guest.wait_ticks(3);
    clones.check(&opened.guest, &opened.memory_file("s"));
}

#[test]
fn snapshot_names_with_special_characters_are_kept() {
    let daemon = virt::session();
    let clones = Clones::of(&daemon);
    let opened = OpenedDomain::start(&machine(&Binary::all()[0]), &daemon);
    let guest = &opened.guest;
    let written =
        ["Schnappschuß 写真", "--looks-like-an-option", "100%s", "a&lt;b&gt;&amp;&apos;&quot;c"];
    for (n, written) in written.iter().enumerate() {
        let memory = opened.memory_file(&format!("name-{n}"));
        let xml = format!(
            "<domainsnapshot><name>{written}</name><memory snapshot='external' \
             file='{}'/></domainsnapshot>",
            memory.display()
        );
        let name = opened.create(&xml, INSTANTLY).unwrap();
        let meant = written
            .replace("&lt;", "<")
            .replace("&gt;", ">")
            .replace("&apos;", "'")
            .replace("&quot;", "\"");
        assert_eq!(name, meant.replace("&amp;", "&"));
        assert_eq!(opened.taken().unwrap().name(), name);
        assert_eq!(current(guest), name);
        assert_eq!(
            opened.handle.snapshot_list().current().unwrap().as_deref(),
            Some(name.as_str())
        );
        // The lookup by name works too.
        assert_eq!(opened.find(&name).unwrap().name(), name);
        if n % 2 == 0 {
            clones.check(guest, &memory);
        }
    }
    assert_eq!(opened.handle.snapshot_list().names().unwrap().len(), written.len());
    let last = opened.find("100%s").unwrap().children(0).unwrap();
    assert_eq!(last[0].name(), "a<b>&'\"c");
    // Names that libvirt does not accept are refused before anything is touched.
    let before = opened.trace();
    for bad in ["a/b", ".hidden", "two\nlines"] {
        let error = opened
            .create(&opened.xml("x", "").replace("<name>x<", &format!("<name>{bad}<")), INSTANTLY);
        assert_eq!(error.unwrap_err().code, Code::XmlDetail, "{bad}");
    }
    for (flags, name) in [(INSTANTLY, "100%s"), (INSTANTLY | NO_METADATA, "100%s")] {
        let error = opened.create(&opened.xml(name, ""), flags).unwrap_err();
        assert_eq!(error.code, Code::OperationInvalid, "{error}");
        assert!(
            error.message.contains("domain snapshot '100%s'")
                && error.message.contains("already exists"),
            "{error}"
        );
    }
    opened.assert_untouched(&before);
}

#[test]
fn default_name_is_the_time() {
    let daemon = virt::session();
    let opened = OpenedDomain::start(&machine(&Binary::all()[0]), &daemon);
    let now =
        || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let since = now();
    let mut last = 0;
    for n in 0..3 {
        let memory = opened.memory_file(&n.to_string());
        let xml = format!(
            "<domainsnapshot><memory snapshot='external' file='{}'/></domainsnapshot>",
            memory.display()
        );
        let name: u64 = opened.create(&xml, INSTANTLY).unwrap().parse().unwrap();
        // Two snapshots within a second have different names.
        assert!(name > last && (since..=now() + 2).contains(&name), "{name} after {last}");
        last = name;
        assert_eq!(current(&opened.guest), name.to_string());
        let overlay = opened.guest.disks()[0].file.with_extension(name.to_string());
        assert_eq!(
            sources(&opened.guest.virsh("dumpxml", &[]))[0].1,
            overlay.display().to_string()
        );
    }
}

/// The cookie of a memory image, by libvirt's header.
fn cookie(image: &Path) -> Option<String> {
    let bytes = std::fs::read(image).unwrap();
    let number = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let (length, offset) = (number(20), number(32));
    (offset != 0).then(|| {
        let text = bytes[92 + offset..92 + length].split(|byte| *byte == 0).next().unwrap();
        String::from_utf8(text.to_vec()).unwrap()
    })
}

#[test]
fn memory_image_has_libvirts_cookie() {
    let daemon = virt::session();
    let clones = Clones::of(&daemon);
    let custom = "<cpu mode='custom' match='exact'><model fallback='allow'>Nehalem</model>\
                  <feature policy='disable' name='sse4.2'/></cpu>";
    let (first, last) = (&Binary::all()[0], &Binary::all()[Binary::all().len() - 1]);
    for (binary, cpu) in [(first, ""), (first, custom), (last, "<cpu mode='host-model'/>")] {
        eprintln!("{} {cpu}", binary.name);
        check_cookie(&OpenedDomain::start(&machine(binary).domain_elements(cpu), &daemon), &clones);
    }
}

fn check_cookie(opened: &OpenedDomain, clones: &Clones) {
    opened.snapshot("s").unwrap();
    let (ours, stock) = (opened.memory_file("s"), opened.memory_file("stock"));
    clones.check(&opened.guest, &ours);
    opened.guest.virsh("save", &[stock.to_str().unwrap()]);
    let trimmed = |image| cookie(image).map(|cookie| cookie.trim().to_owned());
    let (ours, stock) = (trimmed(&ours), trimmed(&stock));
    // libvirt omits the CPU where QEMU provides exactly the requested one.
    if stock.as_ref().is_some_and(|cookie| cookie.contains("<cpu")) {
        assert_eq!(ours, stock);
    } else {
        let rest =
            |cookie: Option<String>| cookie.unwrap().split_whitespace().last() == Some("</cookie>");
        assert!(rest(ours) && rest(stock));
    }
}

#[test(long)]
fn guest_with_the_host_cpu_can_be_restored_under_kvm() {
    where_kvm_works(&Binary::all()[..1]);
    let Some(daemon) = virt::system() else { return };
    let clones = Clones::of(&daemon);
    for cpu in ["<cpu mode='host-model'/>", "<cpu mode='host-passthrough'/>"] {
        let machine = machine(&Binary::all()[0]).accel(Accel::Kvm).domain_elements(cpu);
        eprintln!("{cpu}");
        // Nested KVM may not allow a CPU like the host's.
        kvm_runs(&machine, &daemon);
        check_cookie(&OpenedDomain::start(&machine, &daemon), &clones);
    }
}
