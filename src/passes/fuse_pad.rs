//! See [`FusePad`].

use crate::{
    analysis::never_negative,
    eval::axis,
    ir::{Graph, NodeId, Op, Outlet},
    pass::{Context, Declare, Fidelity, Pass, rewrite},
};

/// Pad in the convolution or pool that reads what is padded.
///
/// Zeros around the operand of a `Conv` or of an `AveragePool` that counts them are its own padding. Around that of a
/// `MaxPool`, so are copies of the edge, the least number, and zeros where nothing is negative, as long as no window lies
/// in the padding alone.
///
/// Applies when: the padding is constant, of spatial axes, and read by nothing else; also through a `Transpose`.
///
/// Fidelity: rounding.
#[derive(Debug, clap::Parser)]
#[command(name = "fuse-pad")]
pub(super) struct FusePad {}

impl Declare for FusePad {
    const NAME: &'static str = "fuse-pad";
    const FIDELITY: Fidelity = Fidelity::Rounding;
}

impl Pass for FusePad {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        cx.add("paddings fused", rewrite(graph, fuse));
        Ok(())
    }
}

/// What is put around a value.
#[derive(Clone, Copy, PartialEq)]
enum Border {
    Number(f64),
    Edge,
}

/// A `Pad`, seen by the operator that reads it, maybe through a `Transpose`.
struct Padding {
    pad: NodeId,
    source: Outlet,
    /// What reads the padded value, in slot 0.
    reader: NodeId,
    /// Before each axis, then after each.
    pads: Vec<i64>,
    border: Border,
}

impl Padding {
    fn before(graph: &Graph, node: NodeId) -> Option<Self> {
        let value = graph.operand(node, 0)?;
        graph.sole_use(value).filter(|_| !graph.is_pinned(value))?;
        let Some(transpose) = graph.op_of(value.node, "Transpose") else { return Self::of(graph, value, node) };
        let inner = graph.operand(value.node, 0)?;
        graph.sole_use(inner).filter(|_| !graph.is_pinned(inner))?;
        let padding = Self::of(graph, inner, value.node)?;
        let rank = padding.pads.len() / 2;
        let perm = match transpose.ints("perm") {
            Some(perm) => perm.iter().map(|&a| axis(a, rank)).collect::<Option<Vec<_>>>()?,
            None => (0..rank).rev().collect(),
        };
        let pads = perm.iter().copied().chain(perm.iter().map(|a| a + rank)).map(|i| padding.pads[i]).collect();
        (perm.len() == rank).then_some(Self { pads, ..padding })
    }

    fn of(graph: &Graph, value: Outlet, reader: NodeId) -> Option<Self> {
        let pad = value.node;
        let op = graph.op_of(pad, "Pad")?;
        let pads = match graph.operand(pad, 1) {
            Some(pads) => graph.constant(pads)?.i64s()?,
            None => op.ints("pads").or(op.ints("paddings"))?.to_vec(),
        };
        let number = || match graph.operand(pad, 2) {
            Some(number) => {
                let number = graph.constant(number)?;
                number.f64s().and_then(|v| v.first().copied()).or_else(|| Some(*number.i64s()?.first()? as f64))
            }
            None => Some(op.float("value").map_or(0.0, f64::from)),
        };
        let border = match op.string("mode").unwrap_or("constant") {
            "constant" => Border::Number(number()?),
            "edge" => Border::Edge,
            _ => return None,
        };
        let plain = graph.operand(pad, 3).is_none() && pads.len() % 2 == 0 && pads.iter().all(|&pad| pad >= 0);
        plain.then_some(Self { pad, source: graph.operand(pad, 0)?, reader, pads, border })
    }
}

fn fuse(graph: &mut Graph, node: NodeId) -> Option<()> {
    let op = graph.op(node)?;
    let kind = op.standard().filter(|kind| matches!(*kind, "Conv" | "ConvInteger" | "MaxPool" | "AveragePool"))?;
    let Padding { pad, source, reader, pads, border } = Padding::before(graph, node)?;
    let rank = pads.len() / 2;
    let spatial = rank.checked_sub(2)?;
    let moves_channels = [0, 1, rank, rank + 1].iter().any(|&i| pads[i] != 0);
    let explicit = match op.string("auto_pad").unwrap_or("NOTSET") {
        "NOTSET" => true,
        "VALID" => op.ints("pads").is_none(),
        _ => false,
    };
    if moves_channels || !explicit || op.int("ceil_mode") == Some(1) || graph.output_count(node) != 1 {
        return None;
    }
    let own = op.ints("pads").map_or_else(|| vec![0; 2 * spatial], <[i64]>::to_vec);
    let added: Vec<i64> = pads[2..rank].iter().chain(&pads[rank + 2..]).copied().collect();
    let per_axis = |name: &str| op.ints(name).map_or_else(|| vec![1; spatial], <[i64]>::to_vec);
    let (kernel, dilations) = (per_axis("kernel_shape"), per_axis("dilations"));
    if [own.len(), added.len()] != [2 * spatial; 2] || [kernel.len(), dilations.len()] != [spatial; 2] {
        return None;
    }
    let no_own = own.iter().all(|&pad| pad == 0);
    let all: Vec<i64> = own.iter().zip(&added).map(|(a, b)| a.checked_add(*b)).collect::<Option<_>>()?;
    // A window that reaches into the padding still holds an element beside it.
    let reaches_inside = (0..2 * spatial).all(|i| all[i] < kernel[i % spatial] && dilations[i % spatial] == 1);
    let counts = op.int("count_include_pad") == Some(1);
    let fits = match (kind, border) {
        ("Conv", Border::Number(number)) => number == 0.0,
        // Its own padding is the zero point.
        ("ConvInteger", Border::Number(number)) => match graph.operand(node, 2) {
            Some(zero) => graph.constant(zero)?.i64s()?.iter().all(|&zero| zero as f64 == number),
            None => number == 0.0,
        },
        ("AveragePool", Border::Number(number)) => {
            number == 0.0 && (no_own || counts) && reaches_inside && graph.opset() >= 7
        }
        ("MaxPool", Border::Edge) => reaches_inside && no_own,
        ("MaxPool", Border::Number(number)) => {
            let least = number == f64::NEG_INFINITY || number == 0.0 && is_never_negative(graph, source);
            least && reaches_inside
        }
        _ => false,
    };
    if !fits {
        return None;
    }
    let must_count = kind == "AveragePool" && !counts;
    graph.edit_op(node, |op| {
        *op = std::mem::take(op).without("auto_pad").with_ints("pads", &all);
        if must_count {
            *op = std::mem::take(op).with_int("count_include_pad", 1);
        }
    });
    graph.set_operand(reader, 0, Some(source));
    if reader != node {
        graph.forget_info(reader.out());
    }
    graph.sweep(pad);
    Some(())
}

/// Whether no element of `value` is below zero.
fn is_never_negative(graph: &Graph, value: Outlet) -> bool {
    graph.op(value.node).and_then(Op::standard).is_some_and(never_negative)
}
