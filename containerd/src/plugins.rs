//! Which plugins containerd has loaded.

use containerd_client::services::v1::PluginsRequest;
use containerd_client::services::v1::introspection_client::IntrospectionClient;

use super::{During, Node, NodeError};

impl Node {
    /// Names of the snapshotters that work on this node.
    pub async fn snapshotters(&self) -> Result<Vec<String>, NodeError> {
        self.plugins("io.containerd.snapshotter.v1").await
    }

    /// Names of the differs that work on this node.
    pub async fn differs(&self) -> Result<Vec<String>, NodeError> {
        self.plugins("io.containerd.differ.v1").await
    }

    async fn plugins(&self, kind: &str) -> Result<Vec<String>, NodeError> {
        let request = PluginsRequest {
            filters: vec![format!("type=={kind}")],
        };
        let answer = IntrospectionClient::new(self.channel())
            .plugins(self.request(request))
            .await
            .during(|| "list containerd's plugins".to_owned())?;
        let loaded = answer.into_inner().plugins.into_iter();
        Ok(loaded
            .filter(|plugin| plugin.init_err.is_none())
            .map(|plugin| plugin.id)
            .collect())
    }
}
