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
//! The signature is not verified (its key is the API server's): who can put another volume there can
//! as well make the pod run under another service account of its namespace. A pod that mounts no
//! token has no service account that is known here.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use data_encoding::BASE64URL_NOPAD;
use serde::Deserialize;

use transship_checkpoint::spec::Spec;

const TOKEN_MOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
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
    let mut token = String::new();
    let file = File::open(source.join("token")).ok()?;
    file.take(TOKEN_LIMIT).read_to_string(&mut token).ok()?;
    of_token(token.trim(), namespace)
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
        let spec = |destination: &str| {
            let json = serde_json::json!({ "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": destination, "source": dir.path(), "options": ["rbind", "ro"] },
            ]});
            Spec::parse(json.to_string().as_bytes()).unwrap()
        };
        assert_eq!(of_spec(&spec(TOKEN_MOUNT), "shop"), None, "no file yet");
        std::fs::write(dir.path().join("token"), format!("{TOKEN}\n")).unwrap();
        assert_eq!(of_spec(&spec(TOKEN_MOUNT), "shop").as_deref(), Some("cart"));
        assert_eq!(of_spec(&spec("/elsewhere"), "shop"), None);
    }
}
