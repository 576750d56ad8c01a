"""Networks: get_model("resnet50", num_classes=1000). A module each; how one is trained is elsewhere."""

from trainer.models.registry import MODELS, get_model

__all__ = ["MODELS", "get_model"]
