"""What the nodes do, without ComfyUI."""
