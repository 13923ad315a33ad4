//! `customers users`: accounts by hand, such as the first administrator.

use std::io::{self, BufRead, IsTerminal, Write};
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use chassis::db::{Pool, in_transaction};
use chassis::etag::Precondition;
use chassis::{Env, Problem};

use super::fields;
use super::store::{self, Contact, Login, Outcome};
use super::user::{NewUser, Profile, UserUpdate};
use crate::passwords::{Passwords, check_new};
use crate::sessions::store::{self as sessions, Lifetimes};
use crate::{Db, Statements, command_config};

const USAGE: &str = "\
Accounts by hand. The database is that of the settings of customers.

  customers users create EMAIL [--admin]
      adds an account; the password is read from standard input, or asked for
      on a terminal. With --admin the account is an administrator: one that is
      there is promoted and gets the password.
  customers users promote EMAIL
      makes an account an administrator
  customers users list [TEXT]
      a line each: id, e-mail address, user name, role, state; with TEXT only
      those whose e-mail address or names contain it
  customers users disable EMAIL
      the account can no longer log in, and its sessions end
  customers users enable EMAIL
      the account can log in again

Exit code 1: it failed, or there is no such account; 2: wrong usage.
";

/// How many accounts `list` reads at a time.
const PAGE_ROWS: i64 = 500;

/// Runs `customers users …`.
pub fn run_command(arguments: &[String]) -> anyhow::Result<ExitCode> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["create", email] => Accounts::open()?.create(email, false),
        ["create", email, "--admin"] | ["create", "--admin", email] => {
            Accounts::open()?.create(email, true)
        }
        ["promote", email] => Accounts::open()?.promote(email),
        ["list"] => list(None),
        ["list", text] => list(Some(text)),
        ["disable", email] => Accounts::open()?.set_disabled(email, true),
        ["enable", email] => Accounts::open()?.set_disabled(email, false),
        ["-h" | "--help" | "help"] => {
            print!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        _ => {
            eprint!("{USAGE}");
            Ok(ExitCode::from(2))
        }
    }
}

fn list(text: Option<&str>) -> anyhow::Result<ExitCode> {
    match Accounts::open()?.list(text) {
        // `list | head` is no failure.
        Err(err) if is_broken_pipe(&err) => Ok(ExitCode::SUCCESS),
        listed => listed,
    }
}

fn is_broken_pipe(err: &anyhow::Error) -> bool {
    err.downcast_ref::<io::Error>().is_some_and(|err| err.kind() == io::ErrorKind::BrokenPipe)
}

/// The accounts, and what a change of them needs.
struct Accounts {
    db: Pool<Statements>,
    passwords: Passwords,
    lifetimes: Lifetimes,
}

impl Accounts {
    fn open() -> anyhow::Result<Accounts> {
        let (db, passwords, lifetimes) = command_config(Env::load())?;
        let db = Pool::new(db, Statements::prepare);
        Ok(Accounts { db, passwords: Passwords::new(&passwords), lifetimes })
    }

    fn create(&self, email: &str, is_admin: bool) -> anyhow::Result<ExitCode> {
        let email = fields::email(email.to_owned());
        let email = email.map_err(|rule| anyhow::anyhow!("EMAIL {rule}"))?;
        let password = read_password()?;
        if let Err(rule) = check_new(&password, &[&email]) {
            bail!("the password {rule}");
        }
        let hash = self.passwords.turn().and_then(|turn| turn.hash(&password)).map_err(failed)?;
        let new = NewUser { email: email.clone(), password, profile: Profile::default() };
        let created = self.db.write(|db| store::insert(db, &new, &hash, is_admin))?;
        match created {
            Outcome::Done(created) => {
                let role = if is_admin { "administrator" } else { "customer" };
                println!("created: {email}, {role}, id {}", created.user.id);
            }
            Outcome::EmailTaken if is_admin => {
                let id = self.find(&email)?;
                self.change(id, |db| {
                    store::set_password_hash(db, id, None, &hash)?;
                    store::set_disabled(db, id, false)?;
                    store::update(db, id, &role(true), &Precondition::default())
                })?;
                println!("promoted: {email} is an administrator with the new password, id {id}");
            }
            Outcome::EmailTaken => bail!("there is an account {email} already"),
            _ => bail!("the account was not created"),
        }
        Ok(ExitCode::SUCCESS)
    }

    fn promote(&self, email: &str) -> anyhow::Result<ExitCode> {
        let id = self.find(email)?;
        self.change(id, |db| store::update(db, id, &role(true), &Precondition::default()))?;
        println!("promoted: {email} is an administrator, id {id}");
        Ok(ExitCode::SUCCESS)
    }

    fn set_disabled(&self, email: &str, disabled: bool) -> anyhow::Result<ExitCode> {
        let id = self.find(email)?;
        self.change(id, |db| store::set_disabled(db, id, disabled))?;
        println!("{}: {email}, id {id}", if disabled { "disabled" } else { "enabled" });
        Ok(ExitCode::SUCCESS)
    }

    fn list(&self, text: Option<&str>) -> anyhow::Result<ExitCode> {
        let mut out = io::stdout().lock();
        let mut after = 0;
        loop {
            let page = self.db.read(|db| store::page(db, after, text, PAGE_ROWS))?;
            for Contact { user, disabled } in &page {
                after = user.id;
                let role = if user.is_admin { "administrator" } else { "customer" };
                let state = if *disabled { "disabled" } else { "active" };
                let username = user.username.as_deref().unwrap_or("-");
                writeln!(out, "{}\t{}\t{username}\t{role}\t{state}", user.id, user.email)?;
            }
            if (page.len() as i64) < PAGE_ROWS {
                return Ok(ExitCode::SUCCESS);
            }
        }
    }

    fn find(&self, email: &str) -> anyhow::Result<i64> {
        let login = Login::Email(fields::comparison_key(email));
        let found = self.db.read(|db| store::credentials(db, &login))?;
        Ok(found.with_context(|| format!("there is no account {email}"))?.id)
    }

    /// Changes an account and ends its sessions, in one transaction.
    fn change<T>(
        &self,
        id: i64,
        change: impl Fn(&mut Db) -> Result<Outcome<T>, postgres::Error>,
    ) -> anyhow::Result<()> {
        let outcome = self.db.write(|db| {
            in_transaction(db, |db| {
                let outcome = change(db)?;
                if matches!(outcome, Outcome::Done(_)) {
                    sessions::end_all(db, id, None, &self.lifetimes)?;
                }
                Ok(outcome)
            })
        })?;
        match outcome {
            Outcome::Done(_) => Ok(()),
            Outcome::LastAdministrator => bail!("it is the last administrator: there must be one"),
            _ => bail!("the account is gone"),
        }
    }
}

fn role(is_admin: bool) -> UserUpdate {
    UserUpdate {
        changes: vec!["is_admin"],
        email: None,
        is_admin: Some(is_admin),
        profile: Profile::default(),
        current_password: None,
    }
}

fn failed(problem: Problem) -> anyhow::Error {
    anyhow::anyhow!("{problem}")
}

/// One line of standard input; on a terminal it is asked for, and typed unseen.
fn read_password() -> anyhow::Result<String> {
    let password = if io::stdin().is_terminal() {
        rpassword::prompt_password("password: ")?
    } else {
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line)?;
        line.trim_end_matches(['\r', '\n']).to_owned()
    };
    ensure!(!password.is_empty(), "there is no password on standard input");
    Ok(password)
}
