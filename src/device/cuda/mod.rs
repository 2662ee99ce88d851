//! NVIDIA GPUs, through the driver found at run time. Their kernels are those of the crate `kernels`, embedded as PTX.
//!
//! | module | what |
//! | --- | --- |
//! | [`card`] | what an engine asks of a card, and memory over whatever answers: the driver, or an emulation in tests |
//! | [`driver`] | the card that is there |
//! | [`contrast`] | losses: which launches, in which order |
//! | [`search`] | ranks and best matches |
//! | [`random`] | random numbers |
//! | `verbs` | what encoders and optimisers are made of |
//!
//! A card is an [`Engine`](crate::Engine) like any other, of host memory:
//!
//! ```no_run
//! use contrastive::device::cuda::{Cuda, Driver};
//! use contrastive::{Batch, Engine, Gradients, Loss, Matrix, Objective, Precision, Tilting, Write};
//! use std::sync::Arc;
//!
//! # let (n, d) = (4096, 512);
//! # let (u, v, mut du) = (vec![0.1f32; n * d], vec![0.1f32; n * d], vec![0f32; n * d]);
//! let card = Arc::new(Driver::new(0)?);
//! let mut engine = Cuda::new(&card, Precision::Bf16);
//! let gradients = Gradients { u: Some(Write::Set(&mut du)), ..Gradients::default() };
//! let batch = Batch::new(Matrix::f32(&u, d), Matrix::f32(&v, d));
//! let value = engine.loss(&Loss::new(Tilting::Cosine, Objective::CLIP, 0.07), &batch, gradients)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What another program has on the card already is taken where it is, on that program's stream: here slices of `cudarc`. Buffers of
//! this crate ([`Buffer`]) go the same way, and with feature `cust` those of `cust`; whatever else by its address
//! ([`Driver::of_stream`], [`contrast::Cuda::loss_at`]).
//!
//! ```no_run
//! use contrastive::device::cuda::{Cuda, Driver};
//! use contrastive::{Loss, Objective, Pairs, Precision, Tilting, Write};
//! use cudarc::driver::CudaContext;
//! use std::sync::Arc;
//!
//! # let (n, d) = (4096, 512);
//! let stream = CudaContext::new(0)?.new_stream()?;
//! let u = stream.clone_htod(&vec![0.1f32; n * d])?;
//! let v = stream.clone_htod(&vec![0.2f32; n * d])?;
//! let (mut du, mut dv) = (stream.alloc_zeros::<f32>(n * d)?, stream.alloc_zeros::<f32>(n * d)?);
//! let mut engine = Cuda::new(&Arc::new(Driver::of_cudarc(&stream)?), Precision::Bf16);
//! let loss = Loss::new(Tilting::Cosine, Objective::CLIP, 0.07);
//! let out = [Some(Write::Set(&mut du)), Some(Write::Add(&mut dv))];
//! let value = engine.loss_on_card(&loss, &Pairs::default(), [&u, &v], d, None, out)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod card;
pub mod contrast;
pub mod driver;
pub mod random;
pub mod search;
mod verbs;

pub use card::{Arena, Buffer, Card};
pub use contrast::Cuda;
pub use driver::{Driver, cards};
use flate2::read::GzDecoder;
pub use kernels::abi::Module;
use std::io::Read;
use std::sync::OnceLock;

/// The oldest driver that reads the kernels' PTX (8.0): the CUDA version it reports, 1000 major + 10 minor.
pub const OLDEST_DRIVER: u32 = 12_000;

/// The least compute capability that has the kernels' instructions.
pub const LEAST_CAPABILITY: [u32; 2] = [8, 0];

/// A card as the driver describes it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct CardInfo {
    /// As the driver names it.
    pub name: String,
    /// Memory in bytes.
    pub memory: usize,
    /// Compute capability, major and minor.
    pub capability: [u32; 2],
    /// The CUDA version of the driver, 1000 major + 10 minor.
    pub driver: u32,
}

impl CardInfo {
    /// Which of the modules `carried` this card would run.
    ///
    /// # Errors
    /// Why it can run none: [`CudaError::DriverTooOld`], [`CudaError::Unsupported`] or [`CudaError::NoKernels`].
    pub fn module(&self, carried: &[Module]) -> Result<Module, CudaError> {
        supported(self.driver, self.capability)?;
        let fits = |module: &Module| carried.contains(module) && runs(*module, self.capability);
        let best = [Module::Hopper, Module::Portable].into_iter().find(fits);
        best.ok_or(CudaError::NoKernels { module: name(Module::Portable) })
    }
}

/// Whether cards of this capability run the module at all.
fn runs(module: Module, capability: [u32; 2]) -> bool {
    match module {
        Module::Portable => capability >= LEAST_CAPABILITY,
        // The instructions of sm_90a exist there and on no later card.
        Module::Hopper => capability == [9, 0],
    }
}

