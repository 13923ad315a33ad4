-- Customers' accounts. Run by the database's owner. customers_service is the group role of
-- the service's login; provision/migrate.sh makes both.

-- migrate:up

-- For searching users by a part of their names. The extension is trusted: the owner may
-- create it without being a superuser.
create extension if not exists pg_trgm;

create table users (
    -- Never used again, also after a deletion.
    id bigint generated always as identity primary key,
    email text check (char_length(email) between 3 and 254),
    -- The form in which e-mails and user names are compared: Unicode normal form KC in
    -- lower case. The service makes it.
    email_key text,
    username text check (char_length(username) between 1 and 64),
    username_key text,
    first_name text check (char_length(first_name) between 1 and 100),
    last_name text check (char_length(last_name) between 1 and 100),
    -- argon2id as a PHC string, with parameters and salt.
    password_hash text,
    is_admin boolean not null default false,
    disabled boolean not null default false,
    shipping_address json,
    billing_address json,
    payment_method json,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    deleted_at timestamptz,
    -- What `search` looks in.
    search_text text generated always as (
        lower(upper(normalize(
            coalesce(email, '') || ' ' || coalesce(username, '') || ' '
            || coalesce(first_name, '') || ' ' || coalesce(last_name, ''), nfc)))
    ) stored,
    constraint users_live check (
        deleted_at is not null
        or (email is not null and email_key is not null and password_hash is not null)),
    constraint users_username_and_key check ((username is null) = (username_key is null)),
    -- A deleted account has no personal data left.
    constraint users_deleted check (
        deleted_at is null
        or (email is null and email_key is null and username is null and first_name is null
            and last_name is null and password_hash is null and shipping_address is null
            and billing_address is null and payment_method is null and not is_admin))
);

create unique index users_email_key on users (email_key);
create unique index users_username_key on users (username_key);
create index users_search on users using gin (search_text gin_trgm_ops) with (fastupdate = off);

-- There is always an administrator who can log in, whatever changes the table. Two changes at
-- once wait for each other: each looks at the table anew when it has the lock.
create function keep_one_administrator() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pg_advisory_xact_lock('public.users'::regclass::oid::bigint);
    if not exists (
        select from public.users
        where is_admin and not disabled and deleted_at is null and id <> old.id
    ) then
        raise exception 'the last administrator' using errcode = 'MA001';
    end if;
    return new;
end
$$;

create trigger keep_one_administrator
before update on users
for each row
when (
    old.is_admin and not old.disabled and old.deleted_at is null
    and not (new.is_admin and not new.disabled and new.deleted_at is null))
execute function keep_one_administrator();

-- No right to delete: a deletion removes the data and keeps the row.
grant select, insert, update on users to customers_service;

-- migrate:down

drop table users;
drop function keep_one_administrator();
drop extension pg_trgm;
