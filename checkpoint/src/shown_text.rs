//! Text that others have chosen, as people get to see it: on terminals, in names, in lines of a log.
//!
//! ```text
//!  control characters (C0, DEL, C1)      a terminal obeys them
//!  directions, joiners, tags, ...        nobody sees them, and the text around them reads as another one
//! ```
//!
//! The second are those of Unicode's `Default_Ignorable_Code_Point`, and what separates lines and annotates.

/// Longest text of the other side that is shown, in bytes.
const LIMIT: usize = 4096;

/// Whether a character does something else than to be seen.
#[must_use]
pub fn deceives(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}')
}

/// The text with escapes for what would deceive; what is longer than 4096 bytes is cut off.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut shown = String::new();
    for character in text.chars() {
        if shown.len() > LIMIT {
            shown.push_str("...");
            break;
        }
        push_shown(&mut shown, character);
    }
    shown
}

/// Lines of text in which names of others may be, with escapes for what would deceive.
#[must_use]
pub fn printable_lines(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => shown.push('\n'),
            other => push_shown(&mut shown, other),
        }
    }
    shown
}

/// JSON that a terminal may show: the same value, with escapes for what would deceive.
#[must_use]
pub fn printable_json(json: &str) -> String {
    let mut shown = String::with_capacity(json.len());
    let mut units = [0; 2];
    for character in json.chars() {
        // What is no blank between values stands in a string.
        if !deceives(character) || matches!(character, '\n' | '\r' | '\t') {
            shown.push(character);
            continue;
        }
        for unit in character.encode_utf16(&mut units) {
            shown.push_str(&format!("\\u{unit:04x}"));
        }
    }
    shown
}

fn push_shown(shown: &mut String, character: char) {
    match deceives(character) {
        true => shown.extend(character.escape_default()),
        false => shown.push(character),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::check_name;

    /// Of each range the first and the last one.
    const DECEIVING: [char; 20] = [
        '\0',
        '\u{1f}',
        '\u{7f}',
        '\u{9f}',
        '\u{ad}',
        '\u{61c}',
        '\u{200b}',
        '\u{200f}',
        '\u{2028}',
        '\u{202e}',
        '\u{2060}',
        '\u{206f}',
        '\u{feff}',
        '\u{fff9}',
        '\u{fffb}',
        '\u{180e}',
        '\u{e0000}',
        '\u{e01ef}',
        '\u{e0fff}',
        '\u{115f}',
    ];

    #[test]
    fn a_terminal_obeys_nobodys_names() {
        let names = "a\n\u{1b}[2J\r\u{9b}b\u{e9}\n";
        assert_eq!(printable_lines(names), "a\n\\u{1b}[2J\\r\\u{9b}b\u{e9}\n");
        assert_eq!(
            printable("a\n\u{1b}]0;x\u{7}\r"),
            "a\\n\\u{1b}]0;x\\u{7}\\r"
        );
        assert!(printable(&"x".repeat(100_000)).len() < 5000);
    }

    #[test]
    fn what_nobody_sees_is_shown_and_is_part_of_no_name() {
        for character in DECEIVING {
            let name = format!("prod{character}uction");
            for shown in [
                printable(&name),
                printable_lines(&name),
                printable_json(&name),
            ] {
                assert!(!shown.contains(character), "{character:?}: {shown}");
            }
            assert!(check_name("the name", &name).is_err(), "{character:?}");
        }
        for name in ["\u{e9}t\u{e9}", "\u{65e5}\u{672c}", "a b", "-_.:@"] {
            assert_eq!(printable(name), name);
            check_name("the name", name).unwrap();
        }
    }

    #[test]
    fn json_stays_the_same_value() {
        let value = serde_json::json!({"na\u{9b}me": "\u{1b}[2J\u{7f}\u{202e}\u{e0041}\u{e9}\n"});
        let json = serde_json::to_string_pretty(&value).unwrap();
        let shown = printable_json(&json);
        assert!(
            !shown.chars().any(|it| it != '\n' && deceives(it)),
            "{shown:?}"
        );
        assert!(
            !shown.contains(['\u{7f}', '\u{9b}', '\u{202e}', '\u{e0041}']),
            "{shown:?}"
        );
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&shown).unwrap(),
            value
        );
    }
}
