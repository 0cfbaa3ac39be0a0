//! Which plugins containerd has loaded.

use containerd_client::services::v1::PluginsRequest;
use containerd_client::services::v1::introspection_client::IntrospectionClient;

use super::{During, Node, NodeError};

impl Node {
    /// Names of the snapshotters that work on this node.
    pub(crate) async fn snapshotters(&self) -> Result<Vec<String>, NodeError> {
        let request = PluginsRequest {
            filters: vec!["type==io.containerd.snapshotter.v1".into()],
        };
        let answer = IntrospectionClient::new(self.channel())
            .plugins(self.request(request))
            .await
            .during(|| "list containerd's snapshotters".to_owned())?;
        let loaded = answer.into_inner().plugins.into_iter();
        Ok(loaded
            .filter(|plugin| plugin.init_err.is_none())
            .map(|plugin| plugin.id)
            .collect())
    }
}
