//! Chains of layers in place of one: what they make, and what is said of it.

use nalgebra::DMatrix;
use onnx_shrink::{
    analysis::linear::Linear,
    codec::Model,
    factor::{Family, Form, Metric, Orders, Shape, Target},
    ir::{Tensor, Weight},
    linalg::normal,
    pass::{Context, Price},
    pipeline, text,
    verify::{Engine, Reference, Request, Samples, Split},
};
use rand_xoshiro::{Xoshiro256PlusPlus, rand_core::SeedableRng};

const FAMILIES: [Family; 11] = [
    Family::After,
    Family::Before,
    Family::Both,
    Family::Spatial { first: 0 },
    Family::Spatial { first: 1 },
    Family::Spatial { first: 2 },
    Family::Separate,
    Family::Mixed,
    Family::Grouped { bypass: 0 },
    Family::Grouped { bypass: 1 },
    Family::Kronecker,
];

fn draw(random: &mut Xoshiro256PlusPlus, rows: usize, columns: usize) -> DMatrix<f64> {
    DMatrix::from_fn(rows, columns, |_, _| normal(random))
}

/// Layers of all kinds: groups, made, read, kernel, and whether it spreads.
fn shapes() -> Vec<Shape> {
    let shape = |groups, makes, reads, kernel: &[usize], spreads| Shape {
        groups,
        makes,
        reads,
        kernel: kernel.to_vec(),
        spreads,
    };
    vec![
        shape(1, 7, 9, &[], false),
        shape(1, 9, 5, &[], false),
        shape(1, 8, 12, &[], false),
        shape(1, 6, 4, &[3, 3], false),
        shape(1, 4, 6, &[3, 2], false),
        shape(2, 3, 4, &[3], false),
        shape(1, 3, 2, &[2, 3, 2], false),
        shape(3, 2, 1, &[3, 3], false),
        shape(1, 5, 6, &[3, 3], true),
        shape(2, 3, 4, &[2, 2], true),
    ]
}

/// A layer of this shape on vectors whose elements vary together, of `kind` 0 nothing, of 1 channels, of 2 all is known.
fn target(shape: &Shape, kind: usize) -> Target {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(11);
    let taps = shape.taps();
    let (rows, columns) =
        if shape.spreads { (shape.makes * taps, shape.reads) } else { (shape.makes, shape.reads * taps) };
    let matrices = (0..shape.groups).map(|_| draw(&mut random, rows, columns)).collect();
    let mut covariance = |size: usize| {
        let mixing = draw(&mut random, size, size);
        &mixing * mixing.transpose() + DMatrix::identity(size, size) * 0.01
    };
    let mut metric = |_| match kind {
        0 => Metric::Identity,
        1 if !shape.spreads => Metric::Channels(covariance(shape.reads)),
        _ => Metric::Full(covariance(columns)),
    };
    Target { matrices, metrics: (0..shape.groups).map(&mut metric).collect(), shape: shape.clone() }
}

#[test]
fn chains_make_what_they_say_at_the_error_that_they_say_and_all_at_full_strength() {
    let mut tried = 0;
    for (shape, kind) in shapes().iter().flat_map(|shape| (0..3).map(move |kind| (shape, kind))) {
        let target = target(shape, kind);
        for family in FAMILIES.into_iter().filter(|family| family.fits(shape)) {
            let prepared = family.prepare(&target, None).unwrap();
            let curve = prepared.curve(1);
            let mut last = f64::INFINITY;
            for &(form, error) in &curve {
                let what = format!("{shape:?} {kind} {form:?}");
                assert_eq!(form.family(), family, "{what}");
                let fitted = prepared.fit(&target, form).unwrap();
                for (stage, layout) in fitted.stages.iter().zip(form.layouts(shape)) {
                    assert_eq!(stage.len(), layout.elements(), "{what}");
                }
                // What is beside a layer in groups is not composed.
                let is_composed = !matches!(form, Form::Grouped { bypass: 1.., .. });
                let composed = form.compose(shape, &fitted.stages);
                for (place, (whole, composed)) in fitted.whole.iter().zip(composed).enumerate().filter(|_| is_composed)
                {
                    let whole =
                        fitted.orders.as_ref().map_or(whole.clone(), |orders| arranged(whole, shape, orders, place));
                    assert!((&whole - composed).norm() <= 1e-9 * whole.norm().max(1.0), "{what}");
                }
                let found = target.error(&fitted.whole);
                // Of both ranks, the second is chosen anew among what the first leaves, which can only be closer.
                let is_close =
                    (found - error).abs() <= 1e-6 + 0.01 * error || family == Family::Both && found <= error + 1e-6;
                assert!(is_close, "{what}: {found} {error}");
                // Of groups, more of them need not be parts of fewer.
                if !matches!(family, Family::Both | Family::Grouped { .. }) {
                    assert!(error <= last + 1e-9, "{what}: {error} after {last}");
                }
                last = error;
                tried += 1;
            }
            let (form, error) = *curve.last().unwrap();
            assert!(error < 1e-8 || matches!(family, Family::Grouped { .. }), "{shape:?} {kind} {form:?}: {error}");
        }
    }
    assert!(tried > 500, "{tried}");
}

