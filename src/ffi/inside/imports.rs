//! The functions that a loaded object imports: the slots of its global offset table, by the
//! symbols' names.
//!
//! Read from the object's own dynamic section, as the loader reads it.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{Elf64_Phdr, dl_phdr_info};

use crate::boundary::boundary;

/// The types of relocation of a function's slot, by the processor; where none is known, no slot is
/// found.
const SLOTS: &[u64] = if cfg!(target_arch = "x86_64") {
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
const PT_GNU_RELRO: u32 = 0x6474_e552;

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
    offset: u64,
    info: u64,
    addend: i64,
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
    /// Where it is.
    base: u64,
    headers: *const Elf64_Phdr,
    count: usize,
}

/// A slot, which holds the address of an imported function.
pub struct Slot {
    at: NonNull<AtomicPtr<c_void>>,
    /// The loader has made its page read-only.
    protected: bool,
}

/// The objects that are loaded, the program itself first.
pub fn objects() -> Vec<Object> {
    unsafe extern "C" fn add(info: *mut dl_phdr_info, _: usize, objects: *mut c_void) -> c_int {
        boundary(drop, || {
            // SAFETY: the loader's own record, and the vector that was passed, which nobody else
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
    let own = base(ptr::from_ref(&SLOTS).cast());
    own.is_some() && base(address) == own
}

impl Object {
    fn headers(&self) -> &[Elf64_Phdr] {
        // SAFETY: the loader's table of this object, which is loaded, of as many headers.
        unsafe { std::slice::from_raw_parts(self.headers, self.count) }
    }

    /// Whether it is the one that this code is in.
    pub fn is_this(&self) -> bool {
        let dynamic = self.headers().iter().find(|header| header.p_type == libc::PT_DYNAMIC);
        dynamic.is_some_and(|dynamic| {
            is_in_this_object((self.base + dynamic.p_vaddr) as *const c_void)
        })
    }

    /// The slots of a function that it imports. None where it does not import it.
    pub fn slots(&self, function: &CStr) -> Vec<Slot> {
        let Some(dynamic) = self.headers().iter().find(|header| header.p_type == libc::PT_DYNAMIC)
        else {
            return Vec::new();
        };
        // SAFETY: the object's dynamic section, which lasts as long as the object.
        let dynamic = unsafe {
            let count = dynamic.p_memsz as usize / size_of::<Dynamic>();
            std::slice::from_raw_parts((self.base + dynamic.p_vaddr) as *const Dynamic, count)
        };
        let entry =
            |tag: u64| dynamic.iter().find(|entry| entry.tag == tag).map(|entry| entry.value);
        // The loader has made addresses of offsets, but for processors where the section is
        // read-only.
        let address = |tag: u64| {
            entry(tag).map(|value| if value < self.base { self.base + value } else { value })
        };
        let (Some(symbols), Some(names), Some(names_size)) =
            (address(DT_SYMTAB), address(DT_STRTAB), entry(DT_STRSZ))
        else {
            return Vec::new();
        };
        let is_function = |relocation: &Relocation| {
            let symbol = (relocation.info >> 32) as usize;
            if !SLOTS.contains(&(relocation.info & 0xffff_ffff)) || symbol == 0 {
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
        let mut slots = Vec::new();
        for (table, size) in [(DT_JMPREL, DT_PLTRELSZ), (DT_RELA, DT_RELASZ)] {
            let (Some(table), Some(size)) = (address(table), entry(size)) else { continue };
            let count = size as usize / size_of::<Relocation>();
            // SAFETY: the object's table of relocations, of that size.
            let table = unsafe { std::slice::from_raw_parts(table as *const Relocation, count) };
            slots.extend(table.iter().filter(|relocation| is_function(relocation)).filter_map(
                |relocation| {
                    let at = self.base + relocation.offset;
                    Some(Slot {
                        at: NonNull::new(at as *mut AtomicPtr<c_void>)?,
                        protected: self.is_protected(at),
                    })
                },
            ));
        }
        slots
    }

    /// Whether the loader has made the page of an address read-only after it had relocated the
    /// object.
    fn is_protected(&self, address: u64) -> bool {
        let page = page_size();
        self.headers().iter().filter(|header| header.p_type == PT_GNU_RELRO).any(|header| {
            let start = self.base + header.p_vaddr;
            let whole = |address: u64| address / page * page;
            (whole(start)..whole(start + header.p_memsz)).contains(&address)
        })
    }
}

impl Slot {
    /// Has the object call another function from now on.
    ///
    /// # Safety
    /// `function` has the signature of the one that is imported, and lives as long as the object
    /// does.
    pub unsafe fn replace(&self, function: *mut c_void) -> std::io::Result<()> {
        let page = page_size();
        let start = (self.at.as_ptr() as u64 / page * page) as *mut c_void;
        let protect = |protection: c_int| match self.protected {
            // SAFETY: a page of the object's that holds data, and that nobody but the loader writes
            // to.
            true if unsafe { libc::mprotect(start, page as usize, protection) } != 0 => {
                Err(std::io::Error::last_os_error())
            }
            _ => Ok(()),
        };
        protect(libc::PROT_READ | libc::PROT_WRITE)?;
        // SAFETY: a slot of a loaded object, which is aligned as a pointer is, and can be written
        // to now.
        unsafe { self.at.as_ref() }.store(function, Ordering::Release);
        protect(libc::PROT_READ)
    }
}

fn page_size() -> u64 {
    // SAFETY: no pointers.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::symbols::Library;

    unsafe extern "C" fn instead() -> libc::c_long {
        4711
    }

    #[test]
    fn a_function_that_a_program_imports_is_replaced_and_another_one_is_not_found() {
        let program = objects()[0];
        assert!(program.is_this(), "these tests are a program's");
        assert!(program.slots(c"there_is_no_such_function").is_empty());
        // SAFETY: no arguments.
        let before = unsafe { libc::gethostid() };
        let slots = program.slots(c"gethostid");
        assert!(!slots.is_empty());
        for slot in &slots {
            // SAFETY: a function of the same signature, which lives as long as the program.
            unsafe { slot.replace(instead as *mut c_void) }.unwrap();
        }
        // SAFETY: no arguments.
        assert_eq!(unsafe { libc::gethostid() }, 4711);
        for slot in &slots {
            // SAFETY: the original's address.
            unsafe { slot.replace(Library::DEFAULT.find(c"gethostid")) }.unwrap();
        }
        // SAFETY: no arguments.
        assert_eq!(unsafe { libc::gethostid() }, before);
    }

    #[test]
    fn this_object_is_told_from_others() {
        let theirs = Library::DEFAULT.find(c"gethostid");
        assert!(!is_in_this_object(theirs) && is_in_this_object(instead as *const c_void));
        assert_eq!(objects().iter().filter(|object| object.is_this()).count(), 1);
    }
}
