"""Google Cloud Storage in memory: the part of its JSON API that gcsfs, google-cloud-storage and tensorstore use.

  with serve_buckets("bucket") as server:
    server.objects["bucket"]["a/b"] = b"..."
    server.requests  # ["GET /storage/v1/b/...", ...]

Objects, generations and preconditions follow https://cloud.google.com/storage/docs/json_api/v1. Other buckets do not
exist, and access to a bucket with the name "forbidden" is denied.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

OBJECT = r"(?:/download)?/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)"


class BucketServer(ThreadingHTTPServer):
  daemon_threads = True

  def __init__(self, *buckets):
    super().__init__(("127.0.0.1", 0), RequestHandler)
    self.objects = {name: {} for name in buckets}
    self.generations, self.uploads = {}, {}
    self.requests, self.changes = [], []  # changes: (object, its content or None)
    self.lock, self.count = threading.Lock(), itertools.count(2)
    self.url = f"http://127.0.0.1:{self.server_port}"

  def handle_error(self, request, client_address):
    """Ignore clients that close the connection."""

  def put(self, bucket, name, data, query=()):
    """Store an object if the query's precondition holds, and return its resource."""
    with self.lock:
      self.check_generation(bucket, name, dict(query))
      self.objects[bucket][name] = data
      self.changes.append((name, data))
      self.generations[bucket, name] = next(self.count)
      return self.resource(bucket, name)

  def delete(self, bucket, name, query):
    with self.lock:
      self.check_generation(bucket, name, query)
      if self.objects[bucket].pop(name, None) is None:
        raise HttpError(404)
      self.changes.append((name, None))

  def check_generation(self, bucket, name, query):
    current = self.generations.get((bucket, name), 1) if name in self.objects[bucket] else 0
    if query.get("ifGenerationMatch", str(current)) != str(current):
      raise HttpError(412)

  def resource(self, bucket, name):
    """Return the description of an object in the JSON API."""
    data = self.objects[bucket][name]
    digest = base64.b64encode(hashlib.md5(data).digest()).decode()
    info = {"kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(data)), "md5Hash": digest}
    generation = str(self.generations.get((bucket, name), 1))
    times = dict.fromkeys(("timeCreated", "updated"), "2024-01-01T00:00:00.000Z")
    return info | times | {"generation": generation, "metageneration": "1", "etag": generation, "id": name}

  def list_objects(self, bucket, query):
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    first, end = query.get("startOffset", ""), query.get("endOffset")
    with self.lock:
      names = sorted(self.objects[bucket])
      matching = [n for n in names if n.startswith(prefix) and n >= first and (not end or n < end)]
      inside = [n for n in matching if delimiter and delimiter in n[len(prefix) :]]
      prefixes = sorted({n[: n.index(delimiter, len(prefix)) + 1] for n in inside})
      items = [self.resource(bucket, n) for n in matching if n not in set(inside)]
    return {"kind": "storage#objects", "items": items, "prefixes": prefixes}


class HttpError(Exception):
  """Its argument is the status."""


class RequestHandler(BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True

  def log_message(self, *_):
    pass

  def handle_any(self):
    parts = urlsplit(self.path)
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    self.server.requests.append(f"{self.command} {self.path}")
    try:
      status, headers, content = self.answer(parts.path, dict(parse_qsl(parts.query)), body)
    except HttpError as error:
      status, headers, content = error.args[0], {}, {"error": {"code": error.args[0], "message": "refused"}}
    if not isinstance(content, bytes):
      headers, content = headers | {"Content-Type": "application/json"}, json.dumps(content).encode()
    head = [f"HTTP/1.1 {status} -", *(f"{k}: {v}" for k, v in headers.items()), f"Content-Length: {len(content)}"]
    self.wfile.write("\r\n".join([*head, "", ""]).encode() + (b"" if self.command == "HEAD" else content))

  do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

  def answer(self, path, query, body):
    """Return (status, headers, content) of a request."""
    server = self.server
    bucket = re.search(r"/b/([^/]+)", path)[1]
    if bucket == "forbidden":
      raise HttpError(403)
    if bucket not in server.objects:
      raise HttpError(404)
    if re.fullmatch(r"/storage/v1/b/[^/]+", path):
      return 200, {}, {"kind": "storage#bucket", "name": bucket, "id": bucket}
    if path.startswith("/upload/"):
      return self.upload(bucket, query, body)
    if re.fullmatch(r"/storage/v1/b/[^/]+/o", path):
      return 200, {}, server.list_objects(bucket, query)
    if copy := re.fullmatch(OBJECT + r"/(?:rewriteTo|copyTo)/b/(?P<to>[^/]+)/o/(?P<target>[^/]+)", path):
      data = self.data(bucket, unquote(copy["name"]))
      copied = server.put(copy["to"], unquote(copy["target"]), data)
      return 200, {}, {"kind": "storage#rewriteResponse", "done": True, "resource": copied}
    name = unquote(re.fullmatch(OBJECT, path)["name"])
    if self.command == "DELETE":
      server.delete(bucket, name, query)
      return 204, {}, b""
    data = self.data(bucket, name)
    generation = str(server.resource(bucket, name)["generation"])
    if query.get("alt") != "media":
      return 200, {}, server.resource(bucket, name)
    headers = {"x-goog-generation": generation, "Content-Type": "application/octet-stream"}
    if query.get("ifGenerationNotMatch") == generation:
      return 304, headers, b""
    if query.get("ifGenerationMatch") not in (None, generation):
      raise HttpError(412)
    if span := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
      first = int(span[1]) if span[1] else max(len(data) - int(span[2]), 0)
      last = min(int(span[2] or len(data)), len(data) - 1) if span[1] else len(data) - 1
      if first >= len(data):
        raise HttpError(416)
      return 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]
    return 200, headers, data

  def data(self, bucket, name):
    if name not in self.server.objects[bucket]:
      raise HttpError(404)
    return self.server.objects[bucket][name]

  def upload(self, bucket, query, body):
    server = self.server
    if query["uploadType"] == "media":
      return 200, {}, server.put(bucket, query["name"], body, query)
    if query["uploadType"] == "multipart":
      kind = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
      info, content = BytesParser().parsebytes(kind + body).get_payload()
      data = content.get_payload(decode=True)
      return 200, {}, server.put(bucket, json.loads(info.get_payload())["name"], data, query)
    if "upload_id" not in query:
      number = str(next(server.count))
      server.uploads[number] = query.get("name") or json.loads(body)["name"], b""
      location = f"{server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
      return 200, {"Location": location}, b""
    name, received = server.uploads[query["upload_id"]]
    received += body
    server.uploads[query["upload_id"]] = name, received
    if self.headers["Content-Range"].endswith(f"/{len(received)}"):
      return 200, {}, server.put(bucket, name, received)
    return 308, {"Range": f"bytes=0-{len(received) - 1}"}, b""


@contextlib.contextmanager
def serve_buckets(*buckets):
  """Serve these buckets until the block ends."""
  server = BucketServer(*buckets)
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
