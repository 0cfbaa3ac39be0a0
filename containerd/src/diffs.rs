//! containerd's diff service: two snapshots compared, and a layer applied.

use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::{ApplyRequest, DiffRequest};
use containerd_client::types::{Descriptor, Mount};

use crate::{Containerd, ContainerdError, During, present};

impl Containerd {
    /// Writes the changes from `left` to `right` to the content store, as a layer.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn diff(&self, request: DiffRequest) -> Result<Descriptor, ContainerdError> {
        let act = || "compare the snapshots".to_owned();
        let answer = DiffClient::new(self.channel())
            .diff(self.request(request))
            .await
            .during(act)?;
        present(answer.into_inner().diff, "layer", act)
    }

    /// Applies a layer of the content store to mounts; gives the descriptor of its uncompressed tar.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn apply(
        &self,
        layer: &Descriptor,
        mounts: Vec<Mount>,
    ) -> Result<Descriptor, ContainerdError> {
        self.apply_as_asked(ApplyRequest {
            diff: Some(layer.clone()),
            mounts,
            ..ApplyRequest::default()
        })
        .await
    }

    /// Hands on a request to apply a layer as it is.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn apply_as_asked(
        &self,
        request: ApplyRequest,
    ) -> Result<Descriptor, ContainerdError> {
        let digest = request.diff.as_ref().map(|layer| layer.digest.clone());
        let act = || format!("apply the layer {}", digest.as_deref().unwrap_or_default());
        let answer = DiffClient::new(self.channel())
            .apply(self.request(request))
            .await
            .during(act)?;
        present(answer.into_inner().applied, "descriptor", act)
    }
}
