// SPDX-License-Identifier: LGPL-2.1-or-later

//! A guest handle that takes flags as numbers, as C does, and parses them.

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use instantsnap::backend::LibvirtConnector;
use instantsnap::backend::driver::Driver;
use instantsnap::engine::{self, Created, Job, LoadOptions, Loaded, Observer, Returns, RevertPlan};
use instantsnap::error::Error;
use instantsnap::image::Format;
use instantsnap::model::Memory;
use instantsnap::model::flags::{CreateFlags, DeleteFlags, RevertFlags};

/// The format of memory images that INSTANTSNAP_TEST_IMAGE_FORMAT names; `None`: the default.
pub fn image_format() -> Option<Format> {
    let name = std::env::var("INSTANTSNAP_TEST_IMAGE_FORMAT").ok()?;
    Some(Format::named(&name).unwrap_or_else(|| {
        panic!("INSTANTSNAP_TEST_IMAGE_FORMAT={name}: what is that? It is raw or sparse")
    }))
}

/// The library's handle, to which it dereferences.
pub struct Handle(pub engine::Handle);

impl Deref for Handle {
    type Target = engine::Handle;

    fn deref(&self) -> &engine::Handle {
        &self.0
    }
}

impl Handle {
    pub fn open_qmp(
        socket: &Path,
        domain_xml: Option<&str>,
        state_dir: &Path,
    ) -> Result<Handle, Error> {
        engine::Handle::open_qmp(socket, domain_xml, state_dir).map(Handle)
    }

    pub fn open_libvirt(connector: Arc<LibvirtConnector>) -> Handle {
        Handle(engine::Handle::open_libvirt(connector))
    }

    pub fn open_driver(driver: Arc<dyn Driver>) -> Result<Handle, Error> {
        engine::Handle::open_driver(driver).map(Handle)
    }

    pub fn create(
        &self,
        xml: &str,
        flags: u32,
        observer: &mut dyn Observer,
    ) -> Result<String, Error> {
        self.create_as(image_format(), xml, flags, observer).map(|created| created.name)
    }

    /// Takes a snapshot with a memory image of this format.
    pub fn create_as(
        &self,
        format: Option<Format>,
        xml: &str,
        flags: u32,
        observer: &mut dyn Observer,
    ) -> Result<Created, Error> {
        self.0.create(xml, CreateFlags::parse(flags), format, observer)
    }

    pub fn start(
        &self,
        xml: &str,
        flags: u32,
        listener: Box<dyn Observer + Send>,
        returns: Returns,
    ) -> Result<Job, Error> {
        self.0.start(xml, CreateFlags::parse(flags), image_format(), listener, returns)
    }

    pub fn load(&self, name: &str, flags: u32) -> Result<(), Error> {
        self.load_with(name, flags, Memory::Auto).map(drop)
    }

    /// Loads a snapshot whose memory comes in this way.
    pub fn load_with(&self, name: &str, flags: u32, memory: Memory) -> Result<Loaded, Error> {
        self.0.load(name, RevertFlags::parse(flags)?, memory.into())
    }

    /// Loads a snapshot whose memory follows. `bandwidth`: bytes in a second.
    pub fn load_lazily(
        &self,
        name: &str,
        flags: u32,
        bandwidth: Option<u64>,
    ) -> Result<Loaded, Error> {
        let options = LoadOptions { memory: Memory::Lazy, bandwidth };
        self.0.load(name, RevertFlags::parse(flags)?, options)
    }

    pub fn revert(
        &self,
        name: &str,
        flags: u32,
        restart: impl FnOnce(&RevertPlan) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.0.revert(name, RevertFlags::parse(flags)?, restart)
    }

    pub fn delete(&self, name: &str, flags: u32) -> Result<(), Error> {
        self.0.delete(name, DeleteFlags::parse(flags)?)
    }
}
