//! Drifters in a random flow that changes in time (section 6.3 of the paper).
//!
//! The stream function on the unit torus has the 49 wave numbers k in {-3..3}^2, and a drifter x moves by
//!
//! ```text
//! psi(x, t) = Re sum_k psi_k exp(i w_k t) exp(2 pi i k.x)        dx/dt = J grad psi(x, t),   J = [[0, -1], [1, 0]]
//! psi_k     = A exp(-|k|^2/4) (xi + i eta)/sqrt(2)               xi, eta ~ N(0, 1), drawn for every sample
//! w_k       ~ N(0, 1/T^2)                                        drawn once for a data set
//! ```
//!
//! u is the coefficients, `[2, 49]`: all real parts, then all imaginary parts, k_2 running fastest. v is where the
//! drifter that starts at (3/4, 3/4) is at P equally spaced times up to T = 0.1, `[P, 2]`; the start itself is left
//! out. Positions are continuous: a drifter leaves the unit square instead of jumping to its other side.
//!
//! A trajectory is that of the coefficients and frequencies as stored, in f32, integrated by RK4 in f64.

use super::npy::{write_npy_f32, write_npy_f32_parts};
use super::{DataError, Memory, write_set};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use std::array::from_fn;
use std::f64::consts::TAU;
use std::path::Path;

/// The largest wave number in each direction.
const WAVES: usize = 3;
/// Wave numbers in each direction.
const SIDE: usize = 2 * WAVES + 1;
/// Terms of the stream function.
pub const MODES: usize = SIDE * SIDE;
/// Numbers in u.
pub const COEFFICIENTS: usize = 2 * MODES;
/// T, the time of a trajectory.
pub const HORIZON: f64 = 0.1;
/// Where every drifter starts.
pub const START: [f64; 2] = [0.75, 0.75];
/// A: with it, the root mean square of the speed is 10, once around the torus in the time T.
const AMPLITUDE: f64 = 0.6364;
/// The random stream of the frequencies. Sample i has stream i.
const FREQUENCIES: u64 = u64::MAX;

/// What is kept of a trajectory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recording {
    /// P, the positions kept.
    pub positions: usize,
    /// Steps of the integrator from one to the next.
    pub every: usize,
}

/// The law of (u, v), and a sampler.
#[derive(Clone, Debug, PartialEq)]
pub struct Ocean {
    /// w_k, in radians a unit of time.
    pub frequencies: [f32; MODES],
    recording: Recording,
    seed: u64,
}

/// The velocity field of one sample.
#[derive(Clone, Debug)]
pub struct Flow {
    /// What is summed at t = 0, and the frequencies at which it turns: the terms of half of the wave numbers, and of
    /// the others their conjugates, which have the same real part.
    terms: [(Half, [[f64; LANES]; SIDE]); 2],
}

/// k_1 in a half of the wave numbers: 0 to 3.
const LANES: usize = WAVES + 1;

/// Complex numbers for the wave numbers k_1 >= 0, `[k_2, k_1]`, real and imaginary parts. Those of k_1 = 0, k_2 < 0,
/// which are in the other half, are zero.
#[derive(Clone, Copy, Debug)]
struct Half {
    re: [[f64; LANES]; SIDE],
    im: [[f64; LANES]; SIDE],
}

/// A complex number.
type Complex = [f64; 2];

impl Recording {
    /// The paper's: every tenth of 10,000 steps of 1e-5.
    pub const PAPER: Recording = Recording { positions: 1000, every: 10 };
    /// For short runs: every tenth of 1000 steps of 1e-4.
    pub const QUICK: Recording = Recording { positions: 100, every: 10 };

    /// Time of a step.
    pub fn dt(self) -> f64 {
        HORIZON / (self.positions * self.every) as f64
    }
    /// Numbers in v.
    pub fn dim(self) -> usize {
        2 * self.positions
    }
}

