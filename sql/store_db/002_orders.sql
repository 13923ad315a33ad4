-- Orders, their lines and their history, and the keys that make creating one repeatable.

-- migrate:up

create table orders (
    -- UUIDv7, made before the first attempt: the order of ids is that of their making.
    id uuid primary key,
    user_id bigint not null,
    store_id text check (char_length(store_id) between 1 and 100),
    -- pending:    not paid yet
    -- processing: paid, not shipped yet
    -- shipped, delivered, canceled
    status text not null default 'pending'
        check (status in ('pending', 'processing', 'shipped', 'delivered', 'canceled')),
    -- Goes up with each change; a part of the entity tag.
    version bigint not null default 1,

    -- Of the customer, as they were when the order was made.
    customer_name text,
    customer_email text not null,
    -- JSON objects. Not jsonb: the order of the fields is that of the answers.
    shipping_address json,
    billing_address json,
    payment_method json,

    items_total numeric(12, 2) not null check (items_total >= 0),
    shipping_cost numeric(12, 2) not null check (shipping_cost >= 0),
    tax_amount numeric(12, 2) not null check (tax_amount >= 0),
    total_amount numeric(12, 2) not null,
    currency text not null check (currency ~ '^[A-Z]{3}$'),

    -- What the payment provider said.
    payment_kind text check (char_length(payment_kind) between 1 and 100),
    payment_reference text check (char_length(payment_reference) between 1 and 200),
    paid_amount numeric(12, 2),
    paid_at timestamptz,
    -- A paid order was canceled, and the money is not given back yet.
    refund_due boolean not null default false,
    refund_reference text check (char_length(refund_reference) between 1 and 200),
    refunded_at timestamptz,

    carrier text check (char_length(carrier) between 1 and 100),
    tracking_number text check (char_length(tracking_number) between 1 and 100),
    shipped_at timestamptz,
    delivered_at timestamptz,

    cancellation_reason text check (char_length(cancellation_reason) between 1 and 200),
    canceled_at timestamptz,

    created_at timestamptz not null,
    updated_at timestamptz not null,
    -- Gone for its owner, kept for the books.
    deleted_at timestamptz,

    constraint orders_total check (total_amount = items_total + shipping_cost + tax_amount),
    constraint orders_paid check (
        (paid_at is not null) = (paid_amount is not null)
        and (paid_at is not null) = (payment_reference is not null)
        and (paid_amount is null or paid_amount = total_amount)
        and case status
            when 'pending' then paid_at is null
            when 'canceled' then true
            else paid_at is not null
        end
    ),
    constraint orders_shipped check (
        (status in ('shipped', 'delivered')) = (shipped_at is not null)
        and (shipped_at is not null) = (tracking_number is not null)
        and (shipped_at is not null) = (carrier is not null)
        and (status = 'delivered') = (delivered_at is not null)
    ),
    constraint orders_canceled check (
        (status = 'canceled') = (canceled_at is not null)
        and (not refund_due or (status = 'canceled' and paid_at is not null))
        and (refunded_at is null or (status = 'canceled' and paid_at is not null and not refund_due))
    ),
    constraint orders_deleted check (
        deleted_at is null or status in ('delivered', 'canceled')
    )
) with (fillfactor = 70);

-- The lists, of one customer and of all; and, by the time in the id, what is not paid in time.
create index orders_user_id on orders (user_id, id);
create index orders_status on orders (status, id);

create table order_lines (
    order_id uuid not null references orders,
    position integer not null check (position >= 0),
    sku text collate "C" not null,
    -- As they were when the order was made.
    name text not null,
    unit_price numeric(12, 2) not null check (unit_price >= 0),
    quantity integer not null check (quantity > 0),
    line_total numeric(12, 2) not null,
    primary key (order_id, sku),
    constraint order_lines_total check (line_total = unit_price * quantity)
);

-- The sum of the lines, checked when the transaction that makes an order commits.
create function check_items_total() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if new.items_total is distinct from (
        select sum(line_total) from public.order_lines where order_id = new.id
    ) then
        raise exception 'items_total is not the sum of the lines'
            using errcode = 'check_violation', constraint = 'orders_items_total';
    end if;
    return null;
end
$$;

create constraint trigger orders_items_total
after insert or update of items_total on orders
deferrable initially deferred
for each row
execute function check_items_total();

-- What happened to an order, in its order.
create table order_events (
    id uuid primary key,
    order_id uuid not null references orders,
    -- The order's version after it.
    version bigint not null,
    -- created, paid, payment_failed, updated, shipped, delivered, canceled, refunded, deleted
    type text not null check (type ~ '^[a-z_]{1,30}$'),
    status text not null,
    -- customer, administrator, provider (by a webhook) or service (by itself)
    actor text not null check (actor in ('customer', 'administrator', 'provider', 'service')),
    -- The customer or the administrator.
    actor_id bigint,
    reason text,
    occurred_at timestamptz not null,
    constraint order_events_version unique (order_id, version)
);

-- The client's names for its requests: the same one again gets the first answer.
create table idempotency_keys (
    user_id bigint not null,
    key text not null check (char_length(key) between 1 and 255),
    -- SHA-256 of the request.
    digest bytea not null check (octet_length(digest) = 32),
    -- The order that the request makes; the same in each attempt.
    order_id uuid not null,
    -- Until then the attempt that runs is alone; afterwards it is given up.
    locked_until timestamptz not null,
    -- The answer, with the order.
    etag text,
    answer text,
    created_at timestamptz not null default now(),
    primary key (user_id, key),
    constraint idempotency_keys_answer check ((etag is null) = (answer is null))
);

-- For the deletion of old ones: rows are added in the order of their time, so a summary of each block
-- range will do, and costs an insertion nearly nothing.
create index idempotency_keys_created_at on idempotency_keys using brin (created_at);

-- No right to delete an order, a line or an event: the books are kept.
grant select, insert, update on orders to orders_service;
grant select, insert on order_lines, order_events to orders_service;
grant select, insert, update, delete on idempotency_keys to orders_service;

-- migrate:down

drop table idempotency_keys, order_events, order_lines, orders;
drop function check_items_total();
