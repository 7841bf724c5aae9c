// SPDX-License-Identifier: LGPL-2.1-or-later

//! Finds the other users of a domain's images: QEMUs that have them open, and other domains of the
//! connection that name them, or an overlay of them.

use std::collections::{BTreeMap, BTreeSet};

use crate::backend::images::{self, Id, id};
use crate::backend::libvirt::volumes::{self, Volume};
use crate::backend::libvirt::{CallError, ManagedDomain, OtherDomain};
use crate::backend::locks;
use crate::error::Result;
use crate::model::domain::{Disk, domain_disks};

/// The other users of a domain's images.
pub struct Users {
    others: Others,
    /// The images that the domain's own QEMU has open.
    live: BTreeSet<Id>,
    qemu: Option<u32>,
}

impl Users {
    /// Reads the domain and the connection's other domains. `volumes`: the known volumes.
    pub fn read(domain: &ManagedDomain, volumes: &[Volume]) -> Result<Users> {
        let refused = |error: CallError| error.into_error("cannot look at the domain");
        let others = Others::read(&domain.others()?, volumes);
        let mut users = Users { others, live: BTreeSet::new(), qemu: None };
        if domain.is_active().map_err(refused)? {
            let disks =
                domain_disks(&volumes::with_paths(&domain.xml(0).map_err(refused)?, volumes)?)?;
            users.live = disks.iter().flat_map(Disk::layers).map(id).collect();
            users.qemu = locks::qemu_of_domain(domain.uuid());
        }
        Ok(users)
    }

    /// The name of another domain that needs an image.
    pub fn other_domain_on(&self, image: &Id) -> Option<&str> {
        self.others.domain_on(image)
    }

    /// The other user of an image, as a part of a message.
    pub fn of(&self, image: &Id) -> Option<String> {
        if let Some(domain) = self.others.domain_on(image) {
            return Some(format!("domain '{domain}' stands on it"));
        }
        let open = match (self.live.contains(image), self.qemu) {
            (false, _) => locks::is_in_use(image),
            (true, Some(qemu)) => locks::is_in_use_besides(image, qemu),
            (true, None) => false,
        };
        open.then(|| "another QEMU has it open".to_owned())
    }
}

/// The images, each with the name of a domain that needs it.
#[derive(Debug, Default)]
struct Others(BTreeMap<Id, String>);

impl Others {
    fn read(domains: &[OtherDomain], volumes: &[Volume]) -> Others {
        let mut others = Others::default();
        for domain in domains {
            for image in images_of(domain, volumes) {
                others.0.entry(image).or_insert_with(|| domain.name.clone());
            }
        }
        others
    }

    /// The domain that needs an image.
    fn domain_on(&self, image: &Id) -> Option<&str> {
        self.0.get(image).map(String::as_str)
    }
}

fn images_of(domain: &OtherDomain, volumes: &[Volume]) -> Vec<Id> {
    let named = domain
        .texts
        .iter()
        .map(|text| volumes::with_paths(text, volumes).unwrap_or_else(|_| text.clone()));
    let disks = named.flat_map(|text| domain_disks(&text).unwrap_or_default());
    let mut found = Vec::new();
    for disk in disks {
        found.extend(disk.backing.iter().map(|below| id(below)));
        // A domain that is shut off names only the topmost image.
        let mut next = disk.file.clone().map(|file| (file, disk.format.clone()));
        while let Some((file, format)) = next.take() {
            let image = id(&file);
            // A chain with a loop ends here.
            if !found.contains(&image) {
                found.extend(images::server_below(&file).map(|below| id(&below)));
                next = images::below(&file, &format);
                found.push(image);
            }
        }
    }
    found
}
