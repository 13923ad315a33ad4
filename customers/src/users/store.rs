//! All SQL of the accounts, one function a query.

use chassis::db::{like_pattern, renew_deadline};
use chassis::etag::Precondition;
use postgres::error::SqlState;
use postgres::types::ToSql;
use postgres::{Client, Error, Row, Statement};

use super::fields::comparison_key;
use super::user::{NewUser, User, UserUpdate};
use crate::Db;

/// The SQLSTATE by which the schema refuses a change that would leave no administrator.
const LAST_ADMINISTRATOR: &str = "MA001";

/// The prepared statements of the accounts.
pub struct Statements {
    insert: Statement,
    select: Statement,
    credentials: Statement,
    exists: Statement,
    update: Statement,
    rehash: Statement,
    delete: Statement,
    page: Statement,
}

/// A user and the version for its entity tag.
#[derive(Debug)]
pub struct Versioned {
    /// The user.
    pub user: User,
    /// The text of its entity tag.
    pub version: String,
}

/// What a login is checked against.
#[derive(Debug)]
pub struct Credentials {
    /// The user's id.
    pub id: i64,
    /// The hash of the password.
    pub password_hash: String,
    /// Whether the account may not log in.
    pub disabled: bool,
    /// What a new password must not be.
    pub own_names: Vec<String>,
}

/// A user as other services see it.
#[derive(Debug)]
pub struct Contact {
    /// The user.
    pub user: User,
    /// Whether the account may not log in.
    pub disabled: bool,
}

/// The outcome of a change.
#[derive(Debug)]
pub enum Outcome<T> {
    /// Done.
    Done(T),
    /// There is no such user.
    NotFound,
    /// The user exists in a version that the precondition excludes.
    PreconditionFailed,
    /// Another account has this e-mail address.
    EmailTaken,
    /// Another account has this user name.
    UsernameTaken,
    /// No administrator would be left.
    LastAdministrator,
}

