//! Constants whose data lies in files beside the model.

use std::{
    collections::BTreeMap,
    io,
    path::{Component, Path, PathBuf},
};

use bytes::Bytes;

use super::map;
use crate::proto::{TensorProto, tensor_proto::DataLocation};

/// What is wrong with a constant's external data.
#[derive(Debug, thiserror::Error)]
pub enum ExternalError {
    /// The model was read from a stream.
    #[error("its data is in the file `{0}`, but the model was not read from a folder; pass the model as a file")]
    NoFolder(String),
    /// The message does not say where.
    #[error("it says that its data is in another file, but not in which")]
    NoLocation,
    /// The path leads out of the model's folder.
    #[error("its data is in `{0}`, outside the model's folder; move the file beside the model and correct the path")]
    Outside(String),
    /// The file can't be read.
    #[error("its data is in `{location}`, which cannot be read; put the file beside the model")]
    Unreadable {
        /// The path, relative to the model.
        location: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The offset or length is not a number.
    #[error("`{key}` of its external data is `{value}`, which is not a number of bytes")]
    NotANumber {
        /// `offset` or `length`.
        key: String,
        /// What stands there.
        value: String,
    },
    /// The file is too short.
    #[error("its data is bytes {begin} to {end} of `{location}`, which has only {len}; the file was cut")]
    Short {
        /// The path, relative to the model.
        location: String,
        /// Where the data begins.
        begin: usize,
        /// Where it ends.
        end: usize,
        /// How long the file is.
        len: usize,
    },
}

/// The files with external data of one model, each mapped once.
#[derive(Debug, Default)]
pub(super) struct Files<'a> {
    folder: Option<&'a Path>,
    mapped: BTreeMap<String, Bytes>,
    pub paths: Vec<PathBuf>,
    pub bytes: usize,
}

impl<'a> Files<'a> {
    pub(super) fn new(folder: Option<&'a Path>) -> Self {
        Self { folder, ..Self::default() }
    }

    /// The bytes of `tensor` if it keeps them in another file.
    pub(super) fn fetch(&mut self, tensor: &TensorProto) -> Result<Option<Bytes>, ExternalError> {
        if tensor.data_location != Some(DataLocation::External as i32) {
            return Ok(None);
        }
        let entry = |key: &str| {
            tensor.external_data.iter().find(|e| e.key() == key).map(super::super::proto::StringStringEntryProto::value)
        };
        let number = |key: &str| {
            let number = entry(key).map(|v| {
                v.trim().parse::<usize>().map_err(|_| ExternalError::NotANumber { key: key.into(), value: v.into() })
            });
            number.transpose()
        };
        let location = entry("location").ok_or(ExternalError::NoLocation)?;
        let file = self.file(location)?;
        let begin = number("offset")?.unwrap_or(0);
        let length = number("length")?.unwrap_or(file.len().saturating_sub(begin));
        let end = begin.saturating_add(length);
        if end > file.len() {
            return Err(ExternalError::Short { location: location.to_owned(), begin, end, len: file.len() });
        }
        self.bytes += length;
        Ok(Some(file.slice(begin..end)))
    }

    fn file(&mut self, location: &str) -> Result<Bytes, ExternalError> {
        if let Some(bytes) = self.mapped.get(location) {
            return Ok(bytes.clone());
        }
        let folder = self.folder.ok_or_else(|| ExternalError::NoFolder(location.to_owned()))?;
        let relative = Path::new(location);
        if !relative.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
            return Err(ExternalError::Outside(location.to_owned()));
        }
        let unreadable = |source| ExternalError::Unreadable { location: location.to_owned(), source };
        let path = folder.join(relative).canonicalize().map_err(unreadable)?;
        if !path.starts_with(folder.canonicalize().map_err(unreadable)?) {
            return Err(ExternalError::Outside(location.to_owned()));
        }
        let bytes = map::read(&path).map_err(unreadable)?;
        self.mapped.insert(location.to_owned(), bytes.clone());
        self.paths.push(path);
        Ok(bytes)
    }
}
