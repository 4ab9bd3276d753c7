"""What may be shown of a URL, of options, and of errors that other libraries raise."""

from __future__ import annotations

import traceback

import pytest

from dscheck.storage.redact import Secrets, redact_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        ("s3://AKIA:wJal/rX+@bucket/run", "s3://***@bucket/run"),
        ("s3://AKIA:p@ss@bucket/run", "s3://***@bucket/run"),
        ("https://ghp_token@host/run", "https://***@host/run"),
        ("sftp://me@host/run", "sftp://me@host/run"),
        ("sftp://me:@host/run", "sftp://***@host/run"),
        ("abfs://box@account.dfs.core.windows.net/run", "abfs://box@account.dfs.core.windows.net/run"),
        ("gs://bucket/run@7", "gs://bucket/run@7"),
        ("az://box/run?sv=1&sig=abc", "az://box/run?***"),
        ("az://box/run#token", "az://box/run#***"),
        ("az://box/run?", "az://box/run"),
        ("/disk/a:b@c?d", "/disk/a:b@c?d"),
        ("", ""),
    ],
)
def test_a_url_is_shown_without_what_lets_anybody_in(url: str, shown: str) -> None:
    assert redact_url(url) == shown
    assert redact_url(shown) == shown


def test_every_spelling_of_a_secret_is_hidden() -> None:
    secrets = Secrets(
        "sftp://me:p%40ssword@host/run?sig=Zm9v%3D&sp=read",
        {
            "secret": "top-secret",
            "endpoint_url": "https://minio:minio-password@store:9000",
            "client_kwargs": {"aws_secret_access_key": b"nested-key", "region_name": "eu-west-1"},
            "tokens": ["first-token", "second-token"],
            "anon": False,
            "user": "somebody",
        },
    )
    told = (
        "me:p%40ssword p@ssword Zm9v%3D Zm9v= read top-secret minio-password nested-key first-token second-token "
        "eu-west-1 somebody"
    )
    assert secrets.hide(told).replace("***", "").split() == ["eu-west-1", "somebody"]
    assert "secret" not in repr(secrets)


def test_a_text_that_is_too_short_to_be_a_secret_is_left_in() -> None:
    assert Secrets("", {"token": "a"}).hide("a bad answer") == "a bad answer"


def test_an_error_that_tells_a_secret_is_no_cause() -> None:
    secrets = Secrets("", {"password": "planted"})
    for error in (OSError("login planted failed"), OSError(13, "no", "sftp://planted@host")):
        assert secrets.harmless(error) is None
    outer = OSError("failed")
    outer.__cause__ = ValueError("planted")
    assert secrets.harmless(outer) is None
    plain = OSError("failed")
    assert secrets.harmless(plain) is plain


def test_what_is_raised_from_a_harmless_cause_prints_no_secret() -> None:
    secrets = Secrets("", {"password": "planted"})

    def run() -> None:
        try:
            raise OSError("login planted failed")
        except OSError as error:
            raise ValueError(secrets.hide(str(error))) from secrets.harmless(error)

    with pytest.raises(ValueError, match=r"login \*\*\* failed") as caught:
        run()
    assert "planted" not in "".join(traceback.format_exception(caught.value))
