// SPDX-License-Identifier: LGPL-2.1-or-later

//! QEMU, as far as a background snapshot of it goes.
//!
//! Read in the source of QEMU 10.0.13 (10.2.2 differs in nothing of it):
//!
//! * `bg_migration_thread` (migration/migration.c), in this order: `ram_write_tracking_prepare`
//!   without the big lock; header and setup under it; `qemu_savevm_wait_unplug` sets `active`
//!   without it; then, under it, `migration_stop_vm`,
//!   `qemu_savevm_state_complete_precopy_non_iterable` (registers and devices) and
//!   `ram_write_tracking_start`; `bg_migration_vm_start_bh` is scheduled; the lock is dropped, and
//!   pages flow. Where it cannot arm, that bottom half is not scheduled, and nobody resumes the
//!   guest.
//! * `migration_stop_vm` looks at the run state (`vm_old_state`), under the lock, and not before.
//! * `do_vm_stop` (system/cpus.c), which serves `stop` and `migration_stop_vm` alike, sets the run
//!   state first. Then `pause_all_vcpus` drops the lock while it waits for the vCPUs, and once more
//!   after that. Whoever finds the guest already paused does not wait for anything.
//! * `cpu_synchronize_all_states`: with KVM, `run_on_cpu` drops the lock for each vCPU. (TCG does
//!   not: one interleaving fewer.)
//! * `resume_all_vcpus` takes back the request to stop: who waits for the vCPUs in
//!   `pause_all_vcpus` then waits on.
//! * `qmp_dispatch` (qapi/qmp-dispatch.c): commands that are no coroutines run in the main loop,
//!   one at a time, under the lock, each in a bottom half of its own; those of one monitor in the
//!   order sent. All of ours are such, and none can run out of band. They run in the context of the
//!   I/O handlers, which `bdrv_drain_all` and `bdrv_flush_all` (at the end of `do_vm_stop`) do not
//!   poll; the bottom halves of the migration run in the context which those do poll, and which the
//!   main loop serves first (`qemu_init_main_loop`), having taken the lock before it looks what
//!   there is to do (`os_host_main_loop_wait`).
//! * `migration_cancel` sets `cancelling` and no more; `cancelled` is set by `migration_cleanup`, a
//!   bottom half, when the thread has been joined, where the stream is closed too. `completed` and
//!   `failed` are set before, by the thread itself.
//! * `migrate_prepare` refuses a second migration by the first one's status; whether its thread
//!   lives it does not look.
//!
//! A step of the model is what happens between two droppings of the lock, or less. A write to disk
//! is complete at once: `stop` has drained what was in flight before it answers. IOThreads write
//! without the lock, so the model's vCPUs do.

pub const VCPUS: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Run {
    Running,
    Paused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vcpu {
    Runs,
    /// It has been asked to stop, and executes until it notices.
    Stopping,
    Stopped,
}

/// What a client can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    Migrate,
    Stop,
    Cont,
    QueryMigrate,
    /// The disks change to their overlays.
    Transaction,
    MigrateCancel,
    /// `query-status`, and a look at the events since the migration began.
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
    /// In `pause_all_vcpus`, the lock dropped.
    AwaitsVcpus,
    /// It has seen all vCPUs stopped, and has to take the lock again.
    Relocks,
    /// It drains and flushes the disks, and keeps the lock.
    Drains,
}

/// Where the snapshot thread is.
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

/// A bottom half of the migration. The main loop runs what is pending before it takes a command.
/// That one command overtakes it is granted here, with two there would be holes in everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bottom {
    Idle,
    Pending,
    Overtaken,
}

/// Which of the guest's writes the snapshot contains.
///
/// A write is in what is saved after it, and not in what was saved before. It changes memory or a
/// disk, and the registers of its vCPU, which count it. As many writes as the guest makes: to know
/// whether the counters agree, they need not be counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Image {
    pub registers: [bool; VCPUS],
    pub memory: bool,
    pub disks: bool,
    /// A write has come too late for it.
    excludes: bool,
    /// A write is in one part and not in another, or is in it while an earlier one is not.
    torn: bool,
    /// A write to disk has come since the disks were switched.
    disks_are_old: bool,
}

impl Image {
    /// Memory is saved anew, and disks stay switched.
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

    /// Everything is in it, as it was at one moment.
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
    /// Events since the migration began, as far as it matters how many.
    stops: u8,
    resumes: u8,
    /// The thread has found the guest paused in the window inside `stop`: a vCPU still executed.
    pub looked_in_window: bool,
    /// The disks were switched while a cancelled migration had not ended.
    pub switched_beside_another: bool,
    /// A migration was begun while the thread of another lived.
    pub clashed: bool,
}

/// A step of anybody in QEMU.
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
            switched_beside_another: false,
            clashed: false,
        }
    }

    pub fn runs(&self) -> bool {
        self.run == Run::Running && self.vcpus == [Vcpu::Runs; VCPUS]
    }

    fn all_stopped(&self) -> bool {
        self.vcpus == [Vcpu::Stopped; VCPUS]
    }

    /// The big lock can be taken. All else that is done under it is one step.
    fn unlocked(&self) -> bool {
        self.main_loop != MainLoop::Drains
    }

    pub fn takes_commands(&self) -> bool {
        self.main_loop == MainLoop::Polls
            && [self.resume, self.cleanup].iter().all(|bottom| *bottom != Bottom::Overtaken)
    }

    /// The main loop takes a command; none: it will be answered later.
    pub fn take(&mut self, command: Command) -> Option<Answer> {
        for bottom in [&mut self.resume, &mut self.cleanup] {
            if *bottom == Bottom::Pending {
                *bottom = Bottom::Overtaken;
            }
        }
        match command {
            Command::Migrate if self.status.under_way() => return Some(Answer::Refused),
            Command::Migrate => {
                self.clashed = self.thread != Thread::Absent;
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
                self.switched_beside_another = self.status == Status::Cancelling;
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

    /// The first half of `do_vm_stop`; whether there are vCPUs to be waited for.
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

    /// Takes a step; its answer, where it ends a command.
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
                    // No vCPU is told: it notices when it next leaves the guest.
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
