//! Events that come by the thousand when one fault hits every Service: the worst are told one by one, the others
//! together.

use std::collections::BTreeMap;

use tracer::report::trace::WORST;
use tracer::report::units;
use tracer::trace::session::Event;

/// Within so long, ns, at most [`WORST`] of a kind are told one by one.
pub(super) const WINDOW_NS: u64 = 1_000_000_000;

/// Kinds of events of which there may be one a Service, or one a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Outage,
    Stuck,
}

fn kind_of(event: &Event) -> Option<Kind> {
    match event {
        Event::Outage(_) => Some(Kind::Outage),
        Event::Stuck(_) => Some(Kind::Stuck),
        _ => None,
    }
}

/// New flows that it cost.
const fn lost_by(event: &Event) -> u64 {
    match event {
        Event::Outage(outage) => outage.lost,
        _ => 0,
    }
}

/// What was told of a kind in this window, and what is still to be told.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    began_ns: u64,
    told: usize,
    others: u64,
    lost: u64,
}

/// Keeps count of such events.
#[derive(Debug, Default)]
pub(super) struct Crowd(BTreeMap<Kind, Window>);

impl Crowd {
    /// Which of these events, of which it is heard at that time (`CLOCK_MONOTONIC`, ns), are to be told one by one, in
    /// their order.
    pub(super) fn part<'e>(&mut self, events: &'e [Event], now_ns: u64) -> Vec<&'e Event> {
        let mut worst: Vec<(usize, &Event)> = events.iter().enumerate().collect();
        worst.retain(|(_, event)| kind_of(event).is_some());
        worst.sort_by_key(|(_, event)| std::cmp::Reverse(lost_by(event)));
        let mut left_out = vec![false; events.len()];
        for (at, event) in worst {
            left_out[at] = !self.has_room(event, now_ns);
        }
        let told = events
            .iter()
            .zip(left_out)
            .filter(|(_, left_out)| !left_out);
        told.map(|(event, _)| event).collect()
    }

    fn has_room(&mut self, event: &Event, now_ns: u64) -> bool {
        let Some(kind) = kind_of(event) else {
            return true;
        };
        let window = self.0.entry(kind).or_default();
        if window.told < WORST {
            if window.told == 0 {
                window.began_ns = now_ns;
            }
            window.told += 1;
            return true;
        }
        window.others += 1;
        window.lost = window.lost.saturating_add(lost_by(event));
        false
    }

    /// What is to be said of the others whose window is over at that time (`CLOCK_MONOTONIC`, ns).
    pub(super) fn others(&mut self, now_ns: u64) -> Vec<String> {
        let over = |window: &Window| now_ns.saturating_sub(window.began_ns) >= WINDOW_NS;
        let mut said = Vec::new();
        for (kind, window) in &mut self.0 {
            if !over(window) {
                continue;
            }
            let Window { others, lost, .. } = std::mem::take(window);
            if others > 0 {
                said.push(words(*kind, others, lost));
            }
        }
        said
    }
}

fn words(kind: Kind, others: u64, lost: u64) -> String {
    match kind {
        Kind::Outage => format!(
            "and {}, {} lost",
            units::plural(others, "other outage", "other outages"),
            units::plural(lost, "new flow", "new flows")
        ),
        Kind::Stuck => format!(
            "and {} stuck on dead endpoints",
            units::plural(
                others,
                "other established flow is",
                "other established flows are"
            )
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracer::trace::outages::Outage;
    use tracer::trace::stuck::Stuck;

    fn outage(lost: u64, end_ns: u64) -> Event {
        Event::Outage(Outage {
            service: "shop/web:http".to_owned(),
            ipv6: false,
            path: "pod→ClusterIP".to_owned(),
            begin_ns: 0,
            end_ns: Some(end_ns),
            lost,
            last_lost_ns: 0,
            open: None,
            began_with: None,
            ended_with: None,
        })
    }

    fn stuck() -> Event {
        let to = "10.96.0.1:80".parse().expect("an address");
        Event::Stuck(Stuck {
            time_ns: 7,
            index: 0,
            service: "shop/web:http".to_owned(),
            protocol: 6,
            source: to,
            destination: to,
            endpoint: to,
        })
    }

    #[test]
    fn the_worst_of_many_are_told_and_the_others_counted() {
        let mut crowd = Crowd::default();
        let read = Event::Services {
            time_ns: 1,
            there: 1,
            gone: 0,
        };
        let mut events: Vec<Event> = (1..=3000).map(|lost| outage(lost, 5)).collect();
        events.insert(0, read.clone());
        events.push(stuck());
        let told = crowd.part(&events, 5);
        let wanted: Vec<&Event> = std::iter::once(&events[0]).chain(&events[2991..]).collect();
        assert_eq!(told, wanted);
        // As long as the window lasts there is no room.
        assert_eq!(crowd.part(&[outage(9, 6), read.clone()], 6), [&read]);
        assert_eq!(crowd.others(6), [""; 0]);
        let lost: u64 = (1..=2990).sum::<u64>() + 9;
        let lost = units::count(lost);
        let said = format!("and 2,991 other outages, {lost} new flows lost");
        assert_eq!(crowd.others(WINDOW_NS + 5), [said]);
        // The next window.
        assert_eq!(crowd.others(u64::MAX), [""; 0]);
        assert_eq!(crowd.part(&[outage(1, 9), stuck()], 9).len(), 2);
    }

    #[test]
    fn stuck_flows_are_a_crowd_of_their_own() {
        let mut crowd = Crowd::default();
        let events = vec![stuck(); WORST + 2];
        assert_eq!(crowd.part(&events, 1).len(), WORST);
        let said = crowd.others(u64::MAX);
        assert_eq!(
            said,
            ["and 2 other established flows are stuck on dead endpoints"]
        );
    }
}
