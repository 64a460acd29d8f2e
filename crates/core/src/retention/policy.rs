//! What is to be kept, as people say it.

use std::{fmt, str::FromStr, time::Duration};

use jiff::Timestamp;
use serde::{Serialize, Serializer};

use crate::settings::{InvalidValue, number_and_unit};

/// What is to be kept. What it says nothing of is kept for ever.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Policy {
    /// Every moment of this time can be restored. `None`: no backup and no WAL is ever removed.
    pub window: Option<RecoveryWindow>,
    /// How many full backups stay at least that can be restored, with the WAL from there on.
    pub redundancy: Redundancy,
    /// Which dumps stay. `None`: all.
    pub dumps: Option<DumpCounts>,
}

impl Policy {
    /// Whether anything can ever go by it.
    pub fn removes_anything(&self) -> bool {
        self.window.is_some() || self.dumps.is_some()
    }
}

/// How far back every moment can be restored: from a second to a hundred years.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct RecoveryWindow(u64);

impl RecoveryWindow {
    const SHORTEST: u64 = 1;
    const LONGEST: u64 = 36_525 * 86_400;

    /// The window of this many seconds; `None` outside of its bounds.
    pub fn from_seconds(seconds: u64) -> Option<RecoveryWindow> {
        (RecoveryWindow::SHORTEST..=RecoveryWindow::LONGEST).contains(&seconds).then_some(RecoveryWindow(seconds))
    }

    /// How long it is.
    pub fn duration(self) -> Duration {
        Duration::from_secs(self.0)
    }

    /// Where it begins if it ends at `end`.
    pub fn begin(self, end: Timestamp) -> Timestamp {
        end.checked_sub(self.duration()).unwrap_or(Timestamp::MIN)
    }
}

impl FromStr for RecoveryWindow {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<RecoveryWindow, InvalidValue> {
        let seconds = number_and_unit(text.trim()).and_then(|(number, unit)| {
            number.checked_mul(match unit {
                "s" => 1,
                "min" => 60,
                "h" => 3600,
                "d" => 86_400,
                "w" => 7 * 86_400,
                _ => return None,
            })
        });
        let window = seconds.and_then(RecoveryWindow::from_seconds);
        window.ok_or_else(|| InvalidValue::new(text, "a recovery window of up to 36525d, like 14d, 2w or 36h"))
    }
}

impl fmt::Display for RecoveryWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            seconds if seconds % 86_400 == 0 => write!(f, "{}d", seconds / 86_400),
            seconds if seconds % 3600 == 0 => write!(f, "{}h", seconds / 3600),
            seconds if seconds % 60 == 0 => write!(f, "{}min", seconds / 60),
            seconds => write!(f, "{seconds}s"),
        }
    }
}

impl Serialize for RecoveryWindow {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A number of full backups, at least one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(transparent)]
pub struct Redundancy(u32);

impl Redundancy {
    /// How many.
    pub fn count(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl Default for Redundancy {
    fn default() -> Redundancy {
        Redundancy(1)
    }
}

impl FromStr for Redundancy {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Redundancy, InvalidValue> {
        let count = text.parse().ok().filter(|count| (1..=1000).contains(count));
        count.map(Redundancy).ok_or_else(|| InvalidValue::new(text, "a number of full backups from 1 to 1000"))
    }
}

/// Which dumps stay: the last few, and the newest one of each of the last days, weeks (from Monday on), months and years
/// (in UTC) that have one. At least one of the numbers isn't 0, so that the newest dump always stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct DumpCounts {
    /// The newest, whenever they were taken.
    pub(super) last: u32,
    /// Of days.
    pub(super) daily: u32,
    /// Of weeks.
    pub(super) weekly: u32,
    /// Of months.
    pub(super) monthly: u32,
    /// Of years.
    pub(super) yearly: u32,
}

impl DumpCounts {
    /// How many dumps stay at most.
    pub fn most(&self) -> u64 {
        [self.last, self.daily, self.weekly, self.monthly, self.yearly].into_iter().map(u64::from).sum()
    }

    /// The numbers with their names.
    fn named(&self) -> [(&'static str, u32); 5] {
        [
            ("last", self.last),
            ("daily", self.daily),
            ("weekly", self.weekly),
            ("monthly", self.monthly),
            ("yearly", self.yearly),
        ]
    }
}

const DUMP_COUNTS: &str =
    "a list of counts of dumps, each once and up to 10000, like last=3,daily=7,weekly=4,monthly=12,yearly=1";

impl FromStr for DumpCounts {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<DumpCounts, InvalidValue> {
        let invalid = || InvalidValue::new(text, DUMP_COUNTS);
        let mut counts = DumpCounts { last: 0, daily: 0, weekly: 0, monthly: 0, yearly: 0 };
        for item in text.split(',') {
            let (name, count) = item.trim().split_once('=').ok_or_else(invalid)?;
            let slot = match name {
                "last" => &mut counts.last,
                "daily" => &mut counts.daily,
                "weekly" => &mut counts.weekly,
                "monthly" => &mut counts.monthly,
                "yearly" => &mut counts.yearly,
                _ => return Err(invalid()),
            };
            let count = count.parse().ok().filter(|count| (1..=10_000).contains(count)).ok_or_else(invalid)?;
            if std::mem::replace(slot, count) != 0 {
                return Err(invalid());
            }
        }
        Ok(counts)
    }
}

impl fmt::Display for DumpCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = self.named().into_iter().filter(|(_, count)| *count > 0);
        let said: Vec<String> = said.map(|(name, count)| format!("{name}={count}")).collect();
        f.write_str(&said.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_written_and_read_in_one_way() {
        for (text, shown) in
            [("14d", "14d"), ("2w", "14d"), ("36h", "36h"), ("90min", "90min"), ("45s", "45s"), ("400d", "400d")]
        {
            assert_eq!(text.parse::<RecoveryWindow>().unwrap().to_string(), shown);
        }
        for text in ["", "0d", "14", "0s", "36526d", "1y", "-1d", "14m", "99999999999999999999d"] {
            assert!(text.parse::<RecoveryWindow>().is_err(), "{text:?}");
        }
        let counts: DumpCounts = "weekly=4, daily=7".parse().unwrap();
        assert_eq!(counts.to_string(), "daily=7,weekly=4");
        assert_eq!(counts.to_string().parse(), Ok(counts));
        for text in ["", "daily", "daily=0", "daily=7,daily=8", "hourly=1", "daily=-1", "daily=7,", "7d"] {
            assert!(text.parse::<DumpCounts>().is_err(), "{text:?}");
        }
        for text in ["0", "", "-1", "1001", "two"] {
            assert!(text.parse::<Redundancy>().is_err(), "{text:?}");
        }
        assert_eq!("3".parse::<Redundancy>().unwrap().count(), 3);
    }

    #[test]
    fn by_default_nothing_is_ever_removed() {
        assert!(!Policy::default().removes_anything());
    }
}
