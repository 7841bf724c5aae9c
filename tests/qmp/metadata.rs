// SPDX-License-Identifier: LGPL-2.1-or-later

//! The state directory: what is recorded, in which order and by which process, and what damage does
//! to it.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::{
    ALL_SECTORS, Handle, INSTANTLY, Opened, assert_error, assert_untouched, machine, named,
};
use instantsnap::error::Code;
use instantsnap::model::flags::delete::METADATA_ONLY;
use instantsnap::model::{Record, State, Store};
use instantsnap_testkit::{Binary, test};
use rustix::fs::{FlockOperation, flock};

fn record(name: &str, creation_time: u64) -> Record {
    Record {
        name: name.into(),
        description: None,
        parent: None,
        creation_time,
        state: State::Running,
        memory_file: format!("/nowhere/{name}.mem"),
        disks: Vec::new(),
        manual: vec![],
        nvram: Vec::new(),
        domain_xml: "<domain><name>x</name></domain>".into(),
    }
}

fn commit(store: &Store, name: &str, creation_time: u64) -> Record {
    let reservation = store.reserve(Some(name)).unwrap();
    store.commit(&reservation, record(name, creation_time)).unwrap()
}

fn scratch() -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    (directory, store)
}

fn names(store: &Store) -> Vec<String> {
    store.list().unwrap().into_iter().map(|record| record.name).collect()
}

fn parent(store: &Store, name: &str) -> Option<String> {
    store.read(name).unwrap().parent
}

fn files(directory: &Path) -> Vec<String> {
    let names = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

#[test]
fn three_snapshots_form_a_chain_and_loading_an_older_one_starts_a_branch() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 1));
        let store = opened.handle.store().unwrap();
        assert_eq!(store.current().unwrap(), None);
        // The names are in reverse order: all three snapshots can be of the same second.
        for name in ["c", "b", "a"] {
            let xml = format!(
                "<domainsnapshot><name>{name}</name><description>I am \
                 {name}</description></domainsnapshot>"
            );
            opened.create(&xml, INSTANTLY).unwrap();
            assert_eq!(store.current().unwrap().as_deref(), Some(name));
        }
        assert_eq!(names(store), ["c", "b", "a"]);
        assert_eq!(parent(store, "c"), None);
        assert_eq!(parent(store, "b").as_deref(), Some("c"));
        assert_eq!(parent(store, "a").as_deref(), Some("b"));
        for record in store.list().unwrap() {
            assert_eq!(record.description, Some(format!("I am {}", record.name)));
            assert_eq!(record.state, State::Running);
            assert!(
                record.domain_xml.contains(&record.disks[0].image),
                "the image is the snapshot's"
            );
            assert!(!record.domain_xml.contains(&record.disks[0].overlay));
        }
        for file in files(&opened.state_dir()) {
            let mode = opened.state_dir().join(&file).metadata().unwrap().mode() & 0o7777;
            // A QEMU can have mapped a memory image.
            let expected = if file.ends_with(".mem") { 0o400 } else { 0o600 };
            assert_eq!(mode, expected, "{file}");
        }
        // Not every format of a memory image has notes on its pages.
        let mut found = files(&opened.state_dir());
        found.retain(|file| !file.ends_with(".mem.pages"));
        assert_eq!(
            found,
            [".current", ".lock", "a.mem", "a.xml", "b.mem", "b.xml", "c.mem", "c.xml"]
        );

        let (clone, _) = opened.restore_clone("b");
        assert_eq!(store.current().unwrap().as_deref(), Some("b"));
        clone.handle.create(&named("branch"), INSTANTLY, &mut ()).unwrap();
        assert_eq!(parent(store, "branch").as_deref(), Some("b"));
        assert_eq!(store.current().unwrap().as_deref(), Some("branch"));
        opened.restore_clone("branch");
    }
}

#[test]
fn default_names_are_the_time_and_unique() {
    let (_directory, store) = scratch();
    let reservations: Vec<_> = (0..5).map(|_| store.reserve(None).unwrap()).collect();
    let mut names: Vec<_> =
        reservations.iter().map(|reservation| reservation.name.clone()).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 5);
    assert!(names.iter().all(|name| name.starts_with(char::is_numeric)), "{names:?}");
}

