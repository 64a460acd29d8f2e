//! What of an archive belongs to a table, by its table of contents.

use std::sync::Arc;

use pgsidecar_core::{ObjectKey, TableName};

use super::{archive, server::Server};
use crate::{
    failure::{Code, Failure},
    repository::Repository,
};

/// What of an archive belongs to a table by its name.
const TABLE_ENTRIES: [&str; 9] = [
    "TABLE",
    "TABLE DATA",
    "FOREIGN TABLE",
    "VIEW",
    "MATERIALIZED VIEW",
    "MATERIALIZED VIEW DATA",
    "SEQUENCE",
    "SEQUENCE SET",
    "CONSTRAINT",
];

/// The lines of the archive's table of contents that are about these tables.
pub(super) async fn entries(
    server: &Server,
    repository: &Repository,
    key: &ObjectKey,
    tables: &[TableName],
) -> Result<Vec<String>, Failure> {
    let wanted = tables.to_vec();
    let found = Arc::new(std::sync::Mutex::new(Vec::<(usize, String)>::new()));
    let filled = found.clone();
    archive::table_of_contents(server.tools(), repository, key, move |line| {
        if let (Ok(mut found), Some(table)) = (filled.lock(), wanted.iter().position(|table| is_of_table(line, table)))
        {
            found.push((table, line.to_owned()));
        }
    })
    .await?;
    let found = std::mem::take(&mut *found.lock().map_err(|_| Failure::internal("reading a table of contents"))?);
    for (n, table) in tables.iter().enumerate() {
        let definitions = found.iter().filter(|(of, line)| *of == n && is_definition(line)).count();
        if definitions == 0 {
            return Err(Failure::new(Code::NotFound, format!("there is no table {table} in the dump")).hint(
                "Names are as in SQL: SCHEMA.TABLE, in double quotes where upper case counts; without a schema it's public.",
            ));
        }
        if definitions > 1 {
            return Err(Failure::new(
                Code::InvalidRequest,
                format!("{table} can't be told from others whose names begin so"),
            )
            .hint("Restore the whole database into a new one (--into NAME --create), and copy the table from there."));
        }
    }
    // In the archive's order: pg_restore can't go back in what is streamed to it.
    Ok(found.into_iter().map(|(_, line)| line).collect())
}

/// What stands in a line behind the numbers: `3456; 1259 16385 TABLE public orders postgres`.
fn described(line: &str) -> &str {
    line.splitn(4, ' ').nth(3).unwrap_or_default()
}

fn is_of_table(line: &str, table: &TableName) -> bool {
    // pg_restore writes line ends as blanks here.
    let one_line = |text: &str| text.replace(['\n', '\r'], " ");
    let name = format!(" {} {} ", one_line(&table.schema), one_line(&table.name));
    TABLE_ENTRIES.iter().any(|kind| described(line).strip_prefix(kind).is_some_and(|rest| rest.starts_with(&name)))
}

fn is_definition(line: &str) -> bool {
    let kinds = ["TABLE ", "FOREIGN TABLE ", "VIEW ", "MATERIALIZED VIEW ", "SEQUENCE "];
    let no_definition = ["TABLE DATA ", "MATERIALIZED VIEW DATA ", "SEQUENCE SET "];
    let line = described(line);
    kinds.iter().any(|kind| line.starts_with(kind)) && !no_definition.iter().any(|kind| line.starts_with(kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_s_entries_are_known_by_their_names() {
        let table: TableName = "sales.orders".parse().unwrap();
        for line in [
            "215; 1259 16385 TABLE sales orders postgres",
            "3412; 0 16385 TABLE DATA sales orders postgres",
            "3266; 2606 16391 CONSTRAINT sales orders orders_pkey postgres",
        ] {
            assert!(is_of_table(line, &table), "{line}");
        }
        for line in [
            "215; 1259 16385 TABLE sales orders2 postgres",
            "215; 1259 16385 TABLE public orders postgres",
            "3267; 2606 16391 FK CONSTRAINT sales orders orders_fkey postgres",
            "3300; 0 0 COMMENT sales TABLE orders postgres",
        ] {
            assert!(!is_of_table(line, &table), "{line}");
        }
        assert!(is_definition("215; 1259 16385 TABLE sales orders postgres"));
        assert!(!is_definition("3412; 0 16385 TABLE DATA sales orders postgres"));
    }
}
