//! Who may restore a checkpoint, and into what: asked before anything of it is used.
//!
//! ```text
//!  Kubernetes namespace of the pod ─┐                  exceptions of node.toml
//!  service account of the pod ──────┼─ Asker ─ admit ─ manifest: pod, architecture, options of CRIU
//!  options, `rootfs` (annotations) ─┘    └ admit_container ─ spec of the dump: bind mounts
//! ```
//!
//! The author of a pod chooses its annotations, and a checkpoint holds another process's memory: it goes
//! into pods of the Kubernetes namespace that it was taken in. Outside of the CRI there is no namespace:
//! root asks, and only the machine is compared.

use transship_checkpoint::annotations::Annotations;
use transship_checkpoint::manifest::{Container, Manifest, check_name};
use transship_checkpoint::spec::Spec;
use transship_checkpoint::store::{Store, StoreError};
use transship_path_error::one_line;

use super::environment::machine;
use super::node_config::{ClosedOption, NodeConfig};
use super::service_account;

/// Why a checkpoint is not for who asks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotForAsker {
    /// Of another Kubernetes namespace, of nobody, or not readable: who asks does not hear which.
    #[error(
        "there is no checkpoint {checkpoint:?} on this node, or a pod of the Kubernetes namespace {asker:?} may not \
         restore it"
    )]
    Namespace {
        /// Name of the checkpoint.
        checkpoint: String,
        /// Whose it is; none where there is none.
        owner: Option<String>,
        /// The namespace of the pod that asks for it.
        asker: String,
    },
    /// Of another service account, on a node that is strict.
    #[error(
        "the checkpoint {checkpoint:?} was taken from the service account {owner}, and the pod's is \
         {asker}: this node is strict, so it may not restore it"
    )]
    ServiceAccount {
        /// Name of the checkpoint.
        checkpoint: String,
        /// Whose it is.
        owner: String,
        /// Who asks for it.
        asker: String,
    },
    /// An option that is not the pod's to choose.
    #[error(transparent)]
    Closed(#[from] ClosedOption),
    /// Taken on another kind of machine.
    #[error(
        "the checkpoint {checkpoint:?} was taken on {found} and cannot be restored on {here}: memory \
         holds machine code"
    )]
    Architecture {
        /// Name of the checkpoint.
        checkpoint: String,
        /// Machine that it was taken on.
        found: String,
        /// Machine of this node.
        here: String,
    },
    /// What others keep would be taken away.
    #[error(
        "the checkpoint {checkpoint:?} belongs to {owner}: pods of the namespace {asker:?} may restore it, but not take \
         it away (leave out dev.transship/once)"
    )]
    Once {
        /// Name of the checkpoint.
        checkpoint: String,
        /// Whose it is.
        owner: String,
        /// Kubernetes namespace of the asker.
        asker: String,
    },
    /// The new container lacks a mount.
    #[error(
        "the container {container:?} of the checkpoint {checkpoint:?} has something mounted on \
         {destination}, and the new one does not"
    )]
    Mount {
        /// Name of the checkpoint.
        checkpoint: String,
        /// The container in it.
        container: String,
        /// The mount point.
        destination: String,
    },
}

impl NotForAsker {
    /// Whether the asker may not have it; else it does not fit, or is as good as not there, and a cold start is no harm.
    #[must_use]
    pub fn is_forbidden(&self) -> bool {
        !matches!(
            self,
            Self::Namespace { .. } | Self::Architecture { .. } | Self::Mount { .. }
        )
    }

    /// What the node's own log says beside the reason.
    #[must_use]
    pub fn for_the_node(&self) -> Option<String> {
        match self {
            Self::Namespace { owner, .. } => {
                let owner = owner.as_ref();
                let of = |owner: &String| format!("it is of {owner}");
                Some(owner.map_or("there is none".to_owned(), of))
            }
            _ => None,
        }
    }
}

/// Who asks for a restore.
#[derive(Debug, Clone, Copy)]
pub struct Asker<'a> {
    /// The rules of this node.
    pub rules: &'a NodeConfig,
    /// What the container, or the sandbox of its pod, says.
    pub annotations: &'a Annotations,
}

