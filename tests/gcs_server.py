"""A small server of Google Cloud Storage's JSON API on loopback, which the real clients talk to in tests.

The emulators on PyPI ignore generation preconditions on media uploads (the ones TensorStore makes), and some of them
suffix ranges, key ranges of listings, moveTo and compose. Here:

  - every write makes a new object of a new generation, in one moment; it appears only when the upload is complete;
  - `ifGenerationMatch` and `ifGenerationNotMatch` hold for reads, writes, deletions, copies, moves and compositions;
  - listings have prefix, delimiter, startOffset, endOffset, maxResults and pages of at most 1,000;
  - reads have ranges, suffix ranges included; uploads are media, multipart or resumable;
  - permissions are all or nothing: an object name that starts with a prefix in `forbidden` gives 403.

Requests are counted in `requests`. Not emulated: access control, folders, versions kept, encryption.
"""

import base64
import contextlib
import dataclasses
import itertools
import json
import pathlib
import re
import threading
import urllib.parse
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import google_crc32c

_PAGE = 1000


@dataclasses.dataclass(frozen=True)
class Object:
    content: bytes
    generation: int
    content_type: str = "application/octet-stream"
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)

    def resource(self) -> dict:
        """Returns the fields that copies take over."""
        return {"contentType": self.content_type, "metadata": self.metadata}


