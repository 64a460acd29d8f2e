//! Names of tables as they are written in SQL.

use std::{fmt, str::FromStr};

use crate::ParseIdError;

/// A table's schema and name. Read as SQL reads them: folded to lower case unless quoted; without a schema it's `public`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TableName {
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
}

impl FromStr for TableName {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<TableName, ParseIdError> {
        let name = match identifiers(text).as_deref() {
            Some([name]) => Some(TableName { schema: "public".to_owned(), name: name.clone() }),
            Some([schema, name]) => Some(TableName { schema: schema.clone(), name: name.clone() }),
            _ => None,
        };
        name.ok_or_else(|| ParseIdError::new("name of a table (like sales.orders, or \"Sales\".\"Orders\")", text))
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
        write!(f, "{}.{}", quoted(&self.schema), quoted(&self.name))
    }
}

/// The identifiers that dots join; `None` if it isn't such.
fn identifiers(text: &str) -> Option<Vec<String>> {
    let mut found = Vec::new();
    let mut rest = text;
    loop {
        let identifier;
        match rest.strip_prefix('"') {
            Some(quoted) => (identifier, rest) = until_quote(quoted)?,
            None => {
                let end = rest.find(['.', '"']).unwrap_or(rest.len());
                identifier = rest[..end].to_lowercase();
                rest = &rest[end..];
                if identifier.contains(char::is_whitespace) {
                    return None;
                }
            }
        }
        if identifier.is_empty() {
            return None;
        }
        found.push(identifier);
        match rest.strip_prefix('.') {
            Some(next) => rest = next,
            None if rest.is_empty() => return Some(found),
            None => return None,
        }
    }
}

/// What stands before the closing quote, with `""` as one quote, and what comes behind it.
fn until_quote(text: &str) -> Option<(String, &str)> {
    let mut identifier = String::new();
    let mut rest = text;
    loop {
        let end = rest.find('"')?;
        identifier.push_str(&rest[..end]);
        rest = &rest[end + 1..];
        match rest.strip_prefix('"') {
            Some(next) => {
                identifier.push('"');
                rest = next;
            }
            None => return Some((identifier, rest)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_sql_reads_them() {
        for (text, schema, name) in [
            ("orders", "public", "orders"),
            ("Sales.Orders", "sales", "orders"),
            ("\"Sales\".orders", "Sales", "orders"),
            ("\"a.\"\"b\"\"\".\"c d\"", "a.\"b\"", "c d"),
        ] {
            let expected = TableName { schema: schema.into(), name: name.into() };
            let parsed: TableName = text.parse().unwrap();
            assert_eq!(parsed, expected, "{text}");
            assert_eq!(parsed.to_string().parse(), Ok(expected));
        }
        for text in ["", ".", "a.", ".a", "a.b.c", "\"a", "\"\"", "a b", "a\"b\"", "\"a\"b"] {
            assert!(text.parse::<TableName>().is_err(), "{text:?}");
        }
    }
}
