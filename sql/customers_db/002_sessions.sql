-- Sessions, their refresh tokens, and the list of sessions that have ended.

-- migrate:up

create table sessions (
    id uuid primary key,
    user_id bigint not null references users,
    created_at timestamptz not null default now(),
    last_used_at timestamptz not null default now(),
    -- The earlier of two times: some days after the last use, and some days after the login.
    expires_at timestamptz not null
);

create index sessions_user_id on sessions (user_id);
create index sessions_expires_at on sessions (expires_at);

create table refresh_tokens (
    -- SHA-256 of the token: the token itself is stored nowhere.
    hash bytea primary key check (octet_length(hash) = 32),
    session_id uuid not null references sessions on delete cascade,
    -- When it was exchanged for another one. A spent token that is used again may be stolen.
    spent_at timestamptz
);

create index refresh_tokens_session_id on refresh_tokens (session_id);
create index refresh_tokens_spent_at on refresh_tokens (spent_at) where spent_at is not null;

-- Sessions that have ended while access tokens of them may be valid. Other services read the list
-- from the last number that they know.
create table revocations (
    number bigint primary key,
    session_id uuid not null,
    -- When the last of its access tokens has expired.
    until timestamptz not null
);

create index revocations_until on revocations (until);

create sequence revocation_numbers;

-- Numbers are given under a lock that is held until the commit, so they become visible in their
-- order: a reader that remembers the last number misses none.
create function number_revocation() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pg_advisory_xact_lock('public.revocations'::regclass::oid::bigint);
    new.number := nextval('public.revocation_numbers');
    return new;
end
$$;

create trigger number_revocation
before insert on revocations
for each row
execute function number_revocation();

grant select, insert, update, delete on sessions, refresh_tokens to customers_service;
grant select, insert, delete on revocations to customers_service;
grant usage on sequence revocation_numbers to customers_service;

-- migrate:down

drop table revocations;
drop function number_revocation();
drop sequence revocation_numbers;
drop table refresh_tokens;
drop table sessions;
