// SPDX-License-Identifier: LGPL-2.1-or-later

//! QEMU's part in a background snapshot.
//!
//! The model follows the source of QEMU 10.0.13 (10.2.2 does not differ from it):
//!
//! * `bg_migration_thread` (migration/migration.c) proceeds in this order. It runs
//!   `ram_write_tracking_prepare` without the big lock, and writes the header and the setup with it.
//!   `qemu_savevm_wait_unplug` sets `active` without the lock. With the lock it then runs
//!   `migration_stop_vm`, `qemu_savevm_state_complete_precopy_non_iterable` (registers and devices)
//!   and `ram_write_tracking_start`, and schedules `bg_migration_vm_start_bh`. It drops the lock,
//!   and pages flow. Where write tracking cannot be armed, that bottom half is not scheduled, and
//!   QEMU does not resume the guest.
//! * `migration_stop_vm` reads the run state (`vm_old_state`) under the lock, and not before.
//! * `do_vm_stop` (system/cpus.c), which serves both `stop` and `migration_stop_vm`, sets the run
//!   state first. Then `pause_all_vcpus` drops the lock while it waits for the vCPUs, and once more
//!   after that. A caller that finds the guest already paused does not wait for anything.
//! * In `cpu_synchronize_all_states`, `run_on_cpu` drops the lock for each vCPU with KVM. With TCG
//!   it does not, which removes one interleaving.
//! * `resume_all_vcpus` withdraws the stop request: a thread that waits for the vCPUs in
//!   `pause_all_vcpus` then goes on waiting.
//! * `qmp_dispatch` (qapi/qmp-dispatch.c): commands that are not coroutines run in the main loop,
//!   one at a time, under the lock, each in a bottom half of its own, and those of one monitor in
//!   the order in which they were sent. All commands of the library are of this kind, and none can
//!   run out of band. They run in the context of the I/O handlers, which `bdrv_drain_all` and
//!   `bdrv_flush_all` (at the end of `do_vm_stop`) do not poll. The bottom halves of the migration
//!   run in the context that those functions do poll. The main loop serves that context first
//!   (`qemu_init_main_loop`), and takes the lock before it looks for work
//!   (`os_host_main_loop_wait`).
//! * `migration_cancel` only sets `cancelling`. `migration_cleanup`, a bottom half, sets `cancelled`
//!   after it has joined the thread, and closes the stream. The thread itself sets `completed` and
//!   `failed` before that.
//! * `migrate_prepare` refuses a second migration by the first one's status. It does not check
//!   whether the first one's thread has ended.
//!
//! A step of the model is what happens between two times at which the lock is dropped, or less. A
//! write to disk is complete at once, because `stop` drains requests in flight before it replies.
//! IOThreads write without the lock, so the model's vCPUs do, too.

pub const VCPUS: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Run {
    Running,
    Paused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vcpu {
    Runs,
    /// The vCPU has been asked to stop, and executes until it notices.
    Stopping,
    Stopped,
}

/// A command of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    Migrate,
    Stop,
    Cont,
    QueryMigrate,
    /// Switches the disks to their overlays.
    Transaction,
    MigrateCancel,
    /// `query-status`, and the events since the migration began.
    QueryStatus,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    Done,
    Refused,
    Migration(Status),
    /// The guest is paused, after one STOP and no RESUME.
    Quiet(bool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    None,
    Setup,
    Active { pages: bool },
    Cancelling,
    Completed,
    Failed,
    Cancelled,
}

impl Status {
    pub fn under_way(self) -> bool {
        matches!(self, Status::Setup | Status::Active { .. } | Status::Cancelling)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MainLoop {
    Polls,
    /// In `pause_all_vcpus`, with the lock dropped.
    AwaitsVcpus,
    /// It has seen all vCPUs stopped, and has to take the lock again.
    Relocks,
    /// It drains and flushes the disks, and keeps the lock.
    Drains,
}

/// The place in the snapshot thread's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Thread {
    Absent,
    Populates,
    SetsActive,
    Stops,
    AwaitsVcpus,
    Relocks,
    SavesRegisters(usize),
    Arms,
    SavesPages,
    Ends,
    Ended,
}

/// A bottom half of the migration. The main loop runs the pending ones before it takes a command.
/// The model allows one command to overtake it; with two, every rule would have a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bottom {
    Idle,
    Pending,
    Overtaken,
}

/// The guest's writes that the snapshot contains.
///
/// A write is in each part that is saved after it, and not in those saved before. It changes memory
/// or a disk, and the registers of its vCPU, which count it. The writes need not be counted to know
/// whether the counters agree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Image {
    pub registers: [bool; VCPUS],
    pub memory: bool,
    pub disks: bool,
    /// A write came after a part was saved.
    excludes: bool,
    /// A write is in one part and not in another, or a part contains it without an earlier write.
    torn: bool,
    /// A write to disk came after the disks were switched.
    disks_are_old: bool,
}

