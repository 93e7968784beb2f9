//! The passes: one a file, one visible list.

mod codebook;
mod control_flow;
mod dead_channels;
mod dead_nodes;
mod dedupe;
mod depth;
mod exact_groups;
mod exact_rank;
mod exact_storage;
mod factor;
mod fold_constants;
mod fuse_activation;
mod fuse_affine;
mod fuse_batch_norm;
mod fuse_elementwise;
mod fuse_layer_norm;
mod fuse_matmul_add;
mod fuse_movement;
mod fuse_pad;
mod group;
mod half;
mod identity;
mod kron;
mod layer;
mod layout;
mod menu;
mod merge_linear;
mod prune;
mod quantize;
mod reorder;
mod rewrite;
mod separate;
mod share_constants;
mod spatial;
mod store;
mod surgery;
mod svd;
mod tucker;

use crate::pass::PassInfo;

/// The operator set from which on a `Gemm` need not add anything.
const GEMM_MAY_ADD_NOTHING: i64 = 11;

/// All passes. The exact and rounding ones stand in the order in which `simplify` runs them. What is dead goes first since it
/// would be work for the others, and branches that are always taken are put in place next since what is in them is, too.
/// Identities go before folding since they hide constants, and folding before merging since it makes equal constants.
/// `Transpose`s go before the fusions since they stand between what is fused: activations first, then the sums and products
/// that go into the layers around them. Constants are shared late, since what is shared can't be fused. Weights of few
/// values become tables before anything else, since fusions make many values of few; other forms of storage wait until
/// nothing else finds work.
pub const PASSES: &[PassInfo] = &[
    PassInfo::of::<dead_nodes::DeadNodes>(),
    PassInfo::of::<control_flow::ControlFlow>(),
    PassInfo::of::<identity::Identity>(),
    PassInfo::of::<fold_constants::FoldConstants>(),
    PassInfo::of::<dedupe::Dedupe>(),
    PassInfo::of::<fuse_movement::FuseMovement>(),
    PassInfo::of::<fuse_elementwise::FuseElementwise>(),
    PassInfo::of::<layout::Layout>(),
    PassInfo::of::<fuse_activation::FuseActivation>(),
    PassInfo::of::<fuse_layer_norm::FuseLayerNorm>(),
    PassInfo::of::<fuse_batch_norm::FuseBatchNorm>(),
    PassInfo::of::<fuse_matmul_add::FuseMatmulAdd>(),
    PassInfo::of::<fuse_affine::FuseAffine>(),
    PassInfo::of::<fuse_pad::FusePad>(),
    PassInfo::of::<merge_linear::MergeLinear>(),
    PassInfo::of::<dead_channels::DeadChannels>(),
    PassInfo::of::<exact_groups::ExactGroups>(),
    PassInfo::of::<exact_rank::ExactRank>(),
    PassInfo::of::<share_constants::ShareConstants>(),
    PassInfo::of::<exact_storage::ExactStorage>(),
    PassInfo::of::<svd::Svd>(),
    PassInfo::of::<spatial::Spatial>(),
    PassInfo::of::<tucker::Tucker>(),
    PassInfo::of::<separate::Separate>(),
    PassInfo::of::<group::Group>(),
    PassInfo::of::<kron::Kron>(),
    PassInfo::of::<factor::Factor>(),
    PassInfo::of::<prune::Prune>(),
    PassInfo::of::<depth::Depth>(),
    PassInfo::of::<quantize::Quantize>(),
    PassInfo::of::<codebook::Codebook>(),
    PassInfo::of::<half::Half>(),
];

/// The pass called `name`.
#[must_use]
pub fn find(name: &str) -> Option<&'static PassInfo> {
    PASSES.iter().find(|pass| pass.name == name)
}

/// An option that is a share.
fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
        _ => Err("a number above 0 and at most 1 is wanted".to_owned()),
    }
}

/// An option that is a count.
fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&count| count > 0).ok_or_else(|| "a whole number above 0 is wanted".to_owned())
}