/// Fails where no kernel of ours can run.
fn supported(driver: u32, capability: [u32; 2]) -> Result<(), CudaError> {
    if driver < OLDEST_DRIVER {
        return Err(CudaError::DriverTooOld { found: driver, needed: OLDEST_DRIVER });
    }
    if capability < LEAST_CAPABILITY {
        return Err(CudaError::Unsupported { found: capability, needed: "8.0 or later" });
    }
    Ok(())
}

/// A module's name, which is its file's in kernels/ptx.
pub fn name(module: Module) -> &'static str {
    match module {
        Module::Portable => "portable",
        Module::Hopper => "hopper",
    }
}

/// The modules this build carries.
pub fn carried() -> Vec<Module> {
    [Module::Portable, Module::Hopper].into_iter().filter(|module| ptx(*module).is_ok()).collect()
}

/// The text of a module, which the program carries compressed.
fn ptx(module: Module) -> Result<&'static str, CudaError> {
    static TEXTS: [OnceLock<String>; 2] = [const { OnceLock::new() }; 2];
    let (packed, text): (&[u8], _) = match module {
        Module::Portable => (include_bytes!(concat!(env!("OUT_DIR"), "/portable.ptx.gz")), &TEXTS[0]),
        Module::Hopper => (include_bytes!(concat!(env!("OUT_DIR"), "/hopper.ptx.gz")), &TEXTS[1]),
    };
    let text = text.get_or_init(|| {
        let mut text = String::new();
        GzDecoder::new(packed).read_to_string(&mut text).expect("what build.rs packed");
        text
    });
    if text.is_empty() { Err(CudaError::NoKernels { module: name(module) }) } else { Ok(text) }
}

/// Bytes of the argument of the kernel `name`, as the text of its module declares it; `None` where it has none such.
fn argument_bytes(ptx: &str, name: &str) -> Option<usize> {
    let declared = format!(" {name}_param_0[");
    let size = &ptx[ptx.find(&declared)? + declared.len()..];
    size[..size.find(']')?].parse().ok()
}

/// What the driver answered instead of success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code {
    /// Its number in cuda.h.
    pub number: u32,
    /// Its name there.
    pub name: String,
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.name, self.number)?;
        f.write_str(match self.number {
            34 => "; what was found is a library to link with, not the driver's: take it off the library path",
            36 => "; install driver 525 or later",
            46 => "; another program has the card to itself: end it, or choose another card",
            100 => "; nvidia-smi lists the cards there are",
            700 | 714..=719 => {
                "; a kernel failed, and nothing more runs on the card in this process: start again, \
                 under compute-sanitizer to see which kernel"
            }
            702 => "; a card that also drives a display ends kernels that take seconds: give it fewer rows at a time, or another card",
            802 | 803 => "; the driver's parts are of different versions: restart the machine",
            _ => "",
        })
    }
}

