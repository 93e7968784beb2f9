//! Words, numbers and punctuation.

use std::fmt;

use super::SyntaxError;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Word(String),
    /// A quoted text, its quotes taken off.
    Text(String),
    Number(String),
    Punctuation(char),
    /// `=>`
    Arrow,
    End,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Word(text) | Self::Number(text) => write!(f, "`{text}`"),
            Self::Text(text) => write!(f, "\"{text}\""),
            Self::Punctuation(c) => write!(f, "`{c}`"),
            Self::Arrow => f.write_str("`=>`"),
            Self::End => f.write_str("the end"),
        }
    }
}

/// The tokens of a text, and a place among them.
pub(super) struct Lexer {
    tokens: Vec<(Token, usize)>,
    at: usize,
}

impl Lexer {
    pub(super) fn new(text: &str) -> Result<Self, SyntaxError> {
        let mut tokens = Vec::new();
        let mut last = 1;
        let lines = text.lines().zip(1..).filter(|(line, _)| !line.trim_start().starts_with('#'));
        for (line, number) in lines {
            last = number;
            let mut rest = line.trim_start();
            while let Some(c) = rest.chars().next() {
                let (token, len) = token(rest, c).map_err(|what| SyntaxError { line: number, what })?;
                tokens.push((token, number));
                rest = rest[len..].trim_start();
            }
        }
        tokens.push((Token::End, last));
        Ok(Self { tokens, at: 0 })
    }

    pub(super) fn peek(&self) -> &Token {
        &self.tokens[self.at].0
    }

    pub(super) fn line(&self) -> usize {
        self.tokens[self.at].1
    }

    /// Goes on to the next token; the last one stays.
    pub(super) fn next(&mut self) {
        self.at = (self.at + 1).min(self.tokens.len() - 1);
    }
}

/// The token that `text`, which begins with `c`, begins with, and its length in bytes.
fn token(text: &str, c: char) -> Result<(Token, usize), String> {
    let take = |is: fn(char) -> bool| text.find(|c| !is(c)).unwrap_or(text.len());
    if text.starts_with("=>") {
        return Ok((Token::Arrow, 2));
    }
    if c == '"' {
        return quoted(text);
    }
    let infinite = text.starts_with("-inf");
    if c.is_ascii_digit() || c == '-' && !infinite {
        let len = take(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '+'));
        return match text[..len].parse::<f64>() {
            Ok(_) => Ok((Token::Number(text[..len].to_owned()), len)),
            Err(_) => Err(format!("`{}` is no number", &text[..len])),
        };
    }
    if infinite {
        return Ok((Token::Number("-inf".to_owned()), "-inf".len()));
    }
    if c.is_ascii_alphabetic() || c == '_' {
        let len = take(|c| c.is_ascii_alphanumeric() || c == '_');
        return Ok(match &text[..len] {
            number @ ("inf" | "NaN") => (Token::Number(number.to_owned()), len),
            word => (Token::Word(word.to_owned()), len),
        });
    }
    Ok((Token::Punctuation(c), c.len_utf8()))
}

fn quoted(text: &str) -> Result<(Token, usize), String> {
    let mut out = String::new();
    let mut chars = text.char_indices().skip(1);
    while let Some((i, c)) = chars.next() {
        match c {
            '"' => return Ok((Token::Text(out), i + 1)),
            '\\' => match chars.next() {
                Some((_, 'n')) => out.push('\n'),
                Some((_, c)) => out.push(c),
                None => break,
            },
            c => out.push(c),
        }
    }
    Err("a quoted text does not end on its line".to_owned())
}