impl Image {
    /// The image of the next try: memory is saved again, and the disks stay switched.
    fn renewed(self) -> Image {
        Image {
            disks: self.disks,
            disks_are_old: self.disks_are_old,
            torn: self.disks_are_old,
            ..Image::default()
        }
    }

    pub fn written(mut self, vcpu: usize, to_disk: bool) -> Image {
        let saved = if to_disk { self.disks } else { self.memory };
        match (self.registers[vcpu], saved) {
            (false, false) => self.torn |= self.excludes,
            (true, true) => self.excludes = true,
            _ => self.torn = true,
        }
        self.disks_are_old |= to_disk && self.disks;
        self
    }

    /// All parts are saved, as of one moment.
    pub fn is_of_one_moment(self) -> bool {
        self.registers.iter().all(|saved| *saved) && self.memory && self.disks && !self.torn
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Qemu {
    pub run: Run,
    pub vcpus: [Vcpu; VCPUS],
    pub main_loop: MainLoop,
    pub thread: Thread,
    status: Status,
    /// `vm_old_state`.
    found: Run,
    /// `bg_migration_vm_start_bh`
    resume: Bottom,
    /// `migration_cleanup_bh`
    cleanup: Bottom,
    pub stream_open: bool,
    pub image: Image,
    /// The number of events since the migration began, as far as it matters.
    stops: u8,
    resumes: u8,
    /// The thread has found the guest paused in the window inside `stop`, while a vCPU still
    /// executed.
    pub looked_in_window: bool,
    /// The disks were switched before a cancelled migration had ended.
    pub switched_during_another_migration: bool,
    /// A migration was begun before another one's thread had ended.
    pub concurrent_migrations: bool,
}

/// A step of one of QEMU's threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    VcpuWritesMemory(usize),
    VcpuWritesDisk(usize),
    VcpuStops(usize),
    StopSeesAllStopped,
    StopTakesLock,
    StopAnswers,
    BottomHalfResumes,
    BottomHalfCleansUp,
    ThreadHasPopulated,
    ThreadSetsActive,
    ThreadFindsRunningAndStops,
    ThreadFindsPaused,
    ThreadSeesAllStopped,
    ThreadTakesLock,
    ThreadSavesRegisters(usize),
    ThreadArms,
    ThreadCannotArm,
    ThreadSavesPages,
    ThreadSavesLastPages,
    ThreadEnds,
}

impl Qemu {
    pub fn new() -> Qemu {
        Qemu {
            run: Run::Running,
            vcpus: [Vcpu::Runs; VCPUS],
            main_loop: MainLoop::Polls,
            thread: Thread::Absent,
            status: Status::None,
            found: Run::Running,
            resume: Bottom::Idle,
            cleanup: Bottom::Idle,
            stream_open: false,
            image: Image::default(),
            stops: 0,
            resumes: 0,
            looked_in_window: false,
            switched_during_another_migration: false,
            concurrent_migrations: false,
        }
    }

    pub fn runs(&self) -> bool {
        self.run == Run::Running && self.vcpus == [Vcpu::Runs; VCPUS]
    }

    fn all_stopped(&self) -> bool {
        self.vcpus == [Vcpu::Stopped; VCPUS]
    }

