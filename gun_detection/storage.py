"""S3 through boto3: streams, paging, conditional puts, bounded retries, presigned URLs.

Keys are data: they are never used as local paths.
"""

import hashlib
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
)
from botocore.model import OperationModel

from gun_detection.errors import (
    GunDetectionError,
    NotFoundError,
    ServiceUnavailableError,
    SettingsError,
    TerminalError,
)
from gun_detection.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef

# What every answer of S3 to these has; a page that a proxy sends in its place has not.
_ALWAYS_THERE = {
    "GetObject": "ETag",
    "HeadObject": "ETag",
    "PutObject": "ETag",
    "CreateMultipartUpload": "UploadId",
    "UploadPart": "ETag",
    "CompleteMultipartUpload": "ETag",
    "ListObjectsV2": "Name",
}
# Codes of botocore for an error without S3's document. Only to HEAD does S3 answer in this way; a
# proxy does while the server behind it is away.
_NO_DOCUMENT = {"", "403", "404", "409", "412"}
_MISSING = {"NoSuchKey", "NoSuchBucket", "NotFound", "NoSuchVersion"}
_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
_SICK = {"500", "InternalError", "507", "InsufficientStorage"}
_EXISTS = {"PreconditionFailed", "ConditionalRequestConflict"}
# A name that the server cannot hold (`a/../b`), or an object under a key of its owner's (SSE-C).
_REFUSED = {"InvalidRequest", "InvalidArgument", "InvalidURI", "KeyTooLongError"}

