import pytest

from data.datasets import fashion_mnist
from data.datasets.sources import SOURCES


def test_mnist_reads_the_same_four_files_with_its_own_normalisation(tiny_data, tmp_path):
    train = SOURCES["mnist"](tiny_data, "train")
    assert len(train) == 320
    assert (train.mean, train.std) == ((0.1307,), (0.3081,))
    assert (train.images == fashion_mnist.load(tiny_data, "train").images).all()
    with pytest.raises(FileNotFoundError, match="no MNIST in"):
        SOURCES["mnist"](tmp_path, "test")
