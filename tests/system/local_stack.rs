//! `provision/local` on a copy of the checkout, as a user has it: `up`, changed settings, lost
//! processes, `down` and `reset`. All parts share one stack, because a start takes some seconds.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv6Addr, TcpListener};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use chassis::testing::process::signal;
use chassis::testing::{eventually, repository_root, unique_name};
use harness::services::{dotenv, services};
use harness::{binaries, get};
use serde_json::Value;

use crate::shell::unfriendly_shell;

#[test]
fn the_local_stack_starts_follows_its_settings_finds_lost_services_and_stops() {
    let mut stack = LocalStack::new();
    settings_that_contradict_each_other_are_refused_before_anything_is_built(&stack);

    stack.set("RABBITMQ_VHOST", "a host/of mine").set("RABBITMQ_QUEUE", "orders+(new)$");
    stack.set("GATEWAY_INSTANCES", "2").set("GATEWAY_HTTP_MAX_CONNECTIONS", "99");
    if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
        stack.set("INVENTORY_HOST", "::1");
    }
    let said = stack.succeed(&["up"]);
    assert!(said.contains("Matinee is up."), "{said}");
    programs_of_the_users_target_directory_run_and_no_older_ones(&stack);
    logs_are_rotated_and_the_rotation_has_no_setting(&stack);
    each_gateway_has_the_settings(&stack, 2, Some("99"));
    curlrc_has_no_influence_on_the_smoke_test(&stack);
    status_needs_no_home(&stack);

    let logins = [
        "POSTGRES_SUPERUSER",
        "INVENTORY_DB_USER",
        "INVENTORY_DB_OWNER",
        "GATEWAY_RABBITMQ_USER",
        "BILLING_RABBITMQ_USER",
        "RABBITMQ_ADMIN_USER",
    ];
    let former = logins.map(|name| stack.settings[name].clone());
    for name in logins {
        stack.set(name, &format!("new {name}"));
    }
    stack.set("GATEWAY_INSTANCES", "1").unset("GATEWAY_HTTP_MAX_CONNECTIONS");
    // One that another person has made is not ours to delete.
    stack.succeed(&["rabbitmqctl", "add_user", "of_another", "x"]);
    let said = stack.succeed(&["up"]);
    each_gateway_has_the_settings(&stack, 1, None);
    a_login_that_was_renamed_is_disabled_and_its_name_is_shown(&stack, &former, &said);

    services_whose_pm2_was_killed_are_found_stopped_and_named(&stack, "up");
    services_whose_pm2_was_killed_are_found_stopped_and_named(&stack, "down");
    assert_eq!(stack.all_pids(), []);
    stack.succeed(&["reset"]);
    assert!(!stack.root.join(".local").exists());
}

fn settings_that_contradict_each_other_are_refused_before_anything_is_built(stack: &LocalStack) {
    for host in ["127.0.0.1", "localhost"] {
        let output = stack
            .local(&["up"])
            .envs([("INVENTORY_DB_PORT", "1"), ("INVENTORY_DB_HOST", host)])
            .output()
            .unwrap();
        let said = text(&output);
        assert!(!output.status.success(), "{said}");
        for part in ["INVENTORY_DB_PORT is 1", &stack.settings["POSTGRES_PORT"], "POSTGRES_PORT"] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(!stack.target.exists(), "something was built");
    }
}

/// The older ones, at the usual place, end at once.
fn programs_of_the_users_target_directory_run_and_no_older_ones(stack: &LocalStack) {
    for service in services() {
        assert!(!stack.pids(&service.name).is_empty(), "{}", service.name);
    }
}

/// It runs at the start, and then every hour.
fn logs_are_rotated_and_the_rotation_has_no_setting(stack: &LocalStack) {
    let rotation = eventually("the first rotation has ended", 20, || {
        let output = stack.local(&["pm2", "jlist"]).output().unwrap();
        let apps: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        apps.into_iter()
            .map(|app| app["pm2_env"].clone())
            .find(|app| app["name"] == "log_rotation" && app["status"] == "stopped")
    });
    assert_eq!(rotation["exit_code"], 0, "{rotation}");
    assert_eq!(rotation["cron_restart"], "17 * * * *");
    assert!(!rotation.to_string().contains("PASSWORD"), "{rotation}");
}

fn curlrc_has_no_influence_on_the_smoke_test(stack: &LocalStack) {
    let said = stack.succeed(&["smoke"]);
    assert!(!said.contains("FAIL"), "{said}");
}

/// A systemd timer sets none.
fn status_needs_no_home(stack: &LocalStack) {
    let status = stack.local(&["status"]).env_remove("HOME").output().unwrap();
    assert!(status.status.success(), "{}", text(&status));
}

