"""Who may ask, and how: methods, models, keys, hosts, origins and content types."""

from argparse import Namespace

import pytest
from served import served
from tiny_adapter import make_files

from retention_gates.recipes.serve import access_rules
from retention_gates.recipes.serving.access import LOCAL, Rules
from retention_gates.recipes.serving.start import client_name

pytest.importorskip("fastapi", reason="needs the extra serve")
TEXT = "/v1/completions"
ASKED = {"prompt": "king", "temperature": 0, "max_tokens": 3}
KEY = {"Authorization": "Bearer second"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("access"))


@pytest.fixture(scope="module")
def client(files):
    with served(files, rows=2) as (client, _):
        yield client


@pytest.fixture(scope="module")
def guarded(files):
    rules = Rules(("first", "second"), ("https://chat.example",), (*LOCAL, "gates.example"))
    with served(files, rows=2, rules=rules) as (client, _):
        yield client


def test_methods(client):
    for path in ("/health", "/v1/models", "/metrics", "/v1/models/tiny"):
        head = client.ask(path, method="HEAD")
        assert head.status == 200 and head.body == b"" and int(head.headers["content-length"]) > 0
    options = client.ask(TEXT, method="OPTIONS")
    assert options.status == 204 and "POST" in options.headers["allow"]
    wrong = client.ask(TEXT, method="PUT")
    assert wrong.status == 405 and wrong.json["error"]["code"] == "method_not_allowed" and "allow" in wrong.headers


def test_models_by_name(client, tmp_path):
    assert client.ask("/v1/models/tiny").json["id"] == "tiny"
    for name in ("other", "user/other", ""):
        assert client.ask(f"/v1/models/{name}").status in (307, 404)
    assert client.ask("/v1/models/user/other").json["error"]["code"] == "model_not_found"
    (tmp_path / "gates").mkdir()
    assert client_name(str(tmp_path / "gates")) == client_name(f"{tmp_path}/gates/") == "gates"
    assert client_name("user/adapter@main") == "user/adapter@main"


def test_obfuscation_may_be_declined_only(client):
    body = {**ASKED, "stream": True, "stream_options": {"include_obfuscation": False}}
    assert client.ask(TEXT, body).events[-1] == "[DONE]"
    body["stream_options"] = {"include_obfuscation": True}
    assert client.ask(TEXT, body).status == 400


def test_keys(guarded):
    assert guarded.ask(TEXT, ASKED, **KEY).status == 200
    assert guarded.ask(TEXT, ASKED, Authorization="bearer first").status == 200
    assert guarded.ask("/health").status == 200
    for given in (
        {},
        {"Authorization": "Bearer third"},
        {"Authorization": "Basic second"},
        {"Authorization": "Bearer"},
    ):
        for path, body in ((TEXT, ASKED), ("/v1/models", None), ("/metrics", None)):
            reply = guarded.ask(path, body, **given)
            assert reply.status == 401 and reply.json["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "host, status",
    [
        *[("localhost", 200), ("127.0.0.1:1", 200), ("[::1]:80", 200), ("GATES.example", 200)],
        *[("evil.example", 403), ("localhost.evil.example:80", 403), ("[bad", 403)],
    ],
)
def test_hosts(guarded, host, status):
    reply = guarded.ask(TEXT, ASKED, Host=host, **KEY)
    assert reply.status == status and (status == 200 or reply.json["error"]["code"] == "host_not_allowed")


def test_origins(client, guarded):
    assert client.ask(TEXT, ASKED, Origin="https://chat.example").status == 403
    assert client.ask(TEXT, ASKED, Origin="null").status == 403
    own = f"http://127.0.0.1:{client.port}"
    assert client.ask(TEXT, ASKED, Origin=own).status == 200
    reply = guarded.ask(TEXT, ASKED, Origin="https://chat.example", **KEY)
    assert reply.status == 200 and reply.headers["access-control-allow-origin"] == "https://chat.example"
    refused = guarded.ask(TEXT, ASKED, Origin="https://chat.example")
    assert refused.status == 401 and "access-control-allow-origin" in refused.headers
    preflight = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    preflight["Access-Control-Request-Headers"] = "authorization,content-type"
    assert guarded.ask(TEXT, method="OPTIONS", **preflight).status == 200
    assert guarded.ask(TEXT, method="OPTIONS", **{**preflight, "Origin": "https://evil.example"}).status == 400
    assert guarded.ask(TEXT, ASKED, Origin="https://evil.example", **KEY).status == 403


@pytest.mark.parametrize(
    "kind, status",
    [("application/json", 200), ("Application/JSON; charset=utf-8", 200), ("text/plain", 415), ("", 415)],
)
def test_content_types(client, kind, status):
    reply = client.ask(TEXT, ASKED, **{"Content-Type": kind})
    assert reply.status == status and (status == 200 or reply.json["error"]["code"] == "unsupported_media_type")


def options(**given):
    usual = {"api_key": None, "cors_origin": None, "allowed_host": None, "host": "127.0.0.1"}
    return Namespace(**(usual | given))


def test_rules_from_options(monkeypatch):
    monkeypatch.delenv("RETENTION_GATES_API_KEY", raising=False)
    assert access_rules(options()).keys == () and set(access_rules(options()).hosts) == set(LOCAL)
    assert access_rules(options(host="0.0.0.0")).hosts is None
    assert "gates.example" in access_rules(options(host="0.0.0.0", allowed_host=["gates.example"])).hosts
    monkeypatch.setenv("RETENTION_GATES_API_KEY", "of the environment".replace(" ", "-"))
    assert access_rules(options()).keys == ("of-the-environment",)
    assert access_rules(options(api_key=["own"])).keys == ("own",)
    for wrong in ({"api_key": ["a b"]}, {"api_key": [""]}, {"cors_origin": ["chat.example"]}):
        with pytest.raises(ValueError, match="must be"):
            access_rules(options(**wrong))
    with pytest.raises(ValueError, match="without a path"):
        access_rules(options(cors_origin=["https://chat.example/"]))
