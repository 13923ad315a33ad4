-- Movies that were imported with ids of their own do not stop the service from adding
-- movies, and a deletion of all movies does not stop it from reading them.

-- migrate:up

-- Makes the next id greater than every id in the table. An import with explicit ids
-- (`overriding system value`) does not advance the sequence, so an insert may get an id
-- that is taken (unique_violation). The service then calls this and inserts once more.
-- It runs with the rights of the owner, because the service has no right on the sequence.
-- It never sets the sequence back: the lock makes concurrent calls wait for each other,
-- and each looks at the sequence anew.
create function advance_movie_ids() returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '500ms'
as $$
declare
    greatest_id bigint;
begin
    perform pg_advisory_xact_lock('public.movies_id_seq'::regclass::oid::bigint);
    select max(id) into greatest_id from public.movies;
    if greatest_id > coalesce(pg_sequence_last_value('public.movies_id_seq'), 0) then
        perform setval('public.movies_id_seq', greatest_id);
    end if;
end
$$;

revoke all on function advance_movie_ids() from public;
grant execute on function advance_movie_ids() to inventory_service;

-- The deletion waits for transactions that use the table, for a backup too, and reads that
-- come later wait behind it. After 500 ms it fails with lock_not_available, which the
-- service answers with 503 and Retry-After; the reads are served then. This is shorter than
-- the time that a request waits for a connection (1000 ms by default).
alter function delete_all_movies() set lock_timeout = '500ms';

-- migrate:down

alter function delete_all_movies() reset lock_timeout;
drop function advance_movie_ids();
