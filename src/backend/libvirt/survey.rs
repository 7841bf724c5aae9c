// SPDX-License-Identifier: LGPL-2.1-or-later

//! The state of a domain when its snapshot was planned. It is read once, and only compared
//! afterwards.

use std::path::PathBuf;

use serde_json::json;

use super::call::Retry;
use super::session::Session;
use super::{drives, volumes};
use crate::backend::guest::{DEFAULT_TIMEOUT, Description};
use crate::deadline::Deadline;
use crate::error::Result;
use crate::libvirt::xml::{INACTIVE, MIGRATABLE, SECURE};
use crate::model::domain::Domain;
use crate::model::{Drive, Role};
use crate::monitor::{Command, Execute};

/// The state of a domain when its snapshot was planned.
#[derive(Debug, Default)]
pub struct Survey {
    /// The volumes of storage pools that its disks are on.
    pub volumes: Vec<volumes::Volume>,
    /// The domain, with paths in place of volumes.
    pub live: Domain,
    /// The unchanged definition of a persistent domain.
    pub inactive_xml: Option<String>,
    /// The name of the snapshot that was current.
    pub current: Option<String>,
    /// The drives, in the order of the XML.
    pub drives: Vec<Drive>,
    /// The domain XML for the memory image.
    migratable_xml: String,
    owner: Option<PathBuf>,
}

impl Survey {
    /// Reads a domain.
    pub fn read(session: &mut Session) -> Result<Survey> {
        let live_xml = session.xml(SECURE)?;
        let mut volumes = Vec::new();
        if volumes::are_in(&live_xml) {
            // libvirt does not pass on the reply if a disk is on hundreds of images. Then disks on
            // volumes cannot get an overlay.
            let query = Command::new("query-block", json!({}));
            let blocks = session.execute(query, Deadline::after(DEFAULT_TIMEOUT));
            volumes = volumes::of_domain(&live_xml, &blocks.unwrap_or_default())?;
        }
        let live = Domain::parse(&volumes::with_paths(&live_xml, &volumes)?)?;
        let drives = sized(session, drives::drives(&live)?)?;
        let migratable_xml = volumes::with_paths(&session.xml(SECURE | MIGRATABLE)?, &volumes)?;
        let inactive_xml = match session.is_persistent()? {
            true => Some(session.xml(SECURE | INACTIVE)?),
            false => None,
        };
        let current = session.current_snapshot()?;
        let local =
            drives.iter().find(|drive| drive.role == Role::Disk && drive.file.starts_with('/'));
        let owner = owner_of_new_files(session, local.map(|drive| drive.file.as_str()));
        Ok(Survey { volumes, live, inactive_xml, current, drives, migratable_xml, owner })
    }

    /// The description for the memory image.
    pub fn description(&self) -> Description {
        Description {
            domain_xml: self.migratable_xml.clone(),
            cookie: drives::cookie(&self.live),
            owner: self.owner.clone(),
        }
    }

    /// The targets of the disks for which `planned` is false.
    pub fn left_out<'a>(&self, planned: impl Fn(&str) -> bool + 'a) -> Vec<String> {
        let targets = self.live.disks.iter().map(|disk| &disk.target);
        targets.filter(|target| !planned(target)).cloned().collect()
    }
}

/// A file whose owner new files get: this image, or the directory of QEMU's process in /proc. The
/// files of a session belong to the session's user, even if root acts on the session. `None` if
/// libvirt gives files to QEMU's user itself.
pub fn owner_of_new_files(session: &Session, image: Option<&str>) -> Option<PathBuf> {
    let is_of_another_user =
        session.connector.uri.contains("/session") && rustix::process::geteuid().is_root();
    let process = || session.qemu.as_ref().map(|qemu| PathBuf::from(format!("/proc/{}", qemu.pid)));
    if is_of_another_user { image.map(PathBuf::from).or_else(process) } else { None }
}

/// Adds the drives' sizes, which the XML does not have.
fn sized(session: &mut Session, mut drives: Vec<Drive>) -> Result<Vec<Drive>> {
    let is_switched =
        |drive: &&mut Drive| drive.role == Role::Disk && drive.unsupported_reason.is_none();
    for drive in drives.iter_mut().filter(is_switched) {
        let target = drive.name().to_owned();
        let step = format!("cannot ask for the size of disk '{target}'");
        drive.size = session
            .call_with_timeout(&step, Retry::Safe, move |domain| domain.disk_size(&target))?;
    }
    Ok(drives)
}
