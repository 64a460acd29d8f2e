//! References of images, by the grammar of the distribution project.
//!
//! <https://github.com/distribution/reference/blob/main/reference.go>

/// The longest name, in bytes.
const LONGEST_NAME: usize = 255;

/// Whether a container's `image` may be this: `[REGISTRY/]PATH[:TAG][@DIGEST]`.
pub(super) fn is_image(text: &str) -> bool {
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (text, None),
    };
    // A colon before a slash is that of a registry's port.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    name.len() <= LONGEST_NAME && is_name(name) && tag.is_none_or(is_tag) && digest.is_none_or(is_digest)
}

fn is_name(name: &str) -> bool {
    let path = match name.split_once('/') {
        Some((registry, path)) if registry == "localhost" || registry.contains(['.', ':']) => {
            if !is_registry(registry) {
                return false;
            }
            path
        }
        _ => name,
    };
    path.split('/').all(is_component)
}

/// A host with or without a port.
fn is_registry(registry: &str) -> bool {
    let (host, port) = match registry.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (registry, None),
    };
    let label = |label: &str| {
        let plain = label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        !label.is_empty() && plain && !label.starts_with('-') && !label.ends_with('-')
    };
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let is_host = match address {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.split('.').all(label),
    };
    is_host && port.is_none_or(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
}

/// Lower-case letters and digits, with a dot, one or two underscores, or any number of dashes between.
fn is_component(component: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let separators = component.split(|c: char| c.is_ascii() && inner(c as u8)).filter(|part| !part.is_empty());
    let mut bytes = component.bytes();
    let first = bytes.next().is_some_and(inner);
    let last = component.bytes().last().is_some_and(inner);
    first
        && last
        && separators.into_iter().all(|part| [".", "_", "__"].contains(&part) || part.bytes().all(|b| b == b'-'))
}

fn is_tag(tag: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    (1..=128).contains(&tag.len()) && tag.bytes().all(inner) && !tag.starts_with(['.', '-'])
}

/// The algorithms that registries take, each with as many digits as it has.
fn is_digest(digest: &str) -> bool {
    let hex = |digits: &str| digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    match digest.split_once(':') {
        Some(("sha256", digits)) => digits.len() == 64 && hex(digits),
        Some(("sha512", digits)) => digits.len() == 128 && hex(digits),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_told_from_what_is_none() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        for image in [
            "pgsidecar".to_owned(),
            "pgsidecar:0.1.0".into(),
            "team/pg-sidecar__x.y:v1_A-".into(),
            "localhost/pgsidecar".into(),
            "registry.example.com:5000/a/b/pgsidecar:1".into(),
            "Registry.example.com/pgsidecar".into(),
            "[::1]:5000/pgsidecar".into(),
            "10.0.0.1/pgsidecar".into(),
            format!("pgsidecar@{digest}"),
            format!("ghcr.io/team/pgsidecar:1@{digest}"),
        ] {
            assert!(is_image(&image), "{image}");
        }
        for image in [
            String::new(),
            "a:b:c//x@y@z".into(),
            "a//b".into(),
            "a:b:c".into(),
            "/pgsidecar".into(),
            "pgsidecar/".into(),
            "Team/pgsidecar".into(),
            "PgSidecar".into(),
            "pg sidecar".into(),
            "a..b".into(),
            "a___b".into(),
            "-a".into(),
            "ä".into(),
            "pgsidecar:".into(),
            "pgsidecar:.1".into(),
            "https://registry.example.com/pgsidecar".into(),
            "registry.example.com:x/pgsidecar".into(),
            "-registry.example.com/pgsidecar".into(),
            format!("pgsidecar:{}", "1".repeat(129)),
            "a".repeat(256),
            "pgsidecar@sha256:00".into(),
            format!("pgsidecar@md5:{}", "0".repeat(32)),
            format!("pgsidecar@{digest}@{digest}"),
        ] {
            assert!(!is_image(&image), "{image}");
        }
    }
}
