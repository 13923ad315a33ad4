"""What schemathesis.toml cannot say."""

import uuid

import schemathesis

# The path and the body that each Idempotency-Key was sent with first.
bodies = {}


@schemathesis.hook
def map_body(context, body):
    """Writes whole numbers in digits.

    For JSON Schema 99.0 is an integer like 99; the services take 99 only.
    """
    if isinstance(body, dict):
        for name in ("number_of_items", "on_hand", "change", "quantity", "user_id"):
            number = body.get(name)
            if isinstance(number, float) and number.is_integer():
                body = {**body, name: int(number)}
    return body


@schemathesis.hook
def before_call(context, case, kwargs):
    """Gives each request its own Idempotency-Key; a key with another request is 422, as it should be."""
    key = (case.headers or {}).get("Idempotency-Key")
    body = repr((case.operation.path, case.path_parameters, case.body))
    # A key means the same with and without quotes.
    if isinstance(key, str) and bodies.setdefault(key.strip(' "'), body) != body:
        case.headers["Idempotency-Key"] = str(uuid.uuid4())
