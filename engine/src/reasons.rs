//! Reasons against something, found one by one and told together.

use crate::error::{Error, Kind, Result};

/// Refusals so far.
#[derive(Debug, Default)]
pub(crate) struct Reasons(Vec<Error>);

impl Reasons {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One more.
    pub(crate) fn add(&mut self, error: Error) {
        self.0.push(error);
    }

    /// Keeps a refusal, and gives what has been found instead of one.
    ///
    /// # Errors
    /// Whatever is no refusal: then nothing is known of the rest.
    pub(crate) fn keep<T>(&mut self, checked: Result<T>) -> Result<Option<T>> {
        match checked {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.kind() == Kind::Refused => {
                self.add(error);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// What has been found, if there is no reason against it.
    ///
    /// # Errors
    /// All reasons in one line, with all that can be done; a single one as it is.
    pub(crate) fn or<T>(self, found: Option<T>) -> Result<T> {
        let mut reasons = self.0;
        let several = |reasons: Vec<Error>| {
            let lines: Vec<String> = reasons.iter().map(Error::one_line).collect();
            let hints = reasons.iter().flat_map(Error::hints);
            hints.fold(Error::refused(lines.join("; ")), Error::hint)
        };
        match (reasons.pop(), found) {
            (None, Some(found)) => Ok(found),
            (None, None) => Err(Error::refused("nothing has been found")),
            (Some(one), _) if reasons.is_empty() => Err(one),
            (Some(last), _) => {
                reasons.push(last);
                Err(several(reasons))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_told_together() {
        assert_eq!(Reasons::default().or(Some(7)).unwrap(), 7);
        let mut reasons = Reasons::default();
        assert_eq!(reasons.keep(Ok(7)).unwrap(), Some(7));
        let full = Error::refused("the disk is full").hint("rm");
        assert_eq!(reasons.keep::<()>(Err(full)).unwrap(), None);
        let broken = reasons.keep::<()>(Err(Error::failed("broken")));
        assert_eq!(broken.unwrap_err().one_line(), "broken");
        let old = Error::refused("it is old").because(std::io::Error::other("from 1999"));
        reasons.add(old.hint("wait"));
        let error = reasons.or(Some(7)).unwrap_err();
        assert_eq!(error.one_line(), "the disk is full; it is old: from 1999");
        assert_eq!(
            (error.kind(), error.hints()),
            (Kind::Refused, vec!["rm", "wait"])
        );
    }

    #[test]
    fn a_single_reason_stays_what_it_is() {
        let mut reasons = Reasons::default();
        let there = Error::new(Kind::Target, "no room there");
        reasons.add(there);
        assert_eq!(reasons.or(Some(())).unwrap_err().kind(), Kind::Target);
    }
}