/// Why a card cannot do what was asked.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// No driver on this machine.
    #[error("no NVIDIA driver (libcuda) found")]
    NoDriver,
    /// The driver is from before the kernels' language.
    #[error(
        "the NVIDIA driver is of CUDA {}, and {} is needed: install driver 525 or later",
        version(*found),
        version(*needed)
    )]
    DriverTooOld {
        /// The CUDA version it reports, 1000 major + 10 minor.
        found: u32,
        /// The least that would do.
        needed: u32,
    },
    /// The machine has fewer cards.
    #[error("no card {ordinal}: the driver sees {count}, counted from 0")]
    NoSuchCard {
        /// Which was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The card lacks the kernels' instructions.
    #[error("the card has compute capability {}.{}, and {needed} is needed", found[0], found[1])]
    Unsupported {
        /// Its compute capability.
        found: [u32; 2],
        /// What would do.
        needed: &'static str,
    },
    /// The card's memory is full.
    #[error(
        "the card is out of memory: {wanted} bytes wanted, {free} free; \
         make the batch smaller, or end what else runs there"
    )]
    OutOfMemory {
        /// Bytes of the one allocation that failed.
        wanted: usize,
        /// Bytes that were free.
        free: usize,
    },
    /// Built without the text of the kernels.
    #[error("this build carries no GPU kernels ({module}): build it where kernels/ptx/{module}.ptx is")]
    NoKernels {
        /// The module that is missing.
        module: &'static str,
    },
    /// The driver did not take the kernels.
    #[error("the driver does not load the {module} kernels: {log}; report this with the output of nvidia-smi")]
    Load {
        /// Which module.
        module: &'static str,
        /// What its compiler said, or what does not fit.
        log: String,
    },
    /// A kernel was not started.
    #[error("kernel {kernel} does not start on a grid of {grid:?}: {code}")]
    Launch {
        /// Its name.
        kernel: &'static str,
        /// Blocks in x, y and z.
        grid: [u32; 3],
        /// The answer.
        code: Code,
    },
    /// The driver refused something else, or reports what failed earlier.
    #[error("{call} answers {code}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// The answer.
        code: Code,
    },
    /// Not while launches are being recorded.
    #[error("{call}: not while a graph is recorded; only launches, copies within the card and fills can be")]
    Recording {
        /// What was asked.
        call: &'static str,
    },
    /// A part of a buffer that is not in it.
    #[error("elements {start}..{end} of a buffer of {len}")]
    Range {
        /// First element.
        start: usize,
        /// One past the last.
        end: usize,
        /// Elements in the buffer.
        len: usize,
    },
    /// Both sides of a copy must be equally long.
    #[error("a copy between {part} elements of a buffer and {other}: they must be as many")]
    Length {
        /// Elements of the part.
        part: usize,
        /// Elements of the other side.
        other: usize,
    },
    /// A launch of more blocks than any card takes.
    #[error(
        "{kernel} would take a grid of {grid:?}, and cards take at most 65535 down and deep: give it fewer rows at a time"
    )]
    Grid {
        /// The kernel.
        kernel: &'static str,
        /// Blocks across, down and deep.
        grid: [u32; 3],
    },
    /// Memory of one card is no other's.
    #[error(
        "numbers in the memory of another card or context: copy them through the host, or give the engine \
         theirs (Driver::of_cudarc, Driver::of_stream)"
    )]
    OtherCard,
    /// A shape that no kernel takes.
    #[error("the card's kernels need {0}; the CPU engine does without")]
    Shape(&'static str),
    /// No tensor that the TMA unit takes.
    #[error("a tensor map needs {0}")]
    Map(&'static str),
}

/// The driver's number of a CUDA version, as it is written: 12040 is 12.4.
pub fn version(number: u32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(driver: u32, capability: [u32; 2]) -> CardInfo {
        CardInfo { name: "a card".into(), memory: 1 << 34, capability, driver }
    }

    #[test]
    fn each_card_gets_the_module_it_can_run() {
        let both = [Module::Portable, Module::Hopper];
        for (capability, module) in [
            ([8, 0], Module::Portable),
            ([8, 9], Module::Portable),
            ([9, 0], Module::Hopper),
            ([10, 0], Module::Portable),
            ([12, 0], Module::Portable),
        ] {
            assert_eq!(info(12_040, capability).module(&both), Ok(module), "{capability:?}");
        }
        assert_eq!(info(12_000, [9, 0]).module(&[Module::Portable]), Ok(Module::Portable));
        let none = CudaError::NoKernels { module: "portable" };
        assert_eq!(info(12_000, [9, 0]).module(&[]), Err(none.clone()));
        assert_eq!(info(12_000, [8, 0]).module(&[Module::Hopper]), Err(none));
    }

    #[test]
    fn refusals_say_what_was_found_and_what_is_needed() {
        let old = info(11_040, [9, 0]).module(&carried()).unwrap_err().to_string();
        assert!(old.contains("CUDA 11.4") && old.contains("12.0") && old.contains("525"), "{old}");
        let small = info(12_020, [7, 5]).module(&carried()).unwrap_err().to_string();
        assert!(small.contains("7.5") && small.contains("8.0 or later"), "{small}");
        let full = CudaError::OutOfMemory { wanted: 4096, free: 512 }.to_string();
        assert!(full.contains("4096") && full.contains("512") && full.contains("smaller"), "{full}");
        let code = Code { number: 700, name: "CUDA_ERROR_ILLEGAL_ADDRESS".into() };
        let lost = CudaError::Driver { call: "cuStreamSynchronize", code }.to_string();
        assert!(lost.contains("ILLEGAL_ADDRESS (700)") && lost.contains("start again"), "{lost}");
    }

    #[test]
    fn the_argument_is_as_large_as_the_text_says() {
        let text = "
.visible .entry sum(
	.param .align 8 .b8 sum_param_0[112]
)
.visible .entry row_sum(
	.param .align 8 .b8 row_sum_param_0[24]
)";
        assert_eq!(argument_bytes(text, "sum"), Some(112));
        assert_eq!(argument_bytes(text, "row_sum"), Some(24));
        assert_eq!(argument_bytes(text, "max"), None);
    }

    #[test]
    fn the_embedded_text_holds_every_kernel() {
        let missing: Vec<_> = kernels::entries::ALL
            .iter()
            .filter(|(kernel, module, ..)| !ptx(*module).is_ok_and(|text| argument_bytes(text, kernel).is_some()))
            .map(|(kernel, module, ..)| (name(*module), kernel))
            .collect();
        assert!(missing.is_empty(), "run kernels/ptx/build.py: {missing:?}");
        fn agrees<A: kernels::abi::Args>(kernel: &kernels::abi::Kernel<A>) {
            let bytes = argument_bytes(ptx(kernel.module).unwrap(), kernel.name);
            assert_eq!(bytes, Some(size_of::<A>()), "{}", kernel.name);
        }
        agrees(&kernels::entries::TALLY_BF16);
        agrees(&kernels::entries::HOPPER_PULL_SOFTMAX_BF16);
    }
}
