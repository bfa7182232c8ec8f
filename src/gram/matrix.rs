//! The Gram matrix of a bank: the inner product of every two adapters, in one pass over the files.

use std::{
    sync::{Condvar, Mutex, PoisonError},
    time::Duration,
};

use faer::Mat;

use super::{deltas::Deltas, parameters::Parameters};
use crate::{
    adapter::Adapter,
    blocks::{Options, Plan},
    error::{Error, Result},
    joint::{Joint, Reader, each_on_threads, joint_modules},
    watch::Watch,
};

/// What the inner product of two adapters is taken of. Modules that one of them lacks are zero.
#[derive(Debug, Clone, Copy)]
pub enum Space<'a> {
    /// All numbers of A and B, side by side; a smaller rank counts as one padded with zeros.
    Parameters,
    /// ΔW = s B A, with a strength s for each adapter and module of its layout.
    Deltas(&'a [Vec<f64>]),
}

/// Inner products of adapters: G_ij = Σ_modules ⟨X_i, X_j⟩. Products are taken in float32 and
/// summed in float64; results do not depend on the number of threads.
pub struct Gram<'a> {
    adapters: Vec<&'a Adapter>,
    joints: Vec<Joint>,
    way: Way<'a>,
    tasks: Vec<Task>,
    options: Options,
    plan: Plan,
}

enum Way<'a> {
    Parameters(Parameters),
    Deltas(Deltas<'a>),
}

/// What a thread does in one go: the rows of some of a module's holders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Task {
    pub(super) joint: usize,
    /// As indices into the joint's holders.
    pub(super) rows: std::ops::Range<usize>,
}

/// The inner product of two adapters in a part of a module.
pub(super) type Entry = (usize, usize, f64);

impl<'a> Gram<'a> {
    /// Prepare the inner products of `adapters` in `space`.
    ///
    /// # Errors
    /// The adapters' modules fit different base models; the memory budget is too small; there is
    /// not a strength for each module.
    pub fn new(adapters: &'a [Adapter], space: Space<'a>, options: Options) -> Result<Self> {
        let adapters: Vec<&Adapter> = adapters.iter().collect();
        adapters.iter().try_for_each(|adapter| adapter.plain("an inner product of factors"))?;
        let mut joints = joint_modules(&adapters)?;
        let (way, tasks, need, bytes) = match space {
            Space::Parameters => {
                joints.iter_mut().for_each(|joint| *joint = joint.flat());
                let way = Parameters::new(&joints, options.memory);
                let whole = |joint: usize| Task { joint, rows: 0..joints[joint].holders.len() };
                let tasks = (0..joints.len()).map(whole).collect();
                let need = joints.iter().map(|joint| way.need(joint)).max().unwrap_or(0);
                (Way::Parameters(way), tasks, need, None)
            }
            Space::Deltas(strengths) => {
                let fits = |(adapter, own): (&&Adapter, &Vec<f64>)| {
                    own.len() == adapter.layout.modules.len() && own.iter().all(|s| s.is_finite())
                };
                if strengths.len() != adapters.len() || !adapters.iter().zip(strengths).all(fits) {
                    let text = "expected a finite strength for each adapter and module";
                    return Err(Error::Setting(text.to_owned()));
                }
                let way = Deltas::new(&adapters, &joints, strengths, options.memory);
                let tasks: Vec<Task> =
                    (0..joints.len()).flat_map(|joint| way.tasks(joint, &joints[joint])).collect();
                let need = joints.iter().map(|joint| way.need(joint)).max().unwrap_or(0);
                let bytes = tasks.iter().map(|task| way.bytes(&joints[task.joint], task)).sum();
                (Way::Deltas(way), tasks, need, Some(bytes))
            }
        };
        let mut plan = Plan::of_modules(&adapters, &joints, |_| [1, 1], need, &options)?;
        plan.bytes = bytes.unwrap_or(plan.bytes);
        Ok(Self { adapters, joints, way, tasks, options, plan })
    }

    /// What the job will read and take, beside the matrices themselves.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The names of the modules that any adapter has, in order.
    pub fn modules(&self) -> Vec<&str> {
        self.joints.iter().map(|joint| &joint.module.name[..]).collect()
    }

    /// The matrix, n × n.
    ///
    /// # Errors
    /// A file cannot be read, or changed meanwhile; a number is not finite; `watch` said to stop.
    pub fn sum(&self, watch: &Watch) -> Result<Mat<f64>> {
        Ok(self.matrices(1, watch)?.remove(0))
    }

    /// The matrix of each module alone: those of `modules`, each n × n.
    ///
    /// # Errors
    /// As [`Self::sum`].
    pub fn of_modules(&self, watch: &Watch) -> Result<Vec<Mat<f64>>> {
        self.matrices(self.joints.len(), watch)
    }

