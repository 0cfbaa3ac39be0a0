//! Events that others hear of by `ctr events` and containerd's API.

use std::collections::HashMap;

use containerd_client::events::ContainerUpdate;
use containerd_client::services::v1::PublishRequest;
use containerd_client::services::v1::events_client::EventsClient;
use prost::Message;
use prost_types::Any;

use crate::{Containerd, ContainerdError, During};

impl Containerd {
    /// Publishes that something has happened to a container: under `topic`, with these labels.
    ///
    /// The message is containerd's own `ContainerUpdate`: `ctr events` ends at the first message of a type
    /// that it does not know.
    ///
    /// # Errors
    /// The answer of containerd; a topic begins with a slash.
    pub async fn publish(
        &self,
        topic: &str,
        id: &str,
        image: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), ContainerdError> {
        let update = ContainerUpdate {
            id: id.to_owned(),
            image: image.to_owned(),
            labels,
            ..ContainerUpdate::default()
        };
        let request = PublishRequest {
            topic: topic.to_owned(),
            event: Some(Any {
                type_url: "containerd.events.ContainerUpdate".to_owned(),
                value: update.encode_to_vec(),
            }),
        };
        EventsClient::new(self.channel())
            .publish(self.request(request))
            .await
            .during(|| format!("publish {topic} of {id:?}"))?;
        Ok(())
    }
}
