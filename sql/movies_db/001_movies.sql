-- The movie catalogue. Run by the database's owner. inventory_service is the group role
-- of the service's login; provision/migrate.sh makes both.

-- migrate:up

-- For searching titles by a part. The extension is trusted: the owner may create it
-- without being a superuser.
create extension if not exists pg_trgm;

create table movies (
    id bigint generated always as identity primary key,
    -- Limits are in characters, not in bytes. The service removes white space around the
    -- title before it counts.
    title text not null check (char_length(title) between 1 and 255),
    -- A movie without a description has an empty one, never null: there is one way to say
    -- "none".
    description text not null default '' check (char_length(description) <= 10000)
);

-- Serves `title ilike '%part%'`; a part of fewer than three letters scans the table.
-- With fastupdate, new entries would first go to a list of up to 4 MB that every search
-- has to read. Without it, an insert takes about 0.1 ms more.
create index movies_title_trgm on movies using gin (title gin_trgm_ops) with (fastupdate = off);

grant select, insert, update, delete on movies to inventory_service;

-- Deletes all movies, makes ids start again at 1, and returns the number of movies that
-- were deleted. It runs with the rights of the owner, because only the owner may restart
-- a sequence, and the service owns nothing.
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
