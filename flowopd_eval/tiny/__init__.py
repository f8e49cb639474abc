"""The built-in miniature: its world, its detector, its weights."""
