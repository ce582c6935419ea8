//! Do kernels and tiers tell the same of the same packets? Any two answers have to be equal, unless one side says
//! that it cannot know, for a reason that its tier may have.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use tracer::probe::tier::Tier;

use crate::answers::{self, Answer, Told, Unknown};

/// The kernels that have to have told, by release and separated by commas.
pub const KERNELS: &str = "SVCPATH_KERNELS";

/// Two answers that contradict each other.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Difference {
    /// Mode, packet, question.
    question: String,
    /// By whom, and what.
    told: [String; 2],
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [one, other] = &self.told;
        write!(f, "{}\n    {one}\n    {other}", self.question)
    }
}

/// What came of comparing each with each.
#[derive(Debug, Default)]
pub struct Agreement {
    kernels: Vec<Told>,
    pairs: usize,
    modes: BTreeSet<String>,
    same: usize,
    unknown: BTreeMap<Unknown, usize>,
    differences: Vec<Difference>,
}

/// Compares what every kernel that [`KERNELS`] names has left in the directory, and prints it.
///
/// # Panics
///
/// A kernel has not told, or two differ.
pub fn kernels_agree() {
    let variable = |name| {
        std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: cargo xtask test does"))
    };
    let directory = variable(answers::DIRECTORY);
    let agreement = Agreement::of(answers::left_in(Path::new(&directory)));
    println!("{agreement}");
    for kernel in variable(KERNELS).split(',') {
        let mut told = agreement.kernels.iter();
        assert!(
            told.any(|told| told.kernel == kernel),
            "{kernel} told nothing"
        );
    }
    assert!(agreement.pairs > 0, "there is nothing to compare");
    assert!(
        agreement.differences.is_empty(),
        "kernels differ: see above"
    );
}

impl Agreement {
    /// Each against each.
    pub fn of(kernels: Vec<Told>) -> Self {
        let mut agreement = Self::default();
        for (at, one) in kernels.iter().enumerate() {
            for other in &kernels[at + 1..] {
                agreement.compare([one, other]);
            }
        }
        agreement.kernels = kernels;
        agreement
    }

    /// In every mode that both have.
    fn compare(&mut self, told: [&Told; 2]) {
        self.pairs += 1;
        let [one, other] = told.map(|told| &told.modes);
        let modes = one.keys().filter(|mode| other.contains_key(*mode));
        let modes: BTreeSet<&str> = modes.map(String::as_str).collect();
        let answers = told.map(|told| answers_in(told, &modes));
        let questions: BTreeSet<_> = answers.iter().flat_map(BTreeMap::keys).collect();
        for question in questions {
            let both = [0, 1].map(|side: usize| answers[side].get(question).copied());
            match judge(both, told) {
                Judged::Same => self.same += 1,
                Judged::Unknown(why) => *self.unknown.entry(why).or_default() += 1,
                Judged::Differs => self.differences.push(Difference {
                    question: question.join(", "),
                    told: [0, 1].map(|side: usize| {
                        let Told { kernel, tier, .. } = told[side];
                        format!("{kernel} {tier}: {}", text(both[side]))
                    }),
                }),
            }
        }
        self.modes.extend(modes.into_iter().map(str::to_owned));
    }
}

