//! A recovery target's time, as a person writes it.

use jiff::{Timestamp, civil::DateTime, tz::Offset};

/// Why a text is no recovery target.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetTimeError {
    /// Without a zone the server would take its own `timezone`, which nobody looks at in a hurry.
    #[error(
        "{0:?} has no time zone. Add one: \"{0}Z\" for UTC, or the offset of the clock that you read it from, \
         as in \"{0}+02:00\""
    )]
    NoZone(String),
    /// A zone by name. There is no time zone database here, and abbreviations mean several zones.
    #[error(
        "the time zone {zone:?} is not known here. Write its offset from UTC instead, as in \"{time}+02:00\", \
         or \"{time}Z\" for UTC"
    )]
    NamedZone {
        /// The zone as it was written.
        zone: String,
        /// What stood before it.
        time: String,
    },
    /// It isn't a date and a time that exist.
    #[error("{0:?} is not a time. Write it as \"2026-11-21 06:15:00Z\" or \"2026-11-21T06:15:00.25+02:00\"")]
    NotATime(String),
}

/// Parses a recovery target's time: `2026-11-21 06:15:00.25+02`, a date, `T` or a space, hours and minutes,
/// perhaps seconds and up to nine digits of their fraction, and a zone, which is required: `Z`, `UTC`, `GMT`
/// or an offset from UTC (`+02`, `+0200`, `+02:00`). What is finer than PostgreSQL's microseconds is cut.
///
/// # Errors
///
/// Anything else, with a text that shows how to write it.
pub fn parse_target_time(text: &str) -> Result<Timestamp, TargetTimeError> {
    let text = text.trim();
    let not_a_time = || TargetTimeError::NotATime(text.chars().take(80).collect());
    let (date, time_and_zone) = text.split_once(['T', 't', ' ']).ok_or_else(not_a_time)?;
    let time_and_zone = time_and_zone.trim_start();
    let end = time_and_zone.find(|c: char| !matches!(c, '0'..='9' | ':' | '.')).unwrap_or(time_and_zone.len());
    let (time, zone) = time_and_zone.split_at(end);
    let local = civil(date, time).ok_or_else(not_a_time)?;
    let offset = match zone.trim() {
        "" => return Err(TargetTimeError::NoZone(text.to_owned())),
        zone if ["Z", "UTC", "GMT"].iter().any(|utc| zone.eq_ignore_ascii_case(utc)) => Offset::UTC,
        zone if zone.starts_with(['+', '-']) => offset(zone).ok_or_else(not_a_time)?,
        zone => {
            let zone = zone.chars().take(40).collect();
            return Err(TargetTimeError::NamedZone { zone, time: format!("{date} {time}") });
        }
    };
    // Older than the first database there is only a mistake.
    let instant = offset.to_timestamp(local).ok().filter(|instant| *instant >= Timestamp::UNIX_EPOCH);
    instant.ok_or_else(not_a_time)
}

/// `2026-11-21` and `06:15`, `06:15:00` or `06:15:00.25`.
fn civil(date: &str, time: &str) -> Option<DateTime> {
    let mut date = date.split('-');
    let (year, month, day) = (digits(date.next()?, 4)?, digits(date.next()?, 2)?, digits(date.next()?, 2)?);
    let (clock, fraction) = match time.split_once('.') {
        Some((clock, fraction)) => (clock, Some(fraction)),
        None => (time, None),
    };
    let mut clock = clock.split(':');
    let (hour, minute) = (digits(clock.next()?, 2)?, digits(clock.next()?, 2)?);
    let (second, nanosecond) = match (clock.next(), fraction) {
        (None, None) => (0, 0),
        (None, Some(_)) => return None,
        (Some(second), fraction) => (digits(second, 2)?, fraction.map_or(Some(0), microseconds)? * 1000),
    };
    if date.next().is_some() || clock.next().is_some() {
        return None;
    }
    let small = |number: i32| i8::try_from(number).ok();
    let year = i16::try_from(year).ok()?;
    DateTime::new(year, small(month)?, small(day)?, small(hour)?, small(minute)?, small(second)?, nanosecond).ok()
}

/// `+02`, `+0200` or `+02:00`: east of Greenwich, as ISO 8601 and PostgreSQL's numeric zones have it.
fn offset(zone: &str) -> Option<Offset> {
    let (sign, rest) = zone.split_at_checked(1)?;
    let (hours, minutes) = match rest.split_once(':') {
        Some((hours, minutes)) => (hours, minutes),
        None => (rest.get(..2)?, rest.get(2..).filter(|minutes| !minutes.is_empty()).unwrap_or("00")),
    };
    let (hours, minutes) = (digits(hours, 2)?, digits(minutes, 2)?);
    // PostgreSQL's limit (MAX_TZDISP_HOUR).
    let seconds = (hours <= 15 && minutes < 60).then_some((hours * 60 + minutes) * 60)?;
    Offset::from_seconds(if sign == "-" { -seconds } else { seconds }).ok()
}

