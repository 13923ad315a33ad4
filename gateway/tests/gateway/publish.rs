//! Publishing orders, with a real broker.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use chassis::testing::{TestVhost, eventually, management_api, test_var};
use serde_json::{Value, json};

use harness::proxy::{Mode, TcpProxy};
use harness::{Service, Stack, agent, post};

const ORDER: &str = r#"{ "user_id": "20", "number_of_items": 99, "total_amount": 29.90 }"#;

/// A gateway with a virtual host of its own, ready to publish.
fn gateway() -> (Stack, Service, TestVhost) {
    gateway_with(&[])
}

/// The same with settings of its own.
fn gateway_with(settings: &[(&str, &str)]) -> (Stack, Service, TestVhost) {
    let vhost = TestVhost::new();
    let mut stack = Stack::new();
    stack.set("RABBITMQ_VHOST", &vhost.name);
    for (name, value) in settings {
        stack.set(name, value);
    }
    // There is no consumer, so the published messages stay in the queue.
    let service = stack.start_and_wait("gateway");
    connected(&stack);
    (stack, service, vhost)
}

fn connected(stack: &Stack) {
    let url = stack.url("/health/ready");
    eventually("the gateway is connected to the broker", 20, || {
        let text = agent().get(&url).call().ok()?.body_mut().read_to_string().ok()?;
        let ready: Value = serde_json::from_str(&text).ok()?;
        (check(&ready, "rabbitmq")["status"] == "ok").then_some(())
    });
}

/// The line of readiness for a dependency.
fn check<'r>(ready: &'r Value, name: &str) -> &'r Value {
    let checks = ready["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap()
}

fn order_of(user: &str) -> String {
    format!(r#"{{"user_id":"{user}","number_of_items":1,"total_amount":1}}"#)
}

/// Whose order a message is.
fn user_of(message: &Value) -> String {
    let order: Value = serde_json::from_str(message["payload"].as_str().unwrap()).unwrap();
    order["user_id"].as_str().unwrap().to_owned()
}

/// Takes the messages off the queue.
fn queued(vhost: &TestVhost) -> Vec<Value> {
    let path = format!("queues/{}/{}/get", vhost.name, test_var("RABBITMQ_QUEUE"));
    let ask = json!({ "count": 1000, "ackmode": "ack_requeue_false", "encoding": "auto" });
    management_api("POST", &path, Some(ask)).as_array().cloned().unwrap_or_default()
}

#[test]
fn a_200_means_one_persistent_message_with_all_its_properties() {
    let (stack, _gateway, vhost) = gateway();
    for path in ["/api/billing", "/api/billing/"] {
        let (status, answer) = post(&agent(), &stack.url(path), ORDER).unwrap();
        assert_eq!((status, &answer["message"]), (200, &json!("Message posted")));
        let messages = queued(&vhost);
        assert_eq!(messages.len(), 1);
        let (message, properties) = (&messages[0], &messages[0]["properties"]);
        assert_eq!(
            message["payload"],
            r#"{"user_id":"20","number_of_items":99,"total_amount":29.90}"#
        );
        assert_eq!(properties["message_id"], answer["id"]);
        assert_eq!(properties["delivery_mode"], 2);
        assert_eq!(properties["content_type"], "application/json");
        assert_eq!(properties["app_id"], "gateway");
        assert!(properties["timestamp"].as_u64().unwrap() > 1_700_000_000);
    }
}

#[test]
fn a_repeat_with_the_same_key_has_the_same_message_id() {
    let (stack, _gateway, _vhost) = gateway();
    let id = |key: &str, body: &str| {
        let mut answer = agent()
            .post(stack.url("/api/billing"))
            .content_type("application/json")
            .header("Idempotency-Key", key)
            .send(body)
            .unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        let body: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(answer.status(), 200, "{body}");
        body["id"].clone()
    };
    let first = id("\"k-1\"", ORDER);
    assert_eq!(id("k-1", ORDER), first);
    assert_ne!(id("k-2", ORDER), first);
    assert_ne!(id("k-1", &ORDER.replace("20", "21")), first);
}

#[test]
fn an_order_that_billing_would_refuse_is_refused_and_not_queued() {
    let (stack, _gateway, vhost) = gateway();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../billing/messages");
    let mut seen = [0, 0];
    let mut files: Vec<_> =
        fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let body = fs::read_to_string(&file).unwrap();
        let refused = name.starts_with("invalid");
        let (status, answer) = post(&agent(), &stack.url("/api/billing"), &body).unwrap();
        if refused {
            assert!([400, 422].contains(&status), "{name}: {status} {answer}");
            assert_eq!(answer["detail"], answer["error"], "{name}");
        } else {
            assert_eq!(status, 200, "{name}: {answer}");
        }
        assert_eq!(queued(&vhost).len(), usize::from(!refused), "{name}");
        seen[usize::from(refused)] += 1;
    }
    assert!(seen[0] > 1 && seen[1] > 1, "examples found: {seen:?}");
}

