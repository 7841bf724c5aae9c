// SPDX-License-Identifier: LGPL-2.1-or-later

//! Types for the pointers that C passes. Each type states what the pointer must be. The maker of a
//! value promises that: C, when it calls a function of the header, or Rust code, when it calls the
//! `unsafe` function that makes one. Everything else is safe.
//!
//! `extern "C"` functions have parameters of these types: in the ABI each is a pointer.

use std::ffi::{CStr, CString, c_char};
use std::marker::PhantomData;
use std::ptr;

use crate::error::{Result, fail};

/// `const char *`: NULL, or a NUL-terminated string that lives for `'a`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub struct Text<'a>(*const c_char, PhantomData<&'a CStr>);

impl<'a> From<&'a CStr> for Text<'a> {
    fn from(text: &'a CStr) -> Text<'a> {
        Text(text.as_ptr(), PhantomData)
    }
}

impl<'a> From<&'a CString> for Text<'a> {
    fn from(text: &'a CString) -> Text<'a> {
        Text::from(text.as_c_str())
    }
}

impl<'a> From<Option<&'a CString>> for Text<'a> {
    fn from(text: Option<&'a CString>) -> Text<'a> {
        text.map_or(Text::NULL, Text::from)
    }
}

impl<'a> Text<'a> {
    /// NULL.
    pub const NULL: Text<'static> = Text(ptr::null(), PhantomData);

    /// # Safety
    /// The pointer is what [`Text`] says.
    pub unsafe fn from_ptr(pointer: *const c_char) -> Text<'a> {
        Text(pointer, PhantomData)
    }

    /// The string.
    pub fn get(self) -> Option<&'a CStr> {
        // SAFETY: by the type, a pointer that is not NULL is a NUL-terminated string that lives for
        // `'a`.
        (!self.0.is_null()).then(|| unsafe { CStr::from_ptr(self.0) })
    }

    /// The string, with a replacement for each part that is not UTF-8.
    pub fn lossy(self) -> Option<String> {
        self.get().map(|text| text.to_string_lossy().into_owned())
    }

    /// The string; none if it is NULL. It is an error if it is not UTF-8. `argument` is its name in
    /// messages.
    pub fn optional(self, argument: &str) -> Result<Option<&'a str>> {
        match self.get().map(CStr::to_str).transpose() {
            Ok(text) => Ok(text),
            Err(_) => fail!(InvalidArg, "{argument} is not UTF-8"),
        }
    }

    /// The string. It is an error if it is NULL, or not UTF-8.
    pub fn required(self, argument: &str) -> Result<&'a str> {
        match self.optional(argument)? {
            Some(text) => Ok(text),
            None => fail!(InvalidArg, "{argument} must not be NULL"),
        }
    }
}

/// A `char *` that its receiver owns: NULL, or a NUL-terminated string of malloc()'s. Dropping it
/// frees it.
#[repr(transparent)]
#[derive(Debug)]
pub struct Malloced(*mut c_char);

impl Malloced {
    /// NULL.
    pub const NULL: Malloced = Malloced(ptr::null_mut());

    /// # Safety
    /// The pointer is what [`Malloced`] says.
    pub unsafe fn from_ptr(pointer: *mut c_char) -> Malloced {
        Malloced(pointer)
    }

    /// The string.
    pub fn get(&self) -> Option<&CStr> {
        Text(self.0, PhantomData).get()
    }

    /// A copy of its bytes, without the NUL.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        self.get().map(|text| text.to_bytes().to_vec())
    }
}

impl Drop for Malloced {
    fn drop(&mut self) {
        // SAFETY: by the type, it is NULL, or a string of malloc()'s that only this value has.
        unsafe { libc::free(self.0.cast()) };
    }
}

/// A `T *` for a result: NULL, or valid for one write.
#[repr(transparent)]
#[derive(Debug)]
pub struct Out<'a, T>(*mut T, PhantomData<&'a mut T>);

impl<'a, T> From<Option<&'a mut T>> for Out<'a, T> {
    fn from(place: Option<&'a mut T>) -> Out<'a, T> {
        Out(place.map_or(ptr::null_mut(), ptr::from_mut), PhantomData)
    }
}

