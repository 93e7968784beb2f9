//! What must hold for any model: random networks, and formulas against slow references.

use std::{collections::BTreeMap, fmt::Write};

use nalgebra::DMatrix;
use onnx_shrink::{
    analysis::{
        channels::{Channels, Role},
        shapes::Shapes,
    },
    codec::Model,
    ir::{Tensor, Weight},
    linalg::Spectrum,
    pass::{Context, Price},
    pipeline, text,
    verify::{Engine, ROUNDING_BUDGET, Reference, Request, Samples, Split},
};
use proptest::{prelude::*, test_runner::RngSeed};

use crate::{fixtures, models};

/// A network of random operators over maps of channels, as text; equal choices give equal networks.
#[derive(Default)]
struct Network {
    constants: Vec<String>,
    nodes: Vec<String>,
    /// Name, channels and height (and width) of each value.
    values: Vec<(String, usize, usize)>,
}

impl Network {
    fn of(choices: &[u8]) -> String {
        let mut network = Self { values: vec![("x".to_owned(), 3, 8)], ..Self::default() };
        for pair in choices.chunks(2) {
            network.add(pair[0], usize::from(pair[pair.len() - 1]));
        }
        let (last, channels, _) = network.values.last().unwrap().clone();
        network.constant(&format!("float[5,{channels}] head"));
        network.nodes.push(format!("pooled = GlobalAveragePool ({last})\n flat = Flatten (pooled)"));
        network.nodes.push("y = Gemm <transB = 1> (flat, head)".to_owned());
        let mut text = String::from("<ir_version: 8, opset_import: [\"\": 17]>\n");
        write!(text, "g (float[N,3,8,8] x) => (float[N,5] y)\n<{}>\n", network.constants.join(",\n ")).unwrap();
        write!(text, "{{\n {}\n}}\n", network.nodes.join("\n ")).unwrap();
        text
    }

    fn constant(&mut self, declared: &str) {
        self.constants.push(format!("{declared} = normal({})", self.constants.len()));
    }

    /// A positive constant for each channel.
    fn positive(&mut self, name: &str, channels: usize) {
        let values: Vec<_> = (0..channels).map(|i| format!("{:?}", 0.5 + i as f32 * 0.25)).collect();
        self.constants.push(format!("float[{channels}] {name} = {{{}}}", values.join(", ")));
    }

