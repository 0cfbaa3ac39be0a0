//! Credentials as Docker keeps them: `config.json`, and the helper programs that it names.
//!
//! ```text
//! { "auths":       { "HOST": { "auth": base64("USER:SECRET") } },
//!   "credHelpers": { "HOST": "pass" },          docker-credential-pass get  <HOST  >{"Username", "Secret"}
//!   "credsStore":  "pass" }
//! ```

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use data_encoding::BASE64;
use serde::Deserialize;

use super::registry::RegistryError;

/// Who asks a registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub(crate) user: String,
    pub(crate) secret: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({})", self.user)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Config {
    auths: BTreeMap<String, Auth>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Helped {
    username: String,
    secret: String,
}

impl Credentials {
    /// Those for `host` in Docker's configuration at `config`; none where it says nothing.
    ///
    /// # Errors
    /// The file cannot be parsed, or its helper fails.
    pub fn of(config: &Path, host: &str) -> Result<Option<Self>, RegistryError> {
        let failed = |reason: String| RegistryError::Credentials {
            registry: host.to_owned(),
            reason,
        };
        let text = match std::fs::read_to_string(config) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|error| failed(format!("{}: {error}", config.display())))?,
        };
        let parsed: Config = serde_json::from_str(&text)
            .map_err(|error| failed(format!("{}: {error}", config.display())))?;
        let host = docker_s_name(host);
        let helper = parsed.cred_helpers.get(host).unwrap_or(&parsed.creds_store);
        if !helper.is_empty() {
            return ask_helper(helper, host).map_err(failed);
        }
        let names = [
            host.to_owned(),
            format!("https://{host}"),
            format!("http://{host}"),
        ];
        let auth = names.iter().find_map(|name| parsed.auths.get(name));
        let Some(auth) = auth.filter(|it| !it.auth.is_empty()) else {
            return Ok(None);
        };
        let decoded = BASE64.decode(auth.auth.as_bytes()).ok();
        let decoded = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = decoded.as_deref().and_then(|text| text.split_once(':'));
        let (user, secret) =
            pair.ok_or_else(|| failed("\"auth\" is not USER:SECRET".to_owned()))?;
        Ok(Some(Self {
            user: user.to_owned(),
            secret: secret.to_owned(),
        }))
    }
}

/// Docker Hub has another name in Docker's configuration, which it had before there were others.
fn docker_s_name(host: &str) -> &str {
    match host {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => "https://index.docker.io/v1/",
        host => host,
    }
}

fn ask_helper(helper: &str, host: &str) -> Result<Option<Credentials>, String> {
    if !helper
        .bytes()
        .all(|it| it.is_ascii_alphanumeric() || b"-_.".contains(&it))
    {
        return Err(format!("{helper:?} is no name of a helper"));
    }
    let program = format!("docker-credential-{helper}");
    let run = || {
        let mut child = Command::new(&program)
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            match stdin.write_all(host.as_bytes()) {
                // What it says of its end is more than that it has not read.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                written => written?,
            }
        }
        child.wait_with_output()
    };
    let output = run().map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        return match said.contains("credentials not found") {
            true => Ok(None),
            false => Err(format!("{program} fails: {}", said.trim().escape_debug())),
        };
    }
    let helped: Helped =
        serde_json::from_str(&said).map_err(|error| format!("{program}: {error}"))?;
    Ok(Some(Credentials {
        user: helped.username,
        secret: helped.secret,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_decides() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        assert_eq!(Credentials::of(&path, "a").unwrap(), None);
        std::fs::write(
            &path,
            r#"{"auths": {"a:5000": {"auth": "bWU6czpjcmV0"}, "b": {}}}"#,
        )
        .unwrap();
        let found = Credentials::of(&path, "a:5000").unwrap().unwrap();
        assert_eq!(
            (found.user.as_str(), found.secret.as_str()),
            ("me", "s:cret")
        );
        assert!(!format!("{found:?}").contains("cret"));
        assert_eq!(Credentials::of(&path, "b").unwrap(), None);
        std::fs::write(
            &path,
            r#"{"auths": {"https://index.docker.io/v1/": {"auth": "bWU6czpjcmV0"}}}"#,
        )
        .unwrap();
        let found = Credentials::of(&path, "registry-1.docker.io").unwrap();
        assert_eq!(found.unwrap().user, "me");
        for text in [
            "no JSON",
            r#"{"auths": {"a": {"auth": "?"}}}"#,
            r#"{"credsStore": "../x"}"#,
        ] {
            std::fs::write(&path, text).unwrap();
            assert!(Credentials::of(&path, "a").is_err(), "{text}");
        }
    }
}
