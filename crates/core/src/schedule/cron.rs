//! Five-field cron expressions, and when they are next due in a time zone.
//!
//! ```text
//! minute (0-59)  hour (0-23)  day of the month (1-31)  month (1-12, jan-dec)  day of the week (0-7, sun-sat; 0 and 7 are Sunday)
//! ```
//!
//! A field is `*`, a number, a range `1-5`, any of them with a step (`*/15`, `1-9/2`), or several of those joined by
//! commas. As in Vixie's cron, a day has to fit one of the two fields for days if neither begins with `*`, and both
//! otherwise. `@hourly`, `@daily` (`@midnight`), `@weekly`, `@monthly` and `@yearly` (`@annually`) stand for expressions.
//!
//! Where clocks are changed, nothing is skipped and nothing runs twice: a time of day that doesn't exist is due when the
//! clock has been put forward, one that comes twice the first time. Expressions for every hour go by the clock that is
//! shown: `*/15 * * * *` is due each quarter of an hour, also in the hour that comes twice. (cron takes every expression
//! with a `*` in minute or hour for one of those, and so skips `0 */2 * * *` in the night of a change.)

use std::{fmt, ops::RangeInclusive, str::FromStr};

use jiff::{
    SignedDuration, Span, Timestamp, ToSpan,
    civil::{Date, DateTime, date},
    tz::TimeZone,
};

/// A cron expression that is due now and then.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CronExpression {
    /// As it was written.
    text: String,
    minutes: Set,
    hours: Set,
    days: Set,
    months: Set,
    weekdays: Set,
    /// Whether a day has to fit both fields for days; otherwise one of them is enough.
    both_days: bool,
}

/// Which of the numbers 0 to 59 are meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Set(u64);

impl Set {
    fn has(self, number: i8) -> bool {
        u32::try_from(number).is_ok_and(|number| self.0.checked_shr(number).unwrap_or(0) & 1 == 1)
    }

    /// The first number from `low` on.
    fn first_from(self, low: i8) -> Option<i8> {
        (low..60).find(|number| self.has(*number))
    }
}

/// Why a text is no cron expression.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InvalidCron {
    /// It hasn't five fields.
    #[error(
        "{text:?} is not a cron expression: five fields are needed (minute, hour, day of the month, month, day of the week), like '30 2 * * 0'"
    )]
    Fields {
        /// The text.
        text: String,
    },
    /// A field makes no sense.
    #[error("{part:?} in {text:?} is no {field}: {expected}")]
    Field {
        /// The text.
        text: String,
        /// The part of it that isn't understood.
        part: String,
        /// Which field it's in.
        field: &'static str,
        /// What it could be.
        expected: &'static str,
    },
    /// No month has such a day.
    #[error("{text:?} is never due: none of its months has such a day")]
    Never {
        /// The text.
        text: String,
    },
}

struct Field {
    name: &'static str,
    range: RangeInclusive<u8>,
    names: &'static [&'static str],
    expected: &'static str,
}

const MINUTE: Field =
    Field { name: "minute", range: 0..=59, names: &[], expected: "*, 0 to 59, 10-20, */15 or several with commas" };
const HOUR: Field =
    Field { name: "hour", range: 0..=23, names: &[], expected: "*, 0 to 23, 8-18, */6 or several with commas" };
const DAY: Field = Field {
    name: "day of the month",
    range: 1..=31,
    names: &[],
    expected: "*, 1 to 31, 1-7, */2 or several with commas",
};
const MONTH: Field = Field {
    name: "month",
    range: 1..=12,
    names: &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
    expected: "*, 1 to 12, jan to dec, 6-8, */3 or several with commas",
};
const WEEKDAY: Field = Field {
    name: "day of the week",
    range: 0..=7,
    names: &["sun", "mon", "tue", "wed", "thu", "fri", "sat"],
    expected: "*, 0 to 7 (0 and 7 are Sunday), sun to sat, 1-5 or several with commas",
};

