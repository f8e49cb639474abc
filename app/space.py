"""The folder as a Space: what a Space runs. ``FLOW_OPD_MODEL`` among its variables names the family (default: tiny).

A Space has this folder as its root, under whatever name; the modules in it are the package ``app`` all the same.
"""

import importlib.util
import os
import sys
from pathlib import Path

here = Path(__file__).parent
spec = importlib.util.spec_from_file_location("app", here / "__init__.py", submodule_search_locations=[str(here)])
assert spec
assert spec.loader
package = importlib.util.module_from_spec(spec)
sys.modules["app"] = package
spec.loader.exec_module(package)

from app.__main__ import run  # noqa: E402

sys.argv = [sys.argv[0], "--model", os.environ.get("FLOW_OPD_MODEL", "tiny"), "--votes", "/tmp/votes.sqlite"]
run()