/// Exactly this many digits.
fn digits(text: &str, count: usize) -> Option<i32> {
    (text.len() == count && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok()).flatten()
}

/// A fraction of one to nine digits, in whole microseconds.
fn microseconds(fraction: &str) -> Option<i32> {
    let all_digits = (1..=9).contains(&fraction.len()) && fraction.bytes().all(|b| b.is_ascii_digit());
    all_digits.then(|| format!("{fraction:0<6}")).and_then(|padded| digits(padded.get(..6)?, 6))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_time_is_read_as_people_and_postgresql_write_it() {
        for text in [
            "2026-11-21 06:15:00Z",
            "2026-11-21T06:15:00Z",
            "2026-11-21t06:15z",
            " 2026-11-21  06:15:00 UTC ",
            "2026-11-21 06:15:00 gmt",
            "2026-11-21 06:15:00+00",
            "2026-11-21 08:15:00+02",
            "2026-11-21 08:15:00 +0200",
            "2026-11-21T08:15:00.000000999+02:00",
            "2026-11-20 22:45-07:30",
            "2026-11-21 06:15:00.0-00:00",
        ] {
            assert_eq!(parse_target_time(text), Ok("2026-11-21T06:15:00Z".parse().unwrap()), "{text}");
        }
        let precise = "2026-11-21T06:15:00.123456Z".parse().unwrap();
        assert_eq!(parse_target_time("2026-11-21 06:15:00.123456789Z"), Ok(precise));
    }

    #[test]
    fn a_time_without_a_zone_is_refused_and_the_error_shows_how_to_write_it() {
        let error = |text| parse_target_time(text).unwrap_err().to_string();
        insta::assert_snapshot!(error("2026-11-21 06:15:00"), @r#""2026-11-21 06:15:00" has no time zone. Add one: "2026-11-21 06:15:00Z" for UTC, or the offset of the clock that you read it from, as in "2026-11-21 06:15:00+02:00""#);
        insta::assert_snapshot!(error("2026-11-21T06:15:00 Europe/Berlin"), @r#"the time zone "Europe/Berlin" is not known here. Write its offset from UTC instead, as in "2026-11-21 06:15:00+02:00", or "2026-11-21 06:15:00Z" for UTC"#);
        insta::assert_snapshot!(error("2026-11-21T06:15:00 CEST"), @r#"the time zone "CEST" is not known here. Write its offset from UTC instead, as in "2026-11-21 06:15:00+02:00", or "2026-11-21 06:15:00Z" for UTC"#);
        insta::assert_snapshot!(error("yesterday"), @r#""yesterday" is not a time. Write it as "2026-11-21 06:15:00Z" or "2026-11-21T06:15:00.25+02:00""#);
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in [
            "",
            "now",
            "2026-11-21",
            "2026-11-21Z",
            "2026-11-21 Z",
            "06:15:00Z",
            "2026-13-01 00:00Z",
            "2026-02-29 00:00Z",
            "2026-11-21 24:00Z",
            "2026-11-21 06:60Z",
            "2026-11-21 06:15:60Z",
            "2026-11-21 6:15Z",
            "26-11-21 06:15Z",
            "2026-11-21-01 06:15Z",
            "2026-11-21 06:15:00:00Z",
            "2026-11-21 06:15.5Z",
            "2026-11-21 06:15:00.Z",
            "2026-11-21 06:15:00.1234567890Z",
            "2026-11-21 06:15+2",
            "2026-11-21 06:15+16",
            "2026-11-21 06:15+0260",
            "2026-11-21 06:15+02:0",
            "2026-11-21 06:15+020",
            "2026-11-21 06:15+٠٢",
            "1969-12-31 23:59:59Z",
            "1970-01-01 00:00+01",
            "2026-11-21 06:15+02 CEST",
        ] {
            assert!(matches!(parse_target_time(text), Err(TargetTimeError::NotATime(_))), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn every_instant_can_be_written_with_any_offset(micros in 0i64..4_000_000_000_000_000, minutes in -959i32..960) {
            let instant = Timestamp::from_microsecond(micros).unwrap();
            let local = Offset::from_seconds(minutes * 60).unwrap().to_datetime(instant);
            let (sign, minutes) = (if minutes < 0 { '-' } else { '+' }, minutes.abs());
            let text = format!("{}{sign}{:02}:{:02}", local.strftime("%Y-%m-%d %H:%M:%S%.6f"), minutes / 60, minutes % 60);
            prop_assert_eq!(parse_target_time(&text), Ok(instant));
        }

        #[test]
        fn no_text_is_too_strange(text in "\\PC{0,40}") {
            let _ = parse_target_time(&text);
            let _ = parse_target_time(&format!("2026-11-21 06:15:00{text}"));
        }
    }
}