    /// Adds the operator that `kind` stands for, on the value that `pick` stands for.
    fn add(&mut self, kind: u8, pick: usize) {
        let n = self.nodes.len();
        let (x, channels, size) = self.values[pick % self.values.len()].clone();
        let other = self.values.iter().rev().find(|v| v.1 == channels && v.2 == size && v.0 != x).cloned();
        let beside = self.values.iter().rev().find(|v| v.2 == size && v.1 + channels <= 32).cloned();
        let new = format!("v{n}");
        let mut result = (new.clone(), channels, size);
        let node = match kind % 22 {
            21 => self.mixture(&new, &x, channels, size),
            0 | 1 => {
                result.1 = 4 + pick % 5 * 2;
                self.constant(&format!("float[{},{channels},3,3] w{n}", result.1));
                self.constant(&format!("float[{}] b{n}", result.1));
                format!("{new} = Conv <pads = [1, 1, 1, 1]> ({x}, w{n}, b{n})")
            }
            2 => {
                result.1 = 4 + pick % 5 * 2;
                self.constant(&format!("float[{},{channels},1,1] w{n}", result.1));
                format!("{new} = Conv ({x}, w{n})")
            }
            3 => {
                self.constant(&format!("float[{channels},1,3,3] w{n}"));
                format!("{new} = Conv <group = {channels}, pads = [1, 1, 1, 1]> ({x}, w{n})")
            }
            4 => {
                self.constant(&format!("float[{channels}] b{n}"));
                self.constant(&format!("float[{channels}] m{n}"));
                self.positive(&format!("s{n}"), channels);
                self.positive(&format!("v{n}_var"), channels);
                format!("{new} = BatchNormalization ({x}, s{n}, b{n}, m{n}, v{n}_var)")
            }
            5 => format!("{new} = Relu ({x})"),
            6 => format!("{new} = HardSigmoid ({x})"),
            7 => match other {
                Some((other, ..)) => format!("{new} = Add ({x}, {other})"),
                None => format!("{new} = Identity ({x})"),
            },
            8 => match beside {
                Some((other, more, _)) => {
                    result.1 += more;
                    format!("{new} = Concat <axis = 1> ({x}, {other})")
                }
                None => format!("{new} = Dropout ({x})"),
            },
            9 if size >= 4 => {
                result.2 = size / 2;
                format!("{new} = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> ({x})")
            }
            10 if channels % 2 == 0 => {
                result.1 = channels / 2;
                self.constants.push(format!("int64[2] parts{n} = {{{0}, {0}}}", channels / 2));
                format!("{new}, {new}_rest = Split <axis = 1> ({x}, parts{n})")
            }
            11 => {
                format!(
                    "{new}_t = Transpose <perm = [0, 2, 3, 1]> ({x})\n {new} = Transpose <perm = [0, 3, 1, 2]> ({new}_t)"
                )
            }
            12 => {
                format!("{new}_p = GlobalAveragePool ({x})\n {new}_g = Sigmoid ({new}_p)\n {new} = Mul ({x}, {new}_g)")
            }
            13 if channels % 2 == 0 => {
                result.1 = 4 + pick % 4 * 2;
                self.constant(&format!("float[{},{},3,3] w{n}", result.1, channels / 2));
                format!("{new} = Conv <group = 2, pads = [1, 1, 1, 1]> ({x}, w{n})")
            }
            14 if channels % 2 == 0 => {
                let half = channels / 2;
                self.constants.push(format!("int64[5] apart{n} = {{-1, 2, {half}, {size}, {size}}}"));
                self.constants.push(format!("int64[4] whole{n} = {{-1, {channels}, {size}, {size}}}"));
                format!(
                    "{new}_r = Reshape ({x}, apart{n})\n {new}_t = Transpose <perm = [0, 2, 1, 3, 4]> ({new}_r)\n \
                     {new} = Reshape ({new}_t, whole{n})"
                )
            }
            15 => {
                let order: Vec<_> = (0..channels).map(|i| ((i * 3 + pick) % channels).to_string()).collect();
                self.constants.push(format!("int64[{channels}] order{n} = {{{}}}", order.join(", ")));
                format!("{new} = Gather <axis = 1> ({x}, order{n})")
            }
            16 if channels > 3 => {
                result.1 = channels - 2;
                self.constants.push(format!("int64[1] one{n} = {{1}}, int64[1] end{n} = {{-1}}"));
                format!("{new} = Slice ({x}, one{n}, end{n}, one{n})")
            }
            17 if size >= 4 && channels <= 8 => {
                result = (new.clone(), channels * 4, size / 2);
                format!("{new} = SpaceToDepth <blocksize = 2> ({x})")
            }
            18 if channels % 4 == 0 && size <= 4 => {
                result = (new.clone(), channels / 4, size * 2);
                format!("{new} = DepthToSpace <blocksize = 2> ({x})")
            }
            19 if size <= 4 => self.attention(&new, &x, channels, size),
            _ => {
                self.constants.push(format!("int64[8] pads{n} = {{0, 0, 0, 0, 0, 0, 0, 0}}"));
                format!("{new} = Pad ({x}, pads{n})")
            }
        };
        self.nodes.push(node);
        self.values.push(result);
    }

    /// A mixture of the pixels of `x` by how alike they are: products of values alone.
    fn mixture(&mut self, new: &str, x: &str, channels: usize, size: usize) -> String {
        let (n, area) = (self.nodes.len(), size * size);
        self.constants.push(format!("int64[3] flat{n} = {{0, {channels}, {area}}}"));
        self.constants.push(format!("int64[4] map{n} = {{0, {channels}, {size}, {size}}}"));
        let nodes = [
            format!("{new}_f = Reshape ({x}, flat{n})"),
            format!("{new}_t = Transpose <perm = [0, 2, 1]> ({new}_f)"),
            format!("{new}_l = MatMul ({new}_t, {new}_f)"),
            format!("{new}_a = Softmax <axis = 1> ({new}_l)"),
            format!("{new}_m = MatMul ({new}_f, {new}_a)"),
            format!("{new} = Reshape ({new}_m, map{n})"),
        ];
        nodes.join("\n ")
    }

