//! Words as a shell reads them, whoever has chosen them.

/// A word as one word of a shell. Commands that start a program by themselves would see the quotes, so ordinary words
/// have none.
pub(crate) fn quoted(word: &str) -> String {
    let ordinary = |c: char| c.is_ascii_alphanumeric() || "-_=./:,@%+".contains(c);
    match !word.is_empty() && word.chars().all(ordinary) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

/// A command for people to run: what they copy is what it looks like.
pub(crate) fn command_line(words: &[&str]) -> String {
    let words: Vec<_> = words.iter().map(|word| quoted(word)).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell_of_the_other_side() {
        assert_eq!(quoted("--id=web-1.2"), "--id=web-1.2");
        assert_eq!(quoted("--log-uri=file:///a b"), "'--log-uri=file:///a b'");
        assert_eq!(quoted("--id=a'b$(x)"), "'--id=a'\\''b$(x)'");
        assert_eq!(quoted(""), "''");
    }

    /// Names of images are those of an archive, or of a stream.
    #[test]
    fn a_command_that_is_proposed_is_one_command() {
        let pull = |image| command_line(&["ctr", "-n", "k8s.io", "images", "pull", image]);
        assert_eq!(
            pull("docker.io/library/web:1"),
            "ctr -n k8s.io images pull docker.io/library/web:1"
        );
        for image in [
            "web:1; reboot",
            "$(reboot)",
            "`reboot`",
            "web:1\nreboot",
            "a'b",
        ] {
            let run = std::process::Command::new("sh")
                .args([
                    "-c",
                    &format!("ctr() {{ printf %s \"$5\"; }}; {}", pull(image)),
                ])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8_lossy(&run.stdout), image);
        }
    }
}
