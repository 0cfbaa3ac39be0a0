//! References of a registry: `HOST[:PORT]/NAME:TAG` or `HOST[:PORT]/NAME@sha256:DIGEST`.

use std::fmt;
use std::str::FromStr;

use super::digests::check_digest;
use crate::registry_error::RegistryError;

/// A reference. The host is always named: nothing goes to a registry that nobody meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Host, perhaps with a port.
    pub host: String,
    /// Name of the repository.
    pub name: String,
    /// Tag, or digest with its algorithm.
    pub tag: String,
}

/// Whether a repository can have this name.
pub(super) fn is_repository(name: &str) -> bool {
    let is_component = |it: &str| {
        let is_letter = |byte: u8| is_word(byte) && !byte.is_ascii_uppercase();
        !it.is_empty() && !it.starts_with('.') && it.bytes().all(is_letter)
    };
    name.split('/').all(is_component)
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._-".contains(&byte)
}

impl Reference {
    /// Whether it names content, not a tag that may move.
    #[must_use]
    pub fn is_digest(&self) -> bool {
        self.tag.starts_with("sha256:")
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = if self.is_digest() { '@' } else { ':' };
        write!(f, "{}/{}{separator}{}", self.host, self.name, self.tag)
    }
}

impl FromStr for Reference {
    type Err = RegistryError;

    fn from_str(text: &str) -> Result<Self, RegistryError> {
        let parse = || {
            let (host, rest) = text.split_once('/')?;
            let (name, tag) = match rest.split_once('@') {
                Some((name, digest)) => {
                    check_digest(digest).ok()?;
                    (name.split(':').next()?, digest)
                }
                None => rest.split_once(':')?,
            };
            let is_host =
                |it: &str| !it.is_empty() && it.bytes().all(|b| is_word(b) || b":[]".contains(&b));
            let is_tag = tag.starts_with("sha256:")
                || !tag.is_empty()
                    && tag.len() <= 128
                    && !tag.starts_with(['.', '-'])
                    && tag.bytes().all(is_word);
            let fits = is_host(host) && is_repository(name) && is_tag;
            fits.then(|| Self {
                host: host.to_owned(),
                name: name.to_owned(),
                tag: tag.to_owned(),
            })
        };
        parse().ok_or_else(|| RegistryError::Reference {
            text: text.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_whole_or_none() {
        let digest = format!("sha256:{}", "0".repeat(64));
        for (text, tag) in [
            ("127.0.0.1:5000/shop/web:monday".to_owned(), "monday"),
            (format!("registry.example/web@{digest}"), digest.as_str()),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!((reference.tag.as_str(), reference.to_string()), (tag, text));
        }
        for text in [
            "web",
            "web:1",
            "host/web",
            "host/../web:1",
            "host/Web:1",
            "host/web@sha256:12",
            "host/web:1?x=y",
            "/web:1",
            "host/web:a b",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
    }
}