class _Refused(Exception):
    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class GcsServer:
    """The buckets, and the requests made to them.

    Attributes:
      url: for STORAGE_EMULATOR_HOST and TENSORSTORE_GCS_HTTP_URL.
      buckets: bucket -> name -> Object.
      requests: (method, path with query) of all requests so far.
      forbidden: prefixes of object names that cannot be read or written.
      lose_answer_of: the end of a path; the next request for such a one is done, and answered 503.
    """

    def __init__(self):
        self.buckets: dict[str, dict[str, Object]] = {}
        self.requests: list[tuple[str, str]] = []
        self.forbidden: list[str] = []
        self.lose_answer_of: str | None = None
        self._uploads: dict[str, tuple[str, str, dict, dict[str, str], bytearray]] = {}
        self._generations = itertools.count(1_700_000_000_000_000)
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"gcs": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "GcsServer":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()

    def put_folder(self, folder: pathlib.Path, bucket: str, name: str) -> None:
        """Puts the files of a local folder into `name`/ of a bucket."""
        for path in folder.rglob("*"):
            if path.is_file():
                made = Object(path.read_bytes(), next(self._generations))
                self.buckets[bucket][f"{name}/{path.relative_to(folder)}"] = made

    @contextlib.contextmanager
    def counted(self) -> Iterator[list[tuple[str, str]]]:
        """The requests made in the block, complete at its end."""
        start, counted = len(self.requests), []
        yield counted
        counted += self.requests[start:]

    def environment(self) -> dict[str, str]:
        """Environment variables that direct the clients to this server.

        The control plane, which would tell if a bucket has folders, uses gRPC and is not emulated; the check for a
        metadata server takes seconds.
        """
        return {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url, "NO_GCE_CHECK": "true",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}

    # The API: each method returns status, headers, body.

    def handle(self, method: str, path: str, query: dict[str, str], headers, body: bytes):
        with self._lock:
            for pattern, methods in _ROUTES.items():
                if (match := re.fullmatch(pattern, path)) and method in methods:
                    arguments = [urllib.parse.unquote(group) for group in match.groups()]
                    return getattr(self, methods[method])(*arguments, query=query, headers=headers, body=body)
            raise _Refused(501, f"{method} {path} is not implemented by the test server")

    def _objects(self, bucket: str, *names: str) -> dict[str, Object]:
        if bucket not in self.buckets:
            raise _Refused(404, "The specified bucket does not exist.")
        if any(name.startswith(prefix) for name in names for prefix in self.forbidden):
            raise _Refused(403, "the caller does not have storage.objects access")
        return self.buckets[bucket]

    def _checked(self, bucket: str, name: str, query: dict[str, str], prefix: str = "if", exist: bool = True):
        """Returns the object if it meets the preconditions; None if it does not exist."""
        stored = self._objects(bucket, name).get(name)
        generation = stored.generation if stored else 0
        if (wanted := query.get(f"{prefix}GenerationMatch")) is not None and int(wanted) != generation:
            raise _Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if (unwanted := query.get(f"{prefix}GenerationNotMatch")) is not None and int(unwanted) == generation:
            raise _Refused(304, "")
        if exist and (stored is None or int(query.get("generation") or generation) != generation):
            raise _Refused(404, f"No such object: {bucket}/{name}")
        return stored

    def _put(self, bucket: str, name: str, content: bytes, query: dict[str, str], about: dict):
        self._checked(bucket, name, query, exist=False)
        content_type = about.get("contentType") or "application/octet-stream"
        made = Object(bytes(content), next(self._generations), content_type, about.get("metadata", {}))
        self.buckets[bucket][name] = made
        return _json(self._resource(bucket, name, made))

    def _resource(self, bucket: str, name: str, stored: Object) -> dict[str, str]:
        crc = base64.b64encode(google_crc32c.value(stored.content).to_bytes(4, "big")).decode()
        return {"kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(stored.content)),
                "generation": str(stored.generation), "metageneration": "1", "crc32c": crc,
                "updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z", **stored.resource()}

    def create_bucket(self, query, headers, body):
        name = json.loads(body)["name"]
        self.buckets.setdefault(name, {})
        return self.bucket(name, query, headers, b"")

    def bucket(self, bucket, query, headers, body):
        self._objects(bucket)
        return _json({"kind": "storage#bucket", "name": bucket, "location": "US", "locationType": "region"})

    def list(self, bucket, query, headers, body):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        token, limit = query.get("pageToken", ""), min(int(query.get("maxResults", _PAGE)), _PAGE)
        objects, items, prefixes = self._objects(bucket, prefix), [], []
        last, seen, following = "", set(), None
        for name in sorted(objects, key=str.encode):
            if not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            entry = name if cut < 0 else name[: cut + len(delimiter)]
            if entry <= token or entry in seen:
                continue
            if len(seen) == limit:
                following = last
                break
            last = entry
            seen.add(entry)
            if cut < 0:
                items.append(self._resource(bucket, name, objects[name]))
            else:
                prefixes.append(entry)
        listing = {"kind": "storage#objects"}
        listing |= {"items": items} if items else {}
        listing |= {"prefixes": prefixes} if prefixes else {}
        return _json(listing | ({"nextPageToken": following} if following else {}))

    def get(self, bucket, name, query, headers, body):
        stored = self._checked(bucket, name, query)
        if query.get("alt") != "media":
            return _json(self._resource(bucket, name, stored))
        content, status, about = stored.content, 200, {}
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range", "")):
            first, last = match.groups()
            size = len(content)
            start = int(first) if first else max(size - int(last), 0)
            stop = min(int(last) + 1, size) if first and last else size
            if start >= size:
                raise _Refused(416, "The requested range cannot be satisfied.")
            content, status = content[start:stop], 206
            about["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        crc = base64.b64encode(google_crc32c.value(stored.content).to_bytes(4, "big")).decode()
        about |= {"Content-Type": stored.content_type, "x-goog-generation": str(stored.generation),
                  "x-goog-metageneration": "1", "x-goog-hash": f"crc32c={crc}",
                  "x-goog-stored-content-length": str(len(stored.content)),
                  "x-goog-stored-content-encoding": "identity"}
        return status, about, content

    def delete(self, bucket, name, query, headers, body):
        self._checked(bucket, name, query)
        del self.buckets[bucket][name]
        return 204, {}, b""

    def upload(self, bucket, query, headers, body):
        kind = query["uploadType"]
        if kind == "media":
            return self._put(bucket, query["name"], body, query, {"contentType": headers.get("Content-Type")})
        if kind == "multipart":
            about, (part_type, content) = _parts(headers["Content-Type"], body)
            resource = {"contentType": part_type} | json.loads(about[1])
            return self._put(bucket, resource["name"], content, query, resource)
        self._objects(bucket, query.get("name", ""))
        about = json.loads(body) if body else {}
        session = uuid.uuid4().hex
        name = about.get("name") or query["name"]
        about = {"contentType": headers.get("X-Upload-Content-Type")} | about
        self._uploads[session] = (bucket, name, about, query, bytearray())
        location = f"{self.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={session}"
        return 200, {"Location": location}, b""

    def resume(self, bucket, query, headers, body):
        if "upload_id" not in query:
            return self.upload(bucket, query=query, headers=headers, body=body)
        if query["upload_id"] not in self._uploads:
            raise _Refused(404, "no such upload")
        bucket, name, about, conditions, content = self._uploads[query["upload_id"]]
        sent = headers.get("Content-Range", f"bytes 0-0/{len(body)}")
        match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", sent)
        start, total = int(match[1] or len(content)), match[3]
        if start > len(content):
            raise _Refused(400, "the upload is invalid: a gap in it")
        if total == "*" and len(body) % (256 << 10):
            raise _Refused(400, "the upload is invalid: chunks before the last are multiples of 256 KiB")
        content[start:] = body
        if total != "*" and len(content) == int(total):
            del self._uploads[query["upload_id"]]
            return self._put(bucket, name, content, conditions, about)
        return 308, {"Range": f"bytes=0-{len(content) - 1}"} if content else {}, b""

    def cancel(self, bucket, query, headers, body):
        del self._uploads[query["upload_id"]]
        return 499, {}, b""

    def rewrite(self, bucket, name, to_bucket, to_name, query, headers, body):
        source = self._checked(bucket, name, _only(query, "ifSource"), "ifSource")
        _, _, resource = self._put(to_bucket, to_name, source.content, query, source.resource())
        size = str(len(source.content))
        return _json({"kind": "storage#rewriteResponse", "done": True, "totalBytesRewritten": size, "objectSize": size,
                      "resource": json.loads(resource)})

    def move(self, bucket, name, to_name, query, headers, body):
        source = self._checked(bucket, name, _only(query, "ifSource"), "ifSource")
        answer = self._put(bucket, to_name, source.content, query, source.resource())
        del self.buckets[bucket][name]
        return answer

    def compose(self, bucket, name, query, headers, body):
        asked = json.loads(body)
        if not 1 <= len(asked["sourceObjects"]) <= 32:
            raise _Refused(400, "1 to 32 sources")
        parts = [self._checked(bucket, part["name"], part.get("objectPreconditions", {})).content
                 for part in asked["sourceObjects"]]
        return self._put(bucket, name, b"".join(parts), query, asked.get("destination", {}))

    def batch(self, query, headers, body):
        boundary = re.search('boundary="?([^";]+)"?', headers["Content-Type"])[1]
        answers = []
        for part in body.decode().split(f"--{boundary}")[1:-1]:
            bucket, name, text = re.search(r"^DELETE \S*/b/([^/]+)/o/([^/? ]+)\??(\S*) HTTP", part, re.M).groups()
            try:
                status, _, content = self.delete(*map(urllib.parse.unquote, (bucket, name)), _query(text), {}, b"")
            except _Refused as error:
                status, content = error.status, _error(error)
            answers.append(f"--{boundary}\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} x\r\n"
                           f"Content-Length: {len(content)}\r\n\r\n{content.decode()}\r\n")
        answer = "".join(answers) + f"--{boundary}--"
        return 200, {"Content-Type": f"multipart/mixed; boundary={boundary}"}, answer.encode()


_BUCKET, _NAME = "/b/([^/]+)", "/o/([^/]+)"
_API, _UPLOAD = "/storage/v1", "/upload(?:/storage/v1)"
_ROUTES = {
    f"{_API}/b": {"POST": "create_bucket"},
    f"{_API}{_BUCKET}": {"GET": "bucket"},
    f"{_API}{_BUCKET}/o": {"GET": "list"},
    f"(?:/download)?{_API}{_BUCKET}{_NAME}": {"GET": "get", "DELETE": "delete"},
    f"{_API}{_BUCKET}{_NAME}/rewriteTo{_BUCKET}{_NAME}": {"POST": "rewrite"},
    f"{_API}{_BUCKET}{_NAME}/moveTo{_NAME}": {"POST": "move"},
    f"{_API}{_BUCKET}{_NAME}/compose": {"POST": "compose"},
    f"{_UPLOAD}{_BUCKET}/o": {"POST": "resume", "PUT": "resume", "DELETE": "cancel"},
    "/batch/storage/v1": {"POST": "batch"},
}


def _only(query: dict[str, str], prefix: str) -> dict[str, str]:
    return {name: value for name, value in query.items() if name.startswith(prefix)} | (
        {"generation": query["sourceGeneration"]} if query.get("sourceGeneration") else {})


def _query(text: str) -> dict[str, str]:
    return dict(urllib.parse.parse_qsl(text, keep_blank_values=True))


def _json(value: dict) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(error: _Refused) -> bytes:
    return json.dumps({"error": {"code": error.status, "message": str(error)}}).encode()


def _parts(content_type: str, body: bytes) -> list[tuple[str | None, bytes]]:
    """(content type, content) of the parts of a multipart body; its lines may end in CRLF or LF."""
    boundary, stored = re.search('boundary="?([^";]+)"?', content_type)[1].encode(), []
    for part in body.split(b"--" + boundary)[1:-1]:
        newline = b"\r\n" if part.startswith(b"\r\n") else b"\n"
        head, content = part.removeprefix(newline).split(2 * newline, 1)
        named = re.search(rb"(?i)content-type: *([^\r\n]+)", head)
        stored.append((named and named[1].decode(), content.removesuffix(newline)))
    return stored


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement of its headers
    gcs: GcsServer

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # gcsfs drops the slower of two requests
            super().handle()

    def _answer(self) -> None:
        path, _, text = self.path.partition("?")
        self.gcs.requests.append((self.command, self.path))
        body = self._body()
        try:
            status, headers, content = self.gcs.handle(self.command, path, _query(text), self.headers, body)
            if self.gcs.lose_answer_of and path.endswith(self.gcs.lose_answer_of):
                self.gcs.lose_answer_of = None
                raise _Refused(503, "backend error")
        except _Refused as error:
            status, headers, content = error.status, {"Content-Type": "application/json"}, _error(error)
            if status == 304:
                content = b""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def log_message(self, *_) -> None:
        pass
