//! The daemon's error body, `{"error":{"code":"…","message":"…","hint":"…"}}`.
//!
//! Not a JSON parser: it finds these three strings, takes anything else for nothing, and never fails.

use std::{iter::Peekable, slice::Iter};

/// What the body says; what it doesn't say, or not as a string, is absent.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct ErrorBody {
    /// For programs: stable.
    pub code: Option<String>,
    /// For people: what happened.
    pub message: Option<String>,
    /// For people: what to do about it.
    pub hint: Option<String>,
}

type Bytes<'a> = Peekable<Iter<'a, u8>>;

impl ErrorBody {
    /// Reads a body. Only strings directly in the object `error` of an outermost object count.
    pub fn parse(body: &[u8]) -> ErrorBody {
        let mut found = ErrorBody::default();
        let mut bytes = body.trim_ascii_start().iter().peekable();
        if bytes.peek() != Some(&&b'{') {
            return found;
        }
        // How many objects and arrays are open, whether the second of them is `error`, and the last key.
        let mut depth = 0_usize;
        let mut in_error = false;
        let mut key: Option<String> = None;
        while let Some(&byte) = bytes.next() {
            match byte {
                b'{' | b'[' => {
                    depth += 1;
                    if depth == 2 {
                        in_error = byte == b'{' && key.as_deref() == Some("error");
                    }
                    key = None;
                }
                b'}' | b']' => {
                    depth = depth.saturating_sub(1);
                    in_error &= depth >= 2;
                    key = None;
                }
                b',' => key = None,
                b'"' => {
                    let Some(text) = string(&mut bytes) else { break };
                    while bytes.next_if(|b| b.is_ascii_whitespace()).is_some() {}
                    if bytes.next_if(|b| **b == b':').is_some() {
                        key = Some(text);
                    } else if in_error && depth == 2 {
                        found.set(key.take().as_deref(), text);
                    }
                }
                _ => {}
            }
        }
        found
    }

    fn set(&mut self, key: Option<&str>, text: String) {
        let field = match key {
            Some("code") => &mut self.code,
            Some("message") => &mut self.message,
            Some("hint") => &mut self.hint,
            _ => return,
        };
        field.get_or_insert(text);
    }
}

/// The rest of a string after its opening quote; `None` if it doesn't end.
fn string(bytes: &mut Bytes<'_>) -> Option<String> {
    let mut text = Vec::new();
    loop {
        let escaped = match *bytes.next()? {
            b'"' => return Some(String::from_utf8_lossy(&text).into_owned()),
            b'\\' => match *bytes.next()? {
                b'n' => '\n',
                b't' => '\t',
                b'r' => '\r',
                b'b' => '\u{8}',
                b'f' => '\u{c}',
                b'u' => unicode_escape(bytes),
                other => {
                    text.push(other);
                    continue;
                }
            },
            other => {
                text.push(other);
                continue;
            }
        };
        text.extend_from_slice(escaped.encode_utf8(&mut [0; 4]).as_bytes());
    }
}

/// The rest of an escape after `\u`, and the second half of a surrogate pair.
fn unicode_escape(bytes: &mut Bytes<'_>) -> char {
    let first = hex4(bytes);
    if (0xD800..0xDC00).contains(&first) {
        let mut ahead = bytes.clone();
        if ahead.next() == Some(&b'\\') && ahead.next() == Some(&b'u') {
            let second = hex4(&mut ahead);
            if (0xDC00..0xE000).contains(&second) {
                *bytes = ahead;
                let joined = 0x1_0000 + ((first - 0xD800) << 10) + (second - 0xDC00);
                return char::from_u32(joined).unwrap_or(char::REPLACEMENT_CHARACTER);
            }
        }
    }
    char::from_u32(first).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// Up to four hexadecimal digits.
fn hex4(bytes: &mut Bytes<'_>) -> u32 {
    let mut value = 0;
    for _ in 0..4 {
        let Some(digit) = bytes.peek().and_then(|b| char::from(**b).to_digit(16)) else { break };
        bytes.next();
        value = value << 4 | digit;
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(body: &str) -> Option<String> {
        ErrorBody::parse(body.as_bytes()).code
    }

    #[test]
    fn the_three_fields_are_found_in_any_order() {
        let body =
            br#" { "v": [1, {"code": "no"}], "error" : {"hint":"h\n\"\\\/x","n":null,"message":"m","code":"c"} } "#;
        let expected =
            ErrorBody { code: Some("c".to_owned()), message: Some("m".to_owned()), hint: Some("h\n\"\\/x".to_owned()) };
        assert_eq!(ErrorBody::parse(body), expected);
    }

    #[test]
    fn escapes_are_decoded() {
        assert_eq!(code(r#"{"error":{"code":"\u00e4\u20AC\ud83d\ude00\t"}}"#).unwrap(), "ä€😀\t");
        assert_eq!(code(r#"{"error":{"code":"\ud83dx\ude00\u12"}}"#).unwrap(), "\u{fffd}x\u{fffd}\u{12}");
        assert_eq!(ErrorBody::parse(b"{\"error\":{\"code\":\"\xff\"}}").code.unwrap(), "\u{fffd}");
    }

    #[test]
    fn a_code_elsewhere_does_not_count() {
        for body in [
            r#"{"code":"c"}"#,
            r#"{"error":"code","code":"c"}"#,
            r#"{"error":["code","c"]}"#,
            r#"{"error":{"inner":{"code":"c"}}}"#,
            r#"{"error":{}, "other":{"code":"c"}}"#,
            r#"{"error":{"code":["c"]}}"#,
            r#"{"error":{"code":null,"x":"c"}}"#,
            r#"{"error":{"code":5}}"#,
            r#"{"error":{"code":"c"#,
            r#"[{"error":{"code":"c"}}]"#,
            r#"<pre>{"error":{"code":"c"}}</pre>"#,
            "",
        ] {
            assert_eq!(code(body), None, "{body}");
        }
    }

    #[test]
    fn garbage_is_survived() {
        let seeds: [&[u8]; 2] = [
            br#"{"error":{"code":"not_in_archive","message":"a \"b\" \\ \u00e4\ud83d\ude00","hint":"x\ny"}}"#,
            br#"{"a":[[[{}]]],"error":{"x":{"y":1},"message":"m","code":null}}"#,
        ];
        let alphabet = b"{}[]\",:\\u0dD8cC\x00\xff n";
        // A linear congruential generator (Knuth's MMIX constants); its high bits are the random ones.
        let mut state = 0x5eed_u64;
        let mut below = |limit: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 33).unwrap() % limit
        };
        for round in 0..20_000 {
            let mut body = seeds[round % 2].to_vec();
            for _ in 0..=below(6) {
                let at = below(body.len());
                match below(4) {
                    0 => body[at] = alphabet[below(alphabet.len())],
                    1 => body.insert(at, alphabet[below(alphabet.len())]),
                    2 if body.len() > 1 => drop(body.remove(at)),
                    _ => body.truncate(at.max(1)),
                }
            }
            let parsed = ErrorBody::parse(&body);
            let text = [parsed.code, parsed.message, parsed.hint];
            // An escape is never shorter than what it stands for, but a broken byte becomes U+FFFD.
            assert!(text.iter().flatten().map(String::len).sum::<usize>() <= body.len() * 3);
        }
    }
}
