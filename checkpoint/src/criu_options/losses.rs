//! What a container may lose: conditions that CRIU restores it without.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::OptionError;
use crate::conditions::Condition;

/// Network interfaces that CNI has not made: a loss of a migration alone.
pub const NETWORK: &str = "network";

/// Names of what may be lost.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Losses(BTreeSet<String>);

impl Losses {
    /// Whether nothing may be.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this may be.
    #[must_use]
    pub fn contain(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

impl FromStr for Losses {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let known = |name: &str| name == NETWORK || Condition::losses().any(|it| it == name);
        let names: BTreeSet<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
        match names.iter().all(|name| known(name)) {
            true => Ok(Self(names)),
            false => Err(OptionError {
                allowed: "network, and the names in docs/conditions.md whose effect is lost or changed, such as exec",
            }),
        }
    }
}

impl fmt::Display for Losses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.0.iter().map(String::as_str).collect();
        f.write_str(&names.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_lost_may_be_lost() {
        let losses: Losses = "personality, exec,network".parse().unwrap();
        assert!(
            losses.contain("exec") && losses.contain("network") && !losses.contain("multicast")
        );
        assert_eq!(losses.to_string(), "exec,network,personality");
        for nonsense in ["", "tcp", "exec,", "Exec"] {
            assert!(nonsense.parse::<Losses>().is_err(), "{nonsense:?}");
        }
        assert_eq!(
            serde_json::to_string(&losses).unwrap(),
            r#"["exec","network","personality"]"#
        );
    }
}
