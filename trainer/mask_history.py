"""`from trainer.mask_history import load_masks`: the masks that a run kept, for analyses of one's own."""

from trainer.checkpoints.mask_history import load_masks

__all__ = ["load_masks"]