impl Field {
    fn parse(&self, text: &str, whole: &str) -> Result<Set, InvalidCron> {
        let mut set = 0;
        for part in text.split(',') {
            let numbers = self.numbers(part).ok_or_else(|| InvalidCron::Field {
                text: shortened(whole),
                part: shortened(part),
                field: self.name,
                expected: self.expected,
            })?;
            numbers.for_each(|number| set |= 1_u64 << number);
        }
        Ok(Set(set))
    }

    fn numbers(&self, part: &str) -> Option<impl Iterator<Item = u8>> {
        let (range, step) = match part.split_once('/') {
            Some((range, step)) => (range, digits(step).filter(|step| *step > 0)?),
            None => (part, 1),
        };
        let range = match range.split_once('-') {
            _ if range == "*" => self.range.clone(),
            Some((low, high)) => self.number(low)?..=self.number(high)?,
            // What '5/15' means differs from cron to cron.
            None if part != range => return None,
            None => self.number(range)?..=self.number(range)?,
        };
        (!range.is_empty()).then(|| range.step_by(usize::from(step)))
    }

    fn number(&self, text: &str) -> Option<u8> {
        let named = self.names.iter().position(|name| text.eq_ignore_ascii_case(name));
        let named = named.and_then(|at| u8::try_from(at).ok()).map(|at| at + self.range.start());
        named.or_else(|| digits(text)).filter(|number| self.range.contains(number))
    }
}

fn digits(text: &str) -> Option<u8> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

impl FromStr for CronExpression {
    type Err = InvalidCron;

    fn from_str(text: &str) -> Result<CronExpression, InvalidCron> {
        let text = text.trim();
        let expression = match text.to_ascii_lowercase().as_str() {
            "@hourly" => "0 * * * *",
            "@daily" | "@midnight" => "0 0 * * *",
            "@weekly" => "0 0 * * 0",
            "@monthly" => "0 0 1 * *",
            "@yearly" | "@annually" => "0 0 1 1 *",
            _ => text,
        };
        let fields: Vec<&str> = expression.split_ascii_whitespace().collect();
        let &[minute, hour, day, month, weekday] = fields.as_slice() else {
            return Err(InvalidCron::Fields { text: shortened(text) });
        };
        let weekdays = WEEKDAY.parse(weekday, text)?;
        let cron = CronExpression {
            text: fields.join(" "),
            minutes: MINUTE.parse(minute, text)?,
            hours: HOUR.parse(hour, text)?,
            days: DAY.parse(day, text)?,
            months: MONTH.parse(month, text)?,
            // 7 is Sunday as well.
            weekdays: Set((weekdays.0 & 0x7f) | (weekdays.0 >> 7)),
            both_days: day.starts_with('*') || weekday.starts_with('*'),
        };
        let possible = (1..=12).filter(|month| cron.months.has(*month)).any(|month| {
            // In a leap year.
            let longest = date(2024, month, 1).days_in_month();
            cron.days.first_from(1).is_some_and(|day| day <= longest)
        });
        (possible || !cron.both_days).then_some(cron).ok_or_else(|| InvalidCron::Never { text: shortened(text) })
    }
}

impl fmt::Display for CronExpression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

/// How far is looked for the next day: February 29 on a certain day of the week comes every 28 years, and every 40 where
/// a century has no leap year.
const FARTHEST_YEARS: i16 = 41;
/// How long before a time the last run before it is looked for: first close by, where frequent ones are.
const LOOK_BACK_HOURS: [i64; 5] = [1, 24, 32 * 24, 367 * 24, 41 * 366 * 24];
const HOURS_OF_A_DAY: u64 = (1 << 24) - 1;

