//! SQL as a script: where a statement ends, as psql sees it, and what it's made of.
//!
//! Values span lines, and can look like statements: who decides about a script line by line decides about parts of values.
//! The rules are those of PostgreSQL's `psqlscan.l` with `standard_conforming_strings = on`. What versions read differently
//! becomes [`Token::Odd`], for whoever relies on the boundaries to refuse.

/// A part of a statement. Comments and blanks are none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Token<'a> {
    /// A key word, a name without quotes, or digits.
    Word(&'a str),
    /// A name in double quotes, with them.
    Quoted(&'a str),
    /// A text in quotes or between dollars, with them.
    Text(&'a str),
    /// A character that is none of the others: `;`, `,`, `(`, …
    Symbol(char),
    /// A command of psql's, from its backslash to the end of the line. It's a statement of its own.
    Command(&'a str),
    /// What isn't SQL, isn't closed, or is read differently by versions of PostgreSQL.
    Odd(&'a str),
}

impl Token<'_> {
    /// Whether it's this key word, in upper or lower case.
    pub fn is(&self, word: &str) -> bool {
        matches!(self, Token::Word(text) if text.eq_ignore_ascii_case(word))
    }

    /// The name that it is: in lower case if it isn't quoted. `None` if it's no name.
    pub fn name(&self) -> Option<String> {
        match self {
            Token::Word(text) if !text.starts_with(|c: char| c.is_ascii_digit()) => Some(text.to_ascii_lowercase()),
            Token::Quoted(text) => Some(text.get(1..text.len().checked_sub(1)?)?.replace("\"\"", "\"")),
            _ => None,
        }
    }
}

/// A statement of a script.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Statement<'a> {
    /// All of it, with what stands before it (comments, blanks) and its semicolon.
    pub text: &'a str,
    /// What it's made of, with its semicolon. None: it's comments and blanks, to the end of the script.
    pub tokens: Vec<Token<'a>>,
}

impl Statement<'_> {
    /// Whether it's whole, and every version of PostgreSQL reads it so.
    pub fn is_sound(&self) -> bool {
        let ends = matches!(self.tokens.last(), None | Some(Token::Symbol(';') | Token::Command(_)));
        let is_odd = |token: &Token| matches!(token, Token::Odd(_));
        // Two texts with a line end between them are one, of the first one's kind.
        let is_continued = |pair: &[Token]| matches!(pair, [Token::Text(_), Token::Text(_)]);
        let count = |symbol| self.tokens.iter().filter(|token| **token == Token::Symbol(symbol)).count();
        let is_closed = count('(') == count(')');
        ends && is_closed && !self.tokens.iter().any(is_odd) && !self.tokens.windows(2).any(is_continued)
    }
}

/// The statements of a script. Their texts in a row are the script.
pub fn statements(sql: &str) -> Vec<Statement<'_>> {
    let mut statements = Vec::new();
    let (mut begin, mut at, mut depth) = (0, 0, 0_u32);
    let mut tokens = Vec::new();
    while at < sql.len() {
        let (length, token) = next(&sql[at..], tokens.is_empty());
        at += length;
        let Some(token) = token else { continue };
        tokens.push(token);
        match token {
            Token::Symbol('(') => depth += 1,
            Token::Symbol(')') => depth = depth.saturating_sub(1),
            // As psql does it: a rule's or a function's body may have semicolons.
            Token::Symbol(';') if depth > 0 => {}
            Token::Symbol(';') | Token::Command(_) => {
                statements.push(Statement { text: &sql[begin..at], tokens: std::mem::take(&mut tokens) });
                (begin, depth) = (at, 0);
            }
            _ => {}
        }
    }
    if begin < sql.len() {
        statements.push(Statement { text: &sql[begin..], tokens });
    }
    statements
}

