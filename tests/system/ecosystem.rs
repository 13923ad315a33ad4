//! `provision/ecosystem.config.js`: PM2 gives each process its own variables and no others.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use chassis::testing::{repository_root, unique_name};
use harness::services::{ServiceRow, dotenv, service, services};
use serde_json::Value;

/// What a variable that begins so is to a service: `RABBITMQ_HOST` is everyone's who uses the
/// broker, `INVENTORY_HOST` that of inventory and of those that call it.
fn may_have(row: &ServiceRow, name: &str) -> bool {
    let own = format!("{}_", row.prefix());
    let broker = [
        "RABBITMQ_HOST",
        "RABBITMQ_PORT",
        "RABBITMQ_VHOST",
        "RABBITMQ_QUEUE",
        "RABBITMQ_HEARTBEAT_S",
    ];
    let address_of_callee = row.calls.iter().any(|callee| {
        let prefix = service(callee).prefix();
        ["HOST", "PORT", "INTERNAL_PORT"].iter().any(|part| name == format!("{prefix}_{part}"))
    });
    let of_the_owner = name.contains("_DB_OWNER");
    let shared = ["AUTH_", "HTTP_", "LOG_", "STORE_"].iter().any(|prefix| name.starts_with(prefix));
    !of_the_owner
        && (name.starts_with(&own)
            || shared
            || address_of_callee
            || (row.broker.is_some() && broker.contains(&name)))
}

/// The apps of the ecosystem file, evaluated by node with this `.env`.
fn apps(env_file: &str) -> BTreeMap<String, Value> {
    let script = "console.log(JSON.stringify(require(process.argv[1]).apps))";
    let file = repository_root().join("provision/ecosystem.config.js");
    let output = Command::new("node")
        .args(["--eval", script])
        .arg(&file)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("MATINEE_ENV_FILE", env_file)
        // Variables of the caller, which belong to no process.
        .env("AWS_SECRET_ACCESS_KEY", "of the caller")
        .env("RUST_LOG", "trace")
        .output()
        .unwrap_or_else(|err| panic!("node: {err}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let apps: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    apps.into_iter().map(|app| (app["name"].as_str().unwrap().to_owned(), app)).collect()
}

#[test]
fn each_process_gets_the_variables_that_its_service_reads_and_no_others() {
    // Also a variable that no service knows, and one of a service that is not in the table.
    let mut settings: BTreeMap<String, String> =
        dotenv().iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    settings.insert("STRANGER_DB_PASSWORD".to_owned(), "x".to_owned());
    settings.insert("BILLINGS_PASSWORD".to_owned(), "x".to_owned());
    let text: String = settings.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
    let env_file = std::env::temp_dir().join(unique_name("matinee-env"));
    fs::write(&env_file, text).unwrap();
    let apps = apps(&env_file.display().to_string());
    fs::remove_file(&env_file).unwrap();

    let names: Vec<String> = services().iter().map(|row| format!("{}_app", row.name)).collect();
    assert_eq!(apps.len(), names.len(), "{:?}", apps.keys());
    for (row, name) in services().iter().zip(names) {
        let app = &apps[&name];
        let mut given: BTreeMap<String, String> = app["env"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, value)| (name.clone(), value.as_str().unwrap_or_default().to_owned()))
            .collect();
        // Settings of glibc for memory; no service reads them.
        given.retain(|name, _| !name.starts_with("MALLOC_") && name != "GLIBC_TUNABLES");
        let mut expected = settings.clone();
        expected.retain(|name, _| may_have(row, name));
        assert_eq!(given, expected, "{name}");
        // PM2 leaves out each variable of the caller whose name contains one of these.
        assert_eq!(app["filter_env"], serde_json::json!([""]), "{name}");
    }
}
