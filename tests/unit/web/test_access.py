"""Who may come in, and where pages are served."""

import pytest

from utils.core.errors import InputError
from utils.web.access import AUTH_VARIABLE, WebArguments, is_welcome, read_accounts


def test_accounts_from_the_environment(monkeypatch):
    monkeypatch.setenv(AUTH_VARIABLE, "ann:pass:word")
    accounts = read_accounts(WebArguments())
    assert accounts == {"ann": "pass:word"}
    assert is_welcome(accounts, "ann", "pass:word")
    assert not any(is_welcome(accounts, *pair) for pair in (("ann", "pass"), ("bob", ""), ("", ""), ("ann", "")))


def test_accounts_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv(AUTH_VARIABLE, "eve:in")
    path = tmp_path / "users"
    path.write_text("ann:a\n\n 小明:密码 \n", encoding="utf-8")
    assert read_accounts(WebArguments(auth_file=str(path))) == {"ann": "a", "小明": "密码"}
    path.write_text("ann:a\nsecret\n")
    with pytest.raises(InputError) as raised:
        read_accounts(WebArguments(auth_file=str(path)))
    assert str(raised.value) == f"{path}:2: need user:password"
    path.write_text("\n")
    with pytest.raises(InputError, match="it has none"):
        read_accounts(WebArguments(auth_file=str(path)))
    monkeypatch.delenv(AUTH_VARIABLE)
    assert read_accounts(WebArguments()) == {}


def test_several_mistakes_are_said_together():
    with pytest.raises(InputError) as raised:
        WebArguments(port=0, max_queue=0, auth="a:b", auth_file="f")
    assert len(str(raised.value).splitlines()) == 3
