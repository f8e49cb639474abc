"""A ComfyUI server over HTTP: queue a prompt, wait for it, fetch what it made."""

from __future__ import annotations

import io
import json
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load

Graph = dict[str, dict[str, Any]]


@dataclass
class Ran:
    """What became of a prompt: outputs by node, and the error if it failed."""

    outputs: dict[str, Any]
    status: str
    messages: list[Any] = field(default_factory=list)

    @property
    def error(self) -> str:
        """The message of the node that failed; empty when none did."""
        return next((m["exception_message"].strip() for kind, m in self.messages if kind == "execution_error"), "")

    @property
    def interrupted(self) -> bool:
        """Whether it was interrupted."""
        return any(kind == "execution_interrupted" for kind, _ in self.messages)

    def text(self, node: str) -> str:
        """The text that a node shows."""
        return self.outputs[node]["text"][0]


class Refused(Exception):
    """The server did not take the prompt; ``errors`` are its own words."""

    def __init__(self, errors: Any) -> None:
        super().__init__(json.dumps(errors))
        self.errors = errors


class Server:
    """One running ComfyUI."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.client = uuid.uuid4().hex

    def fetch(self, path: str, **query: Any) -> bytes:
        """GET."""
        with urllib.request.urlopen(f"{self.url}{path}?{urlencode(query)}", timeout=60) as answer:
            return answer.read()

    def json(self, path: str, **query: Any) -> Any:
        """GET, as JSON."""
        return json.loads(self.fetch(path, **query))

    def post(self, path: str, content: Any, kind: str = "application/json") -> bytes:
        """POST JSON, or bytes of another kind."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        request = urllib.request.Request(f"{self.url}{path}", body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def queue(self, graph: Graph) -> str:
        """Queue a prompt; its id.

        Raises:
            Refused: the server found an error in it.
        """
        try:
            return json.loads(self.post("/prompt", {"prompt": graph, "client_id": self.client}))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise Refused(json.loads(error.read())) from error

    def wait(self, prompt_id: str, timeout: float = 300) -> Ran:
        """Wait until a prompt has ended."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            found = self.json(f"/history/{prompt_id}").get(prompt_id)
            if found:
                return Ran(found["outputs"], found["status"]["status_str"], found["status"]["messages"])
            time.sleep(0.05)
        raise TimeoutError(f"Prompt {prompt_id} did not end within {timeout} s.")

    def run(self, graph: Graph) -> Ran:
        """Queue and wait."""
        return self.wait(self.queue(graph))

    def done(self, graph: Graph) -> Ran:
        """Queue, wait, and expect no error."""
        ran = self.run(graph)
        assert ran.status == "success", ran.error or ran.messages
        return ran

    def view(self, file: dict[str, str]) -> bytes:
        """A file that a node wrote."""
        return self.fetch("/view", filename=file["filename"], subfolder=file["subfolder"], type=file["type"])

    def pictures(self, ran: Ran, node: str) -> list[np.ndarray]:
        """The pictures of SaveImage or PreviewImage: (H, W, 3), levels as integers."""
        files = ran.outputs[node]["images"]
        return [np.asarray(Image.open(io.BytesIO(self.view(file))).convert("RGB"), int) for file in files]

    def latent(self, ran: Ran, node: str) -> torch.Tensor:
        """The latent of SaveLatent."""
        return load(self.view(ran.outputs[node]["latents"][0]))["latent_tensor"]

    def upload(self, picture: Image.Image, name: str) -> str:
        """Put a picture where LoadImage finds it."""
        content = io.BytesIO()
        picture.save(content, "png")
        edge = uuid.uuid4().hex
        head = f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
        tail = (
            f'\r\n--{edge}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n--{edge}--\r\n'.encode()
        )
        answer = self.post("/upload/image", head + content.getvalue() + tail, f"multipart/form-data; boundary={edge}")
        return json.loads(answer)["name"]

    def about(self) -> dict[str, Any]:
        """The server's memory and packages, as the tests' pack sees them."""
        graph = {"1": {"class_type": "FlowOPDTestAbout", "inputs": {"nonce": time.time_ns() % 2**31}}}
        return json.loads(self.done(graph).text("1"))

    def free(self) -> None:
        """Have the server drop its models and all results it keeps."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1.5)  # it does so between two prompts
