//! What is learned from samples, and what is made of it.

use globset::GlobSet;
use nalgebra::DMatrix;
use onnx_shrink::{
    analysis::{linear::Linear, moments},
    codec::Model,
    ir::{DType, Graph, Tensor, Weight},
    pass::{Context, Minimize, Price, Yardstick},
    pipeline,
    refit::{Fit, Kept, Originals, refit},
    shrink::{Job, shrink},
    text,
    verify::{Engine, Reference, Request, Samples, Split, Value, takes_batches},
};
use rand_xoshiro::{
    Xoshiro256PlusPlus,
    rand_core::{Rng, SeedableRng},
};

use crate::fixture;

/// Numbers between -1 and 1.
fn values(random: &mut Xoshiro256PlusPlus, dims: &[usize]) -> Value {
    let draw = |_| f64::from((random.next_u64() >> 40) as f32 / (1 << 23) as f32 - 1.0);
    Value { dims: dims.to_vec(), values: (0..dims.iter().product()).map(draw).collect(), dtype: DType::Float }
}

fn samples(count: usize, dims: &[usize]) -> Vec<Vec<Value>> {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(5);
    (0..count).map(|_| vec![values(&mut random, dims)]).collect()
}

fn model(interface: &str, weights: &str, nodes: &str) -> Model {
    let text = format!("<ir_version: 8, opset_import: [\"\": 17]>\ng {interface}\n<{weights}>\n{{\n{nodes}\n}}\n");
    text::parse(&text).unwrap()
}

/// Layers of every form, with strides, dilations, padding of all kinds and groups, each on an input of its own shape.
const FORMS: &[(&str, &str, &str)] = &[
    (
        "(float[N,6] x) => (float[N,4] y)",
        "float[4,6] w = normal(1), float[4] b = normal(2)",
        "y = Gemm <transB = 1> (x, w, b)",
    ),
    ("(float[N,3,6] x) => (float[N,3,4] y)", "float[6,4] w = normal(1)", "y = MatMul (x, w)"),
    (
        "(float[N,3,7,6] x) => (float[N,4,3,3] y)",
        "float[4,3,3,2] w = normal(1), float[4] b = normal(2)",
        "y = Conv <strides = [2, 2], pads = [0, 1, 1, 0], dilations = [1, 2]> (x, w, b)",
    ),
    (
        "(float[N,4,5,5] x) => (float[N,6,3,3] y)",
        "float[6,2,3,3] w = normal(1)",
        "y = Conv <group = 2, strides = [2, 2], auto_pad = \"SAME_UPPER\"> (x, w)",
    ),
    (
        "(float[N,4,6] x) => (float[N,4,3] y)",
        "float[4,1,2] w = normal(1)",
        "y = Conv <group = 4, strides = [2], auto_pad = \"SAME_LOWER\"> (x, w)",
    ),
];

#[test]
fn vectors_times_matrices_are_what_the_engine_computes() {
    for (interface, weights, nodes) in FORMS {
        let model = model(interface, weights, nodes);
        let graph = &model.graph;
        let linear = Linear::all(graph).remove(0);
        let shape = onnx_shrink::analysis::shapes::Fact::declared(&graph.inputs()[0].info).extents().unwrap();
        let dims: Vec<_> = shape.iter().map(|d| d.unwrap_or(2)).collect();
        let sample = samples(1, &dims).remove(0);
        let wanted = Engine::default().prepare(&model, &sample).unwrap().run(&sample).unwrap().remove(0);
        let all: Vec<_> = (0..linear.positions(&sample[0])).collect();
        let results = linear.results(&wanted, &all);
        let constant = graph.constant(linear.weight).unwrap().f64s().unwrap();
        let matrices = linear.matrices(&constant);
        assert_eq!(linear.elements(&matrices), constant, "{nodes}");
        if let Some(coarse) = linear.by_pixels() {
            assert_eq!(coarse.elements(&coarse.matrices(&constant)), constant, "{nodes}");
        }
        let bias = graph.operand(linear.node, 2).map(|bias| graph.constant(bias).unwrap().f64s().unwrap());
        for (group, (matrix, x)) in matrices.iter().zip(linear.vectors(&sample[0], &all)).enumerate() {
            let made = matrix * x;
            for ((i, j), value) in (0..made.nrows())
                .flat_map(|i| (0..made.ncols()).map(move |j| (i, j)))
                .zip((0..made.nrows()).flat_map(|i| (0..made.ncols()).map(move |j| (i, j))).map(|place| made[place]))
            {
                let row = group * linear.rows + i;
                let value = value + bias.as_ref().map_or(0.0, |bias| bias[row]);
                assert!((value - results[(row, j)]).abs() < 1e-5, "{nodes}: {value} {}", results[(row, j)]);
            }
        }
    }
}