impl Asker<'_> {
    /// Checks that the asker may restore this checkpoint, on this machine.
    ///
    /// # Errors
    /// The first reason why not.
    pub fn admit(&self, manifest: &Manifest) -> Result<(), NotForAsker> {
        if let Some(namespace) = self.namespace() {
            self.check_namespace(manifest, namespace)?;
            self.rules.check_rootfs(self.annotations.rootfs)?;
            for container in &manifest.containers {
                let options = self.annotations.criu.over(container.criu.clone());
                self.rules.check_options(&options)?;
            }
        }
        check_architecture(manifest, machine())
    }

    /// As [`Self::admit`], for the container that one of the checkpoint goes into; `old` is the spec that
    /// it was dumped with, `new` that of the container.
    ///
    /// # Errors
    /// The first reason why not.
    pub fn admit_container(
        &self,
        manifest: &Manifest,
        container: &Container,
        old: &Spec,
        new: &Spec,
    ) -> Result<(), NotForAsker> {
        self.admit(manifest)?;
        let Some(namespace) = self.namespace() else {
            return Ok(());
        };
        if self.rules.strict {
            let account = service_account::of_spec(new, namespace);
            self.check_service_account(manifest, namespace, account.as_deref())?;
        }
        check_mounts(manifest, &container.name, old, new)
    }

    /// What a pod is told of a checkpoint that is not there, or that cannot be read and is not known to be its own: the same
    /// as of one that is another's. Outside of the CRI nobody is kept from knowing it, nor from what is wrong with the name
    /// that somebody has chosen.
    #[must_use]
    pub fn not_found(
        &self,
        store: &Store,
        checkpoint: &str,
        error: &StoreError,
    ) -> Option<NotForAsker> {
        let asker = self.namespace()?;
        let owner = match error {
            StoreError::NotFound { .. } => None,
            StoreError::Manifest { .. } | StoreError::Io(_)
                if check_name("the checkpoint's name", checkpoint).is_ok()
                    && (asker.is_empty()
                        || store.namespace_of(checkpoint).as_deref() != Some(asker)) =>
            {
                Some(format!("nobody who is known: {}", one_line(error)))
            }
            _ => return None,
        };
        Some(NotForAsker::Namespace {
            checkpoint: checkpoint.to_owned(),
            owner,
            asker: asker.to_owned(),
        })
    }

    fn namespace(&self) -> Option<&str> {
        self.annotations.kubernetes_namespace.as_deref()
    }

    fn check_namespace(&self, manifest: &Manifest, asker: &str) -> Result<(), NotForAsker> {
        let owner = owner(manifest);
        // A namespace that is not known is nobody's.
        if owner == Some(asker) && !asker.is_empty() {
            return Ok(());
        }
        let named = |owner| format!("the Kubernetes namespace {owner:?}");
        let (checkpoint, asker) = (manifest.name.clone(), asker.to_owned());
        let owner = owner.map_or("no pod".to_owned(), named);
        match self.is_exception(manifest, &asker) {
            true if self.annotations.once => Err(NotForAsker::Once {
                checkpoint,
                owner,
                asker,
            }),
            true => Ok(()),
            false => Err(NotForAsker::Namespace {
                checkpoint,
                owner: Some(owner),
                asker,
            }),
        }
    }

    fn check_service_account(
        &self,
        manifest: &Manifest,
        asker: &str,
        account: Option<&str>,
    ) -> Result<(), NotForAsker> {
        let pod = manifest.pod.as_ref();
        let taken_from = pod.and_then(|pod| pod.service_account.as_deref());
        if self.is_exception(manifest, asker) || account.is_some() && account == taken_from {
            return Ok(());
        }
        let named = |account: Option<&str>| {
            account.map_or("one that is not known".to_owned(), |it| format!("{it:?}"))
        };
        Err(NotForAsker::ServiceAccount {
            checkpoint: manifest.name.clone(),
            owner: named(taken_from),
            asker: named(account),
        })
    }

    fn is_exception(&self, manifest: &Manifest, asker: &str) -> bool {
        let owner = owner(manifest);
        let owners = self.rules.may_restore.get(asker).into_iter().flatten();
        owners
            .map(String::as_str)
            .any(|allowed| allowed == "*" || !allowed.is_empty() && Some(allowed) == owner)
    }
}

