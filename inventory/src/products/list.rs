//! `GET /api/v1/products`: its parameters and its pages.

use chassis::Problem;
use chassis::query::{self, Query};
use rouille::Response;

use super::store;
use crate::App;

/// The longest text that is searched for, in characters.
const MAX_SEARCH_CHARS: usize = 200;

/// The parameters of the list.
#[derive(Debug)]
pub struct ListQuery {
    /// Only products whose sku or name has this text.
    pub search: Option<String>,
    /// Only products of which some are available, or only those of which none is.
    pub in_stock: Option<bool>,
    /// At most this many.
    pub limit: i64,
    /// Only skus after this one.
    pub after: String,
}

impl ListQuery {
    /// Parses the part of the URL after `?`.
    pub fn parse(query: &str) -> Result<ListQuery, Problem> {
        let mut query = Query::parse(query, &["search", "in_stock", "limit", "after"])?;
        let list = ListQuery {
            search: query.text("search", MAX_SEARCH_CHARS),
            in_stock: query.flag("in_stock"),
            limit: query.limit(),
            after: query.text("after", 64).unwrap_or_default(),
        };
        query.finish()?;
        Ok(list)
    }
}

/// One page, with the address of the next one.
pub fn list_response(app: &App, list: &ListQuery) -> Result<Response, Problem> {
    let products = app.db.read(|db| store::page(db, list, &app.currency))?;
    Ok(query::page(products, list.limit, |last| {
        let limit = list.limit.to_string();
        let in_stock = list.in_stock.map(|flag| flag.to_string());
        let parameters = [
            ("limit", Some(limit.as_str())),
            ("after", Some(&last.sku)),
            ("search", list.search.as_deref()),
            ("in_stock", in_stock.as_deref()),
        ];
        format!("/api/v1/products?{}", query::build(&parameters))
    }))
}