#[test]
fn merged_moments_of_two_halves_are_those_of_the_whole_and_agree_with_sums_in_any_order() {
    let model = Model::open(&fixture("models/fmnist_resnet14.onnx")).unwrap();
    let samples = samples(12, &[1, 1, 28, 28]);
    let collect = |part: &[Vec<Value>]| moments::collect(&Engine::default(), &model, part, 600, &mut |_| {}).unwrap();
    let (whole, mut merged) = (collect(&samples), collect(&samples[..5]));
    for (source, moments) in collect(&samples[5..]) {
        merged.get_mut(&source).unwrap().iter_mut().zip(&moments).for_each(|(a, b)| a.merge(b));
    }
    assert!(whole.len() > 10);
    for (source, moments) in &whole {
        for (a, b) in moments.iter().zip(&merged[source]) {
            assert_eq!(a.count, b.count);
            let close = |a: &DMatrix<f64>, b: &DMatrix<f64>| (a - b).norm() <= 1e-12 * a.norm();
            assert!(close(&a.products, &b.products) && (&a.sum - &b.sum).norm() <= 1e-12 * a.sum.norm(), "{source}");
        }
    }
    // A covariance, against its definition on the vectors themselves.
    let linear = Linear::all(&model.graph).remove(0);
    let source = linear.source(&model.graph);
    let mut columns = Vec::new();
    for sample in &samples {
        let at = moments::positions(linear.positions(&sample[0]), &source, moments::hash(sample));
        columns.extend(linear.vectors(&sample[0], &at)[0].column_iter().map(nalgebra::Matrix::into_owned));
    }
    let all = DMatrix::from_columns(&columns);
    let mean = all.column_mean();
    let centered = DMatrix::from_fn(all.nrows(), all.ncols(), |i, j| all[(i, j)] - mean[i]);
    let wanted = &centered * centered.transpose() / all.ncols() as f64;
    assert!((whole[&source][0].covariance() - &wanted).norm() <= 1e-9 * wanted.norm());
}

#[test]
fn one_thread_and_two_give_the_same_bytes() {
    let model = Model::open(&fixture("models/mnist_lenet300.onnx")).unwrap();
    let job = Job {
        items: pipeline::parse("prune").unwrap(),
        request: Request { data: Some(fixture("data/mnist.npz")), ..Request::default() },
        target: Some(0.5),
        ..Job::default()
    };
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| shrink(&model, &job, &mut |_| {}).unwrap().0.encode())
    };
    let one = run(1);
    assert!(one == run(2));
    let share = one.len() as f64 / model.encode().len() as f64;
    assert!(share <= 0.5 && share > 0.49, "{share}");
}

/// The model of a hidden layer whose units 4 to 7 are sums of units 0 to 3, which a linear map can make up for.
fn redundant() -> Model {
    let mut model = model(
        "(float[N,6] x) => (float[N,3] y)",
        "float[8,6] w = normal(1), float[8] b = normal(2), float[3,8] v = normal(3), float[3] c = normal(4)",
        "h = Gemm <transB = 1> (x, w, b)\n y = Gemm <transB = 1> (h, v, c)",
    );
    let names = ["w", "b"].map(|name| model.graph.values()[name]);
    for (value, width) in names.into_iter().zip([6, 1]) {
        let tensor = model.graph.constant(value).unwrap();
        let (dims, mut values) = (tensor.dims().to_vec(), tensor.f32s().unwrap());
        for i in 0..4 * width {
            values[4 * width + i] = values[i] + values[(i + width) % (4 * width)];
        }
        model.graph.set_weight(value, Weight::dense(Tensor::f32(&dims, &values)));
    }
    model
}

