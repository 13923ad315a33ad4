//! A message as billing receives it: any client may publish any body with any id.

use billing::consumer::parse_message;

/// Uses the first line as message id and as `Idempotency-Key`, and the rest as body. Panics where
/// billing panics, or rejects a message that the gateway has made.
pub fn check(input: &[u8]) {
    let mut parts = input.splitn(2, |byte| *byte == b'\n');
    let line = String::from_utf8_lossy(parts.next().unwrap_or_default());
    let body = parts.next().unwrap_or_default();
    match parse_message(Some(&line), body) {
        Ok((id, _)) => {
            assert_eq!(id.unwrap_or_default(), line);
            assert!(line.chars().count() <= 255 && !line.contains('\0'));
        }
        // A panic in `read` ends the fuzzer by itself.
        Err(reason) => assert!(!reason.is_empty()),
    }
    let key = chassis::request::parse_idempotency_key(&line);
    let order =
        str::from_utf8(body).ok().and_then(|text| gateway::billing::order::Order::parse(text).ok());
    let Some(order) = order else { return };
    let id = order.message_id(key.as_deref().ok());
    let (read_id, _) =
        parse_message(Some(&id), order.body.as_bytes()).expect("billing takes the message");
    assert_eq!(read_id, Some(id.as_str()));
    if let Ok(key) = key {
        assert_eq!(order.message_id(Some(&key)), id, "the same key gives the same id");
    }
}
