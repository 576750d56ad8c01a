import numpy as np
import pytest

from data.datasets import fashion_mnist
from data.datasets.random_labels import randomise


def test_some_labels_are_drawn_and_everything_else_stays():
    train = fashion_mnist.load(None, "train")
    drawn = randomise(train, 1000, seed=21)
    changed = np.flatnonzero(drawn.train.labels != train.labels)
    assert 850 <= len(changed) <= 945  # a tenth draws its true label
    assert (len(drawn.random), len(drawn.true)) == (1000, 1000)
    assert drawn.train.images is train.images
    assert np.array_equal(drawn.random.images, drawn.true.images)
    assert (drawn.random.labels != drawn.true.labels).sum() == len(changed)
    assert train.images[changed[0]].tobytes() in {image.tobytes() for image in drawn.true.images}
    assert np.bincount(drawn.random.labels, minlength=10).min() > 60


def test_the_seed_alone_decides():
    train = fashion_mnist.load(None, "train")
    first, again, other = (randomise(train, 50, seed) for seed in (3, 3, 4))
    assert first.train.digest == again.train.digest != other.train.digest


@pytest.mark.parametrize("count", [0, 2001])
def test_impossible_counts_are_refused(count):
    with pytest.raises(ValueError, match="of 2000 training images"):
        randomise(fashion_mnist.load(None, "test"), count, seed=1)
