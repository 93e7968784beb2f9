//! See [`DeadChannels`].

use std::collections::BTreeMap;

use super::{
    layer::{Layer, pads},
    surgery::{remove, spare},
};
use crate::{
    analysis::{
        channels::{Channels, Role},
        is_elementwise,
    },
    eval,
    ir::{DType, Graph, Inlet, NodeId, Op, Outlet, Tensor, Weight, tensor::strides},
    pass::{Context, Declare, Fidelity, Infer, Pass, everywhere_inferring},
};

/// Remove channels that compute nothing new: those of filters of zeros, of equal filters, and those that nothing reads.
///
/// What a filter of zeros makes is constant, and goes into the biases of the layers that read it; of equal filters the
/// first is kept, with the sum of the weights that read them (Srinivas & Babu 2015, the exact case).
///
/// Applies when: only element-wise operators and pools lie between the layers, and where what a filter of zeros makes is not
/// zero, the next layer does not pad.
///
/// Fidelity: rounding.
#[derive(Debug, clap::Parser)]
#[command(name = "dead-channels")]
pub(super) struct DeadChannels {}

impl Declare for DeadChannels {
    const NAME: &'static str = "dead-channels";
    const FIDELITY: Fidelity = Fidelity::Rounding;
}

impl Pass for DeadChannels {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let all = |graph: &mut Graph, infer: &Infer<'_>| {
            std::iter::from_fn(|| Some(clear(graph, infer)).filter(|&removed| removed > 0)).sum()
        };
        let removed = everywhere_inferring(graph, &|graph| cx.telling_shapes(graph), &all);
        cx.add("channels removed", removed);
        Ok(())
    }
}

/// Removes the dead channels of `graph`, whose shapes `infer` finds.
fn clear(graph: &mut Graph, infer: &Infer<'_>) -> usize {
    let mut next = graph.clone();
    for node in graph.ops() {
        silence(&mut next, node);
    }
    if !graph.ops().into_iter().any(|node| has_unread(&next, node) == Some(true)) {
        return 0;
    }
    let channels = Channels::of(&next, &infer(&next));
    let mut doomed = unread(&next, &channels);
    spare(&channels, &mut doomed);
    let removed = doomed.len();
    if removed > 0 {
        remove(&mut next, &channels, &doomed.into_keys().collect(), DeadChannels::NAME);
        *graph = next;
    }
    removed
}

/// Whether each slice of `tensor` along `axis` is of zeros; a quick look at the first element settles most.
fn zeros(tensor: &Tensor, axis: usize) -> Option<Vec<bool>> {
    let (size, bytes, dims) = (tensor.element_size()?, tensor.bytes(), tensor.dims());
    let (step, extent) = (strides(dims)[axis], *dims.get(axis)?);
    let is_zero = |i: usize| bytes[i * size..][..size].iter().all(|&byte| byte == 0);
    let slice = |at: usize| {
        (0..tensor.len() / (step * extent).max(1)).flat_map(move |o| {
            let first = (o * extent + at) * step;
            first..first + step
        })
    };
    Some((0..extent).map(|at| !tensor.is_empty() && slice(at).all(is_zero)).collect())
}

/// Whether some input channels of the layer at `node` are read by zeros alone.
fn has_unread(graph: &Graph, node: NodeId) -> Option<bool> {
    let layer = Layer::of(graph, node)?;
    Some(zeros(graph.constant(layer.weight)?, layer.axes.1)?.into_iter().any(|zero| zero))
}

/// The classes of channels that every layer reads with zeros.
fn unread(graph: &Graph, channels: &Channels) -> BTreeMap<usize, f64> {
    let mut read: BTreeMap<usize, bool> = BTreeMap::new();
    for side in channels.sides.iter().filter(|side| side.role == Role::Reads) {
        let zeros = graph.constant(side.weight).and_then(|weight| zeros(weight, side.axis));
        for i in 0..channels.extent(side.weight, side.axis).unwrap_or(0) {
            for &class in channels.classes(side.weight, side.axis, i) {
                *read.entry(class).or_default() |= zeros.as_ref().is_none_or(|zeros| !zeros[i]);
            }
        }
    }
    for &(value, axis) in &channels.summed {
        for i in 0..channels.extent(value, axis).unwrap_or(0) {
            read.extend(channels.classes(value, axis, i).iter().map(|&class| (class, true)));
        }
    }
    let dead = read.into_iter().filter(|(class, is_read)| !is_read && channels.pinned(*class).is_none());
    dead.map(|(class, _)| (class, 0.0)).collect()
}

