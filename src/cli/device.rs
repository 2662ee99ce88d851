//! Which device a command runs on: what `--device` asks for, what there is, and what the command needs.

use super::{Common, Failure, bad_flag, log};
use crate::device::cpu::{Cpu, Isa};
#[cfg(feature = "cuda")]
use crate::device::cuda::{Cuda, Driver, search::Searcher};
use crate::device::{Engine, Search};
use crate::objective::{DataKernel, Precision};
#[cfg(feature = "cuda")]
use std::sync::Arc;

/// A device that was found.
pub enum Device {
    /// This machine's cores.
    Cpu,
    /// A card, and its name.
    #[cfg(feature = "cuda")]
    Cuda(Arc<Driver>, String),
}

/// A device, and why it and not the other.
pub struct Choice {
    pub device: Device,
    /// For stderr, where nobody insisted on one.
    note: Option<String>,
    precision: Option<Precision>,
}

impl Common {
    /// The device that `--device` asks for. `only_cpu` says why the command could not run on a card, if it could not.
    pub fn choose(&self, only_cpu: Option<String>) -> Result<Choice, Failure> {
        let choice = |device, note| Choice { device, note, precision: self.precision };
        let cuda = match self.device() {
            "cpu" => return Ok(choice(Device::Cpu, None)),
            "auto" => None,
            "cuda" => Some(0),
            other => match other.strip_prefix("cuda:").and_then(|k| k.parse().ok()) {
                Some(k) => Some(k),
                None => return Err(bad_flag("--device", other, "auto, cpu, cuda or cuda:K")),
            },
        };
        // With f32 nothing is lost of what the CPU would compute; a card multiplies halves.
        let full = self.precision == Some(Precision::F32);
        let only_cpu = only_cpu.or_else(|| full.then(|| "f32 products are the CPU's".to_owned()));
        match (cuda, only_cpu.map_or_else(|| card(cuda.unwrap_or(0)), Err)) {
            (Some(_), Ok(device)) => Ok(choice(device, None)),
            (Some(_), Err(why)) => Err(bad_flag("--device", self.device(), format!("cpu or auto: {why}"))),
            (None, Ok(device)) => {
                let note = format!("device: {}; not cpu: a card is faster", device.name());
                Ok(choice(device, Some(note)))
            }
            (None, Err(why)) => {
                let note = format!("device: cpu ({}); not cuda: {why}", Isa::best().name());
                Ok(choice(Device::Cpu, Some(note)))
            }
        }
    }
}

#[cfg(feature = "cuda")]
fn card(ordinal: usize) -> Result<Device, String> {
    use crate::device::cuda::{cards, carried};
    let found = cards().map_err(|e| e.to_string())?;
    let count = found.len();
    let Some(info) = found.into_iter().nth(ordinal) else {
        return Err(if count == 0 {
            "the driver sees no card".into()
        } else {
            format!("the driver sees {count} cards, counted from 0")
        });
    };
    info.module(&carried()).map_err(|e| e.to_string())?;
    let driver = Driver::new(ordinal).map_err(|e| e.to_string())?;
    Ok(Device::Cuda(Arc::new(driver), format!("cuda:{ordinal} ({})", info.name)))
}

#[cfg(not(feature = "cuda"))]
fn card(_: usize) -> Result<Device, String> {
    Err("built without the feature cuda".into())
}

/// Why no card can be used, if none can.
pub fn why_not_cuda() -> Option<String> {
    card(0).err()
}

/// Why a loss runs on the CPU alone, if it does. `gram` is the kernel whose exact Gram matrix the MMD losses compare, if
/// they do.
pub fn only_cpu(gram: Option<DataKernel>) -> Option<String> {
    matches!(gram, Some(DataKernel::Gaussian { .. }))
        .then(|| "the exact Gram matrix of a gaussian kernel is the CPU's (--features F approximates it)".to_owned())
}

impl Device {
    /// For people.
    fn name(&self) -> &str {
        match self {
            Device::Cpu => "cpu",
            #[cfg(feature = "cuda")]
            Device::Cuda(_, name) => name,
        }
    }
}

impl Choice {
    /// As JSON has it.
    pub fn kind(&self) -> &'static str {
        match self.device {
            Device::Cpu => "cpu",
            #[cfg(feature = "cuda")]
            Device::Cuda(..) => "cuda",
        }
    }

    /// The precision asked for, or the device's own: f32 on the CPU, bf16 on a card.
    pub fn precision(&self) -> Precision {
        self.precision.unwrap_or(if self.kind() == "cpu" { Precision::F32 } else { Precision::Bf16 })
    }

    /// What embeddings are rounded to where they are kept: what --precision says, and f32 where it says nothing.
    pub fn storage(&self) -> Precision {
        self.precision.unwrap_or(Precision::F32)
    }

    /// The loss engine of the device; `workspace` as [`Cpu::set_workspace`] has it.
    pub fn engine(&self, workspace: usize) -> Box<dyn Engine> {
        match &self.device {
            Device::Cpu => {
                let mut cpu = Cpu::new();
                cpu.set_workspace(workspace);
                Box::new(cpu)
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(driver, _) => Box::new(Cuda::new(driver, self.precision())),
        }
    }

    /// Exact search on the device; `None` where it is this machine's cores.
    pub fn search(&self) -> Option<Box<dyn Search>> {
        match &self.device {
            Device::Cpu => None,
            #[cfg(feature = "cuda")]
            Device::Cuda(driver, _) => Some(Box::new(Searcher::new(driver))),
        }
    }

    /// Under `--device auto`, says which device it is and why not the other. Called once the input is known to be good:
    /// bad input is one line on stderr, its own.
    pub fn announce(&self) {
        if let Some(note) = &self.note {
            log(format_args!("{note}"));
        }
    }
}
