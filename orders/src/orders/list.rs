//! `GET /api/v1/orders`: its parameters and its pages, the newest order first.

use chassis::db::renew_deadline;
use chassis::query::{self, Query};
use chassis::router::Params;
use chassis::{Problem, auth};
use postgres::Error;
use postgres::types::Type;
use rouille::{Request, Response};
use uuid::Uuid;

use super::order::{Order, Status};
use super::store::{add_lines, order_of_row};
use crate::{App, Db, order_columns};

/// The parameters of the list.
#[derive(Debug)]
struct ListQuery {
    status: Option<Status>,
    user_id: Option<i64>,
    published: Option<bool>,
    limit: i64,
    /// Only orders that were made before this one.
    after: Option<Uuid>,
}

macro_rules! page {
    ($filter:literal) => {
        concat!(
            "select ",
            order_columns!(),
            "
            from orders
            where deleted_at is null and ($1::uuid is null or id < $1)
            and ($2::bigint is null or user_id = $2)
            and ($3::text is null or status = $3) ",
            $filter,
            "
            order by id desc
            limit $4::bigint + 1"
        )
    };
}

const PAGE: &str = page!("");
const PUBLISHED: &str = page!(
    "and not exists (select from outbox where order_id = orders.id and published_at is null)"
);
// There are few of these, so they are looked for in the outbox.
const UNPUBLISHED: &str =
    page!("and id in (select order_id from outbox where published_at is null)");

/// `GET /api/v1/orders`
pub fn list(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let principal = app.auth.principal(request)?;
    let list = ListQuery::parse(request.raw_query_string(), &principal)?;
    let orders = app.db.read(|db| page(db, &list))?;
    Ok(query::page(orders, list.limit, |last| {
        let (limit, after) = (list.limit.to_string(), last.id.to_string());
        let user_id = list.user_id.filter(|_| principal.is_admin).map(|id| id.to_string());
        let published = list.published.map(|flag| flag.to_string());
        let parameters = [
            ("limit", Some(limit.as_str())),
            ("after", Some(after.as_str())),
            ("status", list.status.map(Status::as_str)),
            ("user_id", user_id.as_deref()),
            ("published", published.as_deref()),
        ];
        format!("/api/v1/orders?{}", query::build(&parameters))
    }))
}

impl ListQuery {
    fn parse(text: &str, principal: &auth::Principal) -> Result<ListQuery, Problem> {
        let mut query = Query::parse(text, &["status", "user_id", "published", "limit", "after"])?;
        let status = query.value("status").map(|name| Status::parse(&name));
        if status == Some(None) {
            query.error("status", "must be pending, processing, shipped, delivered or canceled");
        }
        let after = query.value("after").map(|id| id.parse().ok());
        if after == Some(None) {
            query.error("after", "must be the id of an order");
        }
        let user_id = query.number("user_id", 0, 1..=i64::MAX);
        let list = ListQuery {
            status: status.flatten(),
            user_id: Some(user_id).filter(|id| *id > 0),
            published: query.flag("published"),
            limit: query.limit(),
            after: after.flatten(),
        };
        query.finish()?;
        match list.user_id {
            _ if principal.is_admin => Ok(list),
            Some(user_id) if user_id != principal.user_id => {
                principal.require_admin()?;
                Ok(list)
            }
            _ => Ok(ListQuery { user_id: Some(principal.user_id), ..list }),
        }
    }
}

/// The orders of a page and, where there are more, the first one of the next.
fn page(db: &mut Db, list: &ListQuery) -> Result<Vec<Order>, Error> {
    let sql = match list.published {
        None => PAGE,
        Some(true) => PUBLISHED,
        Some(false) => UNPUBLISHED,
    };
    let status = list.status.map(Status::as_str);
    // Not prepared: the planner must see which filters there are.
    let rows = db.client.query_typed(
        sql,
        &[
            (&list.after, Type::UUID),
            (&list.user_id, Type::INT8),
            (&status, Type::TEXT),
            (&list.limit, Type::INT8),
        ],
    )?;
    let mut orders = rows.iter().map(order_of_row).collect::<Result<Vec<_>, Error>>()?;
    renew_deadline();
    add_lines(db, &mut orders)?;
    Ok(orders)
}
