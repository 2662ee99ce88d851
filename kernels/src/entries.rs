//! Every kernel by name: the one table that the card's entry points and the host's handles are made from.

use crate::abi::{self, Kernel, Module};
#[cfg(any(all(target_arch = "nvptx64", hopper), feature = "shim"))]
use crate::hopper;
#[cfg(any(target_arch = "nvptx64", feature = "shim"))]
use crate::simt::{Bf16, F16};
#[cfg(any(target_arch = "nvptx64", feature = "shim"))]
use crate::{contrast, conv, direct, gemm, layers, optim, paired, rows, search};

/// Calls a body; those of Hopper are told where their argument is, for its tensor maps.
#[cfg(any(target_arch = "nvptx64", feature = "shim"))]
macro_rules! body {
    (Portable, $body:expr, $args:expr, $at:expr) => {{
        let _ = $at;
        // SAFETY: launched under the contract of the body.
        unsafe { $body($args) }
    }};
    (Hopper, $body:expr, $args:expr, $at:expr) => {
        // SAFETY: as above.
        unsafe { $body($args, $at) }
    };
}

/// For each line: on the card an entry point with its launch bounds written beside it, on the host a [`Kernel`].
macro_rules! entries {
    ($($module:ident $flag:meta: {$(
        $(#[$doc:meta])*
        $name:ident / $constant:ident ($args:ty), threads $threads:literal, blocks $blocks:literal, shared $shared:expr, $body:expr;
    )*})*) => {
        $($(
            $(#[$doc])*
            #[cfg(not(target_arch = "nvptx64"))]
            pub const $constant: Kernel<$args> = Kernel {
                name: stringify!($name),
                module: Module::$module,
                threads: $threads,
                blocks: $blocks,
                shared: $shared,
                #[cfg(feature = "shim")]
                body: twin::$name,
                args: core::marker::PhantomData,
            };
        )*)*

        /// Bodies for the host: functions, as closures would be compiled again by every crate that takes a handle.
        #[cfg(all(feature = "shim", not(target_arch = "nvptx64")))]
        mod twin {
            use super::*;
            $($(
                pub unsafe fn $name(args: &$args, at: u64) {
                    body!($module, $body, args, at)
                }
            )*)*
        }

        #[cfg(target_arch = "nvptx64")]
        mod card {
            use super::*;
            $($(
                #[cfg($flag)]
                core::arch::global_asm!(concat!("// @launch ", stringify!($name), " ", $threads, " ", $blocks));
                #[cfg($flag)]
                #[unsafe(no_mangle)]
                unsafe extern "ptx-kernel" fn $name(args: $args) {
                    let at: u64;
                    // SAFETY: the address of the argument, taken by its name: a reference would be to a copy of it, which
                    // is not where TMA finds a map. The host launches the kernel under the contract of the body.
                    unsafe {
                        core::arch::asm!(
                            concat!("{{ .reg .b64 t; mov.b64 t, ", stringify!($name), "_param_0; cvta.param.u64 {a}, t; }}"),
                            a = out(reg64) at, options(pure, nomem, nostack, preserves_flags)
                        );
                        body!($module, $body, &args, at)
                    }
                }
            )*)*
        }

        /// Name, module, threads, blocks a multiprocessor and shared bytes of every kernel.
        #[cfg(not(target_arch = "nvptx64"))]
        pub const ALL: &[(&str, Module, u32, u32, u32)] =
            &[$($((stringify!($name), Module::$module, $threads, $blocks, $shared),)*)*];
    };
}

entries! {
    Portable not(hopper): {
        /// Row tallies of bf16 logits.
        tally_bf16 / TALLY_BF16 (abi::Each<abi::Tally, 2>), threads 256, blocks 1, shared abi::TALLY_SHARED, contrast::tally::<Bf16, false>;
        /// Row tallies of bf16 logits, sums over all of them too.
        tally_all_bf16 / TALLY_ALL_BF16 (abi::Each<abi::Tally, 2>), threads 256, blocks 1, shared abi::TALLY_SHARED, contrast::tally::<Bf16, true>;
        /// A chunk of G of the softmax losses, bf16.
        pull_softmax_bf16 / PULL_SOFTMAX_BF16 (abi::Pull), threads 256, blocks 1, shared abi::PULL_SHARED, contrast::pull_softmax::<Bf16, false>;
        /// A chunk of G of the softmax losses with its sums, bf16.
        pull_softmax_sums_bf16 / PULL_SOFTMAX_SUMS_BF16 (abi::Pull), threads 256, blocks 1, shared abi::PULL_SHARED, contrast::pull_softmax::<Bf16, true>;
        /// A chunk of G of the sigmoid loss, bf16.
        pull_sigmoid_bf16 / PULL_SIGMOID_BF16 (abi::Pull), threads 256, blocks 1, shared abi::PULL_SHARED, contrast::pull_sigmoid::<Bf16>;
        /// A chunk of bf16 logits as they are.
        pull_plain_bf16 / PULL_PLAIN_BF16 (abi::Pull), threads 256, blocks 1, shared abi::PULL_SHARED, contrast::pull_plain::<Bf16>;
        /// A chunk of G of the MMD losses, bf16.
        pull_factored_bf16 / PULL_FACTORED_BF16 (abi::Pull), threads 256, blocks 1, shared abi::PULL_SHARED, contrast::pull_factored::<Bf16>;
        /// What MMD pulls a row by, bf16.
        residual_bf16 / RESIDUAL_BF16 (abi::Residual), threads 256, blocks 1, shared 64, rows::residual::<Bf16>;
        /// A chunk of f16 logits as they are.
        pull_plain_f16 / PULL_PLAIN_F16 (abi::Pull), threads 256, blocks 1, shared abi::PULL_SHARED, contrast::pull_plain::<F16>;
        /// A chunk of G of the MMD losses, f16.
        pull_factored_f16 / PULL_FACTORED_F16 (abi::Pull), threads 256, blocks 1, shared abi::PULL_SHARED, contrast::pull_factored::<F16>;
        /// What MMD pulls a row by, f16.
        residual_f16 / RESIDUAL_F16 (abi::Residual), threads 256, blocks 1, shared 64, rows::residual::<F16>;
        /// Rows times their shares.
        weigh / WEIGH (abi::Weigh), threads 256, blocks 1, shared 0, rows::weigh;
        /// G by rows, bf16.
        gemm_gv_bf16 / GEMM_GV_BF16 (abi::Gemm), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::halves_nn::<Bf16>;
        /// G transposed by rows, bf16.
        gemm_gu_bf16 / GEMM_GU_BF16 (abi::Gemm), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::halves_tn::<Bf16>;
        /// A product of f32 operands rounded to bf16.
        gemm_nn_bf16 / GEMM_NN_BF16 (abi::Gemm), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::singles_nn::<Bf16>;
        /// A product of f32 operands rounded to bf16.
        gemm_nt_bf16 / GEMM_NT_BF16 (abi::Gemm), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::singles_nt::<Bf16>;
        /// A product of f32 operands rounded to bf16.
        gemm_tn_bf16 / GEMM_TN_BF16 (abi::Gemm), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::singles_tn::<Bf16>;
        /// A product of f32 operands rounded to bf16.
        gemm_tt_bf16 / GEMM_TT_BF16 (abi::Gemm), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::singles_tt::<Bf16>;
        /// A dense layer with ReLU or nothing, rounded to bf16.
        dense_bf16 / DENSE_BF16 (abi::Dense), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::dense::<Bf16, false>;
        /// A dense layer with GELU, rounded to bf16.
        dense_gelu_bf16 / DENSE_GELU_BF16 (abi::Dense), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::dense::<Bf16, true>;
        /// f32 embeddings to bf16.
        prepare_bf16_f32 / PREPARE_BF16_F32 (abi::Prepare), threads 256, blocks 1, shared 0, rows::prepare::<Bf16, false>;
        /// Embeddings of bf16 to the same.
        prepare_bf16_bf16 / PREPARE_BF16_BF16 (abi::Prepare), threads 256, blocks 1, shared 0, rows::prepare::<Bf16, true>;
        /// Gradients of bf16 embeddings.
        finish_bf16 / FINISH_BF16 (abi::Finish), threads 256, blocks 4, shared 64, rows::finish::<Bf16>;
        /// Column sums of bf16.
        sum_columns_bf16 / SUM_COLUMNS_BF16 (abi::SumColumns), threads 256, blocks 1, shared 1024, rows::sum_columns::<Bf16, true>;
        /// Row tallies of f16 logits.
        tally_f16 / TALLY_F16 (abi::Each<abi::Tally, 2>), threads 256, blocks 1, shared abi::TALLY_SHARED, contrast::tally::<F16, false>;
        /// Row tallies of f16 logits, sums over all of them too.
        tally_all_f16 / TALLY_ALL_F16 (abi::Each<abi::Tally, 2>), threads 256, blocks 1, shared abi::TALLY_SHARED, contrast::tally::<F16, true>;
        /// A chunk of G of the softmax losses, f16.
        pull_softmax_f16 / PULL_SOFTMAX_F16 (abi::Pull), threads 256, blocks 1, shared abi::PULL_SHARED, contrast::pull_softmax::<F16, false>;
        /// A chunk of G of the softmax losses with its sums, f16.
        pull_softmax_sums_f16 / PULL_SOFTMAX_SUMS_F16 (abi::Pull), threads 256, blocks 1, shared abi::PULL_SHARED, contrast::pull_softmax::<F16, true>;
        /// A chunk of G of the sigmoid loss, f16.
        pull_sigmoid_f16 / PULL_SIGMOID_F16 (abi::Pull), threads 256, blocks 1, shared abi::PULL_SHARED, contrast::pull_sigmoid::<F16>;
        /// G by rows, f16.
        gemm_gv_f16 / GEMM_GV_F16 (abi::Gemm), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::halves_nn::<F16>;
        /// G transposed by rows, f16.
        gemm_gu_f16 / GEMM_GU_F16 (abi::Gemm), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::halves_tn::<F16>;
        /// A product of f32 operands rounded to f16.
        gemm_nn_f16 / GEMM_NN_F16 (abi::Gemm), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::singles_nn::<F16>;
        /// A product of f32 operands rounded to f16.
        gemm_nt_f16 / GEMM_NT_F16 (abi::Gemm), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::singles_nt::<F16>;
        /// A product of f32 operands rounded to f16.
        gemm_tn_f16 / GEMM_TN_F16 (abi::Gemm), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::singles_tn::<F16>;
        /// A product of f32 operands rounded to f16.
        gemm_tt_f16 / GEMM_TT_F16 (abi::Gemm), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::singles_tt::<F16>;
        /// A dense layer with ReLU or nothing, rounded to f16.
        dense_f16 / DENSE_F16 (abi::Dense), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::dense::<F16, false>;
        /// A dense layer with GELU, rounded to f16.
        dense_gelu_f16 / DENSE_GELU_F16 (abi::Dense), threads 256, blocks 2, shared abi::TILE_SHARED, gemm::dense::<F16, true>;
        /// f32 embeddings to f16.
        prepare_f16_f32 / PREPARE_F16_F32 (abi::Prepare), threads 256, blocks 1, shared 0, rows::prepare::<F16, false>;
        /// Embeddings of f16 to the same.
        prepare_f16_f16 / PREPARE_F16_F16 (abi::Prepare), threads 256, blocks 1, shared 0, rows::prepare::<F16, true>;
        /// Gradients of f16 embeddings.
        finish_f16 / FINISH_F16 (abi::Finish), threads 256, blocks 4, shared 64, rows::finish::<F16>;
        /// Column sums of f16.
        sum_columns_f16 / SUM_COLUMNS_F16 (abi::SumColumns), threads 256, blocks 1, shared 1024, rows::sum_columns::<F16, true>;
        /// Column sums of f32.
        sum_columns_f32 / SUM_COLUMNS_F32 (abi::SumColumns), threads 256, blocks 1, shared 1024, rows::sum_columns::<Bf16, false>;
        /// Slots of tallies into one a row.
        merge / MERGE (abi::Merge), threads 256, blocks 1, shared 2048, rows::merge;
        /// The log-sum-exp of everything.
        total / TOTAL (abi::Total), threads 256, blocks 1, shared 2048, rows::total;
        /// Tallies into norms, targets and the loss.
        normalise / NORMALISE (abi::Normalise), threads 256, blocks 1, shared 2048, rows::normalise;
        /// Slots of tallies of rows' softmaxes into norms, targets and the loss.
        soften / SOFTEN (abi::Each<abi::Soften, 2>), threads 256, blocks 1, shared 2048, rows::soften;
        /// Slots into their sum.
        fold / FOLD (abi::Fold), threads 256, blocks 1, shared 0, rows::fold;
        /// Column sums in f64.
        totals / TOTALS (abi::Each<abi::Totals, { abi::MOST_SUMS }>), threads 256, blocks 1, shared 2048, rows::totals;
        /// A convolution of numbers rounded to bf16.
        conv_bf16 / CONV_BF16 (abi::Conv), threads 256, blocks 1, shared abi::TILE_SHARED, conv::forward::<Bf16>;
        /// A convolution's gradient in its input, bf16.
        conv_data_bf16 / CONV_DATA_BF16 (abi::Conv), threads 256, blocks 1, shared abi::TILE_SHARED, conv::backward_data::<Bf16>;
        /// A convolution's gradient in its weight, bf16.
        conv_weight_bf16 / CONV_WEIGHT_BF16 (abi::Conv), threads 256, blocks 1, shared abi::TILE_SHARED, conv::backward_weight::<Bf16>;
        /// A convolution of numbers rounded to f16.
        conv_f16 / CONV_F16 (abi::Conv), threads 256, blocks 1, shared abi::TILE_SHARED, conv::forward::<F16>;
        /// A convolution's gradient in its input, f16.
        conv_data_f16 / CONV_DATA_F16 (abi::Conv), threads 256, blocks 1, shared abi::TILE_SHARED, conv::backward_data::<F16>;
        /// A convolution's gradient in its weight, f16.
        conv_weight_f16 / CONV_WEIGHT_F16 (abi::Conv), threads 256, blocks 1, shared abi::TILE_SHARED, conv::backward_weight::<F16>;
        /// A convolution of few channels.
        conv_direct / CONV_DIRECT (abi::Conv), threads 128, blocks 5, shared abi::DIRECT_SHARED, direct::convolve::<false>;
        /// A convolution's gradient in its input, of few channels.
        conv_data_direct / CONV_DATA_DIRECT (abi::Conv), threads 128, blocks 5, shared abi::DIRECT_SHARED, direct::convolve::<true>;
        /// A convolution's gradient in its weight, of few channels.
        conv_weight_direct / CONV_WEIGHT_DIRECT (abi::Conv), threads 512, blocks 1, shared abi::DIRECT_WEIGHT_SHARED, direct::weight;
        /// Bias and activation.
        activate / ACTIVATE (abi::Activate), threads 256, blocks 1, shared 0, layers::activate;
        /// Gradient through an activation.
        activate_backward / ACTIVATE_BACKWARD (abi::ActivateBackward), threads 256, blocks 1, shared 0, layers::activate_backward;
        /// Gradient through an activation, and its sums over rows.
        mask_columns / MASK_COLUMNS (abi::MaskColumns), threads 256, blocks 1, shared 1024, layers::mask_columns;
        /// Sums over rows and pixels.
        sum_channels / SUM_CHANNELS (abi::SumChannels), threads 256, blocks 1, shared 2048, layers::sum_channels;
        /// Pooling.
        pool / POOL (abi::Pool), threads 256, blocks 1, shared 0, layers::pool;
        /// Gradient of pooling.
        pool_backward / POOL_BACKWARD (abi::Pool), threads 256, blocks 1, shared 0, layers::pool_backward;
        /// Layer normalisation.
        layer_norm / LAYER_NORM (abi::LayerNorm), threads 256, blocks 1, shared 0, layers::layer_norm;
        /// Its gradient in x.
        layer_norm_backward / LAYER_NORM_BACKWARD (abi::LayerNormBackward), threads 256, blocks 1, shared 0, layers::layer_norm_backward;
        /// Its gradient in gain and bias.
        layer_norm_affine / LAYER_NORM_AFFINE (abi::LayerNormBackward), threads 256, blocks 1, shared 2048, layers::layer_norm_affine;
        /// Softmax attention.
        attention / ATTENTION (abi::Attend), threads 256, blocks 1, shared 0, layers::attention;
        /// Its gradient in queries.
        attention_queries / ATTENTION_QUERIES (abi::Attend), threads 256, blocks 1, shared 0, layers::attention_queries;
        /// Its gradient in keys and values.
        attention_keys / ATTENTION_KEYS (abi::Attend), threads 256, blocks 1, shared 0, layers::attention_keys;
        /// AdamW.
        adam / ADAM (abi::Adam), threads 256, blocks 1, shared 0, optim::adam;
        /// Sums of squares.
        squares / SQUARES (abi::Squares), threads 256, blocks 1, shared 2048, optim::squares;
        /// What becomes of gradients of a norm.
        judge / JUDGE (abi::Judge), threads 256, blocks 1, shared 2048, optim::judge;
        /// Rows by number.
        gather / GATHER (abi::Choose), threads 256, blocks 1, shared 0, optim::choose::<false>;
        /// Rows to numbered places.
        scatter / SCATTER (abi::Choose), threads 256, blocks 1, shared 0, optim::choose::<true>;
        /// Numbers times one on the card.
        scale / SCALE (abi::Scale), threads 256, blocks 1, shared 0, optim::scale;
        /// Numbers between two.
        clamp / CLAMP (abi::Clamp), threads 256, blocks 1, shared 0, optim::clamp;
        /// Learned scalars on their way into a loss.
        temper / TEMPER (abi::Temper), threads 32, blocks 1, shared 0, optim::temper;
        /// A loss's scalars on their way out.
        settle / SETTLE (abi::Settle), threads 32, blocks 1, shared 0, optim::settle;
        /// Queries in two halves a number.
        split_queries / SPLIT_QUERIES (abi::Split), threads 256, blocks 1, shared 0, search::split::<false>;
        /// Items in two halves a number.
        split_items / SPLIT_ITEMS (abi::Split), threads 256, blocks 1, shared 0, search::split::<true>;
        /// Scores of queries against their own items.
        search_own / SEARCH_OWN (abi::Search), threads 256, blocks 1, shared abi::SEARCH_SHARED, search::own;
        /// How many items come before a query's own.
        search_rank / SEARCH_RANK (abi::Search), threads 256, blocks 1, shared abi::SEARCH_SHARED, search::rank;
        /// The best items of each query.
        search_nearest / SEARCH_NEAREST (abi::Search), threads 256, blocks 1, shared abi::SEARCH_SHARED, search::nearest;
        /// The best of several.
        search_merge / SEARCH_MERGE (abi::Search), threads 256, blocks 1, shared 0, search::merge;
        /// Pairings of the shuffled joint loss.
        draw_pairings / DRAW_PAIRINGS (abi::DrawPairings), threads 256, blocks 1, shared 0, paired::draw;
        /// Logits of pairings, of bf16.
        paired_tally_bf16 / PAIRED_TALLY_BF16 (abi::PairedTally), threads 256, blocks 1, shared 0, paired::tally::<Bf16>;
        /// Logits of pairings, of f16.
        paired_tally_f16 / PAIRED_TALLY_F16 (abi::PairedTally), threads 256, blocks 1, shared 0, paired::tally::<F16>;
        /// G of pairings times bf16.
        paired_pull_bf16 / PAIRED_PULL_BF16 (abi::PairedPull), threads 256, blocks 1, shared 0, paired::pull::<Bf16>;
        /// G of pairings times f16.
        paired_pull_f16 / PAIRED_PULL_F16 (abi::PairedPull), threads 256, blocks 1, shared 0, paired::pull::<F16>;
        /// Standard normals in f32.
        normals_f32 / NORMALS_F32 (abi::Normals), threads 256, blocks 1, shared 0, optim::normals::<Bf16, false>;
        /// Standard normals in bf16.
        normals_bf16 / NORMALS_BF16 (abi::Normals), threads 256, blocks 1, shared 0, optim::normals::<Bf16, true>;
        /// Standard normals in f16.
        normals_f16 / NORMALS_F16 (abi::Normals), threads 256, blocks 1, shared 0, optim::normals::<F16, true>;
        /// One number everywhere.
        fill / FILL (abi::Fill), threads 256, blocks 1, shared 0, optim::fill;
    }
    Hopper hopper: {
        /// Row tallies of bf16 logits.
        hopper_tally_bf16 / HOPPER_TALLY_BF16 (abi::HopperTally), threads 384, blocks 1, shared abi::HOPPER_SHARED_TALLY, hopper::tally::<Bf16, false>;
        /// Row tallies of bf16 logits, sums over all of them too.
        hopper_tally_all_bf16 / HOPPER_TALLY_ALL_BF16 (abi::HopperTally), threads 384, blocks 1, shared abi::HOPPER_SHARED_TALLY, hopper::tally::<Bf16, true>;
        /// Row and column sums of anchored exponentials of bf16 logits.
        hopper_tally_both_bf16 / HOPPER_TALLY_BOTH_BF16 (abi::HopperTallyBoth), threads 384, blocks 1, shared abi::HOPPER_SHARED_BOTH, hopper::tally_both::<Bf16>;
        /// A chunk of G of the softmax losses, bf16.
        hopper_pull_softmax_bf16 / HOPPER_PULL_SOFTMAX_BF16 (abi::HopperPull), threads 384, blocks 1, shared abi::HOPPER_SHARED_TURNS, hopper::pull_softmax::<Bf16, false>;
        /// A chunk of G of the softmax losses with its sums, bf16.
        hopper_pull_softmax_sums_bf16 / HOPPER_PULL_SOFTMAX_SUMS_BF16 (abi::HopperPull), threads 384, blocks 1, shared abi::HOPPER_SHARED_PULL, hopper::pull_softmax::<Bf16, true>;
        /// A chunk of G of the sigmoid loss, bf16.
        hopper_pull_sigmoid_bf16 / HOPPER_PULL_SIGMOID_BF16 (abi::HopperPull), threads 384, blocks 1, shared abi::HOPPER_SHARED_PULL, hopper::pull_sigmoid::<Bf16>;
        /// A chunk of bf16 logits as they are.
        hopper_pull_plain_bf16 / HOPPER_PULL_PLAIN_BF16 (abi::HopperPull), threads 384, blocks 1, shared abi::HOPPER_SHARED_PULL, hopper::pull_plain::<Bf16>;
        /// A chunk of G of the MMD losses, bf16.
        hopper_pull_factored_bf16 / HOPPER_PULL_FACTORED_BF16 (abi::HopperPull), threads 384, blocks 1, shared abi::HOPPER_SHARED_PULL, hopper::pull_factored::<Bf16>;
        /// A chunk of f16 logits as they are.
        hopper_pull_plain_f16 / HOPPER_PULL_PLAIN_F16 (abi::HopperPull), threads 384, blocks 1, shared abi::HOPPER_SHARED_PULL, hopper::pull_plain::<F16>;
        /// A chunk of G of the MMD losses, f16.
        hopper_pull_factored_f16 / HOPPER_PULL_FACTORED_F16 (abi::HopperPull), threads 384, blocks 1, shared abi::HOPPER_SHARED_PULL, hopper::pull_factored::<F16>;
        /// G by rows, and G transposed by rows, bf16.
        hopper_gemm_bf16 / HOPPER_GEMM_BF16 (abi::HopperGemm), threads 384, blocks 1, shared abi::HOPPER_SHARED_GEMM, hopper::gemm::<Bf16>;
        /// Row tallies of f16 logits.
        hopper_tally_f16 / HOPPER_TALLY_F16 (abi::HopperTally), threads 384, blocks 1, shared abi::HOPPER_SHARED_TALLY, hopper::tally::<F16, false>;
        /// Row tallies of f16 logits, sums over all of them too.
        hopper_tally_all_f16 / HOPPER_TALLY_ALL_F16 (abi::HopperTally), threads 384, blocks 1, shared abi::HOPPER_SHARED_TALLY, hopper::tally::<F16, true>;
        /// Row and column sums of anchored exponentials of f16 logits.
        hopper_tally_both_f16 / HOPPER_TALLY_BOTH_F16 (abi::HopperTallyBoth), threads 384, blocks 1, shared abi::HOPPER_SHARED_BOTH, hopper::tally_both::<F16>;
        /// A chunk of G of the softmax losses, f16.
        hopper_pull_softmax_f16 / HOPPER_PULL_SOFTMAX_F16 (abi::HopperPull), threads 384, blocks 1, shared abi::HOPPER_SHARED_TURNS, hopper::pull_softmax::<F16, false>;
        /// A chunk of G of the softmax losses with its sums, f16.
        hopper_pull_softmax_sums_f16 / HOPPER_PULL_SOFTMAX_SUMS_F16 (abi::HopperPull), threads 384, blocks 1, shared abi::HOPPER_SHARED_PULL, hopper::pull_softmax::<F16, true>;
        /// A chunk of G of the sigmoid loss, f16.
        hopper_pull_sigmoid_f16 / HOPPER_PULL_SIGMOID_F16 (abi::HopperPull), threads 384, blocks 1, shared abi::HOPPER_SHARED_PULL, hopper::pull_sigmoid::<F16>;
        /// G by rows, and G transposed by rows, f16.
        hopper_gemm_f16 / HOPPER_GEMM_F16 (abi::HopperGemm), threads 384, blocks 1, shared abi::HOPPER_SHARED_GEMM, hopper::gemm::<F16>;
    }
}
