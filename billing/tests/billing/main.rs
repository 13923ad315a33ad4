//! The service from outside, on a real PostgreSQL and a real RabbitMQ.

mod dead_letters;
mod failures;
mod harness;
mod orders;
mod raw_amqp;