fn prune(model: &Model, options: &str, samples: &[Vec<Value>]) -> (Model, Context) {
    let mut cx = Context::at(Samples::likely_shapes(model, &Request::default()));
    cx.moments = moments::collect(&Engine::default(), model, samples, 600, &mut |_| {}).unwrap().into();
    let mut after = model.clone();
    let items = pipeline::parse(&format!("dead-nodes,prune{options}")).unwrap();
    pipeline::run(&items, &mut after, &mut cx, Price::default()).unwrap();
    (after, cx)
}

fn error(a: &Model, b: &Model, samples: &[Vec<Value>]) -> f64 {
    Reference::new(&Engine::default(), a, samples.to_vec()).unwrap().compare(b).unwrap().error
}

#[test]
fn what_the_kept_units_tell_is_made_up_for() {
    let (model, samples) = (redundant(), samples(64, &[1, 6]));
    let (fitted, _) = prune(&model, ":ratio=0.5", &samples);
    let (bare, _) = prune(&model, ":ratio=0.5:compensate=none", &samples);
    assert!(fitted.encode().len() < model.encode().len());
    // The ridge alone is left.
    assert!(error(&model, &fitted, &samples) < 0.05, "{}", error(&model, &fitted, &samples));
    assert!(error(&model, &bare, &samples) > 0.3);
}

/// The parameters of a graph.
fn parameters(graph: &Graph) -> usize {
    graph.node_ids().filter_map(|id| graph.constant(id.out())).map(Tensor::len).sum()
}

#[test]
fn every_score_prunes_as_much_and_obs_is_the_best_of_them() {
    let model = Model::open(&fixture("models/mnist_lenet300.onnx")).unwrap();
    let request = Request { data: Some(fixture("data/mnist.npz")), ..Request::default() };
    let samples = Samples::gather(&model, &request).unwrap();
    let (fit, last) = (samples.part(Split::Fit), samples.part(Split::Last));
    let result = |score: &str| {
        let (after, _) = prune(&model, &format!(":ratio=0.6:compensate=fit:score={score}"), &fit);
        (parameters(&after.graph), error(&model, &after, &last))
    };
    let (size, best) = result("obs");
    for score in ["l1", "l2", "onorm", "apoz", "variance", "corr", "fpgm", "lasso", "random"] {
        let (other, error) = result(score);
        assert_eq!(other, size, "{score}");
        assert!(error >= best * 0.98, "{score}: {error} {best}");
        assert!(error < 1.0, "{score}: {error}");
    }
}

#[test]
fn a_refit_brings_a_net_closer_to_the_original() {
    for (name, data, ratio) in [("fmnist_vgg", "fashion", 0.4), ("fmnist_resnet14", "fashion", 0.3)] {
        let mut model = Model::open(&fixture(&format!("models/{name}.onnx"))).unwrap();
        pipeline::run(&pipeline::parse("simplify").unwrap(), &mut model, &mut Context::default(), Price::default())
            .unwrap();
        let request = Request { data: Some(fixture(&format!("data/{data}.npz"))), ..Request::default() };
        let samples = Samples::gather(&model, &request).unwrap();
        let (fit, last) = (samples.part(Split::Fit), samples.part(Split::Last));
        let (mut after, cx) = prune(&model, &format!(":ratio={ratio}"), &fit);
        let before = error(&model, &after, &last);
        let fitted = refit(
            (&Engine::default(), &Originals::default()),
            &model,
            &mut after,
            &cx.kept,
            (Fit::Weights, &fit, 600, &GlobSet::empty()),
            &mut |_| {},
        )
        .unwrap();
        assert!(fitted > 0);
        let refitted = error(&model, &after, &last);
        assert!(refitted < before, "{name}: {before} {refitted}");
    }
}

