use std::sync::atomic::AtomicBool;

use onnx_shrink::codec::{Model, save, size_at};

use crate::{fixture, fixtures, models};

#[test]
fn what_is_read_is_written_byte_for_byte() {
    for path in fixtures("roundtrip").into_iter().chain(models()) {
        let bytes = std::fs::read(&path).unwrap();
        let model = Model::decode(bytes.clone().into(), None).unwrap();
        assert!(model.encode() == bytes, "{}", path.display());
        assert_eq!(model.unknown_bytes(), 0, "{}", path.display());
    }
}

#[test]
fn unknown_fields_are_counted() {
    let mut bytes = std::fs::read(fixture("roundtrip/bodies_nest.onnx")).unwrap();
    // Field 1000 of type varint, value 1.
    bytes.extend([0xc0, 0x3e, 0x01]);
    assert_eq!(Model::decode(bytes.into(), None).unwrap().unknown_bytes(), 3);
}

#[test]
fn every_cut_of_a_file_is_an_error_and_never_a_panic() {
    let bytes = std::fs::read(fixture("roundtrip/bodies_nest.onnx")).unwrap();
    for len in 0..bytes.len() {
        // Some cuts end between two fields and leave a smaller model; what matters is that none panics.
        if let Ok(model) = Model::decode(bytes[..len].to_vec().into(), None) {
            assert!(model.encode().len() <= len);
        }
    }
}

#[test]
fn external_data_goes_beside_the_output() {
    let folder = tempfile::tempdir().unwrap();
    let source = fixture("models/mnist_lenet300.onnx");
    let mut proto = Model::open(&source).unwrap().to_proto();
    let mut data = Vec::new();
    for tensor in &mut proto.graph.as_mut().unwrap().initializer {
        let raw = tensor.raw_data.take().unwrap();
        let entry = |key: &str, value: String| onnx_shrink::proto::StringStringEntryProto {
            key: Some(key.to_owned()),
            value: Some(value),
        };
        tensor.external_data = vec![
            entry("location", "weights.bin".to_owned()),
            entry("offset", data.len().to_string()),
            entry("length", raw.len().to_string()),
        ];
        tensor.data_location = Some(1);
        data.extend(raw);
    }
    let input = folder.path().join("in.onnx");
    std::fs::write(&input, prost::Message::encode_to_vec(&proto)).unwrap();
    std::fs::write(folder.path().join("weights.bin"), &data).unwrap();
    let model = Model::open(&input).unwrap();
    assert_eq!(model.encode(), std::fs::read(&input).unwrap());
    let predicted = size_at(&model, &folder.path().join("out.onnx")).unwrap();
    let saved = save(&model, &folder.path().join("out.onnx"), &AtomicBool::new(false)).unwrap();
    assert_eq!(predicted, saved.bytes);
    assert_eq!(saved.sidecar, Some(folder.path().join("out.onnx.data")));
    let again = Model::open(&folder.path().join("out.onnx")).unwrap();
    let plain = Model::open(&source).unwrap();
    for (name, value) in plain.graph.values() {
        let Some(wanted) = plain.graph.constant(value) else { continue };
        assert!(again.graph.constant(again.graph.values()[name]).unwrap().same(wanted), "{name}");
    }
    assert_eq!(std::fs::read(folder.path().join("weights.bin")).unwrap(), data);
}
