//! Long-lived flows: made before the clock starts, asked again and again while it runs.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tracer_ebpf::path::Path;

use super::flow::{Conversation, Outcome};
use crate::cluster::Protocol;
use crate::kernel::clock::monotonic_ns;

/// What a long-lived flow went through. Times are nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EstablishedRecord {
    /// How it enters the node.
    pub path: Path,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Index of the Service in the cluster.
    pub service: usize,
    /// Client's address.
    pub source: SocketAddr,
    /// The address it was sent to.
    pub destination: SocketAddr,
    /// Requests sent, or meant to be sent, while the clock ran.
    pub requests: u32,
    /// Of them answered in time by an endpoint of the Service.
    pub answered: u32,
    /// The first request that was not; `None`: the flow survived.
    pub lost: Option<LostRequest>,
}

/// The first request of a long-lived flow that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LostRequest {
    /// How.
    pub outcome: Outcome,
    /// When the request was due.
    pub at_ns: u64,
    /// When the flow answered again: the earliest answer from an endpoint of the Service to this
    /// request (too late, then) or one after it.
    pub again_ns: Option<u64>,
}

/// One request.
#[derive(Clone, Debug)]
struct Request {
    due_ns: u64,
    sent_ns: u64,
    answer: Option<(SocketAddr, u64)>,
    failure: Option<Outcome>,
}

/// A long-lived flow while it lives.
#[derive(Debug)]
pub(super) struct Established {
    pub(super) record: EstablishedRecord,
    pub(super) conversation: Conversation,
    state: RefCell<State>,
}

#[derive(Debug, Default)]
struct State {
    requests: Vec<Request>,
    /// TCP: the connection is over.
    over: Option<Outcome>,
}

impl Established {
    pub(super) fn new(record: EstablishedRecord, conversation: Conversation) -> Rc<Self> {
        Rc::new(Self {
            record,
            conversation,
            state: RefCell::default(),
        })
    }

    /// Sends the next request. Request 0 was the one that opened the flow.
    pub(super) fn send(&self, due_ns: u64) {
        let mut state = self.state.borrow_mut();
        let number = state.requests.len() as u64 + 1;
        let sent_ns = monotonic_ns();
        let failure = match state.over {
            Some(outcome) => Some(outcome),
            None => self.conversation.send(number).err(),
        };
        // UDP reports here what became of an earlier request; the socket then sends again.
        let failure = match (failure, self.record.protocol, state.over) {
            (Some(Outcome::Refused), Protocol::Udp, None) => {
                if let Some(earlier) = state.requests.last_mut().filter(|r| r.answer.is_none()) {
                    earlier.failure.get_or_insert(Outcome::Refused);
                }
                self.conversation.send(number).err()
            }
            (failure, _, _) => failure,
        };
        state.requests.push(Request {
            due_ns,
            sent_ns,
            answer: None,
            failure,
        });
    }

    /// Takes answers until nothing can come any more.
    pub(super) async fn receive(self: Rc<Self>) {
        let answered = |number: u64, by, at| {
            let mut state = self.state.borrow_mut();
            let index = usize::try_from(number).ok().and_then(|n| n.checked_sub(1));
            if let Some(request) = index.and_then(|index| state.requests.get_mut(index)) {
                request.answer.get_or_insert((by, at));
            }
        };
        let failed = |outcome, _at| {
            let mut state = self.state.borrow_mut();
            if self.record.protocol == Protocol::Tcp {
                state.over = Some(outcome);
            }
            // Everything still open ends with a connection; an ICMP error is for the latest.
            let open = state.requests.iter_mut().rev();
            let open = open.take_while(|request| request.answer.is_none());
            let count = if self.record.protocol == Protocol::Tcp {
                usize::MAX
            } else {
                1
            };
            for request in open.take(count) {
                request.failure.get_or_insert(outcome);
            }
        };
        self.conversation.receive(answered, failed).await;
    }

    /// What it went through, once the last request has had its time.
    pub(super) fn finish(
        &self,
        patience: Duration,
        may_answer: impl Fn(SocketAddr) -> bool,
    ) -> EstablishedRecord {
        let patience_ns = u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX);
        let state = self.state.borrow();
        let mut record = self.record.clone();
        for (index, request) in state.requests.iter().enumerate() {
            record.requests += 1;
            let outcome = match (request.answer, request.failure) {
                (Some((by, at)), _) if at.saturating_sub(request.sent_ns) <= patience_ns => {
                    if may_answer(by) {
                        record.answered += 1;
                        continue;
                    }
                    Outcome::Misdelivered { by }
                }
                (_, Some(failure)) => failure,
                _ => Outcome::Timeout { connected: true },
            };
            if record.lost.is_none() {
                let again_ns = state.requests[index..]
                    .iter()
                    .filter_map(|request| request.answer)
                    .filter(|(by, _)| may_answer(*by))
                    .map(|(_, at)| at)
                    .min();
                record.lost = Some(LostRequest {
                    outcome,
                    at_ns: request.due_ns,
                    again_ns,
                });
            }
        }
        record
    }
}