#[test]
fn keys_make_up_for_the_channels_that_queries_and_keys_lose() {
    let plain = model(
        "(float[N,7,6] x) => (float[N,7,6] y)",
        "float[6,8] w = lowrank(4, 5), float[8,4] q = normal(1), float[4] b = normal(2), float[8,4] k = normal(3),\n\
         float[4] c = normal(4)",
        "h = MatMul (x, w)\n q0 = MatMul (h, q)\n q1 = Add (q0, b)\n k0 = MatMul (h, k)\n k1 = Add (k0, c)\n\
         k2 = Transpose <perm = [0, 2, 1]> (k1)\n s = MatMul (q1, k2)\n t = Softmax <axis = -1> (s)\n y = MatMul (t, x)",
    );
    // Two channels of each are mixtures of the other two.
    let mut model = plain;
    for (name, weights) in [("q", [0.7, -0.4]), ("b", [0.7, -0.4]), ("k", [0.2, 1.1]), ("c", [0.2, 1.1])] {
        let value = model.graph.values()[name];
        let tensor = model.graph.constant(value).unwrap();
        let (dims, mut values) = (tensor.dims().to_vec(), tensor.f32s().unwrap());
        for row in values.chunks_mut(4) {
            let [a, b] = [row[0], row[1]];
            (row[2], row[3]) = (weights[0] * a + weights[1] * b, weights[1] * a - weights[0] * b);
        }
        model.graph.set_weight(value, Weight::dense(Tensor::f32(&dims, &values)));
    }
    let samples = samples(64, &[1, 7, 6]);
    let (mut fitted, cx) = prune(&model, ":ratio=0.5", &samples);
    let (bare, _) = prune(&model, ":ratio=0.5:compensate=none", &samples);
    assert_eq!(parameters(&fitted.graph), 6 * 4 + 2 * (4 * 2 + 2));
    let made_up = error(&model, &fitted, &samples);
    assert!(made_up < 0.01 && error(&model, &bare, &samples) > 0.1, "{made_up}");
    // What the keys are fitted to is the mixture, too.
    let way = (Fit::Weights, &samples[..], 600, &GlobSet::empty());
    let count = refit((&Engine::default(), &Originals::default()), &model, &mut fitted, &cx.kept, way, &mut |_| {});
    assert_eq!(count.unwrap(), 2);
    assert!(error(&model, &fitted, &samples) < 0.01, "{}", error(&model, &fitted, &samples));
}

#[test]
fn channels_get_the_mean_and_deviation_that_they_have_in_the_original() {
    let model = model(
        "(float[N,4,6,6] x) => (float[N,3,11,11] y)",
        "float[8,4,3,3] w = normal(1), float[8,6,3,3] v = normal(2), float[3,6,1,1] u = normal(3)",
        "a = Conv (x, w)\n b = Relu (a)\n c = ConvTranspose <strides = [2, 2], pads = [0, 0, 1, 1], output_padding = [1, 1]> (b, v)\n\
         d = Relu (c)\n y = Conv <kernel_shape = [1, 1], pads = [1, 1, 1, 1]> (d, u)",
    );
    let samples = samples(48, &[1, 4, 6, 6]);
    let (mut after, cx) = prune(&model, ":ratio=0.5:compensate=none", &samples);
    let values = |model: &Model, wanted: &[usize]| {
        let made = model.graph.values()["c"];
        let probe = Engine::default().probe(model, &[made], &samples[0]).unwrap();
        let mut sums = vec![(0.0, 0.0, 0.0); wanted.len()];
        for sample in &samples {
            let value = probe.run(sample).unwrap().remove(0);
            let area: usize = value.dims[2..].iter().product();
            for (sum, &channel) in sums.iter_mut().zip(wanted) {
                for v in &value.values[channel * area..(channel + 1) * area] {
                    *sum = (sum.0 + 1.0, sum.1 + v, sum.2 + v * v);
                }
            }
        }
        let mean_and_deviation =
            |(n, sum, squares): (f64, f64, f64)| (sum / n, (squares / n - (sum / n).powi(2)).sqrt());
        sums.into_iter().map(mean_and_deviation).collect::<Vec<_>>()
    };
    let left = cx.kept.left("c", 1).unwrap();
    let all: Vec<_> = (0..left.len()).collect();
    let far = |after: &Model| {
        let pairs = values(&model, left).into_iter().zip(values(after, &all));
        pairs
            .map(|((m, d), (mean, deviation))| ((m - mean) / d).abs() + (deviation / d - 1.0).abs())
            .fold(0.0, f64::max)
    };
    let before = far(&after);
    let way = (Fit::Statistics, &samples[..], 600, &GlobSet::empty());
    assert!(
        refit((&Engine::default(), &Originals::default()), &model, &mut after, &cx.kept, way, &mut |_| {}).unwrap() > 0
    );
    // Few samples are not trusted wholly, and only some places are looked at.
    assert!(before > 0.5 && far(&after) < 0.35, "{before} {}", far(&after));
}

