//! A line of a CRIU configuration file.
//!
//! ```text
//! option
//! option value        blanks end a value, and a newline begins another option
//! option=value        the form of options whose value may be left out
//! ```
//!
//! CRIU runs as root and executes what its configuration names, so a line is made here alone, of an
//! option's name and a value that cannot become another option.

use std::fmt;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigLine(String);

/// A value that would not end where it ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{value:?} cannot be the value of CRIU's option {option}: it has a blank, a quote or the like"
)]
pub struct ConfigLineError {
    option: &'static str,
    value: String,
}

impl ConfigLine {
    /// An option without a value.
    #[must_use]
    pub fn switch(option: &'static str) -> Self {
        Self(option.to_owned())
    }

    /// An option and its value.
    ///
    /// # Errors
    /// A value with a blank, a control character, a quote or a `#`, or none.
    pub fn with(option: &'static str, value: &str) -> Result<Self, ConfigLineError> {
        Ok(Self(format!("{option} {}", checked(option, value)?)))
    }

    /// An option whose value may be left out, and its value.
    ///
    /// # Errors
    /// See [`Self::with`].
    pub fn with_optional(option: &'static str, value: &str) -> Result<Self, ConfigLineError> {
        Ok(Self(format!("{option}={}", checked(option, value)?)))
    }

    /// The lines of a file.
    #[must_use]
    pub fn to_text(lines: &[Self]) -> String {
        lines.iter().map(|line| format!("{line}\n")).collect()
    }
}

fn checked<'a>(option: &'static str, value: &'a str) -> Result<&'a str, ConfigLineError> {
    let ends = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '"' | '\'' | '#');
    if value.is_empty() || value.contains(ends) {
        return Err(ConfigLineError {
            option,
            value: value.to_owned(),
        });
    }
    Ok(value)
}

impl fmt::Display for ConfigLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_cannot_become_another_option() {
        let line = ConfigLine::with("cgroup-root", r"/a/system-x\x2dy.slice").unwrap();
        assert_eq!(line.to_string(), r"cgroup-root /a/system-x\x2dy.slice");
        let line = ConfigLine::with_optional("manage-cgroups", "soft").unwrap();
        assert_eq!(line.to_string(), "manage-cgroups=soft");
        for value in [
            "",
            "/a b",
            "/a\naction-script /x",
            "/a\taction",
            "/a#",
            "\"/a",
            "/a\u{85}",
        ] {
            let error = ConfigLine::with("cgroup-root", value).unwrap_err();
            assert!(!error.to_string().contains('\n'), "{error}");
        }
    }
}
