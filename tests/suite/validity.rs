//! What is known of the values of a graph, and what runtimes would refuse it for.

use std::collections::{BTreeMap, BTreeSet};

use onnx_shrink::{
    analysis::{cost, shapes::Shapes, validity},
    codec::Model,
    ir::DType,
    pipeline,
    proto::{TypeProto, ValueInfoProto, type_proto},
    shrink::{Job, shrink},
    text,
    verify::{Request, Samples, Split},
};
use prost::Message;

use crate::{fixture, storage::operators};

fn tensor_type(dtype: DType) -> TypeProto {
    let tensor = type_proto::Tensor { elem_type: Some(dtype as i32), shape: None };
    TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() }
}

#[test]
fn what_a_file_declares_of_values_that_go_is_not_said_of_others() {
    let model = Model::open(&fixture("models/mnist_lenet300.onnx")).unwrap();
    let job = |passes: &str| Job { items: pipeline::parse(passes).unwrap(), verify: false, ..Job::default() };
    let (small, _) = shrink(&model, &job("quantize:bits=2"), &mut |_| {}).unwrap();
    let mut proto = small.to_proto();
    let file = Model::decode(small.encode().into(), None).unwrap();
    let facts = Shapes::infer(&file.graph, &BTreeMap::new());
    let declared = file.graph.values().into_iter().map(|(name, value)| {
        let dtype = facts.fact(value).unwrap().dtype.unwrap();
        ValueInfoProto { name: Some(name.to_owned()), r#type: Some(tensor_type(dtype)), ..ValueInfoProto::default() }
    });
    proto.graph.as_mut().unwrap().value_info = declared.collect();
    let declared = Model::decode(proto.encode_to_vec().into(), None).unwrap();
    assert_eq!(validity::faults(&declared.graph), BTreeSet::new());
    let (other, _) = shrink(&declared, &job("codebook:bits=1"), &mut |_| {}).unwrap();
    let other = Model::decode(other.encode().into(), None).unwrap();
    assert_eq!(validity::faults(&other.graph), BTreeSet::new(), "{}", text::diff(&declared, &other));
}

#[test]
fn what_a_file_declares_of_nothing_is_not_said_of_what_comes() {
    // The body that is taken has a value of that name, and what a matrix of low rank is split in would have those.
    let text = "<ir_version: 8, opset_import: [\"\": 17]>\ng (float[N,48] x) => (float[N,40] y)\n\
                <bool c = {1}, float[40,48] w = lowrank(6, 1), int64[1,48] t, int64[1] \"y.exact-rank\", int64[1] \"w.exact-rank.left\">\n\
                {\n a = If (c) <then_branch = p () => (float[N,48] e) {\n t = Exp (x)\n e = Neg (t)\n},\n\
                 else_branch = q () => (float[N,48] f) {\n f = Neg (x)\n}>\n y = Gemm <transB = 1> (a, w)\n}\n";
    let model = text::parse(text).unwrap();
    for verify in [true, false] {
        let job = Job { items: pipeline::parse("simplify").unwrap(), verify, ..Job::default() };
        let (small, _) = shrink(&model, &job, &mut |_| {}).unwrap();
        let file = Model::decode(small.encode().into(), None).unwrap();
        assert_eq!(operators(&file.graph), ["Exp", "Neg", "Gemm", "Gemm"]);
        assert_eq!(validity::faults(&file.graph), BTreeSet::new(), "{}", text::print(&file));
    }
}

#[test]
fn types_of_what_is_written_for_half_precision_agree() {
    let text = "<ir_version: 10, opset_import: [\"\": 21]>\ng (float16[1,2] x) => (float16[1,2] y)\n\
                <int8[2,2] q = {1, -2, 3, 4}, float16[2] s = normal(2), float16 zero = {0.0}>\n\
                {\n w = DequantizeLinear <axis = 1> (q, s)\n m = MatMul (x, w)\n r = Max (m, zero)\n i = Identity (r)\n y = Abs (i)\n}\n";
    let model = text::parse(text).unwrap();
    assert_eq!(validity::faults(&model.graph), BTreeSet::new());
    let job = Job { items: pipeline::parse("identity").unwrap(), verify: false, ..Job::default() };
    let (small, _) = shrink(&model, &job, &mut |_| {}).unwrap();
    let file = Model::decode(small.encode().into(), None).unwrap();
    assert_eq!(validity::faults(&file.graph), BTreeSet::new(), "{}", text::diff(&model, &file));
    assert_eq!(operators(&file.graph), ["DequantizeLinear", "MatMul", "Max", "Abs"]);
}

#[test]
fn what_runtimes_refuse_is_found() {
    let faults = |opset: i64, body: &str| {
        let head = format!("<ir_version: 8, opset_import: [\"\": {opset}]>\n");
        let text = format!("{head}g (float[4] x, float16[4] h, bool[4] c, float[4,4] m) => (float[4] y)\n{body}\n");
        let faults = validity::faults(&text::parse(&text).unwrap().graph);
        faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    };
    for (opset, body) in [
        (17, "{ y = Where (c, x, x) }"),
        (17, "<float[4] p> { p = Abs (x)\n y = Pow (p, h) }"),
        (11, "{ g = Gemm (m, m)\n y = ReduceMax <axes = [1]> (g) }"),
        (20, "{ y = Gelu (x) }"),
        (7, "{ y = Clip <min = 0.0> (x) }"),
        (9, "{ y = Concat <axis = 0> (x, x, x, x) }"),
    ] {
        assert_eq!(faults(opset, body), "");
    }
    for (opset, body, what) in [
        (17, "{ y = Max (x, h) }", "reads Float and Float16, where it wants one type"),
        (17, "<int32[4] p> { p = Abs (x)\n y = Abs (p) }", "`p` is of Float, and declared to be of Int32"),
        (17, "{ y = Abs (h) }", "`y` is of Float16, and declared to be of Float"),
        (10, "{ y = Gemm (m, m) }", "(Gemm) reads 2 values, and 3..=3 in operator set 10"),
        (19, "{ y = Gelu (x) }", "is none of operator set 19"),
        (11, "{ y = Clip <min = 0.0> (x) }", "has an attribute `min`, and none in operator set 11"),
        (17, "{ y, z = Abs (x) }", "makes 2 values, and 1..=1 in operator set 17"),
    ] {
        let found = faults(opset, body);
        assert!(found.contains(what), "{found}");
    }
}

#[test]
fn indices_fit_tables_that_are_made_of_integers() {
    let text = "<ir_version: 10, opset_import: [\"\": 21]>\ng (int64[64] i) => (float[64,2] y)\n\
                <int8[3,2] q = {1, -2, 3, 4, 5, 6}, float s = {0.5}>\n{\n t = DequantizeLinear (q, s)\n y = Gather (t, i)\n}\n";
    let samples = Samples::gather(&text::parse(text).unwrap(), &Request::default()).unwrap();
    let drawn: Vec<f64> = samples.part(Split::Last).concat().into_iter().flat_map(|input| input.values).collect();
    assert!(drawn.iter().all(|index| (0.0..3.0).contains(index)) && drawn.contains(&2.0), "{drawn:?}");
}

#[test]
fn what_integers_are_multiplied_by_is_counted() {
    let text = "<ir_version: 8, opset_import: [\"\": 13]>\ng (uint8[1,3,8,8] x, int8[4,3,3,3] w, int8[6,5] v) => (int8[1,4,6,5] y)\n\
                <float s = {0.1}, uint8 z = {128}, int8 n = {0}>\n\
                {\n c = QLinearConv (x, s, z, w, s, n, s, z)\n y = QLinearMatMul (c, s, z, v, s, n, s, n)\n}\n";
    let graph = text::parse(text).unwrap().graph;
    let shapes = Shapes::infer(&graph, &BTreeMap::new());
    let fact = |name: &str| shapes.fact(graph.values()[name]).unwrap().clone();
    assert_eq!(shapes.known(graph.values()["c"]).unwrap(), [1, 4, 6, 6]);
    assert_eq!(shapes.known(graph.values()["y"]).unwrap(), [1, 4, 6, 5]);
    assert_eq!((fact("c").dtype, fact("y").dtype), (Some(DType::Uint8), Some(DType::Int8)));
    let macs = |name: &str| cost::macs(&graph, &shapes, graph.values()[name].node);
    assert_eq!((macs("c"), macs("y")), (Some(144.0 * 27.0), Some(120.0 * 6.0)));
}
