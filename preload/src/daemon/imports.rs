// SPDX-License-Identifier: LGPL-2.1-or-later

//! Finds out which functions a loaded object imports, by the symbols' names.
//!
//! Reads the object's dynamic section, as the loader does.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;

use instantsnap_core::boundary::boundary;
use libc::{Elf64_Phdr, dl_phdr_info};

/// The types of relocation by which an object imports a function, for each processor. For an
/// unknown processor no import is found.
const TYPES: &[u64] = if cfg!(target_arch = "x86_64") {
    &[6, 7] // R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT
} else if cfg!(target_arch = "aarch64") {
    &[1025, 1026]
} else if cfg!(target_arch = "s390x") {
    &[10, 11]
} else {
    &[]
};

const DT_PLTRELSZ: u64 = 2;
const DT_STRTAB: u64 = 5;
const DT_SYMTAB: u64 = 6;
const DT_RELA: u64 = 7;
const DT_RELASZ: u64 = 8;
const DT_STRSZ: u64 = 10;
const DT_JMPREL: u64 = 23;

/// `Elf64_Dyn`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Dynamic {
    tag: u64,
    value: u64,
}

/// `Elf64_Rela`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Relocation {
    _offset: u64,
    info: u64,
    _addend: i64,
}

/// `Elf64_Sym`.
#[repr(C)]
struct Symbol {
    name: u32,
    _info: [u8; 4],
    _value: u64,
    _size: u64,
}

/// An object that the loader has loaded, for as long as it is loaded.
#[derive(Clone, Copy)]
pub struct Object {
    /// The address that it is loaded at.
    base: u64,
    headers: *const Elf64_Phdr,
    count: usize,
}

/// The loaded objects, the program itself first.
pub fn objects() -> Vec<Object> {
    unsafe extern "C" fn add(info: *mut dl_phdr_info, _: usize, objects: *mut c_void) -> c_int {
        boundary(drop, || {
            // SAFETY: the loader's own record, and the vector that was passed, which no other code
            // uses meanwhile.
            let (info, objects) = unsafe { (&*info, &mut *objects.cast::<Vec<Object>>()) };
            objects.push(Object {
                base: info.dlpi_addr,
                headers: info.dlpi_phdr.cast(),
                count: usize::from(info.dlpi_phnum),
            });
            Ok(0)
        })
    }
    let mut objects = Vec::new();
    // SAFETY: `add` expects the vector that it is given.
    unsafe { libc::dl_iterate_phdr(Some(add), (&raw mut objects).cast()) };
    objects
}

/// Whether an address is in the object that this code is in.
pub fn is_in_this_object(address: *const c_void) -> bool {
    let base = |address: *const c_void| {
        let mut info = libc::Dl_info {
            dli_fname: ptr::null(),
            dli_fbase: ptr::null_mut(),
            dli_sname: ptr::null(),
            dli_saddr: ptr::null_mut(),
        };
        // SAFETY: any address may be asked for, and `info` is written.
        let found = unsafe { libc::dladdr(address, &raw mut info) } != 0;
        found.then_some(info.dli_fbase)
    };
    let own = base(ptr::from_ref(&TYPES).cast());
    own.is_some() && base(address) == own
}

impl Object {
    fn headers(&self) -> &[Elf64_Phdr] {
        // SAFETY: the loader's table of this object, which is loaded, of as many headers.
        unsafe { std::slice::from_raw_parts(self.headers, self.count) }
    }

    /// Whether this code is in the object.
    pub fn is_this(&self) -> bool {
        let dynamic = self.headers().iter().find(|header| header.p_type == libc::PT_DYNAMIC);
        dynamic.is_some_and(|dynamic| {
            is_in_this_object((self.base + dynamic.p_vaddr) as *const c_void)
        })
    }

    /// Whether the object imports a function.
    pub fn imports(&self, function: &CStr) -> bool {
        let Some(dynamic) = self.headers().iter().find(|header| header.p_type == libc::PT_DYNAMIC)
        else {
            return false;
        };
        // SAFETY: the object's dynamic section, which lasts as long as the object.
        let dynamic = unsafe {
            let count = dynamic.p_memsz as usize / size_of::<Dynamic>();
            std::slice::from_raw_parts((self.base + dynamic.p_vaddr) as *const Dynamic, count)
        };
        let entry =
            |tag: u64| dynamic.iter().find(|entry| entry.tag == tag).map(|entry| entry.value);
        // The loader has replaced offsets by addresses, except on processors where the section is
        // read-only.
        let address = |tag: u64| {
            entry(tag).map(|value| if value < self.base { self.base + value } else { value })
        };
        let (Some(symbols), Some(names), Some(names_size)) =
            (address(DT_SYMTAB), address(DT_STRTAB), entry(DT_STRSZ))
        else {
            return false;
        };
        let is_function = |relocation: &Relocation| {
            let symbol = (relocation.info >> 32) as usize;
            if !TYPES.contains(&(relocation.info & 0xffff_ffff)) || symbol == 0 {
                return false;
            }
            // SAFETY: a relocation's symbol is in the object's table, and its name in the object's
            // strings, NUL included.
            unsafe {
                let offset = (*(symbols as *const Symbol).add(symbol)).name;
                u64::from(offset) < names_size
                    && CStr::from_ptr((names as *const c_char).add(offset as usize)) == function
            }
        };
        [(DT_JMPREL, DT_PLTRELSZ), (DT_RELA, DT_RELASZ)].into_iter().any(|(table, size)| {
            let (Some(table), Some(size)) = (address(table), entry(size)) else { return false };
            let count = size as usize / size_of::<Relocation>();
            // SAFETY: the object's table of relocations, of that size.
            let table = unsafe { std::slice::from_raw_parts(table as *const Relocation, count) };
            table.iter().any(is_function)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use instantsnap_core::symbols::Library;

    #[test]
    fn a_function_that_a_program_imports_is_found_and_another_one_is_not() {
        let program = objects()[0];
        assert!(program.is_this(), "these tests are a program's");
        // SAFETY: no arguments.
        unsafe { libc::gethostid() };
        assert!(program.imports(c"gethostid"));
        assert!(!program.imports(c"there_is_no_such_function"));
    }

    #[test]
    fn this_object_is_told_from_others() {
        let own = is_in_this_object as fn(*const c_void) -> bool;
        let theirs = Library::DEFAULT.find(c"gethostid");
        assert!(!is_in_this_object(theirs) && is_in_this_object(own as *const c_void));
        assert_eq!(objects().iter().filter(|object| object.is_this()).count(), 1);
    }
}