/// What the layers that read a channel are to do for it to be read no more.
#[derive(Clone, Copy)]
enum Fate {
    /// It is always this number.
    Constant(f64),
    /// It is the same as an earlier one.
    Like(usize),
}

/// The output channels of `layer` that make nothing new.
fn idle(graph: &Graph, layer: &Layer) -> Option<BTreeMap<usize, Fate>> {
    let weight = graph.constant(layer.weight)?;
    let mut idle: BTreeMap<usize, Fate> = BTreeMap::new();
    for (channel, zero) in zeros(weight, layer.axes.0)?.into_iter().enumerate() {
        if zero {
            idle.insert(channel, Fate::Constant(*layer.bias.get(channel)?));
        }
    }
    // Equal filters of different groups read different channels.
    if layer.groups > 1 {
        return Some(idle);
    }
    let (size, bytes, dims) = (weight.element_size()?, weight.bytes(), weight.dims());
    let (step, extent) = (strides(dims)[layer.axes.0], dims[layer.axes.0]);
    let outer = weight.len() / (step * extent).max(1);
    let runs = |at: usize| (0..outer).map(move |o| (o * extent + at) * step);
    let run = |first: usize, length: usize| &bytes[first * size..(first + length) * size];
    let mut seen: BTreeMap<(Vec<u8>, u64), Vec<usize>> = BTreeMap::new();
    for channel in (0..extent).filter(|_| outer > 0) {
        if idle.contains_key(&channel) {
            continue;
        }
        // A few elements tell nearly all filters apart.
        let few = runs(channel).take(4).flat_map(|first| run(first, step.min(4)).to_vec()).collect();
        let alike = seen.entry((few, layer.bias[channel].to_bits())).or_default();
        let same = |&&other: &&usize| runs(channel).zip(runs(other)).all(|(a, b)| run(a, step) == run(b, step));
        match alike.iter().find(same).copied() {
            Some(other) => _ = idle.insert(channel, Fate::Like(other)),
            None => alike.push(channel),
        }
    }
    Some(idle)
}

/// Has the layers that read what the one at `node` makes read its idle channels with zeros, and do what these did.
fn silence(graph: &mut Graph, node: NodeId) -> Option<()> {
    let layer = Layer::of(graph, node)?;
    let mut idle = idle(graph, &layer).filter(|idle| !idle.is_empty())?;
    let (mut stack, mut readers) = (vec![(node.out(), Vec::new())], Vec::new());
    while let Some((value, through)) = stack.pop() {
        if graph.is_output(value) || graph.is_pinned(value) {
            return None;
        }
        for (reader, inlet) in graph.uses(value) {
            let op = graph.op(reader).filter(|_| inlet == Inlet::Slot(0))?;
            if let Some(next) = Layer::of(graph, reader) {
                readers.push((next, through.clone()));
            } else {
                passes_channels(op, layer.trailing > 0).then_some(())?;
                let further: Vec<NodeId> = through.iter().copied().chain([reader]).collect();
                stack.push((reader.out(), further));
            }
        }
    }
    // All or none: a channel that one layer still reads stays.
    for (next, through) in &readers {
        let fits = next.groups == 1
            && next.channels.1 == layer.channels.0
            && graph.op(next.node).is_some_and(|op| op.int("transA").unwrap_or(0) == 0)
            && (next.trailing > 0) == (layer.trailing > 0)
            && graph.sole_use(next.weight).is_some()
            && !graph.is_pinned(next.weight);
        fits.then_some(())?;
        idle.retain(|_, fate| match fate {
            Fate::Constant(number) => pushed(graph, through, *number)
                .is_some_and(|number| number == 0.0 || next.takes_bias && is_even(graph, next.node)),
            Fate::Like(_) => true,
        });
    }
    for (next, through) in readers {
        take_over(graph, &next, &through, &idle)?;
    }
    Some(())
}

