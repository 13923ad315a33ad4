//! A database and a virtual host for one test, and billing between them.

use std::collections::HashMap;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use amiquip::{AmqpProperties, AmqpValue, Connection, FieldTable, QueueDeleteOptions};
use billing::config::Config;
use billing::consumer;
use chassis::broker::{self, Message, Publisher, SocketDeadline, declare_queue};
use chassis::testing::{
    TestDb, TestVhost, admin_broker, eventually, management_api, own_address, test_var,
};
use chassis::{Env, Stop};
use postgres::Client;

/// A database and a virtual host of their own, and the settings for billing.
pub(crate) struct BillingFixture {
    pub(crate) db: TestDb,
    pub(crate) vhost: TestVhost,
    settings: HashMap<&'static str, String>,
}

/// A dead letter.
#[derive(Debug)]
pub(crate) struct DeadLetter {
    pub(crate) message_id: Option<String>,
    pub(crate) reason: String,
    pub(crate) body: Vec<u8>,
    pub(crate) headers: FieldTable,
}

impl BillingFixture {
    pub(crate) fn new() -> BillingFixture {
        let (db, vhost) = (TestDb::new(&test_var("BILLING_DB_NAME")), TestVhost::new());
        // A free port of 127.0.0.1 may be taken by a connection before billing listens there.
        let address = own_address();
        let settings = HashMap::from([
            ("BILLING_DB_NAME", db.name.clone()),
            ("RABBITMQ_VHOST", vhost.name.clone()),
            ("BILLING_HOST", address.to_string()),
            ("BILLING_METRICS_LISTEN", format!("{address}:9303")),
        ]);
        BillingFixture { db, vhost, settings }
    }

    /// With another value for a variable.
    pub(crate) fn with(mut self, name: &'static str, value: &str) -> BillingFixture {
        self.settings.insert(name, value.to_owned());
        self
    }

    pub(crate) fn config(&self) -> Config {
        let settings = self.settings.clone();
        Config::from_env(Env::from_fn(move |name| {
            settings.get(name).cloned().or_else(|| std::env::var(name).ok())
        }))
        .unwrap()
    }

    /// The consumer on a thread of this process.
    pub(crate) fn consume(&self) -> RunningConsumer {
        let (config, stop) = (self.config(), Stop::default());
        let stopped = stop.clone();
        let status = Arc::new(consumer::Status::default());
        let thread = thread::spawn(move || consumer::run(&config, &stopped, &status));
        RunningConsumer { stop, thread: Some(thread) }
    }

    /// The real binary.
    pub(crate) fn start(&self) -> Process {
        Process(self.command().spawn().unwrap())
    }

    /// `billing dead-letters …`
    pub(crate) fn dead_letters(&self, arguments: &[&str]) -> Output {
        self.command().stderr(Stdio::piped()).arg("dead-letters").args(arguments).output().unwrap()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_billing"));
        command.envs(&self.settings).stdout(Stdio::piped());
        // What it logs is of interest only to who runs a single test and asks for it.
        if std::env::var_os("BILLING_TEST_LOG").is_none() {
            command.stderr(Stdio::null());
        }
        command
    }

    /// As the administrator, who may do what the service may not.
    pub(crate) fn admin(&self) -> broker::Config {
        admin_broker(&self.vhost.name)
    }

    /// Publishes messages, each an id (or "" for none) and a body; returns when all are confirmed.
    pub(crate) fn post<B: AsRef<[u8]>>(&self, messages: &[(impl AsRef<str>, B)]) {
        let queue = self.config().queue;
        let mut publisher = Publisher::connect(&self.admin(), "test", &queue).unwrap();
        for some in messages.chunks(200) {
            let messages = some.iter().map(|(id, body)| {
                Message::to_queue(&queue, body.as_ref(), properties(id.as_ref()))
            });
            publisher.publish_and_wait(messages.collect()).unwrap();
        }
    }

    /// All orders in the order booked: user, items and amount.
    pub(crate) fn orders(&self) -> Vec<(String, i32, String)> {
        let rows = self
            .db
            .superuser()
            .query(
                "select user_id, number_of_items, total_amount::text from orders order by id",
                &[],
            )
            .unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect()
    }

    pub(crate) fn users(&self) -> Vec<String> {
        self.orders().into_iter().map(|(user, ..)| user).collect()
    }

    /// Waits until so many orders are booked and nothing is left in the queue.
    pub(crate) fn await_orders(&self, count: i64, seconds: u64) {
        let mut db = self.db.superuser();
        eventually(format!("{count} orders"), seconds, || (booked(&mut db) >= count).then_some(()));
        eventually("an empty queue", seconds, || (self.depth("") == 0).then_some(()));
        assert_eq!(booked(&mut db), count);
    }

    /// Messages in the queue that are not with a consumer; `suffix` may be ".dead".
    pub(crate) fn depth(&self, suffix: &str) -> usize {
        let (mut connection, deadline) = self.admin().connect("test").unwrap();
        let queue = format!("{}{suffix}", self.config().queue);
        let (_channel, count) = declare_queue(&mut connection, &deadline, &queue).unwrap();
        connection.close().unwrap();
        drop(deadline);
        count as usize
    }

    /// Returns how many messages were in the queue after all.
    pub(crate) fn delete_queue_when_all_is_delivered(&self) -> u32 {
        let (mut connection, _deadline): (Connection, SocketDeadline) =
            self.admin().connect("operator").unwrap();
        let channel = connection.open_channel(None).unwrap();
        let queue = self.config().queue;
        eventually("all is delivered", 30, || {
            let declared = channel.queue_declare_passive(&queue).unwrap();
            (declared.declared_message_count() == Some(0)).then_some(())
        });
        channel.queue_delete(&queue, QueueDeleteOptions::default()).unwrap()
    }