#[test]
fn list_is_sorted_by_time_then_parent_then_name() {
    let (_directory, store) = scratch();
    for (name, time) in [("z", 5), ("y", 5), ("x", 5), ("old", 3), ("b", 5)] {
        commit(&store, name, time);
    }
    assert_eq!(
        names(&store),
        ["z", "y", "x", "old", "b"],
        "a parent comes before its child whatever the clock said"
    );
    let (_directory, store) = scratch();
    for name in ["second", "first"] {
        commit(&store, name, if name == "first" { 1 } else { 2 });
        std::fs::remove_file(store.path(".current")).unwrap();
    }
    assert_eq!(names(&store), ["first", "second"]);
}

#[test]
fn forget_reparents_children_and_makes_the_parent_current() {
    let (directory, store) = scratch();
    for name in ["a", "b", "c"] {
        commit(&store, name, 1);
    }
    store.set_current("b").unwrap();
    commit(&store, "d", 1);
    store.set_current("b").unwrap();
    store.forget("b").unwrap();
    assert_eq!(names(&store), ["a", "c", "d"]);
    assert_eq!(parent(&store, "c").as_deref(), Some("a"));
    assert_eq!(parent(&store, "d").as_deref(), Some("a"));
    assert_eq!(store.current().unwrap().as_deref(), Some("a"));
    assert_eq!(store.path("c.xml").metadata().unwrap().mode() & 0o7777, 0o600);
    // Forgetting a snapshot that is not current does not change the current one.
    store.set_current("d").unwrap();
    store.forget("c").unwrap();
    assert_eq!(store.current().unwrap().as_deref(), Some("d"));
    // The last one, which is the root.
    store.forget("a").unwrap();
    assert_eq!(parent(&store, "d"), None);
    store.forget("d").unwrap();
    assert_eq!(store.current().unwrap(), None);
    assert_error(store.forget("d"), Code::NoDomainSnapshot, "'d'");
    assert_error(store.read("d"), Code::NoDomainSnapshot, "'d'");
    assert_error(store.set_current("d"), Code::NoDomainSnapshot, "'d'");
    assert_eq!(files(directory.path()), [".current", ".lock"]);
    // The name can be used again.
    assert_eq!(commit(&store, "d", 2).parent, None);
}

#[test]
fn forget_keeps_the_images() {
    let opened = Opened::start(&machine(&Binary::all()[0], 1));
    opened.snapshot("a").unwrap();
    opened.snapshot("b").unwrap();
    opened.handle.store().unwrap().forget("a").unwrap();
    assert!(opened.state_dir().join("a.mem").exists());
    opened.restore_clone("b");
    assert_error(opened.handle.load("a", 0), Code::NoDomainSnapshot, "'a'");
    // The memory image stays, and a new snapshot of that name does not overwrite it.
    let before = opened.trace();
    assert_error(opened.snapshot("a"), Code::ConfigUnsupported, "already exists");
    assert_untouched(&opened, &before);
}

#[test]
fn name_can_be_reserved_once() {
    let (directory, store) = scratch();
    let held = store.reserve(Some("s")).unwrap();
    assert_error(store.reserve(Some("s")), Code::OperationInvalid, "being created already");
    assert_error(
        Store::open(directory.path()).unwrap().reserve(Some("s")),
        Code::OperationInvalid,
        "already",
    );
    let other = store.reserve(Some("t")).unwrap();
    drop(held);
    let held = store.reserve(Some("s")).unwrap();
    store.commit(&held, record("s", 1)).unwrap();
    drop((held, other));
    assert_error(store.reserve(Some("s")), Code::OperationInvalid, "already exists");
    assert_eq!(files(directory.path()), [".current", ".lock", "s.xml"]);
}

