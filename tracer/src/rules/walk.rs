//! The oracle: where would this packet go, and with what probability?
//!
//! Every back end evaluates its rules at one hook; this room strings the hooks together as the
//! kernel does: conntrack, the nat tables for new flows only, the routing decision, and what
//! happens to a packet that nothing translated.
