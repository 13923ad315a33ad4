-- What other services are told after a change, written in the transaction of the change.

-- migrate:up

-- Messages for the broker. Of one order they are published in the order of their ids.
create table outbox (
    id bigint generated always as identity primary key,
    -- No foreign key, which would cost each message a look: orders are never deleted.
    order_id uuid not null,
    -- The message's id at the broker; a receiver recognises a repetition by it.
    message_id text not null,
    -- queue: to RABBITMQ_QUEUE; exchange: to the exchange of orders
    target text not null check (target in ('queue', 'exchange')),
    routing_key text not null,
    body text not null,
    created_at timestamptz not null default now(),
    published_at timestamptz
);

create index outbox_pending on outbox (id) where published_at is null;
-- Whether all messages of an order are published, and for publishing them again.
create index outbox_order_id on outbox (order_id, id);

-- Calls of inventory. Of one order they are made in the order of their ids.
create table stock_commands (
    id bigint generated always as identity primary key,
    -- No reference: a reservation may have to be released whose order was never made.
    order_id uuid not null,
    command text not null check (command in ('confirm', 'commit', 'release')),
    created_at timestamptz not null default now(),
    attempts integer not null default 0,
    -- Not before this time.
    next_at timestamptz not null default now(),
    done_at timestamptz,
    -- What inventory said last, where that was not success.
    error text
);

create index stock_commands_pending on stock_commands (id) where done_at is null;

-- Events of payment and shipping providers, by the id that the provider gave.
create table webhook_events (
    id text primary key check (char_length(id) between 1 and 255),
    type text not null,
    order_id uuid not null,
    body text not null,
    received_at timestamptz not null default now(),
    -- Why it was refused; null where it took effect. A refused one is kept for a person to look at, and
    -- tried again when the provider sends it again.
    refusal text
);

create index webhook_events_refused on webhook_events (received_at) where refusal is not null;

grant select, insert, update, delete on outbox, stock_commands to orders_service;
grant select, insert, update on webhook_events to orders_service;

-- migrate:down

drop table webhook_events, stock_commands, outbox;