#[test]
fn an_order_may_have_16_kib_and_no_more() {
    let (stack, _gateway, vhost) = gateway();
    let order = |length: usize| {
        let begin = r#"{"user_id":1,"number_of_items":1,"total_amount":1,"note":""#;
        format!("{begin}{}\"}}", "x".repeat(length - begin.len() - 2))
    };
    let send = |length| post(&agent(), &stack.url("/api/billing"), &order(length)).unwrap();
    assert_eq!(send(16 << 10).0, 200);
    let (status, answer) = send((16 << 10) + 1);
    assert_eq!((status, &answer["detail"]), (413, &json!("an order may have at most 16384 bytes")));
    assert_eq!(queued(&vhost).len(), 1);
}

#[test]
fn a_body_of_another_type_is_a_415_with_a_hint_and_none_is_taken_as_json() {
    let (stack, _gateway, _vhost) = gateway();
    let send = |kind: Option<&str>| {
        let header = kind.map(|kind| format!("Content-Type: {kind}\r\n")).unwrap_or_default();
        let length = ORDER.len();
        harness::raw(
            stack.address,
            &format!(
                "POST /api/billing HTTP/1.1\r\nHost: h\r\n{header}Content-Length: {length}\r\n\r\n{ORDER}"
            ),
        )
    };
    for kind in [None, Some("application/json; charset=utf-8"), Some("application/vnd.a+json")] {
        assert!(send(kind).starts_with("HTTP/1.1 200"), "{kind:?}");
    }
    let refused = send(Some("application/x-www-form-urlencoded"));
    assert!(
        refused.starts_with("HTTP/1.1 415") && refused.contains("Content-Type: application/json")
    );
}

#[test]
fn a_repeated_header_is_400() {
    let (stack, _gateway, vhost) = gateway();
    for (first, second) in [
        ("Idempotency-Key: a", "Idempotency-Key: b"),
        ("Content-Type: application/json", "Content-Type: text/plain"),
    ] {
        let length = ORDER.len();
        let answer = harness::raw(
            stack.address,
            &format!(
                "POST /api/billing HTTP/1.1\r\nHost: h\r\n{first}\r\n{second}\r\nContent-Length: {length}\r\n\r\n{ORDER}"
            ),
        );
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("is repeated"), "{answer}");
    }
    assert!(queued(&vhost).is_empty());
}

#[test]
fn while_the_broker_is_away_an_order_is_a_503_at_once_and_later_a_200_again() {
    let vhost = TestVhost::new();
    let mut stack = Stack::new();
    stack.set("RABBITMQ_VHOST", "not-yet");
    let mut gateway = stack.start_and_wait("gateway");
    let begun = Instant::now();
    let (status, answer) = post(&agent(), &stack.url("/api/billing"), ORDER).unwrap();
    assert_eq!(status, 503, "{answer}");
    assert_eq!(answer["detail"], "the message broker is not available");
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert!(gateway.child.try_wait().unwrap().is_none(), "{}", gateway.log());
    drop(gateway);

    stack.set("RABBITMQ_VHOST", &vhost.name);
    gateway = stack.start_and_wait("gateway");
    connected(&stack);
    let (status, _) = post(&agent(), &stack.url("/api/billing"), ORDER).unwrap();
    assert_eq!(status, 200, "{}", gateway.log());
}

