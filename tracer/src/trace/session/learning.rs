//! What a session knows of the node's Services, and how its probes and its counts come to know it.

use std::net::IpAddr;
use std::time::Duration;

use super::{Event, Session, TraceError, watch};
use crate::kernel::addresses;
use crate::kernel::clock::monotonic_ns;
use crate::rules::services::FoundService;
use crate::trace::changes::News;
use crate::trace::reading;
use crate::trace::tally::Tally;

impl Session {
    /// Takes in what became of reading the rules.
    pub(super) fn learn(
        &mut self,
        turn: reading::Turn,
        events: &mut Vec<Event>,
    ) -> Result<(), TraceError> {
        match turn {
            reading::Turn::Nothing | reading::Turn::Begins => {}
            reading::Turn::Read | reading::Turn::Patched => {
                self.learn_found()?;
                if matches!(turn, reading::Turn::Patched) {
                    self.reading.learnt();
                }
                let there = |there| {
                    let services = self.directory.services().iter();
                    services.filter(|service| service.there == there).count()
                };
                events.push(Event::Services {
                    time_ns: monotonic_ns(),
                    there: there(true),
                    gone: there(false),
                });
            }
            reading::Turn::Failed(why) => {
                events.push(Event::Unread {
                    time_ns: monotonic_ns(),
                    why,
                });
            }
        }
        Ok(())
    }

    /// Rules that changed a moment ago are read before the last flows are judged by them.
    pub(super) fn learn_at_end(&mut self, events: &mut Vec<Event>) -> Result<(), TraceError> {
        let turn = self.reading.learn(self.now_ns());
        self.learn(turn, events)?;
        let mut begun = false;
        loop {
            let turn = if self.reading.is_under_way() {
                self.reading.poll_at_end()
            } else if begun {
                return Ok(());
            } else {
                begun = true;
                self.reading.begin_at_end()
            };
            // What could not be read once is not tried again.
            let failed = matches!(turn, reading::Turn::Failed(_));
            self.learn(turn, events)?;
            if failed {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Has everybody know what was read.
    fn learn_found(&mut self) -> Result<(), TraceError> {
        for (mode, from_to) in self.reading.take_gaps() {
            self.directory.add_gap(mode, from_to);
        }
        let local = addresses::of_node(&self.ns)?;
        self.directory
            .learn(self.reading.found(), &local, self.reading.changed_ns());
        self.directory.read_at(self.reading.read_ns());
        self.directory.learn_bound(addresses::bound(&self.ns)?);
        self.reader.local = local.iter().copied().collect();
        self.tallies
            .resize(self.directory.services().len(), Tally::default());
        let watch = watch(&self.directory, local, &self.options, self.may_absorb);
        self.probes.watch_also(&watch)?;
        // What came while they were read may be missing from what was read.
        let arrived = self.reading.arrived();
        let arrived: Vec<_> = arrived
            .map(|(at_ns, service)| (at_ns, service.clone()))
            .collect();
        self.expect(&arrived)
    }

    /// Takes in what is new of Services, and has everybody know of those that have just come.
    pub(super) fn hear_news(&mut self) -> Result<(), TraceError> {
        let news = self.watcher.drain_news();
        let of = |news: &News| {
            news.arrived
                .clone()
                .into_iter()
                .zip(std::iter::repeat(news.time_ns))
        };
        let arrived: Vec<_> = news
            .iter()
            .flat_map(of)
            .map(|(service, at)| (at, service))
            .collect();
        self.reading.hear_news(news);
        self.expect(&arrived)
    }

    fn expect(&mut self, arrived: &[(u64, FoundService)]) -> Result<(), TraceError> {
        if arrived.is_empty() {
            return Ok(());
        }
        let local: Vec<IpAddr> = self.reader.local.iter().copied().collect();
        let mut new = Vec::new();
        for (at_ns, service) in arrived {
            new.extend(self.directory.expect(service, &local, *at_ns));
        }
        if new.is_empty() {
            return Ok(());
        }
        self.tallies
            .resize(self.directory.services().len(), Tally::default());
        self.probes.watch_targets(&new)?;
        Ok(())
    }
}