#[test]
fn a_refit_of_what_did_not_change_does_nothing() {
    let model = redundant();
    let mut same = model.clone();
    assert_eq!(
        refit(
            (&Engine::default(), &Originals::default()),
            &model,
            &mut same,
            &Kept::default(),
            (Fit::Weights, &samples(8, &[1, 6]), 600, &GlobSet::empty()),
            &mut |_| {}
        )
        .unwrap(),
        0
    );
    assert_eq!(same.graph.edits(), model.graph.edits());
}

#[test]
fn a_shape_that_is_read_across_a_cut_is_a_constant_there() {
    let model = model(
        "(float[N,3,6,6] x) => (float[N,M] y)",
        "float[8,3,1,1] w = normal(1), float[6,8,1,1] v = normal(2), float[4,6,1,1] u = normal(3),\n\
         int64 zero = {0}, int64[1] first = {0}, int64[1] rest = {-1}",
        "a = Conv (x, w)\n b = Relu (a)\n s = Shape (b)\n n = Gather (s, zero)\n m = Unsqueeze (n, first)\n\
         c = Conv (b, v)\n d = Relu (c)\n e = Conv (d, u)\n t = Concat <axis = 0> (m, rest)\n y = Reshape (e, t)",
    );
    let samples = samples(48, &[1, 3, 6, 6]);
    let (mut after, cx) = prune(&model, ":ratio=0.5", &samples);
    let before = error(&model, &after, &samples);
    assert!(
        refit(
            (&Engine::default(), &Originals::default()),
            &model,
            &mut after,
            &cx.kept,
            (Fit::Weights, &samples, 600, &GlobSet::empty()),
            &mut |_| {}
        )
        .unwrap()
            > 0
    );
    assert!(error(&model, &after, &samples) <= before * 1.01);
}

#[test]
fn a_model_that_is_bound_to_one_size_of_batch_is_told_from_others() {
    let model = |body: &str| {
        let text = format!(
            "<ir_version: 8, opset_import: [\"\": 17]>\ng (float[N,4] x) => (float[M,4] y)\n\
             <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[2] row = {{1, 4}}>\n{{\n{body}\n}}\n"
        );
        text::parse(&text).unwrap()
    };
    let samples: Vec<_> = [1.0, 2.0]
        .map(|first| vec![Value { dims: vec![1, 4], values: vec![first, 2.0, 3.0, 4.0], dtype: DType::Float }])
        .to_vec();
    let takes = |body: &str| takes_batches(&Engine::default(), &model(body), &samples);
    assert_eq!(takes(" y = Relu (x)").unwrap(), Some(true));
    assert_eq!(takes(" y = Slice (x, zero, one, zero)").unwrap(), Some(false));
    assert_eq!(takes(" s = ReduceMean <axes = [0]> (x)\n y = Add (x, s)").unwrap(), Some(false));
    assert!(takes(" y = Reshape (x, row)").is_err());
}