# Bytes of a key in S3.
_LONGEST = 1024
# The most that S3 takes in one request.
_DELETED_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object as a listing shows it; `etag` is without quotes, `size` in bytes."""

    bucket: str
    key: str
    size: int
    etag: str
    last_modified: datetime

    def check(self) -> None:
        """Raise `ValueError` for what no object has, where others than S3 tell of one.

        PostgreSQL could not hold it, and no other of the same list would be noted.
        """
        for name, value in (("key", self.key), ("ETag", self.etag)):
            # Encoding refuses halves of surrogate pairs.
            if len(value.encode()) > _LONGEST:
                raise ValueError(f"a {name} of more than {_LONGEST} bytes")
        if "\0" in self.etag:
            raise ValueError("an ETag with a NUL")
        if not 0 <= self.size < 2**63:
            raise ValueError(f"a size of {self.size} bytes")


class Storage:
    """A client of one S3-compatible server; safe to share between threads.

    Every method raises `NotFoundError` for a bucket or object that is not there,
    `SettingsError` for refused or missing credentials and for a name that no bucket can have,
    `TerminalError` with reason `ARCHIVED` or `REQUEST_REFUSED` for an object that cannot be had,
    and `ServiceUnavailableError` (to be retried) when the server is down, throttles or breaks the
    connection. That is after `attempts`, with jittered backoff, in each of which the server may be
    silent for `silence` seconds.
    """

    def __init__(self, settings: Settings, *, attempts: int = 5, silence: float = 60.0) -> None:
        secret = settings.s3_secret_access_key
        # The pool serves as many threads as scoring uses.
        config = Config(
            retries={"mode": "standard", "max_attempts": attempts},
            connect_timeout=5,
            read_timeout=silence,
            max_pool_connections=32,
            s3={"addressing_style": "path" if settings.s3_endpoint_url else "auto"},
            # Other servers than AWS do not all know the newer default checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        self._region = settings.s3_region
        self._endpoint = settings.s3_endpoint_url
        self._client: S3Client = boto3.client(
            "s3",
            endpoint_url=settings.s3_endpoint_url,
            region_name=settings.s3_region,
            aws_access_key_id=settings.s3_access_key_id,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
            config=config,
        )
        self._client.meta.events.register("after-call.s3", _check_answer)

    @property
    def endpoint_url(self) -> str:
        """Where requests go to, without a slash at its end."""
        return self._client.meta.endpoint_url.rstrip("/")

    def ensure_bucket(self, bucket: str) -> bool:
        """Create the bucket if it is not there; True when this call created it."""
        if self.bucket_exists(bucket):
            return False
        arguments: dict[str, Any] = {"Bucket": bucket}
        if self._endpoint is None and self._region != "us-east-1":
            arguments["CreateBucketConfiguration"] = {"LocationConstraint": self._region}
        with self.errors(bucket, ""):
            try:
                self._client.create_bucket(**arguments)
            except ClientError as error:
                if _code(error) not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                    raise
                return False
        return True

    def bucket_exists(self, bucket: str) -> bool:
        # HEAD is not enough: nothing in its answer tells S3 from a proxy before it.
        try:
            with self.errors(bucket, ""):
                self._client.list_objects_v2(Bucket=bucket, MaxKeys=1)
        except NotFoundError:
            return False
        except SettingsError as denied:
            # Not all who may read may list, and some servers let them ask in this way. That it is
            # S3 that answers is known by now.
            try:
                self._client.head_bucket(Bucket=bucket)
            except (BotoCoreError, ClientError) as error:
                if isinstance(error, ClientError) and _code(error) == "404":
                    return False
                raise denied from error
        return True

    def list_objects(self, bucket: str, prefix: str = "") -> Iterator[StoredObject]:
        """All objects under a prefix in key order, over as many pages as there are."""
        with self.errors(bucket, prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=bucket, Prefix=prefix
            )
            for page in pages:
                for item in page.get("Contents", []):
                    # Folder markers hold nothing.
                    if item["Key"].endswith("/") and item["Size"] == 0:
                        continue
                    yield StoredObject(
                        bucket,
                        item["Key"],
                        item["Size"],
                        item["ETag"].strip('"'),
                        item["LastModified"],
                    )

    def exists(self, bucket: str, key: str) -> bool:
        try:
            with self.errors(bucket, key):
                self._head(bucket, key)
        except NotFoundError:
            return False
        return True

    def size(self, bucket: str, key: str) -> int:
        """The object's size in bytes."""
        with self.errors(bucket, key):
            return self._head(bucket, key)["ContentLength"]

    def _head(self, bucket: str, key: str) -> "HeadObjectOutputTypeDef":
        try:
            return self._client.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if _code(error) not in _NO_DOCUMENT:
                raise
        # The answer to GET has the document that tells whether it is S3 that says so.
        answer = self._client.get_object(Bucket=bucket, Key=key, Range="bytes=0-0")
        answer["Body"].close()
        # It was stored between the two.
        return self._client.head_object(Bucket=bucket, Key=key)

    def get(
        self, bucket: str, key: str, *, max_bytes: int | None = None, etag: str | None = None
    ) -> bytes:
        """The object's bytes, whole; with `etag` only if they are still the ones that were listed.

        Raises `TerminalError` with reason `TOO_LARGE` before reading more than `max_bytes`.
        """
        arguments: dict[str, Any] = {"Bucket": bucket, "Key": key}
        if etag:
            arguments["IfMatch"] = etag
        with self.errors(bucket, key):
            response = self._client.get_object(**arguments)
            size = response["ContentLength"]
            with response["Body"] as body:
                if max_bytes is not None and size > max_bytes:
                    raise TerminalError(
                        f"s3://{bucket}/{key} has {size} bytes, more than the {max_bytes} allowed",
                        reason="TOO_LARGE",
                    )
                data: bytes = body.read()
        if len(data) != size:
            raise ServiceUnavailableError(
                f"s3://{bucket}/{key}: got {len(data)} of {size} bytes; try again"
            )
        return data

    def put(
        self, bucket: str, key: str, data: bytes, *, content_type: str = "application/octet-stream"
    ) -> None:
        with self.errors(bucket, key):
            self._client.put_object(Bucket=bucket, Key=key, Body=data, ContentType=content_type)

    def put_if_absent(
        self, bucket: str, key: str, data: bytes, *, content_type: str = "application/octet-stream"
    ) -> bool:
        """Store the object unless the key is taken (`If-None-Match: *`); True when stored."""
        with self.errors(bucket, key):
            try:
                self._client.put_object(
                    Bucket=bucket, Key=key, Body=data, ContentType=content_type, IfNoneMatch="*"
                )
            except ClientError as error:
                if _code(error) not in _EXISTS:
                    raise
                return False
        return True

    def put_file(self, bucket: str, key: str, path: Path) -> None:
        """Upload a file in parts; a broken upload leaves no object behind."""
        # Not by `upload_file`, which has an error of its own for whatever S3 answers.
        manager = create_transfer_manager(self._client, TransferConfig(use_threads=False))
        with self.errors(bucket, key), manager:
            manager.upload(str(path), bucket, key).result()

    @contextmanager
    def open(self, bucket: str, key: str) -> Iterator[IO[bytes]]:
        """The object as a stream that is read as it arrives."""
        with self.errors(bucket, key):
            response = self._client.get_object(Bucket=bucket, Key=key)
        with response["Body"] as body, self.errors(bucket, key):
            yield body  # type: ignore[misc]

    def download(self, bucket: str, key: str, path: Path, *, sha256: str | None = None) -> Path:
        """Write the object to `path` at once or not at all; checks `sha256` before it is visible.

        Raises `TerminalError` with reason `SHA256_MISMATCH` for other bytes than expected.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".download-")
        try:
            with os.fdopen(handle, "wb") as file, self.open(bucket, key) as body:
                while chunk := body.read(2**20):
                    digest.update(chunk)
                    file.write(chunk)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise TerminalError(
                    f"s3://{bucket}/{key} has sha256 {digest.hexdigest()}, recorded is {sha256}: "
                    "the object was changed or damaged; restore it from a backup",
                    reason="SHA256_MISMATCH",
                )
            os.replace(name, path)
        except OSError as error:
            # A full disk does not say by itself which one it is.
            error.filename = error.filename or str(path)
            raise
        finally:
            Path(name).unlink(missing_ok=True)
        return path

    def delete(self, bucket: str, key: str) -> None:
        with self.errors(bucket, key):
            self._client.delete_object(Bucket=bucket, Key=key)

    def delete_many(self, bucket: str, keys: Collection[str]) -> None:
        """Delete all these objects; those that are not there are none the worse."""
        rest = list(keys)
        while rest:
            part, rest = rest[:_DELETED_AT_ONCE], rest[_DELETED_AT_ONCE:]
            with self.errors(bucket, part[0]):
                self._client.delete_objects(
                    Bucket=bucket, Delete={"Objects": [{"Key": key} for key in part], "Quiet": True}
                )

    def presigned_get(self, bucket: str, key: str, *, seconds: int = 300) -> str:
        """A URL that reads the object without credentials for `seconds`."""
        return self._client.generate_presigned_url(
            "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=seconds
        )

    @contextmanager
    def errors(self, bucket: str, key: str) -> Iterator[None]:
        """Raise what botocore raises inside as an error of ours."""
        try:
            yield
        except ClientError as error:
            if _code(error) in _NO_DOCUMENT:
                raise ServiceUnavailableError(
                    f"s3://{bucket}/{key}: the answer is no error of S3: {self.no_s3()}"
                ) from error
            raise _explain(error, bucket, key) from error
        except _NoAnswerOfS3Error as error:
            raise ServiceUnavailableError(
                f"s3://{bucket}/{key}: the answer is none of S3: {self.no_s3()}"
            ) from error
        except NoCredentialsError as error:
            raise SettingsError(
                "no S3 credentials: set GUN_DETECTION_S3_ACCESS_KEY_ID and "
                "GUN_DETECTION_S3_SECRET_ACCESS_KEY"
            ) from error
        except ParamValidationError as error:
            # Nothing was sent: it has nothing to do with how the server is.
            raise SettingsError(
                f"s3://{bucket}/{key}: no bucket or object can have this name: check it"
            ) from error
        except BotoCoreError as error:
            server = self._endpoint or "AWS S3"
            raise ServiceUnavailableError(
                f"s3://{bucket}/{key}: {server} cannot be reached ({error})"
            ) from error

    def no_s3(self) -> str:
        """What to do where an answer is none that an S3 server gives."""
        return (
            f"what answers at {self.endpoint_url} is no S3 server; see whether the server behind "
            "this proxy is up, and whether GUN_DETECTION_S3_ENDPOINT_URL is right"
        )


class _NoAnswerOfS3Error(Exception):
    pass


def _check_answer(model: OperationModel, parsed: dict[str, Any], **_: object) -> None:
    """What the client calls with each answer, those within an upload in parts as well."""
    sign = _ALWAYS_THERE.get(model.name)
    if sign is None or sign in parsed or "Error" in parsed:
        return
    if "Body" in parsed:
        parsed["Body"].close()
    raise _NoAnswerOfS3Error(f"{model.name} without {sign}")


def _explain(error: ClientError, bucket: str, key: str) -> GunDetectionError:
    where, code = f"s3://{bucket}/{key}", _code(error)
    if code in _MISSING:
        no_bucket = code == "NoSuchBucket" or not key
        return NotFoundError(
            f"the {'bucket' if no_bucket else 'object'} of {where} does not exist: check its name",
            reason="BUCKET_MISSING" if no_bucket else "OBJECT_MISSING",
        )
    if code in _DENIED:
        return SettingsError(
            f"{where}: access denied ({code}); check GUN_DETECTION_S3_ACCESS_KEY_ID, "
            "its secret and its rights",
            reason="ACCESS_DENIED",
        )
    if code in _EXISTS:
        return ServiceUnavailableError(
            f"{where} was changed while it was read", reason="OBJECT_CHANGED"
        )
    if code == "RequestTimeTooSkewed":
        # As a clock may be set meanwhile, or the next attempt run on another machine.
        return ServiceUnavailableError(
            f"{where}: the clock of this machine and that of the S3 server are more than 15 "
            "minutes apart: have both set by a time server",
            reason="CLOCK_WRONG",
        )
    if code == "InvalidObjectState":
        return TerminalError(
            f"{where} is archived: restore it to a storage class that can be read",
            reason="ARCHIVED",
        )
    if code in _REFUSED:
        return TerminalError(
            f"{where}: the S3 server refuses this request ({error}); copy the object to another "
            "name, without encryption by a key of its owner's",
            reason="REQUEST_REFUSED",
        )
    hint = "; its log says why, a full disk is a common cause" if code in _SICK else ""
    return ServiceUnavailableError(f"{where}: the S3 server answered {code}{hint}")


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "Unknown"))


def parse_s3_uri(uri: str) -> tuple[str, str]:
    """(bucket, key or prefix) of `s3://bucket/key`; raises `SettingsError` for anything else."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise SettingsError(f"{uri!r} is not an S3 address: write s3://bucket/prefix")
    return bucket, key
