//! See [`Codebook`].

use super::store::{Storing, Way};
use crate::{
    coding::{Form, Scheme, Tiling},
    ir::Graph,
    pass::{Context, Declare, Fidelity, Pass},
};

/// Have weights share few values: each is an index of 8, 4, 3, 2 or 1 bits into a table (Deep Compression, Han 2016).
///
/// Tables are the best there are by one-dimensional k-means, solved exactly (Wang & Song 2011), with each weight weighed by how much of
/// its input varies. With samples, indices are then chosen column by column, each making up for what the ones before it lost (GPTQ,
/// Frantar 2023), and tables and indices are improved in turn in the metric of what the layers make of what they read: what Han trains
/// by gradients is solved in closed form. The bias takes the mean of what is lost, and below 8 bits, layers are fitted and coded anew
/// to what the coded layers before them hand on.
///
/// Files hold indices, packed and taken apart by `BitShift` from operator set 11 on, and `Gather` or `GatherElements` from the tables,
/// which runtimes compute once, when they load the file.
///
/// Applies when: the weight is a constant of floats with two axes or more, and takes fewer bytes so.
///
/// Fidelity: lossy. With `bits=auto`, the error budget chooses the bits of each weight, or none.
#[derive(Debug, clap::Parser)]
#[command(name = "codebook")]
pub(super) struct Codebook {
    /// Bits of each weight: 8, 4, 3, 2, 1, or auto, which lets the error budget choose.
    #[arg(long, value_enum, default_value_t = Bits::Auto)]
    bits: Bits,
    /// What shares a table.
    #[arg(long, value_enum, default_value_t = Tables::Tensor, conflicts_with = "vector")]
    tables: Tables,
    /// How many weights side by side have one index, into a table of vectors (Gong 2014; Wu 2016; GPTVQ, van Baalen 2024): `bits=8:vector=4` takes
    /// two bits for each weight. It is to divide how many weights make one output channel.
    #[arg(long, value_parser = super::positive)]
    vector: Option<usize>,
}

/// The widths of indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Bits {
    #[value(name = "8")]
    Eight,
    #[value(name = "4")]
    Four,
    #[value(name = "3")]
    Three,
    #[value(name = "2")]
    Two,
    #[value(name = "1")]
    One,
    Auto,
}

/// What shares a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Tables {
    /// All of a weight.
    Tensor,
    /// What makes one output channel.
    Rows,
}

impl Declare for Codebook {
    const NAME: &'static str = "codebook";
    const FIDELITY: Fidelity = Fidelity::Lossy;
}

impl Codebook {
    fn ways(&self) -> Vec<Way> {
        let bits: &[u32] = match self.bits {
            Bits::Eight => &[8],
            Bits::Four => &[4],
            Bits::Three => &[3],
            Bits::Two => &[2],
            Bits::One => &[1],
            Bits::Auto => &[8, 4, 3, 2],
        };
        let tiling = match self.tables {
            Tables::Tensor => Tiling::Tensor,
            Tables::Rows => Tiling::Rows,
        };
        let exact = (self.bits == Bits::Auto).then_some(Way::Exact);
        let way = |&bits: &u32| match self.vector {
            Some(width) if width > 1 => Way::Vectors(bits, width),
            _ => Way::Codes(Form { scheme: Scheme::Table, bits, tiling }),
        };
        exact.into_iter().chain(bits.iter().map(way)).collect()
    }
}

impl Pass for Codebook {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        Storing { name: Self::NAME, ways: self.ways(), is_fixed: self.is_fixed() }.start(graph, cx);
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        self.bits != Bits::Auto
    }
}
