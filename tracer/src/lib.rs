//! svcpath: where a Kubernetes Service packet goes on a node, what each step costs,
//! and what a rule change breaks.
//!
//! Data flows straight through: [`cluster`] → [`rules`] → [`kernel`] → (traffic of the [`lab`]) →
//! [`probe`] → [`record`] → run → [`report`]; a [`scenario`] says what is built, what happens when
//! and what is measured; [`trace`] watches a live node with the same probes.

pub mod cluster;
pub mod kernel;
pub mod lab;
pub mod probe;
pub mod record;
pub mod report;
pub mod rules;
pub mod scenario;
pub mod trace;
