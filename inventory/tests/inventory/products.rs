//! Products.

use chassis::testing::{TestDb, connect_as_service, test_var};
use inventory::products::store::PAGE_BY_TEXT;
use postgres::error::SqlState;
use postgres::types::Type;
use serde_json::{Value, json};

use crate::Store;

const PRODUCTS: &str = "/api/v1/products";

#[test]
fn a_product_is_created_shown_changed_and_retired() {
    let store = Store::new();
    let body = json!({
        "sku": "classic-box", "name": " The Classic Box ", "description": "Six films", "price": 9.99,
        "image_url": "https://example.org/classic.png", "unknown": true,
    });
    let created = store.admin("POST", PRODUCTS, &body);
    assert_eq!(created.status, 201, "{}", created.body);
    assert_eq!(created.header("Location"), Some("/api/v1/products/classic-box"));
    let shown = store.get("/api/v1/products/classic-box");
    assert_eq!((shown.status, &shown.body), (200, &created.body));
    assert_eq!(shown.etag(), created.etag());
    assert_eq!(shown.header("Cache-Control"), Some("no-cache"));
    let product = shown.json();
    let created_at = product["created_at"].as_str().unwrap();
    let expected = format!(
        r#"{{"sku":"classic-box","name":"The Classic Box","description":"Six films","price":"9.99","currency":"EUR","image_url":"https://example.org/classic.png","available":0,"created_at":"{created_at}","updated_at":"{created_at}"}}"#
    );
    assert_eq!(shown.body, expected);
    assert!(created_at.len() == 24 && created_at.ends_with('Z'), "{created_at}");

    let changed = store.admin(
        "PATCH",
        "/api/v1/products/classic-box",
        &json!({ "price": "12.5", "description": null, "image_url": null }),
    );
    assert_eq!(changed.status, 200, "{}", changed.body);
    let product = changed.json();
    assert_eq!(product["price"], "12.50");
    assert_eq!((&product["description"], &product["image_url"]), (&json!(""), &Value::Null));
    assert_eq!(product["name"], "The Classic Box");
    assert_ne!(changed.etag(), created.etag());

    let retired = store.admin("DELETE", "/api/v1/products/classic-box", &Value::Null);
    assert_eq!((retired.status, &*retired.body), (204, ""));
    for (method, path) in
        [("GET", "/api/v1/products/classic-box"), ("DELETE", "/api/v1/products/classic-box")]
    {
        assert_eq!(store.admin(method, path, &Value::Null).status, 404, "{method}");
    }
    assert_eq!(store.get(PRODUCTS).json()["items"], json!([]));
    let again = store.admin("POST", PRODUCTS, &body);
    assert_eq!(again.status, 409, "{}", again.body);
    assert_eq!(again.json()["detail"], "there is or was a product with the sku classic-box");
}