/// How long what comes next is, at least a character, and the token that it is, if it's one.
fn next<'a>(rest: &'a str, is_first: bool) -> (usize, Option<Token<'a>>) {
    let Some(first) = rest.chars().next() else { return (0, None) };
    let until_line_end = rest.find(['\n', '\r']).unwrap_or(rest.len());
    let closed = |length: Option<usize>, token: fn(&'a str) -> Token<'a>| match length {
        Some(length) => (length, Some(token(&rest[..length]))),
        None => (rest.len(), Some(Token::Odd(rest))),
    };
    match first {
        ' ' | '\t' | '\n' | '\r' | '\x0c' => (1, None),
        '-' if rest.starts_with("--") => (until_line_end, None),
        '/' if rest.starts_with("/*") => match comment(rest) {
            Some(length) => (length, None),
            None => (rest.len(), Some(Token::Odd(rest))),
        },
        '\'' => closed(quoted(rest, 1, '\'', false), Token::Text),
        '"' => closed(quoted(rest, 1, '"', false), Token::Quoted),
        'e' | 'E' if rest[1..].starts_with('\'') => closed(quoted(rest, 2, '\'', true), Token::Text),
        '$' => match dollar_tag(rest) {
            Some(tag) => closed(rest[tag.len()..].find(tag).map(|found| found + 2 * tag.len()), Token::Text),
            None => (1, Some(Token::Odd(&rest[..1]))),
        },
        '\\' if is_first => {
            // The line end is the command's: without it, what follows would be.
            let length = rest.find('\n').map_or(rest.len(), |end| end + 1);
            (length, Some(Token::Command(rest[..length].trim_end_matches('\n'))))
        }
        '0'..='9' => {
            let length = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            // Some versions read 1E'…' as a number and a text with escapes, others not.
            let goes_on = rest[length..].starts_with(|c| is_name_start(c) || c == '$');
            let token = if goes_on { Token::Odd } else { Token::Word };
            (length, Some(token(&rest[..length])))
        }
        _ if is_name_start(first) => {
            let is_part = |c: char| is_name_start(c) || c.is_ascii_digit() || c == '$';
            let length = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
            (length, Some(Token::Word(&rest[..length])))
        }
        '\\' | '\0'..='\x1f' | '\x7f' => (1, Some(Token::Odd(&rest[..1]))),
        _ => (1, Some(Token::Symbol(first))),
    }
}

fn is_name_start(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_' || !c.is_ascii()
}

/// The length of what is quoted, which begins behind `from`; two quotes are one, and don't end it.
fn quoted(rest: &str, from: usize, quote: char, has_escapes: bool) -> Option<usize> {
    let mut characters = rest[from..].char_indices().peekable();
    while let Some((at, c)) = characters.next() {
        if c == '\\' && has_escapes {
            characters.next();
        } else if c == quote && characters.next_if(|(_, next)| *next == quote).is_none() {
            return Some(from + at + 1);
        }
    }
    None
}

/// The length of a comment; such comments nest.
fn comment(rest: &str) -> Option<usize> {
    let (mut at, mut depth) = (0, 0_u32);
    let bytes = rest.as_bytes();
    while at + 1 < bytes.len() {
        match &bytes[at..at + 2] {
            b"/*" => (at, depth) = (at + 2, depth + 1),
            b"*/" => (at, depth) = (at + 2, depth - 1),
            _ => at += 1,
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

/// `$tag$` or `$$` at the beginning.
fn dollar_tag(rest: &str) -> Option<&str> {
    let end = 1 + rest[1..].find('$')?;
    let tag = &rest[1..end];
    let is_part = |c: char| is_name_start(c) || c.is_ascii_digit();
    (tag.chars().all(is_part) && !tag.starts_with(|c: char| c.is_ascii_digit())).then_some(&rest[..=end])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The statements without what stands before them.
    fn split(sql: &str) -> Vec<&str> {
        statements(sql).into_iter().map(|statement| statement.text.trim()).filter(|text| !text.is_empty()).collect()
    }

    #[test]
    fn a_value_that_looks_like_statements_is_a_value() {
        for attack in [
            "ALTER ROLE me SET search_path TO '\"x\nCREATE ROLE evil SUPERUSER LOGIN;\n--\"';",
            "ALTER ROLE me SET x TO E'it\\'s\nCREATE ROLE evil;\n''';",
            "COMMENT ON ROLE me IS 'a\\';",
            "COMMENT ON ROLE \"a;\nCREATE ROLE evil;\" IS 'x';",
            "DO $a$ $b$; $$ ' $a$;",
            "SELECT /* ; /* ' */ ; */ 1;",
            "CREATE RULE r AS ON INSERT TO t DO (SELECT 1; SELECT 2);",
            "SELECT nameE'\\';",
            "SELECT a$b$;",
        ] {
            let two = format!("{attack}\nSELECT 2;");
            assert_eq!(split(&two), [attack, "SELECT 2;"]);
            assert!(statements(&two).iter().all(Statement::is_sound), "{attack}");
        }
        // A comment ends at either line end; a command of psql's is a statement.
        assert_eq!(split("-- a\rSELECT 1;"), ["-- a\rSELECT 1;"]);
        assert_eq!(statements("-- a;\rSELECT 1;")[0].tokens.len(), 3);
        assert_eq!(split("\\restrict ab\nSELECT 1;"), ["\\restrict ab", "SELECT 1;"]);
        assert_eq!(split("\\restrict ab\rSELECT 1;\n"), ["\\restrict ab\rSELECT 1;"]);
        assert_eq!(statements("\\restrict ab\nSELECT 1;")[1].text, "SELECT 1;");
    }

    #[test]
    fn what_is_open_or_read_differently_isn_t_sound() {
        for odd in [
            "SELECT 'a",
            "SELECT \"a;",
            "SELECT $a$;",
            "SELECT /* ;",
            "SELECT 1",
            "SELECT 1 \\! sh\n;",
            "SELECT 1E'\\';",
            "SELECT E'a'\n'\\';",
            "SELECT (1;",
            "SELECT $1;",
            "SELECT \x0b1;",
        ] {
            assert!(!statements(odd).iter().all(Statement::is_sound), "{odd}");
        }
        assert!(statements("SELECT 'a', 'b';\n-- end\n").iter().all(Statement::is_sound));
    }

    #[test]
    fn names_are_what_the_server_takes_them_for() {
        let named = |sql| statements(sql)[0].tokens[0].name();
        assert_eq!(named("Shop;"), Some("shop".to_owned()));
        assert_eq!(named("\"Shop's \"\"x\"\"\";"), Some("Shop's \"x\"".to_owned()));
        assert_eq!((named("'shop';"), named("1;")), (None, None));
    }

    proptest! {
        #[test]
        fn the_statements_in_a_row_are_the_script(sql in "([-'\"$\\\\;/*()\nEeaü1 ]|\\PC){0,60}") {
            let all = statements(&sql);
            let texts: String = all.iter().map(|statement| statement.text).collect();
            prop_assert_eq!(texts, sql);
        }

        #[test]
        fn no_value_gets_out_of_its_quotes(value in "([-'\"$\\\\;/*()\n\rEea ]|\\PC){0,60}") {
            let plain = format!("ALTER ROLE me SET x TO '{}';", value.replace('\'', "''"));
            let escaped = format!("ALTER ROLE me SET x TO E'{}';", value.replace('\\', "\\\\").replace('\'', "''"));
            for sql in [plain, escaped] {
                let all = statements(&sql);
                prop_assert!(all.len() == 1 && all[0].tokens.len() == 8 && all[0].is_sound());
            }
        }
    }
}
