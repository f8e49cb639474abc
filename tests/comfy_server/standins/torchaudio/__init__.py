"""NOT torchaudio: see the stand-in for torchvision beside it."""

from torchvision import stand_in

__version__ = "0.0.0+standin"
stand_in(__name__, ("functional", "transforms"))