#[test]
fn connections_closed_by_the_broker_under_load_lose_no_confirmed_order() {
    let (stack, _gateway, vhost) = gateway();
    let ending = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..4)
        .map(|client| {
            let (url, ending) = (stack.url("/api/billing"), Arc::clone(&ending));
            thread::spawn(move || {
                let (agent, mut confirmed) = (agent(), Vec::new());
                let mut refused = 0;
                for order in 0.. {
                    if ending.load(Ordering::SeqCst) {
                        break;
                    }
                    let user = format!("{client}-{order}");
                    match post(&agent, &url, &order_of(&user)).unwrap() {
                        (200, _) => confirmed.push(user),
                        (503, answer) => {
                            assert_eq!(answer["status"], 503, "{answer}");
                            refused += 1;
                        }
                        (status, answer) => panic!("{status}: {answer}"),
                    }
                }
                (confirmed, refused)
            })
        })
        .collect();
    let mut cut = 0;
    // The broker lists a new connection some seconds late.
    eventually("three connections are cut", 60, || {
        let connections =
            management_api("GET", &format!("vhosts/{}/connections", vhost.name), None);
        for connection in connections.as_array().into_iter().flatten() {
            let name = connection["name"].as_str().unwrap().replace(' ', "%20").replace('>', "%3E");
            management_api("DELETE", &format!("connections/{name}"), None);
            cut += 1;
        }
        thread::park_timeout(Duration::from_millis(200));
        (cut >= 3).then_some(())
    });
    connected(&stack);
    ending.store(true, Ordering::SeqCst);
    let mut confirmed = Vec::new();
    for client in clients {
        confirmed.extend(client.join().unwrap().0);
    }
    assert!(confirmed.len() > 10, "confirmed {}", confirmed.len());
    let found: Vec<String> =
        std::iter::from_fn(|| Some(queued(&vhost)).filter(|some| !some.is_empty()))
            .flatten()
            .map(|message| user_of(&message))
            .collect();
    for user in &confirmed {
        let times = found.iter().filter(|found| *found == user).count();
        assert_eq!(times, 1, "{user}");
    }
}

#[test]
fn a_deleted_queue_costs_a_503_and_is_declared_anew() {
    let (stack, gateway, vhost) = gateway();
    management_api(
        "DELETE",
        &format!("queues/{}/{}", vhost.name, test_var("RABBITMQ_QUEUE")),
        None,
    );
    let (status, answer) = post(&agent(), &stack.url("/api/billing"), ORDER).unwrap();
    assert_eq!(status, 503, "an order that no queue took: {answer}");
    eventually("orders are taken again", 10, || {
        let (status, _) = post(&agent(), &stack.url("/api/billing"), ORDER).unwrap();
        (status == 200).then_some(())
    });
    assert!(!queued(&vhost).is_empty(), "{}", gateway.log());
}

#[test]
fn two_hundred_clients_at_once_are_confirmed_also_with_sixteen_in_flight() {
    for most in ["192", "16"] {
        let (stack, _gateway, vhost) = gateway_with(&[("GATEWAY_PUBLISH_MAX_IN_FLIGHT", most)]);
        let clients: Vec<_> = (0..200)
            .map(|_| {
                let url = stack.url("/api/billing");
                thread::spawn(move || post(&agent(), &url, ORDER).unwrap())
            })
            .collect();
        for client in clients {
            let (status, answer) = client.join().unwrap();
            assert_eq!(status, 200, "{most} at a time: {answer}");
        }
        assert_eq!(queued(&vhost).len(), 200);
    }
}

