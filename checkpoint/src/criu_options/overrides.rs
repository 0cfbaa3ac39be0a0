//! Choices about CRIU's options that somebody has made: by annotation or by flag. Their names and
//! values are those of the [table](super::table).

use std::collections::BTreeMap;

use super::CriuOptions;
use super::table::{CriuOption, OPTIONS};
use super::values::OptionError;

/// Choices about the options of one container; what is not chosen is as it was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CriuOverrides(BTreeMap<&'static str, String>);

impl CriuOverrides {
    /// The names under which the choices are made.
    pub fn names() -> impl Iterator<Item = &'static str> {
        OPTIONS.iter().map(|option| option.name)
    }

    /// Makes the choice `name`.
    ///
    /// # Errors
    /// A value that means nothing, or no such choice.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), OptionError> {
        let option = CriuOption::named(name).ok_or(OptionError {
            allowed: "one of the options that docs/design.md lists",
        })?;
        (option.set)(&mut CriuOptions::default(), value)?;
        self.0.insert(option.name, value.to_owned());
        Ok(())
    }

    /// The choices that were made: names and values.
    pub fn chosen(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(name, value)| (*name, value.as_str()))
    }

    /// The options with these choices.
    #[must_use]
    pub fn over(&self, mut options: CriuOptions) -> CriuOptions {
        for (name, value) in &self.0 {
            let option = CriuOption::named(name).expect("it was found by set");
            (option.set)(&mut options, value).expect("it was tried by set");
        }
        options
    }
}

impl CriuOptions {
    /// The (name, value) pairs that differ from the defaults or from the options of a dump; setting
    /// them makes these options again.
    #[must_use]
    pub fn choices(&self, taken_with: &Self) -> Vec<(&'static str, String)> {
        let default = Self::default();
        let chosen = |option: &CriuOption| {
            let get = option.get;
            let value = get(self)?;
            let is_other = |than: &Self| get(than).as_ref() != Some(&value);
            (is_other(&default) || is_other(taken_with)).then_some((option.name, value))
        };
        OPTIONS.iter().filter_map(chosen).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CgroupsMode, Tcp};
    use super::*;

    #[test]
    fn every_name_can_be_set_and_none_takes_nonsense() {
        let mut all = CriuOverrides::default();
        for option in &OPTIONS {
            let good = match option.values {
                "SIZE" => "16M",
                "TYPE:NAME" => "selinux:x:y",
                "CONTEXT" => "system_u:object_r:x",
                "NAME" => "exec",
                // The other one.
                values if (option.get)(&CriuOptions::default()).as_deref() == Some("true") => {
                    values.rsplit('|').next().unwrap()
                }
                values => values.split('|').next().unwrap(),
            };
            all.set(option.name, good).unwrap();
            let error = all.set(option.name, "may be").unwrap_err().to_string();
            assert!(error.starts_with("it can be "), "{}: {error}", option.name);
        }
        let options = all.over(CriuOptions::default());
        assert_eq!(options.ghost_limit, Some(16 << 20));
        assert!(!options.file_locks && options.skip_in_flight && options.shell_job);
        assert!(options.lazy_pages);
        assert_eq!(options.lsm_profile.as_deref(), Some("selinux:x:y"));
        assert_eq!(CriuOverrides::default().over(options.clone()), options);
        assert!(all.set("tpc", "close").is_err());
    }

    #[test]
    fn choices_make_the_options_again() {
        let taken_with = CriuOptions {
            tcp: Tcp::Close,
            ..CriuOptions::default()
        };
        let now = CriuOptions {
            file_locks: false,
            ghost_limit: Some(7),
            manage_cgroups_mode: Some(CgroupsMode::Full),
            ..CriuOptions::default()
        };
        let mut chosen = CriuOverrides::default();
        for (name, value) in now.choices(&taken_with) {
            chosen.set(name, &value).unwrap();
        }
        assert_eq!(chosen.over(taken_with.clone()), now);
        assert!(
            CriuOptions::default()
                .choices(&CriuOptions::default())
                .is_empty()
        );
    }
}
