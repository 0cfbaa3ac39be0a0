//! Credentials as Docker keeps them: `config.json`, and the helper programs that it names.
//!
//! ```text
//! { "auths":       { "HOST": { "auth": base64("USER:SECRET"), "identitytoken": "a token in place of the secret" },
//!                    "https://HOST/v1/": { "username": "USER", "password": "SECRET" } },
//!   "credHelpers": { "HOST": "pass" },          docker-credential-pass get  <HOST  >{"Username", "Secret"}: <token> has a token
//!   "credsStore":  "pass" }
//! ```

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use data_encoding::BASE64;
use serde::Deserialize;

use crate::registry_error::RegistryError;

/// How long a helper may take: it may ask somebody.
const HELPER_PATIENCE: Duration = Duration::from_secs(60);
/// Most bytes that are read of what it says.
const HELPER_LIMIT: u64 = 64 << 10;
/// What a helper calls the user of a token.
const OF_TOKEN: &str = "<token>";

/// Who asks a registry.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    pub(crate) user: String,
    pub(crate) secret: String,
    /// What the registry has given in place of the secret; empty: nothing.
    pub(crate) identity_token: String,
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
    username: String,
    password: String,
    identitytoken: String,
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
        let mut named = parsed.auths.iter();
        let auth = parsed.auths.get(host).or_else(|| {
            let same = named.find(|(name, _)| docker_s_name(host_of(name)) == host);
            same.map(|(_, auth)| auth)
        });
        let found = auth.map(Self::in_config).transpose().map_err(failed)?;
        Ok(found.filter(|it| *it != Self::default()))
    }

    fn in_config(auth: &Auth) -> Result<Self, String> {
        let (user, secret) = match auth.auth.as_str() {
            "" => (auth.username.clone(), auth.password.clone()),
            encoded => {
                let decoded = BASE64.decode(encoded.as_bytes()).ok();
                let decoded = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
                let pair = decoded.as_deref().and_then(|text| text.split_once(':'));
                let (user, secret) = pair.ok_or("\"auth\" is not USER:SECRET")?;
                (user.to_owned(), secret.trim_end_matches('\0').to_owned())
            }
        };
        Ok(Self {
            user,
            secret,
            identity_token: auth.identitytoken.clone(),
        })
    }

    /// Whether there is a secret to send.
    pub(crate) fn has_secret(&self) -> bool {
        !self.secret.is_empty() || self.identity_token.is_empty()
    }
}

/// The host of a name in Docker's configuration, which may have a scheme and a path.
fn host_of(name: &str) -> &str {
    let name = name.strip_prefix("https://").unwrap_or(name);
    let name = name.strip_prefix("http://").unwrap_or(name);
    name.split('/').next().unwrap_or_default()
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
    let helper = Helper::start(&program, host).map_err(|error| format!("{program}: {error}"))?;
    let (status, said, complaint) = helper
        .end(HELPER_PATIENCE)
        .map_err(|error| format!("{program}: {error}"))?;
    if !status.success() {
        let words = [said.trim(), complaint.trim()];
        let words = words
            .into_iter()
            .find(|it| !it.is_empty())
            .unwrap_or_default();
        let first = words.lines().next().unwrap_or_default();
        return match said.contains("credentials not found") {
            true => Ok(None),
            false => Err(format!("{program} fails: {}", first.escape_debug())),
        };
    }
    let helped: Helped =
        serde_json::from_str(&said).map_err(|error| format!("{program}: {error}"))?;
    Ok(Some(match helped.username == OF_TOKEN {
        true => Credentials {
            identity_token: helped.secret,
            ..Credentials::default()
        },
        false => Credentials {
            user: helped.username,
            secret: helped.secret,
            ..Credentials::default()
        },
    }))
}

/// A helper that runs; killed when it is dropped.
struct Helper {
    child: Child,
    said: Receiver<Vec<u8>>,
    complaint: Receiver<Vec<u8>>,
}

impl Helper {
    fn start(program: &str, host: &str) -> io::Result<Self> {
        let mut child = Command::new(program)
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let helper = Self {
            child,
            said: read_beside(stdout),
            complaint: read_beside(stderr),
        };
        if let Some(mut stdin) = stdin {
            match stdin.write_all(host.as_bytes()) {
                // What it says of its end is more than that it has not read.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                written => written?,
            }
        }
        Ok(helper)
    }

    /// Waits for its end; what it has said and complained of.
    fn end(mut self, patience: Duration) -> io::Result<(ExitStatus, String, String)> {
        let until = Instant::now() + patience;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > until {
                let reason = format!("it has not ended in {patience:?}");
                return Err(io::Error::new(ErrorKind::TimedOut, reason));
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        // A program that it has left behind may have its pipes.
        let read = |from: &Receiver<Vec<u8>>| {
            let left = until.saturating_duration_since(Instant::now());
            let bytes = from
                .recv_timeout(left.min(Duration::from_secs(5)))
                .unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Ok((status, read(&self.said), read(&self.complaint)))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

/// What comes through a pipe, read by a thread of its own, for what it is worth.
fn read_beside(pipe: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = sync_channel(1);
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            drop(pipe.take(HELPER_LIMIT).read_to_end(&mut bytes));
        }
        // Who has asked may have gone away.
        sender.send(bytes).unwrap_or_default();
    });
    receiver
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

    #[test]
    fn every_way_to_write_them_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let config = r#"{"auths": {
            "https://a/v1/": {"auth": "bWU6czpjcmV0"},
            "b": {"username": "me", "password": "s:cret"},
            "http://c:5000": {"auth": "MDA6", "identitytoken": "t"},
            "https://index.docker.io/v1/": {"auth": "bWU6czpjcmV0"}}}"#;
        std::fs::write(&path, config).unwrap();
        let of = |host: &str| Credentials::of(&path, host).unwrap().unwrap();
        for host in ["a", "b", "docker.io"] {
            let found = of(host);
            assert_eq!(
                (found.user.as_str(), found.secret.as_str()),
                ("me", "s:cret"),
                "{host}"
            );
            assert!(found.has_secret());
        }
        let found = of("c:5000");
        assert_eq!(found.identity_token, "t");
        assert!(!found.has_secret());
        assert!(!format!("{found:?}").contains("\"t\""));
    }

    #[test]
    fn helpers_have_an_end() {
        let dir = tempfile::tempdir().unwrap();
        let program = |text: &str| {
            let path = dir.path().join(format!("helper-{}", text.len()));
            std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
            std::fs::set_permissions(&path, mode).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let run = |text: &str, patience| Helper::start(&program(text), "a").unwrap().end(patience);
        let since = Instant::now();
        let error = run("exec sleep 100", Duration::from_millis(200)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        let (status, said, _) = run("exec yes", HELPER_PATIENCE).unwrap();
        assert!(!status.success() && said.len() as u64 == HELPER_LIMIT);
        let (status, _, complaint) = run("cat; echo broken >&2; exit 3", HELPER_PATIENCE).unwrap();
        assert!(!status.success() && complaint == "broken\n");
        assert!(since.elapsed() < Duration::from_secs(30));
    }
}