    /// Attention of two heads over the pixels of `x`, the residual sum included.
    fn attention(&mut self, new: &str, x: &str, channels: usize, size: usize) -> String {
        let (n, area) = (self.nodes.len(), size * size);
        for name in ["q", "k", "v"] {
            self.constant(&format!("float[{channels},6] {name}w{n}"));
        }
        self.constant(&format!("float[6,{channels}] o{n}"));
        self.constants.push(format!("int64[3] rows{n} = {{0, {channels}, {area}}}"));
        self.constants.push(format!("int64[4] heads{n} = {{-1, {area}, 2, 3}}"));
        self.constants.push(format!("int64[3] joined{n} = {{-1, {area}, 6}}"));
        self.constants.push(format!("int64[4] map{n} = {{0, {channels}, {size}, {size}}}"));
        let mut nodes = vec![
            format!("{new}_f = Reshape ({x}, rows{n})"),
            format!("{new}_s = Transpose <perm = [0, 2, 1]> ({new}_f)"),
        ];
        for (name, perm) in [("q", "[0, 2, 1, 3]"), ("k", "[0, 2, 3, 1]"), ("v", "[0, 2, 1, 3]")] {
            nodes.push(format!("{new}_{name}0 = MatMul ({new}_s, {name}w{n})"));
            nodes.push(format!("{new}_{name}1 = Reshape ({new}_{name}0, heads{n})"));
            nodes.push(format!("{new}_{name} = Transpose <perm = {perm}> ({new}_{name}1)"));
        }
        nodes.extend([
            format!("{new}_l = MatMul ({new}_q, {new}_k)"),
            format!("{new}_a = Softmax <axis = -1> ({new}_l)"),
            format!("{new}_h = MatMul ({new}_a, {new}_v)"),
            format!("{new}_h1 = Transpose <perm = [0, 2, 1, 3]> ({new}_h)"),
            format!("{new}_h2 = Reshape ({new}_h1, joined{n})"),
            format!("{new}_p = MatMul ({new}_h2, o{n})"),
            format!("{new}_p1 = Transpose <perm = [0, 2, 1]> ({new}_p)"),
            format!("{new}_p2 = Reshape ({new}_p1, map{n})"),
            format!("{new} = Add ({x}, {new}_p2)"),
        ]);
        nodes.join("\n ")
    }
}

fn run(passes: &str, model: &mut Model, price: Price) {
    let items: Vec<_> = pipeline::parse(passes).unwrap();
    let mut cx = Context::at(Samples::likely_shapes(model, &Request::default()));
    pipeline::run(&items, model, &mut cx, price).unwrap();
}

/// The largest relative difference between outputs, at a batch of `batch`.
fn rounding(before: &Model, after: &Model, batch: usize) -> f64 {
    let mut shapes = Samples::likely_shapes(before, &Request::default());
    for dims in shapes.values_mut() {
        dims[0] = batch;
    }
    let samples = Samples::gather(before, &Request { shapes, ..Request::default() }).unwrap();
    assert_eq!(samples.unrunnable, None);
    let reference = Reference::new(&Engine::default(), before, samples.part(Split::Last)).unwrap();
    reference.compare(after).unwrap().rounding
}

