-- Products with their stock. Run by the database's owner, like all steps.

-- migrate:up

create table products (
    -- Given by an administrator, never used again. Collation "C": upper and lower case are
    -- different, and the order is that of the bytes.
    sku text collate "C" primary key
        check (sku ~ '^[A-Za-z0-9._-]{1,64}$' and sku !~ '^[.]+$'),
    name text not null check (char_length(name) between 1 and 200),
    description text not null default '' check (char_length(description) <= 2000),
    price numeric(12, 2) not null check (price >= 0),
    image_url text check (char_length(image_url) between 1 and 2000),
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    -- A retired product is neither listed nor sold; its row stays for old orders.
    retired_at timestamptz,
    -- What `search` looks in. Without the description: with it each part of a word would be in some
    -- thousand of 100,000 products, and a search would take four times as long.
    search_text text generated always as (search_key(sku || ' ' || name)) stored
);

-- For `fastupdate` see 001.
create index products_search on products using gin (search_text gin_trgm_ops)
    with (fastupdate = off);

-- A table of its own: each hold of each order changes a row of it, and must neither write the
-- texts of the product again nor touch their index. Half of each page stays empty, so that the new
-- version of a row fits beside the old one and no index changes.
create table stock (
    sku text collate "C" primary key references products,
    on_hand integer not null default 0 check (on_hand <= 1000000000),
    -- Held for orders, still on hand.
    reserved integer not null default 0,
    updated_at timestamptz not null default now(),
    -- Whatever the service does: what is not there cannot be sold.
    constraint stock_not_oversold check (reserved between 0 and on_hand)
) with (fillfactor = 50);

-- Every change of `on_hand` by an administrator: who, when, why.
create table stock_adjustments (
    id bigint generated always as identity primary key,
    sku text collate "C" not null references products,
    -- What was added; the difference where the stock was set.
    change integer not null,
    -- The stock after it.
    on_hand integer not null,
    reason text not null check (char_length(reason) between 1 and 200),
    user_id bigint not null,
    created_at timestamptz not null default now(),
    -- The client's name for its request: the same one again changes nothing.
    idempotency_key text check (char_length(idempotency_key) between 1 and 255),
    constraint stock_adjustments_key unique (user_id, idempotency_key)
);

create index stock_adjustments_sku on stock_adjustments (sku, id);

-- No right to delete: a product is retired, and adjustments are kept.
grant select, insert, update on products, stock to inventory_service;
grant select, insert on stock_adjustments to inventory_service;

-- migrate:down

drop table stock_adjustments, stock, products;