#[test]
fn one_of_many_concurrent_reservations_of_a_name_succeeds() {
    let (directory, _) = scratch();
    let holders = AtomicUsize::new(0);
    let taken = AtomicUsize::new(0);
    let start = Barrier::new(8);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let store = Store::open(directory.path()).unwrap();
                start.wait();
                for _ in 0..300 {
                    match store.reserve(Some("s")) {
                        Ok(held) => {
                            taken.fetch_add(1, Ordering::SeqCst);
                            assert_eq!(
                                holders.fetch_add(1, Ordering::SeqCst),
                                0,
                                "two hold one name"
                            );
                            std::thread::yield_now();
                            assert!(
                                directory.path().join(".s.reserved").exists(),
                                "somebody else removed it"
                            );
                            holders.fetch_sub(1, Ordering::SeqCst);
                            drop(held);
                        }
                        Err(error) => assert_eq!(error.code, Code::OperationInvalid, "{error}"),
                    }
                }
            });
        }
    });
    assert!(taken.into_inner() > 0);
    assert_eq!(files(directory.path()), [".lock"]);
}

#[test]
fn one_of_two_concurrent_snapshots_by_one_name_succeeds() {
    let binary = &Binary::all()[0];
    let first = Opened::start(&machine(binary, 1));
    let second = machine(binary, 1).start();
    second.wait_ticks(2);
    let other = Handle::open_qmp(&second.qmp(), None, &first.state_dir()).unwrap();
    let start = Barrier::new(2);
    let attempt = |handle: &Handle| {
        start.wait();
        handle.create(&named("s"), INSTANTLY, &mut ())
    };
    let results = std::thread::scope(|scope| {
        let theirs = scope.spawn(|| attempt(&other));
        [attempt(&first.handle), theirs.join().unwrap()]
    });
    let (won, lost): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert_eq!((won.len(), lost.len()), (1, 1));
    assert_error(lost.into_iter().next().unwrap(), Code::OperationInvalid, "'s'");
    assert_eq!(names(first.handle.store().unwrap()), ["s"]);
    first.guest.wait_ticks(2);
    second.wait_ticks(2);
}

#[test]
fn reservation_ends_with_its_process() {
    let (directory, store) = scratch();
    // Another process would hold it like this.
    let path = directory.path().join(".s.reserved");
    let file = std::fs::File::create(&path).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    assert_error(store.reserve(Some("s")), Code::OperationInvalid, "being created already");
    // The kernel closes the file when that process ends, and the file itself stays.
    drop(file);
    assert!(path.exists());
    drop(store.reserve(Some("s")).unwrap());
    assert_eq!(files(directory.path()), [".lock"]);
}

#[test]
fn damaged_record_is_named_and_other_records_are_kept() {
    let whole = record("bad", 2).to_xml();
    let damages: [&[u8]; 9] = [
        b"",
        &whole.as_bytes()[..whole.len() / 2],
        record("other", 2).to_xml().as_bytes().to_vec().leak(),
        b"<domainsnapshot/>",
        b"\0\0\0\0",
        b"\xff\xfe",
        whole.replace("<name>bad</name>", "<name>../bad</name>").leak().as_bytes(),
        whole.replace("<domain><name>x</name></domain>", "<domain/>").leak().as_bytes(),
        whole.replace("<creationTime>2<", "<creationTime>-2<").leak().as_bytes(),
    ];
    for damage in damages {
        let (directory, store) = scratch();
        commit(&store, "good", 1);
        commit(&store, "bad", 2);
        commit(&store, "last", 3);
        std::fs::write(store.path("bad.xml"), damage).unwrap();
        let what = String::from_utf8_lossy(damage);
        let before = files(directory.path());
        for result in [store.read("bad").map(drop), store.forget("bad"), store.set_current("bad")] {
            let error = result.expect_err(&what);
            assert_eq!(error.code, Code::InvalidDomainSnapshot, "{what}: {error}");
            assert!(error.message.contains("bad.xml"), "{what}: {error}");
        }
        // The damaged snapshot still counts as existing, and the others are unchanged.
        assert_eq!(names(&store), ["good", "last"], "{what}");
        assert_error(store.reserve(Some("bad")), Code::OperationInvalid, "already exists");
        assert_eq!(store.read("good").unwrap().name, "good");
        assert_eq!(parent(&store, "last").as_deref(), Some("bad"));
        assert_eq!(store.current().unwrap().as_deref(), Some("last"));
        assert_eq!(files(directory.path()), before);
        assert_eq!(std::fs::read(store.path("bad.xml")).unwrap(), damage);
        // The damaged record does not prevent the next snapshot.
        assert_eq!(commit(&store, "next", 4).parent.as_deref(), Some("last"));
    }
}

