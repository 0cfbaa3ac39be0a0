//! What a container's record says of its pod, where the CRI plugin has made it.
//!
//! ```text
//! labels       io.cri-containerd.kind                     container | sandbox
//!              io.kubernetes.{pod.*, container.name}      kubelet's
//! extensions   io.cri-containerd.<kind>.metadata          the CRI plugin's own
//! ```
//!
//! Labels of a record are what an image or a person says: `ctr run` and nerdctl make labels of the record of those of the
//! image, before containerd 2.0 the CRI's among them (`WithImageConfigLabels`). Extensions only a client of the API writes.

use containerd_client::services::v1::Container as Record;
use transship_checkpoint::cri_names::{CRI_NAMESPACE, labels};
use transship_checkpoint::manifest::Pod;

/// The kind (`sandbox`, `container`) that the CRI has given to a record of its own.
pub fn cri_kind<'r>(record: &'r Record, namespace: &str) -> Option<&'r str> {
    let kind = record.labels.get(labels::KIND).map(String::as_str)?;
    let own = format!("io.cri-containerd.{kind}.metadata");
    let is_of_cri = namespace == CRI_NAMESPACE && record.extensions.contains_key(&own);
    is_of_cri.then_some(kind)
}

/// Whether it is the sandbox of a pod.
pub fn is_sandbox(record: &Record) -> bool {
    cri_kind(record, CRI_NAMESPACE) == Some(labels::KIND_SANDBOX)
}

/// The pod that a record of the CRI belongs to.
pub fn pod_of(record: &Record, namespace: &str) -> Option<Pod> {
    cri_kind(record, namespace)?;
    let label = |name| record.labels.get(name).cloned();
    Some(Pod {
        name: label(labels::POD_NAME)?,
        namespace: label(labels::POD_NAMESPACE)?,
        uid: label(labels::POD_UID).unwrap_or_default(),
        service_account: None,
    })
}

/// The pod's name of a container of the CRI.
pub fn name_in_pod<'r>(record: &'r Record, namespace: &str) -> Option<&'r str> {
    cri_kind(record, namespace).filter(|kind| *kind == labels::KIND_CONTAINER)?;
    record
        .labels
        .get(labels::CONTAINER_NAME)
        .map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_alone_make_no_record_of_the_cri() {
        let labels = [
            (labels::KIND, labels::KIND_CONTAINER),
            (labels::CONTAINER_NAME, "x"),
            (labels::POD_NAME, "a"),
            (labels::POD_NAMESPACE, "shop"),
        ];
        let mut record = Record {
            labels: labels.map(|(key, value)| (key.into(), value.into())).into(),
            ..Record::default()
        };
        let found = |record: &Record, namespace| {
            (
                pod_of(record, namespace).map(|pod| pod.name),
                name_in_pod(record, namespace).map(str::to_owned),
            )
        };
        assert_eq!(found(&record, CRI_NAMESPACE), (None, None));
        let of_sandbox = "io.cri-containerd.sandbox.metadata".to_owned();
        record.extensions.entry(of_sandbox).or_default();
        assert_eq!(found(&record, CRI_NAMESPACE), (None, None));
        let own = "io.cri-containerd.container.metadata".to_owned();
        record.extensions.entry(own).or_default();
        let of_pod = (Some("a".to_owned()), Some("x".to_owned()));
        assert_eq!(found(&record, CRI_NAMESPACE), of_pod);
        assert_eq!(found(&record, "default"), (None, None));
        assert!(!is_sandbox(&record));
        let kind = record.labels.entry(labels::KIND.into()).or_default();
        *kind = labels::KIND_SANDBOX.into();
        assert!(is_sandbox(&record));
    }
}
