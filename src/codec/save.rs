//! Writing a model: whole or not at all.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use prost::Message;
use tempfile::NamedTempFile;

use super::{CodecError, MAX_MESSAGE, Model, map};
use crate::{
    ir::{Graph, Kind, Tensor},
    proto::{GraphProto, ModelProto, StringStringEntryProto, TensorProto, tensor_proto::DataLocation},
};

/// Tensors below this many bytes stay inside the message: the entry that points elsewhere takes a tenth of it.
const MIN_EXTERNAL: usize = 1024;

/// What was written.
#[derive(Clone, Debug)]
pub struct Saved {
    /// Bytes in all.
    pub bytes: usize,
    /// The file with the large tensors, if the model needs one.
    pub sidecar: Option<PathBuf>,
}

/// Writes `model` to `path` by renaming a complete temporary file, so that `path` is never half-written. The large
/// tensors go to a file beside it where the input's did or where the message would pass 2 GiB. A symbolic link is
/// followed; a device or a pipe, which can't be replaced, is written into. A model that nobody edited is written as it
/// was read, byte for byte.
///
/// # Errors
///
/// When the disk is full or the folder can't be written, or `cancelled` was set before the file was whole; `path` is
/// then as it was.
pub fn save(model: &Model, path: &Path, cancelled: &AtomicBool) -> Result<Saved, CodecError> {
    let path = &followed(path);
    let io = |source| CodecError::Io { path: path.to_owned(), action: "written", source };
    if let Ok(metadata) = fs::metadata(path)
        && !metadata.is_file()
    {
        let bytes = model.to_stream()?;
        fs::OpenOptions::new().write(true).open(path).and_then(|mut file| file.write_all(&bytes)).map_err(io)?;
        return Ok(Saved { bytes: bytes.len(), sidecar: None });
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = || match fs::metadata(folder) {
        Ok(_) => NamedTempFile::new_in(folder).map_err(io),
        Err(source) => Err(CodecError::Io { path: folder.to_owned(), action: "written into", source }),
    };
    let (mut sidecar, mut bytes) = (None, 0);
    let mut file = temporary()?;
    if let Some(original) = model.original() {
        file.write_all(original).map_err(io)?;
        bytes += original.len();
    } else {
        let model = &*model.lowered();
        let mut proto = model.to_proto();
        if needs_sidecar(model, &proto) {
            let target = sidecar_path(model, path);
            let mut file = temporary()?;
            let written = externalize(&model.graph, &mut proto, &target, file.as_file_mut()).map_err(io)?;
            sidecar = Some((file, target)).filter(|_| written > 0);
            bytes += written;
        }
        bytes += write_message(&proto, file.as_file()).map_err(io)?;
    }
    if model.source.path.is_some() && path.canonicalize().ok() == model.source.path {
        // The only copy of the model is about to go: the new one must be on the disk first.
        file.as_file().sync_all().map_err(io)?;
    }
    if cancelled.load(Ordering::SeqCst) {
        return Err(CodecError::Interrupted);
    }
    let sidecar = sidecar.map(|(file, target)| persist(file, &target)).transpose().map_err(io)?;
    persist(file, path).map_err(io)?;
    Ok(Saved { bytes, sidecar })
}

/// The bytes that `model` takes at `path`, which are a matter of the path as well where each large tensor names the file
/// that it lies in.
///
/// # Errors
///
/// Those of writing that are no matter of the disk.
pub fn size_at(model: &Model, path: &Path) -> Result<usize, CodecError> {
    if let Some(original) = model.original() {
        return Ok(original.len());
    }
    let model = &*model.lowered();
    let mut proto = model.to_proto();
    let mut external = 0;
    if needs_sidecar(model, &proto) {
        let io = |source| CodecError::Io { path: path.to_owned(), action: "written", source };
        let target = sidecar_path(model, &followed(path));
        external = externalize(&model.graph, &mut proto, &target, io::sink()).map_err(io)?;
    }
    Ok(proto.encoded_len() + external)
}

/// Whether the large tensors of `model` go to a file of their own.
fn needs_sidecar(model: &Model, proto: &ModelProto) -> bool {
    !model.source.external.is_empty() || proto.encoded_len() > MAX_MESSAGE
}

/// Where `path` leads, if it is a symbolic link, even to a file that is not there yet.
fn followed(path: &Path) -> PathBuf {
    match fs::read_link(path) {
        Ok(target) => path.canonicalize().unwrap_or_else(|_| path.with_file_name("").join(target)),
        Err(_) => path.to_owned(),
    }
}

/// Encodes into a mapped file whose space is reserved first: a full disk is an error here, not a crash later.
fn write_message(proto: &ModelProto, file: &File) -> io::Result<usize> {
    let len = proto.encoded_len();
    if len == 0 {
        return Ok(0);
    }
    match map::write(file, len) {
        Ok(mut map) => proto.encode(&mut &mut map[..]).map_err(io::Error::other)?,
        // Some file systems can't reserve space; an ordinary write tells when they are full.
        Err(error) if error.kind() == io::ErrorKind::Unsupported => (&mut &*file).write_all(&proto.encode_to_vec())?,
        Err(error) => return Err(error),
    }
    Ok(len)
}

/// Renames `file` to `target`, with the permissions of what it replaces, else those of any new file.
fn persist(file: NamedTempFile, target: &Path) -> io::Result<PathBuf> {
    if let Ok(metadata) = fs::metadata(target) {
        file.as_file().set_permissions(metadata.permissions())?;
    } else {
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mask = rustix::process::umask(rustix::fs::Mode::empty());
            rustix::process::umask(mask);
            file.as_file().set_permissions(fs::Permissions::from_mode(0o666 & !mask.as_raw_mode()))?;
        }
    }
    file.persist(target).map_err(|error| error.error)?;
    Ok(target.to_owned())
}

