// SPDX-License-Identifier: LGPL-2.1-or-later

//! XML from outside: it cannot crash the library, make it hang or name a file outside its
//! directory, and valid XML reads back as it was.

use std::fmt::Write as _;
use std::process::Command;

use common::{INSTANTLY, Opened, assert_error, assert_untouched, machine};
use instantsnap::error::{Code, Error};
use instantsnap::model::domain::{Source, Storage};
use instantsnap::model::{
    Domain, Frozen, Location, ManualDisk, MemoryRequest, Record, RecordedDisk, RecordedNvram,
    Request, State,
};
use instantsnap_testkit::{Binary, test};

fn snapshot(content: &str) -> Result<Request, Error> {
    Request::parse(&format!("<domainsnapshot>{content}</domainsnapshot>"))
}

fn domain(content: &str) -> Result<Domain, Error> {
    Domain::parse(&format!("<domain><name>x</name>{content}</domain>"))
}

/// Asserts that both kinds of XML are refused alike.
#[track_caller]
fn refused(content: &str, code: Code, part: &str) {
    assert_error(snapshot(content), code, part);
    assert_error(domain(content), code, part);
}

#[test]
fn malformed_xml_is_refused() {
    for text in [
        "",
        " ",
        "<",
        "<domainsnapshot",
        "<domainsnapshot>",
        "<domainsnapshot></domain>",
        "x",
        "\0",
        "{}",
    ] {
        assert_error(Request::parse(text), Code::XmlDetail, "<domainsnapshot>");
        assert_error(Domain::parse(text), Code::XmlDetail, "<domain>");
    }
    for content in [
        "<a>",
        "</a>",
        "<a b>",
        "<a b=c/>",
        "<a b='1' b='2'/>",
        "&",
        "&nbsp;",
        "<a:b/>",
        "a ]]> b",
        "<!-- -- -->",
    ] {
        refused(content, Code::XmlDetail, "cannot parse");
    }
}

#[test]
fn other_root_elements_are_refused() {
    assert_error(Request::parse("<domain/>"), Code::XmlError, "expecting <domainsnapshot>");
    assert_error(
        Request::parse("<domaincheckpoint/>"),
        Code::XmlError,
        "expecting <domainsnapshot>",
    );
    assert_error(Domain::parse("<domainsnapshot/>"), Code::XmlError, "expecting <domain>");
    assert_error(Domain::parse("<domain/>"), Code::XmlError, "<name>");
}

#[test]
fn dtds_and_entities_are_refused() {
    let mut laughs = String::from("<!DOCTYPE domainsnapshot [<!ENTITY l0 'ha'>");
    for n in 1..10 {
        write!(laughs, "<!ENTITY l{n} '{}'>", format!("&l{};", n - 1).repeat(10)).unwrap();
    }
    laughs.push_str("]><domainsnapshot><description>&l9;</description></domainsnapshot>");
    let external = "<!DOCTYPE domainsnapshot [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>\
                    <domainsnapshot><description>&x;</description></domainsnapshot>";
    let parameter = "<!DOCTYPE domainsnapshot [<!ENTITY % x SYSTEM 'http://127.0.0.1:1/'> %x;]><domainsnapshot/>";
    for text in [&laughs, external, parameter, "<!DOCTYPE domainsnapshot><domainsnapshot/>"] {
        assert_error(Request::parse(text), Code::XmlDetail, "DTD");
        assert_error(Domain::parse(text), Code::XmlDetail, "DTD");
    }
}

#[test]
fn invalid_xml_characters_are_refused() {
    for number in ["0", "1", "8", "x0B", "x1F", "xFFFE", "xFFFF"] {
        refused(
            &format!("<description>&#{number};</description>"),
            Code::XmlDetail,
            "cannot parse",
        );
    }
    // A reference to an invalid character does not turn into another character.
    for number in ["xD800", "xDFFF", "x110000", "xFFFFFFFFFF", "-1", ""] {
        if let Ok(request) = snapshot(&format!("<description>&#{number};</description>")) {
            assert_eq!(request.description.as_deref(), Some("\u{fffd}"), "{number}");
        }
    }
    for character in ['\0', '\u{1}', '\u{b}', '\u{1f}', '\u{fffe}', '\u{ffff}'] {
        refused(
            &format!("<description>{character}</description>"),
            Code::XmlDetail,
            "cannot parse",
        );
        refused(&format!("<description a='{character}'/>"), Code::XmlDetail, "cannot parse");
    }
}

