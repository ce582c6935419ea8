//! The parts that every page of a report is made of.

use std::fmt::Write as _;

use crate::report::blocks::Table;
use crate::report::plot::{self, escape};

const CSS: &str = include_str!("../page.css");

/// A page under construction. Text is text: nothing that it is given becomes markup.
pub(super) struct Sheet {
    pub(super) out: String,
}

impl Sheet {
    /// A page with its title, up to where its content begins.
    pub(super) fn new(title: &str) -> Self {
        let title = escape(title);
        Self {
            out: format!(
                "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/><meta name=\"color-scheme\" content=\"light dark\"/><title>{title}</title><style>\n{CSS}</style></head>\n<body><main><h1>{title}</h1>\n"
            ),
        }
    }

    /// The whole page.
    pub(super) fn finish(mut self) -> String {
        self.out.push_str("</main></body></html>\n");
        self.out
    }

    /// What was measured, when and where, in a line; a part is never broken.
    pub(super) fn origin(&mut self, what: &str, parts: &[&str]) {
        let parts: Vec<String> = parts
            .iter()
            .map(|part| format!("<span class=\"whole\">{}</span>", escape(part)))
            .collect();
        let _ = writeln!(
            self.out,
            "<p class=\"quiet\">{}{}</p>",
            escape(what),
            parts.join(" · ")
        );
    }

    /// The answer, in sentences.
    pub(super) fn answer(&mut self, sentences: &[String], nothing: &str) {
        self.out.push_str("<div class=\"answer\">");
        if sentences.is_empty() {
            self.paragraph(nothing);
        }
        for sentence in sentences {
            self.paragraph(sentence);
        }
        self.out.push_str("</div>\n");
    }

    /// How to take the figures.
    pub(super) fn note(&mut self, text: &str) {
        let _ = writeln!(self.out, "<p class=\"note\">{}</p>", escape(text));
    }

    /// What makes figures doubtful.
    pub(super) fn alarms(&mut self, alarms: &[String]) {
        if alarms.is_empty() {
            return;
        }
        self.out
            .push_str("<div class=\"alarm\" role=\"note\"><strong>Read with care</strong><ul>");
        for alarm in alarms {
            let _ = write!(self.out, "<li>{}</li>", escape(alarm));
        }
        self.out.push_str("</ul></div>\n");
    }

    pub(super) fn heading(&mut self, id: &str, text: &str) {
        let _ = writeln!(self.out, "<h2 id=\"{id}\">{}</h2>", escape(text));
    }

    pub(super) fn subheading(&mut self, text: &str) {
        let _ = writeln!(self.out, "<h3>{}</h3>", escape(text));
    }

    pub(super) fn paragraph(&mut self, text: &str) {
        let _ = writeln!(self.out, "<p>{}</p>", escape(text));
    }

    /// A plot in both widths; the page shows the one that fits.
    pub(super) fn figure(&mut self, draw: &dyn Fn(f64) -> String) {
        let _ = writeln!(
            self.out,
            "<figure><div class=\"wide\">{}</div><div class=\"narrow\">{}</div></figure>",
            draw(plot::WIDE),
            draw(plot::NARROW)
        );
    }

    pub(super) fn folded(&mut self, tables: &[Table]) {
        self.out
            .push_str("<details><summary>The figures as a table</summary>");
        for table in tables {
            self.table(table);
        }
        self.out.push_str("</details>\n");
    }

    pub(super) fn table(&mut self, table: &Table) {
        let _ = write!(
            self.out,
            "<div class=\"scroll\"><table><caption>{}</caption><thead><tr>",
            escape(&table.title)
        );
        for name in &table.header {
            let _ = write!(self.out, "<th scope=\"col\">{}</th>", escape(name));
        }
        self.out.push_str("</tr></thead><tbody>");
        for row in &table.rows {
            self.out.push_str("<tr>");
            for (i, cell) in row.iter().enumerate() {
                let _ = if i == 0 {
                    write!(self.out, "<th scope=\"row\">{}</th>", escape(cell))
                } else {
                    write!(self.out, "<td>{}</td>", escape(cell))
                };
            }
            self.out.push_str("</tr>");
        }
        self.out.push_str("</tbody></table></div>\n");
    }

    pub(super) fn definitions(&mut self, pairs: &[(&str, String)]) {
        self.out.push_str("<dl>");
        for (term, text) in pairs {
            let _ = write!(
                self.out,
                "<dt>{}</dt><dd>{}</dd>",
                escape(term),
                escape(text)
            );
        }
        self.out.push_str("</dl>\n");
    }
}