/// W of the group `place` with its channels in these orders.
fn arranged(whole: &DMatrix<f64>, shape: &Shape, orders: &Orders, place: usize) -> DMatrix<f64> {
    let (rows, columns) = shape.extents();
    let elements = |order: &[usize], count: usize, taps: usize| {
        let own = order[place * count..(place + 1) * count].iter().map(|channel| channel - place * count);
        own.flat_map(|channel| (0..taps).map(move |tap| channel * taps + tap)).collect::<Vec<_>>()
    };
    let columns = elements(&orders.reads, shape.reads, columns);
    whole.select_rows(&elements(&orders.makes, shape.makes, rows)).select_columns(&columns)
}

#[test]
fn what_is_known_of_inputs_never_makes_a_chain_worse_by_them() {
    for shape in shapes() {
        let known = target(&shape, 2);
        let plain = Target { metrics: vec![Metric::Identity; shape.groups], ..known.clone() };
        for family in FAMILIES.into_iter().filter(|family| family.fits(&shape)) {
            let (aware, blind) = (family.prepare(&known, None).unwrap(), family.prepare(&plain, None).unwrap());
            let (mut sum, mut blind_sum) = (0.0, 0.0);
            for &(form, _) in &aware.curve(1) {
                let error = |whole: &[DMatrix<f64>]| known.error(whole);
                let (own, other) = (aware.fit(&known, form).unwrap(), blind.fit(&plain, form).unwrap());
                let (own, other) = (error(&own.whole), error(&other.whole));
                let is_closest = matches!(form, Form::Ranks { before: None, .. }) && !shape.spreads;
                // What starts from where the other ends only comes closer.
                if is_closest || matches!(form, Form::Kronecker { .. }) {
                    assert!(own <= other + 1e-9, "{form:?}: {own} {other}");
                }
                sum += own;
                blind_sum += other;
            }
            // Where features are chosen by a mean over the kernel, single ranks may be off; their weights never are.
            assert!(sum <= blind_sum + 1e-9, "{shape:?} {family:?}: {sum} {blind_sum}");
        }
    }
}

#[test]
fn what_groups_miss_is_made_up_for_and_hidden_blocks_are_lost_nothing_of() {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(5);
    for shape in [(1, 8, 12, &[][..], false), (2, 6, 4, &[3, 2], false), (1, 8, 4, &[2, 2], true)] {
        let (groups, makes, reads, kernel, spreads) = shape;
        let shape = Shape { groups, makes, reads, kernel: kernel.to_vec(), spreads };
        let (rows, columns) = shape.extents();
        let mut known = target(&shape, 2);
        let form = Form::Grouped { parts: 2, bypass: 0 };
        let fit = |target: &Target| form.family().prepare(target, Some(2)).unwrap().fit(target, form).unwrap();
        let fitted = fit(&known);
        let masked: Vec<_> = known
            .matrices
            .iter()
            .zip(&fitted.whole)
            .map(|(matrix, whole)| matrix.zip_map(whole, |value, kept| if kept == 0.0 { 0.0 } else { value }))
            .collect();
        let (found, cut) = (known.error(&fitted.whole), known.error(&masked));
        assert!(found < cut, "{shape:?}: {found} {cut}");
        // Each half of the channels in a random order.
        for matrix in &mut known.matrices {
            let mut halves = |count: usize| {
                let mut order: Vec<usize> = (0..count).collect();
                (1..count).rev().for_each(|i| order.swap(i, (normal(&mut random).abs() * 1e6) as usize % (i + 1)));
                order
            };
            let (made, read) = (halves(makes), halves(reads));
            *matrix = matrix.map_with_location(|row, column, value| {
                let is_apart = made[row / rows] * 2 / makes != read[column / columns] * 2 / reads;
                if is_apart { 0.0 } else { value }
            });
        }
        assert!(known.error(&fit(&known).whole) < 1e-9, "{shape:?}");
    }
}

