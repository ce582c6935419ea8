//! The `svcpath` program.
fn main() {}
