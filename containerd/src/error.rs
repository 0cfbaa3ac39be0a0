//! Why a request to containerd failed, and what it was for.

use containerd_client::tonic::{self, Code, Status};

/// A request to containerd that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {act}")]
pub struct ContainerdError {
    /// What was to be done, on what: completes "cannot ...".
    pub act: String,
    /// Why it failed.
    pub source: Cause,
}

/// Why a request to containerd failed.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// containerd's answer.
    #[error("{}", .0.message())]
    Status(Status),
    /// There is no connection.
    #[error(transparent)]
    Transport(#[from] tonic::transport::Error),
    /// A value that cannot be a gRPC header.
    #[error("{0:?} cannot be used in a gRPC header")]
    Header(String),
    /// An answer that lacks a field which containerd always fills.
    #[error("containerd's answer holds no {0}")]
    Incomplete(&'static str),
    /// containerd knows the task, and its shim has not told what the task does in time.
    #[error("its shim does not answer containerd")]
    Silent,
    /// A layer with other content than the image's config says.
    #[error("its content has the digest {found}, not {expected}")]
    Content {
        /// Digest of the layer's tar.
        found: String,
        /// Digest in the image's config.
        expected: String,
    },
    /// Layers that neither the snapshotter nor an image of this node has.
    #[error("they are not on this node, and neither {image:?} nor another image here has them")]
    OtherImage {
        /// Name of the image.
        image: String,
    },
}

impl ContainerdError {
    /// Whether the object does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.code() == Code::NotFound
    }

    /// Whether the object to be made exists already.
    #[must_use]
    pub fn is_already_exists(&self) -> bool {
        self.code() == Code::AlreadyExists
    }

    /// Whether it is a shim that does not answer, and nothing is known of its task.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        matches!(self.source, Cause::Silent)
    }

    /// The gRPC code: containerd's, or the one that describes the cause best.
    #[must_use]
    pub fn code(&self) -> Code {
        match &self.source {
            Cause::Status(status) => status.code(),
            Cause::Transport(_) | Cause::Silent => Code::Unavailable,
            Cause::Header(_) => Code::InvalidArgument,
            Cause::Incomplete(_) => Code::Internal,
            Cause::Content { .. } => Code::DataLoss,
            Cause::OtherImage { .. } => Code::FailedPrecondition,
        }
    }
}

/// Adds the act to a failed request.
pub(crate) trait During<T> {
    /// `act` completes "cannot ...".
    fn during(self, act: impl FnOnce() -> String) -> Result<T, ContainerdError>;
}

impl<T, E: Into<Cause>> During<T> for Result<T, E> {
    fn during(self, act: impl FnOnce() -> String) -> Result<T, ContainerdError> {
        self.map_err(|cause| ContainerdError {
            act: act(),
            source: cause.into(),
        })
    }
}

impl From<Status> for Cause {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

/// Takes a field that protobuf makes optional and containerd always fills.
pub(crate) fn present<T>(
    field: Option<T>,
    name: &'static str,
    act: impl FnOnce() -> String,
) -> Result<T, ContainerdError> {
    field.ok_or(Cause::Incomplete(name)).during(act)
}
