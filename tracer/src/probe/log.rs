//! What the programs themselves say, for who works on them: off unless asked for, because a message
//! costs a drop several hundred instructions.

use aya::programs::loaded_programs;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};

/// Set to anything to see the programs' messages on standard error.
pub const VARIABLE: &str = "SVCPATH_PROBE_LOG";

/// The level at which the programs speak (`aya_log::Level`): 0 is off.
pub(super) fn level() -> u8 {
    if std::env::var_os(VARIABLE).is_some() {
        aya_log::Level::Debug as u8
    } else {
        0
    }
}

/// Reads the messages of the programs that were loaded last with this name; `None` if they are not
/// wanted or cannot be had: messages are a convenience.
pub(super) fn reader(program: &str) -> Option<Reader> {
    if level() == 0 {
        return None;
    }
    let id = loaded_programs()
        .filter_map(Result::ok)
        .filter(|info| info.name_as_str() == Some(program))
        .map(|info| info.id())
        .max()?;
    EbpfLogger::init_from_id_with_logger(id, StandardError)
        .ok()
        .map(Reader)
}

/// The programs' messages.
pub(super) struct Reader(EbpfLogger<StandardError>);

impl Reader {
    /// Prints what has come since.
    pub(super) fn flush(&mut self) {
        self.0.flush();
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reader")
    }
}

struct StandardError;

impl Log for StandardError {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        eprintln!("probe {}: {}", record.level(), record.args());
    }

    fn flush(&self) {}
}
