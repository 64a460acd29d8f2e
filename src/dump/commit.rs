//! Whether all of a dump is there, before its record is written and after.

use pgsidecar_core::{DumpRecord, ObjectKey, layout::DumpObject};

use crate::{
    failure::{Code, Failure},
    repository::Repository,
};

/// Looks for all that a dump is.
pub(super) async fn check_objects(repository: &Repository, record: &DumpRecord) -> Result<(), Failure> {
    let databases = record.databases.iter();
    let databases =
        databases.map(|database| (DumpObject::Database(database.name.clone(), record.archives), database.stored));
    for (object, stored) in databases.chain([(DumpObject::Globals, record.globals.stored)]) {
        let key = repository.layout().dump(record.id, object);
        match repository.store().head(&key).await? {
            Some(info) if info.size == stored.size => {}
            _ => return Err(lost(&key)),
        }
    }
    Ok(())
}

/// Reads back the record of a dump, and looks for all of it once more.
pub(super) async fn check_record(repository: &Repository, record: &DumpRecord) -> Result<(), Failure> {
    if repository.dump(record.id).await?.as_ref() != Some(record) {
        return Err(lost(&repository.layout().dump(record.id, DumpObject::Record)));
    }
    check_objects(repository, record).await
}

fn lost(key: &ObjectKey) -> Failure {
    Failure::new(Code::Conflict, format!("{key} was removed or replaced while the dump was taken"))
        .hint("Find out what deletes objects in the repository; take the dump again.")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;
    use pgsidecar_core::{
        DumpId, Layout, Sha256Digest,
        backup::StoredObject,
        dump::{DUMP_FORMAT, DatabaseName, DatabaseProperties, DumpFormat, DumpedDatabase, DumpedGlobals},
        layout::RepositoryObject,
    };

    use super::*;
    use crate::store::MemoryStore;

    #[tokio::test]
    async fn a_dump_whose_record_or_objects_are_gone_fails() {
        let layout = Layout::new("test/pg".parse().unwrap(), "7710543486334591142".parse().unwrap());
        let repository = Repository::new(Arc::new(MemoryStore::new()), layout.clone(), 1);
        let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap();
        let stored = StoredObject { size: 1, sha256: Sha256Digest::of(b"x") };
        let properties = DatabaseProperties {
            owner: "o".into(),
            encoding: "UTF8".into(),
            collate: "C".into(),
            ctype: "C".into(),
            locale_provider: "libc".into(),
            locale: None,
            settings: Vec::new(),
        };
        let name: DatabaseName = "shop".parse().unwrap();
        let database =
            DumpedDatabase { name: name.clone(), oid: 5, stored, plain_bytes: None, toc_entries: Some(1), properties };
        let record = DumpRecord {
            format: DUMP_FORMAT,
            id: DumpId::new(now),
            system_identifier: layout.system(),
            server_version: 150_018,
            tools_major: 15,
            tools_version: "15.18".into(),
            started_at: now,
            finished_at: now,
            archives: DumpFormat::Custom,
            databases: vec![database],
            globals: DumpedGlobals { stored, role_passwords: true },
            server: "s".into(),
            warnings: Vec::new(),
            writer: "w".into(),
        };
        let objects = [DumpObject::Globals, DumpObject::Database(name, DumpFormat::Custom)];
        for object in &objects {
            let key = layout.dump(record.id, object.clone());
            repository.store().create(&key, b"x".to_vec().into(), None).await.unwrap();
        }
        check_objects(&repository, &record).await.unwrap();
        assert_eq!(check_record(&repository, &record).await.unwrap_err().code, Code::Conflict);
        repository.store_json(&RepositoryObject::Dump(record.id, DumpObject::Record), &record).await.unwrap();
        check_record(&repository, &record).await.unwrap();
        for object in objects {
            repository.store().delete(&[layout.dump(record.id, object)]).await.unwrap();
            assert_eq!(check_record(&repository, &record).await.unwrap_err().code, Code::Conflict);
        }
    }
}
