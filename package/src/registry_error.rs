//! Why a registry does not do what it is asked for.

/// A failure of a registry.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// A reference that none is.
    #[error("{text:?} is no reference: HOST/NAME:TAG or HOST/NAME@sha256:DIGEST")]
    Reference {
        /// What was given.
        text: String,
    },
    /// It has no such thing.
    #[error("{registry} has no {what}")]
    NotFound {
        /// The registry.
        registry: String,
        /// What was asked for.
        what: String,
    },
    /// It wants to know who asks, or that is not enough.
    #[error("{registry} refuses to {act}: {reason}")]
    Refused {
        /// The registry.
        registry: String,
        /// The act.
        act: String,
        /// Its words.
        reason: String,
    },
    /// It cannot be reached, or fails, however often it is asked.
    #[error("{registry} cannot {act}: {reason}")]
    Failed {
        /// The registry.
        registry: String,
        /// The act.
        act: String,
        /// Why.
        reason: String,
    },
    /// It cannot be talked to, and another attempt would not change that.
    #[error("{registry} cannot {act}: {reason}")]
    Unusable {
        /// The registry.
        registry: String,
        /// The act.
        act: String,
        /// Why.
        reason: String,
    },
    /// The credentials of the configuration cannot be used.
    #[error("the credentials for {registry} cannot be had: {reason}")]
    Credentials {
        /// The registry.
        registry: String,
        /// Why.
        reason: String,
    },
}
