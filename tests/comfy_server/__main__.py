"""``prepare`` writes a ComfyUI base directory, ``run`` starts a ComfyUI on it and runs the tests against it."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
PACK = HERE.parents[1] / "comfy_nodes"
MARK = ".flow-opd-tests"  # a base directory of ours, which may be written anew
STANDINS = HERE / "standins"


def prepare(base: Path, pack: Path) -> None:
    """Write the base directory: both packs, the miniature's files, the LoRAs."""
    from flowopd_eval.quiet import quiet_libraries

    if base.exists() and not (base / MARK).is_file():
        sys.exit(f"{base} is there and was not made by this command; name a folder that is not there yet.")
    shutil.rmtree(base, ignore_errors=True)
    for name in ("custom_nodes", "input", "models/loras", "models/checkpoints", "output", "temp", "user"):
        (base / name).mkdir(parents=True)
    (base / MARK).touch()
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(pack, base / "custom_nodes" / "flow-opd", ignore=skip)
    shutil.copytree(HERE / "pack", base / "custom_nodes" / "flow_opd_tests", ignore=skip)
    with quiet_libraries():
        from .files import write_loras, write_miniature

        write_miniature(base / "custom_nodes" / "flow_opd_tests" / "files")
        write_loras(base / "models" / "loras")
    print(f"{base}: the pack of {pack}, the tests' pack, the miniature, {_count(base)} LoRAs with random factors.")


def _count(base: Path) -> int:
    return len(list((base / "models" / "loras").rglob("*.safetensors")))


def server_environment(python: str) -> dict[str, str]:
    """The server's environment: with stand-ins for torchvision and torchaudio where these cannot be imported."""
    env = dict(os.environ)
    for name in ("torchvision", "torchaudio"):
        if subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STANDINS), os.environ.get("PYTHONPATH", "")]))
            print(f"{python} cannot import {name}: a stand-in that only lets ComfyUI's imports pass takes its place.")
    return env


def run(base: Path, comfyui: Path, python: str, port: int, server: list[str], tests: list[str]) -> int:
    """Start ComfyUI on ``base``, run the tests, end it; the exit code of the tests."""
    url = f"http://127.0.0.1:{port}"
    command = [python, str(comfyui.resolve() / "main.py"), "--base-directory", str(base.resolve())]
    command += ["--port", str(port), "--preview-method", "latent2rgb", "--database-url", "sqlite:///:memory:", *server]
    with open(base / "server.log", "w") as log:
        process = subprocess.Popen(command, cwd=comfyui, env=server_environment(python), stdout=log, stderr=log)
        try:
            _wait(url, process, base / "server.log")
            environment = {**os.environ, "COMFYUI_URL": url, "COMFYUI_BASE": str(base.resolve())}
            chosen = [sys.executable, "-m", "pytest", str(HERE), "--no-cov", *tests]
            return subprocess.run(chosen, cwd=PACK.parent, env=environment).returncode
        finally:
            process.terminate()
            process.wait(30)


def take_pictures(url: str) -> None:
    """Write the picture beside each example: its canvas after Run, with the miniature in SD3.5's place."""
    from .canvas import browser, exchange_model, open_example, photograph, press_run
    from .client import Server
    from .graphs import EXAMPLES

    with browser(url) as page:
        for path in sorted(EXAMPLES.glob("*.json")):
            open_example(page, path.stem)
            exchange_model(page)
            ended = press_run(page, Server(url))
            path.with_suffix(".jpg").write_bytes(photograph(page))
            print(f"{path.stem}: {ended}, {path.with_suffix('.jpg').stat().st_size // 1000} kB")


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(300):
        if process.poll() is not None:
            sys.exit(f"ComfyUI ended with code {process.returncode}; its last words are in {log}.")
        try:
            urllib.request.urlopen(f"{url}/system_stats", timeout=2)
            return
        except OSError:
            time.sleep(1)
    sys.exit(f"ComfyUI gave no answer at {url} within five minutes; see {log}.")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.comfy_server", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare", help="write a ComfyUI base directory for the tests")
    first.add_argument("base", type=Path)
    first.add_argument("--pack", type=Path, default=PACK, help="the pack to test: comfy_nodes, or a released tree")
    second = commands.add_parser("run", help="start a ComfyUI on it and run the tests; after --, arguments of pytest")
    second.add_argument("base", type=Path)
    second.add_argument("--comfyui", type=Path, required=True, help="the folder with ComfyUI's main.py")
    second.add_argument("--python", default=sys.executable, help="the Python that has ComfyUI's requirements")
    second.add_argument("--port", type=int, default=8190)
    second.add_argument("--server", default="--cpu", help="further arguments of ComfyUI's main.py, in one string")
    third = commands.add_parser("pictures", help="write the pictures beside the examples, with a running server")
    third.add_argument("url")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, tests = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    if given.command == "prepare":
        prepare(given.base, given.pack)
    elif given.command == "pictures":
        take_pictures(given.url)
    else:
        sys.exit(run(given.base, given.comfyui, given.python, given.port, given.server.split(), tests))


if __name__ == "__main__":
    main()
