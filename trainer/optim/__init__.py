"""How weights are trained: optimizers, learning rates, averages of weights."""

from trainer.optim.optimizers import build_optimizer
from trainer.optim.rates import learning_rate

__all__ = ["build_optimizer", "learning_rate"]