#[test]
fn only_administrators_change_products_and_everybody_reads_them() {
    let store = Store::new();
    store.product("a", "1.00", 3);
    let customer = format!("Bearer {}", store.issuer.token(7, false));
    for (method, path, body) in [
        ("POST", "/api/v1/products", r#"{"sku":"b","name":"B","price":1}"#),
        ("PATCH", "/api/v1/products/a", "{}"),
        ("DELETE", "/api/v1/products/a", ""),
        ("GET", "/api/v1/products/a/stock", ""),
        ("PUT", "/api/v1/products/a/stock", r#"{"on_hand":1}"#),
        ("GET", "/api/v1/products/a/stock/adjustments", ""),
        ("POST", "/api/v1/products/a/stock/adjustments", r#"{"change":1,"reason":"x"}"#),
    ] {
        let nobody = store.ask(method, path, &[], body);
        assert_eq!(nobody.status, 401, "{method} {path}");
        assert_eq!(nobody.header("WWW-Authenticate"), Some("Bearer"));
        let forbidden = store.ask(method, path, &[("Authorization", &customer)], body);
        assert_eq!(forbidden.status, 403, "{method} {path}");
    }
    assert_eq!(store.get("/api/v1/products").status, 200);
    assert_eq!(store.get("/api/v1/products/a").json()["available"], 3);
    assert_eq!(store.stock("a"), (3, 0));
}

#[test]
fn bad_input_is_refused_with_one_entry_for_each_field() {
    let store = Store::new();
    store.product("a", "1.00", 0);
    let price = "must be an amount from 0.00 to 9999999999.99 with at most two decimals";
    for (value, rule) in [
        ("1.005", price),
        ("-1", price),
        ("1e30", price),
        ("\"NaN\"", price),
        ("\"one\"", price),
        ("\"\"", price),
        ("true", price),
        ("{}", price),
        ("10000000000", price),
        ("null", "must not be null"),
    ] {
        let body = format!(r#"{{"sku":"b","name":"B","price":{value}}}"#);
        let created =
            store.admin_with("POST", PRODUCTS, &[], &serde_json::from_str(&body).unwrap());
        assert_eq!(created.status, 422, "{value}: {}", created.body);
        assert_eq!(created.json()["errors"], json!([{ "field": "price", "rule": rule }]));
        let changed = store.ask(
            "PATCH",
            "/api/v1/products/a",
            &[("Authorization", &format!("Bearer {}", store.admin))],
            &format!(r#"{{"price":{value}}}"#),
        );
        assert_eq!(changed.status, 422, "{value}: {}", changed.body);
    }
    for sku in ["", &"x".repeat(65), "a b", "é", "a/b", ".."] {
        let body = json!({ "sku": sku, "name": "B", "price": 1 });
        let created = store.admin("POST", PRODUCTS, &body);
        assert_eq!(created.status, 422, "{sku}");
        assert_eq!(created.json()["errors"][0]["field"], "sku");
        assert_eq!(created.json()["errors"].as_array().unwrap().len(), 1);
    }
    for (body, detail) in [
        (json!({ "sku": "z" }), "sku cannot be changed"),
        (json!({ "currency": "USD" }), "currency must be EUR, the currency of this store"),
        (json!({ "on_hand": 1 }), "on_hand is set by PUT /api/v1/products/{sku}/stock"),
        (json!({ "name": null }), "name must not be null"),
        (json!({ "name": "a\0b" }), "name must not contain U+0000"),
        (json!({ "name": "x".repeat(201) }), "name must be at most 200 characters"),
        (json!({ "description": "x".repeat(2001) }), "description must be at most 2000 characters"),
        (
            json!({ "image_url": "/a.png" }),
            "image_url must be an absolute https or http URL of at most 2000 characters",
        ),
        (json!([]), "body must be a JSON object"),
    ] {
        let changed = store.admin("PATCH", "/api/v1/products/a", &body);
        assert_eq!((changed.status, &changed.json()["detail"]), (422, &json!(detail)));
    }
    let bearer = format!("Bearer {}", store.admin);
    let text = [("Authorization", &*bearer), ("Content-Type", "text/plain")];
    assert_eq!(store.ask("POST", PRODUCTS, &text, "{}").status, 415);
    assert_eq!(store.ask("POST", PRODUCTS, &text[..1], "{").status, 400);
    for path in ["/api/v1/products/none", "/api/v1/products/a%20b", "/api/v1/products/é"] {
        assert_eq!(store.get(path).status, 404, "{path}");
        assert_eq!(store.admin("PATCH", path, &json!({})).status, 404, "{path}");
    }
    assert_eq!(store.get("/api/v1/products/a").json()["price"], "1.00");
}

#[test]
fn a_price_is_kept_to_the_cent_however_it_is_written() {
    let store = Store::new();
    for (number, price, shown) in [
        (1, "0", "0.00"),
        (2, "\"0.10\"", "0.10"),
        (3, "0.30", "0.30"),
        (4, "9999999999.99", "9999999999.99"),
        (5, "1e2", "100.00"),
        (6, "\"19.9\"", "19.90"),
    ] {
        let body = format!(r#"{{"sku":"p{number}","name":"P","price":{price}}}"#);
        let bearer = format!("Bearer {}", store.admin);
        let created = store.ask("POST", PRODUCTS, &[("Authorization", &bearer)], &body);
        assert_eq!(created.status, 201, "{price}: {}", created.body);
        assert_eq!(created.json()["price"], shown);
        assert_eq!(store.get(&format!("{PRODUCTS}/p{number}")).json()["price"], shown);
    }
}

#[test]
fn a_tag_names_what_is_shown_and_a_change_compares_only_what_it_can_change() {
    let store = Store::new();
    store.product("a", "1.00", 5);
    let path = "/api/v1/products/a";
    let first = store.get(path).etag().to_owned();
    let not_modified = store.ask("GET", path, &[("If-None-Match", &first)], "");
    assert_eq!((not_modified.status, &*not_modified.body), (304, ""));
    store.set_stock("a", 4);
    let second = store.ask("GET", path, &[("If-None-Match", &first)], "");
    assert_eq!((second.status, &second.json()["available"]), (200, &json!(4)));

    // A sale in between does not concern a change of the text.
    let changed = store.admin_with("PATCH", path, &[("If-Match", &first)], &json!({ "name": "A" }));
    assert_eq!(changed.status, 200, "{}", changed.body);
    let late = store.admin_with("PATCH", path, &[("If-Match", &first)], &json!({ "name": "B" }));
    assert_eq!(
        (late.status, &late.json()["detail"]),
        (412, &json!("the product has changed since"))
    );
    let late = store.admin_with("DELETE", path, &[("If-Match", &first)], &Value::Null);
    assert_eq!(late.status, 412);
    let weak = format!("W/{}", changed.etag());
    let never = store.admin_with("PATCH", path, &[("If-Match", &weak)], &json!({ "name": "B" }));
    assert_eq!(never.status, 412);
    assert_eq!(store.get(path).json()["name"], "A");
    let right = store.admin_with("DELETE", path, &[("If-Match", changed.etag())], &Value::Null);
    assert_eq!(right.status, 204);
}

#[test]
fn the_list_is_searched_and_read_page_by_page() {
    let store = Store::new();
    for (sku, name) in [("b-2", "Blue"), ("B-1", "Grün"), ("a", "Red 100%"), ("c_1", "blueish")] {
        let body = json!({ "sku": sku, "name": name, "price": 1, "description": "Blue" });
        assert_eq!(store.admin("POST", PRODUCTS, &body).status, 201);
    }
    store.set_stock("a", 1);
    store.set_stock("c_1", 2);
    let skus = |path: &str| -> Vec<String> {
        let list = store.get(path);
        assert_eq!(list.status, 200, "{path}: {}", list.body);
        let items = list.json()["items"].as_array().unwrap().clone();
        items.iter().map(|item| item["sku"].as_str().unwrap().to_owned()).collect()
    };
    // In the order of the bytes.
    assert_eq!(skus(PRODUCTS), ["B-1", "a", "b-2", "c_1"]);
    assert_eq!(skus("/api/v1/products?search=BLUE"), ["b-2", "c_1"]);
    assert_eq!(skus("/api/v1/products?search=GR%C3%9CN"), ["B-1"]);
    assert_eq!(skus("/api/v1/products?search=0%25"), ["a"]);
    assert_eq!(skus("/api/v1/products?search=_"), ["c_1"]);
    assert_eq!(skus("/api/v1/products?search=b-"), ["B-1", "b-2"]);
    assert_eq!(skus("/api/v1/products?in_stock=true"), ["a", "c_1"]);
    assert_eq!(skus("/api/v1/products?in_stock=false"), ["B-1", "b-2"]);
    assert_eq!(skus("/api/v1/products?in_stock=true&search=blue"), ["c_1"]);

    let mut path = "/api/v1/products?limit=3".to_owned();
    let mut all = Vec::new();
    loop {
        let page = store.get(&path);
        all.extend(skus(&path));
        let body = page.json();
        let Some(next) = body["next"].as_str() else { break };
        assert_eq!(page.next().as_deref(), Some(next));
        path = next.to_owned();
    }
    assert_eq!(all, ["B-1", "a", "b-2", "c_1"]);
    for (query, detail) in [
        ("limit=0", "limit must be 1 to 100"),
        ("in_stock=yes", "in_stock must be true or false"),
        ("search=a&search=b", "search must be given once"),
    ] {
        let refused = store.get(&format!("{PRODUCTS}?{query}"));
        assert_eq!((refused.status, &refused.json()["detail"]), (422, &json!(detail)));
    }
}

#[test]
fn other_services_get_up_to_100_products_in_the_order_they_ask() {
    let store = Store::new();
    store.product("a", "1.00", 5);
    store.product("b", "2.50", 0);
    assert_eq!(store.admin("DELETE", "/api/v1/products/b", &Value::Null).status, 204);
    let found =
        store.internal("GET", "/internal/products?sku=b&sku=none&sku=a&sku=%00", &Value::Null);
    let expected = json!({ "currency": "EUR", "items": [
        { "sku": "b", "name": "The b", "price": "2.50", "available": 0, "retired": true },
        { "sku": "a", "name": "The a", "price": "1.00", "available": 5, "retired": false },
    ] });
    assert_eq!((found.status, found.json()), (200, expected));
    for (count, status) in [(0, 422), (100, 200), (101, 422)] {
        let query: Vec<String> = (0..count).map(|number| format!("sku=s{number}")).collect();
        let path = format!("/internal/products?{}", query.join("&"));
        assert_eq!(store.internal("GET", &path, &Value::Null).status, status, "{count}");
    }
    assert_eq!(store.get("/internal/products?sku=a").status, 404, "not in the public API");
}

#[test]
fn a_cache_may_keep_products_as_the_setting_says() {
    let setting = ("INVENTORY_PRODUCTS_CACHE_CONTROL", "public, max-age=60".to_owned());
    let store = Store::with(&[setting]);
    store.product("a", "1.00", 5);
    for path in ["/api/v1/products", "/api/v1/products/a"] {
        assert_eq!(store.get(path).header("Cache-Control"), Some("public, max-age=60"), "{path}");
    }
}

#[test]
fn a_search_among_20_000_products_uses_the_trigram_index() {
    let db = TestDb::new(&test_var("INVENTORY_DB_NAME"));
    let fill = "insert into products (sku, name, price)
        select 'p' || n, 'Product number ' || n, 1 from generate_series(1, 20000) as n;
        insert into stock (sku) select sku from products;
        analyze products; analyze stock";
    db.superuser().batch_execute(fill).unwrap();
    // As the service: the function is inlined only for a role that may execute it.
    let plan = connect_as_service("INVENTORY", &db.name)
        .query_typed(
            &format!("explain {PAGE_BY_TEXT}"),
            &[
                (&"", Type::TEXT),
                (&None::<bool>, Type::BOOL),
                (&20i64, Type::INT8),
                (&"%NUMBER 777%", Type::TEXT),
            ],
        )
        .unwrap();
    let plan: Vec<&str> = plan.iter().map(|row| row.get(0)).collect();
    assert!(plan.iter().any(|line| line.contains("products_search")), "{plan:#?}");
}

#[test]
fn the_service_may_do_what_it_does_and_the_schema_refuses_the_rest() {
    let store = Store::new();
    store.product("a", "1.00", 5);
    let mut service = connect_as_service("INVENTORY", &store.db.name);
    for statement in [
        "delete from products",
        "delete from stock",
        "truncate stock",
        "update stock_adjustments set reason = 'x'",
        "delete from stock_adjustments",
        "delete from reservation_lines",
        "alter table stock drop constraint stock_not_oversold",
    ] {
        let refused = service.batch_execute(statement).unwrap_err();
        assert_eq!(refused.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{statement}");
    }
    let mut admin = store.superuser();
    for statement in [
        "update stock set reserved = 6",
        "update stock set reserved = -1",
        "update stock set on_hand = -1",
        "update stock set on_hand = 1000000001",
        "insert into reservations (order_id, state) values (gen_random_uuid(), 'held')",
        "insert into reservations (order_id, state) values (gen_random_uuid(), 'lost')",
        "insert into products (sku, name, price) values ('a b', 'x', 1)",
        "insert into products (sku, name, price) values ('..', 'x', 1)",
        "insert into products (sku, name, price) values ('b', 'x', -0.01)",
    ] {
        let refused = admin.batch_execute(statement).unwrap_err();
        assert_eq!(refused.code(), Some(&SqlState::CHECK_VIOLATION), "{statement}");
    }
}
