//! A run as Markdown: what the terminal shows, for an issue or a pull request.

use std::fmt::Write as _;

use super::blocks::{Block, Table, Tone};

/// A run's tables and findings as Markdown. Ends in a newline.
pub fn render(blocks: &[Block]) -> String {
    let mut out = String::new();
    for (i, block) in blocks.iter().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        match block {
            Block::Table(one) => table(&mut out, one),
            Block::Lines(lines) => {
                for (tone, line) in lines {
                    let mark = if *tone == Tone::Alarm {
                        "**warning:** "
                    } else {
                        ""
                    };
                    // Writing to a String cannot fail.
                    let _ = writeln!(out, "- {mark}{}", escaped(line));
                }
            }
        }
    }
    out
}

/// One table under its title.
pub fn table(out: &mut String, table: &Table) {
    let row = |cells: &[String]| {
        let cells: Vec<String> = cells.iter().map(|cell| escaped(cell)).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let _ = writeln!(out, "**{}**\n", escaped(&table.title));
    out.push_str(&row(&table.header));
    let rule: Vec<&str> = (0..table.header.len())
        .map(|i| if i == 0 { "---" } else { "---:" })
        .collect();
    let _ = writeln!(out, "| {} |", rule.join(" | "));
    for cells in &table.rows {
        out.push_str(&row(cells));
    }
}

/// Text that Markdown would read as markup.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .chars()
    {
        match c {
            '|' | '*' | '_' | '`' | '<' | '>' | '[' | ']' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            _ => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::blocks::summary;
    use crate::report::sample;

    #[test]
    fn the_whole_comparison() {
        insta::assert_snapshot!(render(&summary(&sample::run())));
    }

    #[test]
    fn markup_is_text() {
        let mut run = sample::run();
        run.environment.notes = vec!["a | b\n<script>".to_owned()];
        assert!(render(&summary(&run)).contains("- note: a \\| b \\<script\\>\n"));
    }
}
