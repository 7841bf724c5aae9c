// SPDX-License-Identifier: LGPL-2.1-or-later

//! What C passes by a pointer, as types. Each says once what the pointer is, which is the promise
//! of whoever made it: C, that calls a function of the header, or Rust, by the `unsafe` function
//! that makes one. All else is safe.
//!
//! They are parameters of `extern "C"` functions themselves: each is a pointer to the ABI.

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

    /// The string.
    pub fn get(self) -> Option<&'a CStr> {
        // SAFETY: not NULL, and thus a NUL-terminated string that lives for `'a`, by the type.
        (!self.0.is_null()).then(|| unsafe { CStr::from_ptr(self.0) })
    }

    /// The string, replaced where it is not UTF-8.
    pub fn lossy(self) -> Option<String> {
        self.get().map(|text| text.to_string_lossy().into_owned())
    }

    /// The string, which is UTF-8 where it is not NULL.
    pub fn optional(self, what: &str) -> Result<Option<&'a str>> {
        match self.get().map(CStr::to_str).transpose() {
            Ok(text) => Ok(text),
            Err(_) => fail!(InvalidArg, "{what} is not UTF-8"),
        }
    }

    /// The string, which is UTF-8, and must not be NULL.
    pub fn required(self, what: &str) -> Result<&'a str> {
        match self.optional(what)? {
            Some(text) => Ok(text),
            None => fail!(InvalidArg, "{what} must not be NULL"),
        }
    }
}

/// `char *` that is given to its receiver: NULL, or a NUL-terminated string of malloc()'s. Dropping
/// it frees it.
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
        // SAFETY: NULL, or of malloc()'s and this one's alone, by the type.
        unsafe { libc::free(self.0.cast()) };
    }
}

/// `T *` for a result: NULL, or valid for one write.
#[repr(transparent)]
#[derive(Debug)]
pub struct Out<'a, T>(*mut T, PhantomData<&'a mut T>);

impl<'a, T> From<Option<&'a mut T>> for Out<'a, T> {
    fn from(place: Option<&'a mut T>) -> Out<'a, T> {
        Out(place.map_or(ptr::null_mut(), ptr::from_mut), PhantomData)
    }
}

impl<T> Out<'_, T> {
    /// Puts the result there, where the caller wants it.
    pub fn put(self, result: impl FnOnce() -> T) {
        if !self.0.is_null() {
            // SAFETY: valid for a write, by the type.
            unsafe { self.0.write(result()) };
        }
    }
}

/// A structure that begins with its size, so that it can grow.
///
/// # Safety
/// It is `repr(C)`, begins with a `usize`, has no padding, and each of its fields can be what C has
/// put there.
pub unsafe trait Growing: Copy {}

/// `const T *`: NULL, or a structure of which as many bytes can be read for `'a` as its first field
/// says, and that field at least.
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

    /// The structure, where it is not NULL. What is in it beyond what is known here must be zero.
    pub fn read(self, what: &str) -> Result<Option<T>> {
        if self.0.is_null() {
            return Ok(None);
        }
        let size = size(what, self.0)?;
        let known = size_of::<T>();
        // SAFETY: readable for `size` bytes by the type, which are not less than the structure's.
        let beyond =
            unsafe { std::slice::from_raw_parts(self.0.cast::<u8>().add(known), size - known) };
        if beyond.iter().any(|byte| *byte != 0) {
            fail!(
                InvalidArg,
                "a field of {what} is set that is newer than this version of the library"
            );
        }
        // SAFETY: readable throughout; nothing is assumed of its alignment.
        Ok(Some(unsafe { self.0.read_unaligned() }))
    }
}

/// `T *`: NULL, or a structure of which as many bytes can be read and written for `'a` as its first
/// field says, and that field at least.
#[repr(transparent)]
#[derive(Debug)]
pub struct Fill<'a, T>(*mut T, PhantomData<&'a mut T>);

impl<T: Growing> Fill<'_, T> {
    /// # Safety
    /// The pointer is what [`Fill`] says.
    pub unsafe fn from_ptr<'a>(pointer: *mut T) -> Fill<'a, T> {
        Fill(pointer, PhantomData)
    }

    /// Fills it. Fields that the caller knows, and this version does not, are zeroed.
    pub fn put(&mut self, what: &str, value: T) -> Result<()> {
        if self.0.is_null() {
            fail!(InvalidArg, "{what} must not be NULL");
        }
        let size = size(what, self.0)?;
        let (head, known) = (size_of::<usize>(), size_of::<T>());
        // SAFETY: writable for `size` bytes by the type, which are not less than `known`; the two
        // do not overlap, as `value` is ours, and it has no padding.
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

/// The size that a structure of the caller's, which is not NULL, says it has: no less than it is
/// known to have.
fn size<T: Growing>(what: &str, structure: *const T) -> Result<usize> {
    // SAFETY: its first field, which is a `usize`, can be read; nothing is assumed of its
    // alignment.
    let size = unsafe { structure.cast::<usize>().read_unaligned() };
    // So far there is one version of each structure, so none can be smaller.
    if size < size_of::<T>() || size > 64 << 10 {
        fail!(
            InvalidArg,
            "{what}->size is {size}, it must be set to the structure's size ({}) first",
            size_of::<T>()
        );
    }
    Ok(size)
}
