//! The `pgsidecar` program: daemon and command line. All of it is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    pgsidecar::cli::main()
}