/// The records of earlier versions have another XML namespace.
#[test]
fn records_of_a_former_version_are_listed_brought_back_renewed_and_deleted() {
    const NAMESPACE: &str = "\"urn:instantsnap:record:1\"";
    const FORMER: &str = "\"https://instantsnap.invalid/domainsnapshot/1\"";
    let opened = Opened::start(&machine(&Binary::all()[0], 2));
    let file = |name: &str| opened.state_dir().join(format!("{name}.xml"));
    let counts = |name: &str| {
        let text = std::fs::read_to_string(file(name)).unwrap();
        [NAMESPACE, FORMER].map(|namespace| text.matches(namespace).count())
    };
    for name in ["a", "b", "c"] {
        opened.snapshot(name).unwrap();
        let record = opened.record(name);
        let text = record.to_xml().replace(NAMESPACE, FORMER);
        std::fs::write(file(name), text).unwrap();
        assert_eq!(counts(name), [0, 1]);
        assert_eq!(opened.record(name), record);
    }
    assert_eq!(opened.handle.snapshot_list().names().unwrap(), ["a", "b", "c"]);
    opened.restore_clone("b");
    let renewed = Record { parent: None, ..opened.record("b") };
    opened.handle.delete("a", METADATA_ONLY).unwrap();
    assert_eq!(counts("b"), [1, 0]);
    assert_eq!(opened.record("b"), renewed);
    assert_eq!(counts("c"), [0, 1]);
    for name in ["c", "b"] {
        let memory = opened.record(name).memory_file;
        opened.handle.delete(name, 0).unwrap();
        assert!(!file(name).exists() && !Path::new(&memory).exists(), "{name}");
    }
    assert_eq!(opened.handle.snapshot_list().names().unwrap(), [""; 0]);
    opened.guest.wait_ticks(ALL_SECTORS);
}

#[test]
fn invalid_current_file_means_no_current_snapshot() {
    let (_directory, store) = scratch();
    commit(&store, "s", 1);
    for nonsense in ["gone", "", "../s", "s\n", "\u{1}"] {
        std::fs::write(store.path(".current"), nonsense).unwrap();
        assert_eq!(store.current().unwrap(), None, "{nonsense:?}");
    }
    assert_eq!(names(&store), ["s"]);
}

#[test]
fn files_that_are_not_records_are_ignored() {
    let (_directory, store) = scratch();
    commit(&store, "s", 1);
    for name in ["notes.txt", ".hidden.xml", "s.mem", "xml", ".s.reserved"] {
        std::fs::write(store.path(name), "x").unwrap();
    }
    assert_eq!(names(&store), ["s"]);
}