    /// Whether the big lock can be taken. Everything else under it is one step.
    fn unlocked(&self) -> bool {
        self.main_loop != MainLoop::Drains
    }

    pub fn takes_commands(&self) -> bool {
        self.main_loop == MainLoop::Polls
            && [self.resume, self.cleanup].iter().all(|bottom| *bottom != Bottom::Overtaken)
    }

    /// The main loop takes a command. Returns `None` where the reply comes later.
    pub fn take(&mut self, command: Command) -> Option<Answer> {
        for bottom in [&mut self.resume, &mut self.cleanup] {
            if *bottom == Bottom::Pending {
                *bottom = Bottom::Overtaken;
            }
        }
        match command {
            Command::Migrate if self.status.under_way() => return Some(Answer::Refused),
            Command::Migrate => {
                self.concurrent_migrations = self.thread != Thread::Absent;
                self.status = Status::Setup;
                self.thread = Thread::Populates;
                self.stream_open = true;
                self.image = self.image.renewed();
                (self.stops, self.resumes, self.looked_in_window) = (0, 0, false);
            }
            Command::Stop => {
                self.main_loop =
                    if self.begin_stop() { MainLoop::AwaitsVcpus } else { MainLoop::Drains };
                return None;
            }
            Command::Cont => self.start(),
            Command::QueryMigrate => return Some(Answer::Migration(self.status)),
            Command::Transaction => {
                self.image.disks = true;
                self.switched_during_another_migration = self.status == Status::Cancelling;
            }
            Command::MigrateCancel => {
                if self.status.under_way() {
                    self.status = Status::Cancelling;
                }
            }
            Command::QueryStatus => {
                return Some(Answer::Quiet(
                    self.run == Run::Paused && (self.stops, self.resumes) == (1, 0),
                ));
            }
        }
        Some(Answer::Done)
    }

    /// The first half of `do_vm_stop`. Returns whether it has to wait for vCPUs.
    fn begin_stop(&mut self) -> bool {
        if self.run == Run::Paused {
            return false;
        }
        self.run = Run::Paused;
        for vcpu in self.vcpus.iter_mut().filter(|vcpu| **vcpu == Vcpu::Runs) {
            *vcpu = Vcpu::Stopping;
        }
        true
    }

    /// `vm_start`
    fn start(&mut self) {
        if self.run == Run::Paused {
            self.run = Run::Running;
            self.vcpus = [Vcpu::Runs; VCPUS];
            self.resumes = 1;
        }
    }

    pub fn steps(&self, steps: &mut Vec<Step>) {
        for vcpu in 0..VCPUS {
            for (to_disk, write) in
                [(false, Step::VcpuWritesMemory(vcpu)), (true, Step::VcpuWritesDisk(vcpu))]
            {
                if self.vcpus[vcpu] != Vcpu::Stopped
                    && self.image.written(vcpu, to_disk) != self.image
                {
                    steps.push(write);
                }
            }
            if self.vcpus[vcpu] == Vcpu::Stopping && self.unlocked() {
                steps.push(Step::VcpuStops(vcpu));
            }
        }
        match self.main_loop {
            MainLoop::Polls => {}
            MainLoop::AwaitsVcpus if self.all_stopped() => steps.push(Step::StopSeesAllStopped),
            MainLoop::AwaitsVcpus => {}
            MainLoop::Relocks => steps.push(Step::StopTakesLock),
            MainLoop::Drains => steps.push(Step::StopAnswers),
        }
        if matches!(self.main_loop, MainLoop::Polls | MainLoop::Drains) {
            if self.resume != Bottom::Idle {
                steps.push(Step::BottomHalfResumes);
            }
            if self.cleanup != Bottom::Idle {
                steps.push(Step::BottomHalfCleansUp);
            }
        }
        if self.thread == Thread::SetsActive {
            steps.push(Step::ThreadSetsActive);
        } else if self.thread == Thread::SavesPages {
            steps.push(match self.status {
                Status::Active { pages: false } => Step::ThreadSavesPages,
                _ => Step::ThreadSavesLastPages,
            });
        } else if self.unlocked() {
            match self.thread {
                Thread::Populates => steps.push(Step::ThreadHasPopulated),
                Thread::Stops => steps.push(match self.run {
                    Run::Running => Step::ThreadFindsRunningAndStops,
                    Run::Paused => Step::ThreadFindsPaused,
                }),
                Thread::AwaitsVcpus if self.all_stopped() => steps.push(Step::ThreadSeesAllStopped),
                Thread::Relocks => steps.push(Step::ThreadTakesLock),
                Thread::SavesRegisters(vcpu) => steps.push(Step::ThreadSavesRegisters(vcpu)),
                Thread::Arms => steps.extend([Step::ThreadArms, Step::ThreadCannotArm]),
                Thread::Ends => steps.push(Step::ThreadEnds),
                _ => {}
            }
        }
    }

