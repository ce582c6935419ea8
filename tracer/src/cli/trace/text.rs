//! Journeys as lines of text.

use std::fmt::Write as _;

use tracer::record::run::Clock;
use tracer::report::units;
use tracer::report::write::printable;
use tracer::trace::journey::{Journey, StageTime, place, spent, time_on_node};
use tracer::trace::met::Meeting;
use tracer::trace::translator::Translator;

/// A journey that began at a time, which is written `+0.040271 s`: a line, and below it one for each
/// stage that was recorded. Ends in a newline.
pub(super) fn journey(clock: Clock, at: &str, journey: &Journey) -> String {
    let cost = time_on_node(clock, journey.elapsed_ns);
    let later = place(journey.first, journey.answer, journey.told_before);
    let who = printable(&journey.to_string());
    if journey.stages.is_empty() {
        return format!("{at}  {who}  {cost}  {}{later}\n", journey.end);
    }
    let mut text = format!("{at}  {who}\n");
    for (i, stage) in journey.stages.iter().enumerate() {
        let line = format!(
            "      {:<10} {:<11} {:<10} {:>9}   {}",
            format!("+{}", units::cost_u64(clock, stage.begin_ns)),
            stage.hook,
            stage.stage,
            units::cost_u64(clock, stage.took_ns),
            detail(journey, i)
        );
        // Writing into a String cannot fail.
        let _ = writeln!(text, "{}", line.trim_end());
        let here = |met: &&Meeting| (met.hook, met.stage) == (stage.hook, stage.stage);
        for met in journey.met.iter().filter(here) {
            let _ = writeln!(text, "{:>41}· {}", "", printable(&met.to_string()));
        }
    }
    let spent = spent(&journey.end);
    let _ = writeln!(text, "      = {cost} {spent} · {}{later}", journey.end);
    text
}

/// What a stage did to the packet, as far as its addresses at both ends tell.
fn detail(journey: &Journey, index: usize) -> String {
    let Some(stage) = journey.stages.get(index).filter(|_| !journey.answer) else {
        return String::new();
    };
    if Some(index) == translating(&journey.stages) {
        return match journey.headed {
            Some(headed) if headed != journey.destination => {
                format!("{} → {headed}{}", journey.destination, by(journey))
            }
            Some(_) => "not translated".to_owned(),
            None => String::new(),
        };
    }
    if stage.stage == "snat" {
        return match journey.source_after {
            Some(after) if after != journey.source => {
                format!("masqueraded: {} → {after}", journey.source)
            }
            Some(_) => "not masqueraded".to_owned(),
            None => String::new(),
        };
    }
    String::new()
}

/// Whose rules translated it, if those of several modes could have.
fn by(journey: &Journey) -> String {
    match journey.translated_by {
        None | Some(Translator::Only(_) | Translator::Outdated) => String::new(),
        Some(Translator::OneOf(mode)) => format!(" by {mode}"),
        Some(Translator::Unknown) => " by which mode is unknown".to_owned(),
    }
}

