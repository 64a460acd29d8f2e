//! Deleting objects from S3.

use aws_sdk_s3::types::{Delete, ObjectIdentifier};
use futures_util::{StreamExt, stream};
use pgsidecar_core::ObjectKey;

use super::{
    MAX_PAGE, Store, StoreError, StoreErrorKind,
    s3::S3Store,
    s3_error::{answer, one_of_many, store_error},
};

/// Requests at once where a server can't delete several objects by one.
const SINGLE_DELETES: usize = 8;

/// [`Store::delete`].
pub(super) async fn delete(store: &S3Store, keys: &[ObjectKey]) -> Result<Vec<(ObjectKey, StoreError)>, StoreError> {
    let mut failed = Vec::new();
    for batch in keys.chunks(MAX_PAGE) {
        if let [_, _, ..] = batch
            && let Some(failures) = delete_many(store, batch).await?
        {
            failed.extend(failures);
            continue;
        }
        let deletions = stream::iter(batch.to_vec()).map(|key| async move {
            let outcome = delete_one(store, &key).await;
            (key, outcome)
        });
        let outcomes: Vec<_> = deletions.buffer_unordered(SINGLE_DELETES).collect().await;
        failed.extend(outcomes.into_iter().filter_map(|(key, outcome)| outcome.err().map(|error| (key, error))));
    }
    Ok(failed)
}

async fn delete_one(store: &S3Store, key: &ObjectKey) -> Result<(), StoreError> {
    let request = store.client().delete_object().bucket(store.bucket()).key(store.full(key.as_str()));
    match request.send().await {
        Ok(_) => Ok(()),
        Err(error) if answer(&error).code == Some("NoSuchKey") => Ok(()),
        Err(error) => Err(store_error("delete", key.as_str(), error)),
    }
}

/// At most [`MAX_PAGE`] keys by one request. `None` if this server can't.
async fn delete_many(store: &S3Store, keys: &[ObjectKey]) -> Result<Option<Vec<(ObjectKey, StoreError)>>, StoreError> {
    let place = store.description();
    let identify = |key: &ObjectKey| ObjectIdentifier::builder().key(store.full(key.as_str())).build();
    let delete = keys.iter().map(identify).collect::<Result<Vec<_>, _>>();
    let delete = delete.and_then(|objects| Delete::builder().set_objects(Some(objects)).quiet(true).build());
    let delete = delete
        .map_err(|error| StoreError::new(StoreErrorKind::Unexpected, "delete from", &place, error.to_string()))?;
    let answered = match store.client().delete_objects().bucket(store.bucket()).delete(delete).send().await {
        Ok(answered) => answered,
        Err(error) => {
            let (not_implemented, status) = (answer(&error).is_not_implemented(), answer(&error).status);
            let error = store_error("delete from", &place, error);
            // Some want a Content-MD5 that the SDK no longer sends, some don't have the operation.
            let is_refused = error.kind() == StoreErrorKind::Unexpected && matches!(status, Some(400 | 411));
            return if not_implemented || is_refused { Ok(None) } else { Err(error) };
        }
    };
    let failed = answered.errors().iter().filter_map(|failure| {
        let key = store.relative(failure.key()?)?.parse::<ObjectKey>().ok()?;
        let code = failure.code().unwrap_or("without a code");
        (code != "NoSuchKey").then(|| {
            let error = one_of_many("delete", key.as_str(), code, failure.message());
            (key, error)
        })
    });
    Ok(Some(failed.collect()))
}
