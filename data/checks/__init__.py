"""Damage to image files: what is looked for, and the pass over all of them. Training reads none of this."""