#[test]
fn foreign_files_are_not_records_and_do_no_harm() {
    let (directory, store) = scratch();
    commit(&store, "s", 1);
    let path = |name: &str| directory.path().join(name);
    let pipe = |name: &str| {
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path(name),
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
    };
    std::fs::write(path("stray.xml"), "<x/>").unwrap();
    std::fs::create_dir(path("directory.xml")).unwrap();
    pipe("pipe.xml");
    std::os::unix::fs::symlink(path("s.xml"), path("link.xml")).unwrap();
    std::os::unix::fs::symlink(path("nowhere"), path("dangling.xml")).unwrap();
    let mut strangers = vec!["stray", "directory", "pipe", "link", "dangling"];
    std::fs::write(path("foreign.xml"), record("foreign", 1).to_xml()).unwrap();
    // Root can change the owner of a file.
    if std::os::unix::fs::chown(path("foreign.xml"), Some(12345), None).is_ok() {
        strangers.push("foreign");
    } else {
        std::fs::remove_file(path("foreign.xml")).unwrap();
    }
    assert_eq!(names(&store), ["s"]);
    assert_eq!(store.others("s").unwrap(), []);
    for name in strangers {
        let error = store.read(name).expect_err(name);
        eprintln!("{error}");
        assert!(error.message.contains(&format!("{name}.xml")), "{error}");
        // A new snapshot of that name would replace the file.
        assert_error(store.reserve(Some(name)), Code::OperationInvalid, "already exists");
    }
    commit(&store, "t", 2);
    store.forget("s").unwrap();
    assert_eq!(names(&store), ["t"]);
    // The same in place of the library's own files.
    for name in [".lock", ".current"] {
        std::fs::remove_file(path(name)).unwrap();
        pipe(name);
        assert_error(store.reserve(Some("u")), Code::SystemError, "it is not a regular file");
        std::fs::remove_file(path(name)).unwrap();
        std::os::unix::fs::symlink(path("nowhere"), path(name)).unwrap();
        assert_error(store.reserve(Some("u")), Code::SystemError, "it is a symbolic link");
        std::fs::remove_file(path(name)).unwrap();
        store.set_current("t").unwrap();
    }
    assert!(!path("nowhere").exists());
}

/// A merge or a delete must not destroy an image that a snapshot needs whose record is unreadable
/// or renamed.
#[test]
fn damaged_or_renamed_records_still_protect_their_images() {
    let (_directory, store) = scratch();
    for name in ["a", "b", "c"] {
        commit(&store, name, 1);
    }
    std::fs::copy(store.path("a.xml"), store.path("copy.xml")).unwrap();
    std::fs::rename(store.path("b.xml"), store.path("renamed.xml")).unwrap();
    assert_eq!(names(&store), ["a", "c"]);
    let others = |name: &str| {
        store.others(name).map(|all| all.into_iter().map(|record| record.name).collect::<Vec<_>>())
    };
    assert_eq!(others("a").unwrap(), ["c", "b"]);
    assert_error(store.read("renamed"), Code::InvalidDomainSnapshot, "'b'");
    for damage in ["", "<domainsnapshot>"] {
        std::fs::write(store.path("c.xml"), damage).unwrap();
        assert_error(others("a"), Code::InvalidDomainSnapshot, "c.xml");
    }
}

#[test]
fn snapshots_with_circular_parents_can_be_deleted() {
    let (_directory, store) = scratch();
    for (name, parent) in [("a", "c"), ("b", "a"), ("c", "b"), ("own", "own")] {
        let record = Record { parent: Some(parent.into()), ..record(name, 1) };
        std::fs::write(store.path(&format!("{name}.xml")), record.to_xml()).unwrap();
    }
    let parents =
        || store.list().unwrap().into_iter().map(|record| record.parent).collect::<Vec<_>>();
    assert_eq!(names(&store), ["a", "b", "c", "own"]);
    assert_eq!(parents(), [None, Some("a".into()), Some("b".into()), None]);
    for name in ["own", "b", "a", "c"] {
        store.forget(name).unwrap();
    }
    assert_eq!(names(&store), Vec::<String>::new());
}

