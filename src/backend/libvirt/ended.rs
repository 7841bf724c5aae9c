// SPDX-License-Identifier: LGPL-2.1-or-later

//! Undoes the switch of a domain that has ended: merges the guest's writes from the overlays into
//! the images.

use super::call::Retry;
use super::guest::LibvirtGuest;
use crate::backend::guest::{DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::error::{Result, fail};
use crate::libvirt::xml::{INACTIVE, SECURE};
use crate::libvirt::{Domain, State};

/// How often the undo is tried on a domain that other clients start and end meanwhile.
const STARTS: u32 = 5;

impl LibvirtGuest<'_> {
    /// Resumes the new QEMU of a domain that was started again, if the snapshot's pause has paused
    /// it.
    pub(super) fn resume_another(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.another_is_paused) {
            return Ok(());
        }
        let resumed =
            self.session.caller.call(Deadline::after(DEFAULT_TIMEOUT), Retry::Safe, |domain| {
                let paused = domain.is_active()? && domain.state()? == State::Paused;
                if paused { domain.resume() } else { Ok(()) }
            });
        resumed.map_err(|error| {
            error.into_error("cannot resume the domain, which was paused just after another client had started it again")
        })
    }

    /// Merges the overlays of a domain that has ended. Another client may start it at any time, on
    /// the overlays as long as its definition names them. They must not be removed until it is
    /// certain that it was not started.
    pub(super) fn merge_ended(&mut self) -> Result<()> {
        let mut active = self.is_started_again();
        for _ in 0..STARTS {
            let merged = if active { self.merge_started() } else { self.merge_offline() };
            let now = self.is_started_again();
            if now == active || active && merged.is_ok() {
                return merged;
            }
            active = now;
        }
        fail!(
            OperationFailed,
            "domain '{}' is started and ended again and again: the overlays {} may be in use, and \
             must not be removed",
            self.session.connector.name,
            self.overlays.paths()
        )
    }

    fn merge_started(&mut self) -> Result<()> {
        let chains = self.chains()?;
        self.overlays.merge(&mut self.session.caller, &chains)
    }

    fn merge_offline(&mut self) -> Result<()> {
        self.check_not_saved()?;
        self.overlays.merge_offline()?;
        self.put_definition_back()
    }

    /// Refuses to merge the overlays of a domain that was saved or migrated: it may go on with them
    /// elsewhere.
    fn check_not_saved(&mut self) -> Result<()> {
        // A transient domain does not exist any more, and how it ended is not known.
        if self.survey.inactive_xml.is_none() {
            return Ok(());
        }
        let is_saved = |domain: &Domain| {
            // A daemon that was started since knows only of a managed save.
            Ok(domain.is_saved_or_gone()? || !domain.is_active()? && domain.has_managed_save()?)
        };
        let step = "cannot look at the domain";
        if !self.session.call_with_timeout(step, Retry::Safe, is_saved)? {
            return Ok(());
        }
        if self.definition_without_overlays()?.is_some() {
            fail!(
                OperationFailed,
                "another client has saved the domain, or migrated it, meanwhile: it may go on with \
                 the overlays {}, as the domain's definition does, and they must not be removed",
                self.overlays.paths()
            );
        }
        Ok(())
    }

    /// The definition of a persistent domain, with its images of before the switch in place of the
    /// overlays; `None` if it names no overlay.
    fn definition_without_overlays(&mut self) -> Result<Option<String>> {
        let Some(before) = self.survey.inactive_xml.clone() else { return Ok(None) };
        let now = self.session.xml(SECURE | INACTIVE)?;
        self.overlays.without(&now, &before)
    }

    /// Puts the images back into the definition of a persistent domain. In the switch, libvirt has
    /// put the overlays into it.
    pub(super) fn put_definition_back(&mut self) -> Result<()> {
        let Some(restored) = self.definition_without_overlays()? else { return Ok(()) };
        self.session.call_with_timeout(
            "cannot put the domain's definition back",
            Retry::Safe,
            move |domain| domain.connect()?.define(&restored, 0).map(drop),
        )
    }
}
