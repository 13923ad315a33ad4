//! A shell whose variables and files mislead the programs that the scripts call.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

/// A service that libpq, and every reader of its file, would connect to.
const OTHER_SERVER: &str = "[other]\nhost=127.0.0.2\nport=1\ndbname=other\nuser=other\n";

/// A program, started as from the shell of a user who works with another server, has settings of
/// his own for curl and psql, and a Turkish locale; `directory` holds his files.
pub(crate) fn unfriendly_shell(directory: &Path, program: impl AsRef<OsStr>) -> Command {
    let home = directory.join("home");
    fs::create_dir_all(&home).unwrap();
    fs::write(home.join("service.conf"), OTHER_SERVER).unwrap();
    fs::write(home.join(".curlrc"), "--include\n--fail\n--proxy http://127.0.0.2:1\n").unwrap();
    fs::write(home.join(".psqlrc"), "\\pset null other\n\\quit\n").unwrap();
    let mut command = Command::new(program);
    command
        .env("PGSERVICE", "other")
        .env("PGSERVICEFILE", home.join("service.conf"))
        .envs([("PGHOST", "127.0.0.2"), ("PGHOSTADDR", "127.0.0.2"), ("PGPORT", "1")])
        .envs([("PGUSER", "other"), ("PGPASSWORD", "other"), ("PGDATABASE", "other")])
        .envs([("PGSSLMODE", "require"), ("PGSSLMINPROTOCOLVERSION", "other")])
        .envs([("PGOPTIONS", "-c search_path=other"), ("PGCLIENTENCODING", "LATIN1")])
        .envs([("PGAPPNAME", "other"), ("PGTARGETSESSIONATTRS", "read-only")])
        .envs([("DATABASE_URL", "postgres://127.0.0.2:1/other"), ("DBMATE_MIGRATIONS_TABLE", "x")])
        .envs([("LC_ALL", "tr_TR.UTF-8"), ("LANG", "tr_TR.UTF-8"), ("CDPATH", "/:/usr:/tmp")])
        // A proxy that must not be asked for addresses of this machine.
        .envs([("http_proxy", "http://127.0.0.2:1"), ("ALL_PROXY", "http://127.0.0.2:1")])
        .env("HOME", home);
    if let Some(locales) = turkish_locale(directory) {
        command.env("LOCPATH", locales);
    }
    command
}

/// The locale in which the capital of i is not I, where the system can make it.
fn turkish_locale(directory: &Path) -> Option<std::path::PathBuf> {
    let locales = directory.join("locales");
    fs::create_dir_all(&locales).unwrap();
    let made = Command::new("localedef")
        .args(["--inputfile", "tr_TR", "--charmap", "UTF-8"])
        .arg(locales.join("tr_TR.UTF-8"))
        .output();
    made.is_ok_and(|output| output.status.success()).then_some(locales)
}
