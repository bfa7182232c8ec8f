//! What a job and the one who waits for it tell each other.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use crate::error::{Error, Result};

/// Shared by a job and its caller, on different threads.
#[derive(Debug, Default)]
pub struct Watch {
    stop: AtomicBool,
    done: AtomicU64,
}

impl Watch {
    /// Ask the job to stop; it does so within milliseconds, and leaves nothing behind.
    pub fn stop(&self) {
        self.stop.store(true, Relaxed);
    }

    /// How many bytes have been read and used so far.
    pub fn done(&self) -> u64 {
        self.done.load(Relaxed)
    }

    /// Count `bytes` as done.
    pub(crate) fn advance(&self, bytes: usize) {
        self.done.fetch_add(bytes as u64, Relaxed);
    }

    /// # Errors
    /// The caller asked the job to stop.
    pub(crate) fn go_on(&self) -> Result<()> {
        if self.stop.load(Relaxed) { Err(Error::Stopped) } else { Ok(()) }
    }
}
