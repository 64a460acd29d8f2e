//! What a `postgresql.conf` says of one setting, for where no server can be asked.

/// The value that counts in this file: that of the last line that sets it. Files that it includes aren't looked into, and
/// what the server would refuse as a whole isn't refused here. Bytes, because a path may be in any encoding.
///
/// Source: `guc-file.l`. A name is the line's first word, in either case; the `=` after it may be missing; a value is in
/// quotes, or a word; `#` begins a comment.
pub fn setting(file: &[u8], name: &str) -> Option<Vec<u8>> {
    file.split(|byte| *byte == b'\n').filter_map(|line| value(line, name)).next_back()
}

fn value(line: &[u8], name: &str) -> Option<Vec<u8>> {
    let line = line.trim_ascii_start();
    let (first, rest) = line.split_at(line.iter().take_while(|byte| is_letter_or_digit(**byte)).count());
    if !first.eq_ignore_ascii_case(name.as_bytes()) {
        return None;
    }
    // A dot would make it an extension's setting, of another name.
    let value = match rest.trim_ascii_start() {
        [b'=', value @ ..] => value.trim_ascii_start(),
        value if value.len() < rest.len() || value.starts_with(b"'") => value,
        _ => return None,
    };
    match value {
        [b'\'', quoted @ ..] => unquoted(quoted),
        word => {
            let is_part = |byte: &&u8| is_letter_or_digit(**byte) || b"-._:/".contains(byte);
            let word: Vec<u8> = word.iter().take_while(is_part).copied().collect();
            (!word.is_empty()).then_some(word)
        }
    }
}

/// Source: `LETTER_OR_DIGIT`, and the dot of a qualified name left out.
fn is_letter_or_digit(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}

/// What is within the quotes; `None` if they don't end. Source: `DeescapeQuotedString`.
fn unquoted(text: &[u8]) -> Option<Vec<u8>> {
    let mut value = Vec::with_capacity(text.len());
    let mut bytes = text.iter().copied().peekable();
    loop {
        match bytes.next()? {
            b'\'' if bytes.peek() == Some(&b'\'') => {
                bytes.next();
                value.push(b'\'');
            }
            b'\'' => return Some(value),
            b'\\' => value.push(match bytes.next()? {
                b'b' => 0x08,
                b'f' => 0x0c,
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                digit @ b'0'..=b'7' => {
                    let mut code = digit - b'0';
                    for _ in 0..2 {
                        let Some(digit) = bytes.next_if(|byte| (b'0'..=b'7').contains(byte)) else { break };
                        // As in C, what doesn't fit into a byte is cut off.
                        code = (code << 3) | (digit - b'0');
                    }
                    code
                }
                other => other,
            }),
            other => value.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn said(file: &str) -> Option<String> {
        setting(file.as_bytes(), "ssl_key_file").map(|value| String::from_utf8(value).unwrap())
    }

    #[test]
    fn a_setting_is_read_as_the_server_reads_it() {
        for (file, value) in [
            ("ssl_key_file = 'server.key'", "server.key"),
            ("  SSL_Key_File='a.key'# ours\r\nssl = on", "a.key"),
            ("ssl_key_file a.key", "a.key"),
            ("ssl_key_file\t= tls/a-b_c.key # /x", "tls/a-b_c.key"),
            ("ssl_key_file 'a b''s.key'", "a b's.key"),
            (r"ssl_key_file = 'a\'b\\c\101\60\n'", "a'b\\cA0\n"),
            ("ssl_key_file = 'first'\n#ssl_key_file = 'third'\nssl_key_file = 'second'\nport = 1", "second"),
            ("ssl_key_file = ''", ""),
        ] {
            assert_eq!(said(file).as_deref(), Some(value), "{file}");
        }
        for file in [
            "",
            "# ssl_key_file = 'a'",
            "my.ssl_key_file = 'a'",
            "ssl_key_file.my = 'a'",
            "ssl_key_files = 'a'",
            "ssl_key_file",
            "ssl_key_file =",
            "ssl_key_file = 'a",
            "ssl_key_file = 'a\n'",
            "ssl_cert_file = 'ssl_key_file'",
        ] {
            assert_eq!(said(file), None, "{file}");
        }
    }

    proptest! {
        #[test]
        fn what_is_quoted_comes_back(value in "[^\n\0]{0,20}") {
            let file = format!("ssl_key_file = '{}'\n", value.replace('\\', "\\\\").replace('\'', "''"));
            prop_assert_eq!(said(&file), Some(value));
        }

        #[test]
        fn no_file_is_too_strange(file in proptest::collection::vec(prop_oneof![Just(b'\''), Just(b'\\'), any::<u8>()], 0..60)) {
            let file = [b"ssl_key_file=".as_slice(), &file].concat();
            if let Some(value) = setting(&file, "ssl_key_file") {
                prop_assert!(value.len() < file.len());
            }
        }
    }
}
