//! containerd's filter language, as List takes it (pkg/filters of 1.6 to 2.x).
//!
//! ```text
//! filters    any one of several strings lets a snapshot through; none at all lets everything through
//! string     selector (',' selector)*          all of them must match; "" matches everything
//! selector   fieldpath [operator value]        without operator: is there such a field?
//! fieldpath  field ('.' field)*
//! field      [A-Za-z0-9_-]+ | quoted with "
//! operator   == | != | ~=  (a regular expression found anywhere in the value)
//! value      anything up to a comma or space | quoted with " (after ~= also with / or |)
//! quoted     with the escapes of Go strings
//! ```
//!
//! Fields of a snapshot: `kind`, `name`, `parent`, `labels.<key>`; whatever follows `labels` is joined
//! with dots, so `labels.a.b` and `labels."a.b"` are the same. `!=` also matches what has no such
//! field. A regular expression that does not compile matches nothing.

use std::iter::Peekable;
use std::str::CharIndices;

use regex::Regex;

use crate::error::{Result, SnapshotError};
use crate::record::{Kind, Record};

/// Lets snapshots through or not.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// One entry per filter string; empty: everything passes.
    alternatives: Vec<Vec<Selector>>,
}

#[derive(Debug, Clone)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Option<Regex>),
}

impl Filter {
    /// Parses the filter strings of a List request.
    ///
    /// # Errors
    /// The first string that is not in the language, with the place of the fault.
    pub fn parse<S: AsRef<str>>(strings: &[S]) -> Result<Self> {
        let alternatives = strings
            .iter()
            .map(|text| Parser::new(text.as_ref()).string())
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { alternatives })
    }

    /// Whether the snapshot passes.
    #[must_use]
    pub fn matches(&self, name: &str, kind: Kind, record: &Record) -> bool {
        self.alternatives.is_empty()
            || self.alternatives.iter().any(|all| {
                all.iter()
                    .all(|selector| selector.matches(name, kind, record))
            })
    }
}

impl Selector {
    fn matches(&self, name: &str, kind: Kind, record: &Record) -> bool {
        let value = match self.path[0].as_str() {
            "kind" => Some(kind.name()),
            "name" => Some(name),
            "parent" => Some(record.parent.as_str()),
            "labels" => record
                .labels
                .get(&self.path[1..].join("."))
                .map(String::as_str),
            _ => None,
        };
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            Test::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
            Test::Matches(regex) => regex
                .as_ref()
                .is_some_and(|regex| regex.is_match(value.unwrap_or_default())),
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    rest: Peekable<CharIndices<'a>>,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            text,
            rest: text.char_indices().peekable(),
        }
    }

    fn string(mut self) -> Result<Vec<Selector>> {
        if self.text.is_empty() {
            return Ok(Vec::new());
        }
        let mut selectors = vec![self.selector()?];
        loop {
            match self.peek() {
                None => return Ok(selectors),
                Some(',') => {
                    self.rest.next();
                    selectors.push(self.selector()?);
                }
                Some(other) => return Err(self.fault(&format!("unexpected {other:?}"))),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.rest.next();
            path.push(self.field()?);
        }
        let test = match self.peek() {
            None | Some(',') => Test::Present,
            _ => match self.operator()? {
                "==" => Test::Equal(self.value(false)?),
                "!=" => Test::NotEqual(self.value(false)?),
                "~=" => Test::Matches(Regex::new(&self.value(true)?).ok()),
                other => return Err(self.fault(&format!("unknown operator {other:?}"))),
            },
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String> {
        self.skip_spaces();
        match self.peek() {
            Some('"') => self.quoted(),
            Some(c) if is_field_char(c) => Ok(self.take_while(is_field_char).to_owned()),
            _ => Err(self.fault("expected a field name")),
        }
    }

    fn operator(&mut self) -> Result<&'a str> {
        self.skip_spaces();
        let operator = self.take_while(|c| matches!(c, '=' | '!' | '~'));
        if operator.is_empty() {
            return Err(self.fault("expected an operator (==, != or ~=)"));
        }
        Ok(operator)
    }

    fn value(&mut self, is_regex: bool) -> Result<String> {
        self.skip_spaces();
        match self.peek() {
            Some('"') => self.quoted(),
            Some('/' | '|') if is_regex => self.quoted(),
            Some('/' | '|') => Err(self.fault("only ~= takes a value quoted with / or |")),
            None | Some(',' | '.') => Err(self.fault("expected a value")),
            Some(_) => Ok(self.take_while(is_value_char).to_owned()),
        }
    }

    fn quoted(&mut self) -> Result<String> {
        let (start, quote) = self.rest.next().expect("the caller has seen the quote");
        // Bytes, because \x and octal escapes name bytes, not characters.
        let mut bytes = Vec::new();
        loop {
            match self.rest.next() {
                None | Some((_, '\n')) => return Err(self.fault("the quote is not closed")),
                Some((_, c)) if c == quote => break,
                Some((_, '\\')) => self.escape(quote, &mut bytes)?,
                Some((_, c)) => push(&mut bytes, c),
            }
        }
        String::from_utf8(bytes)
            .map_err(|_| self.fault_at(start, "the quoted value is not UTF-8 after its escapes"))
    }

    fn escape(&mut self, quote: char, bytes: &mut Vec<u8>) -> Result<()> {
        let Some(&(_, c)) = self.rest.peek() else {
            return Err(self.fault("the quote is not closed"));
        };
        if c.is_digit(8) {
            let value = self.digits(8, 3)?;
            bytes.push(u8::try_from(value).map_err(|_| self.fault("octal escape above 377"))?);
            return Ok(());
        }
        self.rest.next();
        match c {
            'a' => bytes.push(0x07),
            'b' => bytes.push(0x08),
            'f' => bytes.push(0x0c),
            'n' => bytes.push(b'\n'),
            'r' => bytes.push(b'\r'),
            't' => bytes.push(b'\t'),
            'v' => bytes.push(0x0b),
            '\\' => bytes.push(b'\\'),
            _ if c == quote => push(bytes, c),
            'x' => bytes.push(u8::try_from(self.digits(16, 2)?).expect("two hex digits")),
            'u' | 'U' => {
                let value = self.digits(16, if c == 'u' { 4 } else { 8 })?;
                let c = char::from_u32(value).ok_or_else(|| self.fault("no such character"))?;
                push(bytes, c);
            }
            _ => return Err(self.fault(&format!("unknown escape \\{c}"))),
        }
        Ok(())
    }

    fn digits(&mut self, base: u32, count: usize) -> Result<u32> {
        let mut value: u32 = 0;
        for _ in 0..count {
            let digit = self.peek().and_then(|c| c.to_digit(base));
            let digit = digit.ok_or_else(|| self.fault("a digit of the escape is missing"))?;
            value = value.wrapping_mul(base) | digit;
            self.rest.next();
        }
        Ok(value)
    }

    fn peek(&mut self) -> Option<char> {
        self.rest.peek().map(|(_, c)| *c)
    }

    fn offset(&mut self) -> usize {
        self.rest
            .peek()
            .map_or(self.text.len(), |(offset, _)| *offset)
    }

    fn skip_spaces(&mut self) {
        while self.rest.next_if(|(_, c)| c.is_whitespace()).is_some() {}
    }

    fn take_while(&mut self, accept: impl Fn(char) -> bool) -> &'a str {
        let start = self.offset();
        while self.rest.next_if(|(_, c)| accept(*c)).is_some() {}
        let end = self.offset();
        &self.text[start..end]
    }

    fn fault(&mut self, what: &str) -> SnapshotError {
        let offset = self.offset();
        self.fault_at(offset, what)
    }

    fn fault_at(&self, offset: usize, what: &str) -> SnapshotError {
        SnapshotError::Invalid {
            reason: format!("filter {:?}: {what} at byte {offset}", self.text),
        }
    }
}

