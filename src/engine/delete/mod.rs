// SPDX-License-Identifier: LGPL-2.1-or-later

//! Deletes snapshots: a plan says which images are merged or removed, then steps do it.
//!
//! Both depend on who keeps the snapshot definitions: a stock libvirt ([`plan`], [`managed`]), or
//! the library, in a state directory ([`stored_plan`], [`stored`]).

pub mod managed;
mod plan;
mod renew;
mod stored;
mod stored_plan;

use crate::backend::Connector;
use crate::error::{Result, fail};
use crate::model::flags::DeleteFlags;

/// Deletes a snapshot, with its files unless the flags say otherwise.
pub fn delete(connector: &dyn Connector, name: &str, flags: DeleteFlags) -> Result<()> {
    if let Some(snapshot) = connector.managed(name)? {
        return super::managed::delete_managed(&snapshot, flags);
    }
    match connector.store() {
        Some(store) => stored::delete(connector, store, name, flags),
        None if flags == DeleteFlags::METADATA_ONLY => connector.snapshot_list().forget(name),
        None => fail!(
            OperationUnsupported,
            "a snapshot that the driver has recorded itself is deleted with just \
             VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY here: its files are the driver's to merge \
             and remove"
        ),
    }
}