#[test]
fn snapshot_name_cannot_escape_its_directory() {
    for (name, part) in [
        ("../x", "/"),
        ("a/b", "/"),
        ("/etc/passwd", "/"),
        (".hidden", "start with '.'"),
        (".", "start with '.'"),
        ("..", "start with '.'"),
        ("a\nb", "control"),
        ("a\tb", "control"),
        ("&#10;", "control"),
        ("a&#x7f;", "control"),
        ("a&#x85;", "control"),
        (&"x".repeat(300), "300 bytes"),
        (&"x".repeat(231), "231 bytes"),
        (&"é".repeat(116), "232 bytes"),
    ] {
        assert_error(snapshot(&format!("<name>{name}</name>")), Code::XmlDetail, part);
    }
    // An empty name counts as no name, as in libvirt.
    assert_eq!(snapshot("<name></name>").unwrap().name, None);
    assert_eq!(snapshot("<name/>").unwrap().name, None);
    for name in
        ["x".repeat(230), "a.b".into(), "a b".into(), "-rf".into(), "é".repeat(115), "日本".into()]
    {
        assert_eq!(snapshot(&format!("<name>{name}</name>")).unwrap().name, Some(name));
    }
}

#[test]
fn paths_must_be_absolute_and_valid_in_xml() {
    for (path, part) in [
        ("x.mem", "absolute"),
        ("", "absolute"),
        ("./x", "absolute"),
        ("/a&#10;b", "control"),
        ("/a&#9;b", "control"),
    ] {
        assert_error(snapshot(&format!("<memory file='{path}'/>")), Code::XmlError, part);
        let disk = format!("<disks><disk name='vda'><source file='{path}'/></disk></disks>");
        assert_error(snapshot(&disk), Code::XmlError, part);
    }
}

#[test]
fn memory_element_is_validated() {
    let memory = |attributes: &str| {
        snapshot(&format!("<memory {attributes}/>")).map(|request| request.memory)
    };
    assert_eq!(memory("").unwrap(), MemoryRequest::Default);
    assert_eq!(memory("snapshot='external'").unwrap(), MemoryRequest::Default);
    assert_eq!(
        memory("snapshot='external' file='/m'").unwrap(),
        MemoryRequest::External("/m".into())
    );
    assert_eq!(memory("file='/m'").unwrap(), MemoryRequest::External("/m".into()));
    assert_eq!(memory("snapshot='no'").unwrap(), MemoryRequest::No);
    assert_error(memory("snapshot='internal'"), Code::OperationUnsupported, "external");
    assert_error(memory("snapshot='bogus'"), Code::XmlError, "'bogus'");
    assert_error(memory("snapshot='manual'"), Code::XmlError, "'manual'");
    assert_error(memory("snapshot=''"), Code::XmlError, "''");
    assert_error(memory("snapshot='no' file='/m'"), Code::XmlError, "'/m'");
    assert_error(memory("snapshot='internal' file='/m'"), Code::XmlError, "'/m'");
}

#[test]
fn disk_elements_are_validated() {
    let disk = |attributes: &str, content: &str| {
        snapshot(&format!("<disks><disk {attributes}>{content}</disk></disks>"))
            .map(|request| request.disks)
    };
    assert_error(disk("", ""), Code::XmlError, "name");
    assert_error(disk("name=''", ""), Code::XmlError, "name");
    assert_error(disk("name='vda' snapshot='bogus'", ""), Code::XmlError, "'bogus'");
    let result = disk("name='vda' snapshot='internal'", "");
    assert_error(result.clone(), Code::OperationUnsupported, "snapshot='external'");
    assert_error(result.clone(), Code::OperationUnsupported, "'no'");
    assert_error(result, Code::OperationUnsupported, "'vda'");
    assert_eq!(
        disk("name='vda' snapshot='manual'", "").unwrap()[0].location,
        Some(Location::Manual)
    );
    assert_error(
        disk("name='vda' snapshot='manual'", "<source file='/x'/>"),
        Code::XmlError,
        "'/x'",
    );
    assert_error(disk("name='vda' type='network'", ""), Code::ConfigUnsupported, "'network'");
    assert_error(disk("name='vda'", "<driver type='raw'/>"), Code::ConfigUnsupported, "qcow2");
    assert_error(disk("name='vda' snapshot='no'", "<source file='/x'/>"), Code::XmlError, "'/x'");
    assert_eq!(
        disk("name='vda' snapshot='external' type='file'", "<driver type='qcow2'/>").unwrap().len(),
        1
    );
}

