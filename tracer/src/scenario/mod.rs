//! What is built, what happens when, what is measured: the comparison as data, and its execution.

pub mod assemble;
pub mod cell;
pub mod cost;
pub mod fault;
pub mod job;
pub mod matrix;
pub mod node;
