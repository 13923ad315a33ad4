//! Declaring a queue, and what the broker's refusals mean.

use amiquip::{Channel, Connection, Queue, QueueDeclareOptions};

use super::{CALL_TIMEOUT, SocketDeadline};

/// AMQP 0-9-1 reply codes (section 1.2 of its reference): the queue exists with other arguments,
/// the login lacks a right, there is no such queue.
const PRECONDITION_FAILED: u16 = 406;
const ACCESS_REFUSED: u16 = 403;
const NOT_FOUND: u16 = 404;

/// Opens a channel on which the queue is declared: durable and without arguments, so that any other
/// client's plain durable declaration is the same. A queue that exists in another form (a quorum
/// queue, or with arguments) is used as it is, and one log line says what differs.
pub fn declare_queue(
    connection: &mut Connection,
    deadline: &SocketDeadline,
    queue: &str,
) -> anyhow::Result<(Channel, u32)> {
    let channel = deadline.with_deadline(CALL_TIMEOUT, || connection.open_channel(None))?;
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let count = |declared: Queue<'_>| declared.declared_message_count().unwrap_or_default();
    let refusal = match deadline
        .with_deadline(CALL_TIMEOUT, || channel.queue_declare(queue, durable).map(count))
    {
        Ok(count) => return Ok((channel, count)),
        Err(amiquip::Error::ServerClosedChannel { code, message, .. })
            if code == PRECONDITION_FAILED =>
        {
            message
        }
        Err(err) => return Err(err.into()),
    };
    // The refusal has closed the channel. A passive declaration only asks whether the queue exists.
    let channel = deadline.with_deadline(CALL_TIMEOUT, || connection.open_channel(None))?;
    let count =
        deadline.with_deadline(CALL_TIMEOUT, || channel.queue_declare_passive(queue).map(count))?;
    log::warn!("{queue} exists in another form and is used as it is: {refusal}");
    Ok((channel, count))
}

/// What an operator must change where waiting will not help: for readiness. `None` for a broker
/// that is only away. It holds no secret.
pub fn permanent_reason(err: &anyhow::Error) -> Option<&'static str> {
    err.chain().find_map(|cause| match cause.downcast_ref::<amiquip::Error>()? {
        amiquip::Error::InvalidCredentials => Some("the broker refuses the login"),
        amiquip::Error::ServerClosedConnection { code, message } if *code == 530 => {
            // NOT_ALLOWED: there is no such virtual host, or the login may not use it.
            match message.contains("not found") {
                true => Some("the broker has no such virtual host"),
                false => Some("the login may not use the virtual host"),
            }
        }
        amiquip::Error::ServerClosedConnection { code, .. }
        | amiquip::Error::ServerClosedChannel { code, .. } => match *code {
            ACCESS_REFUSED => Some("the login lacks a right on the queue"),
            PRECONDITION_FAILED => Some("the queue exists in a form that cannot be used"),
            NOT_FOUND => Some("the queue does not exist"),
            _ => None,
        },
        _ => None,
    })
}
