//! What is proven of a clean-up, how, and what is taken back where nothing can be proven.

use std::collections::BTreeMap;

use onnx_shrink::{
    codec::Model,
    pipeline,
    shrink::{Job, Report, ShrinkError, shrink},
    text,
    verify::{Engine, ROUNDING_BUDGET, Reference, Request, Samples, Split, compare_regions},
};

fn model(opsets: &str, body: &str) -> Model {
    text::parse(&format!("<ir_version: 9, opset_import: [{opsets}]>\n{body}\n")).unwrap()
}

fn job(passes: &str) -> Job {
    Job { items: pipeline::parse(passes).unwrap(), ..Job::default() }
}

fn simplified(model: &Model) -> (Vec<String>, Report) {
    let (small, report) = shrink(model, &job("simplify"), &mut |_| {}).unwrap();
    (kinds(&small), report)
}

fn kinds(model: &Model) -> Vec<String> {
    model.graph.ops().into_iter().map(|id| model.graph.op(id).unwrap().op_type().to_owned()).collect()
}

/// Whether the engine runs the model and computes the same twice.
fn runs(model: &Model) -> bool {
    let samples = Samples::gather(model, &Request::default()).unwrap();
    let reference = Reference::new(&Engine::default(), model, samples.part(Split::Last));
    samples.unrunnable.is_none() && reference.unwrap().compare(model).unwrap().rounding <= ROUNDING_BUDGET
}

#[test]
fn products_in_half_and_double_precision_become_gemms_that_are_verified() {
    for dtype in ["float16", "double"] {
        let model = model(
            "\"\": 17",
            &format!(
                "g ({dtype}[N,8] x) => ({dtype}[N,4] y, {dtype}[8,4] z)\n\
                 <{dtype}[8,4] w = normal(1), {dtype}[4] b = normal(2), {dtype}[8,3] v = normal(3), {dtype}[4,3] u = normal(4)>\n\
                 {{\n p = MatMul (x, w)\n y = Add (p, b)\n z = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (v, u, b)\n}}"
            ),
        );
        let (kinds, report) = simplified(&model);
        assert!(kinds.iter().all(|kind| kind == "Gemm"), "{dtype}: {kinds:?}");
        assert!(report.difference.unwrap().rounding <= ROUNDING_BUDGET);
    }
}

#[test]
fn bfloat16_is_run_in_single_precision_with_rounding() {
    let sum = model(
        "\"\": 17",
        "g (bfloat16[N,8] x) => (bfloat16[N,8] y)\n{\n a = Neg (x)\n b = Neg (a)\n c = Mul (b, x)\n y = Relu (c)\n}",
    );
    assert!(runs(&sum));
    let (kinds, _) = simplified(&sum);
    assert_eq!(kinds, ["Mul", "Relu"]);
}

#[test]
fn what_has_no_value_is_of_zeros_in_single_precision() {
    let filled = model(
        "\"\": 17",
        "g (float[2,4,6] x, float[2,6,8] v, int64[2] shape) => (float[2,4,8] y)\n\
         {\n k = ConstantOfShape (shape)\n a = Cast <to = 1> (k)\n r = Add (x, a)\n s = Softmax (r)\n y = MatMul (s, v)\n}",
    );
    let (small, _) = shrink(&filled, &job("simplify"), &mut |_| {}).unwrap();
    assert!(!kinds(&small).contains(&"Cast".to_owned()));
}

#[test]
fn where_nothing_changed_nothing_is_run() {
    // The engine would compute an operator of another domain wrongly, and fail on an axis that is this long.
    let lone = model(
        "\"\": 17, \"com.microsoft\": 1",
        "g (float[N,C,H,W] x) => (float[N,M] y, float[N,C,H,W] z)\n{\n y = Flatten (x)\n z = com.microsoft.FastGelu (x)\n}",
    );
    let (kinds, report) = simplified(&lone);
    assert_eq!(kinds.len(), 2);
    assert!(report.difference.is_none() && report.passes.iter().all(|pass| !pass.did_something()), "{report:?}");
}

#[test]
fn what_is_merged_or_left_out_needs_no_run() {
    let copied = model(
        "\"\": 17, \"com.microsoft\": 1",
        "g (float[N,8] x) => (float[N,8] y)\n{\n a = Identity (x)\n b = com.microsoft.FastGelu (a)\n c = Exp (b)\n d = Exp (b)\n \
         dead = Neg (d)\n y = Add (c, d)\n}",
    );
    let (kinds, report) = simplified(&copied);
    assert_eq!(kinds, ["FastGelu", "Exp", "Add"]);
    assert!(report.difference.is_none(), "{report:?}");
    assert!(report.notes.iter().any(|note| note.contains("without running")), "{:?}", report.notes);
}

#[test]
fn a_rewrite_may_read_further_back_than_what_it_stands_for() {
    let lengths = model(
        "\"\": 18, \"com.microsoft\": 1",
        "g (float[B,S,8] x, float[B,2,P,4] p, float[1,1,64] mask) => (float[1,1,T] y, float[T,8] z, float[B,S,8] w)\n\
         <int64[1] m1 = {-1}, int64[1] zero = {0}, int64[1] two = {2}, int64[1] one = {1}, int64[1] eight = {8}, float f = {1}>\n\
         {\n s = Shape <start = 1, end = 2> (x)\n q = Shape <start = 2, end = 3> (p)\n t1 = Add (q, s)\n s0 = Squeeze (s)\n \
         q0 = Squeeze (q)\n t0 = Add (q0, s0)\n t2 = Reshape (t0, m1)\n r = Relu (mask)\n y = Slice (r, zero, t2, two, one)\n \
         sh = Concat <axis = 0> (t1, eight)\n z = Expand (f, sh)\n w = com.microsoft.FastGelu (x)\n}",
    );
    let (kinds, report) = simplified(&lengths);
    assert!(kinds.len() <= 9, "{kinds:?}");
    assert!(report.causes.is_empty(), "{:?}", report.causes);
}

