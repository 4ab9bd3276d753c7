"""What `storage_options` may hold for s3://, and the botocore client that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from dscheck.errors import ConfigError

MIB = 1 << 20
LEAST_PART_BYTES, MOST_PARTS = 5 * MIB, 10_000
"""Of S3: parts but the last have at least so many bytes, and an object has at most so many parts."""

# Of one sendall of at most SLICE_BYTES, of one connect, and between two packets of an answer: what takes longer is
# given up and tried on another connection.
CONNECT_S, ANSWER_S = 10.0, 30.0


@dataclass(frozen=True, slots=True, repr=False)
class S3Options:
    """Names as s3fs has them where it has them; whatever is not given, botocore finds in the usual places: environment,
    ~/.aws, the instance's or the pod's role. `repr` shows nothing: there are secrets.

    key, secret, token, profile, anon: who asks. endpoint_url, region_name: whom. client_kwargs, config_kwargs: more for
    botocore. part_bytes: of one part of an upload. requests_in_flight: parts or ranges under way at once. patience_s:
    how long to try again what may succeed later.
    """

    key: str | None = None
    secret: str | None = None
    token: str | None = None
    profile: str | None = None
    anon: bool = False
    endpoint_url: str | None = None
    region_name: str | None = None
    client_kwargs: Mapping[str, Any] = field(default_factory=dict)
    config_kwargs: Mapping[str, Any] = field(default_factory=dict)
    part_bytes: int = 16 * MIB
    requests_in_flight: int = 16
    patience_s: float = 120.0

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> S3Options:
        """Raises ConfigError for what is not known here, by name alone, and for values out of bounds."""
        known = [entry.name for entry in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(f"unknown storage options of s3://: {', '.join(unknown)}; known are {', '.join(known)}")
        options = cls(**given)
        for name, least in (("part_bytes", LEAST_PART_BYTES), ("requests_in_flight", 1)):
            value = getattr(options, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name}={value!r} of s3://: expected an int, at least {least}")
        if not isinstance(options.patience_s, int | float) or not 0 <= options.patience_s < 1e7:
            raise ConfigError(f"patience_s={options.patience_s!r} of s3://: expected seconds")
        return options

    def client(self) -> Any:
        """A new botocore client, by what environment and files say now. Raises ConfigError for what cannot work."""
        try:
            session = botocore.session.Session(profile=self.profile)
            client = self._make(session, {})
            if "s3" not in self.config_kwargs and not _is_aws(client.meta.endpoint_url):
                # Other servers seldom have a DNS name for each bucket.
                client = self._make(session, {"addressing_style": "path"})
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"no client for s3:// can be made: {error}") from None
        return client

    def _make(self, session: botocore.session.Session, s3: dict[str, Any]) -> Any:
        config: dict[str, Any] = {
            "retries": {"total_max_attempts": 1},  # Backoff tries again, on a new connection
            "connect_timeout": CONNECT_S,
            "read_timeout": ANSWER_S,
            "max_pool_connections": 2 * self.requests_in_flight + 4,
            # Parts carry the CRC32C that we compute, and blocks are verified by ours: no second checksum, and no
            # SHA-256 of the payload, which would cost 0.5 s of a core for 512 MB.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "s3": {"payload_signing_enabled": False} | s3,
        }
        if self.anon:
            config["signature_version"] = UNSIGNED
        given = {
            "endpoint_url": self.endpoint_url,
            "region_name": self.region_name,
            "aws_access_key_id": self.key,
            "aws_secret_access_key": self.secret,
            "aws_session_token": self.token,
        }
        config.update(self.config_kwargs)
        return session.create_client("s3", config=Config(**config), **{**given, **self.client_kwargs})


def _is_aws(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
