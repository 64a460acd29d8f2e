//! How results look to people.

use std::io::{IsTerminal, Write};

use serde::Serialize;

use crate::failure::Failure;

/// Prints a failure to stderr: what happened, and what to do.
pub fn print_failure(failure: &Failure) {
    let mut stderr = std::io::stderr().lock();
    let _ = writeln!(stderr, "pgsidecar: error: {}", failure.message);
    if !failure.hint.is_empty() {
        let _ = writeln!(stderr, "HINT: {}", failure.hint);
    }
}

/// Prints one JSON document.
///
/// # Errors
/// If stdout is closed.
pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(Failure::internal)?;
    print_line(&text)
}

/// Prints a line to stdout.
///
/// # Errors
/// If stdout is closed.
pub fn print_line(text: &str) -> Result<(), Failure> {
    writeln!(std::io::stdout().lock(), "{text}").map_err(|error| Failure::io("printing", &error))
}

/// Prints a table: the columns as wide as they have to be, numbers to the right.
///
/// # Errors
/// If stdout is closed.
pub fn print_table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> Result<(), Failure> {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([headings[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    let line = |cells: [&str; N]| {
        let mut line = String::new();
        for (cell, width) in cells.iter().zip(&widths) {
            let number = cell.starts_with(|c: char| c.is_ascii_digit()) && cell.ends_with('B');
            let padded = if number { format!("{cell:>width$}  ") } else { format!("{cell:<width$}  ") };
            line.push_str(&padded);
        }
        line.trim_end().to_owned()
    };
    print_line(&line(headings))?;
    rows.iter().try_for_each(|row| print_line(&line(row.each_ref().map(String::as_str))))
}

/// A number of bytes for people: `12.3 MB`, in multiples of 1024 as PostgreSQL's `pg_size_pretty`.
pub fn size(bytes: u64) -> String {
    let mut scaled = bytes;
    for unit in ["B", "kB", "MB", "GB"] {
        if scaled < 10 * 1024 {
            return format!("{scaled} {unit}");
        }
        scaled = scaled.div_ceil(1024);
    }
    format!("{scaled} TB")
}

/// Whether a person watches stderr.
pub fn watched() -> bool {
    std::io::stderr().is_terminal()
}