/// `model.onnx.data` beside `model.onnx`, unless that is a file that the input's data lies in.
fn sidecar_path(model: &Model, path: &Path) -> PathBuf {
    let candidate = |n: usize| {
        let mut name = path.file_name().map_or_else(|| OsString::from("model.onnx"), ToOwned::to_owned);
        name.push(if n == 1 { ".data".to_owned() } else { format!(".{n}.data") });
        path.with_file_name(name)
    };
    let in_use = |path: &PathBuf| path.canonicalize().is_ok_and(|path| model.source.external.contains(&path));
    (1..).map(candidate).find(|path| !in_use(path)).unwrap_or_else(|| candidate(1))
}

/// Writes the large tensors of `graph` to `file`, points `proto` there, and says how many bytes went.
fn externalize(graph: &Graph, proto: &mut ModelProto, target: &Path, file: impl Write) -> io::Result<usize> {
    let mut out = Sidecar {
        location: target.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        file: io::BufWriter::new(file),
        offset: 0,
    };
    if let Some(proto) = &mut proto.graph {
        out.graph(graph, proto)?;
    }
    out.file.flush()?;
    Ok(out.offset)
}

struct Sidecar<W: Write> {
    location: String,
    file: io::BufWriter<W>,
    offset: usize,
}

impl<W: Write> Sidecar<W> {
    fn graph(&mut self, graph: &Graph, proto: &mut GraphProto) -> io::Result<()> {
        let values = graph.values();
        let tensor_of = |name: &str| match graph.kind(values.get(name)?.node) {
            Kind::Const(constant) => Some(constant.weight.value().clone()),
            _ => None,
        };
        for initializer in &mut proto.initializer {
            if let Some(tensor) = tensor_of(initializer.name()) {
                self.tensor(&tensor, initializer)?;
            }
        }
        for node in &mut proto.node {
            let made = node.output.first().and_then(|name| values.get(name.as_str()).copied());
            for attribute in &mut node.attribute {
                if let (Some(message), Some(tensor)) =
                    (&mut attribute.t, node.output.first().and_then(|name| tensor_of(name)))
                {
                    self.tensor(&tensor, message)?;
                }
                let bodies = made.and_then(|value| graph.op(value.node)).map_or(&[][..], |op| &op.bodies);
                let held = attribute.name().to_owned();
                for body in bodies.iter().filter(|body| body.attribute == held) {
                    let message = match body.index {
                        None => attribute.g.as_mut(),
                        Some(index) => attribute.graphs.get_mut(index),
                    };
                    if let Some(message) = message {
                        self.graph(&body.graph, message)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn tensor(&mut self, tensor: &Tensor, proto: &mut TensorProto) -> io::Result<()> {
        if tensor.byte_len() < MIN_EXTERNAL && !tensor.is_external() || tensor.strings().is_some() {
            return Ok(());
        }
        let bytes = tensor.bytes();
        self.file.write_all(&bytes)?;
        let entry = |key: &str, value: String| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value) };
        let inline = TensorProto {
            dims: std::mem::take(&mut proto.dims),
            data_type: proto.data_type,
            name: proto.name.take(),
            doc_string: proto.doc_string.take(),
            metadata_props: std::mem::take(&mut proto.metadata_props),
            ..TensorProto::default()
        };
        *proto = TensorProto {
            external_data: vec![
                entry("location", self.location.clone()),
                entry("offset", self.offset.to_string()),
                entry("length", bytes.len().to_string()),
            ],
            data_location: Some(DataLocation::External as i32),
            ..inline
        };
        self.offset += bytes.len();
        Ok(())
    }
}
