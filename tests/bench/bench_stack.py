"""Servers, services and load generators for provision/bench, and what each of them costs."""

import contextlib
import ctypes
import http.client
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LOCAL = ROOT / ".local"
RELEASE = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
SERVERS = ROOT / "provision/dev-servers"
MS, MB = 1e3, 1 << 20

# What wrk asks: made in advance, so that making it costs the machine nothing meanwhile.
WRK = """
local threads, requests, next = 0, {}, 0
function setup(thread) threads = threads + 1; thread:set("seed", threads) end
function init(args)
  local kind, rows = args[1], tonumber(args[2])
  holds, buys, token, json = kind == "hold", kind == "buy", args[3], { ["Content-Type"] = "application/json" }
  math.randomseed(os.time() * 100 + seed)
  for i = 1, 4096 do
    local n = math.random(rows)
    if kind == "movie" then requests[i] = wrk.format("GET", "/api/movies/" .. n)
    elseif kind == "product" then requests[i] = wrk.format("GET", "/api/v1/products/p" .. n)
    elseif kind == "search" then
      local texts = {}
      for text in args[3]:gmatch("%S+") do texts[#texts + 1] = text end
      requests[i] = wrk.format("GET", "/api/v1/products?search=" .. texts[math.random(#texts)])
    elseif kind == "hold" then requests[i] = '{"hold_seconds":3600,"lines":[{"sku":"p' .. n .. '","quantity":1}]}'
    elseif kind == "get" then requests[i] = wrk.format("GET", args[3], args[4] and { Authorization = "Bearer " .. args[4] })
    elseif kind == "buy" then requests[i] = '{"items":[{"sku":"p' .. n .. '","quantity":1}]}'
    elseif kind == "login" then requests[i] = wrk.format("POST", "/api/v1/auth/login", json, args[3])
    elseif kind == "add" then requests[i] = wrk.format("POST", "/api/movies", json,
      '{"title":"Movie ' .. n .. '","description":"' .. args[3] .. '"}')
    else requests[i] = wrk.format("POST", "/api/billing", json,
      '{"user_id":"' .. n .. '","number_of_items":"5","total_amount":"180"}') end
  end
end
function request()
  next = next + 1
  local made = requests[next % 4096 + 1]
  if not holds and not buys then return made end
  -- Each order once, in this run and in others.
  local order = string.format("%08x-%04x-7000-8000-%012x", math.random(0, 0x7fffffff), seed, next)
  if buys then
    return wrk.format("POST", "/api/v1/orders",
      { ["Content-Type"] = "application/json", ["Idempotency-Key"] = order, Authorization = "Bearer " .. token }, made)
  end
  return wrk.format("PUT", "/internal/reservations/" .. order, json, made)
end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format('\\n{"requests":%d,"seconds":%f,"errors":%d,"p50":%f,"p99":%f}\\n',
    summary.requests, summary.duration / 1e6, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""
# The two statements of inventory's store.rs, as pgbench takes them.
SELECT = "\\set id random(1, {rows})\nselect id, title, description, xmin::text as version\nfrom movies\nwhere id = :id;\n"
INSERT = ("\\set n random(1, {rows})\ninsert into movies (title, description)\n"
          "values ('Movie ' || :n::text, :text::text)\nreturning id, title, description, xmin::text as version;\n")
# The statements of a hold of reservations/store.rs, one order of one line.
HOLD = """\\set n random(1, {rows})
begin;
insert into reservations (order_id, state, expires_at)
select order_id, 'held', now() + make_interval(secs => seconds)
from unnest(array[gen_random_uuid()], array[3600::float8]) as claims (order_id, seconds)
order by order_id
on conflict (order_id) do nothing
returning order_id as id \\gset
select sku, on_hand - reserved as available, name, price::text, retired_at is not null as retired
from stock join products using (sku)
where sku = any(array['p' || :n::text])
order by sku
for no key update of stock;
with taken as (
    update stock
    set reserved = reserved + wanted.quantity, updated_at = now()
    from unnest(array['p' || :n::text], array[1]) as wanted (sku, quantity)
    where stock.sku = wanted.sku
)
insert into reservation_lines (order_id, position, sku, quantity, name, unit_price)
select order_id, position, sku, quantity, name, price::numeric
from unnest(array[:id::uuid], array[0], array['p' || :n::text], array[1], array['a name'], array['9.99'])
    as lines (order_id, position, sku, quantity, name, price)
