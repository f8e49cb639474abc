"""The nodes: ComfyUI's types and calls, and no more."""