    /// The sums of `count` equal shares of the modules: one matrix, or one a module.
    fn matrices(&self, count: usize, watch: &Watch) -> Result<Vec<Mat<f64>>> {
        let options = &self.options;
        let reader = Reader::open(&self.adapters, options.io, options.allow_nan, watch)?;
        let n = self.adapters.len();
        let sums = InOrder::new(vec![Mat::<f64>::zeros(n, n); count]);
        each_on_threads(
            self.tasks.len(),
            self.plan.threads,
            watch,
            Default::default,
            |room: &mut Room, index| {
                let task = &self.tasks[index];
                let joint = &self.joints[task.joint];
                let entries = match &self.way {
                    Way::Parameters(way) => way.entries(&reader, joint, room)?,
                    Way::Deltas(way) => way.entries(&reader, joint, &task.rows, room)?,
                };
                sums.change(index, watch, |matrices| {
                    let sum = &mut matrices[task.joint % count];
                    for (i, j, product) in entries {
                        sum[(i, j)] += product;
                        if i != j {
                            sum[(j, i)] += product;
                        }
                    }
                })
            },
        )?;
        reader.still_unchanged()?;
        Ok(sums.into_inner())
    }
}

/// What a thread keeps from task to task, so that it need not be allocated again.
#[derive(Default)]
pub(super) struct Room {
    pub(super) bytes: Vec<u8>,
    pub(super) own: Vec<f32>,
    pub(super) rows: [Vec<f32>; 4],
}

/// A value that tasks change in the order of their numbers, whatever threads they are on: so sums
/// are rounded alike for any number of threads.
struct InOrder<T> {
    value: Mutex<(usize, T)>,
    turn: Condvar,
}

impl<T> InOrder<T> {
    fn new(value: T) -> Self {
        Self { value: Mutex::new((0, value)), turn: Condvar::new() }
    }

    /// `change` it as task `index`, once all before have.
    ///
    /// # Errors
    /// `watch` said to stop.
    fn change(&self, index: usize, watch: &Watch, change: impl FnOnce(&mut T)) -> Result<()> {
        // A task before this one may fail, and never have its turn.
        const LOOK: Duration = Duration::from_millis(10);
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        while value.0 != index {
            watch.go_on()?;
            let waited = self.turn.wait_timeout(value, LOOK);
            value = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        change(&mut value.1);
        value.0 += 1;
        self.turn.notify_all();
        Ok(())
    }

    fn into_inner(self) -> T {
        self.value.into_inner().unwrap_or_else(PoisonError::into_inner).1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gram::tests::{matrix, open, specs};

    #[test]
    fn entries_are_inner_products_in_both_spaces_and_of_each_module() {
        let specs = specs();
        let (_folder, adapters) = open(&specs);
        let strengths = vec![vec![2.0, 1.0], vec![-1.0, 0.5], vec![3.0, 1.0]];
        let dot = |x: &Mat<f64>, y: &Mat<f64>| (x.transpose() * y).diagonal().column_vector().sum();
        for space in [Space::Parameters, Space::Deltas(&strengths)] {
            let gram = Gram::new(&adapters, space, Options::default()).unwrap();
            let watch = Watch::default();
            let found = gram.of_modules(&watch).unwrap();
            assert_eq!(watch.done(), gram.plan().bytes);
            for (module, found) in found.iter().enumerate() {
                let wanted = Mat::from_fn(3, 3, |i, j| {
                    let [a, b, c, d] = [(i, 0), (j, 0), (i, 1), (j, 1)]
                        .map(|(one, factor)| matrix(&specs[one], 2 * module + factor));
                    match space {
                        Space::Parameters => dot(&a, &b) + dot(&c, &d),
                        Space::Deltas(s) => s[i][module] * s[j][module] * dot(&(c * a), &(d * b)),
                    }
                });
                assert!((found - &wanted).norm_max() <= 1e-6 * wanted.norm_max());
            }
            let sum = gram.sum(&Watch::default()).unwrap();
            assert!((&found[0] + &found[1] - &sum).norm_max() <= 1e-12 * sum.norm_max());
        }
    }

    #[test]
    fn the_plan_keeps_to_the_budget() {
        let (_folder, adapters) = open(&specs());
        let strengths = vec![vec![1.0; 2]; 3];
        for space in [Space::Parameters, Space::Deltas(&strengths)] {
            let options = Options { memory: 1 << 20, ..Options::default() };
            let memory = options.memory;
            assert!(Gram::new(&adapters, space, options).unwrap().plan().memory <= memory);
        }
    }

    #[test]
    fn it_stops_where_it_is_told_to_and_refuses_strengths_that_do_not_fit() {
        let (_folder, adapters) = open(&specs());
        let gram = Gram::new(&adapters, Space::Parameters, Options::default()).unwrap();
        let watch = Watch::default();
        watch.stop();
        assert!(matches!(gram.sum(&watch), Err(Error::Stopped)));
        for strengths in [vec![vec![1.0; 2]; 2], vec![vec![1.0]; 3], vec![vec![f64::NAN; 2]; 3]] {
            let found = Gram::new(&adapters, Space::Deltas(&strengths), Options::default());
            assert!(matches!(found.err(), Some(Error::Setting(_))));
        }
    }
}
