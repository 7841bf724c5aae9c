// SPDX-License-Identifier: LGPL-2.1-or-later

//! Functions of other libraries, found at run time. Tables of them are declared by [`symbols!`].

use std::ffi::{CStr, c_int, c_void};

/// A loaded library, or a starting point for the loader's search.
#[derive(Clone, Copy, Debug)]
pub struct Library(*mut c_void);

// SAFETY: every thread can use the loader's handles.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// The search of the program itself.
    pub const DEFAULT: Library = Library(libc::RTLD_DEFAULT);
    /// The search in the libraries after this one.
    pub const NEXT: Library = Library(libc::RTLD_NEXT);

    /// Loads a library, and runs its initialisers. It is never unloaded. The error is the loader's
    /// text.
    pub fn open(name: &CStr) -> Result<Library, String> {
        Library::dlopen(name, libc::RTLD_NOW | libc::RTLD_LOCAL).ok_or_else(|| {
            // SAFETY: dlerror() returns NULL or a string of this thread's, which is copied before
            // the next call of the loader.
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
        // SAFETY: a NUL-terminated name. The initialisers of the libraries that this project names
        // can run in any process.
        let library = unsafe { libc::dlopen(name.as_ptr(), flags) };
        (!library.is_null()).then_some(Library(library))
    }

    /// The address of a symbol; NULL if it is not found.
    pub fn find(self, name: &CStr) -> *mut c_void {
        // SAFETY: a library that is never unloaded, or a starting point, and a NUL-terminated name.
        // dlsym changes nothing.
        unsafe { libc::dlsym(self.0, name.as_ptr()) }
    }
}

/// Declares a structure of functions, each found by its name. The declarations are promises, like
/// those of an `extern` block: that the symbol, if it is found, is a function of this type; and for
/// a `safe fn`, that no arguments of these types can do harm. A `variadic fn` takes more arguments
/// than are declared. The field of an `optional` function is an `Option`.
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
            /// Finds all functions; `address` returns the address of a symbol. The error is the
            /// name of a function that is missing.
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
                        // SAFETY: NULL is None. Any other address is, by the table's declaration,
                        // that of a function of this type.
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
