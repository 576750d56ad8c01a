"""Modules that compute with weight * mask: convolutions, linear layers, attention. Which of a model's become
such: sparsity.layers."""
