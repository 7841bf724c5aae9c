// SPDX-License-Identifier: LGPL-2.1-or-later

//! Checks of a guest.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::host;
use super::report::Report;
use super::userfaultfd::Subject;
use crate::backend::{Connector, DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::engine::create::check_state;
use crate::error::Result;
use crate::migration::Settings;
use crate::model::{Drive, Journals, Plan, Request, Role, Store, plan};
use crate::monitor::json::Json;
use crate::monitor::{Command, commands};

/// A name for overlays that are planned and never made.
const NAME: &str = "instantsnap-doctor";

/// Examines a guest that no other operation holds.
pub fn examine(connector: &dyn Connector, guest: &mut dyn Guest, report: &mut Report) {
    state(guest, report);
    let version = qemu(guest, report);
    permission(guest, report, version);
    settings(guest, report);
    match guest.check_memory_not_shared() {
        Ok(()) => report.pass("memory", "", "no other process writes the guest's memory"),
        Err(error) => report.error("memory", "", error),
    }
    pages(guest, report);
    let survey = match guest.survey() {
        Ok(survey) => survey,
        Err(error) => return report.error("disk", "", error),
    };
    let planned = disks(guest, report, &survey.drives);
    room(guest, report, &planned, connector.store());
    confinement(guest, report);
}

fn state(guest: &mut dyn Guest, report: &mut Report) {
    match check_state(guest) {
        Ok(state) => report.pass("guest", "", format!("it is {}", state.description())),
        Err(error) => report.error("guest", "", error),
    }
}

/// QEMU's version, and whether it has background snapshots.
fn qemu(guest: &mut dyn Guest, report: &mut Report) -> Option<(u64, u64)> {
    let (major, minor) = match commands::query_version(guest, Deadline::after(DEFAULT_TIMEOUT)) {
        Ok(version) => version,
        Err(error) => {
            report.error("qemu", "", error);
            return None;
        }
    };
    let object = format!("{major}.{minor}");
    match Settings::query(guest).and_then(|settings| settings.require_background()) {
        Ok(()) => report.pass("qemu", object, "it has background snapshots"),
        Err(error) => report.error("qemu", object, error),
    }
    Some((major, minor))
}

fn permission(guest: &dyn Guest, report: &mut Report, version: Option<(u64, u64)>) {
    let subject = guest.pid().and_then(|pid| Subject::of_process(&pid.to_string()));
    match subject {
        Some(subject) => {
            let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
            let user = host::name_of(&passwd, subject.user);
            host::permission(report, &user, &subject, version);
        }
        None => report.skip("userfaultfd", "", "QEMU's process cannot be seen from here"),
    }
}

/// Settings that an earlier snapshot, whose process and watchdog were killed, has left in QEMU.
fn settings(guest: &mut dyn Guest, report: &mut Report) {
    match Settings::has_leftover(guest) {
        Ok(false) => report.pass("settings", "", "no earlier snapshot has left its settings"),
        Ok(true) if Settings::lazy(guest).is_ok_and(|lazy| lazy.is_some()) => report.warn(
            "settings",
            "",
            "the memory of the snapshot that the guest was loaded from is still coming",
            "wait until it is in (instantsnap_memory_wait())",
        ),
        Ok(true) => report.warn(
            "settings",
            "",
            "a snapshot is under way, or was killed, and its migration settings are in QEMU",
            "when no snapshot is under way: instantsnap_recover()",
        ),
        Err(error) => report.error("settings", "", error),
    }
}

/// The size of the pages of the guest's memory: most of the time of a snapshot depends on it.
fn pages(guest: &mut dyn Guest, report: &mut Report) {
    let check = "pages";
    match has_huge_pages(guest) {
        Ok(true) => report.pass(check, "", "the guest's memory has huge pages"),
        Ok(false) => report.pass(
            check,
            "",
            "the guest's memory has small pages, which QEMU saves one by one while the guest runs: \
             with huge pages (hugetlb) that takes about a third of the time",
        ),
        Err(error) => report.skip(check, "", error.message),
    }
}

fn has_huge_pages(guest: &mut dyn Guest) -> Result<bool> {
    let objects = run(guest, "qom-list", json!({ "path": "/objects" }))?;
    for object in objects.as_array().into_iter().flatten() {
        let property = match object["type"].as_str() {
            Some("child<memory-backend-memfd>") => "hugetlb",
            Some("child<memory-backend-file>") => "mem-path",
            _ => continue,
        };
        let path = format!("/objects/{}", object["name"].as_str().unwrap_or_default());
        let value = run(guest, "qom-get", json!({ "path": path, "property": property }))?;
        if value.as_bool() == Some(true)
            || value.as_str().is_some_and(|path| is_hugetlbfs(Path::new(path)))
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a file, or if it has been removed its directory, is on a file system of huge pages.
fn is_hugetlbfs(path: &Path) -> bool {
    const MAGIC: i64 = 0x9584_58f6;
    let found = [Some(path), path.parent()]
        .into_iter()
        .flatten()
        .find_map(|path| rustix::fs::statfs(path).ok());
    found.is_some_and(|found| found.f_type == MAGIC)
}

/// What a snapshot with the default XML does with each disk. Returns the plan of those that it can
/// switch.
fn disks(guest: &mut dyn Guest, report: &mut Report, drives: &[Drive]) -> Plan {
    let check = "disk";
    let mut all = Plan::default();
    for drive in drives {
        let name = drive.name();
        let planned = match plan(vec![drive.clone()], &Request::default(), NAME, false) {
            Ok(planned) => planned,
            Err(error) if drive.unsupported_reason.is_some() => {
                report.error(check, name, error);
                continue;
            }
            // The request can name an overlay, or leave the disk out.
            Err(error) => {
                report.warn(check, name, error.message, "");
                continue;
            }
        };
        match drive.role {
            Role::Empty => report.pass(check, name, "it has no medium"),
            Role::ReadOnly => report.pass(check, name, "it is read-only, and left out"),
            Role::Firmware => report.pass(check, name, "UEFI variables: they are copied"),
            Role::Disk if !planned.manual.is_empty() => report.warn(
                check,
                name,
                "its snapshot is left to the storage (snapshot='manual')",
                "set a storage hook (instantsnap_set_storage_hook())",
            ),
            Role::Disk if planned.disks.is_empty() => {
                report.warn(check, name, "it is left out (snapshot='no')", "");
            }
            Role::Disk => match guest.check_images_are_named(&planned.disks) {
                Ok(()) => report.pass(check, name, "it can be switched to an overlay"),
                Err(error) => report.error(check, name, error),
            },
        }
        all.disks.extend(planned.disks);
        all.manual.extend(planned.manual);
        all.firmware.extend(planned.firmware);
    }
    match guest.check_not_busy(&all.disks) {
        Ok(()) => report.pass("jobs", "", "no job uses the guest's disks"),
        Err(error) => report.error("jobs", "", error),
    }
    all
}

/// The room for overlays and for the memory image.
fn room(guest: &mut dyn Guest, report: &mut Report, planned: &Plan, store: Option<&Store>) {
    let check = "room";
    let memory = commands::query_memory_size(guest, Deadline::after(DEFAULT_TIMEOUT));
    let memory = match memory {
        Ok(memory) => memory,
        Err(error) => return report.skip(check, "", error.message),
    };
    // libvirt's request names the image, as a rule beside a disk.
    let first = planned.disks.first().and_then(|disk| Path::new(&disk.overlay).parent());
    let Some(directory) = store.map(Store::directory).or(first) else {
        return report.skip(check, "", "it is not known where the memory image will be");
    };
    let object = directory.display().to_string();
    let free = match rustix::fs::statvfs(directory) {
        Ok(found) => found.f_bavail.saturating_mul(found.f_frsize),
        Err(error) => return report.skip(check, object, error.to_string()),
    };
    let message =
        format!("{} MiB are free; the memory image takes up to {} MiB", free >> 20, memory >> 20);
    if free < memory {
        let remedy = "free some, or name another file for the memory in the snapshot's XML";
        report.warn(check, object, message, remedy);
    } else {
        report.pass(check, object, message);
    }
}

/// The security driver that confines QEMU.
fn confinement(guest: &dyn Guest, report: &mut Report) {
    let check = "confinement";
    let Some(pid) = guest.pid() else {
        return report.skip(check, "", "QEMU's process cannot be seen from here");
    };
    let label = [format!("/proc/{pid}/attr/apparmor/current"), format!("/proc/{pid}/attr/current")]
        .into_iter()
        .find_map(|path| fs::read_to_string(path).ok())
        .unwrap_or_default();
    let label = label.trim_end_matches(['\0', '\n']);
    if label.ends_with("(enforce)") {
        report.warn(
            check,
            label,
            "AppArmor confines QEMU: it may forbid QEMU to write to an image below an overlay, \
             which deletes and undone snapshots merge into",
            "if a merge fails with 'Permission denied', allow the images' directory in \
             /etc/apparmor.d/local/abstractions/libvirt-qemu",
        );
    } else {
        report.pass(check, label, "no AppArmor profile confines QEMU");
    }
}

/// Snapshots that were interrupted, by their journals.
pub fn interrupted(journals: &Journals, report: &mut Report) {
    let check = "leftovers";
    let store = &journals.store;
    let names = match journals.names() {
        Ok(names) => names,
        Err(error) => return report.error(check, "", error),
    };
    if names.is_empty() {
        let directory = store.directory().display().to_string();
        return report.pass(check, directory, "no snapshot is under way or was interrupted");
    }
    for name in names {
        match store.claim(&name) {
            Ok(None) => report.warn(check, name, "this snapshot is being taken or undone", ""),
            Ok(Some(_)) if is_undone(store, &name) => report.warn(
                check,
                name,
                "this snapshot was undone, but for what its storage hook may have left",
                "call instantsnap_recover(), which names that",
            ),
            Ok(Some(_)) => report.fail(
                check,
                name,
                "this snapshot was interrupted: its process and its watchdog were killed",
                "call instantsnap_recover()",
            ),
            Err(error) => report.error(check, name, error),
        }
    }
}

fn is_undone(store: &Store, name: &str) -> bool {
    matches!(store.read_journal(name), Ok(Some(Ok(journal))) if journal.is_undone())
}

fn run(guest: &mut dyn Guest, command: &str, arguments: Value) -> Result<Json> {
    let step = format!("cannot ask QEMU ({command})");
    guest.run(&step, Command::new(command, arguments), Deadline::after(DEFAULT_TIMEOUT))
}