/// A variable without a line in `.env` has its default: no process has it.
fn each_gateway_has_the_settings(stack: &LocalStack, number: usize, limit: Option<&str>) {
    let gateways = stack.pids("gateway");
    assert_eq!(gateways.len(), number);
    for pid in gateways {
        let bytes = fs::read(format!("/proc/{pid}/environ")).unwrap();
        let variables = String::from_utf8_lossy(&bytes);
        let mut variables = variables.split('\0');
        let found = variables.find_map(|line| line.strip_prefix("GATEWAY_HTTP_MAX_CONNECTIONS="));
        assert_eq!(found, limit);
    }
    let url = format!("http://127.0.0.1:{}/api/movies?limit=1", stack.settings["GATEWAY_PORT"]);
    assert_eq!(get(&url).unwrap().status, 200);
}

fn a_login_that_was_renamed_is_disabled_and_its_name_is_shown(
    stack: &LocalStack,
    former: &[String],
    said: &str,
) {
    let users = stack.succeed(&["rabbitmqctl", "list_users", "--quiet"]);
    for name in ["of_another", "new GATEWAY_RABBITMQ_USER", "new RABBITMQ_ADMIN_USER"] {
        assert!(users.contains(name), "{name}: {users}");
    }
    // What belongs to whom: the next migration must not fail.
    let query = "select
        (select string_agg(rolname, ', ') from pg_roles where rolcanlogin),
        (select string_agg(distinct pg_get_userbyid(relowner), ', ')
            from pg_class where relnamespace = 'public'::regnamespace)";
    let options = ["--no-align", "--tuples-only", "--field-separator", "\t", "--command"];
    let row = stack.succeed(&[&["psql", "movies_db"], &options[..], &[query]].concat());
    let (logins, owners) = row.trim_end().split_once('\t').unwrap();
    assert_eq!(owners, "new INVENTORY_DB_OWNER");
    for (number, login) in former.iter().enumerate() {
        assert!(said.contains(login.as_str()), "{login} is not in: {said}");
        // The first three are PostgreSQL's, the others the broker's.
        let present = if number < 3 { logins } else { users.as_str() };
        assert!(!present.contains(login.as_str()), "{login}: {present}");
    }
}

fn services_whose_pm2_was_killed_are_found_stopped_and_named(stack: &LocalStack, command: &str) {
    let before = stack.all_pids();
    assert!(before.len() >= services().len(), "{before:?}");
    stack.kill_pm2();
    assert_eq!(stack.all_pids(), before, "they run on without PM2");
    let said = stack.succeed(&[command]);
    for (service, pid) in &before {
        assert!(said.contains(&format!("{service}, which PM2 has lost: process {pid}")), "{said}");
    }
    let after = stack.all_pids();
    assert!(after.iter().all(|found| !before.contains(found)), "{before:?} {after:?}");
    assert_eq!(after.len(), if command == "up" { before.len() } else { 0 });
    assert!(!said.contains("because"), "nothing is renamed any more: {said}");
}

/// A copy of the checkout with settings of its own, in a directory with a blank in its name.
struct LocalStack {
    directory: PathBuf,
    root: PathBuf,
    /// Where the user's cargo builds.
    target: PathBuf,
    settings: BTreeMap<String, String>,
}

impl LocalStack {
    fn new() -> LocalStack {
        let directory = std::env::temp_dir().join(unique_name("matinee local"));
        let root = directory.join("the checkout");
        let target = directory.join("user's target");
        fs::create_dir_all(&root).unwrap();
        let copy = "git ls-files -z --cached --others --exclude-standard \
            | tar --create --null --files-from - --ignore-failed-read \
            | tar --extract --directory \"$1\"";
        let copied = Command::new("bash")
            .args(["-c", copy, "-"])
            .arg(&root)
            .current_dir(repository_root())
            .output()
            .unwrap();
        assert!(copied.status.success(), "{}", text(&copied));
        // What takes long to install is taken from the checkout.
        fs::create_dir(root.join(".local")).unwrap();
        symlink(repository_root().join(".local/npm"), root.join(".local/npm")).unwrap();

        let mut stack = LocalStack {
            directory,
            root,
            target,
            settings: dotenv().clone().into_iter().collect(),
        };
        stack.choose_ports();
        stack.replace_cargo();
        stack
    }

