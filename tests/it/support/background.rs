//! What runs beside a test.

use std::{
    ffi::OsString,
    ops::{Deref, DerefMut},
    process::{Child, Command, Stdio},
};

use super::Postgres;

/// A process that ends with the test.
pub struct Background(Child);

impl Background {
    pub fn start(command: &mut Command) -> Background {
        Background(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    /// One that runs already.
    pub fn of(child: Child) -> Background {
        Background(child)
    }
}

impl Deref for Background {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Background {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Our PATH, with the programs of this PostgreSQL before all others.
pub fn path_with(major: u32) -> OsString {
    let old = std::env::var_os("PATH").unwrap_or_default();
    let mut path = Postgres::bin(major).into_os_string();
    path.push(":");
    path.push(old);
    path
}
