//! Compiles `proto/onnx.proto` with protox, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/onnx.proto");
    let files = protox::compile(["onnx.proto"], ["proto"])?;
    // `raw_data` as `Bytes` aliases the mapped file, so that no weight is copied.
    prost_build::Config::new().bytes(["."]).compile_fds(files)?;
    Ok(())
}
