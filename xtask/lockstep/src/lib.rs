//! Makes QEMU's virtual clock exact. Loaded into QEMU with `LD_PRELOAD`.
//!
//! With `-icount shift=0,sleep=off` one thread executes the guest, and the main thread moves the clock
//! on to the next timer whenever the guest is idle (`icount_start_warp_timer`, `softmmu/icount.c`).
//! When a timer goes off while the guest runs, QEMU wakes the main thread as well, for nothing. If that
//! one then looks in the microsecond between the guest's HLT and the accounting of the instructions
//! before it (`icount_process_data`), it believes the guest idle, moves the clock by too much, and
//! everything after differs from the run before. On an idle machine one boot in twenty came out
//! different.
//!
//! So the main thread is made to wait: what it was woken for it may do once the guest's thread is
//! asleep, which is when there is something to do. The guest's thread runs timers that are due by itself.
//!
//! **Unsafe**: two functions of libc are replaced. Each does what the original does, by calling it with
//! the same arguments, and touches nothing that the arguments point to.

use std::cell::OnceCell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::transmute;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// How long the main thread waits for a guest that never sleeps: it may have something to do after all,
/// such as ending QEMU.
const PATIENCE: Duration = Duration::from_secs(1);

/// Where the guest's thread is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guest {
    /// It has not slept yet: QEMU starts.
    Unknown,
    /// It executes the guest.
    Running,
    /// It waits for the main thread.
    Asleep,
}

static GUEST: Mutex<Guest> = Mutex::new(Guest::Unknown);
static FELL_ASLEEP: Condvar = Condvar::new();

fn set(guest: Guest) {
    *GUEST.lock().unwrap_or_else(PoisonError::into_inner) = guest;
    if guest == Guest::Asleep {
        FELL_ASLEEP.notify_one();
    }
}

fn wait_until_asleep() {
    let guest = GUEST.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = FELL_ASLEEP.wait_timeout_while(guest, PATIENCE, |guest| *guest == Guest::Running);
}

/// Does this thread execute the guest? With `-name debug-threads=on` QEMU calls it `ALL CPUs/TCG`
/// (`rr_start_vcpu_thread`, `accel/tcg/tcg-accel-ops-rr.c`).
fn executes_guest() -> bool {
    thread_local! {
        static ANSWER: OnceCell<bool> = const { OnceCell::new() };
    }
    ANSWER.with(|answer| {
        *answer.get_or_init(|| {
            let mut name = [0_u8; 16];
            // SAFETY: PR_GET_NAME writes at most 16 bytes, with a zero at the end.
            unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
            name.windows(3).any(|part| part == b"TCG")
        })
    })
}

/// Is this the process's first thread, which is QEMU's main one?
fn is_main() -> bool {
    // SAFETY: both only answer.
    unsafe { libc::gettid() == libc::getpid() }
}

unsafe extern "C" {
    /// As `dlsym`, with the symbol's version.
    fn dlvsym(handle: *mut c_void, symbol: *const c_char, version: *const c_char) -> *mut c_void;
}

/// libc's own function of this name and version.
fn original(name: &CStr, version: &CStr) -> *mut c_void {
    // SAFETY: both are strings with a zero at the end; RTLD_NEXT asks the libraries after this one.
    let function = unsafe { dlvsym(libc::RTLD_NEXT, name.as_ptr(), version.as_ptr()) };
    assert!(!function.is_null(), "libc has no {name:?}");
    function
}

type CondWait = unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int;
type Ppoll = unsafe extern "C" fn(*mut c_void, libc::nfds_t, *const c_void, *const c_void) -> c_int;

/// `pthread_cond_wait(3)`; the guest's thread sleeps in it when the guest is idle.
///
/// # Safety
///
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_cond_wait(condition: *mut c_void, mutex: *mut c_void) -> c_int {
    static ORIGINAL: OnceLock<CondWait> = OnceLock::new();
    let original = ORIGINAL.get_or_init(|| {
        // SAFETY: that is the function's type (pthread.h).
        unsafe { transmute(original(c"pthread_cond_wait", c"GLIBC_2.3.2")) }
    });
    let ours = executes_guest();
    if ours {
        set(Guest::Asleep);
    }
    // SAFETY: the caller's arguments.
    let result = unsafe { original(condition, mutex) };
    if ours {
        set(Guest::Running);
    }
    result
}

/// `ppoll(2)`; the main thread waits in it for something to do.
///
/// # Safety
///
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ppoll(
    descriptors: *mut c_void,
    count: libc::nfds_t,
    timeout: *const c_void,
    mask: *const c_void,
) -> c_int {
    static ORIGINAL: OnceLock<Ppoll> = OnceLock::new();
    let original = ORIGINAL.get_or_init(|| {
        // SAFETY: that is the function's type (poll.h).
        unsafe { transmute(original(c"ppoll", c"GLIBC_2.4")) }
    });
    // SAFETY: the caller's arguments.
    let result = unsafe { original(descriptors, count, timeout, mask) };
    if is_main() {
        wait_until_asleep();
    }
    result
}
