//! Settings: every reader of `.env` reads the same and refuses the same lines, and the scripts
//! work whatever the caller's shell and cargo are set to.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use chassis::testing::{repository_root, unique_name};
use harness::binaries;
use harness::services::{dotenv, services};

use crate::shell::unfriendly_shell;

/// A directory of one test's own.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        let path = std::env::temp_dir().join(unique_name("matinee-settings"));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn env_file(&self) -> PathBuf {
        self.0.join(".env")
    }

    /// A reader of the file, which prints the values of `A` and `B` in quotes: shell scripts, PM2,
    /// and the Vagrantfile.
    fn readers(&self) -> [(&'static str, Command); 3] {
        let mut bash = Command::new("bash");
        bash.arg("-c")
            .arg(r#"set -euo pipefail; . lib/env.sh; load_settings; printf '"%s","%s"' "$A" "$B""#);
        let mut node = Command::new("node");
        node.arg("--eval").arg(
            r#"const { env } = require("./ecosystem.config.js").apps[0]
               process.stdout.write(`"${env.GATEWAY_A}","${env.GATEWAY_B}"`)"#,
        );
        let mut ruby = Command::new("ruby");
        ruby.args(["-r", "./vm/machines.rb", "-e"]).arg(
            r#"settings = Machines.read_settings(ENV["MATINEE_ENV_FILE"])
               $stdout.binmode.printf('"%s","%s"', settings["A"], settings["B"])"#,
        );
        let mut readers = [("the scripts", bash), ("PM2", node), ("the Vagrantfile", ruby)];
        for (_, reader) in &mut readers {
            reader
                .current_dir(repository_root().join("provision"))
                .env_remove("A")
                .env_remove("B")
                .env("MATINEE_ENV_FILE", self.env_file());
        }
        readers
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_line_that_one_reader_of_env_refuses_all_refuse_and_name_it_without_its_value() {
    let folder = Folder::new();
    for (text, line) in [
        (&b"A=1\nB=hunter2\nA=hunter2\n"[..], 3),
        (b"A=1\nexport B=hunter2\n", 2),
        (b"A=1\n B=hunter2\n", 2),
        (b"A=1\n\tB=hunter2\n", 2),
        (b"A=1\nB =hunter2\n", 2),
        (b"A=1\r\n\r\n# comment\r\nB hunter2\r\n", 4),
        (b"A=1\nB-C=hunter2", 2),
        (b"A=1\n1B=hunter2", 2),
        (b"A=1\nB\xc3\xa9=hunter2", 2),
        (b"=hunter2\nA=1\n", 1),
        (b"A=1\nB=hunter2\xff\n", 2),
        (b"A=1\n\xc2\xa0\n", 2),
        (b"A=1\n\xef\xbb\xbf\n", 2),
        (b"\xef\xbb\xbfA=hunter2\n", 1),
        (b"\xef\xbb\xbf# comment\nA=hunter2\n", 1),
        (b"\xef\xbb\xbf\nA=hunter2\n", 1),
    ] {
        fs::write(folder.env_file(), text).unwrap();
        let shown = String::from_utf8_lossy(text);
        let mut refusals: Vec<(String, Output)> = folder
            .readers()
            .into_iter()
            .map(|(name, mut reader)| (name.to_owned(), reader.output().unwrap()))
            .collect();
        for row in services() {
            let mut service = Command::new(binaries::program(&row.name));
            refusals.push((row.name.clone(), service.current_dir(&folder.0).output().unwrap()));
        }
        for (reader, refusal) in refusals {
            let said = stderr(&refusal);
            assert!(!refusal.status.success(), "{reader}: {shown:?}");
            let named = format!("{}: line {line} ", folder.env_file().display());
            assert!(said.contains(&named), "{reader}: {shown:?}: {said}");
            assert!(!said.contains("hunter2"), "{reader}: {shown:?}: {said}");
            let mark = text.starts_with(b"\xef\xbb\xbf");
            assert_eq!(said.contains("byte order mark"), mark, "{reader}: {shown:?}: {said}");
        }
    }
}

/// That chassis reads the same is a test in `chassis/src/env.rs`.
#[test]
fn all_readers_of_env_read_the_same_values() {
    let folder = Folder::new();
    for (text, a, b) in [
        ("A=\nB=1", "", "1"),
        ("# A=0\n\n \t\nA=1 # no comment\nB==2=", "1 # no comment", "=2="),
        ("A= 1 \r\nB=2\r", " 1 ", "2"),
        ("A='1'\nB=\"$HOME\\n`x`", "'1'", "\"$HOME\\n`x`"),
        ("A=é\u{2028}\u{a0}\nB=\u{feff}🎬\n", "é\u{2028}\u{a0}", "\u{feff}🎬"),
    ] {
        for (name, mut reader) in folder.readers() {
            // PM2's file gives no process a variable that is not its own.
            let own =
                |text: &str| text.replace("\nA=", "\nGATEWAY_A=").replace("\nB=", "\nGATEWAY_B=");
            let text = format!("\n{text}");
            let written = if name == "PM2" { own(&text) } else { text };
            fs::write(folder.env_file(), written).unwrap();
            let output = reader.output().unwrap();
            let printed = String::from_utf8_lossy(&output.stdout);
            let expected = format!("\"{a}\",\"{b}\"");
            assert_eq!(printed, expected, "{name}: {}", stderr(&output));
        }
    }
}

#[test]
fn the_scripts_work_in_a_shell_with_a_turkish_locale_with_cdpath_and_without_home() {
    let folder = Folder::new();
    let script = r#"
        set -euo pipefail
        . lib/env.sh
        . lib/services.sh
        load_settings
        name=IL
        echo "$root ${name,,} $(setting_name billing PORT) ${HOME:?} $(cd lib && pwd)""#;
    let provision = repository_root().join("provision");
    let home = Command::new("bash").args(["-c", "getent passwd $EUID | cut -d : -f 6"]).output();
    let home = String::from_utf8(home.unwrap().stdout).unwrap();
    let output = unfriendly_shell(&folder.0, "bash")
        .args(["-c", script])
        .current_dir(&provision)
        .env_remove("HOME")
        .output()
        .unwrap();
    let root = repository_root().canonicalize().unwrap();
    let expected = format!(
        "{} il BILLING_PORT {} {}\n",
        root.display(),
        home.trim(),
        root.join("provision/lib").display()
    );
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{}", stderr(&output));

    // The whole command, by a path that CDPATH would replace.
    let usage = unfriendly_shell(&folder.0, "provision/local")
        .arg("--help")
        .current_dir(&root)
        .env_remove("HOME")
        .output()
        .unwrap();
    assert!(usage.status.success(), "{}", stderr(&usage));
}

#[test]
fn the_programs_that_are_started_are_those_that_cargo_builds_where_the_user_has_set() {
    let folder = Folder::new();
    let script = "set -euo pipefail; . lib/env.sh; . lib/build.sh; target_directory";
    let found = |variables: &[(&str, &Path)]| {
        let mut bash = Command::new("bash");
        bash.args(["-c", script]).current_dir(repository_root().join("provision"));
        bash.env_remove("CARGO_TARGET_DIR").env_remove("CARGO_BUILD_TARGET_DIR");
        let output = bash.envs(variables.iter().copied()).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        PathBuf::from(String::from_utf8(output.stdout).unwrap().trim_end())
    };
    let elsewhere = folder.0.join("else where");
    for variable in ["CARGO_TARGET_DIR", "CARGO_BUILD_TARGET_DIR"] {
        assert_eq!(found(&[(variable, &elsewhere)]), elsewhere, "{variable}");
    }
    let config = format!("[build]\ntarget-dir = \"{}\"\n", elsewhere.display());
    fs::write(folder.0.join("config.toml"), config).unwrap();
    assert_eq!(found(&[("CARGO_HOME", &folder.0)]), elsewhere, "cargo's configuration");
}

#[test]
fn the_names_of_queues_virtual_hosts_and_logins_may_have_any_character() {
    let folder = Folder::new();
    let names = "RABBITMQ_QUEUE=or+ders.(new)$[1]{2}|^*?\\\nRABBITMQ_VHOST=a \"host\\/é\n\
        RABBITMQ_ADMIN_USER=admin\nRABBITMQ_ADMIN_PASSWORD=x\nGATEWAY_RABBITMQ_USER=g \"\\\n\
        GATEWAY_RABBITMQ_PASSWORD=\"\\\nORDERS_RABBITMQ_USER=o\nORDERS_RABBITMQ_PASSWORD=x\n\
        ORDERS_RABBITMQ_EXCHANGE=a.b \"c\nBILLING_RABBITMQ_USER=b\nBILLING_RABBITMQ_PASSWORD=x\n";
    fs::write(folder.env_file(), names).unwrap();
    let mut definitions = Command::new(repository_root().join("provision/rabbitmq-definitions.sh"));
    for name in dotenv().keys() {
        definitions.env_remove(name);
    }
    let output = definitions.env("MATINEE_ENV_FILE", folder.env_file()).output().unwrap();
    let definitions: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|err| panic!("{err}: {output:?}"));
    let quoted = r"or\+ders\.\(new\)\$\[1\]\{2\}\|\^\*\?\\";
    assert_eq!(definitions["vhosts"][0]["name"], "a \"host\\/é");
    assert_eq!(definitions["users"][1]["name"], "g \"\\");
    assert_eq!(definitions["permissions"][1]["configure"], format!("^{quoted}$"));
    let both = format!(r#"^({quoted}|a\.b "c)$"#);
    assert_eq!(definitions["permissions"][2]["configure"], both);
    assert_eq!(definitions["permissions"][2]["write"], r#"^(amq\.default|a\.b "c)$"#);
    assert_eq!(definitions["exchanges"][0]["name"], "a.b \"c");
    assert_eq!(definitions["permissions"][3]["read"], format!(r"^{quoted}(\.dead)?$"));
    assert_eq!(definitions["policies"][0]["pattern"], format!("^{quoted}$"));
    let dead = &definitions["policies"][0]["definition"]["dead-letter-routing-key"];
    assert_eq!(dead, r"or+ders.(new)$[1]{2}|^*?\.dead");

    let script = r#". lib/env.sh; url_encoded 'a b/+%é~'"#;
    let mut bash = Command::new("bash");
    let bash = bash.args(["-c", script]).current_dir(repository_root().join("provision"));
    let encoded = bash.output().unwrap();
    assert_eq!(String::from_utf8_lossy(&encoded.stdout), "a%20b%2F%2B%25%C3%A9~");
}

#[test]
fn a_log_of_the_local_stack_that_grows_is_rotated_and_seven_old_ones_are_kept() {
    let folder = Folder::new();
    let logs = folder.0.join("logs");
    fs::create_dir(&logs).unwrap();
    let (log, small) = (logs.join("gateway-app-error.log"), logs.join("billing-app-error.log"));
    fs::write(&small, "small\n").unwrap();
    // PM2 appends, as this does.
    let mut writer = fs::File::options().create(true).append(true).open(&log).unwrap();
    for round in 1..=9 {
        std::io::Write::write_all(&mut writer, format!("round {round}\n").as_bytes()).unwrap();
        // A hole: no disk is used.
        writer.set_len((20 << 20) + 1).unwrap();
        let rotate = Command::new(repository_root().join("provision/lib/rotate-logs"))
            .env("PM2_HOME", &folder.0)
            .output()
            .unwrap();
        assert!(rotate.status.success(), "{}", stderr(&rotate));
        assert_eq!(fs::metadata(&log).unwrap().len(), 0);
    }
    let mut names: Vec<String> = fs::read_dir(&logs)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    let old = (1..=7).map(|number| format!("gateway-app-error.log.{number}.gz"));
    let mut expected: Vec<String> = old.collect();
    expected.extend(["billing-app-error.log", "gateway-app-error.log"].map(str::to_owned));
    expected.sort_unstable();
    assert_eq!(names, expected);
    for (number, round) in [(1, 9), (7, 3)] {
        let old = logs.join(format!("gateway-app-error.log.{number}.gz"));
        let script = "gzip --decompress --stdout \"$1\" | head -n 1";
        let first = Command::new("bash").args(["-c", script, "-"]).arg(old).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&first.stdout), format!("round {round}\n"));
    }
    assert_eq!(fs::read_to_string(&small).unwrap(), "small\n");
}
