// The three processes as PM2 runs them: on a laptop by provision/local, in the VMs by root's PM2.
// Settings come from .env; a variable that is set in the environment of the pm2 command wins.

const fs = require('node:fs')
const path = require('node:path')

const root = path.resolve(__dirname, '..')
const envFile = process.env.MATINEE_ENV_FILE || path.join(root, '.env')
const binaries = path.resolve(root, process.env.MATINEE_BIN_DIR || 'target/release')

const settings = Object.fromEntries(
  fs.readFileSync(envFile, 'utf8')
    .split(/\r?\n/)
    .map(line => /^([A-Za-z_][A-Za-z0-9_]*)=(.*)$/.exec(line))
    .filter(Boolean)
    .map(([, name, value]) => [name, process.env[name] ?? value]),
)

// Each process is told what it needs and no more: no password of another's.
const common = /^(LOG|HTTP)_/
const broker = /^RABBITMQ_(HOST|PORT|VHOST|QUEUE|HEARTBEAT_S)$/
// glibc would keep an arena for each core and ever larger blocks for later use: with fixed
// limits memory goes back after a peak. And no cache for each of 256 threads: what lies in one
// keeps whole pages around it from being given back.
const malloc = {
  MALLOC_ARENA_MAX: '2',
  MALLOC_TRIM_THRESHOLD_: '131072',
  MALLOC_MMAP_THRESHOLD_: '16384',
  GLIBC_TUNABLES: 'glibc.malloc.tcache_count=0',
}
const owner = /_DB_OWNER/
const only = (...patterns) => Object.fromEntries(
  Object.entries(settings).filter(([name]) => !owner.test(name) && patterns.some(p => p.test(name))),
)

const app = (name, binary, env, more = {}) => ({
  name,
  script: path.join(binaries, binary),
  interpreter: 'none',
  cwd: root,
  env: { ...malloc, ...env },
  // Leaves out every variable of the caller: each name contains the empty string.
  filter_env: [''],
  // SIGINT first; the services need at most 5 s to finish what they have accepted.
  kill_timeout: 6000,
  // A crash costs 50 ms, a crash loop grows to 15 s a turn, and nothing is ever given up.
  exp_backoff_restart_delay: 50,
  max_restarts: 1000000,
  max_memory_restart: '256M',
  merge_logs: true,
  time: false, // the services' own lines begin with the time
  ...more,
  ...(process.env.MATINEE_USER ? { uid: process.env.MATINEE_USER, gid: process.env.MATINEE_USER } : {}),
})

// Two or more share their port (SO_REUSEPORT). PM2 cannot hear from them when they listen, so it
// gives each the time that the slowest start takes before it turns to the next: `pm2 reload`
// then always leaves one that answers.
const instances = count => count > 1
  ? { exec_mode: 'fork', instances: count, wait_ready: true, listen_timeout: 3000 }
  : {}

const apps = [
  app('gateway_app', 'gateway', only(common, broker, /^GATEWAY_/, /^INVENTORY_(HOST|PORT)$/),
    instances(Number(settings.GATEWAY_INSTANCES ?? 1))),
  app('inventory_app', 'inventory', only(common, /^INVENTORY_/)),
  app('billing_app', 'billing', only(common, broker, /^BILLING_/)),
]

module.exports = { apps }