impl CronExpression {
    /// When it's due next after `after`; a whole minute of the zone's clock. `None` if the calendar ends before.
    pub fn next_after(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        if self.hours.0 == HOURS_OF_A_DAY { self.next_shown(after, zone) } else { self.next_of_day(after, zone) }
    }

    /// When it was due last after `after`, and not after `until`.
    pub fn last_within(&self, after: Timestamp, until: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        for hours in LOOK_BACK_HOURS {
            let from = until.checked_sub(SignedDuration::from_hours(hours)).unwrap_or(Timestamp::MIN).max(after);
            let due = |after: Timestamp| self.next_after(after, zone).filter(|next| *next <= until);
            let last = std::iter::successors(due(from), |last| due(*last)).last();
            if last.is_some() || from == after {
                return last;
            }
        }
        None
    }

    /// Each moment at which the clock shows a time that fits.
    fn next_shown(&self, mut after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        loop {
            let offset = zone.to_offset(after);
            let found = offset.to_timestamp(self.next_time(offset.to_datetime(after))?).ok()?;
            match zone.following(after).next().map(|change| change.timestamp()) {
                // From there on the clock shows something else.
                Some(change) if change <= found => {
                    if self.fits(zone.to_datetime(change)) {
                        return Some(change);
                    }
                    after = change;
                }
                _ => return Some(found),
            }
        }
    }

    /// Each time of the calendar that fits, at the moment that stands for it.
    fn next_of_day(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        // Moments come in the order of the times that they stand for, and one that lies ahead stands for a later time
        // than the clock shows now.
        let mut time = self.next_time(zone.to_datetime(after))?;
        loop {
            let moment = moment_of(time, zone)?;
            if moment > after {
                return Some(moment);
            }
            time = self.next_time(time)?;
        }
    }

    fn fits(&self, time: DateTime) -> bool {
        time.second() == 0
            && self.minutes.has(time.minute())
            && self.hours.has(time.hour())
            && self.fits_day(time.date())
    }

    /// The first time of the calendar that fits and is in a later minute than this one.
    fn next_time(&self, time: DateTime) -> Option<DateTime> {
        let start = time.checked_add(1.minute()).ok()?;
        let (mut hour, mut minute) = (start.hour(), start.minute());
        let mut day = start.date();
        loop {
            if self.fits_day(day) {
                let this_hour = self.minutes.first_from(minute).filter(|_| self.hours.has(hour));
                let found = match this_hour {
                    Some(minute) => Some((hour, minute)),
                    None => self.hours.first_from(hour + 1).zip(self.minutes.first_from(0)),
                };
                if let Some((hour, minute)) = found {
                    return Some(day.at(hour, minute, 0, 0));
                }
            }
            (hour, minute) = (0, 0);
            let further: Span = if self.months.has(day.month()) { 1.day() } else { 1.month() };
            day = day.checked_add(further).ok()?;
            if further.get_months() == 1 {
                day = day.first_of_month();
            }
            if day.year() > start.year() + FARTHEST_YEARS {
                return None;
            }
        }
    }

    fn fits_day(&self, day: Date) -> bool {
        let of_month = self.days.has(day.day());
        let of_week = self.weekdays.has(day.weekday().to_sunday_zero_offset());
        let fits = if self.both_days { of_month && of_week } else { of_month || of_week };
        fits && self.months.has(day.month())
    }
}

/// The moment that stands for a time of the calendar: of two the first; for one that doesn't exist, the moment from
/// which on the clock shows later ones.
fn moment_of(time: DateTime, zone: &TimeZone) -> Option<Timestamp> {
    let ambiguous = zone.to_ambiguous_timestamp(time);
    if let jiff::tz::AmbiguousOffset::Gap { .. } = ambiguous.offset() {
        // It lies after that, by the offset that holds from then on.
        let before = ambiguous.earlier().ok()?;
        return zone.following(before).next().map(|change| change.timestamp());
    }
    ambiguous.earlier().ok()
}

#[cfg(test)]
mod tests;