fn owner(manifest: &Manifest) -> Option<&str> {
    manifest.pod.as_ref().map(|pod| pod.namespace.as_str())
}

fn check_architecture(manifest: &Manifest, here: String) -> Result<(), NotForAsker> {
    let found = &manifest.source.architecture;
    if *found == here {
        return Ok(());
    }
    Err(NotForAsker::Architecture {
        checkpoint: manifest.name.clone(),
        found: found.clone(),
        here,
    })
}

/// CRIU takes what is mounted on a bind mount's destination now for what was mounted there then.
fn check_mounts(
    manifest: &Manifest,
    container: &str,
    old: &Spec,
    new: &Spec,
) -> Result<(), NotForAsker> {
    let there = new.mount_destinations();
    let mut needed = old.bind_mounts().into_iter();
    let missing = needed.find(|(destination, _)| !there.contains(destination));
    missing.map_or(Ok(()), |(destination, _)| {
        Err(NotForAsker::Mount {
            checkpoint: manifest.name.clone(),
            container: container.to_owned(),
            destination: destination.display().to_string(),
        })
    })
}

#[cfg(test)]
mod tests {
    use transship_checkpoint::manifest::Pod;

    use super::*;

    fn taken(account: Option<&str>) -> Manifest {
        let mut manifest: Manifest = serde_json::from_str(
            r#"{"format":{"version":1},"name":"web","created":1,"source":
               {"hostname":"a","architecture":"x86_64","kernel":"6","containerd":"2"},
               "containers":[]}"#,
        )
        .unwrap();
        manifest.pod = Some(Pod {
            namespace: "shop".into(),
            service_account: account.map(ToOwned::to_owned),
            ..Pod::default()
        });
        manifest
    }

    fn asks<T>(rules: &NodeConfig, ask: impl FnOnce(Asker<'_>) -> T) -> T {
        let annotations = Annotations::read("web", None).unwrap();
        ask(Asker {
            rules,
            annotations: &annotations,
        })
    }

    #[test]
    fn a_pod_restores_what_its_own_namespace_has_taken() {
        asks(&NodeConfig::default(), |asker| {
            assert!(asker.check_namespace(&taken(None), "shop").is_ok());
            let error = asker.check_namespace(&taken(None), "bank").unwrap_err();
            let said = "there is no checkpoint \"web\" on this node, or a pod of the Kubernetes namespace \"bank\" \
                        may not restore it";
            assert_eq!(error.to_string(), said);
            assert!(!error.is_forbidden());
            let of_node = error.for_the_node().unwrap();
            assert_eq!(of_node, "it is of the Kubernetes namespace \"shop\"");
            let mut other = taken(None);
            other.pod = Some(Pod::default());
            assert!(asker.check_namespace(&other, "").is_err(), "nobody's");
            other.pod = None;
            assert!(asker.check_namespace(&other, "shop").is_err(), "of no pod");
        });
    }

    #[test]
    fn a_pod_does_not_hear_which_checkpoints_of_others_there_are() {
        let annotations = Annotations {
            kubernetes_namespace: Some("bank".to_owned()),
            ..Annotations::read("web", None).unwrap()
        };
        let rules = &NodeConfig::default();
        let asker = Asker {
            rules,
            annotations: &annotations,
        };
        let not_own = asker.admit(&taken(None)).unwrap_err();
        let absent = StoreError::NotFound {
            name: "web".to_owned(),
            root: "/checkpoints".into(),
        };
        let unusable = |name: &str| StoreError::Manifest {
            name: name.to_owned(),
            source: check_name("its name", "..").unwrap_err(),
        };
        let dir = tempfile::tempdir().unwrap();
        let store = &Store::at(dir.path());
        for error in [absent, unusable("web")] {
            let not_found = asker.not_found(store, "web", &error).unwrap();
            assert_eq!(not_own.to_string(), not_found.to_string());
            assert_eq!(not_own.is_forbidden(), not_found.is_forbidden());
            assert_ne!(not_own.for_the_node(), not_found.for_the_node());
            asks(rules, |of_root| {
                assert!(of_root.not_found(store, "web", &error).is_none());
            });
        }
        let of_unusable = asker.not_found(store, "web", &unusable("web")).unwrap();
        let told = of_unusable.for_the_node().unwrap();
        assert!(told.contains("cannot be used"), "{told}");
        assert!(asker.not_found(store, "..", &unusable("..")).is_none());
        // Its own one is told of.
        for (namespace, is_told) in [("bank", true), ("shop", false)] {
            std::fs::create_dir_all(dir.path().join("web")).unwrap();
            let manifest = format!(r#"{{"pod":{{"namespace":"{namespace}"}},"containers":7}}"#);
            std::fs::write(dir.path().join("web/transship.json"), manifest).unwrap();
            let not_found = asker.not_found(store, "web", &unusable("web"));
            assert_eq!(not_found.is_none(), is_told, "{namespace}");
        }
    }

    #[test]
    fn exceptions_name_who_may_restore_whose() {
        let rules = toml::from_str("[may_restore]\nstaging = [\"shop\"]\nops = [\"*\"]\n").unwrap();
        asks(&rules, |asker| {
            let allowed = |name| asker.check_namespace(&taken(None), name).is_ok();
            assert!(allowed("shop") && allowed("staging") && allowed("ops"));
            assert!(!allowed("bank"));
            let of_no_pod = Manifest {
                pod: None,
                ..taken(None)
            };
            assert!(asker.check_namespace(&of_no_pod, "ops").is_ok());
            assert!(asker.check_namespace(&of_no_pod, "staging").is_err());
        });
        let taken_away = Annotations {
            once: true,
            ..Annotations::read("web", None).unwrap()
        };
        let asker = Asker {
            rules: &rules,
            annotations: &taken_away,
        };
        let error = asker.check_namespace(&taken(None), "staging").unwrap_err();
        assert!(error.is_forbidden() && error.to_string().contains("dev.transship/once"));
        assert!(asker.check_namespace(&taken(None), "shop").is_ok());
    }

    #[test]
    fn the_same_service_account_is_known_on_both_sides() {
        asks(&NodeConfig::default(), |asker| {
            let check = |taken_from, account| {
                asker.check_service_account(&taken(taken_from), "shop", account)
            };
            assert!(check(Some("cart"), Some("cart")).is_ok());
            for (taken_from, account) in [
                (Some("cart"), Some("till")),
                (None, None),
                (Some("cart"), None),
                (None, Some("cart")),
            ] {
                let error = check(taken_from, account).unwrap_err().to_string();
                assert!(error.contains("service account"), "{error}");
            }
        });
    }

    #[test]
    fn machine_and_mounts_must_fit() {
        let here = |machine: &str| check_architecture(&taken(None), machine.to_owned());
        assert!(here("x86_64").is_ok());
        let error = here("aarch64").unwrap_err();
        assert!(!error.is_forbidden());
        let said = error.to_string();
        assert!(
            said.contains("aarch64") && said.contains("x86_64"),
            "{said}"
        );
        let spec = |json: &str| Spec::parse(json.as_bytes()).unwrap();
        let old = spec(
            r#"{"mounts":[{"destination":"/proc","type":"proc","source":"proc"},
                {"destination":"/cache","type":"bind","source":"/a","options":["rbind"]}]}"#,
        );
        let new = spec(r#"{"mounts":[{"destination":"/cache","type":"tmpfs"}]}"#);
        let check = |new: &Spec| check_mounts(&taken(None), "counter", &old, new);
        assert!(check(&new).is_ok());
        let said = check(&spec("{}")).unwrap_err().to_string();
        assert!(said.contains("/cache"), "{said}");
    }
}
