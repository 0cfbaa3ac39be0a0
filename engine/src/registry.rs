//! Registries, as this node reaches them.

use std::path::Path;

use transship_package::oci::{Credentials, Reference, Registry, Transport};

use crate::error::{Context as _, Result};

/// How a registry is reached.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reached<'a> {
    /// Without TLS.
    pub plain_http: bool,
    /// Whoever it says it is.
    pub skip_verify: bool,
    /// File of the authorities that sign for it, in PEM; none: those that browsers know.
    pub authorities: Option<&'a Path>,
    /// Directory of Docker's `config.json`, which has the credentials.
    pub docker_config: Option<&'a Path>,
}

/// The registry of `reference`, with the credentials that Docker has for it.
///
/// # Errors
/// The credentials or the authorities cannot be read.
pub fn connect(reference: &Reference, reached: &Reached<'_>) -> Result<Registry> {
    let credentials = match reached.docker_config {
        Some(dir) => Credentials::of(&dir.join("config.json"), &reference.host)?,
        None => None,
    };
    let read = |path: &Path| {
        std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let authorities = reached.authorities.map(read).transpose()?;
    let transport = Transport {
        plain_http: reached.plain_http,
        skip_verify: reached.skip_verify,
        ..Transport::default()
    };
    let authorities = authorities.as_deref();
    Ok(Registry::new(
        reference.clone(),
        transport,
        authorities,
        credentials,
    )?)
}