/// `model` with about half of the channels that may go set to zero in every constant that knows them; `None` where nothing of
/// a constant would be left, so that the channels that it makes could not be told apart.
fn with_dead_channels(model: &Model) -> Option<Model> {
    let mut dead = model.clone();
    let bound = Samples::likely_shapes(model, &Request::default());
    let channels = Channels::of(&dead.graph, &Shapes::infer(&dead.graph, &bound));
    let goes = |class: usize| !class.is_multiple_of(3) && channels.pinned(class).is_none();
    let mut zeroed: BTreeMap<_, Weight> = BTreeMap::new();
    for (value, axis, extent) in channels.axes() {
        let Some(weight) = zeroed.get(&value).or_else(|| dead.graph.weight(value)).cloned() else { continue };
        let Some(mut values) = weight.value().f64s() else { continue };
        let step = onnx_shrink::ir::tensor::strides(weight.value().dims())[axis];
        let gone: Vec<_> = (0..extent).map(|i| channels.classes(value, axis, i).iter().copied().any(goes)).collect();
        for (i, v) in values.iter_mut().enumerate() {
            if gone[i / step % extent] {
                *v = 0.0;
            }
        }
        if values.iter().all(|&v| v == 0.0) && weight.value().f64s()?.iter().any(|&v| v != 0.0) {
            return None;
        }
        let tensor = Tensor::floats(weight.value().dtype(), weight.value().dims(), &values).unwrap();
        zeroed.insert(value, Weight::dense(tensor));
    }
    for (value, weight) in zeroed {
        dead.graph.set_weight(value, weight);
    }
    Some(dead)
}

/// Has one weight of `model` read its second channel with zeros, whoever else reads that, and removes what is dead.
fn a_channel_that_one_reader_ignores_is_kept_for_others(model: &Model, at: usize) {
    let bound = Samples::likely_shapes(model, &Request::default());
    let channels = Channels::of(&model.graph, &Shapes::infer(&model.graph, &bound));
    let readers: Vec<_> = channels.sides.iter().filter(|side| side.role == Role::Reads).collect();
    let Some(side) = readers.get(at % readers.len().max(1)) else { return };
    let mut ignoring = model.clone();
    let weight = model.graph.constant(side.weight).unwrap();
    let (step, extent) = (onnx_shrink::ir::tensor::strides(weight.dims())[side.axis], weight.dims()[side.axis]);
    let values = weight.f64s().unwrap().into_iter().enumerate();
    let values: Vec<_> = values.map(|(i, v)| if i / step % extent == 1 { 0.0 } else { v }).collect();
    let tensor = Tensor::floats(weight.dtype(), weight.dims(), &values).unwrap();
    ignoring.graph.set_weight(side.weight, Weight::dense(tensor));
    let mut clear = ignoring.clone();
    run("dead-channels", &mut clear, Price::default());
    let difference = rounding(&ignoring, &clear, 2);
    assert!(difference <= ROUNDING_BUDGET, "{difference}: {}", text::diff(&ignoring, &clear));
}

/// Prunes what costs nothing.
const FREE: Price = Price { ceiling: 0.0, ..Price::per_byte(1.0) };

fn dead_channels_go_without_a_trace(model: &Model, batch: usize) -> usize {
    let Some(dead) = with_dead_channels(model) else { return 0 };
    let mut pruned = dead.clone();
    let prune = vec![pipeline::parse("identity,prune").unwrap().remove(1)];
    let mut cx = Context::at(Samples::likely_shapes(model, &Request::default()));
    let outcomes = pipeline::run(&prune, &mut pruned, &mut cx, FREE).unwrap();
    let difference = rounding(&dead, &pruned, batch);
    assert!(difference <= ROUNDING_BUDGET, "{difference}: {}", text::diff(&dead, &pruned));
    outcomes[0].tally.get("channels removed").copied().unwrap_or(0) as usize
}

