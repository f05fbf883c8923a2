"""Keys and addresses: what is set to nothing never opens a server."""

from __future__ import annotations

import socket

import pytest

from mor.errors import MorError
from mor.server.keys import choose_keys
from mor.server.ray.settings import read_settings
from mor.server.sockets import open_sockets, url_of
from tests.server.live import serving


@pytest.mark.parametrize(
    ("given", "environment", "wanted"),
    [
        (None, {}, ()),
        ([], {}, ()),
        (None, {"MOR_API_KEY": "correct horse"}, ("correct horse",)),
        (None, {"MOR_API_KEY": "a,b;c"}, ("a,b;c",)),
        (["one", "two words"], {"MOR_API_KEY": "three"}, ("one", "two words")),
        (["one"], {"MOR_API_KEY": ""}, ("one",)),
    ],
)
def test_where_keys_come_from(
    given: list[str] | None, environment: dict[str, str], wanted: tuple[str, ...]
) -> None:
    assert choose_keys(given, environment) == wanted


@pytest.mark.parametrize("value", ["", " ", "\t\n", "secret\n", " secret", "a\nb", "a\0b"])
def test_a_key_that_no_client_can_send(value: str) -> None:
    for given, environment in ((None, {"MOR_API_KEY": value}), (["well", value], {})):
        with pytest.raises(MorError) as refused:
            choose_keys(given, environment)
        assert "secret\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["", " "])
def test_a_key_of_a_deployment_that_is_set_to_nothing(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOR_API_KEY", raising=False)
    with pytest.raises(MorError, match="empty key"):
        read_settings({"model": "prose", "api_key": key}).served()


def test_a_key_of_several_words_opens_and_its_words_do_not() -> None:
    with serving(api_keys=["correct horse"]) as live, live.http() as http:
        for key, status in (("correct horse", 200), ("correct", 401), ("horse", 401)):
            answer = http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == status, key
        # Whatever is not said to be open needs a key, now and when somebody adds a path.
        assert http.post("/tokenize", json={}).status_code == 401
        assert http.get("/nothing").status_code == 401


def test_an_address() -> None:
    opened = open_sockets("127.0.0.1", 0)
    try:
        port = opened[0].getsockname()[1]
        assert url_of(opened[0]) == f"http://127.0.0.1:{port}"
        with socket.socket() as nobody:  # it does not listen yet
            assert nobody.connect_ex(("127.0.0.1", port)) != 0
    finally:
        for one in opened:
            one.close()
