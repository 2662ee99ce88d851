//! From an axis' units to the page's: ranges, ticks and their labels.

use super::Axis;

/// An axis laid onto the page.
pub struct Scale {
    log: bool,
    /// Ends, in logarithms where the axis is logarithmic.
    ends: [f64; 2],
    /// Where the ends are on the page.
    page: [f64; 2],
}

impl Scale {
    /// An axis that holds `values`, from `page[0]` to `page[1]`. Numbers that are not finite, and on a logarithmic axis those
    /// not above zero, are left out here and when drawn.
    pub fn new(axis: &Axis, values: impl Iterator<Item = f64>, page: [f64; 2]) -> Self {
        let log = axis.log;
        let of = |x: f64| if log { x.log10() } else { x };
        let ends = match axis.range {
            _ if !axis.names.is_empty() => [-0.5, axis.names.len() as f64 - 0.5],
            Some(range) => range.map(of),
            None => {
                let finite = values.map(of).filter(|x| x.is_finite());
                let [low, high] =
                    finite.fold([f64::INFINITY, f64::NEG_INFINITY], |[low, high], x| [low.min(x), high.max(x)]);
                match high - low {
                    width if width > 0.0 => [low - 0.05 * width, high + 0.05 * width],
                    // One value, or none.
                    0.0 => [low - 0.5, high + 0.5],
                    _ => [0.0, 1.0],
                }
            }
        };
        Scale { log, ends, page }
    }
    /// Units of the axis for a unit of the page.
    pub fn unit(&self) -> f64 {
        ((self.ends[1] - self.ends[0]) / (self.page[1] - self.page[0])).abs()
    }
    /// Where `x` is on the page; `None` when it is nowhere.
    pub fn at(&self, x: f64) -> Option<f64> {
        let x = if self.log { x.log10() } else { x };
        let share = (x - self.ends[0]) / (self.ends[1] - self.ends[0]);
        share.is_finite().then(|| self.page[0] + share * (self.page[1] - self.page[0]))
    }
    /// [`Scale::ticks`] along a line of text whose letters are `letter` wide: where labels would touch, a logarithmic axis
    /// leaves some out, powers of ten last.
    pub fn spaced(&self, letter: f64) -> Vec<(f64, String)> {
        let mut ticks = self.ticks();
        if self.log {
            let reach = |(x, label): &(f64, String)| {
                let half = 0.5 * letter * label.chars().count() as f64;
                self.at(*x).map_or([0.0; 2], |at| [at - half, at + half])
            };
            let mut taken: Vec<[f64; 2]> = vec![];
            // Powers of ten first, then what is twice one.
            for first in ['1', '2', '5'] {
                for tick in ticks.iter_mut().filter(|(_, label)| label.starts_with(first)) {
                    let [low, high] = reach(tick);
                    if taken.iter().any(|[a, b]| low < *b && *a < high) {
                        tick.1.clear();
                    } else {
                        taken.push([low, high]);
                    }
                }
            }
        }
        ticks
    }
    /// Values with labels, about five.
    pub fn ticks(&self) -> Vec<(f64, String)> {
        let inside = |x: &f64| (self.ends[0] - 1e-9..=self.ends[1] + 1e-9).contains(x);
        if self.log {
            let decades = self.ends[1] - self.ends[0];
            let factors: &[f64] = if decades > 2.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
            let every = (decades / 6.0).ceil().max(1.0) as i32;
            let range = self.ends[0].floor() as i32..=self.ends[1].ceil() as i32;
            let powers = range.filter(|power| power.rem_euclid(every) == 0);
            let values = powers.flat_map(|power| factors.iter().map(move |f| (f * 10f64.powi(power), *f, power)));
            return values
                .filter(|(x, ..)| inside(&x.log10()))
                .map(|(x, f, power)| (x, power_of_ten(f, power)))
                .collect();
        }
        let rough = (self.ends[1] - self.ends[0]) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|f| f * power).into_iter().find(|&s| s >= rough * 0.999).unwrap_or(rough);
        let digits = (-step.log10().floor()).max(0.0) as usize;
        let first = (self.ends[0] / step).ceil() as i64;
        let ticks = (0..20).map(|i| (first + i) as f64 * step).take_while(inside);
        ticks.map(|x| (x, minus(&format!("{:.digits$}", x + 0.0)))).collect()
    }
}

/// `factor 10^power`: as it is between 0.1 and a million, else as a power.
fn power_of_ten(factor: f64, power: i32) -> String {
    if (-1..6).contains(&power) {
        let whole = format!("{}", (factor * 10f64.powi(power) * 10.0).round() / 10.0);
        return if power >= 4 { format!("{},{}", &whole[..whole.len() - 3], &whole[whole.len() - 3..]) } else { whole };
    }
    let raised: String = power
        .to_string()
        .chars()
        .map(|c| match c {
            '-' => '⁻',
            digit => ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'][digit as usize - '0' as usize],
        })
        .collect();
    if factor == 1.0 { format!("10{raised}") } else { format!("{factor}·10{raised}") }
}

/// A number with a minus sign for a hyphen.
fn minus(text: &str) -> String {
    text.replace('-', "−")
}
