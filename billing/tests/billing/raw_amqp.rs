//! Publishing what no well-behaved library would: AMQP by hand.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use chassis::broker;

/// Publishes a message to a queue with properties given as their bytes: the
/// flags, then the values. Returns when the broker has confirmed it.
pub(crate) fn publish(config: &broker::Config, queue: &str, properties: &[u8], body: &[u8]) {
    let mut broker = TcpStream::connect(config.address).unwrap();
    broker.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    broker.write_all(b"AMQP\0\0\x09\x01").unwrap();
    await_method(&mut broker, 10, 10);
    let login = format!("\0{}\0{}", config.user, config.password.expose());
    let length = u32::try_from(login.len()).unwrap().to_be_bytes();
    let start_ok = [&[0; 4], &*short("PLAIN"), &length, login.as_bytes(), &short("en_US")].concat();
    method(&mut broker, 0, 10, 11, &start_ok);
    await_method(&mut broker, 10, 30);
    method(&mut broker, 0, 10, 31, &[0, 1, 0, 2, 0, 0, 0, 0]);
    method(&mut broker, 0, 10, 40, &[&*short(&config.vhost), &[0, 0]].concat());
    await_method(&mut broker, 10, 41);
    method(&mut broker, 1, 20, 10, &[0]);
    await_method(&mut broker, 20, 11);
    method(&mut broker, 1, 85, 10, &[0]);
    await_method(&mut broker, 85, 11);
    method(&mut broker, 1, 60, 40, &[&[0, 0, 0], &*short(queue), &[0]].concat());
    let size = (body.len() as u64).to_be_bytes();
    frame(&mut broker, 2, 1, &[&[0, 60, 0, 0], &size[..], properties].concat());
    frame(&mut broker, 3, 1, body);
    await_method(&mut broker, 60, 80);
}

fn short(text: &str) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat()
}

fn method(broker: &mut TcpStream, channel: u16, class: u16, number: u16, arguments: &[u8]) {
    let payload = [&class.to_be_bytes(), &number.to_be_bytes(), arguments].concat();
    frame(broker, 1, channel, &payload);
}

fn frame(broker: &mut TcpStream, kind: u8, channel: u16, payload: &[u8]) {
    let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let frame = [&[kind][..], &channel.to_be_bytes(), &size, payload, &[0xce]].concat();
    broker.write_all(&frame).unwrap();
}

fn await_method(broker: &mut TcpStream, class: u16, number: u16) {
    let mut head = [0; 7];
    broker.read_exact(&mut head).unwrap();
    let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
    let mut rest = vec![0; size + 1];
    broker.read_exact(&mut rest).unwrap();
    assert_eq!(rest[..4], [class.to_be_bytes(), number.to_be_bytes()].concat(), "{rest:?}");
}