#[test]
fn channels_of_zeros_can_be_pruned_from_every_model_without_a_trace() {
    for path in models() {
        let mut model = Model::open(&path).unwrap();
        run("simplify", &mut model, Price::default());
        let batches: &[usize] = if path.ends_with("ppocr_cls.onnx") { &[1] } else { &[1, 2] };
        for &batch in batches {
            let removed = dead_channels_go_without_a_trace(&model, batch);
            assert!(removed > 30, "{}: {removed}", path.display());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 256,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(0),
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_networks_are_simplified_and_pruned_without_a_trace(choices in prop::collection::vec(any::<u8>(), 2..40)) {
        let text = Network::of(&choices);
        let model = text::parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        let mut simple = model.clone();
        run("simplify", &mut simple, Price::default());
        prop_assert!(rounding(&model, &simple, 2) <= ROUNDING_BUDGET, "{}", text::print(&simple));
        let mut twice = Model::decode(simple.encode().into(), None).unwrap();
        run("simplify", &mut twice, Price::default());
        prop_assert_eq!(twice.graph.edits(), 0);
        prop_assert!(simple.encode().len() <= model.encode().len());
        dead_channels_go_without_a_trace(&simple, 2);
        dead_channels_go_without_a_trace(&model, 1);
        a_channel_that_one_reader_ignores_is_kept_for_others(&simple, choices[0].into());
        a_channel_that_one_reader_ignores_is_kept_for_others(&model, choices[1].into());
    }

    #[test]
    fn pruned_random_networks_still_run(choices in prop::collection::vec(any::<u8>(), 2..40), ratio in 0.1..0.9_f64) {
        let model = text::parse(&Network::of(&choices)).unwrap();
        let mut pruned = model.clone();
        run(&format!("prune:ratio={ratio}"), &mut pruned, Price::default());
        let samples = Samples::gather(&pruned, &Request::default()).unwrap();
        prop_assert_eq!(samples.unrunnable, None);
    }

    #[test]
    fn the_tail_of_a_spectrum_is_that_of_a_slow_svd(
        rows in 2..24_usize, columns in 2..24_usize, rank in 1..24_usize, seed in any::<u64>(),
    ) {
        let rank = rank.min(rows).min(columns);
        let mut state = seed | 1;
        let matrix = DMatrix::from_fn(rows, columns, |_, _| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / f64::from(1_u32 << 30) - 1.0
        });
        let spectrum = Spectrum::of(&matrix, None).unwrap();
        let slow = matrix.clone().svd(false, false).singular_values;
        let tail: f64 = slow.iter().skip(rank).map(|s| s * s).sum();
        prop_assert!((spectrum.tail(rank) - tail).abs() <= 1e-9 * spectrum.total);
        let (left, right) = spectrum.factors(&matrix, rank);
        let error = (&matrix - left * right).norm_squared();
        prop_assert!((error - tail).abs() <= 1e-9 * spectrum.total, "{} {}", error, tail);
    }
}

#[test]
fn what_is_printed_without_marks_is_read_back() {
    let mut read = 0;
    for folder in ["identity", "fold-constants", "fuse-batch-norm", "dead-nodes"] {
        for path in fixtures(&format!("passes/{folder}")).iter().filter(|p| p.extension().unwrap() == "onnxtxt") {
            let printed = text::print(&text::parse(&std::fs::read_to_string(path).unwrap()).unwrap());
            if !printed.contains('#') {
                let again = text::parse(&printed).unwrap_or_else(|error| panic!("{error}\n{printed}"));
                assert_eq!(text::print(&again), printed);
                read += 1;
            }
        }
    }
    assert!(read >= 10, "{read}");
}

#[test]
fn every_kind_of_model_is_printed_and_wrong_text_is_an_error_with_its_line() {
    for path in fixtures("roundtrip") {
        assert!(text::print(&Model::open(&path).unwrap()).contains("=>"), "{}", path.display());
    }
    let head = "<ir_version: 8, opset_import: [\"\": 17]>\n";
    for (wrong, line) in [
        ("g (float[N x) => (float y)\n{\n}\n", 2),
        ("g (float[N] x) => (float[N] y)\n{\n y = Relu (x\n}\n", 5),
        ("g (float[N] x) => (float[N] y)\n<float[2] w = normal(1, 2)>\n{\n}\n", 3),
        ("g (float[N] x) => (float[N] y)\n<float[2] w = {1.0}>\n{\n}\n", 3),
    ] {
        let error = text::parse(&format!("{head}{wrong}")).unwrap_err();
        assert_eq!(error.line, line, "{error}");
    }
}