fn push(bytes: &mut Vec<u8>, c: char) {
    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

fn is_field_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_')
}

fn is_value_char(c: char) -> bool {
    c != ',' && !c.is_whitespace() && !c.is_control()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passes(filters: &[&str]) -> std::result::Result<bool, String> {
        let record = Record {
            parent: "sha256:base".to_owned(),
            labels: [("foo", "bar"), ("a.b/c", "x,y"), ("quoted key", "a|b/c\"d")]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into(),
            ..Record::default()
        };
        Ok(Filter::parse(filters).map_err(|e| e.to_string())?.matches(
            "k8s.io/7/app",
            Kind::Active,
            &record,
        ))
    }

    #[test]
    fn selectors_in_the_language() {
        let cases: &[(&[&str], bool)] = &[
            (&[], true),
            (&[""], true),
            (&["kind==active"], true),
            (&["kind==view"], false),
            (&["kind!=view"], true),
            (&["kind==view", "kind==active"], true),
            (&["kind==active,parent==other"], false),
            (&["kind==active,parent==sha256:base"], true),
            (&["kind == active, parent == sha256:base"], true),
            (&["name==k8s.io/7/app"], true),
            (&["name~=app$"], true),
            (&["name~=/^k8s\\\\.io\\/7\\/app$/"], true),
            (&["name~=|7/ap+|"], true),
            (&["name~=\"^app\""], false),
            (&["parent"], true),
            (&["labels.foo"], true),
            (&["labels.none"], false),
            (&["labels"], false),
            (&["nothing"], false),
            (&["nothing.at.all"], false),
            (&["labels.foo==bar"], true),
            (&["labels.foo!=bar"], false),
            (&["labels.none!=bar"], true),
            (&["labels.none==\"\""], false),
            (&["labels.\"foo\"==bar"], true),
            (&["\"labels\".foo==bar"], true),
            (&["labels.\"a.b/c\"==\"x,y\""], true),
            (&["labels.a.\"b/c\"==\"x,y\""], true),
            (&["labels.\"quoted key\"==\"a|b/c\\\"d\""], true),
            (&["labels.foo==\"\\x62\\141\\u0072\""], true),
            (&["name~=\"(\""], false),
            (&["labels.none~=\"^$\""], true),
        ];
        for (filters, expected) in cases {
            assert_eq!(passes(filters), Ok(*expected), "{filters:?}");
        }
    }

    #[test]
    fn what_is_not_in_the_language_is_refused() {
        for filter in [
            ",",
            "kind==active,",
            "kind=active",
            "kind===active",
            "kind==",
            "kind==active ,parent==x",
            "kind==active ",
            "kind ",
            "==active",
            ".foo",
            "labels.",
            "labels..foo",
            "labels/foo==bar",
            "name==\"open",
            "name==\"a\nb\"",
            "name==/x/",
            "name==\"\\q\"",
            "name==\"\\x4\"",
            "name==\"\\777\"",
            "name==\"\\ud800\"",
            "name==\"\\xff\"",
            "name==\"a\"b",
        ] {
            let error = passes(&[filter]).expect_err(filter);
            assert!(
                error.starts_with("filter ") && error.contains(" at byte "),
                "{error}"
            );
        }
    }
}
