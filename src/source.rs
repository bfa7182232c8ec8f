//! Where an adapter's bytes come from: mapped into memory, or read piece by piece; and what else
//! the operating system is asked about files.
#![expect(unsafe_code, reason = "a mapped file, giving its pages back, and calls to the system")]

use std::{fs::File, io, ops::Range};

use memmap2::Mmap;

/// How the bank is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Io {
    /// Files are mapped into memory. A file that is cut short meanwhile kills the process.
    Mmap,
    /// Positional reads, for network and FUSE mounts, where files may vanish.
    Read,
}

/// The size of a huge page on the systems that use them for files. Some map all of it at the first
/// touch, and so up to one more than what is used.
pub(crate) const HUGE: usize = 2 << 20;

/// One open file.
pub(crate) enum Source {
    Mapped(Mmap),
    File(File),
}

impl Source {
    pub(crate) fn new(file: File, io: Io) -> io::Result<Self> {
        Ok(match io {
            // SAFETY: the map is private, read-only and never written to by this process. What
            // remains, a file cut short by others, is said where the user chooses (`Io`).
            Io::Mmap => Self::Mapped(unsafe { Mmap::map(&file)? }),
            Io::Read => Self::File(file),
        })
    }

    /// The bytes of `range`, in place or read into the beginning of `buffer`.
    pub(crate) fn bytes<'a>(
        &'a self,
        range: Range<u64>,
        buffer: &'a mut [u8],
    ) -> io::Result<&'a [u8]> {
        match self {
            Self::Mapped(map) => map
                .get(range.start as usize..range.end as usize)
                .ok_or_else(|| io::ErrorKind::UnexpectedEof.into()),
            Self::File(file) => {
                let buffer = &mut buffer[..(range.end - range.start) as usize];
                read_exact_at(file, buffer, range.start)?;
                Ok(buffer)
            }
        }
    }

    /// The bytes of `range` into all of `buffer`.
    pub(crate) fn read(&self, range: Range<u64>, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Mapped(_) => buffer.copy_from_slice(self.bytes(range, &mut [])?),
            Self::File(file) => read_exact_at(file, buffer, range.start)?,
        }
        Ok(())
    }

    /// Ask for bytes that will all be needed at once, where they are not in the page cache: so the
    /// disk gets more than one request at a time. (Where they are, asking costs a tenth of a job.)
    pub(crate) fn announce(&self, range: &Range<u64>) {
        #[cfg(unix)]
        if let (Self::Mapped(map), false) = (self, range.is_empty()) {
            let (start, end) = (range.start as usize, range.end as usize);
            if !cached(&map[start..end]) {
                // Advice: where the system does not take it, bytes are read when they are used.
                let _ = map.advise_range(memmap2::Advice::WillNeed, start, end - start);
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Give the pages of `range` back, so that what is resident does not grow with the bank.
    pub(crate) fn release(&self, range: &Range<u64>) {
        #[cfg(unix)]
        if let (Self::Mapped(map), false) = (self, range.is_empty()) {
            // A huge page of which a part stays mapped stays resident as a whole. A neighbour that
            // is still in use is mapped again when it is next read.
            let start = range.start as usize / HUGE * HUGE;
            let end = (range.end as usize).next_multiple_of(HUGE).min(map.len());
            // SAFETY: the map is read-only and backed by a file; pages that are dropped are read
            // from the file again when they are next used, so no slice into the map changes.
            let _ = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start)
            };
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Whether the first page of mapped bytes is in the page cache, as far as one can know.
#[cfg(target_os = "linux")]
fn cached(bytes: &[u8]) -> bool {
    // SAFETY: asks for a constant of the system.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    let first = bytes.as_ptr().map_addr(|address| address - address % page);
    let mut answer = 0u8;
    // SAFETY: the page that holds the first byte is mapped, and one page has one byte of answer.
    let done = unsafe { libc::mincore(first.cast_mut().cast(), 1, &raw mut answer) };
    done == 0 && answer & 1 == 1
}

#[cfg(all(unix, not(target_os = "linux")))]
fn cached(_: &[u8]) -> bool {
    false
}

/// Have the system begin to write `length` bytes of `file` from `start` on to the disk, without
/// waiting: so the disk is at work while the sums are, and a flush at the end finds little left.
pub(crate) fn begin_flush(file: &File, start: u64, length: usize) {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        // SAFETY: the descriptor is open as long as `file` is borrowed; no memory is involved.
        // Where a file system cannot do this, the flush at the end does it all.
        let _ = unsafe {
            libc::sync_file_range(
                file.as_raw_fd(),
                start as i64,
                length as i64,
                libc::SYNC_FILE_RANGE_WRITE,
            )
        };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, start, length);
}

/// Give the memory back that was let go: glibc keeps it, and where matrices of many sizes come and go
/// that adds up to several times what is in use.
pub(crate) fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: no memory is touched that is in use.
        let _ = unsafe { libc::malloc_trim(0) };
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !buffer.is_empty() {
        match file.seek_read(buffer, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                buffer = &mut buffer[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn both_backends_give_the_same_bytes_also_after_pages_were_released() {
        let mut file = tempfile::tempfile().unwrap();
        let written: Vec<u8> = (0..300_000u32).map(|i| i as u8).collect();
        file.write_all(&written).unwrap();
        for io in [Io::Mmap, Io::Read] {
            let source = Source::new(file.try_clone().unwrap(), io).unwrap();
            for range in [0..1, 5000..250_001, 299_999..300_000, 7..7] {
                let mut buffer = vec![0; (range.end - range.start) as usize];
                for _ in 0..2 {
                    source.announce(&range);
                    let wanted = &written[range.start as usize..range.end as usize];
                    assert_eq!(source.bytes(range.clone(), &mut buffer).unwrap(), wanted);
                    source.release(&range);
                }
            }
            assert!(source.bytes(299_999..300_001, &mut [0; 2]).is_err());
        }
    }
}
