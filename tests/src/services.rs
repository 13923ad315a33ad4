//! The table of services, `provision/services`, and the settings of `.env`.

use std::collections::HashMap;
use std::fs;
use std::sync::LazyLock;

use chassis::testing::repository_root;

/// A row of the table.
#[derive(Debug)]
pub struct ServiceRow {
    /// Its name: that of its crate and its program.
    pub name: String,
    /// The machine that runs it.
    pub machine: String,
    /// The folder of `sql/` with its migrations.
    pub database: Option<String>,
    /// `publish` or `consume`: what it may do at the broker.
    pub broker: Option<String>,
    /// The services that it sends HTTP requests to.
    pub calls: Vec<String>,
}

impl ServiceRow {
    /// How its variables begin: `INVENTORY`.
    pub fn prefix(&self) -> String {
        self.name.to_ascii_uppercase()
    }

    /// The port of `.env` behind this suffix: `PORT`, or the end of `METRICS_LISTEN`.
    pub fn port(&self, suffix: &str) -> u16 {
        let name = format!("{}_{suffix}", self.prefix());
        let value = dotenv().get(&name).unwrap_or_else(|| panic!(".env has no {name}"));
        let port = value.rsplit(':').next().and_then(|port| port.parse().ok());
        port.unwrap_or_else(|| panic!(".env: {name} has no port"))
    }
}

/// All services, in the order of the table.
pub fn services() -> &'static [ServiceRow] {
    static SERVICES: LazyLock<Vec<ServiceRow>> = LazyLock::new(|| {
        let text = fs::read_to_string(repository_root().join("provision/services")).unwrap();
        text.lines().map(str::trim).filter(|line| !line.is_empty()).filter_map(read_row).collect()
    });
    &SERVICES
}

/// The row of this service.
pub fn service(name: &str) -> &'static ServiceRow {
    let found = services().iter().find(|row| row.name == name);
    found.unwrap_or_else(|| panic!("provision/services has no {name}"))
}

/// Every setting of the file `.env`, whatever the environment says.
pub fn dotenv() -> &'static HashMap<String, String> {
    static SETTINGS: LazyLock<HashMap<String, String>> = LazyLock::new(|| {
        let text = fs::read_to_string(repository_root().join(".env")).unwrap();
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let pairs = lines.filter_map(|line| line.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    });
    &SETTINGS
}

/// `None` for a comment.
fn read_row(line: &str) -> Option<ServiceRow> {
    if line.starts_with('#') {
        return None;
    }
    let columns: Vec<&str> = line.split_whitespace().collect();
    let [name, machine, database, broker, calls] = columns[..] else {
        panic!("provision/services: {line:?} has not five columns")
    };
    let some = |column: &str| (column != "-").then(|| column.to_owned());
    let calls = some(calls).unwrap_or_default();
    Some(ServiceRow {
        name: name.to_owned(),
        machine: machine.to_owned(),
        database: some(database),
        broker: some(broker),
        calls: calls.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect(),
    })
}
