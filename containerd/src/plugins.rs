//! Which plugins of containerd work.

use std::path::PathBuf;

use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::{Plugin, PluginsRequest, ServerResponse};

use crate::{Containerd, ContainerdError, During};

impl Containerd {
    /// Names of the snapshotters that work on this node.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn snapshotters(&self) -> Result<Vec<String>, ContainerdError> {
        let plugins = self.plugins("io.containerd.snapshotter.v1").await?;
        Ok(plugins.map(|plugin| plugin.id).collect())
    }

    /// Names of the differs that work on this node.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn differs(&self) -> Result<Vec<String>, ContainerdError> {
        let plugins = self.plugins("io.containerd.differ.v1").await?;
        Ok(plugins.map(|plugin| plugin.id).collect())
    }

    /// The directory of containerd's own content store; None when it does not tell, or when another
    /// store is loaded.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn content_root(&self) -> Result<Option<PathBuf>, ContainerdError> {
        let mut stores = self.plugins("io.containerd.content.v1").await?;
        let root = match (stores.next(), stores.next()) {
            (Some(mut only), None) if only.id == "content" => only.exports.remove("root"),
            _ => None,
        };
        Ok(root.map(PathBuf::from).filter(|root| root.is_absolute()))
    }

    /// Where a snapshotter is configured to lie (`exports.root` of a proxy); None when nobody says.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn snapshotter_root(&self, name: &str) -> Result<Option<PathBuf>, ContainerdError> {
        let mut plugins = self.plugins("io.containerd.snapshotter.v1").await?;
        let found = plugins.find(|plugin| plugin.id == name);
        Ok(found.and_then(|mut plugin| plugin.exports.remove("root").map(PathBuf::from)))
    }

    /// What tells this containerd from all others: it is made once and kept with its state.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn server_id(&self) -> Result<String, ContainerdError> {
        Ok(self.server().await?.uuid)
    }

    /// Its process, in its own process namespace. containerd 1.6 does not tell.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn server_process(&self) -> Result<Option<u64>, ContainerdError> {
        Ok(Some(self.server().await?.pid).filter(|pid| *pid != 0))
    }

    async fn server(&self) -> Result<ServerResponse, ContainerdError> {
        let answer = IntrospectionClient::new(self.channel())
            .server(self.request(()))
            .await
            .during(|| "ask containerd who it is".to_owned())?;
        Ok(answer.into_inner())
    }

    async fn plugins(
        &self,
        kind: &str,
    ) -> Result<impl Iterator<Item = Plugin> + use<>, ContainerdError> {
        let request = PluginsRequest {
            filters: vec![format!("type=={kind}")],
        };
        let answer = IntrospectionClient::new(self.channel())
            .plugins(self.request(request))
            .await
            .during(|| format!("list the plugins of type {kind}"))?;
        let plugins = answer.into_inner().plugins.into_iter();
        Ok(plugins.filter(|plugin| plugin.init_err.is_none()))
    }
}