impl Ocean {
    /// The data set of `seed`.
    pub fn new(seed: u64, recording: Recording) -> Self {
        let mut rng = stream(seed, FREQUENCIES);
        Ocean { frequencies: from_fn(|_| (normal(&mut rng) / HORIZON) as f32), recording, seed }
    }
    /// u of sample `i`: a function of (seed, i) alone.
    pub fn coefficients(&self, i: usize) -> [f32; COEFFICIENTS] {
        let mut rng = stream(self.seed, i as u64);
        from_fn(|at| {
            let [k1, k2] = wave_number(at % MODES).map(f64::from);
            (AMPLITUDE * (-(k1 * k1 + k2 * k2) / 4.0).exp() * normal(&mut rng) / 2f64.sqrt()) as f32
        })
    }
    /// The first `samples` pairs.
    pub fn sample(&self, samples: usize) -> Memory {
        let [mut u, mut v] = [COEFFICIENTS, self.recording.dim()].map(|dim| vec![0.0; samples * dim]);
        self.draw_u(0, &mut u);
        self.draw_v(0, &mut v);
        Memory::new(u, COEFFICIENTS, v, self.recording.dim())
    }
    /// Writes the first `samples` pairs to `folder`, which are never all in memory: `u.npy` `[samples, 98]`, `v.npy`
    /// `[samples, 2 P]` and `frequencies.npy` `[49]`, all f32.
    ///
    /// # Errors
    /// [`DataError::Write`] naming the file.
    pub fn write(&self, folder: &Path, samples: usize) -> Result<(), DataError> {
        const PART: usize = 1024;
        let file = |folder: &Path, name: &str, dim: usize, draw: &dyn Fn(usize, &mut [f32])| {
            write_npy_f32_parts(folder.join(name), &[samples, dim], |push| {
                let mut part = vec![0.0; PART * dim];
                (0..samples).step_by(PART).try_for_each(|first| {
                    let part = &mut part[..PART.min(samples - first) * dim];
                    draw(first, part);
                    push(part)
                })
            })
        };
        write_set(folder, |folder| {
            write_npy_f32(folder.join("frequencies.npy"), &[MODES], &self.frequencies)?;
            file(folder, "u.npy", COEFFICIENTS, &|first, u| self.draw_u(first, u))?;
            file(folder, "v.npy", self.recording.dim(), &|first, v| self.draw_v(first, v))
        })
    }
    /// u of the samples from `first` on that `u` `[.., 98]` has room for.
    fn draw_u(&self, first: usize, u: &mut [f32]) {
        u.par_chunks_exact_mut(COEFFICIENTS)
            .enumerate()
            .for_each(|(i, u)| u.copy_from_slice(&self.coefficients(first + i)));
    }
    /// v of the samples from `first` on that `v` `[.., 2 P]` has room for.
    fn draw_v(&self, first: usize, v: &mut [f32]) {
        v.par_chunks_exact_mut(self.recording.dim()).enumerate().for_each(|(i, v)| {
            let path = Flow::new(&self.coefficients(first + i), &self.frequencies).trajectory(self.recording);
            v.iter_mut().zip(path.as_flattened()).for_each(|(v, &x)| *v = x as f32);
        });
    }
}