/// The stage in which the destination is translated: IPVS if it sent the packet on, else the first nat
/// table (which at OUTPUT holds IPVS too).
fn translating(stages: &[StageTime]) -> Option<usize> {
    let ipvs = stages
        .iter()
        .position(|stage| stage.hook == "INPUT" && stage.stage == "ipvs");
    let left_from_input = |from: usize| {
        let mut later = stages[from..].iter();
        later.any(|stage| stage.hook == "POSTROUTING")
    };
    ipvs.filter(|from| left_from_input(*from))
        .or_else(|| stages.iter().position(|stage| stage.stage == "dnat"))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tracer::trace::journey::End;

    use super::*;

    fn socket(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    fn stages(of: &[(&'static str, &'static str, u64)]) -> Vec<StageTime> {
        let mut begin_ns = 0;
        of.iter()
            .map(|&(hook, stage, took_ns)| {
                let time = StageTime {
                    hook,
                    stage,
                    begin_ns,
                    took_ns,
                };
                begin_ns += took_ns;
                time
            })
            .collect()
    }

    fn flow(stages: Vec<StageTime>) -> Journey {
        Journey {
            time_ns: 0,
            service: "shop/web:http".to_owned(),
            protocol: 6,
            source: socket("10.244.0.7:51544"),
            destination: socket("10.96.10.1:80"),
            headed: Some(socket("10.244.0.12:8080")),
            path: "pod→ClusterIP",
            first: Some(true),
            answer: false,
            told_before: false,
            elapsed_ns: Some(stages.iter().map(|stage| stage.took_ns).sum()),
            source_after: Some(socket("10.244.0.7:51544")),
            stages,
            translated_by: Some(Translator::Only("nftables")),
            met: Vec::new(),
            header: [0; tracer_ebpf::record::HEADER],
            end: End::Sent,
        }
    }

    fn through_forward() -> Vec<StageTime> {
        stages(&[
            ("-", "receive", 400),
            ("PREROUTING", "conntrack", 1_900),
            ("PREROUTING", "dnat", 24_600),
            ("PREROUTING", "routing", 800),
            ("FORWARD", "filter", 3_100),
            ("POSTROUTING", "snat", 600),
            ("POSTROUTING", "egress", 600),
        ])
    }

    #[test]
    fn a_journey_without_stages_is_a_line() {
        let mut journey = flow(Vec::new());
        journey.elapsed_ns = Some(32_000);
        insta::assert_snapshot!(super::journey(Clock::Wall, "+0.040271 s", &journey), @"+0.040271 s  shop/web:http pod→ClusterIP 10.244.0.7:51544 → 10.96.10.1:80 → 10.244.0.12:8080  32.0 us  sent to its endpoint");
        journey.end = End::Leaked;
        journey.headed = Some(journey.destination);
        journey.first = Some(false);
        let text = super::journey(Clock::Virtual, "+0.1 s", &journey);
        insta::assert_snapshot!(text, @"+0.1 s  shop/web:http pod→ClusterIP 10.244.0.7:51544 → 10.96.10.1:80  32.0k  leaked, established");
    }

    #[test]
    fn a_packet_that_its_socket_does_not_take_is_told_to_be_the_same() {
        let mut journey = flow(Vec::new());
        journey.headed = Some(journey.destination);
        journey.told_before = true;
        journey.end = End::Dropped {
            reason: "NO_SOCKET".to_owned(),
            stage: "INPUT deliver".to_owned(),
            by: None,
        };
        let text = super::journey(Clock::Wall, "+0 s", &journey);
        let told = "dropped at INPUT deliver (NO_SOCKET), a packet told before\n";
        assert!(text.ends_with(told), "{text}");
    }

    #[test]
    fn every_stage_has_its_line() {
        insta::assert_snapshot!(super::journey(
            Clock::Wall,
            "+0.040271 s",
            &flow(through_forward())
        ));
    }

    #[test]
    fn of_several_modes_the_one_that_translated_is_told() {
        let mut journey = flow(through_forward());
        let mut said = |by| {
            journey.translated_by = Some(by);
            detail(&journey, 2)
        };
        let plain = "10.96.10.1:80 → 10.244.0.12:8080";
        assert_eq!(said(Translator::Only("nftables")), plain);
        let by = said(Translator::OneOf("nftables"));
        assert_eq!(by, format!("{plain} by nftables"));
        let by = said(Translator::Unknown);
        assert_eq!(by, format!("{plain} by which mode is unknown"));
    }

    #[test]
    fn a_masqueraded_packet() {
        let mut journey = flow(through_forward());
        journey.source_after = Some(socket("192.0.2.1:51544"));
        let text = super::journey(Clock::Wall, "+0 s", &journey);
        assert!(
            text.contains("600 ns   masqueraded: 10.244.0.7:51544 → 192.0.2.1:51544\n"),
            "{text}"
        );
        journey.source_after = None;
        journey.headed = None;
        let text = super::journey(Clock::Wall, "+0 s", &journey);
        assert!(
            !text.contains("masqueraded") && !text.contains("translated"),
            "unknown is not guessed: {text}"
        );
    }

    #[test]
    fn what_ipvs_sends_on_it_has_translated() {
        let journey = flow(stages(&[
            ("PREROUTING", "dnat", 300),
            ("INPUT", "ipvs", 5_000),
            ("OUTPUT-ipvs", "dnat", 200),
            ("POSTROUTING", "snat", 600),
        ]));
        let details: Vec<String> = (0..4).map(|i| detail(&journey, i)).collect();
        let said = [
            "",
            "10.96.10.1:80 → 10.244.0.12:8080",
            "",
            "not masqueraded",
        ];
        assert_eq!(details, said);
        // Delivered at INPUT: IPVS has let it pass.
        let delivered = flow(stages(&[
            ("PREROUTING", "dnat", 300),
            ("INPUT", "ipvs", 200),
            ("INPUT", "deliver", 100),
        ]));
        assert!(detail(&delivered, 0).contains(" → "));
        assert_eq!(detail(&delivered, 1), "");
        assert_eq!(detail(&delivered, 9), "");
    }
}
