//! See [`Quantize`].

use super::store::{Storing, Way, multiply_by_codes};
use crate::{
    coding::{Form, Scheme, Tiling},
    ir::Graph,
    pass::{Context, Declare, Fidelity, Pass},
};

/// Store weights as integers of 8, 4 or 2 bits and a scale for each output channel.
///
/// The scale minimizes the squared error of the weights, each weighed by how much of its input varies; codes are then chosen column by
/// column, each making up for what the ones before it lost (GPTQ, Frantar 2023), and polished by coordinate descent (Zhang 2024) in turn
/// with the scales, all in the metric of what the layers make of what they read over samples. The bias takes the mean of what is lost,
/// and below 8 bits, layers are fitted and coded anew to what the coded layers before them hand on. Without samples, each weight is
/// rounded to the nearest level.
///
/// Files hold integers: in whole bytes, or packed and taken apart by `BitShift`, from operator set 11 on. `--runtime` says how floats are
/// made of them: for onnxruntime, `Cast` and `Mul`, which it computes once, but `DequantizeLinear` before a `MatMul` of a row or two with
/// a large matrix, from operator set 13 on: by that it multiplies as it is, in a fraction of the time, and rounds what it multiplies to
/// eight bits, which is simulated where errors are measured; `Gemm`s become such `MatMul`s. No operator set is raised.
///
/// Applies when: the weight is a constant of floats with two axes or more, and takes fewer bytes so.
///
/// Fidelity: lossy. With `bits=auto`, the error budget chooses the bits of each weight, or none; first, last and depthwise layers are
/// protected by the error that they make.
#[derive(Debug, clap::Parser)]
#[command(name = "quantize")]
pub(super) struct Quantize {
    /// Bits of each weight: 8, 4, 2, or auto, which lets the error budget choose.
    #[arg(long, value_enum, default_value_t = Bits::Auto)]
    bits: Bits,
    /// How many weights of an output channel that lie side by side share a scale, where that divides them; all of the channel's if it is not
    /// given.
    #[arg(long, value_parser = super::positive)]
    block: Option<usize>,
}

/// The widths of uniform codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Bits {
    #[value(name = "8")]
    Eight,
    #[value(name = "4")]
    Four,
    #[value(name = "2")]
    Two,
    Auto,
}

impl Declare for Quantize {
    const NAME: &'static str = "quantize";
    const FIDELITY: Fidelity = Fidelity::Lossy;
}

impl Quantize {
    fn ways(&self) -> Vec<Way> {
        let form = |bits, tiling| Way::Codes(Form { scheme: Scheme::Symmetric, bits, tiling });
        let bits: &[u32] = match self.bits {
            Bits::Eight => &[8],
            Bits::Four => &[4],
            Bits::Two => &[2],
            Bits::Auto => &[8, 4, 2],
        };
        // Where the budget chooses, blocks are one more way to have less error.
        let blocks: &[usize] = match (&self.block, self.bits) {
            (Some(block), _) => &[*block],
            (None, Bits::Auto) => &[128, 32],
            (None, _) => &[],
        };
        let of = |&bits: &u32| {
            let blocks = blocks.iter().filter(move |_| bits < 8 || self.block.is_some());
            let blocks = blocks.map(move |&block| form(bits, Tiling::Blocks(block)));
            std::iter::once(form(bits, Tiling::Rows)).chain(blocks)
        };
        bits.iter().flat_map(of).collect()
    }
}

impl Pass for Quantize {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        Storing { name: Self::NAME, ways: self.ways(), is_fixed: self.is_fixed() }.start(graph, cx);
        let shapes = cx.shapes(graph);
        multiply_by_codes(graph, &shapes, self.is_fixed(), cx);
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        self.bits != Bits::Auto
    }
}
