"""How the toybox base model was trained, from nothing; `python -m mip.toybox.pretrain` does it again."""