#[test]
fn directory_writable_by_others_allows_reading_records_only() {
    use std::os::unix::fs::{PermissionsExt, chown};
    let (directory, store) = scratch();
    commit(&store, "s", 1);
    let held = store.reserve(Some("held")).unwrap();
    let set = |mode| {
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(mode)).unwrap()
    };
    let check_refused = |mends: &str| {
        let store = Store::open(directory.path()).unwrap();
        assert_eq!(names(&store), ["s"]);
        assert_eq!(store.read("s").unwrap().name, "s");
        assert_eq!(store.current().unwrap().as_deref(), Some("s"));
        for result in [
            store.reserve(Some("new")).map(drop),
            store.commit(&held, record("held", 2)).map(drop),
            store.read_to_use("s").map(drop),
            store.others("s").map(drop),
            store.set_current("s"),
            store.forget("s"),
            instantsnap::engine::prepare_revert(directory.path(), "s", None).map(drop),
        ] {
            let error = result.unwrap_err();
            assert!(!error.message.contains("  "), "{error}");
            assert_error(Err::<(), _>(error), Code::AccessDenied, mends);
        }
    };
    for mode in [0o777, 0o757, 0o722] {
        set(mode);
        check_refused("chmod go-w");
    }
    // A group may write where it is the owner's own group, unless it has other members.
    for mode in [0o700, 0o750, 0o755, 0o775, 0o1777] {
        set(mode);
        assert_eq!(Store::open(directory.path()).unwrap().read_to_use("s").unwrap().name, "s");
    }
    if chown(directory.path(), None, Some(12345)).is_ok() {
        set(0o775);
        check_refused("chmod go-w");
        set(0o755);
        store.read_to_use("s").unwrap();
    }
    if chown(directory.path(), Some(12345), None).is_ok() {
        check_refused("chown");
    }
}

#[test]
fn concurrent_commits_are_all_kept_and_readers_see_whole_files() {
    let (directory, store) = scratch();
    let done = AtomicBool::new(false);
    let start = Barrier::new(6);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut most = 0;
            while !done.load(Ordering::SeqCst) {
                let count = store.list().unwrap().len();
                assert!(count >= most, "a record is gone");
                most = count;
                store.current().unwrap();
            }
        });
        let writers: Vec<_> = (0..6)
            .map(|writer| {
                let (start, directory) = (&start, directory.path());
                scope.spawn(move || {
                    let store = Store::open(directory).unwrap();
                    start.wait();
                    for n in 0..10 {
                        commit(&store, &format!("{writer}-{n}"), 1);
                    }
                })
            })
            .collect();
        let ended: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        done.store(true, Ordering::SeqCst);
        reader.join().unwrap();
        assert!(ended.iter().all(Result::is_ok));
    });
    let records = store.list().unwrap();
    assert_eq!(records.len(), 60);
    // The records form one chain: each is the parent of one other, but the current one, which is
    // the last.
    let current = store.current().unwrap().unwrap();
    assert_eq!(records.last().unwrap().name, current);
    for pair in records.windows(2) {
        assert_eq!(pair[1].parent.as_ref(), Some(&pair[0].name));
    }
    assert_eq!(files(directory.path()).len(), 62);
}

#[test]
fn path_that_is_not_a_directory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let missing = directory.path().join("missing");
    assert_error(Store::open(&missing), Code::SystemError, missing.to_str().unwrap());
    assert_error(Store::open(&file), Code::SystemError, "not a directory");
    let control = directory.path().join("a\nb");
    std::fs::create_dir(&control).unwrap();
    assert_error(Store::open(&control), Code::SystemError, "XML");
    let guest = machine(&Binary::all()[0], 0).start();
    assert_error(
        Handle::open_qmp(&guest.qmp(), None, &missing).map(drop),
        Code::SystemError,
        "missing",
    );
}

#[test]
fn unusable_state_directory_fails_the_snapshot_before_it_begins() {
    let opened = Opened::start(&machine(&Binary::all()[0], 1));
    // This fails for root too: a directory is in the place of a file, or the state directory is
    // gone.
    std::fs::create_dir(opened.state_dir().join(".current")).unwrap();
    let before = opened.trace();
    assert_error(opened.snapshot("s"), Code::SystemError, ".current");
    assert_untouched(&opened, &before);
    std::fs::remove_dir(opened.state_dir().join(".current")).unwrap();
    std::fs::create_dir(opened.state_dir().join("s.xml")).unwrap();
    assert_error(opened.snapshot("s"), Code::OperationInvalid, "already exists");
    std::fs::remove_dir_all(opened.state_dir()).unwrap();
    let before = opened.trace();
    assert_error(opened.snapshot("s"), Code::SystemError, "state directory");
    assert_untouched(&opened, &before);
}
