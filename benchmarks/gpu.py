"""Every check that needs a CUDA device, in one command: ``python -m benchmarks.gpu``."""

import subprocess
import sys


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} finds no CUDA device here; these checks need one.", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    return subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "--no-cov", "-s", "tests"]).returncode


if __name__ == "__main__":
    sys.exit(main())