#[test]
fn what_cannot_be_proven_is_taken_back() {
    // Nothing is known of the type of what comes between the two operators of another domain.
    let unknown = model(
        "\"\": 17, \"com.microsoft\": 1",
        "g (float[N,8] x) => (float[N,8] y, float[N,8] z)\n{\n a = com.microsoft.FastGelu (x)\n b = Neg (a)\n c = Neg (b)\n \
         y = com.microsoft.FastGelu (c)\n d = Relu (x)\n z = Relu (d)\n}",
    );
    let (kinds, report) = simplified(&unknown);
    assert_eq!(kinds.iter().filter(|kind| *kind == "Neg").count(), 2, "{kinds:?}");
    assert_eq!(kinds.iter().filter(|kind| *kind == "Relu").count(), 1, "{kinds:?}");
    assert!(report.notes.iter().any(|note| note.contains("stay as they were")), "{:?}", report.notes);
    let strict = Job { strict: true, ..job("simplify") };
    let error = shrink(&unknown, &strict, &mut |_| {}).unwrap_err();
    assert!(matches!(error, ShrinkError::Unproven(_)) && error.is_verification(), "{error}");
}

#[test]
fn open_axes_are_tried_at_lengths_of_their_own_and_as_sums() {
    let cache = model(
        "\"\": 17",
        "g (float[b,past,4] p, float[b,s,4] x, float[b,total,4] mask) => (float[b,total,4] y)\n\
         {\n all = Concat <axis = 1> (p, x)\n y = Add (all, mask)\n}",
    );
    let samples = Samples::gather(&cache, &Request::default()).unwrap();
    assert_eq!(samples.unrunnable, None);
    let [past, own, total] = ["p", "x", "mask"].map(|name| samples.bound[name][1]);
    assert_eq!(past + own, total);
    let apart = model("\"\": 17", "g (float[b,c,h,w] x) => (float[b,c,h,w] y)\n{\n y = Relu (x)\n}");
    let dims = &Samples::gather(&apart, &Request::default()).unwrap().bound["x"];
    assert!(dims[2] != dims[3] && dims.iter().product::<usize>() <= 1 << 20, "{dims:?}");
}

#[test]
fn what_a_loop_reads_and_holds_is_cleaned_though_it_cannot_be_run() {
    let looping = model(
        "\"\": 17",
        "g (float[n,8] x, int64 trips) => (float[n,8] y)\n<bool t = {1}>\n{\n b = Neg (x)\n c = Neg (b)\n y = Loop (trips, t, c) <body = bd \
         (int64 i, bool go, float[n,8] s) => (bool on, float[n,8] so) {\n on = Identity (go)\n s1 = Relu (s)\n s2 = Relu (s1)\n \
         so = Add (s2, x)\n }>\n}",
    );
    let (small, report) = shrink(&looping, &job("simplify"), &mut |_| {}).unwrap();
    assert!(report.causes.is_empty(), "{:?}", report.causes);
    assert_eq!(kinds(&small), ["Loop"]);
    let inside: Vec<_> = small.graph.bodies().map(|(_, body)| body.graph.ops().len()).collect();
    assert_eq!(inside, [3]);
}

#[test]
fn indices_of_rows_stay_within_the_rows_that_there_are() {
    let edges = model(
        "\"\": 17",
        "g (float[n,4] x, int64[2,e] edges) => (float[e,4] y)\n<int64 one = {1}>\n{\n to = Gather <axis = 0> (edges, one)\n \
         a = Gather <axis = 0> (x, to)\n b = Relu (a)\n y = Relu (b)\n}",
    );
    let samples = Samples::gather(&edges, &Request::default()).unwrap();
    assert_eq!(samples.unrunnable, None);
    let (kinds, _) = simplified(&edges);
    assert_eq!(kinds.iter().filter(|kind| *kind == "Relu").count(), 1);
}

#[test]
fn other_results_of_bodies_and_other_constants_are_no_match_region_by_region() {
    let holding = |name: &str, op: &str, number: f32| {
        model(
            "\"\": 17, \"com.microsoft\": 1",
            &format!(
                "g (float[1,4] x, bool c) => (float[1,4] y, float[1,4] w, float k)\n<float k = {{{number}}}>\n{{\n \
                 w = com.microsoft.FastGelu (x)\n y = If (c) <then_branch = t () => (float[1,4] {name}) {{ {name} = {op} (x) }}, \
                 else_branch = e () => (float[1,4] b) {{ b = Abs (x) }}>\n}}"
            ),
        )
    };
    let first = holding("p", "Relu", 1.0);
    for (other, is_same) in
        [(holding("p", "Relu", 1.0), true), (holding("q", "Neg", 1.0), false), (holding("p", "Relu", 2.0), false)]
    {
        let found = compare_regions(&Engine::default(), &first, &other, &BTreeMap::new());
        assert_eq!(found.is_ok_and(|found| found.rounding <= ROUNDING_BUDGET), is_same);
    }
}
