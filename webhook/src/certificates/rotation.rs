//! When a CA is made, published, used and removed. Pure: what the Secret and the webhook configuration hold, and the
//! time, tell the next step.
//!
//! 1. A CA is **made** and written to the Secret. Of two replicas that do so at a time, the Secret's resourceVersion
//!    lets one through.
//! 2. It is **published**: the `caBundle` of the webhook configuration gets it, beside those that are there. When it
//!    has been seen there, the time is noted in the Secret.
//! 3. After [`Periods::propagation`] every API server has noticed, and it **signs**: all replicas get a new leaf from it.
//! 4. When every leaf of the older ones must have expired, those are **removed**, from the Secret, then the bundle.
//!
//! Replicas don't talk to each other. Both take these steps, whoever comes first, and each step is one that both
//! would take: the bundle follows from the Secret alone. A replica that sleeps through step 3, or can't reach the API
//! server, serves its old leaf for as long as that is valid, and until then the bundle has its CA.
//!
//! Where the Secret is lost, [`adopted`] begins the new one: what the bundle trusts and what signed the leaf in use stay
//! trusted, so that losing both at once interrupts nothing for longer than it takes to notice.

use jiff::{SignedDuration, Timestamp};

use super::x509::Validity;

/// How long things last.
#[derive(Clone, Copy, Debug)]
pub struct Periods {
    /// A CA. The next one is made when two thirds of it are over.
    pub authority: SignedDuration,
    /// A leaf. It is renewed when half of it is over.
    pub leaf: SignedDuration,
    /// How long a CA is published before it signs: API servers watch the configuration and notice within seconds, but
    /// one may be cut off from etcd for a while.
    pub propagation: SignedDuration,
    /// By how much clocks may differ, and a step come late.
    pub margin: SignedDuration,
    /// How much earlier than now a certificate begins to be valid, for clients whose clocks are behind.
    pub backdate: SignedDuration,
}

impl Default for Periods {
    /// A year for a CA: nobody has to trust it by hand, so it could be less, but each rotation is a risk, however small.
    /// A week for a leaf, renewed after half: three days are enough to notice that renewing fails, and a leaf's life is
    /// what an old CA has to stay for.
    fn default() -> Periods {
        Periods {
            authority: SignedDuration::from_hours(365 * 24),
            leaf: SignedDuration::from_hours(7 * 24),
            propagation: SignedDuration::from_mins(10),
            margin: SignedDuration::from_hours(1),
            backdate: SignedDuration::from_mins(10),
        }
    }
}

/// A CA, as the Secret has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    /// Its certificate, in PEM.
    pub certificate: String,
    /// Its key, in PEM. `None` for one that was found in the bundle when the Secret was empty: it's kept for the leaves
    /// that are in use, and can't sign.
    pub key: Option<String>,
    /// From when to when its certificate is valid.
    pub validity: Validity,
    /// Since when it has been in the bundle.
    pub published: Option<Timestamp>,
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make a CA and add it to the Secret.
    Make,
    /// Take this many of the oldest out of the Secret.
    Remove(usize),
    /// Set the `caBundle` to this.
    Publish(String),
    /// Note in the Secret, of those that don't have it, that they are published by now.
    Note,
    /// Nothing, for now.
    Rest,
}

/// What the `caBundle` has to be.
pub fn bundle(authorities: &[Authority]) -> String {
    authorities.iter().map(|authority| authority.certificate.as_str()).collect()
}

/// The next step. `authorities` is what the Secret has, the oldest first; `seen` is the `caBundle` as it is.
pub fn next(authorities: &[Authority], seen: &str, now: Timestamp, periods: &Periods) -> Step {
    let newest = authorities.iter().rev().find(|authority| authority.key.is_some());
    if newest.is_none_or(|newest| newest.is_old(now)) {
        return Step::Make;
    }
    // Whatever was signed by an older one was signed before the newer one took over everywhere.
    let all_leaves_gone = periods.propagation + periods.leaf + periods.margin;
    let superseded = authorities.iter().rposition(|authority| authority.published_for(all_leaves_gone, now));
    let expired =
        authorities.iter().take_while(|authority| authority.validity.not_after + periods.margin <= now).count();
    let removed = superseded.unwrap_or(0).max(expired);
    if removed > 0 {
        return Step::Remove(removed);
    }
    let wanted = bundle(authorities);
    if seen != wanted {
        return Step::Publish(wanted);
    }
    if authorities.iter().any(|authority| authority.publication_is_unknown(now, periods)) {
        return Step::Note;
    }
    Step::Rest
}

