// SPDX-License-Identifier: LGPL-2.1-or-later

//! Functions of other libraries, found at run time. [`symbols!`] is the one way to declare a table
//! of them.

use std::ffi::{CStr, c_int, c_void};

/// A library that is loaded, or a place where the loader's search begins.
#[derive(Clone, Copy, Debug)]
pub struct Library(*mut c_void);

// SAFETY: handles of the loader's can be used by every thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// What the program itself would find.
    pub const DEFAULT: Library = Library(libc::RTLD_DEFAULT);
    /// What would be found if this library had no such symbol.
    pub const NEXT: Library = Library(libc::RTLD_NEXT);

    /// Loads a library, and runs its initialisers, for good. An error is the loader's text.
    pub fn open(name: &CStr) -> Result<Library, String> {
        Library::dlopen(name, libc::RTLD_NOW | libc::RTLD_LOCAL).ok_or_else(|| {
            // SAFETY: dlerror() returns NULL or a string of this thread's, which is copied before
            // the next call of its family.
            let reason = unsafe {
                let reason = libc::dlerror();
                (!reason.is_null()).then(|| CStr::from_ptr(reason).to_string_lossy().into_owned())
            };
            reason.unwrap_or_else(|| format!("{} cannot be loaded", name.to_string_lossy()))
        })
    }

    /// A library that is loaded already.
    pub fn loaded(name: &CStr) -> Option<Library> {
        Library::dlopen(name, libc::RTLD_LAZY | libc::RTLD_NOLOAD)
    }

    fn dlopen(name: &CStr, flags: c_int) -> Option<Library> {
        // SAFETY: a NUL-terminated name. The libraries that this project names have initialisers
        // that are fit for any process.
        let library = unsafe { libc::dlopen(name.as_ptr(), flags) };
        (!library.is_null()).then_some(Library(library))
    }

    /// The address of a symbol; NULL where there is none.
    pub fn find(self, name: &CStr) -> *mut c_void {
        // SAFETY: a library that is never unloaded, or a place to begin at, and a NUL-terminated
        // name; dlsym only looks.
        unsafe { libc::dlsym(self.0, name.as_ptr()) }
    }
}

/// A structure of functions, each found by its name. The declarations are promises, as those of an
/// `extern` block are: that the symbol, where there is one, is a function of this type; and of a
/// `safe fn`, that no argument of these types can do harm. A `variadic fn` takes more arguments
/// than are declared. Of `optional` ones the field is an `Option`.
#[doc(hidden)]
#[macro_export]
macro_rules! __symbols {
    (
        $(#[$attribute:meta])* $visibility:vis struct $table:ident;
        unsafe extern "C" { $($safety:ident fn $name:ident($($argument:ty),* $(,)?) $(-> $result:ty)?;)* }
        $(optional { $($is_safe:ident fn $optional:ident($($given:ty),* $(,)?) $(-> $returned:ty)?;)* })?
    ) => {
        $(#[$attribute])*
        #[allow(non_snake_case, missing_docs)]
        $visibility struct $table {
            $(pub $name: $crate::symbols::function!($safety ($($argument),*) $(-> $result)?),)*
            $($(pub $optional: Option<$crate::symbols::function!($is_safe ($($given),*) $(-> $returned)?)>,)*)?
        }

        impl $table {
            /// All functions, by what gives the address of a symbol; or the name of one that is
            /// missing.
            pub fn find(
                address: impl Fn(&'static std::ffi::CStr) -> *mut std::ffi::c_void,
            ) -> std::result::Result<$table, &'static str> {
                const fn c_name(name: &'static str) -> &'static std::ffi::CStr {
                    match std::ffi::CStr::from_bytes_with_nul(name.as_bytes()) {
                        Ok(name) => name,
                        Err(_) => panic!("written with its NUL"),
                    }
                }
                Ok($table {
                    $($name: {
                        let found = address(const { c_name(concat!(stringify!($name), "\0")) });
                        // SAFETY: NULL is None; else, by the table's declaration, a function of
                        // this type.
                        unsafe {
                            std::mem::transmute::<
                                *mut std::ffi::c_void,
                                Option<$crate::symbols::function!($safety ($($argument),*) $(-> $result)?)>,
                            >(found)
                        }
                        .ok_or(stringify!($name))?
                    },)*
                    $($($optional: {
                        let found = address(const { c_name(concat!(stringify!($optional), "\0")) });
                        // SAFETY: as above.
                        unsafe {
                            std::mem::transmute::<
                                *mut std::ffi::c_void,
                                Option<$crate::symbols::function!($is_safe ($($given),*) $(-> $returned)?)>,
                            >(found)
                        }
                    },)*)?
                })
            }
        }
    };
}

/// The type of a function of [`symbols!`].
#[doc(hidden)]
#[macro_export]
macro_rules! __function {
    (safe ($($argument:ty),*) $(-> $result:ty)?) => { extern "C" fn($($argument),*) $(-> $result)? };
    (variadic ($($argument:ty),*) $(-> $result:ty)?) => {
        unsafe extern "C" fn($($argument,)* ...) $(-> $result)?
    };
    (unsafe ($($argument:ty),*) $(-> $result:ty)?) => { unsafe extern "C" fn($($argument),*) $(-> $result)? };
}

pub use {__function as function, __symbols as symbols};