on conflict (order_id, sku) do update
set name = excluded.name, unit_price = excluded.unit_price;
commit;
"""
# The statements of an order of orders/create.rs with an idempotency key, one line.
ORDER = """\\set n random(1, {rows})
select gen_random_uuid() as id, gen_random_uuid() as event \\gset
insert into idempotency_keys as known (user_id, key, digest, order_id, locked_until)
select 1, :id::text, sha256(:id::text::bytea), :id::uuid, clock_timestamp() + 14.5 * interval '1 second'
from (select set_config('synchronous_commit', 'off', true)) as setting
on conflict (user_id, key) do update
set digest = excluded.digest,
    order_id = case when known.digest = excluded.digest then known.order_id else excluded.order_id end,
    locked_until = excluded.locked_until
where known.answer is null and known.locked_until <= clock_timestamp()
returning order_id;
begin;
with made as (
    insert into orders (id, user_id, customer_email, items_total, shipping_cost, tax_amount, total_amount, currency,
        created_at, updated_at)
    values (:id::uuid, 1, 'bench@example.org', 9.99, 0, 0, 9.99, 'EUR', now(), now())
    on conflict (id) do nothing
    returning id
), lined as (
    insert into order_lines (order_id, position, sku, name, unit_price, quantity, line_total)
    select made.id, place - 1, sku, name, price::numeric, quantity, total::numeric
    from made
    cross join unnest(array['p' || :n::text], array['a name'], array['9.99'], array[1], array['9.99'])
        with ordinality as line (sku, name, price, quantity, total, place)
)
select count(*) from made;
update idempotency_keys
set etag = 'a tag', answer = repeat('x', 1000)
where user_id = 1 and key = :id::text and order_id = :id::uuid and answer is null;
with event as (
    insert into order_events (id, order_id, version, type, status, actor, actor_id, reason, occurred_at)
    values (:event::uuid, :id::uuid, 1, 'created', 'pending', 'customer', 1, null, now())
), told as (
    insert into outbox (order_id, message_id, target, routing_key, body)
    select :id::uuid, message_id, target, routing_key, body
    from unnest(array['a', 'b'], array['exchange', 'exchange'], array['order.created', 'created_order'],
        array[repeat('x', 900), repeat('x', 250)]) with ordinality as message (message_id, target, routing_key, body, place)
    order by place
)
insert into stock_commands (order_id, command) select :id::uuid, 'confirm';
commit;
"""
TEXT = "A film of which this text says so much that an answer has some three hundred bytes."


# --- processes, and what they cost ----------------------------------------------

def tree(root):
    """A process and all its descendants, by pid."""
    children = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int(pathlib.Path(entry.path, "stat").read_text().rsplit(")", 1)[1].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu(root):
    """Seconds of CPU of a tree of processes, with those that have ended."""
    ticks = 0
    for pid in tree(root):
        with contextlib.suppress(OSError):
            ticks += sum(map(int, pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def kib(pid, file, name):
    for line in pathlib.Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    return 0


def pss(root):
    """Bytes of memory of a tree of processes; what they share is counted once."""
    total = 0
    for pid in tree(root):
        with contextlib.suppress(OSError):
            total += kib(pid, "smaps_rollup", "Pss") << 10
    return total


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Stack:
    """Servers, services and nginx, on free ports, in a directory of their own."""

    def __init__(self, seconds):
        self.seconds = seconds
        remove_dead()
        self.directory = LOCAL / f"bench-{os.getpid()}"
        self.servers = self.directory / "servers"
        self.directory.mkdir(parents=True)
        self.processes = {}
        self.env = settings()
        names = "POSTGRES_PORT RABBITMQ_PORT RABBITMQ_MANAGEMENT_PORT RABBITMQ_DIST_PORT RABBITMQ_EPMD_PORT".split()
        self.services = services()
        prefixes = [name.upper() for name in self.services]
        names += [f"{prefix}_{suffix}" for prefix in (*prefixes, "TOKENS") for suffix in ("PORT", "INTERNAL_PORT")]
        ports = free_ports(len(names) + len(prefixes) + 2)
        self.env.update(zip(names, map(str, ports)))
        for prefix in prefixes:
            self.env[f"{prefix}_DB_PORT"] = self.env["POSTGRES_PORT"]
        for name in ("RABBITMQ", "TOKENS", *prefixes, *(f"{prefix}_DB" for prefix in prefixes)):
            self.env[f"{name}_HOST"] = "127.0.0.1"
        self.nginx_port, *ports = ports[len(names):]
        for prefix, port in zip((*prefixes, "TOKENS"), ports):
            self.env[f"{prefix}_METRICS_LISTEN"] = f"127.0.0.1:{port}"
        self.env["MATINEE_BIN_DIR"] = str(RELEASE)
        self.env["PATH"] += ":/usr/sbin:/sbin"
        (self.directory / "wrk.lua").write_text(WRK)
        newest = max(pathlib.Path("/usr/lib/postgresql").glob("*/bin/pgbench"), key=lambda path: float(path.parts[-3]))
        self.pgbench, self.psql = newest, newest.with_name("psql")

    def __enter__(self):
        try:
            run([SERVERS, "start", self.servers], self.env)
            script = "JSON.stringify(require('./provision/ecosystem.config.js').apps)"
            self.apps = json.loads(run(["node", "--print", script], self.env))
            self.pids = {
                "PostgreSQL": int((self.servers / "postgres/data/postmaster.pid").read_text().split()[0]),
                "RabbitMQ": int((self.servers / "rabbitmq/pid").read_text()),
            }
            self.start("customers", "inventory", "orders", "gateway")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for name in list(self.processes):
            self.stop(name)
        remove(self.directory, self.env)

    def port(self, service):
        if service == "nginx":
            return self.nginx_port
        # "inventory internal" is its listener for other services.
        return int(self.env[f"{service.upper().replace(' ', '_')}_PORT"])

    def start(self, *services, **env):
        """Starts them as PM2 would, and waits until each is ready; returns the seconds of each."""
        took = {}
        for service in services:
            app = next(app for app in self.apps if app["name"] == f"{service}_app")
            took[service] = self.launch(service, [pathlib.Path(app["cwd"], app["script"])], app["env"] | env, "/health/ready")
        return took

    def launch(self, name, command, env, path):
        self.stop(name)
        begun = time.monotonic()
        with open(self.directory / f"{name}.log", "a") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       preexec_fn=die_with_parent)
        self.processes[name] = process
        self.pids[name] = process.pid
        while time.monotonic() < begun + 30 and process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port(name), timeout=5)
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return time.monotonic() - begun
            time.sleep(0.001)
        raise RuntimeError(f"{name} does not start:\n" + (self.directory / f"{name}.log").read_text()[-2000:])

    def start_nginx(self):
        """The same work as the gateway's: two workers, kept connections, a line of log for each request."""
        (self.directory / "nginx.conf").write_text(f"""
            daemon off; worker_processes 2; pid {self.directory}/nginx.pid; error_log {self.directory}/nginx-error.log;
            {"user root;" if os.geteuid() == 0 else ""}
            events {{ worker_connections 2048; }}
            http {{
              log_format line '$time_iso8601 $request_method $uri $status $request_time $body_bytes_sent $request_id $remote_addr';
              access_log {self.directory}/nginx-access.log line;
              client_body_temp_path {self.directory}/nginx-body; proxy_temp_path {self.directory}/nginx-proxy;
              fastcgi_temp_path {self.directory}/nginx-1; uwsgi_temp_path {self.directory}/nginx-2; scgi_temp_path {self.directory}/nginx-3;
              upstream inventory {{ server 127.0.0.1:{self.port("inventory")}; keepalive 192; keepalive_requests 1000000000; }}
              server {{
                listen 127.0.0.1:{self.nginx_port} backlog=1024; keepalive_requests 1000000000;
                location / {{
                  proxy_pass http://inventory; proxy_http_version 1.1; proxy_set_header Connection "";
                  proxy_set_header X-Request-Id $request_id; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
                  proxy_set_header X-Forwarded-Proto http; proxy_set_header X-Forwarded-Host $host;
                  proxy_connect_timeout 1s; proxy_read_timeout 5s; proxy_send_timeout 5s;
                }}
              }}
            }}""")
        self.launch("nginx", ["nginx", "-c", self.directory / "nginx.conf"], self.env, "/health")

    def stop(self, *names):
        for name in names:
            process = self.processes.pop(name, None)
            if process:
                del self.pids[name]
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def sql(self, database, text):
        """Runs SQL as the superuser; the rows, as tuples of texts."""
        out = run(self.psql_command(database), self.database_env("POSTGRES_SUPERUSER"), input=text)
        return [tuple(line.split("|")) for line in out.splitlines()]

    def psql_command(self, database):
        return [self.psql, "-XqtA", "-v", "ON_ERROR_STOP=1", "-d", self.env[f"{database}_DB_NAME"]]

    def database_env(self, user):
        password = self.env[f"{user}_PASSWORD" if user == "POSTGRES_SUPERUSER" else user.replace("USER", "PASSWORD")]
        return {**self.env, "PGHOST": "127.0.0.1", "PGPORT": self.env["POSTGRES_PORT"], "PGUSER": self.env[user],
                "PGPASSWORD": password}

    def fill(self, rows):
        """So many movies and no others; the indexes are made afterwards, which is faster."""
        indexes = self.sql("INVENTORY", "select indexname, indexdef from pg_indexes where tablename = 'movies'"
                           " and indexname <> 'movies_pkey';")
        self.sql("INVENTORY", "truncate movies restart identity;" + "".join(f"drop index {name};" for name, _ in indexes)
                 + f"insert into movies (title, description) select 'Movie ' || n, '{TEXT}' from generate_series(1, {rows}) n;"
                 + "".join(f"{definition};" for _, definition in indexes) + "vacuum analyze movies; checkpoint;")

    def fill_products(self, rows):
        """So many products, each with plenty in stock, and no reservation; returns the first two words of the names of
        some, separated by %20. Names have three and descriptions twelve of 3,000 made-up words."""
        syllables = [a + b for a in "bdfghjklmnprstvwz" for b in "aeiou"]
        chosen = random.Random(1)
        words = ["".join(chosen.choices(syllables, k=chosen.randint(2, 4))) for _ in range(3000)]
        names = [chosen.choices(words, k=3) for _ in range(rows)]
        lines = (f"p{number}\t{' '.join(name)}\t{' '.join(chosen.choices(words, k=12))}\t9.99"
                 for number, name in enumerate(names, 1))
        self.sql("INVENTORY", "truncate reservation_lines, reservations, stock_adjustments, stock, products;\n"
                 "copy products (sku, name, description, price) from stdin;\n" + "\n".join(lines) + "\n\\.\n"
                 "insert into stock (sku, on_hand) select sku, 1000000000 from products;")
        self.sql("INVENTORY", "vacuum analyze products;\nvacuum analyze stock;\ncheckpoint;")
        return ["%20".join(name[:2]) for name in names[:500]]

    def fill_orders(self, rows):
        """So many delivered orders of one line, with all that follows from them: a plan for an empty table is no plan for
        one that is in use."""
        self.sql("ORDERS", f"""
            begin;
            create temp table made on commit drop as select gen_random_uuid() as id, n from generate_series(1, {rows}) as n;
            insert into orders (id, user_id, status, customer_email, items_total, shipping_cost, tax_amount, total_amount, currency,
                payment_reference, paid_amount, paid_at, carrier, tracking_number, shipped_at, delivered_at, created_at, updated_at)
            select id, n % 1000 + 1000, 'delivered', 'bench@example.org', 9.99, 0, 0, 9.99, 'EUR',
                'a payment', 9.99, now(), 'post', n, now(), now(), now(), now() from made;
            insert into order_lines (order_id, position, sku, name, unit_price, quantity, line_total)
            select id, 0, 'p' || n % 10000 + 1, 'a name', 9.99, 1, 9.99 from made;
            insert into order_events (id, order_id, version, type, status, actor, occurred_at)
            select gen_random_uuid(), id, 1, 'created', 'pending', 'customer', now() from made;
            insert into idempotency_keys (user_id, key, digest, order_id, locked_until, etag, answer)
            select n % 1000 + 1000, n, sha256(n::text::bytea), id, now(), 'a tag', repeat('x', 1000) from made;
            insert into outbox (order_id, message_id, target, routing_key, body, published_at)
            select id, n, 'exchange', 'order.created', repeat('x', 900), now() from made;
            insert into stock_commands (order_id, command, done_at) select id, 'confirm', now() from made;
            commit;""")
        self.sql("ORDERS", "vacuum analyze;")
        self.sql("INVENTORY", f"""
            begin;
            create temp table made on commit drop as select gen_random_uuid() as id, n from generate_series(1, {rows}) as n;
            insert into reservations (order_id, state) select id, 'committed' from made;
            insert into reservation_lines (order_id, position, sku, quantity, name, unit_price)
            select id, 0, 'p' || n % 10000 + 1, 1, 'a name', 9.99 from made;
            commit;""")
        self.sql("INVENTORY", "vacuum analyze reservations; vacuum analyze reservation_lines;")
        self.sql("INVENTORY", "checkpoint;")

    def queue(self, method, path=""):
        """Asks RabbitMQ's management for the queue of orders."""
        vhost, queue = (urllib.parse.quote(self.env[name], safe="") for name in ("RABBITMQ_VHOST", "RABBITMQ_QUEUE"))
        url = f"http://127.0.0.1:{self.env['RABBITMQ_MANAGEMENT_PORT']}/api/queues/{vhost}/{queue}{path}"
        passwords = urllib.request.HTTPPasswordMgrWithPriorAuth()
        passwords.add_password(None, url, self.env["RABBITMQ_ADMIN_USER"], self.env["RABBITMQ_ADMIN_PASSWORD"], True)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPBasicAuthHandler(passwords))
        return opener.open(urllib.request.Request(url, method=method), timeout=60).read()

    def metric(self, service, name):
        """The sum of a metric over its labels."""
        url = f"http://{self.env[f'{service.upper()}_METRICS_LISTEN']}/metrics"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        lines = opener.open(url, timeout=10).read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    # --- one measurement

    def cost(self, parts, work):
        """Runs a load; adds what each part spent in CPU for a request, and the memory it had at most."""
        for log in self.directory.glob("*.log"):
            os.truncate(log, 0)
        own = [part for part in parts if part in (*self.services, "tokens")]
        for part in own:
            if part in self.pids:
                pathlib.Path(f"/proc/{self.pids[part]}/clear_refs").write_text("5")  # VmHWM begins anew
        before = {part: cpu(self.pids[part]) if part in self.pids else 0 for part in parts}
        client = client_cpu()
        peaks, ended = dict.fromkeys(set(parts) - set(own), 0), threading.Event()

        def sample():
            while not ended.wait(min(1, self.seconds / 2)):
                for part in peaks:
                    peaks[part] = max(peaks[part], pss(self.pids.get(part, 0)))

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            measured = work()
        finally:
            ended.set()
            sampler.join()
        done = max(1, measured["requests"] - measured["errors"])
        measured["rate"] = done / measured["seconds"]
        measured["cpu"] = {"client": (client_cpu() - client) * 1e6 / done}
        measured["cpu"] |= {part: (cpu(self.pids[part]) - before[part]) * 1e6 / done for part in parts}
        measured["memory"] = {part: kib(self.pids[part], "status", "VmHWM") << 10 if part in own else peaks[part] for part in parts}
        return measured

    def wrk(self, service, connections, kind, rows, parts, *arguments):
        """`arguments` are what the kind of request needs besides; a text of a movie by default."""
        return self.cost(parts, lambda: self.wrk_alone(service, connections, kind, *(arguments or (TEXT,)), rows=rows))

    def wrk_alone(self, service, connections, kind, *arguments, rows=1):
        """Without what it costs: beside another load."""
        threads = min(2, connections)
        command = ["wrk", "-t", threads, "-c", connections, "-d", f"{self.seconds}s", "--timeout", "10s", "-s", self.directory / "wrk.lua",
                   f"http://127.0.0.1:{self.port(service)}", "--", kind, rows, *arguments]
        return json.loads(run(command, self.env).splitlines()[-1])

    def bench_sql(self, clients, script, rows, service="INVENTORY"):
        (self.directory / "pgbench.sql").write_text(script.format(rows=rows))
        logs = self.directory / "transactions"
        command = [self.pgbench, "-n", "-M", "prepared", "-c", clients, "-j", min(2, clients), "-T", self.seconds,
                   "-f", self.directory / "pgbench.sql", "-D", f"text={TEXT}", "--log", "--log-prefix", logs,
                   "--sampling-rate", "0.1", self.env[f"{service}_DB_NAME"]]

        def work():
            out = run(command, self.database_env(f"{service}_DB_USER"))
            number = lambda start: float(next(l for l in out.splitlines() if l.startswith(start)).split("=")[1].split()[0])
            latencies = sorted(int(line.split()[2]) / MS for path in self.directory.glob("transactions.*")
                               for line in path.read_text().splitlines())
            for path in self.directory.glob("transactions.*"):
                path.unlink()
            done = int(next(l for l in out.splitlines() if "actually processed" in l).split(":")[1].split("/")[0])
            return {"requests": done, "seconds": done / number("tps"), "errors": 0} | quantiles(latencies)

        return self.cost(["PostgreSQL"], work)

    def example(self, name, arguments, parts):
        command = [RELEASE / name, *arguments]
        return self.cost(parts, lambda: json.loads(run(command, self.env)))


