-- What billing remembers so that a crash neither books an order twice nor loops
-- on a message that causes the crash. Both tables are empty nearly all the time.

-- migrate:up

-- Orders booked from messages without an id, until the broker is known to have
-- seen their acknowledgement. Written in the transaction that books them; a
-- redelivered message whose digest is in here may be booked already.
create table in_doubt (
    id bigint generated always as identity primary key,
    -- Which transaction: a random number of its own.
    batch bigint not null,
    digest bytea not null,
    booked_at timestamptz not null default now()
);

create index in_doubt_digest on in_doubt (digest);
create index in_doubt_batch on in_doubt (batch);

-- How often a redelivered message was taken in hand alone and not brought to an
-- end: a message that kills the process is given up after a few of them.
create table attempts (
    -- SHA-256 of the message's body.
    digest bytea primary key,
    count integer not null,
    last_at timestamptz not null default now()
);

grant select, insert, delete on in_doubt to billing_service;
grant select, insert, update, delete on attempts to billing_service;

-- migrate:down

drop table attempts;
drop table in_doubt;