/// The columns of a [`User`], and its version.
macro_rules! columns {
    () => {
        "id, email, username, first_name, last_name, is_admin, shipping_address::text,
        billing_address::text, payment_method::text, disabled, xmin::text as version,
        to_char(created_at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"') as created,
        to_char(updated_at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"') as updated"
    };
}

const INSERT: &str = concat!(
    "
    insert into users (email, email_key, username, username_key, first_name, last_name,
        password_hash, shipping_address, billing_address, payment_method, is_admin)
    values ($1, $2, $3, $4, $5, $6, $7, $8::text::json, $9::text::json, $10::text::json, $11)
    returning ",
    columns!()
);

const SELECT: &str =
    concat!("select ", columns!(), " from users where id = $1 and deleted_at is null");

const CREDENTIALS: &str = "
    select id, password_hash, disabled,
        array_remove(array[email, username, first_name, last_name], null) as own_names
    from users
    where deleted_at is null and (email_key = $1 or username_key = $2 or id = $3)";

const EXISTS: &str = "
    select exists (select from users where email_key = $1) as email,
        exists (select from users where username_key = $2) as username";

// As in movies: precondition and change are one statement.
const UPDATE: &str = concat!(
    "
    with changed as (
        update users
        set email = case when 'email' = any($2::text[]) then $3 else email end,
            email_key = case when 'email' = any($2) then $4 else email_key end,
            username = case when 'username' = any($2) then $5 else username end,
            username_key = case when 'username' = any($2) then $6 else username_key end,
            first_name = case when 'first_name' = any($2) then $7 else first_name end,
            last_name = case when 'last_name' = any($2) then $8 else last_name end,
            is_admin = case when 'is_admin' = any($2) then $9::boolean else is_admin end,
            shipping_address = case when 'shipping_address' = any($2)
                then $10::text::json else shipping_address end,
            billing_address = case when 'billing_address' = any($2)
                then $11::text::json else billing_address end,
            payment_method = case when 'payment_method' = any($2)
                then $12::text::json else payment_method end,
            updated_at = now()
        where id = $1 and deleted_at is null
        and ($13::text[] is null or xmin::text = any($13))
        and xmin::text <> all($14::text[])
        returning ",
    columns!(),
    "
    )
    select asked.was_admin is not null as existed, asked.was_admin, changed.*
    from (
        select (select is_admin from users where id = $1 and deleted_at is null) as was_admin
    ) as asked
    left join changed on true"
);

const REHASH: &str = "
    update users set password_hash = $3, updated_at = now()
    where id = $1 and deleted_at is null and ($2::text is null or password_hash = $2)";

const DELETE: &str = "
    with deleted as (
        update users
        set email = null, email_key = null, username = null, username_key = null,
            first_name = null, last_name = null, password_hash = null, is_admin = false,
            shipping_address = null, billing_address = null, payment_method = null,
            updated_at = now(), deleted_at = now()
        where id = $1 and deleted_at is null
        and ($2::text[] is null or xmin::text = any($2))
        and xmin::text <> all($3::text[])
        returning id
    )
    select exists (select from deleted) as done,
        exists (select from users where id = $1 and deleted_at is null) as existed";

const PAGE: &str = concat!(
    "select ",
    columns!(),
    "
    from users
    where id > $1 and deleted_at is null
    and ($2::text is null or search_text like lower(upper(normalize($2, nfc))))
    order by id
    limit $3"
);

impl Statements {
    /// Prepares them on a connection.
    pub fn prepare(client: &mut Client) -> Result<Statements, Error> {
        Ok(Statements {
            insert: client.prepare(INSERT)?,
            select: client.prepare(SELECT)?,
            credentials: client.prepare(CREDENTIALS)?,
            exists: client.prepare(EXISTS)?,
            update: client.prepare(UPDATE)?,
            rehash: client.prepare(REHASH)?,
            delete: client.prepare(DELETE)?,
            page: client.prepare(PAGE)?,
        })
    }
}

/// The readiness check.
pub fn check_readiness(client: &mut Client) -> Result<Result<(), String>, Error> {
    client.batch_execute("select from users limit 0; select from sessions limit 0").map(Ok)
}

/// Adds an account.
pub fn insert(
    db: &mut Db,
    new: &NewUser,
    password_hash: &str,
    is_admin: bool,
) -> Result<Outcome<Versioned>, Error> {
    let profile = &new.profile;
    let email_key = comparison_key(&new.email);
    let username_key = profile.username.as_deref().map(comparison_key);
    let parameters: [&(dyn ToSql + Sync); 11] = [
        &new.email,
        &email_key,
        &profile.username,
        &username_key,
        &profile.first_name,
        &profile.last_name,
        &password_hash,
        &profile.shipping_address,
        &profile.billing_address,
        &profile.payment_method,
        &is_admin,
    ];
    match db.client.query_one(&db.statements.users.insert, &parameters) {
        Ok(row) => Ok(Outcome::Done(versioned(db, &row)?)),
        Err(err) => refused(err),
    }
}

/// The user with this id.
pub fn select(db: &mut Db, id: i64) -> Result<Option<Versioned>, Error> {
    let row = db.client.query_opt(&db.statements.users.select, &[&id])?;
    row.as_ref().map(|row| versioned(db, row)).transpose()
}

/// The user with this id, as other services see it.
pub fn contact(db: &mut Db, id: i64) -> Result<Option<Contact>, Error> {
    let row = db.client.query_opt(&db.statements.users.select, &[&id])?;
    let contact = |row: &Row| Ok(Contact { user: user(row)?, disabled: row.try_get("disabled")? });
    row.as_ref().map(contact).transpose()
}

/// By what an account is found.
#[derive(Clone, Debug)]
pub enum Login {
    /// The key of its e-mail address.
    Email(String),
    /// The key of its user name.
    Username(String),
    /// Its id.
    Id(i64),
}

/// The password's hash of an account, if there is one.
pub fn credentials(db: &mut Db, login: &Login) -> Result<Option<Credentials>, Error> {
    let (mut email, mut username, mut id) = (None, None, None);
    match login {
        Login::Email(key) => email = Some(key),
        Login::Username(key) => username = Some(key),
        Login::Id(known) => id = Some(known),
    }
    let row = db.client.query_opt(&db.statements.users.credentials, &[&email, &username, &id])?;
    let credentials = |row: Row| {
        Ok(Credentials {
            id: row.try_get("id")?,
            password_hash: row.try_get("password_hash")?,
            disabled: row.try_get("disabled")?,
            own_names: row.try_get("own_names")?,
        })
    };
    row.map(credentials).transpose()
}

/// Whether an account has this e-mail address, and whether one has this user name.
pub fn exists(
    db: &mut Db,
    email: Option<&str>,
    username: Option<&str>,
) -> Result<(bool, bool), Error> {
    let (email, username) = (email.map(comparison_key), username.map(comparison_key));
    let row = db.client.query_one(&db.statements.users.exists, &[&email, &username])?;
    Ok((row.try_get("email")?, row.try_get("username")?))
}

/// An account after a change.
#[derive(Debug)]
pub struct Updated {
    /// The account.
    pub versioned: Versioned,
    /// Whether the user has become an administrator, or is none any more.
    pub role_changed: bool,
}

/// Changes an account if the precondition allows its version.
pub fn update(
    db: &mut Db,
    id: i64,
    update: &UserUpdate,
    precondition: &Precondition,
) -> Result<Outcome<Updated>, Error> {
    let Precondition { if_match, if_none_match } =
        precondition.of_instance(&db.statements.instance);
    let profile = &update.profile;
    let email_key = update.email.as_deref().map(comparison_key);
    let username_key = profile.username.as_deref().map(comparison_key);
    let parameters: [&(dyn ToSql + Sync); 14] = [
        &id,
        &update.changes,
        &update.email,
        &email_key,
        &profile.username,
        &username_key,
        &profile.first_name,
        &profile.last_name,
        &update.is_admin,
        &profile.shipping_address,
        &profile.billing_address,
        &profile.payment_method,
        &if_match,
        &if_none_match,
    ];
    let row = match db.client.query_one(&db.statements.users.update, &parameters) {
        Ok(row) => row,
        Err(err) => return refused(err),
    };
    match row.try_get::<_, Option<i64>>("id")? {
        Some(_) => {
            let versioned = versioned(db, &row)?;
            let role_changed = row.try_get::<_, bool>("was_admin")? != versioned.user.is_admin;
            Ok(Outcome::Done(Updated { versioned, role_changed }))
        }
        None => why_not(&row, precondition),
    }
}

/// Sets the hash of a password, where it is still `old` or whatever it is. Returns whether it was.
pub fn set_password_hash(
    db: &mut Db,
    id: i64,
    old: Option<&str>,
    new: &str,
) -> Result<bool, Error> {
    renew_deadline();
    Ok(db.client.execute(&db.statements.users.rehash, &[&id, &old, &new])? == 1)
}

/// Lets an account log in, or not.
pub fn set_disabled(db: &mut Db, id: i64, disabled: bool) -> Result<Outcome<()>, Error> {
    renew_deadline();
    let set = "update users set disabled = $2, updated_at = now()
        where id = $1 and deleted_at is null";
    match db.client.execute(set, &[&id, &disabled]) {
        Ok(0) => Ok(Outcome::NotFound),
        Ok(_) => Ok(Outcome::Done(())),
        Err(err) => refused(err),
    }
}

/// Removes an account's data if the precondition allows its version; its id stays taken.
pub fn delete(db: &mut Db, id: i64, precondition: &Precondition) -> Result<Outcome<()>, Error> {
    let Precondition { if_match, if_none_match } =
        precondition.of_instance(&db.statements.instance);
    let deleted =
        db.client.query_one(&db.statements.users.delete, &[&id, &if_match, &if_none_match]);
    let row = match deleted {
        Ok(row) => row,
        Err(err) => return refused(err),
    };
    match row.try_get("done")? {
        true => Ok(Outcome::Done(())),
        false => why_not(&row, precondition),
    }
}

/// Users above an id, in the order of ids; `search` is looked for in e-mail address and names.
pub fn page(
    db: &mut Db,
    after: i64,
    search: Option<&str>,
    rows: i64,
) -> Result<Vec<Contact>, Error> {
    let pattern = search.map(like_pattern);
    let rows = db.client.query(&db.statements.users.page, &[&after, &pattern, &rows])?;
    let contact = |row: &Row| Ok(Contact { user: user(row)?, disabled: row.try_get("disabled")? });
    rows.iter().map(contact).collect()
}

/// The outcome for an error by which the schema refuses a change.
fn refused<T>(err: Error) -> Result<Outcome<T>, Error> {
    let constraint = err.as_db_error().and_then(|db| db.constraint().map(str::to_owned));
    match (err.code(), constraint.as_deref()) {
        (Some(code), _) if code.code() == LAST_ADMINISTRATOR => Ok(Outcome::LastAdministrator),
        (Some(&SqlState::UNIQUE_VIOLATION), Some("users_email_key")) => Ok(Outcome::EmailTaken),
        (Some(&SqlState::UNIQUE_VIOLATION), Some("users_username_key")) => {
            Ok(Outcome::UsernameTaken)
        }
        _ => Err(err),
    }
}

/// Why a change found no row.
fn why_not<T>(row: &Row, precondition: &Precondition) -> Result<Outcome<T>, Error> {
    let existed: bool = row.try_get("existed")?;
    Ok(if existed && !precondition.is_empty() {
        Outcome::PreconditionFailed
    } else {
        Outcome::NotFound
    })
}

fn versioned(db: &Db, row: &Row) -> Result<Versioned, Error> {
    let xmin: &str = row.try_get("version")?;
    let version = format!("{}-{xmin}", db.statements.instance);
    Ok(Versioned { user: user(row)?, version })
}

fn user(row: &Row) -> Result<User, Error> {
    let json = |name: &str| -> Result<_, Error> {
        let text: Option<String> = row.try_get(name)?;
        Ok(text.and_then(|text| serde_json::value::RawValue::from_string(text).ok()))
    };
    Ok(User {
        id: row.try_get("id")?,
        email: row.try_get("email")?,
        username: row.try_get("username")?,
        first_name: row.try_get("first_name")?,
        last_name: row.try_get("last_name")?,
        is_admin: row.try_get("is_admin")?,
        shipping_address: json("shipping_address")?,
        billing_address: json("billing_address")?,
        payment_method: json("payment_method")?,
        created_at: row.try_get("created")?,
        updated_at: row.try_get("updated")?,
    })
}
