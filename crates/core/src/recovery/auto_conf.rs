//! The `postgresql.auto.conf` of a restored server.
//!
//! It is read after `postgresql.conf` and what that includes, so whatever it sets is what counts, unless a
//! command line outranks it. Old settings about recovery come back with a backup; here they are taken out,
//! and every one that could stand in `postgresql.conf` is overridden.
//!
//! The server knows a trap here: setting any target, even to nothing, is FATAL once another one was set
//! ("multiple recovery targets specified", the assign hooks in xlogrecovery.c), and the file is applied from
//! top to bottom. So the empty ones come first and the one that applies after them.

use super::{RecoveryMode, RecoverySettings, RecoveryTarget};

/// Marks the comments of the block, so that a second restore takes them out again.
const COMMENT: &str = "# pgsidecar restore: ";

/// The targets that exclude each other, in all versions from 12 on.
const TARGETS: [&str; 5] =
    ["recovery_target", "recovery_target_lsn", "recovery_target_name", "recovery_target_time", "recovery_target_xid"];

/// The `postgresql.auto.conf` for a restored server of this major version: what the backup brought, without
/// its settings about recovery and replication and otherwise byte for byte, and a block that sets them all
/// anew. Doing it twice changes nothing.
///
/// The settings stay after the recovery, where they have no effect; but `primary_conninfo` and
/// `restore_command` there outrank those of `postgresql.conf` when the server becomes a standby later.
pub fn rewrite_auto_conf(existing: &[u8], major: u32, settings: &RecoverySettings) -> Vec<u8> {
    let mut file = Vec::with_capacity(existing.len() + 1024);
    for line in existing.split_inclusive(|byte| *byte == b'\n') {
        if !line.starts_with(COMMENT.as_bytes()) && !is_about_recovery(line) {
            file.extend_from_slice(line);
        }
    }
    if file.last().is_some_and(|byte| *byte != b'\n') {
        file.push(b'\n');
    }
    file.extend_from_slice(block(major, settings).as_bytes());
    file
}

/// Whether the line sets something that the block decides. A setting's name is the line's first word, in
/// either case, and needs no `=` after it (guc-file.l); values never go on in the next line.
fn is_about_recovery(line: &[u8]) -> bool {
    // These tune how a server recovers after any crash, not where to.
    const TUNING: [&str; 2] = ["recovery_init_sync_method", "recovery_prefetch"];
    const NAMES: [&str; 4] = ["archive_cleanup_command", "promote_trigger_file", "restore_command", "trigger_file"];

    let blanks = line.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\r')).count();
    let name: Vec<u8> = line[blanks..]
        .iter()
        // The dot is an extension's setting.
        .take_while(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | b'.') || !byte.is_ascii())
        .map(u8::to_ascii_lowercase)
        .collect();
    let is_one_of = |names: &[&str]| names.iter().any(|other| other.as_bytes() == name);
    let has_prefix = name.starts_with(b"recovery_") || name.starts_with(b"primary_");
    is_one_of(&NAMES) || has_prefix && !name.contains(&b'.') && !is_one_of(&TUNING)
}

fn block(major: u32, settings: &RecoverySettings) -> String {
    let (signal, timeline, target, primary) = match &settings.mode {
        RecoveryMode::Recovery(_) => ("recovery.signal", settings.timeline.to_string(), &settings.target, ""),
        RecoveryMode::Standby { primary_conninfo } => {
            let primary = primary_conninfo.as_deref().unwrap_or_default();
            ("standby.signal", "latest".to_owned(), &RecoveryTarget::Latest, primary)
        }
    };
    let mut lines = vec![
        format!("{COMMENT}how this server recovers. Without {signal} it means nothing."),
        set("restore_command", &settings.restore_command),
        set("recovery_target_timeline", &timeline),
        set("recovery_target_action", &settings.action.to_string()),
        set("recovery_target_inclusive", if settings.inclusive { "on" } else { "off" }),
        format!("{COMMENT}the order matters, a target that is emptied after another was set stops the server."),
    ];
    let target = match target {
        RecoveryTarget::Latest => None,
        RecoveryTarget::Immediate => Some(("recovery_target", "immediate".to_owned())),
        // UTC, with an offset that no `timezone` can change.
        RecoveryTarget::Time(time) => {
            Some(("recovery_target_time", time.strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string()))
        }
        RecoveryTarget::Lsn(lsn) => Some(("recovery_target_lsn", lsn.to_string())),
        RecoveryTarget::Xid(xid) => Some(("recovery_target_xid", xid.to_string())),
        RecoveryTarget::Name(name) => Some(("recovery_target_name", name.to_string())),
    };
    let applies = target.as_ref().map(|(name, _)| *name);
    lines.extend(TARGETS.iter().filter(|name| Some(**name) != applies).map(|name| set(name, "")));
    lines.extend(target.map(|(name, value)| set(name, &value)));
    lines.extend([
        set("recovery_end_command", ""),
        set("archive_cleanup_command", ""),
        set("recovery_min_apply_delay", "0"),
        set("primary_conninfo", primary),
        set("primary_slot_name", ""),
    ]);
    if major <= 15 {
        lines.push(set("promote_trigger_file", ""));
    }
    lines.join("\n") + "\n"
}

