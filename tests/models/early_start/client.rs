// SPDX-License-Identifier: LGPL-2.1-or-later

//! The client, which is this library: the commands that it sends, and its conclusions from the
//! replies.

use super::qemu::Command::{
    self, Cont, Migrate, MigrateCancel, QueryMigrate, QueryStatus, Stop, Transaction,
};
use super::qemu::{Answer, Status};

/// How it decides that its `stop` was in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InTime {
    /// `query-migrate` still says `setup`.
    Setup,
    /// `query-migrate` says `setup` or `active`, and no pages yet.
    NoPages,
    /// There was one STOP and no RESUME, and the guest is paused in the end.
    OneStop,
}

/// When it sends `query-migrate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asks {
    AfterStopReplied,
    /// Directly after `stop`, on the same monitor.
    Pipelined,
    /// Directly after `stop`, with the transaction directly after that.
    PipelinedWithTransaction,
    /// At the same time as `stop`, on a second monitor.
    OnAnotherMonitor,
    /// After the disks were switched.
    AfterTransaction,
}

/// When it resumes the guest after the transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resumes {
    WhenArmed,
    WhenActive,
    AtOnce,
}

/// What it does when its `stop` was too late. "Armed" stands for armed or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// Waits until write tracking is armed, resumes, cancels, and waits for the end.
    ArmsFirst,
    /// Resumes, waits until write tracking is armed, cancels, and waits for the end.
    ResumesOnce,
    /// The same, and resumes again when write tracking is armed.
    ResumesTwice,
    /// The same, and stops and resumes the guest repeatedly while it waits for that.
    Nudges,
    /// Cancels and resumes without waiting.
    CancelsOnly,
}

/// What the client takes for the end of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The status says so, and the stream is closed.
    StatusAndStream,
    Status,
}

#[derive(Clone, Copy, Debug)]
pub struct Rule {
    pub in_time: InTime,
    pub asks: Asks,
    pub resumes: Resumes,
    pub lost: Lost,
    pub end: End,
    /// The number of early starts before the guest is stopped first.
    pub tries: u8,
}

/// The command that it has sent last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum At {
    Begins,
    Starts,
    Stops,
    Asks,
    Switches,
    AwaitsArmed,
    Judges,
    Nudges,
    ResumesEarly,
    Resumes,
    Cancels,
    AwaitsEnd,
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    pub at: At,
    /// The number of tries that were too late.
    pub lost: u8,
    /// The guest was stopped before the migration captured it.
    in_time: bool,
    /// This try is lost.
    pub losing: bool,
    /// There will be no snapshot: the migration has failed, the caller has cancelled, or the rule
    /// rejects the image in the end.
    pub failed: bool,
}

impl Client {
    pub fn new() -> Client {
        Client { at: At::Begins, lost: 0, in_time: false, losing: false, failed: false }
    }

    fn stops_first(&self, rule: &Rule) -> bool {
        self.lost == rule.tries
    }

    fn goes(&mut self, at: At, commands: &[Command]) -> Vec<Command> {
        self.at = at;
        commands.to_vec()
    }