    /// Takes messages and closes the channel, as a consumer that dies: they are delivered again.
    pub(crate) fn deliver_without_acknowledging(&self, count: usize) {
        let (mut connection, _deadline): (Connection, SocketDeadline) =
            self.admin().connect("test").unwrap();
        let channel = connection.open_channel(None).unwrap();
        for _ in 0..count {
            assert!(channel.basic_get(self.config().queue, false).unwrap().is_some());
        }
        channel.close().unwrap();
        eventually("them back in the queue", 10, || (self.depth("") == count).then_some(()));
    }

    /// Leaves a second copy of the only dead letter, as a lost confirm would.
    pub(crate) fn copy_dead_letter(&self) {
        let (mut connection, _deadline): (Connection, SocketDeadline) =
            self.admin().connect("test").unwrap();
        let channel = connection.open_channel(None).unwrap();
        let queue = self.config().dead_letter_queue();
        let got = channel.basic_get(queue.as_str(), true).unwrap().unwrap();
        let mut publisher = Publisher::connect(&self.admin(), "test", &queue).unwrap();
        for _ in 0..2 {
            let properties = got.delivery.properties.clone();
            publisher
                .publish_and_wait(vec![Message::to_queue(&queue, &got.delivery.body, properties)])
                .unwrap();
        }
    }

    /// Waits for so many dead letters and takes them.
    pub(crate) fn await_dead_letters(&self, count: usize, seconds: u64) -> Vec<DeadLetter> {
        eventually(format!("{count} dead letters"), seconds, || {
            (self.depth(".dead") >= count).then_some(())
        });
        let dead = self.take_dead_letters();
        assert_eq!(dead.len(), count, "{dead:?}");
        dead
    }

    /// Takes all there are.
    pub(crate) fn take_dead_letters(&self) -> Vec<DeadLetter> {
        let (mut connection, _deadline): (Connection, SocketDeadline) =
            self.admin().connect("test").unwrap();
        let channel = connection.open_channel(None).unwrap();
        let mut dead = Vec::new();
        while let Some(got) = channel.basic_get(self.config().dead_letter_queue(), true).unwrap() {
            let properties = &got.delivery.properties;
            let reason = properties.headers().as_ref().and_then(|headers| headers.get("x-reason"));
            let Some(AmqpValue::LongString(reason)) = reason else {
                panic!("no reason: {properties:?}")
            };
            dead.push(DeadLetter {
                message_id: properties.message_id().clone(),
                reason: reason.clone(),
                body: got.delivery.body.clone(),
                headers: properties.headers().clone().unwrap_or_default(),
            });
        }
        dead
    }

    /// Breaks every connection to this test's database but the test's own.
    pub(crate) fn break_database_connections_but(&self, db: &mut Client) {
        db.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity
             where datname = current_database() and pid <> pg_backend_pid()",
            &[],
        )
        .unwrap();
    }

    /// Breaks every connection of billing to the broker; returns how many there were.
    pub(crate) fn break_broker_connections(&self) -> usize {
        let connections =
            management_api("GET", &format!("vhosts/{}/connections", self.vhost.name), None);
        let connections = connections.as_array().cloned().unwrap_or_default();
        let ours = connections
            .iter()
            .filter(|it| it["user"] == test_var("BILLING_RABBITMQ_USER").as_str());
        let names = ours.filter_map(|it| it["name"].as_str());
        let path = |name: &str| name.replace('%', "%25").replace(' ', "%20").replace('>', "%3E");
        names
            .map(|name| management_api("DELETE", &format!("connections/{}", path(name)), None))
            .count()
    }
}

pub(crate) fn booked(db: &mut Client) -> i64 {
    db.query_one("select count(*) from orders", &[]).unwrap().get(0)
}

fn properties(id: &str) -> AmqpProperties {
    // Persistent, as the gateway publishes.
    let properties = AmqpProperties::default().with_delivery_mode(2);
    if id.is_empty() { properties } else { properties.with_message_id(id.to_owned()) }
}

/// Status and body; 0 without an answer.
pub(crate) fn get(url: &str) -> (u16, String) {
    let agent = ureq::Agent::config_builder().http_status_as_error(false).proxy(None).build();
    match ureq::Agent::from(agent).get(url).call() {
        Ok(mut answer) => {
            (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap_or_default())
        }
        Err(_) => (0, String::new()),
    }
}

/// An order's body, body from others by its user.
pub(crate) fn order(user: impl std::fmt::Display) -> String {
    format!(r#"{{"user_id":"{user}","number_of_items":1,"total_amount":9.99}}"#)
}

/// Orders of the users 0, 1, 2 … with ids.
pub(crate) fn numbered(count: usize) -> Vec<(String, String)> {
    (0..count).map(|number| (format!("id-{number}"), order(number))).collect()
}

/// A consumer on a thread; stopped at the end.
pub(crate) struct RunningConsumer {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Drop for RunningConsumer {
    fn drop(&mut self) {
        self.stop.request();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking(), "the consumer panicked");
        }
    }
}

/// A process; killed at the end.
pub(crate) struct Process(pub(crate) Child);

impl Process {
    pub(crate) fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// SIGTERM.
    pub(crate) fn terminate(&mut self) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
