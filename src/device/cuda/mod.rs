//! NVIDIA GPUs, through the driver found at run time. This version sees them and says so; it has no kernels yet.

use cudarc::driver::{result, sys};

/// A card the driver knows.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Card {
    /// As the driver names it.
    pub name: String,
    /// Memory in bytes.
    pub memory: usize,
    /// Compute capability, major and minor.
    pub capability: [i32; 2],
}

/// Why no card can be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// No driver on this machine.
    #[error("no NVIDIA driver (libcuda) found")]
    NoDriver,
    /// The driver refused.
    #[error("the NVIDIA driver answers {0}")]
    Driver(String),
}

/// All cards of this machine.
///
/// # Errors
/// [`CudaError`] when there is no driver, or it does not answer.
pub fn cards() -> Result<Vec<Card>, CudaError> {
    let driver = |e: result::DriverError| CudaError::Driver(format!("{:?}", e.0));
    // SAFETY: this only tries to load the library by name; every other call panics without it.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    result::init().map_err(driver)?;
    (0..result::device::get_count().map_err(driver)?)
        .map(|ordinal| {
            let device = result::device::get(ordinal).map_err(driver)?;
            // SAFETY: `device` is a handle the driver returned for this ordinal.
            let memory = unsafe { result::device::total_mem(device) }.map_err(driver)?;
            let capability = |which| {
                // SAFETY: as above; the attribute is one the driver has had since its first version.
                unsafe { result::device::get_attribute(device, which) }.map_err(driver)
            };
            Ok(Card {
                name: result::device::get_name(device).map_err(driver)?,
                memory,
                capability: [
                    capability(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                    capability(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
                ],
            })
        })
        .collect()
}
