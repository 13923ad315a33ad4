-- The booked orders. Run by the database's owner; billing_service is the group
-- role that the service's login belongs to (made by provision/).

-- migrate:up

create table orders (
    id bigint generated always as identity primary key,
    user_id text not null check (char_length(user_id) between 1 and 255),
    number_of_items integer not null check (number_of_items >= 0),
    total_amount numeric(14, 2) not null check (total_amount >= 0)
);

-- What makes "booked exactly once" true although messages come at least once:
-- the id of each booked message, written in the transaction that books it.
create table processed_messages (
    message_id text primary key check (char_length(message_id) between 1 and 255),
    -- SHA-256 of what was ordered: tells a repeat from another order under the same id.
    digest bytea not null,
    processed_at timestamptz not null default now()
);

-- For forgetting the old ones.
create index processed_messages_processed_at on processed_messages (processed_at);

grant select, insert on orders to billing_service;
grant select, insert, delete on processed_messages to billing_service;

-- migrate:down

drop table processed_messages;
drop table orders;
