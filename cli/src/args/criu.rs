//! CRIU's options on the command line, made of the table of options: each verb offers those that
//! mean something for it.

use std::marker::PhantomData;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, Error, FromArgMatches};
use transship_checkpoint::criu_options::{
    CriuOption, CriuOverrides, OPTIONS, Phase, SEVERAL, SWITCH,
};

const HEADING: &str = "CRIU (each also as an annotation dev.transship/<option>)";

/// What a verb does with CRIU.
pub(crate) trait Verb {
    /// Which options mean something for it.
    const PHASE: Phase;
}

/// A verb that dumps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dumps;
/// A verb that restores.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Restores;
/// A verb that does both.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moves;

impl Verb for Dumps {
    const PHASE: Phase = Phase::Dump;
}
impl Verb for Restores {
    const PHASE: Phase = Phase::Restore;
}
impl Verb for Moves {
    const PHASE: Phase = Phase::Both;
}

/// What CRIU is told; it wins over the container's annotations.
#[derive(Debug, Clone)]
pub(crate) struct CriuArgs<V> {
    overrides: CriuOverrides,
    verb: PhantomData<V>,
}

impl<V> CriuArgs<V> {
    /// The choices that the flags make.
    pub(crate) fn overrides(&self) -> CriuOverrides {
        self.overrides.clone()
    }
}

impl<V: Verb> Args for CriuArgs<V> {
    fn augment_args(command: Command) -> Command {
        let offered = OPTIONS.iter().filter(|it| it.phase.meets(V::PHASE));
        offered.fold(command, |command, option| {
            let command = command.arg(flag(option));
            match option.off_flag {
                None => command,
                Some(off) => command.arg(
                    Arg::new(off)
                        .long(off)
                        .help(format!("The same as --{}=false", option.name))
                        .help_heading(HEADING)
                        .action(ArgAction::SetTrue)
                        .conflicts_with(option.name),
                ),
            }
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<V: Verb> FromArgMatches for CriuArgs<V> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let mut overrides = CriuOverrides::default();
        for option in OPTIONS.iter().filter(|it| it.phase.meets(V::PHASE)) {
            let off = option.off_flag.is_some_and(|off| matches.get_flag(off));
            let given: Vec<String> = matches
                .get_many(option.name)
                .into_iter()
                .flatten()
                .cloned()
                .collect();
            let value = match given.is_empty() {
                // Of those that may stand several times all count.
                false => given.join(","),
                true if off => "false".to_owned(),
                true => continue,
            };
            let set = overrides.set(option.name, &value);
            set.map_err(|error| Error::raw(clap::error::ErrorKind::InvalidValue, error))?;
        }
        Ok(Self {
            overrides,
            verb: PhantomData,
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

fn flag(option: &'static CriuOption) -> Arg {
    let check = |value: &str| {
        CriuOverrides::default()
            .set(option.name, value)
            .map(|()| value.to_owned())
    };
    let arg = Arg::new(option.name)
        .long(option.name)
        .help(option.help)
        .help_heading(HEADING)
        .value_parser(check);
    if option.values == SWITCH {
        arg.value_name("BOOL")
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
    } else if option.values == SEVERAL {
        arg.value_name(option.values).action(ArgAction::Append)
    } else {
        arg.value_name(option.values)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use transship_checkpoint::criu_options::{CriuOptions, Tcp};

    use super::*;

    #[derive(Debug, Parser)]
    struct Line<V: Verb + Send + Sync + Clone + 'static> {
        #[command(flatten)]
        criu: CriuArgs<V>,
    }

    fn parse<V: Verb + Send + Sync + Clone + 'static>(line: &str) -> Result<CriuOverrides, String> {
        let words = std::iter::once("x").chain(line.split_whitespace());
        let parsed = Line::<V>::try_parse_from(words).map_err(|error| error.to_string())?;
        Ok(parsed.criu.overrides())
    }

    #[test]
    fn flags_choose_and_nonsense_is_refused() {
        assert_eq!(parse::<Moves>("").unwrap(), CriuOverrides::default());
        let line = "--tcp close --no-file-locks --shell-job --link-remap=false --allow-lost exec \
                    --allow-lost personality,multicast";
        let chosen = parse::<Moves>(line).unwrap();
        let options = chosen.over(CriuOptions {
            link_remap: true,
            ..CriuOptions::default()
        });
        assert_eq!(options.tcp, Tcp::Close);
        assert!(!options.file_locks && options.shell_job && !options.link_remap);
        assert_eq!(options.allow_lost.to_string(), "exec,multicast,personality");
        for (line, said) in [
            ("--tcp maybe", "\"established\""),
            ("--ghost-limit x", "16M"),
            ("--allow-lost tcp", "docs/conditions.md"),
            ("--file-locks --no-file-locks", "cannot be used with"),
        ] {
            let error = parse::<Moves>(line).unwrap_err();
            assert!(error.contains(said), "{line}: {error}");
        }
    }

    #[test]
    fn a_verb_offers_what_means_something_for_it() {
        assert!(parse::<Dumps>("--ghost-limit 4M").is_ok());
        assert!(parse::<Restores>("--ghost-limit 4M").is_err());
        assert!(parse::<Dumps>("--lazy-pages").is_err());
        assert!(parse::<Restores>("--lazy-pages --tcp close").is_ok());
    }
}