    fn choose_ports(&mut self) {
        let names: Vec<String> = self
            .settings
            .keys()
            .filter(|name| name.ends_with("_PORT") || name.ends_with("_METRICS_LISTEN"))
            .filter(|name| !name.starts_with("VM_") && !name.ends_with("_DB_PORT"))
            .cloned()
            .collect();
        // Below 30000: above 32768 the kernel takes ports for outgoing connections.
        let mut ports = (0..)
            .map(|_| fastrand::u16(10_000..30_000))
            .filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
        for name in names {
            let port = ports.next().unwrap().to_string();
            let listen = name.ends_with("_LISTEN");
            self.set(&name, &if listen { format!("127.0.0.1:{port}") } else { port });
        }
        let postgres = self.settings["POSTGRES_PORT"].clone();
        for service in services().iter().filter(|row| row.database.is_some()) {
            self.set(&format!("{}_DB_PORT", service.prefix()), &postgres);
        }
    }

    /// A cargo that builds nothing: it copies the programs that the tests have. All else is asked of
    /// the real one, which the user has set to build in another directory; at the usual place
    /// there are programs that end at once.
    fn replace_cargo(&self) {
        let names: Vec<&str> = services().iter().map(|row| row.name.as_str()).collect();
        let script = format!(
            r#"#!/usr/bin/env bash
set -euo pipefail
if [[ $1 != build ]]; then exec '{cargo}' "$@"; fi
target=$('{cargo}' metadata --no-deps --offline --format-version 1 \
  | node --print 'JSON.parse(require("node:fs").readFileSync(0)).target_directory')
mkdir --parents "$target/release"
for program in {names}; do
  cmp --silent '{programs}'/$program "$target/release/$program" \
    || cp --remove-destination '{programs}'/$program "$target/release/"
done
"#,
            cargo = env!("CARGO"),
            names = names.join(" "),
            programs = binaries::directory().display(),
        );
        write_program(&self.directory.join("bin/cargo"), &script);
        for name in names {
            write_program(&self.root.join("target/release").join(name), "#!/bin/false\n");
        }
        let config = format!("[build]\ntarget-dir = \"{}\"\n", self.target.display());
        let path = self.directory.join("home/.cargo/config.toml");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, config).unwrap();
    }

    fn set(&mut self, name: &str, value: &str) -> &mut LocalStack {
        self.settings.insert(name.to_owned(), value.to_owned());
        self.write_settings();
        self
    }

    fn unset(&mut self, name: &str) {
        self.settings.remove(name);
        self.write_settings();
    }

    fn write_settings(&self) {
        let lines = self.settings.iter().map(|(name, value)| format!("{name}={value}\n"));
        fs::write(self.root.join(".env"), lines.collect::<String>()).unwrap();
    }

    /// `provision/local` in a shell that has none of the settings.
    fn local(&self, arguments: &[&str]) -> Command {
        let mut command = unfriendly_shell(&self.directory, self.root.join("provision/local"));
        for name in dotenv().keys() {
            command.env_remove(name);
        }
        for name in ["MATINEE_BIN_DIR", "MATINEE_TEST_SERVERS_DIR", "MATINEE_ENV_FILE", "PM2_HOME"]
        {
            command.env_remove(name);
        }
        for name in ["CARGO_HOME", "CARGO_TARGET_DIR", "CARGO_BUILD_TARGET_DIR"] {
            command.env_remove(name);
        }
        let path = std::env::var("PATH").unwrap();
        command.env("PATH", format!("{}:{path}", self.directory.join("bin").display()));
        command.args(arguments).current_dir(&self.directory);
        command
    }

    /// What the command prints; it must succeed.
    fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.local(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
        text(&output)
    }

    fn pids(&self, service: &str) -> Vec<u32> {
        let program = self.target.join("release").join(service);
        let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            (fs::read_link(format!("/proc/{pid}/exe")).ok()? == program).then_some(pid)
        });
        processes.collect()
    }

    fn all_pids(&self) -> Vec<(String, u32)> {
        let of =
            |name: &str| self.pids(name).into_iter().map(|pid| (name.to_owned(), pid)).collect();
        services().iter().flat_map(|row| -> Vec<_> { of(&row.name) }).collect()
    }

    /// SIGKILL for PM2's daemon. Its services run on.
    fn kill_pm2(&self) {
        let pid = parent(self.pids("gateway")[0]);
        signal(pid, "KILL").unwrap();
        eventually("PM2's daemon has ended", 10, || {
            (!Path::new(&format!("/proc/{pid}/exe")).exists()).then_some(())
        });
    }
}

impl Drop for LocalStack {
    fn drop(&mut self) {
        let _ = self.local(&["reset"]).output();
        for (_, pid) in self.all_pids() {
            let _ = signal(pid, "KILL");
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn write_program(path: &Path, script: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, script).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

fn parent(pid: u32) -> u32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // Behind the name in brackets: the state, then the parent.
    let (_, behind) = stat.rsplit_once(") ").unwrap();
    behind.split(' ').nth(1).unwrap().parse().unwrap()
}

fn text(output: &Output) -> String {
    let [stdout, stderr] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{stdout}{stderr}")
}
