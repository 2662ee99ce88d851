//! Batches gathered beside compute.

use super::{Order, Side, Source};
use std::{
    io,
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread::{self, Scope},
};

/// One batch of pairs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PairBatch {
    /// The epoch it belongs to.
    pub epoch: u64,
    /// Its number within the epoch, from 0.
    pub step: u64,
    /// The samples in it, `[batch]`.
    pub index: Vec<usize>,
    /// Their u side, `[batch, dim_u]`.
    pub u: Vec<f32>,
    /// Their v side, `[batch, dim_v]`.
    pub v: Vec<f32>,
}

/// The endless stream of batches of a run, gathered by a thread ahead of the reader.
///
/// Batch `step` of `epoch` is samples `permute(seed, epoch, n, step * batch + i)`; the last incomplete batch of an
/// epoch is dropped. Two groups of batches go round, so nothing is allocated after the second.
#[derive(Debug)]
pub struct Prefetch {
    ready: Receiver<Vec<PairBatch>>,
    spare: Sender<Vec<PairBatch>>,
    current: Vec<PairBatch>,
    /// Batches of the group that were read.
    read: usize,
}

/// Numbers of a group: as many small batches are handed over at once, since the handing over of one, which wakes a thread,
/// takes longer than its gathering.
const GROUP: usize = 1 << 16;

impl Prefetch {
    /// Batches in an epoch of `samples`.
    pub fn steps_per_epoch(samples: usize, batch: usize) -> u64 {
        (samples / batch) as u64
    }
    /// Starts gathering at `(epoch, step)`, on a thread of `scope` that ends when this value is dropped.
    /// A `step` at or beyond the epoch's end carries over into the next.
    ///
    /// # Errors
    /// The system's, where it makes no thread.
    ///
    /// # Panics
    /// When `batch` is 0 or larger than the source.
    pub fn spawn<'scope, S: Source + ?Sized>(
        scope: &'scope Scope<'scope, '_>,
        source: &'scope S,
        seed: u64,
        batch: usize,
        epoch: u64,
        step: u64,
    ) -> io::Result<Self> {
        assert!(0 < batch && batch <= source.len(), "batch of {batch} from {} samples", source.len());
        let (filled, ready) = sync_channel(1);
        let (spare, empty) = channel();
        let group = (GROUP / (batch * (source.dim(Side::U) + source.dim(Side::V))).max(1)).max(1);
        // The other group of the two is `current`.
        spare.send(vec![PairBatch::default(); group]).expect("the receiver is alive");
        let steps = Self::steps_per_epoch(source.len(), batch);
        let (epoch, step) = (epoch + step / steps, step % steps);
        let gather = move || gather_all(source, seed, batch, epoch, step, &empty, &filled);
        thread::Builder::new().name("batches".into()).spawn_scoped(scope, gather)?;
        Ok(Prefetch { ready, spare, current: vec![PairBatch::default(); group], read: group })
    }
    /// The next batch. Waits for it when compute was faster than the gathering.
    pub fn next_batch(&mut self) -> &PairBatch {
        if self.read == self.current.len() {
            let next = self.ready.recv().expect("the gathering thread ended: its source panicked");
            let used = std::mem::replace(&mut self.current, next);
            // Nobody receives once the gathering thread has panicked, which the next call reports.
            let _ = self.spare.send(used);
            self.read = 0;
        }
        self.read += 1;
        &self.current[self.read - 1]
    }
}

/// Fills empty buffers until the reader is gone.
fn gather_all<S: Source + ?Sized>(
    source: &S,
    seed: u64,
    batch: usize,
    mut epoch: u64,
    mut step: u64,
    empty: &Receiver<Vec<PairBatch>>,
    filled: &SyncSender<Vec<PairBatch>>,
) {
    let n = source.len();
    let mut order = Order::new(seed, epoch, n);
    while let Ok(mut group) = empty.recv() {
        for buffer in &mut group {
            let first = step as usize * batch;
            buffer.epoch = epoch;
            buffer.step = step;
            buffer.index.clear();
            order.extend(first..first + batch, &mut buffer.index);
            buffer.u.resize(batch * source.dim(Side::U), 0.0);
            buffer.v.resize(batch * source.dim(Side::V), 0.0);
            source.gather(Side::U, &buffer.index, &mut buffer.u);
            source.gather(Side::V, &buffer.index, &mut buffer.v);
            step += 1;
            if step == Prefetch::steps_per_epoch(n, batch) {
                (epoch, step) = (epoch + 1, 0);
                order = Order::new(seed, epoch, n);
            }
        }
        if filled.send(group).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Memory, permute};
    use std::{thread, time::Duration};

    fn source(n: usize) -> Memory {
        Memory::new((0..3 * n).map(|x| x as f32).collect(), 3, (0..n).map(|x| -(x as f32)).collect(), 1)
    }

    /// The definition, without a thread.
    fn expected(source: &Memory, seed: u64, batch: usize, epoch: u64, step: u64) -> PairBatch {
        let index: Vec<usize> =
            (0..batch).map(|i| permute(seed, epoch, source.len(), step as usize * batch + i)).collect();
        let u = index.iter().flat_map(|&i| (0..3).map(move |k| (3 * i + k) as f32)).collect();
        let v = index.iter().map(|&i| -(i as f32)).collect();
        PairBatch { epoch, step, index, u, v }
    }

    #[test]
    fn batches_are_the_definition_whatever_the_timing() {
        for (n, batch) in [(1, 1), (7, 7), (7, 3), (103, 10)] {
            let source = source(n);
            let steps = Prefetch::steps_per_epoch(n, batch);
            for (epoch, step) in [(0, 0), (2, steps - 1), (0, 2 * steps + steps / 2)] {
                for pause in [0, 300] {
                    thread::scope(|scope| {
                        let mut prefetch = Prefetch::spawn(scope, &source, 11, batch, epoch, step).unwrap();
                        for k in 0..25 {
                            let at = epoch * steps + step + k;
                            let want = expected(&source, 11, batch, at / steps, at % steps);
                            assert_eq!(*prefetch.next_batch(), want, "n = {n}, batch = {batch}");
                            if k % 3 == 0 {
                                thread::sleep(Duration::from_micros(pause));
                            }
                        }
                    });
                }
            }
        }
    }

    /// Hangs (rather than fails) if the thread does not notice that its reader is gone.
    #[test]
    fn dropping_it_early_or_at_once_ends_the_thread() {
        let source = source(100);
        for reads in 0..3 {
            thread::scope(|scope| {
                let mut prefetch = Prefetch::spawn(scope, &source, 0, 10, 0, 0).unwrap();
                for _ in 0..reads {
                    prefetch.next_batch();
                }
            });
        }
    }

    #[test]
    #[should_panic(expected = "batch of 101 from 100 samples")]
    fn a_batch_must_fit() {
        let source = source(100);
        thread::scope(|scope| drop(Prefetch::spawn(scope, &source, 0, 101, 0, 0)));
    }
}
