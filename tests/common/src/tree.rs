// SPDX-License-Identifier: LGPL-2.1-or-later

//! A domain with a tree of snapshots, for tests that revert and delete, and the assertions after
//! each step.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use instantsnap::error::Error;
use instantsnap::image::Format;
use instantsnap_testkit::{Daemon, Machine};

use crate::virt::{OpenedDomain, domain};
use crate::{INSTANTLY, first_tick};

/// The program that takes the snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// This library.
    Instant,
    /// libvirt, which takes its own external snapshots with memory.
    Libvirt,
}

/// The domain, and the range of numbers in which each snapshot was taken.
pub struct Tree {
    pub opened: OpenedDomain,
    maker: Maker,
    taken: BTreeMap<String, (u32, u32)>,
}

impl Tree {
    /// Starts a domain without snapshots.
    pub fn start(machine: &Machine, daemon: &Daemon, maker: Maker) -> Tree {
        Tree { opened: OpenedDomain::start(machine, daemon), maker, taken: BTreeMap::new() }
    }

    /// Takes a snapshot of the running guest.
    #[track_caller]
    pub fn snapshot(&mut self, name: &str) {
        let before = self.opened.guest.wait_ticks(1);
        match self.maker {
            Maker::Instant => {
                self.opened.snapshot(name).unwrap_or_else(|error| panic!("{error}"));
            }
            Maker::Libvirt => {
                let memory = format!("file={},snapshot=external", self.memory(name).display());
                self.opened.guest.virsh("snapshot-create-as", &[name, "--memspec", &memory]);
            }
        }
        // The guest counts on while its memory is written, and its output reaches the log a moment
        // later.
        let after = self.opened.guest.wait_ticks(2);
        self.taken.insert(name.to_owned(), (before, after));
    }

    /// Takes an instant snapshot of the running guest with a memory image of this format.
    #[track_caller]
    pub fn snapshot_as(&mut self, name: &str, format: Format) {
        let before = self.opened.guest.wait_ticks(1);
        let xml = self.opened.xml(name, "");
        let taken = self.opened.handle.create_as(Some(format), &xml, INSTANTLY, &mut ());
        taken.unwrap_or_else(|error| panic!("{error}"));
        let after = self.opened.guest.wait_ticks(2);
        self.taken.insert(name.to_owned(), (before, after));
    }

    /// The memory image of a snapshot.
    pub fn memory(&self, name: &str) -> PathBuf {
        self.opened.memory_file(name)
    }

    /// Reverts to a snapshot.
    pub fn try_revert(&self, name: &str, flags: u32) -> Result<(), Error> {
        self.opened.revert(name, flags)
    }

    /// Reverts to a snapshot. Asserts that the guest counts on from the snapshot, with memory and
    /// disks in agreement.
    #[track_caller]
    pub fn revert(&self, name: &str) {
        self.try_revert(name, 0).unwrap_or_else(|error| panic!("revert to {name}: {error}"));
        self.assert_is_at(name);
        assert_eq!(self.current().as_deref(), Some(name));
    }

    /// Asserts the same for a guest that was just reverted and runs.
    #[track_caller]
    pub fn assert_is_at(&self, name: &str) {
        self.opened.guest.wait_ticks(3);
        let (before, after) = self.taken[name];
        let first = first_tick(&self.opened.guest);
        assert!(
            (before..=after + 1).contains(&first),
            "{name} was taken from {before} to {after}, and goes on from {first}"
        );
        assert!(self.opened.guest.virsh("domstate", &[]).contains("running"));
    }

    /// Deletes a snapshot.
    pub fn try_delete(&self, name: &str, flags: u32) -> Result<(), Error> {
        self.opened.delete(name, flags)
    }

    /// Deletes a snapshot. A running guest has to count on.
    #[track_caller]
    pub fn delete(&self, name: &str, flags: u32) {
        self.try_delete(name, flags).unwrap_or_else(|error| panic!("delete {name}: {error}"));
        if self.opened.guest.alive() {
            self.opened.guest.wait_ticks(crate::ALL_SECTORS);
        }
        for (name, memory) in self.taken.keys().map(|name| (name, self.memory(name))) {
            assert_eq!(memory.exists(), self.opened.find(name).is_some(), "memory image of {name}");
        }
    }

    /// `child<parent` for each snapshot.
    pub fn shape(&self) -> String {
        let list = self.opened.guest.virsh("snapshot-list", &["--parent"]);
        let mut shape: Vec<String> = list
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .filter(|words| words.len() > 4)
            .map(|words| format!("{}<{}", words[0], words.get(5).unwrap_or(&"")))
            .collect();
        shape.sort();
        shape.join(" ")
    }

    /// The current snapshot's name.
    pub fn current(&self) -> Option<String> {
        domain(&self.opened.guest).current_snapshot().unwrap().map(|current| current.name())
    }

    #[track_caller]
    pub fn assert_shape(&self, shape: &str, current: Option<&str>) {
        assert_eq!(self.shape(), shape);
        assert_eq!(self.current().as_deref(), current);
    }

    /// Asserts that every snapshot can be reverted to, and that all images are sound after that.
    #[track_caller]
    pub fn assert_all_can_be_reverted_to(&self) {
        let names: Vec<String> =
            domain(&self.opened.guest).snapshots().unwrap().iter().map(|one| one.name()).collect();
        for name in names.iter().chain(names.iter().rev()) {
            self.revert(name);
        }
        self.assert_images_are_sound();
    }

    /// The image files in the guest's directory.
    pub fn images(&self) -> Vec<String> {
        let directory = self.opened.guest.directory();
        let files = crate::files_below(directory).into_iter();
        let mut images: Vec<String> = files
            .filter(|file| is_qcow2(file) || file.extension().is_some_and(|end| end == "raw"))
            .map(|file| file.strip_prefix(directory).unwrap().display().to_string())
            .collect();
        images.sort();
        images
    }

    /// Ends the domain, and has qemu-img check all images.
    #[track_caller]
    pub fn assert_images_are_sound(&self) {
        if self.opened.guest.alive() {
            self.opened.guest.virsh("destroy", &[]);
        }
        let images = crate::files_below(self.opened.guest.directory());
        for image in images.iter().filter(|image| is_qcow2(image)) {
            let output = Command::new("qemu-img").arg("check").arg(image).output().unwrap();
            let said = [output.stdout, output.stderr]
                .map(|said| String::from_utf8_lossy(&said).into_owned());
            assert!(output.status.success(), "{}: {said:?}", image.display());
        }
    }
}

fn is_qcow2(file: &Path) -> bool {
    std::fs::read(file).is_ok_and(|content| content.starts_with(b"QFI\xfb"))
}
