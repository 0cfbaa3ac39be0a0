//! One blob on its way into containerd's content store.
//!
//! ```text
//! Write {STAT, ref} ──>                       containerd records the reference meanwhile
//! Write {WRITE, ref, offset 0, data} ──>
//! Write {WRITE, ref, offset n, data} ──>      each is answered, nobody waits for the answers
//!  ...
//! Write {COMMIT, ref, offset, data, total, expected digest, labels} ──>
//! ```
//!
//! The last data goes with the commit, so a small blob is one message. What a killed process leaves under its reference goes
//! with its lease.

use std::collections::HashMap;

use containerd_client::services::v1::{WriteAction, WriteContentRequest};
use containerd_client::tonic::{Code, Status};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use crate::{Containerd, ContainerdError, During};

/// A blob that is being written. Whoever gives it up calls [`Upload::abort`].
#[derive(Debug)]
pub struct Upload {
    containerd: Containerd,
    reference: String,
    offset: i64,
    /// The last chunk, until it is known that it is the last.
    held: Option<Vec<u8>>,
    stream: Option<Stream>,
}

#[derive(Debug)]
struct Stream {
    requests: mpsc::Sender<WriteContentRequest>,
    end: JoinHandle<Result<(), Status>>,
}

impl Upload {
    /// Lets containerd prepare for the blob (a synced transaction and a directory), which takes about
    /// as long as the export of a small layer.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn begin(containerd: Containerd, reference: String) -> Result<Self, ContainerdError> {
        let mut upload = Self {
            containerd,
            reference,
            offset: 0,
            held: None,
            stream: None,
        };
        let request = upload.next_request(WriteAction::Stat, Vec::new());
        upload.send(request).await?;
        Ok(upload)
    }

    /// Adds a chunk.
    ///
    /// # Errors
    /// The answer of containerd to this chunk or an earlier one.
    pub async fn write(&mut self, chunk: Vec<u8>) -> Result<(), ContainerdError> {
        match self.held.replace(chunk) {
            None => Ok(()),
            Some(data) => {
                let request = self.next_request(WriteAction::Write, data);
                self.send(request).await
            }
        }
    }

    /// Ends the blob, which is `size` bytes long. If the store has it already, that one is put under the
    /// lease and gets the labels that it lacks.
    ///
    /// # Errors
    /// The answer of containerd, also when the content is not what digest and size say.
    pub async fn commit(
        &mut self,
        digest: &str,
        size: u64,
        labels: &HashMap<String, String>,
    ) -> Result<(), ContainerdError> {
        let data = self.held.take().unwrap_or_default();
        let request = WriteContentRequest {
            total: i64::try_from(size).unwrap_or(i64::MAX),
            expected: digest.to_owned(),
            labels: labels.clone(),
            ..self.next_request(WriteAction::Commit, data)
        };
        let committed = match self.send(request).await {
            Ok(()) => self.end().await,
            error => error,
        };
        match committed {
            Err(error) if error.code() == Code::AlreadyExists => {
                // An early answer leaves the reference as it was.
                self.containerd.abort_upload(&self.reference).await?;
                self.containerd.adopt_blob(digest, labels).await
            }
            other => other,
        }
    }

    /// Leaves nothing of the blob behind, unless it was committed.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn abort(&mut self) -> Result<(), ContainerdError> {
        // Only when the stream has ended can containerd write no more.
        drop(self.end().await);
        self.containerd.abort_upload(&self.reference).await
    }

    fn next_request(&mut self, action: WriteAction, data: Vec<u8>) -> WriteContentRequest {
        let offset = self.offset;
        self.offset += i64::try_from(data.len()).unwrap_or(i64::MAX);
        WriteContentRequest {
            action: action.into(),
            r#ref: self.reference.clone(),
            offset,
            data,
            ..WriteContentRequest::default()
        }
    }

    async fn send(&mut self, request: WriteContentRequest) -> Result<(), ContainerdError> {
        let stream = self.stream.get_or_insert_with(|| open(&self.containerd));
        if stream.requests.send(request).await.is_ok() {
            return Ok(());
        }
        self.end().await?;
        // containerd has ended the stream without an error and without a commit.
        Err(Status::aborted("containerd ended the write")).during(|| self.act())
    }

    /// Sends no more and waits for the end of the answers.
    async fn end(&mut self) -> Result<(), ContainerdError> {
        let Some(Stream { requests, end }) = self.stream.take() else {
            return Ok(());
        };
        drop(requests);
        end.await
            .unwrap_or_else(|error| Err(Status::internal(error.to_string())))
            .during(|| self.act())
    }

    fn act(&self) -> String {
        format!("write the content {:?}", self.reference)
    }
}

fn open(containerd: &Containerd) -> Stream {
    let (requests, queue) = mpsc::channel(1);
    let mut client = containerd.content();
    let request = containerd.request(ReceiverStream::new(queue));
    let end = tokio::spawn(async move {
        let mut answers = client.write(request).await?.into_inner();
        while answers.message().await?.is_some() {}
        Ok(())
    });
    Stream { requests, end }
}
