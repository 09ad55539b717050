"""The embedded world: rendered scenes in real file formats, and a tiny SDXL-shaped model trained on them."""
