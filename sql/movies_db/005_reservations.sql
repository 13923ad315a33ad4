-- Stock that is reserved for orders.

-- migrate:up

create table reservations (
    -- The order's id, given by the service that makes orders.
    order_id uuid primary key,
    -- held:      reserved until `expires_at`
    -- confirmed: reserved until it is committed or released
    -- committed: shipped; it has left the stock
    -- released:  given back to the stock
    -- expired:   not confirmed in time, given back to the stock
    state text not null
        check (state in ('held', 'confirmed', 'committed', 'released', 'expired')),
    expires_at timestamptz,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    constraint reservations_expiry check ((state = 'held') = (expires_at is not null))
);

-- For the sweep of holds that have expired.
create index reservations_expiring on reservations (expires_at) where state = 'held';
-- For the deletion of those that reserve nothing any more.
create index reservations_ended on reservations (updated_at)
    where state in ('released', 'expired');

create table reservation_lines (
    order_id uuid not null references reservations on delete cascade,
    -- The place of the line in the order.
    position integer not null check (position >= 0),
    sku text collate "C" not null references stock,
    quantity integer not null check (quantity > 0),
    -- As they were when the stock was reserved.
    name text not null,
    unit_price numeric(12, 2) not null check (unit_price >= 0),
    primary key (order_id, sku)
);

grant select, insert, update, delete on reservations to inventory_service;
grant select, insert, update on reservation_lines to inventory_service;

-- migrate:down

drop table reservation_lines, reservations;