    /// Called with all replies. Returns the commands that it sends next.
    pub fn step(
        &mut self,
        rule: &Rule,
        answers: &[Answer],
        switched: bool,
        stream_open: bool,
    ) -> Vec<Command> {
        let status = answers.iter().find_map(|answer| match answer {
            Answer::Migration(status) => Some(*status),
            _ => None,
        });
        let unarmed = matches!(status, Some(Status::Setup | Status::Active { pages: false }));
        let active = matches!(status, Some(Status::Active { .. }));
        match self.at {
            At::Begins if self.stops_first(rule) => self.goes(At::Stops, &[Stop]),
            At::Begins => self.goes(At::Starts, &[Migrate]),
            At::Starts if answers == [Answer::Refused] => self.goes(At::Starts, &[Migrate]),
            At::Starts if self.stops_first(rule) => self.switched(rule),
            At::Starts => match rule.asks {
                Asks::Pipelined | Asks::OnAnotherMonitor => {
                    self.goes(At::Asks, &[Stop, QueryMigrate])
                }
                Asks::PipelinedWithTransaction => {
                    self.goes(At::Asks, &[Stop, QueryMigrate, Transaction])
                }
                Asks::AfterStopReplied | Asks::AfterTransaction => self.goes(At::Stops, &[Stop]),
            },
            At::Stops if self.stops_first(rule) => {
                self.in_time = true;
                self.switches(rule, switched)
            }
            At::Stops if rule.in_time == InTime::OneStop || rule.asks == Asks::AfterTransaction => {
                self.switches(rule, switched)
            }
            At::Stops => self.goes(At::Asks, &[QueryMigrate]),
            At::Asks
                if status == Some(Status::Setup) || unarmed && rule.in_time == InTime::NoPages =>
            {
                self.in_time = true;
                if switched { self.switched(rule) } else { self.switches(rule, switched) }
            }
            At::Asks => self.loses(rule),
            At::Switches if self.stops_first(rule) => self.goes(At::Starts, &[Migrate]),
            At::Switches if rule.asks == Asks::AfterTransaction => {
                self.goes(At::Asks, &[QueryMigrate])
            }
            At::Switches => self.switched(rule),

            At::AwaitsArmed if self.losing && active && unarmed && rule.lost == Lost::Nudges => {
                self.goes(At::Nudges, &[Stop])
            }
            At::AwaitsArmed if !self.losing && active && rule.resumes == Resumes::WhenActive => {
                self.goes(At::Resumes, &[Cont])
            }
            At::AwaitsArmed if unarmed => self.goes(At::AwaitsArmed, &[QueryMigrate]),
            At::AwaitsArmed => {
                self.failed |= status == Some(Status::Failed);
                if self.losing && rule.lost == Lost::ResumesOnce {
                    self.goes(At::Cancels, &[MigrateCancel])
                } else if !self.losing && !self.stops_first(rule) && rule.in_time == InTime::OneStop
                {
                    self.goes(At::Judges, &[QueryStatus])
                } else {
                    self.goes(At::Resumes, &[Cont])
                }
            }
            At::Judges => {
                self.failed |= answers != [Answer::Quiet(true)];
                self.goes(At::Resumes, &[Cont])
            }
            At::Nudges => self.goes(At::ResumesEarly, &[Cont]),
            At::ResumesEarly => self.goes(At::AwaitsArmed, &[QueryMigrate]),
            At::Resumes if self.losing && rule.lost == Lost::CancelsOnly => self.ends(),
            At::Resumes if self.losing => self.goes(At::Cancels, &[MigrateCancel]),
            At::Resumes => self.goes(At::AwaitsEnd, &[QueryMigrate]),

            At::Cancels if rule.lost == Lost::CancelsOnly => self.goes(At::Resumes, &[Cont]),
            At::Cancels => self.goes(At::AwaitsEnd, &[QueryMigrate]),
            At::AwaitsEnd if status.is_some_and(Status::under_way) => {
                self.goes(At::AwaitsEnd, &[QueryMigrate])
            }
            At::AwaitsEnd if stream_open && rule.end == End::StatusAndStream => {
                self.goes(At::AwaitsEnd, &[QueryMigrate])
            }
            At::AwaitsEnd => {
                self.failed |= !self.losing && status != Some(Status::Completed);
                self.ends()
            }
            At::Done => unreachable!(),
        }
    }

    fn switches(&mut self, rule: &Rule, switched: bool) -> Vec<Command> {
        if switched {
            // An earlier try has switched the disks already.
            self.at = At::Switches;
            return self.step(rule, &[], switched, true);
        }
        self.goes(At::Switches, &[Transaction])
    }

    fn switched(&mut self, rule: &Rule) -> Vec<Command> {
        match rule.resumes {
            Resumes::AtOnce => self.goes(At::Resumes, &[Cont]),
            _ => self.goes(At::AwaitsArmed, &[QueryMigrate]),
        }
    }

    /// Returns the commands that it sends in place of the next step when the caller cancels or the
    /// limit of the pause has passed.
    pub fn cancelled(&mut self, rule: &Rule) -> Vec<Command> {
        self.failed = true;
        self.loses(rule)
    }

    fn loses(&mut self, rule: &Rule) -> Vec<Command> {
        self.losing = true;
        match rule.lost {
            // The setup of the migration can take time, and the guest must not wait for it.
            Lost::ArmsFirst if self.in_time => self.goes(At::ResumesEarly, &[Cont]),
            Lost::ArmsFirst => self.goes(At::AwaitsArmed, &[QueryMigrate]),
            Lost::ResumesOnce | Lost::ResumesTwice | Lost::Nudges => {
                self.goes(At::ResumesEarly, &[Cont])
            }
            Lost::CancelsOnly => self.goes(At::Cancels, &[MigrateCancel]),
        }
    }

    fn ends(&mut self) -> Vec<Command> {
        if self.losing && !self.failed {
            *self = Client { lost: self.lost + 1, ..Client::new() };
            return vec![];
        }
        self.goes(At::Done, &[])
    }
}