/// Nested elements, long texts, many elements, many attributes and many namespaces.
fn huge_documents() -> Vec<(&'static str, String)> {
    let numbered =
        |count: usize, each: &dyn Fn(usize) -> String| (0..count).map(each).collect::<String>();
    vec![
        ("a million levels", "<a>".repeat(1_000_000) + &"</a>".repeat(1_000_000)),
        ("levels without end", "<a>".repeat(2_500_000)),
        ("a million elements", "<a/>".repeat(1_000_000)),
        ("8 MB of opened tags", "<".repeat(8_000_000)),
        ("20 MB of text", "x".repeat(20_000_000)),
        ("20 MB of elements", "<a/>".repeat(5_000_000)),
        ("20 MB of nothing", " ".repeat(20_000_000)),
        ("7 MB of text", format!("<description>{}</description>", "x".repeat(7_000_000))),
        ("7 MB of CDATA", "<![CDATA[x]]>".repeat(7_000_000 / 13)),
        ("many attributes", format!("<a {}/>", numbered(500_000, &|n| format!("a{n}='' ")))),
        (
            "many elements with many attributes",
            format!("<a {}/>", numbered(4_000, &|n| format!("a{n}='' "))).repeat(200),
        ),
        (
            "many namespaces",
            format!("<a {}/>", numbered(60_000, &|n| format!("xmlns:a{n}='{n}' "))),
        ),
        (
            "nested namespaces",
            numbered(20_000, &|n| format!("<a xmlns:a{n}='{n}'>")) + &"</a>".repeat(20_000),
        ),
        (
            "disks",
            format!("<disks>{}</disks>", numbered(100_000, &|n| format!("<disk name='d{n}'/>"))),
        ),
        ("same disk", format!("<disks>{}</disks>", "<disk name='vda'/>".repeat(100_000))),
    ]
}