/// Convolutions with strides, pads of all kinds, dilations and groups.
const LAYERS: &[(&str, &str, &str)] = &[
    ("float[N,8,9,8]", "float[12,8,3,3]", "Conv <strides = [2, 1], pads = [1, 2, 0, 2], dilations = [1, 2]>"),
    ("float[N,8,7,9]", "float[12,8,3,3]", "Conv <strides = [2, 2], auto_pad = \"SAME_UPPER\">"),
    ("float[N,8,8,8]", "float[12,8,2,3]", "Conv <strides = [3, 2], auto_pad = \"SAME_LOWER\">"),
    ("float[N,8,7,7]", "float[12,8,3,3]", "Conv <auto_pad = \"VALID\">"),
    ("float[N,12,7,7]", "float[8,6,3,3]", "Conv <group = 2, pads = [1, 1, 1, 1]>"),
    ("float[N,12,9]", "float[6,12,4]", "Conv <strides = [2], pads = [2, 1]>"),
    ("float[N,4,4,5,4]", "float[6,4,3,3,2]", "Conv <pads = [1, 1, 0, 1, 1, 0]>"),
    (
        "float[N,8,4,5]",
        "float[8,6,3,3]",
        "ConvTranspose <strides = [2, 2], pads = [1, 0, 1, 1], output_padding = [1, 0]>",
    ),
    ("float[N,8,4,5]", "float[8,3,2,3]", "ConvTranspose <group = 2, dilations = [1, 2]>"),
];

/// A model of one layer, and what a pass makes of it; `None` where that is nothing.
fn rewritten((input, weight, layer): (&str, &str, &str), pass: &str) -> Option<(Model, Model)> {
    let rank = input.matches(',').count() + 1;
    let open = ["N", "A", "B", "C", "D"][..rank].join(",");
    let text = format!(
        "<ir_version: 8, opset_import: [\"\": 17]>\ng ({input} x) => (float[{open}] y)\n<{weight} w = normal(1)>\n{{\n y = {layer} (x, w)\n}}\n"
    );
    let whole = text::parse(&text).unwrap();
    let mut chain = whole.clone();
    let mut cx = Context::at(Samples::likely_shapes(&whole, &Request::default()));
    let passes: Vec<_> = pipeline::parse(pass).unwrap().into_iter().skip(1).take(1).collect();
    pipeline::run(&passes, &mut chain, &mut cx, Price::default()).unwrap();
    (chain.graph.edits() != whole.graph.edits()).then_some((whole, chain))
}

/// Fails where `chain` does not compute what the only layer of `whole` does with these elements of its weight.
fn assert_computes(mut whole: Model, chain: &Model, values: &[f64], what: &str) {
    let weight = Linear::all(&whole.graph).remove(0).weight;
    let stored = whole.graph.constant(weight).unwrap();
    let tensor = Tensor::floats(stored.dtype(), stored.dims(), values).unwrap();
    whole.graph.set_weight(weight, Weight::dense(tensor));
    let samples = Samples::gather(&whole, &Request::default()).unwrap().part(Split::Last);
    let difference = Reference::new(&Engine::default(), &whole, samples).unwrap().compare(chain).unwrap();
    assert!(difference.rounding < 1e-5, "{what}: {difference:?}\n{}", text::print(chain));
}

