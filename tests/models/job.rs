// SPDX-License-Identifier: LGPL-2.1-or-later

//! The state that the thread of a job shares with its followers, in `src/engine/job/shared.rs`,
//! model-checked in all interleavings. loom reports a lost wake-up as a thread that waits forever.

use std::sync::Arc;
use std::time::Duration;

use instantsnap::engine::job::shared::{News, Shared, Signal, State};
use instantsnap::engine::job::sync::Guarded;
use loom::model::Builder;
use loom::sync::{Condvar, Mutex, MutexGuard};
use loom::thread;

/// A value behind a lock, each use of which loom sees.
struct Modelled<T> {
    value: Mutex<T>,
    changed: Condvar,
}

impl<T> Guarded<T> for Modelled<T> {
    type Guard<'a>
        = MutexGuard<'a, T>
    where
        T: 'a;

    fn new(value: T) -> Modelled<T> {
        Modelled { value: Mutex::new(value), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, T> {
        self.value.lock().unwrap()
    }

    fn notify_all(&self) {
        self.changed.notify_all();
    }

    fn wait<'a>(
        &'a self,
        guard: MutexGuard<'a, T>,
        timeout: Option<Duration>,
    ) -> MutexGuard<'a, T> {
        assert_eq!(timeout, None, "a model has no clock");
        self.changed.wait(guard).unwrap()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Happens {
    Paused,
    Instant,
    Progress(u32),
    End,
}

use Happens::{End, Instant, Paused, Progress};

impl News for Happens {
    fn is_instant(&self) -> bool {
        *self == Instant
    }

    fn replaces(&self, earlier: &Happens) -> bool {
        matches!((self, earlier), (Progress(_), Progress(_)))
    }
}

/// An eventfd as poll() sees it.
#[derive(Default)]
struct Level {
    up: Mutex<bool>,
    changed: Condvar,
}

impl Level {
    fn is_up(&self) -> bool {
        *self.up.lock().unwrap()
    }

    fn poll(&self) {
        let mut up = self.up.lock().unwrap();
        while !*up {
            up = self.changed.wait(up).unwrap();
        }
    }

    fn set(&self, up: bool) {
        *self.up.lock().unwrap() = up;
        self.changed.notify_all();
    }
}

impl Signal for Level {
    fn raise(&self) {
        self.set(true);
    }

    fn lower(&self) {
        self.set(false);
    }
}

type Model = Shared<Happens, u32, Level, Modelled<State<Happens, u32>>>;

/// Runs a model in all interleavings with at most three preemptions, which is enough to find the
/// errors in acceptable time.
fn check(model: impl Fn(Arc<Model>) + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || model(Arc::new(Model::new(Level::default()))));
}

/// Takes all events. Returns whether the last one was among them.
fn drain(shared: &Model, seen: &mut Vec<Happens>) -> bool {
    while let Some(news) = shared.take() {
        seen.push(news);
    }
    seen.last() == Some(&End)
}

#[test]
fn poller_receives_all_events_in_order_and_the_last_progress() {
    check(|shared| {
        let job = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                shared.publish(Instant);
                shared.publish(Progress(1));
                shared.publish(Progress(2));
                shared.decide(7);
                shared.end(End);
            }
        });
        let mut seen = Vec::new();
        loop {
            shared.signal().poll();
            if drain(&shared, &mut seen) {
                break;
            }
        }
        let whole = [Instant, Progress(1), Progress(2), End];
        assert!(seen == whole || seen == [Instant, Progress(2), End], "{seen:?}");
        assert_eq!(shared.outcome().as_deref(), Some(&7));
        job.join().unwrap();
        assert!(!shared.signal().is_up());
    });
}

#[test]
fn signal_is_raised_exactly_while_events_are_pending() {
    check(|shared| {
        let takers = [(); 2].map(|()| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.take())
        });
        shared.publish(Paused);
        shared.publish(Progress(1));
        shared.publish(Progress(2));
        let mut seen: Vec<_> =
            takers.into_iter().filter_map(|taker| taker.join().unwrap()).collect();
        // No thread takes events any more.
        loop {
            let up = shared.signal().is_up();
            let next = shared.take();
            assert_eq!(up, next.is_some(), "{seen:?} {next:?}");
            let Some(next) = next else { break };
            seen.push(next);
        }
        // Two threads that take at the same time can report the events in any order. None is taken
        // twice, and none is lost.
        seen.sort_by_key(|news| format!("{news:?}"));
        assert!(
            seen == [Paused, Progress(1), Progress(2)] || seen == [Paused, Progress(2)],
            "{seen:?}"
        );
    });
}

#[test]
fn start_returns_at_the_instant_or_at_the_end_if_earlier() {
    for comes in [true, false] {
        check(move |shared| {
            let job = thread::spawn({
                let shared = Arc::clone(&shared);
                move || {
                    shared.publish(Paused);
                    if comes {
                        shared.publish(Instant);
                    }
                    shared.decide(7);
                    shared.end(End);
                }
            });
            assert_eq!(shared.wait_instant(), comes);
            if !comes {
                assert_eq!(shared.outcome().as_deref(), Some(&7), "there is an error to return");
            }
            job.join().unwrap();
        });
    }
}

#[test]
fn waiters_for_the_end_wake_after_the_listener_was_called() {
    check(|shared| {
        let told = Arc::new(loom::sync::atomic::AtomicBool::new(false));
        let waiters = [(); 2].map(|()| {
            let (shared, told) = (Arc::clone(&shared), Arc::clone(&told));
            thread::spawn(move || {
                assert!(shared.wait_ended(None));
                assert_eq!(shared.outcome().as_deref(), Some(&7));
                assert!(told.load(loom::sync::atomic::Ordering::Relaxed));
            })
        });
        shared.publish(Instant);
        shared.decide(7);
        told.store(true, loom::sync::atomic::Ordering::Relaxed);
        shared.end(End);
        for waiter in waiters {
            waiter.join().unwrap();
        }
    });
}