    /// Takes a step. Returns the reply of a command that it ends.
    pub fn step(&mut self, step: Step) -> Option<Answer> {
        match step {
            Step::VcpuWritesMemory(vcpu) => self.image = self.image.written(vcpu, false),
            Step::VcpuWritesDisk(vcpu) => self.image = self.image.written(vcpu, true),
            Step::VcpuStops(vcpu) => self.vcpus[vcpu] = Vcpu::Stopped,

            Step::StopSeesAllStopped => self.main_loop = MainLoop::Relocks,
            Step::StopTakesLock => {
                self.stops = 2.min(self.stops + 1);
                self.main_loop = MainLoop::Drains;
            }
            Step::StopAnswers => {
                self.main_loop = MainLoop::Polls;
                return Some(Answer::Done);
            }
            Step::BottomHalfResumes => {
                self.resume = Bottom::Idle;
                match self.found {
                    Run::Running => self.start(),
                    // The vCPU is not told: it notices when it next leaves the guest.
                    Run::Paused => self.run = Run::Paused,
                }
                self.found = Run::Running;
            }
            Step::BottomHalfCleansUp => {
                self.cleanup = Bottom::Idle;
                self.thread = Thread::Absent;
                self.stream_open = false;
                if self.status == Status::Cancelling {
                    self.status = Status::Cancelled;
                }
            }

            Step::ThreadHasPopulated => self.thread = Thread::SetsActive,
            Step::ThreadSetsActive => {
                if self.status == Status::Setup {
                    self.status = Status::Active { pages: false };
                }
                self.thread = Thread::Stops;
            }
            Step::ThreadFindsRunningAndStops => {
                self.found = Run::Running;
                self.begin_stop();
                self.thread = Thread::AwaitsVcpus;
            }
            Step::ThreadFindsPaused => {
                self.found = Run::Paused;
                self.looked_in_window =
                    self.main_loop == MainLoop::AwaitsVcpus && !self.all_stopped();
                self.thread = Thread::SavesRegisters(0);
            }
            Step::ThreadSeesAllStopped => self.thread = Thread::Relocks,
            Step::ThreadTakesLock => {
                self.stops = 2.min(self.stops + 1);
                self.thread = Thread::SavesRegisters(0);
            }
            Step::ThreadSavesRegisters(vcpu) => {
                self.image.registers[vcpu] = true;
                self.thread =
                    if vcpu + 1 < VCPUS { Thread::SavesRegisters(vcpu + 1) } else { Thread::Arms };
            }
            Step::ThreadArms => {
                self.image.memory = true;
                self.resume = Bottom::Pending;
                self.thread = Thread::SavesPages;
            }
            Step::ThreadCannotArm => {
                if self.status.under_way() && self.status != Status::Cancelling {
                    self.status = Status::Failed;
                }
                self.thread = Thread::Ends;
            }
            Step::ThreadSavesPages => self.status = Status::Active { pages: true },
            Step::ThreadSavesLastPages => {
                if self.status != Status::Cancelling {
                    self.status = Status::Completed;
                }
                self.thread = Thread::Ends;
            }
            Step::ThreadEnds => {
                self.cleanup = Bottom::Pending;
                self.thread = Thread::Ended;
            }
        }
        None
    }
}