impl Flow {
    /// The flow of coefficients `u` and `frequencies` as a data set stores them.
    pub fn new(u: &[f32; COEFFICIENTS], frequencies: &[f32; MODES]) -> Self {
        let (re, im) = u.split_at(MODES);
        let term = |conjugate: bool| {
            let sign = if conjugate { -1.0 } else { 1.0 };
            // -k has the index of k from the other end. Zero is its own opposite, and is counted once.
            let of = |x: &[f32], [k2, k1]: [usize; 2], sign: f64| {
                let at = (k1 + WAVES) * SIDE + k2;
                let left_out = at < MODES / 2 || (conjugate && at == MODES / 2);
                let at = if conjugate { MODES - 1 - at } else { at };
                if left_out { 0.0 } else { sign * f64::from(x[at]) }
            };
            let grid = |x: &[f32], sign: f64| from_fn(|k2| from_fn(|k1| of(x, [k2, k1], sign)));
            (Half { re: grid(re, 1.0), im: grid(im, sign) }, grid(frequencies, sign))
        };
        Flow { terms: [term(false), term(true)] }
    }
    /// psi(x, t).
    pub fn stream(&self, x: [f64; 2], t: f64) -> f64 {
        self.at(t).evaluate(x)[0]
    }
    /// dx/dt at (x, t).
    pub fn velocity(&self, x: [f64; 2], t: f64) -> [f64; 2] {
        self.at(t).velocity(x)
    }
    /// Positions of the drifter, `[P, 2]`.
    pub fn trajectory(&self, recording: Recording) -> Vec<[f64; 2]> {
        let Recording { positions, every } = recording;
        let dt = recording.dt();
        // Phases are turned on, not computed. Two turns, so that a thousand roundings add up and not twenty thousand.
        let [half, whole] = [0.5, every as f64].map(|steps| self.turn(steps * dt));
        let (mut x, mut first) = (START, self.terms_at(0.0));
        let path = (0..positions).map(|_| {
            let (mut terms, mut now) = (first, Half::sum(&first));
            for _ in 0..every {
                let [middle, next] = from_fn(|_| {
                    terms = from_fn(|i| terms[i].times(&half[i]));
                    Half::sum(&terms)
                });
                x = step(x, dt, [&now, &middle, &next]);
                now = next;
            }
            first = from_fn(|i| first[i].times(&whole[i]));
            x
        });
        path.collect()
    }
    /// The divergence of the velocity at (x, t), by differences of order 8. It is 0 but for rounding, which the
    /// differences make some 1e-12 of.
    pub fn divergence(&self, x: [f64; 2], t: f64) -> f64 {
        let spacing = 1e-3;
        let along = |axis: usize| {
            let at = |j: usize| from_fn(|i| x[i] + if i == axis { (j as f64 - 4.0) * spacing } else { 0.0 });
            slope(from_fn(|j| self.velocity(at(j), t)[axis]), spacing)
        };
        along(0) + along(1)
    }
    /// The largest component of dx/dt - velocity on the recorded positions, by differences of order 8.
    pub fn residual(&self, recording: Recording) -> f64 {
        let spacing = recording.dt() * recording.every as f64;
        let path = self.trajectory(recording);
        let mut worst = 0.0f64;
        for (p, nine) in path.windows(9).enumerate() {
            let velocity = self.velocity(nine[4], (p + 5) as f64 * spacing);
            for i in 0..2 {
                worst = worst.max((slope(from_fn(|j| nine[j][i]), spacing) - velocity[i]).abs());
            }
        }
        worst
    }
    /// How far from where it should be the drifter is at T after so many steps; 16,000 steps tell where it should be.
    pub fn error(&self, steps: usize) -> f64 {
        let [a, b] = [steps, 16_000].map(|every| self.trajectory(Recording { positions: 1, every })[0]);
        (a[0] - b[0]).hypot(a[1] - b[1])
    }
    /// The field at one time.
    fn at(&self, t: f64) -> Half {
        Half::sum(&self.terms_at(t))
    }
    fn terms_at(&self, t: f64) -> [Half; 2] {
        let turn = self.turn(t);
        from_fn(|i| self.terms[i].0.times(&turn[i]))
    }
    /// exp(i w t) for both terms.
    fn turn(&self, t: f64) -> [Half; 2] {
        self.terms.each_ref().map(|(_, frequencies)| {
            let of = |part: fn(f64) -> f64| frequencies.map(|lanes| lanes.map(|w| part(w * t)));
            Half { re: of(f64::cos), im: of(f64::sin) }
        })
    }
}

