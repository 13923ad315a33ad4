-- Carts. Run by the database's owner; orders_service is the group role that the service's login
-- belongs to (made by provision/).

-- migrate:up

-- Versions of carts, never used twice: a cart that was emptied and filled again is another version.
create sequence cart_versions;

create table carts (
    user_id bigint primary key,
    version bigint not null,
    updated_at timestamptz not null default now()
);

create table cart_lines (
    user_id bigint not null references carts on delete cascade,
    sku text collate "C" not null check (sku ~ '^[A-Za-z0-9._-]{1,64}$'),
    quantity integer not null check (quantity > 0),
    -- The order of the lines: that in which they were added.
    position bigint generated always as identity,
    primary key (user_id, sku)
);

grant select, insert, update, delete on carts, cart_lines to orders_service;
grant usage on sequence cart_versions to orders_service;

-- migrate:down

drop table cart_lines, carts;
drop sequence cart_versions;
