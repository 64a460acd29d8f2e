//! The `pgsidecar-webhook` program. All of it is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    pgsidecar_webhook::cli::main()
}