impl Half {
    #[inline]
    fn times(&self, by: &Half) -> Half {
        let mut out = Half { re: [[0.0; LANES]; SIDE], im: [[0.0; LANES]; SIDE] };
        for k2 in 0..SIDE {
            for k1 in 0..LANES {
                let ([a, b], [c, d]) = ([self.re[k2][k1], self.im[k2][k1]], [by.re[k2][k1], by.im[k2][k1]]);
                out.re[k2][k1] = a * c - b * d;
                out.im[k2][k1] = a * d + b * c;
            }
        }
        out
    }
    #[inline]
    fn sum([a, b]: &[Half; 2]) -> Half {
        let mut out = *a;
        for k2 in 0..SIDE {
            for k1 in 0..LANES {
                out.re[k2][k1] += b.re[k2][k1];
                out.im[k2][k1] += b.im[k2][k1];
            }
        }
        out
    }
    /// psi and its two derivatives at x, of a sum of terms.
    #[inline]
    fn evaluate(&self, x: [f64; 2]) -> [f64; 3] {
        let [a, b] = x.map(powers);
        // For each k_1, the sum over k_2 of the terms, and of the terms times k_2: four sums side by side.
        let (mut re, mut im) = ([0.0; LANES], [0.0; LANES]);
        let (mut slope_re, mut slope_im) = ([0.0; LANES], [0.0; LANES]);
        for k2 in 0..SIDE {
            let k = k2 as f64 - WAVES as f64;
            let [c, s] = b[k2.abs_diff(WAVES)];
            let s = if k2 < WAVES { -s } else { s };
            for k1 in 0..LANES {
                let term = [self.re[k2][k1] * c - self.im[k2][k1] * s, self.re[k2][k1] * s + self.im[k2][k1] * c];
                re[k1] += term[0];
                im[k1] += term[1];
                slope_re[k1] += k * term[0];
                slope_im[k1] += k * term[1];
            }
        }
        let mut out = [0.0; 3];
        for k1 in 0..LANES {
            let [c, s] = a[k1];
            out[0] += re[k1] * c - im[k1] * s;
            out[1] -= TAU * k1 as f64 * (re[k1] * s + im[k1] * c);
            out[2] -= TAU * (slope_re[k1] * s + slope_im[k1] * c);
        }
        out
    }
    #[inline]
    fn velocity(&self, x: [f64; 2]) -> [f64; 2] {
        let [_, d1, d2] = self.evaluate(x);
        [-d2, d1]
    }
}

/// A step of RK4 in the fields at its beginning, middle and end.
fn step(x: [f64; 2], dt: f64, [now, half, next]: [&Half; 3]) -> [f64; 2] {
    let on = |slope: [f64; 2], dt: f64| [x[0] + dt * slope[0], x[1] + dt * slope[1]];
    let k1 = now.velocity(x);
    let k2 = half.velocity(on(k1, dt / 2.0));
    let k3 = half.velocity(on(k2, dt / 2.0));
    let k4 = next.velocity(on(k3, dt));
    on(from_fn(|i| k1[i] + 2.0 * (k2[i] + k3[i]) + k4[i]), dt / 6.0)
}

/// The derivative of equally spaced values, at the fifth of nine, to order 8.
fn slope(values: [f64; 9], spacing: f64) -> f64 {
    let weights = [4.0 / 5.0, -1.0 / 5.0, 4.0 / 105.0, -1.0 / 280.0];
    (1..=4).map(|i| weights[i - 1] * (values[4 + i] - values[4 - i])).sum::<f64>() / spacing
}

/// Powers 0 to 3 of exp(2 pi i x).
fn powers(x: f64) -> [Complex; LANES] {
    let (s, c) = (TAU * x).sin_cos();
    let square = [c * c - s * s, 2.0 * c * s];
    [[1.0, 0.0], [c, s], square, [c * square[0] - s * square[1], c * square[1] + s * square[0]]]
}

