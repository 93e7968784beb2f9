//! From text to a model.

mod data;
mod lexer;

use prost::Message;

use self::lexer::{Lexer, Token};
use crate::{
    codec::Model,
    ir::DType,
    proto::{
        AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto,
        TensorShapeProto, TypeProto, ValueInfoProto,
        attribute_proto::AttributeType,
        tensor_shape_proto::{Dimension, dimension},
        type_proto,
    },
};

/// What is wrong with a text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {what}")]
pub struct SyntaxError {
    /// Counted from one.
    pub line: usize,
    /// What was found, and what was expected.
    pub what: String,
}

/// The model that `text` describes. Lines that begin with `#` are comments; functions are not read.
///
/// # Errors
///
/// When the text does not follow the syntax, or what it describes is no valid model.
pub fn parse(text: &str) -> Result<Model, SyntaxError> {
    let mut parser = Parser { lexer: Lexer::new(text)? };
    let mut model = parser.header()?;
    model.graph = Some(parser.graph()?);
    parser.expect(&Token::End)?;
    let whole = |error| SyntaxError { line: 1, what: format!("{:#}", anyhow::Error::from(error)) };
    Model::decode(model.encode_to_vec().into(), None).map_err(whole)
}

type Parsed<T> = Result<T, SyntaxError>;

struct Parser {
    lexer: Lexer,
}

impl Parser {
    fn wrong<T>(&self, wanted: &str) -> Parsed<T> {
        let (line, found) = (self.lexer.line(), self.lexer.peek());
        Err(SyntaxError { line, what: format!("{wanted} is expected and {found} was found") })
    }

    fn expect(&mut self, token: &Token) -> Parsed<()> {
        if self.accept(token) { Ok(()) } else { self.wrong(&token.to_string()) }
    }

    fn accept(&mut self, token: &Token) -> bool {
        let found = self.lexer.peek() == token;
        if found {
            self.lexer.next();
        }
        found
    }

    fn punctuation(&mut self, c: char) -> Parsed<()> {
        self.expect(&Token::Punctuation(c))
    }

    fn is_at(&self, c: char) -> bool {
        *self.lexer.peek() == Token::Punctuation(c)
    }

    /// Items between `open` and `close`, separated by commas.
    fn list<T>(&mut self, open: char, close: char, mut item: impl FnMut(&mut Self) -> Parsed<T>) -> Parsed<Vec<T>> {
        self.punctuation(open)?;
        let mut items = Vec::new();
        while !self.is_at(close) {
            items.push(item(self)?);
            if !self.accept(&Token::Punctuation(',')) {
                break;
            }
        }
        self.punctuation(close)?;
        Ok(items)
    }

    /// An identifier, bare.
    fn word(&mut self) -> Parsed<String> {
        match self.lexer.peek().clone() {
            Token::Word(word) => {
                self.lexer.next();
                Ok(word)
            }
            _ => self.wrong("a name"),
        }
    }

    fn string(&mut self) -> Parsed<String> {
        match self.lexer.peek().clone() {
            Token::Text(text) => {
                self.lexer.next();
                Ok(text)
            }
            _ => self.wrong("a quoted text"),
        }
    }

    fn integer(&mut self) -> Parsed<i64> {
        match self.lexer.peek().clone() {
            Token::Number(number) => match number.parse() {
                Ok(value) => {
                    self.lexer.next();
                    Ok(value)
                }
                Err(_) => self.wrong("an integer"),
            },
            _ => self.wrong("an integer"),
        }
    }

    /// A name, bare or quoted.
    fn name(&mut self) -> Parsed<String> {
        match self.lexer.peek() {
            Token::Text(_) => self.string(),
            _ => self.word(),
        }
    }

    /// A name, or nothing where an optional value is left out.
    fn optional_name(&mut self) -> Parsed<String> {
        match self.lexer.peek() {
            Token::Punctuation(',' | ')' | '=') => Ok(String::new()),
            _ => self.name(),
        }
    }