/// In a process of its own, because memory and CPU time are limited per process. CPU time does not
/// depend on the machine's load.
#[test]
fn huge_xml_takes_bounded_time_and_memory() {
    if std::env::var_os("INSTANTSNAP_TEST_MONSTERS").is_some() {
        for (what, content) in huge_documents() {
            eprintln!("{what}");
            // The XML may be accepted or refused, for its length or another reason.
            if let Err(error) = snapshot(&content) {
                assert!(error.message.len() < 1000, "{what}: {}", error.message.len());
            }
            let _ =
                domain(&content).inspect_err(|error| assert!(error.message.len() < 1000, "{what}"));
            let _ = domain(&format!("<devices>{content}</devices>"));
            let _ = Record::parse(&format!("<domainsnapshot>{content}</domainsnapshot>"));
        }
        return;
    }
    let output = Command::new("sh")
        .args(["-c", "ulimit -v 3000000; ulimit -t 60; exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "huge_xml_takes_bounded_time_and_memory",
            "--nocapture",
            "--test-threads=1",
        ])
        .env("INSTANTSNAP_TEST_MONSTERS", "1")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn million_nested_elements_do_not_overflow_a_small_stack() {
    let text = "<a>".repeat(1_000_000) + &"</a>".repeat(1_000_000);
    let thread = std::thread::Builder::new().stack_size(128 << 10);
    let parsed = thread
        .spawn(move || (snapshot(&text).is_ok(), domain(&text).is_ok()))
        .unwrap()
        .join()
        .unwrap();
    assert_eq!(parsed, (true, true));
}

#[test]
fn namespaces_in_libvirts_domain_xml_are_accepted() {
    let content = "<metadata><a:b xmlns:a='urn:a'><a:c xmlns='urn:b' a:d='1'/></a:b></metadata>\
                   <qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><qemu:arg value='-x'/>\
                   </qemu:commandline>";
    domain(content).unwrap();
    domain(&content.repeat(20)).unwrap();
    let text = "=".repeat(100_000);
    snapshot(&format!("<description>{text}</description>")).unwrap();
}

/// A small random generator, which gives the same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

fn sample_record() -> Record {
    Record {
        name: "a&b <c> \"d\" 'é'".into(),
        description: Some("x\n\ty & <z>".into()),
        parent: Some("p'p".into()),
        creation_time: 1_700_000_000,
        state: State::Running,
        memory_file: "/a b/&.mem".into(),
        disks: vec![RecordedDisk {
            name: "v\"d'a".into(),
            overlay: "/o<>&'\"".into(),
            image: "/i,é".into(),
            format: "raw".into(),
            frozen: Frozen::of("/proc/self/exe").into_iter().collect(),
        }],
        manual: vec![ManualDisk {
            name: "v<db".into(),
            source: "/dev/v&g/l'v".into(),
            format: "raw".into(),
        }],
        nvram: vec![RecordedNvram {
            name: "pflash1".into(),
            copy: "/c".into(),
            original: "/o".into(),
            format: "raw".into(),
            content: Some("9-0123".into()),
        }],
        domain_xml: "<domain><name>x</name><devices/></domain>".into(),
    }
}

#[test]
fn parsing_random_bytes_does_not_panic() {
    let fragments = [
        "<domainsnapshot>",
        "</domainsnapshot>",
        "<name>",
        "</name>",
        "<disks>",
        "</disks>",
        "<disk name='a'",
        "/>",
        ">",
        "<memory ",
        "file='/x'",
        "snapshot='no'",
        "snapshot='external'",
        "<domain>",
        "</domain>",
        "<source file='/'/>",
        "<![CDATA[",
        "]]>",
        "<!--",
        "-->",
        "<?",
        "?>",
        "&amp;",
        "&#x",
        ";",
        "'",
        "\"",
        "\0",
        "é",
        "<creationTime>1",
        "<state>running</state>",
        "xmlns:a='b'",
        " ",
        "<instantsnap:image ",
    ];
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let record = sample_record().to_xml();
    let request = "<domainsnapshot><name>n</name><description>d</description><memory snapshot='external' file='/m'/>\
                   <disks><disk name='vda' snapshot='external'><source file='/s'/></disk></disks></domainsnapshot>";
    for round in 0..30_000 {
        let text = match round % 3 {
            // Random bytes.
            0 => {
                let bytes: Vec<u8> = (0..random.below(200)).map(|_| random.next() as u8).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            // Fragments of XML that fit more or less.
            1 => (0..random.below(30)).map(|_| fragments[random.below(fragments.len())]).collect(),
            // Valid XML in which some bytes are changed.
            _ => {
                let mut bytes = if round % 2 == 0 {
                    record.as_bytes().to_vec()
                } else {
                    request.as_bytes().to_vec()
                };
                for _ in 0..=random.below(4) {
                    if bytes.is_empty() {
                        break;
                    }
                    let at = random.below(bytes.len());
                    match random.below(3) {
                        0 => bytes[at] = random.next() as u8,
                        1 => drop(bytes.remove(at)),
                        _ => bytes.truncate(at),
                    }
                }
                String::from_utf8_lossy(&bytes).into_owned()
            }
        };
        let _ = Request::parse(&text);
        let _ = Record::parse(&text);
        if let Ok(domain) = Domain::parse(&text) {
            let _ = domain.with_sources(&[]);
        }
    }
}

#[test]
fn disk_type_in_the_domain_xml_follows_its_source() {
    let disk = |kind: &str, source: &str| {
        format!(
            "<devices><disk type='{kind}'><driver type='raw'/>{source}<target \
             dev='vda'/></disk></devices>"
        )
    };
    let on = |before: &str, storage: Storage| {
        let source = Source { target: "vda", storage, format: "qcow2" };
        let text = domain(before).unwrap().with_sources(&[source]).unwrap();
        text.strip_prefix("<domain><name>x</name>")
            .unwrap()
            .strip_suffix("</domain>")
            .unwrap()
            .to_owned()
    };
    let now = |kind: &str, source: &str| disk(kind, source).replace("'raw'", "'qcow2'");
    let label = "<seclabel model='dac' relabel='no'/>";
    let part = "<slices><slice type='storage' offset='0' size='1'/></slices>";
    let pool = "<source pool='p' volume='v'/>";
    let nbd = "<source protocol='nbd' name='n'><host name='h'/></source>";
    let file = || Storage::at("/f");
    assert_eq!(
        on(&disk("block", "<source dev='/b'/>"), file()),
        now("file", "<source file='/f'/>")
    );
    assert_eq!(on(&disk("volume", pool), file()), now("file", "<source file='/f'/>"));
    assert_eq!(on(&disk("network", nbd), file()), now("file", "<source file='/f'/>"));
    // Elements of the old image are removed with it, and labels stay for the new one.
    let both = format!("<source file='/g'>{part}{label}</source>");
    assert_eq!(
        on(&disk("file", &both), file()),
        now("file", &format!("<source file='/f'>{label}</source>"))
    );
    // The reverse, to the source in another document.
    for (kind, source) in
        [("volume", pool), ("network", nbd), ("file", &both), ("block", "<source dev='/b'/>")]
    {
        let before = domain(&disk(kind, source)).unwrap().storage("vda").unwrap();
        assert_eq!(on(&disk("file", "<source file='/f'/>"), before), now(kind, source));
    }
    // A path is a block device if the file is one.
    let loops =
        (0..8).map(|n| format!("/dev/loop{n}")).find(|path| std::path::Path::new(path).exists());
    if let Some(device) = loops {
        let block = now("block", &format!("<source dev='{device}'/>"));
        assert_eq!(on(&disk("file", "<source file='/f'/>"), Storage::at(&device)), block);
    }
}

#[test]
fn record_reads_back_as_it_was_written() {
    let record = sample_record();
    assert_eq!(Record::parse(&record.to_xml()).unwrap(), record);
    let bare = Record {
        description: None,
        parent: None,
        disks: vec![],
        manual: vec![],
        nvram: vec![],
        state: State::Paused,
        ..record
    };
    assert_eq!(Record::parse(&bare.to_xml()).unwrap(), bare);
}

#[test]
fn description_reads_back_as_it_was_given() {
    let expanding = format!("<![CDATA[{}]]>", "\"<&".repeat(2_000_000));
    for description in [
        "a &amp; b",
        " &lt;c&gt; ",
        "two\nlines\tand a tab",
        "<![CDATA[<x>]]> y",
        "é日本🦀",
        "a&#13;&#10;b",
        &expanding,
    ] {
        let request = snapshot(&format!("<description>{description}</description>")).unwrap();
        let record = Record { description: request.description.clone(), ..sample_record() };
        let back = Record::parse(&record.to_xml()).unwrap();
        assert_eq!(back.description.map(|it| it.len()), request.description.map(|it| it.len()));
    }
}

#[test]
fn domain_xml_with_an_xml_declaration_can_be_recorded() {
    let text = "<?xml version='1.0' encoding='UTF-8'?>\n<!-- edited by virsh -->\n<domain><name>x</name></domain>\n";
    for text in [text.to_owned(), format!("\u{feff}{text}")] {
        let domain_xml = Domain::parse(&text).unwrap().with_sources(&[]).unwrap();
        let record = Record { domain_xml, ..sample_record() };
        let back = Record::parse(&record.to_xml()).unwrap();
        assert_eq!(back.domain_xml, "<domain><name>x</name></domain>");
    }
}

#[test]
fn name_with_special_characters_works_in_create_list_and_load() {
    let name = "a&b <c> \"d\" 'é'";
    let escaped = "a&amp;b &lt;c&gt; &quot;d&quot; &apos;é&apos;";
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        let xml = format!(
            "<domainsnapshot><name>{escaped}</name><description>x &lt; y\n \
             {escaped}</description></domainsnapshot>"
        );
        assert_eq!(opened.create(&xml, INSTANTLY).unwrap(), name);
        let names: Vec<_> = opened
            .handle
            .store()
            .unwrap()
            .list()
            .unwrap()
            .into_iter()
            .map(|record| record.name)
            .collect();
        assert_eq!(names, [name]);
        assert_eq!(opened.handle.store().unwrap().current().unwrap().as_deref(), Some(name));
        let record = opened.record(name);
        assert_eq!(record.description, Some(format!("x < y\n {name}")));
        assert_eq!(Record::parse(&record.to_xml()).unwrap(), record);
        opened.guest.wait_ticks(2);
        opened.restore_clone(name);
    }
}

#[test]
fn refused_xml_leaves_the_guest_untouched() {
    let opened = Opened::start(&machine(&Binary::all()[0], 1));
    let before = opened.trace();
    for (content, code) in [
        ("<name>../x</name>", Code::XmlDetail),
        ("<name>a</name><memory snapshot='internal'/>", Code::OperationUnsupported),
        ("<name>a</name><memory file='x'/>", Code::XmlError),
        ("<name>a</name><disks><disk name='vd0'/><disk name='drive-0'/></disks>", Code::XmlError),
        ("<name>a</name><disks><disk name='vd0'/><disk name='vd0'/></disks>", Code::XmlError),
        (
            "<name>a</name><disks><disk name='vd0' snapshot='manual'/></disks>",
            Code::OperationUnsupported,
        ),
        ("<name>a</name><disks><disk name='nosuch'/></disks>", Code::ConfigUnsupported),
    ] {
        let result =
            opened.create(&format!("<domainsnapshot>{content}</domainsnapshot>"), INSTANTLY);
        assert_error(result, code, "");
    }
    assert_untouched(&opened, &before);
}
