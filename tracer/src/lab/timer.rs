//! A timer that ends at a nanosecond, for the sender.
//!
//! tokio's own timers count milliseconds; an open-loop sender on them would send in bursts.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

struct Descriptor(TimerFd);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// A timerfd on `CLOCK_MONOTONIC`.
pub(super) struct Timer(AsyncFd<Descriptor>);

impl Timer {
    pub(super) fn new() -> io::Result<Self> {
        let timer = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )?;
        // SAFETY: the AsyncFd owns the timer and nothing takes it out or replaces it, so the
        // descriptor stays open and the same as long as it is registered.
        let registered =
            unsafe { AsyncFd::register_with_interest(Descriptor(timer), Interest::READABLE) };
        Ok(Self(registered.map_err(io::Error::from)?))
    }

    /// Waits until the clock shows `at_ns`; at once if it already does.
    pub(super) async fn until(&self, at_ns: u64) -> io::Result<()> {
        let at = TimeSpec::new(
            i64::try_from(at_ns / 1_000_000_000).unwrap_or(i64::MAX),
            // Below 10^9: it always fits.
            i64::try_from(at_ns % 1_000_000_000).unwrap_or(0),
        );
        self.0.get_ref().0.set(
            Expiration::OneShot(at),
            TimerSetTimeFlags::TFD_TIMER_ABSTIME,
        )?;
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(result) = ready.try_io(|timer| Ok(timer.get_ref().0.wait()?)) {
                return result;
            }
        }
    }
}
