//! The timeline as a picture of its own: SVG 1.1, without scripts, fonts or links to elsewhere.
//!
//! ```text
//!  image     ████                    553 ms  5.45 MB
//!  dump          ██████              424 ms              one row a step, on a common axis
//!  frozen        ░░░░░░░░░░░         2.91 s              the time in which no copy runs, behind all rows
//! ```

use std::fmt::Write as _;
use std::time::Duration;

use transship_checkpoint::shown_text::deceives;

use super::{Step, human_bytes, human_time};

const ROW: u32 = 24;
const NAMES: f64 = 110.0;
const AXIS: f64 = 520.0;
const WIDTH: u32 = 900;

/// Draws the steps, and the time in which no copy runs.
pub(super) fn draw(
    steps: &[Step],
    frozen: Option<(Duration, Duration)>,
    total: Duration,
) -> String {
    let rows = u32::try_from(steps.len()).unwrap_or(u32::MAX / ROW / 2);
    let height = (rows + 3) * ROW;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let place = |time: Duration| {
        let share = time.as_secs_f64() / total.as_secs_f64().max(f64::EPSILON);
        NAMES + share.clamp(0.0, 1.0) * AXIS
    };
    if let Some((from, to)) = frozen {
        let (left, right) = (place(from), place(to));
        // Writing to a string cannot fail, here and below.
        let _ = writeln!(
            svg,
            "<rect x=\"{left:.1}\" y=\"0\" width=\"{:.1}\" height=\"{}\" fill=\"#d9e6f5\"/>",
            right - left,
            height - ROW,
        );
    }
    let mut y = ROW;
    for step in steps {
        let (left, right) = (place(step.from), place(step.to));
        let bytes = step.bytes.map(human_bytes).unwrap_or_default();
        let said = format!(
            "{}  {bytes}  {}",
            human_time(step.to - step.from),
            step.note
        );
        row(&mut svg, y, step.name, said.trim_end());
        let _ = writeln!(
            svg,
            "<rect x=\"{left:.1}\" y=\"{}\" width=\"{:.1}\" height=\"14\" fill=\"#2b6cb0\"/>",
            y - 12,
            (right - left).max(1.5),
        );
        y += ROW;
    }
    if let Some((from, to)) = frozen {
        row(&mut svg, y, "frozen", &human_time(to - from));
        y += ROW;
    }
    row(&mut svg, y, "total", &human_time(total));
    svg.push_str("</svg>\n");
    svg
}

fn row(svg: &mut String, y: u32, name: &str, said: &str) {
    let _ = writeln!(
        svg,
        "<text x=\"10\" y=\"{y}\">{}</text><text x=\"{:.0}\" y=\"{y}\">{}</text>",
        escaped(name),
        NAMES + AXIS + 12.0,
        escaped(said)
    );
}

/// Names of containers come from elsewhere.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            unseen if deceives(unseen) => escaped.push(' '),
            // XML has no such characters.
            '\u{fffe}' | '\u{ffff}' => escaped.push(' '),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_lie_on_the_axis_and_words_are_words() {
        let second = Duration::from_secs(1);
        let step = Step {
            name: "dump",
            from: second,
            to: second * 3,
            bytes: Some(1000),
            note: "<script>&\u{7}\u{ffff}".into(),
        };
        let svg = draw(&[step], Some((second, second * 2)), second * 4);
        assert!(
            svg.contains("x=\"240.0\" y=\"12\" width=\"260.0\""),
            "{svg}"
        );
        assert!(
            svg.contains("2.00 s  1.00 kB  &lt;script&gt;&amp;  </text>"),
            "{svg}"
        );
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(svg.contains(">frozen<") && svg.contains(">1.00 s<"));
    }
}