/// `name = 'value'`. The server's lexer takes a backslash as the beginning of an escape, and a quoted value
/// has no line breaks in it (GUC_scanstr, guc-file.l).
fn set(name: &str, value: &str) -> String {
    let mut line = format!("{name} = '");
    for c in value.chars() {
        match c {
            '\'' => line.push_str("''"),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            c => line.push(c),
        }
    }
    line.push('\'');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Lsn, TimelineId, recovery::TargetAction};
    use proptest::prelude::*;

    fn settings(target: RecoveryTarget) -> RecoverySettings {
        RecoverySettings {
            mode: RecoveryMode::default(),
            target,
            inclusive: true,
            timeline: TimelineId::new(10).unwrap(),
            action: TargetAction::Promote,
            restore_command: r"'/run/it''s\here/pgsidecar-wal' restore %f %p".to_owned(),
        }
    }

    fn time(text: &str) -> RecoveryTarget {
        RecoveryTarget::Time(text.parse().unwrap())
    }

    fn rewritten(existing: &str, major: u32, target: RecoveryTarget) -> String {
        String::from_utf8(rewrite_auto_conf(existing.as_bytes(), major, &settings(target))).unwrap()
    }

    #[test]
    fn the_empty_targets_come_before_the_one_that_applies() {
        insta::assert_snapshot!(rewritten("", 15, time("2026-11-21T06:15:00.123456999Z")), @r"
        # pgsidecar restore: how this server recovers. Without recovery.signal it means nothing.
        restore_command = '''/run/it''''s\\here/pgsidecar-wal'' restore %f %p'
        recovery_target_timeline = '10'
        recovery_target_action = 'promote'
        recovery_target_inclusive = 'on'
        # pgsidecar restore: the order matters, a target that is emptied after another was set stops the server.
        recovery_target = ''
        recovery_target_lsn = ''
        recovery_target_name = ''
        recovery_target_xid = ''
        recovery_target_time = '2026-11-21 06:15:00.123456+00'
        recovery_end_command = ''
        archive_cleanup_command = ''
        recovery_min_apply_delay = '0'
        primary_conninfo = ''
        primary_slot_name = ''
        promote_trigger_file = ''
        ");
        insta::assert_snapshot!(rewritten("", 16, RecoveryTarget::Latest), @r"
        # pgsidecar restore: how this server recovers. Without recovery.signal it means nothing.
        restore_command = '''/run/it''''s\\here/pgsidecar-wal'' restore %f %p'
        recovery_target_timeline = '10'
        recovery_target_action = 'promote'
        recovery_target_inclusive = 'on'
        # pgsidecar restore: the order matters, a target that is emptied after another was set stops the server.
        recovery_target = ''
        recovery_target_lsn = ''
        recovery_target_name = ''
        recovery_target_time = ''
        recovery_target_xid = ''
        recovery_end_command = ''
        archive_cleanup_command = ''
        recovery_min_apply_delay = '0'
        primary_conninfo = ''
        primary_slot_name = ''
        ");
    }

    #[test]
    fn a_standby_has_no_target_and_follows_the_newest_timeline() {
        let mode = RecoveryMode::Standby { primary_conninfo: Some("host=db-0 password=it's".to_owned()) };
        let settings = RecoverySettings { mode, ..settings(RecoveryTarget::Immediate) };
        insta::assert_snapshot!(String::from_utf8(rewrite_auto_conf(b"", 17, &settings)).unwrap(), @r#"
        # pgsidecar restore: how this server recovers. Without standby.signal it means nothing.
        restore_command = '''/run/it''''s\\here/pgsidecar-wal'' restore %f %p'
        recovery_target_timeline = 'latest'
        recovery_target_action = 'promote'
        recovery_target_inclusive = 'on'
        # pgsidecar restore: the order matters, a target that is emptied after another was set stops the server.
        recovery_target = ''
        recovery_target_lsn = ''
        recovery_target_name = ''
        recovery_target_time = ''
        recovery_target_xid = ''
        recovery_end_command = ''
        archive_cleanup_command = ''
        recovery_min_apply_delay = '0'
        primary_conninfo = 'host=db-0 password=it''s'
        primary_slot_name = ''
        "#);
    }

    #[test]
    fn each_target_is_written_as_the_server_reads_it() {
        let line = |target| rewritten("", 17, target).lines().rfind(|line| line.contains("target")).unwrap().to_owned();
        let lines = [
            line(RecoveryTarget::Immediate),
            line(time("2026-11-21T06:15:00Z")),
            line(RecoveryTarget::Lsn(Lsn::new(0x16_B374_D848))),
            line(RecoveryTarget::Xid(u64::from(u32::MAX) + 700)),
            line(RecoveryTarget::Name(r"before 'v2' \o/".parse().unwrap())),
        ];
        insta::assert_snapshot!(lines.join("\n"), @r"
        recovery_target = 'immediate'
        recovery_target_time = '2026-11-21 06:15:00.000000+00'
        recovery_target_lsn = '16/B374D848'
        recovery_target_xid = '4294967995'
        recovery_target_name = 'before ''v2'' \\o/'
        ");
    }

    #[test]
    fn old_settings_about_recovery_are_taken_out_and_nothing_else() {
        let kept = "# Do not edit this file manually!\n\
            work_mem = '4MB'\r\n\
            recovery_prefetch = 'off'\n\
            recovery_init_sync_method = 'syncfs'\n\
            recovery_guard.level = 'high'\n\
            # recovery_target_time = 'a comment'\n\
            archive_command = 'restore_command'\n\
            \n\
            restore_commands = 'not known, but not ours'\n\
            log_line_prefix = ' recovery_target = '";
        let taken = "recovery_target_time = '2020-01-01 00:00:00+00'\n \t\rRecovery_Target_XID '7'\n\
            RESTORE_COMMAND'cp'\nprimary_conninfo='host=old password=x'\nprimary_slot_name = s\n\
            archive_cleanup_command = ''\nrecovery_end_command = ''\npromote_trigger_file = ''\n\
            trigger_file = ''\nrecovery_min_apply_delay = 1h\nrecovery_target\n";
        let file = rewritten(&format!("{taken}{kept}"), 17, RecoveryTarget::Latest);
        assert_eq!(file, format!("{kept}\n{}", rewritten("", 17, RecoveryTarget::Latest)));
    }

    #[test]
    fn bytes_that_are_no_utf_8_are_kept() {
        let latin1 = b"cluster_name = 'B\xe4r'\n";
        let file = rewrite_auto_conf(latin1, 17, &settings(RecoveryTarget::Latest));
        assert!(file.starts_with(latin1));
    }

    proptest! {
        #[test]
        fn a_second_restore_leaves_nothing_of_the_first(existing: Vec<u8>, lsn: u64) {
            let first = rewrite_auto_conf(&existing, 15, &settings(RecoveryTarget::Lsn(Lsn::new(lsn))));
            let second = settings(RecoveryTarget::Immediate);
            let expected = rewrite_auto_conf(&existing, 15, &second);
            prop_assert_eq!(rewrite_auto_conf(&first, 15, &second), expected);
        }

        #[test]
        fn a_value_is_one_line_that_reads_back(value in "[ -~\n\\\\']{0,40}") {
            let line = set("restore_command", &value);
            prop_assert!(!line.contains('\n'));
            let quoted = line.strip_prefix("restore_command = '").and_then(|rest| rest.strip_suffix('\'')).unwrap();
            let mut read = String::new();
            let mut chars = quoted.chars();
            while let Some(c) = chars.next() {
                // A quote is doubled, a backslash begins an escape.
                let next = if matches!(c, '\'' | '\\') { chars.next() } else { Some(c) };
                prop_assert!(c != '\'' || next == Some('\''));
                read.push(if c == '\\' && next == Some('n') { '\n' } else { next.unwrap() });
            }
            prop_assert_eq!(read, value);
        }
    }
}
