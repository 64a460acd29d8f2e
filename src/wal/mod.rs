//! WAL on its way to the repository and back.

pub mod archive;
pub mod fetch;
