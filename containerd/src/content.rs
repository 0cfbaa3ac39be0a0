//! containerd's content store: blobs out of it and into it.

use std::collections::HashMap;

use containerd_client::services::v1::ReadContentResponse;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::{
    Info, InfoRequest, ReadContentRequest, UpdateRequest, WriteAction, WriteContentRequest,
};
use containerd_client::tonic::{Code, Streaming};
use prost_types::FieldMask;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{During, Node, NodeError, present};

/// Largest manifest, index or config that is read into memory, in bytes. containerd's own limit
/// is 8 MiB.
const DOCUMENT_LIMIT: i64 = 8 << 20;

impl Node {
    fn content(&self) -> ContentClient<containerd_client::tonic::transport::Channel> {
        ContentClient::new(self.channel()).max_decoding_message_size(16 << 20)
    }

    /// Size and labels of the blob; none when the store does not have it.
    pub async fn blob(&self, digest: &str) -> Result<Option<Info>, NodeError> {
        let act = || format!("look up the blob {digest}");
        let request = InfoRequest {
            digest: digest.to_owned(),
        };
        match self.content().info(self.request(request)).await {
            Err(status) if status.code() == Code::NotFound => Ok(None),
            answer => present(answer.during(act)?.into_inner().info, "info", act).map(Some),
        }
    }

    /// The content of a small blob.
    pub async fn read_document(&self, digest: &str) -> Result<Vec<u8>, NodeError> {
        let act = || format!("read the blob {digest}");
        let request = ReadContentRequest {
            digest: digest.to_owned(),
            offset: 0,
            size: DOCUMENT_LIMIT,
        };
        let request = match self.blob(digest).await? {
            Some(info) => ReadContentRequest {
                size: info.size.min(DOCUMENT_LIMIT),
                ..request
            },
            None => request,
        };
        let mut stream = self
            .content()
            .read(self.request(request))
            .await
            .during(act)?
            .into_inner();
        let mut document = Vec::new();
        while let Some(piece) = stream.message().await.during(act)? {
            document.extend_from_slice(&piece.data);
        }
        Ok(document)
    }

    /// The content of a blob of any size, piece by piece.
    pub async fn read_blob(
        &self,
        digest: &str,
    ) -> Result<Streaming<ReadContentResponse>, NodeError> {
        let request = ReadContentRequest {
            digest: digest.to_owned(),
            offset: 0,
            size: 0,
        };
        let answer = self.content().read(self.request(request)).await;
        Ok(answer
            .during(|| format!("read the blob {digest}"))?
            .into_inner())
    }

    /// Writes a blob whose pieces come through `pieces`. The store refuses it when its digest is
    /// another; one that exists already is fine.
    pub async fn write_blob(
        &self,
        digest: &str,
        size: u64,
        labels: HashMap<String, String>,
        mut pieces: mpsc::Receiver<Vec<u8>>,
    ) -> Result<(), NodeError> {
        let act = || format!("write the blob {digest}");
        let total = i64::try_from(size).unwrap_or(i64::MAX);
        let first = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: format!("transship-{digest}"),
            total,
            expected: digest.to_owned(),
            ..WriteContentRequest::default()
        };
        let (requests, queue) = mpsc::channel(4);
        // The channel has room for the first request, so this does not wait.
        drop(requests.send(first.clone()).await);
        let answer = self
            .content()
            .write(self.request(ReceiverStream::new(queue)))
            .await;
        let mut answers = match answer {
            Err(status) if status.code() == Code::AlreadyExists => return Ok(()),
            answer => answer.during(act)?.into_inner(),
        };
        match answers.message().await {
            Err(status) if status.code() == Code::AlreadyExists => return Ok(()),
            answer => drop(answer.during(act)?),
        }
        let mut offset = 0;
        while let Some(data) = pieces.recv().await {
            let length = data.len();
            let piece = WriteContentRequest {
                action: WriteAction::Write.into(),
                offset,
                data,
                ..first.clone()
            };
            offset += i64::try_from(length).unwrap_or(i64::MAX);
            if requests.send(piece).await.is_err() {
                break;
            }
            drop(answers.message().await.during(act)?);
        }
        let last = WriteContentRequest {
            action: WriteAction::Commit.into(),
            offset,
            labels,
            ..first
        };
        drop(requests.send(last).await);
        drop(requests);
        loop {
            match answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                Err(status) if status.code() == Code::AlreadyExists => return Ok(()),
                Err(status) => return Err(status).during(act),
            }
        }
    }

    /// Sets one label of a blob.
    pub async fn label_blob(
        &self,
        digest: &str,
        label: &str,
        value: &str,
    ) -> Result<(), NodeError> {
        let info = Info {
            digest: digest.to_owned(),
            labels: [(label.to_owned(), value.to_owned())].into(),
            ..Info::default()
        };
        let update_mask = Some(FieldMask {
            paths: vec![format!("labels.{label}")],
        });
        self.content()
            .update(self.request(UpdateRequest {
                info: Some(info),
                update_mask,
            }))
            .await
            .during(|| format!("label the blob {digest}"))?;
        Ok(())
    }
}
