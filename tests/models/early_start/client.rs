// SPDX-License-Identifier: LGPL-2.1-or-later

//! Our client: what it sends, and what it concludes from the answers.

use super::qemu::Command::{
    self, Cont, Migrate, MigrateCancel, QueryMigrate, QueryStatus, Stop, Transaction,
};
use super::qemu::{Answer, Status};

/// How it decides that its `stop` was in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InTime {
    /// `query-migrate` still says `setup`.
    Setup,
    /// It says `setup` or `active`, and no pages yet.
    NoPages,
    /// One STOP, no RESUME, and the guest is paused in the end.
    OneStop,
}

/// When it asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asks {
    WhenStopHasAnswered,
    /// Behind `stop`, on the same monitor.
    Pipelined,
    /// Behind `stop`, with the transaction behind that.
    PipelinedWithTransaction,
    /// At the time of `stop`, on a second monitor.
    OnAnotherMonitor,
    /// When the disks have been switched.
    AfterTransaction,
}

/// When it resumes after the transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resumes {
    WhenArmed,
    WhenActive,
    AtOnce,
}

/// What it does when its `stop` was too late. "Armed" is: or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// Waits until the migration has armed, resumes, cancels, waits for the end.
    ArmsFirst,
    /// Resumes, waits until the migration has armed, cancels, waits for the end.
    ResumesOnce,
    /// The same, and resumes again when it has armed.
    ResumesTwice,
    /// The same, and while it waits for that stops and resumes the guest again and again.
    Nudges,
    /// Cancels and resumes, and waits for nothing.
    Forgets,
}

/// What is the end of a migration.
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
    /// Tries to overlap before the classical order.
    pub tries: u8,
}

/// What it has sent last.
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
    /// How many tries were too late.
    pub lost: u8,
    /// The guest was stopped before the migration looked.
    in_time: bool,
    /// This try comes to nothing.
    pub losing: bool,
    /// There will be no snapshot: the migration has failed, the caller has given up, or the rule
    /// rejects the image in the end.
    pub failed: bool,
}

impl Client {
    pub fn new() -> Client {
        Client { at: At::Begins, lost: 0, in_time: false, losing: false, failed: false }
    }

    fn is_classical(&self, rule: &Rule) -> bool {
        self.lost == rule.tries
    }

    fn goes(&mut self, at: At, commands: &[Command]) -> Vec<Command> {
        self.at = at;
        commands.to_vec()
    }

    /// All answers are there: what it sends now.
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
            At::Begins if self.is_classical(rule) => self.goes(At::Stops, &[Stop]),
            At::Begins => self.goes(At::Starts, &[Migrate]),
            At::Starts if answers == [Answer::Refused] => self.goes(At::Starts, &[Migrate]),
            At::Starts if self.is_classical(rule) => self.switched(rule),
            At::Starts => match rule.asks {
                Asks::Pipelined | Asks::OnAnotherMonitor => {
                    self.goes(At::Asks, &[Stop, QueryMigrate])
                }
                Asks::PipelinedWithTransaction => {
                    self.goes(At::Asks, &[Stop, QueryMigrate, Transaction])
                }
                Asks::WhenStopHasAnswered | Asks::AfterTransaction => self.goes(At::Stops, &[Stop]),
            },
            At::Stops if self.is_classical(rule) => {
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
            At::Switches if self.is_classical(rule) => self.goes(At::Starts, &[Migrate]),
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
                } else if !self.losing
                    && !self.is_classical(rule)
                    && rule.in_time == InTime::OneStop
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
            At::Resumes if self.losing && rule.lost == Lost::Forgets => self.ends(),
            At::Resumes if self.losing => self.goes(At::Cancels, &[MigrateCancel]),
            At::Resumes => self.goes(At::AwaitsEnd, &[QueryMigrate]),

            At::Cancels if rule.lost == Lost::Forgets => self.goes(At::Resumes, &[Cont]),
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
            // In an earlier try: there is nothing left to switch.
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

    /// The caller gives up, or the limit of the pause has passed: what it sends instead of the next
    /// step.
    pub fn gives_up(&mut self, rule: &Rule) -> Vec<Command> {
        self.failed = true;
        self.loses(rule)
    }

    fn loses(&mut self, rule: &Rule) -> Vec<Command> {
        self.losing = true;
        match rule.lost {
            // The migration may take its time to set up, and the guest must not wait for that.
            Lost::ArmsFirst if self.in_time => self.goes(At::ResumesEarly, &[Cont]),
            Lost::ArmsFirst => self.goes(At::AwaitsArmed, &[QueryMigrate]),
            Lost::ResumesOnce | Lost::ResumesTwice | Lost::Nudges => {
                self.goes(At::ResumesEarly, &[Cont])
            }
            Lost::Forgets => self.goes(At::Cancels, &[MigrateCancel]),
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