/// What is told in these modes, by mode, packet and question.
fn answers_in<'a>(told: &'a Told, modes: &BTreeSet<&str>) -> BTreeMap<[&'a str; 3], &'a Answer> {
    let modes = told
        .modes
        .iter()
        .filter(|(mode, _)| modes.contains(mode.as_str()));
    let packets = modes.flat_map(|(mode, packets)| {
        let packets = packets.iter();
        packets.map(move |(packet, answers)| (mode, packet, answers))
    });
    packets
        .flat_map(|(mode, packet, answers)| {
            let answers = answers.iter();
            answers.map(move |(question, answer)| ([mode.as_str(), packet, question], answer))
        })
        .collect()
}

/// How two answers stand to each other.
#[derive(Debug, PartialEq, Eq)]
enum Judged {
    Same,
    Unknown(Unknown),
    Differs,
}

fn judge(both: [Option<&Answer>; 2], told: [&Told; 2]) -> Judged {
    let mut sides = both.into_iter().zip(told);
    // Not for every reason: only for one that the tier has.
    let may = |told: &Told, unknown: &Unknown| {
        let mut tiers = Tier::ALL.into_iter();
        tiers.any(|tier| tier.name() == told.tier && unknown.is_of(tier))
    };
    let unfounded = |(answer, told): (Option<&Answer>, &Told)| matches!(answer, Some(Answer::Unknown { unknown }) if !may(told, unknown));
    if sides.any(unfounded) {
        return Judged::Differs;
    }
    match both {
        [Some(Answer::Known(one)), Some(Answer::Known(other))] if one == other => Judged::Same,
        [Some(Answer::Unknown { unknown }), Some(_)]
        | [Some(_), Some(Answer::Unknown { unknown })] => Judged::Unknown(*unknown),
        _ => Judged::Differs,
    }
}

fn text(answer: Option<&Answer>) -> String {
    match answer {
        None => "nothing is told".to_owned(),
        Some(Answer::Known(known)) => known.clone(),
        Some(Answer::Unknown { unknown }) => format!("unknown ({unknown})"),
    }
}

impl fmt::Display for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 20;
        writeln!(f, "Answers to the same packets, by kernel and tier")?;
        let width = self.kernels.iter().map(|told| told.kernel.len());
        let width = width.max().unwrap_or(0).max("kernel".len());
        writeln!(
            f,
            "  {:<width$}  {:<9}  modes  packets  answers  unknown",
            "kernel", "tier"
        )?;
        for told in &self.kernels {
            let (answers, unknown) = told.count();
            let packets: usize = told.modes.values().map(BTreeMap::len).sum();
            writeln!(
                f,
                "  {:<width$}  {:<9}  {:>5}  {packets:>7}  {answers:>7}  {}",
                told.kernel,
                told.tier,
                told.modes.len(),
                counted(&unknown)
            )?;
        }
        writeln!(
            f,
            "  each against each ({} pairs; {}): {} answers the same, {} differ, {} unknown to one side",
            self.pairs,
            self.modes.iter().cloned().collect::<Vec<_>>().join(", "),
            self.same,
            self.differences.len(),
            self.unknown.values().sum::<usize>()
        )?;
        for (why, count) in &self.unknown {
            writeln!(f, "  {why} ({count}): {}", why.why())?;
        }
        for difference in self.differences.iter().take(SHOWN) {
            writeln!(f, "  DIFFERS {difference}")?;
        }
        match self.differences.len().checked_sub(SHOWN) {
            Some(more @ 1..) => writeln!(f, "  and {more} more"),
            _ => Ok(()),
        }
    }
}

fn counted(unknown: &BTreeMap<Unknown, usize>) -> String {
    let counts = unknown.iter().map(|(why, count)| format!("{count} {why}"));
    let all: Vec<String> = counts.collect();
    if all.is_empty() {
        "0".to_owned()
    } else {
        all.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answers::Answers;

    fn told(kernel: &str, tier: &str, answers: &[(&str, Answer)]) -> Told {
        let answers = answers.iter().cloned();
        let answers: Answers = answers
            .map(|(question, answer)| (question.to_owned(), answer))
            .collect();
        let packets = BTreeMap::from([("a packet".to_owned(), answers)]);
        Told {
            format: answers::FORMAT.to_owned(),
            kernel: kernel.to_owned(),
            tier: tier.to_owned(),
            modes: BTreeMap::from([("ipvs".to_owned(), packets)]),
        }
    }

    fn known(text: &str) -> Answer {
        Answer::Known(text.to_owned())
    }

    #[test]
    fn equal_answers_agree_and_others_do_not() {
        let one = told(
            "6.1",
            "functions",
            &[("end", known("sent")), ("path", known("a"))],
        );
        let other = told(
            "6.18",
            "hooks",
            &[("end", known("leaked")), ("path", known("a"))],
        );
        let agreement = Agreement::of(vec![one, other]);
        assert_eq!((agreement.same, agreement.differences.len()), (1, 1));
        let text = agreement.to_string();
        assert!(
            text.contains("6.1 functions: sent") && text.contains("6.18 hooks: leaked"),
            "{text}"
        );
    }

    #[test]
    fn only_a_tier_that_cannot_know_may_say_so() {
        let unknown = Answer::from(Unknown::WithinComponents);
        for (tier, differing) in [("hooks", 0), ("functions", 1)] {
            let one = told("6.12", tier, &[("met", unknown.clone())]);
            let other = told("6.1", "functions", &[("met", known("table nat"))]);
            let agreement = Agreement::of(vec![one, other]);
            assert_eq!(agreement.differences.len(), differing, "{tier}");
            assert_eq!(agreement.unknown.len(), 1 - differing, "{tier}");
        }
    }

    #[test]
    fn what_one_does_not_tell_differs() {
        let one = told("6.1", "functions", &[("end", known("sent"))]);
        let mut other = told("6.12", "functions", &[]);
        assert_eq!(
            Agreement::of(vec![one.clone(), other.clone()])
                .differences
                .len(),
            1
        );
        other.modes.clear();
        let agreement = Agreement::of(vec![one, other]);
        assert!(agreement.differences.is_empty() && agreement.modes.is_empty());
    }
}