    fn header(&mut self) -> Parsed<ModelProto> {
        let mut model = ModelProto::default();
        self.list('<', '>', |parser| {
            let key = parser.word()?;
            parser.punctuation(':')?;
            match key.as_str() {
                "ir_version" => model.ir_version = Some(parser.integer()?),
                "producer_name" => model.producer_name = Some(parser.string()?),
                "producer_version" => model.producer_version = Some(parser.string()?),
                "domain" => model.domain = Some(parser.string()?),
                "opset_import" => {
                    model.opset_import = parser.list('[', ']', |parser| {
                        let domain = parser.string()?;
                        parser.punctuation(':')?;
                        Ok(OperatorSetIdProto { domain: Some(domain), version: Some(parser.integer()?) })
                    })?;
                }
                "metadata_props" => {
                    model.metadata_props = parser.list('[', ']', |parser| {
                        let key = parser.string()?;
                        parser.punctuation(':')?;
                        Ok(StringStringEntryProto { key: Some(key), value: Some(parser.string()?) })
                    })?;
                }
                _ => return parser.wrong("ir_version, opset_import or another field of a model, not this,"),
            }
            Ok(())
        })?;
        Ok(model)
    }

    fn graph(&mut self) -> Parsed<GraphProto> {
        let mut graph = GraphProto { name: Some(self.name()?), ..GraphProto::default() };
        graph.input = self.list('(', ')', Self::value_info)?;
        self.expect(&Token::Arrow)?;
        graph.output = self.list('(', ')', Self::value_info)?;
        if self.is_at('<') {
            let (mut initializers, mut infos) = (Vec::new(), Vec::new());
            self.list('<', '>', |parser| {
                let kind = parser.kind()?;
                let name = parser.name()?;
                if parser.accept(&Token::Punctuation('=')) {
                    let mut tensor = parser.data(&kind)?;
                    tensor.name = Some(name);
                    initializers.push(tensor);
                } else {
                    infos.push(ValueInfoProto { name: Some(name), r#type: Some(kind), ..ValueInfoProto::default() });
                }
                Ok(())
            })?;
            (graph.initializer, graph.value_info) = (initializers, infos);
        }
        self.punctuation('{')?;
        while !self.is_at('}') {
            graph.node.push(self.node()?);
        }
        self.punctuation('}')?;
        Ok(graph)
    }

    fn value_info(&mut self) -> Parsed<ValueInfoProto> {
        let kind = self.kind()?;
        Ok(ValueInfoProto { name: Some(self.name()?), r#type: Some(kind), ..ValueInfoProto::default() })
    }

    /// The type of a value: a tensor, or a sequence or an option of such.
    fn kind(&mut self) -> Parsed<TypeProto> {
        use type_proto::Value;
        let word = self.word()?;
        let of = |value| TypeProto { value: Some(value), ..TypeProto::default() };
        if word == "seq" || word == "optional" {
            self.punctuation('(')?;
            let elem_type = Some(Box::new(self.kind()?));
            self.punctuation(')')?;
            return Ok(if word == "seq" {
                of(Value::SequenceType(Box::new(type_proto::Sequence { elem_type })))
            } else {
                TypeProto { optional_type: Some(Box::new(type_proto::Optional { elem_type })), ..TypeProto::default() }
            });
        }
        let Some(dtype) = DType::from_str_name(&word.to_uppercase()) else { return self.wrong("a type before this,") };
        let dims = if self.is_at('[') {
            let dims = self.list('[', ']', Self::dim)?;
            // Empty brackets are an unknown rank; no brackets are a scalar.
            if dims.is_empty() { None } else { Some(dims) }
        } else {
            Some(Vec::new())
        };
        let shape = dims.map(|dim| TensorShapeProto { dim });
        Ok(of(Value::TensorType(type_proto::Tensor { elem_type: Some(dtype as i32), shape })))
    }

    fn dim(&mut self) -> Parsed<Dimension> {
        let value = match self.lexer.peek() {
            Token::Number(_) => Some(dimension::Value::DimValue(self.integer()?)),
            Token::Punctuation('?') => {
                self.lexer.next();
                None
            }
            _ => Some(dimension::Value::DimParam(self.name()?)),
        };
        Ok(Dimension { value, ..Dimension::default() })
    }

    fn node(&mut self) -> Parsed<NodeProto> {
        let mut node = NodeProto::default();
        if self.is_at('[') {
            node.name = self.list('[', ']', Self::name)?.pop();
        }
        loop {
            node.output.push(self.optional_name()?);
            if !self.accept(&Token::Punctuation(',')) {
                break;
            }
        }
        self.punctuation('=')?;
        let mut op = self.word()?;
        while self.accept(&Token::Punctuation('.')) {
            op = format!("{op}.{}", self.word()?);
        }
        let (domain, op_type) = op.rsplit_once('.').map_or((None, op.as_str()), |(domain, op)| (Some(domain), op));
        (node.domain, node.op_type) = (domain.map(str::to_owned), Some(op_type.to_owned()));
        if self.is_at('<') {
            node.attribute = self.list('<', '>', Self::attribute)?;
        }
        node.input = self.list('(', ')', Self::optional_name)?;
        if self.is_at('<') {
            node.attribute.extend(self.list('<', '>', Self::attribute)?);
        }
        Ok(node)
    }

    fn attribute(&mut self) -> Parsed<AttributeProto> {
        let mut attribute = AttributeProto { name: Some(self.word()?), ..AttributeProto::default() };
        if self.accept(&Token::Punctuation(':')) {
            let kind = self.word()?;
            let Some(kind) = AttributeType::from_str_name(&kind.to_uppercase()) else {
                return self.wrong("a type of attribute before this,");
            };
            attribute.r#type = Some(kind as i32);
        }
        self.punctuation('=')?;
        if self.is_at('[') {
            self.attribute_list(&mut attribute)?;
            return Ok(attribute);
        }
        let kind = match self.lexer.peek().clone() {
            Token::Text(text) => {
                self.lexer.next();
                attribute.s = Some(text.into_bytes().into());
                AttributeType::String
            }
            Token::Number(number) if is_float(&number) || attribute.r#type == Some(AttributeType::Float as i32) => {
                self.lexer.next();
                attribute.f = number.parse().ok();
                AttributeType::Float
            }
            Token::Number(_) => {
                attribute.i = Some(self.integer()?);
                AttributeType::Int
            }
            Token::Word(word) if DType::from_str_name(&word.to_uppercase()).is_some() => {
                let kind = self.kind()?;
                self.accept(&Token::Punctuation('='));
                attribute.t = Some(self.data(&kind)?);
                AttributeType::Tensor
            }
            _ => {
                attribute.g = Some(self.graph()?);
                AttributeType::Graph
            }
        };
        attribute.r#type = Some(kind as i32);
        Ok(attribute)
    }

    fn attribute_list(&mut self, attribute: &mut AttributeProto) -> Parsed<()> {
        let items = self.list('[', ']', |parser| {
            let token = parser.lexer.peek().clone();
            match token {
                Token::Text(_) | Token::Number(_) => {
                    parser.lexer.next();
                    Ok(token)
                }
                _ => parser.wrong("a number or a quoted text"),
            }
        })?;
        let floats = attribute.r#type == Some(AttributeType::Floats as i32)
            || items.iter().any(|item| matches!(item, Token::Number(number) if is_float(number)));
        for item in &items {
            match item {
                Token::Text(text) => attribute.strings.push(text.clone().into_bytes().into()),
                Token::Number(number) if floats => attribute.floats.push(number.parse().unwrap_or(f32::NAN)),
                Token::Number(number) => attribute.ints.push(number.parse().unwrap_or_default()),
                _ => {}
            }
        }
        let kind = match items.first() {
            None if attribute.r#type.is_none() => return self.wrong("a type for the empty list before this,"),
            None => return Ok(()),
            Some(Token::Text(_)) => AttributeType::Strings,
            Some(_) if floats => AttributeType::Floats,
            Some(_) => AttributeType::Ints,
        };
        attribute.r#type = Some(kind as i32);
        Ok(())
    }
}

fn is_float(number: &str) -> bool {
    number.parse::<i64>().is_err()
}
