"""The tests' own ComfyUI pack: loads the miniature, spoils a model on purpose, looks at the server's memory.

ComfyUI ties the sizes of its text encoders and autoencoders to known models, so that of the miniature only the
transformer loads as it is. Its autoencoder is ComfyUI's own with the miniature's numbers, and its text encoder a table
of prompts encoded beforehand. Written against ComfyUI 0.3.64, 0.8.0 and 0.33.0.
"""

from __future__ import annotations

import gc
import importlib.util
import json
from pathlib import Path
from unittest import mock

import comfy.ldm.modules.diffusionmodules.model as autoencoder_parts
import comfy.model_management
import comfy.ops
import comfy.sd
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io, ui
from safetensors import safe_open
from safetensors.torch import load_file

FILES = Path(__file__).parent / "files"
CATEGORY = "Flow-OPD tests"
VAE_CONFIG = {
    "double_z": True,
    "z_channels": 16,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 16,
    "ch_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


class PromptTable:
    """In the place of ComfyUI's CLIP: knows the prompts that were encoded beforehand, and no others."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.prompts = json.loads(file.metadata()["prompts"])
        self.tensors = load_file(path)

    def clone(self) -> PromptTable:
        return self

    def set_tokenizer_option(self, name: str, value: int) -> None:
        """The miniature has no T5."""

    def tokenize(self, text: str) -> str:
        if text not in self.prompts:
            raise ValueError(f"The tests' text encoder knows {', '.join(map(repr, self.prompts))}, but not {text!r}.")
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list:
        index = self.prompts.index(text)
        return [[self.tensors[f"{index}.cond"], {"pooled_output": self.tensors[f"{index}.pooled"]}]]


class GroupsOfEight(comfy.ops.disable_weight_init):
    """ComfyUI's layers with the miniature's normalisation: 32 groups are more than its first layers' channels."""

    @staticmethod
    def GroupNorm(num_groups: int, num_channels: int, **others) -> torch.nn.Module:
        return comfy.ops.disable_weight_init.GroupNorm(8, num_channels, **others)


class LoadMiniature(io.ComfyNode):
    """MODEL, CLIP and VAE, in the order of CheckpointLoaderSimple."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowOPDTestLoadMiniature",
            display_name="Load the Flow-OPD miniature",
            category=CATEGORY,
            inputs=[],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Clip.Output(display_name="CLIP"),
                io.Vae.Output(display_name="VAE"),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        model = comfy.sd.load_diffusion_model(str(FILES / "transformer.safetensors"), {"dtype": torch.float32})
        with mock.patch.object(autoencoder_parts, "ops", GroupsOfEight):
            vae = comfy.sd.VAE(
                load_file(FILES / "vae.safetensors"),
                config={"params": {"ddconfig": VAE_CONFIG, "embed_dim": 16}},
                dtype=torch.float32,
            )
        vae.latent_channels, vae.downscale_ratio, vae.upscale_ratio = 16, 4, 4
        return io.NodeOutput(model, PromptTable(FILES / "conditioning.safetensors"), vae)


class Spoil(io.ComfyNode):
    """The model, made to interrupt, to fail or to draw NaN when its steps are counted up to ``at_step``."""

    calls: dict[str, int] = {}  # noqa: RUF012  read by FlowOPDTestAbout

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowOPDTestSpoil",
            display_name="Spoil a model",
            category=CATEGORY,
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("how", options=["interrupt", "fail", "nan", "count"]),
                io.Int.Input("at_step", default=1, min=1),
                io.String.Input("name"),
            ],
            outputs=[io.Model.Output(display_name="MODEL")],
        )

    @classmethod
    def execute(cls, model, how: str, at_step: int, name: str) -> io.NodeOutput:
        calls = Spoil.calls
        calls[name] = 0

        def wrapper(function, arguments):
            calls[name] += 1
            if calls[name] == 1:  # a file that the tests can ask for while the prompt runs
                place = Path(folder_paths.get_output_directory()) / "flow-opd-tests"
                place.mkdir(exist_ok=True)
                (place / f"{name}.started").touch()
            out = function(arguments["input"], arguments["timestep"], **arguments["c"])
            if calls[name] == at_step:
                if how == "interrupt":
                    comfy.model_management.interrupt_current_processing()
                if how == "fail":
                    raise RuntimeError("failed on purpose")
                if how == "nan":
                    return out * float("nan")
            return out

        clone = model.clone()
        clone.set_model_unet_function_wrapper(wrapper)
        return io.NodeOutput(clone)


class About(io.ComfyNode):
    """The server's memory and environment, as JSON."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowOPDTestAbout",
            display_name="About this server",
            category=CATEGORY,
            inputs=[io.Int.Input("nonce", default=0)],
            outputs=[io.String.Output(display_name="about")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, nonce: int) -> io.NodeOutput:
        gc.collect()
        objects = gc.get_objects()
        tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in objects if _is_plain(t)}
        packages = ("flowopd_eval", "rapidocr", "diffusers", "peft")
        about = {
            "tensor_bytes": sum(tensors.values()),
            "scorers": sorted(
                {type(o).__name__ for o in objects if str(type(o).__module__).startswith("flowopd_eval.")}
            ),
            "packages": {name: importlib.util.find_spec(name) is not None for name in packages},
            "calls": dict(Spoil.calls),
        }
        said = json.dumps(about)
        return io.NodeOutput(said, ui=ui.PreviewText(said))


def _is_plain(candidate: object) -> bool:
    return type(candidate) in (torch.Tensor, torch.nn.Parameter) and candidate.layout == torch.strided


class TestsExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadMiniature, Spoil, About]


async def comfy_entrypoint() -> TestsExtension:
    return TestsExtension()