#[test]
fn convolutions_beyond_the_largest_statistic_make_up_by_their_channels() {
    let model = Model::open(&fixture("models/fmnist_resnet14.onnx")).unwrap();
    let error = |passes: &str, max_gram_dim: usize| {
        let job = Job {
            items: pipeline::parse(passes).unwrap(),
            request: Request { data: Some(fixture("data/fashion.npz")), ..Request::default() },
            max_error: Some(f64::INFINITY),
            max_gram_dim,
            ..Job::default()
        };
        let (small, report) = shrink(&model, &job, &mut |_| {}).unwrap();
        assert!(small.encode().len() < model.encode().len() * 9 / 10);
        report.difference.unwrap().error
    };
    // Patches of 3x3 from 16 channels and more are longer than 128, but nothing has more channels than that.
    let (blind, coarse, fine) = (
        error("prune:ratio=0.2:score=l2:compensate=none", 128),
        error("prune:ratio=0.2:score=l2:compensate=fit", 128),
        error("prune:ratio=0.2:score=l2:compensate=fit", 4608),
    );
    assert!(fine < coarse && coarse < blind, "{fine} {coarse} {blind}");
}

#[test]
fn a_residual_block_goes_whole_and_what_follows_is_fitted_again() {
    let model = Model::open(&fixture("models/fmnist_resnet14.onnx")).unwrap();
    let run = |passes: &str| {
        let job = Job {
            items: pipeline::parse(passes).unwrap(),
            request: Request { data: Some(fixture("data/fashion.npz")), ..Request::default() },
            minimize: Minimize::Macs,
            target: Some(0.9),
            ..Job::default()
        };
        shrink(&model, &job, &mut |_| {}).unwrap()
    };
    let (small, report) = run("depth");
    let adds =
        |model: &Model| model.graph.ops().into_iter().filter(|&id| model.graph.op_of(id, "Add").is_some()).count();
    assert!(adds(&small) < adds(&model), "{report:?}");
    assert!(report.after.macs * 10 <= report.before.macs * 9, "{report:?}");
    assert!(report.difference.as_ref().unwrap().error < 0.2, "{report:?}");
    // No block is asked for a small share where pruning saves it at less.
    let (pruned, report) = run("depth,prune");
    assert_eq!(adds(&pruned), adds(&model), "{report:?}");
}

#[test]
fn blocks_in_a_row_go_together_but_not_what_widens_a_shortcut() {
    let run = |model: &Model| {
        let samples = Samples::gather(model, &Request::default()).unwrap();
        let mut cx = Context::at(samples.bound.clone());
        let inputs = samples.part(Split::Last);
        cx.yardstick = Some(std::sync::Arc::new(Yardstick::new(&Engine::default(), model, inputs).unwrap()));
        let mut left = model.clone();
        let items = vec![pipeline::parse("identity,depth").unwrap().remove(1)];
        pipeline::run(&items, &mut left, &mut cx, Price::per_byte(f64::INFINITY)).unwrap();
        left
    };
    let row = model(
        "(float[N,6] x) => (float[N,5] y)",
        "float[6,6] w1 = normal(1), float[6,6] w2 = normal(2), float[6,6] w3 = normal(3), float[6,5] w4 = normal(4)",
        "a = MatMul (x, w1)\n f = MatMul (a, w2)\n r = Relu (f)\n s = Add (a, r)\n \
         g = MatMul (s, w3)\n t = Relu (g)\n u = Add (s, t)\n y = MatMul (u, w4)",
    );
    assert_eq!(run(&row).graph.ops().len(), 2);
    // Of one row alone, the sum has the shape of what is broadcast.
    let wide = model(
        "(float[N,T,6] x) => (float[N,T,5] y)",
        "float[6,6] w1 = normal(1), int64[1] axes = {1}, float[6,5] w4 = normal(4)",
        "m = ReduceSum <keepdims = 1> (x, axes)\n e = Mul (x, m)\n f = MatMul (e, w1)\n u = Add (m, f)\n y = MatMul (u, w4)",
    );
    assert_eq!(run(&wide).graph.ops().len(), wide.graph.ops().len());
}
