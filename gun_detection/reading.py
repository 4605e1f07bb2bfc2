"""Reading many small objects from S3 from many threads, for scoring.

obstore reads nearly everything, at a fraction of boto3's cost (`benchmarks/reading.py`). Names
that it would change, and all that goes wrong, are left to a request that botocore's own parts sign
and send: it takes any name as it is and sees the server's own error code.
"""

import hashlib
import logging
import os
import random
import re
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import botocore.session
import obstore
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest, AWSResponse
from botocore.credentials import Credentials
from botocore.exceptions import ClientError, NoCredentialsError, ResponseStreamingError
from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies
from obstore.exceptions import BaseError
from obstore.store import S3Store
from urllib3.exceptions import HTTPError

from gun_detection.errors import ServiceUnavailableError, TerminalError
from gun_detection.settings import Settings
from gun_detection.storage import Storage

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Credential

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
# Bytes a second: what comes slower is given up, and asked for once more.
_SLOWEST = 100_000
_CHUNK = 2**18
_LONGEST_ERROR = 2**16
_MD5 = re.compile(r"[0-9a-f]{32}")
_CODE = re.compile(rb"<Code>([\w.]+)</Code>")
# obstore takes a key for a path: it drops slashes at the ends, and refuses what else is here.
_NO_PATH = re.compile(r"(^|/)\.{0,2}(/|$)|[\x00-\x1f\x7f]")
# The bucket is in another region: boto3 finds out which, and asks there.
_ELSEWHERE = {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed"}


class Reader:
    """Reads whole objects; safe to share between threads, to be made anew after a fork.

    `seconds` is about the longest that one `get` takes before it gives up; only a body of more
    than a megabyte may take longer, as long as 100 kB of it come each second.
    """

    def __init__(self, settings: Settings, *, seconds: float = 60.0) -> None:
        self._storage = Storage(settings)
        self._region = settings.s3_region
        self._seconds = seconds
        self._timeout = seconds / (_ATTEMPTS + 2)
        session = botocore.session.get_session()
        self._credentials: Any = session.get_credentials()
        if settings.s3_access_key_id and settings.s3_secret_access_key:
            secret = settings.s3_secret_access_key.get_secret_value()
            self._credentials = Credentials(settings.s3_access_key_id, secret)
        certificates: str | None = session.get_config_variable("ca_bundle")
        # Its stubs know neither a path to verify by nor the two timeouts (to connect, to read).
        options: dict[str, Any] = {
            "verify": certificates or True,
            "timeout": (min(5.0, self._timeout), self._timeout),
        }
        self._http = URLLib3Session(
            proxies=get_environ_proxies(self._storage.endpoint_url),
            max_pool_connections=32,
            **options,
        )
        self._stores: dict[str, S3Store] = {}
        self._client: ClientConfig = {
            "allow_http": True,
            "timeout": timedelta(seconds=self._timeout),
        }
        if certificates:
            self._client["root_certificate"] = Path(certificates).read_bytes()
        # Buckets with objects under keys of AWS KMS: ETags say nothing about the bytes there.
        self._encrypted: set[str] = set()

    def get(
        self, bucket: str, key: str, *, max_bytes: int | None = None, etag: str | None = None
    ) -> bytes:
        """The same as `Storage.get`, and tried again when a server or the network fails.

        Bytes whose MD5 is not their ETag are read again, and returned only when two readings
        agree: not every ETag is an MD5, and damage on the way hardly repeats itself.
        """
        deadline = time.monotonic() + self._seconds
        data, intact = self._read_fast(bucket, key, max_bytes, etag)
        if data is not None and intact:
            return data
        for attempt in count(1):
            try:
                return self._read_intact(bucket, key, max_bytes, etag, data)
            except ServiceUnavailableError as error:
                # 0.5, 1, 2 and 4 s at most, when there is a minute.
                pause = random.uniform(0.5, 1) * 2**attempt * self._seconds / 240
                late = time.monotonic() + pause > deadline
                if attempt == _ATTEMPTS or late or error.reason == "OBJECT_CHANGED":
                    raise
            time.sleep(pause)
        raise AssertionError

    def _read_fast(
        self, bucket: str, key: str, max_bytes: int | None, etag: str | None
    ) -> tuple[bytes | None, bool]:
        """The bytes, if obstore can get them, and whether they are known to be intact."""
        if _NO_PATH.search(key) or self._credentials is None or _runtime_is_lost():
            return None, False
        store = self._stores.get(bucket)
        if store is None:
            store = self._stores.setdefault(bucket, self._open(bucket))
        try:
            result = obstore.get(store, key, options={"if_match": etag} if etag else None)
            size, found = result.meta["size"], result.meta["e_tag"]
            if found is None:
                return None, False
            _check_size(bucket, key, size, max_bytes)
            data = result.bytes().to_bytes()
        except (BaseError, OSError) as error:
            logger.debug("s3://%s/%s is asked for again: %s", bucket, key, error)
            return None, False
        return data, bucket in self._encrypted or _vouches(found, data)

    def _open(self, bucket: str) -> S3Store:
        return S3Store(
            bucket,
            endpoint=self._storage.endpoint_url,
            region=self._region,
            virtual_hosted_style_request=False,
            skip_signature=False,
            credential_provider=self._obstore_credentials,
            client_options=self._client,
            # Trying again is ours.
            retry_config={"max_retries": 0},
        )

    def _obstore_credentials(self) -> "S3Credential":
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            # botocore renews its own in time; obstore asks again five minutes before this.
            "expires_at": datetime.now(UTC) + timedelta(minutes=10),
        }

    def _read_intact(
        self, bucket: str, key: str, max_bytes: int | None, etag: str | None, earlier: bytes | None
    ) -> bytes:
        """`earlier` are bytes that were read before and that nothing vouches for."""
        data, intact = self._read(bucket, key, max_bytes, etag)
        if not intact and data != earlier:
            earlier, (data, intact) = data, self._read(bucket, key, max_bytes, etag)
        if intact or data == earlier:
            return data
        raise ServiceUnavailableError(
            f"s3://{bucket}/{key}: its bytes come damaged, each time in another way; "
            "look for a broken network card, proxy or memory"
        )

    def _read(
        self, bucket: str, key: str, max_bytes: int | None, etag: str | None
    ) -> tuple[bytes, bool]:
        """The bytes, and whether they are known to be intact, or cannot be known to be."""
        with self._storage.errors(bucket, key):
            response = self._send(bucket, key, etag)
            # A connection with a rest in it goes; one that was read to the end is kept.
            with closing(response.raw):
                if response.status_code != 200:
                    code = self._error_code(response)
                    if code in _ELSEWHERE:
                        return self._storage.get(bucket, key, max_bytes=max_bytes, etag=etag), True
                    raise ClientError({"Error": {"Code": code}}, "GetObject")
                if "ETag" not in response.headers:
                    # Every object has one; a page of a proxy's own has not.
                    raise ServiceUnavailableError(
                        f"s3://{bucket}/{key}: the answer is no object: {self._storage.no_s3()}"
                    )
                size = int(response.headers.get("Content-Length", -1))
                _check_size(bucket, key, size, max_bytes)
                data = self._body(response, size)
        if len(data) != size:
            raise ServiceUnavailableError(
                f"s3://{bucket}/{key}: got {len(data)} of {size} bytes; try again"
            )
        if _is_encrypted(response):
            self._encrypted.add(bucket)
            return data, True
        return data, _vouches(response.headers.get("ETag"), data)

    def _send(self, bucket: str, key: str, etag: str | None) -> AWSResponse:
        if self._credentials is None:
            raise NoCredentialsError
        url = f"{self._storage.endpoint_url}/{quote(bucket)}/{quote(key)}"
        request = AWSRequest("GET", url, headers={"If-Match": etag} if etag else {})
        request.stream_output = True
        credentials = self._credentials.get_frozen_credentials()
        S3SigV4Auth(credentials, "s3", self._region).add_auth(request)
        return self._http.send(request.prepare())

    def _error_code(self, response: AWSResponse) -> str:
        """The code in the XML of an answer that is no object, or else its status."""
        size = int(response.headers.get("Content-Length", _LONGEST_ERROR))
        found = _CODE.search(self._body(response, min(size, _LONGEST_ERROR)))
        return found[1].decode() if found else str(response.status_code)

    def _body(self, response: AWSResponse, size: int) -> bytes:
        """What arrives of `size` bytes in time."""
        deadline = time.monotonic() + max(self._timeout, size / _SLOWEST)
        chunks: list[bytes] = []
        left = size
        try:
            while left > 0 and (chunk := response.raw.read1(min(left, _CHUNK))):
                chunks.append(chunk)
                left -= len(chunk)
                if time.monotonic() > deadline:
                    break
        except HTTPError as error:
            raise ResponseStreamingError(error=error) from error
        return b"".join(chunks)


_runtime_of: int | None = None


def _runtime_is_lost() -> bool:
    """Whether obstore was used before a fork: its threads are not here, and it waits for ever."""
    global _runtime_of
    if _runtime_of is None:
        _runtime_of = os.getpid()
    return _runtime_of != os.getpid()


def _check_size(bucket: str, key: str, size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise TerminalError(
            f"s3://{bucket}/{key} has {size} bytes, more than the {max_bytes} allowed",
            reason="TOO_LARGE",
        )


def _is_encrypted(response: AWSResponse) -> bool:
    """Whether the ETag is no MD5 because of the encryption, as AWS documents.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """
    headers = response.headers
    return (
        headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
        or "x-amz-server-side-encryption-customer-algorithm" in headers
    )


def _vouches(etag: str | None, data: bytes) -> bool:
    """Whether the ETag is the MD5 of the bytes, or looks like no MD5, as of an upload in parts."""
    digest = (etag or "").strip('"')
    if not _MD5.fullmatch(digest):
        return True
    return hashlib.md5(data, usedforsecurity=False).hexdigest() == digest
