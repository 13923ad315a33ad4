//! `provision/services`, the table of services: what is refused in it, and what follows from it.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use harness::services::dotenv;
use serde_json::Value;

const PROVISION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../provision");

/// Two services share a machine, and some call services on another one.
const FIVE: &str = "
# service    machine       database      broker    calls
gateway      gateway-vm    -             publish   inventory,customers,orders
inventory    inventory-vm  movies_db     -         customers
customers    inventory-vm  customers_db  -         -
billing      billing-vm    billing_db    consume   -
orders       billing-vm    store_db      publish   inventory,customers
";

/// A table and settings of a test's own.
struct Files {
    directory: PathBuf,
}

impl Files {
    fn new(test: &str, table: &str, settings: &str) -> Files {
        let directory = std::env::temp_dir().join(format!("matinee-{test}-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("services"), table).unwrap();
        fs::write(directory.join("settings"), settings).unwrap();
        Files { directory }
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(program);
        // A variable of the environment would have precedence over the file.
        for name in dotenv().keys() {
            command.env_remove(name);
        }
        command
            .args(arguments)
            .current_dir(PROVISION)
            .env("MATINEE_SERVICES_FILE", self.directory.join("services"))
            .env("MATINEE_ENV_FILE", self.directory.join("settings"))
            .output()
            .unwrap()
    }

    /// Runs a script that has the functions of `lib/services.sh`.
    fn shell(&self, script: &str) -> Output {
        let sources = "set -euo pipefail; . lib/env.sh; . lib/services.sh; ";
        self.run("bash", &["-c", &format!("{sources}{script}")])
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn printed(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn a_malformed_row_of_the_table_of_services_is_refused_with_file_line_and_rule() {
    for (table, error) in [
        ("a m - -\n", "line 1: 4 columns instead of 5"),
        ("\n# a comment\na m - - - -\n", "line 3: 6 columns instead of 5"),
        ("A m - - -\n", "line 1: \"A\" is not the name of a service"),
        ("a_b m - - -\n", "line 1: \"a_b\" is not the name of a service"),
        ("a m - - -\na m - - -\n", "line 2: a is in line 1 already"),
        ("a M! - - -\n", "line 1: \"M!\" is not the name of a machine"),
        ("a m ../x - -\n", "line 1: \"../x\" is not the name of a database"),
        ("a m d - -\nb m d - -\n", "line 2: the database d belongs to a"),
        ("a m - both -\n", "line 1: broker is publish, consume or -"),
        ("a m - - b,\n", "line 1: \"b,\" is no list of services"),
        ("a m - - b\n", "line 1: a calls b, which is not in the table"),
        ("a m - - a\n", "line 1: a is in a circle of calls"),
        ("c m - - -\na m - - b\nb m - - c,a\n", "line 2: a is in a circle of calls"),
        ("# nothing\n", "there is no service in it"),
    ] {
        let files = Files::new("malformed-table", table, "");
        let refused = files.shell("services");
        let text = String::from_utf8(refused.stderr).unwrap();
        assert!(!refused.status.success(), "{table}");
        let file = files.directory.join("services");
        assert!(text.contains(error) && text.contains(&*file.to_string_lossy()), "{table}: {text}");
    }
}

#[test]
fn a_machine_holds_several_services_and_a_service_calls_one_on_another_machine() {
    let files = Files::new("machines", FIVE, "");
    let script = "
        echo $(machines): $(services_on inventory-vm), $(services_on billing-vm), $(services_on none)
        echo $(callers_of customers): $(callees_of orders), $(callees_of billing)
        echo $(services_with database): $(services_with broker)
        echo $(service_field orders database) $(service_field gateway database) $(setting_name billing PORT)";
    let expected = "gateway-vm inventory-vm billing-vm: inventory customers, billing orders,\n\
        gateway inventory orders: inventory customers,\n\
        inventory customers billing orders: gateway billing orders\n\
        store_db BILLING_PORT\n";
    assert_eq!(printed(&files.shell(script)), expected);
    for unknown in ["service_field nothing database", "service_field orders colour", "callers_of x"]
    {
        assert!(!files.shell(unknown).status.success(), "{unknown}");
    }
}

#[test]
fn the_firewall_of_a_machine_lets_in_the_machines_that_call_its_services() {
    let settings = "
VM_GATEWAY_IP=10.0.0.1
VM_INVENTORY_IP=10.0.0.2
VM_BILLING_IP=10.0.0.3
GATEWAY_HOST=0.0.0.0
GATEWAY_PORT=3000
INVENTORY_HOST=10.0.0.2
INVENTORY_PORT=8080
CUSTOMERS_PORT=8082
CUSTOMERS_INTERNAL_PORT=9082
ORDERS_PORT=8083
BILLING_HOST=127.0.0.1
BILLING_PORT=8081
RABBITMQ_PORT=5672
";
    let files = Files::new("firewall", FIVE, settings);
    let rules = |machine: &str| {
        let script = format!("load_settings; . lib/firewall.sh; firewall_rules {machine} | sort");
        printed(&files.shell(&script)).lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(rules("gateway-vm"), ["tcp dport 3000 accept"]);
    assert_eq!(
        rules("inventory-vm"),
        [
            "ip saddr 10.0.0.1 tcp dport 8080 accept",
            "ip saddr 10.0.0.1 tcp dport 8082 accept",
            // inventory has no internal API here; that of customers is not for the gateway.
            "ip saddr 10.0.0.3 tcp dport 8080 accept",
            "ip saddr 10.0.0.3 tcp dport 9082 accept",
        ]
    );
    let expected =
        ["ip saddr 10.0.0.1 tcp dport 5672 accept", "ip saddr 10.0.0.1 tcp dport 8083 accept"];
    assert_eq!(rules("billing-vm"), expected);
}

#[test]
fn a_process_gets_its_own_variables_and_the_addresses_of_what_it_calls_and_no_others() {
    let mut settings = String::from("VM_X=1\nLOG_LEVEL=info\nHTTP_BODY=1\nPOSTGRES_PORT=1\n");
    for name in ["HOST", "PORT", "VHOST", "QUEUE", "HEARTBEAT_S", "ADMIN_PASSWORD", "DIST_PORT"] {
        settings += &format!("RABBITMQ_{name}=1\n");
    }
    for service in ["GATEWAY", "INVENTORY", "CUSTOMERS", "BILLING", "ORDERS"] {
        for name in ["HOST", "PORT", "INTERNAL_PORT", "DB_PASSWORD", "DB_OWNER_PASSWORD"] {
            settings += &format!("{service}_{name}=1\n");
        }
    }
    settings += "ORDERS_INSTANCES=3\n";
    let files = Files::new("variables", FIVE, &settings);
    let script = "console.log(JSON.stringify(require('./ecosystem.config.js').apps))";
    let apps: Value =
        serde_json::from_str(&printed(&files.run("node", &["--eval", script]))).unwrap();

    let variables = |app: &Value| {
        let names = app["env"].as_object().unwrap().keys();
        let mut names: Vec<String> = names
            .filter(|name| !name.starts_with("MALLOC_") && *name != "GLIBC_TUNABLES")
            .cloned()
            .collect();
        names.sort_unstable();
        names.join(" ")
    };
    let broker = "RABBITMQ_HEARTBEAT_S RABBITMQ_HOST RABBITMQ_PORT RABBITMQ_QUEUE RABBITMQ_VHOST";
    let address = |service: &str| format!("{service}_HOST {service}_INTERNAL_PORT {service}_PORT");
    let own = |service: &str| format!("{service}_DB_PASSWORD {}", address(service));
    let expected = [
        ("billing_app", format!("{} HTTP_BODY LOG_LEVEL {broker}", own("BILLING"))),
        ("customers_app", format!("{} HTTP_BODY LOG_LEVEL", own("CUSTOMERS"))),
        (
            "gateway_app",
            format!(
                "{} {} HTTP_BODY {} LOG_LEVEL {} {broker}",
                address("CUSTOMERS"),
                own("GATEWAY"),
                address("INVENTORY"),
                address("ORDERS")
            ),
        ),
        (
            "inventory_app",
            format!("{} HTTP_BODY {} LOG_LEVEL", address("CUSTOMERS"), own("INVENTORY")),
        ),
        (
            "orders_app",
            format!(
                "{} HTTP_BODY {} LOG_LEVEL ORDERS_DB_PASSWORD ORDERS_HOST ORDERS_INSTANCES \
                 ORDERS_INTERNAL_PORT ORDERS_PORT {broker}",
                address("CUSTOMERS"),
                address("INVENTORY")
            ),
        ),
    ];
    let apps = apps.as_array().unwrap();
    assert_eq!(apps.len(), expected.len());
    for (name, expected) in expected {
        let app = apps.iter().find(|app| app["name"] == name).unwrap();
        assert_eq!(variables(app), expected, "{name}");
        let instances = if name == "orders_app" { Value::from(3) } else { Value::Null };
        assert_eq!(app["instances"], instances, "{name}");
    }
}

#[test]
fn rights_at_the_broker_follow_the_table_of_services() {
    let mut settings = String::from(
        "RABBITMQ_VHOST=/\nRABBITMQ_QUEUE=a.queue\nRABBITMQ_ADMIN_USER=admin\nRABBITMQ_ADMIN_PASSWORD=x\n",
    );
    for (service, user) in [("GATEWAY", "gw"), ("BILLING", "bl"), ("ORDERS", "or")] {
        settings += &format!("{service}_RABBITMQ_USER={user}\n{service}_RABBITMQ_PASSWORD=x\n");
    }
    let files = Files::new("broker", FIVE, &settings);
    let definitions: Value =
        serde_json::from_str(&printed(&files.run("./rabbitmq-definitions.sh", &[]))).unwrap();

    let rights = |user: &str| {
        let permissions = definitions["permissions"].as_array().unwrap();
        let found = permissions.iter().find(|entry| entry["user"] == user).unwrap();
        ["configure", "write", "read"].map(|right| found[right].as_str().unwrap())
    };
    let users = definitions["users"].as_array().unwrap();
    let users: Vec<&str> = users.iter().map(|user| user["name"].as_str().unwrap()).collect();
    assert_eq!(users, ["admin", "gw", "bl", "or"]);
    let default_exchange = r"^amq\.default$";
    assert_eq!(rights("admin"), [".*"; 3]);
    assert_eq!(rights("gw"), [r"^a\.queue$", default_exchange, ""]);
    assert_eq!(rights("or"), rights("gw"));
    let both = r"^a\.queue(\.dead)?$";
    assert_eq!(rights("bl"), [both, default_exchange, both]);
}