/// Who signs a leaf now, if anybody does. `served`: there is a leaf [of use](Leaf::serves), so there's time.
///
/// It is the newest CA that every API server has noticed. Where there's no leaf and no such CA, as at the very
/// first start, one that is in the bundle will do. `seen` is `None` where there is no webhook configuration: then nobody
/// trusts anything and nobody asks, and any will do, so that replicas are ready when there is one.
pub fn signer<'a>(
    authorities: &'a [Authority],
    seen: Option<&str>,
    served: bool,
    now: Timestamp,
    periods: &Periods,
) -> Option<&'a Authority> {
    let able = || {
        authorities.iter().rev().filter(|authority| {
            let trusted = seen.is_none_or(|seen| seen.contains(&authority.certificate));
            authority.key.is_some() && authority.validity.holds_at(now) && trusted
        })
    };
    able()
        .find(|authority| authority.published_for(periods.propagation, now))
        .or_else(|| able().find(|authority| !served && (seen.is_none() || authority.published.is_some())))
}

/// What an empty Secret begins with: CAs without keys, those of the bundle and that of the leaf in use, if it's valid.
/// `read` reads the CAs from a bundle. `most` of them, the last ones, are kept.
pub fn adopted(
    seen: &str,
    leaf: Option<&Leaf>,
    now: Timestamp,
    most: usize,
    read: impl Fn(&str) -> Vec<Authority>,
) -> Vec<Authority> {
    let mut adopted = read(seen);
    for own in leaf.filter(|leaf| leaf.validity.holds_at(now)).map(|leaf| read(&leaf.authority)).unwrap_or_default() {
        if !adopted.iter().any(|authority| authority.certificate == own.certificate) {
            adopted.push(own);
        }
    }
    adopted.drain(..adopted.len().saturating_sub(most));
    adopted
}

/// A leaf that is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The certificate of the CA that signed it.
    pub authority: String,
    /// From when to when it is valid.
    pub validity: Validity,
}

impl Leaf {
    /// Whether it is of use: valid, and its CA is trusted, or will be as soon as the bundle has been mended.
    pub fn serves(&self, authorities: &[Authority], seen: &str, now: Timestamp) -> bool {
        let known = || authorities.iter().any(|authority| authority.certificate == self.authority);
        self.validity.holds_at(now) && (self.is_trusted(seen) || known())
    }

    /// Whether the `caBundle` has its CA.
    pub fn is_trusted(&self, seen: &str) -> bool {
        seen.contains(&self.authority)
    }

    /// Whether another one is to be had from `signer`.
    pub fn is_due(&self, signer: &Authority, now: Timestamp) -> bool {
        self.authority != signer.certificate || now >= part(&self.validity, 1, 2)
    }
}

impl Authority {
    /// Whether the next one is due.
    fn is_old(&self, now: Timestamp) -> bool {
        now >= part(&self.validity, 2, 3)
    }

    fn published_for(&self, period: SignedDuration, now: Timestamp) -> bool {
        self.published.is_some_and(|at| now.duration_since(at) >= period)
    }

    /// Not noted yet; or noted for a time that is yet to come, by a clock that was wrong.
    fn publication_is_unknown(&self, now: Timestamp, periods: &Periods) -> bool {
        self.published.is_none_or(|at| at.duration_since(now) > periods.margin)
    }

    /// Notes that it is published, unless that is known.
    pub fn note_published(&mut self, now: Timestamp, periods: &Periods) {
        if self.publication_is_unknown(now, periods) {
            self.published = Some(now);
        }
    }
}

/// When a part of the time is over.
fn part(validity: &Validity, over: i32, of: i32) -> Timestamp {
    validity.not_before + validity.not_after.duration_since(validity.not_before) * over / of
}

#[cfg(test)]
mod tests;
