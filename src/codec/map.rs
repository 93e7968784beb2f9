//! Memory maps: the one place where `unsafe` is allowed.
//!
//! A map is sound as long as nobody shortens the file under it. Inputs are only ever replaced by a rename, which leaves
//! the mapped file in place, and outputs are mapped while they are temporary files that nobody else knows.
#![allow(unsafe_code)]

use std::{fs::File, io, path::Path};

use bytes::Bytes;
use memmap2::{Mmap, MmapMut};

/// The content of the file at `path`, mapped.
pub(super) fn read(path: &Path) -> io::Result<Bytes> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !metadata.is_file() {
        // A pipe can't be mapped.
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut &file, &mut bytes)?;
        return Ok(bytes.into());
    }
    if metadata.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: see the module's documentation.
    Ok(Bytes::from_owner(unsafe { Mmap::map(&file) }?))
}

/// `file`, at least `len` bytes of which are reserved on disk, mapped for writing.
pub(super) fn write(file: &File, len: usize) -> io::Result<MmapMut> {
    rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len as u64)?;
    // SAFETY: see the module's documentation.
    unsafe { MmapMut::map_mut(file) }
}
