//! Where a dump is restored to: looked at first, or made.

use pgsidecar_core::dump::{DatabaseName, DumpedDatabase};

use super::{
    restore::DumpRestore,
    server::{Server, literal},
};
use crate::failure::{Code, Failure};

/// How many names are told of what is in the way.
const TOLD_NAMES: usize = 5;
/// What is in a database that isn't in a new one, as names; what extensions bring counts as the extension.
const CONTENT: &str = "WITH own AS (SELECT oid FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'), \
    content (name) AS (\
      SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
        WHERE n.oid IN (SELECT oid FROM own) AND c.relkind NOT IN ('i', 'I', 't') AND NOT EXISTS (SELECT FROM pg_depend d \
          WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e') \
      UNION ALL SELECT p.oid::regprocedure::text FROM pg_proc p WHERE p.pronamespace IN (SELECT oid FROM own) AND NOT EXISTS (\
        SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e') \
      UNION ALL SELECT 'type ' || t.oid::regtype::text FROM pg_type t WHERE t.typnamespace IN (SELECT oid FROM own) \
        AND t.typtype IN ('d', 'e', 'r') AND NOT EXISTS (\
        SELECT FROM pg_depend d WHERE d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e') \
      UNION ALL SELECT 'schema ' || quote_ident(nspname) FROM pg_namespace WHERE oid IN (SELECT oid FROM own) AND nspname <> 'public' \
      UNION ALL SELECT 'extension ' || quote_ident(extname) FROM pg_extension WHERE extname <> 'plpgsql' \
      UNION ALL SELECT 'large object ' || oid FROM pg_largeobject_metadata) \
    SELECT json_build_object('count', (SELECT count(*) FROM content), \
      'names', coalesce((SELECT json_agg(name) FROM (SELECT name FROM content LIMIT 5) AS first), '[]'))";

#[derive(serde::Deserialize)]
struct Content {
    count: u64,
    names: Vec<String>,
}

/// Refuses a database that isn't there, or in which something would be overwritten.
pub(super) async fn check(server: &Server, request: &DumpRestore) -> Result<(), Failure> {
    let into = &request.into;
    if !server.has_database_named(into).await? {
        return Err(Failure::new(Code::NotFound, format!("there is no database {:?}", into.as_str()))
            .hint("--create makes it; --into names another one."));
    }
    if request.tables.is_empty() && !request.clean {
        let content: Content = server.json(Some(into), CONTENT).await?;
        if content.count == 0 {
            return Ok(());
        }
        let more = content.count.saturating_sub(TOLD_NAMES as u64);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        return Err(Failure::new(
            Code::Conflict,
            format!("database {:?} isn't empty: it has {}{more}", into.as_str(), content.names.join(", ")),
        )
        .hint("Nothing was changed. Restore into a new one (--into NAME --create), or let what the dump has be dropped first (--clean)."));
    }
    if request.clean {
        return Ok(());
    }
    for table in &request.tables {
        let sql = format!(
            "SELECT to_json(EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = {} AND c.relname = {}))",
            literal(&table.schema),
            literal(&table.name)
        );
        if server.json(Some(into), &sql).await? {
            return Err(Failure::new(Code::Conflict, format!("{table} exists in database {:?}", into.as_str())).hint(
                "Nothing was changed. Restore into another database (--into NAME --create), rename the table, or let it be dropped first (--clean).",
            ));
        }
    }
    Ok(())
}

/// Creates the database as it was, under the name that it shall have.
pub(super) async fn create(
    server: &Server,
    dumped: &DumpedDatabase,
    request: &DumpRestore,
    warnings: &mut Vec<String>,
) -> Result<(), Failure> {
    let (into, properties) = (&request.into, &dumped.properties);
    if server.has_database_named(into).await? {
        return Err(Failure::new(Code::Conflict, format!("database {:?} exists already", into.as_str()))
            .hint("Nothing was changed. Name another one with --into, or restore into it without --create."));
    }
    let mut sql = format!(
        "CREATE DATABASE {} TEMPLATE template0 ENCODING {} LC_COLLATE {} LC_CTYPE {}",
        into.quoted(),
        literal(&properties.encoding),
        literal(&properties.collate),
        literal(&properties.ctype)
    );
    match (properties.locale_provider.as_str(), &properties.locale) {
        ("icu", Some(locale)) => sql += &format!(" LOCALE_PROVIDER icu ICU_LOCALE {}", literal(locale)),
        ("builtin", Some(locale)) => sql += &format!(" LOCALE_PROVIDER builtin BUILTIN_LOCALE {}", literal(locale)),
        _ => {}
    }
    let created = server.run(None, &sql).await;
    created.map_err(|failure| failure.context(format!("creating database {:?}", into.as_str())))?;
    if request.tables.is_empty() && !request.no_owner {
        let owner = format!("\"{}\"", properties.owner.replace('"', "\"\""));
        if let Err(failure) = server.run(None, &format!("ALTER DATABASE {} OWNER TO {owner}", into.quoted())).await {
            warnings.push(format!("the new database doesn't belong to the old one's owner: {failure}"));
        }
        for setting in &properties.settings {
            let Some((name, value)) = setting.split_once('=') else { continue };
            if let Err(failure) = server.run(None, &set(into, name, value)).await {
                // PostgreSQL quotes values that it refuses, and they may be secret.
                let why = if value.is_empty() { failure.message } else { failure.message.replace(value, "…") };
                warnings.push(format!("the new database lacks the old one's setting of {name}: {why}"));
            }
        }
    }
    Ok(())
}

/// SQL that gives a database a setting as it's in `pg_db_role_setting`: a list's value is one text there.
fn set(database: &DatabaseName, name: &str, value: &str) -> String {
    let quoted = name.split('.').map(|part| format!("\"{}\"", part.replace('"', "\"\""))).collect::<Vec<_>>().join(".");
    format!(
        "SELECT set_config({}, {}, false); ALTER DATABASE {} SET {quoted} FROM CURRENT",
        literal(name),
        literal(value),
        database.quoted()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_a_setting_whatever_is_in_it() {
        assert_eq!(
            set(&"d\"b".parse().unwrap(), "a.b\"; --", "it's\nnew"),
            "SELECT set_config('a.b\"; --', 'it''s\nnew', false); ALTER DATABASE \"d\"\"b\" SET \"a\".\"b\"\"; --\" FROM CURRENT"
        );
    }
}