# --- small things ---------------------------------------------------------------------

def run(command, env=None, input=None):
    """Its output; what it complains of is shown when it fails."""
    done = subprocess.run([str(word) for word in command], env=env, input=input, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def call(stack, service, method, path, body=None, token=None, client=None):
    """The status of a request and its JSON, or None."""
    connection = http.client.HTTPConnection("127.0.0.1", stack.port(service), timeout=30)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    headers |= {"X-Real-IP": client} if client else {}
    connection.request(method, path, json.dumps(body) if body is not None else None, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if text else None


def get(stack, service, path, keep=False):
    """One GET by hand: when the first byte came, and when the last, in ms; or, kept, the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", stack.port(service), timeout=60)
    connection.connect()
    begun, size = time.perf_counter(), 0
    connection.request("GET", path)
    answer = connection.getresponse()
    first = (time.perf_counter() - begun) * MS
    while piece := answer.read(1 << 18):
        size += len(piece)
    if answer.status != 200:
        raise RuntimeError(f"GET {path} answers {answer.status}")
    if keep:
        return connection
    connection.close()
    return {"first": first, "total": (time.perf_counter() - begun) * MS, "bytes": size}


def quantiles(ordered):
    at = lambda share: ordered[int((len(ordered) - 1) * share)] if ordered else 0
    return {"p50": at(0.5), "p99": at(0.99), "max": at(1)}


def client_cpu():
    """Seconds of CPU of the load generators that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def services():
    """The names of all services, from their table."""
    rows = (line.split() for line in (ROOT / "provision/services").read_text().splitlines())
    return [row[0] for row in rows if row and not row[0].startswith("#")]


def settings():
    """The environment, and what .env adds to it, by the rule of the scripts; without libpq's variables."""
    script = '. "$1/provision/lib/env.sh"; load_settings; exec env --null'
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script, "bench", str(ROOT)], check=True, capture_output=True)
    return dict(line.split("=", 1) for line in done.stdout.decode().split("\0") if line)


def free_ports(count):
    """Below the range from which the kernel takes ports for outgoing connections."""
    ports = set()
    while len(ports) < count:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            ports.add(port)
    return sorted(ports)


def remove(directory, env):
    run([SERVERS, "remove", directory / "servers"], env)
    shutil.rmtree(directory, ignore_errors=True)


def remove_dead():
    """What was left behind by one that was killed so hard that it could not clean up."""
    for directory in LOCAL.glob("bench-[0-9]*"):
        with contextlib.suppress(OSError):
            if b"bench" in pathlib.Path(f"/proc/{directory.name[6:]}/cmdline").read_bytes():
                continue
        remove(directory, settings())
