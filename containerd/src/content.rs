//! containerd's content store: blobs out of it, and their labels. How one gets in: upload.rs.

use std::collections::HashMap;

use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::{
    AbortRequest, DeleteContentRequest, Info, InfoRequest, ListContentRequest, ListStatusesRequest,
    ReadContentRequest, ReadContentResponse, UpdateRequest,
};
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Code, Streaming};
use tokio::sync::mpsc;

use crate::labels::{mask, owned};
use crate::{Containerd, ContainerdError, During, MESSAGE_LIMIT, Upload, present, unique};

/// Largest manifest, index or config that is read into memory, in bytes. containerd's own limit
/// is 8 MiB.
const DOCUMENT_LIMIT: i64 = 8 << 20;

/// The content of a blob on its way out of the store.
#[derive(Debug)]
pub struct BlobPieces {
    digest: String,
    stream: Streaming<ReadContentResponse>,
}

impl BlobPieces {
    /// The next piece; None at the end.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, ContainerdError> {
        let piece = self.stream.message().await;
        let piece = piece.during(|| format!("read the blob {}", self.digest))?;
        Ok(piece.map(|piece| piece.data))
    }
}

impl Containerd {
    pub(crate) fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    /// Size and labels of the blob; None when the namespace does not have it.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn blob(&self, digest: &str) -> Result<Option<Info>, ContainerdError> {
        let act = || format!("look up the blob {digest}");
        let request = InfoRequest {
            digest: digest.to_owned(),
        };
        match self.content().info(self.request(request)).await {
            // What is no digest names nothing: an index of somebody's image may have such ones.
            Err(status) if matches!(status.code(), Code::NotFound | Code::InvalidArgument) => {
                Ok(None)
            }
            answer => present(answer.during(act)?.into_inner().info, "info", act).map(Some),
        }
    }

    /// The blobs that one of these filters is true of.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn blobs(&self, filters: &[&str]) -> Result<Vec<Info>, ContainerdError> {
        let act = || "list the content".to_owned();
        let request = ListContentRequest {
            filters: { filters.iter() }.map(ToString::to_string).collect(),
        };
        let answer = self.content().list(self.request(request)).await;
        let mut answers = answer.during(act)?.into_inner();
        let mut blobs = Vec::new();
        while let Some(answer) = answers.message().await.during(act)? {
            blobs.extend(answer.info);
        }
        Ok(blobs)
    }

    /// The first bytes of a blob, as many as tell how it is compressed.
    ///
    /// # Errors
    /// The answer of containerd.
    pub(crate) async fn read_begin(&self, digest: &str) -> Result<Vec<u8>, ContainerdError> {
        let begin = self.read(digest, 4).await?.next().await?;
        Ok(begin.unwrap_or_default())
    }

    /// The content of a small blob, at most 8 MiB of it.
    ///
    /// # Errors
    /// The answer of containerd, also when the namespace does not have the blob.
    pub async fn read_document(&self, digest: &str) -> Result<Vec<u8>, ContainerdError> {
        let size = match self.blob(digest).await? {
            Some(info) => info.size.min(DOCUMENT_LIMIT),
            None => DOCUMENT_LIMIT,
        };
        let mut pieces = self.read(digest, size).await?;
        let mut document = Vec::new();
        while let Some(piece) = pieces.next().await? {
            document.extend(piece);
        }
        Ok(document)
    }

    /// The content of a blob of any size, piece by piece.
    ///
    /// # Errors
    /// The answer of containerd, also when the namespace does not have the blob.
    pub async fn read_blob(&self, digest: &str) -> Result<BlobPieces, ContainerdError> {
        self.read(digest, 0).await
    }

    /// Size 0 is all of it.
    async fn read(&self, digest: &str, size: i64) -> Result<BlobPieces, ContainerdError> {
        let request = ReadContentRequest {
            digest: digest.to_owned(),
            offset: 0,
            size,
        };
        let answer = self.content().read(self.request(request)).await;
        let answer = answer.during(|| format!("read the blob {digest}"))?;
        Ok(BlobPieces {
            digest: digest.to_owned(),
            stream: answer.into_inner(),
        })
    }

    /// Writes a blob of `size` bytes whose pieces come through `pieces`. One that the store has already
    /// is fine.
    ///
    /// # Errors
    /// The answer of containerd, also when the content is not what digest and size say. Nothing is left
    /// of the blob then.
    pub async fn write_blob(
        &self,
        digest: &str,
        size: u64,
        labels: HashMap<String, String>,
        mut pieces: mpsc::Receiver<Vec<u8>>,
    ) -> Result<(), ContainerdError> {
        // Another may write the same at this moment; the first one who is done has written it.
        let reference = format!("transship-{digest}-{}", unique());
        let mut upload = Upload::begin(self.clone(), reference).await?;
        let written = async {
            while let Some(piece) = pieces.recv().await {
                upload.write(piece).await?;
            }
            upload.commit(digest, size, &labels).await
        };
        let written = written.await;
        if written.is_err() {
            // The first error says more; what stays is removed by the next attempt.
            drop(upload.abort().await);
        }
        written
    }

    /// Sets labels of a blob; it keeps all others.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn label_blob(
        &self,
        digest: &str,
        labels: &[(&str, &str)],
    ) -> Result<(), ContainerdError> {
        self.set_labels(digest, owned(labels)).await
    }

    async fn set_labels(
        &self,
        digest: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), ContainerdError> {
        let request = UpdateRequest {
            update_mask: Some(mask(&labels)),
            info: Some(Info {
                digest: digest.to_owned(),
                labels,
                ..Info::default()
            }),
        };
        self.content()
            .update(self.request(request))
            .await
            .during(|| format!("label the blob {digest}"))?;
        Ok(())
    }

    /// Puts a blob that was there before under the lease and gives it the labels that it lacks.
    pub(crate) async fn adopt_blob(
        &self,
        digest: &str,
        labels: &HashMap<String, String>,
    ) -> Result<(), ContainerdError> {
        let present = self.hold_blob(digest).await?.unwrap_or_default().labels;
        let missing: HashMap<_, _> = labels
            .iter()
            .filter(|(name, _)| !present.contains_key(*name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        self.set_labels(digest, missing).await
    }

    /// Deletes a blob.
    ///
    /// # Errors
    /// The answer of containerd, also when the namespace does not have the blob.
    pub async fn delete_blob(&self, digest: &str) -> Result<(), ContainerdError> {
        let request = DeleteContentRequest {
            digest: digest.to_owned(),
        };
        let deleted = self.content().delete(self.request(request)).await;
        deleted
            .during(|| format!("delete the blob {digest}"))
            .map(drop)
    }

    /// Removes the content that was written under `reference` and not committed; none is fine.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn abort_upload(&self, reference: &str) -> Result<(), ContainerdError> {
        let request = AbortRequest {
            r#ref: reference.to_owned(),
        };
        match self.content().abort(self.request(request)).await {
            Err(status) if status.code() == Code::NotFound => Ok(()),
            answer => answer
                .during(|| format!("remove the unfinished content {reference:?}"))
                .map(drop),
        }
    }

    /// References of unfinished content that begin with `prefix`, which is letters, digits and dashes.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn unfinished_uploads(&self, prefix: &str) -> Result<Vec<String>, ContainerdError> {
        let request = ListStatusesRequest {
            filters: vec![format!("ref~=^{prefix}")],
        };
        let answer = self
            .content()
            .list_statuses(self.request(request))
            .await
            .during(|| "list unfinished content".to_owned())?;
        let statuses = answer.into_inner().statuses.into_iter();
        Ok(statuses
            .map(|status| status.r#ref)
            .filter(|reference| reference.starts_with(prefix))
            .collect())
    }
}
