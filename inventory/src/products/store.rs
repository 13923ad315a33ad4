//! All SQL of the products, one function a query.
//!
//! The version of a product is that of its two rows, `PRODUCT.STOCK`: an entity tag names what a
//! client sees, and `available` is a part of it. A change of the product compares only the first part:
//! a sale in between does not make it fail.
//!
//! A parameter that is an array stands in a subquery, `(select $1::text[])`. Otherwise the planner sees how
//! many elements it has, and plans the statement anew for each execution, which costs more than executing
//! it.

use chassis::db::like_pattern;
use chassis::etag::Precondition;
use chassis::response::timestamp;
use postgres::types::{ToSql, Type};
use postgres::{Client, Error, Row, Statement};
use serde::Serialize;

use super::list::ListQuery;
use super::product::{NewProduct, Product, ProductUpdate};
use crate::Db;

/// The prepared statements of the products.
pub struct Statements {
    insert: Statement,
    select: Statement,
    update: Statement,
    retire: Statement,
    page: Statement,
    offers: Statement,
}

impl Statements {
    /// Prepares them on a connection.
    pub fn prepare(client: &mut Client) -> Result<Statements, Error> {
        Ok(Statements {
            insert: client.prepare(INSERT)?,
            select: client.prepare(SELECT)?,
            update: client.prepare(UPDATE)?,
            retire: client.prepare(RETIRE)?,
            page: client.prepare(PAGE)?,
            offers: client.prepare(OFFERS)?,
        })
    }
}

/// A product and its version.
#[derive(Debug)]
pub struct Versioned {
    /// The product.
    pub product: Product,
    /// The text of its entity tag.
    pub version: String,
}

/// A product as an order or a cart needs it.
#[derive(Debug, Serialize)]
pub struct Offer {
    /// The key.
    pub sku: String,
    /// The name.
    pub name: String,
    /// With two decimals.
    pub price: String,
    /// How many can be ordered.
    pub available: i32,
    /// Whether it cannot be ordered any more.
    pub retired: bool,
}

/// The outcome of a change to one product.
#[derive(Debug)]
pub enum WriteOutcome<T> {
    /// Done.
    Done(T),
    /// Not done: the product exists in a version that the precondition excludes.
    PreconditionFailed,
    /// Not done: there is no such product.
    NotFound,
}

/// The columns of a [`Product`] but those of its stock.
macro_rules! columns {
    () => {
        "sku, name, description, price::text, image_url, created_at, products.updated_at"
    };
}

const INSERT: &str = concat!(
    "
    with created as (
        insert into products (sku, name, description, price, image_url)
        values ($1, $2, $3, $4::text::numeric, $5)
        on conflict (sku) do nothing
        returning xmin::text as version, ",
    columns!(),
    "
    ), stocked as (
        insert into stock (sku)
        select sku from created
        returning sku, on_hand - reserved as available, xmin::text as stock_version
    )
    select * from created join stocked using (sku)"
);

const SELECT: &str = concat!(
    "select products.xmin::text as version, on_hand - reserved as available,
        stock.xmin::text as stock_version, ",
    columns!(),
    "
    from products join stock using (sku)
    where sku = $1 and retired_at is null"
);

// As in movies: precondition and change are one statement.
const UPDATE: &str = concat!(
    "
    with changed as (
        update products
        set name = coalesce($2, name),
            description = coalesce($3, description),
            price = coalesce($4::text::numeric, price),
            image_url = case when $5 then $6 else image_url end,
            updated_at = now()
        where sku = $1 and retired_at is null
        and ($7::text[] is null or xmin::text = any($7))
        and xmin::text <> all($8::text[])
        returning xmin::text as version, ",
    columns!(),
    "
    )
    select asked.existed, on_hand - reserved as available, stock.xmin::text as stock_version,
        changed.*
    from (
        select exists (select from products where sku = $1 and retired_at is null) as existed
    ) as asked
    left join changed on true
    left join stock on stock.sku = changed.sku"
);

const RETIRE: &str = "
    with retired as (
        update products
        set retired_at = now(), updated_at = now()
        where sku = $1 and retired_at is null
        and ($2::text[] is null or xmin::text = any($2))
        and xmin::text <> all($3::text[])
        returning sku
    )
    select exists (select from retired) as done,
        exists (select from products where sku = $1 and retired_at is null) as existed";

/// One product more than wanted shows whether there are more.
macro_rules! page {
    ($filter:literal) => {
        concat!(
            "select on_hand - reserved as available, ",
            columns!(),
            "
            from products join stock using (sku)
            where sku > $1 and retired_at is null
            and ($2::boolean is null or $2 = (on_hand > reserved)) ",
            $filter,
            "
            order by sku
            limit $3::bigint + 1"
        )
    };
}

const PAGE: &str = page!("");
/// A page of a search, as the planner sees it: its parameters are those of [`page`], the pattern last.
pub const PAGE_BY_TEXT: &str = page!("and search_text like search_key($4)");

const OFFERS: &str = "
    select sku, name, price::text, on_hand - reserved as available,
        retired_at is not null as retired
    from unnest((select $1::text[])) with ordinality as asked (sku, place)
    join products using (sku)
    join stock using (sku)
    order by place";