impl<T> Out<'_, T> {
    /// Stores the result, unless the pointer is NULL.
    pub fn put(self, result: impl FnOnce() -> T) {
        if !self.0.is_null() {
            // SAFETY: by the type, it is valid for a write.
            unsafe { self.0.write(result()) };
        }
    }
}

/// A structure that begins with its size, so that later versions can have more fields.
///
/// # Safety
/// It is `repr(C)`, begins with a `usize`, has no padding, and each of its fields can have any
/// value that C stores there.
pub unsafe trait Growing: Copy {}

/// A `const T *`: NULL, or a structure of which at least the first field can be read for `'a`, and
/// as many bytes as that field says.
#[repr(transparent)]
#[derive(Debug)]
pub struct In<'a, T>(*const T, PhantomData<&'a T>);

impl<T: Growing> In<'_, T> {
    /// # Safety
    /// The pointer is what [`In`] says.
    pub unsafe fn from_ptr<'a>(pointer: *const T) -> In<'a, T> {
        In(pointer, PhantomData)
    }

    /// Whether it is NULL.
    pub fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// The structure; none if it is NULL. Fields that are not known here must be zero. `argument`
    /// is its name in messages.
    pub fn read(self, argument: &str) -> Result<Option<T>> {
        if self.0.is_null() {
            return Ok(None);
        }
        let size = size(argument, self.0)?;
        let known = size_of::<T>();
        // SAFETY: by the type, `size` bytes are readable, and `size` is at least `known`.
        let unknown =
            unsafe { std::slice::from_raw_parts(self.0.cast::<u8>().add(known), size - known) };
        if unknown.iter().any(|byte| *byte != 0) {
            fail!(
                InvalidArg,
                "a field of {argument} is set that is newer than this version of the library"
            );
        }
        // SAFETY: the whole structure is readable; no alignment is assumed.
        Ok(Some(unsafe { self.0.read_unaligned() }))
    }
}

/// A `T *`: NULL, or a structure of which at least the first field can be read and written for
/// `'a`, and as many bytes as that field says.
#[repr(transparent)]
#[derive(Debug)]
pub struct Fill<'a, T>(*mut T, PhantomData<&'a mut T>);

impl<T: Growing> Fill<'_, T> {
    /// Whether it is NULL.
    pub fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// Checks that the structure can be filled later, if it is not NULL. `argument` is its name in
    /// messages.
    pub fn check(&self, argument: &str) -> Result<()> {
        if self.0.is_null() { Ok(()) } else { size(argument, self.0).map(drop) }
    }

    /// # Safety
    /// The pointer is what [`Fill`] says.
    pub unsafe fn from_ptr<'a>(pointer: *mut T) -> Fill<'a, T> {
        Fill(pointer, PhantomData)
    }

    /// Fills the structure. Sets fields that this version does not know to zero. `argument` is its
    /// name in messages.
    pub fn put(&mut self, argument: &str, value: T) -> Result<()> {
        if self.0.is_null() {
            fail!(InvalidArg, "{argument} must not be NULL");
        }
        let size = size(argument, self.0)?;
        let (head, known) = (size_of::<usize>(), size_of::<T>());
        // SAFETY: by the type, `size` bytes are writable, and `size` is at least `known`. The two
        // structures do not overlap, because `value` is ours, and it has no padding.
        unsafe {
            let bytes = self.0.cast::<u8>();
            bytes
                .add(head)
                .copy_from_nonoverlapping((&raw const value).cast::<u8>().add(head), known - head);
            bytes.add(known).write_bytes(0, size - known);
        }
        Ok(())
    }
}

/// The size in the first field of a structure of the caller's, which is not NULL. It is an error if
/// it is less than the size that is known here.
fn size<T: Growing>(argument: &str, structure: *const T) -> Result<usize> {
    // SAFETY: its first field, which is a `usize`, can be read; no alignment is assumed.
    let size = unsafe { structure.cast::<usize>().read_unaligned() };
    // So far there is one version of each structure, so none can be smaller.
    if size < size_of::<T>() || size > 64 << 10 {
        fail!(
            InvalidArg,
            "{argument}->size is {size}, it must be set to the structure's size ({}) first",
            size_of::<T>()
        );
    }
    Ok(size)
}
