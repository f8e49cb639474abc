"""Writes the scores that `flowopd-eval doctor` holds the miniature's judges against: `python -m benchmarks.selftest`.

Run it when a judge has changed on purpose, and look at what changed.
"""

import argparse
import json
from pathlib import Path

from flowopd_eval.doctor import SELF_TEST, self_test_values

FILE = Path(__file__).parent.parent / "flowopd_eval" / "tiny" / SELF_TEST


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.selftest", description=__doc__).parse_args()
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(self_test_values(), indent=2) + "\n")
    print(FILE)


if __name__ == "__main__":
    main()
