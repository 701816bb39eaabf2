"""Stand-ins for what is not here: the checkpoint's two encoders, of the real ones' interface, and a web server."""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import onnx
import trustme
from onnx import TensorProto, helper


def encoders(folder):
    """speech_tokenizer_v3.onnx: [1, 128, T], [1] -> [1, ceil(T / 4)]; campplus.onnx: [1, T, 80] -> [1, 192]."""
    folder.mkdir()
    number = helper.make_tensor

    def save(name, nodes, inputs, output, constants):
        graph = helper.make_graph(nodes, name, inputs, [output], constants)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / name)

    value = helper.make_tensor_value_info
    save(
        "speech_tokenizer_v3.onnx",
        [
            helper.make_node("ReduceMean", ["feats"], ["mean"], axes=[1], keepdims=0),
            helper.make_node("Slice", ["mean", "zero", "end", "axis", "four"], ["kept"]),
            helper.make_node("Mul", ["kept", "scale"], ["scaled"]),
            helper.make_node("Abs", ["scaled"], ["positive"]),
            helper.make_node("Cast", ["positive"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Mod", ["whole", "codes"], ["indices"]),
        ],
        [value("feats", TensorProto.FLOAT, [1, 128, "T"]), value("feats_length", TensorProto.INT32, [1])],
        value("indices", TensorProto.INT64, [1, "N"]),
        [
            number("zero", TensorProto.INT64, [1], [0]),
            number("end", TensorProto.INT64, [1], [1 << 40]),
            number("axis", TensorProto.INT64, [1], [1]),
            number("four", TensorProto.INT64, [1], [4]),
            number("scale", TensorProto.FLOAT, [1], [1e4]),
            number("codes", TensorProto.INT64, [1], [6561]),
        ],
    )
    mix = np.random.default_rng(0).standard_normal((80, 192)).astype(np.float32)
    save(
        "campplus.onnx",
        [
            helper.make_node("Abs", ["input"], ["size"]),
            helper.make_node("ReduceMean", ["size"], ["mean"], axes=[1], keepdims=0),
            helper.make_node("MatMul", ["mean", "mix"], ["output"]),
        ],
        [value("input", TensorProto.FLOAT, [1, "T", 80])],
        value("output", TensorProto.FLOAT, [1, 192]),
        [number("mix", TensorProto.FLOAT, [80, 192], mix.ravel())],
    )
    return folder


class Web(http.server.ThreadingHTTPServer):
    """Answers over TLS what `pages` has for a path: the content, or a function that answers by the request's handler."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext):
        super().__init__(("localhost", 0), _Handler)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.pages: dict[str, bytes | Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []
        self.address = f"https://localhost:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # clients that hang up are what some tests are about


class _Handler(http.server.BaseHTTPRequestHandler):
    disable_nagle_algorithm = True  # a body would wait 40 ms behind its headers

    def do_GET(self):
        self.server.asked.append(self.path)
        page = self.server.pages.get(self.path)
        if callable(page):
            page(self)
        elif page is None:
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

    def log_message(self, *_):
        pass


@contextmanager
def web(folder):
    """A server, and in `folder`/ca.pem the authority that its certificate is of, for SSL_CERT_FILE."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    server = Web(context)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # how soon it ends
    yield server
    server.shutdown()
    server.server_close()
