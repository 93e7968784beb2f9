//! Models as files: `encode(decode(bytes)) == bytes`, as long as nobody edits in between.

mod decode;
mod encode;
mod external;
mod lower;
mod map;
mod raise;
mod save;

use std::{
    io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use prost::Message;

pub use self::{
    external::ExternalError,
    lower::{Runtime, least_opset, packs},
    save::{Saved, save, size_at},
};
pub(crate) use self::{
    lower::{is_between_codes, is_hidden, rounded_at_once, spelled_bytes},
    raise::{keeps_weights, moved, raise},
};
use crate::{
    ir::{Graph, InvalidGraph, TensorError},
    proto::ModelProto,
};

/// The largest message that protobuf libraries read: 2 GiB.
pub(crate) const MAX_MESSAGE: usize = i32::MAX as usize;

/// A model: its graph, and the rest of the file, which is carried.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// The main graph.
    pub graph: Graph,
    /// What is to run the file, by which stored weights are spelled.
    pub runtime: Runtime,
    /// The message without the graph.
    pub(crate) rest: ModelProto,
    /// Where the model came from.
    pub(crate) source: Source,
}

/// The file that a model came from.
#[derive(Clone, Debug, Default)]
pub(crate) struct Source {
    /// Its absolute path, if it has one.
    pub path: Option<PathBuf>,
    /// The message's bytes.
    pub bytes: Bytes,
    /// The files that hold external data.
    pub external: Vec<PathBuf>,
    /// Bytes of the tensors kept there.
    pub external_bytes: usize,
    /// Bytes that this program's `onnx.proto` can't account for.
    pub unknown: usize,
}

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The operating system said no.
    #[error("{path}: cannot be {action}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// `read`, `written` or the like.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The caller gave up before the file was whole.
    #[error("interrupted; nothing was written")]
    Interrupted,
    /// A stream is to hold what takes several files.
    #[error("the model keeps data in other files, which a stream can't hold; give a path to write to")]
    NeedsFiles,
    /// There is nothing in the file.
    #[error("the file is empty; export or download it again")]
    Empty,
    /// The file is what Git LFS leaves in a checkout without the content.
    #[error("the file is a Git LFS pointer, not the model itself; run `git lfs pull` to fetch the model")]
    LfsPointer,
    /// The bytes are no message of `onnx.proto`.
    #[error("the file is not an ONNX model, or it was cut short; export or download it again")]
    NotOnnx(#[source] prost::DecodeError),
    /// The message has no graph.
    #[error("the file holds no graph, so it is not an ONNX model; pass the .onnx file itself")]
    NoGraph,
    /// A constant is damaged.
    #[error("constant `{name}`")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong.
        source: TensorError,
    },
    /// A constant's external data can't be had.
    #[error("constant `{name}`")]
    External {
        /// Its name.
        name: String,
        /// What is wrong.
        source: ExternalError,
    },
    /// A node reads a value that nothing makes.
    #[error("node `{node}` reads `{value}`, which nothing makes; the file is damaged or was edited by hand")]
    Dangling {
        /// The node.
        node: String,
        /// The value.
        value: String,
    },
    /// A name stands for two values.
    #[error("two values are called `{0}`; the exporter must give each value its own name")]
    SameName(String),
    /// The graph breaks an invariant.
    #[error("the graph is not valid; the file is damaged or was edited by hand")]
    Invalid(#[from] InvalidGraph),
    /// Bodies are nested deeper than any real model's.
    #[error("subgraphs are nested more than {0} deep")]
    TooDeep(usize),
}

impl Model {
    /// Reads the model at `path`, mapping the file and those that hold its external data.
    ///
    /// # Errors
    ///
    /// When a file can't be read or is not a valid model.
    pub fn open(path: &Path) -> Result<Self, CodecError> {
        let io = |source| CodecError::Io { path: path.to_owned(), action: "read", source };
        let bytes = map::read(path).map_err(io)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut model = Self::decode(bytes, Some(folder))?;
        model.source.path = path.canonicalize().ok();
        Ok(model)
    }

    /// Reads a model from `bytes`; external data is looked for in `folder`.
    ///
    /// # Errors
    ///
    /// When the bytes are not a valid model.
    pub fn decode(bytes: Bytes, folder: Option<&Path>) -> Result<Self, CodecError> {
        decode::model(bytes, folder)
    }

    /// The message of this model: that which was read, where nothing was edited.
    #[must_use]
    pub fn to_proto(&self) -> ModelProto {
        encode::model(&self.lowered())
    }

    /// The bytes of the message with each weight element by element: the twin, which any engine runs that runs the original.
    pub(crate) fn encode_twin(&self) -> Vec<u8> {
        encode::model(self).encode_to_vec()
    }

    /// The message in which constants are what they stand for, however they are stored.
    pub(crate) fn twin_proto(&self) -> ModelProto {
        encode::model(self)
    }

    /// The bytes of the message. External data stays where it is.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.to_proto().encode_to_vec()
    }

    /// Whether the file that was read keeps data in others.
    #[must_use]
    pub fn has_external_data(&self) -> bool {
        !self.source.external.is_empty()
    }

    /// The bytes that were read, if nobody edited the model since and they are all of it.
    pub(crate) fn original(&self) -> Option<&Bytes> {
        let whole = self.graph.edits() == 0 && self.source.external.is_empty() && !self.source.bytes.is_empty();
        whole.then_some(&self.source.bytes)
    }

    /// The whole model as one sequence of bytes.
    ///
    /// # Errors
    ///
    /// When it keeps data in other files, which a stream can't hold.
    pub fn to_stream(&self) -> Result<Bytes, CodecError> {
        if !self.source.external.is_empty() {
            return Err(CodecError::NeedsFiles);
        }
        Ok(self.original().cloned().unwrap_or_else(|| self.encode().into()))
    }

    /// A model of `graph`, a segment of this one's, over the same operator sets and functions.
    pub(crate) fn with_graph(&self, graph: Graph) -> Self {
        let rest = ModelProto { training_info: Vec::new(), ..self.rest.clone() };
        Self { graph, runtime: self.runtime, rest, source: Source::default() }
    }

    /// Bytes of the file it was read from, external data included.
    #[must_use]
    pub fn source_bytes(&self) -> usize {
        self.source.bytes.len() + self.source.external_bytes
    }

    /// A hash of the file it was read from.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        xxhash_rust::xxh3::xxh3_64(&self.source.bytes)
    }

    /// Bytes of the file that are in no field this program knows; they would not be written back.
    #[must_use]
    pub fn unknown_bytes(&self) -> usize {
        self.source.unknown
    }

    /// The IR version of the file.
    #[must_use]
    pub fn ir_version(&self) -> i64 {
        self.rest.ir_version()
    }

    /// The operator sets that the model imports: domain (empty for the standard one) and version.
    pub fn opsets(&self) -> impl Iterator<Item = (&str, i64)> {
        self.rest.opset_import.iter().map(|set| (set.domain(), set.version()))
    }
}