/// Whether an operator computes each channel of its result from the same channel of its first operand, and a constant from
/// a constant; `has_space` is whether axes come after that of the channels.
fn passes_channels(op: &Op, has_space: bool) -> bool {
    let pads = op.ints("pads").is_some_and(|pads| pads.iter().any(|&pad| pad != 0)) || op.string("auto_pad").is_some();
    match op.standard() {
        Some("AveragePool") => has_space && !pads,
        Some("MaxPool" | "GlobalAveragePool" | "GlobalMaxPool") => has_space,
        Some(kind) => is_elementwise(kind),
        None => false,
    }
}

/// What the operators of `through` make of a number, one after the other.
fn pushed(graph: &Graph, through: &[NodeId], number: f64) -> Option<f64> {
    let mut value = Tensor::floats(DType::Float, &[1], &[number])?;
    for &node in through {
        let op = graph.op(node)?;
        if op.op_type().ends_with("Pool") {
            continue;
        }
        let rest = graph.operands(node).into_iter().skip(1).map(|v| v.and_then(|v| graph.constant(v)));
        let inputs: Vec<_> = [Some(&value)].into_iter().chain(rest).collect();
        value = eval::evaluate(op, graph.opset(), &inputs)?.pop()?;
    }
    value.f64s()?.first().copied().filter(|number| number.is_finite())
}

/// Whether every element of the result of the layer at `node` reads the same elements of the weight.
fn is_even(graph: &Graph, node: NodeId) -> bool {
    graph.op(node).is_some_and(|op| {
        let plain = op.float("alpha").unwrap_or(1.0) == 1.0 && op.int("transA").unwrap_or(0) == 0;
        !op.is("ConvTranspose") && !pads(op) && plain
    })
}

/// Has `layer` read the channels of `idle` with zeros, their part taken by its bias and by what they are like.
fn take_over(graph: &mut Graph, layer: &Layer, through: &[NodeId], idle: &BTreeMap<usize, Fate>) -> Option<()> {
    let weight = graph.weight(layer.weight)?.clone();
    let mut values = weight.value().f64s()?;
    let number = |fate: &Fate| match fate {
        Fate::Constant(number) => pushed(graph, through, *number),
        Fate::Like(_) => Some(0.0),
    };
    let numbers: BTreeMap<usize, f64> =
        idle.iter().map(|(&channel, fate)| Some((channel, number(fate)?))).collect::<Option<_>>()?;
    let (mut bias, mut sums) = (layer.bias.clone(), BTreeMap::new());
    let (run, channels) = layer.runs_of(weight.value().dims());
    for (values, (output, input)) in values.chunks_mut(run).zip(channels) {
        match idle.get(&input) {
            Some(Fate::Constant(_)) => bias[output] += values.iter().sum::<f64>() * numbers[&input],
            Some(Fate::Like(other)) => {
                let sum = sums.entry((output, *other)).or_insert_with(|| vec![0.0; run]);
                sum.iter_mut().zip(values.iter()).for_each(|(sum, value)| *sum += value);
            }
            None => continue,
        }
        values.fill(0.0);
    }
    let (_, channels) = layer.runs_of(weight.value().dims());
    for (values, place) in values.chunks_mut(run).zip(channels) {
        if let Some(sum) = sums.get(&place) {
            values.iter_mut().zip(sum).for_each(|(value, part)| *value += part);
        }
    }
    let changed = layer.fit_weight(&weight, weight.value().dims(), &values)?;
    if changed.value().same(weight.value()) {
        return Some(());
    }
    replace(graph, layer, changed, &bias)
}

fn replace(graph: &mut Graph, layer: &Layer, weight: Weight, bias: &[f64]) -> Option<()> {
    let bias = if bias == layer.bias { None } else { Some(layer.fit_bias(graph, bias)?) };
    let name = |value: Outlet, what: &str| graph.name_after(value, what);
    let names = (name(layer.weight, DeadChannels::NAME), name(layer.node.out(), "bias"));
    let weight = graph.add_const(weight, &names.0);
    graph.exchange_operand(layer.node, 1, Some(weight));
    if let Some(bias) = bias {
        let bias = graph.add_const(bias, &names.1);
        graph.exchange_operand(layer.node, 2, Some(bias));
        graph.edit_op(layer.node, |op| *op = std::mem::take(op).without("beta"));
    }
    Some(())
}