/// Adds a product with an empty stock; `None` where there is or was one with this sku.
pub fn insert(db: &mut Db, new: &NewProduct, currency: &str) -> Result<Option<Versioned>, Error> {
    let NewProduct { sku, name, description, price, image_url } = new;
    let price = price.to_string();
    let parameters: [&(dyn ToSql + Sync); 5] = [sku, name, description, &price, image_url];
    let row = db.client.query_opt(&db.statements.products.insert, &parameters)?;
    row.as_ref().map(|row| versioned(db, row, currency)).transpose()
}

/// The product with this sku, unless it was retired.
pub fn select(db: &mut Db, sku: &str, currency: &str) -> Result<Option<Versioned>, Error> {
    let row = db.client.query_opt(&db.statements.products.select, &[&sku])?;
    row.as_ref().map(|row| versioned(db, row, currency)).transpose()
}

/// Changes a product if the precondition allows its version.
pub fn update(
    db: &mut Db,
    sku: &str,
    update: &ProductUpdate,
    precondition: &Precondition,
    currency: &str,
) -> Result<WriteOutcome<Versioned>, Error> {
    let Precondition { if_match, if_none_match } = of_product(db, precondition);
    let price = update.price.map(|price| price.to_string());
    let (sets_image, image_url) = (update.image_url.is_some(), update.image_url.clone().flatten());
    let parameters: [&(dyn ToSql + Sync); 8] = [
        &sku,
        &update.name,
        &update.description,
        &price,
        &sets_image,
        &image_url,
        &if_match,
        &if_none_match,
    ];
    let row = db.client.query_one(&db.statements.products.update, &parameters)?;
    match row.try_get::<_, Option<&str>>("sku")? {
        Some(_) => Ok(WriteOutcome::Done(versioned(db, &row, currency)?)),
        None => why_not(&row, precondition),
    }
}

/// Retires a product if the precondition allows its version.
pub fn retire(
    db: &mut Db,
    sku: &str,
    precondition: &Precondition,
) -> Result<WriteOutcome<()>, Error> {
    let Precondition { if_match, if_none_match } = of_product(db, precondition);
    let parameters: [&(dyn ToSql + Sync); 3] = [&sku, &if_match, &if_none_match];
    let row = db.client.query_one(&db.statements.products.retire, &parameters)?;
    match row.try_get("done")? {
        true => Ok(WriteOutcome::Done(())),
        false => why_not(&row, precondition),
    }
}

/// The products of a page and, where there are more, the first one of the next.
pub fn page(db: &mut Db, list: &ListQuery, currency: &str) -> Result<Vec<Product>, Error> {
    let ListQuery { search, in_stock, limit, after } = list;
    let rows = match search {
        None => db.client.query(&db.statements.products.page, &[after, in_stock, limit])?,
        // Not prepared, as with the titles of movies: the planner must see how frequent the text is.
        Some(text) => db.client.query_typed(
            PAGE_BY_TEXT,
            &[
                (after, Type::TEXT),
                (in_stock, Type::BOOL),
                (limit, Type::INT8),
                (&like_pattern(text), Type::TEXT),
            ],
        )?,
    };
    rows.iter().map(|row| product(row, currency)).collect()
}

/// The products with these skus that exist, retired ones too, in this order.
pub fn offers(db: &mut Db, skus: &[String]) -> Result<Vec<Offer>, Error> {
    let rows = db.client.query(&db.statements.products.offers, &[&skus])?;
    let offer = |row: &Row| {
        Ok(Offer {
            sku: row.try_get("sku")?,
            name: row.try_get("name")?,
            price: row.try_get("price")?,
            available: row.try_get("available")?,
            retired: row.try_get("retired")?,
        })
    };
    rows.iter().map(offer).collect()
}

/// The precondition on the product's own row.
fn of_product(db: &Db, precondition: &Precondition) -> Precondition {
    let first_part = |tags: Vec<String>| {
        tags.into_iter().filter_map(|tag| Some(tag.split_once('.')?.0.to_owned())).collect()
    };
    let Precondition { if_match, if_none_match } =
        precondition.of_instance(&db.statements.instance);
    Precondition { if_match: if_match.map(first_part), if_none_match: first_part(if_none_match) }
}

/// Why a change found no row.
fn why_not<T>(row: &Row, precondition: &Precondition) -> Result<WriteOutcome<T>, Error> {
    let existed: bool = row.try_get("existed")?;
    Ok(if existed && !precondition.is_empty() {
        WriteOutcome::PreconditionFailed
    } else {
        WriteOutcome::NotFound
    })
}

fn versioned(db: &Db, row: &Row, currency: &str) -> Result<Versioned, Error> {
    let (own, stock): (&str, &str) = (row.try_get("version")?, row.try_get("stock_version")?);
    let version = format!("{}-{own}.{stock}", db.statements.instance);
    Ok(Versioned { product: product(row, currency)?, version })
}

fn product(row: &Row, currency: &str) -> Result<Product, Error> {
    Ok(Product {
        sku: row.try_get("sku")?,
        name: row.try_get("name")?,
        description: row.try_get("description")?,
        price: row.try_get("price")?,
        currency: currency.to_owned(),
        image_url: row.try_get("image_url")?,
        available: row.try_get("available")?,
        created_at: timestamp(row.try_get("created_at")?),
        updated_at: timestamp(row.try_get("updated_at")?),
    })
}
