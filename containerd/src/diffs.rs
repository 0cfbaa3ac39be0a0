//! containerd's diff service: what distinguishes two snapshots, compared file by file if need be.

use containerd_client::services::v1::DiffRequest;
use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::types::{Descriptor, Mount};

use super::{During, Node, NodeError, present};

/// An uncompressed layer.
const PLAIN_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

impl Node {
    /// Writes what `right` has changed since `left` to the content store, as a plain layer.
    pub async fn diff(&self, left: Vec<Mount>, right: Vec<Mount>) -> Result<Descriptor, NodeError> {
        let act = || "compare the snapshots".to_owned();
        let request = DiffRequest {
            left,
            right,
            media_type: PLAIN_LAYER.to_owned(),
            r#ref: format!("transship-diff-{}", super::unique()),
            ..DiffRequest::default()
        };
        let answer = DiffClient::new(self.channel())
            .diff(self.request(request))
            .await
            .during(act)?;
        present(answer.into_inner().diff, "layer", act)
    }
}
