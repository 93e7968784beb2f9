//! See [`Group`].

use super::rewrite::{Rewrite, Strength};
use crate::{
    factor::Family,
    ir::Graph,
    pass::{Context, Declare, Fidelity, Pass},
};

/// Put layers in groups whose channels do not see those of other groups.
///
/// A `Conv`, `ConvTranspose`, `Gemm` or `MatMul` becomes a convolution in G groups, of 1/G of the elements and multiply-adds. Channels
/// that are read and made are put together by what they have in common (balanced co-clustering; Zhao and Luk 2018), and each group
/// makes up for the channels that it misses as far as its own tell of them. The layers around hold their channels in the order of
/// the groups; a `Gather` remains where they can't. The layers after the first one in groups are fitted to the original, one after
/// another. With `bypass`, a chain of a low rank beside the layer adds what the groups lose most of.
///
/// Applies when: G divides the channels that are read and those that are made and is at most 64, and a product is one of rows, of at most
/// 3 axes and not of doubles, which runtimes have no convolutions of.
///
/// Fidelity: lossy. Without `groups`, the error budget sets G of each layer.
#[derive(Debug, clap::Parser)]
#[command(name = "group")]
pub(super) struct Group {
    /// G, the groups of each group that a layer has.
    #[arg(long, value_parser = super::positive)]
    groups: Option<usize>,
    /// The rank of a chain beside each layer, which makes of all channels what the groups lose most of.
    #[arg(long, default_value_t = 0)]
    bypass: usize,
}

impl Declare for Group {
    const NAME: &'static str = "group";
    const FIDELITY: Fidelity = Fidelity::Lossy;
}

impl Pass for Group {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let strength = Strength::of(self.groups, None, false);
        let wants = "can't be put in groups: nothing divides both its channels, or it is no convolution or product of rows of 2 or 3 axes";
        let rewrite = Rewrite {
            name: Self::NAME,
            families: &[Family::Grouped { bypass: self.bypass }],
            preferred: &[],
            strength,
            wants,
        };
        rewrite.start(graph, cx);
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        self.groups.is_some()
    }
}
