-- The movie catalogue. Run by the database's owner; inventory_service is the
-- group role that the service's login belongs to (made by provision/).

-- migrate:up

-- For titles searched by a part of them; trusted, so the owner may create it.
create extension if not exists pg_trgm;

create table movies (
    id bigint generated always as identity primary key,
    -- Characters, not bytes; the service trims before it counts.
    title text not null check (char_length(title) between 1 and 255),
    -- Empty when there is none: one way to say "nothing", so never null.
    description text not null default '' check (char_length(description) <= 10000)
);

-- Serves `title ilike '%part%'`; parts under three letters fall back to a scan.
-- Without fastupdate an insert costs about 0.1 ms more, but no search has to look
-- through a list of up to 4 MB of entries that are not in the index yet.
create index movies_title_trgm on movies using gin (title gin_trgm_ops) with (fastupdate = off);

grant select, insert, update, delete on movies to inventory_service;

-- Deletes every movie, starts the ids again at 1, and tells how many there were.
-- A function of the owner's, because only an owner may restart a sequence and
-- the service shall own nothing.
create function delete_all_movies() returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    deleted bigint;
begin
    lock table public.movies in access exclusive mode;
    select count(*) into deleted from public.movies;
    truncate public.movies restart identity;
    return deleted;
end
$$;

revoke all on function delete_all_movies() from public;
grant execute on function delete_all_movies() to inventory_service;

-- migrate:down

drop function delete_all_movies();
drop table movies;
drop extension pg_trgm;
