"""The ComfyUI pack inside a real ComfyUI, with the built-in miniature in the place of Stable Diffusion 3.5.

    python -m tests.comfy_server prepare BASE
    python -m tests.comfy_server run BASE --comfyui DIR --python DIR/venv/bin/python

The first writes a ComfyUI base directory: the pack and the tests' own pack in ``custom_nodes``, the miniature's and the
LoRAs' files. The second starts that ComfyUI on it, runs the tests of this folder against it (they skip without
``COMFYUI_URL``) and ends it. Nothing is written into the ComfyUI folder itself.
"""
