//! The service account of a pod, as far as a runtime can know it.
//!
//! kubelet passes it to the CRI in no field, label or annotation. What reaches the node is the token
//! that it mounts into the containers:
//!
//! ```text
//! spec: mounts[destination = /var/run/secrets/kubernetes.io/serviceaccount].source / token
//! token: HEADER.PAYLOAD.SIGNATURE, base64url; PAYLOAD = {"sub": "system:serviceaccount:NS:NAME"}
//! ```
//!
//! The signature is not verified (its key is the API server's), so only a projected volume of kubelet's
//! counts: a process of the pod cannot write to it. Its author can still project a token that he has
//! made into it: where he may not choose the pod's service account, `strict` is no barrier to him. A pod
//! that mounts no such volume has no service account that is known here.

use std::path::Path;

use data_encoding::BASE64URL_NOPAD;
use serde::Deserialize;

use transship_checkpoint::beneath::{Links, read_regular};
use transship_checkpoint::spec::Spec;

const TOKEN_MOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Where kubelet has the volumes of that kind, below the pod's directory.
const PROJECTED_VOLUMES: &str = "kubernetes.io~projected";
const SUBJECT_PREFIX: &str = "system:serviceaccount:";
/// Longest token that is read, in bytes.
const TOKEN_LIMIT: u64 = 64 << 10;

/// The service account (`NAME`) of the container's pod, which is in the Kubernetes namespace
/// `namespace`; `None` when it cannot be known.
#[must_use]
pub fn of_spec(spec: &Spec, namespace: &str) -> Option<String> {
    let mounts = spec.bind_mounts();
    let (_, source) = mounts
        .iter()
        .find(|(destination, _)| destination == Path::new(TOKEN_MOUNT))?;
    if source.parent()?.file_name()? != PROJECTED_VOLUMES {
        return None;
    }
    // kubelet's volumes have links within themselves.
    let token = read_regular(source, Path::new("token"), Links::Within, TOKEN_LIMIT).ok()?;
    of_token(std::str::from_utf8(&token).ok()?.trim(), namespace)
}

fn of_token(token: &str, namespace: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Claims {
        sub: String,
    }
    let payload = token.split('.').nth(1)?.as_bytes();
    let payload = BASE64URL_NOPAD.decode(payload).ok()?;
    let claims: Claims = serde_json::from_slice(&payload).ok()?;
    let (of, name) = claims.sub.strip_prefix(SUBJECT_PREFIX)?.split_once(':')?;
    (of == namespace && !name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// {"alg":"RS256"} . {"sub":"system:serviceaccount:shop:cart"} . nothing that is looked at
    const TOKEN: &str =
        "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQ6c2hvcDpjYXJ0In0.x";

    #[test]
    fn a_token_names_the_account_of_its_own_namespace() {
        assert_eq!(of_token(TOKEN, "shop").as_deref(), Some("cart"));
        assert_eq!(of_token(TOKEN, "bank"), None);
        for nonsense in ["", "a.b", "a.e30.c", "x", "a.!!.c"] {
            assert_eq!(of_token(nonsense, "shop"), None, "{nonsense}");
        }
    }

    #[test]
    fn the_token_is_found_by_its_mount() {
        let dir = tempfile::tempdir().unwrap();
        let spec = |destination: &str, source: &Path| {
            let json = serde_json::json!({ "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": destination, "source": source, "options": ["rbind", "ro"] },
            ]});
            Spec::parse(json.to_string().as_bytes()).unwrap()
        };
        let volume = dir.path().join("volumes/kubernetes.io~projected/token");
        let data = volume.join("..2026");
        std::fs::create_dir_all(&data).unwrap();
        assert_eq!(
            of_spec(&spec(TOKEN_MOUNT, &volume), "shop"),
            None,
            "no file yet"
        );
        std::fs::write(data.join("token"), format!("{TOKEN}\n")).unwrap();
        std::os::unix::fs::symlink("..2026", volume.join("..data")).unwrap();
        std::os::unix::fs::symlink("..data/token", volume.join("token")).unwrap();
        let account = |destination, source: &Path| of_spec(&spec(destination, source), "shop");
        assert_eq!(account(TOKEN_MOUNT, &volume).as_deref(), Some("cart"));
        assert_eq!(account("/elsewhere", &volume), None);

        // The pod's own files, which it may have made to look so.
        let own = dir.path().join("volumes/kubernetes.io~empty-dir/token");
        std::fs::create_dir_all(&own).unwrap();
        std::fs::write(own.join("token"), TOKEN).unwrap();
        assert_eq!(account(TOKEN_MOUNT, &own), None);
        // A FIFO does not block whoever looks.
        std::fs::remove_file(volume.join("token")).unwrap();
        nix::unistd::mkfifo(&volume.join("token"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(account(TOKEN_MOUNT, &volume), None);
    }
}