/// The wave number of index `mode`.
fn wave_number(mode: usize) -> [i32; 2] {
    [mode / SIDE, mode % SIDE].map(|k| k as i32 - WAVES as i32)
}

fn stream(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    rng
}

fn normal(rng: &mut ChaCha8Rng) -> f64 {
    StandardNormal.sample(rng)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Npy, Side, Source};

    /// Flows of the first samples.
    fn flows(count: usize) -> Vec<Flow> {
        let ocean = Ocean::new(5, Recording::PAPER);
        (0..count).map(|i| Flow::new(&ocean.coefficients(i), &ocean.frequencies)).collect()
    }

    /// Points of space and time all over: multiples of irrational numbers.
    fn points(count: usize) -> impl Iterator<Item = ([f64; 2], f64)> {
        let all = (1..=count as u32).map(|i| [2f64, 3.0, 5.0].map(|root| (f64::from(i) * root.sqrt()).fract()));
        all.map(|[x, y, t]| ([x, -y], HORIZON * t))
    }

    fn median(mut x: Vec<f64>) -> f64 {
        x.sort_by(f64::total_cmp);
        x[x.len() / 2]
    }

    #[test]
    fn the_field_is_its_formula() {
        let ocean = Ocean::new(5, Recording::PAPER);
        for (i, (x, t)) in points(50).enumerate() {
            let u = ocean.coefficients(i);
            let [mut stream, mut velocity] = [0.0, 0.0].map(|z| [z, z]);
            for m in 0..MODES {
                let k = [(m / 7) as f64 - 3.0, (m % 7) as f64 - 3.0];
                let angle = f64::from(ocean.frequencies[m]) * t + TAU * (k[0] * x[0] + k[1] * x[1]);
                let (re, im) = (f64::from(u[m]), f64::from(u[MODES + m]));
                let d = -TAU * (re * angle.sin() + im * angle.cos());
                stream[0] += re * angle.cos() - im * angle.sin();
                velocity = [velocity[0] - k[1] * d, velocity[1] + k[0] * d];
            }
            let flow = Flow::new(&u, &ocean.frequencies);
            stream[1] = flow.stream(x, t);
            assert!((stream[0] - stream[1]).abs() < 1e-12, "{stream:?}");
            let found = flow.velocity(x, t);
            assert!((0..2).all(|i| (found[i] - velocity[i]).abs() < 1e-11), "{found:?} for {velocity:?}");
        }
    }

    #[test]
    fn the_field_is_periodic_and_without_divergence() {
        let mut worst = 0.0f64;
        for (flow, (x, t)) in flows(50).iter().zip(points(50)) {
            let moved = flow.velocity([x[0] - 2.0, x[1] + 5.0], t);
            assert!((0..2).all(|i| (moved[i] - flow.velocity(x, t)[i]).abs() < 1e-11));
            worst = worst.max(flow.divergence(x, t).abs());
        }
        println!("divergence {worst:.1e}, where derivatives of the velocity are about 100");
        // Rounding: a few 1e-16 of a point, times a derivative of 100, over 1e-3.
        assert!(worst < 1e-9, "{worst:e}");
    }

    #[test]
    fn the_integrator_has_order_4() {
        let flows = flows(20);
        let steps = [125, 250, 500, 1000, 2000];
        let errors = steps.map(|steps| median(flows.iter().map(|flow| flow.error(steps)).collect()));
        for (errors, steps) in errors.windows(2).zip(steps) {
            let order = (errors[0] / errors[1]).log2();
            println!("dt = T/{steps}: error {:.1e}, half of it: {:.1e}, order {order:.2}", errors[0], errors[1]);
            assert!((order - 4.0).abs() < 0.25, "{errors:?}");
        }
    }

    #[test]
    fn stored_positions_obey_the_equation() {
        for (recording, bound) in [(Recording::PAPER, 1e-8), (Recording::QUICK, 1e-3)] {
            // The velocity is about 10.
            for residual in flows(20).iter().map(|flow| flow.residual(recording)) {
                assert!(residual < bound, "{recording:?}: {residual:e}");
            }
        }
    }

    #[test]
    fn drifters_cross_a_good_part_of_the_torus() {
        // E|velocity|^2 = 2 pi^2 sum_k |k|^2 E|psi_k|^2.
        let square = |m: usize| wave_number(m).map(|k| f64::from(k * k)).iter().sum::<f64>();
        let energy: f64 = (0..MODES).map(|m| square(m) * (AMPLITUDE * (-square(m) / 4.0).exp()).powi(2)).sum();
        assert!((TAU * TAU / 2.0 * energy - 100.0).abs() < 0.01, "{energy}");

        let paths: Vec<_> = flows(400).iter().map(|flow| flow.trajectory(Recording::QUICK)).collect();
        let gap = |a: &[f64; 2], b: &[f64; 2]| (a[0] - b[0]).hypot(a[1] - b[1]);
        let of = |f: &dyn Fn(&Vec<[f64; 2]>) -> f64| median(paths.iter().map(f).collect());
        let end = of(&|path| gap(&START, &path[99]));
        let far = of(&|path| path.iter().map(|x| gap(&START, x)).fold(0.0, f64::max));
        let length = of(&|path| gap(&START, &path[0]) + path.windows(2).map(|x| gap(&x[0], &x[1])).sum::<f64>());
        println!("medians: displacement {end:.2}, largest displacement {far:.2}, length {length:.2}");
        assert!(far > 0.35 && length > 0.8, "{far} {length}");
    }

    #[test]
    fn no_two_samples_are_one() {
        let ocean = Ocean::new(5, Recording::QUICK);
        let first: Vec<f32> = (0..40).map(|i| ocean.coefficients(i)[0]).collect();
        assert!((0..40).all(|i| (0..i).all(|j| first[i] != first[j])), "{first:?}");
    }

    #[test]
    fn samples_depend_on_seed_and_index_alone() {
        let ocean = |seed| Ocean::new(seed, Recording { positions: 8, every: 3 });
        let many = ocean(3).sample(37);
        assert_eq!((many.len(), many.dim(Side::U), many.dim(Side::V)), (37, 98, 16));
        let single = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(single.install(|| ocean(3).sample(37)), many);
        let few = ocean(3).sample(5);
        assert_eq!(many.side(Side::U)[..5 * 98], *few.side(Side::U));
        assert_eq!(many.side(Side::V)[..5 * 16], *few.side(Side::V));
        let other = ocean(4);
        assert_ne!(other.sample(5), few);
        assert_ne!(other.frequencies, ocean(3).frequencies);
    }

    /// Files are the samples, beyond one part too, and hold all that is needed to make a trajectory again.
    #[test]
    fn files_hold_the_samples() {
        let folder = tempfile::tempdir().unwrap();
        let ocean = Ocean::new(7, Recording { positions: 2, every: 1 });
        ocean.write(folder.path(), 1027).unwrap();
        let read = |name: &str| Npy::open(folder.path().join(name)).unwrap();
        let (u, v, frequencies) = (read("u.npy"), read("v.npy"), read("frequencies.npy"));
        let sample = ocean.sample(1027);
        assert_eq!(u.as_f32().unwrap(), sample.side(Side::U));
        assert_eq!(v.as_f32().unwrap(), sample.side(Side::V));
        let last = u.as_f32().unwrap()[1026 * COEFFICIENTS..].try_into().unwrap();
        let flow = Flow::new(last, frequencies.as_f32().unwrap().try_into().unwrap());
        let again = flow.trajectory(Recording { positions: 2, every: 1 });
        assert!(again.as_flattened().iter().map(|&x| x as f32).eq(v.as_f32().unwrap()[1026 * 4..].iter().copied()));
    }
}
