//! WAL on its way to the repository and back, and what there is of it.

pub mod archive;
mod arriving;
pub mod fetch;
pub mod survey;
pub mod verify;
