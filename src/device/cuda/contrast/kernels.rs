//! The kernels of each 16-bit type.

use crate::objective::Precision;
use kernels::abi::{self, Kernel};
use kernels::entries as e;

/// The kernels of one 16-bit type.
pub(super) struct Kernels {
    pub(super) precision: Precision,
    pub(super) prepare_f32: Kernel<abi::Prepare>,
    pub(super) prepare_half: Kernel<abi::Prepare>,
    pub(super) sum_columns: Kernel<abi::SumColumns>,
    /// Without and with sums over all logits.
    pub(super) tally: [Kernel<abi::Each<abi::Tally, 2>>; 2],
    /// Without and with sums of G.
    pub(super) softmax: [Kernel<abi::Pull>; 2],
    pub(super) sigmoid: Kernel<abi::Pull>,
    pub(super) plain: Kernel<abi::Pull>,
    pub(super) factored: Kernel<abi::Pull>,
    pub(super) residual: Kernel<abi::Residual>,
    pub(super) paired_tally: Kernel<abi::PairedTally>,
    pub(super) paired_pull: Kernel<abi::PairedPull>,
    pub(super) gv: Kernel<abi::Gemm>,
    pub(super) gu: Kernel<abi::Gemm>,
    pub(super) finish: Kernel<abi::Finish>,
    pub(super) hopper: Hopper,
}

pub(super) struct Hopper {
    pub(super) tally: [Kernel<abi::HopperTally>; 2],
    pub(super) both: Kernel<abi::HopperTallyBoth>,
    pub(super) softmax: [Kernel<abi::HopperPull>; 2],
    pub(super) sigmoid: Kernel<abi::HopperPull>,
    pub(super) plain: Kernel<abi::HopperPull>,
    pub(super) factored: Kernel<abi::HopperPull>,
    pub(super) gemm: Kernel<abi::HopperGemm>,
}

pub(super) static BF16: Kernels = Kernels {
    precision: Precision::Bf16,
    prepare_f32: e::PREPARE_BF16_F32,
    prepare_half: e::PREPARE_BF16_BF16,
    sum_columns: e::SUM_COLUMNS_BF16,
    tally: [e::TALLY_BF16, e::TALLY_ALL_BF16],
    softmax: [e::PULL_SOFTMAX_BF16, e::PULL_SOFTMAX_SUMS_BF16],
    sigmoid: e::PULL_SIGMOID_BF16,
    plain: e::PULL_PLAIN_BF16,
    factored: e::PULL_FACTORED_BF16,
    residual: e::RESIDUAL_BF16,
    paired_tally: e::PAIRED_TALLY_BF16,
    paired_pull: e::PAIRED_PULL_BF16,
    gv: e::GEMM_GV_BF16,
    gu: e::GEMM_GU_BF16,
    finish: e::FINISH_BF16,
    hopper: Hopper {
        tally: [e::HOPPER_TALLY_BF16, e::HOPPER_TALLY_ALL_BF16],
        both: e::HOPPER_TALLY_BOTH_BF16,
        softmax: [e::HOPPER_PULL_SOFTMAX_BF16, e::HOPPER_PULL_SOFTMAX_SUMS_BF16],
        sigmoid: e::HOPPER_PULL_SIGMOID_BF16,
        plain: e::HOPPER_PULL_PLAIN_BF16,
        factored: e::HOPPER_PULL_FACTORED_BF16,
        gemm: e::HOPPER_GEMM_BF16,
    },
};

pub(super) static F16: Kernels = Kernels {
    precision: Precision::F16,
    prepare_f32: e::PREPARE_F16_F32,
    prepare_half: e::PREPARE_F16_F16,
    sum_columns: e::SUM_COLUMNS_F16,
    tally: [e::TALLY_F16, e::TALLY_ALL_F16],
    softmax: [e::PULL_SOFTMAX_F16, e::PULL_SOFTMAX_SUMS_F16],
    sigmoid: e::PULL_SIGMOID_F16,
    plain: e::PULL_PLAIN_F16,
    factored: e::PULL_FACTORED_F16,
    residual: e::RESIDUAL_F16,
    paired_tally: e::PAIRED_TALLY_F16,
    paired_pull: e::PAIRED_PULL_F16,
    gv: e::GEMM_GV_F16,
    gu: e::GEMM_GU_F16,
    finish: e::FINISH_F16,
    hopper: Hopper {
        tally: [e::HOPPER_TALLY_F16, e::HOPPER_TALLY_ALL_F16],
        both: e::HOPPER_TALLY_BOTH_F16,
        softmax: [e::HOPPER_PULL_SOFTMAX_F16, e::HOPPER_PULL_SOFTMAX_SUMS_F16],
        sigmoid: e::HOPPER_PULL_SIGMOID_F16,
        plain: e::HOPPER_PULL_PLAIN_F16,
        factored: e::HOPPER_PULL_FACTORED_F16,
        gemm: e::HOPPER_GEMM_F16,
    },
};
