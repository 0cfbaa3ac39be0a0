//! Leases: what is made under one is no garbage before the lease ends.

use std::time::{Duration, SystemTime};

use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::{
    AddResourceRequest, CreateRequest, DeleteRequest, Info, ListRequest, Resource,
};
use containerd_client::tonic::transport::Channel;

use crate::labels::{GC_EXPIRE, owned, rfc3339};
use crate::{Containerd, ContainerdError, During, header, unique};

impl Containerd {
    fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel())
    }

    /// The same containerd under a new lease, which ends by itself after `lifetime`.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn with_lease(&self, lifetime: Duration) -> Result<Self, ContainerdError> {
        self.with_lease_called(&format!("transship-{}", unique()), lifetime)
            .await
    }

    /// The same containerd under a new lease with the id `id`, which ends by itself after `lifetime`.
    ///
    /// # Errors
    /// The answer of containerd; or `id` cannot be a gRPC header.
    pub async fn with_lease_called(
        &self,
        id: &str,
        lifetime: Duration,
    ) -> Result<Self, ContainerdError> {
        let lease = Some(header(id)?);
        let request = CreateRequest {
            id: id.to_owned(),
            labels: owned(&[(GC_EXPIRE, &rfc3339(SystemTime::now() + lifetime))]),
        };
        self.leases()
            .create(self.request(request))
            .await
            .during(|| format!("make the lease {id}"))?;
        Ok(Self {
            lease,
            ..self.clone()
        })
    }

    /// Ids of all leases of the namespace.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn lease_ids(&self) -> Result<Vec<String>, ContainerdError> {
        let request = self.request(ListRequest {
            filters: Vec::new(),
        });
        let answer = self.leases().list(request).await;
        let leases = answer
            .during(|| "list the leases".to_owned())?
            .into_inner()
            .leases;
        Ok(leases.into_iter().map(|lease| lease.id).collect())
    }

    /// Ends the lease `id` of another process, which may have ended already, and waits for the garbage
    /// collection after it.
    ///
    /// # Errors
    /// The answer of containerd; or `id` cannot be a gRPC header.
    pub async fn end_lease_called(&self, id: &str) -> Result<(), ContainerdError> {
        let other = Self {
            lease: Some(header(id)?),
            ..self.clone()
        };
        other.end_lease_and_collect().await
    }

    /// Ends the lease, if there is one that nobody has ended. What nothing else refers to may then be
    /// collected.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn end_lease(&self) -> Result<(), ContainerdError> {
        self.delete_lease(false).await
    }

    /// Ends the lease, if there is one, and waits for the garbage collection after it.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn end_lease_and_collect(&self) -> Result<(), ContainerdError> {
        self.delete_lease(true).await
    }

    async fn delete_lease(&self, sync: bool) -> Result<(), ContainerdError> {
        let Some(id) = self.lease_id() else {
            return Ok(());
        };
        let bare = Self {
            lease: None,
            ..self.clone()
        };
        let act = || format!("end the lease {id}");
        let id = id.to_owned();
        let request = bare.request(DeleteRequest { id, sync });
        match self.leases().delete(request).await.during(act) {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// As [`Containerd::blob`]; one that is there stays as long as the lease. It is put under the lease before the answer
    /// is asked for: what nothing else refers to any more may be collected at any moment.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn hold_blob(&self, digest: &str) -> Result<Option<Info>, ContainerdError> {
        self.hold("content", digest).await?;
        self.blob(digest).await
    }

    /// Puts something under the lease, if there is one; containerd does not ask whether it is there.
    pub(crate) async fn hold(&self, kind: &str, id: &str) -> Result<(), ContainerdError> {
        let Some(lease) = self.lease_id() else {
            return Ok(());
        };
        let request = AddResourceRequest {
            id: lease.to_owned(),
            resource: Some(Resource {
                id: id.to_owned(),
                r#type: kind.to_owned(),
            }),
        };
        self.leases()
            .add_resource(self.request(request))
            .await
            .during(|| format!("put {id} under the lease {lease}"))?;
        Ok(())
    }

    /// Id of the lease that calls are made under.
    pub fn lease_id(&self) -> Option<&str> {
        self.lease.as_ref()?.to_str().ok()
    }
}
