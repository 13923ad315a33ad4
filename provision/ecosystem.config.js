// The services of provision/services as PM2 runs them: on a laptop by provision/local, in the VMs
// by root's PM2. Settings come from .env; a variable in the environment of the pm2 command has precedence.

const fs = require('node:fs')
const path = require('node:path')

const root = path.resolve(__dirname, '..')
const envFile = process.env.MATINEE_ENV_FILE || path.join(root, '.env')
const table = process.env.MATINEE_SERVICES_FILE || path.join(__dirname, 'services')
const binaries = path.resolve(root, process.env.MATINEE_BIN_DIR || 'target/release')

// Lines NAME=value, by the same rule as provision/lib/env.sh; a line is not shown, it may hold a password.
const settings = {}
fs.readFileSync(envFile, 'latin1').split('\n').forEach((bytes, index) => {
  const refuse = why => { throw new Error(`${envFile}: line ${index + 1} ${why}`) }
  const raw = Buffer.from(bytes.replace(/\r$/, ''), 'latin1')
  const line = raw.toString('utf8')
  if (index === 0 && line.startsWith('\ufeff')) refuse('begins with a byte order mark')
  if (/^([ \t]*$|#)/.test(line)) return
  const [, name, value] = /^([A-Za-z_][A-Za-z0-9_]*)=(.*)$/s.exec(line) ?? []
  if (!name || !Buffer.from(line).equals(raw)) refuse('is not NAME=value')
  if (Object.hasOwn(settings, name)) refuse(`sets ${name} again`)
  settings[name] = process.env[name] ?? value
})

const services = fs.readFileSync(table, 'utf8')
  .split(/\r?\n/)
  .map(line => line.trim())
  .filter(line => line && !line.startsWith('#'))
  .map(line => line.split(/\s+/).map(column => (column === '-' ? '' : column)))
  .map(([name, , , broker, calls]) => ({ name, broker, calls: calls.split(',').filter(Boolean) }))

// A process gets the variables that it needs and no others: its own, those that are common to all,
// and the addresses of what it uses. No process gets a password of another, or of its database's owner.
const common = /^(AUTH|HTTP|LOG|STORE)_/
const broker = /^RABBITMQ_(HOST|PORT|VHOST|QUEUE|HEARTBEAT_S)$/
const owner = /_DB_OWNER/
const own = name => new RegExp(`^${name.toUpperCase()}_`)
const address = name => new RegExp(`^${name.toUpperCase()}_(HOST|PORT|INTERNAL_PORT)$`)

const variables = service => {
  const patterns = [common, own(service.name), ...service.calls.map(address), ...(service.broker ? [broker] : [])]
  return Object.fromEntries(
    Object.entries(settings).filter(([name]) => !owner.test(name) && patterns.some(p => p.test(name))),
  )
}

// By default glibc keeps an arena for each core, and raises its thresholds for large blocks as it
// goes. With fixed limits, memory returns to the system after a peak. The cache of each
// thread is off: with 256 threads, the few blocks in each would keep whole pages in use.
const malloc = {
  MALLOC_ARENA_MAX: '2',
  MALLOC_TRIM_THRESHOLD_: '131072',
  MALLOC_MMAP_THRESHOLD_: '16384',
  GLIBC_TUNABLES: 'glibc.malloc.tcache_count=0',
}

const app = service => ({
  name: `${service.name}_app`,
  // Not the whole path: PM2 takes a script with a blank in it for a command line.
  script: service.name,
  cwd: binaries,
  interpreter: 'none',
  env: { ...malloc, ...variables(service) },
  // PM2 leaves out the caller's variables whose names contain one of these texts; the empty
  // one is contained in all.
  filter_env: [''],
  // PM2 sends SIGINT, and after this time SIGKILL; a service needs at most 5 s to finish its work.
  kill_timeout: 6000,
  // The restart after a crash waits 50 ms, in a crash loop up to 15 s; PM2 never stops restarting.
  exp_backoff_restart_delay: 50,
  max_restarts: 1000000,
  max_memory_restart: '256M',
  merge_logs: true,
  time: false, // the services' own lines begin with the time
  ...instances(Number(settings[`${service.name.toUpperCase()}_INSTANCES`] ?? 1)),
  ...(process.env.MATINEE_USER ? { uid: process.env.MATINEE_USER, gid: process.env.MATINEE_USER } : {}),
})

// Two or more instances share their port (SO_REUSEPORT). PM2 gets no message when they listen, so
// a reload waits for each as long as the slowest start takes before it turns to the next: one of them
// always answers.
const instances = count => count > 1
  ? { exec_mode: 'fork', instances: count, wait_ready: true, listen_timeout: 3000 }
  : {}

module.exports = { apps: services.map(app) }