#[test]
fn an_order_reported_as_not_sent_is_never_published() {
    let broker = format!("{}:{}", test_var("RABBITMQ_HOST"), test_var("RABBITMQ_PORT"));
    let proxy = TcpProxy::start(broker.parse().unwrap());
    let (stack, _gateway, vhost) = gateway_with(&[
        ("RABBITMQ_HOST", &proxy.address.ip().to_string()),
        ("RABBITMQ_PORT", &proxy.address.port().to_string()),
        ("GATEWAY_PUBLISH_MAX_IN_FLIGHT", "1"),
        ("GATEWAY_PUBLISH_CONFIRM_TIMEOUT_MS", "20000"),
    ]);
    let url = stack.url("/api/billing");
    let order = move |user: &str| {
        let (status, answer) = post(&agent(), &url, &order_of(user)).unwrap();
        (status, answer["detail"].as_str().unwrap_or_default().to_owned())
    };
    // Each piece of a message takes so long, and its confirm too.
    proxy.set(Mode::Delay(Duration::from_secs(2)));
    let clients: Vec<_> = ["one", "two", "three"]
        .map(|user| (user, order.clone()))
        .map(|(user, order)| (user, thread::spawn(move || order(user))))
        .into();
    eventually("two have given up", 20, || {
        (clients.iter().filter(|(_, client)| client.is_finished()).count() == 2).then_some(())
    });
    // Behind one that was not confirmed for so long the next is not let in.
    let too_many = "too many orders wait for the message broker";
    assert_eq!(order("four"), (503, too_many.to_owned()));
    let answer: Vec<_> =
        clients.into_iter().map(|(user, client)| (user, client.join().unwrap())).collect();
    let (confirmed, unsent): (Vec<_>, Vec<_>) =
        answer.iter().partition(|(_, (status, _))| *status == 200);
    assert_eq!(confirmed.len(), 1, "{answer:?}");
    for (_, (status, answer)) in unsent {
        assert!(
            *status == 503 && (answer.ends_with("was not sent") || answer == too_many),
            "{answer}"
        );
    }

    proxy.set(Mode::Pass);
    assert_eq!(order("five").0, 200);
    let mut came: Vec<String> = queued(&vhost).iter().map(user_of).collect();
    came.sort();
    let mut expected = [confirmed[0].0, "five"];
    expected.sort();
    assert_eq!(came, expected, "{answer:?}");
}

#[test]
fn the_same_idempotency_key_with_another_body_is_422_and_not_queued() {
    let (stack, _gateway, vhost) = gateway();
    let send = |key: &str, amount: &str| {
        let body = format!(r#"{{"user_id":"7","number_of_items":1,"total_amount":{amount}}}"#);
        let mut answer = agent()
            .post(stack.url("/api/billing"))
            .header("Idempotency-Key", key)
            .send(body)
            .unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        (answer.status().as_u16(), serde_json::from_str::<Value>(&text).unwrap())
    };
    let (status, first) = send("k", "1");
    assert_eq!(status, 200, "{first}");
    let (status, problem) = send("k", "2");
    assert_eq!(status, 422, "{problem}");
    assert_eq!(problem["errors"][0]["field"], "Idempotency-Key");
    let (status, again) = send("k", "1");
    assert_eq!((status, &again["id"]), (200, &first["id"]));
    assert_eq!(send("other", "2").0, 200);
    assert_eq!(
        queued(&vhost).len(),
        3,
        "the first order, its repetition, and that of the other key"
    );
}

#[test]
fn orders_are_published_to_a_queue_that_exists_in_another_form() {
    for arguments in [json!({ "x-queue-type": "quorum" }), json!({ "x-max-length": 1000 })] {
        let vhost = TestVhost::new();
        let path = format!("queues/{}/{}", vhost.name, test_var("RABBITMQ_QUEUE"));
        let body = json!({ "durable": true, "arguments": arguments });
        management_api("PUT", &path, Some(body));
        let mut stack = Stack::new();
        stack.set("RABBITMQ_VHOST", &vhost.name);
        let service = stack.start_and_wait("gateway");
        let (status, body) = post(&agent(), &stack.url("/api/billing"), ORDER).unwrap();
        assert_eq!(status, 200, "{body}");
        assert!(service.log().contains("exists in another form"), "{}", service.log());
    }
}

#[test]
fn readiness_says_that_the_broker_refuses_the_login() {
    let mut stack = Stack::new();
    stack.set("GATEWAY_RABBITMQ_PASSWORD", "not the password");
    let _gateway = stack.start_and_wait("gateway");
    eventually("the reason", 20, || {
        let mut answer = agent().get(stack.url("/health/ready")).call().ok()?;
        let text = answer.body_mut().read_to_string().ok()?;
        text.contains("the broker refuses the login").then_some(())
    });
}