/// The only layer of a model, and the axes of its weight.
fn only_layer(model: &Model) -> (Linear, Shape) {
    let layer = Linear::all(&model.graph).remove(0);
    let dims = model.graph.constant(layer.weight).unwrap().dims();
    let spreads = model.graph.op_of(layer.node, "ConvTranspose").is_some();
    let (makes, reads) = match (spreads, dims.len()) {
        (true, _) => (dims[1], dims[0] / layer.groups),
        (false, 2) => (layer.rows, layer.columns),
        (false, _) => (dims[0] / layer.groups, dims[1]),
    };
    let shape = Shape { groups: layer.groups, makes, reads, kernel: dims[2..].to_vec(), spreads };
    (layer, shape)
}

#[test]
fn a_chain_computes_what_the_layer_does_with_the_kernel_that_it_makes() {
    let passes = ["svd:rank=2", "spatial:rank=3", "tucker:energy=0.6", "separate:multiplier=2"];
    let mut replaced = 0;
    for (&layer, pass) in LAYERS.iter().flat_map(|layer| passes.iter().map(move |pass| (layer, pass))) {
        let Some((whole, chain)) = rewritten(layer, pass) else { continue };
        // The kernel that the chain makes is what it answers to one pixel at a time: read it off in the layer's own form.
        let composed = composed(&whole, &chain);
        assert_computes(whole, &chain, &composed, &format!("{layer:?} {pass}"));
        replaced += 1;
    }
    assert!(replaced > 20, "{replaced}");
}

/// Products of rows.
const PRODUCTS: &[(&str, &str, &str)] = &[
    ("float[N,12]", "float[8,12]", "Gemm <transB = 1>"),
    ("float[N,8]", "float[8,12]", "Gemm"),
    ("float[N,12]", "float[12,8]", "MatMul"),
    ("float[N,5,12]", "float[12,8]", "MatMul"),
    ("float[N,3,5,12]", "float[12,8]", "MatMul"),
];

#[test]
fn layers_in_groups_and_sums_of_products_compute_what_they_were_fitted_to() {
    let passes = [
        ("group:groups=2", Family::Grouped { bypass: 0 }),
        ("group:groups=2:bypass=2", Family::Grouped { bypass: 2 }),
        ("kron:terms=2", Family::Kronecker),
    ];
    let mut replaced = 0;
    let layers = LAYERS.iter().chain(PRODUCTS).flat_map(|layer| passes.iter().map(move |pass| (layer, pass)));
    for (&layer, &(pass, family)) in layers {
        let Some((whole, chain)) = rewritten(layer, pass) else { continue };
        let (linear, shape) = only_layer(&whole);
        let matrices = linear.matrices(&whole.graph.constant(linear.weight).unwrap().f64s().unwrap());
        let form = family.member(&shape, 2);
        let target = Target { metrics: vec![Metric::Identity; matrices.len()], matrices, shape };
        let fitted = family.prepare(&target, Some(2)).unwrap().fit(&target, form).unwrap();
        assert_computes(whole, &chain, &linear.elements(&fitted.whole), &format!("{layer:?} {pass}"));
        replaced += 1;
    }
    assert_eq!(replaced, 27);
}

/// The elements of the weight of the only layer of `whole` with which it computes what `chain` does.
fn composed(whole: &Model, chain: &Model) -> Vec<f64> {
    let (layer, shape) = only_layer(whole);
    let parts = Linear::all(&chain.graph);
    let stages: Vec<Vec<f64>> =
        parts.iter().map(|part| chain.graph.constant(part.weight).unwrap().f64s().unwrap()).collect();
    // The form is told by the extents of its weights.
    let extents: Vec<Vec<usize>> =
        parts.iter().map(|part| chain.graph.constant(part.weight).unwrap().dims().to_vec()).collect();
    let ranks = || (1..=64).flat_map(|before| (1..=64).map(move |after| (before, after)));
    let pairs = ranks().map(|(before, after)| Form::Ranks { before: Some(before), after: Some(after) });
    let singles = FAMILIES.into_iter().filter(|&family| family != Family::Both && family.fits(&shape));
    let shape = &shape;
    let singles = singles.flat_map(|family| (1..=64).map(move |rank| family.member(shape, rank)));
    let is_it = |form: &Form| form.layouts(shape).iter().map(|layout| layout.dims.clone()).eq(extents.iter().cloned());
    let form = singles.chain(pairs).find(is_it).unwrap();
    layer.elements(&form.compose(shape, &stages))
}
