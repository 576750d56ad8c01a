"""The subset of Fashion-MNIST that comes with the package, and how it was made."""
