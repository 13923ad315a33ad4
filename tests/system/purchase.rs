//! The purchase of the README, as it stands there, on all services.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use chassis::testing::{TestDb, TestVhost, repository_root, test_var, unique_name};
use harness::Stack;
use harness::binaries;
use harness::services::services;

/// What the commands of the README have in this test: the scripts on the test's servers.
const SETUP: &str = r#"
set -euo pipefail
root=$(cd "$REPOSITORY" && pwd)
. "$root/provision/lib/env.sh"
. "$root/provision/lib/services.sh"
. "$root/provision/lib/accounts.sh"
. "$root/provision/lib/demo.sh"
load_settings
set +eu
provision/local() {
  case $1 in
    demo) demo ;;
    psql)
      # The message is on its way.
      local deadline=$((SECONDS + 20))
      until "$root/provision/dev-servers" psql "$MATINEE_TEST_SERVERS_DIR" --dbname "$BILLING_DB_NAME" "${@:3}" \
        | tee "$SCRATCH/rows" | grep --quiet '^(1 row)'; do
        ((SECONDS < deadline)) || break
        sleep 0.1
      done
      cat "$SCRATCH/rows"
      ;;
  esac
}
cd "$root"
"#;

/// Marks the end of a command's output.
const END: &str = "=== end of the command ===";

struct Shell {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Shell {
    fn start(mut command: Command) -> Shell {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Shell { child, input, output }
    }

    fn run(&mut self, command: &str) -> String {
        writeln!(self.input, "{command}\nprintf '\\n%s\\n' '{END}'").unwrap();
        let mut output = String::new();
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the shell has ended: {output}");
            if line.trim_end() == END {
                return output.trim_end().to_owned();
            }
            output.push_str(&line);
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The commands of a section's first session, each with its output.
fn session(section: &str) -> Vec<(String, String)> {
    let readme = fs::read_to_string(repository_root().join("README.md")).unwrap();
    let (_, text) = readme.split_once(&format!("\n## {section}\n")).unwrap();
    let (_, block) = text.split_once("\n```\n").unwrap();
    let (block, _) = block.split_once("\n```\n").unwrap();
    let mut commands: Vec<(String, String)> = Vec::new();
    for line in block.lines() {
        match (line.strip_prefix("$ "), commands.last_mut()) {
            (Some(command), _) => commands.push((command.to_owned(), String::new())),
            (None, Some((_, output))) => {
                output.push_str(line);
                output.push('\n');
            }
            (None, None) => panic!("{line:?} is not the output of a command"),
        }
    }
    commands
}

/// Whether an output is as the README shows it; `…` stands for anything.
fn matches(shown: &str, output: &str) -> bool {
    let mut parts = shown.trim_end().split('…');
    let Some(mut rest) = output.strip_prefix(parts.next().unwrap_or_default()) else {
        return false;
    };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[test]
fn the_purchase_of_the_readme_is_answered_as_it_stands_there() {
    let vhost = TestVhost::new();
    let mut stack = Stack::new();
    stack.set("RABBITMQ_VHOST", &vhost.name);
    let with_database = services().iter().filter(|row| row.database.is_some());
    let databases: Vec<TestDb> = with_database
        .map(|row| {
            let name = format!("{}_DB_NAME", row.prefix());
            let db = TestDb::new(&test_var(&name));
            stack.set(&name, &db.name);
            db
        })
        .collect();
    let _services: Vec<_> = services().iter().map(|row| stack.start_and_wait(&row.name)).collect();
    stack.wait_until_ready("gateway", 30);

    let scratch = std::env::temp_dir().join(unique_name("matinee-purchase"));
    fs::create_dir_all(&scratch).unwrap();
    let mut bash = Command::new("bash");
    bash.envs(&stack.env)
        .env("REPOSITORY", repository_root())
        .env("MATINEE_BIN_DIR", binaries::directory())
        .env("SCRATCH", &scratch);
    let mut shell = Shell::start(bash);
    shell.run(SETUP);
    let commands = session("A purchase");
    assert!(commands.len() > 10, "{commands:?}");
    for (command, shown) in commands {
        let here = command.replace("http://127.0.0.1:3000", &stack.service_url("gateway"));
        let output = shell.run(&here);
        assert!(matches(&shown, &output), "{command}\nshown:\n{shown}\nis:\n{output}");
    }

    // The event of a provider, by the script that signs it.
    let order = shell.run("echo ${ORDER##*/}");
    let webhook = format!(
        "\"$root/provision/webhook\" shipments \
         '{{\"id\":\"e-1\",\"type\":\"shipment.delivered\",\"order_id\":\"{order}\"}}'"
    );
    for _ in 0..2 {
        let output = shell.run(&webhook);
        assert!(output.contains("200") && output.contains(&order), "{output}");
    }
    drop(shell);
    fs::remove_dir_all(&scratch).unwrap();
    drop(databases);
}
