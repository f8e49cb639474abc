"""NOT torchvision: lets ComfyUI's imports pass where no torchvision fits the torch that is there, and fails on use.

ComfyUI imports torchvision and torchaudio when it starts, though nothing that these tests run needs either. Names can
be imported and subclassed; calling one raises RuntimeError.
"""

import sys
from types import ModuleType

__version__ = "0.0.0+standin"
PARTS = ("io", "models", "ops", "transforms", "transforms.functional", "transforms.v2", "utils")


class _Missing(type):
    """A class that has every attribute and cannot be made."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *args, **kwargs):
        raise RuntimeError(f"{cls.__name__} was called, but {__name__} here is a stand-in of the Flow-OPD tests.")


def stand_in(package: str, parts: tuple[str, ...]) -> None:
    """Make ``package`` and its ``parts`` answer every name with something that only fails when called."""
    for name in (package, *(f"{package}.{part}" for part in parts)):
        module = sys.modules.setdefault(name, ModuleType(name))
        module.__getattr__ = _answer(name)
        module.__path__ = getattr(module, "__path__", [])
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def _answer(module: str):
    def answer(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{module}.{name}", (), {})

    return answer


stand_in(__name__, PARTS)
